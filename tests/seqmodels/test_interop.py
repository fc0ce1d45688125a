"""Hugging Face and state-spaces/mamba checkpoints: same logits and greedy tokens, or a refusal by field."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import seqmodels
from seqmodels.config import BackboneConfig, HeadConfig, Mamba2Config, MambaConfig, ModelConfig
from seqmodels.errors import InputError
from seqmodels.interop import save_huggingface

MAMBA = {
    "plain": {"hidden_size": 32, "state_size": 16, "time_step_rank": 2},
    "odd": {"hidden_size": 24, "state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7, "use_bias": True},
    "no conv bias, untied": {"hidden_size": 16, "state_size": 8, "use_conv_bias": False, "tie_word_embeddings": False},
    "bare residual, epsilon": {
        "hidden_size": 16,
        "state_size": 8,
        "residual_in_fp32": False,
        "layer_norm_epsilon": 1e-3,
    },
}
MAMBA2 = {
    "plain": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "groups": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 4, "state_size": 6, "chunk_size": 8},
    "odd": {"hidden_size": 20, "num_heads": 4, "head_dim": 15, "expand": 3, "n_groups": 2, "state_size": 7,
            "use_bias": True},
    "limits, tied, epsilon": {
        "hidden_size": 16, "num_heads": 2, "head_dim": 16, "n_groups": 2, "state_size": 8, "conv_kernel": 2,
        "time_step_limit": (0.01, 0.5), "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3, "use_conv_bias": False,
    },
}  # fmt: skip
CASES = [("mamba", name) for name in MAMBA] + [("mamba2", name) for name in MAMBA2]


def huggingface_model(kind, case, seed=0):
    """A transformers model with random weights, large enough that every parameter matters."""
    fields = (MAMBA if kind == "mamba" else MAMBA2)[case]
    classes = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    }
    make_config, make_model = classes[kind]
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None}
    model = make_model(make_config(vocab_size=29, num_hidden_layers=3, **special, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return model


@pytest.mark.parametrize(("kind", "case"), CASES)
@torch.no_grad()
def test_huggingface_folders_give_the_same_logits_and_greedy_tokens(kind, case, tmp_path):
    oracle = huggingface_model(kind, case)
    oracle.save_pretrained(tmp_path)
    model = seqmodels.load(tmp_path)
    ids = torch.randint(0, 29, (2, 37))
    logits, _ = model(ids)
    torch.testing.assert_close(logits, oracle(ids).logits, rtol=1e-4, atol=1e-4)
    if "limits" in case:
        return  # transformers leaves the step-size limit out of its decoding step
    prompt = ids[:1, :10]
    want = oracle.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    logits, state = model(prompt)
    tokens = [prompt]
    for _ in range(20):
        tokens.append(logits[:, -1:].argmax(-1))
        logits, state = model(tokens[-1], state)
    assert torch.cat(tokens, 1).tolist() == want.tolist()


@pytest.mark.parametrize(("kind", "case"), CASES)
@torch.no_grad()
def test_what_is_written_for_huggingface_is_read_by_it(kind, case, tmp_path):
    huggingface_model(kind, case).save_pretrained(tmp_path / "theirs")
    model = seqmodels.load(tmp_path / "theirs")
    if kind == "mamba2" and case.startswith("limits"):
        assert model.config.backbone.layers[0].dt_limit == (0.01, 0.5)
    save_huggingface(model, tmp_path / "ours")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.randint(0, 29, (2, 19))
    torch.testing.assert_close(model(ids)[0], oracle(ids).logits, rtol=1e-4, atol=1e-4)


def state_spaces_folder(folder, config, ssm_cfg, **fields):
    """A folder as state-spaces/mamba writes it: config.json with ssm_cfg, pytorch_model.bin with the tied head."""
    model = seqmodels.build(config, seed=1).eval()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    backbone = config.backbone
    values = {
        "d_model": backbone.d_model, "n_layer": len(backbone.layers), "vocab_size": 27, "ssm_cfg": ssm_cfg,
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return model


def flat(mixer, **fields):
    backbone = BackboneConfig(d_model=16, layers=(mixer, mixer), **fields)
    return ModelConfig(vocab_size=32, backbone=backbone, head=HeadConfig(task="next_token"))


@torch.no_grad()
def test_state_spaces_folders_are_read_with_their_ssm_cfg(tmp_path):
    cases = [
        (flat(MambaConfig(d_state=8)), {"d_state": 8}, {}),
        (
            flat(Mamba2Config(d_state=8, head_dim=8, n_groups=2, D_has_head_dim=True), mlp_expand=1.5),
            {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "D_has_hdim": True, "chunk_size": 64},
            {"d_intermediate": 24, "attn_layer_idx": [], "attn_cfg": {}},
        ),
    ]
    for i, (config, ssm_cfg, fields) in enumerate(cases):
        want = state_spaces_folder(tmp_path / str(i), config, ssm_cfg, **fields)
        got = seqmodels.load(tmp_path / str(i))
        ids = torch.randint(0, 27, (2, 15))
        torch.testing.assert_close(got(ids)[0], want(ids)[0])
        assert got.config.vocab_size == 32  # 27 padded to a multiple of 8


@pytest.mark.parametrize(
    ("ssm_cfg", "fields", "named"),
    [
        ({"layer": "Mamba3"}, {}, r"ssm_cfg.layer is 'Mamba3'"),
        ({"layer": "Mamba2", "d_ssm": 4}, {}, r"ssm_cfg.d_ssm = 4"),
        ({"nonsense": 1}, {}, r"ssm_cfg.nonsense"),
        ({}, {"rms_norm": False}, r"rms_norm is False"),
        ({}, {"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        ({"d_state": 4}, {}, r"A_log has shape \(32, 16\); config.json makes it \(32, 4\)"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_field_in_the_way(ssm_cfg, fields, named, tmp_path):
    state_spaces_folder(tmp_path, flat(MambaConfig()), ssm_cfg, **fields)
    with pytest.raises(InputError, match=named):
        seqmodels.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"model_type": "gpt2"}, "model_type is 'gpt2'")],
)
def test_a_huggingface_field_that_we_cannot_do_is_named(change, named, tmp_path):
    huggingface_model("mamba", "plain").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=named):
        seqmodels.load(tmp_path)


def test_a_model_that_huggingface_cannot_say_is_not_written(tmp_path):
    model = seqmodels.build(flat(Mamba2Config(head_dim=8, D_has_head_dim=True)))
    with pytest.raises(InputError, match="cannot say D_has_head_dim"):
        save_huggingface(model, tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_our_file_holds_every_tensor_once(tmp_path):
    model = seqmodels.build(flat(MambaConfig()), seed=0).eval()
    seqmodels.save(model, tmp_path, card="# A model")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert (tmp_path / "README.md").read_text() == "# A model"
    ids = torch.randint(0, 32, (1, 9))
    torch.testing.assert_close(seqmodels.load(tmp_path)(ids)[0], model(ids)[0], rtol=0, atol=0)
