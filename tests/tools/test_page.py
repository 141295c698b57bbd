"""The page of logger.py --html: what it shows, zoom, maps, screens, live refresh, its size and how fast it opens.

CPU, no network: `pytest tests/tools/test_page.py`. Skipped without Chromium, chromedriver and selenium
(`apt-get install chromium chromium-driver`, `pip install selenium`)."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from browser import Page  # noqa: E402
from test_report import EXPERTS, script, share, write_routes, write_run  # noqa: E402

from logger import Run, is_run  # noqa: E402
from tools import report  # noqa: E402

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


@pytest.mark.slow
def test_the_page_follows_runs_and_keeps_zoom_and_choices(driver, tmp_path):
    def log(run, steps):
        for step in steps:
            run.log({"step": step, "train_time": 1.0 * step, "train/loss": 9 - 0.1 * step, "moe/load": share(step, 60)})

    list_folders = lambda: sorted(folder for folder in tmp_path.glob("*") if is_run(folder))
    write_run(tmp_path, "ended")
    run = Run(tmp_path, "going", config={"hyperparameters": {"seed": 1}}, sources=[])
    log(run, range(20))
    path = tmp_path / "plots/report.html"
    follower = threading.Thread(target=report.follow_report, args=(list_folders, tmp_path, path, 0.2))
    follower.start()
    while not (path.exists() and path.with_name("report_data.js").exists()):
        time.sleep(0.05)
    page = Page(driver, path)
    page.set("smoothing", 0.5)
    page.set("filter", "going")
    page.js("Plotly.relayout(document.querySelector('[data-key=\"train/loss\"]'), {'xaxis.range': [5, 12]})")
    page.js("document.body.dataset.mark = 'the same document'")
    page.click("#runs th button")
    assert page.visible("#live") and len(page.traces("train/loss")["going"][0]) == 20

    def wait(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "the page did not reload its data"
            time.sleep(0.1)

    log(run, range(20, 30))
    wait(lambda: len(page.traces("train/loss")["going"][0]) == 30)
    late = Run(tmp_path, "going_2", config={"hyperparameters": {"seed": 2}}, sources=[])
    log(late, range(5))
    wait(lambda: "going_2" in page.names())
    assert follower.is_alive() and page.names() == ["going", "going_2"]
    log(run, range(30, 60))
    for each in (run, late):
        each.log({"step": 60, "event": "end"})
        each.close()
    follower.join(20)
    wait(lambda: page.visible("#live") == [])
    assert not follower.is_alive() and len(page.traces("train/loss")["going"][0]) == 60
    assert page.js("return document.querySelector('[data-key=\"train/loss\"]').layout.xaxis.range") == [5, 12]
    assert page.js("return [filter.value, smoothing.value, sorted.column, time.value, document.body.dataset.mark]") == [
        "going", "0.5", -1, "59", "the same document"]  # fmt: skip
    path.with_name("report_data.js").unlink()
    page = Page(driver, path)
    assert len(page.traces("train/loss")["going"][0]) == 60 and not page.visible("#live") and page.errors() == []


def test_following_ended_runs_writes_the_page_and_an_interrupt_leaves_one_that_waits_for_nothing(tmp_path, monkeypatch):
    write_run(tmp_path, "muon")
    assert "plots/report.html" in script("--out_dir", tmp_path, "--html", "--follow").stdout
    page = tmp_path / "plots/report.html"
    assert '"live":null' in page.read_text()
    with Run(tmp_path, "going", config={}, sources=[]) as run:
        run.log({"step": 0, "train/loss": 1.0})

        def interrupt(seconds):
            assert '"live":{' in page.read_text()
            raise KeyboardInterrupt

        monkeypatch.setattr(report.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            report.follow_report(lambda: [tmp_path / "going"], tmp_path, page)
    assert '"live":null' in page.read_text() and '"live":null' in (tmp_path / "plots/report_data.js").read_text()


@pytest.mark.slow
def test_ten_runs_are_under_6_mb_and_open_within_two_seconds(driver, tmp_path, capsys):
    for seed in range(10):
        write_run(tmp_path, f"run{seed}", steps=1000, seed=seed, norms=True)
    script("--out_dir", tmp_path, "--html")
    path, seconds = tmp_path / "plots/report.html", []
    for _ in range(3):
        began = time.perf_counter()
        page = Page(driver, path)
        assert len(page.traces("train/loss")) == 10 and page.errors() == []
        seconds.append(time.perf_counter() - began)
    megabytes = path.stat().st_size / 1e6
    with capsys.disabled():
        print(f"\nten runs of 1,000 steps: {megabytes:.2f} MB, drawn after {min(seconds):.2f} s (best of 3)")
    assert megabytes < 6 and min(seconds) < 2


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


@pytest.mark.slow
def test_one_run_and_fifty(driver, tmp_path):
    write_run(tmp_path / "one", "muon", sample=None)
    script("--out_dir", tmp_path / "one", "--html")
    page = Page(driver, tmp_path / "one/plots/report.html")
    there = page.js(
        "return ['differences', 'samples', 'experts', 'curves'].map(id => !document.getElementById(id).hidden)"
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
    assert looks == 50, "colour and dashes tell every run from the others"
    assert page.js("return new Set([...document.querySelectorAll('#runs .swatch')].map(s => s.innerHTML)).size") == 50


