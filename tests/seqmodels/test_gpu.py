"""A GPU computes what a CPU computes in float32: losses, every gradient, and the shipped models' answers.

And two GPUs that share each sequence compute, through NCCL, what one computes.
"""

import csv
import dataclasses
import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import seqmodels
from seqmodels import presets
from seqmodels.batching import pack
from seqmodels.config import (
    BackboneConfig,
    BidirectionalConfig,
    HeadConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    S4DConfig,
)
from seqmodels.errors import InputError
from seqmodels.sequence_parallel import parallelise, reduce_gradients, split
from seqmodels.training import TrainingConfig, fit

BACKBONES = {
    "mamba": lambda: presets.mamba(64, 2),
    "mamba2": lambda: presets.mamba2(64, 2, head_dim=32, d_state=16),
    "s4d": lambda: BackboneConfig(d_model=64, layers=(S4DConfig(), S4DConfig(initialisation="real", d_state=16))),
    "u-net": lambda: presets.multiscale((32, 48, 64), (1, 1, 1), (4, 4), outer=Mamba2Config(head_dim=16, d_state=8)),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_gpu_and_a_cpu_agree_on_the_loss_and_every_gradient(name):
    config = ModelConfig(vocab_size=16, backbone=BACKBONES[name](), head=HeadConfig(task="next_token"))
    model = seqmodels.build(config, seed=0)
    ids = torch.randint(0, 16, (2, 1000), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
    want, _ = model.loss(batch)
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    got, _ = model.loss({key: value.cuda() for key, value in batch.items()})
    got.backward()
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    for parameter_name, parameter in model.named_parameters():
        error = (parameter.grad.cpu() - gradients[parameter_name]).norm()
        assert error <= 1e-4 * gradients[parameter_name].norm(), parameter_name


@pytest.mark.parametrize("pool", ["last", "mean", "sqrt", "max"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_packed_records_have_the_loss_and_gradients_on_a_gpu_of_each_alone_on_a_cpu(mixer, bidirectional, pool):
    options = {"head_dim": 32, "d_state": 16} if mixer == "mamba2" else {}
    backbone = getattr(presets, mixer)(64, 2, bidirectional=bidirectional, **options)
    head = HeadConfig(task="sequence", labels=("a", "b", "c"), pool=pool)
    model = seqmodels.build(ModelConfig(vocab_size=16, backbone=backbone, head=head), seed=0)
    rng = torch.Generator().manual_seed(0)
    records = [torch.randint(0, 16, (n,), generator=rng) for n in (300, 1, 77, 64, 500, 129)]
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    alone = [model.loss({"ids": r[None], "targets": label[None]})[0] for r, label in zip(records, labels, strict=True)]
    want = torch.stack(alone).mean()
    gradients = torch.autograd.grad(want, list(model.parameters()))
    ids, lengths, seq_idx = pack([records[:4], records[4:]])
    targets = torch.tensor([[0, 2, 1, 1], [0, 2, -100, -100]])
    batch = {"ids": ids, "lengths": lengths, "seq_idx": seq_idx, "targets": targets}
    got, _ = model.cuda().loss({name: tensor.cuda() for name, tensor in batch.items()})
    got.backward()
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert (parameter.grad.cpu() - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@torch.no_grad()
@pytest.mark.parametrize(("name", "tokens"), [("enterobacteria", range(1, 5)), ("spoken-digits", range(256))])
def test_a_shipped_model_answers_on_a_gpu_as_on_a_cpu(name, tokens):
    model = seqmodels.load(name)
    ids = torch.randint(tokens.start, tokens.stop, (2, 3000), generator=torch.Generator().manual_seed(0))

    def answers(device):
        found = model.to(device)(ids.to(device))
        return (found[0] if isinstance(found, tuple) else found).cpu()

    want, got = answers("cpu"), answers("cuda")
    torch.testing.assert_close(got.log_softmax(-1), want.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert (got - want).norm() <= 1e-5 * want.norm()


MAMBA2 = Mamba2Config(head_dim=32, d_state=16)  # as in BACKBONES: kernels of no other sizes are compiled
MIXERS = MambaConfig(d_state=16), BidirectionalConfig(mixer=MAMBA2), MAMBA2
CONFIG = ModelConfig(
    vocab_size=16, backbone=BackboneConfig(d_model=64, layers=MIXERS), head=HeadConfig(task="masked_token")
)
TRAINING = TrainingConfig(max_steps=4, validate_every=2, accumulate=2, learning_rate=1e-3, device="cuda")
WAYS = {
    "ddp": {"strategy": "ddp", "ema_decay": 0.5},
    "fsdp2": {"strategy": "fsdp2", "recompute": 4096},
    "bf16": {"precision": "bf16"},
}


class Random:
    """Two rows of 5,001 tokens; the targets are the tokens before."""

    def train_batch(self, number):
        ids = torch.randint(0, 16, (2, 5002), generator=torch.Generator().manual_seed(number))
        return {"ids": ids[:, 1:], "targets": ids[:, :-1]}

    def validation_batches(self):
        return [self.train_batch(1_000_000)]


def loss_and_gradients(mesh=None):
    """Of one batch on this GPU, or on the GPUs of a mesh together."""
    model, batch = seqmodels.build(CONFIG, seed=0), Random().train_batch(0)
    if mesh is not None:
        model, batch = parallelise(model, mesh), split(batch, mesh)
    model.cuda()
    loss, _ = model.loss({key: value.cuda() for key, value in batch.items()})
    loss.backward()
    if mesh is not None:
        reduce_gradients(model, mesh)
    return {"loss": loss.detach().cpu()} | {name: p.grad.cpu() for name, p in model.named_parameters()}


def worker(folder):
    """What each of two processes does: one step of its own, and a run of the trainer in each way."""
    torch.set_float32_matmul_precision = lambda _: None  # so that float32 means float32
    for name, options in WAYS.items():
        fit(CONFIG, Random(), dataclasses.replace(TRAINING, sequence_parallel=2, **options), folder / name)
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("sequence",))
    results = loss_and_gradients(mesh)
    if mesh.get_rank() == 0:
        torch.save(results, folder / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory):
    """The folder of `worker`'s runs on two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, folder]
    done = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = done.communicate(timeout=300)
    finally:
        done.terminate()  # and torchrun its processes
        done.wait()
    assert done.returncode == 0, errors
    return folder


def test_two_gpus_that_share_each_sequence_have_the_gradients_of_one(two_gpus):
    want, got = loss_and_gradients(), torch.load(two_gpus / "gradients.pt")
    for name, right in want.items():
        assert (got[name] - right).norm() <= 1e-4 * right.norm(), name


def validation_losses(run):
    with open(run / "logs" / "version_0" / "metrics.csv", newline="") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]


@pytest.mark.parametrize("way", WAYS)
def test_training_on_two_gpus_that_share_each_sequence_is_that_on_one(two_gpus, tmp_path, monkeypatch, way):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    alone = {name: value for name, value in WAYS[way].items() if name != "strategy"}
    fit(CONFIG, Random(), dataclasses.replace(TRAINING, **alone), tmp_path / "one")
    got, want = validation_losses(two_gpus / way), validation_losses(tmp_path / "one")
    assert len(got) == 2
    assert got == pytest.approx(want, rel=1e-3 if way == "bf16" else 1e-4)


class Rows:
    """Next-token batches of so many rows and steps."""

    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def train_batch(self, step):
        ids = torch.randint(0, 16, (self.rows, self.length + 1), generator=torch.Generator().manual_seed(step))
        return {"ids": ids[:, :-1], "targets": ids[:, 1:]}

    def validation_batches(self):
        return [Rows(1, 64).train_batch(0)]


@pytest.fixture
def one_gigabyte():
    """All of the GPU's memory but a gigabyte is in use. (Run these tests alone: in one process, "beyond" by name.)"""
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    filler = torch.empty(torch.cuda.mem_get_info()[0] - (1 << 30), dtype=torch.uint8, device="cuda")
    yield
    del filler
    torch.cuda.empty_cache()


SMALL = ModelConfig(vocab_size=16, backbone=BACKBONES["mamba2"](), head=HeadConfig(task="next_token"))
TWO_STEPS = TrainingConfig(max_steps=2, validate_every=2, device="cuda", warmup=0.0)


def test_beyond_the_gpus_memory_a_batch_is_read_in_parts_that_make_the_same_steps(tmp_path, request, capsys):
    fit(SMALL, Rows(8, 65_536), TWO_STEPS, tmp_path / "whole")
    request.getfixturevalue("one_gigabyte")
    fit(SMALL, Rows(8, 65_536), TWO_STEPS, tmp_path / "parts")
    assert "step 1: out of memory; each batch is read in 2 parts" in capsys.readouterr().err
    start = seqmodels.build(SMALL, seed=TWO_STEPS.seed).state_dict()
    whole, parts = (seqmodels.load(tmp_path / name / "model").state_dict() for name in ("whole", "parts"))
    for name in start:  # Adam's first steps are as long where the gradient is but rounding
        assert (parts[name] - whole[name]).norm() <= 0.02 * (whole[name] - start[name]).norm(), name


def test_beyond_the_gpus_memory_a_sequence_is_told_the_length_that_fits_and_that_fits(tmp_path, one_gigabyte):
    def refused(length, run):
        match = rf"a sequence of {length} tokens does not fit .* \d+ tokens would"
        with pytest.raises(InputError, match=match) as error:
            fit(SMALL, Rows(1, length), TWO_STEPS, tmp_path / run)
        return int(re.search(r"(\d+) tokens would", str(error.value)).group(1))

    length = refused(1 << 22, "long")
    gc.collect()  # what the error has held
    torch.cuda.empty_cache()
    assert 1 << 15 < length < 1 << 22
    fit(SMALL, Rows(1, length), TWO_STEPS, tmp_path / "fitting")
    refused(length * 3 // 2, "half more")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
