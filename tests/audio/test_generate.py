"""Laws of prompted generation."""

import dataclasses
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
from seqmodels.tasks.audio.generate import (
    FADE,
    Heard,
    Stream,
    generate,
    generate_each,
    joined,
    label_ids,
    prompt_labels,
)
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


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_items_of_different_labels_are_each_what_it_would_be_alone(model, guidance):
    labels = [{"digit": "one"}, {"digit": "seven", "speaker": "theo"}, {}]
    options = {"seconds": 0.05, "sampling": Sampling(guidance=guidance), "seed": 3}
    made = generate_each(model, labels, batch=2, **options)
    assert made.state is None
    for item, told in enumerate(labels[:2] if guidance != 1 else labels):
        alone = generate(model, labels=told, number=item + 1, **options)
        assert np.mean(made.tokens[item][:200] == alone.tokens[item][:200]) > 0.9  # rounding may move one apart
        np.testing.assert_allclose(made.log_p[item][:20], alone.log_p[item][:20], atol=1e-3)


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
        (CONDITIONS, "xyz", {}, "it knows zero, one, seven, ann, theo"),
        ((), "seven", {}, "trained without labels"),
        (CONDITIONS, "seven", {"digit": "one"}, "differ"),
        ((*CONDITIONS, ConditionConfig(name="next", values=("one",))), "one", {}, "digit and next"),
    ],
)
def test_a_prompt_that_cannot_be_understood_is_refused_with_a_way_out(conditions, prompt, given, reason):
    with pytest.raises(InputError, match=reason):
        prompt_labels(conditions, prompt, given)


LABELS = {"digit": "seven"}


@pytest.mark.parametrize(
    "options", [{}, {"number": 2, "batch": 2}, {"sampling": Sampling(0.9, 50, 0.95, guidance=1.7)}]
)
def test_two_halves_resumed_are_the_whole_to_the_bit(model, options):
    wave = noise(333)
    whole = generate(model, labels=LABELS, prompt=wave, seconds=0.07, seed=2, **options)
    half = generate(model, labels=LABELS, prompt=wave, seconds=0.03, seed=2, **options)
    rest = generate(model, state=half.state, seconds=0.04)
    for item in range(len(whole.samples)):
        np.testing.assert_array_equal(np.concatenate([half.samples[item], rest.samples[item]]), whole.samples[item])
        np.testing.assert_array_equal(np.concatenate([half.log_p[item], rest.log_p[item]]), whole.log_p[item])
    again = generate(model, state=half.state, seconds=0.04)  # going on does not use the state up
    np.testing.assert_array_equal(again.tokens[0], rest.tokens[0])


def test_a_state_survives_a_file(model, tmp_path):
    half = generate(model, labels=LABELS, seconds=0.03, seed=2)
    torch.save(half.state, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=False)
    a, b = (generate(model, state=state, seconds=0.02) for state in (half.state, kept))
    assert_same_item(a, 0, b, 0)


def test_what_has_ended_stays_ended(model):
    eager = with_end_bias(model, 50.0)
    made = generate(eager, seconds=0.2, number=2, batch=2)
    rest = generate(eager, state=made.state, seconds=0.1)
    assert made.ended == rest.ended == [True, True]
    assert [len(samples) for samples in rest.samples] == [0, 0]
    assert list(Stream(eager, labels=LABELS, state=generate(eager, labels=LABELS, seconds=0.2).state)) == []


@pytest.mark.parametrize("chunk", [0.001, 0.02, 1.0])
def test_a_stream_is_what_would_be_made_at_once_in_chunks(model, chunk):
    made = generate(model, labels=LABELS, seconds=0.05, seed=4)
    stream = Stream(model, labels=LABELS, seconds=0.05, seed=4, chunk=chunk)
    np.testing.assert_array_equal(np.concatenate(list(stream)), made.samples[0])
    assert stream.bits_per_sample == pytest.approx(made.bits_per_sample[0])
    ended = Stream(with_end_bias(model, 50.0), chunk=chunk)
    assert sum(map(len, ended)) == 800
    assert ended.ended


def test_a_stream_can_be_left_and_taken_up_again(model):
    whole = np.concatenate(list(Stream(model, seconds=0.06, seed=4)))
    stream = Stream(model, seconds=0.06, seed=4, chunk=0.01)
    begun = [next(stream) for _ in range(2)]
    rest = Stream(model, seconds=0.04, state=stream.state)
    np.testing.assert_array_equal(np.concatenate([*begun, *rest]), whole)


def test_guidance_one_changes_nothing_and_two_changes_what_is_drawn_but_not_how_it_is_judged(model):
    plain, one, two = (
        generate(model, labels=LABELS, seconds=0.05, sampling=Sampling(guidance=guidance)) for guidance in (1, 1.0, 2)
    )
    assert_same_item(plain, 0, one, 0)
    assert not np.array_equal(two.tokens[0], plain.tokens[0])
    clips = lay_out([np.zeros(len(two.tokens[0]), np.float32)], MU_LAW, labels=label_ids(CONDITIONS, LABELS).numpy())
    clips.samples[1:-1] = MU_LAW.decode(two.tokens[0])
    assert two.bits_per_sample[0] == pytest.approx(score(model, clips).bits_per_sample(), abs=1e-4)


def test_guided_logits_are_those_of_the_untold_model_moved_towards_the_told_ones(model):
    greedy = Sampling(temperature=0, guidance=2.5)
    made = generate(model, labels=LABELS, seconds=0.03, sampling=greedy).tokens[0]
    ids = torch.from_numpy(np.concatenate([[MU_LAW.bos], made]))[None]
    with torch.no_grad():
        told, untold = (model(ids, conditions=label_ids(CONDITIONS, told))[0][0, :-1] for told in (LABELS, {}))
    guided = untold + 2.5 * (told - untold)
    guided[:, MU_LAW.bos :] = -torch.inf  # too early for the end
    chosen = guided.gather(1, ids[0, 1:, None])[:, 0]
    assert (guided.amax(1) - chosen).max() < 1e-4


def test_a_model_that_was_trained_for_guidance_is_guided_by_what_it_is_told_unless_said_otherwise(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, guidance=2.5))
    two, one, unsaid = Sampling(0.9, guidance=2.5), Sampling(0.9, guidance=1.0), Sampling(0.9)
    for labels, sampling in ((LABELS, two), ({}, one)):
        wanted = generate(model, labels=labels, seconds=0.03, sampling=sampling)
        assert_same_item(generate(model, labels=labels, seconds=0.03, sampling=unsaid), 0, wanted, 0)
        assert_same_item(generate_each(model, [labels], seconds=0.03, sampling=unsaid), 0, wanted, 0)
        stream = Stream(model, labels=labels, seconds=0.03, sampling=unsaid)
        np.testing.assert_array_equal(np.concatenate(list(stream)), wanted.samples[0])
        plain = generate(model, labels=labels, seconds=0.03, sampling=one)
        assert np.array_equal(plain.tokens[0], wanted.tokens[0]) == (sampling is one)


def test_guidance_without_anything_told_is_refused(model):
    with pytest.raises(InputError, match="told nothing to guide by"):
        generate(model, sampling=Sampling(guidance=2.0))


def test_any_long_recording_is_read_a_block_at_a_time(model, tmp_path, monkeypatch):
    import soundfile

    from seqmodels.tasks.audio import waveform

    soundfile.write(tmp_path / "long.wav", noise(50000), 16000)
    expected = generate(model, prompt=tmp_path / "long.wav", seconds=0.01)
    monkeypatch.setattr(waveform, "BLOCK", 1000)
    asked, passed, read, forward = [], [], soundfile.SoundFile.read, model.forward
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda file, n, **options: asked.append(n) or read(file, n, **options)
    )
    monkeypatch.setattr(model, "forward", lambda ids, *a, **o: passed.append(ids.shape[1]) or forward(ids, *a, **o))
    found = generate(model, prompt=tmp_path / "long.wav", seconds=0.01)
    assert max(asked) <= 1000
    assert max(passed) <= 1000
    assert sum(passed) == 25000 + 1 + 79
    np.testing.assert_array_equal(found.tokens[0], expected.tokens[0])


def test_of_a_prompt_counts_what_lies_between_start_and_end(model, tmp_path):
    import soundfile

    wave = noise(8000)
    soundfile.write(tmp_path / "x.wav", wave, 8000, subtype="FLOAT")
    part = Heard(tmp_path / "x.wav", MU_LAW, start=0.25, end=0.5)
    assert_same_item(
        generate(model, prompt=part, seconds=0.02), 0, generate(model, prompt=wave[2000:4000], seconds=0.02), 0
    )
    for options, reason in (
        ({"start": 1.5}, "has no sound from 1.5 s"),
        ({"start": 0.5, "end": 0.5}, "has no sound"),
        ({"start": -1.0}, "start of the prompt is -1"),
        ({"end": math.nan}, "end of the prompt is nan"),
    ):
        with pytest.raises(InputError, match=reason):
            Heard(tmp_path / "x.wav", MU_LAW, **options)


@pytest.mark.parametrize("out_rate", [8000, 16000, 44100])
def test_the_recording_before_new_sound_is_as_recorded_but_for_a_short_crossfade(out_rate, tmp_path):
    import soundfile

    wave = (0.4 * np.sin(2 * np.pi * 200 * np.arange(out_rate) / out_rate)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", wave, out_rate, subtype="FLOAT")
    heard = Heard(tmp_path / "x.wav", MU_LAW)
    new = (0.4 * np.sin(2 * np.pi * 200 * np.arange(8000, 12000) / 8000)).astype(np.float32)
    whole = np.concatenate(list(joined(heard, [new[:1500], new[1500:]], 8000, out_rate)))
    fade = round(FADE * out_rate)
    np.testing.assert_array_equal(whole[: out_rate - fade], wave[:-fade])
    assert len(whole) == pytest.approx(1.5 * out_rate, abs=2)
    ideal = 0.4 * np.sin(2 * np.pi * 200 * np.arange(len(whole)) / out_rate)
    assert np.abs(whole - ideal)[: int(1.49 * out_rate)].max() < 0.02  # of which mu-law's rounding is most: no click
    if out_rate == 8000:
        np.testing.assert_array_equal(whole[8000:], new)


def test_a_prompt_shorter_than_the_crossfade_goes_over_smoothly():
    whole = list(joined(Heard(noise(5), MU_LAW), [noise(100, 1)], 8000, 8000))
    assert sum(map(len, whole)) == 105


def test_a_notebook_shows_a_player_and_a_picture_of_each_item(model):
    html = generate(model, seconds=0.02, number=5)._repr_html_()
    assert html.count("<audio controls") == html.count("<img") == 4
    assert "and 1 more" in html


def test_what_was_made_is_saved_in_the_format_of_the_suffix(model, tmp_path):
    made = generate(model, seconds=0.05, number=2)
    made.save(tmp_path / "x.flac", 1, subtype="PCM_24")
    from seqmodels.tasks.audio.waveform import read_audio

    np.testing.assert_allclose(read_audio(tmp_path / "x.flac")[0], made.samples[1], atol=2**-23)
    assert made.log_p[0].shape == made.samples[0].shape


def test_a_model_of_text_is_told_text_and_guided_by_it():
    mu_law = MuLaw(text=12)
    config = tiny_config(())
    talker = build(
        ModelConfig(
            vocab_size=mu_law.vocab_size, backbone=config.backbone, head=config.head, tie_embeddings=False,
            tokenizer=mu_law.to_dict(),
        ),
        seed=0,
    ).eval()  # fmt: skip
    options = {"seconds": 0.05, "sampling": Sampling(temperature=1.5)}
    plain, hello, bye = (generate(talker, text=text, **options) for text in (None, "hello", "bye"))
    assert len({tuple(made.tokens[0]) for made in (plain, hello, bye)}) == 3
    assert max(made.tokens[0].max() for made in (plain, hello, bye)) < 256
    guided = generate(talker, text="hello", seconds=0.05, sampling=Sampling(1.5, guidance=0.0))
    assert_same_item(guided, 0, plain, 0)  # guidance 0 is the model that is told nothing
    with pytest.raises(InputError, match="shorten it"):
        generate(talker, text="a text of too many bytes", **options)
