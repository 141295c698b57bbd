"""depth = loop: against the loop written out, against masks instead of packing, and by what halting means. test_model.py sends every depth
through its checks of leaks, documents and cached decoding.

CPU, no network: `pytest tests/test_depth.py`."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import toys  # noqa: E402
from test_model import (  # noqa: E402
    TINY,
    VOCAB,
    check_cache,
    check_documents,
    check_future,
    check_prefixes,
    check_rows,
    far,
    gradients,
    logits,
    name_of,
    rng,
    slow_forward,
    text,
    tiny,
)

import model as M  # noqa: E402
from model import GPT, Cache, Config, ConfigError  # noqa: E402

PACKED = text(2, 18, eots=[(0, 0), (0, 7), (0, 8), (1, 5), (1, 12)])
LOOP = dict(depth="loop", loops=3, looped=".oo.", halt_threshold=0.6)
EXITS = dict(experts="mlp*7,exit*2", top_k=1)
RULES = sorted(set(M.HALTS) - {"none", "exit"})  # those that learn when


def restless(seed: int = 0, bias: float = -0.5, **changes) -> GPT:
    """A model whose tokens leave its loop at many different times."""
    net = tiny(seed, **LOOP | changes)
    with torch.no_grad():
        if net.config.halt in RULES:
            net.depth.halt.weight.copy_(torch.randn(1, 32, generator=rng(seed)) * 0.3)
            net.depth.halt.bias.fill_(bias)
    return net


def deep_of(net: GPT, x) -> M.Deep:
    """What all layers together make of x."""
    seen = []
    hook = net.depth.register_forward_hook(lambda module, args, deep: seen.append(deep))
    logits(net, x)
    hook.remove()
    return seen[0]


def loops_of(net: GPT, x) -> torch.Tensor:
    """That each token went through."""
    return deep_of(net, x).loops_BT


LEAKS = [(halt, keys, "linear") for halt in (*RULES, "exit") for keys in sorted(M.LOOP_KEYS)]
LEAKS += [("act", keys, "attention") for keys in sorted(M.LOOP_KEYS)] + [("stick_breaking", "latest", "hash"), ("exit", "latest", "attention")]


@pytest.mark.parametrize("halt, loop_keys, router", LEAKS)
def test_halting_leaks_nothing_and_decodes_as_it_trains(halt, loop_keys, router):
    net = restless(halt=halt, loop_keys=loop_keys, router=router, **EXITS if halt == "exit" else {}).eval()
    assert len(loops_of(net, PACKED).unique()) >= 2 + (halt != "exit"), "tokens should leave at different times, or nothing is tested"
    check_prefixes(net, PACKED)
    check_future(net, PACKED)
    check_rows(net, PACKED)
    check_documents(net, PACKED)
    check_cache(net)


HALTING = [dict(halt=halt, loop_keys=keys, **more) for halt, keys, more in (
    ("act", "latest", dict(attention="KL")), ("act", "per_loop", dict(attention="AASA", window="L", residual="average")),
    ("act", "share_first", dict(reinject=0.3)), ("stick_breaking", "latest", dict(norms="R", num_meta_tokens=2)),
    ("stick_breaking", "per_loop", dict(attn_softmax="ssmax")), ("threshold", "latest", dict(residual="average_keep_embedding", attention="AA-A")),
    ("threshold", "share_first", dict(looped="oo..", attention="KAAS", window="L")),
    ("ponder", "per_loop", dict(attention="K", eval_loops=5)))]  # fmt: skip


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("changes", HALTING, ids=name_of)
def test_packed_loops_equal_all_loops_for_all_tokens_in_logits_and_gradients(changes, training):
    """Tokens that have left are not computed; the reference computes them and throws the result away."""
    if training and changes["halt"] == "ponder":
        pytest.skip("training looks at every loop: see test_ponder_weighs_each_loops_loss_by_the_chance_that_it_is_the_last")
    net, x, y = restless(pattern="D", **changes).train(training), text(2, 20, 6), text(2, 20, 7)
    assert len(loops_of(net, x).unique()) >= 3
    want = slow_forward(net, x)
    assert far(net(x).logits[..., :VOCAB], want) < 1e-5
    grads = gradients(net, net(x, y).loss - net(x, y).stats["local_loss"] * training)
    for name, grad in gradients(net, F.cross_entropy(want.flatten(0, 1), y.flatten())).items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("residual", sorted(M.RESIDUALS))
def test_a_token_that_ponder_lets_go_at_once_is_trained_as_it_is_evaluated(residual):
    """What comes after the loop takes up each loop's state with as many terms as that loop has."""
    net, x = restless(halt="ponder", residual=residual, bias=50.0, pattern="D", halt_threshold=0.0), text(2, 20, 6)
    assert far(net.train()(x, x).stats["ce"], net.eval()(x, x).stats["ce"]) < 1e-5


@pytest.mark.parametrize("field, changes, legal", (
    ("attention", dict(halt="act", attention="AAAS", window="L"), "without S in layers .3., after the loop"),
    ("halt", dict(halt="exit", pattern="MDDM") | EXITS, "an exit among the experts of some layer of the loop"),
    ("router_residual", dict(router_residual=0.5), "0 with depth loop")))  # fmt: skip
def test_what_a_loop_cannot_have_is_refused(field, changes, legal):
    with pytest.raises(ConfigError, match=f"^{field} is .*{legal}"):
        Config(**TINY | LOOP | changes)
    Config(**TINY | LOOP | changes | dict(halt="none", router_residual=0.0))


def test_ponder_weighs_each_loops_loss_by_the_chance_that_it_is_the_last():
    net, x, y = restless(halt="ponder", pattern="D", ponder_coef=0.3, ponder_prior=0.4).train(), text(2, 20, 6), text(2, 20, 7)
    with torch.no_grad():
        losses, streams = [], []
        for loops in (1, 2, 3):  # what leaving after so many gives
            one = tiny(pattern="D", **LOOP | dict(loops=loops, halt="none"))
            one.load_state_dict({name: p for name, p in net.state_dict().items() if "halt" not in name})
            losses.append(F.cross_entropy(one(x).logits.flatten(0, 1), y.flatten(), reduction="none"))
            hook = one.blocks[3].register_forward_pre_hook(lambda module, args: streams.append(args[0]))
            one(x)
            hook.remove()
        wish = [torch.sigmoid((M.norm(h) @ net.depth.halt.weight[0] + net.depth.halt.bias)).flatten() for h in streams]
        chance = [wish[0], (1 - wish[0]) * wish[1], (1 - wish[0]) * (1 - wish[1])]
        prior = [0.4, 0.6 * 0.4, 0.6 * 0.6]
        want = sum((p * loss).mean() for p, loss in zip(chance, losses))
        divergence = sum((p * (p / q).log()).mean() for p, q in zip(chance, prior))
        found = net(x, y)
    assert far(found.stats["ce"], want) < 1e-5 and far(found.loss, want + 0.3 * divergence) < 1e-5


@pytest.mark.parametrize("halt", RULES)
def test_the_loss_and_the_cost_both_reach_the_halting_head(halt):
    x, y = text(2, 20, 6), text(2, 20, 7)
    for coef in (0.0, 10.0):
        net = restless(halt=halt, ponder_coef=coef, balance_coef=0.0, z_coef=0.0).train()
        grads = gradients(net, net(x, y).loss)
        assert grads["depth.halt.weight"].abs().max() > 0 and grads["depth.halt.bias"].abs().max() > 0
    if halt != "ponder":  # whose cost is a divergence
        assert grads["depth.halt.bias"] < 0, "a high price of loops must make tokens wish to leave: descent raises the bias"


@pytest.mark.parametrize("bias, loops", ((-50.0, 3), (50.0, 1)))
@pytest.mark.parametrize("halt", RULES)
def test_every_token_leaves_whatever_it_wishes(halt, bias, loops):
    net = restless(halt=halt, bias=bias, halt_threshold=0.0).eval()
    assert (loops_of(net, PACKED) == loops).all()
    plain = tiny(**LOOP | dict(loops=loops, halt="none")).eval()
    plain.load_state_dict({name: p for name, p in net.state_dict().items() if "halt" not in name})
    if halt != "threshold" or loops == 1:  # under threshold a wish is the length of a step, too
        assert far(logits(net, PACKED), logits(plain, PACKED)) < 1e-4


def test_a_token_that_has_left_never_changes_and_costs_nothing():
    """The stream that coda layers get is, token by token, the one that its last loop made; and matmuls fall with the tokens that go through them."""
    flops = {}
    for bias in (-50.0, -0.5, 50.0):
        net = restless(halt="ponder", bias=bias, looped="o", loops=4, pattern="DM", head="bf16").eval()
        x = text(2, 128, 3)
        with FlopCounterMode(display=False) as counter:
            mean = loops_of(net, x).float().mean().item()
        flops[mean] = counter.get_total_flops()
    depths = sorted(flops)
    assert depths[0] == 1 and 1.2 < depths[1] < 3.5 and depths[2] == 4
    per_loop = (flops[4.0] - flops[1.0]) / 3
    assert flops[depths[1]] < flops[1.0] + per_loop * (depths[1] - 1) * 1.6  # rows are packed in steps of 64
    assert flops[depths[1]] < 0.75 * flops[4.0]


def test_a_cache_that_each_loop_overwrites_is_wrong(monkeypatch):
    """One place per token: a later token sees earlier ones at the end of their loops, where training shows it the same loop."""

    class Overwrite(M.LoopKeys):
        def remembered(self, module, loop):
            return super().remembered(module, 0)

    net = restless(halt="act").eval()
    check_cache(net)
    monkeypatch.setitem(M.LOOP_KEYS, "latest", Overwrite)
    wrong = restless(halt="act").eval()
    with pytest.raises(AssertionError, match="logits differ by (0.[1-9]|[1-9])"):
        check_cache(wrong)


@pytest.mark.parametrize("loop_keys, copies", (("latest", 3), ("per_loop", 3), ("share_first", 1)))
def test_what_a_cache_keeps_of_each_loop(loop_keys, copies):
    net = tiny(depth="loop", loops=3, loop_keys=loop_keys, halt="act").eval()
    cache = Cache(net.config, 1, 6)
    with torch.no_grad():
        net(text(1, 6), cache=cache)
    kept = [key for key in cache.kept if not isinstance(key[0], str)]
    assert len(kept) == copies * 4


def test_average_makes_the_stream_the_mean_of_its_terms_however_many_loops_there_are():
    """With what sublayers say recorded, the stream is (embedding + their sum) / (1 + their number), for each token by its own number."""
    for loops in (1, 3):
        net = restless(depth="loop", loops=loops, residual="average", norms="R", halt="threshold", looped="o", pattern="D").eval()
        net.depth.halt.forward = lambda *args, halt=net.depth.halt: M.Ponder.forward(halt, *args)
        said, embedding = [], []
        for block in net.blocks:
            block.residual = M.Residual(block.residual.enter, lambda x, y, n, e, rule=block.residual: said.append(y) or rule.take_up(x, y, n, e))
            block.register_forward_pre_hook(lambda module, args: embedding.append(args[1]))
        x, end = text(1, 6, 3), []
        net.depth.register_forward_hook(lambda module, args, deep: end.append(deep))
        logits(net, x)
        depth = end[0].loops_BT
        got, total = end[0].outputs[0][0], embedding[0].clone()
        if (depth == loops).all():
            for y in said:
                total = total + y
            assert far(got, total / (1 + len(said))) < 1e-5
        rms = got.square().mean(-1).sqrt()
        assert (rms < 3 * (1 + 8 * depth) ** -0.5).all(), "independent terms of unit length average out like 1 / sqrt(count)"


def test_evaluation_may_run_another_number_of_loops():
    x = text(2, 20, 6)
    trained, longer = (tiny(**LOOP | dict(loops=2, eval_loops=n)) for n in (0, 4))
    assert torch.equal(logits(trained.train(), x), logits(longer.train(), x))
    four = tiny(**LOOP | dict(loops=4)).eval()
    assert torch.equal(logits(longer.eval(), x), logits(four, x)) and far(logits(trained.eval(), x), logits(four, x)) > 1e-3


def test_balance_counts_every_loop_of_every_token_and_none_that_has_left():
    net, x = restless(halt="ponder", looped="o", loops=3).eval(), text(2, 20, 6)
    depth = loops_of(net, x)
    stats = net(x).stats
    assert (stats["counts_LE"].sum(1) == 2 * depth.sum()).all() and stats["loops"] == depth.float().mean()
    moe = restless(looped="o", loops=3, halt="none").train()
    assert (moe(x).stats["counts_LE"].sum(1) == 2 * 3 * 40).all()


def test_loops_are_counted_in_flops():
    once, thrice = (Config(**TINY | dict(depth="loop", loops=n, looped=".oo.")) for n in (1, 3))
    stack = Config(**TINY)
    assert M.flops_per_token(once, 40) == M.flops_per_token(stack, 40)
    head = 6 * M.count_parameters(stack)["head"]
    layers = [M.flops_per_token(Config(**TINY | dict(n_layer=n, value_embeds=0)), 40) - head for n in (2, 4)]  # two layers, one of each window
    assert layers[1] == 2 * layers[0] and M.flops_per_token(thrice, 40) == pytest.approx(head + layers[1] + 2 * layers[0])
    assert M.count_parameters(once)["total"] == M.count_parameters(thrice)["total"]


@pytest.mark.parametrize("field, value, others, legal", (
    ("looped", "o.o", {}, "neighbours"), ("looped", ".", {}, "neighbours"), ("looped", "ox", {}, "letters o ."), ("loops", 0, {}, "at least 1"),
    ("eval_loops", -1, {}, "at least 0"), ("residual", "sub", {}, "add, average"), ("halt", "stop", {}, "act"), ("loop_keys", "all", {}, "latest"),
    ("ponder_prior", 1.0, {}, "between 0 and 1"), ("reinject", -1.0, {}, "at least 0"),
    ("router", "conv", dict(depth="loop", halt="act"), "no neighbours"),
    ("shared", "conv", dict(depth="loop", halt="act", num_shared_experts=1, mlp_ratio=3.0), "no neighbours"),
    ("importance_coef", 0.1, dict(depth="loop", halt="act"), "0 next to halt act")))  # fmt: skip
def test_what_cannot_be_is_refused(field, value, others, legal):
    with pytest.raises(ConfigError, match=f"^{field} is {value!r}.*{legal}"):
        Config(**TINY | others | {field: value})


@pytest.mark.parametrize("halt, coef, over", (("act", 0.1, 1), ("ponder", 0.01, 0)))
def test_counting_to_n_takes_as_many_loops_and_as_much_compute(halt, coef, over):
    """The hard depth, not the loss: ACT leaves one loop after n at most, as its last share needs one, PonderNet at n."""
    toy = toys.counting(halt, coef, steps=600)
    loops, correlation, error = toys.depths(toy)
    assert correlation >= 0.95 and error < 0.1, (loops, error)
    assert sum(abs(n + over - loop) for n, loop in enumerate(loops, 1)) <= 3, loops
    few, all_of_them, many = (toys.cost(toy, n_BT, rounds=1)[0] for n_BT in (
        torch.full((2, 512), 1), torch.randint(1, 9, (2, 512), generator=rng(1)), torch.full((2, 512), 8)))  # fmt: skip
    mean = sum(loops) / len(loops)
    assert few / many == pytest.approx(loops[0] / loops[-1], rel=0.05)
    assert all_of_them / many == pytest.approx(mean / loops[-1], rel=0.2)  # rows are packed in steps of 64


def moeut(net: GPT, x):
    """Logits and balance loss of MoEUT (2405.16039) from its definition, token by token: SwitchHead attention whose queries, keys and choices see
    the normed stream and whose values see the stream; sigma-MoE of ReLU experts likewise; a group of layers repeated with the same weights;
    minus the entropy of the mean choice over tokens and repeats, row by row."""
    c, p = net.config, dict(net.named_parameters())
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    cos, sin = M.rotary_tables(torch.arange(x.size(1)), c.head_dim, torch.float32)
    near = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))
    all_logits, balance = [], [[] for _ in range(c.n_layer)]
    for row in x:
        h, T, H, E = rms(p["embed"][row]), len(row), c.n_head, c.attn_experts
        chosen = [[] for _ in range(c.n_layer)]
        for _, i in itertools.product(range(c.loops), range(c.n_layer)):
            of = lambda name, i=i: p[f"blocks.{i}.{name}"]

            def picked(source, score_TX, weight_XNK, k):
                """Of each token: the sum over its k best sigmoids of sigmoid times matrix times source."""
                out = []
                for z, score in zip(source, score_TX.sigmoid()):
                    best = score.topk(k)
                    out.append(sum(s * (weight_XNK[e] @ z) for s, e in zip(best.values, best.indices)))
                return torch.stack(out)

            normed = rms(h)
            q, k = ((normed @ part.T).view(T, H, -1) for part in (of("attention.q"), of("attention.k")))
            q, k = (M.rotate(z[None], cos, sin)[0] for z in (q, k))
            choose_v, choose_o = ((normed @ part.T).view(T, H, E) for part in of("attention.choice"))
            heads = []
            for head in range(H):
                mine = slice(head * E, head * E + E)
                v = picked(h, choose_v[:, head], of("attention.values")[mine], c.attn_top_k)
                score = (q[:, head] @ k[:, head].T * c.attn_scale).masked_fill((near < 0) | (near >= c.window_size), -torch.inf)
                heads.append(picked(score.softmax(-1) @ v, choose_o[:, head], of("attention.outputs")[mine], c.attn_top_k))
            h = h + sum(heads)
            score = rms(h) @ of("ffn.router.gate").T
            chosen[i].append(score.softmax(-1))
            up, down = of("ffn.relu.up"), of("ffn.relu.down")
            rows = []
            for z, s in zip(h, score.sigmoid()):
                best = s.topk(c.top_k)
                rows.append(sum(w * (down[e] @ (up[e] @ z).relu()) for w, e in zip(best.values, best.indices)))
            h = h + torch.stack(rows)
        all_logits.append(rms(h) @ p["head"].T)
        for i, parts in enumerate(chosen):
            mean = torch.cat(parts).mean(0)
            balance[i].append((mean * mean.log()).sum())
    z = torch.stack(all_logits)
    return (c.softcap * torch.tanh(z / c.softcap) + c.softcap)[..., :VOCAB], sum(torch.stack(rows).mean() for rows in balance)


def test_a_loop_of_routed_attention_and_sigma_moe_is_moeut():
    net = tiny(depth="loop", loops=3, n_layer=2, attention="R", norms="U", experts="relu", num_experts=6, top_k=3, mlp_ratio=3.0,
               router_noise=0.0, window="L", router_score="sigmoid", norm_topk_prob=0.0, entropy_coef=0.3, balance_coef=0.0, z_coef=0.0,
               value_embeds=0, qk_norm="none", attn_scale=0.25, attn_experts=4, attn_top_k=2).train()  # fmt: skip
    with torch.no_grad():
        net.bias_LE.zero_()
        for block in net.blocks:
            block.stream_mix.copy_(torch.tensor([1.0, 0.0]))
    x, y = text(2, 15, 6), text(2, 15, 7)
    want, balance = moeut(net, x)
    assert far(net(x).logits[..., :VOCAB], want) < 1e-5
    loss = F.cross_entropy(want.flatten(0, 1), y.flatten()) + 0.3 * balance
    assert far(net(x, y).loss, loss) < 1e-5
    grads = gradients(net, net(x, y).loss)
    for name, grad in gradients(net, loss).items():
        assert name.endswith("stream_mix") or (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_routed_attention_is_active_by_what_a_token_meets():
    config = Config(**TINY | dict(attention="R", pattern="D", attn_experts=4, attn_top_k=1))
    counts, matrices = M.count_parameters(config), 4 * 2 * (2 * 4 * 16 * 32)  # of four layers, values and outputs of two heads of four
    assert counts["total"] - counts["active"] == matrices * 3 // 4 + (counts["embed"] + counts["value_embed"]) * 63 // 64
    assert M.flops_per_token(config, 12) == M.flops_per_token(dataclasses.replace(config, attn_experts=1), 12) + 6 * 4 * 2 * 2 * 3 * 32


def test_who_chooses_the_exit_leaves_after_that_loop():
    net, x = restless(halt="exit", looped="o", loops=3, window="L", **EXITS).eval(), text(2, 20, 6)
    chose, depth = [], loops_of(net, x)
    for block in net.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: chose.append((args[0].shape[1], out[1][0].exits_T)))
    logits(net, x)
    first = torch.stack([exits for _, exits in chose[:4]]).any(0).view(2, 20)  # of the first loop, where all are in
    assert torch.equal(depth == 1, first) and set(depth.unique().tolist()) == {1, 2, 3}
    assert net.balanced_E.tolist() == [1] * 7 + [0] * 2
    grads = gradients(net.train(), net(x, x).stats["local_loss"])
    assert (grads["blocks.3.ffn.router.gate"] != 0).any()
    with pytest.raises(ConfigError, match="halt is 'exit'; it must be another, or there must be an exit"):
        Config(**TINY | dict(depth="loop", halt="exit"))


# -----------------------------------------------------------------------------
# Routing over layers

POOL = dict(depth="routed", loops=3, identity_layers=1)


def picky(seed: int = 0, **changes) -> GPT:
    """A routed model whose controller has opinions."""
    net = tiny(seed, **POOL | changes)
    with torch.no_grad():
        for p in net.depth.controller.parameters():
            p.normal_(generator=rng(seed)).mul_(3 * p.size(-1) ** -0.5)
    return net


def choices_of(net: GPT, x) -> torch.Tensor:
    return deep_of(net, x).choices_SBT


@pytest.mark.parametrize("changes", [
    dict(controller="linear", looped=".ooo"), dict(controller="mlp", halt="act"), dict(controller="lstm", attention="KL-A"),
    dict(controller="linear", route_by="first_token", looped="ooo."), dict(controller="memoryless", halt="stick_breaking", norms="R", loops=4),
    dict(controller="learned", attention="R", num_meta_tokens=2),
    dict(controller="linear", attn_softmax="ssmax", reinject=0.5)], ids=name_of)  # fmt: skip
def test_routing_over_layers_leaks_nothing_and_decodes_as_it_trains(changes):
    net = picky(**changes)
    if "halt" in changes:
        with torch.no_grad():
            net.depth.halt.bias.fill_(-0.5)
    for training in (False, True):
        net.train(training)
        check_prefixes(net, PACKED)
        check_future(net, PACKED)
        check_rows(net, PACKED)
        check_documents(net, PACKED)
    if changes["controller"] != "learned":
        used = choices_of(net, PACKED)
        most = 2 if "route_by" in changes else 3
        assert all(len(step.unique()) >= 2 for step in used) and len(used.unique()) >= most, "tokens should go different ways, or nothing is tested"
    check_cache(net.eval())


@pytest.mark.parametrize("changes", [
    {}, dict(attention="K-LA", looped=".oo."), dict(router="conv", router_noise=0.0), dict(router="attention", router_noise=0.0),
    dict(num_shared_experts=1, mlp_ratio=3.0, shared="conv", router_noise=0.0), dict(pattern="DM", router="hash"),
    dict(norms="R", attn_softmax="ssmax", pattern="D")], ids=name_of)  # fmt: skip
def test_one_layer_per_step_is_the_mixture_with_one_hot_weights(changes):
    net, x = picky(route_training="straight_through", router_noise=0.0, **{k: v for k, v in changes.items() if k != "router_noise"}), text(2, 20, 3)
    assert far(logits(net.eval(), x), logits(net.train(), x)) < 1e-4
    assert far(logits(tiny(**POOL | changes, route_training="soft").train(), x), logits(net.eval(), x)) > 1e-3


def test_the_pool_in_turn_is_the_plain_transformer():
    """Controller fixed, as many steps as layers: a loop that runs once. And with more steps, identities are what is left over."""
    x, loop = text(2, 20, 3), tiny(depth="loop", loops=1, router_noise=0.0)
    for steps, identities in ((4, 0), (6, 2)):
        net = tiny(depth="routed", loops=steps, controller="fixed", identity_layers=identities, router_noise=0.0)
        for training in (False, True):
            assert far(logits(net.train(training), x), logits(loop.train(training), x)) < 1e-4
    assert choices_of(net.eval(), x)[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_identities_alone_are_the_embedding_and_the_head():
    net, x = picky(controller="learned").eval(), text(2, 20, 3)
    with torch.no_grad():
        net.depth.controller.step.fill_(0)[:, 4] = 9.0
        want = net.logits(M.norm(M.norm(net.embed[x])))
    assert far(logits(net, x), want[..., :VOCAB]) < 1e-5


@pytest.mark.parametrize("kind, weights", (("mean", (1 / 3, 1 / 3, 1 / 3)), ("cumulative", (1, 1, 1)), ("last", (0, 0, 1))))
def test_the_loss_looks_after_the_steps_that_step_loss_names(kind, weights):
    x, y = text(2, 20, 6), text(2, 20, 7)
    net = picky(step_loss=kind, controller="memoryless", router="hash", balance_coef=0.0, z_coef=0.0).train()
    parts = []
    for steps in (1, 2, 3):
        shorter = picky(loops=steps, controller="memoryless", router="hash", balance_coef=0.0, z_coef=0.0).train()
        parts.append(shorter(x, y).loss)
    assert far(net(x, y).loss, sum(w * part for w, part in zip(weights, parts))) < 1e-5
    assert far(net.eval()(x, y).loss, shorter.eval()(x, y).loss) < 1e-6  # evaluation looks at the last


def test_training_weights_go_from_the_mixture_to_one_layer():
    prob = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    soft, straight, anneal = (M.ROUTE_TRAINING[name] for name in ("soft", "straight_through", "anneal"))
    assert soft(prob, 1.0) is prob and straight(prob, 0.0).tolist() == [[1, 0, 0]]
    assert torch.equal(anneal(prob, 0.0), prob) and far(anneal(prob, 0.5), torch.tensor([[0.75, 0.15, 0.1]])) < 1e-6
    for weights in (soft(prob, 0.3), straight(prob, 0.3), anneal(prob, 0.3)):
        (grad,) = torch.autograd.grad((weights * torch.tensor([1.0, 2.0, 3.0])).sum(), prob)
        assert grad.tolist() == [[1, 2, 3]]
    net, x = picky(route_training="anneal", anneal_steps=10, router="hash").train(), text(2, 20, 6)
    results = [net(x).logits[..., :VOCAB] for step in (0, 10) for _ in [net.set_step(5, step)]]
    soft, hard = (picky(route_training=kind, router="hash").train() for kind in ("soft", "straight_through"))
    wanted = [kind(x).logits[..., :VOCAB] for kind in (soft, hard)]
    assert far(results[0], wanted[0]) < 1e-5 and far(results[1], wanted[1]) < 1e-5 and far(*results) > 1e-2


def test_uneven_use_of_layers_has_its_price():
    net = tiny(**POOL).depth
    even = torch.full((3, 2, 8, 5), 0.2)
    assert net.unevenness(even, torch.arange(48).view(3, 2, 8) % 4) == pytest.approx(1.0)
    assert net.unevenness(even, torch.arange(48).view(3, 2, 8) % 5) == pytest.approx(1.0, rel=0.03)  # identities may be used as they are
    one = torch.zeros(3, 2, 8, 5)
    one[..., 2] = 1
    assert net.unevenness(one, torch.full((3, 2, 8), 2)) == pytest.approx(4.0)
    x = text(2, 20, 6)
    cheap, dear = (picky(layer_balance_coef=coef).train()(x, x) for coef in (0.0, 2.0))
    assert cheap.loss < dear.loss


def test_parameters_do_not_grow_with_the_steps_but_for_what_tells_them():
    counts = [M.count_parameters(Config(**TINY | POOL | dict(loops=steps, controller="lstm")))["total"] for steps in (2, 7)]
    assert counts[0] == counts[1]
    told = [M.count_parameters(Config(**TINY | POOL | dict(loops=steps)))["total"] for steps in (2, 7)]
    assert told[1] - told[0] == 5 * 32


def test_picked_layers_compute_keys_for_all_and_the_rest_for_those_who_picked_them():
    """FLOPs of evaluation, counted, against what they should be and against the formula."""
    T, changes = 128, dict(depth="routed", loops=2, pattern="D", window="L", controller="fixed")
    config, net, x = Config(**TINY | changes), tiny(**changes).eval(), text(1, 128, 1)
    counts = M.count_parameters(config)
    keys, layer = 2 * 32 * 32, counts["matrix"] / 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    seen = {str(op): n / T for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == pytest.approx(2 * (2 * (3 * keys + layer) + counts["head"]), rel=1e-6)
    more = M.flops_per_token(config, T) - M.flops_per_token(dataclasses.replace(config, loops=1), T)
    assert more == pytest.approx(6 * (3 * keys + layer) + 12 * M.mean_keys(config, "L", T) * 32)


def test_a_layer_that_nobody_picks_leaves_the_entropy_of_the_others():
    net = tiny(**POOL | dict(entropy_coef=0.1, controller="fixed")).eval()
    assert net(PACKED, PACKED).stats["local_loss"] < 0, "less entropy of what rows choose, of the layers that were picked"


def test_tokens_that_have_left_pick_no_layer():
    """Neither in the routes nor in the balance of layers."""
    net = picky(halt="act", loops=4)
    deep = deep_of(net.eval(), PACKED)
    left_SBT = torch.arange(len(deep.choices_SBT))[:, None, None] >= deep.loops_BT
    assert left_SBT.any() and torch.equal(deep.choices_SBT < 0, left_SBT)
    prob_SBTN = torch.rand(4, 2, 18, 5, generator=rng(1))
    choice_SBT = torch.randint(5, (4, 2, 18), generator=rng(2))
    gone_SBT = torch.rand(4, 2, 18, generator=rng(3)) < 0.5
    net.depth.group, seen = slice(0, 4), ~gone_SBT
    real_N, share_N = prob_SBTN[seen].mean(0)[:4], F.one_hot(choice_SBT[seen], 5).float().mean(0)[:4]
    want = 4 * (share_N / share_N.sum() * real_N / real_N.sum()).sum()
    assert far(net.depth.unevenness(prob_SBTN, choice_SBT.where(seen, -1)), want) < 1e-5


@pytest.mark.parametrize("controller, can", (("linear", True), ("lstm", True), ("memoryless", False)))
def test_a_controller_that_knows_the_step_runs_programs_and_one_that_does_not_cannot(controller, can):
    soft, hard, off = toys.accuracies(toys.running(controller, steps=600))
    assert (hard >= 0.99 and soft >= 0.99) if can else hard < 0.25, (soft, hard)
    if controller == "linear":
        assert off < 0.2


def test_one_layer_from_the_start_collapses():
    """The negative control of annealing: with straight-through gradients alone nothing is learned."""
    assert toys.accuracies(toys.running("linear", "straight_through", steps=300))[1] < 0.25
    assert toys.accuracies(toys.running("linear", "anneal", steps=600))[1] >= 0.99


def test_the_order_of_a_trained_transformer_is_found_again():
    trained = GPT(toys.IN_TURN)
    toys.fit(trained, trained.parameters(), 300, 3e-3)
    net = toys.recovered(trained, "learned", "soft", 150)
    assert torch.equal(toys.use(net), torch.eye(4)[:, :3]) and abs(toys.held_out(net, 2) - toys.held_out(trained, 2)) < 1e-5
    assert toys.held_out(toys.in_order(trained, (2, 1, 0)), 2) > toys.held_out(trained, 2) + 0.1


@pytest.mark.parametrize("field, value, legal", (
    ("controller", "gru", "linear"), ("route_by", "last", "token"), ("route_training", "hard", "soft"), ("step_loss", "first", "last"),
    ("residual", "average", "add"), ("halt", "ponder", "act"), ("loop_keys", "share_first", "latest"), ("attention", "AS", "without S"),
    ("router_residual", 0.5, "0 with depth routed"), ("identity_layers", -1, "at least 0"), ("anneal_steps", 0, "at least 1")))  # fmt: skip
def test_what_a_pool_cannot_have_is_refused(field, value, legal):
    with pytest.raises(ConfigError, match=f"^{field} is {value!r}.*{legal}"):
        Config(**TINY | POOL | {field: value})


def test_the_card_says_what_each_loop_costs():
    config = Config(**TINY | LOOP)
    card = M.model_card(config, 40)
    layers = (M.flops_per_token(dataclasses.replace(config, loops=4), 40) - M.flops_per_token(config, 40)) / 3
    assert f"loop, layers .oo., 3 times at most, halt none; each time {layers:,.0f} FLOPs" in card and layers > 0
    assert "depth" not in M.model_card(Config(**TINY), 40)


CARDS = [dict(halt=halt, loop_keys=keys) for halt in RULES for keys in sorted(M.LOOP_KEYS)]
CARDS += [dict(halt="exit", **EXITS), dict(depth="routed"), dict(depth="routed", halt="act", route_by="first_token")]


@pytest.mark.parametrize("changes", CARDS, ids=name_of)
def test_every_depth_has_a_card_and_a_cache_of_the_size_it_says(changes):
    """Tensors without values decide nothing: on the meta device everybody stays."""
    config = Config(**TINY | LOOP | changes)
    assert "KV cache" in M.model_card(config, 40)
    net = tiny(**LOOP | changes).eval()
    cache = Cache(config, 1, 7)
    with torch.no_grad():
        net(text(1, 7), cache=cache)
    kept = sum(part[:, :1].nbytes for parts in cache.kept.values() for part in parts)
    assert 0 <= M.cache_bytes_per_token(config) - kept <= 1  # a flag of the last loop, if nobody was in it
