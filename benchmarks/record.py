"""Writes what a benchmark measured to benchmarks/results/, with what is needed to repeat and to judge it."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "torch", "numba", "numpy", "triton", "lightning", "transformers", "mamba-ssm", "causal-conv1d", "fla-core"
)  # fmt: skip


def write_result(name: str, rows: list[dict[str, Any]], commit_given: str | None = None) -> Path:
    """The rows (one per measurement) with machine, versions, commit, command and date; returns the file's path."""
    record = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit_given or commit(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "rows": rows,
    }
    return _write(RESULTS / f"{name}.json", json.dumps(record, indent=2))


def origin(commit_given: str | None, *program: str) -> dict[str, Any]:
    """What every row of a GPU's program says beside its figures; commit_given where the sources are no checkout."""
    words = sys.argv[1:]
    if "--commit" in words:  # names what was measured, is no part of how
        del words[(at := words.index("--commit")) : at + 2]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions(),
        "commit": commit_given or commit(),
        "command": shlex.join([*(program or ["python"]), os.path.relpath(sys.argv[0]), *words]),
    }  # fmt: skip


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Rows that say everything themselves, one per line, to a folder named after their GPU; returns the file's path.

    Rows of the file that measured something else than these stay.
    """
    folder = rows[0]["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "-")
    path = RESULTS / folder / f"{name}.json"
    measured = [_measured(row) for row in rows]
    others = [row for row in json.loads(path.read_text()) if _measured(row) not in measured] if path.exists() else []
    return _write(path, "[\n" + ",\n".join(map(json.dumps, others + rows)) + "\n]")


def _measured(row: dict[str, Any]) -> list[Any]:
    return [row.get(key) for key in ("op", "impl", "shape", "l", "dtype", "pass", "ranks", "device", "devices")]


def _write(path: Path, text: str) -> Path:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.part")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
    return path


def machine() -> dict[str, Any]:
    """Processor, threads in use, memory, and the GPU if there is one."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system()
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for speed, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checked-out commit, marked '-dirty' where tracked files differ from it; 'unknown' outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    """Its name with family and model, since a virtual machine may hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(reversed([tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]))
    name = fields.get("model name", platform.processor())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name
