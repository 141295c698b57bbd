"""Objective masked: which tokens are hidden, that their ids reach no layer, and that attention looks both ways.

test_reference.py compares its logits with their definition. CPU, no network: `pytest tests/zoo/test_masked.py`.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import EOT, TINY, VOCAB, far, logits, rng, text, tiny

import model
import zoo
from cli import UserError
from zoo.routers import ROUTERS


def masked(net, x, step: int = 0, first_token: int = 0):
    """Inputs after hiding, and targets."""
    net.set_step(3, step, first_token)
    return net.objective.make_inputs(net, x, torch.zeros_like(x))


def test_a_share_of_each_row_is_hidden():
    net = tiny(objective="masked", mask_share=0.25).train()
    x = text(64, 200, eots=[(row, 17) for row in range(64)])
    inputs, targets = masked(net, x)
    hidden = targets >= 0
    assert (hidden.sum(1) == 50).all() and not hidden[x == EOT].any(), "as many in every row, no end-of-text token"
    assert torch.equal(targets[hidden], x[hidden]) and torch.equal(inputs[~hidden], x[~hidden])
    fates = [(inputs == VOCAB)[hidden].float().mean(), (inputs == x)[hidden].float().mean()]
    assert fates == [pytest.approx(0.8, abs=0.03), pytest.approx(0.1 + 0.1 / VOCAB, abs=0.02)]
    assert hidden.float().mean(0).std() < 0.08, "all positions alike"


def test_hidden_tokens_depend_on_seed_step_and_token_number_alone():
    net, x = tiny(objective="masked").train(), text(4, 40)
    inputs, targets = masked(net, x)
    for row in range(4):
        alone = masked(net, x[row : row + 1], first_token=40 * row)
        assert torch.equal(alone[0], inputs[row : row + 1]) and torch.equal(alone[1], targets[row : row + 1])
    assert not torch.equal(masked(net, x, step=1)[1], targets)
    net.eval()
    assert torch.equal(masked(net, x, step=1)[1], masked(net, x)[1]), "every evaluation hides the same tokens"


@pytest.mark.parametrize("changes", [dict(router=router) for router in ROUTERS] + [
    dict(ngrams="23", ngram_rows=64), dict(depth="loop", halt="act"), dict(depth="routed", identity_layers=1)],
    ids=str)  # fmt: skip
def test_hidden_ids_reach_no_layer(changes):
    """With other ids in the hidden positions: the same routes, iterations and hidden states, and another loss."""
    net, x = tiny(objective="masked", mask_share=0.3, **changes).eval(), text(2, 30, eots=[(0, 11)])
    inputs, targets = masked(net, x)
    hidden = (inputs == VOCAB) & (targets >= 0)
    other = torch.where(hidden, (x + 1) % EOT, x)
    outputs, run_blocks = [], net.run_blocks
    for block in net.blocks:
        block.ffn.router.register_forward_hook(lambda module, args, route: outputs[-1].append(route))
    net.run_blocks = lambda *inputs: outputs[-1].append(run_blocks(*inputs)) or outputs[-1][-1]
    losses = []
    for ids in (x, other):
        outputs.append([])
        net.set_step(3, 0)
        losses.append(net(ids, torch.zeros_like(ids)).loss)
    leaves = [torch.utils._pytree.tree_leaves(found) for found in outputs]
    flat = [[part for part in found if isinstance(part, torch.Tensor)] for found in leaves]
    assert hidden.sum() > 5 and losses[0] != losses[1] and len(flat[0]) == len(flat[1]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*flat))


def test_the_loss_is_the_mean_over_hidden_tokens():
    net, x = tiny(objective="masked", mask_share=0.2).eval(), text(3, 30)
    inputs, targets = masked(net, x)
    want = F.cross_entropy(logits(net, inputs)[..., :VOCAB].flatten(0, 1), targets.flatten(), ignore_index=-1)
    net.set_step(3, 0)
    assert far(net(x, torch.zeros_like(x)).loss, want) < 1e-5
    rows = []
    for row in range(3):
        net.set_step(3, 0, 30 * row)
        rows.append(net(x[row : row + 1], torch.zeros_like(x[:1])).loss)
    assert far(sum(rows) / 3, want) < 1e-5, "losses of micro-batches add up"


@pytest.mark.parametrize("depth", model.DEPTHS)
def test_attention_looks_both_ways_inside_document_and_window(depth):
    net = tiny(objective="masked", depth=depth, window="S", window_size=8, n_layer=2, value_embeds=1).eval()
    x = text(2, 40, eots=[(0, 20)])
    base = logits(net, x)
    for t, rows in ((30, slice(0, 1)), (10, slice(1, 2))):
        y = x.clone()
        y[rows, t] = (y[rows, t] + 1) % EOT
        moved = ((logits(net, y) - base).abs().amax(-1) > 1e-7)[rows][0].nonzero().flatten()
        reach = 2 * 3 * (1 + (depth != "stack"))  # layers, keys to each side, loops
        first = max(t - reach, 20 * (rows.start == 0))
        assert first <= moved.min() < t < moved.max() <= t + reach


def pairs(generator) -> torch.Tensor:
    """(16, 32): pairs of a number and that number plus 16."""
    number = torch.randint(0, 16, (16, 16), generator=generator)
    return torch.stack([number, number + 16], -1).flatten(1)


def test_a_hidden_token_is_learned_from_a_later_one():
    """The first of a pair follows from the second."""
    config = zoo.Config(**TINY | dict(objective="masked", n_layer=2, value_embeds=0, pattern="D"))
    net, generator = zoo.build(config).train(), rng(0)
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


@pytest.mark.parametrize("changes, message", [
    (dict(objective="previous"), "next, masked"), (dict(mask_share=1.0), "between 0 and 1"),
    (dict(objective="masked", vocab_size=64), "no id is left"),
    (dict(objective="masked", attn_softmax="ssmax"), "attn_softmax is 'ssmax'")])  # fmt: skip
def test_options_that_conflict_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_a_masked_model_continues_no_text():
    with pytest.raises(UserError, match="it must be next"):
        tiny(objective="masked").generate(text(1, 3), 2)


def test_a_masked_model_sets_no_record():
    from benchmarks import track

    with pytest.raises(UserError, match="--objective is set by the track"):
        track.Row({"preset": "cpu", "data": "data/python"}, ["train_muon.py", "--objective", "masked"])
