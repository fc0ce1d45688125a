"""`longseq dna embed`: the features of any layer of a model, per record or per base."""

import json
import struct
import sys
import tempfile
import zipfile
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
)
from seqmodels.tasks.genomics.pieces import ANSWERED, Records
from seqmodels.tasks.genomics.tokens import Tokens, pad_right, reverse_complement
from seqmodels.workers import LostWorker, in_order

Floats = NDArray[np.float32]
_FORMATS = ("npz", "parquet", "safetensors")
_BLOCK = 1 << 20  # bytes that are copied at a time
_ROWS = 4096  # that are asked about together, at most


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
    them as context on each side. What is written per base waits on the disk, not in memory.

    Args:
        files: FASTA files, plain or compressed with gzip or BGZF; - is standard input.
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
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if any file or record could not be read as it should (the reasons are on standard error).
    """
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
    rows, problems = list[Row](), list[str]()
    progress = tqdm(unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty())
    with opened(Embedder, device, devices, **options) as engine, replacing(output) as temporary, progress:
        width = engine.facts.width
        writer: Any = _Means(width) if pool == "mean" else _Bases(temporary, kind, width)
        with writer:
            groups = _groups(files, engine, pool, problems)
            for group in in_order(groups, _Group.done, lambda group: len(group.rows), 16 * _ROWS):
                rows += group.rows
                writer.add(group)
                progress.update(sum(row["length"] for row in group.rows))
            if not rows:
                raise InputError("; ".join(problems) or "no FASTA file was given; name at least one, or -")
            writer.finish(temporary, kind, rows)
    bad = [row for row in rows if row["status"] not in ANSWERED]
    if bad:
        problems.append(f"{len(bad)} of {len(rows)} records have no embedding; the first, {bad[0]['record_id']}, is "
                        f"{bad[0]['status']}: {bad[0]['note']}")  # fmt: skip
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


def _groups(files: list[Path], engine: Alone | Together, pool: str, problems: list[str]) -> Iterator[_Group]:
    """Rows of all files in order, as many at a time as make a few batches, with what is asked about them."""
    waiting, held = list[tuple[Row, Tokens | None]](), 0
    longest = 0 if pool == "none" else engine.facts.longest_batched

    def asked() -> _Group:
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


class _Means:
    """Gathers one vector per record."""

    def __init__(self, width: int) -> None:
        self._width, self._found = width, list[Floats]()

    def __enter__(self) -> "_Means":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def add(self, group: _Group) -> None:
        """The records of a group."""
        found = np.full((len(group.rows), self._width), np.nan, dtype=np.float32)
        for places, future in group.answers:
            found[places] = future.result()
        self._found.append(found)

    def finish(self, path: Path, kind: str, rows: list[Row]) -> None:
        """The file."""
        embedding = np.concatenate(self._found)
        columns = {name: [row[name] for row in rows] for name in ("record_id", "length", "status", "note")}
        columns["source"] = [row["file"] for row in rows]
        if kind == "npz":
            with open(path, "wb") as file:
                np.savez(file, embedding=embedding, **{name: np.array(column) for name, column in columns.items()})
        elif kind == "safetensors":
            from safetensors.numpy import save_file

            save_file({"embedding": embedding}, path, {"records": json.dumps(columns)})
        else:
            import polars

            polars.DataFrame(columns | {f"e{i}": embedding[:, i] for i in range(self._width)}).write_parquet(path)


class _Bases:
    """Writes one array per record, by way of a temporary file beside the output."""

    def __init__(self, path: Path, kind: str, width: int) -> None:
        self._path, self._kind, self._width = path, kind, width
        self._names: dict[str, int] = {}
        self._arrays: dict[str, tuple[int, int]] = {}  # name: bases, and where they begin in the file

    def __enter__(self) -> "_Bases":
        self._file: Any = tempfile.TemporaryFile(dir=self._path.parent)
        self._end = 0
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, group: _Group) -> None:
        """The records of a group."""
        for (place,), future in group.answers:
            row = group.rows[place]
            self._names[row["record_id"]] = number = self._names.get(row["record_id"], 0) + 1
            name = row["record_id"] if number == 1 else f"{row['record_id']}#{number}"
            shape = (row["length"], self._width)
            self._file.truncate(self._end + 4 * row["length"] * self._width)
            held = np.memmap(self._file, dtype="<f4", mode="r+", offset=self._end, shape=shape)
            for start, part in future.result():
                held[start : start + len(part)] += part
            held.flush()
            self._arrays[name] = row["length"], self._end
            self._end += held.nbytes

    def finish(self, path: Path, kind: str, rows: list[Row]) -> None:
        """The file."""
        if kind == "npz":
            with zipfile.ZipFile(path, "w") as archive:
                for name, (bases, start) in self._arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        header = {"descr": "<f4", "fortran_order": False, "shape": (bases, self._width)}
                        np.lib.format.write_array_header_1_0(member, header)
                        self._copy(member, start, 4 * bases * self._width)
            return
        size = 4 * self._width
        entries = {
            name: {"dtype": "F32", "shape": [bases, self._width], "data_offsets": [start, start + size * bases]}
            for name, (bases, start) in self._arrays.items()
        }
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            self._copy(file, 0, self._end)

    def _copy(self, target: Any, start: int, size: int) -> None:
        self._file.seek(start)
        while size:
            block = self._file.read(min(_BLOCK, size))
            target.write(block)
            size -= len(block)
