"""All routers, depths, kinds of experts and attention of the zoo: leaks, cached decoding, embeddings, definitions.

The meaning of one option is tested in the file of that option. CPU, no network: `pytest tests/zoo/test_builds.py`."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BUILDS,
    CORE_BUILDS,
    EOT,
    NEEDS_IDS,
    PACKED,
    SEED,
    STEP,
    TINY,
    VOCAB,
    assert_same_gradients,
    cached,
    check_cache,
    check_documents,
    check_future,
    check_prefixes,
    check_rows,
    core,
    far,
    gradients,
    logits,
    name_of,
    rng,
    same,
    settled,
    step_loss,
    text,
    tiny,
    zoo_fields,
)
from reference import slow_forward
from slow import but_every

import model
import ops
import zoo
import zoo.attention
from cli import UserError
from tools.cost import model_card
from zoo import Config
from zoo.config import TABLES
from zoo.routers import LinearRouter

WITH_EMBEDDINGS = [build for build in BUILDS if build["router"] not in NEEDS_IDS]

# -----------------------------------------------------------------------------
# 1. Nothing leaks between tokens


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("build", but_every(3, BUILDS), ids=name_of)
def test_logits_depend_on_earlier_tokens_of_the_document_alone(build, training):
    net = tiny(**build).train(training)
    check_prefixes(net, PACKED)
    check_future(net, PACKED)
    check_rows(net, PACKED)
    check_documents(net, PACKED)


@pytest.mark.parametrize("build", but_every(6, WITH_EMBEDDINGS), ids=name_of)
def test_logits_of_embeddings_depend_on_earlier_ones_alone(build):
    net, x = tiny(**build), torch.randn(2, 14, 32, generator=rng(5))
    for training in (False, True):
        net.train(training)
        check_prefixes(net, x)
        check_future(net, x)
        check_rows(net, x)


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_forward_changes_no_state(training):
    net = tiny().train(training)
    net.set_step(SEED, STEP)
    before = {name: t.clone() for name, t in itertools.chain(net.named_parameters(), net.named_buffers())}
    first, state = net(PACKED, PACKED), torch.get_rng_state()
    second = net(PACKED, PACKED)
    assert torch.equal(first.loss, second.loss) and torch.equal(state, torch.get_rng_state())
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        assert torch.equal(tensor, before[name]), name


class CausalConv(LinearRouter):
    """Causal within the row, but across documents, and without a state for decoding."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + F.pad(x_BTD[:, :-1], (0, 0, 1, 0)), ctx)


@pytest.mark.parametrize("check", (check_documents, check_cache), ids=lambda check: check.__name__)
def test_a_planted_leak_is_caught(monkeypatch, check):
    monkeypatch.setitem(model.ROUTERS, "leak", CausalConv)
    with pytest.raises(AssertionError, match="logits differ"):
        check(tiny(router="leak").eval(), *([] if check is check_cache else [PACKED]))


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_evaluation_is_deterministic_under_any_seed_and_step(build):
    net, outs = tiny(**build).eval(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net.set_step(seed=seed, step=10 * seed, first_token=1000 * seed)
        outs.append(net(PACKED).logits)
    assert torch.equal(*outs), "evaluation is random"


def test_explicit_documents_apply_to_embeddings_too():
    net, x = tiny().eval(), torch.randn(2, 18, 32, generator=rng(4))
    doc = torch.tensor([[0] * 5 + [1] * 13, [0] * 9 + [4] * 9])
    assert far(logits(net, x, doc=doc), logits(net, x)) > 1e-2
    assert torch.equal(logits(net, x, doc=doc * 0), logits(net, x))


def test_embeddings_are_an_input_as_ids_are():
    """Without value embeddings, a table's rows give the logits of their ids."""
    net, x = tiny(value_embeds=0), text(2, 18, 2)
    for training in (False, True):
        net.train(training)
        same(logits(net, F.embedding(x, net.embed).detach()), logits(net, x), settled(net, x), "embeddings")
    out = net(torch.randn(2, 5, 32).double())
    assert out.logits.shape == (2, 5, 64) and out.loss is None
    leaf = torch.randn(2, 5, 32, requires_grad=True)
    assert torch.autograd.grad(net(leaf, x[:, :5]).loss, leaf)[0].abs().max() > 0


# -----------------------------------------------------------------------------
# 2. The zoo without options is the core


@pytest.mark.parametrize("build", CORE_BUILDS, ids=name_of)
def test_without_options_the_zoo_equals_the_core_bit_for_bit(build):
    own, of_zoo = core(**build), tiny(**build)
    state = dict(own.named_parameters())
    with torch.no_grad():
        for name, parameter in of_zoo.named_parameters():
            parameter.copy_(state[name])
        for name in ("bias_LE", "load_WLE"):
            of_zoo.get_buffer(name).copy_(own.get_buffer(name))
    assert [name for name, _ in of_zoo.named_parameters()] == list(state)
    for training in (True, False):
        outs = [step_loss(net.train(training), PACKED, text(2, 18, 5)) for net in (own, of_zoo)]
        assert torch.equal(*outs)
        grads = [gradients(net, loss) for net, loss in zip((own, of_zoo), outs)]
        assert all(torch.equal(grads[0][name], grads[1][name]) for name in state)
        assert torch.equal(logits(own, PACKED), logits(of_zoo, PACKED))
    fields = dict(TINY | build)
    assert model.count_parameters(model.Config(**fields)) == model.count_parameters(Config(**fields))
    assert model.flops_per_token(model.Config(**fields), 40) == model.flops_per_token(Config(**fields), 40)


# -----------------------------------------------------------------------------
# 3. Routes


def recorded_routes(monkeypatch) -> list:
    """Routes of all later calls of dispatch."""
    routes, real_dispatch = [], model.dispatch
    record = lambda x, route, experts: (routes.append(route), real_dispatch(x, route, experts))[1]
    monkeypatch.setattr(model, "dispatch", record)
    return routes


@pytest.mark.parametrize("router", sorted(zoo.ROUTERS))
@pytest.mark.parametrize("E, k", ((4, 2), (8, 3), (5, 2), (4, 4), (4, 1)))
def test_each_token_has_k_distinct_experts_and_gates_that_sum_to_one(router, E, k, monkeypatch):
    routes = recorded_routes(monkeypatch)
    net = tiny(router=router, num_experts=E, top_k=k, mlp_ratio=3.0, pattern="DM").train()
    counts_LE = net(PACKED).stats["counts_LE"]
    assert len(routes) == 2 and counts_LE.shape == (2, E) and counts_LE.dtype == torch.int64
    for route, counts_E in zip(routes, counts_LE):
        assert route.expert_TK.shape == route.weight_TK.shape == (36, k) and route.logits_TE.shape == (36, E)
        assert all(len(set(row)) == k for row in route.expert_TK.tolist())
        assert ((0 <= route.expert_TK) & (route.expert_TK < E)).all()
        sum_T = route.weight_TK.sum(1)
        assert sum_T.dtype == torch.float32 and (far(sum_T, torch.ones(36)) < 1e-6 or (k == 1 and sum_T.max() < 1))
        assert counts_E.tolist() == [sum(row.count(e) for row in route.expert_TK.tolist()) for e in range(E)]
        assert counts_E.sum() == 36 * k


def test_router_hash_takes_the_id_modulo_e_and_evenly_spaced_ones(monkeypatch):
    routes = recorded_routes(monkeypatch)
    tiny(router="hash")(PACKED)
    ids_T = PACKED.flatten()
    assert torch.equal(routes[0].expert_TK, torch.stack([ids_T % 4, (ids_T + 2) % 4], 1))


def test_each_moe_layer_has_its_own_bias_and_noise():
    net = tiny(pattern="DM").eval()
    with torch.no_grad():
        net.bias_LE.copy_(torch.tensor([[10.0, 10, 0, 0], [0, 0, 10, 10]]))
    assert net(PACKED).stats["counts_LE"].tolist() == [[36, 36, 0, 0], [0, 0, 36, 36]]
    ids_BT = text(1, 8, 0)
    contexts, _ = tiny(n_layer=3, pattern="DMM").contexts(ids_BT, ids_BT * 0, ids_BT * 0, None)
    assert [ctx.noise_key[2].item() for ctx in contexts[1:]] == [0, 1]


# -----------------------------------------------------------------------------
# 4. Decoding


@pytest.mark.parametrize("build", but_every(3, BUILDS), ids=name_of)
def test_cached_decoding_equals_the_full_forward(build):
    check_cache(tiny(**build).eval())


def test_cached_decoding_of_embeddings_equals_the_full_forward():
    net, x = tiny().eval(), torch.randn(2, 20, 32, generator=rng(6))
    same(cached(net, x, [3, 4, 12]), logits(net, x), settled(net, x), "embeddings")


@pytest.mark.parametrize("build", BUILDS[:1] + BUILDS[-1:], ids=name_of)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_greedy_generation_equals_a_loop_of_full_forwards(build, training):
    net, prompt = tiny(**build).train(training), text(2, 5, 4, eots=[(0, 0), (1, 0)])
    got = net.generate(prompt, 25, temperature=0)
    assert net.training == training and all(module.training == training for module in net.modules())
    net.eval()
    want = prompt
    with torch.no_grad():
        for _ in range(25):
            want = torch.cat([want, net(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want) and torch.equal(net.generate(prompt, 25, temperature=1.0, top_k=1), want)
    assert torch.equal(net.generate(prompt, 0), prompt)


# -----------------------------------------------------------------------------
# 5. Parameters


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_every_parameter_has_a_kind(build):
    net = zoo.build(Config(**zoo_fields(**build)))
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
    assert (kinds["embed"], kinds["head"], kinds["value_embeds.0"]) == ("embed", "head", "value_embed")


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_every_build_runs_on_the_meta_device(build):
    with torch.device("meta"):
        assert all(p.is_meta for p in zoo.build(Config(**zoo_fields(**build))).parameters())
        net = zoo.build(Config(**zoo_fields(**build, dtype="bf16")))
        out = net(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    assert all(p.is_meta for p in net.parameters()) and out.loss.shape == ()


# -----------------------------------------------------------------------------
# 6. Config

BAD = [
    ("attention", "B", "A K L S R -"), ("rotary", "HX", "H N V B W"), ("norms", "X", "P R"),
    ("attn_softmax", "max", "ssmax"),
    ("qk_norm", "layer", "rms, none"), ("latent_dim", 0, "at least 1"), ("latent_dim", 12, "multiple of 8"),
    ("num_meta_tokens", -1, "at least 0"), ("router", "lineer", "linear, hash"), ("depth", "stak", "stack"),
    ("routed_scale", "loud", "auto or a number"), ("routed_scale", "1.0", "auto or a number"),
    ("free_eta", 0.0, "above 0"),
    ("mask_share", 1.0, "between 0 and 1"), ("residual", "mean", "average"), ("shared", "kan", "mlp, conv"),
    ("router_score", "tanh", "softmax, sigmoid"), ("router_dim", 8, "multiple of 16"),
    ("experts", "identity", "at least one"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, legal", BAD, ids=[f"{field}={value!r}" for field, value, _ in BAD])
def test_a_bad_value_is_refused_by_name_with_the_legal_values(field, value, legal):
    with pytest.raises(UserError) as error:
        Config(**TINY | {field: value})
    message = str(error.value)
    assert message.startswith(f"{field} is {value!r}") and legal in message and "\n" not in message


def test_a_list_of_experts_has_num_experts_entries():
    """One name alone stands for num_experts of them."""
    counts = [zoo_fields(experts=experts)["num_experts"] for experts in ("mlp", "mlp*1", "mlp*3", "mlp,mlp")]
    assert counts == [4, 1, 3, 2]
    for experts in ("mlp", "mlp*1", "mlp*3", "mlp,mlp"):
        fields = zoo_fields(experts=experts, top_k=1)
        assert sum(Config(**fields).expert_counts.values()) == fields["num_experts"]
    with pytest.raises(UserError, match="num_experts is 4; it must be 3"):
        Config(**TINY | dict(experts="mlp*3"))


def test_every_table_field_names_all_its_keys():
    own = {"attn_softmax": zoo.attention.SOFTMAXES, "qk_norm": zoo.attention.QK_NORMS}
    assert all(TABLES[field] == table for field, table in own.items())
    for field, table in Config(**TINY).tables().items():
        with pytest.raises(UserError) as error:
            Config(**TINY | {field: "nothing"})
        assert all(key in str(error.value) for key in table), field
    assert {"head": ops.HEADS, "dtype": model.DTYPES}.items() <= Config(**TINY).tables().items()


@pytest.mark.parametrize("preset", sorted(zoo.PRESETS))
def test_every_preset_has_a_card(preset):
    config = zoo.PRESETS[preset]
    counts, card = model.count_parameters(config), model_card(config, config.window_size)
    assert f"{counts['total']:,} total, {counts['active']:,} active" in card
    assert all(word in card for word in ("layers", "experts", "FLOPs per token", "activations"))


# -----------------------------------------------------------------------------
# 7. Dense models with options, and their loop, against their definition

DENSE = [dict(n_layer=6, value_embeds=3), dict(attn_softmax="ssmax"), dict(qk_norm="none"),
         dict(rotary="NVBW", window="LLLS"), dict(rotary="W", window="LSQE"), dict(attention="L", rotary="HN"),
         dict(attention="ASLS"), dict(attention="KSKS", rotary="WWBB", window="LLSS", attn_softmax="ssmax"),
         dict(norms="RP"), dict(norms="R", attention="LA-A"), dict(num_meta_tokens=3, ngrams="2", ngram_rows=50),
         dict(num_meta_tokens=9, attention="KL", attn_softmax="ssmax", rotary="HW"),
         dict(objective="masked", window="LSQE"),
         dict(objective="masked", num_meta_tokens=3, attention="KL")]  # fmt: skip
LOOPS = [dict(loops=3), dict(loops=1), dict(loops=2, looped=".o", n_layer=3, attention="KL-"),
         dict(loops=3, looped=".oo.", reinject=0.5), dict(loops=3, residual="average", norms="R"),
         dict(loops=2, residual="average_keep_embedding", looped="o.", n_layer=2),
         dict(loops=3, loop_keys="share_first", attention="KAAA"),
         dict(loops=3, attention="AS", num_meta_tokens=3, attn_softmax="ssmax"),
         dict(loops=2, objective="masked")]  # fmt: skip


def loss_of_all(net, x, y):
    """Cross-entropy at every token, whatever the objective hides."""
    if net.config.objective == "next":
        return net(x, y).loss
    return F.cross_entropy(net(x).logits[..., :VOCAB].flatten(0, 1), y.flatten())


@pytest.mark.parametrize("changes", DENSE + [dict(depth="loop") | changes for changes in LOOPS], ids=name_of)
def test_a_dense_model_equals_its_definition_in_logits_and_gradients(changes):
    net, x, y = tiny(pattern="D", **changes), text(2, 20, 6), text(2, 20, 7)
    want = slow_forward(net, x)
    assert far(net(x).logits[..., :VOCAB], want) < 1e-5
    losses = loss_of_all(net, x, y), F.cross_entropy(want.flatten(0, 1), y.flatten())
    assert_same_gradients(*(gradients(net, loss) for loss in losses))


def test_windows_hold_for_routers_without_neighbours():
    """A changed id moves logits one window per layer ahead, and no further, with experts chosen by a hash."""
    for letters, reach in (("L", 4 * 5), ("S", 4 * 2), ("LS", 2 * 5 + 2 * 2)):
        net, x = tiny(window=letters, window_size=6, router="hash").eval(), text(1, 40, 8)
        other = x.clone()
        other[0, 3] = (other[0, 3] + 4) % EOT  # the same experts
        moved = (logits(net, other) - logits(net, x)).abs().amax(-1)[0] > 0
        assert moved[3 + reach] and not moved[4 + reach :].any(), letters


def test_sampling_frequencies_are_the_softmax_at_the_temperature():
    net, prompt = tiny(router="hash").eval(), text(1, 4, 4).expand(4000, 4)
    with torch.no_grad():
        p = (net(prompt[:1]).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(net.generate(prompt, 1, temperature=0.7)[:, -1], minlength=64) / 4000
    assert ((counts - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-6).all()
