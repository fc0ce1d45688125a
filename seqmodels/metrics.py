"""Metrics of a classifier, of several labels, or of a regression, with bootstrap intervals.

The intervals resample the windows (or records) with replacement: here every resample is a row of counts per window, so
that all resamples of a metric are a few matrix products. The metrics themselves are a resample of each window once.

Of probabilities: brier is the mean squared error, summed over the classes if they are more than two; log_loss the mean
of -ln p(true class); ece the expected calibration error (Guo et al., 2017): the mean distance between confidence and
accuracy in `BINS` bins of the confidence, which is the probability of the class that is predicted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqmodels.config import Targets
from seqmodels.display import aligned

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Measured = dict[str, Floats]  # a metric's values (resamples,), nan where it is not defined
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "auprc", "brier", "log_loss", "ece")
MULTI_METRICS = ("accuracy", "f1", "mcc", "auroc", "auprc", "brier", "log_loss", "ece")
VALUE_METRICS = ("pearson", "spearman", "r2", "rmse", "mae")
BINS = 15


def evaluate_any(
    kind: Targets, targets: NDArray, scores: Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """evaluate_scores, evaluate_labels or evaluate_values."""
    if kind == "single":
        return evaluate_scores(targets, scores, resamples=resamples, seed=seed)
    evaluate = evaluate_labels if kind == "multi" else evaluate_values
    return evaluate(targets.astype(np.float64), scores, resamples=resamples, seed=seed)


def evaluate_scores(
    targets: NDArray[np.int64], scores: Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Metrics of probabilities (n, classes) against class ids (n,).

    Gives `metrics` ({name: {value, low, high}}, percentile intervals of 95 %), `per_class` (a list of such, each class
    against the rest, with its n in `targets`) and `confusion` (rows: true classes). Macro averages go over the classes
    that occur in `targets`; a metric that is not defined is None.
    """
    classes, predicted = scores.shape[1], scores.argmax(1)
    true, said = (np.eye(classes, dtype=bool)[ids] for ids in (targets, predicted))
    present = np.unique(targets)
    own = scores[np.arange(len(targets)), targets]
    squares = np.square(scores - true).sum(1) / (2 if classes == 2 else 1)
    cells = np.eye(classes * classes)[targets * classes + predicted]

    def measure(weights: Floats) -> tuple[Measured, list[Measured]]:
        each = [_binary_metrics(true[:, k], said[:, k], scores[:, k], weights) for k in range(classes)]
        macro = {name: _mean([each[k][name] for k in present]) for name in ("recall", "f1", "auroc", "auprc")}
        total = weights.sum(1)
        return {
            "accuracy": weights @ (predicted == targets) / total,
            "balanced_accuracy": macro["recall"],
            "macro_f1": macro["f1"],
            "mcc": mcc_of((weights @ cells).reshape(-1, classes, classes)),
            "auroc": macro["auroc"],
            "auprc": macro["auprc"],
            "brier": weights @ squares / total,
            "log_loss": weights @ _surprise(own) / total,
            "ece": _calibration_error(predicted == targets, scores.max(1), weights),
        }, each

    found = _bootstrapped(len(targets), true.sum(0), measure, resamples, seed)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (targets, predicted), 1)
    return found | {"confusion": confusion.tolist()}


def evaluate_labels(targets: Floats, scores: Floats, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Metrics of probabilities (n, labels) that each label is there, against 0 or 1 (n, labels), NaN for not known.

    `metrics` are means over the labels for which they are defined, where a label is said to be there from 0.5 on;
    `per_class` has those of each label, with how often it is there as n.
    """

    def measure(targets: Floats, scores: Floats, weights: Floats) -> Measured:
        return _binary_metrics(targets > 0.5, scores >= 0.5, scores, weights)

    counts = (targets > 0.5).sum(0)
    return _evaluate_columns(MULTI_METRICS, measure, targets, scores, counts, resamples, seed)


def evaluate_values(targets: Floats, scores: Floats, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Metrics of predicted numbers (n, labels) against the true ones, NaN for not known, as evaluate_labels.

    rmse and mae (root of the mean square, and mean size of the errors) have the unit of the numbers; n of `per_class`
    is how many are known.
    """
    counts = (~np.isnan(targets)).sum(0)
    return _evaluate_columns(VALUE_METRICS, _value_metrics, targets, scores, counts, resamples, seed)


def as_tables(result: dict[str, Any], classes: Sequence[str]) -> str:
    """A result as text: a line per metric, a line per class, and the confusion matrix if there is one."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = []
    for name, values in result["metrics"].items():
        interval = f"{number(values['low'])} to {number(values['high'])}" if "low" in values else ""
        rows.append({"metric": name, "value": number(values["value"]), "95 % interval": interval})
    heading = "class" if "confusion" in result else "label"
    each = [
        {heading: name, **{k: v if k == "n" else number(v["value"]) for k, v in own.items()}}
        for name, own in zip(classes, result["per_class"], strict=True)
    ]
    tables = [rows, each]
    if "confusion" in result:
        counts = zip(classes, result["confusion"], strict=True)
        tables.append([
            {"true \\ predicted": name, **dict(zip(classes, counted, strict=True))} for name, counted in counts
        ])  # fmt: skip
    return "\n".join(aligned(table, [*table[0]]) for table in tables)


def _evaluate_columns(
    names: tuple[str, ...], measure: Any, targets: Floats, scores: Floats, counts: NDArray, resamples: int, seed: int
) -> dict[str, Any]:
    known = ~np.isnan(targets)

    def measured(weights: Floats) -> tuple[Measured, list[Measured]]:
        each = [measure(targets[k, j], scores[k, j], weights[:, k]) for j, k in enumerate(known.T)]
        return {name: _mean([one[name] for one in each]) for name in names}, each

    return _bootstrapped(len(targets), counts, measured, resamples, seed)


def _bootstrapped(
    n: int, counts: NDArray, measure: Callable[[Floats], tuple[Measured, list[Measured]]], resamples: int, seed: int
) -> dict[str, Any]:
    """`n`, `metrics` and `per_class` of what `measure` says of weights (resamples, n): overall, and of each class.

    counts (classes,) are what `per_class` tells as n.
    """
    rng = np.random.default_rng(seed)
    parts = []
    size = max(1, 4_000_000 // n)  # resamples at a time: bounds the memory
    for start in range(0, resamples, size):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(size, resamples - start)).astype(np.float64)
        parts.append(measure(weights))

    def told(point: Measured, drawn: list[Measured]) -> dict[str, Any]:
        values = {name: {"value": float(v[0]) if np.isfinite(v[0]) else None} for name, v in point.items()}
        if drawn:
            for name, value in values.items():
                value |= _interval(np.concatenate([part[name] for part in drawn]))
        return values

    overall, each = measure(np.ones((1, n)))
    per_class = [{"n": int(counts[k]), **told(one, [part[k] for _, part in parts])} for k, one in enumerate(each)]
    return {"n": n, "metrics": told(overall, [part for part, _ in parts]), "per_class": per_class}


def _interval(values: Floats) -> dict[str, float | None]:
    """Percentile interval of 95 % of the values that are defined."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2.5, 97.5)).tolist() if len(values) else (None, None)
    return {"low": low, "high": high}


def _binary_metrics(true: Bools, said: Bools, p: Floats, weights: Floats) -> Measured:
    """Metrics of one label (n,): whether it is there, is said to be, and its probability; weights (resamples, n)."""
    cells = np.stack([true & said, ~true & said, true & ~said, ~true & ~said], 1).astype(float)
    tp, fp, fn, tn = (weights @ cells).T
    total = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        found = {
            "accuracy": (tp + tn) / total,
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "f1": np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
            # what always says the same has 0 by convention
            "mcc": np.where((tp + fn > 0) & (tn + fp > 0) & ~np.isfinite(mcc), 0.0, mcc),
        }
        found["auroc"], found["auprc"] = _weighted_curves(true, p, weights)
        found["brier"] = weights @ np.square(p - true) / total
        found["log_loss"] = weights @ _surprise(np.where(true, p, 1 - p)) / total
        return found | {"ece": _calibration_error(true, p, weights)}


def _surprise(p: Floats) -> Floats:
    """-ln p, of a probability of 0 that of the smallest step from 1, as scikit-learn has it."""
    return -np.log(np.clip(p, np.finfo(np.float64).eps, 1))


def _calibration_error(hit: Bools, p: Floats, weights: Floats) -> Floats:
    """Expected calibration error (resamples,) of probabilities (n,) of what is so (n,), weights (resamples, n)."""
    gaps = np.zeros((len(p), BINS))
    gaps[np.arange(len(p)), np.minimum((p * BINS).astype(int), BINS - 1)] = p - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(weights @ gaps).sum(1) / weights.sum(1)


def _value_metrics(targets: Floats, scores: Floats, weights: Floats) -> Measured:
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
            "mae": weights @ np.abs(targets - scores) / n,
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


def _mean(values: list[Floats]) -> Floats:
    """Mean over the first axis of what is defined; nan where nothing is."""
    stacked = np.stack(values)
    finite = np.isfinite(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, stacked, 0).sum(0) / finite.sum(0)


def mcc_of(confusion: Floats) -> Floats:
    """Matthews' correlation (resamples,) of confusion matrices (resamples, true, predicted)."""
    true, guessed, n = confusion.sum(2), confusion.sum(1), confusion.sum((1, 2))
    right = np.einsum("rkk->r", confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = n * right - (true * guessed).sum(1)
        mcc = covariance / np.sqrt((n**2 - (true**2).sum(1)) * (n**2 - (guessed**2).sum(1)))
        return np.where((n**2 > (true**2).sum(1)) & ~np.isfinite(mcc), 0.0, mcc)  # one predicted class: 0 by convention


def _weighted_curves(positive: Bools, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Areas (resamples,) under the ROC curve and average precisions, with weights (resamples, n) of the samples."""
    if not len(scores):
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
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
