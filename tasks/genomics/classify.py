"""`longseq dna classify`: FASTA files in, a table with one row per record, interval or window out."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.table import Format, Row, TableWriter, check_writable
from seqmodels.tasks.genomics.classify_bases import (
    IDENTITY,
    SHOWN,
    BaseReader,
    BaseTracks,
    Before,
    Kepts,
    columns_of,
    segmented,
)
from seqmodels.tasks.genomics.inference import (
    Answer,
    Classifier,
    Dtype,
    Facts,
    Logits,
    Reading,
    Strand,
    Strands,
    label_of,
    labels_bases,
    opened,
    scores_of,
    serve_first,
    sizes,
    type_of,
)
from seqmodels.tasks.genomics.manifest import Manifest
from seqmodels.tasks.genomics.pieces import ANSWERED, Cut, Intervals, Records, sources_of
from seqmodels.tasks.genomics.tokens import Tokens
from seqmodels.tasks.genomics.tracks import TrackFormat, Tracks
from seqmodels.workers import LostWorker, dismiss, in_order, with_way_on

_PLACED = ["file", "seq", "start", "end", "name", "strand", "length", "model"]
_SHOWN_PLACED = ["seq", "start", "end", "name", "strand", "label", "prob", "status", "note"]
_IDENTITY = ["file", "record_id", "length", "model"]  # a row with these is the same row when work is resumed
_SCORE = {"single": "p_", "multi": "p_", "regression": "value_"}  # what a column of scores begins with
_ROWS = 1 << 18  # that wait at most for those before them
_SHOWN = ["record_id", "length", "n_frac", "label", "prob", "status", "note"]


def classify(
    files: list[Path],
    model: str = "enterobacteria",
    output: Path | None = None,
    format: Format | None = None,
    region: list[str] | None = None,
    bed: Path | None = None,
    feature: list[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    track: Path | None = None,
    track_format: TrackFormat = "bedgraph",
    strand: Strand = "fwd",
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
    """Classify the records of FASTA files, or parts of them: one row each, in the order of the input.

    By default each record of the FASTA files is classified as a whole. Parts of them instead:

        longseq dna classify genome.fa --region chr1:1,000-2,000 --region chr2      # as samtools writes regions
        longseq dna classify genome.fa --bed genes.gff3 --feature gene -o genes.tsv # each interval of a file
        longseq dna classify genome.fa --window 8192 --stride 4096 -o windows.tsv --track windows  # along all records

    Columns: record_id and description (first word and rest of the header), file, length, n_frac (part of the bases
    that the model sees as N), ambiguous (bases written with another code than A, C, G, T, U or N), softmask_frac (part
    in lower case), label (the most likely class), prob (its probability), p_<class>, logit_<class>, status, note,
    reading, model. The status is ok, or duplicate (the name occurred before in this file; still classified), empty,
    only_n, invalid (a character that is no base; the note says which and where), truncated (the file breaks off inside
    this record) or too_long (only with --reading two-sweeps: not enough memory); these have no label.

    With --region, --bed or --window the columns seq, start, end, name and strand take the place of record_id and
    description. They are those of BED: the first base is 0, and end is the base after the last. padded counts the bases
    of an interval beyond the end of its sequence, which are read as N. The status may also be missing (the FASTA has no
    such sequence) or outside (the interval begins beyond the end of its sequence). An interval on the minus strand is
    read as its reverse complement, and its windows are taken in this direction.

    A model of several labels (dna train --targets) gives each a probability of its own, and label names those of 0.5 or
    more, with ; between. A model of numbers gives the columns value_<name> instead.

    A model that labels bases (dna train --annotation) gives segments instead, a row each: the runs of bases of the same
    most likely class, with the columns seq, start, end, name, length, label, prob (the mean probability of the class)
    and p_<class>. Places are those of the sequence, and classes those of its strand as written, whichever strand is
    read. Such a model needs no windows; its tracks have a value for every base, in steps of 1/10,000:

        longseq dna classify genome.fa --model runs/coding/model -o segments.tsv --track coding --track-format bigwig

    Beside the file of the table, <output>.json says how it was made: versions, model and files with checksums or sizes,
    settings, and how many rows have which status.

    The column reading says how the model has read the record. whole: at once. chunks: piece by piece, for models that
    read in one direction; the same answer as at once. two-sweeps: piece by piece, for models that read in both
    directions; the same answer as at once, but main memory is needed for every base. windows: as windows with some
    bases before and after each, each read by itself; a good approximation, in little memory.

    Args:
        files: FASTA files, plain or compressed with gzip or BGZF, also GenBank, EMBL or FASTQ; - is standard input.
        model: Name of a shipped model, folder of a trained one, or its id on the Hugging Face hub.
        output: File for the table; without it the table goes to the screen.
        region: Part of a sequence, like chr1:1,000-2,000 (the first base is 1, and 2,000 is part of it), chr1:1000 (to
            the end) or chr1; may be given several times.
        bed: File of intervals to classify, instead of whole records: BED, or GFF3 or GTF if its suffix is .gff, .gff3
            or .gtf; also compressed with gzip. FASTA that is not plain or BGZF is unpacked into a temporary file.
        feature: Of GFF3 or GTF, take only lines of this feature (third column), like gene or CDS; may be given several
            times; otherwise all lines are taken.
        window: Classify windows of so many bases along the records or intervals, a row each. The last window is moved
            back to end at the end; where there are fewer bases, it is all there are.
        stride: Bases from the beginning of one window to that of the next; otherwise windows lie side by side.
        track: Beginning of the names of files for a genome browser. For each class the probability along the sequences
            is in PREFIX.<class>.bedgraph (or .bw, or .bed with the score); where windows overlap, it is their mean.
            PREFIX.labels.bed has the class with the highest one, adjacent stretches of the same class joined. Of a
            model of several labels or of numbers there are only the tracks of each.
        track_format: bedgraph, bigwig (needs pip install pyBigWig) or bed.
        strand: Which strand is read. fwd: as written (that of an interval, if it has one); rev: the other one, as
            reverse complement; both: the label comes from the mean of the logits of both, with the columns label_fwd,
            label_rev and strand_delta (the largest difference between the probabilities of a class). rev and both hold
            a record in memory, with a byte per base.
        format: Format of the table; otherwise the suffix of the output says it (.tsv, .tsv.gz, .csv, .jsonl, .parquet).
        device: auto, cpu, cuda or cuda:<number>.
        devices: GPUs of this machine (or processes, on a CPU) that share the work. Each record goes to one of them; the
            table is the same as with one. Under torchrun, all of its processes share it, also those of other machines.
            Of a model that labels bases, what is said of a record must fit into memory (2 bytes per base and class).
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
            the input and kept. Settings, files and weights must be the same. For .tsv, .csv and .jsonl; Parquet and .gz
            are written anew, and so are the tracks of a model that labels bases, which go without --resume.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any file or record could not be read as it should (the reasons are on standard error).
    """
    device_type = type_of(device)
    batch_tokens, chunk = sizes(device_type, batch_tokens, chunk)
    options = {"model": model, "dtype": dtype, "batch_tokens": batch_tokens, "chunk": chunk}
    options |= {"reading": reading, "overlap": overlap}
    per_base = labels_bases(model)
    if per_base:
        _check_per_base(window, track, resume)
        make, reader_options = BaseReader, {**options, "strand": strand}
    else:
        make, reader_options = Classifier, options
    if serve_first(make, device, **reader_options):
        return 0
    if output is not None and any(str(f) != "-" and f.exists() and output.resolve() == f.resolve() for f in files):
        raise InputError(f"the output {output} is also an input; give another name")
    whole = region is bed is window is None
    identity = IDENTITY if per_base else _IDENTITY if whole else _PLACED
    TableWriter(output, {}, format, resume=identity if resume else ())  # says early what cannot be written
    if output is not None:
        check_writable(output)
    cut = _cut(window, stride)
    settings = {"strand": strand, "window": window, "stride": cut and cut.stride, "region": region, "bed": bed}
    settings |= {"feature": feature, "device": device_type} | options
    manifest = Manifest(output, settings.pop("model"), [*files, *([bed] if bed else [])], settings)
    if resume and manifest.is_whole():
        dismiss()
        return 0
    sources = sources_of(files, region, bed, feature, cut)
    if track is not None and identity is _IDENTITY:
        raise InputError("a track needs places along sequences; give --window, --bed or --region too")
    tracks = None if track is None else Tracks(track, track_format)
    problems: list[list[str]] = [[] for _ in sources]
    statuses: list[Counter[str]] = [Counter() for _ in sources]
    progress = tqdm(unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with (
        opened(make, device, devices, **reader_options) as engine,
        Kepts(engine.facts, output and output.parent) if per_base else nullcontext() as kepts,
        TableWriter(
            output,
            columns_of(engine.facts.classes) if per_base else _columns(engine.facts, identity is _PLACED, strand),
            format,
            SHOWN if per_base else _SHOWN if whole else _SHOWN_PLACED,
            identity if resume else (),
            manifest.made,
        ) as table,
        progress,
    ):
        facts = engine.facts
        if track is not None and track_format == "bed" and facts.targets == "regression":
            raise InputError("a BED's scores are probabilities, and this model gives numbers; use bedgraph or bigwig")
        if kepts is not None:
            tracks = None if track is None else BaseTracks(track, track_format, kepts)
            answers = segmented(sources, engine, kepts, tracks, Before(table.kept_rows()), problems)
        else:
            answers = _classified(sources, Strands(engine, strand), table.kept, problems)
        try:
            for place, rows in answers:
                table.write(rows)
                statuses[place].update(row["status"] for row in rows)
                if tracks is not None:
                    tracks.add(rows, facts.classes, _SCORE[facts.targets])
                progress.update(sum(row["length"] for row in rows))
        except LostWorker as error:
            raise with_way_on(error, table.keep()) from None
        what, fine = "rows" if per_base else _what(whole, cut), ("ok", "only_n") if cut else ("ok",)
        for source, said, counts in zip(sources, problems, statuses, strict=True):
            if bad := {status: count for status, count in counts.items() if status not in fine}:
                those = ", ".join(f"{count} {status}" for status, count in sorted(bad.items()))
                said.append(
                    f"{source.name}: {sum(bad.values())} of {counts.total()} {what} are not ok ({those}); "
                    "see the columns status and note"
                )
        all_said = [line for said in problems for line in said]
        if not any(statuses):
            raise InputError("; ".join(all_said) or "no FASTA file was given; name at least one, or -")
        written = []
        if tracks is not None:
            lengths = {seq: length for source in sources for seq, length in source.lengths.items()}
            written = tracks.write(lengths, called=facts.targets == "single")
        manifest.forget()
    manifest.write(sum(statuses, Counter()), all_said, written)
    for line in all_said:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if all_said else 0


def _check_per_base(window: int | None, track: Path | None, resume: bool) -> None:
    if window is not None:
        raise InputError("window is for models of whole sequences, and this one labels every base; leave it out")
    if resume and track is not None:
        raise InputError("the tracks of every base are made anew; leave out --resume, or --track")


def _cut(window: int | None, stride: int | None) -> Cut | None:
    for name, value in (("window", window), ("stride", stride)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if window is None:
        if stride is not None:
            raise InputError(f"stride is {stride}, but there are no windows; give --window too")
        return None
    return Cut(window, stride or window)


def _what(whole: bool, cut: Cut | None) -> str:
    return "windows" if cut else "records" if whole else "intervals"


def _columns(facts: Facts, placed: bool, strand: Strand) -> dict[str, type]:
    if placed:
        columns: dict[str, type] = {"seq": str, "start": int, "end": int, "name": str, "strand": str, "file": str}
        columns |= {"length": int, "padded": int, "n_frac": float}
    else:
        columns = {"record_id": str, "description": str, "file": str, "length": int, "n_frac": float}
    columns |= {"ambiguous": int, "softmask_frac": float}
    labelled = facts.targets != "regression"
    if labelled:
        columns |= {"label": str, "prob": float}
    if strand == "both":
        columns |= {"strand_delta": float} | ({"label_fwd": str, "label_rev": str} if labelled else {})
    columns |= {f"{_SCORE[facts.targets]}{name}": float for name in facts.classes}
    if labelled:
        columns |= {f"logit_{name}": float for name in facts.classes}
    columns |= {"status": str, "note": str, "reading": str, "model": str}
    return columns if strand == "fwd" else columns | {"strands": str}


class _Group(NamedTuple):
    """Rows that follow each other in one file, and what is still to come for some of them."""

    rows: list[Row]
    answers: list[tuple[list[Row], tuple[Future, ...]]]
    "Rows with their logits (rows, classes), or one row with its Answer, of each strand."

    def done(self) -> bool:
        """Whether all answers are there."""
        return all(future.done() for _, futures in self.answers for future in futures)

    def finished(self, facts: Facts) -> list[Row]:
        """The rows with their answers; waits for them."""
        for rows, futures in self.answers:
            strands = [future.result() for future in futures]
            if not isinstance(strands[0], Answer):
                for row, *logits in zip(rows, *strands, strict=True):
                    _predict(row, logits, facts, "whole")
            elif lost := next((answer for answer in strands if answer.logits is None), None):
                rows[0].update(status="too_long", note=lost.note)
            else:
                readings = {answer.reading for answer in strands}
                reading = "windows" if "windows" in readings else strands[0].reading
                _predict(rows[0], [answer.logits for answer in strands], facts, reading)
        return self.rows


def _classified(
    sources: Sequence[Records | Intervals], engine: Strands, kept: int, problems: list[list[str]]
) -> Iterator[tuple[int, list[Row]]]:
    """Rows of all sources in order, a few batches at a time, with the place of theirs; what goes wrong per source.

    The first `kept` rows may lack their predictions. The others do not depend on `kept`, not in their last digit: they
    go through the model with the same neighbours.
    """

    def asked() -> Iterator[tuple[int, _Group]]:
        given = 0
        for place, source in enumerate(sources):
            groups = _groups(source, engine, kept - given)
            while (group := _next(groups, problems[place])) is not None:
                given += len(group.rows)
                yield place, group

    for place, group in in_order(asked(), lambda one: one[1].done(), lambda one: len(one[1].rows), _ROWS):
        yield place, group.finished(engine.facts)


def _next(groups: Iterator[_Group], problems: list[str]) -> _Group | None:
    """The next group; None where nothing more can be read, the reason among the problems."""
    try:
        return next(groups, None)
    except LostWorker:
        raise
    except InputError as error:
        problems.append(str(error))
        return None


def _groups(source: Records | Intervals, engine: Strands, kept: int) -> Iterator[_Group]:
    """The pieces of a source, asked about in groups; what was read before a problem comes first."""
    facts = engine.facts
    waiting: list[tuple[Row, Tokens | None]] = []
    given = held = 0

    def flush() -> _Group:
        nonlocal given, held
        given, held = given + len(waiting), 0
        rows = [row for row, _ in waiting]
        known = [] if given <= kept else [(row, tokens) for row, tokens in waiting if tokens is not None]
        waiting.clear()
        asked = engine.batch([tokens for _, tokens in known]) if known else []
        return _Group(rows, [([known[i][0] for i in places], futures) for places, futures in asked])

    try:
        for piece in source.pieces(facts.longest_batched):
            futures = None
            if piece.rest is not None:
                if waiting:  # rows in order, and soon
                    yield flush()
                futures = engine.stream(piece.rest) if given >= kept else None
                for _ in piece.rest:  # complete the counts
                    pass
            row = piece.describe() | {"model": facts.name, "strands": engine.strand}
            answerable = row["status"] in ANSWERED
            if piece.rest is not None:
                given += 1
                yield _Group([row], [([row], futures)] if answerable and futures is not None else [])
                continue
            waiting.append((row, piece.tokens if answerable else None))
            held += len(piece.tokens) if answerable else 0
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


def _predict(row: Row, strands: list[Logits], facts: Facts, reading: str) -> None:
    """Adds the columns that come from the logits (classes,) of the strands that were read, and how they came about."""
    logits = np.mean(strands, axis=0)
    scores, each = scores_of(logits, facts.targets), scores_of(np.stack(strands), facts.targets)
    row |= {"reading": reading, "strand_delta": float(np.ptp(each, axis=0).max())}
    row |= {f"{_SCORE[facts.targets]}{name}": float(v) for name, v in zip(facts.classes, scores, strict=True)}
    if facts.targets != "regression":
        row |= {"label": label_of(scores, facts.classes, facts.targets), "prob": float(scores.max())}
        row |= {"label_fwd": label_of(each[0], facts.classes, facts.targets)}
        row |= {"label_rev": label_of(each[-1], facts.classes, facts.targets)}
        row |= {f"logit_{name}": float(v) for name, v in zip(facts.classes, logits, strict=True)}
