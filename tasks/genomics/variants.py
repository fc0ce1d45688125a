"""`longseq dna variants`: what a model says of the alleles of a VCF file."""

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.errors import InputError
from seqmodels.table import Format, Row, TableWriter, check_writable
from seqmodels.tasks.genomics.genome import Genome, read_genome
from seqmodels.tasks.genomics.inference import Alone, Dtype, Together, opened, scores_of, serve_first, sizes, type_of
from seqmodels.tasks.genomics.intervals import printable
from seqmodels.tasks.genomics.manifest import Manifest
from seqmodels.tasks.genomics.tokens import MASK, A, T, Tokens, encode, reverse_complement
from seqmodels.tasks.genomics.vcf import Change, Line, VcfReader, VcfWriter, names_of, read_change
from seqmodels.workers import LostWorker, dismiss, in_order, with_way_on

Strand = Literal["both", "fwd", "rev"]
_IDENTITY = ["chrom", "pos", "ref", "alt", "model"]
_SHOWN = ["chrom", "pos", "ref", "alt", "llr", "distance", "status", "note"]
_FAULTS = ("invalid", "no_record", "outside", "mismatch")  # of the input, rather than of what can be scored
_ROWS = 4096  # that wait at most for a batch


def variants(
    vcf: Path,
    reference: Path | None = None,
    model: str | None = None,
    output: Path | None = None,
    format: Format | None = None,
    context: int = 1024,
    strand: Strand = "both",
    distance: bool = True,
    info: str = "",
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    devices: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Score the variants of a VCF file: one row per alternative allele, in the order of the input.

    Each allele is put into a window of the reference of --context bases, with the variant in its middle, and compared
    with the reference allele in the same window. Both windows are equally long: a deletion takes in more bases at the
    right end, an insertion fewer. Where a window goes beyond the record it is filled up with N; the column padded says
    with how many. With both strands, each window is also read as its reverse complement, and llr is the mean; an
    equivariant model, which reads both anyway and says the same of them, is asked once.

    Columns: chrom, pos, id, ref, alt as in the file, those named by --info, kind (snv, mnv, insertion, deletion,
    complex), norm_pos, norm_ref, norm_alt (the allele trimmed and as far left as it goes, which is what is scored),
    padded, then

    for models that predict bases: llr, the log-likelihood ratio (natural logarithm; positive: the model prefers the
    alternative allele), and llr_fwd and llr_rev, of each strand. Next-token models: the sum over the window of
    log p(base | bases before it), of the alternative window minus the reference window. Masked-token models: the k
    bases from the variant's start on are hidden, k being the length of the longer allele, and the sum of their log
    p(base | all others) is taken, of the alternative window minus the reference window; for a single base that is log
    p(alt) - log p(ref) at its place. Probabilities are among A, C, G and T;

    for classifiers: p_ref_<class> and dp_<class>, the probability with the reference allele and its change (ref_<name>
    and change_<name> where a model predicts numbers);

    for all: distance and cosine_distance between the embeddings of both windows (last layer, mean over the window and
    the strands), status, note, model.

    The status is ok, or mismatch (REF is not what the reference has there), no_record, outside (of the record), invalid
    (the line cannot be read), symbolic (the allele is not spelled out, such as <DEL> or *), or too_long (it does not
    fit into half of the window); these have no scores. Names with and without chr are taken for the same.

    Beside the output, <output>.json says how it was made, as for dna classify.

    Args:
        vcf: Variants as VCF, plain or compressed with gzip or BGZF; - is standard input.
        reference: The FASTA file that the positions belong to, plain or compressed.
        model: Folder of a model, name of a shipped one, or its id on the Hugging Face hub: one that predicts bases
            (dna pretrain, Caduceus) or a classifier (dna train).
        output: File for the result: a table, or with the suffix .vcf or .vcf.gz the same VCF with the scores in its
            INFO (LS_LLR, ...); without it the table goes to the screen.
        format: Format of the table; otherwise the suffix of the output says it (.tsv, .tsv.gz, .csv, .jsonl, .parquet).
        context: Bases of a window.
        strand: Which strand is read: both, fwd (as in the reference) or rev (the other).
        distance: Whether to compute distances, too; without them masked-token models take a third of the time.
        info: INFO fields to copy into the table, such as AF,AC; of several alleles each gets its own value.
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        batch_tokens: Bases that are read at a time; otherwise 65,536 on a CPU, 1,048,576 on a GPU.
        devices: GPUs of this machine (or processes, on a CPU) that share the work, as for dna classify, also under
            torchrun; the table is the same as with one.
        resume: Go on where the same command was stopped or killed, from <output>.part; for .tsv, .csv and .jsonl.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any line or reference allele is not as it should be (what is wrong is on standard error).
    """
    device_type = type_of(device)
    options = {"model": model, "dtype": dtype, "strand": strand, "distance": distance}
    options |= {"batch_tokens": sizes(device_type, batch_tokens)[0]}
    if serve_first(Scorer, device, **options):
        return 0
    if reference is None or model is None:
        raise InputError("name the FASTA file of the positions with --reference, and a model with --model")
    as_vcf = output is not None and output.name.endswith((".vcf", ".vcf.gz"))
    if as_vcf and (resume or format):
        raise InputError(
            f"{output} is VCF, which is written anew and has no other format; leave out --resume, --format"
        )
    if context < 4:
        raise InputError(f"context is {context}; give at least 4 bases")
    if output is not None and str(vcf) != "-" and vcf.exists() and output.resolve() == vcf.resolve():
        raise InputError(f"the output {output} is also the input; give another name")
    if not as_vcf:
        TableWriter(output, {}, format, resume=_IDENTITY if resume else ())
    if output is not None:
        check_writable(output)
    settings = {**options, "context": context, "info": info, "device": device_type}
    manifest = Manifest(output, settings.pop("model"), [vcf, reference], settings)
    if resume and manifest.is_whole():
        dismiss()
        return 0
    keys = [key for key in info.split(",") if key]
    reader, counts, problems = VcfReader(vcf), Counter[str](), list[str]()
    progress = tqdm(unit="variant", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with opened(Scorer, device, devices, **options) as engine:
        facts = engine.facts
        together = facts.batch_tokens // (context * facts.sequences)
        if together < 1:
            raise InputError(
                f"batch_tokens is {facts.batch_tokens}, less than the {facts.sequences} windows of {context} bases of "
                "one variant; raise it or lower --context"
            )
        genome = read_genome([reference])
        writer: Any
        if as_vcf:
            writer = _AsVcf(VcfWriter(output, _info_fields(facts.columns)), reader)  # pyright: ignore
        else:
            columns = _columns(facts.columns, keys)
            writer = _AsTable(TableWriter(output, columns, format, _SHOWN, _IDENTITY if resume else (), manifest.made))
        with writer.open as written, progress:
            groups = _scored(reader, genome, engine, keys, context, together, written.kept, problems)
            try:
                for group in in_order(groups, _Group.done, lambda group: len(group.rows), 16 * _ROWS):
                    rows = group.finished()
                    writer.write(rows)
                    counts.update(row["status"] for _, row in rows)
                    progress.update(len(rows))
            except LostWorker as error:
                raise with_way_on(error, None if as_vcf else written.keep()) from None
            if problems and not counts:
                raise InputError(problems[0])
            writer.finish()
            manifest.forget()
    bad = {status: count for status, count in sorted(counts.items()) if status != "ok"}
    said = list[str]()
    if bad:
        what = ", ".join(f"{count} {status}" for status, count in bad.items())
        none = f"{reader.name}: {sum(bad.values())} of {counts.total()} alleles have no score ({what})"
        said.append(f"{none}; see the columns status and note")
    said += problems  # what was read before it has been written
    manifest.write(counts, said)
    for line in said:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if problems or any(status in bad for status in _FAULTS) else 0


class Facts(NamedTuple):
    """What a Scorer is, for those who give it variants."""

    name: str
    columns: list[str]
    sequences: int
    "Windows that are read at a time of each variant."
    batch_tokens: int


class Scorer:
    """A model that compares pairs of windows.

    `columns` are the names of what it says of a pair.
    """

    def __init__(
        self, model: str, device: str = "auto", dtype: Dtype = "float32", *, strand: Strand = "both",
        distance: bool = True, batch_tokens: int | None = None, sharing: int = 1,
    ) -> None:  # fmt: skip
        """`sharing`: processes of this machine; it takes nothing that they would have to share."""
        self.device, self.name = choose_device(device), model
        self.model: Any = seqmodels.load(model, device=self.device, dtype=getattr(torch, dtype))
        config = self.model.config
        self.task: str = config.head.task
        if config.tokenizer.get("type") != "dna" or self.task == "position":
            raise InputError(
                f"model {model} neither predicts bases nor classifies DNA sequences (head {self.task!r}, tokens "
                f"{config.tokenizer.get('type')!r}); give one made by 'longseq dna pretrain' or 'longseq dna train'"
            )
        self.strands = {"both": (False, True), "fwd": (False,), "rev": (True,)}[strand]
        self._read = (False,) if self.model.backbone.both_strands else self.strands
        self.distance = distance
        self.columns: list[str] = []
        if self.task == "sequence":
            of, change = ("ref", "change") if config.head.targets == "regression" else ("p_ref", "dp")
            self.columns += [f"{of}_{name}" for name in config.head.labels]
            self.columns += [f"{change}_{name}" for name in config.head.labels]
        else:
            self.columns += ["llr", *(f"llr_{'rev' if other else 'fwd'}" for other in self.strands)]
        self.columns += ["distance", "cosine_distance"] if distance else []
        hidden = self.task == "masked_token"
        self.sequences = 2 * len(self._read)  # windows that are read at a time of each pair, at most
        self._plain = not hidden or distance
        self._hidden = hidden
        self.facts = Facts(model, self.columns, self.sequences, sizes(self.device.type, batch_tokens)[0])

    def forward(self, variants: list[tuple[NDArray[np.uint8], tuple[int, int]]]) -> list[dict[str, float]]:
        """`score` of pairs of windows (2, l) with their places."""
        return self.score(np.stack([pair for pair, _ in variants]), np.array([place for _, place in variants]))

    @torch.inference_mode()
    def score(self, pairs: NDArray[np.uint8], places: NDArray[np.int64]) -> list[dict[str, float]]:
        """Columns of pairs (n, 2, l) of windows, reference first, whose variants are at places (n, 2): start, end."""
        n, _, l = pairs.shape
        both = [reverse_complement(pairs) if other else pairs for other in self._read]
        windows = np.stack(both, 1).reshape(-1, l)  # n * strands * 2
        shape = (n, len(self._read), 2)
        values: dict[str, NDArray[np.float64]] = {}
        if self._plain:
            x, ids, which = self._features(windows)
            if self.task == "sequence":
                logits = self.model.classify(self.model.pool([x])).double()[which].view(*shape, -1).mean(1)
                chances = scores_of(logits.cpu().numpy(), self.model.config.head.targets)
                values |= {name: chances[:, 0, i] for i, name in enumerate(self.columns[: chances.shape[2]])}
                changes = self.columns[chances.shape[2] : 2 * chances.shape[2]]
                values |= {name: chances[:, 1, i] - chances[:, 0, i] for i, name in enumerate(changes)}
            if self.task == "next_token":
                known = self._log_p(self.model.logits(x[:, :-1]), ids[:, 1:]).sum(1)[which]
                values |= self._ratios(known.view(shape))
            if self.distance:
                mean = self.model.mean_of_strands(x.mean(1, dtype=torch.float64))[which].view(*shape, -1).mean(1)
                difference = (mean[:, 1] - mean[:, 0]).norm(dim=-1)
                cosine = torch.nn.functional.cosine_similarity(mean[:, 0], mean[:, 1], dim=-1)
                values |= {"distance": difference.cpu().numpy(), "cosine_distance": (1 - cosine).cpu().numpy()}
        if self._hidden:
            spans = np.stack([l - places[:, ::-1] if other else places for other in self._read], 1)
            spans = spans.repeat(2, axis=1).reshape(-1, 2, 1)
            hidden = (np.arange(l) >= spans[:, 0]) & (np.arange(l) < spans[:, 1])
            x, _, which = self._features(np.where(hidden, np.uint8(MASK), windows))
            rows, steps = (torch.from_numpy(part).to(self.device) for part in hidden.nonzero())
            ids = torch.from_numpy(windows[hidden].astype(np.int64)).to(self.device)
            found = self._log_p(self.model.logits(x[which[rows], steps]), ids)
            known = torch.zeros(len(windows), dtype=torch.float64, device=self.device).index_add_(0, rows, found)
            values |= self._ratios(known.view(shape))
        return [{name: float(values[name][i]) for name in self.columns} for i in range(n)]

    def _features(self, windows: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features and ids of the windows (b, l) that differ, and for each window which of them it is.

        With the variant hidden, both alleles of a substitution are one window; the alleles of a line share a reference.
        """
        different: dict[bytes, int] = {}
        which = [different.setdefault(window.tobytes(), len(different)) for window in windows]
        tokens = np.frombuffer(b"".join(different), dtype=np.uint8).reshape(-1, windows.shape[1])
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        return self.model.backbone(ids)[0], ids, torch.tensor(which, device=self.device)

    @staticmethod
    def _log_p(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """log p of ids (...) among the four bases, from logits (..., vocabulary); 0 where they are none."""
        log_p = logits[..., A : T + 1].double().log_softmax(-1)
        return log_p.gather(-1, (ids - A).clamp(0, 3)[..., None])[..., 0] * ((ids >= A) & (ids <= T))

    def _ratios(self, log_p: torch.Tensor) -> dict[str, NDArray[np.float64]]:
        """The log-likelihood ratio of each strand and their mean, of log_p (n, strands, 2)."""
        ratios = (log_p[..., 1] - log_p[..., 0]).cpu().numpy()
        names = ["llr_rev" if other else "llr_fwd" for other in self.strands]
        ratios = np.broadcast_to(ratios, (len(ratios), len(names)))  # a model of both strands says the same of each
        return {"llr": ratios.mean(1), **{name: ratios[:, i] for i, name in enumerate(names)}}


def windows_of(genome: Genome, change: Change, context: int) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
    """The pair (2, context) of windows of a change, the place (start, end) of the longer allele, and how much is N."""
    longer = max(len(change.ref), len(change.alt))
    before = (context - longer) // 2
    first, after = change.start - before, change.start + len(change.ref)
    left = genome.bases(change.record, first, change.start)

    def window(allele: Tokens) -> Tokens:
        rest = context - before - len(allele)
        return np.concatenate([left, allele, genome.bases(change.record, after, after + rest)])

    ref = genome.bases(change.record, change.start, after)
    alt = encode(change.alt.encode())
    length = genome.length(change.record)
    padded = max(0, -first) + max(0, first + context - length)
    return np.stack([window(ref), window(alt)]), (before, before + longer), padded


class _Group(NamedTuple):
    """Rows that follow each other, with their lines, and what is still to come for some of them."""

    rows: list[tuple[Line, Row]]
    asked: list[Row]
    answer: Future | None
    "The columns of those that have been asked about."

    def done(self) -> bool:
        """Whether all is there."""
        return self.answer is None or self.answer.done()

    def finished(self) -> list[tuple[Line, Row]]:
        """The rows with their scores; waits for them."""
        if self.answer is not None:
            for row, values in zip(self.asked, self.answer.result(), strict=True):
                row |= values
        return self.rows


def _scored(
    reader: VcfReader, genome: Genome, engine: Alone | Together, keys: list[str], context: int, together: int,
    kept: int, problems: list[str],
) -> Iterator[_Group]:  # fmt: skip
    """Rows in order, a batch at a time; the first `kept` need no scores, but share their batches."""
    records = names_of(genome)
    rows: list[tuple[Line, Row]] = []
    pairs: list[tuple[Row, NDArray[np.uint8], tuple[int, int]]] = []
    given = 0

    def flush() -> _Group:
        nonlocal given
        given += len(rows)
        answer = engine.forward([(pair, place) for _, pair, place in pairs]) if pairs and given > kept else None
        group = _Group(rows.copy(), [row for row, *_ in pairs], answer)
        rows.clear()
        pairs.clear()
        return group

    try:
        for line in reader:
            for allele in range(len(line.alternatives)):
                row = _describe(line, allele, keys, engine.facts.name)
                rows.append((line, row))
                change = read_change(genome, records, line, allele)
                if not isinstance(change, Change):
                    row |= {"status": change.status, "note": printable(change.note)}
                else:
                    pos, ref, alt = change.written(genome)
                    row |= {"kind": change.kind, "norm_pos": pos, "norm_ref": ref, "norm_alt": alt}
                    if max(len(change.ref), len(change.alt)) > context // 2:
                        longest = max(len(change.ref), len(change.alt))
                        row |= {"status": "too_long", "note": f"{longest} bases, more than half of the window"}
                    else:
                        pair, place, padded = windows_of(genome, change, context)
                        row |= {"padded": padded, "status": "ok", "note": ""}
                        if padded:
                            row["note"] = f"{padded} bases of the window lie outside of the record and are N"
                        pairs.append((row, pair, place))
                if len(pairs) == together or len(rows) == _ROWS:
                    yield flush()
    except LostWorker:
        raise
    except InputError as error:
        problems.append(str(error))
    if rows:
        yield flush()


def _describe(line: Line, allele: int, keys: list[str], model: str) -> Row:
    """The part of a row that is the line's own."""
    pos = line.field("POS")
    row: Row = {"chrom": printable(line.field("CHROM")), "id": printable(line.field("ID"))}
    row |= {"pos": int(pos) if pos.isascii() and pos.isdecimal() and len(pos) < 13 else None, "model": model}
    row |= {"ref": printable(line.field("REF")), "alt": printable(line.alternatives[allele])}
    return row | {key: printable(line.info(key, allele)) for key in keys}


def _columns(scores: list[str], keys: list[str]) -> dict[str, type]:
    columns: dict[str, type] = {"chrom": str, "pos": int, "id": str, "ref": str, "alt": str}
    columns |= dict.fromkeys(keys, str) | {"kind": str, "norm_pos": int, "norm_ref": str, "norm_alt": str}
    return columns | {"padded": int} | dict.fromkeys(scores, float) | {"status": str, "note": str, "model": str}


def _info_fields(scores: list[str]) -> dict[str, tuple[str, str]]:
    """INFO names and what they mean, for the columns of a scorer and for the status."""
    told = {
        "llr": "Log-likelihood ratio (natural logarithm) of the allele to the reference allele, mean of both strands",
        "distance": "Euclidean distance of the embeddings of both alleles' windows",
        "cosine_distance": "Cosine distance of the embeddings of both alleles' windows",
    }
    fields = {_info_name(name): ("Float", told.get(name, f"{name} of longseq dna variants")) for name in scores}
    return fields | {"LS_STATUS": ("String", "ok, or why the allele has no score")}


def _info_name(column: str) -> str:
    return "LS_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in column.upper())


class _AsTable:
    """Rows to a table."""

    def __init__(self, table: TableWriter) -> None:
        self.open = self._table = table

    def write(self, group: list[tuple[Line, Row]]) -> None:
        self._table.write([row for _, row in group])

    def finish(self) -> None:
        """Nothing is left."""


class _AsVcf:
    """Rows to the lines that they come from: a line is written when the first allele of the next is there."""

    def __init__(self, writer: VcfWriter, reader: VcfReader) -> None:
        self.open = self._writer = writer
        self._reader, self._line, self._values = reader, None, list[Row]()
        self._started = False

    def write(self, group: list[tuple[Line, Row]]) -> None:
        for line, row in group:
            if line is not self._line:
                self._next(line)
            values = {_info_name(name): f"{value:.6g}" for name, value in row.items() if isinstance(value, float)}
            self._values.append(values | {"LS_STATUS": row["status"]})

    def finish(self) -> None:
        self._next(None)

    def _next(self, line: Line | None) -> None:
        if not self._started:
            self._writer.start(self._reader.header)
            self._started = True
        if self._line is not None:
            self._writer.write(self._line, self._values)
        self._line, self._values = line, []
