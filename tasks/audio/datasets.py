"""Training batches of tokenised recordings: bucketed by length, under a token budget, a pure function of the step."""

from dataclasses import dataclass, field

import numpy as np
import torch

from seqmodels.tasks.audio.waveform import MuLaw, peak_normalise

IGNORED = -100  # target of padding
MULTIPLE = 256  # padded lengths are multiples of this, so that few shapes occur


@dataclass(frozen=True)
class TokenStream:
    """Sequences [BOS, s0, ..., EOS] of all clips in one array, once per variant (speed and polarity).

    A piece of n steps from position o has inputs stream[o : o + n] and targets stream[o + 1 : o + n + 1].
    """

    stream: np.ndarray  # (tokens,) uint16
    offsets: np.ndarray  # (variants, clips): where a sequence starts
    lengths: np.ndarray  # (variants, clips): steps of a sequence: samples + 1

    @property
    def clips(self) -> int:
        """Number of clips."""
        return self.offsets.shape[1]


def tokenise(
    waves: list[np.ndarray], mu_law: MuLaw, *, speeds: tuple[int, ...] = (), flip: bool = False
) -> TokenStream:
    """The token stream of waveforms at the model's rate; each variant is peak-normalised, then mu-law encoded.

    Variant 0 is the clip as recorded; then one variant per percentage in `speeds` (106: 6 % faster, and higher), all
    of them again with the sign flipped if `flip`.
    """
    pieces, lengths = [], []
    for speed in (100, *speeds):
        resampler = _speed_change(speed)
        for sign in (1, -1) if flip else (1,):
            for wave in waves:
                scaled, _ = peak_normalise(resampler(wave) * np.float32(sign), mu_law.peak)
                pieces.append(np.concatenate([[mu_law.bos], mu_law.encode(scaled), [mu_law.eos]]).astype(np.uint16))
                lengths.append(len(pieces[-1]) - 1)
    steps = np.array(lengths).reshape(-1, len(waves))
    starts = np.concatenate([[0], np.cumsum(steps.ravel() + 1)[:-1]])
    return TokenStream(np.concatenate(pieces), starts.reshape(steps.shape), steps)


def _speed_change(speed: int):
    if speed == 100:
        return lambda wave: wave
    from torchaudio.transforms import Resample

    transform = Resample(speed, 100)  # as a transform it keeps its kernel
    return lambda wave: transform(torch.from_numpy(wave)).numpy()


def gather(stream: TokenStream, offsets: np.ndarray, lengths: np.ndarray, width: int) -> dict[str, torch.Tensor]:
    """One batch {"ids", "targets"} (b, width) of pieces; padding has id 0 and target -100."""
    steps = np.arange(width)
    inside = steps < lengths[:, None]
    positions = np.where(inside, offsets[:, None] + steps, 0)
    ids = np.where(inside, stream.stream[positions], 0).astype(np.int64)
    targets = np.where(inside, stream.stream[positions + 1].astype(np.int64), IGNORED)
    return {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}


def cut_batches(lengths: np.ndarray, budget: int) -> list[tuple[np.ndarray, int]]:
    """Pieces grouped by length: (piece numbers, padded length) with numbers * padded length <= budget (or one piece).

    Longest first, so that every group is as full as its padded length allows, but the last two, which share what is
    left: a tiny last batch would give its clips a large say. Pieces of equal padded length keep their order.
    """
    widths = -(-lengths // MULTIPLE) * MULTIPLE
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
        groups[-2:] = [(both[:half], width), (both[half:], int(widths[both[half]]))]
    return groups


@dataclass
class ClipData:
    """TrainingData of clips: every clip once per epoch, in a random variant, with labels sometimes withheld."""

    train: TokenStream
    train_conditions: np.ndarray
    "Ids (clips, conditions) of the training clips."
    validation: TokenStream
    validation_conditions: np.ndarray
    "Ids (clips, conditions) of the validation clips."
    not_given: np.ndarray
    "Per condition, the id that means 'not given'."
    batch_tokens: int = 65536
    "Positions of a batch, padding included; a longer clip is cut into pieces of at most this length."
    seed: int = 0
    "Seed of order, variants and withheld labels."
    label_dropout: float = 0.1
    "Probability with which each label of a clip is withheld."
    as_recorded: float = 0.5
    "Share of clips taken as recorded when there are other variants."
    _plans: dict = field(default_factory=dict, repr=False)
    _starts: list = field(default_factory=lambda: [0], repr=False)

    def train_batch(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of this step: {"ids", "targets"} (b, l), and "conditions" (b, n) if there are any."""
        epoch, index = self._locate(step)
        clips, offsets, lengths, groups = self._plan(epoch)
        members, width = groups[index]
        batch = gather(self.train, offsets[members], lengths[members], width)
        if len(self.not_given):
            rng = np.random.default_rng((self.seed, 1, step))
            labels = self.train_conditions[clips[members]]
            withheld = rng.random(labels.shape) < self.label_dropout
            batch["conditions"] = torch.from_numpy(np.where(withheld, self.not_given, labels))
        return batch

    def tokens(self, step: int) -> int:
        """Samples of the batch of this step."""
        epoch, index = self._locate(step)
        _, _, lengths, groups = self._plan(epoch)
        return int(lengths[groups[index][0]].sum())

    def validation_batches(self) -> list[dict[str, torch.Tensor]]:
        """All validation clips, with their labels."""
        return batches(self.validation, self.validation_conditions, self.batch_tokens, longest=self.batch_tokens)

    def steps_per_epoch(self) -> int:
        """Batches of the first epoch (later ones differ by a few, as the variants' lengths do)."""
        return len(self._plan(0)[3])

    def _locate(self, step: int) -> tuple[int, int]:
        while self._starts[-1] <= step:  # the length of an epoch depends on its variants: walk through the epochs
            self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)[3]))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, step - self._starts[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[np.ndarray, int]]]:
        if epoch not in self._plans:
            rng = np.random.default_rng((self.seed, 0, epoch))
            clips = rng.permutation(self.train.clips)
            variants = len(self.train.offsets)
            chosen = np.where(
                rng.random(len(clips)) < self.as_recorded, 0, rng.integers(min(1, variants - 1), variants, len(clips))
            )
            pieces, offsets, lengths = split_long(
                self.train.offsets[chosen, clips], self.train.lengths[chosen, clips], self.batch_tokens
            )
            groups = cut_batches(lengths, self.batch_tokens)
            order = rng.permutation(len(groups))
            self._plans.clear()  # consecutive steps share an epoch
            self._plans[epoch] = (clips[pieces], offsets, lengths, [groups[i] for i in order])
        return self._plans[epoch]


def split_long(offsets: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences cut into pieces of at most `longest` steps: each piece's sequence number, offset and length."""
    counts = -(-lengths // longest)
    pieces = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    return pieces, offsets[pieces] + within * longest, np.minimum(longest, lengths[pieces] - within * longest)


def batches(
    stream: TokenStream, conditions: np.ndarray, batch_tokens: int, *, longest: int | None
) -> list[dict[str, torch.Tensor]]:
    """Every clip as recorded, once, in batches of similar length; "clips" (b,) says which clips they are.

    Clips are cut into pieces of at most `longest` steps, unless that is None.
    """
    longest = longest or int(stream.lengths[0].max())
    pieces, offsets, lengths = split_long(stream.offsets[0], stream.lengths[0], longest)
    result = []
    for members, width in cut_batches(lengths, batch_tokens):
        batch = gather(stream, offsets[members], lengths[members], width)
        if conditions.shape[1]:
            batch["conditions"] = torch.from_numpy(conditions[pieces[members]])
        batch["clips"] = torch.from_numpy(pieces[members])
        result.append(batch)
    return result
