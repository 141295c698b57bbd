"""Routers: each against its definition; scores, noise, previous logits, Shazeer's losses, the selection bias.

CPU, no network: `pytest tests/zoo/test_routers.py`.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, document_starts, far, rng, row_context, shaken, text, tiny

import model
import ops
import zoo
from cli import UserError
from zoo.routers import ROUTERS, SCORES, LinearRouter, linear_scan, smooth_load, squared_variation
from zoo.stats import route_stats


def router_of(name: str, **changes):
    config = zoo.Config(**TINY | dict(router=name, router_dim=16) | changes)
    return shaken(ROUTERS[name](config), 3).eval(), config


def test_top_1_does_not_normalise_its_gate():
    for score in SCORES:
        router, config = router_of("linear", router_score=score, top_k=1)
        route = router(torch.randn(1, 20, 32, generator=rng()), row_context(config, 20))
        assert far(route.weight_TK, SCORES[score].of(route.logits_TE).amax(-1, keepdim=True)) < 1e-6
        assert torch.autograd.grad(route.weight_TK.sum(), router.gate)[0].norm() > 1e-3


# -----------------------------------------------------------------------------
# Logits


def test_the_mlp_router_has_two_layers():
    router, config = router_of("mlp")
    x = torch.randn(1, 20, 32, generator=rng())
    assert far(router(x, row_context(config, 20)).logits_TE, (x[0] @ router.up.T).relu() @ router.gate.T) < 1e-5


def test_a_conv_router_of_kernel_one_is_the_linear_router():
    conv, config = router_of("conv", router_kernel=1)
    linear = LinearRouter(config).eval()
    linear.load_state_dict(conv.state_dict())
    x, ctx = torch.randn(1, 20, 32, generator=rng()), row_context(config, 20, [7])
    assert torch.equal(conv(x, ctx).logits_TE, linear(x, ctx).logits_TE)


@pytest.mark.parametrize("kernel", (2, 3, 5))
def test_a_conv_router_sees_the_last_tokens_of_the_document(kernel):
    router, config = router_of("conv", router_kernel=kernel)
    T, starts = 23, [1, 2, 9]
    x, ctx = torch.randn(1, T, 32, generator=rng()), row_context(config, T, starts)
    first, taps = document_starts(starts, T), router.gate.unflatten(1, (kernel, 32))
    inside = [[lag for lag in range(kernel) if t - lag >= first[t]] for t in range(T)]
    by_hand = torch.stack([sum(taps[:, lag] @ x[0, t - lag] for lag in lags) for t, lags in enumerate(inside)])
    assert far(router(x, ctx).logits_TE, by_hand) < 1e-5


def test_a_recurrent_router_is_a_loop_that_restarts_at_documents():
    router, config = router_of("recurrent")
    T, starts = 37, [1, 5, 6, 20]
    x, ctx = torch.randn(1, T, 32, generator=rng()), row_context(config, T, starts)
    h, rows = torch.zeros(16), []
    for t in range(T):
        z, v = (router.update @ x[0, t]).sigmoid(), router.value @ x[0, t]
        h = (1 - z) * (h if t not in [0, *starts] else torch.zeros(16)) + z * v
        rows.append(router.gate @ h)
    assert far(router(x, ctx).logits_TE, torch.stack(rows)) < 1e-5


def test_linear_scan_equals_a_loop_from_its_initial_state():
    a, b = torch.rand(2, 19, 3, generator=rng()), torch.randn(2, 19, 3, generator=rng(1))
    h = torch.randn(2, 3, generator=rng(2))
    out, state = linear_scan(a, b, h), h
    for t in range(19):
        state = a[:, t] * state + b[:, t]
        assert far(out[:, t], state) < 1e-5


def test_an_attention_router_is_one_head_over_window_and_document():
    router, config = router_of("attention", window_size=6)
    T, starts = 30, [4, 13]
    x, ctx = torch.randn(1, T, 32, generator=rng()), row_context(config, T, starts)
    q, k, v = (x[0] @ router.qkv.T).chunk(3, dim=1)
    unit = lambda z: z / z.square().mean(-1, keepdim=True).sqrt()
    first, rows = document_starts(starts, T), []
    for t in range(T):
        keys = slice(max(first[t], t - 5), t + 1)
        weights = (unit(q)[t] @ unit(k)[keys].T).softmax(0)  # queries and keys of length 4: scores up to 16
        rows.append(router.gate @ (weights @ v[keys]))
    assert far(router(x, ctx).logits_TE, torch.stack(rows)) < 1e-4


def test_router_residual_adds_the_logits_of_the_previous_moe_layer():
    """MoE++: through a learned matrix, past dense layers; zeros for the first."""
    net, calls = tiny(pattern="MDMM", router_residual=0.5).eval(), []
    routers = [block.ffn.router for block in net.blocks if hasattr(block.ffn, "router")]
    for router in routers:
        router.register_forward_hook(lambda module, args, route: calls.append((*args, route)))
    net(text(1, 20, 1))
    assert (calls[0][1].previous_logits_TE == 0).all()
    for router, (x, ctx, route), (_, _, previous) in zip(routers[1:], calls[1:], calls):
        assert torch.equal(ctx.previous_logits_TE, previous.logits_TE)
        assert far(route.logits_TE, x[0] @ router.gate.T + 0.5 * previous.logits_TE @ router.residual.T) < 1e-5
    assert tiny().blocks[0].ffn.router.residual is None


# -----------------------------------------------------------------------------
# Scores and noise


@pytest.mark.parametrize("power", (1.0, 0.0, 0.5))
@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_gates_are_the_kept_scores_over_a_power_of_their_sum(score, power):
    router, config = router_of("linear", router_score=score, norm_topk_prob=power)
    x = torch.randn(1, 50, 32, generator=rng())
    route = router(x, row_context(config, 50))
    all_TE = route.logits_TE.softmax(-1) if score == "softmax" else route.logits_TE.sigmoid()
    kept = all_TE.gather(1, route.expert_TK)
    assert torch.equal(route.expert_TK.sort().values, all_TE.topk(2).indices.sort().values)
    assert far(route.weight_TK, kept / kept.sum(-1, keepdim=True) ** power) < 1e-6
    if power == 1:
        assert far(route.weight_TK.sum(-1), torch.ones(50)) < 1e-6
    stats = route_stats(route, torch.zeros(4, dtype=torch.int64), None, decoding=False)
    assert far(stats.prob_E, (all_TE / all_TE.sum(-1, keepdim=True)).mean(0)) < 1e-6
    assert stats.prob_E.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "hash"])
def test_every_learned_router_has_weights_for_its_noise(name):
    router, config = router_of(name)
    x, ctx = torch.randn(1, 60, 32, generator=rng()), row_context(config, 60, [9])
    quiet, noisy = router(x, ctx), router.train()(x, ctx)
    assert far(noisy.logits_TE, quiet.logits_TE) < 1e-6 and not torch.equal(noisy.expert_TK, quiet.expert_TK)
    noisy.weight_TK.square().sum().backward()
    assert router.noise.grad.abs().sum() > 0 and router.gate.grad.abs().sum() > 0
    assert ROUTERS[name](dataclasses.replace(config, router_noise=0.0)).noise is None


@pytest.mark.parametrize("field, value, legal", (
    ("router_dim", 24, "a multiple of 16"), ("router_kernel", 0, "at least 1"), ("norm_topk_prob", -1.0, "at least 0"),
    ("router_score", "tanh", "one of softmax, sigmoid"),
    ("router", "convolution", "one of linear, hash, mlp, conv, recurrent, attention")))  # fmt: skip
def test_a_bad_router_is_one_sentence(field, value, legal):
    with pytest.raises(UserError, match=f"{field} is .*{legal}"):
        zoo.Config(**TINY | {field: value})


def test_flops_of_the_attention_router_include_its_scores():
    plain, attention = (zoo.Config(**TINY | dict(router=router, router_dim=16)) for router in ("linear", "attention"))
    weights = [model.count_parameters(config)["router"] for config in (plain, attention)]
    keys = sum(model.mean_keys(attention, letter, 64) for letter in attention.per_layer("window"))
    more = model.flops_per_token(attention, 64) - model.flops_per_token(plain, 64)
    assert more == pytest.approx(6 * (weights[1] - weights[0]) + 12 * keys * 16)


# -----------------------------------------------------------------------------
# Shazeer's losses


def test_importance_loss_is_the_squared_variation_of_summed_gates():
    router, config = router_of("linear", importance_coef=0.1)
    x = torch.randn(1, 40, 32, generator=rng())
    route = router(x, row_context(config, 40))
    sums = [0.0] * 4
    for e, w in zip(route.expert_TK.flatten().tolist(), route.weight_TK.flatten().tolist()):
        sums[e] += w
    mean = sum(sums) / 4
    by_hand = 0.1 * sum((s - mean) ** 2 for s in sums) / 4 / mean**2
    assert route.loss.item() == pytest.approx(by_hand, rel=1e-5)
    route.loss.backward()
    assert router.gate.grad.abs().sum() > 0


def test_smooth_load_is_the_probability_of_each_choice_under_new_noise():
    """Against many draws of the noise of one expert, while that of the others is kept."""
    router, config = router_of("linear", load_coef=0.1, router_noise=0.7)
    x, ctx = torch.randn(1, 6, 32, generator=rng()), row_context(config, 6)
    route = router.train()(x, ctx)
    std = 0.7 * F.softplus(x[0] @ router.noise.T)
    noisy = route.logits_TE + ops.hashed_normal(*ctx.noise_key, 4) * std
    probability, draws = torch.zeros(4), 20000
    for e in range(4):
        others = noisy.clone()
        others[:, e] = -math.inf
        second = others.topk(2).values[:, 1:]
        again = route.logits_TE[:, e : e + 1] + std[:, e : e + 1] * torch.randn(6, draws, generator=rng(e))
        probability[e] = (again > second).double().mean(1).sum()
    load = smooth_load(route.logits_TE, noisy, std, 2)
    assert far(load, probability) < 4.5 * 6**0.5 * 0.5 / draws**0.5
    assert route.loss.item() == pytest.approx(0.1 * squared_variation(load).item(), rel=1e-5)
    route.loss.backward()
    assert router.gate.grad.abs().sum() > 0 and router.noise.grad.abs().sum() > 0
    assert router.eval()(x, ctx).loss == 0  # undefined without noise


def test_router_losses_leave_out_exits():
    x_E = torch.tensor([3.0, 100.0, 100.0, 5.0])
    assert squared_variation(x_E, (1, 3)) == squared_variation(x_E[[0, 3]]) == 1 / 16
    net = tiny(experts="mlp*2,exit*2", top_k=2, importance_coef=0.3, load_coef=0.2)
    assert net.blocks[0].ffn.router.exits == (2, 4)


def test_router_losses_are_added_to_the_training_loss_once_per_layer():
    plain, both = (tiny(**coefs).train() for coefs in ({}, dict(importance_coef=0.3, load_coef=0.2)))
    x = text(2, 20, 1)
    a, b = plain(x, x), both(x, x)
    assert b.stats["router_loss"] > 0 and a.stats["router_loss"] == 0
    assert (b.loss - a.loss).item() == pytest.approx(b.stats["router_loss"].item(), rel=1e-4)
    assert both.eval()(x, x).loss.item() == pytest.approx(plain.eval()(x, x).loss.item())


@pytest.mark.parametrize("changes, message", (
    (dict(importance_coef=0.1, router="hash"), "importance_coef is 0.1; it must be 0 with router hash"),
    (dict(load_coef=0.1, router_noise=0.0), "load_coef is 0.1; it must be 0, or"),
    (dict(load_coef=0.1, top_k=4), "load_coef is 0.1; it must be 0, or"),
    (dict(bias_update_threshold=-1), "bias_update_threshold is -1")))  # fmt: skip
def test_losses_that_are_undefined_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        zoo.Config(**TINY | changes)


# -----------------------------------------------------------------------------
# Selection bias: threshold and speed


def test_the_bias_moves_after_its_threshold_of_tokens():
    net = zoo.build(
        zoo.Config(**TINY | dict(n_layer=2, value_embeds=0, bias_update_factor=0.1, bias_update_threshold=50))
    )
    counts = torch.tensor([[30, 10, 0, 0], [10, 10, 10, 10]])  # of 20 tokens, top-2
    for _ in range(2):
        net.balance(counts)
        assert (net.bias_LE == 0).all()
    net.balance(counts)  # 60 tokens by now
    assert net.bias_LE[0].sign().tolist() == [-1, 0, 1, 1] or (net.bias_LE[0, 0] < 0 < net.bias_LE[0, 2])
    assert (net.bias_LE[1] == 0).all() and (net.counted_LE == 0).all()
    moved = net.bias_LE.clone()
    net.balance(counts.flip(1))
    assert torch.equal(net.bias_LE, moved) and net.counted_LE.sum() == 80


def updates_until_balanced(score: str, factor: float, seed: int, limit: int = 400) -> int:
    """Optimizer steps of 2,048 tokens until every load is below 1.15 times the mean; top-6 of 16, skewed logits."""
    net = zoo.build(zoo.Config(**TINY | dict(
        n_layer=2, value_embeds=0, pattern="MD", num_experts=16, top_k=6, mlp_ratio=6.0, router_score=score,
        bias_update_factor=factor)))  # fmt: skip
    skew, generator = torch.randn(16, generator=rng(seed)) * 0.5, rng(seed + 1)
    for update in range(limit):
        scores = SCORES[score].of(torch.randn(2048, 16, generator=generator) + skew)
        counts = (scores + net.bias_LE[0]).topk(6).indices.flatten().bincount(minlength=16)
        if counts.max() / counts.float().mean() < 1.15:
            return update
        net.balance(counts[None])
    return limit


@pytest.mark.parametrize(
    "score, factor, listed", (("sigmoid", 0.001, 149), ("sigmoid", 0.01, 17), ("softmax", 0.001, 37))
)
def test_the_bias_balances_skewed_logits_in_the_known_number_of_updates(score, factor, listed):
    """149, 17 and 37 updates were measured for one draw of the skew; other draws differ by their extremes."""
    found = sorted(updates_until_balanced(score, factor, seed) for seed in range(5))
    assert 0.5 * listed < found[2] < 1.6 * listed, found


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_router_of_the_zoo_serves_the_core(name):
    """`import zoo` adds it to model.ROUTERS; the core's contexts do not say which tokens are real."""
    net = model.build(model.Config(**TINY | {"router": name})).train()
    ids = torch.randint(TINY["vocab_size"], (2, 32), generator=rng())
    loss = net(ids, ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
