"""same_bits.py: does the working tree compute the same bits as an earlier commit? CPU, no network:
`python tests/same_bits.py BASE [--only model|runs] [--builds SUBSTRING] [--cpu N]`

BASE is the commit to compare with. It is checked out into a temporary git worktree, which is removed at the end.
The old code (BASE) and the new code (the tree that this file lies in) run side by side, in processes with one thread
each. Nothing is stored from one call to the next, because bits depend on the CPU and on the version of PyTorch.

Part `model` (2 to 4 minutes): many tiny models, in fp32 and bf16. Compared are names, order, kinds and initial values
of the parameters; loss, statistics, gradients, parameters, optimizer state and buffers of three training steps; logits
in evaluation, logits decoded with a cache, and generated ids. Between initial values and training, noise is added to
all parameters. A model that the new code can build from its core alone is built a second time that way, "(core)".
Part `runs` (3 to 4 minutes): whole trainings of 50 steps on one and two ranks. Compared are the numbers in
metrics.jsonl and every slab of the checkpoints.

The table has one line for each case: the number of values compared, and `equal` or the first difference. The exit
status is 1 if anything differs or fails."""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# (pattern, replacement) pairs, which re.sub applies to the old names of parameters, buffers and slabs, for instance
# (r"^depth\.skip_weights", "skip_weights")
RENAMED = [(r"^depth\.(skip_weights|halt|controller)\b", r"\1")]
RETIRED_BUFFERS = {"counted_LE"}  # the core has them no more
RENAMED_STATS = {"local_loss": "router_loss", "loops": "depth/loops"}

# -----------------------------------------------------------------------------
# Models: fields of Config. The lists are copied from the tests, because those files change with the code.

SEED, VOCAB, EOT = 5, 61, 60
TINY = dict(vocab_size=VOCAB, eot_token=EOT, n_layer=4, n_embd=32, n_head=2, head_dim=16, num_experts=4, top_k=2,
            value_embeds=1, window="LS", window_size=12, attn_scale=0.5)  # fmt: skip
DTYPES, DEPTHS = ("fp32", "bf16"), ("loop", "routed", "stack")
ROUTERS = ("attention", "conv", "hash", "linear", "mlp", "recurrent")
EXITS = dict(experts="mlp*7,exit*2", top_k=1)
LOOP = dict(depth="loop", loops=3, looped=".oo.", halt_threshold=0.6)
POOL = dict(depth="routed", loops=3, identity_layers=1)

BUILDS = [dict(router=r, depth=d, pattern=p, attention=a)
          for r, d, p, a in itertools.product(("linear", "hash"), DEPTHS, ("M", "DM"), ("A", "A-"))]  # fmt: skip
BUILDS += [dict(router=r, depth=d, experts="mlp*2,swiglu,kan,identity,zero,noise,relu2,constant*2", mlp_ratio=4.5)
           for r, d in itertools.product(ROUTERS, DEPTHS)]  # fmt: skip
BUILDS += [dict(router="linear") | options for options in (
    dict(attention="KA-K", ngrams="24", ngram_rows=128), dict(attention="AS-S"), dict(attention="LSKS", window="L"),
    dict(attention="AKLA", rotary="NBWV"), dict(attention="AAAS", rotary="BWWW", window="LSSS"),
    dict(attention="KL", attn_softmax="ssmax", qk_norm="none"), dict(norms="RP", attention="A-"),
    dict(attention="L", num_meta_tokens=1), dict(router="hash", attention="K", num_meta_tokens=14),
    dict(router="attention", attn_softmax="ssmax", num_meta_tokens=3, ngrams="3", ngram_rows=128),
    dict(router="recurrent", attention="AS", num_meta_tokens=2, rotary="B"),
    dict(router="conv", norms="R", num_meta_tokens=2), dict(attention="RS", norms="UP", window="L"),
    dict(attention="RA", norms="U", experts="relu*3,mlp,exit", attn_experts=3, attn_top_k=1, rotary="B"))]  # fmt: skip
BUILDS += [dict(num_shared_experts=n, shared=kind, mlp_ratio=2.0 + n, routed_scale="auto")
           for kind, n in (("mlp", 1), ("conv", 2))]  # fmt: skip
# dense twins
BUILDS += [dict(pattern="D") | options for options in (
    {}, dict(n_layer=6, value_embeds=3), dict(n_layer=5, value_embeds=2, attention="AA-A"), dict(value_embeds=0),
    dict(tie_embeddings=True), dict(attention="KAK-", window="LSQE", ngrams="23", ngram_rows=100),
    dict(attn_softmax="ssmax"), dict(qk_norm="none"), dict(rotary="NVBW", window="LLLS"),
    dict(rotary="W", window="LSQE"), dict(attention="L", rotary="HN"), dict(attention="ASLS"),
    dict(attention="KSKS", rotary="WWBB", window="LLSS", attn_softmax="ssmax"), dict(norms="R", attention="LA-A"),
    dict(num_meta_tokens=3, ngrams="2", ngram_rows=50),
    dict(num_meta_tokens=9, attention="KL", attn_softmax="ssmax", rotary="HW"), dict(objective="masked", window="LSQE"),
    dict(residual="average"), dict(residual="average_keep_embedding"))]  # fmt: skip
BUILDS += [dict(pattern="D", depth="loop") | options for options in (
    dict(loops=1), dict(loops=2, looped=".o", n_layer=3, attention="KL-"), dict(loops=3, looped=".oo.", reinject=0.5),
    dict(loops=3, residual="average", norms="R"),
    dict(loops=2, residual="average_keep_embedding", looped="o.", n_layer=2),
    dict(loops=3, loop_keys="share_first", attention="KAAA"),
    dict(loops=3, attention="AS", num_meta_tokens=3, attn_softmax="ssmax"),
    dict(loops=2, objective="masked"))]  # fmt: skip
# routers, their losses and the balance of experts
BUILDS += [
    dict(router_score="sigmoid"),
    dict(router_score="sigmoid", router="mlp", norm_topk_prob=0.5, bias_update_factor=0.01),
    dict(router_residual=0.5, pattern="MDMM"), dict(importance_coef=0.3, load_coef=0.2), dict(entropy_coef=0.1),
    dict(router_noise=0.0), dict(bias_update_factor=0.1), dict(bias_update_factor=0.1, bias_update_threshold=70),
    dict(balance_window=2, top_k=1, norm_topk_prob=0.0),
    dict(experts="mlp*6,zero*2,identity", free_eta=0.75, router_residual=1.0, bias_update_factor=0.05),
    dict(experts="swiglu", mlp_ratio=4.5), dict(num_shared_experts=1, mlp_ratio=3.0, routed_scale="2.5"),
    dict(num_shared_experts=1, shared_dim=32), dict(router_spread="learned")]  # fmt: skip
BUILDS += [dict(objective="masked") | options for options in (
    *(dict(router=router) for router in ROUTERS), dict(depth="loop", halt="act"),
    dict(depth="routed", identity_layers=1))]  # fmt: skip
# loops that tokens leave
BUILDS += [LOOP | dict(halt=halt, loop_keys=keys, **more) for halt, keys, more in (
    ("none", "per_loop", {}), ("act", "latest", dict(attention="KL")),
    ("act", "per_loop", dict(attention="AASA", window="L", residual="average")),
    ("act", "share_first", dict(reinject=0.3)), ("stick_breaking", "latest", dict(norms="R", num_meta_tokens=2)),
    ("stick_breaking", "per_loop", dict(attn_softmax="ssmax")),
    ("threshold", "latest", dict(residual="average_keep_embedding", attention="AA-A")),
    ("threshold", "share_first", dict(looped="oo..", attention="KAAS", window="L")), ("ponder", "latest", {}),
    ("ponder", "per_loop", dict(attention="K", eval_loops=5)), ("exit", "latest", EXITS),
    ("exit", "per_loop", EXITS))]  # fmt: skip
BUILDS += [dict(depth="loop") | options for options in (
    dict(loops=3, eval_loops=2), dict(step_loss="mean"), dict(entropy_coef=0.1, router="mlp"))]  # fmt: skip
# layers that a controller picks
BUILDS += [POOL | options for options in (
    dict(controller="linear", looped=".ooo"), dict(controller="mlp", halt="act"),
    dict(controller="lstm", attention="KL-A"), dict(route_by="first_token", looped="ooo."),
    dict(controller="memoryless", halt="stick_breaking", norms="R", loops=4),
    dict(controller="learned", attention="R", num_meta_tokens=2), dict(attn_softmax="ssmax", reinject=0.5),
    dict(controller="fixed"), dict(route_training="straight_through", step_loss="mean"),
    dict(route_training="anneal", anneal_steps=2, step_loss="mean"), dict(layer_balance_coef=0.1),
    dict(num_shared_experts=1, mlp_ratio=3.0, shared="conv"), dict(halt="act", route_by="first_token"))]  # fmt: skip
# presets, with another size; "told": one row has an expert to choose, the other one is only there to fill up the batch
SMALL = dict(vocab_size=VOCAB, eot_token=EOT, n_layer=4, n_embd=64, n_head=2, head_dim=16, window_size=16)
SHARED = dict(mlp_ratio=1.0, shared_dim=64, told=True)
BUILDS += [dict(preset=preset) | SMALL | changes for preset, changes in (
    ("cpu", dict(ngram_rows=128)), ("small", {}), ("100m", SHARED), ("100m-cpu", SHARED),
    ("speedrun", dict(n_layer=12)))]  # fmt: skip


def name_of(build: dict) -> str:
    if "preset" in build:
        return f"preset {build['preset']} {build['dtype']}"
    return " ".join(str(value) if field == "dtype" else f"{field}={value}" for field, value in build.items())


CASES = {name_of(build): build for build in (build | dict(dtype=dtype) for build in BUILDS for dtype in DTYPES)}


def modern(fields: dict) -> dict:
    """Fields of the old Config as the new one takes them."""
    fields = {field: value for field, value in fields.items() if field != "router_spread"}
    if fields.get("routed_scale", "auto") != "auto":
        fields["routed_scale"] = float(fields["routed_scale"])
    if set(fields.get("experts", "")) & set("*,"):
        fields["num_experts"] = sum(int(part.partition("*")[2] or 1) for part in fields["experts"].split(","))
    return fields


# -----------------------------------------------------------------------------
# One side: what a process does whose current folder is one of the two trees, so that `import model` means that tree's


def renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def digest(value) -> str:
    """Equal for equal bits, of a tensor or of a list of strings: 0 and -0 differ, a NaN equals itself."""
    if not torch.is_tensor(value):
        return repr(value)
    value = value.detach().contiguous()
    data = value.flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def makers(build: dict) -> dict:
    """Ways to build a case: "" or " (core)" -> (function that returns the model, class of its cache). Without zoo/
    there is one way alone."""
    import model

    zoo = importlib.import_module("zoo") if Path("zoo/__init__.py").exists() else None
    presets = getattr(zoo, "PRESETS", {}) | model.PRESETS
    fields = dataclasses.asdict(presets[build["preset"]]) if "preset" in build else TINY
    fields = fields | {field: value for field, value in build.items() if field not in ("preset", "told")}
    caches = [getattr(module, name, None) for module in (zoo, model) for name in ("KVCache", "Cache")]
    cache = next(filter(None, caches))
    if zoo is None:
        return {"": (lambda: model.GPT(model.Config(**fields)), cache)}
    fields = modern(fields)
    found = {"": (lambda: zoo.build(zoo.Config(**fields)), cache)}
    if hasattr(model, "build"):
        usual = {field.name: field.default for field in dataclasses.fields(zoo.Config)}
        core = {field.name for field in dataclasses.fields(model.Config)}
        chosen = {field: value for field, value in fields.items() if field in core or value != usual[field]}
        with contextlib.suppress(model.UserError):  # a value that only the zoo has
            core_names = fields.get("experts", "mlp") == "mlp" and not build.get("told")  # else other names or arguments
            if set(chosen) <= core and core_names:
                config = model.Config(**chosen)
                found[" (core)"] = (lambda: model.build(config), next(filter(None, caches[2:] + caches)))
    return found


def computed(make, cache_kind, build: dict, side: str):
    """Yields (key, value) of everything that is compared, in the order in which it is computed."""
    from train_muon import Muon

    new_name = renamed if side == "old" else str
    generator = torch.Generator().manual_seed(SEED)
    x_BT, y_BT = torch.randint(0, EOT, (2, 2, 24), generator=generator)
    x_BT[0, 9] = x_BT[1, 0] = EOT
    y_BT[1, 20] = -1
    net, told = make().train(), {}
    if build.get("told"):
        told = dict(expert_B=torch.tensor([1, -1]), real_B=torch.tensor([True, False]))
    parameters, kinds = {new_name(name): p for name, p in net.named_parameters()}, net.parameter_kinds()
    saved = set(net.state_dict())
    saved -= RETIRED_BUFFERS
    buffers = {new_name(name): buffer for name, buffer in net.named_buffers() if name in saved}
    yield "kinds of parameters", sorted(f"{new_name(name)}: {kind}" for name, kind in kinds.items())
    for name, value in (parameters | buffers).items():
        yield f"initial {name}", value
    with torch.no_grad():  # many parameters begin at zero, which would leave the gradients of others at zero
        for name, p in parameters.items():
            own = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.add_(torch.randn(p.shape, generator=own), alpha=0.2 if p.ndim < 2 else p.size(-1) ** -0.5)
    by_muon = lambda yes: [p for name, p in net.named_parameters() if (kinds[name] in ("matrix", "expert")) is yes]
    rates = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    optimizers = [torch.optim.AdamW(by_muon(False), **rates), Muon(by_muon(True), lr=0.02)]
    for step in range(3):
        net.set_step(SEED, step, 48 * step)
        _, loss, stats = net(x_BT, y_BT, **told)
        (loss + 0.1 * stats["domain_loss"] if told else loss).backward()
        yield f"step {step}: loss", loss
        for name, value in compared_stats(stats, build):
            yield f"step {step}: {name}", value
        for name, p in reversed(parameters.items()):  # as backward goes: the first difference is near its cause
            yield f"step {step}: gradient of {name}", ["none"] if p.grad is None else p.grad
        for optimizer in optimizers:
            optimizer.step()
        net.balance(stats["counts_LE"])
        for name, value in (parameters | buffers).items():
            yield f"step {step}: new {name}", value
        for name, p in parameters.items():
            for key, value in (optimizers[0].state.get(p) or optimizers[1].state.get(p, {})).items():
                yield f"step {step}: {key} of {name}", value
        net.zero_grad(set_to_none=True)
    net.eval().set_step(SEED, 3)
    with torch.no_grad():
        yield "evaluation: loss", net(x_BT, y_BT).loss
        logits, _, stats = net(x_BT)
        yield "evaluation: logits", logits
        for name, value in compared_stats(stats, build):
            yield f"evaluation: {name}", value
        if build.get("objective") == "masked":  # cannot continue a text
            return
        cache, pieces = cache_kind(net.config, 2, 24), (7, *[1] * 12, 5)
        decoded = [net(piece, cache=cache).logits for piece in x_BT.split(pieces, dim=1)]
        yield "decoded: logits", torch.cat(decoded, dim=1)
        yield "generated: ids", net.generate(x_BT[:, :5], 4, temperature=0.8, top_k=20, seed=SEED)


def compared_stats(stats: dict, build: dict):
    """Statistics under their new names, without those that one side alone returns."""
    for name, value in stats.items():
        name = RENAMED_STATS.get(name, name)
        needed = {"domain_loss": "told" in build, "depth/loops": build.get("depth", "stack") != "stack"}
        if needed.get(name, True):
            yield name, torch.as_tensor(value).float()


def model_results(side: str, asked: str, result: str):
    """asked: a file with {case: None, or the key whose value is wanted itself}. Writes {case: {key: digest}} and
    {(case, key): value} to another one."""
    asked, digests, values = torch.load(asked), {}, {}
    for case in dict.fromkeys(case.removesuffix(" (core)") for case in asked):
        try:
            ways = makers(CASES[case])
        except Exception as error:
            digests[case] = {"error": repr(error)}
            continue
        for suffix, (make, cache) in ways.items():
            found = digests[case + suffix] = {}
            wanted = {key for name, key in asked.items() if name.removesuffix(" (core)") == case}
            try:
                for key, value in computed(make, cache, CASES[case], side):
                    found[key] = digest(value)
                    if key in wanted:
                        values[case + suffix, key] = copy.deepcopy(value.detach() if torch.is_tensor(value) else value)
            except Exception as error:  # the other cases still run
                found["error"] = repr(error)
    torch.save((digests, values), result)


def write_data(folder: str):
    """Shards of documents in which four words follow each other at random."""
    import numpy as np

    import data

    random, folder = np.random.default_rng(0), Path(folder)
    words = lambda: "".join(random.choice(["alpha ", "beta ", "gamma ", "delta "], 40)).encode()
    document = lambda: np.array([256, *words()], np.uint16)
    folder.mkdir()
    data.write_shard(folder / "x_train_000001.bin", np.concatenate([document() for _ in range(500)]))
    data.write_shard(folder / "x_val_000000.bin", np.concatenate([document() for _ in range(40)]))
    meta = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256, "token_bytes": [1] * 256 + [0]}
    (folder / "meta.json").write_text(json.dumps(meta))


# -----------------------------------------------------------------------------
# Both sides at once

RUNNING = set()  # process groups that an end before time has to end


def run(tree: Path, *words):
    """A Python process in a tree; RuntimeError with the end of what it said if it fails."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=tree, env=environment, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    RUNNING.add(process)
    said = process.communicate()[0]
    RUNNING.discard(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} in {tree} failed:\n{said[-2000:]}")


def call(tree: Path, function: str, *words):
    """A function of this file in a process of its own, which imports modules of `tree`: its folder comes first."""
    start = "import sys; sys.path.append(sys.argv[1]); import same_bits; "
    run(tree, "-c", start + f"same_bits.{function}(*sys.argv[2:])", ROOT / "tests", *words)


def together(jobs: list, at_once: int) -> list:
    """The results of functions, so many of which run at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            raise


def differing(old: dict, new: dict) -> list[str]:
    return [key for key in old | new if old.get(key) != new.get(key)]


def difference(old, new) -> str:
    """In words, of two values of one key; None where one side has no such key."""
    if old is None or new is None:
        return "only in the old code" if new is None else "only in the new code"
    if not (torch.is_tensor(old) and torch.is_tensor(new)):
        old, new = (value if isinstance(value, list) else ["a tensor"] for value in (old, new))
        return next(f"{a} -> {b}" for a, b in itertools.zip_longest(old, new) if a != b)
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)}"
    apart = torch.where(old == new, 0.0, (old.double() - new.double()).abs()).max().item()
    values = f", {old.item()!r} -> {new.item()!r}" if old.numel() == 1 else ""
    return f"max abs difference {apart:.3g}{values}"


def report(case: str, old: dict, new: dict, values) -> bool:
    """Print a line of the table; True if all is equal. values: key -> both sides' values."""
    keys = differing(old, new)
    errors = [f"{side}: {found['error']}" for side, found in (("old", old), ("new", new)) if "error" in found]
    outcome = f"{keys[0]}: {difference(*values(keys[0]))}; {len(keys)} differ" if keys else "equal"
    print(f"{case:<110} {len(old | new):>5}  {'; '.join(errors) or outcome}", flush=True)
    return not keys and not errors


def compare_models(trees: dict, folder: Path, cases: list[str], at_once: int) -> bool:
    def results(asked: dict) -> dict:
        torch.save(asked, folder / "asked")
        results = {side: folder / f"{side}.result" for side in trees}
        job = lambda side: call(trees[side], "model_results", side, folder / "asked", results[side])
        together([functools.partial(job, side) for side in trees], at_once)
        return {side: torch.load(path) for side, path in results.items()}

    found = results(dict.fromkeys(cases))
    (old, _), (new, _) = found["old"], found["new"]
    pairs = {case: (old[case.removesuffix(" (core)")], new[case]) for case in new}
    first = {case: keys[0] for case, pair in pairs.items() if (keys := differing(*pair))}
    # digests do not say how far apart two tensors are, so what differs is computed again
    values = {side: kept for side, (_, kept) in results(first).items()} if first else {}
    equal = True
    for case, pair in pairs.items():
        both = lambda key: (values["old"].get((case.removesuffix(" (core)"), key)), values["new"].get((case, key)))
        equal &= report(case, *pair, both)
    core = sum(case.endswith(" (core)") for case in pairs)
    print(f"{len(pairs)} models, {core} of them from the new core alone, {len(first)} differ")
    return equal


# -----------------------------------------------------------------------------
# Whole runs

FLAGS = """--preset cpu --device cpu --experiment_name run --num_iterations 50 --pattern M --n_embd 64 --head_dim 32
           --ngram_rows 1024 --bucket_mb 0.1 --seq_len 256 --batch_tokens 2048 --micro_batch_tokens 512 --val_every 25
           --val_tokens 4096 --sample_tokens 8 --warmup_steps 1""".split()
LOOPED = "--depth loop --loops 2 --looped .oo. --halt act"
RUNS = {  # name -> script, ranks, further flags
    "run, 1 rank": ("train_muon.py", 1, ""),
    "run, 1 rank, resumed": ("train_muon.py", 1, "--checkpoint_every 25"),
    "run, 1 rank, adamw": ("train_adamw.py", 1, ""),
    "run, 1 rank, loop with act": ("train_zoo.py", 1, LOOPED),
    "run, 2 ranks": ("train_muon.py", 2, ""),
    "run, 2 ranks, expert_parallel 2": ("train_muon.py", 2, "--expert_parallel 2"),
    "run, 2 ranks, overlap false": ("train_muon.py", 2, "--overlap false"),
}
METRICS = ("train/loss", "train/balance_loss", "train/z_loss", "val/", "moe/", "depth/")  # the others follow from times


def run_results(tree: Path, side: str, name: str, folder: Path) -> dict:
    """Train; {key: value} of what it logged and saved."""
    script, ranks, flags = RUNS[name]
    script = script if (tree / script).exists() else "train_muon.py"  # the old code has no train_zoo.py
    out, new_name = folder / "runs" / side / re.sub(r"\W+", "_", name), renamed if side == "old" else str
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [*torchrun, script, *FLAGS, *flags.split(), "--data", folder / "data", "--out_dir", out]
    try:
        run(tree, *words)
        if name.endswith("resumed"):
            [last] = out.rglob("step_000050")  # the run goes on from the one before
            shutil.rmtree(last)
            run(tree, *words, "--resume")
    except RuntimeError as error:  # the other runs still run
        return {"error": [str(error)]}
    [log], found = out.rglob("metrics.jsonl"), {}
    for row in map(json.loads, log.read_text().splitlines()):
        for key in (key for key in row if key.startswith(METRICS)):
            found[f"step {row['step']}: {key}"] = torch.tensor(row[key], dtype=torch.float64)
    for path in sorted(out.rglob("rank*.pt")):
        for slab, tensors in torch.load(path, weights_only=True).items():
            for key, tensor in tensors.items() if slab not in RETIRED_BUFFERS else ():
                found[f"{path.parent.name}: {key} of {new_name(slab)}"] = tensor
    return found


def compare_runs(trees: dict, folder: Path, names: list[str], at_once: int) -> bool:
    call(trees["old"], "write_data", folder / "data")
    jobs = [functools.partial(run_results, trees[side], side, name, folder) for name in names for side in trees]
    found, equal = together(jobs, at_once), True
    for name, old, new in zip(names, found[::2], found[1::2]):
        digests = [{key: digest(value) for key, value in one.items()} for one in (old, new)]
        equal &= report(name, *digests, lambda key: (old.get(key), new.get(key)))
    return equal


# -----------------------------------------------------------------------------


@contextlib.contextmanager
def checked_out(base: str):
    """A temporary folder, and in it the tree of a commit."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, "worktree", *words], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        try:
            git("add", "--quiet", "--detach", tree, base)
            os.environ["TMPDIR"] = folder  # torchrun leaves folders there
            yield Path(folder), tree
        finally:
            if tree.exists():
                git("remove", "--force", tree)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="commit to compare the working tree with")
    parser.add_argument("--only", choices=("model", "runs"), help="one part instead of both")
    parser.add_argument("--builds", default="", metavar="SUBSTRING", help="only the cases whose name contains it")
    parser.add_argument("--cpu", type=int, default=2, metavar="N",
                        help="jobs at a time, each of one side: all its models, or a run (default: 2)")  # fmt: skip
    args = parser.parse_args()
    if not any(args.builds in name for name in CASES | RUNS):
        parser.error(f"no case has {args.builds!r} in its name")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that the worktree is removed
    equal = True
    with checked_out(args.base) as (folder, tree):
        for part, compare, names in (("model", compare_models, CASES), ("runs", compare_runs, RUNS)):
            names = [name for name in names if args.builds in name]
            if names and args.only in (None, part):
                began = time.monotonic()
                equal &= compare(dict(old=tree, new=ROOT), folder, names, args.cpu)
                print(f"part {part}: {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(0 if equal else "not the same bits")


if __name__ == "__main__":
    main()
