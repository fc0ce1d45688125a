"""`longseq bench`: every program that records results is found, and is run with words that it takes."""

import importlib
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from seqmodels import bench
from seqmodels.cli import COMMANDS, _parser, main
from seqmodels.record import add_rows, commit
from seqmodels.tasks.synthetic.recall import recall

PROGRAMS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose one program writes one of its results anew, or fails."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    for name in ("old", "new"):
        (folder / "results" / f"{name}.json").write_text("[]")
    (folder / "record.py").write_text("")
    (folder / "helper.py").write_text("import record\n")
    (folder / "speed.py").write_text(
        '"""How fast\nit is.\n\nMore."""\nimport sys, pathlib\nimport record\n'
        'if __name__ == "__main__":\n'
        '    pathlib.Path(__file__).with_name("results").joinpath("new.json").write_text("[1]")\n'
        "    sys.exit(3 * (len(sys.argv) > 1))\n"
    )
    monkeypatch.setattr(bench, "CHECKOUT", folder)
    monkeypatch.setitem(bench.SIZES, "speed", bench.Sizes(gpu="--fail"))
    return folder


def test_the_list_has_every_program_that_records_results_and_the_tables_of_the_tasks(checkout, capsys):
    assert main(["bench", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {"name", "speed", "copying", "induction", "mqar"}
    assert lines["speed"].endswith("How fast it is.")


def test_run_says_which_results_were_written_and_hands_on_the_code_of_a_failure(checkout, capsys):
    assert main(["bench", "run", "speed"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert len(written) == 1
    assert written[0].endswith("results/new.json")
    assert main(["bench", "run", "speed", "--size", "gpu"]) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "'nonsense' is not the name of a program; the names are copying, induction, mqar"),
        (["ssd", "--size", "laptop"], "ssd has no size laptop"),
        (["gue", "--size", "gpu"], "set LONGSEQ_DATA to the folder"),
    ],
)
def test_bad_words_get_one_line(words, said, monkeypatch, capsys):
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    assert main(["bench", "run", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1


def test_an_installed_package_has_the_tables_of_the_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path / "nowhere")
    assert main(["bench", "list"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["name", "copying", "induction", "mqar"]
    assert "source repository" in shown.err
    assert bench.results_folder("NVIDIA H200") == Path()


@pytest.mark.parametrize("size", ["laptop", "gpu"])
def test_every_command_of_a_table_is_one_that_its_program_takes(size, monkeypatch):
    """Its flags are in the program's source, or parse as those of `bench recall`."""
    monkeypatch.setenv("LONGSEQ_DATA", "data")
    for name in set(bench._names()) - bench._RECALL.keys():
        words = bench._words(name, size)
        if words is None:
            continue
        source = (PROGRAMS / f"{name}.py").read_text() + (PROGRAMS / "timing.py").read_text()
        for line in words.split("\n"):
            own = line.split(" -- ")[0].split()
            positional = re.findall(r'add_argument\("([a-z]\w*)"(.*)', (PROGRAMS / f"{name}.py").read_text())
            given = len(list(itertools.takewhile(lambda word: not word.startswith("--"), own)))
            assert given == len(positional) or (given > len(positional) and "nargs" in positional[-1][1]), name
            assert all(f'"{word}"' in source for word in own if word.startswith("--")), name
    for task in ("copying", "induction", "mqar"):
        commands = bench._commands(task, size)
        assert len(set(commands)) == len(commands)
        for command in commands[:: max(1, len(commands) // 7)]:
            parse(recall, command[command.index("recall") + 1 :])


def test_what_a_program_needs_first_is_made_once_by_a_command_that_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGSEQ_DATA", "a folder")
    for place, words in bench.MADE_BY.items():
        area, command, *rest = bench._split(words)
        assert place.removesuffix("/model") in rest
        if area.endswith(".py"):
            assert (PROGRAMS / area).exists()
        else:
            parse(getattr(importlib.import_module(COMMANDS[area][command]), command), rest)
    first, program = bench._commands("spoken_digits", "gpu")
    assert first[1:] == ("-m", "seqmodels", "audio", "judge", "a folder/audio/fsdd", "runs/judges",
                         "--validation", "index=5-9")  # fmt: skip
    assert program[2:5] == ("spoken-digits", "a folder/audio/fsdd", "runs/judges")
    (tmp_path / "runs" / "judges").mkdir(parents=True)
    assert bench._commands("spoken_digits", "gpu") == (program,)


def test_the_recipes_of_gue_are_those_of_its_records_also_on_tasks_they_were_not_chosen_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGSEQ_DATA", "data")
    made, *commands = bench._commands("gue", "gpu")
    assert Path(made[1]).resolve() == PROGRAMS / "yeast_tasks.py"
    assert bench._commands("gue", "laptop") == (commands[0],)
    for command in commands:
        name = command[command.index("--name") + 1]
        record = json.loads((PROGRAMS / "results" / f"{name}.json").read_text())
        recorded = record["command"].split(" -- ")[1:]
        if "how" in record:  # a model of all tasks that was trained by hand before
            each = recorded[0].replace("--start-from runs/joint/model ", "")
            recorded = [each, record["how"].split("runs/joint ")[1].replace("--targets multi ", "")]
        given = shlex.join(command).split(" -- ")[1:]
        assert [sorted(part.split()) for part in given] == [sorted(part.split()) for part in recorded], name


def parse(function, words):
    parser = _parser(function, "longseq")
    return parser.parse_args(parser.spelled_out(list(words)))


def test_rows_of_the_same_measurement_are_replaced_and_others_kept_also_by_many_at_a_time(tmp_path):
    path = tmp_path / "deep" / "rows.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_rows(path, [{"op": i % 4, "shape": (1, 2), "ms": i}], ("op", "shape")), range(32)))
    rows = json.loads(path.read_text())
    assert sorted(row["op"] for row in rows) == [0, 1, 2, 3]
    add_rows(path, [{"op": 2, "shape": (1, 2), "ms": 99}, {"op": 9, "shape": (1, 2), "ms": 1}], ("op", "shape"))
    assert {row["op"]: row["ms"] for row in json.loads(path.read_text()) if row["op"] in (2, 9)} == {2: 99, 9: 1}
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


def test_the_commit_is_that_of_this_repository_and_of_no_other_and_results_do_not_make_it_dirty(tmp_path):
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROGRAMS, capture_output=True, text=True)
    if here.returncode:
        pytest.skip("not a git checkout")
    assert commit().removesuffix("-dirty") == here.stdout.strip()
    copy = tmp_path / "seqmodels" / "record.py"
    result = tmp_path / "benchmarks" / "results" / "speed.json"
    for path, text in ((copy, (PROGRAMS.parent / "seqmodels" / "record.py").read_text()), (result, "[]")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    spec = importlib.util.spec_from_file_location("copied_record", copy)
    sys.modules["copied_record"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.commit() == "unknown"
    for words in (["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    result.write_text("[1]")
    assert len(module.commit()) == 40
    copy.write_text(copy.read_text() + "\n")
    assert module.commit().endswith("-dirty")


def test_no_recorded_figure_is_of_sources_that_nobody_can_check_out():
    commits = {
        (path.name, commit)
        for path in (PROGRAMS / "results").rglob("*.json")
        for commit in re.findall(r'"commit": "([^"]*)"', path.read_text())
    }
    assert commits
    assert not [one for one in commits if not re.fullmatch("[0-9a-f]{40}", one[1])]
