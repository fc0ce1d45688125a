"""`longseq dna explain`: which bases made a model say what it says of a sequence.

The command: what there is to explain in files, and its rows, tracks and picture. The figures are of importance.py.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.table import Format, Row, TableWriter, check_writable
from seqmodels.tasks.genomics.importance import Effects, Explainer, Floats, Method, importance, is_base
from seqmodels.tasks.genomics.inference import Dtype, Strand, sizes, type_of
from seqmodels.tasks.genomics.intervals import Interval
from seqmodels.tasks.genomics.logo import BASES, PER_ROW, Panel, check_picture, write_picture
from seqmodels.tasks.genomics.manifest import Manifest
from seqmodels.tasks.genomics.pieces import ANSWERED, Intervals, Records, sources_of
from seqmodels.tasks.genomics.tokens import Tokens, decode, reverse_complement
from seqmodels.tasks.genomics.tracks import Tracks

_IDENTITY = ["file", "seq", "start", "name", "strand", "ref", "alt", "class", "strands", "model"]
_SHOWN = ["seq", "start", "ref", "alt", "class", "dp", "dlogit", "change", "llr", "importance", "status", "note"]
_PICTURED = 60  # rows that a picture has room for


def explain(
    files: list[Path],
    model: str = "enterobacteria",
    output: Path | None = None,
    format: Format | None = None,
    label: list[str] | None = None,
    method: Method = "mutagenesis",
    region: list[str] | None = None,
    bed: Path | None = None,
    feature: list[str] | None = None,
    context: int | Literal["all"] = 0,
    span: int | None = None,
    track: Path | None = None,
    track_format: Literal["bedgraph", "bigwig"] = "bedgraph",
    picture: Path | None = None,
    strand: Strand = "fwd",
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Tell which bases made a model say what it says of a sequence: a table, tracks for a browser, and a logo.

    Of each record of the FASTA files, or of parts of them, every base is looked at:

        longseq dna explain promoters.fa --model runs/tata/model -o bases.tsv --picture logo.png
        longseq dna explain genome.fa --region chr1:5,001-5,100 --context 500 --model runs/tf/model -o bases.tsv
        longseq dna explain genome.fa --bed peaks.bed --span 200 --method gradient -o bases.tsv --track importance

    What is explained is a number that the model gives of the sequence. Of a classifier it is the log-odds of a class,
    ln(p / (1 - p)), where p is its probability; of a model of numbers, a number. Of a model that predicts bases it is
    the log-likelihood of the sequence (natural logarithm), probabilities being among A, C, G and T. Next-token models:
    the sum of log p(base | bases before it), of all bases but the first. Masked-token models: of each base that is
    explained, log p(base | all others) by itself, the base being hidden.

    mutagenesis (in-silico mutagenesis): each base is exchanged for the three others, one at a time, and the model
    reads the changed sequence; exact. One row per base and alternative. For a sequence of l bases the model reads 3 l
    sequences (l, for a masked-token model); of one that reads in one direction only what follows the base.

    gradient (gradient x input): what the gradient makes of the same exchanges, from one reading; an approximation that
    is good where the model is nearly linear; try it beside mutagenesis on some sequences first. One row per base. It
    goes through embeddings of single bases and of k-mers (every word with the base counts). Not for masked-token models
    and not for k-mer regressions.

    The importance of a base is the score that it gives minus the mean of the scores that A, C, G and T give in its
    place: positive where the base speaks for the class, negative where it speaks against it.

    Columns: seq, start, end (of the base, as in BED: the first base is 0), name and strand of the record or interval,
    ref (the base; always of the strand that is in the file), then of mutagenesis: alt, class, p_ref (the probability
    of the class before the exchange), dp and dlogit (changes of the probability and of the log-odds; positive: the
    alternative speaks more for the class). Models of numbers have value_ref and change instead of the three, models
    that predict bases have llr (as in dna variants) instead of all. Of gradient: class, p_ref, importance, and grad_A
    to grad_T (the importance that each base would have there). Then file, status, note, strands (what was read), model.

    N has no rows, and counts for nothing but the reading of its neighbours; lower case is read as upper case. A record
    without an explanation has one row without a base, and its status says why: empty, only_n, invalid, truncated,
    missing, outside (as of dna classify), or too_long (see --batch-tokens). <output>.json says how the table was made.

    Args:
        files: FASTA files, plain or compressed with gzip or BGZF, also GenBank, EMBL or FASTQ; - is standard input.
        model: Name of a shipped model, folder of a trained one, or its id on the Hugging Face hub: a classifier (dna
            train) or a model that predicts bases (dna pretrain, Caduceus).
        output: File for the table; without it the table goes to the screen.
        label: Class to explain; may be given several times. Otherwise the one that the model finds most likely, of each
            record its own (of a model of numbers, all of them).
        method: mutagenesis or gradient, see above.
        region: Part of a sequence to explain, like chr1:1,000-2,000 (the first base is 1, and 2,000 is part of it),
            chr1:1000 (to the end) or chr1; may be given several times.
        bed: File of intervals to explain: BED, or GFF3 or GTF if its suffix is .gff, .gff3 or .gtf; also compressed
            with gzip. Intervals on the minus strand are read, and drawn, as their reverse complement.
        feature: Of GFF3 or GTF, take only lines of this feature (third column); may be given several times.
        context: Bases on each side of a region or interval that the model reads with it, without explaining them (N
            beyond the ends of a sequence); or all: the whole sequence.
        span: Explain only so many bases in the middle of each record, region or interval.
        track: Beginning of the names of files for a genome browser: the importance of each base in
            PREFIX.<class>.bedgraph (or .bw), PREFIX.predicted.bedgraph if no class is named, and
            PREFIX.log-likelihood.bedgraph for a model that predicts bases.
        track_format: bedgraph or bigwig (needs pip install pyBigWig).
        picture: File for a picture (.png, .svg or .pdf): the bases as letters as high as they are important, 100 in a
            row, upside down where they speak against the class; below them the change that each base would make. It
            has room for 60 rows.
        strand: Which strand is read. fwd: as written (that of an interval, if it has one); rev: the other one; both:
            the mean of both (of the logits, or of the log-likelihoods). Bases keep their places in any case. A model of
            both strands says the same whichever is given.
        format: Format of the table; otherwise the suffix of the output says it (.tsv, .tsv.gz, .csv, .jsonl, .parquet).
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations; bfloat16 blurs small changes.
        batch_tokens: Bases that are read at a time; otherwise 65,536 on a CPU, 1,048,576 on a GPU. Also the longest
            sequence, context included, that a gradient or a model that reads in both directions can take; models that
            read in one direction take any with mutagenesis.
        resume: Go on where the same command was stopped or killed, from <output>.part; for .tsv, .csv and .jsonl.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any file or record could not be read as it should (the reasons are on standard error).
    """
    if context == "all":
        wide = None
    elif context < 0:
        raise InputError(f"context is {context}; give 0 bases or more, or all")
    else:
        wide = context
    if context != 0 and region is None and bed is None:
        raise InputError("--context is for what lies around a --region or --bed; a record is read whole anyway")
    if span is not None and span < 1:
        raise InputError(f"span is {span}; explain at least 1 base")
    inputs = [*files, *([] if bed is None else [bed])]
    for path in (output, picture):
        if path is not None and any(str(f) != "-" and f.exists() and path.resolve() == f.resolve() for f in inputs):
            raise InputError(f"the output {path} is also an input; give another name")
    TableWriter(output, {}, format, resume=_IDENTITY if resume else ())  # says early what cannot be written
    device_type = type_of(device)
    batch_tokens, _ = sizes(device_type, batch_tokens)
    if output is not None:
        check_writable(output)
    settings = {"method": method, "label": label, "strand": strand, "region": region, "bed": bed, "feature": feature}
    settings |= {"context": context, "span": span, "device": device_type, "dtype": dtype, "batch_tokens": batch_tokens}
    manifest = Manifest(output, model, inputs, settings)
    if resume and manifest.is_whole():
        return 0
    if picture is not None:
        check_picture(picture)
    explainer = Explainer(model, device, dtype, strand=strand, batch_tokens=batch_tokens)
    if method == "gradient":
        explainer.check_gradient()
    asked = explainer.numbers_of(label)
    columns = _columns(explainer, method)
    shown, identity = ([name for name in names if name in columns] for names in (_SHOWN, _IDENTITY))
    drawn = _Drawn(explainer, method, label, track, track_format, picture)
    sources = sources_of(files, region, bed, feature)
    statuses, problems, unexplained = Counter[str](), list[str](), list[str]()
    lengths: dict[str, int] = {}
    progress = tqdm(unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with TableWriter(output, columns, format, shown, identity if resume else (), manifest.made) as table, progress:
        given = 0
        for stretch in _stretches(sources, wide, span, explainer.longest(method), problems):
            if stretch.common["status"] in ANSWERED:
                classes = asked or explainer.predicted(stretch.tokens)
                each = len(classes) * (1 if method == "gradient" else 3)
                is_kept = given + each * int(is_base(stretch.bases).sum()) <= table.kept
                effects = None if is_kept else _effects(stretch, explainer, method, classes, progress.update)
                rows = list(_rows(stretch, explainer, method, classes, effects))
            else:
                rows = [stretch.common]
                unexplained.append("{name} is {status}: {note}".format(**stretch.common))
            rows = [row | {"strands": strand, "model": model} for row in rows]
            table.write(rows)
            given += len(rows)
            statuses.update(row["status"] for row in rows)
            if stretch.common["status"] in ANSWERED:
                lengths.setdefault(stretch.read.seq, stretch.read.end)
                drawn.add(stretch, rows)
        if unexplained:
            what = "records or intervals have" if len(unexplained) > 1 else "record or interval has"
            problems.append(f"{len(unexplained)} {what} no explanation; {unexplained[0]}")
        if not statuses:
            raise InputError("; ".join(problems) or "no FASTA file was given; name at least one, or -")
        for source in sources:
            lengths |= source.lengths
        written = drawn.write(lengths)
        manifest.forget()
    manifest.write(statuses, problems, written)
    for line in problems:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if problems else 0


class Stretch(NamedTuple):
    """Bases to be explained, in what is read with them."""

    common: Row
    "The columns that its rows share; the only row, where nothing can be explained."
    place: Interval
    "Where the bases lie."
    read: Interval
    "Where that lies which is read."
    tokens: Tokens
    "What is read (l,), in its direction."

    @property
    def start(self) -> int:
        """Where in what is read the bases begin."""
        place, read = self.place, self.read
        return read.end - place.end if place.strand == "-" else place.start - read.start

    @property
    def bases(self) -> Tokens:
        """Tokens (n,) in the direction of reading."""
        return self.tokens[self.start : self.start + self.place.end - self.place.start]

    def turned(self, values: Any) -> Any:
        """Values (n, 4, ...) in the direction of reading as those of the file's strand, and the other way round."""
        return values[::-1, ::-1] if self.place.strand == "-" else values

    @property
    def letters(self) -> str:
        """The bases (n,) of the file's strand."""
        return decode(reverse_complement(self.bases) if self.place.strand == "-" else self.bases)


def _stretches(
    sources: Sequence[Records | Intervals], context: int | None, span: int | None, longest: int, problems: list[str]
) -> Iterator[Stretch]:
    """What there is to explain in each record or interval; what cannot be read is added to the problems."""
    for source in sources:
        wide = source.widened(context) if isinstance(source, Intervals) else source
        try:
            for i, piece in enumerate(wide.pieces(sys.maxsize)):
                row = piece.describe()
                if isinstance(source, Intervals) and isinstance(wide, Intervals):
                    place, read = source.intervals[i], wide.intervals[i]
                else:
                    place = read = Interval(row["record_id"], 0, row["length"], row["record_id"])
                if span is not None and span < place.end - place.start:
                    place = _middle(place, span)
                yield _checked(Stretch(row, place, read, piece.tokens), longest)
        except InputError as error:
            problems.append(str(error))


def _middle(place: Interval, span: int) -> Interval:
    """`span` bases in the middle; of an odd rest the larger part comes after them, in the direction of reading."""
    before = (place.end - place.start - span) // 2
    start = place.end - before - span if place.strand == "-" else place.start + before
    return place._replace(start=start, end=start + span)


def _checked(stretch: Stretch, longest: int) -> Stretch:
    """With the columns that its rows share, of the row of its piece."""
    row, place = stretch.common, stretch.place
    if row["status"] in ANSWERED and len(stretch.tokens) > longest:
        note = f"{len(stretch.tokens)} bases at once; raise --batch-tokens ({longest}), or explain a --region"
        row |= {"status": "too_long", "note": note}
    elif row["status"] in ANSWERED and not is_base(stretch.bases).any():
        row |= {"status": "only_n", "note": "no A, C, G or T"}
    common = {"seq": place.seq, "start": place.start, "end": place.end, "name": place.name, "strand": place.strand}
    return stretch._replace(common=common | {name: row[name] for name in ("file", "status", "note")})


def _effects(
    stretch: Stretch, explainer: Explainer, method: Method, classes: list[int], advance: Callable[[float], Any]
) -> Effects:
    """Effects of the bases of a stretch, for some classes."""
    function = explainer.gradient if method == "gradient" else explainer.mutagenesis
    start, end = stretch.start, stretch.start + len(stretch.bases)
    try:
        return function(stretch.tokens, start, end, classes, advance)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{explainer.batch_tokens} bases at a time do not fit into memory; lower --batch-tokens"
        ) from None


def _score_columns(explainer: Explainer) -> tuple[str, str]:
    """The columns of what a model gives before an exchange, and of the change of the score; '' is none."""
    if explainer.predicts_bases:
        return "", "llr"
    return ("value_ref", "change") if explainer.targets == "regression" else ("p_ref", "dlogit")


def _columns(explainer: Explainer, method: Method) -> dict[str, type]:
    given, score = _score_columns(explainer)
    columns: dict[str, type] = {"seq": str, "start": int, "end": int, "name": str, "strand": str, "ref": str}
    columns |= {} if method == "gradient" else {"alt": str}
    columns |= {"class": str, given: float} if given else {}
    if method == "gradient":
        columns |= {"importance": float} | {f"grad_{base}": float for base in BASES}
    else:
        columns |= ({"dp": float} if score == "dlogit" else {}) | {score: float}
    return columns | dict.fromkeys(("file", "status", "note", "strands", "model"), str)


def _rows(
    stretch: Stretch, explainer: Explainer, method: Method, classes: list[int], effects: Effects | None
) -> Iterator[Row]:
    """Class after class, base after base; without their numbers, where these stand in a table that is resumed."""
    given, score = _score_columns(explainer)
    for c, number in enumerate(classes):
        common = stretch.common | {"class": explainer.classes[number]}
        if effects is not None:
            common |= {given: float(effects.given[c])} if given else {}
            scores = stretch.turned(effects.scores[..., c])
            chances = None if effects.chances is None else stretch.turned(effects.chances[..., c])
        for i, ref in enumerate(stretch.letters):
            if ref not in BASES:
                continue
            row = common | {"start": stretch.place.start + i, "end": stretch.place.start + i + 1, "ref": ref}
            if method == "gradient":
                if effects is not None:
                    centred = scores[i] - scores[i].mean()
                    row |= {f"grad_{base}": float(v) for base, v in zip(BASES, centred, strict=True)}
                    row |= {"importance": row[f"grad_{ref}"]}
                yield row
                continue
            for b, alt in enumerate(BASES):
                if alt != ref:
                    values = {} if effects is None else {score: float(scores[i, b])}
                    values |= {} if effects is None or chances is None else {"dp": float(chances[i, b])}
                    yield row | {"alt": alt} | values


def _changes(stretch: Stretch, rows: Sequence[Row], score: str) -> Floats:
    """The changes (n, 4) of the score of one class, on the file's strand, that stand in its rows."""
    changes = np.full((len(stretch.bases), 4), np.nan)

    def shown(row: Row, column: str) -> float:
        return float(f"{row[column]:.6g}")  # as in the table: what is resumed gives the same tracks

    for row in rows:
        at, ref = row["start"] - stretch.place.start, row["ref"]
        if "alt" in row:
            changes[at, BASES.index(ref)] = 0
            changes[at, BASES.index(row["alt"])] = shown(row, score)
        else:
            changes[at] = [shown(row, f"grad_{base}") - shown(row, f"grad_{ref}") for base in BASES]
    return changes


class _Drawn:
    """Tracks and a picture of what stands in the rows of stretches."""

    def __init__(
        self, explainer: Explainer, method: Method, label: list[str] | None, track: Path | None,
        track_format: Literal["bedgraph", "bigwig"], picture: Path | None,
    ) -> None:  # fmt: skip
        self._method = method
        self._tracks = None if track is None else Tracks(track, track_format)
        self._picture, self._panels, self._rows = picture, list[Panel](), 0
        self._given, self._score = _score_columns(explainer)
        predicted = ("predicted",) if explainer.targets != "regression" else explainer.classes
        self._names = tuple(dict.fromkeys(label)) if label else predicted

    def add(self, stretch: Stretch, rows: list[Row]) -> None:
        """The rows of a stretch that has an explanation."""
        if self._tracks is None and self._picture is None:
            return
        importances = []
        for name, group in itertools.groupby(rows, lambda row: row["class"]):
            own = list(group)
            changes = _changes(stretch, own, self._score)
            importances.append(importance(changes))
            if self._picture is not None and self._rows < _PICTURED:
                self._panels.append(self._panel(stretch, name, own[0].get(self._given), changes))
            self._rows += -(-len(changes) // PER_ROW)
        if self._tracks is not None:
            common = {name: stretch.common[name] for name in ("seq", "file", "status")}
            places = range(stretch.place.start, stretch.place.end)
            self._tracks.add(
                [
                    common | {"start": at, "end": at + 1}
                    | {f"importance_{n}": v for n, v in zip(self._names, values, strict=True)}
                    for at, values in zip(places, np.stack(importances, 1), strict=True) if not np.isnan(values[0])
                ],
                self._names, "importance_",
            )  # fmt: skip

    def _panel(self, stretch: Stretch, name: str, given: float | None, changes: Floats) -> Panel:
        place, room = stretch.place, PER_ROW * (_PICTURED - self._rows)
        what = name if given is None else f"{name} ({'p' if self._given == 'p_ref' else 'value'} = {given:.3g})"
        strand = ", minus strand" if place.strand == "-" else ""
        positions = np.arange(place.start, place.end) + 1
        changes = stretch.turned(changes)
        score = {"dlogit": "log-odds", "change": "value", "llr": "log-likelihood"}[self._score]
        return Panel(
            title=f"{place.name}{strand}: {what}",
            seq=place.seq,
            positions=(positions[::-1] if strand else positions)[:room],
            letters=decode(stretch.bases)[:room],
            heights=importance(changes)[:room],
            changes=changes[:room],
            score=f"{score} (gradient)" if self._method == "gradient" else score,
        )

    def write(self, lengths: dict[str, int]) -> list[Path]:
        """The files; `lengths` of sequences where they are known."""
        written = [] if self._tracks is None else self._tracks.write(lengths, called=False)
        if self._picture is not None and self._panels:
            write_picture(self._picture, self._panels)
            written.append(self._picture)
            if self._rows > _PICTURED:
                said = f"{self._picture} shows the first {_PICTURED} of {self._rows} rows; see --span and --region"
                print(f"longseq: {said}", file=sys.stderr)
        return written
