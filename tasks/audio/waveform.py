"""Sound files to waveforms to mu-law tokens, and back.

Files go through soundfile (libsndfile comes inside its wheel). torchaudio supplies the transforms only and is imported
late: its own load and save need FFmpeg.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from seqmodels.errors import InputError

FORMATS = {  # suffix: format and subtype in libsndfile's words
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
STREAMED = (0, 0xFFFFFFFF)  # sizes that a WAV written into a pipe declares
BLOCK = 65536  # frames per write: libsndfile's Vorbis encoder keeps a whole write on its stack


def is_audio_name(name: str | Path) -> bool:
    """Whether the suffix is one that this package reads and writes."""
    return Path(name).suffix.lower() in FORMATS


def read_audio(source: str | Path | IO[bytes], *, name: str | None = None) -> tuple[np.ndarray, int]:
    """Mono samples (l,) float32 in [-1, 1] and the sample rate in Hz; several channels are averaged.

    `name` stands for the source in errors when that is not a path. InputError: missing, not sound, truncated, empty,
    or with samples that are not finite.
    """
    import soundfile

    label = name or str(source)
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise InputError(f"{label}: no such file; give the path of a recording ({', '.join(FORMATS)})")
        source = str(source)
    try:
        with soundfile.SoundFile(source) as file:
            samples = file.read(dtype="float32", always_2d=True)
            declared, rate, details = file.frames, file.samplerate, file.extra_info
    except (soundfile.SoundFileError, OSError) as error:
        reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise InputError(f"{label}: cannot be read as sound ({reason}); expected {', '.join(FORMATS)}") from None
    sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", details, re.MULTILINE)
    if (sizes and int(sizes[1]) > int(sizes[2]) and int(sizes[1]) not in STREAMED) or len(samples) < 0.95 * declared:
        raise InputError(f"{label}: is truncated (its header announces more sound than it holds); get a whole copy")
    if len(samples) == 0:
        raise InputError(f"{label}: holds no samples; give a recording that is not empty")
    if not np.isfinite(samples).all():
        raise InputError(f"{label}: holds samples that are NaN or infinite; repair or remove the recording")
    return samples.mean(axis=1), rate


def check_writable(path: Path, sample_rate: int) -> None:
    """An InputError now rather than after minutes of work, if `write_audio` could not write this path."""
    if not is_audio_name(path):
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.parent} cannot be written to; choose another")
    if path.suffix.lower() == ".mp3" and sample_rate not in MP3_RATES:
        raise InputError(f"{path}: MP3 has no sample rate {sample_rate} Hz; use .wav, .flac or .ogg")


def write_audio(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write samples (l,) or (l, channels) in [-1, 1], clipped to it; the suffix chooses the format, 16 bit if lossless.

    The file appears whole or not at all.
    """
    import soundfile

    check_writable(path, sample_rate)
    file_format, subtype = FORMATS[path.suffix.lower()]
    if subtype == "PCM_16":  # rounded here: libsndfile's scale differs between formats and with clipping
        samples = np.clip(np.round(np.asarray(samples, dtype=np.float64) * 32768), -32768, 32767).astype(np.int16)
    else:
        samples = np.clip(np.asarray(samples, dtype=np.float32), -1, 1)
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with soundfile.SoundFile(temporary, "w", sample_rate, channels, subtype, format=file_format) as file:
            for start in range(0, len(samples), BLOCK):
                file.write(samples[start : start + BLOCK])
        os.replace(temporary, path)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Samples (l,) at `rate` as samples (ceil(l * new_rate / rate),) at `new_rate`, band-limited (windowed sinc)."""
    if rate == new_rate:
        return samples
    import torch
    from torchaudio.functional import resample as sinc_resample

    return sinc_resample(torch.from_numpy(samples), rate, new_rate).numpy()


def peak_normalise(samples: np.ndarray, peak: float = 0.95) -> tuple[np.ndarray, float]:
    """Samples scaled so that the largest magnitude is `peak`, and the factor; silence is left as it is (factor 1)."""
    largest = float(np.abs(samples).max(initial=0.0))
    if largest < 1e-6:  # below 16-bit resolution: scaling would amplify rounding noise only
        return samples, 1.0
    gain = peak / largest
    return (samples * np.float32(gain)).astype(np.float32), gain


@dataclass(frozen=True, kw_only=True)
class MuLaw:
    """Mu-law tokens 0 ... levels - 1 of samples in [-1, 1], then BOS, EOS and, for prompts of text, the 256 bytes.

    torchaudio's formula: the decoded value of every token encodes to that token again, and zero is levels / 2.

    A model of text reads [text, BOS, samples ..., EOS], where text is always `text` tokens: the bytes (UTF-8), NUL
    before them as far as they do not fill it. NUL alone is no text, "not given".
    """

    sample_rate: int = 8000
    levels: int = 256
    peak: float = 0.95
    text: int = 0
    "Tokens of text before BOS; 0 means that the model knows none."

    @property
    def bos(self) -> int:
        """Id that starts every sequence."""
        return self.levels

    @property
    def eos(self) -> int:
        """Id that ends every sequence."""
        return self.levels + 1

    @property
    def nul(self) -> int:
        """Id of the byte 0, the first of the 256 bytes of text."""
        return self.levels + 2

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.nul + (256 if self.text else 0)

    @property
    def unsound(self) -> list[int]:
        """Ids that no sound holds, neither a sample nor its end: BOS and the bytes of text."""
        return [self.bos, *range(self.nul, self.vocab_size)]

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Tokens (l,) int64 of samples (l,) in [-1, 1]."""
        import torch
        from torchaudio.functional import mu_law_encoding

        return mu_law_encoding(torch.from_numpy(np.ascontiguousarray(samples)), self.levels).numpy()

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Samples (l,) float32 of tokens (l,) below `levels`."""
        import torch
        from torchaudio.functional import mu_law_decoding

        return mu_law_decoding(torch.from_numpy(np.ascontiguousarray(tokens)), self.levels).numpy()

    def tokens(self, samples: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
        """Tokens of a recording at any rate, resampled and peak-normalised, and the factor of the normalisation."""
        scaled, gain = peak_normalise(resample(samples, rate, self.sample_rate), self.peak)
        return self.encode(scaled), gain

    def text_tokens(self, text: str | None) -> np.ndarray:
        """Tokens (self.text,) int64 that stand before BOS; None or "" is "not given". InputError: text too long."""
        given = (text or "").strip().encode()
        if given and not self.text:
            raise InputError(f"the model knows no text, so not {text!r}; give labels, or train one with --clips.text")
        if len(given) > self.text or 0 in given:
            raise InputError(
                f"the text {text!r} has {len(given)} bytes; the model reads at most {self.text}, and no NUL: shorten it"
            )
        return self.nul + np.frombuffer(given.rjust(self.text, b"\0"), dtype=np.uint8).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Form kept in ModelConfig.tokenizer."""
        return {"type": "mu_law", **dataclasses.asdict(self)}


def mu_law_of(tokenizer: dict[str, Any]) -> MuLaw:
    """The MuLaw that a model's configuration names; InputError if the model is not one of sound."""
    if tokenizer.get("type") != "mu_law":
        raise InputError(f"this model's tokens are {tokenizer.get('type')!r}, not 'mu_law'; use a model of sound")
    return MuLaw(**{key: value for key, value in tokenizer.items() if key != "type"})
