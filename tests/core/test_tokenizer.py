"""Tokenizers of one's own: every byte of a text is kept, whatever the kind; training is deterministic."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import data
import tokenizer
from cli import UserError

TEXTS = ["def forward(self, x):\n    return self.down(F.relu(self.up(x)).square())\n", "x = 12345 + y_name * CamelCase\n"] * 3
ODD = " leading, \u2581 literal, caf\u00e9 \u4e2d\u6587 \U0001f600\n\n\t <|endoftext|></s><s> e\u0301 \ufb01 \r\n  12 \x00\x1f\ufffd"
BYTES = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
WORDS = ["\u2581", "d", "e", "f", "\u2581d", "de", "def", "\u2581def"]


def fallback_vocab() -> dict[str, int]:
    return {"<unk>": 0, "<s>": 1, "</s>": 2} | BYTES | {word: 259 + i for i, word in enumerate(WORDS)}


def llama():
    """SentencePiece's BPE as Llama 2 has it: a blank before the text, blanks as U+2581, byte fallback."""
    merges = [("\u2581", "d"), ("d", "e"), ("de", "f"), ("\u2581d", "ef"), ("\u2581", "def")]
    made = tokenizers.Tokenizer(models.BPE(fallback_vocab() | {"ef": 300}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def unigram():
    """A Unigram model with byte fallback and Metaspace, as T5's successors have it."""
    made = tokenizers.Tokenizer(models.Unigram([(text, -float(i)) for text, i in fallback_vocab().items()], 0, True))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def byte_level():
    """A byte-level BPE with everything that changes a text: NFC, a blank before it, tokens around it, truncation."""
    made = tokenizers.Tokenizer.from_str(tokenizer.train_bpe(TEXTS, 300))
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    made.enable_truncation(5)
    made.enable_padding(length=50)
    made.add_tokens([tokenizers.AddedToken("CamelCase", lstrip=True, rstrip=True)])
    return made


def saved(made, folder: Path) -> Path:
    made.save(str(folder / "made.json"))
    return folder / "made.json"


@pytest.mark.parametrize("make", (byte_level, llama, unigram))
def test_ids_stand_for_exactly_the_bytes_of_a_text(make, tmp_path):
    encoding = tokenizer.get_encoding(saved(make(), tmp_path))
    for text in (ODD, *TEXTS, "", " ", "\u2581", "a CamelCase b"):
        ids = encoding.encode(text)
        assert encoding.decode_bytes(ids) == text.encode()
        assert encoding.token_bytes()[ids].sum() == len(text.encode()), "bits per byte divide by these"
        assert encoding.eot_token not in ids and encoding.token_bytes()[encoding.eot_token] == 0


def test_ids_are_those_of_tokenizers(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.train_bpe(TEXTS, 300))
    encoding, reference = tokenizer.get_encoding(path), tokenizers.Tokenizer.from_file(str(path))
    for text in (*TEXTS, "unseen 987 words_here"):
        assert encoding.encode(text).tolist() == reference.encode(text).ids
    assert json.loads(encoding.json) == json.loads(path.read_text()), "nothing of our own is to be taken out"


def test_training_gives_the_same_file_on_any_number_of_threads(monkeypatch):
    texts = [Path(data.__file__).read_text(), Path(tokenizer.__file__).read_text()]
    found = set()
    for parallel in ("true", "false", "true"):
        monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", parallel)
        found.add(tokenizer.train_bpe(iter(texts), 600))
    [text] = found
    state = json.loads(text)
    assert len(state["model"]["vocab"]) == 600 and state["added_tokens"][0]["content"] == "<|endoftext|>"


def test_source_code_is_split_well(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.train_bpe(TEXTS * 20, 400))
    encoding = tokenizer.get_encoding(path)
    pieces = [encoding.vocab[i] for i in encoding.encode("        return self.down(12)\n")]
    assert b"1" in pieces and b"2" in pieces and b"return" in b"".join(pieces)
    assert not any(len(piece.split()) > 1 for piece in encoding.vocab), "no id spans two words"


def test_end_of_text_is_the_file_s_own_or_added(tmp_path):
    assert tokenizer.get_encoding(saved(llama(), tmp_path)).eot_token == 2
    made = tokenizers.Tokenizer.from_str(tokenizer.train_bpe(TEXTS, 280))
    state = json.loads(made.to_str()) | {"added_tokens": []}
    (tmp_path / "bare.json").write_text(json.dumps(state))
    encoding = tokenizer.get_encoding(tmp_path / "bare.json")
    assert (encoding.eot_token, encoding.vocab_size) == (280, 281)
    assert json.loads(encoding.json)["added_tokens"][-1]["content"] == "<|endoftext|>"


def word_piece():
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def drops_blanks():
    made = tokenizers.Tokenizer.from_str(tokenizer.train_bpe(TEXTS, 280))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    return made


@pytest.mark.parametrize("make", (word_piece, drops_blanks))
def test_a_tokenizer_that_loses_text_is_refused(make, tmp_path):
    with pytest.raises(UserError, match="does not keep every byte of a text.*--encoding bpe"):
        tokenizer.get_encoding(saved(make(), tmp_path))


def test_more_ids_than_uint16_holds_are_refused(tmp_path):
    state = json.loads(tokenizer.train_bpe(TEXTS, 280))
    state["model"]["vocab"] |= {f"word{i}": 280 + i for i in range(2**16)}
    (tmp_path / "large.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="has 65,816 ids, and shards hold at most 65,536"):
        tokenizer.get_encoding(tmp_path / "large.json")


@pytest.mark.parametrize("text", ("", "{", "[1]", "{}", '{"model": 3}', json.dumps({"model": {"type": "BPE"}})))
def test_a_damaged_file_is_one_sentence(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="is no tokenizer.json of Hugging Face .*choose another --encoding"):
        tokenizer.get_encoding(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("size", (0, 256, 2**16 + 1))
def test_an_illegal_vocabulary_is_refused(size):
    with pytest.raises(UserError, match=f"vocab_size is {size}; it must be from 257"):
        tokenizer.train_bpe(TEXTS, size)


def test_ids_fit_shards(tmp_path):
    encoding = tokenizer.get_encoding(saved(byte_level(), tmp_path))
    assert encoding.encode(ODD).dtype == np.uint16
