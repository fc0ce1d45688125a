"""Launches without Triton's search for the compiled kernel, which takes longer than a short sequence's kernels.

An op makes a plan once for each form of its arguments (`planned`), and in it its launches: a `Launch` is a kernel with
all that follows from that form, so that a call has only addresses to fill in.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

_MOST = 1024  # plans of one kind


def planned(make: Callable) -> Callable:
    """make(*arguments), once for each form: shape, strides, dtype and device of a tensor, of others the value."""
    plans: dict[tuple, Any] = {}

    def plan(*arguments: Any) -> Any:
        form = tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments])
        found = plans.get(form)
        if found is None:
            if len(plans) >= _MOST:
                plans.clear()
            found = plans[form] = make(*arguments)
        return found

    return plan


class Launch:
    """kernel[grid](*tensors, *numbers, **options) for tensors of always the same dtypes on the same device.

    Of what Triton compiles a kernel for, only the addresses are then left: whether they are multiples of 16. If all
    are, as nearly always, the kernel that Triton found the first time is launched; else Triton searches again. So it
    does wherever something listens to launches, and in the interpreter.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **options: Any) -> None:
        self.kernel, self.numbers, self.options = kernel, numbers, options
        self.grid = (*grid, 1, 1)[:3]
        # all that follows the tensors, as a compiled kernel takes it
        self.others = *numbers, *(options[name] for name in kernel.arg_names if name in options)
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        addresses: list[int | None] = []
        together = 0
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            together |= address or 0
            addresses.append(address)
        compiled = self.compiled
        if compiled is not None and together % 16 == 0 and not _watched():
            device, active = tensors[0].get_device(), driver.active
            if device == active.get_current_device():
                stream = active.get_current_stream(device)
                compiled.run(
                    *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses,
                    *self.others,
                )  # fmt: skip
                return
        with torch.cuda.device_of(tensors[0]):
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
        if together % 16 == 0:
            self.compiled = compiled


def _watched() -> bool:
    """Whether a profiler wants to know of launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # chains of functions, or one


class Pieces:
    """Fresh memory in 1-d pieces for the given shapes, all of one allocation, which takes as long as a launch."""

    def __init__(self, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.sizes = [triton.cdiv(math.prod(shape), 64) * 64 for shape in shapes]  # at multiples of 16 bytes
        self.total = sum(self.sizes)

    def __call__(self, like: Tensor) -> tuple[Tensor, ...]:
        return torch.empty(self.total, dtype=self.dtype, device=like.device).split_with_sizes(self.sizes)
