"""When does a mixture of experts win in seconds? A ladder of runs, a law through them, and its answers.

    python benchmarks/ladder.py predict --active 20M --tokens 600M --experts 32 --tax 1.2
    python benchmarks/ladder.py predict --active 20M --tokens 600M --experts 32 --tax 1.2 --law published
    python benchmarks/ladder.py best --flops 1e15 --experts 32 --tax 1.2 --head 0.4M
    python benchmarks/ladder.py fit                              # the law, a size left out, and the picture
    python benchmarks/ladder.py fit --points theirs.csv          # another ladder: active,tokens,experts,loss
    python benchmarks/ladder.py run                              # the runs of ladder/plan.json that are missing: hours

predict  answers from the fit, without running anything: losses of the dense twin and of the mixture, the speed-up in
         seconds, and the length of training from which it is above 1.
best     compares the two kinds at equal FLOPs, each at the size that suits it best: a twin of another size may beat the
         mixture where a twin of its own size does not.
fit      prints the coefficients with their intervals, how well each size is predicted without its own points, and draws
         ladder.png beside the points.
run      trains two models at a time, one thread each, and adds a line per run to ladder/points.csv. The same command
         goes on where it was cut off.

The law (Ludziejewski et al. 2502.05172): loss = a Ê^δ N^(α + γ ln Ê) + b Ê^ω D^(β + ζ ln Ê) + c, for N active
parameters outside the tables and the head, D training tokens and E experts, where
1 / Ê = 1 / (E - 1 + 1 / (1/2.1 - 1/294)) + 1/294. E = 1 is the dense twin. These two constants reproduce the paper's
coefficients at E = 1, 8, 16 and 32 to 0.06%.

A tax is the time of the mixture's step over that of its dense twin's, which has the same active parameters. If the twin
needs D' tokens for the loss of the mixture after D, then the speed-up in seconds is D' / (tax D). The unit of a loss is
free: here it is bits per byte, in the paper nats per token.

Intervals hold 90% of 200 fits to the fitted losses plus residuals drawn again. They do not cover a wrong law."""

import csv
import math
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import logger  # noqa: E402
from cli import Parser, UserError, command_line, positive, whole_number  # noqa: E402
from terminal import say  # noqa: E402
from tools import plots  # noqa: E402

LADDER = ROOT / "benchmarks" / "ladder"
COLUMNS = ("active", "tokens", "experts", "loss")
REFITS, COVERED = 200, 0.9

# ---------------------------------------------------------------------------------------------------------------------
# The law

E_START, E_MAX = 2.1, 294.0
PUBLISHED = {  # E: m, mu, n, nu of m N^-mu + n D^-nu + 1.3637, nats per token (2502.05172)
    1: (30.364, 0.1817, 53.984, 0.1965), 8: (21.833, 0.1676, 119.91, 0.2338),
    16: (19.016, 0.1617, 167.51, 0.2494), 32: (16.542, 0.1557, 234.67, 0.2652)}  # fmt: skip
COEFFICIENTS = ("ln a", "delta", "alpha", "gamma", "ln b", "omega", "beta", "zeta", "ln c")


def log_effective(experts):
    """ln Ê of a number of experts."""
    offset = 1 / (1 / E_START - 1 / E_MAX)
    return -np.log(1 / (np.asarray(experts, float) - 1 + offset) + 1 / E_MAX)


class Law(NamedTuple):
    """Coefficients in the order of COEFFICIENTS; N and D count in units of `active` and `tokens`."""

    theta: np.ndarray
    active: float = 1.0
    tokens: float = 1.0

    def loss(self, active, tokens, experts):
        ln_b, slope = self.of_data(experts)
        return self.floor(active, experts) + np.exp(ln_b + slope * np.log(np.asarray(tokens) / self.tokens))

    def floor(self, active, experts):
        """The loss after any number of tokens: the term of the size and the constant."""
        (ln_a, delta, alpha, gamma, *_, ln_c), x = self.theta, log_effective(experts)
        of_size = np.exp(ln_a + delta * x + (alpha + gamma * x) * np.log(np.asarray(active) / self.active))
        return of_size + math.exp(ln_c)

    def of_data(self, experts):
        """Logarithm of the term of the data at D = `tokens`, and its slope over ln D."""
        (ln_b, omega, beta, zeta), x = self.theta[4:8], log_effective(experts)
        return ln_b + omega * x, beta + zeta * x

    def losses(self, points: dict[str, np.ndarray]) -> np.ndarray:
        """Of every point."""
        return self.loss(points["active"], points["tokens"], points["experts"])

    def dense_tokens(self, active, loss):
        """Tokens after which the dense twin has this loss; inf if never."""
        left, (ln_b, slope) = np.maximum(loss - self.floor(active, 1), 0), self.of_data(1)
        with np.errstate(divide="ignore", over="ignore"):
            return self.tokens * np.exp((np.log(left) - ln_b) / slope)

    def speed_up(self, active, tokens, experts, tax):
        """Seconds of the dense twin over those of the mixture, to the mixture's loss after `tokens`."""
        return self.dense_tokens(active, self.loss(active, tokens, experts)) / (np.asarray(tokens) * tax)

    def break_even(self, active, experts, tax):
        """The fewest tokens from which the mixture is faster up to 10^13; inf if it is not faster there."""
        tokens = np.geomspace(1e5, 1e13, 2000)
        slower = self.speed_up(active, tokens, experts, tax) < 1
        return math.inf if slower[-1] else tokens[slower.nonzero()[0].max() + 1] if slower.any() else tokens[0]

    def best(self, flops, experts, tax, head):
        """The least loss after 6 (N + head) D tax = flops, with the N and D that reach it; `head` is its parameters."""
        active = np.geomspace(1e4, 1e11, 3000)
        tokens = flops / (6 * tax * (active + head))
        loss = self.loss(active, tokens, experts)
        i = loss.argmin()
        return float(loss[i]), float(active[i]), float(tokens[i])

    def speed_up_at_best(self, flops, experts, tax, head):
        """FLOPs that the dense model needs at its best sizes for the mixture's loss at its best size, over `flops`."""
        loss, tried = self.best(flops, experts, tax, head)[0], flops * np.geomspace(1e-3, 1e3, 300)
        reached = [self.best(dense_flops, 1, 1.0, head)[0] for dense_flops in tried]
        return float(np.interp(-loss, -np.array(reached), tried)) / flops


def published_law() -> Law:
    """The paper's law, from its coefficients at four numbers of experts."""
    x = np.stack([np.ones(len(PUBLISHED)), log_effective(list(PUBLISHED))], axis=1)
    m, mu, n, nu = np.array(list(PUBLISHED.values())).T
    (ln_a, delta), (alpha, gamma), (ln_b, omega), (beta, zeta) = (
        np.linalg.lstsq(x, y, rcond=None)[0] for y in (np.log(m), -mu, np.log(n), -nu))  # fmt: skip
    return Law(np.array([ln_a, delta, alpha, gamma, ln_b, omega, beta, zeta, math.log(1.3637)]))


# ---------------------------------------------------------------------------------------------------------------------
# The fit


def read_points(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file. Raises UserError for a file that is missing, lacks a column, or holds no number there."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it with run, or name another file") from None
    columns = {}
    for name in COLUMNS:
        try:
            columns[name] = np.array([float(row[name]) for row in rows])
        except (KeyError, TypeError, ValueError):
            columns[name] = np.array(math.nan)
        if not ((columns[name] > 0) & np.isfinite(columns[name])).all():
            raise UserError(f"{path} needs a number above 0 in column {name!r} of every row")
    return columns


def fit(points: dict[str, np.ndarray], start: Law | None = None) -> Law:
    """The law of least squared relative errors. Raises UserError for points that cannot determine it."""
    varied = {name: len(np.unique(points[name])) for name in COLUMNS[:3]}
    if len(points["loss"]) <= len(COEFFICIENTS) or min(varied.values()) < 2:
        there = ", ".join(f"{count} of {name}" for name, count in varied.items())
        raise UserError(f"{len(points['loss'])} points with values {there}: the law needs at least "
                        f"{len(COEFFICIENTS) + 1}, and two values of each; run more of the ladder")
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise UserError("the fit needs scipy: `pip install scipy`") from None
    units = [math.exp(np.log(points[name]).mean()) for name in ("active", "tokens")]
    residuals = lambda theta: np.log(Law(theta, *units).losses(points) / points["loss"])
    middle = math.exp(np.log(points["loss"]).mean())
    starts = [start.theta] if start else [
        np.array([math.log(middle * size), -0.1, -0.2, 0.01, math.log(middle * text), 0.1, -0.25, -0.01,
                  math.log(middle * (1 - size - text))])
        for size in (0.1, 0.3) for text in (0.1, 0.4)]  # fmt: skip
    low = np.array([-20, -2, -1.5, -0.3, -20, -2, -1.5, -0.3, math.log(middle) - 7])
    high = np.array([20, 2, 0.0, 0.3, 20, 2, 0.0, 0.3, math.log(middle)])
    fits = [least_squares(residuals, np.clip(theta, low + 1e-6, high - 1e-6), bounds=(low, high)) for theta in starts]
    return Law(min(fits, key=lambda found: found.cost).x, *units)


def refits(points: dict[str, np.ndarray], law: Law, count: int = REFITS) -> list[Law]:
    """Laws fitted to the fitted losses plus residuals drawn again, widened for the coefficients of the fit."""
    fitted, generator = law.losses(points), np.random.default_rng(0)
    residuals = np.log(points["loss"] / fitted)
    residuals = residuals * math.sqrt(len(residuals) / (len(residuals) - len(COEFFICIENTS)))
    draws = generator.choice(residuals, (count, len(residuals)))
    return [fit(points | {"loss": fitted * np.exp(draw)}, start=law) for draw in draws]


def interval(values) -> tuple[float, float]:
    """The bounds that COVERED of the values lie between."""
    low, high = np.quantile(values, [(1 - COVERED) / 2, (1 + COVERED) / 2], method="nearest")
    return float(low), float(high)


def without(points: dict[str, np.ndarray], active: float) -> tuple[dict, dict]:
    """Points of other sizes, and of this one."""
    this = points["active"] == active
    return ({name: values[~this] for name, values in points.items()},
            {name: values[this] for name, values in points.items()})  # fmt: skip


def error_of(law: Law, points: dict[str, np.ndarray]) -> float:
    """Root mean squared relative error."""
    return math.sqrt(np.mean(np.log(law.losses(points) / points["loss"]) ** 2))


def left_out(points: dict[str, np.ndarray]) -> dict[float, float]:
    """Active parameters -> error of a law fitted to all other sizes: at least two, with enough points for a law."""
    sizes = np.unique(points["active"])
    parts = {active: without(points, active) for active in sizes if len(sizes) > 2}
    enough = {active: part for active, part in parts.items() if len(part[0]["loss"]) > len(COEFFICIENTS)}
    return {active: error_of(fit(others), these) for active, (others, these) in enough.items()}


# ---------------------------------------------------------------------------------------------------------------------
# fit, predict


def number(value: float) -> str:
    """A count with its unit, such as 1.6M; `never` for an infinite one."""
    if math.isinf(value):
        return "never"
    power = min(max(int(math.log10(value)) // 3, 0), 4)
    return f"{value / 1000**power:.3g}{' KMBT'[power].strip()}"


def show_fit(args):
    points = read_points(args.points)
    law = fit(points)
    others = refits(points, law)
    print(f"{len(points['loss'])} points, root mean squared relative error {error_of(law, points):.2%}; "
          f"N in units of {number(law.active)}, D of {number(law.tokens)}")
    for i, name in enumerate(COEFFICIENTS):
        low, high = interval([other.theta[i] for other in others])
        print(f"{name:6} {law.theta[i]:8.4f}   [{low:.4f}, {high:.4f}]")
    if min(len(np.unique(points[name])) for name in COLUMNS[:3]) < 3:
        say("note: two values of size, tokens or experts do not determine how the loss curves between and beyond them")
    for active, missed in left_out(points).items():
        print(f"{number(active)} active parameters, predicted from the other sizes: error {missed:.2%}")
    draw(points, law, args.points.with_name("ladder.png"), args.tax)


def chosen_laws(args) -> list[Law]:
    """The law of args.law, and behind it the laws of its intervals; none behind the published one."""
    if args.law == "published":
        return [published_law()]
    points = read_points(args.points)
    law = fit(points)
    for name in COLUMNS[:3]:
        value, low, high = getattr(args, name, points[name].min()), points[name].min(), points[name].max()
        if not low <= value <= high:
            say(f"note: {name} {number(value)} is outside the ladder, {number(low)} to {number(high)}")
    return [law, *refits(points, law)]


def show(name: str, laws: list[Law], answer, shown=lambda value: f"{value:.3f}"):
    """Print the answer of the first law, and its interval over the others."""
    value, *others = map(answer, laws)
    line = f"{name}: {shown(value)}"
    if others:
        low, high = interval(others)
        line += f"   {COVERED:.0%}: [{shown(low)}, {shown(high)}]"
    print(line)


def predict(args):
    laws, question = chosen_laws(args), (args.active, args.tokens, args.experts)
    dense, mixture = (laws[0].loss(args.active, args.tokens, experts) for experts in (1, args.experts))
    print(f"loss: dense {dense:.4f}, {args.experts} experts {mixture:.4f}")
    speed_up = lambda law: float(law.speed_up(*question, args.tax))
    show(f"speed-up in seconds at a tax of {args.tax:g}", laws, speed_up)
    even = lambda law: law.break_even(args.active, args.experts, args.tax)
    show("tokens from which it is above 1", laws, even, number)


def best(args):
    laws = chosen_laws(args)
    for experts, tax in ((1, 1.0), (args.experts, args.tax)):
        loss, active, tokens = laws[0].best(args.flops, experts, tax, args.head)
        kind = f"{experts} experts" if experts > 1 else "dense"
        print(f"{kind}: loss {loss:.4f} with {number(active)} active parameters after {number(tokens)} tokens")
    question = args.flops, args.experts, args.tax, args.head
    show(f"speed-up in seconds at a tax of {args.tax:g}", laws, lambda law: law.speed_up_at_best(*question))


def draw(points: dict[str, np.ndarray], law: Law, path: Path, tax: float):
    """Lines of equal speed-up over tokens and active parameters, for each number of experts; 1 in bold."""
    counts = [int(experts) for experts in np.unique(points["experts"]) if experts > 1]
    tokens = np.geomspace(points["tokens"].min() / 2, points["tokens"].max() * 30, 120)
    active = np.geomspace(points["active"].min() / 2, points["active"].max() * 10, 120)
    with plots.open_figure(path) as figure:
        figure.set_size_inches(4.6 * len(counts), 4.4)
        axes = np.atleast_1d(figure.subplots(1, len(counts), sharey=True))
        for ax, experts in zip(axes, counts):
            for drawn, colour, label in zip((law, published_law()), plots.COLOURS, ("this ladder", "2502.05172")):
                ratio = np.minimum(drawn.speed_up(active[:, None], tokens, experts, tax), 9)
                lines = ax.contour(tokens, active, ratio, [0.8, 0.9, 1, 1.25, 1.5, 2], colors=colour,
                                   linewidths=[1, 1, 2.5, 1, 1, 1])  # fmt: skip
                ax.clabel(lines, fontsize=8)
                ax.plot([], [], color=colour, label=label)
            there = points["experts"] == experts
            ax.plot(points["tokens"][there], points["active"][there], "o", color="#4b535d", label="runs")
            ax.set(xscale="log", yscale="log", xlabel="training tokens", title=f"{experts} experts, tax {tax:g}")
        axes[0].set_ylabel("active parameters outside tables")
        axes[-1].legend(loc="lower right")
    say(f"{path}")


# ---------------------------------------------------------------------------------------------------------------------
# run


class Rung(NamedTuple):
    """One run of the plan."""

    size: str
    experts: int
    tokens: int
    seed: int
    flags: tuple[str, ...]


def rungs(plan: dict) -> list[Rung]:
    """Every run of a plan, the cheapest first: sizes x tokens x experts x seeds."""
    words = {kind: {name: shlex.split(flags) for name, flags in plan[kind].items()} for kind in ("sizes", "experts")}
    found = [Rung(size, int(experts), tokens, seed, (*shlex.split(plan["flags"]), *of_size, *of_experts))
             for size, of_size in words["sizes"].items() for experts, of_experts in words["experts"].items()
             for tokens in plan["tokens"][size] for seed in plan["seeds"]]  # fmt: skip
    return sorted(found, key=lambda rung: (rung.tokens, rung.seed))


def run(args):
    """Train what points.csv lacks, args.together at a time; a line is added as each ends.

    Raises UserError for the first that failed, once those that run have ended."""
    plan, done = logger.read_json(args.plan), set()
    if args.points.exists():
        with open(args.points, newline="") as file:
            done = {(row["size"], *(int(row[name]) for name in Rung._fields[1:4])) for row in csv.DictReader(file)}
    wanted = rungs(plan)
    missing = [rung for rung in wanted if rung[:4] not in done and rung.tokens <= args.tokens
               and (not args.sizes or rung.size in args.sizes) and (not args.experts or rung.experts in args.experts)]
    say(f"{len(missing)} of {len(wanted)} runs are missing")
    failures = []
    with ThreadPoolExecutor(args.together) as pool:
        try:
            runs = [pool.submit(train, rung, plan) for rung in missing]
            for finished in as_completed(runs):
                if finished.cancelled():
                    continue
                if finished.exception():
                    failures.append(finished.exception())
                    for waiting in runs:
                        waiting.cancel()
                    continue
                row, is_new = finished.result(), not args.points.exists()
                with open(args.points, "a", newline="") as file:
                    writer = csv.DictWriter(file, list(row))
                    if is_new:
                        writer.writeheader()
                    writer.writerow(row)
                print(" ".join(f"{name} {value}" for name, value in row.items() if name != "flags"), flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]


def train(rung: Rung, plan: dict) -> dict:
    """Run one; its line of points.csv. Raises UserError if it fails."""
    import train_muon

    config, hp, _ = train_muon.parse(train_muon.MUON, list(rung.flags))
    steps, name = rung.tokens // hp.batch_tokens, f"{rung.size}-e{rung.experts}-{rung.tokens}-s{rung.seed}"
    if rung.tokens % hp.batch_tokens:
        raise UserError(f"{rung.tokens} tokens are no multiple of batch_tokens = {hp.batch_tokens}; mend the plan")
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(data=plan["data"], val_tokens=plan["val_tokens"], seed=rung.seed, num_iterations=steps,
                        val_every=0, checkpoint_every=0, sample_tokens=0, out_dir=folder,
                        experiment_name=name)  # fmt: skip
        words = [*rung.flags, *(f"--{flag}={value}" for flag, value in settings.items())]
        done = subprocess.run([sys.executable, "train_muon.py", *words], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"run {name} failed: {reason}")
        final = logger.get_final_row(logger.read_run(Path(folder) / name)["rows"], "val/bpb")
    return dict(size=rung.size, active=active_parameters(config), experts=rung.experts, tokens=rung.tokens,
                seed=rung.seed, loss=round(final["val/bpb"], 5), step_ms=round(1000 * final["train_time"] / steps, 1),
                flags=shlex.join(rung.flags))  # fmt: skip


def active_parameters(config) -> int:
    """Weights of one token's matmuls outside tables, head and router: the same for a mixture and its dense twin."""
    import torch

    import model

    with torch.device("meta"):
        net = model.build(config)
    kinds = net.parameter_kinds()
    return round(sum(p.numel() * net.active_share(name) for name, p in net.named_parameters()
                     if kinds[name] in ("matrix", "expert")))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def count(text: str) -> float:
    """A number above 0, as 20M or 600_000."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text!r} is not a count; it is written as 600000, 0.6M or 2B")
    return value


def at_least_two(text: str) -> int:
    return whole_number(text, 2)


def parse(argv: list[str] | None = None):
    calls = tuple(line.strip().partition("  #")[0] for line in __doc__.splitlines() if line.startswith("    python "))
    parser = Parser(prog="ladder.py", description=__doc__.splitlines()[0], examples=calls)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("predict", predict), ("best", best), ("fit", show_fit), ("run", run)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--points", type=Path, default=LADDER / "points.csv", help="CSV file of the runs")
        if name == "predict":
            command.add_argument("--active", type=count, required=True, help="parameters outside tables and head")
            command.add_argument("--tokens", type=count, required=True, help="training tokens")
        if name == "best":
            command.add_argument("--flops", type=count, required=True, help="of the training, tax included")
            command.add_argument("--head", type=count, required=True, help="its parameters, which take time too")
        if name in ("predict", "best"):
            command.add_argument("--experts", type=at_least_two, required=True)
            command.add_argument("--law", choices=("fit", "published"), default="fit")
        if name != "run":
            command.add_argument("--tax", type=count, default=1.1, help="step time over the dense twin's")
        else:
            command.add_argument("--plan", type=Path, default=LADDER / "plan.json")
            command.add_argument("--sizes", nargs="+", help="some of the plan's sizes")
            command.add_argument("--experts", nargs="+", type=positive, help="some of the plan's numbers of experts")
            command.add_argument("--tokens", type=count, default=math.inf, help="no run of more tokens")
            command.add_argument("--together", type=positive, default=2, help="runs at a time, one thread each")
    return parser.parse_args(argv)


@command_line("ladder.py")
def main():
    args = parse()
    args.function(args)


if __name__ == "__main__":
    main()
