"""Labelled DNA, read from the forms in which it comes, with the split into train, dev and test where there is one.

Told apart by what they are:

- a table (.csv, .tsv, .parquet, also .gz) with the columns `sequence` (or `seq`) and `label`: a sequence per row;
- a headerless table (.data) of class, name and sequence, as of the UCI repository;
- a FASTA file with a table of labels that has the columns `record` (first word of the header) and `label`, or whose
  headers end in `|label`;
- a folder with a folder per class, of text or FASTA files with a sequence each (Genomic Benchmarks);
- a folder with such a file or folder per split: train, dev (or valid, validation, val) and test (GUE, the Nucleotide
  Transformer's tasks, Genomic Benchmarks);
- a table with the columns `file` (beside the table) and `record`, or a folder whose `metadata.csv` is one: long records
  from which windows are drawn. Classes are the column `species` if there is one, else `label`.

Rows of a table may name their split in a column `split`. Class ids follow the sorted names.

With targets "multi", a label is any number of names with ";" between them, and with "regression" a number; instead of
`label` there may then be several columns `label_<name>`, with 0, 1 or a number, and nothing where it is not known.
"""

import csv
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqmodels.config import Targets
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.intervals import printable
from seqmodels.tasks.genomics.tokens import Counts, Tokens, encode

SPLITS = {"train": ("train",), "dev": ("dev", "valid", "validation", "val"), "test": ("test",)}
_TABLES = (".csv", ".tsv", ".txt", ".parquet", ".data")
_FASTA = (".fa", ".fna", ".fasta", ".ffn")
_WHITE_SPACE = " \t\r\n"
Columns = dict[str, list[str]]


@dataclass
class LabelledRecords:
    """Sequences in memory, each with the id of its class, or with several labels or values."""

    names: list[str]
    "Names of the records; rows of a table are called row_2 (its first line after the header) and so on."
    tokens: list[Tokens]
    "Tokens (l,) of each record."
    labels: NDArray
    "Class ids (records,) int64; for targets 'multi' and 'regression' (records, classes) float32, NaN where not known."
    classes: tuple[str, ...]
    "Names of the classes (of the values, in a regression) in order of their ids."
    long: bool
    "Whether these are long records, of which windows are the samples."
    targets: Targets = "single"
    "What a record is labelled with: one class, any number of classes, or numbers."

    def take(self, places: NDArray[np.int64]) -> "LabelledRecords":
        """The records at these places."""
        names, tokens = [self.names[i] for i in places], [self.tokens[i] for i in places]
        return LabelledRecords(names, tokens, self.labels[places], self.classes, self.long, self.targets)


def splits_of(data: Path, labels: Path | None = None) -> tuple[str, ...]:
    """The splits that data come in (of train, dev, test); none for data that are one whole."""
    _check_there(data)
    if labels is not None:
        return ()
    if data.is_dir() and not (data / "metadata.csv").exists():
        return tuple(split for split in SPLITS if _parts(data, split))
    table = data / "metadata.csv" if data.is_dir() else data
    named = read_table(table).get("split", []) if _suffix(table) in _TABLES[:-1] else []
    return tuple(split for split, names in SPLITS.items() if set(names) & set(named))


def load_labelled(
    data: Path,
    labels: Path | None = None,
    *,
    split: str | None = None,
    classes: tuple[str, ...] | None = None,
    targets: Targets = "single",
) -> LabelledRecords:
    """Labelled records of any of the kinds above; with `classes`, other names are an InputError.

    `split` is taken where the data have splits, and everything where they have none.
    """
    _check_there(data)
    if data.is_dir() and not (data / "metadata.csv").exists() and labels is None:
        parts = _parts(data, split or "train")
        if not parts and (found := splits_of(data)):
            raise InputError(f"{data} has no split {split!r}; it has {', '.join(found)}")
        parts = parts or [data]
    else:
        parts = [data / "metadata.csv" if data.is_dir() and labels is None else data]
    names, tokens, columns, long = [], [], dict[str, list[str]](), False
    for part in parts:
        more_names, more_tokens, more_columns, long = _from_any(part, labels, split, targets)
        names += more_names
        tokens += more_tokens
        if columns and columns.keys() != more_columns.keys():
            raise InputError(f"{part} has other columns of labels than {parts[0]}; give all parts the same")
        columns = {name: columns.get(name, []) + column for name, column in more_columns.items()}
    if not names:
        raise InputError(f"{data} has no records{f' of the split {split!r}' if split else ''}")
    ids, classes = label_ids(columns, targets, classes, names, labels or data)
    return LabelledRecords(names, tokens, ids, classes, long, targets)


def _check_there(data: Path) -> None:
    if not data.exists():
        raise InputError(f"{data} does not exist; check the path")


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _parts(folder: Path, split: str) -> list[Path]:
    """The file, files (train-00000-of-00002.parquet, ...) or folder of a split, also in a folder `data`."""
    names = SPLITS.get(split, (split,))
    found = []
    for place in (folder, folder / "data"):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            stem, sharded, _ = path.name.split(".")[0].partition("-")
            if stem in names and (path.is_dir() or _suffix(path) in _TABLES + _FASTA):
                found.append((path, bool(sharded)))
    whole = [path for path, sharded in found if not sharded]
    if len(whole) > 1 or (whole and len(found) > 1):
        raise InputError(f"{folder} has {' and '.join(path.name for path, _ in found)} for one split; keep one")
    return [path for path, _ in found]


def _from_any(
    path: Path, labels: Path | None, split: str | None, targets: Targets
) -> tuple[list[str], list[Tokens], Columns, bool]:
    """Names, tokens and columns of labels of one file or folder, and whether its records are long."""
    if labels is not None:
        return *_from_fasta(path, labels, targets), False
    if path.is_dir():
        return *_from_class_folders(path), False
    if _suffix(path) == ".data":
        return *_from_headerless(path), False
    if _suffix(path) not in _TABLES:
        return *_from_headers(path), False
    table, lines = _numbered(path)
    if split is not None and "split" in table:
        wanted = SPLITS.get(split, (split,))
        rows = [i for i, name in enumerate(table["split"]) if name in wanted]
        table = {name: [column[i] for i in rows] for name, column in table.items()}
        lines = [lines[i] for i in rows]
    if {"file", "record"} <= table.keys():
        return *_from_long_records(table, path), True
    return *_from_sequences(table, lines, path, targets), False


def label_ids(
    columns: Columns, targets: Targets, classes: tuple[str, ...] | None, names: list[str], where: Path
) -> tuple[NDArray, tuple[str, ...]]:
    """Labels as LabelledRecords has them, and the classes."""
    several = {name.removeprefix("label_"): column for name, column in columns.items() if name != "label"}
    if targets == "single":
        texts = columns.get("label")
        if texts is None:
            raise InputError(f"{where} has several columns of labels; say with --targets if multi or regression")
        classes = classes or tuple(sorted(set(texts)))
        ids = {name: i for i, name in enumerate(classes)}
        for name, text in zip(names, texts, strict=True):
            if text not in ids:
                raise _unknown(where, text, name, classes)
            if not text.isprintable():
                raise InputError(f"{where}: label {text!r} of {name} cannot be printed; correct line ends and quotes")
        return np.array([ids[text] for text in texts], dtype=np.int64), classes
    if "label" in columns and targets == "multi":
        sets = [{part.strip() for part in text.split(";")} - {""} for text in columns["label"]]
        classes = classes or tuple(sorted(set().union(*sets)))
        for name, own in zip(names, sets, strict=True):
            if own - set(classes):
                raise _unknown(where, min(own - set(classes)), name, classes)
        return np.array([[c in own for c in classes] for own in sets], dtype=np.float32), classes
    if "label" in columns:
        several = {"value": columns["label"]}
    classes = classes or tuple(sorted(several))
    if missing := [c for c in classes if c not in several]:
        raise InputError(f"{where} has no column label_{missing[0]}, which the model predicts; add it")
    values = np.full((len(names), len(classes)), np.nan, dtype=np.float32)
    for k, c in enumerate(classes):
        for i, text in enumerate(several[c]):
            values[i, k] = _number(text, targets, f"{where}: label {text!r} of {names[i]}")
    if np.isnan(values).all(1).any():
        name = names[int(np.isnan(values).all(1).argmax())]
        raise InputError(f"{where} has no label for {name}; add one or remove the record")
    return values, classes


def _number(text: str, targets: Targets, what: str) -> float:
    if not text:
        return np.nan
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or (targets == "multi" and value not in (0, 1)):
        expected = "0, 1 or nothing" if targets == "multi" else "a number or nothing"
        raise InputError(f"{what} is not {expected}; correct it")
    return value


def _unknown(where: Path, text: str, name: str, classes: tuple[str, ...]) -> InputError:
    known = ", ".join(classes)
    return InputError(f"{where}: label {text!r} of {name} is not a class of the model ({known})")


def read_table(path: Path) -> Columns:
    """Columns of a CSV or TSV file (by what its first line holds; also .gz) or of Parquet, as text."""
    return _numbered(path)[0]


def _numbered(path: Path) -> tuple[Columns, list[int]]:
    """The same, without empty rows, and the line on which each row begins (of Parquet as if it had lines)."""
    import polars

    try:
        content = path.read_bytes()
        if content.startswith(b"PAR1"):
            frame = polars.read_parquet(io.BytesIO(content))
            columns = {name: ["" if v is None else str(v) for v in frame[name].to_list()] for name in frame.columns}
            return columns, list(range(2, len(frame) + 2))
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; copy or download it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; give a table as CSV or TSV") from None
    except polars.exceptions.PolarsError as error:
        raise InputError(f"{path} is not whole: {printable(str(error).splitlines()[0])}; make it again") from None
    header, *rows = _cells(text, path) or [(1, [])]
    names = header[1]
    if not names:
        raise InputError(f"{path} is empty; give a table with a header line")
    if len(set(names)) < len(names) or not "".join(names).isprintable():
        raise InputError(f"{path} line {header[0]}: {str(names)[:100]} are not names of columns, each once; correct it")
    for line, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path} line {line} has {len(row)} columns, the first line has {len(names)}; correct it")
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(names)}
    return columns, [line for line, _ in rows]


def _cells(text: str, path: Path) -> list[tuple[int, list[str]]]:
    """Cells of each row that has any, and the line on which it begins.

    Tables with tabs have no quotes (dna classify writes them as they are), but around a whole cell (R writes them).
    """
    tabs = "\t" in text.lstrip().split("\n", 1)[0]
    quotes = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # long sequences
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **quotes)
    found, line = [], 1
    try:
        for row in reader:
            cells = [cell.strip(_WHITE_SPACE) for cell in row]
            if tabs:
                cells = [c[1:-1] if len(c) > 1 and c[0] == c[-1] == '"' else c for c in cells]
            inner = [part for cell in row for part in re.split("\r\n?|\n", cell)[1:]]
            if any(part.count(",") == len(row) - 1 for part in inner):  # otherwise those rows would be lost
                raise InputError(
                    f"{path} line {line}: a cell in quotes goes on to line {reader.line_num} and holds what looks like "
                    "rows of the table; add the quote that is missing, or remove the one too many"
                )
            if any(cells):
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path} line {line} is not a row of a table: {error}; correct it") from None
    return found


def read_labels(path: Path) -> dict[str, str]:
    """Label of each record from a table with the columns record and label."""
    table = read_table(path)
    if not {"record", "label"} <= table.keys():
        raise InputError(f"{path} has the columns {', '.join(table)}; expected record and label")
    labels: dict[str, str] = {}
    for record, label in zip(table["record"], table["label"], strict=True):
        if labels.setdefault(record, label) != label:
            raise InputError(f"{path} gives record {record!r} two labels, {labels[record]!r} and {label!r}; keep one")
        if not label:
            raise InputError(f"{path} has no label for record {record!r}; add it or remove the row")
    return labels


def _from_sequences(
    table: Columns, lines: list[int], path: Path, targets: Targets
) -> tuple[list[str], list[Tokens], Columns]:
    """A sequence per row; `lines` are where the rows begin."""
    columns = {name: column for name, column in table.items() if name == "label" or name.startswith("label_")}
    if targets == "single" or "label" in columns:
        columns = {name: column for name, column in columns.items() if name == "label"} or columns
    sequences = table.get("sequence", table.get("seq"))
    if sequences is None or not columns:
        found = ", ".join(table)
        raise InputError(f"{path} has the columns {found}; expected sequence and label, or file, record and label")
    tokens = []
    for i, (line, sequence) in enumerate(zip(lines, sequences, strict=True)):
        tokens.append(_checked(sequence.encode(), f"{path} line {line}"))
        if "label" in columns and targets != "multi" and not columns["label"][i]:
            raise InputError(f"{path} line {line} has no label; add it or remove the row")
    return [f"row_{line}" for line in lines], tokens, columns


def _from_headerless(path: Path) -> tuple[list[str], list[Tokens], Columns]:
    """Rows of class, name and sequence: the UCI repository's splice junctions and promoters."""
    names, tokens, texts = [], [], []
    for line, row in enumerate(_read_text(path).splitlines(), start=1):
        if not row.strip():
            continue
        fields = [field.strip() for field in row.split(",")]
        if len(fields) != 3 or not all(fields):
            raise InputError(f"{path} line {line} is not 'class, name, sequence'; correct the line")
        tokens.append(_checked(fields[2].encode(), f"{path} line {line}"))
        names.append(fields[1])
        texts.append(fields[0])
    return names, tokens, {"label": texts}


def _from_headers(path: Path) -> tuple[list[str], list[Tokens], Columns]:
    """FASTA whose headers end in |label, as of the Nucleotide Transformer's tasks."""
    names, tokens, texts = [], [], []
    for record in FastaReader(path):
        header = f"{record.name} {record.description}".strip()
        name, bar, text = header.rpartition("|")
        if not bar or not text.strip():
            raise InputError(
                f"{path} needs a table of labels, as record {header!r} has no |label at its end; give one with the "
                "columns record and label as --labels"
            )
        tokens.append(record.tokens())
        _check(record.counts, f"{path}, record {header!r}")
        names.append(name)
        texts.append(text.strip())
    return names, tokens, {"label": texts}


def _from_class_folders(folder: Path) -> tuple[list[str], list[Tokens], Columns]:
    """A folder per class, a sequence per file, as of the Genomic Benchmarks; FASTA files may have more."""
    kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names, tokens, texts = [], [], []
    for kind in kinds:
        for path in sorted(kind.iterdir(), key=_natural):
            if path.name.startswith(".") or path.is_dir():
                continue
            content = _read_text(path).encode()
            if content.startswith(b">"):
                records = _read_fasta(path)
            else:
                records = {path.name.split(".")[0]: _checked(content, str(path))}
            names += [f"{kind.name}/{name}" for name in records]
            tokens += records.values()
            texts += [kind.name] * len(records)
    if not names:
        raise InputError(
            f"{folder} has no metadata.csv, no train or test, and no folders of classes with sequences; give a table, "
            "a FASTA file or a folder that has one of these"
        )
    return names, tokens, {"label": texts}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders 2.txt before 10.txt."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; copy or download it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; give sequences as text or FASTA") from None


def _checked(sequence: bytes, where: str) -> Tokens:
    counts = Counts()
    tokens = encode(sequence, counts)
    _check(counts, where)
    return tokens


def _check(counts: Counts, where: str) -> None:
    if counts.invalid:
        position, character = counts.invalid
        raise InputError(f"{where}: {character!r} at position {position} is no base; remove or correct the sequence")
    if counts.unknown == counts.length:
        raise InputError(f"{where} has no A, C, G or T; remove the sequence")


def _read_fasta(path: Path) -> dict[str, Tokens]:
    records: dict[str, Tokens] = {}
    for record in FastaReader(path):
        if record.name in records:
            raise InputError(f"{path} has two records named {record.name!r}; rename one")
        records[record.name] = record.tokens()
        _check(record.counts, f"{path}, record {record.name!r}")
    return records


def _from_fasta(data: Path, labels: Path, targets: Targets) -> tuple[list[str], list[Tokens], Columns]:
    _check_there(labels)
    records = _read_fasta(data)
    return list(records), list(records.values()), label_columns(labels, list(records), data, targets)


def label_columns(labels: Path, names: list[str], where: Path, targets: Targets) -> Columns:
    """The columns of labels in a table of labels, of the records that `where` names."""
    table = read_table(labels)
    columns = {name: column for name, column in table.items() if name == "label" or name.startswith("label_")}
    if "label" in columns:
        columns = {"label": columns["label"]}
    if targets == "single":
        read_labels(labels)  # which may repeat a record with the same label
    if "record" not in table or not columns:
        raise InputError(f"{labels} has the columns {', '.join(table)}; expected record and label")
    row_of = {record: i for i, record in enumerate(table["record"])}
    if targets != "single" and len(row_of) < len(table["record"]):
        raise InputError(f"{labels} names a record twice; keep one row for each")
    for name in names:
        if name not in row_of:
            raise InputError(f"{labels} has no label for record {name!r} of {where}; add it")
    rows = [row_of[name] for name in names]
    return {name: [column[i] for i in rows] for name, column in columns.items()}


def _from_long_records(table: Columns, path: Path) -> tuple[list[str], list[Tokens], Columns]:
    column = "species" if "species" in table else "label"
    if column not in table:
        raise InputError(f"{path} has neither a column species nor a column label; add one")
    tokens = []
    files: dict[str, dict[str, Tokens]] = {}
    for file, record in zip(table["file"], table["record"], strict=True):
        if file not in files:
            files[file] = _read_fasta(path.parent / file)
        if record not in files[file]:
            raise InputError(f"{path} names record {record!r}, which {file} does not have; correct the table")
        tokens.append(files[file][record])
    return table["record"], tokens, {"label": table[column]}
