"""zoo/mixture.py: shares and limits of a mixture against a row-by-row reference, the loader of mixtures.

CPU, no network: `pytest tests/zoo/test_mixture.py`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from cli import UserError, file_sha256  # noqa: E402
from tools import prepare  # noqa: E402
from zoo import mixture as M  # noqa: E402
from zoo.mixture import Mix, Mixture, MixtureLoader, mixture_validation_batches  # noqa: E402

NAMES = ["a", "b", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# Order of domains


def mixture(rows, batch_rows=4, tokens=None, **mix) -> Mixture:
    return Mixture(Mix(**mix), NAMES[: len(rows)], rows, tokens or rows, batch_rows)


def slow_stream(rows, shares, limits, batch_rows, round_robin_steps, length):
    """Row by row: whole batches of one domain in turn, then always the domain that is furthest behind its due, counted
    anew every PERIOD rows. A domain drops out when its turn comes and it has no row left, or no whole batch; then
    counting and turns begin anew. [(domain, how many of its rows came before)]"""
    count, out, turn = [0] * len(rows), [], 0
    left = lambda n: [d for d in range(len(rows)) if shares[d] > 0 and count[d] + n <= limits[d]]
    alive = left(batch_rows)
    while len(out) < round_robin_steps * batch_rows and alive:
        d, turn = alive[turn % len(alive)], turn + 1
        if d not in left(batch_rows):
            alive, turn = left(batch_rows), 0
            continue
        out += [(d, count[d] + i) for i in range(batch_rows)]
        count[d] += batch_rows
    alive, seen = left(1), [0] * len(rows)
    while len(out) < length and alive:
        due = lambda d: shares[d] / sum(shares[i] for i in alive) * (sum(seen) + 1) - seen[d]
        d = max(alive, key=lambda d: (round(due(d), 9), -d))
        if d not in left(1):
            alive, seen = left(1), [0] * len(rows)
            continue
        out.append((d, count[d]))
        count[d] += 1
        seen[d] += 1
        if sum(seen) == M.PERIOD:
            seen = [0] * len(rows)
    return out[:length]


@pytest.mark.parametrize(
    "rows, weights, epochs, steps",
    [
        ([100, 100, 100], "a=1,b=1,c=1", "", 0),
        ([100, 50, 20], "a=5,b=2,c=1", "", 0),
        ([30, 30, 30], "a=3,b=1,c=1", "a=1", 0),
        ([30, 20, 10], "a=1,b=1,c=1", "2", 7),
        ([30, 7, 10], "a=2,b=1,c=1", "b=1,c=1.5", 9),
        ([40, 40, 40], "a=1,c=3", "c=0.5", 5),
        ([9, 9, 9], "a=1,b=1,c=1", "1", 20),
        ([5000, 10, 10], "a=7,b=2,c=1", "c=30", 3),
    ],
)
def test_a_mixture_equals_one_drawn_row_by_row(rows, weights, epochs, steps):
    mix = mixture(rows, weights=weights, epochs=epochs, round_robin_steps=steps)
    share = M.parse_numbers(weights, NAMES, "")
    most = M.parse_numbers(epochs, NAMES, "")
    limits = [int(most[name] * n) if name in most else math.inf for name, n in zip(NAMES, rows)]
    length = min(9000, sum(limits))
    want = slow_stream(rows, [share.get(name, 0) for name in NAMES], limits, 4, steps, length)
    assert len(want) == length
    for cut in (1, 3, length):  # any pieces, in any order
        got = [mix.assign(np.arange(start, min(start + cut, length))) for start in reversed(range(0, length, cut))]
        assert [tuple(map(int, pair)) for domain_N, nth_N in reversed(got) for pair in zip(domain_N, nth_N)] == want
    if math.isfinite(sum(limits)):
        with pytest.raises(UserError, match="allow more, prepare more text, or train for fewer steps"):
            mix.assign(np.array([length]))


def test_a_share_that_no_row_would_have_is_refused():
    with pytest.raises(UserError, match="domain b is 1.0e-04 of the mixture.*--domain_weights"):
        mixture([10**6] * 2 + [0], weights="a=9999,b=1")


def test_shares_are_exact_and_evenly_spread():
    domain_N, _ = mixture([10**6] * 3, weights="a=6,b=3,c=1").assign(np.arange(20_000))
    for size in (1, 10, 100, 4096, 20_000):
        counts = np.array(
            [np.bincount(domain_N[start : start + size], minlength=3) for start in range(0, 20_000 - size + 1, size)]
        )
        assert np.abs(counts - size * np.array([0.6, 0.3, 0.1])).max() <= 2 + size / M.PERIOD


@pytest.mark.parametrize(
    "temperature, want", [(1.0, [8, 4, 1]), (2.0, [8**0.5, 2, 1]), (1e9, [1, 1, 1]), (0.5, [64, 16, 1])]
)
def test_temperature_flattens_shares(temperature, want):
    mix = mixture([80, 40, 10], temperature=temperature)
    assert mix.share_D == pytest.approx(np.array(want) / sum(want))


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(weights="d=1"), "no domain 'd'; choose among a, b, c"),
        (dict(weights="a=x"), "'a=x' is not a number"),
        (dict(weights="a=0"), "all are 0"),
        (dict(epochs="-1"), "not a number at least 0"),
        (dict(temperature=0.0), "above 0"),
    ],
)
def test_a_mix_that_is_none_is_one_sentence(flags, words):
    with pytest.raises(UserError, match=words):
        mixture([10, 10, 10], **flags)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def write_domain(folder: Path, first_id: int, tokens: int, val: int = 40):
    """Ids of a domain are its own, and count up."""
    folder.mkdir(parents=True)
    for split, n in (("train", tokens), ("val", val)):
        data.write_shard(folder / f"x_{split}_000001.bin", first_id + np.arange(n) % 80)
    facts = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256, "token_bytes": [1] * 256 + [0]}
    prepare.write_meta(folder, {"source": "test", "request": {}, "splits": {}, "shards": None, **facts})


@pytest.fixture
def three(tmp_path) -> Path:
    for i, (name, tokens) in enumerate(zip(NAMES, (401, 241, 81))):
        write_domain(tmp_path / "mixed" / name, 80 * i, tokens)
    return tmp_path / "mixed"


def rows_of(batches) -> list:
    return [(int(d), tuple(ids)) for batch in batches for d, ids in zip(batch.domain_B, batch.inputs_BT.tolist())]


def test_rows_are_those_of_their_domains_and_every_epoch_sees_each_once(three):
    loader = MixtureLoader(three, seq_len=8, batch_rows=6, micro_rows=3, seed=5, mix=Mix(weights="a=1,b=1,c=1"))
    assert loader.row_counts == [50, 30, 10]
    seen = rows_of(batch for _ in range(50) for batch in loader.next_step())
    loader.close()
    for d, rows in enumerate(loader.row_counts):
        own = [ids for domain, ids in seen if domain == d]
        assert len(own) in (99, 100, 101) and all(80 * d <= i < 80 * (d + 1) for ids in own for i in ids)
        epochs = [own[start : start + rows] for start in range(0, len(own) - rows + 1, rows)]
        assert all(len(set(epoch)) == min(rows, 10) for epoch in epochs), "ids repeat after 10 rows"
        assert len(set(map(tuple, epochs))) == len(epochs), "in another order each time"


@pytest.mark.parametrize(
    "mix", [Mix(), Mix(weights="a=2,b=1,c=1", epochs="c=4", round_robin_steps=3), Mix(temperature=5.0)]
)
def test_any_ranks_and_any_restart_see_the_same(three, mix):
    make = lambda **changes: MixtureLoader(
        three, **dict(seq_len=8, batch_rows=12, micro_rows=6, seed=1, mix=mix) | changes
    )
    one = make()
    steps = [rows_of(one.next_step()) for _ in range(9)]
    for world_size, micro_rows in ((1, 12), (2, 3), (3, 4), (4, 1)):
        ranks = [make(rank=rank, world_size=world_size, micro_rows=micro_rows) for rank in range(world_size)]
        for want in steps:
            parts = sorted((batch for rank in ranks for batch in rank.next_step()), key=lambda batch: batch.first_row)
            assert rows_of(parts) == want
        for rank in ranks:
            rank.close()
    again = make()
    again.load_state_dict(json.loads(json.dumps(one.state_dict() | {"position": 5 * 12})))
    assert [rows_of(again.next_step()) for _ in range(4)] == steps[5:]
    for loader in (one, again):
        loader.close()


def test_round_robin_batches_have_one_domain_each_in_turn(three):
    loader = MixtureLoader(three, seq_len=8, batch_rows=4, micro_rows=2, mix=Mix(round_robin_steps=7))
    domains = [{int(d) for batch in loader.next_step() for d in batch.domain_B} for _ in range(12)]
    loader.close()
    assert domains[:7] == [{0}, {1}, {2}, {0}, {1}, {2}, {0}] and max(map(len, domains[7:])) > 1


def test_a_run_that_is_longer_than_its_epochs_is_refused_before_it_starts(three):
    make = lambda steps: MixtureLoader(three, seq_len=8, batch_rows=6, micro_rows=6, mix=Mix(epochs="1"), steps=steps)
    make(15).close()
    with pytest.raises(UserError, match="all domains have reached their --domain_epochs after 90 rows"):
        make(16)


def test_validation_goes_through_the_domains(three):
    batches = list(mixture_validation_batches(three, seq_len=8, rows=2, max_tokens=3 * 32))
    assert [int(batch.domain_B[0]) for batch in batches] == [0, 0, 1, 1, 2, 2] and [
        batch.first_row for batch in batches
    ] == [0, 2] * 3
    assert all(80 * d <= i < 80 * (d + 1) for d, ids in rows_of(batches) for i in ids)
    with pytest.raises(UserError, match="for each of 3 domains"):
        mixture_validation_batches(three, seq_len=8, rows=2, max_tokens=20)


def test_a_mixture_is_checked_like_a_folder(three, tmp_path):
    assert (
        list(M.fingerprint(three))[:2] == ["a/x_train_000001.bin", "a/x_val_000001.bin"]
        and len(M.fingerprint(three)) == 6
    )
    meta = json.loads((three / "b" / "meta.json").read_text()) | {
        "encoding": "gpt2",
        "vocab_size": 50257,
        "eot_token": 50256,
    }
    del meta["sha256"]
    prepare.write_meta(three / "b", meta)
    with pytest.raises(UserError, match="domain b has encoding gpt2, a has bytes"):
        M.load_meta(three)
    with pytest.raises(UserError, match="holds no token shards"):
        M.load_meta(tmp_path / "nothing")


def test_a_plain_folder_is_a_mixture_of_one_domain(three):
    """Same rows and the same saved position as data.Loader."""
    options = dict(seq_len=8, batch_rows=6, micro_rows=3, seed=5)
    plain, mixed = data.Loader(three / "a", **options), MixtureLoader(three / "a", mix=Mix(), **options)
    for _ in range(20):
        for one, other in zip(plain.next_step(), mixed.next_step(), strict=True):
            assert torch.equal(one.inputs_BT, other.inputs_BT) and torch.equal(one.targets_BT, other.targets_BT)
            assert one.first_row == other.first_row and other.domain_B.tolist() == [0] * 3
    assert plain.state_dict() == mixed.state_dict() == {"position": 120, "rows": [50], "seed": 5, "seq_len": 8}
    plain.close(), mixed.close()
    validation = [
        batches(three / "a", seq_len=8, rows=2) for batches in (data.validation_batches, mixture_validation_batches)
    ]
    assert all(torch.equal(one.targets_BT, other.targets_BT) for one, other in zip(*validation, strict=True))
    assert M.load_meta(three / "a") == data.load_meta(three / "a") and M.fingerprint(three / "a") == data.fingerprint(
        three / "a"
    )


def test_the_core_refuses_a_mixture_in_one_sentence(three):
    with pytest.raises(UserError, match=rf"{three} is a folder of data folders \(a, b, c\)"):
        data.load_meta(three)
    prepare.write_meta(three, data.load_meta(three / "a") | {"domains": list("abc"), "sha256": None, "shards": None})
    for read in (
        data.load_meta,
        data.verify,
        data.fingerprint,
        lambda folder: data.validation_batches(folder, seq_len=8, rows=2),
        lambda folder: data.Loader(folder, seq_len=8, batch_rows=2, micro_rows=2),
    ):
        with pytest.raises(
            UserError, match=rf"mixture of domains \(a, b, c\): train on it with `python train_zoo.py --data {three}`"
        ):
            read(three)


def test_verify_checks_each_domain(three):
    paths = sorted((three / "b").glob("*.bin"))
    shards = [{"file": path.name, "tokens": len(data.read_shard(path)), "sha256": file_sha256(path)} for path in paths]
    prepare.write_meta(three / "b", data.read_meta_json(three / "b") | {"shards": shards})
    M.verify(three)
    path = three / "b" / shards[0]["file"]
    data.write_shard(path, np.asarray(data.read_shard(path)) ^ 1)
    with pytest.raises(UserError, match=f"{path} does not match the sha256"):
        M.verify(three)
