"""`longseq bench recall`: batches by seed and number alone, what is learned is remembered, results are kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import seqmodels
from seqmodels.cli import main
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.heads import IGNORED
from seqmodels.tasks.synthetic import recall
from seqmodels.tasks.synthetic.generators import induction_heads
from seqmodels.tasks.synthetic.recall import GENERATORS, GROUP, TEST, RecallData, accuracy, backbone, recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def data(task, seed=0, **changes):
    how = dataclasses.replace(recipe(task, "mamba", "laptop"), **changes)
    return RecallData(generate=GENERATORS[task], recipe=how, seed=seed)


def rows(batch):
    return set(map(tuple, batch["ids"].tolist()))


@pytest.mark.parametrize("task", GENERATORS)
def test_a_batch_depends_on_seed_and_number_alone(task):
    one, other = data(task), data(task)
    other.train_batch(3)
    assert torch.equal(one.train_batch(5)["ids"], other.train_batch(5)["ids"])
    assert not rows(one.train_batch(5)) & rows(one.train_batch(6))
    assert not rows(one.train_batch(5)) & rows(data(task, seed=1).train_batch(5))


@pytest.mark.parametrize("task", GENERATORS)
def test_no_validation_sequence_is_in_any_seeds_training(task):
    held_out = set().union(*map(rows, data(task).validation_batches()))
    assert held_out == set().union(*map(rows, data(task, seed=7).validation_batches()))
    for seed in range(3):
        assert not any(held_out & rows(data(task, seed).train_batch(number)) for number in range(8))


def test_stages_follow_each_other_and_come_again_with_the_same_batches():
    how = recipe("mqar", "mamba", "gpu", 64)
    assert [stage["pairs"] for stage in how.stages] == [2, 4, 8, 16]
    assert how.batch * how.stages[0]["length"] == 2**18  # tokens of a step
    assert how.steps * how.batch == 8 * 4 * how.set_size == 8 * 4 * 2**18  # eight epochs of four sets
    assert how.stage_steps * how.batch == how.set_size
    small = data("mqar", stages=how.stages, batch=4, stage_steps=2, set_size=8)
    asked = [int((small.train_batch(step)["targets"] != IGNORED).sum()) // 4 for step in range(9)]
    assert asked == [2, 2, 4, 4, 8, 8, 16, 16, 2]
    assert torch.equal(small.train_batch(1)["ids"], small.train_batch(9)["ids"])
    assert not torch.equal(small.train_batch(0)["ids"], small.train_batch(1)["ids"])


def test_smaller_batches_go_through_the_stages_as_quickly_with_new_sequences():
    how = recipe("mqar", "mamba", "gpu", 64)
    quarter = data("mqar", stages=how.stages, batch=1, stage_steps=2, set_size=8)
    asked = [int((quarter.train_batch(step)["targets"] != IGNORED).sum()) for step in range(9)]
    assert asked == [2, 2, 4, 4, 8, 8, 16, 16, 2]
    assert len(set().union(*(rows(quarter.train_batch(step)) for step in range(32)))) == 32  # 8 of each stage
    assert torch.equal(quarter.train_batch(1)["ids"], quarter.train_batch(33)["ids"])


def test_copying_learns_from_lengths_that_take_turns_and_is_tested_at_the_last():
    how = recipe("copying", "mamba", "gpu", 300)
    assert [stage["length"] for stage in how.stages] == [64, 128, 256, 300]
    assert how.tests == how.stages[-1:]
    turns = data("copying", stages=how.stages, batch=2)
    assert [turns.train_batch(step)["ids"].shape[1] - 16 for step in range(5)] == [64, 128, 256, 300, 64]
    assert [stage["length"] for stage in recipe("copying", "mamba", "gpu", None, 4096).stages] == [4096]


def test_induction_learns_at_one_length_or_from_shorter_ones_too():
    assert [stage["length"] for stage in recipe("induction", "mamba", "gpu").stages] == [256]
    assert [stage["length"] for stage in recipe("induction", "mamba", "gpu", None, 64).stages] == [64, 128, 256]
    assert [stage["length"] for stage in recipe("induction", "mamba", "laptop", None, 16).stages] == [16, 32, 64]


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "s4d", "attention", "window", "lstm"])
def test_reading_in_stretches_gives_the_answers_of_one_pass(mixer):
    config = backbone("induction", mixer, 16, None, 5)
    config = ModelConfig(vocab_size=4, backbone=config, head=HeadConfig(task="next_token"))
    model, sizes = seqmodels.build(config, seed=0).eval(), {"length": 48, "vocabulary": 4}
    ids, targets = map(torch.from_numpy, induction_heads(np.random.default_rng((TEST, 0)), GROUP, **sizes))
    with torch.inference_mode():
        said = model(ids)[0][:, -1].argmax(-1)
    assert accuracy(model, induction_heads, sizes, 1, at_once=20 * GROUP) == float(
        (said == targets[:, -1]).double().mean()
    )


def test_a_small_model_learns_induction_heads_also_beyond_the_length_it_was_trained_on(tmp_path, monkeypatch, capsys):
    only = {"length": 8, "vocabulary": 4}
    changes = {"stages": (only,), "tests": (only, {**only, "length": 16})}
    monkeypatch.setattr(recall, "recipe", lambda *given: dataclasses.replace(recipe(*given), **changes))
    output = tmp_path / "recall.json"
    words = ["bench", "recall", "--mixer", "mamba2", "--d-state", "16", "--device", "cpu"]
    words += ["--batch", "32", "--steps", "50", "--learning-rate", "0.02", "--warmup", "0.04"]
    words += ["--output", str(output), "--run", str(tmp_path / "run")]
    assert main(words) == 0
    (row,) = json.loads(output.read_text())
    assert [test["accuracy"] > 0.9 for test in row["tests"]] == [True, True]
    said = {"mixer": "mamba2", "d_state": 16, "batch": 32, "steps": 50, "learning_rate": 0.02, "warmup": 0.04}
    assert {name: row[name] for name in said} == said
    assert {"versions", "commit", "gpu", "seconds", "parameters"} <= row.keys()
    assert str(output) in capsys.readouterr().out
    assert main(words) == 0  # goes on where the run has stopped, at its end, and takes the place of its row
    (again,) = json.loads(output.read_text())
    assert again["tests"] == row["tests"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "reversal"], "--task"),
        (["--mixer", "lstm", "--d-state", "4"], "lstm has no state of that kind"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--warmup", "1"], "--warmup is 1.0; expected a part of the steps"),
        (["--task", "mqar", "--length", "8"], "give fewer pairs"),
        (["--task", "mqar", "--shortest", "8"], "--shortest is for copying and induction, not for --task mqar"),
        (["--shortest", "80"], "--shortest is 80, but the longest sequence has 64 steps"),
        (["--mixer", "attention", "--d-model", "12"], "choose num_heads"),
    ],
)
def test_bad_words_get_one_line(words, said, tmp_path, capsys):
    assert main(["bench", "recall", *words, "--output", str(tmp_path / "x.json"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
