"""CUDA graphs of small batches: gradients and training are those without them.

On a CPU a graph is the list of PyTorch's operations, which are done again into the same memory.
"""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seqmodels
from seqmodels import graphs, heads, presets
from seqmodels.config import HeadConfig, KmerConfig, ModelConfig
from seqmodels.graphs import WARM_UP, GradientGraphs
from seqmodels.training import TrainingConfig, _Task, fit

COMPLEMENT = (0, 4, 3, 2, 1)
SEQUENCE = HeadConfig(task="sequence", labels=("a", "b", "c"), dropout=0.1, class_weights=(1.0, 2.0, 0.5))
WORDS = KmerConfig(k=5, width=8, alphabet=(1, 2, 3, 4), buckets=512, complement_map=COMPLEMENT)
KINDS = {
    "mamba2": (presets.mamba2(64, 2, d_state=16), HeadConfig(task="next_token")),
    "mamba": (presets.mamba(64, 2), HeadConfig(task="next_token")),
    "attention": (presets.attention(64, 2, num_heads=2), HeadConfig(task="next_token")),
    "window": (presets.attention(64, 2, num_heads=2, window=32), HeadConfig(task="next_token")),
    "both directions": (presets.mamba2(64, 2, bidirectional=True, d_state=16), SEQUENCE),
    "words": (dataclasses.replace(presets.mamba2(64, 1, d_state=16), kmer=WORDS), SEQUENCE),
    "both strands": (presets.caduceus(64, 2, complement_map=COMPLEMENT), SEQUENCE),
}


class Two:
    """Batches of two shapes in turn, with lengths."""

    def __init__(self, head):
        self.head = head

    def train_batch(self, step):
        rng = torch.Generator().manual_seed(step)
        rows, l = ((16, 100), (8, 130))[step % 2]
        ids = torch.randint(1, 5, (rows, l + 1), generator=rng)
        if self.head.task == "next_token":
            return {"ids": ids[:, :-1], "targets": ids[:, 1:]}
        lengths = torch.randint(50, l + 1, (rows,), generator=rng)
        return {"ids": ids[:, :-1], "lengths": lengths, "targets": torch.randint(3, (rows,), generator=rng)}

    def validation_batches(self):
        return [self.train_batch(10**6)]


class Tape(TorchDispatchMode):
    """Operations done while it is entered; waiting for the result of one is an error, as it is for a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("waits")
        found = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, found in self.done:
            for old, new in zip(tree_leaves(found), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def underway():
    """What is in its recording mode: memory pools and, like PyTorch's, one generator."""
    return set()


@pytest.fixture
def tapes(monkeypatch, one_thread, underway):
    """Tapes are graphs; a list of those replayed. A recording that fails leaves open what PyTorch's does."""

    class Graph(Tape):
        def replay(self):
            replayed.append(self)
            super().replay()

    @contextmanager
    def recorded(graph, pool="its own", **_):
        if underway - {"generator"}:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        if pool in released:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        underway.update({pool, "generator"})
        with graph:
            yield
        underway.difference_update({pool, "generator"})

    def end(device, pool):
        if pool not in underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        underway.remove(pool)

    replayed, released = [], []
    functions = {"CUDAGraph": Graph, "graph": recorded, "graph_pool_handle": object, "current_stream": lambda: None}
    functions |= {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    functions |= {"max_memory_allocated": lambda: 1, "mem_get_info": lambda: (0, 2), "current_device": lambda: "cpu"}
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: released.append(pool))
    monkeypatch.setattr(graphs, "_no_waiting", Tape)
    return replayed


@pytest.fixture
def unused_gpu():
    """What other tests have taken of its memory does not count."""
    torch.zeros(1, device="cuda")
    torch.cuda.reset_peak_memory_stats()


def config(kind):
    backbone, head = KINDS[kind]
    return ModelConfig(vocab_size=5, backbone=dataclasses.replace(backbone, dropout=0.1), head=head)


def ordinary(model, batch):
    """What the loss gives, and gradients, without a graph; nothing of autograd is held."""
    loss, metrics = model.loss(batch)
    loss.backward()
    return {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}


def check_gradients(kind, device):
    model, data, errors = seqmodels.build(config(kind), seed=0).to(device).train(), Two(KINDS[kind][1]), []
    graph, replayed = GradientGraphs(model), []
    for step in range(12):
        batch = {name: tensor.to(device) for name, tensor in data.train_batch(step).items()}
        torch.manual_seed(step)
        found = graph(batch)
        gradients = [p.grad.clone() for p in model.parameters()] if found else []
        model.zero_grad()
        torch.manual_seed(step)
        values = ordinary(model, batch)
        if found is not None:
            replayed.append((found, values))
            truth = [p.grad for p in model.parameters()]
            errors += [float((g - t).norm() / t.norm()) for g, t in zip(gradients, truth, strict=True) if t.any()]
        with torch.no_grad():  # a graph reads the weights as they are
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
                parameter.grad.mul_(2)  # as clipping does
        model.zero_grad()
    for found, truth in replayed:  # those of a batch stay when others follow
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert len(replayed) == 12 - 2 * WARM_UP
    assert max(errors) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("unused_gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_gradients_metrics_and_dropout_of_each_batch(kind):
    check_gradients(kind, "cuda")


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("kind", ["attention", "window"])
def test_what_is_recorded_gives_the_gradients_metrics_and_dropout_of_each_batch(kind):
    check_gradients(kind, "cpu")


def test_what_waits_or_has_no_room_is_not_recorded_and_leaves_no_trace(tapes, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS", 100)  # more than that, and ignored targets get none
    model = seqmodels.build(config("attention"), seed=0).train()
    graph, batch = GradientGraphs(model), {"ids": torch.arange(80).view(8, 10) % 4 + 1}
    few, many = (torch.where(torch.arange(10) < n, batch["ids"], heads.IGNORED) for n in (2, 8))
    for targets, reached in ((few, False), (many, True)):
        for _ in range(WARM_UP + 2):
            before = torch.get_rng_state()
            found = graph(batch | {"targets": targets})
            assert model.skip_ignored
            if found is None:
                assert torch.equal(torch.get_rng_state(), before)
                assert all(parameter.grad is None for parameter in model.parameters())
        assert (found is not None) == reached
        graph = GradientGraphs(model)
        model.zero_grad()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2)
    assert not any(graph(batch | {"targets": many}) for _ in range(WARM_UP + 2))


def check_failure(device, spoil):
    """The second shape's recording fails while `spoil(model, batch)` is entered; those before and after it do not."""
    model, rng = seqmodels.build(config("attention"), seed=0).to(device).train(), torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 5, (8, l), generator=rng).to(device) for l in (51, 61, 71)]
    first, second, third = ({"ids": own[:, :-1], "targets": own[:, 1:]} for own in ids)
    graph = GradientGraphs(model)

    def last_found(batch):
        for _ in range(WARM_UP + 1):
            torch.manual_seed(0)
            found = graph(batch)
            ordinary(model, batch)  # dropout goes on
            model.zero_grad()
        return found

    found = [last_found(first)]
    with spoil(model, second):
        assert last_found(second) is None
        found.append(last_found(first))
    assert last_found(second) is None
    found += [last_found(first), last_found(third)]
    for values, batch in zip(found, (first, first, first, third), strict=True):
        torch.manual_seed(0)
        torch.testing.assert_close(values, ordinary(model, batch), rtol=1e-5, atol=1e-6)


def test_what_fails_while_it_is_recorded_leaves_dropout_and_other_graphs_as_they_are(tapes, underway, monkeypatch):
    @contextmanager
    def spoil(*_):
        class Fails(torch.cuda.CUDAGraph):
            def __exit__(self, *error):
                super().__exit__(*error)
                monkeypatch.setattr(torch.cuda, "CUDAGraph", Fails.__base__)
                raise RuntimeError("operation failed due to a previous error during capture")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Fails)
        yield
        assert not underway  # before any other recording

    check_failure("cpu", spoil)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("unused_gpu")
def test_an_older_loss_that_is_held_spoils_a_recording_and_nothing_else():
    @contextmanager
    def spoil(model, batch):
        loss, _ = model.loss(batch)
        loss.backward()
        model.zero_grad()
        yield
        del loss

    check_failure("cuda", spoil)
    torch.cuda.empty_cache()


def by_graphs(monkeypatch):
    """Training on a CPU has graphs, too."""
    setup = _Task.setup

    def with_graphs(task, stage):
        setup(task, stage)
        task.graphs = GradientGraphs(task.model)

    monkeypatch.setattr(_Task, "setup", with_graphs)


STEPS = TrainingConfig(max_steps=12, validate_every=5, learning_rate=1e-2, device="cpu", ema_decay=0.9)


def test_training_by_what_is_recorded_makes_the_same_model_also_when_resumed(tapes, tmp_path, monkeypatch):
    class Broken(Two):
        def train_batch(self, step):
            if step == 11:
                raise ConnectionError
            return super().train_batch(step)

    weights, head = {}, KINDS["attention"][1]
    for name in ("plain", "graphs"):
        fit(config("attention"), Two(head), STEPS, tmp_path / name)
        weights[name] = seqmodels.load(tmp_path / name / "model").state_dict()
        assert len(tapes) == (6 if name == "graphs" else 0)
        if name == "plain":
            by_graphs(monkeypatch)
    with pytest.raises(ConnectionError):
        fit(config("attention"), Broken(head), STEPS, tmp_path / "again")
    fit(config("attention"), Two(head), dataclasses.replace(STEPS, resume=True), tmp_path / "again")
    weights["again"] = seqmodels.load(tmp_path / "again" / "model").state_dict()
    for name in ("graphs", "again"):
        torch.testing.assert_close(weights[name], weights["plain"], rtol=1e-5, atol=1e-6)


def test_where_memory_runs_short_that_of_graphs_is_given_back_before_batches_are_cut(
    tapes, tmp_path, monkeypatch, capsys
):
    by_graphs(monkeypatch)
    gradients, tasks = _Task._gradients, []

    def fault(task, numbers, batches):
        tasks.append(task.graphs)
        if numbers == (9,) and task.graphs is not None:
            raise torch.OutOfMemoryError
        return gradients(task, numbers, batches)

    monkeypatch.setattr(_Task, "_gradients", fault)
    fit(config("attention"), Two(KINDS["attention"][1]), STEPS, tmp_path / "run")
    assert [graph is None for graph in tasks] == [False] * 10 + [True] * 3
    assert len(tapes) == 3
    assert "out of memory" not in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["parts"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("unused_gpu")
def test_training_by_graphs_learns_as_training_without_them_does(tmp_path, monkeypatch):
    training = TrainingConfig(  # a thread pins the workers' batches while graphs are recorded
        max_steps=60, validate_every=20, learning_rate=1e-3, device="cuda", ema_decay=0.9, precision="bf16",
        num_workers=2,
    )  # fmt: skip
    replayed, losses = [], []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph))[1])
    data = Two(SEQUENCE)
    for most in (0, graphs.MOST_TOKENS):
        monkeypatch.setattr(graphs, "MOST_TOKENS", most)
        model = seqmodels.load(fit(config("both directions"), data, training, tmp_path / str(most))).eval()
        assert len(replayed) == (0 if most == 0 else 60 - 2 * WARM_UP)
        with torch.no_grad():
            losses.append(float(model.loss(data.train_batch(1))[0]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
