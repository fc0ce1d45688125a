"""Processes that share work: one per device of this machine, or all that torchrun has started, on one machine or many.

    with Workers(make, ["cuda:0", "cuda:1"]) as workers:   # make(device) gives (facts, answer), once in each process
        futures = [workers.ask([request]) for request in requests]
        ...                                                # each result is answer(iterator over the request's parts)

One process asks: it reads, and writes what comes back in the order it likes. Requests are taken up in the order in
which they are made, each by the process that is free next. `make` and all that is sent must be picklable.

Under torchrun the first process asks, with Workers(make, [its device]), and the others call `serve(make, device)`.

A process that dies or fails ends the work: what it was asked, and all that is asked later, raises LostWorker; what the
others are at is finished. The asking process never waits for a dead one. Processes end when the asking one does.
"""

import os
import queue
import secrets
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import multiprocessing

from seqmodels.errors import InputError

T = TypeVar("T")
Make = Callable[[str], tuple[Any, Callable[[Iterator[Any]], Any]]]
REQUESTS = 4  # per process, that are asked and not answered yet
AHEAD = 1 << 28  # bytes per process, of requests in parts, that wait to be sent
_ADDRESS = "longseq/workers"  # in torchrun's store


class LostWorker(InputError):
    """A process has died or failed."""


class _Failure(NamedTuple):
    """What a process answers when it cannot."""

    said: str
    is_input: bool


def with_way_on(error: LostWorker, kept: Path | None) -> LostWorker:
    """The same, with what to do: rows may have been kept in a file."""
    return LostWorker(
        f"{error}; " + (f"the rows before it are in {kept}: go on with --resume" if kept else "start again")
    )


def devices_of(device: str, count: int) -> list[str]:
    """As many devices of this machine: cuda:0, cuda:1, ..., or cpu so many times. 'auto' is cuda where there is one."""
    if count < 1:
        raise InputError(f"devices is {count}; it must be at least 1")
    if count == 1:
        return [device]
    if _is_cpu(device):
        return ["cpu"] * count
    if count > torch.cuda.device_count():
        raise InputError(f"devices is {count}, but this machine shows {torch.cuda.device_count()} GPUs; lower it")
    return [f"cuda:{i}" for i in range(count)]


def torchrun() -> tuple[int, int] | None:
    """This process's rank and how many there are, if torchrun has started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def torchrun_device(device: str) -> str:
    """The device of this process of torchrun: the GPU of its local rank, where GPUs are meant."""
    return "cpu" if _is_cpu(device) else f"cuda:{os.environ['LOCAL_RANK']}"


def _is_cpu(device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r} is no kind of which there are several; give auto, cpu or cuda")
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


class Workers:
    """The processes, for the one that asks; a context manager. `facts` is what the first of them has said of itself."""

    def __init__(self, make: Make, devices: list[str]) -> None:
        self._make, self._devices = make, devices
        self._requests: queue.SimpleQueue[tuple[Iterable[Any], Future] | None] = queue.SimpleQueue()
        self._facts: Future = Future()
        self._changed = threading.Condition()
        self._asked = 0  # and not answered
        self._ahead = 0  # bytes of parts that wait to be sent
        self._lost: LostWorker | None = None

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("forkserver")  # imports once; CUDA starts in each process
        context.set_forkserver_preload([__name__, getattr(self._make, "func", self._make).__module__])
        threads = max(1, torch.get_num_threads() // len(self._devices))
        self._processes, driven = [], []
        for device in self._devices:
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._make, device, threads), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            driven.append((lambda own=own: own, f"the process on {device}", process))
        if (place := torchrun()) is not None and place[1] > 1:
            listener = _listen()
            driven += [(listener.accept, "another process of torchrun", None)] * (place[1] - 1)
        self._count = len(driven)
        for arguments in driven:
            threading.Thread(target=self._drive, args=arguments, daemon=True).start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for _ in range(self._count):
            self._requests.put(None)
        for process in self._processes:
            if kind is not None:
                process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()

    @property
    def facts(self) -> Any:
        """What `make` has said in the first process that is ready; waits for it."""
        return self._facts.result()

    def ask(self, parts: Iterable[Any]) -> Future:
        """The answer to come; waits while REQUESTS per process are not answered."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked < REQUESTS * self._count or self._lost)
            if self._lost is not None:
                raise self._lost
            self._asked += 1
        future: Future = Future()
        self._requests.put((parts, future))
        return future

    def ask_in_parts(self, parts: Iterable[Any]) -> Future:
        """The answer to come to parts (with a length in bytes) that this call takes to their end, as they come.

        Waits while AHEAD bytes per process wait to be sent.
        """
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            future = self.ask(self._sent(waiting))
            for part in parts:
                with self._changed:
                    self._changed.wait_for(lambda: self._ahead < AHEAD * self._count or self._lost)
                    if self._lost is not None:
                        raise self._lost
                    self._ahead += len(part)
                waiting.put(part)
        finally:
            waiting.put(None)
        return future

    def _sent(self, waiting: "queue.SimpleQueue[Any]") -> Iterator[Any]:
        for part in _until_none(waiting.get):
            with self._changed:
                self._ahead -= len(part)
                self._changed.notify_all()
            yield part

    def _drive(self, connect: Callable[[], Connection], name: str, process: Any) -> None:
        """What a thread per process does: brings it one request after the other. Once one is lost, all are refused."""
        connection: Any = None

        def begin() -> Any:
            nonlocal connection
            connection = connect()
            return connection.recv()

        def exchange(parts: Iterable[Any]) -> Any:
            for part in parts:
                connection.send(part)
            connection.send(None)
            return connection.recv()

        facts = self._heard(begin, name, process)
        with self._changed:
            if self._lost is None and not self._facts.done():
                self._facts.set_result(facts)
        while (request := self._requests.get()) is not None:
            parts, future = request
            answer = self._lost or self._heard(lambda parts=parts: exchange(parts), name, process)
            with self._changed:
                self._asked -= 1
                self._changed.notify_all()
            if isinstance(answer, LostWorker):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        if connection is not None:
            connection.close()

    def _heard(self, listen: Callable[[], Any], name: str, process: Any) -> Any:
        """What a process says; or the error, which ends all work, if it has died or failed."""
        try:
            said = listen()
        except (EOFError, OSError):
            said = LostWorker(f"{name} ended unexpectedly{_cause(process)}")
        except Exception as error:  # nobody may wait for ever
            said = LostWorker(f"{name} cannot be reached: {type(error).__name__} {error}")
        if isinstance(said, _Failure):
            said = LostWorker(said.said if said.is_input else f"{name} failed: {said.said}")
        if isinstance(said, LostWorker):
            with self._changed:
                self._lost = self._lost or said
                if not self._facts.done():
                    self._facts.set_exception(said)
                self._changed.notify_all()
        return said


def in_order(
    asked: Iterable[T], done: Callable[[T], bool], size: Callable[[T], int] = lambda _: 1, most: int = 4096
) -> Iterator[T]:
    """Things that have been asked for, in order and soon, but no more than `most` of their sizes wait to be done.

    When a process is lost, those before what is lost come first.
    """
    pending: deque[T] = deque()
    waiting = 0
    try:
        for item in asked:
            pending.append(item)
            waiting += size(item)
            while pending and (waiting > most or done(pending[0])):
                waiting -= size(pending[0])
                yield pending.popleft()
    except LostWorker:
        yield from pending
        raise
    yield from pending


def serve(make: Make, device: str) -> None:
    """What torchrun's other processes do until the first one has no more to ask."""
    where = next(torch.distributed.rendezvous("env://"))[0].get(_ADDRESS).decode()
    if where:
        host, port, key = where.split()
        _serve(Client((host, int(port)), authkey=bytes.fromhex(key)), make, device, 0)


def dismiss() -> None:
    """Tells torchrun's other processes, from the first one, that nothing will be asked."""
    if (place := torchrun()) is not None and place[1] > 1:
        next(torch.distributed.rendezvous("env://"))[0].set(_ADDRESS, "")


def _listen() -> Listener:
    """Where torchrun's other processes are waited for; its store tells them."""
    key = secrets.token_bytes(32)
    listener = Listener((os.environ["MASTER_ADDR"], 0), backlog=int(os.environ["WORLD_SIZE"]), authkey=key)
    host, port = listener.address[:2]
    next(torch.distributed.rendezvous("env://"))[0].set(_ADDRESS, f"{host} {port} {key.hex()}")
    return listener


def _serve(connection: Connection, make: Make, device: str, threads: int) -> None:
    """What a process does: answers until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides
    if threads:
        torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError), connection:
        try:
            facts, answer = make(device)
        except Exception as error:
            connection.send(_failure(error))
            return
        connection.send(facts)
        while True:
            parts = _until_none(connection.recv)
            try:
                found = answer(parts)
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                found = _failure(error)
            for _ in parts:  # what was not read
                pass
            connection.send(found)


def _until_none(get: Callable[[], Any]) -> Iterator[Any]:
    """Not iter(get, None), which compares, and arrays compare item by item."""
    while (part := get()) is not None:
        yield part


def _failure(error: Exception) -> _Failure:
    said = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    return _Failure(said, isinstance(error, InputError))


def _cause(process: Any) -> str:
    """How a process has ended, as far as is known."""
    if process is None:
        return ""
    process.join(5)
    code = process.exitcode or 0
    if code >= 0:
        return f" (exit code {code})"
    return f" (signal {-code}{', perhaps for want of memory' if code == -signal.SIGKILL else ''})"
