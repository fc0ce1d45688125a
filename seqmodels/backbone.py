"""The shared backbone: pre-norm residual layers around mixers, with the state of every layer handed on.

Parameters are named as in state-spaces/mamba: embedding, layers.{i}.norm, layers.{i}.mixer, norm_f.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.config import BackboneConfig, ConditionConfig, MixerConfig
from seqmodels.kernels.rms_norm import rms_norm
from seqmodels.mixers import build_mixer, is_causal


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, with the residual addition that precedes it."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
        """norm(x + residual) in x's dtype, and the sum."""
        if residual is None:
            residual = x.float() if residual_in_fp32 and x.dtype != torch.float64 else x
            return rms_norm(x, self.weight, epsilon=self.epsilon), residual
        return rms_norm(x, self.weight, residual=residual, epsilon=self.epsilon, residual_in_fp32=residual_in_fp32)


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with (y, gate) = fc1(x); parameters named as in state-spaces/mamba."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * F.silu(gate))


class Layer(nn.Module):
    """norm -> mixer (-> norm2 -> MLP), each added to the residual stream by the next norm."""

    def __init__(
        self, mixer: MixerConfig, d_model: int, *, mlp_expand: float, dropout: float, epsilon: float,
        residual_in_fp32: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = RMSNorm(d_model, epsilon)
        self.mixer = build_mixer(mixer, d_model)
        self.dropout = nn.Dropout(dropout)
        self.residual_in_fp32 = residual_in_fp32
        self.mlp: GatedMLP | None = None
        if mlp_expand:
            self.norm2 = RMSNorm(d_model, epsilon)
            self.mlp = GatedMLP(d_model, round(mlp_expand * d_model))

    def forward(
        self, x: Tensor, residual: Tensor | None, state: Any, lengths: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """(x, residual) -> (x, residual) with the layer's state."""
        x, residual = self.norm(x, residual, self.residual_in_fp32)
        x, state = self.mixer(x, state, lengths, seq_idx)
        x = self.dropout(x)
        if self.mlp is not None:
            x, residual = self.norm2(x, residual, self.residual_in_fp32)
            x = self.dropout(self.mlp(x))
        return x, residual, state


class Stack(nn.Module):
    """Layers of one width and a final norm: (b, l, d) -> (b, l, d)."""

    def __init__(
        self, d_model: int, mixers: Sequence[MixerConfig], *, mlp_expand: float, dropout: float, epsilon: float,
        residual_in_fp32: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        options: dict[str, Any] = {"epsilon": epsilon, "residual_in_fp32": residual_in_fp32}
        self.layers = nn.ModuleList(
            Layer(mixer, d_model, mlp_expand=mlp_expand, dropout=dropout, **options) for mixer in mixers
        )
        self.norm_f = RMSNorm(d_model, epsilon)
        self.residual_in_fp32 = residual_in_fp32
        rescale_residual_projections(self)

    def forward(
        self, x: Tensor, state: tuple | None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, tuple]:
        """(b, l, d) -> (b, l, d) and one state per layer."""
        if lengths is not None and seq_idx is not None:  # padding belongs to the last real sequence: no reset there
            last = seq_idx.gather(1, (lengths[:, None] - 1).clamp(min=0))
            steps = torch.arange(seq_idx.shape[1], device=seq_idx.device)
            seq_idx = torch.where(steps < lengths[:, None], seq_idx, last)
        residual, states = None, []
        for i, layer in enumerate(self.layers):
            x, residual, layer_state = layer(x, residual, None if state is None else state[i], lengths, seq_idx)
            states.append(layer_state)
        return self.norm_f(x, residual, self.residual_in_fp32)[0], tuple(states)


class Conditions(nn.Module):
    """One embedding per condition (digit, speaker, ...), added to every position of a row.

    Each table has one more row than the condition has values: its last row means 'not given'.
    """

    def __init__(self, conditions: Sequence[ConditionConfig], d_model: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(len(c.values) + 1, d_model) for c in conditions)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)  # pyright: ignore

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """x (b, l, d) with the conditions added; ids (b, conditions) int64, or None when nothing is given."""
        for i, table in enumerate(self.tables):
            missing = table.weight.shape[0] - 1  # pyright: ignore
            given = x.new_full(x.shape[:1], missing, dtype=torch.long) if ids is None else ids[:, i]
            x = x + table(given)[:, None]
        return x


class Backbone(Stack):
    """A flat backbone: token ids (b, l) -> features (b, l, d)."""

    def __init__(self, config: BackboneConfig, vocab_size: int, conditions: Sequence[ConditionConfig] = ()) -> None:
        super().__init__(
            config.d_model, config.layers, mlp_expand=config.mlp_expand, dropout=config.dropout,
            epsilon=config.norm_epsilon, residual_in_fp32=config.residual_in_fp32,
        )  # fmt: skip
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.conditions = Conditions(conditions, config.d_model)
        self.causal = all(is_causal(mixer) for mixer in config.layers)

    def forward(
        self,
        ids: Tensor,
        state: tuple | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, tuple]:
        """(b, l) -> (b, l, d) and one state per layer."""
        return super().forward(self.conditions(self.embedding(ids), conditions), state, lengths, seq_idx)


def rescale_residual_projections(stack: Stack) -> None:
    """Divide the initial out_proj and fc2 by the square root of the number of residual additions (GPT-2)."""
    additions = sum(1 if layer.mlp is None else 2 for layer in stack.layers)  # pyright: ignore
    seen = set()
    for name, parameter in stack.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")) and id(parameter) not in seen:
            seen.add(id(parameter))
            with torch.no_grad():
                parameter.div_(math.sqrt(additions))
