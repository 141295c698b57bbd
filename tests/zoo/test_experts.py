"""Expert kinds and the MoE layer: every kind against its definition, exact zeros, FLOPs, balance, shared experts.

CPU, no network: `pytest tests/zoo/test_experts.py`.
"""

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import SEED, TINY, document_starts, far, rng, row_context, shaken, text, zoo_fields

import model
import ops
import zoo
from cli import UserError
from ops import norm
from tools.cost import model_card
from zoo.config import has_matmuls, routed_scale, width_of
from zoo.experts import WITHOUT_MATMULS, KANExperts
from zoo.gpt import TrunkOutput
from zoo.moe import MoE
from zoo.routers import Route
from zoo.stats import RouteStats

POOLS = (
    "mlp*2,identity,zero,noise,relu2",
    "zero,mlp,identity,mlp,noise*2,constant*2",
    "swiglu*2,mlp*2,constant",
    "kan*2,relu2,swiglu,mlp*2,zero*2,identity",
    "kan",
    "swiglu",
    "relu*2,mlp,exit",
)


def wide(**changes) -> zoo.Config:
    """A config of hidden width 72, where swiglu (48 wide) and kan (8 wide) have the FLOPs of an mlp exactly."""
    return zoo.Config(**zoo_fields(**dict(mlp_ratio=4.5) | changes))


def moe_layer(config: zoo.Config) -> MoE:
    return shaken(MoE(config, model.ALL_HERE))


class FixedRouter(torch.nn.Module):
    """Routes every token to given experts, with equal gates."""

    def __init__(self, expert_TK, num_experts: int):
        super().__init__()
        self.expert_TK, self.num_experts = expert_TK, num_experts

    def forward(self, x_BTD, ctx):
        weight_TK = torch.full(self.expert_TK.shape, 1 / self.expert_TK.size(1))
        return Route(self.expert_TK, weight_TK, torch.zeros(len(self.expert_TK), self.num_experts))


def layer_with_fixed_route(experts: str, expert_T: list[int]):
    """A layer of these experts in which token t has expert expert_T[t] alone, and its context."""
    config = wide(experts=experts, top_k=1, mlp_ratio=2.25)
    moe = moe_layer(config)
    moe.router = FixedRouter(torch.tensor(expert_T)[:, None], config.num_experts)
    return moe, row_context(config, len(expert_T))


# -----------------------------------------------------------------------------
# Against the definition


def spline(x: float, m: int) -> float:
    """The m-th cubic B-spline over 5 intervals of [-2, 2] and three more knots on either side, by Cox-de Boor."""
    knots = [-2 + 0.8 * (i - 3) for i in range(12)]

    def basis(i: int, order: int) -> float:
        if order == 0:
            return float(knots[i] <= x < knots[i + 1])
        left = (x - knots[i]) / (knots[i + order] - knots[i]) * basis(i, order - 1)
        return left + (knots[i + order + 1] - x) / (knots[i + order + 1] - knots[i + 1]) * basis(i + 1, order - 1)

    return basis(m, 3)


def kan_layer(x_D, weight_NF):
    """sum over inputs of w silu(x) + sum over m of c_m B_m(x); gradients of the splines by autograd."""
    return weight_NF @ KANExperts.features(x_D[None])[0]


def slow_expert(moe, kind: str, number: int, x, t: int, ctx, training: bool):
    """Expert `number` of its kind on one token."""
    if kind == "mlp":
        return moe.experts.down[number] @ (moe.experts.up[number] @ x).relu() ** 2
    if kind == "relu":
        return moe.relu.down[number] @ (moe.relu.up[number] @ x).relu()
    if kind == "swiglu":
        p = moe.swiglu
        return p.down[number] @ (F.silu(p.gate[number] @ x) * (p.up[number] @ x))
    if kind == "kan":
        hidden = kan_layer(x, moe.kan.up[number])
        normed = hidden / (hidden.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        return kan_layer(normed, moe.kan.down[number])
    if kind == "constant":
        a, b = (moe.constant.mix[number] @ x).softmax(0)
        return a * x + b * moe.constant.vector[number]
    if kind == "noise" and training:
        seed, step, layer, token_T = ctx.noise_key
        return x + ops.hashed_normal(seed, step, layer + 2**16, token_T[t : t + 1], len(x))[0] / 2
    return {"zero": x * 0, "exit": x * 0, "relu2": x.relu() ** 2}.get(kind, x)


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("experts", POOLS)
def test_a_pool_equals_a_loop_over_tokens(experts, training):
    T, config = 41, wide(experts=experts)
    moe, ctx = moe_layer(config).train(training), row_context(config, T)
    x, dy = torch.randn(1, T, 32, generator=rng(1)).requires_grad_(), torch.randn(T, 32, generator=rng(2))
    y, (stats,) = moe(x, ctx)
    route = moe.router(x, ctx)
    kinds = [(kind, number) for kind, count in config.expert_counts.items() for number in range(count)]
    rows = []
    for t, (experts_K, gates_K) in enumerate(zip(route.expert_TK.tolist(), route.weight_TK)):
        rows.append(sum(w * slow_expert(moe, *kinds[e], x[0, t], t, ctx, training) for e, w in zip(experts_K, gates_K)))
    slow = torch.stack(rows)
    assert far(y[0], slow) < 1e-5
    inputs = {"x": x, **dict(moe.named_parameters())}
    found = [torch.autograd.grad((z * dy).sum(), list(inputs.values()), allow_unused=True) for z in (y[0], slow)]
    for name, got, want in zip(inputs, *found):
        got, want = (torch.zeros_like(inputs[name]) if g is None else g for g in (got, want))
        assert (got - want).norm() < 1e-4 * want.norm() + 1e-4, name
    assert stats.counts_E.tolist() == route.expert_TK.flatten().bincount(minlength=config.num_experts).tolist()


def test_splines_equal_cox_de_boor_and_sum_to_one_on_the_grid():
    xs = [-3.5, -2.79, -2.0, -1.3, -0.4, 0.0, 0.33, 1.2, 1.999, 2.5, 2.81]
    features = KANExperts.features(torch.tensor(xs)[:, None])
    assert features.shape == (len(xs), 9) and far(features[:, 0], F.silu(torch.tensor(xs))) < 1e-6
    assert far(features[:, 1:], torch.tensor([[spline(x, m) for m in range(8)] for x in xs])) < 1e-5
    inside = torch.linspace(-2, 2, 101)[:, None]
    assert far(KANExperts.features(inside)[:, 1:].sum(1), torch.ones(101)) < 1e-5


def test_features_of_several_inputs_are_those_of_each():
    x = torch.randn(5, 3, generator=rng())
    together, apart = KANExperts.features(x), [KANExperts.features(column[:, None]) for column in x.T]
    assert torch.equal(together.unflatten(1, (9, 3)), torch.stack(apart, dim=2))


# -----------------------------------------------------------------------------
# Kinds without matmuls, one by one


@pytest.mark.parametrize("kind", WITHOUT_MATMULS)
def test_a_kind_without_matmuls_is_its_formula(kind):
    moe, ctx = layer_with_fixed_route(f"mlp,{kind}", [1] * 2000)
    x = torch.randn(1, 2000, 32, generator=rng())
    plain, noisy = moe.eval()(x, ctx)[0], moe.train()(x, ctx)[0]
    if kind == "constant":
        share = (x @ moe.constant.mix[0].T).softmax(-1)
        assert far(plain, share[..., :1] * x + share[..., 1:] * moe.constant.vector[0]) < 1e-5
    else:
        want = {"zero": torch.zeros_like(x), "exit": torch.zeros_like(x), "relu2": x.relu() ** 2}.get(kind, x)
        assert torch.equal(plain, want)
    if kind == "noise":
        noise = noisy - x
        assert abs(noise.mean()) < 0.01 and abs(noise.var() - 0.25) < 0.01 and torch.equal(noisy, moe(x, ctx)[0])
    else:
        assert torch.equal(noisy, plain)


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
def test_zero_is_exact_for_any_input_and_does_not_affect_other_tokens(bad):
    """A product with zero would be NaN, and so would a gradient through uninitialised rows."""
    moe, ctx = layer_with_fixed_route("mlp*2,swiglu,zero,identity,relu2,noise,constant", [0, 3, 2, 4, 1, 5, 6, 7, 3])
    x = torch.randn(1, 9, 32, generator=rng())
    with torch.no_grad():
        clean = moe.train()(x, ctx)[0]
        x[0, [1, 8]] = bad
    x.requires_grad_()
    y = moe(x, ctx)[0]
    assert (y[0, [1, 8]] == 0).all() and torch.equal(y, clean)
    grads = torch.autograd.grad(y.square().sum(), [x, *moe.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads) and (grads[0][0, [1, 8]] == 0).all()


def test_a_layer_in_which_all_tokens_choose_zero_adds_nothing():
    net, x = shaken(zoo.build(wide(experts="mlp*2,zero", top_k=1, mlp_ratio=2.25))).eval(), text(1, 20, 1)
    for block in net.blocks:
        block.ffn.router = FixedRouter(torch.full((20, 1), 2), 3)
    of_zero = net(x).logits
    with torch.no_grad():
        for block in net.blocks:
            block.ffn.experts.down.zero_()
            block.ffn.router = FixedRouter(torch.zeros(20, 1, dtype=torch.int64), 3)
    assert far(net(x).logits[..., :61], of_zero[..., :61]) < 1e-6


def test_noise_of_experts_and_routers_is_independent():
    moe, ctx = layer_with_fixed_route("mlp,noise", [1] * 4000)
    x = torch.randn(1, 4000, 32, generator=rng())
    noise = (moe.train()(x, ctx)[0] - x)[0]
    of_router = ops.hashed_normal(*ctx.noise_key, 32)
    assert abs((noise * of_router).mean()) < 0.5 * 4.5 / (4000 * 32) ** 0.5


# -----------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize("experts", POOLS[:4])
def test_measured_flops_are_those_of_the_selected_matmuls(experts, monkeypatch):
    """4 D F for each choice of an expert with matmuls, where row counts are not rounded up."""
    done = []
    mm = torch.mm

    def counted_mm(a, b, **out):
        done.append(2 * a.size(0) * a.size(1) * b.size(1))
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", counted_mm)
    monkeypatch.setattr(ops, "row_multiple", lambda n: 1)
    config = wide(experts=experts)
    moe, ctx, x = moe_layer(config).eval(), row_context(config, 300), torch.randn(1, 300, 32, generator=rng())
    with torch.no_grad():
        counts = moe(x, ctx)[1][0].counts_E.tolist()
    kinds = [kind for kind, count in config.expert_counts.items() for _ in range(count)]
    selected = sum(count for kind, count in zip(kinds, counts) if has_matmuls(kind))
    assert 0 < selected < 600 and sum(done) == 4 * 32 * 72 * selected


def test_the_card_counts_the_experts_that_a_token_uses():
    free, plain = wide(experts="mlp*6,identity,zero"), wide(num_experts=8)
    assert free.expert_share == plain.expert_share == 2 / 8
    with_matmuls, all_experts = (model.count_parameters(config)["expert"] for config in (free, plain))
    assert with_matmuls == all_experts * 6 / 8
    less = 6 * (all_experts - with_matmuls) * 2 / 8
    assert model.flops_per_token(free, 64) == model.flops_per_token(plain, 64) - less
    preferred = dataclasses.replace(free, free_eta=0.5)  # six shares of 1 and two of 2
    assert preferred.expert_share == 2 / 10
    text_ = "6 x 72 wide mlp, 1 x identity, 1 x zero (a token uses 1.20 with matmuls at even load)"
    assert text_ in model_card(preferred, 64)
    assert "4 x 72 wide mlp, top-2" in model_card(wide(), 64)


@pytest.mark.parametrize("hidden", (72, 144, 360, 512, 1536, 2048))
def test_other_kinds_have_the_flops_of_an_mlp(hidden):
    for kind, matrices in (("swiglu", 3), ("kan", 18)):
        width, flops = width_of(kind, hidden)
        assert width % 8 == 0 and flops == matrices * width / (2 * hidden) and abs(flops - 1) <= 0.05


# -----------------------------------------------------------------------------
# Configuration


def test_a_list_numbers_kinds_with_matmuls_first():
    config = wide(experts="zero, mlp*2,identity ,swiglu,mlp")
    assert list(config.expert_counts.items()) == [("mlp", 3), ("swiglu", 1), ("zero", 1), ("identity", 1)]
    assert wide().expert_counts == {"mlp": 4} and wide(experts="swiglu").expert_counts == {"swiglu": 4}
    assert zoo.Config(**dataclasses.asdict(config)) == config  # as read from a checkpoint's manifest


def test_num_experts_must_be_the_length_of_the_list():
    with pytest.raises(UserError, match=r"num_experts is 4; it must be 3, the number of experts in 'mlp\*2,zero'"):
        zoo.Config(**TINY | dict(experts="mlp*2,zero"))


def test_the_order_of_the_list_changes_nothing():
    lists = ("mlp*2,zero,identity", "zero,mlp,identity,mlp")
    a, b = (shaken(zoo.build(wide(experts=experts))) for experts in lists)
    assert torch.equal(a(text(1, 30, 1)).logits, b(text(1, 30, 1)).logits)


@pytest.mark.parametrize("experts, changes, message", (
    ("mlp*2,identiti", {}, r"experts is 'mlp\*2,identiti'; it must be names out of mlp, swiglu, kan, relu, identity"),
    ("", {}, "it must be names out of"), ("mlp,,zero", {}, "it must be names out of"),
    ("mlp*x", {}, "it must be names out of"),
    ("zero,identity", {}, "at least one that has matmuls: mlp, swiglu, kan, relu"),
    ("mlp*2,kan", dict(num_experts=3),
     "without kan: next to an mlp of hidden width 64 its own, a multiple of 8, would be 8 and its FLOPs 1.12 times"),
    ("mlp", dict(top_k=5, mlp_ratio=5.0), "top_k is 5; it must be at most num_experts = 4"),
))  # fmt: skip
def test_a_bad_list_is_one_sentence(experts, changes, message):
    with pytest.raises(UserError, match=message):
        zoo.Config(**TINY | dict(experts=experts) | changes)


def test_free_eta_is_above_zero():
    for value in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match="free_eta"):
            zoo.Config(**TINY | dict(free_eta=value))


# -----------------------------------------------------------------------------
# Balance


def test_the_balance_loss_counts_loads_of_one_over_eta_as_even():
    config = wide(experts="mlp*2,zero,identity", free_eta=0.5)
    net = zoo.build(config)
    assert config.expert_etas == [1, 1, 0.5, 0.5]
    even = torch.tensor([1, 1, 2, 2]) / 6
    with torch.no_grad():
        net.load_WLE.copy_(even.expand_as(net.load_WLE))
    layer = RouteStats(torch.zeros(4, dtype=torch.int64), even, torch.zeros(()), torch.zeros(()))
    by_hand = 4 * sum(eta * f * f for eta, f in zip(config.expert_etas, even.tolist()))
    assert net.summary(TrunkOutput([], [layer] * 4), 1)["balance_loss"] == pytest.approx(by_hand)
    p = torch.full((4,), 0.25, requires_grad=True)
    net.summary(TrunkOutput([], [layer._replace(prob_E=p)] * 4), 1)["balance_loss"].backward()
    assert p.grad.tolist() == pytest.approx([p.grad[0].item()] * 4)  # at even load no expert is preferred


@pytest.mark.parametrize("eta", (1.0, 0.5))
def test_the_bias_moves_loads_to_their_share(eta):
    """Skewed scores of 16 experts, top-2 of 4,096 tokens; the last four have no matmuls and a load of 1 / eta."""
    fields = dict(
        n_layer=2, value_embeds=0, pattern="MD", experts="mlp*12,zero*4", free_eta=eta, bias_update_factor=0.002
    )
    net, want = zoo.build(zoo.Config(**zoo_fields(**fields))), torch.tensor([1.0] * 12 + [1 / eta] * 4)
    want /= want.sum()
    score = (torch.randn(4096, 16, generator=rng()) + torch.randn(16, generator=rng(1)) * 0.5).softmax(-1)
    for _ in range(400):
        counts = (score + net.bias_LE[0]).topk(2).indices.flatten().bincount(minlength=16)
        net.balance(counts[None])
    load = counts / counts.sum()
    assert ((load - want).abs() / want).max() < 0.15, (load, want)
    assert net.bias_LE.mean().abs() < 1e-6


# -----------------------------------------------------------------------------
# Compiled, trained


@pytest.mark.slow
def test_a_mixed_pool_compiles_whole_and_only_once():
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine, so --compile is not offered")
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    config = wide(experts=POOLS[3], dtype="bf16", window_size=64)
    eager, compiled = (shaken(zoo.build(config)).train() for _ in range(2))
    compiled.blocks[2].compile(backend=backend, fullgraph=True, dynamic=False)
    for step in range(3):
        x, y = text(1, 128, step), text(1, 128, 50 + step)
        losses = []
        for net in (eager, compiled):
            net.set_step(SEED, step)
            losses.append(net(x, y).loss)
        losses[1].backward()
        assert abs(losses[0] - losses[1]) < 1e-2 and backend.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_every_kind_learns(dtype):
    """A model of all kinds fits a short text; every parameter changes, every kind gets tokens."""
    net = zoo.build(wide(experts="mlp*2,swiglu,kan,constant,identity,zero,noise,relu2", dtype=dtype)).train()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    x, y = text(2, 48, 3), text(2, 48, 4)
    losses, chosen = [], 0
    for step in range(30):
        net.set_step(SEED, step)
        out = net(x, y)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        net.balance(out.stats["counts_LE"])
        losses.append(out.stats["ce"].item())
        chosen = chosen + out.stats["counts_LE"].sum(0)
    assert losses[-1] < losses[0] - 1 and (chosen > 0).all()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


def test_parameter_kinds_of_experts():
    kinds = zoo.build(wide(experts="mlp*2,swiglu,kan,constant")).parameter_kinds()
    of = lambda kind: {name.partition("ffn.")[2] for name, k in kinds.items() if k == kind and "ffn" in name}
    with_matmuls = {"experts.up", "experts.down", "swiglu.gate", "swiglu.up", "swiglu.down", "kan.up", "kan.down"}
    assert of("expert") == with_matmuls
    assert of("router") == {"router.gate", "router.noise", "constant.mix"} and of("scalar") == {"constant.vector"}


# -----------------------------------------------------------------------------
# Shared experts and the scale of the routed sum


@pytest.mark.parametrize("kind, kernel", (("mlp", 3), ("conv", 1), ("conv", 3)))
def test_a_shared_expert_is_added_to_the_scaled_routed_sum(kind, kernel):
    T, starts = 25, [3, 4, 11]
    fields = dict(num_shared_experts=2, mlp_ratio=4.0, shared=kind, shared_kernel=kernel, routed_scale=3.0)
    config = zoo.Config(**zoo_fields(**fields))
    moe, ctx, x = moe_layer(config).eval(), row_context(config, T, starts), torch.randn(1, T, 32, generator=rng())
    with torch.no_grad():
        both = moe(x, ctx)[0]
        p, first = moe.shared, document_starts(starts, T)
        if kind == "mlp":
            shared = [p.down @ (p.up @ x[0, t]).relu() ** 2 for t in range(T)]
        else:
            taps = p.gate.unflatten(1, (kernel, 32))
            gates = [
                sum(taps[:, lag] @ x[0, t - lag] for lag in range(kernel) if t - lag >= first[t]) for t in range(T)
            ]
            shared = [p.down @ (F.silu(gate) * (p.up @ x[0, t])) for t, gate in enumerate(gates)]
        moe.shared, moe.routed_scale = None, 1.0
        assert far(both[0], torch.stack(shared) + 3 * moe(x, ctx)[0][0]) < 1e-5
    assert {name for name, _ in p.named_parameters()} == {"up", "down"} | ({"gate"} if kind == "conv" else set())


def test_shared_and_routed_experts_together_cost_the_dense_mlp():
    for shared, tolerance in (("mlp", 0.0), ("conv", 0.05)):
        config = zoo.Config(**TINY | dict(num_shared_experts=1, mlp_ratio=7.5, shared=shared))  # hidden 80
        dense = dataclasses.replace(config, pattern="D")
        assert config.hidden_size == 80 and zoo.build(dense).blocks[0].ffn.up.shape == (240, 32)
        router = 6 * model.count_parameters(config)["router"]
        ratio = (model.flops_per_token(config, 64) - router) / model.flops_per_token(dense, 64)
        assert abs(ratio - 1) <= tolerance
        assert zoo.build(config).parameter_kinds()["blocks.0.ffn.shared.up"] == "matrix"


@pytest.mark.parametrize("routed, top_k, shared, score, power, known", (
    (160, 6, 2, "softmax", 0.0, 16.02), (256, 8, 1, "sigmoid", 1.0, 2.83), (64, 6, 1, "sigmoid", 1.0, 2.446),
    (8, 2, 1, "softmax", 1.0, 1.35), (16, 6, 1, "softmax", 0.0, 3.00), (64, 6, 1, "sigmoid", 0.0, 0.48)))  # fmt: skip
def test_the_automatic_scale_is_that_of_known_models(routed, top_k, shared, score, power, known):
    """DeepSeek-V2 has 16, -V3 2.8 (it uses 2.5), Moonlight 2.446; the other three are from another simulation."""
    config = zoo.Config(
        n_embd=64, n_head=1, n_layer=2, value_embeds=0, mlp_ratio=(top_k + shared) / 8, num_experts=routed, top_k=top_k,
        num_shared_experts=shared, router_score=score, norm_topk_prob=power, routed_scale="auto")  # fmt: skip
    assert routed_scale(config) == pytest.approx(known, rel=0.01)
    assert f"routed sum x {routed_scale(config):.3f}" in model_card(config, 128)


def test_routed_scale_is_a_number_or_auto():
    shared = TINY | dict(num_shared_experts=1, mlp_ratio=3.0)
    for number in (1.0, 1, 0.5, 0):
        assert routed_scale(zoo.Config(**shared | dict(routed_scale=number))) == number
    assert routed_scale(zoo.Config(**TINY | dict(routed_scale="auto"))) == 1
    auto = zoo.Config(**shared | dict(routed_scale="auto"))
    assert routed_scale(auto) > 1.2
    assert routed_scale(dataclasses.replace(auto, router="hash")) == pytest.approx(2**0.5)
    for bad in ("automatic", "1.0", -1.0, ""):
        with pytest.raises(UserError, match="routed_scale is .*; it must be auto or a number"):
            zoo.Config(**TINY | dict(routed_scale=bad))


def test_with_the_automatic_scale_routed_and_shared_sums_are_of_one_length():
    """At random weights, all experts alike."""
    config = zoo.Config(
        n_embd=128, n_head=1, head_dim=64, n_layer=2, value_embeds=0, mlp_ratio=3.0, num_experts=16, top_k=2,
        num_shared_experts=1, routed_scale="auto", dtype="fp32")  # fmt: skip
    moe, x = MoE(config, model.ALL_HERE).eval(), norm(torch.randn(1, 800, 128, generator=rng()))
    with torch.no_grad():
        for name, p in moe.named_parameters():
            p.normal_(generator=rng(len(name))).mul_(p.size(-1) ** -0.5)
        ctx = row_context(config, 800)
        shared, moe.shared = moe.shared, None
        routed = moe(x, ctx)[0]
    assert 0.8 < routed.norm() / shared(x, ctx).norm() < 1.25
