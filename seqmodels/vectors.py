"""Rows with vectors of numbers that gather in files until all are there, so that long work can be resumed."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.table import Row, TableWriter, part_of

Vectors = NDArray[np.float32]


class VectorWriter(TableWriter):
    """Rows, a line of JSON each in <path>.part, and vectors (float32) in <path>.part.vectors, in their order.

    They are kept and resumed as the lines of a TableWriter. When the `with` block ends well, `_publish` makes of them
    what stands under `path`, if anything, and both are removed.
    """

    def __init__(
        self,
        path: Path,
        columns: dict[str, type],
        width: int,
        resume: Sequence[str] = (),
        made: Mapping[str, Any] | None = None,
    ) -> None:
        """`width` is that of a vector; the rest is as of a TableWriter."""
        super().__init__(path, columns, "jsonl", resume=resume, made=made)
        part = part_of(path)
        self.width, self._place = width, part.with_name(f"{part.name}.vectors")
        self._given = self._end = 0  # rows, and bytes of vectors, so far

    def __enter__(self) -> "VectorWriter":
        super().__enter__()
        self._vectors: Any = os.fdopen(os.open(self._place, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            super().__exit__(kind, *rest)
        finally:
            self._vectors.close()
            if self._temporary is not None and not self._temporary.exists():
                self._place.unlink(missing_ok=True)

    def add(self, rows: list[Row], count: int, fill: Callable[[Vectors], None]) -> Vectors:
        """Adds rows that have `count` vectors (count, width) together, which it returns.

        `fill` is given zeros to write them to, unless all of these rows are kept.
        """
        start, self._end = self._end, self._end + 4 * self.width * count
        self._given += len(rows)
        try:
            if self._given > self.kept:
                self._vectors.truncate(start)
                self._vectors.truncate(self._end)  # zeros
                if count and hasattr(os, "posix_fallocate"):  # room for them, or an error; macOS has none
                    os.posix_fallocate(self._vectors.fileno(), start, self._end - start)
                vectors = self.vectors(start, count)
                fill(vectors)
            elif self._vectors.seek(0, 2) < self._end:
                raise InputError(f"{self._place} lacks what belongs to the rows that are kept; leave out --resume")
            else:
                vectors = self.vectors(start, count)
        except OSError as error:
            raise self._failure(error) from None
        self.write(rows)
        return vectors

    def vectors(self, start: int, count: int) -> Vectors:
        """The vectors (count, width) from byte `start` of the file on, which stay there."""
        if not count:
            return np.zeros((0, self.width), dtype=np.float32)
        return np.memmap(self._vectors, dtype="<f4", mode="r+", offset=start, shape=(count, self.width))
