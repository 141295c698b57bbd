"""Plots of runs: each plot function fills a matplotlib Figure from runs that logged its metric.

Sections: the plots of `python logger.py`, training, domains, drawing. Array suffixes: S steps, L layers, E experts,
D domains.
"""

import io
import math
from contextlib import contextmanager
from fnmatch import filter as match_keys
from statistics import median

from logger import explain_os_errors, format_metric, get_columns, last, make_folder

COLOURS = "#1f6feb #e5532d #1a9850 #8e44ad #e6a700 #17a2b8 #d6336c #6b4f3a".split()
PHASE_COLOURS = "#c9ced6 #7fb3ff #1f6feb #e5532d #f2b134 #1a9850 #8e44ad".split()
LINESTYLES = ("-", *((0, lengths) for lengths in ((6, 3), (2, 3), (8, 3, 2, 3), (12, 4), (6, 2, 2, 2, 2, 2), (3, 7))))
THEME = {  # the page's colours; legible at half size
    "text.color": "#1f2328", "axes.labelcolor": "#1f2328", "xtick.color": "#4b535d", "ytick.color": "#4b535d",
    "axes.edgecolor": "#68717d", "savefig.dpi": 130, "font.size": 10.5, "axes.labelsize": 12, "axes.titlesize": 12,
    "figure.titlesize": 13, "figure.labelsize": 12.5, "legend.fontsize": 11, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e7eb", "lines.linewidth": 1.8, "lines.markersize": 3,
}


def write_plots(runs, folder):
    """Writes the plots of all runs as PNGs into `folder` and prints their paths, and which runs a plot leaves out."""
    assign_styles(runs)
    make_folder(folder)
    for name, pattern, plot, candidates in list_plots(runs):
        path, shown = folder / f"{name}.png", []
        for run in candidates:
            if any(row[key] not in (None, []) for row in run["rows"] for key in match_keys(row, pattern)):
                shown.append(run)
            else:
                reason = f"no {pattern} logged" if run["rows"] else "no rows yet"
                print(f"{path.name} leaves out {run['name']}: {reason}")
        if shown:
            with open_figure(path) as figure:
                plot(figure, shown)
            print(path)


def list_plots(runs) -> list[tuple]:
    """(file name, pattern of the metrics it shows, plot function, runs) of each plot."""
    mixed = [run for run in runs if list_domains(run)]
    return [
        ("val_loss", "val/loss", plot_val_loss, runs),
        ("step_time", "time/*", plot_step_time, runs),
        ("router_entropy", "moe/router_entropy", plot_router_entropy, runs),
        *((f"{run['name']}_expert_load", "moe/load", plot_expert_load, [run]) for run in runs),
        *([("domain_loss", "val/*/loss", plot_domain_loss, mixed)] if mixed else []),
        *((f"{run['name']}_domains", "moe/domain_load", plot_domain_routing, [run]) for run in mixed),
    ]


def list_domains(run) -> list[str]:
    """The data domains that a run was evaluated on, in their order; [] if its data is not a mixture."""
    keys = dict.fromkeys(key for row in run["rows"] for key in match_keys(row, "val/*/loss"))
    return [key.split("/")[1] for key in keys]


# -----------------------------------------------------------------------------
# Training

def plot_val_loss(figure, runs):
    """Validation loss over steps, seconds and active FLOPs; in bits per byte if every run has them."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    in_bits = all(get_columns(run, "val/bpb")[0] for run in runs)
    key, label = ("val/bpb", "validation bits per byte") if in_bits else ("val/loss", "validation loss (nats/token)")
    figure.set_size_inches(13.5, 4.6)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, x, title in zip(axes, ("step", "train_time", "train/flops"), ("steps", "training seconds", "active FLOPs")):
        ends = []
        for run in runs:
            xs, ys = get_columns(run, x, key)
            name = f"{plain(run['name'])}  {format_metric(run, '{:.4f}', last, key)}"
            draw_curve(ax, run, xs, ys, name if ax is axes[0] else None)  # one legend for the three panels
            ends += xs[-1:]
        if ends and 0 < 10 * min(ends) < max(ends):  # a linear axis would squeeze the short runs
            ax.set_xscale("log")
        ax.set_xlabel(title if ends else f"{title} (not logged)")
    values = [value for run in runs for value in get_columns(run, key)[0]]
    if max(values) > 2 * min(values) > 0:  # on a linear axis the first losses would flatten the end
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
    phases = list(dict.fromkeys(key for run in runs for row in run["rows"] for key in match_keys(row, "time/*")))
    for i, phase in enumerate(phases):
        widths = [1000 * median(get_columns(run, phase)[0] or [0]) for run in runs]
        ax.barh(range(len(runs)), widths, left=ends, height=0.62, edgecolor="white", linewidth=0.8,
                color=PHASE_COLOURS[i % len(PHASE_COLOURS)], label=plain(phase.removeprefix("time/")))
        ends = [end + width for end, width in zip(ends, widths)]
    for i, end in enumerate(ends):
        ax.text(end, i, f"  {end:,.1f} ms", va="center")
    ax.set_yticks(range(len(runs)), [plain(run["name"]) for run in runs], fontsize=11)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.12)
    ax.set_xlabel("milliseconds per step (median of each phase)")
    figure.legend(loc="outside lower center", ncols=len(phases))


def plot_router_entropy(figure, runs):
    """Router entropy over training, divided by log(experts): 1 is uniform routing."""
    figure.set_size_inches(8, 4.6)
    ax = figure.subplots()
    for run in runs:
        steps, entropy = get_columns(run, "step", "moe/router_entropy")
        draw_curve(ax, run, bin_means(steps), bin_means(entropy), plain(run["name"]))
    ax.axhline(1, color="#8a929c", linewidth=1, linestyle=(0, (4, 3)), label="uniform")
    ax.set_xlabel("steps")
    ax.set_ylabel("router entropy / log(experts)")
    figure.legend(loc="outside lower center", ncols=min(5, len(runs) + 1))


def plot_expert_load(figure, runs):
    """One run: for each MoE layer a heat map of experts x steps, coloured by the expert's share of the assignments."""
    import numpy as np

    steps, load = get_columns(runs[0], "step", "moe/load")
    load_SLE = bin_means(load)
    edges = [group[0] for group in np.array_split(np.array(steps), len(load_SLE))] + [steps[-1] + 1]
    layers, experts = load_SLE.shape[1:]
    columns, uniform = min(4, layers), 1 / experts
    rows = math.ceil(layers / columns)
    figure.set_size_inches(1.6 + 3.2 * columns, 1.2 + 2 * rows)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for ax in axes[layers:]:
        ax.remove()
    for layer, ax in enumerate(axes[:layers]):
        # Twice and half the uniform share are equally far from it; the floor keeps an unused expert on the scale.
        image = ax.pcolormesh(edges, np.arange(experts + 1) - 0.5, np.maximum(load_SLE[:, layer].T, 1e-9),
                              norm="log", vmin=uniform / 4, vmax=uniform * 4, cmap="RdBu_r")
        ax.grid(visible=False)
        ax.set_title(f"MoE layer {layer}", fontsize=11, loc="left")
        ax.set_yticks(range(0, experts, max(1, experts // 8)))
    axes[0].invert_yaxis()  # of all, as they share it
    shares = [uniform * factor for factor in (1 / 4, 1 / 2, 1, 2, 4)]
    bar = figure.colorbar(image, ax=figure.axes, extend="both", aspect=30)
    bar.set_ticks(shares, labels=[f"{100 * share:.3g}%" for share in shares])
    bar.set_label("share of assignments (white: even)", fontsize=10.5)
    bar.minorticks_off()
    figure.suptitle(plain(runs[0]["name"]))
    figure.supxlabel("steps")
    figure.supylabel("expert")


# -----------------------------------------------------------------------------
# Domains: runs on a mixture of data sets

def plot_domain_loss(figure, runs):
    """One panel per domain: validation loss over steps, in bits per byte if every run has them."""
    names = list(dict.fromkeys(name for run in runs for name in list_domains(run)))
    in_bits = all(get_columns(run, f"val/{name}/bpb")[0] for run in runs for name in list_domains(run))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure.set_size_inches(4 * columns, 0.6 + 2.8 * rows)
    for i, name in enumerate(names):
        ax = figure.add_subplot(rows, columns, i + 1)
        for run in runs:
            xs, ys = get_columns(run, "step", f"val/{name}/{'bpb' if in_bits else 'loss'}")
            label = f"{plain(run['name'])}  {ys[-1]:.3f}" if ys else None
            draw_curve(ax, run, xs[1:] or xs, ys[1:] or ys, label)  # without the loss of the initial weights
        ax.set_title(plain(name), fontsize=11, loc="left")
        ax.legend(fontsize=9.5)
    figure.supxlabel("steps")
    figure.supylabel("validation bits per byte" if in_bits else "validation loss (nats/token)")


def plot_domain_routing(figure, runs):
    """One run: experts of each domain's tokens per MoE layer in the last evaluation, and the mutual information of
    expert and domain over the steps."""
    import numpy as np

    (run,), names = runs, list_domains(runs[0])
    steps, loads, bits = get_columns(run, "step", "moe/domain_load", "moe/domain_information")
    load_DLE = np.array(loads[-1])
    layers = load_DLE.shape[1]
    columns = min(3, layers + 1)
    rows = math.ceil((layers + 1) / columns)
    figure.set_size_inches(4 * columns, 0.6 + 2.8 * rows)
    for layer in range(layers):
        ax = figure.add_subplot(rows, columns, layer + 1)
        draw_matrix(figure, ax, load_DLE[:, layer], f"MoE layer {layer}: share of tokens", "expert", "", vmin=0, vmax=1)
        ax.set_yticks(range(len(names)), list(map(plain, names)))
    ax = figure.add_subplot(rows, columns, layers + 1)
    ax.plot(steps, bits, "o-", color=COLOURS[0])
    ax.set(xlabel="step", ylabel="information about the domain (bits)", ylim=(0, None))
    figure.suptitle(plain(run["name"]))


# -----------------------------------------------------------------------------
# Drawing

def assign_styles(runs):
    """Sets run["style"], a colour and a line style, so that a run looks the same in every plot."""
    for i, run in enumerate(runs):
        run["style"] = {"color": COLOURS[i % 8], "linestyle": LINESTYLES[i // 8 % len(LINESTYLES)]}


@contextmanager
def open_figure(path):
    """An empty Figure with the project's theme, saved at `path` (a file name or a binary file) at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with explain_os_errors(path), matplotlib.rc_context(THEME):
        figure = Figure(layout="constrained")
        yield figure
        save_png(figure, path)


def save_png(figure, path):
    """Saves a figure with a palette of 256 colours, in a third of the bytes of a true-colour PNG."""
    from PIL import Image  # matplotlib depends on it

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def plain(name: str) -> str:
    """A name as matplotlib shows it: without mathematics between dollars, and in the legend despite a leading `_`."""
    return name.replace("$", r"\$").replace("_", " _", name.startswith("_"))


def draw_curve(ax, run, xs, ys, label):
    """Draws a run's curve, with markers if it has few points."""
    ax.plot(xs, ys, **run["style"], label=label, marker="o" if len(xs) <= 30 else None)


def draw_matrix(figure, ax, values, title, xlabel, ylabel, **imshow_args):
    """Draws a matrix as a heat map with a colour bar. None and NaN stay blank."""
    import numpy as np

    values = np.array([[np.nan if value is None else value for value in row] for row in values], float)
    image = ax.imshow(values, aspect="auto", **{"cmap": "viridis"} | imshow_args)
    figure.colorbar(image, ax=ax)
    ax.grid(visible=False)
    ax.set_title(title, fontsize=11, loc="left")
    ticks = [range(0, size, max(1, size // 8)) for size in values.shape]
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=ticks[1], yticks=ticks[0])


def bin_means(values, bins=300):
    """Array of the means of at most `bins` groups of consecutive values."""
    import numpy as np

    groups = np.array_split(np.array(values, float), min(bins, len(values)))
    return np.stack([group.mean(axis=0) for group in groups])
