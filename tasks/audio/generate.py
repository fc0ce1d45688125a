"""Sound from a model, sample by sample: prompted by labels, by text, by the start of a recording, or by nothing."""

import base64
import difflib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmodels.config import ConditionConfig
from seqmodels.decoding import map_state
from seqmodels.errors import InputError
from seqmodels.sampling import Kept, Sampler, Sampling, prefill, run
from seqmodels.tasks.audio.waveform import (
    MuLaw,
    Reader,
    as_int16,
    is_audio_name,
    mu_law_of,
    peak_gain,
    resampled,
    write_audio,
)

SHORTEST = 0.1  # seconds before which an item may not end
REMEMBERED = 0.05  # seconds of a prompt, as the model has heard it, that lead over to the new sound
FADE = 0.005  # seconds of crossfade between a prompt and what goes on from it


class Heard:
    """A recording to go on from, mono: read block by block, once for its peak and then for its tokens.

    So it may be longer than memory. `source` is a path, or samples (l,) or (l, channels) at `rate` Hz (None: that of
    the model); of it counts what lies between `start` and `end` seconds.
    """

    def __init__(
        self, source: str | Path | np.ndarray, mu_law: MuLaw, *, rate: int | None = None, start: float = 0.0,
        end: float | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("start", start), ("end", math.inf if end is None else end)):
            if not value >= 0:
                raise InputError(f"the {name} of the prompt is {value} s; expected 0 or more")
        self.mu_law, self.start, self.end = mu_law, start, end
        if isinstance(source, np.ndarray):
            samples = np.asarray(source if source.ndim == 1 else source.mean(axis=1), dtype=np.float32)
            if not len(samples) or not np.isfinite(samples).all():
                raise InputError("the prompt is empty or holds samples that are NaN or infinite; give a recording")
            self.rate = rate or mu_law.sample_rate
            self._samples = samples[round(start * self.rate) : None if end is None else round(end * self.rate)]
            if not len(self._samples):
                raise InputError(f"the prompt has no sound between {start} s and {end} s")
        else:
            self._samples = None
            self._reader = Reader(source)
            self.rate = self._reader.rate
        largest, self.length, last = 0.0, 0, np.empty(0, np.float32)
        kept = round(REMEMBERED * mu_law.sample_rate)
        for block in self.blocks(mu_law.sample_rate):
            largest = max(largest, float(np.abs(block).max(initial=0.0)))
            self.length += len(block)
            last = np.concatenate([last, block])[-kept:]
        self.gain = peak_gain(largest, mu_law.peak)
        self.last = self._decoded(self._tokens(last))

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.length / self.mu_law.sample_rate

    def blocks(self, rate: int) -> Iterator[np.ndarray]:
        """Its samples at `rate` Hz, block by block."""
        blocks = [self._samples] if self._samples is not None else self._reader.blocks(self.start, self.end)
        return resampled(blocks, self.rate, rate)

    def ids(self) -> Iterator[np.ndarray]:
        """Its tokens, block by block."""
        return map(self._tokens, self.blocks(self.mu_law.sample_rate))

    def _tokens(self, samples: np.ndarray) -> np.ndarray:
        return self.mu_law.encode(samples * np.float32(self.gain))

    def _decoded(self, tokens: np.ndarray) -> np.ndarray:
        return (self.mu_law.decode(tokens) / np.float32(self.gain)).astype(np.float32)


@dataclass(frozen=True)
class State:
    """Where a generation stands, and how it was asked: what it needs to go on, with the same model, as if never left.

    Tensors and plain values only: torch.save keeps it.
    """

    given: Tensor
    "(items, conditions) ids of the labels; with guidance twice as many rows, the second half not given."
    sampling: Sampling
    seed: int
    items: range
    gain: float
    "Of the prompt's normalisation: what the model makes is divided by it."
    kept: Kept | None = None
    "None before the first sample."


@dataclass(frozen=True)
class Generated:
    """What `generate` made, item by item; a notebook shows it as players and pictures."""

    samples: list[np.ndarray]
    "Per item (l,) float32, at the level of the prompt if there was one."
    tokens: list[np.ndarray]
    "Per item (l,) int64, without BOS and EOS."
    log_p: list[np.ndarray]
    """Per item (l,) float32: natural logarithms of the samples' probabilities, at temperature 1 and without guidance.
    Their sum is the log-probability of the item, without its end."""
    ended: list[bool]
    "Per item, whether the model ended it (otherwise the limit did)."
    sample_rate: int
    "Hz."
    samples_per_second: float
    "Speed of decoding, all items together, without the prompt."
    state: State | None = None
    "Where the generation stands, for `generate(model, state=...)` to go on; None where there were several batches."

    @property
    def bits_per_sample(self) -> list[float]:
        """Per item the mean of -log2 p; NaN of an item without samples."""
        return [float(-nats.mean(dtype=np.float64) / math.log(2)) if len(nats) else math.nan for nats in self.log_p]

    def save(self, path: str | Path, item: int = 0, *, subtype: str | None = None) -> None:
        """Write an item to a sound file, whose suffix chooses the format."""
        write_audio(Path(path), self.samples[item], self.sample_rate, subtype=subtype)

    def _repr_html_(self) -> str:
        """Up to four items, at their true level (IPython's own player would normalise them)."""
        from seqmodels.tasks.audio.picture import draw_picture

        parts = []
        for samples, bits in zip(self.samples[:4], self.bits_per_sample, strict=False):
            wav, png = io.BytesIO(), io.BytesIO()
            _write_wav(wav, samples, self.sample_rate)
            draw_picture(png, samples, self.sample_rate, f"{bits:.3f} bits per sample")
            sound, picture = (base64.b64encode(file.getvalue()).decode() for file in (wav, png))
            parts.append(
                f'<audio controls src="data:audio/wav;base64,{sound}"></audio><br>'
                f'<img width="640" src="data:image/png;base64,{picture}">'
            )
        more = len(self.samples) - len(parts)
        return "<br>".join(parts) + (f"<p>and {more} more</p>" if more else "")


def generate(
    model: Any,
    *,
    labels: Mapping[str, str] | None = None,
    text: str | None = None,
    prompt: np.ndarray | str | Path | Heard | None = None,
    prompt_rate: int | None = None,
    seconds: float = 2.0,
    number: int = 1,
    batch: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    state: State | None = None,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Generated:
    """At most `seconds` of new sound, `number` times; item i depends on (seed, i) and not on `number`.

    `labels` gives values of the model's conditions by name, `text` what a model of text is told. `prompt` is a
    recording that the new sound goes on from: a path, a Heard, or samples (l,) at `prompt_rate` Hz (None: the model's
    rate). With `state` an earlier generation goes on, to the same samples as if it had not stopped, and only `seconds`
    counts beside it.

    `batch` items are decoded together (None: 1 on a CPU, 256 on a GPU): more are faster, but products of another size
    round differently, which can change an item in the end. So can another device. `progress` is told of decoded
    samples.
    """
    mu_law, limit = mu_law_of(model.config.tokenizer), _limit(model, seconds)
    if state is None:
        batch = batch if batch is not None else 1 if model.device.type == "cpu" else 256
        for name, value in (("number", number), ("batch", batch)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        begin = Beginning(model, labels or {}, text, prompt, prompt_rate, sampling, seed)
        takes = (begin.sampler(range(i, min(i + batch, number))) for i in range(0, number, batch))
    else:
        takes = [(_sampler(model, state.kept, state), state)]
    return _collect(takes, limit, mu_law, progress)


def generate_each(
    model: Any,
    labels: Sequence[Mapping[str, str]],
    *,
    seconds: float = 2.0,
    batch: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Generated:
    """New sound for each of the labels, `batch` items together: item i is generate(labels=labels[i])'s item i."""
    mu_law, limit = mu_law_of(model.config.tokenizer), _limit(model, seconds)
    sampling = (sampling or Sampling()).guided_by(model, any(labels))

    def takes() -> Iterator[tuple[Sampler, State]]:
        for first in range(0, len(labels), batch):
            items = range(first, min(first + batch, len(labels)))
            given = torch.cat([label_ids(model.config.conditions, labels[item]) for item in items])
            if sampling.guidance != 1:
                given = torch.cat([given, label_ids(model.config.conditions, {}).expand(len(items), -1)])
            about = State(given.to(model.device), sampling, seed, items, 1.0)
            start = torch.from_numpy(np.append(mu_law.text_tokens(None), mu_law.bos)).expand(len(given), -1)
            yield _sampler(model, prefill(model, [start], _or_none(about.given)), about), about

    return _collect(takes(), limit, mu_law, progress)


def _collect(
    takes: Iterable[tuple[Sampler, State]], limit: int, mu_law: MuLaw, progress: Callable[[int], Any]
) -> Generated:
    """What samplers make, one after another, each `limit` samples at most."""
    results, spent, steps = [], 0.0, 0
    for sampler, about in takes:
        alive = sampler.alive.tolist()
        tokens, nats, took = run(sampler, limit, progress=progress)
        results += _cut(tokens, nats, alive, mu_law)
        spent, steps, last = spent + took, steps + tokens.numel(), (sampler, about)
    kept, log_p, ended = (list(part) for part in zip(*results, strict=True))
    return Generated(
        samples=[(mu_law.decode(row) / np.float32(about.gain)).astype(np.float32) for row in kept],
        tokens=kept,
        log_p=log_p,
        ended=ended,
        sample_rate=mu_law.sample_rate,
        samples_per_second=steps / max(spent, 1e-9),
        state=replace(about, kept=last[0].keep()) if len(results) == len(about.items) else None,
    )


class Stream:
    """New sound in chunks (l,) float32, as it is made: an iterator, in constant memory.

    for chunk in Stream(model, labels={"digit": "seven"}): ...

    It takes what `generate` takes for one item, whose samples it gives; without `seconds` it goes on until the model
    ends it. `chunk` is the length of a chunk in seconds.
    """

    def __init__(
        self, model: Any, *, labels: Mapping[str, str] | None = None, text: str | None = None,
        prompt: np.ndarray | str | Path | Heard | None = None, prompt_rate: int | None = None,
        seconds: float | None = None, chunk: float = 0.1, sampling: Sampling | None = None, seed: int = 0,
        item: int = 0, state: State | None = None,
    ) -> None:  # fmt: skip
        self._mu_law = mu_law_of(model.config.tokenizer)
        self._left = None if seconds is None else _limit(model, seconds)
        self._chunk = _limit(model, chunk, "chunk")
        if state is None:
            begin = Beginning(model, labels or {}, text, prompt, prompt_rate, sampling, seed)
            self._sampler, self._about = begin.sampler(range(item, item + 1))
        elif len(state.items) == 1:
            self._sampler, self._about = _sampler(model, state.kept, state), state
        else:
            raise InputError(f"the state is of {len(state.items)} items; a stream is of one: use generate")
        self.sample_rate, self.nats, self.made = self._mu_law.sample_rate, 0.0, 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> np.ndarray:
        if self.ended or self._left == 0:
            raise StopIteration
        steps = self._chunk if self._left is None else min(self._chunk, self._left)
        self._left = None if self._left is None else self._left - steps
        alive = self._sampler.alive.tolist()
        ((tokens, log_p, _),) = _cut(*self._sampler(steps), alive, self._mu_law)
        self.nats, self.made = self.nats + float(log_p.sum(dtype=np.float64)), self.made + len(tokens)
        if not len(tokens):
            raise StopIteration
        return (self._mu_law.decode(tokens) / np.float32(self._about.gain)).astype(np.float32)

    @property
    def ended(self) -> bool:
        """Whether the model has ended the sound."""
        return not bool(self._sampler.alive)

    @property
    def bits_per_sample(self) -> float:
        """Mean of -log2 p of the samples so far."""
        return -self.nats / max(self.made, 1) / math.log(2)

    @property
    def state(self) -> State:
        """Where the stream stands, for `Stream(model, state=...)` or `generate` to go on."""
        return replace(self._about, kept=self._sampler.keep())


class Beginning:
    """What precedes new sound, read once for all items: labels, text and a recording."""

    def __init__(
        self, model: Any, labels: Mapping[str, str], text: str | None, prompt: np.ndarray | str | Path | Heard | None,
        prompt_rate: int | None, sampling: Sampling | None, seed: int,
    ) -> None:  # fmt: skip
        sampling = (sampling or Sampling()).guided_by(model, labels or text)
        self.model, self.sampling, self.seed = model, sampling, seed
        self.mu_law = mu_law_of(model.config.tokenizer)
        given = label_ids(model.config.conditions, labels)
        words = self.mu_law.text_tokens(text)[None]
        if sampling.guidance != 1:  # a second row is told nothing
            if not (labels or text):
                raise InputError(
                    f"guidance is {sampling.guidance}, but the model is told nothing to guide by; give a label or text"
                )
            given = torch.cat([given, label_ids(model.config.conditions, {})])
            words = np.concatenate([words, self.mu_law.text_tokens(None)[None]])
        heard = prompt
        if prompt is not None and not isinstance(prompt, Heard):
            heard = Heard(prompt, self.mu_law, rate=prompt_rate)
        self.gain = heard.gain if isinstance(heard, Heard) else 1.0
        self.given = given.to(model.device)
        start = np.concatenate([words, np.full((len(words), 1), self.mu_law.bos)], axis=1)
        blocks = [torch.from_numpy(start)]
        rest = (torch.from_numpy(ids).expand(len(words), -1) for ids in heard.ids()) if heard is not None else ()
        self.logits, self.state = prefill(model, _chain(blocks, rest), _or_none(self.given))

    def sampler(self, items: range) -> "tuple[Sampler, State]":
        """A sampler of these items after the beginning, and what else must be known to go on from its state."""
        rows = len(items)
        after = (
            self.logits.repeat_interleave(rows, 0),
            map_state(self.state, lambda tensor: tensor.repeat_interleave(rows, 0)),
        )
        about = State(self.given.repeat_interleave(rows, 0), self.sampling, self.seed, items, self.gain)
        return _sampler(self.model, after, about), about


def _chain(first: Iterable[Tensor], then: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from first
    yield from then


def _sampler(model: Any, after: Any, about: State) -> Sampler:
    mu_law = mu_law_of(model.config.tokenizer)
    return Sampler(
        model, after, seeds=[(about.seed, item) for item in about.items], sampling=about.sampling,
        barred=mu_law.unsound, end=mu_law.eos, shortest=round(SHORTEST * mu_law.sample_rate),
        conditions=_or_none(about.given),
    )  # fmt: skip


def _or_none(given: Tensor) -> Tensor | None:
    return given if given.shape[1] else None


def _limit(model: Any, seconds: float, name: str = "seconds") -> int:
    """Samples that so many seconds are."""
    rate = mu_law_of(model.config.tokenizer).sample_rate
    if not 1 <= seconds * rate < math.inf:
        raise InputError(f"{name} is {seconds}; expected at least one sample, 1 / {rate} s")
    return round(seconds * rate)


def _cut(tokens: Tensor, nats: Tensor, alive: list[bool], mu_law: MuLaw) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Per row its tokens up to its end, their log-probabilities, and whether it has ended; none of rows not alive."""
    found = []
    for row, row_nats, goes_on in zip(tokens.cpu().numpy(), nats.cpu().numpy(), alive, strict=True):
        ends = np.flatnonzero(row == mu_law.eos)
        length = 0 if not goes_on else int(ends[0]) if len(ends) else len(row)
        found.append((row[:length], row_nats[:length], len(ends) > 0 or not goes_on))
    return found


def _write_wav(file: io.BytesIO, samples: np.ndarray, rate: int) -> None:
    import soundfile

    soundfile.write(file, as_int16(samples), rate, format="WAV", subtype="PCM_16")


def joined(heard: Heard | None, new: Iterable[np.ndarray], rate: int, out_rate: int) -> Iterator[np.ndarray]:
    """New sound, chunks at `rate` Hz, as blocks at `out_rate` Hz, after the samples of `heard` as they were recorded.

    For FADE seconds the recording passes over into what the model has heard of it, from which the new sound goes on.
    """
    if heard is None:
        yield from resampled(new, rate, out_rate)
        return
    fade = min(round(FADE * out_rate), round(len(heard.last) / rate * out_rate))
    held = np.empty(0, np.float32)
    for block in heard.blocks(out_rate):
        held = np.concatenate([held, block])
        yield held[: max(0, len(held) - fade)]
        held = held[max(0, len(held) - fade) :]
    skip = round(len(heard.last) / rate * out_rate) - len(held)
    ramp = np.arange(1, len(held) + 1, dtype=np.float32) / np.float32(len(held) + 1)
    for block in resampled(_chain([heard.last], new), rate, out_rate):  # pyright: ignore
        block, skip = block[skip:], max(0, skip - len(block))
        part = len(block[: len(held)])
        yield np.concatenate([held[:part] * (1 - ramp[:part]) + block[:part] * ramp[:part], block[part:]])
        held, ramp = held[part:], ramp[part:]


def label_ids(conditions: tuple[ConditionConfig, ...], labels: Mapping[str, str]) -> Tensor:
    """Ids (1, conditions) int64 of labels by name; a condition without a label is "not given"."""
    names = [condition.name for condition in conditions]
    for name in labels:
        if name not in names:
            raise InputError(f"the model has no condition {name!r}{_nearest(name, names)}")
    ids = []
    for condition in conditions:
        value = labels.get(condition.name)
        if value is not None and value not in condition.values:
            raise InputError(f"{condition.name} has no value {value!r}{_nearest(value, condition.values)}")
        ids.append(len(condition.values) if value is None else condition.values.index(value))
    return torch.tensor([ids], dtype=torch.int64).reshape(1, -1)


def is_recording(prompt: str) -> bool:
    """Whether a prompt is a recording or a folder of such: a file, the suffix of one, or a folder with a slash."""
    return is_audio_name(prompt) or Path(prompt).is_file() or ("/" in prompt and Path(prompt).is_dir())


def prompt_labels(
    conditions: tuple[ConditionConfig, ...], prompt: str | None, given: Mapping[str, str]
) -> tuple[dict[str, str], Path | None]:
    """Labels by condition name, and the recording or folder to go on from: what a prompt means to a model.

    What `is_recording` says; otherwise a value of one condition, or else the name of a folder.
    """
    labels = dict(given)
    if prompt is None:
        return labels, None
    owners = [condition.name for condition in conditions if prompt in condition.values]
    if is_recording(prompt) or (not owners and Path(prompt).is_dir()):
        return labels, Path(prompt)
    if len(owners) > 1:
        raise InputError(
            f"the prompt {prompt!r} is a value of {' and '.join(owners)}; use --label {owners[0]}={prompt}"
        )
    if not owners:
        values = [value for condition in conditions for value in condition.values]
        raise InputError(
            f"the prompt {prompt!r} is neither a recording nor a label of the model{_nearest(prompt, values)}"
        )
    if labels.get(owners[0], prompt) != prompt:
        raise InputError(
            f"the prompt {prompt!r} and the label {owners[0]}={labels[owners[0]]} differ; give one of them"
        )
    return labels | {owners[0]: prompt}, None


def _nearest(word: str, words: Any) -> str:
    if not words:
        return "; it was trained without labels"
    known = {one.casefold(): one for one in words}
    close = difflib.get_close_matches(word.casefold(), known, n=1, cutoff=0.5)
    listed = ", ".join(words[:40]) + (", ..." if len(words) > 40 else "")
    return f"; did you mean {known[close[0]]!r}? It knows {listed}" if close else f"; it knows {listed}"
