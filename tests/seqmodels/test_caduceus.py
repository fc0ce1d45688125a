"""Caduceus' folders: the logits of its equations in NumPy, the fused branch's exchange of strands included."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import seqmodels
from seqmodels.caduceus import COMPLEMENT_MAP, save_caduceus
from seqmodels.config import HeadConfig, Mamba2Config, MambaConfig, ModelConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.presets import caduceus
from seqmodels.tasks.genomics import tokens

pytestmark = pytest.mark.usefixtures("one_thread")

D, N, TAPS, HEAD, EPSILON = 16, 4, 4, 8, 1e-5
MIXERS = {
    "mamba": {"d_state": N, "d_conv": TAPS, "expand": 2, "dt_rank": "auto", "dt_init": "random", "use_fast_path": True},
    "mamba2": {"layer": "Mamba2", "d_state": N, "d_conv": TAPS, "headdim": HEAD},
}
SHAPES = {
    "mamba": {
        "in_proj.weight": (4 * D, D), "conv1d.weight": (2 * D, 1, TAPS), "conv1d.bias": (2 * D,),
        "x_proj.weight": (1 + 2 * N, 2 * D), "dt_proj.weight": (2 * D, 1), "dt_proj.bias": (2 * D,),
        "A_log": (2 * D, N), "D": (2 * D,), "out_proj.weight": (D, 2 * D),
    },
    "mamba2": {
        "in_proj.weight": (4 * D + 2 * N + 2 * D // HEAD, D), "conv1d.weight": (2 * D + 2 * N, 1, TAPS),
        "conv1d.bias": (2 * D + 2 * N,), "dt_bias": (2 * D // HEAD,), "A_log": (2 * D // HEAD,), "D": (2 * D // HEAD,),
        "norm.weight": (2 * D,), "out_proj.weight": (D, 2 * D),
    },
}  # fmt: skip


def checkpoint(mixer, layers, *, rcps, fused=True, tied=True, labels=0, seed=0):
    """Random tensors (float32) under the names of the public models, and their config.json."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(0.5 if len(shape) == 1 else 0, 0.5, shape).astype(np.float32)

    inside, wrapped = ("submodule." if rcps else ""), ("submodule." if rcps and not fused else "")
    backbone = "caduceus.backbone."
    word = f"{backbone}embeddings.word_embeddings."
    tensors = {f"{word}{'embedding.' if rcps else ''}weight": draw(16, D)}
    for i in range(layers):
        tensors[f"{backbone}layers.{i}.norm.{wrapped}weight"] = draw(D)
        for direction in ("fwd", "rev"):
            for name, shape in SHAPES[mixer].items():
                if direction == "fwd" or not (tied and "_proj.weight" in name and name[0] in "io"):
                    tensors[f"{backbone}layers.{i}.mixer.{inside}mamba_{direction}.{name}"] = draw(*shape)
    tensors[f"{backbone}norm_f.{wrapped}weight"] = draw(D)
    if labels:
        tensors["score.weight"] = draw(labels, D)
    if rcps:
        tensors[f"{word}complement_map"] = np.array(COMPLEMENT_MAP)
        tensors |= {} if labels else {"lm_head.complement_map": np.array(COMPLEMENT_MAP)}
    config = {
        "model_type": "caduceus", "d_model": D, "n_layer": layers, "vocab_size": 16, "pad_vocab_size_multiple": 8,
        "ssm_cfg": MIXERS[mixer], "rms_norm": True, "fused_add_norm": fused, "residual_in_fp32": False,
        "norm_epsilon": EPSILON, "initializer_cfg": None, "bidirectional": True, "bidirectional_strategy": "add",
        "bidirectional_weight_tie": tied, "rcps": rcps, "transformers_version": "4.38.1",
        "complement_map": dict(sorted((str(i), c) for i, c in enumerate(COMPLEMENT_MAP))),  # "0", "1", "10", ...
    }  # fmt: skip
    return tensors, config


def write(folder, tensors, config):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# the equations, in float64


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight


def convolved(p, x):
    past = np.concatenate([np.zeros((TAPS - 1, x.shape[1])), x])
    return silu(sum(past[j : j + len(x)] * p["conv1d.weight"][:, 0, j] for j in range(TAPS)) + p["conv1d.bias"])


def mamba(p, x):
    """Gu and Dao (2023), algorithm 2: (l, d) -> (l, d)."""
    x, z = np.split(x @ p["in_proj.weight"].T, 2, 1)
    x = convolved(p, x)
    low, B, C = np.split(x @ p["x_proj.weight"].T, [1, 1 + N], 1)
    dt = softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    h, y = np.zeros((2 * D, N)), []
    for t in range(len(x)):
        h = np.exp(-dt[t, :, None] * np.exp(p["A_log"])) * h + (dt[t] * x[t])[:, None] * B[t]
        y.append(h @ C[t] + p["D"] * x[t])
    return (np.array(y) * silu(z)) @ p["out_proj.weight"].T


def mamba2(p, x):
    """Dao and Gu (2024), section 7: (l, d) -> (l, d)."""
    z, x, dt = np.split(x @ p["in_proj.weight"].T, [2 * D, 4 * D + 2 * N], 1)
    x, B, C = np.split(convolved(p, x), [2 * D, 2 * D + N], 1)
    x, dt = x.reshape(len(x), -1, HEAD), softplus(dt + p["dt_bias"])
    h, y = np.zeros((*x.shape[1:], N)), []
    for t in range(len(x)):
        decay = np.exp(-dt[t] * np.exp(p["A_log"]))[:, None, None]
        h = decay * h + (dt[t][:, None] * x[t])[..., None] * B[t]
        y.append(h @ C[t] + p["D"][:, None] * x[t])
    return norm(np.reshape(y, (len(x), -1)) * silu(z), p["norm.weight"]) @ p["out_proj.weight"].T


def flip(x):
    return x[::-1, ::-1]


class Reference:
    """Schiff et al. (2024): sections 3.1 (both directions, tied), 3.2 and 4 (both strands); of one sequence."""

    def __init__(self, tensors, config, mixer):
        self.tensors = {n.replace("submodule.", ""): t.astype(np.float64) for n, t in tensors.items()}
        self.config, self.mixer = config, {"mamba": mamba, "mamba2": mamba2}[mixer]
        (self.E,) = (t for n, t in self.tensors.items() if n.endswith(("embeddings.weight", "embedding.weight")))

    def both_directions(self, i, x):
        before = f"caduceus.backbone.layers.{i}.mixer.mamba_"
        p = {
            d: {n[len(before) + 4 :]: t for n, t in self.tensors.items() if n.startswith(before + d)}
            for d in ("fwd", "rev")
        }
        return self.mixer(p["fwd"], x) + self.mixer(p["fwd"] | p["rev"], x[::-1])[::-1]

    def weight(self, name):
        return self.tensors[f"caduceus.backbone.{name}.weight"]

    def one_strand(self, ids):
        x, residual = self.E[ids], 0
        for i in range(self.config["n_layer"]):
            residual = residual + x
            x = self.both_directions(i, norm(residual, self.weight(f"layers.{i}.norm")))
        return norm(residual + x, self.weight("norm_f"))

    def two_strands(self, ids):
        """(l, 2 d): the channels of one strand, and those of the other, reversed."""
        x = np.concatenate([self.E[ids], flip(self.E[np.array(COMPLEMENT_MAP)[ids[::-1]]])], 1)
        residual = np.zeros_like(x)
        for i in range(self.config["n_layer"]):
            first, second = np.split(x + residual, 2, 1)
            if self.config["fused_add_norm"]:
                first, second = second, first  # what the fused branch does
            residual = np.concatenate([first, second], 1)
            first, second = (norm(h, self.weight(f"layers.{i}.norm")) for h in (first, flip(second)))
            x = np.concatenate([self.both_directions(i, first), flip(self.both_directions(i, second))], 1)
        first, second = np.split(x + residual, 2, 1)
        final = self.weight("norm_f")
        return np.concatenate([norm(first, final), flip(norm(flip(second), final))], 1)

    def logits(self, ids):
        if not self.config["rcps"]:
            return self.one_strand(ids) @ self.E.T
        first, second = np.split(self.two_strands(ids), 2, 1)
        return first @ self.E.T + second[:, ::-1] @ self.E[list(COMPLEMENT_MAP)].T

    def label(self, ids, conjoin=False):
        if self.config["rcps"]:
            first, second = np.split(self.two_strands(ids), 2, 1)
            strands = (first, flip(second))
        else:
            other = np.array(COMPLEMENT_MAP)[ids[::-1]]
            strands = (self.one_strand(ids), self.one_strand(other)) if conjoin else (self.one_strand(ids),)
        return np.mean([h.mean(0) for h in strands], 0) @ self.tensors["score.weight"].T


def sequence(l, seed=0):
    return np.random.default_rng(seed).choice([3, 7, 8, 9, 10, 11], l)


CASES = [(m, n, r, f, t) for m in MIXERS for n, r, f, t in (
    (2, True, True, True), (3, True, True, True), (3, True, False, True), (2, True, True, False),
    (2, False, True, True),
)]  # fmt: skip


@pytest.mark.parametrize(("mixer", "layers", "rcps", "fused", "tied"), CASES)
@torch.no_grad()
def test_masked_token_logits_are_those_of_the_equations(mixer, layers, rcps, fused, tied, tmp_path):
    tensors, config = checkpoint(mixer, layers, rcps=rcps, fused=fused, tied=tied)
    model = seqmodels.load(write(tmp_path, tensors, config), dtype=torch.float64)
    ids = sequence(23)
    want = Reference(tensors, config, mixer).logits(ids)
    np.testing.assert_allclose(model(torch.from_numpy(ids)[None])[0][0].numpy(), want, rtol=1e-9, atol=1e-9)
    assert model.config.head.task == "masked_token"
    assert model.config.tokenizer == tokens.TOKENIZER
    if rcps:  # equivariance alone would not tell the branches apart
        other = Reference(tensors, config | {"fused_add_norm": not fused}, mixer).logits(ids)
        assert abs(other - want).max() > 0.1


@pytest.mark.parametrize(
    ("layers", "rcps", "fused"), [(2, True, True), (3, True, True), (2, True, False), (2, False, True)]
)
@torch.no_grad()
def test_labels_are_those_of_the_equations_under_lightnings_names_too(layers, rcps, fused, tmp_path):
    tensors, config = checkpoint("mamba", layers, rcps=rcps, fused=fused, labels=3)
    oracle, ids = Reference(tensors, config, "mamba"), sequence(17)
    batch = torch.from_numpy(ids)[None]
    config["id2label"] = {"0": "enhancer", "1": "promoter", "2": "neither"}
    model = seqmodels.load(write(tmp_path, tensors, config), dtype=torch.float64)
    assert model.config.head.labels == ("enhancer", "promoter", "neither")
    np.testing.assert_allclose(model(batch)[0].numpy(), oracle.label(ids), rtol=1e-9, atol=1e-9)
    tensors["decoder.0.output_transform.weight"] = tensors.pop("score.weight")
    tensors["decoder.0.output_transform.bias"] = np.array([1, -2, 3], dtype=np.float32)
    inner = {k: v for k, v in config.items() if k not in ("model_type", "id2label")} | {"vocab_size": 12}
    inner |= {
        "_target_": "caduceus.configuration_caduceus.CaduceusConfig",
        "bidirectional": "true,",
        "complement_map": None,
    }
    around = {"config": inner, "conjoin_train": False, "conjoin_test": True}  # a training run's model_config.json
    tensors = {("model." if "backbone" in n else "") + n: t for n, t in tensors.items()}
    model = seqmodels.load(write(tmp_path, tensors, around), dtype=torch.float64)
    want = oracle.label(ids, conjoin=True) + np.array([1, -2, 3])
    np.testing.assert_allclose(model(batch)[0].numpy(), want, rtol=1e-9, atol=1e-9)
    assert model.config.head.labels == ("0", "1", "2")
    conjoined = StrandsConfig(complement_map=COMPLEMENT_MAP, training=False)
    assert model.config.backbone.strands == (StrandsConfig(complement_map=COMPLEMENT_MAP) if rcps else conjoined)


@pytest.mark.parametrize(("mixer", "layers", "rcps", "fused", "tied"), CASES)
def test_what_was_read_is_written_as_it_was(mixer, layers, rcps, fused, tied, tmp_path):
    tensors, config = checkpoint(mixer, layers, rcps=rcps, fused=fused, tied=tied)
    save_caduceus(seqmodels.load(write(tmp_path, tensors, config)), tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    for name in written.keys() - tensors.keys():  # under their second names, too
        (first,) = (
            n for n in tensors if n in (name.replace("mamba_rev", "mamba_fwd"), name) or (
                name.endswith("lm_head.weight") and n.endswith(("embedding.weight", "embeddings.weight"))
            )
        )  # fmt: skip
        assert "lm_head" in name or ("_proj" in name and tied)
        np.testing.assert_array_equal(written[name], tensors[first])
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name], tensor)
    found = json.loads((tmp_path / "ours" / "config.json").read_text())
    theirs = config.keys() - {"ssm_cfg", "initializer_cfg", "transformers_version"}
    assert {k: found[k] for k in theirs} == {k: config[k] for k in theirs}
    assert found["ssm_cfg"].items() >= MIXERS[mixer].items()


@pytest.mark.parametrize(("strands", "targets"), [(None, "single"), (True, "multi"), (False, "regression")])
@pytest.mark.parametrize("mixer", [MambaConfig(d_state=N), Mamba2Config(d_state=N, head_dim=HEAD)])
@torch.no_grad()
def test_our_models_are_written_and_read_to_the_same_answer(mixer, strands, targets, tmp_path):
    head = HeadConfig(task="sequence", labels=("no", "yes"), targets=targets)
    read = None if strands is None else StrandsConfig(complement_map=COMPLEMENT_MAP, training=strands)
    backbone = dataclasses.replace(caduceus(D, 3, mixer=mixer), strands=read)
    config = ModelConfig(vocab_size=16, backbone=backbone, head=head, tokenizer=tokens.TOKENIZER)
    model = seqmodels.build(config, seed=0).eval()
    model.score.bias.zero_()
    again = seqmodels.load(save_caduceus(model, tmp_path))
    assert again.config == config
    ids = torch.from_numpy(sequence(19))[None]
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)


@torch.no_grad()
def test_tied_tensors_are_found_under_either_name_and_stray_ones_refused(tmp_path):
    tensors, config = checkpoint("mamba", 2, rcps=True)
    want = seqmodels.load(write(tmp_path, tensors, config))
    ids = torch.from_numpy(sequence(11))[None]
    renamed = {n.replace("mamba_fwd", "mamba_rev") if ".in_proj." in n else n: t for n, t in tensors.items()}
    renamed["lm_head.lm_head.weight"] = renamed.pop("caduceus.backbone.embeddings.word_embeddings.embedding.weight")
    twice = tensors | {n.replace("mamba_fwd", "mamba_rev"): t for n, t in tensors.items() if "_fwd.out_proj" in n}
    for given in (renamed, twice, {f"model.{n}": t for n, t in tensors.items()}):
        found = seqmodels.load(write(tmp_path, given, config))
        assert found.config == want.config
        torch.testing.assert_close(found(ids)[0], want(ids)[0], rtol=0, atol=0)
    stray = next(n for n in twice if n not in tensors)
    with pytest.raises(InputError, match=r"mamba_rev\.out_proj\.weight differs from that of the other direction"):
        seqmodels.load(write(tmp_path, twice | {stray: twice[stray] + 1}, config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bidirectional": False}, "bidirectional is False"),
        ({"bidirectional_strategy": "ew_multiply"}, "bidirectional_strategy is 'ew_multiply'"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"d_model": "wide"}, "d_model is 'wide'"),
        ({"n_layer": 3}, r"layers\.2\.\S+ is missing"),
        ({"norm_epsilon": []}, r"norm_epsilon is \[\]; expected a number"),
        ({"ssm_cfg": {"d_state": "many"}}, "d_state is 'many'; expected int"),
        ({"ssm_cfg": 3}, "ssm_cfg is 3; expected an object"),
        ({"ssm_cfg": {"expand": -1}}, "no model can be built as it says"),
        ({"d_model": 10**6}, r"has shape \(16, 16\); config.json makes it \(16, 1000000\)"),  # and takes no memory
        ({"complement_map": ["A", "T"]}, "complement_map is .*; expected an object"),
        ({"ssm_cfg": {"d_state": 8}}, r"A_log has shape \(32, 4\); config.json makes it \(32, 8\)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_field_in_the_way(change, named, tmp_path):
    tensors, config = checkpoint("mamba", 2, rcps=True)
    with pytest.raises(InputError, match=named):
        seqmodels.load(write(tmp_path, tensors, config | change))


def test_complement_maps_of_other_vocabularies_are_kept_and_wrong_ones_refused(tmp_path):
    tensors, config = checkpoint("mamba", 2, rcps=True)
    maps = [n for n in tensors if n.endswith("complement_map")]
    other = np.array([0, 1, 2, 6, 5, 4, 3, *range(7, 16)])
    model = seqmodels.load(write(tmp_path, tensors | dict.fromkeys(maps, other), config))
    assert model.config.backbone.strands.complement_map == tuple(other)
    assert model.config.tokenizer == {}
    with pytest.raises(InputError, match="maps of embedding and head differ"):
        seqmodels.load(write(tmp_path, tensors | {maps[0]: other}, config))
    with pytest.raises(InputError, match="complement_map has 16 ids"):
        seqmodels.load(write(tmp_path, tensors | dict.fromkeys(maps, other.clip(3)), config))


def test_what_the_format_cannot_say_is_not_written(tmp_path):
    head = HeadConfig(task="sequence", labels=("no", "yes"))
    classifier = seqmodels.build(ModelConfig(vocab_size=16, backbone=caduceus(D, 2), head=head))
    with pytest.raises(InputError, match="classifier has no bias"):
        save_caduceus(classifier, tmp_path)
    last = ModelConfig(
        vocab_size=16, backbone=caduceus(D, 2), head=HeadConfig(task="sequence", labels=("a",), pool="last")
    )
    with pytest.raises(InputError, match="by their mean"):
        save_caduceus(seqmodels.build(last), tmp_path)
    untied = ModelConfig(
        vocab_size=16, backbone=caduceus(D, 2, complement_map=COMPLEMENT_MAP), head=HeadConfig(task="masked_token"),
        tie_embeddings=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="is its embedding"):
        save_caduceus(seqmodels.build(untied), tmp_path)
    with pytest.raises(InputError, match="same bidirectional Mamba mixer"):
        save_caduceus(seqmodels.load("enterobacteria"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bases_have_the_ids_of_the_public_tokenizer():
    assert tokens.encode(b"ACGTN").tolist() == [7, 8, 9, 10, 11]
    ids = np.arange(16, dtype=np.uint8)
    assert tokens.reverse_complement(ids)[::-1].tolist() == [*range(7), 10, 9, 8, 7, *range(11, 16)]
