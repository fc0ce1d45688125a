"""A GPU computes what a CPU computes: losses and every gradient, in float32."""

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
