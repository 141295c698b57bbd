"""The log of a training run: writing it, reading it back, and its table.

    python logger.py                                   # table and plots of all runs below logs/
    python logger.py --experiment_name muon adamw      # of these two, in this order
    python logger.py --html                            # one interactive page, logs/plots/report.html
    python logger.py --html --follow                   # the same, rewritten while the runs go on
    python logger.py --experiment_name muon --follow   # live status of a run
    python logger.py --experiment_name muon --routes   # which layers and experts its tokens were routed to
    python logger.py --records                         # history of the tracks below records/

A run is one folder, logs/<experiment_name>/, which records the code, the machine and the results:

    run.log         source of every file that made the run, environment, printed lines
    metrics.jsonl   one JSON object per event, flat slash keys
    config.json     resolved configuration

Sections: Run, sinks, PhaseTimer, reading, table, files and JSON, command line. The command line draws through tools/
(show, plots, report, routes, records). Importing this file imports only the standard library.
"""

import importlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from statistics import median

from cli import Parser, UserError, command_line, write_atomically
from terminal import clear_line, printable

SEPARATOR = "=" * 100  # in run.log, around the environment


# -----------------------------------------------------------------------------
# Run

class Run:
    """The folder `out_dir/experiment_name`, open for writing.

    Args:
        config: content of config.json.
        sources: files to copy into run.log.
        resume_step: step of the checkpoint that the run continues from, None for a new run. Later rows are dropped.
        active: False on every rank but the first. All methods of an inactive run return without touching a file.
        sinks: names in SINKS; each of these dashboards receives the same rows.

    Raises UserError if a file cannot be written. The constructor also raises it if the experiment exists and is not
    resumed, another process writes the folder, metrics.jsonl is damaged, or the package of a sink is missing."""

    def __init__(self, out_dir, experiment_name: str, *, config: dict, sources: list[Path],
                 resume_step: int | None = None, active: bool = True, sinks=()):
        self.path = Path(out_dir) / experiment_name
        self.active = active
        self._queue = []  # rows that are not on disk yet
        self._unreturned = []  # rows on disk that flush() has not returned yet
        self._device_values_queued = False
        self._lock = None
        self._sinks = []
        if not active:
            return

        run_name(experiment_name)
        modules = {name: sink_module(name) for name in sinks}
        if resume_step is None:
            refuse_existing(self.path)
        make_folder(self.path)
        self._lock = _lock_folder(self.path)

        metrics = self.path / "metrics.jsonl"
        if resume_step is not None and metrics.exists():
            kept = [row for row in read_rows(metrics)
                    if (row.get("step") or 0) <= resume_step and row.get("event") != "end"]
            write_text(metrics, _to_lines(kept))
        self._sinks = [SINKS[name][0](module, self.path, config, resume_step) for name, module in modules.items()]
        self._write_header(sources, resume_step)
        write_text(self.path / "config.json", json.dumps(for_json(config, digits=17), indent=2, default=str) + "\n")

    def print(self, line):
        """Writes a line to run.log and to stdout."""
        if not self.active:
            return
        _append(self.path / "run.log", f"{line}\n")
        clear_line()
        print(printable(str(line), sys.stdout), flush=True)

    def log(self, row: dict):
        """Queues a row of metrics.jsonl: numbers, text, None, lists, and tensors of any shape on any device.

        Values are copied: later changes of a tensor do not change the row. It is on disk when this returns, unless it
        or a row queued before it has device values: flush() writes those, so that a step never waits for the GPU."""
        if not self.active:
            return
        self._queue.append(_map_nested(self._snapshot, row))
        if not self._device_values_queued:
            self._write_queue()

    def flush(self) -> list[dict]:
        """Writes all queued rows; returns the rows written since the last flush(), as plain Python numbers.

        NaN and infinity stay themselves here and are null in the file."""
        self._write_queue()
        rows, self._unreturned = self._unreturned, []
        return rows

    def sync(self):
        """Forces what has been written onto the disk, so that it survives a crash of the system."""
        for name in ("run.log", "metrics.jsonl"):
            path = self.path / name
            if self.active and path.exists():
                with explain_os_errors(path), open(path, "rb") as file:
                    os.fsync(file.fileno())

    def close(self):
        """Writes the queued rows and releases the folder. May be called more than once."""
        self._write_queue()
        while self._sinks:
            self._sinks.pop().close()
        if self._lock:
            self._lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _write_header(self, sources, resume_step):
        log = self.path / "run.log"
        with explain_os_errors(log):
            old = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        text = "\n" if old and not old.endswith("\n") else ""  # a killed run may end in half a line
        for source in map(Path, sources):
            with explain_os_errors(source, "read"):
                body = source.read_text(encoding="utf-8").rstrip("\n") + "\n"
            if body not in old:  # a resumed run repeats only files that have changed
                text += f"{'-' * 100}\n{source.name}\n{'-' * 100}\n{body}"
        text += f"{SEPARATOR}\n{_describe_environment(sources)}\n{SEPARATOR}\n"
        if resume_step is not None:
            text += f"the run continues from step {resume_step}\n"
        _append(log, text)

    def _snapshot(self, value):
        if str(getattr(value, "device", "cpu")) == "cpu":
            return _to_host(value)
        self._device_values_queued = True
        # The clone is one more kernel in the device's queue: the host does not wait for it.
        return value if isinstance(value, _EventSeconds) else value.detach().clone()

    def _write_queue(self):
        rows = [_map_nested(_to_host, row) for row in self._queue]
        self._queue, self._device_values_queued = [], False  # before writing: a failed write must not repeat rows
        if not rows:
            return
        _append(self.path / "metrics.jsonl", _to_lines(rows))
        self._unreturned += rows
        for sink in self._sinks:
            for row in rows:
                sink.write(row)


def run_name(name: str) -> str:
    """The name of an experiment. Raises UserError unless a folder can have it and it shows as one line."""
    if not re.fullmatch(r"[^./\\-][^/\\]*", name) or not name.isprintable() or len(name) > 80 or name == "plots":
        raise UserError(f"--experiment_name {name[:40]!r} cannot name a run's folder; choose a plain name such as muon,"
                       " at most 80 characters, no line breaks, no slashes, no dot or dash in front, and not 'plots',"
                       " where logger.py draws")
    return name


def check_writable(folder):
    """Raises UserError unless files can be created in the folder, or in the nearest one above it that exists."""
    with explain_os_errors(folder):
        above = next(path for path in (folder, *Path(folder).absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=above).close()


def refuse_existing(folder):
    """Raises UserError if the folder holds a run, started or finished."""
    if is_run(folder):
        raise UserError(f"{folder} already holds a run; continue it with --resume or choose another --experiment_name")


def find_commit(folder) -> str:
    """The git commit that is checked out in the folder, with "-dirty" if tracked files differ from it."""
    return _read_command("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _lock_folder(folder):
    """An open file that locks the folder for this process. The kernel releases the lock at exit, also after kill -9."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with explain_os_errors(folder / "run.log"):
        file = open(folder / "run.log", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process is writing {folder}; stop it, wait for its end,"
                       " or choose another --experiment_name") from None
    except OSError:
        pass  # a file system without locks
    return file


def _to_lines(rows) -> str:
    return "".join(json.dumps(for_json(row), allow_nan=False) + "\n" for row in rows)


def _to_host(value):
    return value.tolist() if hasattr(value, "tolist") else value  # torch and numpy; a 0-d array becomes a number


def _describe_environment(sources) -> str:
    """Facts needed to judge the run's timings and to repeat it, one per line."""
    import torch

    on_cuda = torch.cuda.is_available()
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    facts = {
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": find_commit(Path([*sources, "."][0]).resolve().parent),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else "not available",
        "gpu": f"{torch.cuda.get_device_name()}\n{_read_command('nvidia-smi')}" if on_cuda else "none",
    }
    return "\n".join(f"{name:<10}{fact}" for name, fact in facts.items())


def _read_command(*command) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available ({error})"
    return result.stdout.strip() if result.returncode == 0 else "not available"


# -----------------------------------------------------------------------------
# Sinks: dashboards that receive every row of metrics.jsonl; numbers become curves, nested lists histograms

class TensorBoard:
    """Event files in the run's folder, in tensorboard/. A resumed run hides the events after its checkpoint."""

    def __init__(self, tensorboard, folder, config: dict, resume_step: int | None):
        first_step = None if resume_step is None else resume_step + 1
        self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        text = json.dumps(for_json(config), indent=1, default=str)
        self.writer.add_text("config", f"```json\n{text}\n```", resume_step or 0)

    def write(self, row: dict):
        step = row.get("step")
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
            elif isinstance(value, str):
                self.writer.add_text(key, value, step)
            elif numbers := _finite_numbers(value):
                import numpy as np

                self.writer.add_histogram(key, np.array(numbers, float), step)

    def close(self):
        self.writer.close()


class WandB:
    """A run at Weights & Biases, in the project WANDB_PROJECT (default modded-nanomoe); --resume continues it.
    With WANDB_MODE=offline it stays in the folder, for `wandb sync`."""

    def __init__(self, wandb, folder, config: dict, resume_step: int | None):
        self.wandb = wandb
        id_file = folder / "wandb_id"
        if resume_step is None or not id_file.exists():
            write_text(id_file, uuid.uuid4().hex)
        with explain_os_errors(id_file, "read"):
            run_id = id_file.read_text(encoding="utf-8").strip()
        project = os.environ.get("WANDB_PROJECT", "modded-nanomoe")
        try:
            self.run = self.wandb.init(project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder),
                                       config=for_json(config))
        except wandb.Error as error:
            raise UserError(f"wandb does not start ({error}); mend that, or leave out --wandb") from error

    def write(self, row: dict):
        values = {}
        for key, value in row.items():
            if isinstance(value, (int, float, str)):
                values[key] = value
            elif numbers := _finite_numbers(value):
                values[key] = self.wandb.Histogram(numbers)
        self.run.log(values, step=row.get("step"))

    def close(self):
        self.run.finish()


SINKS = {  # name of package and flag -> class, module
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
    "wandb": (WandB, "wandb"),
}


def sink_module(name: str):
    """The imported module of a sink. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(SINKS[name][1])
    except ImportError as error:
        raise UserError(f"--{name} needs a package that is not installed ({error}): `pip install {name}`,"
                       " or leave the flag out") from None


def _finite_numbers(value) -> list:
    """The numbers in nested lists as one flat list, without None, NaN and infinity."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _finite_numbers(item)]
    return [value] if isinstance(value, (int, float)) and math.isfinite(value) else []


# -----------------------------------------------------------------------------
# PhaseTimer

class PhaseTimer:
    """Seconds per phase of a training step: start(), then mark(name) at the end of each phase, then row().

    A phase that is marked several times in a step adds up. On CUDA the seconds are the GPU's, between CUDA events, and
    row() returns values that are computed when Run.flush() reads them: no call here waits for the GPU.

    place: ("step 7, forward", time.monotonic() at its begin), for the watchdog thread."""

    def __init__(self, device_type: str):
        on_cuda = device_type == "cuda"
        self._now = _record_event if on_cuda else time.perf_counter
        self._sum = _EventSeconds if on_cuda else lambda spans: sum(end - begin for begin, end in spans)
        self.start()

    def start(self, step: int = 0):
        """Begins a step and forgets the times of the previous one."""
        self._spans = {}  # name -> [(begin, end), ...]
        self._last = self._now()
        self._step = step
        self.begin("start")

    def begin(self, name: str):
        """Sets `place`, without timing anything."""
        self.place = (f"step {self._step}, {name}", time.monotonic())

    def mark(self, name: str):
        """Ends the phase that began at the last mark() or start(), and names it."""
        begin, self._last = self._last, self._now()
        self._spans.setdefault(name, []).append((begin, self._last))

    def row(self) -> dict:
        """{"time/<name>": seconds} of this step so far, in order of first appearance."""
        return {f"time/{name}": self._sum(list(spans)) for name, spans in self._spans.items()}


def _record_event():
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _EventSeconds:
    """A sum of spans between CUDA events, computed when it is read. Run reads it like a tensor."""

    device = "cuda"

    def __init__(self, spans):
        self._spans = spans

    def item(self):
        self._spans[-1][1].synchronize()  # events of one stream end in order, so the last one is enough
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000

    tolist = item


# -----------------------------------------------------------------------------
# Reading

NUMBER = (int, float, type(None))
NUMERIC_KEYS = ("step", "train_time", "train/loss", "train/flops", "val/loss", "val/bpb")  # if they are in a row

def read_run(folder) -> dict:
    """{"name": str, "config": dict, "rows": list of dicts} of a run's folder.

    config or rows are empty if the run has not written them yet; a last line cut off by a kill is left out.
    Raises UserError if there is no run, or if any other line is not a JSON object."""
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(f"{folder} holds no run; check --out_dir and --experiment_name")
    metrics = folder / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.exists() else []
    return {"name": folder.name, "config": read_config(folder), "rows": rows}


def read_config(folder) -> dict:
    """config.json of a run's folder, {} before it is written. Raises UserError if it is damaged."""
    path = folder / "config.json"
    with explain_os_errors(path, "read"):
        config = read_json(path) if path.exists() else {}
    for part in ("parameters", "hyperparameters", "model"):
        if not isinstance(config.get(part, {}), dict):
            raise UserError(f"{path} has no JSON object in {part!r}; restore it or delete it")
    return config


def is_run(folder) -> bool:
    """Whether the folder holds a run, started or finished. An empty run.log is no more than the lock of its start."""
    log = folder / "run.log"
    return (log.exists() and log.stat().st_size > 0) or (folder / "metrics.jsonl").exists()


def has_ended(folder) -> bool:
    """Whether the run in the folder has reached its end."""
    path = folder / "metrics.jsonl"
    return path.exists() and any(row.get("event") == "end" for row in read_rows(path))


def has_evaluation(folder, step: int) -> bool:
    """Whether the run in the folder has logged the evaluation of a step."""
    path = folder / "metrics.jsonl"
    return path.exists() and any(row.get("step") == step and "val/loss" in row for row in read_rows(path))


def read_rows(path, numeric=NUMERIC_KEYS) -> list[dict]:
    """The rows of a metrics.jsonl, without a last line cut off by a kill. Raises UserError for other damaged lines.

    numeric: keys with values that must be numbers.
    """
    with explain_os_errors(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    return parse_rows(path, lines, numeric, is_end=True)


def parse_rows(path, lines, numeric=NUMERIC_KEYS, first_number: int = 1, is_end: bool = False) -> list[dict]:
    """The JSON objects of some lines of a metrics.jsonl. Raises UserError, which names the line, for a damaged one.

    is_end: the last line may be cut off, and is left out then."""
    rows = []
    for number, line in enumerate(lines, start=first_number):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(key), NUMBER) for key in numeric):
            rows.append(row)
        elif not is_end or line is not lines[-1]:
            what = "a row of metrics" if isinstance(row, dict) else "a JSON object"
            raise UserError(f"{path} line {number} is not {what}: {line[:40]!r}; delete that line")
    return rows


class RunReader:
    """Reads a run again and again while another process writes it, and parses only the lines that are new."""

    def __init__(self, folder):
        self.folder, self.path = Path(folder), Path(folder) / "metrics.jsonl"
        self.rows, self.file_id, self.position = [], None, 0

    def read(self) -> dict:
        """The run as read_run() returns it, but without a last line that is still being written."""
        if not self.path.exists():
            return read_run(self.folder)
        with explain_os_errors(self.path, "read"), open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.file_id or status.st_size < self.position:  # a resumed run has replaced the file
                self.rows, self.file_id, self.position = [], status.st_ino, 0
            file.seek(self.position)
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            lines = whole.decode("utf-8", "replace").split("\n")
            self.rows += parse_rows(self.path, lines, first_number=len(self.rows) + 1)
            self.position += len(whole) + 1
        return {"name": self.folder.name, "config": read_config(self.folder), "rows": self.rows}


def get_columns(run, *keys) -> list[list]:
    """One list of values per key, over the rows that have all of the keys."""
    rows = [row for row in run["rows"] if all(row.get(key) is not None for key in keys)]
    return [[row[key] for row in rows] for key in keys]


def get_final_row(rows, key: str) -> dict:
    """The last row that has the key, {} if none has. Its value is None if it was NaN or infinite."""
    return next((row for row in reversed(rows) if key in row), {})


# -----------------------------------------------------------------------------
# Table

last = itemgetter(-1)
TABLE = [  # title, format, choice among the values, key of the values; losses in nats per token
    ("steps", "{:,.0f}", max, "step"),
    ("val loss", "{:.4f}", last, "val/loss"),
    ("best", "{:.4f}", min, "val/loss"),
    ("bits/byte", "{:.4f}", last, "val/bpb"),
    ("seconds", "{:,.1f}", last, "train_time"),
    ("tokens/s", "{:,.0f}", median, "train/tok_per_sec"),
    ("MFU", "{:.2%}", median, "train/mfu"),
    ("load max/mean", "{:.2f}", last, "moe/load_max_over_mean"),
]


def format_table(runs) -> str:
    """The table of runs for a terminal."""
    lines = table_rows(runs)
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = lambda name, *cells: [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]
    return "\n".join("  ".join(align(*cells)) for cells in lines)


def table_rows(runs) -> list[list[str]]:
    """A row of titles, then one row of cells per run; '-' for a metric without a value."""
    lines = [["run", *(title for title, *_ in TABLE), "parameters", "active"]]
    for run in runs:
        parameters = run["config"].get("parameters") or {}
        cells = [format_metric(run, *column) for _, *column in TABLE]
        cells += [f"{parameters[key]:,}" if parameters.get(key) else "-" for key in ("total", "active")]
        lines.append([run["name"], *cells])
    return lines


def format_metric(run, template: str, choose, key: str) -> str:
    """One of a run's values of a metric; '-' if there is none, 'nan' if the last one is wanted and is not finite."""
    if choose is last and get_final_row(run["rows"], key).get(key, 0) is None:
        return "nan"
    values = get_columns(run, key)[0]
    return template.format(choose(values)) if values else "-"


# -----------------------------------------------------------------------------
# Files and JSON

@contextmanager
def explain_os_errors(path, verb="write"):
    """Turns an OSError into a UserError that names the file. verb: "write" or "read"."""
    try:
        yield
    except OSError as error:
        mend = {"write": "make room or mend the permissions there, or choose another --out_dir",
                "read": "restore it or mend its permissions"}[verb]
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}; {mend}") from error


def make_folder(path):
    """Creates a folder and its parents. Raises UserError if that fails."""
    with explain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path, text: str):
    """Replaces a file by the text: a crash or a full disk leaves the old content. Raises UserError if that fails."""
    with explain_os_errors(path):
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path) -> dict:
    """The JSON object in a file. Raises UserError if there is none."""
    try:
        with explain_os_errors(path, "read"):
            found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {str(found)[:20]}")
        return found
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object ({error}); restore it or delete it") from error


def for_json(value, digits: int = 9):
    """`value`, also nested: None for NaN and infinity; so many digits (fp32 has 9) of fractions that are no date."""
    short = lambda x: None if not math.isfinite(x) else float(f"{x:.{digits}g}") if x % 1 and abs(x) < 1e6 else x
    return _map_nested(lambda leaf: short(leaf) if isinstance(leaf, float) else leaf, value)


def _map_nested(function, value):
    """`value` with `function` applied to every leaf of its nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _map_nested(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_nested(function, item) for item in value]
    return function(value)


def _append(path, text: str):
    # The file is opened for each call: no buffer of this process is lost by kill -9.
    with explain_os_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


# -----------------------------------------------------------------------------
# Command line

@command_line()
def main():
    args = parse()
    if args.records:
        from tools.records import write_histories

        write_histories(args.records, args.track)
    else:
        from tools.show import show_runs

        show_runs(args)


def parse(argv=None):
    calls = tuple(re.findall(r"^    (python .*)$", __doc__, re.M))
    about = "A table and plots of the runs below a folder, or the history of records."
    first = ("experiment_name", "out_dir", "html", "follow", "routes")
    parser = Parser(prog="logger.py", description=about, examples=calls, first=first)
    parser.add_argument("--experiment_name", "--experiment-name", nargs="+", default=[], metavar="NAME",
                        help="the runs to show, in this order (default: all, by name)")
    parser.add_argument("--out_dir", "--out-dir", type=Path, default="logs", metavar="DIR",
                        help="the folder of the runs")
    parser.add_argument("--records", nargs="?", const=Path("records"), type=Path, metavar="DIR",
                        help="print the history of the tracks below DIR (default: records), draw each, and stop")
    parser.add_argument("--track", metavar="NAME", help="with --records: only this track")
    parser.add_argument("--html", action="store_true", help="write one interactive page of the runs, plots/report.html")
    parser.add_argument("--follow", action="store_true",
                        help="show the live status of one run until it ends; with --html rewrite the page until then")
    parser.add_argument("--routes", action="store_true",
                        help="draw which layers and experts the runs' tokens met, from their routes.npz")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
