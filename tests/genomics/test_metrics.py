import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.tasks.genomics import metrics
from seqmodels.tasks.genomics.metrics import METRICS, evaluate_labels, evaluate_scores, evaluate_values


def sample(seed, n=60, classes=3):
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=n)
    return targets, np.round(rng.normal(size=(n, classes)) + np.eye(classes)[targets], 1)  # with ties


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


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_a_resample_has_the_metrics_that_scikit_learn_gives_it(seed):
    targets, scores = sample(seed)
    weights = np.random.default_rng(seed).multinomial(60, np.full(60, 1 / 60)).astype(float)
    chosen = np.repeat(np.arange(60), weights.astype(int))
    if len(np.unique(targets[chosen])) < 3:
        return
    predicted = scores.argmax(1)
    confusion = np.zeros((1, 3, 3))
    np.add.at(confusion[0], (targets, predicted), weights)
    found = metrics._from_confusion(confusion, np.arange(3))
    t, p = targets[chosen], predicted[chosen]
    assert found["accuracy"][0] == pytest.approx(sk.accuracy_score(t, p))
    assert found["balanced_accuracy"][0] == pytest.approx(sk.balanced_accuracy_score(t, p))
    assert found["macro_f1"][0] == pytest.approx(sk.f1_score(t, p, average="macro"))
    assert found["mcc"][0] == pytest.approx(sk.matthews_corrcoef(t, p))
    for k in range(3):
        roc, precision = metrics._weighted_curves(targets == k, scores[:, k], weights[None])
        assert roc[0] == pytest.approx(sk.roc_auc_score(t == k, scores[chosen, k]))
        assert precision[0] == pytest.approx(sk.average_precision_score(t == k, scores[chosen, k]))


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
    for name in METRICS:
        assert (
            0 < found["metrics"][name]["low"] <= found["metrics"][name]["value"] <= found["metrics"][name]["high"] < 1
        )


def test_one_class_alone_leaves_rankings_undefined():
    found = evaluate_scores(np.zeros(5, dtype=np.int64), np.eye(2)[[0, 0, 0, 1, 0]])["metrics"]
    assert found["accuracy"]["value"] == 0.8
    assert found["auroc"] == {"value": None, "low": None, "high": None}


def test_metrics_of_several_labels_and_of_numbers_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(1)
    labels = (rng.random((80, 3)) < 0.4).astype(float)
    scores = np.clip(0.3 * labels + 0.7 * rng.random(labels.shape), 0, 1).round(2)  # with ties
    labels[rng.random(labels.shape) < 0.1] = np.nan
    found = evaluate_labels(labels, scores, resamples=0)
    for k, own in enumerate(found["labels"]):
        known = ~np.isnan(labels[:, k])
        true, score = labels[known, k] > 0.5, scores[known, k]
        assert own["accuracy"] == pytest.approx(sk.accuracy_score(true, score >= 0.5))
        assert own["f1"] == pytest.approx(sk.f1_score(true, score >= 0.5))
        assert own["mcc"] == pytest.approx(sk.matthews_corrcoef(true, score >= 0.5))
        assert own["auroc"] == pytest.approx(sk.roc_auc_score(true, score))
        assert own["auprc"] == pytest.approx(sk.average_precision_score(true, score))
    assert found["metrics"]["mcc"]["value"] == pytest.approx(np.mean([own["mcc"] for own in found["labels"]]))
    values = rng.normal(size=(80, 2)) * (1, 100)
    said = (values + rng.normal(size=(80, 2)) * (1, 50)).round(1)
    values[:5, 1] = np.nan
    found = evaluate_values(values, said, resamples=0)
    for k, own in enumerate(found["labels"]):
        known = ~np.isnan(values[:, k])
        true, guess = values[known, k], said[known, k]
        assert own["pearson"] == pytest.approx(scipy.stats.pearsonr(true, guess)[0])
        assert own["spearman"] == pytest.approx(scipy.stats.spearmanr(true, guess)[0])
        assert own["r2"] == pytest.approx(sk.r2_score(true, guess))
        assert own["rmse"] == pytest.approx(sk.root_mean_squared_error(true, guess))


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
    found = evaluate_labels(labels, said, resamples=200)["metrics"]
    low, high = np.percentile([sk.f1_score(labels[p, 0], said[p, 0] >= 0.5) for p in places], (2.5, 97.5))
    assert found["f1"]["low"] == pytest.approx(low, abs=0.06)
    assert found["f1"]["high"] == pytest.approx(high, abs=0.06)
    alone = evaluate_values(np.ones((5, 1)), np.ones((5, 1)), resamples=5)["metrics"]
    assert alone["pearson"] == {"value": None, "low": None, "high": None}
