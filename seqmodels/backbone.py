"""The shared backbone: pre-norm residual layers around mixers, with the state of every layer handed on.

Parameters are named as in state-spaces/mamba: embedding, layers.{i}.norm, layers.{i}.mixer, norm_f.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqmodels.config import BackboneConfig, ConditionConfig, KmerConfig, MixerConfig
from seqmodels.errors import InputError
from seqmodels.kernels.across import windows
from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.kernels.rms_norm import rms_norm
from seqmodels.mixers import (
    Mamba,
    Mamba2,
    OwnState,
    SSMState,
    build_mixer,
    hold_over_padding,
    is_causal,
    reorder,
    reversed_order,
)
from seqmodels.recompute import in_stretches


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, with the residual addition that precedes it."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
        """norm(x + residual) in x's dtype, and the sum."""
        if residual is None:
            residual = x.float() if residual_in_fp32 and x.dtype != torch.float64 else x
            return rms_norm(x, self.weight, epsilon=self.epsilon), residual
        return rms_norm(x, self.weight, residual=residual, epsilon=self.epsilon, residual_in_fp32=residual_in_fp32)


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with (y, gate) = fc1(x); parameters named as in state-spaces/mamba."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * F.silu(gate))


class Layer(nn.Module):
    """norm -> mixer (-> norm2 -> MLP), each added to the residual stream by the next norm."""

    def __init__(
        self, mixer: MixerConfig, d_model: int, *, mlp_expand: float, dropout: float, epsilon: float,
        residual_in_fp32: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = RMSNorm(d_model, epsilon)
        self.mixer = build_mixer(mixer, d_model)
        self.dropout = nn.Dropout(dropout)
        self.residual_in_fp32 = residual_in_fp32
        self.mlp: GatedMLP | None = None
        if mlp_expand:
            self.norm2 = RMSNorm(d_model, epsilon)
            self.mlp = GatedMLP(d_model, round(mlp_expand * d_model))

    def forward(
        self, x: Tensor, residual: Tensor | None, state: Any, lengths: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """(x, residual) -> (x, residual) with the layer's state."""
        if isinstance(state, OwnState) and x.shape[1] == 1 and lengths is None and seq_idx is None:
            before = None if residual is None else residual[:, 0]
            step: Any = self.mixer.step_layer
            x, residual = (t[:, None] for t in step(x[:, 0], before, self.norm, self.residual_in_fp32, state))
        else:
            x, residual = self.norm(x, residual, self.residual_in_fp32)
            x, state = self.mixer(x, state, lengths, seq_idx)
        return *self.after_mixer(x, residual), state

    def after_mixer(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the mixer: (x, residual) -> (x, residual)."""
        x = self.dropout(x)
        if self.mlp is not None:
            x, residual = self.norm2(x, residual, self.residual_in_fp32)
            x = self.dropout(self.mlp(x))
        return x, residual


class OwnStack:
    """The states of equal Mamba-2 layers on a CPU, which a step overwrites: of a decoder, which holds the only ones."""

    def __init__(self, stack: "Layers", states: Sequence[SSMState]) -> None:
        from seqmodels.kernels.mamba2_step import Mamba2Stack

        layers = [[layer.norm.weight, *layer.mixer.step_weights()] for layer in stack.layers]
        config = stack.layers[0].mixer.config
        self._compiled = Mamba2Stack(
            layers, stack.norm_f.weight, [state.conv for state in states], [state.ssm for state in states],
            groups=config.n_groups, norm_before_gate=config.norm_before_gate, layer_epsilon=stack.norm_f.epsilon,
            epsilon=config.norm_epsilon, dt_limit=config.dt_limit,
        )  # fmt: skip

    @staticmethod
    def takes(stack: "Layers", states: Any) -> bool:
        """Whether these layers, their weights as they are now, can run as one compiled function after these states."""
        layers: list[Any] = list(stack.layers)
        return (
            isinstance(states, tuple)
            and len(layers) > 0
            and all(isinstance(state, SSMState) for state in states)
            and all(isinstance(layer.mixer, Mamba2) and layer.mlp is None for layer in layers)
            and all(layer.mixer.config == layers[0].mixer.config for layer in layers)
            and all(layer.mixer.compiled_step_takes(layer.norm.weight[None], states[0]) for layer in layers)
            and not stack.training
        )

    def step(self, x: Tensor) -> Tensor:
        """x (b, 1, d) -> (b, 1, d)."""
        return self._compiled.step(x[:, 0])[:, None]

    def copy(self) -> tuple[SSMState, ...]:
        """The layers' states, each on its own."""
        both = zip(self._compiled.conv_states, self._compiled.states, strict=True)
        return tuple(SSMState(torch.from_numpy(conv.copy()), torch.from_numpy(ssm.copy())) for conv, ssm in both)


class Layers(nn.Module):
    """Layers of one width and a final norm."""

    def __init__(
        self, d_model: int, mixers: Sequence[MixerConfig], *, mlp_expand: float, dropout: float, epsilon: float,
        residual_in_fp32: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        options: dict[str, Any] = {"epsilon": epsilon, "residual_in_fp32": residual_in_fp32}
        self.layers = nn.ModuleList(
            Layer(mixer, d_model, mlp_expand=mlp_expand, dropout=dropout, **options) for mixer in mixers
        )
        self.norm_f = RMSNorm(d_model, epsilon)
        self.residual_in_fp32 = residual_in_fp32
        rescale_residual_projections(self)

    def read(
        self, x: Tensor, state: Any = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """(b, l, d) -> (b, l, d) and one state per layer (or an OwnStack, which a step overwrites)."""
        if isinstance(state, OwnStack):
            return state.step(x), state
        residual, states = None, []
        for i, layer in enumerate(self.layers):
            x, residual, layer_state = layer(x, residual, None if state is None else state[i], lengths, seq_idx)
            states.append(layer_state)
        return self.norm_f(x, residual, self.residual_in_fp32)[0], tuple(states)


class Conditions(nn.Module):
    """One embedding per condition (digit, speaker, ...), added to every position of a row.

    Each table has one more row than the condition has values: its last row means 'not given'.
    """

    def __init__(self, conditions: Sequence[ConditionConfig], d_model: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(len(c.values) + 1, d_model) for c in conditions)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)  # pyright: ignore

    def forward(self, x: Tensor, ids: "Tensor | Told | None") -> Tensor:
        """x (b, l, d) with the conditions added; ids (b, conditions) int64, or None when nothing is given."""
        if not self.tables:
            return x
        return x + (ids[self] if isinstance(ids, Told) else self.vector(ids)).to(x.dtype)

    def vector(self, ids: Tensor | None) -> Tensor:
        """What is added to every position: (b, 1, d), or (1, 1, d) when nothing is given."""
        given: list[Tensor] = []
        for i, table in enumerate(self.tables):
            last: Any = table.num_embeddings - 1  # pyright: ignore
            rows = torch.full((1,), last, device=table.weight.device) if ids is None else ids[:, i]  # pyright: ignore
            given.append(table(rows))
        return sum(given[1:], given[0])[:, None]


class Told(dict):
    """For each of a model's Conditions its vector for some rows, computed once for many steps: stands for their ids."""

    def __init__(self, model: nn.Module, ids: Tensor | None) -> None:
        found = (module for module in model.modules() if isinstance(module, Conditions) and module.tables)
        super().__init__((module, module.vector(ids)) for module in found)


class KmerEmbedding(nn.Module):
    """Embeddings of the k-mer that ends at each step: ids (b, l) -> (b, l, d), and the last k - 1 ids as state."""

    digits: Tensor
    complements: Tensor | None
    ranks: Any = None  # sequence_parallel.Ranks, where ranks share each sequence

    def __init__(self, config: KmerConfig, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.k, self.base, self.buckets = config.k, len(config.alphabet), config.buckets
        _check_words(config)
        digits = torch.full((vocab_size,), -1)
        digits[list(config.alphabet)] = torch.arange(self.base)
        self.register_buffer("digits", digits, persistent=False)
        complements = None
        if config.complement_map is not None:  # of each digit
            complements = digits[complement_of(config.complement_map, vocab_size)[list(config.alphabet)]]
            if (complements < 0).any():
                raise InputError("kmer.alphabet lacks the complement of a token in it; add that, or give no map")
        self.register_buffer("complements", complements, persistent=False)
        self.rows = config.buckets or self.base**self.k  # one more follows, for what is no word
        self.table = nn.Embedding(self.rows + 1, config.width)
        nn.init.normal_(self.table.weight, std=0.001)  # a word that training never shows adds next to nothing
        self.proj = nn.Linear(config.width, d_model, bias=False)

    def forward(
        self, ids: Tensor, recent: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """recent: (b, k - 1) ids before the first, -1 where there are none, as is meant by None."""
        past, l, after = self.k - 1, ids.shape[1], None
        if self.ranks is not None:
            exchange, first = self.ranks.exchange(lengths, seq_idx), None if recent is None else recent[..., None]
            _, *found = windows(exchange, ids[..., None], past, first, lengths, seq_idx, fill=-1)
            recent, after = (t[..., 0] for t in found)
        recent = ids.new_full((len(ids), past), -1) if recent is None else recent
        ids = torch.cat([recent, ids], 1)
        digits = torch.where(ids >= 0, self.digits[ids.clamp(min=0)], -1)
        run = None if seq_idx is None else F.pad(starts_of_sequences(seq_idx).cumsum(1), (past, 0))
        word, whole = torch.zeros_like(ids[:, past:]), torch.ones_like(ids[:, past:], dtype=torch.bool)
        other = None if self.complements is None else torch.zeros_like(word)  # the reverse complement
        for j in range(self.k):
            digit = digits[:, j : j + l]
            word = word * self.base + digit
            whole &= digit >= 0
            if other is not None:
                other += self.complements[digit] * self.base**j
            if run is not None:
                whole &= run[:, j : j + l] == run[:, past:]
        if other is not None:
            word = torch.minimum(word, other)
        if self.buckets is not None:
            word = hashed(word) % self.buckets
        word = torch.where(whole, word, self.rows)
        end = torch.full((len(ids), 1), l, device=ids.device) if lengths is None else lengths[:, None]
        last = end + torch.arange(past, device=ids.device)
        recent = ids.gather(1, last)
        if run is not None:  # what lies before the last sequence is not part of its words
            recent = torch.where(run.gather(1, last) == run.gather(1, end + past - 1), recent, -1)
        return self.proj(self.table(word)), recent if after is None else after


def hashed(words: Tensor) -> Tensor:
    """Integers spread over 0 ... 2**31 - 1, the same on every machine: Fibonacci hashing (Knuth, vol. 3, 6.4)."""
    return (words * -7046029254386353131 >> 32) & 0x7FFFFFFF  # 2**64 / the golden ratio, modulo 2**64


def _check_words(config: KmerConfig) -> None:
    """Words must fit into 63 bits, the table's rows into what the hash gives."""
    if config.buckets is not None and not 1 <= config.buckets < 2**31:
        raise InputError(f"kmer.buckets is {config.buckets}; expected 1 to {2**31 - 1}")
    if len(config.alphabet) ** config.k >= 2 ** (31 if config.buckets is None else 63):
        raise InputError(
            f"kmer.k is {config.k}: {len(config.alphabet)}**{config.k} words are too many for a "
            + ("table; give kmer.buckets to hash them, or a smaller k" if config.buckets is None else "hash of 63 bits")
        )


class BackboneState(NamedTuple):
    """What a flat backbone remembers."""

    recent: Tensor | None
    "(b, k - 1) last token ids, if it embeds k-mers."
    layers: tuple
    "State of each layer."


class Backbone(Layers):
    """A flat backbone: token ids (b, l) -> features (b, l, d).

    With `strands`, the reverse complements go through the same layers as b more rows, and features are (b, l, 2 d): of
    each base those of the strand as given, then those of the other strand. So the features of a reverse complement are
    the given ones, bases in reverse order and the two halves swapped (RC equivariance; Schiff et al., 2024, section 4).
    """

    complement: Tensor

    def __init__(self, config: BackboneConfig, vocab_size: int, conditions: Sequence[ConditionConfig] = ()) -> None:
        super().__init__(
            config.d_model, config.layers, mlp_expand=config.mlp_expand, dropout=config.dropout,
            epsilon=config.norm_epsilon, residual_in_fp32=config.residual_in_fp32,
        )  # fmt: skip
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.kmer = KmerEmbedding(config.kmer, vocab_size, config.d_model) if config.kmer else None
        self.conditions = Conditions(conditions, config.d_model)
        self.strands = config.strands
        if config.strands is not None:
            complement = complement_of(config.strands.complement_map, vocab_size)
            self.register_buffer("complement", complement, persistent=False)
        self.causal = config.strands is None and all(is_causal(mixer) for mixer in config.layers)

    @property
    def both_strands(self) -> bool:
        """Whether both strands are read now."""
        return self.strands is not None and (self.strands.training or not self.training)

    def forward(
        self,
        ids: Tensor,
        state: BackboneState | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, BackboneState]:
        """(b, l) -> (b, l, d) and the state after the last real step."""
        seq_idx = None if seq_idx is None else hold_over_padding(seq_idx, lengths)
        order = None
        if self.both_strands:
            if state is not None:
                raise InputError("a model of both strands sees the whole sequence; it cannot continue from a state")
            order = reversed_order(ids, lengths)
            ids = torch.cat([ids, self.complement[ids.gather(1, order)]])
            if seq_idx is not None:
                seq_idx = torch.cat([seq_idx, hold_over_padding(seq_idx.gather(1, order), lengths)])
            lengths = None if lengths is None else lengths.repeat(2)
            conditions = None if conditions is None else conditions.repeat(2, 1)
        x, recent = self.embed(ids, None if state is None else state.recent, lengths, seq_idx, conditions)
        x, layers = self.read(x, None if state is None else state.layers, lengths, seq_idx)
        if order is None:
            return x, BackboneState(recent, layers)
        given, other = x.chunk(2)
        return torch.cat([given, reorder(other, order)], -1), BackboneState(None, ())

    def embed(
        self, ids: Tensor, recent: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None,
        conditions: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What enters the first layer (b, l, d), and the last k - 1 ids if k-mers are embedded."""
        x = self.conditions(self.embedding(ids), conditions)
        if self.kmer is None:
            return x, None
        words, recent = self.kmer(ids, recent, lengths, seq_idx)
        return x + words, recent


def complement_of(given: Sequence[int], vocab_size: int) -> Tensor:
    """A complement map (vocabulary,) as a tensor."""
    if len(given) != vocab_size or any(not 0 <= c < vocab_size or given[c] != i for i, c in enumerate(given)):
        raise InputError(
            f"complement_map has {len(given)} ids for a vocabulary of {vocab_size}; give for each id that of its "
            "complement, whose complement it is in turn"
        )
    return torch.tensor(given)


def recompute_layers(model: nn.Module, tokens: int = 0) -> None:
    """From now on stacks of Mamba or Mamba-2 layers keep the activations of `tokens` steps (of all rows) at a time.

    With tokens = 0, as layers of another kind always, each layer keeps what enters it. See recompute.py.
    """
    for stack in model.modules():
        if not isinstance(stack, Layers):
            continue
        mixers = [layer.mixer for layer in stack.layers]
        if tokens and all(isinstance(mixer, (Mamba, Mamba2)) for mixer in mixers):
            stack.read = partial(in_stretches, stack.read, tokens, partial(_forgetful, mixers))
        else:
            for layer in stack.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@contextmanager
def _forgetful(mixers: list[Mamba | Mamba2]) -> Iterator[None]:
    """Gradients of what the mixers compute now compute again what is cheap."""
    if any(mixer.ranks is not None for mixer in mixers):
        raise ValueError("ranks that share a sequence hand on the whole's states; use recompute_layers with tokens=0")
    for mixer in mixers:
        mixer.forgetful = True
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.forgetful = False


def rescale_residual_projections(stack: Layers) -> None:
    """Divide the initial out_proj and fc2 by the square root of the number of residual additions (GPT-2)."""
    additions = sum(1 if layer.mlp is None else 2 for layer in stack.layers)  # pyright: ignore
    seen = set()
    for name, parameter in stack.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")) and id(parameter) not in seen:
            seen.add(id(parameter))
            with torch.no_grad():
                parameter.div_(math.sqrt(additions))
