"""model.py: causality, sparse experts against dense ones, gradients against slow references.

All parameters of these small fp32 models are random, so no zero initial value hides a mistake. Nothing imports the zoo.
CPU, no network: `pytest tests/core/test_model.py`."""

import dataclasses
import itertools
import math
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from core_helpers import (
    CORE_BUILDS,
    EOT,
    NO_AUX,
    PACKED,
    SEED,
    STEP,
    TINY,
    VOCAB,
    LargestTensor,
    assert_same_gradients,
    build_mask,
    cached,
    check_cache,
    check_documents,
    check_future,
    check_prefixes,
    check_rows,
    core,
    documents_like,
    far,
    gradients,
    logits,
    name_of,
    norm_error,
    rng,
    same,
    settled,
    shaken,
    slow_rows,
    slow_visible,
    step_loss,
    text,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
import ops
from cli import UserError
from model import ALL_HERE, PRESETS, BlockedMask, Config, DenseMask, FlexMask, LinearRouter, Route


def fresh(**changes):
    """A tiny model with its own initial values."""
    return model.build(Config(**TINY | changes))


# -----------------------------------------------------------------------------
# 1. Nothing leaks between tokens


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("build", CORE_BUILDS, ids=name_of)
def test_logits_depend_on_earlier_tokens_of_the_document_alone(build, training):
    net = core(**build).train(training)
    check_prefixes(net, PACKED)
    check_future(net, PACKED)
    check_rows(net, PACKED)
    check_documents(net, PACKED)


def test_the_checks_find_real_differences():
    """A changed past moves the logits by far more than the tolerance of the checks."""
    net, other = core().eval(), PACKED.clone()
    other[1, 13] = (other[1, 13] + 1) % EOT
    moved = (logits(net, other) - logits(net, PACKED)).abs().amax(-1)[1]
    assert (moved[13:] > 1e-3).all() and (moved[:13] == 0).all()


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_forward_changes_no_state(training):
    net = core().train(training)
    net.set_step(SEED, STEP)
    before = {name: t.clone() for name, t in itertools.chain(net.named_parameters(), net.named_buffers())}
    first, state = net(PACKED, PACKED), torch.get_rng_state()
    second = net(PACKED, PACKED)
    assert torch.equal(first.loss, second.loss) and torch.equal(state, torch.get_rng_state())
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        assert torch.equal(tensor, before[name]), name


# Leaks on purpose: routers that could be written in good faith.


def ahead(x_BTD):
    return F.pad(x_BTD[:, 1:], (0, 0, 0, 1))


def behind(x_BTD):
    return F.pad(x_BTD[:, :-1], (0, 0, 1, 0))


class SamePadConv(LinearRouter):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + behind(x_BTD) + ahead(x_BTD), ctx)


class FlatConv(LinearRouter):
    """Causal, but over the rows laid end to end."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + behind(x_BTD.flatten(0, 1)[None]).view_as(x_BTD), ctx)


class CausalConv(LinearRouter):
    """Causal within the row, but across documents, and without a state for decoding."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + behind(x_BTD), ctx)


class MeanOverSequence(LinearRouter):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + x_BTD.mean(1, keepdim=True), ctx)


class ExpertChoice(LinearRouter):
    """Each expert first takes the tokens of the row with its largest logits."""

    def forward(self, x_BTD, ctx):
        logits_BTE = F.linear(x_BTD.float(), self.gate)
        taken = logits_BTE.topk(max(1, x_BTD.size(1) * self.top_k // logits_BTE.size(2)), dim=1).indices
        score_BTE = logits_BTE.softmax(-1) + torch.zeros_like(logits_BTE).scatter(1, taken, 1.0)
        logits_TE = logits_BTE.flatten(0, 1)
        expert_TK = score_BTE.flatten(0, 1).topk(self.top_k).indices
        return Route(expert_TK, logits_TE.gather(1, expert_TK).softmax(-1), logits_TE)


class OwnCounts(LinearRouter):
    """A balance bias made from this very batch."""

    def forward(self, x_BTD, ctx):
        counts_E = super().forward(x_BTD, ctx).expert_TK.flatten().bincount(minlength=len(ctx.bias_E))
        return super().forward(x_BTD, ctx._replace(bias_E=ctx.bias_E - counts_E / counts_E.sum()))


class Capacity(LinearRouter):
    """First come, first served over the flattened batch."""

    def forward(self, x_BTD, ctx):
        route = super().forward(x_BTD, ctx)
        one_hot_RE = F.one_hot(route.expert_TK.flatten(), route.logits_TE.size(1))
        position_TK = (one_hot_RE.cumsum(0) * one_hot_RE).sum(-1).view_as(route.expert_TK)
        return route._replace(weight_TK=route.weight_TK * (position_TK <= 8))


class LastTokenExit(LinearRouter):
    """The last token decides whether the experts of the whole row run."""

    def forward(self, x_BTD, ctx):
        route = super().forward(x_BTD, ctx)
        runs_B = x_BTD[:, -1, 0] > 0
        return route._replace(weight_TK=route.weight_TK * runs_B.repeat_interleave(x_BTD.size(1))[:, None])


class Unseeded(LinearRouter):
    """Noise of torch's own generator, in evaluation too."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + torch.randn_like(x_BTD), ctx)


class RowNoise(LinearRouter):
    """Noise by the token's number in the micro-batch instead of the global batch."""

    def forward(self, x_BTD, ctx):
        token_T = torch.arange(x_BTD[..., 0].numel())
        return super().forward(x_BTD, ctx._replace(noise_key=(*ctx.noise_key[:3], token_T)))


LEAKS = [
    (SamePadConv, check_prefixes), (SamePadConv, check_future),
    (MeanOverSequence, check_prefixes), (MeanOverSequence, check_future),
    (ExpertChoice, check_prefixes), (ExpertChoice, check_future),
    (OwnCounts, check_prefixes), (OwnCounts, check_future), (OwnCounts, check_rows),
    (Capacity, check_rows), (FlatConv, check_rows),
    (LastTokenExit, check_prefixes), (LastTokenExit, check_future),
    (CausalConv, check_documents), (CausalConv, check_cache),
]  # fmt: skip


@pytest.mark.parametrize("leak, check", LEAKS, ids=lambda value: value.__name__)
def test_a_planted_leak_is_caught(monkeypatch, leak, check):
    monkeypatch.setitem(model.ROUTERS, "leak", leak)
    with pytest.raises(AssertionError, match="logits differ"):
        check(core(router="leak").eval(), *([] if check is check_cache else [PACKED]))


# -----------------------------------------------------------------------------
# 2. Noise of the router


def check_eval_is_deterministic(net):
    net.eval()
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net.set_step(seed=seed, step=10 * seed, first_token=1000 * seed)
        outs.append(net(PACKED).logits)
    assert torch.equal(*outs), "evaluation is random"


@pytest.mark.parametrize("build", CORE_BUILDS, ids=name_of)
def test_evaluation_is_deterministic_under_any_seed_and_step(build):
    check_eval_is_deterministic(core(**build))


def test_noise_in_evaluation_is_caught(monkeypatch):
    monkeypatch.setitem(model.ROUTERS, "leak", Unseeded)
    with pytest.raises(AssertionError, match="random"):
        check_eval_is_deterministic(core(router="leak"))


def test_noise_is_drawn_in_training_only_and_can_be_switched_off():
    noisy, quiet = core(), core(router_noise=0.0)
    assert not torch.equal(logits(noisy.train(), PACKED), logits(noisy.eval(), PACKED))
    state = {name: value for name, value in noisy.state_dict().items() if not name.endswith("router.noise")}
    quiet.load_state_dict(state)
    assert torch.equal(logits(quiet.train(), PACKED), logits(quiet.eval(), PACKED))
    assert torch.equal(logits(noisy.eval(), PACKED), logits(quiet.eval(), PACKED))


def check_noise_survives_a_split(net):
    x = text(4, 12, 3)
    whole, sure = logits(net.train(), x, 96), settled(net, x, 96)
    parts = torch.cat([logits(net, x[:1], 96), logits(net, x[1:], 96 + 12)])
    same(parts, whole, sure, "split into micro-batches")


def test_training_noise_does_not_depend_on_how_the_batch_is_cut():
    check_noise_survives_a_split(core())


def test_noise_by_position_in_the_micro_batch_is_caught(monkeypatch):
    monkeypatch.setitem(model.ROUTERS, "leak", RowNoise)
    with pytest.raises(AssertionError, match="logits differ"):
        check_noise_survives_a_split(core(router="leak"))


@pytest.mark.parametrize("change", (dict(seed=6), dict(step=8), dict(first_token=1)), ids=name_of)
def test_training_noise_depends_on_seed_step_and_token_number(change):
    net, key = core().train(), dict(seed=SEED, step=STEP, first_token=0)
    outs = []
    for values in (key, key | change):
        net.set_step(**values)
        outs.append(net(PACKED).logits[..., :VOCAB])
    assert (outs[0] - outs[1]).abs().max() > 1e-2


# -----------------------------------------------------------------------------
# 3. Sparse dispatch against a loop over tokens


def moe_context(config, T, training_step=STEP):
    key = (torch.tensor(SEED), torch.tensor(training_step), torch.tensor(0), torch.arange(T))
    return model.Context(None, None, None, None, None, None, key, torch.zeros(config.num_experts), None)


def slow_moe(moe, x_TD, ctx, training: bool):
    """Token by token and choice by choice, from the definition; of the model only parameters and noise are used."""
    gate, noise, up, down = moe.router.gate, moe.router.noise, moe.experts.up, moe.experts.down
    normal = ops.hashed_normal(*ctx.noise_key, len(gate))
    ys, chosen = [], []
    for t, x in enumerate(x_TD):
        h = gate @ x
        if training:
            h = h + normal[t] * torch.log1p(torch.exp(noise @ x))
        score = torch.exp(h - h.max()) / torch.exp(h - h.max()).sum() + ctx.bias_E
        picks = sorted(range(len(gate)), key=lambda e: -score[e].item())[: moe.router.top_k]
        total = torch.exp(h).sum() if len(picks) == 1 else sum(torch.exp(h[e]) for e in picks)
        y = 0
        for e in picks:
            hidden = up[e] @ x
            y = y + torch.exp(h[e]) / total * (down[e] @ torch.where(hidden > 0, hidden, 0.0) ** 2)
        ys.append(y)
        chosen.append(picks)
    return torch.stack(ys), chosen


def check_dispatch(E: int, k: int, training=False, bias=0.0, T=23, **changes):
    config = Config(**TINY | dict(num_experts=E, top_k=k) | changes)
    moe, ctx = shaken(model.MoE(config, ALL_HERE)).train(training), moe_context(config, T)
    ctx.bias_E[: E // 2] += bias
    x = torch.randn(1, T, 32, generator=rng(E)).requires_grad_()
    dy = torch.randn(T, 32, generator=rng(k))
    (fast, (stats,)), (slow, chosen) = moe(x, ctx), slow_moe(moe, x[0], ctx, training)
    assert far(fast[0], slow) < 1e-5, "outputs differ"
    inputs = {"x": x, **dict(moe.named_parameters())}
    found = [torch.autograd.grad((y * dy).sum(), list(inputs.values()), allow_unused=True) for y in (fast[0], slow)]
    for name, got, want in zip(inputs, *found):
        got, want = (torch.zeros_like(inputs[name]) if g is None else g for g in (got, want))
        close = (got - want).norm() < 1e-4 * want.norm() + 1e-4  # with one choice the gate's is 0, up to rounding
        assert close, f"gradients of {name} differ"
    counts = torch.bincount(torch.tensor(chosen).flatten(), minlength=E)
    assert torch.equal(stats.counts_E, counts)
    return counts, dict(zip(inputs, found[0]))


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("E, k", ((1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (5, 3)))
def test_sparse_experts_equal_a_loop_over_tokens(E, k, training):
    check_dispatch(E, k, training, mlp_ratio=3.0 if k == 3 else 4.0)


@pytest.mark.parametrize("E, k", ((4, 1), (4, 2), (8, 2)))
def test_an_expert_without_tokens_gets_an_exactly_zero_gradient(E, k):
    counts, grads = check_dispatch(E, k, bias=-10.0)
    assert (counts[: E // 2] == 0).all() and counts.sum() == 23 * k
    for name in ("experts.up", "experts.down"):
        assert (grads[name][: E // 2] == 0).all() and grads[name][E // 2 :].abs().sum() > 0


def test_a_single_expert_may_take_every_token():
    counts, _ = check_dispatch(4, 1, bias=0.0, T=1)
    assert counts.sum() == 1
    config = Config(**TINY | dict(top_k=1))
    moe, ctx = shaken(model.MoE(config, ALL_HERE)).eval(), moe_context(config, 50)
    ctx.bias_E[2] = 10
    x = torch.randn(1, 50, 32, generator=rng(1))
    (y, (stats,)), up, down = moe(x, ctx), moe.experts.up[2], moe.experts.down[2]
    gate_TK = (x[0] @ moe.router.gate.T).softmax(-1)[:, 2:3]
    assert stats.counts_E.tolist() == [0, 0, 50, 0] and far(y, (x @ up.T).relu().square() @ down.T * gate_TK) < 1e-5


def test_a_token_without_an_expert_gets_zeros_and_counts_nowhere():
    config = Config(**TINY)
    moe, x_TD = shaken(model.MoE(config, ALL_HERE)).eval(), torch.randn(9, 32, generator=rng(1))
    route = moe.router(x_TD[None], moe_context(config, 9))
    valid_T = torch.arange(9) % 3 > 0
    masked = route._replace(
        expert_TK=route.expert_TK.where(valid_T[:, None], 4), weight_TK=route.weight_TK * valid_T[:, None]
    )

    def experts(rows_RD, ends_E):  # rows past the last end are uninitialised memory
        return torch.where((torch.arange(len(rows_RD)) < ends_E[-1])[:, None], moe.experts(rows_RD, ends_E), 0)

    y_TD, counts_E = model.dispatch(x_TD, masked, experts)
    whole_TD, _ = model.dispatch(x_TD, route, moe.experts)
    assert far(y_TD[valid_T], whole_TD[valid_T]) < 1e-6 and (y_TD[~valid_T] == 0).all()
    assert torch.equal(counts_E, route.expert_TK[valid_T].flatten().bincount(minlength=4))


def test_a_shared_expert_is_added_to_the_routed_ones():
    config = Config(**TINY | dict(num_shared_experts=1, shared_dim=24))
    moe, ctx, x = (
        shaken(model.MoE(config, ALL_HERE)).eval(),
        moe_context(config, 20),
        torch.randn(1, 20, 32, generator=rng(1)),
    )
    (whole, _), shared = moe(x, ctx), moe.shared
    assert shared.up.shape == (24, 32)
    moe.shared = None
    assert far(whole, moe(x, ctx)[0] + (x @ shared.up.T).relu().square() @ shared.down.T) < 1e-5


real_dispatch, real_combine = model.dispatch, ops.Combine


class HalfGather(torch.autograd.Function):
    """Backward without all but the first choice."""

    @staticmethod
    def forward(ctx, x_TD, token_R, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TD[token_R]

    @staticmethod
    def backward(ctx, drows_RD):
        return drows_RD[ctx.saved_tensors[0][:, 0]], None, None


class UngatedCombine(torch.autograd.Function):
    """Backward without the gates."""

    forward = staticmethod(real_combine.forward)

    @staticmethod
    def backward(ctx, dy_TD):
        rows_RD, weight_TK, slot_R, row_TK = ctx.saved_tensors
        dy_RD = dy_TD[slot_R // weight_TK.size(1)]
        return dy_RD, (rows_RD * dy_RD).sum(-1)[row_TK], None, None


def with_route(change):
    return model, "dispatch", lambda x, route, experts: real_dispatch(x, change(route), experts)


PLANTED = {
    "gates swapped": with_route(lambda route: route._replace(weight_TK=route.weight_TK.flip(1))),
    "tokens permuted": with_route(lambda route: route._replace(expert_TK=route.expert_TK.roll(1, 0))),
    "experts shifted": with_route(lambda route: route._replace(expert_TK=(route.expert_TK + 1) % 4)),
    "second choice lost": with_route(lambda route: Route(route[0][:, :1], route[1][:, :1], route[2])),
    "gather's backward halved": (ops, "Gather", HalfGather),
    "combine's backward without gates": (ops, "Combine", UngatedCombine),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_dispatch_error_is_caught(planted, monkeypatch):
    monkeypatch.setattr(*PLANTED[planted])
    with pytest.raises(AssertionError, match="differ"):
        check_dispatch(4, 2)


# -----------------------------------------------------------------------------
# 4. One expert equals the dense MLP


def copied(sparse, dense):
    """The dense model with the sparse one's weights."""
    sparse_parameters = dict(sparse.named_parameters())
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(of_the_expert(sparse_parameters, name))
    return dense


def of_the_expert(sparse: dict, name: str):
    return sparse[name] if name in sparse else sparse[name.replace("ffn.", "ffn.experts.")][0]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_one_expert_equals_the_dense_twin_exactly(dtype):
    one = dict(num_experts=1, top_k=1, dtype=dtype, **NO_AUX)
    sparse = core(pattern="M", **one)
    dense = copied(sparse, core(seed=99, pattern="D", **one))
    y = text(2, 18, 5)
    for training in (False, True):
        for net in (sparse, dense):
            net.train(training).set_step(SEED, STEP)
        assert torch.equal(sparse(PACKED).logits, dense(PACKED).logits)
        losses = [net(PACKED, y).loss for net in (sparse, dense)]
        assert torch.equal(*losses)
        sparse_grads, dense_grads = gradients(sparse, losses[0]), gradients(dense, losses[1])
        for name, grad in dense_grads.items():
            assert norm_error(of_the_expert(sparse_grads, name), grad) < (1e-6 if dtype == "fp32" else 1e-2), name
        for layer in range(4):
            assert (sparse_grads[f"blocks.{layer}.ffn.router.gate"] == 0).all()


# -----------------------------------------------------------------------------
# 5. Routes


def recorded_routes(monkeypatch) -> list[Route]:
    """Routes of all later calls of dispatch."""
    routes = []
    record = lambda x, route, experts: (routes.append(route), real_dispatch(x, route, experts))[1]
    monkeypatch.setattr(model, "dispatch", record)
    return routes


@pytest.mark.parametrize("E, k", ((4, 2), (8, 3), (5, 2), (4, 4)))
def test_each_token_has_k_distinct_experts_and_gates_that_sum_to_one(E, k, monkeypatch):
    routes = recorded_routes(monkeypatch)
    counts_LE = core(num_experts=E, top_k=k, mlp_ratio=3.0, pattern="DM").train()(PACKED).stats["counts_LE"]
    assert len(routes) == 2 and counts_LE.shape == (2, E) and counts_LE.dtype == torch.int64
    for route, counts_E in zip(routes, counts_LE):
        assert route.expert_TK.shape == route.weight_TK.shape == (36, k) and route.logits_TE.shape == (36, E)
        assert all(len(set(row)) == k for row in route.expert_TK.tolist())
        assert ((0 <= route.expert_TK) & (route.expert_TK < E)).all()
        assert route.weight_TK.dtype == torch.float32 and far(route.weight_TK.sum(1), torch.ones(36)) < 1e-6
        assert counts_E.tolist() == [sum(row.count(e) for row in route.expert_TK.tolist()) for e in range(E)]
        assert counts_E.sum() == 36 * k


@pytest.mark.parametrize("power", (0.0, 0.5, 1.0))
def test_gates_are_kept_probabilities_over_a_power_of_their_sum(power):
    config = Config(**TINY | dict(norm_topk_prob=power))
    router, x = shaken(LinearRouter(config)).eval(), torch.randn(1, 30, 32, generator=rng())
    route = router(x, moe_context(config, 30))
    kept_TK = route.logits_TE.softmax(-1).gather(1, route.expert_TK)
    assert far(route.weight_TK, kept_TK / kept_TK.sum(-1, keepdim=True) ** power) < 1e-6


def test_top_1_trains_its_router():
    """By the cross-entropy alone, with default gates: they are probabilities, as in Switch (2101.03961)."""
    net = core(top_k=1, router_noise=0.0, balance_coef=0.0, z_coef=0.0).train()
    net(PACKED, PACKED.roll(-1, 1)).loss.backward()
    assert all(p.grad.norm() > 1e-6 for name, p in net.named_parameters() if name.endswith("router.gate"))
    config = Config(**TINY | dict(top_k=1))
    router, x = shaken(LinearRouter(config)).eval(), torch.randn(1, 30, 32, generator=rng())
    route = router(x, moe_context(config, 30))
    assert far(route.weight_TK, route.logits_TE.softmax(-1).amax(-1, keepdim=True)) < 1e-6


def test_each_moe_layer_has_its_own_bias_and_noise():
    net = core(pattern="DM").eval()
    with torch.no_grad():
        net.bias_LE.copy_(torch.tensor([[10.0, 10, 0, 0], [0, 0, 10, 10]]))
    assert net(PACKED).stats["counts_LE"].tolist() == [[36, 36, 0, 0], [0, 0, 36, 36]]
    assert noise_layers(core(n_layer=3, pattern="DMM")) == [0, 1]


def noise_layers(net) -> list[int]:
    """Layer number in the noise of each MoE layer."""
    ids_BT = text(1, 8, 0)
    contexts = net.contexts(ids_BT, ids_BT * 0, ids_BT * 0, None)
    return [ctx.noise_key[2].item() for ctx, block in zip(contexts, net.blocks) if isinstance(block.ffn, model.MoE)]


# -----------------------------------------------------------------------------
# 6. Initial values


def test_a_fresh_model_has_uniform_logits_and_a_loss_of_ln_vocabulary():
    net, y = fresh(**NO_AUX), text(2, 18, 5)
    for name, p in net.named_parameters():
        if name in ("head", "layer_mix") or name.endswith((".out", ".down", "router.gate", "router.noise")):
            assert (p == 0).all(), name
        elif p.ndim > 1:
            assert p.std() > 0, name
    for training in (True, False):
        net.train(training)
        out = net(PACKED).logits
        assert (
            out.shape == (2, 18, 64)
            and (out[..., :VOCAB] == out[0, 0, 0]).all()
            and (out[..., VOCAB:] == -math.inf).all()
        )
        assert abs(net(PACKED, y).loss.item() - math.log(VOCAB)) < 1e-5


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.AdamW))
def test_gradients_arrive_from_the_head_inwards(optimizer):
    """With head and down-projections at zero: the head moves first, the output projections next, the router third."""
    net, y = fresh(**NO_AUX).train(), text(2, 18, 5)
    step = optimizer(net.parameters(), lr=0.02)
    reached = []
    for i in range(3):
        net.set_step(SEED, i)
        grads = gradients(net, net(PACKED, y).loss)
        reached.append({kind for name, kind in net.parameter_kinds().items() if (grads[name] != 0).any()})
        for since, names in ((1, (".down", ".out")), (2, (".up", ".qkv")), (2, "router.gate"), (2, "router.noise")):
            assert {(grads[name] != 0).any().item() for name in grads if name.endswith(names)} == {i >= since}, (
                i,
                names,
            )
        for name, p in net.named_parameters():
            p.grad = grads[name]
        step.step()
    assert reached[0] == {"head"}


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = fresh()
    torch.manual_seed(2)
    b, c = fresh(), fresh().init_weights(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed, c.embed)
    for name, p in a.named_parameters():
        if p.ndim > 1 and (p != 0).any() and "embed" not in name:
            assert abs(p.std() / (0.5 * p.size(-1) ** -0.5) - 1) < 0.1, (
                name
            )  # per matrix: each expert has its own fan in
        elif "embed" in name:
            assert abs(p.std() - 1) < 0.1
    ups = a.blocks[0].ffn.experts.up
    assert not torch.equal(ups[0], ups[1]) and not torch.equal(ups, a.blocks[1].ffn.experts.up)


def test_a_tied_table_is_embedding_and_head():
    net = fresh(tie_embeddings=True)
    assert net.head is net.embed and "head" not in dict(net.named_parameters())
    assert abs(net.embed.std() - 0.02) < 0.002 and net.parameter_kinds()["embed"] == "embed"


@pytest.mark.parametrize("build", CORE_BUILDS, ids=name_of)
def test_every_parameter_has_a_kind(build):
    net = fresh(**build)
    kinds = net.parameter_kinds()
    assert list(kinds) == [name for name, _ in net.named_parameters()]
    known = {"embed", "ngram_embed", "value_embed", "head", "matrix", "expert", "router", "scalar"}
    assert set(kinds.values()) <= known
    for name, p in net.named_parameters():
        if ".experts." in name:
            assert kinds[name] == "expert" and p.ndim == 3
        elif ".ffn.up" in name or ".ffn.down" in name or ".attention.qkv" in name or ".attention.out" in name:
            assert kinds[name] == "matrix"
        elif ".router." in name:
            assert kinds[name] == "router"
        elif p.ndim == 1:
            assert kinds[name] == "scalar"
    assert (kinds["embed"], kinds["value_embeds.0"]) == ("embed", "value_embed")
    assert kinds.get("head", "head") == "head"


@pytest.mark.parametrize("build", CORE_BUILDS, ids=name_of)
def test_every_build_runs_on_the_meta_device(build):
    with torch.device("meta"):
        assert all(p.is_meta for p in fresh(**build).parameters())
        net = fresh(**build, dtype="bf16") if "dtype" not in build else fresh(**build)
        out = net(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    assert all(p.is_meta for p in net.parameters()) and out.loss.shape == ()


def test_an_unknown_parameter_has_no_kind_and_no_initial_value():
    net = fresh()
    net.blocks[1].mystery = nn.Parameter(torch.zeros(3))
    for call in (net.parameter_kinds, net.init_weights):
        with pytest.raises(KeyError, match="blocks.1.mystery"):
            call()
    with pytest.raises(KeyError, match="no rule"):
        model.parameter_rule("blocks.0.xembed")


# -----------------------------------------------------------------------------
# 7. Softcap, masks, windows


def test_logits_are_softcapped():
    net = core(softcap=4.0).eval()
    with torch.no_grad():
        net.head.mul_(30)
    x = 5 * torch.randn(2, 3, 32, generator=rng())
    out, z = net.logits(x)[..., :VOCAB], (x @ net.head.T)[..., :VOCAB]
    assert far(out, 4 * torch.tanh(z / 4) + 4) < 1e-5
    assert out.min() >= 0 and out.max() <= 8 and out.max() > 7.9 and out.min() < 0.1
    assert out.dtype == torch.float32 and core(dtype="bf16").eval()(PACKED).logits.dtype == torch.float32


@pytest.mark.parametrize("T, window, rate", (
    (1, 1, 0.0), (5, 3, 0.3), (5, 100, 0.0), (128, 128, 0.0), (128, 40, 0.05), (130, 17, 0.0), (130, 500, 0.02),
    (300, 1, 0.1), (300, 15, 0.0), (300, 128, 0.01), (300, 129, 0.0), (300, 300, 0.02)))  # fmt: skip
def test_blocked_attention_equals_attention_with_a_dense_mask(T, window, rate):
    doc = documents_like(2, T, rate, T + window)
    q, k, v, dy = (torch.randn(2, 2, T, 8, generator=rng(i)) for i in range(4))
    seen = slow_visible(T, doc, window)
    assert torch.equal(build_mask(DenseMask, doc, window).mask, seen)
    inputs = [part.clone().requires_grad_() for part in (q, k, v)]
    score = (inputs[0] @ inputs[1].mT * 0.3).masked_fill(~seen, -math.inf)
    want = [y := score.softmax(-1) @ inputs[2], *torch.autograd.grad((y * dy).sum(), inputs)]
    for kind in (BlockedMask, DenseMask):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        y = build_mask(kind, doc, window).attend(*inputs, 0.3)
        for name, a, b in zip(("y", "dq", "dk", "dv"), [y, *torch.autograd.grad((y * dy).sum(), inputs)], want):
            assert far(a, b) < 1e-5, (kind.__name__, name)


def test_the_backward_of_blocked_attention_equals_finite_differences():
    mask = build_mask(BlockedMask, documents_like(2, 5, 0.3), 3)
    inputs = [torch.randn(2, 1, 5, 4, generator=rng(i), dtype=torch.float64).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: mask.attend(q, k, v, 0.3), inputs)


def test_blocked_attention_skips_invisible_keys():
    blocks = build_mask(BlockedMask, torch.zeros(1, 1024, dtype=torch.int64), 128).blocks
    kept = [(kv.stop - kv.start) * (q.stop - q.start) for q, kv, _ in blocks]
    assert sum(kept) <= 1024 * (128 + 128 + 16)


@pytest.mark.parametrize("build", (dict(attention="K", ngrams="2"), dict(window="LE", window_size=4096)), ids=name_of)
def test_a_long_prompt_is_cached_without_a_tensor_of_all_pairs(build, monkeypatch):
    """Decoding has the logits of a dense mask, and no tensor is as large as half of the pairs of tokens."""
    net, x, T = core(n_layer=2, **build).eval(), text(1, 1000, 3, eots=[(0, 310)]), 1000
    with LargestTensor() as seen:
        got = cached(net, x, [])
    assert seen.numel < T * T / 2, f"a tensor of {seen.shape}"
    monkeypatch.setattr(model, "DecodeMask", DenseMask)
    with LargestTensor() as seen:
        want = cached(net, x, [])
    assert seen.numel >= T * T, "the mode misses the dense mask"
    same(got, want, torch.ones(1, T), "in blocks")


@pytest.mark.parametrize("T, S, window", ((1, 300, 40), (300, 300, 17), (130, 500, 500), (200, 333, 128), (128, 128, 1)))
def test_queries_behind_a_cache_see_the_keys_of_the_dense_mask(T, S, window):
    position, doc, window = torch.arange(S), documents_like(2, S, 0.01, T), torch.tensor(window)
    q, k, v = (torch.randn(2, 2, size, 8, generator=rng(size)) for size in (T, S, S))
    got, want = (kind(position[-T:], position, doc[:, -T:], doc, window).attend(q, k, v, 0.3)
                 for kind in (model.DecodeMask, DenseMask))  # fmt: skip
    assert got.shape == q.shape and far(got, want) < 1e-5


def test_evaluation_holds_the_probabilities_of_one_block_at_a_time(monkeypatch):
    q = torch.randn(2, 900, 8, generator=rng()).requires_grad_()
    blocks = build_mask(BlockedMask, torch.zeros(1, 900, dtype=torch.int64), 900).blocks
    made, alive, softmax = [], [], torch.Tensor.softmax

    def watched_softmax(score, dim):
        made.append(weakref.ref(p := softmax(score, dim)))
        alive.append(sum(ref() is not None for ref in made))
        return p

    monkeypatch.setattr(torch.Tensor, "softmax", watched_softmax)
    trained, in_training = ops.blocked_attention(q, q, q, blocks), max(alive)
    made.clear(), alive.clear()
    with torch.no_grad():
        evaluated = ops.blocked_attention(q, q, q, blocks)
    assert len(blocks) == 8 == in_training and max(alive) <= 2, (in_training, alive)
    assert torch.equal(trained, evaluated)


def test_layers_with_one_window_share_a_mask():
    doc = torch.zeros(1, 8, dtype=torch.int64)
    assert model.window_sizes("LSLS", torch.tensor(4)) == {"L": 4, "S": 2}
    first, second, third = (ctx.mask for ctx in core(n_layer=3, window="LS").contexts(doc, doc, doc, None))
    assert first is third and first is not second


def test_each_device_has_its_mask():
    assert model.fastest_mask("cpu", 130) is BlockedMask
    assert model.fastest_mask("cuda", 256) is FlexMask and model.fastest_mask("cuda", 130) is DenseMask
    assert model.fastest_mask("mps", 256) is DenseMask


FLEX = [(T, window, rate) for T in (256, 384) for window, rate in (
    (1, 0.0), (64, 0.02), (100, 0.0), (128, 0.0), (129, 0.01), (200, 0.0), (256, 0.003), (300, 0.0),
    (1000, 0.003))]  # fmt: skip


@pytest.mark.parametrize("T, window, rate", FLEX)
def test_flex_blocks_cover_visible_keys_and_full_ones_are_full(T, window, rate):
    doc = documents_like(3, T, rate, 7)
    doc[0] = doc[0] * 0 + (torch.arange(T) >= 128)  # a document that starts on a block's edge
    mask, seen = build_mask(FlexMask, doc, window).block_mask, slow_visible(T, doc, window)
    n = T // 128
    mask_mod_seen = mask.mask_mod(torch.arange(3)[:, None, None], 0, torch.arange(T)[:, None], torch.arange(T))
    assert torch.equal(mask_mod_seen, seen[:, 0])
    for b, i, j in itertools.product(range(3), range(n), range(n)):
        block = seen[b, 0, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        partial = j in mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
        full = j in mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
        assert not (partial and full) and (partial or full or not block.any()), (b, i, j)
        assert block.all() or not full, (b, i, j)
        assert full or not block.all(), f"block {(b, i, j)} is full and not listed as full"
        # the transposed lists of backward
        assert partial == (i in mask.q_indices[b, 0, j, : mask.q_num_blocks[b, 0, j]].tolist())
        assert full == (i in mask.full_q_indices[b, 0, j, : mask.full_q_num_blocks[b, 0, j]].tolist())


@pytest.mark.parametrize("T, window, rate", FLEX[::3])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_equals_attention_with_a_dense_mask(T, window, rate):
    from torch.nn.attention.flex_attention import flex_attention

    doc = documents_like(2, T, rate, 7)
    q, k, v = (torch.randn(2, 2, T, 16, generator=rng(i)) for i in range(3))
    with torch.no_grad():
        got = flex_attention(q, k, v, block_mask=build_mask(FlexMask, doc, window).block_mask, scale=0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=slow_visible(T, doc, window), scale=0.3)
    assert far(got, want) < 1e-5


def test_each_layer_reaches_its_window_back():
    """A changed id moves logits one window per layer ahead, and no further."""
    for letters, reach in (("L", 4 * 5), ("S", 4 * 2), ("LS", 2 * 5 + 2 * 2)):
        net, x = core(window=letters, window_size=6, pattern="D").eval(), text(1, 40, 8)
        other = x.clone()
        other[0, 3] = (other[0, 3] + 4) % EOT
        moved = (logits(net, other) - logits(net, x)).abs().amax(-1)[0] > 0
        assert moved[3 + reach] and not moved[4 + reach :].any(), letters
        net.set_step(SEED, STEP, window=2)
        with torch.no_grad():
            moved = (net(other).logits - net(x).logits)[..., :VOCAB].abs().amax(-1)[0] > 0
        assert not moved[3 + 5 :].any()


def test_the_smallest_legal_window_holds_the_token_itself():
    """A short layer has half of the window, and half of 1 must not be 0: a softmax over no key is not a number."""
    assert logits(core(window="LS", window_size=1).eval(), PACKED).isfinite().all(), "window_size=1 gives NaN"


def test_explicit_documents_override_the_end_of_text_tokens():
    net = core().eval()
    doc = torch.tensor([[0] * 5 + [1] * 13, [0] * 9 + [4] * 9])
    got, plain = logits(net, PACKED, doc=doc), logits(net, PACKED)
    assert far(got, plain) > 1e-2
    assert torch.equal(logits(net, PACKED, doc=(PACKED == EOT).cumsum(1)), plain)
    sure = settled(net, PACKED)
    same(logits(net, PACKED[:, :5], doc=doc[:, :5] * 0)[:1], got[:1, :5], sure[:1, :5], "first document")


# -----------------------------------------------------------------------------
# 8. The loss and the FP8 head


def test_validation_does_not_compute_the_heads_gradients(monkeypatch):
    """Under no_grad the two backward matmuls would be two thirds of the head's work."""

    def backward(dz, saved):
        raise AssertionError("the head's backward ran under no_grad")

    monkeypatch.setitem(ops.HEADS, "bf16", ops.HEADS["bf16"]._replace(backward=backward))
    with torch.no_grad():
        assert core().eval()(PACKED, PACKED).loss.isfinite()


def test_the_loss_is_the_mean_cross_entropy_over_all_positions():
    net, y = core(**NO_AUX), text(2, 18, 5)
    for training in (False, True):
        net.train(training).set_step(SEED, STEP)
        out = net(PACKED, y)
        want = F.cross_entropy(net(PACKED).logits.flatten(0, 1), y.flatten())
        assert out.logits is None and abs(out.loss - want) < 1e-5 and torch.equal(out.loss, out.stats["ce"])
    y[:, :3] = -1
    logits_TV = net(PACKED).logits.flatten(0, 1)
    want = F.cross_entropy(logits_TV, y.flatten(), ignore_index=-1, reduction="sum") / y.numel()
    assert abs(net(PACKED, y).loss - want) < 1e-5


def test_fp8_head_trains_like_bf16_and_evaluates_as_bf16():
    y, runs = text(2, 18, 5), []
    for head in ("bf16", "fp8"):
        net = fresh(head=head, dtype="bf16").train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        losses = []
        for step in range(25):
            loss = step_loss(net, PACKED, y, step=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert abs(runs[0][0] - runs[1][0]) < 1e-3 and abs(runs[0][5] - runs[1][5]) < 0.1
    assert all(run[-1] < run[0] - 1 for run in runs) and runs[0] != runs[1]
    twin = fresh(head="bf16", dtype="bf16")
    twin.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(PACKED, y).loss, twin.eval()(PACKED, y).loss)
    assert torch.equal(net(PACKED).logits, twin(PACKED).logits)


@pytest.mark.parametrize("head", ("bf16", "fp8"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_every_head_gives_gradients_close_to_the_fp32_ones(head, dtype):
    y, found = text(2, 18, 5), []
    for h, d in (("bf16", "fp32"), (head, dtype)):
        net = core(head=h, dtype=d, pattern="D").train()  # without routes, which rounding may change
        found.append(gradients(net, step_loss(net, PACKED, y))["head"])
    assert norm_error(found[1], found[0]) < 0.15


# -----------------------------------------------------------------------------
# 9. Decoding


@pytest.mark.parametrize("build", CORE_BUILDS, ids=name_of)
def test_cached_decoding_equals_the_full_forward(build):
    check_cache(core(**build).eval())


def test_cached_decoding_follows_the_current_window():
    net, x = core(window="L", window_size=30).eval(), text(1, 30, 3)
    net.set_step(SEED, STEP, window=4)
    with torch.no_grad():
        whole = net(x).logits[..., :VOCAB]
    same(cached(net, x, range(1, 30)), whole, torch.ones(1, 30), "window 4")


def test_cached_decoding_takes_the_explicit_documents_of_the_full_forward():
    net, x = core().eval(), text(2, 20, 3)
    docs = torch.tensor([[0] * 5 + [1] * 15, [1] * 11 + [2] * 9])
    same(cached(net, x, [7, 8, 15], docs), logits(net, x, doc=docs), settled(net, x), "explicit documents")


def test_a_full_cache_refuses_more_tokens():
    net, cache = core().eval(), model.KVCache(Config(**TINY), 2, 10)
    net(PACKED[:, :8], cache=cache)
    with pytest.raises(ValueError, match="10 tokens and 11"):
        net(PACKED[:, 8:11], cache=cache)
    assert cache.length == 8
    net(PACKED[:, 8:10], cache=cache)
    with pytest.raises(ValueError, match="max_len"):
        net(PACKED[:, 10:11], cache=cache)


@pytest.mark.parametrize("build", CORE_BUILDS[:1] + CORE_BUILDS[4:5], ids=name_of)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_greedy_generation_equals_a_loop_of_full_forwards(build, training):
    net, prompt = core(**build).train(training), text(2, 5, 4, eots=[(0, 0), (1, 0)])
    got = net.generate(prompt, 25, temperature=0)
    assert net.training == training and all(module.training == training for module in net.modules())
    net.eval()
    want = prompt
    with torch.no_grad():
        for _ in range(25):
            want = torch.cat([want, net(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want) and torch.equal(net.generate(prompt, 25, temperature=1.0, top_k=1), want)
    assert torch.equal(net.generate(prompt, 0), prompt)


def test_sampling_follows_its_seed_and_top_k():
    net, prompt = core().eval(), text(4, 3, 4)
    with torch.no_grad():
        net.head.mul_(0.2)  # flat: many ids have a chance
    a, b, c = (net.generate(prompt, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4, 23) and torch.equal(a[:, :3], prompt)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    many = net.generate(prompt, 20, seed=3, top_k=10**6)
    assert torch.equal(many, net.generate(prompt, 20, seed=3)) and torch.equal(state, torch.get_rng_state())
    assert (torch.cat([a, c, many]) < VOCAB).all()
    few = net.generate(prompt, 20, seed=3, top_k=3)
    with torch.no_grad():
        rank = (net(few).logits.argsort(-1, descending=True)[:, 2:-1] == few[:, 3:, None]).int().argmax(-1)
    assert rank.max() == 2


def test_sampling_frequencies_are_the_softmax_at_the_temperature():
    net, prompt = core(pattern="D").eval(), text(1, 4, 4).expand(4000, 4)
    with torch.no_grad():
        p = (net(prompt[:1]).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(net.generate(prompt, 1, temperature=0.7)[:, -1], minlength=64) / 4000
    assert ((counts - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-6).all()


def test_the_coldest_sampling_takes_the_likeliest_id():
    logits_BV, generators = torch.randn(3, 20, generator=rng(1)), [rng(0)] * 3
    assert torch.equal(model.sample_ids(logits_BV, 1e-38, 0, 1.0, generators), logits_BV.argmax(-1))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        core().generate(torch.zeros(1, 0, dtype=torch.int64), 3)


# -----------------------------------------------------------------------------
# 10. Config

BAD = [
    ("vocab_size", 0, "at least 1"), ("n_layer", 0, "at least 1"), ("n_embd", -8, "at least 1"),
    ("n_head", 0, "at least 1"),
    ("num_experts", 0, "at least 1"), ("top_k", 0, "at least 1"), ("balance_window", 0, "at least 1"),
    ("window_size", 0, "at least 1"), ("router_noise", -0.1, "at least 0"), ("balance_coef", -1.0, "at least 0"),
    ("z_coef", math.nan, "finite"), ("bias_update_factor", -1e-3, "at least 0"), ("norm_topk_prob", -1.0, "at least 0"),
    ("num_shared_experts", -1, "at least 0"), ("shared_dim", -8, "at least 0"),
    ("shared_dim", 8, "0 without num_shared_experts"),
    ("mlp_ratio", 0.0, "above 0"), ("attn_scale", -1.0, "above 0"), ("softcap", 0.0, "above 0"),
    ("softcap", 65.0, "at most 64"),
    ("softcap", math.nan, "finite"),
    ("mlp_ratio", math.inf, "mlp_ratio"), ("router", "lineer", "linear"), ("experts", "mpl", "mlp"),
    ("depth", "stak", "stack"),
    ("head", "fp4", "fp8"), ("dtype", "fp16", "bf16"), ("pattern", "MX", "M D"), ("pattern", "", "M D"),
    ("attention", "B", "A K -"),
    ("window", "LX", "L S Q E"), ("window", "", "L S"), ("ngrams", "21", "digits from 2 to 9"),
    ("ngrams", "2,3", "digits"),
    ("ngram_rows", 0, "at least 1"), ("eot_token", 61, "below vocab_size = 61"), ("eot_token", -1, "below vocab_size"),
    ("head_dim", 12, "multiple of 8"), ("head_dim", 0, "multiple of 8"), ("n_embd", 36, "multiple of 8"),
    ("num_experts", 2**15, "below 32768"), ("top_k", 5, "num_experts = 4"), ("mlp_ratio", 0.3, "multiple of 8"),
    ("mlp_ratio", 0.01, "multiple of 8"), ("value_embeds", 3, "from 0 to n_layer // 2 = 2"),
    ("value_embeds", -1, "from 0"),
    ("n_layer", "4", "type int"), ("n_layer", 4.0, "type int"), ("n_layer", None, "type int"),
    ("n_head", True, "type int"),
    ("mlp_ratio", "4", "type float"), ("z_coef", None, "type float"), ("router_noise", True, "type float"),
    ("router", 1, "type str"), ("pattern", 4, "type str"), ("window", ["L"], "type str"),
    ("dtype", torch.bfloat16, "type str"),
    ("tie_embeddings", 1, "type bool"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, legal", BAD, ids=[f"{field}={value!r}" for field, value, _ in BAD])
def test_a_bad_value_is_refused_by_name_with_the_legal_values(field, value, legal):
    with pytest.raises(UserError) as error:
        Config(**TINY | {field: value})
    message = str(error.value)
    assert message.startswith(f"{field} is {value!r}") and legal in message and "\n" not in message


def test_every_table_field_names_all_its_keys():
    tables = {
        "experts": model.EXPERTS,
        "router": model.ROUTERS,
        "depth": model.DEPTHS,
        "head": ops.HEADS,
        "dtype": model.DTYPES,
    }
    assert Config(**TINY).tables() == tables
    for field, table in tables.items():
        with pytest.raises(UserError) as error:
            Config(**TINY | {field: "nothing"})
        assert all(key in str(error.value) for key in table)


def test_config_is_frozen_and_takes_names_only():
    config = Config(**TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3
    with pytest.raises(TypeError):
        Config(61)
    with pytest.raises(TypeError):
        Config(n_layers=3)
    assert Config(**dataclasses.asdict(config)) == config and len({config, Config(**TINY)}) == 1


@pytest.mark.parametrize(
    "n_embd, ratio, k", ((32, 4.0, 1), (32, 4, 2), (64, 3.0, 4), (768, 4.0, 2), (96, 3.0, 3), (32, 0.5, 2))
)
def test_active_hidden_width_is_that_of_the_dense_twin(n_embd, ratio, k):
    config = Config(**TINY | dict(n_embd=n_embd, mlp_ratio=ratio, top_k=k))
    assert config.hidden_size * k == ratio * n_embd and isinstance(config.hidden_size, int)


def test_shared_experts_share_the_hidden_width_unless_they_have_their_own():
    config = Config(**TINY | dict(num_shared_experts=2, top_k=2))
    assert config.hidden_size == 32 and config.shared_width == 64
    config = Config(**TINY | dict(num_shared_experts=2, shared_dim=40))
    assert config.hidden_size == 64 and config.shared_width == 40
    assert "2 shared, 40 wide together" in config.describe_experts()


def test_patterns_are_tiled_over_depth():
    config = Config(**TINY | dict(n_layer=7, pattern="DMM", window="LSSS", attention="AAA-"))
    tiled = [config.per_layer(field) for field in ("pattern", "window", "attention")]
    assert tiled == ["DMMDMMD", "LSSSLSS", "AAA-AAA"]
    assert config.num_moe_layers == 4 and Config(**TINY).padded_vocab_size == 64 and Config().padded_vocab_size == 50304
    net = model.build(config)
    assert [type(block.ffn).__name__ for block in net.blocks] == ["DenseMLP", "MoE", "MoE"] * 2 + ["DenseMLP"]
    assert noise_layers(net) == [0, 1, 2, 3]


def test_a_user_extends_the_core_with_a_table_entry_or_a_subclass(monkeypatch):
    """The four tables, as a file outside the core uses them."""

    class TwiceExperts(model.MLPExperts):
        def forward(self, rows_RD, ends_E):
            return 2 * super().forward(rows_RD, ends_E)

    class OwnGPT(model.GPT):
        def run_blocks(self, x0_BTD, contexts):
            return super().run_blocks(x0_BTD, contexts)

    class OwnAttention(model.Attention):
        pass

    for table, key, entry in ((model.EXPERTS, "twice", TwiceExperts), (model.DEPTHS, "own", OwnGPT),
                              (model.ATTENTIONS, "O", OwnAttention), (model.ROUTERS, "own", CausalConv)):  # fmt: skip
        monkeypatch.setitem(table, key, entry)
    net = core(experts="twice", depth="own", attention="AO", router="own")
    assert type(net) is OwnGPT and type(net.blocks[1].attention) is OwnAttention
    assert type(net.blocks[0].ffn.router) is CausalConv and type(net.blocks[0].ffn.experts) is TwiceExperts
    assert all((grad != 0).any() for grad in gradients(net, step_loss(net, PACKED, PACKED)).values())


# -----------------------------------------------------------------------------
# 11. The dense model against its definition


@pytest.mark.parametrize("n_layer", (1, 2, 3, 5))
def test_any_depth_runs_and_trains(n_layer):
    net = core(n_layer=n_layer, value_embeds=min(1, n_layer // 2)).train()
    grads = gradients(net, step_loss(net, PACKED, text(2, 18, 5)))
    for name, grad in grads.items():
        assert grad.numel() == 0 or grad.abs().sum() > 0, name


def test_skips_pair_the_layers_in_mirror_order():
    """Each layer adds its own power of two, so the sum identifies which outputs were added where."""
    net = fresh(n_layer=5, value_embeds=0)
    net.mix_layers = lambda x, added: x
    with torch.no_grad():
        net.skip_weights.copy_(torch.tensor([10.0, 100.0]))
    del net.blocks
    net.blocks = [lambda x, x0, ctx, i=i: (x + 2.0**i, [i]) for i in range(5)]
    x_BTD, stats = net.run_blocks(torch.zeros(1), [None] * 5)
    assert x_BTD.item() == (1 + 2 + 4) + 10 * (1 + 2) + 8 + 100 * 1 + 16 and stats == [0, 1, 2, 3, 4]


def slow_forward(net, x):
    """Logits of rows of one document, from the definition of the dense model and its parameters alone."""
    config, p, T, n = net.config, dict(net.named_parameters()), x.size(1), net.config.n_layer
    quarter, position = config.head_dim // 4, torch.arange(T)
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    heads = lambda z: z.unflatten(-1, (config.n_head, -1)).transpose(1, 2)
    theta = position[:, None] * 1024 ** -(torch.arange(quarter) / (quarter - 1))
    rotation = torch.exp(-1j * torch.cat([theta, torch.zeros(T, quarter)], 1))

    def rotate(z):
        z = torch.complex(*z.chunk(2, dim=-1)) * rotation
        return torch.cat([z.real, z.imag], -1)

    summed = p["embed"][x]
    for table, length in enumerate(map(int, config.ngrams)):
        summed = summed + slow_rows(x, p[f"ngram_embeds.{table}"], length)
    x0 = h = rms(summed)
    value_table = {layer: t for t in range(config.value_embeds) for layer in (t, n - config.value_embeds + t)}
    inputs, outputs = [], []
    for i in range(n):
        if i >= n - n // 2:
            h = h + p["skip_weights"][i - (n - n // 2)] * outputs[n - 1 - i]
        inputs.append(h)
        mix, letter = p[f"blocks.{i}.stream_mix"], config.per_layer("attention")[i]
        h = mix[0] * h + mix[1] * x0
        if letter != "-":
            q, k, v = (heads(rms(h) @ part.T) for part in p[f"blocks.{i}.attention.qkv"])
            value_mix = p[f"blocks.{i}.attention.value_mix"]
            v = value_mix[0] * v
            if i in value_table:
                v = v + value_mix[1] * heads(p[f"value_embeds.{value_table[i]}"][x])
            q, k = rotate(rms(q)), rotate(rms(k))
            if letter == "K":  # channels in the second and in the last quarter come from the previous token
                static = torch.arange(config.head_dim) // quarter % 2 == 1
                k = torch.where(static, torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, :-1]], 2), k)
            distance = position[:, None] - position
            window = config.window_size // {"L": 1, "S": 2, "Q": 4, "E": 8}[config.per_layer("window")[i]]
            score = (q @ k.mT * config.attn_scale).masked_fill((distance < 0) | (distance >= window), -math.inf)
            h = h + (score.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ p[f"blocks.{i}.attention.out"].T
        hidden = (rms(h) @ p[f"blocks.{i}.ffn.up"].T).clamp(min=0) ** 2
        h = h + hidden @ p[f"blocks.{i}.ffn.down"].T
        outputs.append(h)
    weight = rms(h) @ p["layer_mix"].T / 10
    h = h + sum(weight[..., i, None] * (outputs[i] - inputs[i]) for i in range(n))
    z = rms(h) @ p["embed" if config.tie_embeddings else "head"].T
    return (config.softcap * torch.tanh(z / config.softcap) + config.softcap)[..., :VOCAB]


DENSE = [dict(n_layer=6, value_embeds=3), dict(n_layer=5, value_embeds=2, attention="AA-A"),
         dict(n_layer=4, value_embeds=0),
         dict(attention="KAK-", window="LSQE", ngrams="23", ngram_rows=100),
         dict(tie_embeddings=True, window="EL")]  # fmt: skip


@pytest.mark.parametrize("changes", DENSE, ids=name_of)
def test_the_dense_model_equals_its_definition_in_logits_and_gradients(changes):
    net, x, y = core(pattern="D", **changes), text(2, 20, 6), text(2, 20, 7)
    want = slow_forward(net, x)
    assert far(net(x).logits[..., :VOCAB], want) < 1e-5
    losses = net(x, y).loss, F.cross_entropy(want.flatten(0, 1), y.flatten())
    assert_same_gradients(*(gradients(net, loss) for loss in losses))


def test_offset_attention_copies_in_one_layer():
    """With keys of the previous token, one layer finds the token after an earlier occurrence of the last one."""
    ids = torch.tensor([[EOT, 3, 9, 4, 7, 8, 1, 3]])
    found = {}
    for letter in "AK":
        one_head = dict(n_layer=1, n_head=1, head_dim=32, value_embeds=0, window="L", attn_scale=8.0)
        net = core(attention=letter, pattern="D", **one_head).eval()
        block = net.blocks[0]
        with torch.no_grad():
            query, key, value = block.attention.qkv
            static = torch.arange(32) // 8 % 2 == 1
            for weight in (query, key):
                weight.copy_(torch.randn(32, 32, generator=rng(1)) * static[:, None])
            value.copy_(torch.eye(32))
            block.attention.out.copy_(torch.eye(32) * 8)
            block.attention.value_mix.copy_(torch.tensor([1.0, 0.0]))
            block.stream_mix.copy_(torch.tensor([1.0, 0.0]))
            block.ffn.down.zero_()
            net.head.copy_(net.embed)
            found[letter] = net(ids).logits[0, -1].argmax().item()
    assert found == {"A": 3, "K": 9}


# -----------------------------------------------------------------------------
# 12. Parameter counts and FLOPs


def test_parameter_counts_equal_those_by_hand():
    config = Config(**TINY | dict(pattern="DM", attention="A-"))
    counts = model.count_parameters(config)
    assert counts["embed"] == counts["value_embed"] == 64 * 32
    assert counts["head"] == (64 + 4) * 32  # and the mix of layers
    assert counts["matrix"] == 2 * 4 * 32 * 32 + 2 * 2 * 32 * 128  # two attentions, two dense MLPs
    assert counts["expert"] == 2 * 4 * 2 * 32 * 64 and counts["router"] == 2 * 2 * 4 * 32
    assert counts["scalar"] == 4 * 2 + 2 * 2 + 2
    kinds = ("embed", "ngram_embed", "value_embed", "head", "matrix", "expert", "router", "scalar")
    total = sum(p.numel() for p in model.build(config).parameters())
    assert counts["total"] == sum(counts[kind] for kind in kinds) == total
    assert counts["active"] == counts["total"] - counts["expert"] // 2 - 63 * 32 * 2


def test_all_experts_are_active_when_all_are_chosen():
    counts = model.count_parameters(Config(**TINY | dict(top_k=4)))
    assert counts["active"] == counts["total"] - (counts["embed"] + counts["value_embed"]) * 63 // 64
    one, dense = (model.count_parameters(Config(**TINY | dict(num_experts=1, top_k=1, pattern=p))) for p in "MD")
    assert one["active"] - one["router"] == dense["active"] and one["total"] - one["router"] == dense["total"]


def test_flops_equal_those_of_the_counter_for_a_dense_model():
    """Matmuls agree exactly. One block of 128 queries computes its upper triangle too, which the formula leaves out."""
    T, dense = 128, dict(pattern="D", window="L", window_size=1000)
    config, net, x = Config(**TINY | dense), core(**dense), text(1, 128, 1)
    counts = model.count_parameters(config)
    total, weights = model.flops_per_token(config, T), counts["matrix"] + counts["head"]
    attention = total - 6 * weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(x)
    seen = {str(op): n / T for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == 2 * weights
    assert abs(seen["aten.bmm"] * (T + 1) / (2 * T) - attention / 3) < 1e-6 * attention
    with FlopCounterMode(display=False) as counter:
        step_loss(net.train(), x, x).backward()
    seen = {str(op): n / T for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == 6 * weights and abs(seen["aten.bmm"] * (T + 1) / (2 * T) - attention) < 1e-6 * attention


def test_flops_of_experts_equal_the_dense_twins_plus_the_router():
    dense, sparse = (Config(**TINY | dict(pattern=p)) for p in "DM")
    router = model.count_parameters(sparse)["router"]
    for T in (16, 128):
        assert model.flops_per_token(sparse, T) == model.flops_per_token(dense, T) + 6 * router
    net, x = core().train(), text(1, 128, 1)
    with FlopCounterMode(display=False) as counter:
        net(x)
    counts = model.count_parameters(sparse)
    seen = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == 128 * 2 * (counts["matrix"] + counts["head"] + router)  # the counter has no grouped_mm


def test_attention_flops_follow_window_and_dropped_layers():
    def keys(T, **changes):
        config = Config(**TINY | changes)
        counts = model.count_parameters(config)
        active = counts["matrix"] + counts["expert"] / 2 + counts["head"] + counts["router"]
        return (model.flops_per_token(config, T) - 6 * active) / (12 * 32)

    by_hand = sum(min(t + 1, 12) for t in range(40)) / 40, sum(min(t + 1, 6) for t in range(40)) / 40
    assert abs(keys(40) - 2 * sum(by_hand)) < 1e-9
    assert abs(keys(40, window="S", attention="A-") - 2 * by_hand[1]) < 1e-9
    assert abs(keys(5, window="L") - 4 * 3) < 1e-9


def test_the_shortest_window_holds_a_token_in_the_count_of_flops_too():
    assert model.mean_keys(Config(**TINY | dict(window_size=1)), "S", 40) == 1


# -----------------------------------------------------------------------------
# 13. Load balancing


def test_balance_rolls_the_window_of_loads():
    net = fresh(balance_window=3, pattern="DM")
    assert net.load_WLE.shape == (3, 2, 4) and (net.load_WLE == 0.25).all()
    counts = [torch.randint(0, 50, (2, 4), generator=rng(i)) for i in range(5)]
    for step in range(5):
        net.balance(counts[step])
    for load_LE, counts_LE in zip(net.load_WLE, counts[2:]):
        assert far(load_LE, counts_LE / counts_LE.sum(1, keepdim=True)) < 1e-6
    net.balance(torch.zeros(2, 4, dtype=torch.int64))
    assert net.load_WLE.isfinite().all() and (net.bias_LE == 0).all()


def test_bias_moves_against_the_load_and_stays_centred():
    net = fresh(bias_update_factor=0.01, pattern="DM")
    net.balance(torch.tensor([[10, 30, 40, 0], [20, 20, 20, 20]]))
    assert far(net.bias_LE[0] * 100, torch.tensor([1.0, -1, -1, 1])) < 1e-6 and (net.bias_LE[1] == 0).all()
    net.balance(torch.tensor([[90, 10, 10, 10], [0, 0, 0, 5]]))
    assert far(net.bias_LE[0] * 100, torch.tensor([-0.5, -0.5, -0.5, 1.5])) < 1e-5
    assert far(net.bias_LE[1] * 100, torch.tensor([0.5, 0.5, 0.5, -1.5])) < 1e-5
    assert net.bias_LE.mean(1).abs().max() < 1e-8


@pytest.mark.parametrize("E", (3, 6, 7, 11))
def test_an_even_load_moves_no_bias(E):
    """Shares such as 1/6 do not sum to exactly 1, and the sign of what rounding leaves is a whole step."""
    net = core(num_experts=E, top_k=1, mlp_ratio=1.0, bias_update_factor=0.1)
    net.bias_LE.zero_()
    for count in (100, 333, 1000):
        net.balance(torch.full((4, E), count))
        assert (net.bias_LE == 0).all(), count


def test_bias_evens_out_the_load_of_a_skewed_router():
    """The wrong sign would starve experts; the right one brings every load near the mean."""
    net, x = core(3, bias_update_factor=0.005, n_layer=1, value_embeds=0).eval(), text(8, 32, 4)
    with torch.no_grad():
        net.bias_LE.zero_()
        net.blocks[0].ffn.router.gate.mul_(0.2)
    excess = []
    for _ in range(60):
        counts = net(x).stats["counts_LE"]
        excess.append(counts.max().item() / counts.float().mean().item() - 1)
        net.balance(counts)
    assert excess[0] > 0.15 and max(excess[-5:]) < 0.6 * excess[0], (excess[0], excess[-5:])


def test_bias_changes_the_selection_and_not_the_gates():
    config = Config(**TINY)
    router, ctx = shaken(LinearRouter(config)).eval(), moe_context(config, 30)
    x = torch.randn(1, 30, 32, generator=rng())
    plain = router(x, ctx)
    pushed = router(x, ctx._replace(bias_E=torch.tensor([0.0, 0, 0, 5])))
    assert (pushed.expert_TK == 3).any(1).all() and not (plain.expert_TK == 3).any(1).all()
    for route in (plain, pushed):
        assert far(route.weight_TK, route.logits_TE.gather(1, route.expert_TK).softmax(-1)) < 1e-6
    assert torch.equal(plain.logits_TE, pushed.logits_TE) and far(plain.logits_TE, x[0] @ router.gate.T) < 1e-6


def test_balance_loss_is_the_load_times_the_probability():
    net = core(pattern="DM").eval()
    routes = []
    for block in net.blocks[1::2]:
        block.ffn.router.register_forward_hook(lambda router, args, route: routes.append(route))
    stats = net(PACKED).stats
    prob = [r.logits_TE.softmax(-1).mean(0) for r in routes]
    by_hand = [4 * sum(net.load_WLE[0, l, e] * prob[l][e] for e in range(4)) for l in range(2)]
    assert abs(stats["balance_loss"] - sum(by_hand) / 2) < 1e-5
    z = [sum(torch.log(torch.exp(row).sum()) ** 2 for row in r.logits_TE) / 36 for r in routes]
    assert abs(stats["z_loss"] - sum(z) / 2) < 1e-4 * (1 + stats["z_loss"])
    p = torch.stack([r.logits_TE.softmax(-1) for r in routes])
    assert abs(stats["entropy"] + (p * p.log()).sum(-1).mean() / math.log(4)) < 1e-5
    net.load_WLE.fill_(0.25)
    assert abs(net(PACKED).stats["balance_loss"] - 1) < 1e-6


def test_balance_loss_uses_the_loads_of_earlier_steps():
    net = core().train()
    before = step_loss(net, PACKED, PACKED)
    net.balance(torch.tensor([[50, 1, 1, 1]] * 4))
    after = step_loss(net, PACKED, PACKED)
    assert before != after
    prob, load = torch.rand(4, 4, generator=rng()).softmax(-1), net.load_WLE[0]
    zero = torch.tensor(0.0)
    stats = [model.RouteStats(torch.randint(0, 9, (4,)), p, zero, zero, 0.0) for p in prob]
    assert abs(net.summary(stats)["balance_loss"] - (4 * load * prob).sum(-1).mean()) < 1e-6


def test_auxiliary_losses_are_summed_over_layers_and_count_in_training_only():
    net, y = core(balance_coef=0.3, z_coef=0.02, pattern="DM"), text(2, 18, 5)
    net.train().set_step(SEED, STEP)
    out = net(PACKED, y)
    auxiliary = 2 * (0.3 * out.stats["balance_loss"] + 0.02 * out.stats["z_loss"])
    assert abs(out.loss - out.stats["ce"] - auxiliary) < 1e-5
    assert out.loss - out.stats["ce"] > 0.1
    out = net.eval()(PACKED, y)
    assert torch.equal(out.loss, out.stats["ce"])
    dense = core(pattern="D").train()(PACKED, y)
    assert torch.equal(dense.loss, dense.stats["ce"]) and dense.stats["counts_LE"].shape == (0, 4)


class CostlyRouter(LinearRouter):
    """A router with an auxiliary loss of its own."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD, ctx)._replace(loss=torch.tensor(0.25))


def test_a_routers_own_loss_is_added_in_training(monkeypatch):
    monkeypatch.setitem(model.ROUTERS, "costly", CostlyRouter)
    net = core(router="costly", pattern="DM", **NO_AUX).train()
    out = net(PACKED, PACKED)
    assert out.stats["router_loss"] == 0.5 and abs(out.loss - out.stats["ce"] - 0.5) < 1e-6


@pytest.mark.parametrize("targets", (True, False), ids=("with-ce", "auxiliary-only"))
def test_gradients_add_up_over_micro_batches(targets):
    """The mean of two halves' gradients is the whole batch's: nothing in the loss mixes tokens of one micro-batch."""
    net = core(balance_coef=0.5, z_coef=0.1).train()
    x, y = text(4, 12, 3), text(4, 12, 5) if targets else torch.full((4, 12), -1)
    net.balance(torch.tensor([[9, 2, 3, 1]] * 4))
    whole = gradients(net, step_loss(net, x, y))
    halves = [gradients(net, step_loss(net, x[i : i + 2], y[i : i + 2], first_token=i * 12)) for i in (0, 2)]
    for name, grad in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        assert far(mean, grad) < 1e-6 or norm_error(mean, grad) < 1e-5, name
    assert any((whole[name] != 0).any() for name in whole if name.endswith("router.gate"))


# -----------------------------------------------------------------------------
# 14. Presets


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_builds_and_counts(preset):
    counts, config = model.count_parameters(PRESETS[preset]), PRESETS[preset]
    assert (
        counts["active"] < counts["total"] and model.flops_per_token(config, config.window_size) > 6 * counts["matrix"]
    )
    if preset == "cpu":
        assert counts["total"] == 27_388_178 and model.flops_per_token(config, 2048) == 9_181_728


# -----------------------------------------------------------------------------
# 15. Compilation and threads


def test_a_bf16_block_compiles_whole_and_never_again_when_routes_change():
    """aot_eager traces forward and backward as the real backend does, without minutes in the C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine, so --compile is not offered")
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    eager, compiled = (core(dtype="bf16", window_size=64).train() for _ in range(2))
    compiled.blocks[2].compile(backend=backend, fullgraph=True, dynamic=False)
    routes = set()
    for step in range(4):
        x, y = text(2, 128, step, eots=[(0, 10 * step)]), text(2, 128, 50 + step)
        outs = []
        for net in (eager, compiled):
            with torch.no_grad():
                net.bias_LE[1:, step] += 1
            net.set_step(SEED, step)
            out = net(x, y)
            outs.append((out, gradients(net, out.loss)))
        assert abs(outs[0][0].loss - outs[1][0].loss) < 1e-2
        for name, grad in outs[0][1].items():
            assert norm_error(outs[1][1][name], grad) < 0.1, name
        routes.add(tuple(outs[0][0].stats["counts_LE"][2].tolist()))
        assert backend.frame_count == 1, f"recompiled at step {step}"
    assert len(routes) == 4
    torch._dynamo.reset()


def test_a_growing_window_compiles_nothing_anew_on_a_cpu(monkeypatch):
    """Attention stays outside the graphs: its blocks of keys have other sizes for every window."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend, compile_function = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **names: compile_function(function, backend=backend, **names))
    eager, compiled = (core(window="EELE", window_size=512).train() for _ in range(2))
    attend = model.BlockedMask.attend
    assert compiled.compile_blocks() == "compiled" and model.BlockedMask.attend is attend  # other models keep theirs
    (x, y), graphs = (text(1, 512, 0), text(1, 512, 1)), set()
    for step, window in enumerate((128, 256, 384, 512)):
        losses = []
        for net in (eager, compiled):
            net.set_step(SEED, step, window=window)
            losses.append(net(x, y).loss)
            losses[-1].backward()
        assert torch.allclose(*losses, rtol=1e-5)
        graphs.add(backend.frame_count)
    assert len(graphs) == 1 and graphs.pop() > 0
    torch._dynamo.reset()


def test_gradients_in_bf16_do_not_depend_on_the_number_of_threads():
    """At preset cpu's shapes, so that processes that share a machine train the very run of one process."""
    generator, threads, grads = torch.Generator().manual_seed(1), torch.get_num_threads(), []
    net = model.build(PRESETS["cpu"])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    x, y = torch.randint(257, (2, 4, 512), generator=generator)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            grads.append(torch.autograd.grad(net(x, y).loss, list(net.parameters())))
    finally:
        torch.set_num_threads(threads)
    for (name, _), one, two in zip(net.named_parameters(), *grads):
        assert torch.equal(one, two), name
