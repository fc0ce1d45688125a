"""The generators against plain readings of the papers: who reads a sequence by its rule answers everything."""

import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.heads import IGNORED
from seqmodels.tasks.synthetic.generators import associative_recall, distinct, induction_heads, selective_copying


def answers_of_copying(ids, memorise, vocabulary):
    """Letters are what is not noise (0); the markers at the end ask for them in order."""
    read, asked = ids[:-memorise], ids[-memorise:]
    assert set(asked) == {vocabulary - 1}
    assert vocabulary - 1 not in read
    return [IGNORED] * len(read) + [token for token in read if token != 0]


def answers_of_induction(ids, vocabulary):
    """The last token has stood once before; what followed it there is the answer."""
    before, trigger = ids[:-1], ids[-1]
    assert trigger == vocabulary - 1
    assert before.count(trigger) == 1
    return [IGNORED] * len(before) + [ids[before.index(trigger) + 1]]


def answers_of_recall(ids, pairs, asked):
    """Pairs of key and value, then each key once more at a place that asks."""
    values = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
    assert len(values) == len(set(values.values())) == pairs
    assert sorted(ids[place] for place in asked) == sorted(values)
    return [values[token] if place in asked else IGNORED for place, token in enumerate(ids)]


@pytest.mark.parametrize(("length", "memorise", "vocabulary"), [(4096, 16, 16), (20, 20, 3), (50, 7, 9)])
def test_every_letter_of_selective_copying_is_asked_for_in_order(length, memorise, vocabulary):
    rng = np.random.default_rng(0)
    ids, targets = selective_copying(rng, 16, length=length, memorise=memorise, vocabulary=vocabulary)
    assert ids.shape == targets.shape == (16, length + memorise)
    for row, expected in zip(ids.tolist(), targets.tolist(), strict=True):
        assert answers_of_copying(row, memorise, vocabulary) == expected


@pytest.mark.parametrize(("length", "vocabulary"), [(256, 16), (3, 2), (1000, 5)])
def test_the_answer_of_induction_heads_followed_the_trigger(length, vocabulary):
    ids, targets = induction_heads(np.random.default_rng(0), 32, length=length, vocabulary=vocabulary)
    assert ids.shape == targets.shape == (32, length)
    for row, expected in zip(ids.tolist(), targets.tolist(), strict=True):
        assert answers_of_induction(row, vocabulary) == expected


@pytest.mark.parametrize("filler", [True, False])
@pytest.mark.parametrize(
    ("length", "pairs", "vocabulary"), [(256, 64, 8192), (256, 8, 8192), (64, 16, 40), (16, 2, 12)]
)
def test_every_key_of_associative_recall_is_asked_for_once(length, pairs, vocabulary, filler):
    rng = np.random.default_rng(0)
    sizes = {"length": length, "pairs": pairs, "vocabulary": vocabulary}
    ids, targets = associative_recall(rng, 16, **sizes, filler=filler)
    assert ids.shape == targets.shape == (16, length)
    for row, expected in zip(ids.tolist(), targets.tolist(), strict=True):
        asked = {place for place, target in enumerate(expected) if target != IGNORED}
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert answers_of_recall(row, pairs, asked) == expected
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in zip(keys, values, strict=True))
        others = [token for place, token in enumerate(row) if place >= 2 * pairs and place not in asked]
        assert filler or not any(others)


def test_queries_stand_where_successive_draws_by_the_power_law_put_them():
    length, pairs, power, rows = 16, 2, 0.01, 20_000
    rng = np.random.default_rng(0)
    _, targets = associative_recall(rng, rows, length=length, pairs=pairs, vocabulary=12, power=power)
    places = (length - 2 * pairs) // 2
    p = np.arange(1, places + 1) ** (power - 1.0)
    p /= p.sum()
    after = [p[i] * p / (1 - p[i]) * (np.arange(places) != i) for i in range(places)]  # i first, then another one
    expected = p + sum(after)
    found = (targets != IGNORED)[:, 2 * pairs :: 2].mean(0)
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / rows)


@pytest.mark.parametrize(("count", "below"), [(2, 5), (3, 4)])  # by drawing again, and by shuffling
def test_distinct_numbers_are_uniform_over_all_orders(count, below):
    rows = 20_000
    drawn = distinct(np.random.default_rng(0), rows, count, below)
    kinds, found = np.unique(drawn, axis=0, return_counts=True)
    number = np.prod([below - i for i in range(count)])
    assert len(kinds) == number  # all there are, so that none has a number twice
    assert np.abs(found / rows - 1 / number).max() < 5 * np.sqrt(1 / number / rows)


@pytest.mark.parametrize(
    ("generate", "sizes", "said"),
    [
        (selective_copying, {"length": 4, "memorise": 5}, "give a longer length"),
        (selective_copying, {"vocabulary": 2}, "larger vocabulary"),
        (induction_heads, {"length": 2}, "give at least 3"),
        (associative_recall, {"length": 64, "pairs": 17}, "give fewer pairs"),
        (associative_recall, {"length": 64, "pairs": 8, "vocabulary": 16}, "larger vocabulary"),
    ],
)
def test_sizes_that_cannot_be_are_refused(generate, sizes, said):
    with pytest.raises(InputError, match=said):
        generate(np.random.default_rng(0), 1, **sizes)
