"""Several ranks: the same run at every number of ranks and of expert parts, bucket by bucket and bit by bit. gloo on
one CPU.

Each number of ranks is one torchrun that trains a list of tiny jobs under spies (worker.py); what they saw is compared
here with runs in this process and with one another."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_injection import INJECTIONS, ODD
from slow import all_but
from test_train import (  # noqa: F401  (fixtures are used by name)
    CONFIGS,
    LAYOUT_RUN,
    LAYOUT_RUNS,
    ROOT,
    assert_near,
    assert_near_series,
    assert_same_run,
    call,
    differing,
    first_gradients,
    flags,
    hyper,
    no_matmul_rate,
    once,
    series,
    shards,
    state_of,
    tiny_model,
    torchrun,
    train,
    training_rows,
    untimed,
    whole_batch,
)

import checkpoint
import model
import train_muon
from distributed import World, make_buckets
from model import GPT
from tools import cost
from train_adamw import ADAMW
from train_muon import MUON
from zoo.recipes import ZOO_MUON

STEPS = 30
KEPT = dict(checkpoint_every=10)  # worker.py keeps a copy of step 10
HALF = 6 * 32  # the first token of the second half of the batch


def job(recipe=MUON, copy=None, plant=None, **values) -> dict:
    name = "zoo" if recipe is ZOO_MUON else recipe.name
    return {
        "recipe": name,
        "copy": copy,
        "plant": plant,
        "half": HALF,
        "values": LAYOUT_RUNS[recipe.name] | {"bucket_mb": 0} | values,
    }


def resumed(source: str, **values) -> dict:
    """A job that goes on from step 10 of another one."""
    return job(copy=[f"{source}_kept"], resume=True, **KEPT, **values)


DEPTHS = {
    "depth2_loop": dict(depth="loop", loops=3, halt="act", halt_threshold=0.2, attention="KA", seed=4),
    "depth2_pool": dict(depth="routed", loops=3, identity_layers=1),
}
PLANTED = {f"plant{i}": plant for i, plant in enumerate(ODD)}
JOBS = {  # ranks -> name -> job; a job may resume what an earlier one left
    2: {
        "muon2": job(**KEPT),
        "muon2_again": job(**KEPT),
        "muon2_sync": job(**KEPT, overlap="false"),
        "muon2_one_bucket": job(bucket_mb=100),
        "muon2_micro": job(micro_batch_tokens=64),
        "adamw2": job(ADAMW),
        "muon2_parts2": job(expert_parallel=2, **KEPT),
        "muon2_parts2_sync": job(expert_parallel=2, overlap="false"),
        "muon2_bias": job(num_iterations=12, bias_update_factor=0.01),
        **{name: job(ZOO_MUON, num_iterations=8, **options) for name, options in DEPTHS.items()},
        "muon2_traced": job(num_iterations=3, plant="traced", compile="true"),
        "muon2_parts2_traced": job(num_iterations=3, plant="traced", compile="true", expert_parallel=2),
        "bf16_2": job(num_iterations=15, dtype="bf16", ns_dtype="bf16"),
        "bf16_2_parts2": job(num_iterations=15, dtype="bf16", ns_dtype="bf16", expert_parallel=2),
        "muon2_from2": resumed("muon2"),
        "muon2_parts2_from2": resumed("muon2", expert_parallel=2),
        **{name: job(plant=plant, num_iterations=8) for name, plant in PLANTED.items()},
        **{f"{name}_sync": job(plant=plant, num_iterations=8, overlap="false") for name, plant in PLANTED.items()},
        "plant0_parts2": job(plant=PLANTED["plant0"], num_iterations=8, expert_parallel=2),
        "plant1_parts2": job(plant=PLANTED["plant1"], num_iterations=8, expert_parallel=2),
    },
    3: {
        "muon3": job(),
        "adamw3": job(ADAMW),
        "muon3_from2": resumed("muon2"),
        "muon3_small": job(
            n_layer=1, value_embeds=0, num_experts=1, top_k=1, pattern="D", num_iterations=6, scalar_lr=0
        ),
    },
    4: {
        "muon4": job(),
        "muon4_sync": job(overlap="false"),
        "muon4_parts2": job(expert_parallel=2),
        "muon4_parts4": job(expert_parallel=4),
        "adamw4_parts2": job(ADAMW, expert_parallel=2),
        "muon4_from2": resumed("muon2"),
        "muon4_parts2_from2_parts2": resumed("muon2_parts2", expert_parallel=2),
        "hash4_parts4": job(router="hash", num_experts=8, num_iterations=1, expert_parallel=4),
    },
}


FAST = {"muon2", "muon2_sync", "muon2_parts2", *PLANTED, *(f"{name}_sync" for name in PLANTED)}


@pytest.fixture(scope="module")
def world(request, tmp_path_factory, shards):  # noqa: F811
    """ranks -> the folder in which the jobs of that many ranks ran, the jobs of FAST alone if no slow test is asked for.
    Two ranks come first, as other jobs resume their checkpoints."""
    out = tmp_path_factory.mktemp("ranks")
    every = any(item.get_closest_marker("slow") for item in request.session.items)

    @once
    def get(ranks: int) -> Path:
        if ranks != 2:
            get(2)
        words = lambda name, one: flags(
            train_recipe(one), data=shards, out_dir=out, experiment_name=name, **one["values"]
        )
        copies = lambda name, one: one["copy"] and [str(out / one["copy"][0]), str(out / name)]
        listed = {
            name: one | {"words": words(name, one), "copy": copies(name, one)}
            for name, one in JOBS[ranks].items()
            if every or name in FAST
        }
        (out / f"jobs{ranks}.json").write_text(json.dumps(listed))
        done = torchrun(ranks, ROOT / "tests/core/worker.py", out, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    return get


def train_recipe(one: dict):
    return {"muon": MUON, "adamw": ADAMW, "zoo": ZOO_MUON}[one["recipe"]]


class Seen:
    """A job: its run's folder, what each rank saw, and the first step's gradients of all owners together."""

    def __init__(self, world, name: str):  # noqa: F811
        [self.ranks] = [ranks for ranks, jobs in JOBS.items() if name in jobs]
        out = world(self.ranks)
        self.run, self.gradients = out / name, {}
        self.seen = [json.loads((out / f"{name}.rank{rank}.json").read_text()) for rank in range(self.ranks)]
        for rank in range(self.ranks):
            mine = torch.load(out / f"{name}.rank{rank}.pt")
            assert not mine.keys() & self.gradients.keys(), "two ranks own the same slab"
            self.gradients |= mine


EQUAL = [
    name
    for jobs in JOBS.values()
    for name in jobs
    if re.fullmatch(r"(muon|adamw)\d(_parts\d|_micro|_one_bucket)?", name)
]


@pytest.mark.parametrize("name", all_but(FAST, EQUAL))
def test_any_number_of_ranks_trains_the_run_of_one(name, world, whole_batch):  # noqa: F811
    recipe = ADAMW if name.startswith("adamw") else MUON
    job = Seen(world, name)
    assert_same_run(job.run, job.gradients, whole_batch(recipe))


@pytest.mark.parametrize("name", all_but(FAST, [name for jobs in JOBS.values() for name in jobs]))
def test_ranks_hold_bit_identical_copies_after_every_step(name, world):
    job, [(_, one)] = Seen(world, name), [(ranks, jobs[name]) for ranks, jobs in JOBS.items() if name in jobs]
    steps = one["values"]["num_iterations"] - 10 * ("_from2" in name)
    assert [(seen["steps"], seen["apart"]) for seen in job.seen] == [(steps, [])] * job.ranks


SYNCHRONOUS = [name for jobs in JOBS.values() for name in jobs if name.endswith("_sync")]


@pytest.mark.parametrize("name", all_but(FAST, SYNCHRONOUS))
def test_overlapped_equals_synchronous_bit_by_bit(name, world):
    sync, overlapped = Seen(world, name), Seen(world, name.removesuffix("_sync"))
    assert differing(state_of(sync.run), state_of(overlapped.run)) == []
    assert untimed(sync.run) == untimed(overlapped.run)
    assert all(torch.equal(gradient, overlapped.gradients[slab]) for slab, gradient in sync.gradients.items())
    for one, other in zip(sync.seen, overlapped.seen):
        assert one["order"] == other["order"] and len(one["order"]) > 3


@pytest.mark.slow
def test_two_runs_of_one_seed_are_the_same_bit_by_bit(world):
    one, two = Seen(world, "muon2"), Seen(world, "muon2_again")
    assert differing(state_of(one.run), state_of(two.run)) == []
    assert untimed(one.run) == untimed(two.run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16_2", "bf16_2_parts2"])
def test_in_bf16_losses_stay_within_a_hundredth(name, world, shards, tmp_path):  # noqa: F811
    run = train(tmp_path, data=shards, **JOBS[2]["bf16_2"]["values"])
    assert_near_series(series(Seen(world, name).run, "train/loss"), series(run, "train/loss"), 1e-2)


# -----------------------------------------------------------------------------
# When buckets leave, what they weigh, among whom they travel


@pytest.mark.parametrize("name", all_but(FAST, ["muon2", "muon3", "muon4_parts2"]))
def test_the_first_bucket_leaves_before_half_of_backward_is_done(name, world):
    for seen in Seen(world, name).seen:
        assert len(seen["first_send"]) == STEPS and seen["parameters"] > 10
        assert all(0 < there < seen["parameters"] / 2 for there in seen["first_send"]), seen["first_send"]


@pytest.mark.parametrize("name", all_but(FAST, ["muon2_sync", "muon4_sync"]))
def test_without_overlap_nothing_leaves_before_the_end_of_backward(name, world):
    for seen in Seen(world, name).seen:
        assert all(there == 0 for there in seen["first_send"])  # no hook was asked


@pytest.mark.parametrize("name", all_but(FAST, ["muon2", "muon3", "muon4", "muon4_parts2", "muon4_parts4"]))
def test_buckets_leave_in_the_planned_order_on_every_rank(name, world):
    job = Seen(world, name)
    config, hp = parsed(name)
    buckets = make_buckets(config, job.ranks, hp.expert_parallel, hp.bucket_mb)
    for rank, seen in enumerate(job.seen):
        assert seen["order"] == [bucket.slabs[0].name for bucket in buckets if rank in bucket.ranks]


def parsed(name: str):
    [one] = [jobs[name] for jobs in JOBS.values() if name in jobs]
    values = one["values"] | dict(resume=None, vocab_size=257, eot_token=256)  # a run takes these two from its data
    config, hp, _ = train_muon.parse(train_recipe(one), flags(train_recipe(one), experiment_name=name, **values))
    return config, hp


PLANNED = [
    "muon2",
    "muon2_one_bucket",
    "adamw2",
    "muon2_parts2",
    "muon3",
    "muon4",
    "muon4_parts2",
    "muon4_parts4",
    "hash4_parts4",
]


@pytest.mark.parametrize("name", all_but(FAST, PLANNED))
def test_the_plan_predicts_the_bytes_that_are_sent(name, world):
    job, (config, hp) = Seen(world, name), parsed(name)
    plan = cost.plan(config, hp, MUON, job.ranks)
    sent = [seen["bytes"]["reduce_scatter"] + seen["bytes"]["all_gather"] for seen in job.seen]
    assert max(sent) == plan["sent_bytes"]
    if hp.expert_parallel == 1:
        assert len(set(sent)) == 1 and plan["all_reduce_bytes"] <= sent[0] <= 1.6 * plan["all_reduce_bytes"]
    rows = sum(seen["bytes"]["all_to_all"] for seen in job.seen) / job.ranks
    assert rows == pytest.approx(plan["rows_bytes"], rel=0.02 if name.startswith("hash") else 0.25)


@pytest.mark.slow
def test_the_plan_predicts_the_optimizer_s_memory(world):
    for name in ("muon2", "muon3", "adamw2", "muon4_parts2"):
        (config, hp), job = parsed(name), Seen(world, name)
        recipe = ADAMW if name.startswith("adamw") else MUON
        folder = checkpoint.latest_checkpoint(job.run / "checkpoint")
        held = []
        for rank in range(job.ranks):
            slabs = torch.load(folder / f"rank{rank}.pt", weights_only=True)
            held.append(
                sum(t.nbytes for slab in slabs.values() for key, t in slab.items() if key not in ("value", "step"))
            )
        plan = cost.plan(config, hp, recipe, job.ranks)
        assert max(held) == plan["optimizer_bytes"] and sum(held) == plan["optimizer_bytes_total"]


def test_newton_schulz_s_flops_are_counted_by_torch_too():
    from torch.utils.flop_counter import FlopCounterMode

    config = CONFIGS["tiny"]
    matrices = [
        p for name, p in GPT(config).named_parameters() if model.parameter_rule(name).kind in ("matrix", "expert")
    ]
    with FlopCounterMode(display=False) as counter:
        for p in matrices:
            train_muon.newton_schulz(torch.randn(p.shape))
    assert cost.plan(config, hyper(MUON), MUON, 1)["newton_schulz_total"] == counter.get_total_flops()


def test_the_plan_prints_without_data_or_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("ranks were asked for"))
    monkeypatch.setenv("RANK", "0")
    words = ["--preset", "speedrun", "--world_size", "8", "--plan", "--data", "nowhere"]
    status, out, err = call(lambda: train_muon.main(MUON), words)
    assert status == 0 and err == ""
    for label in ("sent per step", "padding", "optimizer state", "Newton-Schulz", "forward + backward"):
        assert label in out
    assert "refused" not in out
    status, out, err = call(lambda: train_muon.main(MUON), [*words, "--world_size", "16"])
    assert status == 0 and "a run is refused: its 8 rows per step do not divide" in out
    status, out, err = call(lambda: train_muon.main(MUON), [*words, "--world_size", "0"])
    assert status != 0 and "world_size" in err


@pytest.mark.slow
def test_an_expert_travels_only_among_the_ranks_that_hold_it(world):
    for name, parts in (("muon4_parts2", 2), ("muon4_parts4", 4), ("muon2_parts2", 2), ("muon4", 1)):
        job, experts = Seen(world, name), 4
        owned = {}
        for rank, seen in enumerate(job.seen):
            for slab, ranks in seen["expert_ranks"]:
                owned[slab] = rank
                part = int(slab.rpartition("[")[2][:-1]) // (experts // parts)
                holders = list(range(part, job.ranks, parts))
                assert rank in holders and ranks == (holders if len(holders) > 1 else []), (slab, ranks)
        assert len(owned) == 2 * 2 * experts


@pytest.mark.parametrize("parts", [2, 4])
def test_ranks_hold_only_their_experts_and_start_from_the_same_values(parts):
    whole = dict(tiny_model().init_weights(3).named_parameters())
    for rank in range(4):
        part = rank % parts
        net = GPT(CONFIGS["tiny"], World(rank, 4, torch.device("cpu"), parts).expert_ranks).init_weights(3)
        for name, p in net.named_parameters():
            here = slice(part * 4 // parts, (part + 1) * 4 // parts) if ".experts." in name else slice(None)
            if name in whole:
                assert torch.equal(p, whole[name][here]), name
        assert net.blocks[0].ffn.experts.up.shape[0] == 4 // parts


# -----------------------------------------------------------------------------
# Odd gradients and odd loads


@pytest.mark.parametrize("name", all_but(FAST, [*PLANTED, "plant0_parts2", "plant1_parts2"]))
def test_what_is_missing_on_some_ranks_counts_as_zero(name, world, shards, tmp_path, monkeypatch):  # noqa: F811
    """Two ranks against one with two micro-batches, the same oddity planted into the second half of the batch."""
    gradients, plant = {}, PLANTED[name.partition("_")[0]]
    INJECTIONS[plant](monkeypatch, HALF)
    first_gradients(monkeypatch, gradients)
    run = train(tmp_path, data=shards, **job(num_iterations=8, micro_batch_tokens=HALF)["values"])
    two = Seen(world, name)
    assert_same_run(two.run, two.gradients, (run, gradients))


def test_an_expert_that_no_rank_uses_stands_still(world):
    job = Seen(world, "plant1")
    assert all(not gradient.any() for slab, gradient in job.gradients.items() if re.search(r"experts.*\[2\]", slab))
    loads = np.array([load for _, load in series(job.run, "moe/load")])
    assert (loads[:, :, 2] == 0).all() and np.allclose(loads.sum(-1), 1)
    net, start = (
        checkpoint.load_model_from_run(job.run / "checkpoint")[0],
        tiny_model().init_weights(LAYOUT_RUNS["muon"]["seed"]),
    )
    assert torch.equal(net.blocks[0].ffn.experts.up[2], start.blocks[0].ffn.experts.up[2])
    assert not torch.equal(net.blocks[0].ffn.experts.up[1], start.blocks[0].ffn.experts.up[1])


@pytest.mark.slow
def test_more_ranks_than_matrices(world, shards, tmp_path):  # noqa: F811
    """A dense layer has six matrices, three of them in QKV; with three ranks no bucket divides evenly."""
    values = JOBS[3]["muon3_small"]["values"]
    run, job = train(tmp_path, data=shards, **values), Seen(world, "muon3_small")
    assert_near(state_of(job.run), state_of(run), 1e-4)
    config, hp = parsed("muon3_small")
    owners = {
        owner
        for bucket in make_buckets(config, 16)
        for slab, owner in zip(bucket.slabs, bucket.owners)
        if slab.is_matrix
    }
    assert len(owners) == 6
    idle = min(set(range(16)) - owners)
    exchange = train_muon.Exchange(GPT(config), World(idle, 16, torch.device("cpu")))
    assert not any(
        isinstance(o, train_muon.Muon) for t in exchange.transfers for o in MUON.make_optimizers(t.owned_by_kind(), hp)
    )


# -----------------------------------------------------------------------------
# Resuming at another number of ranks and of expert parts


RESUMED = [name for jobs in JOBS.values() for name in jobs if "_from2" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_of_two_ranks_goes_on_anywhere(name, world, whole_batch):  # noqa: F811
    job, straight = Seen(world, name), Seen(world, "muon2_parts2" if name.endswith("_parts2") else "muon2")
    assert "the run continues from step 10" in (job.run / "run.log").read_text()
    assert [row["step"] for row in training_rows(job.run)] == list(range(11, STEPS + 1))
    tail = lambda run, key: [(step, value) for step, value in series(run, key) if step > 10]
    for key in ("train/loss", "val/loss"):
        assert_near_series(tail(job.run, key), tail(straight.run, key), 1e-5)
    assert_near(state_of(job.run), state_of(straight.run), 1e-4)
    assert (
        len(json.loads((checkpoint.latest_checkpoint(job.run / "checkpoint") / "manifest.json").read_text())["files"])
        == job.ranks
    )


@pytest.mark.slow
def test_at_the_same_number_of_ranks_it_goes_on_bit_by_bit(world):
    job, straight = Seen(world, "muon2_from2"), Seen(world, "muon2")
    assert differing(state_of(job.run), state_of(straight.run)) == []
    later = [row for row in untimed(straight.run) if row["step"] > 10 and row.get("event") != "end"]
    assert [row for row in untimed(job.run) if row.get("event") != "end"] == later


@pytest.mark.parametrize("source", ["muon2", "muon2_parts2"])
def test_a_checkpoint_of_two_ranks_goes_on_alone(source, world, shards, tmp_path):  # noqa: F811
    out = world(2)
    shutil.copytree(out / f"{source}_kept", tmp_path / "muon")
    run = train(tmp_path, data=shards, resume=True, **LAYOUT_RUNS["muon"] | KEPT)
    straight = Seen(world, source).run
    assert_near_series(series(run, "train/loss"), [(s, v) for s, v in series(straight, "train/loss") if s > 10], 1e-5)
    assert_near(state_of(run), state_of(straight), 1e-4)


@pytest.mark.slow
def test_one_rank_s_checkpoint_is_continued_by_three(shards, tmp_path, whole_batch):  # noqa: F811
    run, whole = Path(shutil.copytree(whole_batch(MUON)[0], tmp_path / "muon")), whole_batch(MUON)[0]
    shutil.rmtree(run / "checkpoint/step_000030")
    done = torchrun(
        3, ROOT / "train_muon.py", *flags(MUON, data=shards, out_dir=tmp_path, resume=True, **LAYOUT_RUNS["muon"])
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the run continues from step 24" in (run / "run.log").read_text()
    assert_near_series(series(run, "train/loss"), series(whole, "train/loss"), 1e-5)
    assert_near(state_of(run), state_of(whole), 1e-4)


# -----------------------------------------------------------------------------
# Several hosts: two agents that meet on the loopback, and two hosts in network namespaces


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_agent(words, endpoint: str, prefix=(), extra=(), **env) -> subprocess.Popen:
    """One host's torchrun, as the README prints it, with one rank."""
    command = [
        *prefix,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        "--rdzv-id=7",
        *extra,
        str(ROOT / "train_muon.py"),
        *map(str, words),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | env,
    )


def finish_agents(agents: list[subprocess.Popen], timeout=100):
    try:
        for agent in agents:
            out, _ = agent.communicate(timeout=timeout)
            assert agent.returncode == 0, out[-4000:]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_agents_on_the_loopback_train_the_run_of_one(shards, tmp_path, whole_batch):  # noqa: F811
    words = flags(MUON, data=shards, out_dir=tmp_path, **LAYOUT_RUNS["muon"])
    endpoint = f"127.0.0.1:{free_port()}"
    finish_agents([start_agent(words, endpoint) for _ in range(2)])
    assert_near_series(series(tmp_path / "muon", "train/loss"), series(whole_batch(MUON)[0], "train/loss"), 1e-5)
    assert_near(state_of(tmp_path / "muon"), state_of(whole_batch(MUON)[0]), 1e-4)
    assert json.loads((tmp_path / "muon/config.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_host_that_loses_its_rank_is_joined_by_the_other_one_anew(shards, tmp_path):  # noqa: F811
    """Each agent counts its own restarts alone, and the store still holds what the dead left there."""
    words = flags(
        MUON, data=shards, out_dir=tmp_path, **LAYOUT_RUNS["muon"] | dict(num_iterations=200, checkpoint_every=20)
    )
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [start_agent(words, endpoint, extra=["--max-restarts=2"]) for _ in range(2)]
    try:
        wait_until(lambda: list((tmp_path / "muon/checkpoint").glob("step_??????")), agents)
        [worker] = Path(f"/proc/{agents[0].pid}/task/{agents[0].pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
    finally:
        finish_agents(agents)
    assert "the run continues from step" in (tmp_path / "muon/run.log").read_text()
    assert [step for step, _ in series(tmp_path / "muon", "train/loss")] == list(range(1, 201))


def wait_until(there, agents, seconds=60):
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends and all(agent.poll() is None for agent in agents), "the run came to nothing"
        time.sleep(0.05)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: (name, address) of each. Skips where the system does not allow them."""
    hosts = [(f"nanomoe{i}-{os.getpid()}", f"10.77.0.{i + 1}") for i in range(2)]
    ends = [f"nm{i}-{os.getpid() % 100000}" for i in range(2)]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        steps = [("netns", "add", name) for name, _ in hosts] + [
            ("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        ]
        for (name, address), end in zip(hosts, ends):
            inside = ("-n", name)
            steps += [
                ("link", "set", end, "netns", name),
                (*inside, "addr", "add", f"{address}/24", "dev", end),
                (*inside, "link", "set", end, "up"),
                (*inside, "link", "set", "lo", "up"),
            ]
        for step in steps:
            try:
                done = ip(*step)
            except FileNotFoundError:
                pytest.skip("no `ip` command here")
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
        yield [(*host, end) for host, end in zip(hosts, ends)]
    finally:
        with contextlib.suppress(FileNotFoundError):
            for name, _ in hosts:
                ip("netns", "del", name)


def received_bytes(host: str, end: str) -> int:
    words = ["ip", "netns", "exec", host, "cat", f"/sys/class/net/{end}/statistics/rx_bytes"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_two_hosts_in_network_namespaces_train_the_run_of_one(two_hosts, shards, tmp_path, whole_batch):  # noqa: F811
    words = flags(MUON, data=shards, out_dir=tmp_path, expert_parallel=2, **LAYOUT_RUNS["muon"])
    endpoint = f"{two_hosts[0][1]}:29400"
    agents = []
    for i, (name, address, end) in enumerate(two_hosts):  # both have this machine's name, so addresses are given
        extra = (f"--local-addr={address}", f"--rdzv-conf=is_host={str(i == 0).lower()}")
        agents.append(start_agent(words, endpoint, ("ip", "netns", "exec", name), extra, GLOO_SOCKET_IFNAME=end))
    finish_agents(agents)
    assert_near_series(series(tmp_path / "muon", "train/loss"), series(whole_batch(MUON)[0], "train/loss"), 1e-5)
    assert_near(state_of(tmp_path / "muon"), state_of(whole_batch(MUON)[0]), 1e-4)
    config, hp, _ = train_muon.parse(MUON, [*words, "--vocab_size=257", "--eot_token=256"])  # of the data
    plan = cost.plan(config, hp, MUON, 2)
    least = LAYOUT_RUNS["muon"]["num_iterations"] * (plan["sent_bytes"] + plan["rows_bytes"])
    assert received_bytes(two_hosts[1][0], two_hosts[1][2]) > least  # it all went over the cable


# -----------------------------------------------------------------------------
# Checkpoints in the background


def test_training_goes_on_while_a_checkpoint_is_written(shards, tmp_path, monkeypatch):  # noqa: F811
    """The writer of step 3 is held until three more steps are done."""
    write, step, done, held = checkpoint.write_checkpoint, train_muon.train_step, threading.Event(), []

    def slow_write(folder, number, *words):
        if number == 3:
            held.append(done.wait(60))
        return write(folder, number, *words)

    def counting_step(*words):
        row = step(*words)
        if words[2] == 5:
            assert not (tmp_path / "muon/checkpoint/step_000003").exists()
            done.set()
        return row

    straight = train(tmp_path / "straight", data=shards, **LAYOUT_RUN | dict(num_iterations=6, checkpoint_every=3))
    monkeypatch.setattr(checkpoint, "write_checkpoint", slow_write)
    monkeypatch.setattr(train_muon, "train_step", counting_step)
    run = train(tmp_path, data=shards, **LAYOUT_RUN | dict(num_iterations=6, checkpoint_every=3))
    assert held == [True]
    for name in ("step_000003", "step_000006"):  # what was saved is what was there when it was due
        saved, expected = (checkpoint.read_checkpoint(folder / "checkpoint" / name)[1] for folder in (run, straight))
        assert all(torch.equal(saved[slab][key], expected[slab][key]) for slab in expected for key in expected[slab])
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["step_000003", "step_000006"]


@pytest.mark.slow
def test_the_selection_bias_moves_alike_on_one_rank_and_on_two(world, shards, tmp_path):  # noqa: F811
    """Its update is a sign, so an expert with exactly its share must not go up on one layout and stay on another."""
    run, job = train(tmp_path, data=shards, **JOBS[2]["muon2_bias"]["values"]), Seen(world, "muon2_bias")
    biases = [state_of(folder)["bias_LE/value"] for folder in (run, job.run)]
    assert torch.equal(*biases) and biases[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHS)
def test_loops_and_pools_train_on_two_ranks_as_on_one(name, world, shards, tmp_path):  # noqa: F811
    run, job = train(tmp_path, ZOO_MUON, data=shards, **JOBS[2][name]["values"]), Seen(world, name)
    assert_near_series(series(job.run, "train/loss"), series(run, "train/loss"), 1e-5)
    loops = [count for _, count in series(job.run, "depth/loops")]
    assert_near_series(series(job.run, "depth/loops"), series(run, "depth/loops"), 1e-5)
    assert all(0 < count <= 3 for count in loops) and (name != "depth2_loop" or loops[0] == 2)


@pytest.mark.slow
def test_compiled_blocks_hand_over_their_gradients_one_by_one(world):
    """Each compiled block is one node of the backward graph; the first buckets leave between two of them, without and
    with an exchange of rows."""
    for name in ("muon2_traced", "muon2_parts2_traced"):
        job = Seen(world, name)
        assert "; compiled" in (job.run / "run.log").read_text()
        assert_near_series(series(job.run, "train/loss"), series(Seen(world, "muon2").run, "train/loss")[:3], 1e-5)
        for seen in job.seen:
            assert all(0 < there < seen["parameters"] / 2 for there in seen["first_send"]), seen["first_send"]
