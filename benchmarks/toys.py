"""Toys whose right answer is known: does a model that may choose its depth choose the right one?

    python benchmarks/toys.py count
    python benchmarks/toys.py route
    python benchmarks/toys.py recover

`count`: each token holds a number n from 1 to 8 and a counter at 0. The block, which is frozen, adds 1; the output
should be n. Only the halting head is trained. Printed for each rule: the squared error, and the
iterations of each n under the hard rule of evaluation; then FLOPs and seconds of batches of small, mixed and large
numbers. A soft mixture can give the right answer without any token halting, so the table shows the depth.

`route`: each token holds a value mod 11 and a program of 1 to 5 steps out of +1, x2, negate. The pool is these three,
frozen, and one identity; in 5 steps the controller has to run the program. Printed for each controller: accuracy of the
soft mixture and of one layer per step, the identities used beyond those needed, and the same if training used one layer
per step from the start. The memoryless controller cannot solve it: the negative control.

`recover`: a small dense transformer of three layers is trained on chains of operations (tools/sources.py), then its
layers are frozen and put into a pool with one identity. Does a controller find their order? Printed: the loss of the
transformer, of its layers in every order, and of each controller, with the share of each layer in each step."""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import zoo  # noqa: E402
from cli import Parser, command_line, positive  # noqa: E402
from ops import norm  # noqa: E402
from tools import sources  # noqa: E402
from zoo import GPT, Config  # noqa: E402
from zoo.gpt import TrunkOutput  # noqa: E402
from zoo.layer_routing import CONTROLLERS, ROUTE_TRAINING  # noqa: E402


def minimise(net: GPT, parameters, loss_of, steps: int, lr: float) -> GPT:
    """Adam on loss_of(step); returns the net in evaluation mode."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        net.set_step(0, step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def run_layers_alone(net: GPT, layers: list[nn.Module], x_BTD: Tensor) -> TrunkOutput:
    """Output of the net's depth over these layers instead of its own; each row is one document."""
    net.blocks, doc_BT = nn.ModuleList(layers), torch.zeros(x_BTD.shape[:2], dtype=torch.int64)
    return net.run_blocks(x_BTD, *net.contexts(None, doc_BT, doc_BT, None))


# ---------------------------------------------------------------------------------------------------------------------
# Count to n

MOST, LOOPS, WIDTH = 8, 11, 32  # numbers, loops at most, channels


class Counter(nn.Module):
    """A block that adds 1 to channel 0, in units in which MOST is sqrt(WIDTH), and has `work` pairs of matmuls without
    effect."""

    def __init__(self, work: int = 0):
        super().__init__()
        self.step = torch.zeros(WIDTH)
        self.step[0] = WIDTH**0.5 / MOST
        self.spin = [torch.randn(WIDTH, 64 * WIDTH) for _ in range(work)]

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, ctx) -> tuple[Tensor, list, None]:
        for spin in self.spin:
            x_BTD = x_BTD + 0 * (x_BTD @ spin @ spin.T)
        return x_BTD + self.step, [], None


class Counting(NamedTuple):
    net: GPT
    block: Counter

    def run(self, n_BT: Tensor) -> TrunkOutput:
        share_BT = (
            n_BT / MOST
        )  # the rest of the vector's length is in a third channel, so that the norm changes nothing
        x_BTD = torch.zeros(*n_BT.shape, WIDTH)
        x_BTD[..., 1], x_BTD[..., 2] = share_BT, (1 - share_BT**2).sqrt()
        return run_layers_alone(self.net, [self.block], norm(x_BTD))

    def answers(self, trunk: TrunkOutput) -> list[tuple[Tensor, Tensor | None]]:
        """The count in each of the output states, and its weights in the loss."""
        return [(x_BTD[..., 0] * (MOST / WIDTH**0.5), weight_BT) for x_BTD, weight_BT in trunk.states]


def counting(halt: str, coef: float, steps: int = 1500, seed: int = 0) -> Counting:
    """The halting head, trained by Adam on 256 random numbers per step."""
    config = Config(
        vocab_size=64,
        eot_token=0,
        n_layer=1,
        n_embd=WIDTH,
        n_head=1,
        head_dim=8,
        value_embeds=0,
        pattern="D",
        depth="loop",
        loops=LOOPS,
        halt=halt,
        ponder_coef=coef,
        dtype="fp32",
    )
    toy, generator = Counting(zoo.build(config), Counter()), torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        n_BT = torch.randint(1, MOST + 1, (4, 64), generator=generator)
        trunk = toy.run(n_BT)
        errors = [((answer_BT - n_BT).square(), weight_BT) for answer_BT, weight_BT in toy.answers(trunk)]
        return trunk.loss + sum(
            (error_BT if weight_BT is None else error_BT * weight_BT).mean() for error_BT, weight_BT in errors
        )

    minimise(toy.net, toy.net.halt.parameters(), loss_of, steps, 0.03)
    return toy


@torch.no_grad()
def depths(toy: Counting) -> tuple[list[int], float, float]:
    """Loops for n = 1 .. MOST in evaluation, their correlation with n, and the mean squared error of the answers."""
    n_BT = torch.arange(1, MOST + 1)[None]
    trunk = toy.run(n_BT)
    loops = trunk.loops_BT[0]
    correlation = (
        torch.corrcoef(torch.stack([n_BT[0].float(), loops.float()]))[0, 1].item()
        if loops.unique().numel() > 1
        else 0.0
    )
    answer_BT, _ = toy.answers(trunk)[-1]
    return loops.tolist(), correlation, (answer_BT - n_BT).square().mean().item()


@torch.no_grad()
def cost(toy: Counting, n_BT: Tensor, rounds: int = 5) -> tuple[int, float]:
    """FLOPs, and the least seconds, of one forward pass with a block of two pairs of matmuls."""
    busy = toy._replace(block=Counter(work=2))
    with FlopCounterMode(display=False) as counter:
        busy.run(n_BT)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        busy.run(n_BT)
        seconds.append(time.perf_counter() - began)
    return counter.get_total_flops(), min(seconds)


# rule -> coefficients of its cost; the exit rule has no halting head, which is all that is trained
COEFS = {"act": (0.1, 0.01), "stick_breaking": (0.1, 0.01), "ponder": (0.01, 0.1), "threshold": (0.1, 0.01)}


def count(args):
    generator = torch.Generator().manual_seed(1)
    batches = {
        f"{low} to {high}": torch.randint(low, high + 1, (8, 512), generator=generator)
        for low, high in ((1, 2), (1, 8), (7, 8))
    }
    columns = [
        "halt",
        "ponder_coef",
        f"loops for n = 1 .. {MOST}",
        "correlation",
        "squared error",
        *(f"n {name}: GFLOPs, ms" for name in batches),
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for halt in args.halt:
        for coef in COEFS[halt]:
            toy = counting(halt, coef, args.steps)
            loops, correlation, error = depths(toy)
            costs = [cost(toy, n_BT) for n_BT in batches.values()]
            cells = [halt, coef, " ".join(map(str, loops)), f"{correlation:.3f}", f"{error:.4f}"]
            cells += [f"{flops / 1e9:.2f}, {1000 * seconds:.0f}" for flops, seconds in costs]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Run a program

BASE, LENGTH = 11, 5
OPERATIONS = {"+1": lambda v: v + 1, "x2": lambda v: 2 * v, "negate": lambda v: -v}
SLOTS = len(OPERATIONS) + 1  # of one place in a program: an operation or none
PROGRAM_WIDTH = 40  # BASE + LENGTH * SLOTS = 31 channels, and some that are not used


class Operation(nn.Module):
    """A block that permutes the value's channels and leaves the program alone."""

    def __init__(self, operation):
        super().__init__()
        self.comes_from = torch.arange(PROGRAM_WIDTH)
        self.comes_from[[operation(v) % BASE for v in range(BASE)]] = torch.arange(BASE)

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, ctx) -> tuple[Tensor, list, None]:
        return x_BTD[..., self.comes_from], [], None


def programs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Streams (1, count, PROGRAM_WIDTH), the value that each program ends at, and its number of operations."""
    value = torch.randint(BASE, (count,), generator=generator)
    length = torch.randint(1, LENGTH + 1, (count,), generator=generator)
    steps = torch.randint(len(OPERATIONS), (count, LENGTH), generator=generator)
    steps = torch.where(torch.arange(LENGTH) < length[:, None], steps, len(OPERATIONS))
    x = torch.cat([nn.functional.one_hot(value, BASE), nn.functional.one_hot(steps, SLOTS).flatten(1)], 1).float()
    for i in range(LENGTH):
        after = torch.stack([operation(value) % BASE for operation in OPERATIONS.values()] + [value])
        value = after[steps[:, i], torch.arange(count)]
    return nn.functional.pad(x, (0, PROGRAM_WIDTH - x.size(1)))[None], value, length


class Running(NamedTuple):
    net: GPT
    blocks: list[Operation]

    def run(self, x_BTD: Tensor) -> TrunkOutput:
        return run_layers_alone(self.net, self.blocks, x_BTD)


def running(controller: str, training: str = "soft", steps: int = 1500, seed: int = 0) -> Running:
    """The controller, trained by Adam on 256 random programs per step."""
    config = Config(
        vocab_size=64,
        eot_token=0,
        n_layer=len(OPERATIONS),
        n_embd=PROGRAM_WIDTH,
        n_head=1,
        head_dim=8,
        value_embeds=0,
        pattern="D",
        depth="routed",
        loops=LENGTH,
        identity_layers=1,
        controller=controller,
        route_training=training,
        anneal_steps=steps,
        dtype="fp32",
    )
    toy = Running(zoo.build(config), [Operation(operation) for operation in OPERATIONS.values()])
    toy.net.packs, generator = False, torch.Generator().manual_seed(seed)  # these blocks have no queries and keys

    def loss_of(step: int) -> Tensor:
        x, target, _ = programs(256, generator)
        ((y, _),) = toy.run(x).states
        return nn.functional.nll_loss(y[0, :, :BASE].clamp(min=1e-6).log(), target)

    minimise(toy.net, toy.net.controller.parameters(), loss_of, steps, 0.01)
    return toy


@torch.no_grad()
def accuracies(toy: Running, count: int = 4096) -> tuple[float, float, float]:
    """Accuracy of the soft mixture and of one layer per step, and the mean excess of identities over LENGTH - program
    length."""
    x, target, length = programs(count, torch.Generator().manual_seed(1))
    found = []
    for toy.net.hard_evaluation in (False, True):
        trunk = toy.run(x)
        found.append((trunk.states[-1][0][0, :, :BASE].argmax(-1) == target).float().mean().item())
    identities = (trunk.choices_SBT[:, 0] == len(OPERATIONS)).sum(0)
    return *found, (identities - (LENGTH - length)).float().abs().mean().item()


def route(args):
    print(
        "| controller | training | accuracy, soft | accuracy, one layer per step | identities off by |\n"
        "|---|---|---|---|---|"
    )
    for controller in args.controller:
        for training in args.training:
            soft, hard, off = accuracies(running(controller, training, args.steps))
            print(f"| {controller} | {training} | {soft:.3f} | {hard:.3f} | {off:.2f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Recover an order

ROW = 48  # tokens


def chains(seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, ROW) of problems one after another, each after end-of-text."""
    rng, ids = np.random.default_rng(seed), []
    for _ in range(rows):
        text = ""
        while len(text) <= ROW:
            text += "\n" + sources.make_chain(rng)
        ids.append([EOT if letter == "\n" else ord(letter) for letter in text[: ROW + 1]])
    return torch.tensor(ids)[:, :-1], torch.tensor(ids)[:, 1:]


EOT = 256
IN_TURN = Config(
    vocab_size=EOT + 1,
    eot_token=EOT,
    n_layer=3,
    n_embd=32,
    n_head=2,
    head_dim=16,
    value_embeds=0,
    pattern="D",
    window_size=ROW,
    depth="routed",
    loops=3,
    controller="fixed",
    dtype="fp32",
)


def fit(net: GPT, parameters, steps: int, lr: float) -> GPT:
    return minimise(net.train(), parameters, lambda step: net(*chains(step)).loss, steps, lr)


@torch.no_grad()
def held_out(net: GPT, batches: int = 8) -> float:
    return sum(net(*chains(10**6 + i)).loss.item() for i in range(batches)) / batches


@torch.no_grad()
def use(net: GPT) -> Tensor:
    """(layers and identities, steps): share of the tokens that pick each layer in each step."""
    trunks, run_blocks = [], net.run_blocks
    net.run_blocks = lambda *inputs: trunks.append(run_blocks(*inputs)) or trunks[-1]
    net(*chains(10**6))
    del net.run_blocks
    choices, choices_SBT = net.config.n_layer + net.config.identity_layers, trunks[0].choices_SBT
    return torch.stack(
        [torch.bincount(picked.flatten(), minlength=choices) / picked.numel() for picked in choices_SBT], 1
    )


def in_order(net: GPT, order: tuple[int, ...]) -> GPT:
    other = zoo.build(net.config).eval()
    other.load_state_dict(net.state_dict())
    other.blocks = nn.ModuleList(other.blocks[i] for i in order)
    return other


def recovered(trained: GPT, controller: str, training: str, steps: int) -> GPT:
    """The trained layers, frozen, in a pool with an identity; only the controller is trained."""
    changes = dict(controller=controller, route_training=training, identity_layers=1, anneal_steps=steps)
    net = zoo.build(dataclasses.replace(trained.config, **changes))
    net.load_state_dict(trained.state_dict(), strict=False)
    return fit(net, net.controller.parameters(), steps, 0.05)


def recover(args):
    trained = zoo.build(IN_TURN)
    fit(trained, trained.parameters(), args.steps, 3e-3)
    print(f"in the order of training: {held_out(trained):.4f} nats")
    for order in list(itertools.permutations(range(3)))[1:]:
        print(f"in the order {order}: {held_out(in_order(trained, order)):.4f}")
    for controller in args.controller:
        for training in args.training:
            net = recovered(trained, controller, training, args.steps)
            rows = "; ".join(" ".join(f"{share:.2f}" for share in row) for row in use(net).tolist())
            print(
                f"{controller}, {training}: {held_out(net):.4f}; layers (the identity last) by steps: {rows}",
                flush=True,
            )


LEARNED = [name for name in CONTROLLERS if name != "fixed"]  # controllers with parameters


def parse(argv=None):
    parser = Parser(prog="toys.py", description="Toys whose right answer is known.")
    actions = parser.add_subparsers(dest="action", required=True)
    for function, steps, options in (
        (count, 1500, {"halt": (list(COEFS), list(COEFS))}),
        (route, 1500, {"controller": (LEARNED, ["linear", "mlp", "lstm", "memoryless", "learned"]),
                       "training": (list(ROUTE_TRAINING), ["soft", "anneal", "straight_through"])}),
        (recover, 400, {"controller": (LEARNED, ["learned", "linear", "mlp", "lstm"]),
                        "training": (list(ROUTE_TRAINING), ["soft", "anneal"])}),
    ):  # fmt: skip
        add = actions.add_parser(function.__name__)
        for name, (choices, default) in options.items():
            add.add_argument(f"--{name}", nargs="+", choices=choices, default=default)
        add.add_argument("--steps", type=positive, default=steps)
        add.set_defaults(function=function)
    return parser.parse_args(argv)


@command_line("toys.py")
def main():
    args = parse()
    args.function(args)


if __name__ == "__main__":
    main()
