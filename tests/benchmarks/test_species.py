"""What counting makes of species, against its definition."""

import math
from collections import Counter

import numpy as np
import pytest

from seqmodels.tasks.genomics.tokens import encode


def random_sequence(seed, length):
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def words(sequence, k):
    return [sequence[i : i + k] for i in range(len(sequence) - k + 1)]


def both_strands(sequences, k):
    other = str.maketrans("ACGT", "TGCA")
    return Counter(
        word for own in sequences for strand in (own, own.translate(other)[::-1]) for word in words(strand, k)
    )


CLASSES = [[random_sequence(0, 5000)], [random_sequence(1, 3000), random_sequence(2, 2000)]]
WINDOW = CLASSES[1][0][100:400] + CLASSES[0][0][700:900]


def tokens(sequence):
    return np.asarray(encode(sequence.encode()))


def test_a_chain_is_the_product_of_its_add_one_chances():
    from species import ORDER, chains

    scores = chains([[tokens(sequence) for sequence in own] for own in CLASSES])(tokens(WINDOW))
    nats = []
    for own in CLASSES:
        counts = both_strands(own, ORDER + 1)
        after = Counter()
        for word, count in counts.items():
            after[word[:-1]] += count
        nats.append(sum(math.log((counts[w] + 1) / (after[w[:-1]] + 4)) for w in words(WINDOW, ORDER + 1)))
    assert scores.argmax() == int(np.argmax(nats))
    assert math.log(scores[1] / scores[0]) == pytest.approx(nats[1] - nats[0], rel=1e-6)


@pytest.mark.parametrize("k", [12, 14])
def test_a_vote_is_the_share_of_words_that_a_class_holds_on_either_strand(k):
    from species import votes

    scores = votes([[tokens(sequence) for sequence in own] for own in CLASSES], k)(tokens(WINDOW))
    held = [both_strands(own, k) for own in CLASSES]
    shares = np.array([sum(word in own for word in words(WINDOW, k)) for own in held])
    assert shares.min() > 0
    np.testing.assert_allclose(scores, shares / shares.sum(), rtol=1e-6)
