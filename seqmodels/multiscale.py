"""A causal U-Net over time: fine stages see every step, coarse stages see pooled groups of steps.

After SaShiMi (Goel et al., "It's Raw!", 2022) and the Mamba paper's audio models. A group of `pool` fine steps makes
one coarse step once its last step is known; the coarse result then feeds that step and the pool - 1 after it. So step t
never sees the future, and a coarse stage runs once per `pool` steps when decoding.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.backbone import Conditions, Layers
from seqmodels.config import ConditionConfig, MultiscaleConfig
from seqmodels.errors import InputError
from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.mixers import is_causal


class StageState(NamedTuple):
    """What one stage remembers between calls."""

    down: tuple
    "States of the layers before pooling."
    up: tuple
    "States of the layers after the coarser stage."
    pending: Tensor
    "(b, steps of an unfinished group, d): waiting to be pooled."
    ready: Tensor
    "(b, steps, d): the coarser stages' result for the next steps, not used yet."


class Multiscale(nn.Module):
    """Multi-scale backbone: token ids (b, l) -> features (b, l, d of the finest stage)."""

    both_strands = False  # as of Backbone

    def __init__(self, config: MultiscaleConfig, vocab_size: int, conditions: Sequence[ConditionConfig] = ()) -> None:
        super().__init__()
        _check(config)
        self.config = config
        stages = config.stages
        self.causal = True
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        options: dict[str, Any] = {
            "mlp_expand": config.mlp_expand,
            "dropout": config.dropout,
            "epsilon": config.norm_epsilon,
            "residual_in_fp32": config.residual_in_fp32,
        }
        self.conditions = nn.ModuleList(Conditions(conditions, s.d_model) for s in stages)
        self.down = nn.ModuleList(Layers(s.d_model, s.down, **options) for s in stages)
        self.up = nn.ModuleList(Layers(s.d_model, s.up, **options) for s in stages[:-1])
        pairs = list(itertools.pairwise(stages))
        self.pool = nn.ModuleList(nn.Linear(fine.pool * fine.d_model, coarse.d_model) for fine, coarse in pairs)
        self.unpool = nn.ModuleList(nn.Linear(coarse.d_model, fine.pool * fine.d_model) for fine, coarse in pairs)

    def forward(
        self,
        ids: Tensor,
        state: tuple | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, tuple]:
        """(b, l) -> (b, l, d) and one StageState per stage (the last one holds the centre's layers only).

        Right padding (`lengths`) never reaches a real step, but the returned state is that of the padded row: hand a
        state on only between calls whose rows have no padding. Packed sequences must start at multiples of the whole
        pooling factor.
        """
        if seq_idx is not None:
            self._check_packing(seq_idx, state)
        return self._stage(0, self.embedding(ids), state, seq_idx, conditions)

    def _stage(
        self, i: int, x: Tensor, state: tuple | None, seq_idx: Tensor | None, conditions: Tensor | None
    ) -> tuple[Tensor, tuple]:
        own: StageState | None = None if state is None else state[0]
        x = self.conditions[i](x, conditions)
        x, down = self.down[i].read(x, None if own is None else own.down, None, seq_idx)
        if i == len(self.up):
            empty = x[:, :0]
            return x, (StageState(down, (), empty, empty),)
        pool = self.config.stages[i].pool
        if own is None:
            pending, ready = x, x.new_zeros(x.shape[0], pool - 1, x.shape[2])
        else:
            pending, ready = torch.cat([own.pending, x], 1), own.ready
        groups = pending.shape[1] // pool
        rest: tuple | None = None if state is None else state[1:]
        if groups:
            coarse = self.pool[i](pending[:, : groups * pool].unflatten(1, (groups, pool)).flatten(2))
            coarse_idx = None if seq_idx is None else seq_idx[:, ::pool][:, :groups]
            coarse, rest = self._stage(i + 1, coarse, rest, coarse_idx, conditions)
            fine = self.unpool[i](coarse).unflatten(2, (pool, -1)).flatten(1, 2)
            ready = torch.cat([ready.to(fine.dtype), fine], 1)
        from_coarse = ready[:, : x.shape[1]]
        if seq_idx is not None:  # a sequence's first pool - 1 steps have no finished group of their own yet
            run = starts_of_sequences(seq_idx).cumsum(1)
            same = run == F.pad(run, (pool - 1, 0))[:, : run.shape[1]]
            from_coarse = from_coarse * same[..., None]
        y, up = self.up[i].read(x + from_coarse, None if own is None else own.up, None, seq_idx)
        own = StageState(down, up, pending[:, groups * pool :], ready[:, x.shape[1] :])
        return y, (own, *(rest if rest is not None else self._no_state(i + 1, x)))

    def _no_state(self, i: int, x: Tensor) -> tuple:
        """States of stages that have not run yet: as many `None` layer states as there are layers."""
        states = []
        for j in range(i, len(self.config.stages)):
            stage, width = self.config.stages[j], self.config.stages[j].d_model
            ready = x.new_zeros(x.shape[0], stage.pool - 1, width)
            states.append(StageState((None,) * len(stage.down), (None,) * len(stage.up), ready[:, :0], ready))
        return tuple(states)

    def _check_packing(self, seq_idx: Tensor, state: tuple | None) -> None:
        factor = 1
        for stage in self.config.stages:
            factor *= stage.pool
        starts = starts_of_sequences(seq_idx).nonzero()[:, 1]
        if state is not None or bool((starts % factor).any()):
            raise InputError(
                f"packed sequences in a multi-scale model must start at multiples of its pooling, {factor} steps, and "
                "without a state; pad each sequence, or pass the sequences as rows"
            )


def _check(config: MultiscaleConfig) -> None:
    for i, stage in enumerate(config.stages):
        last = i == len(config.stages) - 1
        if last and (stage.up or stage.pool != 1):
            raise InputError("the last stage is the centre: give it `down` mixers, no `up` mixers and pool=1")
        if not last and stage.pool < 2:
            raise InputError(f"stage {i} has pool={stage.pool}; every stage but the last needs pool >= 2")
        if not all(is_causal(mixer) for mixer in (*stage.down, *stage.up)):
            raise InputError(f"stage {i} has a mixer that is not causal; a multi-scale model needs causal mixers")
