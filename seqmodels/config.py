"""Configurations: frozen dataclasses that say everything about a model, and their JSON form.

A model is a `ModelConfig`: a backbone (flat or multi-scale), a head, and what its tokens mean. The backbone lists one
mixer configuration per layer, so a hybrid is simply a list of different mixers.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from seqmodels.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba (S6) mixer: a selective scan with a diagonal state per channel (Gu and Dao, 2023)."""

    d_state: int = 16
    "State size n per channel."
    d_conv: int = 4
    "Taps k of the short causal convolution."
    expand: int = 2
    "Inner width e = expand * d_model."
    dt_rank: int | None = None
    "Rank of the projection that makes dt; None means ceil(d_model / 16)."
    dt_min: float = 0.001
    "Smallest step size at initialisation."
    dt_max: float = 0.1
    "Largest step size at initialisation."
    dt_init_floor: float = 1e-4
    "Floor of the step size at initialisation."
    conv_bias: bool = True
    "Whether the convolution has a bias."
    bias: bool = False
    "Whether the input and output projections have a bias."


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2 (SSD) mixer: a scalar decay per head, computed in chunks as matrix products (Dao and Gu, 2024)."""

    d_state: int = 128
    "State size n per head channel."
    d_conv: int = 4
    "Taps k of the short causal convolution over x, B and C."
    expand: int = 2
    "Inner width e = expand * d_model."
    head_dim: int = 64
    "Channels p per head; must divide e."
    n_groups: int = 1
    "Groups g that share B and C; must divide the number of heads."
    A_init_range: tuple[float, float] = (1.0, 16.0)
    "Range of -A at initialisation."
    dt_min: float = 0.001
    "Smallest step size at initialisation."
    dt_max: float = 0.1
    "Largest step size at initialisation."
    dt_init_floor: float = 1e-4
    "Floor of the step size at initialisation."
    dt_limit: tuple[float, float] = (0.0, math.inf)
    "Range to which the step size is clamped after softplus."
    D_has_head_dim: bool = False
    "Whether the skip D is per channel instead of per head."
    gated_norm: bool = True
    "Whether the gated RMSNorm follows the scan (otherwise y * silu(z))."
    norm_before_gate: bool = False
    "Whether that norm comes before the gate instead of after it."
    norm_epsilon: float = 1e-5
    "Epsilon of that norm, which normalises within each of the n_groups."
    conv_bias: bool = True
    "Whether the convolution has a bias."
    bias: bool = False
    "Whether the input and output projections have a bias."
    chunk_size: int = 64
    "Steps q per chunk of the scan; changes speed, not results."


@dataclass(frozen=True, kw_only=True)
class S4DConfig:
    """S4D mixer: a diagonal state space that is the same at every step, then GELU and a gated projection (Gu et al.,
    "On the Parameterization and Initialization of Diagonal State Space Models", 2022)."""

    d_state: int = 64
    "State size n per channel; complex numbers count as two, as each stands for a conjugate pair."
    initialisation: Literal["lin", "inv", "real"] = "lin"
    """A at initialisation: S4D-Lin, -1/2 + pi i k; S4D-Inv, -1/2 + i n/pi (n / (2 k + 1) - 1); or real, -(k + 1), which
    stays real. k = 0, 1, ..."""
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    "From A and the step size to the recurrence: zero-order hold or the bilinear rule."
    dt_min: float = 0.001
    "Smallest step size at initialisation."
    dt_max: float = 0.1
    "Largest step size at initialisation."


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Softmax attention with rotary positions (Su et al., 2021): full, or over a sliding window."""

    num_heads: int
    "Heads; must divide d_model into an even head size."
    window: int | None = None
    "Steps that each position sees, itself included; None means all."
    causal: bool = True
    "Whether a position sees only itself and the past."
    rope_base: float = 10000.0
    "Base of the rotary frequencies."
    bias: bool = False
    "Whether the projections have a bias."


@dataclass(frozen=True, kw_only=True)
class RNNConfig:
    """LSTM or GRU mixer, one layer, with an output projection: the recurrent baseline."""

    cell: Literal["lstm", "gru"] = "lstm"
    "Kind of cell."
    expand: int = 1
    "Hidden size = expand * d_model."


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Convolution over both sides of each step: the baseline of motifs and their neighbourhoods."""

    taps: int = 9
    "Taps; an odd number."
    dilation: int = 1
    "Steps between taps."


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig:
    """The same kind of mixer run forwards and on the reversed sequence, the two results added."""

    mixer: "MambaConfig | Mamba2Config | S4DConfig | RNNConfig"
    "The mixer of both directions."
    tie_projections: bool = False
    "Whether both directions share the input and output projections (Caduceus; Mamba and Mamba-2 only)."


MixerConfig = MambaConfig | Mamba2Config | S4DConfig | AttentionConfig | RNNConfig | ConvConfig | BidirectionalConfig


@dataclass(frozen=True, kw_only=True)
class KmerConfig:
    """Learned embeddings of the last k tokens together, added to each token's own."""

    k: int
    "Tokens per word."
    alphabet: tuple[int, ...]
    "Token ids that words are made of; a word with any other token has one shared embedding."
    width: int
    "Width of the table of words, projected to d_model."
    buckets: int | None = None
    "Rows of the table, to which words are hashed; None means a row for each of the len(alphabet)**k words."
    complement_map: tuple[int, ...] | None = None
    """For each token id that of its complement: a word and its reverse complement then share one embedding (canonical
    k-mers); None means that they do not."""


@dataclass(frozen=True, kw_only=True)
class StrandsConfig:
    """Reading DNA's other strand, the reverse complement, with the same weights (Caduceus; Schiff et al., 2024)."""

    complement_map: tuple[int, ...]
    "For each token id that of its complement."
    training: bool = True
    """Whether both strands are read in training too (Caduceus-PS), or only afterwards (post-hoc conjoining, as of
    Caduceus-Ph), which is for the heads 'sequence' and 'position'."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A stack of pre-norm residual layers of one width."""

    d_model: int
    "Width d of the residual stream."
    layers: tuple[MixerConfig, ...]
    "One mixer per layer."
    kmer: KmerConfig | None = None
    "Embeddings of k-mers beside those of single tokens; None means none."
    strands: StrandsConfig | None = None
    "How the other strand is read; None means that it is not."
    mlp_expand: float = 0.0
    "Hidden width of a gated MLP after each mixer, in units of d_model; 0 means no MLP."
    dropout: float = 0.0
    "Dropout on each mixer's and MLP's result while training."
    norm_epsilon: float = 1e-5
    "Epsilon of the RMSNorms."
    residual_in_fp32: bool = True
    "Whether the residual stream is kept in float32 when activations are narrower."


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One resolution of a multi-scale backbone: blocks on the way down (or at the centre) and on the way up."""

    d_model: int
    "Width of this stage."
    down: tuple[MixerConfig, ...]
    "Mixers before pooling to the next stage; at the last stage, the centre's mixers."
    up: tuple[MixerConfig, ...] = ()
    "Mixers after the next stage's result has come back; empty at the last stage."
    pool: int = 1
    "Steps of this stage that make one step of the next; 1 at the last stage."


@dataclass(frozen=True, kw_only=True)
class MultiscaleConfig:
    """A causal U-Net over time: coarser stages see pooled steps (SaShiMi; Goel et al., 2022)."""

    stages: tuple[StageConfig, ...]
    "Stages from the finest to the coarsest."
    mlp_expand: float = 0.0
    "As in BackboneConfig, for every stage."
    dropout: float = 0.0
    "As in BackboneConfig, for every stage."
    norm_epsilon: float = 1e-5
    "As in BackboneConfig."
    residual_in_fp32: bool = True
    "As in BackboneConfig."

    @property
    def d_model(self) -> int:
        """Width of the finest stage, which meets the embedding and the head."""
        return self.stages[0].d_model


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """A named label that a generative model is told: its values in order of their ids."""

    name: str
    "What the label is, for example 'digit' or 'speaker'."
    values: tuple[str, ...]
    "Names of the values; the id after the last one means 'not given'."


Targets = Literal["single", "multi", "regression"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is read off the backbone."""

    task: Literal["next_token", "masked_token", "sequence", "position"]
    "Next-token or masked-token logits, one label per sequence, or one label per position."
    labels: tuple[str, ...] = ()
    "Class names in order of their ids, for 'sequence' and 'position'."
    pool: Literal["last", "mean", "sqrt", "max"] = "mean"
    """How 'sequence' summarises the real positions: the last one, their mean, their sum divided by the square root of
    their number (noise keeps its size while evidence grows with the length), or their maximum."""
    dropout: float = 0.0
    "Dropout before the classifier while training."
    supervise_every: int = 0
    "While training a head that pools by mean or sqrt, also classify what was read after every so many positions."
    targets: Targets = "single"
    "What 'sequence' says of each: one class; any number of the classes, each by itself; or a number for each label."
    class_weights: tuple[float, ...] = ()
    """While training, the weight in the loss of a sequence of each class; with targets 'multi' that of a class being
    present. Nothing means 1."""
    complement: tuple[int, ...] = ()
    """Of 'position', for each label that of the same position read on the other strand (gene+ and gene-, say); nothing
    means that labels are the same on both."""
    scale: tuple[tuple[float, float], ...] = ()
    "Mean and standard deviation of each number to be predicted, in which units the head learns; nothing means 0 and 1."


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model."""

    vocab_size: int
    "Number of token ids (rows of the embedding)."
    backbone: BackboneConfig | MultiscaleConfig
    "The shared backbone."
    head: HeadConfig
    "The head."
    tie_embeddings: bool = True
    "Whether next-token and masked-token logits reuse the embedding."
    conditions: tuple[ConditionConfig, ...] = ()
    "Labels added to every position, for prompted generation."
    guidance: float = 1.0
    "Classifier-free guidance of what is generated when told labels or a text, unless said otherwise; 1 means none."
    tokenizer: dict[str, Any] = field(default_factory=dict)
    "What token ids mean, for example {'type': 'dna'} or {'type': 'mu_law', 'sample_rate': 8000, ...}."


def to_dict(config: Any) -> Any:
    """JSON-ready form of a configuration: each dataclass is an object whose `type` names its class."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__.removesuffix("Config"), **fields}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, float) and math.isinf(config):
        return "inf" if config > 0 else "-inf"  # JSON has no infinity
    return config


def from_dict(values: Any, where: str = "config") -> ModelConfig:
    """The ModelConfig that `to_dict` wrote; an InputError names the field that stands in the way."""
    return _parse(ModelConfig, values, where)


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass((kind,), value, where)
    if origin in (typing.Union, types.UnionType):
        classes = tuple(a for a in arguments if dataclasses.is_dataclass(a))
        if value is None and type(None) in arguments:
            return None
        if classes:
            return _parse_dataclass(classes, value, where)
        return _parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {value!r}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {value!r}; expected a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise InputError(f"{where} has {len(value)} items; expected {len(kinds)}")
        return tuple(_parse(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r}; expected an object")
        return value
    if kind is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"{where} is {value!r}; expected a number") from None
    if type(value) is not kind:
        raise InputError(f"{where} is {value!r}; expected {kind.__name__}")
    return value


def _parse_dataclass(classes: tuple[type, ...], value: Any, where: str) -> Any:
    names = {c.__name__.removesuffix("Config"): c for c in classes}
    if not isinstance(value, dict) or value.get("type") not in names:
        found = value.get("type") if isinstance(value, dict) else value
        raise InputError(f"{where}.type is {found!r}; expected one of {', '.join(names)}")
    chosen: Any = names[value["type"]]
    kinds = typing.get_type_hints(chosen)
    required = {f.name for f in dataclasses.fields(chosen) if f.default is f.default_factory is dataclasses.MISSING}
    given = {key: item for key, item in value.items() if key != "type"}
    if unknown := sorted(given.keys() - kinds.keys()):
        raise InputError(f"{where}.{unknown[0]} is not a field of {chosen.__name__}; remove it or update longseq")
    if missing := sorted(required - given.keys()):
        raise InputError(f"{where}.{missing[0]} is missing; {chosen.__name__} needs it")
    return chosen(**{key: _parse(kinds[key], item, f"{where}.{key}") for key, item in given.items()})
