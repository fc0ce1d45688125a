"""Sound files to waveforms to mu-law tokens, and back.

Files go through soundfile (libsndfile comes inside its wheel), rates are changed by soxr. torchaudio supplies the
transforms only and is imported late: its own load and save need FFmpeg.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
RATES = (500, 2_000_000)  # Hz; others are broken headers, and resampling would make a thousand samples of one
SILENT = 1e-6  # largest sample, below 16-bit resolution: to scale it up would amplify rounding noise only
STREAMED = (0, 0xFFFFFFFF)  # sizes that a WAV written into a pipe declares
BLOCK = 65536  # samples read or written at a time; libsndfile's Vorbis encoder keeps a whole write on its stack


def is_audio_name(name: str | Path) -> bool:
    """Whether the suffix is one that this package reads and writes."""
    return Path(name).suffix.lower() in FORMATS


class Reader:
    """A recording, read block by block as mono samples in [-1, 1]: any length in bounded memory.

    `name` stands for the source in errors when that is not a path. InputError: missing, not sound, truncated, empty, of
    an impossible rate, or with samples that are not finite; the last three may come only while it is read.
    """

    def __init__(self, source: str | Path | IO[bytes], *, name: str | None = None) -> None:
        self.source, self.name = source, name or str(source)
        if isinstance(source, (str, Path)) and not Path(source).is_file():
            raise InputError(f"{self.name}: no such file; give the path of a recording ({', '.join(FORMATS)})")
        with self._open() as file:
            self.rate, self.channels, self._declared = file.samplerate, file.channels, file.frames
            details = file.extra_info
        sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", details, re.MULTILINE)
        if sizes and int(sizes[1]) > int(sizes[2]) and int(sizes[1]) not in STREAMED:
            raise InputError(f"{self.name}: {_TRUNCATED}")
        if not RATES[0] <= self.rate <= RATES[1]:
            raise InputError(
                f"{self.name}: its header says {self.rate} Hz; expected {RATES[0]} to {RATES[1]:,} Hz: correct it"
            )

    def blocks(self, start: float = 0.0, end: float | None = None) -> Iterator[np.ndarray]:
        """Blocks (l,) float32 of at most BLOCK samples, several channels averaged, from `start` to `end` seconds."""
        first = round(start * self.rate)
        last = None if end is None else round(end * self.rate)
        with self._open() as file:
            if 0 < file.frames <= first or (last is not None and last <= first):
                raise InputError(
                    f"{self.name}: has no sound from {start:g} s to {'its end' if end is None else f'{end:g} s'}; it "
                    f"lasts {file.frames / self.rate:g} s"
                )
            if first:
                file.seek(first)
            wanted, found = sys.maxsize if last is None else last - first, 0
            size = max(1, BLOCK // self.channels)
            while found < wanted:
                block = file.read(min(size, wanted - found), dtype="float32", always_2d=True)
                if not len(block):
                    break
                if not np.isfinite(block).all():
                    raise InputError(f"{self.name}: holds samples that are NaN or infinite; repair or remove it")
                found += len(block)
                yield block.mean(axis=1)
        if found == 0 and self._declared in (0, sys.maxsize):
            raise InputError(f"{self.name}: holds no samples; give a recording that is not empty")
        if found < 0.95 * (min(wanted, self._declared - first)):
            raise InputError(f"{self.name}: {_TRUNCATED}")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import soundfile

        try:
            if isinstance(self.source, (str, Path)):
                source = str(self.source)
            else:
                self.source.seek(0)
                source = self.source
            with soundfile.SoundFile(source) as file:
                yield file
        except (soundfile.SoundFileError, OSError) as error:
            reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
            raise InputError(
                f"{self.name}: cannot be read as sound ({reason}); expected {', '.join(FORMATS)}"
            ) from None


_TRUNCATED = "is truncated (its header announces more sound than it holds); get a whole copy"


def read_audio(source: str | Path | IO[bytes], *, name: str | None = None) -> tuple[np.ndarray, int]:
    """Mono samples (l,) float32 in [-1, 1] of a whole recording and its sample rate in Hz; errors as of a Reader."""
    reader = Reader(source, name=name)
    return np.concatenate(list(reader.blocks())), reader.rate


def check_writable(path: Path, sample_rate: int, subtype: str | None = None) -> None:
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
    if subtype is not None:
        import soundfile

        known = soundfile.available_subtypes(FORMATS[path.suffix.lower()][0])
        if subtype.upper() not in known:
            raise InputError(f"{path}: {path.suffix} has no subtype {subtype!r}; it has {', '.join(known)}")


class Writer:
    """A sound file written block by block: under its name whole or not at all, or with `grow` readable at any time.

    The suffix chooses the format; `subtype` in libsndfile's words, by default 16 bit if lossless. Samples (l,) or
    (l, channels) beyond [-1, 1] are clipped, and counted in `clipped`, except by subtypes FLOAT and DOUBLE.
    """

    def __init__(
        self, path: Path, sample_rate: int, *, channels: int = 1, subtype: str | None = None, grow: bool = False
    ) -> None:
        import soundfile

        check_writable(path, sample_rate, subtype)
        self.path, self.grow, self.clipped = path, grow, 0
        file_format, default = FORMATS[path.suffix.lower()]
        self.subtype = default if subtype is None else subtype.upper()
        self._written = path if grow else path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with self._refusals():
            self._file = soundfile.SoundFile(
                self._written, "w", sample_rate, channels, self.subtype, format=file_format
            )

    def write(self, samples: np.ndarray) -> None:
        """One more block."""
        if self.subtype not in ("FLOAT", "DOUBLE"):
            self.clipped += int((np.abs(samples) > 1).sum())
            if self.subtype == "PCM_16":  # rounded here: libsndfile's scale differs between formats and with clipping
                samples = as_int16(samples)
            else:
                samples = np.clip(np.asarray(samples, dtype=np.float32), -1, 1)
        with self._refusals():
            for start in range(0, len(samples), BLOCK):
                self._file.write(samples[start : start + BLOCK])
            if self.grow:
                self._file.flush()
                if self.path.suffix.lower() == ".wav":
                    _announce(self.path)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._refusals():
            self._file.close()
            if not self.grow:
                if kind is None:
                    os.replace(self._written, self.path)
                self._written.unlink(missing_ok=True)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        import soundfile

        try:
            yield
        except (soundfile.SoundFileError, OSError) as error:
            if not self.grow:
                self._written.unlink(missing_ok=True)
            raise InputError(f"{self.path}: cannot be written ({error})") from None


def _announce(path: Path) -> None:
    """Sizes in a WAV's header that are those of the file as it is now; libsndfile writes them at the end only."""
    with path.open("r+b") as file:
        header, size = file.read(4096), file.seek(0, os.SEEK_END)
        data = header.find(b"data")
        for place, length in ((4, size - 8), (data + 4, size - data - 8)):
            file.seek(place)
            file.write(min(length, 0xFFFFFFFF).to_bytes(4, "little"))


def as_int16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1], beyond it clipped, as 16-bit numbers."""
    return np.clip(np.round(np.asarray(samples, dtype=np.float64) * 32768), -32768, 32767).astype(np.int16)


def write_audio(path: Path, samples: np.ndarray, sample_rate: int, *, subtype: str | None = None) -> None:
    """Write samples (l,) or (l, channels) with a Writer; the file appears whole or not at all."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with Writer(path, sample_rate, channels=channels, subtype=subtype) as writer:
        writer.write(samples)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Samples (l,) at `rate` as about l * new_rate / rate samples at `new_rate`, band-limited."""
    if rate == new_rate:
        return samples
    import soxr

    return soxr.resample(samples, rate, new_rate)


def resampled(blocks: Iterable[np.ndarray], rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Blocks (l,) float32 whose concatenation is `resample` of that of the given ones, to the bit."""
    if rate == new_rate:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(rate, new_rate, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def peak_normalise(samples: np.ndarray, peak: float = 0.95) -> tuple[np.ndarray, float]:
    """Samples scaled so that the largest magnitude is `peak`, and the factor; silence is left as it is (factor 1)."""
    gain = peak_gain(float(np.abs(samples).max(initial=0.0)), peak)
    return (samples if gain == 1 else samples * np.float32(gain)).astype(np.float32), gain


def peak_gain(largest: float, peak: float = 0.95) -> float:
    """The factor that makes the largest magnitude `peak`; 1 for silence."""
    return 1.0 if largest < SILENT else peak / largest


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
        given = (text or "").strip().encode(errors="surrogateescape")
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
