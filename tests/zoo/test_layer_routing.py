"""Depth routed: a controller picks one layer of a pool, or an identity, for every token in every step.

CPU, no network: `pytest tests/zoo/test_layer_routing.py`.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PACKED,
    POOL,
    TINY,
    VOCAB,
    check_cache,
    check_documents,
    check_future,
    check_prefixes,
    check_rows,
    far,
    logits,
    name_of,
    random_controller,
    rng,
    text,
    tiny,
    trunk_of,
)
from slow import but_every
from torch.utils.flop_counter import FlopCounterMode

import model
import zoo
from benchmarks import toys
from cli import UserError
from ops import norm
from zoo.layer_routing import ROUTE_TRAINING


def choices_of(net: zoo.GPT, x) -> torch.Tensor:
    """Layer of each token in each step."""
    return trunk_of(net, x).choices_SBT


@pytest.mark.parametrize("changes", but_every(7, [
    dict(controller="linear", looped=".ooo"), dict(controller="mlp", halt="act"),
    dict(controller="lstm", attention="KL-A"),
    dict(controller="linear", route_by="first_token", looped="ooo."),
    dict(controller="memoryless", halt="stick_breaking", norms="R", loops=4),
    dict(controller="learned", attention="R", num_meta_tokens=2),
    dict(controller="linear", attn_softmax="ssmax", reinject=0.5)]), ids=name_of)  # fmt: skip
def test_routing_over_layers_leaks_nothing_and_cached_decoding_equals_the_full_forward(changes):
    net = random_controller(seed=2, **changes)
    if "halt" in changes:
        with torch.no_grad():
            net.halt.bias.fill_(-0.5)
    for training in (False, True):
        net.train(training)
        check_prefixes(net, PACKED)
        check_future(net, PACKED)
        check_rows(net, PACKED)
        check_documents(net, PACKED)
    if changes["controller"] != "learned":
        used = choices_of(net, PACKED)
        fewest = 2 if "route_by" in changes else 3
        varied = all(len(step.unique()) >= 2 for step in used) and len(used.unique()) >= fewest
        assert varied, "all tokens have the same route"
    check_cache(net.eval())


@pytest.mark.parametrize("changes", [
    {}, dict(attention="K-LA", looped=".oo."), dict(router="conv", router_noise=0.0),
    dict(router="attention", router_noise=0.0),
    dict(num_shared_experts=1, mlp_ratio=3.0, shared="conv", router_noise=0.0), dict(pattern="DM", router="hash"),
    dict(norms="R", attn_softmax="ssmax", pattern="D")], ids=name_of)  # fmt: skip
def test_evaluation_equals_the_mixture_with_one_hot_weights(changes):
    net, x = random_controller(**dict(route_training="straight_through", router_noise=0.0) | changes), text(2, 20, 3)
    assert far(logits(net.eval(), x), logits(net.train(), x)) < 1e-4
    assert far(logits(tiny(**POOL | changes, route_training="soft").train(), x), logits(net.eval(), x)) > 1e-3


def test_the_fixed_controller_is_the_plain_transformer():
    """With as many steps as layers, a loop of one iteration; the steps beyond are identities."""
    x, loop = text(2, 20, 3), tiny(depth="loop", loops=1, router_noise=0.0)
    for steps, identities in ((4, 0), (6, 2)):
        net = tiny(depth="routed", loops=steps, controller="fixed", identity_layers=identities, router_noise=0.0)
        for training in (False, True):
            assert far(logits(net.train(training), x), logits(loop.train(training), x)) < 1e-4
    assert choices_of(net.eval(), x)[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_identities_alone_give_the_logits_of_the_embedding():
    net, x = random_controller(controller="learned").eval(), text(2, 20, 3)
    with torch.no_grad():
        net.controller.step.fill_(0)[:, 4] = 9.0
        want = net.logits(norm(norm(net.embed[x])))
    assert far(logits(net, x), want[..., :VOCAB]) < 1e-5


@pytest.mark.parametrize("kind, weights", (("mean", (1 / 3, 1 / 3, 1 / 3)), ("last", (0, 0, 1))))
def test_the_training_loss_is_that_of_the_steps_in_step_loss(kind, weights):
    x, y = text(2, 20, 6), text(2, 20, 7)
    net = random_controller(
        step_loss=kind, controller="memoryless", router="hash", balance_coef=0.0, z_coef=0.0
    ).train()
    parts = []
    for steps in (1, 2, 3):
        shorter = random_controller(
            loops=steps, controller="memoryless", router="hash", balance_coef=0.0, z_coef=0.0
        ).train()
        parts.append(shorter(x, y).loss)
    assert far(net(x, y).loss, sum(w * part for w, part in zip(weights, parts))) < 1e-5
    assert far(net.eval()(x, y).loss, shorter.eval()(x, y).loss) < 1e-6  # evaluation: the last step


def test_training_weights_of_each_route_training():
    prob = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    soft, straight, anneal = (ROUTE_TRAINING[name] for name in ("soft", "straight_through", "anneal"))
    assert soft(prob, 1.0) is prob and straight(prob, 0.0).tolist() == [[1, 0, 0]]
    assert torch.equal(anneal(prob, 0.0), prob) and far(anneal(prob, 0.5), torch.tensor([[0.75, 0.15, 0.1]])) < 1e-6
    for weights in (soft(prob, 0.3), straight(prob, 0.3), anneal(prob, 0.3)):
        (grad,) = torch.autograd.grad((weights * torch.tensor([1.0, 2.0, 3.0])).sum(), prob)
        assert grad.tolist() == [[1, 2, 3]]
    net, x = random_controller(route_training="anneal", anneal_steps=10, router="hash").train(), text(2, 20, 6)
    results = [net(x).logits[..., :VOCAB] for step in (0, 10) for _ in [net.set_step(5, step)]]
    soft, hard = (
        random_controller(route_training=kind, router="hash").train() for kind in ("soft", "straight_through")
    )
    wanted = [kind(x).logits[..., :VOCAB] for kind in (soft, hard)]
    assert far(results[0], wanted[0]) < 1e-5 and far(results[1], wanted[1]) < 1e-5 and far(*results) > 1e-2


def test_the_layer_balance_loss_grows_with_uneven_use():
    net = tiny(**POOL)
    even = torch.full((3, 2, 8, 5), 0.2)
    assert net.layer_balance(even, torch.arange(48).view(3, 2, 8) % 4) == pytest.approx(1.0)
    assert net.layer_balance(even, torch.arange(48).view(3, 2, 8) % 5) == pytest.approx(
        1.0, rel=0.03
    )  # identities are left out
    one = torch.zeros(3, 2, 8, 5)
    one[..., 2] = 1
    assert net.layer_balance(one, torch.full((3, 2, 8), 2)) == pytest.approx(4.0)
    x = text(2, 20, 6)
    without, balanced = (random_controller(layer_balance_coef=coef).train()(x, x) for coef in (0.0, 2.0))
    assert without.loss < balanced.loss


def test_only_per_step_parameters_grow_with_the_steps():
    counts = [
        model.count_parameters(zoo.Config(**TINY | POOL | dict(loops=steps, controller="lstm")))["total"]
        for steps in (2, 7)
    ]
    assert counts[0] == counts[1]
    per_step = [model.count_parameters(zoo.Config(**TINY | POOL | dict(loops=steps)))["total"] for steps in (2, 7)]
    assert per_step[1] - per_step[0] == 5 * 32


def test_picked_layers_compute_keys_of_all_tokens_and_the_rest_of_their_own():
    """FLOPs of evaluation, as counted by torch and as on the card."""
    T, changes = 128, dict(depth="routed", loops=2, pattern="D", window="L", controller="fixed")
    config, net, x = zoo.Config(**TINY | changes), tiny(**changes).eval(), text(1, 128, 1)
    counts = model.count_parameters(config)
    keys, layer = 2 * 32 * 32, counts["matrix"] / 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    seen = {str(op): n / T for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == pytest.approx(2 * (2 * (3 * keys + layer) + counts["head"]), rel=1e-6)
    more = model.flops_per_token(config, T) - model.flops_per_token(dataclasses.replace(config, loops=1), T)
    assert more == pytest.approx(6 * (3 * keys + layer) + 12 * model.mean_keys(config, "L", T) * 32)


def test_a_layer_without_tokens_adds_no_entropy_loss():
    net = tiny(**POOL | dict(entropy_coef=0.1, controller="fixed")).eval()
    assert net(PACKED, PACKED).stats["router_loss"] < 0, "minus the entropy of the layers with tokens"


def test_halted_tokens_pick_no_layer():
    """Neither in the choices nor in the balance loss over layers."""
    net = random_controller(halt="act", loops=4)
    trunk = trunk_of(net.eval(), PACKED)
    halted_SBT = torch.arange(len(trunk.choices_SBT))[:, None, None] >= trunk.loops_BT
    assert halted_SBT.any() and torch.equal(trunk.choices_SBT < 0, halted_SBT)
    prob_SBTN = torch.rand(4, 2, 18, 5, generator=rng(1))
    choice_SBT = torch.randint(5, (4, 2, 18), generator=rng(2))
    active = torch.rand(4, 2, 18, generator=rng(3)) >= 0.5
    prob_N, share_N = prob_SBTN[active].mean(0)[:4], F.one_hot(choice_SBT[active], 5).float().mean(0)[:4]
    want = 4 * (share_N / share_N.sum() * prob_N / prob_N.sum()).sum()
    assert far(net.layer_balance(prob_SBTN, choice_SBT.where(active, -1)), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("controller, solves", (("linear", True), ("lstm", True), ("memoryless", False)))
def test_only_a_controller_that_depends_on_the_step_runs_programs(controller, solves):
    soft, hard, off = toys.accuracies(toys.running(controller, steps=600))
    assert (hard >= 0.99 and soft >= 0.99) if solves else hard < 0.25, (soft, hard)
    if controller == "linear":
        assert off < 0.2


@pytest.mark.slow
def test_straight_through_gradients_from_the_start_learn_nothing():
    """The negative control of annealing."""
    assert toys.accuracies(toys.running("linear", "straight_through", steps=300))[1] < 0.25
    assert toys.accuracies(toys.running("linear", "anneal", steps=600))[1] >= 0.99


@pytest.mark.slow
def test_a_controller_finds_the_order_of_trained_layers():
    trained = zoo.build(toys.IN_TURN)
    toys.fit(trained, trained.parameters(), 300, 3e-3)
    net = toys.recovered(trained, "learned", "soft", 150)
    assert (
        torch.equal(toys.use(net), torch.eye(4)[:, :3])
        and abs(toys.held_out(net, 2) - toys.held_out(trained, 2)) < 1e-5
    )
    assert toys.held_out(toys.in_order(trained, (2, 1, 0)), 2) > toys.held_out(trained, 2) + 0.1


@pytest.mark.parametrize("field, value, legal", (
    ("controller", "gru", "linear"), ("route_by", "last", "token"), ("route_training", "hard", "soft"),
    ("step_loss", "first", "last"),
    ("residual", "average", "add"), ("halt", "ponder", "act"), ("loop_keys", "share_first", "latest"),
    ("attention", "AS", "without S"),
    ("router_residual", 0.5, "0 with depth routed"), ("identity_layers", -1, "at least 0"),
    ("anneal_steps", 0, "at least 1")))  # fmt: skip
def test_options_that_conflict_with_a_pool_are_refused(field, value, legal):
    with pytest.raises(UserError, match=f"^{field} is {value!r}.*{legal}"):
        zoo.Config(**TINY | POOL | {field: value})
