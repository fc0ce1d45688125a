"""`longseq dna data`: public data sets by name, downloaded with checksums, and what a data set of any kind holds."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.display import aligned
from seqmodels.downloads import Remote, data_command, download, on_google_storage, on_hub, on_zenodo
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.labelled import LabelledRecords, load_labelled, splits_of
from seqmodels.tasks.genomics.tokens import N, reverse_complement


@dataclass(frozen=True)
class Task:
    """A classification task as published."""

    classes: int
    "Number of classes."
    bases: str
    "Length of the sequences."
    metric: str
    "What the benchmark's tables show."
    records: tuple[int, ...] = ()
    "Records of each of its splits, where they have been counted."


@dataclass(frozen=True)
class Collection:
    """Tasks that are published together."""

    what: str
    "The work, and its reference."
    home: str
    "Where it is downloaded: zenodo:<record>, hub:<repository> or a URL."
    splits: tuple[str, ...]
    "Its official splits."
    tasks: dict[str, Task]
    "Tasks by name."


@dataclass(frozen=True)
class Genome:
    """A genome to pretrain on, as published."""

    what: str
    "The work, and its reference."
    use: str
    "How `dna pretrain` reads it."
    bucket: str
    "Of Google's storage."
    files: dict[str, str]
    "Its files, by their name there the name here."


_GOOGLE = "https://storage.googleapis.com"
GENOMES = {
    "hg38": Genome(
        "Human genome hg38 with the intervals that HyenaDNA, Mamba and Caduceus are pretrained on (of Basenji; Kelley, "
        "2020), whose fourth column is the split",
        "longseq dna pretrain D/hg38/hg38.ml.fa.gz RUN --bed D/hg38/human-sequences.bed --window 131072",
        "basenji_barnyard2",
        {"hg38.ml.fa.gz": "hg38.ml.fa.gz", "sequences_human.bed": "human-sequences.bed"},
    ),
}


def _tasks(names: str, *fields: Any) -> dict[str, Task]:
    return {name: Task(*fields) for name in names.split()}


_SHARED = {
    **_tasks("promoter_all promoter_no_tata promoter_tata", 2, "300", "F1"),
    **_tasks("enhancers", 2, "200", "MCC"),
    **_tasks("enhancers_types", 3, "200", "MCC"),
    **_tasks("splice_sites_all", 3, "400", "accuracy"),
    **_tasks("splice_sites_acceptors splice_sites_donors", 2, "600", "F1"),
}
COLLECTIONS = {
    "genomic-benchmarks": Collection(
        "Genomic Benchmarks 1.0 (Gresova et al., 2023)",
        "zenodo:16605299",
        ("train", "test"),
        {
            "dummy_mouse_enhancers_ensembl": Task(2, "331-4776", "accuracy", (968, 242)),
            "demo_coding_vs_intergenomic_seqs": Task(2, "200", "accuracy", (75000, 25000)),
            "demo_human_or_worm": Task(2, "200", "accuracy", (75000, 25000)),
            "human_enhancers_cohn": Task(2, "500", "accuracy", (20843, 6948)),
            "human_enhancers_ensembl": Task(2, "2-573", "accuracy", (123872, 30970)),
            "human_ensembl_regulatory": Task(3, "71-802", "accuracy", (231348, 57713)),
            "human_nontata_promoters": Task(2, "251", "accuracy", (27097, 9034)),
            "human_ocr_ensembl": Task(2, "71-593", "accuracy", (139804, 34952)),
            "drosophila_enhancers_stark": Task(2, "236-3237", "accuracy", (5184, 1730)),
        },
    ),
    "nt": Collection(
        "Nucleotide Transformer, 18 tasks, as of its preprint (Dalla-Torre et al., 2023)",
        "hub:InstaDeepAI/nucleotide_transformer_downstream_tasks",
        ("train", "test"),
        {
            **_tasks("H3 H3K14ac H3K36me3 H3K4me1 H3K4me2 H3K4me3 H3K79me3 H3K9ac H4 H4ac", 2, "500", "MCC"),
            **_SHARED,
        },
    ),
    "nt-revised": Collection(
        "Nucleotide Transformer, 18 tasks, revised (Dalla-Torre et al., 2024); other data than nt, not comparable",
        "hub:InstaDeepAI/nucleotide_transformer_downstream_tasks_revised",
        ("train", "test"),
        {
            **_tasks(
                "H2AFZ H3K27ac H3K27me3 H3K36me3 H3K4me1 H3K4me2 H3K4me3 H3K9ac H3K9me3 H4K20me1", 2, "1000", "MCC"
            ),
            **{name: Task(task.classes, "-", "MCC") for name, task in _SHARED.items()},
        },
    ),
    "gue": Collection(
        "Genome Understanding Evaluation, 28 tasks (DNABERT-2; Zhou et al., 2024); one archive for all",
        "https://drive.usercontent.google.com/download?id=1uOrwlf07qGQuruXqGXWMpPn8avBoW7T-&export=download&confirm=t",
        ("train", "dev", "test"),
        {
            **{f"EMP/{name}": task for name, task in _tasks(
                "H3 H3K14ac H3K36me3 H3K4me1 H3K4me2 H3K4me3 H3K79me3 H3K9ac H4 H4ac", 2, "500", "MCC"
            ).items()},
            "mouse/0": Task(2, "101", "MCC", (6478, 810, 810)),
            "mouse/1": Task(2, "101", "MCC"),
            "mouse/2": Task(2, "101", "MCC", (2620, 328, 328)),
            "mouse/3": Task(2, "101", "MCC"),
            "mouse/4": Task(2, "101", "MCC", (15064, 1883, 1883)),
            "prom/prom_300_all": Task(2, "300", "MCC"),
            "prom/prom_300_notata": Task(2, "300", "MCC"),
            "prom/prom_300_tata": Task(2, "300", "MCC"),
            "prom/prom_core_all": Task(2, "70", "MCC", (47356, 5920, 5920)),
            "prom/prom_core_notata": Task(2, "70", "MCC"),
            "prom/prom_core_tata": Task(2, "70", "MCC", (4904, 613, 613)),
            "splice/reconstructed": Task(3, "400", "MCC"),
            "tf/0": Task(2, "101", "MCC", (32378, 1000, 1000)),
            "tf/1": Task(2, "101", "MCC", (30672, 1000, 1000)),
            "tf/2": Task(2, "101", "MCC", (19000, 1000, 1000)),
            "tf/3": Task(2, "101", "MCC"),
            "tf/4": Task(2, "101", "MCC", (19000, 1000, 1000)),
            "virus/covid": Task(9, "1000", "F1"),
        },
    ),
}  # fmt: skip


def data(words: list[str], pin: Path | None = None, quiet: bool = False) -> int:
    """Public data sets by name, and what is in a data set.

        longseq dna data list                                          names, sizes, metrics, where from
        longseq dna data get genomic-benchmarks/human_enhancers_cohn D    download one task to the folder D/...
        longseq dna data get gue D                                     or all tasks of a collection
        longseq dna data get hg38 D                                    or a genome to pretrain on
        longseq dna data info D/gue/tf/0                               what `dna train` would read there

    A download keeps the official split and file format, and dna train, dna evaluate and dna pretrain read it as it is.
    Zenodo, the Hugging Face hub and Google's storage publish checksums, against which files are checked. Google Drive
    (GUE) does not. The file source.json in the folder has every file's SHA-256: keep it, and --pin makes sure that
    another download is the same.

    info tells the records per split and class, their lengths, and how many sequences of dev and test are in train, too
    (or are the other strand of one that is). It knows every kind of data that dna train reads; those without a download
    here, too, such as the UCI repository's splice.data.

    Args:
        words: list; get NAME FOLDER; or info PATH...
        pin: source.json of an earlier download, whose files these must be.
        quiet: No progress on a terminal.

    Returns:
        0.
    """
    data_command("dna data", words, _listed, partial(get, pin=pin, quiet=quiet), _described)
    return 0


def _listed() -> str:
    parts = []
    for name, collection in COLLECTIONS.items():
        rows = []
        for task, facts in collection.tasks.items():
            row = {"name": f"{name}/{task}", "classes": facts.classes, "bases": facts.bases, "metric": facts.metric}
            rows.append(row | dict(zip(collection.splits, facts.records or ["-"] * 3, strict=False)))
        parts += [collection.what, aligned(rows, [*rows[0]]), f"from {collection.home}", ""]
    for name, genome in GENOMES.items():
        parts += [f"{name}: {genome.what}", f"  {genome.use}", f"from {_GOOGLE}/{genome.bucket}", ""]
    return "\n".join(parts).rstrip()


def get(name: str, folder: Path, pin: Path | None = None, quiet: bool = False) -> Path:
    """Download a task, or all of a collection, to folder/collection/task, or a genome to folder/name.

    What is there already is left alone.
    """
    if name in GENOMES:
        genome = GENOMES[name]
        download(partial(on_google_storage, genome.bucket, genome.files, _GOOGLE), folder / name, pin, quiet)
        return folder / name
    group, _, task = name.partition("/")
    if group not in COLLECTIONS or (task and task not in COLLECTIONS[group].tasks):
        known = COLLECTIONS[group].tasks if group in COLLECTIONS else (*COLLECTIONS, *GENOMES)
        raise InputError(f"{name!r} is no data set here; known are {', '.join(known)} (longseq dna data list)")
    collection, place = COLLECTIONS[group], folder / group
    kind, _, where = collection.home.partition(":")
    wanted = [task] if task else list(collection.tasks)
    if kind not in ("zenodo", "hub"):  # one archive for all
        if task:
            print(f"{group} comes as one archive: all of its tasks are downloaded", file=sys.stderr)
        download(lambda: [Remote(collection.home, f"{group}.zip", None)], place, pin, quiet)
        return place / task
    for one in wanted:
        find = partial(on_zenodo, where, f"{one}_v0.zip") if kind == "zenodo" else partial(on_hub, where, one)
        download(find, place / one, pin, quiet)
    return place / task


def _described(path: Path) -> str:
    """What is in a data set: a row per split, and how the classes share it."""
    rows, counts = [], []
    seen: set[bytes] = set()
    for name, records in _splits(path):
        texts = [min(tokens.tobytes(), reverse_complement(tokens).tobytes()) for tokens in records.tokens]
        own, lengths = set(texts), [len(tokens) for tokens in records.tokens]
        unknown = sum(int((tokens == N).sum()) for tokens in records.tokens) / sum(lengths)
        row = {"split": name or "all", "records": len(texts), "shortest": min(lengths)}
        row |= {"median": int(np.median(lengths)), "longest": max(lengths), "N": f"{unknown:.4%}"}
        row |= {"repeated": len(texts) - len(own), "in train": sum(text in seen for text in texts) if seen else "-"}
        rows.append(row)
        per_class = np.bincount(records.labels, minlength=len(records.classes))
        counts.append({"split": name or "all", **dict(zip(records.classes, per_class.tolist(), strict=True))})
        seen = own if name == "train" else seen
    shown = aligned(counts, [*counts[0]]) if len(counts[0]) <= 13 else f"{len(counts[0]) - 1} classes"
    return f"{path}\n{aligned(rows, [*rows[0]])}\n{shown}"


def _splits(path: Path) -> Iterator[tuple[str | None, LabelledRecords]]:
    classes = None
    for name in splits_of(path) or (None,):
        records = load_labelled(path, split=name, classes=classes)
        classes = records.classes
        yield name, records
