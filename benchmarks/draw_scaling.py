"""Draws tokens per second and memory against length from what scaling.py recorded, and prints the table.

python benchmarks/draw_scaling.py benchmarks/results/h200/scaling.json docs/scaling.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

SHOWN = (1024, 16384, 131072, 262144, 524288, 1048576, 2097152, 4194304)


def label(row: dict) -> str:
    """Mixer, and how many tokens' activations are kept if not all."""
    kept = row["shape"]["recompute"]
    return row["shape"]["mixer"] + (f", recompute {kept:,}" if kept else "")


def main() -> None:
    """Draw and print."""
    source, picture = map(Path, sys.argv[1:])
    lines: dict[str, list[dict]] = {}
    for row in json.loads(source.read_text()):
        lines.setdefault(label(row), []).append(row)
    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for name, rows in lines.items():
        style = {"marker": "o", "markersize": 3, "linestyle": "--" if "recompute" in name else "-", "label": name}
        rows.sort(key=lambda row: row["l"])
        if len(rows) > 1:
            speed.plot([r["l"] for r in rows], [r["tokens_per_s"] for r in rows], **style)
            memory.plot([r["l"] for r in rows], [r["peak_gb"] for r in rows], **style)
    for axes, what in ((speed, "tokens per second"), (memory, "peak memory (GB)")):
        axes.set(xscale="log", yscale="log", xlabel="length of the sequence (tokens)", ylabel=what)
        axes.grid(alpha=0.3)
    speed.legend(fontsize=7)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print("| | " + " | ".join(f"{l:,}" for l in SHOWN) + " |")
    print("|---" * (len(SHOWN) + 1) + "|")
    for name, rows in lines.items():
        at = {r["l"]: f"{r['tokens_per_s'] / 1e6:.3g} M/s, {r['peak_gb']:.3g} GB" for r in rows}
        print(f"| {name} | " + " | ".join(at.get(l, "") for l in SHOWN) + " |")


if __name__ == "__main__":
    main()
