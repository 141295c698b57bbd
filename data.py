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


def prepare_commands(folder):
    """The commands, for an error message, that fill a folder with shards."""
    return f"`python data.py --source python --encoding bytes --out {folder}` or `python data.py --source fineweb --out {folder}`"


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


def shard_folders(folder):
    """Sub-folders that hold shards, sorted by name."""
    return [path for path in sorted(folder.glob("*/")) if path.suffix != ".partial" and has_shards(path)]


def read_meta(folder):
    """What meta.json of a folder says; {} without one. Raises DataError when it is damaged."""
    if not (folder / "meta.json").exists():
        return {}
    with explained(f"{folder}/meta.json is damaged ({{error}}): remove {folder} and run {prepare_commands(folder)}",
                   ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        meta = json.loads((folder / "meta.json").read_text())
        if meta.get("sha256", seal(meta)) != seal(meta):
            raise ValueError("it does not match its own sha256")
        if any(not split_of(shard["file"]) or type(shard["tokens"]) is not int for shard in meta.get("shards") or []):
            raise ValueError("a shard without name or number of tokens")
        return {key: meta[key] for key in GPT2} | meta


def load_meta(folder):
    """meta.json of a folder of shards as a dict; without one, the values that hold for FineWeb's GPT-2 shards.
    Raises DataError if the folder is missing, holds no shards or is a mixture, or if its meta.json is damaged."""
    folder = Path(folder)
    if not has_shards(folder):
        if parts := shard_folders(folder):
            raise DataError(f"{folder} is a mixture of domains ({', '.join(path.name for path in parts)}): train on it with "
                            f"`python train_zoo.py --data {folder}`, or choose one of its sub-folders")
        raise DataError(f"{folder} holds no token shards: run {prepare_commands(folder)}")
    return UNKNOWN | (read_meta(folder) or GPT2)


UNKNOWN = dict.fromkeys(("source", "token_bytes", "split_seed", "splits", "shards", "gzip_bpb", "xz_bpb", "compressed_bytes"))


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
                            f"and run {prepare_commands(folder)}")
    for name in found.keys() - listed.keys() if meta["shards"] is not None else ():
        raise DataError(f"{folder}/{name} is a shard that meta.json does not list: move it to a folder of its own")
    if not shards:
        raise DataError(f"{folder} holds no {split} shard (*_{split}_*.bin): remove it and run {prepare_commands(folder)}")
    return shards


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder, rank=0, world_size=1):
    """Raises DataError unless every world_size-th shard has the sha256 in meta.json. Shards without a sha256 are not checked."""
    listed = [(path, digest) for path, digest in listed_sha256(folder).items() if digest]
    for path, digest in listed[rank::world_size]:
        with explained(f"{path} cannot be read ({{error}}): remove {folder} and run {prepare_commands(folder)}", OSError):
            if sha256_of(path) != digest:
                raise DataError(f"{path} does not match the sha256 in meta.json: remove {folder} and run {prepare_commands(folder)}")


def fingerprint(folder):
    """{shard: tokens and sha256}: the sha256 in meta.json, else that of 16 pages spread over the shard."""
    listed = listed_sha256(folder)

    def sample_sha256(tokens):
        pages = np.linspace(0, max(0, len(tokens) - 2048), 16).astype(int)
        return hashlib.sha256(b"".join(tokens[page : page + 2048].tobytes() for page in pages)).hexdigest()

    shards = [shard for split in ("train", "val") for shard in open_split(folder, split)]
    return {path.name: f"{len(tokens)} tokens, sha256 {listed.get(path) or sample_sha256(tokens)}" for path, tokens in shards}


def listed_sha256(folder):
    """{path: sha256 or None} of the shards in meta.json."""
    return {Path(folder) / shard["file"]: shard.get("sha256") for shard in load_meta(folder)["shards"] or []}


class ShardRows:
    """All rows of one split, numbered through its shards. Row i of a shard of n tokens predicts tokens i*seq_len+1 ... (i+1)*seq_len,
    so rows overlap by one token and a shard has (n-1) // seq_len of them, plus a shorter one if `tails`."""

    def __init__(self, folder, split, seq_len, vocab_size, tails):
        self.folder, self.split, self.shards, self.seq_len = folder, split, open_split(folder, split), seq_len
        self.vocab_size = vocab_size or load_meta(folder)["vocab_size"]
        counts = [(len(tokens) - 1 + (seq_len - 1) * tails) // seq_len for _, tokens in self.shards]
        self.first = np.concatenate(([0], np.cumsum(counts)))  # number of each shard's first row, then of all rows
        self.total = int(self.first[-1])

    def require(self, count):
        """Raises DataError unless there are at least `count` rows."""
        if self.total < count:
            raise DataError(f"{self.folder} has {self.total} {self.split} rows of {self.seq_len} tokens, fewer than the {count} of one batch: "
                            f"prepare more tokens ({prepare_commands('<another folder>')}) or train with a smaller batch")

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
                                    f"with another encoding; run {prepare_commands('<another folder>')} and pass that to --data")
                inputs[i, : len(piece) - 1], targets[i, : len(piece) - 1] = piece[:-1], piece[1:]
        return inputs, targets

    def read_shuffled(self, number_N, seed):
        """Rows of an endless stream, by their number in it: all rows epoch after epoch, in an order that depends on (seed, epoch) alone."""
        epoch_N, index_N = np.divmod(number_N, self.total)
        for epoch in np.unique(epoch_N):
            index_N[epoch_N == epoch] = permute(index_N[epoch_N == epoch], self.total, seed, int(epoch))
        return self.read(index_N)


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


class Batch(NamedTuple):
    inputs_BT: "torch.Tensor"   # int64  # noqa: F821
    targets_BT: "torch.Tensor"  # int64, inputs shifted by one; -1: no target  # noqa: F821
    first_row: int              # index of row 0 within the batch of all ranks; validation: within the split


class Loader:
    """Shuffled rows of seq_len tokens, in an order that depends on `seed` alone: not on ranks, micro-batches or restarts.

    The position is one integer, the number of rows consumed by all ranks together. Each step consumes batch_rows; in
    micro-step m, rank r reads those from (m * world_size + r) * micro_rows on. A thread reads one step ahead, and
    `next_step` raises its errors. Raises DataError for damaged, foreign or too few data, and if batch_rows is not a
    multiple of world_size * micro_rows."""

    def __init__(self, folder, split="train", *, seq_len, batch_rows, micro_rows, rank=0, world_size=1, seed=0, vocab_size=None,
                 device="cpu"):
        import torch
        if min(seq_len, batch_rows, micro_rows) < 1 or batch_rows % (world_size * micro_rows):
            raise DataError(f"batch_rows={batch_rows} is not a multiple of world_size={world_size} x micro_rows={micro_rows}: "
                            "change the batch, the micro-batch or the number of processes")
        self.seq_len, self.batch_rows, self.micro_rows, self.seed = seq_len, batch_rows, micro_rows, seed
        self.device, self.position = torch.device(device), 0
        self.first_rows = range(rank * micro_rows, batch_rows, world_size * micro_rows)
        self._open(folder, split, vocab_size)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead = self._thread.submit(self._read_step, self.position)

    def next_step(self):
        """Batches of this rank's next optimizer step, one (micro_rows, seq_len) per micro-step, on the device."""
        batches = self._ahead.result()
        self.position += self.batch_rows
        self._ahead = self._thread.submit(self._read_step, self.position)
        return [map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch) for batch in batches]

    def state_dict(self):
        """Position after the last `next_step`, and the settings that its meaning depends on."""
        return {"position": self.position, "rows": self.row_counts, "seed": self.seed, "seq_len": self.seq_len}

    def load_state_dict(self, state):
        """Continue at a saved position, also with another number of ranks. Raises DataError if the order would differ."""
        for key, value in self.state_dict().items():
            if key != "position" and state[key] != value:
                raise DataError(f"the saved position belongs to {key}={state[key]}, but now {key}={value}: resume with the "
                                "data and flags that the run began with, or start a new run")
        self.position = int(state["position"])
        self._ahead = self._thread.submit(self._read_step, self.position)

    def close(self):
        self._thread.shutdown(cancel_futures=True)

    def _open(self, folder, split, vocab_size):
        self.rows = ShardRows(folder, split, self.seq_len, vocab_size, tails=False)
        self.rows.require(self.batch_rows)
        self.row_counts = [self.rows.total]

    def _read_step(self, position):
        batches = [self._read_batch(position + first_row + np.arange(self.micro_rows), first_row) for first_row in self.first_rows]
        if self.device.type == "cuda":  # only pinned memory copies without blocking
            batches = [map_tensors(lambda tensor: tensor.pin_memory(), batch) for batch in batches]
        return batches

    def _read_batch(self, number_N, first_row):
        """Batch of rows of the stream, by their numbers."""
        import torch
        inputs, targets = self.rows.read_shuffled(number_N, self.seed)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), first_row)


def map_tensors(function, batch):
    """The batch with `function` applied to each of its tensors."""
    return batch._make(value if isinstance(value, int) else function(value) for value in batch)


def validation_batches(folder, *, seq_len, rows, max_tokens=None, rank=0, world_size=1, vocab_size=None, device="cpu"):
    """Generator of Batch (rows, seq_len) over the validation split, in order: batch j of rank r starts at row (j * world_size + r) * rows.

    max_tokens limits it to the first max_tokens // seq_len rows. Each token but the first of a shard is a target once. All
    ranks get equally many batches, padded with inputs 0 and targets -1. Raises DataError at the call if there is no row."""
    import torch
    split = ShardRows(folder, "val", seq_len, vocab_size, tails=True)
    if max_tokens is not None:
        split.total = min(split.total, max_tokens // seq_len)
    if split.total == 0:
        raise DataError(f"{folder} gives no validation row: it needs at least 2 tokens, and max_tokens={max_tokens} at least seq_len={seq_len}")

    def read_batch(first_row):
        inputs, targets = map(torch.from_numpy, split.read(first_row + np.arange(rows)))
        return Batch(inputs.to(device), targets.to(device), first_row)

    return (read_batch(first_row) for first_row in range(rank * rows, -(-split.total // (rows * world_size)) * rows * world_size, rows * world_size))


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


if __name__ == "__main__":
    from tools.prepare import main
    main()
