"""The manifest beside a table, <table>.json: what made it, from what, and what came out. It is written last."""

import hashlib
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from seqmodels.checkpoint import resolve
from seqmodels.files import write_json

_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model.bin")


def manifest_of(table: Path) -> Path:
    """Where the manifest of a table is."""
    return table.with_name(f"{table.name}.json")


def write_manifest(
    table: Path,
    model: str,
    *,
    inputs: list[Path],
    outputs: list[Path],
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    problems: list[str],
) -> Path:
    """Writes it: files with their size and time, or their sha256 where they have been written or are a model's."""
    folder = resolve(model)
    weights = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    values = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("longseq", "torch", "numpy")}
        | {"python": sys.version.split()[0]},
        "model": {"name": model, "sha256": {path.name: _sha256(path) for path in weights}},
        "inputs": [_input(path) for path in inputs],
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "rows": sum(counts.values()),
        "status": dict(sorted(counts.items())),
        "problems": problems,
        "outputs": [
            {"file": str(path), "size": path.stat().st_size, "sha256": _sha256(path)} for path in (table, *outputs)
        ],
    }
    write_json(manifest_of(table), values)
    return manifest_of(table)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _input(path: Path) -> dict[str, Any]:
    if str(path) == "-" or not path.is_file():  # a pipe, or what could not be read
        return {"file": str(path)}
    found = path.stat()
    modified = datetime.fromtimestamp(found.st_mtime, UTC).isoformat(timespec="seconds")
    return {"file": str(path), "size": found.st_size, "modified": modified}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
