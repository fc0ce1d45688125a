import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from seqmodels import metrics
from seqmodels.metrics import METRICS, evaluate_labels, evaluate_scores, evaluate_values


def sample(seed, n=60, classes=3):
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=n)
    powers = np.exp(np.round(rng.normal(size=(n, 1)) * [1, *[0] * (classes - 1)] + 2 * np.eye(classes)[targets], 1))
    powers *= np.exp(rng.integers(3, size=(n, classes)))  # with ties
    return targets, powers / powers.sum(1, keepdims=True)


def test_metrics_of_a_table_counted_by_hand():
    targets = np.array([0, 0, 0, 1])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    found = evaluate_scores(targets, scores, resamples=0)
    values = {name: found["metrics"][name]["value"] for name in METRICS}
    assert found["confusion"] == [[2, 1], [0, 1]]
    assert values["accuracy"] == 3 / 4
    assert values["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert values["mcc"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(2 * 2 * 3 * 1))
    assert values["auroc"] == pytest.approx(2 / 3)  # one of three negatives is ranked above the positive


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_a_resample_has_the_metrics_that_scikit_learn_gives_it(seed):
    targets, scores = sample(seed)
    weights = np.random.default_rng(seed).multinomial(60, np.full(60, 1 / 60)).astype(float)
    chosen = np.repeat(np.arange(60), weights.astype(int))
    if len(np.unique(targets[chosen])) < 3:
        return
    found = {}

    def kept(n, counts, measure, resamples, seed):
        found["overall"], found["each"] = measure(weights[None])
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_bootstrapped", kept)
        evaluate_scores(targets, scores)
    t, p, scores = targets[chosen], scores.argmax(1)[chosen], scores[chosen]
    overall = found["overall"]
    assert overall["accuracy"][0] == pytest.approx(sk.accuracy_score(t, p))
    assert overall["balanced_accuracy"][0] == pytest.approx(sk.balanced_accuracy_score(t, p))
    assert overall["macro_f1"][0] == pytest.approx(sk.f1_score(t, p, average="macro"))
    assert overall["mcc"][0] == pytest.approx(sk.matthews_corrcoef(t, p))
    assert overall["auroc"][0] == pytest.approx(sk.roc_auc_score(t, scores, multi_class="ovr"))
    assert overall["log_loss"][0] == pytest.approx(sk.log_loss(t, scores))
    assert overall["brier"][0] == pytest.approx(np.mean(np.square(scores - np.eye(3)[t]).sum(1)))
    bins = MulticlassCalibrationError(3, n_bins=metrics.BINS)(torch.from_numpy(scores), torch.from_numpy(t))
    assert overall["ece"][0] == pytest.approx(float(bins))
    for k, own in enumerate(found["each"]):
        true, said, score = t == k, p == k, scores[:, k]
        assert own["accuracy"][0] == pytest.approx(sk.accuracy_score(true, said))
        assert own["precision"][0] == pytest.approx(sk.precision_score(true, said, zero_division=np.nan), nan_ok=True)
        assert own["recall"][0] == pytest.approx(sk.recall_score(true, said))
        assert own["f1"][0] == pytest.approx(sk.f1_score(true, said))
        assert own["mcc"][0] == pytest.approx(sk.matthews_corrcoef(true, said))
        assert own["auroc"][0] == pytest.approx(sk.roc_auc_score(true, score))
        assert own["auprc"][0] == pytest.approx(sk.average_precision_score(true, score))
        assert own["brier"][0] == pytest.approx(sk.brier_score_loss(true, score))
        assert own["log_loss"][0] == pytest.approx(sk.log_loss(true, score))
        bins = BinaryCalibrationError(n_bins=metrics.BINS)(torch.from_numpy(score), torch.from_numpy(true).long())
        assert own["ece"][0] == pytest.approx(float(bins))


def test_two_classes_have_the_squared_error_of_one_of_them():
    targets, scores = sample(5, classes=2)
    found = evaluate_scores(targets, scores, resamples=0)
    expected = pytest.approx(sk.brier_score_loss(targets, scores[:, 1]))
    assert [found["metrics"]["brier"]["value"]] + [own["brier"]["value"] for own in found["per_class"]] == [
        expected
    ] * 3
    assert [own["n"] for own in found["per_class"]] == np.bincount(targets).tolist()


def test_a_certain_mistake_costs_as_much_as_the_smallest_probability():
    found = evaluate_scores(np.array([0, 1]), np.eye(2)[[0, 0]], resamples=0)["metrics"]
    assert found["log_loss"]["value"] == pytest.approx(sk.log_loss([0, 1], np.eye(2)[[0, 0]]))
    assert found["ece"]["value"] == 0.5


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    rng = np.random.default_rng(0)
    right = rng.random(2000) < 0.8
    targets = rng.integers(2, size=2000)
    found = evaluate_scores(targets, np.eye(2)[np.where(right, targets, 1 - targets)])["metrics"]["accuracy"]
    half = 1.96 * np.sqrt(0.16 / 2000)
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.003)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.003)


def test_the_seed_decides_the_intervals():
    targets, scores = sample(1)
    assert evaluate_scores(targets, scores, seed=3) == evaluate_scores(targets, scores, seed=3)
    assert evaluate_scores(targets, scores, seed=3) != evaluate_scores(targets, scores, seed=4)


def test_classes_that_do_not_occur_are_left_out_of_the_averages():
    targets, scores = sample(2, classes=4)
    keep = targets < 3
    found = evaluate_scores(targets[keep], scores[keep])
    assert len(found["confusion"]) == 4
    values = [found["metrics"][name] for name in METRICS if name != "ece"]  # a resample's bins are emptier: larger
    values += [found["per_class"][k][name] for k in range(3) for name in ("recall", "f1", "auroc", "log_loss")]
    assert all(0 < own["low"] <= own["value"] <= own["high"] < 2 for own in values)
    assert found["per_class"][3]["n"] == 0
    assert found["per_class"][3]["auroc"] == {"value": None, "low": None, "high": None}


def test_one_class_alone_leaves_rankings_undefined():
    found = evaluate_scores(np.zeros(5, dtype=np.int64), np.eye(2)[[0, 0, 0, 1, 0]])["metrics"]
    assert found["accuracy"]["value"] == 0.8
    assert found["auroc"] == {"value": None, "low": None, "high": None}


def values_of(found):
    """The values of each class, and its n."""
    return [{k: v if k == "n" else v["value"] for k, v in own.items()} for own in found["per_class"]]


def test_metrics_of_several_labels_and_of_numbers_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(1)
    labels = (rng.random((80, 3)) < 0.4).astype(float)
    scores = np.clip(0.3 * labels + 0.7 * rng.random(labels.shape), 0, 1).round(2)  # with ties
    labels[rng.random(labels.shape) < 0.1] = np.nan
    found = evaluate_labels(labels, scores, resamples=0)
    for k, own in enumerate(values_of(found)):
        known = ~np.isnan(labels[:, k])
        true, score = labels[known, k] > 0.5, scores[known, k]
        assert own["accuracy"] == pytest.approx(sk.accuracy_score(true, score >= 0.5))
        assert own["f1"] == pytest.approx(sk.f1_score(true, score >= 0.5))
        assert own["mcc"] == pytest.approx(sk.matthews_corrcoef(true, score >= 0.5))
        assert own["auroc"] == pytest.approx(sk.roc_auc_score(true, score))
        assert own["auprc"] == pytest.approx(sk.average_precision_score(true, score))
        assert own["brier"] == pytest.approx(sk.brier_score_loss(true, score))
        assert own["log_loss"] == pytest.approx(sk.log_loss(true, score))
        assert own["n"] == true.sum()
    assert found["metrics"]["mcc"]["value"] == pytest.approx(np.mean([own["mcc"] for own in values_of(found)]))
    values = rng.normal(size=(80, 2)) * (1, 100)
    said = (values + rng.normal(size=(80, 2)) * (1, 50)).round(1)
    values[:5, 1] = np.nan
    found = evaluate_values(values, said, resamples=0)
    for k, own in enumerate(values_of(found)):
        known = ~np.isnan(values[:, k])
        true, guess = values[known, k], said[known, k]
        assert own["pearson"] == pytest.approx(scipy.stats.pearsonr(true, guess)[0])
        assert own["spearman"] == pytest.approx(scipy.stats.spearmanr(true, guess)[0])
        assert own["r2"] == pytest.approx(sk.r2_score(true, guess))
        assert own["rmse"] == pytest.approx(sk.root_mean_squared_error(true, guess))
        assert own["mae"] == pytest.approx(sk.mean_absolute_error(true, guess))
        assert own["n"] == known.sum()


def test_intervals_of_labels_and_numbers_are_those_of_resampling_rows():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(60, 1))
    said = (values + rng.normal(size=(60, 1))).round(1)
    found = evaluate_values(values, said, resamples=200)["metrics"]
    places = rng.integers(60, size=(200, 60))
    for name, metric in (("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)):
        low, high = np.percentile([metric(values[p, 0], said[p, 0])[0] for p in places], (2.5, 97.5))
        assert found[name]["low"] == pytest.approx(low, abs=0.06)
        assert found[name]["high"] == pytest.approx(high, abs=0.06)
    labels = (values > 0).astype(float)
    found = evaluate_labels(labels, 1 / (1 + np.exp(0.5 - said)), resamples=200)["metrics"]
    low, high = np.percentile([sk.f1_score(labels[p, 0], said[p, 0] >= 0.5) for p in places], (2.5, 97.5))
    assert found["f1"]["low"] == pytest.approx(low, abs=0.06)
    assert found["f1"]["high"] == pytest.approx(high, abs=0.06)
    alone = evaluate_values(np.ones((5, 1)), np.ones((5, 1)), resamples=5)["metrics"]
    assert alone["pearson"] == {"value": None, "low": None, "high": None}
