"""Records: reading and checking records/<track>/<YYYY-MM-DD_Name>/, their tables, plots and statistics.

The rules are in records/README.md. `python logger.py --records` prints the history of each track.
"""

import hashlib
import math
import re
import shlex
from pathlib import Path
from statistics import mean, median, stdev

from cli import UserError
from logger import SEPARATOR, get_final_row, read_json, read_rows
from tools.plots import COLOURS, bin_means, open_figure

ANY_TORCH = "any torch"  # key of a pinned corpus that does not depend on the version of torch
COLUMNS = ("#", "record", "parameters (of tables)", "steps", "seconds to target", "ratio to row 1",
           "active TFLOPs to target", "bits per byte", "n", "p")
FREE_FLAGS = {"data", "out_dir", "experiment_name", "sample_tokens", "checkpoint_every"}  # of no weight in a record
MEND = "restore it, or make the record again by the rules in records/README.md"


def write_histories(folder, track_name: str | None = None):
    """Prints the histories of the tracks below `folder` as markdown tables and draws each as <track>/history.png."""
    histories = [(path, *read_history(path)) for path in find_tracks(folder, track_name)]
    print("\n\n".join(format_history(*history) for history in histories))
    for path, track, records in histories:
        if records:
            with open_figure(path / "history.png") as figure:
                plot_history(figure, track["target"], records)


def find_tracks(folder, name: str | None = None) -> list[Path]:
    """The folders of all tracks below `folder`, or of the named one. Raises UserError if there is none."""
    found = sorted(path.parent for path in Path(folder).glob("*/track.json"))
    chosen = [path for path in found if name in (None, path.name)]
    if not chosen:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"no track{f' {name!r}' if name else ''} below {folder} (a folder with a track.json);"
                       f" there are: {names}")
    return chosen


# -----------------------------------------------------------------------------
# Reading and checking

def read_history(folder) -> tuple[dict, list[dict]]:
    """A track.json, and its records as read_record() returns them: row 1, then the others by date.

    Raises UserError for a record that breaks a rule, and for a target that is not row 1's mean + margin.
    """
    track_file = folder / "track.json"
    track = read_json(track_file)
    keys = {"metric", "target", "margin", "row_1", "seeds", "p", "val_tokens", "encoding", "corpus_sha256", "preset",
            "device"}  # fmt: skip
    missing = keys - track.keys()
    _require(not missing, track_file, f"{', '.join(sorted(missing))} is missing")

    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.suffix != ".partial")
    folders.sort(key=lambda path: path.name != track["row_1"])
    if not folders:
        return track, []
    _require(folders[0].name == track["row_1"], track_file, f"row_1 is {track['row_1']}, which is no record there")
    records = [read_record(path, track) for path in folders]
    target = round(mean(records[0]["values"]) + track["margin"], 4)
    _require(track["target"] == target, track_file,
             f"target is {track['target']}, row 1's mean + {track['margin']} is {target}")
    return track, records


def read_record(folder, track: dict) -> dict:
    """The results of a record, from its logs.

    Returns:
        name: name of the folder.
        parameters, of_tables: all of them; those of the embedding and of value and n-gram tables.
        steps, flops: training steps and active FLOPs of one seed.
        seconds, values: training seconds and track["metric"] of each seed.
        curves: of each seed, a list of (seconds, training loss in bits per byte).
        p: p-value of the mean against the target, None while the track has no target.
        per_step: (ratio of this record's time per step to row 1's, half width of its 95% confidence interval).

    Raises UserError for a record that breaks a rule. Row 1 need not reach the target, which it sets.
    """
    first = track["row_1"] in (None, folder.name)
    n = max(len(list(folder.glob(f"seed*.{kind}"))) for kind in ("log", "jsonl"))
    files = ["README.md", "config.json", *(f"seed{seed}.{kind}" for seed in range(n) for kind in ("log", "jsonl"))]
    for name in files if first else [*files, "timing.json"]:
        _require((folder / name).exists(), folder, f"{name} is missing")
    _require(n >= track["seeds"], folder, f"it has {n} seeds, the track requires {track['seeds']}")

    try:
        config = read_json(folder / "config.json")
        settings, pinned = config["hyperparameters"], config["track"]["corpus_sha256"]
        for name, value in (("val_tokens", settings["val_tokens"]), ("encoding", config["encoding"])):
            _require(value == track[name], folder / "config.json", f"{name} is {value}, in the track {track[name]}")
        _check_config(folder / "config.json", config)

        rows, sources, curves = zip(*(_read_seed(folder, seed, track, config, pinned) for seed in range(n)))
        values = [row[track["metric"]] for row in rows]
        _require(len(set(sources)) == 1, folder, "the logs of its seeds hold different sources")
        _require(sources[0] == config["track"]["source_sha256"], folder / "config.json",
                 "source_sha256 is not that of the sources in the logs")
        _require(len({tuple(loss for _, loss in curve) for curve in curves}) == n, folder,
                 "two of its seeds have the same training losses")
        p = t_test_below(values, track["target"]) if track["target"] else None
        _require(first or p < track["p"], folder,
                 f"p against the target {track['target']} is {p}, not below {track['p']}")

        timing = {"row": 1, "row_1": 1, "rounds": [(1, 1)] * 2} if first else read_json(folder / "timing.json")
        _require(len(timing["rounds"]) > 1, folder / "timing.json", "one round has no spread")
        medians = [median(values) for values in zip(*timing["rounds"])]
        _require([timing["row"], timing["row_1"]] == medians, folder / "timing.json",
                 f"row and row_1 are not the medians of the rounds, {medians}")
        ratios = [row / row_1 for row, row_1 in timing["rounds"]]
        parameters = config["parameters"]
        of_tables = sum(number for kind, number in parameters.items() if kind.endswith("embed"))
        return {"name": folder.name, "parameters": parameters["total"], "of_tables": of_tables,
                "steps": settings["num_iterations"], "flops": float(rows[0]["train/flops"]),
                "seconds": [float(row["train_time"]) for row in rows], "values": values, "curves": curves, "p": p,
                "per_step": (timing["row"] / timing["row_1"], confidence_half_width(ratios))}
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # a file that was edited by hand
        raise UserError(f"{folder} holds a file of another form than benchmarks/track.py writes ({error!r});"
                       f" {MEND}") from error


def find_pinned_corpus(track: dict, version: str) -> str | None:
    """The sha256 of the corpus that a track pins for a version of torch, None if it pins none."""
    return track["corpus_sha256"].get(version, track["corpus_sha256"].get(ANY_TORCH))


def logged_sources(log: Path) -> list[tuple[str, str]]:
    """(name, text) of the files whose sources a run's log holds."""
    rule, sources = "-" * 100, log.read_text(encoding="utf-8").partition(f"\n{SEPARATOR}\n")[0]
    parts = re.split(rf"(?:^|\n){rule}\n(.+)\n{rule}\n", sources)
    return [(name, f"{text}\n") for name, text in zip(parts[1::2], parts[2::2])]


def logged_sources_sha256(log: Path) -> str:
    return hashlib.sha256("".join(text for _, text in logged_sources(log)).encode()).hexdigest()


def parse_flags(words: list[str]) -> dict[str, str]:
    """Flag -> its text, of a command line's words, in either spelling; of a repeated flag the last one, as argparse."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, is_whole, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = value if is_whole else None
        else:
            flags[name] = word if flags[name] is None else f"{flags[name]} {word}"
    return flags


def _is_value(text: str | None, value) -> bool:
    """Whether a flag's text is a setting's value."""
    try:
        return float(text) == float(value)
    except (TypeError, ValueError):
        return str(text).lower() == str(value).lower()


def _check_config(config_file, config: dict):
    """Raises UserError unless config.json is that of its flags, for a model of the next token."""
    settings = config["model"] | config["hyperparameters"]
    for name, text in parse_flags(config["track"]["flags"]).items():
        _require(_is_value(text, settings.get(name)), config_file,
                 f"{name} is {settings.get(name)}, its flag says {text}")
    objective = settings.get("objective", "next")
    _require(objective == "next", config_file,
             f"objective is {objective}, and the score is that of a model of the next token")


def _check_command(log, printed: str, seed: int, track: dict, config: dict):
    """Raises UserError unless the log's command is that of the record's script and flags, with the track's settings."""
    _, script, *words = shlex.split(re.search(r"^command +(.*)", printed, re.M)[1])
    recorded, steps = config["track"], config["hyperparameters"]["num_iterations"]
    _require(script == recorded["script"], log, f"its command runs {script}, in config.json {recorded['script']}")
    given = {name: text for name, text in parse_flags(words).items() if name not in FREE_FLAGS}
    wanted = {"preset": track["preset"], **parse_flags(recorded["flags"]), "device": track["device"], "seed": seed,
              "num_iterations": steps, "val_every": 0, "val_tokens": track["val_tokens"]}  # fmt: skip
    for name in sorted(given.keys() | wanted.keys()):
        same = name in given and name in wanted and _is_value(given[name], wanted[name])
        _require(same, log, f"its command has --{name} {given.get(name, 'not at all')},"
                            f" the record {wanted.get(name, 'not at all')}")  # fmt: skip


def _check_rows(metrics, rows: list[dict], metric: str, config: dict):
    """Raises UserError unless every step has one row, the evaluation comes once, after the last, and FLOPs add up."""
    settings, trained = config["hyperparameters"], [row for row in rows if "train/loss" in row]
    steps, evaluated = settings["num_iterations"], [row["step"] for row in rows if metric in row]
    _require(evaluated == [steps], metrics,
             f"it was evaluated at steps {', '.join(map(str, evaluated))}, the rules allow {steps} alone")
    _require([row["step"] for row in trained] == [*range(1, steps + 1)], metrics,
             f"its training rows are not those of steps 1 to {steps}, each once")
    seconds = [row["train_time"] for row in rows if "train_time" in row]
    _require(seconds == sorted(seconds), metrics, "its clock runs backwards")
    per_step = config["flops_per_token"] * settings["batch_tokens"]
    _require(all(math.isclose(row["train/flops"], row["step"] * per_step, rel_tol=1e-6) for row in trained), metrics,
             "train/flops is not flops_per_token of config.json times the tokens")


def _read_seed(folder, seed, track, config, pinned):
    """The final row of one seed, the sha256 of its log's sources, and its training curve as in read_record()."""
    metric, log, metrics = track["metric"], folder / f"seed{seed}.log", folder / f"seed{seed}.jsonl"
    printed = log.read_text(encoding="utf-8").partition(f"\n{SEPARATOR}\n")[2]
    rows = read_rows(metrics)
    row = get_final_row(rows, metric)
    finite = isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])
    _require(finite, metrics, f"the run did not end with a finite {metric}")
    _check_rows(metrics, rows, metric, config)
    pattern = rf"^step:{row['step']}/\d+ .*train_time:([\d.]+)s.*{metric.replace('/', '_')}:([\d.]+)"
    logged = re.findall(pattern, printed, re.M)
    for name, text in zip(("train_time", metric), logged[0] if len(logged) == 1 else ("nan", "nan")):
        _require(abs(float(text) - row[name]) < {metric: 1e-4}.get(name, 1e-3), log,
                 f"its {name} at step {row['step']} is not that of {metrics.name}")

    version = re.search(r"^torch +([^\s+]+)", printed, re.M)[1]
    _require(pinned == find_pinned_corpus(track, version), log, f"its corpus is not the one pinned for torch {version}")
    for fact in ("threads", "gpu"):
        value = re.search(rf"^{fact} +(.*\S)", printed, re.M)[1]
        _require(value == str(track.get(fact, value)), log, f"{fact} is {value}, in the track {track.get(fact)}")

    _check_command(log, printed, seed, track, config)
    bits_per_nat = row[metric] / row["val/loss"]  # bits per byte over nats per token
    curve = [(row["train_time"], bits_per_nat * row["train/loss"]) for row in rows if "train/loss" in row]
    return row, logged_sources_sha256(log), curve


def _require(condition, path, problem: str):
    if not condition:
        raise UserError(f"{path}: {problem}; {MEND}")


# -----------------------------------------------------------------------------
# Table and plot

def format_history(folder, track: dict, records: list[dict]) -> str:
    """The history of a track as a markdown table, below a line with the target."""
    if not records:
        return f"**Track `{folder.name}`**: no records yet."
    margin = f"row 1's mean + {track['margin']:g}"
    lines = [f"**Track `{folder.name}`**: {track['metric']} of at most {track['target']:.4f} ({margin}).", "",
             f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for number, record in enumerate(records, start=1):
        seconds, values = record["seconds"], record["values"]
        more_steps = record["steps"] / records[0]["steps"]
        ratio, half_width = (more_steps * part for part in record["per_step"])
        cells = (
            number,
            f"[{record['name']}]({(folder / record['name']).as_posix()})",
            f"{record['parameters'] / 1e6:.2f}M ({record['of_tables'] / 1e6:.2f}M)",
            f"{record['steps']:,}",
            f"{mean(seconds):,.1f} ± {confidence_half_width(seconds):.1f}",
            f"{ratio:.3f} ± {half_width:.3f}" if number > 1 else "1",
            f"{record['flops'] / 1e12:,.2f}",
            f"{mean(values):.4f} ± {stdev(values):.4f}",
            len(values),
            f"{record['p']:.1e}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot_history(figure, target: float, records: list[dict]):
    """Each record's training loss over seconds (mean over seeds), its final validation loss, and the target."""
    figure.set_size_inches(9, 6)
    ax = figure.subplots()
    for i, record in enumerate(records):
        seconds, value = mean(record["seconds"]), mean(record["values"])
        mean_curve = [[mean(point) for point in zip(*points)] for points in zip(*record["curves"])]
        ax.plot(*bin_means(mean_curve, 60).T, color=COLOURS[i % 8], linewidth=1.2)
        ax.plot(seconds, value, "o", markersize=8, color=COLOURS[i % 8],
                label=f"{i + 1}  {record['name']}: {seconds:,.0f} s")
    ax.axhline(target, color="black", linestyle=":", linewidth=1, label=f"target {target:.4f}")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlim(left=min(mean(record["seconds"]) for record in records) / 10)
    ax.set_ylim(top=2 * target)  # the first losses would flatten the end
    ax.set_xlabel("training seconds")
    ax.set_ylabel("bits per byte: lines training, dots validation")
    figure.legend(loc="outside lower center", ncols=2)


# -----------------------------------------------------------------------------
# Statistics

def t_test_below(values, target: float) -> float:
    """p-value of a one-sided one-sample t-test: probability of a mean this low if the true mean is `target`."""
    distance, error = mean(values) - target, stdev(values) / math.sqrt(len(values))
    return student_t_cdf(distance / error if error else math.copysign(math.inf, distance), len(values) - 1)


def confidence_half_width(values) -> float:
    """Half the width of the 95% confidence interval of the mean, by Student's t."""
    low, high = 0.0, 100.0  # bisection for the 97.5% quantile: 12.7 for two values, 4.3 for three
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, len(values) - 1) < 0.975 else (low, middle)
    return high * stdev(values) / math.sqrt(len(values))


def student_t_cdf(t: float, dof: int) -> float:
    """P(T <= t) of Student's t for whole degrees of freedom, by the finite sums of Abramowitz and Stegun 26.7.3-4."""
    angle, odd = math.atan(t / math.sqrt(dof)), dof % 2
    total, term = 0.0, math.cos(angle) ** odd
    for power in range(odd, dof - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    within = math.sin(angle) * total  # P(|T| <= |t|), with the sign of t
    return (1 + (2 * (angle + within) / math.pi if odd else within)) / 2
