"""Encodings: text to ids and back, by bytes, by a tokenizer of tiktoken, or by one of your own.

    encoding = get_encoding("bytes")                             # or "gpt2", or "data/python/tokenizer.json"
    ids = encoding.encode("def f(x):")

Everything is compared in bits per byte, so ids must keep every byte of a text. tiktoken, tokenizers and gigatoken are
imported where they are used.
"""

import base64
import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cli import UserError
from data import TOKENIZER, as_data_error, is_tokenizer

ENCODINGS = ("bytes", "gpt2", "r50k_base", "p50k_base", "p50k_edit")


def get_encoding(name):
    """Encoding by name: `bytes` (256 byte values, then end-of-text), tiktoken's names, or the path of a tokenizer.json.

    tiktoken downloads its merge ranks once, into TIKTOKEN_CACHE_DIR. Raises UserError for an unknown name, for ids that
    do not fit uint16, and if the ranks are not there."""
    if is_tokenizer(name):
        return json_encoding(name)
    if name == "bytes":
        vocab = [bytes([i]) for i in range(256)] + [b""]
        return Encoding("bytes", vocab, 256, lambda text: np.frombuffer(text, np.uint8), is_fast=True)
    return tiktoken_encoding(name)


class Encoding:
    """Text to ids and back. `vocab[i]` is the bytes of id i, b"" for special tokens. Made by `get_encoding`.

    name: as get_encoding takes it. json: text of the tokenizer.json, if it has one. is_fast: a text is encoded in less
    time than it takes to send it to another process."""

    def __init__(self, name, vocab, eot_token, encode, json=None, is_fast=False):  # encode: UTF-8 bytes to ids
        self.name, self.vocab, self.eot_token, self._encode, self.json = name, vocab, eot_token, encode, json
        self.vocab_size, self.is_fast = len(vocab), is_fast

    def encode(self, text):
        """Ids of a text, uint16 (n,). Special tokens in it are encoded as ordinary text, lone surrogates as `?`."""
        return self.encode_bytes(text.encode("utf-8", "replace"))

    def encode_bytes(self, text):
        """Ids of UTF-8 bytes, uint16 (n,). `bytes` keeps bytes that are not UTF-8, others encode them as U+FFFD."""
        return self._encode(text).astype(np.uint16)

    def decode(self, ids):
        """Text of ids. End-of-text decodes to "", bytes that are not UTF-8 to U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids):
        return b"".join([self.vocab[i] for i in np.asarray(ids).tolist()])

    def token_bytes(self):
        """Number of bytes of each id, int32 (vocab_size,): converts loss per token to bits per byte."""
        return np.array([len(text) for text in self.vocab], np.int32)


def tiktoken_encoding(name):
    legal = f"choose one of {', '.join(ENCODINGS)}, bpe, or the path of a {TOKENIZER}"
    missing = f"encoding {name} needs tiktoken: `pip install tiktoken`, or choose --encoding bytes"
    with as_data_error(missing, ImportError):
        import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"there is no encoding {name!r}: {legal}")
    too_large = f"encoding {name} has ids above 65535, which uint16 shards cannot hold: {legal}"
    if name.startswith(("cl100k", "o200k")):  # refused before their ranks are downloaded
        raise UserError(too_large)
    no_ranks = f"the ranks of encoding {name} cannot be downloaded ({{error}}): connect to the internet once, point " \
               "TIKTOKEN_CACHE_DIR at a filled cache, or choose --encoding bytes"
    with as_data_error(no_ranks, Exception), request_timeout():  # their errors share no base class
        bpe = tiktoken.get_encoding(name)
    if bpe.max_token_value > 65535:
        raise UserError(too_large)

    vocab = [b""] * bpe.n_vocab
    special = {bpe.encode_single_token(text) for text in bpe.special_tokens_set}
    for i in set(range(bpe.n_vocab)) - special:
        with contextlib.suppress(KeyError):  # p50k does not use all ids
            vocab[i] = bpe.decode_single_token_bytes(i)

    def encode(text):
        if hasattr(bpe, "encode_to_numpy"):  # 1.4 times as fast as encode_ordinary, which returns a list
            return bpe.encode_to_numpy(text, disallowed_special=())
        return np.array(bpe.encode_ordinary(text), np.int64)

    def encode_document(document):
        return encode_in_parts(document.decode("utf-8", "replace"), encode, vocab)

    fast = faster(encode_document, rank_loader(vocab), bpe.special_tokens_set)
    return Encoding(name, vocab, bpe.eot_token, fast or encode_document, is_fast=bool(fast))


@contextlib.contextmanager
def request_timeout(seconds=3):
    """Gives requests.get, with which tiktoken downloads, a limit on each wait for the network; it has none."""
    import requests  # tiktoken depends on it
    get, requests.get = requests.get, functools.partial(requests.get, timeout=seconds)
    try:
        yield
    finally:
        requests.get = get


MAX_BLANKS = 2**18  # tiktoken's regular expression fails between 500,000 and 1,000,000 blanks in a row
EDGE_TOKENS = 64    # at the end of a part; their ids may depend on the text that follows


def encode_in_parts(text, encode, vocab):
    """Ids of a text. A run of MAX_BLANKS or more blanks is cut between two tokens, so that the ids stay the same."""
    parts, block = [], MAX_BLANKS // 2
    blank_ends = lambda: (i + block for i in range(0, len(text), block) if text[i : i + block].isspace())
    while (end := next(blank_ends(), len(text))) < len(text):  # of the first block that such a run fills
        ids, covered = encode(text[:end])[:-EDGE_TOKENS], text[:end].encode()
        covered = covered[: sum(len(vocab[i]) for i in ids.tolist())]
        while covered.decode("utf-8", "ignore").encode() != covered:  # the last token ends inside a character
            ids, covered = ids[:-1], covered[: -len(vocab[ids[-1]])]
        parts.append(ids)
        text = text[len(covered.decode()) :]
    return np.concatenate([*parts, encode(text)])


# -----------------------------------------------------------------------------
# The fast path: gigatoken, where it is installed and gives the same ids

PROBE = "\n\n  \tIt's 1,234.56 \u20ac (na\u00efve)?!  don't\r\nDEF_x\u4e2d\u6587\u0e01\u0e33 \U0001f600\u200d "
PROBE += "<|endoftext|> ".join(map(chr, range(32, 0x2500, 7)))
PROBE += "".join(f" {part * 501} {part * 1002}" for part in ("\n", " ", "-", "a", "1", "ha"))

# Letters and digits that Unicode 17 added. gigatoken 0.10 knows them; tiktoken 0.14 and tokenizers 0.23 do not.
NEW_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7"
    "\U00011db0-\U00011de9\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e"
    "\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead\U000323b0-\U00033479]")
ASCII = bytes(range(128))
RENEWED_BYTES = 2**25  # of text that one Tokenizer of gigatoken encodes: its cache of words grows without end


def faster(encode: Callable, load: Callable, special: Iterable[str] = ()) -> Callable | None:
    """gigatoken's encoder of UTF-8 bytes, if it is installed and has the ids of `encode` on corner cases, else None.

    load: function of the module gigatoken that returns a Tokenizer. special: texts of special tokens."""
    probe = " ".join([PROBE, *special]).encode()
    tokenizer, num_bytes = None, RENEWED_BYTES

    def encode_fast(text: bytes) -> np.ndarray:
        nonlocal tokenizer, num_bytes
        if not text.isascii():
            text = text.decode("utf-8", "replace").encode()
            if NEW_CHARACTERS.search(text.translate(None, ASCII).decode()):  # most of a text is ASCII, quick to drop
                return encode(text)
        num_bytes += len(text)
        if num_bytes > RENEWED_BYTES:
            tokenizer, num_bytes = load(gigatoken), len(text)
        return tokenizer.encode(text)

    try:
        import gigatoken
        return encode_fast if np.array_equal(encode_fast(probe), encode(probe)) else None
    except Exception:  # it is not installed, or refuses a model or pre-tokenizer, with errors of no common base class
        return None


def rank_loader(vocab: list[bytes]) -> Callable:
    """Function of the module gigatoken: Tokenizer of a vocabulary of tiktoken with the pre-tokenizer of GPT-2."""
    last = max(i for i, text in enumerate(vocab) if text)
    filled = (text or b"\xff\xff" for text in vocab[: last + 1])  # no id may be left out; \xff\xff is in no UTF-8
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(text), i) for i, text in enumerate(filled))

    def load(gigatoken):
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(ranks)
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2")

    return load


# -----------------------------------------------------------------------------
# A tokenizer.json: training

MAX_VOCAB = 2**16  # ids of a shard are uint16
EOT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")  # the first that a file has is used

# Qwen2's pattern: digits one by one, a sign or blank with the word behind it, line ends, runs of blanks
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")  # fmt: skip


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE with vocab_size ids, the first of them end-of-text.

    The same texts give the same file, on any number of threads. Raises UserError for an illegal vocab_size."""
    if not 257 <= vocab_size <= MAX_VOCAB:
        raise UserError(f"vocab_size is {vocab_size}; it must be from 257 (bytes and end-of-text) to {MAX_VOCAB}")
    tokenizers = import_tokenizers()
    pre, bpe = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre.Split(tokenizers.Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT_TOKENS[0]], initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False)  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str(pretty=True)


def import_tokenizers():
    with as_data_error(f"a {TOKENIZER} needs tokenizers: `pip install tokenizers`", ImportError):
        import tokenizers
    return tokenizers


# -----------------------------------------------------------------------------
# A tokenizer.json: reading

# GPT-2's stand-ins for bytes: a printable byte is itself, the others are the characters from U+0100 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
STAND_INS = {chr(byte): byte for byte in PRINTABLE}
STAND_INS |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BLANK = "\u2581"  # SentencePiece's stand-in for a blank


def json_encoding(path: str | Path) -> Encoding:
    """Encoding of a tokenizer.json; its `json` is the file as it is used here, see without_loss.

    Raises UserError for a damaged file, more than MAX_VOCAB ids, or a tokenizer that loses parts of a text."""
    tokenizers = import_tokenizers()
    damaged = f"{path} is no {TOKENIZER} of Hugging Face ({{error}}): choose another --encoding"
    with as_data_error(damaged, Exception):  # tokenizers raises that class itself
        state = without_loss(json.loads(Path(path).read_text(encoding="utf-8")))
        vocab, eot_token = vocabulary(state)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
        tokenizer.encode_special_tokens = True  # in a text they are ordinary text
    if len(vocab) > MAX_VOCAB:
        raise UserError(f"{path} has {len(vocab):,} ids, and shards hold at most {MAX_VOCAB:,}: choose another one")
    loses_text = UserError(f"{path} does not keep every byte of a text, so bits per byte would be wrong: "
                           "choose a byte-level tokenizer, one with byte fallback, or --encoding bpe")  # fmt: skip
    if not {bytes([byte]) for byte in range(256)} <= set(vocab):
        raise loses_text

    def encode(text: bytes) -> np.ndarray:
        return np.array(tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int64)

    fast = faster(encode, json_loader(state), [token["content"] for token in state["added_tokens"]])
    to_ids = fast or encode
    to_ids = to_ids if is_byte_level(state) else without_stand_ins(to_ids, state, vocab)
    text = json.dumps(state, ensure_ascii=False, indent=1)
    encoding = Encoding(str(path), vocab, eot_token, to_ids, text, is_fast=bool(fast))
    if encoding.decode_bytes(encoding.encode(PROBE)) != PROBE.encode():
        raise loses_text
    return encoding


def json_loader(state: dict) -> Callable:
    """Function of the module gigatoken: Tokenizer of a tokenizer.json, without special tokens, to be ordinary text."""
    text = json.dumps(state | {"added_tokens": [token for token in state["added_tokens"] if not token["special"]]})
    return lambda gigatoken: gigatoken.Tokenizer.from_json(text)


def without_stand_ins(encode: Callable, state: dict, vocab: list[bytes]) -> Callable:
    """`encode` for SentencePiece's vocabularies, which hold special tokens and BLANK as ordinary strings.

    A text is cut inside the special tokens that it holds, and a BLANK in it becomes its three bytes."""
    special = [token["content"] for token in state["added_tokens"] if token["special"] and token["content"][1:]]
    inside = re.compile("|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in special) or r"(?!)")
    blank = [vocab.index(bytes([byte])) for byte in BLANK.encode()]

    def encode_parts(text: bytes) -> np.ndarray:
        parts = [inside.split(part) for part in text.decode("utf-8", "replace").split(BLANK)]
        first, *others = ([encode(piece.encode()) for piece in part] for part in parts)
        return np.concatenate([*first, *(ids for part in others for ids in (blank, *part))])

    return encode_parts


def files(path: str | Path) -> dict[str, str]:
    """Name -> text of the files from which transformers.AutoTokenizer makes this tokenizer."""
    text = Path(path).read_text(encoding="utf-8")
    added = {token["content"] for token in json.loads(text)["added_tokens"]}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": next(n for n in EOT_TOKENS if n in added)}
    return {TOKENIZER: text, "tokenizer_config.json": json.dumps(about, indent=2) + "\n"}


def without_loss(state: dict) -> dict:
    """The contents of a tokenizer.json, changed so that ids stand for the bytes of a text, no more and no fewer.

    Dropped: normalisation, a blank put before the text, tokens put around it, padding, dropout. Without an end-of-text
    token, <|endoftext|> is added."""
    state = state | {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    if state["model"]["type"] == "BPE":
        if state["model"].get("continuing_subword_prefix"):  # tokenizers would panic
            raise ValueError("it has a continuing_subword_prefix")
        state["model"] = {**state["model"], "dropout": None}
    if not is_byte_level(state):
        state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    for part in components(state["pre_tokenizer"]):
        part |= {"prepend_scheme": "never"} if part["type"] == "Metaspace" else {}
        part |= {"add_prefix_space": False} if part["type"] == "ByteLevel" else {}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = [token | plain for token in state["added_tokens"]]
    if not any(token["content"] in EOT_TOKENS for token in state["added_tokens"]):
        new = {"id": 1 + max(strings(state)), "content": EOT_TOKENS[0], **plain, "special": True}
        state["added_tokens"].append(new)
    return state


def vocabulary(state: dict) -> tuple[list[bytes], int]:
    """Bytes of each id, b"" for special tokens and unused ids; and the id of end-of-text."""
    text_of, added = strings(state), {token["id"]: token for token in state["added_tokens"]}
    vocab = [b""] * (1 + max(text_of))
    for i, text in text_of.items():
        if i in added:
            vocab[i] = b"" if added[i]["special"] else text.encode()
        elif is_byte_level(state):
            vocab[i] = bytes(STAND_INS[character] for character in text)
        else:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
            vocab[i] = bytes.fromhex(byte[1]) if byte else text.replace(BLANK, " ").encode()
    id_of = {token["content"]: i for i, token in added.items()}
    return vocab, next(id_of[name] for name in EOT_TOKENS if name in id_of)


def strings(state: dict) -> dict[int, str]:
    """Id -> its string, of the model's vocabulary and of added tokens."""
    vocab = state["model"]["vocab"]
    if isinstance(vocab, list):  # of (string, score): a Unigram model
        vocab = {text: i for i, (text, _) in enumerate(vocab)}
    return {i: text for text, i in vocab.items()} | {token["id"]: token["content"] for token in state["added_tokens"]}


def is_byte_level(state: dict) -> bool:
    parts = components(state["pre_tokenizer"]) + components(state["decoder"])
    return any(part["type"] == "ByteLevel" for part in parts)


def components(part: dict | None) -> list[dict]:
    """A pre-tokenizer or decoder as a flat list, without its sequences."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("decoders")
    return [leaf for item in inner for leaf in components(item)] if inner else [part]
