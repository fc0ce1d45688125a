"""`longseq audio metrics`: what judges trained on real recordings say of generated ones, beside real ones and controls.

The controls are made of the real test recordings: with random phases (the same spectrum and duration, no words), played
backwards, and white noise of the same power and duration. What a judge recognises in these, it does not owe to words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from seqmodels.checkpoint import read_json
from seqmodels.config import ConditionConfig
from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.files import write_json
from seqmodels.tasks.audio import metrics as m
from seqmodels.tasks.audio.judges import Heard, Judge, load_judges
from seqmodels.tasks.audio.tables import match_conditions, open_recordings, split_rows
from seqmodels.tasks.audio.waveform import MuLaw


@dataclass(frozen=True)
class Sounds:
    """Recordings at the judges' rate, and what they should be."""

    waves: list[np.ndarray]
    "Per clip (l,) float32."
    truth: dict[str, np.ndarray]
    "Per label, class ids (n,); a label that the clips do not have is left out."
    bits: np.ndarray | None = None
    "(n,) bits per sample of generated clips under their model, if they are known."
    ended: np.ndarray | None = None
    "(n,) whether the model ended them, likewise."

    def select(self, rows: np.ndarray) -> "Sounds":
        """Some of them."""
        truth = {label: ids[rows] for label, ids in self.truth.items()}
        extra = [None if values is None else values[rows] for values in (self.bits, self.ended)]
        return Sounds([self.waves[row] for row in rows], truth, *extra)

    def changed(self, change: Any) -> "Sounds":
        """The same labels, each sound put through a function."""
        return Sounds([change(wave) for wave in self.waves], self.truth)


def metrics(
    generated: Path,
    data: Path,
    *,
    judges: Path,
    reject: tuple[float, float] | None = None,
    table: Path | None = None,
    output: Path | None = None,
) -> None:
    """How good generated speech is: what judges recognise in it, beside real recordings and controls.

    For generated recordings, real test and training recordings, and controls: how often both judges of each label
    recognise it, with 95 % intervals and confusions; FID, IS, mIS and AM by the definitions published for SC09; sample
    by sample copies of training recordings; distances to the nearest one; durations, silence, clipping; diversity.
    No generated recording is left out unless --reject says so.

    Args:
        generated: A folder, zip or tar of generated recordings, with a table of the labels they were made for.
        data: A folder, zip or tar of the real recordings that the judges learned from; their split is used here, too.
        judges: Folder that `audio judge` wrote.
        reject: Also measure what is left after rejection by likelihood: the clips, sorted from the least to the most
            likely, between these two fractions, as [0.4,0.95] for the published figures of SC09. The table of the
            generated recordings must have a column bits_per_sample.
        table: CSV table of the real recordings with a column "file" and labels; by default metadata.csv beside them.
        output: JSON file to write the results to.
    """
    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}; create it first")
    if reject is not None and not 0 <= reject[0] < reject[1] <= 1:
        raise InputError(f"--reject is {list(reject)}; expected two fractions, the smaller first, as [0.4,0.95]")
    known = load_judges(judges)
    made = open_clips(generated, known)
    train, real = open_real(data, judges, known, table)
    sets = {"generated": made}
    if reject is not None:
        sets["after rejection"] = kept(made, reject)
    results = measure(known, sets, train, real)
    print(as_table(results))
    if output is not None:
        write_json(output, {"generated": str(generated), "data": str(data), "judges": str(judges), **results})


def open_clips(path: Path, judges: Mapping[str, Judge]) -> Sounds:
    """Generated recordings with a table; labels in their columns are those of the judges."""
    recordings = open_recordings(path)
    if recordings.rows.height < 2:
        raise InputError(f"{path}: holds one recording; measure two or more, for example a thousand")
    waves = recordings.read(next(iter(judges.values())).config.sample_rate)
    truth = {label: _ids(recordings.rows, label, one) for label, one in judges.items() if label in recordings.rows}
    known = dict.fromkeys(("bits_per_sample", "ended"))
    for name in known:
        if name in recordings.rows:
            values = recordings.rows[name].str.to_lowercase().replace({"true": "1", "false": "0"})
            known[name] = values.cast(pl.Float64, strict=False).to_numpy()
            if not np.isfinite(known[name]).all():
                raise InputError(f"{path}: the column {name} of its table holds cells that are not numbers; mend it")
    return Sounds(waves, truth, known["bits_per_sample"], known["ended"])


def open_real(
    data: Path, folder: Path, judges: Mapping[str, Judge], table: Path | None = None
) -> tuple[Sounds, Sounds]:
    """Real training and test recordings, by the split with which the judges in a folder were trained."""
    recordings, how = open_recordings(data, table), next(iter(judges.values())).config
    parts = split_rows(recordings.rows, **read_json(folder / "judges.json")["rules"], seed=how.seed)
    if len(parts["test"]) < 2:
        raise InputError(f"{data}: has no test recordings; train judges with --test, which says which they are")
    both = []
    for name in ("train", "test"):
        part = recordings.select(parts[name])
        both.append(
            Sounds(part.read(how.sample_rate), {label: _ids(part.rows, label, one) for label, one in judges.items()})
        )
    return both[0], both[1]


def _ids(rows: pl.DataFrame, label: str, judge: Judge) -> np.ndarray:
    return match_conditions(rows, (ConditionConfig(name=label, values=judge.classes),), f"{label}={label}")[:, 0]


def measure(
    judges: Mapping[str, Judge], generated: Mapping[str, Sounds], train: Sounds, test: Sounds, *, seed: int = 0
) -> dict[str, Any]:
    """All figures of sets of generated recordings, of test, train and the controls: {"judged", "sets": {name: ...}}."""
    rng = np.random.default_rng(seed)
    sets = {
        **generated,
        "test": test,
        "train": train,
        "random phases": test.changed(lambda wave: m.phase_randomised(wave, rng)),
        "backwards": test.changed(lambda wave: wave[::-1].copy()),
        "white noise": test.changed(lambda wave: m.white_noise(wave, rng)),
    }
    main = next(iter(judges))
    heard = {name: {label: one.hear(clips.waves) for label, one in judges.items()} for name, clips in sets.items()}
    reference = heard["train"][main]
    rows = {
        name: {"clips": len(clips.waves), **_heard(judges, clips, heard[name]), **_scores(reference, heard[name][main])}
        for name, clips in sets.items()
    }
    rate = judges[main].config.sample_rate
    shapes = {name: judges[main].shapes(sets[name].waves) for name in (*generated, "test", "train")}
    mu_law = MuLaw(sample_rate=rate)
    tokens = {name: [mu_law.tokens(wave, rate)[0] for wave in sets[name].waves] for name in shapes}
    audible = np.abs(mu_law.decode(np.arange(mu_law.levels))) > m.AUDIBLE
    known = m.training_windows(tokens["train"], audible)
    for name, clips in sets.items():
        rows[name] |= m.levels(clips.waves, rate)
        if clips.ended is not None:
            rows[name]["ended by the model"] = float(clips.ended.mean())
    for name, found in shapes.items():
        own = name == "train"
        features = heard[name][main].features
        rows[name]["nearest in training, log-mel nats"] = m.quantiles(
            m.nearest(found, shapes["train"], leave_one_out=own)
        )
        rows[name]["nearest in training, features"] = m.quantiles(
            m.nearest(features, reference.features, leave_one_out=own)
        )
        if any(len(ids) for ids in sets[name].truth.values()):
            groups = np.unique(np.stack(list(sets[name].truth.values())), axis=1, return_inverse=True)[1]
            if np.bincount(groups).max() > 1:
                rows[name]["diversity within labels, log-mel nats"] = m.diversity(found, groups)
        if not own:
            rows[name]["copies from training"] = m.copies(tokens[name], known, audible)
    return {"judged": list(judges), "sets": rows}


def kept(clips: Sounds, fractions: tuple[float, float]) -> Sounds:
    """The clips between two fractions of their order from the least to the most likely, as SaShiMi's figures have it.

    The thresholds (0.4, 0.95) of all its autoregressive figures were to be tuned on half of the samples, but its
    program never updates the best score, so that it always takes the last pair that it tries, this one.
    """
    if clips.bits is None:
        raise InputError("rejection by likelihood needs the column bits_per_sample in the table of generated clips")
    order, n = np.argsort(-clips.bits, kind="stable"), len(clips.bits)
    chosen = order[int(fractions[0] * n) : int(fractions[1] * n)]
    if len(chosen) < 2:
        raise InputError(f"--reject {list(fractions)} leaves {len(chosen)} of {n} clips; generate more")
    return clips.select(chosen)


def _heard(judges: Mapping[str, Judge], clips: Sounds, heard: Mapping[str, Heard]) -> dict[str, Any]:
    """Per label that the clips have: how often both judges are right, per class, and the confusions of the first."""
    result: dict[str, Any] = {}
    for label, truth in clips.truth.items():
        asked = truth < len(judges[label].classes)  # not those without this label
        truth, first, second = truth[asked], heard[label].first[asked], heard[label].second[asked]
        result[label] = {
            "network": m.accuracy(first, truth),
            "svm": m.accuracy(second, truth),
            "both": m.accuracy(np.where(first == second, first, -1), truth),
            "classes": list(judges[label].classes),
            "confusion": {name: m.confusion(said, truth, len(judges[label].classes)) for name, said in
                          (("network", first), ("svm", second))},
        }  # fmt: skip
    return result


def _scores(train: Heard, heard: Heard) -> dict[str, float]:
    return {
        "FID": m.frechet_distance(train.features, heard.features),
        "IS": m.inception_score(heard.log_p),
        "mIS": m.modified_inception_score(heard.log_p),
        "AM": m.am_score(train.log_p, heard.log_p),
    }


def as_table(results: Mapping[str, Any]) -> str:
    """The figures of every set as a table for people."""
    rows = []
    for name, found in results["sets"].items():
        row: dict[str, Any] = {"clips of": name, "n": found["clips"]}
        for label in results["judged"]:
            for judge in ("network", "svm"):
                right = found.get(label, {}).get(judge)
                row[f"{label} {judge}"] = "" if right is None else _percent(right)
        row |= {key: f"{found[key]:.4g}" for key in ("FID", "IS", "mIS", "AM")}
        row |= {"median s": round(found["seconds"]["q50"], 3), "silent": f"{found['silent']:.1%}"}
        copied = found.get("copies from training")
        row["copied"] = "" if copied is None else f"{copied['share']:.3%}"
        near = found.get("nearest in training, log-mel nats")
        row["nearest"] = "" if near is None else f"{near['q50']:.3f}"
        rows.append(row)
    return aligned(rows, [*rows[0]]).rstrip()


def _percent(right: Mapping[str, Any]) -> str:
    low, high = right["interval_95"]
    return f"{right['accuracy']:.1%} ({low:.1%}-{high:.1%})"


def mean_and_spread(results: Sequence[Mapping[str, Any]], path: Sequence[str]) -> dict[str, float]:
    """Mean, standard deviation, least and most over seeds of the figure at `path` in each seed's set."""
    values = []
    for result in results:
        value: Any = result
        for key in path:
            value = value[key]
        values.append(float(value))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": spread, "min": min(values), "max": max(values)}
