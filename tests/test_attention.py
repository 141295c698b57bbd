"""Options of attention and norms, each by the invariant that makes it what it is. test_model.py compares all of them with their definition,
and sends them through its checks of leaks, documents and cached decoding.

CPU, no network: `pytest tests/test_attention.py`."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from test_model import SEED, STEP, TINY, VOCAB, documents_like, far, gradients, logits, rng, slow_visible, text, tiny  # noqa: E402

import model as M  # noqa: E402
from model import GPT, BlockedMask, Cache, Config, ConfigError, DenseMask, FlexMask  # noqa: E402


def layer_context(net: GPT, T: int, layer: int = 0, first: int = 0) -> M.Context:
    """Of one layer for one document of T tokens, turned as if `first` more stood before it."""
    doc = torch.zeros(1, T, dtype=torch.int64)
    zero = torch.zeros(())
    ctx = net.contexts(doc, doc, doc, [zero] * net.config.n_layer, None)[0][layer]
    cos, sin = M.rotary_tables(torch.arange(T) + first, net.config.head_dim, torch.float32, net.config.turning(layer)[1])
    return ctx._replace(cos=cos, sin=sin)


def attend(net: GPT, x, layer: int = 0, first: int = 0):
    with torch.no_grad():
        return net.blocks[layer].attention(x, layer_context(net, x.size(1), layer, first))[0]


# -----------------------------------------------------------------------------
# SSMax


def ssmax_net(s: float, **changes) -> GPT:
    net = tiny(attn_softmax="ssmax", qk_norm="none", rotary="N", n_head=1, head_dim=8, window="L", window_size=2**20, attn_scale=1.0, **changes)
    with torch.no_grad():
        net.blocks[0].attention.sharpness.fill_(s)
    return net


def weights_of_the_last(net: GPT, score_n) -> torch.Tensor:
    """What the last of n tokens gives to each key whose score, before the softmax, is score_n."""
    n = len(score_n)
    q = torch.zeros(1, n, 1, 8)
    q[..., 0] = 1
    k, v = torch.zeros(2, 1, n, 1, 8)
    k[0, :, 0, 0] = score_n
    attention = net.blocks[0].attention
    with torch.no_grad():
        q = attention.softmax(attention, q, layer_context(net, n))[:, -1:]
        score = (q[:, :, 0] @ k[:, :, 0].mT)[0, 0]
    return score.softmax(-1)


@pytest.mark.parametrize("n, plain, ssmax", (
    (16, 0.908, 0.963), (128, 0.539, 0.996), (1024, 0.127, 0.9997), (8192, 0.018, 0.99997)))  # fmt: skip
def test_one_score_above_the_rest_keeps_its_share_under_ssmax_and_loses_it_under_softmax(n, plain, ssmax):
    """One score of 3 among scores of -2, s = 0.43: figures worked out from 2501.19399's formula."""
    score = torch.full((n,), -2.0)
    score[n // 2] = 3.0
    assert abs(score.softmax(-1).max() - plain) < 1e-3
    assert abs(weights_of_the_last(ssmax_net(0.43), score).max() - ssmax) < 0.6 * 10.0 ** -len(str(ssmax)[2:])


def test_a_gap_of_one_over_s_is_worth_one_half_at_any_length():
    for n in (16, 128, 1024):
        score = torch.zeros(n)
        score[3] = 1 / 0.43
        assert abs(weights_of_the_last(ssmax_net(0.43), score)[3] - n / (2 * n - 1)) < 1e-4


def test_ssmax_with_s_zero_is_uniform_and_with_one_over_log_n_is_softmax():
    score = torch.randn(50, generator=rng(1))
    assert far(weights_of_the_last(ssmax_net(0.0), score), torch.full((50,), 1 / 50)) < 1e-6
    assert far(weights_of_the_last(ssmax_net(1 / math.log(50)), score), score.softmax(-1)) < 1e-5


@pytest.mark.parametrize("window, meta", ((1, 0), (5, 0), (100, 0), (5, 3), (2, 9)))
def test_seen_keys_are_those_that_the_mask_shows(window, meta):
    position, doc = torch.arange(40), documents_like(3, 40, 0.15)
    doc[:, :meta] = -1
    shown = DenseMask(position, position, doc, doc, torch.tensor(window), meta).mask.sum(-1)[:, 0]
    assert torch.equal(M.seen_keys(position, doc, doc, torch.tensor(window), meta), shown)
    late = slice(30, 40)  # as a decoding step asks
    assert torch.equal(M.seen_keys(position[late], doc[:, late], doc, torch.tensor(window), meta), shown[:, late])


def test_each_head_learns_its_sharpness_and_qk_norm_does_not_undo_it():
    net, x = tiny(attn_softmax="ssmax"), text(2, 30, 1)
    grads = gradients(net, net(x, x).loss)
    assert all((grads[f"blocks.{i}.attention.sharpness"] != 0).all() for i in range(4))
    before = logits(net.eval(), x)
    with torch.no_grad():
        net.blocks[0].attention.sharpness.mul_(3)
    assert far(logits(net, x), before) > 1e-2


def test_ssmax_starts_near_plain_softmax():
    net = GPT(Config(**TINY | dict(attn_softmax="ssmax")))
    s = net.blocks[0].attention.sharpness
    assert torch.equal(s, torch.full((2,), 0.168)) and abs(0.168 * torch.arange(1, 1025).log().mean() - 1) < 0.01


# -----------------------------------------------------------------------------
# What turns


@pytest.mark.parametrize("rotary", sorted(M.ROTARIES))
def test_shifting_all_positions_changes_nothing(rotary):
    net, x = tiny(rotary=rotary, window="LS"), torch.randn(1, 25, 32, generator=rng(2))
    for layer in (0, 1):
        assert far(attend(net, x, layer, first=70), attend(net, x, layer)) < 1e-4


def test_without_rotary_a_token_sees_a_set_and_with_any_a_sequence():
    """The last token's output does not depend on the order of those before it."""
    x = torch.randn(1, 10, 32, generator=rng(3))
    order = torch.cat([torch.randperm(9, generator=rng(4)), torch.tensor([9])])
    moved = {rotary: far(attend(net, x[:, order])[:, -1], attend(net, x)[:, -1]) for rotary in M.ROTARIES for net in [tiny(rotary=rotary)]}
    assert moved.pop("N") < 1e-5 and min(moved.values()) > 1e-2, moved


def test_vo_rope_gives_what_is_read_of_a_value_a_place_and_leaves_scores_alone():
    """One visible key apart from its own: under V its value arrives turned by the distance; under N as it is."""
    net, x = tiny(rotary="V", window_size=2, window="L"), torch.randn(1, 6, 32, generator=rng(5))
    attention = net.blocks[0].attention
    q, k, v = (part[0] for part in (x @ attention.qkv.flatten(0, 1).T).unflatten(-1, (3, 2, 16)).unbind(2))
    v, angle = v * attention.value_mix[0], torch.arange(4) / 3
    rms = lambda z: z / z.square().mean(-1, keepdim=True).sqrt()
    score = (rms(q[1:, :, None]) * rms(torch.stack([k[1:], k[:-1]], 2))).sum(-1) * 0.5  # (T - 1, H, own and the one before)
    weight = score.softmax(-1)
    turn = torch.exp(1j * torch.cat([1024**-angle, torch.zeros(4)]))
    z = torch.complex(v[:-1, :, :8], v[:-1, :, 8:]) * turn  # by one token's angle, the other way round than a later one
    before = torch.cat([z.real, z.imag], -1)
    y = weight[..., :1] * v[1:] + weight[..., 1:] * before
    assert far(attend(net, x)[0, 1:], y.flatten(1) @ attention.out.T) < 1e-5


def test_wavelet_layers_make_as_many_turns_within_their_windows():
    config = Config(**TINY | dict(rotary="W", window="LSQE", window_size=96))
    speeds = [config.turning(layer)[1] for layer in range(4)]
    assert speeds == [1 / 8, 1 / 4, 1 / 2, 1.0]
    assert len({speed * (96 // M.WINDOWS[letter]) for speed, letter in zip(speeds, "LSQE")}) == 1
    assert [dataclasses.replace(config, rotary="H").turning(layer)[1] for layer in range(4)] == [1.0] * 4


# -----------------------------------------------------------------------------
# Keys and values: latent, shared


def kept_per_token(net: GPT) -> int:
    """Numbers that the cache holds of each token."""
    cache = Cache(net.config, 1, 5)
    with torch.no_grad():
        net.eval()(text(1, 5), cache=cache)
    return sum(part[0, 0].numel() for parts in cache.kept.values() for part in parts)


@pytest.mark.parametrize("attention, kept", (
    ("A", 4 * 64), ("AS", 2 * 64), ("ASSS", 64), ("L", 4 * (8 + 8)), ("LS", 2 * (8 + 8)), ("K-", 2 * 64), ("AAAS", 3 * 64)))  # fmt: skip
def test_what_a_cache_keeps(attention, kept):
    """Keys and values of two heads of 16 are 64 numbers; a latent of 8 and the turning half of a head are 16; shared ones are kept once."""
    config = Config(**TINY | dict(attention=attention, latent_dim=8))
    assert kept_per_token(GPT(config)) == kept
    assert M.cache_bytes_per_token(config) == 4 * kept == 2 * M.cache_bytes_per_token(dataclasses.replace(config, dtype="bf16"))


def test_keys_of_a_latent_layer_are_one_where_they_turn_and_of_low_rank_elsewhere():
    net, x = tiny(attention="L", latent_dim=8, qk_norm="none"), torch.randn(1, 40, 32, generator=rng(6))
    with torch.no_grad():
        _, (k, v) = net.blocks[0].attention.project(x, layer_context(net, 40))
    turns = torch.tensor([*range(4), *range(8, 12)])
    still = torch.tensor([*range(4, 8), *range(12, 16)])
    assert torch.equal(k[:, :, 0, turns], k[:, :, 1, turns]) and far(k[:, :, 0, still], k[:, :, 1, still]) > 0.1
    made = torch.cat([k[0][..., still].flatten(1), v[0].flatten(1)], 1)
    assert torch.linalg.matrix_rank(made) == 8 and torch.linalg.matrix_rank(x[0]) == 32


def test_shared_keys_are_those_of_the_nearest_layer_before_that_makes_some():
    """The queries alone differ: with equal ones, layers over the same keys read the same."""
    net = tiny(attention="A-SS", window="L")
    made = []
    for block in net.blocks:
        block.attention.register_forward_hook(lambda module, args, out: made.append(out[1]))
    with torch.no_grad():
        net(text(1, 12, 2))
    assert made[1] is None and made[2][0] is made[0][0] is made[3][0] and made[2][1] is made[0][1]
    assert [name for name, _ in net.blocks[2].attention.named_parameters()] == ["q", "out"]


def test_keys_leave_a_block_only_where_another_shares_them():
    net, handed = tiny(attention="AAS-", window="L"), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: handed.append(out[2]))
    with torch.no_grad():
        net(text(1, 12, 2))
    assert [kv is not None for kv in handed] == [False, True, False, False]
    assert Config(**TINY | dict(attention="AAS-")).key_makers == {2: 1}


def test_the_maker_of_shared_keys_learns_from_all_who_read_them():
    net, x = tiny(attention="AS", n_layer=2, value_embeds=1, window="L"), text(2, 20, 3)
    both = gradients(net, net(x, x).loss)["blocks.0.attention.qkv"]
    with torch.no_grad():
        net.blocks[0].attention.out.zero_()
    alone = gradients(net, net(x, x).loss)["blocks.0.attention.qkv"]
    assert (alone[1:] != 0).any() and torch.equal(alone[0], torch.zeros_like(alone[0])) and (both[0] != 0).any()


def test_a_layer_has_to_have_keys_to_share_and_to_turn_like_their_maker():
    with pytest.raises(ConfigError, match="attention is 'SA'; it must be without S in layer 0"):
        Config(**TINY | dict(attention="SA"))
    with pytest.raises(ConfigError, match="without S in layer 1"):
        Config(**TINY | dict(attention="-SA"))
    with pytest.raises(ConfigError, match="rotary is 'HN'; it must be the same in layer 1 as in layer 0"):
        Config(**TINY | dict(attention="AS", rotary="HN"))
    with pytest.raises(ConfigError, match="the same in layer 1 as in layer 0"):
        Config(**TINY | dict(attention="AS", rotary="W", window="LS"))
    with pytest.raises(ConfigError, match="rotary is 'V'; it must be H, N or W where attention is L"):
        Config(**TINY | dict(attention="L", rotary="V"))


# -----------------------------------------------------------------------------
# QK-norm


def test_without_qk_norm_the_size_of_queries_counts():
    x = text(2, 20, 4)
    for qk_norm, counts in (("rms", False), ("none", True)):
        net = tiny(qk_norm=qk_norm).eval()
        before = logits(net, x)
        with torch.no_grad():
            for block in net.blocks:
                block.attention.qkv[0].mul_(4)
        assert (far(logits(net, x), before) > 1e-2) == counts, qk_norm


# -----------------------------------------------------------------------------
# Meta-tokens


def test_no_meta_tokens_are_no_parameter_and_no_change():
    assert tiny().meta_tokens is None and tiny(num_meta_tokens=2).meta_tokens.shape == (2, 32)
    net, x = tiny(num_meta_tokens=2).eval(), text(2, 20, 5)
    plain = tiny().eval()
    plain.load_state_dict({name: p for name, p in net.state_dict().items() if name != "meta_tokens"})
    assert net(x).logits.shape == plain(x).logits.shape and far(logits(net, x), logits(plain, x)) > 1e-2
    assert far(logits(net, x), logits(plain, x)) > 1e-2
    assert net(x).stats["counts_LE"].sum() == 4 * 2 * 2 * 22 and plain(x).stats["counts_LE"].sum() == 4 * 2 * 2 * 20


def test_every_token_of_every_document_sees_the_meta_tokens_at_once():
    """Of one layer, with a window of 2: a change of a meta-token moves every token, however far and in whatever document."""
    net, x = tiny(n_layer=1, value_embeds=0, window="L", window_size=2, num_meta_tokens=3, pattern="D").eval(), text(1, 40, 6, eots=[(0, 0), (0, 20)])
    before = logits(net, x)
    for m in range(3):
        with torch.no_grad():
            net.meta_tokens[m].mul_(-1)
        after = logits(net, x)
        assert ((after - before).abs().amax(-1) > 1e-5).all(), m
        before = after
    assert (gradients(net, net(x, x).loss)["meta_tokens"] != 0).all()


MASKS = [(T, window, meta, rate) for T in (1, 40, 300, 384) for window, meta, rate in ((1, 1, 0.1), (40, 7, 0.02), (500, 30, 0.0), (129, 200, 0.01))]


@pytest.mark.parametrize("T, window, meta, rate", MASKS)
def test_masks_show_the_meta_tokens_to_all(T, window, meta, rate):
    meta = min(meta, T)
    position, doc = torch.arange(T), documents_like(2, T, rate, T + window)
    doc[:, :meta] = -1
    seen = slow_visible(T, doc, window) | ((position < meta) & (position[:, None] >= position))
    window = torch.tensor(window)
    assert torch.equal(DenseMask(position, position, doc, doc, window, meta).mask, seen)
    q, k, v, dy = (torch.randn(2, 2, T, 8, generator=rng(i)) for i in range(4))
    found = []
    for kind in (BlockedMask, DenseMask):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        y = kind(position, position, doc, doc, window, meta).attend(*inputs, 0.3)
        found.append([y, *torch.autograd.grad((y * dy).sum(), inputs)])
    assert max(far(a, b) for a, b in zip(*found)) < 1e-5
    if T % FlexMask.BLOCK == 0:
        mask = FlexMask(position, position, doc, doc, window, meta).block_mask
        shown = mask.mask_mod(torch.arange(2)[:, None, None], 0, position[:, None], position)
        assert torch.equal(shown, seen[:, 0])
        for b, i, j in itertools.product(range(2), range(T // 128), range(T // 128)):
            block = seen[b, 0, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            partial = j in mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
            full = j in mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
            assert not (partial and full) and (partial or full or not block.any()) and (block.all() or not full), (b, i, j)


def test_meta_tokens_draw_the_same_noise_in_every_row_and_leave_the_others_theirs():
    numbers = M.token_numbers(torch.tensor(100), 2, 7, 3).view(2, 7)
    assert numbers.tolist() == [[-1, -2, -3, 100, 101, 102, 103], [-1, -2, -3, 104, 105, 106, 107]]
    net, x = tiny(num_meta_tokens=3).train(), text(2, 20, 7)
    whole = logits(net, x)
    assert far(logits(net, x[1:], first_token=20), whole[1:]) < 1e-5


def test_meta_tokens_are_counted_in_flops_and_memory():
    plain, more = (Config(**TINY | dict(num_meta_tokens=n)) for n in (0, 10))
    T = 40
    keys = 12 * 4 * 10 * 32  # in 4 layers every token sees 10 more keys
    assert M.flops_per_token(more, T) == pytest.approx((M.flops_per_token(plain, T) + keys) * (T + 10) / T)
    assert M.saved_bytes(more, 512) > M.saved_bytes(plain, 512) * 1.01


def test_generation_starts_behind_the_meta_tokens():
    net, x = tiny(num_meta_tokens=5, attention="KL", attn_softmax="ssmax").eval(), text(1, 8, 8)
    net.set_step(SEED, STEP)
    ids = net.generate(x, 12, temperature=0)
    for t in range(8, 20):
        with torch.no_grad():
            assert net(ids[:, :t]).logits[0, -1, :VOCAB].argmax() == ids[0, t]


# -----------------------------------------------------------------------------
# Peri-norm


def test_under_peri_norm_every_sublayer_adds_a_vector_of_unit_rms():
    net, x = tiny(norms="R", pattern="DM"), torch.randn(1, 9, 32, generator=rng(9))
    for layer, block in enumerate(net.blocks):
        seen = []
        block.after = lambda y, seen=seen: seen.append(M.norm(y)) or seen[-1]
        with torch.no_grad():
            y, *_ = block(x, x, layer_context(net, 9, layer))
        assert len(seen) == 2 and all(far(z.square().mean(-1), torch.ones(1, 9)) < 1e-4 for z in seen)
        assert far(y, M.blend(block.stream_mix, x, x) + seen[0] + seen[1]) < 1e-6


def test_peri_norm_forgets_every_scale():
    """The trap: what routed_scale, small gates or a zero expert mean by their size is gone after the norm."""
    x = text(1, 20, 9)
    for norms, forgets in (("P", False), ("R", True)):
        one, three = (tiny(norms=norms, routed_scale=scale).eval() for scale in ("1.0", "3.0"))
        assert (far(logits(three, x), logits(one, x)) < 1e-4) == forgets, norms
    slope = torch.zeros(1, 32, requires_grad=True)
    M.norm(slope).sum().backward()
    assert far(slope.grad, torch.full((1, 32), torch.finfo(torch.float32).eps ** -0.5)) < 1e-4 and slope.grad.max() > 2_800


def test_the_norm_pattern_is_per_layer():
    net = tiny(norms="RP")
    assert [block.after is M.norm for block in net.blocks] == [True, False, True, False]


# -----------------------------------------------------------------------------
# Compilation: what torch.compile sees, without a compiler behind it


@pytest.mark.parametrize("changes, kinds", (
    (dict(attention="A"), 1), (dict(attention="KS"), 2), (dict(attention="LA", attn_softmax="ssmax"), 2), (dict(attention="R", norms="U"), 1),
    (dict(rotary="HVBW", qk_norm="none"), 4), (dict(num_meta_tokens=4, norms="R"), 1), (dict(depth="loop", loops=3, norms="RP"), 2),
    (dict(depth="loop", loops=2, residual="average", looped=".oo."), 2),  # after the loop the number of terms is each token's own
    (dict(router="attention", experts="mlp*3,constant"), 1)))  # fmt: skip
def test_every_kind_of_layer_is_one_graph_without_breaks_whatever_the_routes(changes, kinds):
    """Layers of one kind share a graph, and other tokens or another step make no new one."""
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
