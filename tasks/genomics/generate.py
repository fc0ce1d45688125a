"""`longseq dna generate`: new sequences from a model that predicts the next base."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.errors import InputError
from seqmodels.files import replacing
from seqmodels.sampling import Sampling, sample
from seqmodels.table import check_writable
from seqmodels.tasks.genomics.inference import Dtype
from seqmodels.tasks.genomics.pieces import ANSWERED, Records
from seqmodels.tasks.genomics.tokens import A, Counts, T, Tokens, decode, encode

_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".gz", ".bgz")
_WIDTH = 80  # letters of a line of FASTA


def generate(
    *,
    prompt: str | None = None,
    model: str | None = None,
    output: Path | None = None,
    bases: int = 1000,
    number: int = 1,
    batch: int | None = None,
    include_prompt: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "float32",
    quiet: bool = False,
) -> int:
    """Write new sequences that go on from given ones, base by base, as FASTA.

        longseq dna generate --model runs/yeast/model --prompt ATGGCTAGC --bases 300 --number 10 -o new.fa
        longseq dna generate --model runs/yeast/model --prompt starts.fa.gz --temperature 0.7 > new.fa

    The records are called PROMPT_1, PROMPT_2, ... after the record that they go on from (or prompt_1, ...). After each
    name stand how long the prompt was, and the bits per base that the new sequence has under the model. Only A, C, G
    and T come out. A sequence depends on the seed, the place of its prompt and its own number alone, not on how many
    are made.

    Args:
        prompt: Bases, such as ATGGCT, or a FASTA file of sequences to go on from, plain or compressed; - is standard
            input.
        model: Folder of a model that predicts the next base (dna pretrain), or its id on the Hugging Face hub.
        output: FASTA file to write; without it the sequences go to the screen.
        bases: New bases of each sequence.
        number: How many sequences to make from each prompt.
        batch: How many to make at a time; more are faster, but round differently. By default 1 on a CPU, 256 on a GPU.
        include_prompt: Put the prompt before the new bases.
        temperature: Divides the logits; below 1 is safer, above 1 wilder, 0 takes the most likely base.
        top_k: Draw from the k most likely bases only; 0 means from all.
        top_p: Draw from the most likely bases that together reach this probability; 1 means from all.
        seed: Seed of the random numbers; the same seed gives the same file on the same machine.
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if a record of the prompts could not be read as it should (the reasons are on standard error).
    """
    sampling = Sampling(temperature, top_k, top_p)
    if prompt is None or model is None:
        raise InputError("name a model with --model, and give bases or a FASTA file with --prompt")
    for name, value in (("bases", bases), ("number", number), ("batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    if output is not None:
        if str(prompt) != "-" and Path(prompt).exists() and output.resolve() == Path(prompt).resolve():
            raise InputError(f"the output {output} is also the prompt; give another name")
        check_writable(output)
    prompts, problems = read_prompts(prompt)
    network: Any = seqmodels.load(model, device=choose_device(device), dtype=getattr(torch, dtype))
    config = network.config
    if config.head.task != "next_token" or config.tokenizer.get("type") != "dna":
        raise InputError(
            f"model {model} does not predict the next base (head {config.head.task!r}, tokens "
            f"{config.tokenizer.get('type')!r}); give one made by 'longseq dna pretrain'"
        )
    batch = batch if batch is not None else 1 if network.device.type == "cpu" else 256
    barred = [token for token in range(config.vocab_size) if not A <= token <= T]
    progress = tqdm(total=len(prompts) * number * bases, unit="base", unit_scale=True,
                    disable=quiet or not sys.stderr.isatty())  # fmt: skip
    parts = list[str]()
    with progress:
        for place, (name, tokens) in enumerate(prompts):
            if not len(tokens):
                continue
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            for first in range(0, number, batch):
                items = range(first, min(first + batch, number))
                seeds = [(seed, place, item) for item in items]
                made, nats = sample(
                    network, ids.expand(len(items), -1), bases, seeds=seeds, sampling=sampling, barred=barred,
                    progress=progress.update,
                )  # fmt: skip
                for item, row, row_nats in zip(items, made.cpu().numpy(), nats.double().cpu().numpy(), strict=True):
                    bits = -row_nats.mean() / np.log(2)
                    text = decode(row.astype(np.uint8))
                    if include_prompt:
                        text = decode(tokens) + text
                    said = f"prompt={len(tokens)} new={bases} bits_per_base={bits:.4f} seed={seed}"
                    lines = [text[i : i + _WIDTH] for i in range(0, len(text), _WIDTH)]
                    parts.append("\n".join([f">{name}_{item + 1} {said}", *lines, ""]))
                    if output is None:
                        sys.stdout.write(parts.pop())
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text("".join(parts), encoding="utf-8")
    for line in problems:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if problems else 0


def read_prompts(prompt: str) -> tuple[list[tuple[str, Tokens]], list[str]]:
    """Names and tokens of what to go on from, bases or the records of a file, and what is wrong with the others."""
    path = Path(prompt)
    if prompt != "-" and not path.is_file() and not path.name.lower().endswith(_SUFFIXES):
        counts = Counts()
        tokens = encode(prompt.encode(), counts)
        if counts.invalid:
            position, character = counts.invalid
            raise InputError(f"the prompt is no file, and {character!r} at position {position} of it is no base")
        if not len(tokens):
            raise InputError("the prompt is empty; give at least one base")
        return [("prompt", tokens)], []
    prompts, problems = list[tuple[str, Tokens]](), list[str]()
    try:
        for piece in Records(prompt).pieces(longest=sys.maxsize):
            row = piece.describe()
            if row["status"] in ANSWERED:
                prompts.append((row["record_id"] or "prompt", piece.tokens))
            else:
                problems.append(f"{prompt}: record {row['record_id']!r} is {row['status']}: {row['note']}")
                prompts.append(("", piece.tokens[:0]))  # the places of the others stay
    except InputError as error:
        problems.append(str(error))
    if not any(len(tokens) for _, tokens in prompts):
        raise InputError("; ".join(problems))
    return prompts, problems
