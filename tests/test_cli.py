"""The command line: help for every command, flags as a shell user types them, one line and code 2 for bad input."""

import inspect
import re
import subprocess
import sys

import pytest

from seqmodels.cli import COMMANDS, _parser, main


@pytest.mark.parametrize(("area", "command"), [(a, c) for a, commands in COMMANDS.items() for c in commands])
def test_every_command_explains_every_flag(area, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([area, command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: longseq {area} {command}" in text
    assert "--" in text
    assert not re.search(r"\btype: |Optional\[|Literal\[|null|--[a-z-]+\+|\{true,false\}", " ".join(text.split()))


def test_help_names_choices_short_flags_and_how_a_switch_is_turned_off(capsys):
    from seqmodels.tasks.audio.commands import generate
    from seqmodels.tasks.genomics.classify import classify

    help_of = {f: " ".join(_parser(f, "x").format_help().split()) for f in (generate, classify)}
    assert "-n, --number NUMBER How many to make" in help_of[generate]
    assert "--picture Whether to write a picture" in help_of[generate]
    assert "On by default; --no-picture turns it off." in help_of[generate]
    assert "(default: 2.0)" in help_of[generate]
    assert "--format {tsv,csv,jsonl,parquet} Format" in help_of[classify]
    assert "--region REGION Part of a sequence" in help_of[classify]


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    assert main(["dna", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"longseq {area} {command}" in text for area, commands in COMMANDS.items() for command in commands)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "'frobnicate' is not a command; the commands are: dna classify"),
        (["dna", "classify"], "see longseq dna classify --help"),
        (["dna", "classify", "x.fa", "--nonsense"], "--nonsense"),
        (["audio", "generate", "--seconds", "abc"], "--seconds: Expected a float. Got value: abc"),
        (["dna", "classify", "x.fa", "--model", "nowhere"], "nowhere: no such checkpoint"),
    ],
)
def test_bad_words_get_one_line_and_code_2(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert error.startswith("longseq: error: ")


def example(
    files: list[str], *, include_prompt: bool = False, picture: bool = True, output: str = "x", number: int = 1
) -> tuple:
    """An example.

    Args:
        files: The files.
        include_prompt: A switch.
        picture: Another one.
        output: A file.
        number: A count.
    """
    return files, include_prompt, picture, output, number


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["a"], (["a"], False, True, "x", 1)),
        (["a", "b", "--include-prompt", "--no-picture"], (["a", "b"], True, False, "x", 1)),
        (["-o", "my-file.wav", "-n", "3", "a"], (["a"], False, True, "my-file.wav", 3)),
        (["--include_prompt=true", "--output=y", "a-b_c"], (["a-b_c"], True, True, "y", 1)),
    ],
)
def test_flags_are_what_a_shell_user_types(words, values):
    parser = _parser(example, "example")
    parsed = parser.instantiate(parser.parse_args(parser.spelled_out(words)))
    assert example(**{name: getattr(parsed, name) for name in inspect.signature(example).parameters}) == values


def test_options_of_training_need_no_prefix_and_others_keep_their_names():
    from seqmodels.tasks.genomics.train import train

    words = ["data", "run", "--seed", "3", "--device=cpu", "--resume", "--no-carry-state", "--seeds", "2", "--test"]
    parser = _parser(train, "example")
    parsed = parser.instantiate(parser.parse_args(parser.spelled_out(words)))
    training = parsed.training
    assert (training.seed, training.device, training.resume, training.carry_state) == (3, "cpu", True, False)
    assert (parsed.seeds, parsed.test) == (2, True)


def test_python_m_seqmodels_is_the_command():
    done = subprocess.run([sys.executable, "-m", "seqmodels", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("longseq 0.")
