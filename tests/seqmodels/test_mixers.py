"""The law of the house: whole sequence = chunks with handed-over state = single steps, for every mixer."""

import pytest
import torch

import seqmodels
from seqmodels.backbone import BackboneState, KmerEmbedding
from seqmodels.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalConfig,
    ConditionConfig,
    ConvConfig,
    HeadConfig,
    KmerConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    RNNConfig,
    S4DConfig,
)
from seqmodels.errors import InputError
from seqmodels.presets import multiscale

small = {"d_state": 4, "d_conv": 3}
CAUSAL = {
    "mamba": MambaConfig(**small, bias=True),
    "mamba2": Mamba2Config(**small, head_dim=8, n_groups=2, chunk_size=8, D_has_head_dim=True),
    "mamba2-limited": Mamba2Config(**small, head_dim=16, dt_limit=(0.01, 0.2), gated_norm=False, chunk_size=4),
    "s4d": S4DConfig(d_state=6),
    "s4d-real": S4DConfig(d_state=3, initialisation="real", discretisation="bilinear"),
    "attention": AttentionConfig(num_heads=2),
    "window": AttentionConfig(num_heads=4, window=5),
    "lstm": RNNConfig(cell="lstm"),
    "gru": RNNConfig(cell="gru", expand=2),
}
BIDIRECTIONAL = {
    "bi-mamba2": BidirectionalConfig(mixer=Mamba2Config(**small, head_dim=8)),
    "bi-mamba-tied": BidirectionalConfig(mixer=MambaConfig(**small), tie_projections=True),
    "bi-s4d": BidirectionalConfig(mixer=S4DConfig(d_state=4)),
    "bi-lstm": BidirectionalConfig(mixer=RNNConfig()),
    "cnn": ConvConfig(taps=5, dilation=2),
    "encoder": AttentionConfig(num_heads=2, causal=False),
    "encoder-window": AttentionConfig(num_heads=2, causal=False, window=6),
}
HYBRID = ("mamba", "window", "mamba2", "s4d", "lstm")


def language_model(*names, dtype=torch.float32, mlp=0.0, conditions=(), task="next_token"):
    mixers = {**CAUSAL, **BIDIRECTIONAL}
    backbone = BackboneConfig(d_model=16, layers=tuple(mixers[n] for n in names), mlp_expand=mlp)
    config = ModelConfig(vocab_size=11, backbone=backbone, head=HeadConfig(task=task), conditions=conditions)
    return enlarge(seqmodels.build(config, seed=0)).to(dtype).eval()


SWAPPED = (0, 1, 5, 3, 4, 2, 6, 9, 8, 7, 10)  # complements: 2 and 5, 7 and 9


def kmers(dtype=torch.float32, **options):
    kmer = KmerConfig(k=3, alphabet=(2, 3, 5, 7, 9), width=6, **options)
    backbone = BackboneConfig(d_model=16, layers=(CAUSAL["mamba2"], CAUSAL["mamba"]), kmer=kmer)
    config = ModelConfig(vocab_size=11, backbone=backbone, head=HeadConfig(task="next_token"))
    return enlarge(seqmodels.build(config, seed=0)).to(dtype).eval()


def u_net(dtype=torch.float32):
    backbone = multiscale((16, 24, 32), (1, 1, 2), (4, 3), outer=Mamba2Config(head_dim=8, d_state=4, chunk_size=8))
    config = ModelConfig(vocab_size=11, backbone=backbone, head=HeadConfig(task="next_token"))
    return enlarge(seqmodels.build(config, seed=0)).to(dtype).eval()


def enlarge(model):
    """Random weights as large as trained ones, so that states and gates matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(2)
    return model


def tokens(b, l, seed=0):
    return torch.randint(0, 11, (b, l), generator=torch.Generator().manual_seed(seed))


MODELS = {name: (lambda name=name: language_model(name, name)) for name in CAUSAL}
MODELS["hybrid"] = lambda: language_model(*HYBRID, mlp=2.0)
MODELS["u-net"] = u_net
MODELS["k-mers"] = kmers
MODELS["k-mers, canonical, hashed"] = lambda: kmers(buckets=50, complement_map=SWAPPED)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_equals_chunks_equals_steps(name):
    model, ids = MODELS[name]().double(), tokens(2, 53)
    whole, final = model(ids)
    state, chunks = None, []
    for piece in ids.split([1, 7, 2, 30, 13], dim=1):
        logits, state = model(piece, state)
        chunks.append(logits)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-9, atol=1e-9)
    state, steps = None, []
    for t in range(ids.shape[1]):
        logits, state = model(ids[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
    next_whole, _ = model(ids[:, :3], final)
    next_steps, _ = model(ids[:, :3], state)
    torch.testing.assert_close(next_steps, next_whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "u-net"])
@torch.no_grad()
def test_thousands_of_single_steps_do_not_drift_in_float32(name):
    model, exact, ids = MODELS[name](), MODELS[name]().double(), tokens(1, 3000, seed=1)
    whole, want = model(ids)[0], exact(ids)[0]
    state, steps = None, []
    for t in range(ids.shape[1]):
        logits, state = model(ids[:, t : t + 1], state)
        steps.append(logits)
    steps = torch.cat(steps, 1)
    # errors against float64: stepping may cost no more than twice what the parallel pass costs, at the end too
    assert (steps - want)[:, -500:].norm() <= 2 * (whole - want)[:, -500:].norm() + 1e-6 * want[:, -500:].norm()


@pytest.mark.parametrize("name", [*(m for m in MODELS if m != "u-net"), *BIDIRECTIONAL])
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(name):
    make = MODELS.get(name, lambda: language_model(name, name, task="masked_token"))
    model, ids = make().double(), tokens(3, 20)
    lengths = torch.tensor([20, 1, 13])
    padded, state = model(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        alone, own = model(ids[row : row + 1, :length])
        torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=1e-9, atol=1e-9)
        if name in BIDIRECTIONAL:
            continue
        # the state after padding is the state after the row's last real step
        more, _ = model(tokens(3, 4, seed=2), state)
        alone_more, _ = model(tokens(3, 4, seed=2)[row : row + 1], own)
        torch.testing.assert_close(more[row : row + 1], alone_more, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padding_never_reaches_a_real_step_of_the_u_net():
    model, ids = u_net(torch.float64), tokens(2, 40)
    changed = ids.clone()
    changed[1, 17:] = 3
    logits, other = model(ids)[0], model(changed, lengths=torch.tensor([40, 17]))[0]
    torch.testing.assert_close(other[0], logits[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other[1, :17], logits[1, :17], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*MODELS, *BIDIRECTIONAL])
@torch.no_grad()
def test_packed_sequences_give_what_each_gives_alone(name):
    make = MODELS.get(name, lambda: language_model(name, name, task="masked_token"))
    model = make().double()
    pieces = [tokens(1, n, seed=n) for n in ((12, 24, 36, 5) if name == "u-net" else (1, 9, 2, 17))]
    seq_idx = torch.cat([torch.full((1, p.shape[1]), i % 2) for i, p in enumerate(pieces)], 1)
    packed, state = model(torch.cat(pieces, 1), seq_idx=seq_idx)
    alone = [model(p) for p in pieces]
    torch.testing.assert_close(packed, torch.cat([logits for logits, _ in alone], 1), rtol=1e-9, atol=1e-9)
    if name not in (*BIDIRECTIONAL, "u-net"):  # the state that comes back is the last sequence's
        more, own = model(tokens(1, 4), state)[0], model(tokens(1, 4), alone[-1][1])[0]
        torch.testing.assert_close(more, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "s4d", "attention", "window", "lstm", "k-mers"])
@torch.no_grad()
def test_a_packed_row_with_padding_hands_on_its_last_sequence(name):
    model, ids = MODELS[name]().double(), tokens(2, 16)
    seq_idx = torch.tensor([[0] * 5 + [1] * 11, [0] * 2 + [1] * 6 + [2] * 8])
    _, state = model(ids, lengths=torch.tensor([9, 3]), seq_idx=seq_idx)
    more, _ = model(tokens(2, 4), state)
    for row, (start, stop) in enumerate([(5, 9), (2, 3)]):
        _, own = model(ids[row : row + 1, start:stop])
        want, _ = model(tokens(2, 4)[row : row + 1], own)
        torch.testing.assert_close(more[row : row + 1], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_no_position_depends_on_the_future(name):
    model = MODELS[name]().double()
    embedded = model.backbone.embedding.weight.detach()[tokens(1, 30)].requires_grad_()
    model.backbone.embedding.forward = lambda ids: embedded
    logits, _ = model(tokens(1, 30))
    for t in (0, 3, 11, 29):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embedded, retain_graph=True)
        # the FFT of a convolution spreads its rounding over all steps
        rounding = 1e-13 * gradient.abs().max() if "s4d" in name or name == "hybrid" else 0
        assert gradient[0, t + 1 :].abs().max() <= rounding if t < 29 else True
        assert gradient[0, t].abs().max() > 0


@pytest.mark.parametrize("k", [1, 4, 13])
@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("buckets", [None, 1000])
@torch.no_grad()
def test_words_find_the_rows_that_counting_in_python_finds(k, canonical, buckets):
    if buckets is None and k == 13:
        pytest.skip("a table of 5**13 words")
    letters, l = (2, 3, 5, 7, 9), 200
    config = KmerConfig(k=k, alphabet=letters, width=1, buckets=buckets, complement_map=SWAPPED if canonical else None)
    words = KmerEmbedding(config, 11, 1)
    rows = words.table.num_embeddings
    words.table.weight.copy_(torch.arange(rows)[:, None])
    words.proj.weight.fill_(1)
    ids = torch.tensor(letters)[torch.randint(0, 5, (l,), generator=torch.Generator().manual_seed(k))]
    ids[100] = 4  # no letter

    def number(word):
        digits = [letters.index(i) for i in word]
        value = sum(digit * 5**j for j, digit in enumerate(reversed(digits)))
        if canonical:
            turned = [letters.index(SWAPPED[i]) for i in reversed(word)]
            value = min(value, sum(digit * 5**j for j, digit in enumerate(reversed(turned))))
        if buckets is None:
            return value
        return (value * 0x9E3779B97F4A7C15 % 2**64 >> 32) % 2**31 % buckets

    found, _ = words(ids[None], None, None, None)
    ends = [ids[t - k + 1 : t + 1].tolist() if t >= k - 1 else [4] for t in range(l)]
    assert found[0, :, 0].long().tolist() == [rows - 1 if 4 in word else number(word) for word in ends]


def test_words_that_no_table_can_hold_are_refused_with_a_way_out():
    for options, message in (
        ({"k": 16}, r"kmer.k is 16: 4\*\*16 words are too many for a table; give kmer.buckets"),
        ({"k": 32, "buckets": 9}, "too many for a hash of 63 bits"),
        ({"k": 3, "buckets": 0}, "kmer.buckets is 0; expected 1 to"),
        ({"k": 3, "complement_map": (3, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10)}, "kmer.alphabet lacks the complement"),
    ):
        with pytest.raises(InputError, match=message):
            KmerEmbedding(KmerConfig(alphabet=(0, 1, 2, 5), width=1, **options), 11, 1)


@torch.no_grad()
def test_conditions_steer_and_not_given_is_a_value_of_its_own():
    digit = ConditionConfig(name="digit", values=("zero", "one"))
    model = language_model("mamba2", conditions=(digit,))
    ids = tokens(1, 5)
    zero, one, none = (model(ids, conditions=torch.tensor([[i]]))[0] for i in range(3))
    assert not torch.allclose(zero, one)
    torch.testing.assert_close(model(ids)[0], none)


def test_a_bidirectional_model_refuses_to_stream_or_to_predict_the_next_token():
    model = language_model("bi-mamba2", task="masked_token")
    _, state = model(tokens(1, 4))
    with pytest.raises(InputError, match="sees the whole sequence at once"):
        model(tokens(1, 4), state=BackboneState(None, (torch.zeros(1),)))
    assert state.layers == (None,)
    with pytest.raises(InputError, match="needs causal mixers"):
        language_model("bi-mamba2")


def test_s4d_begins_with_the_papers_poles():
    layers = tuple(S4DConfig(d_state=n, initialisation=kind) for n, kind in ((6, "lin"), (4, "inv"), (3, "real")))
    config = ModelConfig(
        vocab_size=4, backbone=BackboneConfig(d_model=2, layers=layers), head=HeadConfig(task="next_token")
    )
    lin, inv, real = (layer.mixer for layer in seqmodels.build(config).backbone.layers)
    for mixer in (lin, inv):
        torch.testing.assert_close(-mixer.A_log.exp(), torch.full_like(mixer.A_log, -0.5))
    torch.testing.assert_close(lin.A_imag, torch.pi * torch.arange(3.0).expand(2, -1))
    torch.testing.assert_close(inv.A_imag, torch.tensor([[4, 4 / 3]]).expand(2, -1) * 4 / torch.pi - 4 / torch.pi)
    torch.testing.assert_close(-real.A_log.exp(), -torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1))
    odd = BackboneConfig(d_model=2, layers=(S4DConfig(d_state=3),))
    with pytest.raises(InputError, match="d_state = 3 is odd"):
        seqmodels.build(ModelConfig(vocab_size=4, backbone=odd, head=HeadConfig(task="next_token")))


def test_a_head_size_that_does_not_fit_names_both_sides_and_a_way_out():
    backbone = BackboneConfig(d_model=100, layers=(Mamba2Config(),))
    with pytest.raises(InputError, match=r"2 \* 100 = 200 is not a multiple of head_dim = 64; try head_dim=8"):
        seqmodels.build(ModelConfig(vocab_size=4, backbone=backbone, head=HeadConfig(task="next_token")))


def test_packed_sequences_off_the_u_nets_grid_are_refused():
    with pytest.raises(InputError, match="multiples of its pooling, 12 steps"):
        u_net()(tokens(1, 24), seq_idx=torch.tensor([[0] * 5 + [1] * 19]))
