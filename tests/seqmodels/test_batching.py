"""Batching: each sequence once per pass, within the budget, with next to no padding; packing keeps sequences apart."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqmodels
from seqmodels import presets
from seqmodels.batching import best_fit, buckets, draw_batches, draw_packed, next_token_targets, pack
from seqmodels.config import HeadConfig, ModelConfig

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=200)


def drawn(lengths, budget, seed):
    return draw_batches(buckets(lengths, budget), np.random.default_rng(seed))


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 2000))
def test_a_pass_over_buckets_shows_each_sequence_once_within_the_budget(lengths, budget):
    passes = [drawn(lengths, budget, seed) for seed in (0, 1)]
    for batches in passes:
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)
    assert len(passes[0]) == len(passes[1])  # so that the batch's number says its pass


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 2000))
def test_a_pass_over_packed_rows_shows_each_sequence_once_and_no_row_overflows(lengths, size):
    rows = best_fit(lengths, size)
    passes = [draw_packed(rows, lengths, 3, np.random.default_rng(seed)) for seed in (0, 1)]
    for batches in passes:
        assert sorted(i for batch in batches for row in batch for i in row) == list(range(len(lengths)))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= size for batch in batches for row in batch)
        assert all(1 <= len(batch) <= 3 for batch in batches)
    assert len(passes[0]) == len(passes[1])


def lognormal(count=3000):
    return np.random.default_rng(0).lognormal(6.5, 0.7, count).astype(int).clip(50, 20000)  # as genes are long


def padding(batches, lengths):
    """Part of the batches' positions that is padding; each batch is a list of rows of sequences."""
    widths = [[sum(lengths[i] for i in row) for row in batch] for batch in batches]
    return 1 - lengths.sum() / sum(len(rows) * max(rows) for rows in widths)


def test_batches_of_genes_are_padded_by_a_few_percent_and_packed_ones_by_less_than_one():
    lengths = lognormal()
    assert padding([[[i] for i in batch] for batch in drawn(lengths, 65536, 0)], lengths) < 0.08
    rows = best_fit(lengths, int(max(lengths.max(), 4096)))
    assert padding(draw_packed(rows, lengths, 3, np.random.default_rng(0)), lengths) < 0.01


def test_passes_differ_in_which_sequences_meet_and_in_the_order_of_lengths():
    lengths = lognormal(1000) // 50 * 50  # many of one length, as packed rows only exchange those
    rows = best_fit(lengths, 4096)
    for draw in (
        lambda seed: drawn(lengths, 16384, seed),
        lambda seed: [
            np.concatenate(batch) for batch in draw_packed(rows, lengths, 4, np.random.default_rng(seed))
        ],
    ):  # fmt: skip
        first, again, second = (draw(seed) for seed in (0, 0, 1))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        again = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
        assert len(again) < 0.05 * len(first)  # the longest, few to a batch, may meet again
        longest = [lengths[b].max() for b in first]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4


def test_packed_rows_lie_end_to_end_and_their_next_tokens_stop_at_borders():
    ids, lengths, seq_idx = pack([[[1, 2, 3], [4]], [[5, 6]]], fill=9)
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert lengths.tolist() == [4, 2]
    assert seq_idx.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert next_token_targets(ids, lengths, seq_idx).tolist() == [[2, 3, -100, -100], [6, -100, -100, -100]]


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_language_model_learns_from_packed_sequences_what_it_learns_from_each_alone(mixer):
    backbone = presets.mamba(16, 2, d_state=4) if mixer == "mamba" else presets.mamba2(16, 2, head_dim=8, d_state=4)
    config = ModelConfig(
        vocab_size=11, backbone=dataclasses.replace(backbone, dropout=0.0), head=HeadConfig(task="next_token")
    )
    model = seqmodels.build(config, seed=0).double()
    sequences = [torch.randint(0, 11, (n,)) for n in (9, 1, 17, 5)]
    ids, lengths, seq_idx = pack([sequences[:3], sequences[3:]])
    batch = {"ids": ids, "lengths": lengths, "seq_idx": seq_idx}
    loss, metrics = model.loss(batch | {"targets": next_token_targets(ids, lengths, seq_idx)})
    alone = sum(
        (len(s) - 1) * model.loss({"ids": s[None, :-1], "targets": s[None, 1:]})[0] for s in sequences if len(s) > 1
    )
    assert metrics["count"] == 28
    torch.testing.assert_close(loss, alone / 28, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, alone / 28)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
