"""How long a training step waits for the other ranks, with and without overlap, with and without a slower network.

    python benchmarks/overlap.py                       # two ranks on this machine, preset cpu
    python benchmarks/overlap.py --ranks 2 --delay_ms 20 --steps 15 --json overlap.json

Exposed wait is the phase "communication" of train_step: time in which the training thread does nothing but wait. Both
variants send the same buckets in the same order and end bit for bit alike; they take turns step by step in one run, so
the machine's drift hits them alike. The delay stands for a network: a collective is not done before `delay_ms` have
passed since it began, and waiting for that costs no processor. On a CPU the ranks and gloo share the cores, so without
a delay no speed-up is to be expected."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.distributed as dist  # noqa: E402

import distributed  # noqa: E402
import guards  # noqa: E402
import model  # noqa: E402
import settings
import train_muon  # noqa: E402
from cli import Parser, command_line, positive  # noqa: E402
from logger import PhaseTimer  # noqa: E402


class Delayed:
    """A collective in flight that takes at least `seconds` from now."""

    def __init__(self, work, seconds: float):
        self.work, self.done = work, time.perf_counter() + seconds

    def wait(self):
        self.work.wait()
        time.sleep(max(0.0, self.done - time.perf_counter()))


def delayed(collective, seconds: list[float]):
    return lambda *words, **names: Delayed(collective(*words, **names), seconds[0])


def measure(args) -> dict[str, dict[str, list[float]]]:
    """variant -> seconds of whole steps and of waiting in them, the slowest rank's of each step."""
    config, hp = model.PRESETS[args.preset], train_muon.PRESETS[args.preset]
    world = distributed.init_distributed(hp.device, hp.collectives_timeout)
    micro_rows = settings.micro_batch_rows(hp.batch_rows, hp, world)
    micro_steps = hp.batch_rows // micro_rows // world.size
    next_step = train_muon.random_batches(config, hp, micro_steps, micro_rows, world.device)
    net, timer, delay = model.build(config).to(world.device), PhaseTimer(world.device.type), [0.0]
    distributed.reduce_scatter = delayed(distributed.reduce_scatter, delay)
    distributed.all_gather = delayed(distributed.all_gather, delay)
    sessions = {}
    for overlap in (False, True):
        exchange = train_muon.Exchange(net, world, hp.bucket_mb, overlap)
        exchange.attach_optimizers(train_muon.MUON, hp)
        sessions[overlap] = train_muon.Session(train_muon.MUON, hp, net, exchange, timer)
    variants = {f"{'overlapped' if overlap else 'synchronous'}, delay {ms:g} ms": (overlap, ms / 1000)
                for ms in (0.0, args.delay_ms) for overlap in (False, True)}  # fmt: skip
    seconds = {name: {"step": [], "wait": []} for name in variants}
    for round_ in range(args.steps + 2):  # two rounds to warm up
        for name, (overlap, delay[0]) in variants.items():
            dist.barrier()
            began = time.perf_counter()
            train_muon.train_step(sessions[overlap], next_step, 0)
            own = time.perf_counter() - began, timer.row()["time/communication"]
            slowest = [max(values) for values in zip(*guards.gather_objects(own, world))]
            if round_ >= 2:
                seconds[name]["step"].append(slowest[0])
                seconds[name]["wait"].append(slowest[1])
    buckets = len(sessions[True].exchange.transfers)
    dist.destroy_process_group()
    return {"buckets": buckets, "ranks": world.size, "seconds": seconds}


def table(result: dict) -> str:
    steps = len(next(iter(result["seconds"].values()))["step"])
    lines = [f"{result['ranks']} ranks, {result['buckets']} buckets; medians of {steps} interleaved steps",
             f"{'variant':<32}{'step':>10}{'exposed wait':>15}"]  # fmt: skip
    for name, values in result["seconds"].items():
        step, wait = (1000 * statistics.median(values[key]) for key in ("step", "wait"))
        lines.append(f"{name:<32}{step:>7.1f} ms{wait:>12.1f} ms")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(
        prog="overlap.py", description="Exposed wait per step, with and without overlap and an injected delay."
    )
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--preset", choices=list(train_muon.PRESETS), default="cpu")
    parser.add_argument(
        "--delay_ms",
        "--delay-ms",
        type=float,
        default=20.0,
        help="least duration of each collective in the delayed variants",
    )
    parser.add_argument("--steps", type=positive, default=15, help="measured steps of each variant")
    parser.add_argument("--json", type=Path, help="write every measured second there")
    return parser.parse_args(argv)


@command_line("overlap.py")
def main():
    args = parse()
    if "RANK" not in os.environ:  # start the ranks, each of them comes here again
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        sys.exit(subprocess.run([*launch, __file__, *sys.argv[1:]], env=env).returncode)
    result = measure(args)
    if int(os.environ["RANK"]) == 0:
        print(table(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
