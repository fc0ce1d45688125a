"""Importance of bases: what a model's score becomes when they are exchanged, exactly and to first order.

Mutagenesis, exact: each base is exchanged for the three others, one at a time, and the model reads what has become of
the sequence. A model that reads in one direction goes on from its state before the base.

Gradient, to first order: what enters the layers is looked up for each base, and normalised; the gradient of the score
there, times the change that each exchange makes there. With embeddings of k-mers this is the gradient for a one-hot
sequence x (l, 4) whose words are looked up, embedded and normalised, as

    e[i] = sum over words w of  x[i - k + 1, w[1]] * ... * x[i, w[k]] * table[w],

so that all words with a base count. (Looked up before the norm, which changes direction from base to base, gradients
say little.) Only differences between the four bases of a place mean something, since a one-hot row adds up to 1
(Majdandzic et al., Genome Biology 24:109, 2023): here against the base that is there, as of mutagenesis; in the table
of `dna explain` against the mean of the four.

Importance of a base, either way: the score that it gives, minus the mean of the scores that the four bases give in its
place. With gradients that is gradient x input; of a model that is linear in what it looks up both are the same.

    explainer = Explainer("runs/mine/model", strand="both")
    changes = explainer.mutagenesis(encode(b"ACGTTGCA")).scores  # (8, 4, classes)
    importance(changes)                                          # (8, classes)
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from seqmodels.backbone import Backbone
from seqmodels.checkpoint import choose_device
from seqmodels.config import Targets
from seqmodels.errors import InputError
from seqmodels.heads import LanguageModel
from seqmodels.tasks.genomics.inference import Dtype, Strand, load, scores_of, sizes
from seqmodels.tasks.genomics.tokens import MASK, A, N, T, Tokens, reverse_complement

Method = Literal["mutagenesis", "gradient"]
Floats = NDArray[np.float64]


class Effects(NamedTuple):
    """What the exchange of each of n bases by A, C, G and T does, for k classes; NaN where there is N.

    Of a model that predicts bases there is one class, the log-likelihood.
    """

    given: Floats
    "(k,) probabilities, numbers or log-likelihood of the sequence as it is; NaN of a masked-token model."
    scores: Floats
    "(n, 4, k) change of the log-odds, number or log-likelihood; 0 for the base that is there."
    chances: Floats | None = None
    "(n, 4, k) change of the probability; None for gradients, and where there are no probabilities."


def importance(changes: Floats) -> Floats:
    """Importance (n, ...) of bases from the changes (n, 4, ...) of a score, which is 0 for the base that is there."""
    return -changes.mean(1)


def log_odds(logits: Tensor, targets: Targets) -> Tensor:
    """ln(p / (1 - p)) of each class, from logits (..., k); numbers as they are."""
    if targets != "single":
        return logits
    same = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits - logits[..., None, :].masked_fill(same, -torch.inf).logsumexp(-1)


def is_base(tokens: Tokens) -> NDArray[np.bool_]:
    """Which of tokens (...) are A, C, G or T."""
    return (tokens >= A) & (tokens <= T)


def _minus_given(values: Floats, bases: Tokens) -> Floats:
    """Changes (n, 4, k) at bases (n,), NaN at N, from the values (m, 4, k) with A, C, G, T at those that are no N."""
    known = is_base(bases)
    changes = np.full((len(bases), *values.shape[1:]), np.nan)
    changes[known] = values - values[np.arange(len(values)), bases[known] - A][:, None]
    return changes


class Explainer:
    """A classifier of DNA, or a model that predicts bases, with what exchanges of bases do to what it says.

    The tokens (l,) that its functions take are read whole; bases start .. end of them are explained.
    """

    def __init__(
        self, model: str, device: str = "auto", dtype: Dtype = "float32", *, strand: Strand = "fwd",
        batch_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self.device = model, choose_device(device)
        self.batch_tokens, _ = sizes(self.device.type, batch_tokens)
        self.model: Any = load(model).to(self.device, getattr(torch, dtype)).requires_grad_(False)
        head = self.model.config.head
        if self.model.config.tokenizer.get("type") != "dna" or head.task == "position":
            raise InputError(
                f"model {model} neither classifies DNA sequences nor predicts bases (head {head.task!r}, tokens "
                f"{self.model.config.tokenizer.get('type')!r}); give one made by 'longseq dna train' or dna pretrain"
            )
        self.task: str = head.task
        self.predicts_bases = head.task != "sequence"
        self.classes: tuple[str, ...] = ("log-likelihood",) if self.predicts_bases else head.labels
        self.targets: Targets = "regression" if self.predicts_bases else head.targets
        if self.targets == "single" and len(self.classes) < 2:
            raise InputError(f"model {model} knows only the class {self.classes[0]}; there is nothing to explain")
        self.causal: bool = self.model.causal
        self.backbone: Any = self.model.backbone
        if head.task == "next_token":
            self.model = Likelihood(self.model)
        turned = {"fwd": (False,), "rev": (True,), "both": (False, True)}[strand]
        self._turned = (False,) if self.backbone.both_strands else turned  # which readings are averaged

    def check_gradient(self) -> None:
        """An InputError if there is no gradient to go by."""
        if self.task == "masked_token":
            raise InputError(
                f"model {self.name} hides a base to tell how likely it is, so that no gradient reaches it; leave "
                "--method out: mutagenesis reads each base's sequence once"
            )
        if not isinstance(self.backbone, Backbone):
            raise InputError(f"model {self.name} counts words, which have no gradient; leave --method out")

    def longest(self, method: Method) -> int:
        """Bases of the longest sequence that can be explained."""
        return sys.maxsize if self.causal and method == "mutagenesis" else self.batch_tokens

    def numbers_of(self, labels: Sequence[str] | None) -> list[int]:
        """Numbers of the classes of these names."""
        labels = list(dict.fromkeys(labels or ()))
        if labels and self.predicts_bases:
            raise InputError(f"model {self.name} predicts bases and has no classes; leave --label out")
        for label in labels:
            if label not in self.classes:
                raise InputError(f"model {self.name} has no class {label!r}; its classes are {', '.join(self.classes)}")
        return [self.classes.index(label) for label in labels]

    def predicted(self, tokens: Tokens) -> list[int]:
        """The number of the class that is most likely; of a model of numbers or of bases, all there are."""
        if self.targets == "regression":
            return list(range(len(self.classes)))
        return [int(self.outputs(tokens).argmax())]

    @torch.inference_mode()
    def outputs(self, tokens: Tokens) -> Floats:
        """Logits, numbers or log-likelihood (k,) of a sequence, mean of the strands; not of a masked-token model."""
        return np.mean([self._read(reading[None])[0] for reading, _ in self._readings(tokens)], axis=0)

    @torch.inference_mode()
    def mutagenesis(
        self,
        tokens: Tokens,
        start: int = 0,
        end: int | None = None,
        classes: list[int] | None = None,
        advance: Callable[[float], Any] = lambda bases: None,
    ) -> Effects:
        """Effects of each exchange, as the model reads its sequence; `advance` is told of bases that are done."""
        places = start + np.flatnonzero(is_base(tokens[start:end]))
        readings = self._readings(tokens)
        own, found = [], []
        for reading, turned in readings:
            at = len(tokens) - 1 - places[::-1] if turned else places
            if self.task == "masked_token":
                values, before = self._hidden(reading, at, lambda n: advance(n / len(readings))), np.full(1, np.nan)
            else:
                before = self._read(reading[None])[0]
                values = self._exchanged(reading, at, before, lambda n: advance(n / len(readings)))
            own.append(before)
            found.append(values[::-1, ::-1] if turned else values)  # A, C, G, T backwards are their complements
        return self._effects(tokens[start:end], np.mean(own, axis=0), np.mean(found, axis=0), classes)

    def _effects(self, bases: Tokens, before: Floats, values: Floats, classes: list[int] | None) -> Effects:
        """Of outputs (k,) before and values (m, 4, k) after exchanges of those of bases (n,) that are no N."""
        chosen = slice(None) if classes is None else classes
        scores = log_odds(torch.from_numpy(values), self.targets).numpy()
        given = scores_of(before, self.targets)
        changes, chances = (_minus_given(x, bases)[..., chosen] for x in (scores, scores_of(values, self.targets)))
        return Effects(given[chosen], changes, None if self.targets == "regression" else chances)

    def gradient(
        self,
        tokens: Tokens,
        start: int = 0,
        end: int | None = None,
        classes: list[int] | None = None,
        advance: Callable[[float], Any] = lambda bases: None,
    ) -> Effects:
        """Effects of the same exchanges to first order in what is looked up for each base."""
        classes = list(range(len(self.classes))) if classes is None else classes
        bases = tokens[start:end]
        places = start + np.flatnonzero(is_base(bases))
        readings = self._readings(tokens)
        outputs, looked_up, texts = list[Tensor](), list[Tensor](), list[list[tuple[Tokens, bool]]]()
        values = np.zeros((len(places), 4, len(classes)))
        for reading, turned in readings:
            ids = self._ids(reading[None])
            with torch.enable_grad(), self._kept() as kept:
                outputs.append(self.model(ids)[0].double())
            looked_up += kept
            rows = [(reading, turned), (reverse_complement(reading), not turned)]  # the other strand, if it is read too
            texts += [rows[: len(x)] for x in kept]
            if self.predicts_bases:  # the base is predicted, too
                direct = self.model.log_p(ids)[0][0].cpu().numpy()[..., None]
                values += (direct[::-1, ::-1] if turned else direct)[places] / len(readings)
        mean = torch.stack(outputs).mean(0)
        odds = log_odds(mean, self.targets)
        slopes = [torch.autograd.grad(odds[number], looked_up, retain_graph=True) for number in classes]
        for i, rows in enumerate(texts):
            for row, (text, turned) in enumerate(rows):
                at = len(tokens) - 1 - places[::-1] if turned else places
                found = self._times_lookup(text, torch.stack([slope[i][row] for slope in slopes], -1), at)
                values += found[::-1, ::-1] if turned else found
        advance(len(places))
        return Effects(scores_of(mean.detach().cpu().numpy(), self.targets)[classes], _minus_given(values, bases))

    def _readings(self, tokens: Tokens) -> list[tuple[Tokens, bool]]:
        """What is read of a sequence, and whether it is the other strand."""
        return [(reverse_complement(tokens) if turned else tokens, turned) for turned in self._turned]

    def _ids(self, rows: Tokens) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device).long()

    def _read(self, rows: Tokens, state: Any = None) -> Floats:
        """Outputs (r, k) of sequences (r, l), or of what follows a state of one row."""
        if self.causal:
            logits = self.model.classify(self._advanced(rows, state))
        else:
            size = max(1, self.batch_tokens // rows.shape[1])
            logits = torch.cat([self.model(self._ids(rows[i : i + size])) for i in range(0, len(rows), size)])
        return logits.double().cpu().numpy()

    def _advanced(self, rows: Tokens, state: Any) -> Any:
        """The state of a causal model after rows (r, l), some steps at a time, from the state of one row."""
        if state is not None:
            state = tree_map(lambda t: t if t is None else t.repeat_interleave(len(rows), 0), state)
        steps = max(1, self.batch_tokens // len(rows))
        for i in range(0, rows.shape[1], steps):
            state = self.model.read(self._ids(rows[:, i : i + steps]), state)
        return state

    def _exchanged(
        self, tokens: Tokens, places: NDArray[np.int64], before: Floats, advance: Callable[[float], Any]
    ) -> Floats:
        """Outputs (m, 4, k) with A, C, G, T at each of m places; `before` (k,) of the sequence as it is."""
        values = np.tile(before, (len(places), 4, 1))
        others = np.array([[b for b in range(A, T + 1) if b != own] for own in tokens[places]], dtype=np.uint8)
        state, read, done = None, 0, 0
        while done < len(places):
            first = int(places[done]) if self.causal else 0  # before it nothing changes
            if first > read:
                state, read = self._advanced(tokens[None, read:first], state), first
            size = max(1, self.batch_tokens // (3 * (len(tokens) - first)))
            here, new = places[done : done + size], others[done : done + size]
            rows = np.tile(tokens[first:], (new.size, 1))
            rows[np.arange(new.size), np.repeat(here - first, 3)] = new.ravel()
            found = self._read(rows, state).reshape(*new.shape, -1)
            values[np.arange(done, done + len(here))[:, None], new - A] = found
            done += len(here)
            advance(len(here))
        return values

    def _hidden(self, tokens: Tokens, places: NDArray[np.int64], advance: Callable[[float], Any]) -> Floats:
        """log p (m, 4, 1) of A, C, G, T at each of m places, given all other bases."""
        values, size = np.zeros((len(places), 4, 1)), max(1, self.batch_tokens // len(tokens))
        for done in range(0, len(places), size):
            here = places[done : done + size]
            rows, at = np.tile(tokens, (len(here), 1)), np.arange(len(here))
            rows[at, here] = MASK
            x, _ = self.backbone(self._ids(rows))
            values[done + at, :, 0] = log_p_of_bases(self.model.logits(x[at, here])).cpu().numpy()
            advance(len(here))
        return values

    @property
    def _first_norm(self) -> Any:
        """What meets the embedding first."""
        return self.backbone.layers[0].norm if len(self.backbone.layers) else self.backbone.norm_f

    @contextmanager
    def _kept(self) -> Iterator[list[Tensor]]:
        """What enters the layers meanwhile (b, l, 2 d), to be derived by: normalised, and as it is."""
        kept = list[Tensor]()

        def keep(_: Any, __: Any, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, residual = found
            kept.append(torch.cat([x.to(residual.dtype), residual], -1).detach().requires_grad_())
            new, new_residual = kept[-1].chunk(2, -1)
            return new.to(x.dtype), new_residual

        hook = self._first_norm.register_forward_hook(keep)
        try:
            yield kept
        finally:
            hook.remove()

    @torch.no_grad()
    def _times_lookup(self, tokens: Tokens, slopes: Tensor, places: NDArray[np.int64]) -> Floats:
        """slopes (l, 2 d, k) times what enters the layers with A, C, G, T at each of m places: (m, 4, k).

        Only what the place has a part in is added up: its own step, and those of the k-mers with it.
        """
        reach = 0 if self.backbone.kmer is None else self.backbone.kmer.k - 1
        ids = F.pad(self._ids(tokens), (reach, reach), value=N)  # no k-mers beyond the ends, as in the sequence
        slopes = F.pad(slopes.double(), (0, 0, 0, 0, 0, reach))
        around = torch.arange(2 * reach + 1, device=ids.device)
        result = [np.zeros((0, 4, slopes.shape[-1]))]
        size = max(1, self.batch_tokens // (4 * len(around)))
        for here in torch.from_numpy(places.copy()).to(ids.device)[:, None].split(size):
            windows = ids[here + around][:, None].repeat(1, 4, 1)
            windows[:, :, reach] = torch.arange(A, T + 1, device=ids.device)
            x, _ = self.backbone.embed(windows.flatten(0, 1), None, None, None, None)
            both = torch.cat(self._first_norm(x[:, reach:].contiguous(), None, self.backbone.residual_in_fp32), -1)
            both = both.unflatten(0, (-1, 4)).double()
            result.append(torch.einsum("mbrd,mrdk->mbk", both, slopes[here + around[: reach + 1]]).cpu().numpy())
        return np.concatenate(result)


def log_p_of_bases(logits: Tensor) -> Tensor:
    """log p (..., 4) of A, C, G, T among the four, float64, from logits (..., vocabulary)."""
    return logits[..., A : T + 1].double().log_softmax(-1)


class Said(NamedTuple):
    """What a Likelihood has read so far."""

    inner: Any
    "State of the model."
    following: Tensor
    "(b, 4) log p of A, C, G, T coming next."
    total: Tensor
    "(b,) log-likelihood so far."


class Likelihood:
    """A next-token model as one that reads in chunks and gives one number, as a SequenceClassifier of one class does.

    That is the sum of log p(base | those before it) of all bases but the first; of N, too, nothing is said.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (b, l) -> (b, 1)."""
        return self.classify(self.read(ids))

    def read(self, ids: Tensor, state: Said | None = None) -> Said:
        """The state after ids (b, l)."""
        log_p, following, inner = self.log_p(ids, state)
        said = log_p.gather(-1, (ids - A).clamp(0, 3)[..., None])[..., 0] * ((ids >= A) & (ids <= T))
        return Said(inner, following, said.sum(1) + (0 if state is None else state.total))

    def classify(self, state: Said) -> Tensor:
        """(b, 1)"""
        return state.total[:, None]

    def log_p(self, ids: Tensor, state: Said | None = None) -> tuple[Tensor, Tensor, Any]:
        """log p of A, C, G, T at each place (b, l, 4), 0 at the first of all, and coming next (b, 4); the new state."""
        logits, inner = self._model(ids, None if state is None else state.inner)
        log_p = log_p_of_bases(logits)
        first = torch.zeros_like(log_p[:, 0]) if state is None else state.following
        return torch.cat([first[:, None], log_p[:, :-1]], 1), log_p[:, -1], inner
