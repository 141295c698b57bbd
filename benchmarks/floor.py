"""The least time that a training step can take on this machine: what each part must compute and move, at the rates
measured here; and the time that a real step takes.

    python benchmarks/floor.py                  # preset cpu: Muon, 4,096 tokens in rows of 1,024
    python benchmarks/floor.py --shape gpt2     # 8 experts, GPT-2's vocabulary, AdamW, rows of 512
    python benchmarks/floor.py --shape bytes --tokens 16384 --optimizer muon
    python benchmarks/floor.py --shape gpt2 --num_experts 64 --mlp_ratio 2 --json floor.json

A part's floor is the longer of two times: computing (matmul FLOPs at the best rate seen, plus exponentials at torch's
rate: both use the vector units, so they add up) and moving (bytes at the copy rates: prefetching hides it behind
computing). Parts wait for one another, so theirs add up. The column "own shapes" takes each part's matmuls at the rate
that a plain torch matmul of exactly that shape reaches instead: what remains above it is not the matmuls' fault.

What a part must move: it reads what it needs once and writes its results once, forward and backward, as a perfectly
fused kernel would, with activations in Config.dtype and weights, gradients and optimizer state in fp32. Weights,
gradients, state and what is kept for backward (* in the table) cross to memory at the copy rate of 256 MiB; what one
part hands to the next may stay in cache, at the rate of 2 MiB. Not counted, so that the floor lies a little below the
truth: sorting and indices, launching operators, a cache too small for what it is trusted with. Who also ran one part's
moving behind another's computing would be bounded by the sums of the two columns alone."""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli import Parser, add_flags, command_line, positive, whole_number  # noqa: E402
from model import DTYPES, PRESETS, Config, build, flops_per_token, mean_keys, parameter_rule  # noqa: E402
from train_muon import NEWTON_SCHULZ_STEPS  # noqa: E402

COMMON = dict(
    n_layer=6, n_embd=256, n_head=4, head_dim=64, num_experts=8, top_k=2, mlp_ratio=4.0, value_embeds=0, window_size=512
)
SHAPES = {
    "cpu": PRESETS["cpu"],
    "gpt2": Config(**COMMON, vocab_size=50304, eot_token=50256),
    "bytes": Config(**COMMON, vocab_size=256, eot_token=255),
}


def dense_twin(config: Config) -> Config:
    """The dense model of equal active FLOPs (but for the router)."""
    return dataclasses.replace(config, pattern="D", num_experts=1, top_k=1)


# -----------------------------------------------------------------------------
# What a step must do


class Gemm(NamedTuple):
    """(m, k) x (k, n), `batch` of them in one call and `count` calls; per side n = as stored, t = a transposed view."""

    m: float
    k: float
    n: float
    layout: str = "nn"
    batch: float = 1
    count: float = 1

    @property
    def flops(self) -> float:
        return 2 * self.m * self.k * self.n * self.batch * self.count


class Part(NamedTuple):
    name: str
    gemms: list[Gemm]
    memory: float  # bytes to and from memory
    cache: float  # bytes that need not leave the cache
    exps: float  # elements of exponentials, logarithms, cosines
    why: str  # the count in words
    speed: float = 1.0  # of its matmuls, in units of the rate of the activations' type

    @property
    def flops(self) -> float:
        return sum(gemm.flops for gemm in self.gemms)


def linear(rows: float, outs: int, ins: int, count: float = 1) -> list[Gemm]:
    """A weight (outs, ins) for `rows` rows: forward, the gradient by the rows, the gradient by the weight."""
    return [
        Gemm(rows, ins, outs, "nt", count=count),
        Gemm(rows, outs, ins, count=count),
        Gemm(outs, rows, ins, "tn", count=count),
    ]


def attention(queries: int, head_dim: int, keys: float, batch: float, count: float) -> list[Gemm]:
    """Scores and mixed values of blocks of queries; then, backward, gradients by probabilities, values, queries,
    keys."""
    to_keys, to_queries, onto_keys = (
        (queries, head_dim, keys, "nt"),
        (queries, keys, head_dim, "nn"),
        (keys, queries, head_dim, "tn"),
    )
    return [Gemm(*shape, batch, count) for shape in (to_keys, to_queries, to_keys, onto_keys, to_queries, onto_keys)]


def newton_schulz(rows: int, cols: int, batch: int) -> list[Gemm]:
    """In each step A = X X^T, A A, B X; rows <= cols."""
    return [
        Gemm(*shape, batch, NEWTON_SCHULZ_STEPS)
        for shape in ((rows, cols, rows, "nt"), (rows, rows, rows, "nn"), (rows, rows, cols, "nn"))
    ]


def parts_of(config: Config, tokens: int, seq_len: int, optimizer: str) -> list[Part]:
    """Every part of one optimizer step over `tokens` tokens in rows of `seq_len`; optimizer: a key of OPTIMIZERS."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build(config).named_parameters() if p.numel()}
    kinds = {name: parameter_rule(name).kind for name in shapes}
    of = lambda kind, word="": [shape for name, shape in shapes.items() if kinds[name] == kind and word in name]
    size = lambda many: sum(math.prod(shape) for shape in many)
    a, T, D, W = DTYPES[config.dtype].itemsize, tokens, config.n_embd, config.n_head * config.head_dim
    E, R, routed, V = config.num_experts, T * config.top_k, config.num_moe_layers, config.padded_vocab_size
    hidden = T * config.top_k * config.hidden_size
    windows = [
        window for window, letter in zip(config.per_layer("window"), config.per_layer("attention")) if letter != "-"
    ]
    attending, keys = len(windows), [mean_keys(config, window, seq_len) for window in windows]

    def matmuls(
        name: str,
        weights: list[tuple],
        rows: float,
        calls: float = 1,
        near: float = 0,
        exps: float = 0,
        extra: str = "",
    ) -> Part:
        """Weights (outs..., ins), each applied to `rows` rows in each of `calls` calls."""
        flat = [(math.prod(shape[:-1]), shape[-1]) for shape in weights]
        gemms = [gemm for outs, ins in flat for gemm in linear(rows, outs, ins, calls)]
        kept, passed = (
            a * rows * calls * sum(numbers)
            for numbers in ((ins for _, ins in flat), (2 * ins + 2 * outs for outs, ins in flat))
        )
        why = (
            f"weight read twice ({a} B), its gradient written (4 B), input read again*; per row input, output, their "
            f"gradients{extra}"
        )
        return Part(name, gemms, (2 * a + 4) * size(weights) + kept, passed + near, exps, why)

    block, chunk = min(seq_len, 128), min(T, 1024)  # queries, tokens at a time: whole scores and logits would not fit
    tables, experts = (
        of("embed") + of("ngram_embed") + of("value_embed"),
        [shape[1:] for shape in of("expert") for _ in range(shape[0])],
    )
    rows_of_tables, touched = sum(T * cols for _, cols in tables), sum(min(T, rows) * cols for rows, cols in tables)
    untouched = sum(max(0, rows - T) * cols for rows, cols in of("ngram_embed"))  # RowAdamW leaves them alone
    router, head, mix = of("router"), of("head", "head"), of("head", "layer_mix")
    kept = a * (
        (2 * D * T + hidden) * config.n_layer + 2 * W * T * attending
    )  # what element-wise kernels leave for backward
    parts = [
        Part(
            "embedding",
            [],
            12 * touched + 4 * (size(tables) - untouched),
            2 * a * rows_of_tables,
            0,
            "rows in use read (4 B) and, backward, added to (8 B); gradient zeroed (4 B per weight; n-grams: rows in "
            "use); output and its gradient",
        ),
        matmuls("attention projections", of("matrix", ".attention."), T),
        Part(
            "attention scores",
            [
                g
                for n in keys
                for g in attention(block, config.head_dim, n, T / seq_len * config.n_head, seq_len / block)
            ],
            5 * a * T * W * attending,
            7 * a * T * W * attending,
            T * config.n_head * sum(keys),
            "q, k, v read, y* written; backward q*, k*, v*, y*, dy read, dq, dk, dv written; scores "
            "stay in cache; an exponential per key",
        ),
        matmuls(
            "router",
            router,
            T,
            near=16 * T * E * routed,
            exps=5 * T * E * len(router) / 2,
            extra="; scores, their gradients in fp32; five exp, log or cos each",
        ),
        Part(
            "dispatch",
            [],
            2 * a * D * R * routed,
            a * D * (4 * T + 3 * R) * routed,
            0,
            "rows of n_embd: gather reads T, writes k T*; combine reads k T, writes T; backward T, k T* in, k T "
            "out; k T in, T out",
        ),
        matmuls("expert MLPs", experts, R / E),
        matmuls("dense MLP", of("matrix", ".ffn."), T),
        Part(
            "element-wise",
            [],
            2 * kept,
            3 * a * ((9 * D * T + 2 * hidden) * config.n_layer + 4 * W * T * attending) - 2 * kept,
            0,
            "rows: residual + skip + norm* 5, residual + norm* 4, norm and rotary* of q, k 4, activation* 2 per hidden "
            "unit; backward twice that",
        ),
        matmuls(
            "mix of layers",
            mix,
            T,
            near=a * D * T * 3 * (config.n_layer + 1),
            extra="; forward each layer's part and x read, their sum written; backward each part read again, its "
            "gradient written",
        ),
        matmuls(
            "head + loss",
            head,
            chunk,
            T / chunk,
            near=a * T * V * 2,
            exps=2 * T * V,
            extra="; logits read, their gradient written; two exponentials each",
        )._replace(speed={"fp8": 2.0}.get(config.head, 1.0)),
        Part(
            "casts",
            [],
            a * size(of("matrix") + of("expert") + of("head")) * (a < 4),
            0,
            0,
            "copy of each matmul's weight in the activations' type, written while the optimizer has it at hand",
        ),
    ]
    everything, matrices = (
        size(shapes.values()) - untouched,
        [(math.prod(shape[:-2]), *sorted(shape[-2:])) for shape in of("matrix") + of("expert")],
    )
    return [part for part in parts if part.memory + part.cache] + OPTIMIZERS[optimizer](everything, matrices, a)


def adamw(elements: int, matrices: list[tuple], a: int) -> list[Part]:
    return [
        Part(
            "AdamW",
            [],
            28 * elements,
            0,
            0,
            "weight, gradient, both means read, all but the gradient written: 28 B per weight",
        )
    ]


def muon(elements: int, matrices: list[tuple], a: int) -> list[Part]:
    """Matrices: (how many, rows <= cols)."""
    by_shape = {}
    for count, *shape in matrices:
        by_shape[tuple(shape)] = by_shape.get(tuple(shape), 0) + count
    gemms = [gemm for (rows, cols), count in by_shape.items() for gemm in newton_schulz(rows, cols, count)]
    near = (
        NEWTON_SCHULZ_STEPS
        * 2
        * sum(count * (3 * rows * cols + 4 * rows * rows) for (rows, cols), count in by_shape.items())
    )
    mine = sum(count * rows * cols for (rows, cols), count in by_shape.items())
    why = (
        "weight, gradient, momentum read, two written: 20 B per weight; in bf16 X twice, A, B read, A, B, X written in "
        "each step"
    )
    return [Part("Newton-Schulz + Muon", gemms, 20 * mine, near, 0, why), *adamw(elements - mine, [], a)]


OPTIMIZERS = {"adamw": adamw, "muon": muon}

# -----------------------------------------------------------------------------
# What the machine can do


@dataclasses.dataclass(frozen=True)
class Rates:
    matmul: float  # FLOP/s in the activations' type: the best of all shapes tried
    memory: float  # bytes/s, read and written, of a copy much larger than the cache
    cache: float  # bytes/s of a copy that fits
    exp: float  # elements/s
    shapes: dict = dataclasses.field(default_factory=dict)  # Gemm with count 1 -> FLOP/s

    def own(self, gemm: Gemm) -> float:
        return self.shapes.get(gemm._replace(count=1), self.matmul)

    def or_better(self, other: "Rates") -> "Rates":
        """The best of two measurements: others may use the machine now and then."""
        numbers = (max(getattr(self, key), getattr(other, key)) for key in ("matmul", "memory", "cache", "exp"))
        return Rates(*numbers, {gemm: max(rate, other.shapes.get(gemm, 0)) for gemm, rate in self.shapes.items()})


def best_seconds(function, budget: float = 0.03) -> float:
    """The fastest of at least three calls, after one to warm up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    function()
    wait()
    seconds, end = [], time.perf_counter() + budget
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def gemm_rate(gemm: Gemm, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of torch.matmul on random matrices of this shape and layout."""
    m, k, n, batch = (max(1, round(x)) for x in (gemm.m, gemm.k, gemm.n, gemm.batch))

    def side(rows: int, cols: int, letter: str) -> torch.Tensor:
        x = torch.randn(batch, *{"n": (rows, cols), "t": (cols, rows)}[letter], dtype=dtype, device=device)
        return {"n": x, "t": x.mT}[letter].squeeze(0)

    left, right = side(m, k, gemm.layout[0]), side(k, n, gemm.layout[1])
    out = left @ right
    return 2 * m * k * n * batch / best_seconds(lambda: torch.matmul(left, right, out=out))


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy of nbytes."""
    source, target = torch.ones(nbytes // 4, device=device), torch.zeros(nbytes // 4, device=device)
    return 2 * nbytes / best_seconds(lambda: target.copy_(source), 0.2)


def exp_rate(device: torch.device) -> float:
    """Elements per second of exponentials: on a CPU of the faster of torch.exp and torch.sigmoid, which takes one too;
    on a GPU, where one operator would measure its memory, of a compiled chain of sixteen."""
    if device.type == "cuda":
        x, chain = torch.randn(2**24, device=device), torch.compile(sixteen_exponentials)
        return 16 * x.numel() / best_seconds(lambda: chain(x), 0.1)
    x = torch.randn(2**19)
    out = torch.empty_like(x)
    return x.numel() / min(best_seconds(lambda: function(x, out=out), 0.1) for function in (torch.exp, torch.sigmoid))


def sixteen_exponentials(x: torch.Tensor) -> torch.Tensor:
    for _ in range(16):
        x = torch.exp(-x)  # comes to rest at 0.567
    return x


@torch.no_grad()
def measure_rates(dtype: torch.dtype, gemms: list[Gemm], device: str = "cpu", copied: int | None = None) -> Rates:
    """What this machine's CPU or GPU ("cuda") reaches now; `gemms` and squares compete for the matmul rate."""
    device = torch.device(device)
    squares, large, small = {"cpu": ((1024, 2048), 2**28, 2**21), "cuda": ((4096, 8192), 2**31, 2**23)}[device.type]
    wanted = {gemm._replace(count=1) for gemm in gemms} | {Gemm(side, side, side) for side in squares}
    shapes = {gemm: gemm_rate(gemm, dtype, device) for gemm in wanted}
    memory, cache = (copy_rate(min(copied or nbytes, nbytes), device) for nbytes in (large, small))
    return Rates(
        max(shapes.values()), memory, max(memory, cache), exp_rate(device), shapes
    )  # a small copy on a GPU is mostly its launch


# -----------------------------------------------------------------------------
# The floor


class Cost(NamedTuple):
    part: Part
    compute: float  # seconds at the best matmul rate
    own: float  # seconds at the rates of its own shapes
    move: float  # seconds

    @property
    def floor(self) -> float:
        return max(self.compute, self.move)

    @property
    def own_floor(self) -> float:
        return max(self.own, self.move)


def cost_of(part: Part, rates: Rates) -> Cost:
    exps = part.exps / rates.exp
    own = sum(gemm.flops / rates.own(gemm) for gemm in part.gemms) / part.speed
    return Cost(
        part,
        part.flops / rates.matmul / part.speed + exps,
        own + exps,
        part.memory / rates.memory + part.cache / rates.cache,
    )


def floor(config: Config, tokens: int, seq_len: int, optimizer: str, rates: Rates) -> list[Cost]:
    """The cost of every part of a step; the step's floor is the sum of theirs. Raises ValueError unless rows divide the
    tokens."""
    if tokens % seq_len:
        raise ValueError(f"{tokens} tokens are no whole number of rows of {seq_len}; change --tokens or --seq_len")
    return [cost_of(part, rates) for part in parts_of(config, tokens, seq_len, optimizer)]


def step_floor(*arguments) -> float:
    """Seconds of a whole step at its floor; arguments as for floor()."""
    return sum(cost.floor for cost in floor(*arguments))


def table(costs: list[Cost], rates: Rates, tokens: int, dense: list[Cost]) -> str:
    step, own = sum(cost.floor for cost in costs), sum(cost.own_floor for cost in costs)
    dense_step, dense_own = sum(cost.floor for cost in dense), sum(cost.own_floor for cost in dense)
    row = lambda name, flops, nbytes, *seconds: (
        f"{name:<24}{flops / 1e9:>9.2f}{nbytes / 1e6:>10.1f}" + "".join(f"{1000 * s:>12.2f}" for s in seconds)
    )
    lines = [
        f"rates: matmul {rates.matmul / 1e9:,.0f} GFLOP/s; copy {rates.memory / 1e9:.1f} GB/s in memory, "
        f"{rates.cache / 1e9:.1f} GB/s in cache; "
        f"exp {rates.exp / 1e9:.2f} G/s",
        f"{'part':<24}{'GFLOP':>9}{'MB':>10}{'compute ms':>12}{'own shapes':>12}{'move ms':>12}{'floor ms':>12}",
    ]
    lines += [
        row(c.part.name, c.part.flops, c.part.memory + c.part.cache, c.compute, c.own, c.move, c.floor) for c in costs
    ]
    sums = (sum(getattr(c, field) for c in costs) for field in ("compute", "own", "move", "floor"))
    lines += [
        row("step", sum(c.part.flops for c in costs), sum(c.part.memory + c.part.cache for c in costs), *sums),
        f"at the floor {1000 * step:.1f} ms per step, {tokens / step:,.0f} tokens/s; with matmuls at the rates of "
        "their own shapes "
        f"{1000 * own:.1f} ms, {tokens / own:,.0f} tokens/s",
        f"MoE / dense twin at the floor {step / dense_step:.3f}; with own shapes {own / dense_own:.3f}",
        "bytes:",
        *(f"  {c.part.name:<24}{c.part.why}" for c in costs),
    ]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The step


def measured(configs: list[Config], tokens: int, seq_len: int, optimizer: str, turns: int) -> list[float]:
    """Seconds of a real step of each model on random tokens: medians over turns of nine steps without their first."""
    from benchmarks.contenders import Work, ours  # which import this file

    steps = [ours(optimizer, lambda config: config)(Work(config, tokens, seq_len, tokens))[0] for config in configs]
    seconds = [[] for _ in configs]
    for turn in range(turns + 1):
        for step, times in zip(steps, seconds):
            for i in range(9 * turn, 9 * turn + 9):
                began = time.perf_counter()
                step(i)
                times.append(time.perf_counter() - began)
    counted = [[t for i, t in enumerate(times) if i >= 9 and i % 9] for times in seconds]  # the first turn warms up
    return [statistics.median(times) for times in counted]


def comparison(config: Config, costs: list[Cost], rates: Rates, tokens: int, seq_len: int, seconds: list[float]) -> str:
    """The measured step, and the dense twin's, against the floor."""
    share = flops_per_token(config, seq_len) * tokens / seconds[0] / rates.matmul
    return (
        f"measured {1000 * seconds[0]:.1f} ms per step, {seconds[0] / sum(cost.floor for cost in costs):.2f} times the "
        f"floor, {share:.1%} of the matmul rate; MoE / dense twin {seconds[0] / seconds[1]:.3f}"
    )


# -----------------------------------------------------------------------------
# Command line

DEFAULTS = {"cpu": (4096, 1024, "muon")}  # shape -> tokens, seq_len, optimizer
OTHERS = (8 * 512, 512, "adamw")


def zero_or_more(text: str) -> int:
    return whole_number(text, 0)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags -> their values; `config` is the shape with the given fields changed. Raises UserError."""
    parser = Parser(
        prog="floor.py", description="The least time of a training step, part by part, at the rates of this machine."
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu")
    parser.add_argument("--tokens", type=positive, help="per optimizer step (default 4096)")
    parser.add_argument("--seq_len", "--seq-len", type=positive, help="(default 1024 for cpu, else 512)")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), help="(default muon for cpu, else adamw)")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="of measuring; the best counts, as others may use the machine"
    )
    parser.add_argument("--turns", type=zero_or_more, default=5, help="of nine real steps; 0 = the floor alone")
    parser.add_argument("--json", type=Path, help="write rates and parts there")
    add_flags(parser, Config)
    args = parser.parse_args(argv)
    tokens, seq_len, optimizer = DEFAULTS.get(args.shape, OTHERS)
    args.tokens, args.seq_len = args.tokens or tokens, args.seq_len or seq_len
    args.optimizer = args.optimizer or optimizer
    args.config = dataclasses.replace(
        SHAPES[args.shape], **{f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}
    )
    return args


@command_line("floor.py", ValueError)
def main():
    args = parse()
    twin, step = dense_twin(args.config), (args.tokens, args.seq_len, args.optimizer)
    gemms = [gemm for config in (args.config, twin) for part in parts_of(config, *step) for gemm in part.gemms]
    rates = measure_rates(DTYPES[args.config.dtype], gemms)
    for _ in range(args.rounds - 1):
        rates = measure_rates(DTYPES[args.config.dtype], gemms).or_better(rates)
    costs, dense = floor(args.config, *step, rates), floor(twin, *step, rates)
    print(table(costs, rates, args.tokens, dense))
    if args.turns:
        seconds = measured([args.config, twin], *step, args.turns)
        print(comparison(args.config, costs, rates, args.tokens, args.seq_len, seconds))
    if args.json:
        rows = [
            c.part._asdict()
            | dict(gemms=[*c.part.gemms], flops=c.part.flops, compute=c.compute, own=c.own, move=c.move)
            for c in costs
        ]
        plain = {field: getattr(rates, field) for field in ("matmul", "memory", "cache", "exp")}
        args.json.write_text(
            json.dumps({"config": dataclasses.asdict(args.config), "rates": plain, "parts": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
