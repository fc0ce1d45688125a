"""Batches of labelled DNA for training and validation, and evenly spaced windows for evaluation."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from seqmodels.batching import best_fit, buckets, draw_batches, draw_packed, pack
from seqmodels.errors import InputError
from seqmodels.heads import IGNORED
from seqmodels.tasks.genomics.genome import Genome, Stretch, held_out
from seqmodels.tasks.genomics.inference import batches_by_length
from seqmodels.tasks.genomics.labelled import LabelledRecords
from seqmodels.tasks.genomics.tokens import PAD, A, N, T, Tokens, pad_right, reverse_complement

Batch = dict[str, torch.Tensor]
SHORTEST = 1024  # bases of a window at the start of a warm-up of lengths
MOST_ROWS = 16  # of a packed batch: long ones waste little at their ends, several can be halved where memory is short


@dataclass(frozen=True)
class Augmentation:
    """How a training sequence is changed, anew each time it is read."""

    reverse_complement: bool = True
    "Whether half of the sequences are read on the other strand."
    mutation_rate: float = 0.0
    "Part of the bases that another one replaces (random mutation; Lee et al., EvoAug, 2023)."

    def __post_init__(self) -> None:
        if not 0 <= self.mutation_rate < 1:
            raise InputError(
                f"mutation_rate is {self.mutation_rate}; expected a part of the bases, at least 0, below 1"
            )

    def __call__(self, sequences: list[Tokens], rng: np.random.Generator) -> list[Tokens]:
        """The tokens (l,) of each sequence, changed as `rng` draws; the given ones stay as they are."""
        if self.reverse_complement:
            other = rng.random(len(sequences)) < 0.5
            sequences = [reverse_complement(s) if o else s for s, o in zip(sequences, other, strict=True)]
        if self.mutation_rate and sequences:
            tokens = np.concatenate(sequences)
            drawn = rng.random(len(tokens), dtype=np.float32) < self.mutation_rate
            places = np.flatnonzero(drawn & (tokens >= A) & (tokens <= T))
            tokens[places] = A + (tokens[places] - A + rng.integers(1, 4, len(places), dtype=tokens.dtype)) % 4
            ends = np.cumsum([len(s) for s in sequences])
            sequences = [tokens[end - len(s) : end] for s, end in zip(sequences, ends, strict=True)]
        return sequences


def parse_lengths(lengths: str | list[int] | None) -> list[int]:
    """Window lengths from '1024,8192' or a list; none gives an empty list."""
    parts = (
        (lengths.strip("[]").split(",") if lengths.strip("[]") else []) if isinstance(lengths, str) else lengths or []
    )
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise InputError(f"window is {lengths!r}; give lengths in bases, for example 1024,8192") from None
    if any(number < 1 for number in numbers):
        raise InputError(f"window is {lengths!r}; lengths must be at least 1")
    return numbers


def to_batch(sequences: list[Tokens], labels: NDArray) -> Batch:
    """Right-padded ids (b, l), lengths (b,) and targets (b,), all int64, or targets (b, labels) float32."""
    ids, lengths = pad_right(sequences)
    targets = torch.from_numpy(labels)
    return {
        "ids": torch.from_numpy(ids),
        "lengths": torch.from_numpy(lengths),
        "targets": targets if targets.is_floating_point() else targets.long(),
    }


def training_data(
    records: LabelledRecords,
    lengths: list[int],
    *,
    batch_tokens: int,
    validation_fraction: float,
    validation_windows: int,
    augment: Augmentation,
    seed: int,
    length_warmup: int = 0,
    packed: bool = False,
    validation: LabelledRecords | None = None,
) -> "RecordData | WindowData":
    """The batches of `records`: windows of long records, whole (or cropped) records otherwise.

    `length_warmup` is the number of batches over which windows grow to their length; `packed` is for whole records.
    A part of the records is held out, unless others are given for `validation`.
    """
    if len(records.classes) < 2 and records.targets == "single":
        raise InputError(f"the data have one class only ({', '.join(records.classes)}); training needs two or more")
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction is {validation_fraction}; give a number between 0 and 1")
    if records.long:
        if packed:
            raise InputError("windows of long records are of one length per batch and need no packing; leave it out")
        return WindowData(
            records,
            lengths or [1024, 8192, 65536],
            batch_tokens=batch_tokens,
            validation_fraction=validation_fraction,
            validation_windows=validation_windows,
            augment=augment,
            seed=seed,
            length_warmup=length_warmup,
            validation=validation,
        )
    if length_warmup:
        raise InputError("length_warmup is for windows of long records; leave it out, or train on a folder of genomes")
    return RecordData(
        records,
        lengths,
        batch_tokens=batch_tokens,
        validation_fraction=validation_fraction,
        augment=augment,
        seed=seed,
        packed=packed,
        validation=validation,
    )


class RecordData:
    """Batches of short records: every training record once per pass, in an order that the seed and the pass decide.

    Records of similar length make a batch, the shorter ones padded; or, if `packed`, records of any length lie end to
    end in up to MOST_ROWS long rows. Which ones meet is drawn anew in each pass; the number of batches stays.

    Validation records are a fraction of each class. With `lengths`, each batch draws one of them, and longer records
    are cut to that length at a random place.
    """

    def __init__(
        self,
        records: LabelledRecords,
        lengths: list[int],
        *,
        batch_tokens: int,
        validation_fraction: float,
        augment: Augmentation,
        seed: int,
        packed: bool = False,
        validation: LabelledRecords | None = None,
    ):
        self.records, self.lengths, self.batch_tokens = records, lengths, batch_tokens
        self.augment, self.seed = augment, seed
        if validation is None:
            self.training, places = _split_by_class(records, validation_fraction, seed)
            self.held_out = records.take(places)
        else:
            self.training, self.held_out = np.arange(len(records.names)), validation
        longest = max(lengths, default=None)
        self._read = np.array([len(records.tokens[i][:longest]) for i in self.training])  # bases of each record
        self._buckets = buckets(self._read, batch_tokens)
        self._per_batch = min(MOST_ROWS, max(1, batch_tokens // int(self._read.max())))  # rows, if packed
        self._rows = best_fit(self._read, batch_tokens // self._per_batch) if packed else None
        self._drawn: tuple[int, list[list[NDArray[np.int64]]]] = (-1, [])  # the last pass, whose batches come together
        self.batches_per_pass = len(self._draw(0))

    def _draw(self, number: int) -> list[list[NDArray[np.int64]]]:
        """The batches of a pass, as rows of places in `training`."""
        if self._drawn[0] != number:
            rng = np.random.default_rng((self.seed, 0, number))
            if self._rows is None:
                drawn = [list(batch[:, None]) for batch in draw_batches(self._buckets, rng)]
            else:
                drawn = draw_packed(self._rows, self._read, self._per_batch, rng)
            self._drawn = (number, drawn)
        return self._drawn[1]

    def _choose(self, step: int) -> tuple[list[NDArray[np.int64]], int | None, np.random.Generator]:
        """Rows of a batch, the length to which it cuts, and what draws the rest."""
        rng = np.random.default_rng((self.seed, 1, step))
        crop = int(rng.choice(self.lengths)) if self.lengths else None
        return self._draw(step // self.batches_per_pass)[step % self.batches_per_pass], crop, rng

    def train_batch(self, step: int) -> Batch:
        """Batch number `step`: a pure function of the seed and the step."""
        rows, crop, rng = self._choose(step)
        rows = [self.training[row] for row in rows]
        places = np.concatenate(rows)
        sequences = self.augment([_crop(self.records.tokens[i], crop, rng) for i in places], rng)
        if self._rows is None:
            return to_batch(sequences, self.records.labels[places])
        following = iter(sequences)
        read = [list(itertools.islice(following, len(row))) for row in rows]
        ids, lengths, seq_idx = pack(read, fill=PAD)
        labels = torch.from_numpy(self.records.labels)
        fill = math.nan if labels.is_floating_point() else IGNORED
        targets = labels.new_full((len(rows), max(map(len, rows)), *labels.shape[1:]), fill)
        for i, row in enumerate(rows):
            targets[i, : len(row)] = labels[row]
        return {"ids": ids, "lengths": lengths, "seq_idx": seq_idx, "targets": targets}

    def tokens(self, step: int) -> int:
        """Bases of batch number `step`."""
        rows, crop, _ = self._choose(step)
        read = self._read[np.concatenate(rows)]
        return int((read if crop is None else read.clip(max=crop)).sum())

    def validation_batches(self) -> list[Batch]:
        """The held-out records in batches of similar length, cut at the end to the longest window."""
        limit = max(self.lengths) if self.lengths else None
        sequences, labels = [tokens[:limit] for tokens in self.held_out.tokens], self.held_out.labels
        return [
            to_batch([sequences[i] for i in places], labels[places])
            for places in batches_by_length([len(s) for s in sequences], self.batch_tokens)
        ]


def _split_by_class(
    records: LabelledRecords, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of training and validation records, the same fraction (at least one) of each class, if it has one each."""
    rng = np.random.default_rng((seed, 2))
    if records.targets != "single":
        places = rng.permutation(len(records.names))
        if len(places) < 2:
            raise InputError("the data have one record; training and validation need one each")
        count = min(max(1, round(fraction * len(places))), len(places) - 1)
        return np.sort(places[count:]), np.sort(places[:count])
    training, validation = [], []
    for label, name in enumerate(records.classes):
        places = rng.permutation(np.flatnonzero(records.labels == label))
        if len(places) < 2:
            raise InputError(f"class {name!r} has {len(places)} record; training and validation need one each")
        count = min(max(1, round(fraction * len(places))), len(places) - 1)
        validation.append(places[:count])
        training.append(places[count:])
    return np.sort(np.concatenate(training)), np.sort(np.concatenate(validation))


def _crop(tokens: Tokens, length: int | None, rng: np.random.Generator) -> Tokens:
    if length is None or len(tokens) <= length:
        return tokens
    start = int(rng.integers(len(tokens) - length + 1))
    return tokens[start : start + length]


def warmed_up_length(step: int, longest: int, warmup: int) -> int:
    """Length of windows at a batch: SHORTEST at first, doubling in equal intervals up to `longest` at `warmup`."""
    if step >= warmup:
        return longest
    doublings = max(0, math.ceil(math.log2(longest / SHORTEST)))
    return min(longest, SHORTEST << (step * doublings // warmup))


class GenomeWindows:
    """Windows at random places of stretches of a genome, all equally likely, each batch of one length.

    During the first `length_warmup` batches windows are shorter, and a batch has more of them. Those to validate are
    `validation`: at most `validation_windows`, evenly spaced, side by side at the closest. Windows that teach nothing
    are left out: those mostly N, unless a subclass knows better.
    """

    useless = "are mostly N"

    def __init__(
        self,
        genome: Genome,
        training: list[Stretch],
        validation: list[Stretch],
        window: int,
        *,
        batch_tokens: int,
        validation_windows: int,
        length_warmup: int,
        seed: int,
    ) -> None:
        self.genome, self.window, self.batch_tokens = genome, window, batch_tokens
        self.length_warmup, self.seed = length_warmup, seed
        self.training = [s for s in training if len(s) > 1]
        self._places: dict[int, tuple[list[Stretch], NDArray[np.int64]]] = {}
        for stretches, what in ((training, "to train on"), (validation, "to validate on")):
            if (longest := max(map(len, stretches), default=0)) < window:
                raise InputError(
                    f"the longest stretch {what} has {longest} bases, less than a window of {window}; give a smaller "
                    "--window, or another --validation"
                )
        self.validation = self._spaced(validation, validation_windows)
        if not self.validation:
            raise InputError(f"the validation windows {self.useless}; hold out other records (--validation)")

    def teaches(self, stretch: Stretch) -> bool:
        """Whether there is anything to learn from a window."""
        tokens = self.genome.bases(stretch.record, stretch.start, stretch.end)
        return np.count_nonzero(tokens == N) <= len(stretch) // 2

    def tokens(self, step: int) -> int:
        """Bases of batch number `step`."""
        length, count, _ = self._choose(step)
        return length * count

    def _choose(self, step: int) -> tuple[int, int, np.random.Generator]:
        """Length and number of a batch's windows, and what draws them."""
        length = warmed_up_length(step, self.window, self.length_warmup)
        return length, max(1, self.batch_tokens // length), np.random.default_rng((self.seed, 1, step))

    def _draw(self, length: int, rng: np.random.Generator, tries: int = 10) -> Stretch:
        if length not in self._places:
            stretches = [s for s in self.training if len(s) >= length]
            self._places[length] = stretches, np.cumsum([len(s) - length + 1 for s in stretches])
        stretches, ends = self._places[length]
        while True:
            drawn = nth_window(stretches, ends, int(rng.integers(ends[-1])), length)
            tries -= 1
            if not tries or self.teaches(drawn):
                return drawn

    def _spaced(self, stretches: list[Stretch], count: int) -> list[Stretch]:
        ends = np.cumsum([len(s) // self.window for s in stretches])
        places = np.unique(np.linspace(0, ends[-1] - 1, count).astype(np.int64))
        windows = (nth_window(stretches, ends, int(at), self.window, step=self.window) for at in places)
        return [window for window in windows if self.teaches(window)]


def nth_window(
    stretches: list[Stretch], ends: NDArray[np.int64], number: int, length: int, *, step: int = 1
) -> Stretch:
    """Window `number` (from 0) of `length` bases, counted through stretches, `step` bases from one to the next.

    `ends` (stretches,) is the cumulative sum of how many windows each stretch has room for.
    """
    which = int(np.searchsorted(ends, number, side="right"))
    start = stretches[which].start + (number - int(ends[which - 1] if which else 0)) * step
    return Stretch(stretches[which].record, start, start + length)


def taken(records: LabelledRecords, places: list[Stretch]) -> tuple[list[Tokens], NDArray]:
    """Tokens and labels of stretches of records."""
    tokens = [records.tokens[place.record][place.start : place.end] for place in places]
    return tokens, records.labels[[place.record for place in places]]


class WindowData:
    """Batches of windows of long records, classes equally likely, each batch of one length.

    During the first `length_warmup` batches no window is longer than SHORTEST * 2**k, where k grows by one in equal
    intervals up to the longest window; a batch then has more windows, and as many bases as any.

    Of each record a contiguous stretch, at a place that the seed decides, is held out for validation; no window
    crosses its ends.
    """

    def __init__(
        self,
        records: LabelledRecords,
        lengths: list[int],
        *,
        batch_tokens: int,
        validation_fraction: float,
        validation_windows: int,
        augment: Augmentation,
        seed: int,
        length_warmup: int = 0,
        validation: LabelledRecords | None = None,
    ):
        self.records, self.lengths, self.batch_tokens = records, lengths, batch_tokens
        self.augment, self.seed = augment, seed
        self.validation_windows, self.length_warmup = validation_windows, length_warmup
        self.held_out = records if validation is None else validation
        self._room: dict[tuple[int, int], tuple[list[Stretch], NDArray]] = {}  # of windows, by label and length
        self.training = [Stretch(i, 0, len(tokens)) for i, tokens in enumerate(records.tokens)]
        if validation is None:
            self.training, self.validation = held_out(self.training, validation_fraction, seed)
        else:
            self.validation = [Stretch(i, 0, len(tokens)) for i, tokens in enumerate(validation.tokens)]
        for length in lengths:
            self._check_room(length, self.training, records, "training")
            self._check_room(length, self.validation, self.held_out, "validation")

    def _check_room(self, length: int, stretches: list[Stretch], records: LabelledRecords, what: str) -> None:
        for label, name in enumerate(records.classes):
            longest = max((len(s) for s in stretches if records.labels[s.record] == label), default=0)
            if longest < length:
                raise InputError(
                    f"class {name!r} has no {what} stretch of {length} bases (the longest has {longest}); use shorter "
                    "windows, longer records or another --validation-fraction"
                )

    def train_batch(self, step: int) -> Batch:
        """Batch number `step`: a pure function of the seed and the step."""
        length, count, rng = self._choose(step)
        labels = rng.integers(len(self.records.classes), size=count)
        return to_batch(self.augment([self._draw(int(label), length, rng) for label in labels], rng), labels)

    def tokens(self, step: int) -> int:
        """Bases of batch number `step`."""
        length, count, _ = self._choose(step)
        return length * count

    def _choose(self, step: int) -> tuple[int, int, np.random.Generator]:
        """Length and number of a batch's windows, and what draws them."""
        rng = np.random.default_rng((self.seed, 1, step))
        length = min(int(rng.choice(self.lengths)), warmed_up_length(step, max(self.lengths), self.length_warmup))
        return length, max(1, self.batch_tokens // length), rng

    def _draw(self, label: int, length: int, rng: np.random.Generator, tries: int = 10) -> Tokens:
        if (label, length) not in self._room:
            stretches = [s for s in self.training if self.records.labels[s.record] == label and len(s) >= length]
            self._room[label, length] = stretches, np.cumsum([len(s) - length + 1 for s in stretches])
        stretches, ends = self._room[label, length]
        drawn = nth_window(stretches, ends, int(rng.integers(ends[-1])), length)
        window = self.records.tokens[drawn.record][drawn.start : drawn.end]
        if tries > 1 and np.count_nonzero(window == N) > length // 2:  # mostly N: teaches nothing
            return self._draw(label, length, rng, tries - 1)
        return window

    def validation_batches(self) -> list[Batch]:
        """Windows of every length, evenly spaced in the held-out stretches, the same number for each class."""
        batches = []
        for length in self.lengths:
            places = spaced_windows(self.held_out, self.validation, length, self.validation_windows, overlap=False)
            size = max(1, self.batch_tokens // length)
            for i in range(0, len(places), size):
                batches.append(to_batch(*taken(self.held_out, places[i : i + size])))
        return batches


def spaced_windows(
    records: LabelledRecords, stretches: list[Stretch], length: int, count: int, *, overlap: bool
) -> list[Stretch]:
    """At most `count` windows per class, as many for each class, evenly spaced over its stretches.

    Without `overlap`, no more windows are taken than fit side by side into the class with the least room.
    """

    def per_class(room: Callable[[Stretch], int]) -> list[tuple[list[Stretch], NDArray[np.int64]]]:
        result = []
        for label in np.unique([records.labels[s.record] for s in stretches]):
            own = [s for s in stretches if records.labels[s.record] == label]
            result.append((own, np.array([max(0, room(s)) for s in own])))
        return result

    if overlap:
        rooms = per_class(lambda s: len(s) - length + 1)
        step = 1
    else:
        rooms = per_class(lambda s: len(s) // length)
        count = min(count, *(int(room.sum()) for _, room in rooms))
        step = length
    windows: list[Stretch] = []
    for own, room in rooms:
        if not room.sum():
            name = records.classes[records.labels[own[0].record]]
            raise InputError(f"class {name!r} has no record of {length} bases; use shorter windows")
        ends = np.cumsum(room)
        for at in np.unique(np.linspace(0, room.sum() - 1, count).astype(np.int64)) if count > 1 else [0]:
            windows.append(nth_window(own, ends, int(at), length, step=step))
    return windows
