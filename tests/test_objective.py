"""objective = masked: what is hidden, that nobody is told, and that the model looks both ways. test_model.py compares its
logits with their definition.

CPU, no network: `pytest tests/test_objective.py`."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import track  # noqa: E402
from test_model import EOT, TINY, VOCAB, far, logits, rng, text, tiny  # noqa: E402

import model as M  # noqa: E402
from model import GPT, Config, ConfigError  # noqa: E402


def posed(net, x, step: int = 0, first_token: int = 0):
    net.set_step(3, step, first_token)
    return M.hide(net, x, torch.zeros_like(x))


def test_what_is_hidden():
    net = tiny(objective="masked", mask_share=0.25).train()
    x = text(64, 200, eots=[(row, 17) for row in range(64)])
    inputs, targets = posed(net, x)
    asked = targets >= 0
    assert (asked.sum(1) == 50).all() and not asked[x == EOT].any(), "of every row as many, and no end of text"
    assert torch.equal(targets[asked], x[asked]) and torch.equal(inputs[~asked], x[~asked])
    fates = [(inputs == VOCAB)[asked].float().mean(), (inputs == x)[asked].float().mean()]
    assert fates == [pytest.approx(0.8, abs=0.03), pytest.approx(0.1 + 0.1 / VOCAB, abs=0.02)]
    assert asked.float().mean(0).std() < 0.08, "all places alike"


def test_it_is_drawn_from_seed_step_and_token_number_alone():
    net, x = tiny(objective="masked").train(), text(4, 40)
    inputs, targets = posed(net, x)
    for row in range(4):
        alone = posed(net, x[row : row + 1], first_token=40 * row)
        assert torch.equal(alone[0], inputs[row : row + 1]) and torch.equal(alone[1], targets[row : row + 1])
    assert not torch.equal(posed(net, x, step=1)[1], targets)
    net.eval()
    assert torch.equal(posed(net, x, step=1)[1], posed(net, x)[1]), "every evaluation asks the same"


@pytest.mark.parametrize("changes", [dict(router=router) for router in M.ROUTERS] + [dict(ngrams="23", ngram_rows=64), dict(depth="loop", halt="act"),
                         dict(depth="routed", identity_layers=1)], ids=str)  # fmt: skip
def test_nobody_is_told_what_is_hidden(changes):
    """Other words in the hidden places: the same routes, loops and logits, and another loss."""
    net, x = tiny(objective="masked", mask_share=0.3, **changes).eval(), text(2, 30, eots=[(0, 11)])
    inputs, targets = posed(net, x)
    gone = (inputs == VOCAB) & (targets >= 0)
    other = torch.where(gone, (x + 1) % EOT, x)
    told = []
    for module in net.modules():
        if isinstance(module, (M.Router, M.HashRouter, M.Loop)):
            module.register_forward_hook(lambda module, args, out: told[-1].append(out))
    losses = []
    for ids in (x, other):
        told.append([])
        net.set_step(3, 0)
        losses.append(net(ids, torch.zeros_like(ids)).loss)
    flat = [[part for out in outs for part in torch.utils._pytree.tree_leaves(out) if isinstance(part, torch.Tensor)] for outs in told]
    assert gone.sum() > 5 and losses[0] != losses[1] and len(flat[0]) == len(flat[1]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*flat))


def test_the_loss_is_the_mean_over_what_is_asked():
    net, x = tiny(objective="masked", mask_share=0.2).eval(), text(3, 30)
    inputs, targets = posed(net, x)
    want = F.cross_entropy(logits(net, inputs)[..., :VOCAB].flatten(0, 1), targets.flatten(), ignore_index=-1)
    net.set_step(3, 0)
    assert far(net(x, torch.zeros_like(x)).loss, want) < 1e-5
    rows = []
    for row in range(3):
        net.set_step(3, 0, 30 * row)
        rows.append(net(x[row : row + 1], torch.zeros_like(x[:1])).loss)
    assert far(sum(rows) / 3, want) < 1e-5, "losses of micro-batches add up"


@pytest.mark.parametrize("depth", M.DEPTHS)
def test_it_looks_both_ways_inside_its_document_and_window(depth):
    net, x = tiny(objective="masked", depth=depth, window="S", window_size=8, n_layer=2, value_embeds=1).eval(), text(2, 40, eots=[(0, 20)])
    base = logits(net, x)
    for t, rows in ((30, slice(0, 1)), (10, slice(1, 2))):
        y = x.clone()
        y[rows, t] = (y[rows, t] + 1) % EOT
        moved = ((logits(net, y) - base).abs().amax(-1) > 1e-7)[rows][0].nonzero().flatten()
        reach = 2 * 3 * (1 + (depth != "stack"))  # layers, keys to each side, loops
        assert moved.min() < t < moved.max() and moved.min() >= max(t - reach, 20 * (rows.start == 0)) and moved.max() <= t + reach


def pairs(generator) -> torch.Tensor:
    """(16, 32): a number, then the same number plus 16, then another."""
    number = torch.randint(0, 16, (16, 16), generator=generator)
    return torch.stack([number, number + 16], -1).flatten(1)


def test_it_learns_what_only_a_later_token_tells():
    """The first of a pair, when hidden, can be read off the second."""
    net, generator = GPT(Config(**TINY | dict(objective="masked", n_layer=2, value_embeds=0, pattern="D"))).train(), rng(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(200):
        x = pairs(generator)
        net.set_step(0, step)
        loss = net(x, x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = pairs(generator)
    shown = x.clone()
    shown[:, ::8] = VOCAB
    assert (logits(net.eval(), shown).argmax(-1) == x)[:, ::8].float().mean() > 0.9


@pytest.mark.parametrize("changes, words", [
    (dict(objective="previous"), "next, masked"), (dict(mask_share=1.0), "between 0 and 1"),
    (dict(objective="masked", vocab_size=64), "no id is left"),
    (dict(objective="masked", attn_softmax="ssmax"), "attn_softmax is 'ssmax'")])  # fmt: skip
def test_what_cannot_be_is_one_sentence(changes, words):
    with pytest.raises(ConfigError, match=words):
        tiny(**changes)


def test_it_continues_no_text_and_sets_no_record():
    with pytest.raises(ConfigError, match="it must be next"):
        tiny(objective="masked").generate(text(1, 3), 2)
    with pytest.raises(track.RunError, match="--objective is set by the track"):
        track.Row({"preset": "cpu", "data": "data/python"}, ["train_muon.py", "--objective", "masked"])
