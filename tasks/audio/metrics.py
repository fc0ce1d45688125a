"""How good generated recordings are: the SC09 scores, controls, copies, distances, durations and intervals.

Scores of the class probabilities p (n, classes) and features that a classifier gives to clips, as published with
SaShiMi for SC09 (Goel et al., 2022, appendix C.3), random draws included, so that the same probabilities give the same
figures: FID (Heusel et al., 2017), IS (Salimans et al., 2016), modified IS (Gurumurthy et al., 2017) and AM (Zhou et
al., 2018). They depend on the classifier: figures of different classifiers cannot be compared.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
WINDOW = 32  # tokens of a window that counts as a verbatim copy
AUDIBLE = 0.01  # of full scale, or of a clip's peak: -40 dB


def frechet_distance(real: Floats, generated: Floats) -> float:
    """FID: |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of features (n, d), means m and sample covariances S."""
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (real.astype(float), generated.astype(float))]
    traces = sum(np.square(x).sum() for x in centred)
    first, second = (np.linalg.qr(x, mode="r") for x in centred)  # S1 = first.T @ first, and
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()  # tr sqrt(S1 S2) is this, exact if S is singular
    return float(np.square(real.mean(0, dtype=float) - generated.mean(0, dtype=float)).sum() + traces - 2 * cross)


def inception_score(log_p: Floats) -> float:
    """IS: exp of the mean KL divergence of one half of the clips, drawn at random, to the mean of the other half."""
    log_p = log_p[np.random.RandomState(0).permutation(len(log_p))]
    first, second = log_p[: len(log_p) // 2], log_p[len(log_p) // 2 :]
    return float(np.exp(_divergence(first, np.log(np.exp(second).mean(0))).mean()))


def modified_inception_score(log_p: Floats, pairs: int = 10000) -> float:
    """mIS: exp of the mean KL divergence between the clips of random pairs: high if sure and diverse."""
    i, j = np.random.RandomState(0).randint(0, len(log_p), size=(pairs, 2)).T
    return float(np.exp(_divergence(log_p[i], log_p[j]).mean()))


def am_score(real_log_p: Floats, log_p: Floats) -> float:
    """AM: KL divergence of the mean over real clips to that over the clips, plus their mean entropy: low is good."""
    entropy = -(np.exp(log_p) * log_p).sum(1).mean()
    real, mean = np.log(np.exp(real_log_p).mean(0)), np.log(np.exp(log_p).mean(0))
    return float(_divergence(real, mean) + entropy)


def _divergence(log_p: Floats, log_q: Floats) -> Floats:
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return middle - half, middle + half


def accuracy(said: NDArray, truth: NDArray) -> dict[str, float | list[float]]:
    """Share of clips that are recognised, and its 95 % interval."""
    hits = int((said == truth).sum())
    return {"accuracy": hits / max(1, len(truth)), "interval_95": list(wilson_interval(hits, len(truth)))}


def confusion(said: NDArray, truth: NDArray, classes: int) -> list[list[int]]:
    """Counts: a row for each true class, a column for what was recognised."""
    return np.bincount(truth * classes + said, minlength=classes**2).reshape(classes, classes).tolist()


def phase_randomised(wave: Floats, rng: np.random.Generator) -> Floats:
    """A sound of the same length and power spectrum with random phases: timbre and duration, without words."""
    spectrum = np.fft.rfft(wave)
    turned = np.abs(spectrum) * np.exp(2j * np.pi * rng.random(len(spectrum)))
    turned[0] = spectrum[0]  # which have no phase but a sign
    if len(wave) % 2 == 0:
        turned[-1] = spectrum[-1]
    return np.fft.irfft(turned, len(wave)).astype(np.float32)


def white_noise(wave: Floats, rng: np.random.Generator) -> Floats:
    """White noise of the same length and power."""
    return rng.normal(0, np.sqrt(np.mean(np.square(wave))), len(wave)).astype(np.float32)


def windows(tokens: NDArray, audible: NDArray) -> NDArray[np.uint64]:
    """Hashes (64 bits) of all windows of tokens (l,) < 65536 that hold an audible one, one for each start."""
    if len(tokens) < WINDOW:
        return np.zeros(0, np.uint64)
    odd = np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros(len(tokens) - WINDOW + 1, np.uint64)
    for k in range(WINDOW):
        hashes = (hashes ^ tokens[k : k + len(hashes)].astype(np.uint64)) * odd
        hashes ^= hashes >> np.uint64(29)
    loud = np.convolve(audible, np.ones(WINDOW, int), "valid") > 0
    return hashes[loud]


def training_windows(train: Sequence[NDArray], audible: NDArray) -> NDArray[np.uint64]:
    """The hashes of all windows of the training clips, sorted, for `copies`."""
    return np.sort(np.concatenate([windows(tokens, audible[tokens]) for tokens in train]))


def copies(clips: Sequence[NDArray], known: NDArray[np.uint64], audible: NDArray) -> dict[str, float | int]:
    """How many windows of tokens of the clips occur, token by token, among `training_windows`.

    `audible` (levels,) says which tokens are louder than silence; windows of silence do not count.
    """
    found, total, touched = 0, 0, 0
    for tokens in clips:
        hashes = windows(tokens, audible[tokens])
        same = int((np.searchsorted(known, hashes, "right") > np.searchsorted(known, hashes)).sum())
        found, total, touched = found + same, total + len(hashes), touched + (same > 0)
    return {"window": WINDOW, "windows": total, "copied": found, "share": found / max(1, total), "clips": touched}


def nearest(clips: Floats, others: Floats, *, leave_one_out: bool = False) -> Floats:
    """Distance (n,), root mean square, from each row to the nearest of the others.

    With leave_one_out the others are the rows themselves, each without itself.
    """
    result = np.empty(len(clips))
    norms = np.square(others).sum(1)
    for start in range(0, len(clips), 256):
        part = clips[start : start + 256]
        squares = np.square(part).sum(1)[:, None] + norms - 2 * part @ others.T
        if leave_one_out:
            squares[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        result[start : start + len(part)] = squares.min(1)
    return np.sqrt(result.clip(0) / clips.shape[1])


def quantiles(values: Floats) -> dict[str, float]:
    """The 5, 50 and 95 % quantiles."""
    return dict(zip(("q05", "q50", "q95"), np.quantile(values, [0.05, 0.5, 0.95]).tolist(), strict=True))


def diversity(features: Floats, groups: NDArray) -> float:
    """Mean distance, root mean square, between two clips of the same group (n,); nan if no group has two."""
    total, pairs = 0.0, 0
    for group in np.unique(groups):
        rows = features[groups == group]
        squares = np.square(rows).sum(1)
        distances = np.sqrt((squares[:, None] + squares - 2 * rows @ rows.T).clip(0) / rows.shape[1])
        total += (distances.sum() - np.trace(distances)) / 2
        pairs += len(rows) * (len(rows) - 1) // 2
    return float(total / pairs) if pairs else math.nan


def levels(waves: Sequence[Floats], rate: int) -> dict[str, object]:
    """Durations in seconds, the share of silence (20 ms 40 dB below a clip's peak), and of samples at full scale."""
    frame = max(1, rate // 50)
    silent, total, clipped, samples = 0, 0, 0, 0
    for wave in waves:
        sizes = np.abs(wave)
        frames = sizes[: len(wave) // frame * frame].reshape(-1, frame).max(1)
        silent, total = silent + int((frames < AUDIBLE * sizes.max()).sum()), total + len(frames)
        clipped, samples = clipped + int((sizes >= 0.99).sum()), samples + len(wave)
    return {
        "seconds": quantiles(np.array([len(wave) / rate for wave in waves])),
        "silent": silent / max(1, total),
        "clipped": clipped / samples,
    }
