"""The commands `longseq audio generate|evaluate|score`: each function's signature is its flags."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seqmodels.errors import InputError
from seqmodels.files import replacing, write_json
from seqmodels.table import Format, TableWriter


def generate(
    *,
    prompt: str | None = None,
    text: str | None = None,
    speaker: str | None = None,
    label: str = "",
    model: str = "spoken-digits",
    output: Path = Path("out.wav"),
    seconds: float = 2.0,
    number: int = 1,
    batch: int | None = None,
    prompt_start: float = 0.0,
    prompt_end: float | None = None,
    include_prompt: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float | None = None,
    seed: int = 0,
    stream: bool = False,
    out_rate: int | None = None,
    normalize: Literal["none", "peak", "rms", "lufs"] = "none",
    subtype: str | None = None,
    picture: bool = True,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Generate sound from a label, from text, or from the start of a recording of any length.

        longseq audio generate --prompt seven --speaker theo -o seven.wav
        longseq audio generate --prompt clip.flac --seconds 5 --include-prompt --out-rate 44100 -o more.flac
        longseq audio generate --prompt recordings/ -n 3 -o new.wav         # new_CLIP_0.wav, ... of every recording
        longseq audio generate --prompt seven --seconds 60 -o - | aplay -f S16_LE -r 8000

    Writes the sound, a JSON file beside it that says how it was made, and a picture of it. Files of these names are
    replaced. An item depends on the seed, its prompt and its own number alone, not on how many are made.

    Args:
        prompt: A label that the model knows (such as "seven"), a recording (.wav, .flac, .ogg, .mp3) to go on from, or
            a folder of such. To a model of text any other words are text.
        text: Text that the model is told, if it was trained with text.
        speaker: The voice: a value of the model's condition "speaker".
        label: Values of any conditions, as name=value,...
        model: A shipped model's name, a checkpoint folder, or a name on the Hugging Face hub.
        output: Sound file to write; the suffix chooses the format. - is standard output: the samples alone, as they are
            made, signed 16-bit little-endian.
        seconds: Longest new sound in seconds; the model may end it earlier.
        number: How many to make; with more than one, the files are named out_0.wav, out_1.wav, ...
        batch: How many to make at a time; more are faster, but round differently. By default 1 on a CPU, 256 on a GPU.
        prompt_start: Where in the recording the prompt begins, in seconds.
        prompt_end: Where in the recording the prompt ends, in seconds; by default its end.
        include_prompt: Put the recording that was the prompt before the new sound, as it was recorded.
        temperature: Divides the logits; below 1 is safer, above 1 wilder, 0 takes the most likely sample.
        top_k: Draw from the k most likely values of a sample only; 0 means from all.
        top_p: Draw from the most likely values that together reach this probability; 1 means from all.
        guidance: Classifier-free guidance: how much more than usual the labels and the text say; 1 is none, twice as
            slow otherwise. By default what the model's configuration says.
        seed: Seed of the random numbers; the same seed gives the same file on the same machine.
        stream: Let the file grow as the sound is made, in constant memory and without a picture; with --include-prompt
            for prompts of any length, too.
        out_rate: Sample rate of the file in Hz; by default the model's.
        normalize: Level of the file: none leaves it, peak is -1 dBFS, rms -18 dBFS, lufs -14 LUFS (ITU-R BS.1770).
        subtype: Kind of samples in libsndfile's words, such as PCM_24 or FLOAT; by default 16 bits if lossless.
        picture: Whether to write a picture (.png) of waveform and spectrogram.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: Number format of the weights and activations; bfloat16 is for GPUs.

    Returns:
        0, or 2 if a recording of a folder could not be gone on from (the reasons are on standard error).
    """
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    import torch

    import seqmodels
    from seqmodels.checkpoint import choose_device
    from seqmodels.sampling import Sampling
    from seqmodels.tasks.audio.generate import Heard, is_recording, prompt_labels
    from seqmodels.tasks.audio.waveform import is_audio_name, mu_law_of

    sampling = Sampling(temperature, top_k, top_p, guidance)
    for name, value in (("number", number), ("batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    pipe, output = str(output) == "-", Path(output)
    if (stream or pipe) and (number > 1 or normalize != "none"):
        raise InputError(
            "sound that is written as it is made is of one item, at its own level; drop --number, --normalize"
        )
    network = seqmodels.load(model, device=choose_device(device), dtype=getattr(torch, dtype))
    mu_law = mu_law_of(network.config.tokenizer)
    given = parse_labels(label, {"speaker": speaker} if speaker is not None else {})
    conditions = network.config.conditions
    known = prompt is None or is_recording(prompt) or any(prompt in condition.values for condition in conditions)
    if mu_law.text and text is None and not known:
        prompt, text = None, prompt
    labels, recording = prompt_labels(conditions, prompt, given)
    request = _Request(
        network, labels, text, sampling, seconds, number, batch, seed, include_prompt, out_rate or mu_law.sample_rate,
        normalize, subtype, picture,
        {
            "model": model, "weights_sha256": weights_sha256(model), "labels": labels, "text": text,
            "guidance": sampling.guided_by(network, labels or text).guidance,
            "arguments": arguments,
        },
    )  # fmt: skip
    request.check(output, pipe)
    if recording is None or not recording.is_dir():
        heard = None
        if recording is not None:
            if not pipe and output.exists() and recording.exists() and output.samefile(recording):
                raise InputError(f"the output {output} is also the prompt; give another name")
            heard = Heard(recording, mu_law, start=prompt_start, end=prompt_end)
            if heard.rate != mu_law.sample_rate:
                rates = f"resampled from {heard.rate} Hz to the model's {mu_law.sample_rate} Hz"
                print(f"{recording}: {rates}", file=sys.stderr)
        (request.stream if stream or pipe else request.write)(heard, None if pipe else output)
        return 0
    clips = sorted(path for path in recording.iterdir() if is_audio_name(path))
    if not clips:
        raise InputError(f"{recording}: holds no recordings; expected .wav, .flac, .ogg or .mp3 files")
    if stream or pipe:
        raise InputError("sound that is written as it is made goes on from one recording; drop --stream, or name one")
    failed = 0
    for clip in clips:
        try:
            heard = Heard(clip, mu_law, start=prompt_start, end=prompt_end)
            request.write(heard, output.with_stem(f"{output.stem}_{clip.stem}"))
        except InputError as error:
            failed += 1
            print(f"longseq: {error}", file=sys.stderr)
    if failed == len(clips):
        raise InputError(f"{recording}: none of its {len(clips)} recordings could be gone on from")
    return 2 if failed else 0


@dataclass(frozen=True)
class _Request:
    """What `generate` was asked, but for the prompt and the name of the file."""

    network: Any
    labels: dict[str, str]
    text: str | None
    sampling: Any
    seconds: float
    number: int
    batch: int | None
    seed: int
    include_prompt: bool
    out_rate: int
    normalize: str
    subtype: str | None
    picture: bool
    facts: dict[str, Any]

    @property
    def rate(self) -> int:
        """The model's, in Hz."""
        return self.network.config.tokenizer["sample_rate"]

    def check(self, output: Path, pipe: bool) -> None:
        """An InputError now rather than after the sound is made."""
        from seqmodels.tasks.audio.waveform import RATES, check_writable

        if not RATES[0] <= self.out_rate <= RATES[1]:
            raise InputError(f"out-rate is {self.out_rate} Hz; expected {RATES[0]} to {RATES[1]:,} Hz")
        if not pipe:
            check_writable(output, self.out_rate, self.subtype)

    def write(self, heard: Any, path: Path) -> None:
        """All items, each with its story and its picture."""
        import numpy as np

        from seqmodels.tasks.audio.generate import generate as generate_sound
        from seqmodels.tasks.audio.generate import joined
        from seqmodels.tasks.audio.loudness import normalise
        from seqmodels.tasks.audio.picture import draw_picture
        from seqmodels.tasks.audio.waveform import Writer

        with _progress(round(max(self.seconds, 0) * self.rate) * self.number, "samples", self.rate) as advance:
            made = generate_sound(
                self.network, labels=self.labels, text=self.text, prompt=heard, seconds=self.seconds,
                number=self.number, batch=self.batch, sampling=self.sampling, seed=self.seed, progress=advance,
            )  # fmt: skip
        several = self.number > 1
        paths = [path.with_stem(f"{path.stem}_{item}") if several else path for item in range(self.number)]
        before, bits = heard if self.include_prompt else None, made.bits_per_sample
        for item, name in enumerate(paths):
            samples = np.concatenate(list(joined(before, [made.samples[item]], self.rate, self.out_rate)))
            samples, level = normalise(samples, self.out_rate, self.normalize)
            with Writer(name, self.out_rate, subtype=self.subtype) as writer:
                writer.write(samples)
            self._say(name, writer, [level] if level else [])
            new = len(made.samples[item])
            self._write_story(name, writer, item, before, new, made.ended[item], bits[item], made.samples_per_second)
            if self.picture:
                words = [self.text] if self.text else []
                with replacing(name.with_suffix(".png")) as file:
                    title = ", ".join([*self.labels.values(), *words, f"seed {self.seed}"])
                    draw_picture(file, samples, self.out_rate, title, 0.0 if before is None else before.seconds)
        total = sum(map(len, made.samples)) / self.rate
        names = str(paths[0]) if not several else f"{paths[0]} ... {paths[-1].name}"
        print(f"wrote {names}: {total:.2f} s of new sound, {self._speed(made.samples_per_second)}", file=sys.stderr)

    def stream(self, heard: Any, path: Path | None) -> None:
        """One item, into a file or standard output as it is made."""
        import time

        from seqmodels.tasks.audio.generate import Stream, joined
        from seqmodels.tasks.audio.waveform import Writer, as_int16

        sound = Stream(
            self.network, labels=self.labels, text=self.text, prompt=heard, seconds=self.seconds,
            sampling=self.sampling, seed=self.seed,
        )  # fmt: skip
        before = heard if self.include_prompt else None
        blocks = joined(before, sound, self.rate, self.out_rate)
        begun = time.perf_counter()
        with _progress(round(self.seconds * self.rate), "samples", self.rate) as advance, ExitStack() as stack:
            writer = None if path is None else stack.enter_context(
                Writer(path, self.out_rate, subtype=self.subtype, grow=True)
            )  # fmt: skip
            reported = 0
            for block in blocks:
                if writer is None:
                    sys.stdout.buffer.write(as_int16(block).astype("<i2").tobytes())
                    sys.stdout.buffer.flush()
                else:
                    writer.write(block)
                advance(sound.made - reported)
                reported = sound.made
        speed = sound.made / max(time.perf_counter() - begun, 1e-9)
        if path is not None and writer is not None:
            self._say(path, writer, [])
            self._write_story(path, writer, 0, before, sound.made, sound.ended, sound.bits_per_sample, speed)
        name = "standard output (s16le, mono)" if path is None else path
        said = f"{sound.made / self.rate:.2f} s of new sound at {self.out_rate} Hz, {self._speed(speed)}"
        print(f"wrote {name}: {said}", file=sys.stderr)

    def _speed(self, samples_per_second: float) -> str:
        return f"{samples_per_second:.0f} samples/s, {samples_per_second / self.rate:.3f} x real time"

    def _say(self, path: Path, writer: Any, notes: list[str]) -> None:
        if writer.clipped:
            notes = [*notes, f"{writer.clipped} samples beyond full scale were clipped; --normalize peak avoids that"]
        for note in notes:
            print(f"{path}: {note}", file=sys.stderr)

    def _write_story(
        self, path: Path, writer: Any, item: int, before: Any, new: int, ended: bool, bits: float, speed: float
    ) -> None:
        facts = {
            "seed": self.seed,
            "sample_rate": self.out_rate,
            "model_rate": self.rate,
            "subtype": writer.subtype,
            "item": item,
            "new_samples": new,
            "new_sound_starts_at_seconds": 0.0 if before is None else before.seconds,
            "ended_by_model": ended,
            "bits_per_sample": bits if new else None,
            "samples_per_second": round(speed, 1),
            "clipped_samples": writer.clipped,
            "versions": versions(),
        }
        write_json(path.with_suffix(".json"), self.facts | facts)


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
    context: int = 0,
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
        context: Read recordings in pieces of so many samples, knowing nothing from before each; 0 reads them whole.
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
    if context < 0:
        raise InputError(f"--context is {context}; expected a number of samples, or 0 for whole recordings")
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
        with _progress(len(chosen), "clips") as advance:
            results = evaluate_classifier(
                network, recordings.select(chosen), conditions, batch_tokens=batch_tokens, progress=advance
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
    with _progress(len(chosen), "clips") as advance:
        scores = score(network, clips, batch_tokens=batch_tokens, longest=context or None, progress=advance)
    results = report(scores, network.config.conditions, ids)
    print(as_table(results))
    if output is not None:
        write_json(
            output,
            facts | {"labels_told": labels, "text_told": text, "context": context} | results | {"versions": versions()},
        )


def score(
    files: list[Path],
    *,
    model: str = "spoken-digits",
    label: str = "",
    text: str | None = None,
    window: float | None = None,
    output: Path | None = None,
    format: Format | None = None,
    chunk: int = 16384,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Exact bits per sample of recordings under a model: a table, a row per recording or per window of time.

        longseq audio score clip.wav --label digit=seven,speaker=theo
        longseq audio score concert.flac --model runs/music/model --window 1 -o surprise.tsv

    A recording is brought to the model's rate and to the peak it was trained with, and read from its beginning to its
    end, block by block: any length in constant memory. Each sample is judged after all those before it. Columns: file,
    start and end in seconds, samples, bits_per_sample, and end_bits, what it costs to end there (of whole recordings).

    Args:
        files: Recordings (.wav, .flac, .ogg, .mp3).
        model: A shipped model's name, a checkpoint folder, or a name on the Hugging Face hub.
        label: Values of the model's conditions that it is told, as name=value,...
        text: Text that the model is told, if it was trained with text.
        window: Length in seconds of the stretches that get a row each; by default one row for a recording.
        output: Table to write (.tsv, .csv, .jsonl, .parquet); by default it is shown.
        format: Format of the table, if the suffix does not say it: tsv, csv, jsonl or parquet.
        chunk: Samples that go through the model at a time.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: Number format of the weights and activations; bfloat16 is for GPUs.

    Returns:
        0, or 2 if a recording could not be read (the reasons are on standard error).
    """
    import torch

    import seqmodels
    from seqmodels.checkpoint import choose_device
    from seqmodels.tasks.audio.evaluate import COLUMNS, score_recording
    from seqmodels.tasks.audio.generate import label_ids

    if chunk < 1 or (window is not None and not window > 0):
        raise InputError(f"chunk is {chunk} and window {window}; expected more than 0")
    network = seqmodels.load(model, device=choose_device(device), dtype=getattr(torch, dtype))
    labels = parse_labels(label, {})
    label_ids(network.config.conditions, labels)  # refuses what is unknown once, not for each file
    failed = 0
    with TableWriter(output, COLUMNS, format) as table, _progress(len(files), "recordings") as advance:
        for file in files:
            try:
                rows = score_recording(network, file, labels, text, window=window, chunk=chunk)
            except InputError as error:
                failed += 1
                print(f"longseq: {error}", file=sys.stderr)
            else:
                table.write(rows)
            advance(1)
        if failed == len(files):
            raise InputError(f"of {failed} recordings none could be scored")
    return 2 if failed else 0


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

    return {name: version(name) for name in ("longseq", "torch", "torchaudio", "numpy", "soundfile", "soxr")}


def weights_sha256(model: str) -> str | None:
    """SHA-256 of a model's weights file; None if its weights are not one safetensors file."""
    import hashlib

    from seqmodels.checkpoint import resolve

    path = resolve(model) / "model.safetensors"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _progress(total: int, unit: str, rate: int | None = None) -> Iterator[Callable[[int], Any]]:
    """A bar on a terminal, and what to call with what has been done; `rate` in Hz adds how that is to real time."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:

        def advance(done: int) -> None:
            elapsed = bar.format_dict["elapsed"]
            if rate and elapsed:
                bar.set_postfix_str(f"{(bar.n + done) / elapsed / rate:.2f} x real time", refresh=False)
            bar.update(done)

        yield advance
