"""Laws of reading, writing, resampling and quantising sound."""

import numpy as np
import pytest
import soundfile

from seqmodels.errors import InputError
from seqmodels.tasks.audio.waveform import (
    FORMATS,
    MuLaw,
    mu_law_of,
    peak_normalise,
    read_audio,
    resample,
    write_audio,
)


def sine(frequency, rate, seconds=0.5, level=0.5):
    return (level * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def loudest_frequency(samples, rate):
    window = np.hanning(len(samples))
    return np.argmax(np.abs(np.fft.rfft(samples * window))) * rate / len(samples)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_sixteen_bit_sound_survives_a_lossless_file_exactly(tmp_path, suffix):
    codes = np.random.default_rng(0).integers(-32768, 32768, 5000)
    codes[:3] = -32768, 32767, 0
    samples = (codes / 32768).astype(np.float32)
    write_audio(tmp_path / f"x{suffix}", samples, 8000)
    back, rate = read_audio(tmp_path / f"x{suffix}")
    assert rate == 8000
    np.testing.assert_array_equal(back, samples)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate", [8000, 22050, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_rate_and_channel_count_is_read_back_as_the_same_tone(tmp_path, suffix, rate, channels):
    tone = sine(440, rate)
    samples = tone if channels == 1 else np.stack([tone, tone], axis=1)
    write_audio(tmp_path / f"x{suffix}", samples, rate)
    back, found = read_audio(tmp_path / f"x{suffix}")
    assert found == rate
    assert back.ndim == 1
    assert len(back) == pytest.approx(len(tone), abs=0.06 * rate if suffix == ".mp3" else 0)
    assert loudest_frequency(back, rate) == pytest.approx(440, abs=4)
    assert np.abs(back).max() == pytest.approx(0.5, abs=0.05)


def test_opposite_channels_cancel_in_the_downmix(tmp_path):
    tone = sine(300, 8000)
    write_audio(tmp_path / "x.wav", np.stack([tone, -tone], axis=1), 8000)
    assert np.abs(read_audio(tmp_path / "x.wav")[0]).max() == 0


@pytest.mark.parametrize("rate", [5512, 11025, 16000, 44100])
def test_resampling_keeps_the_frequency_level_and_duration_of_a_tone(rate):
    moved = resample(sine(1000, rate, 1.0), rate, 8000)
    assert len(moved) == 8000
    assert loudest_frequency(moved, 8000) == pytest.approx(1000, abs=2)
    assert np.abs(moved[500:-500]).max() == pytest.approx(0.5, abs=0.01)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    assert np.abs(resample(sine(6000, 16000, 1.0), 16000, 8000)[500:-500]).max() < 0.01


def test_a_sound_longer_than_one_write_block_reaches_an_ogg_file_whole(tmp_path):
    write_audio(tmp_path / "x.ogg", sine(200, 8000, 40), 8000)
    assert len(read_audio(tmp_path / "x.ogg")[0]) == 320000


def test_decoding_every_token_and_encoding_it_again_changes_nothing():
    mu_law = MuLaw()
    tokens = np.arange(256)
    np.testing.assert_array_equal(mu_law.encode(mu_law.decode(tokens)), tokens)
    assert mu_law.encode(np.zeros(1, np.float32)) == 128


def test_mu_law_is_the_companding_formula():
    x = np.linspace(-1, 1, 20001)
    expected = np.floor((np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(256) + 1) / 2 * 255 + 0.5)
    found = MuLaw().encode(x.astype(np.float32))
    assert np.mean(found != expected) < 1e-3  # float32 at the borders of the levels
    assert np.abs(found - expected).max() <= 1


def test_quantising_speech_level_noise_costs_the_known_signal_to_noise_ratio():
    x = np.random.default_rng(0).normal(0, 0.1, 100000).clip(-1, 1).astype(np.float32)
    error = MuLaw().decode(MuLaw().encode(x)) - x
    assert 10 * np.log10(np.mean(x**2) / np.mean(error**2)) == pytest.approx(37.8, abs=0.3)


def test_peak_normalisation_reaches_the_peak_reports_its_gain_and_leaves_silence_alone():
    x = sine(100, 8000, level=0.05)
    scaled, gain = peak_normalise(x)
    assert np.abs(scaled).max() == pytest.approx(0.95, abs=1e-5)
    np.testing.assert_allclose(scaled / gain, x, atol=1e-6)
    silent, gain = peak_normalise(np.zeros(10, np.float32))
    assert gain == 1
    assert not silent.any()


def test_the_tokens_of_a_recording_do_not_depend_on_its_level():
    x = sine(313, 8000)
    np.testing.assert_array_equal(MuLaw().tokens(x, 8000)[0], MuLaw().tokens(x * np.float32(0.25), 8000)[0])


def test_text_is_its_bytes_right_before_the_sound_and_no_text_is_nul_alone():
    mu_law = MuLaw(text=12)
    tokens = mu_law.text_tokens(" gläser ")
    assert bytes((tokens - mu_law.nul).tolist()) == b"\0" * 5 + "gläser".encode()
    assert set(mu_law.text_tokens(None)) == set(mu_law.text_tokens("")) == {mu_law.nul}
    assert len(MuLaw().text_tokens("")) == 0
    assert mu_law.vocab_size == max(mu_law.unsound) + 1 == 256 + 2 + 256
    assert MuLaw().vocab_size == 258
    assert not {mu_law.eos, *range(mu_law.levels)} & set(mu_law.unsound)


@pytest.mark.parametrize(
    ("size", "text", "reason"),
    [(4, "seven", "has 5 bytes; the model reads at most 4"), (8, "a\0b", "no NUL"), (0, "x", "knows no text")],
)
def test_text_that_a_model_cannot_read_is_refused(size, text, reason):
    with pytest.raises(InputError, match=reason):
        MuLaw(text=size).text_tokens(text)


def test_the_tokenizer_survives_its_dictionary():
    mu_law = MuLaw(sample_rate=16000, peak=0.9)
    assert mu_law_of(mu_law.to_dict()) == mu_law
    with pytest.raises(InputError, match="not 'mu_law'"):
        mu_law_of({"type": "dna"})


def broken_files(folder):
    good = sine(300, 8000)
    soundfile.write(folder / "empty.wav", good[:0], 8000)
    soundfile.write(folder / "nan.wav", np.where(np.arange(len(good)) == 7, np.nan, good), 8000, subtype="FLOAT")
    soundfile.write(folder / "infinite.wav", np.where(np.arange(len(good)) == 7, np.inf, good), 8000, subtype="FLOAT")
    (folder / "text.wav").write_text("this is a letter, not sound\n" * 20)
    (folder / "nothing.wav").write_bytes(b"")
    for name in ("a.wav", "b.flac"):
        soundfile.write(folder / name, good, 8000)
        whole = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.wav").mkdir()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.wav", "no such file"),
        ("folder.wav", "no such file"),
        ("empty.wav", "no samples"),
        ("nothing.wav", "cannot be read as sound"),
        ("text.wav", "cannot be read as sound"),
        ("nan.wav", "NaN or infinite"),
        ("infinite.wav", "NaN or infinite"),
        ("cut_a.wav", "truncated"),
        ("cut_b.flac", "cannot be read as sound"),
    ],
)
def test_a_bad_recording_is_refused_in_one_line_that_names_it(tmp_path, name, reason):
    broken_files(tmp_path)
    with pytest.raises(InputError, match=reason) as error:
        read_audio(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wav_written_into_a_pipe_is_read_although_its_header_knows_no_size(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, sine(300, 8000), 8000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    assert len(read_audio(path)[0]) == 4000


@pytest.mark.parametrize(
    ("name", "rate", "reason"),
    [
        ("x.txt", 8000, "unknown suffix"),
        ("x", 8000, "unknown suffix"),
        ("no/folder/x.wav", 8000, "no folder"),
        ("x.mp3", 9999, "no sample rate 9999"),
        ("taken.wav", 8000, "is a folder"),
    ],
)
def test_a_bad_output_is_refused_and_leaves_nothing_behind(tmp_path, name, rate, reason):
    (tmp_path / "taken.wav").mkdir()
    with pytest.raises(InputError, match=reason):
        write_audio(tmp_path / name, sine(300, 8000), rate)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken.wav"]


def test_a_write_that_fails_half_way_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    write_audio(path, sine(300, 8000), 8000)
    before = path.read_bytes()

    def full_disk(self, data):
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write_audio(path, sine(400, 8000), 8000)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
