"""Gradients of small batches by CUDA graphs: all kernels of a batch in one launch, where the host is slower than they.

A graph is recorded for each shape of batches that comes again, and replayed for those that follow.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from seqmodels.heads import IGNORED

MOST_TOKENS = 1 << 18  # of a batch; kernels of longer ones take longer than their launches
MOST_GRAPHS = 64
WARM_UP = 3  # batches of a shape that are computed as usual: kernels are compiled, caches filled

Batch = dict[str, Tensor]


class GradientGraphs:
    """Called with a batch, computes the gradients of model.loss(batch) like loss.backward(), and gives what it gave.

    The batch is on the GPU, as the model is. It gives None, and has done nothing, where there is no graph for the
    batch's shapes: they are new, the batch is long, the model waits for the GPU while it computes the loss, batches
    take more than half of the GPU's memory, of which a graph keeps a part of its own, or somebody held an earlier loss
    with its autograd graph (whose AccumulateGrad nodes stay on the stream of their time). `.grad` of the parameters is
    replaced, by tensors that the next call overwrites. The model stays in training mode, its parameters where they are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._seen: Counter[tuple] = Counter()
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, list[tuple[nn.Parameter, Tensor]], Batch]] = {}
        self._refused: set[tuple] = set()
        self._pool: Any = None

    def __call__(self, batch: Batch) -> Batch | None:
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if shape not in self._recorded and not self._record(shape, batch):
            return None
        graph, inputs, gradients, values = self._recorded[shape]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return {name: value.clone() for name, value in values.items()}

    def _record(self, shape: tuple, batch: Batch) -> bool:
        """Whether there is a graph now."""
        self._seen[shape] += 1
        if self._seen[shape] <= WARM_UP or shape in self._refused:
            return False
        short_of_memory = torch.cuda.max_memory_allocated() > torch.cuda.mem_get_info()[1] / 2
        if short_of_memory or len(self._recorded) >= MOST_GRAPHS or batch["ids"].numel() > MOST_TOKENS:
            self._refused.add(shape)
            return False
        drawn, self._pool = torch.cuda.get_rng_state(), self._pool or torch.cuda.graph_pool_handle()
        inputs, graph = {name: tensor.clone() for name, tensor in batch.items()}, torch.cuda.CUDAGraph()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.skip_ignored = _few_targets(batch)
        try:
            with _no_waiting():
                self._gradients(inputs)
            self.model.zero_grad(set_to_none=True)
            torch.clear_autocast_cache()  # weights are cast within the graph, each time anew
            with self._recording(graph):
                values = self._gradients(inputs)
        except RuntimeError:  # it waits for the GPU, finds no memory beside all else, or meets a loss that is held
            self._refused.add(shape)
        finally:
            self.model.skip_ignored = True
            torch.clear_autocast_cache()
            torch.cuda.set_rng_state(drawn)
        if shape in self._refused:
            self.model.zero_grad(set_to_none=True)
            gc.collect()  # the failure's frames are a cycle: their loss would be one that is held
            return False
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        self._recorded[shape] = graph, inputs, gradients, values
        return True

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """A context whose kernels are recorded. Where that fails, PyTorch goes on with dropout and memory as before."""
        mode = "thread_local"  # other threads may allocate pinned memory meanwhile
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # again, also where recording fails
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode),
            ):
                yield
        except RuntimeError:  # CUDAGraph.capture_end may have left memory pool and generator in their recording mode
            pool, self._pool = self._pool, None
            with suppress(RuntimeError):  # the pool was not left so
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
            nothing = torch.zeros((), device=torch.cuda.current_device())
            # a recording that succeeds ends the generator's mode, too
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
                nothing.zero_()
            raise

    def _gradients(self, batch: Batch) -> Batch:
        loss, metrics = self.model.loss(batch)
        with torch.autocast(loss.device.type, enabled=False):  # gradients have the types of what they belong to
            loss.backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}


def _few_targets(batch: Batch) -> bool:
    """Whether logits of all steps would cost more than launching the kernels one by one."""
    targets = batch["targets"]
    return targets.shape == batch["ids"].shape and float((targets != IGNORED).float().mean()) < 0.5


@contextmanager
def _no_waiting() -> Iterator[None]:
    """A context in which waiting for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
