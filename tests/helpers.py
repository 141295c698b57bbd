"""Helpers of the tests of models: tiny models drawn at random, texts, distances, and checks that nothing leaks between tokens.

Small fp32 models whose parameters are all drawn at random, so that no zero initial value hides a mistake.
"""

import itertools

import torch
from torch import nn  # noqa: F401
from torch.overrides import TorchFunctionMode

import model
import zoo

EOT, VOCAB, SEED, STEP = 60, 61, 5, 7
TINY = dict(vocab_size=VOCAB, eot_token=EOT, n_layer=4, n_embd=32, n_head=2, head_dim=16, num_experts=4, top_k=2,
            value_embeds=1, window="LS", window_size=12, attn_scale=0.5, dtype="fp32")
NO_AUX = dict(balance_coef=0.0, z_coef=0.0)
NEEDS_IDS = {"hash"}  # routers that cannot run on embeddings
BUILDS = [dict(router=r, depth=d, pattern=p, attention=a)
          for r, d, p, a in itertools.product(("linear", "hash"), sorted(model.DEPTHS), ("M", "DM"), ("A", "A-"))]
BUILDS.append(dict(router="linear", attention="KA-K", ngrams="24", ngram_rows=128))
BUILDS += [dict(router=r, depth=d, experts="mlp*2,swiglu,kan,identity,zero,noise,relu2,constant*2", mlp_ratio=4.5)
           for r, d in itertools.product(sorted(model.ROUTERS), sorted(model.DEPTHS))]  # fmt: skip
BUILDS += [dict(router="linear") | options for options in (
    dict(attention="AS-S"), dict(attention="LSKS", window="L"), dict(attention="AKLA", rotary="NBWV"),
    dict(attention="AAAS", rotary="BWWW", window="LSSS"), dict(attention="KL", attn_softmax="ssmax", qk_norm="none"),
    dict(norms="RP", attention="A-"), dict(attention="L", num_meta_tokens=1), dict(router="hash", attention="K", num_meta_tokens=14),
    dict(router="attention", attn_softmax="ssmax", num_meta_tokens=3, ngrams="3", ngram_rows=128),
    dict(router="recurrent", attention="AS", num_meta_tokens=2, rotary="B"), dict(router="conv", norms="R", num_meta_tokens=2),
    dict(attention="RS", norms="UP", window="L"),
    dict(attention="RA", norms="U", experts="relu*3,mlp,exit", attn_experts=3, attn_top_k=1, rotary="B"))]  # fmt: skip
BUILDS += [dict(router="linear", num_shared_experts=n, shared=kind, mlp_ratio=2.0 + n, routed_scale="auto") for kind, n in (("mlp", 1), ("conv", 2))]


def name_of(options: dict) -> str:
    return ",".join(str(value) for value in options.values())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shaken(net, seed: int = 0):
    """The model with every parameter and balance buffer drawn at random, at scales that leave the logits unsaturated."""
    for name, p in net.named_parameters():
        p.normal_(generator=rng(seed := seed + 1))
        if p.ndim == 1:
            p.mul_(0.3).add_(0.7)
        elif "embed" not in name:
            p.mul_(p.size(-1) ** -0.5)
    for name, buffer in net.named_buffers():
        if name == "bias_LE":
            buffer.normal_(generator=rng(seed := seed + 1)).mul_(0.1)
        if name == "load_WLE":
            buffer.copy_(torch.rand(buffer.shape, generator=rng(seed := seed + 1)).softmax(-1))
    return net


def zoo_fields(**changes) -> dict:
    """Fields of a tiny zoo.Config; a list of experts decides their number."""
    fields = TINY | changes
    if zoo.config.is_list(fields.get("experts", "")):
        fields["num_experts"] = len(zoo.config.listed_kinds(fields["experts"]))
    return fields


def tiny(seed: int = 0, **changes):
    """A tiny model of the zoo."""
    return shaken(zoo.build(zoo.Config(**zoo_fields(**changes))), seed)


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
    """The largest difference, of the size of the largest element of b (or 1, if that is smaller)."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1)).item()


def norm_error(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


def step_loss(model, x, y, first_token=0, step=STEP):
    model.set_step(SEED, step, first_token)
    return model(x, y).loss


class Margins(TorchFunctionMode):
    """Records, of each top-k that is taken, by how much the k-th value of a row beats the next one."""

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
def logits(model, x, first_token=0, doc=None):
    model.set_step(SEED, STEP, first_token)
    return model(x, doc_ids_BT=doc).logits[..., :VOCAB]


def settled(model, x, first_token=0):
    """(B, T): the tokens that see no routing decision closer than 1e-5, where rounding alone could choose another expert."""
    with Margins() as seen:
        logits(model, x, first_token)
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
# 1. Nothing leaks: checkers. Row b of a batch of width T is run alone as the tokens b*T .. b*T+T-1 of the global batch.


def check_prefixes(model, x):
    """Cutting a row short changes nothing before the cut: catches pooling, lengths, last-token rules."""
    B, T = x.shape[:2]
    for b in range(B):
        row, first = x[b : b + 1], b * T
        whole, sure = logits(model, row, first), settled(model, row, first)
        for t in range(1, T):
            same(logits(model, row[:, :t], first), whole[:, :t], sure[:, :t], f"row {b} cut at {t}")


def check_future(model, x):
    """Other values after t change nothing up to t; hard decisions have no gradient, so values are what must be moved."""
    B, T = x.shape[:2]
    whole, sure = logits(model, x), settled(model, x)
    for t in range(1, T):
        other = x.clone()
        if x.is_floating_point():
            other[:, t:] += torch.randn(other[:, t:].shape, generator=rng(t))
        else:
            other[:, t:] = torch.randint(0, VOCAB, (B, T - t), generator=rng(t))
        same(logits(model, other)[:, :t], whole[:, :t], sure[:, :t], f"new tokens from {t} on")


def check_rows(model, x):
    """A row's logits are those that it has among other rows, and those that it has alone."""
    B, T = x.shape[:2]
    whole, sure = logits(model, x), settled(model, x)
    for b in range(B):
        same(logits(model, x[b : b + 1], b * T), whole[b : b + 1], sure[b : b + 1], f"row {b} alone")
        for trial in range(3):
            other = torch.randn(x.shape, generator=rng(trial)) if x.is_floating_point() else text(B, T, 100 + trial)
            other[b] = x[b]
            same(logits(model, other)[b], whole[b], sure[b], f"row {b} beside other rows")


def check_documents(model, x):
    """Documents packed into a row have the logits of each document alone."""
    T = x.size(1)
    whole, sure = logits(model, x), settled(model, x)
    for b, row in enumerate(x):
        starts = [0] + [t for t in range(1, T) if row[t] == EOT]
        assert len(starts) > 1
        for start, stop in zip(starts, starts[1:] + [T]):
            alone = logits(model, x[b : b + 1, start:stop], b * T + start)
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


# -----------------------------------------------------------------------------
# 4. Inputs of a single layer of the zoo


def row_context(config: zoo.Config, T: int, starts=()) -> zoo.block.Context:
    """The context of one row of T tokens whose documents start at these."""
    doc_BT, position = torch.zeros(1, T, dtype=torch.int64), torch.arange(T)
    doc_BT[0, list(starts)] = 1
    doc_BT = doc_BT.cumsum(1)
    mask = model.DenseMask(position, position, doc_BT, doc_BT, torch.tensor(config.window_size))
    same_doc_BS = nn.functional.pad(doc_BT, (1, -1), value=-1) == doc_BT
    noise_key = (torch.tensor(SEED), torch.tensor(STEP), torch.tensor(0), position)
    return zoo.block.Context(None, mask, None, None, None, same_doc_BS, noise_key, torch.zeros(config.num_experts), None)


def document_starts(starts, T: int) -> list[int]:
    """The first token of each token's document."""
    return [max(start for start in [0, *starts] if start <= t) for t in range(T)]


def trunk_of(net, x) -> zoo.gpt.TrunkOutput:
    """Output of the block stack for these tokens, from a zoo model."""
    trunks, run_blocks = [], net.run_blocks
    net.run_blocks = lambda *inputs: trunks.append(run_blocks(*inputs)) or trunks[-1]
    logits(net, x)
    del net.run_blocks
    return trunks[0]


POOL = dict(depth="routed", loops=3, identity_layers=1)


def random_controller(seed: int = 0, **changes) -> zoo.GPT:
    """A model with routing over layers whose tokens choose different ones."""
    net = tiny(seed, **POOL | changes)
    with torch.no_grad():
        for p in net.controller.parameters():
            p.normal_(generator=rng(seed)).mul_(3 * p.size(-1) ** -0.5)
    return net
