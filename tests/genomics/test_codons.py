"""The codon-usage baseline: its sums against adding codon by codon, its exactness in windows, what it learns."""

import numpy as np
import pytest
import torch

from seqmodels.config import HeadConfig
from seqmodels.sweeps import windows
from seqmodels.tasks.genomics.codons import CodonModel, CodonModelConfig, strand_scores, words
from seqmodels.tasks.genomics.tokens import PAD, TOKENIZER, decode, encode, reverse_complement

pytestmark = pytest.mark.usefixtures("one_thread")


def random_tokens(n, seed=0):
    rng = np.random.default_rng(seed)
    return encode("".join(rng.choice(list("ACGTN"), n, p=[0.24] * 4 + [0.04])).encode())


def slowly(text, weights, half, k):
    """The best sum of each base, frame by frame and codon by codon."""

    def word(at):
        part = text[at : at + k]
        whole = len(part) == k and set(part) <= set("ACGT")
        return sum("ACGT".index(c) * 4 ** (k - 1 - j) for j, c in enumerate(part)) if whole else None

    text = f"NNN{text}NNN"  # codons over the ends, too
    stops, best = ("TAA", "TAG", "TGA"), np.full(len(text), -np.inf)
    for frame in range(3):
        starts = list(range(frame, len(text), 3))
        for i, at in enumerate(starts):
            chosen = [] if text[at : at + 3] in stops else [i]
            for step in (-1, 1):
                j = i + step
                if step == 1 and text[at : at + 3] in stops:
                    continue
                while 0 <= j < len(starts) and abs(j - i) <= half and text[starts[j] : starts[j] + 3] not in stops:
                    chosen.append(j)
                    j += step
            total = sum(weights[w] for j in chosen if (w := word(starts[j])) is not None)
            best[at : at + 3] = np.maximum(best[at : at + 3], total)
    return best[3:-3]


@pytest.mark.parametrize("k", [3, 6])
def test_scores_are_sums_over_neighbouring_codons_up_to_the_stop_codons(k):
    tokens, weights = random_tokens(301), np.random.default_rng(1).normal(size=4**k)
    found = strand_scores(tokens, weights, 7)
    np.testing.assert_allclose(found[:, 0], slowly(decode(tokens), weights, 7, k), atol=1e-9)
    np.testing.assert_allclose(found[::-1, 1], slowly(decode(reverse_complement(tokens)), weights, 7, k), atol=1e-9)
    assert words(encode(b"ACGTNA"), 3).tolist() == [0 * 16 + 4 + 2, 16 + 8 + 3, -1, -1, -1, -1]


@pytest.mark.parametrize("stranded", [False, True])
def test_strands_padding_and_windows_do_not_change_what_is_said(stranded):
    labels = ("CDS+", "CDS-", "background") if stranded else ("CDS", "background")
    head = HeadConfig(task="position", labels=labels, complement=(1, 0, 2) if stranded else ())
    model = CodonModel(CodonModelConfig(word=6, half=5, head=head, tokenizer=TOKENIZER))
    model.embedding.weight.copy_(torch.randn(4096, 1, generator=torch.Generator().manual_seed(0)))
    tokens = random_tokens(1000)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    logits = model(ids)[0]
    other = model(torch.from_numpy(reverse_complement(tokens).astype(np.int64))[None])[0]
    torch.testing.assert_close(other.flip(1)[..., list(head.complement or (0, 1))], logits)
    padded = model(torch.nn.functional.pad(ids, (0, 9), value=PAD), lengths=torch.tensor([1000]))[0]
    torch.testing.assert_close(padded[:, :1000], logits)
    parts = list(windows(model, [ids[:, :333], ids[:, 333:]], window=100, context=3 * 5 + 6))
    assert len(parts) > 10
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-5, atol=1e-5)
