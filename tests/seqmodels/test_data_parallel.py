"""Two processes (gloo, on a CPU) train what one process with twice the batches per step trains."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seqmodels import presets
from seqmodels.cli import main
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.training import TrainingConfig, fit

BACKBONE = dataclasses.replace(presets.mamba2(16, 2, head_dim=8, d_state=4), dropout=0.1)
CONFIG = ModelConfig(vocab_size=5, backbone=BACKBONE, head=HeadConfig(task="next_token"))
TRAINING = TrainingConfig(
    max_steps=6, validate_every=2, learning_rate=1e-2, accumulate=2, gradient_clip=0.1, device="cpu"
)


class Cycles:
    """Sequences 0 1 2 3 4 0 1 ... from a random start; what goes wrong at batch `broken` is not on the disk."""

    def __init__(self, broken=None):
        self.broken = broken

    def train_batch(self, step):
        if self.broken is not None and step >= self.broken:
            raise ConnectionError
        start = torch.randint(0, 5, (4, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(17)) % 5
        return {"ids": ids[:, :-1], "targets": ids[:, 1:]}

    def validation_batches(self):
        return [{k: v[: 1 + i] for k, v in self.train_batch(-1 - i).items()} for i in range(3)]


def worker(folder):
    """What each process does: a whole run, and one that breaks off and is resumed, for each strategy."""
    torch.set_num_threads(1)
    for strategy in ("ddp", "fsdp2"):
        training = dataclasses.replace(TRAINING, strategy=strategy, recompute=strategy == "fsdp2")
        fit(CONFIG, Cycles(), training, folder / strategy)
        with pytest.raises(ConnectionError):
            fit(CONFIG, Cycles(broken=4 * 3), training, folder / f"{strategy}-broken")
        fit(CONFIG, Cycles(), dataclasses.replace(training, resume=True), folder / f"{strategy}-broken")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs of `worker` in two processes, and of `one` with twice the batches per step."""
    folder = tmp_path_factory.mktemp("runs")
    done = torchrun(__file__, str(folder))
    assert done.returncode == 0, done.stderr
    fit(CONFIG, Cycles(), dataclasses.replace(TRAINING, accumulate=4), folder / "one")
    return folder, done


def curve(run, version):
    """The last value of every metric, of every step that has one."""
    with open(run / "logs" / f"version_{version}" / "metrics.csv", newline="") as file:
        rows = [
            (row["step"], name, float(value)) for row in csv.DictReader(file) for name, value in row.items() if value
        ]
    return {(step, name): value for step, name, value in rows if name.startswith(("train", "val"))}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_make_the_run_of_one_with_twice_the_batches_per_step(runs, strategy):
    folder, done = runs
    one, two = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", strategy))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert curve(folder / strategy, 0) == pytest.approx(curve(folder / "one", 0), rel=1e-4)
    assert (
        len([path for path in (folder / strategy / "logs").rglob("*.*") if path.suffix != ".yaml"]) == 2
    )  # CSV, events
    assert done.stderr.count("step 6/6") == 4  # one process reports, in each of four runs that end


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


def test_torchrun_of_the_command_trains_and_another_number_of_processes_may_not_resume(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("ACGT"), 30)) + f",{i % 2}" for i in range(20)]
    (tmp_path / "x.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    words = (
        f"dna train {tmp_path}/x.csv {tmp_path}/run --batch-tokens 120 --d-model 32 --n-layer 1 --d-state 8 --kmer 3"
    )
    words += " --training.max-steps 2 --training.validate-every 1 --training.device cpu"
    done = torchrun("-m", "seqmodels", *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{tmp_path}/run/model"]
    assert done.stderr.count("20 records") == done.stderr.count("step 2/2") == 1
    assert main([*words.split(), "--training.resume"]) == 2
    assert "started with other settings (run.json)" in capsys.readouterr().err
