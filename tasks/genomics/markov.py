"""What counting alone makes of DNA: bits per base of Markov chains, for comparison with a model that predicts bases."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from seqmodels.tasks.genomics.tokens import A, T, Tokens

NEXT, MASKED = 12, 11  # longest words: contexts of up to 11 bases to the left, or of 5 on each side
MOST = 100_000_000  # bases that are counted at most: more change little
_CHUNK = 1 << 20
_FEW = 16  # counts of a word's contexts on average below which longer words are not tried


def reference_bits(training: Sequence[Tokens], windows: NDArray[np.uint8], *, masked: bool) -> tuple[int, float]:
    """The best order k and its mean bits per base of windows (n, l), from counts in both strands of `training`.

    Each base has the probability (count + 1) / (sum of counts + 4) after the k bases to its left, or, `masked`, between
    the k bases on each side. The k is that which predicts the windows best. Windows and training are tokens.
    """
    longest = MASKED if masked else NEXT
    total = sum(map(len, training))
    part = min(1.0, MOST / max(1, total))
    cut = [stretch[: int(part * len(stretch))] for stretch in training]
    while longest > 2 and total * part < _FEW * 4 ** (longest - 2):
        longest -= 1 + masked
    counts = count_words(cut, longest)
    flat = [codes for window in windows for codes in [words_of(window, longest)] if len(codes)]
    codes = np.concatenate(flat) if flat else np.zeros(0, dtype=np.int64)
    best = (0, 2.0)
    for k in range(longest // 2 + 1 if masked else longest):
        if masked:
            side = longest // 2 - k
            table = counts.reshape(4**side, 4**k, 4, 4**k, 4**side).sum((0, 4)).swapaxes(1, 2).reshape(-1, 4)
            word = codes // 4**side % 4 ** (2 * k + 1)
            row, base = word // 4 ** (k + 1) * 4**k + word % 4**k, word // 4**k % 4
        else:
            table = counts.reshape(-1, 4**k, 4).sum(0)
            row, base = codes // 4 % 4**k, codes % 4
        chances = (table[row, base] + 1) / (table.sum(1)[row] + 4)
        bits = float(-np.log2(chances).mean()) if len(codes) else 2.0
        if bits < best[1]:
            best = (k, bits)
    return best


def count_words(stretches: Iterable[Tokens], k: int) -> NDArray[np.int64]:
    """Occurrences (4**k,) of words in both strands, the first base being the highest digit."""
    counts = np.zeros(4**k, dtype=np.int64)
    for stretch in stretches:
        for start in range(0, max(0, len(stretch) - k + 1), _CHUNK):
            np.add.at(counts, words_of(stretch[start : start + _CHUNK + k - 1], k), 1)
    return counts + counts.reshape((4,) * k).transpose().reshape(-1)[::-1]


def words_of(tokens: Tokens, k: int) -> NDArray[np.int64]:
    """Codes of the words of k bases, in order, without those that hold another token."""
    known = (tokens >= A) & (tokens <= T)
    digits = tokens.astype(np.int64) - A
    size = max(0, len(tokens) - k + 1)
    codes, whole = np.zeros(size, dtype=np.int64), np.ones(size, dtype=bool)
    for j in range(k):
        codes = codes * 4 + digits[j : j + size]
        whole &= known[j : j + size]
    return codes[whole]
