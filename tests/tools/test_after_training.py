"""After training: sampling from the command line, the Hub's folders, and evaluation, of one small run that is trained here.

CPU, no network: `pytest tests/test_after_training.py`. The Hub is a local HTTP server. The harness's test is skipped where lm_eval is not
installed (`pip install -r benchmarks/requirements-harness.txt`)."""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import logger  # noqa: E402
import model as M  # noqa: E402
from benchmarks import evaluate as E  # noqa: E402
from model import GPT, Config, ConfigError  # noqa: E402

WORDS = "alpha beta gamma delta epsilon".split()
BYTES = data.get_encoding("bytes")
TINY = dict(vocab_size=257, eot_token=256, n_layer=2, n_embd=32, n_head=2, head_dim=16, num_experts=4, top_k=2, value_embeds=1, window="L",
            window_size=64, ngrams="2", ngram_rows=64, dtype="fp32")  # fmt: skip


def python(*words, expect=0, **env):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env)  # fmt: skip
    assert done.returncode == expect, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def inside(module, *words, expect=0):
    """The same of a script's main() in this process, which saves seconds of importing torch."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["script", *map(str, words)])
        try:
            module.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", file=err)
    done = subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
    assert status == expect, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


model_cli, evaluate_cli = functools.partial(inside, M), functools.partial(inside, E)


def sentence(done) -> str:
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 60 steps on sentences of five words, each a document."""
    folder = tmp_path_factory.mktemp("after")
    rng = np.random.default_rng(0)
    lines = [{"text": " ".join(rng.permutation(WORDS))} for _ in range(2000)]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    python("data.py", "--source", "files", "--path", folder / "words.jsonl", "--encoding", "bytes", "--out", folder / "words")
    flags = [f"--{name}={value}" for name, value in TINY.items() if name not in ("vocab_size", "eot_token")]
    python("train_muon.py", "--preset", "cpu", "--data", folder / "words", "--out_dir", folder / "logs", "--num_iterations", 60,
           "--batch_tokens", 1024, "--seq_len", 64, "--micro_batch_tokens", 1024, "--window_start", 64, "--val_tokens", 2048, "--val_every", 30,
           "--sample_tokens", 8, "--warmup_steps", 0, *flags)  # fmt: skip
    return folder / "logs" / "muon"


@pytest.fixture(scope="module")
def net(run):
    return M.load_model(run / "checkpoint")


def random_model(seed=0, **changes) -> GPT:
    """All parameters at random, so that none says nothing."""
    model, generator = GPT(Config(**TINY | changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(parameter.size(-1) ** -0.5 if parameter.ndim > 1 else 1)
    return model.eval()


# -----------------------------------------------------------------------------
# Sampling


def test_top_p_keeps_the_likeliest_that_together_have_it():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    for top_p, kept in ((0.3, {1}), (0.39, {1}), (0.41, {1, 3}), (0.7, {1, 3, 4}), (0.86, {0, 1, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        generators = [torch.Generator().manual_seed(i) for i in range(3000)]
        ids = M.picked_tokens(p.log().expand(3000, 5), 1.0, 0, top_p, generators)
        share = torch.bincount(ids, minlength=5) / 3000
        assert set(ids.tolist()) == kept
        want = torch.where(torch.tensor([i in kept for i in range(5)]), p, 0) / sum(p[i] for i in kept)
        assert ((share - want).abs() < 5 * (want / 3000).sqrt() + 1e-6).all(), top_p


def test_a_row_draws_from_its_own_seed():
    model, prompt = random_model(), torch.tensor([[256, 97, 98]])
    many = model.generate(prompt.expand(3, 3), 20, seed=7)
    assert torch.equal(many[:1], model.generate(prompt, 20, seed=7)) and torch.equal(many[2:], model.generate(prompt, 20, seed=9))
    assert len({tuple(row) for row in many.tolist()}) == 3


def test_rows_stop_at_the_end_of_text_and_the_last_ends_it():
    model, prompt = random_model(vocab_size=24, eot_token=23), torch.tensor([[23, 7]]).expand(4, 2)
    with torch.no_grad():
        model.head.mul_(0.1)  # flat: each of 24 ids has a chance
    free = model.generate(prompt, 400, seed=1)[:, 2:]
    first = [row.index(23) for row in free.tolist()]
    stopped = model.generate(prompt, 400, seed=1, stop_at=23)[:, 2:]
    assert stopped.shape[1] == max(first) + 1 and len(set(first)) > 1
    for row, whole, end in zip(stopped.tolist(), free.tolist(), first):
        assert row[: end + 1] == whole[: end + 1] and set(row[end:]) == {23}


def test_a_stream_gives_what_generate_gives_and_leaves_the_model_as_it_was():
    model, prompt = random_model().train(), torch.tensor([[256, 97, 98]])
    stream = model.stream(prompt, 12, temperature=0.5, top_k=9, top_p=0.9, seed=3)
    ids = [next(stream).item() for _ in range(5)]
    assert not model.training and not next(stream).requires_grad
    stream.close()
    assert model.training and ids == model.generate(prompt, 12, temperature=0.5, top_k=9, top_p=0.9, seed=3)[0, 3:8].tolist()


@pytest.mark.parametrize("name, value", (("temperature", -0.1), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)))
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
        random_model().generate(torch.tensor([[256]]), 2, **{name: value})


def test_the_command_streams_samples_and_says_how_fast(run):
    words = ["--checkpoint", run / "checkpoint", "--prompt", "alpha beta ", "--max_new_tokens", 60, "--temperature", 0.7, "--top_p", 0.95]
    one, three = model_cli(*words), model_cli(*words, "--num_samples", 3)
    assert one.stdout.startswith("alpha beta ") and set(one.stdout.split()) & set(WORDS[2:])
    first, *others = re.split(r"-{30} \d of 3\n", three.stdout)
    assert first == one.stdout and len(others) == 2 and all(text.startswith("alpha beta ") for text in others)
    assert re.fullmatch(r"3 x \d+ tokens after 12: the first after [\d.]+ s, [\d,.]+ tokens/s", sentence(three))
    new = int(re.match(r"1 x (\d+) tokens", sentence(one))[1])
    assert new < 60, "the text ends long before"
    on = model_cli(*words, "--ignore_eot")
    assert sentence(on).startswith("1 x 60 tokens") and on.stdout.startswith(one.stdout.rstrip("\n"))
    assert "top_p is 2.0" in sentence(model_cli(*words[:-1], 2, expect=1))
    likeliest = model_cli(*words, "--top_k", 1).stdout
    assert likeliest == model_cli(*words, "--top_k", 1, "--seed", 5).stdout and model_cli(*words, "--top_k", 50).stdout  # more than there are experts
    assert "n_layer is a preset's" in sentence(model_cli(*words, "--n_layer", 3, expect=1))


def test_a_character_of_several_tokens_is_shown_whole(monkeypatch, capsys, run):
    monkeypatch.setattr(GPT, "stream", lambda self, *how: iter(torch.tensor([[byte] for byte in "né€".encode()])))
    shown = []
    monkeypatch.setattr(M, "show", shown.append)
    monkeypatch.setattr(sys, "argv", ["model.py", "--checkpoint", str(run / "checkpoint"), "--prompt", "x"])
    M.main()
    assert shown == ["x", "n", "", "é", "", "", "€", "\n"]


@pytest.mark.parametrize("changes", (
    {}, dict(tie_embeddings=True), dict(pattern="D"), dict(experts="mlp,swiglu,kan,relu", mlp_ratio=4.5), dict(attention="LSKR", n_layer=4),
    dict(router="mlp"), dict(router="conv"), dict(router="recurrent"), dict(router="attention"),
    dict(num_shared_experts=1, shared="conv", mlp_ratio=3.0), dict(depth="loop", loops=3, halt="act"),
    dict(depth="routed", loops=3, looped="oo", controller="lstm"), dict(head="fp8"),
), ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "plain")  # fmt: skip
def test_matrices_that_are_cast_once_give_the_same_bits(changes):
    model, ids = random_model(**changes | {"dtype": "bf16"}), torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(4))
    before, size = model(ids).logits, sum(p.nbytes for p in model.parameters())
    assert torch.equal(model.for_inference()(ids).logits, before) and sum(p.nbytes for p in model.parameters()) < 0.95 * size


# -----------------------------------------------------------------------------
# The Hub


def same_model(a: GPT, b: GPT):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    assert a.config == b.config and a.encoding == b.encoding and not b.training and isinstance(b, GPT)
    assert {name: value.shape for name, value in a.state_dict().items()} == {name: value.shape for name, value in b.state_dict().items()}
    assert torch.equal(a(ids).logits, b(ids).logits) and torch.equal(a.load_WLE, b.load_WLE)


def test_a_checkpoint_becomes_a_folder_that_every_command_takes(run, net, tmp_path):
    done = model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", tmp_path / "shared")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"README.md", "config.json", "model.safetensors", "val_loss.png"}
    assert not list(tmp_path.glob("*.partial")) and "model.safetensors (" in done.stdout
    settings = json.loads((tmp_path / "shared/config.json").read_text())
    assert settings == {**dataclasses.asdict(net.config), "encoding": "bytes", "model_type": "modded-nanomoe"}
    same_model(net, GPT.from_pretrained(tmp_path / "shared"))
    same_model(net, M.load_model(tmp_path / "shared"))
    card = (tmp_path / "shared/README.md").read_text()
    (bpb,) = [row["val/bpb"] for row in logger.read_run(run)["rows"] if "val/bpb" in row][-1:]
    counts = M.count_parameters(net.config)
    assert card.startswith("---\n") and "license: mit" in card and f"{counts['total']:,} parameters" in card and "![Validation" in card
    assert f"| bits/byte | {bpb:.4f} |" in card and "Trained by muon" in card and "4 experts, top-2, in 2 of 2 layers" in card
    prompt = ["--prompt", "alpha ", "--max_new_tokens", 20, "--temperature", 0]
    texts = [model_cli("--checkpoint", where, *prompt).stdout for where in (run / "checkpoint", tmp_path / "shared")]
    assert texts[0] == texts[1]
    code = re.search(r"```python\n(.*?)```", card, re.S)[1] + "print(model.encoding, sum(p.numel() for p in model.parameters()))"
    assert python("-c", code).stdout.split() == ["bytes", str(counts["total"])]
    model_cli("--checkpoint", tmp_path / "shared", "--save_pretrained", tmp_path / "again")  # from a folder to a folder
    same_model(net, GPT.from_pretrained(tmp_path / "again"))
    model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", tmp_path / "again")  # over what it wrote before
    assert "## The run" in (tmp_path / "again/README.md").read_text()


@pytest.mark.parametrize("changes", (dict(tie_embeddings=True), dict(pattern="D"), dict(depth="loop", loops=2), dict(num_meta_tokens=2),
                                     dict(router="hash", bias_update_factor=0.01)), ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_any_model_survives_a_folder(changes, tmp_path):
    model = random_model(**changes)
    model.bias_LE.normal_()
    model.save_pretrained(tmp_path / "one")
    again = GPT.from_pretrained(tmp_path / "one")
    same_model(model, again)
    again.encoding = "bytes"
    again.save_pretrained(tmp_path / "two")  # a model that was loaded is written as any other
    assert GPT.from_pretrained(tmp_path / "two").encoding == "bytes"


def test_bad_folders_and_names_get_a_sentence(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    refused = model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", other, expect=1)
    assert "already holds other files" in sentence(refused) and [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert "need --checkpoint" in sentence(model_cli("--save_pretrained", tmp_path / "x", expect=1))
    M.load_model(run / "checkpoint").save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{tmp_path}/cut cannot be loaded" in sentence(model_cli("--checkpoint", tmp_path / "cut", expect=1))
    settings = json.loads((tmp_path / "cut/config.json").read_text())
    M.load_model(run / "checkpoint").save_pretrained(tmp_path / "cut")
    (tmp_path / "cut/config.json").write_text(json.dumps(settings | {"n_layer": 3}))
    assert "cannot be loaded" in sentence(model_cli("--checkpoint", tmp_path / "cut", expect=1)), "weights are missing"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as uploading and downloading a small model needs."""

    protocol_version = "HTTP/1.1"

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["organization"] + "/" + json.loads(body)["name"]
            self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/me/tiny/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"error": "unknown"}, 404)

    def do_GET(self):
        _, _, name = self.path.split("?")[0].partition("/resolve/main/")
        if self.path.startswith("/me/tiny/resolve/") and name in self.server.files:
            body = self.server.files[name]
            self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit="1" * 40)
        else:
            self.answer({"error": "not here"}, 404, X_Error_Code="EntryNotFound" if name else "RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.cards, server.asked, server.address = {}, [], [], f"http://127.0.0.1:{server.server_port}"
    server.env = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret",
                  "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(hub, run, net):
    done = python("model.py", "--checkpoint", run / "checkpoint", "--push_to_hub", "me/tiny", **hub.env)
    assert "/me/tiny/commit/" in done.stdout
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "val_loss.png"}
    assert {token for _, token in hub.asked} == {"Bearer hf_secret"}
    card = hub.files["README.md"].decode()
    assert 'GPT.from_pretrained("me/tiny")' in card and "--checkpoint hf://me/tiny" in card and "# tiny" in card and hub.cards
    prompt = ["--prompt", "gamma ", "--max_new_tokens", 20, "--temperature", 0]
    here, there = (python("model.py", "--checkpoint", where, *prompt, **hub.env).stdout for where in (run / "checkpoint", "hf://me/tiny"))
    assert here == there
    code = "from model import GPT; m = GPT.from_pretrained('me/tiny', revision='main'); print(m.encoding, m.load_WLE.double().sum().item())"
    assert python("-c", code, **hub.env).stdout.split() == ["bytes", str(net.load_WLE.double().sum().item())]


def test_the_hub_that_is_not_there_or_has_no_such_model(hub, run):
    assert "hf://me/none cannot be loaded" in sentence(python("model.py", "--checkpoint", "hf://me/none", expect=1, **hub.env))
    nowhere = hub.env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = python("model.py", "--checkpoint", run / "checkpoint", "--push_to_hub", "me/tiny", expect=1, **nowhere)
    assert "me/tiny cannot be uploaded" in sentence(done)


def test_training_does_without_the_hubs_packages(tmp_path):
    code = "import sys, train_muon; print({'huggingface_hub', 'safetensors', 'plotly', 'wandb', 'tensorboard'} & set(sys.modules))"
    assert python("-c", code).stdout.strip() == "set()"
    hide = "import sys; sys.modules['huggingface_hub'] = None; import model; sys.argv = ['model.py', '--checkpoint', 'hf://a/b']; model.main()"
    assert "pip install huggingface_hub" in sentence(python("-c", hide, expect=1))


# -----------------------------------------------------------------------------
# Evaluation


def log_probs(model, ids) -> torch.Tensor:
    """Of each id but the first, after all before it, by a forward for each: slow and plain."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]] for i in range(1, len(ids))])


@pytest.mark.parametrize("length", (2, 20, 33, 40, 79, 200))
@pytest.mark.parametrize("rows", (32, 64, 4096), ids="{} tokens at a time".format)
def test_a_stream_is_scored_as_token_by_token(length, rows, monkeypatch):
    """Windows overlap by half, whose targets count once, in any number of rows."""
    monkeypatch.setattr(E, "BATCH_TOKENS", rows)
    model = random_model(window_size=8)  # two layers see 14 tokens back, less than half a window of 32, so that every context is whole
    ids = np.random.default_rng(length).integers(0, 256, length)
    ids[0] = 256
    want = -log_probs(model, ids.tolist()).sum().item()
    for seq_len in (32, min(32, length - 1)):
        assert E.stream_nats(model, ids, seq_len) == pytest.approx(want, rel=1e-5)


def test_bits_per_byte_of_documents_counts_bytes_and_no_end_of_text():
    model, texts = random_model(window_size=8), ["né", "a longer document than that", "x"]
    nats = sum(-log_probs(model, [256, *text.encode()]).sum().item() for text in texts)
    bits, size, tokens = E.bits_per_byte(model, BYTES, (text.encode() for text in texts), 32)
    assert size == tokens == sum(len(text.encode()) for text in texts)
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(data.DataError, match="no text"):
        E.bits_per_byte(model, BYTES, [], 32)


def test_bits_per_byte_of_the_validation_text_is_the_runs_own(run, net):
    """The same text as the run's last evaluation: there rows are cut without overlap, so this may only be lower, and not by much."""
    shard = data.read_shard(run.parents[1] / "words" / "files_val_000000.bin")[: 2048 + 1]
    text = [part.encode() for part in BYTES.decode_bytes(np.where(shard == 256, 0, shard)).decode().split("\0") if part]
    bits, *_ = E.bits_per_byte(net, BYTES, text, 64)
    (reported,) = [row["val/bpb"] for row in logger.read_run(run)["rows"] if "val/bpb" in row][-1:]
    log = reported * sum(map(len, text))  # the run asks for end-of-text tokens too
    assert 0.5 * log / sum(map(len, text)) < bits < reported


def test_bits_per_byte_from_the_command_line(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("alpha beta gamma")
    (tmp_path / "folder/b.jsonl").write_text(json.dumps({"text": "delta epsilon"}) + "\n" + json.dumps({"text": "beta alpha"}) + "\n")
    (tmp_path / "noise.txt").write_text("zqx7 vvkw")
    words = ["bpb", "--checkpoint", run / "checkpoint", "--path"]
    lines = evaluate_cli(*words, tmp_path / "folder", tmp_path / "noise.txt").stdout.splitlines()
    found = [re.fullmatch(r"(.*): ([\d.]+) bits per byte, (\d+) bytes, (\d+) tokens in [\d.]+ s", line) for line in lines]
    assert [(line[1], line[3]) for line in found] == [(str(tmp_path / "folder"), "39"), (str(tmp_path / "noise.txt"), "9")]
    assert float(found[0][2]) < 2.5 < float(found[1][2]), "it has learnt its words"
    assert "is not a file or folder" in sentence(evaluate_cli(*words, tmp_path / "none", expect=1))
    (tmp_path / "empty.txt").write_text("")
    assert "no text" in sentence(evaluate_cli(*words, tmp_path / "empty.txt", expect=1))


class Table:
    """A model of which every probability is known: the next id depends on the last one alone."""

    def __init__(self, log_prob_VV):
        self.log_prob_VV, self.head = log_prob_VV, torch.zeros(1)
        self.config = Config(**TINY)

    def __call__(self, ids_BT):
        return M.Output(self.log_prob_VV[ids_BT], None, {})


@pytest.fixture
def table():
    """After `=`: `a` 0.5, `b` 0.3, `c` 0.2; after `a`: `a` 0.9, end 0.1; after `b`: `b` 0.2, `c` 0.8; elsewhere all alike."""
    p = torch.full((257, 257), 1 / 257, dtype=torch.float64)
    for before, after in {"=": {"a": 0.5, "b": 0.3, "c": 0.2}, "a": {"a": 0.9, "z": 0.1}, "b": {"b": 0.2, "c": 0.8}}.items():
        p[ord(before)] = 1e-9
        for letter, share in after.items():
            p[ord(before), ord(letter)] = share
    return Table(p.log())


def test_continuations_are_scored_as_by_hand(table):
    pairs = [E.encode_pair(BYTES, *pair) for pair in (("x=", "a"), ("x=", "aa"), ("x=", "bc"), ("x=", "b"), ("=", "aaz"), ("x=", "bb"))]
    found = E.score(table, pairs, 64)
    assert [round(math.exp(nats), 6) for nats, _ in found] == [0.5, 0.45, 0.24, 0.3, 0.045, 0.06]
    assert [greedy for _, greedy in found] == [True, True, False, False, False, False]
    short = E.score(table, pairs, 2)  # room for the last two tokens: the last three of `aaz` do not fit
    assert [round(math.exp(nats), 6) for nats, _ in short[:4]] == [0.5, 0.45, 0.24, 0.3] and math.exp(short[4][0]) == pytest.approx(0.09, rel=1e-6)
    with pytest.raises(ValueError, match="at least one token"):
        E.score(table, [([256], [])], 64)


def test_questions_are_answered_as_by_hand(table):
    """P(a) = .5 beats P(bc) = .24 and P(c) = .2; per byte ln .5 = -.69 loses to ln .405 / 3 = -.30 and ln .24 / 2 = -.71 wins nothing."""
    questions = [{"context": "x=", "choices": ["bc", "a", "c"], "answer": 1}, {"context": "x=", "choices": ["a", "aaa"], "answer": 1},
                 {"context": "x=", "choices": ["c", "b"], "answer": 0}]  # fmt: skip
    assert E.answer_questions(table, BYTES, questions) == {"acc": pytest.approx(1 / 3), "acc_norm": pytest.approx(2 / 3)}


def test_a_space_at_the_end_of_a_context_belongs_to_the_continuation():
    assert E.encode_pair(BYTES, "a  ", "b") == ([256, 97], [32, 32, 98])
    assert E.encode_pair(BYTES, "", "b") == ([256], [98])


def test_batches_of_any_size_score_alike(net, monkeypatch):
    rng = np.random.default_rng(5)
    pairs = [([256, *rng.integers(97, 120, n).tolist()], rng.integers(97, 120, m).tolist()) for n, m in rng.integers(1, 30, (25, 2))]
    many, found = E.score(net, pairs, 64), []
    for size in (1, 100):
        monkeypatch.setattr(E, "BATCH_TOKENS", size)
        found.append(E.score(net, pairs, 64))
    for (a, _), (b, _), (c, _), (before, after) in zip(many, *found, pairs):
        want = log_probs(net, before + after)[-len(after) :].sum().item()
        assert a == pytest.approx(want, rel=1e-4) and b == pytest.approx(want, rel=1e-4) and c == pytest.approx(want, rel=1e-4)


def test_questions_from_the_command_line(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    words = ["choices", "--checkpoint", run / "checkpoint", "--path", path]
    path.write_text("".join(json.dumps({"context": f"{word[:2]}", "choices": ["#?!", word[2:], "qqqq"], "answer": 1}) + "\n" for word in WORDS))
    assert "5 questions, acc 1.0000, acc_norm 1.0000 (chance 0.3333)" in evaluate_cli(*words).stdout
    good = path.read_text()
    two = '{"context": "x", "choices": ["a", "%s"], "answer": %d}'
    for line in ('{"context": "x"}', two % ("b", 2), two % ("", 0), "["):
        path.write_text(good + line + "\n")
        assert f"{path}, line 6 is no question" in sentence(evaluate_cli(*words, expect=1))
    path.write_text("")
    assert "has no questions" in sentence(evaluate_cli(*words, expect=1))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{{target}}}}}"
{more}
metadata: {{version: 1}}
"""


def test_the_harness_runs_tasks_of_every_kind(run, tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install -r benchmarks/requirements-harness.txt")
    lines = [{"question": word[:3], "options": ["@@", word[3:] or "!"], "gold": 1, "rest": word[3:] or "!"} for word in WORDS if len(word) > 4]
    (tmp_path / "words.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = 'doc_to_choice: "{{options}}"\nmetric_list: [{metric: acc}]'
    kinds = {
        "words_choice": ("multiple_choice", "gold", choices),
        "words_perplexity": ("loglikelihood_rolling", "question", "metric_list: [{metric: bits_per_byte}]"),
        "words_generate": ("generate_until", "rest", "generation_kwargs: {until: [' '], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]"),
    }
    for name, (kind, target, more) in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, path=tmp_path / "words.json", kind=kind, target=target, more=more))
    done = python("benchmarks/evaluate.py", "harness", "--checkpoint", run / "checkpoint", "--tasks", *kinds, "--include_path", tmp_path,
                  HF_HOME=str(tmp_path / "hf"), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # fmt: skip
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|words_")]
    found = {(row[0], row[4]): float(row[6]) for row in cells}
    assert found["words_choice", "acc"] == 1.0
    assert found["words_generate", "exact_match"] > 0.4
    model = M.load_model(run / "checkpoint")
    nats = sum(-log_probs(model, [256, *line["question"].encode()]).sum().item() for line in lines)
    assert found["words_perplexity", "bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(line["question"]) for line in lines), abs=2e-4)


def test_without_the_harness_it_says_how_to_get_it(run):
    code = ("import sys; sys.modules['lm_eval'] = None; from benchmarks import evaluate; "
            f"sys.argv[1:] = ['harness', '--checkpoint', {str(run / 'checkpoint')!r}, '--tasks', 'hellaswag']; evaluate.main()")  # fmt: skip
    assert "pip install -r benchmarks/requirements-harness.txt" in sentence(python("-c", code, expect=1))


def test_a_masked_model_is_refused(tmp_path):
    random_model(objective="masked", router="linear").save_pretrained(tmp_path / "masked")
    done = evaluate_cli("bpb", "--checkpoint", tmp_path / "masked", "--path", ROOT / "README.md", expect=1)
    assert "objective is masked" in sentence(done)
