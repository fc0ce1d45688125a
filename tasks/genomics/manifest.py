"""The manifest beside a table, <table>.json: what made it, from what, and what came out. It is written last.

What it says of model, inputs and settings is also what must be the same when the table is resumed (seqmodels/table.py).
"""

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from seqmodels.checkpoint import resolve
from seqmodels.files import write_json
from seqmodels.table import check_same, part_of

_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model.bin")


def manifest_of(table: Path) -> Path:
    """Where the manifest of a table is."""
    return table.with_name(f"{table.name}.json")


class Manifest:
    """What a table is made from: the model's weights, the files, and the settings that its rows depend on.

    For a table on the screen (None) there is none, and nothing is done.
    """

    def __init__(self, table: Path | None, model: str, inputs: list[Path], settings: Mapping[str, Any]) -> None:
        self._table, self.made = table, None
        if table is not None:
            folder = resolve(model)
            weights = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
            self.made = {
                "model": {"name": model, "sha256": {path.name: _sha256(path) for path in weights}},
                "inputs": [_input(path) for path in inputs],
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
            }

    def is_whole(self) -> bool:
        """Whether the table is there and whole, so that nothing is to be resumed, which is said.

        An InputError if its manifest says that it was made otherwise.
        """
        table = self._table
        if table is None or self.made is None or not table.exists() or part_of(table).exists():
            return False
        if manifest_of(table).exists():
            check_same(str(table), manifest_of(table), self.made)
        print(f"{table} is there and whole: nothing to resume", file=sys.stderr)
        return True

    def forget(self) -> None:
        """Removes a manifest that speaks of another table, before the new one takes its place."""
        if self._table is not None:
            manifest_of(self._table).unlink(missing_ok=True)

    def write(self, counts: Mapping[str, int], problems: list[str], outputs: Sequence[Path] = ()) -> None:
        """Writes it: files with their size and time, or their sha256 where they have been written or are a model's."""
        if self._table is None or self.made is None:
            return
        values = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: _version(name) for name in ("longseq", "torch", "numpy")}
            | {"python": sys.version.split()[0]},
            **self.made,
            "rows": sum(counts.values()),
            "status": dict(sorted(counts.items())),
            "problems": problems,
            "outputs": [
                {"file": str(path), "size": path.stat().st_size, "sha256": _sha256(path)}
                for path in (self._table, *outputs)
            ],
        }
        write_json(manifest_of(self._table), values)


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
