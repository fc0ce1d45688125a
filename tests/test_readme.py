"""The README and docs/ tell the truth: commands parse and run, examples print what is shown, the tree is whole."""

import csv
import gzip
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from seqmodels.cli import COMMANDS, _parser, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS_PAGE, GENOMICS, AUDIO, SCALING = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("commands", "genomics", "audio", "scaling")
)
CARDS = sorted((ROOT / "seqmodels" / "checkpoints").glob("*/README.md"))
NOTEBOOKS = [  # the commands in the strings of their code, as far as nothing is filled in
    "\n".join(re.findall(r'\\"(longseq [^"\\{}]+)\\"', path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


def commands(text):
    joined = text.replace("\\\n", " ")
    return [
        re.sub(r"\s+#.*", "", line).strip("` ") for line in re.findall(r"(?m)^`?longseq (?:dna|audio|bench) .*", joined)
    ]


@pytest.mark.parametrize(
    "line",
    [
        line
        for text in (README, COMMANDS_PAGE, GENOMICS, AUDIO, SCALING, *NOTEBOOKS, *map(Path.read_text, CARDS))
        for line in commands(text)
    ],
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


LITTLE = {
    ("dna", "train"): "--training.max-steps 20",
    ("audio", "train"): "--training.max-steps 2 --widths [32,32] --depths [1,1] --pools [16] --clips.batch-tokens 8192",
    ("audio", "generate"): "--seconds 0.02",
    ("audio", "judge"): "--how.epochs 1",
    ("audio", "render"): "--seconds 0.5 --sample-rate 8000 --workers 1",
}


def run(lines):
    """Runs commands, with a little of the work; they must end well, and write what they name."""
    for line in lines:
        words = shlex.split(line)[1:]
        words += LITTLE.get((words[0], words[1]), "").split()
        assert main(words) == 0, line
        for path in (Path(words[words.index(o) + 1]) for o in ("-o", "--pictures", "--picture") if o in words):
            assert path.exists() or path.with_stem(f"{path.stem}_0").exists()


def words_and_numbers(page):
    number = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
    return [float(word) if number.fullmatch(word) else word for word in page.split()]


@pytest.mark.usefixtures("one_thread")
def test_the_examples_of_the_readme_print_what_stands_below_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (generated,) = (line for line in commands(README) if line.startswith("longseq audio generate"))
    run([generated])
    shutil.copy(ROOT / "docs" / "audio" / "seven.flac", tmp_path)  # what it has made, at full length
    program = runpy.run_path(str(ROOT / "docs" / "audio.py"))
    page = README.replace(f"{generated}\n", "")
    assert page.count("```text\n") == 3
    printed = words_and_numbers(program["BLOCK"].sub(program["run"], page))
    shown = [pytest.approx(word, rel=1e-3) if isinstance(word, float) else word for word in words_and_numbers(page)]
    assert printed == shown  # but for rounding, which is another one on another machine


@pytest.mark.usefixtures("one_thread")
def test_the_two_commands_of_the_readme_are_the_demo_and_the_tests_and_the_demo_makes_what_it_says(examples, capsys):
    assert re.findall(r"(?m)^make ([\w-]+)", README) == ["demo", "test"]
    asked = subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python examples/demo.py" in asked
    assert "python -m pytest" in asked
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))["main"].__globals__
    demo |= {"DEMO": examples / "demo", "longseq": lambda *words: run([shlex.join(["longseq", *map(str, words)])])}
    demo["main"]()
    made = re.findall(r"(?m)^  (demo/\S+)", capsys.readouterr().out)
    assert made == ["demo/contigs.tsv", "demo/seven.wav", "demo/continued.wav"]
    assert all(Path(name).exists() for name in (*made, "demo/seven.png", "demo/prompt.wav", "demo/continued.png"))


def test_the_picture_of_the_readme_has_every_base_and_gene_of_its_stretch(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    program = runpy.run_path(str(ROOT / "docs" / "readme.py"))
    record, start, end = program["RECORD"], program["START"], program["END"]
    spans = [(start - 5, start + 2, 0.25), (start + 2, start + 3, 0.5), (end - 1, end + 4, 1)]
    track = tmp_path / "track.bedgraph"
    track.write_text("track type=bedGraph\n" + "".join(f"{record}\t{s}\t{e}\t{value}\n" for s, e, value in spans))
    values = program["track"](track)
    assert values[:4].tolist() == [0.25, 0.25, 0.5, 0]
    assert (len(values), values[-1], values.sum()) == (end - start, 1, 2)
    lines = [(record, start - 9, start), (record, start - 9, start + 1), (record, end, end + 1), ("other", start, end)]
    with gzip.open(tmp_path / "genes.bed.gz", "wt") as file:
        file.write("".join(f"{name}\t{s}\t{e}\tgene\t0\t-\n" for name, s, e in lines))
    assert program["genes"](tmp_path / "genes.bed.gz") == [(start - 9, start + 1, "-")]


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


def needs_recordings(line):
    return any(name in line for name in ("fsdd", "runs/", "music"))


@pytest.mark.usefixtures("one_thread")
def test_the_commands_and_the_program_on_sound_run_with_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands(AUDIO) if not needs_recordings(line)]
    assert len(lines) == 5
    run(lines)
    (program,) = re.findall(r"```python\n(.*?)```", AUDIO, re.DOTALL)
    exec(re.sub(r"seconds=[\d.]+", "seconds=0.02", program), {})
    assert Path("two.wav").exists()


@pytest.mark.data
@pytest.mark.usefixtures("one_thread")
def test_the_commands_on_recordings_run_on_a_part_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = Path(os.environ["LONGSEQ_DATA"]) / "audio"
    with open(shared / "fsdd" / "metadata.csv", newline="") as file:
        rows = [
            row | {"prompt": f"the word {row['word']} by {row['speaker']}"}
            for row in csv.DictReader(file)
            if row["word"] in ("zero", "one") and row["speaker"] in ("theo", "george") and int(row["index"]) % 5 == 0
        ]
    for name in ("fsdd", "made", "sounds"):
        Path(name).mkdir()
        with zipfile.ZipFile(shared / "fsdd" / "fsdd_flac.zip") as archive:
            archive.extractall(name, [row["file"] for row in rows])
        with open(Path(name) / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    score = {split: [[[60, 55, 52, 48]] * 40] for split in ("train", "valid", "test")}
    with gzip.open("Jsb16thSeparated.json.gz", "wt") as file:
        json.dump(score, file)
    for name in ("seven.flac", "long.wav"):
        Path(name).write_bytes(Path("fsdd", rows[0]["file"]).read_bytes())
    lines = [line for line in commands(AUDIO) if needs_recordings(line)]
    assert len(lines) == 13
    run(lines)


def test_the_file_tree_names_every_file_and_no_other():
    tree = README.split("## Files")[1].split("```")[1]
    tasks = sorted(f"tasks/{path.parent.name}" for path in (ROOT / "tasks").glob("*/__init__.py"))
    for folder in ("kernels", "seqmodels", *tasks, "notebooks", "examples", "benchmarks", "docs"):
        section = re.split(r"(?m)^\w", tree.split(f"\n{folder}/")[1])[0]
        named = re.findall(r"(?m)^  (\w+\.(?:py|ipynb|md)) +\S.*", section)  # each with a clause
        found = {p.name for ending in ("py", "ipynb", "md") for p in (ROOT / folder).glob(f"*.{ending}")}
        assert sorted(named) == sorted(name for name in found if name != "__init__.py")


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_the_links_and_pictures_of_a_page_are_there(page):
    page = ROOT / page
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)", target.read_text(encoding="utf-8"))
            assert heading in [text.lower().replace(" ", "-") for text in headings], link


def test_every_tracked_top_level_folder_is_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert all(f"{folder}/" in README for folder in folders)
