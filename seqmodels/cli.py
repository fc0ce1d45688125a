"""The command line, `longseq`: a function's signature is its command, its docstring the help (jsonargparse)."""

import importlib
import inspect
import os
import re
import sys
import textwrap
import types
import typing
from argparse import SUPPRESS, Action
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from seqmodels.errors import InputError

COMMANDS = {
    "dna": {
        "classify": "seqmodels.tasks.genomics.classify",
        "data": "seqmodels.tasks.genomics.public",
        "embed": "seqmodels.tasks.genomics.embed",
        "evaluate": "seqmodels.tasks.genomics.evaluate",
        "explain": "seqmodels.tasks.genomics.explain",
        "generate": "seqmodels.tasks.genomics.generate",
        "pretrain": "seqmodels.tasks.genomics.pretrain",
        "train": "seqmodels.tasks.genomics.train",
        "variants": "seqmodels.tasks.genomics.variants",
    },
    "audio": {
        "classify": "seqmodels.tasks.audio.classify",
        "data": "seqmodels.tasks.audio.public",
        "generate": "seqmodels.tasks.audio.commands",
        "evaluate": "seqmodels.tasks.audio.commands",
        "judge": "seqmodels.tasks.audio.judges",
        "metrics": "seqmodels.tasks.audio.measure",
        "render": "seqmodels.tasks.audio.scores",
        "score": "seqmodels.tasks.audio.commands",
        "train": "seqmodels.tasks.audio.train",
    },
    "bench": {
        "list": "seqmodels.bench",
        "recall": "seqmodels.tasks.synthetic.recall",
        "run": "seqmodels.bench",
    },
}

USAGE = """usage: longseq dna|audio|bench COMMAND [...]; longseq dna COMMAND --help explains one

  longseq dna classify FILE...        label records, intervals or windows of FASTA files: a table, one row each
  longseq dna data list|get|info      public data sets by name, and what a data set holds
  longseq dna embed FILE...           features of a model's layers, per record or per base
  longseq dna evaluate MODEL --data D accuracy and more on labelled data
  longseq dna explain FILE...         which bases made a model say what it says: a table, tracks, a logo
  longseq dna generate --prompt P     new sequences that go on from bases or a FASTA file
  longseq dna pretrain GENOME... RUN  train a model to predict bases, without labels
  longseq dna train DATA RUN          train a classifier on your own data
  longseq dna variants VCF            score the variants of a VCF file: a table or VCF
  longseq audio data list|get|info    public sets of recordings by name, and what a set holds
  longseq audio classify FILE...      label recordings or windows of them: a table, one row each
  longseq audio generate --prompt P   make sound from a label or the start of a recording
  longseq audio evaluate DATA         bits per sample of recordings
  longseq audio judge DATA FOLDER     train classifiers that judge generated speech
  longseq audio metrics MADE DATA     what they recognise in it, beside real recordings and controls
  longseq audio render SCORES FOLDER  scores played by simple instruments, as long recordings
  longseq audio score FILE...         bits per sample of single recordings, also over time
  longseq audio train DATA RUN        train on your own recordings
  longseq bench list                  the programs behind the tables
  longseq bench recall --task T       train and test a model on a task of memory
  longseq bench run NAME              measure a table again"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 after one line that says what is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help") or words[1:2] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        return _run(words)
    except InputError as error:
        message = " ".join(str(error).split())
    except ArgumentError as error:
        said = re.sub(r'Parser key "([^"]+)":', lambda m: f"--{m[1].replace('_', '-')}:", str(error))
        said = re.sub(r"<class '(\w+)'>", r"\1", " ".join(said.split())).rstrip(".")
        message = f"{said}; see longseq {' '.join(words[:2])} --help"
    except KeyboardInterrupt:
        message = "stopped"
    except BrokenPipeError:  # whoever read our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    print(f"longseq: error: {message}", file=sys.stderr)
    return 2


def _run(words: list[str]) -> int:
    area, command = words[0], words[1] if len(words) > 1 else ""
    if area == "--version":
        from importlib.metadata import version

        print(f"longseq {version('longseq')}")
        return 0
    if command not in COMMANDS.get(area, {}):
        known = ", ".join(f"{a} {c}" for a, commands in COMMANDS.items() for c in commands)
        raise InputError(f"{' '.join(words[:2])!r} is not a command; the commands are: {known}")
    function = getattr(importlib.import_module(COMMANDS[area][command]), command)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _parser(function, f"longseq {area} {command}")
    values = parser.instantiate(parser.parse_args(parser.spelled_out(words[2:])))
    return function(**{name: getattr(values, name) for name in inspect.signature(function).parameters}) or 0


def _parser(function: Callable, prog: str) -> "_Parser":
    """The parser of one command; a first parameter that is a list takes all free words (FILE...)."""
    text = inspect.getdoc(function) or ""
    described = text.split("\n\nArgs:")[0]
    parser = _Parser(prog=prog, description=described, exit_on_error=False, formatter_class=_Help)
    first, hint = next(iter(typing.get_type_hints(function).items()))
    several = typing.get_origin(hint) is list
    if several:
        said = re.search(rf"\n    {first}: (.*?)(?=\n    \w+: |\n\n|$)", text, re.DOTALL)
        (kind,) = typing.get_args(hint)
        help_text = " ".join(said[1].split()) if said else None
        parser.add_argument(first, nargs="+", type=kind, metavar=first.upper().removesuffix("S"), help=help_text)
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True, skip={first} if several else None)
    return parser


class _Help(DefaultHelpFormatter):
    """Help with the docstring's paragraphs and indented lines, flags as they are best typed, and no types of Python."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(p if p.startswith("  ") else textwrap.fill(" ".join(p.split()), width) for p in parts)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if not name.endswith("+")]  # spelled_out adds the +
        short = [_Parser.short[name] for name in names if name in _Parser.short]
        words = ", ".join((*short, *(name.replace("_", "-") for name in names)))
        if action.nargs == 0 or _Parser.is_switch(action):
            return words
        kinds = _Parser.kinds(action)
        if [typing.get_origin(kind) for kind in kinds] == [typing.Literal]:  # also of an option without a default
            return f"{words} {{{','.join(typing.get_args(kinds[0]))}}}"
        return f"{words} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: Action) -> str:
        said, default = action.help or "", action.default
        if action.nargs == 0 or isinstance(action, ActionConfigFile):  # --help, and files of settings
            return super()._get_help_string(action)
        if _Parser.is_switch(action):
            negated = f"--no-{action.dest.rpartition('.')[2].replace('_', '-')}"
            return f"{said} On by default; {negated} turns it off." if default else said
        return said if default in (None, "", SUPPRESS) or action.required else f"{said} (default: %(default)s)"


class _Parser(ArgumentParser):
    """jsonargparse with what a shell user expects.

    --long-flags with dashes, switches without a value, flags of lists that may be given several times, -o and -n;
    --seed for --training.seed, and so on, where no other option has that name.
    """

    short: typing.ClassVar = {"--output": "-o", "--number": "-n", "--bed": "--intervals"}

    def spelled_out(self, words: list[str]) -> list[str]:
        """The same words as jsonargparse spells them: --batch_tokens, --include_prompt=true, --output."""
        long = {short: name for name, short in self.short.items()}
        known = {option: action for action in self._actions for option in action.option_strings}
        inner: dict[str, str] = {}
        for option in (option for option in known if "." in option):
            end = f"--{option.rpartition('.')[2]}"
            inner[end] = end if end in inner else option  # of two with the same end, neither
        result: list[str] = []
        for word in words:
            name, equals, value = long.get(word, word).partition("=")
            if name.startswith("--"):
                name = name.replace("-", "_").replace("__", "--", 1)
                name = name if name in known else inner.get(name, name)
                negated = "--" + name.removeprefix("--no_")
                negated = negated if negated in known else inner.get(negated, negated)
                if not equals and self.is_switch(known.get(name)):
                    name, equals, value = name, "=", "true"
                elif not equals and name.startswith("--no_") and self.is_switch(known.get(negated)):
                    name, equals, value = negated, "=", "false"
                elif self._is_list(known.get(name)):
                    name += "+"
                word = name + equals + value
            else:
                word = long.get(word, word)
            result.append(word)
        return result

    @staticmethod
    def is_switch(action: Any) -> bool:
        return getattr(action, "_typehint", None) is bool

    @staticmethod
    def kinds(action: Any) -> list[Any]:
        """The types that a value may have, but for none at all."""
        hint = getattr(action, "_typehint", None)
        if typing.get_origin(hint) not in (typing.Union, types.UnionType):
            return [hint]
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]

    def _is_list(self, action: Any) -> bool:
        return [typing.get_origin(kind) for kind in self.kinds(action)] == [list]

    def format_help(self) -> str:
        """Help with dashes in the flags that the usage and the text name."""
        text = re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), super().format_help())
        return re.sub(r"(--[a-z.-]+) \{true,false\}", r"\1", text)


if __name__ == "__main__":
    sys.exit(main())
