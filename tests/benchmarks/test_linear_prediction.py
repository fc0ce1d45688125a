"""Bits under linear prediction."""

import itertools

import numpy as np
import pytest

from seqmodels.tasks.audio.waveform import MuLaw


def bits(samples):
    from linear_prediction import KEPT, ORDER, SHARE, WIDTHS, bits_of, borders

    mu_law = MuLaw()
    tokens = mu_law.encode(samples.astype(np.float32))
    decoded = mu_law.decode(tokens).astype(np.float64)
    return bits_of(tokens, decoded, borders(mu_law.levels), np.array(KEPT), WIDTHS, ORDER, SHARE) / len(tokens)


def test_the_borders_are_those_of_the_tokens():
    from linear_prediction import borders

    edges, mu_law = borders(256), MuLaw()
    inside = edges[1:-1]
    for step, token in ((-1e-6, np.arange(255)), (1e-6, np.arange(1, 256))):
        assert (mu_law.encode((inside + step).astype(np.float32)) == token).all()


def test_the_probabilities_of_all_tokens_sum_to_one_whatever_came_before():
    from linear_prediction import KEPT, ORDER, SHARE, WIDTHS, bits_of, borders

    rng, mu_law, edges = np.random.default_rng(0), MuLaw(), borders(256)
    before = mu_law.encode(
        np.sin(np.arange(60) / 3).astype(np.float32) * 0.5 + rng.normal(0, 0.05, 60).astype(np.float32)
    )
    decode = lambda tokens: mu_law.decode(tokens).astype(np.float64)  # noqa: E731
    settings = edges, np.array(KEPT), WIDTHS, ORDER, SHARE
    whole = bits_of(before, decode(before), *settings)
    after = [np.append(before, token) for token in range(256)]
    total = sum(2 ** (whole - bits_of(tokens, decode(tokens), *settings)) for tokens in after)
    assert total == pytest.approx(1, abs=1e-6)


def test_a_sum_of_sines_costs_little_and_noise_what_its_entropy_says():
    t = np.arange(8000)
    sines = 0.4 * np.sin(0.05 * t) + 0.3 * np.sin(0.31 * t + 1)
    assert bits(sines) < 1.5
    scale, rng = 0.1, np.random.default_rng(0)
    noise = rng.logistic(0, scale, 8000).clip(-1, 1)
    from linear_prediction import borders, logistic

    edges = borders(256)
    p = np.array([logistic(b, 0.0, scale) - logistic(a, 0.0, scale) for a, b in itertools.pairwise(edges)])
    assert bits(noise) == pytest.approx(-(p * np.log2(p)).sum(), abs=0.15)
