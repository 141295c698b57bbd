"""data.py: shards, encodings, the loader, validation batches. CPU, no network: `pytest tests/core/test_data.py`."""

import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import tokenizer  # noqa: E402
from cli import UserError, file_sha256  # noqa: E402
from data import Loader, load_meta, read_shard, validation_batches, write_shard  # noqa: E402
from tokenizer import get_encoding  # noqa: E402

BYTES = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256}

# ---------------------------------------------------------------------------------------------------------------------
# Shards


def make_shards(folder, lengths, split="train", vocab=50257, name="fineweb"):
    """Shards whose tokens are random, so that a row is recognised by its contents."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0 if split == "train" else 1)
    shards = [random.integers(0, vocab, n).astype(np.uint16) for n in lengths]
    for number, tokens in enumerate(shards, split == "train"):
        write_shard(folder / f"{name}_{split}_{number:06d}.bin", tokens)
    return shards


def test_shard_round_trip_and_layout(tmp_path):
    path, tokens = tmp_path / "x_train_000001.bin", np.array([50256, 0, 65535, 7])
    digest = write_shard(path, tokens)
    raw = path.read_bytes()
    assert digest == hashlib.sha256(raw).hexdigest()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 4] + [0] * 253
    assert np.frombuffer(raw[1024:], "<u2").tolist() == tokens.tolist()
    back = read_shard(path)
    assert isinstance(back, np.memmap) and back.dtype == np.uint16 and back.tolist() == tokens.tolist()


@pytest.mark.parametrize("tokens", [[-1, 2], [65536], [[1, 2]], [0.5], []])
def test_write_shard_refuses(tmp_path, tokens):
    with pytest.raises(UserError, match="x.bin"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def corrupt(raw, where, value):
    header = np.frombuffer(raw, np.uint8).copy()
    header.view("<i4")[where] = value
    return header.tobytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:100],
        lambda raw: raw[:-2],
        lambda raw: raw + b"\0\0",
        lambda raw: raw[:1024],
        lambda raw: b"a foreign file" * 100,
        lambda raw: corrupt(raw, 0, 20240521),
        lambda raw: corrupt(raw, 1, 2),
        lambda raw: corrupt(raw, 2, 0),
        lambda raw: corrupt(raw, 2, -3),
    ],
)
def test_bad_shards_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "odd_val_000000.bin"
    write_shard(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="odd_val_000000.bin.*python data.py"):
        read_shard(path)
    with pytest.raises(UserError, match="odd_val_000000.bin"):
        list(validation_batches(tmp_path, seq_len=2, rows=1))


def test_a_flipped_bit_is_found_by_the_rank_that_looks_at_its_shard(tmp_path):
    """meta.json promises a sha256 for each shard; the ranks of a host share the looking."""
    make_shards(tmp_path, [500, 600, 700], vocab=257)
    make_shards(tmp_path, [500], split="val", vocab=257)
    shards = [
        {"file": path.name, "tokens": len(read_shard(path)), "sha256": file_sha256(path)}
        for path in sorted(tmp_path.glob("*.bin"))
    ]
    (tmp_path / "meta.json").write_text(json.dumps(BYTES | {"shards": shards}))
    whole = data.fingerprint(tmp_path)
    assert len(whole) == 4 and all(
        digest in whole[shard["file"]] for shard in load_meta(tmp_path)["shards"] for digest in [shard["sha256"]]
    )
    for rank in range(3):
        data.verify(tmp_path, rank, 3)
    damaged = sorted(tmp_path.glob("*_train_*.bin"))[1]
    raw = bytearray(damaged.read_bytes())
    raw[1024 + 300] ^= 1
    damaged.write_bytes(raw)
    complaints = []
    for rank in range(3):
        try:
            data.verify(tmp_path, rank, 3)
        except UserError as error:
            complaints.append(str(error))
    assert (
        len(complaints) == 1
        and damaged.name in complaints[0]
        and "sha256" in complaints[0]
        and "python data.py" in complaints[0]
    )
    with pytest.raises(UserError, match=damaged.name):
        data.verify(tmp_path)


def test_a_changed_meta_json_is_noticed(tmp_path):
    make_shards(tmp_path, [500], vocab=257)
    meta = BYTES | {"token_bytes": [1] * 256 + [0], "shards": None}
    meta["sha256"] = data.meta_sha256(meta)
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    load_meta(tmp_path)
    for change in (
        {"vocab_size": 258},
        {"token_bytes": [2] * 257},
        {"shards": [{"file": "x"}], "sha256": None},
        {"sha256": "0"},
    ):
        path.write_text(json.dumps({key: value for key, value in (meta | change).items() if value is not None}))
        with pytest.raises(UserError, match=r"meta.json is damaged .*python data.py"):
            load_meta(tmp_path)
    del meta["sha256"]  # written by hand, or by an earlier version
    path.write_text(json.dumps(meta))
    assert load_meta(tmp_path)["vocab_size"] == 257


def test_shards_without_promises_are_told_apart_by_their_contents(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        tokens = np.random.default_rng(seed).integers(0, 50257, 5000).astype(np.uint16)
        write_shard(tmp_path / name / "x_train_000001.bin", tokens)
        write_shard(tmp_path / name / "x_val_000000.bin", tokens[:100])
    a, b, c = (data.fingerprint(tmp_path / name) for name in "abc")
    assert a == b and a["x_train_000001.bin"] != c["x_train_000001.bin"]
    data.verify(tmp_path / "a")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_shard(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match="a.bin.*No space left"):
        write_shard(path, np.arange(100))
    assert read_shard(path).tolist() == [1, 2, 3] and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_shard_that_meta_json_does_not_list_is_refused(tmp_path):
    make_shards(tmp_path, [50], vocab=257)
    (tmp_path / "meta.json").write_text(
        json.dumps(BYTES | {"shards": [{"file": "fineweb_train_000001.bin", "tokens": 50}]})
    )
    assert len(data.open_split(tmp_path, "train")) == 1
    write_shard(tmp_path / "more_train_000009.bin", np.arange(50))
    with pytest.raises(UserError, match="more_train_000009.bin is a shard that meta.json does not list"):
        data.open_split(tmp_path, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Encodings


def test_bytes_encoding():
    encoding = get_encoding("bytes")
    text = "naïve <|endoftext|>\r\n\0 日本"
    ids = encoding.encode(text)
    assert ids.dtype == np.uint16 and bytes(ids.tolist()) == text.encode() and encoding.decode(ids) == text
    assert (encoding.name, encoding.vocab_size, encoding.eot_token) == ("bytes", 257, 256)
    assert encoding.token_bytes().tolist() == [1] * 256 + [0] and encoding.decode([104, 256, 105, 0xFF]) == "hi\ufffd"
    assert encoding.encode("a\ud800b").tolist() == [97, 63, 98]


def test_gpt2_encoding(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995] and (gpt2.vocab_size, gpt2.eot_token) == (50257, 50256)
    text = "don't <|endoftext|> naïve 日本\n\n\tx"
    ids = gpt2.encode(text)
    assert ids.dtype == np.uint16 and 50256 not in ids and gpt2.decode(ids) == text and gpt2.decode([50256]) == ""
    token_bytes = gpt2.token_bytes()
    assert (
        token_bytes.dtype == np.int32
        and token_bytes.shape == (50257,)
        and token_bytes[50256] == 0
        and token_bytes[:50256].min() == 1
    )
    assert token_bytes[ids].sum() == len(text.encode())
    assert gpt2.encode("a\ud800b").tolist() == gpt2.encode("a?b").tolist()


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "gpt-2", ""])
def test_encodings_that_do_not_fit_name_those_that_do(name):
    with pytest.raises(UserError, match="bytes, gpt2, r50k_base"):
        get_encoding(name)


@pytest.mark.parametrize("run", [" ", "\n", "\t", " \n", "\n    ", "\u3000", "\xa0 ", "\n\n\t\t\t", "mixed"])
def test_long_runs_of_blanks_have_the_ids_of_the_whole(gpt2, monkeypatch, run):
    """tiktoken's regular expression fails at 1,000,000 blanks; cut in parts, such a text has the ids of an uncut one."""
    bpe = pytest.importorskip("tiktoken").get_encoding("gpt2")
    monkeypatch.setattr(tokenizer, "MAX_BLANKS", 2**13)
    random = "".join(np.random.default_rng(0).choice(list(" \n\t\r\xa0\u3000"), 30_001))
    blanks = random if run == "mixed" else (run * 30_001)[:30_001]
    for text in (f"a{blanks}x", blanks, f"b\n{blanks}\ny {blanks[:-1]}", f"{blanks[:5000]}x{blanks[:9000]}"):
        parts = []
        ids = tokenizer.encode_in_parts(text, lambda part: parts.append(part) or np.array(bpe.encode_ordinary(part)), gpt2.vocab)
        assert ids.tolist() == bpe.encode_ordinary(text) and len(parts) > 1
        assert max(map(len, parts)) < len(text)


def test_a_million_blanks_are_encoded(gpt2):
    text = f"a{' ' * 10**6}b"
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text and len(ids) == 10**6 + 1  # the last blank belongs to b
    ordinary = "words  and\n\n    lines\n" * 20_000
    assert gpt2.encode(ordinary).tolist() == pytest.importorskip("tiktoken").get_encoding("gpt2").encode_ordinary(ordinary)


def test_bytes_that_are_not_utf8_are_kept_or_replaced(gpt2):
    for text in (b"caf\xe9", bytes(range(256)), b"\xff\xfe\0\xed\xa0\x80"):
        ids = get_encoding("bytes").encode_bytes(text)
        assert ids.dtype == np.uint16 and bytes(ids.tolist()) == text == get_encoding("bytes").decode_bytes(ids)
        assert get_encoding("bytes").token_bytes()[ids].sum() == len(text)
        assert gpt2.encode_bytes(text).tolist() == gpt2.encode(text.decode("utf-8", "replace")).tolist()


def test_importing_needs_numpy_alone():
    code = "import sys, data; print([m for m in ('torch', 'tiktoken', 'datasets', 'tqdm', 'pyarrow', 'huggingface_hub') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def rows_of(batches):
    return [
        tuple(inputs.tolist()) + (targets.tolist()[-1],)
        for batch in batches
        for inputs, targets in zip(batch.inputs_BT, batch.targets_BT)
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(n):
    order = data.permute(np.arange(n), n, 3, 1)
    assert sorted(order.tolist()) == list(range(n))
    if n > 60:
        others = data.permute(np.arange(n), n, 4, 1), data.permute(np.arange(n), n, 3, 2)
        assert all((order == other).mean() < 0.1 for other in (np.arange(n), *others))
        assert (order[1:] == order[:-1] + 1).mean() < 0.1


def test_permute_is_pinned_and_looks_uniform():
    assert data.permute(np.arange(8), 10**6, 0, 0).tolist() == [
        228831,
        314315,
        572436,
        743526,
        97770,
        597512,
        340571,
        954798,
    ]
    assert abs(np.corrcoef(np.arange(50_000), data.permute(np.arange(50_000), 50_000, 0, 0))[0, 1]) < 0.02


def test_one_epoch_sees_every_row_once(tmp_path):
    shards = make_shards(tmp_path / "d", [101, 57, 2, 9])
    expected = [tuple(tokens[i * 8 : i * 8 + 9].tolist()) for tokens in shards for i in range((len(tokens) - 1) // 8)]
    assert len(expected) == 12 + 7 + 0 + 1
    loader = Loader(tmp_path / "d", seq_len=8, batch_rows=4, micro_rows=2, seed=5)
    batches = [batch for _ in range(5) for batch in loader.next_step()]
    assert [batch.first_row for batch in batches] == [0, 2] * 5 and loader.position == 20
    assert all(
        batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64 and batch.inputs_BT.shape == (2, 8)
        for batch in batches
    )
    assert all((batch.inputs_BT[:, 1:] == batch.targets_BT[:, :-1]).all() for batch in batches)
    seen = rows_of(batches)
    assert sorted(seen) == sorted(expected) and seen != expected
    again = rows_of(batch for _ in range(5) for batch in loader.next_step())
    assert sorted(again) == sorted(expected) and again != seen  # the second epoch has another order
    other = Loader(tmp_path / "d", seq_len=8, batch_rows=4, micro_rows=2, seed=6)
    assert rows_of(batch for _ in range(5) for batch in other.next_step()) != seen
    loader.close(), other.close()


@pytest.mark.parametrize("world_size, micro_rows", [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_ranks_and_micro_steps_split_the_same_batches(tmp_path, world_size, micro_rows):
    make_shards(tmp_path / "d", [331, 200])
    make = functools.partial(Loader, tmp_path / "d", seq_len=8, batch_rows=12, seed=1)
    one = make(micro_rows=12)
    ranks = [make(micro_rows=micro_rows, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(12):  # 65 rows, so epochs end inside batches
        [whole] = one.next_step()
        steps = [loader.next_step() for loader in ranks]
        for rank, step in enumerate(steps):
            assert [batch.first_row for batch in step] == [
                (m * world_size + rank) * micro_rows for m in range(12 // (world_size * micro_rows))
            ]
        parts = [batch for step in steps for batch in step]
        assert rows_of(sorted(parts, key=lambda batch: batch.first_row)) == rows_of([whole])
        assert {rank.state_dict()["position"] for rank in ranks} == {one.state_dict()["position"]}
    for loader in (one, *ranks):
        loader.close()


def test_position_is_restored_exactly(tmp_path):
    make_shards(tmp_path / "d", [331, 200])
    make = functools.partial(Loader, tmp_path / "d", seq_len=8, batch_rows=12, micro_rows=6, seed=1)
    loader, states, steps = make(), [], []
    for _ in range(11):  # two epochs, ending inside steps
        states.append(json.loads(json.dumps(loader.state_dict())))  # saved while the next step is being read
        steps.append(rows_of(loader.next_step()))
    assert states[3] == {"position": 36, "rows": [65], "seed": 1, "seq_len": 8} and loader.position == 132
    assert [state["position"] for state in states] == list(range(0, 132, 12))
    for at in (5, 0, 4, 10):
        resumed = make()
        resumed.load_state_dict(states[at])
        assert [rows_of(resumed.next_step()) for _ in range(11 - at)] == steps[at:]
        loader.load_state_dict(states[at])  # also on a loader that has already read ahead
        assert rows_of(loader.next_step()) == steps[at]
        resumed.close()
    for key in ("rows", "seed", "seq_len"):
        with pytest.raises(UserError, match=f"{key}=9"):
            loader.load_state_dict(states[0] | {key: 9})
    loader.close()


def test_fineweb_shards_from_elsewhere(tmp_path):
    make_shards(tmp_path, [1000])
    make_shards(tmp_path, [100], "val")
    meta = load_meta(tmp_path)
    assert (meta["encoding"], meta["vocab_size"], meta["eot_token"], meta["token_bytes"], meta["gzip_bpb"]) == (
        "gpt2",
        50257,
        50256,
        None,
        None,
    )
    loader = Loader(tmp_path, seq_len=16, batch_rows=2, micro_rows=2)
    assert loader.next_step()[0].inputs_BT.shape == (2, 16)
    loader.close()
    assert len(list(validation_batches(tmp_path, seq_len=16, rows=2))) == 4


def test_a_missing_folder_is_answered_with_those_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a checkout may have a data/ of its own
    with pytest.raises(UserError, match="^data/typo holds no token shards: run `python data.py --source python"):
        load_meta("data/typo")
    for name in ("empty", "notes", "mixed/chat"):
        (tmp_path / "data" / name).mkdir(parents=True)
    make_shards(tmp_path / "data/notes", [100], vocab=300)
    make_shards(tmp_path / "data/mixed/chat", [100], vocab=300)
    (tmp_path / "data/mixed/meta.json").write_text("{}")
    for folder in ("data/typo", "typo"):
        with pytest.raises(UserError) as error:
            load_meta(folder)
        there = "pass --data data/mixed or data/notes, or prepare it with `python data.py`"
        assert str(error.value) == f"{folder} holds no token shards: {there}"
    with pytest.raises(UserError, match="pass --data data/mixed or data/notes, or run .* --source fineweb --out data/fin"):
        load_meta("data/fineweb")
    with pytest.raises(UserError, match=r"^data is a folder of data folders \(notes\): pass one of them .* data/notes"):
        load_meta("data")


def test_loader_refuses_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python data.py --source python --encoding bpe --out .*gone"):
        Loader(tmp_path / "gone", seq_len=8, batch_rows=1, micro_rows=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no token shards"):
        load_meta(tmp_path / "empty")
    make_shards(tmp_path / "d", [100], vocab=300)
    with pytest.raises(UserError, match="no val shard"):
        validation_batches(tmp_path / "d", seq_len=8, rows=1)
    with pytest.raises(UserError, match="12 train rows of 8 tokens.*13"):
        Loader(tmp_path / "d", seq_len=8, batch_rows=13, micro_rows=13)
    for bad in ({"micro_rows": 5}, {"micro_rows": 2, "world_size": 4}, {"micro_rows": 0}):
        with pytest.raises(UserError, match=r"batch_rows=12 .*world_size=\d .*micro_rows=\d"):
            Loader(tmp_path / "d", seq_len=8, batch_rows=12, **bad)
    loader = Loader(tmp_path / "d", seq_len=8, batch_rows=12, micro_rows=12, vocab_size=200)
    largest = int(read_shard(tmp_path / "d" / "fineweb_train_000001.bin")[:97].max())
    with pytest.raises(UserError, match=r"fineweb_train_000001.bin holds token id \d+") as error:
        loader.next_step()
    assert largest >= 200 and "199" in str(error.value)
    loader.close()
    (tmp_path / "d" / "meta.json").write_text('{"encoding": ')
    with pytest.raises(UserError, match="meta.json is damaged"):
        load_meta(tmp_path / "d")


# ---------------------------------------------------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[100, 33, 1, 2], [5], [9, 9]])
def test_validation_predicts_every_token_once(tmp_path, world_size, lengths):
    shards = make_shards(tmp_path, lengths, "val")
    ranks = [
        list(validation_batches(tmp_path, seq_len=8, rows=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for rank, batches in enumerate(ranks):
        assert [batch.first_row for batch in batches] == [(j * world_size + rank) * 3 for j in range(len(ranks[0]))]
    batches = sorted((batch for rank in ranks for batch in rank), key=lambda batch: batch.first_row)
    inputs, targets = (torch.cat([batch[i] for batch in batches]).flatten() for i in (0, 1))
    assert all(batch.inputs_BT.shape == batch.targets_BT.shape == (3, 8) for batch in batches)
    assert targets[targets >= 0].tolist() == [token for shard in shards for token in shard[1:].tolist()]
    assert inputs[targets >= 0].tolist() == [token for shard in shards for token in shard[:-1].tolist()]
    assert (inputs[targets < 0] == 0).all() and (targets[targets < 0] == -1).all()


def test_validation_max_tokens(tmp_path):
    [first, second] = make_shards(tmp_path, [20, 50], "val")
    [batch] = validation_batches(
        tmp_path, seq_len=8, rows=6, max_tokens=39
    )  # 4 rows: 8 + 8 + 3 of the first shard, 8 of the second
    assert batch.targets_BT[batch.targets_BT >= 0].tolist() == first[1:].tolist() + second[1:9].tolist()
    assert (batch.targets_BT[4:] == -1).all()
    everything = list(validation_batches(tmp_path, seq_len=8, rows=6))
    assert [
        batch.targets_BT.tolist() for batch in validation_batches(tmp_path, seq_len=8, rows=6, max_tokens=10**9)
    ] == [batch.targets_BT.tolist() for batch in everything]
    with pytest.raises(UserError, match="max_tokens=7"):
        validation_batches(tmp_path, seq_len=8, rows=6, max_tokens=7)
    with pytest.raises(UserError, match="holds token id"):
        list(validation_batches(tmp_path, seq_len=8, rows=6, vocab_size=10))


# ---------------------------------------------------------------------------------------------------------------------
# What a run is to read and compare


def test_the_sentence_on_a_run_counts_epochs_and_compared_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FEW_TOKENS", 50)
    make_shards(tmp_path / "d", [331, 200])
    make_shards(tmp_path / "d", [20, 34], "val")
    loader = Loader(tmp_path / "d", seq_len=8, batch_rows=12, micro_rows=12)
    batches = functools.partial(validation_batches, tmp_path / "d", seq_len=8, rows=1)
    line = data.describe_run(loader, batches(), 50)  # 600 rows of 65
    assert line == "training reads 9.2 epochs of 65 rows of 8 tokens; validation compares 52 tokens: 6.5 rows of 8"
    line = data.describe_run(loader, batches(max_tokens=16), 5)
    assert line.startswith("training reads 60 of 65 rows of 8 tokens; validation compares 16 tokens: 2.0 rows of 8, so")
    assert "noise" in line and "more text" in line
    loader.close()
