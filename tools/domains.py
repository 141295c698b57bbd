"""Plots of runs on a mixture of domains."""

import math
from fnmatch import filter as matching

from logger import COLOURS, _curve, _series
from tools.routes import _matrix


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
