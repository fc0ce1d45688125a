"""benchmarks/audio_training.py: its steps train, and it runs at a tiny size."""

import sys

import numpy as np
import pytest
import torch

from seqmodels.tasks.audio.waveform import write_audio


@pytest.mark.usefixtures("one_thread")
def test_steps_on_recordings_are_timed_profiled_and_only_printed_on_a_cpu(tmp_path, monkeypatch, capsys):
    import audio_training
    import record

    rng, lines = np.random.default_rng(0), ["file,word"]
    for i in range(12):
        write_audio(tmp_path / f"{i}.wav", rng.normal(0, 0.1, 500 + 10 * i).clip(-1, 1).astype(np.float32), 8000)
        lines.append(f"{i}.wav,{('low', 'high')[i % 2]}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(record, "write_rows", pytest.fail)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # the program's, for all of its process
    words = f"{tmp_path} --device cpu --tokens 4096 --widths 32 32 --depths 1 1 --pools 4 --steps 2 --profile"
    monkeypatch.setattr(sys, "argv", ["audio_training.py", *words.split()])
    audio_training.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + audio_training.SHOWN
    assert " x  " in lines[1]
    impl, tokens, ms, rate, peak, kernels, _ = lines[-1].split()
    assert (impl, tokens, peak) == ("eager", "4096", "0.00")
    assert float(ms) > 0
    assert 0 < int(rate.replace(",", "")) < 4096e3 / float(ms)  # padding does not count
    assert int(kernels) > 100
