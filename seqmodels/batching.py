"""Which sequences share a batch, so that next to nothing of it is padding: of similar length, or packed end to end.

    ids, lengths, seq_idx = pack([[a, b, c], [d, e]])          # two rows; a model's `loss` takes all three
    batch = {"ids": ids, "lengths": lengths, "seq_idx": seq_idx, "targets": next_token_targets(ids, lengths, seq_idx)}

Both ways serve sequences in passes: each sequence once per pass, always in as many batches, drawn by a generator.
"""

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from seqmodels.heads import IGNORED

SPREAD = 1.1  # longest beside shortest of a bucket of more than BATCHES batches
BATCHES = 2  # that a bucket has at least, so that sequences of rare lengths meet others in each pass, too


def buckets(lengths: ArrayLike, batch_tokens: int) -> list[tuple[NDArray[np.int64], int]]:
    """Places of sequences of similar length, and how many of them make a batch: count * longest <= batch_tokens, or 1.

    Each bucket but the last makes whole batches: BATCHES, or as many as span SPREAD.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    result = []
    while len(order):
        longest = int(lengths[order[0]])
        size = max(1, batch_tokens // longest)
        similar = int(np.searchsorted(-lengths[order], -longest / SPREAD, side="right"))
        count = max(BATCHES, similar // size) * size
        result.append((order[:count], size))
        order = order[count:]
    return result


def draw_batches(groups: list[tuple[NDArray[np.int64], int]], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """One pass over buckets: batches of a bucket's sequences as they come, in random order."""
    batches = []
    for group, size in groups:
        batches += np.array_split(rng.permutation(group), -(-len(group) // size))
    return [batches[i] for i in rng.permutation(len(batches))]


def best_fit(lengths: ArrayLike, size: int) -> list[NDArray[np.int64]]:
    """Places of sequences in rows of at most `size` steps: the longest first, each into the fullest row with room."""
    lengths = np.asarray(lengths, dtype=np.int64)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that has some, and the row; sorted
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        at = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (max(size, length), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        if left > length:
            bisect.insort(room, (left - length, row))
    return [np.array(row) for row in rows]


def draw_packed(
    rows: list[NDArray[np.int64]], lengths: ArrayLike, per_batch: int, rng: np.random.Generator
) -> list[list[NDArray[np.int64]]]:
    """One pass over packed rows: batches of at most `per_batch` rows, sequences of one length having changed places."""
    lengths = np.asarray(lengths)
    instead = np.empty(len(lengths), dtype=np.int64)
    instead[np.argsort(lengths, kind="stable")] = np.lexsort((rng.random(len(lengths)), lengths))
    batches = np.array_split(rng.permutation(len(rows)), -(-len(rows) // per_batch))
    return [[rng.permutation(instead[rows[i]]) for i in batch] for batch in batches]


def pack(rows: Sequence[Sequence[ArrayLike]], fill: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids (b, l) of rows of sequences end to end, lengths (b,), and each step's number in its row, seq_idx (b, l).

    Rows end in `fill` after their lengths.
    """
    packed = [np.concatenate([np.asarray(sequence) for sequence in row]) for row in rows]
    lengths = np.array([len(row) for row in packed], dtype=np.int64)
    ids = np.full((len(rows), lengths.max()), fill, dtype=np.int64)
    seq_idx = np.zeros_like(ids)
    for i, (row, whole) in enumerate(zip(rows, packed, strict=True)):
        ids[i, : len(whole)] = whole
        seq_idx[i, : len(whole)] = np.repeat(np.arange(len(row)), [len(sequence) for sequence in row])  # pyright: ignore
    return torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(seq_idx)


def next_token_targets(ids: Tensor, lengths: Tensor, seq_idx: Tensor) -> Tensor:
    """Targets (b, l) of a next-token model on packed rows: the following token, IGNORED at a sequence's last."""
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    inside = torch.zeros_like(ids, dtype=torch.bool)
    inside[:, :-1] = seq_idx[:, 1:] == seq_idx[:, :-1]
    inside &= torch.arange(1, ids.shape[1] + 1, device=ids.device) < lengths[:, None]
    return following.masked_fill(~inside, IGNORED)
