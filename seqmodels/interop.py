"""Other projects' checkpoints: read Hugging Face Mamba and Mamba-2 and state-spaces/mamba, write Hugging Face's format.

Caduceus' are in caduceus.py.

What these formats can say and our models cannot do is refused, naming the field.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from seqmodels.checkpoint import read_tensors, unshared, write_tensors
from seqmodels.config import BackboneConfig, HeadConfig, Mamba2Config, MambaConfig, ModelConfig, to_dict
from seqmodels.errors import InputError
from seqmodels.files import make_folder, write_json
from seqmodels.heads import LanguageModel


def read(folder: Path, values: dict[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and tensors, under our names, of a folder whose config.json holds `values`."""
    from seqmodels import caduceus

    where = folder / "config.json"
    if (found := caduceus.find_config(values)) is not None:
        return caduceus.read(folder, *found)
    if values.get("model_type") in ("mamba", "mamba2"):
        config = _from_huggingface(values, where)
    elif "d_model" in values and "n_layer" in values:
        config = _from_state_spaces(values, where)
    else:
        found = values.get("model_type") or values.get("format")
        raise InputError(
            f"{where}: model_type is {found!r}; longseq reads its own folders, Hugging Face mamba and mamba2, "
            "state-spaces/mamba and Caduceus"
        )
    tensors = {
        name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in read_tensors(folder).items()
    }
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    rows = tensors.get("backbone.embedding.weight")
    if rows is not None and rows.dim() == 2 and "d_model" in values:  # state-spaces pads the vocabulary
        multiple = values.get("pad_vocab_size_multiple", 8)
        if len(rows) == -(-config.vocab_size // multiple) * multiple:
            config = _with_vocabulary(config, len(rows))
    return config, tensors


def _with_vocabulary(config: ModelConfig, size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=size, backbone=config.backbone, head=config.head, tie_embeddings=config.tie_embeddings
    )


def refuse(values: dict[str, Any], where: Path, expected: dict[str, tuple[Any, ...]]) -> None:
    """Refuses a configuration in which a field has another value than those given."""
    for field, allowed in expected.items():
        if field in values and values[field] not in allowed:
            raise InputError(f"{where}: {field} is {values[field]!r}, which longseq cannot do (only {allowed[0]!r})")


def needed(values: dict[str, Any], where: Path) -> Callable[[str], Any]:
    """What gives a field of a configuration, or refuses it where it is missing."""

    def get(field: str) -> Any:
        if field not in values:
            raise InputError(f"{where}: {field} is missing; the checkpoint does not say how it was built")
        return values[field]

    return get


def _from_huggingface(values: dict[str, Any], where: Path) -> ModelConfig:
    refuse(values, where, {"hidden_act": ("silu", "swish")})
    get = needed(values, where)
    width, epsilon = get("hidden_size"), values.get("layer_norm_epsilon", 1e-5)
    shared = {
        "d_state": get("state_size"),
        "d_conv": values.get("conv_kernel", 4),
        "bias": values.get("use_bias", False),
        "conv_bias": values.get("use_conv_bias", True),
        "dt_min": values.get("time_step_min", 0.001),
        "dt_max": values.get("time_step_max", 0.1),
        "dt_init_floor": values.get("time_step_floor", 1e-4),
    }
    expand = _whole(values.get("expand", 2), "expand", where)
    if values["model_type"] == "mamba":
        if values.get("intermediate_size", expand * width) != expand * width:
            raise InputError(f"{where}: intermediate_size is {values['intermediate_size']}, not expand * hidden_size")
        rank = values.get("time_step_rank", "auto")
        mixer = MambaConfig(expand=expand, dt_rank=None if rank == "auto" else rank, **shared)
        tied = values.get("tie_word_embeddings", True)
    else:
        heads, head_dim = get("num_heads"), get("head_dim")
        if heads * head_dim != expand * width:
            raise InputError(f"{where}: num_heads * head_dim = {heads * head_dim} is not expand * hidden_size")
        low, high = values.get("time_step_limit", (0.0, float("inf")))
        mixer = Mamba2Config(
            expand=expand,
            head_dim=head_dim,
            n_groups=values.get("n_groups", 8),
            dt_limit=(_number(low), _number(high)),
            norm_epsilon=epsilon,
            **shared,
        )
        tied = values.get("tie_word_embeddings", False)
    backbone = BackboneConfig(
        d_model=width,
        layers=(mixer,) * get("num_hidden_layers"),
        norm_epsilon=epsilon,
        residual_in_fp32=values.get("residual_in_fp32", True),
    )
    head = HeadConfig(task="next_token")
    return ModelConfig(vocab_size=get("vocab_size"), backbone=backbone, head=head, tie_embeddings=tied)


def _from_state_spaces(values: dict[str, Any], where: Path) -> ModelConfig:
    refuse(
        values,
        where,
        {"rms_norm": (True,), "attn_layer_idx": ([], None), "attn_cfg": ({}, None)},
    )
    get = needed(values, where)
    width, mixer = get("d_model"), ssm_mixer(values, where)
    hidden = values.get("d_intermediate", 0)
    backbone = BackboneConfig(
        d_model=width,
        layers=(mixer,) * get("n_layer"),
        mlp_expand=hidden / width,
        residual_in_fp32=values.get("residual_in_fp32", True),
    )
    return ModelConfig(
        vocab_size=get("vocab_size"),
        backbone=backbone,
        head=HeadConfig(task="next_token"),
        tie_embeddings=values.get("tie_embeddings", True),
    )


_SSM_NAMES = {"headdim": "head_dim", "ngroups": "n_groups", "rmsnorm": "gated_norm", "D_has_hdim": "D_has_head_dim"}


def ssm_mixer(values: dict[str, Any], where: Path) -> MambaConfig | Mamba2Config:
    """The mixer that ssm_cfg describes."""
    width, ssm = values["d_model"], values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise InputError(f"{where}: ssm_cfg is {ssm!r}; expected an object")
    ssm = dict(ssm)
    layer = ssm.pop("layer", "Mamba1")
    ignored = {"use_fast_path", "dt_init", "dt_scale", "activation", "use_mem_eff_path", "A_init_range"}
    classes: dict[str, type[MambaConfig] | type[Mamba2Config]] = {"Mamba1": MambaConfig, "Mamba2": Mamba2Config}
    if layer not in classes:
        raise InputError(f"{where}: ssm_cfg.layer is {layer!r}, which longseq cannot do (only Mamba1 and Mamba2)")
    refuse(ssm, where, {"activation": ("silu", "swish")})
    known = classes[layer].__dataclass_fields__
    fields: dict[str, Any] = {}
    for key, value in ssm.items():
        name = _SSM_NAMES.get(key, key)
        if key == "dt_rank":
            fields[name] = None if value == "auto" else value
        elif name in known:
            fields[name] = value
        elif key not in ignored and not (key == "d_ssm" and value in (None, ssm.get("expand", 2) * width)):
            raise InputError(f"{where}: ssm_cfg.{key} = {value!r} is something longseq cannot do")
    fields = {key: value for key, value in fields.items() if key != "A_init_range"}
    return classes[layer](**fields)


def ssm_cfg_of(mixer: MambaConfig | Mamba2Config) -> dict[str, Any]:
    """The ssm_cfg that describes a mixer."""
    names = {ours: theirs for theirs, ours in _SSM_NAMES.items()}
    fields = {names.get(name, name): value for name, value in dataclasses.asdict(mixer).items()}
    if isinstance(mixer, MambaConfig):
        return fields | {
            "dt_rank": mixer.dt_rank or "auto",
            "dt_init": "random",
            "dt_scale": 1.0,
            "use_fast_path": True,
        }
    return {"layer": "Mamba2", **fields, "dt_limit": to_dict(mixer.dt_limit)}


def _number(value: Any) -> float:
    """A number as transformers writes it: infinity is {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _whole(value: Any, field: str, where: Path) -> int:
    if int(value) != value:
        raise InputError(f"{where}: {field} is {value}, not a whole number, which longseq cannot do")
    return int(value)


def save_huggingface(model: LanguageModel, folder: str | Path) -> Path:
    """Write a Mamba or Mamba-2 language model so that transformers' AutoModelForCausalLM reads it."""
    folder, values = Path(folder), _to_huggingface(model)
    make_folder(folder)
    tensors = {n.replace("backbone.embedding.", "backbone.embeddings."): t for n, t in unshared(model).items()}
    write_json(folder / "config.json", values)
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def _to_huggingface(model: LanguageModel) -> dict[str, Any]:
    config, backbone = model.config, model.config.backbone
    if not isinstance(model, LanguageModel) or not isinstance(backbone, BackboneConfig):
        raise InputError("Hugging Face's Mamba is a flat next-token model; this model has another head or backbone")
    kinds = set(backbone.layers)
    mixer = backbone.layers[0]
    if len(kinds) != 1 or not isinstance(mixer, (MambaConfig, Mamba2Config)):
        raise InputError("Hugging Face's Mamba has the same Mamba or Mamba-2 mixer in every layer; this model does not")
    if backbone.mlp_expand or backbone.kmer or config.conditions:
        raise InputError("Hugging Face's Mamba has no MLP, k-mers or conditions (mlp_expand, kmer, conditions)")
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": backbone.d_model,
        "num_hidden_layers": len(backbone.layers),
        "layer_norm_epsilon": backbone.norm_epsilon,
        "residual_in_fp32": backbone.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_init_floor,
    }
    if isinstance(mixer, MambaConfig):
        rank = mixer.dt_rank or -(-backbone.d_model // 16)
        inner = mixer.expand * backbone.d_model
        return {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "time_step_rank": rank,
                "intermediate_size": inner, **values}  # fmt: skip
    plain = {
        "gated_norm": True,
        "norm_before_gate": False,
        "D_has_head_dim": False,
        "norm_epsilon": backbone.norm_epsilon,
    }
    for field, value in plain.items():
        if getattr(mixer, field) != value:
            raise InputError(f"Hugging Face's Mamba-2 cannot say {field} = {getattr(mixer, field)!r} (only {value!r})")
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": mixer.expand * backbone.d_model // mixer.head_dim,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.n_groups,
        "time_step_limit": list(mixer.dt_limit),
        "chunk_size": mixer.chunk_size,
        **values,
    }
