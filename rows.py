"""Tables of which a step touches few rows: their optimizer, and how touched rows reach all ranks.

Shape suffixes: U different rows, R rows of all ranks, D columns, W ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from distributed import all_gather


class RowAdamW(torch.optim.Optimizer):
    """AdamW for tables of which a step touches few rows, the only ones that it reads and writes.

    params: tables (rows, D) with sparse gradients. A row's two means decay at its next gradient by all the steps
    since the last, so they are those of AdamW. AdamW also moves a row in the steps between, each time by
    beta1 / sqrt(beta2) of the time before. Here the row goes that way at once, in the step of its gradient, as if the
    next gradient came after as many steps as this one. With a gradient in every step it is AdamW."""

    def __init__(self, params, lr: float = 0.0, betas: tuple[float, float] = (0.8, 0.95), eps: float = 1e-10):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for table in (p for p in group["params"] if p.grad is not None):
                self.update(table, group["lr"], *group["betas"], group["eps"])

    def update(self, table: Tensor, lr: float, beta1: float, beta2: float, eps: float):
        if table not in self.state:
            zeros = dict(exp_avg=torch.zeros_like(table), exp_avg_sq=torch.zeros_like(table))
            never = torch.zeros(len(table), dtype=torch.int32, device=table.device)
            self.state[table] |= zeros | dict(last_step=never, step=torch.zeros((), dtype=torch.int32))
        state, grad = self.state[table], table.grad.coalesce()
        state["step"] += 1
        step, (row_U,), grad_UD = int(state["step"]), grad.indices(), grad.values()
        steps_U1 = (step - state["last_step"][row_U])[:, None]
        mean_UD, square_UD = (state[name].index_select(0, row_U) for name in ("exp_avg", "exp_avg_sq"))
        mean_UD.mul_(beta1**steps_U1).add_(grad_UD, alpha=1 - beta1)
        square_UD.mul_(beta2**steps_U1).addcmul_(grad_UD, grad_UD, value=1 - beta2)
        for name, rows_UD in (("exp_avg", mean_UD), ("exp_avg_sq", square_UD)):
            state[name].index_copy_(0, row_U, rows_UD)
        state["last_step"][row_U] = step
        direction_UD = mean_UD.div_(square_UD.div_(1 - beta2**step).sqrt_().add_(eps))
        ratio = min(beta1 / max(beta2, 1e-9) ** 0.5, 0.999)  # above 1 AdamW's way has no end
        way_U1 = (1 - ratio**steps_U1) / (1 - ratio)  # 1 + ratio + ratio^2 + ..., a term for each step
        table.index_add_(0, row_U, direction_UD.mul_(way_U1), alpha=-lr / (1 - beta1**step))


def gather_rows(row_U: Tensor, grad_UD: Tensor, group) -> tuple[Tensor, Tensor]:
    """Numbers (R,) and gradients (R, D) of the touched rows of all ranks, in the order of the ranks.

    Ranks touch different numbers of rows, so the host waits for these numbers first."""
    W = dist.get_world_size(group)
    count_W = torch.zeros(W, dtype=torch.int64, device=row_U.device)
    all_gather(count_W, torch.tensor([len(row_U)], device=row_U.device), group=group)
    counts, found = count_W.tolist(), []
    most = max(counts)
    for part in (row_U, grad_UD):
        padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
        parts = part.new_empty(W * most, *part.shape[1:])
        all_gather(parts, padded, group=group)
        found.append(torch.cat([rows[:count] for rows, count in zip(parts.split(most), counts)]))
    return found[0], found[1]
