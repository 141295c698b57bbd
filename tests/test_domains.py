"""Domains: shares and limits of a mixture against a row-by-row reference, the folders that data.py makes, and what training does with them.

CPU, no network: `pytest tests/test_domains.py`."""

import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import data  # noqa: E402
import logger  # noqa: E402
import model as M  # noqa: E402
import train_adamw  # noqa: E402
import train_muon  # noqa: E402
from checkpoint import load_model_from_run  # noqa: E402
from data import DataError, Loader, Mix, Mixture  # noqa: E402

NAMES = ["a", "b", "c"]


def mixture(rows, batch_rows=4, tokens=None, **mix) -> Mixture:
    return Mixture(Mix(**mix), NAMES[: len(rows)], rows, tokens or rows, batch_rows)


# -----------------------------------------------------------------------------
# Which row comes next


def slow_stream(rows, shares, limits, batch_rows, round_robin_steps, length):
    """Row by row: whole batches of one domain in turn, then always the domain that is furthest behind its due, counted anew every PERIOD rows.
    A domain drops out when its turn comes and it has no row left, or no whole batch; then counting and turns begin anew.
    [(domain, how many of its rows came before)]"""
    count, out, turn = [0] * len(rows), [], 0
    left = lambda n: [d for d in range(len(rows)) if shares[d] > 0 and count[d] + n <= limits[d]]
    alive = left(batch_rows)
    while len(out) < round_robin_steps * batch_rows and alive:
        d, turn = alive[turn % len(alive)], turn + 1
        if d not in left(batch_rows):
            alive, turn = left(batch_rows), 0
            continue
        out += [(d, count[d] + i) for i in range(batch_rows)]
        count[d] += batch_rows
    alive, seen = left(1), [0] * len(rows)
    while len(out) < length and alive:
        due = lambda d: shares[d] / sum(shares[i] for i in alive) * (sum(seen) + 1) - seen[d]
        d = max(alive, key=lambda d: (round(due(d), 9), -d))
        if d not in left(1):
            alive, seen = left(1), [0] * len(rows)
            continue
        out.append((d, count[d]))
        count[d] += 1
        seen[d] += 1
        if sum(seen) == data.PERIOD:
            seen = [0] * len(rows)
    return out[:length]


@pytest.mark.parametrize("rows, weights, epochs, steps", [
    ([100, 100, 100], "a=1,b=1,c=1", "", 0), ([100, 50, 20], "a=5,b=2,c=1", "", 0), ([30, 30, 30], "a=3,b=1,c=1", "a=1", 0),
    ([30, 20, 10], "a=1,b=1,c=1", "2", 7), ([30, 7, 10], "a=2,b=1,c=1", "b=1,c=1.5", 9), ([40, 40, 40], "a=1,c=3", "c=0.5", 5),
    ([9, 9, 9], "a=1,b=1,c=1", "1", 20), ([5000, 10, 10], "a=7,b=2,c=1", "c=30", 3)])  # fmt: skip
def test_a_mixture_equals_one_drawn_row_by_row(rows, weights, epochs, steps):
    mix = mixture(rows, weights=weights, epochs=epochs, round_robin_steps=steps)
    share = data.by_name(weights, NAMES, "")
    most = data.by_name(epochs, NAMES, "")
    limits = [int(most[name] * n) if name in most else math.inf for name, n in zip(NAMES, rows)]
    length = min(9000, sum(limits))
    want = slow_stream(rows, [share.get(name, 0) for name in NAMES], limits, 4, steps, length)
    assert len(want) == length
    for cut in (1, 3, length):  # any pieces, in any order
        got = [mix.place(np.arange(start, min(start + cut, length))) for start in reversed(range(0, length, cut))]
        assert [tuple(map(int, pair)) for domain_N, nth_N in reversed(got) for pair in zip(domain_N, nth_N)] == want
    if math.isfinite(sum(limits)):
        with pytest.raises(DataError, match="allow more, prepare more text, or train for fewer steps"):
            mix.place(np.array([length]))


def test_a_share_that_no_row_would_have_is_refused():
    with pytest.raises(DataError, match="domain b is 1.0e-04 of the mixture.*--domain_weights"):
        mixture([10**6] * 2 + [0], weights="a=9999,b=1")


def test_shares_are_exact_and_evenly_spread():
    domain_N, _ = mixture([10**6] * 3, weights="a=6,b=3,c=1").place(np.arange(20_000))
    for size in (1, 10, 100, 4096, 20_000):
        counts = np.array([np.bincount(domain_N[start : start + size], minlength=3) for start in range(0, 20_000 - size + 1, size)])
        assert np.abs(counts - size * np.array([0.6, 0.3, 0.1])).max() <= 2 + size / data.PERIOD


@pytest.mark.parametrize("temperature, want", [(1.0, [8, 4, 1]), (2.0, [8**0.5, 2, 1]), (1e9, [1, 1, 1]), (0.5, [64, 16, 1])])
def test_temperature_flattens_shares(temperature, want):
    mix = mixture([80, 40, 10], temperature=temperature)
    assert mix.share_D == pytest.approx(np.array(want) / sum(want))


@pytest.mark.parametrize("flags, words", [
    (dict(weights="d=1"), "no domain 'd'; choose among a, b, c"), (dict(weights="a=x"), "'a=x' is not a number"), (dict(weights="a=0"), "all are 0"),
    (dict(epochs="-1"), "not a number at least 0"), (dict(temperature=0.0), "above 0")])  # fmt: skip
def test_a_mix_that_is_none_is_one_sentence(flags, words):
    with pytest.raises(DataError, match=words):
        mixture([10, 10, 10], **flags)


# -----------------------------------------------------------------------------
# The loader


def write_domain(folder: Path, first_id: int, tokens: int, val: int = 40):
    """Ids of a domain are its own, and count up."""
    folder.mkdir(parents=True)
    for split, n in (("train", tokens), ("val", val)):
        data.write_shard(folder / f"x_{split}_000001.bin", first_id + np.arange(n) % 80)
    facts = {"encoding": "bytes", "vocab_size": 257, "eot_token": 256, "token_bytes": [1] * 256 + [0]}
    data.write_meta(folder, {"source": "test", "request": {}, "splits": {}, "shards": None, **facts})


@pytest.fixture
def three(tmp_path) -> Path:
    for i, (name, tokens) in enumerate(zip(NAMES, (401, 241, 81))):
        write_domain(tmp_path / "mixed" / name, 80 * i, tokens)
    return tmp_path / "mixed"


def rows_of(batches) -> list:
    return [(int(d), tuple(ids)) for batch in batches for d, ids in zip(batch.domain_B, batch.inputs_BT.tolist())]


def test_rows_are_those_of_their_domains_and_every_epoch_sees_each_once(three):
    loader = Loader(three, seq_len=8, batch_rows=6, micro_rows=3, seed=5, mix=Mix(weights="a=1,b=1,c=1"))
    assert loader.rows == [50, 30, 10]
    seen = rows_of(batch for _ in range(50) for batch in loader.next_step())
    loader.close()
    for d, rows in enumerate(loader.rows):
        own = [ids for domain, ids in seen if domain == d]
        assert len(own) in (99, 100, 101) and all(80 * d <= i < 80 * (d + 1) for ids in own for i in ids)
        epochs = [own[start : start + rows] for start in range(0, len(own) - rows + 1, rows)]
        assert all(len(set(epoch)) == min(rows, 10) for epoch in epochs), "ids repeat after 10 rows"
        assert len(set(map(tuple, epochs))) == len(epochs), "in another order each time"


@pytest.mark.parametrize("mix", [Mix(), Mix(weights="a=2,b=1,c=1", epochs="c=4", round_robin_steps=3), Mix(temperature=5.0)])
def test_any_ranks_and_any_restart_see_the_same(three, mix):
    make = lambda **changes: Loader(three, **dict(seq_len=8, batch_rows=12, micro_rows=6, seed=1, mix=mix) | changes)
    one = make()
    steps = [rows_of(one.next_step()) for _ in range(9)]
    for world_size, micro_rows in ((1, 12), (2, 3), (3, 4), (4, 1)):
        ranks = [make(rank=rank, world_size=world_size, micro_rows=micro_rows) for rank in range(world_size)]
        for want in steps:
            parts = sorted((batch for rank in ranks for batch in rank.next_step()), key=lambda batch: batch.first_row)
            assert rows_of(parts) == want
        for rank in ranks:
            rank.close()
    again = make()
    again.load_state_dict(json.loads(json.dumps(one.state_dict() | {"position": 5 * 12})))
    assert [rows_of(again.next_step()) for _ in range(4)] == steps[5:]
    for loader in (one, again):
        loader.close()


def test_round_robin_batches_have_one_domain_each_in_turn(three):
    loader = Loader(three, seq_len=8, batch_rows=4, micro_rows=2, mix=Mix(round_robin_steps=7))
    domains = [{int(d) for batch in loader.next_step() for d in batch.domain_B} for _ in range(12)]
    loader.close()
    assert domains[:7] == [{0}, {1}, {2}, {0}, {1}, {2}, {0}] and max(map(len, domains[7:])) > 1


def test_a_run_that_is_longer_than_its_epochs_is_refused_before_it_starts(three):
    make = lambda steps: Loader(three, seq_len=8, batch_rows=6, micro_rows=6, mix=Mix(epochs="1"), steps=steps)
    make(15).close()
    with pytest.raises(DataError, match="all domains have reached their --domain_epochs after 90 rows"):
        make(16)


def test_validation_goes_through_the_domains(three):
    batches = list(data.validation_batches(three, seq_len=8, rows=2, max_tokens=3 * 32))
    assert [int(batch.domain_B[0]) for batch in batches] == [0, 0, 1, 1, 2, 2] and [batch.first_row for batch in batches] == [0, 2] * 3
    assert all(80 * d <= i < 80 * (d + 1) for d, ids in rows_of(batches) for i in ids)
    with pytest.raises(DataError, match="for each of 3 domains"):
        data.validation_batches(three, seq_len=8, rows=2, max_tokens=20)


def test_a_mixture_is_checked_like_a_folder(three, tmp_path):
    assert list(data.fingerprint(three))[:2] == ["a/x_train_000001.bin", "a/x_val_000001.bin"] and len(data.fingerprint(three)) == 6
    meta = json.loads((three / "b" / "meta.json").read_text()) | {"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}
    del meta["sha256"]
    data.write_meta(three / "b", meta)
    with pytest.raises(DataError, match="domain b has encoding gpt2, a has bytes"):
        data.load_meta(three)
    with pytest.raises(DataError, match="holds no token shards"):
        data.load_meta(tmp_path / "nothing")


# -----------------------------------------------------------------------------
# data.py --source domains


def texts(folder: Path, name: str, count: int = 120) -> Path:
    path = folder / f"{name}.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{name} number {i} says {i * i}" for i in range(count)))
    return path


def make(tmp_path, *words, out="out") -> Path:
    data.main(["--source", "domains", "--encoding", "bytes", "--out", str(tmp_path / out), *map(str, words)])
    return tmp_path / out


def documents(folder, split="train") -> list[str]:
    ids = np.concatenate([tokens for _, tokens in data.open_split(folder, split)])
    return bytes(np.where(ids == 256, 0, ids).astype(np.uint8)).decode().strip("\0").split("\0")


def test_local_domains(tmp_path, capsys):
    paths = [f"{name}={texts(tmp_path, name)}" for name in ("birds", "stars")]
    out = make(tmp_path, "--path", *paths, f"birds={texts(tmp_path, 'finches')}")
    meta = data.load_meta(out)
    assert list(data.domains(out)) == list(meta["domains"]) == ["birds", "stars"] and meta["encoding"] == "bytes"
    birds = documents(out / "birds") + documents(out / "birds", "val")
    assert len(birds) == 240 and {text.split()[0] for text in birds} == {"birds", "finches"}
    assert meta["splits"]["train"]["documents"] == sum(meta["domains"][name]["splits"]["train"]["documents"] for name in meta["domains"])
    assert "is ready" in (make(tmp_path, "--path", *paths, f"birds={tmp_path / 'finches.txt'}"), capsys.readouterr().out)[1]


def test_a_cut_off_mixture_goes_on_with_what_is_finished(tmp_path, monkeypatch):
    paths = [f"{name}={texts(tmp_path, name)}" for name in ("birds", "stars")]
    tokenise, made = data.tokenise, []

    def failing(source, args, folder):
        made.append(args.source)
        if args.source == "stars" and made.count("stars") == 1:
            raise DataError("cut off")
        return tokenise(source, args, folder)

    monkeypatch.setattr(data, "tokenise", failing)
    with pytest.raises(SystemExit):
        make(tmp_path, "--path", *paths)
    assert not (tmp_path / "out").exists()
    make(tmp_path, "--path", *paths)
    assert made == ["birds", "stars", "stars"] and list(data.domains(tmp_path / "out")) == ["birds", "stars"]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["birds", "meta.json", "stars"]


def test_source_tag_is_in_front_of_every_document_and_moves_none(tmp_path):
    path = f"birds={texts(tmp_path, 'birds')}"
    plain, tagged = make(tmp_path, "--path", path, out="plain"), make(tmp_path, "--path", path, "--source_tag", out="tagged")
    for split in ("train", "val"):
        assert ["birds\n" + text for text in documents(plain / "birds", split)] == documents(tagged / "birds", split)


def test_the_hub_is_asked_for_what_the_table_says(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split, streaming):
        asked.append((name, subset, split, streaming))
        fields = [part.fields for parts in data.DOMAINS.values() for part in parts if part.dataset == name][0]
        return ({field: f"{name} {field} {i}" if i % 3 else "" for field in fields} for i in itertools.count())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = make(tmp_path, "--domains", "math", "chat", "--max_tokens", 4000)
    assert list(data.domains(out)) == ["math", "chat"]
    assert [ask[:2] for ask in asked] == [("openai/gsm8k", "main"), ("databricks/databricks-dolly-15k", None)] and all(ask[3] for ask in asked)
    first = documents(out / "math")[0]
    assert first.splitlines() == ["openai/gsm8k question 1", "openai/gsm8k answer 1"], "empty rows are left out"
    assert sum(len(tokens) for split in ("train", "val") for _, tokens in data.open_split(out / "math", split)) == 4000
    assert data.load_meta(out)["domains"]["math"]["datasets"] == ["openai/gsm8k", "open-web-math/open-web-math"]


def test_the_six_domains():
    assert list(data.DOMAINS) == ["math", "python", "web", "science", "legal", "chat"] and 5e6 <= data.DOMAIN_TOKENS <= 50e6
    assert data.parse(["--source", "domains"]).path is None


@pytest.mark.parametrize("words, sentence", [
    (["--path", "notes.txt"], "it is name=FILE"), (["--path", "a b=notes.txt"], "it is name=FILE"), (["--domains", "cooking"], "choose among math"),
    (["--path", "notes=gone.txt"], "gone.txt is not a file"), (["--path", "notes=gone.txt", "--domains", "code"], "choose among notes")])  # fmt: skip
def test_mistakes_are_one_sentence(words, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        make(tmp_path, *words)
    err = capsys.readouterr().err.strip()
    assert status.value.code == 1 and sentence in err and err.count("\n") == 0


# -----------------------------------------------------------------------------
# The model: budget, tied table, supervised routes


def test_the_100m_budget():
    """A trunk of 50M and 5 experts of 10M, within 1%, by the model card."""
    card = M.model_card(M.PRESETS["100m"], 1024)
    outside, each = (int(word.replace(",", "")) for word in card.split("active per token; ")[1].replace(" outside experts,", "").split()[:2])
    assert outside == pytest.approx(50e6, rel=0.01) and each == pytest.approx(10e6, rel=0.01)
    assert M.PRESETS["100m"].num_experts == M.PRESETS["100m-cpu"].num_experts == 5
    for preset in ("100m", "100m-cpu"):
        assert preset in train_muon.PRESETS and preset in train_adamw.PRESETS
        hidden = M.PRESETS[preset].hidden_size, M.PRESETS[preset].shared_width
        assert all(width % 8 == 0 for width in hidden)


SMALL = dict(vocab_size=257, eot_token=256, n_layer=2, n_embd=32, n_head=2, head_dim=16, num_experts=4, top_k=1, norm_topk_prob=0.0, mlp_ratio=1.0,
             value_embeds=0, window_size=64, dtype="fp32", router_noise=0.0)  # fmt: skip


def test_a_tied_table_is_the_head():
    config = M.Config(**SMALL | dict(tie_embeddings=True))
    net, apart = M.GPT(config), M.GPT(M.Config(**SMALL))
    assert net.parameter_kinds()["embed"] == "embed" and "head" not in net.parameter_kinds()
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        apart.load_state_dict({name: net.state_dict()[name] for name in apart.state_dict()})
    assert torch.equal(net.eval()(ids).logits, apart.eval()(ids).logits)
    tied, two = (torch.autograd.grad(model(ids, ids).loss, [model.embed] + [model.head] * (model is apart)) for model in (net, apart))
    assert torch.allclose(tied[0], two[0] + two[1], atol=1e-6)
    whole, half = M.count_parameters(M.Config(**SMALL)), M.count_parameters(config)
    assert whole["total"] - half["total"] == whole["head"] and half["active"] == whole["active"] - 32
    assert M.flops_per_token(config, 64) == M.flops_per_token(M.Config(**SMALL), 64)


def test_shared_dim_is_the_width_of_what_all_tokens_meet():
    config = M.Config(**SMALL | dict(num_shared_experts=1, shared_dim=48))
    ffn = M.GPT(config).blocks[0].ffn
    assert ffn.shared.up.shape == (48, 32) and ffn.experts.up.shape == (4, 32, 32), "routed experts keep mlp_ratio for themselves"
    dense = M.GPT(M.Config(**SMALL | dict(num_shared_experts=1, shared_dim=48, pattern="D"))).blocks[0].ffn
    assert dense.up.shape == (80, 32), "the dense twin has what a token meets"
    for changes in (dict(shared_dim=12, num_shared_experts=1), dict(shared_dim=48)):
        with pytest.raises(M.ConfigError, match="shared_dim"):
            M.Config(**SMALL | changes)


@pytest.mark.parametrize("changes", [{}, dict(router_score="sigmoid"), dict(depth="loop", halt="act"), dict(num_meta_tokens=2)], ids=str)
def test_domain_loss_is_the_cross_entropy_of_the_router(changes):
    net = M.GPT(M.Config(**SMALL | changes)).train()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    routes = []
    for block in net.blocks:
        block.ffn.router.register_forward_hook(lambda module, args, route: routes.append(route))
    ids, expert_B = torch.randint(0, 256, (3, 10)), torch.tensor([2, -1, 0])
    got = net(ids, ids, expert_B=expert_B).stats["domain_loss"]
    if "depth" not in changes:
        wanted = expert_B[:, None].expand(3, 10 + net.config.num_meta_tokens).flatten()
        prob = [route.logits_TE.softmax(-1) if route.prob_TE is None else route.prob_TE for route in routes]
        nats = [-(p[wanted >= 0].gather(1, wanted[wanted >= 0, None]).log()).sum() / len(wanted) for p in prob]
        assert got.item() == pytest.approx((sum(nats) / len(nats)).item(), rel=1e-5)
    grads = torch.autograd.grad(got, [block.ffn.router.gate for block in net.blocks])
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert net(ids, ids).stats["domain_loss"] == 0 and net(ids, ids, expert_B=torch.full((3,), -1)).stats["domain_loss"] == 0


def test_rows_that_fill_up_are_not_counted(monkeypatch):
    net = M.GPT(M.Config(**SMALL)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
    ids, mm = torch.randint(0, 256, (3, 10)), M.mm_expert_by_expert

    def with_what_memory_held(rows_RK, weight_ENK, offs_E):
        out_RN = mm(rows_RK, weight_ENK, offs_E)
        out_RN[offs_E[-1] :] = math.nan  # rows without an expert are never written
        return out_RN

    monkeypatch.setattr(M, "mm_expert_by_expert", with_what_memory_held)
    with torch.no_grad():
        whole, alone = net(ids, ids, real_B=torch.tensor([True, False, True])), net(ids[::2], ids[::2])
    assert torch.equal(whole.stats["counts_LE"], alone.stats["counts_LE"])
    assert torch.allclose(whole.stats["entropy"], alone.stats["entropy"])


def test_rows_that_do_not_count_stay_where_experts_are_shared_by_ranks(tmp_path):
    """They have no expert, so no row of theirs travels. A group of one rank, whose experts are the whole layer's."""
    net, ids = M.GPT(M.Config(**SMALL)).eval(), torch.randint(0, 256, (2, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for real in ([True, False], [False, False], [True, True]):
            found = []
            for carry in (M.stay, functools.partial(M.exchanged, None)):
                for block in net.blocks:
                    block.ffn.carry = carry
                with torch.no_grad():
                    found.append(net(ids, ids, real_B=torch.tensor(real)))
            assert torch.equal(found[0].loss, found[1].loss) and torch.equal(found[0].stats["counts_LE"], found[1].stats["counts_LE"])
    finally:
        torch.distributed.destroy_process_group()


def test_information_of_known_matrices():
    own, even = torch.eye(4, dtype=torch.float64)[:, None], torch.full((4, 1, 4), 0.25, dtype=torch.float64)
    half = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])[:, None]
    assert [train_muon.domain_information(x).item() for x in (own, even, half)] == [2, 0, 1]


def test_the_price_is_whole_at_first_and_falls_to_nothing():
    hp = train_muon.Hyperparameters(domain_coef=0.5, domain_steps=10, domain_anneal_steps=4)
    assert [train_muon.domain_price(step, hp) for step in (0, 9)] == [0.5, 0.5]
    assert [train_muon.domain_price(step, hp) for step in range(10, 16)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])
    assert train_muon.domain_price(10, train_muon.Hyperparameters(domain_coef=0.5, domain_steps=10)) == 0


# -----------------------------------------------------------------------------
# Training


STRIDES = {"ones": 1, "twos": 2, "fives": 5, "web": 7}


def walk(generator, stride: int, length: int) -> str:
    """Letters that go on by a stride, but for one in ten: domains share all letters and differ in what comes after what."""
    steps = np.where(generator.random(length) < 0.1, generator.integers(0, 12, length), stride)
    return "".join("abcdefghijkl"[i] for i in np.cumsum(steps) % 12)


def run(*flags, check=True):
    done = subprocess.run([sys.executable, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


TRAIN = """--preset 100m-cpu --device cpu --n_layer 2 --n_embd 32 --n_head 2 --head_dim 16 --mlp_ratio 1 --shared_dim 32 --seq_len 64
           --batch_tokens 512 --micro_batch_tokens 256 --window_size 64 --val_tokens 1024 --sample_tokens 0 --router_noise 0 --muon_lr 0.02""".split()


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("walks"), np.random.default_rng(0)
    for name, stride in STRIDES.items():
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(walk(generator, stride, 80) for _ in range(300)))
    make(folder, "--path", *(f"{path.stem}={path}" for path in sorted(folder.glob("*.txt"))), out="shards")
    return folder / "shards"


def trained(shards, out_dir, name, steps, *flags) -> list[dict]:
    run("train_muon.py", *TRAIN, "--data", shards, "--out_dir", out_dir, "--experiment_name", name, "--num_iterations", steps, "--val_every", 40,
        *flags)  # fmt: skip
    return [row for row in logger.read_run(out_dir / name)["rows"] if "val/loss" in row]


ROUND_ROBIN = ["--round_robin_steps", 40, "--router_lr", 0.05]


def test_a_warm_start_gives_each_domain_its_expert(walks, tmp_path):
    rows = trained(walks, tmp_path, "supervised", 80, *ROUND_ROBIN, "--domain_coef", 2, "--domain_steps", 40, "--domain_anneal_steps", 10)
    assert {f"val/{name}/bpb" for name in STRIDES} <= rows[-1].keys()
    load = np.array(rows[1]["moe/domain_load"])  # domains x layers x experts, after the round robin
    assert load.shape == (4, 2, 5) and np.allclose(load.sum(-1), 1)
    own = [list(data.domains(walks)).index(name) for name in ("fives", "ones", "twos")]
    assert all(load[d, :, i].min() > 0.7 for i, d in enumerate(own)), "experts in the order of the domains, the trunk's left out"
    assert rows[1]["moe/domain_information"] > 0.8 and rows[2]["moe/domain_information"] > 0.3, "and it stays when nobody asks any more"


def test_balance_within_batches_of_one_domain_forbids_experts_of_domains(walks, tmp_path):
    """The negative control: a loss that wants all experts used evenly in each batch, which has one domain."""
    rows = trained(walks, tmp_path, "naive", 40, *ROUND_ROBIN, "--domain_coef", 0, "--balance_coef", 0, "--importance_coef", 1)
    assert rows[1]["moe/domain_information"] < 0.2 and np.array(rows[1]["moe/domain_load"]).max() < 0.9


def test_two_ranks_see_what_one_sees(walks, tmp_path):
    flags = [*TRAIN, "--data", walks, "--out_dir", tmp_path, "--num_iterations", 6, "--round_robin_steps", 3, "--domain_coef", 1, "--domain_steps", 3,
             "--domain_weights", "web=1,ones=2,twos=1", "--dtype", "fp32"]  # fmt: skip
    run("train_muon.py", *flags, "--experiment_name", "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_muon.py", *flags, "--experiment_name", "two")
    one, two = (logger.read_run(tmp_path / name)["rows"] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in (key for key in a if key.startswith(("train/loss", "train/domain", "val/", "moe/domain"))):
            assert np.allclose(a[key], b[key], atol=2e-2), key
    assert sum("train/domain_loss" in row for row in one) == 6


def test_pictures_of_domains(walks, tmp_path):
    trained(walks, tmp_path, "muon", 4, "--val_every", 2)
    done = run("logger.py", "--out_dir", tmp_path)
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert {"muon_domains", "domain_loss"} <= names, done.stdout


def test_expert_of_a_domain_needs_an_expert(walks, tmp_path):
    flags = ["train_muon.py", *TRAIN, "--data", walks, "--out_dir", tmp_path, "--domain_coef", 0.5]
    for more, words in ((["--num_experts", 2], "at most 2 domains"), (["--router", "hash"], "a learned router"),
                        (["--pattern", "D"], "a learned router")):  # fmt: skip
        done = run(*flags, *more, check=False)
        assert done.returncode != 0 and done.stderr.count("\n") == 1 and words.split()[-1] in done.stderr, done.stderr


# -----------------------------------------------------------------------------
# A tag on clean and noise


def facts(generator, count: int, known: dict | None) -> list[str]:
    """Documents of three facts `ab3 `: of a table, or each time another."""
    keys = [f"{a}{b}" for a in "abcd" for b in "abcd"]
    value = lambda key: generator.integers(10) if known is None else known[key]
    return ["".join(f"{key}{value(key)} " for key in generator.choice(keys, 3)) for _ in range(count)]


def loss_of_text(model, texts: list[str], tag: str) -> float:
    """Bits per byte of the texts, without what comes before them."""
    ids = torch.tensor([[256, *tag.encode(), *text.encode()] for text in texts])
    logits = model(ids[:, :-1]).logits[:, len(tag) :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 + len(tag) :].flatten()).item() / math.log(2)


def test_a_source_tag_lowers_the_loss_of_the_clean_part(tmp_path):
    """One part in three is facts that can be learnt, the rest contradicts them; who is told which is which learns and believes them."""
    generator = np.random.default_rng(0)
    known = {f"{a}{b}": generator.integers(10) for a in "abcd" for b in "abcd"}
    for name, count, table in (("clean", 1000, known), ("noise", 2000, None)):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(facts(generator, count, table)))
    paths, losses = [f"{name}={tmp_path / f'{name}.txt'}" for name in ("clean", "noise")], {}
    held_out = [text for text in facts(generator, 200, known) if len(text) == 12]
    for name, words in (("plain", []), ("tagged", ["--source_tag"])):
        make(tmp_path, "--path", *paths, *words, out=name)
        run("train_muon.py", *TRAIN, "--data", tmp_path / name, "--out_dir", tmp_path / "logs", "--experiment_name", name, "--num_iterations", 150,
            "--batch_tokens", 1024, "--micro_batch_tokens", 1024, "--val_every", 0, "--round_robin_steps", 0, "--domain_coef", 0)  # fmt: skip
        model, _ = load_model_from_run(tmp_path / "logs" / name / "checkpoint")
        with torch.no_grad():
            losses[name] = loss_of_text(model, held_out, "clean\n" if words else "")
    assert losses["tagged"] < losses["plain"] - 0.1, losses
