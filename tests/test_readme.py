"""The README tells the truth: its commands parse, its files exist, and every file of the package is in its tree."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from seqmodels.cli import COMMANDS, _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARDS = sorted((ROOT / "seqmodels" / "checkpoints").glob("*/README.md"))


def commands(text):
    joined = text.replace("\\\n", " ")
    return [
        re.sub(r"\s+#.*", "", line).strip("` ") for line in re.findall(r"(?m)^`?longseq (?:dna|audio|bench) .*", joined)
    ]


@pytest.mark.parametrize(
    "line", [line for text in (README, *(c.read_text() for c in CARDS)) for line in commands(text)]
)
def test_every_command_that_is_shown_parses(line):
    line = line.split("` ")[0]
    _, area, command, *words = shlex.split(line)
    function = getattr(importlib.import_module(COMMANDS[area][command]), command)
    parser = _parser(function, line)
    parsed = parser.parse_args(parser.spelled_out(words))
    assert parsed is not None


def test_the_file_tree_names_every_file_and_no_other():
    tree = README.split("## Files")[1].split("```")[1]
    for folder in ("kernels", "seqmodels"):
        section = tree.split(f"\n{folder}/")[1].split("\n\n")[0]
        named = set(re.findall(r"(?m)^  (\w+\.py)", re.split(r"(?m)^\w", section)[0]))
        found = {p.name for p in (ROOT / folder).glob("*.py") if not p.name.startswith("__")}
        assert named == found
    for folder in ("tasks/genomics", "tasks/audio", "tasks/synthetic"):
        line = next(line for line in tree.splitlines() if line.startswith(f"{folder}/"))
        found = {p.stem for p in (ROOT / folder).glob("*.py") if p.stem != "__init__"}
        assert set(re.findall(r"[\w]+", line.split(": ")[1])) == found


def test_every_tracked_top_level_folder_is_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert all(f"{folder}/" in README for folder in folders)
