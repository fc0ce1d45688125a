"""Training batches of recordings: bucketed by length, under a token budget, a pure function of the step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from seqmodels.heads import IGNORED
from seqmodels.tasks.audio.noise import roughened
from seqmodels.tasks.audio.waveform import MuLaw, peak_normalise

MULTIPLE = 256  # padded lengths are multiples of this, so that few shapes occur
QUIETEST_NOISE = 30.0  # dB signal to noise: less noise than that is hardly heard
BEGIN, END = -np.inf, np.inf  # what stands for BOS and EOS among samples


@dataclass(frozen=True)
class Clips:
    """Waveforms as sequences [BEGIN, s0, ..., END] of all clips in one array, once per speed; and what is told of them.

    A piece of n steps from position o has the inputs samples[o : o + n] and the targets samples[o + 1 : o + n + 1],
    as tokens.
    """

    samples: np.ndarray  # (values,) float32, each clip peak-normalised
    offsets: np.ndarray  # (speeds, clips): where a sequence starts
    lengths: np.ndarray  # (speeds, clips): steps of a sequence: samples + 1
    mu_law: MuLaw
    labels: np.ndarray  # (clips, conditions) int64: ids
    texts: np.ndarray  # (clips, mu_law.text) int64: tokens

    def __len__(self) -> int:
        return self.offsets.shape[1]

    def tokens(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of samples of any shape, BEGIN and END among them."""
        tokens = self.mu_law.encode(samples.clip(-1, 1))
        tokens[samples == BEGIN], tokens[samples == END] = self.mu_law.bos, self.mu_law.eos
        return tokens


def lay_out(
    waves: Sequence[np.ndarray],
    mu_law: MuLaw,
    *,
    speeds: Sequence[int] = (),
    labels: np.ndarray | None = None,
    texts: Sequence[str | None] | None = None,
) -> Clips:
    """Waveforms (l,) at the model's rate with their labels (clips, conditions) and texts, by default none.

    Speed 0 is the clip as recorded; then follows one for each percentage in `speeds` (106: 6 % faster, and higher).
    """
    pieces, lengths = [], []
    for speed in (100, *speeds):
        resampler = _speed_change(speed)
        for wave in waves:
            scaled, _ = peak_normalise(resampler(wave), mu_law.peak)
            pieces += [[BEGIN], scaled, [END]]
            lengths.append(len(scaled) + 1)
    steps = np.array(lengths).reshape(-1, len(waves))
    starts = np.concatenate([[0], np.cumsum(steps.ravel() + 1)[:-1]])
    return Clips(
        np.concatenate(pieces, dtype=np.float32, casting="same_kind"),
        starts.reshape(steps.shape),
        steps,
        mu_law,
        np.zeros((len(waves), 0), dtype=np.int64) if labels is None else labels,
        np.stack([mu_law.text_tokens(text) for text in texts or [None] * len(waves)]),
    )


def _speed_change(speed: int) -> Callable[[np.ndarray], np.ndarray]:
    if speed == 100:
        return lambda wave: wave
    from torchaudio.transforms import Resample

    transform = Resample(speed, 100)  # as a transform it keeps its kernel
    return lambda wave: transform(torch.from_numpy(wave)).numpy()


def gather(
    clips: Clips,
    offsets: np.ndarray,
    lengths: np.ndarray,
    width: int,
    *,
    gains: np.ndarray | None = None,
    silences: np.ndarray | None = None,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """One batch {"ids", "targets"} (b, width) of pieces; padding has id 0 and target -100.

    `gains` (b,) multiply the samples; `silences` (b,) steps of silence follow the first step, which is BOS.
    `change` then makes other samples, as many, of those of each row.
    """
    steps = np.arange(width + 1)
    silent = np.zeros_like(lengths) if silences is None else silences
    within = np.where(steps > silent[:, None], steps - silent[:, None], 0)
    samples = clips.samples[offsets[:, None] + within.clip(max=lengths[:, None])]
    samples[(steps > 0) & (steps <= silent[:, None])] = 0
    if gains is not None:
        samples = np.where(np.isfinite(samples), samples * gains[:, None].astype(np.float32), samples)
    if change is not None:
        real = np.isfinite(samples) & (steps <= (lengths + silent)[:, None])
        for row, own in zip(samples, real, strict=True):
            row[own] = change(row[own])
    inside, tokens = steps[:-1] < (lengths + silent)[:, None], clips.tokens(samples)
    ids, targets = np.where(inside, tokens[:, :-1], 0), np.where(inside, tokens[:, 1:], IGNORED)
    return {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}


def after_text(batch: dict[str, torch.Tensor], texts: np.ndarray) -> dict[str, torch.Tensor]:
    """The batch with the tokens of a text (b, t) before each row; the loss does not count them."""
    if not texts.shape[1]:
        return batch
    before = torch.from_numpy(texts)
    ids = torch.cat([before, batch["ids"]], 1)
    return batch | {"ids": ids, "targets": torch.cat([torch.full_like(before, IGNORED), batch["targets"]], 1)}


def cut_batches(lengths: np.ndarray, budget: int, before: int = 0) -> list[tuple[np.ndarray, int]]:
    """Pieces grouped by length: (piece numbers, padded length) with numbers * (before + length) <= budget (or one).

    `before` steps of text stand before each piece and count in the budget; the padded length is without them.

    Longest first, so that every group is as full as its padded length allows, but the last two, which share what is
    left: a tiny last batch would give its clips a large say. Pieces of equal padded length keep their order.
    """
    widths = -(-(lengths + before) // MULTIPLE) * MULTIPLE
    order = np.argsort(-widths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        width = int(widths[order[start]])
        stop = start + max(1, budget // width)
        groups.append((order[start:stop], width))
        start = stop
    if len(groups) > 1:
        (first, width), (second, _) = groups[-2:]
        both = np.concatenate([first, second])
        half = -(-len(both) // 2)
        if half * width <= budget:
            groups[-2:] = [(both[:half], width), (both[half:], int(widths[both[half]]))]
    return [(members, width - before) for members, width in groups]


@dataclass
class ClipData:
    """TrainingData of clips: each once per epoch, varied anew each time, its labels and text at times withheld."""

    train: Clips
    validation: Clips
    not_given: np.ndarray
    "Per condition, the id that means 'not given'."
    batch_tokens: int = 65536
    "Positions of a batch, padding included."
    longest: int = 0
    "Samples of a piece at most, into which longer clips are cut; 0, or more than a batch has: as many as that."
    seed: int = 0
    "Seed of order, variations, withheld labels and texts."
    label_dropout: float = 0.1
    "Probability with which each label of a clip is withheld, or its text, and again that of withholding all at once."
    as_recorded: float = 0.5
    "Share of clips at their own speed when there are others."
    flip: bool = False
    "Whether half of the clips change their sign."
    quieter: float = 0.0
    "Decibels by which a clip gets quieter at most, at random."
    silence: int = 0
    "Samples of silence before a clip at most, at random."
    noise: float | None = None
    "Signal-to-noise ratio in dB down to which half of the clips are noisy; None means that none is."
    mask: int = 0
    "Samples at most, at random, of a stretch that half of the clips lose to silence."
    input_noise: float = 0.0
    "Levels of mu-law: highest standard deviation of noise on the samples of a piece as the model reads them."
    _plans: dict = field(default_factory=dict, repr=False)
    _starts: list = field(default_factory=lambda: [0], repr=False)

    def train_batch(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of this step: {"ids", "targets"} (b, l), and "conditions" (b, n) if there are any."""
        epoch, index = self._locate(step)
        plan = self._plan(epoch)
        members, width = plan.groups[index]
        batch = gather(
            self.train, plan.offsets[members], plan.lengths[members], width,
            gains=plan.gains[members], silences=plan.silences[members], change=self._change(step),
        )  # fmt: skip
        if self.input_noise:
            batch["ids"] = self._inexact(batch["ids"], step)
        clips, n = plan.clips[members], len(self.not_given)
        rng = np.random.default_rng((self.seed, 1, step))  # for each label, the text, and all of them at once
        withheld = rng.random((n + 2, len(clips), 1)) < self.label_dropout
        withheld = withheld[:-1] | withheld[-1]
        if n:
            labels = np.where(np.hstack(withheld[:n]), self.not_given, self.train.labels[clips])
            batch["conditions"] = torch.from_numpy(labels)
        texts = np.where(withheld[n], self.train.mu_law.nul, self.train.texts[clips])
        return after_text(batch, texts)

    def _inexact(self, ids: torch.Tensor, step: int) -> torch.Tensor:
        """Samples (b, l) as inexact as what a model draws, each row in its own measure."""
        rng = np.random.default_rng((self.seed, 3, step))
        noise = rng.normal(0, self.input_noise * rng.random((len(ids), 1)), ids.shape).round()
        highest = self.train.mu_law.levels - 1
        return torch.where(ids > highest, ids, (ids + torch.from_numpy(noise).long()).clamp(0, highest))

    def _change(self, step: int) -> Callable[[np.ndarray], np.ndarray] | None:
        """What is done to the samples of each row of this step's batch, if anything."""
        if self.noise is None and not self.mask:
            return None
        rng, peak = np.random.default_rng((self.seed, 2, step)), self.train.mu_law.peak

        def change(samples: np.ndarray) -> np.ndarray:
            if self.noise is not None:
                samples = roughened(samples, (self.noise, max(self.noise, QUIETEST_NOISE)), 0.5, rng)
                samples = samples * np.float32(peak / max(peak, np.abs(samples).max(initial=0.0)))  # not clipped
            if self.mask and rng.random() < 0.5:
                start, count = rng.integers(0, len(samples) + 1), rng.integers(1, self.mask + 1)
                samples[start : start + count] = 0  # a copy of the row's
            return samples

        return change

    def tokens(self, step: int) -> int:
        """Samples of the batch of this step."""
        epoch, index = self._locate(step)
        plan = self._plan(epoch)
        members, _ = plan.groups[index]
        return int((plan.lengths + plan.silences)[members].sum())

    def validation_batches(self) -> list[dict[str, torch.Tensor]]:
        """All validation clips, with their labels and texts."""
        return batches(self.validation, self.batch_tokens, longest=self._longest)

    @property
    def _longest(self) -> int:
        return min(self.longest or self.batch_tokens, self.batch_tokens)

    def steps_per_epoch(self) -> int:
        """Batches of the first epoch (later ones differ by a few, as the clips' lengths do)."""
        return len(self._plan(0).groups)

    def _locate(self, step: int) -> tuple[int, int]:
        while self._starts[-1] <= step:  # the length of an epoch depends on its speeds: walk through the epochs
            self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1).groups))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, step - self._starts[epoch]

    def _plan(self, epoch: int) -> "_Plan":
        if epoch not in self._plans:
            rng = np.random.default_rng((self.seed, 0, epoch))
            clips, speeds = rng.permutation(len(self.train)), len(self.train.offsets)
            other = rng.integers(min(1, speeds - 1), speeds, len(clips))
            chosen = np.where(rng.random(len(clips)) < self.as_recorded, 0, other)
            pieces, offsets, lengths = split_long(
                self.train.offsets[chosen, clips], self.train.lengths[chosen, clips], self._longest
            )
            gains = 10 ** (-self.quieter * rng.random(len(clips)) / 20)
            gains *= np.where(rng.random(len(clips)) < 0.5 * self.flip, -1, 1)
            first = np.diff(pieces, prepend=-1) > 0  # silence comes before the whole clip
            silences = np.where(first, rng.integers(0, self.silence + 1, len(pieces)), 0)
            groups = cut_batches(lengths + silences, self.batch_tokens, self.train.mu_law.text)
            order = rng.permutation(len(groups))
            self._plans.clear()  # consecutive steps share an epoch
            self._plans[epoch] = _Plan(
                clips[pieces], offsets, lengths, gains[pieces], silences, [groups[i] for i in order]
            )
        return self._plans[epoch]


@dataclass(frozen=True)
class _Plan:
    """One epoch: of each piece its clip, where it lies, how it is varied; and groups of pieces that make batches."""

    clips: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    gains: np.ndarray
    silences: np.ndarray
    groups: list[tuple[np.ndarray, int]]


class LabelData:
    """TrainingData of a classifier: batches of ClipData with the clip's first label as the target.

    A piece of a clip longer than a batch has the clip's label.
    """

    def __init__(self, clips: ClipData) -> None:
        self.clips = clips

    def train_batch(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of this step: {"ids"} (b, l), {"lengths", "targets"} (b,)."""
        return labelled(self.clips.train_batch(step))

    def tokens(self, step: int) -> int:
        """Samples of the batch of this step."""
        return self.clips.tokens(step)

    def validation_batches(self) -> list[dict[str, torch.Tensor]]:
        """All validation clips."""
        return [labelled(batch) for batch in self.clips.validation_batches()]


def labelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a classifier reads of a batch, and its target."""
    lengths = (batch["targets"] != IGNORED).sum(1)
    return {"ids": batch["ids"], "lengths": lengths, "targets": batch["conditions"][:, 0]}


def split_long(offsets: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences cut into pieces of at most `longest` steps: each piece's sequence number, offset and length."""
    counts = -(-lengths // longest)
    pieces = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    return pieces, offsets[pieces] + within * longest, np.minimum(longest, lengths[pieces] - within * longest)


def batches(clips: Clips, batch_tokens: int, *, longest: int | None) -> list[dict[str, torch.Tensor]]:
    """Every clip as recorded, once, in batches of similar length; "clips" (b,) says which clips they are.

    Clips are cut into pieces of at most `longest` steps, unless that is None.
    """
    pieces, offsets, lengths = split_long(clips.offsets[0], clips.lengths[0], longest or int(clips.lengths[0].max()))
    result = []
    for members, width in cut_batches(lengths, batch_tokens, clips.mu_law.text):
        of = pieces[members]
        batch = after_text(gather(clips, offsets[members], lengths[members], width), clips.texts[of])
        if clips.labels.shape[1]:
            batch["conditions"] = torch.from_numpy(clips.labels[of])
        result.append(batch | {"clips": torch.from_numpy(of)})
    return result
