"""Sequences of the three small tasks on which Mamba and Mamba-2 were shown to remember what matters.

A generator draws `rows` sequences at a time and gives ids (rows, l) and targets (rows, l), both int64: the answer where
a step is asked for one, IGNORED everywhere else. The same state of `rng` gives the same sequences.
"""

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.heads import IGNORED

Tokens = NDArray[np.int64]
NOISE = 0


def selective_copying(
    rng: np.random.Generator, rows: int, *, length: int = 4096, memorise: int = 16, vocabulary: int = 16
) -> tuple[Tokens, Tokens]:
    """Repeat the letters, in their order, that stood at random places between noise: l = length + memorise.

        . . 3 . . . 7 . 1 . .  ? ? ?        noise 0, letters 1 ... vocabulary - 2, the marker ? vocabulary - 1
                               3 7 1        targets

    Mamba paper, sections 3.1 and 4.1.1, Table 1 and appendix E.1: sequences of 4,096, 16 tokens "including the white
    noise token", 16 letters to memorise. Noise and marker are those of the S4 programs' copying task, where the markers
    come on top of the length, too.
    """
    if vocabulary < 3 or memorise > length:
        raise InputError(
            f"{memorise} letters among {length} steps with {vocabulary} tokens: letters need a place each, and tokens "
            "besides noise and marker; give a longer length or a larger vocabulary"
        )
    places = np.sort(distinct(rng, rows, memorise, length), 1)
    letters = rng.integers(1, vocabulary - 1, (rows, memorise))
    ids = np.full((rows, length + memorise), NOISE)
    np.put_along_axis(ids, places, letters, 1)
    ids[:, length:] = vocabulary - 1
    targets = np.full_like(ids, IGNORED)
    targets[:, length:] = letters
    return ids, targets


def induction_heads(
    rng: np.random.Generator, rows: int, *, length: int = 256, vocabulary: int = 16
) -> tuple[Tokens, Tokens]:
    """Say what followed the trigger when it came before: l = length.

        5 2 T 9 4 0 2 ... 1 T       letters 0 ... vocabulary - 2, the trigger T vocabulary - 1
                            9       target

    The trigger stands at a random place and at the end; everything else is random. Mamba paper, sections 3.1 and 4.1.2,
    Table 2 and appendix E.1: vocabulary 16, trained at length 256, tested at 2^6 ... 2^20.
    """
    if length < 3 or vocabulary < 2:
        raise InputError(f"induction heads of length {length} with {vocabulary} tokens; give at least 3 and 2")
    ids = rng.integers(vocabulary - 1, size=(rows, length))
    first, row = rng.integers(length - 2, size=rows), np.arange(rows)
    ids[row, first] = ids[:, -1] = vocabulary - 1
    targets = np.full_like(ids, IGNORED)
    targets[:, -1] = ids[row, first + 1]
    return ids, targets


def associative_recall(
    rng: np.random.Generator,
    rows: int,
    *,
    length: int = 256,
    pairs: int = 64,
    vocabulary: int = 8192,
    power: float = 0.01,
    filler: bool = True,
) -> tuple[Tokens, Tokens]:
    """MQAR, multi-query associative recall: pairs of key and value, then each key again, asked for its value.

        k1 v1 k2 v2 | k2 x x x k1 x       keys 1 ... vocabulary / 2 - 1, values vocabulary / 2 ... vocabulary - 1
                      v2       v1         targets

    Keys, and values, are distinct in a sequence. Queries stand at every second place after the pairs, chosen one after
    the other without replacement with probability proportional to (place + 1)^(power - 1): near ones are likelier. x is
    a random token, or 0 without `filler`.

    Zoology (Arora et al., 2023), section 4 and its program: vocabulary 8,192, lengths 64 to 512 with 4 to 64 pairs and
    no filler. Mamba-2 paper, section 9.1, Figure 8 and appendix D.1, harder: lengths 256, 512 and 1,024 with length / 4
    pairs, filler, widths 32 to 256.
    """
    if pairs < 1 or 4 * pairs > length or pairs >= vocabulary // 2:
        raise InputError(
            f"{pairs} pairs in {length} steps with {vocabulary} tokens: a pair takes 4 steps, two of them to be asked, "
            "and a key of its own among half of the tokens; give fewer pairs, a longer length or a larger vocabulary"
        )
    keys = 1 + distinct(rng, rows, pairs, vocabulary // 2 - 1)
    values = vocabulary // 2 + distinct(rng, rows, pairs, vocabulary - vocabulary // 2)
    places = (length - 2 * pairs) // 2
    # the largest of log-probabilities with Gumbel noise, in their order, are draws without replacement
    likely = (power - 1) * np.log(np.arange(1, places + 1)) + rng.gumbel(size=(rows, places))
    asked = 2 * pairs + 2 * np.argsort(-likely, 1)[:, :pairs]
    ids = rng.integers(vocabulary, size=(rows, length)) if filler else np.zeros((rows, length), np.int64)
    ids[:, : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(ids, asked, keys, 1)
    targets = np.full_like(ids, IGNORED)
    np.put_along_axis(targets, asked, values, 1)
    return ids, targets


def distinct(rng: np.random.Generator, rows: int, count: int, below: int) -> Tokens:
    """(rows, count) of the numbers 0 ... below - 1, no two in a row equal, each such row as likely as any other.

    What repeats is drawn again: the rule treats all numbers alike, and so do its results.
    """
    if 2 * count > below:
        return rng.random((rows, below)).argsort(1)[:, :count]
    drawn, left = rng.integers(below, size=(rows, count)), np.arange(rows)
    while len(left):
        part = drawn[left]
        order = part.argsort(1, kind="stable")
        ordered = np.take_along_axis(part, order, 1)
        repeats = np.zeros_like(part, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        part[repeats] = rng.integers(below, size=repeats.sum())
        drawn[left] = part
        left = left[repeats.any(1)]
    return drawn
