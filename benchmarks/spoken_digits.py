"""How good is the speech that a model makes? The whole protocol for a model of spoken words, its result as JSON.

    python benchmarks/spoken_digits.py MODEL DATA JUDGES [--number 1200] [--seeds 3] [--guidance 1] [--name NAME]

MODEL: what `audio train` made, or a shipped model's name; DATA: the recordings it learned from; JUDGES: what
`audio judge` made of the same recordings, with the same split. Makes NUMBER clips for each seed, as many of each word
by each speaker, and measures each seed and all together as `audio metrics` does, beside real recordings and controls;
then the bits per sample of the test recordings, told the labels and not, also without each speaker. Nothing is rejected
or picked. --keep keeps the clips. --real N takes N real test recordings in the place of generated ones: a trial.

--published instead runs the protocol of the published figures of SC09, for a model without labels: 2,048 clips of one
second without rejection, and half of 10,240, drawn at random, of which the least likely 40 % and the most likely 5 %
are rejected, as all autoregressive rows of those tables are (their program, meant to tune these thresholds, always
takes the last it tries). The classifier is ours: only figures of the same judges can be compared.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.sampling import Sampling
from seqmodels.tasks.audio.commands import evaluate, weights_sha256
from seqmodels.tasks.audio.generate import generate_each
from seqmodels.tasks.audio.judges import Judge, load_judges
from seqmodels.tasks.audio.measure import Sounds, as_table, kept, mean_and_spread, measure, open_real
from seqmodels.tasks.audio.waveform import resample, write_audio

PUBLISHED = 10240, 2048  # clips of the published protocol: with and without rejection
SUMMARY = ("FID", "IS", "mIS", "AM", "silent", "clipped")


def balanced(judges: dict[str, Judge], conditions: Sequence[Any], number: int) -> tuple[list[dict[str, str]], dict]:
    """`number` labels for the model, as many of each combination as possible, and the judges' ids of them by label."""
    owners = {}
    for condition in conditions:
        owners[condition.name] = next((k for k, j in judges.items() if set(j.classes) == set(condition.values)), None)
    told = [c for c in conditions if owners[c.name] is not None]
    every = list(itertools.product(*(c.values for c in told)))
    labels = [dict(zip((c.name for c in told), every[i % len(every)], strict=True)) for i in range(number)]
    truth = {
        owners[c.name]: np.array([judges[owners[c.name]].classes.index(one[c.name]) for one in labels]) for c in told
    }
    return labels, truth


def make(model: Any, labels: list[dict[str, str]], truth: dict, seed: int, rate: int, options: Any) -> Sounds:
    """Generated clips at the judges' rate; prints how fast they were made."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.guidance)
    made = generate_each(model, labels, seconds=options.seconds, batch=options.batch, sampling=sampling, seed=seed)
    print(f"seed {seed}: {made.samples_per_second:.0f} samples/s", flush=True)
    if options.keep is not None:
        folder = options.keep / f"seed{seed}"
        folder.mkdir(parents=True)
        columns = list(labels[0])
        lines = [",".join(["file", *columns, "bits_per_sample", "ended"])]
        for i, wave in enumerate(made.samples):
            write_audio(folder / f"{i:05}.flac", wave, made.sample_rate)
            cells = [f"{i:05}.flac", *labels[i].values(), f"{made.bits_per_sample[i]:.5f}", str(int(made.ended[i]))]
            lines.append(",".join(cells))
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    waves = [resample(wave, made.sample_rate, rate) for wave in made.samples]
    return Sounds(waves, truth, np.array(made.bits_per_sample), np.array(made.ended, float))


def together(sets: list[Sounds]) -> Sounds:
    """The clips of several sets."""
    truth = {label: np.concatenate([one.truth[label] for one in sets]) for label in sets[0].truth}
    bits, ended = (np.concatenate([getattr(one, name) for one in sets]) for name in ("bits", "ended"))
    return Sounds([wave for one in sets for wave in one.waves], truth, bits, ended)


def bits(model: str, data: Path, options: Any) -> list[dict[str, Any]]:
    """Rows of `audio evaluate` on the test recordings, told the labels and not."""
    rows = []
    for labels in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "bits.json"
            evaluate(data, model=model, labels=labels, output=output, device=options.device)
            found = json.loads(output.read_text())
        for name, group in found["by"].items():
            total = sum(one["bits_per_sample"] * one["samples"] for one in group.values())
            n = sum(one["samples"] for one in group.values())
            found[f"bits_per_sample without one {name}"] = {
                value: (total - one["bits_per_sample"] * one["samples"]) / (n - one["samples"])
                for value, one in group.items()
            }
        rows.append({"what": "bits per sample of the test recordings", **found})
        if not found["by"]:  # it knows no labels
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("judges", type=Path)
    parser.add_argument("--number", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="longest clip; by default 1.024, or 1 with --published")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=400)
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--real", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--no-bits", action="store_true", help="leave out the bits per sample")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="generated_digits")
    options = parser.parse_args()
    options.seconds = options.seconds or (1.0 if options.published else 1.024)
    judges = load_judges(options.judges)
    rate = next(iter(judges.values())).config.sample_rate
    train, test = open_real(options.data, options.judges, judges)
    held_out = json.loads((options.judges / "judges.json").read_text())["held_out"]
    about: dict[str, Any] = {"model": options.model, "rejection": "none"}
    rows: list[dict[str, Any]] = [{"what": "judges on real recordings", "accuracies": held_out}]
    if options.real:
        chosen = np.random.default_rng(0).choice(len(test.waves), options.real, replace=False)
        sets = {"generated": test.select(chosen)}
        about["model"] = "none: real test recordings"
    else:
        model = seqmodels.load(options.model, device=choose_device(options.device))
        about["weights_sha256"] = weights_sha256(options.model)
        sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "guidance", "seconds")}
        about |= {"sampling": sampling}
        count = PUBLISHED[0] if options.published else options.number
        labels, truth = ([{}] * count, {}) if options.published else balanced(judges, model.config.conditions, count)
        seeds = range(1 if options.published else options.seeds)
        made = [make(model, labels, truth, seed, rate, options) for seed in seeds]
        if options.published:
            half = np.random.default_rng(0).permutation(count)[: count // 2]
            sets = {f"{PUBLISHED[1]:,}, no rejection": made[0].select(np.arange(PUBLISHED[1]))}
            sets["all, no rejection"] = made[0]
            sets["half, of it 0.4 to 0.95 by likelihood"] = kept(made[0].select(half), (0.4, 0.95))
            about["rejection"] = "as each set says"
        else:
            sets = {f"seed {seed}": one for seed, one in enumerate(made)}
            sets["all seeds"] = together(made)
    results = measure(judges, sets, train, test)
    print(as_table(results), flush=True)
    rows += [{"what": "clips", "set": name, **about, **found} for name, found in results["sets"].items()]
    if each := [results["sets"][name] for name in sets if name.startswith("seed ")]:
        paths = [[name] for name in SUMMARY]
        paths += [[label, judge, "accuracy"] for label in sets["seed 0"].truth for judge in ("network", "svm", "both")]
        rows.append({"what": "over seeds", **{" ".join(path): mean_and_spread(each, path) for path in paths}})
        print(json.dumps(rows[-1], indent=1))
    if not (options.real or options.no_bits):
        rows += bits(options.model, options.data, options)
    print(write_result(options.name, rows))


if __name__ == "__main__":
    main()
