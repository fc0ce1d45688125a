"""Figures with what is needed to judge and to repeat them: machine, versions, commit, and rows in a JSON file."""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seqmodels.files import make_folder, replacing

Row = Mapping[str, Any]
_PACKAGES = (
    "torch", "numba", "numpy", "triton", "lightning", "transformers", "mamba-ssm", "causal-conv1d", "fla-core"
)  # fmt: skip


def add_rows(path: Path, rows: Sequence[Row], same: Sequence[str]) -> Path:
    """Adds rows to a JSON list, one per line, in place of those that agree with one of them in all the fields `same`.

    Processes may add to one file at the same time.
    """
    make_folder(path.parent)
    new = [[row.get(field) for field in same] for row in map(_as_read, rows)]
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        there = json.loads(path.read_text()) if path.exists() else []
        kept = [row for row in there if [row.get(field) for field in same] not in new]
        with replacing(path) as temporary:
            temporary.write_text("[\n" + ",\n".join(map(json.dumps, [*kept, *rows])) + "\n]\n")
    finally:
        os.close(folder)  # and with it the lock
    return path


def _as_read(row: Row) -> Row:
    return json.loads(json.dumps(row))


def machine() -> dict[str, Any]:
    """Processor, threads in use, memory, and the GPU if there is one."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system()
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def device_name(device: torch.device) -> str:
    """A GPU's name, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def folder_of(gpu: str) -> str:
    """What the folder of a GPU's results is called: h200 for 'NVIDIA H200'."""
    return gpu.removeprefix("NVIDIA ").lower().replace(" ", "-")


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
    """The checked-out commit, marked '-dirty' where tracked files other than recorded results differ from it; 'unknown'
    outside a checkout."""
    here = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not another project's repository around an installed package
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
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
