"""Domains: supervised routes, and what training does with a mixture.

CPU, no network: `pytest tests/zoo/test_domains.py`."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from test_train import WORDS, hyper, observe, refused, same, train, write_data  # noqa: E402

import data  # noqa: E402
import logger  # noqa: E402
import model  # noqa: E402
import ops  # noqa: E402
import tokenizer  # noqa: E402
import zoo  # noqa: E402
from checkpoint import load_model_from_run  # noqa: E402
from cli import UserError  # noqa: E402
from tools import cost, prepare  # noqa: E402
from zoo import domains  # noqa: E402
from zoo.recipes import RECIPES, ZOO_MUON, MuonZooConfig  # noqa: E402

# -----------------------------------------------------------------------------
# data.py --source domains


def texts(folder: Path, name: str, count: int = 120) -> Path:
    path = folder / f"{name}.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{name} number {i} says {i * i}" for i in range(count)))
    return path


def make(tmp_path, *words, out="out") -> Path:
    prepare.main(["--source", "domains", "--encoding", "bytes", "--out", str(tmp_path / out), *map(str, words)])
    return tmp_path / out


# -----------------------------------------------------------------------------
# The model: budget, tied table, supervised routes


def test_the_100m_budget():
    """A trunk of 50M and 5 experts of 10M, within 1%, by the model card."""
    card = cost.model_card(zoo.PRESETS["100m"], 1024)
    outside, each = (
        int(word.replace(",", ""))
        for word in card.split("active per token; ")[1].replace(" outside experts,", "").split()[:2]
    )
    assert outside == pytest.approx(50e6, rel=0.01) and each == pytest.approx(10e6, rel=0.01)
    assert zoo.PRESETS["100m"].num_experts == zoo.PRESETS["100m-cpu"].num_experts == 5
    for preset in ("100m", "100m-cpu"):
        assert all(preset in recipe.presets for recipe in RECIPES.values())
        hidden = zoo.PRESETS[preset].hidden_size, zoo.PRESETS[preset].shared_width
        assert all(width % 8 == 0 for width in hidden)


SMALL = dict(
    vocab_size=257,
    eot_token=256,
    n_layer=2,
    n_embd=32,
    n_head=2,
    head_dim=16,
    num_experts=4,
    top_k=1,
    norm_topk_prob=0.0,
    mlp_ratio=1.0,
    value_embeds=0,
    window_size=64,
    dtype="fp32",
    router_noise=0.0,
)


def test_a_tied_table_is_the_head():
    config = zoo.Config(**SMALL | dict(tie_embeddings=True))
    net, apart = zoo.build(config), zoo.build(zoo.Config(**SMALL))
    assert net.parameter_kinds()["embed"] == "embed" and "head" not in net.parameter_kinds()
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        apart.load_state_dict({name: net.state_dict()[name] for name in apart.state_dict()})
    assert torch.equal(net.eval()(ids).logits, apart.eval()(ids).logits)
    tied, two = (
        torch.autograd.grad(gpt(ids, ids).loss, [gpt.embed] + [gpt.head] * (gpt is apart)) for gpt in (net, apart)
    )
    assert torch.allclose(tied[0], two[0] + two[1], atol=1e-6)
    whole, half = model.count_parameters(zoo.Config(**SMALL)), model.count_parameters(config)
    mix = config.n_layer * config.n_embd  # of layers, which counts with the head
    assert whole["total"] - half["total"] == whole["head"] - mix and half["head"] == mix
    assert half["active"] == whole["active"] - 32
    assert model.flops_per_token(config, 64) == model.flops_per_token(zoo.Config(**SMALL), 64)


def test_shared_dim_is_the_width_of_what_all_tokens_meet():
    config = zoo.Config(**SMALL | dict(num_shared_experts=1, shared_dim=48))
    ffn = zoo.build(config).blocks[0].ffn
    assert ffn.shared.up.shape == (48, 32) and ffn.experts.up.shape == (4, 32, 32), (
        "routed experts keep mlp_ratio for themselves"
    )
    dense = zoo.build(zoo.Config(**SMALL | dict(num_shared_experts=1, shared_dim=48, pattern="D"))).blocks[0].ffn
    assert dense.up.shape == (80, 32), "the dense twin has what a token meets"
    for changes in (dict(shared_dim=12, num_shared_experts=1), dict(shared_dim=48)):
        with pytest.raises(UserError, match="shared_dim"):
            zoo.Config(**SMALL | changes)


@pytest.mark.parametrize(
    "changes", [{}, dict(router_score="sigmoid"), dict(depth="loop", halt="act"), dict(num_meta_tokens=2)], ids=str
)
def test_domain_loss_is_the_cross_entropy_of_the_router(changes):
    net = zoo.build(zoo.Config(**SMALL | changes)).train()
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
    assert (
        net(ids, ids).stats["domain_loss"] == 0
        and net(ids, ids, expert_B=torch.full((3,), -1)).stats["domain_loss"] == 0
    )


def test_rows_that_fill_up_are_not_counted(monkeypatch):
    net = zoo.build(zoo.Config(**SMALL)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
    ids, mm = torch.randint(0, 256, (3, 10)), ops.mm_expert_by_expert

    def with_what_memory_held(rows_RK, weight_ENK, offs_E):
        out_RN = mm(rows_RK, weight_ENK, offs_E)
        out_RN[offs_E[-1] :] = math.nan  # rows without an expert are never written
        return out_RN

    monkeypatch.setattr(ops, "mm_expert_by_expert", with_what_memory_held)
    with torch.no_grad():
        whole, alone = net(ids, ids, real_B=torch.tensor([True, False, True])), net(ids[::2], ids[::2])
    assert torch.equal(whole.stats["counts_LE"], alone.stats["counts_LE"])
    assert torch.allclose(whole.stats["entropy"], alone.stats["entropy"])


def test_rows_that_do_not_count_stay_where_experts_are_shared_by_ranks(tmp_path):
    """They have no expert, so no row of theirs travels. A group of one rank, whose experts are the whole layer's."""
    net, ids = zoo.build(zoo.Config(**SMALL)).eval(), torch.randint(0, 256, (2, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for real in ([True, False], [False, False], [True, True]):
            found = []
            for ranks in (model.ALL_HERE, model.ExpertRanks(size=2)):  # of a size above 1, so that rows are exchanged
                for block in net.blocks:
                    block.ffn.ranks = ranks
                with torch.no_grad():
                    found.append(net(ids, ids, real_B=torch.tensor(real)))
            assert torch.equal(found[0].loss, found[1].loss) and torch.equal(
                found[0].stats["counts_LE"], found[1].stats["counts_LE"]
            )
    finally:
        torch.distributed.destroy_process_group()


def test_information_of_known_matrices():
    own, even = torch.eye(4, dtype=torch.float64)[:, None], torch.full((4, 1, 4), 0.25, dtype=torch.float64)
    half = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])[:, None]
    assert [domains.domain_information(x).item() for x in (own, even, half)] == [2, 0, 1]
    unused = domains.domain_load(torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]]]))
    assert unused.tolist() == [[[0.75, 0.25]], [[0.0, 0.0]]] and domains.domain_information(unused).isfinite().all()


def test_the_price_is_whole_at_first_and_falls_to_nothing():
    hp = MuonZooConfig(domain_coef=0.5, domain_steps=10, domain_anneal_steps=4)
    assert [domains.domain_price(step, hp) for step in (0, 9)] == [0.5, 0.5]
    assert [domains.domain_price(step, hp) for step in range(10, 16)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])
    assert domains.domain_price(10, MuonZooConfig(domain_coef=0.5, domain_steps=10)) == 0


# -----------------------------------------------------------------------------
# Training


STRIDES = {"ones": 1, "twos": 2, "fives": 5, "web": 7}


def walk(generator, stride: int, length: int) -> str:
    """Letters that go on by a stride, but for one in ten: domains share all letters and differ in what comes after
    what."""
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
    run(
        "train_zoo.py",
        *TRAIN,
        "--data",
        shards,
        "--out_dir",
        out_dir,
        "--experiment_name",
        name,
        "--num_iterations",
        steps,
        "--val_every",
        40,
        *flags,
    )
    return [row for row in logger.read_run(out_dir / name)["rows"] if "val/loss" in row]


ROUND_ROBIN = ["--round_robin_steps", 40, "--router_lr", 0.05]


@pytest.mark.slow
def test_a_warm_start_gives_each_domain_its_expert(walks, tmp_path):
    rows = trained(
        walks,
        tmp_path,
        "supervised",
        80,
        *ROUND_ROBIN,
        "--domain_coef",
        2,
        "--domain_steps",
        40,
        "--domain_anneal_steps",
        10,
    )
    assert {f"val/{name}/bpb" for name in STRIDES} <= rows[-1].keys()
    load = np.array(rows[1]["moe/domain_load"])  # domains x layers x experts, after the round robin
    assert load.shape == (4, 2, 5) and np.allclose(load.sum(-1), 1)
    own = [list(domains.domains(walks)).index(name) for name in ("fives", "ones", "twos")]
    assert all(load[d, :, i].min() > 0.7 for i, d in enumerate(own)), (
        "experts in the order of the domains, the trunk's left out"
    )
    assert rows[1]["moe/domain_information"] > 0.8 and rows[2]["moe/domain_information"] > 0.3, (
        "and it stays when nobody asks any more"
    )


@pytest.mark.slow
def test_balance_within_batches_of_one_domain_forbids_experts_of_domains(walks, tmp_path):
    """The negative control: a loss that wants all experts used evenly in each batch, which has one domain."""
    rows = trained(
        walks, tmp_path, "naive", 40, *ROUND_ROBIN, "--domain_coef", 0, "--balance_coef", 0, "--importance_coef", 1
    )
    assert rows[1]["moe/domain_information"] < 0.2 and np.array(rows[1]["moe/domain_load"]).max() < 0.9


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(walks, tmp_path):
    flags = [
        *TRAIN,
        "--data",
        walks,
        "--out_dir",
        tmp_path,
        "--num_iterations",
        6,
        "--round_robin_steps",
        3,
        "--domain_coef",
        1,
        "--domain_steps",
        3,
        "--domain_weights",
        "web=1,ones=2,twos=1",
        "--dtype",
        "fp32",
    ]
    run("train_zoo.py", *flags, "--experiment_name", "one")
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train_zoo.py",
        *flags,
        "--experiment_name",
        "two",
    )
    one, two = (logger.read_run(tmp_path / name)["rows"] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in (key for key in a if key.startswith(("train/loss", "train/domain", "val/", "moe/domain"))):
            assert np.allclose(a[key], b[key], atol=2e-2), key
    assert sum("train/domain_loss" in row for row in one) == 6


@pytest.mark.slow
def test_pictures_of_domains(walks, tmp_path):
    trained(walks, tmp_path, "muon", 4, "--val_every", 2)
    done = run("logger.py", "--out_dir", tmp_path)
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert {"muon_domains", "domain_loss"} <= names, done.stdout


@pytest.mark.slow
def test_expert_of_a_domain_needs_an_expert(walks, tmp_path):
    flags = ["train_zoo.py", *TRAIN, "--data", walks, "--out_dir", tmp_path, "--domain_coef", 0.5]
    for more, words in (
        (["--num_experts", 2], "at most 2 domains"),
        (["--router", "hash"], "a learned router"),
        (["--pattern", "D"], "a learned router"),
    ):
        done = run(*flags, *more, check=False)
        *notes, sentence = done.stderr.splitlines()
        assert done.returncode != 0 and words.split()[-1] in sentence and len(notes) <= 1, done.stderr


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
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 + len(tag) :].flatten()).item() / math.log(
        2
    )


@pytest.mark.slow
def test_a_source_tag_lowers_the_loss_of_the_clean_part(tmp_path):
    """One part in three is facts that can be learnt, the rest contradicts them; who is told which is which learns and
    believes them."""
    generator = np.random.default_rng(0)
    known = {f"{a}{b}": generator.integers(10) for a in "abcd" for b in "abcd"}
    for name, count, table in (("clean", 1000, known), ("noise", 2000, None)):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(facts(generator, count, table)))
    paths, losses = [f"{name}={tmp_path / f'{name}.txt'}" for name in ("clean", "noise")], {}
    held_out = [text for text in facts(generator, 200, known) if len(text) == 12]
    for name, words in (("plain", []), ("tagged", ["--source_tag"])):
        make(tmp_path, "--path", *paths, *words, out=name)
        run(
            "train_zoo.py",
            *TRAIN,
            "--data",
            tmp_path / name,
            "--out_dir",
            tmp_path / "logs",
            "--experiment_name",
            name,
            "--num_iterations",
            150,
            "--batch_tokens",
            1024,
            "--micro_batch_tokens",
            1024,
            "--val_every",
            0,
            "--round_robin_steps",
            0,
            "--domain_coef",
            0,
        )
        model, _ = load_model_from_run(tmp_path / "logs" / name / "checkpoint")
        with torch.no_grad():
            losses[name] = loss_of_text(model, held_out, "clean\n" if words else "")
    assert losses["tagged"] < losses["plain"] - 0.1, losses


# -----------------------------------------------------------------------------
# Flags and texts


DOMAIN_FIELDS = {  # field -> (another legal value, the settings under which it acts)
    "domain_weights": ("greek=3,birds=1", {}),
    "domain_temperature": (5.0, {"domain_weights": "greek=9,birds=1"}),
    "domain_epochs": ("birds=0.01", {}),
    "round_robin_steps": (2, {}),
    "domain_coef": (0.5, {"domain_steps": 2}),
    "domain_steps": (2, {"domain_coef": 0.5}),
    "domain_anneal_steps": (5, {"domain_steps": 1, "domain_coef": 0.5}),
    "trunk_domain": ("greek", {"domain_steps": 2, "domain_coef": 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("field", DOMAIN_FIELDS)
def test_no_option_of_domains_is_dead(field, tmp_path):
    """On a mixture of two domains."""
    value, companions = DOMAIN_FIELDS[field]
    for name, words in WORDS.items():
        write_data(tmp_path / "mixed" / name, words)
    changes = {"before": {}, "after": {field: value}}
    before, after = (
        observe(tmp_path / name, ZOO_MUON, data=tmp_path / "mixed", **companions | more)
        for name, more in changes.items()
    )
    assert not same(before, after), f"--{field} {value} changed nothing"


def test_routes_tokens_saves_routes_at_each_evaluation(tmp_path):  # tests/test_routes.py looks into the files
    shards = write_data(tmp_path / "greek", WORDS["greek"])
    for tokens in (0, 64):
        train(tmp_path / str(tokens), ZOO_MUON, data=shards, num_iterations=1, routes_tokens=tokens)
    assert [path.name for path in tmp_path.rglob("step_*.npz")] == ["step_000001.npz"]


def test_too_little_validation_text_is_said_before_the_first_step(tmp_path):
    """Not after the last one, with nothing saved."""
    for name in WORDS:
        write_data(tmp_path / "mixed" / name, WORDS[name])
    assert "each of 2 domains" in refused(
        tmp_path, ZOO_MUON, data=tmp_path / "mixed", val_every=0, val_tokens=40, seq_len=32
    )
    assert "each of 2 domains" in refused(tmp_path, ZOO_MUON, data=tmp_path / "mixed", routes_tokens=20)
    assert not (tmp_path / "muon").exists()


def test_what_compressors_need_is_measured_on_all_domains_alike(tmp_path, monkeypatch):
    for name in WORDS:
        write_data(tmp_path / "mixed" / name, WORDS[name])
    monkeypatch.setattr(data, "COMPRESSED_BYTES", 64)
    seen = []
    monkeypatch.setattr(data, "compressed_bpb", lambda text: seen.append(text))
    hp = hyper(ZOO_MUON, data=str(tmp_path / "mixed"), seq_len=32, val_tokens=0)
    data.compressed_bpb(domains.validation_text(SimpleNamespace(hp=hp), tokenizer.get_encoding("bytes")))
    halves = seen[0][:32].decode(), seen[0][32:].decode()
    assert len(seen[0]) == 64 and all(
        any(word in half for word in words) for half, words in zip(halves, (WORDS["birds"], WORDS["greek"]))
    )
