"""Checkpoints of Caduceus (Schiff et al., "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling",
2024), read and written in the format of the published models.

Caduceus-PS (`rcps`) carries features a, b (l, d) of the two strands, each in its own direction, through layers that
share their weights. A layer L of a model with `fused_add_norm`, as all published ones are, also exchanges them:

    fused:  a, b = L(P b), L(P a)        otherwise, and here:  a, b = L(a), L(b)        P: reverses steps and channels

Since P P = 1, the fused layers 0, 2, 4, ... are P L P of a model that exchanges nothing. P L P is L with the directions
of its mixers exchanged and its channels reversed: the columns of in_proj, the rows of out_proj, and the norm. After an
odd number of layers the features lie exchanged, so that norm_f and the head are reversed as well, the latter between
complements; it then is no longer the embedding.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqmodels.checkpoint import read_tensors, unshared, write_tensors
from seqmodels.config import (
    BackboneConfig,
    BidirectionalConfig,
    HeadConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    StrandsConfig,
    Targets,
)
from seqmodels.errors import InputError
from seqmodels.files import make_folder, write_json
from seqmodels.heads import LanguageModel, SequenceClassifier
from seqmodels.interop import needed, refuse, ssm_cfg_of, ssm_mixer

VOCABULARY = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
COMPLEMENT_MAP = (*range(7), 10, 9, 8, 7, *range(11, 16))  # with the four ids that pad the vocabulary
TOKENIZER = {"type": "dna", "vocabulary": list(VOCABULARY)}
"What our config.json says about such tokens."

Tensors = dict[str, Tensor]

_TARGETS: dict[Any, Targets] = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}


def find_config(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Caduceus' configuration in a config.json, with what stands around it; None if it is another model's.

    Hugging Face folders hold it as such; training runs, as `config` of a model or of the `model` of everything.
    """
    if values.get("model_type") == "caduceus":
        return values, values
    around = values["model"] if isinstance(values.get("model"), dict) else values
    inner = around.get("config")
    if isinstance(inner, dict) and str(inner.get("_target_")).endswith("CaduceusConfig"):
        return inner, around
    return None


def read(folder: Path, values: dict[str, Any], around: dict[str, Any]) -> tuple[ModelConfig, Tensors]:
    """Configuration and tensors, under our names, of a folder whose configuration `find_config` has found."""
    where = folder / "config.json"
    refuse(
        values, where,
        {"rms_norm": (True,), "bidirectional": (True, "true,"), "bidirectional_strategy": ("add", None)},
    )  # fmt: skip  # their default YAML says "true,"
    get = needed(values, where)
    for field in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
        if type(values.get(field, 8)) is not int or values.get(field, 8) < (field != "n_layer"):
            raise InputError(f"{where}: {field} is {values[field]!r}; expected a number of at least 1")
    width, layers, both = get("d_model"), get("n_layer"), bool(values.get("rcps", False))
    tied = bool(values.get("bidirectional_weight_tie", True))
    multiple = values.get("pad_vocab_size_multiple", 8)
    size = -(-get("vocab_size") // multiple) * multiple
    tensors, maps = _renamed(read_tensors(folder))
    _untie(tensors, tied, folder)
    complement_map = _complement_map(_object(values, "complement_map", where), maps, size, folder)
    tie_embeddings = "lm_head.weight" not in tensors
    if both and values.get("fused_add_norm", True):
        tensors = exchanged(tensors, tied)
        if layers % 2:
            tie_embeddings = False
            tensors |= _reversed_end(tensors, torch.tensor(complement_map))
    strands = StrandsConfig(complement_map=complement_map) if both else None
    if (score := tensors.get("score.weight")) is not None and score.dim() == 2:
        names = _object(values, "id2label", where)
        head = HeadConfig(
            task="sequence",
            labels=tuple(names.get(str(i), str(i)) for i in range(len(score))),
            targets=_TARGETS.get(values.get("problem_type"), "regression" if len(score) == 1 else "single"),
        )
        tensors.pop("lm_head.weight", None)
        tensors.setdefault("score.bias", score.new_zeros(len(score)))
        tie_embeddings = True
        conjoined = {name: around.get(name) for name in ("conjoin_train", "conjoin_eval", "conjoin_test")}
        if strands is None and any(conjoined.values()):
            strands = StrandsConfig(complement_map=complement_map, training=bool(conjoined["conjoin_train"]))
    else:
        head = HeadConfig(task="masked_token")
    mixer = BidirectionalConfig(mixer=ssm_mixer(values, where), tie_projections=tied)
    backbone = BackboneConfig(
        d_model=width,
        layers=(mixer,) * layers,
        strands=strands,
        norm_epsilon=values.get("norm_epsilon", 1e-5),
        residual_in_fp32=values.get("residual_in_fp32", True),
    )
    known = complement_map == COMPLEMENT_MAP
    config = ModelConfig(
        vocab_size=size,
        backbone=backbone,
        head=head,
        tie_embeddings=tie_embeddings,
        tokenizer=TOKENIZER if known else {},
    )
    return config, tensors


def _object(values: dict[str, Any], field: str, where: Path) -> dict[str, Any]:
    """A field of a configuration that is an object, or null."""
    value = values.get(field)
    if not isinstance(value, dict | None):
        raise InputError(f"{where}: {field} is {value!r}; expected an object")
    return value or {}


def _renamed(tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    """Tensors under our names, whatever stands before them (Lightning's `model.`), and their complement maps."""
    found, maps = {}, []
    for name, tensor in tensors.items():
        if name.endswith("complement_map"):
            maps.append(tensor)
            continue
        for theirs, ours in _NAMES:
            if match := re.search(theirs, name):
                name = match.expand(ours).replace(".submodule.", ".")
                break
        found[name] = tensor
    return found, maps


_NAMES = (
    (r"(?:^|\.)backbone\.embeddings\.word_embeddings\.(?:embedding\.)?weight$", "backbone.embedding.weight"),
    (r"(?:^|\.)(backbone\.(?:layers|norm_f)\..*)$", r"\1"),
    (r"(?:^|\.)(?:lm_head\.)?lm_head\.weight$", "lm_head.weight"),
    (r"(?:^|\.)(?:score|decoder\.0\.output_transform)\.(weight|bias)$", r"score.\1"),
)


def _untie(tensors: Tensors, tied: bool, folder: Path) -> None:
    """Leaves tied tensors once, under the name that comes first; a file may hold either, or both."""
    pairs = [("backbone.embedding.weight", "lm_head.weight")] if "score.weight" not in tensors else []
    if tied:
        backward = [n for n in tensors if re.search(r"\.mamba_rev\.(in|out)_proj\.", n)]
        pairs += [(name.replace("mamba_rev", "mamba_fwd"), name) for name in backward]
    for first, second in pairs:
        if second not in tensors:
            continue
        if first not in tensors:
            tensors[first] = tensors.pop(second)
        elif torch.equal(tensors[first], tensors[second]):
            del tensors[second]
        elif first != "backbone.embedding.weight":
            raise InputError(
                f"{folder}: tensor {second} differs from that of the other direction, though config.json says "
                "bidirectional_weight_tie; correct it"
            )


def _complement_map(given: dict[str, Any], maps: list[Tensor], size: int, folder: Path) -> tuple[int, ...]:
    """The complement of each id: as in the tensors, which their models use; else as in config.json; else as usual."""
    if any(not torch.equal(one, maps[0]) for one in maps):
        raise InputError(f"{folder}: the complement maps of embedding and head differ; fetch the checkpoint again")
    if maps:
        ids = tuple(maps[0].flatten().tolist())
    elif given:
        ids = tuple(given.get(str(i), i) for i in range(size))
    else:
        ids = COMPLEMENT_MAP if size == len(COMPLEMENT_MAP) else tuple(range(size))
    if len(ids) != size or any(type(i) is not int or not 0 <= i < size for i in ids):
        raise InputError(f"{folder}: complement_map is {list(ids)}; expected an id for each of {size}")
    return ids


def exchanged(tensors: Tensors, tied: bool) -> Tensors:
    """The tensors of a fused model as those of one that exchanges nothing, and the other way round: P L P for even L.

    That is all for an even number of layers.
    """
    result = {}
    for name, tensor in tensors.items():
        layer = re.match(r"backbone\.layers\.\d*[02468]\.", name)
        if layer is not None:
            if name.endswith(".in_proj.weight"):
                tensor = tensor.flip(-1)
            elif name.endswith((".out_proj.weight", ".out_proj.bias")) or name == f"{layer[0]}norm.weight":
                tensor = tensor.flip(0)
            if not (tied and re.search(r"\.(in|out)_proj\.", name)):
                name = re.sub(r"mamba_(fwd|rev)", lambda m: "mamba_rev" if m[1] == "fwd" else "mamba_fwd", name)
        result[name] = tensor
    return result


def _reversed_end(tensors: Tensors, complement: Tensor) -> Tensors:
    """What comes after an odd number of fused layers."""
    changed = {name: tensors[name].flip(-1) for name in ("backbone.norm_f.weight", "score.weight") if name in tensors}
    head = tensors.get("lm_head.weight", tensors.get("backbone.embedding.weight"))
    if head is not None and head.shape[:1] == complement.shape:
        changed["lm_head.weight"] = head[complement].flip(-1)
    return changed


def save_caduceus(model: LanguageModel | SequenceClassifier, folder: str | Path) -> Path:
    """Write a Caduceus model in the format of the published ones: config.json and model.safetensors.

    Tied tensors are written under both names, since transformers from 4.45 or so leaves those that are missing untied.
    A model of both strands is written for the fused branch; one of an odd number of layers for the other, unless it was
    read from a fused one. A conjoined classifier is a Caduceus-Ph with `conjoin_eval`. Mamba-2 mixers, which the public
    code lacks, stand in ssm_cfg as in state-spaces/mamba.
    """
    folder, backbone, mixer = Path(folder), *_checked(model)
    layers, strands = len(backbone.layers), backbone.strands
    both = strands is not None and strands.training
    tensors = unshared(model)
    fused = not both or layers % 2 == 0 or not model.config.tie_embeddings
    if both and fused:
        tensors = exchanged(tensors, mixer.tie_projections)
        if layers % 2:
            tensors |= _reversed_end(tensors, torch.tensor(strands.complement_map))
        _untie(tensors, mixer.tie_projections, folder)
        if "lm_head.weight" in tensors:
            raise InputError("the head of a Caduceus-PS is its embedding, and this model's is not (tie_embeddings)")
    tensors.pop("score.bias", None)
    wrapped, norm = (".submodule." if both else "."), (".submodule." if not fused else ".")
    if isinstance(model, LanguageModel):
        tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"].clone())
    if mixer.tie_projections:
        projections = [name for name in tensors if re.search(r"\.mamba_fwd\.(in|out)_proj\.", name)]
        tensors |= {name.replace("mamba_fwd", "mamba_rev"): tensors[name].clone() for name in projections}
    theirs = {}
    for name, tensor in tensors.items():
        name = name.replace(".mixer.", f".mixer{wrapped}", 1)
        name = re.sub(r"(layers\.\d+\.norm|norm_f)\.(?=weight$)", rf"\1{norm}", name)
        embedding = f"backbone.embeddings.word_embeddings.{'embedding.' if both else ''}weight"
        name = name.replace("backbone.embedding.weight", embedding)
        name = name.replace("lm_head.", "lm_head.lm_head.") if both else name
        theirs[f"caduceus.{name}" if name.startswith("backbone.") else name] = tensor.contiguous()
    values = _values(model.config, backbone, mixer, fused, both)
    if both:
        complement = torch.tensor(strands.complement_map)
        theirs["caduceus.backbone.embeddings.word_embeddings.complement_map"] = complement
        if isinstance(model, LanguageModel):
            theirs["lm_head.complement_map"] = complement.clone()
    make_folder(folder)
    write_json(folder / "config.json", values)
    write_tensors(folder / "model.safetensors", theirs)
    return folder


def _checked(model: Any) -> tuple[BackboneConfig, BidirectionalConfig]:
    """Backbone and mixer of a model that the format can hold."""
    config, backbone = model.config, model.config.backbone
    mixers = set(backbone.layers) if isinstance(backbone, BackboneConfig) else set()
    mixer = next(iter(mixers), None)
    if (
        len(mixers) != 1
        or not isinstance(mixer, BidirectionalConfig)
        or not isinstance(mixer.mixer, (MambaConfig, Mamba2Config))
    ):
        raise InputError("Caduceus has the same bidirectional Mamba mixer in every layer; this model does not")
    if backbone.mlp_expand or backbone.kmer or config.conditions:
        raise InputError("Caduceus has no MLP, k-mers or conditions (mlp_expand, kmer, conditions)")
    if config.head.task == "position" or (config.head.task == "sequence" and config.head.pool != "mean"):
        raise InputError("Caduceus predicts masked tokens, or labels sequences by their mean; this model does neither")
    if config.head.task == "sequence" and (model.score.bias.any() or config.head.scale):
        raise InputError("Caduceus' classifier has no bias and no scale, as this model's; save it with seqmodels.save")
    return backbone, mixer


def _values(
    config: ModelConfig, backbone: BackboneConfig, mixer: BidirectionalConfig, fused: bool, both: bool
) -> dict[str, Any]:
    strands, labels = backbone.strands, config.head.labels
    complement_map = COMPLEMENT_MAP if config.tokenizer.get("type") == "dna" else None
    complement_map = complement_map if strands is None else strands.complement_map
    values: dict[str, Any] = {
        "model_type": "caduceus",
        "architectures": ["CaduceusForSequenceClassification" if labels else "CaduceusForMaskedLM"],
        "d_model": backbone.d_model,
        "n_layer": len(backbone.layers),
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 1 if config.vocab_size % 8 else 8,
        "ssm_cfg": ssm_cfg_of(mixer.mixer),
        "rms_norm": True,
        "fused_add_norm": fused,
        "residual_in_fp32": backbone.residual_in_fp32,
        "norm_epsilon": backbone.norm_epsilon,
        "bidirectional": True,
        "bidirectional_strategy": "add",
        "bidirectional_weight_tie": mixer.tie_projections,
        "rcps": both,
        "complement_map": None if complement_map is None else {str(i): c for i, c in enumerate(complement_map)},
        "tie_word_embeddings": config.tie_embeddings or both,
    }
    if labels:
        values |= {
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "conjoin_eval": bool(strands) and not both,
        }
        values["problem_type"] = next(theirs for theirs, ours in _TARGETS.items() if ours == config.head.targets)
        values["label2id"] = {name: i for i, name in enumerate(labels)}
    return values
