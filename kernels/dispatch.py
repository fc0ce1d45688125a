"""Which Triton form an op has on this machine."""

import functools
import importlib
from types import ModuleType

from torch import Tensor


def triton_form(op: str, x: Tensor) -> ModuleType | None:
    """seqmodels.kernels.{op}_triton for x on a GPU; elsewhere, in float64 and where triton is missing None: then the
    plain form computes.
    """
    return _module(f"seqmodels.kernels.{op}_triton") if x.is_cuda and x.element_size() < 8 else None


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        import triton  # noqa: F401 (its absence is the only import error to forgive)
    except ImportError:
        return None
    return importlib.import_module(name)
