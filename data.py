"""Token shards, and the loader that reads them for training.

    python data.py --source python --encoding bpe      # shards of the Python source of the installed torch; no download
    python data.py --help                              # all sources of text

All that training needs lives here, on numpy and torch alone: shards, a folder of shards, the loader, validation
batches, and compressors to compare a model with. Encodings are in tokenizer.py, the command line in tools/prepare.py.

A folder holds `<name>_train_000001.bin`, ... and `<name>_val_000000.bin`. A shard is 256 int32 (magic, version, token
count), then uint16 tokens: the format of llm.c and modded-nanogpt, whose FineWeb shards load unchanged. Each document
starts with the end-of-text token. `meta.json` names the encoding and lists the shards with their sha256.
"""
import concurrent.futures
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError, file_sha256


@contextlib.contextmanager
def as_data_error(sentence, *kinds):
    """Re-raise errors of these kinds as UserError(sentence), with {error} replaced by the reason."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(sentence.replace("{error}", reason)) from error


def prepare_commands(folder):
    """Commands that fill a folder with shards, for the end of an error message."""
    sources = ("--source python --encoding bpe", "--source fineweb")
    return " or ".join(f"`python data.py {source} --out {folder}`" for source in sources)


# ---------------------------------------------------------------------------------------------------------------------
# Shards

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def write_shard(path, tokens):
    """Write tokens, integers below 65536 of shape (n,), 0 < n < 2**31, as one shard. Returns the sha256 of its bytes.

    Atomic: a reader sees the whole shard or the previous file. Raises UserError for other tokens, or if the file cannot
    be written."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 0 < len(tokens) < 2**31:
        raise UserError(f"{path}: a shard holds 1 to 2**31-1 integers in one dimension, "
                        f"not {tokens.dtype} of shape {tokens.shape}")
    if tokens.dtype != np.uint16 and (tokens.min() < 0 or tokens.max() > 65535):
        raise UserError(f"{path}: token ids {tokens.min()}..{tokens.max()} do not fit uint16; "
                        "use an encoding with ids below 65536")

    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    contents = header.data, np.ascontiguousarray(tokens, "<u2").data
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with as_data_error(f"{path} cannot be written ({{error}}): free some space or choose another --out", OSError):
        try:
            with open(temporary, "wb") as file:
                file.writelines(contents)
                file.flush()
                os.fsync(file.fileno())  # without it, a crash after the rename can leave a file without its contents
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    digest = hashlib.sha256()
    for part in contents:
        digest.update(part)
    return digest.hexdigest()


def read_shard(path):
    """Tokens of one shard: np.memmap (n,) uint16. Raises UserError unless magic, version, count and size agree."""
    mend = "; remove it and prepare its folder again with `python data.py`"
    with as_data_error(f"{path} cannot be read ({{error}})" + mend, OSError):
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", 3)
    if size < HEADER_BYTES or header[0] != MAGIC:
        raise UserError(f"{path} is not a token shard (no header with magic {MAGIC})" + mend)
    if header[1] != VERSION:
        raise UserError(f"{path} is a token shard of version {header[1]}, not {VERSION}" + mend)
    count = int(header[2])
    if count <= 0 or size != HEADER_BYTES + 2 * count:
        held = (size - HEADER_BYTES) / 2
        raise UserError(f"{path} is damaged: its header counts {count} tokens, it holds {held:g}" + mend)
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))


# ---------------------------------------------------------------------------------------------------------------------
# A folder of shards

TOKENIZER = "tokenizer.json"  # beside shards, in checkpoints and in shared folders
GPT2_META = {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}
UNKNOWN_META = dict.fromkeys(
    ("source", "token_bytes", "split_seed", "splits", "shards", "gzip_bpb", "xz_bpb", "compressed_bytes"))


def load_meta(folder):
    """meta.json of a folder of shards as a dict; without one, that of FineWeb's shards: GPT2_META, the rest None.

    Raises UserError if the folder is missing, holds no shards or is a mixture, or if meta.json is damaged."""
    folder = Path(folder)
    if not has_shards(folder):
        if parts := shard_folders(folder):
            names, mend = ", ".join(path.name for path in parts), f"pass one of them as --data, such as {parts[0]}"
            if read_meta_json(folder).get("domains"):
                raise UserError(f"{folder} is a mixture of domains ({names}): train on it with "
                                f"`python train_zoo.py --data {folder}`, or {mend}")
            raise UserError(f"{folder} is a folder of data folders ({names}): {mend}, or train on all of them together "
                            f"as a mixture of domains with `python train_zoo.py --data {folder}`")
        raise UserError(describe_missing(folder))
    return in_folder(UNKNOWN_META | (read_meta_json(folder) or GPT2_META), folder)


def is_tokenizer(encoding):
    """Whether an encoding is the path of a tokenizer.json, not a name."""
    return Path(encoding or "").suffix == ".json"


def stored_name(encoding):
    """The name of an encoding in meta.json, config.json and manifests: TOKENIZER for a path, as the file is copied."""
    return TOKENIZER if is_tokenizer(encoding) else encoding


def in_folder(facts, folder):
    """The entries of a file in `folder`, with the path of the tokenizer.json there as `encoding` if that is named."""
    return facts | ({"encoding": str(Path(folder) / TOKENIZER)} if facts["encoding"] == TOKENIZER else {})


def describe_missing(folder):
    """Sentence on a folder without shards: the folders beside it and in data/ that hold some, or how to fill it."""
    places = (Path(folder).parent, Path("data"))
    is_mixture = lambda path: os.path.exists(path / "meta.json") and shard_folders(path)
    found = {path for place in places for path in place.glob("*/") if has_shards(path) or is_mixture(path)}
    named_by_preset = Path(folder).name in ("python", "fineweb")  # other names may be mistyped
    mend = f"run {prepare_commands(folder)}" if named_by_preset or not found else "prepare it with `python data.py`"
    there = f"pass --data {' or '.join(sorted(map(str, found)))}, or " if found else ""
    return f"{folder} holds no token shards: {there}{mend}"


def read_meta_json(folder):
    """Contents of meta.json; {} if there is none. Raises UserError if it is damaged."""
    if not (folder / "meta.json").exists():
        return {}
    damaged = f"{folder}/meta.json is damaged ({{error}}): remove {folder} and run {prepare_commands(folder)}"
    with as_data_error(damaged, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        meta = json.loads((folder / "meta.json").read_text())
        if meta.get("sha256", meta_sha256(meta)) != meta_sha256(meta):
            raise ValueError("it does not match its own sha256")
        if any(not split_of(shard["file"]) or type(shard["tokens"]) is not int for shard in meta.get("shards") or []):
            raise ValueError("a shard without name or number of tokens")
        return {key: meta[key] for key in GPT2_META} | meta


def meta_sha256(meta):
    """sha256 of all entries of meta.json but `sha256` itself."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_split(folder, split):
    """[(path, tokens)] of the shards of one split, sorted by name.

    Raises UserError if the split has no shards, or not those that meta.json lists."""
    folder, meta = Path(folder), load_meta(folder)
    shards = [(path, read_shard(path)) for path in shard_paths(folder, split)]
    found = {path.name: len(tokens) for path, tokens in shards}
    listed = {shard["file"]: shard["tokens"] for shard in meta["shards"] or [] if split_of(shard["file"]) == split}
    for name, tokens in listed.items():
        if found.get(name) != tokens:
            raise UserError(f"{folder}/{name} is not the shard of {tokens} tokens that meta.json lists: "
                            f"remove {folder} and run {prepare_commands(folder)}")
    for name in found.keys() - listed.keys() if meta["shards"] is not None else ():
        raise UserError(f"{folder}/{name} is a shard that meta.json does not list: move it to a folder of its own")
    if not shards:
        raise UserError(f"{folder} holds no {split} shard (*_{split}_*.bin): remove it and run "
                        f"{prepare_commands(folder)}")
    return shards


def verify(folder, rank=0, world_size=1):
    """Compare every world_size-th shard with its sha256 in meta.json, if any. Raises UserError if they differ."""
    mend = f"remove {folder} and run {prepare_commands(folder)}"
    listed = [(path, digest) for path, digest in listed_sha256(folder).items() if digest]
    if digest := load_meta(folder).get("tokenizer_sha256"):
        listed.append((Path(folder) / TOKENIZER, digest))
    for path, digest in listed[rank::world_size]:
        with as_data_error(f"{path} cannot be read ({{error}}): {mend}", OSError):
            if file_sha256(path) != digest:
                raise UserError(f"{path} does not match the sha256 in meta.json: {mend}")


def fingerprint(folder):
    """{shard name: number of tokens and sha256}. The sha256 is meta.json's, else that of 16 pages of the shard."""
    listed = listed_sha256(folder)

    def sample_sha256(tokens):
        pages = np.linspace(0, max(0, len(tokens) - 2048), 16).astype(int)
        return hashlib.sha256(b"".join(tokens[page : page + 2048].tobytes() for page in pages)).hexdigest()

    shards = [shard for split in ("train", "val") for shard in open_split(folder, split)]
    digests = {path: listed.get(path) or sample_sha256(tokens) for path, tokens in shards}
    return {path.name: f"{len(tokens)} tokens, sha256 {digests[path]}" for path, tokens in shards}


def listed_sha256(folder):
    """{path: sha256 or None} of the shards in meta.json."""
    return {Path(folder) / shard["file"]: shard.get("sha256") for shard in load_meta(folder)["shards"] or []}


MARKER = ".preparing"  # file in a folder that data.py is filling: the process, which holds a lock on it


def has_shards(folder):
    """Whether a folder holds shards of its own. Raises UserError if its name is one that no folder can have."""
    with as_data_error(f"{folder} cannot be read ({{error}}): choose another folder", OSError):
        return any(split_of(path.name) for path in folder.glob("*.bin"))


def shard_folders(folder):
    """Sub-folders that hold shards, sorted by name; unfinished ones end in .partial and are left out."""
    return [path for path in sorted(folder.glob("*/")) if path.suffix != ".partial" and has_shards(path)]


def shard_paths(folder, split):
    return sorted(path for path in folder.glob("*.bin") if split_of(path.name) == split)


def split_of(name):
    """Split that ends the name of a shard, train or val; None for other files."""
    match = re.fullmatch(r".+_(train|val)_\d+\.bin", name)
    return match and match[1]


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a split, in order and shuffled


class ShardRows:
    """Rows of seq_len tokens of one split, numbered through its shards.

    The inputs of row i of a shard start at token i * seq_len; the targets are one token later, so rows overlap by one
    token. A shard of n tokens has (n - 1) // seq_len rows, plus a shorter one if `tails`."""

    def __init__(self, folder, split, seq_len, vocab_size, tails):
        self.folder, self.split, self.seq_len = folder, split, seq_len
        self.shards = open_split(folder, split)
        self.vocab_size = vocab_size or load_meta(folder)["vocab_size"]
        counts = [(len(tokens) - 1 + (seq_len - 1) * tails) // seq_len for _, tokens in self.shards]
        self.first = np.concatenate(([0], np.cumsum(counts)))  # number of each shard's first row, then of all rows
        self.total = int(self.first[-1])

    def require(self, count):
        """Raises UserError unless there are at least `count` rows."""
        if self.total < count:
            raise UserError(f"{self.folder} has {self.total} {self.split} rows of {self.seq_len} tokens, fewer than "
                            f"the {count} of one batch: prepare more tokens ({prepare_commands('<another folder>')}) "
                            "or train with a smaller batch")

    def read(self, numbers):
        """(inputs, targets) of rows by number, int64 (len(numbers), seq_len), padded with inputs 0 and targets -1.

        A number beyond the last row gives a row of padding. Raises UserError for a token id beyond the vocabulary."""
        inputs = np.zeros((len(numbers), self.seq_len), np.int64)
        targets = np.full_like(inputs, -1)
        for i, number in enumerate(numbers):
            if number < self.total:
                shard = int(np.searchsorted(self.first, number, "right")) - 1
                path, tokens = self.shards[shard]
                start = int(number - self.first[shard]) * self.seq_len
                piece = tokens[start : start + self.seq_len + 1]
                if piece.max() >= self.vocab_size:
                    raise UserError(f"{path} holds token id {piece.max()}, but the vocabulary ends at "
                                    f"{self.vocab_size - 1}: it was made with another encoding; run "
                                    f"{prepare_commands('<another folder>')} and pass that to --data")
                inputs[i, : len(piece) - 1], targets[i, : len(piece) - 1] = piece[:-1], piece[1:]
        return inputs, targets

    def read_shuffled(self, numbers, seed):
        """As `read`, from an endless stream: all rows, epoch after epoch, each in the order of `permute`."""
        epochs, index = np.divmod(numbers, self.total)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permute(index[epochs == epoch], self.total, seed, int(epoch))
        return self.read(index)


ROUNDS = 6  # of the Feistel network: 4 suffice for long halves (Luby and Rackoff 1988), two more for short ones


def permute(index, n, seed, epoch):
    """Image of index (int array) under a pseudo-random permutation of range(n) that depends on (seed, epoch) alone.

    A Feistel network over the next even number of bits, applied until the result is below n (Black and Rogaway 2002);
    O(1) memory."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence((seed % 2**64, epoch)).generate_state(ROUNDS, np.uint64)
    out = np.asarray(index).astype(np.uint64)
    pending = np.arange(len(out))  # where `out` is not below n yet
    while len(pending):
        left, right = out[pending] >> half, out[pending] & mask
        for key in keys:
            mixed = right + key  # then the finaliser of splitmix64; arrays of uint64 wrap without a warning
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            left, right = right, left ^ (mixed & mask)
        out[pending] = left << half | right
        pending = pending[out[pending] >= n]
    return out.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """B rows of T tokens, int64."""
    inputs_BT: "torch.Tensor"   # noqa: F821
    targets_BT: "torch.Tensor"  # inputs shifted by one; -1: no target  # noqa: F821
    first_row: int              # index of row 0 within the batch of all ranks; validation: within the split


class Loader:
    """Shuffled rows of seq_len tokens, in an order that depends on `seed`, not on ranks, micro-batches or restarts.

    The position is one integer, the number of rows consumed by all ranks together. Each step consumes batch_rows; in
    micro-step m, rank r reads those from (m * world_size + r) * micro_rows on. A thread reads one step ahead, and
    `next_step` raises its errors. Raises UserError for damaged, foreign or too few data, and if batch_rows is not a
    multiple of world_size * micro_rows."""

    def __init__(self, folder, split="train", *, seq_len, batch_rows, micro_rows, rank=0, world_size=1, seed=0,
                 vocab_size=None, device="cpu"):
        import torch
        if min(seq_len, batch_rows, micro_rows) < 1 or batch_rows % (world_size * micro_rows):
            raise UserError(f"batch_rows={batch_rows} is not a multiple of world_size={world_size} x "
                            f"micro_rows={micro_rows}: change the batch, the micro-batch or the number of processes")
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
        """Continue at a saved position, on any number of ranks. Raises UserError if the order of rows would differ."""
        for key, value in self.state_dict().items():
            if key != "position" and state[key] != value:
                raise UserError(f"the saved position belongs to {key}={state[key]}, but now {key}={value}: resume with "
                                "the data and flags that the run began with, or start a new run")
        self.position = int(state["position"])
        self._ahead = self._thread.submit(self._read_step, self.position)

    def close(self):
        self._thread.shutdown(cancel_futures=True)

    def _open(self, folder, split, vocab_size):
        self.rows = ShardRows(folder, split, self.seq_len, vocab_size, tails=False)
        self.rows.require(self.batch_rows)
        self.row_counts = [self.rows.total]

    def _read_step(self, position):
        micro = np.arange(self.micro_rows)
        batches = [self._read_batch(position + first_row + micro, first_row) for first_row in self.first_rows]
        if self.device.type == "cuda":  # only pinned memory copies without blocking
            batches = [map_tensors(lambda tensor: tensor.pin_memory(), batch) for batch in batches]
        return batches

    def _read_batch(self, number_N, first_row):
        """Batch of the rows with these numbers in the shuffled stream. zoo/mixture.py overrides it and `_open`."""
        import torch
        inputs, targets = self.rows.read_shuffled(number_N, self.seed)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), first_row)


def map_tensors(function, batch):
    """The batch with `function` applied to each of its tensors."""
    return batch._make(value if isinstance(value, int) else function(value) for value in batch)


def validation_batches(folder, *, seq_len, rows, max_tokens=None, rank=0, world_size=1, vocab_size=None,
                       device="cpu"):
    """Generator of Batch (rows, seq_len) over the validation split, in order.

    Batch j of rank r starts at row (j * world_size + r) * rows. All ranks get equally many batches, padded with inputs
    0 and targets -1. Each token but the first of a shard is a target once; max_tokens keeps the first
    max_tokens // seq_len rows. Raises UserError at the call if there is no row."""
    import torch
    split = ShardRows(folder, "val", seq_len, vocab_size, tails=True)
    if max_tokens is not None:
        split.total = min(split.total, max_tokens // seq_len)
    if split.total == 0:
        raise UserError(f"{folder} gives no validation row: it needs a shard of at least 2 tokens, and "
                        f"max_tokens={max_tokens} must be at least seq_len={seq_len}")

    def read_batch(first_row):
        inputs, targets = map(torch.from_numpy, split.read(first_row + np.arange(rows)))
        return Batch(inputs.to(device), targets.to(device), first_row)

    num_batches = -(-split.total // (rows * world_size))
    return (read_batch((j * world_size + rank) * rows) for j in range(num_batches))


def describe_run(loader, batches, num_steps):
    """One sentence for the start of a run: its epochs, and the tokens that each evaluation compares.

    Args:
        batches: one evaluation's, as `validation_batches` returns them, of a single rank; it is read to its end"""
    total, seq_len = sum(loader.row_counts), loader.seq_len
    read, compared = num_steps * loader.batch_rows, sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
    train = f"{read:,} of {total:,} rows" if read <= total else f"{read / total:,.1f} epochs of {total:,} rows"
    return f"training reads {train} of {seq_len:,} tokens; " + describe_validation(compared, seq_len)


FEW_TOKENS = 8192  # with fewer, a validation loss is mostly noise


def describe_validation(num_tokens, seq_len):
    """The number of tokens that an evaluation compares, and a warning if these are few."""
    line = f"validation compares {num_tokens:,} tokens: {num_tokens / seq_len:,.1f} rows of {seq_len:,}"
    return line + (", so its loss is mostly noise: prepare more text" if num_tokens < FEW_TOKENS else "")


# ---------------------------------------------------------------------------------------------------------------------
# Compressors, to compare a model's bits per byte with

COMPRESSED_BYTES = 2_000_000  # compressed at most: xz needs a second per megabyte


def compressed_bpb(text):
    """Bits per byte of gzip -9 and xz -9 for the first COMPRESSED_BYTES of a text (bytes): {"gzip_bpb", "xz_bpb"}."""
    text = text[:COMPRESSED_BYTES]
    sizes = {"gzip_bpb": len(gzip.compress(text, 9)), "xz_bpb": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / max(1, len(text)) for name, size in sizes.items()}


if __name__ == "__main__":
    from tools.prepare import main

    main()
