"""Labelled DNA, read from CSV, from FASTA with a table of labels, or from long records.

Three kinds of data are understood, told apart by what they are:

- a table (.csv or .tsv, also .gz) with the columns `sequence` and `label`: one short sequence per row;
- FASTA files with a table of labels that has the columns `record` (first word of the header) and `label`;
- a table with the columns `file` (beside the table) and `record`, or a folder whose `metadata.csv` is one: long records
  from which windows are drawn. Classes are the column `species` if there is one, else `label`; of the column `split`,
  if there is one, rows with `train` are for training and rows with `test` for evaluation.

Class ids follow the sorted names.
"""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.tokens import Counts, Tokens, encode


@dataclass
class LabelledRecords:
    """Sequences in memory, each with the id of its class."""

    names: list[str]
    "Names of the records; rows of a table are called row_2 (its first line after the header) and so on."
    tokens: list[Tokens]
    "Tokens (l,) of each record."
    labels: NDArray[np.int64]
    "Class ids (records,)."
    classes: tuple[str, ...]
    "Class names in order of their ids."
    long: bool
    "Whether these are long records, of which windows are the samples."


def load_labelled(
    data: Path, labels: Path | None = None, *, split: str | None = None, classes: tuple[str, ...] | None = None
) -> LabelledRecords:
    """Labelled records of any of the three kinds (see the module); with `classes`, other names are an InputError."""
    if not data.exists():
        raise InputError(f"{data} does not exist; check the path")
    if data.is_dir() and not (data / "metadata.csv").exists():
        raise InputError(f"{data} has no metadata.csv; give a folder with one, a table or a FASTA file")
    table_path = data / "metadata.csv" if data.is_dir() else data
    long = False
    if labels is not None:
        names, tokens, texts = _from_fasta(data, labels)
    elif not _is_table(table_path):
        raise InputError(f"{data} needs a table of labels; give one with the columns record and label as --labels")
    else:
        table = read_table(table_path)
        if {"file", "record"} <= table.keys():
            names, tokens, texts = _from_long_records(table, table_path, split)
            long = True
        elif {"sequence", "label"} <= table.keys():
            names, tokens, texts = _from_sequences(table, table_path)
        else:
            found = ", ".join(table)
            raise InputError(
                f"{table_path} has the columns {found}; expected sequence and label, or file, record and label"
            )
    if not names:
        raise InputError(f"{table_path} has no records{f' of the split {split!r}' if split and long else ''}")
    if classes is None:
        classes = tuple(sorted(set(texts)))
    ids = {name: i for i, name in enumerate(classes)}
    for name, text in zip(names, texts, strict=True):
        if text not in ids:
            known = ", ".join(classes)
            raise InputError(f"{labels or table_path}: label {text!r} of {name} is not a class of the model ({known})")
    return LabelledRecords(names, tokens, np.array([ids[t] for t in texts], dtype=np.int64), classes, long)


def read_table(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV or TSV file (by what its first line holds; also .gz) as text."""
    import polars

    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        content.decode("utf-8")
        separator = "\t" if b"\t" in content.split(b"\n", 1)[0] else ","
        frame = polars.read_csv(io.BytesIO(content), separator=separator, infer_schema=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; give a table as CSV or TSV") from None
    except polars.exceptions.NoDataError:
        raise InputError(f"{path} is empty; give a table with a header line") from None
    except polars.exceptions.PolarsError as error:
        raise InputError(f"{path} is not a table: {str(error).splitlines()[0]}") from None
    return {name.strip(): [value or "" for value in frame[name].to_list()] for name in frame.columns}


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


def _is_table(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".txt"))


def _from_sequences(table: dict[str, list[str]], path: Path) -> tuple[list[str], list[Tokens], list[str]]:
    tokens = []
    for line, (sequence, label) in enumerate(zip(table["sequence"], table["label"], strict=True), start=2):
        tokens.append(_checked(sequence.encode(), f"{path} line {line}"))
        if not label:
            raise InputError(f"{path} line {line} has no label; add it or remove the row")
    return [f"row_{i + 2}" for i in range(len(tokens))], tokens, table["label"]


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


def _from_fasta(data: Path, labels: Path) -> tuple[list[str], list[Tokens], list[str]]:
    label_of = read_labels(labels)
    records = _read_fasta(data)
    for name in records:
        if name not in label_of:
            raise InputError(f"{labels} has no label for record {name!r} of {data}; add it")
    return list(records), list(records.values()), [label_of[name] for name in records]


def _from_long_records(
    table: dict[str, list[str]], path: Path, split: str | None
) -> tuple[list[str], list[Tokens], list[str]]:
    column = "species" if "species" in table else "label"
    if column not in table:
        raise InputError(f"{path} has neither a column species nor a column label; add one")
    names, tokens, texts = [], [], []
    files: dict[str, dict[str, Tokens]] = {}
    splits = table.get("split", [split] * len(table["file"]))
    for file, record, text, part in zip(table["file"], table["record"], table[column], splits, strict=True):
        if split is not None and part != split:
            continue
        if file not in files:
            files[file] = _read_fasta(path.parent / file)
        if record not in files[file]:
            raise InputError(f"{path} names record {record!r}, which {file} does not have; correct the table")
        names.append(record)
        tokens.append(files[file][record])
        texts.append(text)
    return names, tokens, texts
