"""Toys whose right answer is known: does a model that may choose its depth choose the right one?

    python benchmarks/toys.py count

`count`: each token carries a number n from 1 to 8 and a counter at 0. The block, which is frozen, adds 1; what goes on should be n. Only the halting
head learns. Printed for each rule of model.HALTS: how far the answer is off, and after how many loops tokens leave under the hard rule of
evaluation; then FLOPs and seconds of a batch of small, mixed and large numbers, whose tokens really leave. A soft mixture can give the
right answer without anyone leaving, which is why depth is what is looked at."""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import GPT, HALTS, Config, Parser, norm  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Count to n

MOST, LOOPS, WIDTH = 8, 11, 32  # numbers, loops at most, channels


class Counter(nn.Module):
    """A block that adds 1 to channel 0, in units in which MOST is sqrt(WIDTH), and does `work` matmuls besides, which change nothing."""

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

    def run(self, n_BT: Tensor):
        """model.Deep of these numbers."""
        share_BT = n_BT / MOST  # the rest of the vector's length is in a third channel, so that the norm changes nothing
        x_BTD = torch.zeros(*n_BT.shape, WIDTH)
        x_BTD[..., 1], x_BTD[..., 2] = share_BT, (1 - share_BT**2).sqrt()
        doc_BT = torch.zeros_like(n_BT, dtype=torch.int64)
        contexts, place = self.net.contexts(None, doc_BT, doc_BT, [torch.zeros(())], None)
        return self.net.depth([self.block], norm(x_BTD), contexts, place)

    def answers(self, n_BT: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """What each output says, in counts, and its weights."""
        return [(x_BTD[..., 0] * (MOST / WIDTH**0.5), weight_BT) for x_BTD, weight_BT in self.run(n_BT).outputs]


def counting(halt: str, coef: float, steps: int = 1500, seed: int = 0) -> Counting:
    """The halting head, trained by Adam on 256 random numbers per step."""
    config = Config(vocab_size=64, eot_token=0, n_layer=1, n_embd=WIDTH, n_head=1, head_dim=8, value_embeds=0, pattern="D", depth="loop", loops=LOOPS,
                    halt=halt, ponder_coef=coef, dtype="fp32")  # fmt: skip
    toy, generator = Counting(GPT(config), Counter()), torch.Generator().manual_seed(seed)
    head = toy.net.depth.halt
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(steps):
        n_BT = torch.randint(1, MOST + 1, (4, 64), generator=generator)
        deep = toy.run(n_BT)
        loss = deep.loss
        for x_BTD, weight_BT in deep.outputs:
            error_BT = (x_BTD[..., 0] * (MOST / WIDTH**0.5) - n_BT).square()
            loss = loss + (error_BT if weight_BT is None else error_BT * weight_BT).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    toy.net.eval()
    return toy


@torch.no_grad()
def depths(toy: Counting) -> tuple[list[int], float, float]:
    """Loops for n = 1 .. MOST in evaluation, their correlation with n, and the mean squared error of the answers."""
    n_BT = torch.arange(1, MOST + 1)[None]
    loops = toy.run(n_BT).loops_BT[0]
    correlation = torch.corrcoef(torch.stack([n_BT[0].float(), loops.float()]))[0, 1].item() if loops.unique().numel() > 1 else 0.0
    answer_BT, _ = toy.answers(n_BT)[-1]
    return loops.tolist(), correlation, (answer_BT - n_BT).square().mean().item()


@torch.no_grad()
def cost(toy: Counting, n_BT: Tensor, rounds: int = 5) -> tuple[int, float]:
    """FLOPs, and the least seconds, of one pass with a block that has something to do."""
    busy = toy._replace(block=Counter(work=2))
    with FlopCounterMode(display=False) as counter:
        busy.run(n_BT)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        busy.run(n_BT)
        seconds.append(time.perf_counter() - began)
    return counter.get_total_flops(), min(seconds)


COEFS = {"act": (0.1, 0.01), "stick_breaking": (0.1, 0.01), "ponder": (0.01, 0.1), "threshold": (0.1, 0.01)}


def count(args):
    generator = torch.Generator().manual_seed(1)
    batches = {f"{low} to {high}": torch.randint(low, high + 1, (8, 512), generator=generator) for low, high in ((1, 2), (1, 8), (7, 8))}
    columns = ["halt", "ponder_coef", f"loops for n = 1 .. {MOST}", "correlation", "squared error", *(f"n {name}: GFLOPs, ms" for name in batches)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for halt in args.halt:
        for coef in COEFS[halt]:
            toy = counting(halt, coef, args.steps)
            loops, correlation, error = depths(toy)
            costs = [cost(toy, n_BT) for n_BT in batches.values()]
            cells = [halt, coef, " ".join(map(str, loops)), f"{correlation:.3f}", f"{error:.4f}"]
            cells += [f"{flops / 1e9:.2f}, {1000 * seconds:.0f}" for flops, seconds in costs]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main():
    parser = Parser(prog="toys.py", description="Toys whose right answer is known.")
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("count")
    add.add_argument("--halt", nargs="+", choices=[name for name in HALTS if name != "none"], default=list(COEFS))
    add.add_argument("--steps", type=int, default=1500)
    add.set_defaults(function=count)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
