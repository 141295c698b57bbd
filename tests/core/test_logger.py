"""logger.py: the files of a run, what survives a kill, resuming, and the table of what was logged.

pytest tests/core/test_logger.py
"""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import logger  # noqa: E402
from cli import UserError  # noqa: E402
from logger import PhaseTimer, Run, read_run  # noqa: E402


@pytest.fixture
def sources(tmp_path):
    files = [tmp_path / "train_it.py", tmp_path / "net.py"]
    files[0].write_text("print('the loop')\n")
    files[1].write_text("WIDTH = 7  # no newline at the end")
    return files


@pytest.fixture
def open_run(tmp_path, sources):
    def open_it(name="muon", **kwargs):
        return Run(tmp_path / "logs", name, **{"config": {"seed": 1}, "sources": sources, **kwargs})

    return open_it


def strict_rows(path):
    """The rows of a metrics.jsonl, read by a parser that knows no NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -----------------------------------------------------------------------------
# The files of a run


def test_new_run_writes_sources_environment_and_config(open_run, sources):
    config = {"lr": 0.02, "limit": math.inf, "model": {"pattern": "DM", "data": Path("data/python")}}
    with open_run(config=config) as run:
        run.print("step:0/10 val_loss:5.54518")
    text = (run.path / "run.log").read_text()
    lines = text.splitlines()
    first, second = [i for i, line in enumerate(lines) if line == "=" * 100]
    head, environment, tail = lines[:first], "\n".join(lines[first:second]), lines[second + 1 :]
    assert "print('the loop')" in head and "WIDTH = 7  # no newline at the end" in head
    assert head.index("train_it.py") < head.index("print('the loop')") < head.index("net.py") < head.index(head[-1])
    for fact in (torch.__version__, sys.version.split()[0], f"threads   {torch.get_num_threads()}", sys.orig_argv[-1]):
        assert fact in environment
    assert tail == ["step:0/10 val_loss:5.54518"]
    assert json.loads((run.path / "config.json").read_text()) == {
        "lr": 0.02,
        "limit": None,
        "model": {"pattern": "DM", "data": "data/python"},
    }
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "run.log"], "a temporary file is left"


def test_commit_is_that_of_the_sources(open_run, sources, tmp_path):
    def git(*command):
        return subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True, text=True).stdout

    assert "commit    not available" in (open_run("outside").path / "run.log").read_text()
    git("init", "-q")
    git("add", "net.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    assert f"commit    {head}\n" in (open_run("clean").path / "run.log").read_text()
    sources[1].write_text("WIDTH = 8")
    assert f"commit    {head}-dirty\n" in (open_run("dirty").path / "run.log").read_text()


@pytest.mark.parametrize("left", ["run.log", "metrics.jsonl"])
def test_existing_run_is_refused_and_untouched(open_run, tmp_path, left):
    folder = tmp_path / "logs/muon"
    folder.mkdir(parents=True)
    (folder / left).write_text("{}\n")
    with pytest.raises(UserError) as error:
        open_run()
    assert str(folder) in str(error.value)
    assert "--resume" in str(error.value) and "--experiment_name" in str(error.value)
    assert [path.name for path in folder.iterdir()] == [left] and (folder / left).read_text() == "{}\n"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "plots", "x" * 81, "a\nb"])
def test_a_name_that_is_no_plain_folder_is_refused(open_run, tmp_path, name):
    with pytest.raises(UserError, match="--experiment_name"):
        open_run(name)
    assert not (tmp_path / "logs").exists()


def test_inactive_run_touches_nothing(open_run, tmp_path, capsys):
    with open_run(active=False) as run:
        run.print("hello")
        run.log({"step": 0, "train/loss": torch.tensor(1.0)})
        assert run.flush() == []
        assert run.path == tmp_path / "logs/muon"
    assert not (tmp_path / "logs").exists() and capsys.readouterr().out == ""


def test_print_erases_a_live_line_first(open_run, capsys, monkeypatch):
    run = open_run()
    run.print("first")
    assert capsys.readouterr() == ("first\n", "")
    monkeypatch.setattr("terminal.is_terminal", lambda: True)
    run.print("second")
    assert capsys.readouterr() == ("second\n", "\r\x1b[K")
    assert (run.path / "run.log").read_text().endswith("=\nfirst\nsecond\n")


# -----------------------------------------------------------------------------
# Resume


def test_resume_drops_later_rows_and_a_torn_line(open_run, sources):
    with open_run() as run:
        run.log({"step": 0, "event": "start"})
        for step in range(6):
            run.log({"step": step, "train/loss": 5.0 - step})
        run.log({"event": "no step"})
        run.print("step:5/9")
    metrics = run.path / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": 6, "train/lo')
    with open(run.path / "run.log", "a") as file:
        file.write("step:6/")
    sources[1].write_text("WIDTH = 8\n")
    with open_run(resume_step=3, config={"seed": 2}) as run:
        run.log({"step": 4, "train/loss": 0.5})
    rows = strict_rows(metrics)
    assert [row.get("step") for row in rows] == [0, 0, 1, 2, 3, None, 4]
    assert rows[-1]["train/loss"] == 0.5
    text = (run.path / "run.log").read_text()
    assert "step:5/9\nstep:6/\n" in text and "continues from step 3\n" in text.split("step:6/")[1]
    assert text.count("print('the loop')") == 1, "an unchanged source is repeated"
    assert "WIDTH = 7" in text.split("step:6/")[0] and "WIDTH = 8\n" in text.split("step:6/")[1]
    assert read_run(run.path)["config"] == {"seed": 2}


def test_resume_of_a_run_that_never_logged_a_row(open_run):
    open_run()
    with open_run(resume_step=0) as run:
        run.log({"step": 0})
    assert strict_rows(run.path / "metrics.jsonl") == [{"step": 0}]


def test_resume_refuses_a_damaged_middle_and_changes_nothing(open_run):
    with open_run() as run:
        run.log({"step": 0})
    damaged = '{"step": 0}\n{"step": \n{"step": 2}\n'
    (run.path / "metrics.jsonl").write_text(damaged)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 "):
        open_run(resume_step=2)
    assert (run.path / "metrics.jsonl").read_text() == damaged


# -----------------------------------------------------------------------------
# Rows


def test_values_of_all_kinds_and_nan(open_run):
    run = open_run()
    parameter = torch.nn.Parameter(torch.tensor(2.5))
    run.log(
        {
            "step": torch.tensor(3),
            "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
            "none": None,
            "grad": parameter * 2,
            "moe/load": torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
            "list": [1, torch.tensor(2.0), (math.inf, None)],
        }
    )
    run.log({"step": 4, "train/loss": torch.tensor(float("nan")), "event": "end"})
    first, second = run.flush()
    expected = {"step": 3, "bf16": 0.5, "grad": 5.0, "none": None, "moe/load": [[0.25, 0.75], [0.5, 0.5]]}
    assert first == expected | {"list": [1, 2.0, [math.inf, None]]}
    assert type(first["step"]) is int and math.isnan(second["train/loss"])
    assert strict_rows(run.path / "metrics.jsonl") == [
        expected | {"list": [1, 2.0, [None, None]]},
        {"step": 4, "train/loss": None, "event": "end"},
    ]


def test_fractions_keep_the_digits_of_fp32_and_dates_and_counts_all_of_theirs():
    fractions = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    kept = logger.for_json({"load": fractions.tolist()})["load"]
    assert torch.equal(torch.tensor(kept), fractions) and max(len(str(value)) for value in kept) <= 14
    exact = [1_764_500_000.123456, 11_943_530_201_088.0, 393_217, -0.5, True, "text", None]
    assert logger.for_json(exact) == exact and logger.for_json([math.nan, -math.inf]) == [None, None]


def test_flush_returns_each_row_once(open_run):
    run = open_run()
    run.log({"step": 0})
    run.log({"step": 1})
    assert run.flush() == [{"step": 0}, {"step": 1}] and run.flush() == []
    run.log({"step": 2})
    assert run.flush() == [{"step": 2}]
    run.close()
    run.close()
    assert [row["step"] for row in strict_rows(run.path / "metrics.jsonl")] == [0, 1, 2]


class DeviceTensor:
    """A stand-in for a tensor on a GPU that counts how often the host waited for it."""

    device = torch.device("cuda:0")
    waits = 0

    def __init__(self, value):
        self.value = value

    def detach(self):
        return self

    def clone(self):
        return DeviceTensor(self.value)

    def tolist(self):
        DeviceTensor.waits += 1
        return self.value


def test_values_on_a_device_wait_for_flush_in_order(open_run):
    run, DeviceTensor.waits = open_run(), 0
    metrics = run.path / "metrics.jsonl"
    loss, host = DeviceTensor(3.0), torch.tensor([1.0])
    run.log({"step": 1, "train/loss": [loss], "host": host})
    run.log({"step": 1, "val/loss": 2.0})  # must not overtake the row before it, nor force it
    assert DeviceTensor.waits == 0 and not metrics.exists()
    loss.value = 99.0  # buffers are reused by the next step
    host += 1
    rows = run.flush()
    assert rows == [{"step": 1, "train/loss": [3.0], "host": [1.0]}, {"step": 1, "val/loss": 2.0}]
    assert strict_rows(metrics) == rows and DeviceTensor.waits == 1
    run.log({"step": 2})
    assert len(strict_rows(metrics)) == 3, "rows without a device value wait although nothing is queued before them"
    run.log({"step": 3, "train/loss": DeviceTensor(1.0)})
    run.close()
    assert strict_rows(metrics)[-1] == {"step": 3, "train/loss": 1.0}


def test_rows_survive_kill_minus_nine(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from logger import Run
run = Run({str(tmp_path)!r}, "killed", config={{}}, sources=[])
for step in range(50):
    run.log({{"step": step}})
    run.print(f"step:{{step}}/99")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert [row["step"] for row in strict_rows(tmp_path / "killed/metrics.jsonl")] == list(range(50))
    assert (tmp_path / "killed/run.log").read_text().endswith("step:49/99\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize(
    "name, use", [("metrics.jsonl", lambda run: run.log({"step": 0})), ("run.log", lambda run: run.print("x"))]
)
def test_full_disk_names_the_file(open_run, name, use):
    run = open_run()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to("/dev/full")
    with pytest.raises(UserError) as error:
        use(run)
    assert str(run.path / name) in str(error.value) and os.strerror(errno.ENOSPC) in str(error.value)
    run.close()  # nothing is tried twice


def test_failed_rewrite_leaves_the_old_rows(open_run, monkeypatch):
    with open_run() as run:
        for step in range(3):
            run.log({"step": step})
    write_text = Path.write_text

    def half_a_write(path, text, **kwargs):
        write_text(path, text[:5], **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half_a_write)
    with pytest.raises(UserError, match="metrics.jsonl"):
        open_run(resume_step=1)
    assert [row["step"] for row in strict_rows(run.path / "metrics.jsonl")] == [0, 1, 2]


def test_out_dir_that_is_a_file(open_run, tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match="logs"):
        open_run()


# -----------------------------------------------------------------------------
# PhaseTimer


def test_phase_timer_accumulates(monkeypatch):
    ticks = iter([0, 100, 101, 103, 106, 110, 200, 207])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = PhaseTimer("cpu")
    timer.start()
    for name in ("data", "forward", "backward", "forward"):
        timer.mark(name)
    assert list(timer.row().items()) == [("time/data", 1), ("time/forward", 2 + 4), ("time/backward", 3)]
    timer.start()
    timer.mark("forward")
    assert timer.row() == {"time/forward": 7}, "the step before is still counted"


def test_phase_timer_sums_to_the_elapsed_time():
    timer = PhaseTimer("cpu")
    begin = time.perf_counter()
    timer.start()
    for _ in range(3):
        time.sleep(0.02)
        timer.mark("forward")
        time.sleep(0.01)
        timer.mark("backward")
    row, elapsed = timer.row(), time.perf_counter() - begin
    assert row["time/forward"] >= 0.06 and row["time/backward"] >= 0.03
    assert elapsed - 0.025 < sum(row.values()) <= elapsed


def test_phase_timer_on_cuda_does_not_wait_before_flush(open_run, monkeypatch):
    class Event:
        clock, waits = 0, 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 10
            self.time, self.done = Event.clock, False

        def synchronize(self):
            Event.waits += 1
            self.done = True

        def elapsed_time(self, end):  # milliseconds, as CUDA's
            assert Event.waits, "asked for before the event was waited for"
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    run, timer = open_run(), PhaseTimer("cuda")
    timer.start()
    for name in ("forward", "backward", "forward"):
        timer.mark(name)
    row = timer.row()
    run.log({"step": 1} | row)
    timer.mark("forward")  # neither a later phase nor the next step may disturb the row that waits
    timer.start()
    timer.mark("forward")
    assert Event.waits == 0 and not (run.path / "metrics.jsonl").exists()
    assert run.flush() == [{"step": 1, "time/forward": 0.02, "time/backward": 0.01}]
    assert strict_rows(run.path / "metrics.jsonl") == [{"step": 1, "time/forward": 0.02, "time/backward": 0.01}]
    assert row["time/backward"].item() == 0.01


# -----------------------------------------------------------------------------
# Reading


def test_read_run(open_run):
    with open_run() as run:
        run.log({"step": 0})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "x')
    assert read_run(run.path) == {"name": "muon", "config": {"seed": 1}, "rows": [{"step": 0}]}


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "12", "", '{"step": 1}{"step": 2}'])
def test_malformed_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert f"{tmp_path / 'metrics.jsonl'} line 2 " in str(error.value)


def test_folder_without_a_run_and_broken_config(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "run.log").write_text("a line\n")
    assert read_run(tmp_path) == {"name": tmp_path.name, "config": {}, "rows": []}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        read_run(tmp_path)


# -----------------------------------------------------------------------------
# The script


def write_run(out_dir, name, steps=40, layers=3, experts=4, bits=True, slowdown=1.0):
    """A synthetic run; layers=0 is a dense one. Returns the rows that were logged."""
    rows, parameters = [], {"total": 1_234_567, "active": 765_432}
    for step in range(steps + 1):
        clock = {"step": step, "train_time": 0.1 * slowdown * step, "train/flops": 1e9 * step}
        row = clock | {
            "train/loss": 5.5 - 0.01 * step,
            "train/tok_per_sec": 1000 + (step * 7) % 41,
            "train/mfu": 0.3 + 0.001 * step,
            "time/data": 0.001,
            "time/forward": 0.03 * slowdown + 0.0001 * (step % 3),
            "time/optimizer": 0.01,
        }
        if layers:
            slope_L1 = torch.arange(1, layers + 1)[:, None] * (1 - step / steps)
            load = torch.softmax(slope_L1 * torch.arange(experts), -1)
            row |= {
                "moe/load": load,
                "moe/load_max_over_mean": load.max() * experts,
                "moe/router_entropy": -(load * load.log()).sum(-1).mean() / math.log(experts),
            }
        rows.append({"moe/load": []} | row)  # a dense model has no MoE layer
        if step % 10 == 0:
            loss = 2.0 + 3.0 * math.exp(-step / 10) + (0.25 if step == steps else 0)  # the last is not the best
            rows.append(clock | {"val/loss": loss} | ({"val/bpb": loss / math.log(2) / 4} if bits else {}))
    with Run(out_dir, name, config={"parameters": parameters}, sources=[]) as run:
        for row in rows:
            run.log(row)
        return run.flush()


def call_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["logger.py", *map(str, arguments)])
    logger.main()


def test_script_end_to_end(tmp_path):
    import matplotlib.image

    rows = {
        name: write_run(tmp_path, name, **kind)
        for name, kind in {"muon": {}, "adamw": {"slowdown": 2.0}, "dense": {"layers": 0}}.items()
    }
    Run(tmp_path, "empty", config={}, sources=[])
    result = subprocess.run([sys.executable, ROOT / "logger.py", "--out-dir", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == f"reading 4 runs below {tmp_path}\n"
    lines = result.stdout.splitlines()
    columns = "run steps val_loss best bits/byte seconds tokens/s MFU load_max/mean parameters active".split()
    assert lines[0].replace("val loss", "val_loss").replace("load max", "load_max").split() == columns
    cells = {line.split()[0]: dict(zip(columns, line.split())) for line in lines[1:5]}
    assert list(cells) == ["adamw", "dense", "empty", "muon"]
    assert set(list(cells["empty"].values())[1:]) == {"-"}
    for name, logged in rows.items():
        losses = [row["val/loss"] for row in logged if "val/loss" in row]
        steps = [row for row in logged if "train/loss" in row]
        assert cells[name] == {
            "run": name,
            "steps": "40",
            "val_loss": f"{losses[-1]:.4f}",
            "best": f"{sorted(losses)[0]:.4f}",
            "bits/byte": f"{losses[-1] / math.log(2) / 4:.4f}",
            "seconds": "8.0" if name == "adamw" else "4.0",
            "tokens/s": f"{median(row['train/tok_per_sec'] for row in steps):,.0f}",
            "MFU": "32.00%",
            "load_max/mean": "-" if name == "dense" else f"{steps[-1]['moe/load_max_over_mean']:.2f}",
            "parameters": "1,234,567",
            "active": "765,432",
        }
    assert cells["muon"]["val_loss"] != cells["muon"]["best"] and cells["muon"]["load_max/mean"] == "1.00"

    names = ["val_loss", "step_time", "router_entropy", "adamw_expert_load", "muon_expert_load"]
    paths = [tmp_path / "plots" / f"{name}.png" for name in names]
    assert [line for line in lines[5:] if line.endswith(".png")] == list(map(str, paths))
    assert set((tmp_path / "plots").iterdir()) == set(paths)
    for path in paths:
        image = matplotlib.image.imread(path)
        assert 400 < image.shape[1] < 2500 and 300 < image.shape[0] < 2000 and image[..., :3].std() > 0.03, path
    assert "router_entropy.png leaves out dense: no moe/router_entropy logged" in lines
    assert "dense_expert_load.png leaves out dense: no moe/load logged" in lines
    assert "val_loss.png leaves out empty: no rows yet" in lines


def test_script_shows_the_named_runs_in_their_order(tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        Run(tmp_path, name, config={}, sources=[])
    call_script(monkeypatch, "--experiment-name", "c", "a", "c", "--out_dir", tmp_path)
    table, notes = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["run", "c", "a"], "once each, in the order asked for"
    assert "val_loss.png leaves out c: no rows yet" in notes
    assert list((tmp_path / "plots").iterdir()) == []


def test_unknown_experiment_lists_those_that_exist(tmp_path):
    for name in ("muon", "adamw"):
        Run(tmp_path, name, config={}, sources=[])
    (tmp_path / "plots").mkdir()
    result = subprocess.run(
        [sys.executable, ROOT / "logger.py", "--experiment_name", "moun", "--out_dir", tmp_path],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"error: no experiment 'moun' below {tmp_path}; there are: adamw, muon\n"


def test_script_without_runs_and_with_a_wrong_flag(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no runs below"):
        call_script(monkeypatch, "--out_dir", tmp_path / "nowhere")
    with pytest.raises(SystemExit) as error:
        call_script(monkeypatch, "--out", tmp_path)  # an abbreviation
    assert error.value.code == 2 and "unrecognized arguments: --out" in capsys.readouterr().err


def test_import_needs_the_standard_library_only():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import logger; "
        "print({'torch', 'numpy', 'matplotlib', 'tqdm', 'tools', 'model', 'data', 'train_muon'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_one_row_is_enough_for_every_plot(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "young", steps=1)
    metrics = tmp_path / "young/metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:2]))
    call_script(monkeypatch, "--out_dir", tmp_path)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    """The lock of a living process holds; that of a killed one does not."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(logger.__file__).parent)!r})
from logger import Run
run = Run({str(tmp_path)!r}, "held", config={{}}, sources=[])
print("ready", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        before = {path: path.read_bytes() for path in (tmp_path / "held").iterdir()}
        with pytest.raises(UserError, match=r"another process is writing .*held.*--experiment_name"):
            Run(tmp_path, "held", config={}, sources=[], resume_step=0)
        assert {path: path.read_bytes() for path in (tmp_path / "held").iterdir()} == before
    finally:
        process.kill()
        process.wait()
    Run(tmp_path, "held", config={}, sources=[], resume_step=0).close()


def test_sync_brings_both_files_onto_the_disk(tmp_path, monkeypatch):
    run, synced = Run(tmp_path, "muon", config={}, sources=[]), []
    run.log({"step": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    run.sync()
    assert sorted(synced) == sorted((tmp_path / "muon" / name).stat().st_ino for name in ("run.log", "metrics.jsonl"))
    Run(tmp_path, "other", config={}, sources=[], active=False).sync()  # nothing to do on other ranks


# -----------------------------------------------------------------------------
# Damaged and unusual runs


def rows_written(folder, name: str, *rows):
    with Run(folder, name, config={"hyperparameters": {"num_iterations": 4}}, sources=[]) as run:
        for row in rows:
            run.log(row)
    return logger.read_run(folder / name)


def test_a_run_that_ends_in_nan_is_not_shown_with_the_loss_before(tmp_path):
    run = rows_written(
        tmp_path,
        "odd",
        {"step": 2, "val/loss": 2.0, "val/bpb": 1.0},
        {"step": 4, "val/loss": math.nan, "val/bpb": math.nan},
    )
    titles, cells = logger.table_rows([run])
    assert [cells[titles.index(title)] for title in ("val loss", "best", "bits/byte")] == ["nan", "2.0000", "nan"]


@pytest.mark.parametrize(
    "content", (b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b"{"), ids=("bytes", "list", "null", "deep", "torn")
)
def test_a_damaged_configuration_is_one_sentence(tmp_path, content):
    rows_written(tmp_path, "muon", {"step": 1})
    (tmp_path / "muon" / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is no JSON object .*; restore it or delete it"):
        logger.read_run(tmp_path / "muon")


def test_a_line_that_the_terminal_cannot_show_is_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with Run(tmp_path, "muon", config={}, sources=[]) as run:
        run.print("π")
    assert "π" in (tmp_path / "muon" / "run.log").read_text() and sys.stdout.buffer.getvalue().endswith(b"?\n")
