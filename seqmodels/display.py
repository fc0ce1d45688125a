"""Tables of text for people."""

from collections.abc import Mapping, Sequence
from typing import Any


def as_text(value: Any) -> Any:
    """A cell: nothing for None, six digits of a float, any other value as it is."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def aligned(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a table for people: columns side by side, numbers to the right."""
    if not rows:
        return ""
    cells = [[str(as_text(row.get(name))) for name in columns] for row in rows]
    lines = []
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in columns]
    for line in [columns, *cells]:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)]
        lines.append("  ".join(padded).rstrip() + "\n")
    return "".join(lines)
