"""The mixers that Mamba is compared with: softmax attention (full or sliding window), LSTM or GRU, and convolution.

Same interface, backbone and training as the Mamba mixers (seqmodels/mixers.py).
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.config import AttentionConfig, ConvConfig, RNNConfig
from seqmodels.errors import InputError
from seqmodels.kernels.packing import starts_of_sequences


class AttentionState(NamedTuple):
    """Key-value cache of t past steps."""

    keys: Tensor
    "(b, heads, t, p), already rotated"
    values: Tensor
    "(b, heads, t, p)"
    positions: Tensor
    "(b, t) position of each cached step; -1 where a row has none (padding, or another packed sequence)"
    next: Tensor
    "(b,) position of the next step"


class Attention(nn.Module):
    """Multi-head softmax attention with rotary positions through PyTorch's SDPA (FlashAttention on a GPU)."""

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        if d_model % (2 * config.num_heads):
            raise InputError(
                f"d_model = {d_model} does not split into num_heads = {config.num_heads} heads of even size; "
                "choose num_heads so that d_model / num_heads is even"
            )
        self.config = config
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """(b, l, d) -> (b, l, d) and the key-value cache (None if not causal)."""
        b, l, _ = x.shape
        start = torch.zeros(b, dtype=torch.long, device=x.device) if state is None else state.next
        steps = torch.arange(l, device=x.device)
        positions = start[:, None] + steps  # (b, l)
        q, k, v = self.in_proj(x).view(b, l, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, positions, self.config.rope_base), _rotate(k, positions, self.config.rope_base)
        if not self.config.causal:
            if state is not None:
                raise InputError(
                    "non-causal attention sees the whole sequence at once; it cannot continue from a state"
                )
            return self._merge(F.scaled_dot_product_attention(q, k, v, self._mask(positions, lengths, seq_idx))), None
        if state is None and seq_idx is None:
            # right padding is never seen by a real step
            y = (
                self._windowed(q, k, v)
                if self.config.window
                else F.scaled_dot_product_attention(q, k, v, is_causal=True)
            )
            cached = positions
        else:
            cached = positions
            run = None if seq_idx is None else starts_of_sequences(seq_idx).cumsum(1)
            key_run = run
            if state is not None:
                k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
                cached = torch.cat([state.positions, positions], 1)
                key_run = None if run is None else F.pad(run, (state.positions.shape[1], 0))
            visible = (cached[:, None, :] >= 0) & (cached[:, None, :] <= positions[:, :, None])
            if self.config.window:
                visible &= positions[:, :, None] - cached[:, None, :] < self.config.window
            if run is not None and key_run is not None:
                visible &= run[:, :, None] == key_run[:, None, :]
                last = (torch.full_like(start, l) if lengths is None else lengths)[:, None] - 1
                cached = torch.where(key_run == run.gather(1, last.clamp(min=0)), cached, -1)
            y = F.scaled_dot_product_attention(q, k, v, visible[:, None])
        return self._merge(y), self._cache(k, v, cached, start, l, lengths)

    def _merge(self, y: Tensor) -> Tensor:
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _mask(self, positions: Tensor, lengths: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """(b, 1, l, l) bool: what non-causal attention may see."""
        distance = (positions[:, :, None] - positions[:, None, :]).abs()
        visible = distance < (self.config.window or distance.shape[-1] + 1)
        if lengths is not None:
            real = positions < lengths[:, None]
            visible = visible & (real[:, None, :] | ~real[:, :, None])  # padding sees all, so that no row is empty
        if seq_idx is not None:
            run = starts_of_sequences(seq_idx).cumsum(1)
            visible = visible & (run[:, :, None] == run[:, None, :])
        return visible[:, None]

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sliding-window attention in blocks of one window, each over itself and its predecessor: linear in l."""
        w, l = min(self.config.window or q.shape[2], q.shape[2]), q.shape[2]
        q, k, v = (F.pad(t, (0, 0, 0, -l % w)) for t in (q, k, v))
        b, h, padded, p = q.shape
        q = q.view(b, h, padded // w, w, p).transpose(1, 2).flatten(0, 1)

        def with_previous(t: Tensor) -> Tensor:
            blocks = F.pad(t, (0, 0, w, 0)).unfold(2, 2 * w, w)  # (b, h, blocks, p, 2 w)
            return blocks.permute(0, 2, 1, 4, 3).flatten(0, 1)

        row, column = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)[None]
        visible = (column <= row + w) & (column > row)
        first = visible & (column >= w)
        mask = torch.stack([first] + [visible] * (padded // w - 1)).repeat(b, 1, 1)[:, None]
        y = F.scaled_dot_product_attention(q, with_previous(k), with_previous(v), mask)
        return y.view(b, -1, h, w, p).transpose(1, 2).reshape(b, h, padded, p)[:, :, :l]

    def _cache(
        self, k: Tensor, v: Tensor, cached: Tensor, start: Tensor, l: int, lengths: Tensor | None
    ) -> AttentionState:
        end = start + (l if lengths is None else lengths)
        cached = torch.where(cached < end[:, None], cached, -1)
        if self.config.window:
            cached = torch.where(end[:, None] - cached < self.config.window, cached, -1)
            if lengths is None and k.shape[2] == l:  # known without waiting for the device
                keep = slice(max(0, l - self.config.window + 1), None)
            else:
                keep = (cached >= 0).any(0).nonzero().flatten()
            k, v, cached = k[:, :, keep], v[:, :, keep], cached[:, keep]
        return AttentionState(k, v, cached, end)


def _rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position embedding, half-split form: x (b, heads, l, p), positions (b, l)."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions[:, None, :, None].double() * frequency  # float64: positions reach millions
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RecurrentState(NamedTuple):
    """Hidden state (and cell, for an LSTM) after the last real step."""

    hidden: Tensor
    "(b, hidden size)"
    cell: Tensor
    "(b, hidden size); unused by a GRU"


class Recurrent(nn.Module):
    """One LSTM or GRU layer and an output projection."""

    def __init__(self, config: RNNConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        kind = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.rnn = kind(d_model, config.expand * d_model, batch_first=True)
        self.out_proj = nn.Linear(config.expand * d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """(b, l, d) -> (b, l, d) and the state after the last real step."""
        if state is None:
            zero = x.new_zeros(x.shape[0], self.rnn.hidden_size)
            state = RecurrentState(zero, zero)
        if seq_idx is None and lengths is None:
            y, state = self._run(x, state)
        else:
            y, state = self._run_segments(x, state, lengths, seq_idx)
        return self.out_proj(y), state

    def _run(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        hidden, cell = state.hidden[None].to(x.dtype), state.cell[None].to(x.dtype)
        if self.config.cell == "lstm":
            y, (hidden, cell) = self.rnn(x, (hidden, cell))
        else:
            y, hidden = self.rnn(x, hidden)
        return y, RecurrentState(hidden[0], cell[0])

    def _run_segments(
        self, x: Tensor, state: RecurrentState, lengths: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, RecurrentState]:
        """Each packed sequence as a row of its own, cut at its row's length; a row without real steps stands still."""
        rows, hidden, cell = [], [], []
        for i, row in enumerate(x):
            length = x.shape[1] if lengths is None else int(lengths[i])
            bounds = [0, length]
            if seq_idx is not None:
                inside = starts_of_sequences(seq_idx[i : i + 1, :length])[0].nonzero().flatten().tolist()
                bounds = [0, *inside, length]
            h, c = state.hidden[i : i + 1], state.cell[i : i + 1]
            pieces = []
            for start, stop in itertools.pairwise(bounds):
                if start > 0:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                if stop > start:
                    y, (h, c) = self._run(row[None, start:stop], RecurrentState(h, c))
                    pieces.append(y[0])
            pieces.append(x.new_zeros(x.shape[1] - length, self.rnn.hidden_size))
            rows.append(torch.cat([p.to(x.dtype) for p in pieces]))
            hidden.append(h)
            cell.append(c)
        return torch.stack(rows), RecurrentState(torch.cat(hidden), torch.cat(cell))


class Convolution(nn.Module):
    """A centred convolution over all channels, GELU, and an output projection."""

    def __init__(self, config: ConvConfig, d_model: int) -> None:
        super().__init__()
        if config.taps < 1 or config.taps % 2 == 0 or config.dilation < 1:
            raise InputError(
                f"taps = {config.taps} and dilation = {config.dilation}; choose an odd number and at least 1"
            )
        self.config = config
        reach = config.taps // 2 * config.dilation
        self.conv = nn.Conv1d(d_model, d_model, config.taps, padding=reach, dilation=config.dilation)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(b, l, d) -> (b, l, d); there is no state, as each step sees those after it."""
        if state is not None:
            raise InputError("a centred convolution sees both sides of a step; it cannot continue from a state")
        if lengths is not None:
            x = x * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        y = self.conv(x.transpose(1, 2)).transpose(1, 2) if seq_idx is None else self._packed(x, seq_idx)
        return self.out_proj(F.gelu(y)), None

    def _packed(self, x: Tensor, seq_idx: Tensor) -> Tensor:
        """The same tap by tap, each seeing only steps of its own sequence."""
        run, (b, l, _) = starts_of_sequences(seq_idx).cumsum(1), x.shape
        taps, dilation = self.config.taps, self.config.dilation
        reach = taps // 2 * dilation
        padded, runs = F.pad(x, (0, 0, reach, reach)), F.pad(run, (reach, reach), value=-1)
        y = x.new_zeros(b, l, len(self.conv.weight)) + self.conv.bias
        for k, weight in enumerate(self.conv.weight.unbind(2)):
            part = slice(k * dilation, k * dilation + l)
            y = y + F.linear(padded[:, part] * (runs[:, part] == run)[..., None], weight)
        return y
