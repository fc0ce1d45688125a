"""`longseq dna classify`: FASTA files in, a table with one row per record out."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader, Record
from seqmodels.tasks.genomics.inference import Classifier, Dtype, Logits, probabilities
from seqmodels.tasks.genomics.table import Format, Row, TableWriter, check_writable, part_of
from seqmodels.tasks.genomics.tokens import Tokens

_IDENTITY = ["file", "record_id", "length", "model"]  # a row with these is the same row when work is resumed
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
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Classify the records of FASTA files: one row per record, in the order of the input.

    Columns: record_id and description (first word and rest of the header), file, length, n_frac (part of the bases
    that the model sees as N), ambiguous (bases written with another code than A, C, G, T, U or N), softmask_frac (part
    in lower case), label (the most likely class), prob (its probability), p_<class>, logit_<class>, status, note,
    model. The status is ok, or duplicate (the name occurred before in this file; still classified), empty, only_n,
    invalid (a character that is no base; the note says which and where), truncated (the file breaks off inside this
    record) or too_long (for models that cannot read in chunks); these have no label.

    Args:
        files: FASTA files, plain or compressed with gzip or BGZF; - is standard input.
        model: Name of a shipped model, folder of a trained one, or its id on the Hugging Face hub.
        output: File for the table; without it the table goes to the screen.
        format: Format of the table; otherwise the suffix of the output says it (.tsv, .tsv.gz, .csv, .jsonl, .parquet).
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        batch_tokens: Bases per batch of short records, padding included; otherwise 65,536 on a CPU, 1,048,576 on a GPU.
        chunk: Longer records are read in chunks of so many bases; bounds the memory, does not change the answer;
            otherwise 16,384 on a CPU, 1,048,576 on a GPU.
        resume: Go on where the same command was stopped or killed: its rows are in <output>.part, are checked against
            the input and kept. For .tsv, .csv and .jsonl; Parquet and .gz are written anew.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any file or record could not be read as it should (the reasons are on standard error).
    """
    if output is not None and any(str(f) != "-" and f.exists() and output.resolve() == f.resolve() for f in files):
        raise InputError(f"the output {output} is also an input; give another name")
    _check_output(output, format, resume)
    if resume and output is not None and output.exists() and not part_of(output).exists():
        print(f"{output} is there and whole: nothing to resume", file=sys.stderr)
        return 0
    classifier = Classifier(model, device, dtype, batch_tokens, chunk)
    problems: list[str] = []
    written = 0
    progress = tqdm(unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with TableWriter(output, _columns(classifier), format, _SHOWN, _IDENTITY if resume else ()) as table, progress:
        for path in files:
            statuses: Counter[str] = Counter()
            for rows in _readable(_classified(FastaReader(path), classifier, table.kept - written), problems):
                table.write(rows)
                written += len(rows)
                statuses.update(row["status"] for row in rows)
                progress.update(sum(row["length"] for row in rows))
            if bad := {status: count for status, count in statuses.items() if status != "ok"}:
                what = ", ".join(f"{count} {status}" for status, count in sorted(bad.items()))
                problems.append(
                    f"{FastaReader(path).name}: {sum(bad.values())} of {statuses.total()} records are not ok ({what}); "
                    "see the columns status and note"
                )
        if not written:
            raise InputError("; ".join(problems) if problems else "no FASTA file was given; name at least one, or -")
    for problem in problems:
        print(f"longseq: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _check_output(output: Path | None, format: Format | None, resume: bool) -> None:
    """Says early, before a model is loaded, that a table cannot be written."""
    TableWriter(output, {}, format, resume=_IDENTITY if resume else ())
    if output is not None:
        check_writable(output)


def _readable(rows: Iterator[list[Row]], problems: list[str]) -> Iterator[list[Row]]:
    """The rows up to what cannot be read, which is added to the problems."""
    try:
        yield from rows
    except InputError as error:
        problems.append(str(error))


def _columns(classifier: Classifier) -> dict[str, type]:
    columns: dict[str, type] = {"record_id": str, "description": str, "file": str, "length": int, "n_frac": float}
    columns |= {"ambiguous": int, "softmask_frac": float, "label": str, "prob": float}
    columns |= {f"p_{name}": float for name in classifier.classes}
    columns |= {f"logit_{name}": float for name in classifier.classes}
    return columns | {"status": str, "note": str, "model": str}


def _classified(reader: FastaReader, classifier: Classifier, kept: int) -> Iterator[list[Row]]:
    """Rows of a file's records in order, a few batches at a time; what was read before a problem comes first.

    The first `kept` rows may lack their predictions. The others do not depend on `kept`, not in their last digit: they
    go through the model with the same neighbours.
    """
    waiting: list[tuple[Row, Tokens | None]] = []
    names: set[str] = set()
    given = 0

    def flush() -> list[Row]:
        nonlocal given
        given += len(waiting)
        if given <= kept:
            rows = [row for row, _ in waiting]
            waiting.clear()
            return rows
        known = [(row, tokens) for row, tokens in waiting if tokens is not None]
        for (row, _), logits in zip(known, classifier.batch([tokens for _, tokens in known]), strict=True):
            _predict(row, logits, classifier)
        rows = [row for row, _ in waiting]
        waiting.clear()
        return rows

    held = 0
    try:
        for record in reader:
            tokens, rest = _read_ahead(record, classifier.longest_batched)
            logits = None
            if rest is not None:
                if waiting:  # rows in order, and soon
                    yield flush()
                    held = 0
                tokens = None
                logits = classifier.stream(rest) if classifier.causal and given >= kept else None
                for _ in rest:  # complete the counts
                    pass
            row = _describe(record, reader.name, classifier, too_long=rest is not None and not classifier.causal)
            row |= {"model": classifier.name}
            if row["status"] == "ok" and record.name in names:
                row |= {"status": "duplicate", "note": f"record {record.number} has the name of an earlier one"}
            names.add(record.name)
            if row["status"] not in ("ok", "duplicate"):
                tokens = logits = None
            if logits is not None:
                _predict(row, logits, classifier)
            waiting.append((row, tokens))
            held += 0 if tokens is None else len(tokens)
            if held >= 8 * classifier.batch_tokens or len(waiting) >= 4096:  # enough to sort by length
                yield flush()
                held = 0
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


def _describe(record: Record, file: str, classifier: Classifier, too_long: bool) -> Row:
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
    elif too_long:
        note = f"longer than {classifier.longest_batched} bases; raise --batch-tokens"
        row |= {"status": "too_long", "note": note}
    return row


def _predict(row: Row, logits: Logits, classifier: Classifier) -> None:
    """Adds the columns that come from logits (classes,)."""
    chances = probabilities(logits)
    best = int(logits.argmax())
    row |= {"label": classifier.classes[best], "prob": float(chances[best])}
    row |= {f"p_{name}": float(p) for name, p in zip(classifier.classes, chances, strict=True)}
    row |= {f"logit_{name}": float(v) for name, v in zip(classifier.classes, logits, strict=True)}


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
