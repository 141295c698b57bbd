"""Records: records/<track>/<YYYY-MM-DD_Name>/, whose rules are in records/README.md."""

import math
import re
from pathlib import Path
from statistics import mean, stdev

from logger import SEPARATOR, RunError, _read_rows, final_row, read_json
from tools.plots import COLOURS, _binned, drawing


def student(t: float, dof: int) -> float:
    """P(T <= t) of Student's t for whole degrees of freedom, by the finite sums of Abramowitz and Stegun 26.7.3-4."""
    angle, odd = math.atan(t / math.sqrt(dof)), dof % 2
    total, term = 0.0, math.cos(angle) ** odd
    for power in range(odd, dof - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    within = math.sin(angle) * total  # P(|T| <= |t|), with the sign of t
    return (1 + (2 * (angle + within) / math.pi if odd else within)) / 2


def p_below(values, target: float) -> float:
    """One-sided one-sample t-test: how probable is a mean this low or lower if the true mean were `target`?"""
    distance, error = mean(values) - target, stdev(values) / math.sqrt(len(values))
    return student(distance / error if error else math.copysign(math.inf, distance), len(values) - 1)


def half_width(values) -> float:
    """Half the 95% confidence interval of the mean, by Student's t."""
    low, high = 0.0, 100.0  # the quantile of 97.5% lies between: 12.7 for two values, 4.3 for three
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, len(values) - 1) < 0.975 else (low, middle)
    return high * stdev(values) / math.sqrt(len(values))


def read_record(folder, track: dict) -> dict:
    """What a record's logs say: `steps` and `flops` of one seed; `seconds` and `values` (of track["metric"]), lists over the seeds, and
    `curves`, a list of (seconds, training loss in bits per byte) for each; `p` against the target, None before there is one; `per_step`,
    the time of a step over that of row 1, both re-timed in turns, with half the 95% interval of the turns' own ratios.
    Raises RunError for a record that breaks a rule; row 1 need not reach the target it sets."""
    first = track["row_1"] in (None, folder.name)
    n = max(len(list(folder.glob(f"seed*.{kind}"))) for kind in ("log", "jsonl"))
    wanted = ["README.md", "config.json", *(f"seed{seed}.{kind}" for seed in range(n) for kind in ("log", "jsonl"))]
    for name in wanted if first else [*wanted, "timing.json"]:
        _demand((folder / name).exists(), folder, f"{name} is missing")
    _demand(n >= track["seeds"], folder, f"it has {n} seeds, its track asks for {track['seeds']}")
    try:
        config = read_json(folder / "config.json")
        settings, pinned = config["hyperparameters"], config["track"]["corpus_sha256"]
        for name, value in (("val_tokens", settings["val_tokens"]), ("encoding", config["encoding"])):
            _demand(value == track[name], folder / "config.json", f"{name} is {value}, in its track {track[name]}")
        rows, sources, curves = zip(*(_read_seed(folder, seed, track, pinned) for seed in range(n)))
        steps, values = [row["step"] for row in rows], [row[track["metric"]] for row in rows]
        _demand(set(steps) == {settings["num_iterations"]}, folder,
                f"its seeds stopped at steps {', '.join(map(str, steps))}, not all at the {settings['num_iterations']} of config.json")
        _demand(len(set(sources)) == 1, folder, "the logs of its seeds hold different sources")
        p = p_below(values, track["target"]) if track["target"] else None
        _demand(first or p < track["p"], folder, f"p against the target {track['target']} is {p}, not below {track['p']}")
        timing = {"row": 1, "row_1": 1, "rounds": [(1, 1)] * 2} if first else read_json(folder / "timing.json")
        _demand(len(timing["rounds"]) > 1, folder / "timing.json", "one round has no spread")
        per_step = timing["row"] / timing["row_1"], half_width([row / row_1 for row, row_1 in timing["rounds"]])
        return {"name": folder.name, "curves": curves, "steps": steps[0], "flops": float(rows[0]["train/flops"]),
                "seconds": [float(row["train_time"]) for row in rows], "values": values, "p": p, "per_step": per_step}
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # edited by hand, or written by something else
        raise RunError(f"{folder} holds a file of another form than benchmarks/track.py writes ({error!r}); restore it") from error


def _read_seed(folder, seed, track, pinned):
    """The final row of one seed's run, the source that its log holds, and its training loss as read_record gives it."""
    metric, log, metrics = track["metric"], folder / f"seed{seed}.log", folder / f"seed{seed}.jsonl"
    source, _, told = log.read_text(encoding="utf-8").partition(f"\n{SEPARATOR}\n")
    rows = _read_rows(metrics)[1]
    row = final_row(rows, metric)
    finite = isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])
    _demand(finite, metrics, f"the run did not end with a finite {metric}")
    said = re.search(rf"^step:{row['step']}/\d+ .*{metric.replace('/', '_')}:([\d.]+)", told, re.M)
    _demand(said and abs(float(said[1]) - row[metric]) < 1e-4, log, f"it does not say what {metrics.name} says")
    version = re.search(r"^torch +([^\s+]+)", told, re.M)[1]
    _demand(pinned == corpus_pin(track, version), log, f"its corpus is not the one pinned for torch {version}")
    for fact in ("threads", "gpu"):
        there = re.search(rf"^{fact} +(.*\S)", told, re.M)[1]
        _demand(there == str(track.get(fact, there)), log, f"it ran with {fact} {there}, its track with {track.get(fact)}")
    bits = row[metric] / row["val/loss"]  # per nat and token
    return row, source, [(line["train_time"], bits * line["train/loss"]) for line in rows if "train/loss" in line]


def _demand(fine, where, what):
    if not fine:
        raise RunError(f"{where}: {what}; restore it, or make the record again by the rules in records/README.md")


ANY_TORCH = "any torch"  # key of a corpus whose text is not torch's own


def corpus_pin(track: dict, version: str) -> str | None:
    """The sha256 of the corpus that a track pins for this version of torch, None if it pins none."""
    return track["corpus_sha256"].get(version, track["corpus_sha256"].get(ANY_TORCH))


RECORD_TITLES = ("#", "record", "steps", "seconds to target", "ratio to row 1", "active TFLOPs to target", "bits per byte", "n", "p")


def read_history(folder) -> tuple[dict, list[dict]]:
    """A track, and what read_record says of row 1 and then of the other records by name, so by date.
    Raises RunError for a record that breaks the rules, and for a target that is not row 1's mean + margin."""
    track = read_json(folder / "track.json")
    missing = {"metric", "target", "margin", "row_1", "seeds", "p", "val_tokens", "encoding", "corpus_sha256"} - track.keys()
    _demand(not missing, folder / "track.json", f"it does not say {', '.join(sorted(missing))}")
    there = sorted(path for path in folder.iterdir() if path.is_dir() and path.suffix != ".partial")
    there.sort(key=lambda path: path.name != track["row_1"])
    if not there:
        return track, []
    _demand(there[0].name == track["row_1"], folder / "track.json", f"row_1 is {track['row_1']}, which is no record there")
    records = [read_record(path, track) for path in there]
    target = round(mean(records[0]["values"]) + track["margin"], 4)
    _demand(track["target"] == target, folder / "track.json", f"target is {track['target']}, row 1's mean + {track['margin']} is {target}")
    return track, records


def track_history(folder, track: dict, records: list[dict]) -> str:
    """What read_history says of a track, as a markdown table under a line with the target."""
    if not records:
        return f"**Track `{folder.name}`**: no records yet."
    lines = [f"**Track `{folder.name}`**: {track['metric']} of at most {track['target']:.4f} (row 1's mean + {track['margin']:g}).", "",
             f"| {' | '.join(RECORD_TITLES)} |", "|---" * len(RECORD_TITLES) + "|"]
    for number, record in enumerate(records, start=1):
        seconds, values, more_steps = record["seconds"], record["values"], record["steps"] / records[0]["steps"]
        ratio, spread = (more_steps * part for part in record["per_step"])
        cells = (number, f"[{record['name']}]({(folder / record['name']).as_posix()})", f"{record['steps']:,}",
                 f"{mean(seconds):,.1f} ± {half_width(seconds):.1f}", f"{ratio:.3f} ± {spread:.3f}" if number > 1 else "1",
                 f"{record['flops'] / 1e12:,.2f}",
                 f"{mean(values):.4f} ± {stdev(values):.4f}", len(values), f"{record['p']:.1e}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_history(folder, track: dict, records: list[dict]):
    """Draws what read_history says of a track into `folder`/history.png, if there are any records."""
    if records:
        with drawing(folder / "history.png") as figure:
            plot_history(figure, track["target"], records)


def tracks(folder, track: str | None = None) -> list[Path]:
    """The folders of every track below `folder`, or of one. Raises RunError if there is none."""
    there = sorted(path.parent for path in Path(folder).glob("*/track.json"))
    chosen = [path for path in there if track in (None, path.name)]
    if not chosen:
        names = ", ".join(path.name for path in there) or "none"
        raise RunError(f"no track{f' {track!r}' if track else ''} below {folder} (a folder with a track.json); there are: {names}")
    return chosen


def plot_history(figure, target, records):
    """The training loss of every record against seconds, averaged over its seeds, where its validation ended, and the target."""
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for i, record in enumerate(records):
        curve = _binned([[mean(point) for point in zip(*points)] for points in zip(*record["curves"])], 60)
        ax.plot(*curve.T, color=COLOURS[i % 8], linewidth=1)
        ax.plot(mean(record["seconds"]), mean(record["values"]), "o", markersize=8, color=COLOURS[i % 8],
                label=f"{i + 1}  {record['name']}: {mean(record['seconds']):,.0f} s")
    ax.axhline(target, color="black", linestyle=":", linewidth=1, label=f"target {target:.4f}")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlim(left=min(mean(record["seconds"]) for record in records) / 10)
    ax.set_ylim(top=2 * target)  # the first losses would flatten the end
    ax.set_xlabel("training seconds")
    ax.set_ylabel("bits per byte: lines training, dots validation")
    ax.legend()
