"""Broken headers never crash the reader: each recording is read or refused in one line.

As a program, for any number of mutations: python tests/audio/test_fuzz.py 100000 [seed]
"""

import io
import sys

import numpy as np
import pytest
import soundfile

from seqmodels.errors import InputError
from seqmodels.tasks.audio.waveform import BLOCK, MuLaw, Reader, resampled

FORMATS = {"WAV": "PCM_16", "FLAC": "PCM_16", "OGG": "VORBIS"}
EXTREMES = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def recording(kind):
    """The bytes of a small stereo file."""
    file = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(800) * 0.2)
    soundfile.write(file, np.stack([tone, -0.5 * tone], 1), 16000, format=kind, subtype=FORMATS[kind])
    return file.getvalue()


def mutated(data, rng):
    """Some bytes, mostly of the header, made others, extreme numbers, lost, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = len(data) if rng.random() < 0.2 else min(len(data), 128)
        at = int(rng.integers(0, max(reach, 1)))
        match rng.integers(0, 5):
            case 0:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                width = int(rng.choice([2, 4]))
                value = int(rng.choice(EXTREMES)) % 2 ** (8 * width)
                data[at : at + width] = value.to_bytes(width, str(rng.choice(["little", "big"])))
            case 2:
                del data[at : at + int(rng.integers(1, 9))]
            case 3:
                data[at:at] = data[max(0, at - 8) : at + 8]
            case 4:
                del data[at:]
    return bytes(data)


def read(data):
    """Samples that come out of the whole way from bytes to tokens, or the line that refuses."""
    mu_law, total = MuLaw(), 0
    try:
        reader = Reader(io.BytesIO(data), name="x.wav")
        for block in resampled(reader.blocks(), reader.rate, mu_law.sample_rate):
            assert len(block) <= 32 * BLOCK
            tokens = mu_law.encode(block.clip(-1, 1))
            assert ((tokens >= 0) & (tokens < 256)).all()
            total += len(tokens)
    except InputError as error:
        return str(error)
    return total


def try_mutations(kind, number, seed):
    rng, data = np.random.default_rng(seed), recording(kind)
    outcomes = [read(mutated(data, rng)) for _ in range(number)]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert 0 < len(refusals) < number
    assert all(reason.startswith("x.wav: ") and "\n" not in reason for reason in refusals)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_mutated_recording_is_read_or_refused_in_one_line(kind):
    assert read(recording(kind)) == 400
    try_mutations(kind, 150, seed=0)


if __name__ == "__main__":
    number, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for kind in FORMATS:
        try_mutations(kind, number, seed)
        print(f"{kind}: {number} mutations read or refused")
