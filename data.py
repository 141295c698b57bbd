"""Text -> token shards, and the loader that hands them to training.

    python data.py                                              # FineWeb, ready GPT-2 tokens: 9 shards of 100M (internet)
    python data.py --source python --encoding bytes             # the Python source of the installed torch: no download
    python data.py --source files --path notes/ more.jsonl.gz   # your own .txt .md .jsonl .parquet, also .gz .xz .zst
    python data.py --source hf --dataset allenai/c4 --subset en --max_tokens 1_000_000_000
    python data.py --source hf --dataset NAME --tokens_field input_ids   # a data set that already holds GPT-2 ids
    python data.py --source arithmetic --encoding bytes         # a toy: problems of known difficulty, for models that choose their depth
    python data.py --source domains                             # math, python, web, science, legal, chat: a folder of shards each (internet)
    python data.py --source domains --path notes=notes/ code=src/ mail=mail.jsonl.gz   # domains of your own

A folder of shards is the whole interface. `<name>_train_000001.bin` ... and `<name>_val_000000.bin` hold 256 int32 (magic, version,
token count), then uint16 tokens: the format of llm.c and modded-nanogpt, whose FineWeb shards load unchanged. Each document starts
with the end-of-text token. `meta.json` beside them says what the ids mean, and how many bits per byte gzip and xz need. A folder of such
folders is a mixture of domains, whose shares training chooses.

How this file reads: errors, shards, encodings, a folder of shards, mixing, the loader (all that training needs: numpy and torch), then
preparation: documents, the sources, encoding them on every core, the command line.
"""
import argparse
import bisect
import collections
import concurrent.futures
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
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
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """A mistake the user can mend: one sentence with what is wrong, where, and the command that mends it."""


@contextlib.contextmanager
def explained(sentence, *kinds):
    """Turn errors of these kinds into a DataError; {error} in the sentence is what the error says, or else its kind."""
    try:
        yield
    except DataError:
        raise
    except kinds as error:
        reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(sentence.replace("{error}", reason)) from error


PREPARE = "python data.py --source python --encoding bytes --out {0}` or `python data.py --source fineweb --out {0}"

# ---------------------------------------------------------------------------------------------------------------------
# Shards

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def write_shard(path, tokens):
    """Write tokens (integers below 65536, shape (n,), 0 < n < 2**31) as one shard. Atomic: a reader sees all of it or the old file.
    Raises DataError for other tokens or when the file cannot be written."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 0 < len(tokens) < 2**31:
        raise DataError(f"{path}: a shard holds 1 to 2**31-1 integers in one dimension, not {tokens.dtype} of shape {tokens.shape}")
    if tokens.dtype != np.uint16 and (tokens.min() < 0 or tokens.max() > 65535):
        raise DataError(f"{path}: token ids {tokens.min()}..{tokens.max()} do not fit uint16; use an encoding with ids below 65536")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(f"{path} cannot be written ({{error}}): free some space or choose another --out", OSError):
        try:
            with open(temporary, "wb") as file:
                file.write(header.data)
                file.write(np.ascontiguousarray(tokens, "<u2").data)
                file.flush()
                os.fsync(file.fileno())  # or a crash after the rename could leave a good name on missing bytes
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_shard(path):
    """The tokens of one shard, memory-mapped: np.memmap (n,) uint16. Raises DataError unless magic, version, count and size agree."""
    mend = "; remove it and prepare its folder again with `python data.py`"
    with explained(f"{path} cannot be read ({{error}})" + mend, OSError):
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", 3)
    if size < HEADER_BYTES or header[0] != MAGIC:
        raise DataError(f"{path} is not a token shard (no header with magic {MAGIC})" + mend)
    if header[1] != VERSION:
        raise DataError(f"{path} is a token shard of version {header[1]}, where {VERSION} is expected" + mend)
    count = int(header[2])
    if count <= 0 or size != HEADER_BYTES + 2 * count:
        raise DataError(f"{path} is damaged: its header promises {count} tokens, its size is that of {(size - HEADER_BYTES) / 2:g}" + mend)
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))


# ---------------------------------------------------------------------------------------------------------------------
# Encodings

GPT2 = {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}
ENCODINGS = ("bytes", "gpt2", "r50k_base", "p50k_base", "p50k_edit")


class Encoding:
    """A vocabulary: `words[i]` is the bytes that id i stands for, b"" for special tokens. Made by `get_encoding`."""

    def __init__(self, name, words, eot_token, encode):
        self.name, self.words, self.eot_token, self.vocab_size, self._encode = name, words, eot_token, len(words), encode

    def encode(self, text):
        """Text -> ids, uint16 (n,). Special tokens written in the text are ordinary text; lone surrogates become `?`."""
        return self._encode(text.encode("utf-8", "replace")).astype(np.uint16)

    def decode_bytes(self, ids):
        return b"".join([self.words[i] for i in np.asarray(ids).tolist()])

    def decode(self, ids):
        """Ids -> text. The end-of-text token decodes to "", bytes that are not UTF-8 to U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self):
        """How many bytes of text each id stands for, int32 (vocab_size,): the link from loss per token to bits per byte."""
        return np.array([len(word) for word in self.words], np.int32)


def get_encoding(name):
    """`bytes` (256 byte values, then end-of-text), or a tiktoken encoding by name. Raises DataError for an unknown name, for ids
    that do not fit uint16, and when tiktoken cannot get the ranks (it downloads them once, into TIKTOKEN_CACHE_DIR)."""
    if name == "bytes":
        return Encoding("bytes", [bytes([i]) for i in range(256)] + [b""], 256, lambda text: np.frombuffer(text, np.uint8))
    legal = f"choose one of {', '.join(ENCODINGS)}"
    with explained(f"encoding {name} needs tiktoken: `pip install tiktoken`, or choose --encoding bytes", ImportError):
        import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise DataError(f"there is no encoding {name!r}: {legal}")
    if name.startswith(("cl100k", "o200k")):  # said before a download, not after
        raise DataError(f"encoding {name} has ids above 65535, which uint16 shards cannot hold: {legal}")
    with explained(f"the ranks of encoding {name} cannot be downloaded ({{error}}): connect to the internet once, point "
                   "TIKTOKEN_CACHE_DIR at a filled cache, or choose --encoding bytes", Exception):  # requests, OSError, a wrong hash
        bpe = tiktoken.get_encoding(name)
    if bpe.max_token_value > 65535:
        raise DataError(f"encoding {name} has ids above 65535, which uint16 shards cannot hold: {legal}")
    words = [b""] * bpe.n_vocab
    special = {bpe.encode_single_token(text) for text in bpe.special_tokens_set}
    for i in set(range(bpe.n_vocab)) - special:
        with contextlib.suppress(KeyError):  # p50k leaves holes in its numbering
            words[i] = bpe.decode_single_token_bytes(i)

    faster = faster_encoder(bpe)

    def encode(document):
        text = document.decode("utf-8", "replace")
        if faster:
            return np.array(faster(text), np.uint16)
        if hasattr(bpe, "encode_to_numpy"):  # 1.4 times as fast as through a list
            return bpe.encode_to_numpy(text, disallowed_special=())
        return np.array(bpe.encode_ordinary(text), np.int64)

    return Encoding(name, words, bpe.eot_token, encode)


PROBE = "\n\n  \tIt's 1,234.56 \u20ac (na\u00efve)?!  don't\r\nDEF_x\u4e2d\u6587\u0e01\u0e33 \U0001f600\u200d "
PROBE += "<|endoftext|> ".join(map(chr, range(32, 0x2500, 7)))


def faster_encoder(bpe):
    """riptoken's encode_ordinary, where it is installed and says of a text full of corner cases what tiktoken says; else None."""
    if importlib.util.find_spec("riptoken") is None:
        return None
    import riptoken
    encode = riptoken.get_encoding(bpe.name).encode_ordinary
    return encode if list(encode(PROBE)) == bpe.encode_ordinary(PROBE) else None


# ---------------------------------------------------------------------------------------------------------------------
# A folder of shards

def split_of(name):
    """train or val: what a shard's file name says last; None of another file's. (A domain may have either word in its own name.)"""
    found = re.fullmatch(r".+_(train|val)_\d+\.bin", name)
    return found and found[1]


def shard_paths(folder, split):
    return sorted(path for path in folder.glob("*.bin") if split_of(path.name) == split)


def has_shards(folder):
    return any(split_of(path.name) for path in folder.glob("*.bin"))


def domains(folder):
    """{name: folder of shards}: of a mixture its folders, in the order of its meta.json, or else of their names; of a plain folder {"": itself}.
    Raises DataError when there are no shards."""
    folder = Path(folder)
    if has_shards(folder):
        return {"": folder}
    inside = {path.name: path for path in sorted(folder.glob("*/")) if path.suffix != ".partial" and has_shards(path)}
    if not inside:
        raise DataError(f"{folder} holds no token shards: run `{PREPARE.format(folder)}`")
    listed = read_meta(folder).get("domains") or inside
    missing = [name for name in listed if name not in inside]
    if missing:
        raise DataError(f"{folder}/{missing[0]}, a domain in meta.json, holds no token shards: remove {folder} and prepare it again")
    return {name: inside[name] for name in listed}


def read_meta(folder):
    """What meta.json of a folder says; {} without one. Raises DataError when it is damaged."""
    if not (folder / "meta.json").exists():
        return {}
    with explained(f"{folder}/meta.json is damaged ({{error}}): remove {folder} and run `{PREPARE.format(folder)}`",
                   ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        meta = json.loads((folder / "meta.json").read_text())
        if meta.get("sha256", seal(meta)) != seal(meta):
            raise ValueError("it does not match its own sha256")
        if any(not split_of(shard["file"]) or type(shard["tokens"]) is not int for shard in meta.get("shards") or []):
            raise ValueError("a shard without name or number of tokens")
        if not all(isinstance(name, str) for name in meta.get("domains") or []):
            raise ValueError("its domains have no names")
        return {key: meta[key] for key in GPT2} | meta


def load_meta(folder):
    """meta.json of a folder as a dict; for shards made elsewhere, which have none, what is true of FineWeb's GPT-2 shards. Of a mixture: the
    encoding of its domains, and the bytes of each id where one of them knows them. Raises DataError when the folder is missing, holds no shards,
    its meta.json is damaged, or its domains have different encodings."""
    folder, parts = Path(folder), domains(folder)
    unknown = dict.fromkeys(("source", "token_bytes", "split_seed", "splits", "shards", "gzip_bpb", "xz_bpb", "compressed_bytes"))
    metas = {name: unknown | (read_meta(part) or GPT2) for name, part in parts.items()}
    first, *others = metas
    for name in others:
        if any(metas[name][key] != metas[first][key] for key in GPT2):
            raise DataError(f"{folder}: domain {name} has encoding {metas[name]['encoding']}, {first} has {metas[first]['encoding']}: "
                            "prepare both alike")
    if "" in metas:
        return metas[""]
    token_bytes = next((meta["token_bytes"] for meta in metas.values() if meta["token_bytes"]), None)
    return unknown | {key: metas[first][key] for key in GPT2} | {"token_bytes": token_bytes} | read_meta(folder)


def seal(meta):
    """The sha256 of what meta.json holds beside it."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_split(folder, split):
    """[(path, tokens)] of the shards of one split, sorted by name, checked against meta.json where there is one."""
    folder, meta = Path(folder), load_meta(folder)
    shards = [(path, read_shard(path)) for path in shard_paths(folder, split)]
    found = {path.name: len(tokens) for path, tokens in shards}
    listed = {shard["file"]: shard["tokens"] for shard in meta["shards"] or [] if split_of(shard["file"]) == split}
    for name, tokens in listed.items():
        if found.get(name) != tokens:
            raise DataError(f"{folder}/{name} is not the shard of {tokens} tokens that meta.json lists: remove {folder} "
                            f"and run `{PREPARE.format(folder)}`")
    for name in found.keys() - listed.keys() if meta["shards"] is not None else ():
        raise DataError(f"{folder}/{name} is a shard that meta.json does not list: move it to a folder of its own")
    if not shards:
        raise DataError(f"{folder} holds no {split} shard (*_{split}_*.bin): remove it and run `{PREPARE.format(folder)}`")
    return shards


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def promised(folder):
    """[(path, sha256 or None)] of the shards that the meta.json of a folder, or of each of its domains, lists."""
    return [(part / shard["file"], shard.get("sha256")) for part in domains(folder).values() for shard in load_meta(part)["shards"] or []]


def verify(folder, rank=0, world_size=1):
    """Raises DataError unless every shard (every world_size-th, if ranks share the work) has the sha256 that meta.json promises.
    Shards made elsewhere come without promises."""
    for path, digest in [(path, digest) for path, digest in promised(folder) if digest][rank::world_size]:
        with explained(f"{path} cannot be read ({{error}}): remove {folder} and run `{PREPARE.format(folder)}`", OSError):
            if sha256_of(path) != digest:
                raise DataError(f"{path} does not match the sha256 in meta.json: remove {folder} and run `{PREPARE.format(folder)}`")


def fingerprint(folder):
    """{shard: tokens and sha256}: meta.json's promise where there is one, else that of 16 pages spread over the shard."""
    digests = dict(promised(folder))

    def sampled(tokens):
        pages = np.linspace(0, max(0, len(tokens) - 2048), 16).astype(int)
        return hashlib.sha256(b"".join(tokens[page : page + 2048].tobytes() for page in pages)).hexdigest()

    shards = [shard for part in domains(folder).values() for split in ("train", "val") for shard in open_split(part, split)]
    return {path.relative_to(folder).as_posix(): f"{len(tokens)} tokens, sha256 {digests.get(path) or sampled(tokens)}" for path, tokens in shards}


class Rows:
    """All rows of one split, numbered through its shards. Row i of a shard of n tokens predicts tokens i*seq_len+1 ... (i+1)*seq_len,
    so rows overlap by one token and a shard has (n-1) // seq_len of them, plus a shorter one if `tails`."""

    def __init__(self, folder, split, seq_len, vocab_size, tails):
        self.shards, self.seq_len = open_split(folder, split), seq_len
        self.vocab_size = vocab_size or load_meta(folder)["vocab_size"]
        counts = [(len(tokens) - 1 + (seq_len - 1) * tails) // seq_len for _, tokens in self.shards]
        self.first = np.concatenate(([0], np.cumsum(counts)))  # number of each shard's first row, then of all rows
        self.total = int(self.first[-1])

    def read(self, numbers):
        """inputs, targets: int64 (len(numbers), seq_len). Where there is no token, or no such row: input 0, target -1.
        Raises DataError naming the shard that holds an id beyond the vocabulary."""
        inputs = np.zeros((len(numbers), self.seq_len), np.int64)
        targets = np.full_like(inputs, -1)
        for i, number in enumerate(numbers):
            if number < self.total:
                shard = int(np.searchsorted(self.first, number, "right")) - 1
                path, tokens = self.shards[shard]
                start = int(number - self.first[shard]) * self.seq_len
                piece = tokens[start : start + self.seq_len + 1]
                if piece.max() >= self.vocab_size:
                    raise DataError(f"{path} holds token id {piece.max()}, but the vocabulary ends at {self.vocab_size - 1}: it was made "
                                    f"with another encoding; run `{PREPARE.format('<another folder>')}` and pass that to --data")
                inputs[i, : len(piece) - 1], targets[i, : len(piece) - 1] = piece[:-1], piece[1:]
        return inputs, targets


# ---------------------------------------------------------------------------------------------------------------------
# The loader

ROUNDS = 6  # of the Feistel network; 4 make a pseudo-random permutation (Luby and Rackoff 1988), two more for short halves


def permute(index, n, seed, epoch):
    """Where a pseudo-random permutation of range(n) sends each index (int array): a Feistel network over the next even number of
    bits, walked along its cycles until it lands below n (Black and Rogaway 2002). O(1) memory, keyed by (seed, epoch) alone."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence((seed % 2**64, epoch)).generate_state(ROUNDS, np.uint64)
    out = np.asarray(index).astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:
            mixed = right + key  # then the finaliser of splitmix64; arrays of uint64 wrap without a warning
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            left, right = right, left ^ (mixed & mask)
        out[walking] = left << half | right
        walking = walking[out[walking] >= n]
    return out.astype(np.int64)


class Mix(NamedTuple):
    """How much of each domain training sees. Of a plain folder, which has one, all of it."""
    weights: str = ""          # name=number,...; those that are not named get 0. "": the tokens that each domain has
    temperature: float = 1.0   # shares are weights to the power of 1 / temperature: 1 = as they are, many = all alike
    epochs: str = ""           # passes over a domain at most, a number for all or name=number,...; "": as many as it takes
    round_robin_steps: int = 0  # at first, whose batches have one domain each, all in turn; then each batch has all


def by_name(text, names, flag):
    """{name: number} of "name=number,..."; a number alone is for all. Raises DataError."""
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, number = part.rpartition("=")
        if name and name not in names:
            there = f"choose among {', '.join(names)}" if any(names) else "these data are of one kind; leave it out"
            raise DataError(f"--{flag} {text}: there is no domain {name!r}; {there}")
        with explained(f"--{flag} {text}: {part!r} is not a number at least 0, nor name=number", ValueError):
            if not 0 <= (value := float(number)) < float("inf"):
                raise ValueError
        found |= dict.fromkeys(names, value) if not name else {name: value}
    return found


PERIOD = 4096  # rows after which a mixture's order of domains repeats; shares are exact to less than one row in it


def spread(share_D):
    """(PERIOD,): domains in these shares, each as evenly spaced as can be: always the one that is furthest behind its due."""
    if len(share_D) == 1:
        return np.zeros(1, np.int64)
    table, count_D = np.empty(PERIOD, np.int64), np.zeros(len(share_D))
    for slot in range(PERIOD):
        table[slot] = np.argmax(np.round(share_D * (slot + 1) - count_D, 9))  # a tie is the first one's
        count_D[table[slot]] += 1
    return table


class Stretch:
    """Rows from `start` on, whose domains repeat those of a table; `before_D` rows of each domain come earlier."""

    def __init__(self, start, table, before_D):
        self.start, self.table, self.before_D = start, table, before_D
        self.count_PD = np.cumsum(table[:, None] == np.arange(len(before_D)), axis=0)  # after each slot of the table
        self.stop = None  # where the next stretch begins, None: never

    def place(self, number_N):
        """Domains of rows by their numbers, and how many rows of its domain come before each."""
        rounds_N, slot_N = np.divmod(number_N - self.start, len(self.table))
        domain_N = self.table[slot_N]
        return domain_N, self.before_D[domain_N] + rounds_N * self.count_PD[-1, domain_N] + self.count_PD[slot_N, domain_N] - 1

    def until(self, domain, rows):
        """The number of the row that would be the domain's next one after `rows` more; None if it never comes."""
        per_round = self.count_PD[-1, domain]
        if per_round == 0:
            return None
        rounds, rest = divmod(rows, int(per_round))
        return self.start + rounds * len(self.table) + int(np.searchsorted(self.count_PD[:, domain], rest + 1))

    def counts(self, number):
        """Rows of each domain before row `number`."""
        rounds, slot = divmod(number - self.start, len(self.table))
        return self.before_D + rounds * self.count_PD[-1] + (self.count_PD[slot - 1] if slot else 0)


AS_IT_IS = Mix()


class Mixture:
    """Which domain each row of the training stream is of, and which of its rows: functions of the row's number alone, so that any number of ranks
    and any restart sees the same. Domains that have reached their limit of epochs drop out, and the others share what is left.

    rows_D: rows of each domain, tokens_D: what weights are by default. Raises DataError for a mix that is none."""

    def __init__(self, mix, names, rows_D, tokens_D, batch_rows):
        weights, self.names, self.batch_rows = by_name(mix.weights, names, "domain_weights"), names, batch_rows
        weight_D = np.array([weights.get(name, 0.0) for name in names] if weights else tokens_D, float)
        if not 0 < mix.temperature < float("inf"):
            raise DataError(f"--domain_temperature is {mix.temperature}; it must be above 0")
        if weight_D.max() == 0:
            raise DataError(f"--domain_weights {mix.weights}: all are 0; give at least one domain some")
        with np.errstate(divide="ignore"):
            self.share_D = np.exp((np.log(weight_D) - np.log(weight_D.max())) / mix.temperature)
        self.share_D /= self.share_D.sum()
        epochs = by_name(mix.epochs, names, "domain_epochs")
        self.limit_D = [int(epochs[name] * rows) if name in epochs else None for name, rows in zip(names, rows_D)]
        self.round_robin_rows = mix.round_robin_steps * batch_rows
        self.stretches = [self.stretch(0, np.zeros(len(names), np.int64))]

    def stretch(self, start, before_D):
        in_turn = start < self.round_robin_rows
        needed = self.batch_rows if in_turn else 1
        left = [d for d, limit in enumerate(self.limit_D) if self.share_D[d] > 0 and (limit is None or limit - before_D[d] >= needed)]
        if not left and in_turn:  # no domain has a whole batch left
            self.round_robin_rows = start
            return self.stretch(start, before_D)
        if not left:
            raise DataError(f"all domains have reached their --domain_epochs after {start} rows: allow more, prepare more text, or train for "
                            "fewer steps")
        table = np.repeat(left, self.batch_rows) if in_turn else np.array(left)[spread(self.share_D[left] / self.share_D[left].sum())]
        for d in set(left) - set(table.tolist()):
            raise DataError(f"domain {self.names[d]} is {self.share_D[d]:.1e} of the mixture, so that no row in {PERIOD:,} would be its own: give it "
                            "more with --domain_weights, or 0")
        stretch = Stretch(start, table, before_D)
        ends = [stretch.until(d, self.limit_D[d] - before_D[d]) for d in left if self.limit_D[d] is not None]
        if in_turn:  # a domain leaves before a batch that it cannot fill
            ends = [end // self.batch_rows * self.batch_rows for end in ends if end is not None] + [self.round_robin_rows]
        stretch.stop = min((end for end in ends if end is not None), default=None)
        return stretch

    def upto(self, number):
        """Stretches as far as row `number`."""
        while self.stretches[-1].stop is not None and self.stretches[-1].stop <= number:
            last = self.stretches[-1]
            self.stretches.append(self.stretch(last.stop, last.counts(last.stop)))

    def which(self, number):
        """The stretch that a row is in, by number."""
        return bisect.bisect_right(self.stretches, number, key=lambda stretch: stretch.start) - 1

    def place(self, number_N):
        """(domain_N, nth_N): domains of rows, and how many rows of its domain come before each. Raises DataError when all domains are used up."""
        self.upto(int(number_N.max()))
        domain_N, nth_N = np.empty((2, len(number_N)), np.int64)
        which_N = np.array([self.which(number) for number in number_N.tolist()])
        for i in np.unique(which_N):
            domain_N[which_N == i], nth_N[which_N == i] = self.stretches[i].place(number_N[which_N == i])
        return domain_N, nth_N


class Batch(NamedTuple):
    inputs_BT: "torch.Tensor"  # int64  # noqa: F821
    targets_BT: "torch.Tensor"  # int64, inputs shifted by one; -1 is not to be predicted  # noqa: F821
    first_row: int              # index of row 0 within the batch of all ranks (of its domain's split, in validation)
    domain_B: "torch.Tensor"    # int64, number of each row's domain, in the order of domains()  # noqa: F821


class Loader:
    """Rows of seq_len tokens in an order that depends on `seed` alone: not on ranks, micro-batches or restarts.

    The position is one integer, the number of rows consumed by all ranks together; `Mixture` says of which domain each is. Epoch e of a domain
    (a pass over all its rows) visits them in the order of `permute(., rows, seed, e)`. Step s consumes `batch_rows` positions; in micro-step m,
    rank r has those from (m*world_size + r)*micro_rows on. A thread reads one step ahead. Raises DataError for damaged, foreign or too few data,
    when batch_rows is not a multiple of world_size*micro_rows, and when `mix` allows fewer than `steps` steps; what the thread meets is raised by
    `next_step`."""

    def __init__(self, data_dir, split="train", *, seq_len, batch_rows, micro_rows, rank=0, world_size=1, seed=0, vocab_size=None,
                 device="cpu", mix=AS_IT_IS, steps=0):
        import torch
        if min(seq_len, batch_rows, micro_rows) < 1 or batch_rows % (world_size * micro_rows):
            raise DataError(f"batch_rows={batch_rows} is not a multiple of world_size={world_size} x micro_rows={micro_rows}: "
                            "change the batch, the micro-batch or the number of processes")
        parts = domains(data_dir)
        self.data = [Rows(part, split, seq_len, vocab_size, tails=False) for part in parts.values()]
        self.rows, self.seed, self.position = [part.total for part in self.data], seed, 0
        for name, rows in zip(parts, self.rows):
            if rows < (batch_rows if len(parts) == 1 else 1):
                raise DataError(f"{Path(data_dir) / name} has {rows} {split} rows of {seq_len} tokens, fewer than the {batch_rows} of one batch: "
                                f"prepare more tokens (`{PREPARE.format('<another folder>')}`) or train with a smaller batch")
        tokens = [sum(len(shard) for _, shard in part.shards) for part in self.data]
        self.mixture = Mixture(mix, list(parts), self.rows, tokens, batch_rows)
        self.mixture.upto(max(0, steps * batch_rows - 1))
        self.seq_len, self.batch_rows, self.micro_rows, self.device = seq_len, batch_rows, micro_rows, torch.device(device)
        self.first_rows = range(rank * micro_rows, batch_rows, world_size * micro_rows)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead = self._thread.submit(self._read, self.position)

    def _read(self, position):
        import torch
        batches = []
        for first_row in self.first_rows:
            domain_B, nth_B = self.mixture.place(position + first_row + np.arange(self.micro_rows))
            inputs, targets = np.empty((2, self.micro_rows, self.seq_len), np.int64)
            for d in np.unique(domain_B):
                here, rows = domain_B == d, self.rows[d]
                epoch, index = np.divmod(nth_B[here], rows)
                seed = (self.seed + int(d) * 0x9E3779B97F4A7C15) % 2**64  # each domain has an order of its own
                numbers = np.concatenate([permute(index[epoch == e], rows, seed, int(e)) for e in np.unique(epoch)])
                inputs[here], targets[here] = self.data[d].read(numbers)
            tensors = map(torch.from_numpy, (inputs, targets, domain_B))
            if self.device.type == "cuda":
                tensors = [tensor.pin_memory() for tensor in tensors]  # only pinned memory copies without blocking
            inputs, targets, domain_B = tensors
            batches.append(Batch(inputs, targets, first_row, domain_B))
        return batches

    def next_step(self):
        """The next optimizer step of this rank: one Batch (micro_rows, seq_len) per micro-step."""
        batches = self._ahead.result()
        self.position += self.batch_rows
        self._ahead = self._thread.submit(self._read, self.position)
        there = lambda tensor: tensor.to(self.device, non_blocking=True)
        return [Batch(there(inputs), there(targets), first_row, there(domain_B)) for inputs, targets, first_row, domain_B in batches]

    def state_dict(self):
        """The position of what `next_step` has returned, whatever was read ahead; the rest tells whether the data are the same."""
        return {"position": self.position, "rows": self.rows, "seed": self.seed, "seq_len": self.seq_len}

    def load_state_dict(self, state):
        """Continue at a saved position, also with another number of ranks. Raises DataError if the order would not be the same."""
        for key in ("rows", "seed", "seq_len"):
            if state[key] != getattr(self, key):
                raise DataError(f"the saved position belongs to {key}={state[key]}, but now {key}={getattr(self, key)}: resume with the "
                                "data and flags that the run began with, or start a new run")
        self.position = int(state["position"])
        self._ahead = self._thread.submit(self._read, self.position)

    def close(self):
        self._thread.shutdown(cancel_futures=True)


def validation_batches(data_dir, *, seq_len, rows, max_tokens=None, rank=0, world_size=1, vocab_size=None, device="cpu"):
    """A generator of Batch (rows, seq_len) over the validation split, in order, domain after domain: batch j of rank r starts at row
    (j*world_size + r)*rows of its domain. With max_tokens only the first rows of each domain count, as many as fit into its part of them. Every
    token but the first of each shard is a target once; every rank gets equally many batches, filled up with inputs 0 and targets -1.
    Raises DataError at the call if there is nothing."""
    import torch
    splits = [Rows(part, "val", seq_len, vocab_size, tails=True) for part in domains(data_dir).values()]
    for data in splits:
        if max_tokens is not None:
            data.total = min(data.total, max_tokens // len(splits) // seq_len)
        if data.total == 0:
            raise DataError(f"{data_dir} gives no validation row: it needs at least 2 tokens, and max_tokens={max_tokens} at least "
                            f"seq_len={seq_len}" + (f" for each of {len(splits)} domains" if len(splits) > 1 else ""))

    def batch(d, first_row):
        inputs, targets = map(torch.from_numpy, splits[d].read(first_row + np.arange(rows)))
        return Batch(inputs.to(device), targets.to(device), first_row, torch.full((rows,), d, device=device))

    return (batch(d, (j * world_size + rank) * rows) for d, data in enumerate(splits) for j in range(-(-data.total // (rows * world_size))))


# ---------------------------------------------------------------------------------------------------------------------
# Documents: (key, body) pairs. The key's hash chooses the split; the body is bytes of text, or uint16 ids

PIECE = 2**18  # a .txt document longer than this is cut at a line end, so that memory stays bounded
SEPARATOR = b"<|endoftext|>"


def split_hash(key, split_seed=0):
    """First 8 bytes of sha256(key), big-endian; the document is validation if that is 0 mod 50. A seed other than 0 goes before the key."""
    prefix = b"%d:" % split_seed if split_seed else b""
    return int.from_bytes(hashlib.sha256(prefix + key).digest()[:8], "big")


def field_document(row, where, args, encoding):
    """The (key, body) of one row (a dict) of a table, from --tokens_field or --text_field."""
    field = args.tokens_field or args.text_field
    if not isinstance(row, dict) or field not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no field {field!r} (it has: {there}): name it with --text_field or --tokens_field")
    if not args.tokens_field:
        if not isinstance(row[field], str):
            raise DataError(f"{where}: field {field!r} holds {type(row[field]).__name__}, not text: name another with --text_field")
        body = row[field].encode("utf-8", "replace")
        return body, body
    wrong = f"{where}: field {field!r} is not a list of ids from 0 to {encoding.vocab_size - 1}: choose another --tokens_field, or the " \
            "--encoding it was made with"
    with explained(wrong, ValueError):  # a ragged list
        ids = np.asarray(row[field])
    if ids.ndim != 1 or (len(ids) and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= encoding.vocab_size)):
        raise DataError(wrong)
    text = np.flatnonzero(ids != encoding.eot_token)  # end-of-text at either end goes: each document gets one in front
    body = ids[text[0] : text[-1] + 1].astype("<u2") if len(text) else np.empty(0, "<u2")
    return body.tobytes(), body


def has_text(document):
    return bool(document[1].strip() if isinstance(document[1], bytes) else len(document[1]))


READ = 2**22  # bytes of a text file at a time
SEPARATOR_LINE = re.compile(rb"^[ \t\r\v\f]*" + re.escape(SEPARATOR) + rb"[ \t\r\v\f]*$\n?", re.MULTILINE)


def text_documents(file, where, args, encoding):
    """A text file is one document, unless lines <|endoftext|> separate several. It is searched in big blocks: line by line, reading took
    as long as tokenising on the other core."""
    if args.tokens_field:
        raise DataError(f"{where} is plain text: --tokens_field needs .jsonl or .parquet")
    text, at_end = b"", False
    read = file.read1 if isinstance(file, io.BufferedReader) else file.read  # a pipe gives what it has, and Ctrl-C is heard in between
    while not at_end:
        block = read(READ)
        text, at_end, start = text + block, not block, 0
        for line in SEPARATOR_LINE.finditer(text, 0, len(text) if at_end else text.rfind(b"\n") + 1):  # not in a line that may go on
            yield from ((body, body) for body in cut(text[start : line.start()], 0))
            start = line.end()
        *pieces, text = cut(text[start:], 0 if at_end else 2 * PIECE + 4)
        yield from ((body, body) for body in pieces)
    yield text, text


def cut(text, rest):
    """[bytes] of which all but the last end at the first line end past PIECE bytes, or, in a longer line, between two characters; the last has
    at least `rest` bytes, if there are so many."""
    pieces, start = [], 0
    while len(text) - start >= max(PIECE, rest):
        line = text.rfind(b"\n", start, start + PIECE - 1) + 1 or start
        end = text.find(b"\n", start + PIECE - 1, line + PIECE) + 1 or min(line + PIECE, len(text))
        while end < len(text) and text[end - 1 : end] != b"\n" and text[end] & 0xC0 == 0x80 and end < line + PIECE + 3:
            end += 1  # inside a UTF-8 character
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def jsonl_documents(file, where, args, encoding):
    for number, line in enumerate(file, 1):
        if line.strip():
            with explained(f"{where}, line {number} is not JSON ({{error}}): mend or remove it", ValueError, RecursionError):
                row = json.loads(line)
            yield field_document(row, f"{where}, line {number}", args, encoding)


def parquet_documents(file, where, args, encoding):
    import pyarrow.parquet
    table = pyarrow.parquet.ParquetFile(file)
    columns = [name for name in (args.tokens_field or args.text_field,) if name in table.schema_arrow.names]
    if not columns:
        field_document(dict.fromkeys(table.schema_arrow.names), where, args, encoding)  # raises with the names there are
    for batch in table.iter_batches(64, columns=columns):
        for row in batch.to_pylist():
            yield field_document(row, where, args, encoding)


def open_zst(path):
    import pyarrow  # comes with datasets, reads zstandard, so no package of its own is needed
    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


READERS = {".txt": text_documents, ".md": text_documents, ".jsonl": jsonl_documents, ".parquet": parquet_documents}
OPENERS = {"": lambda path: open(path, "rb"), ".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}
FILE_NAME = re.compile(r".*?(\.txt|\.md|\.jsonl|\.parquet(?=$))(|\.gz|\.xz|\.zst)", re.DOTALL)

# ---------------------------------------------------------------------------------------------------------------------
# Sources: each gives the documents in a fixed order, and facts for meta.json

TORCH_CORPUS = {"2.13.0": "02e0de8d652b659a7ed1a9482f8afdefb99feeccd8d16dfbfabe63b16496d15f"}


def python_corpus(site_packages):
    """The *.py files below torch, in the order of their path, and the sha256 of it all: path, NUL, contents, for each file.
    Files named version.py differ between builds of one version, so they are left out."""
    files = {path.relative_to(site_packages).as_posix(): path for path in Path(site_packages, "torch").rglob("*.py") if path.name != "version.py"}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes())
    return [(name, files[name]) for name in sorted(files)], digest.hexdigest()


def python_documents(args, encoding):
    """Each file is one document, empty ones too; its path relative to site-packages chooses the split."""
    site_packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    files, digest = python_corpus(site_packages)
    pinned = TORCH_CORPUS.get(version := torch_version())
    if digest != pinned:
        state = f"differs from the pinned corpus of torch {version}" if pinned else f"is of torch {version}, which is not pinned"
        print(f"note: the Python source in {site_packages} {state} ({', '.join(TORCH_CORPUS)}): "
              "losses are not comparable with published ones", file=sys.stderr)
    return ((name.encode(), path.read_bytes()) for name, path in files), \
        {"torch": version, "corpus_sha256": digest, "corpus_is_pinned": digest == pinned}


def torch_version():
    with explained("--source python reads the source of torch, which is not installed: `pip install torch`", ImportError):
        return importlib.metadata.version("torch").split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 hold the same files


def files_in(path):
    """A file, or the files of known kinds in a folder."""
    return sorted(p for p in path.rglob("*") if p.is_file() and FILE_NAME.fullmatch(p.name)) if path.is_dir() else [path]


def stamps(paths):
    """{file: bytes and time of its last change} of what --path names: shards made of it are not those of the text that it holds later."""
    stats = {str(file): file.stat() for path in paths for file in files_in(Path(path)) if file.exists()}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def was_asked(meta, request):
    """Whether shards are what a request would make: of files that are as they were, or gone."""
    made = meta.get("request") or {}
    gone = {file: stamp for file, stamp in made.get("inputs", {}).items() if not Path(file).exists()}
    return made == request | ({"inputs": gone | request["inputs"]} if "inputs" in request else {})


def files_documents(args, encoding):
    paths = []
    for path in map(Path, args.path):
        inside = files_in(path)
        if not path.exists() or not inside or not FILE_NAME.fullmatch(inside[0].name):
            raise DataError(f"--path {path} is not a file or folder of {', '.join(READERS)} (text and jsonl also .gz, .xz, .zst)")
        paths += inside

    def documents():
        for path in paths:
            kind, compression = FILE_NAME.fullmatch(path.name).groups()
            with explained(f"{path} cannot be read ({{error}}): mend it or leave it out of --path",
                           OSError, EOFError, lzma.LZMAError, zlib.error, ImportError, ValueError), OPENERS[compression](path) as file:
                yield from filter(has_text, READERS[kind](file, path, args, encoding))

    return documents(), {}


# The toy: a document is one problem. `7sdn=6` is a chain of steps mod 11 with digits 0 to 9 and a, `58+967=1025` a sum of two numbers.
STEPS = {"s": lambda v: v + 1, "d": lambda v: 2 * v, "n": lambda v: -v, "e": lambda v: v}  # successor, double, negate, equal
DIGITS = "0123456789a"
MOST_STEPS, MOST_DIGITS = 8, 4
PROBLEM = re.compile(rb"[0-9a]([sdne]+)=([0-9a])|([0-9]+)\+([0-9]+)=([0-9]+)")


def chain(rng):
    """1 to 8 steps, equally often."""
    value = rng.integers(len(DIGITS))
    text = DIGITS[value]
    for step in rng.choice(list(STEPS), rng.integers(1, MOST_STEPS + 1)):
        text, value = text + step, STEPS[step](value) % len(DIGITS)
    return f"{text}={DIGITS[value]}"


def addition(rng):
    """Of 1 to 4 digits each, equally often."""
    a, b = (rng.integers(10 ** rng.integers(1, MOST_DIGITS + 1)) for _ in range(2))
    return f"{a}+{b}={a + b}"


def difficulty(text):
    """How many operations it takes to know each byte of the answers in text (bytes): for a `chain` its steps that change something, for a
    `sum` its columns. {"chain": int64 (len(text),), "sum": the same}, 0 elsewhere. Of tokens of encoding bytes, replace 256 by a newline."""
    labels = {"chain": np.zeros(len(text), np.int64), "sum": np.zeros(len(text), np.int64)}
    for match in PROBLEM.finditer(text):
        steps, _, *numbers, _ = match.groups()
        if steps is not None:
            labels["chain"][slice(*match.span(2))] = len(steps) - steps.count(b"e")
        else:
            labels["sum"][slice(*match.span(5))] = max(map(len, numbers))
    return labels


def arithmetic_documents(args, encoding):
    """Chains and sums in turn, drawn from split_seed without end. The text chooses the split, so validation has problems that training never has."""
    if args.max_tokens is None:
        raise DataError("--source arithmetic has no end: say how much of it with --max_tokens, for instance --max_tokens 4_000_000")

    def documents():
        rng = np.random.default_rng(args.split_seed)
        while True:
            for problem in (chain(rng), addition(rng)):
                yield problem.encode(), problem.encode()

    return documents(), {}


class Part(NamedTuple):
    """A data set on the Hugging Face hub that streams without code of its own."""
    dataset: str
    subset: "str | None"
    fields: tuple  # whose texts make a document, one below the other


# Six domains. Where the notes that they come from name what is no data set on the hub, or one that needs code or permission, the nearest:
# deepmind's math_dataset (code) -> OpenWebMath, the-stack-v2 (ids without files) -> CodeParrot, case_law (on request) -> the Common Pile's copy of
# the same cases, google/flan (none) -> the collection as Muennighoff keeps it. GSM8K, Dolly and OASST are short and come first.
DOMAINS = {
    "math": (Part("openai/gsm8k", "main", ("question", "answer")), Part("open-web-math/open-web-math", None, ("text",))),
    "python": (Part("codeparrot/codeparrot-clean", None, ("content",)),),
    "web": (Part("HuggingFaceFW/fineweb", "sample-10BT", ("text",)),),
    "science": (Part("ccdv/arxiv-summarization", "document", ("article",)),),
    "legal": (Part("common-pile/caselaw_access_project", None, ("text",)), Part("NortheasternUniversity/big_patent", "all", ("description",))),
    "chat": (Part("databricks/databricks-dolly-15k", None, ("instruction", "context", "response")), Part("OpenAssistant/oasst1", None, ("text",)),
             Part("Muennighoff/flan", None, ("inputs", "targets"))),
}
DOMAIN_TOKENS = 20_000_000  # of each, from the hub, without --max_tokens


def hub_documents(parts):
    """Documents of some data sets, one after another."""
    def source(args, encoding):
        import datasets

        def documents():
            for part in parts:
                with explained(f"data set {part.dataset} cannot be read ({{error}}): check the network, or bring text of your own with "
                               f"--path {args.source}=FILE", Exception):  # hub, network and parser errors share no base class
                    for number, row in enumerate(datasets.load_dataset(part.dataset, part.subset, split="train", streaming=True), 1):
                        fields = [argparse.Namespace(text_field=field, tokens_field=None) for field in part.fields]
                        bodies = [field_document(row, f"{part.dataset}, row {number}", field, encoding)[1] for field in fields]
                        body = b"\n".join(body for body in bodies if body)
                        if has_text((body, body)):
                            yield body, body

        return documents(), {"datasets": [part.dataset for part in parts]}
    return source


def tagged(source, tag):
    """The same documents with a line in front of each. Their split stays as it was."""
    def with_tag(args, encoding):
        documents, facts = source(args, encoding)
        line = f"{tag}\n"
        front = {bytes: line.encode(), np.ndarray: encoding.encode(line)}
        join = lambda body: front[bytes] + body if isinstance(body, bytes) else np.concatenate((front[np.ndarray], body))
        return ((key, join(body)) for key, body in documents), facts | {"source_tag": line}
    return with_tag


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


def write_meta(folder, meta):
    """meta.json, one entry to a line, with its own sha256."""
    meta = meta | {"sha256": seal(meta)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())  # token_bytes on one line too
    (folder / "meta.json").write_text("{\n" + lines + "\n}\n")


def hf_documents(args, encoding):
    import datasets

    def documents():
        with explained(f"data set {args.dataset} cannot be read ({{error}}): check --dataset, --subset, --split_name and the network, or use "
                       "--source python, which needs none", Exception):  # hub, network and parser errors share no base class
            stream = datasets.load_dataset(args.dataset, args.subset, split=args.split_name, streaming=True)
            rows = (field_document(row, f"{args.dataset}, row {number}", args, encoding) for number, row in enumerate(stream, 1))
            yield from filter(has_text, rows)

    return documents(), {}


def fineweb(args, folder):
    """Download FineWeb's ready shards; each is checked before it gets its name, so an interrupted run continues."""
    if args.encoding != "gpt2":
        raise DataError("the FineWeb shards hold gpt2 tokens: leave --encoding out, or tokenise it with --source hf --dataset HuggingFaceFW/fineweb")
    import huggingface_hub
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"fineweb_{'train' if number else 'val'}_{number:06d}.bin" for number in range(args.shards + 1)]
    for path in {*folder.glob("*.bin")} - {folder / name for name in names}:
        path.unlink()  # of an interrupted run with more shards
    for name in names:
        with contextlib.suppress(DataError):
            read_shard(folder / name)
            continue
        with explained(f"{name} cannot be downloaded ({{error}}): check the network and run the same command again to continue, or use "
                       "--source python, which needs none", Exception):  # hub and network errors share no base class
            file = huggingface_hub.hf_hub_download("kjj0/fineweb10B-gpt2", name, repo_type="dataset", local_dir=folder / "download")
        try:
            read_shard(file)
        except DataError:
            os.unlink(file)  # or the next run would take it for downloaded
            raise
        os.replace(file, folder / name)
    shutil.rmtree(folder / "download", ignore_errors=True)
    try:
        encoding = get_encoding("gpt2")
    except DataError as error:
        print(f"note: no bytes per token and no gzip/xz figures in meta.json, so no bits per byte: {error}", file=sys.stderr)
        encoding = None
    return describe(folder, encoding)


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


COMPRESSED_BYTES = 2_000_000  # of validation text, at most: xz needs a second per megabyte, in which a core tokenises twenty


class Compressors:
    """gzip -9 and xz -9 of the first COMPRESSED_BYTES of a text that comes in pieces (bytes), in a thread beside what makes the text."""

    def __init__(self):
        self.thread, self.bytes = concurrent.futures.ThreadPoolExecutor(1), 0
        self.streams = {"gzip_bpb": zlib.compressobj(9, wbits=31), "xz_bpb": lzma.LZMACompressor(preset=9)}
        self.sizes, self.pending = dict.fromkeys(self.streams, 0), []

    def feed(self, piece):
        piece = piece[: COMPRESSED_BYTES - self.bytes]
        self.bytes += len(piece)
        if piece:
            self.pending.append(self.thread.submit(self.compress, piece))

    def compress(self, piece):
        for name, stream in self.streams.items():
            self.sizes[name] += len(stream.compress(piece))

    def facts(self):
        """Bits per byte that each needs, and for how many bytes; once, at the end."""
        self.thread.shutdown()
        for future in self.pending:
            future.result()  # raises what it met
        sizes = {name: size + len(self.streams[name].flush()) for name, size in self.sizes.items()}
        return {"compressed_bytes": self.bytes or None, **{name: 8 * size / self.bytes if self.bytes else None for name, size in sizes.items()}}


def compressed_bpb(text):
    """What general compressors need for a text (bytes), in bits per byte: gzip -9 and xz -9."""
    compressors = Compressors()
    compressors.feed(text)
    return {name: bpb for name, bpb in compressors.facts().items() if name.endswith("bpb")}


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

    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
        if (out / "meta.json").exists() and was_asked(load_meta(out), request):
            tokens = sum(len(tokens) for part in domains(out).values() for split in ("train", "val") for _, tokens in open_split(part, split))
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


if __name__ == "__main__":
    main()
