"""Tables of results: written row by row to TSV, CSV, JSON lines or Parquet, or shown on the screen."""

import csv
import fcntl
import gzip
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from seqmodels.display import aligned, as_text
from seqmodels.errors import InputError
from seqmodels.files import write_json

Format = Literal["tsv", "csv", "jsonl", "parquet"]
Row = dict[str, Any]
_SUFFIXES: dict[str, Format] = {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_DIALECTS: dict[str, dict[str, Any]] = {
    "csv": {"lineterminator": "\n"},
    # without quotes: text in rows holds no tabs or line ends
    "tsv": {"delimiter": "\t", "lineterminator": "\n", "quoting": csv.QUOTE_NONE, "quotechar": None},
}


def format_of(path: Path) -> Format:
    """The format that a file's suffix names (also before .gz); an InputError if it names none."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _SUFFIXES or (suffix == ".parquet" and path.suffix == ".gz"):
        raise InputError(
            f"{path} has no suffix of a table; use .tsv, .tsv.gz, .csv, .jsonl or .parquet, or say which with --format"
        )
    return _SUFFIXES[suffix]


def open_atomically(path: Path) -> tuple[Path, int]:
    """A new temporary file beside `path`, and its descriptor; an InputError if the place cannot be written to."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file for the output")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another place for the output") from None


def check_writable(path: Path) -> None:
    """An InputError if a file cannot be made at `path`: asked before long work."""
    temporary, descriptor = open_atomically(path)
    os.close(descriptor)
    temporary.unlink()


def part_of(path: Path) -> Path:
    """The file in which the lines of a table gather until it is whole."""
    return path.with_name(f"{path.name}.part")


def open_part(path: Path) -> tuple[Path, int]:
    """That file and its descriptor, locked until it is closed; an InputError where it cannot be written to."""
    check_writable(path)
    part = part_of(path)
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill opens it
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"another process is writing {part}; wait for it or give another output") from None
    return part, descriptor


def check_same(what: str, record: Path, made: Mapping[str, Any]) -> None:
    """An InputError if what a JSON file says of how rows were made is not `made`, with what differs."""
    try:
        before = dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{record}, which says how {what} was made, cannot be read; leave out --resume") from None
    then, now = (dict(_leaves({key: values.get(key) for key in made})) for values in (before, made))
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        said = ", ".join(f"{name} was {_brief(then.get(name))} and is {_brief(now.get(name))}" for name in differing)
        raise InputError(f"{what} was made otherwise: {said}; repeat that, leave out --resume or give another output")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names like "model name" and "inputs 1", and the values there; of a file, all that is known of it."""
    if isinstance(value, list) or (isinstance(value, dict) and "file" not in value):
        items = value.items() if isinstance(value, dict) else enumerate(value, 1)
        for key, item in items:
            yield from _leaves(item, f"{name} {key}".strip())
    else:
        yield name.removeprefix("settings "), value


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return " of ".join(str(value[key]) for key in ("file", "modified") if key in value)
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)  # a checksum


class TableWriter:
    """Rows to a file, which appears whole under its name when the `with` block ends well, or to standard output.

    Without a path: an aligned table of `shown` columns if standard output is a terminal, TSV otherwise. Lines of text
    gather in `part_of(path)`, which a killed process leaves behind. With `resume` they are kept, also by a failure: the
    first rows that are given to `write` must then be those that stand there, by the columns that `resume` names, and
    are not written again. What they are made from and how, `made`, is in a file beside them until the table is whole,
    and must be the same when work is resumed. Where that is known, they are also kept when a person stops the work.
    """

    def __init__(
        self,
        path: Path | None,
        columns: dict[str, type],
        format: Format | None = None,
        shown: list[str] | None = None,
        resume: Sequence[str] = (),
        made: Mapping[str, Any] | None = None,
    ):
        """`columns` maps names to str, int or float, in order; `shown` are the ones for a terminal; `made` is JSON."""
        self._path, self._columns, self._shown, self._resume = path, columns, shown or list(columns), resume
        if path is None:
            self._format = format or ("screen" if sys.stdout.isatty() else "tsv")
            if self._format == "parquet":
                raise InputError("Parquet is not text; name an output file with -o")
        else:
            self._format = format or format_of(path)
        self._made = made
        self._in_lines = path is not None and self._format != "parquet" and path.suffix != ".gz"
        if resume and not self._in_lines:
            raise InputError(
                f"{path or 'a table on the screen'} cannot be resumed, only a file .tsv, .csv or .jsonl: Parquet and "
                ".gz are whole or nothing; name such a file with -o or leave out --resume"
            )
        self._rows: list[Row] = []  # of the formats that need all rows at once
        self.kept = 0  # rows of an interrupted table that are kept
        self._grown = False
        self._keep = False
        self._old: Iterator[Row] = iter(())

    def __enter__(self) -> "TableWriter":
        self._temporary = None
        self._file: TextIO = sys.stdout
        if self._path is not None:
            self._temporary, descriptor = self._open_part() if self._in_lines else open_atomically(self._path)
            binary = self._binary = os.fdopen(descriptor, "wb")
            if self._path.suffix == ".gz":
                binary = gzip.GzipFile(filename="", mode="wb", fileobj=binary, mtime=0)
            self._file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        if self._format in _DIALECTS:
            self._csv = csv.writer(self._file, **_DIALECTS[self._format])
            if not self.kept:
                self._csv.writerow(self._columns)
        return self

    def keep(self) -> Path | None:
        """Keep the lines that have gathered, to be resumed, whatever ends the `with` block; where, if there are any."""
        self._keep = self._in_lines and bool(self.kept or self._grown)
        return self._temporary if self._keep else None

    def kept_rows(self) -> Iterator[Row]:
        """The rows of an interrupted table that are kept."""
        if self.kept and self._temporary is not None:
            for row in self._read(self._temporary):
                yield {name: self._typed(name, value) for name, value in row.items()}

    def _open_part(self) -> tuple[Path, int]:
        """The file that lines gather in, locked, cut after its last whole line (or empty), and its descriptor."""
        assert self._path is not None
        part, descriptor = open_part(self._path)
        end = 0
        if self._resume:
            with open(part, "rb") as file:
                whole = [len(line) for line in file if line.endswith(b"\n")]
            self.kept = max(0, len(whole) - (self._format in _DIALECTS))  # without the header
            end = sum(whole) if self.kept else 0
            self._old = self._read(part)
        if self._made is not None and self.kept:
            try:
                check_same(str(part), record_of(part), self._made)
            except InputError:
                os.close(descriptor)
                raise
        os.ftruncate(descriptor, end)
        if self._made is not None and not self.kept:
            write_json(record_of(part), self._made)
        os.lseek(descriptor, end, os.SEEK_SET)
        return part, descriptor

    def _read(self, part: Path) -> Iterator[Row]:
        """The kept rows, with their values as `write` has written them."""
        with open(part, encoding="utf-8", newline="") as file:
            if self._format in _DIALECTS:
                rows: Iterator[Row] = csv.DictReader(file, **_DIALECTS[self._format])
            else:
                rows = map(json.loads, file)
            yield from itertools.islice(rows, self.kept)

    def _new(self, rows: list[Row]) -> list[Row]:
        """Those of the rows that are not in the file yet. The others, if they are the same, get the values there."""
        for i, row in enumerate(rows):
            old = next(self._old, None)
            if old is None:
                return rows[i:]
            form = _rounded if self._format == "jsonl" else lambda value: str(as_text(value))
            known = {name: form(row[name]) for name in self._resume}
            if list(old) != list(self._columns) or any(old[name] != value for name, value in known.items()):
                raise InputError(
                    f"{self._temporary} was not made from this input by this model: it has {_said(old, self._resume)}, "
                    f"where now comes {_said(known, self._resume)}; remove it or leave out --resume"
                )
            row |= {name: self._typed(name, value) for name, value in old.items()}
        return []

    def _typed(self, name: str, value: Any) -> Any:
        """A value as it was before it became text."""
        if value == "" and self._columns[name] is not str:
            return None
        return value if value is None else self._columns[name](value)

    def write(self, rows: list[Row]) -> None:
        """Adds rows and passes them on to the file at once, where the format allows it."""
        rows = self._new(rows)
        self._grown |= bool(rows)
        try:
            if self._format in ("tsv", "csv"):
                self._csv.writerows([as_text(row.get(name)) for name in self._columns] for row in rows)
                self._file.flush()
            elif self._format == "jsonl":
                for row in rows:
                    values = {name: _rounded(row.get(name)) for name in self._columns}
                    self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
                self._file.flush()
            else:
                self._rows.extend(rows)
        except OSError as error:
            raise self._failure(error) from None

    def __exit__(self, kind, *_) -> None:
        whole = False
        try:
            if kind is None and self._format == "screen":
                self._file.write(aligned(self._rows, self._shown))
            if self._temporary is None or self._path is None:
                return
            if kind is None and next(self._old, None) is not None:
                raise InputError(f"{self._temporary} has more rows than this input; remove it or leave out --resume")
            if kind is None and self._format == "parquet":
                self._write_parquet()
            self._file.close()
            self._binary.close()  # GzipFile leaves the file below it open
            if kind is None:
                self._publish(self._temporary, self._path)
                whole = True
        except OSError as error:
            raise self._failure(error) from None
        finally:
            if kind is KeyboardInterrupt and self._made is not None and (place := self.keep()):
                print(f"the rows so far are in {place}; --resume goes on from them", file=sys.stderr)
            keep = not whole and (self._keep or (self._resume and (self.kept or self._grown)))
            if self._temporary is not None and not keep:
                self._temporary.unlink(missing_ok=True)
                record_of(self._temporary).unlink(missing_ok=True)

    def _publish(self, rows: Path, path: Path) -> None:
        """Puts what has been written under its name."""
        os.replace(rows, path)

    def _write_parquet(self) -> None:
        import polars

        kinds = {str: polars.String, int: polars.Int64, float: polars.Float64}
        frame = polars.DataFrame(
            [{name: row.get(name) for name in self._columns} for row in self._rows],
            schema={name: kinds[kind] for name, kind in self._columns.items()},
        )
        frame.write_parquet(self._file.buffer)  # type: ignore[attr-defined]

    def _failure(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return error
        place = self._path or "standard output"
        return InputError(f"cannot write {place}: {error.strerror or error}; make room or give another place")


def record_of(part: Path) -> Path:
    """The file that says how the rows in `part` are made."""
    return part.with_name(f"{part.name}.json")


def _said(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {row.get(name)}" for name in names)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
