"""Linear models of k-mer counts: the baseline that a network has to beat (`dna train --baseline kmer`).

A sequence is described by how often each word of k bases occurs in it, divided by the number of its words of that
length, for several k. On these go scikit-learn's logistic regression (one for each label, of several) or ridge
regression (for numbers). Words with a base other than A, C, G, T do not count.

Read on both strands, a word and its reverse complement are one, so that both strands of a sequence get the same answer.
Counts add up, so a sequence of any length can be read in chunks.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from seqmodels.checkpoint import read_json, read_tensors, save_parts
from seqmodels.config import HeadConfig, Targets
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.datasets import training_data
from seqmodels.tasks.genomics.labelled import LabelledRecords
from seqmodels.tasks.genomics.tokens import PAD, TOKENIZER, A, Tokens

FORMAT = "longseq-kmers-1"
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of which validation data choose: scikit-learn's C


@dataclass(frozen=True, kw_only=True)
class KmerModelConfig:
    """What a linear model of k-mer counts is."""

    lengths: tuple[int, ...]
    "Word lengths k."
    both_strands: bool
    "Whether a word and its reverse complement are one."
    head: HeadConfig
    "Labels and what they are."
    tokenizer: dict[str, Any]
    "What token ids mean."

    @property
    def words(self) -> int:
        """Number of features."""
        return sum(4**k for k in self.lengths)


class Counted(NamedTuple):
    """What has been read so far."""

    recent: Tensor
    "(b, longest word - 1) last ids, -1 where there are none."
    sums: Tensor
    "(b, lengths, labels) float64: weights of the words so far, added up for each word length."
    counts: Tensor
    "(b, lengths) float64: words so far."


class KmerModel(nn.Module):
    """A linear model of word frequencies, with the interface of a SequenceClassifier that reads in chunks."""

    causal = True

    def __init__(self, config: KmerModelConfig) -> None:
        super().__init__()
        self.config = config
        outputs = len(config.head.labels)
        self.weight = nn.Parameter(torch.zeros(config.words, outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)

    @property
    def backbone(self) -> "KmerModel":
        """The model itself: there is nothing below its counts."""
        return self

    @property
    def both_strands(self) -> bool:
        """Whether a sequence and its reverse complement get the same answer."""
        return self.config.both_strands

    def forward(self, ids: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """ids (b, l) int64, right-padded where lengths (b,) says so -> logits, or numbers, (b, labels)."""
        return self.classify(self.read(ids, lengths=lengths))

    def read(self, ids: Tensor, state: Counted | None = None, *, lengths: Tensor | None = None) -> Counted:
        """The state after one more chunk, of which only the last may be padded."""
        past = max(self.config.lengths) - 1
        recent = ids.new_full((len(ids), past), -1) if state is None else state.recent
        if lengths is not None:
            ids = torch.where(torch.arange(ids.shape[1], device=ids.device) < lengths[:, None], ids, -1)
        ids = torch.cat([recent, ids], 1)
        sums, counts = [], []
        tables = self.weight.double().split([4**k for k in self.config.lengths])
        for k, table in zip(self.config.lengths, tables, strict=True):
            word, whole = _words(ids[:, past - k + 1 :], k)
            sums.append(F.embedding_bag(word, table, mode="sum", per_sample_weights=whole.double()))
            counts.append(whole.sum(1, dtype=torch.float64))
        added = torch.stack(sums, 1), torch.stack(counts, 1)
        sums, counts = added if state is None else (state.sums + added[0], state.counts + added[1])
        return Counted(ids[:, ids.shape[1] - past :], sums, counts)

    def classify(self, state: Counted) -> Tensor:
        """Logits, or numbers, (b, labels) of what has been read."""
        means = state.sums / state.counts.clamp(min=1)[..., None]
        return (means.sum(1) + self.bias.double()).to(self.weight.dtype)


def _words(ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Numbers (b, l - k + 1) of the words in ids (b, l), and which of them are of A, C, G and T."""
    digits = ids - A
    known = (digits >= 0) & (digits < 4)
    l = ids.shape[1] - k + 1
    if l <= 0:
        return ids[:, :0], known[:, :0]
    word, whole = torch.zeros_like(ids[:, :l]), torch.ones_like(known[:, :l])
    for j in range(k):
        word = word * 4 + digits[:, j : j + l]
        whole = whole & known[:, j : j + l]
    return torch.where(whole, word, 0), whole


def complement_of_words(k: int) -> NDArray[np.int64]:
    """For each word of k bases, as a number, that of its reverse complement."""
    digits = np.stack([np.arange(4**k) // 4**j % 4 for j in range(k)])  # last base first
    return ((3 - digits) * 4 ** np.arange(k - 1, -1, -1)[:, None]).sum(0)


def frequencies(sequences: list[Tokens], lengths: tuple[int, ...], both_strands: bool) -> Any:
    """Sparse word frequencies (n, words) of sequences; on both strands, a word stands at the smaller of its numbers."""
    from scipy.sparse import csr_array, hstack, vstack

    blocks = []
    for start in range(0, len(sequences), 4096):  # bounds the memory
        some = sequences[start : start + 4096]
        ids = np.concatenate([np.append(tokens, PAD) for tokens in some])  # no word spans two sequences
        row_of = np.repeat(np.arange(len(some)), [len(tokens) + 1 for tokens in some])
        parts = []
        for k in lengths:
            word, whole = (t[0].numpy() for t in _words(torch.from_numpy(ids).long()[None], k))
            found, rows = word[whole], row_of[: len(whole)][whole]
            found = np.minimum(found, complement_of_words(k)[found]) if both_strands else found
            values = 1 / np.bincount(rows, minlength=len(some))[rows]
            parts.append(csr_array((values, (rows, found)), shape=(len(some), 4**k)))
        blocks.append(hstack(parts, format="csr"))
    return vstack(blocks, format="csr")


def fit_kmers(
    records: LabelledRecords,
    validation: LabelledRecords | None,
    folder: Path,
    *,
    longest: int,
    both_strands: bool | None,
    class_weights: tuple[float, ...],
    validation_fraction: float,
    seed: int,
    card: str,
) -> LabelledRecords:
    """Fit the regression and write it to `folder`; gives the validation data, by whose loss its strength is chosen.

    Words have from 3 (or fewer) to `longest` bases. Frequencies are divided by their largest value in training. Whether
    both strands are read is chosen by the validation data, too, unless it is given.
    """
    if records.long:
        raise InputError("the k-mer regression learns from short records, not from windows of a folder of genomes")
    if not 1 <= longest <= 8:
        raise InputError(f"kmer is {longest}; the k-mer regression takes words of 1 to 8 bases")
    served = training_data(
        records, [], batch_tokens=1 << 20, validation_fraction=validation_fraction, validation_windows=1,
        augment=False, seed=seed, validation=validation,
    )  # fmt: skip
    own, held_out = records.take(served.training), served.held_out
    lengths = tuple(range(min(3, longest), longest + 1))
    fits = []
    for both in (False, True) if both_strands is None else (both_strands,):
        x, x_held = (frequencies(r.tokens, lengths, both) for r in (own, held_out))
        largest = np.maximum(x.max(axis=0).toarray().ravel(), 1e-12)
        x, x_held = (part.multiply(1 / largest).tocsr() for part in (x, x_held))
        for strength, weight, bias in _fits(x, own.labels, records.targets, class_weights):
            loss = _loss(x_held @ weight.T + bias, held_out.labels, records.targets)
            fits.append((loss, strength, both, weight / largest, bias))
    loss, strength, both, weight, bias = min(fits, key=lambda fit: fit[0])
    if not np.isfinite(loss):
        raise InputError("the k-mer regression found no finite solution; look at the data")
    if both:  # at every word what stands at the smaller of the two
        blocks = np.split(weight, np.cumsum([4**k for k in lengths])[:-1], axis=1)
        smaller = [np.minimum(np.arange(4**k), complement_of_words(k)) for k in lengths]
        weight = np.concatenate([block[:, at] for block, at in zip(blocks, smaller, strict=True)], axis=1)
    head = HeadConfig(task="sequence", labels=records.classes, targets=records.targets)
    model = KmerModel(KmerModelConfig(lengths=lengths, both_strands=both, head=head, tokenizer=TOKENIZER))
    model.weight.copy_(torch.from_numpy(weight.T))
    model.bias.copy_(torch.from_numpy(bias))
    save_kmers(model, folder, card=card, facts={"strength": strength, "validation_loss": loss})
    return held_out


def _fits(
    x: Any, labels: NDArray, targets: Targets, class_weights: tuple[float, ...]
) -> Iterator[tuple[float, NDArray[np.float64], NDArray[np.float64]]]:
    """Strengths, rising, each with weights (outputs, words) and biases (outputs,), found from those before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    columns = labels[:, None] if targets == "single" else labels
    models: list[Any] = []
    for k in range(columns.shape[1]):
        weights: dict[int, float] | None = dict(enumerate(class_weights)) or None
        if targets == "multi" and class_weights:
            weights = {0: 1.0, 1: class_weights[k]}
        models.append(
            Ridge() if targets == "regression" else
            LogisticRegression(max_iter=300, class_weight=weights, warm_start=True)
        )  # fmt: skip
    for strength in STRENGTHS:
        found = []
        for model, column in zip(models, columns.T, strict=True):
            known = ~np.isnan(column)
            if targets == "multi" and len(np.unique(column[known])) < 2:  # always there, or never
                found.append((np.zeros((1, x.shape[1])), np.full(1, 20.0 if column[known].any() else -20.0)))
                continue
            model.set_params(**{"alpha": 1 / strength} if targets == "regression" else {"C": strength})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early, which only makes it weaker
                model.fit(x[known], column[known])
            found.append((np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)))
        weight, bias = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if targets == "single" and len(weight) == 1:  # two classes: the logit of the second against the first
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        yield strength, weight, bias


def _loss(scores: NDArray[np.float64], labels: NDArray, targets: Targets) -> float:
    """Mean cross-entropy of logits (n, labels), or mean squared error in units of the variance."""
    if targets == "single":
        top = scores.max(1, keepdims=True)
        chosen = (scores - top)[np.arange(len(labels)), labels]
        return float(np.mean(np.log(np.exp(scores - top).sum(1)) - chosen))
    if targets == "multi":
        return float(np.nanmean(np.logaddexp(0, scores) - labels * scores))
    return float(np.nanmean(np.square(scores - labels) / np.maximum(np.nanvar(labels, axis=0), 1e-12)))


def save_kmers(model: KmerModel, folder: Path, *, card: str, facts: dict[str, Any]) -> Path:
    """Write a model's folder: config.json, model.safetensors and its card."""
    config = model.config
    about = {"lengths": list(config.lengths), "both_strands": config.both_strands, "labels": list(config.head.labels)}
    about |= {"targets": config.head.targets, "tokenizer": config.tokenizer, **facts}
    tensors = {"weight": model.weight.detach(), "bias": model.bias.detach()}
    return save_parts(folder, FORMAT, about, tensors, card)


def load_kmers(folder: str | Path) -> KmerModel:
    """The model that `save_kmers` wrote; an InputError names what stands in the way."""
    values = read_json(Path(folder) / "config.json").get("model", {})
    try:
        head = HeadConfig(task="sequence", labels=tuple(values["labels"]), targets=values["targets"])
        config = KmerModelConfig(
            lengths=tuple(values["lengths"]), both_strands=values["both_strands"], head=head,
            tokenizer=values["tokenizer"],
        )  # fmt: skip
        model = KmerModel(config)
        model.load_state_dict(read_tensors(Path(folder)))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder} is not a whole k-mer model ({reason}); train it again") from None
    return model.eval()
