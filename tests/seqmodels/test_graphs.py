"""Training by CUDA graphs makes the same model as training without them."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from seqmodels import graphs, presets
from seqmodels.config import HeadConfig, KmerConfig, ModelConfig
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


@pytest.mark.parametrize("kind", KINDS)
def test_training_by_graphs_makes_the_model_that_training_without_them_makes(tmp_path, kind, monkeypatch):
    backbone, head = KINDS[kind]
    config = ModelConfig(vocab_size=5, backbone=dataclasses.replace(backbone, dropout=0.1), head=head)
    training = TrainingConfig(
        max_steps=16, validate_every=8, learning_rate=1e-3, device="cuda", ema_decay=0.5, precision="bf16", keep="last"
    )
    replayed, made = [], {}
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph))[1])
    for most in (0, 1 << 18):
        monkeypatch.setattr(graphs, "MOST_TOKENS", most)
        folder = fit(config, Two(head), training, tmp_path / str(most))
        made[most] = load_file(folder / "model.safetensors")
        assert len(replayed) == (0 if most == 0 else 10)  # all but the first three of each shape
    (plain, graphed), moved = made.values(), 0.0
    for name, tensor in plain.items():
        torch.testing.assert_close(graphed[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, float(tensor.abs().max()))
    assert moved > 0.01
