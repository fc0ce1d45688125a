"""A classifier at work on tokens: batches of short records, and records of any length in chunks."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.tokens import Tokens, pad_right

Logits = NDArray[np.float32]
Dtype = Literal["float32", "bfloat16"]


class Classifier:
    """A DNA sequence classifier with how to run it; logits come back as float32 in the order of `classes`.

    batch_tokens and chunk are in bases; by default what keeps the device busy: 65,536 and 16,384 on a CPU, a million on
    a GPU.
    """

    def __init__(
        self,
        model: str,
        device: str = "auto",
        dtype: Dtype = "float32",
        batch_tokens: int | None = None,
        chunk: int | None = None,
    ) -> None:
        for name, value in (("batch_tokens", batch_tokens), ("chunk", chunk)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self.device = choose_device(device)
        on_cpu = self.device.type == "cpu"
        self.model: Any = seqmodels.load(model, device=self.device, dtype=getattr(torch, dtype))
        config = self.model.config
        if config.head.task != "sequence" or config.tokenizer.get("type") != "dna":
            raise InputError(
                f"model {model} is not a classifier of DNA sequences (head {config.head.task!r}, tokens "
                f"{config.tokenizer.get('type')!r}); give one made by 'longseq dna train'"
            )
        self.name = model
        self.classes: tuple[str, ...] = config.head.labels
        self.causal: bool = self.model.causal
        self.batch_tokens = batch_tokens or (1 << 16 if on_cpu else 1 << 20)
        self.chunk = chunk or (1 << 14 if on_cpu else 1 << 20)

    @property
    def longest_batched(self) -> int:
        """Bases up to which records go through the model whole; longer ones are streamed (causal models only)."""
        return min(self.chunk, self.batch_tokens) if self.causal else self.batch_tokens

    def batch(self, sequences: list[Tokens]) -> Logits:
        """Logits (b, classes) of whole sequences, in batches of similar length within the token budget."""
        logits = np.zeros((len(sequences), len(self.classes)), dtype=np.float32)
        for places in batches_by_length([len(s) for s in sequences], self.batch_tokens):
            logits[places] = self._forward([sequences[i] for i in places])
        return logits

    @torch.inference_mode()
    def stream(self, chunks: Iterable[Tokens]) -> Logits:
        """Logits (classes,) of one sequence that comes in chunks: equal to a single pass, to rounding.

        A chunk is fetched while the one before it is computed.
        """
        state = None
        for tokens in _one_ahead(_rechunked(chunks, self.chunk)):
            ids = torch.from_numpy(tokens).to(self.device).long()
            state = self.model.read(ids[None], state)
        return self.model.classify(state)[0].float().cpu().numpy()

    @torch.inference_mode()
    def _forward(self, sequences: list[Tokens]) -> Logits:
        ids, lengths = (torch.from_numpy(a).to(self.device) for a in pad_right(sequences))
        logits = self.model(ids, lengths=lengths)
        return logits.float().cpu().numpy()


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
