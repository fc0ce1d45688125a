"""The commands `longseq audio generate|evaluate`: each function's signature is its flags."""

import sys
from pathlib import Path
from typing import Any

from seqmodels.errors import InputError
from seqmodels.files import replacing, write_json


def generate(
    *,
    prompt: str | None = None,
    speaker: str | None = None,
    label: str = "",
    model: str = "spoken-digits",
    output: Path = Path("out.wav"),
    seconds: float = 2.0,
    number: int = 1,
    batch: int | None = None,
    include_prompt: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    picture: bool = True,
    device: str = "auto",
) -> None:
    """Generate sound from a label or from the start of a recording.

    Writes the sound, a JSON file beside it that says how it was made, and a picture of it.

    Args:
        prompt: A label that the model knows (such as "seven"), or a recording (.wav, .flac, .ogg, .mp3) to go on from.
        speaker: The voice: a value of the model's condition "speaker".
        label: Values of any conditions, as name=value,...
        model: A shipped model's name, a checkpoint folder, or a name on the Hugging Face hub.
        output: Sound file to write; the suffix chooses the format.
        seconds: Longest new sound in seconds; the model may end it earlier.
        number: How many to make; with more than one, the files are named out_0.wav, out_1.wav, ...
        batch: How many to make at a time; more are faster, but round differently. By default 1 on a CPU, 256 on a GPU.
        include_prompt: Put the recording that was the prompt before the new sound.
        temperature: Divides the logits; below 1 is safer, above 1 wilder, 0 takes the most likely sample.
        top_k: Draw from the k most likely values of a sample only; 0 means from all.
        top_p: Draw from the most likely values that together reach this probability; 1 means from all.
        seed: Seed of the random numbers; the same seed gives the same file on the same machine.
        picture: Whether to write a picture (.png) of waveform and spectrogram.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
    """
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    import seqmodels
    from seqmodels.checkpoint import choose_device
    from seqmodels.sampling import Sampling
    from seqmodels.tasks.audio.generate import generate as generate_sound
    from seqmodels.tasks.audio.generate import prompt_labels
    from seqmodels.tasks.audio.waveform import check_writable, mu_law_of, read_audio, resample

    sampling = Sampling(temperature, top_k, top_p)
    network = seqmodels.load(model, device=choose_device(device))
    rate = mu_law_of(network.config.tokenizer).sample_rate
    output = Path(output)
    check_writable(output, rate)
    given = parse_labels(label, {"speaker": speaker} if speaker is not None else {})
    labels, recording = prompt_labels(network.config.conditions, prompt, given)
    heard = None
    if recording is not None:
        heard, recorded_rate = read_audio(recording)
        if recorded_rate != rate:
            print(f"{recording}: resampled from {recorded_rate} Hz to the model's {rate} Hz", file=sys.stderr)
        heard = resample(heard, recorded_rate, rate)

    with _progress(round(seconds * rate) * number, "samples") as bar:
        made = generate_sound(
            network,
            labels=labels,
            prompt=heard,
            seconds=seconds,
            number=number,
            batch=batch,
            sampling=sampling,
            seed=seed,
            progress=bar.update,
        )
    paths = [output] if number == 1 else [output.with_stem(f"{output.stem}_{item}") for item in range(number)]
    for item, path in enumerate(paths):
        _write_item(path, made, item, heard if include_prompt else None, picture, {
            "model": model,
            "weights_sha256": weights_sha256(model),
            "labels": labels,
            "arguments": arguments,
        })  # fmt: skip
    total = sum(map(len, made.samples))
    speed = f"{made.samples_per_second:.0f} samples/s, {made.samples_per_second / rate:.3f} x real time"
    names = str(paths[0]) if number == 1 else f"{paths[0]} ... {paths[-1].name}"
    print(f"wrote {names}: {total / rate:.2f} s of new sound, {speed}", file=sys.stderr)


def _write_item(path: Path, made: Any, item: int, heard: Any, picture: bool, facts: dict[str, Any]) -> None:
    import numpy as np

    from seqmodels.tasks.audio.picture import draw_picture
    from seqmodels.tasks.audio.waveform import write_audio

    samples = made.samples[item] if heard is None else np.concatenate([heard, made.samples[item]])
    start = 0.0 if heard is None else len(heard) / made.sample_rate
    write_audio(path, samples, made.sample_rate)
    facts = facts | {
        "item": item,
        "seed": facts["arguments"]["seed"],
        "sample_rate": made.sample_rate,
        "new_samples": len(made.samples[item]),
        "new_sound_starts_at_seconds": start,
        "ended_by_model": made.ended[item],
        "bits_per_sample": made.bits_per_sample[item],
        "samples_per_second": round(made.samples_per_second, 1),
        "versions": versions(),
    }
    write_json(path.with_suffix(".json"), facts)
    if picture:
        title = ", ".join([*facts["labels"].values(), f"seed {facts['seed']}"])
        with replacing(path.with_suffix(".png")) as file:
            draw_picture(file, samples, made.sample_rate, title, start)


def evaluate(
    data: Path,
    *,
    model: str = "spoken-digits",
    split: str = "test",
    table: Path | None = None,
    test: str | None = None,
    validation: str | None = None,
    split_seed: int = 0,
    conditions: str = "",
    text: str | None = None,
    labels: bool = True,
    output: Path | None = None,
    batch_tokens: int = 65536,
    device: str = "auto",
) -> None:
    """Bits per sample of recordings under a model: overall, and for each value of each condition.

    Of a classifier: accuracy and more with 95 % bootstrap intervals, the same of each class, and the confusion matrix.

    Args:
        data: A folder, zip or tar of recordings.
        model: A shipped model's name, a checkpoint folder, or a name on the Hugging Face hub.
        split: Which recordings: train, validation, test or all.
        table: CSV table with a column "file" and labels; by default metadata.csv in the folder or beside the zip.
        test: Test recordings: a rule column=value,value or a fraction; by default split=test if there is such a column.
        validation: Validation recordings: a rule such as index=5-9, or a fraction of what test leaves; by default
            split=validation if the table has such rows, else 0.1.
        split_seed: Seed of the fractions above.
        conditions: Columns of the model's conditions, as name=column,..., or the column of a classifier's labels; by
            default found by their values.
        text: Column of the text that the model is told, if it was trained with text.
        labels: Whether the model is told the labels.
        output: JSON file to write the results to.
        batch_tokens: Positions that go through the model at a time.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
    """
    import numpy as np

    import seqmodels
    from seqmodels.checkpoint import choose_device
    from seqmodels.tasks.audio.datasets import lay_out
    from seqmodels.tasks.audio.evaluate import as_table, report, score
    from seqmodels.tasks.audio.tables import match_conditions, open_recordings, split_rows, split_rules, texts_of
    from seqmodels.tasks.audio.waveform import mu_law_of

    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}; create it first")
    network = seqmodels.load(model, device=choose_device(device))
    mu_law = mu_law_of(network.config.tokenizer)
    recordings = open_recordings(data, table)
    if split == "all":
        chosen = np.arange(recordings.rows.height)
    else:
        rules = split_rules(recordings.rows, test, validation)
        parts = split_rows(recordings.rows, **rules, seed=split_seed)
        if split not in parts:
            raise InputError(f"--split is {split!r}; expected train, validation, test or all")
        chosen = parts[split]
        if len(chosen) == 0:
            raise InputError(f"the split {split!r} has no recordings; say which with --{split} or use --split all")
    facts = {"model": model, "weights_sha256": weights_sha256(model), "data": str(data), "split": split}
    if network.config.head.task == "sequence":
        from seqmodels.metrics import as_tables
        from seqmodels.tasks.audio.classify import classes_of, evaluate_classifier

        classes = classes_of(network, model)
        with _progress(len(chosen), "clips") as bar:
            results = evaluate_classifier(
                network, recordings.select(chosen), conditions, batch_tokens=batch_tokens, progress=bar.update
            )
        print(f"{results['n']} recordings\n{as_tables(results, classes)}")
        if output is not None:
            write_json(output, facts | results | {"versions": versions()})
        return
    rows = recordings.rows[chosen]
    ids = match_conditions(rows, network.config.conditions, conditions)
    told = ids if labels else np.tile([len(c.values) for c in network.config.conditions], (len(ids), 1))
    waves, texts = recordings.select(chosen).read(mu_law.sample_rate), texts_of(rows, text)
    clips = lay_out(waves, mu_law, labels=told.reshape(ids.shape), texts=texts)
    with _progress(len(chosen), "clips") as bar:
        scores = score(network, clips, batch_tokens=batch_tokens, progress=bar.update)
    results = report(scores, network.config.conditions, ids)
    print(as_table(results))
    if output is not None:
        write_json(output, facts | {"labels_told": labels, "text_told": text} | results | {"versions": versions()})


def parse_labels(text: str, labels: dict[str, str]) -> dict[str, str]:
    """Labels by condition name, from "name=value,..." added to `labels`."""
    labels = dict(labels)
    for pair in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise InputError(f"--label is {pair!r}; expected name=value,...")
        if labels.setdefault(name, value) != value:
            raise InputError(f"the label {name!r} is given twice: {labels[name]!r} and {value!r}")
    return labels


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    from importlib.metadata import version

    return {name: version(name) for name in ("longseq", "torch", "torchaudio", "numpy", "soundfile")}


def weights_sha256(model: str) -> str | None:
    """SHA-256 of a model's weights file; None if its weights are not one safetensors file."""
    import hashlib

    from seqmodels.checkpoint import resolve

    path = resolve(model) / "model.safetensors"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress(total: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", disable=not sys.stderr.isatty(), file=sys.stderr)
