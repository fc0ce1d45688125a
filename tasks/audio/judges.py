"""Judges of generated speech: two classifiers of each label, different in kind, trained on real recordings only.

Generated sound is noisy, and a classifier that has only heard clean recordings mistakes noise for wrong words. So both
learn from recordings with noise of -5 to 30 dB signal to noise added, white or sloping towards low frequencies. The
first is a small convolutional network over 40 log-mel bands, whose pooled features the Frechet distance uses; bands are
dropped at random while it learns (SpecAugment; Park et al., 2019). The second is a support vector machine over the
log-mel bands of a clip stretched to a fixed number of frames, at one mean and deviation. Both hear clips at one peak
level.

A folder of judges holds judges.json (labels, settings, accuracies on held-out recordings by signal-to-noise ratio) and
model.safetensors. The same data, seed and versions give the same judges on one kind of machine.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.checkpoint import read_json, read_tensors, write_tensors
from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.files import make_folder, write_json
from seqmodels.tasks.audio.noise import add_noise, roughened
from seqmodels.tasks.audio.tables import open_recordings, parse_conditions, split_rows, split_rules
from seqmodels.tasks.audio.waveform import peak_normalise

FORMAT = "longseq-judges-1"
RATIOS = (None, 20, 10, 5, 0)  # dB signal to noise at which judges are tested; None: as recorded
WIDTHS, SIZES = (24, 48, 64, 80), (5, 3, 3, 3)  # of the network's convolutions
STRIDES = ((2, 1), (2, 2), (2, 1), (1, 2))  # theirs over bands and frames
NOISY = 0.9  # of the clips from which they learn
FEATURES = 96  # that the network makes of a clip
MOST_VECTORS = 12000  # training clips of a support vector machine, noisy copies included


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How judges hear and learn."""

    sample_rate: int = 8000
    "Hz; recordings at another rate are resampled."
    bands: int = 40
    "Mel bands."
    epochs: int = 16
    "Passes of the network over the training recordings."
    batch: int = 64
    "Clips per step of the network."
    learning_rate: float = 3e-3
    "Its peak; one cycle."
    noisy: tuple[float, float] = (-5.0, 30.0)
    "Signal-to-noise ratios in dB of the noise that is added while learning."
    frames: int = 12
    "Frames to which the support vector machine stretches a clip."
    C: float = 10.0
    "Its penalty of errors."
    seed: int = 0
    "Seed of noise, order and weights."


class Heard(NamedTuple):
    """What a judge says of clips."""

    log_p: np.ndarray
    "(n, classes) float64, of the network."
    features: np.ndarray
    "(n, width) float32, of the network."
    second: np.ndarray
    "(n,) classes, of the support vector machine."

    @property
    def first(self) -> np.ndarray:
        """(n,) classes, of the network."""
        return self.log_p.argmax(1)


class Ear(nn.Module):
    """Clips to log-mel bands in natural logarithms: windows of 25 ms every 10 ms."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.hop, self.window_length = config.sample_rate // 100, config.sample_rate // 40
        self.n_fft = 1 << (self.window_length - 1).bit_length()
        bank = melscale_fbanks(self.n_fft // 2 + 1, 50.0, config.sample_rate / 2, config.bands, config.sample_rate)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(self.window_length), persistent=False)

    def forward(self, waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Bands (b, bands, frames), and the frames (b,) that each clip really has."""
        lengths = torch.tensor([len(wave) // self.hop + 1 for wave in waves], device=self.bank.device)
        longest = max(self.n_fft, *map(len, waves))
        padded = np.stack([np.pad(wave, (0, longest - len(wave))) for wave in waves]).astype(np.float32)
        spectrum = torch.stft(
            torch.from_numpy(padded).to(self.bank.device), self.n_fft, self.hop, self.window_length, self.window,
            pad_mode="constant", return_complex=True,
        )  # fmt: skip
        return (spectrum.abs().square().mT @ self.bank).mT.add(1e-6).log(), lengths


class Network(nn.Module):
    """Convolutions over bands and frames, the mean over a clip's own frames, and a layer of features."""

    def __init__(
        self, bands: int, classes: int, widths: tuple[int, ...] = (24, 48, 64, 80), features: int = 96
    ) -> None:
        super().__init__()
        channels = (1, *widths)
        sizes = (5, 3, 3, 3)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, size, stride, size // 2, bias=False)
            for a, b, size, stride in zip(channels, widths, sizes, STRIDES, strict=False)
        )
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
        for down, _ in STRIDES:
            bands = -(-bands // down)
        self.features = nn.Linear(WIDTHS[-1] * bands, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.classes = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (b, classes) and features (b, width) of bands (b, bands, frames); padding is never heard."""
        x = ((x + 5) / 4)[:, None]
        for convolution, norm, (_, stride) in zip(self.convolutions, self.norms, STRIDES, strict=True):
            x = F.relu(norm(convolution(x * _inside(x, lengths))))
            lengths = -(-lengths // stride)
        pooled = (x * _inside(x, lengths)).sum(-1).flatten(1) / lengths[:, None]
        features = F.relu(self.norm(self.features(pooled)))
        return self.classes(self.dropout(features)), features


def _inside(x: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(x.shape[-1], device=x.device) < lengths[:, None])[:, None, None]


class SupportVectors(NamedTuple):
    """A support vector machine with a Gaussian kernel, one class against one, as arrays."""

    mean: np.ndarray
    "(width,) of the features."
    scale: np.ndarray
    "(width,) likewise; the kernel is exp(-gamma |x - y|^2) of scaled features, gamma = 1 / width."
    vectors: np.ndarray
    "(m, width) scaled support vectors, sorted by class."
    counts: np.ndarray
    "(classes,) how many of them each class has."
    weights: np.ndarray
    "(classes - 1, m): those of class i against class j > i are in row j - 1, against j < i in row j."
    offsets: np.ndarray
    "(classes * (classes - 1) / 2,): of the pairs in order."

    @classmethod
    def of(cls, machine: Any, mean: np.ndarray, scale: np.ndarray) -> "SupportVectors":
        """Those of scikit-learn's SVC(gamma=1 / width), which turns the signs round where there are two classes."""
        sign = -1 if len(machine.classes_) == 2 else 1
        weights, offsets = sign * machine.dual_coef_, sign * machine.intercept_
        return cls(mean, scale, machine.support_vectors_, machine.n_support_, weights, offsets)

    def classify(self, x: np.ndarray) -> np.ndarray:
        """Classes (n,) with the most votes of the pairs, for features (n, width)."""
        x = (x - self.mean) / self.scale
        squares = np.square(x).sum(1)[:, None] + np.square(self.vectors).sum(1) - 2 * x @ self.vectors.T
        kernel = np.exp(-squares.clip(0) / x.shape[1])
        ends = np.cumsum(self.counts)
        own = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        votes, pair = np.zeros((len(x), len(own)), int), 0
        for i in range(len(own)):
            for j in range(i + 1, len(own)):
                for_i = kernel[:, own[i]] @ self.weights[j - 1, own[i]] + kernel[:, own[j]] @ self.weights[i, own[j]]
                wins = for_i + self.offsets[pair] > 0
                votes[:, i] += wins
                votes[:, j] += ~wins
                pair += 1
        return votes.argmax(1)


class Judge:
    """The two classifiers of one label."""

    def __init__(self, config: JudgeConfig, classes: tuple[str, ...], network: Network, second: SupportVectors) -> None:
        self.config, self.classes, self.second = config, classes, second
        self.network = network.eval()
        self.ear = Ear(config)

    @torch.inference_mode()
    def hear(self, waves: Sequence[np.ndarray]) -> Heard:
        """What it says of clips at its sample rate; clips do not influence each other."""
        log_p = np.zeros((len(waves), len(self.classes)))
        features = np.zeros((len(waves), FEATURES), np.float32)
        shapes = []
        order = np.argsort([len(wave) for wave in waves], kind="stable")
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            bands, lengths = self.ear([_levelled(waves[row]) for row in rows])
            logits, found = self.network(bands, lengths)
            log_p[rows], features[rows] = logits.double().log_softmax(1).numpy(), found.numpy()
            shapes += stretched(bands, lengths, self.config.frames)
        inverse = np.argsort(order)
        return Heard(log_p, features, self.second.classify(_even(np.stack(shapes)[inverse])))

    def shapes(self, waves: Sequence[np.ndarray]) -> np.ndarray:
        """Log-mel bands in nats (n, bands * frames) of clips stretched to the same number of frames."""
        found: list[np.ndarray] = []
        for start in range(0, len(waves), 64):
            found += stretched(*self.ear([_levelled(wave) for wave in waves[start : start + 64]]), self.config.frames)
        return np.stack(found)


def _levelled(wave: np.ndarray) -> np.ndarray:
    return peak_normalise(wave)[0]


def stretched(bands: Tensor, lengths: Tensor, frames: int) -> list[np.ndarray]:
    """Each clip's bands (bands * frames,), its own frames averaged or interpolated to `frames`."""
    return [
        F.adaptive_avg_pool1d(F.interpolate(clip[None, :, :length], frames * 8, mode="linear"), frames)[0]
        .flatten()
        .numpy()
        for clip, length in zip(bands.cpu(), lengths.tolist(), strict=True)
    ]


def _even(shapes: np.ndarray) -> np.ndarray:
    """Shapes (n, width) with mean 0 and deviation 1 of each clip: noise changes both more than it changes the rest."""
    return (shapes - shapes.mean(1, keepdims=True)) / (shapes.std(1, keepdims=True) + 1e-3)


def train_network(
    waves: Sequence[np.ndarray],
    labels: np.ndarray,
    classes: int,
    config: JudgeConfig,
    progress: Callable[[int], Any] = lambda clips: None,
) -> Network:
    """A network that knows the labels (n,) of clips (l,) at the judges' rate and level."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rng = np.random.default_rng(config.seed)
        network, ear = Network(config.bands, classes).train(), Ear(config)
        sizes = np.array([len(wave) for wave in waves])
        steps = -(-len(waves) // config.batch) * config.epochs
        optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=steps, pct_start=0.2
        )
        for _ in range(config.epochs):
            order = np.argsort(sizes * np.exp(rng.normal(0, 0.15, len(sizes))))  # similar lengths: little padding
            for rows in rng.permuted(np.arange(-(-len(order) // config.batch))):
                members = order[rows * config.batch : (rows + 1) * config.batch]
                if len(members) > 1:  # of which a batch norm has a variance
                    bands, lengths = ear([roughened(waves[i], config.noisy, NOISY, rng) for i in members])
                    for clip in bands:
                        if rng.random() < 0.5:
                            low, count = rng.integers(config.bands), rng.integers(1, 1 + config.bands // 6)
                            clip[low : low + count] = clip.mean()
                    logits, _ = network(bands, lengths)
                    loss = F.cross_entropy(logits, torch.from_numpy(labels[members]), label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
                progress(len(members))
    return network.eval()


def train_support_vectors(
    waves: Sequence[np.ndarray], labels: np.ndarray, config: JudgeConfig, copies: int = 2
) -> SupportVectors:
    """A support vector machine on clips as recorded and on noisy copies of them."""
    from sklearn.svm import SVC

    rng = np.random.default_rng(config.seed)
    rows = np.arange(len(waves))
    if (1 + copies) * len(rows) > MOST_VECTORS:
        rows = rng.choice(rows, MOST_VECTORS // (1 + copies), replace=False)
    ear, shapes = Ear(config), []
    heard = [waves[i] for i in rows]
    heard += [roughened(waves[i], config.noisy, NOISY, rng) for _ in range(copies) for i in rows]
    for start in range(0, len(heard), 64):
        shapes += stretched(*ear(heard[start : start + 64]), config.frames)
    x = _even(np.stack(shapes))
    mean, scale = x.mean(0), x.std(0) + 1e-3
    machine = SVC(C=config.C, gamma=1 / x.shape[1], cache_size=500)
    machine.fit((x - mean) / scale, np.tile(labels[rows], 1 + copies))
    return SupportVectors.of(machine, mean, scale)


def judge(
    data: Path,
    folder: Path,
    *,
    labels: str = "word,speaker",
    table: Path | None = None,
    test: str | None = None,
    validation: str | None = None,
    how: JudgeConfig = JudgeConfig(),  # frozen
    quiet: bool = False,
) -> None:
    """Train the judges of generated speech on real recordings, a few minutes on a CPU.

    For each label a convolutional network and a support vector machine, both used to noise; `audio metrics` asks them.
    Prints how often they are right on held-out recordings as recorded and in white noise, and keeps that with them.

    Args:
        data: A folder, zip or tar of real recordings.
        folder: Folder to write the judges to.
        labels: Columns of the table to be recognised; the Frechet distance uses what is heard for the first.
        table: CSV table with a column "file" and labels; by default metadata.csv in the folder or beside the archive.
        test: Test recordings: a rule column=value,value or a fraction; by default split=test if there is such a column.
        validation: Validation recordings, on which nothing is trained either: a rule such as index=5-9, or a fraction;
            by default split=validation if the table has such rows, else 0.1.
        how: How they hear and learn.
        quiet: No progress on a terminal.
    """
    from tqdm import tqdm

    if (folder / "judges.json").exists():
        raise InputError(f"{folder} holds judges already; give another folder")
    recordings = open_recordings(data, table)
    rules = split_rules(recordings.rows, test, validation)
    parts = split_rows(recordings.rows, **rules, seed=how.seed)
    conditions, ids = parse_conditions(recordings.rows, labels, "--labels")
    if not conditions:
        raise InputError("--labels names no column of the table; give one or more, as word,speaker")
    make_folder(folder)
    waves = {name: list(map(_levelled, recordings.select(rows).read(how.sample_rate))) for name, rows in parts.items()}
    judges, rows = {}, []
    clips = how.epochs * len(parts["train"]) * len(conditions)
    with tqdm(total=clips, unit=" clips", disable=quiet or not sys.stderr.isatty(), file=sys.stderr) as bar:
        for i, condition in enumerate(conditions):
            known = np.flatnonzero(ids[parts["train"], i] < len(condition.values))
            learned = [waves["train"][row] for row in known]
            truth = ids[parts["train"], i][known]
            network = train_network(learned, truth, len(condition.values), how, bar.update)
            one = Judge(how, condition.values, network, train_support_vectors(learned, truth, how))
            judges[condition.name] = one
            for name in ("validation", "test"):
                if len(parts[name]):
                    rows += _tested(one, condition.name, name, waves[name], ids[parts[name], i])
    facts = {"data": str(data), "rules": rules, "train": len(parts["train"]), "held_out": rows}
    save_judges(folder, judges, facts)
    print(aligned(rows, [*rows[0]]) if rows else "no recordings were held out", end="")


def _tested(judge: Judge, label: str, split: str, waves: list[np.ndarray], truth: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a table: how often each classifier is right, by signal-to-noise ratio."""
    rows = [{"label": label, "judge": name, "split": split, "clips": len(waves)} for name in ("network", "svm")]
    for ratio in RATIOS:
        rng = np.random.default_rng(0)
        heard = judge.hear(waves if ratio is None else [add_noise(wave, ratio, rng) for wave in waves])
        column = "as recorded" if ratio is None else f"{ratio} dB"
        for row, said in zip(rows, (heard.first, heard.second), strict=True):
            row[column] = float((said == truth).mean())
    return rows


def save_judges(folder: Path, judges: dict[str, Judge], facts: dict[str, Any]) -> None:
    """Judges by label, and what to know of them."""
    tensors = {}
    for label, one in judges.items():
        tensors |= {f"{label}.network.{name}": value for name, value in one.network.state_dict().items()}
        tensors |= {f"{label}.svm.{k}": torch.from_numpy(np.array(v)) for k, v in one.second._asdict().items()}
    first = next(iter(judges.values()))
    write_tensors(folder / "model.safetensors", {k: v.contiguous() for k, v in tensors.items()})
    classes = {label: list(one.classes) for label, one in judges.items()}
    write_json(folder / "judges.json", {"format": FORMAT, "classes": classes, "how": asdict(first.config), **facts})


def load_judges(folder: Path) -> dict[str, Judge]:
    """Judges by label, the first label first."""
    facts = read_json(folder / "judges.json")
    if facts.get("format") != FORMAT:
        raise InputError(f"{folder} holds no judges of this version; train them with longseq audio judge DATA {folder}")
    tensors = read_tensors(folder)
    how = JudgeConfig(**facts["how"] | {"noisy": tuple(facts["how"]["noisy"])})
    judges = {}
    for label, classes in facts["classes"].items():
        own = {k.removeprefix(f"{label}."): v for k, v in tensors.items() if k.startswith(f"{label}.")}
        network = Network(how.bands, len(classes))
        network.load_state_dict({k.removeprefix("network."): v for k, v in own.items() if k.startswith("network.")})
        second = SupportVectors(**{name: own[f"svm.{name}"].numpy() for name in SupportVectors._fields})
        judges[label] = Judge(how, tuple(classes), network, second)
    return judges
