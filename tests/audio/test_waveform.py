"""Laws of reading, writing, resampling and quantising sound."""

import numpy as np
import pytest
import soundfile

from seqmodels.errors import InputError
from seqmodels.tasks.audio.waveform import (
    FORMATS,
    MuLaw,
    Writer,
    mu_law_of,
    peak_normalise,
    read_audio,
    resample,
    resampled,
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


UNUSUAL = {  # name: samples, rate, subtype
    "192 kHz": (sine(440, 192000), 192000, "PCM_16"),
    "8 channels": (np.stack([sine(440, 48000)] * 8, 1), 48000, "PCM_16"),
    "24 bits": (sine(440, 16000), 16000, "PCM_24"),
    "float64": (sine(440, 16000), 16000, "DOUBLE"),
    "mu-law": (sine(440, 16000), 16000, "ULAW"),
    "clipped": (np.clip(99 * sine(440, 16000), -1, 1), 16000, "PCM_16"),
    "coprime rate": (sine(440, 44101), 44101, "PCM_16"),
    "beyond full scale": (1e20 * sine(440, 16000), 16000, "FLOAT"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_recordings_become_the_tokens_of_the_same_tone(tmp_path, name):
    samples, rate, subtype = UNUSUAL[name]
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype=subtype)
    tokens, _ = MuLaw().tokens(*read_audio(tmp_path / "x.wav"))
    assert len(tokens) == pytest.approx(4000, abs=1)
    assert loudest_frequency(MuLaw().decode(tokens), 8000) == pytest.approx(440, abs=4)
    assert tokens.max() - tokens.min() > 240


def test_silence_is_the_middle_token(tmp_path):
    write_audio(tmp_path / "x.wav", np.zeros(1000, np.float32), 8000)
    assert (MuLaw().tokens(*read_audio(tmp_path / "x.wav"))[0] == 128).all()


@pytest.mark.parametrize(("inside", "suffix"), [(".flac", ".mp3"), (".wav", ".flac"), (".ogg", ".wav")])
def test_a_wrong_suffix_does_not_matter_to_the_reader(tmp_path, inside, suffix):
    write_audio(tmp_path / f"x{inside}", sine(440, 8000), 8000)
    (tmp_path / f"x{inside}").rename(tmp_path / f"y{suffix}")
    assert len(read_audio(tmp_path / f"y{suffix}")[0]) == 4000


@pytest.mark.parametrize(("rate", "new_rate"), [(16000, 8000), (8000, 44100), (44101, 8000), (8000, 8000)])
def test_resampling_block_by_block_is_resampling_at_once(rate, new_rate):
    whole = sine(440, rate, 0.3)
    blocks = np.split(whole, [1, 50, 51, 2000])
    np.testing.assert_array_equal(
        np.concatenate(list(resampled(blocks, rate, new_rate))), resample(whole, rate, new_rate)
    )


def test_a_header_with_an_impossible_rate_is_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", sine(440, 8000), 8000)
    data = bytearray((tmp_path / "x.wav").read_bytes())
    for rate in (3, 2**31 - 1):
        data[24:28] = rate.to_bytes(4, "little")
        (tmp_path / "x.wav").write_bytes(data)
        with pytest.raises(InputError, match=f"its header says {rate} Hz"):
            read_audio(tmp_path / "x.wav")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_growing_file_ends_as_if_written_at_once(tmp_path, suffix):
    whole = sine(440, 8000, 3)
    write_audio(tmp_path / f"a{suffix}", whole, 8000)
    with Writer(tmp_path / f"b{suffix}", 8000, grow=True) as writer:
        for block in np.split(whole, [7, 8000, 8001]):
            writer.write(block)
    ours, expected = (read_audio(tmp_path / f"{name}{suffix}")[0] for name in "ba")
    np.testing.assert_allclose(ours, expected, atol=0 if suffix in (".wav", ".flac") else 0.05)


def test_clipped_samples_are_counted_but_floats_keep_them(tmp_path):
    for subtype, clipped, peak in ((None, 2, 1.0), ("FLOAT", 0, 2.0)):
        with Writer(tmp_path / "x.wav", 8000, subtype=subtype) as writer:
            writer.write(np.array([0.5, 2.0, -1.5, 1.0], np.float32))
        assert writer.clipped == clipped
        assert np.abs(read_audio(tmp_path / "x.wav")[0]).max() == pytest.approx(peak, abs=1e-4)


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
