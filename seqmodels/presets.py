"""Backbones by name: functions that return configurations."""

import dataclasses
from typing import Any

from seqmodels.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalConfig,
    ConvConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MultiscaleConfig,
    RNNConfig,
    S4DConfig,
    StageConfig,
    StrandsConfig,
)


def mamba(
    d_model: int, n_layer: int, *, bidirectional: bool = False, tie_projections: bool = False, **mixer: Any
) -> BackboneConfig:
    """A flat Mamba backbone; further arguments are MambaConfig's fields."""
    return _flat(MambaConfig(**mixer), d_model, n_layer, bidirectional, tie_projections)


def mamba2(
    d_model: int, n_layer: int, *, bidirectional: bool = False, tie_projections: bool = False, **mixer: Any
) -> BackboneConfig:
    """A flat Mamba-2 backbone; further arguments are Mamba2Config's fields."""
    return _flat(Mamba2Config(**mixer), d_model, n_layer, bidirectional, tie_projections)


def s4d(d_model: int, n_layer: int, **mixer: Any) -> BackboneConfig:
    """A flat S4D backbone; further arguments are S4DConfig's fields."""
    return _flat(S4DConfig(**mixer), d_model, n_layer)


def attention(d_model: int, n_layer: int, *, num_heads: int, window: int | None = None) -> BackboneConfig:
    """A flat Transformer backbone with gated MLPs, over all of the past or a sliding window of it."""
    mixer = AttentionConfig(num_heads=num_heads, window=window)
    return BackboneConfig(d_model=d_model, layers=(mixer,) * n_layer, mlp_expand=2.0)


def lstm(d_model: int, n_layer: int, *, expand: int = 1, bidirectional: bool = False) -> BackboneConfig:
    """A flat LSTM backbone."""
    return _flat(RNNConfig(cell="lstm", expand=expand), d_model, n_layer, bidirectional)


def cnn(d_model: int = 128, n_layer: int = 6, *, taps: int = 9) -> BackboneConfig:
    """A flat convolutional network whose dilation doubles every second layer; a million parameters as it is."""
    layers = tuple(ConvConfig(taps=taps, dilation=2 ** (i // 2)) for i in range(n_layer))
    return BackboneConfig(d_model=d_model, layers=layers)


def caduceus(
    d_model: int = 256,
    n_layer: int = 16,
    *,
    complement_map: tuple[int, ...] | None = None,
    mixer: MambaConfig | Mamba2Config = MambaConfig(),  # noqa: B008  # frozen
) -> BackboneConfig:
    """Caduceus: both directions share their projections (Schiff et al., 2024); sizes as for 131k bases.

    With a complement map Caduceus-PS, which reads both strands; without, Caduceus-Ph, which learns them from data
    whose strand is drawn at random.
    """
    backbone = _flat(mixer, d_model, n_layer, bidirectional=True, tie_projections=True)
    strands = None if complement_map is None else StrandsConfig(complement_map=complement_map)
    return dataclasses.replace(backbone, strands=strands, residual_in_fp32=False)


def multiscale(
    widths: tuple[int, ...] = (128, 192, 256),
    depths: tuple[int, ...] = (4, 4, 6),
    pools: tuple[int, ...] = (4, 4),
    *,
    outer: MixerConfig = Mamba2Config(d_state=64),  # noqa: B008  # frozen
    centre: MixerConfig | None = None,
    mlp_expand: float = 0.0,
    dropout: float = 0.0,
) -> MultiscaleConfig:
    """A causal U-Net as SaShiMi: `depths` blocks on the way down and again on the way up, the last at the centre.

    `centre` is the mixer of the coarsest stage, by default that of all others, `outer`. The Mamba paper's Table 5
    compares such pairs.
    """
    fine = [
        StageConfig(d_model=width, down=(outer,) * depth, up=(outer,) * depth, pool=pool)
        for width, depth, pool in zip(widths[:-1], depths[:-1], pools, strict=True)
    ]
    last = StageConfig(d_model=widths[-1], down=(centre or outer,) * depths[-1])
    return MultiscaleConfig(stages=(*fine, last), mlp_expand=mlp_expand, dropout=dropout)


def _flat(
    mixer: MambaConfig | Mamba2Config | S4DConfig | RNNConfig,
    d: int,
    n_layer: int,
    bidirectional: bool = False,
    tie_projections: bool = False,
) -> BackboneConfig:
    layer = BidirectionalConfig(mixer=mixer, tie_projections=tie_projections) if bidirectional else mixer
    return BackboneConfig(d_model=d, layers=(layer,) * n_layer)
