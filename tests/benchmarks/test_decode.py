"""benchmarks/decode.py: the Transformer that Mamba is timed against computes what it should."""

import pytest
import torch
import torch.nn.functional as F

import seqmodels
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.presets import attention


@torch.inference_mode()
def test_a_step_of_attention_on_a_cache_that_stays_where_it_is_gives_the_models_logits():
    from decode import CachedAttention

    config = ModelConfig(vocab_size=11, backbone=attention(16, 3, num_heads=2), head=HeadConfig(task="next_token"))
    model = seqmodels.build(config, seed=0).double().eval()
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    _, state = model(ids[:, :-1])
    wanted, _ = model(ids[:, -1:], state)
    for layer, cache in zip(model.backbone.layers, state.layers, strict=True):
        keys, values = (F.pad(cached, (0, 0, 0, 1), value=torch.nan) for cached in (cache.keys, cache.values))
        layer.mixer = CachedAttention(layer.mixer, keys, values)
    for _ in range(2):  # also when it is replayed
        assert torch.allclose(model(ids[:, -1:])[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [768, 2048])
def test_the_models_that_are_compared_have_as_many_parameters(width):
    from decode import MIXERS, VOCABULARY, backbone

    counts = []
    for mixer in MIXERS:
        with torch.device("meta"):
            config = ModelConfig(
                vocab_size=VOCABULARY, backbone=backbone(mixer, width, 24), head=HeadConfig(task="next_token")
            )
            counts.append(sum(parameter.numel() for parameter in seqmodels.build(config).parameters()))
    assert max(counts) < 1.03 * min(counts)
