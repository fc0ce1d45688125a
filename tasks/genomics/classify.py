"""`longseq dna classify`: FASTA files in, a table with one row per record out."""

import itertools
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader, Record
from seqmodels.tasks.genomics.inference import (
    Alone,
    Answer,
    Dtype,
    Facts,
    Logits,
    Reading,
    Together,
    opened,
    probabilities,
    serve_first,
)
from seqmodels.tasks.genomics.table import Format, Row, TableWriter, check_writable, part_of
from seqmodels.tasks.genomics.tokens import Tokens
from seqmodels.workers import LostWorker, dismiss

_IDENTITY = ["file", "record_id", "length", "model"]  # a row with these is the same row when work is resumed
_ROWS = 1 << 18  # that wait at most for those before them
_SHOWN = ["record_id", "length", "n_frac", "label", "prob", "status", "note"]


def classify(
    files: list[Path],
    model: str = "enterobacteria",
    output: Path | None = None,
    format: Format | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    chunk: int | None = None,
    reading: Reading = "auto",
    overlap: int | None = None,
    devices: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Classify the records of FASTA files: one row per record, in the order of the input.

    Columns: record_id and description (first word and rest of the header), file, length, n_frac (part of the bases
    that the model sees as N), ambiguous (bases written with another code than A, C, G, T, U or N), softmask_frac (part
    in lower case), label (the most likely class), prob (its probability), p_<class>, logit_<class>, status, note,
    reading, model. The status is ok, or duplicate (the name occurred before in this file; still classified), empty,
    only_n, invalid (a character that is no base; the note says which and where), truncated (the file breaks off inside
    this record) or too_long (only with --reading two-sweeps: not enough memory); these have no label.

    The column reading says how the model has read the record. whole: at once. chunks: piece by piece, for models that
    read in one direction; the same answer as at once. two-sweeps: piece by piece, for models that read in both
    directions; the same answer as at once, but main memory is needed for every base. windows: as windows with some
    bases before and after each, each read by itself; a good approximation, in little memory.

    Args:
        files: FASTA files, plain or compressed with gzip or BGZF; - is standard input.
        model: Name of a shipped model, folder of a trained one, or its id on the Hugging Face hub.
        output: File for the table; without it the table goes to the screen.
        format: Format of the table; otherwise the suffix of the output says it (.tsv, .tsv.gz, .csv, .jsonl, .parquet).
        device: auto, cpu, cuda or cuda:<number>.
        devices: GPUs of this machine (or processes, on a CPU) that share the work. Each record goes to one of them; the
            table is the same as with one. Under torchrun, all of its processes share it, also those of other machines.
        dtype: Number format of the weights and activations.
        batch_tokens: Bases per batch of short records, padding included; otherwise 65,536 on a CPU, 1,048,576 on a GPU.
        chunk: Longer records are read in chunks of so many bases; bounds the memory, does not change the answer;
            otherwise 16,384 on a CPU, 1,048,576 on a GPU.
        reading: How a model that reads in both directions reads records longer than batch_tokens: two-sweeps (exact),
            windows (of batch_tokens bases each), or auto: two-sweeps where three quarters of the free main memory hold
            the record (about 8 bytes times the model's width per base in float32, 6 in bfloat16, and twice that for a
            model of both strands), otherwise windows.
        overlap: Bases before and after each of these windows that are read with it; otherwise batch_tokens / 8.
        resume: Go on where the same command was stopped or killed: its rows are in <output>.part, are checked against
            the input and kept. For .tsv, .csv and .jsonl; Parquet and .gz are written anew.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any file or record could not be read as it should (the reasons are on standard error).
    """
    options = {"model": model, "dtype": dtype, "batch_tokens": batch_tokens, "chunk": chunk}
    options |= {"reading": reading, "overlap": overlap}
    if serve_first(device, **options):
        return 0
    if output is not None and any(str(f) != "-" and f.exists() and output.resolve() == f.resolve() for f in files):
        raise InputError(f"the output {output} is also an input; give another name")
    _check_output(output, format, resume)
    if resume and output is not None and output.exists() and not part_of(output).exists():
        print(f"{output} is there and whole: nothing to resume", file=sys.stderr)
        dismiss()
        return 0
    problems: list[list[str]] = [[] for _ in files]
    statuses: list[Counter[str]] = [Counter() for _ in files]
    progress = tqdm(unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with (
        opened(device, devices, **options) as engine,
        TableWriter(output, _columns(engine.facts), format, _SHOWN, _IDENTITY if resume else ()) as table,
        progress,
    ):
        try:
            for file, rows in _classified(files, engine, table.kept, problems):
                table.write(rows)
                statuses[file].update(row["status"] for row in rows)
                progress.update(sum(row["length"] for row in rows))
        except LostWorker as error:
            kept = table.keep()
            way_on = f"the rows before it are in {kept}: go on with --resume" if kept else "start again"
            raise LostWorker(f"{error}; {way_on}") from None
        for path, said, counts in zip(files, problems, statuses, strict=True):
            if bad := {status: count for status, count in counts.items() if status != "ok"}:
                what = ", ".join(f"{count} {status}" for status, count in sorted(bad.items()))
                said.append(
                    f"{FastaReader(path).name}: {sum(bad.values())} of {counts.total()} records are not ok ({what}); "
                    "see the columns status and note"
                )
        all_said = [line for said in problems for line in said]
        if not any(statuses):
            raise InputError("; ".join(all_said) or "no FASTA file was given; name at least one, or -")
    for line in all_said:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if all_said else 0


def _check_output(output: Path | None, format: Format | None, resume: bool) -> None:
    """Says early, before a model is loaded, that a table cannot be written."""
    TableWriter(output, {}, format, resume=_IDENTITY if resume else ())
    if output is not None:
        check_writable(output)


def _columns(facts: Facts) -> dict[str, type]:
    columns: dict[str, type] = {"record_id": str, "description": str, "file": str, "length": int, "n_frac": float}
    columns |= {"ambiguous": int, "softmask_frac": float, "label": str, "prob": float}
    columns |= {f"p_{name}": float for name in facts.classes}
    columns |= {f"logit_{name}": float for name in facts.classes}
    return columns | {"status": str, "note": str, "reading": str, "model": str}


class _Group(NamedTuple):
    """Rows that follow each other in one file, and what is still to come for some of them."""

    rows: list[Row]
    answers: list[tuple[list[Row], Future]]
    "Rows with their logits (rows, classes), or one row with its Answer."

    def done(self) -> bool:
        """Whether all answers are there."""
        return all(future.done() for _, future in self.answers)

    def finished(self, facts: Facts) -> list[Row]:
        """The rows with their answers; waits for them."""
        for rows, future in self.answers:
            answer = future.result()
            if not isinstance(answer, Answer):
                for row, logits in zip(rows, answer, strict=True):
                    _predict(row, logits, facts.classes, "whole")
            elif answer.logits is None:
                rows[0].update(status="too_long", note=answer.note)
            else:
                _predict(rows[0], answer.logits, facts.classes, answer.reading)
        return self.rows


def _classified(
    files: list[Path], engine: Alone | Together, kept: int, problems: list[list[str]]
) -> Iterator[tuple[int, list[Row]]]:
    """Rows of all files in order, a few batches at a time, with the place of their file; what goes wrong per file.

    The first `kept` rows may lack their predictions. The others do not depend on `kept`, not in their last digit: they
    go through the model with the same neighbours.
    """
    pending: deque[tuple[int, _Group]] = deque()
    given = waiting = 0

    def finished(everything: bool) -> Iterator[tuple[int, list[Row]]]:
        nonlocal waiting
        while pending and (everything or waiting > _ROWS or pending[0][1].done()):
            file, group = pending.popleft()
            waiting -= len(group.rows)
            yield file, group.finished(engine.facts)

    try:
        for file, path in enumerate(files):
            groups = _groups(FastaReader(path), engine, kept - given)
            while (group := _next(groups, problems[file])) is not None:
                pending.append((file, group))
                given, waiting = given + len(group.rows), waiting + len(group.rows)
                yield from finished(False)
    except LostWorker:
        yield from finished(True)  # those before what is lost
        raise
    yield from finished(True)


def _next(groups: Iterator[_Group], problems: list[str]) -> _Group | None:
    """The next group; None where nothing more can be read, the reason among the problems."""
    try:
        return next(groups, None)
    except LostWorker:
        raise
    except InputError as error:
        problems.append(str(error))
        return None


def _groups(reader: FastaReader, engine: Alone | Together, kept: int) -> Iterator[_Group]:
    """The records of a file, asked about in groups; what was read before a problem comes first."""
    facts = engine.facts
    waiting: list[tuple[Row, Tokens | None]] = []
    names: set[str] = set()
    given = held = 0

    def flush() -> _Group:
        nonlocal given, held
        given, held = given + len(waiting), 0
        rows = [row for row, _ in waiting]
        known = [] if given <= kept else [(row, tokens) for row, tokens in waiting if tokens is not None]
        waiting.clear()
        asked = engine.batch([tokens for _, tokens in known]) if known else []
        return _Group(rows, [([known[i][0] for i in places], future) for places, future in asked])

    try:
        for record in reader:
            tokens, rest = _read_ahead(record, facts.longest_batched)
            future = None
            if rest is not None:
                if waiting:  # rows in order, and soon
                    yield flush()
                future = engine.stream(rest) if given >= kept else None
                for _ in rest:  # complete the counts
                    pass
            row = _describe(record, reader.name) | {"model": facts.name}
            if row["status"] == "ok" and record.name in names:
                row |= {"status": "duplicate", "note": f"record {record.number} has the name of an earlier one"}
            names.add(record.name)
            answerable = row["status"] in ("ok", "duplicate")
            if rest is not None:
                given += 1
                yield _Group([row], [([row], future)] if answerable and future is not None else [])
                continue
            waiting.append((row, tokens if answerable else None))
            held += len(tokens) if answerable else 0
            if held >= 8 * facts.batch_tokens or len(waiting) >= 4096:  # enough to sort by length
                yield flush()
    except LostWorker:
        raise
    except InputError:
        if waiting:
            yield flush()
        raise
    if waiting:
        yield flush()


def _read_ahead(record: Record, limit: int) -> tuple[Tokens, Iterator[Tokens] | None]:
    """All tokens and None if the record has at most `limit`; otherwise nothing and an iterator over all its chunks."""
    parts: list[Tokens] = []
    held = 0
    for chunk in record.chunks():
        parts.append(chunk)
        held += len(chunk)
        if held > limit:
            return np.zeros(0, dtype=np.uint8), itertools.chain(parts, record.chunks())
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8), None


def _describe(record: Record, file: str) -> Row:
    """The part of a row that needs no model; call it when the record has been read to its end."""
    counts = record.counts
    row: Row = {"record_id": record.name, "description": record.description, "file": _printable(file)}
    row |= {"length": counts.length, "ambiguous": counts.ambiguous, "status": "ok", "note": ""}
    row |= (
        {"n_frac": counts.unknown / counts.length, "softmask_frac": counts.soft_masked / counts.length}
        if (counts.length)
        else {"n_frac": None, "softmask_frac": None}
    )
    if record.truncated:
        row |= {"status": "truncated", "note": f"the file breaks off after {counts.length} bases of this record"}
    elif counts.invalid:
        position, character = counts.invalid
        row |= {"status": "invalid", "note": f"{character!r} at position {position} is no base"}
    elif not counts.length:
        row |= {"status": "empty", "note": "no bases"}
    elif counts.unknown == counts.length:
        row |= {"status": "only_n", "note": "no A, C, G or T"}
    return row


def _predict(row: Row, logits: Logits, classes: tuple[str, ...], reading: str) -> None:
    """Adds the columns that come from logits (classes,), and how they came about."""
    chances = probabilities(logits)
    best = int(logits.argmax())
    row |= {"label": classes[best], "prob": float(chances[best]), "reading": reading}
    row |= {f"p_{name}": float(p) for name, p in zip(classes, chances, strict=True)}
    row |= {f"logit_{name}": float(v) for name, v in zip(classes, logits, strict=True)}


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
