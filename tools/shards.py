"""Documents to shards: encoding on every core, the split, and what meta.json says of it."""
import collections
import concurrent.futures
import contextlib
import hashlib
import heapq
import lzma
import multiprocessing
import os
import signal
import threading
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

import data
import tokenizer
from cli import UserError, file_sha256
from data import COMPRESSED_BYTES, FEW_TOKENS, TOKENIZER, as_data_error, read_shard, write_shard
from terminal import say
from tokenizer import get_encoding
from tools import sources

# ---------------------------------------------------------------------------------------------------------------------
# Documents to shards


def tokenise(source, encoding, args, folder):
    """Write the train and val shards of a source. Returns entries of meta.json."""
    from tqdm import tqdm
    documents, facts = source
    folder.mkdir(parents=True, exist_ok=True)
    if encoding.json:
        (folder / TOKENIZER).write_text(encoding.json, encoding="utf-8")
    stem, size = folder / args.source, args.shard_tokens
    new_writers = lambda: [ShardWriter(f"{stem}_{split}", i, size, encoding) for split, i in (("train", 1), ("val", 0))]
    (train, val), compressors, num_tokens = new_writers(), Compressors(), 0
    lowest = []  # heap of (-hash, start, stop) of the training documents of lowest hash
    with tqdm(total=args.max_tokens, unit="tok", unit_scale=True, desc=args.source, mininterval=0.5) as bar, \
            contextlib.closing(encode_documents(documents, encoding, args.num_proc, args.split_seed)) as encoded:
        for hashed, ids in encoded:
            ids = ids[: args.max_tokens and args.max_tokens - num_tokens]
            if hashed % 50 == 0:
                val.add(ids)
                if compressors.num_bytes < COMPRESSED_BYTES:
                    compressors.add(encoding.decode_bytes(ids))
            else:
                if len(ids) > 1:
                    span = (-hashed, train.num_tokens, train.num_tokens + len(ids))
                    (heapq.heappush if len(lowest) < MAX_MOVED else heapq.heappushpop)(lowest, span)
                train.add(ids)
            num_tokens += len(ids)
            bar.update(len(ids))
            if num_tokens == args.max_tokens:
                break
    train.flush()
    val.flush()
    print_facts(args.source, facts, encoding)

    lowest = [(start, stop) for _, start, stop in sorted(lowest, reverse=True)]
    if plan := plan_split(train, val, lowest, encoding, at_limit=num_tokens == args.max_tokens):
        new = new_writers()
        for writer, spans in zip(new, plan):
            writer.add_spans(spans, encoding.eot_token)
        for path in {*train.paths, *val.paths} - {*new[0].paths, *new[1].paths}:
            path.unlink()
        (train, val), compressors = new, compress(new[1].paths, encoding)
    for writer, purpose in ((train, "train on"), (val, "validate with")):
        if writer.num_tokens == writer.count_V[encoding.eot_token]:
            raise UserError(f"source {args.source} gave too few documents: nothing is left to {purpose}; "
                            "give more text, or separate its documents by lines <|endoftext|>")
    compared = val.num_tokens - len(val.paths)  # the first token of a shard is not predicted
    if compared < FEW_TOKENS:
        say(f"warning: {args.source}: {data.describe_validation(compared, ROW_TOKENS)}")
    return meta_entries(encoding, (train.count_V, val.count_V), train.shards + val.shards, compressors) | facts


def print_facts(source, facts, encoding):
    """Print what a source has left out or found odd, and add to facts what becomes of bytes that are not UTF-8."""
    if "files" in facts:
        left_out = sources.count_kinds(facts["left_out"])
        say(f"{source}: files read {facts['files']:,}" + (f"; left out: {left_out}" if left_out else ""))
    if "empty_documents" in facts:
        say(f"{source}: null or blank documents left out: {facts['empty_documents']:,}")
    if found := facts.get("not_utf8"):
        found["replaced"] = encoding.name != "bytes"
        fate = "become U+FFFD, of which bits per byte count 3 bytes each; `iconv -t UTF-8 -f` and their encoding " \
               "converts them, --encoding bytes keeps them" if found["replaced"] else "are kept"
        say(f"warning: {source}: {found['bytes']:,} bytes that are not UTF-8 {fate}; documents with such bytes: "
            f"{found['documents']:,}, the first in {found['first']}")


def describe(folder, encoding):
    """Entries of meta.json for shards made elsewhere. Raises UserError for an id beyond the vocabulary.

    encoding: None for GPT-2 without its ranks"""
    known = data.GPT2_META if encoding is None else encoding_meta(encoding)
    count_SV, shards = np.zeros((2, known["vocab_size"]), np.int64), []
    for split, count_V in zip(("train", "val"), count_SV):
        for path in data.shard_paths(folder, split):
            tokens = read_shard(path)
            if tokens.max() >= len(count_V):
                raise UserError(f"{path} holds token id {tokens.max()}, beyond the vocabulary of "
                                f"{known['encoding']}: remove it and run again")
            count_V += count_ids(tokens, len(count_V))
            shards.append({"file": path.name, "tokens": len(tokens), "sha256": file_sha256(path)})
    return meta_entries(encoding, count_SV, shards, compress(data.shard_paths(folder, "val"), encoding))


def meta_entries(encoding, count_SV, shards, compressors):
    """Entries of meta.json from the counts of each id in train and val, and the list of shards."""
    known = data.GPT2_META if encoding is None else encoding_meta(encoding)
    token_bytes = None if encoding is None else encoding.token_bytes()
    splits = {split: {"documents": int(count_V[known["eot_token"]]), "tokens": int(count_V.sum()),
                      "bytes": None if encoding is None else int(count_V @ token_bytes)}
              for split, count_V in zip(("train", "val"), count_SV)}
    return {**known, "splits": splits, **compressors.finish(), "shards": shards,
            "token_bytes": None if encoding is None else token_bytes.tolist()}


def encoding_meta(encoding):
    """Entries of meta.json; a tokenizer.json lies beside it."""
    name = data.stored_name(encoding.name)
    known = {"encoding": name, "vocab_size": encoding.vocab_size, "eot_token": encoding.eot_token}
    digest = {"tokenizer_sha256": hashlib.sha256(encoding.json.encode()).hexdigest()} if encoding.json else {}
    return known | digest


def open_encoding(args, folder, open_sources):
    """The encoding that args.encoding names; the tokenizer.json of the user, or of a trained BPE, is put into `folder`.

    open_sources: functions of an encoding that return (documents, facts). A BPE is trained on TRAINED_BYTES of training
    documents, spread over the first SPREAD_BYTES, in equal parts of each source. Raises UserError."""
    if args.encoding == "bpe":
        if getattr(args, "tokens_field", None):
            raise UserError("--encoding bpe is trained on text, and --tokens_field has none: leave one of the two out")
        say(f"training a BPE of {args.vocab_size:,} ids")
        max_read = min(SPREAD_BYTES, 4 * args.max_tokens if args.max_tokens else SPREAD_BYTES) // len(open_sources)
        parts = (open_source(get_encoding("bytes"))[0] for open_source in open_sources)
        max_bytes = TRAINED_BYTES // len(open_sources)
        texts = (text for part in parts for text in training_texts(part, args.split_seed, max_bytes, max_read))
        text = tokenizer.train_bpe(texts, args.vocab_size)
    elif data.is_tokenizer(args.encoding):
        text = get_encoding(args.encoding).json
    else:
        return get_encoding(args.encoding)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    encoding = get_encoding(folder / TOKENIZER)
    (folder / TOKENIZER).write_text(encoding.json, encoding="utf-8")  # as each domain's folder has it
    return encoding


SPREAD_BYTES = 2**28   # of text, read before a BPE is trained
TRAINED_BYTES = 2**26  # the first so many of 221 MB of mixed text in place of a spread sample cost 9% more tokens


def training_texts(documents, split_seed, max_bytes, max_read):
    """Text of those documents among the first max_read bytes that are not validation: all, or the ones of lowest hash
    that have max_bytes together."""
    chosen, num_read, num_chosen = [], 0, 0  # heap of (-hash, body)
    for key, body in documents:
        if (hashed := sources.split_hash(key, split_seed)) % 50:
            heapq.heappush(chosen, (-hashed, body))
            num_read, num_chosen = num_read + len(body), num_chosen + len(body)
            while num_chosen > max_bytes and len(chosen) > 1:
                num_chosen -= len(heapq.heappop(chosen)[1])
            if num_read >= max_read:
                break
    for _, body in sorted(chosen, reverse=True):
        yield body.decode("utf-8", "replace")


def count_ids(tokens, vocab_size):
    """How often each id occurs, int64 (vocab_size,)."""
    pieces = (tokens[start : start + 2**20] for start in range(0, len(tokens), 2**20))  # bincount copies to int64
    return sum((np.bincount(piece, minlength=vocab_size) for piece in pieces), np.zeros(vocab_size, np.int64))


class ShardWriter:
    """Collects the tokens of one split and writes `<stem>_000001.bin`, ... of shard_tokens each.

    `shards` and `count_V` are entries for meta.json and counts of ids, of what it has written."""

    def __init__(self, stem, number, shard_tokens, encoding):
        self.stem, self.number, self.paths, self.num_tokens = stem, number, [], 0
        self.buffer, self.filled = np.empty(shard_tokens, np.uint16), 0
        self.shards, self.count_V = [], np.zeros(encoding.vocab_size, np.int64)

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
            tokens, path = self.buffer[: self.filled], Path(f"{self.stem}_{self.number + len(self.paths):06d}.bin")
            self.paths.append(path)
            self.shards.append({"file": path.name, "tokens": len(tokens), "sha256": write_shard(path, tokens)})
            self.count_V += count_ids(tokens, len(self.count_V))
            self.filled = 0

    def add_spans(self, spans, eot_token):
        """Write spans of other shards, (their tokens, start, stop), each as documents of its own."""
        for shards, start, stop in spans:
            pieces = slices(shards, start, stop)
            first = next(pieces, np.empty(0, np.uint16))
            self.add([eot_token] if len(first) and first[0] != eot_token else [])
            for piece in (first, *pieces):
                self.add(piece)
        self.flush()


def slices(shards, start, stop):
    """Yields the tokens from start to stop of a list of shards, as they lie in them."""
    for shard in shards:
        if len(piece := shard[max(0, start) : max(0, stop)]):
            yield piece
        start, stop = start - len(shard), stop - len(shard)


# ---------------------------------------------------------------------------------------------------------------------
# Validation of text that has too few documents to be split by hash alone

ROW_TOKENS = 1024  # seq_len of preset cpu
MIN_CUT = 256  # tokens; no shorter document is cut in two
MAX_MOVED = 1000  # documents at most


def plan_split(train, val, lowest, encoding, at_limit):
    """Spans of train and val, (tokens of the shards, start, stop), if validation got far from 1% of the text; else ().

    Too little is filled up with the training documents of lowest hash; from too much the rest is trained on. The goal
    is 1%, or 2 * FEW_TOKENS if these are more, but 5% at most.

    Args:
        lowest: spans in train, the one of lowest hash first
        at_limit: no token may be added, not even the end-of-text token in front of the rest of a document"""
    total = train.num_tokens + val.num_tokens
    num_text = val.num_tokens - val.count_V[encoding.eot_token]
    goal = max(1, total // 100, min(2 * FEW_TOKENS, total // 20))
    old_train, old_val = ([read_shard(path) for path in writer.paths] for writer in (train, val))  # outlive the files

    def cut(shards, start, count):
        """End of a span of about so many tokens: a line's end in its second half, if there is one."""
        ids = np.concatenate([*slices(shards, start, start + max(count, MIN_CUT // 2))])
        ends = [i + 1 for i in range(len(ids) // 2, len(ids)) if encoding.vocab[ids[i]].endswith(b"\n")]
        return start + (ends[-1] if ends else len(ids))

    if num_text < max(1, total // 200, min(FEW_TOKENS, total // 100)):
        moved, missing = [], goal - num_text
        for start, stop in lowest:
            if missing <= 0:
                break
            if stop - start > max(2 * missing, MIN_CUT):
                moved.append((start, cut(old_train, start, missing)))
                break
            moved.append((start, stop))
            missing -= stop - start
        edges = [0, *(edge for span in sorted(moved) for edge in span), train.num_tokens]
        train_spans = [(old_train, *span) for span in zip(edges[::2], edges[1::2])]
        val_spans = [(old_val, 0, val.num_tokens), *((old_train, *span) for span in moved)]
    elif num_text > max(total // 10, 2 * goal, MIN_CUT):
        end = cut(old_val, 0, goal)
        train_spans = [(old_train, 0, train.num_tokens), (old_val, end, val.num_tokens)]
        val_spans = [(old_val, 0, end)]
    else:
        return ()

    train_spans = [(shards, start, stop) for shards, start, stop in train_spans if start < stop]
    if at_limit and any(next(slices(*span))[0] != encoding.eot_token for span in train_spans):
        shards, start, stop = train_spans[-1]
        train_spans[-1] = shards, start, stop - 1
    return train_spans, val_spans


def compress(paths, encoding):
    """The Compressors of the text in these shards; of none if the encoding is unknown."""
    compressors = Compressors()
    for tokens in map(read_shard, paths if encoding else ()):
        for start in range(0, len(tokens), 2**20):
            if compressors.num_bytes < COMPRESSED_BYTES:
                compressors.add(encoding.decode_bytes(tokens[start : start + 2**20]))
    return compressors


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

    if num_proc == 1 or encoding.is_fast:
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
        ids = encoding.encode_bytes(body) if isinstance(body, bytes) else body
        return np.concatenate(([encoding.eot_token], ids), dtype=np.uint16, casting="unsafe")

    return [(sources.split_hash(key, split_seed), encode(body)) for key, body in chunk]
