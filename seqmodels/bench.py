"""`longseq bench list` and `run`: the programs behind the tables and figures, by name.

They are what benchmarks/ of a checkout holds; an installed package has `bench recall` alone. A program is run as it is,
unless SIZES says with which words; the results of the synthetic tasks are runs of `bench recall`.
"""

import ast
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.record import folder_of

CHECKOUT = Path(__file__).resolve().parent.parent / "benchmarks"
Size = Literal["laptop", "gpu"]


@dataclass(frozen=True)
class Sizes:
    """What follows a program's name in each size, a line for each time that it is run; None where it has none."""

    laptop: str | None = ""
    gpu: str | None = ""


_GUE_NETWORKS = (
    "--strands conjoined --mutation-rate 0.03 --training.weight-decay 0.1 --training.precision bf16 "
    "--training.ema-decay 0.99 --training.device cuda"
)
_GUE_EACH = f"{_GUE_NETWORKS} --batch-tokens 8192 --training.learning-rate 1e-3 --seeds 3"
_GUE_RECIPES = {  # for each task; after a second --, for all of them together before
    "kmer": "--baseline kmer",
    "cnn": "--baseline cnn --pool max --dropout 0.2 --training.max-steps 3000 --training.validate-every 150 "
    f"{_GUE_EACH}",
    "hybrid": "--mixer cnn,cnn,mamba2 --n-layer 6 --bidirectional --d-model 128 --d-state 64 --pool max --dropout "
    f"0.2 --training.max-steps 3000 --training.validate-every 150 {_GUE_EACH}",
    "mamba2": f"--dropout 0.3 --training.max-steps 2400 --training.validate-every 120 {_GUE_EACH} -- "
    "--mixer mamba2 --bidirectional --d-model 128 --n-layer 4 --d-state 64 --pool mean --dropout 0.2 --epochs 12 "
    f"--batch-tokens 65536 --training.learning-rate 2e-3 {_GUE_NETWORKS}",
}
_TASKS = {"gue": "$LONGSEQ_DATA/dna/gue", "yeast": "runs/yeast-tasks"}  # those of yeast had no part in any choice
_GUE = [
    f"{folder} runs/{tasks}-{kind} --name {tasks}-{kind} -- {recipe}"
    for tasks, folder in _TASKS.items()
    for kind, recipe in _GUE_RECIPES.items()
]
_GPU_ONLY = Sizes(laptop=None)
_FSDD, _VARIANTS = "$LONGSEQ_DATA/audio/fsdd", "$LONGSEQ_DATA/variants/human_chr20_1mb"
SIZES = {
    **dict.fromkeys(
        ("alternatives", "causal_conv1d", "ceilings", "layers", "rms_norm", "selective_scan", "ssd"), _GPU_ONLY
    ),
    "audio_blocks": Sizes(
        f"{_FSDD} runs/blocks-laptop --pairs mamba2/mamba2 s4d/mamba2 --samples 16384 --step 8192 --widths 32 32 "
        "--depths 1 1 --pools 16 --precision 32 --device cpu",
        f"{_FSDD} runs/blocks",
    ),
    "audio_training": Sizes(
        f"{_FSDD} --device cpu --tokens 4096 --widths 32 32 --depths 1 1 --pools 4 --steps 4", f"{_FSDD} --profile"
    ),
    "batching": Sizes(
        "$LONGSEQ_DATA/genomes/yeast_s288c/S288C.cds.bed.gz --mixers mamba2 --batches 0",
        "$LONGSEQ_DATA/genomes/yeast_s288c/S288C.cds.bed.gz --device cuda --batch-tokens 262144",
    ),
    "classify": Sizes(gpu="--device cuda"),
    "coding": Sizes(
        "runs/coding-codons --name coding-codons -- --baseline codons --training.device cpu",
        "runs/coding-mamba2 --name coding-mamba2 -- --bidirectional --strands equivariant --d-state 64 --dropout 0.1 "
        "--batch-tokens 131072 --seeds 3 --training.max-steps 500 --training.validate-every 100 "
        "--training.learning-rate 2e-3 --training.precision bf16 --training.device cuda",
    ),
    "decode": Sizes(None, "--mixers mamba2 mamba attention --batches 1 2 4 8 16 32 64 128"),
    "explain": Sizes("$LONGSEQ_DATA/dna/gue/prom/prom_core_tata", None),
    "fasta": Sizes(gpu=None),
    "generate": Sizes("--device cpu --batches 1 8 --seconds 1"),
    "gue": Sizes(_GUE[0], "\n".join(_GUE)),
    "kernels_cpu": Sizes(gpu=None),
    "raw_digits": Sizes(
        f"{_FSDD} runs/raw_digits-laptop --name raw_digits-laptop --seeds 1 -- --widths [16,16] --depths [1,1] --pools "
        "[16] --head-dim 8 --clips.batch-tokens 16384 --training.max-steps 60 --training.validate-every 30 "
        "--training.device cpu",
        f"{_FSDD} runs/raw_digits --name raw_digits -- --start-from spoken-digits --dropout 0.2 --clips.silence 0.05 "
        "--clips.flip --clips.speed-change 8 --clips.speeds 8 --clips.noise 5 --clips.mask 0.1 --training.max-steps "
        "2000 --training.validate-every 200 --training.learning-rate 5e-4 --training.precision bf16 --training.weights "
        "bfloat16 --training.num-workers 3 --training.device cuda",
    ),
    "linear_prediction": Sizes(_FSDD, None),
    "minute": Sizes(
        "runs/music-laptop runs/minute-laptop --rate 8000 --steps 4 --step 8192 --longest 4096 --samples 16000 "
        "--widths 32 32 --depths 1 1 --pools 16 --precision 32 --workers 0 --device cpu",
        "runs/music-twice runs/chorales --temperatures 1 0.9 0.8",
    ),
    "music_context": Sizes(
        "runs/music-laptop runs/context-laptop --rate 8000 --lengths 4096 16384 --samples 65536 --step 16384 "
        "--widths 32 32 --depths 1 1 --pools 16 --precision 32 --device cpu",
        "runs/music runs/context",
    ),
    "pretrain": Sizes(
        "$LONGSEQ_DATA/genomes/blochmannia/blochmannia.fa.gz runs/blochmannia --name pretrain-blochmannia -- "
        "--validation NZ_CP010048.1 --window 512 --batch-tokens 8192 --d-model 64 --n-layer 2 --d-state 32 --kmer 6 "
        "--kmer-width 32 --validation-windows 128 --training.max-steps 600 --training.validate-every 100 "
        "--training.learning-rate 5e-3 --training.device cpu",
        None,
    ),
    "scaling": Sizes("--device cpu --lengths 1024 4096 --mixers mamba2 --layers 2"),
    "scaling_law": Sizes(
        "$LONGSEQ_DATA/genomes/enterobacteria runs/scaling-law --device cpu --widths 16 --contexts 256 1024 "
        "--context-width 16 --tokens 131072 --step 8192 --validated 65536",
        "\n".join(
            f"$LONGSEQ_DATA/genomes/enterobacteria runs/scaling-law {words}"
            for words in ("--seed 0", "--seed 1", "--seed 2", "--tokens 50331648")
        ),
    ),
    "sequence_parallel": Sizes("--device cpu --layers 2 --lengths 4096"),
    "species": Sizes(
        "$LONGSEQ_DATA/genomes/enterobacteria --lengths 1024 8192 --windows 20 --device cpu "
        "--name enterobacteria-laptop",
        "$LONGSEQ_DATA/genomes/enterobacteria",
    ),
    "spoken_digits": Sizes(
        f"spoken-digits {_FSDD} runs/judges --number 60 --seeds 1 --batch 10 --guidance 3 --no-bits --device cpu "
        "--name generated_digits-laptop",
        f"spoken-digits {_FSDD} runs/judges --guidance 3",
    ),
    "variants": Sizes(
        f"{_VARIANTS}/z.vcf.gz {_VARIANTS}/z.fa.gz runs/bases-laptop/model --context 128 --device cpu "
        "--name variants-laptop",
        f"{_VARIANTS}/z.vcf.gz {_VARIANTS}/z.fa.gz runs/bases/model --device cuda",
    ),
    "sweeps": Sizes(gpu="--length 4194304 --width 256 --device cuda --dtype bfloat16"),
}
_CHORALES = "audio render $LONGSEQ_DATA/audio/jsb_chorales/Jsb16thSeparated.json.gz"
_BASES = f"dna pretrain {_VARIANTS}/z.fa.gz"
MADE_BY = {  # what programs read, and the program, or the command of longseq, that makes it where it is missing
    "runs/yeast-tasks": "yeast_tasks.py $LONGSEQ_DATA/genomes/yeast_s288c runs/yeast-tasks",
    "runs/judges": f"audio judge {_FSDD} runs/judges --validation index=5-9",
    "runs/music": f"{_CHORALES} runs/music --workers 16",
    "runs/music-twice": f"{_CHORALES} runs/music-twice --workers 16 --copies 2",
    "runs/music-laptop": f"{_CHORALES} runs/music-laptop --seconds 2 --sample-rate 8000 --tempo [2400,2400]",
    "runs/bases/model": f"{_BASES} runs/bases --objective masked-token --strands equivariant --batch-tokens 131072 "
    "--training.max-steps 1000 --training.validate-every 250 --training.learning-rate 2e-3 --training.precision bf16",
    "runs/bases-laptop/model": f"{_BASES} runs/bases-laptop --window 512 --batch-tokens 8192 --d-model 32 --n-layer 1 "
    "--training.max-steps 40 --training.learning-rate 5e-3 --training.device cpu",
}
_RECALL = {  # tables of the synthetic tasks: what, mixers, and what is varied on a GPU
    "copying": ("Selective copying (Mamba paper, Table 1)", ("mamba", "mamba2", "s4d", "attention", "lstm"), [""]),
    "induction": (
        "Induction heads, tested up to 2^20 (Mamba paper, Table 2)",
        ("mamba", "mamba2", "attention", "window", "lstm"),
        [""],
    ),
    "mqar": (
        "Multi-query associative recall (Mamba-2 paper, Figure 8)",
        ("mamba", *(f"mamba2 --d-state {n}" for n in (16, 64, 256)), "attention", "window", "lstm"),
        [f"--length {length} --d-model {width}" for length in (256, 512, 1024) for width in (32, 64, 128, 256)],
    ),
}
SEEDS = {"laptop": 1, "gpu": 3}


def list() -> None:
    """The programs behind the tables: name, sizes in which they can be run, and what they measure."""
    rows = []
    for name in _names():
        sizes = ["laptop", "gpu"] if name in _RECALL else [s for s in ("laptop", "gpu") if _words(name, s) is not None]
        rows.append({"name": name, "sizes": " ".join(sizes), "what": _what(name)})
    print(aligned(rows, ["name", "sizes", "what"]), end="")
    if not CHECKOUT.is_dir():
        print("the programs of the other tables are in benchmarks/ of the source repository", file=sys.stderr)


def run(name: str, size: Size = "laptop", show: bool = False) -> int:
    """Run the program behind a table, and say which JSON files of results it has written.

        longseq bench run kernels_cpu
        longseq bench run mqar --size gpu --show        only says what would be run, one command per line

    Args:
        name: What `longseq bench list` shows. What a program needs first, such as a model, is made in runs/ of this
            folder, unless it is there.
        size: laptop, which a CPU can do, or gpu.
        show: Print the commands instead of running them, to choose some or to spread them over GPUs.

    Returns:
        0, or the code with which the program has failed.
    """
    known = _names()
    if name not in known:
        raise InputError(f"{name!r} is not the name of a program; the names are {', '.join(known)}")
    commands = _commands(name, size)
    if show:
        print("\n".join(map(shlex.join, commands)))
        return 0
    before = _written()
    for command in commands:
        done = subprocess.run(command, check=False)
        if done.returncode:
            return done.returncode
    written = sorted(path for path, when in _written().items() if before.get(path) != when)
    print(
        "\n".join(f"wrote {os.path.relpath(path)}" for path in written)
        or f"no file under {CHECKOUT / 'results'} changed"
    )
    return 0


def results_folder(gpu: str) -> Path:
    """Where results of a GPU (or 'cpu') belong: in a checkout benchmarks/results, otherwise the current folder."""
    if not CHECKOUT.is_dir():
        return Path()
    return CHECKOUT / "results" / ("" if gpu == "cpu" else folder_of(gpu))


def _names() -> tuple[str, ...]:
    """The tables of the synthetic tasks, and the programs that record results."""
    programs = (path.stem for path in CHECKOUT.glob("*.py") if _records(path.read_text()))
    return (*_RECALL, *sorted(programs))


def _records(source: str) -> bool:
    parts = {name.split(".")[0] for node in ast.walk(ast.parse(source)) for name in _imported(node)}
    return bool(parts & {"record", "timing"}) and "__main__" in source


def _imported(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, ast.Import):
        return tuple(alias.name for alias in node.names)
    return (node.module or "",) if isinstance(node, ast.ImportFrom) else ()


def _what(name: str) -> str:
    if name in _RECALL:
        return _RECALL[name][0]
    said = ast.get_docstring(ast.parse((CHECKOUT / f"{name}.py").read_text())) or ""
    return " ".join(said.split("\n\n")[0].split())


def _words(name: str, size: Size) -> str | None:
    return getattr(SIZES.get(name, Sizes()), size)


def _commands(name: str, size: Size) -> tuple[tuple[str, ...], ...]:
    """The commands of a table, as words."""
    if name in _RECALL:
        start = (sys.executable, "-m", "seqmodels", "bench", "recall", "--task", name, "--size", size)
        _, mixers, varied = _RECALL[name]
        return tuple(
            (*start, "--mixer", *shlex.split(f"{mixer} {options} --seed {seed}"))
            for seed in range(SEEDS[size])
            for options in (varied if size == "gpu" else [""])
            for mixer in mixers
        )
    words, program = _words(name, size), os.path.relpath(CHECKOUT / f"{name}.py")
    if words is None:
        raise InputError(f"{name} has no size {size}; `python {program} --help` says what it needs")
    if "$LONGSEQ_DATA" in words and not os.environ.get("LONGSEQ_DATA"):
        line = words.partition("\n")[0]
        raise InputError(f"{name} reads data; set LONGSEQ_DATA to the folder that is meant in: {line}")
    missing = [word for word in words.split() if word in MADE_BY and not Path(word).exists()]
    several = ("-m", "torch.distributed.run", "--nproc-per-node", "gpu" if size == "gpu" else "2")
    start = (sys.executable, *(several if name == "sequence_parallel" else ()), program)
    return (
        *(_maker(*_split(MADE_BY[word])) for word in dict.fromkeys(missing)),
        *((*start, *_split(line)) for line in words.split("\n")),
    )


def _maker(first: str, *words: str) -> tuple[str, ...]:
    """A program of benchmarks/, or a command of longseq."""
    start = (os.path.relpath(CHECKOUT / first),) if first.endswith(".py") else ("-m", "seqmodels", first)
    return (sys.executable, *start, *words)


def _split(words: str) -> tuple[str, ...]:
    return tuple(map(os.path.expandvars, shlex.split(words)))


def _written() -> dict[Path, int]:
    """When each file of results was written."""
    return {path: path.stat().st_mtime_ns for path in (CHECKOUT / "results").rglob("*.json")}
