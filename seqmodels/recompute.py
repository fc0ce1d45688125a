"""Gradients from less memory: what lies between a few kept places is computed again on the way back.

A stack of Mamba layers reads its sequence in stretches, each from the states that the one before has left. Only the
stack's input, its output and those states are kept of all stretches but the last; going back, each stretch is computed
again from them, the last first. Gradients are exact (they pass from stretch to stretch through the states), the memory
for activations is that of one stretch however long the sequence, and the price is one more pass forward, less the last
stretch. Other layers keep their inputs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from seqmodels.backbone import Layers
from seqmodels.mixers import Mamba, Mamba2


def recompute_layers(model: nn.Module, tokens: int = 0) -> None:
    """From now on stacks of Mamba or Mamba-2 layers keep the activations of `tokens` steps (of all rows) at a time.

    With tokens = 0, as layers of another kind always, each layer keeps what enters it.
    """
    for stack in model.modules():
        if not isinstance(stack, Layers):
            continue
        if tokens and all(isinstance(layer.mixer, (Mamba, Mamba2)) for layer in stack.layers):
            stack.read = partial(_in_stretches, stack.read, tokens)
        else:
            for layer in stack.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _in_stretches(
    read: Any, tokens: int, x: Tensor, state: Any = None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Any]:
    """read(x, state, lengths, seq_idx) of a stack."""
    b, l, _ = x.shape
    steps = max(1, tokens // b)
    if steps >= l or not torch.is_grad_enabled():
        return read(x, state, lengths, seq_idx)
    outputs = []
    for start, part in zip(range(0, l, steps), x.split(steps, 1), strict=True):
        left = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
        runs = None if seq_idx is None else seq_idx[:, start : start + steps]
        if runs is not None and start:
            state = _where(runs[:, 0] == seq_idx[:, start - 1], state)
        again = partial(checkpoint, read, use_reentrant=False) if start + steps < l else read
        y, state = again(part, state, left, runs)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _where(goes_on: Tensor, state: Any) -> Any:
    """The state (b, ...) of rows whose sequence goes on, and zero for the others."""
    return tree_map(lambda t: t * goes_on.view(-1, *[1] * (t.dim() - 1)).to(t.dtype), state)
