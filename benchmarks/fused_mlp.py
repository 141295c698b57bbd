"""A candidate for kernels.py that no GPU has timed yet: the experts' ReLU^2 inside the grouped matmuls before and
behind it.

Compiled by Inductor, ReLU^2 and its gradient are passes of their own over (R, F): with H200's 4.25 TB/s some 0.4 ms for
every layer and micro-batch of preset speedrun, 40 ms of a step, of the dense twin's as well. Here the activation leaves
the up-projection's accumulators as the bf16 that the down-projection reads, and its gradient the accumulators of the
down-projection's backward. Nothing else is kept for backward: a = relu(h)^2 gives relu(h) back as sqrt(a).
modded-nanogpt's record 59 does this for its dense MLP and reports a tenth of the MLP's time.

    bash benchmarks/gpu.sh bench --rows moe_fused dense_fused    # whole steps beside those without; parts: --only parts

If it wins, the kernel moves to kernels.py and FusedMLP to model.py; if not, this file goes. tests/core/test_kernels.py
checks it in Triton's interpreter and compiles it to machine code. Letters as in model.py; K and N are a matmul's inner
and outer width."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model  # noqa: E402
from kernels import triton  # noqa: E402
from model import DenseMLP, MLPExperts  # noqa: E402
from ops import TRITON_IS_INSTALLED, grouped_mm_op, grouped_outer  # noqa: E402

if TRITON_IS_INSTALLED:
    import triton.language as tl


class Tile(NamedTuple):
    rows: int = 128
    cols: int = 256
    depth: int = 64
    stages: int = 3
    warps: int = 8


WIDE = Tile()
TILES = {
    "128 x 256": WIDE,
    "128 x 256, 4 stages": Tile(stages=4),
    "256 x 128": Tile(256, 128),
    "128 x 128": Tile(128, 128, warps=4),
}


@triton.jit
def grouped_kernel(
    rows_desc,
    weight_desc,
    a_ptr,
    out_ptr,
    offs_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BACKWARD: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Every program takes one tile after another: an expert's rows times some columns of its matrix. relu(.)^2 of the
    products, or backward the products times the derivative 2 sqrt(a). Tiles of rows begin anew with each expert, whose
    last one may be short."""
    expert_E = tl.arange(0, EXPERTS)  # a power of two, the first E of which exist
    end_E = tl.load(offs_ptr + expert_E, mask=expert_E < E, other=0)
    begin_E = tl.load(offs_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    tiles_E = tl.where(expert_E < E, (end_E - begin_E + ROWS - 1) // ROWS, 0)
    last_tile_E = tl.cumsum(tiles_E)
    across = (N + COLS - 1) // COLS
    for turn in tl.range(
        0, TURNS, flatten=True
    ):  # how many tiles there are no host knows: behind the last one no expert has rows
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        down, col0 = tile // across, (tile % across) * COLS
        expert = tl.sum((last_tile_E <= down).to(tl.int32))
        own = expert_E == expert
        end = tl.sum(tl.where(own, end_E, 0))
        row0 = tl.sum(tl.where(own, begin_E + (down - last_tile_E + tiles_E) * ROWS, 0))
        total = tl.zeros([ROWS, COLS], tl.float32)
        for k in range(0, K, DEPTH):
            x = rows_desc.load([row0, k])
            if BACKWARD:
                w = weight_desc.load([expert * K + k, col0])
            else:
                w = tl.trans(weight_desc.load([expert * N + col0, k]))
            total = tl.dot(x, w, total, input_precision="ieee")
        row, col = row0 + tl.arange(0, ROWS)[:, None], col0 + tl.arange(0, COLS)[None, :]
        here, inside = row.to(tl.int64) * N + col, (row < end) & (col < N)
        if BACKWARD:
            total *= 2 * tl.sqrt(tl.load(a_ptr + here, mask=inside, other=0.0).to(tl.float32))
        else:
            total = tl.maximum(total, 0.0)
            total *= total
        tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=inside)


def grouped(rows_RK: Tensor, weight_EXY: Tensor, offs_E: Tensor, a_RN: Tensor | None, N: int, tile: Tile) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (R, K), E, backward = rows_RK.shape, len(weight_EXY), a_RN is not None
    out_RN = rows_RK.new_empty(R, N)
    block = [tile.depth, tile.cols] if backward else [tile.cols, tile.depth]
    descriptors = (
        TensorDescriptor.from_tensor(rows_RK.contiguous(), [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight_EXY.contiguous().flatten(0, 1), block),
    )
    programs = torch.cuda.get_device_properties(rows_RK.device).multi_processor_count if rows_RK.is_cuda else 5
    most = (triton.cdiv(R, tile.rows) + E - 1) * triton.cdiv(N, tile.cols)
    grouped_kernel[(programs,)](
        *descriptors,
        a_RN if backward else out_RN,
        out_RN,
        offs_E,
        E=E,
        K=K,
        N=N,
        BACKWARD=backward,
        TURNS=triton.cdiv(most, programs),
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        EXPERTS=triton.next_power_of_2(E),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_RN


def up_kernel(rows_RD: Tensor, up_EFD: Tensor, offs_E: Tensor, tile: Tile = WIDE) -> Tensor:
    """As plain_up."""
    return grouped(rows_RD, up_EFD, offs_E, None, up_EFD.size(1), tile)


def down_backward_kernel(dy_RD: Tensor, down_EDF: Tensor, a_RF: Tensor, offs_E: Tensor, tile: Tile = WIDE) -> Tensor:
    """As plain_down_backward."""
    return grouped(dy_RD, down_EDF, offs_E, a_RF, down_EDF.size(2), tile)


def plain_up(rows_RD: Tensor, up_EFD: Tensor, offs_E: Tensor) -> Tensor:
    """a = relu(h)^2 (R, F) of h = rows times each expert's matrix (E, F, D); rows behind the last end are left as they
    are."""
    return grouped_mm_op(rows_RD, up_EFD, offs_E).relu().square()


def plain_down_backward(dy_RD: Tensor, down_EDF: Tensor, a_RF: Tensor, offs_E: Tensor) -> Tensor:
    """The gradient (R, F) of h where y = a times each expert's matrix (E, D, F)."""
    return grouped_mm_op(dy_RD, down_EDF.mT, offs_E) * (2 * a_RF.sqrt())


@torch.library.custom_op("nanomoe::fused_up", mutates_args=())
def fused_up(rows_RD: Tensor, up_EFD: Tensor, offs_E: Tensor) -> Tensor:
    return (up_kernel if rows_RD.is_cuda else plain_up)(rows_RD, up_EFD, offs_E)


@torch.library.custom_op("nanomoe::fused_down_backward", mutates_args=())
def fused_down_backward(dy_RD: Tensor, down_EDF: Tensor, a_RF: Tensor, offs_E: Tensor) -> Tensor:
    return (down_backward_kernel if dy_RD.is_cuda else plain_down_backward)(dy_RD, down_EDF, a_RF, offs_E)


fused_up.register_fake(lambda rows, up, offs: rows.new_empty(len(rows), up.size(1)))
fused_down_backward.register_fake(lambda dy, down, a, offs: torch.empty_like(a))


class FusedMLP(torch.autograd.Function):
    """(rows_RD, up_EFD, down_EDF, offs_E) -> y_RD."""

    @staticmethod
    def forward(ctx, rows_RD, up_EFD, down_EDF, offs_E):
        a_RF = fused_up(rows_RD, up_EFD, offs_E)
        ctx.save_for_backward(rows_RD, up_EFD, down_EDF, offs_E, a_RF)
        return grouped_mm_op(a_RF, down_EDF, offs_E)

    @staticmethod
    def backward(ctx, dy_RD):
        rows_RD, up_EFD, down_EDF, offs_E, a_RF = ctx.saved_tensors
        dy_RD = dy_RD.contiguous()
        dh_RF = fused_down_backward(dy_RD, down_EDF, a_RF, offs_E)
        return (
            grouped_mm_op(dh_RF, up_EFD.mT, offs_E),
            grouped_outer(dh_RF, rows_RD, offs_E),
            grouped_outer(dy_RD, a_RF, offs_E),
            None,
        )


class FusedMLPExperts(MLPExperts):
    def forward(self, rows_RD: Tensor, offs_E: Tensor) -> Tensor:
        return FusedMLP.apply(rows_RD, self.up.type_as(rows_RD), self.down.type_as(rows_RD), offs_E)


class FusedDenseMLP(DenseMLP):
    """The same for the dense twin, so that it is no advantage of the experts."""

    def forward(self, x_BTD: Tensor, ctx) -> tuple[Tensor, list]:
        x_TD = x_BTD.flatten(0, 1)
        offs_E = torch.full((1,), len(x_TD), dtype=torch.int32, device=x_TD.device)
        y_TD = FusedMLP.apply(x_TD, self.up.type_as(x_TD)[None], self.down.type_as(x_TD)[None], offs_E)
        return y_TD.view_as(x_BTD), []


@contextlib.contextmanager
def in_models_built_here():
    """Models built inside have it, and keep it."""
    tables = (model.EXPERTS, "mlp", FusedMLPExperts), (model.FEED_FORWARDS, "D", FusedDenseMLP)
    kept = [table[key] for table, key, _ in tables]
    for table, key, fused in tables:
        table[key] = fused
    try:
        yield
    finally:
        for (table, key, _), plain in zip(tables, kept):
            table[key] = plain
