"""Text to token shards: the command line of data.py.

    python data.py                                              # FineWeb, GPT-2 tokens: 9 shards of 100M (internet)
    python data.py --source python --encoding bytes             # the Python source of the installed torch: no download
    python data.py --source files --path notes/ more.jsonl.gz   # your own .txt .md .jsonl .parquet, also .gz .xz .zst
    python data.py --source hf --dataset allenai/c4 --subset en --max_tokens 1_000_000_000
    python data.py --source hf --dataset NAME --tokens_field input_ids   # a data set that already holds GPT-2 ids
    python data.py --source arithmetic --encoding bytes --max_tokens 4_000_000   # problems of known difficulty
    python data.py --source domains                             # math, python, web, science, legal, chat (internet)
    python data.py --source domains --path notes=notes/ code=src/ mail=mail.jsonl.gz   # domains of your own

The result is a folder of shards and a meta.json. With --source domains it is a mixture: one such folder per domain.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

import data
from cli import Parser, UserError, file_sha256, write_atomically
from data import COMPRESSED_BYTES, as_data_error, get_encoding, load_meta, read_shard, write_shard
from tools import sources

# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        print(prepare(args))
    except (UserError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        install = "`pip install -r requirements.txt`"
        print(f"data.py: error: --source {args.source} needs {error.name}: {install}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("data.py: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def prepare(args):
    """Prepare args.out, in <out>.partial until it is complete. Returns the line to print. Raises UserError."""
    start, out = time.perf_counter(), Path(args.out or f"data/{args.source}")
    target = out.resolve()  # resolved, so that the target of a link is filled and `.` has a name
    if target.is_mount():
        raise UserError(f"{out} is the mount point of a file system and cannot be replaced: "
                        "choose a folder inside it as --out")
    request = {flag: getattr(args, flag) for flag in ("source", *SOURCES[args.source][1]) if flag != "num_proc"}
    if args.source == "python":
        request["torch"] = sources.torch_version()
    if args.path:
        paths = [word.partition("=")[2] for word in args.path] if args.source == "domains" else args.path
        request["inputs"] = file_stamps(paths)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if (out / "meta.json").exists() and was_requested(meta := data.read_meta_json(out), request):
            parts = [out / name for name in meta.get("domains") or [""]]
            shards = [shard for part in parts for split in ("train", "val") for shard in data.open_split(part, split)]
            tokens = sum(len(tokens) for _, tokens in shards)
            return f"{out} is ready: {tokens:,} tokens, made by this same command"
        raise UserError(f"{out} already exists and was made by another command or of other text: "
                        "remove it or choose another --out")

    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no warning at each retry
    partial = target.with_name(target.name + ".partial")
    if args.source not in ("fineweb", "domains") and partial.exists():  # those two continue, tokenising starts over
        shutil.rmtree(partial)
    split_seed = args.split_seed if args.source != "fineweb" else None
    meta = {"source": args.source, "split_seed": split_seed, "request": request}
    meta |= SOURCES[args.source][0](args, partial)
    write_meta(partial, meta)
    os.replace(partial, target)

    total = lambda key: sum(split[key] or 0 for split in meta["splits"].values())
    tokens, seconds = total("tokens"), time.perf_counter() - start
    line = f"{out}: {total('documents'):,} documents, {tokens:,} tokens ({meta['splits']['val']['tokens']:,} val), " \
           f"{total('bytes'):,} bytes in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    if meta["compressed_bytes"]:
        line += f"; {meta['compressed_bytes']:,} bytes of validation text: gzip -9 {meta['gzip_bpb']:.3f}, " \
                f"xz -9 {meta['xz_bpb']:.3f} bits per byte"
    return line


def parse(argv):
    """Flags as a namespace, defaults filled in. Exits with status 2 for a flag that the source does not take."""
    def at_least(low, high=2**63):
        def number(text):
            if not text.replace("_", "").isdecimal() or not low <= int(text) < high:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high - 1}")
            return int(text)
        return number

    calls = tuple(re.findall(r"^    (python .*)$", __doc__, re.M))
    about = "Text to token shards: a folder of shards and a meta.json, or one such folder for each domain."
    first = ("source", "path", "out", "encoding", "max_tokens")
    parser = Parser(prog="data.py", description=about, examples=calls, first=first)
    add = parser.add_argument
    add("--source", choices=list(SOURCES), default="fineweb", metavar="NAME", help="origin of the text")
    add("--path", nargs="+", metavar="P", help="files: files and folders; domains: name=FILE, instead of the hub")
    add("--out", metavar="DIR", help="folder of the shards (default data/<source>)")
    add("--encoding", metavar="NAME", help=f"{', '.join(data.ENCODINGS)} (default gpt2)")
    add("--max_tokens", type=at_least(2), metavar="N", help="train and val together, for each domain (default all)")
    add = parser.add_argument_group("domains").add_argument
    add("--domains", nargs="+", metavar="NAME",
        help=f"some of them (default {' '.join(sources.DOMAINS)}, or those of --path)")
    add("--source_tag", action="store_true", default=None, help="put the domain's name before each document")
    hub = parser.add_argument_group("hf")
    hub.add_argument("--dataset", metavar="NAME", help="name on the hub, or a local folder")
    hub.add_argument("--subset", metavar="S", help="its configuration")
    hub.add_argument("--split_name", metavar="S", help="its split to read (default train)")
    field = parser.add_argument_group("hf, jsonl and parquet").add_mutually_exclusive_group()
    field.add_argument("--text_field", metavar="F", help="the field with the text (default text)")
    field.add_argument("--tokens_field", metavar="F", help="a field with ids of --encoding instead")
    add = parser.add_argument_group("shards").add_argument
    add("--shards", type=at_least(1, 104), metavar="N", help="fineweb: training shards of 100M tokens (default 9)")
    add("--shard_tokens", type=at_least(2, 2**31), metavar="N", help="tokens per shard (default 100_000_000)")
    add("--num_proc", type=at_least(1, 1025), metavar="N", help="processes (default one per core)")
    add("--split_seed", type=at_least(0), metavar="N", help="another choice of validation documents (default 0)")

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


def file_stamps(paths):
    """{file: [size, time of last change]} of files and folders; it differs if a file has changed since the request."""
    stats = {str(file): file.stat() for path in paths for file in sources.list_files(Path(path)) if file.exists()}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def was_requested(meta, request):
    """Whether the same request made these shards, of files that are unchanged or gone."""
    made = meta.get("request") or {}
    gone = {file: stamp for file, stamp in made.get("inputs", {}).items() if not Path(file).exists()}
    return made == request | ({"inputs": gone | request["inputs"]} if "inputs" in request else {})


def write_meta(folder, meta):
    """Write meta.json, one entry per line, with its own sha256."""
    meta = meta | {"sha256": data.meta_sha256(meta)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())
    write_atomically(folder / "meta.json", lambda temporary: temporary.write_text("{\n" + lines + "\n}\n"))


# ---------------------------------------------------------------------------------------------------------------------
# One function per source: fills a folder with shards and returns the entries of its meta.json


def prepare_fineweb(args, folder):
    if args.encoding != "gpt2":
        raise UserError("the FineWeb shards hold gpt2 tokens: leave --encoding out, or tokenise FineWeb with "
                        "--source hf --dataset HuggingFaceFW/fineweb")
    sources.download_fineweb(folder, args.shards)
    try:
        encoding = get_encoding("gpt2")
    except UserError as error:
        print(f"note: no bits per byte, as bytes per token are unknown: {error}", file=sys.stderr)
        encoding = None
    return describe(folder, encoding)


def prepare_hf(args, folder):
    encoding = get_encoding(args.encoding)
    source = sources.stream_dataset(encoding, args.dataset, args.subset, args.split_name, args.text_field,
                                    args.tokens_field)
    return tokenise(source, encoding, args, folder)


def prepare_files(args, folder):
    encoding = get_encoding(args.encoding)
    source = sources.read_files(args.path, encoding, args.text_field, args.tokens_field)
    return tokenise(source, encoding, args, folder)


def prepare_python(args, folder):
    encoding = get_encoding(args.encoding)
    return tokenise(sources.read_python_corpus(), encoding, args, folder)


def prepare_arithmetic(args, folder):
    if args.max_tokens is None:
        raise UserError("--source arithmetic has no end: say how much of it with --max_tokens, for instance "
                        "--max_tokens 4_000_000")
    return tokenise(sources.generate_arithmetic(args.split_seed), get_encoding(args.encoding), args, folder)


def prepare_domains(args, folder):
    """A folder of shards for each domain. Complete ones of an interrupted run are kept."""
    paths = {}
    for word in args.path or []:
        name, equals, path = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", name) or not path:
            raise UserError(f"--path {word}: with --source domains it is name=FILE, and a name has letters, digits "
                            "and _ only")
        paths.setdefault(name, []).append(path)
    legal = paths or sources.DOMAINS
    names = args.domains or list(legal)
    for name in names:
        if name not in legal:
            mend = f"choose among {', '.join(legal)}" + ("" if paths else ", or name its file with --path")
            raise UserError(f"--domains {name}: {mend}")

    encoding, metas = get_encoding(args.encoding), {}
    for name in names:
        max_tokens = args.max_tokens or (None if paths else sources.DOMAIN_TOKENS)
        own = argparse.Namespace(**vars(args) | {"source": name, "path": paths.get(name), "max_tokens": max_tokens})
        prepare_domain(own, encoding, folder / name)
        metas[name] = data.read_meta_json(folder / name)
    for stale in (path for path in folder.iterdir() if path.name not in names):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    total = lambda split, key: sum(meta["splits"][split][key] for meta in metas.values())
    splits = {split: {key: total(split, key) for key in ("documents", "tokens", "bytes")} for split in ("train", "val")}
    kept = ("splits", "gzip_bpb", "xz_bpb", "request", "datasets", "sha256")
    by_domain = {name: {key: meta[key] for key in kept if key in meta} for name, meta in metas.items()}
    return {**encoding_meta(encoding), "splits": splits, "compressed_bytes": None,
            "token_bytes": encoding.token_bytes().tolist(), "domains": by_domain}


def prepare_domain(args, encoding, folder):
    """Fill the folder of one domain, args.source, unless the same request has filled it."""
    request = {flag: getattr(args, flag) for flag in ("source", "path", *TOKENISED, "source_tag") if flag != "num_proc"}
    request["inputs"] = file_stamps(args.path or [])
    if folder.exists() and was_requested(load_meta(folder), request):
        return
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    if args.path:
        source = sources.read_files(args.path, encoding, args.text_field, args.tokens_field)
    else:
        source = sources.stream_domain(args.source, encoding)
    if args.source_tag:
        source = sources.add_tag(source, args.source, encoding)
    meta = {"source": args.source, "split_seed": args.split_seed, "request": request}
    write_meta(partial, meta | tokenise(source, encoding, args, partial))
    os.replace(partial, folder)


TOKENISED = ("encoding", "max_tokens", "shard_tokens", "num_proc", "split_seed")
SOURCES = {  # name: (function of the flags and a folder, the flags it takes)
    "fineweb": (prepare_fineweb, ("encoding", "shards")),
    "hf": (prepare_hf, TOKENISED + ("dataset", "subset", "split_name", "text_field", "tokens_field")),
    "files": (prepare_files, TOKENISED + ("path", "text_field", "tokens_field")),
    "python": (prepare_python, TOKENISED),
    "arithmetic": (prepare_arithmetic, TOKENISED),
    "domains": (prepare_domains, TOKENISED + ("domains", "path", "text_field", "tokens_field", "source_tag")),
}
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULTS = {"encoding": "gpt2", "shards": 9, "shard_tokens": 100_000_000, "num_proc": NUM_CORES, "split_seed": 0,
            "split_name": "train", "text_field": "text"}

# ---------------------------------------------------------------------------------------------------------------------
# Documents to shards


def tokenise(source, encoding, args, folder):
    """Write the train and val shards of a source. Returns entries of meta.json."""
    from tqdm import tqdm
    documents, facts = source
    folder.mkdir(parents=True)
    stem = folder / args.source
    train = ShardWriter(f"{stem}_train", 1, args.shard_tokens)
    val = ShardWriter(f"{stem}_val", 0, args.shard_tokens)
    compressors, num_tokens, val_text_tokens = Compressors(), 0, 0
    lowest = (2**64, 0, 0)  # hash, start and stop of the training document with the smallest hash
    with tqdm(total=args.max_tokens, unit="tok", unit_scale=True, desc=args.source, mininterval=0.5) as bar, \
            contextlib.closing(encode_documents(documents, encoding, args.num_proc, args.split_seed)) as encoded:
        for hashed, ids in encoded:
            ids = ids[: args.max_tokens and args.max_tokens - num_tokens]
            if hashed % 50 == 0:
                val.add(ids)
                val_text_tokens += len(ids) - 1
                if compressors.num_bytes < COMPRESSED_BYTES:
                    compressors.add(encoding.decode_bytes(ids))
            else:
                if len(ids) > 1:
                    lowest = min(lowest, (hashed, train.num_tokens, train.num_tokens + len(ids)))
                train.add(ids)
            num_tokens += len(ids)
            bar.update(len(ids))
            if num_tokens == args.max_tokens:
                break
    train.flush()
    val.flush()

    if not val_text_tokens:
        train = move_to_validation(lowest[1], lowest[2], train, val)
    for writer, purpose in ((train, "train on"), (val, "validate with")):
        if not writer.num_tokens:
            raise UserError(f"source {args.source} gave too few documents: nothing is left to {purpose}; "
                            "give more text, or separate its documents by lines <|endoftext|>")
    return describe(folder, encoding, compressors if val_text_tokens else None) | facts


def move_to_validation(start, stop, train, val):
    """Move training tokens [start, stop) to validation, for a corpus too small for the hash rule. Returns the rest."""
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
    """Entries of meta.json, counted from finished shards. Raises UserError for an id beyond the vocabulary.

    Args:
        encoding: None for GPT-2 without its ranks
        compressors: if they have compressed the validation text already"""
    compress, compressors = compressors is None and encoding is not None, compressors or Compressors()
    known = data.GPT2_META if encoding is None else encoding_meta(encoding)
    token_bytes = None if encoding is None else encoding.token_bytes()
    splits, shards = {}, []
    for split in ("train", "val"):
        count_V = np.zeros(known["vocab_size"], np.int64)
        for path in data.shard_paths(folder, split):
            tokens = read_shard(path)
            for start in range(0, len(tokens), 2**20):
                piece = tokens[start : start + 2**20]
                if piece.max() >= len(count_V):
                    raise UserError(f"{path} holds token id {piece.max()}, beyond the vocabulary of "
                                    f"{known['encoding']}: remove it and run again")
                count_V += np.bincount(piece, minlength=len(count_V))
                if split == "val" and compress and compressors.num_bytes < COMPRESSED_BYTES:
                    compressors.add(encoding.decode_bytes(piece))
            shards.append({"file": path.name, "tokens": len(tokens), "sha256": file_sha256(path)})
        splits[split] = {"documents": int(count_V[known["eot_token"]]), "tokens": int(count_V.sum()),
                         "bytes": None if encoding is None else int(count_V @ token_bytes)}
    return {**known, "splits": splits, **compressors.finish(), "shards": shards,
            "token_bytes": None if encoding is None else token_bytes.tolist()}


def encoding_meta(encoding):
    return {"encoding": encoding.name, "vocab_size": encoding.vocab_size, "eot_token": encoding.eot_token}


class ShardWriter:
    """Collects the tokens of one split and writes `<stem>_000001.bin`, ... of shard_tokens each."""

    def __init__(self, stem, number, shard_tokens):
        self.stem, self.number, self.paths, self.num_tokens = stem, number, [], 0
        self.buffer, self.filled = np.empty(shard_tokens, np.uint16), 0

    def add(self, ids):
        self.num_tokens += len(ids)
        while len(ids):
            fitting = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(fitting)] = fitting
            self.filled += len(fitting)
            ids = ids[len(fitting) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self):
        if self.filled:
            self.paths.append(Path(f"{self.stem}_{self.number + len(self.paths):06d}.bin"))
            write_shard(self.paths[-1], self.buffer[: self.filled])
            self.filled = 0


class Compressors:
    """data.compressed_bpb of a text that comes in pieces, computed in a thread beside tokenising."""

    def __init__(self):
        self.thread, self.num_bytes, self.pending = concurrent.futures.ThreadPoolExecutor(1), 0, []
        self.streams = {"gzip_bpb": zlib.compressobj(9, wbits=31), "xz_bpb": lzma.LZMACompressor(preset=9)}
        self.sizes = dict.fromkeys(self.streams, 0)

    def add(self, piece):
        piece = piece[: COMPRESSED_BYTES - self.num_bytes]
        self.num_bytes += len(piece)
        if piece:
            self.pending.append(self.thread.submit(self._compress, piece))

    def finish(self):
        """Entries of meta.json: bits per byte of each compressor, number of bytes compressed. Call it once."""
        self.thread.shutdown()
        for future in self.pending:
            future.result()  # raises the error of its thread
        sizes = {name: size + len(self.streams[name].flush()) for name, size in self.sizes.items()}
        bpb = {name: 8 * size / self.num_bytes if self.num_bytes else None for name, size in sizes.items()}
        return {"compressed_bytes": self.num_bytes or None, **bpb}

    def _compress(self, piece):
        for name, stream in self.streams.items():
            self.sizes[name] += len(stream.compress(piece))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding documents on every core

CHUNK = 2**19  # bytes of text, or tokens, that are sent to a process at once


def encode_documents(documents, encoding, num_proc, split_seed):
    """Yield (split hash, ids) in the order of the documents; at most 2 * num_proc chunks are in memory."""
    def chunks():
        chunk, size = [], 0
        for document in documents:
            chunk.append(document)
            size += len(document[1]) + 64  # the constant bounds the number of empty documents in a chunk
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    if num_proc == 1 or encoding.name == "bytes":  # bytes are encoded faster than they are sent
        for chunk in chunks():
            yield from encode_chunk(chunk, encoding, split_seed)
        return
    context = multiprocessing.get_context("spawn")  # the same on Linux and Mac; safe beside threads
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (encoding.name,))
    killed = "a tokenising process was killed, most often for want of memory: run again with a smaller --num_proc"
    with as_data_error(killed, BrokenProcessPool), contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        pending = collections.deque()
        for chunk in chunks():  # pool.map would read the whole input first
            pending.append(pool.submit(encode_in_worker, chunk, split_seed))
            if len(pending) == 2 * num_proc:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def start_worker(name):
    """Initialise a tokenising process, a fresh interpreter that builds an encoding of its own."""
    global worker_encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops its workers
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # end if the parent is killed
    worker_encoding = get_encoding(name)


def encode_in_worker(chunk, split_seed):
    return encode_chunk(chunk, worker_encoding, split_seed)


def encode_chunk(chunk, encoding, split_seed):
    """[(split hash, ids)] of a list of documents; ids are uint16 and start with end-of-text."""
    def encode(body):
        ids = encoding.encode(body.decode("utf-8", "replace")) if isinstance(body, bytes) else body
        return np.concatenate(([encoding.eot_token], ids), dtype=np.uint16, casting="unsafe")

    return [(sources.split_hash(key, split_seed), encode(body)) for key, body in chunk]
