"""Laws of prompted generation."""

import math

import numpy as np
import pytest
import torch

from seqmodels.config import ConditionConfig, HeadConfig, Mamba2Config, ModelConfig, MultiscaleConfig, StageConfig
from seqmodels.errors import InputError
from seqmodels.heads import build
from seqmodels.kernels.draw import draw
from seqmodels.sampling import Sampling, prefill
from seqmodels.tasks.audio.datasets import lay_out
from seqmodels.tasks.audio.evaluate import score
from seqmodels.tasks.audio.generate import generate, label_ids, prompt_labels
from seqmodels.tasks.audio.waveform import MuLaw

MU_LAW = MuLaw()
CONDITIONS = (
    ConditionConfig(name="digit", values=("zero", "one", "seven")),
    ConditionConfig(name="speaker", values=("ann", "theo")),
)


def tiny_config(conditions=CONDITIONS):
    """A U-Net of three stages, a few thousand weights."""
    mixer = Mamba2Config(d_state=8, head_dim=8, chunk_size=16)
    stages = (
        StageConfig(d_model=16, down=(mixer,), up=(mixer,), pool=4),
        StageConfig(d_model=16, down=(mixer,), up=(mixer,), pool=2),
        StageConfig(d_model=16, down=(mixer,)),
    )
    return ModelConfig(
        vocab_size=MU_LAW.vocab_size,
        backbone=MultiscaleConfig(stages=stages),
        head=HeadConfig(task="next_token"),
        tie_embeddings=False,
        conditions=conditions,
        tokenizer=MU_LAW.to_dict(),
    )


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return build(tiny_config(), seed=0).eval()


def with_end_bias(model, bias):
    """The same model, more (or less) likely to end, told through its output weights."""
    changed = build(model.config, seed=0).eval()
    changed.load_state_dict(model.state_dict())
    original = changed.forward

    def forward(*arguments, **options):
        logits, state = original(*arguments, **options)
        logits = logits.clone()
        logits[..., MU_LAW.eos] += bias
        return logits, state

    changed.forward = forward
    return changed


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, samples).clip(-1, 1).astype(np.float32)


def assert_same_item(a, i, b, j):
    np.testing.assert_array_equal(a.tokens[i], b.tokens[j])
    np.testing.assert_array_equal(a.samples[i], b.samples[j])


def test_the_same_seed_gives_the_same_sound_and_another_seed_another(model):
    first, again = (generate(model, seconds=0.05, seed=3) for _ in range(2))
    assert_same_item(first, 0, again, 0)
    assert not np.array_equal(first.tokens[0], generate(model, seconds=0.05, seed=4).tokens[0])


def test_an_item_does_not_depend_on_how_many_are_made_with_it(model):
    many = generate(model, seconds=0.05, number=5, seed=1)
    for number in (1, 3):
        few = generate(model, seconds=0.05, number=number, seed=1)
        for item in range(number):
            assert_same_item(few, item, many, item)
    assert len({tuple(tokens) for tokens in many.tokens}) == 5


def test_items_decoded_together_are_the_same_up_to_rounding(model):
    apart, together = (generate(model, seconds=0.05, number=3, batch=batch, seed=1) for batch in (1, 2))
    for item in range(3):
        np.testing.assert_array_equal(apart.tokens[item], together.tokens[item])
        assert apart.bits_per_sample[item] == pytest.approx(together.bits_per_sample[item], abs=1e-4)


def test_a_longer_limit_only_goes_on_from_the_shorter_one(model):
    short, long = generate(model, seconds=0.02), generate(model, seconds=0.06)
    np.testing.assert_array_equal(long.tokens[0][: len(short.tokens[0])], short.tokens[0])


def test_labels_change_what_is_made(model):
    seven, one = (generate(model, seconds=0.05, labels={"digit": word}) for word in ("seven", "one"))
    assert not np.array_equal(seven.tokens[0], one.tokens[0])


def test_only_samples_come_out_and_never_more_than_the_limit(model):
    made = generate(model, seconds=0.11, number=3, batch=2)
    for samples, tokens in zip(made.samples, made.tokens, strict=True):
        assert len(samples) == len(tokens) == 880
        assert tokens.min() >= 0
        assert tokens.max() < 256
        np.testing.assert_array_equal(samples, MU_LAW.decode(tokens))
    assert made.ended == [False] * 3
    assert made.sample_rate == 8000


def test_an_eager_end_comes_right_after_the_first_tenth_of_a_second(model):
    made = generate(with_end_bias(model, 50.0), seconds=0.5, number=2, batch=2)
    assert [len(samples) for samples in made.samples] == [800, 800]
    assert made.ended == [True, True]


def test_the_end_of_one_item_does_not_cut_another(model):
    made = generate(with_end_bias(model, 1.5), seconds=0.3, number=4, batch=4)
    lengths = [len(tokens) for tokens in made.tokens]
    assert len(set(lengths)) > 1
    assert made.ended == [length < 2400 for length in lengths]


def test_a_prompt_read_in_chunks_leads_to_the_same_logits_as_in_one_piece(model):
    ids = torch.randint(0, 256, (2, 501), generator=torch.Generator().manual_seed(0))
    labels = label_ids(CONDITIONS, {"digit": "one"}).expand(2, -1)
    with torch.inference_mode():
        whole, _ = prefill(model, [ids], labels)
        for chunk in (2, 14, 200, 999):
            parts, _ = prefill(model, ids.split(100, 1), labels, chunk=chunk)
            torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_going_on_from_a_recording_is_going_on_from_its_tokens(model):
    first = generate(model, seconds=0.2, seed=5)
    wave = noise(900)
    made = generate(model, prompt=wave, seconds=0.1, seed=5, labels={"digit": "one"})
    tokens, _ = MU_LAW.tokens(wave, 8000)
    ids = torch.from_numpy(np.concatenate([[MU_LAW.bos], tokens, made.tokens[0]]))[None]
    with torch.inference_mode():
        logits, _ = model(ids, conditions=label_ids(CONDITIONS, {"digit": "one"}))
    log_p = logits.double().log_softmax(-1)[0, 900:-1]
    bits = -log_p.gather(1, torch.from_numpy(made.tokens[0])[:, None]).mean() / math.log(2)
    assert made.bits_per_sample[0] == pytest.approx(float(bits), abs=1e-4)
    assert not np.array_equal(made.tokens[0], first.tokens[0][:800])


def test_new_sound_has_the_level_of_the_recording_it_goes_on_from(model):
    wave = noise(900)
    loud = generate(model, prompt=wave, seconds=0.05)
    quiet = generate(model, prompt=wave / 8, seconds=0.05)
    np.testing.assert_array_equal(loud.tokens[0], quiet.tokens[0])
    np.testing.assert_allclose(quiet.samples[0] * 8, loud.samples[0], rtol=1e-4)
    assert np.abs(quiet.samples[0]).max() < 0.2


def test_a_recording_at_another_rate_is_resampled_first(model):
    wave = noise(2000)
    from seqmodels.tasks.audio.waveform import resample

    a = generate(model, prompt=wave, prompt_rate=16000, seconds=0.02)
    b = generate(model, prompt=resample(wave, 16000, 8000), seconds=0.02)
    assert_same_item(a, 0, b, 0)


def test_bits_of_generated_sound_are_the_bits_that_evaluation_finds(model):
    labels = {"digit": "seven", "speaker": "ann"}
    for bias in (0.0, 1.5):
        talker = with_end_bias(model, bias)
        made = generate(talker, labels=labels, seconds=0.15, number=3, batch=3, sampling=Sampling(0.8, top_k=200))
        for tokens, bits in zip(made.tokens, made.bits_per_sample, strict=True):
            clips = lay_out([np.zeros(len(tokens), np.float32)], MU_LAW, labels=label_ids(CONDITIONS, labels).numpy())
            clips.samples[1:-1] = MU_LAW.decode(tokens)
            scores = score(talker, clips, batch_tokens=300)
            assert bits == pytest.approx(scores.bits_per_sample(), abs=1e-4)


def test_drawing_at_even_quantiles_gives_every_token_its_probability():
    log_p = torch.randn(1, 258, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5)[:, None] / 20000
    tokens = draw(log_p.expand(20000, -1), uniform)
    frequency = torch.bincount(tokens[:, 0], minlength=258) / 20000
    assert (frequency - log_p.exp()[0]).abs().max() <= 1.001 / 20000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.5, 0, 1), (2, 0, 1), (1, 5, 1), (1, 0, 0.7), (0.8, 9, 0.6)]
)
def test_filters_agree_with_their_definition(temperature, top_k, top_p):
    log_p = torch.randn(1, 258, generator=torch.Generator().manual_seed(1)).mul(3).log_softmax(-1)
    p = np.exp(log_p[0].double().numpy() / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
        p[np.setdiff1d(order, kept)] = 0
        p /= p.sum()
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5)[:, None] / 20000
    tokens = draw(log_p.expand(20000, -1), uniform, temperature, top_k, top_p)
    frequency = np.bincount(tokens[:, 0].numpy(), minlength=258) / 20000
    assert np.abs(frequency - p).max() <= 1.001 / 20000


def test_the_extreme_quantiles_never_draw_a_barred_token():
    log_p = torch.zeros(2, 258).log_softmax(-1)
    log_p[:, [0, 256, 257]] = -torch.inf
    tokens = draw(log_p, torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64))
    assert tokens[:, 0].tolist() == [1, 255]


def test_temperature_zero_takes_the_most_likely_token_whatever_the_seed(model):
    a, b = (generate(model, seconds=0.02, sampling=Sampling(temperature=0), seed=seed) for seed in (1, 2))
    assert_same_item(a, 0, b, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_sampling_is_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"seconds": 0}, "seconds is 0"),
        ({"seconds": -1}, "seconds is -1"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"number": 0}, "number is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"labels": {"digit": "eleven"}}, "digit has no value 'eleven'"),
        ({"labels": {"pitch": "high"}}, "no condition 'pitch'"),
    ],
)
def test_impossible_requests_are_refused(model, options, reason):
    with pytest.raises(InputError, match=reason):
        generate(model, **options)


def test_a_prompt_in_words_finds_its_condition():
    assert prompt_labels(CONDITIONS, "seven", {"speaker": "ann"}) == ({"digit": "seven", "speaker": "ann"}, None)
    assert prompt_labels(CONDITIONS, "theo", {}) == ({"speaker": "theo"}, None)
    assert prompt_labels(CONDITIONS, None, {"digit": "one"}) == ({"digit": "one"}, None)


def test_a_prompt_that_is_or_looks_like_a_file_is_a_recording(tmp_path):
    (tmp_path / "take").write_bytes(b"x")
    for name in ("clip.wav", "CLIP.MP3", str(tmp_path / "take")):
        labels, recording = prompt_labels(CONDITIONS, name, {})
        assert labels == {}
        assert str(recording) == name


@pytest.mark.parametrize(
    ("conditions", "prompt", "given", "reason"),
    [
        (CONDITIONS, "sevn", {}, "did you mean 'seven'"),
        (CONDITIONS, "xyz", {}, "It knows zero, one, seven, ann, theo"),
        ((), "seven", {}, "trained without labels"),
        (CONDITIONS, "seven", {"digit": "one"}, "differ"),
        ((*CONDITIONS, ConditionConfig(name="next", values=("one",))), "one", {}, "digit and next"),
    ],
)
def test_a_prompt_that_cannot_be_understood_is_refused_with_a_way_out(conditions, prompt, given, reason):
    with pytest.raises(InputError, match=reason):
        prompt_labels(conditions, prompt, given)
