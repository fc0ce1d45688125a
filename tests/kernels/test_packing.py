"""Packing: bounds become a number per step, and the first step of a row is never a start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqmodels.kernels.packing import seq_idx_from_cu_seqlens, starts_of_sequences


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_step_carries_the_number_of_its_sequence(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    want = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert seq_idx_from_cu_seqlens(cu_seqlens).tolist() == [want]
    starts = starts_of_sequences(seq_idx_from_cu_seqlens(cu_seqlens))
    assert starts[0].nonzero()[:, 0].tolist() == cu_seqlens[1:-1].tolist()


def test_a_start_is_any_change_of_value_except_at_step_zero():
    seq_idx = torch.tensor([[5, 5, 2, 2, 5, -1], [0, 1, 1, 1, 1, 1]])
    want = [[False, False, True, False, True, True], [False, True, False, False, False, False]]
    assert starts_of_sequences(seq_idx).tolist() == want
    assert starts_of_sequences(seq_idx[:, :1]).tolist() == [[False], [False]]


@pytest.mark.parametrize("bounds", [[1, 4], [0], [0, 4, 4], [0, 5, 3]])
def test_bounds_that_are_no_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        seq_idx_from_cu_seqlens(torch.tensor(bounds))
