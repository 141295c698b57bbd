"""The speedrun's step on one GPU: MoE against its dense twin at equal active FLOPs, what each part takes, and what the
options change.

    python benchmarks/gpu.py                                   # preset speedrun, 393,216 tokens per step, random tokens
    python benchmarks/gpu.py --data data/h200 --seconds 300    # real text; stop beginning new rows after 300 seconds
    python benchmarks/gpu.py --only steps --rows moe dense --kernels   # two rows, and the kernels behind their time

Rows are pairs: a variant and what it is compared with take turns, round after round, in one process; a turn's first
step is not counted. Figures are medians of steps timed by CUDA events, ratios medians over rounds. A step is
train_muon.train_step with Muon, compiled.

  MFU      active FLOPs of a step / its seconds / the GPU's dense bf16 peak (facts.PEAK_FLOPS), FP8 matmuls counted like
           all others. Attention counts every key inside the window: random tokens have no documents
           that would hide some
  x floor  the step / the least time that floor.py computes for it at the matmul and copy rates measured here
  memory   largest allocation while the variant steps, less what was there before it was built

The JSON is written anew after every row, so what was measured is kept when time runs out."""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import facts  # noqa: E402
import model  # noqa: E402
import ops  # noqa: E402
import settings
import train_muon  # noqa: E402
from benchmarks import fused_mlp  # noqa: E402
from benchmarks.floor import dense_twin, measure_rates, step_floor  # noqa: E402
from cli import Parser, command_line, positive  # noqa: E402
from distributed import World  # noqa: E402
from logger import PhaseTimer  # noqa: E402
from model import GPT, PRESETS, ROUTERS, Config, Route, flops_per_token  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Rows


class UniformRouter(torch.nn.Module):
    """Equal load whatever the text: tokens take turns. For timing only, and for nothing but it."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts

    def forward(self, x_BTD, ctx) -> Route:
        first_T = ctx.noise_key[3] * self.top_k
        expert_TK = (first_T[:, None] + torch.arange(self.top_k, device=x_BTD.device)) % self.num_experts
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=torch.float32)
        return Route(expert_TK, weight_TK, torch.zeros(len(expert_TK), self.num_experts, device=x_BTD.device))


def uniform(config: Config) -> Config:
    ROUTERS["uniform"] = UniformRouter  # from now on, in this process
    return dataclasses.replace(config, router="uniform")


@contextlib.contextmanager
def plain_versions():
    """The functions that have kernels without them; those of the head compiled, which makes them faster."""
    kept = {}
    for module, name in (
        (ops, "softcap_nll"),
        (ops, "quantise"),
        (train_muon, "gram"),
        (train_muon, "gram_polynomial"),
    ):
        kept[module, name] = getattr(module, name)
        plain = kept[module, name].__wrapped__
        setattr(module, name, plain if module is train_muon else torch.compile(plain, dynamic=False))
    try:
        yield
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)


many = lambda experts: lambda config: dataclasses.replace(config, num_experts=experts)
with_head = lambda head, shape=lambda config: config: lambda config: dataclasses.replace(shape(config), head=head)
same = lambda config: config


class Row(NamedTuple):
    shape: callable  # of the preset's Config
    against: str  # the row it is compared with
    what: str
    versions: callable = contextlib.nullcontext  # of functions, while the model is built and steps


ROWS = {  # those that matter most first, as time may run out
    "dense": Row(dense_twin, "dense", "the dense twin"),
    "moe": Row(same, "dense", "8 experts, top-2"),
    "half": Row(lambda config: dataclasses.replace(config, pattern="DM"), "dense", "experts in every second layer"),
    "dense_fused": Row(
        dense_twin, "dense", "the dense twin, ReLU^2 inside the matmuls", fused_mlp.in_models_built_here
    ),
    "moe_fused": Row(same, "moe", "ReLU^2 inside the grouped matmuls", fused_mlp.in_models_built_here),
    "dense_bf16": Row(with_head("bf16", dense_twin), "dense", "the dense twin, head in bf16"),
    "moe_bf16": Row(with_head("bf16"), "moe", "head in bf16"),
    "moe_plain": Row(same, "moe", "no Triton kernels of ours: compiled plain versions", plain_versions),
    "moe_uniform": Row(uniform, "moe", "equal load by force, no router"),
    "moe_1": Row(
        lambda config: dataclasses.replace(config, num_experts=1, top_k=1), "dense", "one expert of the dense width"
    ),
    "moe_16": Row(many(16), "moe", "16 experts of the same width"),
    "moe_64": Row(many(64), "moe", "64 experts of the same width"),
}


class Stepper:
    """One row's model, optimizers and batches on the device."""

    def __init__(self, name: str, config: Config, args: argparse.Namespace):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        hp = dataclasses.replace(
            train_muon.PRESETS["speedrun"],
            batch_tokens=args.tokens,
            seq_len=args.seq_len,
            micro_batch_tokens=args.micro,
            num_iterations=10**5,
            window_start=config.window_size,
        )
        self.name, self.config, self.hp, self.versions = name, config, hp, ROWS[name].versions
        self.timer, self.number = PhaseTimer("cuda"), 0
        rows = settings.micro_batch_rows(args.tokens // args.seq_len, hp, World(0, 1, DEVICE))
        with self.versions():
            self.model = drawn_on_the_device(config).train()
            self.exchange = train_muon.Exchange(self.model, World(0, 1, DEVICE))
            self.exchange.attach_optimizers(train_muon.MUON, hp)
            train_muon.compile_model(self.model, hp, DEVICE)
            self.batches = batches(config, hp, rows, args.data)
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            for _ in range(2):
                self.step()
            torch.cuda.synchronize()
            self.compile_seconds = time.perf_counter() - began
            self.memory = torch.cuda.max_memory_allocated() - before

    def step(self):
        batch = self.batches[self.number % len(self.batches)]
        session = train_muon.Session(train_muon.MUON, self.hp, self.model, self.exchange, self.timer)
        self.row, _ = train_muon.train_step(session, lambda: batch, self.number)
        self.number += 1

    def turn(self, steps: int) -> list[float]:
        """Milliseconds of each step, after one that is not counted."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        with self.versions():
            for event in events:
                self.step()
                event.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:])]


def drawn_on_the_device(config: Config) -> GPT:
    """A model whose initial values the GPU draws: other numbers than the CPU's, which takes seconds for them."""
    with torch.device("meta"):
        net = model.build(config)
    net, generator = net.to_empty(device=DEVICE), torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in net.named_parameters():
        model.parameter_rule(name).init(parameter.detach(), generator)
    net.load_WLE.fill_(1 / config.num_experts)
    net.bias_LE.zero_()
    filled = {"load_WLE", "bias_LE", "clock"}  # set_step fills the clock
    assert {name for name, _ in net.named_buffers()} == filled, "a buffer without a value"
    return net


def loader_of(folder: Path, config: Config, seq_len: int, tokens: int, rows: int) -> data.Loader:
    return data.Loader(
        folder,
        seq_len=seq_len,
        batch_rows=tokens // seq_len,
        micro_rows=rows,
        rank=0,
        world_size=1,
        seed=0,
        vocab_size=config.vocab_size,
        device=DEVICE,
    )


def batches(config: Config, hp, rows: int, folder: Path | None, steps: int = 3) -> list[list[data.Batch]]:
    """Micro-batches of a few steps, on the device: of a folder of shards, or random ids without the end-of-text
    token."""
    if folder:
        loader = loader_of(folder, config, hp.seq_len, hp.batch_tokens, rows)
        made = [loader.next_step() for _ in range(steps)]
        loader.close()
        return made
    shape = (hp.batch_rows // rows, rows, hp.seq_len + 1)
    ids = [torch.randint(config.eot_token, shape, device=DEVICE) for _ in range(steps)]
    return [[data.Batch(micro[:, :-1], micro[:, 1:], i * rows) for i, micro in enumerate(step)] for step in ids]


def measured(
    name: str, mine: list[list[float]], theirs: list[list[float]], stepper: Stepper, floor: float, other: str
) -> dict:
    """A row of the table: milliseconds, ratio to what it is compared with, MFU, memory."""
    ms, config = statistics.median(sum(mine, [])), stepper.config
    peak = facts.matmul_rate(DEVICE, config.dtype)
    load, loss = stepper.row.get("moe/load_max_over_mean"), stepper.row["train/loss"].item()
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the loss is {loss}, so its times mean nothing; `bash benchmarks/gpu.sh tests` says what is wrong"
        )
    return {
        "row": name,
        "what": ROWS[name].what,
        "ms": ms,
        "tokens_per_second": 1000 * stepper.hp.batch_tokens / ms,
        "against": other,
        "ratio": statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(mine, theirs)),
        "ratios": [statistics.median(a) / statistics.median(b) for a, b in zip(mine, theirs)],
        "mfu": 1000 * stepper.hp.batch_tokens / ms * flops_per_token(config, stepper.hp.seq_len) / peak,
        "floors": ms / 1000 / floor,
        "memory": stepper.memory,
        "loss": loss,
        "load_max_over_mean": None if load is None else load.item(),
        "first_steps_seconds": stepper.compile_seconds,
    }


def step_rows(args, rates, save) -> list[str]:
    """Every wanted row beside what it is compared with; a model is dropped when nothing later needs it. Returns what
    went wrong: a row that fails, for want of memory or because a kernel does not compile, costs no other its time."""
    alive, wrong = {}, []
    for i, name in enumerate(args.rows):
        if time.perf_counter() > args.ends:
            print(f"no time for {' '.join(args.rows[i:])}", flush=True)
            break
        try:
            step_row(name, alive, args, rates, save)
        except Exception as error:  # whatever it is, the next row may do without it
            traceback.print_exc()
            wrong.append(
                f"row {name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            )
            alive.pop(name, None)
        later = {needed for row in args.rows[i + 1 :] for needed in (row, ROWS[row].against)}
        for dropped in alive.keys() - later:
            del alive[dropped]
        gc.collect()
        torch.cuda.empty_cache()
    return wrong


def step_row(name: str, alive: dict[str, Stepper], args, rates, save):
    other = ROWS[name].against
    for needed in dict.fromkeys((other, name)):
        if needed not in alive:
            alive[needed] = Stepper(needed, ROWS[needed].shape(args.config), args)
            print(f"{needed}: first steps {alive[needed].compile_seconds:.1f} s", flush=True)
    mine, theirs = [], []
    for turn in range(args.rounds):
        for who in dict.fromkeys(((other, name), (name, other))[turn % 2]):
            (mine if who == name else theirs).append(alive[who].turn(args.steps))
    floor = step_floor(alive[name].config, args.tokens, args.seq_len, "muon", rates)
    save(measured(name, mine, theirs or mine, alive[name], floor, other))
    if args.kernels and name in args.kernels_of:
        print(kernel_table(alive[name]), flush=True)


def kernel_table(stepper: Stepper, most: int = 45) -> str:
    """The GPU's kernels in one step, those that take most first."""
    from torch.profiler import ProfilerActivity, profile

    stepper.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        stepper.step()
        torch.cuda.synchronize()
    phases = ("data", "forward", "backward", "communication", "optimizer")
    rows = [
        e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA and e.key not in phases
    ]
    rows.sort(key=lambda e: -e.self_device_time_total)
    total = max(1, sum(e.self_device_time_total for e in rows))
    lines = [f"{stepper.name}: {total / 1000:.1f} ms in kernels, {sum(e.count for e in rows):,} launches"]
    for e in rows[:most]:
        lines.append(
            f"{e.self_device_time_total / 1000:9.2f} ms {100 * e.self_device_time_total / total:5.1f}% "
            f"{e.count:6d} x  {e.key[:110]}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def milliseconds(function, budget: float = 0.15) -> float:
    """The median of as many calls as fit the budget (seconds), at least five, after two to warm up."""
    function(), function()
    times, ends = [], time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < ends:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def forward_backward(function, *inputs):
    """A call of function on inputs and of its backward, with a gradient made beforehand."""
    output = function(*inputs)
    gradient = torch.randn_like(output)

    def call():
        torch.autograd.grad(function(*inputs), [x for x in inputs if x.requires_grad], gradient)

    return call


def grad(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


def attention_parts(args):
    """(name, call, FLOPs) of one row of seq_len tokens, with its documents."""
    c, linear = args.config, torch.nn.functional.linear
    T, D, W = args.seq_len, c.n_embd, c.n_head * c.head_dim
    hp = dataclasses.replace(train_muon.PRESETS["speedrun"], batch_tokens=T, seq_len=T)
    ids = batches(c, hp, 1, args.data, 1)[0][0].inputs_BT
    doc_BT, position = (ids == c.eot_token).long().cumsum(1), torch.arange(T, device=DEVICE)
    qkv = [grad(1, T, c.n_head, c.head_dim) for _ in range(3)]
    for letter in dict.fromkeys(c.window):
        window = torch.tensor(c.window_size // model.WINDOWS[letter], device=DEVICE)
        mask = model.fastest_mask(DEVICE.type, T)(position, position, doc_BT, doc_BT, window)
        attend = lambda *qkv: mask.attend(*(z.transpose(1, 2) for z in qkv), c.attn_scale)
        yield (
            f"attention scores, window {window.item()}",
            forward_backward(attend, *qkv),
            12 * model.mean_keys(c, letter, T) * W * T,
        )
    kind, long = model.fastest_mask(DEVICE.type, T), torch.tensor(c.window_size, device=DEVICE)
    windows = model.window_sizes(c.window, long).values()
    yield "masks of all windows", lambda: [kind(position, position, doc_BT, doc_BT, window) for window in windows], 0
    x = grad(T, D)
    yield "attention, merged q, k, v", forward_backward(linear, x, grad(3 * W, D)), 18 * T * W * D
    yield "attention, output", forward_backward(linear, x, grad(D, W)), 6 * T * W * D


def feed_forward_parts(args):
    """(name, call, FLOPs): the dense twin's MLP, then router, dispatch and grouped matmuls at even load."""
    c, T, linear = args.config, args.micro, torch.nn.functional.linear
    K, E, D, H = c.top_k, c.num_experts, c.n_embd, c.hidden_size
    x, flops = grad(T, D), 6 * T * K * H * D
    yield "dense up", forward_backward(linear, x, grad(K * H, D)), flops
    yield "dense down", forward_backward(linear, grad(T, K * H), grad(D, K * H)), flops
    score_TE = torch.rand(T, E, device=DEVICE)
    expert_TK = score_TE.topk(K).indices
    offs_E = expert_TK.flatten().bincount(minlength=E).cumsum(0).int()
    grouped = lambda rows, weights: ops.grouped_mm(rows, weights, offs_E)
    yield "grouped up", forward_backward(grouped, grad(T * K, D), grad(E, H, D)), flops
    yield "grouped down", forward_backward(grouped, grad(T * K, H), grad(E, D, H)), flops
    yield "top-k of the scores", lambda: ops.topk_sort(score_TE, K), 0
    topk_argmax = torch.compile(ops.topk_argmax)
    yield "the same by argmax, compiled", lambda: topk_argmax(score_TE, K), 0
    yield "sort by expert", lambda: expert_TK.flatten().to(torch.int16).sort(stable=True), 0
    slot_R = expert_TK.flatten().argsort(stable=True)
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(T * K, device=DEVICE)).view(T, K)
    gather = torch.compile(lambda x: ops.gather(x, slot_R, row_TK))
    combine = torch.compile(lambda rows, weight_TK: ops.combine(rows, weight_TK, slot_R, row_TK))
    yield "gather rows", forward_backward(gather, x), 0
    yield "combine rows, with gates", forward_backward(combine, grad(T * K, D), grad(T, K)), 0
    router, zero = model.LinearRouter(c).to(DEVICE).train(), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    noise_key = (zero, zero, zero, torch.arange(T, device=DEVICE))
    ctx = model.Context(None, None, None, None, None, None, noise_key, torch.zeros(E, device=DEVICE), None)

    @torch.compile
    def routed(x):
        route = router(x[None], ctx)
        return route.weight_TK.square().sum() + model.route_stats(route, offs_E).z_loss

    yield "router and its losses", forward_backward(routed, x), 0
    route = Route(expert_TK, torch.rand(T, K, device=DEVICE), score_TE)
    moved = torch.compile(lambda x: model.dispatch(x, route, lambda rows, offs: rows + 1)[0])
    yield "dispatch: sort, gather, combine", forward_backward(moved, x), 0


def head_parts(args):
    """(name, call, FLOPs) of head and loss, with our kernels and with the plain versions compiled."""
    c, T = args.config, args.micro
    V, D = c.padded_vocab_size, c.n_embd
    x, w = grad(T, D), (torch.randn(V, D, device=DEVICE) * 0.02).requires_grad_()
    target, z = (
        torch.randint(c.vocab_size, (T,), device=DEVICE),
        torch.randn(min(8192, T), V, device=DEVICE, dtype=torch.bfloat16),
    )
    nll = lambda z, target: ops.softcap_nll(z, target, vocab_size=c.vocab_size, softcap=c.softcap)
    loss = lambda head: lambda x, w: ops.chunked_loss(x, w, target, ops.HEADS[head], nll)
    for versions, said in ((contextlib.nullcontext, ""), (plain_versions, ", plain versions compiled")):
        with versions():
            for head in ops.HEADS:
                yield f"head + loss, {head}{said}", forward_backward(loss(head), x, w), 6 * T * D * V
            yield f"loss of {len(z):,} tokens{said}", lambda: nll(z, target[: len(z)]), 0
            yield f"its gradient to FP8 and transposed{said}", lambda: ops.quantise(z, 1 / 448, torch.float8_e5m2), 0


def optimizer_parts(args):
    """(name, call, FLOPs): once per step."""
    c = args.config
    D, H, W = c.n_embd, c.hidden_size, c.n_head * c.head_dim
    shapes = {
        "experts": (2 * c.num_experts * c.n_layer, H, D),
        "dense MLPs": (2 * c.n_layer, c.top_k * H, D),
        "attention matrices": (4 * c.n_layer, W, D),
    }
    for versions, said in ((contextlib.nullcontext, ""), (plain_versions, ", plain versions")):
        for name, (count, rows, cols) in shapes.items():
            with versions():
                G, (short, long) = torch.randn(count, rows, cols, device=DEVICE), sorted((rows, cols))
                flops = count * train_muon.NEWTON_SCHULZ_STEPS * 2 * short**2 * (2 * long + short)
                yield f"Newton-Schulz of {count} {name}{said}", lambda: train_muon.newton_schulz(G), flops
    table = torch.randn(c.padded_vocab_size, D, device=DEVICE).requires_grad_()
    table.grad = torch.randn_like(table)
    yield "AdamW on one table", torch.optim.AdamW([table], fused=True).step, 0


def mlp_parts(args):
    """(name, call, FLOPs): both matmuls of the MLPs with ReLU^2 between them, as they are and fused; the two fused ones
    alone, by tile. The dense twin's is one expert of top_k times the width, over fewer rows. Last, as a new kernel may
    fail."""
    c, product, activation = args.config, ops.grouped_mm, ops.relu_squared
    for load, E, R, H in (
        ("dense", 1, args.micro, c.top_k * c.hidden_size),
        ("experts", c.num_experts, args.micro * c.top_k, c.hidden_size),
    ):
        rows, up, down, flops = grad(R, c.n_embd), grad(E, H, c.n_embd), grad(E, c.n_embd, H), 12 * R * H * c.n_embd
        offs_E = torch.linspace(R / E, R, E, device=DEVICE).int()
        plain = torch.compile(lambda rows, up, down: product(activation(product(rows, up, offs_E)), down, offs_E))
        yield f"MLP, {load}", forward_backward(plain, rows, up, down), flops
        fused = lambda rows, up, down: fused_mlp.FusedMLP.apply(rows, up, down, offs_E)
        yield f"MLP, {load}, fused", forward_backward(fused, rows, up, down), flops
        rows, up, down = rows.detach(), up.detach(), down.detach()
        a, dy = fused_mlp.fused_up(rows, up, offs_E), torch.randn_like(rows)
        for name, tile in fused_mlp.TILES.items() if DEVICE.type == "cuda" else ():
            yield f"up, {load}, {name}", lambda: fused_mlp.up_kernel(rows, up, offs_E, tile), flops / 6
            yield (
                f"down's backward, {load}, {name}",
                lambda: fused_mlp.down_backward_kernel(dy, down, a, offs_E, tile),
                flops / 6,
            )


def part_rows(args, save):
    """Forward and backward of one micro-batch, part by part, outside of a model."""
    for parts in (data_part, attention_parts, feed_forward_parts, head_parts, optimizer_parts, mlp_parts):
        for name, call, flops in parts(args):
            ms = milliseconds(call)
            save({"part": name, "ms": ms, "tflops": flops / ms / 1e9})


def data_part(args):
    """(name, call, FLOPs) of a step's batches, read and sent while nothing else keeps the loader waiting: of --data, or
    random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            data.write_shard(
                Path(folder) / "random_train_000001.bin",
                torch.randint(args.config.eot_token, (2 * args.tokens + 1,)).numpy(),
            )
        loader = loader_of(
            args.data or Path(folder), args.config, args.seq_len, args.tokens, args.micro // args.seq_len
        )
        yield f"data, {args.tokens:,} tokens", loader.next_step, 0
        loader.close()


# ---------------------------------------------------------------------------------------------------------------------
# Tables, command line


def text(results: dict) -> str:
    lines = [
        f"{results['gpu']}, torch {results['torch']}: matmul {results['rates']['matmul'] / 1e12:,.0f} TFLOP/s, copy "
        f"{results['rates']['memory'] / 1e12:.2f} TB/s; "
        f"{results['tokens']:,} tokens per step, {results['micro']:,} at a time"
    ]
    if results["parts"]:
        lines.append(f"{'part, forward + backward of a micro-batch':<55}{'ms':>9}{'TFLOP/s':>9}")
        lines += [
            f"{row['part']:<55}{row['ms']:>9.3f}" + (f"{row['tflops']:>9.0f}" if row["tflops"] else "")
            for row in results["parts"]
        ]
    if results["steps"]:
        lines.append(
            f"{'row':<13}{'ms/step':>9}{'tokens/s':>11}{'MFU':>7}{'x floor':>9}"
            f"{'ratio':>8} to {'':<8}{'MiB':>8}{'load':>6}"
        )
    for row in results["steps"]:
        load = "-" if row["load_max_over_mean"] is None else f"{row['load_max_over_mean']:.2f}"
        lines.append(
            f"{row['row']:<13}{row['ms']:>9.1f}{row['tokens_per_second']:>11,.0f}{row['mfu']:>7.1%}"
            f"{row['floors']:>9.2f}{row['ratio']:>8.3f}"
            f" to {row['against']:<8}{row['memory'] / 2**20:>8,.0f}{load:>6}  {row['what']}"
        )
    return "\n".join(lines)


STEPS_SHARE = 0.75  # of the time, where parts follow


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="gpu.py", description="Step time, MFU and parts of preset speedrun on one GPU.")
    parser.add_argument("--preset", choices=list(PRESETS), default="speedrun")
    parser.add_argument("--data", type=Path, help="a folder of shards; default: random tokens")
    parser.add_argument("--tokens", type=positive, default=393_216, help="per step")
    parser.add_argument("--seq_len", "--seq-len", type=positive, default=49_152)
    parser.add_argument("--micro", type=positive, default=49_152, help="tokens of one forward pass")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=2, help="of a turn")
    parser.add_argument(
        "--seconds", type=positive, default=540, help="after which no new row begins; parts take a quarter of them"
    )
    parser.add_argument("--only", choices=["parts", "steps"], help="default: steps, then parts")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--kernels", action="store_true", help="print what kernels the steps of moe and dense spend their time in"
    )
    parser.add_argument("--kernels_of", nargs="+", choices=list(ROWS), default=["moe", "dense"])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="written anew after every row")
    return parser.parse_args(argv)


@command_line("gpu.py", RuntimeError)
def main():
    args = parse()
    if DEVICE.type != "cuda":
        sys.exit(
            "gpu.py: error: needs a CUDA device, and this machine has none; benchmarks/throughput.py measures a CPU"
        )
    args.config, share = PRESETS[args.preset], 1 if args.only else STEPS_SHARE
    args.ends = time.perf_counter() + share * args.seconds
    rates = measure_rates(torch.bfloat16, [], DEVICE.type)
    results = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rates": {name: getattr(rates, name) for name in ("matmul", "memory", "cache", "exp")},
        "tokens": args.tokens,
        "seq_len": args.seq_len,
        "micro": args.micro,
        "model": dataclasses.asdict(args.config),
        "steps": [],
        "parts": [],
    }

    def save(row: dict):
        results["parts" if "part" in row else "steps"].append(row)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(
            row.get("part", row.get("row")),
            f"{row['ms']:.3f} ms",
            f"ratio {row['ratio']:.3f}" if "ratio" in row else "",
            flush=True,
        )

    wrong = step_rows(args, rates, save) if args.only != "parts" else []
    if args.only != "steps":
        part_rows(args, save)
    print(text(results))
    if wrong:
        raise RuntimeError("; ".join(wrong))


if __name__ == "__main__":
    main()
