"""Stack, loop and pool of layers on problems that need a known number of operations (data.py --source arithmetic).

    python benchmarks/arithmetic.py run --seeds 0 1
    python benchmarks/arithmetic.py curve --models loop2x4 loop2x4_act
    python benchmarks/arithmetic.py table

All models take the same number of steps over the same data and differ in which layers run how often: `loop2x4` is two
layers run four times, `pool4x2` picks one of four layers in each of two steps. `run` trains the models whose seeds are
missing (two of them may share the seeds), leaves the runs in --out_dir, where `python logger.py --routes` draws where
their tokens went, and adds a line for each to records/arithmetic/results.jsonl; `curve` evaluates trained loops with
other numbers of loops; `table` prints both as markdown. Seeds fix the order of the data, so differences are taken seed
by seed."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import track  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import logger  # noqa: E402
import model  # noqa: E402
import train_muon  # noqa: E402
from cli import Parser, UserError, command_line, positive, seed_number  # noqa: E402
from tools import routes, sources  # noqa: E402
from zoo.recipes import ZOO_MUON  # noqa: E402

STEPS, ROUTES = 600, 2**15  # optimizer steps of 4,096 bytes; tokens of validation text whose answers are looked at
DATA = "data.py --source arithmetic --encoding bytes --max_tokens 4_000_000".split()
BASE = """--preset cpu --seq_len 256 --window_size 256 --window L --attention A --batch_tokens 4096
          --micro_batch_tokens 4096 --n_embd 64 --n_head 4 --head_dim 16 --mlp_ratio 4 --pattern D --value_embeds 0
          --ngrams= --val_every 0 --sample_tokens 0""".split()


def stack(layers: int) -> list[str]:
    return ["--n_layer", str(layers)]


def loop(layers: int, loops: int, *more: str) -> list[str]:
    return [*stack(layers), "--depth", "loop", "--loops", str(loops), *more]


def pool(layers: int, steps: int, *more: str) -> list[str]:
    """Half of the run goes from a soft mixture to one layer per step, which is what evaluation takes."""
    return [
        *stack(layers),
        "--depth",
        "routed",
        "--loops",
        str(steps),
        "--route_training",
        "anneal",
        "--anneal_steps",
        str(STEPS // 2),
        *more,
    ]


MODELS = {  # name -> flags; the first is what the others are compared with
    "stack4": stack(4),
    "stack2": stack(2),
    "stack8": stack(8),
    "loop1x4": loop(1, 4),
    "loop2x2": loop(2, 2),
    "loop2x4": loop(2, 4),
    "loop4x2": loop(4, 2),
    **{f"loop2x4_{halt}": loop(2, 4, "--halt", halt) for halt in ("act", "ponder")},
    **{f"pool{n}x{steps}": pool(n, steps) for n in (1, 2, 4) for steps in (2, 4)},
    **{f"pool{n}x{steps}_soft": pool(n, steps, "--route_training", "soft") for n, steps in ((2, 2), (2, 4), (4, 2))},
    "pool2x4_identity": pool(2, 4, "--identity_layers", "1"),
    "pool2x4_learned": pool(2, 4, "--controller", "learned"),
    "stack4_masked": [*stack(4), "--objective", "masked"],
    "loop2x4_masked": loop(2, 4, "--objective", "masked"),
    "pool2x4_masked": pool(2, 4, "--objective", "masked"),
}


def add_line(path: Path, line: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def answers(folder: Path) -> dict:
    """How often the run's answers are right by the operations that they need, and the loops that they take."""
    (path,) = (folder / "routes").glob("step_*.npz")
    found = routes.analyse(routes.read_routes(path))
    return {name: found[name] for name in ("accuracy_by_difficulty", "loops_by_difficulty") if name in found}


def run(args):
    if not Path(args.data).exists():
        subprocess.run([sys.executable, *DATA, "--out", args.data], cwd=ROOT, check=True)
    corpus = track.shards_sha256(data.load_meta(args.data))
    for seed in args.seeds:
        for name in args.models:
            if any(
                (line["model"], line["seed"], line.get("steps")) == (name, seed, args.steps)
                for line in track.read_tuning(args.results, "seed", "model")
            ):
                continue
            flags, folder = [*BASE, *MODELS[name]], Path(args.out_dir) / f"{name}_{seed}"
            ours = (
                f"--data={args.data} --out_dir={args.out_dir} --experiment_name={folder.name} --seed={seed} "
                f"--num_iterations={args.steps}"
            )
            words = [
                "train_zoo.py",
                *flags,
                *ours.split(),
                f"--routes_tokens={args.tokens}",
                f"--val_tokens={8 * args.tokens}",
            ]
            if track.launch(words, args.threads):
                raise UserError(f"{name} with seed {seed} failed; what it said is above")
            row = logger.get_final_row(logger.read_run(folder)["rows"], "val/bpb")
            config, hp, _ = train_muon.parse(
                ZOO_MUON, [*flags, f"--data={args.data}", "--vocab_size=257", "--eot_token=256"]
            )
            line = {
                "model": name,
                "seed": seed,
                "steps": args.steps,
                "flags": flags,
                "corpus_sha256": corpus,
                "torch": sources.torch_version(),
                "parameters": model.count_parameters(config)["total"],
                "flops_per_token": model.flops_per_token(config, hp.seq_len) / 3,
                "threads": args.threads,
                "seconds": row["train_time"],
                "val/bpb": row["val/bpb"],
                **answers(folder),
            }
            add_line(args.results, line)
            print(f"{folder.name}: {row['val/bpb']:.4f} bits per byte after {row['train_time']:.0f} s", flush=True)


def curve(args):
    for seed in args.seeds:
        for name in args.models:
            net, manifest = checkpoint.load_model_from_run(Path(args.out_dir) / f"{name}_{seed}" / "checkpoint")
            if net.config.depth != "loop":
                raise UserError(
                    f"{name} has no loops; choose one of {', '.join(name for name in MODELS if 'loop' in name)}"
                )
            for loops in range(1, 2 * net.config.loops + 1):
                net.eval_loops = loops
                found = routes.analyse(
                    routes.collect_validation_routes(net, manifest["encoding"], args.data, args.tokens)
                )
                add_line(
                    args.results,
                    {
                        "model": name,
                        "seed": seed,
                        "eval_loops": loops,
                        "accuracy_by_difficulty": found["accuracy_by_difficulty"],
                    },
                )
                print(
                    f"{name}_{seed}, {loops} loops: chains {accuracy(found, 'chain'):.3f}, "
                    f"sums {accuracy(found, 'sum'):.3f}",
                    flush=True,
                )


def accuracy(line: dict, kind: str, least: int = 1) -> float:
    """The mean over difficulties, of `least` operations and more."""
    return statistics.mean(
        share for needed, share in line["accuracy_by_difficulty"][kind].items() if int(needed) >= least
    )


def markdown(columns: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def tables(lines: list[dict]) -> str:
    """Every model beside the first, seed by seed; then loops by the number of loops in evaluation."""
    trained = [line for line in lines if "val/bpb" in line]
    of = {name: {line["seed"]: line for line in trained if line["model"] == name} for name in MODELS}
    base, rows = next(iter(of)), []
    measures = {
        "bits per byte": lambda line: line["val/bpb"],
        "chains right": lambda line: accuracy(line, "chain"),
        "of 5 steps and more": lambda line: accuracy(line, "chain", 5),
        "sums right": lambda line: accuracy(line, "sum"),
    }
    for name, runs in of.items():
        if not runs:
            continue
        values = {column: {seed: measure(line) for seed, line in runs.items()} for column, measure in measures.items()}
        line, right = next(iter(runs.values())), {seed: accuracy(line, "chain") for seed, line in of[base].items()}
        alike = name == base or name.endswith("masked")  # which asks something else
        gains = "" if alike else "{:+.3f} ± {:.3f}".format(*track.paired(values["chains right"], right))
        rows.append(
            [
                f"`{name}`",
                f"{line['parameters'] / 1e6:.2f}",
                f"{line['flops_per_token'] / 1e6:.2f}",
                *(
                    f"{statistics.mean(value.values()):.{4 if 'bits' in column else 3}f}"
                    for column, value in values.items()
                ),
                gains,
                len(runs),
            ]
        )
    text = markdown(
        ["model", "M parameters", "MFLOPs forward per token", *measures, f"chains: less {base}'s", "n"], rows
    )
    curves = {}
    for line in lines:
        if "eval_loops" in line:
            curves.setdefault(line["model"], {}).setdefault(line["eval_loops"], []).append(accuracy(line, "chain"))
    most = max((max(curve) for curve in curves.values()), default=0)
    rows = [
        [
            f"`{name}`",
            *(f"{statistics.mean(curve[i]):.3f}" if i in curve else "" for i in range(1, most + 1)),
            len(curve[1]),
        ]
        for name, curve in curves.items()
    ]
    return text + (f"\n\n{markdown(['chains right after loops', *range(1, most + 1), 'n'], rows)}" if rows else "")


def table(args):
    print(tables(read_results(args.results, "model")))


def read_results(path: Path, key: str) -> list[dict]:
    """The lines of a file of results, each with a seed and this key. Raises UserError if there are none."""
    lines = track.read_tuning(path, "seed", key)
    if not lines:
        raise UserError(f"{path} holds no results; make some with `run`, or name another file with --results")
    return lines


def action_parsers(name: str, description: str, actions: tuple) -> tuple[Parser, dict]:
    """What the command lines of experiments in records/<name> share: the first action trains, the last only reads. And
    the actions' parsers."""
    parser = Parser(prog=f"{name}.py", description=description)
    subparsers = parser.add_subparsers(dest="action", required=True)
    add = {function: subparsers.add_parser(function.__name__) for function in actions}
    for function, own in add.items():
        own.add_argument("--results", type=Path, default=ROOT / "records" / name / "results.jsonl")
        own.set_defaults(function=function)
        if function is not actions[-1]:
            own.add_argument("--seeds", type=seed_number, nargs="+", required=True)
            own.add_argument("--data", default=f"data/{name}")
            own.add_argument("--out_dir", default=f"logs/{name}")
    add[actions[0]].add_argument("--threads", type=positive, default=1)
    return parser, add


def act(name: str, args):
    """Run the action, from the repository's root; a mistake is one sentence."""
    os.chdir(ROOT)
    with command_line(f"{name}.py"):
        args.function(args)


def main():
    parser, add = action_parsers(
        "arithmetic", "Stack, loop and pool of layers on problems of known difficulty.", (run, curve, table)
    )
    for function in (run, curve):
        add[function].add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
        add[function].add_argument("--tokens", type=positive, default=ROUTES)
    add[run].add_argument("--steps", type=positive, default=STEPS)
    act("arithmetic", parser.parse_args())


if __name__ == "__main__":
    main()
