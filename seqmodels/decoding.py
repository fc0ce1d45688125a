"""Decoding: a model's steps one after the other; on an NVIDIA GPU each is the replay of a CUDA graph, on a CPU whole
stacks of layers are compiled."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqmodels.backbone import Backbone, Layer, OwnStack, Told
from seqmodels.config import MultiscaleConfig
from seqmodels.mixers import S4D, Mamba, Mamba2, OwnState, SSMState


class Decoder:
    """Goes on from a model's state (after its prompt) step by step: decoder(ids) is model(ids, state), state kept.

    On a GPU, where all mixers are Mamba's, Mamba-2's or S4D's, the states keep their place and a step is recorded as a
    CUDA graph when it comes up for the second time; from then on it is replayed, with one launch by the CPU instead of
    some hundred. A U-Net's steps differ within a period of its pooling factors' product, so that it has so many graphs.
    On a CPU, up to eight rows at a time go through a stack of equal Mamba-2 layers in one compiled function. Elsewhere
    the model is simply called. Weights must not change meanwhile.

    `then` is what follows the logits (b, vocabulary), for example the choice of the next token: it becomes part of the
    graph, so all that it reads and writes from step to step must be tensors that stay where they are. So must the ids,
    which it may overwrite with the next ones: then a step is nothing but the replay.
    """

    def __init__(
        self, model: Any, state: Any, conditions: Tensor | None = None, then: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.model, self.then = model, then
        with torch.inference_mode():
            self._told = Told(model, conditions)
        layers = [module for module in model.modules() if isinstance(module, Layer)]
        fixed = all(isinstance(layer.mixer, (Mamba, Mamba2, S4D)) for layer in layers)
        self._records = model.device.type == "cuda" and fixed and not model.training
        backbone = model.config.backbone
        multiscale = isinstance(backbone, MultiscaleConfig)
        self._period = math.prod(stage.pool for stage in backbone.stages) if multiscale else 1
        self._step, self._recorded = 0, []
        with torch.inference_mode():
            self._state = _map(state, _own_copy) if self._records else self._stacked(state)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids (b, 1) int64 -> logits (b, vocabulary), or then(logits), which the next calls may overwrite."""
        step, self._step = self._step, self._step + 1
        if not self._records or step < self._period:  # the first time round also compiles what a graph cannot
            result, state = self._call(ids)
            self._state = _map(state, _own) if self._records else self._stacked(state) if step < self._period else state
            return result
        if step < 2 * self._period:
            self._recorded.append(self._record(ids, last=step == 2 * self._period - 1))
        graph, static_ids, result, self._state = self._recorded[step % self._period]
        if static_ids is not ids:
            static_ids.copy_(ids)
        graph.replay()
        return result

    @property
    def state(self) -> Any:
        """The state after the last step, to hand to the model or to another decoder."""
        return _map(self._state, _plain_copy)

    def _stacked(self, state: Any) -> Any:
        """The state with the states of stacks that can be compiled in one piece each."""
        if self.model.device.type != "cpu" or state is None:
            return state

        def stacked(stack: Any, states: Any) -> Any:
            return OwnStack(stack, states) if OwnStack.takes(stack, states) else states

        backbone = self.model.backbone
        if isinstance(backbone, Backbone):
            return state._replace(layers=stacked(backbone, state.layers))
        downs = zip(backbone.down, state, strict=True)
        stages = [stage._replace(down=stacked(part, stage.down)) for part, stage in downs]
        ups = zip(backbone.up, stages, strict=False)  # the centre has none
        return (*(stage._replace(up=stacked(part, stage.up)) for part, stage in ups), stages[-1])

    def _call(self, ids: Tensor) -> tuple[Tensor, Any]:
        logits, state = self.model(ids, self._state, conditions=self._told)
        return logits[:, -1] if self.then is None else self.then(logits[:, -1]), state

    def _record(self, ids: Tensor, last: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Any]:
        """The graph of this step, its ids, its result and the state it leaves: where the first of a period found it."""
        if not self._recorded:
            self._first, self._pool = self._state, torch.cuda.graph_pool_handle()
        graph, static_ids = torch.cuda.CUDAGraph(), ids.clone() if self.then is None else ids
        with torch.cuda.device_of(ids), torch.cuda.graph(graph, pool=self._pool):
            result, state = self._call(static_ids)
            if last:
                for old, new in zip(_tensors(self._first), _tensors(state), strict=True):
                    if old is not new:
                        old.copy_(new)
                state = self._first
        return graph, static_ids, result, state


def map_state(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A model's state with function(tensor) for all its tensors, for example to repeat its rows."""
    return _map(state, lambda part: function(part) if isinstance(part, Tensor) else SSMState(*map(function, part)))


def _map(state: Any, function: Any) -> Any:
    """The state with function(part) for its SSMStates and other tensors; stacks are taken apart."""
    if isinstance(state, (SSMState, Tensor)):
        return function(state)
    if isinstance(state, OwnStack):
        return state.copy()
    if not isinstance(state, tuple):
        return state
    parts = [_map(part, function) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, tuple):
        return [tensor for part in state for tensor in _tensors(part)]
    return [state] if isinstance(state, Tensor) else []


def _own(part: Any) -> Any:
    return part if isinstance(part, Tensor) else OwnState(*(tensor.contiguous() for tensor in part))


def _own_copy(part: Any) -> Any:
    return part.clone() if isinstance(part, Tensor) else OwnState(*(_copy(tensor) for tensor in part))


def _plain_copy(part: Any) -> Any:
    return part.clone() if isinstance(part, Tensor) else SSMState(*(_copy(tensor) for tensor in part))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
