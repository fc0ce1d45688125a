"""The ceilings that all limits are counted with."""

import numpy as np
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
