"""The ceilings that all limits are counted with."""

import json
import math

import numpy as np
import pytest
import torch


def test_the_kernels_do_as_many_steps_as_are_counted():
    from ceilings import BLOCK, _multiply_add, _scan_steps, in_registers

    x = torch.rand(2 * BLOCK, generator=torch.Generator().manual_seed(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = x.double().numpy()
    value, b, c = a, 1 - a, 2 * a
    h, y, dt = a, b, c
    for _ in range(3 * 16):
        value = value * a + b
        dt = dt * a + b
        h = np.exp2(-dt * a) * h + dt * b
        y = y + c * h
    for kernel, wanted in ((_multiply_add, value), (_scan_steps, h + y)):
        found = in_registers(kernel, x.to(device), rounds=3).cpu()
        torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


def recorded(name):
    import record

    return json.loads((record.RESULTS / "h200" / f"{name}.json").read_text())


def test_what_limits_are_counted_with_was_measured_or_is_more_than_was_measured():
    import costs

    measured = {row["op"]: row["per_s"] for row in recorded("ceilings")}
    assert measured["copy, bytes"] == pytest.approx(costs.BYTES_PER_S, rel=0.03)
    assert measured["matrix products of 4096, operations"] == pytest.approx(costs.MATRIX_OPS_PER_S, rel=0.03)
    assert measured["matrix products of 8192, operations"] < costs.MATRIX_OPS_PER_S
    assert measured["FMA in float32"] < costs.FMA_PER_S
    assert measured["steps of a scan"] < costs.SCAN_STEPS_PER_S


@pytest.mark.parametrize("name", ["alternatives", "causal_conv1d", "layers", "rms_norm", "selective_scan", "ssd"])
def test_recorded_limits_are_those_of_costs(name):
    import costs

    cost = {
        "alternatives": lambda shape, l: (costs.long_convolution if "d" in shape else costs.attention)(shape, l),
        "layers": costs.layer,
    }.get(name) or getattr(costs, name)  # fmt: skip
    rows = recorded(name)
    assert rows
    for row in rows:
        least = sum(cost(row["shape"], row["l"]).ms[: 1 + (row["pass"] == "fwd+bwd")])
        assert math.isclose(row["floor_ms"], least, rel_tol=1e-3, abs_tol=1e-4), row
