"""Plots: each fills a Figure from runs that logged what it shows."""

import math
from contextlib import contextmanager
from fnmatch import filter as matching
from statistics import median

from logger import _naming, _series, chosen, last

COLOURS = "#1f6feb #e5532d #1a9850 #8e44ad #e6a700 #17a2b8 #d6336c #6b4f3a".split()
PHASE_COLOURS = "#c9ced6 #7fb3ff #1f6feb #e5532d #f2b134 #1a9850 #8e44ad".split()
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
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


def _matrix(figure, ax, values, title, xlabel, ylabel, **how):
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    image = ax.imshow(values, aspect="auto", **{"cmap": "viridis"} | how)
    figure.colorbar(image, ax=ax)
    ax.grid(visible=False)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=range(0, values.shape[1], max(1, values.shape[1] // 8)),
           yticks=range(0, values.shape[0], max(1, values.shape[0] // 8)))


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
