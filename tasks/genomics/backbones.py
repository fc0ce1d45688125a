"""The backbone of a model of DNA, from a command's options or from the model that it starts from."""

import dataclasses
from collections import Counter
from itertools import cycle, islice
from typing import Literal

from seqmodels import presets
from seqmodels.checkpoint import read, resolve
from seqmodels.config import BackboneConfig, KmerConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, TOKENIZER, VOCABULARY

MIXERS = ("mamba", "mamba2", "attention", "lstm", "cnn")
Strands = Literal["one", "conjoined", "equivariant"]


def choose_backbone(
    start_from: str | None,
    mixer: str | None,
    d_model: int | None,
    n_layer: int | None,
    d_state: int | None,
    *,
    kmer: KmerConfig | None,
    strands: Strands | None,
    bidirectional: bool,
    tie_projections: bool,
) -> BackboneConfig:
    """The layers of `start_from` unless an option describes new ones; `strands` changes either.

    `mixer` is one of MIXERS, or several with commas, which layers are in turn.
    """
    described = bidirectional or tie_projections or kmer is not None or {mixer, d_model, n_layer, d_state} != {None}
    if start_from is not None and not described:
        backbone = _backbone_of(start_from)
    else:
        layers = 4 if n_layer is None else n_layer
        backbone = _new_backbone(mixer or "mamba2", bidirectional, tie_projections, d_model or 128, layers, d_state)
        backbone = dataclasses.replace(backbone, kmer=kmer)
    if strands is None:
        return backbone
    both = StrandsConfig(complement_map=COMPLEMENT_MAP, training=strands == "equivariant")
    return dataclasses.replace(backbone, strands=None if strands == "one" else both)


def kmer_config(k: int, width: int, buckets: int | None = None, canonical: bool = False) -> KmerConfig | None:
    """Words of k bases; 0 means none."""
    longest = 12 if buckets is None else 31
    if not 0 <= k <= longest:
        hint = " (a table of 16.8 million words; with --kmer-buckets up to 31)" if buckets is None else ""
        raise InputError(f"kmer is {k}; expected 0 (none) to {longest}{hint}")
    if not k and (buckets is not None or canonical):
        raise InputError("kmer_buckets and kmer_canonical say how words are embedded; give --kmer, or leave them out")
    bases = tuple(map(VOCABULARY.index, "ACGT"))
    turned = COMPLEMENT_MAP if canonical else None
    return KmerConfig(k=k, alphabet=bases, width=width, buckets=buckets, complement_map=turned) if k else None


def _backbone_of(start_from: str) -> BackboneConfig:
    config, _ = read(resolve(start_from))
    if not isinstance(config.backbone, BackboneConfig) or config.tokenizer != TOKENIZER:
        raise InputError(
            f"{start_from} is not a model of the tokens of DNA used here, so that its layers do not serve; say with "
            "--mixer, --d-model ... how to build new ones"
        )
    return config.backbone


def _new_backbone(
    mixer: str, bidirectional: bool, tie_projections: bool, d_model: int, n_layer: int, d_state: int | None
) -> BackboneConfig:
    named = mixer.split(",")
    for name in named:
        if name not in MIXERS:
            raise InputError(f"mixer is {mixer!r}; expected one of {', '.join(MIXERS)}, or several with commas between")
    mambas = {"mamba", "mamba2"} & set(named)
    if tie_projections and not (bidirectional and mambas):
        raise InputError("tie_projections is for mamba and mamba2 with --bidirectional; leave it out, or add that")
    if d_state is not None and not mambas:
        raise InputError(f"d_state is {d_state}, but {mixer} has no such size; leave it out")
    if "attention" in named and bidirectional:
        raise InputError("attention has no option bidirectional; leave it out")
    state = {} if d_state is None else {"d_state": d_state}
    both = {"bidirectional": bidirectional}
    presets_of = {
        "mamba": lambda n: presets.mamba(d_model, n, **both, tie_projections=tie_projections, **state),
        "mamba2": lambda n: presets.mamba2(d_model, n, **both, tie_projections=tie_projections, **state),
        "attention": lambda n: presets.attention(d_model, n, num_heads=max(1, d_model // 64)),
        "lstm": lambda n: presets.lstm(d_model, n, **both),
        "cnn": lambda n: presets.cnn(d_model, n),
    }
    order = list(islice(cycle(named), n_layer))
    parts = {name: presets_of[name](count) for name, count in Counter(order).items()}
    layers = {name: iter(part.layers) for name, part in parts.items()}
    mlp_expand = max((part.mlp_expand for part in parts.values()), default=0.0)
    return BackboneConfig(d_model=d_model, layers=tuple(next(layers[name]) for name in order), mlp_expand=mlp_expand)
