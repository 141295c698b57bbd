"""The command line of data.py: flags, tokenising on every core, train and val shards, meta.json."""
import argparse
import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

import data
from data import (
    COMPRESSED_BYTES,
    ENCODINGS,
    GPT2,
    Compressors,
    DataError,
    explained,
    get_encoding,
    load_meta,
    open_split,
    read_meta,
    read_shard,
    seal,
    sha256_of,
    shard_paths,
    write_shard,
)
from tools.sources import (
    DOMAIN_TOKENS,
    DOMAINS,
    arithmetic_documents,
    download_fineweb,
    files_documents,
    files_in,
    hf_documents,
    hub_documents,
    python_documents,
    split_hash,
    tagged,
    torch_version,
)

# ---------------------------------------------------------------------------------------------------------------------
# Encoding documents on every core

CHUNK = 2**19  # bytes of text, or tokens, that go to a process at once


def start_worker(name):
    """Runs first in each process (a fresh interpreter, so it builds its own encoding)."""
    global worker_encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent leaves no orphans
    worker_encoding = get_encoding(name)


def encode_in_worker(chunk, split_seed):
    return encode_chunk(chunk, worker_encoding, split_seed)


def encode_chunk(chunk, encoding, split_seed):
    """[(split hash, ids)] of a list of documents; ids are uint16 and start with end-of-text."""
    bodies = [encoding.encode(body.decode("utf-8", "replace")) if isinstance(body, bytes) else body for _, body in chunk]
    return [(split_hash(key, split_seed), np.concatenate(([encoding.eot_token], ids), dtype=np.uint16, casting="unsafe"))
            for (key, _), ids in zip(chunk, bodies)]


def encode_documents(documents, encoding, num_proc, split_seed):
    """Yield (split hash, ids) in the order of the documents, whatever num_proc; at most 2*num_proc chunks are in memory."""
    def chunks():
        chunk, size = [], 0
        for document in documents:
            chunk.append(document)
            size += len(document[1]) + 64  # so that a million empty documents make a chunk too
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    if num_proc == 1 or encoding.name == "bytes":  # bytes cost less to encode than to send
        for chunk in chunks():
            yield from encode_chunk(chunk, encoding, split_seed)
        return
    context = multiprocessing.get_context("spawn")  # the same on Linux and Mac; safe beside threads
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (encoding.name,))
    killed = "a tokenising process was killed, most often for want of memory: run again with a smaller --num_proc"
    with explained(killed, BrokenProcessPool), contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = collections.deque()
        for chunk in chunks():  # not pool.map, which would read the whole input first
            waiting.append(pool.submit(encode_in_worker, chunk, split_seed))
            if len(waiting) == 2 * num_proc:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class ShardWriter:
    """Collects the tokens of one split and writes `<stem>_000001.bin`, ... of shard_tokens each."""

    def __init__(self, stem, number, shard_tokens):
        self.stem, self.number, self.paths, self.tokens = stem, number, [], 0
        self.buffer, self.filled = np.empty(shard_tokens, np.uint16), 0

    def add(self, ids):
        self.tokens += len(ids)
        while len(ids):
            taken = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            ids = ids[len(taken) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self):
        if self.filled:
            self.paths.append(Path(f"{self.stem}_{self.number + len(self.paths):06d}.bin"))
            write_shard(self.paths[-1], self.buffer[: self.filled])
            self.filled = 0


def tokenise(source, args, folder):
    """Write the train and val shards of a source of documents. Returns meta.json's entries."""
    from tqdm import tqdm
    encoding = get_encoding(args.encoding)
    documents, facts = source(args, encoding)
    folder.mkdir(parents=True)
    stem = folder / args.source
    train, val = ShardWriter(f"{stem}_train", 1, args.shard_tokens), ShardWriter(f"{stem}_val", 0, args.shard_tokens)
    compressors = Compressors()
    lowest, held_out, seen = (2**64, 0, 0), 0, 0  # (hash, start, stop) of the training document with the smallest hash; text in validation; tokens
    with tqdm(total=args.max_tokens, unit="tok", unit_scale=True, desc=args.source, mininterval=0.5) as bar, \
            contextlib.closing(encode_documents(documents, encoding, args.num_proc, args.split_seed)) as encoded:
        for hashed, ids in encoded:
            ids = ids[: args.max_tokens and args.max_tokens - seen]
            if hashed % 50 == 0:
                val.add(ids)
                held_out += len(ids) - 1
                if compressors.bytes < COMPRESSED_BYTES:
                    compressors.feed(encoding.decode_bytes(ids))
            else:
                if len(ids) > 1:
                    lowest = min(lowest, (hashed, train.tokens, train.tokens + len(ids)))
                train.add(ids)
            seen += len(ids)
            bar.update(len(ids))
            if seen == args.max_tokens:
                break
    train.flush()
    val.flush()
    if not held_out:
        train = hold_out(lowest[1], lowest[2], train, val)
    for writer, purpose in ((train, "train on"), (val, "validate with")):
        if not writer.tokens:
            raise DataError(f"source {args.source} gave too few documents: nothing is left to {purpose}; give more text, or separate its documents "
                            "by lines <|endoftext|>")
    return describe(folder, encoding, compressors if held_out else None) | facts


def hold_out(start, stop, train, val):
    """A corpus too small for the hash rule: move training tokens [start, stop), the document with the smallest hash, to validation."""
    rest, offset = ShardWriter(train.stem, train.number, len(train.buffer)), 0
    for shard in [read_shard(path) for path in train.paths]:  # a mapped file outlives its replacement
        begin, end = np.clip((start - offset, stop - offset), 0, len(shard))
        rest.add(shard[:begin])
        val.add(shard[begin:end])
        rest.add(shard[end:])
        offset += len(shard)
    rest.flush()
    val.flush()
    for path in train.paths[len(rest.paths) :]:
        path.unlink()
    return rest


def describe(folder, encoding, compressors=None):
    """meta.json's entries about finished shards, counted from the shards themselves. encoding None: GPT-2 without its ranks. compressors have
    seen the validation text already, if they are given."""
    fed, compressors = compressors is not None, compressors or Compressors()
    known = GPT2 if encoding is None else {"encoding": encoding.name, "vocab_size": encoding.vocab_size, "eot_token": encoding.eot_token}
    token_bytes = None if encoding is None else encoding.token_bytes()
    splits, shards = {}, []
    for split in ("train", "val"):
        count_V = np.zeros(known["vocab_size"], np.int64)
        for path in shard_paths(folder, split):
            tokens = read_shard(path)
            for start in range(0, len(tokens), 2**20):
                piece = tokens[start : start + 2**20]
                if piece.max() >= len(count_V):
                    raise DataError(f"{path} holds token id {piece.max()}, beyond the vocabulary of {known['encoding']}: remove it and run again")
                count_V += np.bincount(piece, minlength=len(count_V))
                if split == "val" and encoding is not None and not fed and compressors.bytes < COMPRESSED_BYTES:
                    compressors.feed(encoding.decode_bytes(piece))
            shards.append({"file": path.name, "tokens": len(tokens), "sha256": sha256_of(path)})
        splits[split] = {"documents": int(count_V[known["eot_token"]]), "tokens": int(count_V.sum()),
                         "bytes": None if encoding is None else int(count_V @ token_bytes)}
    return {**known, "splits": splits, **compressors.facts(), "shards": shards,
            "token_bytes": None if encoding is None else token_bytes.tolist()}


def write_meta(folder, meta):
    """meta.json, one entry to a line, with its own sha256."""
    meta = meta | {"sha256": seal(meta)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())  # token_bytes on one line too
    (folder / "meta.json").write_text("{\n" + lines + "\n}\n")


def fineweb(args, folder):
    """FineWeb's ready shards. Returns meta.json's entries."""
    download_fineweb(args, folder)
    try:
        encoding = get_encoding("gpt2")
    except DataError as error:
        print(f"note: no bytes per token and no gzip/xz figures in meta.json, so no bits per byte: {error}", file=sys.stderr)
        encoding = None
    return describe(folder, encoding)


def prepare_domains(args, folder):
    """A folder of shards for each domain. Those that are finished are kept when a run was cut off. Returns meta.json's entries."""
    paths = {}
    for word in args.path or []:
        name, equals, path = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", name) or not path:
            raise DataError(f"--path {word}: with --source domains it is name=FILE, and a name has letters, digits and _ only")
        paths.setdefault(name, []).append(path)
    names = args.domains or list(paths or DOMAINS)
    for name in names:
        if name not in (paths or DOMAINS):
            raise DataError(f"--domains {name}: choose among {', '.join(paths or DOMAINS)}" + ("" if paths else ", or say where it is with --path"))
    encoding, metas = get_encoding(args.encoding), {}
    for name in names:
        there = argparse.Namespace(**vars(args) | {"source": name, "path": paths.get(name), "max_tokens": args.max_tokens or
                                                   (None if paths else DOMAIN_TOKENS)})  # fmt: skip
        request = {flag: getattr(there, flag) for flag in ("source", "path", *TOKENISED, "source_tag") if flag != "num_proc"}
        request["inputs"] = stamps(there.path or [])
        done, part = folder / name, folder / f"{name}.partial"
        if not done.exists() or not was_asked(load_meta(done), request):
            for old in (done, part):
                shutil.rmtree(old, ignore_errors=True)
            source = files_documents if paths else hub_documents(DOMAINS[name])
            meta = {"source": name, "split_seed": args.split_seed, "request": request}
            write_meta(part, meta | tokenise(tagged(source, name) if args.source_tag else source, there, part))
            os.replace(part, done)
        metas[name] = read_meta(done)
    for stale in (path for path in folder.iterdir() if path.name not in names):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    total = {split: {key: sum(meta["splits"][split][key] for meta in metas.values()) for key in ("documents", "tokens", "bytes")}
             for split in ("train", "val")}  # fmt: skip
    facts = ("splits", "gzip_bpb", "xz_bpb", "request", "datasets", "sha256")
    known = {"encoding": encoding.name, "vocab_size": encoding.vocab_size, "eot_token": encoding.eot_token}
    return {**known, "splits": total, "compressed_bytes": None, "token_bytes": encoding.token_bytes().tolist(),
            "domains": {name: {key: meta[key] for key in facts if key in meta} for name, meta in metas.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# The command line

TOKENISED = ("encoding", "max_tokens", "shard_tokens", "num_proc", "split_seed")
SOURCES = {  # name: (function of the flags and a folder, the flags it uses)
    "fineweb": (fineweb, ("encoding", "shards")),
    "hf": (lambda *a: tokenise(hf_documents, *a), TOKENISED + ("dataset", "subset", "split_name", "text_field", "tokens_field")),
    "files": (lambda *a: tokenise(files_documents, *a), TOKENISED + ("path", "text_field", "tokens_field")),
    "python": (lambda *a: tokenise(python_documents, *a), TOKENISED),
    "arithmetic": (lambda *a: tokenise(arithmetic_documents, *a), TOKENISED),
    "domains": (prepare_domains, TOKENISED + ("domains", "path", "text_field", "tokens_field", "source_tag")),
}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULTS = {"encoding": "gpt2", "shards": 9, "shard_tokens": 100_000_000, "num_proc": CORES, "split_seed": 0, "split_name": "train",
            "text_field": "text"}


def parse(argv):
    def at_least(low, high=2**63):
        def number(text):
            if not text.replace("_", "").isdecimal() or not low <= int(text) < high:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high - 1}")
            return int(text)
        return number

    parser = argparse.ArgumentParser(prog="data.py", description=data.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=list(SOURCES), default="fineweb")
    parser.add_argument("--out", metavar="DIR", help="default data/<source>")
    parser.add_argument("--encoding", help=f"{', '.join(ENCODINGS)} (default gpt2)")
    parser.add_argument("--max_tokens", type=at_least(2), metavar="N", help="of train and val together, of each domain (default all)")
    parser.add_argument("--path", nargs="+", metavar="P", help="files: files and folders; domains: name=FILE, instead of the hub")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help=f"domains: some of them (default {' '.join(DOMAINS)}, or those of --path)")
    parser.add_argument("--source_tag", action="store_true", default=None, help="domains: put the domain's name before each document")
    parser.add_argument("--dataset", metavar="NAME", help="hf: name on the hub, or a local folder")
    parser.add_argument("--subset", metavar="S", help="hf: its configuration")
    parser.add_argument("--split_name", metavar="S", help="hf: its split to read (default train)")
    field = parser.add_mutually_exclusive_group()
    field.add_argument("--text_field", metavar="F", help="hf, jsonl, parquet: the field with the text (default text)")
    field.add_argument("--tokens_field", metavar="F", help="hf, jsonl, parquet: a field with ids of --encoding instead")
    parser.add_argument("--shards", type=at_least(1, 104), metavar="N", help="fineweb: training shards of 100M tokens (default 9)")
    parser.add_argument("--shard_tokens", type=at_least(2, 2**31), metavar="N", help="tokens per shard (default 100_000_000)")
    parser.add_argument("--num_proc", type=at_least(1, 1025), metavar="N", help="processes (default one per core)")
    parser.add_argument("--split_seed", type=at_least(0), metavar="N", help="another choice of validation documents (default 0)")
    argv = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    args = parser.parse_args(argv)
    uses = SOURCES[args.source][1]
    for flag, value in vars(args).items():
        if value is not None and flag not in ("source", "out", *uses):
            parser.error(f"--{flag} does not apply to --source {args.source}, which takes --{', --'.join(uses)}")
    for flag in {"path", "dataset"} & set(uses):
        if not getattr(args, flag) and args.source != "domains":
            parser.error(f"--source {args.source} needs --{flag}")
    for flag, value in DEFAULTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    return args


def prepare(args):
    """Prepare args.out in <out>.partial and rename it when all is done. Returns the line to print."""
    start, out = time.perf_counter(), Path(args.out or f"data/{args.source}")
    target = out.resolve()  # a link's own folder is filled, and `.` has a name
    if target.is_mount():
        raise DataError(f"{out} is where a file system is mounted, and cannot be replaced by a finished folder: choose a folder inside it as --out")
    request = {flag: getattr(args, flag) for flag in ("source", *SOURCES[args.source][1]) if flag != "num_proc"}
    if args.source == "python":
        request["torch"] = torch_version()
    if args.path:
        request["inputs"] = stamps(word.partition("=")[2] if args.source == "domains" else word for word in args.path)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if (out / "meta.json").exists() and was_asked(meta := read_meta(out), request):
            parts = [out / name for name in meta.get("domains") or [""]]
            tokens = sum(len(tokens) for part in parts for split in ("train", "val") for _, tokens in open_split(part, split))
            return f"{out} is ready: {tokens:,} tokens, made by this same command"
        raise DataError(f"{out} already exists and was made by another command or of other text: remove it or choose another --out")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or it warns at each retry
    partial = target.with_name(target.name + ".partial")
    if args.source not in ("fineweb", "domains") and partial.exists():  # downloads and domains go on, tokenising starts over
        shutil.rmtree(partial)
    meta = {"source": args.source, "split_seed": args.split_seed if args.source != "fineweb" else None, "request": request}
    meta |= SOURCES[args.source][0](args, partial)
    write_meta(partial, meta)
    os.replace(partial, target)
    total = {key: sum(split[key] or 0 for split in meta["splits"].values()) for key in ("documents", "tokens", "bytes")}
    seconds = time.perf_counter() - start
    line = f"{out}: {total['documents']:,} documents, {total['tokens']:,} tokens ({meta['splits']['val']['tokens']:,} val), " \
           f"{total['bytes']:,} bytes in {seconds:.1f} s ({total['tokens'] / seconds:,.0f} tokens/s)"
    if meta["compressed_bytes"]:
        line += f"; {meta['compressed_bytes']:,} bytes of validation text: gzip -9 {meta['gzip_bpb']:.3f}, xz -9 {meta['xz_bpb']:.3f} bits per byte"
    return line


def stamps(paths):
    """{file: bytes and time of its last change} of what --path names: shards made of it are not those of the text that it holds later."""
    stats = {str(file): file.stat() for path in paths for file in files_in(Path(path)) if file.exists()}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def was_asked(meta, request):
    """Whether shards are what a request would make: of files that are as they were, or gone."""
    made = meta.get("request") or {}
    gone = {file: stamp for file, stamp in made.get("inputs", {}).items() if not Path(file).exists()}
    return made == request | ({"inputs": gone | request["inputs"]} if "inputs" in request else {})


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        print(prepare(args))
    except (DataError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        print(f"data.py: error: --source {args.source} needs {error.name}: `pip install -r requirements.txt`", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("data.py: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)
