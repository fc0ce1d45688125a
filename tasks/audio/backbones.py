"""The backbone of a model of sound, from a command's options."""

from typing import Any, Literal

from seqmodels.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MultiscaleConfig,
    S4DConfig,
)
from seqmodels.errors import InputError
from seqmodels.presets import multiscale

Block = Literal["mamba2", "mamba", "s4d", "s4d-inv", "s4d-real", "attention"]


def choose_backbone(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    pools: tuple[int, ...],
    *,
    outer: Block,
    centre: Block | None,
    d_state: int | None,
    head_dim: int,
    heads: int,
    window: int,
    mlp_expand: float,
    dropout: float,
    bidirectional: bool,
) -> MultiscaleConfig | BackboneConfig:
    """A U-Net, or with one width a flat stack, whose mixers may read both ways."""
    if not len(widths) == len(depths) == len(pools) + 1:
        raise InputError(
            f"{len(widths)} widths, {len(depths)} depths and {len(pools)} pools do not fit together; "
            "give as many depths as widths and one pool fewer"
        )
    sizes: dict[str, Any] = {"d_state": d_state, "head_dim": head_dim, "heads": heads, "window": window}
    mixer = _mixer(outer, **sizes)
    if len(widths) > 1:
        if bidirectional:
            raise InputError("a U-Net is causal; give one width, one depth and --pools [] to read both ways")
        middle = None if centre is None else _mixer(centre, **sizes)
        return multiscale(
            widths, depths, pools, outer=mixer, centre=middle, mlp_expand=mlp_expand, dropout=dropout
        )  # fmt: skip
    if centre is not None:
        raise InputError(f"--centre is {centre}, but with one width there is one kind of block; name it with --outer")
    if bidirectional:
        if isinstance(mixer, AttentionConfig):
            raise InputError("attention has no option bidirectional; choose another block")
        mixer = BidirectionalConfig(mixer=mixer)  # pyright: ignore
    return BackboneConfig(d_model=widths[0], layers=(mixer,) * depths[0], mlp_expand=mlp_expand, dropout=dropout)


def _mixer(block: Block, *, d_state: int | None, head_dim: int, heads: int, window: int) -> MixerConfig:
    state: dict[str, Any] = {} if d_state is None else {"d_state": d_state}
    if block == "mamba":
        return MambaConfig(**state)
    if block == "mamba2":
        return Mamba2Config(**{"d_state": 64, **state}, head_dim=head_dim)
    if block == "attention":
        return AttentionConfig(num_heads=heads, window=window or None)
    kind = block.removeprefix("s4d").removeprefix("-") or "lin"
    return S4DConfig(initialisation=kind, **state)  # pyright: ignore
