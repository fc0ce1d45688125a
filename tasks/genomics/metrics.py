"""Metrics of a classifier with bootstrap intervals.

Points come from scikit-learn. The intervals resample the windows (or records) with replacement: here every resample is
a row of counts per window, so that all resamples of a metric are a few matrix products.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

Floats = NDArray[np.float64]
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "auprc")


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
            values = intervals[name][np.isfinite(intervals[name])]
            low, high = np.percentile(values, (2.5, 97.5)).tolist() if len(values) else (None, None)
            results[name] |= {"low": low, "high": high}
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
