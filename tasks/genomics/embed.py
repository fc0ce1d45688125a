"""`longseq dna embed`: the features of any layer of a model, per record or per base."""

import json
import struct
import sys
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

import seqmodels
from seqmodels.backbone import Backbone
from seqmodels.checkpoint import choose_device
from seqmodels.errors import InputError
from seqmodels.files import replacing
from seqmodels.sweeps import free_memory, host_bytes, sweepable, two_sweeps, windows
from seqmodels.table import Row, check_writable
from seqmodels.tasks.genomics.inference import (
    MEMORY,
    Alone,
    Dtype,
    Together,
    batches_by_length,
    opened,
    serve_first,
    sizes,
    type_of,
)
from seqmodels.tasks.genomics.manifest import Manifest
from seqmodels.tasks.genomics.pieces import ANSWERED, Records
from seqmodels.tasks.genomics.tokens import Tokens, pad_right, reverse_complement
from seqmodels.vectors import VectorWriter
from seqmodels.workers import LostWorker, dismiss, in_order, with_way_on

Floats = NDArray[np.float32]
_FORMATS = ("npz", "parquet", "safetensors")
_BLOCK = 1 << 20  # bytes that are copied at a time
_ROWS = 4096  # that are asked about together, at most
_COLUMNS: dict[str, type] = {"record_id": str, "length": int, "status": str, "note": str, "file": str}
_IDENTITY = ["file", "record_id", "length"]


def embed(
    files: list[Path],
    model: str | None = None,
    output: Path | None = None,
    layer: int = -1,
    pool: Literal["mean", "none"] = "mean",
    strand: Literal["fwd", "rev", "both"] = "fwd",
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    chunk: int | None = None,
    devices: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Write the embeddings of the records of FASTA files, as a model's layer has them.

    The suffix of the output says what is written, always as float32 and in the order of the input:

    mean, .npz: arrays record_id, length, status, note, source (the file) and embedding (records, width). .parquet: a
    table with the columns record_id, length, status, note, source, e0, e1, ... .safetensors: the tensor embedding, and
    the other columns as JSON in the metadata `records`. Records that cannot be read (see the status) have NaN.

    none, .npz or .safetensors: for every record an array (bases, width) of its name; later ones of the same name are
    called NAME#2, NAME#3. Records that cannot be read are left out, and said.

    Records of any length: models that read in one direction take them in chunks, exactly; those that read in both in
    two sweeps, exactly, or where the main memory does not hold that, in windows of batch_tokens bases with an eighth of
    them as context on each side. Features wait on the disk, in <output>.part.vectors, not in memory.

    Beside the output, <output>.json says how it was made, as for dna classify.

    Args:
        files: FASTA files, plain or compressed with gzip or BGZF, also GenBank, EMBL or FASTQ; - is standard input.
        model: Folder of a model of DNA, name of a shipped one, or its id on the Hugging Face hub.
        output: File to write: .npz, .parquet or .safetensors.
        layer: 0: what enters the first layer; i: the residual stream after layer i; -1: after the last layer and the
            final norm, which is what the model's head sees.
        pool: mean: one vector per record, the mean over its bases; none: one per base.
        strand: fwd: of the records as given; rev: of the reverse complements, their bases in the order of the records;
            both: the mean of the two. Models of both strands (equivariant) have all three at once.
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        batch_tokens: Bases per batch of short records, padding included; otherwise 65,536 on a CPU, 1,048,576 on a GPU.
        chunk: Longer records are read in chunks of so many bases; otherwise 16,384 on a CPU, 1,048,576 on a GPU.
        devices: GPUs of this machine (or processes, on a CPU) that share the work, as for dna classify, also under
            torchrun; the file is the same as with one. With --pool none, the features of a record must fit into memory.
        resume: Go on where the same command was stopped or killed: what it has read is in <output>.part and
            <output>.part.vectors. Settings, files and weights must be the same.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any file or record could not be read as it should (the reasons are on standard error).
    """
    device_type = type_of(device)
    batch_tokens, chunk = sizes(device_type, batch_tokens, chunk)
    options = {"model": model, "layer": layer, "strand": strand, "pool": pool, "dtype": dtype}
    options |= {"batch_tokens": batch_tokens, "chunk": chunk}
    if serve_first(Embedder, device, **options):
        return 0
    if model is None or output is None:
        raise InputError("name a model with --model and the file to write with --output (.npz, .parquet, .safetensors)")
    kind = output.suffix[1:]
    if kind not in _FORMATS or (kind == "parquet" and pool == "none"):
        formats = ", ".join(f".{name}" for name in _FORMATS if pool == "mean" or name != "parquet")
        raise InputError(f"{output} has no suffix of embeddings with --pool {pool}; use one of {formats}")
    if any(str(f) != "-" and f.exists() and output.resolve() == f.resolve() for f in files):
        raise InputError(f"the output {output} is also an input; give another name")
    check_writable(output)
    settings = {**options, "device": device_type}
    manifest = Manifest(output, settings.pop("model"), files, settings)
    if resume and manifest.is_whole():
        dismiss()
        return 0
    statuses, problems, first = Counter[str](), list[str](), ""
    progress = tqdm(unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with opened(Embedder, device, devices, **options) as engine:
        width = engine.facts.width
        with (_Means if pool == "mean" else _Bases)(output, width, resume, manifest) as features, progress:
            groups = _groups(files, engine, pool, features.kept, problems)
            try:
                for group in in_order(groups, _Group.done, lambda group: len(group.rows), 16 * _ROWS):
                    features.take(group)
                    statuses.update(row["status"] for row in group.rows)
                    bad = (row for row in group.rows if row["status"] not in ANSWERED)
                    first = first or next(("{record_id}, is {status}: {note}".format(**row) for row in bad), "")
                    progress.update(sum(row["length"] for row in group.rows))
            except LostWorker as error:
                raise with_way_on(error, features.keep()) from None
            if not statuses:
                raise InputError("; ".join(problems) or "no FASTA file was given; name at least one, or -")
    if first:
        none = statuses.total() - sum(statuses[status] for status in ANSWERED)
        problems.append(f"{none} of {statuses.total()} records have no embedding; the first, {first}")
    manifest.write(statuses, problems)
    for line in problems:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if problems else 0


class Facts(NamedTuple):
    """What an Embedder is, for those who give it records."""

    width: int
    batch_tokens: int
    longest_batched: int


class Embedder:
    """A model's backbone, cut after a layer: features of tokens, on one strand or on both.

    `sharing` processes of this machine share its memory.
    """

    def __init__(
        self, model: str, layer: int = -1, strand: str = "fwd", pool: str = "mean", device: str = "auto",
        dtype: Dtype = "float32", batch_tokens: int | None = None, chunk: int | None = None, sharing: int = 1,
    ) -> None:  # fmt: skip
        self.device = choose_device(device)
        self.batch_tokens, self.chunk = sizes(self.device.type, batch_tokens, chunk)
        loaded = seqmodels.load(model, device=self.device, dtype=getattr(torch, dtype))
        self.backbone: Any = loaded.backbone
        if loaded.config.tokenizer.get("type") != "dna" or not isinstance(self.backbone, Backbone):
            raise InputError(f"model {model} is no model of DNA; give one made by 'longseq dna pretrain' or dna train")
        layers = len(self.backbone.layers)
        if not -1 <= layer <= layers:
            raise InputError(
                f"layer is {layer}; model {model} has {layers}: give 0 (before the first) to {layers}, or -1"
            )
        if layer >= 0:
            self.backbone.layers = self.backbone.layers[:layer]
            self.backbone.norm_f = _Sum(self.backbone.norm_f.weight)
        self.width: int = loaded.config.backbone.d_model
        self.strand, self.pool, self.sharing = strand, pool, sharing

    @property
    def longest_batched(self) -> int:
        """Bases up to which records are read whole."""
        return min(self.chunk, self.batch_tokens) if self.backbone.causal else self.batch_tokens

    @property
    def _passes(self) -> list[tuple[bool, int | None]]:
        """What is read: whether the reverse complement, and which half of the features; -1 is their mean."""
        if self.backbone.both_strands:
            return [(False, {"fwd": 0, "rev": 1, "both": -1}[self.strand])]
        return [(turned, None) for turned in {"fwd": (False,), "rev": (True,), "both": (False, True)}[self.strand]]

    @property
    def facts(self) -> Facts:
        """What `longseq dna embed` has to know of it."""
        return Facts(self.width, self.batch_tokens, self.longest_batched)

    def batch(self, sequences: list[Tokens]) -> Floats:
        """Mean features (b, d) of sequences, in batches of similar length."""
        result = np.zeros((len(sequences), self.width), dtype=np.float32)
        for places in batches_by_length([len(s) for s in sequences], self.batch_tokens):
            result[places] = self.forward([sequences[i] for i in places])
        return result

    @torch.inference_mode()
    def forward(self, sequences: list[Tokens]) -> Floats:
        """Mean features (b, d) of sequences that are read together."""
        total = torch.zeros(len(sequences), self.width, dtype=torch.float64, device=self.device)
        for turned, half in self._passes:
            given = [reverse_complement(tokens) if turned else tokens for tokens in sequences]
            ids, lengths = (torch.from_numpy(a).to(self.device) for a in pad_right(given))
            real = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
            x = _part(self.backbone(ids, None, lengths)[0], half)
            total += (x.masked_fill(~real[..., None], 0)).sum(1, dtype=torch.float64) / lengths[:, None]
        return (total / len(self._passes)).float().cpu().numpy()

    def stream(self, chunks: Iterable[Tokens]) -> Floats | Iterator[tuple[int, Floats]]:
        """Mean features (d,) of one sequence of any length; with the pool none, what `per_base` gives."""
        tokens = np.concatenate(list(chunks))
        if self.pool == "none":
            return self.per_base(tokens)
        return (sum(part.sum(0, dtype=np.float64) for _, part in self.per_base(tokens)) / len(tokens)).astype(
            np.float32
        )

    @torch.inference_mode()
    def per_base(self, tokens: Tokens) -> Iterator[tuple[int, Floats]]:
        """Features (c, d) of stretches of one sequence, and where they begin; those of one place are to be added up."""
        for turned, half in self._passes:
            place = 0
            for x in self._features(reverse_complement(tokens) if turned else tokens):
                part = (_part(x[0], half).float() / len(self._passes)).cpu().numpy()
                start, place = place, place + len(part)
                yield (len(tokens) - place, part[::-1]) if turned else (start, part)

    def _features(self, tokens: Tokens) -> Iterable[Tensor]:
        """Features (1, c, width) from left to right, of one pass if there is room for it, or of what equals it."""
        ids = torch.from_numpy(np.ascontiguousarray(tokens))[None]
        if len(tokens) <= self.longest_batched:
            return [self.backbone(ids.to(self.device).long())[0]]
        if self.backbone.causal:
            return self._in_chunks(ids)
        fits = host_bytes(self.backbone, len(tokens), self.chunk) <= MEMORY * free_memory() / self.sharing
        if sweepable(self.backbone) and fits:
            return two_sweeps(self.backbone, ids, chunk=self.chunk)
        return windows(self.backbone, [ids], window=self.batch_tokens, context=self.batch_tokens // 8)

    def _in_chunks(self, ids: Tensor) -> Iterator[Tensor]:
        state = None
        for part in ids.split(self.chunk, 1):
            x, state = self.backbone(part.to(self.device).long(), state)
            yield x


class _Sum(nn.Module):
    """In the place of the final norm: the residual stream as it is."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.detach(), requires_grad=False)  # says the type

    def forward(self, x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
        """x + residual, twice."""
        total = x if residual is None else x + residual
        return total, total


def _part(x: Tensor, half: int | None) -> Tensor:
    """Features (..., d) of x (..., d), or of the half of x (..., 2 d) that is asked for; -1 is the mean of both."""
    if half is None:
        return x
    halves = x.unflatten(-1, (2, -1))
    return halves.mean(-2) if half == -1 else halves[..., half, :]


class _Group(NamedTuple):
    """Rows that follow each other, and what is still to come for some of them."""

    rows: list[Row]
    answers: list[tuple[list[int], Future]]
    "Places of rows, and their means (n, d), or of one row what Embedder.stream gives."

    def done(self) -> bool:
        """Whether all answers are there."""
        return all(future.done() for _, future in self.answers)


def _groups(files: list[Path], engine: Alone | Together, pool: str, kept: int, problems: list[str]) -> Iterator[_Group]:
    """Rows of all files in order, as many at a time as make a few batches, with what is asked about them.

    About a group of the first `kept` rows, nothing is asked.
    """
    waiting, held, given = list[tuple[Row, Tokens | None]](), 0, 0
    longest = 0 if pool == "none" else engine.facts.longest_batched

    def asked() -> _Group:
        nonlocal given
        given += len(waiting)
        if given <= kept:
            return _Group([row for row, _ in waiting], [])
        known = [(i, tokens) for i, (_, tokens) in enumerate(waiting) if tokens is not None]
        short = [(i, tokens) for i, tokens in known if len(tokens) <= longest]
        batches = engine.batch([tokens for _, tokens in short]) if short else []
        answers = [([short[i][0] for i in places], future) for places, future in batches]
        answers += [([i], engine.stream([tokens])) for i, tokens in known if len(tokens) > longest]
        return _Group([row for row, _ in waiting], answers)

    for path in files:
        try:
            for piece in Records(path).pieces(longest=sys.maxsize):
                row = piece.describe()
                waiting.append((row, piece.tokens if row["status"] in ANSWERED else None))
                held += len(piece.tokens)
                if held >= 8 * engine.facts.batch_tokens or len(waiting) >= _ROWS:
                    yield asked()
                    waiting, held = [], 0
        except LostWorker:
            raise
        except InputError as error:
            problems.append(str(error))
    if waiting:
        yield asked()


class _Features(VectorWriter, ABC):
    """Records and their features, of which the output is made when all are there."""

    def __init__(self, output: Path, width: int, resume: bool, manifest: Manifest) -> None:
        super().__init__(output, _COLUMNS, width, _IDENTITY if resume else (), manifest.made)
        self._kind, self._manifest = output.suffix[1:], manifest

    @abstractmethod
    def take(self, group: _Group) -> None:
        """The records of a group; waits for their features, unless these are kept."""

    @abstractmethod
    def _make(self, path: Path, rows: Iterator[Row]) -> None:
        """Makes the output of what is there."""

    def _publish(self, rows: Path, path: Path) -> None:
        with replacing(path) as temporary, open(rows, encoding="utf-8") as lines:
            self._make(temporary, map(json.loads, lines))
            self._manifest.forget()


class _Means(_Features):
    """One vector per record; NaN for those that cannot be read."""

    def take(self, group: _Group) -> None:
        def fill(vectors: Floats) -> None:
            vectors[:] = np.nan
            for places, future in group.answers:
                vectors[places] = future.result()

        self.add(group.rows, len(group.rows), fill)

    def _make(self, path: Path, rows: Iterator[Row]) -> None:
        columns: dict[str, list[Any]] = {"source" if name == "file" else name: [] for name in _COLUMNS}
        for row in rows:
            for column, value in zip(columns.values(), row.values(), strict=True):
                column.append(value)
        embedding = self.vectors(0, len(columns["source"]))
        if self._kind == "npz":
            with zipfile.ZipFile(path, "w") as archive:
                for name, values in {"embedding": embedding, **columns}.items():
                    with _member(archive, name) as member:
                        np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)
        elif self._kind == "safetensors":
            from safetensors.numpy import save_file

            save_file({"embedding": embedding}, path, {"records": json.dumps(columns)})
        else:
            import polars

            polars.DataFrame(columns | {f"e{i}": np.array(embedding[:, i]) for i in range(self.width)}).write_parquet(
                path
            )


class _Bases(_Features):
    """One vector per base of each record that can be read: an array per record."""

    def take(self, group: _Group) -> None:
        def fill(vectors: Floats) -> None:
            at = 0
            for (place,), future in group.answers:
                own = vectors[at : (at := at + group.rows[place]["length"])]
                for start, part in future.result():
                    own[start : start + len(part)] += part

        self.add(group.rows, sum(row["length"] for row in group.rows if row["status"] in ANSWERED), fill)

    def _make(self, path: Path, rows: Iterator[Row]) -> None:
        numbers = Counter[str]()
        arrays: dict[str, tuple[int, int]] = {}  # name: bases, and where they begin in the file
        end = 0
        for row in rows:
            if row["status"] in ANSWERED:
                numbers[name := row["record_id"]] += 1
                name = name if numbers[name] == 1 else f"{name}#{numbers[name]}"
                arrays[name] = row["length"], end
                end += 4 * row["length"] * self.width
        if self._kind == "npz":
            with zipfile.ZipFile(path, "w") as archive:
                for name, (bases, start) in arrays.items():
                    with _member(archive, name) as member:
                        header = {"descr": "<f4", "fortran_order": False, "shape": (bases, self.width)}
                        np.lib.format.write_array_header_1_0(member, header)
                        self._copy(member, start, 4 * bases * self.width)
            return
        size = 4 * self.width
        entries = {
            name: {"dtype": "F32", "shape": [bases, self.width], "data_offsets": [start, start + size * bases]}
            for name, (bases, start) in arrays.items()
        }
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            self._copy(file, 0, end)

    def _copy(self, target: Any, start: int, size: int) -> None:
        self._vectors.seek(start)
        while size:
            block = self._vectors.read(min(_BLOCK, size))
            target.write(block)
            size -= len(block)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """The file of an array in a .npz to write to, without the time: the same features make the same file."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
