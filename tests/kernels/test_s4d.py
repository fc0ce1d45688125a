"""S4D: its chunked FFT form is SciPy's filter and the recurrence, gradients too, however rows are cut and packed."""

import numpy as np
import pytest
import torch
from scipy.signal import dlsim, lfilter

from seqmodels.kernels.discretize import bilinear, zero_order_hold
from seqmodels.kernels.s4d import s4d, s4d_linear, s4d_step

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"complex": torch.complex128, "real": torch.float64}
LAYOUTS = {
    "plain": {},
    "padded": {"lengths": (37, 0, 13)},
    "packed": {"bounds": ([5, 6, 30], [8, 16, 24], [])},
    "packed-and-padded": {"bounds": ([5, 6, 30], [8], [36]), "lengths": (33, 17, 36)},
}


def make(kind="complex", b=3, l=37, e=4, n=3, seed=0, rule=zero_order_hold):
    """Random arguments whose decays span slow and fast."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=KINDS[kind])

    A = -torch.rand(e, n, generator=rng, dtype=torch.float64).mul(3).exp()
    if kind == "complex":
        A = torch.complex(A, torch.randn(e, n, generator=rng, dtype=torch.float64) * 5)
    dA, dB = rule(A, torch.ones_like(A), torch.rand(e, 1, generator=rng, dtype=torch.float64) * 0.3)
    arguments = {
        "x": torch.randn(b, l, e, generator=rng, dtype=torch.float64), "dA": dA, "dB": dB, "C": normal(e, n),
        "D": torch.randn(e, generator=rng, dtype=torch.float64), "initial_state": normal(b, e, n),
    }  # fmt: skip
    return {name: t.detach().requires_grad_() for name, t in arguments.items()}


def layout(name, l=37):
    given = LAYOUTS[name]
    options = {"lengths": torch.tensor(given["lengths"])} if "lengths" in given else {}
    if "bounds" in given:
        rows = [np.searchsorted(bounds, np.arange(l), side="right") for bounds in given["bounds"]]
        options["seq_idx"] = torch.from_numpy(np.stack(rows))
    return options


def gradients(form, arguments, **options):
    """Results, and the gradients of a random weighting of them (real steps only)."""
    y, state = form(**arguments, **options)
    rng, l = torch.Generator().manual_seed(9), y.shape[1]
    lengths = options.get("lengths", torch.full((len(y),), l))
    y = y * (torch.arange(l) < lengths[:, None])[..., None]
    loss = (y * torch.randn(y.shape, generator=rng, dtype=y.dtype)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=rng, dtype=state.dtype)).sum().real
    return (y, state, *torch.autograd.grad(loss, list(arguments.values())))


@pytest.mark.parametrize("rule", [zero_order_hold, bilinear])
@pytest.mark.parametrize("kind", KINDS)
def test_s4d_is_scipys_simulation_of_the_system(kind, rule):
    with torch.no_grad():
        a = {name: t.detach() for name, t in make(kind, b=1, rule=rule).items()}
        y, _ = s4d(**a, chunk_size=8)
    for channel in range(4):
        dA, dB, C = (a[name][channel].numpy() for name in ("dA", "dB", "C"))
        h, u = a["initial_state"][0, channel].numpy(), a["x"][0, :, channel].numpy()
        if kind == "complex":  # a conjugate pair as a real system of two, and its output as twice the real part
            blocks = [np.array([[z.real, -z.imag], [z.imag, z.real]]) for z in dA]
            A = np.zeros((2 * len(dA),) * 2)
            for i, block in enumerate(blocks):
                A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
            B = np.stack([dB.real, dB.imag], 1).reshape(-1, 1)
            read = np.stack([2 * C.real, -2 * C.imag], 1).reshape(1, -1)
            h = np.stack([h.real, h.imag], 1).ravel()
        else:
            A, B, read = np.diag(dA), dB[:, None], C[None]
        # SciPy reads the state before it is updated: y[t] = C (A h[t-1] + B u[t]) + D u[t]
        skip = read @ B + a["D"][channel].item()
        _, want, _ = dlsim((A, B, read @ A, skip, 1.0), u, x0=h)
        np.testing.assert_allclose(y[0, :, channel], want[:, 0], rtol=1e-9, atol=1e-9)


def test_s4d_of_one_real_state_is_scipys_recursive_filter():
    a = make("real", b=1, n=1)
    y, _ = s4d(a["x"], a["dA"], a["dB"], a["C"], chunk_size=16)
    for channel in range(4):
        gain, pole = (a["C"] * a["dB"])[channel].detach().numpy(), a["dA"][channel].item()
        want = lfilter(gain, [1, -pole], a["x"][0, :, channel].detach().numpy())
        np.testing.assert_allclose(y[0, :, channel].detach(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [7, 64])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_form_and_its_gradients_are_those_of_the_recurrence(kind, name, chunk_size):
    arguments, options = make(kind), layout(name)
    want = gradients(s4d_linear, arguments, **options)
    got = gradients(s4d, arguments, **options, chunk_size=chunk_size)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_splitting_the_sequence_carries_the_state(kind):
    arguments = make(kind)
    x, state = arguments.pop("x"), arguments.pop("initial_state")
    whole, final = s4d(x, **arguments, initial_state=state, chunk_size=8)
    pieces = []
    for part in x.split([1, 7, 2, 20, 6, 1], 1):
        y, state = s4d(part, **arguments, initial_state=state, chunk_size=8)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("l", [1, 1200])
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_costs_the_convolution_no_more_than_the_recurrence(kind, l):
    exact = make(kind, b=1, l=l, seed=3)
    narrow = {n: t.to(torch.complex64 if t.is_complex() else torch.float32) for n, t in exact.items()}
    exact = {n: t.to(exact[n].dtype) for n, t in narrow.items()}
    want, got, steps = s4d_linear(**exact), s4d(**narrow), s4d_linear(**narrow)
    for truth, fast, slow in zip(want, got, steps, strict=True):
        assert (fast - truth).norm() <= 2 * (slow - truth).norm() + 1e-6 * truth.norm()
        assert fast.dtype == slow.dtype == narrow["x"].dtype or fast.is_complex()


@torch.no_grad()
def test_autocast_changes_nothing_but_the_type_that_comes_in():
    arguments = {n: t.to(torch.complex64 if t.is_complex() else torch.float32) for n, t in make().items()}
    arguments["x"] = arguments["x"].bfloat16()
    want = s4d(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = s4d(**arguments)
        y, _ = s4d_step(arguments["x"][:, 0], *(arguments[n] for n in ["dA", "dB", "C", "D"]), state=want[1])
    assert got[0].dtype == y.dtype == torch.bfloat16
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
