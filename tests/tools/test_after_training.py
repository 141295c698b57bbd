"""After training: sampling from the command line, folders for the Hub, evaluation. The run is trained here.

CPU, no network: `pytest tests/tools/test_after_training.py`. The Hub is a local HTTP server.
The test of the harness is skipped if lm_eval is not installed (`pip install -r benchmarks/requirements-harness.txt`).
"""

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
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import logger
import model
import tokenizer
import zoo
from benchmarks import evaluate as E
from cli import UserError
from tools import generate, hub

ROOT = Path(__file__).parents[2]
WORDS = "alpha beta gamma delta epsilon".split()
BYTES = tokenizer.get_encoding("bytes")
IN_CORE = ({}, dict(tie_embeddings=True), dict(pattern="D"), dict(head="fp8"))  # changes that model.Config has too
TINY = dict(vocab_size=257, eot_token=256, n_layer=2, n_embd=32, n_head=2, head_dim=16, num_experts=4, top_k=2,
            value_embeds=1, pattern="M", window="L", window_size=64, ngrams="2", ngram_rows=64, dtype="fp32")  # fmt: skip


def python(*words, expect=0, **env):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env)  # fmt: skip
    assert done.returncode == expect, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def inside(module, *words, expect=0):
    """The same with a script's main() in this process, without seconds of importing torch."""
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


model_cli, evaluate_cli = functools.partial(inside, generate), functools.partial(inside, E)


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
    python(
        "data.py",
        "--source",
        "files",
        "--path",
        folder / "words.jsonl",
        "--encoding",
        "bytes",
        "--out",
        folder / "words",
    )
    flags = [f"--{name}={value}" for name, value in TINY.items() if name not in ("vocab_size", "eot_token")]
    python("train_muon.py", "--preset", "cpu", "--data", folder / "words", "--out_dir", folder / "logs",
           "--num_iterations", 60, "--batch_tokens", 1024, "--seq_len", 64,
           "--micro_batch_tokens", 1024, "--window_start", 64,
           "--val_tokens", 2048, "--val_every", 30,
           "--sample_tokens", 8, "--warmup_steps", 0, *flags)  # fmt: skip
    return folder / "logs" / "muon"


@pytest.fixture(scope="module")
def net(run):
    return hub.load(run / "checkpoint")


def random_net(config_class=model.Config, **changes) -> model.GPT:
    """All parameters at random, as some initial values are zero."""
    net, generator = model.build(config_class(**TINY | changes)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator).mul_(parameter.size(-1) ** -0.5 if parameter.ndim > 1 else 1)
    return net.eval()


# -----------------------------------------------------------------------------
# Sampling


def test_top_p_keeps_the_likeliest_ids_with_this_total_probability():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    for top_p, kept in (
        (0.3, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.7, {1, 3, 4}),
        (0.86, {0, 1, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ):
        generators = [torch.Generator().manual_seed(i) for i in range(3000)]
        ids = model.sample_ids(p.log().expand(3000, 5), 1.0, 0, top_p, generators)
        share = torch.bincount(ids, minlength=5) / 3000
        assert set(ids.tolist()) == kept
        want = torch.where(torch.tensor([i in kept for i in range(5)]), p, 0) / sum(p[i] for i in kept)
        assert ((share - want).abs() < 5 * (want / 3000).sqrt() + 1e-6).all(), top_p


def test_every_row_has_its_own_seed():
    net, prompt = random_net(), torch.tensor([[256, 97, 98]])
    many = net.generate(prompt.expand(3, 3), 20, seed=7)
    assert torch.equal(many[:1], net.generate(prompt, 20, seed=7)) and torch.equal(
        many[2:], net.generate(prompt, 20, seed=9)
    )
    assert len({tuple(row) for row in many.tolist()}) == 3


def test_rows_stop_at_the_end_of_text_and_sampling_ends_with_the_last():
    net, prompt = random_net(vocab_size=24, eot_token=23), torch.tensor([[23, 7]]).expand(4, 2)
    with torch.no_grad():
        net.head.mul_(0.1)  # nearly uniform: each of 24 ids occurs
    free = net.generate(prompt, 400, seed=1)[:, 2:]
    first = [row.index(23) for row in free.tolist()]
    stopped = net.generate(prompt, 400, seed=1, stop_at=23)[:, 2:]
    assert stopped.shape[1] == max(first) + 1 and len(set(first)) > 1
    for row, whole, end in zip(stopped.tolist(), free.tolist(), first):
        assert row[: end + 1] == whole[: end + 1] and set(row[end:]) == {23}


def test_a_stream_equals_generate_and_restores_training_mode():
    net, prompt = random_net().train(), torch.tensor([[256, 97, 98]])
    stream = net.stream(prompt, 12, temperature=0.5, top_k=9, top_p=0.9, seed=3)
    ids = [next(stream).item() for _ in range(5)]
    assert not net.training and not next(stream).requires_grad
    stream.close()
    assert (
        net.training and ids == net.generate(prompt, 12, temperature=0.5, top_k=9, top_p=0.9, seed=3)[0, 3:8].tolist()
    )


@pytest.mark.parametrize(
    "name, value", (("temperature", -0.1), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1))
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}; it must be"):
        random_net().generate(torch.tensor([[256]]), 2, **{name: value})


def test_the_command_streams_samples_and_prints_its_speed(run):
    words = [
        "--checkpoint",
        run / "checkpoint",
        "--prompt",
        "alpha beta ",
        "--max_new_tokens",
        60,
        "--temperature",
        0.7,
        "--top_p",
        0.95,
    ]
    one, three = model_cli(*words), model_cli(*words, "--num_samples", 3)
    assert one.stdout.startswith("alpha beta ") and set(one.stdout.split()) & set(WORDS[2:])
    first, *others = re.split(r"-{30} \d of 3\n", three.stdout)
    assert first == one.stdout and len(others) == 2 and all(text.startswith("alpha beta ") for text in others)
    assert re.fullmatch(r"3 x \d+ tokens after 12: the first after [\d.]+ s, [\d,.]+ tokens/s", sentence(three))
    new = int(re.match(r"1 x (\d+) tokens", sentence(one))[1])
    assert new < 60, "the end of the text comes before"
    on = model_cli(*words, "--ignore_eot")
    assert sentence(on).startswith("1 x 60 tokens") and on.stdout.startswith(one.stdout.rstrip("\n"))
    assert "top_p is 2.0" in sentence(model_cli(*words[:-1], 2, expect=1))
    likeliest = model_cli(*words, "--top_k", 1).stdout
    assert likeliest == model_cli(*words, "--top_k", 1, "--seed", 5).stdout
    assert model_cli(*words, "--top_k", 50).stdout  # more than num_experts
    assert "n_layer is a field of a preset" in sentence(model_cli(*words, "--n_layer", 3, expect=1))


def test_a_character_of_several_tokens_is_shown_whole(monkeypatch, capsys, run):
    monkeypatch.setattr(
        model.GPT, "stream", lambda self, *args, **rules: iter(torch.tensor([[byte] for byte in "né€".encode()]))
    )
    shown = []
    monkeypatch.setattr(generate, "show", shown.append)
    monkeypatch.setattr(sys, "argv", ["model.py", "--checkpoint", str(run / "checkpoint"), "--prompt", "x"])
    generate.main()
    assert shown == ["x", "n", "", "é", "", "", "€", "\n"]


@pytest.mark.parametrize("changes", (
    {}, dict(tie_embeddings=True), dict(pattern="D"), dict(experts="mlp,swiglu,kan,relu", mlp_ratio=4.5),
    dict(attention="LSKR", n_layer=4), dict(router="mlp"), dict(router="conv"), dict(router="recurrent"),
    dict(router="attention"),
    dict(num_shared_experts=1, shared="conv", mlp_ratio=3.0), dict(depth="loop", loops=3, halt="act"),
    dict(depth="routed", loops=3, looped="oo", controller="lstm"), dict(head="fp8"),
), ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "plain")  # fmt: skip
def test_a_model_for_inference_gives_the_same_bits(changes):
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(4))
    for config_class in (zoo.Config, model.Config)[: 1 + (changes in IN_CORE)]:
        net = random_net(config_class, **changes | {"dtype": "bf16"})
        before, size = net(ids).logits, sum(p.nbytes for p in net.parameters())
        assert torch.equal(hub.for_inference(net)(ids).logits, before)
        assert sum(p.nbytes for p in net.parameters()) < 0.95 * size


# -----------------------------------------------------------------------------
# The Hub


def check_same_model(a: model.GPT, b: model.GPT):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    assert a.config == b.config and a.encoding == b.encoding and not b.training and type(a) is type(b)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (a, b)]
    assert shapes[0] == shapes[1]
    assert torch.equal(a(ids).logits, b(ids).logits) and torch.equal(a.load_WLE, b.load_WLE)


def test_a_checkpoint_becomes_a_folder_that_every_command_reads(run, net, tmp_path):
    done = model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", tmp_path / "shared")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "val_loss.png",
    }
    assert not list(tmp_path.glob("*.partial")) and "model.safetensors (" in done.stdout
    settings = json.loads((tmp_path / "shared/config.json").read_text())
    about = {"encoding": "bytes", "model_type": "modded-nanomoe", "config_class": "model.Config"}
    assert settings == {"model": dataclasses.asdict(net.config)} | about
    check_same_model(net, hub.load(tmp_path / "shared"))
    card = (tmp_path / "shared/README.md").read_text()
    (bpb,) = [row["val/bpb"] for row in logger.read_run(run)["rows"] if "val/bpb" in row][-1:]
    counts = model.count_parameters(net.config)
    assert card.startswith("---\n")
    for words in ("license: mit", f"{counts['total']:,} parameters", "![Validation", f"| bits/byte | {bpb:.4f} |",
                  "Trained by muon", "4 experts, top-2, in 2 of 2 layers"):  # fmt: skip
        assert words in card
    prompt = ["--prompt", "alpha ", "--max_new_tokens", 20, "--temperature", 0]
    texts = [model_cli("--checkpoint", where, *prompt).stdout for where in (run / "checkpoint", tmp_path / "shared")]
    assert texts[0] == texts[1]
    code = (
        re.search(r"```python\n(.*?)```", card, re.S)[1]
        + "print(model.encoding, sum(p.numel() for p in model.parameters()))"
    )
    assert python("-c", code).stdout.split() == ["bytes", str(counts["total"])]
    model_cli("--checkpoint", tmp_path / "shared", "--save_pretrained", tmp_path / "again")  # from a folder to a folder
    check_same_model(net, hub.load(tmp_path / "again"))
    model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", tmp_path / "again")  # over an earlier folder
    assert "## The run" in (tmp_path / "again/README.md").read_text()


def test_saving_replaces_only_its_own_files(run, tmp_path):
    shared = tmp_path / "shared"
    (shared / ".git").mkdir(parents=True)  # a repository that is still empty
    (shared / ".git/HEAD").write_text("ref: refs/heads/main")
    model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", shared)
    ours = {path.name: path.read_bytes() for path in shared.iterdir() if path.is_file()}
    assert "## The run" in ours["README.md"].decode() and len(ours) == 4
    (shared / "notes.txt").write_text("years of work")
    (shared / "onnx").mkdir()
    (shared / "model.safetensors").write_bytes(b"half a file")
    done = model_cli("--checkpoint", run, "--save_pretrained", shared)  # the run's folder serves as well
    assert {path.name: path.read_bytes() for path in shared.iterdir() if path.name in ours} == ours
    assert (shared / "notes.txt").read_text() == "years of work" and (shared / "onnx").is_dir()
    assert (shared / ".git/HEAD").read_text() == "ref: refs/heads/main" and "notes.txt" not in done.stdout
    assert len(list(shared.iterdir())) == len(ours) + 3, "a temporary file is left"


def test_a_folder_of_another_program_is_not_taken(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    refused = model_cli("--checkpoint", run, "--save_pretrained", tmp_path, expect=1)
    assert "already holds other files" in sentence(refused)
    assert (tmp_path / "model.safetensors").read_bytes() == b"theirs"
    (tmp_path / "file").write_text("mine")
    assert "file" in sentence(model_cli("--checkpoint", run, "--save_pretrained", tmp_path / "file", expect=1))


def test_a_shared_model_keeps_the_section_of_its_run(run, tmp_path):
    for source, target in ((run, "one"), (tmp_path / "one", "two"), (tmp_path / "two", "two")):
        model_cli("--checkpoint", source, "--save_pretrained", tmp_path / target)
    one, two = ((tmp_path / name / "README.md").read_text().partition("## The run") for name in ("one", "two"))
    assert one[2] == two[2] and "| bits/byte |" in two[2] and f"{tmp_path}/two" in two[0] and f"{tmp_path}/one" not in two[0]
    assert (tmp_path / "one/val_loss.png").read_bytes() == (tmp_path / "two/val_loss.png").read_bytes()
    (tmp_path / "one/README.md").unlink()
    done = model_cli("--checkpoint", tmp_path / "one", "--save_pretrained", tmp_path / "three")
    assert "the card of" in sentence(done) and "## The run" not in (tmp_path / "three/README.md").read_text()


def test_routes_of_a_shared_folder_are_those_of_its_run(run, tmp_path):
    model_cli("--checkpoint", run, "--save_pretrained", tmp_path / "shared")
    shards = run.parents[1] / "words"
    for where, file in ((run / "checkpoint", "a.npz"), (tmp_path / "shared", "b.npz")):
        model_cli("--checkpoint", where, "--routes", tmp_path / file, "--data", shards, "--tokens", 200)
    a, b = (np.load(tmp_path / file) for file in ("a.npz", "b.npz"))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("words, said", [
    ("--prompt hi", "--prompt needs --checkpoint"), ("--max_new_tokens=9", "--max_new_tokens needs --checkpoint"),
    ("--seed 1", "--seed needs --checkpoint"), ("--checkpoint RUN --preset cpu", "--preset names a model, and a checkp"),
    ("--checkpoint RUN --seq-len 8", "seq_len is a field of a preset's card"),
    ("--checkpoint RUN --n_embd 64", "leave --n_embd or --checkpoint out"),
    ("--checkpoint RUN --push_to_hub a/b --prompt hi", "--prompt samples a text, and --push_to_hub does not"),
    ("--checkpoint RUN --data x", "--data goes with --routes"),
    ("--checkpoint RUN/../typo", "typo holds no checkpoint; runs beside it that do: muon"),
    ("--checkpoint RUN --max_new_tokens 100000000000", "100,000,000,0"), ("--checkpoint RUN --num_samples=10000000000", "lower"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_one_sentence(words, said, run):
    assert said in sentence(model_cli(*words.replace("RUN", str(run)).split(), expect=1))


@pytest.mark.parametrize("seed", (2**64, 10**30, -1))
def test_a_seed_that_no_generator_takes_is_one_sentence(seed, run):
    assert "argument --seed: " in sentence(model_cli("--checkpoint", run, "--seed", seed, expect=2))


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_tried_once(tmp_path):
    """By a connection alone; no request is sent, and the libraries of the Hub make none."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: connections are refused
        nowhere = dict(HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="")
        code = ("import socket; tried, connect = [], socket.socket.connect\n"
                "def count(self, address): tried.append(address); return connect(self, address)\n"
                "socket.socket.connect = count\n"
                "from tools import generate, prepare\n"
                "commands = [(generate, '--checkpoint hf://me/tiny'), (prepare, '--out OUT'),\n"
                "            (prepare, '--source hf --dataset a/b --encoding bytes --out OUT'),\n"
                "            (prepare, '--source domains --encoding bytes --out OUT')]\n"
                "for module, words in commands:\n"
                "    try: module.main(words.replace('OUT', OUT).split())\n"
                "    except SystemExit as end: print(end.code if isinstance(end.code, str) else '')\n"
                "print(len(tried))").replace("OUT)", f"{str(tmp_path / 'out')!r})")  # fmt: skip
        done = python("-c", code, **nowhere)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert done.stdout.split()[-1] == "1" and len(said) == 4, done
    assert all("network" in line or "connection" in line for line in said)


def test_ranks_that_cannot_be_downloaded_are_waited_for_briefly(tmp_path, monkeypatch):
    import requests

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    waits = []

    def note(self, request, **options):
        waits.append(options["timeout"])
        raise requests.exceptions.ReadTimeout("the server does not answer")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", note)
    with pytest.raises(UserError, match="cannot be downloaded .the server does not answer.: connect to the internet"):
        tokenizer.get_encoding("p50k_edit")  # that no other test has loaded
    assert waits == [3]
    assert not isinstance(requests.get, functools.partial), "the limit is taken back"


@pytest.mark.parametrize("changes", (dict(tie_embeddings=True), dict(pattern="D"), dict(depth="loop", loops=2),
                                     dict(num_meta_tokens=2), dict(router="hash", bias_update_factor=0.01)),
                                     ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_any_model_is_saved_and_loaded(changes, tmp_path):
    for config_class in (zoo.Config, model.Config)[: 1 + (changes in IN_CORE)]:
        net = random_net(config_class, **changes)
        net.bias_LE.normal_()
        hub.save(net, tmp_path / "one")
        again = hub.load(tmp_path / "one")
        check_same_model(net, again)
        again.encoding = "bytes"
        hub.save(again, tmp_path / "two")  # a loaded model is written like any other
        assert hub.load(tmp_path / "two").encoding == "bytes"


def test_bad_folders_and_names_are_one_sentence(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    refused = model_cli("--checkpoint", run / "checkpoint", "--save_pretrained", other, expect=1)
    assert "already holds other files" in sentence(refused) and [path.name for path in other.iterdir()] == [
        "thesis.txt"
    ]
    assert "--save_pretrained needs --checkpoint" in sentence(model_cli("--save_pretrained", tmp_path / "x", expect=1))
    hub.save(hub.load(run / "checkpoint"), tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{tmp_path}/cut cannot be loaded" in sentence(model_cli("--checkpoint", tmp_path / "cut", expect=1))
    settings = json.loads((tmp_path / "cut/config.json").read_text())
    hub.save(hub.load(run / "checkpoint"), tmp_path / "cut")
    settings["model"]["n_layer"] = 3
    (tmp_path / "cut/config.json").write_text(json.dumps(settings))
    assert "cannot be loaded" in sentence(model_cli("--checkpoint", tmp_path / "cut", expect=1)), "weights are missing"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The requests of uploading and downloading a small model."""

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
        self.server.requests.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["organization"] + "/" + json.loads(body)["name"]
            self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"{self.server.address}/me/tiny/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )
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
def fake_hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.files, server.cards, server.requests, server.address = {}, [], [], f"http://127.0.0.1:{server.server_port}"
    server.env = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"),
                  "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret",
                  "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_model_is_uploaded_and_downloaded(fake_hub, run, net):
    done = python("model.py", "--checkpoint", run / "checkpoint", "--push_to_hub", "me/tiny", **fake_hub.env)
    assert "/me/tiny/commit/" in done.stdout
    assert set(fake_hub.files) == {"README.md", "config.json", "model.safetensors", "val_loss.png"}
    assert {token for _, token in fake_hub.requests} == {"Bearer hf_secret"}
    card = fake_hub.files["README.md"].decode()
    assert 'hub.load("hf://me/tiny")' in card and "--checkpoint hf://me/tiny" in card and "# tiny" in card
    assert fake_hub.cards
    prompt = ["--prompt", "gamma ", "--max_new_tokens", 20, "--temperature", 0]
    places = run / "checkpoint", "hf://me/tiny"
    texts = [python("model.py", "--checkpoint", where, *prompt, **fake_hub.env).stdout for where in places]
    assert texts[0] == texts[1]
    code = ("from tools import hub; m = hub.load('hf://me/tiny', revision='main'); "
            "print(m.encoding, m.load_WLE.double().sum().item())")  # fmt: skip
    assert python("-c", code, **fake_hub.env).stdout.split() == ["bytes", str(net.load_WLE.double().sum().item())]


@pytest.mark.slow
def test_an_unknown_model_and_an_unreachable_hub_are_one_sentence(fake_hub, run):
    assert "hf://me/none cannot be loaded" in sentence(
        python("model.py", "--checkpoint", "hf://me/none", expect=1, **fake_hub.env)
    )
    nowhere = fake_hub.env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = python("model.py", "--checkpoint", run / "checkpoint", "--push_to_hub", "me/tiny", expect=1, **nowhere)
    assert "me/tiny cannot be uploaded" in sentence(done)


@pytest.mark.slow
def test_training_does_not_import_the_packages_of_the_hub(tmp_path):
    packages = {"huggingface_hub", "safetensors", "plotly", "wandb", "tensorboard"}
    code = f"import sys, train_muon; print({packages} & set(sys.modules))"
    assert python("-c", code).stdout.strip() == "set()"
    hide = ("import sys; sys.modules['huggingface_hub'] = None; from tools import generate; "
            "generate.main(['--checkpoint', 'hf://a/b'])")  # fmt: skip
    assert "pip install huggingface_hub" in sentence(python("-c", hide, expect=1))


# -----------------------------------------------------------------------------
# Evaluation


def log_probs(net, ids) -> torch.Tensor:
    """Log probability of each id but the first, given all before it, with one forward pass each."""
    with torch.no_grad():
        logits = [net(torch.tensor([ids[:i]])).logits[0, -1].double() for i in range(1, len(ids))]
    return torch.stack([logits_V.log_softmax(-1)[i] for logits_V, i in zip(logits, ids[1:])])


@pytest.mark.parametrize("length", (2, 20, 33, 40, 79, 200))
@pytest.mark.parametrize("rows", (32, 64, 4096), ids="{} tokens at a time".format)
def test_stream_nats_equal_those_token_by_token(length, rows, monkeypatch):
    """Windows overlap by half; every target counts once, whatever the number of rows."""
    monkeypatch.setattr(E, "BATCH_TOKENS", rows)
    net = random_net(window_size=8)  # two layers see 14 tokens back, less than half a window of 32: no context is cut
    ids = np.random.default_rng(length).integers(0, 256, length)
    ids[0] = 256
    want = -log_probs(net, ids.tolist()).sum().item()
    for seq_len in (32, min(32, length - 1)):
        assert E.stream_nats(net, ids, seq_len) == pytest.approx(want, rel=1e-5)


def test_bits_per_byte_counts_bytes_without_end_of_text():
    net, texts = random_net(window_size=8), ["né", "a longer document than that", "x"]
    nats = sum(-log_probs(net, [256, *text.encode()]).sum().item() for text in texts)
    bits, size, tokens = E.bits_per_byte(net, BYTES, (text.encode() for text in texts), 32)
    assert size == tokens == sum(len(text.encode()) for text in texts)
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(UserError, match="no text"):
        E.bits_per_byte(net, BYTES, [], 32)


def test_bits_per_byte_of_text_that_is_not_utf8_divide_by_the_bytes_of_the_file():
    net, text = random_net(window_size=8), np.random.default_rng(0).bytes(60)
    nats = -log_probs(net, [256, *text]).sum().item()
    bits, size, tokens = E.bits_per_byte(net, BYTES, [text], 80)
    assert size == tokens == 60 and bits == pytest.approx(nats / math.log(2) / 60, rel=1e-5)


def test_bits_per_byte_of_the_validation_text_is_close_to_that_of_the_run(run, net):
    """The run's last evaluation has the same text in rows without overlap, so its value is a little larger."""
    shard = data.read_shard(run.parents[1] / "words" / "files_val_000000.bin")[: 2048 + 1]
    text = [part.encode() for part in BYTES.decode_bytes(np.where(shard == 256, 0, shard)).decode().split("\0") if part]
    bits, *_ = E.bits_per_byte(net, BYTES, text, 64)
    (reported,) = [row["val/bpb"] for row in logger.read_run(run)["rows"] if "val/bpb" in row][-1:]
    assert 0.5 * reported < bits < reported


def test_bits_per_byte_from_the_command_line(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("alpha beta gamma")
    lines = [json.dumps({"text": text}) + "\n" for text in ("delta epsilon", "beta alpha")]
    (tmp_path / "folder/b.jsonl").write_text("".join(lines))
    (tmp_path / "noise.txt").write_text("zqx7 vvkw")
    words = ["bpb", "--checkpoint", run / "checkpoint", "--path"]
    lines = evaluate_cli(*words, tmp_path / "folder", tmp_path / "noise.txt").stdout.splitlines()
    found = [
        re.fullmatch(r"(.*): ([\d.]+) bits per byte, (\d+) bytes, (\d+) tokens in [\d.]+ s", line) for line in lines
    ]
    assert [(line[1], line[3]) for line in found] == [
        (str(tmp_path / "folder"), "39"),
        (str(tmp_path / "noise.txt"), "9"),
    ]
    assert float(found[0][2]) < 2.5 < float(found[1][2]), "the training words are likelier"
    assert "is not a file or folder" in sentence(evaluate_cli(*words, tmp_path / "none", expect=1))
    (tmp_path / "empty.txt").write_text("")
    assert "no text" in sentence(evaluate_cli(*words, tmp_path / "empty.txt", expect=1))


class Table:
    """A model of known probabilities: the next id depends on the last one alone."""

    def __init__(self, log_prob_VV):
        self.log_prob_VV, self.head = log_prob_VV, torch.zeros(1)
        self.config = model.Config(**TINY)

    def __call__(self, ids_BT):
        return model.Output(self.log_prob_VV[ids_BT], None, {})


@pytest.fixture
def table():
    """After `=`: `a` 0.5, `b` 0.3, `c` 0.2; after `a`: `a` 0.9, `z` 0.1; after `b`: `b` 0.2, `c` 0.8; else uniform."""
    p = torch.full((257, 257), 1 / 257, dtype=torch.float64)
    for before, after in {
        "=": {"a": 0.5, "b": 0.3, "c": 0.2},
        "a": {"a": 0.9, "z": 0.1},
        "b": {"b": 0.2, "c": 0.8},
    }.items():
        p[ord(before)] = 1e-9
        for letter, share in after.items():
            p[ord(before), ord(letter)] = share
    return Table(p.log())


def test_scores_of_continuations_are_those_by_hand(table):
    texts = ("x=", "a"), ("x=", "aa"), ("x=", "bc"), ("x=", "b"), ("=", "aaz"), ("x=", "bb")
    pairs = [E.encode_pair(BYTES, *pair) for pair in texts]
    found = E.score(table, pairs, 64)
    assert [round(math.exp(nats), 6) for nats, _ in found] == [0.5, 0.45, 0.24, 0.3, 0.045, 0.06]
    assert [greedy for _, greedy in found] == [True, True, False, False, False, False]
    for longest in (1, 2, 3):  # what does not fit is scored in parts
        assert E.score(table, pairs, longest) == [(pytest.approx(nats, rel=1e-6), greedy) for nats, greedy in found]
    assert E.score(table, [([256], []), *pairs], 64) == [(0, True), *found]
    with pytest.raises(ValueError, match="at least one token"):
        E.score(table, [([], [97])], 64)


def test_accuracies_of_questions_are_those_by_hand(table):
    """P(a) = .5, P(bc) = .24, P(c) = .2; per byte ln .5 = -.69, ln .405 / 3 = -.30, ln .24 / 2 = -.71."""
    questions = [{"context": "x=", "choices": ["bc", "a", "c"], "answer": 1},
                 {"context": "x=", "choices": ["a", "aaa"], "answer": 1},
                 {"context": "x=", "choices": ["c", "b"], "answer": 0}]  # fmt: skip
    assert E.answer_questions(table, BYTES, questions) == {
        "acc": pytest.approx(1 / 3),
        "acc_norm": pytest.approx(2 / 3),
    }


def test_a_space_at_the_end_of_a_context_belongs_to_the_continuation():
    assert E.encode_pair(BYTES, "a  ", "b") == ([256, 97], [32, 32, 98])
    assert E.encode_pair(BYTES, "", "b") == ([256], [98])


def bpe() -> tokenizer.Encoding:
    """Bytes, end-of-text, and three merges; encoding takes the longest token that fits."""
    vocab = [bytes([i]) for i in range(256)] + [b"", b" col", b" cold", b"is"]

    def encode(text: bytes) -> np.ndarray:
        ids = []
        while text:
            ids.append(max((i for i, word in enumerate(vocab) if word and text.startswith(word)),
                           key=lambda i: len(vocab[i])))  # fmt: skip
            text = text[len(vocab[ids[-1]]) :]
        return np.array(ids, np.int64)

    return tokenizer.Encoding("toy", vocab, 256, encode)


WORD_PAIRS = {  # (context, continuation) -> (ids before, ids after), where COL is " col", COLD " cold", IS "is"
    ("is", " cold"): ([256, 259], [258]),
    ("is col", "d"): ([256, 259], [258]),  # both as one text have no token after the context's two
    ("is col", "der"): ([256, 259, 258], [101, 114]),
    (" col", "d"): ([256], [258]),
    ("is\n ", "d"): ([256, 259], [10, 32, 100]),
    ("", " cold"): ([256], [258]),
    ("is", ""): ([256, 259], []),
    ("", ""): ([256], []),
}


def test_a_continuation_is_what_both_have_after_the_contexts_tokens():
    for (context, continuation), want in WORD_PAIRS.items():
        assert E.encode_pair(bpe(), context, continuation) == want, (context, continuation)
    net = random_net(vocab_size=260)
    question = {"context": "is col", "choices": ["d", "der"], "answer": 0}
    scores = E.score(net, list(WORD_PAIRS.values()), 64)
    assert scores[1] == scores[0] and scores[6:] == [(0, True)] * 2
    assert E.answer_questions(net, bpe(), [question])["acc"] == (scores[1] > scores[2])


@pytest.mark.parametrize("before, after", ((1, 32), (3, 33), (40, 50), (1, 130)))
def test_a_continuation_longer_than_the_window_is_scored_whole(before, after):
    """The first of its ids counts too: two texts with the same end have different scores."""
    net, rng = random_net(window_size=8), np.random.default_rng(after)  # two layers see 14 tokens back, less than 16
    ids = [256, *rng.integers(0, 256, before + after - 1).tolist()]
    other = ids.copy()
    other[before] ^= 1
    found = [nats for nats, _ in E.score(net, [(text[:before], text[before:]) for text in (ids, other)], 32)]
    want = [log_probs(net, text)[before - 1 :].sum().item() for text in (ids, other)]
    assert found == pytest.approx(want, rel=1e-5) and abs(want[0] - want[1]) > 1e-3


def test_the_harness_keeps_prompts_and_scores_every_pair(capsys):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install -r benchmarks/requirements-harness.txt")
    net, encoding = random_net(vocab_size=260), bpe()
    adapter, longest = E.harness_model(net, encoding), E.context_length(net)
    asked = lambda *pairs: [types.SimpleNamespace(args=pair) for pair in pairs]
    assert adapter.loglikelihood(asked(*WORD_PAIRS)) == E.score(net, list(WORD_PAIRS.values()), longest)
    ids = encoding.encode("is cold" * 5).tolist()
    for most in (1, longest - 1, longest, 10 * longest):
        prompt = torch.tensor([[256, *ids]])
        want = net.generate(prompt, min(most, longest), temperature=0, stop_at=256)[0, len(ids) + 1 :]
        answers = adapter.generate_until(asked(("is cold" * 5, {"max_gen_toks": most})))
        assert answers == [encoding.decode(want)]
        assert (f"note: 1 of 1 answers to {longest} tokens" in capsys.readouterr().err) == (most > longest)
    end = "is cold" * 40
    long, cut = adapter.generate_until(asked(("a" + end, {"max_gen_toks": 5}),
                                             (encoding.decode(encoding.encode(end)[1 - longest :]), {"max_gen_toks": 5})))
    assert long == cut
    assert f"note: 1 of 2 prompts are cut to their last {longest - 1} tokens" in capsys.readouterr().err


def test_scores_do_not_depend_on_the_batch_size(net, monkeypatch):
    rng = np.random.default_rng(5)
    pairs = [
        ([256, *rng.integers(97, 120, n).tolist()], rng.integers(97, 120, m).tolist())
        for n, m in rng.integers(1, 30, (25, 2))
    ]
    many, found = E.score(net, pairs, 64), []
    for size in (1, 100):
        monkeypatch.setattr(E, "BATCH_TOKENS", size)
        found.append(E.score(net, pairs, 64))
    for (a, _), (b, _), (c, _), (before, after) in zip(many, *found, pairs):
        want = log_probs(net, before + after)[-len(after) :].sum().item()
        assert (
            a == pytest.approx(want, rel=1e-4)
            and b == pytest.approx(want, rel=1e-4)
            and c == pytest.approx(want, rel=1e-4)
        )


def test_questions_from_the_command_line(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    words = ["choices", "--checkpoint", run / "checkpoint", "--path", path]
    questions = [{"context": word[:2], "choices": ["#?!", word[2:], "qqqq"], "answer": 1} for word in WORDS]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    assert "5 questions, acc 1.0000, acc_norm 1.0000 (chance 0.3333)" in evaluate_cli(*words).stdout
    good = path.read_text()
    raw = {"context": "a\u2028b\u0085c", "choices": ["d\u2029", "e\x1c"], "answer": 0}
    path.write_text("\ufeff" + good + "\n" + json.dumps(raw, ensure_ascii=False).replace("\\u001c", "\u2028"), encoding="utf-8")
    assert "6 questions" in evaluate_cli(*words).stdout
    assert E.read_questions(path)[-1] == raw | {"choices": ["d\u2029", "e\u2028"]}
    path.write_bytes(b"\xff\xfe" + good.encode("utf-16-le"))
    assert f"{path} cannot be read" in sentence(evaluate_cli(*words, expect=1))
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


@pytest.mark.slow
def test_the_harness_runs_tasks_of_every_kind(run, tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install -r benchmarks/requirements-harness.txt")
    lines = [
        {"question": word[:3], "options": ["@@", word[3:]], "gold": 1, "rest": word[3:]}
        for word in WORDS
        if len(word) > 4
    ]
    (tmp_path / "words.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = 'doc_to_choice: "{{options}}"\nmetric_list: [{metric: acc}]'
    kinds = {
        "words_choice": ("multiple_choice", "gold", choices),
        "words_perplexity": ("loglikelihood_rolling", "question", "metric_list: [{metric: bits_per_byte}]"),
        "words_generate": (
            "generate_until",
            "rest",
            "generation_kwargs: {until: [' '], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]",
        ),
    }
    for name, (kind, target, more) in kinds.items():
        task = TASK.format(name=name, path=tmp_path / "words.json", kind=kind, target=target, more=more)
        (tmp_path / f"{name}.yaml").write_text(task)
    done = python("benchmarks/evaluate.py", "harness", "--checkpoint", run / "checkpoint", "--tasks", *kinds,
                  "--include_path", tmp_path, HF_HOME=str(tmp_path / "hf"),
                  HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # fmt: skip
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("|words_")
    ]
    found = {(row[0], row[4]): float(row[6]) for row in cells}
    assert found["words_choice", "acc"] == 1.0
    assert found["words_generate", "exact_match"] > 0.4
    net = hub.load(run / "checkpoint")
    nats = sum(-log_probs(net, [256, *line["question"].encode()]).sum().item() for line in lines)
    size = sum(len(line["question"]) for line in lines)
    assert found["words_perplexity", "bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=2e-4)


@pytest.mark.slow
def test_a_missing_harness_is_one_sentence(run):
    code = ("import sys; sys.modules['lm_eval'] = None; from benchmarks import evaluate; "
            f"sys.argv[1:] = ['harness', '--checkpoint', {str(run / 'checkpoint')!r}, '--tasks', 'hellaswag']; "
            "evaluate.main()")  # fmt: skip
    assert "pip install -r benchmarks/requirements-harness.txt" in sentence(python("-c", code, expect=1))


def test_a_masked_model_is_refused(tmp_path):
    hub.save(random_net(zoo.Config, objective="masked"), tmp_path / "masked")
    done = evaluate_cli("bpb", "--checkpoint", tmp_path / "masked", "--path", ROOT / "README.md", expect=1)
    assert "objective is masked" in sentence(done)
