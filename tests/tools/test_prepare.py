"""tools/prepare.py, tools/sources.py and tools/shards.py: text to shards. CPU, no network: `pytest tests/tools/test_prepare.py`."""

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from test_data import make_shards  # noqa: E402

import data  # noqa: E402
import tokenizer  # noqa: E402
from cli import UserError  # noqa: E402
from data import load_meta  # noqa: E402
from tools import prepare, shards, sources  # noqa: E402

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def cli(*words, expect=0, **env):
    """Run data.py as a user does; returns its CompletedProcess."""
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **OFFLINE, **env},
    )
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


# ---------------------------------------------------------------------------------------------------------------------
# The split and the python source


def test_missing_ranks_are_one_sentence(tmp_path):
    done = cli(
        "--source",
        "python",
        "--out",
        tmp_path / "o",
        expect=1,
        TIKTOKEN_CACHE_DIR=str(tmp_path / "none"),
        HTTPS_PROXY="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert "gpt2" in sentence(done) and "--encoding bytes" in sentence(done) and not list(tmp_path.iterdir())


def test_split_hash_is_the_contract():
    assert sources.split_hash(b"torch/nn/modules/linear.py") == 0x2A19D05E5B981696
    assert sources.split_hash(b"torch/nn/modules/linear.py", 7) == 0x03AC18EBDC17DEAD
    assert sources.split_hash(b"a") == int.from_bytes(hashlib.sha256(b"a").digest()[:8], "big")
    assert 150 < sum(sources.split_hash(b"%d" % i) % 50 == 0 for i in range(10_000)) < 250


def test_split_does_not_depend_on_order(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    held_out = []
    for name, order in (("a", lines), ("b", lines[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(order))
        cli("--source", "files", "--encoding", "bytes", "--path", tmp_path / f"{name}.jsonl", "--out", tmp_path / name)
        held_out.append({bytes(ids) for ids in documents(tmp_path / name, "val")})
    assert (
        held_out[0]
        == held_out[1]
        == {b"document %d" % i for i in range(400) if sources.split_hash(b"document %d" % i) % 50 == 0}
    )


def test_python_source_on_a_small_torch(tmp_path, monkeypatch, capsys):
    site = tmp_path / "site-packages"
    files = {f"torch/sub/m{i}.py": b"x = %d\n" % i for i in range(200)} | {
        "torch/__init__.py": b"",
        "torch/a.py": b"pass\n",
    }
    for name, body in (files | {"torch/version.py": b"no", "torch/x.txt": b"no", "other/y.py": b"no"}).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(body)
    order = sorted(files)
    pairs, digest = sources.list_python_corpus(site)
    assert [name for name, _ in pairs] == order
    assert digest == hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] for name in order)).hexdigest()

    monkeypatch.setattr(
        sources.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(site / name / "__init__.py")})
    )
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
    assert (meta["source"], meta["encoding"], meta["vocab_size"], meta["eot_token"], meta["split_seed"]) == (
        "python",
        "bytes",
        257,
        256,
        0,
    )
    assert meta["token_bytes"] == [1] * 256 + [0]
    for split in ("train", "val"):
        tokens, docs = sum(len(shard) for _, shard in data.open_split(out, split)), documents(out, split)
        assert meta["splits"][split] == {
            "documents": len(docs),
            "tokens": tokens,
            "bytes": tokens - len(docs),
        } and tokens > len(docs)
    for shard in meta["shards"]:
        assert shard["sha256"] == hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
    text = b"".join(bytes(ids) for ids in documents(out, "val"))
    assert meta["compressed_bytes"] == len(text)
    assert meta["gzip_bpb"] == 8 * len(gzip.compress(text, 9)) / len(text) and meta["xz_bpb"] == 8 * len(
        lzma.compress(text, preset=9)
    ) / len(text)

    before = (out / "meta.json").stat().st_mtime_ns
    assert "is ready" in cli(*command).stdout and (out / "meta.json").stat().st_mtime_ns == before
    assert "remove it or choose another --out" in sentence(
        cli(*command[:-2], "--split_seed", 3, "--out", out, expect=1)
    )
    (out / "python_train_000001.bin").unlink()
    with pytest.raises(UserError, match="python_train_000001.bin"):
        data.open_split(out, "train")


def test_this_torch_is_pinned():
    if sources.torch_version() not in sources.TORCH_CORPUS:
        pytest.skip(f"torch {sources.torch_version()} is not pinned")
    assert (
        sources.list_python_corpus(Path(torch.__file__).parents[1])[1] == sources.TORCH_CORPUS[sources.torch_version()]
    )


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
    (folder / "ignored.bin").write_bytes(b"\0no")
    cli("--source", "files", "--encoding", "bytes", "--path", folder, "--out", tmp_path / "out")
    assert texts(tmp_path / "out") == sorted(
        [
            b"a single\ndocument\n",
            b"first\n",
            b"second <|endoftext|> inside\n",
            b"row 0",
            b"row 1",
            b"gz\n",
            b"gz again\n",
            "xz é".encode() + b"\xed\xa0\x80",  # a surrogate, counted as bytes that are not UTF-8
            b"zst\n",
            b"parquet 0",
            b"parquet 1",
        ]
    )


def test_long_text_streams_in_whole_characters(tmp_path):
    (tmp_path / "long.txt").write_text("x" + "é" * 400_000 + "\n" + "line\n" * 100_000, encoding="utf-8")
    with open(tmp_path / "long.txt", "rb") as file:
        pieces = [body for _, body in sources.read_text(file, "long.txt")]
    assert b"".join(pieces) == (tmp_path / "long.txt").read_bytes() and len(pieces) > 4
    assert max(map(len, pieces)) <= 2 * sources.PIECE_BYTES and all(piece.decode() is not None for piece in pieces)


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
    monkeypatch.setattr(sources, "PIECE_BYTES", piece)
    monkeypatch.setattr(sources, "READ_BYTES", read)
    random = np.random.default_rng(0)
    parts = [
        "\n",
        "\n",
        "a<|endoftext|>b",
        "\n<|endoftext|>\n",
        "\n \t<|endoftext|> \r\n",
        "word ",
        "\u20ac\u4e2d\U0001f600",
        "x" * 17,
        "\r\n",
    ]
    for _ in range(300):
        text = "".join(random.choice(parts, random.integers(0, 40))).encode()
        found = [body for _, body in sources.read_text(io.BytesIO(text), "here")]
        assert [body for body in found if body] == [body for body in slow_text_documents(text, piece) if body], text


def test_separator_lines_are_those_of_the_regular_expression():
    random, parts = np.random.default_rng(0), ["<|endoftext|>", "\n", " ", "\t", "x", "\r", "\r\n"]
    for _ in range(3000):
        text = "".join(random.choice(parts, random.integers(0, 14))).encode()
        for end in (len(text), text.rfind(b"\n") + 1):
            found = [line.span() for line in sources.separator_lines(text, end)]
            assert found == [line.span() for line in sources.SEPARATOR_LINE.finditer(text, 0, end)], text


def test_small_corpus_still_gets_a_validation_document(tmp_path):
    bodies = [b"%d " % i * 20 for i in range(8)]
    assert all(sources.split_hash(body) % 50 for body in bodies)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": body.decode()}) + "\n" for body in bodies))
    cli(
        "--source",
        "files",
        "--encoding",
        "bytes",
        "--path",
        tmp_path / "a.jsonl",
        "--shard_tokens",
        50,
        "--out",
        tmp_path / "out",
    )
    held_out = min(bodies, key=sources.split_hash)
    assert [bytes(ids) for ids in documents(tmp_path / "out", "val")] == [held_out]
    assert [bytes(ids) for ids in documents(tmp_path / "out", "train")] == [body for body in bodies if body != held_out]
    assert max(shard["tokens"] for shard in load_meta(tmp_path / "out")["shards"]) == 50
    (tmp_path / "b.txt").write_text("one document")
    said = sentence(
        cli("--source", "files", "--encoding", "bytes", "--path", tmp_path / "b.txt", "--out", tmp_path / "b", expect=1)
    )
    assert "too few documents: nothing is left to train on" in said
    assert not (tmp_path / "b").exists()


def test_tokens_field(tmp_path):
    rows = [[256, 1, 2, 256], [3, 256, 4], [], [256], [0x0A20], [5] * 9]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows[:4] + rows[5:]))
    command = (
        "--source",
        "files",
        "--encoding",
        "bytes",
        "--path",
        tmp_path / "t.jsonl",
        "--out",
        tmp_path / "out",
        "--tokens-field",
    )
    cli(*command, "input_ids")
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == [
        [1, 2],
        [3],
        [4],
        [5] * 9,
    ]
    assert sources.has_text((b" \n", np.array([0x0A20], np.uint16)))  # whitespace as bytes, a token as an id
    (tmp_path / "t.jsonl").write_text('{"input_ids": [1, 257]}\n')
    wrong = sentence(cli(*command[:-2], tmp_path / "bad", command[-1], "input_ids", expect=1))
    assert "t.jsonl, line 1" in wrong and "256" in wrong
    assert "it has: input_ids" in sentence(cli(*command[:-2], tmp_path / "bad", command[-1], "ids", expect=1))


@pytest.mark.parametrize(
    "name, body, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "no field 'text'.*body"),
        ("a.jsonl", b'{"text": 3}', "int, not text"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "a.txt.gz cannot be read"),
        ("a.txt.xz", b"not xz", "a.txt.xz cannot be read"),
        ("a.txt.zst", b"not zst", "a.txt.zst cannot be read"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, name, body, message):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(SystemExit) as stop:
        prepare.main(
            ["--source", "files", "--encoding", "bytes", "--path", str(tmp_path / name), "--out", str(tmp_path / "out")]
        )
    assert stop.value.code == 1 and not (tmp_path / "out").exists()
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured


def test_hf_reads_a_local_folder(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [f"hub row {i}" for i in range(120)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in [*rows, None, ""]))
    command = ("--source", "hf", "--dataset", tmp_path / "set", "--encoding", "bytes", "--out", tmp_path / "out")
    cli(*command, "--text_field", "body", HF_HOME=str(tmp_path / "hf"))
    assert texts(tmp_path / "out") == sorted(row.encode() for row in rows)
    assert load_meta(tmp_path / "out")["empty_documents"] == 2
    wrong = sentence(
        cli(
            "--source",
            "hf",
            "--dataset",
            "nobody/nothing",
            "--encoding",
            "bytes",
            "--out",
            tmp_path / "no",
            expect=1,
            HF_HOME=str(tmp_path / "hf"),
        )
    )
    assert "nobody/nothing cannot be read" in wrong and not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Files by content, and text that is not UTF-8


def prepare_files(capsys, out: Path, *words, encoding="bytes") -> tuple[dict, str]:
    """Run data.py in this process: (meta.json, what is printed to stderr)."""
    common = ["--source", "files", "--encoding", encoding, "--num_proc", "1", "--out", out]
    prepare.main([*map(str, common), *map(str, words)])
    return load_meta(out), capsys.readouterr().err


def refusal(capsys, out: Path, *words, encoding="bytes") -> str:
    with pytest.raises(SystemExit) as stop:
        prepare_files(capsys, out, *words, encoding=encoding)
    assert stop.value.code == 1 and not out.exists()
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.py: error: ")]
    return line


KEPT = {"a.py": b"pass\n", "b.rst": b"Title\n", "deep/c.tex": b"x^2\n", "deep/d": b"word\n", "d.html": b"<p>\n",
        "E.TXT": b"E\n", "Makefile": b"all:\n"}  # fmt: skip


def test_every_file_that_is_text_is_read_and_others_are_counted(tmp_path, capsys):
    folder = tmp_path / "src"
    others = {".env": b"secret", ".git/config": b"x", "e.py": b"", "f.png": b"\x89PNG\0", "g": b"\1\2\3 text"}
    for name, body in (KEPT | others).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    make_shards(folder / "old", [100])
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    out = folder / "out"  # inside of what is read
    meta, printed = prepare_files(capsys, out, "--path", folder)
    assert texts(out) == sorted(KEPT.values()) and meta["files"] == len(KEPT)
    assert meta["left_out"] == {"binary": 2, "empty": 1, "hidden files": 1, "hidden folders": 1, "folders of shards": 1,
                                "links to folders": 1, "special files or broken links": 1}  # fmt: skip
    assert "files: files read 7; left out: binary 2, empty 1, folders of shards 1, hidden files 1" in printed
    prepare.main(["--source", "files", "--encoding", "bytes", "--path", str(folder), "--out", str(out)])
    assert "is ready" in capsys.readouterr().out

    meta, _ = prepare_files(capsys, tmp_path / "some", "--path", folder, "--glob", "*.py", "deep/*", "*.rst")
    assert texts(tmp_path / "some") == sorted(KEPT[name] for name in ("a.py", "b.rst", "deep/c.tex", "deep/d"))
    assert meta["left_out"]["outside --glob"] == 5 and meta["left_out"]["empty"] == 1
    line = refusal(capsys, tmp_path / "no", "--path", folder, "--glob", "*.txt")
    assert "holds no file to read" in line and "outside --glob 10" in line

    out = prepare_domains(tmp_path, "--path", f"code={folder}", f"page={folder}", "--glob", "*.*", out="mixture")
    assert texts(out / "code") == texts(out / "page") == sorted(KEPT[name] for name in KEPT if "." in name)


UNICODE = "na\u00efve \u4e2d\u6587 \U0001f600\r\nline\n" * 9000


def test_archives_are_read_as_the_folders_they_hold(tmp_path, capsys):
    names = "a.py", "pkg/b.py", "pkg/notes.md", "pkg/rows.jsonl", "pkg/table.json.gz", ".hidden/c.py", "pkg/image.png"
    folder, wheels = tmp_path / "folder", tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "pkg-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            path, text = folder / name, f"text of {name} ".encode() * 100
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"text": text.decode()}).encode() if path.suffix == ".jsonl" else text
            text = gzip.compress(text) if path.suffix == ".gz" else text + b"\0" * (path.suffix == ".png")
            path.write_bytes(text)
            archive.writestr(name, text)
    ours, _ = prepare_files(capsys, tmp_path / "of_archive", "--path", wheels)
    theirs, _ = prepare_files(capsys, tmp_path / "of_folder", "--path", folder)
    assert [shard["sha256"] for shard in ours["shards"]] == [shard["sha256"] for shard in theirs["shards"]]
    assert ours["files"] == 5 and ours["left_out"] == {"binary": 1, "hidden files": 1}

    globbed, _ = prepare_files(capsys, tmp_path / "glob", "--path", wheels, "--glob", "*.md", "pkg/*.py")
    joined = b"".join(texts(tmp_path / "glob"))
    assert [name for name in names if f"text of {name}".encode() in joined] == ["pkg/b.py", "pkg/notes.md"]
    assert globbed["left_out"] == {"hidden files": 1, "outside --glob": 4}
    prepare.main(["--source", "files", "--encoding", "bytes", "--path", str(wheels), "--out", str(tmp_path / "of_archive")])
    assert "is ready" in capsys.readouterr().out

    (wheels / "damaged.zip").write_bytes((wheels / "pkg-1.0-py3-none-any.whl").read_bytes()[:-100])
    assert "damaged.zip cannot be read (File is not a zip file)" in refusal(capsys, tmp_path / "no", "--path", wheels)


def test_an_archive_whose_member_is_damaged_is_named(tmp_path, capsys):
    path = tmp_path / "code.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", b"x = 1\n" * 100)
    path.write_bytes(path.read_bytes().replace(b"x = 1\nx = 1", b"x = 2\nx = 2", 1))
    assert "code.zip/a.py cannot be read (Bad CRC-32" in refusal(capsys, tmp_path / "no", "--path", path)


@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_is_honoured_and_dropped(tmp_path, capsys, name):
    encode = lambda text: (text if name in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff" + text).encode(name)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(encode(UNICODE))
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(encode("compressed\n")))
    rows = [{"text": f"row {i} \u2028 \u00e9"} for i in range(9)]
    (tmp_path / "in" / "c.jsonl").write_bytes(encode("\n".join(json.dumps(row, ensure_ascii=False) for row in rows)))
    meta, printed = prepare_files(capsys, tmp_path / "out", "--path", tmp_path / "in")
    found = [text.decode() for text in texts(tmp_path / "out")]
    assert {"compressed\n", *(row["text"] for row in rows)} < set(found) and "not_utf8" not in meta
    assert sorted("".join(found)) == sorted(UNICODE + "compressed\n" + "".join(row["text"] for row in rows))


def test_bytes_that_are_not_utf8_are_counted_and_named(tmp_path, capsys, gpt2):
    (tmp_path / "a.txt").write_text("plain caf\u00e9\n" * 20)
    (tmp_path / "b.txt").write_bytes("caf\u00e9 d\u00e9j\u00e0\n".encode("latin-1") * 20)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "caf\xe9 in a row"}\n{"text": "\\ud83d alone"}\n{"text": null}\n{"text": " "}')
    paths = ["--path", *(tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl"))]
    found = {"bytes": 60 + 1 + 3, "documents": 3, "first": str(tmp_path / "b.txt")}
    whole = b"".join((tmp_path / name).read_bytes() for name in ("a.txt", "b.txt"))

    meta, printed = prepare_files(capsys, tmp_path / "bytes", *paths)
    assert meta["not_utf8"] == found | {"replaced": False} and meta["empty_documents"] == 2
    assert "warning: files: 64 bytes that are not UTF-8 are kept" in printed and f"the first in {tmp_path / 'b.txt'}" in printed
    assert "null or blank documents left out: 2" in printed
    kept = texts(tmp_path / "bytes")
    assert {b"caf\xe9 in a row", b"\xed\xa0\xbd alone"} < set(kept)
    assert sum(map(len, kept)) == len(whole) + 13 + 9 == sum(split["bytes"] for split in meta["splits"].values())

    meta, printed = prepare_files(capsys, tmp_path / "gpt2", *paths, encoding="gpt2")
    assert meta["not_utf8"] == found | {"replaced": True} and "U+FFFD" in printed and "iconv" in printed
    ids = [document for split in ("train", "val") for document in documents(tmp_path / "gpt2", split)]
    assert sum(gpt2.decode(document).count("\ufffd") for document in ids) == 64


def test_binary_files_are_kept_as_bytes_and_refused_as_text(tmp_path, capsys, gpt2):
    contents = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(contents)
    meta, _ = prepare_files(capsys, tmp_path / "out", "--path", tmp_path / "a.txt")
    assert sum(split["bytes"] for split in meta["splits"].values()) == 20_000
    pieces = texts(tmp_path / "out")
    assert contents in {b"".join(pieces), b"".join(pieces[::-1])}
    line = refusal(capsys, tmp_path / "no", "--path", tmp_path / "a.txt", encoding="gpt2")
    assert "a.txt is not UTF-8 text" in line and "iconv" in line and "--encoding bytes" in line
    russian = "\u0442\u0435\u043a\u0441\u0442 ".encode("koi8-r") * 99
    for name, body in {"koi8.txt": russian, "a.txt": b"one\n", "b.txt": b"two\n", "c.txt": contents}.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(body)
    meta, _ = prepare_files(capsys, tmp_path / "kept", "--path", tmp_path / "in")
    assert sorted(b"".join(texts(tmp_path / "kept"))) == sorted(russian + b"one\ntwo\n")
    assert meta["left_out"] == {"binary": 1} and meta["not_utf8"]["replaced"] is False
    meta, _ = prepare_files(capsys, tmp_path / "text", "--path", tmp_path / "in", encoding="gpt2")
    assert meta["left_out"] == {"binary": 1, "not UTF-8": 1} and meta["files"] == 2
    (tmp_path / "a.txt").write_bytes("UTF-16 without a mark".encode("utf-16-le") * 9)
    assert "a.txt is not UTF-8 text" in refusal(capsys, tmp_path / "no", "--path", tmp_path / "a.txt", encoding="gpt2")


def test_parquet_columns_with_nulls_and_bytes(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet

    bodies = [b"plain", None, b"\xef\xbb\xbfmarked", "wide \u00e9".encode("utf-16"), b"caf\xe9", b""]
    pyarrow.parquet.write_table(pa.table({"text": pa.array(bodies, pa.binary())}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["text", None, "more"]}), tmp_path / "b.parquet")
    meta, printed = prepare_files(capsys, tmp_path / "out", "--path", tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert texts(tmp_path / "out") == sorted([b"plain", b"marked", "wide \u00e9".encode(), b"caf\xe9", b"text", b"more"])
    assert meta["empty_documents"] == 3 and "left out: 3" in printed
    assert meta["not_utf8"] == {"bytes": 1, "documents": 1, "first": str(tmp_path / "a.parquet"), "replaced": False}
    pyarrow.parquet.write_table(pa.table({"ids": pa.array([[1, 2], None, [3]])}), tmp_path / "c.parquet")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "c.parquet").rename(tmp_path / "tokens" / "c.parquet")
    (tmp_path / "tokens" / "README.md").write_text("about the ids")
    meta, _ = prepare_files(capsys, tmp_path / "ids", "--path", tmp_path / "tokens", "--tokens_field", "ids")
    assert texts(tmp_path / "ids") == [b"\1\2", b"\3"] and meta["empty_documents"] == 1
    assert meta["left_out"] == {"without fields": 1} and meta["files"] == 1


def test_reading_parquet_holds_one_group_of_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    text = np.random.default_rng(0).integers(97, 123, (640, 2**15)).astype(np.uint8)
    table = pa.table({"text": [row.tobytes().decode() for row in text]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=32)
    del table
    documents, _ = sources.read_files([tmp_path / "a.parquet"], tokenizer.get_encoding("bytes"))
    arrow_before, arrow_peak, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()  # of the blocks that are read from a file of Python
    for _ in documents:
        arrow_peak, count = max(arrow_peak, pa.total_allocated_bytes() - arrow_before), count + 1
    peak = arrow_peak + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 640 and peak < text.size / 2, peak


# ---------------------------------------------------------------------------------------------------------------------
# Validation of little text


def test_a_file_loses_little_to_validation(tmp_path, capsys):
    """One file of 665 kB is three documents; a part of one is enough."""
    lines = "".join(f"line {i} of the file\n" for i in range(29_500))
    (tmp_path / "a.txt").write_text(lines)
    meta, printed = prepare_files(capsys, tmp_path / "out", "--path", tmp_path / "a.txt")
    train, val = ([bytes(ids) for ids in documents(tmp_path / "out", split)] for split in ("train", "val"))
    assert 0.01 < sum(map(len, val)) / len(lines) < 0.03 and "warning" not in printed
    assert sorted(b"".join(train + val).splitlines()) == sorted(lines.encode().splitlines())  # cut at ends of lines
    assert meta["splits"]["val"]["bytes"] == meta["compressed_bytes"] == sum(map(len, val))
    text = b"".join(val)
    assert meta["gzip_bpb"] == 8 * len(gzip.compress(text, 9)) / len(text)
    limited, _ = prepare_files(capsys, tmp_path / "some", "--path", tmp_path / "a.txt", "--max_tokens", 200_000)
    assert sum(split["tokens"] for split in limited["splits"].values()) == 200_000


def test_a_large_document_of_validation_is_cut(tmp_path, capsys):
    numbers = range(1000)
    chosen = next(text for i in numbers if sources.split_hash(text := b"%d\n" % i * 60_000) % 50 == 0)
    other = next(text for i in numbers if sources.split_hash(text := b"%d\n" % i * 20_000) % 50)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in (chosen, other)))
    meta, _ = prepare_files(capsys, tmp_path / "out", "--path", tmp_path / "a.jsonl")
    share = meta["splits"]["val"]["bytes"] / (len(chosen) + len(other))
    assert 0.01 < share < 0.06 and chosen.startswith(texts_of(tmp_path / "out", "val")[0].encode())
    assert sum(split["bytes"] for split in meta["splits"].values()) == len(chosen) + len(other)
    assert len(meta["shards"]) == len(list((tmp_path / "out").glob("*.bin"))) == 2
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": chosen.decode()}))  # nothing but validation, by its hash
    meta, _ = prepare_files(capsys, tmp_path / "one", "--path", tmp_path / "a.jsonl", "--shard_tokens", 50_000)
    assert meta["splits"]["train"]["bytes"] + meta["splits"]["val"]["bytes"] == len(chosen)
    assert 0.01 < meta["splits"]["val"]["bytes"] / len(chosen) < 0.06
    assert {shard["file"] for shard in meta["shards"]} == {path.name for path in (tmp_path / "one").glob("*.bin")}


def test_a_small_validation_set_is_said_with_its_number(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(f"document {i}" for i in range(40)))
    meta, printed = prepare_files(capsys, tmp_path / "out", "--path", tmp_path / "a.txt")
    compared = meta["splits"]["val"]["tokens"] - 1
    assert f"warning: files: validation compares {compared} tokens: 0.0 rows of 1,024" in printed and 5 < compared < 60


def test_rows_of_the_warning_are_those_of_preset_cpu():
    import train_muon

    assert shards.ROW_TOKENS == train_muon.PRESETS["cpu"].seq_len


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb


def test_fineweb_without_network(tmp_path):
    done = cli("--out", tmp_path / "fineweb", expect=1, HF_HOME=str(tmp_path / "hf"))
    assert "fineweb_val_000000.bin cannot be downloaded" in sentence(done) and "run the same command again" in sentence(
        done
    )
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
    run = functools.partial(
        cli,
        "--source",
        "fineweb",
        "--shards",
        2,
        "--out",
        out,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path / "hf"),
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
    )
    try:
        assert "fineweb_train_000002.bin is damaged" in sentence(run(expect=1)) and not out.exists()
        (served / "fineweb_train_000002.bin").write_bytes(whole)
        run()
    finally:
        server.shutdown()
        server.server_close()
    assert [name for command, name in asked if command == "GET"].count(
        "fineweb_train_000001.bin"
    ) == 1  # not fetched again
    for path in served.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    meta = load_meta(out)
    assert (
        len(meta["token_bytes"]) == 50257
        and meta["splits"]["train"]["tokens"] == 5000
        and not list(out.glob("download"))
    )
    assert "gpt2" in sentence(cli("--encoding", "bytes", "--out", tmp_path / "b", expect=1))


# ---------------------------------------------------------------------------------------------------------------------
# Processes, interruption, flags


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["gpt2", "bpe"])
def test_neither_processes_nor_gigatoken_change_the_shards(tmp_path, gpt2, encoding):
    """Every file is equal, byte by byte, meta.json too."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"def f{i}(x): return {i} * x\n" * (i % 90)}) + "\n" for i in range(1200))
    )
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "gigatoken.py").write_text("raise ImportError")
    words = ["--source", "files", "--path", tmp_path / "a.jsonl", "--encoding", encoding]
    cli(*words, "--num_proc", 2, "--out", tmp_path / "2", PYTHONPATH=str(tmp_path / "without"))
    cli(*words, "--out", tmp_path / "fast")
    made = lambda name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert made("fast") == made("2")
    if encoding == "bpe":
        return
    cli(*words, "--num_proc", 1, "--out", tmp_path / "1", PYTHONPATH=str(tmp_path / "without"))
    one = load_meta(tmp_path / "1")
    assert made("1") == made("2") and len(one["shards"]) == 2 and one["splits"]["train"]["bytes"] > 2 * shards.CHUNK
    first = next(json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:])
    assert gpt2.decode(documents(tmp_path / "1", "train")[0]) == first


def test_a_bpe_is_trained_on_a_sample_of_training_documents_from_everywhere():
    bodies = [b"%05d" % i for i in range(2000)]
    train = [body for body in bodies if sources.split_hash(body, 7) % 50]
    chosen = lambda max_bytes, max_read=10**9: list(
        shards.training_texts(((body, body) for body in bodies), 7, max_bytes, max_read)
    )
    assert sorted(chosen(10**9)) == [body.decode() for body in train]
    assert sorted(chosen(10**9, 500)) == [body.decode() for body in train[:100]], "reading ends after 500 bytes"
    found = [int(text) for text in chosen(1000)]
    assert len(found) == 200 and found == [int(text) for text in chosen(1000)]
    assert all(25 <= sum(i // 500 == quarter for i in found) <= 75 for quarter in range(4)), "50 of each quarter expected"
    assert chosen(3) and len(chosen(3)) == 1, "a document larger than the sample is better than none"


def test_reading_never_runs_far_ahead_of_writing(gpt2):
    read = 0

    def source():
        nonlocal read
        for i in range(400):
            read += 1
            body = b"%d " % i * (shards.CHUNK // 40)
            yield body, body

    gpt2.is_fast = False  # as without gigatoken
    encoded, furthest = shards.encode_documents(source(), gpt2, 2, 0), 0
    for written, (_, ids) in enumerate(encoded):
        assert gpt2.decode(ids[:40]).startswith(f"{written} {written} ")
        furthest = max(furthest, read - written)
        if written == 100:
            break
    encoded.close()
    assert 20 < furthest < 120 and read < 300  # 4 chunks of about 14 documents, of 400


def test_two_processes_do_not_fill_one_folder(tmp_path):
    """The second is refused, the first goes on; a killed one leaves no lock."""
    os.mkfifo(tmp_path / "a.txt")
    command = [sys.executable, ROOT / "data.py", "--source", "files", "--encoding", "bytes", "--out", tmp_path / "out", "--path"]
    first = subprocess.Popen([*map(str, command), tmp_path / "a.txt"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"text of the first\n" * 1000)
        (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\n")
        said = sentence(cli(*command[2:], tmp_path / "b.txt", expect=1))
        assert f"out.partial is being filled by process {first.pid} on " in said and "another --out" in said
        assert (tmp_path / "out.partial").exists() and first.poll() is None
        first.kill()
        first.wait(timeout=30)
    cli(*command[2:], tmp_path / "b.txt")
    assert texts(tmp_path / "out") == [b"one\n", b"two\n"]
    assert not {".preparing"} & {path.name for path in (tmp_path / "out").iterdir()} and not (tmp_path / "out.partial").exists()


def test_the_second_of_two_processes_finds_the_folder_ready(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    words = ["--source", "files", "--encoding", "bytes", "--path", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    prepare.main(words)
    first_look, found = prepare.ready_line, []

    def late(*arguments):
        found.append(first_look(*arguments))
        return found[-1] if len(found) > 1 else None  # at the first look, the other process has not finished

    monkeypatch.setattr(prepare, "ready_line", late)
    prepare.main(words)
    assert "is ready" in capsys.readouterr().out and len(found) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_meta_json_describes_what_was_written(tmp_path, monkeypatch):
    """What happens to a shard afterwards is found by training, as its sha256 differs."""
    write, written = shards.write_shard, {}

    def write_and_damage(path, tokens):
        digest = write(path, tokens)
        written[path.name] = {"file": path.name, "tokens": len(tokens), "sha256": digest}
        write(path, tokens[::-1])
        return digest

    monkeypatch.setattr(shards, "write_shard", write_and_damage)
    prepare.main("--source arithmetic --encoding bytes --max_tokens 9000 --out".split() + [str(tmp_path / "out")])
    meta = load_meta(tmp_path / "out")
    assert {shard["file"]: shard for shard in meta["shards"]} == written and len(written) == 2
    with pytest.raises(UserError, match="does not match the sha256"):
        data.verify(tmp_path / "out")


def test_files_that_data_py_did_not_make_are_not_removed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    words = ("--path", tmp_path / "a.txt")
    line = refusal(capsys, tmp_path / "out", *words)
    assert "out.partial was not made by data.py" in line and "move it" in line
    (tmp_path / "out.partial" / prepare.MARKER).touch()  # begun by data.py; a file was added since
    data.write_shard(tmp_path / "out.partial" / "files_train_000001.bin", [1, 2])
    assert "out.partial holds files that data.py did not make" in refusal(capsys, tmp_path / "out", *words)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_failed_preparations_remove_what_they_made(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 2000 + "broken")
    words = ("--path", tmp_path / "a.jsonl", "--shard_tokens", 1000)
    assert "line 2001 is not JSON" in refusal(capsys, tmp_path / "new" / "deep" / "out", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    with pytest.raises(SystemExit):
        prepare_domains(tmp_path, "--path", f"birds={write_text(tmp_path, 'birds')}", f"stars={tmp_path / 'a.jsonl'}")
    assert "what is complete stays in" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == [prepare.MARKER, "birds"]
    with pytest.raises(SystemExit):
        prepare_domains(tmp_path, "--path", f"stars={tmp_path / 'a.jsonl'}", out="other")
    assert not list(tmp_path.glob("other*"))


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


def test_worker_errors_reach_the_user(gpt2):
    gpt2.is_fast = False  # as without gigatoken
    with pytest.raises(ValueError, match="word"):
        list(shards.encode_documents([(b"key", np.array(["word"]))], gpt2, 2, 0))
    with pytest.raises(UserError, match="smaller --num_proc"):
        list(shards.encode_documents([(Bomb(), b"text")], gpt2, 2, 0))


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_at_most_partial_and_starts_over(tmp_path, gpt2, kill):
    fifo = tmp_path / "a.txt"
    os.mkfifo(fifo)  # a corpus that never ends
    command = [
        sys.executable,
        ROOT / "data.py",
        "--source",
        "files",
        "--path",
        fifo,
        "--num_proc",
        "2",
        "--out",
        tmp_path / "out",
    ]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores Ctrl-C
    process = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds
    )
    with open(fifo, "wb") as file:
        for i in range(12):
            file.write(b"some words %d\n" % i * 20_000)
        (os.killpg if kill == signal.SIGINT else os.kill)(
            process.pid, kill
        )  # a terminal's Ctrl-C reaches the workers too
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors and process.returncode == (130 if kill == signal.SIGINT else -kill)
    left = ["a.txt"] if kill == signal.SIGINT else ["a.txt", "out.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
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


@pytest.mark.parametrize(
    "words, message",
    [
        (["--source", "books"], "'fineweb', 'hf', 'files', 'python'"),
        (["--sourc", "python"], "unrecognized"),
        (["--max_tokens", "many"], "whole number from 2"),
        (["--source", "python", "--shards", "3"], "--shards does not apply to --source python"),
        (["--source", "files"], "needs --path"),
        (["--source", "hf", "--dataset", "d", "--text_field", "a", "--tokens_field", "b"], "not allowed with"),
    ],
)
def test_bad_flags_exit_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        prepare.parse(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("closing", ["2>&1 | head -c 1", ">&- 2>&-"])
def test_a_closed_terminal_ends_no_preparation(tmp_path, closing):
    command = f"{sys.executable} {ROOT}/data.py --source arithmetic --encoding bytes --max_tokens 300000 --out out"
    done = subprocess.run(["bash", "-c", f"{command} {closing}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, timeout=120)
    assert done.returncode == 0
    data.verify(tmp_path / "out")


def test_max_tokens_holds_without_a_progress_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    cli("--source", "arithmetic", "--encoding", "bytes", "--max_tokens", 4000, "--out", tmp_path / "out")
    assert sum(split["tokens"] for split in load_meta(tmp_path / "out")["splits"].values()) == 4000


def test_text_that_has_changed_is_not_called_ready(tmp_path):
    """Gone it may be; other text under the same name makes other shards."""
    text, command = (
        tmp_path / "a.txt",
        ("--source", "files", "--encoding", "bytes", "--path", tmp_path / "a.txt", "--out", tmp_path / "out"),
    )
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
    assert (
        done.returncode == 1
        and "needs tqdm: `pip install -r requirements.txt`" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.slow
def test_the_benchmark_of_tokenising_compares_the_ids_of_all_libraries(gpt2, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"The number {i} has the square {i * i}.\n" * 20)
    done = subprocess.run(
        [sys.executable, "benchmarks/tokenise.py", "--path", str(tmp_path), "--rounds", "1"],
        cwd=Path(data.__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("|")) == 9}
    assert {"data.py", "data.py without gigatoken", "tiktoken", "tokenizers"} <= set(rows), done.stderr
    assert all(rows[name][7] == " equal ids " for name in rows if name in ("data.py", "tokenizers", "gigatoken"))
    assert done.returncode == 0 and int(rows["data.py"][6]) > 10, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Domains


def test_a_domain_may_be_called_train_or_val(tmp_path):
    """The split is what a shard's name says last."""
    for name, count in (("math_train_v2", 60), ("b_val_x", 300)):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{name} {i}" for i in range(count)))
    paths = [f"{path.stem}={path}" for path in tmp_path.glob("*.txt")]
    cli("--source", "domains", "--encoding", "bytes", "--path", *paths, "--out", tmp_path / "out")
    for name, count in (("math_train_v2", 60), ("b_val_x", 300)):
        found = {
            split: [path.name for path, _ in data.open_split(tmp_path / "out" / name, split)]
            for split in ("train", "val")
        }
        assert found == {split: [f"{name}_{split}_00000{number}.bin"] for split, number in (("train", 1), ("val", 0))}
        splits = load_meta(tmp_path / "out" / name)["splits"]
        assert (
            splits["train"]["documents"] + splits["val"]["documents"] == count
            and splits["val"]["documents"] < count / 10
        )


def write_text(folder: Path, name: str, count: int = 120) -> Path:
    path = folder / f"{name}.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{name} number {i} says {i * i}" for i in range(count)))
    return path


def prepare_domains(tmp_path, *words, out="out") -> Path:
    prepare.main(["--source", "domains", "--encoding", "bytes", "--out", str(tmp_path / out), *map(str, words)])
    return tmp_path / out


def texts_of(folder, split="train") -> list[str]:
    ids = np.concatenate([tokens for _, tokens in data.open_split(folder, split)])
    return bytes(np.where(ids == 256, 0, ids).astype(np.uint8)).decode().strip("\0").split("\0")


def test_local_domains(tmp_path, capsys):
    paths = [f"{name}={write_text(tmp_path, name)}" for name in ("birds", "stars")]
    out = prepare_domains(tmp_path, "--path", *paths, f"birds={write_text(tmp_path, 'finches')}")
    meta = data.read_meta_json(out)
    assert list(meta["domains"]) == ["birds", "stars"] and meta["encoding"] == "bytes"
    birds = texts_of(out / "birds") + texts_of(out / "birds", "val")
    assert len(birds) == 240 and {text.split()[0] for text in birds} == {"birds", "finches"}
    assert meta["splits"]["train"]["documents"] == sum(
        meta["domains"][name]["splits"]["train"]["documents"] for name in meta["domains"]
    )
    assert (
        "is ready"
        in (prepare_domains(tmp_path, "--path", *paths, f"birds={tmp_path / 'finches.txt'}"), capsys.readouterr().out)[
            1
        ]
    )


def test_a_cut_off_mixture_goes_on_with_what_is_finished(tmp_path, monkeypatch):
    paths = [f"{name}={write_text(tmp_path, name)}" for name in ("birds", "stars")]
    tokenise, made = prepare.tokenise, []

    def failing(source, encoding, args, folder):
        made.append(args.source)
        if args.source == "stars" and made.count("stars") == 1:
            raise UserError("cut off")
        return tokenise(source, encoding, args, folder)

    monkeypatch.setattr(prepare, "tokenise", failing)
    with pytest.raises(SystemExit):
        prepare_domains(tmp_path, "--path", *paths)
    assert not (tmp_path / "out").exists()
    prepare_domains(tmp_path, "--path", *paths)
    assert made == ["birds", "stars", "stars"] and list(data.read_meta_json(tmp_path / "out")["domains"]) == [
        "birds",
        "stars",
    ]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["birds", "meta.json", "stars"]


def test_source_tag_is_in_front_of_every_document_and_moves_none(tmp_path):
    path = f"birds={write_text(tmp_path, 'birds')}"
    plain, tagged = (
        prepare_domains(tmp_path, "--path", path, out="plain"),
        prepare_domains(tmp_path, "--path", path, "--source_tag", out="tagged"),
    )
    for split in ("train", "val"):
        assert ["birds\n" + text for text in texts_of(plain / "birds", split)] == texts_of(tagged / "birds", split)


def test_the_hub_is_asked_for_what_the_table_says(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split, streaming):
        asked.append((name, subset, split, streaming))
        fields = [part.fields for parts in sources.DOMAINS.values() for part in parts if part.dataset == name][0]
        return ({field: f"{name} {field} {i}" if i % 3 else "" for field in fields} for i in itertools.count())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = prepare_domains(tmp_path, "--domains", "math", "chat", "--max_tokens", 4000)
    assert list(data.read_meta_json(out)["domains"]) == ["math", "chat"]
    assert [ask[:2] for ask in asked] == [("openai/gsm8k", "main"), ("databricks/databricks-dolly-15k", None)] and all(
        ask[3] for ask in asked
    )
    first = texts_of(out / "math")[0]
    assert first.splitlines() == ["openai/gsm8k question 1", "openai/gsm8k answer 1"], "empty rows are left out"
    assert sum(len(tokens) for split in ("train", "val") for _, tokens in data.open_split(out / "math", split)) == 4000
    assert data.read_meta_json(out)["domains"]["math"]["datasets"] == ["openai/gsm8k", "open-web-math/open-web-math"]


def test_the_six_domains():
    assert (
        list(sources.DOMAINS) == ["math", "python", "web", "science", "legal", "chat"]
        and 5e6 <= sources.DOMAIN_TOKENS <= 50e6
    )
    assert prepare.parse(["--source", "domains"]).path is None


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--path", "notes.txt"], "it is name=FILE"),
        (["--path", "a b=notes.txt"], "it is name=FILE"),
        (["--domains", "cooking"], "choose among math"),
        (["--path", "notes=gone.txt"], "gone.txt is not a file"),
        (["--path", "notes=gone.txt", "--domains", "code"], "choose among notes"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        prepare_domains(tmp_path, *words)
    err = capsys.readouterr().err.strip()
    assert status.value.code == 1 and sentence in err and err.count("\n") == 0
