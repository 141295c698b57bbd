"""train_muon.py and train_adamw.py: the mathematics of the optimizers, equality over ranks and accumulation, resuming,
the command line, and whole runs of a tiny model. CPU, no network, about two minutes: `pytest tests/core/test_train.py`.

Runs happen in this process where they can (an import of torch costs more than sixty steps of the tiny model), and in
processes of their own where the claim is about processes: several ranks, kill -9, blocked imports."""

import argparse
import ast
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cli import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import data  # noqa: E402
import distributed  # noqa: E402
import facts  # noqa: E402
import guards  # noqa: E402
import logger  # noqa: E402
import model  # noqa: E402
import ops  # noqa: E402
import settings  # noqa: E402
import tokenizer  # noqa: E402
import train_muon  # noqa: E402
from distributed import World, cut_slabs, make_buckets, slab_view  # noqa: E402
from model import DTYPES, GPT, Config  # noqa: E402
from rows import RowAdamW  # noqa: E402
from tools import cost, generate, prepare  # noqa: E402
from tools.profile import phase_seconds  # noqa: E402
from train_adamw import ADAMW  # noqa: E402
from train_muon import MUON, Exchange, Muon, RowTransfer, Session, Transfer, lr_scale, newton_schulz, window  # noqa: E402

BOTH = pytest.mark.parametrize("recipe", [MUON, ADAMW], ids=lambda recipe: recipe.name)
CPU = torch.device("cpu")
TINY_MODEL = dict(
    n_layer=2,
    n_embd=32,
    n_head=1,
    head_dim=32,
    value_embeds=1,
    num_experts=4,
    mlp_ratio=4.0,
    pattern="M",
    attention="AK",
    ngrams="2",
    ngram_rows=64,
    window="L",
    window_size=64,
    dtype="fp32",
)
TINY_RUN = dict(
    preset="cpu",
    device="cpu",
    **TINY_MODEL,
    ns_dtype="fp32",
    seq_len=32,
    batch_tokens=384,
    micro_batch_tokens=384,
    window_start=64,
    num_iterations=4,
    val_every=0,
    val_tokens=0,
    sample_tokens=0,
    warmup_steps=0,
)

# -----------------------------------------------------------------------------
# Helpers


@pytest.fixture(scope="module", autouse=True)
def no_matmul_rate():
    """Measuring it takes half a second per run."""
    rate = facts.matmul_rate
    facts.matmul_rate = lambda device, dtype: 1e11
    yield
    facts.matmul_rate = rate


WORDS = {"greek": ["alpha ", "beta ", "gamma ", "delta "], "birds": ["wren ", "owl ", "swift ", "kite "]}


def write_data(folder: Path, words: list[str]) -> str:
    """Shards of documents in which four words follow each other at random: quickly learnt, but not to loss 0."""
    encoding, random = tokenizer.get_encoding("bytes"), np.random.default_rng(0)
    document = lambda: np.concatenate(([256], encoding.encode("".join(random.choice(words, 40))))).astype(np.uint16)
    folder.mkdir(parents=True)
    data.write_shard(folder / "words_train_000001.bin", np.concatenate([document() for _ in range(100)]))
    data.write_shard(folder / "words_val_000000.bin", np.concatenate([document() for _ in range(4)]))
    (folder / "meta.json").write_text(json.dumps(prepare.describe(folder, encoding)))
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "greek", WORDS["greek"])


def flags(recipe, **values) -> list[str]:
    """The command line of a tiny run with these values; None leaves a flag out."""
    values = {name: value for name, value in (TINY_RUN | values).items() if value is not None}
    if recipe.name == "adamw":
        values.pop("ns_dtype", None)
    return [
        word
        for name, value in values.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def call(main, words) -> tuple[int, str, str]:
    """A script's main() under this command line, as Python would run it: (exit status, stdout, stderr)."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["script.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        err.write(f"\n{stop.code}" if isinstance(stop.code, str) else "")
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def train(out, recipe=MUON, **values) -> Path:
    """A tiny run that must succeed; its folder."""
    status, _, err = call(lambda: train_muon.main(recipe), flags(recipe, out_dir=out, **values))
    assert status == 0, err
    return Path(out) / values.get("experiment_name", recipe.name)


def refused(out, recipe=MUON, **values) -> str:
    """A tiny run that must fail; the one sentence that it says."""
    status, _, err = call(lambda: train_muon.main(recipe), flags(recipe, out_dir=out, **values))
    return sentence(status, err, recipe)


def sentence(status: int, err: str, recipe=MUON) -> str:
    start = f"{recipe.script}: error: "
    said = [line for line in re.split(r"[\r\n]", err) if "error" in line.lower()]
    assert status != 0 and len(said) == 1 and said[0].startswith(start) and "Traceback" not in err, (status, err)
    return said[0].removeprefix(start)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_rows(run: Path) -> list[dict]:
    return [row for row in rows_of(run) if "train/loss" in row]


def series(run: Path, key: str) -> list:
    return [(row["step"], row[key]) for row in rows_of(run) if key in row]


TIMED = ("train_time", "time/", "train/tok_per_sec", "train/mfu", "memory/")


def untimed(run: Path) -> list[dict]:
    """The rows without what a clock or the machine puts in."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows_of(run)]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """`slab/key` -> tensor of the newest checkpoint: parameters, buffers and optimizer state."""
    slabs = checkpoint.read_checkpoint(checkpoint.latest_checkpoint(run / "checkpoint"))[1]
    return {f"{name}/{key}": tensor for name, slab in slabs.items() for key, tensor in slab.items()}


def differing(a: dict, b: dict) -> list[str]:
    """Names of the tensors that are not bitwise equal."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def assert_near(a: dict, b: dict, tolerance: float):
    """Every pair of whole tensors (all slabs of a name together) is within this relative norm; the moments of the few
    scalars within ten times that, for the gradient of one is a sum over all activations that nearly cancels."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    square = lambda x: float(x.double().square().sum())
    apart, size = {}, {}
    for name in a:
        tensor = re.sub(r"\[.*?\]", "", name)
        apart[tensor] = apart.get(tensor, 0) + square(a[name].double() - b[name].double())
        size[tensor] = size.get(tensor, 0) + square(b[name])
    scalar_moment = re.compile(r".*(_mix|skip_weights)/exp_avg(_sq)?")
    errors = {
        name: math.sqrt(apart[name] / max(size[name], 1e-60)) / (10 if scalar_moment.fullmatch(name) else 1)
        for name in apart
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e}"


def assert_near_series(a: list, b: list, tolerance: float):
    assert [step for step, _ in a] == [step for step, _ in b] and a
    assert max(abs(x - y) for (_, x), (_, y) in zip(a, b)) <= tolerance, list(zip(a, b))


def python(*words, timeout=100, **options) -> subprocess.CompletedProcess:
    """Python with these words, and an end to it and to all it started when it takes longer than a hang would
    explain."""
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(ranks: int, *words, **options) -> subprocess.CompletedProcess:
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words, **options)


def once(function):
    """`function`, called once for each set of arguments, also if it fails. Recipes hold dicts, so functools.cache
    cannot."""
    kept = {}

    def get(*words):
        key = tuple(getattr(word, "name", word) for word in words)
        if key not in kept:
            kept[key] = "failed before, see the first failure"
            kept[key] = function(*words)
        assert not isinstance(kept[key], str), kept[key]
        return kept[key]

    return get


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


# -----------------------------------------------------------------------------
# Newton-Schulz


def with_spectrum(rows: int, cols: int, seed: int, *batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """G = U diag(s) V^T with s between 0.1 and 1, and U, V."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(*batch, rows, cols, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    s = 10 ** -torch.rand(*batch, 1, min(rows, cols), generator=generator, dtype=torch.float64)
    return (U * s @ Vh).float(), U.float(), Vh.mT.float()


SHAPES = pytest.mark.parametrize("rows, cols", [(48, 48), (96, 32), (32, 96), (1, 64), (64, 1)])


@SHAPES
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_newton_schulz_brings_singular_values_near_one(rows, cols, dtype):
    for scale in (1e-3, 1, 1e3, 3e8, 1e19, 1e37):
        O = newton_schulz(scale * with_spectrum(rows, cols, 1)[0], DTYPES[dtype])
        assert O.dtype == DTYPES[dtype] and O.shape == (rows, cols)
        values = torch.linalg.svdvals(O.float())
        slack = 0.02 * (dtype == "bf16")
        assert values.min() >= 0.68 - slack and values.max() <= 1.21 + slack, values


@pytest.mark.parametrize(
    "spectrum",
    [torch.ones(64), torch.arange(1, 65) ** -0.5, torch.arange(1, 65) ** -1.0],
    ids=["flat", "root", "harmonic"],
)
def test_newton_schulz_brings_up_small_singular_values_too(spectrum):
    U, V = (torch.linalg.qr(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)))[0] for n in (64, 96))
    values = torch.linalg.svdvals(newton_schulz(U * spectrum @ V.mT, torch.float32))
    assert values.min() >= 0.68 and values.max() <= 1.21, values


@SHAPES
def test_newton_schulz_keeps_the_singular_vectors_and_their_signs(rows, cols):
    G, U, V = with_spectrum(rows, cols, 2)
    inside = U.mT @ newton_schulz(G, torch.float32) @ V
    assert inside.diag().min() > 0.67
    assert (inside - inside.diag().diag()).abs().max() < 1e-3


def test_newton_schulz_of_a_batch_is_that_of_each_matrix():
    G = with_spectrum(24, 40, 3, 2, 3)[0]
    O = newton_schulz(G, torch.float32)
    assert O.shape == G.shape
    for i in range(2):
        assert torch.allclose(newton_schulz(G[i], torch.float32), O[i], atol=1e-6)
        for j in range(3):
            assert torch.allclose(newton_schulz(G[i, j], torch.float32), O[i, j], atol=1e-6)
    assert torch.allclose(newton_schulz(G.mT, torch.float32), O.mT, atol=1e-6)


def test_newton_schulz_leaves_zero_zero_and_its_neighbours_alone():
    G = with_spectrum(16, 24, 4, 3)[0]
    expected = newton_schulz(G, torch.float32)
    G[1] = 0
    O = newton_schulz(G, torch.float32)
    assert torch.equal(O[1], torch.zeros(16, 24))
    assert torch.allclose(O[[0, 2]], expected[[0, 2]], atol=1e-6)


@SHAPES
def test_newton_schulz_in_bf16_is_near_fp32(rows, cols):
    G = with_spectrum(rows, cols, 5)[0]
    exact, rough = newton_schulz(G, torch.float32), newton_schulz(G).float()
    assert newton_schulz(G).dtype == torch.bfloat16
    assert (exact - rough).norm() / exact.norm() < 0.05


# -----------------------------------------------------------------------------
# Muon


def plain_newton_schulz(G):
    X = G.T if len(G) > G.size(1) else G
    X = X / (torch.linalg.svdvals(X).pow(4).sum() ** 0.25 + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ (A @ X)
    return X.T if len(G) > G.size(1) else X


class PlainMuon:
    """One matrix at a time, as the formulas say it, in fp64."""

    def __init__(self, W, lr, momentum, weight_decay):
        self.W, self.M, self.lr, self.momentum, self.weight_decay = (
            W.double().clone(),
            torch.zeros_like(W).double(),
            lr,
            momentum,
            weight_decay,
        )

    def step(self, G):
        G = G.double()
        self.M = self.momentum * self.M + (1 - self.momentum) * G
        O = plain_newton_schulz((1 - self.momentum) * G + self.momentum * self.M)
        self.W = (1 - self.lr * self.weight_decay) * self.W
        self.W = self.W - self.lr * max(1, len(G) / G.size(1)) ** 0.5 * O


def test_muon_is_the_plain_formula_on_matrices_and_on_each_expert():
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (12, 12), (3, 8, 24), (2, 24, 8), (2, 2, 12, 12)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.3)
    muon = Muon(params, ns_dtype=torch.float32, **settings)
    plain = [[PlainMuon(W, **settings) for W in p.detach().reshape(-1, *p.shape[-2:])] for p in params]
    assert isinstance(muon, torch.optim.Optimizer)
    for _ in range(5):
        for p, matrices in zip(params, plain):
            p.grad = torch.randn_like(p)
            for matrix, G in zip(matrices, p.grad.reshape(-1, *p.shape[-2:])):
                matrix.step(G)
        muon.step()
        for p, matrices in zip(params, plain):
            expected = torch.stack([matrix.W for matrix in matrices]).view_as(p)
            assert (p - expected).norm() / expected.norm() < 1e-5, p.shape


def test_muon_orthogonalises_each_expert_as_if_it_were_alone():
    torch.manual_seed(1)
    together = torch.nn.Parameter(torch.randn(4, 16, 8))
    alone = [torch.nn.Parameter(W.clone()) for W in together.detach()]
    one, many = Muon([together], ns_dtype=torch.float32), Muon(alone, ns_dtype=torch.float32)
    for _ in range(3):
        together.grad = torch.randn_like(together) * torch.tensor([1e-3, 1, 10, 1e3])[:, None, None]
        for p, G in zip(alone, together.grad):
            p.grad = G.clone()
        one.step()
        many.step()
    assert torch.allclose(together, torch.stack(list(alone)), atol=1e-6)


def test_muon_in_several_batches_is_muon_in_one(monkeypatch):
    torch.manual_seed(4)
    start = [torch.randn(8, 6) for _ in range(3)] + [torch.randn(2, 8, 6), torch.randn(6, 8)]
    grads, batches, newton = [torch.randn_like(p) for p in start], [], train_muon.newton_schulz
    monkeypatch.setattr(train_muon, "newton_schulz", lambda G, dtype: batches.append(len(G)) or newton(G, dtype))

    def stepped(most: int) -> list[torch.Tensor]:
        monkeypatch.setattr(train_muon, "MAX_BATCH_NUMEL", most)
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for p, grad in zip(params, grads):
            p.grad = grad
        Muon(params, ns_dtype=torch.float32).step()
        return [p.detach() for p in params]

    whole, parts = stepped(10**6), stepped(2 * 48)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts))
    assert batches == [5, 1, 2, 1, 2, 1]  # by shape: all at once; then two matrices, one, the pair


def test_muon_leaves_a_matrix_with_zero_gradient_alone_until_it_has_one_again():
    torch.manual_seed(2)
    p = torch.nn.Parameter(torch.randn(3, 8, 8))
    muon = Muon([p], lr=0.1)
    p.grad = torch.randn_like(p)
    muon.step()
    for _ in range(2):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        p.grad[1] = 0
        muon.step()
        assert muon.state[p]["momentum"][1].norm() > 0
        assert torch.equal(p[1], before[1])
        assert (p - before).detach().norm(dim=(1, 2))[[0, 2]].min() > 0.1
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    muon.step()
    assert (p - before).detach().norm(dim=(1, 2)).min() > 0.1


def test_muon_skips_parameters_without_a_gradient():
    p, q = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    p.grad = torch.eye(4)
    Muon([p, q], lr=0.1).step()
    assert not torch.equal(p, torch.ones(4, 4)) and torch.equal(q, torch.ones(4, 4))


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"\(7,\)"):
        Muon([torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(7))])


def test_muon_goes_on_from_its_state_dict_bit_by_bit(tmp_path):
    torch.manual_seed(3)
    grads = torch.randn(4, 2, 8, 6)
    p = torch.nn.Parameter(torch.randn(2, 8, 6))
    muon = Muon([p], lr=0.03, momentum=0.8, weight_decay=0.1)
    for step, G in enumerate(grads):
        if step == 2:
            torch.save(muon.state_dict(), tmp_path / "muon.pt")
            q = torch.nn.Parameter(p.detach().clone())
        p.grad = G
        muon.step()
    again = Muon([q], lr=1.0)
    again.load_state_dict(torch.load(tmp_path / "muon.pt", weights_only=True))
    for G in grads[2:]:
        q.grad = G
        again.step()
    assert torch.equal(p, q)


# -----------------------------------------------------------------------------
# Slabs, owners, optimizer groups


def tiny_model(**changes) -> GPT:
    return GPT(Config(**({"vocab_size": 257, "eot_token": 256} | TINY_MODEL | changes)))


CONFIGS = {"tiny": Config(vocab_size=257, eot_token=256, **TINY_MODEL | {"pattern": "MD"})} | model.PRESETS


def test_slabs_cover_every_parameter_element_exactly_once():
    net = GPT(CONFIGS["tiny"])
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in net.named_parameters()}
    for slab in cut_slabs(net.config):
        slab_view(counts, slab.name).add_(1)
        assert slab_view(counts, slab.name).numel() == slab.numel
        assert slab.kind == net.parameter_kinds()[slab.name.partition("[")[0]]
    assert all((count == 1).all() for count in counts.values())


def test_a_slab_is_one_matrix_or_some_rows_and_its_value_is_the_parameter():
    net = GPT(CONFIGS["tiny"])
    parameters, names = dict(net.named_parameters()), set()
    for transfer in Exchange(net, World(0, 1, CPU)).transfers:
        for local in transfer.slabs:
            name = local.slab.name
            assert name not in names
            names.add(name)
            assert local.slab.kind not in ("matrix", "expert") or local.value.ndim == 2
            local.value.fill_(1 + len(names))
            assert (slab_view(parameters, name) == 1 + len(names)).all()
    assert names == {slab.name for slab in cut_slabs(net.config)}
    assert len([name for name in names if name.startswith("blocks.0.ffn.experts.up[")]) == 4
    assert len([name for name in names if name.startswith("blocks.0.attention.qkv[")]) == 3
    assert len([name for name in names if name.startswith("embed[")]) > 1


def test_slab_view_reads_and_writes_whole_entry_and_rows():
    t = {"a.b": torch.arange(24.0).view(4, 3, 2).clone()}
    assert torch.equal(slab_view(t, "a.b"), t["a.b"])
    assert torch.equal(slab_view(t, "a.b[2]"), t["a.b"][2])
    assert torch.equal(slab_view(t, "a.b[1:3]"), t["a.b"][1:3])
    for name in ("a.b[2]", "a.b[0:2]", "a.b[3:4]"):
        slab_view(t, name).fill_(-1)
        assert (slab_view(t, name) == -1).all()
    assert (t["a.b"] == -1).all()


BUCKETINGS = [(size, parts) for size in (1, 2, 3, 4, 8, 64) for parts in (1, 2, 4) if size % parts == 0]


@pytest.mark.parametrize("size, parts", BUCKETINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_buckets_hold_every_slab_once_and_owners_hold_what_they_own(name, size, parts):
    config, bucket_mb = CONFIGS[name], 25.0 if name != "tiny" else 0.0
    if config.num_experts % parts:
        pytest.skip(f"{parts} ranks cannot share {config.num_experts} experts; the flags' check says so")
    buckets = make_buckets(config, size, parts, bucket_mb)
    assert buckets == make_buckets(config, size, parts, bucket_mb)
    assert sorted(slab.name for bucket in buckets for slab in bucket.slabs) == sorted(
        slab.name for slab in cut_slabs(config)
    )
    for bucket in buckets:
        for slab, owner in zip(bucket.slabs, bucket.owners):
            first = 0
            if slab.kind == "expert":
                first = int(slab.name.rpartition("[")[2][:-1]) // (config.num_experts // parts)
            step = parts if slab.kind == "expert" else 1
            assert bucket.ranks == tuple(range(first, size, step)) and owner in bucket.ranks, slab.name
    parameter_of = lambda slab: slab.name.partition("[")[0]
    for rank in range(size):  # a parameter's gradient leaves a rank in one local
        homes = {}
        for i, bucket in enumerate(buckets):
            for slab in bucket.slabs if rank in bucket.ranks else ():
                assert homes.setdefault(parameter_of(slab), i) == i


@pytest.mark.parametrize("name", CONFIGS)
def test_owners_share_the_work_and_padding_stays_small(name):
    for size in (2, 3, 4, 8):
        buckets = make_buckets(CONFIGS[name], size)
        for matrices in (True, False):
            family = [
                (slab.cost, owner)
                for bucket in buckets
                for slab, owner in zip(bucket.slabs, bucket.owners)
                if slab.is_matrix == matrices
            ]
            loads = [sum(cost for cost, owner in family if owner == rank) for rank in range(size)]
            if len(family) >= 8 * size:
                assert max(loads) <= 1.1 * sum(loads) / size, (size, matrices, loads)
        for bucket in (bucket for bucket in buckets if not bucket.is_rows):
            lengths = [
                sum(slab.numel for slab, owner in zip(bucket.slabs, bucket.owners) if owner == rank)
                for rank in range(size)
            ]
            assert bucket.part == max(lengths) and bucket.padding == pytest.approx(
                bucket.part * size / sum(lengths) - 1
            )
        dense = [bucket for bucket in buckets if not bucket.is_rows]
        padded = sum(bucket.part * size for bucket in dense)
        assert padded <= 1.25 * sum(slab.numel for bucket in dense for slab in bucket.slabs) or name == "tiny"


def test_buckets_leave_in_the_order_of_backward_and_close_at_their_size():
    config = model.PRESETS["speedrun"]
    units = lambda bucket: list(
        dict.fromkeys(".".join(slab.name.partition("[")[0].split(".")[:2]) for slab in bucket.slabs)
    )
    buckets = make_buckets(config, 8, bucket_mb=25)
    blocks, tables = [f"blocks.{layer}" for layer in range(11, -1, -1)], [f"value_embeds.{i}" for i in (2, 1, 0)]
    expected = ["head", "layer_mix", *blocks, "skip_weights", *tables, "embed"]
    assert [unit for bucket in buckets for unit in units(bucket)] == expected
    assert all(4 * sum(slab.numel for slab in bucket.slabs) >= 25 * 2**20 for bucket in buckets[:-1])
    assert [units(bucket) for bucket in make_buckets(config, 8, bucket_mb=1e6)] == [expected]
    assert (
        len(make_buckets(config, 1, bucket_mb=0)) == 1
    )  # nothing travels, so all matrices are orthogonalised together


def test_ranks_cut_the_same_slabs_whatever_their_number():
    config = CONFIGS["tiny"]
    names = sorted(slab.name for slab in cut_slabs(config))
    for size in (1, 2, 3, 5):
        exchanges = [Exchange(GPT(config), World(rank, size, CPU)) for rank in range(size)]
        assert all(
            sorted(local.slab.name for t in exchange.transfers for local in t.slabs) == names for exchange in exchanges
        )
        assert sorted(local.slab.name for exchange in exchanges for local in exchange.owned) == names


def made_optimizers(recipe, exchange, hp, change=lambda tensors: None) -> list:
    """The optimizers of every bucket, as train() makes them."""
    for transfer in exchange.transfers:
        tensors = transfer.owned_by_kind()
        change(tensors)
        transfer.optimizers = recipe.make_optimizers(tensors, hp)
    return exchange.optimizers


MUON_RATES = {
    "embed": 1.0,
    "ngram_embed": 7.0,
    "value_embed": 2.0,
    "head": 3.0,
    "router": 4.0,
    "scalar": 5.0,
    "matrix": 6.0,
    "expert": 6.0,
}


@BOTH
@pytest.mark.parametrize("size", [1, 3])
def test_every_slab_is_in_exactly_one_optimizer_group_the_one_of_its_kind(recipe, size):
    matrix_rate = {"muon_lr": 6.0} if recipe is MUON else {"matrix_lr": 6.0}
    hp = dataclasses.replace(
        recipe.presets["cpu"],
        embed_lr=1.0,
        ngram_embed_lr=7.0,
        value_embed_lr=2.0,
        head_lr=3.0,
        router_lr=4.0,
        scalar_lr=5.0,
        weight_decay=0.125,
        **matrix_rate,
    )
    for rank in range(size):
        exchange = Exchange(GPT(CONFIGS["tiny"]), World(rank, size, CPU))
        optimizers = made_optimizers(recipe, exchange, hp)
        exchange.check_cover()
        groups = [
            (id(p), group, optimizer)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        assert len(groups) == len(exchange.owned) == len({key for key, _, _ in groups})
        for local in exchange.owned:
            [(group, optimizer)] = [(group, optimizer) for key, group, optimizer in groups if key == id(local.value)]
            assert group["base_lr"] == MUON_RATES[local.slab.kind], local.slab.name
            assert group.get("weight_decay", 0) == (0.125 if local.slab.is_matrix else 0), local.slab.name
            kind = RowAdamW if local.slab.kind == "ngram_embed" else torch.optim.AdamW
            assert isinstance(optimizer, Muon if local.slab.is_matrix and recipe is MUON else kind), local.slab.name


@BOTH
def test_a_parameter_left_out_of_the_groups_is_noticed(recipe):
    exchange = Exchange(GPT(CONFIGS["tiny"]), World(0, 1, CPU))
    made_optimizers(recipe, exchange, recipe.presets["cpu"], lambda tensors: tensors.get("router", [0]).pop())
    with pytest.raises(AssertionError):
        exchange.check_cover()


# -----------------------------------------------------------------------------
# Schedules


def hyper(recipe, **values):
    return recipe.train_config(**({"seq_len": 32, "batch_tokens": 384} | values))


def test_rates_stay_then_fall_linearly_to_their_final_share():
    hp = hyper(MUON, num_iterations=1000, cooldown_frac=0.4, final_lr_scale=0.1)
    assert [lr_scale(step, hp) for step in (0, 1, 300, 600)] == [1, 1, 1, 1]
    assert lr_scale(601, hp) < 1
    assert lr_scale(1000, hp) == pytest.approx(0.1)
    for step in (600, 650, 700, 800, 900, 999):
        assert lr_scale(step, hp) == pytest.approx(1 - 0.9 * (step - 600) / 400)
    assert lr_scale(5, hyper(MUON, num_iterations=10, cooldown_frac=1, final_lr_scale=0)) == pytest.approx(0.5)
    assert {lr_scale(step, hyper(MUON, num_iterations=10, cooldown_frac=0)) for step in range(10)} == {1}


def test_the_window_grows_in_blocks_of_128_from_start_to_full():
    config, hp = Config(window_size=1792), hyper(MUON, num_iterations=1000, window_start=128)
    windows = [window(step, hp, config) for step in range(1001)]
    assert windows[0] == 128 and windows[-1] == 1792
    assert windows == sorted(windows) and set(windows) == set(range(128, 1793, 128))
    assert all(
        128 + 1664 * step / 1000 - 1 <= wide < 128 + 1664 * step / 1000 + 128 for step, wide in enumerate(windows)
    )
    assert window(0, hyper(MUON, window_start=64), Config(window_size=64)) == 64
    assert window(0, hyper(MUON, window_start=9999), Config(window_size=256)) == 256


@BOTH
def test_set_rates_writes_rates_and_momentum_of_the_step(recipe):
    extra = dict(momentum_start=0.5, momentum=0.9, momentum_warmup=8) if recipe is MUON else dict(lr_warmup=8)
    hp = hyper(recipe, num_iterations=100, cooldown_frac=0.5, final_lr_scale=0.0, **extra)
    optimizers = made_optimizers(recipe, Exchange(GPT(CONFIGS["tiny"]), World(0, 1, CPU)), hp)
    for step in (0, 1, 4, 7, 8, 50, 75, 99):
        train_muon.set_rates(optimizers, step, hp, recipe.lr_scale(step, hp))
        warm = min(1, (step + 1) / 8) if recipe is ADAMW else 1
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["base_lr"] * warm * min(1, (100 - step) / 50))
                if isinstance(optimizer, Muon):
                    assert group["momentum"] == pytest.approx(0.5 + 0.4 * min(1, step / 8))


def test_without_a_warm_up_the_momentum_is_full_from_the_first_step():
    hp = hyper(MUON, momentum_start=0.5, momentum=0.9, momentum_warmup=0)
    optimizers = made_optimizers(MUON, Exchange(GPT(CONFIGS["tiny"]), World(0, 1, CPU)), hp)
    train_muon.set_rates(optimizers, 0, hp, 1.0)
    assert {group["momentum"] for o in optimizers for group in o.param_groups if "momentum" in group} == {0.9}


# -----------------------------------------------------------------------------
# Equality: the same global batch gives the same run however it is cut
#
# The router's noise and the balance loss are on: noise is a function of the token's place in the global batch, and the
# balance loss weighs with the load of the step before, so both must be the same on every layout. Rates are lower than
# the preset's, the scalars' most: in the first steps the true gradient of a skip weight is zero, and AdamW divides its
# rounding error by its own size. The seeds were picked from 50. In their runs the k-th expert of a token is ahead of
# the next one by at least 2e-6 (Muon) and 1e-6 (AdamW), and other layouts of Muon's run differ least.

LAYOUT_RUN = dict(
    val_every=6,
    checkpoint_every=6,
    router_noise=1.0,
    balance_coef=0.01,
    embed_lr=0.2,
    ngram_embed_lr=0.01,
    value_embed_lr=0.2,
    head_lr=0.003,
    router_lr=0.0015,
    scalar_lr=0.001,
)
LAYOUT_RUNS = {  # a long mean of gradients and small rates, so that rounding errors stay small
    "muon": LAYOUT_RUN
    | dict(seed=48, num_iterations=30, muon_lr=0.015, momentum=0.95, momentum_start=0.85, momentum_warmup=100),
    "adamw": LAYOUT_RUN | dict(seed=36, num_iterations=12, matrix_lr=0.001),
}


def first_gradients(patch, store: dict):
    """Keep every owned slab's gradient of the first step in `store`."""

    def spied(receive):
        def spy(self):
            receive(self)
            for local in self.owned:
                store.setdefault(local.slab.name, local.value.grad.to_dense().clone())

        return spy

    for kind in (Transfer, RowTransfer):
        patch.setattr(kind, "receive_gradients", spied(kind.receive_gradients))


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory, shards):
    """recipe -> (folder, first gradients) of the run on one rank with all 12 rows at once."""

    @once
    def get(recipe):
        gradients = {}
        with pytest.MonkeyPatch.context() as patch:
            first_gradients(patch, gradients)
            run = train(tmp_path_factory.mktemp("whole"), recipe, data=shards, **LAYOUT_RUNS[recipe.name])
        return run, gradients

    return get


def assert_same_run(run, gradients, whole):
    whole_run, whole_gradients = whole
    assert_near(gradients, whole_gradients, 1e-5)
    for key in ("train/loss", "val/loss", "train/balance_loss", "train/z_loss", "moe/router_entropy"):
        assert_near_series(series(run, key), series(whole_run, key), 1e-5)
    assert np.allclose(
        [load for _, load in series(run, "moe/load")], [load for _, load in series(whole_run, "moe/load")], atol=1e-6
    )
    assert_near(state_of(run), state_of(whole_run), 1e-4)


@BOTH
@pytest.mark.parametrize("micro_steps", [2, 3, 4])
def test_accumulation_changes_nothing(recipe, micro_steps, shards, tmp_path, monkeypatch, whole_batch):
    whole, gradients, forwards = whole_batch(recipe), {}, []
    first_gradients(monkeypatch, gradients)
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, *words, **names: forwards.append(self.training) or forward(self, *words, **names)
    )
    run = train(tmp_path, recipe, data=shards, micro_batch_tokens=384 // micro_steps, **LAYOUT_RUNS[recipe.name])
    assert sum(forwards) == micro_steps * LAYOUT_RUNS[recipe.name]["num_iterations"]
    assert_same_run(run, gradients, whole)


def test_router_and_balance_are_in_play_in_these_runs(whole_batch):
    run, gradients = whole_batch(MUON)
    rows = training_rows(run)
    assert all(row["moe/load_max_over_mean"] > 1.01 for row in rows)
    assert any(gradient.abs().max() > 0 for name, gradient in gradients.items() if "router" in name)
    assert rows[0]["train/loss"] - rows[-1]["train/loss"] > 1


def test_accumulation_in_bf16_keeps_losses_within_a_hundredth(shards, tmp_path):
    whole, parts = (
        train(
            tmp_path / str(micro),
            data=shards,
            num_iterations=15,
            dtype="bf16",
            ns_dtype="bf16",
            micro_batch_tokens=micro,
        )
        for micro in (384, 128)
    )
    assert_near_series(series(whole, "train/loss"), series(parts, "train/loss"), 1e-2)


# -----------------------------------------------------------------------------
# Resuming

RESUMED_RUN = dict(scalar_lr=0.001, num_iterations=10, checkpoint_every=2, val_every=4, warmup_steps=1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, shards):
    """recipe -> the folder of a run that nothing interrupted."""
    return once(lambda recipe: train(tmp_path_factory.mktemp("straight"), recipe, data=shards, **RESUMED_RUN))


def kill_in_step(patch, fatal: int, kind=Killed):
    """Stop inside step `fatal`, after its backward pass."""
    step = train_muon.train_step

    def fatal_step(*words):
        row = step(*words)
        if words[2] == fatal:
            raise kind
        return row

    patch.setattr(train_muon, "train_step", fatal_step)


def interrupt(out, recipe=MUON, plant=kill_in_step, at=7, **values):
    """A run that is stopped where `plant` says."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        plant(patch, at)
        train(out, recipe, **RESUMED_RUN | values)


def assert_equal_run(run, expected):
    assert differing(state_of(run), state_of(expected)) == []
    drop = lambda rows: [row for row in rows if row.get("event") != "end"]
    assert drop(untimed(run)) == drop(untimed(expected))
    assert [row["step"] for row in training_rows(run)] == list(range(1, 11))


@BOTH
def test_an_interrupted_run_goes_on_bit_by_bit(recipe, shards, tmp_path, straight):
    interrupt(tmp_path, recipe, data=shards)
    assert [row["step"] for row in training_rows(tmp_path / recipe.name)] == list(range(1, 8))
    run = train(tmp_path, recipe, data=shards, resume=True, **RESUMED_RUN)
    assert_equal_run(run, straight(recipe))
    times = [row["train_time"] for row in training_rows(run)]
    assert times == sorted(times)
    assert "the run continues from step 6" in (run / "run.log").read_text()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train_muon
step = train_muon.train_step
def fatal_step(*words):
    if words[2] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*words)
train_muon.train_step = fatal_step
train_muon.main(train_muon.MUON)
"""


def test_a_run_goes_on_after_kill_9(shards, tmp_path, straight):
    done = python("-c", KILLED, ROOT, *flags(MUON, data=shards, out_dir=tmp_path, **RESUMED_RUN))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_equal_run(train(tmp_path, data=shards, resume=True, **RESUMED_RUN), straight(MUON))


def kill_while_saving(moment):
    """Stop in the middle of writing the checkpoint of step `at`."""

    def plant(patch, at):
        save, rename, write, remove = torch.save, Path.rename, checkpoint.write_file, shutil.rmtree
        name = f"step_{at:06d}"

        def fatal_save(value, file, *words, **names):
            save(value, file, *words, **names)
            if name in file.name:
                file.truncate(1000)
                raise Killed

        def fatal_rename(self, target):
            if target.name == name:
                raise Killed
            return rename(self, target)

        def fatal_write(path, fill):
            if path.name == "manifest.json" and name in str(path):
                path.write_text('{"step": 6, "fil')
                raise Killed
            return write(path, fill)

        def fatal_remove(path, *words, **names):
            if Path(path).name == f"step_{at - 4:06d}":
                raise Killed
            return remove(path, *words, **names)

        patch.setattr(
            *{
                "tensors": (torch, "save", fatal_save),
                "manifest": (checkpoint, "write_file", fatal_write),
                "rename": (Path, "rename", fatal_rename),
                "removal": (shutil, "rmtree", fatal_remove),
            }[moment]
        )

    return plant


@pytest.mark.parametrize("moment", ["tensors", "manifest", "rename", "removal"])
def test_a_run_goes_on_after_a_kill_while_saving(moment, shards, tmp_path, straight):
    interrupt(tmp_path, plant=kill_while_saving(moment), at=6, data=shards)
    run = train(tmp_path, data=shards, resume=True, **RESUMED_RUN)
    assert_equal_run(run, straight(MUON))
    assert sorted(path.name for path in (run / "checkpoint").glob("step_??????")) == ["step_000008", "step_000010"]


def test_a_run_killed_before_its_first_checkpoint_starts_over(shards, tmp_path, straight):
    interrupt(tmp_path, at=1, data=shards)
    assert_equal_run(train(tmp_path, data=shards, resume=True, **RESUMED_RUN), straight(MUON))


def test_a_run_resumes_with_a_rate_of_many_digits(shards, tmp_path):
    """config.json has every digit, else neither its value nor the manifest's would be accepted."""
    rate = dict(data=shards, muon_lr=1 / 60)
    run = train(tmp_path, num_iterations=2, **rate)
    assert json.loads((run / "config.json").read_text())["hyperparameters"]["muon_lr"] == 1 / 60
    assert training_rows(train(tmp_path, num_iterations=3, resume=True, **rate))[-1]["step"] == 3


@pytest.mark.slow
def test_torchrun_does_not_resume_a_run_that_it_was_refused(shards, tmp_path):
    run = train(tmp_path, num_iterations=2, data=shards)
    before = (run / "metrics.jsonl").read_bytes()
    words = flags(MUON, data=shards, out_dir=tmp_path, num_iterations=4, experiment_name="muon")
    done = torchrun(2, "--max-restarts=1", ROOT / "train_muon.py", *words)
    said = done.stderr.partition("Traceback (most recent call last)")[0]
    assert done.returncode != 0 and said.count("already holds a run") == 2, "refused at both starts"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_torchrun_restarts_resumes_by_itself(shards, tmp_path, straight, monkeypatch):
    interrupt(tmp_path, data=shards)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert_equal_run(train(tmp_path, data=shards, **RESUMED_RUN), straight(MUON))


def flip_a_byte(folder: Path):
    contents = bytearray((folder / "rank0.pt").read_bytes())
    contents[len(contents) // 2] ^= 1
    (folder / "rank0.pt").write_bytes(contents)


DAMAGES = {
    "flipped": flip_a_byte,
    "truncated": lambda folder: os.truncate(folder / "rank0.pt", 5000),
    "missing": lambda folder: (folder / "rank0.pt").unlink(),
    "no manifest text": lambda folder: (folder / "manifest.json").write_text('{"step": 6, "fil'),
}


def never_open(patch, step: int):
    load = torch.load

    def guarded(path, *words, **names):
        assert f"step_{step:06d}" not in str(path), "a damaged checkpoint was opened"
        return load(path, *words, **names)

    patch.setattr(torch, "load", guarded)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_opened_and_the_one_before_serves(damage, shards, tmp_path, monkeypatch, straight):
    interrupt(tmp_path, data=shards)
    DAMAGES[damage](tmp_path / "muon/checkpoint/step_000006")
    never_open(monkeypatch, 6)
    run = train(tmp_path, data=shards, resume=True, **RESUMED_RUN)
    text = (run / "run.log").read_text().rpartition("=" * 100)[2]
    assert (
        "step_000006" in text
        and ("rank0.pt" in text or "manifest.json" in text)
        and "going on from step 4 instead" in text
    )
    assert_equal_run(run, straight(MUON))


def test_with_both_checkpoints_damaged_the_run_is_refused_and_left_as_it_is(shards, tmp_path, monkeypatch):
    interrupt(tmp_path, data=shards)
    for step, damage in ((6, "flipped"), (4, "truncated")):
        DAMAGES[damage](tmp_path / f"muon/checkpoint/step_{step:06d}")
        never_open(monkeypatch, step)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = refused(tmp_path, data=shards, resume=True, **RESUMED_RUN)
    assert "step_000006" in said and "step_000004" in said and "--experiment_name" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_not_sampled_from(shards, tmp_path, monkeypatch):
    interrupt(tmp_path, data=shards)
    DAMAGES["flipped"](tmp_path / "muon/checkpoint/step_000006")
    never_open(monkeypatch, 6)
    with pytest.raises(UserError, match="rank0.pt does not match its sha256; remove .*step_000006"):
        checkpoint.load_model_from_run(tmp_path / "muon/checkpoint")


def test_the_log_is_on_the_disk_before_the_checkpoint_is(shards, tmp_path, monkeypatch):
    order, sync, write = [], logger.Run.sync, checkpoint.write_file
    rows = lambda: [row["step"] for row in training_rows(tmp_path / "muon")][-1]
    monkeypatch.setattr(logger.Run, "sync", lambda self: order.append(("log", rows() >= 2)) or sync(self))
    monkeypatch.setattr(checkpoint, "write_file", lambda path, *words: order.append(path.name) or write(path, *words))
    train(tmp_path, data=shards, num_iterations=4, checkpoint_every=2)
    assert order == 2 * [("log", True), "rank0.pt", "manifest.json"]


def test_a_log_that_cannot_be_brought_to_the_disk_is_told_to_all_ranks(tmp_path):
    """By the report that the others wait for."""

    def full(*_):
        raise UserError("cannot write run.log: No space left on device")

    world = World(0, 1, CPU)
    board = checkpoint.Saver(tmp_path / "checkpoint", None, world)
    with pytest.raises(UserError, match="the checkpoint of step 3 could not be written .*No space left on device"):
        checkpoint.write_checkpoint(tmp_path / "checkpoint", 3, {}, {}, world, board, full)


def test_a_checkpoint_that_torch_cannot_write_comes_with_the_free_space(tmp_path, monkeypatch):
    """On a full disk torch.save says only that a position was unexpected."""

    def fail(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    world = World(0, 1, CPU)
    board = checkpoint.Saver(tmp_path / "checkpoint", None, world)
    with pytest.raises(UserError, match=r"unexpected pos 64 vs 0; [\d,]+ MiB are free there"):
        checkpoint.write_checkpoint(tmp_path / "checkpoint", 3, {}, {}, world, board)


def test_a_checkpoint_that_was_found_damaged_is_not_kept_beside_those_made_since(tmp_path):
    world = World(0, 1, CPU)
    board = checkpoint.Saver(tmp_path / "checkpoint", None, world)
    for step in (100, 200, 300, 125, 150, 175):  # 200 and 300 turned out to be damaged, and the run went on from 100
        checkpoint.write_checkpoint(tmp_path, step, {"x": {"value": torch.zeros(1)}}, {}, world, board)
        there = [int(path.name.removeprefix("step_")) for path in checkpoint.checkpoints(tmp_path)]
        assert (
            there == {100: [100], 200: [200, 100], 300: [300, 200], 125: [125], 150: [150, 125], 175: [175, 150]}[step]
        )


def test_the_latest_and_the_previous_checkpoint_are_kept(shards, tmp_path, straight):
    assert sorted(path.name for path in (straight(MUON) / "checkpoint").iterdir()) == ["step_000008", "step_000010"]
    interrupt(tmp_path, at=5, data=shards)
    assert sorted(path.name for path in (tmp_path / "muon/checkpoint").iterdir()) == ["step_000002", "step_000004"]


def test_a_run_that_was_killed_after_its_last_checkpoint_is_brought_to_its_end(shards, tmp_path, straight):
    """The sample and what compressors need come after it; nothing is trained or evaluated again."""
    run = Path(shutil.copytree(straight(MUON), tmp_path / "muon"))
    lines, log = (run / "metrics.jsonl").read_text().splitlines(keepends=True), run / "metrics.jsonl"
    assert json.loads(lines[-1])["event"] == "end"
    log.write_text("".join(lines[:-1]))
    train(tmp_path, data=shards, resume=True, **RESUMED_RUN | {"warmup_steps": 0})
    again = log.read_text().splitlines(keepends=True)
    strip = lambda line: {
        key: value for key, value in json.loads(line).items() if key not in ("memory/peak_bytes", "train_time")
    }
    assert again[:-1] == lines[:-1] and strip(again[-1]) == strip(lines[-1])


def test_the_host_s_phases_are_not_mixed_up_with_the_device_s():
    kind = torch.autograd.DeviceType
    entry = lambda key, device, micro: SimpleNamespace(key=key, device_type=device, cpu_time_total=micro)
    events = [entry("forward", kind.CPU, 3e6), entry("forward", kind.CUDA, 0), entry("communication", kind.CPU, 1e6)]
    assert phase_seconds([*events, entry("aten::mm", kind.CPU, 5e6)]) == {"forward": 3, "communication": 1}


@pytest.mark.parametrize(
    "config, values, legal",
    (
        (dict(head="fp8", n_embd=40), {}, "n_embd is 40; with head fp8 on CUDA it must be a multiple of 16"),
        (dict(head="fp8"), dict(seq_len=1000, batch_tokens=4000), "seq_len is 1000"),
        (dict(head_dim=8), {}, "head_dim is 8; on CUDA"),
        (
            {},
            dict(seq_len=2**14 + 16, batch_tokens=2**14 + 16),
            "seq_len is 16400; on CUDA it must be a multiple of 128",
        ),
        ({}, {}, None),
    ),
)
def test_what_a_gpu_cannot_do_is_refused(config, values, legal):
    words = (
        model.Config(**dict(n_embd=64, n_head=2, head_dim=32) | config),
        dataclasses.replace(train_muon.PRESETS["cpu"], **values),
    )
    if legal is None:
        return settings.check_for_cuda(*words, words[1].seq_len)
    with pytest.raises(UserError, match=legal):
        settings.check_for_cuda(*words, words[1].seq_len)


def test_resuming_a_finished_run_trains_nothing_and_succeeds(shards, tmp_path, straight, monkeypatch):
    run = Path(shutil.copytree(straight(MUON), tmp_path / "muon"))
    steps, step = [], train_muon.train_step
    monkeypatch.setattr(train_muon, "train_step", lambda *words: steps.append(words[2]) or step(*words))
    assert train(tmp_path, data=shards, resume=True, **RESUMED_RUN | {"warmup_steps": 0}) == run
    assert steps == []
    assert_equal_run(run, straight(MUON))


CHANGED = [
    *(
        (MUON, name, value)
        for name, value in dict(muon_lr=0.123, seed=7, num_iterations=8, batch_tokens=768, seq_len=64).items()
    ),
    *(
        (MUON, name, value)
        for name, value in dict(top_k=1, n_layer=3, n_embd=40, num_experts=8, balance_window=2, value_embeds=0).items()
    ),
    (ADAMW, "lr_warmup", 3),
]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, shards):
    """recipe -> out_dir of a run stopped in step 7; not to be changed."""

    @once
    def get(recipe):
        out = tmp_path_factory.mktemp("interrupted")
        interrupt(out, recipe, data=shards)
        return out

    return get


@pytest.mark.parametrize(
    "recipe, field, value", CHANGED, ids=[f"{recipe.name}-{field}" for recipe, field, _ in CHANGED]
)
def test_resuming_with_another_hyperparameter_is_refused_by_name(recipe, field, value, shards, interrupted):
    out = interrupted(recipe)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said = refused(out, recipe, data=shards, resume=True, **RESUMED_RUN | {field: value})
    assert f" has {field} = " in said and f"not {value}; pass --{field} " in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_muon_s_run_with_adamw_is_refused(shards, tmp_path, interrupted):
    shutil.copytree(interrupted(MUON) / "muon", tmp_path / "adamw")
    refused(tmp_path, ADAMW, data=shards, resume=True, **RESUMED_RUN)


def test_resume_alone_takes_the_flags_of_the_run(shards, tmp_path, straight):
    interrupt(tmp_path, data=shards)
    status, _, err = call(lambda: train_muon.main(MUON), ["--resume", "--out_dir", str(tmp_path)])
    assert status == 0, err
    assert_equal_run(tmp_path / "muon", straight(MUON))


def test_a_finished_run_is_extended_with_a_new_cooldown(shards, tmp_path, straight):
    run = Path(shutil.copytree(straight(MUON), tmp_path / "muon"))
    call(lambda: train_muon.main(MUON), ["--resume", "--out_dir", str(tmp_path), "--num_iterations", "14"])
    rows = training_rows(run)
    hp = hyper(MUON, **RESUMED_RUN | {"num_iterations": 14})
    assert [row["step"] for row in rows] == list(range(1, 15))
    expected = [train_muon.lr_scale(step, hp) for step in range(10, 14)]
    assert [row["train/lr_scale"] for row in rows[10:]] == pytest.approx(expected, rel=1e-8)
    assert "extended from 10 to 14 steps" in (run / "run.log").read_text()
    assert [row["step"] for row in rows_of(run) if row.get("event") == "end"] == [14]
    assert [row["step"] for row in rows_of(run) if "val/loss" in row] == [0, 4, 8, 10, 12, 14]


def test_a_finished_run_without_its_checkpoint_is_refused_and_left_as_it_is(shards, tmp_path, straight):
    run = Path(shutil.copytree(straight(MUON), tmp_path / "muon"))
    shutil.rmtree(run / "checkpoint")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = refused(tmp_path, data=shards, resume=True, **RESUMED_RUN)
    assert "has ended, and its checkpoint is gone" in said and "--experiment_name" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_without_a_checkpoint_does_not_begin_again_with_other_settings(shards, tmp_path):
    interrupt(tmp_path, at=1, data=shards)
    assert "muon_lr = " in refused(tmp_path, data=shards, resume=True, **RESUMED_RUN | {"muon_lr": 0.123})


def test_other_data_of_the_same_size_is_refused(shards, tmp_path):
    """The shards hold other words, and as many tokens; a moved folder with the same shards is not other data."""
    other, moved = tmp_path / "other", shutil.copytree(shards, tmp_path / "moved")
    shutil.copytree(shards, other)
    tokens = np.array(data.read_shard(other / "words_train_000001.bin"))
    data.write_shard(other / "words_train_000001.bin", np.roll(tokens, 1))
    (other / "meta.json").write_text(json.dumps(prepare.describe(other, tokenizer.get_encoding("bytes"))))
    interrupt(tmp_path, data=shards)
    said = refused(tmp_path, data=other, resume=True, **RESUMED_RUN)
    assert "is of other data: words_train_000001.bin was " in said and str(other) in said
    train(tmp_path, data=moved, resume=True, **RESUMED_RUN)


@BOTH
def test_another_optimizer_does_not_resume_the_run(recipe, shards, tmp_path, interrupted):
    other = ADAMW if recipe is MUON else MUON
    shutil.copytree(interrupted(recipe) / recipe.name, tmp_path / "run")
    words = ["--resume", "--out_dir", str(tmp_path), "--experiment_name", "run"]
    status, _, err = call(lambda: train_muon.main(other), words)
    assert f"is of a run with {recipe.name}, not {other.name}" in sentence(status, err, other)


def test_resuming_nothing_starts_the_run_only_under_a_scheduler(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "there is no" in refused(tmp_path, data=shards, resume=True, num_iterations=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = flags(MUON, data=shards, out_dir=tmp_path, resume=True, num_iterations=1)
    status, _, err = call(lambda: train_muon.main(MUON), words)
    assert status == 0 and "this Slurm job starts the run" in err
    assert [row["step"] for row in training_rows(tmp_path / "muon")] == [1]


def test_what_does_not_change_the_mathematics_may_change_on_resume(shards, tmp_path, straight):
    interrupt(tmp_path, data=shards)
    values = RESUMED_RUN | dict(
        micro_batch_tokens=192, checkpoint_every=3, val_every=5, warmup_steps=0, sample_tokens=1
    )
    run = train(tmp_path, data=shards, resume=True, **values)
    assert_near(state_of(run), state_of(straight(MUON)), 1e-4)


@pytest.mark.parametrize("what", ["tensors", "manifest"])
def test_a_full_disk_is_one_sentence_and_leaves_earlier_checkpoints(what, shards, tmp_path, monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    save, write = torch.save, checkpoint.write_file
    if what == "tensors":
        monkeypatch.setattr(
            torch, "save", lambda value, file: full() if "step_000004" in file.name else save(value, file)
        )
    else:
        is_it = lambda path: path.name == "manifest.json" and "step_000004" in str(path)
        monkeypatch.setattr(checkpoint, "write_file", lambda path, fill: full() if is_it(path) else write(path, fill))
    said = refused(tmp_path, data=shards, **RESUMED_RUN)
    assert "step 4" in said and "No space left" in said and "--resume" in said
    assert [path.name for path in (tmp_path / "muon/checkpoint").iterdir()] == ["step_000002"]
    checkpoint.read_checkpoint(tmp_path / "muon/checkpoint/step_000002")


# -----------------------------------------------------------------------------
# The command line


@BOTH
def test_flags_are_the_fields_of_config_and_hyperparameters(recipe):
    status, text, _ = call(lambda: train_muon.main(recipe), ["--help"])
    assert status == 0
    fields = {field.name for cls in (Config, recipe.train_config) for field in dataclasses.fields(cls)}
    own = {"experiment_name", "preset", "resume", "enable_profiling"}
    offered = set(re.findall(r"^  --([a-z][\w-]*)", text, re.M))  # in one spelling; both parse
    assert offered - fields - own == {"help", "plan", "world_size", *logger.SINKS} and fields | own <= offered


@BOTH
def test_every_flag_sets_its_field_in_both_spellings(recipe):
    for cls in (Config, recipe.train_config):
        for field in dataclasses.fields(cls):
            value, companions = legal_value(field.name)
            others = [
                f"--{name}={other}"
                for name, other in (dict(value_embeds=1, seq_len=32, batch_tokens=384) | companions).items()
            ]
            for name in (field.name, field.name.replace("_", "-")):
                for words in ([f"--{name}", str(value)], [f"--{name}={value}"]):
                    config, hp, _ = train_muon.parse(recipe, ["--preset", "cpu", *others, *words])
                    assert getattr(config if cls is Config else hp, field.name) == value, words


def test_presets_differ_by_what_their_flags_say():
    for recipe in (MUON, ADAMW):
        assert set(recipe.presets) == {"cpu", "small", "speedrun"} <= set(recipe.model_presets)
        for name in recipe.presets:
            config, hp, _ = train_muon.parse(recipe, ["--preset", name])
            assert config == model.PRESETS[name] and hp == recipe.presets[name]


def test_without_a_preset_the_machine_chooses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_muon.parse(MUON, [])[1] == MUON.presets["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train_muon.parse(MUON, [])[1] == MUON.presets["speedrun"]


def test_the_preset_speedrun_has_the_default_values():
    for recipe in (MUON, ADAMW):
        assert recipe.presets["speedrun"] == recipe.train_config()


BAD_FLAGS = [  # words, what the sentence must contain
    (["--no_such_flag", "3"], ["no_such_flag"]),
    (["--num_iter", "3"], ["num_iter"]),
    (["--expe", "x"], ["expe"]),
    (["stray"], ["stray"]),
    (["--n_layer", "two"], ["n_layer", "int", "two"]),
    (["--muon_lr", "fast"], ["muon_lr", "float", "fast"]),
    (["--compile", "maybe"], ["compile", "true", "false", "maybe"]),
    (["--preset", "huge"], ["preset", "huge", "cpu", "speedrun"]),
    (["--router", "psychic"], ["router", "psychic", "linear"]),
    (["--dtype", "fp4"], ["dtype", "fp4", "bf16", "fp32"]),
    (["--ns_dtype", "fp4"], ["ns_dtype", "fp4", "bf16", "fp32"]),
    (["--pattern", "MX"], ["pattern", "MX", "M", "D"]),
    (["--device", "tpu"], ["device", "tpu", "cpu", "cuda"]),
    (["--num_iterations", "0"], ["num_iterations", "0", "at least 1"]),
    (["--val_every", "-1"], ["val_every", "-1", "at least 0"]),
    (["--muon_lr", "-0.1"], ["muon_lr", "-0.1", "at least 0"]),
    (["--muon_lr", "nan"], ["muon_lr", "nan"]),
    (["--muon_lr", "3e38"], ["muon_lr", "3e+38", "below 1e30"]),
    (["--weight_decay", "-1"], ["weight_decay", "-1"]),
    (["--beta1", "1"], ["beta1", "1.0", "below 1"]),
    (["--beta2", "1.5"], ["beta2", "1.5", "below 1"]),
    (["--softcap", "100"], ["softcap", "100", "at most 64"]),
    (["--momentum", "1.5"], ["momentum", "1.5"]),
    (["--momentum_start", "-1"], ["momentum_start", "-1"]),
    (["--momentum_warmup", "-3"], ["momentum_warmup", "-3"]),
    (["--cooldown_frac", "2"], ["cooldown_frac", "2"]),
    (["--batch_tokens", "100"], ["batch_tokens", "100", "32"]),
    (["--top_k", "5"], ["top_k", "5", "4"]),
    (["--seed", "99999999999999999999999"], ["seed"]),
]


@pytest.mark.parametrize("words, expected", BAD_FLAGS, ids=["=".join(words) for words, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_sentence_before_anything_is_made(words, expected, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(train_muon, "GPT", lambda config: pytest.fail("it was taken, and a model made"))
    base = flags(MUON, data=shards, out_dir=tmp_path / "logs")
    status, _, err = call(lambda: train_muon.main(MUON), base + words)
    said = sentence(status, err)
    assert all(part in said for part in expected), said
    assert not (tmp_path / "logs").exists()


def test_adamw_does_not_take_muon_s_flags(shards, tmp_path):
    assert "muon_lr" in refused(tmp_path / "logs", ADAMW, data=shards, muon_lr=0.1)
    assert "lr_warmup" in refused(tmp_path / "logs", MUON, data=shards, lr_warmup=1)


def test_adamw_refuses_a_negative_warm_up(shards, tmp_path):
    assert "lr_warmup" in refused(tmp_path / "logs", ADAMW, data=shards, lr_warmup=-1)


def test_a_process_with_a_bad_flag_says_one_line_and_fails():
    done = python(ROOT / "train_adamw.py", "--n_layer", "0")
    assert done.returncode != 0 and done.stdout == ""
    assert (
        len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("train_adamw.py: error: ")
        and "n_layer is 0" in done.stderr
    )


def test_an_existing_experiment_is_refused_and_left_as_it_is(shards, tmp_path):
    run = train(tmp_path, data=shards, num_iterations=1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = refused(tmp_path, data=shards, num_iterations=1)
    assert "--resume" in said and str(run) in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["x" * 300, "two\nlines", "a/b", "..", ".hidden", "-x", "plots", "\udcff", ""])
def test_a_name_that_no_folder_can_have_is_one_sentence_before_anything_is_built(name, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "build", None)
    words = [*flags(MUON, data=shards, out_dir=tmp_path / "logs"), f"--experiment_name={name}"]
    status, _, err = call(lambda: train_muon.main(MUON), words)
    assert "cannot name a run's folder; choose" in sentence(status, err) and len(err) < 400
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("out_dir", ["file/logs", "file", "x" * 300, "/proc/logs"])
def test_an_unwritable_folder_is_one_sentence_before_anything_is_built(out_dir, shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(model, "build", None)
    for values in ({}, {"resume": True}, {"enable_profiling": True}):
        said = refused(tmp_path / out_dir, data=shards, **values)
        assert "cannot write" in said and "choose another --out_dir" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_not_made_before_the_run_needs_it(tmp_path):
    logger.check_writable(tmp_path / "a/b/c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables", ["RANK=0", "RANK=x WORLD_SIZE=1 MASTER_ADDR=h MASTER_PORT=1", "RANK=",
                                       "RANK=2 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1",
                                       "RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=70000"])  # fmt: skip
def test_variables_of_ranks_that_do_not_fit_are_one_sentence(variables, shards, tmp_path, monkeypatch):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    said = refused(tmp_path / "logs", data=shards)
    assert said.startswith(f"{variables} is no place") and "torchrun" in said and "unset RANK" in said
    assert not (tmp_path / "logs").exists()


def test_under_torchrun_the_sentence_is_the_first_and_the_last_thing_said(tmp_path):
    """Between them is torchrun's own traceback, which it always prints, and no entry for another rank."""
    done = torchrun(2, ROOT / "train_muon.py", "--preset", "cpu", "--data", tmp_path / "nothing")
    assert done.returncode == 1
    head, _, summary = done.stderr.partition("Traceback (most recent call last)")
    assert head.count(f"train_muon.py: error: rank 0: {tmp_path}/nothing holds no token shards") == 1
    assert "train_muon.py" not in re.sub(r"train_muon.py FAILED", "", summary), "no traceback of ours"
    assert "<NO_OTHER_FAILURES>" in summary
    *_, last, border = summary.strip().splitlines()
    assert last.strip().startswith(f"traceback : rank 0: {tmp_path}/nothing holds no token shards") and set(border) == {"="}


@pytest.mark.slow
def test_under_torchrun_a_bad_flag_is_said_once(tmp_path):
    done = torchrun(2, ROOT / "train_muon.py", "--preset", "cpu", "--seq_len", "1000")
    assert done.returncode == 1 and done.stderr.count("train_muon.py: error: batch_tokens is 4096") == 1


def test_more_ranks_than_gpus_are_refused_before_one_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="8 ranks on this host have 4 GPUs; pass --nproc_per_node=4"):
        distributed.init_distributed(None, timedelta(seconds=1))


def test_without_a_flag_the_end_of_text_is_the_data_s(shards):
    """Whatever the vocabulary: else masks and n-grams would cross documents."""
    config, hp = model.PRESETS["cpu"], hyper(MUON, data=shards)
    resolve = lambda **given: settings.resolve(
        dataclasses.replace(config, **given), hp, MUON, argparse.Namespace(**given), CPU
    )[0]
    assert (resolve().vocab_size, resolve().eot_token) == (257, 256)
    assert (resolve(vocab_size=320).vocab_size, resolve(vocab_size=320).eot_token) == (320, 256)
    assert resolve(vocab_size=320, eot_token=7).eot_token == 7


def test_the_rows_of_a_pass_are_found_at_once_for_any_batch():
    hp = hyper(MUON, seq_len=32, batch_tokens=32, micro_batch_tokens=64)
    assert settings.micro_batch_rows(2 * 10**15, hp, World(0, 1, CPU)) == 2


def test_a_field_that_an_old_run_lacks_is_said_so(shards, tmp_path):
    config, hp = CONFIGS["tiny"], hyper(MUON, data=shards)
    fields = {"model": dataclasses.asdict(config), "hyperparameters": dataclasses.asdict(hp), "script": MUON.script}
    del fields["model"]["ngrams"]
    with pytest.raises(UserError, match="has ngrams = None, not 2; it is older than --ngrams; choose another"):
        settings.check_same_run(fields, config, hp, MUON, tmp_path / "config.json")
    fields["model"]["ngrams"] = ""
    with pytest.raises(UserError, match="pass --ngrams ''"):
        settings.check_same_run(fields, config, hp, MUON, tmp_path / "config.json")


def test_resume_from_a_folder_that_cannot_be_read_is_one_sentence(shards):
    words = ["--resume", "--out_dir", "x" * 300, "--data", shards]
    status, _, err = call(lambda: train_muon.main(MUON), words)
    assert "cannot read" in sentence(status, err)


def test_a_missing_data_folder_is_one_sentence_with_the_command_that_makes_it(tmp_path):
    said = refused(tmp_path / "logs", data=tmp_path / "nothing")
    assert str(tmp_path / "nothing") in said and "python data.py" in said
    assert not (tmp_path / "logs").exists()


def test_a_vocabulary_too_small_for_the_data_is_one_sentence(shards, tmp_path):
    said = refused(tmp_path / "logs", data=shards, vocab_size=64, eot_token=63)
    assert "vocab_size is 64" in said and "257" in said and not (tmp_path / "logs").exists()


def test_too_few_tokens_for_a_batch_is_one_sentence(shards, tmp_path):
    said = refused(tmp_path / "logs", data=shards, batch_tokens=32 * 100_000, micro_batch_tokens=384)
    assert "100000" in said and shards in said
    assert not (tmp_path / "logs").exists()


def test_rows_that_the_ranks_cannot_share_are_one_sentence(shards, tmp_path):
    words = flags(MUON, data=shards, out_dir=tmp_path / "logs")
    config, hp, args = train_muon.parse(MUON, words)
    for size in (5, 8, 24):
        with pytest.raises(UserError, match=rf"12 rows .*{size} ranks.*--batch_tokens.*--nproc_per_node"):
            train_muon.prepare(config, hp, MUON, tmp_path / "logs/muon", False, True, World(0, size, CPU))
    assert not (tmp_path / "logs").exists()


def test_rows_that_fp8_cannot_take_on_cuda_are_one_sentence(shards, tmp_path):
    config, hp, args = train_muon.parse(
        MUON, flags(MUON, data=shards, out_dir=tmp_path / "logs", seq_len=24, batch_tokens=384, head="fp8")
    )
    with pytest.raises(
        UserError, match="seq_len is 24; with head fp8 on CUDA it must be a multiple of 16, or pass --head bf16"
    ):
        train_muon.prepare(config, hp, MUON, tmp_path / "logs/muon", False, True, World(0, 1, torch.device("cuda")))


def test_micro_batches_are_the_largest_that_fit_and_divide():
    rows_at_once = lambda tokens, size: settings.micro_batch_rows(
        12, hyper(MUON, micro_batch_tokens=tokens), World(0, size, CPU)
    )
    assert [rows_at_once(tokens, 1) for tokens in (1, 32, 64, 160, 192, 383, 384, 10**6)] == [1, 1, 2, 4, 6, 6, 12, 12]
    assert [rows_at_once(384, size) for size in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    assert rows_at_once(64, 4) == 1


def test_cuda_where_there_is_none_is_one_sentence(shards, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "cuda" in refused(tmp_path / "logs", data=shards, device="cuda").lower()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_earlier_checkpoints(shards, tmp_path, monkeypatch):
    nll = ops.softcap_nll

    def poisoned(z, target, **names):
        loss = nll(z, target, **names)
        return loss * math.nan if training_step[-1:] == [5] else loss

    training_step, step = [], train_muon.train_step
    monkeypatch.setattr(train_muon, "train_step", lambda *words: training_step.append(words[2]) or step(*words))
    monkeypatch.setattr(ops, "softcap_nll", poisoned)
    said = refused(tmp_path, data=shards, num_iterations=10, checkpoint_every=4)
    assert "the loss of step 6 is nan" in said and "step_000004" in said and "--experiment_name" in said
    assert [row["step"] for row in training_rows(tmp_path / "muon")] == [1, 2, 3, 4, 5, 6]  # read one step late
    assert training_rows(tmp_path / "muon")[5]["train/loss"] is None  # JSON knows no NaN
    assert sorted(path.name for path in (tmp_path / "muon/checkpoint").iterdir()) == ["step_000004"]
    checkpoint.read_checkpoint(tmp_path / "muon/checkpoint/step_000004")


def test_a_checkpoint_due_right_after_a_loss_that_is_not_finite_is_not_written(shards, tmp_path, monkeypatch):
    step = train_muon.train_step
    nan = lambda values: {name: value * math.nan for name, value in values.items()}
    spoil = lambda words, row, totals: (row, nan(totals) if words[2] == 5 else totals)
    monkeypatch.setattr(train_muon, "train_step", lambda *words: spoil(words, *step(*words)))
    assert "step 6 is nan" in refused(tmp_path, data=shards, num_iterations=10, checkpoint_every=2)
    assert sorted(path.name for path in (tmp_path / "muon/checkpoint").iterdir()) == ["step_000002", "step_000004"]


def test_a_loss_that_is_not_finite_names_its_part(shards, tmp_path, monkeypatch):
    summary = GPT.summary
    spoiled = lambda self, stats: summary(self, stats) | {"z_loss": stats[0].z_loss * math.inf}
    monkeypatch.setattr(GPT, "summary", spoiled)
    assert "is inf (z_loss is inf); " in refused(tmp_path, data=shards, num_iterations=3, warmup_steps=0)


def test_values_that_are_not_finite_are_not_saved(shards, tmp_path, monkeypatch):
    def spoiling_step(session, next_step, number, *words):
        row = step(session, next_step, number, *words)
        if number == 3:  # the loss of this step was still finite
            with torch.no_grad():
                session.model.embed[3, 3] = math.inf
        return row

    step = train_muon.train_step
    monkeypatch.setattr(train_muon, "train_step", spoiling_step)
    said = refused(tmp_path, data=shards, num_iterations=10, checkpoint_every=2)
    assert "step 4" in said and "embed[" in said and "not finite" in said
    assert sorted(path.name for path in (tmp_path / "muon/checkpoint").iterdir()) == ["step_000002"]


@BOTH
def test_an_absurd_rate_stops_the_run(recipe, shards, tmp_path):
    rates = {"embed_lr": 1e29, "router_lr": 1e29} | ({} if recipe is MUON else {"lr_warmup": 0})
    assert re.match(
        r"the loss of step \d+ is (nan|inf)", refused(tmp_path, recipe, data=shards, num_iterations=20, **rates)
    )
    assert not (tmp_path / recipe.name / "checkpoint/step_000020").exists()


# -----------------------------------------------------------------------------
# No dead option: another value of any field changes what a short run does
#
# field -> (another legal value, the settings under which it acts). A new field needs a row here, or a check of its own
# below.

CHANGES = {
    # Config
    "vocab_size": (300, {}),
    "eot_token": (255, {}),
    "n_layer": (3, {}),
    "n_embd": (48, {}),
    "n_head": (2, {}),
    "head_dim": (16, {}),
    "pattern": ("MD", {}),
    "mlp_ratio": (2.0, {}),
    "num_experts": (8, {}),
    "top_k": (1, {}),
    "router_noise": (0.5, {}),
    "norm_topk_prob": (0.0, {}),
    "balance_coef": (0.5, {}),
    "z_coef": (0.5, {}),
    "bias_update_factor": (0.1, {}),
    "num_shared_experts": (1, {"mlp_ratio": 3.0}),
    "shared_dim": (24, {"num_shared_experts": 1, "mlp_ratio": 3.0}),
    "balance_window": (2, {}),
    "attention": ("A-", {}),
    "window": ("S", {"window_size": 16}),
    "window_size": (8, {}),
    "attn_scale": (1.0, {}),
    "value_embeds": (0, {}),
    "ngrams": ("23", {}),
    "ngram_rows": (128, {}),
    "softcap": (30.0, {}),
    "head": ("fp8", {}),
    "dtype": ("bf16", {}),
    # Hyperparameters of both
    "seed": (1, {}),
    "num_iterations": (4, {}),
    "batch_tokens": (768, {}),
    "seq_len": (64, {}),
    "micro_batch_tokens": (192, {}),
    "val_every": (1, {}),
    "val_tokens": (64, {}),
    "checkpoint_every": (1, {}),
    "sample_tokens": (8, {}),
    "warmup_steps": (1, {}),
    "cooldown_frac": (1.0, {}),
    "final_lr_scale": (0.5, {"cooldown_frac": 1.0}),
    "window_start": (256, {"window_size": 256, "seq_len": 192, "batch_tokens": 384}),
    "embed_lr": (0.17, {}),
    "ngram_embed_lr": (0.17, {}),
    "value_embed_lr": (0.17, {}),
    "head_lr": (0.1, {}),
    "router_lr": (0.1, {}),
    "scalar_lr": (0.1, {}),
    "beta1": (0.5, {}),
    "beta2": (0.5, {}),
    # Muon's
    "muon_lr": (0.1, {}),
    "momentum": (0.5, {"momentum_warmup": 2}),
    "momentum_start": (0.5, {}),
    "momentum_warmup": (2, {"momentum_start": 0.5}),
    "weight_decay": (0.5, {}),
    "ns_dtype": ("bf16", {}),
    # AdamW's
    "matrix_lr": (0.1, {}),
    "lr_warmup": (2, {}),
}


def data_acts(shards, tmp_path, monkeypatch):
    birds = write_data(tmp_path / "birds", WORDS["birds"])
    assert not same(observe(tmp_path / "a", data=shards), observe(tmp_path / "b", data=birds))


def out_dir_acts(shards, tmp_path, monkeypatch):
    train(tmp_path / "here" / "below", data=shards, num_iterations=1)
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and (tmp_path / "here/below/muon/run.log").exists()


def device_acts(shards, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_muon, "train", lambda *words: seen.append(words[6].device.type))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", "cuda", None):
        train(tmp_path, data=shards, device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(tmp_path, data=shards, device=None)
    assert seen == ["cpu", "cuda", "cuda", "cpu"]


def compile_acts(shards, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **names: compiled.append(self))
    monkeypatch.setattr(torch, "compile", lambda function, **names: compiled.append(function) or function)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    train(tmp_path / "default", data=shards, num_iterations=1)
    train(tmp_path / "no", data=shards, num_iterations=1, compile="false")
    assert compiled == []
    train(tmp_path / "yes", data=shards, num_iterations=1, compile="true")
    assert len(compiled) == 2 + 3  # two blocks; the skips, the mix of layers and the loss


def shown_to(cls, monkeypatch, shards, tmp_path, **values) -> list:
    """Everything that a run with these values hands to cls()."""
    seen, init = [], cls.__init__
    monkeypatch.setattr(cls, "__init__", lambda self, *words: seen.extend(words) or init(self, *words))
    train(tmp_path, data=shards, num_iterations=1, **values)
    return seen


def stuck_after_acts(shards, tmp_path, monkeypatch):  # tests/core/test_faults.py has a rank that is stuck
    assert shown_to(guards.Watchdog, monkeypatch, shards, tmp_path, stuck_after=7.5)[2] == 7.5


def overlap_acts(shards, tmp_path, monkeypatch):  # tests/core/test_distributed.py sees when buckets leave
    assert shown_to(Exchange, monkeypatch, shards, tmp_path, overlap="false")[3] is False


def bucket_mb_acts(shards, tmp_path, monkeypatch):
    assert shown_to(Exchange, monkeypatch, shards, tmp_path, bucket_mb=0.01)[2] == 0.01
    few, many = (cost.plan(CONFIGS["cpu"], hyper(MUON, bucket_mb=mb), MUON, 2)["buckets"] for mb in (1.0, 0.01))
    assert len(few) < len(many)


def expert_parallel_acts(shards, tmp_path, monkeypatch):  # tests/core/test_distributed.py has runs with it
    assert "expert_parallel is 2" in refused(tmp_path, data=shards, expert_parallel=2)
    alone, shared = (cost.plan(CONFIGS["cpu"], hyper(MUON, expert_parallel=n), MUON, 2) for n in (1, 2))
    assert alone["held"] > shared["held"] and alone["rows_bytes"] == 0 < shared["rows_bytes"]


def tie_embeddings_acts(shards, tmp_path, monkeypatch):
    states = [
        state_of(train(tmp_path / tied, data=shards, num_iterations=1, tie_embeddings=tied))
        for tied in ("false", "true")
    ]
    assert "head[0:40]/value" in states[0] and not any(name.startswith("head") for name in states[1])


def slot_acts(field, table):
    """A slot that the zoo has more entries for: another entry of the table is built instead."""

    def acts(shards, tmp_path, monkeypatch):
        built, kind = [], table[getattr(model.Config(), field)]
        recorder = type(
            "Recorder", (kind,), {"__init__": lambda self, *words: built.append(field) or kind.__init__(self, *words)}
        )
        monkeypatch.setitem(table, "other", recorder)
        train(tmp_path, data=shards, num_iterations=1, **{field: "other"})
        assert built

    return acts


SLOTS = {"experts": model.EXPERTS, "router": model.ROUTERS, "depth": model.DEPTHS}
CHECKS = {
    "stuck_after": stuck_after_acts,
    "overlap": overlap_acts,
    "bucket_mb": bucket_mb_acts,
    "expert_parallel": expert_parallel_acts,
    "data": data_acts,
    "out_dir": out_dir_acts,
    "device": device_acts,
    "compile": compile_acts,
    "tie_embeddings": tie_embeddings_acts,
}
CHECKS |= {field: slot_acts(field, table) for field, table in SLOTS.items()}
# legal values, for the test of the flags
ALIKE = {
    "stuck_after": 5.0,
    "overlap": False,
    "bucket_mb": 0.01,
    "expert_parallel": 2,
    "data": "elsewhere",
    "out_dir": "elsewhere",
    "device": "cpu",
    "compile": True,
    "tie_embeddings": True,
}
ALIKE |= {field: getattr(model.Config(), field) for field in SLOTS}
OBSERVED_RUN = dict(num_iterations=3, window_start=64)


def legal_value(field: str):
    if field in ALIKE:
        return ALIKE[field], {}
    value, companions = CHANGES[field]
    return value, companions


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def observe(out, recipe=MUON, **values) -> dict:
    """What a short run did: its state, its rows, its files, its forward passes. Nothing in it merely repeats an
    option."""
    forwards, forward = [], GPT.forward

    def spy(self, tokens, *words, **names):
        forwards.append((self.training, tuple(tokens.shape)))
        return forward(self, tokens, *words, **names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", spy)
        run = train(out, recipe, **OBSERVED_RUN | values)
    echoes = ("train/flops", "train/lr_scale")  # computed from options alone
    rows = [{key: value for key, value in row.items() if key not in echoes} for row in untimed(run)]
    sampled = (run / "run.log").read_text().rpartition("=" * 100)[2].partition("the model continues it")[2]
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    state = {
        name: tensor for name, tensor in state_of(run).items() if name != "load_WLE/value"
    }  # its shape is balance_window
    return {"state": state, "rows": rows, "files": files, "forwards": forwards, "sample": sampled}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, shards):
    """(recipe, companions) -> what a run without the change did."""
    return once(
        lambda recipe, companions: observe(tmp_path_factory.mktemp("plain"), recipe, data=shards, **dict(companions))
    )


FIELDS = [(MUON, field.name) for cls in (Config, MUON.train_config) for field in dataclasses.fields(cls)]
FIELDS += [(ADAMW, field.name) for field in dataclasses.fields(ADAMW.train_config)]


@pytest.mark.parametrize("recipe, field", FIELDS, ids=[f"{recipe.name}-{field}" for recipe, field in FIELDS])
def test_no_option_is_dead(recipe, field, shards, tmp_path, monkeypatch, plain_run):
    if field in CHECKS:
        return CHECKS[field](shards, tmp_path, monkeypatch)
    assert field in CHANGES, f"{field} is new: give it a row in CHANGES, so that this test can see what it does"
    value, companions = CHANGES[field]
    before = plain_run(recipe, tuple(companions.items()))
    after = observe(tmp_path, recipe, data=shards, **companions | {field: value})
    assert not same(before, after), f"--{field} {value} changed nothing"


def test_the_test_of_dead_options_would_notice_one(shards, tmp_path, plain_run):
    assert same(plain_run(MUON, ()), observe(tmp_path, data=shards))


# -----------------------------------------------------------------------------
# Whole runs

LONG_RUN = dict(num_iterations=60, val_every=20, sample_tokens=16, warmup_steps=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards):
    """recipe -> the folder of a run of 60 steps; not to be changed."""
    return once(lambda recipe: train(tmp_path_factory.mktemp("finished"), recipe, data=shards, **LONG_RUN))


@BOTH
def test_the_log_has_the_scale_of_the_rates(recipe, finished):
    config = json.loads((finished(recipe) / "config.json").read_text())["hyperparameters"]
    hp = recipe.train_config(**config)
    logged = [row["train/lr_scale"] for row in training_rows(finished(recipe))]
    assert logged == pytest.approx([recipe.lr_scale(step, hp) for step in range(60)], rel=1e-8)
    assert (logged[0] < 0.1) == (recipe is ADAMW)  # its rates begin with a warm-up


@pytest.mark.parametrize("has_bf16", (True, False))
@BOTH
def test_a_cpu_without_bf16_computes_in_fp32_unless_told_otherwise(recipe, has_bf16, shards, monkeypatch):
    monkeypatch.setattr(settings, "cpu_has_bf16", lambda: has_bf16)
    own = ["--dtype", "bf16"] + (["--ns_dtype", "bf16"] if recipe is MUON else [])
    for words, dtype in (([], "bf16" if has_bf16 else "fp32"), (own, "bf16")):
        config, hp, args = train_muon.parse(recipe, ["--preset", "cpu", "--data", shards, *words])
        config, hp = settings.resolve(config, hp, recipe, args, CPU)
        assert config.dtype == dtype and getattr(hp, "ns_dtype", dtype) == dtype


@BOTH
def test_sixty_steps_learn(recipe, finished):
    losses = dict(series(finished(recipe), "val/loss"))
    assert sorted(losses) == [0, 20, 40, 60]
    assert losses[0] == pytest.approx(math.log(257), abs=1e-3)
    assert losses[60] < 1.5 and losses[60] < losses[20] < losses[0] - 1
    training = [loss for _, loss in series(finished(recipe), "train/loss")]
    assert np.mean(training[-5:]) == pytest.approx(losses[60], abs=0.3)


@BOTH
def test_a_run_leaves_its_files(recipe, finished):
    run = finished(recipe)
    assert {path.name for path in run.iterdir()} == {"run.log", "metrics.jsonl", "config.json", "checkpoint"}
    text = (run / "run.log").read_text()
    for name in (
        "train_muon.py",
        "train_adamw.py",
        "model.py",
        "ops.py",
        "cli.py",
        "checkpoint.py",
        "distributed.py",
        "facts.py",
        "guards.py",
        "data.py",
        "logger.py",
    ):
        assert (ROOT / name).read_text().strip() in text
    tail = text.rpartition("=" * 100)[2]
    line = re.compile(r"^step:(\d+)/(\d+) val_loss:([0-9.]+) train_time:[0-9.]+s step_avg:[0-9.]+ms", re.M)
    found = [(int(step), int(total), float(loss)) for step, total, loss in line.findall(tail)]
    assert [(step, total) for step, total, _ in found] == [(0, 60), (20, 60), (40, 60), (60, 60)]
    assert_near_series([(step, loss) for step, _, loss in found], series(run, "val/loss"), 1e-5)
    settings = json.loads((run / "config.json").read_text())
    assert (
        settings["hyperparameters"]["num_iterations"] == 60
        and settings["model"]["n_embd"] == 32
        and settings["optimizer"] == recipe.name
    )
    assert set(settings["model"]) == {field.name for field in dataclasses.fields(Config)}
    assert set(settings["hyperparameters"]) == {field.name for field in dataclasses.fields(recipe.train_config)}


@BOTH
def test_every_training_step_is_a_row_with_what_the_plots_need(recipe, finished):
    rows = training_rows(finished(recipe))
    assert [row["step"] for row in rows] == list(range(1, 61))
    needed = {
        "train/loss",
        "train_time",
        "train/tok_per_sec",
        "train/mfu",
        "moe/load",
        "moe/load_max_over_mean",
        "moe/router_entropy",
    }
    needed |= {f"time/{phase}" for phase in ("data", "forward", "backward", "communication", "optimizer")}
    for row in rows:
        assert needed <= row.keys(), needed - row.keys()
        assert np.array(row["moe/load"]).shape == (2, 4) and np.allclose(np.sum(row["moe/load"], axis=1), 1)
        assert row["moe/load_max_over_mean"] == pytest.approx(np.mean(np.max(row["moe/load"], axis=1) * 4))
        assert 0 <= row["moe/router_entropy"] <= 1.0001
    times = [row["train_time"] for row in rows_of(finished(recipe)) if "train_time" in row]
    assert times == sorted(times) and times[-1] > 0


def test_the_sample_continues_the_validation_text(finished, shards):
    end, text = rows_of(finished(MUON))[-1], (finished(MUON) / "run.log").read_text()
    prompt, _, rest = end["sample/text"].partition("|>")
    start = data.read_shard(Path(shards) / "words_val_000000.bin")[:32]
    assert prompt == tokenizer.get_encoding("bytes").decode(start) and rest
    assert re.search(rf"the validation text begins-+\n{re.escape(prompt)}\n-+the model continues it-+\n{re.escape(rest)}\n", text)


def test_the_prompt_of_the_sample_has_no_padding(tmp_path):
    """A validation text of seven characters, in rows of 32."""
    folder = Path(write_data(tmp_path / "short", WORDS["greek"]))
    encoding = tokenizer.get_encoding("bytes")
    data.write_shard(folder / "words_val_000000.bin", np.array([256, *b"sigma"], np.uint16))
    (folder / "meta.json").write_text(json.dumps(prepare.describe(folder, encoding)))
    run = train(tmp_path, data=folder, num_iterations=1, sample_tokens=3)
    assert rows_of(run)[-1]["sample/text"].startswith("sigm|>")


def validation_rows(shards, seq_len=32):
    """All rows of the validation shard cut by hand: inputs, targets, -1 where the last row has none."""
    tokens = data.read_shard(Path(shards) / "words_val_000000.bin").astype(np.int64)
    rows = -(-(len(tokens) - 1) // seq_len)
    inputs, targets = np.zeros(rows * seq_len, np.int64), np.full(rows * seq_len, -1)
    inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return torch.from_numpy(inputs).view(rows, seq_len), torch.from_numpy(targets).view(rows, seq_len), tokens


@BOTH
def test_the_last_validation_is_the_mean_over_every_token_and_bpb_follows(recipe, finished, shards):
    run = finished(recipe)
    net, _ = checkpoint.load_model_from_run(run / "checkpoint")
    inputs, targets, tokens = validation_rows(shards)
    nats = count = 0
    for row, target in zip(inputs, targets):
        log_p = net(row[None]).logits[0].double().log_softmax(-1)
        kept = target >= 0
        nats -= log_p[kept].gather(1, target[kept, None]).sum().item()
        count += int(kept.sum())
    assert count == len(tokens) - 1
    assert series(run, "val/loss")[-1][1] == pytest.approx(nats / count, abs=1e-5)
    nbytes = int((tokens < 256).sum())
    assert series(run, "val/bpb")[-1][1] == pytest.approx(nats / math.log(2) / nbytes, abs=1e-5)
    assert nbytes == data.load_meta(shards)["splits"]["val"]["bytes"]


def session_of(net, hp, rows: int = 1, recipe=MUON) -> Session:
    """A session of one rank, without a run."""
    return Session(recipe, hp, net, Exchange(net, World(0, 1, CPU)), logger.PhaseTimer("cpu"), micro_rows=rows)


def evaluate(net, hp, rows: int) -> dict[str, float]:
    return train_muon.evaluate(session_of(net, hp, rows), 0)


def test_val_tokens_takes_the_first_tokens(shards, finished, tmp_path):
    net, _ = checkpoint.load_model_from_run(finished(MUON) / "checkpoint")
    inputs, targets, _ = validation_rows(shards)
    hp = hyper(MUON, data=shards, val_tokens=96)
    values = evaluate(net, hp, 2)
    expected = np.mean([net.eval()(inputs[i : i + 1], targets[i : i + 1]).loss.item() for i in range(3)])
    assert values == {"val/loss": pytest.approx(expected, abs=1e-5)}


def test_validation_neither_draws_noise_nor_counts_auxiliary_losses(shards, finished):
    net, _ = checkpoint.load_model_from_run(finished(MUON) / "checkpoint")
    hp = hyper(MUON, data=shards, val_tokens=0)
    first = evaluate(net, hp, 3)
    assert net.training
    net.set_step(5, 6, 7)
    assert evaluate(net, hp, 3) == first
    assert evaluate(net, hp, 7)["val/loss"] == pytest.approx(first["val/loss"], abs=1e-6)


def test_the_checkpoint_answers_a_prompt(finished):
    words = [
        "--checkpoint",
        finished(MUON) / "checkpoint",
        "--prompt",
        "alpha be",
        "--max_new_tokens",
        24,
        "--temperature",
        0,
    ]
    status, out, err = call(generate.main, words)
    assert status == 0, err
    assert out.startswith("alpha beta ") and len(out) > 30
    assert set(out.split()[:-1]) <= {"alpha", "beta", "gamma", "delta"}


@BOTH
def test_the_same_command_gives_the_same_run_bit_by_bit(recipe, finished, shards, tmp_path):
    again = train(tmp_path, recipe, data=shards, **LONG_RUN)
    assert differing(state_of(again), state_of(finished(recipe))) == []
    assert untimed(again) == untimed(finished(recipe))


def test_warm_up_steps_leave_no_trace(shards, tmp_path):
    settings = dict(
        data=shards,
        num_iterations=4,
        val_every=1,
        sample_tokens=8,
        window_size=256,
        seq_len=192,
        batch_tokens=384,
        window_start=128,
    )
    none, two = (train(tmp_path / str(steps), warmup_steps=steps, **settings) for steps in (0, 2))
    assert differing(state_of(none), state_of(two)) == []
    assert untimed(none) == untimed(two)


def test_another_seed_gives_another_run_and_the_seed_is_all_it_takes(shards, tmp_path):
    torch.manual_seed(1)
    one = train(tmp_path / "1", data=shards, seed=5)
    torch.manual_seed(2)
    two = train(tmp_path / "2", data=shards, seed=5)
    assert differing(state_of(one), state_of(two)) == []


def test_the_clock_stands_still_during_validation_and_warm_up(shards, tmp_path, monkeypatch):
    now = [0.0]

    def takes(seconds, function):
        def slow(*words):
            now[0] += seconds
            return function(*words)

        return slow

    monkeypatch.setattr(train_muon, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_muon, "random_batches", takes(1000, train_muon.random_batches))
    monkeypatch.setattr(Exchange, "flush_reduce", takes(1, Exchange.flush_reduce))  # once in each step
    recipe = MUON._replace(evaluate=takes(1000, train_muon.evaluate))
    run = train(tmp_path, recipe, data=shards, num_iterations=5, val_every=2, checkpoint_every=3, warmup_steps=2)
    assert now[0] == 1000 * 5 + 7
    for row in rows_of(run):
        assert row.get("train_time", row["step"]) == row["step"], row


def test_a_dense_model_trains_too(shards, tmp_path):
    run = train(tmp_path, data=shards, pattern="D", num_iterations=40)
    losses = [loss for _, loss in series(run, "train/loss")]
    assert losses[-1] < losses[0] - 2
    assert all("moe/load" not in row or row["moe/load"] == [] for row in training_rows(run))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_blocks_train_the_same_run(dtype, shards, tmp_path, monkeypatch):
    """Tracing only: generating code would take minutes."""
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **names: compile_function(function, **{"backend": "eager"} | names)
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    torch._dynamo.reset()
    eager, traced = (
        train(tmp_path / flag, data=shards, dtype=dtype, num_iterations=3, compile=flag) for flag in ("false", "true")
    )
    assert "activations " + dtype + "; compiled" in (traced / "run.log").read_text()
    assert_near_series(series(eager, "train/loss"), series(traced, "train/loss"), 1e-5)


def test_data_without_byte_lengths_is_validated_without_bits_per_byte(shards, tmp_path):
    folder = Path(shutil.copytree(shards, tmp_path / "bare"))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"token_bytes": None, "gzip_bpb": None, "xz_bpb": None}))
    run = train(tmp_path, data=folder, num_iterations=1)
    assert series(run, "val/loss") and not series(run, "val/bpb")


# -----------------------------------------------------------------------------
# Profiling


def check_profile(folder: Path):
    assert {"trace.json", "summary.txt"} <= {path.name for path in folder.iterdir()}
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"data", "forward", "backward", "optimizer", "communication"} <= names
    summary = (folder / "summary.txt").read_text()
    assert (
        "ms per step" in summary
        and "MFU" in summary
        and "peak memory" in summary
        and str(folder / "trace.json") in summary
    )
    assert all(phase in summary for phase in ("forward", "backward", "optimizer"))


def test_profiling_writes_a_trace_and_a_summary_and_nothing_else(shards, tmp_path):
    run = train(tmp_path, data=shards, enable_profiling=True)
    assert [path.name for path in run.iterdir()] == ["profile"]
    check_profile(run / "profile")
    assert [row["step"] for row in training_rows(train(tmp_path, data=shards, num_iterations=1))] == [
        1
    ]  # the name is still free


@pytest.mark.slow
def test_profiling_an_existing_experiment_touches_only_its_profile(shards, tmp_path, finished):
    run = Path(shutil.copytree(finished(MUON), tmp_path / "muon"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train(tmp_path, data=shards, enable_profiling=True, **LONG_RUN)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path for path in after if path not in before} == set((run / "profile").iterdir())
    assert {path: after[path] for path in before} == before
    check_profile(run / "profile")


# -----------------------------------------------------------------------------
# Imports

BARE = """
import socket, sys
root = sys.argv.pop(1)
for name in ("tiktoken", "datasets", "matplotlib", "tqdm"):
    sys.modules[name] = None  # an import of it fails
def forbidden(*words, **names):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = forbidden
sys.path.insert(0, root)
import data, logger, model, train_adamw, train_muon
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
train_muon.main(train_muon.MUON)
"""


def test_training_needs_only_torch_and_numpy_and_no_network(shards, tmp_path):
    done = python(
        "-c", BARE, ROOT, *flags(MUON, data=shards, out_dir=tmp_path, sample_tokens=4, val_every=2), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "muon/checkpoint/step_000004/manifest.json").exists()
    assert "step:4/4 val_loss:" in done.stdout and "step:4/4 val_loss:" in (tmp_path / "muon/run.log").read_text()


@pytest.mark.slow
def test_the_core_trains_without_zoo_and_tools(shards, tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    done = python(
        tmp_path / "train_muon.py", *flags(MUON, data=shards, out_dir=tmp_path / "logs", sample_tokens=4), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/muon/checkpoint/step_000004/manifest.json").exists()


LOCAL = {
    "rows",
    "train_muon",
    "train_adamw",
    "model",
    "ops",
    "settings",
    "tokenizer",
    "cli",
    "checkpoint",
    "distributed",
    "facts",
    "guards",
    "data",
    "logger",
    "terminal",
}


def test_the_training_scripts_import_heavy_packages_nowhere_at_the_top():
    allowed = sys.stdlib_module_names | {"torch", "numpy"} | LOCAL
    for name in LOCAL:
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert {module.partition(".")[0] for module in modules} <= allowed, (name, modules)


PAGE_FAULTS = """
import resource, sys
import torch
import train_muon
import tokenizer
{before}
faults = []
for _ in range(8):
    torch.empty(2**25, dtype=torch.uint8).fill_(1)  # 32 MiB: above what glibc keeps
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="of glibc's malloc")
def test_a_run_keeps_the_memory_that_its_tensors_give_back():
    join = "import datetime, distributed; distributed.init_distributed('cpu', datetime.timedelta(seconds=60))"
    asked = [
        subprocess.run(
            [sys.executable, "-c", PAGE_FAULTS.format(before=before)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for before in ("", join)
    ]
    given_back, kept = (int(run.stdout) for run in asked)
    assert kept < 1000 < 10_000 < given_back  # pages of 4 KiB


def test_every_flag_says_what_it_is(capsys):
    """What the comment behind a field says, out of the source; of TrainConfig's fields, of the recipe's own and of the
    model's."""
    with pytest.raises(SystemExit):
        train_muon.parse(MUON, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "steps; 0 = at the end only (default 125)",
        "tiled over depth: M = mixture of experts, D = dense MLP (default 'DDDM')",
    ):
        assert text in said
    own = {"experiment_name", "preset", "world_size"}  # with a default, but no field
    fields = len(dataclasses.fields(Config)) + len(dataclasses.fields(MUON.train_config))
    assert len(re.findall(r"\(default ", said)) == fields + len(own)
