"""The log of a run, and what is read from it afterwards.

    python logger.py                                # a table and plots of every run below logs/
    python logger.py --experiment_name muon adamw   # of these two, in this order
    python logger.py --html                         # one page of them all with curves and maps to play with, logs/plots/report.html
    python logger.py --experiment_name muon --follow   # how a run that is on its way is doing
    python logger.py --records                      # the history of each track below records/, and its picture
    python logger.py --experiment_name muon --routes   # where its tokens went: after --routes of model.py or --routes_tokens

A run owns one folder, logs/<experiment_name>/, which alone says what was run, on what, and what came out:

    run.log         the source of every file that made the run, the environment, then the printed lines
    metrics.jsonl   one JSON object per event, flat slash keys
    config.json     the resolved configuration

The file reads top to bottom: Run (writing), the dashboards it can feed, PhaseTimer (where the seconds of a step go), reading, the table,
the plots, where tokens went, the page (with report.html), following a run, the records and their statistics, the script. Importing it
imports nothing but the standard library.
"""

import argparse
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
import zlib
from contextlib import contextmanager
from fnmatch import filter as matching
from operator import itemgetter
from pathlib import Path
from statistics import mean, median, stdev
from urllib.parse import quote

SEPARATOR = "=" * 100


class RunError(RuntimeError):
    """A mistake the user can mend: one sentence that says what is wrong, where, and what to do."""


# -----------------------------------------------------------------------------
# Run

class Run:
    """The folder `out_dir/experiment_name`, open for writing.

    config: what config.json holds. sources: the files whose text goes into run.log. resume_step: None for a new run,
    else the step of the checkpoint the run continues from; later rows are dropped. active: False on every rank but the
    first, where all methods do nothing and no file is touched. sinks: names in SINKS, dashboards that get the same rows.

    All methods raise RunError where a file cannot be written; the constructor also if the experiment exists and is not
    resumed, if another process is writing it, if its metrics.jsonl is damaged, or if a sink's package is missing.
    """

    def __init__(self, out_dir, experiment_name: str, *, config: dict, sources: list[Path],
                 resume_step: int | None = None, active: bool = True, sinks=()):
        self.path = Path(out_dir) / experiment_name
        self.active = active
        self._queue = []  # rows that are not on disk yet
        self._unseen = []  # rows on disk that no flush() has returned yet
        self._waiting = False  # whether a value in the queue still sits on a device
        self._lock = None
        self._sinks = []
        if not active:
            return
        if experiment_name != self.path.name or experiment_name in ("", "..", "plots"):
            raise RunError(f"--experiment_name {experiment_name!r} cannot name a run's folder below {out_dir};"
                           " choose a plain name such as muon ('plots' is where logger.py draws)")
        modules = {name: sink_module(name) for name in sinks}
        if resume_step is None:
            refuse_existing(self.path)
        with _naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
        metrics = self.path / "metrics.jsonl"
        if resume_step is not None and metrics.exists():
            lines, rows = _read_rows(metrics)
            kept = [line + "\n" for line, row in zip(lines, rows) if (row.get("step") or 0) <= resume_step]
            _write_atomically(metrics, "".join(kept))
        self._write_header(sources, resume_step)
        _write_atomically(self.path / "config.json", json.dumps(_map(_finite, config), indent=2, default=str) + "\n")
        self._sinks = [SINKS[name][0](module, self.path, config, resume_step) for name, module in modules.items()]

    def _write_header(self, sources, resume_step):
        log = self.path / "run.log"
        with _naming(log):
            old = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        text = "\n" if old and not old.endswith("\n") else ""  # a killed run may have left half a line
        for source in map(Path, sources):
            with _naming(source, "read"):
                body = source.read_text(encoding="utf-8").rstrip("\n") + "\n"
            if body not in old:  # a resumed run repeats only the files that changed since
                text += f"{'-' * 100}\n{source.name}\n{'-' * 100}\n{body}"
        text += f"{SEPARATOR}\n{_environment(sources)}\n{SEPARATOR}\n"
        if resume_step is not None:
            text += f"the run continues from step {max(0, resume_step)}\n"
        _append(log, text)

    def print(self, line):
        """Writes a line to run.log and to stdout."""
        if not self.active:
            return
        _append(self.path / "run.log", f"{line}\n")
        bars = sys.modules.get("tqdm")  # only where someone imported tqdm can there be a progress bar to write around
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        (bars.tqdm.write if bars else print)(str(line).encode(encoding, "replace").decode(encoding))  # a sample may hold what a terminal cannot show
        sys.stdout.flush()

    def log(self, row: dict):
        """Queues a row of metrics.jsonl: numbers, text, None, lists, and tensors of any shape on any device.

        The values are those of this moment, whatever happens to the tensors later. Without a value on a device the row
        is on disk when this returns; with one it waits for flush(), so that the training step never waits for the GPU.
        """
        if not self.active:
            return
        self._queue.append(_map(self._snapshot, row))
        if not self._waiting:
            self._write_queue()

    def _snapshot(self, value):
        if str(getattr(value, "device", "cpu")) == "cpu":
            return _to_host(value)
        self._waiting = True
        # The clone is queued on the device like any kernel: nobody waits.
        return value if isinstance(value, _EventSeconds) else value.detach().clone()

    def flush(self) -> list[dict]:
        """Brings every queued value to the host and writes the rows.

        Returns the rows written since the last flush(), those that log() wrote at once included, as plain Python
        values in which NaN and infinity are still themselves (in the file they are null).
        """
        self._write_queue()
        rows, self._unseen = self._unseen, []
        return rows

    def _write_queue(self):
        rows = [_map(_to_host, row) for row in self._queue]
        self._queue, self._waiting = [], False  # emptied first: after a failed write no row may be written twice
        if rows:
            lines = [json.dumps(_map(_finite, row), allow_nan=False) + "\n" for row in rows]
            _append(self.path / "metrics.jsonl", "".join(lines))
            self._unseen += rows
            for sink in self._sinks:
                for row in rows:
                    sink.write(row)

    def sync(self):
        """Waits until what has been written is on the disk itself, where also a failing system leaves it."""
        for name in ("run.log", "metrics.jsonl"):
            path = self.path / name
            if self.active and path.exists():
                with _naming(path), open(path, "rb") as file:
                    os.fsync(file.fileno())

    def close(self):
        """Writes what is still queued and gives the folder free. May be called more than once."""
        self._write_queue()
        while self._sinks:
            self._sinks.pop().close()
        if self._lock:
            self._lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def refuse_existing(folder):
    """Raises RunError if the folder holds a run, started or finished."""
    if is_run(folder):
        raise RunError(f"{folder} already holds a run; continue it with --resume or choose another --experiment_name")


def _map(leaf, value):
    """`value` with `leaf` applied to everything inside its nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _map(leaf, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(leaf, item) for item in value]
    return leaf(value)


def _to_host(value):
    return value.tolist() if hasattr(value, "tolist") else value  # torch and numpy; a 0-d array becomes a number


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _naming(path, verb="write"):
    """Turns an OSError into a RunError that names the file."""
    try:
        yield
    except OSError as error:
        mend = {"write": "make room or mend the permissions there, or choose another --out_dir", "read": "restore it or mend its permissions"}[verb]
        raise RunError(f"cannot {verb} {path}: {error.strerror or error}; {mend}") from error


def _lock(folder):
    """An open file whose lock says that this process writes the folder. The kernel takes it back, also after kill -9."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(folder / "run.log", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"another process is writing {folder}; stop it or let it end, or choose another --experiment_name") from None
    except OSError:
        pass  # a file system without locks: nothing can be told there
    return file


def _append(path, text):
    # Opened for each call: nothing stays in a buffer of ours for kill -9 to lose.
    with _naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def _write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    with _naming(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def _environment(sources):
    """What a reader needs to judge the run's timings and to repeat it, one fact per line."""
    import torch

    on_cuda = torch.cuda.is_available()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    folder = str(Path([*sources, "."][0]).resolve().parent)
    facts = {
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": commit_of(folder),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else "not available",
        "gpu": f"{torch.cuda.get_device_name()}\n{_output_of('nvidia-smi')}" if on_cuda else "none",
    }
    return "\n".join(f"{name:<10}{fact}" for name, fact in facts.items())


def commit_of(folder) -> str:
    """The commit that is checked out there, with "-dirty" where files differ from it."""
    return _output_of("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output_of(*command):
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available ({error})"
    return result.stdout.strip() if result.returncode == 0 else "not available"


# -----------------------------------------------------------------------------
# Dashboards: each gets every row of metrics.jsonl under the same keys, numbers as curves, lists of numbers as histograms, text as text

class TensorBoard:
    """Event files in the run's folder, in tensorboard/. A run that goes on drops what it had written after its checkpoint."""

    def __init__(self, tensorboard, folder, config: dict, resume_step: int | None):
        self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=None if resume_step is None else max(0, resume_step) + 1)
        self.writer.add_text("config", f"```json\n{json.dumps(_map(_finite, config), indent=1, default=str)}\n```", resume_step or 0)

    def write(self, row: dict):
        step = row.get("step")
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
            elif isinstance(value, str):
                self.writer.add_text(key, value, step)
            elif numbers := _flat(value):
                import numpy as np

                self.writer.add_histogram(key, np.array(numbers, float), step)

    def close(self):
        self.writer.close()


class WandB:
    """A run at Weights & Biases, in the project WANDB_PROJECT (default modded-nanomoe), that --resume goes on with.
    With WANDB_MODE=offline it stays in the folder, for `wandb sync`."""

    def __init__(self, wandb, folder, config: dict, resume_step: int | None):
        self.wandb = wandb
        name = folder / "wandb_id"
        if resume_step is None or not name.exists():
            _write_atomically(name, uuid.uuid4().hex)
        with _naming(name, "read"):
            identity = name.read_text(encoding="utf-8").strip()
        project = os.environ.get("WANDB_PROJECT", "modded-nanomoe")
        self.run = self.wandb.init(project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=_map(_finite, config))

    def write(self, row: dict):
        kept = {key: value if isinstance(value, (int, float, str)) else self.wandb.Histogram(_flat(value))
                for key, value in row.items() if isinstance(value, (int, float, str)) or _flat(value)}
        self.run.log(kept, step=row.get("step"))

    def close(self):
        self.run.finish()


SINKS = {"tensorboard": (TensorBoard, "torch.utils.tensorboard"), "wandb": (WandB, "wandb")}  # package and flag -> class, module


def sink_module(name: str):
    """Imports what a dashboard needs. Raises RunError where it is not installed."""
    try:
        return importlib.import_module(SINKS[name][1])
    except ImportError as error:
        raise RunError(f"--{name} needs a package that is not there ({error}): `pip install {name}`, or leave the flag out") from None


def _flat(value) -> list:
    """The numbers in nested lists, without NaN; [] for anything else."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in (_flat(item) if isinstance(item, (list, tuple)) else [item]) if _finite(number) is not None]
    return []


# -----------------------------------------------------------------------------
# PhaseTimer

class PhaseTimer:
    """Seconds per phase of a step: start(), then mark(name) at the end of each phase, then row().

    A name marked several times in a step (forward and backward of each micro-batch) adds up. On CUDA the times are
    those of the GPU's own queue, and row() holds promises that Run.flush() keeps: no call here waits for the GPU.

    place: ("step 7, forward", time.monotonic() when that began), for a thread that watches whether there is progress.
    """

    def __init__(self, device_type: str):
        on_cuda = device_type == "cuda"
        self._now = _event if on_cuda else time.perf_counter
        self._sum = _EventSeconds if on_cuda else lambda spans: sum(end - begin for begin, end in spans)
        self.start()

    def start(self, step: int = 0):
        """Begins a step and forgets the one before."""
        self._spans = {}  # name -> [(begin, end), ...]
        self._last = self._now()
        self._step = step
        self.begin("start")

    def begin(self, name: str):
        """Says what begins now; mark() times it."""
        self.place = (f"step {self._step}, {name}", time.monotonic())

    def mark(self, name: str):
        """Ends the phase that began at the last mark() or start(), and calls it `name`."""
        begin, self._last = self._last, self._now()
        self._spans.setdefault(name, []).append((begin, self._last))

    def row(self) -> dict:
        """{"time/<name>": seconds} of this step so far, in order of first appearance."""
        return {f"time/{name}": self._sum(list(spans)) for name, spans in self._spans.items()}


def _event():
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _EventSeconds:
    """A sum of spans between CUDA events that is not asked for before somebody wants the number."""

    device = "cuda"

    def __init__(self, spans):
        self._spans = spans

    def item(self):
        self._spans[-1][1].synchronize()  # events of one stream end in order: the last is the only one to wait for
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000

    tolist = item  # what Run asks of a tensor


# -----------------------------------------------------------------------------
# Reading

def read_run(folder) -> dict:
    """{"name": text, "config": dict, "rows": list of dicts} of a run's folder.

    A run that has not got that far has an empty config or no rows; a last line torn by a kill is left out.
    Raises RunError if there is no run, and for any other line that is not a JSON object.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise RunError(f"{folder} holds no run; check --out_dir and --experiment_name")
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    settings = read_json(config) if config.exists() else {}
    return {"name": folder.name, "config": settings, "rows": _read_rows(metrics)[1] if metrics.exists() else []}


def read_json(path) -> dict:
    """Raises RunError where there is no JSON object to read."""
    try:
        with _naming(path, "read"):
            found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {str(found)[:20]}")
        return found
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is no JSON object ({error}); restore it or delete it") from error


def is_run(folder):
    return (folder / "run.log").exists() or (folder / "metrics.jsonl").exists()


def has_ended(folder) -> bool:
    """Whether the run of a folder has been through to its end."""
    path = folder / "metrics.jsonl"
    return path.exists() and any(row.get("event") == "end" for row in _read_rows(path)[1])


def _read_rows(path):
    """The lines of a metrics.jsonl and the objects they hold, without a torn last line."""
    with _naming(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None  # judged below: what is not JSON is no object either
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise RunError(f"{path} line {number} is not a JSON object: {line[:40]!r}; delete that line")
    return lines[:len(rows)], rows


def _series(run, *keys):
    """One list per key: the values over the rows that have all of the keys."""
    rows = [row for row in run["rows"] if all(row.get(key) is not None for key in keys)]
    return [[row[key] for row in rows] for key in keys]


# -----------------------------------------------------------------------------
# Table

last = itemgetter(-1)
TABLE = [  # title, format, which of the values, their key in the rows; losses in nats per token
    ("steps", "{:,.0f}", max, "step"),
    ("val loss", "{:.4f}", last, "val/loss"),
    ("best", "{:.4f}", min, "val/loss"),
    ("bits/byte", "{:.4f}", last, "val/bpb"),
    ("seconds", "{:,.1f}", last, "train_time"),
    ("tokens/s", "{:,.0f}", median, "train/tok_per_sec"),
    ("MFU", "{:.2%}", median, "train/mfu"),
    ("load max/mean", "{:.2f}", last, "moe/load_max_over_mean"),
]


def chosen(run, text: str, choose, key: str) -> str:
    """One of the values that a run logged under a key; '-' if it logged none, nan if it ended with one that is not finite."""
    values = _series(run, key)[0]
    if choose is last and final_row(run["rows"], key).get(key, 0) is None:
        return "nan"
    return text.format(choose(values)) if values else "-"


def table_rows(runs) -> list[list[str]]:
    """A line of titles, then one for each run; '-' for what a run did not log."""
    lines = [["run", *(title for title, *_ in TABLE), "parameters", "active"]]
    for run in runs:
        parameters = run["config"].get("parameters") or {}
        cells = [chosen(run, *how) for _, *how in TABLE]
        cells += [f"{parameters[key]:,}" if parameters.get(key) else "-" for key in ("total", "active")]
        lines.append([run["name"], *cells])
    return lines


def table(runs) -> str:
    """table_rows() for a terminal."""
    lines = table_rows(runs)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))])
                     for name, *cells in lines)


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


# -----------------------------------------------------------------------------
# Plots: each fills a Figure from runs that logged what it shows

COLOURS = "#1f6feb #e5532d #1a9850 #8e44ad #e6a700 #17a2b8 #d6336c #6b4f3a".split()
PHASE_COLOURS = "#c9ced6 #7fb3ff #1f6feb #e5532d #f2b134 #1a9850 #8e44ad".split()
THEME = {
    "savefig.dpi": 130, "font.size": 9, "axes.labelsize": 11, "legend.fontsize": 10, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e7eb", "lines.linewidth": 1.8, "lines.markersize": 3,
}


def _binned(values, bins=300):
    """`values` averaged over at most `bins` consecutive groups: more no screen shows."""
    import numpy as np

    return np.stack([group.mean(axis=0) for group in np.array_split(np.array(values, float), min(bins, len(values)))])


def _curve(ax, run, xs, ys, label):
    ax.plot(xs, ys, **run["style"], label=label, marker="o" if len(xs) <= 30 else None)  # one point alone has no line


def plot_val_loss(figure, runs):
    """Validation against steps, seconds and active FLOPs; in bits per byte where every run has them."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    in_bits = all(_series(run, "val/bpb")[0] for run in runs)
    key, label = ("val/bpb", "validation bits per byte") if in_bits else ("val/loss", "validation loss (nats/token)")
    figure.set_size_inches(13.5, 4.6)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, x, title in zip(axes, ("step", "train_time", "train/flops"), ("steps", "training seconds", "active FLOPs")):
        ends = []
        for run in runs:
            xs, ys = _series(run, x, key)
            # Named in the first panel only: the legend below all three gathers every name it finds.
            _curve(ax, run, xs, ys, f"{run['name']}  {chosen(run, '{:.4f}', last, key)}" if ax is axes[0] else None)
            ends += xs[-1:]
        if ends and 0 < 10 * min(ends) < max(ends):  # on a linear axis the short runs would be a wall at the left
            ax.set_xscale("log")
        ax.set_xlabel(title if ends else f"{title} (not logged)")
    values = [value for run in runs for value in _series(run, key)[0]]
    if max(values) > 2 * min(values) > 0:  # the first losses would flatten the end, which is what is compared
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(MaxNLocator(9))
        axes[0].yaxis.set_major_formatter(ScalarFormatter())
        axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=min(5, len(runs)))


def plot_step_time(figure, runs):
    """One bar per run: the median milliseconds of each phase of a step."""
    figure.set_size_inches(9, 1.7 + 0.5 * len(runs))
    ax = figure.subplots()
    ends = [0.0] * len(runs)
    phases = list(dict.fromkeys(key for run in runs for row in run["rows"] for key in matching(row, "time/*")))
    for i, phase in enumerate(phases):
        widths = [1000 * median(_series(run, phase)[0] or [0]) for run in runs]
        ax.barh(range(len(runs)), widths, left=ends, height=0.62, edgecolor="white", linewidth=0.8,
                color=PHASE_COLOURS[i % len(PHASE_COLOURS)], label=phase.removeprefix("time/"))
        ends = [end + width for end, width in zip(ends, widths)]
    for i, end in enumerate(ends):
        ax.text(end, i, f"  {end:,.1f} ms", va="center")
    ax.set_yticks(range(len(runs)), [run["name"] for run in runs], fontsize=10)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.12)
    ax.set_xlabel("milliseconds per step (median of each phase)")
    figure.legend(loc="outside lower center", ncols=len(phases))


def plot_router_entropy(figure, runs):
    """Entropy of the routers over training, divided by log E: 1 is a router that prefers no expert."""
    figure.set_size_inches(8, 4.6)
    ax = figure.subplots()
    for run in runs:
        steps, entropy = _series(run, "step", "moe/router_entropy")
        _curve(ax, run, _binned(steps), _binned(entropy), run["name"])
    ax.axhline(1, color="#8a929c", linewidth=1, linestyle=(0, (4, 3)), label="uniform")
    ax.set_xlabel("steps")
    ax.set_ylabel("router entropy / log(experts)")
    figure.legend(loc="outside lower center", ncols=min(5, len(runs) + 1))


def plot_expert_load(figure, runs):
    """One run: for each MoE layer a map of experts x steps, coloured by the expert's share of the assignments."""
    import numpy as np

    steps, load = _series(runs[0], "step", "moe/load")
    load_SLE = _binned(load)
    edges = [group[0] for group in np.array_split(np.array(steps), len(load_SLE))] + [steps[-1] + 1]
    layers, experts = load_SLE.shape[1:]
    columns, uniform = min(4, layers), 1 / experts
    rows = math.ceil(layers / columns)
    figure.set_size_inches(1.6 + 3.2 * columns, 1.2 + 2 * rows)
    for layer in range(layers):
        ax = figure.add_subplot(rows, columns, layer + 1)
        # Equal distance for twice and half the fair share; the floor keeps a dead expert on the scale.
        image = ax.pcolormesh(edges, np.arange(experts + 1) - 0.5, np.maximum(load_SLE[:, layer].T, 1e-9),
                              norm="log", vmin=uniform / 4, vmax=uniform * 4, cmap="RdBu_r")
        ax.grid(visible=False)
        ax.set_title(f"MoE layer {layer}", fontsize=10, loc="left")
        ax.set_yticks(range(0, experts, max(1, experts // 8)))
        ax.invert_yaxis()
    shares = [uniform * factor for factor in (1 / 4, 1 / 2, 1, 2, 4)]
    bar = figure.colorbar(image, ax=figure.axes, extend="both", aspect=30)
    bar.set_ticks(shares, labels=[f"{100 * share:.3g}%" for share in shares])
    bar.set_label("share of assignments (white: even)", fontsize=9)
    bar.minorticks_off()
    figure.suptitle(runs[0]["name"])
    figure.supxlabel("steps")
    figure.supylabel("expert")


def domains_of(run) -> list[str]:
    """The domains that a run was evaluated on, in their order; [] if its data was no mixture."""
    keys = dict.fromkeys(key for row in run["rows"] for key in matching(row, "val/*/loss"))
    return [key.split("/")[1] for key in keys]


def plot_domain_loss(figure, runs):
    """One panel for each domain, validation against steps; in bits per byte where every run has them."""
    names = list(dict.fromkeys(name for run in runs for name in domains_of(run)))
    in_bits = all(_series(run, f"val/{name}/bpb")[0] for run in runs for name in domains_of(run))
    columns = min(3, len(names))
    figure.set_size_inches(4 * columns, 0.6 + 2.8 * math.ceil(len(names) / columns))
    for i, name in enumerate(names):
        ax = figure.add_subplot(math.ceil(len(names) / columns), columns, i + 1)
        for run in runs:
            xs, ys = _series(run, "step", f"val/{name}/{'bpb' if in_bits else 'loss'}")
            _curve(ax, run, xs[1:] or xs, ys[1:] or ys, f"{run['name']}  {ys[-1]:.3f}" if ys else None)  # what the first weights say is no news
        ax.set_title(name, fontsize=10, loc="left")
        ax.legend(fontsize=8)
    figure.supxlabel("steps")
    figure.supylabel("validation bits per byte" if in_bits else "validation loss (nats/token)")


def plot_domains(figure, runs):
    """One run: for each MoE layer the experts that each domain's tokens met in the last evaluation, and how much a choice told over the steps."""
    import numpy as np

    (run,), names = runs, domains_of(runs[0])
    steps, loads, bits = _series(run, "step", "moe/domain_load", "moe/domain_information")
    load_DLE = np.array(loads[-1])
    panels = load_DLE.shape[1] + 1
    columns = min(3, panels)
    figure.set_size_inches(4 * columns, 0.6 + 2.8 * math.ceil(panels / columns))
    for layer in range(panels - 1):
        ax = figure.add_subplot(math.ceil(panels / columns), columns, layer + 1)
        _matrix(figure, ax, load_DLE[:, layer], f"MoE layer {layer}: share of tokens", "expert", "", vmin=0, vmax=1)
        ax.set_yticks(range(len(names)), names)
    ax = figure.add_subplot(math.ceil(panels / columns), columns, panels)
    ax.plot(steps, bits, "o-", color=COLOURS[0])
    ax.set(xlabel="step", ylabel="bits of the domain told", ylim=(0, None))
    figure.suptitle(run["name"])


@contextmanager
def drawing(path):
    """An empty Figure in our style, which is saved at `path` in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with _naming(path), matplotlib.rc_context(THEME):
        figure = Figure(layout="constrained")
        yield figure
        figure.savefig(path)


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


def style(runs):
    """A run looks the same in every picture."""
    for i, run in enumerate(runs):
        run["style"] = {"color": COLOURS[i % 8], "linestyle": list(DASHES)[i // 8 % 4]}


def write_plots(runs, folder):
    """Writes the PNGs into `folder` and prints their paths, and which runs a picture leaves out because of what."""
    plots = [("val_loss", "val/loss", plot_val_loss, runs), ("step_time", "time/*", plot_step_time, runs),
             ("router_entropy", "moe/router_entropy", plot_router_entropy, runs)]
    plots += [(f"{run['name']}_expert_load", "moe/load", plot_expert_load, [run]) for run in runs]
    mixed = [run for run in runs if domains_of(run)]
    plots += [("domain_loss", "val/*/loss", plot_domain_loss, mixed)] if mixed else []
    plots += [(f"{run['name']}_domains", "moe/domain_load", plot_domains, [run]) for run in mixed]
    style(runs)
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, pattern, plot, candidates in plots:
        path = folder / f"{name}.png"
        shown = []
        for run in candidates:
            if any(row[key] not in (None, []) for row in run["rows"] for key in matching(row, pattern)):
                shown.append(run)
            else:
                reason = f"no {pattern} logged" if run["rows"] else "no rows yet"
                print(f"{path.name} leaves out {run['name']}: {reason}")
        if shown:
            with drawing(path) as figure:
                plot(figure, shown)
            print(path)


# -----------------------------------------------------------------------------
# Where tokens went: what `python model.py --routes` collected, as numbers and pictures. S steps, N tokens, n members of a pool


def use_by_step(choice_SN, n: int):
    """(n, S): the share of tokens that each step sends to each member. Columns sum to 1, less the tokens that had left (-1)."""
    import numpy as np

    return np.stack([np.bincount(step[step >= 0], minlength=n) / len(step) for step in choice_SN], 1)


def transitions(choice_SN, n: int):
    """(n, n): of the tokens that were at i and went on, the share that the next step sends to j. Rows sum to 1, or are nan where nobody was."""
    import numpy as np

    counts, went_on = np.zeros((n, n)), choice_SN[1:] >= 0
    np.add.at(counts, (choice_SN[:-1][went_on], choice_SN[1:][went_on]), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def used(choice_SN, n: int):
    """(N, n): whether a token met a member at all."""
    import numpy as np

    return (choice_SN[:, :, None] == np.arange(n)).any(0)


def joint(choice_SN, n: int):
    """(n, n): the share of tokens that met both i and j; the diagonal, which says how many met i, is nan."""
    import numpy as np

    met = used(choice_SN, n).astype(float)
    both = met.T @ met / len(met)
    np.fill_diagonal(both, np.nan)
    return both


def lift(choice_SN, n: int):
    """(n, n): joint() over what it would be if meeting i and meeting j had nothing to do with each other; 1 = nothing."""
    import numpy as np

    met = used(choice_SN, n).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return joint(choice_SN, n) / np.outer(met, met)


def correlation(choice_SN, n: int):
    """(n, n): of meeting i and meeting j over the tokens; nan on the diagonal and where all or none met a member."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(used(choice_SN, n).astype(float), rowvar=False).reshape(n, n)
    np.fill_diagonal(found, np.nan)
    return found


KINDS = ("chain", "sum")  # of problems, see data.difficulty


def by_difficulty(routes, values_N, counts_N=True) -> dict[str, dict[int, float]]:
    """Kind of problem -> {operations needed: the mean of values over the answers that need so many, where counts is true}."""
    found = {}
    for kind in (kind for kind in KINDS if f"{kind}_N" in routes):
        label_N = routes[f"{kind}_N"] * counts_N
        found[kind] = {int(d): float(values_N[label_N == d].mean()) for d in sorted(set(label_N.tolist()) - {0})}
    return found


def saturation(expert_LTK, final_LTK):
    """(L,): of the experts that tokens meet now, in each routed layer, the share that they meet at the end (OLMoE, 2409.02060)."""
    return (expert_LTK[..., None] == final_LTK[..., None, :]).any(-1).mean((1, 2))


def analyse(routes, earlier=()) -> dict:
    """The numbers behind the pictures, for JSON, from the arrays of a routes file, and of `earlier` ones: (step, arrays)."""
    import numpy as np

    found = {}
    if len(earlier) > 1 and "expert_LTK" in routes:
        end = earlier[-1][1]  # a run that was resumed may have kept other tokens before
        alike = [(step, then) for step, then in earlier if np.array_equal(then["token_N"], end["token_N"])]
        found["saturation"] = {step: saturation(then["expert_LTK"], end["expert_LTK"]).tolist() for step, then in alike}
    if "layer_SN" in routes:
        choice, layers = routes["layer_SN"], int(routes["layers"])
        n = layers + int(routes["identities"])
        measures = {"use_by_step": use_by_step, "transitions": transitions, "joint": joint, "lift": lift, "correlation": correlation}
        found |= {name: measure(choice, n).tolist() for name, measure in measures.items()}
        identity_SN = choice >= layers
        found["identities_by_step"] = identity_SN.mean(1).tolist()
        found["identities_by_difficulty"] = by_difficulty(routes, identity_SN.sum(0))
    if "loops_N" in routes:
        loops = routes["loops_N"]
        found["loops"] = {int(count): float((loops == count).mean()) for count in sorted(set(loops.tolist()))}
        found["loops_by_difficulty"] = by_difficulty(routes, loops)
    if "expert_LTK" in routes:
        found["load"] = [use_by_step(layer.reshape(1, -1), int(routes["experts"]))[:, 0].tolist() for layer in routes["expert_LTK"]]
        found["coactivation"] = [joint(layer.T, int(routes["experts"])).tolist() for layer in routes["expert_LTK"]]
    if "right_N" in routes:
        asked_N = routes["right_N"] >= 0
        found |= {"accuracy": float(routes["right_N"][asked_N].mean()), "accuracy_by_difficulty": by_difficulty(routes, routes["right_N"], asked_N)}
    return found


def _matrix(figure, ax, values, title, xlabel, ylabel, **how):
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    image = ax.imshow(values, aspect="auto", **{"cmap": "viridis"} | how)
    figure.colorbar(image, ax=ax)
    ax.grid(visible=False)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=range(0, values.shape[1], max(1, values.shape[1] // 8)),
           yticks=range(0, values.shape[0], max(1, values.shape[0] // 8)))


def plot_layers(figure, routes, found):
    """The pool of layers: who is used when, after whom, with whom, and the ways of some tokens."""
    figure.set_size_inches(12, 7)
    ax = figure.subplots(2, 3)
    _matrix(figure, ax[0, 0], found["use_by_step"], "share of tokens", "step", "layer", vmin=0, vmax=1)
    _matrix(figure, ax[0, 1], found["transitions"], "from layer to layer", "next", "layer", vmin=0, vmax=1)
    _matrix(figure, ax[0, 2], found["joint"], "tokens that meet both", "layer", "layer", vmin=0, vmax=1)
    _matrix(figure, ax[1, 0], found["lift"], "lift", "layer", "layer", cmap="RdBu_r", vmin=0, vmax=2)
    _matrix(figure, ax[1, 1], found["correlation"], "correlation", "layer", "layer", cmap="RdBu_r", vmin=-1, vmax=1)
    _matrix(figure, ax[1, 2], routes["layer_SN"][:, :96], "ways of single tokens", "token", "step", cmap="tab10", vmin=0, vmax=9)
    figure.suptitle(f"layers 0 to {int(routes['layers']) - 1}, then {int(routes['identities'])} identities", fontsize=10)


def plot_loops(figure, routes, found):
    """How many loops tokens went through."""
    figure.set_size_inches(5, 3.6)
    ax = figure.subplots()
    ax.bar(list(found["loops"]), list(found["loops"].values()), color=COLOURS[0])
    ax.set(xlabel="loops", ylabel="share of tokens", xticks=list(found["loops"]))


def plot_difficulty(figure, routes, found):
    """By the operations that an answer needs: how often it is right, the loops that the token before it takes, the identities that it picks."""
    measures = {"accuracy": "share of answers that are right", "loops": "mean loops", "identities": "mean identities"}
    shown = [name for name in measures if f"{name}_by_difficulty" in found]
    figure.set_size_inches(4 * len(shown), 3.6)
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for (kind, values), colour in zip(found[f"{name}_by_difficulty"].items(), COLOURS):
            ax.plot(list(values), list(values.values()), "o-", color=colour, label=kind)
        ax.set(xlabel="operations needed", ylabel=measures[name])
        ax.legend()


def plot_experts(figure, routes, found):
    """For each routed layer, which experts a token meets together; the diagonal's place shows nothing."""
    layers = len(found["coactivation"])
    figure.set_size_inches(1 + 3 * min(4, layers), 2.8 * math.ceil(layers / 4))
    for layer, matrix in enumerate(found["coactivation"]):
        ax = figure.add_subplot(math.ceil(layers / 4), min(4, layers), layer + 1)
        _matrix(figure, ax, matrix, f"MoE layer {layer}: tokens that meet both", "expert", "expert", vmin=0)


def plot_saturation(figure, routes, found):
    """How early tokens meet the experts that they meet at the end."""
    figure.set_size_inches(6, 3.6)
    ax, steps = figure.subplots(), list(found["saturation"])
    for layer, (shares, colour) in enumerate(zip(zip(*found["saturation"].values()), itertools.cycle(COLOURS))):
        ax.plot(steps, shares, "o-", color=colour, label=f"MoE layer {layer}")
    ax.set(xlabel="step", ylabel="share of choices that stay", ylim=(0, 1.02))
    ax.legend()


def read_routes(path) -> dict:
    import numpy as np

    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:  # cut short, or something else
        raise RunError(f"{path} cannot be read ({error}); remove it and make it again") from None


def routes_files(run_folder) -> list[Path]:
    """What a run has of its tokens' ways, the one to show first: its routes.npz, then what its evaluations kept, newest first."""
    return [*run_folder.glob("routes.npz"), *sorted((run_folder / "routes").glob("step_*.npz"), reverse=True)]


def write_routes(run_folder, folder):
    """Writes <run>_routes.json and the pictures it has numbers for into `folder`, and prints their paths. They come from the run's routes.npz, or
    else from the last evaluation that kept some. Raises RunError where there is neither."""
    files, path = routes_files(run_folder), run_folder / "routes.npz"
    if not files:
        raise RunError(f"{path} is not there; make it with `python model.py --checkpoint {run_folder}/checkpoint --routes {path} --data <shards>`")
    earlier = [(int(file.stem.removeprefix("step_")), read_routes(file)) for file in reversed(files) if file != path]
    routes = read_routes(path) if files[0] == path else earlier[-1][1]
    found = analyse(routes, earlier)
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / f"{run_folder.name}_routes.json", json.dumps(_map(_finite, found), indent=1) + "\n")
    print(folder / f"{run_folder.name}_routes.json")
    pictures = (("layers", "use_by_step", plot_layers), ("loops", "loops", plot_loops), ("coactivation", "coactivation", plot_experts),
                ("difficulty", "accuracy_by_difficulty", plot_difficulty), ("saturation", "saturation", plot_saturation))
    for name, key, plot in pictures:
        if found.get(key):
            with drawing(folder / f"{run_folder.name}_{name}.png") as figure:
                plot(figure, routes, found)
            print(folder / f"{run_folder.name}_{name}.png")


# -----------------------------------------------------------------------------
# The page: report.html, with plotly.js and the numbers of runs put into it

REPORT_CURVES = {  # key -> title, in the page's order; what else was logged folds away below
    "val/bpb": "validation bits per byte", "val/loss": "validation loss, nats per token", "train/loss": "training loss, nats per token",
    "train/tok_per_sec": "tokens per second", "moe/router_entropy": "router entropy / log(experts)",
    "moe/load_max_over_mean": "load of the busiest expert / mean", "memory/peak_bytes": "peak memory, bytes", "train/mfu": "MFU",
}
CLOCKS = {"step": "step", "seconds": "train_time", "flops": "train/flops"}  # the page's name of an axis -> its key
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
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
# Records: records/<track>/<YYYY-MM-DD_Name>/, whose rules are in records/README.md

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


def final_row(rows, metric: str) -> dict:
    """The last row that has the metric; {} if none has. NaN and infinity are null there."""
    return next((row for row in reversed(rows) if metric in row), {})


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


# -----------------------------------------------------------------------------
# The script

def parse(argv=None):
    parser = argparse.ArgumentParser(description="A table and plots of the runs below a folder, or the history of records.", allow_abbrev=False)
    parser.add_argument("--experiment_name", "--experiment-name", nargs="+", default=[], metavar="NAME",
                        help="the runs to show, in this order (default: all, by name)")
    parser.add_argument("--out_dir", "--out-dir", type=Path, default="logs", metavar="DIR",
                        help="the folder the runs are in (default: logs)")
    parser.add_argument("--records", nargs="?", const=Path("records"), type=Path, metavar="DIR",
                        help="print the history of the tracks below DIR (default: records) as markdown tables, draw each, and stop")
    parser.add_argument("--track", metavar="NAME", help="beside --records: only this track")
    parser.add_argument("--html", action="store_true", help="write one page of them all that opens anywhere, plots/report.html")
    parser.add_argument("--follow", action="store_true", help="show how one run that is on its way is doing, until it ends")
    parser.add_argument("--routes", action="store_true", help="draw where the tokens of these runs went, from their routes.npz")
    return parser.parse_args(argv)


def main():
    args = parse()
    try:
        if args.records:
            histories = [(folder, *read_history(folder)) for folder in tracks(args.records, args.track)]
            print("\n\n".join(track_history(*history) for history in histories))
            for history in histories:
                write_history(*history)
            return
        there = sorted(folder.name for folder in args.out_dir.glob("*") if is_run(folder))
        unknown = [name for name in args.experiment_name if name not in there]
        if not there:
            raise RunError(f"no runs below {args.out_dir}; start one with `python train_muon.py` or name its --out_dir")
        if unknown:
            raise RunError(f"no experiment {unknown[0]!r} below {args.out_dir}; there are: {', '.join(there)}")
        if args.routes:
            with_routes = [name for name in there if routes_files(args.out_dir / name)]
            for name in dict.fromkeys(args.experiment_name or with_routes or there):
                write_routes(args.out_dir / name, args.out_dir / "plots")
            return
        if args.follow:
            if len(args.experiment_name or there) > 1:
                raise RunError(f"--follow shows one run; name it with --experiment_name: {', '.join(args.experiment_name or there)}")
            follow(args.out_dir / (args.experiment_name or there)[0])
            return
        runs = [read_run(args.out_dir / name) for name in dict.fromkeys(args.experiment_name or there)]
        print(table(runs), end="\n\n")
        if args.html:
            page = args.out_dir / "plots" / "report.html"
            write_report(runs, args.out_dir, page)
            print(page)
            return
        write_plots(runs, args.out_dir / "plots")
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
