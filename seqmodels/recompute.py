"""Gradients from less memory: what lies between a few kept places is computed again on the way back.

`in_stretches`: a stack of Mamba layers reads its sequence in stretches, each from the states that the one before has
left. Of all stretches but the last only what enters them is kept; going back, each is computed again, the last first.
Gradients are exact (they pass from stretch to stretch through the states), the memory for activations is that of one
stretch however long the sequence, and the price is one more pass forward, less the last stretch.

`forgotten`: a tensor that is cheap to compute again is not kept at all. This is for the last stretch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint


def in_stretches(
    read: Callable, tokens: int, forgetting: Callable, x: Tensor, state: Any = None, lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """read(x, state, lengths, seq_idx) with the activations of at most `tokens` steps (of all rows) at a time.

    The first stretch is the short one. The last is read under forgetting().
    """
    b, l, _ = x.shape
    steps = max(1, tokens // b)
    if steps >= l or not torch.is_grad_enabled():
        return read(x, state, lengths, seq_idx)
    sizes = [(l - 1) % steps + 1] + [steps] * ((l - 1) // steps)
    start, outputs = 0, []
    for part in x.split(sizes, 1):
        end = start + part.shape[1]
        left = None if lengths is None else (lengths - start).clamp(0, end - start)
        runs = None if seq_idx is None else seq_idx[:, start:end]
        if runs is not None and start:
            state = _where(runs[:, 0] == seq_idx[:, start - 1], state)
        if end < l:
            y, state = checkpoint(read, part, state, left, runs, use_reentrant=False)
        else:
            with forgetting():
                y, state = read(part, state, left, runs)
        outputs.append(y)
        start = end
    return torch.cat(outputs, 1), state


def _where(goes_on: Tensor, state: Any) -> Any:
    """The state (b, ...) of rows whose sequence goes on, and zero for the others."""
    return tree_map(lambda t: t * goes_on.view(-1, *[1] * (t.dim() - 1)).to(t.dtype), state)


class _Place(NamedTuple):
    """Where a kept tensor lies in one that is computed again."""

    of: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def forgotten(active: bool) -> Iterator[Callable[[Tensor, Callable[[], Tensor]], None]]:
    """A context that gives forget(tensor, again): of the tensor's memory autograd then keeps, for what follows in the
    context, nothing but how to compute it again.

    The tensor owns its memory; again() gives it anew, of tensors that are kept. It is called once for all that follows,
    and what it gives is dropped after the last use. Not active, the context does nothing.
    """
    owners: dict[int, tuple[Tensor, int]] = {}  # address -> tensor, so that nothing else comes to lie there, and number
    recipes: list[Callable[[], Tensor]] = []
    uses: list[int] = []
    made: dict[int, tuple[Tensor, int]] = {}  # number -> what was computed again, uses left

    def forget(tensor: Tensor, again: Callable[[], Tensor]) -> None:
        if active:
            owners[tensor.untyped_storage().data_ptr()] = tensor, len(recipes)
            recipes.append(again)
            uses.append(0)

    def pack(tensor: Tensor) -> Tensor | _Place:
        found = owners.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        uses[found[1]] += 1
        return _Place(found[1], tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(kept: Tensor | _Place) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        whole, left = made.pop(kept.of, (None, uses[kept.of]))
        if whole is None:
            with torch.no_grad():
                whole = recipes[kept.of]()
        if left > 1:
            made[kept.of] = whole, left - 1
        return whole.as_strided(kept.shape, kept.stride, kept.offset)

    with saved_tensors_hooks(pack, unpack) if active else nullcontext():
        yield forget
    owners.clear()
