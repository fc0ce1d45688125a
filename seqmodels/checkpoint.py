"""Checkpoints: a folder with config.json and model.safetensors (and a model card, README.md).

`load` also reads folders of Hugging Face's Mamba and Mamba-2, of state-spaces/mamba (seqmodels/interop.py) and of
Caduceus (seqmodels/caduceus.py). Nothing is ever unpickled: `pytorch_model.bin` is read with torch's weights_only
loader.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seqmodels.config import ModelConfig, from_dict, to_dict
from seqmodels.errors import InputError
from seqmodels.files import make_folder, replacing, write_json
from seqmodels.heads import LanguageModel, Model, PositionClassifier, SequenceClassifier, build

FORMAT = "longseq-1"
SHIPPED = Path(__file__).parent / "checkpoints"


def save(model: Model, folder: str | Path, *, card: str | None = None, dtype: torch.dtype | None = None) -> Path:
    """Write a model's folder, file by file and each at once; floating-point weights in `dtype` if given."""
    return save_parts(Path(folder), FORMAT, to_dict(model.config), unshared(model, dtype), card)


def save_parts(folder: Path, kind: str, about: dict[str, Any], tensors: dict[str, Tensor], card: str | None) -> Path:
    """The same from its parts: the format's name, what config.json says of the model, its weights and its card."""
    make_folder(folder)
    write_json(folder / "config.json", {"format": kind, "model": about})
    if card is not None:
        with replacing(folder / "README.md") as temporary:
            temporary.write_text(card, encoding="utf-8")
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def format_of(folder: str | Path) -> str | None:
    """The format that config.json of a model's folder names; None where there is no such folder, file or name."""
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError):
        return None


def unshared(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every parameter once, under its first name, on the CPU: tied ones have no second copy in a file."""
    return {
        name: parameter.detach().to("cpu", dtype or parameter.dtype).contiguous()
        for name, parameter in model.named_parameters()
    }


def load(
    path_or_name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel | SequenceClassifier | PositionClassifier:
    """A model in eval mode from a shipped name, a folder, or a Hugging Face Hub id; weights in `dtype` (float32).

    Raises InputError that names the file and the field or tensor that stands in the way.
    """
    folder = resolve(path_or_name)
    config, tensors = read(folder)
    with _as_said(folder):
        try:
            with _AtMost(4 * sum(tensor.numel() for tensor in tensors.values()) + (1 << 20)):
                model = build(config)
        except _TooLargeError:  # or so it seems: no memory for what config.json makes too large
            with torch.device("meta"):  # not always: this imports PyTorch's compiler, for two seconds
                check(build(config), tensors, folder)
            model = build(config)
        check(model, tensors, folder)
    fill(model, tensors)
    return model.to(device=device, dtype=dtype or torch.float32).eval()


class _TooLargeError(Exception):
    """More elements than a checkpoint can fill."""


class _AtMost(TorchFunctionMode):
    """A context in which new tensors have so many elements in all."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.left = elements

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones, torch.full):
            size = args[0] if args and isinstance(args[0], (tuple, list)) else [n for n in args if isinstance(n, int)]
            self.left -= math.prod(size)
            if self.left < 0:
                raise _TooLargeError
        return func(*args, **(kwargs or {}))


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and tensors, under our names, of a checkpoint's folder of any format that `load` reads."""
    from seqmodels import interop

    values = read_json(folder / "config.json")
    if values.get("format") != FORMAT:
        with _as_said(folder):
            config, tensors = interop.read(folder, values)
            return from_dict(to_dict(config), f"{folder / 'config.json'}: in our terms, model"), tensors
    return from_dict(values.get("model"), f"{folder / 'config.json'}: model"), read_tensors(folder)


@contextmanager
def _as_said(folder: Path) -> Iterator[None]:
    """Where what config.json says makes no model, it is the file that is refused."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder / 'config.json'}: no model can be built as it says ({reason}); correct it") from None


def choose_device(name: str) -> torch.device:
    """The device of that name; 'auto' is the GPU if there is one. An InputError if it cannot be used here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(
            f"device {name!r} is not available here; use auto, cpu, or cuda where there is a GPU"
        ) from None


def resolve(path_or_name: str | Path) -> Path:
    """The folder of a shipped checkpoint, of a path, or of a Hub repository (downloaded once, never its code)."""
    for folder in (Path(path_or_name), SHIPPED / str(path_or_name)):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise InputError(f"{folder}: no config.json in this folder; give a checkpoint's folder")
            return folder
    name = str(path_or_name)
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{name}: no such checkpoint; give a folder, owner/name on the Hub, or one of: {shipped}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["config.json", "model*.safetensors*", "pytorch_model.bin"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        reason = "neither a folder here nor a repository that could be reached on the Hub"
        raise InputError(f"{name}: {reason}; check the name, or give one of: {shipped}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error}); fetch the checkpoint again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object; fetch the checkpoint again")
    return values


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, its shards, or pytorch_model.bin without unpickling objects."""
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    if (index := folder / "model.safetensors.index.json").is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        return {name: tensor for shard in shards for name, tensor in _read_safetensors(folder / shard).items()}
    if (pickled := folder / "pytorch_model.bin").is_file():
        try:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch's reader says of a bad file, it is the file that is refused
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{pickled}: refused, not a plain file of tensors ({reason}); convert it to safetensors"
            ) from None
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise InputError(f"{pickled}: refused, it holds more than tensors; convert it to safetensors")
        return tensors
    raise InputError(f"{folder}: no model.safetensors and no pytorch_model.bin; fetch the checkpoint again")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); fetch the checkpoint again") from None


def check(model: Model, tensors: dict[str, Tensor], source: Path) -> None:
    """Refuses by name a tensor of a model that is missing, surplus or of another shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned = dict(model.named_parameters())
    if missing := sorted(owned.keys() - tensors.keys()):
        raise InputError(
            f"{source}: tensor {missing[0]} is missing ({len(missing)} in all); fetch the checkpoint again"
        )
    if surplus := sorted(tensors.keys() - parameters.keys()):
        raise InputError(f"{source}: tensor {surplus[0]} is not part of the configured model ({len(surplus)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            found, wanted = tuple(tensor.shape), tuple(parameters[name].shape)
            raise InputError(f"{source}: tensor {name} has shape {found}; config.json makes it {wanted}")


def fill(model: Model, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a model, of which `check` has approved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
