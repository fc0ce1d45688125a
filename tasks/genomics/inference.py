"""A classifier at work on tokens: batches of short records, and records of any length; on one device or on several."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import seqmodels
from seqmodels.checkpoint import choose_device, format_of, read_json, resolve
from seqmodels.config import Targets
from seqmodels.errors import InputError
from seqmodels.sweeps import free_memory, host_bytes, sweepable, two_sweeps, windows
from seqmodels.tasks.genomics.tokens import Tokens, pad_right, reverse_complement
from seqmodels.workers import Make, Workers, devices_of, serve, torchrun, torchrun_device

Logits = NDArray[np.float32]
Dtype = Literal["float32", "bfloat16"]
Reading = Literal["auto", "two-sweeps", "windows"]
Strand = Literal["fwd", "rev", "both"]
MEMORY = 0.75  # part of the free main memory that two sweeps may take


class Facts(NamedTuple):
    """What a classifier is, for those who give it records."""

    name: str
    classes: tuple[str, ...]
    batch_tokens: int
    longest_batched: int
    targets: Targets
    both_strands: bool
    "Whether it reads the reverse complement, too, and says the same of both."
    complement: tuple[int, ...] = ()
    "Of a model that labels bases: for each class that of the same base read on the other strand."


class Answer(NamedTuple):
    """What is known of a long record."""

    logits: Logits | None
    "(classes,); None if it could not be read."
    reading: str
    "How it was read: chunks, two-sweeps or windows."
    note: str = ""
    "Why it could not be read."


class Classifier:
    """A DNA sequence classifier with how to run it; logits come back as float32 in the order of `classes`.

    batch_tokens and chunk are in bases, by default those of `sizes`. reading and overlap are for longer records where
    the model is bidirectional (seqmodels/sweeps.py); `sharing` processes of this machine share its memory.
    """

    task = "sequence"

    def __init__(
        self,
        model: str,
        device: str = "auto",
        dtype: Dtype = "float32",
        batch_tokens: int | None = None,
        chunk: int | None = None,
        reading: Reading = "auto",
        overlap: int | None = None,
        sharing: int = 1,
    ) -> None:
        if overlap is not None and overlap < 0:
            raise InputError(f"overlap is {overlap}; it must be at least 0")
        self.device = choose_device(device)
        self.batch_tokens, self.chunk = sizes(self.device.type, batch_tokens, chunk)
        self.model: Any = load(model).to(self.device, getattr(torch, dtype))
        config = self.model.config
        if config.head.task != self.task or config.tokenizer.get("type") != "dna":
            raise InputError(
                f"model {model} is not a classifier of DNA {'sequences' if self.task == 'sequence' else 'bases'} (head "
                f"{config.head.task!r}, tokens {config.tokenizer.get('type')!r}); give one made by 'longseq dna train'"
                + (" --annotation" if self.task == "position" else "")
            )
        self.name = model
        self.classes: tuple[str, ...] = config.head.labels
        self.targets: Targets = config.head.targets
        self.causal: bool = self.model.causal
        self.parts = 1  # in which a batch is read, since a whole one did not fit into memory
        self.reading, self.sharing = reading, sharing
        self.overlap = self.batch_tokens // 8 if overlap is None else overlap
        if self.causal and reading != "auto":
            raise InputError(f"model {model} reads in one direction, exactly at any length; leave --reading out")
        if reading == "two-sweeps" and not sweepable(self.model.backbone):
            raise InputError(f"model {model} has attention over the whole record; only --reading windows can read it")
        if 2 * self.overlap >= self.batch_tokens:
            raise InputError(
                f"overlap is {self.overlap} on each side of windows of {self.batch_tokens} bases, which leaves nothing "
                "between; lower it or raise --batch-tokens"
            )

    @property
    def longest_batched(self) -> int:
        """Bases up to which records go through the model whole; `stream` is for longer ones."""
        return min(self.chunk, self.batch_tokens) if self.causal else self.batch_tokens

    @property
    def _smaller(self) -> str:
        """What to do about a record that goes through the model whole and does not fit."""
        return f"give a --{'chunk' if self.causal else 'batch-tokens'} below it"

    @property
    def facts(self) -> Facts:
        """What `longseq dna classify` has to know of it."""
        both = self.model.backbone.both_strands
        return Facts(self.name, self.classes, self.batch_tokens, self.longest_batched, self.targets, both)

    def batch(self, sequences: list[Tokens]) -> Logits:
        """Logits (b, classes) of whole sequences, in batches of similar length within the token budget."""
        logits = np.zeros((len(sequences), len(self.classes)), dtype=np.float32)
        for places in batches_by_length([len(s) for s in sequences], self.batch_tokens):
            logits[places] = self.forward([sequences[i] for i in places])
        return logits

    @torch.inference_mode()
    def stream(self, chunks: Iterable[Tokens]) -> Answer:
        """What is known of one sequence that comes in chunks: equal to a single pass, to rounding, but for windows.

        A bidirectional model reads in two sweeps if what this takes fits into `MEMORY` of the free main memory, and in
        windows otherwise, unless `reading` says which.
        """
        if self.causal:
            states = self._in_chunks(chunks, lambda ids, state: (self.model.read(ids, state),) * 2)
            (state,) = deque(states, maxlen=1)
            return Answer(self._logits(state), "chunks")
        features, reading = self._features(chunks)
        if features is None:
            return Answer(None, "", reading)
        return Answer(self._logits(self.model.pool(features)), reading)

    def _features(self, chunks: Iterable[Tokens]) -> tuple[Iterator[torch.Tensor] | None, str]:
        """Features of a bidirectional model, stretch by stretch, and how they are read; or None, and why."""
        parts, rest, length = iter(chunks), [], 0
        longest = self._longest_swept()
        for part in parts:
            rest.append(part)
            if (length := length + len(part)) > longest:
                break
        if length <= longest:
            ids = torch.from_numpy(np.concatenate(rest))[None]
            return two_sweeps(self.model.backbone, ids, chunk=self.chunk), "two-sweeps"
        if self.reading == "two-sweeps":
            note = f"more than {longest} bases, for which two sweeps have memory here; leave --reading out for windows"
            return None, note
        tokens = (torch.from_numpy(part)[None] for part in _rechunked(chain(rest, parts), self.chunk))
        return windows(self.model.backbone, tokens, window=self.batch_tokens, context=self.overlap), "windows"

    @torch.inference_mode()
    def forward(self, sequences: list[Tokens]) -> Logits:
        """Logits (b, classes) of whole sequences in one batch, or in parts if that has not fitted into memory."""
        while True:
            size = -(-len(sequences) // self.parts)
            with suppress(torch.OutOfMemoryError):
                parts = [self._forward(sequences[i : i + size]) for i in range(0, len(sequences), size)]
                return self._joined(parts)
            if size == 1:
                longest = max(map(len, sequences))
                raise InputError(f"a record of {longest} bases does not fit into memory; {self._smaller}")
            self.parts *= 2
            print(f"out of memory: batches are read in {self.parts} parts from now on", file=sys.stderr)

    def _forward(self, sequences: list[Tokens]) -> Logits:
        ids, lengths = (torch.from_numpy(a).to(self.device) for a in pad_right(sequences))
        return self.model(ids, lengths=lengths).float().cpu().numpy()

    def _joined(self, parts: list[Any]) -> Any:
        return np.concatenate(parts)

    @torch.inference_mode()
    def _in_chunks(self, chunks: Iterable[Tokens], step: Callable[[torch.Tensor, Any], tuple[Any, Any]]) -> Iterator:
        """What `step` of the ids (1, c) of a chunk and the state before it says, beside the state after it.

        A chunk is fetched while the one before it is computed, and read in halves if it does not fit into memory.
        """
        state = None
        for tokens in _one_ahead(_rechunked(chunks, self.chunk)):
            while len(tokens):
                part = tokens[: self.chunk]
                with suppress(torch.OutOfMemoryError):
                    said, state = step(torch.from_numpy(part).to(self.device).long()[None], state)
                    tokens = tokens[len(part) :]
                    yield said
                    continue
                self.chunk = len(part) // 2
                if not self.chunk:
                    raise InputError("not even one base fits into memory beside the model; use another --device")
                print(f"out of memory: chunks have {self.chunk} bases from now on", file=sys.stderr)

    def _logits(self, state: Any) -> Logits:
        return self.model.classify(state)[0].float().cpu().numpy()

    def _longest_swept(self) -> int:
        """Bases that may be read in two sweeps."""
        if self.reading == "windows" or not sweepable(self.model.backbone):
            return 0
        per_chunk = host_bytes(self.model.backbone, self.chunk, self.chunk)
        return int(MEMORY * free_memory() / self.sharing / per_chunk * self.chunk)


class BaseClassifier(Classifier):
    """A classifier of every base, run likewise: logits (l, classes) of each sequence, in the order of `classes`."""

    task = "position"

    @property
    def complement(self) -> list[int]:
        """For each class that of the same base read on the other strand."""
        return list(self.model.config.head.complement or range(len(self.classes)))

    @property
    def facts(self) -> Facts:
        """As of a Classifier, with the complements."""
        return super().facts._replace(complement=tuple(self.complement))

    def turned(self, logits: Logits) -> Logits:
        """Logits (l, classes) of the same bases as the reverse complement has them."""
        return logits[::-1, self.complement]

    def on_strands(self, sequences: list[Tokens], strand: Strand) -> list[Logits]:
        """Logits (l, classes) of each of some whole sequences, from what is read on a strand, or their mean."""
        found = []
        for other in _others(strand, self.facts.both_strands):
            given = [reverse_complement(s) for s in sequences] if other else sequences
            found.append([self.turned(logits) if other else logits for logits in self.batch(given)])
        return [np.mean(strands, axis=0) for strands in zip(*found, strict=True)]

    def read(self, chunks: Iterable[Tokens], strand: Strand = "fwd") -> tuple[Iterator[Logits] | None, str]:
        """Logits (c, classes) stretch by stretch of one sequence that comes in chunks, and how they are read.

        As `stream` reads it; None and the reason where that fails. Where the other strand is read, a sequence and its
        logits are held.
        """
        others = _others(strand, self.facts.both_strands)
        if others == [False]:
            return self._read_given(chunks)
        tokens = np.concatenate(list(chunks))
        found, how = [], ""
        for other in others:
            parts, how = self._read_given([reverse_complement(tokens) if other else tokens])
            if parts is None:
                return None, how
            logits = np.concatenate(list(parts))
            found.append(self.turned(logits) if other else logits)
        return iter([np.mean(found, axis=0)]), how

    def _read_given(self, chunks: Iterable[Tokens]) -> tuple[Iterator[Logits] | None, str]:
        parts, held, length = iter(chunks), list[Tokens](), 0
        for part in parts:
            held.append(part)
            if (length := length + len(part)) > self.longest_batched:
                break
        else:
            return iter(self.batch([np.concatenate(held)])), "whole"
        parts = chain(held, parts)
        if self.causal:
            return (logits[0].float().cpu().numpy() for logits in self._in_chunks(parts, self.model)), "chunks"
        features, reading = self._features(parts)
        return (None if features is None else self._logits_of(features)), reading

    def batch(self, sequences: list[Tokens]) -> list[Logits]:  # pyright: ignore
        """Logits (l, classes) of each of some whole sequences."""
        found = [np.zeros((0, len(self.classes)), dtype=np.float32)] * len(sequences)
        for places in batches_by_length([len(s) for s in sequences], self.batch_tokens):
            for i, logits in zip(places, self.forward([sequences[i] for i in places]), strict=True):
                found[i] = logits
        return found

    def _forward(self, sequences: list[Tokens]) -> list[Logits]:  # pyright: ignore
        ids, lengths = (torch.from_numpy(a).to(self.device) for a in pad_right(sequences))
        logits = self.model(ids, lengths=lengths)[0].float().cpu().numpy()
        return [own[: len(s)] for own, s in zip(logits, sequences, strict=True)]

    def _joined(self, parts: list[Any]) -> Any:
        return list(chain(*parts))

    @torch.inference_mode()
    def _logits_of(self, features: Iterator[torch.Tensor]) -> Iterator[Logits]:
        for x in features:
            yield self.model.classify(x)[0].float().cpu().numpy()


def type_of(device: str) -> str:
    """cpu or cuda, of the name of a device or auto."""
    return choose_device(device).type if device == "auto" else device.partition(":")[0]


def sizes(device_type: str, batch_tokens: int | None, chunk: int | None = None) -> tuple[int, int]:
    """Bases per batch and per chunk; None: what keeps the device busy, 65,536 and 16,384 on a CPU, 2**20 on a GPU."""
    for name, value in (("batch_tokens", batch_tokens), ("chunk", chunk)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    on_cpu = device_type == "cpu"
    return batch_tokens or (1 << 16 if on_cpu else 1 << 20), chunk or (1 << 14 if on_cpu else 1 << 20)


def labels_bases(model: str) -> bool:
    """Whether a model gives every base a label, as its config.json says."""
    values = read_json(resolve(model) / "config.json").get("model")
    head = values.get("head") if isinstance(values, dict) else None
    return isinstance(head, dict) and head.get("task") == "position"


def load(model: str) -> Any:
    """A network, a linear model of k-mer counts or one of codon usage, in eval mode on the CPU."""
    from seqmodels.tasks.genomics import codons, kmers

    by_format = {codons.FORMAT: codons.load_codons, kmers.FORMAT: kmers.load_kmers}
    return by_format.get(format_of(model), seqmodels.load)(model)


class Alone:
    """Records answered by this process, one after the other.

    The model (Classifier or what is like it) has `facts`, with batch_tokens; `forward`, the answer (b, ...) to one
    batch; `batch`, the same for any number of records; and `stream`, the answer to a long one.
    """

    def __init__(self, model: Any) -> None:
        self._model, self.facts = model, model.facts

    def forward(self, batch: list[Any]) -> Future:
        """The answer to one batch as it is."""
        return _known(self._model.forward(batch))

    def batch(self, sequences: list[Tokens]) -> list[tuple[list[int], Future]]:
        """Places of sequences, and what is said of them (b, ...)."""
        return [(list(range(len(sequences))), _known(self._model.batch(sequences)))]

    def stream(self, chunks: Iterable[Tokens]) -> Future:
        """What is said of a long record."""
        return _known(self._model.stream(chunks))


class Together:
    """Records answered by several processes: a batch or a long record goes to the one that is free next.

    The batches are those of a process alone.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers, self.facts = workers, workers.facts

    def forward(self, batch: list[Any]) -> Future:
        """As Alone."""
        return self._workers.ask([batch])

    def batch(self, sequences: list[Tokens]) -> list[tuple[list[int], Future]]:
        """As Alone."""
        batches = batches_by_length([len(s) for s in sequences], self.facts.batch_tokens)
        return [(places, self.forward([sequences[i] for i in places])) for places in batches]

    def stream(self, chunks: Iterable[Tokens]) -> Future:
        """As Alone."""
        return self._workers.ask_in_parts(chunks)


class Strands:
    """Records answered on the strand as given (fwd), on the other one (rev), or on both, with an answer for each.

    A model that reads both strands anyway is asked once.
    """

    def __init__(self, engine: Alone | Together, strand: Strand) -> None:
        self._engine, self.facts, self.strand = engine, engine.facts, strand
        self._others = _others(strand, self.facts.both_strands)

    def batch(self, sequences: list[Tokens]) -> list[tuple[list[int], tuple[Future, ...]]]:
        """Places of sequences, and for each strand their logits (b, classes)."""
        asked = [
            self._engine.batch([reverse_complement(s) for s in sequences] if other else sequences)
            for other in self._others
        ]
        return [(same[0][0], tuple(future for _, future in same)) for same in zip(*asked, strict=True)]

    def stream(self, chunks: Iterable[Tokens]) -> tuple[Future, ...]:
        """For each strand, the Answer for a long record; its tokens are held where the other strand is read."""
        if self._others == [False]:
            return (self._engine.stream(chunks),)
        parts = iter(chunks)
        held: list[Tokens] = []
        given = [self._engine.stream(_held(parts, held))] if not self._others[0] else []
        held += parts
        return (*given, self._engine.stream(reverse_complement(part) for part in reversed(held)))


def _others(strand: Strand, both_strands: bool) -> list[bool]:
    """What is read to answer on a strand: the sequence as given (False), its reverse complement (True) or both."""
    return [False] if both_strands else {"fwd": [False], "rev": [True], "both": [False, True]}[strand]


def _held(items: Iterator[Tokens], held: list[Tokens]) -> Iterator[Tokens]:
    for item in items:
        held.append(item)
        yield item


@contextmanager
def opened(make: Callable[..., Any], device: str, devices: int, **options: Any) -> Iterator[Alone | Together]:
    """The model of these options (Classifier(**options), ...) on one device or several; under torchrun, on all its."""
    place, names = torchrun(), devices_of(device, devices)
    if place is not None:
        names = [torchrun_device(device)]
    if len(names) == 1 and (place is None or place[1] == 1):
        yield Alone(make(device=names[0], **options))
    else:
        with Workers(_shared(make, options, len(names)), names) as workers:
            yield Together(workers)


def serve_first(make: Callable[..., Any], device: str, **options: Any) -> bool:
    """Whether this is one of torchrun's further processes, which then has served the first one to the end."""
    if (place := torchrun()) is None or not place[0]:
        return False
    serve(_shared(make, options, 1), torchrun_device(device))
    return True


def _shared(make: Callable[..., Any], options: dict[str, Any], processes: int) -> Make:
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if torchrun() else processes
    return partial(_in_process, make, {**options, "sharing": sharing})


def _in_process(
    make: Callable[..., Any], options: dict[str, Any], device: str
) -> tuple[Any, Callable[[Iterator[Any]], Any]]:
    """A model as a worker: a list of sequences is one batch, and several parts are one long record."""
    model = make(device=device, **options)

    def answer(parts: Iterator[Any]) -> Any:
        first = next(parts)
        said = model.forward(first) if isinstance(first, list) else model.stream(chain([first], parts))
        return list(said) if isinstance(said, Iterator) else said

    return model.facts, answer


def _known(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def scores_of(logits: NDArray[Any], targets: Targets) -> NDArray[np.float64]:
    """Probabilities of classes or of several labels, or numbers, from what a model gives (..., classes), in float64."""
    if targets == "single":
        return probabilities(logits)
    logits = logits.astype(np.float64)
    return logits if targets == "regression" else np.exp(-np.logaddexp(0, -logits))


def label_of(scores: NDArray[np.float64], classes: tuple[str, ...], targets: Targets) -> str:
    """The most likely class, or all labels that are as likely as not, or more."""
    if targets == "multi":
        return ";".join(name for name, p in zip(classes, scores, strict=True) if p >= 0.5)
    return classes[int(scores.argmax())]


def probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax of logits (..., classes) in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def batches_by_length(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of sequences, sorted by length and cut so that count * longest <= batch_tokens, or one sequence."""
    places: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if places and (len(places) + 1) * lengths[i] > batch_tokens:
            yield places
            places = []
        places.append(i)
    if places:
        yield places


def _one_ahead(items: Iterable[Tokens]) -> Iterator[Tokens]:
    """The same items, each fetched by another thread while the one before it is in use."""
    iterator, end = iter(items), None
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


def _rechunked(chunks: Iterable[Tokens], size: int) -> Iterator[Tokens]:
    """The same tokens in chunks of `size`, the last one shorter."""
    parts: list[Tokens] = []
    held = 0
    for chunk in chunks:
        while len(chunk):
            part, chunk = chunk[: size - held], chunk[size - held :]
            parts.append(part)
            held += len(part)
            if held == size:
                yield np.concatenate(parts)
                parts, held = [], 0
    if parts:
        yield np.concatenate(parts)
