"""benchmarks/scaling.py: its formulas by hand on tiny models, what must hold of any machine, its memory against the
tensors that training allocates, one prediction against a measured run, and the script itself. CPU, no network, seconds:
`pytest tests/test_scaling.py`."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import distributed  # noqa: E402
import model  # noqa: E402
import train_muon  # noqa: E402
from benchmarks import scaling  # noqa: E402
from benchmarks.scaling import Leg, predict, ring_seconds, rows_seconds, two_clocks  # noqa: E402
from distributed import World  # noqa: E402
from model import GPT, Config  # noqa: E402
from tools.cost import activation_bytes  # noqa: E402
from train_muon import MUON, Exchange, MuonConfig  # noqa: E402

CPU = torch.device("cpu")
TINY = dict(vocab_size=257, eot_token=256, n_layer=2, n_embd=32, n_head=1, head_dim=32, value_embeds=1, window_size=64)
DENSE = Config(**TINY, pattern="D", num_experts=1, top_k=1)
SPARSE = Config(**TINY, num_experts=8, top_k=2)
WORLDS = [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (8, 4), (8, 8)]  # ranks, of which so many share the experts


def flags(*words, **values) -> scaling.argparse.Namespace:
    return scaling.parse(
        [*words, *itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in values.items())]
    )


def machine(**changes) -> scaling.Machine:
    return dataclasses.replace(flags().machine, **changes)


# -----------------------------------------------------------------------------
# By hand


def test_a_ring_inside_a_node_is_its_hops_and_its_bytes():
    fast = machine(nvlink=1000.0, network=1.0, link_fraction=0.5, base_latency=3.0, nvlink_hop=0.25, network_hop=99.0)
    assert ring_seconds((0, 1, 2, 3), 50, fast) == 3 + 3 * 0.25 + 4 * 50 * 3 / 500
    assert ring_seconds((5,), 50, fast) == 0


def test_a_ring_over_nodes_leaves_through_as_many_adapters_as_it_has_ranks_there():
    slow = machine(
        nvlink=1000.0,
        network=10.0,
        link_fraction=1.0,
        base_latency=0.0,
        nvlink_hop=1.0,
        network_hop=5.0,
        gpus_per_node=4,
    )
    assert ring_seconds(tuple(range(8)), 10, slow) == 6 * 1 + 1 * 5 + 4 * 10 * 7 / (4 * 10)
    assert ring_seconds((0, 4), 10, slow) == 5 + 4 * 10 / 10
    wide = dataclasses.replace(slow, network=900.0)  # four adapters would carry more than NVLink brings to them
    assert ring_seconds(tuple(range(8)), 10, wide) == 6 * 1 + 1 * 5 + 4 * 10 * 7 / 1000


def test_rows_go_near_and_far_at_once_and_wait_for_the_busiest_rank():
    links = machine(
        nvlink=100.0,
        network=10.0,
        link_fraction=0.5,
        base_latency=1.0,
        nvlink_hop=2.0,
        network_hop=3.0,
        gpus_per_node=4,
        imbalance=1.5,
    )
    assert rows_seconds(600, 7, 1, links) == 0
    assert rows_seconds(600, 7, 4, links) == 7 * (1 + 2) + 1.5 * 600 / 50
    assert rows_seconds(700, 7, 8, links) == 7 * (1 + 3) + 1.5 * 400 / 5  # four of the seven others are far


def test_two_clocks_by_hand():
    leg = Leg(ready=0.5, ring=3.0, pack=0.0, give=0.0, unpack=0.0, update=1.0)
    # gradients 2-5 and 5-8 while backward runs to 4; updates 5-6 and 8-9; values 8-11 and 11-14
    assert two_clocks([leg, leg._replace(ready=1.0)], 4.0) == 14
    # alone, without a link: backward and update
    assert two_clocks([leg._replace(ring=0.0)], 4.0) == 5
    # copies: one before it leaves, one before its value leaves, one at the end
    assert (
        two_clocks([Leg(ready=1.0, ring=3.0, pack=0.5, give=0.25, unpack=0.125, update=1.0)], 4.0)
        == 4 + 0.5 + 3 + 1 + 0.25 + 3 + 0.125
    )


def test_a_step_of_two_ranks_by_hand():
    rows, seq_len = 3, 64
    args = flags(
        "--bucket_mb",
        "1000",
        seq_len=seq_len,
        batch_tokens=2 * rows * seq_len,
        tokens_per_gpu=seq_len,
        micro_batch_tokens=rows * seq_len,
        peak=1e12,
        efficiency=0.5,
        ns_efficiency=0.25,
        hbm=1e30,
        nvlink=1e9,
        link_fraction=0.5,
        base_latency=1e-3,
        nvlink_hop=1e-4,
        reserve=1000,
    )
    row = predict(DENSE, 2, 1, args.batch_tokens, args)
    (bucket,) = distributed.make_buckets(DENSE, 2, 1, 1000)  # one: it is ready when backward ends, so nothing hides
    work, state = [0, 0], [0, 0]
    for slab, owner in zip(bucket.slabs, bucket.owners):
        rows_by_columns = slab.kind == "matrix"
        state[owner] += 4 * slab.numel * (1 if rows_by_columns else 2)
        work[owner] += rows_by_columns * 10 * 32**2 * (2 * slab.numel // 32 + 32)
    ring = 1e-3 + 1e-4 + 4 * bucket.part / 0.5e9
    compute = model.flops_per_token(DENSE, seq_len) * rows * seq_len / 0.5e12
    assert row["seconds"]["compute"] == pytest.approx(compute, rel=1e-6)
    assert row["seconds"]["newton_schulz"] == pytest.approx(max(work) / (1e12 * 0.25 * 32 / 768), rel=1e-6)
    assert row["seconds"]["waiting"] == pytest.approx(2 * ring, rel=1e-6)
    assert row["step_seconds"] == pytest.approx(compute + row["seconds"]["newton_schulz"] + 2 * ring, rel=1e-6)
    assert row["exposed"] == pytest.approx(2 * ring / row["step_seconds"], rel=1e-6)
    assert row["mfu"] == pytest.approx(compute * 0.5 / row["step_seconds"], rel=1e-6)
    assert row["sent_bytes"] == 2 * 4 * bucket.part
    numel = sum(p.numel() for p in GPT(DENSE).parameters())
    kept = activation_bytes(DENSE, rows * seq_len)  # as one row: attention's T x T tensors count nothing
    assert row["memory"] == {
        "weights": 4 * numel,
        "gradients": 4 * numel,
        "buffers": 3 * 4 * bucket.part,
        "optimizer": max(state),
        "activations": kept,
        "temporaries": 0,
        "reserve": 1000,
    }
    assert row["memory_bytes"] == sum(row["memory"].values())
    assert row["micro_batches"] == 1 and row["fits"]


def test_a_bucket_is_updated_when_its_slowest_owner_is_done():
    slow = machine(hbm=1e30, peak=1e12, efficiency=1.0, ns_efficiency=1.0)
    work, done = [0] * 5, []
    for bucket in distributed.make_buckets(SPARSE, 5, 1, 0):
        for slab, owner in zip(bucket.slabs, bucket.owners):
            work[owner] += MUON.newton_schulz * slab.cost * (slab.kind in ("matrix", "expert")) / (1e12 * 32 / 768)
        done.append(max(work))
    legs, newton_schulz, _ = scaling.make_legs(SPARSE, 5, 1, 64, 0, slow)
    assert list(itertools.accumulate(leg.update for leg in legs)) == pytest.approx(done) and len(set(done)) > 2
    assert newton_schulz == pytest.approx(done[-1])


def test_gradients_are_ready_in_the_order_and_at_the_pace_of_backward():
    legs = scaling.make_legs(DENSE, 2, 1, 64, 0, machine()).legs
    head, mix, layer = 320 * 32, 2 * 32, (4 + 8) * 32 * 32  # FLOPs go by the weights of matmuls
    all_of_it = head + mix + 2 * layer
    ready = list(dict.fromkeys(round(leg.ready, 9) for leg in legs))
    assert ready == [round(at / all_of_it, 9) for at in (head, head + mix + layer, all_of_it)]


def test_the_rank_that_sends_most_is_found():
    slab = distributed.Slab("x", "matrix", 10, 1)
    bucket = lambda *ranks: distributed.Bucket(ranks, (slab,), ranks[:1])
    assert scaling.busiest_rank([bucket(0, 1), bucket(1, 2), bucket(3)]) == 1
    assert scaling.busiest_rank([bucket(0, 1), bucket(2, 3)]) == 0


def test_memory_passes_by_hand():
    slow, micro_batches = machine(hbm=1e6, hbm_fraction=0.5), 3
    (bucket,) = distributed.make_buckets(DENSE, 2, 1, 1000)
    numel, busiest = sum(slab.numel for slab in bucket.slabs), [0, 0]
    for slab, owner in zip(bucket.slabs, bucket.owners):
        adamw = 4 * (4 + 3)  # reads weight, gradient and two moments; writes the weight and the moments
        busiest[owner] += slab.numel * (scaling.MUON_PASSES if slab.kind == "matrix" else adamw)
    casts = numel * ((4 + 2) + (2 + 4)) * micro_batches  # weights to bf16, gradients to fp32
    sums = numel * (4 + 4 + 4) * (micro_batches - 1)  # in every micro-batch but the first
    copies = numel * 2 * (4 + 4)  # gradients into the bucket, values out of it
    seconds = scaling.seconds_of_step(DENSE, 2, 1, micro_batches, micro_batches, 64, 1000, slow)
    assert seconds["memory"] == pytest.approx((casts + sums + copies + max(busiest)) / 0.5e6)
    assert scaling.make_legs(DENSE, 1, 1, 64, 1000, slow).legs[0]._replace(update=0) == (
        1,
        0,
        0,
        0,
        0,
        0,
    )  # alone, nothing is copied


def test_only_the_last_micro_batch_hides_gradients():
    args = flags(seq_len=64, batch_tokens=2 * 8 * 64, tokens_per_gpu=64, bucket_mb=0)
    slow = machine(peak=1e10, nvlink=1e5)  # backward takes about as long as the link
    legs = scaling.make_legs(DENSE, 2, 1, 64, 0, slow).legs
    busy = sum(leg.pack + leg.give + leg.unpack + leg.update for leg in legs)
    for micro_batches in (1, 4):
        seconds = scaling.seconds_of_step(DENSE, 2, 1, 400, micro_batches, 64, 0, slow)
        backward = 2 / 3 * seconds["compute"] / micro_batches  # two of three passes
        assert seconds["waiting"] == pytest.approx(two_clocks(legs, backward) - backward - busy)
        assert seconds["waiting"] != pytest.approx(two_clocks(legs, backward / 2) - backward / 2 - busy, rel=0.01)
    waiting = []
    for tokens in (8 * 64, 4 * 64, 64):
        args.micro_batch_tokens = tokens
        row = predict(DENSE, 2, 1, args.batch_tokens, args)
        assert row["micro_batches"] == 8 * 64 // tokens
        waiting.append(row["seconds"]["waiting"])
    assert waiting[0] < waiting[1] < waiting[2]


def test_shared_experts_pay_for_rows_and_imbalance_and_replicated_ones_do_not():
    args = flags(seq_len=64, batch_tokens=8 * 64, tokens_per_gpu=64)
    replicated, shared = (predict(SPARSE, 8, parts, args.batch_tokens, args) for parts in (1, 4))
    assert replicated["seconds"]["rows"] == 0 < shared["seconds"]["rows"]
    weights = 2 * 2 * 2 * 32 * SPARSE.hidden_size  # layers, experts of a token, matrices
    share = 6 * weights / model.flops_per_token(SPARSE, 64)
    assert shared["seconds"]["compute"] / replicated["seconds"]["compute"] == pytest.approx(
        1 + (args.machine.imbalance - 1) * share
    )
    latency = args.machine.base_latency + args.machine.nvlink_hop
    instant = dataclasses.replace(args.machine, nvlink=1e30)
    exchanges = scaling.seconds_of_step(SPARSE, 8, 4, 6, 3, 64, 0, instant)["rows"] / latency
    assert exchanges == pytest.approx(5 * 2 * 3)  # four of rows and one of counts, layers, micro-batches
    extra = shared["sent_bytes"] - scaling.planned(SPARSE, 8, 4, 64, args.bucket_mb)["sent_bytes"]
    assert (
        extra == 4 * 64 * 2 * 2 * 32 * 2 * 3 / 4
    )  # trips, tokens, experts of a token, layers, width, bf16, those that leave


# -----------------------------------------------------------------------------
# What must hold of any machine


def random_legs(randomly: random.Random) -> list[Leg]:
    times = lambda most: [randomly.uniform(0, most) for _ in range(6)]
    readies = sorted(times(0.9)[:5]) + [1.0]
    return [Leg(ready, ring, 0.1, 0.1, 0.1, update) for ready, ring, update in zip(readies, times(3), times(2))]


def test_no_step_is_shorter_than_its_gpu_its_link_or_its_tail():
    randomly = random.Random(0)
    for _ in range(200):
        legs, backward = random_legs(randomly), randomly.uniform(0, 10)
        seconds, last = two_clocks(legs, backward), legs[-1]
        assert seconds >= backward + sum(leg.pack + leg.give + leg.unpack + leg.update for leg in legs) - 1e-9
        assert seconds >= 2 * sum(leg.ring for leg in legs)
        assert (
            seconds >= backward + 2 * last.ring + last.update
        )  # the tail bucket's gradients come last: nothing hides them
        i = randomly.randrange(len(legs))
        slower = legs[:i] + [legs[i]._replace(ring=legs[i].ring + 0.5)] + legs[i + 1 :]
        assert two_clocks(slower, backward) >= seconds - 1e-9


@pytest.mark.parametrize(
    "config, ranks, parts", [(DENSE, 8, 1), (SPARSE, 8, 1), (SPARSE, 8, 2), (SPARSE, 8, 4), (SPARSE, 8, 8)]
)
def test_a_better_machine_is_never_slower(config, ranks, parts):
    slow = dict(
        peak=1e12,
        hbm=1e9,
        nvlink=1e8,
        network=1e7,
        link_fraction=0.5,
        hbm_fraction=0.5,
        efficiency=0.3,
        moe_efficiency=0.3,
        ns_efficiency=0.3,
        base_latency=1e-3,
        nvlink_hop=1e-3,
        network_hop=1e-2,
        imbalance=1.5,
    )
    step = lambda **changes: predict(
        config,
        ranks,
        parts,
        8 * 64,
        flags(seq_len=64, batch_tokens=512, tokens_per_gpu=64, bucket_mb=0, gpus_per_node=4, **slow | changes),
    )["step_seconds"]
    before, faster = step(), 0
    for name, value in slow.items():
        better = (
            value / 2
            if "latency" in name or "hop" in name
            else 1.0
            if name == "imbalance"
            else min(1, 2 * value)
            if value < 1
            else 2 * value
        )
        after = step(**{name: better})
        assert after <= before * (1 + 1e-12), name
        faster += after < before
    assert faster >= 6


@pytest.mark.parametrize("ranks, parts", WORLDS)
def test_what_the_world_holds_is_conserved(ranks, parts):
    p, counts = scaling.planned(SPARSE, ranks, parts, 64, 0), model.count_parameters(SPARSE)
    assert p["held"] == counts["total"] - counts["expert"] + counts["expert"] // parts
    matrices = counts["matrix"] + counts["expert"]
    assert p["optimizer_bytes_total"] == 4 * matrices + 8 * (counts["total"] - matrices)
    assert p["optimizer_bytes"] * ranks >= p["optimizer_bytes_total"]
    assert p["newton_schulz_total"] == scaling.planned(SPARSE, 1, 1, 64, 0)["newton_schulz_total"]


def test_sharing_experts_cuts_what_a_rank_holds():
    held = [scaling.planned(SPARSE, 8, parts, 64, 0) for parts in (1, 2, 4, 8)]
    for more, fewer in itertools.pairwise(held):
        assert more["held"] > fewer["held"] and more["sent_bytes"] > fewer["sent_bytes"]


# -----------------------------------------------------------------------------
# Against what training allocates


@pytest.mark.parametrize("ranks, parts", WORLDS)
@pytest.mark.parametrize("bucket_mb", [0, 25])
def test_memory_is_that_of_the_tensors_of_an_exchange(ranks, parts, bucket_mb):
    nbytes = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    weights, buffers, states, staying = [], [], [], []
    for rank in range(ranks):
        world = World(rank, ranks, CPU, expert_parallel=parts)
        net = GPT(SPARSE, world.expert_ranks)
        exchange = Exchange(net, world, bucket_mb)
        weights.append(nbytes(net.parameters()))
        buffers.append(nbytes(t for transfer in exchange.transfers for t in (transfer.send_buf, transfer.recv_buf)))
        staying.append(
            sum(
                local.value.numel()
                for transfer in exchange.transfers
                if not transfer.travels
                for local in transfer.slabs
            )
        )
        state = 0
        for transfer in exchange.transfers:
            for optimizer in MUON.make_optimizers(transfer.owned_by_kind(), MuonConfig()):
                for group in optimizer.param_groups:
                    for value in group["params"]:
                        value.grad = torch.zeros_like(value)
                optimizer.step()
                state += nbytes(t for values in optimizer.state.values() for key, t in values.items() if key != "step")
        states.append(state)
    p = scaling.planned(SPARSE, ranks, parts, 64, bucket_mb)
    assert (4 * p["held"], p["buffer_bytes"], p["optimizer_bytes"], p["staying"]) == (
        max(weights),
        max(buffers),
        max(states),
        max(staying),
    )
    memory = scaling.memory(SPARSE, p, parts, 64, machine())
    assert (memory["weights"], memory["buffers"], memory["optimizer"]) == (max(weights), max(buffers), max(states))


@pytest.mark.parametrize("tokens", [64, 200])
def test_activations_are_a_line_in_tokens(tokens):
    fixed, per_token = scaling.kept_activations(SPARSE)
    assert fixed + tokens * per_token == activation_bytes(SPARSE, tokens)


def test_experts_elsewhere_take_their_copies_and_bring_their_rows():
    half, wide = dataclasses.replace(SPARSE, num_experts=4), dataclasses.replace(SPARSE, mlp_ratio=8.0)
    planned = lambda parts: scaling.planned(SPARSE, 8, parts, 64, 0)
    at = lambda config, parts, **changes: scaling.memory(config, planned(parts), parts, 64, machine(**changes))[
        "activations"
    ]
    fixed = lambda config: scaling.kept_activations(config)[0]
    copies = at(SPARSE, 1) - at(SPARSE, 2, imbalance=1.0)
    routers = (
        SPARSE.num_moe_layers * 2 * 4 * (SPARSE.num_experts - half.num_experts) * SPARSE.n_embd
    )  # gate and noise side by side: on every rank
    assert (
        copies == pytest.approx(fixed(SPARSE) - fixed(half) - routers, rel=0.002) and copies > 0
    )  # the ends of the experts' rows count a few bytes
    rows = lambda config: (at(config, 2, imbalance=2.0) - at(config, 2, imbalance=1.0)) / 64  # of all tokens once more
    per_token = scaling.kept_activations(wide)[1] - scaling.kept_activations(SPARSE)[1]
    assert rows(wide) - rows(SPARSE) == per_token > 0


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made and not yet freed under it, and their peak."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.seen, self.now, self.peak = {t.untyped_storage()._cdata for t in known}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, nbytes: int):
        self.seen.discard(key)
        self.now -= nbytes


def test_the_temporaries_of_muon_are_what_the_memory_counts():
    matrices = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(20)]
    for matrix in matrices:
        matrix.grad = torch.randn(64, 64)
    optimizer = train_muon.Muon(matrices)
    optimizer.step()
    with LiveBytes([t for m in matrices for t in (m, m.grad, optimizer.state[m]["momentum"])]) as live:
        optimizer.step()
    assert live.peak / sum(m.numel() for m in matrices) == pytest.approx(scaling.MUON_TEMPORARIES, rel=0.02)


def test_one_rank_updates_all_its_matrices_of_a_shape_at_once():
    p = scaling.planned(SPARSE, 1, 1, 64, 0)
    up_and_down = 2 * 8 * 32 * SPARSE.hidden_size  # of both layers, each of one orientation
    assert p["largest_update"] == up_and_down
    memory = scaling.memory(SPARSE, p, 1, 64, machine())
    backward = 4 * p["held"] + activation_bytes(SPARSE, 64)
    assert memory["gradients"] + memory["activations"] + memory["temporaries"] == max(
        backward, 4 * p["held"] + 14 * up_and_down
    )
    shared = scaling.planned(SPARSE, 2, 2, 64, 0) | {"largest_update": 10**6}
    memory = scaling.memory(SPARSE, shared, 2, 64, machine())
    assert (memory["gradients"], memory["activations"], memory["temporaries"]) == (4 * shared["staying"], 0, 14 * 10**6)


def test_the_micro_batch_shrinks_until_it_fits():
    room = lambda memory: predict(
        SPARSE, 1, 1, 8 * 64, flags(seq_len=64, batch_tokens=512, tokens_per_gpu=64, reserve=0, memory=memory)
    )
    ample = room(1e12)
    assert ample["micro_batches"] == 1 and ample["fits"]
    tight = room(ample["memory_bytes"] - 1)
    assert (
        tight["micro_batch_tokens"] == 4 * 64 and tight["micro_batches"] == 2 and tight["fits"]
    )  # 8 rows divide into 4 + 4, not into 7
    assert tight["step_seconds"] > ample["step_seconds"]
    none = room(1000)
    assert none["micro_batch_tokens"] == 64 and not none["fits"]


# -----------------------------------------------------------------------------
# Against the world


def test_the_dense_twin_of_the_speedrun_takes_what_modded_nanogpt_measured():
    twin = dataclasses.replace(model.PRESETS["speedrun"], pattern="D", num_experts=1, top_k=1)
    row = predict(twin, 8, 1, 393_216, flags(seq_len=49_152))
    assert row["step_seconds"] == pytest.approx(178.7 / 1770, rel=0.2)  # its record 23, on 8 H100


def test_the_ladder_goes_from_gpt2_small_to_100_billion():
    active, total = (
        [scaling.counts_of(config)[key] for config in scaling.LADDER.values()] for key in ("active", "total")
    )
    assert active[0] == pytest.approx(124e6, rel=0.01) and total[-1] == pytest.approx(100e9, rel=0.02)
    assert total == sorted(total) and active == sorted(active)
    for config in scaling.LADDER.values():
        assert config.n_embd % 128 == config.hidden_size % 128 == 0 and config.n_head * config.head_dim == config.n_embd
        assert config.top_k * config.hidden_size == 4 * config.n_embd and config.vocab_size == 50257


def test_schemes_share_experts_among_ranks_that_divide_them():
    parts = lambda *numbers: [share(*numbers) for share in scaling.SCHEMES.values()]
    assert parts(64, 4, 8) == [1, 4, 4]
    assert parts(64, 1024, 8) == [1, 8, 64]
    assert parts(16, 12, 8) == [1, 4, 4]
    assert parts(1, 8, 8) == [1, 1, 1]


# -----------------------------------------------------------------------------
# Where a scheme stops


def made_up(world_size: int, mfu: float, fits: bool = True, **seconds) -> dict:
    return {
        "world_size": world_size,
        "mfu": mfu,
        "fits": fits,
        "memory_bytes": 9e10,
        "seconds": {"compute": 9.0, "waiting": 1.0} | seconds,
    }


def test_a_scheme_stops_for_the_reason_that_its_rows_show():
    sizes = [1, 8, 64]
    assert scaling.stop([made_up(1, 0.2), made_up(8, 0.4), made_up(64, 0.2)], sizes) == (64, "")
    assert scaling.stop([made_up(1, 0.2), made_up(8, 0.4), made_up(64, 0.19)], sizes) == (8, "gradients and values")
    assert scaling.stop([made_up(1, 0.4), made_up(8, 0.3), made_up(64, 0.16)], sizes) == (8, "gradients and values")
    assert scaling.stop([made_up(1, 0.4), made_up(8, 0.1, rows=2.0)], sizes) == (1, "rows between ranks")
    assert scaling.stop([made_up(1, 0.4, fits=False), made_up(8, 0.3), made_up(64, 0.3, fits=False)], sizes) == (
        8,
        "memory",
    )
    assert scaling.stop([made_up(1, 0.4), made_up(8, 0.3)], sizes) == (8, "no more rows")
    assert scaling.stop([made_up(1, 0.4, fits=False)], sizes) == (0, "at least 90 GB per GPU")


# -----------------------------------------------------------------------------
# The script


@pytest.mark.slow
def test_a_short_run_writes_table_rows_and_picture(tmp_path):
    words = (
        "--models 12x768-dense 12x768-e8k2 --world_sizes 2 1 3 512 --scaling strong --json rows.json --out picture.png"
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["world_size"], row["expert_parallel"]) for row in written["rows"]] == [
        ("12x768-dense", 1, 1),
        ("12x768-dense", 2, 1),
        ("12x768-dense", 3, 1),
        ("12x768-e8k2", 1, 1),
        ("12x768-e8k2", 2, 1),
        ("12x768-e8k2", 2, 2),
        ("12x768-e8k2", 3, 1),
    ]
    for row in written["rows"]:
        assert row["step_seconds"] == pytest.approx(sum(row["seconds"].values())) and 0 < row["mfu"] < 1
        assert f"{row['mfu']:.1%}" in done.stdout and f"{row['memory_bytes'] / 1e9:,.1f} GB" in done.stdout
    assert len(written["stops"]) == 3 and all(line in done.stdout for line in written["stops"])
    assert "12x768-dense up to 3 (no more rows)" in written["stops"][0]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_help_names_every_quantity_and_its_source(capsys):
    with pytest.raises(SystemExit) as end:
        scaling.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{field.name}" in text for field in dataclasses.fields(scaling.Machine))
    assert all(
        source in text
        for source in (
            "NVIDIA data sheet",
            "ConnectX-7",
            "nanochat",
            "modded-nanogpt",
            "tuning.cc",
            "1701.06538",
            "assumed",
        )
    )


WRONG = [
    "--efficency 0.4",
    "--efficiency 1.5",
    "--imbalance 0.9",
    "--network 0",
    "--peak fast",
    "--gpus_per_node 2.5",
    "--models 124M",
    "--gpu A100",
    "--world_sizes 0",
    "--seq_len 1000",
    "--out nowhere/at/all.png",
    "--eff 0.3",
    "--reserve nan",
]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_flag_is_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as end:
        scaling.parse(words.split())
    out, complaint = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert complaint.count("\n") == 1 and words.split()[0].removesuffix(" ") in complaint


def test_flags_reach_the_machine():
    got = flags(
        "--world_sizes", "8", "1", "8", "--models", "12x768-e8k2", "12x768-dense", gpu="H200", network=1e9, imbalance=2
    )
    assert (got.machine.memory, got.machine.network, got.machine.imbalance) == (141e9, 1e9, 2)
    assert (got.world_sizes, got.models) == ([1, 8], ["12x768-dense", "12x768-e8k2"])
    assert flags("--gpus-per-node", "4", "--hbm", "7").machine.gpus_per_node == 4
    assert math.isclose(flags().machine.hbm, 3.35e12)
