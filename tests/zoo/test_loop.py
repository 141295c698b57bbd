"""Depth loop: against its definition, against masks instead of packing, and by the properties of each halting rule.

CPU, no network: `pytest tests/zoo/test_loop.py`.
"""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EOT,
    PACKED,
    SEED,
    STEP,
    TINY,
    VOCAB,
    assert_same_gradients,
    check_cache,
    check_documents,
    check_future,
    check_prefixes,
    check_rows,
    far,
    gradients,
    logits,
    name_of,
    norm_error,
    rng,
    step_loss,
    text,
    tiny,
    trunk_of,
    zoo_fields,
)
from reference import slow_forward
from slow import but_every
from torch.utils.flop_counter import FlopCounterMode

import model
import ops
import zoo
from benchmarks import toys
from cli import UserError
from ops import norm
from tools import cost
from zoo.block import RESIDUALS
from zoo.halting import HALTS, HaltState, Ponder
from zoo.loop import LOOP_KEYS, LoopKeys
from zoo.stats import neg_entropy

LOOP = dict(depth="loop", loops=3, looped=".oo.", halt_threshold=0.6)
EXITS = dict(experts="mlp*7,exit*2", top_k=1)
RULES = sorted(set(HALTS) - {"none", "exit"})  # those with a halting head


def halting_net(seed: int = 0, bias: float = -0.5, **changes) -> zoo.GPT:
    """A model whose tokens halt after different numbers of iterations."""
    net = tiny(seed, **LOOP | changes)
    with torch.no_grad():
        if net.config.halt in RULES:
            net.halt.weight.copy_(torch.randn(1, 32, generator=rng(seed)) * 0.3)
            net.halt.bias.fill_(bias)
    return net


def loops_of(net: zoo.GPT, x) -> torch.Tensor:
    """Iterations of each token."""
    return trunk_of(net, x).loops_BT


def trunk_stats(net: zoo.GPT) -> list:
    """Statistics of the MoE layers for some text, with their graph."""
    trunks, run_blocks = [], net.run_blocks
    net.run_blocks = lambda *inputs: trunks.append(run_blocks(*inputs)) or trunks[-1]
    net(text(2, 20, 6), text(2, 20, 7))
    del net.run_blocks
    return trunks[0].stats


LEAKS = [(halt, keys, "linear") for halt in (*RULES, "exit") for keys in sorted(LOOP_KEYS)]
LEAKS += [("act", keys, "attention") for keys in sorted(LOOP_KEYS)]
LEAKS += [("stick_breaking", "latest", "hash"), ("exit", "latest", "attention")]


@pytest.mark.parametrize("halt, loop_keys, router", but_every(4, LEAKS))
def test_halting_leaks_nothing_and_cached_decoding_equals_the_full_forward(halt, loop_keys, router):
    net = halting_net(halt=halt, loop_keys=loop_keys, router=router, **EXITS if halt == "exit" else {}).eval()
    assert len(loops_of(net, PACKED).unique()) >= 2 + (halt != "exit"), "all tokens halt at once"
    check_prefixes(net, PACKED)
    check_future(net, PACKED)
    check_rows(net, PACKED)
    check_documents(net, PACKED)
    check_cache(net)


HALTING = [dict(halt=halt, loop_keys=keys, **more) for halt, keys, more in (
    ("act", "latest", dict(attention="KL")),
    ("act", "per_loop", dict(attention="AASA", window="L", residual="average")),
    ("act", "share_first", dict(reinject=0.3)), ("stick_breaking", "latest", dict(norms="R", num_meta_tokens=2)),
    ("stick_breaking", "per_loop", dict(attn_softmax="ssmax")),
    ("threshold", "latest", dict(residual="average_keep_embedding", attention="AA-A")),
    ("threshold", "share_first", dict(looped="oo..", attention="KAAS", window="L")),
    ("ponder", "per_loop", dict(attention="K", eval_loops=5)))]  # fmt: skip


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("changes", HALTING, ids=name_of)
def test_packed_loops_equal_loops_over_all_tokens(changes, training):
    """Logits and gradients. The reference computes halted tokens too, and discards their outputs."""
    if training and changes["halt"] == "ponder":
        pytest.skip("all iterations enter its training loss: see test_ponder_weights_losses_by_halting_probabilities")
    net, x, y = halting_net(pattern="D", **changes).train(training), text(2, 20, 6), text(2, 20, 7)
    assert len(loops_of(net, x).unique()) >= 3
    want = slow_forward(net, x)
    assert far(net(x).logits[..., :VOCAB], want) < 1e-5
    grads = gradients(net, net(x, y).loss - net(x, y).stats["router_loss"] * training)
    assert_same_gradients(grads, gradients(net, F.cross_entropy(want.flatten(0, 1), y.flatten())))


@pytest.mark.parametrize("residual", sorted(RESIDUALS))
def test_if_ponder_halts_at_once_training_and_evaluation_agree(residual):
    """Layers after the loop count as many terms of the residual stream as each iteration has."""
    net, x = halting_net(halt="ponder", residual=residual, bias=50.0, pattern="D", halt_threshold=0.0), text(2, 20, 6)
    assert far(net.train()(x, x).stats["ce"], net.eval()(x, x).stats["ce"]) < 1e-5


@pytest.mark.parametrize("field, changes, legal", (
    ("attention", dict(halt="act", attention="AAAS", window="L"), "without S in layers .3., after the loop"),
    ("halt", dict(halt="exit", pattern="MDDM") | EXITS, "an exit among the experts of some layer of the loop"),
    ("router_residual", dict(router_residual=0.5), "0 with depth loop")))  # fmt: skip
def test_options_that_conflict_with_a_loop_are_refused(field, changes, legal):
    with pytest.raises(UserError, match=f"^{field} is .*{legal}"):
        zoo.Config(**zoo_fields(**LOOP | changes))
    zoo.Config(**zoo_fields(**LOOP | changes | dict(halt="none", router_residual=0.0)))


def test_ponder_weights_losses_by_halting_probabilities():
    net, x, y = (
        halting_net(halt="ponder", pattern="D", ponder_coef=0.3, ponder_prior=0.4).train(),
        text(2, 20, 6),
        text(2, 20, 7),
    )
    with torch.no_grad():
        losses, states = [], []
        for loops in (1, 2, 3):  # the losses of halting after as many
            one = tiny(pattern="D", **LOOP | dict(loops=loops, halt="none"))
            one.load_state_dict({name: p for name, p in net.state_dict().items() if "halt" not in name})
            losses.append(F.cross_entropy(one(x).logits.flatten(0, 1), y.flatten(), reduction="none"))
            hook = one.blocks[3].register_forward_pre_hook(lambda module, args: states.append(args[0]))
            one(x)
            hook.remove()
        p = [torch.sigmoid(norm(h) @ net.halt.weight[0] + net.halt.bias).flatten() for h in states]
        halts_at = [p[0], (1 - p[0]) * p[1], (1 - p[0]) * (1 - p[1])]
        prior = [0.4, 0.6 * 0.4, 0.6 * 0.6]
        want = sum((p * loss).mean() for p, loss in zip(halts_at, losses))
        divergence = sum((p * (p / q).log()).mean() for p, q in zip(halts_at, prior))
        found = net(x, y)
    assert far(found.stats["ce"], want) < 1e-5 and far(found.loss, want + 0.3 * divergence) < 1e-5


@pytest.mark.parametrize("prior, loops", ((0.9, 46), (0.999, 60), (1e-6, 3)))
def test_ponders_cost_is_finite_where_its_prior_underflows(prior, loops):
    """The divergence from the prior, in float64, of a token that halts with probability 1/2 in each iteration."""
    rule, new = Ponder(zoo.Config(**TINY | LOOP | dict(halt="ponder", ponder_prior=prior, loops=loops))).train(), None
    with torch.no_grad():
        rule.weight.zero_(), rule.bias.zero_()
    rule.bias.requires_grad_()
    new = torch.randn(1, 2, 32, generator=rng())
    state = HaltState.initial(new)
    for loop in range(loops):
        _, state = rule(new, new, state, loop + 1 == loops, None)
    halts = [0.5 ** (n + 1) for n in range(loops - 1)] + [0.5 ** (loops - 1)]
    log_prior = [math.log(prior) + n * math.log1p(-prior) for n in range(loops - 1)]
    log_prior += [(loops - 1) * math.log1p(-prior)]
    want = sum(p * (math.log(max(p, 1e-8)) - q) for p, q in zip(halts, log_prior))
    cost = rule.cost(state, None)
    assert cost.item() == pytest.approx(want, rel=1e-4)
    (slope,) = torch.autograd.grad(cost, [rule.bias])
    assert slope.isfinite() and slope != 0


@pytest.mark.parametrize("halt", RULES)
def test_loss_and_cost_both_give_gradients_to_the_halting_head(halt):
    x, y = text(2, 20, 6), text(2, 20, 7)
    for coef in (0.0, 10.0):
        net = halting_net(halt=halt, ponder_coef=coef, balance_coef=0.0, z_coef=0.0).train()
        grads = gradients(net, net(x, y).loss)
        assert grads["halt.weight"].abs().max() > 0 and grads["halt.bias"].abs().max() > 0
    if halt != "ponder":  # its cost is a divergence
        assert grads["halt.bias"] < 0, "at a high cost, descent must raise the halting probability"


@pytest.mark.parametrize("bias, loops", ((-50.0, 3), (50.0, 1)))
@pytest.mark.parametrize("halt", RULES)
def test_every_token_halts_after_one_to_all_iterations(halt, bias, loops):
    net = halting_net(halt=halt, bias=bias, halt_threshold=0.0).eval()
    assert (loops_of(net, PACKED) == loops).all()
    plain = tiny(**LOOP | dict(loops=loops, halt="none")).eval()
    plain.load_state_dict({name: p for name, p in net.state_dict().items() if "halt" not in name})
    if halt != "threshold" or loops == 1:  # there the probability is a step size too
        assert far(logits(net, PACKED), logits(plain, PACKED)) < 1e-4


def test_halted_tokens_cost_no_matmuls():
    flops = {}
    for bias in (-50.0, -0.5, 50.0):
        net = halting_net(halt="ponder", bias=bias, looped="o", loops=4, pattern="DM", head="bf16").eval()
        x = text(2, 128, 3)
        with FlopCounterMode(display=False) as counter:
            mean = loops_of(net, x).float().mean().item()
        flops[mean] = counter.get_total_flops()
    means = sorted(flops)
    assert means[0] == 1 and 1.2 < means[1] < 3.5 and means[2] == 4
    per_loop = (flops[4.0] - flops[1.0]) / 3
    assert flops[means[1]] < flops[1.0] + per_loop * (means[1] - 1) * 1.6  # rows are packed in steps of 64
    assert flops[means[1]] < 0.75 * flops[4.0]


def test_a_cache_that_each_iteration_overwrites_is_wrong(monkeypatch):
    """With one entry per token, later tokens see the end of earlier loops; in training, the same iteration."""

    class Overwrite(LoopKeys):
        def store(self, module, loop):
            return super().store(module, 0)

    net = halting_net(halt="act").eval()
    check_cache(net)
    monkeypatch.setitem(LOOP_KEYS, "latest", Overwrite)
    wrong = halting_net(halt="act").eval()
    with pytest.raises(AssertionError, match="logits differ by (0.[1-9]|[1-9])"):
        check_cache(wrong)


@pytest.mark.parametrize("loop_keys, copies", (("latest", 3), ("per_loop", 3), ("share_first", 1)))
def test_cache_entries_per_iteration(loop_keys, copies):
    net = tiny(depth="loop", loops=3, loop_keys=loop_keys, halt="act").eval()
    cache = zoo.KVCache(net.config, 1, 6)
    with torch.no_grad():
        net(text(1, 6), cache=cache)
    kept = [key for key in cache.kept if not isinstance(key[0], str)]
    assert len(kept) == copies * 4


def test_with_residual_average_the_stream_is_the_mean_of_its_terms():
    """(embedding + sum of sublayer outputs) / (1 + their number), for each token with its own number of iterations."""
    for loops in (1, 3):
        net = halting_net(
            depth="loop", loops=loops, residual="average", norms="R", halt="threshold", looped="o", pattern="D"
        ).eval()
        net.halt.forward = lambda *args, halt=net.halt: Ponder.forward(halt, *args)
        added, embedding = [], []
        for block in net.blocks:
            block.residual = lambda x, y, n, x0, rule=block.residual, added=added: added.append(y) or rule(x, y, n, x0)
            block.register_forward_pre_hook(lambda module, args: embedding.append(args[1]))
        trunk = trunk_of(net, text(1, 6, 3))
        depth, got, total = trunk.loops_BT, trunk.states[0][0], embedding[0].clone()
        if (depth == loops).all():
            for y in added:
                total = total + y
            assert far(got, total / (1 + len(added))) < 1e-5
        rms = got.square().mean(-1).sqrt()
        assert (rms < 3 * (1 + 8 * depth) ** -0.5).all(), "the mean of independent terms shrinks like 1 / sqrt(count)"


def test_evaluation_may_have_another_number_of_iterations():
    x = text(2, 20, 6)
    trained, longer = (tiny(**LOOP | dict(loops=2, eval_loops=n)) for n in (0, 4))
    assert torch.equal(logits(trained.train(), x), logits(longer.train(), x))
    four = tiny(**LOOP | dict(loops=4)).eval()
    assert (
        torch.equal(logits(longer.eval(), x), logits(four, x))
        and far(logits(trained.eval(), x), logits(four, x)) > 1e-3
    )


def test_counts_include_every_iteration_of_active_tokens_only():
    net, x = halting_net(halt="ponder", looped="o", loops=3).eval(), text(2, 20, 6)
    depth = loops_of(net, x)
    stats = net(x).stats
    assert (stats["counts_LE"].sum(1) == 2 * depth.sum()).all() and stats["depth/loops"] == depth.float().mean()
    moe = halting_net(looped="o", loops=3, halt="none").train()
    assert (moe(x).stats["counts_LE"].sum(1) == 2 * 3 * 40).all()


def test_flops_include_every_iteration():
    once, thrice = (zoo.Config(**TINY | dict(depth="loop", loops=n, looped=".oo.")) for n in (1, 3))
    stack = zoo.Config(**TINY)
    head, mix = (6 * n for n in (64 * 32, 4 * 32))
    assert model.flops_per_token(once, 40) == model.flops_per_token(stack, 40) - mix
    stacks = [zoo.Config(**TINY | dict(n_layer=n, value_embeds=0)) for n in (2, 4)]  # of each window one or two layers
    layers = [model.flops_per_token(config, 40) - 6 * model.count_parameters(config)["head"] for config in stacks]
    assert layers[1] == 2 * layers[0] and model.flops_per_token(thrice, 40) == pytest.approx(
        head + layers[1] + 2 * layers[0]
    )
    assert model.count_parameters(once)["total"] == model.count_parameters(thrice)["total"]


@pytest.mark.parametrize("field, value, others, legal", (
    ("looped", "o.o", {}, "neighbours"), ("looped", ".", {}, "neighbours"), ("looped", "ox", {}, "letters o ."),
    ("loops", 0, {}, "at least 1"),
    ("eval_loops", -1, {}, "at least 0"), ("residual", "sub", {}, "add, average"), ("halt", "stop", {}, "act"),
    ("loop_keys", "all", {}, "latest"),
    ("ponder_prior", 1.0, {}, "between 0 and 1"), ("reinject", -1.0, {}, "at least 0"),
    ("router", "conv", dict(depth="loop", halt="act"), "no neighbours"),
    ("shared", "conv", dict(depth="loop", halt="act", num_shared_experts=1, mlp_ratio=3.0), "no neighbours"),
    ("importance_coef", 0.1, dict(depth="loop", halt="act"), "0 next to halt act")))  # fmt: skip
def test_bad_values_are_refused(field, value, others, legal):
    with pytest.raises(UserError, match=f"^{field} is {value!r}.*{legal}"):
        zoo.Config(**TINY | others | {field: value})


@pytest.mark.slow
@pytest.mark.parametrize("halt, coef, over", (("act", 0.1, 1), ("ponder", 0.01, 0)))
def test_counting_to_n_takes_n_iterations_and_their_flops(halt, coef, over):
    """ACT halts at most one iteration after n, as the remainder needs one; PonderNet at n."""
    toy = toys.counting(halt, coef, steps=600)
    loops, correlation, error = toys.depths(toy)
    assert correlation >= 0.95 and error < 0.1, (loops, error)
    assert sum(abs(n + over - loop) for n, loop in enumerate(loops, 1)) <= 3, loops
    batches = torch.full((2, 512), 1), torch.randint(1, 9, (2, 512), generator=rng(1)), torch.full((2, 512), 8)
    few, mixed, many = (toys.cost(toy, n_BT, rounds=1)[0] for n_BT in batches)
    mean = sum(loops) / len(loops)
    assert few / many == pytest.approx(loops[0] / loops[-1], rel=0.05)
    assert mixed / many == pytest.approx(mean / loops[-1], rel=0.2)  # rows are packed in steps of 64


def moeut(net: zoo.GPT, x):
    """Logits and balance loss of MoEUT (2405.16039) from its definition, token by token.

    SwitchHead attention and sigma-MoE: queries, keys and routers see the normed stream, values and experts the stream.
    A group of layers is repeated. The balance loss is minus the entropy of the mean choice, row by row."""
    c, p = net.config, dict(net.named_parameters())
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    cos, sin = ops.rotary_tables(torch.arange(x.size(1)), c.head_dim, torch.float32)
    near = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))
    all_logits, balance = [], [[] for _ in range(c.n_layer)]
    for row in x:
        h, T, H, E = rms(p["embed"][row]), len(row), c.n_head, c.attn_experts
        chosen = [[] for _ in range(c.n_layer)]
        for _, i in itertools.product(range(c.loops), range(c.n_layer)):
            of = lambda name, i=i: p[f"blocks.{i}.{name}"]

            def picked(source, score_TX, weight_XNK, k):
                """Sum over the k largest sigmoids of each token: sigmoid times matrix times source."""
                out = []
                for z, score in zip(source, score_TX.sigmoid()):
                    best = score.topk(k)
                    out.append(sum(s * (weight_XNK[e] @ z) for s, e in zip(best.values, best.indices)))
                return torch.stack(out)

            normed = rms(h)
            q, k = ((normed @ part.T).view(T, H, -1) for part in (of("attention.q"), of("attention.k")))
            q, k = (ops.rotate(z[None], cos, sin)[0] for z in (q, k))
            choose_v, choose_o = ((normed @ part.T).view(T, H, E) for part in of("attention.choice"))
            heads = []
            for head in range(H):
                own = slice(head * E, head * E + E)
                v = picked(h, choose_v[:, head], of("attention.values")[own], c.attn_top_k)
                score = q[:, head] @ k[:, head].T * c.attn_scale
                score = score.masked_fill((near < 0) | (near >= c.window_size), -torch.inf)
                heads.append(
                    picked(score.softmax(-1) @ v, choose_o[:, head], of("attention.outputs")[own], c.attn_top_k)
                )
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
    return (c.softcap * torch.tanh(z / c.softcap) + c.softcap)[..., :VOCAB], sum(
        torch.stack(rows).mean() for rows in balance
    )


def test_a_loop_of_routed_attention_and_sigma_moe_is_moeut():
    net = tiny(depth="loop", loops=3, n_layer=2, attention="R", norms="U", experts="relu", num_experts=6, top_k=3,
        mlp_ratio=3.0,
               router_noise=0.0, window="L", router_score="sigmoid", norm_topk_prob=0.0, entropy_coef=0.3,
               balance_coef=0.0, z_coef=0.0,
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
    want = {name: grad for name, grad in gradients(net, loss).items() if not name.endswith("stream_mix")}
    assert_same_gradients(gradients(net, net(x, y).loss), want)


def test_active_parameters_of_routed_attention_are_those_that_a_token_uses():
    config = zoo.Config(**TINY | dict(attention="R", pattern="D", attn_experts=4, attn_top_k=1))
    counts = model.count_parameters(config)
    matrices = 4 * 2 * (2 * 4 * 16 * 32)  # four layers, values and outputs, two heads of four
    tables = counts["embed"] + counts["value_embed"]
    assert counts["total"] - counts["active"] == matrices * 3 // 4 + tables * 63 // 64
    alone = dataclasses.replace(config, attn_experts=1)
    assert model.flops_per_token(config, 12) == model.flops_per_token(alone, 12) + 6 * 4 * 2 * 2 * 3 * 32


def test_tokens_that_choose_an_exit_halt_after_that_iteration():
    net, x = halting_net(halt="exit", looped="o", loops=3, window="L", **EXITS).eval(), text(2, 20, 5)
    chosen, depth = [], loops_of(net, x)
    for block in net.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: chosen.append(out[1][0].exits_T))
    logits(net, x)
    first = torch.stack(chosen[:4]).any(0).view(2, 20)  # first iteration: all are active
    assert torch.equal(depth == 1, first) and set(depth.unique().tolist()) == {1, 2, 3}
    assert net.balanced_E.tolist() == [1] * 7 + [0] * 2
    grads = gradients(net.train(), net(x, x).stats["router_loss"])
    assert (grads["blocks.3.ffn.router.gate"] != 0).any()
    with pytest.raises(UserError, match="halt is 'exit'; it must be another, or there must be an exit"):
        zoo.Config(**TINY | dict(depth="loop", halt="exit"))


PADDED = [dict(halt=halt) for halt in HALTS if halt != "exit"] + [dict(halt="exit", **EXITS)]
PADDED += [dict(depth="routed", halt="act", loops=4, layer_balance_coef=0.5)]
PADDED += [dict(depth="stack", importance_coef=0.3, load_coef=0.2, looped="o", halt="none")]


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("changes", PADDED, ids=str)
def test_rows_of_padding_count_in_no_statistic(changes, training):
    net = halting_net(**dict(entropy_coef=0.1, ponder_coef=0.5) | changes).train(training)
    x, y = text(4, 24, 6), text(4, 24, 7)
    x[2:] = EOT
    net.set_step(SEED, STEP)
    alone, padded = net(x[:2], y[:2]).stats, net(x, y, real_B=torch.tensor([True, True, False, False])).stats
    assert alone.keys() == padded.keys() and ("depth/loops" in alone) == (net.config.depth != "stack")
    assert alone["router_loss"] != 0
    for name in alone.keys() - {"ce"}:
        assert far(padded[name], alone[name]) < 1e-5, name


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_no_balance_draws_tokens_into_an_exit_or_out_of_it(score):
    net = halting_net(halt="exit", looped="o", loops=1, router_score=score, num_shared_experts=1, mlp_ratio=2.0,
                      entropy_coef=0.1, **EXITS).train()  # fmt: skip
    net.set_step(SEED, STEP)
    stats = net(text(2, 20, 6), text(2, 20, 7)).stats
    for loss in (stats["balance_loss"], sum(map(neg_entropy, trunk_stats(net)))):
        by_gate = gradients(net, loss)["blocks.3.ffn.router.gate"]
        assert by_gate[:7].abs().amax(1).min() > 1e-6 and by_gate[7:].abs().max() < 1e-7


def test_an_exits_load_moves_no_bias_and_counts_in_no_loss():
    net = tiny(experts="mlp*3,exit", mlp_ratio=1.0, top_k=1, bias_update_factor=0.1)
    for counts, direction in (((330, 330, 330, 10), (0, 0, 0, 0)), ((1, 1, 1, 997), (0, 0, 0, 0)),
                              ((500, 300, 100, 100), (-1, 0, 1, 0))):  # fmt: skip
        net.bias_LE.zero_()
        net.balance(torch.tensor([counts] * 4))
        assert far(net.bias_LE[0], 0.1 * torch.tensor(direction)) < 1e-6, counts
    losses = []
    for exits in (0.1, 0.7):
        load = torch.tensor([0.5, 0.3, 0.2, 0.0]) * (1 - exits) + torch.tensor([0.0, 0.0, 0.0, exits])
        net.load_WLE.copy_(load)
        losses.append(net(PACKED).stats["balance_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    net.load_WLE.copy_(torch.tensor([0.1, 0.1, 0.1, 0.7]))
    assert net(PACKED).stats["balance_loss"].item() == pytest.approx(1.0)  # as at any even load


CUTS = [dict(halt=halt) for halt in (*RULES, "none")] + [dict(halt="exit", **EXITS)]
CUTS += [dict(depth="routed", halt=halt, loops=4, bias=1.0) for halt in ("none", "act", "stick_breaking")]


@pytest.mark.parametrize("changes", CUTS, ids=str)
def test_gradients_do_not_depend_on_how_the_batch_is_cut(changes):
    """Though tokens halt: sums are divided by a constant, never by the micro-batch's number of active tokens."""
    net = halting_net(**dict(balance_coef=0.3, z_coef=0.1, entropy_coef=0.1, n_layer=3, looped=".oo") | changes).train()
    x, y = text(4, 24, 6), text(4, 24, 7)

    def summed_gradients(rows: int) -> dict:
        found = [gradients(net, step_loss(net, x[i : i + rows], y[i : i + rows], 24 * i) * rows / 4)
                 for i in range(0, 4, rows)]  # fmt: skip
        return {name: sum(part[name] for part in found) for name in found[0]}

    whole, cut = summed_gradients(4), summed_gradients(1)
    assert max(norm_error(cut[name], g) for name, g in whole.items() if g.norm() > 1e-6) < 3e-5
    assert norm_error(torch.cat([*map(torch.flatten, cut.values())]), torch.cat([*map(torch.flatten, whole.values())])) < 1e-5


def test_the_card_has_the_flops_of_an_iteration():
    config = zoo.Config(**TINY | LOOP)
    card = cost.model_card(config, 40)
    layers = (model.flops_per_token(dataclasses.replace(config, loops=4), 40) - model.flops_per_token(config, 40)) / 3
    assert f"loop, layers .oo., 3 times at most, halt none; each time {layers:,.0f} FLOPs" in card and layers > 0
    assert "depth" not in cost.model_card(zoo.Config(**TINY), 40)


CARDS = [dict(halt=halt, loop_keys=keys) for halt in RULES for keys in sorted(LOOP_KEYS)]
CARDS += [dict(halt="exit", **EXITS), dict(depth="routed"), dict(depth="routed", halt="act", route_by="first_token")]


@pytest.mark.parametrize("changes", but_every(4, CARDS), ids=name_of)
def test_the_card_of_every_depth_has_the_size_of_its_cache(changes):
    """On the meta device, where tensors have no values, no token halts."""
    config = zoo.Config(**zoo_fields(**LOOP | changes))
    assert "KV cache" in cost.model_card(config, 40)
    net = tiny(**LOOP | changes).eval()
    cache = zoo.KVCache(config, 1, 7)
    with torch.no_grad():
        net(text(1, 7), cache=cache)
    kept = sum(part[:, :1].nbytes for parts in cache.kept.values() for part in parts)
    assert (
        0 <= cost.cache_bytes_per_token(config) - kept <= 1
    )  # a flag of the last iteration, if no token was active in it
