import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.tasks.genomics import metrics
from seqmodels.tasks.genomics.metrics import METRICS, evaluate_scores


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
