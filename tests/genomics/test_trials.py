"""Seeds, folds and the table of what they reach; labels, numbers and weights of classes from data to figures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import seqmodels
from seqmodels import presets
from seqmodels.caduceus import save_caduceus
from seqmodels.cli import main
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics import evaluate, trials
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.labelled import LabelledRecords, load_labelled
from seqmodels.tasks.genomics.tokens import TOKENIZER, encode, reverse_complement
from seqmodels.tasks.genomics.train import train
from seqmodels.training import TrainingConfig, schedule

TINY = {"d_model": 32, "n_layer": 1, "d_state": 8, "batch_tokens": 4000}


def training(**changes):
    return TrainingConfig(**{"max_steps": 12, "validate_every": 6, "learning_rate": 1e-2, "device": "cpu", **changes})


def sequences(n, seed):
    """Sequences with their part of A and T."""
    rng = np.random.default_rng(seed)
    parts = rng.uniform(0.1, 0.9, n)
    return [("".join(rng.choice(list("ACGT"), 40, p=[p / 2, (1 - p) / 2, (1 - p) / 2, p / 2])), p) for p in parts]


@pytest.fixture
def splits(tmp_path):
    """A folder with official splits, whose test split has the labels the wrong way round."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (split, n) in enumerate((("train", 80), ("dev", 30), ("test", 30))):
        rows = [f"{s},{'low' if (p < 0.5) != (split == 'test') else 'high'}" for s, p in sequences(n, seed)]
        (folder / f"{split}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    return folder


def test_seeds_give_a_table_and_the_test_split_is_measured_once_per_finished_model(
    splits, tmp_path, monkeypatch, one_thread
):
    looked = []
    measure = evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda model, records, *rest: (
            looked.append((model.parent.name, len(records.names))), measure(model, records, *rest)
        )[1],
    )  # fmt: skip
    (splits / "test.csv").rename(splits / "hidden")
    assert train(splits, tmp_path / "dev", seeds=2, **TINY, training=training()) == 0  # needs no test split
    (splits / "hidden").rename(splits / "test.csv")
    looked.clear()
    options = {"seeds": 2, "test": True, "class_weights": "balanced", **TINY}
    assert train(splits, tmp_path / "run", **options, training=training()) == 0
    assert looked == [("seed0", 30), ("seed0", 30), ("seed1", 30), ("seed1", 30)]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["measured on"], row["metric"]): row for row in results["summary"]}
    assert rows["dev", "accuracy"]["mean"] > 0.7
    assert rows["test", "accuracy"]["mean"] < 0.3  # the other way round there
    values = rows["test", "mcc"]["values"]
    assert rows["test", "mcc"]["spread"] == pytest.approx(np.std(values, ddof=1))
    assert values == [m["results"]["test"][0]["metrics"]["mcc"]["value"] for m in results["models"]]
    again = dict(options, training=training(resume=True))
    train(splits, tmp_path / "run", **again)
    assert len(looked) == 4
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    train(splits, tmp_path / "dev", **again | {"class_weights": None})  # measured before, but not on the test split
    assert [count for _, count in looked[4:]] == [30] * 4


def test_folds_hold_out_each_sequence_once_and_equal_ones_together():
    rng = np.random.default_rng(0)
    tokens = [encode(s.encode()) for s, _ in sequences(60, 5)]
    tokens += [tokens[3], reverse_complement(tokens[4])]
    labels = np.array([0] * 40 + [1] * 20 + [0, 0])
    records = LabelledRecords([str(i) for i in range(62)], tokens, labels, ("a", "b"), False)
    folds = trials.fold_of(records, 5)
    assert folds[60] == folds[3]
    assert folds[61] == folds[4]
    assert np.bincount(folds[:60]).tolist() == [12] * 5
    assert all(np.bincount(labels[:60][folds[:60] == k]).tolist() == [8, 4] for k in range(5))
    plan = trials.plan(Path("x"), training(), {"train": records}, 2, 5)
    assert [t.run.name for t in plan][4:6] == ["seed0-fold4", "seed1-fold0"]
    held_out = [name for t in plan[:5] for name in t.measured["fold"].names]
    assert sorted(held_out, key=int) == records.names
    assert all(not set(t.records.names) & set(t.measured["fold"].names) for t in plan)
    values = LabelledRecords(records.names, tokens, rng.normal(size=(62, 1)).astype(np.float32), ("v",), False)
    folds = trials.fold_of(values, 3)
    means = [values.labels[folds == k].mean() for k in range(3)]
    assert np.ptp(means) < 0.2  # values alike in all folds


@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_several_labels_and_numbers_are_learnt_and_evaluated(kind, tmp_path, one_thread, capsys):
    for seed, split in enumerate(("train", "test")):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sequence", "label_at", "label_gc"])
            for s, p in sequences(120, seed):
                at, gc = (int(p > 0.4), int(p < 0.6)) if kind == "multi" else (100 + 50 * p, "" if p > 0.8 else -p)
                writer.writerow([s, at, gc])
    options = {"targets": kind, "batching": "packed", **TINY}
    train(tmp_path, tmp_path / "run", test=True, **options, training=training(max_steps=40, validate_every=20))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row["metric"]: row["mean"] for row in results["summary"] if row["measured on"] == "test"}
    assert rows["auroc" if kind == "multi" else "pearson"] > 0.7
    capsys.readouterr()
    assert evaluate.evaluate(str(tmp_path / "run" / "model"), tmp_path, resamples=20, device="cpu") == 0
    assert "label  " in capsys.readouterr().out
    (tmp_path / "x.fa").write_text(f">gc\n{'GGC' * 15}\n>at\n{'ATTAA' * 9}\n")
    assert classify([tmp_path / "x.fa"], str(tmp_path / "run" / "model"), tmp_path / "o.csv", device="cpu") == 0
    gc, at = csv.DictReader((tmp_path / "o.csv").read_text().splitlines())
    if kind == "multi":
        assert float(at["p_at"]) > float(gc["p_at"])
        assert gc["label"] == ";".join(name for name in ("at", "gc") if float(gc[f"p_{name}"]) >= 0.5)
    else:
        assert float(at["value_at"]) > float(gc["value_at"])
    model = seqmodels.load(tmp_path / "run" / "model")
    if kind == "regression":  # in the units of the data
        records = load_labelled(tmp_path, split="train", targets=kind)
        said = model(torch.from_numpy(np.stack(records.tokens)).long()).detach().numpy()
        assert 100 < said[:, 0].mean() < 150


def test_a_frozen_backbone_stays_and_the_head_learns(splits, tmp_path, one_thread):
    train(splits, tmp_path / "start", **TINY, training=training(max_steps=2))
    start = str(tmp_path / "start" / "model")
    train(splits, tmp_path / "head", batch_tokens=4000, start_from=start, tune="head", training=training(max_steps=3))
    before, after = seqmodels.load(start).state_dict(), seqmodels.load(tmp_path / "head" / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"score.weight", "score.bias"}
    assert json.loads((tmp_path / "head" / "run.json").read_text())["tune"] == "head"


def test_the_caduceus_recipe_runs_on_a_genomic_benchmark(tmp_path, one_thread):
    data = tmp_path / "human_enhancers_cohn"
    for seed, (split, n) in enumerate((("train", 80), ("test", 20))):
        for i, (sequence, p) in enumerate(sequences(n, seed)):
            folder = data / split / ("positive" if p > 0.5 else "negative")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.txt").write_text(sequence)
    backbone = presets.caduceus(16, 1)
    config = ModelConfig(vocab_size=16, backbone=backbone, head=HeadConfig(task="masked_token"), tokenizer=TOKENIZER)
    pretrained = str(save_caduceus(seqmodels.build(config, seed=3), tmp_path / "caduceus-ph"))
    words = f"dna train {data} {tmp_path / 'run'} --start-from {pretrained} --strands conjoined --batch-tokens 320"
    words += " --epochs 2 --seeds 2 --test --training.learning-rate 1e-3 --training.betas [0.9,0.999]"
    words += " --training.warmup 0.01 --training.final-rate 0.1 --training.device cpu"
    assert main(words.split()) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["classes"] == ["negative", "positive"]
    assert [m["records"] for m in results["models"]] == [{"dev": 8, "test": 20}] * 2
    settings = json.loads((tmp_path / "run" / "seed1" / "run.json").read_text())["training"]
    assert (settings["max_steps"], settings["validate_every"]) == (18, 9)  # 72 records, 8 at a time
    assert schedule(18, 18, 0.01, settings["final_rate"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2, "training": training(step_tokens=1 << 17)}, "they count passes over short records"),
        ({"tune": "head"}, "name one"),
        ({"folds": 1}, "folds 1; give at least one seed, and no folds or two or more"),
        ({"seeds": 0}, "seeds is 0"),
        ({"folds": 2, "test": True}, "leave --test out"),
        ({"seeds": 2, "training": training(devices=2)}, "trained one after the other"),
        ({"class_weights": "1,2,3"}, "a positive number for each of high, low"),
        ({"class_weights": "1,-2"}, "a positive number for each of high, low"),
        ({"targets": "regression"}, "'high' of row_2 is not a number|'low' of row_2 is not a number"),
        ({"folds": 1000}, "for 1000 folds; use fewer"),
    ],
)
def test_bad_plans_are_told_before_a_run_is_begun(splits, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(splits, tmp_path / "run", **{"training": training(), **options})
    assert not (tmp_path / "run").exists()


def test_no_test_split_is_told(tmp_path):
    (tmp_path / "x.csv").write_text("sequence,label\nACG,a\nCCC,b\n")
    with pytest.raises(InputError, match="has no test split to measure on"):
        train(tmp_path / "x.csv", tmp_path / "run", test=True)
