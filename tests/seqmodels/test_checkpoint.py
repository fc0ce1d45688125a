"""Checkpoints: exact round trip for every model, and bad ones refused by name, never unpickled."""

import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import seqmodels
from seqmodels import presets
from seqmodels.config import ConditionConfig, HeadConfig, Mamba2Config, ModelConfig, from_dict, to_dict
from seqmodels.errors import InputError

SEQUENCE = HeadConfig(task="sequence", labels=("a", "b"))
MODELS = {
    "mamba": ModelConfig(vocab_size=9, backbone=presets.mamba(16, 2), head=HeadConfig(task="next_token")),
    "bidirectional": ModelConfig(
        vocab_size=9, backbone=presets.mamba2(16, 2, head_dim=8, bidirectional=True), head=SEQUENCE
    ),
    "attention": ModelConfig(vocab_size=9, backbone=presets.attention(16, 1, num_heads=2, window=3), head=SEQUENCE),
    "lstm": ModelConfig(
        vocab_size=9, backbone=presets.lstm(16, 1), head=HeadConfig(task="position", labels=("x", "y", "z"))
    ),
    "u-net": ModelConfig(
        vocab_size=9,
        backbone=presets.multiscale((16, 24), (1, 1), (4,), outer=Mamba2Config(head_dim=8, d_state=4)),
        head=HeadConfig(task="next_token"),
        conditions=(ConditionConfig(name="digit", values=("zero", "one")),),
        tokenizer={"type": "mu_law", "sample_rate": 8000},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saving_and_loading_changes_no_bit(name, tmp_path):
    model = seqmodels.build(MODELS[name], seed=3).eval()
    seqmodels.save(model, tmp_path)
    loaded = seqmodels.load(tmp_path)
    assert loaded.config == model.config
    ids = torch.randint(0, 9, (2, 21))
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=0)
    assert not loaded.training


def test_a_configuration_survives_json():
    for config in MODELS.values():
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (seqmodels.build(MODELS["mamba"], seed=s) for s in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    pairs = [(dict(a.named_parameters())[n], p, dict(c.named_parameters())[n]) for n, p in b.named_parameters()]
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert any(not torch.equal(y, z) for _, y, z in pairs)


@pytest.fixture
def folder(tmp_path):
    return seqmodels.save(seqmodels.build(MODELS["bidirectional"], seed=0), tmp_path / "model")


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_surplus_or_wrong_shaped_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.update({"score.bias": torch.zeros(3)}))
    with pytest.raises(InputError, match=r"score.bias has shape \(3,\); config.json makes it \(2,\)"):
        seqmodels.load(folder)
    edit_tensors(folder, lambda t: t.pop("score.bias"))
    with pytest.raises(InputError, match=r"tensor score.bias is missing \(1 in all\)"):
        seqmodels.load(folder)
    edit_tensors(folder, lambda t: t.update({"score.bias": torch.zeros(2), "extra": torch.zeros(1)}))
    with pytest.raises(InputError, match="tensor extra is not part of the configured model"):
        seqmodels.load(folder)


class Evil:
    """An object whose unpickling would write a file."""

    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_a_pickle_is_refused_and_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="refused, not a plain file of tensors"):
        seqmodels.load(folder)
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="refused"):
        seqmodels.load(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="not a readable safetensors file"):
        seqmodels.load(folder)
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["head"].update(pool="median"), r"model.head.pool is 'median'; expected one of 'last', 'mean'"),
        (lambda m: m["backbone"].update(d_modle=3), r"model.backbone.d_modle is not a field of BackboneConfig"),
        (lambda m: m.pop("vocab_size"), r"model.vocab_size is missing"),
        (lambda m: m.update(vocab_size="9"), r"model.vocab_size is '9'; expected int"),
        (lambda m: m["backbone"]["layers"][0].update(type="Mamba9"), r"layers\[0\].type is 'Mamba9'"),
        (lambda m: m["backbone"].update(layers=7), r"layers is 7; expected a list"),
    ],
)
def test_a_bad_configuration_is_refused_by_field(folder, change, named):
    values = json.loads((folder / "config.json").read_text())
    change(values["model"])
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=named):
        seqmodels.load(folder)


def test_what_is_no_checkpoint_is_refused_in_one_line(folder, tmp_path):
    for text, named in [
        ("{", "not a readable JSON file"),
        ("[]", "expected a JSON object"),
        ("{}", "model_type is None"),
    ]:
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=named) as caught:
            seqmodels.load(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no config.json in this folder"):
        seqmodels.load(tmp_path)
    with pytest.raises(InputError, match="no such checkpoint"):
        seqmodels.load("nonsense")


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["mamba"].vocab_size = 3
