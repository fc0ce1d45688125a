"""What the notebooks share: figures that programs have recorded, beside those that papers have published."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from IPython.display import Markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


class Record(NamedTuple):
    """A file of recorded results."""

    name: str
    "Of the file, without .json."
    rows: list[dict[str, Any]]
    "One per measurement."
    origin: str
    "Commands, machine, date if it is known, and the last commit."


def recorded(pattern: str) -> list[Record]:
    """The files below benchmarks/results whose path fits, such as gue-*.json or */generate.json; none may be there."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        content = json.loads(path.read_text())
        rows = content if isinstance(content, list) else content["rows"]  # rows that say themselves where they are from
        about = rows[-1] if isinstance(content, list) else content
        machine = content.get("machine", {}) if isinstance(content, dict) else about
        device = machine.get("gpu", "cpu")
        commands = {f"`{one['command']}`": None for one in (rows if isinstance(content, list) else [content])}
        said = [*commands, machine.get("cpu", "CPU") if device == "cpu" else device, about.get("date")]
        origin = ", ".join([*filter(None, said), f"commit {about['commit'][:7]}"])
        found.append(Record(path.stem, rows, origin))
    return found


def published(text: str) -> dict[str, dict[str, str]]:
    """Rows by name from a table in text: a line of columns, then lines of a name and its cells, two spaces between."""
    (_, *columns), *lines = (re.split(r"\s{2,}", line) for line in text.strip().splitlines())
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in lines}


def table(rows: Sequence[Mapping[str, Any]], *notes: str) -> Markdown:
    """Rows as a table, an empty cell where a row has nothing; below it notes, such as where its figures are from."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return Markdown("\n\n".join(["\n".join("| " + " | ".join(line) + " |" for line in lines), *notes]))


def missing(what: str, *commands: str) -> Markdown:
    """Says that a figure has not been recorded, and which commands fill it."""
    return Markdown("\n".join([f"**Not recorded yet:** {what}. These commands fill it:", "```", *commands, "```"]))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
