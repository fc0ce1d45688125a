"""One decoding step of a whole residual layer: the Triton form against the definition in float64."""

import itertools
import math

import pytest
import torch

from seqmodels.kernels import layer_step, linear_step_triton
from seqmodels.kernels.layer_step import mamba2_layer_step, mamba_layer_step

triton_needed = pytest.importorskip("triton", reason="the Triton forms need triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_tensors(seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE)


def mamba2_inputs(
    b=2, d=24, h=4, p=8, g=1, n=16, k=4, residual=True, bias=False, conv_bias=True, D_per_channel=False, norm=True,
    norm_before_gate=False, dt_limit=(0.0, math.inf), residual_in_fp32=True,
):  # fmt: skip
    random, e = random_tensors(), h * p
    c = e + 2 * g * n
    return [
        random(b, d), random(b, d) if residual else None, random(d), random(e + c + h, d) / d**0.5,
        random(e + c + h) if bias else None, random(c, k), random(c) if conv_bias else None, random(h) - 2, random(h),
        random(e if D_per_channel else h), random(e) if norm else None, random(d, e) / e**0.5,
        random(d) if bias else None, random(b, k - 1, c), random(b, h, p, n),
        g, norm_before_gate, 1e-5, 1e-3, *dt_limit, residual_in_fp32, True,
    ]  # fmt: skip


def mamba_inputs(b=2, d=24, e=48, n=16, r=3, k=4, residual=True, bias=False, conv_bias=True, residual_in_fp32=True):
    random = random_tensors()
    return [
        random(b, d), random(b, d) if residual else None, random(d), random(2 * e, d) / d**0.5,
        random(2 * e) if bias else None, random(e, k), random(e) if conv_bias else None,
        random(r + 2 * n, e) / e**0.5, random(e, r), random(e) - 2, random(e, n), random(e), random(d, e) / e**0.5,
        random(d) if bias else None, random(b, k - 1, e), random(b, e, n), 1e-5, residual_in_fp32, True,
    ]  # fmt: skip


OPS = {"mamba2": (mamba2_layer_step, mamba2_inputs, 13), "mamba": (mamba_layer_step, mamba_inputs, 14)}


def converted(given, dtype):
    return [value.to(dtype, copy=True) if isinstance(value, torch.Tensor) else value for value in given]


def results(function, op, given):
    """y, total and the new states; the given ones stay as they are."""
    given, states = list(given), OPS[op][2]
    for i in (states, states + 1):
        given[i] = given[i].clone()
    return [*function(*given), given[states], given[states + 1]]


def triton_form(op):
    module = pytest.importorskip(f"seqmodels.kernels.{op}_step_triton")

    def forward(*given):
        *tensors, residual_in_fp32, follows = given
        return module.forward(*tensors, torch.float32 if residual_in_fp32 else given[0].dtype, follows)

    return forward


def fill_with_nan(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(math.nan))


SIZES = [
    ("mamba2", {}),
    ("mamba2", {"b": 1, "d": 7, "h": 1, "p": 3, "n": 5}),
    ("mamba2", {"g": 2, "norm_before_gate": True, "dt_limit": (0.05, 0.1), "bias": True}),
    ("mamba2", {"b": 3, "k": 2, "D_per_channel": True, "residual": False}),
    ("mamba2", {"k": 1, "norm": False, "residual_in_fp32": False, "conv_bias": False}),
    ("mamba2", {"h": 2, "p": 12}),
    ("mamba2", {"b": 9, "h": 3, "g": 3, "p": 5, "n": 3, "d": 9}),
    ("mamba", {}),
    ("mamba", {"b": 1, "d": 7, "e": 14, "n": 5, "r": 1, "k": 3, "residual": False}),
    ("mamba", {"b": 5, "bias": True, "conv_bias": False, "residual_in_fp32": False}),
]


@pytest.mark.parametrize(("op", "sizes"), SIZES)
@pytest.mark.parametrize("products", [False, True])
def test_the_kernels_compute_the_definition(monkeypatch, op, sizes, products):
    if products:  # the form for batches in bfloat16, here in float32
        for module in ("linear_step", "mamba2_step", "mamba_step"):
            monkeypatch.setattr(f"seqmodels.kernels.{module}_triton.on_tensor_cores", lambda x, weight: True)
    given = OPS[op][1](**sizes)
    want = results(getattr(layer_step, f"_{op}_in_torch"), op, converted(given, torch.float64))
    fill_with_nan(monkeypatch)
    for a, b in zip(results(triton_form(op), op, given), want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_a_row_does_not_depend_on_the_others(op):
    function, inputs, states = OPS[op]
    given = inputs(b=4)
    whole = results(function, op, given)
    alone = list(given)
    for i in (0, 1, states, states + 1):
        alone[i] = given[i][2:3]
    for a, b in zip(results(function, op, alone), whole, strict=True):
        torch.testing.assert_close(a[0], b[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_the_registration_is_sound(op):
    function, inputs, _ = OPS[op]
    for sizes, dtype in itertools.product(({}, {"residual": False, "residual_in_fp32": False}), (torch.float32,)):
        torch.library.opcheck(function, converted(inputs(**sizes), dtype))


@pytest.mark.parametrize("most", [1, 4, 8])
@pytest.mark.parametrize("tile", [1, 8, 64, 128, 4096])
def test_no_two_warps_hold_the_same_value_of_a_state(tile, most):
    warps = linear_step_triton.warps_for(tile, most)
    assert warps == 1 or 32 * warps <= tile
    assert warps == most or tile < 32 * most
