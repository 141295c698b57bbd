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
import bisect
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import os
import re
import zlib
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
# Compressors: what a model's bits per byte are compared with

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


def difficulty(text):
    from tools import sources
    return sources.difficulty(text)


if __name__ == "__main__":
    from tools.prepare import main
    main()
