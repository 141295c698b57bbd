"""A run on one page (with report.html), a run that is on its way, and a run on the card of its model."""

import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import quote

from logger import RunError, _finite, _map, _naming, _series, _write_atomically, last, read_run, table_rows
from tools.plots import COLOURS, DASHES, _binned, drawing, plot_val_loss, style
from tools.routes import analyse, read_routes, routes_files

# -----------------------------------------------------------------------------
# The page: report.html, with plotly.js and the numbers of runs put into it

REPORT_CURVES = {  # key -> title, in the page's order; what else was logged folds away below
    "val/bpb": "validation bits per byte", "val/loss": "validation loss, nats per token", "train/loss": "training loss, nats per token",
    "train/tok_per_sec": "tokens per second", "moe/router_entropy": "router entropy / log(experts)",
    "moe/load_max_over_mean": "load of the busiest expert / mean", "memory/peak_bytes": "peak memory, bytes", "train/mfu": "MFU",
}
CLOCKS = {"step": "step", "seconds": "train_time", "flops": "train/flops"}  # the page's name of an axis -> its key
PAGE_POINTS, PAGE_SHARES = 16_000, 400_000  # of a curve over all runs, and of expert loads, so that a page of fifty runs still opens


def _short(values):
    """Five digits are more than a screen shows."""
    return [None if value is None else float(f"{value:.5g}") for value in values]


def curve_parts(run, bins: int) -> list[dict]:
    """[{"x": axis -> numbers, "y": key -> numbers}]: keys that the same rows have share their axes. Long ones are averaged in groups."""
    parts, scalars = {}, dict.fromkeys(key for row in run["rows"] for key, value in row.items() if isinstance(value, (int, float)))
    for key in [key for key in scalars if key not in CLOCKS.values()]:
        rows = tuple(i for i, row in enumerate(run["rows"]) if isinstance(row.get(key), (int, float)))
        parts.setdefault(rows, []).append(key)
    shaped = lambda rows, key: _short(_binned([run["rows"][i][key] for i in rows], bins))
    has = lambda rows, key: all(run["rows"][i].get(key) is not None for i in rows)
    return [{"x": {axis: shaped(rows, key) for axis, key in CLOCKS.items() if has(rows, key)}, "y": {key: shaped(rows, key) for key in keys}}
            for rows, keys in parts.items()]


def load_frames(run, most: int) -> dict | None:
    """{"step": S numbers, "share": S x layers x experts}, at most so many shares in all."""
    import numpy as np

    steps, load = _series({"rows": [row for row in run["rows"] if row.get("moe/load")]}, "step", "moe/load")
    if not load:
        return None
    frames = _binned(load, max(2, most // np.array(load[0]).size))
    last_of_group = [int(group[-1]) for group in np.array_split(np.array(steps), len(frames))]
    return {"step": last_of_group, "share": frames.round(4).tolist()}


def coactivation(folder) -> list | None:
    """analyse()'s, of the run's routes.npz or of the last evaluation that kept routes."""
    files = routes_files(folder)
    return _map(_finite, analyse(read_routes(files[0])).get("coactivation")) if files else None


def _settings(config: dict, prefix="") -> dict:
    """A nested configuration with dotted names."""
    nested = {name: value for name, value in config.items() if isinstance(value, dict)}
    flat = {prefix + name: value for name, value in config.items() if name not in nested}
    return flat | {key: text for name, value in nested.items() for key, text in _settings(value, f"{prefix}{name}.").items()}


def differences(runs) -> list[list[str]]:
    """[setting, its value in each run], of those settings that are not the same in all."""
    settings = [_settings(run["config"]) for run in runs]
    rows = [[name, *(str(of_run.get(name, "-")) for of_run in settings)] for name in dict.fromkeys(name for of_run in settings for name in of_run)]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("experiment_name", "matmul_flops_per_second")]


def report_numbers(runs, out_dir, page) -> dict:
    """What report.html is given of the runs; `page` is where it will lie, for the links to the logs."""
    style(runs)
    titles, *cells = table_rows(runs)
    found = []
    for run, line in zip(runs, cells):
        folder = Path(out_dir) / run["name"]
        files = [(name, quote(Path(os.path.relpath(folder / name, page.parent)).as_posix())) for name in ("run.log", "metrics.jsonl", "config.json")]
        texts = _series(run, "sample/text")[0]
        found.append({"name": run["name"], "cells": line, "files": [file for file in files if (folder / file[0]).exists()],
                      "colour": run["style"]["color"], "dash": DASHES[run["style"]["linestyle"]],
                      "parts": curve_parts(run, max(60, min(400, PAGE_POINTS // len(runs)))), "load": load_frames(run, PAGE_SHARES // len(runs)),
                      "coactivation": coactivation(folder), "sample": texts[-1] if texts else None})
    logged = dict.fromkeys(key for run in found for part in run["parts"] for key in part["y"])
    return {"about": f"{len(runs)} run{'s' * (len(runs) > 1)} below {Path(out_dir).resolve().name}/, {time.strftime('%Y-%m-%d %H:%M')}",
            "titles": titles, "runs": found, "differences": differences(runs) if len(runs) > 1 else [],
            "curves": [item for item in REPORT_CURVES.items() if item[0] in logged],
            "others": [[key, key] for key in logged if key not in REPORT_CURVES],
            "how_to_get_routes": "run `python model.py --checkpoint logs/muon/checkpoint --routes logs/muon/routes.npz --data data/python`, "
                                 "or train with --routes_tokens"}


def write_report(runs, out_dir, page):
    """Writes the page, which needs nothing but itself. Raises RunError without plotly, or where it cannot be written."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise RunError("--html draws with plotly: `pip install plotly`, or `pip install -r requirements.txt`") from None
    template = Path(__file__).with_name("report.html")
    with _naming(template, "read"):
        html = template.read_text(encoding="utf-8")
    numbers = json.dumps(_map(_finite, report_numbers(runs, out_dir, page)), allow_nan=False)
    numbers = numbers.replace("<", "\\u003c")  # no text may end the script, or begin one
    html = html.replace("/* PLOTLY */", get_plotlyjs().replace("</script", "<\\/script")).replace("/* NUMBERS */", numbers)
    with _naming(page):
        page.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(page, html)


# -----------------------------------------------------------------------------
# Following a run that another process writes

BARS = "▁▂▃▄▅▆▇█"


FOLLOWED = [  # title, format, key
    ("training loss", "{:.4f}", "train/loss"), ("bits per byte", "{:.4f}", "val/bpb"), ("tokens/s", "{:,.0f}", "train/tok_per_sec"),
    ("busiest expert / mean", "{:.2f}", "moe/load_max_over_mean"),
]


def sparkline(values, width: int = 40) -> str:
    points = _binned([value for value in values if math.isfinite(value)] or [0.0], width).tolist()
    low, span = min(points), (max(points) - min(points)) or 1
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in points)


def status(run) -> list[str]:
    """How far a run is, in a few lines."""
    total = run["config"].get("hyperparameters", {}).get("num_iterations", 0)
    step, seconds = (max(_series(run, key)[0], default=0) for key in ("step", "train_time"))
    lines = [f"{run['name']}  step {step:,}/{total:,}  {clock_text(seconds)} of training"]
    if 0 < step < total:
        lines[0] += f", about {clock_text((total - step) * seconds / step)} left"
    for title, text, key in FOLLOWED:
        values = _series(run, key)[0]
        if values:
            lines.append(f"  {title:<22}{text.format(last(values)):>10}  {sparkline(values)}")
    return lines


def clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def is_written(folder) -> bool:
    """Whether a process has the run's folder open for writing, as far as the file system tells."""
    try:
        import fcntl

        with open(folder / "run.log") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: asks for reading alone, and is in nobody's way
    except FileNotFoundError:
        return False
    except (ImportError, OSError):  # somebody has it, or nothing can be told here
        return True
    return False


def follow(folder, every: float = 1.0, patience: float = 10.0):
    """Prints how a run is doing until it ends: on a terminal the same lines anew, in a file a block whenever there was an evaluation.

    every: seconds between looks. patience: seconds without news after which it is asked whether anybody still writes the run."""
    terminal, before, height, news = sys.stdout.isatty(), None, 0, time.monotonic()
    while True:
        size = sum(path.stat().st_size for path in (folder / "metrics.jsonl", folder / "config.json") if path.exists())
        if size != before:
            run, before, news = read_run(folder), size, time.monotonic()
            ended = any(row.get("event") == "end" for row in run["rows"])
            lines, evaluations = status(run), len(_series(run, "val/loss")[0])
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"\x1b[{height}A\x1b[J" * (height > 0) + "\n".join(line[:width] for line in lines), flush=True)
                height = len(lines)
            elif ended or evaluations != height:
                print("\n".join(lines), flush=True)
                height = evaluations
            if ended:
                return
        elif time.monotonic() - news > patience:
            if not is_written(folder):
                print(f"nobody is writing {folder}: the run was stopped; go on with --resume")
                return
            news = time.monotonic()
        time.sleep(every)


# -----------------------------------------------------------------------------
# A model's card

def card(folder) -> tuple[str, dict[str, bytes]]:
    """What a model card says of the run that made the model, in markdown, and the pictures it shows: file name -> PNG."""
    run = read_run(folder)
    titles, cells = table_rows([run])
    text = "\n".join(["", "## The run", "", "| | |", "|---|---|", *(f"| {title} | {cell} |" for title, cell in zip(titles, cells)), ""])
    if not _series(run, "val/loss")[0]:
        return text, {}
    run["style"], picture = {"color": COLOURS[0]}, io.BytesIO()
    with drawing(picture) as figure:
        plot_val_loss(figure, [run])
    settings = json.dumps(run["config"].get("hyperparameters"))
    text += f"\n![Validation over the run](val_loss.png)\n\nTrained by {run['config'].get('optimizer')} with `{settings}`\n"
    return text, {"val_loss.png": picture.getvalue()}
