"""The backbone of a model of sound, from a command's options or from the model that it starts from."""

import dataclasses
from typing import Any, Literal

from seqmodels.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    ModelConfig,
    MultiscaleConfig,
    S4DConfig,
)
from seqmodels.errors import InputError
from seqmodels.presets import multiscale

Block = Literal["mamba2", "mamba", "s4d", "s4d-inv", "s4d-real", "attention"]


WIDTHS, DEPTHS, POOLS = (128, 192, 256), (4, 4, 6), (4, 4)


def choose_backbone(
    start: ModelConfig | None,
    widths: tuple[int, ...] | None,
    depths: tuple[int, ...] | None,
    pools: tuple[int, ...] | None,
    *,
    outer: Block | None,
    centre: Block | None,
    d_state: int | None,
    head_dim: int | None,
    heads: int | None,
    window: int | None,
    mlp_expand: float | None,
    dropout: float,
    bidirectional: bool,
) -> MultiscaleConfig | BackboneConfig:
    """A U-Net, or with one width a flat stack, whose mixers may read both ways; or the layers of the start."""
    if start is not None:
        described = {
            "widths": widths, "depths": depths, "pools": pools, "outer": outer, "centre": centre, "d-state": d_state,
            "head-dim": head_dim, "heads": heads, "window": window, "mlp-expand": mlp_expand,
            "bidirectional": bidirectional or None,
        }  # fmt: skip
        if given := [f"--{name}" for name, value in described.items() if value is not None]:
            raise InputError(
                f"{', '.join(given)} would build other layers than those of --start-from; leave out one or the other"
            )
        return dataclasses.replace(start.backbone, dropout=dropout)
    widths, depths, pools = (
        default if given is None else given for given, default in ((widths, WIDTHS), (depths, DEPTHS), (pools, POOLS))
    )
    mlp_expand = mlp_expand or 0.0
    if not len(widths) == len(depths) == len(pools) + 1:
        raise InputError(
            f"{len(widths)} widths, {len(depths)} depths and {len(pools)} pools do not fit together; "
            "give as many depths as widths and one pool fewer"
        )
    sizes: dict[str, Any] = {"d_state": d_state, "head_dim": head_dim, "heads": heads, "window": window}
    mixer = _mixer(outer or "mamba2", **sizes)
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


def _mixer(
    block: Block, *, d_state: int | None, head_dim: int | None, heads: int | None, window: int | None
) -> MixerConfig:
    state: dict[str, Any] = {} if d_state is None else {"d_state": d_state}
    if block == "mamba":
        return MambaConfig(**state)
    if block == "mamba2":
        return Mamba2Config(**{"d_state": 64, **state}, head_dim=64 if head_dim is None else head_dim)
    if block == "attention":
        return AttentionConfig(num_heads=4 if heads is None else heads, window=window or None)
    kind = block.removeprefix("s4d").removeprefix("-") or "lin"
    return S4DConfig(initialisation=kind, **state)  # pyright: ignore
