"""Options of attention and norms, each tested by the property that defines it.

test_reference.py compares all of them with their definition. CPU, no network: `pytest tests/zoo/test_attention.py`.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import (
    SEED,
    STEP,
    TINY,
    VOCAB,
    LargestTensor,
    cached,
    documents_like,
    far,
    gradients,
    logits,
    rng,
    slow_visible,
    text,
    tiny,
)
from slow import but_every

import model
import ops
import zoo
from cli import UserError
from ops import norm
from tools import cost
from zoo.attention import ROTARIES, scale_queries
from zoo.gpt import token_numbers
from zoo.masks import MetaBlockedMask, MetaDecodeMask, MetaDenseMask, MetaFlexMask, visible_keys


def layer_context(net: zoo.GPT, T: int, layer: int = 0, first: int = 0) -> zoo.block.Context:
    """Context of one layer for one document of T tokens, at positions from `first` on."""
    doc = torch.zeros(1, T, dtype=torch.int64)
    ctx = net.contexts(None, doc, doc, None)[0][layer]
    _, speed = net.config.rope_spec(layer)
    cos, sin = ops.rotary_tables(torch.arange(T) + first, net.config.head_dim, torch.float32, speed)
    return ctx._replace(cos=cos, sin=sin)


def attend(net: zoo.GPT, x, layer: int = 0, first: int = 0):
    with torch.no_grad():
        return net.blocks[layer].attention(x, layer_context(net, x.size(1), layer, first))[0]


# -----------------------------------------------------------------------------
# SSMax


def ssmax_net(s: float) -> zoo.GPT:
    net = tiny(attn_softmax="ssmax", qk_norm="none", rotary="N", n_head=1, head_dim=8, window="L", window_size=2**20,
               attn_scale=1.0)  # fmt: skip
    with torch.no_grad():
        net.blocks[0].attention.sharpness.fill_(s)
    return net


def last_token_weights(net: zoo.GPT, score_n) -> torch.Tensor:
    """Attention weights of the last of n tokens, given the plain scores of its keys."""
    n = len(score_n)
    q = torch.zeros(1, n, 1, 8)
    q[..., 0] = 1
    k = torch.zeros(1, n, 1, 8)
    k[0, :, 0, 0] = score_n
    with torch.no_grad():
        q = scale_queries(net.blocks[0].attention.sharpness, q, layer_context(net, n))[:, -1:]
        score = (q[:, :, 0] @ k[:, :, 0].mT)[0, 0]
    return score.softmax(-1)


@pytest.mark.parametrize("n, plain, ssmax", (
    (16, 0.908, 0.963), (128, 0.539, 0.996), (1024, 0.127, 0.9997), (8192, 0.018, 0.99997)))  # fmt: skip
def test_the_largest_score_keeps_its_share_under_ssmax_but_not_under_softmax(n, plain, ssmax):
    """One score of 3 among scores of -2, s = 0.43; the numbers follow from the formula of 2501.19399."""
    score = torch.full((n,), -2.0)
    score[n // 2] = 3.0
    assert abs(score.softmax(-1).max() - plain) < 1e-3
    assert abs(last_token_weights(ssmax_net(0.43), score).max() - ssmax) < 0.6 * 10.0 ** -len(str(ssmax)[2:])


def test_a_score_gap_of_one_over_s_gives_a_share_of_one_half_at_any_length():
    for n in (16, 128, 1024):
        score = torch.zeros(n)
        score[3] = 1 / 0.43
        assert abs(last_token_weights(ssmax_net(0.43), score)[3] - n / (2 * n - 1)) < 1e-4


def test_ssmax_is_uniform_at_s_zero_and_softmax_at_one_over_log_n():
    score = torch.randn(50, generator=rng(1))
    assert far(last_token_weights(ssmax_net(0.0), score), torch.full((50,), 1 / 50)) < 1e-6
    assert far(last_token_weights(ssmax_net(1 / math.log(50)), score), score.softmax(-1)) < 1e-5


@pytest.mark.parametrize("window, meta", ((1, 0), (5, 0), (100, 0), (5, 3), (2, 9)))
def test_visible_keys_counts_the_keys_in_the_mask(window, meta):
    position, doc = torch.arange(40), documents_like(3, 40, 0.15)
    doc[:, :meta] = -1
    shown = MetaDenseMask(position, position, doc, doc, torch.tensor(window), meta).mask.sum(-1)[:, 0]
    assert torch.equal(visible_keys(position, doc, doc, torch.tensor(window), meta), shown)
    late = slice(30, 40)  # as in a decoding step
    assert torch.equal(visible_keys(position[late], doc[:, late], doc, torch.tensor(window), meta), shown[:, late])


def test_every_head_has_a_sharpness_gradient_and_qk_norm_does_not_cancel_it():
    net, x = tiny(attn_softmax="ssmax"), text(2, 30, 1)
    grads = gradients(net, net(x, x).loss)
    assert all((grads[f"blocks.{i}.attention.sharpness"] != 0).all() for i in range(4))
    before = logits(net.eval(), x)
    with torch.no_grad():
        net.blocks[0].attention.sharpness.mul_(3)
    assert far(logits(net, x), before) > 1e-2


def test_ssmax_starts_near_plain_softmax():
    net = zoo.build(zoo.Config(**TINY | dict(attn_softmax="ssmax")))
    s = net.blocks[0].attention.sharpness
    assert torch.equal(s, torch.full((2,), 0.168)) and abs(0.168 * torch.arange(1, 1025).log().mean() - 1) < 0.01


# -----------------------------------------------------------------------------
# Rotary embeddings


@pytest.mark.parametrize("rotary", sorted(ROTARIES))
def test_shifting_all_positions_changes_nothing(rotary):
    net, x = tiny(rotary=rotary, window="LS"), torch.randn(1, 25, 32, generator=rng(2))
    for layer in (0, 1):
        assert far(attend(net, x, layer, first=70), attend(net, x, layer)) < 1e-4


def test_only_without_rotary_is_attention_invariant_to_order():
    """Output of the last token, with the tokens before it permuted."""
    x = torch.randn(1, 10, 32, generator=rng(3))
    order = torch.cat([torch.randperm(9, generator=rng(4)), torch.tensor([9])])
    nets = {rotary: tiny(rotary=rotary) for rotary in ROTARIES}
    moved = {rotary: far(attend(net, x[:, order])[:, -1], attend(net, x)[:, -1]) for rotary, net in nets.items()}
    assert moved.pop("N") < 1e-5 and min(moved.values()) > 1e-2, moved


def test_vo_rope_rotates_values_by_their_distance_and_leaves_scores_unchanged():
    """With a window of 2, the value of the previous token is rotated by a distance of one token."""
    net, x = tiny(rotary="V", window_size=2, window="L"), torch.randn(1, 6, 32, generator=rng(5))
    attention = net.blocks[0].attention
    q, k, v = (part[0] for part in (x @ attention.qkv.flatten(0, 1).T).unflatten(-1, (3, 2, 16)).unbind(2))
    v, angle = v * attention.value_mix[0], torch.arange(4) / 3
    rms = lambda z: z / z.square().mean(-1, keepdim=True).sqrt()
    score = (rms(q[1:, :, None]) * rms(torch.stack([k[1:], k[:-1]], 2))).sum(
        -1
    ) * 0.5  # (T - 1, H, own and the one before)
    weight = score.softmax(-1)
    turn = torch.exp(1j * torch.cat([1024**-angle, torch.zeros(4)]))
    z = torch.complex(v[:-1, :, :8], v[:-1, :, 8:]) * turn  # back by the angle of one token
    before = torch.cat([z.real, z.imag], -1)
    y = weight[..., :1] * v[1:] + weight[..., 1:] * before
    assert far(attend(net, x)[0, 1:], y.flatten(1) @ attention.out.T) < 1e-5


def test_wavelet_layers_rotate_by_the_same_angle_within_their_windows():
    config = zoo.Config(**TINY | dict(rotary="W", window="LSQE", window_size=96))
    speeds = [config.rope_spec(layer)[1] for layer in range(4)]
    assert speeds == [1 / 8, 1 / 4, 1 / 2, 1.0]
    assert len({speed * (96 // model.WINDOWS[letter]) for speed, letter in zip(speeds, "LSQE")}) == 1
    assert [dataclasses.replace(config, rotary="H").rope_spec(layer)[1] for layer in range(4)] == [1.0] * 4


@pytest.mark.parametrize("window, want", (("L", [1.0] * 4), ("E", [1.0] * 4), ("LS", [0.5, 1.0] * 2),
                                          ("SSSE", [0.25, 0.25, 0.25, 1.0]), ("LLLLE", [1.0] * 4)))  # fmt: skip
def test_the_shortest_window_in_use_has_speed_one(window, want):
    config = zoo.Config(**TINY | dict(rotary="W", window=window, window_size=96))
    assert [config.rope_spec(layer)[1] for layer in range(4)] == want


# -----------------------------------------------------------------------------
# Keys and values: latent, shared


def cached_numbers_per_token(net: zoo.GPT) -> int:
    cache = zoo.KVCache(net.config, 1, 5)
    with torch.no_grad():
        net.eval()(text(1, 5), cache=cache)
    return sum(part[0, 0].numel() for parts in cache.kept.values() for part in parts)


@pytest.mark.parametrize("attention, kept", (
    ("A", 4 * 64), ("AS", 2 * 64), ("ASSS", 64), ("L", 4 * (8 + 8)), ("LS", 2 * (8 + 8)), ("K-", 2 * 64),
    ("AAAS", 3 * 64)))  # fmt: skip
def test_cache_size(attention, kept):
    """Keys and values of two heads of 16: 64 numbers; latent vector and rotating half of a head: 8 + 8; shared: 0."""
    config = zoo.Config(**TINY | dict(attention=attention, latent_dim=8))
    assert cached_numbers_per_token(zoo.build(config)) == kept
    in_bf16 = dataclasses.replace(config, dtype="bf16")
    assert cost.cache_bytes_per_token(config) == 4 * kept == 2 * cost.cache_bytes_per_token(in_bf16)


def test_latent_keys_are_shared_by_heads_where_they_rotate_and_of_low_rank_elsewhere():
    net, x = tiny(attention="L", latent_dim=8, qk_norm="none"), torch.randn(1, 40, 32, generator=rng(6))
    with torch.no_grad():
        _, (k, v) = net.blocks[0].attention.project(x, layer_context(net, 40))
    rotating = torch.tensor([*range(4), *range(8, 12)])
    static = torch.tensor([*range(4, 8), *range(12, 16)])
    assert torch.equal(k[:, :, 0, rotating], k[:, :, 1, rotating]) and far(k[:, :, 0, static], k[:, :, 1, static]) > 0.1
    computed = torch.cat([k[0][..., static].flatten(1), v[0].flatten(1)], 1)
    assert torch.linalg.matrix_rank(computed) == 8 and torch.linalg.matrix_rank(x[0]) == 32


def test_shared_keys_are_those_of_the_nearest_earlier_layer_that_computes_some():
    net = tiny(attention="A-SS", window="L")
    kv = []
    for block in net.blocks:
        block.attention.register_forward_hook(lambda module, args, out: kv.append(out[1]))
    with torch.no_grad():
        net(text(1, 12, 2))
    assert kv[1] is None and kv[2][0] is kv[0][0] is kv[3][0] and kv[2][1] is kv[0][1]
    assert [name for name, _ in net.blocks[2].attention.named_parameters()] == ["q", "out"]


def test_a_block_returns_keys_only_if_a_later_one_shares_them():
    net, returned = tiny(attention="AAS-", window="L"), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: returned.append(out[2]))
    with torch.no_grad():
        net(text(1, 12, 2))
    assert [kv is not None for kv in returned] == [False, True, False, False]
    assert zoo.Config(**TINY | dict(attention="AAS-")).key_sources == {2: 1}


def test_shared_keys_get_gradients_from_every_layer_that_uses_them():
    net, x = tiny(attention="AS", n_layer=2, value_embeds=1, window="L"), text(2, 20, 3)
    both = gradients(net, net(x, x).loss)["blocks.0.attention.qkv"]
    with torch.no_grad():
        net.blocks[0].attention.out.zero_()
    alone = gradients(net, net(x, x).loss)["blocks.0.attention.qkv"]
    assert (alone[1:] != 0).any() and torch.equal(alone[0], torch.zeros_like(alone[0])) and (both[0] != 0).any()


def test_a_shared_layer_needs_keys_of_the_same_rotary_kind():
    with pytest.raises(UserError, match="attention is 'SA'; it must be without S in layer 0"):
        zoo.Config(**TINY | dict(attention="SA"))
    with pytest.raises(UserError, match="without S in layer 1"):
        zoo.Config(**TINY | dict(attention="-SA"))
    with pytest.raises(UserError, match="rotary is 'HN'; it must be the same in layer 1 as in layer 0"):
        zoo.Config(**TINY | dict(attention="AS", rotary="HN"))
    with pytest.raises(UserError, match="the same in layer 1 as in layer 0"):
        zoo.Config(**TINY | dict(attention="AS", rotary="W", window="LS"))
    with pytest.raises(UserError, match="rotary is 'V'; it must be H, N or W where attention is L"):
        zoo.Config(**TINY | dict(attention="L", rotary="V"))


# -----------------------------------------------------------------------------
# QK-norm


def test_only_without_qk_norm_does_the_length_of_queries_matter():
    x = text(2, 20, 4)
    for qk_norm, matters in (("rms", False), ("none", True)):
        net = tiny(qk_norm=qk_norm).eval()
        before = logits(net, x)
        with torch.no_grad():
            for block in net.blocks:
                block.attention.qkv[0].mul_(4)
        assert (far(logits(net, x), before) > 1e-2) == matters, qk_norm


# -----------------------------------------------------------------------------
# Meta-tokens


def test_meta_tokens_are_a_parameter_and_change_the_logits():
    assert tiny().meta_tokens is None and tiny(num_meta_tokens=2).meta_tokens.shape == (2, 32)
    net, x = tiny(num_meta_tokens=2).eval(), text(2, 20, 5)
    plain = tiny().eval()
    plain.load_state_dict({name: p for name, p in net.state_dict().items() if name != "meta_tokens"})
    assert net(x).logits.shape == plain(x).logits.shape and far(logits(net, x), logits(plain, x)) > 1e-2
    assert net(x).stats["counts_LE"].sum() == 4 * 2 * 2 * 22 and plain(x).stats["counts_LE"].sum() == 4 * 2 * 2 * 20


def test_every_token_of_every_document_sees_every_meta_token():
    """In one layer with a window of 2, a change of a meta-token changes every token."""
    net = tiny(n_layer=1, value_embeds=0, window="L", window_size=2, num_meta_tokens=3, pattern="D").eval()
    x = text(1, 40, 6, eots=[(0, 0), (0, 20)])
    before = logits(net, x)
    for m in range(3):
        with torch.no_grad():
            net.meta_tokens[m].mul_(-1)
        after = logits(net, x)
        assert ((after - before).abs().amax(-1) > 1e-5).all(), m
        before = after
    assert (gradients(net, net(x, x).loss)["meta_tokens"] != 0).all()


MASKS = [(T, window, meta, rate) for T in (1, 40, 300, 384)
         for window, meta, rate in ((1, 1, 0.1), (40, 7, 0.02), (500, 30, 0.0), (129, 200, 0.01))]  # fmt: skip


@pytest.mark.parametrize("T, window, meta, rate", MASKS)
def test_meta_tokens_are_visible_in_every_mask(T, window, meta, rate):
    meta = min(meta, T)
    position, doc = torch.arange(T), documents_like(2, T, rate, T + window)
    doc[:, :meta] = -1
    seen = slow_visible(T, doc, window) | ((position < meta) & (position[:, None] >= position))
    window = torch.tensor(window)
    assert torch.equal(MetaDenseMask(position, position, doc, doc, window, meta).mask, seen)
    q, k, v, dy = (torch.randn(2, 2, T, 8, generator=rng(i)) for i in range(4))
    found = []
    for kind in (MetaBlockedMask, MetaDenseMask):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        y = kind(position, position, doc, doc, window, meta).attend(*inputs, 0.3)
        found.append([y, *torch.autograd.grad((y * dy).sum(), inputs)])
    assert max(far(a, b) for a, b in zip(*found)) < 1e-5
    if T % MetaFlexMask.BLOCK == 0:
        mask = MetaFlexMask(position, position, doc, doc, window, meta).block_mask
        visible = mask.mask_mod(torch.arange(2)[:, None, None], 0, position[:, None], position)
        assert torch.equal(visible, seen[:, 0])
        for b, i, j in itertools.product(range(2), range(T // 128), range(T // 128)):
            block = seen[b, 0, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            partial = j in mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
            full = j in mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
            assert not (partial and full) and (partial or full or not block.any()) and (block.all() or not full), (
                b,
                i,
                j,
            )


@pytest.mark.parametrize("T, S, window, meta", ((1, 300, 40, 7), (293, 300, 17, 7), (300, 300, 17, 7), (150, 400, 30, 9)))
def test_queries_behind_a_cache_see_the_meta_tokens(T, S, window, meta):
    position, doc, window = torch.arange(S), documents_like(2, S, 0.01, T), torch.tensor(window)
    doc[:, :meta] = -1
    q, k, v = (torch.randn(2, 2, size, 8, generator=rng(size)) for size in (T, S, S))
    got, want = (kind(position[-T:], position, doc[:, -T:], doc, window, meta).attend(q, k, v, 0.3)
                 for kind in (MetaDecodeMask, MetaDenseMask))  # fmt: skip
    assert got.shape == q.shape and far(got, want) < 1e-5


@pytest.mark.parametrize("options", (
    dict(num_meta_tokens=3), dict(depth="loop", loops=2, halt="act", attn_softmax="ssmax"), dict(depth="routed", loops=2)),
    ids=str)  # fmt: skip
def test_a_long_prompt_is_cached_without_a_tensor_of_all_pairs(options):
    net, T = tiny(n_layer=2, pattern="D", **options).eval(), 800
    if options.get("halt"):
        with torch.no_grad():
            net.halt.weight.normal_(generator=rng(1))
    x = text(1, T, 3, eots=[(0, 310)])
    with LargestTensor() as seen:
        got = cached(net, x, [])
    assert seen.numel < T * T / 2, f"a tensor of {seen.shape}"
    assert far(got, logits(net, x)) < 1e-4


def test_meta_tokens_have_the_same_noise_in_every_row_and_do_not_change_that_of_others():
    numbers = token_numbers(torch.tensor(100), 2, 7, 3).view(2, 7)
    assert numbers.tolist() == [[-1, -2, -3, 100, 101, 102, 103], [-1, -2, -3, 104, 105, 106, 107]]
    net, x = tiny(num_meta_tokens=3).train(), text(2, 20, 7)
    whole = logits(net, x)
    assert far(logits(net, x[1:], first_token=20), whole[1:]) < 1e-5


def test_meta_tokens_are_counted_in_flops_and_memory():
    plain, more = (zoo.Config(**TINY | dict(num_meta_tokens=n)) for n in (0, 10))
    T = 40
    keys = 12 * 4 * 10 * 32  # in 4 layers every token has 10 more keys
    head = 6 * 64 * 32  # no logits are computed of meta-tokens
    blocks = model.flops_per_token(plain, T) - head
    assert model.flops_per_token(more, T) == pytest.approx((blocks + keys) * (T + 10) / T + head)
    tied = dataclasses.replace(more, tie_embeddings=True)
    assert model.flops_per_token(tied, T) == pytest.approx(model.flops_per_token(more, T))
    assert cost.saved_bytes(more, 512, 10) > cost.saved_bytes(plain, 512, 0) * 1.01


def test_generation_with_meta_tokens_equals_full_forwards():
    net, x = tiny(num_meta_tokens=5, attention="KL", attn_softmax="ssmax").eval(), text(1, 8, 8)
    net.set_step(SEED, STEP)
    ids = net.generate(x, 12, temperature=0)
    for t in range(8, 20):
        with torch.no_grad():
            assert net(ids[:, :t]).logits[0, -1, :VOCAB].argmax() == ids[0, t]


# -----------------------------------------------------------------------------
# Peri-norm


def test_with_peri_norm_every_sublayer_adds_a_vector_of_unit_rms():
    net, x = tiny(norms="R", pattern="DM"), torch.randn(1, 9, 32, generator=rng(9))
    for layer, block in enumerate(net.blocks):
        added = []
        block.residual = lambda x, y, terms, x0, added=added: added.append(y) or x + y
        with torch.no_grad():
            y, *_ = block(x, x, layer_context(net, 9, layer))
        assert len(added) == 2 and all(far(z.square().mean(-1), torch.ones(1, 9)) < 1e-4 for z in added)
        assert far(y, ops.blend(block.stream_mix, x, x) + added[0] + added[1]) < 1e-6


def test_peri_norm_cancels_the_scale_of_an_output():
    """The scale of routed_scale, of small gates or of a zero expert has no effect behind a norm."""
    x = text(1, 20, 9)
    for norms, cancels in (("P", False), ("R", True)):
        one, three = (tiny(norms=norms, routed_scale=scale).eval() for scale in (1.0, 3.0))
        assert (far(logits(three, x), logits(one, x)) < 1e-4) == cancels, norms
    slope = torch.zeros(1, 32, requires_grad=True)
    norm(slope).sum().backward()
    assert (
        far(slope.grad, torch.full((1, 32), torch.finfo(torch.float32).eps ** -0.5)) < 1e-4 and slope.grad.max() > 2_800
    )


def test_the_norm_pattern_is_per_layer():
    net = tiny(norms="RP")
    assert [block.norms.after for block in net.blocks] == [True, False, True, False]


# -----------------------------------------------------------------------------
# Compilation: graphs that torch.compile traces, without code generation


@pytest.mark.parametrize("changes, kinds", but_every(9, (
    (dict(attention="A"), 1), (dict(attention="KS"), 2), (dict(attention="LA", attn_softmax="ssmax"), 2),
    (dict(attention="R", norms="U"), 1),
    (dict(rotary="HVBW", qk_norm="none"), 4), (dict(num_meta_tokens=4, norms="R"), 1),
    (dict(depth="loop", loops=3, norms="RP"), 2),
    (dict(depth="loop", loops=2, residual="average", looped=".oo."), 2),  # behind it the number of terms is a tensor
    (dict(router="attention", experts="mlp*3,constant"), 1))))  # fmt: skip
def test_layers_of_one_kind_share_one_graph_whatever_the_routes(changes, kinds):
    """A graph without breaks, which other tokens or another step do not compile again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = tiny(value_embeds=0, **dict(window="L") | changes).train()
    for block in net.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    for step in range(3):
        net.set_step(SEED, step)
        net(text(2, 40, step), text(2, 40, step)).loss.backward()
        if step == 0:
            first = len(graphs)
    assert first <= kinds and len(graphs) == first, (first, len(graphs))
