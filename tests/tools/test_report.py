"""tools/report.py: the numbers of the page and --follow; and the sinks of logger.py. The page: test_page.py.

CPU, no network: `pytest tests/tools/test_report.py`. Tests of the sinks need their packages and are skipped without
(`pip install tensorboard wandb`)."""

import errno
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import logger  # noqa: E402
from cli import UserError  # noqa: E402
from logger import Run  # noqa: E402
from tools import generate, report  # noqa: E402
from tools.routes import how_to_get_routes, write_analysis  # noqa: E402
from tools.show import show_runs  # noqa: E402

LAYERS, EXPERTS = 3, 4


def share(step: int, of: int) -> np.ndarray:
    """(layers, experts): uneven at first, even at the end; layer 2 the most so."""
    score = np.arange(1, LAYERS + 1)[:, None] * (1 - step / of) * np.arange(EXPERTS)
    return np.exp(score) / np.exp(score).sum(1, keepdims=True)


def write_run(
    out_dir, name, steps=40, seed=0, n_layer=4, sample="def f(x):|> return x", end=True, dense=False, shift=0.0,
    norms=False, compressors=None, data="data/python", **kwargs
):  # fmt: skip
    rng, rows = np.random.default_rng(seed), []
    for step in range(steps + 1):
        clock = {"step": step, "train_time": 0.2 * step, "train/flops": 1e9 * step}
        if step:
            row = clock | {
                "train/loss": 5.5 - 0.05 * step + 0.1 * rng.random(),
                "train/tok_per_sec": 1000.0 + step,
                "train/mfu": 0.3,
                "memory/peak_bytes": 10**9 + step,
                "time/forward": 0.1,
                "train/balance_loss": 1.0,
            }
            if norms and step % 10 == 0:
                row |= {"norm/grad/matrix": 2.0 + step, "norm/update/matrix": 0.1, "norm/grad/embed": 1.0}
            rows.append(
                row
                if dense
                else row | {"moe/load": share(step, steps), "moe/router_entropy": 0.9, "moe/load_max_over_mean": 1.5}
            )
        if step % 10 == 0:
            rows.append(clock | {"val/loss": 5.5 - 0.05 * step, "val/bpb": 3 - 0.02 * step + shift})
    if end:
        end_row = {"step": steps, "event": "end", "memory/peak_bytes": 10**9} | (compressors or {})
        rows.append(end_row | ({"sample/text": sample} if sample else {}))
    config = {
        "experiment_name": name,
        "optimizer": "muon",
        "model": {"n_layer": n_layer, "n_embd": 32},
        "parameters": {"total": 1234, "active": 567},
        "hyperparameters": {"num_iterations": steps, "seed": seed, "data": data},
    }
    with Run(out_dir, name, config=config, sources=[], **kwargs) as run:
        for row in rows:
            run.log(row)
        return run.flush()


def write_routes(folder):
    expert_LTK = np.stack(
        [np.stack([np.arange(60) % 4, (np.arange(60) + 1 + layer) % 4], 1) for layer in range(LAYERS)]
    )
    np.savez(folder / "routes.npz", expert_LTK=expert_LTK, experts=EXPERTS, layers=0, identities=0)


def script(*words, expect=0):
    done = subprocess.run(
        [sys.executable, ROOT / "logger.py", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stderr
    return done


# -----------------------------------------------------------------------------
# The numbers of the page


@pytest.mark.slow
def test_long_runs_are_averaged_and_fifty_runs_stay_small(tmp_path):
    for i in range(50):
        write_run(tmp_path, f"run{i:02}", steps=600, seed=i, sample="x" * 1000)
    runs = [logger.read_run(path) for path in sorted(tmp_path.iterdir())]
    numbers = report.page_data(runs, tmp_path, tmp_path / "plots/report.html")
    assert len(json.dumps(numbers)) < 12e6
    part = next(part for part in numbers["runs"][7]["parts"] if "train/loss" in part["y"])
    x, y = np.array(part["x"]["step"]), np.array(part["y"]["train/loss"])
    assert 60 <= len(x) <= 400 and x[0] <= 2 and x[-1] == 600
    assert np.abs(y - (5.5 - 0.05 * x + 0.05)).max() < 0.06, "each point lies where its rows lie"
    assert (
        len(part["x"]["step"]) == len(part["x"]["seconds"]) == len(part["x"]["flops"]) == len(part["y"]["train/loss"])
    )
    load = numbers["runs"][7]["load"]
    assert (
        load["step"][-1] == 600
        and np.allclose(np.sum(load["share"], -1), 1, atol=1e-3)
        and 2 <= len(load["step"]) <= 600
    )


def test_a_value_that_is_missing_ends_no_curve(tmp_path):
    with Run(tmp_path, "odd", config={}, sources=[]) as run:
        for step in range(4):
            loss = math.nan if step == 2 else 1.0 - step
            run.log({"step": step, "train_time": 1.0 * step, "train/loss": loss, "word": "x", "moe/load": []})
    numbers = report.page_data([logger.read_run(tmp_path / "odd")], tmp_path, tmp_path / "report.html")
    (part,) = [part for part in numbers["runs"][0]["parts"] if "train/loss" in part["y"]]
    assert part == {"x": {"step": [0, 1, 3], "seconds": [0, 1, 3]}, "y": {"train/loss": [1, 0, -2]}}
    assert numbers["runs"][0]["load"] is None and numbers["curves"] == [("train/loss", report.CURVES["train/loss"])]


def test_a_missing_plotly_is_named(tmp_path, monkeypatch):
    write_run(tmp_path, "muon")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match="pip install plotly"):
        report.write_report([logger.read_run(tmp_path / "muon")], tmp_path, tmp_path / "report.html")


# -----------------------------------------------------------------------------
# --follow


def test_the_status_of_a_run(tmp_path):
    write_run(tmp_path, "muon", steps=40, end=False)
    run = logger.read_run(tmp_path / "muon")
    run["rows"] = [row for row in run["rows"] if row["step"] <= 10]
    lines = report.format_status(run)
    assert lines[0] == "muon  step 10/40  0:02 of training, about 0:06 left"
    assert re.fullmatch(r"  training loss +5\.\d{4}  [▁▂▃▄▅▆▇█]{10}", lines[1]) and re.fullmatch(
        r"  bits per byte +2\.8000  █▁", lines[2]
    )
    assert (
        report.sparkline([1, 1]) == "▁▁"
        and report.sparkline(list(range(8))) == report.BARS
        and len(report.sparkline(list(range(999)))) == 40
    )
    assert [report.format_duration(seconds) for seconds in (0, 59.6, 3599, 3600, 86399)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "23:59:59",
    ]


@pytest.mark.parametrize("terminal", (False, True))
def test_following_ends_with_the_run(tmp_path, terminal, monkeypatch, capsys):
    def write():
        with Run(tmp_path, "muon", config={"hyperparameters": {"num_iterations": 30}}, sources=[]) as run:
            started.set()
            for step in range(31):
                run.log(
                    {"step": step, "train_time": 1.0 * step, "train/loss": 3.0 - 0.1 * step}
                    | ({"val/loss": 3.0} if step % 15 == 0 else {})
                )
                time.sleep(0.01)
            run.log({"step": 30, "event": "end"})

    started, writer = threading.Event(), threading.Thread(target=write)
    writer.start()
    started.wait()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    report.follow(tmp_path / "muon", poll_seconds=0.02, patience=60)
    writer.join()
    out = capsys.readouterr().out
    assert "muon  step 30/30  0:30 of training" in out.splitlines()[-2] and "training loss" in out.splitlines()[-1]
    assert ("\x1b[2A\x1b[J" in out) == terminal
    if not terminal:
        assert len(re.findall("^muon", out, re.M)) <= 4, "a block for each evaluation, and the end"


def test_following_a_run_that_was_killed_says_so(tmp_path, capsys):
    write_run(tmp_path, "muon", end=False)
    report.follow(tmp_path / "muon", poll_seconds=0.02, patience=0.1)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"no process is writing {tmp_path}/muon: the run was stopped; continue it with --resume"
    )
    run = Run(tmp_path, "alive", config={}, sources=[])
    assert report.is_locked(run.path)
    run.close()
    assert not report.is_locked(run.path)


def test_follow_from_the_command_line(tmp_path):
    write_run(tmp_path, "muon")
    assert "step 40/40" in script("--out_dir", tmp_path, "--follow").stdout
    write_run(tmp_path, "adamw")
    assert "--follow shows one run" in script("--out_dir", tmp_path, "--follow", expect=1).stderr
    assert "adamw  step 40/40" in script("--out_dir", tmp_path, "--experiment_name", "adamw", "--follow").stdout


def test_following_parses_only_rows_that_are_new(tmp_path, monkeypatch):
    write_run(tmp_path, "muon", steps=40, end=False)
    folder, parsed, parse = tmp_path / "muon", [], json.loads
    monkeypatch.setattr(logger.json, "loads", lambda text: parsed.append(text) or parse(text))
    reader, status = logger.RunReader(folder), report.Status()
    assert reader.read() == logger.read_run(folder) and status.update(reader.read())[0].startswith("muon  step 40/40")
    parsed.clear()
    with open(folder / "metrics.jsonl", "a") as file:
        for number, text in enumerate(('{"step": 41, "train/loss": 1.5}\n', '{"step": 42, ', '"event": "end"}\n')):
            file.write(text)
            file.flush()
            lines = status.update(reader.read())
            assert status.ended == (number == 2)
    assert [text for text in parsed if '"step"' in text] == ['{"step": 41, "train/loss": 1.5}', '{"step": 42, "event": "end"}']
    assert "1.5000" in lines[1] and lines[0].startswith("muon  step 42/40")
    assert lines == report.format_status(logger.read_run(folder))


def test_following_starts_over_when_a_resumed_run_replaces_its_rows(tmp_path):
    write_run(tmp_path, "muon", steps=40)
    reader, status = logger.RunReader(tmp_path / "muon"), report.Status()
    status.update(reader.read())
    assert status.ended
    kept = [row for row in reader.rows if row["step"] <= 20 and "event" not in row]
    logger.write_text(tmp_path / "muon/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    assert status.update(reader.read())[0].startswith("muon  step 20/40") and not status.ended
    assert status.columns["step"] == [row["step"] for row in kept]


# -----------------------------------------------------------------------------
# A damaged run beside others


DAMAGES = {
    "garbage": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n\n{}\n"),
    "text for a number": lambda run: (run / "metrics.jsonl").write_text('{"step": "x"}\n{}\n'),
    "a list": lambda run: (run / "metrics.jsonl").write_text("[1]\n{}\n"),
    "a folder": lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
    "half a configuration": lambda run: (run / "config.json").write_text('{"a":'),
    "another configuration": lambda run: (run / "config.json").write_text('{"parameters": 3}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_log_is_named_and_stops_no_other(damage, tmp_path, capsys):
    for name in ("bad", "good"):
        write_run(tmp_path, name)
    damage(tmp_path / "bad")
    show_runs(logger.parse(["--out_dir", str(tmp_path), "--html"]))
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if line][:2] == ["run", "good"]
    assert "note: left out, as " in err and str(tmp_path / "bad") in err
    assert (tmp_path / "plots/report.html").exists()
    report.follow_report(lambda: [tmp_path / "bad", tmp_path / "good"], tmp_path, tmp_path / "live.html", 0.01)
    assert '"about":"1 run below' in (tmp_path / "live.html").read_text()
    with pytest.raises(UserError, match="bad"):
        show_runs(logger.parse(["--out_dir", str(tmp_path), "--experiment_name", "bad"]))


@pytest.mark.parametrize("content", [b"half a file", b"", "without arrays"], ids=str)
def test_a_damaged_routes_file_is_named_and_stops_no_other(content, tmp_path, capsys):
    for name in ("bad", "good"):
        write_run(tmp_path, name)
        write_routes(tmp_path / name)
    if content == "without arrays":
        np.savez(tmp_path / "bad/routes.npz", expert_LTK=np.zeros((2, 3)), layers=0)
    else:
        (tmp_path / "bad/routes.npz").write_bytes(content)
    runs = [logger.read_run(tmp_path / name) for name in ("bad", "good")]
    bad, good = report.page_data(runs, tmp_path, tmp_path / "report.html")["runs"]
    assert bad["coactivation"] is None and good["coactivation"] is not None
    assert "note: no routes of bad, as " in capsys.readouterr().err
    show_runs(logger.parse(["--out_dir", str(tmp_path), "--routes"]))
    out, err = capsys.readouterr()
    assert "good_routes.json" in out and "bad_routes.json" not in out
    assert f"note: left out, as {tmp_path}/bad/routes.npz" in err


def test_the_command_for_missing_routes_of_a_mixture_has_one_of_its_domains(tmp_path):
    for name in ("birds", "greek"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "meta.json").write_text("{}")
    said = how_to_get_routes(tmp_path / "run", {"hyperparameters": {"data": str(tmp_path / "mine")}})
    assert f"--data {tmp_path}/mine/birds`" in said


def test_the_command_for_missing_routes_is_that_of_the_run(tmp_path):
    write_run(tmp_path, "my run", data="data/my notes")
    folder = tmp_path / "my run"
    command = (f"python model.py --checkpoint '{folder}/checkpoint' --routes '{folder}/routes.npz' "
               "--data 'data/my notes'")  # fmt: skip
    (entry,) = report.page_data([logger.read_run(folder)], tmp_path, tmp_path / "report.html")["runs"]
    assert f"`{command}`" in entry["how_to_get_routes"]
    with pytest.raises(UserError) as error:
        write_analysis(folder, tmp_path / "plots")
    assert f"`{command}`" in str(error.value)
    words = shlex.split(command)[2:]
    assert str(generate.parse(words)["routes"]) == f"{folder}/routes.npz"


def test_a_sparkline_leaves_out_what_is_not_finite():
    assert report.sparkline([1.0, math.nan, math.inf, 2.0]) == "▁█"


def test_a_run_is_locked_while_open_and_where_locks_are_unknown(tmp_path, monkeypatch):
    import fcntl

    folder = tmp_path / "muon"
    assert not report.is_locked(folder)
    with Run(tmp_path, "muon", config={}, sources=[]):
        assert report.is_locked(folder)
    assert not report.is_locked(folder)

    def refuse(file, how):
        raise OSError(errno.EBADF if how & fcntl.LOCK_EX else errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert report.is_locked(folder), "a living run must not be called stopped"


# -----------------------------------------------------------------------------
# Sinks


def test_tensorboard_gets_the_same_rows_and_a_resumed_run_replaces_the_later_ones(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = write_run(tmp_path, "muon", steps=20, sinks=["tensorboard"])
    with Run(tmp_path, "muon", config={"a": 1}, sources=[], resume_step=10, sinks=["tensorboard"]) as run:
        for step in range(11, 16):
            run.log({"step": step, "train/loss": 100.0 + step, "moe/load": [[0.25, math.nan, 0.75]]})
    events = EventAccumulator(str(tmp_path / "muon/tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [value for step, value in found if step <= 10] == pytest.approx(
        [row["train/loss"] for row in rows if "train/loss" in row][:10], rel=1e-5
    )
    assert [pair for pair in found if pair[0] > 10] == [(step, 100.0 + step) for step in range(11, 16)]
    assert {key for row in rows for key, value in row.items() if isinstance(value, float)} <= set(
        events.Tags()["scalars"]
    )
    assert (
        events.Histograms("moe/load")[-1].histogram_value.num == 2
        and "sample/text/text_summary" in events.Tags()["tensors"]
    )


class FakeWandb(types.ModuleType):
    """The part of wandb that the sink calls; records the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.logged, self.Error = [], [], RuntimeError
        self.Histogram = lambda values: ("histogram", tuple(values))

    def init(self, **how):
        self.calls.append(how)
        return types.SimpleNamespace(
            log=lambda row, step: self.logged.append((step, row)), finish=lambda: self.calls.append("finish")
        )


def test_wandb_gets_the_same_rows_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    rows = write_run(tmp_path, "muon", steps=12, sinks=["wandb"])
    assert [step for step, _ in fake.logged] == [row["step"] for row in rows]
    for (_, sent), row in zip(fake.logged, rows):
        assert {key: value for key, value in sent.items() if key != "moe/load"} == {
            key: value for key, value in row.items() if key != "moe/load"
        }
        assert sent.get("moe/load") == (("histogram", tuple(np.ravel(row["moe/load"]))) if "moe/load" in row else None)
    Run(tmp_path, "muon", config={}, sources=[], resume_step=12, sinks=["wandb"]).close()
    Run(tmp_path, "other", config={}, sources=[], sinks=["wandb"]).close()
    started = [call for call in fake.calls if call != "finish"]
    assert len(fake.calls) == 6 and [call["name"] for call in started] == ["muon", "muon", "other"]
    assert started[0]["id"] == started[1]["id"] != started[2]["id"] and started[0]["config"]["model"]["n_layer"] == 4


def test_a_wandb_that_does_not_start_is_one_sentence_and_leaves_the_name_free(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())

    def init(**how):
        raise fake.Error("no API key configured")

    fake.init = init
    with pytest.raises(UserError, match="wandb does not start .no API key configured.; mend that"):
        Run(tmp_path, "muon", config={}, sources=[], sinks=["wandb"])
    Run(tmp_path, "muon", config={}, sources=[]).close()


@pytest.mark.slow
def test_wandb_itself_takes_it_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    code = f"from test_report import write_run; write_run({str(tmp_path)!r}, 'muon', sinks=['wandb'])"
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, env=env
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "muon/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("package", list(logger.SINKS))
def test_a_missing_package_is_named_before_anything_is_written(package, tmp_path):
    module = logger.SINKS[package][1]
    hide = f"import sys; sys.modules['{module}'] = None; import train_muon; train_muon.main(train_muon.MUON)"
    words = ["--preset", "cpu", "--data", "nowhere", "--out_dir", tmp_path / "logs", f"--{package}"]
    done = subprocess.run([sys.executable, "-c", hide, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and f"pip install {package}" in done.stderr
    assert not (tmp_path / "logs").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"pip install {package}"):
        patch.setitem(sys.modules, logger.SINKS[package][1], None)
        Run(tmp_path, "muon", config={}, sources=[], sinks=[package])
    assert not (tmp_path / "muon").exists()


def test_a_run_without_sinks_imports_no_sink_package(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import logger; "
        f"logger.Run({str(tmp_path)!r}, 'a', config={{}}, sources=[]).close(); "
        "print({'wandb', 'tensorboard', 'plotly', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
