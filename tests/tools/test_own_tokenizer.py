"""A tokenizer of one's own from the text to a shared model: shards, training, sampling, evaluation, Hub folder. CPU."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_after_training import evaluate_cli, model_cli
from test_train import train

import checkpoint
import data
import logger
import tokenizer
from cli import UserError
from tools import hub, prepare

ROOT = Path(__file__).parents[2]
VOCAB = 320


def made(out: Path, *words) -> Path:
    prepare.main([*map(str, ("--source", "files", "--num_proc", 1, "--out", out, *words))])
    return out


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        prepare.main([*map(str, words)])
    assert stop.value.code
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Files of this repository, with special tokens, U+2028 and odd characters in one."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(ROOT.glob("*.py"))[:8]:
        shutil.copy(path, folder)
    (folder / "odd.txt").write_text("<|endoftext|> </s> caf\u00e9 \u2028 \ufeff \U0001f600\n" * 20, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("own") / "shards"
    return made(out, "--path", corpus, "--encoding", "bpe", "--vocab_size", VOCAB)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A tiny run; its data folder is gone."""
    folder = tmp_path_factory.mktemp("run")
    moved = shutil.copytree(shards, folder / "shards")
    run = train(folder, data=moved, num_iterations=4, sample_tokens=8, ns_dtype="fp32", vocab_size=None, eot_token=None)
    shutil.rmtree(moved)
    return run


def test_bits_per_byte_divide_by_the_bytes_of_the_files(corpus, shards):
    meta = data.load_meta(shards)
    assert meta["vocab_size"] == VOCAB and Path(meta["encoding"]) == shards / "tokenizer.json"
    size = sum(len(path.read_bytes()) for path in corpus.iterdir())
    markers = size - sum(split["bytes"] for split in meta["splits"].values())
    assert 0 <= markers < 200, "all but the lines that separate documents"
    encoding, tokens = tokenizer.get_encoding(meta["encoding"]), 0
    for split in ("train", "val"):
        ids = np.concatenate([shard for _, shard in data.open_split(shards, split)])
        tokens += len(ids)
        assert len(encoding.decode_bytes(ids)) == meta["splits"][split]["bytes"]
    assert tokens < 0.75 * size, "merges are used"


def test_the_log_s_bits_per_byte_are_nats_over_bytes_of_the_text(run, shards):
    row = logger.get_final_row(logger.read_run(run)["rows"], "val/bpb")
    settings = json.loads((run / "config.json").read_text())
    ids = data.open_split(shards, "val")[0][1]
    ids = ids[1:][: settings["hyperparameters"]["val_tokens"] or None]
    size = len(tokenizer.get_encoding(shards / "tokenizer.json").decode_bytes(ids))
    assert row["val/bpb"] == pytest.approx(row["val/loss"] * len(ids) / size / math.log(2), rel=1e-6)


def test_the_same_command_gives_the_same_files(corpus, shards, tmp_path):
    again = made(tmp_path / "again", "--path", corpus, "--encoding", "bpe", "--vocab_size", VOCAB)
    names = {path.name for path in shards.iterdir()}
    assert names == {"tokenizer.json", "meta.json", "files_train_000001.bin", "files_val_000000.bin"}
    assert all((again / name).read_bytes() == (shards / name).read_bytes() for name in names)


def test_a_tokenizer_of_one_s_own_gives_the_shards_of_its_training(corpus, shards, tmp_path, capsys):
    mine = Path(shutil.copy(shards / "tokenizer.json", tmp_path / "mine.json"))
    words = ("--path", corpus, "--encoding", mine)
    out = made(tmp_path / "out", *words)
    for name in ("files_train_000001.bin", "files_val_000000.bin"):
        assert (out / name).read_bytes() == (shards / name).read_bytes()
    assert "is ready" not in capsys.readouterr().out
    made(out, *words)
    assert "is ready" in capsys.readouterr().out
    mine.write_text(mine.read_text() + "\n")
    assert "made by another command" in refused(capsys, "--source", "files", *words, "--out", out)


def test_a_changed_tokenizer_is_noticed(shards, tmp_path):
    changed = shutil.copytree(shards, tmp_path / "changed")
    path = changed / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|endoftext|>"', '"<|endofword|>"'))
    with pytest.raises(UserError, match="tokenizer.json does not match the sha256 in meta.json"):
        data.verify(changed)


def test_a_checkpoint_samples_and_is_evaluated_without_the_data(run, tmp_path):
    assert (checkpoint.latest_checkpoint(run / "checkpoint") / "tokenizer.json").exists()
    assert "sample/text" in logger.read_run(run)["rows"][-1]
    assert model_cli("--checkpoint", run, "--prompt", "def f(", "--max_new_tokens", 4).stdout.startswith("def f(")
    (tmp_path / "a.txt").write_text("caf\u00e9 x\n", encoding="utf-8")
    said = evaluate_cli("bpb", "--checkpoint", run, "--path", tmp_path / "a.txt").stdout
    assert "bits per byte, 8 bytes" in said


def test_a_damaged_tokenizer_of_a_checkpoint_is_not_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    with open(checkpoint.latest_checkpoint(copy / "checkpoint") / "tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="tokenizer.json is missing or cut short|does not match its sha256"):
        checkpoint.load_model_from_run(copy / "checkpoint")


@pytest.mark.slow
def test_a_shared_folder_holds_the_tokenizer_of_transformers(run, tmp_path, monkeypatch):
    hub.save(hub.load(run), tmp_path / "shared")
    shared = Path(shutil.move(tmp_path / "shared", tmp_path / "moved"))
    net = hub.load(shared)
    assert net.encoding == str(shared / "tokenizer.json")
    assert "encoding `tokenizer.json`" in (shared / "README.md").read_text()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared)
    ours, text = tokenizer.get_encoding(net.encoding), "def forward(self, x):\n    return x + 12\n"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.eos_token_id == ours.eot_token and theirs.decode(ours.encode(text)) == text


def test_domains_share_one_tokenizer(corpus, tmp_path):
    out = tmp_path / "mix"
    words = [f"code={corpus / 'facts.py'}", f"odd={corpus / 'odd.txt'}", f"data={corpus / 'data.py'}"]
    prepare.main([*map(str, ("--source", "domains", "--num_proc", 1, "--out", out, "--encoding", "bpe",
                             "--vocab_size", VOCAB, "--path", *words))])  # fmt: skip
    texts = {path.read_text() for path in out.glob("**/tokenizer.json")}
    assert len(texts) == 1 and len(list(out.glob("**/tokenizer.json"))) == 4
    for folder in out.glob("*/"):
        data.verify(folder)
        assert data.load_meta(folder)["encoding"] == str(folder / "tokenizer.json")


def test_flags_that_do_not_go_together_are_one_sentence(corpus, tmp_path, capsys):
    common = ("--source", "files", "--path", corpus, "--out", tmp_path / "out")
    assert "--vocab_size applies to --encoding bpe only" in refused(capsys, *common, "--vocab_size", 512)
    said = refused(capsys, *common, "--encoding", "bpe", "--tokens_field", "ids")
    assert "--encoding bpe is trained on text, and --tokens_field has none" in said
    assert "is no tokenizer.json" in refused(capsys, *common, "--encoding", tmp_path / "none.json")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
