"""Facts that a run logs: its settings and code, its evaluations, its speed and memory, its end.

The functions take train_muon.py's Session: recipe, hp, model, exchange, timer, folder."""

import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
import model
import tokenizer
from checkpoint import class_name
from cli import UserError, file_sha256
from logger import Run
from model import DTYPES, Config, flops_per_token
from terminal import say

# -----------------------------------------------------------------------------
# Settings and code


def source_files() -> list[Path]:
    """The files of this repository that are imported: modules beside this file or in a folder there."""
    root = Path(__file__).resolve().parent
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(name).resolve() for name in names if name and Path(name).is_absolute()}
    return sorted(path for path in paths if root in (path.parent, path.parent.parent))


def shared_facts(config: Config, hp, recipe, **choices) -> dict:
    """Facts that must be the same on all ranks: settings, data, code, torch."""
    fields = dataclasses.asdict(config) | dataclasses.asdict(hp) | choices
    flags = {f"--{name}": value for name, value in fields.items() if name != "data"}  # the path may differ
    shards = {f"shard {name}": contents for name, contents in recipe.data.fingerprint(hp.data).items()}
    code = {f"the code of {path.name}": file_sha256(path)[:16] for path in source_files()}
    return flags | shards | code | {"torch": torch.__version__}


def run_facts(session, experiment_name: str, encoding: str) -> dict:
    """The contents of config.json."""
    config, hp, world = session.model.config, session.hp, session.world
    return {
        "experiment_name": experiment_name,
        "optimizer": session.recipe.name,
        "config_class": class_name(config),
        "model": dataclasses.asdict(config),
        "hyperparameters": dataclasses.asdict(hp),
        "parameters": model.count_parameters(config),
        "flops_per_token": flops_per_token(config, hp.seq_len),
        "encoding": data.stored_name(encoding),
        "shards": session.recipe.data.fingerprint(hp.data),
        "world_size": world.size,
        "matmul_flops_per_second": world.size * matmul_rate(world.device, config.dtype),
    }


def header(session, facts: dict, compile_note: str) -> str:
    """First line of a run's log: size, batch and precision. `facts` are those of run_facts, here and below."""
    hp, world, parameters = session.hp, session.world, facts["parameters"]
    return (f"{session.recipe.name}: {parameters['total']:,} parameters, {parameters['active']:,} active; "
            f"{hp.batch_rows} rows x {hp.seq_len} tokens per step, "
            f"{session.micro_rows} rows at a time on {world.size} x {world.device.type}; "
            f"activations {session.model.config.dtype}; {compile_note}")  # fmt: skip


# -----------------------------------------------------------------------------
# Evaluations, speed, norms


def log_evaluation(session, log: Run, step: int, train_time: float, metrics: dict, facts: dict):
    """Add an evaluation's row to metrics.jsonl, and print its line."""
    hp = session.hp
    flops = step * hp.batch_tokens * facts["flops_per_token"]
    log.log({"step": step, "train_time": train_time, "train/flops": flops, **metrics})
    log.flush()
    line = f"step:{step}/{hp.num_iterations} val_loss:{metrics['val/loss']:.5f} train_time:{train_time:.3f}s"
    line += f" step_avg:{1000 * train_time / max(step, 1):.2f}ms"
    log.print(line + "".join(f" {k.replace('/', '_')}:{v:.4f}" for k, v in metrics.items() if k.endswith("/bpb")))


def speed_metrics(session, step: int, seconds: float, facts: dict) -> dict:
    """Speed, FLOPs and memory after `step` steps, the last of which took `seconds`."""
    hp = session.hp
    speed = hp.batch_tokens / seconds
    return {
        "train/tok_per_sec": speed,
        "train/mfu": speed * facts["flops_per_token"] / facts["matmul_flops_per_second"],
        "train/flops": step * hp.batch_tokens * facts["flops_per_token"],
        "memory/peak_bytes": peak_bytes(session.world.device),
    }


NORMS_EVERY = 25  # steps


class Norms:
    """Norms of gradients and updates by kind of parameter, over the whole model; of every 25th step only.

    Training keeps its bits, as slabs are only read. A copy of a bucket's owned slabs lives during their update."""

    def __init__(self, exchange, step: int):
        self.due, self.world = (step + 1) % NORMS_EVERY == 0, exchange.world
        self.kinds = sorted(set(exchange.model.parameter_kinds().values())) if self.due else []
        self.squares = torch.zeros(2, len(self.kinds), dtype=torch.float64, device=self.world.device)

    @contextlib.contextmanager
    def measure(self, transfer):
        """Adds the squares of the slabs that this rank owns in a bucket; encloses their update."""
        owned = transfer.owned_by_kind() if self.due else {}
        before = {kind: [value.clone() for value in values] for kind, values in owned.items()}
        for kind, values in owned.items():
            self._add(0, kind, [value.grad for value in values])
        yield
        for kind, values in owned.items():
            torch._foreach_sub_(before[kind], values)
            self._add(1, kind, before[kind])

    def _add(self, quantity: int, kind: str, tensors: list[torch.Tensor]):
        tensors = [tensor.values() if tensor.is_sparse else tensor for tensor in tensors]
        square = torch.stack(torch._foreach_norm(tensors)).double().square().sum()
        self.squares[quantity, self.kinds.index(kind)] += square

    def row(self) -> dict:
        """{"norm/grad/<kind>" and "norm/update/<kind>": 0-d tensor}; {} if this step is not due. Sums over ranks."""
        if self.due and self.world.size > 1:
            dist.all_reduce(self.squares)
        norms = zip(("grad", "update"), self.squares.sqrt())
        return {f"norm/{name}/{kind}": norm for name, row in norms for kind, norm in zip(self.kinds, row)}


# -----------------------------------------------------------------------------
# The end of a run


def log_end(session, log: Run, encoding_name: str, train_time: float, metrics: dict, facts: dict):
    """Log the peak memory, the bits per byte of general compressors, and a sample."""
    hp, steps = session.hp, session.hp.num_iterations
    end = {"step": steps, "event": "end", "train_time": train_time,
           "train/flops": steps * hp.batch_tokens * facts["flops_per_token"],
           "memory/peak_bytes": peak_bytes(session.world.device)}  # fmt: skip
    log.print(f"peak memory: {end['memory/peak_bytes'] / 2**20:,.0f} MiB")
    say("sampling, and compressing the validation text for comparison", session.world.rank == 0)
    session.timer.begin("sampling")
    prompt, continuation = sample(session)  # on all ranks, as one may hold some of the experts only
    if session.world.rank == 0:
        try:
            encoding = tokenizer.get_encoding(encoding_name)
        except UserError as error:
            log.print(f"no comparison with compressors and no sample: {error}")
        else:
            others = data.compressed_bpb(session.recipe.validation_text(session, encoding))
            end |= {f"val/{name}": bpb for name, bpb in others.items()}
            ours = f", this model {metrics['val/bpb']:.4f}" if "val/bpb" in metrics else ""
            compared = f"gzip -9 {others['gzip_bpb']:.4f}, xz -9 {others['xz_bpb']:.4f}{ours}"
            log.print(f"bits per byte of the validation text: {compared}")
            if hp.sample_tokens:
                beginning, written = encoding.decode(prompt), encoding.decode(continuation)
                end["sample/text"] = f"{beginning}|>{written}"
                log.print(f"{'the validation text begins':-^60}\n{beginning}\n"
                          f"{'the model continues it':-^60}\n{written}\n{'-' * 60}")  # fmt: skip
    log.log(end)


def next_commands(folder: Path) -> str:
    """Commands to paste after a run in this folder: sample from it, look at it, compare it with the runs beside it."""
    script = lambda name: "python " + shlex.quote(os.path.relpath(Path(__file__).with_name(name).resolve()))
    runs = f"{script('logger.py')} --out_dir {shlex.quote(str(folder.parent))}"
    commands = {
        "sample": f"{script('model.py')} --checkpoint {shlex.quote(str(folder / 'checkpoint'))} --prompt 'The '",
        "look": f"{runs} --experiment_name {shlex.quote(folder.name)} --html",
        "compare": runs,
    }
    return "next:\n" + "\n".join(f"  {command}  # {purpose}" for purpose, command in commands.items())


def validation_text(session, encoding: tokenizer.Encoding) -> bytes:
    """The beginning of the text that evaluate() predicts, at most COMPRESSED_BYTES."""
    hp = session.hp
    max_tokens = max(min(hp.val_tokens or data.COMPRESSED_BYTES, data.COMPRESSED_BYTES), hp.seq_len)
    batches = data.validation_batches(hp.data, seq_len=hp.seq_len, rows=1, max_tokens=max_tokens)
    ids = torch.cat([batch.targets_BT[batch.targets_BT >= 0] for batch in batches])
    return encoding.decode_bytes(ids)[: data.COMPRESSED_BYTES]


# 17% of preset cpu's runs of 8 ids are repeats; 41% at 1.0 and 0.9, and 9% in its text
SAMPLE_RULES = {"temperature": 1.1, "top_p": 0.9}


def sample(session) -> tuple[list[int], list[int]]:
    """Ids: the beginning of the validation text, and the model's continuation."""
    hp, device = session.hp, session.world.device
    batches = session.recipe.data.validation_batches(hp.data, seq_len=min(32, hp.seq_len), rows=1, device=device)
    first = next(batches)
    prompt = first.inputs_BT[:, : (first.targets_BT >= 0).sum()]  # without padding, if the text is short
    ids = session.model.generate(prompt, hp.sample_tokens, **SAMPLE_RULES, seed=hp.seed)[0].tolist()
    return ids[: prompt.size(1)], ids[prompt.size(1) :]


# -----------------------------------------------------------------------------
# The device


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L40S": 362e12,
              "B200": 2250e12}  # dense bf16  # fmt: skip


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s that MFU is a share of: a known GPU's dense bf16 peak, else the best of fifty 1024^3 matmuls."""
    if device.type == "cuda":
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return peak
    x, best = torch.randn(1024, 1024, device=device).to(DTYPES[dtype]), math.inf
    for _ in range(50):
        synchronize(device)
        began = time.perf_counter()
        x @ x
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def cpu_has_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return supported() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far of the GPU's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

