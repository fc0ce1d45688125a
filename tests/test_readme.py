"""The README tells the truth: its commands parse, its files exist, and every file of the package is in its tree."""

import csv
import gzip
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from seqmodels.cli import COMMANDS, _parser, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENOMICS = (ROOT / "docs" / "genomics.md").read_text(encoding="utf-8")
CARDS = sorted((ROOT / "seqmodels" / "checkpoints").glob("*/README.md"))


def commands(text):
    joined = text.replace("\\\n", " ")
    return [
        re.sub(r"\s+#.*", "", line).strip("` ") for line in re.findall(r"(?m)^`?longseq (?:dna|audio|bench) .*", joined)
    ]


@pytest.mark.parametrize(
    "line", [line for text in (README, GENOMICS, *(c.read_text() for c in CARDS)) for line in commands(text)]
)
def test_every_command_that_is_shown_parses(line):
    line = line.split("` ")[0]
    _, area, command, *words = shlex.split(line)
    function = getattr(importlib.import_module(COMMANDS[area][command]), command)
    parser = _parser(function, line)
    parsed = parser.parse_args(parser.spelled_out(words))
    assert parsed is not None


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder to work in, with the two shortest of the example's contigs."""
    (tmp_path / "examples").mkdir()
    with gzip.open(ROOT / "examples" / "contigs.fa.gz", "rt") as file:
        records = file.read().split(">")[1:3]
    with gzip.open(tmp_path / "examples" / "contigs.fa.gz", "wt") as file:
        file.write("".join(f">{record}" for record in records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(lines):
    """Runs commands, training only for a few steps; they must end well, and write what they name."""
    for line in lines:
        words = shlex.split(line)[1:]
        words += ["--training.max-steps", "20"] if words[1] == "train" else []
        assert main(words) == 0, line
        assert all(Path(words[words.index(o) + 1]).exists() for o in ("-o", "--pictures", "--picture") if o in words)


def needs_data(line):
    return any(name in line for name in (" gue/", " genomes", " runs/", " promoters."))


@pytest.mark.usefixtures("one_thread")
def test_the_commands_on_the_example_run(examples):
    lines = [line for line in commands(GENOMICS) if not needs_data(line)]
    assert len(lines) == 3
    run(lines)


@pytest.mark.data
@pytest.mark.usefixtures("one_thread")
def test_the_commands_on_data_run_on_a_part_of_them(examples):
    shared = Path(os.environ["LONGSEQ_DATA"])
    task = examples / "gue" / "prom" / "prom_core_tata"
    task.mkdir(parents=True)
    for table in (shared / "dna" / "gue" / "prom" / "prom_core_tata").glob("*.csv*"):
        opened = gzip.open if table.suffix == ".gz" else open
        with opened(table, "rt") as file:
            (task / table.name.removesuffix(".gz")).write_text("".join(file.readlines()[:60]))
    genomes, rows = shared / "genomes" / "enterobacteria", ["file,record,label,split"]
    (examples / "genomes").mkdir()
    with open(genomes / "metadata.csv", newline="") as file:
        for row in csv.DictReader(file):
            with gzip.open(genomes / row["file"], "rt") as fasta:
                header, *lines = (next(fasta) for _ in range(120))
            if row["split"] == "test" and header[1:].split()[0] == row["record"]:
                rows.append(f"{row['record']}.fa,{row['record']},{row['species']},test")
                (examples / "genomes" / f"{row['record']}.fa").write_text("".join([header, *lines]))
    (examples / "genomes" / "metadata.csv").write_text("\n".join(rows) + "\n")
    lines = [line for line in commands(GENOMICS) if needs_data(line)]
    assert len(lines) == 5
    run(lines)


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
