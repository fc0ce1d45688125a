"""Both strands with one set of weights: whatever reads a sequence says the same of its reverse complement."""

import dataclasses

import pytest
import torch

import seqmodels
from seqmodels.backbone import Layer, recompute_layers
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
    StrandsConfig,
    from_dict,
    to_dict,
)
from seqmodels.errors import InputError
from seqmodels.presets import caduceus
from seqmodels.sequence_parallel import check_shareable
from seqmodels.sweeps import host_bytes, sweepable, two_sweeps, windows

pytestmark = pytest.mark.usefixtures("one_thread")

MAP = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)  # A 7, C 8, G 9, T 10 as in Caduceus
PS, CONJOINED = StrandsConfig(complement_map=MAP), StrandsConfig(complement_map=MAP, training=False)
MAMBA = MambaConfig(d_state=4)
MAMBA2 = Mamba2Config(d_state=4, head_dim=8, chunk_size=8)
STACKS = {
    "mamba": (BidirectionalConfig(mixer=MAMBA, tie_projections=True),) * 3,
    "mamba2": (BidirectionalConfig(mixer=MAMBA2, tie_projections=True),) * 2,
    "convolutions": (ConvConfig(taps=5), ConvConfig(taps=3, dilation=2), BidirectionalConfig(mixer=MAMBA2)),
    "s4d and lstm": (BidirectionalConfig(mixer=S4DConfig(d_state=4)), BidirectionalConfig(mixer=RNNConfig())),
    "one direction": (MAMBA2, BidirectionalConfig(mixer=MAMBA2), MAMBA, AttentionConfig(num_heads=2)),
}
LABELS = ("a", "b", "c")
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def build(stack, task="masked_token", strands=PS, dtype=torch.float64, conditions=(), pool="mean", **options):
    backbone = BackboneConfig(d_model=16, layers=STACKS[stack], strands=strands, **options)
    head = HeadConfig(task=task, labels=() if task == "masked_token" else LABELS, pool=pool)
    model = seqmodels.build(ModelConfig(vocab_size=12, backbone=backbone, head=head, conditions=conditions), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as large as trained ones, so that states matter
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(3)
    return model.to(dtype).eval()


def bases(b, l, seed=0):
    return torch.randint(7, 12, (b, l), generator=torch.Generator().manual_seed(seed))


def rc(ids):
    return torch.tensor(MAP)[ids.flip(1)]


def swapped(features):
    """What the features (b, l, 2 d) of a sequence say of its reverse complement."""
    given, other = features.flip(1).chunk(2, -1)
    return torch.cat([other, given], -1)


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_every_layer_is_equivariant_and_so_is_the_whole(stack):
    kmer = KmerConfig(k=3, alphabet=(7, 8, 9, 10), width=5)
    model, ids = build(stack, mlp_expand=1.0, kmer=kmer), bases(2, 37)
    seen = []
    for module in model.backbone.modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda *call: seen.append(call[-1][:2]))
    given, other = model.backbone(ids)[0], model.backbone(rc(ids))[0]
    layers = len(STACKS[stack])
    assert len(seen) == 2 * layers
    for one, two in zip(seen[:layers], seen[layers:], strict=True):
        for x, y in zip(one, two, strict=True):  # what a layer adds, and the residual stream
            assert x.shape == (4, 37, 16)
            assert not torch.allclose(x[:2], x[2:])
            torch.testing.assert_close(y, x.roll(2, 0), **EXACT)
    assert given.shape == (2, 37, 32)
    torch.testing.assert_close(other, swapped(given), **EXACT)


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_masked_token_logits_of_the_reverse_complement_are_reversed_and_complemented(stack):
    model, ids = build(stack), bases(2, 41)
    ids[:, ::5] = 3
    logits = model(ids)[0]
    torch.testing.assert_close(model(rc(ids))[0], logits.flip(1)[..., list(MAP)], **EXACT)
    assert not torch.allclose(logits, logits.flip(1))
    targets = torch.where(ids == 3, bases(2, 41, seed=1), -100)
    other = torch.where(rc(ids) == 3, rc(bases(2, 41, seed=1)), -100)
    torch.testing.assert_close(
        *(model.loss({"ids": i, "targets": t})[0] for i, t in ((ids, targets), (rc(ids), other)))
    )


@pytest.mark.parametrize("strands", [PS, CONJOINED])
@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_labels_of_bases_follow_the_bases(stack, strands):
    model, ids = build(stack, "position", strands), bases(2, 29)
    torch.testing.assert_close(model(rc(ids))[0], model(ids)[0].flip(1), **EXACT)


@pytest.mark.parametrize("pool", ["mean", "sqrt", "max", "last"])
@pytest.mark.parametrize("strands", [PS, CONJOINED])
@torch.no_grad()
def test_a_sequences_label_does_not_depend_on_the_strand_and_is_the_mean_of_what_each_strand_says(strands, pool):
    model, ids = build("mamba2", "sequence", strands, pool=pool), bases(3, 33)
    single = build("mamba2", "sequence", None, pool=pool)
    single.load_state_dict(model.state_dict())
    want = (single(ids) + single(rc(ids))) / 2
    assert not torch.allclose(single(ids), single(rc(ids)), atol=1e-3)
    torch.testing.assert_close(model(ids), want, **EXACT)
    torch.testing.assert_close(model(rc(ids)), want, **EXACT)


def test_conjoining_begins_after_training():
    model, ids = build("mamba", "sequence", CONJOINED), bases(2, 20)
    single = build("mamba", "sequence", None)
    torch.testing.assert_close(model.train()(ids), single.train()(ids))
    assert not torch.allclose(model.eval()(ids), single.eval()(ids))
    ps = build("mamba", "sequence", PS)
    torch.testing.assert_close(ps.train()(ids), ps.eval()(ids))


@pytest.mark.parametrize("stack", ["mamba", "mamba2"])
@torch.no_grad()
def test_padding_and_packed_neighbours_change_nothing(stack):
    model, ids = build(stack), bases(3, 20)
    lengths = torch.tensor([20, 1, 13])
    padded = model(torch.where(torch.arange(20) < lengths[:, None], ids, 4), lengths=lengths)[0]
    alone = [model(ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    for row, want in zip(padded, alone, strict=True):
        torch.testing.assert_close(row[: want.shape[1]], want[0], **EXACT)
    row = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
    number = torch.repeat_interleave(torch.arange(3), lengths)[None]
    more = torch.cat([row, torch.full((1, 5), 4)], 1)
    last = torch.cat([number, number[:, -1:].expand(1, 5)], 1)
    for packed in (model(row, seq_idx=number)[0], model(more, seq_idx=last, lengths=torch.tensor([34]))[0][:, :34]):
        torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


@pytest.mark.parametrize("pool", ["mean", "sqrt", "max", "last"])
@torch.no_grad()
def test_padded_and_packed_sequences_have_the_labels_of_each_alone(pool):
    model, ids = build("mamba2", "sequence", pool=pool), bases(3, 20)
    lengths = torch.tensor([7, 11, 2])
    want = torch.cat([model(ids[i : i + 1, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(model(ids, lengths=lengths), want, rtol=1e-6, atol=1e-7)
    row = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
    number = torch.repeat_interleave(torch.arange(3), lengths)[None]
    torch.testing.assert_close(model(row, seq_idx=number)[0], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("stack", [stack for stack in STACKS if stack != "convolutions"])
@torch.no_grad()
def test_two_sweeps_of_each_strand_are_one_pass(stack, chunk):
    kmer = KmerConfig(k=4, alphabet=(7, 8, 9, 10), width=5)
    plus = ConditionConfig(name="kind", values=("x", "y"))
    model, ids = build(stack, "position", kmer=kmer, conditions=(plus,)), bases(2, 29)
    if stack == "one direction":  # an attention's state grows, but it is one
        assert sweepable(model.backbone)
    given = torch.tensor([[0], [1]])
    want = model.backbone(ids, conditions=given)[0]
    swept = list(two_sweeps(model.backbone, ids.to(torch.uint8), chunk=chunk, conditions=given))
    assert [x.shape[1] for x in swept] == [min(chunk, 29 - start) for start in range(0, 29, chunk)]
    torch.testing.assert_close(torch.cat(swept, 1), want, **EXACT)


@pytest.mark.parametrize("pool", ["mean", "sqrt", "max", "last"])
@torch.no_grad()
def test_a_record_in_sweeps_or_in_one_window_has_the_label_of_one_pass(pool):
    model, ids = build("mamba", "sequence", CONJOINED, pool=pool), bases(1, 50)
    want = model(ids)
    for features in (two_sweeps(model.backbone, ids, chunk=16), windows(model.backbone, [ids], window=64, context=8)):
        torch.testing.assert_close(model.classify(model.pool(features)), want, rtol=1e-6, atol=1e-7)
    one = build("mamba", "sequence", None, pool=pool)
    assert host_bytes(model.backbone, 1000, 50) - 1000 == 2 * (host_bytes(one.backbone, 1000, 50) - 1000)


def test_gradients_do_not_depend_on_the_strand_and_recomputation_keeps_them():
    def gradients(ids, recompute=False):
        model = build("one direction", "sequence", mlp_expand=1.0).train()
        if recompute:
            recompute_layers(model, 8)
        model.loss({"ids": ids, "targets": torch.tensor([0, 2])})[0].backward()
        return [p.grad for p in model.parameters()]

    ids = bases(2, 24)
    want = gradients(ids)
    for found in (gradients(rc(ids)), gradients(ids, recompute=True)):
        torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9)


def test_the_configuration_survives_json_and_a_preset_says_it():
    backbone = caduceus(32, 2, complement_map=MAP, mixer=MAMBA2)
    config = ModelConfig(vocab_size=12, backbone=backbone, head=HeadConfig(task="masked_token"))
    assert from_dict(to_dict(config)) == config
    assert config.backbone.strands == PS
    assert caduceus(32, 2).strands is None
    model = seqmodels.build(ModelConfig(vocab_size=16, backbone=caduceus(118, 4), head=HeadConfig(task="masked_token")))
    assert sum(p.numel() for p in model.parameters()) == 470_702  # as the paper's


def test_what_both_strands_cannot_do_is_told():
    config = build("mamba").config
    with pytest.raises(InputError, match="causal mixers and one strand"):
        seqmodels.build(dataclasses.replace(config, head=HeadConfig(task="next_token")))
    with pytest.raises(InputError, match=r"set strands\.training"):
        build("mamba", strands=CONJOINED)
    for bad in (MAP[:-1], (*MAP[:7], 8, 9, 10, 7, 11), (*MAP[:-1], 12)):
        with pytest.raises(InputError, match="complement_map has"):
            build("mamba", strands=StrandsConfig(complement_map=bad))
    model = build("mamba")
    state = model(bases(1, 4))[1]
    with pytest.raises(InputError, match="cannot continue from a state"):
        model(bases(1, 4), state)
    with pytest.raises(InputError, match="both strands needs the whole sequence"):
        check_shareable(model)
    with pytest.raises(InputError, match="cannot read in chunks"):
        build("mamba", "sequence").read(bases(1, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", [MambaConfig(), Mamba2Config(d_state=64)])
def test_on_a_gpu_both_strands_are_those_of_float64_and_agree(mixer, dtype):
    head = HeadConfig(task="sequence", labels=LABELS)
    config = ModelConfig(vocab_size=12, backbone=caduceus(64, 4, complement_map=MAP, mixer=mixer), head=head)
    model, ids = seqmodels.build(config, seed=0).to("cuda", dtype).eval(), bases(2, 3000)
    exact = seqmodels.build(config, seed=0).to(dtype).double().eval()
    narrow = seqmodels.build(config, seed=0).to(dtype).eval()  # the same mathematics on a CPU
    lengths = torch.tensor([3000, 1234])
    with torch.no_grad():
        want = exact(ids, lengths=lengths)
        allowed = 2 * (narrow(ids, lengths=lengths).double() - want).norm() + 1e-5 * want.norm()
        found = model(ids.cuda(), lengths=lengths.cuda()).cpu().double()
        assert (found - want).norm() <= allowed
        alone = torch.cat([model(rc(ids[i : i + 1, :n]).cuda()) for i, n in enumerate(lengths)]).cpu().double()
        assert (alone - want).norm() <= allowed
        swept = model.pool(two_sweeps(model.backbone, ids[:1].to(torch.uint8), chunk=700))
        assert (model.classify(swept).cpu().double() - want[:1]).norm() <= allowed
    gradients = []
    for network, given in ((exact, ids), (model, ids.cuda()), (model, rc(ids).cuda())):
        network.zero_grad()
        network.loss({"ids": given, "targets": torch.tensor([0, 2], device=given.device)})[0].backward()
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in network.parameters()]))
    bound = (0.05 if dtype == torch.bfloat16 else 1e-3) * gradients[0].norm()
    assert (gradients[1] - gradients[0]).norm() <= bound
    assert (gradients[2] - gradients[0]).norm() <= bound
