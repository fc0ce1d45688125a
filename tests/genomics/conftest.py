import pytest

import seqmodels
from seqmodels import presets
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.tasks.genomics.tokens import TOKENIZER


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """A function that saves a small random classifier and returns its folder."""

    def make(labels=("left", "right"), *, d_model=16, n_layer=2, d_state=8, bidirectional=False, **changes):
        backbone = presets.mamba2(
            d_model, n_layer, d_state=d_state, head_dim=d_model, chunk_size=16, bidirectional=bidirectional
        )
        head = HeadConfig(task="sequence", labels=labels)
        config = {"vocab_size": 16, "backbone": backbone, "head": head, "tokenizer": TOKENIZER, **changes}
        folder = tmp_path_factory.mktemp("model")
        return str(seqmodels.save(seqmodels.build(ModelConfig(**config), seed=1), folder))

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """A small random Mamba-2 classifier."""
    return make_model()
