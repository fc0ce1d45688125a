"""Recomputation changes memory, not gradients."""

import dataclasses

import pytest
import torch

import seqmodels
from seqmodels import presets
from seqmodels.backbone import recompute_layers
from seqmodels.config import HeadConfig, Mamba2Config, ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STACKS = {
    "mamba": presets.mamba(16, 2, d_state=4),
    "mamba2": dataclasses.replace(presets.mamba2(16, 2, head_dim=8, d_state=4), mlp_expand=2.0),
    "multiscale": presets.multiscale((16, 24), (1, 1), (4,), outer=Mamba2Config(d_state=4, head_dim=8)),
    "bidirectional": presets.mamba2(16, 2, head_dim=8, d_state=4, bidirectional=True),
    "lstm": presets.lstm(16, 2),
}


def build(stack, dropout=0.0):
    backbone = dataclasses.replace(STACKS[stack], dropout=dropout)
    task = "masked_token" if stack == "bidirectional" else "next_token"
    config = ModelConfig(vocab_size=5, backbone=backbone, head=HeadConfig(task=task))
    return seqmodels.build(config, seed=0).double()


def batch_of(kind):
    rng = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(5, (2, 96), generator=rng) for name in ("ids", "targets")}
    if kind == "padded":
        batch["lengths"] = torch.tensor([96, 13])  # the second row ends in the first stretch
        batch["targets"][1, 13:] = -100
    if kind == "packed":  # sequences end within stretches, at their borders, and cover one whole
        ends = torch.tensor([[32, 40, 64, 96], [7, 16, 48, 90]])
        batch["seq_idx"] = (torch.arange(96) >= ends[:, :, None]).sum(1)
    return batch


def kept_for_the_gradient(model, batch):
    """Loss, gradients, and the number of elements that autograd keeps (weights left out)."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(batch)[0]
        count = sum(tensor.numel() for tensor in kept.values())
    return loss, torch.autograd.grad(loss, list(model.parameters())), count


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("stack", ["mamba", "mamba2"])
def test_a_sequence_recomputed_in_stretches_has_the_gradients_of_the_whole(stack, kind):
    model, batch = build(stack), batch_of(kind)
    loss, gradients, kept = kept_for_the_gradient(model, batch)
    recompute_layers(model, tokens=2 * 16)
    again, recomputed, less = kept_for_the_gradient(model, batch)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(recomputed, gradients, rtol=1e-9, atol=1e-12)
    assert less < kept / 2


@pytest.mark.parametrize("stack", ["multiscale", "bidirectional", "lstm"])
def test_stacks_that_cannot_be_read_in_stretches_and_unets_have_the_same_gradients_too(stack):
    model, batch = build(stack), batch_of("whole")
    loss, gradients, kept = kept_for_the_gradient(model, batch)
    recompute_layers(model, tokens=2 * 24)
    again, recomputed, less = kept_for_the_gradient(model, batch)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(recomputed, gradients, rtol=1e-9, atol=1e-12)
    assert less < kept


@pytest.mark.parametrize("stack", ["mamba2", "multiscale"])
def test_layers_computed_again_one_by_one_have_the_same_gradients_to_the_bit_also_under_dropout(stack):
    model, batch = build(stack, dropout=0.5), batch_of("whole")
    loss, gradients, kept = kept_for_the_gradient(model, batch)
    recompute_layers(model)
    again, recomputed, less = kept_for_the_gradient(model, batch)
    torch.testing.assert_close((again, *recomputed), (loss, *gradients), rtol=0, atol=0)
    entering = 2 * batch["ids"].numel() * 16 * len(STACKS["mamba2"].layers)  # which checkpoints hold themselves
    assert less + entering < kept / 2


def test_under_dropout_a_stretch_is_computed_again_with_the_same_mask():
    """The gradient is that of the loss that was computed: it predicts the loss a small step away."""
    model, batch = build("mamba2", dropout=0.5), batch_of("whole")
    recompute_layers(model, tokens=2 * 16)
    _, gradients, _ = kept_for_the_gradient(model, batch)
    step = 1e-6 / sum(g.square().sum() for g in gradients).sqrt()
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p += sign * step * g
            torch.manual_seed(0)
        with torch.enable_grad():  # so that it is read in stretches, with their masks
            slopes.append(sign * model.loss(batch)[0].item())
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= sign * step * g
    expected = 2e-6 * sum(g.square().sum() for g in gradients).sqrt()
    torch.testing.assert_close(torch.tensor(sum(slopes)).double(), expected, rtol=1e-4, atol=0)
