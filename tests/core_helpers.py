"""Helpers of the tests of models: tiny models drawn at random, texts, distances, checks that nothing leaks.

All parameters of these small fp32 models are random, so no zero initial value hides a mistake. Nothing imports the zoo.
"""

import zlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import model

EOT, VOCAB, SEED, STEP = 60, 61, 5, 7
TINY = dict(
    vocab_size=VOCAB,
    eot_token=EOT,
    n_layer=4,
    n_embd=32,
    n_head=2,
    head_dim=16,
    num_experts=4,
    top_k=2,
    value_embeds=1,
    window="LS",
    window_size=12,
    attn_scale=0.5,
    dtype="fp32",
)
NO_AUX = dict(balance_coef=0.0, z_coef=0.0)
CORE_BUILDS = [dict(pattern=p, attention=a) for p in ("M", "DM") for a in ("A", "A-")] + [
    dict(attention="KA-K", ngrams="24", ngram_rows=128),
    dict(num_shared_experts=1, mlp_ratio=3.0, window="LSQE", tie_embeddings=True, router_noise=0.5),
    dict(num_shared_experts=2, shared_dim=24, top_k=1, norm_topk_prob=0.0, value_embeds=2),
]  # fmt: skip


def name_of(options: dict) -> str:
    return ",".join(str(value) for value in options.values())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shaken(net, seed: int = 0):
    """The model with all parameters and balance buffers random, at scales that leave the logits unsaturated."""
    draws = lambda name: rng(zlib.crc32(f"{name} {seed}".encode()))  # a new parameter leaves the others as they are
    for name, p in net.named_parameters():
        p.normal_(generator=draws(name))
        if p.ndim == 1:
            p.mul_(0.3).add_(0.7)
        elif "embed" not in name:
            p.mul_(p.size(-1) ** -0.5)
    for name, buffer in net.named_buffers():
        if name == "bias_LE":
            buffer.normal_(generator=draws(name)).mul_(0.1)
        if name == "load_WLE":
            buffer.copy_(torch.rand(buffer.shape, generator=draws(name)).softmax(-1))
    return net


def core(seed: int = 0, **changes):
    """A tiny model of the core."""
    return shaken(model.build(model.Config(**TINY | changes)), seed)


def text(B: int, T: int, seed: int = 0, eots=()) -> torch.Tensor:
    """Random ids without end-of-text, but for the (row, column) pairs in `eots`."""
    ids = torch.randint(0, EOT, (B, T), generator=rng(seed))
    for row, column in eots:
        ids[row, column] = EOT
    return ids


def far(a, b) -> float:
    """Largest difference, relative to the largest element of b or to 1, whichever is larger."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1)).item()


def norm_error(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def gradients(net, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*net.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]):
    """Each differs by 1e-4 of its norm at most, or by rounding, 1e-7 of the norm of all of them.

    Rounding is all that is left of a gradient where a norm cancels the weight, as it does a lone `value_mix`.
    """
    rounding = 1e-7 * torch.stack([grad.norm() for grad in want.values()]).norm()
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + rounding, name


def step_loss(net, x, y, first_token=0, step=STEP):
    net.set_step(SEED, step, first_token)
    return net(x, y).loss


class Margins(TorchFunctionMode):
    """Records the margin of each top-k: the k-th value of a row minus the next one."""

    def __init__(self):
        super().__init__()
        self.margins = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk" and not (kwargs or {}).get("dim"):
            scores, k = args[0].detach(), args[1]
            if k < scores.size(-1):
                best = torch.sort(scores, dim=-1, descending=True).values
                self.margins.append(best[..., k - 1] - best[..., k])
        return out


@torch.no_grad()
def logits(net, x, first_token=0, doc=None):
    net.set_step(SEED, STEP, first_token)
    return net(x, doc_ids_BT=doc).logits[..., :VOCAB]


def settled(net, x, first_token=0):
    """(B, T): tokens without a routing decision closer than 1e-5, where rounding alone could choose another expert."""
    with Margins() as seen:
        logits(net, x, first_token)
    sure = torch.ones(x.shape[:2], dtype=torch.bool)
    for margin in seen.margins:
        if margin.numel() == sure.numel():
            sure &= (margin.view_as(sure) > 1e-5).cumprod(1).bool()
    assert sure.float().mean() > 0.3, "too few tokens are left to compare"
    return sure


def same(got, want, sure, what: str):
    gap = ((got - want).abs().amax(-1) * sure).max().item()
    assert gap < 3e-5, f"{what}: logits differ by {gap}"


# -----------------------------------------------------------------------------
# 1. Nothing leaks. Row b of a batch of width T is run alone as the tokens b*T .. b*T+T-1 of the global batch.


def check_prefixes(net, x):
    """A shorter row has the same logits: catches pooling, lengths, last-token rules."""
    B, T = x.shape[:2]
    for b in range(B):
        row, first = x[b : b + 1], b * T
        whole, sure = logits(net, row, first), settled(net, row, first)
        for t in range(1, T):
            same(logits(net, row[:, :t], first), whole[:, :t], sure[:, :t], f"row {b} cut at {t}")


def check_future(net, x):
    """Other values from t on change no logits before t. Values are moved, since hard decisions have no gradient."""
    B, T = x.shape[:2]
    whole, sure = logits(net, x), settled(net, x)
    for t in range(1, T):
        other = x.clone()
        if x.is_floating_point():
            other[:, t:] += torch.randn(other[:, t:].shape, generator=rng(t))
        else:
            other[:, t:] = torch.randint(0, VOCAB, (B, T - t), generator=rng(t))
        same(logits(net, other)[:, :t], whole[:, :t], sure[:, :t], f"new tokens from {t} on")


def check_rows(net, x):
    """A row has the same logits alone and among other rows."""
    B, T = x.shape[:2]
    whole, sure = logits(net, x), settled(net, x)
    for b in range(B):
        same(logits(net, x[b : b + 1], b * T), whole[b : b + 1], sure[b : b + 1], f"row {b} alone")
        for trial in range(3):
            other = torch.randn(x.shape, generator=rng(trial)) if x.is_floating_point() else text(B, T, 100 + trial)
            other[b] = x[b]
            same(logits(net, other)[b], whole[b], sure[b], f"row {b} beside other rows")


def check_documents(net, x):
    """Documents packed into a row have the logits of each document alone."""
    T = x.size(1)
    whole, sure = logits(net, x), settled(net, x)
    for b, row in enumerate(x):
        starts = [0] + [t for t in range(1, T) if row[t] == EOT]
        assert len(starts) > 1
        for start, stop in zip(starts, starts[1:] + [T]):
            alone = logits(net, x[b : b + 1, start:stop], b * T + start)
            same(alone[0], whole[b, start:stop], sure[b, start:stop], f"document {b}:{start}:{stop} alone")


PACKED = text(2, 18, eots=[(0, 0), (0, 7), (0, 8), (1, 5), (1, 12)])


# -----------------------------------------------------------------------------
# 2. Decoding with a cache equals the full forward


def cached(net, x, cuts, docs=None):
    """Logits of x, fed to a KV cache in the parts that lie between the cuts."""
    cache = net.cache_type(net.config, len(x), x.size(1))
    edges = [0, *cuts, x.size(1)]
    with torch.no_grad():
        parts = [net(x[:, a:b], cache=cache, doc_ids_BT=None if docs is None else docs[:, a:b]).logits
                 for a, b in zip(edges, edges[1:])]  # fmt: skip
    assert cache.length == x.size(1) + getattr(net.config, "num_meta_tokens", 0)
    return torch.cat(parts, 1)[..., :VOCAB]


def check_cache(net, T=40):
    """However the prompt is cut, each position has the logits of the full forward."""
    x = text(2, T, 9, eots=[(0, 0), (0, 9), (0, 25), (1, 16), (1, 17)])
    whole, sure = logits(net, x), settled(net, x)
    random = [sorted(torch.randperm(T - 1, generator=rng(i))[: 2 + 3 * i].add(1).tolist()) for i in range(3)]
    for cuts in (range(1, T), [], [T - 1], [16], [17], *random):
        same(cached(net, x, cuts), whole, sure, f"cut at {list(cuts)}")


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns."""

    numel, shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, out if isinstance(out, (tuple, list)) else (out,)):
            if tensor.numel() > self.numel:
                self.numel, self.shape = tensor.numel(), tuple(tensor.shape)
        return out


# -----------------------------------------------------------------------------
# 3. Masks, pair by pair


def slow_visible(T: int, doc_BT, window: int):
    """(B, 1, T, T) from the definition, pair by pair."""
    seen = [[[j <= i and i - j < window and docs[i] == docs[j] for j in range(T)] for i in range(T)]
            for docs in doc_BT.tolist()]  # fmt: skip
    return torch.tensor(seen)[:, None]


def documents_like(B: int, T: int, rate: float, seed: int = 0):
    """(B, T) document ids that count up, a new one with probability `rate` at each token."""
    return (torch.rand(B, T, generator=rng(seed)) < rate).cumsum(1)


def build_mask(kind, doc_BT, window: int):
    position = torch.arange(doc_BT.size(1))
    return kind(position, position, doc_BT, doc_BT, torch.tensor(window))


# -----------------------------------------------------------------------------
# 4. Hashes with Python's integers


def slow_mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def slow_hash(ids, t, n):
    """Hash of the n ids ids[t], ids[t - 1], ..., with Python's integers."""
    key = 0
    for back in range(n):
        key = slow_mix((key + ids[t - back]) % 2**32)
    return key - 2**32 * (key >= 2**31)


def slow_signs(key, width):
    """+-1 per channel: the 32 bits of a second hash, over and over."""
    return [1 - 2 * (slow_mix((key + 1) % 2**32) >> c % 32 & 1) for c in range(width)]


def slow_rows(ids_BT, table_RD, n):
    """The signed rows (B, T, D) of the last n ids, in one document."""
    padded = [[-1] * (n - 1) + ids for ids in ids_BT.tolist()]
    keys = [[slow_hash(ids, t, n) for t in range(n - 1, len(ids))] for ids in padded]
    signs = torch.tensor([[slow_signs(key, table_RD.size(1)) for key in row] for row in keys])
    return table_RD[torch.tensor(keys) % len(table_RD)] * signs
