"""Reports of runs: the interactive page (report.html, report.js), the live status, and the section of a model card.

Sections: page, following runs that other processes write, model card.
"""

import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import quote

from cli import UserError
from logger import (
    TABLE,
    RunReader,
    explain_os_errors,
    for_json,
    get_columns,
    get_final_row,
    make_folder,
    read_run,
    table_rows,
    write_text,
)
from terminal import say
from tools.plots import COLOURS, assign_styles, bin_means, open_figure, plot_val_loss
from tools.routes import analyse_file, how_to_get_routes, list_routes_files

# -----------------------------------------------------------------------------
# Page: report.html with plotly.js and the numbers of the runs filled in

CURVES = {  # key -> title, in the page's order; other metrics are folded away below
    "val/bpb": "validation bits per byte",
    "val/loss": "validation loss, nats per token",
    "train/loss": "training loss, nats per token",
    "train/tok_per_sec": "tokens per second",
    "moe/router_entropy": "router entropy / log(experts)",
    "moe/load_max_over_mean": "load of the busiest expert / mean",
    "memory/peak_bytes": "peak memory, bytes",
    "train/mfu": "MFU",
}
NORMS = {"norm/grad/": "gradient norm", "norm/update/": "update norm"}  # prefix of the key -> title; the rest is a kind
COMPRESSORS = {"val/gzip_bpb": "gzip", "val/xz_bpb": "xz"}  # lines in the chart of bits per byte
AXES = {"step": "step", "seconds": "train_time", "flops": "train/flops"}  # the page's name of an x axis -> key
MAX_POINTS, MAX_LOADS = 16_000, 40_000  # of one metric and of expert loads, over all runs; fifty runs still load fast


def keep_going(folders, action, noted=()) -> list:
    """Results of action(folder) for the folders of runs. A note names each that is damaged, unless it is in `noted`.

    Raises the first UserError if all are damaged."""
    results, mistakes = [], []
    for folder in folders:
        try:
            results.append(action(folder))
        except UserError as error:
            mistakes.append(error)
    if mistakes and not results:
        raise mistakes[0]
    for mistake in map(str, mistakes):
        if mistake not in noted:
            say(f"note: left out, as {mistake}")
    if isinstance(noted, set):
        noted.update(map(str, mistakes))
    return results


def read_runs(folders) -> list[dict]:
    """read_run() of each folder; a note names damaged ones, which are left out. Raises UserError if all are."""
    return keep_going(folders, read_run)


def write_report(runs, out_dir, page, live: bool | None = None, poll_seconds: float = 5.0):
    """Writes the page, one file that loads nothing else.

    live: True or False to write the data also beside the page, as report_data.js. While it is True, an open page reads
        that file every poll_seconds.

    Raises UserError without plotly, or if a file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("--html draws with plotly: `pip install plotly` or `pip install -r requirements.txt`") from None
    templates, data_file = Path(__file__).parent, page.with_name(f"{page.stem}_data.js")
    with explain_os_errors(templates, "read"):
        html, script = (Path(templates, f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "js"))
    numbers = page_data(runs, out_dir, page)
    if live:
        numbers["live"] = {"file": data_file.name, "seconds": poll_seconds}
    data = json.dumps(for_json(numbers), allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no text of a run may open or close a script element
    plotly = get_plotlyjs().replace("</script", "<\\/script")
    html = html.replace("/* SCRIPT */", script).replace("/* PLOTLY */", plotly)
    make_folder(page.parent)
    write_text(page, html.replace("/* NUMBERS */", data))
    if live is not None:
        write_text(data_file, f"refresh({data});\n")


def page_data(runs, out_dir, page) -> dict:
    """The data of report.html. `page` is its future path, from which the links to the logs start."""
    assign_styles(runs)
    entries = []
    for run, cells, group in zip(runs, table_rows(runs)[1:], group_seeds(runs)):
        folder = Path(out_dir) / run["name"]
        files = [name for name in ("run.log", "metrics.jsonl", "config.json") if (folder / name).exists()]
        samples = get_columns(run, "sample/text")[0]
        dashes = run["style"]["linestyle"]
        entries.append({
            "name": run["name"],
            "group": group,
            "cells": cells[1:],
            "values": table_values(run),
            "files": [(name, quote(Path(os.path.relpath(folder / name, page.parent)).as_posix())) for name in files],
            "colour": run["style"]["color"],
            "dash": ",".join(f"{length}px" for length in dashes[1]) if dashes != "-" else "solid",
            "parts": group_curves(run, max(60, min(400, MAX_POINTS // len(runs)))),
            "compressors": {name: get_final_row(run["rows"], key).get(key) for key, name in COMPRESSORS.items()},
            "load": expert_loads(run, MAX_LOADS // len(runs)),
            "coactivation": read_coactivation(folder),
            "how_to_get_routes": how_to_get_routes(folder, run["config"]),
            "sample": samples[-1] if samples else None,
        })
    logged = dict.fromkeys(key for entry in entries for part in entry["parts"] for key in part["y"])
    norms = {key: f"{title}, {key.removeprefix(prefix)}" for prefix, title in NORMS.items()
             for key in sorted(logged) if key.startswith(prefix)}
    location, now = Path(out_dir).resolve().name, time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "about": f"{len(runs)} run{'s' * (len(runs) > 1)} below {location}/, {now}",
        "columns": [(title, template) for title, template, *_ in TABLE] + [(key, "{:,.0f}") for key in COUNTS],
        "runs": entries,
        "differences": compare_settings(runs) if len(runs) > 1 else [],
        "curves": [(key, title) for key, title in CURVES.items() if key in logged],
        "norms": list(norms.items()),
        "others": [(key, key) for key in logged if key not in (*CURVES, *norms, *COMPRESSORS)],
        "written": time.time(),
        "live": None,
    }


COUNTS = {"parameters": "total", "active": "active"}  # title of a column -> its key in the configuration


def table_values(run) -> list[float | None]:
    """The numbers in the cells of the run's row, to sort by and to average; None where there is none."""
    columns = [(choose, get_columns(run, key)[0]) for _, _, choose, key in TABLE]
    parameters = run["config"].get("parameters") or {}
    counts = [parameters.get(key) for key in COUNTS.values()]
    return [choose(values) if values else None for choose, values in columns] + counts


def group_seeds(runs) -> list[int]:
    """For each run, the index of the first run with the same settings but for the seed, names and paths."""
    first, groups = {}, []
    for i, run in enumerate(runs):
        settings = _flatten_settings(run["config"])
        kept = {name: Path(str(value)).name if name.endswith("data") else value for name, value in settings.items()
                if name.rpartition(".")[2] not in ("seed", "experiment_name", "out_dir", "matmul_flops_per_second")}
        groups.append(first.setdefault(json.dumps(kept, sort_keys=True, default=str) if kept else i, i))
    return groups


def group_curves(run, bins: int) -> list[dict]:
    """[{"x": axis -> numbers, "y": key -> numbers}, ...]: metrics of the same rows share their x values.

    Curves with more than `bins` points are averaged over groups of rows.
    """
    is_number = lambda value: isinstance(value, (int, float))
    keys = dict.fromkeys(key for row in run["rows"] for key, value in row.items() if is_number(value))
    keys_of_rows = {}
    for key in keys:
        if key not in AXES.values():
            rows = tuple(i for i, row in enumerate(run["rows"]) if is_number(row.get(key)))
            keys_of_rows.setdefault(rows, []).append(key)

    def binned(rows, key):
        means = bin_means([run["rows"][i][key] for i in rows], bins)
        return [float(f"{value:.5g}") for value in means]  # a screen shows no more digits

    groups = []
    for rows, keys in keys_of_rows.items():
        axes = {axis: key for axis, key in AXES.items() if all(run["rows"][i].get(key) is not None for i in rows)}
        groups.append({"x": {axis: binned(rows, key) for axis, key in axes.items()},
                       "y": {key: binned(rows, key) for key in keys}})
    return groups


def expert_loads(run, max_loads: int) -> dict | None:
    """{"step": S steps, "share": S x layers x experts}, at most max_loads numbers; None for a model without experts."""
    import numpy as np

    steps, load = get_columns({"rows": [row for row in run["rows"] if row.get("moe/load")]}, "step", "moe/load")
    if not load:
        return None
    share_SLE = bin_means(load, max(2, max_loads // np.array(load[0]).size))
    last_steps = [int(group[-1]) for group in np.array_split(np.array(steps), len(share_SLE))]
    return {"step": last_steps, "share": share_SLE.round(4).tolist()}


def read_coactivation(run_folder) -> list | None:
    """Share of tokens routed to each pair of experts, layers x experts x experts; None for a run without routes.

    A damaged file of routes is named in a note and counts as none."""
    files = list_routes_files(run_folder)
    try:
        return analyse_file(files[0]).get("coactivation") if files else None
    except UserError as error:
        say(f"note: no routes of {run_folder.name}, as {error}")
        return None


def compare_settings(runs) -> list[list[str]]:
    """[setting, its value in each run] for the settings that differ between runs."""
    settings = [_flatten_settings(run["config"]) for run in runs]
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    rows = [[name, *(str(of_run.get(name, "-")) for of_run in settings)] for name in names]
    hidden = ("experiment_name", "matmul_flops_per_second")
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in hidden]


def _flatten_settings(config: dict, prefix="") -> dict:
    """A nested configuration as one dict with dotted names, nested parts last."""
    flat = {prefix + name: value for name, value in config.items() if not isinstance(value, dict)}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten_settings(value, f"{prefix}{name}.")
    return flat


# -----------------------------------------------------------------------------
# Following runs that other processes write

def follow_report(list_folders, out_dir, page, poll_seconds: float = 5.0):
    """Writes the page anew whenever a run has new rows, until every run has ended or its process is gone.

    list_folders() returns the runs' folders, new ones included. An open page reloads its data and keeps the choices.
    """
    sizes_before, readers, runs, noted = None, {}, [], set()
    try:
        while True:
            folders = list_folders()
            locked = {folder.name for folder in folders if is_locked(folder)}  # before the rows are read
            sizes = [(folder, data_size(folder)) for folder in folders]
            changed = sizes != sizes_before
            if changed:
                readers |= {folder: RunReader(folder) for folder in folders if folder not in readers}
                runs = keep_going(folders, lambda folder: readers[folder].read(), noted)
            live = any(run["name"] in locked and not has_end(run["rows"]) for run in runs)
            if changed or not live:
                write_report(runs, out_dir, page, live, poll_seconds)
            if not live:
                return
            sizes_before = sizes
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        write_report(read_runs(list_folders()), out_dir, page, live=False)
        raise


def has_end(rows) -> bool:
    """Whether the rows are those of a run that has reached its end; a resumed run may have rows after it."""
    return any(row.get("event") == "end" for row in rows)


def data_size(folder) -> int:
    """Bytes of the files that read_run() reads."""
    return sum(path.stat().st_size for path in (folder / "metrics.jsonl", folder / "config.json") if path.exists())



BARS = "▁▂▃▄▅▆▇█"
STATUS_METRICS = [  # title, format, key
    ("training loss", "{:.4f}", "train/loss"),
    ("bits per byte", "{:.4f}", "val/bpb"),
    ("tokens/s", "{:,.0f}", "train/tok_per_sec"),
    ("busiest expert / mean", "{:.2f}", "moe/load_max_over_mean"),
]


def follow(folder, poll_seconds: float = 1.0, patience: float = 10.0):
    """Prints the status of a run until it ends or its process is gone.

    On a terminal the status is redrawn in place; elsewhere a block is printed after each evaluation.
    patience: seconds without new rows until the folder's lock is checked for a writing process.
    """
    terminal, reader, status = sys.stdout.isatty(), RunReader(folder), Status()
    size_before, height, evaluations_before, changed = None, 0, 0, time.monotonic()
    while True:
        size = data_size(folder)
        if size != size_before:
            run, size_before, changed = reader.read(), size, time.monotonic()
            lines, evaluations = status.update(run), len(status.columns["val/loss"])
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                clear = f"\x1b[{height}A\x1b[J" if height else ""
                print(clear + "\n".join(line[:width] for line in lines), flush=True)
                height = len(lines)
            elif status.ended or evaluations != evaluations_before:
                print("\n".join(lines), flush=True)
                evaluations_before = evaluations
            if status.ended:
                return
        elif time.monotonic() - changed > patience:
            if not is_locked(folder):
                print(f"no process is writing {folder}: the run was stopped; continue it with --resume")
                return
            changed = time.monotonic()
        time.sleep(poll_seconds)


def format_status(run) -> list[str]:
    """The progress of a run in a few lines: steps, time left, and a sparkline per metric."""
    return Status().update(run)


class Status:
    """The progress of a run whose rows grow: the values of its metrics so far, and whether it has ended."""

    def __init__(self):
        self.rows, self.seen = None, 0  # the list that was read last, and how many of its rows
        self.columns, self.ended = {}, False

    def update(self, run) -> list[str]:
        """The lines of format_status(); looks only at rows that are new in the run's list."""
        if run["rows"] is not self.rows:
            self.rows, self.seen, self.ended = run["rows"], 0, False
            self.columns = {key: [] for key in ("step", "train_time", "val/loss", *(key for *_, key in STATUS_METRICS))}
        new = {"rows": self.rows[self.seen :]}
        self.seen, self.ended = len(self.rows), self.ended or has_end(new["rows"])
        for key, values in self.columns.items():
            values += get_columns(new, key)[0]
        total = run["config"].get("hyperparameters", {}).get("num_iterations", 0)
        step, seconds = (max(self.columns[key], default=0) for key in ("step", "train_time"))
        lines = [f"{run['name']}  step {step:,}/{total:,}  {format_duration(seconds)} of training"]
        if 0 < step < total:
            lines[0] += f", about {format_duration((total - step) * seconds / step)} left"
        for title, template, key in STATUS_METRICS:
            if values := self.columns[key]:
                lines.append(f"  {title:<22}{template.format(values[-1]):>10}  {sparkline(values)}")
        return lines


def sparkline(values, width: int = 40) -> str:
    """The finite values as a curve of block characters, at most `width` of them."""
    points = bin_means([value for value in values if math.isfinite(value)] or [0.0], width).tolist()
    low, span = min(points), (max(points) - min(points)) or 1
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in points)


def format_duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def is_locked(folder) -> bool:
    """Whether a process holds the lock of the run's folder; True if the file system cannot tell."""
    try:
        import fcntl

        with open(folder / "run.log") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared lock works on files opened for reading
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return True
    return False


# -----------------------------------------------------------------------------
# Model card

def make_card_section(run_folder) -> tuple[str, dict[str, bytes]]:
    """The section of a Hub model card about the run: markdown, and its pictures as {file name: PNG bytes}."""
    run = read_run(run_folder)
    titles, cells = table_rows([run])
    table = [f"| {title} | {cell} |" for title, cell in zip(titles, cells)]
    text = "\n".join(["", "## The run", "", "| | |", "|---|---|", *table, ""])
    if not get_columns(run, "val/loss")[0]:
        return text, {}
    run["style"], picture = {"color": COLOURS[0]}, io.BytesIO()
    with open_figure(picture) as figure:
        plot_val_loss(figure, [run])
    settings = json.dumps(run["config"].get("hyperparameters"))
    optimizer = run["config"].get("optimizer")
    text += f"\n![Validation over the run](val_loss.png)\n\nTrained by {optimizer} with `{settings}`\n"
    return text, {"val_loss.png": picture.getvalue()}
