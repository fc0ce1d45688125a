"""Which Triton form an op has on this machine."""

import functools
import importlib
from types import ModuleType

from torch import Tensor


def triton_form(op: str, x: Tensor) -> ModuleType | None:
    """seqmodels.kernels.{op}_triton, or None where triton is missing or x is float64: then the plain form computes."""
    return None if x.element_size() == 8 else _module(f"seqmodels.kernels.{op}_triton")


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        import triton  # noqa: F401 (its absence is the only import error to forgive)
    except ImportError:
        return None
    return importlib.import_module(name)
