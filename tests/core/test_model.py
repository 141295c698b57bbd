"""model.py: what a token may see, sparse against dense, every gradient against a slow reference. CPU, no network: `pytest tests/test_model.py`.

Small fp32 models whose parameters are all drawn at random, so that no zero initial value hides a mistake."""
import ast
import dataclasses
import functools
import itertools
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402
from model import DEPTHS, GPT, PRESETS, ROUTERS, BlockedMask, Cache, Config, ConfigError, DenseMask, FlexMask, Route, hashed_normal  # noqa: E402

# -----------------------------------------------------------------------------
# Helpers

EOT, VOCAB, SEED, STEP = 60, 61, 5, 7
TINY = dict(vocab_size=VOCAB, eot_token=EOT, n_layer=4, n_embd=32, n_head=2, head_dim=16, num_experts=4, top_k=2,
            value_embeds=1, window="LS", window_size=12, attn_scale=0.5, dtype="fp32")
NO_AUX = dict(balance_coef=0.0, z_coef=0.0)
NEEDS_IDS = {"hash"}  # routers that cannot run on embeddings
BUILDS = [dict(router=r, depth=d, pattern=p, attention=a)
          for r, d, p, a in itertools.product(("linear", "hash"), sorted(DEPTHS), ("M", "DM"), ("A", "A-"))]
BUILDS.append(dict(router="linear", attention="KA-K", ngrams="24", ngram_rows=128))
BUILDS += [dict(router=r, depth=d, experts="mlp*2,swiglu,kan,identity,zero,noise,relu2,constant*2", mlp_ratio=4.5)
           for r, d in itertools.product(sorted(ROUTERS), sorted(DEPTHS))]  # fmt: skip
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
def shaken(model, seed: int = 0):
    """The model with every parameter and balance buffer drawn at random, at scales that leave the logits unsaturated."""
    for name, p in model.named_parameters():
        p.normal_(generator=rng(seed := seed + 1))
        if p.ndim == 1:
            p.mul_(0.3).add_(0.7)
        elif "embed" not in name:
            p.mul_(p.size(-1) ** -0.5)
    for name, buffer in model.named_buffers():
        if name == "bias_LE":
            buffer.normal_(generator=rng(seed := seed + 1)).mul_(0.1)
        if name == "load_WLE":
            buffer.copy_(torch.rand(buffer.shape, generator=rng(seed := seed + 1)).softmax(-1))
    return model


def tiny(seed: int = 0, **changes) -> GPT:
    return shaken(GPT(Config(**TINY | changes)), seed)


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


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_a_token_sees_only_its_own_documents_past(build, training):
    model = tiny(**build).train(training)
    check_prefixes(model, PACKED)
    check_future(model, PACKED)
    check_rows(model, PACKED)
    check_documents(model, PACKED)


@pytest.mark.parametrize("build", [b for b in BUILDS if b["router"] not in NEEDS_IDS], ids=name_of)
def test_a_token_of_embeddings_sees_only_its_past(build):
    model, x = tiny(**build), torch.randn(2, 14, 32, generator=rng(5))
    for training in (False, True):
        model.train(training)
        check_prefixes(model, x)
        check_future(model, x)
        check_rows(model, x)


def test_the_checks_see_real_differences():
    """A changed past moves the logits by far more than the tolerance, so that equality above says something."""
    model, other = tiny().eval(), PACKED.clone()
    other[1, 13] = (other[1, 13] + 1) % EOT
    moved = (logits(model, other) - logits(model, PACKED)).abs().amax(-1)[1]
    assert (moved[13:] > 1e-3).all() and (moved[:13] == 0).all()


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_forward_changes_no_state(training):
    model = tiny().train(training)
    model.set_step(SEED, STEP)
    before = {name: t.clone() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    first, state = model(PACKED, PACKED), torch.get_rng_state()
    second = model(PACKED, PACKED)
    assert torch.equal(first.loss, second.loss) and torch.equal(state, torch.get_rng_state())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        assert torch.equal(tensor, before[name]), name


# Leaks on purpose. Each is a router that a reader might write in good faith.


def ahead(x_BTD):
    return F.pad(x_BTD[:, 1:], (0, 0, 0, 1))


def behind(x_BTD):
    return F.pad(x_BTD[:, :-1], (0, 0, 1, 0))


class SamePadConv(M.LinearRouter):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + behind(x_BTD) + ahead(x_BTD), ctx)


class FlatConv(M.LinearRouter):
    """Causal, but over the rows laid end to end."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + behind(x_BTD.flatten(0, 1)[None]).view_as(x_BTD), ctx)


class CausalConv(M.LinearRouter):
    """Causal within the row, but blind to documents, and without a state for decoding."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + behind(x_BTD), ctx)


class MeanOverSequence(M.LinearRouter):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + x_BTD.mean(1, keepdim=True), ctx)


class ExpertChoice(M.LinearRouter):
    """Each expert first takes the tokens of the row that it likes best."""

    def forward(self, x_BTD, ctx):
        logits_BTE = F.linear(x_BTD.float(), self.gate)
        taken = logits_BTE.topk(max(1, x_BTD.size(1) * self.top_k // logits_BTE.size(2)), dim=1).indices
        score_BTE = logits_BTE.softmax(-1) + torch.zeros_like(logits_BTE).scatter(1, taken, 1.0)
        logits_TE = logits_BTE.flatten(0, 1)
        expert_TK = score_BTE.flatten(0, 1).topk(self.top_k).indices
        return Route(expert_TK, logits_TE.gather(1, expert_TK).softmax(-1), logits_TE)


class OwnCounts(M.LinearRouter):
    """The balance bias of this very batch."""

    def forward(self, x_BTD, ctx):
        counts_E = super().forward(x_BTD, ctx).expert_TK.flatten().bincount(minlength=len(ctx.bias_E))
        return super().forward(x_BTD, ctx._replace(bias_E=ctx.bias_E - counts_E / counts_E.sum()))


class Capacity(M.LinearRouter):
    """First come, first served over the flattened batch."""

    def forward(self, x_BTD, ctx):
        route = super().forward(x_BTD, ctx)
        mine_RE = F.one_hot(route.expert_TK.flatten(), route.logits_TE.size(1))
        place_TK = (mine_RE.cumsum(0) * mine_RE).sum(-1).view_as(route.expert_TK)
        return route._replace(weight_TK=route.weight_TK * (place_TK <= 8))


class LastTokenExit(M.LinearRouter):
    """The last token decides whether the whole row goes on."""

    def forward(self, x_BTD, ctx):
        route = super().forward(x_BTD, ctx)
        goes_on_B = x_BTD[:, -1, 0] > 0
        return route._replace(weight_TK=route.weight_TK * goes_on_B.repeat_interleave(x_BTD.size(1))[:, None])


class Unseeded(M.LinearRouter):
    """Fresh noise from torch's own generator, in evaluation too."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + torch.randn_like(x_BTD), ctx)


class RowNoise(M.LinearRouter):
    """Noise by the token's number in the micro-batch instead of the global batch."""

    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD, ctx._replace(noise_key=(*ctx.noise_key[:3], torch.arange(x_BTD[..., 0].numel()))))


LEAKS = [
    (SamePadConv, check_prefixes), (SamePadConv, check_future),
    (MeanOverSequence, check_prefixes), (MeanOverSequence, check_future),
    (ExpertChoice, check_prefixes), (ExpertChoice, check_future),
    (OwnCounts, check_prefixes), (OwnCounts, check_future), (OwnCounts, check_rows),
    (Capacity, check_rows), (FlatConv, check_rows),
    (LastTokenExit, check_prefixes), (LastTokenExit, check_future),
    (CausalConv, check_documents),
]  # fmt: skip


@pytest.mark.parametrize("leak, check", LEAKS, ids=lambda value: value.__name__)
def test_a_planted_leak_is_caught(monkeypatch, leak, check):
    monkeypatch.setitem(ROUTERS, "leak", leak)
    with pytest.raises(AssertionError, match="logits differ"):
        check(tiny(router="leak").eval(), PACKED)


# -----------------------------------------------------------------------------
# 2. Noise


def check_eval_is_deterministic(model):
    model.eval()
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.set_step(seed=seed, step=10 * seed, first_token=1000 * seed)
        outs.append(model(PACKED).logits)
    assert torch.equal(*outs), "evaluation is random"


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_evaluation_is_deterministic_under_any_seed_and_step(build):
    check_eval_is_deterministic(tiny(**build))


def test_noise_in_evaluation_is_caught(monkeypatch):
    monkeypatch.setitem(ROUTERS, "leak", Unseeded)
    with pytest.raises(AssertionError, match="random"):
        check_eval_is_deterministic(tiny(router="leak"))


def test_noise_acts_in_training_only_and_can_be_switched_off():
    noisy, quiet = tiny(), tiny(router_noise=0.0)
    assert not torch.equal(logits(noisy.train(), PACKED), logits(noisy.eval(), PACKED))
    quiet.load_state_dict({name: value for name, value in noisy.state_dict().items() if not name.endswith("router.noise")})
    assert torch.equal(logits(quiet.train(), PACKED), logits(quiet.eval(), PACKED))
    assert torch.equal(logits(noisy.eval(), PACKED), logits(quiet.eval(), PACKED))


def check_noise_survives_a_split(model):
    x = text(4, 12, 3)
    whole, sure = logits(model.train(), x, 96), settled(model, x, 96)
    parts = torch.cat([logits(model, x[:1], 96), logits(model, x[1:], 96 + 12)])
    same(parts, whole, sure, "split into micro-batches")


def test_training_noise_is_the_same_however_the_batch_is_cut():
    check_noise_survives_a_split(tiny())


def test_noise_by_place_in_the_micro_batch_is_caught(monkeypatch):
    monkeypatch.setitem(ROUTERS, "leak", RowNoise)
    with pytest.raises(AssertionError, match="logits differ"):
        check_noise_survives_a_split(tiny(router="leak"))


@pytest.mark.parametrize("change", (dict(seed=6), dict(step=8), dict(first_token=1)), ids=name_of)
def test_training_noise_depends_on_seed_step_and_token_number(change):
    model, key = tiny().train(), dict(seed=SEED, step=STEP, first_token=0)
    outs = []
    for values in (key, key | change):
        model.set_step(**values)
        outs.append(model(PACKED).logits[..., :VOCAB])
    assert (outs[0] - outs[1]).abs().max() > 1e-2


def draw(seed=3, step=11, layer=2, first=0, num=8, n=40000):
    return hashed_normal(torch.tensor(seed), torch.tensor(step), torch.tensor(layer), first + torch.arange(n), num)


def test_hashed_noise_is_standard_normal():
    z, n = draw().double(), 40000 * 8
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5 and abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    expected = torch.distributions.Normal(0.0, 1.0)
    for level in (-3, -2, -1, -0.3, 0, 0.3, 1, 2, 3):
        share = expected.cdf(torch.tensor(float(level))).item()
        assert abs((z < level).double().mean() - share) < 4.5 * (share * (1 - share) / n) ** 0.5, level
    assert (z.mean(0).abs() < 4.5 / 200).all() and 4 < z.abs().max() < 6.7


@pytest.mark.parametrize("neighbour", (dict(step=12), dict(layer=3), dict(seed=4), dict(first=1), dict(first=16)), ids=name_of)
def test_hashed_noise_of_neighbours_is_uncorrelated(neighbour):
    a, b = draw().double(), draw(**neighbour).double()
    for f in (lambda z: z, lambda z: z.square() - 1):
        assert abs((f(a) * f(b)).mean() / f(a).square().mean()) < 4.5 / (40000 * 8) ** 0.5
    assert (a == b).double().mean() < 1e-3


def test_hashed_noise_of_two_experts_is_uncorrelated():
    z = draw().double()
    assert (torch.corrcoef(z.T) - torch.eye(8)).abs().max() < 5 / 200
    assert (torch.corrcoef(z.T.square()) - torch.eye(8)).abs().max() < 5 / 200


def test_hashed_noise_is_a_function_of_the_token_number_alone():
    whole = draw(n=1000)
    assert torch.equal(whole[300:500], draw(first=300, n=200)) and torch.equal(whole, draw(n=1000))


# -----------------------------------------------------------------------------
# 3. Sparse dispatch against a loop over tokens


def moe_context(config, T, training_step=STEP):
    key = (torch.tensor(SEED), torch.tensor(training_step), torch.tensor(0), torch.arange(T))
    return M.Context(None, None, None, None, None, None, key, torch.zeros(config.num_experts), None)


def slow_moe(moe, x_TD, ctx, training: bool):
    """Token by token and choice by choice, from the definition; nothing of the model but its parameters and its noise."""
    gate, noise, up, down = moe.router.gate, moe.router.noise, moe.experts.up, moe.experts.down
    normal = hashed_normal(*ctx.noise_key, len(gate))
    ys, chosen = [], []
    for t, x in enumerate(x_TD):
        h = gate @ x
        if training:
            h = h + normal[t] * torch.log1p(torch.exp(noise @ x))
        score = torch.exp(h - h.max()) / torch.exp(h - h.max()).sum() + ctx.bias_E
        picks = sorted(range(len(gate)), key=lambda e: -score[e].item())[: moe.router.top_k]
        total = sum(torch.exp(h[e]) for e in picks)
        y = 0
        for e in picks:
            hidden = up[e] @ x
            y = y + torch.exp(h[e]) / total * (down[e] @ torch.where(hidden > 0, hidden, 0.0) ** 2)
        ys.append(y)
        chosen.append(picks)
    return torch.stack(ys), chosen


def check_dispatch(E: int, k: int, training=False, bias=0.0, T=23):
    config = Config(**TINY | dict(num_experts=E, top_k=k))
    moe, ctx = shaken(M.MoE(config)).train(training), moe_context(config, T)
    ctx.bias_E[: E // 2] += bias
    x = torch.randn(1, T, 32, generator=rng(E)).requires_grad_()
    dy = torch.randn(T, 32, generator=rng(k))
    (fast, (stats,)), (slow, chosen) = moe(x, ctx), slow_moe(moe, x[0], ctx, training)
    assert far(fast[0], slow) < 1e-5, "outputs differ"
    inputs = {"x": x, **dict(moe.named_parameters())}
    found = [torch.autograd.grad((y * dy).sum(), list(inputs.values()), allow_unused=True) for y in (fast[0], slow)]
    for name, got, want in zip(inputs, *found):
        got, want = (torch.zeros_like(inputs[name]) if g is None else g for g in (got, want))
        assert (got - want).norm() < 1e-4 * want.norm() + 1e-4, f"gradients of {name} differ"  # one choice: the gate's is 0, up to rounding
    counts = torch.bincount(torch.tensor(chosen).flatten(), minlength=E)
    assert torch.equal(stats.counts_E, counts)
    return counts, dict(zip(inputs, found[0]))


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("E, k", ((1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (5, 3)))
def test_sparse_experts_equal_a_loop_over_tokens(E, k, training, monkeypatch):
    if (E, k) == (5, 3):
        monkeypatch.setitem(TINY, "mlp_ratio", 3.0)
    check_dispatch(E, k, training)


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
    moe, ctx = shaken(M.MoE(config)).eval(), moe_context(config, 50)
    ctx.bias_E[2] = 10
    x = torch.randn(1, 50, 32, generator=rng(1))
    (y, (stats,)), up, down = moe(x, ctx), moe.experts.up[2], moe.experts.down[2]
    assert stats.counts_E.tolist() == [0, 0, 50, 0] and far(y, (x @ up.T).relu().square() @ down.T) < 1e-5


real_dispatch, real_gather, real_combine = M.dispatch, M.Gather, M.Combine


class HalfGather(torch.autograd.Function):
    """Forgets all but the first choice in backward."""

    @staticmethod
    def forward(ctx, x_TD, token_R, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TD[token_R]

    @staticmethod
    def backward(ctx, drows_RD):
        return drows_RD[ctx.saved_tensors[0][:, 0]], None, None


class UngatedCombine(torch.autograd.Function):
    """Forgets the gates in backward."""

    forward = staticmethod(real_combine.forward)

    @staticmethod
    def backward(ctx, dy_TD):
        rows_RD, weight_TK, choice_R, row_TK = ctx.saved_tensors
        dy_RD = dy_TD[choice_R // weight_TK.size(1)]
        return dy_RD, (rows_RD * dy_RD).sum(-1)[row_TK], None, None


PLANTED = {
    "gates swapped": ("dispatch", lambda x, route, fn, *own: real_dispatch(x, route._replace(weight_TK=route.weight_TK.flip(1)), fn, *own)),
    "tokens permuted": ("dispatch", lambda x, route, fn, *own: real_dispatch(x, route._replace(expert_TK=route.expert_TK.roll(1, 0)), fn, *own)),
    "experts shifted": ("dispatch", lambda x, route, fn, *own: real_dispatch(x, route._replace(expert_TK=(route.expert_TK + 1) % 4), fn, *own)),
    "second choice lost": ("dispatch", lambda x, route, fn, *own: real_dispatch(x, Route(route[0][:, :1], route[1][:, :1], route[2]), fn, *own)),
    "gather's backward halved": ("Gather", HalfGather),
    "combine's backward without gates": ("Combine", UngatedCombine),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_dispatch_error_is_caught(planted, monkeypatch):
    monkeypatch.setattr(M, *PLANTED[planted])
    with pytest.raises(AssertionError, match="differ"):
        check_dispatch(4, 2)


# -----------------------------------------------------------------------------
# 4. One expert is the dense MLP


def copied(sparse: GPT, dense: GPT) -> GPT:
    """The dense model with the sparse one's weights."""
    theirs = dict(sparse.named_parameters())
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(theirs[name] if name in theirs else theirs[name.replace("ffn.", "ffn.experts.")][0])
    return dense


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_one_expert_equals_the_dense_twin_exactly(dtype):
    one = dict(num_experts=1, top_k=1, dtype=dtype, **NO_AUX)
    sparse = tiny(pattern="M", **one)
    dense = copied(sparse, tiny(seed=99, pattern="D", **one))
    y = text(2, 18, 5)
    for training in (False, True):
        for model in (sparse, dense):
            model.train(training).set_step(SEED, STEP)
        assert torch.equal(sparse(PACKED).logits, dense(PACKED).logits)
        losses = [model(PACKED, y).loss for model in (sparse, dense)]
        assert torch.equal(*losses)
        theirs, ours = gradients(sparse, losses[0]), gradients(dense, losses[1])
        for name, grad in ours.items():
            other = theirs[name] if name in theirs else theirs[name.replace("ffn.", "ffn.experts.")][0]
            assert norm_error(other, grad) < (1e-6 if dtype == "fp32" else 1e-2), name
        for layer in range(4):
            assert (theirs[f"blocks.{layer}.ffn.router.gate"] == 0).all()


# -----------------------------------------------------------------------------
# 5. Counts


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("E, k", ((4, 2), (8, 3), (5, 2), (4, 4), (4, 1)))
def test_each_token_reaches_k_distinct_experts_with_gates_that_sum_to_one(router, E, k, monkeypatch):
    routes = []
    monkeypatch.setattr(M, "dispatch", lambda x, route, fn, *own: (routes.append(route), real_dispatch(x, route, fn, *own))[1])
    model = tiny(router=router, num_experts=E, top_k=k, mlp_ratio=3.0, pattern="DM").train()
    counts_LE = model(PACKED).stats["counts_LE"]
    assert len(routes) == 2 and counts_LE.shape == (2, E) and counts_LE.dtype == torch.int64
    for route, counts_E in zip(routes, counts_LE):
        assert route.expert_TK.shape == route.weight_TK.shape == (36, k) and route.logits_TE.shape == (36, E)
        assert all(len(set(row)) == k for row in route.expert_TK.tolist())
        assert ((0 <= route.expert_TK) & (route.expert_TK < E)).all()
        assert route.weight_TK.dtype == torch.float32 and far(route.weight_TK.sum(1), torch.ones(36)) < 1e-6
        assert counts_E.tolist() == [sum(row.count(e) for row in route.expert_TK.tolist()) for e in range(E)]
        assert counts_E.sum() == 36 * k


def test_routers_follow_their_layer_and_hash_its_ids(monkeypatch):
    """Layers draw their own noise and read their own bias row; the hash router is id mod E and evenly spaced."""
    routes = []
    monkeypatch.setattr(M, "dispatch", lambda x, route, fn, *own: (routes.append(route), real_dispatch(x, route, fn, *own))[1])
    tiny(router="hash")(PACKED)
    assert torch.equal(routes[0].expert_TK, torch.stack([PACKED.flatten() % 4, (PACKED.flatten() + 2) % 4], 1))
    routes.clear()
    model = tiny(pattern="DM").eval()
    with torch.no_grad():
        model.bias_LE.copy_(torch.tensor([[10.0, 10, 0, 0], [0, 0, 10, 10]]))
    assert model(PACKED).stats["counts_LE"].tolist() == [[36, 36, 0, 0], [0, 0, 36, 36]]
    assert route_layers(tiny(n_layer=3, pattern="DMM")) == [0, 1]


def route_layers(model) -> list[int]:
    """The number that each routed layer draws its noise with."""
    id_BT = text(1, 8, 0)
    contexts, _ = model.contexts(id_BT, id_BT * 0, id_BT * 0, [None] * len(model.blocks), None)
    return [ctx.noise_key[2].item() for ctx, block in zip(contexts, model.blocks) if hasattr(block.ffn, "router")]


# -----------------------------------------------------------------------------
# 6. Zero initial values


def test_a_fresh_model_says_nothing_at_a_loss_of_ln_vocabulary():
    model, y = GPT(Config(**TINY | NO_AUX)), text(2, 18, 5)
    for name, p in model.named_parameters():
        if name == "head" or name.endswith((".out", ".down", "router.gate", "router.noise")):
            assert (p == 0).all(), name
        elif p.ndim > 1:
            assert p.std() > 0, name
    for training in (True, False):
        model.train(training)
        out = model(PACKED).logits
        assert out.shape == (2, 18, 64) and (out[..., :VOCAB] == out[0, 0, 0]).all() and (out[..., VOCAB:] == -math.inf).all()
        assert abs(model(PACKED, y).loss.item() - math.log(VOCAB)) < 1e-5


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.AdamW))
def test_gradients_arrive_from_the_head_inwards(optimizer):
    """With head and down-projections at zero: the head moves first, the output projections next, the router third."""
    model, y = GPT(Config(**TINY | NO_AUX)).train(), text(2, 18, 5)
    step = optimizer(model.parameters(), lr=0.02)
    reached = []
    for i in range(3):
        model.set_step(SEED, i)
        grads = gradients(model, model(PACKED, y).loss)
        reached.append({kind for name, kind in model.parameter_kinds().items() if (grads[name] != 0).any()})
        for since, names in ((1, (".down", ".out")), (2, (".up", ".qkv")), (2, "router.gate"), (2, "router.noise")):
            assert {(grads[name] != 0).any().item() for name in grads if name.endswith(names)} == {i >= since}, (i, names)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        step.step()
    assert reached[0] == {"head"}


# -----------------------------------------------------------------------------
# 7. Softcap, rotary, masks, and the backwards written by hand


def test_norm_and_relu_squared_are_what_they_are_called():
    x = torch.randn(5, 7, 32, generator=rng()) * torch.tensor([1e-3, 0.1, 1, 30, 1e4])[:, None, None]
    assert far(M.norm(x), F.rms_norm(x, (32,))) < 1e-5
    assert far(M.norm(x[1:]), x[1:] / x[1:].square().mean(-1, keepdim=True).sqrt()) < 1e-4
    assert norm_error(M.norm(x.bfloat16()), M.norm(x)) < 1e-2 and M.norm(x.bfloat16()).dtype == torch.bfloat16
    assert far(M.norm(x[1:].bfloat16()).float().square().mean(-1), torch.ones(4, 7)) < 2e-2
    assert (M.norm(x * 0) == 0).all()
    assert torch.equal(M.relu_squared(x), torch.where(x > 0, x, 0) ** 2)


def random64(*shape):
    return torch.randn(*shape, generator=rng(), dtype=torch.float64).requires_grad_()


def test_backwards_written_by_hand_equal_finite_differences():
    tables = M.rotary_tables(torch.arange(5), 16, torch.float64)
    doc, expert = documents_like(2, 5, 0.3), torch.tensor([[0, 2], [1, 0], [2, 1]])
    choice = expert.flatten().argsort(stable=True)
    row = choice.argsort().view(3, 2)
    for f, inputs in (
        (M.norm, (random64(3, 8),)),
        (M.relu_squared, (random64(3, 8),)),
        (lambda x: M.rotate(x, *tables), (random64(2, 5, 1, 16),)),
        (lambda q, k, v: build_mask(BlockedMask, doc, 3).attend(q, k, v, 0.3), (random64(2, 1, 5, 4), random64(2, 1, 5, 4), random64(2, 1, 5, 4))),
        (lambda x: M.Gather.apply(x, choice // 2, row), (random64(3, 4),)),
        (lambda rows, weight: M.Combine.apply(rows, weight, choice, row), (random64(6, 4), random64(3, 2))),
    ):
        assert torch.autograd.gradcheck(f, inputs)


def test_logits_are_softcapped():
    model = tiny(softcap=4.0).eval()
    with torch.no_grad():
        model.head.mul_(30)
    x = 5 * torch.randn(2, 3, 32, generator=rng())
    out, z = model.logits(x)[..., :VOCAB], (x @ model.head.T)[..., :VOCAB]
    assert far(out, 4 * torch.tanh(z / 4) + 4) < 1e-5
    assert out.min() >= 0 and out.max() <= 8 and out.max() > 7.9 and out.min() < 0.1
    assert out.dtype == torch.float32 and tiny(dtype="bf16").eval()(PACKED).logits.dtype == torch.float32


def test_rotary_equals_complex_rotation_and_half_of_the_pairs_stand_still():
    C, T = 16, 40
    x, position = torch.randn(2, T, 3, C, generator=rng()), torch.arange(T) + 5
    tables = M.rotary_tables(position, C, torch.float32)
    got = M.rotate(x, *tables)
    z = torch.complex(x[..., : C // 2], x[..., C // 2 :])
    for pair in range(C // 2):
        speed = 1024 ** -(pair / (C // 4 - 1)) if pair < C // 4 else 0.0
        turned = z[..., pair] * torch.exp(-1j * speed * position)[None, :, None]
        assert far(got[..., pair], turned.real) < 1e-5 and far(got[..., pair + C // 2], turned.imag) < 1e-5, pair
    still = [*range(C // 4, C // 2), *range(3 * C // 4, C)]
    assert torch.equal(got[..., still], x[..., still])


def test_rotary_is_relative():
    q, k = (torch.randn(1, 30, 1, 16, generator=rng(i)) for i in (0, 1))
    products = []
    for shift in (0, 100):
        tables = M.rotary_tables(torch.arange(30) + shift, 16, torch.float32)
        products.append(M.rotate(q, *tables)[0, :, 0] @ M.rotate(k, *tables)[0, :, 0].T)
    assert far(*products) < 1e-4
    assert far(q[0, :, 0] @ k[0, :, 0].T, products[0]) > 0.1  # and it does something


def slow_visible(T: int, doc_BT, window: int):
    """(B, 1, T, T) from the definition, pair by pair."""
    seen = [[[j <= i and i - j < window and docs[i] == docs[j] for j in range(T)] for i in range(T)] for docs in doc_BT.tolist()]
    return torch.tensor(seen)[:, None]


def documents_like(B: int, T: int, rate: float, seed: int = 0):
    """(B, T) document ids that count up, a new one with probability `rate` at each token."""
    return (torch.rand(B, T, generator=rng(seed)) < rate).cumsum(1)


def build_mask(kind, doc_BT, window: int):
    position = torch.arange(doc_BT.size(1))
    return kind(position, position, doc_BT, doc_BT, torch.tensor(window))


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


def test_blocked_attention_skips_what_no_query_sees():
    kept = [(kv.stop - kv.start) * (q.stop - q.start) for q, kv, _ in build_mask(BlockedMask, torch.zeros(1, 1024, dtype=torch.int64), 128).blocks]
    assert sum(kept) <= 1024 * (128 + 128 + 16)


def test_masks_are_made_for_the_windows_in_use_only():
    doc = torch.zeros(1, 8, dtype=torch.int64)
    assert M.windows_in_use("LSLS", torch.tensor(4)) == {"L": 4, "S": 2}
    net = tiny(n_layer=3, window="LS")
    first, second, third = (ctx.mask for ctx in net.contexts(doc, doc, doc, [None] * 3, None)[0])
    assert first is third and first is not second


FLEX = [(T, window, rate) for T in (256, 384) for window, rate in (
    (1, 0.0), (64, 0.02), (100, 0.0), (128, 0.0), (129, 0.01), (200, 0.0), (256, 0.003), (300, 0.0), (1000, 0.003))]  # fmt: skip


@pytest.mark.parametrize("T, window, rate", FLEX)
def test_flex_blocks_cover_what_is_visible_and_full_ones_are_full(T, window, rate):
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
        # the transposed lists that backward walks
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
    assert far(got, F.scaled_dot_product_attention(q, k, v, attn_mask=slow_visible(T, doc, window), scale=0.3)) < 1e-5


def test_long_and_short_layers_see_their_windows():
    """The perturbation of one token reaches one window per layer, and no further."""
    for letters, reach in (("L", 4 * 5), ("S", 4 * 2), ("LS", 2 * 5 + 2 * 2)):
        model, x = tiny(window=letters, window_size=6, router="hash").eval(), text(1, 40, 8)
        other = x.clone()
        other[0, 3] = (other[0, 3] + 4) % EOT  # the same experts
        moved = (logits(model, other) - logits(model, x)).abs().amax(-1)[0] > 0
        assert moved[3 + reach] and not moved[4 + reach :].any(), letters
        model.set_step(SEED, STEP, window=2)
        with torch.no_grad():
            moved = (model(other).logits - model(x).logits)[..., :VOCAB].abs().amax(-1)[0] > 0
        assert not moved[3 + 5 :].any()


def test_the_smallest_legal_window_still_sees_itself():
    """A short layer has half of the window, and half of 1 must not be 0: a softmax over nothing is not a number."""
    model = tiny(window="LS", window_size=1).eval()
    assert logits(model, PACKED).isfinite().all(), "window_size=1 with a short layer gives NaN: neither refused by Config nor handled"


def test_explicit_documents_override_the_end_of_text_tokens():
    model = tiny().eval()
    doc = torch.tensor([[0] * 5 + [1] * 13, [0] * 9 + [4] * 9])
    got, plain = logits(model, PACKED, doc=doc), logits(model, PACKED)
    assert far(got, plain) > 1e-2
    assert torch.equal(logits(model, PACKED, doc=(PACKED == EOT).cumsum(1)), plain)
    sure = settled(model, PACKED)
    same(logits(model, PACKED[:, :5], doc=doc[:, :5] * 0)[:1], got[:1, :5], sure[:1, :5], "first document")
    x = torch.randn(2, 18, 32, generator=rng(4))
    assert far(logits(model, x, doc=doc), logits(model, x)) > 1e-2
    assert torch.equal(logits(model, x, doc=doc * 0), logits(model, x))


def test_embeddings_are_an_input_as_ids_are():
    """Without value embeddings, a table's rows give the logits of their ids."""
    model, x = tiny(value_embeds=0), text(2, 18, 2)
    for training in (False, True):
        model.train(training)
        same(logits(model, F.embedding(x, model.embed).detach()), logits(model, x), settled(model, x), "embeddings")
    out = model(torch.randn(2, 5, 32).double())
    assert out.logits.shape == (2, 5, 64) and out.loss is None
    leaf = torch.randn(2, 5, 32, requires_grad=True)
    assert torch.autograd.grad(model(leaf, x[:, :5]).loss, leaf)[0].abs().max() > 0


# -----------------------------------------------------------------------------
# 7b. Grouped matmuls on a CPU

GROUPED = [  # rows of each expert
    (125,) * 8, (0, 300, 1, 0, 77, 0, 622, 0), (1000, 0, 0), (0, 0, 1000), (3, 2, 1, 1), (0, 1), tuple(range(40)), (33, 31, 64, 100, 17),
]  # fmt: skip


@pytest.mark.parametrize("spare", (0, 5), ids=("exact", "rows past the last expert"))
@pytest.mark.parametrize("counts", GROUPED, ids=str)
def test_grouped_matmuls_are_the_matmuls_of_each_expert(counts, spare):
    E, R = len(counts), sum(counts)
    rows, weight, dy = (torch.randn(shape, generator=rng(i)) for i, shape in enumerate(((R + spare, 24), (E, 16, 24), (R + spare, 16))))
    rows[R:] = dy[R:] = math.nan  # uninitialised memory may hold anything
    offs = torch.tensor(counts).cumsum(0).int()
    apart = lambda x: x[:R].split(counts)
    forward = torch.cat([x @ w.T for x, w in zip(apart(rows), weight)])
    outer = torch.stack([d.T @ x for d, x in zip(apart(dy), apart(rows))])
    assert far(M.grouped_mm(rows, weight, offs)[:R], forward) < 1e-5 and far(M.grouped_outer(dy, rows, offs), outer) < 1e-4
    assert (M.grouped_outer(dy, rows, offs)[[n == 0 for n in counts]] == 0).all()


def test_row_counts_that_change_in_every_step_make_few_shapes_of_matmuls(monkeypatch):
    """Each new shape costs oneDNN a millisecond and a megabyte."""
    shapes, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: shapes.add((*a.shape, *b.shape)) or mm(a, b, **out))
    rows, weight, dy = torch.randn(4096, 8), torch.randn(8, 16, 8), torch.randn(4096, 16)
    for step in range(100):
        counts = torch.multinomial(torch.ones(8), 4096, replacement=True, generator=rng(step)).bincount(minlength=8)
        M.grouped_mm(rows, weight, counts.cumsum(0).int())
        M.grouped_outer(dy, rows, counts.cumsum(0).int())
    assert 0 < len(shapes) <= 24  # 512 rows give or take 80, in steps of 16 or 32


@pytest.mark.parametrize("n", (1, 2, 15, 16, 31, 32, 100, 1000, 1024, 65_537))
def test_sixteen_lengths_to_an_octave(n):
    assert n // 32 <= M.granule(n) <= max(1, n // 16) and M.granule(n).bit_count() == 1


# -----------------------------------------------------------------------------
# 8. The chunked loss

V, SOFTCAP = 128, 15.0
chunk_nll = GPT(Config(**TINY | dict(vocab_size=120, softcap=SOFTCAP))).chunk_nll


def loss_inputs(T: int, dtype=torch.float32, D=16):
    x = torch.randn(T, D, generator=rng(T)).to(dtype)
    w = torch.randn(V, D, generator=rng(1))
    target = torch.randint(0, 120, (T,), generator=rng(2))
    target[::5] = -1
    return x.requires_grad_(), w.requires_grad_(), target


def plain_loss(x, w, target):
    """Cross-entropy on all logits in fp32; z is rounded as the head rounds it."""
    z = (x @ w.type_as(x).T).float()
    softcapped = (SOFTCAP * torch.tanh(z / SOFTCAP) + SOFTCAP)[:, :120]
    return F.cross_entropy(softcapped, target, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("T, rows", ((1, 64), (64, 64), (200, 64), (200, 100), (200, 10**6)))
def test_chunked_loss_equals_cross_entropy_of_all_logits(T, rows, dtype, monkeypatch):
    monkeypatch.setitem(M.LOSS_CHUNK, "cpu", rows * V)
    x, w, target = loss_inputs(T, dtype)
    got = M.chunked_loss(x, w, target, M.HEADS["bf16"], chunk_nll)
    want = plain_loss(x, w, target)
    assert got.dtype == torch.float32 and abs(got - want) < 1e-5 * (1 + want.abs())
    for scale in (1.0, 0.37):
        found = torch.autograd.grad(got * scale, (x, w), retain_graph=True)
        expected = torch.autograd.grad(want * scale, (x, w), retain_graph=True)
        for name, a, b in zip("xw", found, expected):
            assert a.dtype == b.dtype
            assert torch.equal(a, b) or norm_error(a, b) < (1e-5 if dtype == torch.float32 else 1.5e-2), name
    assert (found[0][::5] == 0).all()


def test_chunked_loss_of_ignored_targets_alone_is_zero():
    x, w, target = loss_inputs(70)
    loss = M.chunked_loss(x, w, target * 0 - 1, M.HEADS["bf16"], chunk_nll)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_chunked_loss_gives_gradients_to_one_side_alone():
    x, w, target = loss_inputs(70)
    both = torch.autograd.grad(M.chunked_loss(x, w, target, M.HEADS["bf16"], chunk_nll), (x, w))
    assert torch.equal(both[0], torch.autograd.grad(M.chunked_loss(x, w.detach(), target, M.HEADS["bf16"], chunk_nll), x)[0])
    assert torch.equal(both[1], torch.autograd.grad(M.chunked_loss(x.detach(), w, target, M.HEADS["bf16"], chunk_nll), w)[0])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_the_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setitem(M.LOSS_CHUNK, "cpu", 64 * V)
    x, w, target = loss_inputs(700)
    with Largest() as seen:
        M.chunked_loss(x, w, target, M.HEADS["bf16"], chunk_nll).backward()
    assert seen.largest <= max(64 * V, x.numel(), w.numel()) < 700 * V
    with Largest() as seen:
        plain_loss(*loss_inputs(700)).backward()
    assert seen.largest >= 700 * 120  # the instrument works


def test_validation_does_not_compute_the_heads_gradients(monkeypatch):
    """Under no_grad the two backward matmuls of the head are two thirds of its work, for nothing."""
    def backward(dz, saved):
        raise AssertionError("the head's backward ran under no_grad")

    monkeypatch.setitem(M.HEADS, "bf16", M.HEADS["bf16"]._replace(backward=backward))
    model = tiny().eval()
    with torch.no_grad():
        assert model(PACKED, PACKED).loss.isfinite()


def test_the_loss_is_the_mean_over_all_positions_of_the_logits_cross_entropy():
    model, y = tiny(**NO_AUX), text(2, 18, 5)
    for training in (False, True):
        model.train(training).set_step(SEED, STEP)
        out = model(PACKED, y)
        want = F.cross_entropy(model(PACKED).logits.flatten(0, 1), y.flatten())
        assert out.logits is None and abs(out.loss - want) < 1e-5 and torch.equal(out.loss, out.stats["ce"])
    y[:, :3] = -1
    want = F.cross_entropy(model(PACKED).logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum") / y.numel()
    assert abs(model(PACKED, y).loss - want) < 1e-5


# -----------------------------------------------------------------------------
# 9. The FP8 head. e4m3 rounds by at most 1/16 and e5m2 by at most 1/8; over random numbers about 0.026 and 0.053 of the norm.


def head_inputs():
    x = F.rms_norm(torch.randn(96, 32, generator=rng(0)), (32,)).bfloat16()
    return x, torch.randn(V, 32, generator=rng(1)) * 0.3, torch.rand(96, V, generator=rng(2)).sub(0.5).mul(0.02).bfloat16()


def fp8(x, w, dz=None):
    """z, and dx and dw where dz is given."""
    z, saved = M.fp8_forward(x, M.fp8_prepare(w, x))
    return (z, *M.fp8_backward(dz, saved)) if dz is not None else z


def test_fp8_head_is_within_five_percent_of_fp32():
    x, w, dz = head_inputs()
    z, dx, dw = fp8(x, w, dz)
    assert z.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32 and dw.is_contiguous()
    assert norm_error(z, x.float() @ w.T) < 0.05
    assert norm_error(dx, dz.float() @ w) < 0.09 and norm_error(dw, dz.float().T @ x.float()) < 0.09


def test_fp8_head_clips_instead_of_overflowing():
    x, w, _ = head_inputs()
    assert fp8(x, w * 1000).isfinite().all()
    x[0] = 0
    x[0, 0] = 32**0.5  # the largest entry that RMS norm lets through
    assert norm_error(fp8(x, w)[0], x[0].float() @ w.T) < 0.05


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2), ids=str)
def test_quantise_rounds_clips_and_transposes(dtype):
    x, most = torch.randn(48, 80, generator=rng()), torch.finfo(dtype).max
    q, qt = M.quantise(x, 0.25, dtype)
    assert q.dtype == qt.dtype == dtype and q.is_contiguous() and qt.is_contiguous() and torch.equal(q.float().T, qt.float())
    assert norm_error(q.float() * 0.25, x) < 0.06
    assert M.quantise(x * 1e9, 0.25, dtype)[0].float().abs().max() == most


def test_fp8_head_trains_like_bf16_and_evaluates_as_bf16():
    y, runs = text(2, 18, 5), []
    for head in ("bf16", "fp8"):
        model = GPT(Config(**TINY | dict(head=head, dtype="bf16"))).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for step in range(25):
            loss = step_loss(model, PACKED, y, step=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert abs(runs[0][0] - runs[1][0]) < 1e-3 and abs(runs[0][5] - runs[1][5]) < 0.1
    assert all(run[-1] < run[0] - 1 for run in runs) and runs[0] != runs[1]
    twin = GPT(Config(**TINY | dict(head="bf16", dtype="bf16")))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(PACKED, y).loss, twin.eval()(PACKED, y).loss)
    assert torch.equal(model(PACKED).logits, twin(PACKED).logits)


@pytest.mark.parametrize("head", ("bf16", "fp8"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_every_head_gives_gradients_close_to_the_fp32_ones(head, dtype):
    y, found = text(2, 18, 5), []
    for h, d in (("bf16", "fp32"), (head, dtype)):
        model = tiny(head=h, dtype=d, router="hash").train()
        found.append(gradients(model, step_loss(model, PACKED, y))["head"])
    assert norm_error(found[1], found[0]) < 0.15


# -----------------------------------------------------------------------------
# 10. Decoding


def cached(model, x, cuts, docs=None):
    cache = Cache(model.config, len(x), x.size(1))
    edges = [0, *cuts, x.size(1)]
    with torch.no_grad():
        parts = [model(x[:, a:b], cache=cache, doc_ids_BT=None if docs is None else docs[:, a:b]).logits for a, b in zip(edges, edges[1:])]
    assert cache.length == x.size(1) + model.config.num_meta_tokens
    return torch.cat(parts, 1)[..., :VOCAB]


def check_cache(model, T=40):
    """Whatever the prompt is cut into, each position has the logits of the full forward."""
    x = text(2, T, 9, eots=[(0, 0), (0, 9), (0, 25), (1, 16), (1, 17)])
    whole, sure = logits(model, x), settled(model, x)
    random = [sorted(torch.randperm(T - 1, generator=rng(i))[: 2 + 3 * i].add(1).tolist()) for i in range(3)]
    for cuts in (range(1, T), [], [T - 1], [16], [17], *random):
        same(cached(model, x, cuts), whole, sure, f"cut at {list(cuts)}")


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_cached_decoding_equals_the_full_forward(build):
    check_cache(tiny(**build).eval())


def test_cached_decoding_follows_the_current_window():
    model, x = tiny(window="L", window_size=30).eval(), text(1, 30, 3)
    model.set_step(SEED, STEP, window=4)
    with torch.no_grad():
        whole = model(x).logits[..., :VOCAB]
    same(cached(model, x, range(1, 30)), whole, torch.ones(1, 30), "window 4")


def test_a_router_without_decode_state_is_caught(monkeypatch):
    monkeypatch.setitem(ROUTERS, "leak", CausalConv)
    with pytest.raises(AssertionError, match="logits differ"):
        check_cache(tiny(router="leak").eval())


def test_cached_decoding_takes_the_same_explicit_documents_as_the_full_forward():
    model, x = tiny().eval(), text(2, 20, 3)
    docs = torch.tensor([[0] * 5 + [1] * 15, [1] * 11 + [2] * 9])
    same(cached(model, x, [7, 8, 15], docs), logits(model, x, doc=docs), settled(model, x), "explicit documents")


def test_cached_decoding_of_embeddings_equals_the_full_forward():
    model, x = tiny().eval(), torch.randn(2, 20, 32, generator=rng(6))
    same(cached(model, x, [3, 4, 12]), logits(model, x), settled(model, x), "embeddings")


def test_a_full_cache_refuses_more():
    model, cache = tiny().eval(), Cache(Config(**TINY), 2, 10)
    model(PACKED[:, :8], cache=cache)
    with pytest.raises(ValueError, match="10 tokens and 11"):
        model(PACKED[:, 8:11], cache=cache)
    assert cache.length == 8
    model(PACKED[:, 8:10], cache=cache)
    with pytest.raises(ValueError, match="max_len"):
        model(PACKED[:, 10:11], cache=cache)


@pytest.mark.parametrize("build", BUILDS[:1] + BUILDS[-1:], ids=name_of)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_greedy_generation_equals_a_loop_of_full_forwards(build, training):
    model, prompt = tiny(**build).train(training), text(2, 5, 4, eots=[(0, 0), (1, 0)])
    got = model.generate(prompt, 25, temperature=0)
    assert model.training == training and all(module.training == training for module in model.modules())
    model.eval()
    want = prompt
    with torch.no_grad():
        for _ in range(25):
            want = torch.cat([want, model(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want) and torch.equal(model.generate(prompt, 25, temperature=1.0, top_k=1), want)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_sampling_follows_its_seed_and_top_k():
    model, prompt = tiny().eval(), text(4, 3, 4)
    with torch.no_grad():
        model.head.mul_(0.2)  # flat: many ids have a chance
    a, b, c = (model.generate(prompt, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4, 23) and torch.equal(a[:, :3], prompt)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    many = model.generate(prompt, 20, seed=3, top_k=10**6)
    assert torch.equal(many, model.generate(prompt, 20, seed=3)) and torch.equal(state, torch.get_rng_state())
    assert (torch.cat([a, c, many]) < VOCAB).all()
    few = model.generate(prompt, 20, seed=3, top_k=3)
    with torch.no_grad():
        rank = (model(few).logits.argsort(-1, descending=True)[:, 2:-1] == few[:, 3:, None]).int().argmax(-1)
    assert rank.max() == 2


def test_sampling_frequencies_are_the_softmax_at_the_temperature():
    model, prompt = tiny(router="hash").eval(), text(1, 4, 4).expand(4000, 4)
    with torch.no_grad():
        p = (model(prompt[:1]).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(model.generate(prompt, 1, temperature=0.7)[:, -1], minlength=64) / 4000
    assert ((counts - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-6).all()


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny().generate(torch.zeros(1, 0, dtype=torch.int64), 3)


# -----------------------------------------------------------------------------
# 11. Parameters


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_every_parameter_has_a_kind(build):
    model = GPT(Config(**TINY | build))
    kinds = model.parameter_kinds()
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert set(kinds.values()) <= {"embed", "ngram_embed", "value_embed", "head", "matrix", "expert", "router", "scalar"}
    for name, p in model.named_parameters():
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
def test_every_router_and_depth_builds_on_the_meta_device(build):
    with torch.device("meta"):
        assert all(p.is_meta for p in GPT(Config(**TINY | build)).parameters())
        model = GPT(Config(**TINY | build | dict(dtype="bf16")))  # the fake kernel of grouped_mm knows bf16 only
        out = model(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    assert all(p.is_meta for p in model.parameters()) and out.loss.shape == ()


def test_an_unknown_parameter_has_no_kind_and_no_initial_value():
    model = GPT(Config(**TINY))
    model.blocks[1].mystery = nn.Parameter(torch.zeros(3))
    for call in (model.parameter_kinds, model.init_weights):
        with pytest.raises(KeyError, match="blocks.1.mystery"):
            call()
    with pytest.raises(KeyError, match="no rule"):
        M.parameter_rule("blocks.0.xembed")


def test_initial_values_follow_the_seed_alone():
    config = Config(**TINY)
    torch.manual_seed(1)
    a = GPT(config)
    torch.manual_seed(2)
    b, c = GPT(config), GPT(config).init_weights(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed, c.embed)
    for name, p in a.named_parameters():
        if p.ndim > 1 and (p != 0).any() and "embed" not in name:
            assert abs(p.std() / (0.5 * p.size(-1) ** -0.5) - 1) < 0.1, name  # per matrix: an expert's fan in is its own
        elif "embed" in name:
            assert abs(p.std() - 1) < 0.1
    ups = a.blocks[0].ffn.experts.up
    assert not torch.equal(ups[0], ups[1]) and not torch.equal(a.blocks[0].ffn.experts.up, a.blocks[1].ffn.experts.up)


# -----------------------------------------------------------------------------
# 12. Config

BAD = [
    ("vocab_size", 0, "at least 1"), ("n_layer", 0, "at least 1"), ("n_embd", -8, "at least 1"), ("n_head", 0, "at least 1"),
    ("num_experts", 0, "at least 1"), ("top_k", 0, "at least 1"), ("balance_window", 0, "at least 1"), ("window_size", 0, "at least 1"),
    ("router_noise", -0.1, "at least 0"), ("balance_coef", -1.0, "at least 0"), ("z_coef", math.nan, "at least 0"),
    ("bias_update_factor", -1e-3, "at least 0"), ("mlp_ratio", 0.0, "above 0"), ("attn_scale", -1.0, "above 0"), ("softcap", 0.0, "above 0"),
    ("softcap", math.nan, "above 0"), ("mlp_ratio", math.inf, "mlp_ratio"),
    ("router", "lineer", "linear"), ("depth", "stak", "stack"), ("head", "fp4", "fp8"), ("dtype", "fp16", "bf16"),
    ("pattern", "MX", "M D"), ("pattern", "", "M D"), ("attention", "B", "A K - L S"), ("rotary", "HX", "H N V B W"),
    ("norms", "X", "P R"), ("attn_softmax", "max", "ssmax"), ("qk_norm", "layer", "rms, none"), ("latent_dim", 0, "at least 1"),
    ("latent_dim", 12, "multiple of 8"), ("num_meta_tokens", -1, "at least 0"), ("window", "LX", "L S Q E"), ("window", "", "L S"),
    ("ngrams", "21", "digits from 2 to 9"), ("ngrams", "2,3", "digits"), ("ngram_rows", 0, "at least 1"),
    ("eot_token", 61, "below vocab_size = 61"), ("eot_token", -1, "below vocab_size"),
    ("head_dim", 12, "multiple of 8"), ("head_dim", 0, "multiple of 8"),
    ("n_embd", 36, "multiple of 8"), ("top_k", 5, "num_experts = 4"), ("mlp_ratio", 0.3, "multiple of 8"), ("mlp_ratio", 0.01, "multiple of 8"),
    ("value_embeds", 3, "from 0 to n_layer // 2 = 2"), ("value_embeds", -1, "from 0"),
    ("n_layer", "4", "type int"), ("n_layer", 4.0, "type int"), ("n_layer", None, "type int"), ("n_head", True, "type int"),
    ("mlp_ratio", "4", "type float"), ("z_coef", None, "type float"), ("router_noise", True, "type float"),
    ("router", 1, "type str"), ("pattern", 4, "type str"), ("window", ["L"], "type str"), ("dtype", torch.bfloat16, "type str"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, legal", BAD, ids=[f"{field}={value!r}" for field, value, _ in BAD])
def test_a_bad_value_is_refused_by_name_with_the_legal_values(field, value, legal):
    with pytest.raises(ConfigError) as error:
        Config(**TINY | {field: value})
    message = str(error.value)
    assert message.startswith(f"{field} is {value!r}") and legal in message and "\n" not in message


def test_a_list_of_experts_says_how_many_there_are():
    """One name alone stands for num_experts of them."""
    assert [Config(**TINY | dict(experts=experts, top_k=1)).num_experts for experts in ("mlp", "mlp*1", "mlp*3", "mlp,mlp")] == [4, 1, 3, 2]


def test_the_shortest_window_holds_a_token_in_the_count_of_flops_too():
    assert M.mean_keys(Config(**TINY | dict(window_size=1)), "S", 40) == 1


def test_the_coldest_sampling_takes_the_likeliest():
    logits_BV, generators = torch.randn(3, 20, generator=rng(1)), [rng(0)] * 3
    assert torch.equal(M.picked_tokens(logits_BV, 1e-38, 0, 1.0, generators), logits_BV.argmax(-1))


def test_every_table_field_names_all_its_keys():
    for field, table in (("router", ROUTERS), ("depth", DEPTHS), ("head", M.HEADS), ("dtype", M.DTYPES),
                         ("attn_softmax", M.SOFTMAXES), ("qk_norm", M.QK_NORMS)):  # fmt: skip
        with pytest.raises(ConfigError) as error:
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


@pytest.mark.parametrize("n_embd, ratio, k", ((32, 4.0, 1), (32, 4, 2), (64, 3.0, 4), (768, 4.0, 2), (96, 3.0, 3), (32, 0.5, 2)))
def test_active_hidden_width_is_that_of_the_dense_twin(n_embd, ratio, k):
    config = Config(**TINY | dict(n_embd=n_embd, mlp_ratio=ratio, top_k=k))
    assert config.hidden_size * k == ratio * n_embd and isinstance(config.hidden_size, int)


def test_patterns_are_tiled_over_depth():
    config = Config(**TINY | dict(n_layer=7, pattern="DMM", window="LSSS", attention="AAA-"))
    assert (config.tiled("pattern"), config.tiled("window"), config.tiled("attention")) == ("DMMDMMD", "LSSSLSS", "AAA-AAA")
    assert config.routed_layers == 4 and Config(**TINY).padded_vocab_size == 64 and Config().padded_vocab_size == 50304
    model = GPT(config)
    assert [type(block.ffn).__name__ for block in model.blocks] == ["DenseMLP", "MoE", "MoE"] * 2 + ["DenseMLP"]
    assert route_layers(model) == [0, 1, 2, 3]


@pytest.mark.parametrize("n_layer", (1, 2, 3, 5))
def test_any_depth_runs_and_trains(n_layer):
    model = tiny(n_layer=n_layer, value_embeds=min(1, n_layer // 2)).train()
    grads = gradients(model, step_loss(model, PACKED, text(2, 18, 5)))
    for name, grad in grads.items():
        assert grad.numel() == 0 or grad.abs().sum() > 0, name


def test_skips_pair_the_layers_in_mirror_order():
    """Each layer adds its own power of two: the sum tells which outputs were added where."""
    model = GPT(Config(**TINY | dict(n_layer=5, value_embeds=0)))
    with torch.no_grad():
        model.depth.skip_weights.copy_(torch.tensor([10.0, 100.0]))
    blocks = [lambda x, e, ctx, i=i: (x + 2.0**i, [i], None) for i in range(5)]
    deep = model.depth(blocks, torch.zeros(1), [moe_context(model.config, 1)] * 5, None)
    assert deep.outputs[0][0].item() == (1 + 2 + 4) + 10 * (1 + 2) + 8 + 100 * 1 + 16 and deep.stats == [0, 1, 2, 3, 4]


def slow_hash(ids, t, n):
    """Of ids[t], ids[t - 1], ..., n of them, with Python's integers."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    key = 0
    for back in range(n):
        key = mix((key + ids[t - back]) % 2**32)
    return key - 2**32 * (key >= 2**31)


def slow_forward(model, x):
    """Logits of one document from the definition of the dense model, with nothing of the model but its parameters."""
    config, p, M = model.config, dict(model.named_parameters()), model.config.num_meta_tokens
    T, C, quarter = x.size(1) + M, config.head_dim, config.head_dim // 4
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    qk_norm = rms if config.qk_norm == "rms" else lambda z: z
    heads = lambda z: z.unflatten(-1, (config.n_head, -1)).transpose(1, 2)

    def turned(z, speed, back=False):
        theta = speed * torch.arange(T)[:, None] * 1024 ** -(torch.arange(quarter) / (quarter - 1))
        z = torch.complex(*z.chunk(2, dim=-1)) * torch.exp((1j if back else -1j) * torch.cat([theta, torch.zeros(T, quarter)], 1))
        return torch.cat([z.real, z.imag], -1)

    summed = p["embed"][x]
    for table, n in enumerate(map(int, config.ngrams)):
        row = torch.tensor([[slow_hash([-1] * (n - 1) + ids, t + n - 1, n) % config.ngram_rows for t in range(x.size(1))] for ids in x.tolist()])
        summed = summed + p[f"ngram_embeds.{table}"][row]
    if M:
        summed = torch.cat([p["meta_tokens"].expand(len(x), M, -1), summed], 1)
    x = torch.cat([torch.full((len(x), M), EOT), x], 1)
    embedding, n = rms(summed), config.n_layer
    position, keys = torch.arange(T), [None] * n  # of each layer: what its tokens are seen as
    merge = {"add": lambda h, y, terms: h + y, "average": lambda h, y, terms: (h * terms + y) / (terms + 1),
             "average_keep_embedding": lambda h, y, terms: embedding + ((h - embedding) * (terms - 1) + y) / terms}[config.residual]  # fmt: skip

    def layer(i, h, terms, active=None, policy="latest"):
        """What layer i makes of all tokens, where those that are not active are seen by the policy."""
        if config.residual == "add":
            mix = p[f"blocks.{i}.stream_mix"]
            h = mix[0] * h + mix[1] * embedding
        after = rms if config.tiled("norms")[i] == "R" else lambda z: z
        letter, rotary, of = config.tiled("attention")[i], config.tiled("rotary")[i], lambda name: p[f"blocks.{i}.attention.{name}"]
        if letter == "-":
            h = merge(h, 0, terms)
        else:
            divisor = {"L": 1, "S": 2, "Q": 4, "E": 8}[config.tiled("window")[i]]
            turn_qk = functools.partial(turned, speed={"W": divisor / 8, "H": 1, "B": 1}.get(rotary, 0))
            turn_vo = functools.partial(turned, speed=rotary in "VB")
            source = rms(h)
            if letter in "AK":
                q, k, v = (heads(source @ part.T) for part in of("qkv"))
                table = {layer: t for t in range(config.value_embeds) for layer in (t, n - config.value_embeds + t)}.get(i)
                added = 0 if table is None else heads(p[f"value_embeds.{table}"][x])
                v = turn_vo(of("value_mix")[0] * v + of("value_mix")[1] * added)
                k = turn_qk(qk_norm(k))
            if letter == "L":
                latent, q = rms(source @ of("latent").T), heads(source @ of("q").T)
                still, v = heads(latent @ of("key_up").T), heads(latent @ of("value_up").T)
                shared = (source @ of("key").T)[:, None].expand(-1, config.n_head, -1, -1)
                parts = [part for pair in zip(shared.split(quarter, -1), still.split(quarter, -1)) for part in pair]
                k = turn_qk(qk_norm(torch.cat(parts, -1)))
            if letter == "S":
                q = heads(source @ of("q").T)
                maker = next(j for j in range(i - 1, -1, -1) if config.tiled("attention")[j] not in "S-")
                letter, keys[i] = config.tiled("attention")[maker], keys[maker]
            elif keys[i] is None:
                keys[i] = k, v
            elif policy != "share_first":
                keys[i] = tuple(torch.where(active[:, None, :, None], new, old) for new, old in zip((k, v), keys[i]))
            k, v = keys[i]
            if letter == "K":  # channels in the second and in the last quarter come from the token before
                other = position < M
                before = torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, :-1] * (other[1:] == other[:-1])[:, None]], 2)
                k = torch.where(torch.arange(C) // quarter % 2 == 1, before, k)
            near = position[:, None] - position
            reach = near.abs() if config.objective == "masked" else near + 1e9 * (near < 0)
            near_enough = (reach < config.window_size // divisor) & ((position < M)[:, None] == (position < M))
            seen = near_enough | (position < M) & ((near >= 0) | (config.objective == "masked"))
            if policy == "per_loop" and active is not None:
                seen = seen & active[:, None, None, :] | (near == 0)
            score = turn_qk(qk_norm(q)) @ k.mT * config.attn_scale
            if config.attn_softmax == "ssmax":
                score = score * of("sharpness")[:, None, None] * seen.sum(-1, keepdim=True).log()
            y = turn_vo(score.masked_fill(~seen, -math.inf).softmax(-1) @ v, back=True)
            h = merge(h, after(y.transpose(1, 2).flatten(-2) @ of("out").T), terms)
        return merge(h, after((rms(h) @ p[f"blocks.{i}.ffn.up"].T).clamp(min=0) ** 2 @ p[f"blocks.{i}.ffn.down"].T), terms + 1)

    h = (slow_loop if config.depth == "loop" else slow_stack)(model, layer, embedding)
    z = rms(h[:, M:]) @ p["head"].T
    return (config.softcap * torch.tanh(z / config.softcap) + config.softcap)[..., :VOCAB]


def slow_stack(model, layer, h):
    n, outputs = model.config.n_layer, []
    half = n - n // 2
    for i in range(n):
        if i >= half:
            h = h + model.depth.skip_weights[i - half] * outputs[n // 2 - 1 - (i - half)]
        h = layer(i, h, 2 * i + 1)
        outputs.append(h)
    return h


def slow_loop(model, layer, h):
    """All loops for all tokens; those that have left are put back to what they were."""
    config, letters, halt = model.config, model.config.tiled("looped"), model.depth.halt
    first, stop = letters.index("o"), letters.rindex("o") + 1
    loops = config.loops if model.training or not config.eval_loops else config.eval_loops
    for i in range(first):
        h = layer(i, h, 2 * i + 1)
    begin, active, depth, gone, out = h, torch.ones(h.shape[:2], dtype=torch.bool), torch.zeros(h.shape[:2]), torch.zeros(h.shape[:2]), 0
    limit = config.halt_threshold or {"act": 0.99, "stick_breaking": 0.999, "ponder": 0.5, "threshold": 1.0}.get(config.halt)
    for loop in range(loops):
        new = h + config.reinject * begin * (loop > 0)
        for i in range(first, stop):
            made = layer(i, new, 2 * (i + loop * (stop - first)) + 1, active, config.loop_keys)
            new = torch.where(active[..., None], made, new)  # what one that has left would make of itself, nobody sees
        depth = depth + active
        if config.halt == "none":
            h = out = new
            continue
        rms = new / (new.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        wish = torch.sigmoid(rms @ halt.weight[0] + halt.bias)
        share = wish * (1 - gone) if config.halt in ("stick_breaking", "ponder") else wish
        leaves = (gone + share >= limit) | torch.tensor(loop == loops - 1)
        if config.halt in ("act", "stick_breaking"):
            share = torch.where(leaves, 1 - gone, share)
            out = out + torch.where(active, share, 0)[..., None] * new
        step = share if config.halt == "threshold" else torch.ones_like(share)
        h = torch.where(active[..., None], h + step[..., None] * (new - h), h)
        gone, active = gone + share * active, active & ~leaves
    h = out if config.halt in ("none", "act", "stick_breaking") else h
    for i in range(stop, config.n_layer):
        h = layer(i, h, (2 * (i + (depth - 1) * (stop - first)) + 1)[..., None])
    return h


DENSE = [dict(n_layer=6, value_embeds=3), dict(n_layer=5, value_embeds=2, attention="AA-A"), dict(n_layer=4, value_embeds=0),
         dict(attention="KAK-", window="LSQE", ngrams="23", ngram_rows=100), dict(attn_softmax="ssmax"), dict(qk_norm="none"),
         dict(rotary="NVBW", window="LLLS"), dict(rotary="W", window="LSQE"), dict(attention="L", rotary="HN"), dict(attention="ASLS"),
         dict(attention="KSKS", rotary="WWBB", window="LLSS", attn_softmax="ssmax"), dict(norms="RP"), dict(norms="R", attention="LA-A"),
         dict(num_meta_tokens=3, ngrams="2", ngram_rows=50), dict(num_meta_tokens=9, attention="KL", attn_softmax="ssmax", rotary="HW"),
         dict(objective="masked", window="LSQE"), dict(objective="masked", num_meta_tokens=3, attention="KL")]
LOOPS = [dict(loops=3), dict(loops=1), dict(loops=2, looped=".o", n_layer=3, attention="KL-"), dict(loops=3, looped=".oo.", reinject=0.5),
         dict(loops=3, residual="average", norms="R"), dict(loops=2, residual="average_keep_embedding", looped="o.", n_layer=2),
         dict(loops=3, loop_keys="share_first", attention="KAAA"), dict(loops=3, attention="AS", num_meta_tokens=3, attn_softmax="ssmax"),
         dict(loops=2, objective="masked")]


def loss_of_all(model, x, y):
    """Asked about every token, whatever the objective hides."""
    if model.config.objective == "next":
        return model(x, y).loss
    return F.cross_entropy(model(x).logits[..., :VOCAB].flatten(0, 1), y.flatten())


@pytest.mark.parametrize("changes", DENSE + [dict(depth="loop") | changes for changes in LOOPS], ids=name_of)
def test_the_dense_model_equals_its_definition_in_logits_and_gradients(changes):
    model, x, y = tiny(pattern="D", **changes), text(2, 20, 6), text(2, 20, 7)
    want = slow_forward(model, x)
    assert far(model(x).logits[..., :VOCAB], want) < 1e-5
    grads, slow = (gradients(model, loss) for loss in (loss_of_all(model, x, y), F.cross_entropy(want.flatten(0, 1), y.flatten())))
    for name, grad in slow.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("n", (2, 3, 5))
def test_an_n_gram_ends_at_its_token_and_begins_no_earlier_than_its_document(n):
    """Changing an id changes the hash of its own and of the next n - 1 tokens, up to the end of its document, and no other."""
    id_BT, doc_BT = text(1, 24, 1), (torch.arange(24) >= 10).long()[None]
    before = M.ngram_hashes(id_BT, doc_BT, n)[-1]
    for t in range(24):
        changed = id_BT.clone()
        changed[0, t] = (changed[0, t] + 1) % EOT
        moved = (M.ngram_hashes(changed, doc_BT, n)[-1] != before)[0].nonzero().flatten().tolist()
        assert moved == [u for u in range(t, min(t + n, 24)) if doc_BT[0, u] == doc_BT[0, t]]


def test_offset_attention_copies_in_one_layer():
    """With keys of the token before, one layer whose queries and keys are the embedding finds what followed an earlier occurrence."""
    ids = torch.tensor([[EOT, 3, 9, 4, 7, 8, 1, 3]])
    found = {}
    for letter in "AK":
        model = tiny(n_layer=1, n_head=1, head_dim=32, value_embeds=0, attention=letter, pattern="D", window="L", attn_scale=8.0).eval()
        with torch.no_grad():
            query, key, value = model.blocks[0].attention.qkv
            still = torch.arange(32) // 8 % 2 == 1
            for weight in (query, key):
                weight.copy_(torch.randn(32, 32, generator=rng(1)) * still[:, None])
            value.copy_(torch.eye(32))
            model.blocks[0].attention.out.copy_(torch.eye(32) * 8)
            model.blocks[0].attention.value_mix.copy_(torch.tensor([1.0, 0.0]))
            model.blocks[0].stream_mix.copy_(torch.tensor([1.0, 0.0]))
            model.blocks[0].ffn.down.zero_()
            model.head.copy_(model.embed)
            found[letter] = model(ids).logits[0, -1].argmax().item()
    assert found == {"A": 3, "K": 9}


# -----------------------------------------------------------------------------
# 13. Counting


def test_parameter_counts_equal_those_by_hand():
    counts = M.count_parameters(Config(**TINY | dict(pattern="DM", attention="A-")))
    assert counts["embed"] == counts["head"] == counts["value_embed"] == 64 * 32
    assert counts["matrix"] == 2 * 4 * 32 * 32 + 2 * 2 * 32 * 128  # two attentions, two dense MLPs
    assert counts["expert"] == 2 * 4 * 2 * 32 * 64 and counts["router"] == 2 * 2 * 4 * 32
    assert counts["scalar"] == 4 * 2 + 2 * 2 + 2
    kinds = [counts[kind] for kind in ("embed", "ngram_embed", "value_embed", "head", "matrix", "expert", "router", "scalar")]
    assert counts["total"] == sum(kinds) == sum(p.numel() for p in GPT(Config(**TINY | dict(pattern="DM", attention="A-"))).parameters())
    assert counts["active"] == counts["total"] - counts["expert"] // 2 - 63 * 32 * 2


def test_all_experts_are_active_when_all_are_chosen():
    counts = M.count_parameters(Config(**TINY | dict(top_k=4)))
    assert counts["active"] == counts["total"] - (counts["embed"] + counts["value_embed"]) * 63 // 64
    one, dense = (M.count_parameters(Config(**TINY | dict(num_experts=1, top_k=1, pattern=p))) for p in "MD")
    assert one["active"] - one["router"] == dense["active"] and one["total"] - one["router"] == dense["total"]


def test_flops_equal_what_the_counter_sees_of_a_dense_model():
    """Matmuls agree exactly. Attention: one block of 128 queries computes its upper triangle too, which the formula leaves out."""
    T, config = 128, Config(**TINY | dict(pattern="D", window="L", window_size=1000))
    model, x = tiny(pattern="D", window="L", window_size=1000), text(1, 128, 1)
    counts = M.count_parameters(config)
    total, weights = M.flops_per_token(config, T), counts["matrix"] + counts["head"]
    attention = total - 6 * weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    seen = {str(op): n / T for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == 2 * weights
    assert abs(seen["aten.bmm"] * (T + 1) / (2 * T) - attention / 3) < 1e-6 * attention
    with FlopCounterMode(display=False) as counter:
        step_loss(model.train(), x, x).backward()
    seen = {str(op): n / T for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == 6 * weights and abs(seen["aten.bmm"] * (T + 1) / (2 * T) - attention) < 1e-6 * attention


def test_flops_of_experts_equal_the_dense_twins_plus_the_router():
    dense, sparse = (Config(**TINY | dict(pattern=p)) for p in "DM")
    router = M.count_parameters(sparse)["router"]
    for T in (16, 128):
        assert M.flops_per_token(sparse, T) == M.flops_per_token(dense, T) + 6 * router
    model, x = tiny().train(), text(1, 128, 1)
    with FlopCounterMode(display=False) as counter:
        model(x)
    counts, seen = M.count_parameters(sparse), {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert seen["aten.mm"] == 128 * 2 * (counts["matrix"] + counts["head"] + router)  # grouped_mm has no formula in the counter


def test_attention_flops_follow_window_and_dropped_layers():
    def keys(T, **changes):
        config = Config(**TINY | changes)
        counts = M.count_parameters(config)
        return (M.flops_per_token(config, T) - 6 * (counts["matrix"] + counts["expert"] / 2 + counts["head"] + counts["router"])) / (12 * 32)

    by_hand = sum(min(t + 1, 12) for t in range(40)) / 40, sum(min(t + 1, 6) for t in range(40)) / 40
    assert abs(keys(40) - 2 * sum(by_hand)) < 1e-9 and abs(keys(40, window="S", attention="A-") - 2 * by_hand[1]) < 1e-9
    assert abs(keys(5, window="L") - 4 * 3) < 1e-9


def test_activation_bytes_scale_with_the_row():
    config = Config(**TINY | dict(dtype="bf16"))
    a, b = M.activation_bytes(config, 128), M.activation_bytes(config, 256)
    assert a > 128 * 4 * 32 * 4 * 2 and 1.8 < b / a < 3


def test_activation_bytes_lose_nothing_where_a_row_is_as_long_as_the_model_is_wide():
    for wide in (dict(n_embd=256), dict(n_embd=128), dict(n_head=1, head_dim=128), dict(head_dim=136), dict(mlp_ratio=8.0)):
        config = Config(**TINY | dict(dtype="bf16") | wide)
        for T in (520, 1040):
            assert M.activation_bytes(config, T) == M.saved_bytes(config, T), wide
    config = Config(**TINY | dict(n_embd=256, dtype="bf16"))
    assert M.saved_bytes(config, 256) < M.activation_bytes(config, 256)


# -----------------------------------------------------------------------------
# 14. Balance


def test_balance_rolls_the_window_of_loads():
    model = GPT(Config(**TINY | dict(balance_window=3, pattern="DM")))
    assert model.load_WLE.shape == (3, 2, 4) and (model.load_WLE == 0.25).all()
    counts = [torch.randint(0, 50, (2, 4), generator=rng(i)) for i in range(5)]
    for step in range(5):
        model.balance(counts[step])
    for slot, c in zip(model.load_WLE, counts[2:]):
        assert far(slot, c / c.sum(1, keepdim=True)) < 1e-6
    model.balance(torch.zeros(2, 4, dtype=torch.int64))
    assert model.load_WLE.isfinite().all() and (model.bias_LE == 0).all()


def test_bias_moves_against_the_load_and_stays_centred():
    model = GPT(Config(**TINY | dict(bias_update_factor=0.01, pattern="DM")))
    counts = torch.tensor([[10, 30, 40, 0], [20, 20, 20, 20]])
    model.balance(counts)
    assert far(model.bias_LE[0] * 100, torch.tensor([1.0, -1, -1, 1])) < 1e-6 and (model.bias_LE[1] == 0).all()
    model.balance(torch.tensor([[90, 10, 10, 10], [0, 0, 0, 5]]))
    assert far(model.bias_LE[0] * 100, torch.tensor([-0.5, -0.5, -0.5, 1.5])) < 1e-5
    assert far(model.bias_LE[1] * 100, torch.tensor([0.5, 0.5, 0.5, -1.5])) < 1e-5
    assert model.bias_LE.mean(1).abs().max() < 1e-8


def test_bias_evens_out_the_load_of_a_skewed_router():
    """The wrong sign would starve experts; the right one brings every load near the mean."""
    config = Config(**TINY | dict(bias_update_factor=0.005, n_layer=1, value_embeds=0))
    model, x = shaken(GPT(config), 3).eval(), text(8, 32, 4)
    with torch.no_grad():
        model.bias_LE.zero_()
        model.blocks[0].ffn.router.gate.mul_(0.2)
    spread = []
    for _ in range(60):
        counts = model(x).stats["counts_LE"]
        spread.append(counts.max().item() / counts.float().mean().item() - 1)
        model.balance(counts)
    assert spread[0] > 0.15 and max(spread[-5:]) < 0.6 * spread[0], (spread[0], spread[-5:])


def test_bias_chooses_experts_and_leaves_their_gates_alone():
    config = Config(**TINY)
    router, ctx = shaken(M.LinearRouter(config)).eval(), moe_context(config, 30)
    x = torch.randn(1, 30, 32, generator=rng())
    plain = router(x, ctx)
    pushed = router(x, ctx._replace(bias_E=torch.tensor([0.0, 0, 0, 5])))
    assert (pushed.expert_TK == 3).any(1).all() and not (plain.expert_TK == 3).any(1).all()
    for route in (plain, pushed):
        assert far(route.weight_TK, route.logits_TE.gather(1, route.expert_TK).softmax(-1)) < 1e-6
    assert torch.equal(plain.logits_TE, pushed.logits_TE) and far(plain.logits_TE, x[0] @ router.gate.T) < 1e-6


def test_balance_loss_is_the_load_times_the_probability():
    model = tiny(pattern="DM").eval()
    routes = []

    def spy(router, args, route):
        routes.append(route)

    for block in model.blocks[1::2]:
        block.ffn.router.register_forward_hook(spy)
    stats = model(PACKED).stats
    by_hand = [4 * sum(model.load_WLE[0, l, e] * r.logits_TE.softmax(-1)[:, e].mean() for e in range(4)) for l, r in enumerate(routes)]
    assert abs(stats["balance_loss"] - sum(by_hand) / 2) < 1e-5
    z = [sum(torch.log(torch.exp(row).sum()) ** 2 for row in r.logits_TE) / 36 for r in routes]
    assert abs(stats["z_loss"] - sum(z) / 2) < 1e-4 * (1 + stats["z_loss"])
    p = torch.stack([r.logits_TE.softmax(-1) for r in routes])
    assert abs(stats["entropy"] + (p * p.log()).sum(-1).mean() / math.log(4)) < 1e-5
    model.load_WLE.fill_(0.25)
    assert abs(model(PACKED).stats["balance_loss"] - 1) < 1e-6


def test_balance_loss_uses_the_steps_before_not_this_batch():
    model = tiny().train()
    before = step_loss(model, PACKED, PACKED)
    model.balance(torch.tensor([[50, 1, 1, 1]] * 4))
    after = step_loss(model, PACKED, PACKED)
    assert before != after
    prob, load = torch.rand(4, 4, generator=rng()).softmax(-1), model.load_WLE[0]
    stats = [M.RouteStats(torch.randint(0, 9, (4,)), p, torch.tensor(0.0), torch.tensor(0.0)) for p in prob]
    assert abs(model.summary(M.Deep([], stats), 1)["balance_loss"] - (4 * load * prob).sum(-1).mean()) < 1e-6


def test_auxiliary_losses_are_summed_over_layers_and_count_in_training_only():
    model, y = tiny(balance_coef=0.3, z_coef=0.02, pattern="DM"), text(2, 18, 5)
    model.train().set_step(SEED, STEP)
    out = model(PACKED, y)
    assert abs(out.loss - out.stats["ce"] - 2 * (0.3 * out.stats["balance_loss"] + 0.02 * out.stats["z_loss"])) < 1e-5
    assert out.loss - out.stats["ce"] > 0.1
    out = model.eval()(PACKED, y)
    assert torch.equal(out.loss, out.stats["ce"])
    dense = tiny(pattern="D").train()(PACKED, y)
    assert torch.equal(dense.loss, dense.stats["ce"]) and dense.stats["counts_LE"].shape == (0, 4)


@pytest.mark.parametrize("targets", (True, False), ids=("with-ce", "auxiliary-only"))
def test_gradients_add_up_over_micro_batches(targets):
    """The mean of two halves' gradients is the whole batch's: nothing in the loss mixes tokens of one micro-batch."""
    model = tiny(balance_coef=0.5, z_coef=0.1).train()
    x, y = text(4, 12, 3), text(4, 12, 5) if targets else torch.full((4, 12), -1)
    model.balance(torch.tensor([[9, 2, 3, 1]] * 4))
    whole = gradients(model, step_loss(model, x, y))
    halves = [gradients(model, step_loss(model, x[i : i + 2], y[i : i + 2], first_token=i * 12)) for i in (0, 2)]
    for name, grad in whole.items():
        assert far((halves[0][name] + halves[1][name]) / 2, grad) < 1e-6 or norm_error((halves[0][name] + halves[1][name]) / 2, grad) < 1e-5, name
    assert any((whole[name] != 0).any() for name in whole if name.endswith("router.gate"))


# -----------------------------------------------------------------------------
# 15. Straight-line forwards

NOISY = "self.training and self.noise_scale"
MAY_ASK = {"self.training", NOISY, "targets_BT is None", "cache is None", "cache is not None", "ctx.cache is None", "ctx.cache is not None",
           "targets_BT is not None", "expert_B is not None", "real_B is not None", "self.training and cache is None"}


def branches(source: str) -> list[tuple[str, str]]:
    """(class, test) of each branch in a `forward(self, ...)`."""
    found = []
    for cls in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]:
        for method in cls.body:
            if isinstance(method, ast.FunctionDef) and method.name == "forward" and method.args.args[0].arg == "self":
                for node in ast.walk(method):
                    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
                        found.append((cls.name, ast.unparse(node.test)))
                    elif isinstance(node, ast.comprehension):
                        found += [(cls.name, ast.unparse(test)) for test in node.ifs]
                    elif isinstance(node, (ast.Match, ast.Try, ast.Assert)):
                        found.append((cls.name, ast.unparse(node)))
    return found


def test_no_forward_branches_but_on_targets_cache_and_training():
    found = branches((ROOT / "model.py").read_text())
    assert ("GPT", "targets_BT is None") in found and ("Router", NOISY) in found  # the instrument works
    assert [branch for branch in found if branch[1] not in MAY_ASK] == []
    assert branches("class A:\n def forward(self, x):\n  return x if self.config.a else [y for y in x if y]") == [("A", "self.config.a"), ("A", "y")]


# -----------------------------------------------------------------------------
# 17. The command line


def cli(*words):
    return subprocess.run([sys.executable, ROOT / "model.py", *words], capture_output=True, text=True, timeout=120)


def main(monkeypatch, capsys, *words):
    """model.py in this process: its exit status, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["model.py", *words])
    status = 0
    try:
        M.main()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
        print(exit.code if isinstance(exit.code, str) else "", file=sys.stderr)
    printed = capsys.readouterr()
    return status, printed.out, printed.err.strip()


def test_the_script_prints_a_card():
    done = cli("--preset", "cpu")
    assert done.returncode == 0 and done.stderr == ""
    assert "11,227,154 total" in done.stdout and "router linear" in done.stdout and "7,250,976 training" in done.stdout


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_a_card(preset, monkeypatch, capsys):
    status, out, err = main(monkeypatch, capsys, "--preset", preset)
    counts = M.count_parameters(PRESETS[preset])
    assert status == 0 and err == "" and f"{counts['total']:,} total, {counts['active']:,} active" in out
    assert all(word in out for word in ("layers", "experts", "FLOPs per token", "activations"))


@pytest.mark.parametrize("dtype", sorted(M.DTYPES))
def test_every_dtype_has_a_card(dtype, monkeypatch, capsys):
    try:
        status, out, err = main(monkeypatch, capsys, "--preset", "cpu", "--dtype", dtype)
    except RuntimeError as error:
        pytest.fail(f"--dtype {dtype}: a traceback instead of a card: {error}")
    assert status == 0 and "activations" in out


def test_flags_override_the_preset_in_both_spellings(monkeypatch, capsys):
    for words in (("--n_layer", "2", "--value_embeds", "1"), ("--n-layer=2", "--value-embeds=1")):
        status, out, _ = main(monkeypatch, capsys, "--preset", "cpu", *words, "--seq-len", "64")
        assert status == 0 and "2 (MKE MKE)" in out and "64 tokens per row" in out


@pytest.mark.parametrize("words, said, expect", (
    (("--preset", "huge"), ("--preset", "cpu", "small", "speedrun"), 2),
    (("--nonsense", "3"), ("--nonsense",), 2),
    (("--n_lay", "3"), ("--n_lay",), 2),
    (("--n_layer", "three"), ("n_layer", "int", "three"), 2),
    (("--router", "lineer"), ("router", "linear", "hash"), None),
    (("--top_k", "9"), ("top_k", "at most num_experts = 8"), None),
    (("--mlp_ratio", "inf"), ("mlp_ratio",), None),
    (("--seq_len", "-5"), ("seq_len",), None),
    (("--checkpoint", "/no/such/folder"), ("/no/such/folder", "no checkpoint"), None),
), ids=lambda value: "=".join(map(str, value)) if isinstance(value, tuple) and str(value[0]).startswith("--") else "")  # fmt: skip
def test_a_bad_flag_stops_with_one_sentence(words, said, expect, monkeypatch, capsys):
    try:
        status, out, err = main(monkeypatch, capsys, "--preset", "cpu", *words)
    except Exception as error:
        pytest.fail(f"{' '.join(words)}: a traceback instead of a sentence: {error!r}")
    assert status == (expect or status) and status != 0 and out == ""
    assert len(err.splitlines()) == 1 and all(word in err for word in said)


@dataclass
class Flags:
    compile: bool | None = None
    rate: float = 1.0


def test_optional_and_boolean_flags_parse_and_refuse(capsys):
    parser = M.Parser(prog="x.py")
    M.add_flags(parser, Flags)
    for text_, value in (("true", True), ("False", False), ("0", False), ("none", None)):
        assert parser.parse_args(["--compile", text_]).compile is value
    assert "compile" not in vars(parser.parse_args([]))  # absent, so that presets can tell
    try:
        parser.parse_args(["--compile", "maybe"])
    except SystemExit as exit:
        assert exit.code == 2 and "true or false" in capsys.readouterr().err
    except KeyError:
        pytest.fail("--compile maybe: a KeyError's traceback instead of a sentence that names the legal values")


# -----------------------------------------------------------------------------
# 18. Compilation


def test_a_bf16_block_compiles_whole_and_never_again_when_routes_change():
    """aot_eager traces forward and backward as the real backend does, without minutes in the C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine, so --compile is not offered")
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    eager, compiled = (tiny(dtype="bf16", window_size=64).train() for _ in range(2))
    compiled.blocks[2].compile(backend=backend, fullgraph=True, dynamic=False)
    routes = set()
    for step in range(4):
        x, y = text(2, 128, step, eots=[(0, 10 * step)]), text(2, 128, 50 + step)
        outs = []
        for model in (eager, compiled):
            with torch.no_grad():
                model.bias_LE[1:, step] += 1
            model.set_step(SEED, step)
            out = model(x, y)
            outs.append((out, gradients(model, out.loss)))
        assert abs(outs[0][0].loss - outs[1][0].loss) < 1e-2
        for name, grad in outs[0][1].items():
            assert norm_error(outs[1][1][name], grad) < 0.1, name
        routes.add(tuple(outs[0][0].stats["counts_LE"][2].tolist()))
        assert backend.frame_count == 1, f"recompiled at step {step}"
    assert len(routes) == 4
    torch._dynamo.reset()


def test_gradients_in_bf16_do_not_depend_on_the_number_of_threads():
    """At preset cpu's shapes, so that processes that share a machine train the very run of one process."""
    generator, threads, grads = torch.Generator().manual_seed(1), torch.get_num_threads(), []
    model = GPT(PRESETS["cpu"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    x, y = torch.randint(257, (2, 4, 512), generator=generator)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            grads.append(torch.autograd.grad(model(x, y).loss, list(model.parameters())))
    finally:
        torch.set_num_threads(threads)
    for (name, _), one, two in zip(model.named_parameters(), *grads):
        assert torch.equal(one, two), name
