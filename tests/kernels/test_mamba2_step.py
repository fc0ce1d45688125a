"""The fused decoding step of Mamba-2 against the ops that it joins, in float64."""

import math

import pytest
import torch

from seqmodels.kernels.causal_conv1d import causal_conv1d_step
from seqmodels.kernels.mamba2_step import Mamba2Stack, mamba2_step
from seqmodels.kernels.rms_norm import rms_norm
from seqmodels.kernels.ssd import ssd_step


def inputs(b=2, d=12, h=4, p=8, g=1, n=16, k=4, D_per_channel=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    e = h * p
    c = e + 2 * g * n
    return {
        "u": random(b, d), "in_proj": random(e + c + h, d),
        "conv_weight": random(c, k), "conv_bias": random(c), "dt_bias": random(h) - 2,
        "A_log": random(h), "D": random(e if D_per_channel else h), "norm_weight": random(e),
        "out_proj": random(d, e),
        "conv_state": random(b, k - 1, c), "state": random(b, h, p, n),
    }  # fmt: skip


def separately(u, in_proj, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_proj, conv_state, state, *,
               groups=1, norm_groups=1, norm_before_gate=False, epsilon=1e-5, dt_limit=(0.0, math.inf)):  # fmt: skip
    b, h, p, n = state.shape
    zxBCdt = u @ in_proj.t()
    z, xBC, dt = zxBCdt.split([h * p, conv_weight.shape[0], h], -1)
    xBC, conv_state = causal_conv1d_step(xBC, conv_weight, conv_bias, activation="silu", state=conv_state)
    x, B, C = xBC.split([h * p, groups * n, groups * n], -1)
    y, state = ssd_step(
        x.view(b, h, p), dt, -A_log.exp(), B.view(b, groups, n), C.view(b, groups, n),
        D if len(D) == h else D.view(h, p), None, dt_bias, dt_softplus=True, dt_limit=dt_limit, state=state,
    )  # fmt: skip
    y = y.flatten(1)
    if norm_weight is None:
        return y * torch.nn.functional.silu(z) @ out_proj.t(), conv_state, state
    y = rms_norm(y, norm_weight, z=z, groups=norm_groups, epsilon=epsilon, norm_before_gate=norm_before_gate)
    return y @ out_proj.t(), conv_state, state


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"b": 1, "h": 1, "p": 3, "n": 5}, {}),
        ({"g": 2}, {"groups": 2, "norm_groups": 2}),
        ({"k": 2, "D_per_channel": True}, {"norm_before_gate": True}),
        ({"k": 1}, {"epsilon": 0.1}),
        ({"b": 3}, {"dt_limit": (0.05, 0.1)}),
    ],
)
def test_the_fused_step_is_convolution_ssd_and_norm_in_turn(sizes, options):
    given = inputs(**sizes)
    found = mamba2_step(**given, **options)
    expected = separately(**{name: tensor.double() for name, tensor in given.items()}, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_without_a_norm_or_bias_the_gate_remains():
    given = inputs() | {"norm_weight": None, "conv_bias": None}
    expected = separately(**{name: None if t is None else t.double() for name, t in given.items()})
    for a, b in zip(mamba2_step(**given), expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_a_row_does_not_depend_on_the_others_and_the_given_states_stay_as_they_are():
    given = inputs(b=5)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    whole = mamba2_step(**given)
    for name, tensor in given.items():
        assert torch.equal(tensor, kept[name])
    rows = ("u", "conv_state", "state")
    alone = mamba2_step(**{name: t[3:4] if name in rows else t for name, t in given.items()})
    for a, b in zip(alone, whole, strict=True):
        assert torch.equal(a[0], b[3])


def test_nan_in_the_input_reaches_the_output():
    given = inputs()
    given["u"][1, 3] = math.nan
    y, _, _ = mamba2_step(**given)
    assert y[1].isnan().any()
    assert not y[0].isnan().any()


@pytest.mark.parametrize("options", [{}, {"groups": 2, "norm_before_gate": True, "dt_limit": (0.05, 0.3)}])
@pytest.mark.parametrize("gated_norm", [True, False])
def test_a_stack_is_its_layers_in_turn_with_norms_and_additions_between(options, gated_norm):
    sizes = {"b": 3, "g": options.get("groups", 1)}
    given = [inputs(**sizes, seed=i) for i in range(3)]
    norms = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    for weights in given if not gated_norm else ():
        weights["norm_weight"] = None
    order = ("in_proj", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight", "out_proj")
    stack = Mamba2Stack(
        [[norm, *(weights[name] for name in order)] for norm, weights in zip(norms, given, strict=False)], norms[3],
        [weights["conv_state"] for weights in given], [weights["state"] for weights in given],
        layer_epsilon=1e-3, epsilon=1e-2,
        **({"groups": 1, "norm_before_gate": False, "dt_limit": (0, math.inf)} | options),
    )  # fmt: skip
    x = given[0]["u"]
    with torch.no_grad():
        for _ in range(3):
            total, y = x.double(), torch.zeros(3, 12, dtype=torch.float64)
            for norm, weights in zip(norms, given, strict=False):
                total = total + y
                exact = {name: t if t is None else t.double() for name, t in weights.items()}
                exact["u"] = rms_norm(total, norm.double(), epsilon=1e-3)
                y, weights["conv_state"], weights["state"] = separately(
                    **exact, epsilon=1e-2, norm_groups=options.get("groups", 1), **options
                )
            torch.testing.assert_close(
                stack.step(x).double(), rms_norm(total + y, norms[3].double(), epsilon=1e-3), rtol=1e-5, atol=1e-5
            )
