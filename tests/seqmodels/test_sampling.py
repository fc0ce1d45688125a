"""Laws of sampling, on a GPU also of its replayed graphs."""

import math

import pytest
import torch

import seqmodels
from seqmodels.config import ConditionConfig, HeadConfig, Mamba2Config, ModelConfig
from seqmodels.errors import InputError
from seqmodels.presets import multiscale
from seqmodels.sampling import DRAWS, Sampler, Sampling, prefill

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
OPTIONS = [{}, {"guidance": 1.5}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}]


@pytest.fixture(params=["cpu", GPU])
def model(request, one_thread):
    config = ModelConfig(
        vocab_size=40, backbone=multiscale((16, 24), (1, 1), (4,), outer=Mamba2Config(head_dim=8, d_state=4)),
        head=HeadConfig(task="next_token"), conditions=(ConditionConfig(name="word", values=("yes", "no")),),
    )  # fmt: skip
    return seqmodels.build(config, seed=0).to(request.param).eval()


def sampler(model, rows=3, **options):
    told = torch.tensor([[1]] * rows + [[2]] * rows * ("guidance" in options), device=model.device)
    after = prefill(model, [torch.arange(5).expand(len(told), -1)], told)
    seeds = [(7, i) for i in range(rows)]
    return Sampler(model, after, seeds=seeds, sampling=Sampling(**options), barred=[0], conditions=told)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_token_has_the_log_probability_that_the_parallel_pass_gives_it(model, options):
    tokens, nats = sampler(model, **options)(150)
    ids = torch.cat([torch.arange(5, device=model.device).expand(3, -1), tokens], 1)
    with torch.no_grad():
        logits, _ = model(ids, conditions=torch.ones(3, 1, dtype=torch.int64, device=model.device))
    expected = logits[:, 4:-1].log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
    assert (tokens != 0).all()


def test_steps_are_the_same_however_they_are_grouped_and_across_the_buffers(model):
    whole, _ = sampler(model)(DRAWS + 20)
    one = sampler(model)
    parts = [one(steps)[0] for steps in (1, 30, DRAWS - 33, 4, 18)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_going_on_from_what_was_kept_is_going_on(model):
    one = sampler(model, guidance=1.5)
    one(37)
    kept = one.keep()
    rest, _ = one(50)
    told = torch.tensor([[1]] * 3 + [[2]] * 3, device=model.device)
    options = {"seeds": [(7, i) for i in range(3)], "barred": [0], "conditions": told}
    again, _ = Sampler(model, kept, sampling=Sampling(guidance=1.5), **options)(50)
    assert (again == rest).float().mean() > (0.999 if model.device.type == "cpu" else 0.9)
    with pytest.raises(InputError, match="has 6 rows"):
        Sampler(model, kept, sampling=Sampling(), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_a_gpu_no_step_waits_for_the_device(options):
    backbone = multiscale((64, 64, 64), (1, 1, 1), (4, 4), outer=Mamba2Config(d_state=64))
    words = (ConditionConfig(name="word", values=("yes", "no")),)
    head = HeadConfig(task="next_token")
    config = ModelConfig(vocab_size=258, backbone=backbone, head=head, conditions=words)
    one = sampler(seqmodels.build(config, seed=0).to("cuda", torch.bfloat16).eval(), **options)
    one(40)  # the first period compiles, the second records
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, nats = one(200)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert nats.isfinite().all()
    assert abs(float(nats.mean()) / math.log(2)) < 12
