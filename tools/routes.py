"""Where tokens went: what `python model.py --routes` collected, as numbers and pictures. S steps, N tokens, n members of a pool."""

import itertools
import json
import math
import zipfile
import zlib
from pathlib import Path

from logger import RunError, _finite, _map, _naming, _write_atomically
from tools.plots import COLOURS, _matrix, drawing


def use_by_step(choice_SN, n: int):
    """(n, S): the share of tokens that each step sends to each member. Columns sum to 1, less the tokens that had left (-1)."""
    import numpy as np

    return np.stack([np.bincount(step[step >= 0], minlength=n) / len(step) for step in choice_SN], 1)


def transitions(choice_SN, n: int):
    """(n, n): of the tokens that were at i and went on, the share that the next step sends to j. Rows sum to 1, or are nan where nobody was."""
    import numpy as np

    counts, went_on = np.zeros((n, n)), choice_SN[1:] >= 0
    np.add.at(counts, (choice_SN[:-1][went_on], choice_SN[1:][went_on]), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def used(choice_SN, n: int):
    """(N, n): whether a token met a member at all."""
    import numpy as np

    return (choice_SN[:, :, None] == np.arange(n)).any(0)


def joint(choice_SN, n: int):
    """(n, n): the share of tokens that met both i and j; the diagonal, which says how many met i, is nan."""
    import numpy as np

    met = used(choice_SN, n).astype(float)
    both = met.T @ met / len(met)
    np.fill_diagonal(both, np.nan)
    return both


def lift(choice_SN, n: int):
    """(n, n): joint() over what it would be if meeting i and meeting j had nothing to do with each other; 1 = nothing."""
    import numpy as np

    met = used(choice_SN, n).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return joint(choice_SN, n) / np.outer(met, met)


def correlation(choice_SN, n: int):
    """(n, n): of meeting i and meeting j over the tokens; nan on the diagonal and where all or none met a member."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(used(choice_SN, n).astype(float), rowvar=False).reshape(n, n)
    np.fill_diagonal(found, np.nan)
    return found


KINDS = ("chain", "sum")  # of problems, see data.difficulty


def by_difficulty(routes, values_N, counts_N=True) -> dict[str, dict[int, float]]:
    """Kind of problem -> {operations needed: the mean of values over the answers that need so many, where counts is true}."""
    found = {}
    for kind in (kind for kind in KINDS if f"{kind}_N" in routes):
        label_N = routes[f"{kind}_N"] * counts_N
        found[kind] = {int(d): float(values_N[label_N == d].mean()) for d in sorted(set(label_N.tolist()) - {0})}
    return found


def saturation(expert_LTK, final_LTK):
    """(L,): of the experts that tokens meet now, in each routed layer, the share that they meet at the end (OLMoE, 2409.02060)."""
    return (expert_LTK[..., None] == final_LTK[..., None, :]).any(-1).mean((1, 2))


def analyse(routes, earlier=()) -> dict:
    """The numbers behind the pictures, for JSON, from the arrays of a routes file, and of `earlier` ones: (step, arrays)."""
    import numpy as np

    found = {}
    if len(earlier) > 1 and "expert_LTK" in routes:
        end = earlier[-1][1]  # a run that was resumed may have kept other tokens before
        alike = [(step, then) for step, then in earlier if np.array_equal(then["token_N"], end["token_N"])]
        found["saturation"] = {step: saturation(then["expert_LTK"], end["expert_LTK"]).tolist() for step, then in alike}
    if "layer_SN" in routes:
        choice, layers = routes["layer_SN"], int(routes["layers"])
        n = layers + int(routes["identities"])
        measures = {"use_by_step": use_by_step, "transitions": transitions, "joint": joint, "lift": lift, "correlation": correlation}
        found |= {name: measure(choice, n).tolist() for name, measure in measures.items()}
        identity_SN = choice >= layers
        found["identities_by_step"] = identity_SN.mean(1).tolist()
        found["identities_by_difficulty"] = by_difficulty(routes, identity_SN.sum(0))
    if "loops_N" in routes:
        loops = routes["loops_N"]
        found["loops"] = {int(count): float((loops == count).mean()) for count in sorted(set(loops.tolist()))}
        found["loops_by_difficulty"] = by_difficulty(routes, loops)
    if "expert_LTK" in routes:
        found["load"] = [use_by_step(layer.reshape(1, -1), int(routes["experts"]))[:, 0].tolist() for layer in routes["expert_LTK"]]
        found["coactivation"] = [joint(layer.T, int(routes["experts"])).tolist() for layer in routes["expert_LTK"]]
    if "right_N" in routes:
        asked_N = routes["right_N"] >= 0
        found |= {"accuracy": float(routes["right_N"][asked_N].mean()), "accuracy_by_difficulty": by_difficulty(routes, routes["right_N"], asked_N)}
    return found


def plot_layers(figure, routes, found):
    """The pool of layers: who is used when, after whom, with whom, and the ways of some tokens."""
    figure.set_size_inches(12, 7)
    ax = figure.subplots(2, 3)
    _matrix(figure, ax[0, 0], found["use_by_step"], "share of tokens", "step", "layer", vmin=0, vmax=1)
    _matrix(figure, ax[0, 1], found["transitions"], "from layer to layer", "next", "layer", vmin=0, vmax=1)
    _matrix(figure, ax[0, 2], found["joint"], "tokens that meet both", "layer", "layer", vmin=0, vmax=1)
    _matrix(figure, ax[1, 0], found["lift"], "lift", "layer", "layer", cmap="RdBu_r", vmin=0, vmax=2)
    _matrix(figure, ax[1, 1], found["correlation"], "correlation", "layer", "layer", cmap="RdBu_r", vmin=-1, vmax=1)
    _matrix(figure, ax[1, 2], routes["layer_SN"][:, :96], "ways of single tokens", "token", "step", cmap="tab10", vmin=0, vmax=9)
    figure.suptitle(f"layers 0 to {int(routes['layers']) - 1}, then {int(routes['identities'])} identities", fontsize=10)


def plot_loops(figure, routes, found):
    """How many loops tokens went through."""
    figure.set_size_inches(5, 3.6)
    ax = figure.subplots()
    ax.bar(list(found["loops"]), list(found["loops"].values()), color=COLOURS[0])
    ax.set(xlabel="loops", ylabel="share of tokens", xticks=list(found["loops"]))


def plot_difficulty(figure, routes, found):
    """By the operations that an answer needs: how often it is right, the loops that the token before it takes, the identities that it picks."""
    measures = {"accuracy": "share of answers that are right", "loops": "mean loops", "identities": "mean identities"}
    shown = [name for name in measures if f"{name}_by_difficulty" in found]
    figure.set_size_inches(4 * len(shown), 3.6)
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for (kind, values), colour in zip(found[f"{name}_by_difficulty"].items(), COLOURS):
            ax.plot(list(values), list(values.values()), "o-", color=colour, label=kind)
        ax.set(xlabel="operations needed", ylabel=measures[name])
        ax.legend()


def plot_experts(figure, routes, found):
    """For each routed layer, which experts a token meets together; the diagonal's place shows nothing."""
    layers = len(found["coactivation"])
    figure.set_size_inches(1 + 3 * min(4, layers), 2.8 * math.ceil(layers / 4))
    for layer, matrix in enumerate(found["coactivation"]):
        ax = figure.add_subplot(math.ceil(layers / 4), min(4, layers), layer + 1)
        _matrix(figure, ax, matrix, f"MoE layer {layer}: tokens that meet both", "expert", "expert", vmin=0)


def plot_saturation(figure, routes, found):
    """How early tokens meet the experts that they meet at the end."""
    figure.set_size_inches(6, 3.6)
    ax, steps = figure.subplots(), list(found["saturation"])
    for layer, (shares, colour) in enumerate(zip(zip(*found["saturation"].values()), itertools.cycle(COLOURS))):
        ax.plot(steps, shares, "o-", color=colour, label=f"MoE layer {layer}")
    ax.set(xlabel="step", ylabel="share of choices that stay", ylim=(0, 1.02))
    ax.legend()


def read_routes(path) -> dict:
    import numpy as np

    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:  # cut short, or something else
        raise RunError(f"{path} cannot be read ({error}); remove it and make it again") from None


def routes_files(run_folder) -> list[Path]:
    """What a run has of its tokens' ways, the one to show first: its routes.npz, then what its evaluations kept, newest first."""
    return [*run_folder.glob("routes.npz"), *sorted((run_folder / "routes").glob("step_*.npz"), reverse=True)]


def write_routes(run_folder, folder):
    """Writes <run>_routes.json and the pictures it has numbers for into `folder`, and prints their paths. They come from the run's routes.npz, or
    else from the last evaluation that kept some. Raises RunError where there is neither."""
    files, path = routes_files(run_folder), run_folder / "routes.npz"
    if not files:
        raise RunError(f"{path} is not there; make it with `python model.py --checkpoint {run_folder}/checkpoint --routes {path} --data <shards>`")
    earlier = [(int(file.stem.removeprefix("step_")), read_routes(file)) for file in reversed(files) if file != path]
    routes = read_routes(path) if files[0] == path else earlier[-1][1]
    found = analyse(routes, earlier)
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / f"{run_folder.name}_routes.json", json.dumps(_map(_finite, found), indent=1) + "\n")
    print(folder / f"{run_folder.name}_routes.json")
    pictures = (("layers", "use_by_step", plot_layers), ("loops", "loops", plot_loops), ("coactivation", "coactivation", plot_experts),
                ("difficulty", "accuracy_by_difficulty", plot_difficulty), ("saturation", "saturation", plot_saturation))
    for name, key, plot in pictures:
        if found.get(key):
            with drawing(folder / f"{run_folder.name}_{name}.png") as figure:
                plot(figure, routes, found)
            print(folder / f"{run_folder.name}_{name}.png")
