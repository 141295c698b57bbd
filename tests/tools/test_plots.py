"""tools/plots.py: the plots show what was logged.

pytest tests/tools/test_plots.py
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from test_logger import write_run  # noqa: E402

from logger import read_run  # noqa: E402
from tools import plots  # noqa: E402


def drawn(plot, *runs):
    from matplotlib.figure import Figure

    figure = Figure()
    plot(figure, [run | {"style": {"color": "red", "linestyle": "-"}} for run in runs])
    figure.canvas.draw()
    return figure


@pytest.fixture
def runs(tmp_path):
    for name, kind in {"muon": {}, "slow": {"slowdown": 20.0, "bits": False}, "dense": {"layers": 0}}.items():
        write_run(tmp_path, name, **kind)
    return {name: read_run(tmp_path / name) for name in ("muon", "slow", "dense")}


def test_val_loss_has_three_clocks_one_unit_and_fitting_axes(runs):
    figure = drawn(plots.plot_val_loss, runs["muon"], runs["dense"])
    assert [ax.get_xlabel() for ax in figure.axes] == ["steps", "training seconds", "active FLOPs"]
    assert "bits per byte" in figure.axes[0].get_ylabel()
    validation = [row for row in runs["muon"]["rows"] if "val/bpb" in row]
    for ax, key in zip(figure.axes, ("step", "train_time", "train/flops")):
        assert ax.get_xscale() == "linear" and ax.get_yscale() == "log"  # 5.0 down to 2.1
        assert list(ax.lines[0].get_xdata()) == [row[key] for row in validation]
        assert list(ax.lines[0].get_ydata()) == [row["val/bpb"] for row in validation]
    final = validation[-1]["val/bpb"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"muon  {final:.4f}", f"dense  {final:.4f}"]

    figure = drawn(plots.plot_val_loss, runs["muon"], runs["slow"])  # slow has no bits, and takes 20 times as long
    assert "nats" in figure.axes[0].get_ylabel()
    assert [ax.get_xscale() for ax in figure.axes] == ["linear", "log", "linear"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [row["val/loss"] for row in validation]

    for row in runs["dense"]["rows"]:
        row.pop("train/flops")
    assert drawn(plots.plot_val_loss, runs["dense"]).axes[2].get_xlabel() == "active FLOPs (not logged)"


def test_step_time_stacks_the_medians(runs):
    ax = drawn(plots.plot_step_time, runs["muon"], runs["slow"]).axes[0]
    assert [bars.get_label() for bars in ax.containers] == ["data", "forward", "optimizer"]
    assert [[round(bar.get_width(), 6) for bar in bars] for bars in ax.containers] == [[1, 1], [30.1, 600.1], [10, 10]]
    assert [round(bar.get_x(), 6) for bar in ax.containers[2]] == [31.1, 601.1]
    assert [text.get_text().strip() for text in ax.texts] == ["41.1 ms", "611.1 ms"]


def test_expert_load_and_entropy_show_what_was_logged(runs):
    import numpy as np

    load = np.array([row["moe/load"] for row in runs["muon"]["rows"] if "moe/load" in row])
    *maps, bar = drawn(plots.plot_expert_load, runs["muon"]).axes
    assert [ax.get_title(loc="left") for ax in maps] == ["MoE layer 0", "MoE layer 1", "MoE layer 2"]
    for layer, ax in enumerate(maps):
        np.testing.assert_allclose(ax.collections[0].get_array(), load[:, layer].T)
    assert [text.get_text() for text in bar.get_yticklabels()] == ["6.25%", "12.5%", "25%", "50%", "100%"]
    line = drawn(plots.plot_router_entropy, runs["muon"]).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata()[-1], 1.0, rtol=1e-6)
    assert line.get_ydata()[0] < 0.8 and len(line.get_ydata()) == 41


def test_long_runs_are_averaged_not_sampled():
    import numpy as np

    values = np.random.default_rng(0).random((1234, 2))
    short = plots.bin_means(values)
    assert short.shape == (300, 2)
    np.testing.assert_allclose(short[0], values[:5].mean(0))
    np.testing.assert_array_equal(plots.bin_means(values[:7]), values[:7])


def test_pictures_are_small_and_keep_their_colours(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    with plots.open_figure(tmp_path / "lines.png") as figure:
        ax = figure.subplots()
        for i, colour in enumerate(plots.COLOURS):
            ax.plot([0, 1], [i, i], color=colour, linewidth=6)
    assert (tmp_path / "lines.png").read_bytes()[25] == 3, "a palette"
    colours = imread(tmp_path / "lines.png")[..., :3].reshape(-1, 3)
    for colour in plots.COLOURS:
        assert abs(colours - to_rgb(colour)).max(1).min() < 0.02, colour
    pictures = [path for folder in ("benchmarks", "records", "docs") for path in (ROOT / folder).rglob("*.png")]
    assert len(pictures) > 5 and max(path.stat().st_size for path in pictures) < 150_000


@pytest.mark.parametrize("name", ["cost $5 and $x^", "_hidden"])
def test_a_name_is_shown_as_it_is_and_not_as_mathematics(name, runs, tmp_path, capsys):
    odd = runs["muon"] | {"name": name}
    figure = drawn(plots.plot_val_loss, odd, runs["dense"])
    (label, _) = (text.get_text() for text in figure.legends[0].get_texts())
    assert label.replace(r"\$", "$").strip().startswith(f"{name}  ")
    plots.write_plots([odd, runs["dense"]], tmp_path / "plots")
    assert {f"{name}_expert_load.png", "val_loss.png", "step_time.png"} <= {p.name for p in (tmp_path / "plots").iterdir()}
