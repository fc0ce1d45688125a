"""longseq: Mamba backbones for DNA and raw sound at lengths near a million tokens.

model = seqmodels.load("enterobacteria")       # or a folder, or owner/name on the Hugging Face Hub
logits = model(ids)                            # a classifier
logits, state = model(ids, state=None)         # a language model; hand the state to the next call
"""

import os

# Threads of torch wait for each other at every operation: not for long on cores that other programs use, too.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from seqmodels.checkpoint import load, save
from seqmodels.config import ModelConfig
from seqmodels.errors import InputError
from seqmodels.heads import LanguageModel, PositionClassifier, SequenceClassifier, build

__all__ = [
    "InputError",
    "LanguageModel",
    "ModelConfig",
    "PositionClassifier",
    "SequenceClassifier",
    "build",
    "load",
    "save",
]
