"""benchmarks/floor.py, throughput.py, contenders.py, gpu.py, arithmetic.py, domains.py.

FLOPs against the model card and torch's counter, byte counts by hand, properties of every floor, verdicts on given
races, and the scripts at a tiny shape. CPU, no network; Mixtral only if transformers is installed:
`pytest tests/tools/test_benchmarks.py`.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import facts  # noqa: E402
import logger  # noqa: E402
import model  # noqa: E402
import ops  # noqa: E402
import train_muon  # noqa: E402
import zoo  # noqa: E402
from benchmarks import contenders, floor, gpu, throughput, toys  # noqa: E402
from benchmarks.floor import Gemm, Rates, dense_twin, parts_of, step_floor  # noqa: E402
from benchmarks.throughput import Race, judge  # noqa: E402
from model import Config, build  # noqa: E402
from tools import cost, prepare  # noqa: E402

TINY = dict(vocab_size=192, eot_token=191, n_layer=2, n_embd=64, n_head=2, head_dim=32, num_experts=4, top_k=2,
            value_embeds=0, window_size=64)  # fmt: skip
SHAPES = {
    "experts": Config(**TINY),
    "dense": dense_twin(Config(**TINY)),
    "mixed": Config(
        **TINY | dict(pattern="DM", n_layer=4, attention="AA-A", window="LS", window_size=40, value_embeds=1)
    ),
    "hash": zoo.Config(**TINY | dict(router="hash", num_experts=8, top_k=1, dtype="fp32")),
}
RATES = Rates(matmul=1e12, memory=1e10, cache=1e11, exp=1e9)
TOKENS, SEQ_LEN = 256, 64


def flops(config: Config, *names: str) -> float:
    """Of the named parts, or of forward and backward; per step."""
    parts = parts_of(config, TOKENS, SEQ_LEN, "muon")
    return sum(part.flops for part in parts if (part.name in names if names else part.name != "Newton-Schulz + Muon"))


# -----------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_those_of_the_model_card(shape):
    assert flops(SHAPES[shape]) == pytest.approx(TOKENS * model.flops_per_token(SHAPES[shape], SEQ_LEN), rel=1e-12)


def grouped_flops(a, b, *rest, out_shape=None, **others) -> int:
    """Rows (R, K) with weights (E, N, K), or (R, N) with (R, K) for the gradient of the weights: 2 R K N."""
    return 2 * a[0] * a[1] * b[1]


def counted(run) -> dict[str, int]:
    known = [
        getattr(torch.ops.nanomoe, name) for name in ("grouped_mm", "grouped_outer") if hasattr(torch.ops.nanomoe, name)
    ]
    with FlopCounterMode(display=False, custom_mapping={op: grouped_flops for op in known}) as counter:
        run()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("shape", ["experts", "dense"])
def test_flops_equal_those_counted_by_torch(shape):
    config = SHAPES[shape]
    net, ids = build(config).train(), torch.randint(config.eot_token, (TOKENS // SEQ_LEN, SEQ_LEN))
    seen = sum(counted(lambda: net(ids, ids).loss.backward()).values())
    scores = flops(config, "attention scores")  # the counter sees the upper triangle too, which holds no keys
    assert seen == pytest.approx(flops(config) - scores + scores * 2 * SEQ_LEN / (SEQ_LEN + 1), rel=1e-12)


@pytest.mark.parametrize("rows, cols", [(8, 24), (16, 16)])
def test_newton_schulz_flops_equal_those_counted_by_torch(rows, cols):
    seen = sum(counted(lambda: train_muon.newton_schulz(torch.randn(3, rows, cols))).values())
    assert seen == sum(gemm.flops for gemm in floor.newton_schulz(rows, cols, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_flops_equal_those_of_the_plan(shape):
    plan = cost.plan(SHAPES[shape], train_muon.PRESETS["cpu"], train_muon.MUON, 1)
    assert flops(SHAPES[shape], "Newton-Schulz + Muon") == plan["newton_schulz_total"]


# -----------------------------------------------------------------------------
# Bytes, seconds


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_is_updated_once(shape):
    counts = model.count_parameters(SHAPES[shape])
    memory = {
        optimizer: {part.name: part.memory for part in parts_of(SHAPES[shape], TOKENS, SEQ_LEN, optimizer)}
        for optimizer in floor.OPTIMIZERS
    }
    matrices = counts["matrix"] + counts["expert"]
    assert memory["adamw"]["AdamW"] == 28 * counts["total"]
    tables = Config(**TINY, ngrams="23", ngram_rows=2**12)  # of which a step reaches a row for each token
    rows = {part.name: part.memory for part in parts_of(tables, TOKENS, SEQ_LEN, "adamw")}["AdamW"]
    assert rows == 28 * (model.count_parameters(tables)["total"] - 2 * (2**12 - TOKENS) * 64)
    assert (memory["muon"]["AdamW"], memory["muon"]["Newton-Schulz + Muon"]) == (
        28 * (counts["total"] - matrices),
        20 * matrices,
    )


def test_bytes_by_hand():
    part = {part.name: part for part in parts_of(SHAPES["experts"], TOKENS, SEQ_LEN, "adamw")}
    assert part["embedding"].memory == 4 * 192 * 64 + 12 * 192 * 64  # fewer ids than tokens: each row at most once
    assert (part["dispatch"].memory, part["dispatch"].cache) == (
        2 * 64 * 2 * 512 * 2,
        2 * 64 * (4 * 256 + 3 * 512) * 2,
    )  # bf16, rows, layers
    weights = 2 * 4 * 2 * 128 * 64  # layers, experts, up and down
    assert part["expert MLPs"].memory == 8 * weights + 2 * 512 * (64 + 128) * 2
    assert part["expert MLPs"].cache == 2 * 512 * 2 * (64 + 128 + 128 + 64) * 2
    rows = {"residuals, norms": 9 * 64, "q, k": 4 * 64, "hidden": 2 * 256}
    assert part["element-wise"].memory + part["element-wise"].cache == 3 * 2 * 256 * 2 * sum(rows.values())
    assert part["element-wise"].memory == 2 * 2 * 256 * 2 * (2 * 64 + 2 * 64 + 256)
    assert part["casts"].memory == 2 * (weights + 2 * 4 * 64 * 64 + (192 + 2) * 64)
    assert part["mix of layers"].memory == 8 * 2 * 64 + 2 * 256 * 64
    assert part["mix of layers"].cache == 2 * 256 * (2 * 64 + 2 * 2 + 3 * 3 * 64)
    assert "dense MLP" not in part and "router" in part
    assert not {"router", "dispatch", "expert MLPs"} & {
        part.name for part in parts_of(SHAPES["dense"], TOKENS, SEQ_LEN, "adamw")
    }


def test_a_part_takes_the_longer_of_computing_and_moving():
    rates = Rates(matmul=10.0, memory=2.0, cache=4.0, exp=5.0, shapes={Gemm(2, 3, 5): 6.0})
    part = floor.Part("one", [Gemm(2, 3, 5, count=2)], 8, 4, 15, "")
    cost = floor.cost_of(part, rates)
    assert (cost.compute, cost.own, cost.move) == (120 / 10 + 3, 120 / 6 + 3, 5)
    assert (cost.floor, cost.own_floor) == (15, 23) and floor.cost_of(part._replace(memory=100), rates).floor == 51


@pytest.mark.parametrize("optimizer", floor.OPTIMIZERS)
@pytest.mark.parametrize("more", [dict(n_layer=3), dict(n_embd=128), dict(num_experts=8),
                                  dict(top_k=1, num_experts=8, mlp_ratio=8.0),
                                  dict(vocab_size=1024), dict(n_head=4), dict(value_embeds=1)], ids=str)  # fmt: skip
def test_more_work_takes_longer(optimizer, more):
    bigger = dataclasses.replace(SHAPES["experts"], **more)
    assert step_floor(bigger, TOKENS, SEQ_LEN, optimizer, RATES) > step_floor(
        SHAPES["experts"], TOKENS, SEQ_LEN, optimizer, RATES
    )


def test_more_tokens_take_longer_and_faster_machines_less():
    step = lambda tokens=TOKENS, **rates: step_floor(
        SHAPES["mixed"], tokens, SEQ_LEN, "muon", dataclasses.replace(RATES, **rates)
    )
    assert step() < step(2 * TOKENS) < 2 * step()
    for rate in ("matmul", "memory", "cache", "exp"):
        assert step(**{rate: 2 * getattr(RATES, rate)}) <= step() < step(**{rate: getattr(RATES, rate) / 1000})


@pytest.mark.parametrize("optimizer", floor.OPTIMIZERS)
def test_a_moe_takes_longer_than_its_twin(optimizer):
    moe, dense = (step_floor(SHAPES[shape], TOKENS, SEQ_LEN, optimizer, RATES) for shape in ("experts", "dense"))
    assert moe > dense


def test_rates_are_measured_at_every_shape():
    gemms = [Gemm(8, 16, 24, "nt", count=7), Gemm(8, 16, 24, "tn", batch=3), Gemm(8, 16.4, 24)]
    rates = floor.measure_rates(torch.float32, gemms, copied=2**16)
    assert {gemm._replace(count=1) for gemm in gemms} <= set(rates.shapes) and min(
        rates.memory, rates.cache, rates.exp, *rates.shapes.values()
    ) > 0
    assert rates.matmul == max(rates.shapes.values()) and rates.own(gemms[0]) == rates.shapes[Gemm(8, 16, 24, "nt")]


def test_the_better_of_two_measurements():
    one, other = (
        Rates(1.0, 8.0, 3.0, 4.0, {Gemm(1, 1, 1): 1.0}),
        Rates(5.0, 6.0, 7.0, 2.0, {Gemm(1, 1, 1): 5.0, Gemm(2, 2, 2): 9.0}),
    )
    assert one.or_better(other) == Rates(5.0, 8.0, 7.0, 4.0, {Gemm(1, 1, 1): 5.0})


# -----------------------------------------------------------------------------
# Verdicts


def made_up() -> Race:
    seconds = {
        "moe_adamw": [1.0, 2.0, 4.0],
        "dense_adamw": [1.0, 1.0, 2.0],
        "mixtral_eager": [9.0] * 3,
        "mixtral_grouped_mm": [3.0] * 3,
    }
    memory, floors = {"moe_adamw": 30, "mixtral_grouped_mm": 60}, {"moe_adamw": 0.5, "dense_adamw": 0.5}
    return Race(10, [100.0, 100.0, 50.0], seconds, {"moe_adamw": 8.0}, memory, floors, [], 0.5)


def test_a_race_compares_medians_of_rounds():
    race = made_up()
    assert (race.step("moe_adamw"), race.ratio("moe_adamw", "dense_adamw"), race.fastest("mixtral_")) == (
        2.0,
        2.0,
        "mixtral_grouped_mm",
    )
    assert race.share("moe_adamw") == 0.4  # of 80/100, 40/100, 20/50


def test_targets_are_judged_with_their_floors():
    targets = throughput.SUITES["mixtral"].targets + throughput.SUITES["dense_ratio"].targets
    rows = {(row["what"], row["bound"]): row for row in judge(targets, "gpt2", made_up())}
    over = rows["speed over the fastest Mixtral's", 2]
    assert (over["figure"], over["met"], over["ideal"], over["floors"]) == (1.5, "missed", 6.0, 3.0)
    memory = rows["peak memory over that Mixtral's", 1 / 3]
    assert (memory["figure"], memory["met"]) == (0.5, "missed") and math.isnan(memory["floors"])
    ratio = rows["MoE / dense step, AdamW", 1.1]
    assert (ratio["figure"], ratio["ideal"], ratio["floors"]) == (2.0, 1.0, 1.1)
    assert len(rows) == 6  # no nanoGPT and no Muon took part
    assert "missed" in throughput.judgement(list(rows.values())) and "-" in throughput.judgement(list(rows.values()))


def test_suites_name_contenders_and_shapes_that_exist():
    for suite in throughput.SUITES.values():
        assert set(suite.contenders.split()) <= set(contenders.CONTENDERS)
        assert all(set(target.shapes.split()) <= set(floor.SHAPES) for target in suite.targets)


# -----------------------------------------------------------------------------
# Contenders


def work(config: Config) -> contenders.Work:
    return contenders.Work(config, TOKENS, SEQ_LEN, TOKENS)


def test_tokens_are_random_and_end_no_document():
    batches = work(SHAPES["experts"]).batches()
    assert all(ids.shape == (TOKENS // SEQ_LEN, SEQ_LEN + 1) and 0 <= ids.min() and ids.max() < 191 for ids in batches)
    assert not torch.equal(batches[0], batches[1])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_nanogpt_trains_and_its_flops_equal_those_counted_by_torch(dtype):
    step, per_token = contenders.nanogpt(dtype)(work(SHAPES["dense"]))
    step(0)
    seen = counted(lambda: step(1))
    mine = flops(SHAPES["dense"], "attention projections", "dense MLP", "head + loss")
    assert seen["aten.mm"] == mine  # a tied head has the FLOPs of an untied one
    ours = flops(SHAPES["dense"]) - flops(SHAPES["dense"], "mix of layers")
    assert TOKENS * per_token == pytest.approx(ours, rel=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_mixtral_trains_and_its_flops_are_ours_with_three_matrices(experts):
    step, per_token = contenders.mixtral(experts)(work(SHAPES["experts"]))
    step(0)
    router = 6 * 2 * 4 * 64  # two layers; ours has a second matrix for noise
    ours = flops(SHAPES["experts"]) - flops(SHAPES["experts"], "mix of layers")
    assert TOKENS * (per_token + router) == pytest.approx(
        ours + flops(SHAPES["experts"], "expert MLPs") / 2, rel=1e-12
    )


# -----------------------------------------------------------------------------
# The scripts

SMALL = "--n_layer 2 --n_embd 64 --n_head 3 --head_dim 16 --seq_len 64"


def script(name: str, words: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words.split()]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_floor_prints_parts_and_their_sum(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floor, "measure_rates", lambda *_: RATES)
    words = f"--shape bytes {SMALL} --tokens 128 --optimizer muon --turns 0 --json {tmp_path / 'floor.json'}"
    monkeypatch.setattr(sys, "argv", ["floor.py", *words.split()])
    floor.main()
    out, written = capsys.readouterr().out, json.loads((tmp_path / "floor.json").read_text())
    for part in written["parts"]:
        assert part["name"] in out and part["why"] in out
    step = sum(max(part["compute"], part["move"]) for part in written["parts"])
    assert f"at the floor {1000 * step:.1f} ms per step, {128 / step:,.0f} tokens/s" in out


def test_floor_compares_a_real_step_with_the_floor(monkeypatch, capsys):
    monkeypatch.setattr(floor, "measure_rates", lambda *_: RATES)
    monkeypatch.setattr(floor, "measured", lambda configs, *_: [0.5 * len(config.pattern) for config in configs])
    words = f"{SMALL} --n_layer 4 --window_size 64 --tokens 128"
    monkeypatch.setattr(sys, "argv", ["floor.py", *words.split()])
    floor.main()
    out, config = capsys.readouterr().out, floor.parse(words.split()).config
    least, flops_of_step = step_floor(config, 128, 64, "muon", RATES), 128 * model.flops_per_token(config, 64)
    assert config.pattern == "DDDM" and config.ngrams == "23"  # preset cpu
    assert f"measured 2000.0 ms per step, {2 / least:.2f} times the floor" in out
    assert f"{flops_of_step / 2 / 1e12:.1%} of the matmul rate; MoE / dense twin 4.000" in out


def test_a_measured_step_is_a_step_of_training(monkeypatch):
    seen, train_step = [], train_muon.train_step
    note = lambda session, *words: seen.append(session.model.config.pattern) or train_step(session, *words)
    monkeypatch.setattr(train_muon, "train_step", note)
    moe, dense = floor.measured([SHAPES["experts"], SHAPES["dense"]], TOKENS, SEQ_LEN, "muon", turns=1)
    assert seen == 2 * (9 * ["M"] + 9 * ["D"]) and moe > 0 and dense > 0


@pytest.mark.slow
def test_throughput_from_end_to_end(tmp_path):
    names = "moe_adamw dense_muon nanogpt_bf16"
    done = script(
        "throughput.py",
        f"--shape bytes {SMALL} --rows 2 --rounds 2 --steps 1 --contenders {names} --json rows.json",
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (written,) = json.loads((tmp_path / "rows.json").read_text())
    race = Race(**written["race"])
    for name in ("moe_adamw", "dense_muon"):
        assert f"{128 / race.step(name):,.0f}" in done.stdout and f"{race.share(name):.1%}" in done.stdout
        assert race.step(name) > race.floors[name] > 0 and race.memory[name] > 2**20 and len(race.seconds[name]) == 2
    assert (
        race.flops["moe_adamw"]
        > race.flops["dense_muon"]
        == model.flops_per_token(dense_twin(Config(**written["config"])), 64)
    )
    assert (
        len(race.failed) == 1 and race.failed[0] in done.stdout and "nanogpt_bf16 does not run: " in race.failed[0]
    )  # 3 heads do not divide 64


WRONG = [
    "--suite mixtrals",
    "--shape gpt3",
    "--rounds 0",
    "--contenders moe_adam",
    "--json nowhere/at/all.json",
    "--top_k two",
    "--speed 3",
]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_flag_is_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as end:
        throughput.parse(words.split())
    out, complaint = capsys.readouterr()
    assert end.value.code == 2 and out == "" and complaint.count("\n") == 1 and words.split()[0] in complaint


@pytest.mark.parametrize("words", ["--tokens 100", "--top_k 9", "--json nowhere/at/all.json --tokens 512"])
def test_a_floor_that_cannot_be_computed_is_one_sentence(words, monkeypatch):
    monkeypatch.setattr(floor, "measure_rates", lambda *_: RATES)
    monkeypatch.setattr(sys, "argv", ["floor.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        floor.main()
    assert str(end.value.code).startswith("floor.py: error: ") and "\n" not in str(end.value.code)


# -----------------------------------------------------------------------------
# gpu.py


class Clock:
    """A CUDA event for a machine without CUDA."""

    def __init__(self, **options):
        self.now = 0.0

    def record(self):
        self.now = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later) -> float:
        return 1000 * (later.now - self.now)


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """gpu.py at a tiny shape on the CPU, without CUDA; returns its arguments and a list of the rows that it saves."""
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setitem(model.ROUTERS, "uniform", gpu.UniformRouter)
    monkeypatch.setattr(gpu, "PhaseTimer", lambda kind: logger.PhaseTimer("cpu"))
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    monkeypatch.setattr(train_muon, "compile_model", lambda *_: "eager")
    monkeypatch.setattr(facts, "matmul_rate", lambda *_: 1e12)
    args = gpu.parse(["--tokens", "512", "--seq_len", "128", "--micro", "256", "--rounds", "2", "--steps", "1"])
    args.config, args.ends = Config(**TINY | dict(vocab_size=300, eot_token=299, window="LS", window_size=64)), math.inf
    return args, []


@pytest.mark.slow
def test_every_row_of_the_gpu_table_is_measured_beside_its_reference(on_cpu):
    args, saved = on_cpu
    assert gpu.step_rows(args, RATES, saved.append) == []
    assert [row["row"] for row in saved] == list(gpu.ROWS)
    for row in saved:
        assert (
            row["ms"] > 0
            and len(row["ratios"]) == 2
            and row["against"] == gpu.ROWS[row["row"]].against
            and math.isfinite(row["loss"])
        )
        config = gpu.ROWS[row["row"]].shape(args.config)
        assert row["mfu"] == pytest.approx(512 / row["ms"] * 1000 * model.flops_per_token(config, 128) / 1e12)
        assert (row["load_max_over_mean"] is None) == (config.num_moe_layers == 0)
    by_name = {row["row"]: row for row in saved}
    assert by_name["dense"]["ratio"] == 1 and by_name["moe_uniform"]["load_max_over_mean"] == pytest.approx(1)
    assert (
        model.EXPERTS["mlp"] is model.MLPExperts and model.FEED_FORWARDS["D"] is model.DenseMLP
    )  # and after the fused ones
    assert (
        ops.softcap_nll.__wrapped__ and ops.quantise.__wrapped__ and train_muon.gram.__wrapped__
    )  # as before the plain row


@pytest.mark.slow
def test_a_row_that_fails_is_named_and_affects_no_other(on_cpu, monkeypatch):
    """Failures are a loss that is not finite and a model that cannot be built."""
    args, saved = on_cpu
    args.rows = ["dense", "moe_16", "moe"]
    monkeypatch.setitem(gpu.ROWS, "moe_16", gpu.ROWS["moe_16"]._replace(shape=lambda config: 1 / 0))
    assert gpu.step_rows(args, RATES, saved.append) == ["row moe_16: division by zero"] and [
        row["row"] for row in saved
    ] == ["dense", "moe"]
    monkeypatch.setattr(ops, "softcap_nll", lambda z, target, **options: torch.full((len(z),), math.nan))
    saved.clear()
    (dense, *_) = gpu.step_rows(args, RATES, saved.append)
    assert dense.startswith("row dense: the loss is nan") and not saved


def test_gpu_parts_are_timed_with_and_without_kernels(on_cpu, tmp_path, monkeypatch):
    args, saved = on_cpu
    monkeypatch.setattr(gpu, "milliseconds", lambda call: (call(), 0.5)[1])
    gpu.part_rows(args, saved.append)
    names = [row["part"] for row in saved]
    assert len(set(names)) == len(names)
    wanted = {"grouped up", "dense up", "MLP, experts, fused", "data, 512 tokens", "gather rows",
              "combine rows, with gates", "router and its losses",
              "head + loss, fp8", "AdamW on one table"}  # fmt: skip
    assert wanted <= set(names)
    assert {name for name in names if "plain" in name} and all(row["ms"] == 0.5 for row in saved)
    up = next(row for row in saved if row["part"] == "dense up")
    assert up["tflops"] == pytest.approx(6 * 256 * 4 * 64 * 64 / 0.5e-3 / 1e12)
    results = {
        "gpu": "a GPU",
        "torch": "2",
        "rates": {"matmul": 1e12, "memory": 1e12},
        "tokens": 512,
        "micro": 256,
        "parts": saved,
        "steps": [],
    }
    assert "grouped down" in gpu.text(results)


@pytest.mark.parametrize("action, options", (
    ("count", {"halt": ["act", "stick_breaking", "ponder", "threshold"]}),
    ("route", {"controller": ["linear", "memoryless", "mlp", "lstm", "learned"],
               "training": ["soft", "straight_through", "anneal"]}),
    ("recover", {"controller": ["linear", "memoryless", "mlp", "lstm", "learned"],
                 "training": ["soft", "straight_through", "anneal"]})))  # fmt: skip
def test_every_choice_of_the_toys_runs(action, options, monkeypatch, capsys):
    monkeypatch.setattr(toys, "cost", lambda toy, n_BT, rounds=5: (1, 0.001))  # timing takes the longest
    words = [word for name, values in options.items() for word in (f"--{name}", *values)]
    monkeypatch.setattr(toys, "held_out", functools.partial(toys.held_out, batches=1))
    args = toys.parse([action, "--steps", "1", *words])
    args.function(args)
    printed = capsys.readouterr().out
    assert all(value in printed for values in options.values() for value in values) and "nan" not in printed


@pytest.mark.parametrize("words", ("count --halt exit", "count --halt none", "route --controller fixed",
                                   "recover --controller fixed", "route --steps 0", "count --steps -1"))  # fmt: skip
def test_a_toy_offers_no_choice_that_it_cannot_run(words, capsys):
    with pytest.raises(SystemExit) as ended:
        toys.parse(words.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("toys.py") and len(error.splitlines()) == 1, error


def test_gpu_scripts_name_their_requirements():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(["bash", "benchmarks/gpu.sh", "everything"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "say which part: tests, bench or track" in done.stderr


# -----------------------------------------------------------------------------
# arithmetic.py, domains.py


def benchmark(name: str, *words) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_arithmetic_trains_compares_and_evaluates_loops(tmp_path):
    prepare.main(
        ["--source", "arithmetic", "--encoding", "bytes", "--max_tokens", "30000", "--out", str(tmp_path / "shards")]
    )
    results = ["--results", tmp_path / "results.jsonl"]
    ours = [*results, "--data", tmp_path / "shards", "--out_dir", tmp_path / "logs", "--tokens", 512, "--seeds", 0]
    benchmark("arithmetic.py", "run", *ours, "--models", "stack4", "loop2x2", "--steps", 2)
    assert "loop2x2_0, 4 loops" in benchmark("arithmetic.py", "curve", *ours, "--models", "loop2x2")
    assert benchmark("arithmetic.py", "run", *ours, "--models", "stack4", "--steps", 2) == "", (
        "models with results are not trained again"
    )
    rows = benchmark("arithmetic.py", "table", *results).splitlines()
    assert (
        rows[2].startswith("| `stack4` | 0.24 |")
        and rows[3].startswith("| `loop2x2` | 0.14 |")
        and rows[-1].startswith("| `loop2x2` |")
    )


@pytest.mark.slow
def test_domains_trains_switches_experts_off_and_compares(tmp_path):
    for name in ("birds", "web"):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{name} {i * i} says {i}" for i in range(400)))
    paths = [f"{name}={tmp_path / f'{name}.txt'}" for name in ("birds", "web")]
    prepare.main(["--source", "domains", "--encoding", "bytes", "--out", str(tmp_path / "shards"), "--path", *paths])
    results = ["--results", tmp_path / "results.jsonl"]
    ours = [*results, "--data", tmp_path / "shards", "--out_dir", tmp_path / "logs", "--seeds", 0, "--val_tokens", 1024]
    small = """--n_layer=1 --n_embd=32 --n_head=1 --head_dim=32 --mlp_ratio=1 --shared_dim=32 --seq_len=64
               --batch_tokens=256""".split()
    benchmark(
        "domains.py",
        "run",
        *ours,
        "--variants",
        "warm",
        "dense",
        "--steps",
        4,
        "--flags",
        *(f"={word}" for word in small),
    )
    assert "seed 0: birds " in benchmark("domains.py", "off", *ours)
    rows = benchmark("domains.py", "table", *results).splitlines()
    assert (
        rows[2].startswith("| `warm` | 4 |")
        and rows[3].startswith("| `dense` | 5 |")
        and rows[-5].startswith("| birds |")
    )
