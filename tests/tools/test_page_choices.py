"""What a reader of the page chooses: order, filter, hidden runs, groups of seeds, highlight, downloads.

CPU, no network: `pytest tests/tools/test_page_choices.py`. Skipped without Chromium, chromedriver and selenium
(`apt-get install chromium chromium-driver`, `pip install selenium`)."""

import csv
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from browser import Page  # noqa: E402
from test_report import script, write_run  # noqa: E402

from logger import Run  # noqa: E402
from tools import report  # noqa: E402


@pytest.fixture
def seeds(driver, tmp_path):
    """Three seeds of one setting, another setting, and the same settings on other data."""
    compressors = {"val/gzip_bpb": 2.6, "val/xz_bpb": 2.4}
    for seed, (name, shift) in enumerate({"moe_a": 0.0, "moe_b": 0.1, "moe_c": 0.5}.items()):
        more = {"data": f"/disk{seed}/python", "norms": True, "compressors": compressors}
        write_run(tmp_path, name, seed=seed, shift=shift, **more)
    write_run(tmp_path, "deep", n_layer=8, shift=-0.2, compressors=compressors | {"val/xz_bpb": None})
    write_run(tmp_path, "other", data="/mnt/data/web", compressors={"val/gzip_bpb": 3.1})
    with Run(tmp_path, "young", config={"a": 1}, sources=[]) as run:
        run.log({"step": 0, "train_time": 0.0, "train/loss": 9.0})
    script("--out_dir", tmp_path, "--html")
    page = Page(driver, tmp_path / "plots/report.html")
    yield page
    assert page.errors() == []


def test_a_click_on_a_heading_sorts_and_another_turns_the_order(seeds):
    assert seeds.names() == ["deep", "moe_a", "moe_b", "moe_c", "other", "young"]
    column = seeds.visible("#runs th").index("bits/byte")
    for state, names in (("ascending", ["deep", "moe_a", "other", "moe_b", "moe_c", "young"]),
                         ("descending", ["moe_c", "moe_b", "moe_a", "other", "deep", "young"])):  # fmt: skip
        seeds.click("#runs th button", column)
        assert seeds.names() == names, "a run without the number is the last"
        sorts = seeds.js("return [...document.querySelectorAll('#runs th')].map(th => th.getAttribute('aria-sort'))")
        assert {i: sort for i, sort in enumerate(sorts) if sort} == {column: state}
    seeds.click("#runs th button")
    assert seeds.names() == ["deep", "moe_a", "moe_b", "moe_c", "other", "young"]


@pytest.mark.slow
def test_the_filter_takes_names_and_settings_and_all_and_none_act_on_what_it_passes(seeds):
    curves = lambda: list(seeds.traces("train/loss"))
    seeds.set("filter", "MOE")
    assert seeds.names() == curves() == ["moe_a", "moe_b", "moe_c"]
    seeds.click("#none")
    assert seeds.names() == ["moe_a", "moe_b", "moe_c"] and curves() == []
    seeds.set("filter", "")
    assert curves() == ["deep", "other", "young"]
    seeds.set("filter", "moe seed=1")
    seeds.click("#all")
    seeds.set("filter", "n_layer=4 ")
    assert seeds.names() == ["moe_a", "moe_b", "moe_c", "other"] and curves() == ["moe_b", "other"]
    seeds.set("filter", "nothing is called this")
    assert seeds.names() == curves() == [] and seeds.visible("#which option, #samples pre, #differences td") == []


@pytest.mark.slow
def test_a_hidden_run_is_hidden_everywhere(seeds):
    everywhere = lambda: (list(seeds.traces("train/loss")), seeds.visible("#differences th")[1:],
                          seeds.visible("#which option"), seeds.visible("#samples p"))  # fmt: skip
    names = ["deep", "moe_a", "moe_b", "moe_c", "other"]
    assert everywhere() == ([*names, "young"], [*names, "young"], names, names)
    assert "model.n_layer" in seeds.visible("#differences td")
    for row in (0, 5):
        seeds.click("#runs input", row)
    assert everywhere() == (names[1:],) * 4
    assert "model.n_layer" not in seeds.visible("#differences td"), "the shown runs differ in it no more"
    assert seeds.js("return [...document.querySelectorAll('#runs tbody tr')].map(tr => tr.className)") == [
        "off", "", "", "", "", "off"]  # fmt: skip


def test_seeds_of_one_setting_become_a_mean_and_a_band(seeds):
    singles = {name: np.array(seeds.traces("train/loss")[name][1]) for name in ("moe_a", "moe_b", "moe_c")}
    seeds.set("grouped", True)
    row = seeds.table()[1]
    assert seeds.names() == ["deep", "moe_a (3 seeds)", "other", "young"]
    deviation = statistics.stdev([2.2, 2.3, 2.7])
    assert row[4] == f"2.4000 ± {deviation:.4f}" and row[1] == "40"
    traces = seeds.traces("train/loss")
    values = np.stack(list(singles.values()))
    mean, deviations = values.mean(0), values.std(0, ddof=1)
    assert traces["moe_a (3 seeds)"][1] == pytest.approx(mean.tolist())
    assert traces["moe_a (3 seeds), low"][1] == pytest.approx((mean - deviations).tolist())
    assert traces["moe_a (3 seeds), high"][1] == pytest.approx((mean + deviations).tolist())
    assert traces.keys() >= {"deep", "other", "young"} and "moe_b" not in traces
    seeds.set("filter", "seed=0")  # hides two of the seeds, and one alone has no band
    assert seeds.names() == ["deep", "moe_a", "other"] and "moe_a, low" not in seeds.traces("train/loss")
    seeds.set("filter", "")
    seeds.click("#runs input", 1)
    assert list(seeds.traces("train/loss")) == ["deep", "other", "young"]
    seeds.set("grouped", False)
    assert list(seeds.traces("train/loss")) == ["deep", "other", "young"]


@pytest.mark.slow
def test_seeds_that_are_not_equally_long_are_averaged_up_to_the_end_of_the_shortest(driver, tmp_path):
    for seed, last in enumerate((20, 30)):
        with Run(tmp_path, f"s{seed}", config={"seed": seed, "n_layer": 4}, sources=[]) as run:
            for step in range(0, last + 1, 10 // (seed + 1)):
                run.log({"step": step, "train_time": (2.0 + 2 * seed) * step, "train/loss": 1.0 + 2 * seed + step})
    script("--out_dir", tmp_path, "--html")
    page = Page(driver, tmp_path / "plots/report.html")
    page.set("grouped", True)
    assert page.traces("train/loss")["s0 (2 seeds)"] == ([0, 5, 10, 15, 20], [2, 7, 12, 17, 22])
    page.set("axis", "seconds")
    assert page.traces("train/loss")["s0 (2 seeds)"] == ([0, 15, 30, 45, 60], [2, 7, 12, 17, 22])


def test_a_run_under_the_pointer_stands_out_in_the_table_and_in_the_curves(seeds):
    from selenium.webdriver import ActionChains

    looks = lambda: seeds.js(
        "const chart = document.querySelector('[data-key=\"train/loss\"]');"
        "return [...chart.querySelectorAll('.scatterlayer .trace')].map(g => [g.__data__[0].trace.name,"
        " getComputedStyle(g).opacity, getComputedStyle(g.querySelector('.js-line')).strokeWidth])"
    )
    lit = lambda: seeds.visible("#runs tr.lit td:first-child")
    normal = [[name, "1", "1.7px"] for name in ("deep", "moe_a", "moe_b", "moe_c", "other", "young")]
    assert looks()[:5] == normal[:5] and lit() == []
    rows = seeds.driver.find_elements("css selector", "#runs tbody tr")
    ActionChains(seeds.driver).move_to_element(rows[2]).perform()
    assert lit() == ["moe_b"]
    assert [name for name, opacity, width in looks() if (opacity, width) == ("1", "3.5px")] == ["moe_b"]
    assert sum(opacity == "0.15" for _, opacity, _ in looks()) == 5
    chart = seeds.driver.find_element("css selector", "[data-key='val/bpb']")
    seeds.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    x, y = seeds.js(  # a point of "deep"
        "const c = arguments[0], {_fullLayout: {xaxis, yaxis}} = c, box = c.getBoundingClientRect();"
        "const [x, y] = [c.data[0].x[3], c.data[0].y[3]];"
        "return [xaxis.d2p(x) + xaxis._offset - box.width / 2, yaxis.d2p(y) + yaxis._offset - box.height / 2]", chart
    )  # fmt: skip
    ActionChains(seeds.driver).move_to_element_with_offset(chart, round(x) + 3, round(y)).pause(0.1).move_by_offset(
        -3, 0).pause(0.3).perform()  # fmt: skip
    assert lit() == ["deep"]
    ActionChains(seeds.driver).move_to_element(seeds.driver.find_element("id", "about")).pause(0.2).perform()
    assert lit() == [] and looks()[:5] == normal[:5]


@pytest.mark.slow
def test_compressors_are_level_lines_in_the_chart_of_bits_per_byte(seeds):
    lines = lambda: {name: xy for name, xy in seeds.traces("val/bpb").items() if name[:2] in ("gz", "xz")}
    assert lines() == {"gzip 2.6000": ([0, 40], [2.6, 2.6]), "xz 2.4000": ([0, 40], [2.4, 2.4]),
                       "gzip 3.1000": ([0, 40], [3.1, 3.1])}  # fmt: skip
    seeds.set("axis", "seconds")
    assert lines()["gzip 2.6000"][0] == [0, 8]
    seeds.set("filter", "other")
    assert list(lines()) == ["gzip 3.1000"]
    assert "val/gzip_bpb" not in seeds.js("return numbers.others.flat()")


@pytest.mark.slow
def test_norms_have_a_chart_for_each_kind_of_parameter_if_they_were_logged(seeds, tmp_path):
    seeds.js("document.getElementById('norms').open = true")
    time.sleep(0.3)
    titles = seeds.js("return [...document.querySelectorAll('#norms .chart')].map(div => div.layout.title.text)")
    assert titles == ["gradient norm, embed", "gradient norm, matrix", "update norm, matrix"]
    assert seeds.traces("norm/grad/matrix")["moe_b"] == ([10, 20, 30, 40], [12, 22, 32, 42])
    assert list(seeds.traces("norm/grad/matrix")) == ["moe_a", "moe_b", "moe_c"]
    script("--out_dir", tmp_path, "--html", "--experiment_name", "deep")
    assert Page(seeds.driver, seeds.path).visible("#norms") == []


@pytest.mark.slow
def test_what_is_shown_downloads_as_csv(seeds, tmp_path):
    def download(button, name):
        seeds.click(button)
        path = tmp_path / "downloads" / name
        for _ in range(100):
            if path.exists():
                break
            time.sleep(0.05)
        return list(csv.reader(path.open()))

    seeds.driver.execute_cdp_cmd("Browser.setDownloadBehavior",
                                 {"behavior": "allow", "downloadPath": str(tmp_path / "downloads")})  # fmt: skip
    seeds.set("grouped", True)
    for row in (0, 3):
        seeds.click("#runs input", row)
    head, *rows = download("#table_csv", "runs.csv")
    assert [row[:2] for row in rows] == [["moe_a (3 seeds)", "3"], ["other", "1"]]
    column = head.index("bits/byte")
    assert head[column + 1] == "bits/byte, standard deviation"
    found = [float(cell) for cell in rows[0][column : column + 2]]
    assert found == pytest.approx([2.4, statistics.stdev([2.2, 2.3, 2.7])])
    seeds.set("axis", "seconds")
    head, *rows = download("#curves_csv", "curves.csv")
    assert head == ["run", "metric", "seconds", "value", "standard deviation"]
    assert {row[0] for row in rows} == {"moe_a (3 seeds)", "other"}
    assert {row[1] for row in rows} == set(report.CURVES) - {"memory/peak_bytes"}, "its last row has no seconds"
    for name in ("moe_a (3 seeds)", "other"):
        found = np.array([row[2:4] for row in rows if row[:2] == [name, "train/loss"]], float)
        np.testing.assert_allclose(found.T, seeds.traces("train/loss")[name])
