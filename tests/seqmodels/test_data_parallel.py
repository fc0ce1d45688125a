"""Several processes (gloo, on a CPU) train what one process with as many batches per step trains.

Two that read batches of their own, and four of which two or all share each sequence.
"""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from seqmodels import presets
from seqmodels.cli import main
from seqmodels.config import HeadConfig, Mamba2Config, ModelConfig
from seqmodels.errors import InputError
from seqmodels.training import TrainingConfig, as_started, fit

BACKBONE = dataclasses.replace(presets.mamba2(16, 2, head_dim=8, d_state=4), dropout=0.1)
CONFIG = ModelConfig(vocab_size=5, backbone=BACKBONE, head=HeadConfig(task="next_token"))
TRAINING = TrainingConfig(
    max_steps=6, validate_every=2, learning_rate=1e-2, accumulate=2, gradient_clip=0.1, device="cpu"
)
PLAIN = dataclasses.replace(CONFIG, backbone=presets.mamba2(16, 2, head_dim=8, d_state=4))
LABELS = dataclasses.replace(
    CONFIG,
    backbone=presets.mamba2(8, 1, bidirectional=True, head_dim=8, d_state=4),
    head=HeadConfig(task="sequence", labels=("a", "b", "c", "d", "e")),
)
SHARED = dataclasses.replace(TRAINING, max_steps=2, validate_every=1, seed=1)
RUNS = {  # what four processes train, and how many of them share each sequence
    "shared-ddp": (PLAIN, dataclasses.replace(SHARED, sequence_parallel=2, ema_decay=0.5)),
    "shared-fsdp2": (LABELS, dataclasses.replace(SHARED, sequence_parallel=2, strategy="fsdp2", recompute=8)),
    "carried": (PLAIN, dataclasses.replace(SHARED, sequence_parallel=4, strategy="fsdp2", carry_state=True)),
}


class Cycles:
    """Sequences 0 1 2 3 4 0 1 ... from a random start; what goes wrong at batch `broken` is not on the disk.

    Of every three batches one counts for more than the next.
    """

    def __init__(self, broken=None, labels=False, steps=16):
        self.broken, self.labels, self.steps = broken, labels, steps

    def train_batch(self, step):
        if self.broken is not None and step >= self.broken:
            raise ConnectionError
        start = torch.randint(0, 5, (4, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(self.steps + 1)) % 5
        if self.labels:
            batch = {"ids": ids[:, :-1], "targets": start[:, 0], "lengths": torch.tensor([self.steps, 9, 7, 2])}
            return {name: tensor[: 4 - step % 3] for name, tensor in batch.items()}
        return {"ids": ids[:, :-1], "targets": ids[:, 1:].masked_fill(torch.arange(self.steps) < 5 * (step % 3), -100)}

    def tokens(self, step):
        return 4 * self.steps

    def validation_batches(self):
        return [{k: v[: 1 + i] for k, v in self.train_batch(-1 - i).items()} for i in range(3)]


def worker(folder):
    """What each process does: a whole run, and one that breaks off and is resumed, for each strategy."""
    torch.set_num_threads(1)
    for strategy in ("ddp", "fsdp2"):
        training = dataclasses.replace(TRAINING, strategy=strategy)
        if strategy == "fsdp2":  # step_tokens: those of four batches
            training = dataclasses.replace(training, recompute=8, accumulate=1, step_tokens=4 * 4 * 16)
        fit(CONFIG, Cycles(), training, folder / strategy)
        with pytest.raises(ConnectionError):
            fit(CONFIG, Cycles(broken=4 * 3), training, folder / f"{strategy}-broken")
        fit(CONFIG, Cycles(), dataclasses.replace(training, resume=True), folder / f"{strategy}-broken")


def sharing_worker(folder):
    """The same for RUNS, in float64; also writes down the seeds of dropout, and tries sequences that are too short."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    seeds, seed = [], torch.manual_seed
    torch.manual_seed = lambda number: (seeds.append(number), seed(number))[1]
    for name, (config, training) in RUNS.items():
        labels = config is LABELS
        seeds.clear()
        fit(config, Cycles(labels=labels), training, folder / name)
        (folder / f"{name}-seeds-{os.environ['RANK']}").write_text(json.dumps([n for n in seeds if n > 1]))
        if name != "shared-ddp":
            with pytest.raises(ConnectionError):
                fit(config, Cycles(as_started(training).batches_per_step, labels), training, folder / f"{name}-broken")
            fit(config, Cycles(labels=labels), dataclasses.replace(training, resume=True), folder / f"{name}-broken")
    with pytest.raises(InputError, match="9 steps in stretches of 3 leave nothing for the last of 4 ranks"):
        fit(*RUNS["carried"][:1], Cycles(steps=9), RUNS["carried"][1], folder / "short")


def launch(processes, function, folder):
    """function(folder) in processes started as torchrun starts them, but forked, since importing takes seconds."""
    config = LaunchConfig(
        1, 1, processes, start_method="fork", run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, as_imported)(function, folder)


def as_imported(function, folder):
    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning looks at it when it is imported
    function(folder)


if __name__ == "__main__":
    launch(2, worker, Path(sys.argv[1]))
    launch(4, sharing_worker, Path(sys.argv[1]))


def start(*command):
    environment, pipes = {**os.environ, "OMP_NUM_THREADS": "1"}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], text=True, env=environment, **pipes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the workers' runs and of the same in one process (`one` and NAME-one); the workers' messages."""
    folder = tmp_path_factory.mktemp("runs")
    workers = start(__file__, str(folder))
    try:
        fit(CONFIG, Cycles(), dataclasses.replace(TRAINING, accumulate=4), folder / "one")
        torch.set_default_dtype(torch.float64)
        for name, (config, training) in RUNS.items():
            batches = training.accumulate * 4 // training.sequence_parallel
            alone = {"sequence_parallel": 1, "accumulate": batches, "strategy": "auto", "recompute": 0}
            training = dataclasses.replace(training, **alone)
            fit(config, Cycles(labels=config is LABELS), training, folder / f"{name}-one")
        messages = workers.communicate()[1]
    finally:
        torch.set_default_dtype(torch.float32)
        workers.kill()
    assert workers.returncode == 0, messages
    return folder, messages


def curve(run, version):
    """The last value of every metric, of every step that has one."""
    with open(run / "logs" / f"version_{version}" / "metrics.csv", newline="") as file:
        rows = [
            (row["step"], name, float(value)) for row in csv.DictReader(file) for name, value in row.items() if value
        ]
    return {(step, name): value for step, name, value in rows if name.startswith(("train", "val"))}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_make_the_run_of_one_with_twice_the_batches_per_step(runs, strategy):
    folder, messages = runs
    one, two = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", strategy))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert curve(folder / strategy, 0) == pytest.approx(curve(folder / "one", 0), rel=1e-4)
    assert (
        len([path for path in (folder / strategy / "logs").rglob("*.*") if path.suffix != ".yaml"]) == 2
    )  # CSV, events
    assert messages.count("step 6/6") == 4  # one process reports, in each of four runs that end


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_broken_run_of_two_processes_resumes_to_the_same_weights_to_the_bit(runs, strategy):
    folder, _ = runs
    whole, resumed = (
        torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in (strategy, f"{strategy}-broken")
    )
    assert whole["global_step"] == resumed["global_step"] == 6
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    for a, b in zip(whole["optimizer_states"], resumed["optimizer_states"], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)


def last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_processes_that_share_each_sequence_make_the_run_of_one(runs, name):
    folder, _ = runs
    one, several = last(folder / f"{name}-one"), last(folder / name)
    torch.testing.assert_close(several["state_dict"], one["state_dict"], rtol=1e-9, atol=1e-9)
    assert curve(folder / name, 0) == pytest.approx(curve(folder / f"{name}-one", 0), rel=1e-9)
    torch.testing.assert_close(several.get("state"), one.get("state"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "shared-ddp"])
def test_a_broken_run_whose_processes_share_each_sequence_resumes_to_the_same_weights_to_the_bit(runs, name):
    folder, _ = runs
    whole, resumed = (last(folder / run)["state_dict"] for run in (name, f"{name}-broken"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", RUNS)
def test_dropout_is_seeded_apart_for_every_batch_and_stretch(runs, name):
    folder, _ = runs
    training = RUNS[name][1]
    seeds = [n for rank in range(4) for n in json.loads((folder / f"{name}-seeds-{rank}").read_text())]
    assert sorted(seeds) == list(range(1_000_003, 1_000_003 + 4 * training.max_steps * training.accumulate))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            PLAIN,
            {"devices": 3, "sequence_parallel": 2},
            "sequence_parallel is 2, but there are 3 processes; give a divisor",
        ),
        (PLAIN, {"sequence_parallel": 0}, "sequence_parallel is 0"),
        (PLAIN, {"devices": 4, "sequence_parallel": 2, "carry_state": True}, "works with one process, or with several"),
        (
            dataclasses.replace(CONFIG, backbone=presets.lstm(16, 1)),
            {"devices": 2, "sequence_parallel": 2},
            "an RNN cannot share a sequence",
        ),
        (
            dataclasses.replace(
                CONFIG, backbone=presets.multiscale((16, 24), (1, 1), (4,), outer=Mamba2Config(head_dim=8))
            ),
            {"devices": 2, "sequence_parallel": 2},
            "a U-Net pools steps across stretches",
        ),
    ],
)
def test_what_cannot_share_sequences_is_refused_before_anything_is_written(tmp_path, config, options, message):
    with pytest.raises(InputError, match=message):
        fit(config, Cycles(), dataclasses.replace(TRAINING, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_torchrun_of_the_command_trains_and_another_number_of_processes_may_not_resume(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("ACGT"), 30)) + f",{i % 2}" for i in range(20)]
    (tmp_path / "x.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    words = (
        f"dna train {tmp_path}/x.csv {tmp_path}/run --batch-tokens 120 --d-model 32 --n-layer 1 --d-state 8 --kmer 3"
    )
    words += " --training.max-steps 2 --training.validate-every 1 --training.device cpu"
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = start(*torchrun.split(), "-m", "seqmodels", *words.split())
    said, messages = command.communicate()
    assert command.returncode == 0, messages
    assert said.split() == [f"{tmp_path}/run/model"]
    assert messages.count("20 records") == messages.count("step 2/2") == 1
    assert main([*words.split(), "--training.resume"]) == 2
    assert "started with other settings (run.json)" in capsys.readouterr().err
