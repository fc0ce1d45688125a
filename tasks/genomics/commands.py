"""The commands `longseq dna train|classify|evaluate`, each imported when it is asked for: training needs Lightning."""

from importlib import import_module
from typing import Any

__all__ = ["classify", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"seqmodels.tasks.genomics.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
