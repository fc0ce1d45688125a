"""What the scans are timed against computes what it says."""

import pytest
import torch

from seqmodels.kernels.selective_scan import selective_scan_reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_the_convolution_is_the_sum_over_all_of_the_past():
    from alternatives import long_convolution

    x, kernel = random(2, 37, 3).float(), random(37, 3).float()
    y = torch.stack([(kernel[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(37)], 1)
    torch.testing.assert_close(long_convolution(x, kernel), y, rtol=1e-4, atol=1e-4)


def test_the_scan_in_pytorch_is_the_definition():
    from selective_scan import scan_in_pytorch

    b, l, e, n = 2, 37, 3, 4
    x, dt, z, A, D, bias = (
        random(b, l, e),
        random(b, l, e + 1)[..., 1:],
        random(b, l + 1, e)[:, 1:],
        random(e, n),
        random(e),
        random(e),
    )
    B, C = random(b, l, 1, n), random(b, l, 1, n + 1)[..., 1:]
    inputs = {"x": x, "dt": dt, "z": z, "A": -A.exp(), "D": D, "dt_bias": bias, "B": B, "C": C}
    wanted, _ = selective_scan_reference(**inputs, dt_softplus=True)
    y = scan_in_pytorch(**{name: tensor.float() for name, tensor in inputs.items()})
    torch.testing.assert_close(y, wanted.float(), rtol=1e-4, atol=1e-4)
