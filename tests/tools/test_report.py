"""tools/report.py, the page of logger.py --html in a headless browser and --follow, and the sinks of logger.py.

CPU, no network: `pytest tests/tools/test_report.py`. Tests of the page need Chromium, chromedriver and selenium,
those of the sinks their packages. They are skipped without (`apt-get install chromium chromium-driver`,
`pip install selenium tensorboard wandb`)."""

import errno
import json
import math
import os
import re
import shutil
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
from tools import report  # noqa: E402

LAYERS, EXPERTS = 3, 4


def share(step: int, of: int) -> np.ndarray:
    """(layers, experts): uneven at first, even at the end; layer 2 the most so."""
    score = np.arange(1, LAYERS + 1)[:, None] * (1 - step / of) * np.arange(EXPERTS)
    return np.exp(score) / np.exp(score).sum(1, keepdims=True)


def write_run(
    out_dir, name, steps=40, seed=0, n_layer=4, sample="def f(x):|> return x", end=True, dense=False, **kwargs
):
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
            rows.append(
                row
                if dense
                else row | {"moe/load": share(step, steps), "moe/router_entropy": 0.9, "moe/load_max_over_mean": 1.5}
            )
        if step % 10 == 0:
            rows.append(clock | {"val/loss": 5.5 - 0.05 * step, "val/bpb": 3 - 0.02 * step})
    if end:
        rows.append(
            {"step": steps, "event": "end", "memory/peak_bytes": 10**9} | ({"sample/text": sample} if sample else {})
        )
    config = {
        "experiment_name": name,
        "optimizer": "muon",
        "model": {"n_layer": n_layer, "n_embd": 32},
        "parameters": {"total": 1234, "active": 567},
        "hyperparameters": {"num_iterations": steps, "seed": seed},
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
# The page in a browser


class Page:
    """A report in headless Chromium, without a network."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.resolve().as_uri())

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def set(self, name, value):
        """As a user does: the value, then the event."""
        self.js(
            "const node = document.getElementById(arguments[0]);"
            "node[node.type === 'checkbox' ? 'checked' : 'value'] = arguments[1];"
            "node.dispatchEvent(new Event('input', {bubbles: true}));",
            name,
            value,
        )

    def traces(self, key):
        """{run: (x, y)} of a chart of curves."""
        found = self.js(
            "const chart = document.querySelector(`[data-key='${arguments[0]}']`);"
            "return chart.data.map(trace => [trace.name, Array.from(trace.x), Array.from(trace.y)])",
            key,
        )
        return {name: (x, y) for name, x, y in found}

    def heat(self, name):
        return np.array(self.js("return document.getElementById(arguments[0]).data[0].z", name), float)

    def errors(self):
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no Chromium with chromedriver on this machine: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    yield driver
    driver.quit()


SAMPLE = "<!-- <script> </script><b id=bold>|> π"  # possible output of a model of web text


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "logs"
    rows = {"muon": write_run(folder, "muon", sample=SAMPLE), "adamw": write_run(folder, "adamw", seed=1, n_layer=6),
            "dense": write_run(folder, "dense", dense=True, sample=None)}  # fmt: skip
    write_routes(folder / "muon")
    done = script("--out_dir", folder, "--html", "--experiment_name", "muon", "adamw", "dense")
    assert done.stdout.splitlines()[-1] == str(folder / "plots/report.html") and "bits/byte" in done.stdout
    return folder, rows


@pytest.fixture
def page(driver, logs):
    page = Page(driver, logs[0] / "plots/report.html")
    yield page
    assert page.errors() == []


def test_the_page_holds_the_runs_their_curves_and_links_to_their_logs(page, logs):
    folder, rows = logs
    table = page.js(
        "return [...document.querySelectorAll('#runs tbody tr')]"
        ".map(tr => [...tr.cells].map(td => td.innerText.trim()))"
    )
    assert [cells[0] for cells in table] == ["muon", "adamw", "dense"] and all("2.2000" in cells for cells in table)
    links = page.js("return [...document.querySelectorAll('#runs a')].map(a => a.getAttribute('href'))")
    files = {(folder / "plots" / link).resolve().relative_to(folder.resolve()).as_posix() for link in links}
    assert files == {f"{run}/{name}" for run in rows for name in ("run.log", "metrics.jsonl", "config.json")}
    assert all((folder / name).exists() for name in files)
    titles = page.js("return [...document.querySelectorAll('#curves .chart')].map(div => div.layout.title.text)")
    assert titles == list(report.CURVES.values())
    for name, (x, y) in page.traces("val/bpb").items():
        assert x == [0, 10, 20, 30, 40] and y == pytest.approx(
            [row["val/bpb"] for row in rows[name] if "val/bpb" in row], rel=1e-4
        )
    assert list(page.traces("moe/router_entropy")) == ["muon", "adamw"]
    assert page.js("return performance.getEntriesByType('resource').length") == 0, "it loads nothing"
    assert page.js("return document.querySelectorAll('.js-plotly-plot .trace').length") > 20, "and it is drawn"


def test_the_axis_the_smoothing_and_the_scale_change_the_curves(page, logs):
    rows = [row for row in logs[1]["muon"] if "train/loss" in row]
    for axis, key in (("seconds", "train_time"), ("flops", "train/flops"), ("step", "step")):
        page.set("axis", axis)
        x, y = page.traces("train/loss")["muon"]
        assert x == pytest.approx([row[key] for row in rows], rel=1e-4) and y == pytest.approx(
            [row["train/loss"] for row in rows], rel=1e-4
        )
    page.set("smoothing", 0.9)
    smooth = page.traces("train/loss")["muon"][1]
    weight = np.array([[0.9 ** (i - j) * (j <= i) for j in range(40)] for i in range(40)])
    assert smooth == pytest.approx((weight / weight.sum(1, keepdims=True) @ np.array(y)).tolist(), rel=1e-4)
    assert page.traces("val/bpb")["muon"][1] == pytest.approx(
        [row["val/bpb"] for row in logs[1]["muon"] if "val/bpb" in row], rel=1e-4
    )
    for logarithmic, scales in ((False, ["linear", "linear"]), (True, ["log", "linear"])):
        page.set("logarithmic", logarithmic)
        both = (
            "return ['train/loss', 'train/tok_per_sec']"
            ".map(key => document.querySelector(`[data-key='${key}']`).layout.yaxis.type)"
        )
        assert page.js(both) == scales


def test_a_run_can_be_hidden(page):
    page.js("document.querySelectorAll('#runs input')[1].click()")
    assert list(page.traces("val/bpb")) == ["muon", "dense"]
    page.js("document.querySelectorAll('#runs input')[1].click()")
    assert list(page.traces("val/bpb")) == ["muon", "adamw", "dense"]


def test_dragging_zooms_until_a_double_click(page):
    from selenium.webdriver import ActionChains

    chart = page.driver.find_element("css selector", "[data-key='train/loss']")
    page.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    plot = chart.find_element("css selector", ".nsewdrag")
    range_of = lambda: page.js("return arguments[0].layout.xaxis.range", chart)
    whole = range_of()
    ActionChains(page.driver).move_to_element_with_offset(plot, -50, -40).click_and_hold().move_by_offset(
        90, 80
    ).release().perform()
    low, high = range_of()
    assert whole[0] < low < high < whole[1] and high - low < 0.6 * (whole[1] - whole[0])
    page.set("smoothing", 0.5)
    assert range_of() == [low, high], "smoothing keeps the zoom"
    page.js("Plotly.relayout(arguments[0], {'xaxis.autorange': true, 'yaxis.autorange': true})", chart)
    assert range_of() == pytest.approx(whole)


def test_the_slider_walks_through_the_load(page):
    assert page.js("return [...document.querySelectorAll('#which option')].map(o => o.innerText)") == ["muon", "adamw"]
    for frame in (0, 17, 39):
        page.set("time", frame)
        assert page.heat("load") == pytest.approx(share(frame + 1, 40) * EXPERTS, abs=1e-3)
        assert page.js("return document.querySelector('#time').nextElementSibling.innerText") == str(frame + 1)
    page.js("document.getElementById('layer').selectedIndex = 2")
    page.set("layer", "2")
    assert page.heat("history") == pytest.approx(
        np.stack([share(step, 40)[2] * EXPERTS for step in range(1, 41)], 1), abs=1e-3
    )


def test_experts_that_are_met_together(page):
    page.set("layer", "1")
    both = page.heat("coactivation")  # layer 1: experts i and i + 2
    assert np.isnan(np.diag(both)).all() and both[0, 2] == pytest.approx(0.5) and both[0, 1] == 0
    page.js("document.getElementById('which').selectedIndex = 1")
    page.set("which", "adamw")
    hidden = page.js(
        "return [document.getElementById('coactivation').hidden, document.getElementById('no_routes').innerText]"
    )
    assert hidden[0] and "model.py --checkpoint" in hidden[1]


def test_differences_and_samples(page):
    rows = page.js(
        "return [...document.querySelectorAll('#differences tbody tr')]"
        ".map(tr => [...tr.cells].map(td => td.innerText))"
    )
    assert rows == [["model.n_layer", "4", "6", "4"], ["hyperparameters.seed", "0", "1", "0"]]
    samples = page.js("return [...document.querySelectorAll('#samples pre')].map(p => p.innerText)")
    assert samples == [SAMPLE, "def f(x):|> return x"]
    assert page.js("return document.getElementById('bold')") is None
    before = page.js("return document.querySelectorAll('#others .js-plotly-plot').length")
    page.js("document.getElementById('others').open = true")
    time.sleep(0.3)
    assert before == 0 and list(page.traces("time/forward")) == ["muon", "adamw", "dense"]


def test_light_dark_and_a_narrow_screen(page):
    looks = {}
    for scheme in ("light", "dark", "light"):
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        time.sleep(0.3)
        looks[scheme] = page.js(
            "const chart = document.querySelector('#curves .chart');"
            "return [getComputedStyle(document.body).backgroundColor, chart.layout.font.color]"
        )
    assert looks == {"light": ["rgb(255, 255, 255)", "#1f2328"], "dark": ["rgb(20, 23, 27)", "#e4e8ed"]}
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    )
    page.driver.refresh()
    widths = page.js(
        "return [document.documentElement.scrollWidth, innerWidth,document.querySelector('#curves .chart').clientWidth]"
    )
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths[0] <= widths[1] == 360 and 300 < widths[2] <= 360


def test_one_run_and_fifty(driver, tmp_path):
    write_run(tmp_path / "one", "muon", sample=None)
    script("--out_dir", tmp_path / "one", "--html")
    page = Page(driver, tmp_path / "one/plots/report.html")
    there = page.js(
        "return ['differences', 'samples', 'experts', 'curves'].map(id => document.getElementById(id) !== null)"
    )
    assert there == [False, False, True, True] and list(page.traces("val/bpb")) == ["muon"] and page.errors() == []
    for i in range(50):
        write_run(tmp_path / "many", f"run{i:02}", seed=i)
    script("--out_dir", tmp_path / "many", "--html")
    page = Page(driver, tmp_path / "many/plots/report.html")
    assert len(page.traces("train/loss")) == 50 and page.errors() == []
    looks = page.js(
        "return new Set(document.querySelector('[data-key=\"train/loss\"]').data"
        ".map(t => t.line.color + t.line.dash)).size"
    )
    assert looks == 32, "eight colours in four dashes"


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
        self.calls, self.logged = [], []
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


def test_wandb_itself_takes_it_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    code = f"from test_report import write_run; write_run({str(tmp_path)!r}, 'muon', sinks=['wandb'])"
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, env=env
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "muon/wandb").glob("offline-run-*/*.wandb"))


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
