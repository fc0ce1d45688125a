"""Codon usage: the baseline of models that tell coding bases from others (`dna train --baseline codons`).

How much likelier a word of one or two codons is in a reading frame than in what is not coding,

    w(word) = log P(word | in frame) - log P(word | background),

is added up over `2 half + 1` codons around each codon, as far as no stop codon lies between. Of the three frames of
each strand, a base has the best sum s; its logit against the background is slope * s + offset. A stop codon ends what
comes before it, and counts nothing itself.

The frames of the training data are not asked for but found: within each run of coding bases the longest stretches
without a stop codon, each base in one. Length of the words and `half` are those with the best loss on the validation
data, slope and offset a logistic regression on the training data. The standard genetic code is taken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seqmodels.checkpoint import read_json, read_tensors, save_parts
from seqmodels.config import HeadConfig
from seqmodels.errors import InputError
from seqmodels.heads import IGNORED
from seqmodels.tasks.genomics.annotation import BACKGROUND
from seqmodels.tasks.genomics.bases import LabelledBases
from seqmodels.tasks.genomics.genome import Stretch
from seqmodels.tasks.genomics.tokens import PAD, TOKENIZER, A, Tokens, encode, reverse_complement

FORMAT = "longseq-codons-1"
WORDS = (3, 6)
HALVES = (8, 16, 32, 64, 128)
_STOPS = tuple(int(np.dot(encode(stop).astype(np.int64) - A, (16, 4, 1))) for stop in (b"TAA", b"TAG", b"TGA"))
_SHORTEST = 30  # codons without a stop that make a frame in training
_SAMPLED = 500_000  # bases that slope and offset are fitted to, and chosen by, at most

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CodonModelConfig:
    """What a codon-usage model is."""

    word: int
    "Bases of a word: 3 or 6."
    half: int
    "Codons to each side that are added up."
    head: HeadConfig
    "The classes: one feature, or its two strands, and background."
    tokenizer: dict[str, Any]
    "What token ids mean."


class CodonModel(nn.Module):
    """Codon usage with the interface of a PositionClassifier that reads both directions.

    Nothing further away than `3 half + 6` bases matters to a base, so that windows with that context are exact.
    """

    causal = False
    both_strands = True

    def __init__(self, config: CodonModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(4**config.word, 1).requires_grad_(False)  # w
        self.line = nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)  # slope and offset

    @property
    def backbone(self) -> "CodonModel":
        """The model itself: its features are its logits."""
        return self

    def forward(self, ids: Tensor, *, lengths: Tensor | None = None, conditions: None = None) -> tuple[Tensor, None]:
        """ids (b, l) int64 -> logits (b, l, classes), and no state; padding is no base, and changes nothing."""
        weights, (slope, offset) = self.embedding.weight[:, 0].double().cpu().numpy(), self.line.double().tolist()
        rows = []
        for row in ids.cpu().numpy():
            best = strand_scores(row.astype(np.uint8), weights, self.config.half)
            rows.append(logits_of(slope * best + offset, self.config.head.labels))
        return torch.from_numpy(np.stack(rows)).float().to(ids.device), None

    def classify(self, x: Tensor) -> Tensor:
        """Logits of features: themselves."""
        return x


def words(tokens: Tokens, k: int) -> NDArray[np.int64]:
    """Number (l,) of the word of k bases that begins at each base, -1 where it has another token or ends outside."""
    digits = np.full(len(tokens) + k - 1, -1, dtype=np.int64)
    digits[: len(tokens)] = np.where((tokens >= A) & (tokens < A + 4), tokens.astype(np.int64) - A, -1)
    number, whole = np.zeros(len(tokens), dtype=np.int64), np.ones(len(tokens), dtype=bool)
    for j in range(k):
        number = 4 * number + digits[j : j + len(tokens)]
        whole &= digits[j : j + len(tokens)] >= 0
    return np.where(whole, number, -1)


def strand_scores(tokens: Tokens, weights: Floats, half: int) -> Floats:
    """Best sum (l, 2) of the frames around each base, on the given strand and on the other one."""
    return np.stack([_scores(tokens, weights, half), _scores(reverse_complement(tokens), weights, half)[::-1]], axis=1)


def _scores(tokens: Tokens, weights: Floats, half: int) -> Floats:
    """Best sum (l,) of the three frames of the strand in whose direction the tokens stand."""
    k, l = 3 if len(weights) == 64 else 6, len(tokens)
    tokens = np.pad(tokens, (3, 3 + -l % 3), constant_values=PAD)  # codons over the ends, too
    codons, found = words(tokens, 3), words(tokens, k)
    stop = np.isin(codons, _STOPS)
    x = np.where((found >= 0) & ~stop, weights[found], 0.0).reshape(-1, 3)  # (codons, frames)
    stop, places = stop.reshape(-1, 3), np.arange(len(x))[:, None]
    total = np.concatenate([np.zeros((1, 3)), x.cumsum(0)])
    last = np.maximum.accumulate(np.where(stop, places, -1), axis=0)  # stop at or before each codon
    before = np.concatenate([np.full((1, 3), -1), last[:-1]])
    after = np.minimum.accumulate(np.where(stop, places, len(x))[::-1], axis=0)[::-1]
    first, end = np.maximum(places - half, before + 1), np.minimum(places + half + 1, after)
    end = np.maximum(end, first)
    sums = (np.take_along_axis(total, end, 0) - np.take_along_axis(total, first, 0)).reshape(-1)
    return np.max([sums[3 - before : 3 - before + l] for before in range(3)], axis=0)  # where a base's codons begin


def logits_of(strands: Floats, labels: tuple[str, ...]) -> Floats:
    """Logits (l, classes) from those of coding (l, 2) on both strands: 0 for the background."""
    values = {BACKGROUND: np.zeros(len(strands)), "+": strands[:, 0], "-": strands[:, 1]}
    columns = [values.get(label, values.get(label[-1]) if len(labels) == 3 else None) for label in labels]
    return np.stack([strands.max(1) if column is None else column for column in columns], axis=1)


def fit_codons(records: LabelledBases, validation: LabelledBases, folder: Path, *, card: str) -> Path:
    """Fits a model, chosen by the validation data, and writes it."""
    labels = records.classes
    head = HeadConfig(task="position", labels=labels, complement=records.labels.complement)
    if len(labels) != (3 if head.complement else 2):
        raise InputError(
            f"--baseline codons tells one feature from the rest, and here are {', '.join(labels)}; name one"
        )
    own, held_out = _sampled(records), _sampled(validation)
    best: tuple[float, CodonModelConfig, Floats, Floats] | None = None
    for k in WORDS:
        weights = _log_odds(records, k)
        for half in HALVES:
            line = _line(*_scored(own, weights, half), labels)
            loss = _loss(line, *_scored(held_out, weights, half), labels)
            if best is None or loss < best[0]:
                best = loss, CodonModelConfig(word=k, half=half, head=head, tokenizer=TOKENIZER), weights, line
    assert best is not None
    loss, config, weights, line = best
    model = CodonModel(config)
    model.embedding.weight.copy_(torch.from_numpy(weights)[:, None])
    model.line.copy_(torch.from_numpy(line))
    return save_codons(model, folder, card=card, loss=loss)


Blocks = list[tuple[Tokens, NDArray[np.int64]]]


def _sampled(records: LabelledBases, size: int = 20_000) -> Blocks:
    """Tokens and labels of some stretches of `size` bases, evenly spaced, at most _SAMPLED bases in all."""
    parts = [Stretch(s.record, at, min(at + size, s.end)) for s in records.stretches
             for at in range(s.start, s.end, size)]  # fmt: skip
    return [records.of(parts[i]) for i in np.unique(np.linspace(0, len(parts) - 1, _SAMPLED // size).astype(int))]


def _scored(blocks: Blocks, weights: Floats, half: int) -> tuple[Floats, NDArray[np.int64]]:
    """Scores (n, 2) and labels (n,) of all labelled bases."""
    scores = np.concatenate([strand_scores(tokens, weights, half) for tokens, _ in blocks])
    labels = np.concatenate([labels for _, labels in blocks])
    return scores[labels != IGNORED], labels[labels != IGNORED]


def _line(scores: Floats, labels: NDArray[np.int64], classes: tuple[str, ...]) -> Floats:
    """Slope and offset (2,) with the best loss."""
    from scipy.optimize import minimize

    scale = max(float(np.abs(scores).max()), 1e-9)
    found = minimize(lambda line: _loss(line, scores / scale, labels, classes), np.array([1.0, 0.0]), method="BFGS")
    return found.x / (scale, 1)


def _loss(line: Floats, scores: Floats, labels: NDArray[np.int64], classes: tuple[str, ...]) -> float:
    """Mean cross-entropy."""
    logits = logits_of(line[0] * scores + line[1], classes)
    return float(np.mean(np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]))


def _log_odds(records: LabelledBases, k: int) -> Floats:
    """w (4**k,) from counts in the frames that are found in coding bases, and in all others on both strands."""
    background = records.classes.index(BACKGROUND)
    coding, other = (np.zeros(4**k) for _ in range(2))
    for tokens, labels in records.blocks():
        kinds = np.where(labels == IGNORED, IGNORED, labels == background)
        edges = np.flatnonzero(np.diff(kinds)) + 1
        for start, end in zip(np.append(0, edges), np.append(edges, len(labels)), strict=True):
            run = tokens[start:end]
            if labels[start] == IGNORED:
                continue
            if labels[start] == background:
                for strand in (run, reverse_complement(run)):
                    found = words(strand, k)
                    np.add.at(other, found[found >= 0], 1)
            else:
                coding += _counts_in_frame(run, k)
    shares = [(counts + 1) / (counts.sum() + len(counts)) for counts in (coding, other)]
    return np.log(shares[0]) - np.log(shares[1])


def _counts_in_frame(run: Tokens, k: int) -> Floats:
    """Counts (4**k,) of the words of k bases in the frames of a run of coding bases."""
    length, open_frames = len(run), []
    strands = run, reverse_complement(run)
    for strand, tokens in enumerate(strands):
        stop = np.isin(words(tokens, 3), _STOPS)
        for frame in range(3):
            codons = (length - frame) // 3
            stops = np.flatnonzero(stop[frame : frame + 3 * codons : 3])
            for first, end in zip(np.append(0, stops + 1), np.append(stops, codons), strict=True):
                if end - first >= _SHORTEST:
                    open_frames.append((int(end - first), strand, frame + 3 * int(first)))
    owner = np.full(length, -1)
    open_frames.sort()
    for i, (codons, strand, start) in enumerate(open_frames):  # the longest last
        place = slice(start, start + 3 * codons) if not strand else slice(length - start - 3 * codons, length - start)
        owner[place] = i
    counts = np.zeros(4**k)
    found = [words(tokens, k) for tokens in strands]
    for i, (codons, strand, start) in enumerate(open_frames):
        starts = np.arange(start, start + 3 * codons, 3)
        starts = starts[starts + k <= length]
        owned = owner if not strand else owner[::-1]
        own = starts[(owned[starts] == i) & (owned[starts + k - 1] == i)]
        word = found[strand][own]
        np.add.at(counts, word[word >= 0], 1)
    return counts


def save_codons(model: CodonModel, folder: Path, *, card: str, loss: float) -> Path:
    """Write a model's folder: config.json, model.safetensors and its card."""
    config = model.config
    head = {"task": "position", "labels": list(config.head.labels), "complement": list(config.head.complement)}
    about = {"word": config.word, "half": config.half, "head": head, "tokenizer": config.tokenizer}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save_parts(folder, FORMAT, about | {"validation_loss": loss}, tensors, card)


def load_codons(folder: str | Path) -> CodonModel:
    """The model that `save_codons` wrote; an InputError names what stands in the way."""
    values = read_json(Path(folder) / "config.json").get("model", {})
    try:
        about = values["head"]
        head = HeadConfig(task="position", labels=tuple(about["labels"]), complement=tuple(about["complement"]))
        config = CodonModelConfig(
            word=values["word"], half=values["half"], head=head, tokenizer=values["tokenizer"]
        )  # fmt: skip
        model = CodonModel(config)
        model.load_state_dict(read_tensors(Path(folder)))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder} is not a whole codon-usage model ({reason}); train it again") from None
    return model.eval()
