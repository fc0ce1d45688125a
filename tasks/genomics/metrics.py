"""Metrics of a classifier, of several labels, or of a regression, with bootstrap intervals.

Points come from scikit-learn. The intervals resample the windows (or records) with replacement: here every resample is
a row of counts per window, so that all resamples of a metric are a few matrix products.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from seqmodels.config import Targets

Floats = NDArray[np.float64]
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "auprc")
MULTI_METRICS = ("accuracy", "f1", "mcc", "auroc", "auprc")
VALUE_METRICS = ("pearson", "spearman", "r2", "rmse")


def evaluate_any(
    kind: Targets, targets: NDArray, scores: Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """evaluate_scores, evaluate_labels or evaluate_values."""
    if kind == "single":
        return evaluate_scores(targets, scores, resamples=resamples, seed=seed)
    evaluate = evaluate_labels if kind == "multi" else evaluate_values
    return evaluate(targets.astype(np.float64), scores, resamples=resamples, seed=seed)


def evaluate_labels(targets: Floats, scores: Floats, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Metrics of probabilities (n, labels) that each label is there, against 0 or 1 (n, labels), NaN for not known.

    `metrics` are means over the labels for which they are defined, with intervals, where a label is said to be there
    from 0.5 on; `labels` has those of each label.
    """
    return _evaluate_columns(MULTI_METRICS, _binary_metrics, targets, scores, resamples, seed)


def evaluate_values(targets: Floats, scores: Floats, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Metrics of predicted numbers (n, labels) against the true ones, NaN for not known, as evaluate_labels."""
    return _evaluate_columns(VALUE_METRICS, _value_metrics, targets, scores, resamples, seed)


def _evaluate_columns(
    names: tuple[str, ...], measure: Any, targets: Floats, scores: Floats, resamples: int, seed: int
) -> dict[str, Any]:
    n = len(targets)
    known = ~np.isnan(targets)
    rng = np.random.default_rng(seed)
    points = [measure(targets[k, j], scores[k, j], np.ones((1, k.sum()))) for j, k in enumerate(known.T)]
    parts = []
    size = max(1, 4_000_000 // n)  # resamples at a time: bounds the memory
    for start in range(0, resamples, size):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(size, resamples - start)).astype(np.float64)
        columns = [measure(targets[k, j], scores[k, j], weights[:, k]) for j, k in enumerate(known.T)]
        parts.append({name: _mean([column[name] for column in columns]) for name in names})
    metrics = {}
    for name in names:
        metrics[name] = {"value": _defined(_mean([column[name] for column in points])[0])}
        if resamples:
            metrics[name] |= _interval(np.concatenate([part[name] for part in parts]))
    each = [{name: _defined(column[name][0]) for name in names} for column in points]
    return {"n": n, "metrics": metrics, "labels": each}


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(values: Floats) -> dict[str, float | None]:
    """Percentile interval of 95 % of the values that are defined."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2.5, 97.5)).tolist() if len(values) else (None, None)
    return {"low": low, "high": high}


def _binary_metrics(targets: Floats, scores: Floats, weights: Floats) -> dict[str, Floats]:
    """Metrics (resamples,) of one label, with weights (resamples, n) of the samples."""
    true, said = targets > 0.5, scores >= 0.5
    tp, fp, fn, tn = (weights @ one.astype(float) for one in (true & said, ~true & said, true & ~said, ~true & ~said))
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        mcc = np.where((tp + fn > 0) & (tn + fp > 0) & ~np.isfinite(mcc), 0.0, mcc)  # one said: 0 by convention
        f1 = np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
        accuracy = (tp + tn) / weights.sum(1)
    roc, average = _weighted_curves(true, scores, weights) if len(true) else (np.full(len(weights), np.nan),) * 2
    return {"accuracy": accuracy, "f1": f1, "mcc": mcc, "auroc": roc, "auprc": average}


def _value_metrics(targets: Floats, scores: Floats, weights: Floats) -> dict[str, Floats]:
    """Metrics (resamples,) of one predicted number, with weights (resamples, n) of the samples."""
    n = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        residual = weights @ np.square(targets - scores)
        mean = weights @ targets / n
        total = (weights * np.square(targets - mean[:, None])).sum(1)
        ranks = [_weighted_ranks(values, weights) for values in (targets, scores)]
        return {
            "pearson": _correlation(targets[None], scores[None], weights),
            "spearman": _correlation(*ranks, weights),
            "r2": np.where(total > 0, 1 - residual / total, np.nan),
            "rmse": np.sqrt(residual / n),
        }


def _correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Pearson's correlation (resamples,) of x and y (resamples or 1, n); nan where one of them is constant."""
    n = weights.sum(1, keepdims=True)
    floors = [1e-28 * n[:, 0] * np.square(v).max(initial=0) for v in (x, y)]  # rounding of a constant
    x, y = (v - (weights * v).sum(1, keepdims=True) / n for v in (x, y))
    xx, yy, xy = ((weights * v).sum(1) for v in (x * x, y * y, x * y))
    return np.where((xx > floors[0]) & (yy > floors[1]), xy / np.sqrt(xx * yy), np.nan)


def _weighted_ranks(values: Floats, weights: Floats) -> Floats:
    """Mean ranks (resamples, n) of values (n,) of which each stands there `weights` times, scaled to at most 1."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True)) if len(values) else order
    below = np.cumsum(weights[:, order], axis=1)[:, ends]
    before = np.pad(below, ((0, 0), (1, 0)))[:, :-1]
    group = np.zeros(len(values), dtype=np.int64)
    group[order] = np.searchsorted(ends, np.arange(len(values)))
    return ((before + below + 1) / 2 / weights.sum(1, keepdims=True))[:, group]


def evaluate_scores(
    targets: NDArray[np.int64], scores: Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Metrics of scores (n, classes), larger is more likely, against class ids (n,).

    Gives `metrics` ({name: {value, low, high}}, percentile intervals of 95 %) and `confusion` (rows: true classes).
    Macro averages go over the classes that occur in `targets`; a metric that is not defined is None.
    """
    predicted = scores.argmax(1)
    classes = np.arange(scores.shape[1])
    points = _points(targets, predicted, scores)
    intervals = _bootstrap(targets, predicted, scores, resamples, seed) if resamples else {}
    results = {}
    for name in METRICS:
        results[name] = {"value": points[name]}
        if resamples:
            results[name] |= _interval(intervals[name])
    confusion = sk.confusion_matrix(targets, predicted, labels=classes).tolist()
    return {"n": len(targets), "metrics": results, "confusion": confusion}


def _points(targets: NDArray[np.int64], predicted: NDArray[np.int64], scores: Floats) -> dict[str, float | None]:
    present = np.unique(targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        points: dict[str, float | None] = {
            "accuracy": float(sk.accuracy_score(targets, predicted)),
            "balanced_accuracy": float(sk.balanced_accuracy_score(targets, predicted)),
            "macro_f1": float(sk.f1_score(targets, predicted, labels=present, average="macro")),
            "mcc": float(sk.matthews_corrcoef(targets, predicted)) if len(present) > 1 else None,
        }
    for name, metric in (("auroc", sk.roc_auc_score), ("auprc", sk.average_precision_score)):
        points[name] = None
        if len(present) > 1:
            points[name] = float(np.mean([metric(targets == label, scores[:, label]) for label in present]))
    return points


def _bootstrap(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], scores: Floats, resamples: int, seed: int
) -> dict[str, Floats]:
    """Values (resamples,) of each metric; nan where a resample leaves it undefined."""
    n, n_classes = scores.shape
    rng = np.random.default_rng(seed)
    parts = []
    size = max(1, 4_000_000 // n)  # resamples at a time: bounds the memory
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)
        one_hot = np.zeros((n, n_classes * n_classes))
        one_hot[np.arange(n), targets * n_classes + predicted] = 1
        part = _from_confusion((weights @ one_hot).reshape(count, n_classes, n_classes), np.unique(targets))
        curves = [_weighted_curves(targets == k, scores[:, k], weights) for k in np.unique(targets)]
        part["auroc"] = _mean([roc for roc, _ in curves])
        part["auprc"] = _mean([precision for _, precision in curves])
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def _mean(values: list[Floats]) -> Floats:
    """Mean over the first axis of what is defined; nan where nothing is."""
    stacked = np.stack(values)
    finite = np.isfinite(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, stacked, 0).sum(0) / finite.sum(0)


def _from_confusion(confusion: Floats, present: NDArray[np.int64]) -> dict[str, Floats]:
    """Metrics of confusion matrices (resamples, true, predicted), averaged over the `present` classes."""
    true, guessed = confusion.sum(2), confusion.sum(1)
    hits = np.einsum("rkk->rk", confusion)
    n = true.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / true
        f1 = np.where(true + guessed > 0, 2 * hits / (true + guessed), np.nan)
        covariance = n * hits.sum(1) - (true * guessed).sum(1)
        mcc = covariance / np.sqrt((n**2 - (true**2).sum(1)) * (n**2 - (guessed**2).sum(1)))
        mcc = np.where((n**2 > (true**2).sum(1)) & ~np.isfinite(mcc), 0.0, mcc)  # one predicted class: 0 by convention
    return {
        "accuracy": hits.sum(1) / n,
        "balanced_accuracy": _mean(list(recall[:, present].T)),
        "macro_f1": _mean(list(f1[:, present].T)),
        "mcc": mcc,
    }


def _weighted_curves(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Areas (resamples,) under the ROC curve and average precisions, with weights (resamples, n) of the samples."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # ties count as one threshold
    weights, positive = weights[:, order], positive[order]
    true = np.cumsum(weights * positive, axis=1)[:, ends]
    false = np.cumsum(weights * ~positive, axis=1)[:, ends]
    with np.errstate(invalid="ignore", divide="ignore"):
        true_before, false_before = (np.pad(a, ((0, 0), (1, 0)))[:, :-1] for a in (true, false))
        roc = ((false - false_before) * (true + true_before) / 2).sum(1) / (true[:, -1] * false[:, -1])
        precision = np.where(true + false > 0, true / (true + false), 0)
        average = ((true - true_before) * precision).sum(1) / true[:, -1]
    return roc, np.where(np.isfinite(roc), average, np.nan)
