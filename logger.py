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
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from statistics import median

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


def final_row(rows, metric: str) -> dict:
    """The last row that has the metric; {} if none has. NaN and infinity are null there."""
    return next((row for row in reversed(rows) if metric in row), {})


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
    from tools.plots import write_plots
    from tools.records import read_history, track_history, tracks, write_history
    from tools.report import follow, write_report
    from tools.routes import routes_files, write_routes

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
    from logger import main  # the tools import this file as `logger`, and its RunError is the one to catch

    main()
