"""SSD: its three forms agree with the definition, gradients too; packing, splitting and stepping change nothing."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.kernels.ssd import ssd, ssd_linear, ssd_quadratic, ssd_step

FORMS = {"linear": ssd_linear, "quadratic": ssd_quadratic, "chunked": ssd}


def make(b=2, l=37, h=4, p=3, n=5, g=2, seed=0, dtype=torch.float64, per_channel=False):
    """Random arguments (gate, skip, bias, initial state) whose decays span slow and fast."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    A = (
        -torch.rand(h, generator=rng, dtype=torch.float64)
        .mul(4)
        .exp()
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    state = normal(b, h, p, n).detach().to(A.dtype).requires_grad_()
    return {
        "x": normal(b, l, h, p), "dt": normal(b, l, h), "A": A.requires_grad_(), "B": normal(b, l, g, n),
        "C": normal(b, l, g, n), "D": normal(h, p) if per_channel else normal(h), "z": normal(b, l, h, p),
        "dt_bias": normal(h), "initial_state": state,
    }  # fmt: skip


def definition(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx=None, low=0.0, high=math.inf):
    """The recurrence in NumPy, element by element in time, independent of the package."""
    x, dt, A, B, C, D, z, dt_bias, state = (
        t.detach().double().numpy() for t in (x, dt, A, B, C, D, z, dt_bias, initial_state)
    )
    b, l = x.shape[:2]
    B, C = (np.repeat(t, x.shape[2] // t.shape[2], axis=2) for t in (B, C))
    D = D if D.ndim == 2 else D[:, None]
    dt = np.clip(np.log1p(np.exp(dt + dt_bias)), low, high)
    y = np.empty_like(x)
    for i in range(b):
        H = state[i].copy()
        for t in range(l):
            if seq_idx is not None and t and seq_idx[i, t] != seq_idx[i, t - 1]:
                H = np.zeros_like(H)
            H = np.exp(dt[i, t] * A)[:, None, None] * H
            H = H + (dt[i, t][:, None] * x[i, t])[..., None] * B[i, t][:, None]
            y[i, t] = np.einsum("hpn,hn->hp", H, C[i, t]) + D * x[i, t]
        state[i] = H
    return y * z / (1 + np.exp(-z)), state


def gradients(form, arguments, weights, **options):
    y, state = form(**arguments, dt_softplus=True, **options)
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return torch.autograd.grad(loss, list(arguments.values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_is_the_step_by_step_definition(form, packed):
    arguments = make(per_channel=True)
    seq_idx = torch.tensor([[0] * 5 + [1] * 1 + [2] * 31, [7] * 20 + [3] * 17]) if packed else None
    options = {"chunk_size": 8} if form == "chunked" else {}
    y, state = FORMS[form](**arguments, seq_idx=seq_idx, dt_softplus=True, dt_limit=(0.01, 2.0), **options)
    want_y, want_state = definition(**arguments, seq_idx=seq_idx, low=0.01, high=2.0)
    np.testing.assert_allclose(y.detach(), want_y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.detach(), want_state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_the_forms_have_the_gradients_of_the_recurrence(form, packed):
    arguments = make()
    seq_idx = torch.tensor([[0] * 5 + [1] * 1 + [2] * 31, [7] * 20 + [3] * 17]) if packed else None
    weights = torch.randn(2, 37, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    options = {"chunk_size": 8} if form == "chunked" else {}
    want = gradients(ssd_linear, arguments, weights, seq_idx=seq_idx)
    got = gradients(FORMS[form], arguments, weights, seq_idx=seq_idx, **options)
    for name, a, b in zip(arguments, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize(("l", "chunk_size"), [(1, 64), (63, 64), (64, 64), (65, 64), (1000, 64), (1000, 48)])
def test_lengths_that_no_chunk_divides_are_exact_across_passes(l, chunk_size, monkeypatch):
    # three chunks per pass, so that 1000 steps take several passes
    monkeypatch.setattr("seqmodels.kernels.ssd._ELEMENTS_PER_PASS", {"cpu": 3 * 2 * 64 * 64})
    arguments = make(b=1, l=l, h=2, g=1)
    seq_idx = (torch.arange(l)[None] * 7) // max(l, 2)
    weights = torch.randn(1, l, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, 5, dtype=torch.float64)
    for packed in (None, seq_idx):
        want = ssd_linear(**arguments, seq_idx=packed, dt_softplus=True)
        got = ssd(**arguments, seq_idx=packed, dt_softplus=True, chunk_size=chunk_size)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        want = gradients(ssd_linear, arguments, weights, seq_idx=packed)
        got = gradients(ssd, arguments, weights, seq_idx=packed, chunk_size=chunk_size)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@given(
    b=st.integers(1, 3), l=st.integers(1, 40), g=st.integers(1, 3), r=st.integers(1, 3), p=st.integers(1, 5),
    n=st.integers(1, 6), chunk_size=st.integers(1, 20), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_shape_agrees_with_the_recurrence(b, l, g, r, p, n, chunk_size, seed):
    arguments = make(b, l, g * r, p, n, g, seed)
    rng = np.random.default_rng(seed)
    seq_idx = torch.from_numpy(np.cumsum(rng.random((b, l)) < 0.2, axis=1))
    want = ssd_linear(**arguments, seq_idx=seq_idx, dt_softplus=True)
    got = ssd(**arguments, seq_idx=seq_idx, dt_softplus=True, chunk_size=chunk_size)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_splitting_the_sequence_carries_the_state():
    arguments = make(l=100)
    whole, whole_state = ssd(**arguments, dt_softplus=True)
    state, parts = arguments.pop("initial_state"), []
    over_time = {"x", "dt", "B", "C", "z"}
    for start, stop in [(0, 1), (1, 50), (50, 100)]:
        piece = {k: v[:, start:stop] if k in over_time else v for k, v in arguments.items()}
        y, state = ssd(**piece, initial_state=state, dt_softplus=True, chunk_size=16)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-10)


def test_packed_sequences_give_what_each_gives_alone():
    arguments = make(b=1, l=60)
    del arguments["initial_state"]
    bounds = [0, 1, 18, 50, 60]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(bounds).diff())[None]
    packed, final = ssd(**arguments, seq_idx=seq_idx, dt_softplus=True, chunk_size=16)
    for start, stop in itertools.pairwise(bounds):
        piece = {k: v[:, start:stop] if k in ("x", "dt", "B", "C", "z") else v for k, v in arguments.items()}
        alone, state = ssd(**piece, dt_softplus=True)
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_cost_no_more_than_their_own_rounding(dtype):
    """Output and gradients: error <= 2 x (float32 recurrence's error + one rounding of the result), in float64."""
    narrow = make(b=1, l=300, h=4, p=8, n=8, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in narrow.items()}
    wide = {k: v.detach().float().requires_grad_() for k, v in narrow.items()}
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(1, 300, 4, 8, generator=rng), torch.randn(1, 4, 8, 8, generator=rng)]
    rounding = torch.finfo(dtype).eps

    def results(form, arguments, kind):
        y, state = form(**arguments, dt_softplus=True)
        w = [t.to(kind) for t in weights]
        gradient = torch.autograd.grad((y * w[0]).sum() + (state * w[1]).sum(), list(arguments.values()))
        return dict(zip(("y", "state", *(f"d{k}" for k in arguments)), (y, state, *gradient), strict=True))

    want, same, got = results(ssd_linear, exact, torch.float64), results(ssd_linear, wide, torch.float32), {}
    got = results(ssd, narrow, torch.float32)
    for name, value in want.items():
        scale = value.norm()
        error, budget = (got[name].double() - value).norm() / scale, (same[name].double() - value).norm() / scale
        # y itself is rounded to dtype before the weights meet it, so every gradient carries one more rounding
        assert error <= 2 * (budget + rounding), (name, float(error), float(budget))
    assert got["state"].dtype == torch.float32
    assert got["y"].dtype == dtype


def test_one_step_continues_where_the_chunked_form_stopped():
    arguments = make(l=9, dtype=torch.float32)
    whole, whole_state = ssd(**arguments, dt_softplus=True)
    pieces = {k: v[:, :8] if k in ("x", "dt", "B", "C", "z") else v for k, v in arguments.items()}
    _, state = ssd(**pieces, dt_softplus=True)
    last = {k: v[:, 8] if k in ("x", "dt", "B", "C", "z") else v for k, v in arguments.items()}
    del last["initial_state"]
    y, state = ssd_step(**last, dt_softplus=True, state=state)
    torch.testing.assert_close(y, whole[:, 8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole_state, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck reads .grad of its own copies
def test_the_operator_is_well_formed():
    a = {k: v.detach().requires_grad_() for k, v in make(b=1, l=10, h=2, g=1).items()}
    run = torch.tensor([[0] * 4 + [1] * 6])
    inputs = (
        a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], a["dt_bias"], a["initial_state"], run, True, 0.0, math.inf, 4
    )  # fmt: skip
    checks = torch.library.opcheck(torch.ops.longseq.ssd.default, inputs)
    assert set(checks.values()) == {"SUCCESS"}


def test_memory_grows_linearly_not_with_the_matrices():
    """The largest tensor of a pass stays bounded: passes shorten as batch times heads grow."""
    from seqmodels.kernels.ssd import _chunks_per_pass

    for b, h, q in [(1, 4, 64), (64, 8, 64), (1, 1, 16)]:
        chunks = _chunks_per_pass(torch.empty(b, 1, h, 1), q)
        assert chunks == 1 or b * h * q * q * chunks <= 2**19


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize(
    ("shape", "packed", "per_channel", "limit"),
    [
        ({"b": 1, "l": 200, "h": 2, "p": 16, "n": 16, "g": 1}, False, False, (0.0, math.inf)),
        ({"b": 2, "l": 130, "h": 4, "p": 16, "n": 8, "g": 2}, True, True, (0.1, 2.0)),
        ({"b": 1, "l": 65, "h": 2, "p": 80, "n": 16, "g": 1}, True, False, (0.0, math.inf)),
        ({"b": 1, "l": 1, "h": 2, "p": 32, "n": 40, "g": 2}, False, False, (0.0, math.inf)),
    ],
)
def test_the_triton_kernels_compute_the_definition_and_its_gradients(monkeypatch, shape, packed, per_channel, limit):
    """In the interpreter, in float32, several stretches long."""
    ssd_triton = pytest.importorskip("seqmodels.kernels.ssd_triton")
    monkeypatch.setattr(ssd_triton, "_PROGRAMS", 8)
    exact = make(**shape, per_channel=per_channel)
    del exact["z"]
    narrow = {key: t.detach().float() for key, t in exact.items()}
    b, l = shape["b"], shape["l"]
    run = (torch.arange(l) * 5 // l).int().expand(b, l).contiguous() if packed else None
    y, state, starts = ssd_triton.forward(**narrow, run=run, softplus=True, low=limit[0], high=limit[1])
    assert starts.shape == ssd_triton.shape_of_starts(narrow["x"], narrow["B"])
    want = ssd_linear(**exact, seq_idx=run, dt_softplus=True, dt_limit=limit)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=rng) for t in want]
    want_gradients = torch.autograd.grad(want, list(exact.values()), weights)
    arguments = {key: narrow[key] for key in ("x", "dt", "A", "B", "C", "D", "dt_bias")}
    dx, ddt, dA, dB, dC, dD, ddt_bias, dstate = ssd_triton.backward(
        weights[0].float(), weights[1].float(), **arguments, starts=starts, run=run, softplus=True, low=limit[0],
        high=limit[1],
    )  # fmt: skip
    got = [y, state, dx, ddt, dA, dB, dC, dD, ddt_bias, dstate]
    for name, ours, right in zip(("y", "state", *exact), got, (*want, *want_gradients), strict=True):
        error = (ours.double() - right).norm() / right.norm()
        assert error <= 5e-6, (name, float(error))  # decays down to exp(-50) a step: dA is small and badly conditioned


def test_a_wrong_shape_is_named_with_both_sides():
    arguments = {k: v.detach() for k, v in make().items()}
    arguments["dt"] = arguments["dt"][:, :-1]
    with pytest.raises(ValueError, match=r"dt has shape \(2, 36, 4\); .* must be \(2, 37, 4\)"):
        ssd(**arguments)
