"""Reading both directions stretch by stretch: two sweeps are one pass, windows are one pass as far as they see."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seqmodels
from seqmodels import sweeps
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
from seqmodels.presets import multiscale
from seqmodels.sweeps import free_memory, host_bytes, sweepable, two_sweeps, windows

small = {"d_state": 4, "d_conv": 3}
MIXERS = {
    "mamba": MambaConfig(**small),
    "mamba2": Mamba2Config(**small, head_dim=8, chunk_size=8),
    "bi-mamba": BidirectionalConfig(mixer=MambaConfig(**small), tie_projections=True),
    "bi-mamba2": BidirectionalConfig(mixer=Mamba2Config(**small, head_dim=8, chunk_size=8)),
    "bi-lstm": BidirectionalConfig(mixer=RNNConfig()),
    "window": AttentionConfig(num_heads=2, window=5),
    "encoder": AttentionConfig(num_heads=2, causal=False),
    "encoder-window": AttentionConfig(num_heads=2, causal=False, window=6),
}
STACKS = {
    "one mamba": ("bi-mamba",),
    "mamba": ("bi-mamba",) * 3,
    "mamba2": ("bi-mamba2",) * 2,
    "causal layers between": ("mamba2", "bi-mamba", "window", "mamba", "bi-mamba2", "bi-lstm", "mamba"),
    "causal": ("mamba", "mamba2"),
}
POSITION = HeadConfig(task="position", labels=("a", "b", "c"))

pytestmark = pytest.mark.usefixtures("one_thread")


def build(*names, head=POSITION, dtype=torch.float64, conditions=(), **options):
    backbone = BackboneConfig(d_model=16, layers=tuple(MIXERS[n] for n in names), **options)
    config = ModelConfig(vocab_size=11, backbone=backbone, head=head, conditions=conditions)
    model = seqmodels.build(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as large as trained ones, so that states matter
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(2)
    return model.to(dtype).eval()


def tokens(b, l):
    return torch.randint(0, 11, (b, l), generator=torch.Generator().manual_seed(l))


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_two_sweeps_are_one_pass_for_any_chunk(stack, chunk):
    model, ids = build(*STACKS[stack], mlp_expand=1.0), tokens(2, 48 if chunk == 16 else 29)
    l = ids.shape[1]
    found = list(two_sweeps(model.backbone, ids.to(torch.uint8), chunk=chunk))
    assert [x.shape[1] for x in found] == [min(chunk, l - start) for start in range(0, l, chunk)]
    torch.testing.assert_close(model.score(torch.cat(found, 1)), model(ids)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["last", "mean", "sqrt", "max"])
@pytest.mark.parametrize("stack", ["mamba", "mamba2"])
@torch.no_grad()
def test_two_sweeps_with_k_mers_and_conditions_give_the_label_of_one_pass(stack, pool):
    kmer = KmerConfig(k=4, alphabet=(2, 3, 5, 7, 9), width=6)
    head = HeadConfig(task="sequence", labels=("a", "b"), pool=pool)
    strand = ConditionConfig(name="strand", values=("+", "-"))
    model, ids = build(*STACKS[stack], head=head, kmer=kmer, conditions=(strand,)), tokens(2, 31)
    given = torch.tensor([[0], [1]])
    want = model(ids, conditions=given)
    for chunk in (2, 10):
        found = model.pool(two_sweeps(model.backbone, ids, chunk=chunk, conditions=given))
        assert found.count.tolist() == [31, 31]
        torch.testing.assert_close(model.classify(found), want, rtol=1e-6, atol=1e-7)  # the score takes float64 sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stack", ["mamba", "mamba2"])
@torch.no_grad()
def test_two_sweeps_are_as_exact_as_one_pass(stack, dtype):
    model, ids = build(*STACKS[stack], dtype=dtype), tokens(1, 500)
    exact = build(*STACKS[stack], dtype=dtype).double()
    want = exact.backbone(ids)[0]
    once = (model.backbone(ids)[0].double() - want).norm()
    swept = torch.cat(list(two_sweeps(model.backbone, ids, chunk=60)), 1)
    assert swept.dtype == dtype
    assert (swept.double() - want).norm() <= 1.2 * once + 1e-6 * want.norm()


@torch.no_grad()
def test_layers_share_their_sweeps_and_the_last_goes_from_left_to_right():
    for n in range(5):
        plan = sweeps._plan(build(*["bi-mamba"] * n).backbone)
        assert [backwards for backwards, _ in plan] == [(n - i) % 2 == 1 for i in range(n + 1)]
        assert [len(steps) for _, steps in plan] == ([1] + [2] * (n - 1) + [1] if n else [0])
    assert len(sweeps._plan(build(*STACKS["causal"]).backbone)) == 1


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [result] if isinstance(result, torch.Tensor) else result if isinstance(result, (tuple, list)) else []
        if func is not torch.ops.aten.view.default:
            self.size = max([self.size, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return result


@torch.no_grad()
def test_no_operation_takes_memory_that_grows_with_the_length_and_the_host_holds_what_is_said(monkeypatch):
    model, largest, held = build("bi-mamba2", "bi-mamba", dtype=torch.bfloat16), [], []
    keep = sweeps._Host.keep

    def keeping(self, start, *given):
        keep(self, start, *given)
        held.append(sum(t.nbytes for pair in self._kept.values() for t in pair if t is not None))

    monkeypatch.setattr(sweeps._Host, "keep", keeping)
    for l in (200, 800):
        held.clear()
        with Largest() as seen:
            assert sum(x.shape[1] for x in two_sweeps(model.backbone, tokens(1, l).to(torch.uint8), chunk=50)) == l
        largest.append(seen.size)
        assert max(held) + l == host_bytes(model.backbone, l, 50) == l * (1 + 16 * (4 + 2))
    assert largest[0] == largest[1]
    assert host_bytes(build(*STACKS["causal"]).backbone, 10**9) == 10**9


@pytest.mark.parametrize("cut", [1, 13, 200])
@torch.no_grad()
def test_windows_are_exact_where_nothing_beyond_the_context_matters(cut):
    model, ids = build("encoder-window", "encoder-window"), tokens(1, 200)
    want = model(ids)[0]
    for window, context in ((31, 10), (48, 10), (48, 23), (200, 90), (1000, 0)):
        found = torch.cat(list(windows(model.backbone, ids.split(cut, 1), window=window, context=context)), 1)
        torch.testing.assert_close(model.score(found), want, rtol=1e-10, atol=1e-10)
    short = torch.cat(list(windows(model.backbone, [ids], window=48, context=9)), 1)  # 2 * (6 - 1) are seen
    assert not torch.allclose(model.score(short), want, atol=1e-6)


@torch.no_grad()
def test_windows_come_nearer_to_one_pass_with_more_context():
    model, ids = build("bi-mamba2", "bi-mamba2", dtype=torch.float64), tokens(1, 600)
    want, errors = model(ids)[0], []
    for context in (0, 4, 16, 64, 128):
        found = torch.cat(list(windows(model.backbone, [ids], window=40 + 2 * context, context=context)), 1)
        errors.append(float((model.score(found) - want).norm() / want.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


@pytest.mark.parametrize("pool", ["last", "mean", "sqrt", "max"])
@pytest.mark.parametrize("length", [1, 30, 31, 41, 51, 52, 500])
@torch.no_grad()
def test_pooled_windows_count_every_step_once(pool, length):
    head = HeadConfig(task="sequence", labels=("a", "b"), pool=pool)
    model, ids = build("encoder-window", head=head), tokens(1, length)  # sees 5 steps
    state = model.pool(windows(model.backbone, [ids], window=31, context=5))
    assert state.count.tolist() == [length]
    torch.testing.assert_close(model.classify(state), model(ids), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_what_cannot_be_read_is_told():
    assert not sweepable(build("bi-mamba", "encoder").backbone)
    with pytest.raises(InputError, match="use windows"):
        next(two_sweeps(build("encoder").backbone, tokens(1, 5)))
    config = ModelConfig(
        vocab_size=11, backbone=multiscale((16, 24), (1, 1), (4,), outer=Mamba2Config(head_dim=8)), head=POSITION
    )
    assert not sweepable(seqmodels.build(config).backbone)
    with pytest.raises(InputError, match="leave nothing between"):
        next(windows(build("encoder").backbone, [tokens(1, 5)], window=10, context=5))
    pooled = build("bi-mamba", head=dataclasses.replace(POSITION, task="sequence"))
    with pytest.raises(InputError, match="nothing to pool"):
        pooled.pool(two_sweeps(pooled.backbone, tokens(1, 0)))


def test_free_memory_heeds_the_limits_of_control_groups(tmp_path, monkeypatch):
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "proc/self/cgroup": "4:memory:/job/step\n3:cpu:/\n0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "5000000\n", "sys/fs/cgroup/a/memory.current": "3000000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 500000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "3000000\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = sweeps.Path
    monkeypatch.setattr(sweeps, "Path", lambda *parts: path(tmp_path, *(str(p).lstrip("/") for p in parts)))
    assert free_memory() == 2_500_000
    (tmp_path / "sys/fs/cgroup/memory/job").mkdir(parents=True)
    for name, text in (("limit_in_bytes", "2000000"), ("usage_in_bytes", "400000"), ("stat", "cache 9")):
        (tmp_path / "sys/fs/cgroup/memory/job" / f"memory.{name}").write_text(text)
    assert free_memory() == 1_600_000
    (tmp_path / "sys/fs/cgroup/a/memory.current").write_text("9000000")
    assert free_memory() == 0
    assert math.isfinite(free_memory())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_two_sweeps_on_a_gpu_are_one_pass_in_constant_memory(dtype):
    mixer = BidirectionalConfig(mixer=Mamba2Config(d_state=64, head_dim=64))
    config = ModelConfig(vocab_size=11, backbone=BackboneConfig(d_model=128, layers=(mixer,) * 3), head=POSITION)
    model = seqmodels.build(config, seed=0).to("cuda", dtype).eval()
    exact = seqmodels.build(config, seed=0).to(dtype).to("cuda", torch.float32).eval()
    peaks = []
    for l in (200_000, 800_000):
        ids = tokens(1, l).to(torch.uint8)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = [x[:, ::50].cpu() for x in two_sweeps(model.backbone, ids, chunk=30_000)]
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if l == 200_000:
            found = [x.cpu() for x in two_sweeps(model.backbone, ids, chunk=30_000)]
            torch.testing.assert_close(torch.cat(kept, 1), torch.cat([x[:, ::50] for x in found], 1), rtol=0, atol=0)
            want = exact.backbone(ids.cuda().long())[0].cpu()
            once = (model.backbone(ids.cuda().long())[0].cpu().float() - want).norm()
            error = (torch.cat(found, 1).float() - want).norm()
            assert error <= 1.2 * once + 1e-5 * want.norm()
    assert peaks[1] < 1.1 * peaks[0]
