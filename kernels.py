"""Triton kernels, for CUDA only, where torch's operators and Inductor are slow. Each has a plain version as reference.

    softcap_nll             the loss and its gradient, in place: logits are read from memory once and written once
    quantise                FP8 copies of a matrix and of its transpose from one reading: FP8 matmuls need both layouts
    gram, gram_polynomial   symmetric products of Newton-Schulz: half the tiles, the others mirrored, sum with A fused

Why these and no others: benchmarks/README.md, "A MoE step on one H200". TRITON_INTERPRET=1 runs them on a CPU, for
tests/core/test_kernels.py. Shape suffixes as in model.py: T tokens, V padded vocabulary, D n_embd."""

from __future__ import annotations

import math
import os
import types

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # nothing here can run then, but transformers imports whatever it finds under the name `kernels`
    triton = types.SimpleNamespace(jit=lambda function: function)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter knows no assembly


@triton.jit
def sigmoid(x, INTERPRETED: tl.constexpr):
    """An exponential and a reciprocal, to 2 units in the last place. Triton's division takes five times as long."""
    y = 1 + tl.exp2(x * -1.4426950408889634)
    if INTERPRETED:
        return 1 / y
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softcap_nll_kernel(z_ptr, target_ptr, nll_ptr, inverse_half_cap, bits, vocab_size: tl.constexpr,
                       padded_size: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """One token: the sum of exponentials on a first reading, its gradient over the logits on a second, from cache."""
    t = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + t * padded_size
    target = tl.load(target_ptr + t)
    # read before the sum: its barrier keeps this load ahead of every warp's stores, which overwrite the logits
    z_target = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    cols = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        col = start + cols
        z = tl.load(row_ptr + col, mask=col < vocab_size, other=0.0).to(tl.float32)
        s = sigmoid(z * inverse_half_cap, INTERPRETED)
        sums += tl.where(col < vocab_size, tl.exp2(s * bits - bits / 2), 0.0)
    total = tl.sum(sums)
    inverse_total = 1 / total
    has_target = tl.where(target >= 0, 1.0, 0.0)
    s_target = sigmoid(z_target * inverse_half_cap, INTERPRETED)
    tl.store(nll_ptr + t, has_target * (tl.log(total) - (s_target - 0.5) * bits * 0.6931471805599453))
    for start in range(0, padded_size, BLOCK):
        col = start + cols
        z = tl.load(row_ptr + col, mask=col < vocab_size, other=0.0).to(tl.float32)
        s = sigmoid(z * inverse_half_cap, INTERPRETED)
        p = tl.where(col < vocab_size, tl.exp2(s * bits - bits / 2) * inverse_total, 0.0)
        dz = (p - tl.where(col == target, 1.0, 0.0)) * (4 * has_target) * s * (1 - s)
        tl.store(row_ptr + col, dz, mask=col < padded_size)


def softcap_nll(z_TV: Tensor, target_T: Tensor, vocab_size: int, softcap: float) -> Tensor:
    """As ops.softcap_nll: cross-entropy (T,) in nats of softcapped logits; z is overwritten by its gradient.

    Each reading takes two exponentials and a reciprocal per element; at GPT-2's vocabulary these bound the time."""
    nll_T = torch.empty(len(z_TV), dtype=torch.float32, device=z_TV.device)
    padded_size, bits = z_TV.size(1), 2 * softcap / math.log(2)
    softcap_nll_kernel[(len(z_TV),)](
        z_TV, target_T, nll_T, 2 / softcap, bits, vocab_size, padded_size,
        BLOCK=min(2048, triton.next_power_of_2(padded_size)), INTERPRETED=INTERPRETED, num_warps=8)  # fmt: skip
    return nll_T


@triton.jit
def quantise_kernel(x_ptr, q_ptr, qt_ptr, rows, cols, inverse_scale, MOST: tl.constexpr, SIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)[:, None]
    col = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(x_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32) * inverse_scale
    NAN: tl.constexpr = tl.PropagateNan.ALL  # clipping would hide a NaN loss
    q = tl.minimum(tl.maximum(x, -MOST, propagate_nan=NAN), MOST, propagate_nan=NAN).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * cols + col, q, mask=inside)
    tl.store(qt_ptr + tl.trans(col) * rows + tl.trans(row), tl.trans(q), mask=tl.trans(inside))


def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ops.quantise: x / scale (rows, cols) in an FP8 dtype, clipped, and its transpose, both contiguous."""
    rows, cols = x.shape
    q, qt = torch.empty(rows, cols, dtype=dtype, device=x.device), torch.empty(cols, rows, dtype=dtype, device=x.device)
    side = 128
    quantise_kernel[(triton.cdiv(rows, side), triton.cdiv(cols, side))](
        x.contiguous(), q, qt, rows, cols, 1 / scale, MOST=torch.finfo(dtype).max, SIDE=side, num_warps=4)  # fmt: skip
    return q, qt


@triton.jit
def symmetric_kernel(x_ptr, a_ptr, out_ptr, alpha, beta, rows: tl.constexpr, cols: tl.constexpr,
                     HAS_A: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """One tile, on or below the diagonal, of alpha X X^T + beta A, and its mirror image."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # the tile's row is the largest i with i (i + 1) / 2 tiles before it
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    row, col = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    x_ptr += batch * rows * cols
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, cols, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left_mask, right_mask = (row[:, None] < rows) & (k[None, :] < cols), (col[:, None] < rows) & (k[None, :] < cols)
        left = tl.load(x_ptr + row[:, None] * cols + k[None, :], mask=left_mask, other=0.0)
        right = tl.load(x_ptr + col[:, None] * cols + k[None, :], mask=right_mask, other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    total *= alpha
    inside, here = (row[:, None] < rows) & (col[None, :] < rows), row[:, None] * rows + col[None, :]
    if HAS_A:
        total += beta * tl.load(a_ptr + batch * rows * rows + here, mask=inside, other=0.0).to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    out_ptr += batch * rows * rows
    tl.store(out_ptr + here, out, mask=inside)
    mirrored = (col[:, None] < rows) & (row[None, :] < rows) & (j < i)  # a diagonal tile is its own mirror image
    tl.store(out_ptr + col[:, None] * rows + row[None, :], tl.trans(out), mask=mirrored)


def symmetric(X: Tensor, alpha: float, A: Tensor | None, beta: float) -> Tensor:
    """alpha X X^T + beta A for X (N, rows, cols) and symmetric A (N, rows, rows)."""
    N, rows, cols = X.shape
    out = torch.empty(N, rows, rows, dtype=X.dtype, device=X.device)
    side = min(128, triton.next_power_of_2(max(rows, 16)))
    tiles = triton.cdiv(rows, side)
    symmetric_kernel[(tiles * (tiles + 1) // 2, N)](
        X.contiguous(), out if A is None else A, out, alpha, beta, rows, cols, HAS_A=A is not None, SIDE=side, DEPTH=64,
        num_warps=4, num_stages=3)  # fmt: skip
    return out


def gram(X: Tensor) -> Tensor:
    """As train_muon.gram: X X^T of (N, rows, cols)."""
    return symmetric(X, 1.0, None, 0.0)


def gram_polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """As train_muon.gram_polynomial: b A + c A A of symmetric (N, rows, rows)."""
    return symmetric(A, c, A, b)
