"""Tokenizers of one's own: every byte of a text is kept, whatever the kind; training is deterministic."""

import json
import os
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

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


WITH_PREFIX = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "continuing_subword_prefix": "##"}})


@pytest.mark.parametrize("text", ("", "{", "[1]", "{}", '{"model": 3}', json.dumps({"model": {"type": "BPE"}}),
                                  WITH_PREFIX))
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


# ---------------------------------------------------------------------------------------------------------------------
# gigatoken, the fast path


def gpt2_without_gigatoken(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gigatoken", None)  # importing it fails
        return tokenizer.get_encoding("gpt2")


def test_gigatoken_is_used_only_if_it_agrees(gpt2, monkeypatch):
    reference = gpt2_without_gigatoken(monkeypatch)
    assert not reference.is_fast
    good = reference.encode_bytes

    def raises(path, **_):
        raise RuntimeError("Unknown pre_tokenizer")

    encoders = {
        "good": good,
        "bad": lambda text: good(text)[1:],
        "bad at long runs": lambda text: good(text.replace(b"-" * 1002, b"-" * 1001)),
        "bad at special tokens": lambda text: good(text.replace(b"<|endoftext|>", b"")),
    }
    for name, encode in encoders.items():
        load = lambda path, encode=encode, **_: SimpleNamespace(encode=encode)
        fake = SimpleNamespace(Tokenizer=SimpleNamespace(from_tiktoken=load))
        monkeypatch.setitem(sys.modules, "gigatoken", fake)
        assert tokenizer.get_encoding("gpt2").is_fast == (name == "good"), name
    fake.Tokenizer.from_tiktoken = raises
    assert tokenizer.get_encoding("gpt2").encode("a b").tolist() == good(b"a b").tolist()


def corner_cases() -> list[bytes]:
    """Random characters, long runs, odd blanks and line ends, special tokens, bytes that are not UTF-8, source code."""
    random, found = np.random.default_rng(0), []
    for top in (0x80, 0x250, 0x600, 0x3000, 0xD7FF, 0x1FFFF, 0x40000, 0x10FFFF):
        for count in (1, 5, 50, 500, 4000):
            codes = (random.integers(0, top, count) for _ in range(1 + 200 // count))
            found += ["".join(chr(i) for i in row if not 0xD800 <= i < 0xE000) for row in codes]
    pieces = [" ", "\n", "\r", "\t", "a", "1", "'s", "'LL", "\xe9", "e\u0301", "\u4e2d", "\xa0", "\u3000", "\u200d", "\u017f",
              "\xb2", "\u2167", ".", "_", "A", "<|endoftext|>", "</s>", "\u2581", "\U000323b0", "\r\n", "\0", "\ufffd"]  # fmt: skip
    found += ["".join(random.choice(pieces, 40)) for _ in range(400)]
    runs = ("a", "1", " ", "\n", "-", "=", "ha", "\r\n", "\xe9", "\u4e2d", "\U0001f600", "\xa0", "'s", "\0", " \n")
    found += [f"x{run * count}z" for run in runs for count in (15, 16, 17, 255, 257, 500, 512, 513, 1000, 1025, 2000)]
    found += [" " * 300_000, "a" + "\n" * 300_000 + "b", "\t \n" * 1000]
    text = [case.encode() for case in found]
    not_utf8 = [random.integers(0, 256, 50).astype(np.uint8).tobytes() for _ in range(50)]
    surrogates = ["a\ud800b\udfffc".encode("utf-8", error) for error in ("replace", "surrogatepass")]
    source = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[::6]]
    return [*text, *not_utf8, *surrogates, *source, b""]


@pytest.mark.parametrize("make", ["gpt2", byte_level, llama, "bpe"])
def test_gigatoken_s_ids_are_those_of_the_reference(make, gpt2, monkeypatch, tmp_path):
    pytest.importorskip("gigatoken")
    path = "gpt2" if make == "gpt2" else tmp_path / "made.json"
    if make == "bpe":
        path.write_text(tokenizer.train_bpe([Path(data.__file__).read_text(), ODD], 1000))
    elif make != "gpt2":
        saved(make(), tmp_path)
    encoding = tokenizer.get_encoding(path)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    reference = tokenizer.get_encoding(path)
    assert encoding.is_fast and not reference.is_fast
    for case in corner_cases():
        if make == llama and len(case) > 10_000:  # a merge of a long word takes quadratic time in tokenizers
            continue
        assert np.array_equal(encoding.encode_bytes(case), reference.encode_bytes(case)), (case[:200], len(case))


def test_characters_that_the_reference_does_not_know_yet(tmp_path, monkeypatch):
    """Each character beside a letter, a digit and a sign, which a merge joins with it if they are in one piece."""
    gigatoken = pytest.importorskip("gigatoken")
    state = json.loads(tokenizer.train_bpe([], 257))
    stand_in = {byte: text for text, byte in tokenizer.STAND_INS.items()}
    state["model"]["merges"] = [[stand_in[byte], sign] for byte in range(128, 192) for sign in "a1."]
    state["model"]["vocab"] |= {left + right: 257 + i for i, (left, right) in enumerate(state["model"]["merges"])}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    encoding = tokenizer.get_encoding(tmp_path / "tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gigatoken", None)
        reference = tokenizer.get_encoding(tmp_path / "tokenizer.json")
    bare = gigatoken.Tokenizer.from_json(json.dumps(state | {"added_tokens": []}))
    new, old = [], []  # characters that Python does not know either, or knows since a short time
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x34000)]):
        if unicodedata.category(character) == "Cn":
            (new if tokenizer.NEW_CHARACTERS.match(character) else old).append(character)
    beside = lambda characters: "".join(f"{c}a{c}1{c}. {c}\n" for c in characters)
    assert bare.encode(beside(old)).tolist() == reference.encode(beside(old)).tolist()
    assert bare.encode(beside(new)).tolist() != reference.encode(beside(new)).tolist(), "the rule is not needed any more"
    for text in (beside(new), f"plain {new[0]} words", *map(beside, new[::200])):
        assert encoding.encode(text).tolist() == reference.encode(text).tolist()


def test_ranks_with_a_gap_are_loaded(gpt2):
    """p50k_base has runs of blanks above GPT-2's ids, and no rank at end-of-text."""
    gigatoken, tiktoken = pytest.importorskip("gigatoken"), pytest.importorskip("tiktoken")
    vocab = gpt2.vocab + [b" " * count for count in range(2, 26)]
    ranks = {text: i for i, text in enumerate(vocab) if text}
    pattern = tiktoken.get_encoding("gpt2")._pat_str
    p50k = tiktoken.Encoding("p50k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    loaded = tokenizer.rank_loader(vocab + [b""])(gigatoken)
    for text in (tokenizer.PROBE, Path(data.__file__).read_text(), "\n".join(" " * i + "x" for i in range(60))):
        assert loaded.encode(text).tolist() == p50k.encode_ordinary(text)
    assert p50k.encode_ordinary("    x")[0] > 50256


def test_the_cache_of_gigatoken_is_emptied(gpt2, monkeypatch):
    gigatoken, loaded, text = pytest.importorskip("gigatoken"), [], "some words " * 4000
    load, ids = gigatoken.Tokenizer.from_tiktoken, gpt2.encode(text).tolist()
    monkeypatch.setattr(gigatoken.Tokenizer, "from_tiktoken", lambda *args, **kw: loaded.append(1) or load(*args, **kw))
    monkeypatch.setattr(tokenizer, "RENEWED_BYTES", 2**18)
    encoding = tokenizer.get_encoding("gpt2")
    assert len(loaded) == 1
    assert all(encoding.encode(text).tolist() == ids for _ in range(20))
    assert len(loaded) == 4  # 44,000 bytes each: 5 texts, of the first one also the probe
