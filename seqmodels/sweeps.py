"""Sequences of any length through models that read both directions: features stretch by stretch, from left to right.

    logits = model.classify(model.pool(two_sweeps(model.backbone, ids)))             # a SequenceClassifier
    for x in two_sweeps(model.backbone, ids): model.score(x)                         # a PositionClassifier
    windows(model.backbone, [ids], window=65536, context=8192)                       # the same, approximately

`two_sweeps` is exact. A bidirectional layer adds what one mixer makes of the past and another of the future,

    y[t] = F(u[0 .. t]) + R(u[t .. l-1]),

so one sweep over the sequence from left to right gives F's part, chunk by chunk with its state handed on, and one from
right to left R's. Where a sweep completes a layer, it goes on with the next layer's mixer of the same direction: n
bidirectional layers take n + 1 sweeps. Between them the residual stream and the half that is done wait in the host's
memory (`host_bytes`); the device holds a few chunks. Layers of causal mixers may lie between; each runs in a sweep from
left to right. A model of both strands sweeps over each: what comes together is of the same bases, as in one pass.

`windows` reads stretches by themselves, with context on both sides that is read but not kept: constant memory, and a
result that is exact only as far as nothing beyond the context matters. It takes any mixer.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.backbone import Backbone, Layer, RMSNorm
from seqmodels.baselines import Attention, Convolution
from seqmodels.errors import InputError
from seqmodels.mixers import Bidirectional

Sweep = tuple[bool, list[tuple[Layer, str]]]
"Whether it goes backwards; and which layers it runs: 'whole', or the 'first' or 'second' direction of two."


@torch.no_grad()
def two_sweeps(
    backbone: Backbone, ids: Tensor, *, chunk: int = 16384, conditions: Tensor | None = None
) -> Iterator[Tensor]:
    """Features (b, c, d) of ids (b, l) of any integer type, c = chunk but for the last: those of one pass, to rounding.

    They are (b, c, 2 d) of a backbone of both strands, which is read as such in eval mode.

    The ids stay where they are; the backbone is in eval mode, and its device is where the features are.
    """
    if not sweepable(backbone):
        raise InputError(
            "attention without a direction, convolutions and U-Nets cannot be read in two sweeps; use windows"
        )
    given = _swept(backbone, ids, chunk, conditions, other=False)
    if not backbone.both_strands:
        yield from given
        return
    for x, y in zip(given, _swept(backbone, ids, chunk, conditions, other=True), strict=True):
        yield torch.cat([x, y.flip(1)], -1)


def _swept(backbone: Backbone, ids: Tensor, chunk: int, conditions: Tensor | None, other: bool) -> Iterator[Tensor]:
    """Features (b, c, d) of one strand, chunk by chunk in the order of the given one; each in its own direction.

    What is to the right of the other strand's sequence is to the left of the given one: it is swept the other way.
    """
    starts, plan = range(0, ids.shape[1], chunk), _plan(backbone, other)
    in_fp32, host = backbone.residual_in_fp32, _Host(backbone.embedding.weight.device)
    for number, (backwards, steps) in enumerate(plan):
        states: dict[Layer, Any] = {}
        order = starts[::-1] if backwards != other else starts
        kept = host.each(order) if number else itertools.repeat((None, None))
        for start, (residual, half) in zip(order, kept, strict=False):
            x = None if number else _embedded(backbone, ids, start, chunk, conditions, other)
            for layer, part in steps:
                x, residual = _norm(layer.norm, x, residual, in_fp32)
                if part == "whole":
                    x, states[layer] = layer.mixer(x, states.get(layer))
                else:
                    x, states[layer] = layer.mixer.one_direction(x, states.get(layer), backwards)
                if part == "first":
                    x, half = None, x
                else:
                    x, residual = layer.after_mixer(x if part == "whole" else x + half, residual)
                    half = None
            if number == len(plan) - 1:
                yield _norm(backbone.norm_f, x, residual, in_fp32)[0]
            else:
                host.keep(start, residual if x is None else _sum(x, residual, in_fp32), half)


@torch.no_grad()
def windows(
    backbone: torch.nn.Module, ids: Iterable[Tensor], *, window: int, context: int, conditions: Tensor | None = None
) -> Iterator[Tensor]:
    """Features (b, c, d) of ids that come as parts (b, any), of windows read by themselves.

    Each window is at most `window` steps, of which the first and last `context` are those of its neighbours and are
    left out of the result; at the ends of the sequence there is no such context. A sequence of at most one window is
    read whole.
    """
    if not 0 <= context < -(-window // 2):
        raise InputError(f"windows of {window} with {context} of context on each side leave nothing between; lower it")
    device, step = backbone.embedding.weight.device, window - 2 * context
    held, before = None, 0  # ids from `before` steps to the left of those that are to come
    for part in ids:
        held = part if held is None else torch.cat([held, part], 1)
        while held.shape[1] > before + step + context:
            yield _features(backbone, held[:, : before + step + context], device, conditions)[:, before : before + step]
            held = held[:, before + step - min(context, before + step) :]
            before = min(context, before + step)
    if held is not None and held.shape[1] > before:
        yield _features(backbone, held, device, conditions)[:, before:]


def sweepable(backbone: torch.nn.Module) -> bool:
    """Whether `two_sweeps` can read with this backbone."""
    return isinstance(backbone, Backbone) and not any(
        isinstance(layer.mixer, Convolution) or (isinstance(layer.mixer, Attention) and not layer.mixer.config.causal)
        for layer in _layers(backbone)
    )


def host_bytes(backbone: Backbone, length: int, chunk: int = 16384) -> int:
    """Bytes of the host's memory that `two_sweeps` takes for one sequence, its ids of one byte each included."""
    strands = (False, True) if backbone.both_strands else (False,)
    hosted = sum(len(_plan(backbone, other)) > 1 for other in strands)
    weight = backbone.embedding.weight
    wide = 4 if backbone.residual_in_fp32 and weight.element_size() < 4 else weight.element_size()
    sizes = [min(chunk, length) * weight.shape[1] * size for size in (wide, weight.element_size())]
    if weight.device.type == "cuda":  # PyTorch pins powers of two
        sizes = [1 << (size - 1).bit_length() for size in sizes]
    return length + hosted * -(-length // chunk) * sum(sizes)


def free_memory() -> int:
    """Bytes of main memory that may still be taken: what the machine has, and control groups (Slurm, Docker) leave."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for kind, path in groups:
        if kind not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", kind)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kind else ("memory.max", "memory.current")
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit here
                continue
            free = min(free, limit - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
    return max(0, free)


def _layers(backbone: torch.nn.Module) -> Sequence[Layer]:
    return list(backbone.layers)  # pyright: ignore


def _plan(backbone: Backbone, last: bool = False) -> list[Sweep]:
    """The fewest sweeps that run all layers, the last of them from left to right, or backwards if `last`."""
    return min((_plan_from(_layers(backbone), backwards, last) for backwards in (False, True)), key=len)


def _plan_from(layers: Sequence[Layer], backwards: bool, last: bool) -> list[Sweep]:
    plan: list[Sweep] = []
    left = deque(layers)
    half = False  # whether the first layer that is left has run in one direction
    while True:
        steps = []
        if half:
            steps.append((left.popleft(), "second"))
        half = False
        while left and not half:
            if half := isinstance(left[0].mixer, Bidirectional):
                steps.append((left[0], "first"))
            elif backwards:
                break
            else:
                steps.append((left.popleft(), "whole"))
        plan.append((backwards, steps))
        if not left and backwards == last:
            return plan
        backwards = not backwards


def _embedded(
    backbone: Backbone, ids: Tensor, start: int, chunk: int, conditions: Tensor | None, other: bool
) -> Tensor:
    """What enters the first layer at one chunk, of the other strand in its own direction."""
    device = backbone.embedding.weight.device
    past = 0 if backbone.kmer is None else backbone.kmer.k - 1
    end = min(start + chunk, ids.shape[1])
    if other:
        own = backbone.complement[ids[:, start : end + past].to(device).long().flip(1)]
    else:
        own = ids[:, max(0, start - past) : end].to(device).long()
    known = own.shape[1] - (end - start)
    recent = F.pad(own[:, :known], (past - known, 0), value=-1)
    return backbone.embed(own[:, known:], recent, None, None, conditions)[0]


def _features(backbone: torch.nn.Module, ids: Tensor, device: torch.device, conditions: Tensor | None) -> Tensor:
    return backbone(ids.to(device).long(), conditions=conditions)[0]


def _norm(norm: RMSNorm, x: Tensor | None, residual: Tensor | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and the sum, which stands in `residual` where x is None."""
    if x is not None:
        return norm(x, residual, in_fp32)
    assert residual is not None
    return norm(residual, None, in_fp32)[0].to(norm.weight.dtype), residual


def _sum(x: Tensor, residual: Tensor | None, in_fp32: bool) -> Tensor:
    """The residual stream with x added, as a norm would add it."""
    total = x.float() if in_fp32 and x.dtype != torch.float64 else x
    return total if residual is None else total + residual


class _Host:
    """The hidden sequence between two sweeps: per chunk the residual stream and perhaps half a layer's result.

    For a GPU it lies in pinned memory, and copies run on streams of their own: the next chunk comes and the chunk
    before goes while one is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._kept: dict[int, tuple[Tensor | None, ...]] = {}
        self._pinned: dict[tuple[int, int], Tensor] = {}
        self._device, self._on_gpu = device, device.type == "cuda"
        if self._on_gpu:
            self._coming, self._going = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._done: deque[torch.cuda.Event] = deque()

    def keep(self, start: int, *tensors: Tensor | None) -> None:
        """Take over what belongs to the chunk at `start`."""
        if not self._on_gpu:
            self._kept[start] = tensors
            return
        self._going.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._going):
            self._kept[start] = tuple(
                None if t is None else self._buffer(start, i, t).copy_(t, non_blocking=True)
                for i, t in enumerate(tensors)
            )
            for t in tensors:
                if t is not None:
                    t.record_stream(self._going)
            self._done.append(self._going.record_event())
        if len(self._done) > 2:  # the CPU must not run ahead: what it has asked for is memory on the GPU
            self._done.popleft().synchronize()

    def each(self, order: Sequence[int]) -> Iterator[tuple[Tensor | None, ...]]:
        """What was kept of these chunks, on the device, one after the other."""
        if not self._on_gpu:
            yield from (self._kept.pop(start) for start in order)
            return
        compute = torch.cuda.current_stream(self._device)
        self._coming.wait_stream(self._going)
        coming = self._fetch(order[0])
        for following in (*order[1:], None):
            tensors, event = coming
            if following is not None:
                coming = self._fetch(following)
            compute.wait_event(event)
            for t in tensors:
                if t is not None:
                    t.record_stream(compute)
            yield tensors

    def _fetch(self, start: int) -> tuple[tuple[Tensor | None, ...], torch.cuda.Event]:
        with torch.cuda.stream(self._coming):
            tensors = tuple(None if t is None else t.to(self._device, non_blocking=True) for t in self._kept[start])
            return tensors, self._coming.record_event()

    def _buffer(self, start: int, i: int, like: Tensor) -> Tensor:
        """Pinned memory for one tensor of a chunk, the same in every sweep."""
        if (start, i) not in self._pinned:
            self._pinned[start, i] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return self._pinned[start, i]
