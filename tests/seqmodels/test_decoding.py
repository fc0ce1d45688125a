"""Decoding step by step equals the parallel pass, whatever way the states are kept."""

import pytest
import torch

import seqmodels
from seqmodels.backbone import OwnStack
from seqmodels.config import (
    AttentionConfig,
    BackboneConfig,
    HeadConfig,
    KmerConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    S4DConfig,
)
from seqmodels.decoding import Decoder, _map, _own_copy
from seqmodels.mixers import OwnState
from seqmodels.presets import multiscale

MIXERS = {
    "mamba": MambaConfig(d_state=8),
    "mamba-bias": MambaConfig(d_state=4, d_conv=3, bias=True, conv_bias=False),
    "mamba2": Mamba2Config(d_state=16, head_dim=8),
    "groups": Mamba2Config(d_state=16, head_dim=8, n_groups=2, D_has_head_dim=True, bias=True),
    "norm-before-gate": Mamba2Config(d_state=8, head_dim=16, n_groups=2, norm_before_gate=True, conv_bias=False),
    "no-norm": Mamba2Config(d_state=8, head_dim=16, gated_norm=False, dt_limit=(0.01, 0.2), d_conv=2),
}
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def language_model(*mixers, backbone=None, **options):
    backbone = backbone or BackboneConfig(d_model=32, layers=mixers, **options)
    model = seqmodels.build(ModelConfig(vocab_size=11, backbone=backbone, head=HeadConfig(task="next_token")), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(2)  # as large as trained ones, so that states and gates matter
    return model.eval()


MODELS = {name: lambda mixer=mixer: language_model(mixer, mixer) for name, mixer in MIXERS.items()}
MODELS["mixed"] = lambda: language_model(*MIXERS.values(), mlp_expand=2.0, residual_in_fp32=False)
MODELS["k-mers"] = lambda: language_model(MIXERS["mamba2"], kmer=KmerConfig(k=3, alphabet=(2, 3, 5, 7), width=6))
MODELS["s4d"] = lambda: language_model(S4DConfig(d_state=8), S4DConfig(d_state=3, initialisation="real"))
MODELS["attention"] = lambda: language_model(MIXERS["mamba2"], AttentionConfig(num_heads=2))
MODELS["u-net"] = lambda: language_model(
    backbone=multiscale((16, 24, 32), (1, 1, 2), (4, 3), outer=Mamba2Config(head_dim=8, d_state=4))
)


def tokens(b, l, device="cpu"):
    return torch.randint(0, 11, (b, l), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_steps_that_overwrite_their_states_equal_the_parallel_pass(name):
    model, ids = MODELS[name]().double(), tokens(2, 20)
    whole, _ = model(ids)
    _, state = model(ids[:, :7])
    state, found = _map(state, _own_copy), []
    kept = state.layers[0]
    for t in range(7, 20):
        logits, state = model(ids[:, t : t + 1], state)
        found.append(logits)
    assert isinstance(state.layers[0], OwnState)
    assert state.layers[0] is kept
    torch.testing.assert_close(torch.cat(found, 1), whole[:, 7:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("b", [1, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_gives_what_the_parallel_pass_gives(name, b, device):
    model, ids = MODELS[name]().to(device), tokens(b, 60, device)
    with torch.no_grad():
        whole, _ = model(ids)
        _, state = model(ids[:, :9])
    decoder = Decoder(model, state)
    for t in range(9, 60):
        torch.testing.assert_close(decoder(ids[:, t : t + 1]), whole[:, t], rtol=1e-4, atol=1e-4)


def test_on_a_cpu_the_stacks_of_a_u_net_are_compiled_once_all_have_run():
    decoder, ids = Decoder(MODELS["u-net"](), None), tokens(2, 12)
    for t in range(12):
        decoder(ids[:, t : t + 1])
    *fine, centre = decoder._state
    assert all(isinstance(part, OwnStack) for stage in fine for part in (stage.down, stage.up))
    assert isinstance(centre.down, OwnStack)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "u-net"])
def test_a_decoders_state_can_be_taken_out_and_goes_on_elsewhere(name, device):
    model, ids = MODELS[name]().to(device), tokens(2, 80, device)
    with torch.no_grad():
        whole, _ = model(ids)
        _, state = model(ids[:, :5])
    decoder = Decoder(model, state)
    for t in range(5, 50):
        decoder(ids[:, t : t + 1])
    state = decoder.state
    other = Decoder(model, state)
    for t in range(50, 80):  # the first one's going on does not disturb the state that was taken out
        for one in (decoder, other):
            torch.testing.assert_close(one(ids[:, t : t + 1]), whole[:, t], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        rest, _ = model(ids[:, 50:], state)
    torch.testing.assert_close(rest, whole[:, 50:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "u-net"])
def test_decoding_starts_from_nothing_too(name):
    model, ids = MODELS[name](), tokens(2, 10)
    decoder = Decoder(model, None)
    with torch.no_grad():
        whole, _ = model(ids)
    for t in range(10):
        torch.testing.assert_close(decoder(ids[:, t : t + 1]), whole[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("b", [1, 3, 64])
@pytest.mark.parametrize("name", [*MIXERS, "s4d", "u-net"])
def test_in_bfloat16_a_decoder_errs_no_more_than_the_parallel_pass(name, b):
    ids = tokens(b, 400, "cuda")
    model, exact = MODELS[name]().to("cuda", torch.bfloat16), MODELS[name]().to("cuda", torch.bfloat16).double()
    with torch.no_grad():
        want, whole = exact(ids)[0], model(ids)[0]
        _, state = model(ids[:, :9])
    decoder = Decoder(model, state)
    steps = torch.stack([decoder(ids[:, t : t + 1]).clone() for t in range(9, 400)], 1)
    error, allowed = (steps - want[:, 9:]).norm(), (whole - want)[:, 9:].norm()
    assert error <= 1.5 * allowed + 2**-9 * want.norm()
