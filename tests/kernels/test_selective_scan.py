"""The selective scan: its fast forms are the definition; packing, splitting and stepping change nothing."""

import importlib
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.kernels import selective_scan as module
from seqmodels.kernels.selective_scan import selective_scan, selective_scan_reference, selective_scan_step

OVER_TIME = ("x", "dt", "B", "C", "z")
F16, F32 = torch.float16, torch.float32


def make(b=2, l=37, e=6, n=5, g=2, seed=0, dtype=torch.float64):
    """Random arguments whose decays span slow and fast."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(kind).requires_grad_()

    return {
        "x": normal(b, l, e), "dt": normal(b, l, e),
        "A": (-torch.rand(e, n, generator=rng, dtype=torch.float64).mul(4).exp()).to(wide).requires_grad_(),
        "B": normal(b, l, g, n), "C": normal(b, l, g, n), "D": normal(e, kind=wide), "z": normal(b, l, e),
        "dt_bias": normal(e, kind=wide), "initial_state": normal(b, e, n, kind=wide),
    }  # fmt: skip


def piece(arguments, start, stop):
    return {k: v[:, start:stop] if k in OVER_TIME else v for k, v in arguments.items()}


def definition(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx=None, low=0.0, high=math.inf):
    """The recurrence in NumPy, independent of the package."""
    x, dt, A, B, C, D, z, dt_bias, state = (
        t.detach().double().numpy() for t in (x, dt, A, B, C, D, z, dt_bias, initial_state)
    )
    B, C = (np.repeat(t, x.shape[2] // t.shape[2], axis=2) for t in (B, C))
    dt = np.clip(np.log1p(np.exp(dt + dt_bias)), low, high)
    y, state = np.empty_like(x), state.copy()
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            if seq_idx is not None and t and seq_idx[i, t] != seq_idx[i, t - 1]:
                state[i] = 0
            state[i] = np.exp(dt[i, t][:, None] * A) * state[i] + (dt[i, t] * x[i, t])[:, None] * B[i, t]
            y[i, t] = (state[i] * C[i, t]).sum(-1) + D * x[i, t]
    return y * z / (1 + np.exp(-z)), state


def results(form, arguments, seed=0, **options):
    """Outputs and the gradients of every argument, through the output and the final state."""
    y, state = form(**arguments, dt_softplus=True, **options)
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in (y, state)]
    loss = (y.to(state.dtype) * weights[0].to(state.dtype)).sum() + (state * weights[1].to(state.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    return dict(zip(["y", "state", *(f"d{k}" for k in arguments)], (y, state, *gradients), strict=True))


def assert_same(got, want, tolerance=1e-9):
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=["compiled", "torch"])
def fast_form(request, monkeypatch):
    """Each of the fast forms: compiled for the CPU, and the plain PyTorch one that other devices run."""
    if request.param == "torch":
        monkeypatch.setattr(module, "_compiled", lambda: None)
    return request.param


@pytest.mark.parametrize("form", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize("packed", [False, True])
def test_the_scan_is_the_recurrence_step_by_step(form, packed):
    arguments = make()
    seq_idx = torch.tensor([[0] * 5 + [1] * 1 + [2] * 31, [7] * 20 + [3] * 17]) if packed else None
    y, state = form(**arguments, seq_idx=seq_idx, dt_softplus=True, dt_limit=(0.01, 2.0))
    want_y, want_state = definition(**arguments, seq_idx=seq_idx, low=0.01, high=2.0)
    np.testing.assert_allclose(y.detach(), want_y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.detach(), want_state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("l", [1, 63, 64, 65, 300])
def test_outputs_and_every_gradient_are_those_of_the_definition_at_any_length(fast_form, l):
    arguments = make(l=l, e=6, g=3)
    seq_idx = (torch.arange(l) * 7 // max(l, 2)).expand(2, l)
    for packed in (None, seq_idx):
        want = results(selective_scan_reference, arguments, seq_idx=packed)
        assert_same(results(selective_scan, arguments, seq_idx=packed), want)


def test_a_thousand_steps_of_more_channels_than_a_block_are_the_definition():
    arguments = make(b=1, l=1000, e=150, n=3, g=1)
    assert_same(results(selective_scan, arguments), results(selective_scan_reference, arguments), 1e-8)


@given(
    b=st.integers(1, 3), l=st.integers(1, 140), g=st.integers(1, 3), r=st.integers(1, 40), n=st.integers(1, 6),
    seed=st.integers(0, 2**16), threads=st.sampled_from([1, 2, 3]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_shape_and_number_of_threads_agrees_with_the_definition(b, l, g, r, n, seed, threads):
    arguments = make(b, l, g * r, n, g, seed)
    rng = np.random.default_rng(seed)
    seq_idx = torch.from_numpy(np.cumsum(rng.random((b, l)) < 0.1, axis=1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = results(selective_scan, arguments, seq_idx=seq_idx)
    finally:
        torch.set_num_threads(before)
    assert_same(got, results(selective_scan_reference, arguments, seq_idx=seq_idx))


def test_gradients_are_the_numerical_derivatives(fast_form):
    arguments = {k: v.detach().requires_grad_() for k, v in make(b=1, l=5, e=2, n=2, g=1).items()}
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]])

    def scan(*values):
        return selective_scan(**dict(zip(arguments, values, strict=True)), dt_softplus=True, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(scan, tuple(arguments.values()))


def test_splitting_the_sequence_carries_the_state():
    arguments = make(l=100)
    whole, whole_state = selective_scan(**arguments, dt_softplus=True)
    state, parts = arguments.pop("initial_state"), []
    for start, stop in [(0, 1), (1, 70), (70, 100)]:
        y, state = selective_scan(**piece(arguments, start, stop), initial_state=state, dt_softplus=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-10)


def test_packed_sequences_give_what_each_gives_alone():
    arguments = make(b=1, l=80)
    del arguments["initial_state"]
    bounds = [0, 1, 18, 64, 80]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(bounds).diff())[None]
    packed, final = selective_scan(**arguments, seq_idx=seq_idx, dt_softplus=True)
    for start, stop in itertools.pairwise(bounds):
        alone, state = selective_scan(**piece(arguments, start, stop), dt_softplus=True)
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, state, rtol=1e-10, atol=1e-10)


def test_a_packed_neighbour_cannot_poison_a_sequence():
    arguments = {k: v.detach().requires_grad_() for k, v in make(b=1, l=40, g=1).items()}
    seq_idx = torch.tensor([[0] * 10 + [1] * 20 + [2] * 10])
    with torch.no_grad():
        arguments["x"][:, :10] = math.nan
        arguments["x"][:, 30:] = math.nan
    y, _ = selective_scan(**arguments, seq_idx=seq_idx, dt_softplus=True)
    dx, dt_gradient = torch.autograd.grad(y[:, 10:30].sum(), [arguments["x"], arguments["dt"]])
    assert y[:, :10].isnan().all()
    assert y[:, 10:30].isfinite().all()
    assert dx[:, 10:30].isfinite().all()
    assert dt_gradient[:, 10:30].isfinite().all()


def test_steps_continue_where_the_scan_stopped():
    arguments = make(l=9, dtype=torch.float32)
    whole, whole_state = selective_scan(**arguments, dt_softplus=True)
    _, state = selective_scan(**piece(arguments, 0, 6), dt_softplus=True)
    del arguments["initial_state"]
    for t in range(6, 9):
        one = {k: v[:, t] if k in OVER_TIME else v for k, v in arguments.items()}
        y, state = selective_scan_step(**one, dt_softplus=True, state=state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_cost_no_more_than_their_own_rounding(dtype):
    """Error <= 2 x (float32 recurrence's error + one rounding), output and gradients, judged in float64."""
    narrow = make(b=1, l=300, e=8, n=8, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in narrow.items()}
    wide = {k: v.detach().float().requires_grad_() for k, v in narrow.items()}
    want, same = results(selective_scan_reference, exact), results(selective_scan_reference, wide)
    got = results(selective_scan, narrow)
    for name, value in want.items():
        error, budget = ((t[name].double() - value).norm() / value.norm() for t in (got, same))
        assert error <= 2 * (budget + torch.finfo(dtype).eps), (name, float(error), float(budget))
    assert got["state"].dtype == torch.float32
    assert got["y"].dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "shape", "given", "packed", "options"),
    [
        (F32, {"l": 21, "e": 8, "n": 5, "g": 2}, ("D", "z", "dt_bias", "initial_state"), True, (True, 0.0, math.inf)),
        (F32, {"l": 9, "e": 4, "n": 4, "g": 1, "b": 1}, ("z",), False, (True, 0.1, 1.0)),
        (F32, {"l": 10, "e": 36, "n": 3, "g": 1, "b": 1}, ("D", "initial_state"), False, (False, 0.0, math.inf)),
        (F32, {"l": 3, "e": 4, "n": 5, "g": 1, "b": 1}, (), False, (True, 0.0, math.inf)),
        (F16, {"l": 27, "e": 8, "n": 5, "g": 2}, ("D", "z", "dt_bias", "initial_state"), True, (True, 0.0, math.inf)),
        (F16, {"l": 10, "e": 36, "n": 3, "g": 1, "b": 1}, ("z",), False, (True, 0.1, 1.0)),
        (F16, {"l": 3, "e": 4, "n": 5, "g": 1, "b": 1}, (), False, (True, 0.0, math.inf)),
        (F16, {"l": 9, "e": 4, "n": 5, "g": 4, "b": 1}, ("D",), False, (True, 0.0, math.inf)),
    ],
)
def test_the_triton_form_agrees_with_float64(monkeypatch, dtype, shape, given, packed, options):
    """Error <= 2 x (float32 recurrence's error + one rounding), outputs and gradients; in Triton's interpreter."""
    triton = importlib.import_module("seqmodels.kernels.selective_scan_triton")
    monkeypatch.setattr(triton, "STEPS", 8)  # several segments after few steps
    monkeypatch.setattr(triton, "PIECE", 4)
    monkeypatch.setattr(triton, "_processors", lambda device: 1)  # and several stored states in a segment
    arguments = {k: v.detach() for k, v in make(**shape, dtype=dtype).items()}
    for name in ("D", "z", "dt_bias", "initial_state"):
        if name not in given:
            arguments[name] = None
    arguments["z"] = None if arguments["z"] is None else torch.cat([arguments["z"]] * 2, -1)[..., : shape["e"]]
    seq_idx = torch.arange(shape["l"]).mul(5).div(shape["l"]).int().expand(arguments["x"].shape[:2]) if packed else None
    resets = None if seq_idx is None else module.starts_of_sequences(seq_idx)
    dy = torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def expected(dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in arguments.items() if v is not None}
        y, state = selective_scan_reference(
            **leaves, dt_softplus=options[0], dt_limit=options[1:], seq_idx=seq_idx
        )  # fmt: skip
        loss = (y * dy).sum() + state.square().sum() / 2
        return [y, state, *torch.autograd.grad(loss, list(leaves.values()))]

    *tensors, initial_state = arguments.values()
    y, state, starts = triton.forward(*tensors, initial_state, resets, *options)
    gradients = triton.backward(dy, state, *tensors, starts, resets, *options)
    if initial_state is None:
        gradients.pop()
    want = expected(torch.float64)
    for got, exact, same in zip([y, state, *gradients], want, expected(torch.float32), strict=True):
        error, budget = ((t.double() - exact).norm() / exact.norm() for t in (got, same))
        assert error <= 2 * (budget + torch.finfo(dtype).eps)


def test_the_compiled_exponential_is_accurate_and_keeps_nan():
    from seqmodels.kernels.selective_scan_cpu import _exp_float32

    values = np.concatenate([np.linspace(-87.3, 88.3, 4001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)
    got = np.array([_exp_float32(v) for v in values], np.float64)
    assert np.abs(got / np.exp(values.astype(np.float64)) - 1).max() < 2e-7
    assert math.isnan(_exp_float32(np.float32(math.nan)))
    assert 0 < _exp_float32(np.float32(-math.inf)) < 2e-38
    assert 1e38 < _exp_float32(np.float32(1e9)) < math.inf


def test_a_state_that_decays_away_becomes_zero_instead_of_slow():
    arguments = {k: v.detach() for k, v in make(b=1, l=2000, e=2, n=2, g=1, dtype=torch.float32).items()}
    arguments["x"][:] = 0
    arguments["A"][:] = -1.0
    arguments["dt"][:] = 0.1
    del arguments["dt_bias"]
    state = selective_scan(**arguments)[1]
    assert (state == 0).all()


def test_the_scan_leaves_torch_the_threads_that_it_was_given():
    lines = (
        "import torch",
        "from seqmodels.kernels.selective_scan import selective_scan",
        "torch.set_num_threads(1)",
        "x, b = torch.rand(1, 8, 4), torch.rand(1, 8, 1, 2)",
        "selective_scan(x, x, -torch.rand(4, 2), b, b)",
        "print(torch.get_num_threads())",
    )
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself causes it
def test_the_operator_is_well_formed():
    a = {k: v.detach().requires_grad_() for k, v in make(b=1, l=70, e=2, n=2, g=1).items()}
    resets = torch.zeros(1, 70, dtype=torch.bool)
    needed, optional = (a["x"], a["dt"], a["A"], a["B"], a["C"]), (a["D"], a["z"], a["dt_bias"], a["initial_state"])
    for inputs in ((*needed, *optional, resets, True, 0.0, math.inf), (*needed, *[None] * 5, False, 0.01, 2.0)):
        checks = torch.library.opcheck(torch.ops.longseq.selective_scan.default, inputs)
        assert set(checks.values()) == {"SUCCESS"}


def test_the_scan_works_within_a_compiled_graph():
    arguments = make(l=70)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, arguments), results(selective_scan, arguments))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[:, :0], r"x has shape \(2, 0, 6\).*l >= 1"),
        ("dt", lambda t: t[:, :-1], r"dt has shape \(2, 36, 6\).*must be \(2, 37, 6\)"),
        ("B", lambda t: t[:, :, 0], r"B has shape \(2, 37, 5\).*B\[:, :, None\]"),
        ("B", lambda t: t.repeat(1, 1, 2, 1), "g dividing 6"),
        ("A", lambda t: t[:3], r"A is .*shape \(3, 5\).*\(6, n\)"),
        ("initial_state", lambda t: t[:1], r"initial_state has shape \(1, 6, 5\).*must be \(2, 6, 5\)"),
    ],
)
def test_a_wrong_shape_is_named_with_both_sides(name, change, message):
    arguments = {k: v.detach() for k, v in make().items()}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)
