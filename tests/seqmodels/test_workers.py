"""Requests shared between processes: each answered once, by who is free; a failure is told to all who wait."""

import os
import signal
import time

import pytest
import torch

from seqmodels import workers as module
from seqmodels.errors import InputError
from seqmodels.workers import LostWorker, Workers, devices_of


def make(device):
    """A worker that says who it is and what it is asked, and obeys some words."""
    number = os.getpid()

    def answer(parts):
        parts = list(parts)
        if parts == ["slow"]:
            time.sleep(1)
        if parts == ["die"]:
            os.kill(number, signal.SIGTERM)
        if parts == ["fail"]:
            raise RuntimeError("CUDA error: something\n\nmuch advice")
        return number, parts

    return (device, torch.get_num_threads()), answer


def unable(device):
    raise InputError(f"no model for {device}; give one")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_each_request_is_answered_once_by_who_is_free(monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 1 << 17)  # less than what is asked in parts
    with Workers(make, ["cpu", "cpu"]) as workers:
        assert workers.facts == ("cpu", 1)  # they share the threads
        slow = workers.ask(["slow"])
        others = [workers.ask([i]) for i in range(30)]
        parts = [bytes([i]) * (1 << 16) for i in range(20)]
        long = workers.ask_in_parts(iter(parts))
        assert not slow.done()
        assert [future.result()[1] for future in [*others, long]] == [*([i] for i in range(30)), parts]
        assert slow.result()[0] not in {future.result()[0] for future in others[4:]}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("die", r"the process on cpu ended unexpectedly \(signal 15\)"),
        ("fail", "the process on cpu failed: CUDA error: something$"),
    ],
)
def test_nobody_waits_for_a_process_that_is_lost_and_the_others_finish(word, said):
    with Workers(make, ["cpu", "cpu"]) as workers:
        finished = workers.ask(["slow"])
        lost = workers.ask([word])
        with pytest.raises(LostWorker, match=said):
            lost.result()
        for ask in (lambda: workers.ask([1]), lambda: workers.ask_in_parts([b"x"])):
            with pytest.raises(LostWorker, match=said):
                ask()
        assert finished.result()[1] == ["slow"]


def test_a_process_that_cannot_begin_says_why():
    with Workers(unable, ["cpu", "cpu"]) as workers, pytest.raises(InputError, match=r"^no model for cpu; give one$"):
        print(workers.facts)


def test_devices_are_named_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cuda:1", 1) == ["cuda:1"]
    assert devices_of("auto", 2) == devices_of("cuda", 2) == ["cuda:0", "cuda:1"]
    assert devices_of("cpu", 2) == ["cpu", "cpu"]
    for device, count, said in (("auto", 4, "shows 3 GPUs"), ("cuda:1", 2, "no kind"), ("cpu", 0, "at least 1")):
        with pytest.raises(InputError, match=said):
            devices_of(device, count)
