"""Token routes: which layers and experts the tokens of a run were routed to, as statistics and plots.

`python model.py --routes`, or training with --routes_tokens, writes the arrays; `python logger.py --routes` draws them.
Array suffixes: S depth steps, N or T tokens, L MoE layers, K experts per token. `n` is the number of members: layers of
a pool with its identities, or experts of a layer. In layer_SN, -1 marks the steps after a token has halted.
"""

import functools
import itertools
import json
import math
import shlex
import zipfile
import zlib
from pathlib import Path

from cli import UserError, write_atomically
from logger import for_json, make_folder, read_config, write_text
from tools.plots import COLOURS, draw_matrix, open_figure

PROBLEM_KINDS = ("chain", "sum")  # see data.difficulty


def write_analysis(run_folder, folder):
    """Writes <run>_routes.json and the plots of a run's routes into `folder`, and prints their paths.

    The routes are those of routes.npz, or else of the last evaluation that saved some. Raises UserError without either.
    """
    files, path = list_routes_files(run_folder), run_folder / "routes.npz"
    if not files:
        raise UserError(f"{path} is missing; {how_to_get_routes(run_folder, read_config(run_folder))}")
    by_step = [(int(file.stem.removeprefix("step_")), read_routes(file)) for file in reversed(files) if file != path]
    routes = read_routes(path) if files[0] == path else by_step[-1][1]
    found = analyse_arrays(files[0], routes, by_step)

    make_folder(folder)
    report = folder / f"{run_folder.name}_routes.json"
    write_text(report, json.dumps(for_json(found), indent=1) + "\n")
    print(report)
    for name, key, plot in (
        ("layers", "use_by_step", plot_layers),
        ("loops", "loops", plot_loops),
        ("coactivation", "coactivation", plot_coactivation),
        ("difficulty", "accuracy_by_difficulty", plot_difficulty),
        ("saturation", "saturation", plot_saturation),
    ):
        if found.get(key):
            picture = folder / f"{run_folder.name}_{name}.png"
            with open_figure(picture) as figure:
                plot(figure, routes, found)
            print(picture)


def how_to_get_routes(run_folder, config: dict) -> str:
    """A command that writes the routes.npz of a run, given its config.json."""
    data = (config.get("hyperparameters") or {}).get("data") or "DIR"
    domains = sorted(Path(data).glob("*/meta.json"))  # a mixture of domains has one in each
    data = data if (Path(data) / "meta.json").exists() or not domains else domains[0].parent
    words = ("python", "model.py", "--checkpoint", run_folder / "checkpoint", "--routes", run_folder / "routes.npz",
             "--data", data)  # fmt: skip
    return f"run `{shlex.join(map(str, words))}`, or train with train_zoo.py and --routes_tokens"


def list_routes_files(run_folder) -> list[Path]:
    """The routes files of a run: its routes.npz, then those of its evaluations, newest first."""
    return [*run_folder.glob("routes.npz"), *sorted((run_folder / "routes").glob("step_*.npz"), reverse=True)]


def read_routes(path) -> dict:
    """The arrays of a routes file. Raises UserError if it cannot be read."""
    import numpy as np

    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and make it again") from None


def analyse_file(path) -> dict:
    """analyse() of one routes file. Raises UserError if it is damaged."""
    return analyse_arrays(path, read_routes(path))


def analyse_arrays(path, routes, by_step=()) -> dict:
    """analyse(), with the UserError of a damaged file at `path` in place of arrays that are missing or do not fit."""
    try:
        return analyse(routes, by_step)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold routes ({error}); remove it and make it again") from error


# -----------------------------------------------------------------------------
# Statistics


def analyse(routes, by_step=()) -> dict:
    """The statistics behind the plots, ready for JSON.

    routes: the arrays of a routes file. by_step: (training step, arrays) of the files of a run's evaluations, in order.
    """
    import numpy as np

    found = {}
    if len(by_step) > 1 and "expert_LTK" in routes:
        final = by_step[-1][1]
        # A resumed run may have saved the routes of other tokens before.
        found["saturation"] = {
            step: saturation(then["expert_LTK"], final["expert_LTK"]).tolist()
            for step, then in by_step
            if np.array_equal(then["token_N"], final["token_N"])
        }
    if "layer_SN" in routes:
        layer_SN, layers = routes["layer_SN"], int(routes["layers"])
        n = layers + int(routes["identities"])
        found["use_by_step"] = use_by_step(layer_SN, n).tolist()
        found["transitions"] = transition_matrix(layer_SN, n).tolist()
        found["joint"] = joint_matrix(layer_SN, n).tolist()
        found["lift"] = lift_matrix(layer_SN, n).tolist()
        found["correlation"] = correlation_matrix(layer_SN, n).tolist()
        identity_SN = layer_SN >= layers
        found["identities_by_step"] = identity_SN.mean(1).tolist()
        found["identities_by_difficulty"] = mean_by_difficulty(routes, identity_SN.sum(0))
    if "loops_N" in routes:
        loops_N = routes["loops_N"]
        found["loops"] = {int(count): float((loops_N == count).mean()) for count in sorted(set(loops_N.tolist()))}
        found["loops_by_difficulty"] = mean_by_difficulty(routes, loops_N)
    if "expert_LTK" in routes:
        expert_LTK, n = routes["expert_LTK"], int(routes["experts"])
        found["load"] = [use_by_step(expert_TK.reshape(1, -1), n)[:, 0].tolist() for expert_TK in expert_LTK]
        found["coactivation"] = [joint_matrix(expert_TK.T, n).tolist() for expert_TK in expert_LTK]
    if "right_N" in routes:
        right_N = routes["right_N"]
        has_target_N = right_N >= 0
        found["accuracy"] = float(right_N[has_target_N].mean())
        found["accuracy_by_difficulty"] = mean_by_difficulty(routes, right_N, has_target_N)
    return found


def use_by_step(choice_SN, n: int):
    """(n, S): share of tokens routed to each member at each step. Columns sum to 1, less the halted tokens."""
    import numpy as np

    return np.stack([np.bincount(choice_N[choice_N >= 0], minlength=n) / len(choice_N) for choice_N in choice_SN], 1)


def transition_matrix(choice_SN, n: int):
    """(n, n): of the tokens at i with a next step, the share routed to j. Rows sum to 1, or are nan without tokens."""
    import numpy as np

    counts, active_SN = np.zeros((n, n)), choice_SN[1:] >= 0
    np.add.at(counts, (choice_SN[:-1][active_SN], choice_SN[1:][active_SN]), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def visit_mask(choice_SN, n: int):
    """(N, n): whether a token is routed to a member at any step."""
    import numpy as np

    return (choice_SN[:, :, None] == np.arange(n)).any(0)


def joint_matrix(choice_SN, n: int):
    """(n, n): share of tokens routed to both i and j. The diagonal, the share routed to i, is nan."""
    import numpy as np

    visited_Nn = visit_mask(choice_SN, n).astype(float)
    joint = visited_Nn.T @ visited_Nn / len(visited_Nn)
    np.fill_diagonal(joint, np.nan)
    return joint


def lift_matrix(choice_SN, n: int):
    """(n, n): joint_matrix() over its value if visits of i and j were independent; 1 = independent."""
    import numpy as np

    visited_n = visit_mask(choice_SN, n).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return joint_matrix(choice_SN, n) / np.outer(visited_n, visited_n)


def correlation_matrix(choice_SN, n: int):
    """(n, n): correlation over tokens of visits of i and j; nan on the diagonal and if all or no tokens visit one."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(visit_mask(choice_SN, n).astype(float), rowvar=False).reshape(n, n)
    np.fill_diagonal(correlation, np.nan)
    return correlation


def mean_by_difficulty(routes, values_N, mask_N=True) -> dict[str, dict[int, float]]:
    """Kind of problem -> {operations needed: mean of values_N over these answers}, of the tokens in mask_N."""
    found = {}
    for kind in PROBLEM_KINDS:
        if f"{kind}_N" in routes:
            needed_N = routes[f"{kind}_N"] * mask_N
            found[kind] = {int(d): float(values_N[needed_N == d].mean()) for d in sorted(set(needed_N.tolist()) - {0})}
    return found


def saturation(expert_LTK, final_LTK):
    """(L,): share of the expert assignments in each MoE layer that are also in the final ones (OLMoE, 2409.02060)."""
    return (expert_LTK[..., None] == final_LTK[..., None, :]).any(-1).mean((1, 2))


# -----------------------------------------------------------------------------
# Plots


def plot_layers(figure, routes, found):
    """A pool of layers: use by step, transitions, joint use, and the layer sequences of some tokens."""
    import numpy as np

    figure.set_size_inches(12, 7)
    ax = figure.subplots(2, 3)
    diverging, layers, identities = {"cmap": "RdBu_r"}, int(routes["layers"]), int(routes["identities"])
    draw_matrix(figure, ax[0, 0], found["use_by_step"], "share of tokens", "step", "layer", vmin=0, vmax=1)
    draw_matrix(figure, ax[0, 1], found["transitions"], "transitions", "next layer", "layer", vmin=0, vmax=1)
    draw_matrix(figure, ax[0, 2], found["joint"], "tokens routed to both", "layer", "layer", vmin=0, vmax=1)
    draw_matrix(figure, ax[1, 0], found["lift"], "lift", "layer", "layer", vmin=0, vmax=2, **diverging)
    draw_matrix(figure, ax[1, 1], found["correlation"], "correlation", "layer", "layer", vmin=-1, vmax=1, **diverging)
    draw_matrix(
        figure,
        ax[1, 2],
        np.where(routes["layer_SN"] < 0, np.nan, routes["layer_SN"])[:, :96],  # halted tokens stay white
        "layers of single tokens",
        "token",
        "step",
        vmin=0,
        vmax=19 if layers + identities > 10 else 9,
        cmap="tab20" if layers + identities > 10 else "tab10",
    )
    figure.suptitle(f"layers 0 to {layers - 1}, then {identities} identities", fontsize=10)


def plot_loops(figure, routes, found):
    """Distribution of the number of loops per token."""
    figure.set_size_inches(5, 3.6)
    ax = figure.subplots()
    ax.bar(list(found["loops"]), list(found["loops"].values()), color=COLOURS[0])
    ax.set(xlabel="loops", ylabel="share of tokens", xticks=list(found["loops"]))


def plot_difficulty(figure, routes, found):
    """Accuracy, loops and identities over the number of operations that an answer needs."""
    measures = {"accuracy": "accuracy", "loops": "mean loops", "identities": "mean identities"}
    shown = [name for name in measures if f"{name}_by_difficulty" in found]
    figure.set_size_inches(4 * len(shown), 3.6)
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for (kind, values), colour in zip(found[f"{name}_by_difficulty"].items(), COLOURS):
            ax.plot(list(values), list(values.values()), "o-", color=colour, label=kind)
        needed = sorted(set().union(*found[f"{name}_by_difficulty"].values()))
        ax.set(xlabel="operations needed", ylabel=measures[name], xticks=needed)
        ax.legend()


def plot_coactivation(figure, routes, found):
    """For each MoE layer, the share of tokens routed to each pair of experts."""
    layers = len(found["coactivation"])
    columns = min(4, layers)
    rows = math.ceil(layers / columns)
    figure.set_size_inches(1 + 3 * columns, 2.8 * rows)
    for layer, matrix in enumerate(found["coactivation"]):
        ax = figure.add_subplot(rows, columns, layer + 1)
        draw_matrix(figure, ax, matrix, f"MoE layer {layer}: tokens routed to both", "expert", "expert", vmin=0)


def plot_saturation(figure, routes, found):
    """Router saturation over training, one curve per MoE layer."""
    figure.set_size_inches(6, 3.6)
    ax, steps = figure.subplots(), list(found["saturation"])
    for layer, (shares, colour) in enumerate(zip(zip(*found["saturation"].values()), itertools.cycle(COLOURS))):
        ax.plot(steps, shares, "o-", color=colour, label=f"MoE layer {layer}")
    ax.set(xlabel="step", ylabel="share of final assignments", ylim=(0, 1.02))
    ax.legend()


# ---------------------------------------------------------------------------------------------------------------------
# Collecting


def save_validation_routes(where, data_folder, num_tokens: int, path: Path) -> str:
    """Write the routes of a model on a folder's first validation tokens; returns a line about the file.

    where: as hub.load() takes it. Raises UserError."""
    from tools import hub

    net = hub.load(where, hub.device())
    arrays = collect_validation_routes(net, net.encoding, data_folder, num_tokens)
    write_routes(path, arrays)
    return f"{path}: {len(arrays['token_N']):,} tokens; draw them with `python logger.py --routes`"


def collect_validation_routes(net, encoding: str, data_folder, num_tokens: int) -> dict:
    """collect_routes of the first validation tokens, a row at a time. Raises UserError."""
    import data

    config = net.config
    batches = data.validation_batches(
        data_folder, seq_len=min(num_tokens, config.window_size), rows=1, max_tokens=num_tokens,
        vocab_size=config.vocab_size, device=net.head.device)  # fmt: skip
    return add_difficulty(collect_routes(net, batches), encoding)


def add_difficulty(arrays: dict, encoding: str) -> dict:
    """The arrays, and where the text holds arithmetic problems how hard each is: chain_N and sum_N."""
    import numpy as np

    from tools import sources

    if encoding != "bytes":
        return arrays
    text = np.where(arrays["token_N"] < 256, arrays["token_N"], ord("\n")).astype(np.uint8).tobytes()
    return arrays | {f"{kind}_N": label for kind, label in sources.difficulty(text).items() if label.any()}


def collect_routes(net, batches) -> dict:
    """Arrays of the routes of batches of data.Batch, without meta-tokens.

    layer_SN: the layer of each step with depth routed, -1 once halted. loops_N: iterations with depths that have loops.
    expert_LTK: experts of each MoE layer, where a layer runs once. token_N: the target of each position. right_N: 1 if
    the likeliest id was the target, 0 if not, -1 without a target."""
    import torch
    import torch.nn.functional as F

    meta, is_stack = getattr(net.config, "num_meta_tokens", 0), net.config.depth == "stack"
    make_inputs = net.objective.make_inputs if hasattr(net, "objective") else lambda net, *batch: batch
    found = {"layer_SN": [], "loops_N": [], "token_N": [], "right_N": []}
    experts, hooks = [[] for _ in range(net.config.num_moe_layers)], []
    run_blocks, training = net.run_blocks, net.training

    def run_blocks_recorded(*inputs):
        trunk = run_blocks(*inputs)
        if not is_stack and trunk.choices_SBT is not None:  # fewer steps where all tokens have halted
            missing = net.eval_loops - len(trunk.choices_SBT)
            choices_SBT = F.pad(trunk.choices_SBT, (0, 0) * 2 + (0, missing), value=-1)
            found["layer_SN"].append(choices_SBT[..., meta:].flatten(-2))
        if not is_stack:
            found["loops_N"].append(trunk.loops_BT[:, meta:].flatten())
        return trunk

    def record_route(expert_TK: list, router, inputs, route):
        expert_TK.append(route.expert_TK.unflatten(0, inputs[0].shape[:2])[:, meta:].flatten(0, 1))

    routers = [block.ffn.router for block in net.blocks if hasattr(block.ffn, "router")] if is_stack else []
    net.eval()
    net.run_blocks = run_blocks_recorded
    try:
        for router, expert_TK in zip(routers, experts):
            hooks.append(router.register_forward_hook(functools.partial(record_route, expert_TK)))
        for batch in batches:
            ids_BT, targets_BT = make_inputs(net, batch.inputs_BT, batch.targets_BT)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a compiled block would skip the hooks
                logits_BTV = net(ids_BT, doc_ids_BT=net.documents(batch.inputs_BT, None)).logits
            right_BT = (logits_BTV.argmax(-1) == targets_BT).to(torch.int8)
            found["token_N"].append(torch.where(targets_BT < 0, batch.inputs_BT, targets_BT).flatten())
            found["right_N"].append(right_BT.where(targets_BT >= 0, -1).flatten())
    finally:
        del net.run_blocks
        for hook in hooks:
            hook.remove()
        net.train(training)
    arrays = {name: torch.cat(parts, -1).cpu().numpy() for name, parts in found.items() if parts}
    if routers:
        expert_LTK = torch.stack([torch.cat(parts) for parts in experts])
        arrays |= {"expert_LTK": expert_LTK.cpu().numpy(), "experts": net.config.num_experts}
    layers = net.config.n_layer if is_stack else net.config.per_layer("looped").count("o")
    return arrays | {"layers": layers, "identities": getattr(net.config, "identity_layers", 0)}


def write_routes(path: Path, arrays: dict):
    """Write the arrays as a compressed .npz, in place of an older one only once complete."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: np.savez_compressed(temporary, **arrays))
