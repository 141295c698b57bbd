"""Operators of model.py: functions with a hand-written backward, or with one implementation per device.

Each is plain PyTorch to its caller. The sections: elementwise (norm, ReLU^2, blend), rotary embedding, attention on a
CPU, hashes and noise, softmax, products in fp32 and top-k, grouped matmul, gather and combine, head matmuls, loss.

Shape suffixes as in model.py: B rows, T tokens, D n_embd, H heads, C head_dim, E experts, K top_k, R = T*K routed rows,
F expert hidden, V padded vocabulary."""

import functools
import importlib.util
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # not every torch for CUDA comes with it


def kernel_on_cuda(plain):
    """Decorator: CUDA tensors go to the kernel of the same name in kernels.py; `__wrapped__` is the plain version."""

    @functools.wraps(plain)
    def pick(x: Tensor, *args, **kwargs):
        if not (x.is_cuda and TRITON_IS_INSTALLED):
            return plain(x, *args, **kwargs)
        import kernels

        return getattr(kernels, plain.__name__)(x, *args, **kwargs)

    return pick


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args), or its forward alone without gradients.

    While one token is decoded, apply() costs a third of a norm."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(SAVES_NOTHING, *args)


SAVES_NOTHING = SimpleNamespace(save_for_backward=lambda *_: None)

# -----------------------------------------------------------------------------
# Elementwise


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without gain."""
    return apply(RMSNorm, x)


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x), saving y and 1 / rms: in bf16 on a CPU a quarter of the time of F.rms_norm, forward and backward.

    In bf16 the steps to 1 / rms are rounded too, so a row may be about 1% too long or short as a whole."""

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y_scale = (length.square() / x.size(-1) + torch.finfo(torch.float32).eps).rsqrt()
        y = x * y_scale
        ctx.save_for_backward(y, y_scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, y_scale = ctx.saved_tensors
        along_y = torch.linalg.vecdot(dy, y).unsqueeze(-1) / -y.size(-1)
        return torch.addcmul(dy, y, along_y) * y_scale


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return apply(ReLUSquared, x)


class ReLUSquared(torch.autograd.Function):
    """Saves relu(x) alone for backward."""

    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy):
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


def blend(weight_2: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """weight[0] x + weight[1] y, for the learned skips; y may be a 0-d zero."""
    return apply(Blend, weight_2, x, y)


class Blend(torch.autograd.Function):
    """Gradients of the weights are fp32 sums of row sums: equal for any number of threads, unlike one long bf16 sum."""

    @staticmethod
    def forward(ctx, weight_2, x, y):
        ctx.save_for_backward(weight_2, x, y)
        a, b = weight_2.type_as(x)
        return a * x + b * y

    @staticmethod
    def backward(ctx, dout):
        weight_2, x, y = ctx.saved_tensors
        a, b = weight_2.type_as(x)
        dots = [torch.linalg.vecdot(dout, z.expand_as(dout)).float().sum(-1).sum() for z in (x, y)]
        return torch.stack(dots).type_as(weight_2), a * dout, b * dout if ctx.needs_input_grad[2] else None


# -----------------------------------------------------------------------------
# Rotary embedding


def rotary_tables(position: Tensor, head_dim: int, dtype: torch.dtype, speed: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, C) of the half-truncated rotary embedding at positions (...), signed as `rotate` needs them.

    The pairs (c, c + C/2) rotate for c < C/4, with base 1024; the other channels carry content without position
    (modded-nanogpt record 17). `speed` multiplies the frequencies."""
    frequency = speed * (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, device=position.device)
    theta = F.pad(position.float()[..., None, None] * frequency, (0, head_dim // 4))
    return torch.cat([theta.cos()] * 2, dim=-1).to(dtype), torch.cat([theta.sin(), -theta.sin()], dim=-1).to(dtype)


def rotate(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each pair of channels (c, c + C/2) rotated by its token's angle; tables from rotary_tables."""
    return apply(Rotation, x_BTHC, cos, sin)


class Rotation(torch.autograd.Function):
    """Backward is the rotation by the opposite angle."""

    @staticmethod
    def turn(x_BTHC, cos, sin):
        a, b = x_BTHC.chunk(2, dim=-1)
        return torch.addcmul(x_BTHC * cos, torch.cat([b, a], dim=-1), sin)

    @staticmethod
    def forward(ctx, x_BTHC, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotation.turn(x_BTHC, cos, sin)

    @staticmethod
    def backward(ctx, dy_BTHC):
        cos, sin = ctx.saved_tensors
        return Rotation.turn(dy_BTHC, cos, -sin), None, None


# -----------------------------------------------------------------------------
# Attention on a CPU


def blocked_attention(q_NTC: Tensor, k_NTC: Tensor, v_NTC: Tensor, blocks: list) -> Tensor:
    """softmax(q k^T) v over (N = B*H, T, C), q already scaled. blocks: (query slice, key slice, masked keys)."""
    return BlockedAttention.apply(q_NTC, k_NTC, v_NTC, blocks, torch.is_grad_enabled())


class BlockedAttention(torch.autograd.Function):
    """Saves the probabilities for backward, if there will be one."""

    @staticmethod
    def forward(ctx, q_NTC, k_NTC, v_NTC, blocks, with_gradients):
        y_NTC, probabilities = torch.empty_like(q_NTC), []
        for q, kv, masked_B1QK in blocks:
            score = torch.bmm(q_NTC[:, q], k_NTC[:, kv].mT)
            score.unflatten(0, (len(masked_B1QK), -1)).masked_fill_(masked_B1QK, -math.inf)
            p = score.softmax(-1)
            y_NTC[:, q] = torch.bmm(p, v_NTC[:, kv])
            if with_gradients:
                probabilities.append(p)
        ctx.save_for_backward(q_NTC, k_NTC, v_NTC, *probabilities)
        ctx.blocks = blocks
        return y_NTC

    @staticmethod
    def backward(ctx, dy_NTC):
        q_NTC, k_NTC, v_NTC, *probabilities = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q_NTC), torch.zeros_like(k_NTC), torch.zeros_like(v_NTC)
        for (q, kv, _), p in zip(ctx.blocks, probabilities):
            dy = dy_NTC[:, q]
            dv[:, kv] += torch.bmm(p.mT, dy)
            ds = torch._softmax_backward_data(torch.bmm(dy, v_NTC[:, kv].mT), p, -1, p.dtype)
            dq[:, q] = torch.bmm(ds, k_NTC[:, kv])
            dk[:, kv] += torch.bmm(ds.mT, q_NTC[:, q])
        return dq, dk, dv, None, None


# -----------------------------------------------------------------------------
# Hashes and noise: counter-based, so the same on any layout of ranks, after a resume and under recomputation


def mix_bits(x: Tensor) -> Tensor:
    """A hash of int32 values, element by element: two multiply-xorshift rounds with wrapping products."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def ngram_hashes(ids_BT: Tensor, doc_BT: Tensor, max_n: int) -> list[Tensor]:
    """Hashes (B, T), int32, of the last n ids up to each token's own, for n = 1 to max_n.

    Ids of earlier documents count as one id."""
    hashes = [mix_bits(ids_BT.to(torch.int32))]
    for back in range(1, max_n):
        earlier_id_BT, earlier_doc_BT = (F.pad(x, (back, 0), value=-1)[:, : x.size(1)] for x in (ids_BT, doc_BT))
        hashes.append(mix_bits(hashes[-1] + earlier_id_BT.masked_fill(earlier_doc_BT != doc_BT, -1).to(torch.int32)))
    return hashes


def signed_rows(table_RD: Tensor, hash_BT: Tensor, sparse: bool) -> Tensor:
    """Each hash's row (B, T, D), its channels times 32 signs from a second hash, so n-grams that share a row differ."""
    row_BTD = F.embedding(hash_BT % len(table_RD), table_RD, sparse=sparse)
    bit = torch.arange(32, dtype=torch.int32, device=hash_BT.device)
    sign_BT32 = 1.0 - 2 * (mix_bits(hash_BT + 1)[..., None] >> bit & 1)  # modded-nanogpt record 83
    return row_BTD * sign_BT32.repeat(1, 1, -(-row_BTD.size(-1) // 32))[..., : row_BTD.size(-1)]


def hashed_counter(seed: Tensor, step: Tensor, layer: Tensor, token_T: Tensor) -> Tensor:
    """32 random bits (T,), int32: a pure function of seed, step, layer and the token's number in the global batch."""
    seed, step, layer, token_T = ((x & 0xFFFFFFFF).to(torch.int32) for x in (seed ^ (seed >> 32), step, layer, token_T))
    return mix_bits(mix_bits(mix_bits(mix_bits(seed + 0x1E3779B9) + step) + layer) + token_T)


def hashed_normal(seed: Tensor, step: Tensor, layer: Tensor, token_T: Tensor, num: int) -> Tensor:
    """Standard normal noise (T, num), a pure function of its arguments: Box-Muller on pairs of 24-bit hashes."""
    lane = torch.arange(-(-num // 2), dtype=torch.int32, device=token_T.device)
    counter_T1 = hashed_counter(seed, step, layer, token_T)[:, None]
    u, v = ((mix_bits(counter_T1 ^ mix_bits(2 * lane + i)) & 0xFFFFFF).float() for i in (1, 2))
    radius, angle = ((u + 1) / 2**24).log().mul(-2).sqrt(), v * (2 * math.pi / 2**24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num]


# -----------------------------------------------------------------------------
# For the router: softmax, products in fp32, top-k


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension: for 2 to 64 entries on a CPU a quarter of the time of Tensor.softmax."""
    return (x - x.logsumexp(-1, keepdim=True)).exp()


def linear_fp32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T in fp32, for the top-k that follows; gradients are computed in the dtype of x."""
    return apply(LinearFP32, x_TD, weight_ED)


class LinearFP32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return MATMULS_FP32.get((x_TD.device.type, x_TD.dtype), lambda x, w: x.float() @ w.T)(x_TD, weight_ED)

    @staticmethod
    def backward(ctx, dy_TE):
        x_TD, weight_ED = ctx.saved_tensors
        dy_TE = dy_TE.type_as(x_TD)
        return dy_TE @ weight_ED.type_as(x_TD), (dy_TE.T @ x_TD).type_as(weight_ED)


@torch.library.custom_op("nanomoe::split_matmul", mutates_args=())
def split_matmul(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """bf16 rows times the two bf16 halves of each fp32 weight, summed in fp32; the last 8 bits of a weight are lost.

    On an H200 a quarter of the time of a matmul in fp32, which has no tensor cores and needs a copy of x."""
    high = weight_ED.to(torch.bfloat16)
    halves = torch.cat([high, (weight_ED - high).to(torch.bfloat16)])  # (2 E, D)
    y_T2E = torch.mm(x_TD, halves.T, out_dtype=torch.float32)
    return y_T2E[:, : len(weight_ED)] + y_T2E[:, len(weight_ED) :]


split_matmul.register_fake(lambda x, weight: x.new_empty(len(x), len(weight), dtype=torch.float32))
MATMULS_FP32 = {("cuda", torch.bfloat16): split_matmul}


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the largest scores; among equal ones, as those of a new router, any may come first."""
    few_on_gpu = k <= 4 and score_TE.device.type != "cpu"  # where topk takes twice as long as a few argmaxes
    return (topk_argmax if few_on_gpu else topk_sort)(score_TE, k)


def topk_argmax(score_TE: Tensor, k: int) -> Tensor:
    index_E, chosen = torch.arange(score_TE.size(1), device=score_TE.device), []
    for _ in range(k):
        chosen.append(score_TE.argmax(-1))
        score_TE = score_TE.masked_fill(index_E == chosen[-1][:, None], -math.inf)
    return torch.stack(chosen, dim=1)


topk_sort = lambda score_TE, k: score_TE.topk(k).indices

# -----------------------------------------------------------------------------
# Grouped matmul: rows sorted by expert, ends_E the end of each expert's rows. N, K here: rows and columns of a matrix


def grouped_mm(rows_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its expert's matrix, transposed as in F.linear: (R, K), (E, N, K) -> (R, N).

    Row r belongs to the first expert with ends_E (int32) above r. Rows past the last end are uninitialised memory."""
    if rows_RK.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grouped_mm_op(rows_RK, weight_ENK, ends_E)
    return mm_expert_by_expert(rows_RK, weight_ENK, ends_E)  # one token: the operator costs more than the product


@torch.library.custom_op("nanomoe::grouped_mm", mutates_args=())
def grouped_mm_op(rows_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """A custom operator because torch's fake kernel, for compilation and the meta device, supports bf16 only."""
    return F.grouped_mm(rows_RK, weight_ENK.mT, offs=ends_E)


@torch.library.custom_op("nanomoe::grouped_outer", mutates_args=())
def grouped_outer(dy_RN: Tensor, rows_RK: Tensor, ends_E: Tensor) -> Tensor:
    """Gradient of grouped_mm by the weights: each expert's dy^T rows, (E, N, K); zero for an expert without rows."""
    return F.grouped_mm(dy_RN.mT, rows_RK, offs=ends_E)


def row_multiple(n: int) -> int:
    """A CPU matmul of n rows is padded to a multiple of this, so there are 16 shapes per power of two.

    oneDNN spends about a millisecond and a megabyte on every new matmul shape, and row counts change at every step. So
    few shapes all stay in its cache."""
    return 1 << max(0, n.bit_length() - 5)


@grouped_mm_op.register_kernel("cpu")
def mm_expert_by_expert(rows_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """One matmul per expert, each a little past its end; the next expert overwrites the surplus."""
    out_RN, start = rows_RK.new_empty(len(rows_RK), weight_ENK.size(1)), 0
    for e, end in enumerate(ends_E.tolist()):
        if start == end:  # true of most experts while one token is decoded
            continue
        weight_NK, multiple = weight_ENK[e], row_multiple(end - start)
        length = -(-(end - start) // multiple) * multiple
        if start + length <= len(rows_RK):
            torch.mm(rows_RK[start : start + length], weight_NK.T, out=out_RN[start : start + length])
        else:  # too few rows behind this expert's: compute some before them too, and drop those
            first = max(0, end - length)
            out_RN[start:end] = (rows_RK[first:end] @ weight_NK.T)[start - first :]
        start = end
    return out_RN


@grouped_outer.register_kernel("cpu")
def _(dy_RN: Tensor, rows_RK: Tensor, ends_E: Tensor) -> Tensor:
    """One product per expert in two parts: most of its rows, then the last ones with zeroed rows before them."""
    out_ENK, start = dy_RN.new_zeros(len(ends_E), dy_RN.size(1), rows_RK.size(1)), 0
    for out_NK, end in zip(out_ENK, ends_E.tolist()):
        multiple = row_multiple(end - start)
        middle = start + (end - start) // multiple * multiple
        torch.mm(dy_RN[start:middle].T, rows_RK[start:middle], out=out_NK)
        if middle < end:
            first = max(0, end - multiple)
            last = dy_RN[first:end].clone()
            last[: middle - first] = 0
            out_NK.addmm_(last.T, rows_RK[first:end])
        start = end
    return out_ENK


grouped_mm_op.register_fake(lambda rows, weight, ends: rows.new_empty(len(rows), weight.size(1)))
grouped_outer.register_fake(lambda dy, rows, ends: rows.new_empty(len(ends), dy.size(1), rows.size(1)))


def grouped_mm_backward(ctx, dy_RN: Tensor):
    rows_RK, weight_ENK, ends_E = ctx.saved_tensors
    dy_RN = dy_RN.contiguous()  # F.grouped_mm does not take the stride 0 of an expanded gradient
    return grouped_mm_op(dy_RN, weight_ENK.mT, ends_E), grouped_outer(dy_RN, rows_RK, ends_E), None


save_inputs = lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
grouped_mm_op.register_autograd(grouped_mm_backward, setup_context=save_inputs)

# -----------------------------------------------------------------------------
# Gather and combine, the data movements of dispatch. slot_R: (token, k) slot of each sorted row; row_TK: its inverse


def gather(x_TD: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
    """rows_RD: the hidden states of each slot's token."""
    return apply(Gather, x_TD, slot_R // row_TK.size(1), row_TK)


class Gather(torch.autograd.Function):
    """Backward sums each token's K rows by a gather too: no atomics, no accumulating index_put."""

    @staticmethod
    def forward(ctx, x_TD, token_R, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)  # on a CPU a fifth of the time of x_TD[token_R]

    @staticmethod
    def backward(ctx, drows_RD):
        (row_TK,) = ctx.saved_tensors
        return sum_rows(drows_RD.contiguous(), row_TK), None, None


def combine(rows_RD: Tensor, weight_TK: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
    """y_TD: the weighted sum of each token's K rows."""
    return apply(Combine, rows_RD, weight_TK, slot_R, row_TK)


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weight_TK, slot_R, row_TK):
        ctx.save_for_backward(rows_RD, weight_TK, slot_R, row_TK)
        return sum_rows(rows_RD, row_TK, weight_TK)

    @staticmethod
    def backward(ctx, dy_TD):
        rows_RD, weight_TK, slot_R, row_TK = ctx.saved_tensors
        dy_RD = dy_TD.index_select(0, slot_R // weight_TK.size(1))
        dweight_R = torch.linalg.vecdot(rows_RD, dy_RD)
        return dy_RD.mul_(weight_TK.flatten()[slot_R, None]), dweight_R[row_TK], None, None


def sum_rows(rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """(T, D): the sum of each token's K rows, weighted if weights are given."""
    if rows_RD.device.type == "cpu":
        return F.embedding_bag(row_TK, rows_RD, per_sample_weights=weight_TK, mode="sum")
    rows_TKD = rows_RD[row_TK]  # plain operators, which a compiler fuses with their neighbours
    return (rows_TKD if weight_TK is None else rows_TKD * weight_TK[:, :, None]).sum(1)


# -----------------------------------------------------------------------------
# Matmuls of the head, in bf16 or FP8 (modded-nanogpt record 19)


class HeadMatmul(NamedTuple):
    """w_ready = prepare(w, x); z, saved = forward(x, w_ready); dx, dw = backward(dz, saved)."""

    prepare: callable
    forward: callable
    backward: callable


@kernel_on_cuda
def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale (rows, cols) in an FP8 dtype, clipped to its range, and its transpose, both contiguous."""
    largest = torch.finfo(dtype).max
    q = (x.float() / scale).clamp(-largest, largest).to(dtype)  # in fp32: bf16 would round twice
    return q, q.T.contiguous()


# largest magnitude of a head weight and of the loss's gradient: fixed, not measured
FP8_RANGE = {"weight": 24.0, "dz": 1.0}


def fp8_scale(name: str, n_embd: int) -> float:
    """Divisor before the cast to FP8: the largest magnitude becomes 448, the maximum of e4m3 (and far below e5m2's).

    "x", the head's input, is RMS-normed, so its magnitudes are at most sqrt(n_embd)."""
    return FP8_RANGE.get(name, math.sqrt(n_embd)) / 448


def fp8_matmul(a: Tensor, b_T: Tensor, a_scale: float, b_scale: float, **options) -> Tensor:
    """a @ b of FP8 matrices, b given as its transpose: a GPU needs both contiguous along the summed dimension."""
    scales = (torch.full((), scale, device=a.device) for scale in (a_scale, b_scale))
    return torch._scaled_mm(a, b_T.T, *scales, **options)


def fp8_prepare(w_VD: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(w_VD, fp8_scale("weight", w_VD.size(1)), torch.float8_e4m3fn)


def fp8_forward(x_TD: Tensor, w_ready: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
    """z = x w^T with both sides in e4m3."""
    (w_VD, w_DV), D = w_ready, x_TD.size(1)
    x_f8_TD, x_f8_DT = quantise(x_TD, fp8_scale("x", D), torch.float8_e4m3fn)
    scales = fp8_scale("x", D), fp8_scale("weight", D)
    z_TV = fp8_matmul(x_f8_TD, w_VD, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    return z_TV, (x_f8_DT, w_DV)


def fp8_backward(dz_TV: Tensor, saved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """dx (bf16) and dw (fp32); the incoming gradient, at most 1 in magnitude, in e5m2."""
    x_DT, w_DV = saved
    x_scale, w_scale, dz_scale = (fp8_scale(name, len(x_DT)) for name in ("x", "weight", "dz"))
    dz_f8_TV, dz_f8_VT = quantise(dz_TV, dz_scale, torch.float8_e5m2)
    dx_TD = fp8_matmul(dz_f8_TV, w_DV, dz_scale, w_scale, out_dtype=torch.bfloat16)
    return dx_TD, fp8_matmul(dz_f8_VT, x_DT, dz_scale, x_scale, out_dtype=torch.float32)


HEADS = {
    "bf16": HeadMatmul(
        prepare=lambda w, x: w.type_as(x),
        forward=lambda x, w: (x @ w.T, (x, w)),
        backward=lambda dz, saved: (dz @ saved[1], dz.T @ saved[0]),
    ),
    "fp8": HeadMatmul(fp8_prepare, fp8_forward, fp8_backward),
}

# -----------------------------------------------------------------------------
# Loss: no more than a chunk of the logits ever exists


@kernel_on_cuda
def softcap_nll(z_TV: Tensor, target_T: Tensor, vocab_size: int, softcap: float) -> Tensor:
    """Cross-entropy (T,) in nats, fp32, of logits softcapped to 2 c sigmoid(2 z / c); z is overwritten by its gradient.

    The logits are bounded, so exp needs no running maximum. Targets below 0 are ignored. On a CPU sigmoid takes a sixth
    of the time of tanh, and exp2 a third of that of exp."""
    s_TV = (z_TV.float() * (2 / softcap)).sigmoid_()
    bits = 2 * softcap / math.log(2)  # a logit is s * bits in powers of two; minus the middle of the range: +-bits / 2
    e_TV = torch.rsub(s_TV, -bits / 2, alpha=-bits).exp2_()
    e_TV[:, vocab_size:] = 0
    total_T1 = e_TV.sum(-1, keepdim=True)
    has_target_T1 = (target_T >= 0)[:, None].float()
    target_T1 = target_T.clamp(min=0)[:, None]
    nll_T1 = total_T1.log() - softcap * (2 * s_TV.gather(1, target_T1) - 1)
    dlogit_TV = e_TV.mul_(4 * has_target_T1 / total_T1).scatter_add_(1, target_T1, -4 * has_target_T1)  # times 4
    dz_TV = dlogit_TV.mul_(s_TV)  # a logit's slope over z is 4 s (1 - s)
    z_TV.copy_(dz_TV.sub_(s_TV.mul_(dz_TV)))  # addcmul_ rounds otherwise once it is traced
    return (nll_T1 * has_target_T1).squeeze(1)


LOSS_CHUNK = {"cpu": 2**25, "cuda": 2**29}  # logits in memory at a time
LOSS_PIECE = {"cpu": 2**20, "cuda": 2**29}  # logits per call of the loss: on a CPU as many as the caches hold in fp32


def rows_within(limit: dict[str, int], w_VD: Tensor) -> int:
    """Tokens with at most `limit` logits; a multiple of 128 where possible, for FP8 matmuls."""
    rows = max(1, limit.get(w_VD.device.type, 2**24) // len(w_VD))
    return rows - rows % 128 if rows > 128 else rows


def chunked_loss(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, head: HeadMatmul, token_nll) -> Tensor:
    """Summed cross-entropy (nats) of the head w_VD (fp32), a chunk of tokens at a time.

    token_nll(z_TV, target_T) -> (T,) overwrites z with its gradient."""
    return ChunkedLoss.apply(x_TD, w_VD, target_T, head, token_nll, torch.is_grad_enabled())


class ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients too, so no logits are kept; backward scales them."""

    @staticmethod
    def forward(ctx, x_TD, w_VD, target_T, head, token_nll, with_gradients):
        nats, w_ready = torch.zeros((), device=x_TD.device), head.prepare(w_VD, x_TD)
        dx_TD, dw_VD = torch.empty_like(x_TD), torch.zeros_like(w_VD)
        rows, piece = (rows_within(limit, w_VD) for limit in (LOSS_CHUNK, LOSS_PIECE))
        for start in range(0, len(x_TD), rows):
            chunk = slice(start, start + rows)
            z, saved = head.forward(x_TD[chunk], w_ready)
            for z_piece, target_piece in zip(z.split(piece), target_T[chunk].split(piece)):
                nats += token_nll(z_piece, target_piece).sum()
            if with_gradients:
                dx_chunk, dw_chunk = head.backward(z, saved)  # z holds its own gradient by now
                dx_TD[chunk] = dx_chunk
                dw_VD += dw_chunk
        ctx.save_for_backward(dx_TD, dw_VD)
        return nats

    @staticmethod
    def backward(ctx, dnats):
        dx_TD, dw_VD = ctx.saved_tensors
        return dx_TD * dnats, dw_VD * dnats, None, None, None, None
