"""One sequence on several ranks gives what one rank gives: outputs, states, loss and every gradient.

One run of four processes goes through all cases, on groups of 2, 3 and 4 of them; a test then looks up its case.
"""

import copy
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import seqmodels
from seqmodels.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalConfig,
    ConditionConfig,
    HeadConfig,
    KmerConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    RNNConfig,
)
from seqmodels.errors import InputError
from seqmodels.kernels import selective_scan_cpu
from seqmodels.presets import multiscale
from seqmodels.sequence_parallel import parallelise, reduce_gradients, split, stretch

small = {"d_state": 4, "d_conv": 4}
MIXERS = {
    "mamba": MambaConfig(**small, bias=True),
    "mamba2": Mamba2Config(**small, head_dim=8, n_groups=2, chunk_size=8, D_has_head_dim=True),
    "limited": Mamba2Config(**small, head_dim=16, dt_limit=(0.01, 0.2), gated_norm=False, chunk_size=4),
    "attention": AttentionConfig(num_heads=2),
    "lstm": RNNConfig(),
}
MIXERS["bi-mamba"] = BidirectionalConfig(mixer=MIXERS["mamba"], tie_projections=True)
MIXERS["bi-mamba2"] = BidirectionalConfig(mixer=MIXERS["mamba2"])
MIXERS["bi-limited"] = BidirectionalConfig(mixer=MIXERS["limited"])


def build(*names, head=None, kmer=None, conditions=(), mlp=0.0):
    """A float64 model with random weights as large as trained ones, the same on every rank."""
    backbone = BackboneConfig(d_model=16, layers=tuple(MIXERS[n] for n in names), kmer=kmer, mlp_expand=mlp)
    causal = not any(n.startswith("bi-") for n in names)
    head = head or HeadConfig(task="next_token" if causal else "masked_token")
    config = ModelConfig(vocab_size=11, backbone=backbone, head=head, conditions=conditions)
    model = seqmodels.build(config, seed=0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(2)
    return model


def batch_of(b, l, *, seed=0, bounds=None, lengths=None, classes=None):
    """Tokens and targets, perhaps packed (one list of bounds per row), padded, or with one label per sequence."""
    rng = torch.Generator().manual_seed(seed)
    batch = {"ids": torch.randint(0, 11, (b, l), generator=rng)}
    batch["targets"] = torch.randint(0, classes or 11, (b,) if classes else (b, l), generator=rng)
    if bounds:
        steps = torch.arange(l)
        numbers = torch.stack([torch.bucketize(steps, torch.tensor(row), right=True) for row in bounds])
        batch["seq_idx"] = numbers if classes else numbers % 3
        if classes:
            batch["targets"] = torch.randint(0, classes, (b, int(numbers.max()) + 1), generator=rng)
    if lengths:
        batch["lengths"] = torch.tensor(lengths)
        if not classes:
            batch["targets"][torch.arange(l) >= batch["lengths"][:, None]] = -100
    return batch


BOUNDS = [[1, 12, 20, 21, 24, 40], [16, 30, 31, 47]]  # at the edges of some stretches of 48 steps and within others
PADDED = {"b": 5, "l": 53, "lengths": [53, 30, 14, 3, 1]}  # rows end in every stretch, at edges too
labels = ("a", "b", "c")
kmers = KmerConfig(k=5, alphabet=(2, 3, 5, 7, 9), width=6)
CASES = {
    "mamba": (build, ("mamba", "mamba"), {}, {"b": 2, "l": 53}),
    "mamba2": (build, ("mamba2", "mamba2"), {}, {"b": 2, "l": 53}),
    "limits, no norm, mlp": (build, ("limited",), {"mlp": 2.0}, {"b": 1, "l": 29}),
    "bidirectional mamba": (build, ("bi-mamba", "bi-mamba"), {}, {"b": 2, "l": 53}),
    "bidirectional mamba2": (build, ("bi-mamba2", "bi-limited"), {}, {"b": 2, "l": 53}),
    "stretches shorter than the convolution": (build, ("mamba", "mamba2", "bi-mamba2"), {}, {"b": 2, "l": 7}),
    "packed": (build, ("mamba", "mamba2"), {}, {"b": 2, "l": 48, "bounds": BOUNDS}),
    "packed bidirectional": (build, ("bi-mamba", "bi-mamba2"), {}, {"b": 2, "l": 48, "bounds": BOUNDS}),
    "packed shorter than the convolution": (
        build, ("mamba", "bi-mamba2"), {"kmer": kmers}, {"b": 3, "l": 7, "bounds": [[1], [3, 4], [2, 5, 6]]},
    ),
    "padded": (build, ("mamba", "mamba2"), {}, PADDED),
    "padded bidirectional": (build, ("bi-mamba", "bi-mamba2"), {}, PADDED),
    "packed and padded": (
        build, ("mamba", "bi-mamba2"), {}, {"b": 2, "l": 48, "bounds": BOUNDS, "lengths": [22, 35]},
    ),
    "k-mers": (build, ("mamba2",), {"kmer": kmers}, {"b": 2, "l": 53}),
    "k-mers, packed and padded": (
        build, ("mamba2",), {"kmer": kmers}, {"b": 2, "l": 48, "bounds": BOUNDS, "lengths": [22, 48]},
    ),
    "label per position": (
        build, ("bi-mamba2",), {"head": HeadConfig(task="position", labels=("x",) * 11)}, {"b": 2, "l": 30},
    ),
}  # fmt: skip
for pool in ("mean", "sqrt", "max", "last"):
    head = HeadConfig(task="sequence", labels=labels, pool=pool)
    CASES[f"label by {pool}"] = build, ("mamba2",), {"head": head}, {"b": 2, "l": 53, "classes": 3}
    CASES[f"label by {pool}, padded"] = build, ("bi-mamba2",), {"head": head}, {**PADDED, "classes": 3}
    many = {"b": 2, "l": 48, "bounds": [[1, 12, 20, 40], [16, 30, 31, 41]], "lengths": [44, 48], "classes": 3}
    CASES[f"labels by {pool}, packed and padded"] = build, ("bi-mamba2", "mamba"), {"head": head}, many


def close(got, want, what):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def same_gradients(model, plain):
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        mine = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
        close(mine, want.grad, f"gradient of {name}")


def features(model, batch):
    """Logits (of real positions: padding is no result) and the final states."""
    options = {name: batch[name] for name in ("lengths", "seq_idx") if name in batch}
    out = model(batch["ids"], **options)
    if not isinstance(out, tuple):
        return out, []
    if "lengths" in batch:
        real = torch.arange(out[0].shape[1]) < batch["lengths"][:, None]
        return out[0] * real[..., None], out[1]
    return out


@functools.cache
def alone(case):
    """What one rank gives: the model with its gradients, features, loss and metrics."""
    make, names, options, wanted = CASES[case]
    plain, batch = make(*names, **options), batch_of(**wanted)
    with torch.no_grad():
        found = features(plain, batch)
    loss, metrics = plain.loss(batch)
    loss.backward()
    return plain, found, loss.detach(), metrics


def same(mesh, case):
    make, names, options, wanted = CASES[case]
    plain, want, want_loss, want_metrics = alone(case)
    model, batch = parallelise(make(*names, **options), mesh), batch_of(**wanted)
    part = split(batch, mesh)
    got = features(model, part)
    per_step = plain.config.head.task != "sequence"
    close(got[0], split(want[0], mesh) if per_step else want[0], "logits")
    if want[1]:
        recent = [] if want[1].recent is None else [(got[1].recent, want[1].recent)]
        layers = [pair for pair in zip(got[1].layers, want[1].layers, strict=True) if pair[1] is not None]
        for mine, right in [*recent, *((m, r) for pair in layers for m, r in zip(*pair, strict=True))]:
            close(mine, right, "final state")
    loss, metrics = model.loss(part)
    close(loss, want_loss, "loss")
    for name, value in want_metrics.items():
        close(metrics[name], value, name)
    loss.backward()
    reduce_gradients(model, mesh)
    same_gradients(model, plain)


def rounding(mesh):
    """In float32, errors are at most twice those of one rank, and a rounding."""
    names, batch = ("mamba", "bi-mamba2", "mamba2"), batch_of(2, 300)
    exact, plain, model = build(*names), build(*names).float(), parallelise(build(*names).float(), mesh)
    for one in (exact, plain):
        one.loss(batch)[0].backward()
    model.loss(split(batch, mesh))[0].backward()
    reduce_gradients(model, mesh)
    for (name, want), alone, shared in zip(
        exact.named_parameters(), plain.parameters(), model.parameters(), strict=True
    ):
        budget, error = ((p.grad - want.grad).norm() / want.grad.norm() for p in (alone, shared))
        assert error <= 2 * (budget + torch.finfo(torch.float32).eps), (name, error, budget)


def states_carried(mesh):
    """Two calls: the second starts from the first's final state, and the loss depends on the second's."""
    names = ("mamba", "mamba2", "limited")
    plain, model = build(*names), parallelise(build(*names), mesh)
    first, second = batch_of(2, 31)["ids"], batch_of(2, 22, seed=1)["ids"]

    def run(model, part, ranks):
        logits, state = model(part(first))
        more, state = model(part(second), state)
        shared = sum((t.double() ** 2).sum() for layer in state.layers for t in layer)
        loss = (logits**2).sum() + (more**3).sum() + shared / ranks  # what all ranks have counts once
        loss.backward()
        return logits, more, state

    want = run(plain, lambda ids: ids, 1)
    got = run(model, lambda ids: split(ids, mesh), mesh["sequence"].size())
    reduce_gradients(model, mesh)
    for mine, right in zip(got[:2], want[:2], strict=True):
        close(mine, split(right, mesh), "logits")
    same_gradients(model, plain)


def initial_state_gradient(mesh):
    """The gradients of an initial state that the ranks share add up."""
    plain, model = build("mamba", "mamba2"), parallelise(build("mamba", "mamba2"), mesh)
    batch = batch_of(2, 7)
    gradients = []
    for one, part in ((plain, batch["ids"]), (model, split(batch["ids"], mesh))):
        _, state = plain(batch_of(2, 9, seed=1)["ids"])
        layers = [type(s)(*(t.detach().requires_grad_() for t in s)) for s in state.layers]
        logits, _ = one(part, state._replace(layers=tuple(layers)))
        gradients.append(torch.autograd.grad((logits**2).sum(), [t for s in layers for t in s]))
    for mine, right in zip(*reversed(gradients), strict=True):
        dist.all_reduce(mine, group=mesh["sequence"].get_group())
        close(mine, right, "gradient of the initial state")


def conditions(mesh):
    digit = (ConditionConfig(name="digit", values=("zero", "one")),)
    plain, model = build("mamba2", conditions=digit), parallelise(build("mamba2", conditions=digit), mesh)
    batch = batch_of(2, 20) | {"conditions": torch.tensor([[0], [1]])}
    plain.loss(batch)[0].backward()
    model.loss(split(batch, mesh))[0].backward()
    reduce_gradients(model, mesh)
    same_gradients(model, plain)


def one_stage(mesh):
    """A U-Net without pooling, as `audio train --pools []` makes it, is flat."""
    backbone = multiscale((16,), (2,), (), outer=Mamba2Config(head_dim=8, d_state=4, chunk_size=8))
    config = ModelConfig(vocab_size=11, backbone=backbone, head=HeadConfig(task="next_token"))
    plain, model = (seqmodels.build(config, seed=0).double() for _ in range(2))
    batch = batch_of(2, 20)
    plain.loss(batch)[0].backward()
    parallelise(model, mesh).loss(split(batch, mesh))[0].backward()
    reduce_gradients(model, mesh)
    same_gradients(model, plain)


def recomputed(mesh):
    """Layers recomputed in the backward pass exchange once more, in the same order on all ranks."""
    plain, model = build("mamba", "bi-mamba2"), parallelise(build("mamba", "bi-mamba2"), mesh)
    batch = batch_of(2, 20)
    for layer in model.backbone.layers:
        layer.forward = lambda *inputs, f=layer.forward: torch.utils.checkpoint.checkpoint(
            f, *inputs, use_reentrant=False
        )
    plain.loss(batch)[0].backward()
    model.loss(split(batch, mesh))[0].backward()
    reduce_gradients(model, mesh)
    same_gradients(model, plain)


def copied(mesh):
    model = parallelise(build("mamba2"), mesh)
    part = split(batch_of(1, 20)["ids"], mesh)
    close(copy.deepcopy(model)(part)[0], model(part)[0], "logits of a copy")


def too_short(mesh):
    ranks = mesh["sequence"].size()
    length = {2: 1, 3: 4, 4: 9}[ranks]
    with pytest.raises(InputError, match=f"{length} steps .* leave nothing for the last of {ranks} ranks; use at most"):
        stretch(length, mesh)


class Loss(nn.Module):
    """What DistributedDataParallel wraps: its forward is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)[0]


def data_and_sequence(mesh, way):
    """Four rows on 2 x 2 ranks give the gradients of all four on one."""
    plain, model = build("mamba2", "bi-mamba"), parallelise(build("mamba2", "bi-mamba"), mesh)
    batch = batch_of(4, 29)
    rows = slice(2 * mesh["data"].get_local_rank(), 2 * mesh["data"].get_local_rank() + 2)
    part = split({name: t[rows] for name, t in batch.items()}, mesh)
    plain.loss(batch)[0].backward()
    if way == "plain":
        model.loss(part)[0].backward()
        reduce_gradients(model, mesh)
    elif way == "ddp":
        wrapped = DistributedDataParallel(Loss(model), process_group=mesh["data"].get_group())
        wrapped(part).backward()
        reduce_gradients(model, mesh["sequence"])
    else:
        over_all = DistributedDataParallel if way == "ddp over all" else fully_shard
        wrapped = over_all(Loss(model))
        (wrapped(part) * mesh["sequence"].size()).backward()
    same_gradients(model, plain)


OTHERS = {
    f.__name__: f
    for f in (
        rounding, states_carried, initial_state_gradient, conditions, one_stage, recomputed, copied, too_short,
    )
}  # fmt: skip
WAYS = ("plain", "ddp", "ddp over all", "fsdp over all")
WAITING = 600  # seconds for a rank that failed, far above what busy cores need
pytestmark = pytest.mark.timeout(2 * WAITING)  # the first test waits for the ranks


def work(rank, folder):
    """One of four processes: every case on groups of 4, 3 and 2; writes down what failed.

    Groups grow smaller, so that a process that is done waits for nobody. Only one that failed keeps others waiting.
    """
    waiting = datetime.timedelta(seconds=WAITING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=waiting)
    failures = {}

    def attempt(name, function, *arguments):
        try:
            function(*arguments)
        except Exception:
            failures[name] = traceback.format_exc()

    square = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "sequence"))
    groups = {n: DeviceMesh("cpu", torch.arange(n), mesh_dim_names=("sequence",)) for n in (4, 3, 2)}
    for way in WAYS:
        attempt(way, data_and_sequence, square, way)
    for ranks, mesh in groups.items():
        for case in CASES if rank < ranks else ():
            attempt(f"{case} {ranks}", same, mesh, case)
        for case, function in OTHERS.items() if rank < ranks else ():
            attempt(f"{case} {ranks}", function, mesh)
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


def launch(folder):
    """Starts the four ranks, forked once all is imported, compiled and computed that they share."""
    importlib.import_module("torch._dynamo")  # which FSDP imports when it is first used
    torch.set_num_threads(1)
    for case in CASES:
        alone(case)
    build("mamba").float().loss(batch_of(2, 20))[0].backward()
    for dtype in (torch.float64, torch.float32):
        v, m = torch.ones(1, 2, 2, dtype=dtype), torch.ones(1, 2, 1, 2, dtype=dtype)
        selective_scan_cpu.at_edge(v, v, -m[0, :, 0], m, None, True)
    ranks = [multiprocessing.get_context("fork").Process(target=work, args=(rank, folder)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What failed on each of the four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    forked = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "forksafe"}
    forked |= {"CUDA_VISIBLE_DEVICES": ""}  # with a GPU the backward pass keeps threads, which do not survive a fork
    command = [sys.executable, __file__, folder]
    done = subprocess.run(command, env=os.environ | forked, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_sequence_on_several_ranks_gives_what_one_rank_gives(failures, case, ranks):
    for rank, failed in enumerate(failures):
        assert failed.get(f"{case} {ranks}") is None, f"rank {rank}: {failed[f'{case} {ranks}']}"


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", OTHERS)
def test_states_conditions_roundings_and_recomputation_are_as_on_one_rank(failures, case, ranks):
    for rank, failed in enumerate(failures):
        assert failed.get(f"{case} {ranks}") is None, f"rank {rank}: {failed[f'{case} {ranks}']}"


@pytest.mark.parametrize("way", WAYS)
def test_data_times_sequence_is_one_process_on_the_whole_batch(failures, way):
    for rank, failed in enumerate(failures):
        assert failed.get(way) is None, f"rank {rank}: {failed[way]}"


def test_models_that_cannot_share_a_sequence_say_what_to_use_instead():
    backbone = multiscale((16, 24), (1, 1), (4,), outer=Mamba2Config(head_dim=8, d_state=4, chunk_size=8))
    head = HeadConfig(task="next_token")
    u_net = seqmodels.build(ModelConfig(vocab_size=11, backbone=backbone, head=head))
    prefixes = HeadConfig(task="sequence", labels=labels, supervise_every=4)
    for model, message in (
        (u_net, "a U-Net .* use a flat backbone"),
        (build("mamba", "attention"), "attention .* use Mamba or Mamba-2 layers"),
        (build("lstm"), "an RNN .* use Mamba or Mamba-2 layers"),
        (build("mamba2", head=prefixes), "set head.supervise_every=0"),
    ):
        with pytest.raises(InputError, match=message):
            parallelise(model, None)


if __name__ == "__main__":
    launch(Path(sys.argv[1]))
