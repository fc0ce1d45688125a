"""The U-Net of every mixer: after thousands of samples a step still gives what the whole pass gives, and coarse stages
run only when they are due."""

import pytest
import torch

import seqmodels
from seqmodels.config import AttentionConfig, HeadConfig, Mamba2Config, MambaConfig, ModelConfig, S4DConfig
from seqmodels.presets import multiscale

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = {
    "mamba2": Mamba2Config(d_state=8, head_dim=8),
    "mamba": MambaConfig(d_state=4),
    "s4d": S4DConfig(d_state=8),
    "s4d-real": S4DConfig(d_state=4, initialisation="real"),
    "window": AttentionConfig(num_heads=2, window=40),
    "attention": AttentionConfig(num_heads=2),
}
PAIRS = [("mamba2", "s4d"), ("mamba", "attention"), ("s4d", "mamba"), ("s4d-real", "window")]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH, FIRST = 10_240, 10_160
DEVICES = [pytest.param("cpu", FIRST, id="cpu"), pytest.param("cuda", 1, marks=GPU, id="cuda-all-steps")]


def u_net(outer, centre):
    backbone = multiscale((16, 16, 24), (1, 1, 1), (4, 4), outer=BLOCKS[outer], centre=BLOCKS[centre])
    config = ModelConfig(vocab_size=11, backbone=backbone, head=HeadConfig(task="next_token"))
    model = seqmodels.build(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("A_log", "A_imag")):
                parameter.mul_(2)  # as large as trained ones, so that states and gates matter
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("device", "first"), DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("outer", "centre"), PAIRS)
def test_after_ten_thousand_samples_chunks_and_steps_err_no_more_than_the_whole_pass(
    outer, centre, dtype, device, first
):
    model = u_net(outer, centre).to(device, dtype)
    exact = u_net(outer, centre).to(device, dtype).double()
    ids = torch.randint(0, 11, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    want, whole = exact(ids)[0], model(ids)[0]
    state, parts = None, []
    for part in ids[:, :first].tensor_split([1, 7, 5003], 1) if first > 1 else [ids[:, :1]]:
        logits, state = model(part, state)
        parts.append(logits)
    for t in range(first, LENGTH):
        logits, state = model(ids[:, t : t + 1], state)
        parts.append(logits)
    found = torch.cat(parts, 1)
    for part in (slice(0, 5003), slice(5003, FIRST), slice(FIRST, LENGTH)):
        allowed = (whole - want)[:, part].norm()
        assert (found - want)[:, part].norm() <= 2 * allowed + 1e-6 * want[:, part].norm()


@torch.no_grad()
@pytest.mark.parametrize("block", ["mamba2", "s4d", "attention"])
def test_a_coarse_stage_runs_once_per_step_of_its_own(block):
    model, runs = u_net(block, block), {"fine": 0, "middle": 0, "centre": 0}
    for name, stack in zip(runs, model.backbone.down, strict=True):
        norm = stack.layers[0].norm
        norm.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    state = None
    for t in range(70):
        _, state = model(torch.tensor([[t % 11]]), state)
    assert runs == {"fine": 70, "middle": 70 // 4, "centre": 70 // 16}
