"""Do experts become experts of domains, and what does it cost? Six domains, preset 100m-cpu (or another), against a
dense model and a cold start.

    python benchmarks/domains.py run --data data/domains --seeds 0 1 2
    python benchmarks/domains.py off --data data/domains --seeds 0 1 2
    python benchmarks/domains.py table

`run` trains the variants whose seeds are missing (several such commands may run side by side: each takes what no other
has begun) and adds a line for each to records/domains/results.jsonl; `off` switches one expert off after another in
what the warm start trained and notes what that does to each domain; `table` prints both as markdown. All variants see
the same rows in the same order but for the round robin; the dense one, whose steps are shorter, makes as many more as
fit into the same seconds."""

import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import track  # noqa: E402
from arithmetic import act, action_parsers, add_line, markdown, read_results  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import logger  # noqa: E402
import train_muon  # noqa: E402
from cli import UserError, positive  # noqa: E402
from distributed import World  # noqa: E402
from terminal import say  # noqa: E402
from tools import sources  # noqa: E402
from zoo import mixture  # noqa: E402
from zoo.recipes import ZOO_MUON  # noqa: E402

STEPS, VAL_TOKENS = 400, 6 * 2**14
PACE = 1.334  # of a MoE step on one core, in dense steps, measured side by side
HALF = [
    "--domain_steps",
    str(3 * STEPS // 8),
    "--domain_anneal_steps",
    str(STEPS // 8),
]  # asked and let go; the other half is free
VARIANTS = {  # flags on top of the preset's, and steps over STEPS
    "warm": (["--round_robin_steps", "0", "--domain_coef", "0.3", *HALF], 1.0),
    "cold": (["--round_robin_steps", "0", "--domain_coef", "0"], 1.0),
    "dense": (["--round_robin_steps", "0", "--domain_coef", "0", "--pattern", "D"], PACE),
    "round_robin": (["--round_robin_steps", str(STEPS // 2), "--domain_coef", "0.3", *HALF], 1.0),
    "round_robin_alone": (["--round_robin_steps", str(STEPS // 2), "--domain_coef", "0"], 1.0),
}
VARIANTS["round_robin_naive"] = (
    [*VARIANTS["round_robin"][0], "--balance_coef", "0", "--importance_coef", "1"],
    1.0,
)  # balance within each batch


def begun(folder: Path) -> bool:
    """Take a run for this process; False if another has it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.with_suffix(".begun").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def run(args):
    corpus = {name: track.shards_sha256(data.load_meta(folder)) for name, folder in mixture.domains(args.data).items()}
    for seed in args.seeds:
        for name in args.variants:
            flags, pace = VARIANTS[name]
            folder, steps = Path(args.out_dir) / f"{name}_{seed}", round(args.steps * pace)
            done = any(
                (line["variant"], line["seed"], line["preset"], line["steps"]) == (name, seed, args.preset, steps)
                for line in track.read_tuning(args.results, "seed")
                if "steps" in line
            )
            if done or not begun(folder):
                state = "done" if done else "another process's: its .begun file is there"
                say(f"{name} with seed {seed} is {state}")
                continue
            base = [
                "--preset",
                args.preset,
                "--sample_tokens",
                "0",
                "--val_every",
                str(max(1, steps // 8)),
                f"--val_tokens={args.val_tokens}",
            ]
            ours = (
                f"--data={args.data} --out_dir={args.out_dir} --experiment_name={folder.name} --seed={seed} "
                f"--num_iterations={steps}"
            )
            status = None
            try:
                status = track.launch(["train_zoo.py", *base, *flags, *args.flags, *ours.split()], args.threads)
            finally:
                if status != 0:  # or Ctrl-C
                    folder.with_suffix(".begun").unlink()
            if status:
                raise UserError(f"{name} with seed {seed} failed; what it said is above")
            rows = [row for row in logger.read_run(folder)["rows"] if "val/bpb" in row]
            line = {
                "variant": name,
                "seed": seed,
                "preset": args.preset,
                "flags": [*base, *flags, *args.flags],
                "steps": steps,
                "threads": args.threads,
                "seconds": rows[-1]["train_time"],
                "corpus_sha256": corpus,
                "torch": sources.torch_version(),
                "val/bpb": rows[-1]["val/bpb"],
                "domains": {domain: rows[-1][f"val/{domain}/bpb"] for domain in corpus},
                "information": {
                    row["step"]: row["moe/domain_information"] for row in rows if "moe/domain_information" in row
                },
            }
            add_line(args.results, line)
            print(f"{folder.name}: {line['val/bpb']:.4f} bits per byte after {line['seconds']:.0f} s", flush=True)


@torch.no_grad()
def off(args):
    """Bits per byte of each domain with each expert switched off, less those with all on."""
    for seed in args.seeds:
        net, manifest = checkpoint.load_model_from_run(Path(args.out_dir) / f"warm_{seed}" / "checkpoint")
        hp = train_muon.parse(
            ZOO_MUON, ["--preset", args.preset, f"--data={args.data}", f"--val_tokens={args.val_tokens}"]
        )[1]
        nbytes, names = torch.tensor(mixture.load_meta(args.data)["token_bytes"]), list(mixture.domains(args.data))

        def losses() -> list[float]:
            exchange = train_muon.Exchange(net, World(0, 1, torch.device("cpu")))
            session = train_muon.Session(
                ZOO_MUON, hp, net, exchange, logger.PhaseTimer("cpu"), micro_rows=4, token_bytes=nbytes
            )
            values = ZOO_MUON.evaluate(session, manifest["step"])
            return [values[f"val/{name}/bpb"] for name in names]

        whole, raised = losses(), []
        for expert in range(net.config.num_experts):
            downs = [block.ffn.experts.down for block in net.blocks]
            kept = [down[expert].clone() for down in downs]
            for down in downs:
                down[expert] = 0
            raised.append([after - before for after, before in zip(losses(), whole)])
            for down, old in zip(downs, kept):
                down[expert] = old
        own = [name for name in names if name != hp.trunk_domain]
        add_line(args.results, {"variant": "warm", "seed": seed, "off": raised, "domains": names, "own": own})
        print(
            f"seed {seed}: " + ", ".join(f"{name} {raised[i][names.index(name)]:+.3f}" for i, name in enumerate(own)),
            flush=True,
        )


def tables(lines: list[dict]) -> str:
    trained = [line for line in lines if "steps" in line]
    of = {name: {line["seed"]: line for line in trained if line["variant"] == name} for name in VARIANTS}
    domains, rows = list(trained[0]["domains"]) if trained else [], []
    for name, runs in of.items():
        if runs:
            first = next(iter(runs.values()))
            mean = statistics.mean
            ends, warm = ({seed: line["val/bpb"] for seed, line in of[which].items()} for which in (name, "warm"))
            is_paired = name != "warm" and ends.keys() & warm.keys()
            gain = "{:+.4f} ± {:.4f}".format(*track.paired(ends, warm)) if is_paired else ""
            told = [list(line["information"].values()) for line in runs.values()]
            middle = (
                [f"{mean([bits[len(bits) // 2] for bits in told]):.2f}", f"{mean([bits[-1] for bits in told]):.2f}"]
                if told[0]
                else ["", ""]
            )
            rows.append(
                [
                    f"`{name}`",
                    first["steps"],
                    *(f"{mean([line['domains'][domain] for line in runs.values()]):.3f}" for domain in domains),
                    f"{mean(ends.values()):.4f}",
                    gain,
                    *middle,
                    len(runs),
                ]
            )
    columns = ["variant", "steps", *domains, "all", "less warm's", "bits told half way", "at the end", "n"]
    text, offs = markdown(columns, rows), [line for line in lines if "off" in line]
    if offs:
        own, names = offs[0]["own"], offs[0]["domains"]
        raised = [
            [statistics.mean(line["off"][i][d] for line in offs) for d in range(len(names))]
            for i in range(len(offs[0]["off"]))
        ]
        mark = lambda x, row: f"**{x:+.3f}**" if x == max(row) else f"{x:+.3f}"
        rows = [
            [own[i] if i < len(own) else f"expert {i}", *(mark(x, row) for x in row)] for i, row in enumerate(raised)
        ]
        text += f"\n\n{markdown(['without the expert of', *names], rows)}"
    return text


def table(args):
    print(tables(read_results(args.results, "variant")))


def main():
    parser, add = action_parsers(
        "domains", "Experts of domains: a warm start against a cold one and a dense model.", (run, off, table)
    )
    for function in (run, off):
        add[function].add_argument("--preset", choices=list(ZOO_MUON.presets), default="100m-cpu")
        add[function].add_argument("--val_tokens", type=positive, default=VAL_TOKENS)
    add[run].add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add[run].add_argument("--steps", type=positive, default=STEPS)
    add[run].add_argument(
        "--flags", nargs="*", default=[], help="for train_zoo.py, as words behind =, for instance =--n_layer=2"
    )
    args = parser.parse_args()
    if args.action == "run":
        args.flags = [word.removeprefix("=") for word in args.flags]
    act("domains", args)


if __name__ == "__main__":
    main()
