"""longseq: Mamba backbones for DNA and raw sound at lengths near a million tokens."""
