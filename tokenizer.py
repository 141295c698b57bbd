"""Tokenizers of one's own: train a BPE, and read any tokenizer.json of Hugging Face so that ids keep every byte.

Needs `tokenizers`, imported where it is used.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cli import UserError
from data import PROBE, TOKENIZER, Encoding, as_data_error

MAX_VOCAB = 2**16  # ids of a shard are uint16
EOT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")  # the first that a file has is used

# -----------------------------------------------------------------------------
# Training

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
# Reading

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
    if len(vocab) > MAX_VOCAB:
        raise UserError(f"{path} has {len(vocab):,} ids, and shards hold at most {MAX_VOCAB:,}: choose another one")
    loses_text = UserError(f"{path} does not keep every byte of a text, so bits per byte would be wrong: "
                           "choose a byte-level tokenizer, one with byte fallback, or --encoding bpe")  # fmt: skip
    id_of = {text: i for i, text in enumerate(vocab)}
    if any(bytes([byte]) not in id_of for byte in range(256)):
        raise loses_text
    tokenizer.encode_special_tokens = True  # in a text they are ordinary text
    to_ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids

    def encode(text: bytes) -> np.ndarray:
        return np.array(to_ids(text.decode("utf-8", "replace")), np.int64)

    literal_blank = [id_of[bytes([byte])] for byte in BLANK.encode()]
    special = [token["content"] for token in state["added_tokens"] if token["special"]]
    inside_special = "|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in special if text[1:])

    def encode_literally(text: bytes) -> np.ndarray:
        """SentencePiece's vocabulary holds its stand-in for a blank and its special tokens as ordinary strings."""
        parts = text.decode("utf-8", "replace").split(BLANK)
        ids = [[i for piece in re.split(inside_special, part) for i in to_ids(piece)] for part in parts]
        return np.array(ids[0] + [i for part in ids[1:] for i in literal_blank + part], np.int64)

    encode = encode if is_byte_level(state) else encode_literally
    encoding = Encoding(str(path), vocab, eot_token, encode, json.dumps(state, ensure_ascii=False, indent=1))
    if encoding.decode_bytes(encoding.encode(PROBE)) != PROBE.encode():
        raise loses_text
    return encoding


def without_loss(state: dict) -> dict:
    """The contents of a tokenizer.json, changed so that ids stand for the bytes of a text, no more and no fewer.

    Dropped: normalisation, a blank put before the text, tokens put around it, padding, dropout. Without an end-of-text
    token, <|endoftext|> is added."""
    state = state | {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    state["model"] = {**state["model"], "dropout": None} if state["model"]["type"] == "BPE" else state["model"]
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
