"""CUDA graphs of small batches: gradients and training are those without them."""

import dataclasses

import pytest
import torch

import seqmodels
from seqmodels import graphs, presets
from seqmodels.config import HeadConfig, KmerConfig, ModelConfig
from seqmodels.graphs import WARM_UP, GradientGraphs
from seqmodels.training import TrainingConfig, fit

pytestmark = pytest.mark.gpu

COMPLEMENT = (0, 4, 3, 2, 1)
SEQUENCE = HeadConfig(task="sequence", labels=("a", "b", "c"), dropout=0.1, class_weights=(1.0, 2.0, 0.5))
WORDS = KmerConfig(k=5, width=8, alphabet=(1, 2, 3, 4), buckets=512, complement_map=COMPLEMENT)
KINDS = {
    "mamba2": (presets.mamba2(64, 2, d_state=16), HeadConfig(task="next_token")),
    "mamba": (presets.mamba(64, 2), HeadConfig(task="next_token")),
    "attention": (presets.attention(64, 2, num_heads=2), HeadConfig(task="next_token")),
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


def config(kind):
    backbone, head = KINDS[kind]
    return ModelConfig(vocab_size=5, backbone=dataclasses.replace(backbone, dropout=0.1), head=head)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_gradients_metrics_and_dropout_of_each_batch(kind):
    model, data, errors = seqmodels.build(config(kind), seed=0).cuda().train(), Two(KINDS[kind][1]), []
    graph, replayed = GradientGraphs(model), 0
    for step in range(12):
        batch = {name: tensor.cuda() for name, tensor in data.train_batch(step).items()}
        torch.manual_seed(step)
        found = graph(batch)
        gradients = [p.grad.clone() for p in model.parameters()] if found else []
        model.zero_grad()
        torch.manual_seed(step)
        loss, metrics = model.loss(batch)
        loss.backward()
        if found is not None:
            replayed += 1
            torch.testing.assert_close(found, {"loss": loss, **metrics}, rtol=1e-5, atol=1e-6, check_dtype=False)
            truth = [p.grad for p in model.parameters()]
            errors += [float((g - t).norm() / t.norm()) for g, t in zip(gradients, truth, strict=True) if t.any()]
        with torch.no_grad():  # a graph reads the weights as they are
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.zero_grad()
    assert replayed == 12 - 2 * WARM_UP
    assert max(errors) < 1e-5


def test_training_by_graphs_learns_as_training_without_them_does(tmp_path, monkeypatch):
    training = TrainingConfig(
        max_steps=60, validate_every=20, learning_rate=1e-3, device="cuda", ema_decay=0.9, precision="bf16"
    )
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
