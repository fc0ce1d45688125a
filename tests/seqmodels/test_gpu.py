"""A GPU computes what a CPU computes in float32: losses, every gradient, and the shipped models' answers."""

import pytest
import torch

import seqmodels
from seqmodels import presets
from seqmodels.config import HeadConfig, ModelConfig

BACKBONES = {
    "mamba": lambda: presets.mamba(64, 2),
    "mamba2": lambda: presets.mamba2(64, 2, head_dim=32, d_state=16),
    "u-net": lambda: presets.multiscale_mamba2((32, 48, 64), (1, 1, 1), (4, 4), head_dim=16, d_state=8),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_gpu_and_a_cpu_agree_on_the_loss_and_every_gradient(name):
    config = ModelConfig(vocab_size=16, backbone=BACKBONES[name](), head=HeadConfig(task="next_token"))
    model = seqmodels.build(config, seed=0)
    ids = torch.randint(0, 16, (2, 1000), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
    want, _ = model.loss(batch)
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    got, _ = model.loss({key: value.cuda() for key, value in batch.items()})
    got.backward()
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    for parameter_name, parameter in model.named_parameters():
        error = (parameter.grad.cpu() - gradients[parameter_name]).norm()
        assert error <= 1e-4 * gradients[parameter_name].norm(), parameter_name


@torch.no_grad()
@pytest.mark.parametrize(("name", "tokens"), [("enterobacteria", range(1, 5)), ("spoken-digits", range(256))])
def test_a_shipped_model_answers_on_a_gpu_as_on_a_cpu(name, tokens):
    model = seqmodels.load(name)
    ids = torch.randint(tokens.start, tokens.stop, (2, 3000), generator=torch.Generator().manual_seed(0))

    def answers(device):
        found = model.to(device)(ids.to(device))
        return (found[0] if isinstance(found, tuple) else found).cpu()

    want, got = answers("cpu"), answers("cuda")
    torch.testing.assert_close(got.log_softmax(-1), want.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert (got - want).norm() <= 1e-5 * want.norm()
