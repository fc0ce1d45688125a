"""Models: a backbone and a head. Next or masked token, one label per sequence, one label per position."""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.backbone import Backbone
from seqmodels.config import ModelConfig, MultiscaleConfig
from seqmodels.errors import InputError
from seqmodels.multiscale import Multiscale

LOGITS = 1 << 23  # more logits than that are never held at once while training: 32 MiB in float32
IGNORED = -100  # targets that do not count, as in torch.nn.functional.cross_entropy


def build(config: ModelConfig, seed: int | None = None) -> "LanguageModel | SequenceClassifier | PositionClassifier":
    """A freshly initialised model; with a seed, always the same one."""
    kinds = {"sequence": SequenceClassifier, "position": PositionClassifier}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return kinds.get(config.head.task, LanguageModel)(config)


class Model(nn.Module):
    """What the three kinds of model share."""

    ranks: Any = None  # sequence_parallel.Ranks, where ranks share each sequence
    skip_ignored = True  # no logits of ignored targets, of long batches; to count them is to wait for the GPU

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kind: Any = Multiscale if isinstance(config.backbone, MultiscaleConfig) else Backbone
        self.backbone = kind(config.backbone, config.vocab_size, config.conditions)
        strands = None if isinstance(config.backbone, MultiscaleConfig) else config.backbone.strands
        if config.head.task == "next_token" and not self.causal:
            raise InputError(
                "a next-token model needs causal mixers and one strand; use task 'masked_token', or drop "
                "'Bidirectional' and strands"
            )
        if config.head.task == "masked_token" and strands is not None and not strands.training:
            raise InputError("a masked-token model reads both strands in training too, or one; set strands.training")
        if config.head.task in ("sequence", "position") and not config.head.labels:
            raise InputError(f"a {config.head.task} head needs labels; list the class names in head.labels")

    @property
    def causal(self) -> bool:
        """Whether the model can read a sequence in chunks, handing its state on."""
        return self.backbone.causal

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding.weight.device

    def mean_of_strands(self, x: Tensor) -> Tensor:
        """(..., d), of features (..., d), or (..., 2 d) of both strands: what a linear head needs to average logits."""
        return x.unflatten(-1, (2, -1)).mean(-2) if self.backbone.both_strands else x

    def terms(self, batch: dict[str, Tensor]) -> Tensor:
        """Over how many terms the loss of a batch is a mean: its weight beside other batches."""
        counted = batch["targets"] != IGNORED
        terms = (counted * batch["weights"] if "weights" in batch else counted).sum()
        return terms if self.ranks is None else self.ranks.total(terms)


class LanguageModel(Model):
    """Next-token or masked-token logits at every position.

    Of a model of both strands, a token's logit adds to its own on the given strand that of its complement on the other,
    so that the logits of a reverse complement are the given ones, reversed and complemented.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.backbone.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        ids: Tensor,
        state: tuple | None = None,
        *,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, tuple]:
        """ids (b, l) int64 -> logits (b, l, vocabulary), and the state to hand to the next call.

        conditions: (b, n) int64, one id per entry of config.conditions; len(values) means 'not given', as does None.
        """
        x, state = self.backbone(ids, state, lengths, seq_idx, conditions)
        return self.logits(x), state

    def logits(self, x: Tensor) -> Tensor:
        """(..., vocabulary) of features of the backbone."""
        return F.linear(x, self._weight())

    def _weight(self) -> Tensor:
        """(vocabulary, d), or (vocabulary, 2 d) for features of both strands."""
        weight = self.lm_head.weight
        return torch.cat([weight, weight[self.backbone.complement]], 1) if self.backbone.both_strands else weight

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats over targets that are not -100, and {bits, count}.

        With `weights` (b, l) in the batch, a mean weighted by them; count is then their sum.
        """
        return self.loss_from(batch, None)[:2]

    def loss_from(self, batch: dict[str, Tensor], state: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """The loss of sequences that go on from a state, its metrics, and the state after them."""
        x, state = self.backbone(
            batch["ids"], state, batch.get("lengths"), batch.get("seq_idx"), batch.get("conditions")
        )
        weights = batch.get("weights")
        loss, _, count = _cross_entropy(
            x, self._weight(), None, batch["targets"], self.ranks, weights, skip=self.skip_ignored
        )
        return loss, {"bits": loss.detach() / math.log(2), "count": count}, state


class Pooled(NamedTuple):
    """What a sequence classifier has read so far."""

    backbone: tuple
    "State of the backbone."
    summary: Tensor
    "(b, d) float64: sum, maximum or last of the features so far; (b, 2 d) of both strands."
    count: Tensor
    "(b,) int64: real positions so far."


class SequenceClassifier(Model):
    """One label, several, or numbers per sequence; a causal model can read a sequence of any length in chunks.

    What it gives of a sequence, called logits: those of a softmax over the classes, those of a sigmoid for each class
    (targets 'multi'), or the numbers themselves ('regression').
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        head = config.head
        for name, given in (("class_weights", head.class_weights), ("scale", head.scale)):
            if given and len(given) != len(head.labels):
                raise InputError(f"head.{name} has {len(given)} entries for {len(head.labels)} labels; give one each")
        if head.class_weights and head.targets == "regression":
            raise InputError("head.class_weights are for classes, not for a regression; leave them out")
        self.dropout = nn.Dropout(config.head.dropout)
        self.score = nn.Linear(config.backbone.d_model, len(config.head.labels))

    def forward(
        self,
        ids: Tensor,
        *,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """ids (b, l) int64, right-padded where lengths (b,) says so -> logits (b, classes).

        seq_idx (b, l) int64 says that rows hold several sequences: the number of each step's, 0, 1, ... along the row.
        Then logits are (b, m, classes) for the m sequences of the fullest row; those that a row lacks mean nothing.
        """
        x, _ = self.backbone(ids, None, lengths, seq_idx, conditions)
        if seq_idx is None:
            return self._in_units(self._score(*self._summarise(x, lengths)))
        most = seq_idx.max() + 1
        most = int(most if self.ranks is None else self.ranks.gather(most).max())
        scores = self._in_units(self._score(*self._summarise(x, lengths, seq_idx, most)))
        return scores.unflatten(0, (len(ids), most))

    def read(self, ids: Tensor, state: Pooled | None = None, *, lengths: Tensor | None = None) -> Pooled:
        """The state after reading one more chunk; `classify(state)` gives what one pass would have given.

        Only a batch's last chunk may be padded (a row that has ended earlier passes lengths 0 where the backbone is
        flat).
        """
        if not self.causal:
            raise InputError(
                "this model reads both directions or strands and cannot read in chunks; use forward, or see "
                "seqmodels/sweeps.py"
            )
        x, inner = self.backbone(ids, None if state is None else state.backbone, lengths)
        return self._pool(state, inner, x, lengths)

    def pool(self, features: Iterable[Tensor]) -> Pooled:
        """The state after features (b, l, d) that come stretch by stretch, from left to right (seqmodels/sweeps.py)."""
        state = None
        for x in features:
            state = self._pool(state, (), x, None)
        if state is None:
            raise InputError("there is nothing to pool: the sequence is empty")
        return state

    def _pool(self, state: Pooled | None, inner: tuple, x: Tensor, lengths: Tensor | None) -> Pooled:
        """The state with the features of one more stretch."""
        summary, count = self._summarise(x, lengths)
        if state is not None:
            pool = self.config.head.pool
            if pool in ("mean", "sqrt"):
                summary = state.summary + summary
            elif pool == "max":
                summary = torch.maximum(state.summary, summary)
            else:
                later = torch.where((count > 0)[:, None], summary, state.summary)
                if self.backbone.both_strands:  # the other strand's last step is the first
                    earlier = torch.where((state.count > 0)[:, None], state.summary, summary)
                    later = torch.cat([later.chunk(2, -1)[0], earlier.chunk(2, -1)[1]], -1)
                summary = later
            count = state.count + count
        return Pooled(inner, summary, count)

    def classify(self, state: Pooled) -> Tensor:
        """Logits (b, classes) for what has been read."""
        return self._in_units(self._score(state.summary, state.count))

    def _summarise(
        self, x: Tensor, lengths: Tensor | None, seq_idx: Tensor | None = None, most: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Summary (b, d) and number (b,) of the real positions of x (b, l, d), of all ranks together.

        With seq_idx, of each of `most` sequences of each row: (b * most, d) and (b * most,).
        """
        if seq_idx is None:
            summary, count = self._summarise_own(x, lengths)
        else:
            summary, count = self._summarise_packed(x, lengths, seq_idx, most)
        if self.ranks is None:
            return summary, count
        summaries, counts = self.ranks.gather(summary), self.ranks.gather(count)
        if (pool := self.config.head.pool) == "last":  # of the last stretch that is not all padding
            steps = torch.arange(1, len(counts) + 1, device=x.device)[:, None]
            last = ((counts > 0) * steps).argmax(0)
            return summaries.gather(0, last[None, :, None].expand(1, *summary.shape))[0], counts.sum(0)
        return summaries.amax(0) if pool == "max" else summaries.sum(0), counts.sum(0)

    def _summarise_own(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        b, l, _ = x.shape
        count = torch.full((b,), l, device=x.device) if lengths is None else lengths
        pool = self.config.head.pool
        if pool == "last":
            last = (count - 1).clamp(min=0)[:, None]
            return self._last(x, torch.zeros_like(last), last)[:, 0].double(), count
        if lengths is None:
            return (x.amax(1).double() if pool == "max" else x.sum(1, dtype=_wide_dtype(x)).double()), count
        real = (torch.arange(l, device=x.device) < lengths[:, None])[..., None]
        if pool != "max":
            return (x * real).sum(1, dtype=_wide_dtype(x)).double(), count
        return x.masked_fill(~real, -math.inf).amax(1).double(), count

    def _summarise_packed(self, x: Tensor, lengths: Tensor | None, seq_idx: Tensor, most: int) -> tuple[Tensor, Tensor]:
        b, l, d = x.shape
        if lengths is not None:  # padding as one more sequence, dropped below
            seq_idx = torch.where(torch.arange(l, device=x.device) < lengths[:, None], seq_idx, most)
        count = seq_idx.new_zeros(b, most + 1, dtype=torch.long)
        count.scatter_add_(1, seq_idx.long(), torch.ones_like(seq_idx, dtype=torch.long))
        if (pool := self.config.head.pool) == "last":
            ends = count.cumsum(1)
            summary = self._last(x, (ends - count).clamp(max=l - 1), (ends - 1).clamp(min=0))
        else:
            summary = torch.segment_reduce(
                x.flatten(0, 1).to(_wide_dtype(x)), "max" if pool == "max" else "sum", lengths=count.flatten(), axis=0,
                unsafe=True,  # without checks, which would wait for a GPU
            ).view(b, most + 1, d)  # fmt: skip
        return summary[:, :most].flatten(0, 1).double(), count[:, :most].flatten()

    def _last(self, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Features (b, m, d) of x (b, l, d) where sequences end, whose first and last steps are (b, m).

        The other strand, if x has both, ends at the first.
        """
        first, last = (at[..., None].expand(-1, -1, x.shape[2]) for at in (first, last))
        if not self.backbone.both_strands:
            return x.gather(1, last)
        return torch.cat([x.gather(1, last).chunk(2, -1)[0], x.gather(1, first).chunk(2, -1)[1]], -1)

    def _score(self, summary: Tensor, count: Tensor) -> Tensor:
        if (pool := self.config.head.pool) in ("mean", "sqrt"):
            count = count.clamp(min=1)[:, None]
            summary = summary / (count if pool == "mean" else count.sqrt())
        elif pool == "max":
            summary = summary.masked_fill((count == 0)[:, None], 0)
        weight = self.score.weight
        return self.score(self.dropout(self.mean_of_strands(summary).to(weight.dtype)))

    def _in_units(self, scores: Tensor) -> Tensor:
        """Scores (n, labels) as numbers in the units of what is predicted, in a regression."""
        if not self.config.head.scale:
            return scores
        mean, deviation = _constant(self.config.head.scale, _wide_dtype(scores), scores.device).T
        return scores * deviation + mean

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over sequences, and {accuracy, count} ({count} in a regression).

        Targets are ids (b,), or (b, m) for rows packed by seq_idx, of up to m sequences: IGNORED where a row has fewer.
        With targets 'multi' and 'regression' they are (b, labels) or (b, m, labels), NaN where nothing is known. The
        loss of a sequence is cross-entropy in nats, its mean over the known labels (0 or 1 each), or the mean squared
        error in units of the standard deviations of head.scale.

        With `supervise_every`, training averages it over prefixes of each sequence, and the whole of it: one long
        sequence then teaches every length up to its own.
        """
        targets, lengths, seq_idx = batch["targets"], batch.get("lengths"), batch.get("seq_idx")
        x, _ = self.backbone(batch["ids"], None, lengths, seq_idx, batch.get("conditions"))
        scores = self._score(*self._summarise(x, lengths, seq_idx, 1 if seq_idx is None else targets.shape[1]))
        targets = targets.flatten(0, 1) if seq_idx is not None else targets
        known = self._known(targets)
        count = known.sum()
        errors, right = self._errors(scores, targets)
        loss = errors.sum() / count.clamp(min=1)
        read = self._supervised(batch)
        if prefixes := read.shape[1]:
            every = self.config.head.supervise_every
            sums = x[:, : prefixes * every].unflatten(1, (prefixes, every)).sum(2, dtype=torch.float32).cumsum(1)
            ends = every * torch.arange(1, prefixes + 1, device=x.device)
            before = self._score(sums.flatten(0, 1), ends.repeat(len(x)))
            losses, _ = self._errors(before, targets.repeat_interleave(prefixes, dim=0))
            loss = (loss * len(x) + (losses.view_as(read) * read).sum()) / (len(x) + read.sum())
        if self.ranks is not None:  # all have the same loss; together they have its gradient once
            loss = self.ranks.whole(loss / self.ranks.size)
        accuracy = {} if right is None else {"accuracy": right.sum() / count.clamp(min=1)}
        return loss, {**accuracy, "count": count}

    def _known(self, targets: Tensor) -> Tensor:
        """(..., ) bool: which sequences have a label."""
        return ~targets.isnan().all(-1) if targets.is_floating_point() else targets != IGNORED

    def _errors(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss (n,) of each sequence from scores (n, labels), 0 where nothing is known, and how much of it is right."""
        head, scores = self.config.head, scores.to(_wide_dtype(scores))
        weights = _constant(head.class_weights, scores.dtype, scores.device) if head.class_weights else None
        if head.targets == "single":
            errors = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
            if weights is not None:
                errors = errors * weights[targets.clamp(min=0)]
            return errors, scores.detach().argmax(-1) == targets
        known = ~targets.isnan()
        targets = targets.nan_to_num().to(scores.dtype)
        if head.targets == "multi":
            errors = F.binary_cross_entropy_with_logits(scores, targets, pos_weight=weights, reduction="none")
            right = (scores.detach() > 0) == (targets > 0.5)
        else:
            mean, deviation = _constant(head.scale, scores.dtype, scores.device).T if head.scale else (0.0, 1.0)
            errors, right = (scores - (targets - mean) / deviation).square(), None
        labels = known.sum(-1).clamp(min=1)
        return (errors * known).sum(-1) / labels, None if right is None else (right & known).sum(-1) / labels

    def terms(self, batch: dict[str, Tensor]) -> Tensor:
        """Sequences, and the prefixes of them that are supervised too."""
        return self._known(batch["targets"]).sum() + self._supervised(batch).sum()

    def _supervised(self, batch: dict[str, Tensor]) -> Tensor:
        """(b, prefixes) bool: which prefixes of the padded rows are real, and classified too while training."""
        ids, lengths, every = batch["ids"], batch.get("lengths"), self.config.head.supervise_every
        summed = self.config.head.pool in ("mean", "sqrt")
        prefixes = ids.shape[1] // every if every and self.training and summed else 0
        if prefixes and "seq_idx" in batch:
            raise InputError(
                "supervised prefixes need a row for each sequence; set head.supervise_every=0 or do not pack"
            )
        ends = torch.arange(1, prefixes + 1, device=ids.device) * every
        return (ends <= (ids.shape[1] if lengths is None else lengths[:, None])).expand(len(ids), -1)


class PositionClassifier(Model):
    """One label per position.

    Of a model of both strands, logits are the mean of those of the given strand and of those that the other strand's
    features give the label's complement there: the logits of a reverse complement are the given ones, reversed, with
    labels and their complements exchanged.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        given, labels = config.head.complement, range(len(config.head.labels))
        if given and [given[i] if i in labels else None for i in given] != list(labels):
            raise InputError(
                f"head.complement is {given} for {len(labels)} labels; give each label's complement, whose complement "
                "it is in turn"
            )
        self.dropout = nn.Dropout(config.head.dropout)
        self.score = nn.Linear(config.backbone.d_model, len(config.head.labels))

    def forward(
        self,
        ids: Tensor,
        state: tuple | None = None,
        *,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, tuple]:
        """ids (b, l) int64 -> logits (b, l, classes), and the state to hand to the next call."""
        x, state = self.backbone(ids, state, lengths, seq_idx)
        return self.classify(x), state

    def classify(self, x: Tensor) -> Tensor:
        """Logits (..., classes) of features of the backbone."""
        return F.linear(*self._linear(x))

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a linear map makes logits of: features (..., d) or (..., 2 d), weight, bias."""
        weight, bias, complement = self.score.weight, self.score.bias, list(self.config.head.complement)
        if not self.backbone.both_strands or not complement:
            return self.dropout(self.mean_of_strands(x)), weight, bias
        weight = torch.cat([weight, weight[complement]], 1) / 2
        return self.dropout(x), weight, (bias + bias[complement]) / 2

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats over targets that are not -100, and {accuracy, count}.

        With `weights` (b, l) in the batch, a mean weighted by them; count is then their sum.
        """
        x, _ = self.backbone(batch["ids"], None, batch.get("lengths"), batch.get("seq_idx"))
        targets, weights = batch["targets"], batch.get("weights")
        loss, right, count = _cross_entropy(*self._linear(x), targets, self.ranks, weights, skip=self.skip_ignored)
        counted = (targets != IGNORED).sum()
        counted = counted if self.ranks is None else self.ranks.total(counted)
        return loss, {"accuracy": right / counted.clamp(min=1), "count": count}


def _cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ranks: Any, weights: Tensor | None = None, *,
    skip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean over targets (b, l) that count (0 where none does) of features (b, l, d); how many are right, and count.

    With weights (b, l) the mean is weighted, and count their sum. With skip, of many the others get no logits.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    counted = targets != IGNORED
    weights = None if weights is None else weights.flatten() * counted
    count = counted.sum() if weights is None else weights.sum()
    if len(targets) * len(weight) > LOGITS:
        if skip and len(asked := counted.nonzero().flatten()) < len(targets):
            x, targets = x.index_select(0, asked), targets[asked]
            weights = None if weights is None else weights[asked]
        total, right = _ChunkedCrossEntropy.apply(x, weight, bias, targets, weights)
    else:
        logits = F.linear(x, weight, bias)
        logits = logits.to(_wide_dtype(logits))
        total = _summed_cross_entropy(logits, targets, weights)
        right = (logits.detach().argmax(-1) == targets).sum()
    least = 1 if weights is None else torch.finfo(count.dtype).tiny
    if ranks is None:
        return total / count.clamp(min=least), right, count
    count = ranks.total(count)
    return ranks.whole(total / count.clamp(min=least)), ranks.total(right), count


def _summed_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return (F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none") * weights).sum()


@lru_cache(maxsize=64)
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, brought to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for such a tensor."""
    return torch.promote_types(x.dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of x (l, d) @ weight (v, d)^T + bias, and how many targets (l,) have the largest logit.

    Each target counts weights (l,) times, if there are any; they get no gradient.

    The logits exist for LOGITS / v positions at a time, forward and again backward, where softmax(logits) - onehot is
    their gradient. Products are taken in autocast's type, sums over positions in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.save_for_backward(x, weight, bias, targets, weights)
        total = torch.zeros((), dtype=_wide_dtype(x), device=x.device)
        right = torch.zeros((), dtype=torch.int64, device=x.device)
        for logits, part in _logits_in_chunks(x, weight, bias, ctx.dtype):
            total += _summed_cross_entropy(logits, targets[part], None if weights is None else weights[part])
            right += (logits.argmax(-1) == targets[part]).sum()
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight, bias, targets, weights = ctx.saved_tensors
        narrow = weight.to(ctx.dtype)
        exact = _wide_dtype(narrow)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=exact)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        for logits, part in _logits_in_chunks(x, weight, bias, ctx.dtype):
            counts = (targets[part] != IGNORED)[:, None]
            dlogits = logits.softmax(-1)
            dlogits.scatter_add_(1, targets[part, None].clamp(min=0), -counts.to(exact))
            dlogits *= counts * dtotal if weights is None else weights[part, None] * dtotal
            dx[part] = dlogits.to(ctx.dtype) @ narrow
            dweight.addmm_(dlogits.T, x[part].to(exact))
            if dbias is not None:
                dbias += dlogits.sum(0)
        return dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype), None, None


def _logits_in_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, slice]]:
    """Logits (positions, v), at least float32, of one stretch of positions after the other, and the stretch."""
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    size = max(1, LOGITS // len(weight))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        logits = F.linear(x[part].to(dtype), weight, bias)
        yield logits.to(_wide_dtype(logits)), part
