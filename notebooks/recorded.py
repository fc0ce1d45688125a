"""What the notebooks share: figures that programs have recorded, beside those that papers have published."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from IPython.display import Markdown

_SHOWN = "torch", "triton", "mamba_ssm", "causal-conv1d", "fla-core"
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


class Record(NamedTuple):
    """A file of recorded results."""

    name: str
    "Of the file below benchmarks/results, without .json."
    rows: list[dict[str, Any]]
    "One per measurement, as of `measured`."

    @property
    def origin(self) -> str:
        """How the rows were obtained, in one line."""
        return "; and ".join(_ways(self.rows))


def recorded(pattern: str) -> list[Record]:
    """The files below benchmarks/results whose path fits, such as gue-*.json or */generate.json; none may be there."""
    paths = sorted(RESULTS.glob(pattern))
    return [Record(path.relative_to(RESULTS).with_suffix("").as_posix(), _rows(path)) for path in paths]


def measured(name: str) -> list[dict[str, Any]]:
    """The rows of all files NAME.json; each also has its file, what that says of all, and the fields of its shape."""
    return [row for path in sorted(RESULTS.rglob(f"{name}.json")) for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Of a file that a program of benchmarks/ has written, or `evaluate -o`."""
    content = json.loads(path.read_text())
    content = {"rows": content} if isinstance(content, list) else content
    rows = content.get("rows") or content.get("results") or [content]
    about = {"file": path.relative_to(RESULTS.parent.parent).as_posix(), **content, "rows": None, "results": None}
    shapes = (row["shape"] if isinstance(row.get("shape"), dict) else {} for row in rows)
    return [{**about, **shape, **row} for shape, row in zip(shapes, rows)]


def where(rows: Iterable[Mapping[str, Any]], **fields: Any) -> list[Any]:
    """The rows with these values; None also means that a row has no such field."""
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def obtained(*rows: Iterable[Mapping[str, Any]]) -> str:
    """How measured rows were obtained, a line for each way: file, machine, versions, commit, command, seeds."""
    return "\n".join(f"- {way}" for way in _ways(row for some in rows for row in some))


def _ways(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    ways: dict[tuple[str, ...], set[int]] = {}
    for row in rows:
        versions = [f"{name} {version}" for name, version in row.get("versions", {}).items() if name in _SHOWN]
        command = re.sub(r" --seed \d+", "", row.get("command", ""))
        made = f"commit {row['commit'][:7]}" if "commit" in row else row.get("date", "")
        machine = row.get("machine", {})
        device = row.get("gpu") or machine.get("gpu") or machine.get("cpu", "")
        way = row["file"], device, ", ".join(versions), made, command and f"`{command}`"
        ways.setdefault(way, set()).update([row["seed"]] if "seed" in row else [])
    said = {way: [f"seeds {', '.join(map(str, sorted(seeds)))}"] if seeds else [] for way, seeds in ways.items()}
    return ["; ".join(filter(None, (*way, *seeds))) for way, seeds in said.items()]


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
