"""The causal convolution: torch's own convolution, cut at sequence bounds, in passes, in pieces and in steps."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.kernels import causal_conv1d as module
from seqmodels.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step


def make(b=2, l=37, d=6, k=4, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    return {"x": normal(b, l, d), "weight": normal(d, k), "bias": normal(d), "initial_state": normal(b, k - 1, d)}


def results(form, arguments, **options):
    """Outputs and the gradients of every argument, through the output and the final state."""
    y, state = form(**arguments, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(arguments.values()), materialize_grads=True)
    return dict(zip(["y", "state", *(f"d{k}" for k in arguments)], (y, state, *gradients), strict=True))


def assert_same(got, want):
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", [causal_conv1d, causal_conv1d_reference])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_it_is_torchs_depthwise_convolution_of_the_padded_input(form, activation):
    a = make()
    padded = torch.cat([a["initial_state"], a["x"]], 1)
    want = F.conv1d(padded.transpose(1, 2), a["weight"][:, None], a["bias"], groups=6).transpose(1, 2)
    y, state = form(**a, activation=activation)
    torch.testing.assert_close(y, F.silu(want) if activation else want)
    torch.testing.assert_close(state, a["x"][:, -3:])


@pytest.mark.parametrize("steps_per_pass", [1, 2, 5, 64])
@pytest.mark.parametrize("l", [1, 2, 3, 63, 64, 65])
def test_outputs_and_every_gradient_are_those_of_the_definition_in_passes_of_any_length(l, steps_per_pass, monkeypatch):
    a = make(l=l)
    monkeypatch.setattr(module, "_ELEMENTS_PER_PASS", steps_per_pass * 2 * 6)
    seq_idx = (torch.arange(l) * 9 // max(l, 2)).expand(2, l)
    for packed, activation in itertools.product((None, seq_idx), (None, "silu")):
        options = {"seq_idx": packed, "activation": activation}
        assert_same(results(causal_conv1d, a, **options), results(causal_conv1d_reference, a, **options))


@given(
    b=st.integers(1, 3), l=st.integers(1, 30), d=st.integers(1, 9), k=st.integers(1, 6), seed=st.integers(0, 2**16),
    bias=st.booleans(), initial=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape_agrees_with_the_definition(b, l, d, k, seed, bias, initial):
    a = make(b, l, d, k, seed)
    if not bias:
        del a["bias"]
    if not initial:
        del a["initial_state"]
    seq_idx = (torch.rand(b, l, generator=torch.Generator().manual_seed(seed)) < 0.2).cumsum(1)
    options = {"seq_idx": seq_idx, "activation": "silu"}
    assert_same(results(causal_conv1d, a, **options), results(causal_conv1d_reference, a, **options))


def test_gradients_are_the_numerical_derivatives():
    a = {k: v.detach().requires_grad_() for k, v in make(b=1, l=5, d=2, k=3).items()}
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]])

    def convolve(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, initial_state=state, seq_idx=seq_idx, activation="silu")

    assert torch.autograd.gradcheck(convolve, tuple(a.values()))


def test_pieces_and_steps_with_the_state_handed_on_are_the_whole():
    a = make(l=20)
    want, final = causal_conv1d(**a, activation="silu")
    state, parts = a.pop("initial_state"), []
    for start, stop in [(0, 1), (1, 3), (3, 15)]:
        y, state = causal_conv1d(a["x"][:, start:stop], a["weight"], a["bias"], activation="silu", initial_state=state)
        parts.append(y)
    for t in range(15, 20):
        y, state = causal_conv1d_step(a["x"][:, t], a["weight"], a["bias"], activation="silu", state=state)
        parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), want)
    torch.testing.assert_close(state, final)


def test_packed_sequences_give_what_each_gives_alone():
    a = make(b=1, l=30)
    del a["initial_state"]
    bounds = [0, 1, 3, 28, 30]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(bounds).diff())[None]
    packed, final = causal_conv1d(**a, seq_idx=seq_idx)
    for start, stop in itertools.pairwise(bounds):
        alone, state = causal_conv1d(a["x"][:, start:stop], a["weight"], a["bias"])
        torch.testing.assert_close(packed[:, start:stop], alone)
    torch.testing.assert_close(final, state)
    assert (final[:, 0] == 0).all()  # the last sequence has two steps, the window three


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_cost_no_more_than_their_own_rounding(dtype):
    narrow = make(b=1, l=300, d=8, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in narrow.items()}
    wide = {k: v.detach().float().requires_grad_() for k, v in narrow.items()}
    want = results(causal_conv1d_reference, exact, activation="silu")
    same = results(causal_conv1d_reference, wide, activation="silu")
    got = results(causal_conv1d, narrow, activation="silu")
    for name, value in want.items():
        error, budget = ((t[name].double() - value).norm() / value.norm() for t in (got, same))
        assert error <= 2 * (budget + torch.finfo(dtype).eps), (name, float(error), float(budget))
        assert got[name].dtype == dtype


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself causes it
def test_the_operator_is_well_formed():
    a = make(b=1, l=10, d=2)
    run = torch.tensor([[0] * 4 + [1] * 6])
    inputs = (a["x"], a["weight"], a["bias"], a["initial_state"], run, True)
    checks = torch.library.opcheck(torch.ops.longseq.causal_conv1d.default, inputs)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, 6)}, r"x has shape \(2, 0, 6\).*l >= 1"),
        ({"weight": torch.zeros(6, 1, 4)}, r"weight has shape \(6, 1, 4\).*\(6, k\).*squeeze"),
        ({"initial_state": torch.zeros(2, 4, 6)}, r"initial_state has shape \(2, 4, 6\).*k = 4 taps.*\(2, 3, 6\)"),
        ({"activation": "gelu"}, "activation is 'gelu'; use None or 'silu'"),
    ],
)
def test_a_wrong_argument_is_named_with_both_sides(change, message):
    arguments = {k: v.detach() for k, v in make().items()} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)


EVERYTHING = ("bias", "initial_state", "run", "dfinal")


def in_both_forms(x, weight, bias, state, run, silu, dy, dfinal):
    """Outputs and gradients of the Triton form at float32 and of the plain form at float64."""
    triton = importlib.import_module("seqmodels.kernels.causal_conv1d_triton")
    got = (
        *triton.forward(x, weight, bias, state, run, silu),
        *triton.backward(dy, dfinal, x, weight, bias, state, run, silu),
    )
    x, weight, bias, state, dy, dfinal = (
        None if t is None else t.double() for t in (x, weight, bias, state, dy, dfinal)
    )
    plain = module._conv_in_torch(x, weight, bias, state, run, silu)
    return got, (*plain, *module._conv_backward_in_torch(dy, dfinal, x, weight, bias, state, run, silu))


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves")
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize(
    ("b", "l", "d", "k", "silu", "given"),
    [
        *(
            (2, 37, 6, 4, True, given)
            for given in [(), ("bias", "run"), ("initial_state",), ("dfinal", "run"), EVERYTHING]
        ),
        (3, 2, 72, 4, True, EVERYTHING),
        (1, 1, 5, 3, False, EVERYTHING),
        (2, 9, 3, 1, True, ("bias", "run")),
        (1, 140, 8, 3, True, EVERYTHING),
        (1, 20, 8, 8, False, EVERYTHING),
    ],
)
def test_the_triton_form_agrees_with_float64(b, l, d, k, silu, given):
    a = {name: t.detach() for name, t in make(b, l, d, k, dtype=torch.float32).items()}
    rng = torch.Generator().manual_seed(2)
    wide = torch.randn(b, l, 2 * d + 3, generator=rng)
    a["x"] = wide[..., 3 : 3 + d]  # rows lie apart, as in a view of in_proj's output
    run = (torch.rand(b, l, generator=rng) < 0.2).index_fill(1, torch.tensor(0), False).cumsum(1)
    dfinal, dy = torch.randn(b, k - 1, d, generator=rng), wide[..., d + 3 :]
    got, want = in_both_forms(
        a["x"], a["weight"], a["bias"] if "bias" in given else None,
        a["initial_state"] if "initial_state" in given else None, run if "run" in given else None, silu, dy,
        dfinal if "dfinal" in given else None,
    )  # fmt: skip
    for name, one, other in zip(("y", "final", "dx", "dweight", "dbias", "dinitial"), got, want, strict=True):
        assert one.shape == other.shape, name
        assert (one.double() - other).norm() <= 2e-6 * other.norm(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves")
def test_the_triton_form_writes_dx_into_a_given_view_and_nowhere_else():
    triton = importlib.import_module("seqmodels.kernels.causal_conv1d_triton")
    a = {name: t.detach() for name, t in make(2, 9, 6, dtype=torch.float32).items()}
    dy = torch.randn(1, 1, 6).expand(2, 9, 6)
    want, *_ = triton.backward(dy, None, a["x"], a["weight"], None, None, None, True)
    buffer = torch.zeros(2, 9, 16)
    got, *_ = triton.backward(dy, None, a["x"], a["weight"], None, None, None, True, dx=buffer[..., 8:14])
    assert got.data_ptr() == buffer[..., 8:].data_ptr()
    assert torch.equal(buffer, F.pad(want, (8, 2)))
