"""RMSNorm: gate, groups, residual and gradients are those of the definition, on every path through the operator."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.kernels import rms_norm as module
from seqmodels.kernels.rms_norm import rms_norm, rms_norm_reference


def make(*shape, seed=0, dtype=torch.float64, names=("weight", "bias", "z", "residual")):
    rng = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    sizes = {"weight": shape[-1:], "bias": shape[-1:], "z": shape, "residual": shape}
    return {"x": normal(*shape)} | {name: normal(*sizes[name]) for name in names}


def results(form, arguments, **options):
    """Outputs and the gradients of every argument, through both outputs."""
    outputs = form(**arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype)).sum() for t in outputs)
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    return [*outputs, *gradients]


OPTIONAL = [names for r in range(4) for names in itertools.combinations(("bias", "z", "residual"), r)]


@pytest.mark.parametrize("names", OPTIONAL, ids="+".join)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_outputs_and_every_gradient_are_those_of_the_definition(names, norm_before_gate, groups, monkeypatch):
    arguments = make(2, 7, 12, names=("weight", *names))
    options = {"norm_before_gate": norm_before_gate, "groups": groups}
    want = results(rms_norm_reference, arguments, **options)
    for elements in (2**17, 5 * 12):  # in one pass over the rows and in several
        monkeypatch.setattr(module, "_ELEMENTS_PER_PASS", elements)
        torch.testing.assert_close(results(rms_norm, arguments, **options), want)
    with torch.no_grad():  # the short way of a decoding step
        torch.testing.assert_close(
            rms_norm(**arguments, **options), want[0] if "residual" not in names else (*want[:2],)
        )


def test_the_definition_is_torchs_rms_norm_and_the_gate_a_silu():
    a = make(3, 5, 8, names=("weight", "z"))
    norm = F.rms_norm(a["x"], (8,), a["weight"], 1e-5)
    torch.testing.assert_close(rms_norm_reference(a["x"], a["weight"]), norm)
    gated_after = rms_norm_reference(a["x"], a["weight"], z=a["z"], norm_before_gate=True)
    torch.testing.assert_close(gated_after, norm * F.silu(a["z"]))
    gated_first = F.rms_norm(a["x"] * F.silu(a["z"]), (8,), a["weight"], 1e-5)
    torch.testing.assert_close(rms_norm_reference(a["x"], a["weight"], z=a["z"]), gated_first)


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), size=st.integers(1, 5), groups=st.integers(1, 4),
    before=st.booleans(), names=st.sampled_from(OPTIONAL), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape_agrees_with_the_definition(shape, size, groups, before, names, seed):
    arguments = make(*shape, size * groups, seed=seed, names=("weight", *names))
    options = {"norm_before_gate": before, "groups": groups}
    want = results(rms_norm_reference, arguments, **options)
    torch.testing.assert_close(results(rms_norm, arguments, **options), want)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gradients_are_the_numerical_derivatives(norm_before_gate):
    a = make(2, 3, 4)

    def norm(x, weight, bias, z, residual):
        return rms_norm(x, weight, bias, z=z, residual=residual, norm_before_gate=norm_before_gate, groups=2)

    assert torch.autograd.gradcheck(norm, tuple(a.values()))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stays_in_float32_if_asked(dtype, gradient):
    a = {k: v.detach() for k, v in make(2, 5, 8, dtype=dtype, names=("weight", "residual")).items()}
    a["residual"] = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    a["x"].requires_grad_(gradient)
    y, total = rms_norm(**a, residual_in_fp32=True)
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert torch.equal(total, a["x"].float() + a["residual"])
    assert rms_norm(**a)[1].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_narrow_inputs_cost_no_more_than_their_own_rounding(dtype, norm_before_gate):
    narrow = make(1, 300, 16, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in narrow.items()}
    wide = {k: v.detach().float().requires_grad_() for k, v in narrow.items()}
    options = {"norm_before_gate": norm_before_gate, "residual_in_fp32": True}
    want, same = (results(rms_norm_reference, a, **options) for a in (exact, wide))
    for name, value, reference, got in zip(
        ("y", "total", *(f"d{k}" for k in narrow)), want, same, results(rms_norm, narrow, **options), strict=True
    ):
        error, budget = ((t.double() - value).norm() / value.norm() for t in (got, reference))
        assert error <= 2 * (budget + torch.finfo(dtype).eps), (name, float(error), float(budget))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself causes it
@pytest.mark.parametrize("residual", [False, True])
def test_the_operator_is_well_formed(residual):
    a = make(2, 3, 4)
    inputs = (a["x"], a["weight"], a["bias"], a["z"], a["residual"] if residual else None, 1e-5, False, 2, True)
    checks = torch.library.opcheck(torch.ops.longseq.rms_norm.default, inputs)
    assert set(checks.values()) == {"SUCCESS"}


def test_a_wrong_shape_is_named_with_both_sides():
    x = torch.zeros(2, 3, 6)
    with pytest.raises(ValueError, match=r"x has 6 channels, which groups = 4 does not divide"):
        rms_norm(x, torch.ones(6), groups=4)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\); with x \(2, 3, 6\) it must be \(6,\)"):
        rms_norm(x, torch.ones(5))
    with pytest.raises(ValueError, match=r"residual has shape \(2, 6\)"):
        rms_norm(x, torch.ones(6), residual=torch.zeros(2, 6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves")
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("names", OPTIONAL, ids="+".join)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((2, 7, 12), 3), ((37, 24), 1), ((5,), 1)])
def test_the_triton_form_agrees_with_float64(shape, groups, norm_before_gate, names):
    triton = importlib.import_module("seqmodels.kernels.rms_norm_triton")
    rng = torch.Generator().manual_seed(3)
    x, dy, dtotal, z, residual = torch.randn(5, *shape, generator=rng)
    z = torch.cat([z, residual], -1)[..., : shape[-1]]  # rows lie apart, as in a view of in_proj's output
    weight, bias = torch.randn(2, shape[-1], generator=rng)
    z, residual = z if "z" in names else None, residual if "residual" in names else None
    bias, dtotal = bias if "bias" in names else None, dtotal if "residual" in names else None

    def forms(forward, backward, dtype):
        tensors = (x, weight, bias, z, residual, dy, dtotal)
        u, w, c, gate, given, du, dt = (None if t is None else t.to(dtype) for t in tensors)
        y, total = forward(u, w, c, gate, given)
        v, dresidual = (u, None) if given is None else (total, dtype)
        gradients = backward(du, dt, v, w, c, gate, 1e-5, norm_before_gate, groups, dtype, dresidual)
        return y, total, *gradients

    got = forms(
        lambda *a: triton.forward(*a, 1e-5, norm_before_gate, groups, torch.float32), triton.backward, torch.float32
    )
    want = forms(
        lambda *a: module._rms_norm_in_torch(*a, 1e-5, norm_before_gate, groups, True),
        module._rms_norm_backward_in_torch, torch.float64,
    )  # fmt: skip
    outputs = ("y", "total", "dx", "dresidual", "dweight", "dbias", "dz")
    for name, one, other in zip(outputs, got, want, strict=True):
        assert one.shape == other.shape, name
        assert (one.double() - other).norm() <= 1e-6 * other.norm(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves")
def test_the_triton_form_writes_dz_into_a_given_view_and_nowhere_else():
    triton = importlib.import_module("seqmodels.kernels.rms_norm_triton")
    dy, v, z = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(4))
    arguments = (dy, None, v, torch.ones(8), None, z, 1e-5, False, 1, torch.float32, None)
    buffer = torch.zeros(2, 9, 24)
    *_, want = triton.backward(*arguments)
    *_, got = triton.backward(*arguments, dz=buffer[..., 8:16])
    assert got.data_ptr() == buffer[..., 8:].data_ptr()
    assert torch.equal(buffer, F.pad(want, (8, 8)))
