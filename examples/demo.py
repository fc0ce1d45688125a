"""The main job twice: classify example contigs, generate sound from a word and from a recording, with pictures."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"


def longseq(*words: object) -> None:
    """Run one command as a user would, and show it."""
    line = [str(word) for word in words]
    print(f"\n$ longseq {' '.join(line)}", flush=True)
    subprocess.run([sys.executable, "-m", "seqmodels", *line], check=True, cwd=ROOT)


def first_half(recording: Path, half: Path) -> None:
    """Write the first half of a recording."""
    from seqmodels.tasks.audio.waveform import read_audio, write_audio

    samples, rate = read_audio(recording)
    write_audio(half, samples[: len(samples) // 2], rate)


def main() -> None:
    """Make everything in demo/ and say what is where."""
    started = time.monotonic()
    DEMO.mkdir(exist_ok=True)
    longseq("dna", "classify", "examples/contigs.fa.gz", "-o", "demo/contigs.tsv")
    show_table(DEMO / "contigs.tsv")
    longseq("audio", "generate", "--prompt", "seven", "--speaker", "jackson", "-o", "demo/seven.wav")
    first_half(DEMO / "seven.wav", DEMO / "prompt.wav")
    longseq(
        "audio", "generate", "--prompt", "demo/prompt.wav", "--seconds", 0.5, "--include-prompt",
        "--label", "digit=seven,speaker=jackson", "-o", "demo/continued.wav",
    )  # fmt: skip
    print(f"\nMade in {time.monotonic() - started:.0f} s:")
    for name, what in {
        "contigs.tsv": "one row per contig: species, probabilities, status (the contigs are simulated)",
        "seven.wav": "the word 'seven', generated sample by sample; seven.png shows it",
        "continued.wav": "its first half (prompt.wav) continued by the model; continued.png shows it",
    }.items():
        print(f"  demo/{name:14s} {what}")


def show_table(path: Path) -> None:
    """Print the columns that a reader looks at first."""
    import polars

    table = polars.read_csv(path, separator="\t").select("record_id", "length", "label", "prob", "status")
    with polars.Config(tbl_rows=-1, fmt_str_lengths=60, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True):
        print(table)


if __name__ == "__main__":
    main()
