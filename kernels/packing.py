"""Packed sequences: several sequences laid end to end in one row, told apart by an integer per step.

`seq_idx` (b, l) holds any integer per step; a new sequence starts wherever it differs from the step before. The values
themselves mean nothing. `cu_seqlens` (s + 1,) holds the s sequences' bounds in one row of l steps: 0, ..., l.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """Number of the sequence of every step, (1, l) int32, from the bounds (s + 1,) = [0, ..., l]. Reads the bounds."""
    bounds = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens is {bounds}; expected the bounds [0, ..., l] of at least one sequence, in a row")
    lengths = cu_seqlens.diff()
    if bool((lengths <= 0).any()):
        raise ValueError(f"cu_seqlens {bounds} does not increase strictly; drop sequences without a step")
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
    return torch.repeat_interleave(numbers, lengths)[None]


def starts_of_sequences(seq_idx: Tensor) -> Tensor:
    """Whether each step starts a new sequence, (b, l) bool. Step 0 does not: it continues the initial state."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
