"""Tests that need a GPU: operators at their native precision, graphs that are compiled once, a step without
synchronisations, and the CPU's learning curve. `pytest -m gpu -rs`; skipped without a CUDA device."""

import dataclasses
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import logger  # noqa: E402
import model  # noqa: E402
import ops  # noqa: E402
import train_muon  # noqa: E402
from checkpoint import load_model_from_run  # noqa: E402
from distributed import World  # noqa: E402
from guards import AsyncHostCopy  # noqa: E402
from logger import PhaseTimer  # noqa: E402
from model import PRESETS, Config, DenseMask, ExpertRanks, FlexMask  # noqa: E402
from tools import prepare  # noqa: E402

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
pytestmark = [pytest.mark.gpu, no_gpu]
CUDA = torch.device("cuda")
SMALL = dict(
    vocab_size=1000,
    eot_token=999,
    n_layer=4,
    n_embd=256,
    n_head=2,
    head_dim=128,
    num_experts=8,
    top_k=2,
    value_embeds=1,
    pattern="MD",
    attention="AA-A",
    window="LS",
    window_size=512,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator(CUDA).manual_seed(seed)


def error(got, want) -> float:
    """Of the norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def close_to_fp32(got, rounded, exact, slack: float = 2.0):
    """No further from the exact result than `slack` times what plain operators in the same type are."""
    assert error(got, exact) <= slack * error(rounded, exact) + 1e-6, (error(got, exact), error(rounded, exact))


# -----------------------------------------------------------------------------
# Operators


@pytest.mark.parametrize("window", (1, 100, 128, 384, 4096))
def test_flex_attention_equals_sdpa(window):
    B, H, T, C = 2, 2, 1024, 128
    doc_BT = (torch.rand(B, T, device=CUDA, generator=rng(window)) < 0.01).long().cumsum(1)
    position, tokens = torch.arange(T, device=CUDA), torch.tensor(window, device=CUDA)
    q, k, v, dy = torch.randn(4, B, H, T, C, device=CUDA, generator=rng(1)).unbind()
    results = []
    for kind, dtype in ((FlexMask, torch.bfloat16), (DenseMask, torch.bfloat16), (DenseMask, torch.float32)):
        mask = kind(position, position, doc_BT, doc_BT, tokens)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = mask.attend(*inputs, 0.12)
        results.append([y, *torch.autograd.grad((y * dy.to(dtype)).sum(), inputs)])
    for flex, dense, exact in zip(*results):
        if exact.norm() > 0:  # with one key there is nothing to learn about scores
            close_to_fp32(flex, dense, exact)


@pytest.mark.parametrize(
    "counts", ([64] * 8, [0, 500, 0, 1, 3, 0, 7, 1], [512, 0, 0, 0, 0, 0, 0, 0], [0] * 7 + [512]), ids=str
)
def test_grouped_matmuls_with_empty_and_uneven_experts(counts):
    rows = torch.randn(sum(counts), 256, device=CUDA, generator=rng())
    weight = torch.randn(8, 384, 256, device=CUDA, generator=rng(1)) / 16
    dy = torch.randn(len(rows), 384, device=CUDA, generator=rng(2))
    ends = torch.tensor(counts, device=CUDA).cumsum(0).int()
    rows_16, weight_16 = (x.bfloat16().requires_grad_() for x in (rows, weight))
    y = ops.grouped_mm(rows_16, weight_16, ends)
    got = [y, *torch.autograd.grad(y, (rows_16, weight_16), dy.bfloat16())]
    for dtype, store in ((torch.bfloat16, rounded := []), (torch.float32, exact := [])):
        r, w = (x.bfloat16().to(dtype).requires_grad_() for x in (rows, weight))
        y = torch.cat([part @ w[e].T for e, part in enumerate(r.split(counts))])
        store += [y, *torch.autograd.grad(y, (r, w), dy.bfloat16().to(dtype))]
    for ours, plain, want in zip(got, rounded, exact):
        close_to_fp32(ours, plain, want)
    assert all((got[2][e] == 0).all() for e, count in enumerate(counts) if count == 0)


def test_fp8_head_forward_and_backward():
    """e4m3 rounds by about 0.026 of the norm, e5m2 by 0.053; the CPU's head differs by its sums alone."""
    T, V, D = 512, 1024, 256
    x = ops.norm(torch.randn(T, D, device=CUDA, generator=rng())).bfloat16()
    w = torch.randn(V, D, device=CUDA, generator=rng(1)) * 0.3
    dz = (torch.rand(T, V, device=CUDA, generator=rng(2)) - 0.5).bfloat16() * 0.02

    def head(x, w, dz):
        z, saved = ops.fp8_forward(x, ops.fp8_prepare(w, x))
        return z, *ops.fp8_backward(dz, saved)

    got, want = head(x, w, dz), (x.float() @ w.T, dz.float() @ w, dz.float().T @ x.float())
    for ours, there, exact, most in zip(got, head(x.cpu(), w.cpu(), dz.cpu()), want, (0.05, 0.09, 0.09)):
        assert error(ours, exact) < most and error(ours.cpu(), there) < 0.01, (
            error(ours, exact),
            error(ours.cpu(), there),
        )


def test_a_step_s_loss_and_gradients_are_the_cpu_s():
    """fp32, eager, same parameters, documents and noise."""
    config = Config(**SMALL | dict(dtype="fp32"))
    ids = torch.randint(999, (2, 513), generator=torch.Generator().manual_seed(3))
    ids[0, 100] = ids[1, 300] = 999
    results = []
    for device in ("cpu", "cuda"):
        net = model.build(config).init_weights(1).to(device).train()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(device) * 0.02)
        net.set_step(5, 7, 11)
        out = net(ids[:, :-1].to(device), ids[:, 1:].to(device))
        names, parameters = zip(*net.named_parameters())
        results.append((out, dict(zip(names, torch.autograd.grad(out.loss, parameters)))))
    (cpu, cpu_grads), (gpu, gpu_grads) = results
    assert abs(cpu.loss.item() - gpu.loss.item()) < 1e-4
    assert torch.equal(cpu.stats["counts_LE"], gpu.stats["counts_LE"].cpu())
    for name, grad in cpu_grads.items():
        assert error(gpu_grads[name].cpu(), grad) < 2e-3, name


# -----------------------------------------------------------------------------
# A training step


class Trainer:
    """The parts of a run that train() makes before its loop, over random or given batches."""

    def __init__(self, config: Config, device: torch.device, rows: int = 2, seq_len: int = 1024, **hp):
        settings = dict(batch_tokens=2 * rows * seq_len, micro_batch_tokens=rows * seq_len, seq_len=seq_len) | hp
        hp = dataclasses.replace(train_muon.PRESETS["speedrun"], **settings)
        self.model = model.build(config).init_weights(0).to(device).train()
        exchange = train_muon.Exchange(self.model, World(0, 1, device))
        exchange.attach_optimizers(train_muon.MUON, hp)
        self.note = train_muon.compile_model(self.model, hp, device)
        self.next_step = train_muon.random_batches(config, hp, 2, rows, device)
        self.session = train_muon.Session(train_muon.MUON, hp, self.model, exchange, PhaseTimer(device.type))

    def step(self, number: int) -> AsyncHostCopy:
        """One optimizer step; returns its loss and flags."""
        self.row, totals = train_muon.train_step(self.session, self.next_step, number)
        return AsyncHostCopy(totals)


@pytest.fixture(scope="module")
def trainer():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = Trainer(Config(**SMALL), CUDA, num_iterations=20)
    assert trainer.note == "compiled"
    for step in range(2):
        trainer.step(step)
    return trainer


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_nothing_is_compiled_anew_while_routes_and_windows_change(trainer):
    """Whole graphs (fullgraph=True raises at a break), one for each kind of layer."""
    before, loads = graphs(), set()
    assert 0 < before <= 7  # two kinds of MoE layer, two of dense layer, two of skip, the mix of layers
    for step in range(0, 20, 4):
        with torch.no_grad():
            trainer.model.bias_LE.copy_(torch.randn(trainer.model.bias_LE.shape, generator=rng(step), device=CUDA))
        trainer.step(step)
        loads.add(tuple(trainer.row["moe/load"].flatten().tolist()))
    assert graphs() == before and len(loads) == 5


def test_a_step_has_no_synchronisation(trainer):
    """With batches on the device the host never waits for a value of the GPU."""
    batches = trainer.next_step()
    trainer.next_step, real = lambda: batches, trainer.next_step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.next_step = real


SYNCHRONISED = {  # beyond compiled steps: fields of the Config, most synchronisations of a micro-batch
    "stack, uncompiled": (dict(), 0),
    "experts of two layers shared by the ranks of a group": (dict(), 2),  # row counts, once per layer
    "loop, three iterations of two layers, halt act": (dict(depth="loop", loops=3, looped=".oo.", halt="act"), 60),
    "routed, three steps over two layers": (dict(depth="routed", loops=3, looped=".oo."), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", SYNCHRONISED)
def test_synchronisations_of_a_step_are_counted(case, tmp_path, capsys):
    """Synchronisations of a training step of two micro-batches; printed."""
    changes, limit = SYNCHRONISED[case]
    config_type = pytest.importorskip("zoo").Config if changes else Config
    trainer = Trainer(config_type(**SMALL | changes), CUDA, num_iterations=20, compile=False)
    if "ranks" in case:
        group = f"file://{tmp_path}/group"
        torch.distributed.init_process_group("nccl", init_method=group, rank=0, world_size=1)
        for moe in (module for module in trainer.model.modules() if isinstance(module, model.MoE)):
            moe.ranks = ExpertRanks(0, 2, torch.distributed.group.WORLD)  # size 2 takes the way over the group of one
    try:
        for step in range(2):
            trainer.step(step)
        batches = trainer.next_step()
        trainer.next_step = lambda: batches
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            trainer.step(2)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    count = sum("synchronizing" in str(warning.message) for warning in found)
    with capsys.disabled():
        print(f"\n{case}: {count} synchronisations in a step of two micro-batches")
    assert count <= 2 * limit and (count > 0) == (limit > 0)


def test_sampling_from_a_compiled_model_compiles_nothing(trainer):
    before = graphs()
    ids = trainer.model.generate(torch.tensor([[999, 1, 2]], device=CUDA), 8)
    assert ids.shape == (1, 11) and graphs() == before


@pytest.fixture
def all_cores():
    """For the CPU's half of a comparison, which would take long on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("pattern", ("M", "D"))
def test_bf16_steps_follow_the_cpu_s_curve(pattern, tmp_path, all_cores):
    """100 steps of preset cpu's shape on the same batches, with the operators of each device."""
    folder = tmp_path / "data"
    prepare.main(["--source", "python", "--encoding", "bytes", "--max_tokens", "3000000", "--out", str(folder)])
    config = dataclasses.replace(PRESETS["cpu"], pattern=pattern)
    hp = dict(data=str(folder), num_iterations=100, batch_tokens=4096, seq_len=1024, momentum_warmup=50,
              window_start=256, muon_lr=0.03, ngram_embed_lr=0.1, compile=False)  # fmt: skip
    curves = []
    for device in (torch.device("cpu"), CUDA):
        trainer = Trainer(config, device, **hp)
        loader = data.Loader(folder, seq_len=1024, batch_rows=4, micro_rows=2, vocab_size=257, device=device)
        trainer.next_step = loader.next_step
        curves.append(torch.tensor([trainer.step(step).read()["loss"] for step in range(100)]))
        loader.close()
    cpu, gpu = curves
    assert cpu[0] - cpu[-10:].mean() > 1.5  # it learns
    assert (cpu[:5] - gpu[:5]).abs().max() < 0.02
    assert (cpu[-30:].mean() - gpu[-30:].mean()).abs() < 0.03 and F.l1_loss(cpu, gpu) < 0.05, (cpu, gpu)


def test_a_run_from_start_to_sample(tmp_path):
    """The script: compiled, FP8 head, warm-up, evaluations, a checkpoint that resumes, a sample, phase times."""
    folder, logs = tmp_path / "data", tmp_path / "logs"
    prepare.main(["--source", "python", "--encoding", "bytes", "--max_tokens", "300000", "--out", str(folder)])
    words = f"""--preset speedrun --data {folder} --out_dir {logs} --n_layer 4 --n_embd 256 --n_head 2 --value_embeds 1
                --pattern MD --attention AA-A --seq_len 1024 --batch_tokens 4096 --micro_batch_tokens 2048
                --num_iterations 30 --val_every 15 --val_tokens 8192 --warmup_steps 2 --sample_tokens 8
                --window_size 512 --checkpoint_every 15""".split()  # fmt: skip

    def run(*more: str):
        train_muon.main(train_muon.MUON, [*words, *more])
        return logger.read_run(logs / "muon")["rows"]

    rows = run()
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 30 and steps[-1]["train/loss"] < steps[0]["train/loss"] - 1
    assert all(row[f"time/{name}"] >= 0 for row in steps for name in ("data", "forward", "backward", "optimizer"))
    assert all(0 < row["train/mfu"] < 1 for row in steps) and sum(row["time/forward"] for row in steps) > 0
    ends = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(ends) == 3 and ends[-1] < ends[1] < ends[0]
    log = (logs / "muon/run.log").read_text()
    assert "; compiled" in log and "sample" in log and "import triton" in log
    shutil.rmtree(logs / "muon/checkpoint/step_000030")
    again = run("--resume")
    assert [row["val/loss"] for row in again if "val/loss" in row][-1] == pytest.approx(ends[-1], abs=0.02)
    net, manifest = load_model_from_run(logs / "muon/checkpoint", CUDA.type)
    assert manifest["step"] == 30 and net.generate(torch.tensor([[256, 100]], device=CUDA), 4).shape == (1, 6)
