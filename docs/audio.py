"""Makes the outputs, pictures and sounds of docs/audio.md again, from the commands that stand there.

    LONGSEQ_DATA=data python docs/audio.py

Runs the page's blocks `sh` and `python` in an empty folder that has $LONGSEQ_DATA/audio/fsdd as fsdd, puts what they
print into the block `text` that follows, copies the files that the page shows to docs/audio, and writes the table of
speed from benchmarks/results. Training, in blocks without a name, is left alone.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from seqmodels.cli import main

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "audio.md", HERE.parent / "benchmarks" / "results"
BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


class Screen(io.StringIO):
    """Standard output as a terminal, for which tables are aligned."""

    def isatty(self) -> bool:
        return True


def run(block: re.Match) -> str:
    """The block with what it prints."""
    kind, code = block.groups()
    with contextlib.redirect_stdout(Screen()) as printed:
        if kind == "python":
            exec(code, {})
        else:
            for line in code.splitlines():
                if main(shlex.split(line)[1:]):
                    sys.exit(f"failed: {line}")
    shown = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
    return f"```{kind}\n{code}```\n{shown}"


def speed() -> str:
    """What is recorded of generation, as a table."""
    lines = ["| machine | made at a time | guidance | samples per second (8,000: real time) |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*/generate.json")):
        for row in json.loads(path.read_text()):
            where = f"{row['threads']} CPU thread{'s' * (row['threads'] > 1)}" if row["gpu"] == "cpu" else row["gpu"]
            machine = f"{where}, {row['dtype']}"
            shape = row["shape"]
            lines.append(f"| {machine} | {shape['b']} | {shape['guidance']:g} | {row['samples_per_s']:,} |")
    for path in sorted(RESULTS.glob("*/minute.json")):
        row = json.loads(path.read_text())[0]
        lines += [
            "",
            f"{row['l']:,} samples of each of {row['shape']['b']} instruments in one run ({row['gpu']}), in all",
            f"{row['samples_per_s']:,} samples a second: {row['mib'][0]:,.0f} MiB of memory after the first second of",
            f"sound, {row['mib'][-1]:,.0f} MiB after {len(row['mib'])}.",
        ]
    return "\n".join(["", *lines, ""])


if __name__ == "__main__":
    page, here = PAGE.read_text(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("fsdd").symlink_to(Path(os.environ["LONGSEQ_DATA"]).resolve() / "audio" / "fsdd")
        page = BLOCK.sub(run, page)
        for name in sorted(set(re.findall(r"\(audio/(\S+?)\)", page))):
            if name.endswith(".png"):
                Image.open(name).quantize(64).save(HERE / "audio" / name)
            else:
                shutil.copyfile(name, HERE / "audio" / name)
        os.chdir(here)
    page = re.sub(r"(<!-- speed -->\n).*?(<!-- end)", lambda m: f"{m[1]}{speed()}\n{m[2]}", page, flags=re.DOTALL)
    PAGE.write_text(page)
