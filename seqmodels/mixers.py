"""Sequence mixers with one interface: forward(x, state=None, lengths=None, seq_idx=None) -> (y, state).

x, y: (b, l, d). `state` is what the mixer remembers of the past (None at a start): handing it on splits a sequence
into chunks or single steps without changing the result. `lengths` (b,) marks right padding, which the state skips.
`seq_idx` (b, l) marks packed sequences: the memory resets wherever it changes.

Parameters of Mamba and Mamba-2 are named and initialised as in state-spaces/mamba.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.config import (
    AttentionConfig,
    BidirectionalConfig,
    ConvConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    RNNConfig,
    S4DConfig,
)
from seqmodels.errors import InputError
from seqmodels.kernels.across import Exchange, windows
from seqmodels.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from seqmodels.kernels.discretize import bilinear, zero_order_hold
from seqmodels.kernels.layer_step import mamba2_layer_step, mamba_layer_step
from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.kernels.rms_norm import rms_norm
from seqmodels.kernels.s4d import s4d, s4d_step
from seqmodels.kernels.selective_scan import selective_scan, selective_scan_step
from seqmodels.kernels.split import split
from seqmodels.kernels.ssd import ssd, ssd_step
from seqmodels.recompute import forgotten


def build_mixer(config: MixerConfig, d_model: int) -> nn.Module:
    """The mixer that a configuration describes, for width d_model."""
    from seqmodels.baselines import Attention, Convolution, Recurrent

    classes: dict[type, Any] = {
        MambaConfig: Mamba,
        Mamba2Config: Mamba2,
        S4DConfig: S4D,
        AttentionConfig: Attention,
        RNNConfig: Recurrent,
        ConvConfig: Convolution,
        BidirectionalConfig: Bidirectional,
    }
    return classes[type(config)](config, d_model)


class SSMState(NamedTuple):
    """Memory of Mamba and Mamba-2: the convolution's last k - 1 inputs and the state-space state."""

    conv: Tensor
    "(b, k - 1, channels)"
    ssm: Tensor
    "(b, e, n) for Mamba, (b, h, p, n) for Mamba-2; float32"


class OwnState(SSMState):
    """An SSMState that a step overwrites: of a decoder, which holds the only one. Both tensors contiguous."""


def is_causal(config: MixerConfig) -> bool:
    """Whether a mixer sees only the past, so that it can hand its state on."""
    if isinstance(config, AttentionConfig):
        return config.causal
    return not isinstance(config, (BidirectionalConfig, ConvConfig))


class Mamba(nn.Module):
    """Mamba (S6): in_proj -> causal convolution -> selective scan with input-dependent dt, B, C -> gate -> out_proj."""

    ranks: Any = None  # sequence_parallel.Ranks, where ranks share each sequence
    forgetful = False  # whether gradients compute again what is cheap (recompute.py)

    def __init__(self, config: MambaConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        inner = config.expand * d_model
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=config.bias)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, bias=config.conv_bias)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=config.bias)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_initial_dt_bias(config, inner))

    def forward(
        self, x: Tensor, state: SSMState | None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, SSMState]:
        """(b, l, d) -> (b, l, d) and the state after the last real step."""
        n = self.config.d_state
        inner = (self.in_proj.out_features // 2,)
        before, z = split(self.in_proj(x), inner, inner)
        exchange = None if self.ranks is None else self.ranks.exchange(lengths, seq_idx)
        one_step = exchange is None and _is_step(x, state, lengths, seq_idx)
        A = -_wide(self.A_log).exp()
        bias, D = _wide(self.dt_proj.bias), _wide(self.D)
        with forgotten(self.forgetful) as forget:
            convolve = partial(_convolve, self.conv1d, before, state, lengths, seq_idx, one_step, exchange)
            x, conv_state = convolve()
            forget(x, lambda: convolve()[0])
            low, B, C = self.x_proj(x).split([self.dt_rank, n, n], -1)
            dt = F.linear(low, self.dt_proj.weight)
            if one_step and state is not None:
                y, ssm = selective_scan_step(
                    x[:, 0], dt[:, 0], A, B, C, D, z[:, 0], bias, dt_softplus=True, state=state.ssm
                )
                return self.out_proj(y[:, None]), SSMState(conv_state, ssm)
            forget(dt, lambda: F.linear(low, self.dt_proj.weight.to(low.dtype)))
            dt, options = _mask_dt(dt, bias, (0.0, math.inf), lengths)
            y, ssm = selective_scan(
                x, dt, A, B[:, :, None], C[:, :, None], D, z, **options,
                initial_state=None if state is None else state.ssm, seq_idx=seq_idx, exchange=exchange,
            )  # fmt: skip
        return self.out_proj(y), SSMState(conv_state, ssm)

    def step_layer(
        self, x: Tensor, residual: Tensor | None, norm: Any, residual_in_fp32: bool, state: OwnState
    ) -> tuple[Tensor, Tensor]:
        """One step of the residual layer around this mixer, (b, d): y and x + residual; overwrites the state."""
        return mamba_layer_step(
            x, residual, norm.weight, self.in_proj.weight, self.in_proj.bias, self.conv1d.weight[:, 0],
            self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D,
            self.out_proj.weight, self.out_proj.bias, state.conv, state.ssm, norm.epsilon, residual_in_fp32,
            residual is not None,
        )  # fmt: skip


class Mamba2(nn.Module):
    """Mamba-2 (SSD): in_proj -> causal convolution over x, B, C -> SSD -> gated RMSNorm -> out_proj."""

    ranks: Any = None  # as in Mamba
    forgetful = False

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        inner = config.expand * d_model
        if inner % config.head_dim:
            raise InputError(
                f"expand * d_model = {config.expand} * {d_model} = {inner} is not a multiple of head_dim = "
                f"{config.head_dim}; try head_dim={math.gcd(inner, config.head_dim)}"
            )
        heads = inner // config.head_dim
        if heads % config.n_groups:
            raise InputError(f"{heads} heads cannot be split into n_groups = {config.n_groups}; choose a divisor")
        channels = inner + 2 * config.n_groups * config.d_state
        self.splits = [inner, channels, heads]
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=config.bias)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(_initial_dt_bias(config, heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*config.A_init_range).log())
        self.D = nn.Parameter(torch.ones(inner if config.D_has_head_dim else heads))
        self.norm = nn.Module()
        if config.gated_norm:
            self.norm.weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=config.bias)

    def forward(
        self, x: Tensor, state: SSMState | None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, SSMState]:
        """(b, l, d) -> (b, l, d) and the state after the last real step."""
        config = self.config
        exchange = None if self.ranks is None else self.ranks.exchange(lengths, seq_idx)
        one_step = exchange is None and _is_step(x, state, lengths, seq_idx)
        if one_step and state is not None and self.compiled_step_takes(x, state):
            return self._compiled_step(x, state)
        inner, channels, heads = self.splits
        maps = config.n_groups, config.d_state
        z, before, dt = split(_aligned(self.in_proj, x), (inner,), (channels,), (heads,))
        A, bias, D = -_wide(self.A_log).exp(), _wide(self.dt_bias), _wide(self.D)
        D = D.view(-1, config.head_dim) if config.D_has_head_dim else D
        with forgotten(self.forgetful) as forget:
            convolve = partial(_convolve, self.conv1d, before, state, lengths, seq_idx, one_step, exchange)
            xBC, conv_state = convolve()
            forget(xBC, lambda: convolve()[0])
            x, B, C = split(xBC, (heads, config.head_dim), maps, maps)
            if one_step and state is not None:
                y, ssm = ssd_step(
                    x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None, bias, dt_softplus=True, dt_limit=config.dt_limit,
                    state=state.ssm,
                )  # fmt: skip
                y = y[:, None]
            else:
                dt, options = _mask_dt(dt, bias, config.dt_limit, lengths)
                y, ssm = ssd(
                    x, dt, A, B, C, D, **options, chunk_size=config.chunk_size,
                    initial_state=None if state is None else state.ssm, seq_idx=seq_idx, exchange=exchange,
                )  # fmt: skip
            gate = partial(self._gate, y.flatten(-2), z)
            gated = gate()
            forget(gated, gate)
            return self.out_proj(gated), SSMState(conv_state, ssm)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """(b, l, inner) -> (b, l, inner): norm and gate."""
        config = self.config
        if not config.gated_norm:
            return y * F.silu(z)
        return rms_norm(
            y, self.norm.weight, z=z, groups=config.n_groups, epsilon=config.norm_epsilon,
            norm_before_gate=config.norm_before_gate,
        )  # fmt: skip

    def compiled_step_takes(self, x: Tensor, state: SSMState) -> bool:
        """Whether one step on a CPU can run as one compiled function (more rows are for threaded products)."""
        tensors = (x, self.in_proj.weight, state.conv, state.ssm)
        small = x.device.type == "cpu" and len(state.ssm) <= 8 and self.in_proj.bias is None
        return small and not torch.is_grad_enabled() and all(t.dtype == torch.float32 for t in tensors)

    def _compiled_step(self, x: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        """(b, 1, d) -> (b, 1, d): a few times faster than one op after the other."""
        from seqmodels.kernels.mamba2_step import mamba2_step

        config = self.config
        y, conv_state, ssm = mamba2_step(
            x[:, 0], *self.step_weights(), state.conv, state.ssm, groups=config.n_groups, norm_groups=config.n_groups,
            norm_before_gate=config.norm_before_gate, epsilon=config.norm_epsilon, dt_limit=config.dt_limit,
        )  # fmt: skip
        return y[:, None], SSMState(conv_state, ssm)

    def step_weights(self) -> tuple[Tensor | None, ...]:
        """As kernels/mamba2_step.py takes them."""
        return (
            self.in_proj.weight, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, self.A_log, self.D,
            self.norm.weight if self.config.gated_norm else None, self.out_proj.weight,
        )  # fmt: skip

    def step_layer(
        self, x: Tensor, residual: Tensor | None, norm: Any, residual_in_fp32: bool, state: OwnState
    ) -> tuple[Tensor, Tensor]:
        """One step of the residual layer around this mixer, (b, d): y and x + residual; overwrites the state."""
        config = self.config
        return mamba2_layer_step(
            x, residual, norm.weight, self.in_proj.weight, self.in_proj.bias, self.conv1d.weight[:, 0],
            self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight if config.gated_norm else None,
            self.out_proj.weight, self.out_proj.bias, state.conv, state.ssm, config.n_groups, config.norm_before_gate,
            norm.epsilon, config.norm_epsilon, *config.dt_limit, residual_in_fp32, residual is not None,
        )  # fmt: skip


class S4D(nn.Module):
    """S4D: a diagonal state space per channel -> GELU -> out_proj with a gate (GLU). Its state is (b, d, n)."""

    def __init__(self, config: S4DConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        real = config.initialisation == "real"
        if not real and config.d_state % 2:
            raise InputError(f"d_state = {config.d_state} is odd; a complex S4D needs an even one, or 'real'")
        n = config.d_state if real else config.d_state // 2
        k = torch.arange(n, dtype=torch.float32)
        frequencies = {"lin": math.pi * k, "inv": 2 * n / math.pi * (2 * n / (2 * k + 1) - 1)}  # of n pairs
        A = k + 1 if real else torch.full((n,), 0.5)
        self.A_log = nn.Parameter(A.log().repeat(d_model, 1))
        self.A_imag = None if real else nn.Parameter(frequencies[config.initialisation].repeat(d_model, 1))
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.dt_log = nn.Parameter(torch.empty(d_model).uniform_(low, high))
        # B is 1: the system knows C B alone. Re and Im together have the variance 1
        self.C = nn.Parameter(torch.randn(d_model, n) if real else torch.randn(d_model, n, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(
        self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(b, l, d) -> (b, l, d) and the state after the last real step."""
        dA, dB, C = self._recurrence()
        if _is_step(x, state, lengths, seq_idx) and state is not None:
            y, state = s4d_step(x[:, 0], dA, dB, C, self.D, state=state)
            y = y[:, None]
        else:
            y, state = s4d(x, dA, dB, C, self.D, initial_state=state, lengths=lengths, seq_idx=seq_idx)
        return F.glu(self.out_proj(F.gelu(y)), -1), state

    def _recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """dA, dB, C (d, n), complex or real."""
        A, C = -_wide(self.A_log).exp(), _wide(self.C)
        if self.A_imag is not None:
            A, C = torch.complex(A, _wide(self.A_imag)), torch.view_as_complex(C)
        rule = zero_order_hold if self.config.discretisation == "zoh" else bilinear
        return *rule(A, torch.ones_like(A), _wide(self.dt_log).exp()[:, None]), C


class Bidirectional(nn.Module):
    """F(x) + flip(R(flip(x))): one mixer reads forwards, one the reversed sequence. It has no state to hand on."""

    def __init__(self, config: BidirectionalConfig, d_model: int) -> None:
        super().__init__()
        self.mamba_fwd = build_mixer(config.mixer, d_model)  # named as in Caduceus
        self.mamba_rev = build_mixer(config.mixer, d_model)
        if config.tie_projections:
            if not isinstance(config.mixer, (MambaConfig, Mamba2Config)):
                raise InputError("tie_projections needs a Mamba or Mamba-2 mixer; set it to false")
            self.mamba_rev.in_proj, self.mamba_rev.out_proj = self.mamba_fwd.in_proj, self.mamba_fwd.out_proj

    def forward(
        self, x: Tensor, state: None = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(b, l, d) -> (b, l, d); padding stays in place, packed sequences stay apart."""
        if state is not None:
            raise InputError("a bidirectional model sees the whole sequence at once; it cannot continue from a state")
        forward, _ = self.mamba_fwd(x, None, lengths, seq_idx)
        order = reversed_order(x, lengths)
        reversed_idx = None if seq_idx is None else hold_over_padding(seq_idx.gather(1, order), lengths)
        backward, _ = self.mamba_rev(reorder(x, order), None, lengths, reversed_idx)
        return forward + reorder(backward, order), None

    def one_direction(self, x: Tensor, state: Any, backwards: bool) -> tuple[Tensor, Any]:
        """What one of the mixers adds to a stretch (b, l, d), and its state where it leaves the stretch.

        The state is that of the stretch to the left, or to the right for the mixer that reads backwards.
        """
        if not backwards:
            return self.mamba_fwd(x, state)
        y, state = self.mamba_rev(x.flip(1), state)
        return y.flip(1), state


def hold_over_padding(seq_idx: Tensor, lengths: Tensor | None) -> Tensor:
    """seq_idx (b, l) whose padding belongs to the last real sequence, so that nothing resets there."""
    if lengths is None:
        return seq_idx
    last = seq_idx.gather(1, (lengths[:, None] - 1).clamp(min=0))
    steps = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    return torch.where(steps < lengths[:, None], seq_idx, last)


def reversed_order(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The places (b, l) of the steps of x (b, l, ...) read backwards, padding staying behind; its own inverse."""
    order = torch.arange(x.shape[1], device=x.device).flip(0).expand(x.shape[:2])
    if lengths is None:
        return order
    order = order - (x.shape[1] - lengths[:, None])
    return torch.where(order < 0, order + x.shape[1], order)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """The steps of x (b, l, d) at the places (b, l)."""
    return x.gather(1, order[..., None].expand_as(x))


def _initial_dt_bias(config: MambaConfig | Mamba2Config, size: int) -> Tensor:
    """Inverse softplus of step sizes drawn log-uniformly between dt_min and dt_max."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.empty(size).uniform_(low, high).exp().clamp(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


def _aligned(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x); on a GPU in 16 bits with zeros as more channels, up to a multiple of 8.

    Rows that do not begin at multiples of 16 bytes keep cuBLAS from Hopper's instructions: with 644 channels instead of
    648 (width 128) the products take three times as long.
    """
    more = -linear.out_features % 8
    half = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    if not (more and half and x.is_cuda):
        return linear(x)
    bias = None if linear.bias is None else F.pad(linear.bias, (0, more))
    return F.linear(x, F.pad(linear.weight, (0, 0, 0, more)), bias)


def _wide(parameter: Tensor) -> Tensor:
    """In float32 at least: step sizes and decays are never computed in less."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def _is_step(x: Tensor, state: Any, lengths: Tensor | None, seq_idx: Tensor | None) -> bool:
    return x.shape[1] == 1 and state is not None and lengths is None and seq_idx is None


def _convolve(
    conv: nn.Conv1d, x: Tensor, state: SSMState | None, lengths: Tensor | None, seq_idx: Tensor | None, one_step: bool,
    exchange: Exchange | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal depthwise convolution and SiLU, with the window after the last real step."""
    weight, initial = conv.weight[:, 0], None if state is None else state.conv
    if one_step:
        y, window = causal_conv1d_step(x[:, 0], weight, conv.bias, activation="silu", state=initial)
        return y[:, None], window
    if exchange is not None:
        x, before, window = windows(exchange, x, weight.shape[1] - 1, initial, lengths, seq_idx)
        return causal_conv1d(x, weight, conv.bias, activation="silu", initial_state=before, seq_idx=seq_idx)[0], window
    y, window = causal_conv1d(x, weight, conv.bias, activation="silu", initial_state=initial, seq_idx=seq_idx)
    if lengths is None:
        return y, window
    before = torch.zeros_like(window) if initial is None else initial
    taps = torch.arange(window.shape[1], device=x.device) + lengths[:, None]  # (b, k - 1)
    index = taps[..., None].expand(-1, -1, x.shape[2])
    window = torch.cat([before.to(x.dtype), x], 1).gather(1, index)
    if seq_idx is not None:  # what lies before the last real step's sequence is not part of its window
        run = starts_of_sequences(seq_idx).cumsum(1)
        last = run.gather(1, (lengths[:, None] - 1).clamp(min=0))
        window = window * (F.pad(run, (before.shape[1], 0)).gather(1, taps) == last)[..., None]
    return y, window


def _mask_dt(
    dt: Tensor, bias: Tensor, limit: tuple[float, float], lengths: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """Step sizes that are zero on padding, so that the state stands still there, and the op's options for them."""
    if lengths is None:
        return dt, {"dt_bias": bias, "dt_softplus": True, "dt_limit": limit}
    dt = F.softplus(_wide(dt) + bias).clamp(*limit)
    real = torch.arange(dt.shape[1], device=dt.device) < lengths[:, None]
    return dt * real[..., None], {}
