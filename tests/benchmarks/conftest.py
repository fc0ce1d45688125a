"""The programs of benchmarks/ are imported by their names."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
