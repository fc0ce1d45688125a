"""Laws of the scores of generated recordings, against SciPy and the published formulas."""

import math

import numpy as np
import pytest
from scipy import linalg
from scipy.stats import binomtest, entropy

from seqmodels.tasks.audio import metrics as m

RNG = np.random.default_rng(0)


def probabilities(n, classes=10, seed=0):
    logits = np.random.default_rng(seed).normal(0, 3, (n, classes))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize("n", [300, 20])  # with fewer clips than features the covariances are singular
def test_the_frechet_distance_is_the_one_with_scipys_matrix_root(n):
    rng = np.random.default_rng(1)
    real, made = rng.normal(0, 2, (400, 24)) @ rng.normal(0, 1, (24, 24)), rng.normal(0.3, 1, (n, 24))
    s1, s2 = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    root = linalg.sqrtm(s1 @ s2).real
    expected = np.square(real.mean(0) - made.mean(0)).sum() + np.trace(s1 + s2 - 2 * root)
    assert m.frechet_distance(real, made) == pytest.approx(expected, rel=1e-6)
    assert m.frechet_distance(real, real) == pytest.approx(0, abs=1e-8 * np.trace(s1))
    assert m.frechet_distance(real, real + 1) == pytest.approx(24, rel=1e-6)


def test_the_inception_scores_are_those_of_the_published_formulas_and_draws():
    p = probabilities(501)
    np.random.seed(0)  # noqa: NPY002  # the published programs draw so
    shuffled = p[np.random.permutation(len(p))]  # noqa: NPY002
    half = len(p) // 2
    mean = np.repeat(shuffled[half:].mean(0)[None], half, axis=0)
    assert m.inception_score(np.log(p)) == pytest.approx(np.exp(entropy(shuffled[:half], mean, axis=1).mean()))
    np.random.seed(0)  # noqa: NPY002
    pairs = [np.random.choice(np.arange(len(p)), size=2, replace=True) for _ in range(10000)]  # noqa: NPY002
    first, second = np.array(pairs).T
    expected = np.exp(entropy(p[first], p[second], axis=1).mean())
    assert m.modified_inception_score(np.log(p)) == pytest.approx(expected)


def test_the_am_score_is_that_of_the_published_formula():
    real, made = probabilities(200), probabilities(70, seed=1)
    expected = entropy(real.mean(0), made.mean(0)) + np.mean(entropy(made, axis=1))
    assert m.am_score(np.log(real), np.log(made)) == pytest.approx(expected)


def test_sure_and_even_answers_reach_the_best_scores_and_one_answer_the_worst():
    sure = np.log(np.full((1000, 10), 1e-9) + np.eye(10)[np.arange(1000) % 10])
    sure -= np.log(np.exp(sure).sum(1, keepdims=True))
    same = sure[np.zeros(1000, int)]
    assert m.inception_score(sure) == pytest.approx(10, rel=0.05)  # the halves are drawn
    assert m.am_score(sure, sure) == pytest.approx(0, abs=1e-6)
    assert m.inception_score(same) == pytest.approx(1)
    assert m.modified_inception_score(same) == pytest.approx(1)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (98, 100), (780, 1000)])
def test_the_interval_is_the_one_of_wilson(hits, n):
    found = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert m.wilson_interval(hits, n) == pytest.approx((found.low, found.high), abs=1e-7)


def test_confusions_count_each_clip_once_where_it_belongs():
    truth, said = np.array([0, 0, 1, 2]), np.array([0, 2, 1, 0])
    assert m.confusion(said, truth, 3) == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert m.accuracy(said, truth)["accuracy"] == 0.5


@pytest.mark.parametrize("length", [1000, 1001])
def test_random_phases_keep_the_magnitudes_of_the_spectrum_and_nothing_else(length):
    wave = RNG.normal(0, 0.1, length).cumsum().astype(np.float32)
    changed = m.phase_randomised(wave, np.random.default_rng(0))
    before, after = np.fft.rfft(wave), np.fft.rfft(changed)
    np.testing.assert_allclose(np.abs(after), np.abs(before), rtol=1e-3, atol=1e-4)
    assert abs(np.corrcoef(wave - wave.mean(), changed - changed.mean())[0, 1]) < 0.9
    turn = np.angle(after[1 : length // 2] / before[1 : length // 2])
    assert abs(np.exp(1j * turn).mean()) < 0.15


def test_white_noise_has_the_power_of_the_clip_and_a_flat_spectrum():
    wave = np.sin(np.arange(8000) / 5).astype(np.float32)
    noise = m.white_noise(wave, np.random.default_rng(0))
    assert np.square(noise).mean() == pytest.approx(np.square(wave).mean(), rel=0.05)
    low, high = np.split(np.square(np.abs(np.fft.rfft(noise)))[:4000], 2)
    assert low.mean() == pytest.approx(high.mean(), rel=0.1)


def test_copies_are_the_windows_that_occur_sample_by_sample_in_training():
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 256, n) for n in (500, 31, 900)]
    audible = np.arange(256) != 128
    made = np.concatenate([rng.integers(0, 256, 100), train[2][200:260], rng.integers(0, 256, 100)])
    hashes = m.training_windows(train, audible)
    found = m.copies([made, rng.integers(0, 256, 300), train[1]], hashes, audible)
    known = {tuple(t[i : i + 32]) for t in train for i in range(len(t) - 31)}
    expected = sum(tuple(made[i : i + 32]) in known for i in range(len(made) - 31))
    assert expected == 29
    assert found == {"window": 32, "windows": 229 + 269, "copied": 29, "share": 29 / 498, "clips": 1}
    silence = np.full(400, 128)
    assert len(m.training_windows([silence], audible)) == m.copies([silence], hashes, audible)["windows"] == 0
    assert m.copies([train[0]], hashes, audible)["share"] == 1
    assert m.copies([train[0]], hashes[:0], audible)["copied"] == 0


def test_nearest_distances_are_those_of_all_pairs():
    x, y = RNG.normal(0, 1, (300, 7)), RNG.normal(0, 1, (40, 7))
    pairs = np.sqrt(np.square(x[:, None] - y).mean(2))
    np.testing.assert_allclose(m.nearest(x, y), pairs.min(1), rtol=1e-9)
    own = np.sqrt(np.square(x[:, None] - x).mean(2)) + np.diag(np.full(300, np.inf))
    np.testing.assert_allclose(m.nearest(x, x, leave_one_out=True), own.min(1), rtol=1e-9)


def test_diversity_is_the_mean_distance_within_groups():
    x, groups = RNG.normal(0, 1, (6, 5)), np.array([0, 1, 0, 1, 0, 2])
    pairs = [(0, 2), (0, 4), (2, 4), (1, 3)]
    expected = np.mean([np.sqrt(np.square(x[i] - x[j]).mean()) for i, j in pairs])
    assert m.diversity(x, groups) == pytest.approx(expected)
    assert math.isnan(m.diversity(x[:2], np.array([0, 1])))


def test_silence_clipping_and_durations_are_measured():
    loud = np.full(160, 0.5, np.float32)
    wave = np.concatenate([loud, np.zeros(160, np.float32), loud, np.full(160, 1.0, np.float32)])
    found = m.levels([wave, loud], 8000)
    assert found["silent"] == pytest.approx(1 / 5)
    assert found["clipped"] == pytest.approx(160 / 800)
    assert found["seconds"]["q50"] == pytest.approx(0.05)
