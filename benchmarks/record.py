"""Writes what a benchmark measured to benchmarks/results/, with what is needed to repeat and to judge it."""

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from seqmodels.cli import main
from seqmodels.files import make_folder, write_json
from seqmodels.record import add_rows, commit, folder_of, machine, versions

RESULTS = Path(__file__).parent / "results"


def run(*words: object) -> None:
    """One command of longseq; the program ends where it fails."""
    if code := main([*map(str, words)]):
        sys.exit(code)


def arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """A program's own arguments, and the words after `--`, which are options of a command of longseq."""
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    return parser.parse_args(own.split()), options.split()


def write_result(name: str, rows: list[dict[str, Any]], commit_given: str | None = None) -> Path:
    """The rows (one per measurement) with machine, versions, commit, command and date; returns the file's path."""
    path = RESULTS / f"{name}.json"
    make_folder(path.parent)
    write_json(path, {
        "machine": machine(),
        "versions": versions(),
        "commit": commit_given or commit(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "rows": rows,
    })  # fmt: skip
    return path


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
    measured = ("op", "impl", "shape", "l", "dtype", "pass", "ranks", "device", "devices")
    return add_rows(RESULTS / folder_of(rows[0]["gpu"]) / f"{name}.json", rows, measured)
