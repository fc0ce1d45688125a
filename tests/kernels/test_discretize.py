"""Discretisation: SciPy's exact hold and Euler step, also where A is singular."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.signal import cont2discrete

from seqmodels.kernels.discretize import (
    bilinear,
    mamba_discretization,
    step_size,
    zero_order_hold,
    zero_order_hold_matrix,
)


def oracle(A, B, dt, method):
    n, m = B.shape
    dA, dB, *_ = cont2discrete((A, B, np.eye(n), np.zeros((n, m))), dt, method=method)
    return dA, dB


@pytest.mark.parametrize("dt", [1e-6, 0.03, 2.5])
def test_the_matrix_hold_is_scipys(dt):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(3, 4, 4)), rng.normal(size=(3, 4, 2))
    dA, dB = zero_order_hold_matrix(torch.from_numpy(A), torch.from_numpy(B), torch.full((3,), dt, dtype=torch.float64))
    for i in range(3):
        want = oracle(A[i], B[i], dt, "zoh")
        np.testing.assert_allclose(dA[i], want[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(dB[i], want[1], rtol=1e-10, atol=1e-12)


def test_a_singular_matrix_is_held_exactly():
    A, B = (
        torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([[0.0], [1.0]], dtype=torch.float64),
    )
    dA, dB = zero_order_hold_matrix(A, B, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(dA, torch.tensor([[1.0, 3.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(dB, torch.tensor([[4.5], [3.0]], dtype=torch.float64))


@pytest.mark.parametrize(("rule", "method"), [(zero_order_hold, "zoh"), (bilinear, "bilinear")])
@pytest.mark.parametrize("A", [-40.0, -1.0, -1e-2, -1e-4, -1e-9, 0.0, 1e-6, 0.5])
@pytest.mark.parametrize("dt", [1e-6, 0.1, 1.7])
def test_the_diagonal_rules_are_scipys_at_every_size_of_a(A, dt, rule, method):
    B = 0.7
    dA, dB = rule(*(torch.tensor(v, dtype=torch.float64) for v in (A, B, dt)))
    want_dA, want_dB = oracle(np.array([[A]]), np.array([[B]]), dt, method)
    np.testing.assert_allclose((dA, dB), (want_dA.item(), want_dB.item()), rtol=1e-12)


def test_the_diagonal_hold_agrees_with_the_matrix_hold_and_broadcasts():
    rng = np.random.default_rng(1)
    rates, B, dt = -np.exp(rng.normal(size=4)), rng.normal(size=4), rng.random((5, 1))
    dA, dB = zero_order_hold(*(torch.from_numpy(v) for v in (rates, B, dt)))
    for i in range(5):
        np.testing.assert_allclose(np.diag(dA[i]), expm(dt[i, 0] * np.diag(rates)), rtol=1e-12)
        np.testing.assert_allclose(dB[i], oracle(np.diag(rates), B[:, None], dt[i, 0], "zoh")[1][:, 0], rtol=1e-12)


def test_single_precision_loses_nothing_where_the_quotient_cancels():
    z = torch.linspace(-0.1, 0, 4001, dtype=torch.float64)
    got = zero_order_hold(z.float(), torch.tensor(1.0), torch.tensor(1.0))[1].double()
    want = torch.where(z == 0, 1.0, torch.expm1(z.float().double()) / z.float().double().masked_fill(z == 0, 1))
    assert ((got - want) / want).abs().max() < 3 * torch.finfo(torch.float32).eps


def test_mambas_form_takes_the_exact_decay_and_eulers_input():
    rng = np.random.default_rng(2)
    rates, B, dt = -np.exp(rng.normal(size=4)), rng.normal(size=4), 0.3
    dA, dB = mamba_discretization(torch.from_numpy(rates), torch.from_numpy(B), torch.tensor(dt, dtype=torch.float64))
    np.testing.assert_allclose(np.diag(dA), oracle(np.diag(rates), B[:, None], dt, "zoh")[0], rtol=1e-12)
    np.testing.assert_allclose(dB, oracle(np.diag(rates), B[:, None], dt, "euler")[1][:, 0], rtol=1e-12)


def test_gradients_are_the_numerical_derivatives_also_at_zero():
    A = torch.tensor([-1.3, -1e-4, 0.0, 0.4], dtype=torch.float64, requires_grad=True)
    B = torch.tensor([0.3, 1.0, -2.0, 0.7], dtype=torch.float64, requires_grad=True)
    dt = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(zero_order_hold, (A, B, dt))


def test_the_step_size_is_biased_softened_and_limited_in_that_order():
    dt, bias = torch.tensor([-3.0, 0.0, 5.0], dtype=torch.float64), torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    softened = np.log1p(np.exp((dt + bias).numpy()))
    np.testing.assert_allclose(step_size(dt, bias, True, (0.0, math.inf), torch.float64), softened)
    np.testing.assert_allclose(step_size(dt, bias, True, (0.5, 2.0), torch.float64), softened.clip(0.5, 2.0))
    assert step_size(dt, None, False, (0.0, math.inf), torch.float32).tolist() == [0.0, 0.0, 5.0]
