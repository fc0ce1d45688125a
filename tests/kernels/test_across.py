"""Scans in stretches: what a stretch does to the state and to the adjoint, and what passes between stretches."""

import pytest
import torch

from seqmodels.kernels import selective_scan as scan_file
from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.kernels.selective_scan import selective_scan, selective_scan_end_state, selective_scan_start_gradient
from seqmodels.kernels.ssd import ssd, ssd_end_state, ssd_start_gradient

OPTIONS = {"dt_softplus": True, "dt_limit": (0.01, 2.0)}


def make(op, b=2, l=150, heads=4, p=3, n=5, g=2, dtype=torch.float64, slow=1.0):
    """Inputs of an op and an initial state; A from 1/10 to 10 times `slow`."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    inner, state = ((heads, p), (b, heads, p, n)) if op == "ssd" else ((heads * p,), (b, heads * p, n))
    A = -slow * 10 ** (2 * torch.rand(state[1:2] if op == "ssd" else state[1:], generator=rng).to(dtype) - 1)
    inputs = {"x": normal(b, l, *inner), "dt": normal(b, l, state[1]), "A": A, "B": normal(b, l, g, n)}
    return inputs, {"C": normal(b, l, g, n), "dt_bias": normal(state[1]) - 2}, normal(*state)


def packing(b, l, packed):
    return (torch.arange(l) * 5 // l).expand(b, l) if packed else None


FUNCTIONS = {
    "ssd": (ssd, ssd_end_state, ssd_start_gradient),
    "scan": (selective_scan, selective_scan_end_state, selective_scan_start_gradient),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("slow", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_an_end_state_and_a_start_gradient_are_those_of_the_whole_op(monkeypatch, op, packed, slow, compiled):
    if not compiled:
        if op == "ssd":
            monkeypatch.setattr("seqmodels.kernels.ssd._ELEMENTS_PER_PASS", {"cpu": 500})
        monkeypatch.setattr(scan_file, "_compiled", lambda: None)
    whole, end_state, start_gradient = FUNCTIONS[op]
    inputs, others, initial = make(op, slow=slow)
    seq_idx = packing(2, 150, packed)
    gate = {"z": torch.randn_like(inputs["x"])} if op == "scan" else {}
    bias = others["dt_bias"]
    end, decay = end_state(**inputs, dt_bias=bias, seq_idx=seq_idx, **OPTIONS)
    _, want = whole(**inputs, **others, seq_idx=seq_idx, **OPTIONS)
    torch.testing.assert_close(end, want, rtol=1e-10, atol=1e-10)
    initial.requires_grad_()
    y, want = whole(**inputs, **others, **gate, initial_state=initial, seq_idx=seq_idx, **OPTIONS)
    decay = decay.view(*decay.shape, *[1] * (end.dim() - decay.dim()))
    torch.testing.assert_close(decay * initial + end, want, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, initial, dy)
    got = start_gradient(dy, inputs["dt"], inputs["A"], others["C"], dt_bias=bias, seq_idx=seq_idx, **gate, **OPTIONS)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slow", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_in_float32_they_err_no_more_than_twice_the_whole_op_and_a_rounding(op, slow):
    whole, end_state, start_gradient = FUNCTIONS[op]
    inputs, others, _ = make(op, l=3000, slow=slow)
    dy, results = inputs["x"].flip(1, 2), {}
    for dtype in (torch.float64, torch.float32):
        x, dt, A, B, C, bias, g = (t.to(dtype) for t in (*inputs.values(), *others.values(), dy))
        end, _ = end_state(x, dt, A, B, bias, **OPTIONS)
        initial = torch.zeros_like(end, requires_grad=True)
        y, final = whole(x, dt, A, B, C, dt_bias=bias, initial_state=initial, **OPTIONS)
        (gradient,) = torch.autograd.grad(y, initial, g)
        results[dtype] = (end, start_gradient(g, dt, A, C, dt_bias=bias, **OPTIONS)), (final.detach(), gradient)
    (ours, theirs), (exact, _) = results[torch.float32], results[torch.float64]
    for got, usual, right in zip(ours, theirs, exact, strict=True):
        error, budget = ((t - right).norm() / right.norm() for t in (got, usual))
        assert error <= 2 * (budget + torch.finfo(torch.float32).eps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("shape", [{"b": 2, "l": 330, "p": 16, "n": 8}, {"b": 1, "l": 65, "heads": 2, "p": 80, "g": 1}])
@pytest.mark.parametrize("packed", [False, True])
def test_ssds_triton_kernels_find_the_same_end_state_and_start_gradient(monkeypatch, packed, shape):
    ssd_triton = pytest.importorskip("seqmodels.kernels.ssd_triton")
    monkeypatch.setattr(ssd_triton, "_PROGRAMS", 8)  # several tiles to a stretch
    inputs, others, _ = make("ssd", **shape)
    seq_idx = packing(*inputs["x"].shape[:2], packed)
    run = None if seq_idx is None else seq_idx.int().contiguous()
    want = ssd_end_state(**inputs, dt_bias=others["dt_bias"], seq_idx=seq_idx, **OPTIONS)
    dy = torch.randn_like(inputs["x"])
    want += (ssd_start_gradient(dy, inputs["dt"], inputs["A"], **others, seq_idx=seq_idx, **OPTIONS),)
    x, dt, A, B, C, bias, dy = (t.float() for t in (*inputs.values(), *others.values(), dy))
    options = bias, run, True, *OPTIONS["dt_limit"]
    got = (*ssd_triton.end_state(x, dt, A, B, *options), ssd_triton.start_gradient(dy, dt, A, C, *options))
    for ours, right in zip(got, want, strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm() + 1e-30


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("shape", [{"b": 2, "l": 45}, {"b": 1, "l": 32, "heads": 6, "g": 1}, {"b": 1, "l": 3}])
@pytest.mark.parametrize("packed", [False, True])
def test_the_selective_scans_triton_kernels_find_the_same(monkeypatch, packed, shape):
    triton = pytest.importorskip("seqmodels.kernels.selective_scan_triton")
    monkeypatch.setattr(triton, "STEPS", 8)  # several segments after few steps
    monkeypatch.setattr(triton, "_processors", lambda device: 1)
    inputs, others, _ = make("scan", p=6, **shape)
    x, dt, A, B, C, bias = (*inputs.values(), *others.values())
    seq_idx, dy, z = packing(*x.shape[:2], packed), torch.randn_like(x), torch.randn_like(x)
    want = selective_scan_end_state(**inputs, dt_bias=bias, seq_idx=seq_idx, **OPTIONS)
    want += (selective_scan_start_gradient(dy, dt, A, C, z, bias, seq_idx=seq_idx, **OPTIONS),)
    x, dt, A, B, C, bias, dy, z = (t.float() for t in (x, dt, A, B, C, bias, dy, z))
    options = bias, None if seq_idx is None else starts_of_sequences(seq_idx), True, *OPTIONS["dt_limit"]
    got = (*triton.end_state(x, dt, A, B, *options), triton.start_gradient(dy, dt, A, C, z, *options))
    for ours, right in zip(got, want, strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm() + 1e-30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_on_a_gpu_they_agree_with_float64(op, dtype, packed):
    _, end_state, start_gradient = FUNCTIONS[op]
    inputs, others, _ = make(op, l=5000, p=64, n=16, dtype=dtype)
    inputs["A"], bias = inputs["A"].float(), others["dt_bias"].float()
    seq_idx, dy = packing(2, 5000, packed), torch.randn_like(inputs["x"])

    def run(*place):
        x, dt, A, B, C, b, g = (t.to(*place) for t in (*inputs.values(), others["C"], bias, dy))
        rest = OPTIONS | {"seq_idx": None if seq_idx is None else seq_idx.to(x.device), "dt_bias": b}
        return *end_state(x, dt, A, B, **rest), start_gradient(g, dt, A, C, **rest)

    for ours, right in zip(run("cuda"), run(torch.float64), strict=True):
        error = (ours.cpu().double() - right).norm()
        assert error <= (2e-6 if dtype == torch.float32 else 4e-3) * right.norm() + 1e-30
