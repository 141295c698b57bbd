"""rows.py: the optimizer of n-gram tables against its definition, and sparse gradients against dense ones.

Several ranks are in test_distributed.py. CPU, no network: `pytest tests/core/test_rows.py`."""

import pytest
import torch
import torch.nn.functional as F
from core_helpers import EOT, core, rng, text

import train_muon
from distributed import World, cut_slabs, make_buckets
from rows import RowAdamW
from train_muon import Exchange, RowTransfer

ROWS, D, LR, BETA1, BETA2, EPS = 7, 3, 0.1, 0.8, 0.95, 1e-10


def sparse(row_U: list[int], grad_UD: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([row_U]), grad_UD, (ROWS, D), check_invariants=True)


def test_with_a_gradient_in_every_row_it_is_adamw():
    table = torch.nn.Parameter(torch.randn(ROWS, D, generator=rng()))
    other = torch.nn.Parameter(table.detach().clone())
    ours = RowAdamW([table], LR, (BETA1, BETA2), EPS)
    adamw = torch.optim.AdamW([other], LR, (BETA1, BETA2), EPS, weight_decay=0.0)
    for step in range(6):
        other.grad = torch.randn(ROWS, D, generator=rng(step))
        table.grad = sparse(list(range(ROWS)), other.grad)
        ours.step(), adamw.step()
        assert torch.allclose(table, other, atol=1e-6)


def test_a_row_s_means_decay_by_the_steps_since_its_last_gradient():
    """A loop over single rows: means decay in every step, values move in steps with a gradient alone, by a longer way."""
    table = torch.nn.Parameter(torch.randn(ROWS, D, generator=rng()))
    optimizer, want = RowAdamW([table], LR, (BETA1, BETA2), EPS), table.detach().clone()
    (mean, square), last = torch.zeros(2, ROWS, D), [0] * ROWS
    for step in range(1, 20):
        touched = torch.randperm(ROWS, generator=rng(step))[: step % 4].tolist()
        grad = torch.randn(len(touched), D, generator=rng(100 + step))
        table.grad = sparse(touched, grad)
        optimizer.step()
        mean, square = mean * BETA1, square * BETA2
        for row, g in zip(touched, grad):
            mean[row] += (1 - BETA1) * g
            square[row] += (1 - BETA2) * g**2
            unbiased, root = mean[row] / (1 - BETA1**step), (square[row] / (1 - BETA2**step)).sqrt()
            way = sum((BETA1 / BETA2**0.5) ** k for k in range(step - last[row]))
            want[row] -= LR * way * unbiased / (root + EPS)
            last[row] = step
        assert torch.allclose(table, want, atol=1e-6), step
    state = optimizer.state[table]
    seen = (state["last_step"] > 0).nonzero()[:, 0]
    since = (19 - state["last_step"][seen])[:, None]
    assert torch.allclose(state["exp_avg"][seen] * BETA1**since, mean[seen], atol=1e-6)
    assert torch.allclose(state["exp_avg_sq"][seen] * BETA2**since, square[seen], atol=1e-6)


def test_gradients_at_equal_distances_move_a_row_as_far_as_adamw_does():
    """From step 500 on, where AdamW's corrections of its means have come to 1."""
    table, other = (torch.nn.Parameter(torch.zeros(ROWS, D)) for _ in range(2))
    ours = RowAdamW([table], LR, (BETA1, BETA2), EPS)
    adamw = torch.optim.AdamW([other], LR, (BETA1, BETA2), EPS, weight_decay=0.0)
    for step in range(600):
        if step == 500:
            start, other_start = table.detach().clone(), other.detach().clone()
        other.grad = torch.zeros(ROWS, D)
        if step % 5 == 0:
            other.grad[2] = torch.randn(D, generator=rng(step))
        table.grad = sparse([2], other.grad[2:3]) if step % 5 == 0 else sparse([], torch.zeros(0, D))
        ours.step(), adamw.step()
    moved = other - other_start
    assert torch.allclose(table - start, moved, atol=1e-4) and moved[2].abs().min() > 0.1


@pytest.mark.parametrize("betas", ((0.0, 0.95), (0.9, 0.81), (0.95, 0.5), (0.9, 0.0)))
def test_no_betas_move_a_row_without_end(betas):
    table = torch.nn.Parameter(torch.zeros(ROWS, D))
    optimizer = RowAdamW([table], LR, betas)
    for row in [0] * 3 + [1] * 3000 + [0]:
        table.grad = sparse([row], torch.ones(1, D))
        optimizer.step()
    assert table.isfinite().all() and table.abs().max() < 1000 * LR * 3010


def test_rows_without_a_gradient_keep_their_bits():
    table = torch.nn.Parameter(torch.randn(ROWS, D, generator=rng()))
    before, optimizer = table.detach().clone(), RowAdamW([table], LR)
    for row in (2, 5):
        table.grad = sparse([row, row], torch.ones(2, D))  # a row twice: its gradients add up
        optimizer.step()
    changed = (table != before).any(-1).nonzero()[:, 0].tolist()
    assert changed == [2, 5] and torch.equal(optimizer.state[table]["last_step"][[2, 5]], torch.tensor([1, 2]).int())


def test_sparse_gradients_of_n_gram_tables_equal_dense_ones():
    x, grads = text(2, 24, eots=[(0, 5)]), {}
    for is_sparse in (False, True):
        net = core(ngrams="23", ngram_rows=40)
        net.sparse_tables = is_sparse
        net.set_step(5, 7)
        for part in x.chunk(2):  # accumulated over two micro-batches
            net(part, part.roll(-1, 1)).loss.backward()
        grads[is_sparse] = [table.grad for table in net.ngram_embeds]
    assert all(grad.is_sparse for grad in grads[True]) and not any(grad.is_sparse for grad in grads[False])
    for rows, dense in zip(grads[True], grads[False]):
        assert torch.allclose(rows.to_dense(), dense, atol=1e-7)
        assert len(rows.coalesce().indices()[0]) <= x.numel() < 2 * 40  # of the 40 rows, those of the text


@pytest.mark.parametrize("world_size", (1, 3))
def test_each_table_is_a_bucket_of_its_own_at_the_end(world_size):
    config = core(ngrams="23", ngram_rows=40).config
    slabs = {slab.name for slab in cut_slabs(config)}
    *others, three, two = make_buckets(config, world_size)
    assert [bucket.slabs[0].name for bucket in (three, two)] == ["ngram_embeds.1", "ngram_embeds.0"]
    assert three.is_rows and two.is_rows and not any(bucket.is_rows for bucket in others)
    assert sorted(slabs) == sorted(slab.name for bucket in (*others, three, two) for slab in bucket.slabs)
    assert three.owners == (0,) and two.owners == (1 % world_size,)


def test_the_training_loop_sends_rows_and_gives_them_to_their_optimizer():
    net = core(ngrams="2", ngram_rows=512)
    exchange, hp = Exchange(net, World(0, 1, torch.device("cpu"))), train_muon.PRESETS["cpu"]
    exchange.attach_optimizers(train_muon.MUON, hp)
    [table] = [transfer for transfer in exchange.transfers if isinstance(transfer, RowTransfer)]
    assert [type(optimizer) for optimizer in table.optimizers] == [RowAdamW]
    x = torch.full((1, 8), 3)
    x[0, 0] = EOT
    net(x, x).loss.backward()
    train_muon.set_rates(exchange.optimizers, 0, hp, 1.0)
    before = net.ngram_embeds[0].detach().clone()
    exchange.flush_reduce()
    for transfer in exchange.transfers:
        transfer.receive_gradients()
        for optimizer in transfer.optimizers:
            optimizer.step()
        transfer.send_values()
    exchange.finish()
    moved = (net.ngram_embeds[0] != before).any(-1).sum()
    assert moved == 3  # after no id, after end of text, after another 3
    assert net.ngram_embeds[0].grad is None and F.mse_loss(net.ngram_embeds[0], before) > 0


def test_a_dense_gradient_of_a_table_made_elsewhere_becomes_its_rows():
    """A user's own parameter may have this kind, as the README's router has."""
    net = core(ngrams="2", ngram_rows=16)
    table = Exchange(net, World(0, 1, torch.device("cpu"))).transfers[-1]
    net.ngram_embeds[0].grad = torch.zeros(16, 32).index_fill_(0, torch.tensor([3, 9]), 0.5)
    table.send_gradients()
    table.receive_gradients()
    grad = table.owned[0].value.grad
    assert grad.indices()[0].tolist() == [3, 9] and grad.values().eq(0.5).all()


def test_a_table_that_no_token_reached_stands_still():
    net = core(ngrams="2", ngram_rows=512)
    exchange = Exchange(net, World(0, 1, torch.device("cpu")))
    exchange.attach_optimizers(train_muon.MUON, train_muon.PRESETS["cpu"])
    table, before = exchange.transfers[-1], net.ngram_embeds[0].detach().clone()
    table.send_gradients()
    table.receive_gradients()
    grad = table.owned[0].value.grad
    assert grad.shape == before.shape and grad.indices().shape == (1, 0)
    table.optimizers[0].step()
    table.send_values()
    table.receive_values()
    assert torch.equal(net.ngram_embeds[0], before)
