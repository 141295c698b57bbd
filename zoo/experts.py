"""Expert kinds: SwiGLU, KAN and ReLU with matmuls; identity, zero, noise, constant, exit without (MoE++).

Kinds with matmuls are fn(rows_RD sorted by expert, ends_E) -> rows_RD, as in model.py. Kinds without matmuls are
element-wise, computed in token order with their gates, and own no rows."""

from collections import ChainMap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import ops
from model import PARAMETER_RULES, MLPExperts, ParameterRule, constant, init_uniform, normal
from ops import grouped_mm, linear_fp32, norm
from zoo.config import TABLES

# -----------------------------------------------------------------------------
# Kinds with matmuls


class ReLUExperts(MLPExperts):
    """MLPs with ReLU, as in sigma-MoE (2310.10837)."""

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        hidden_RF = grouped_mm(rows_RD, self.up.type_as(rows_RD), ends_E)
        return grouped_mm(torch.relu(hidden_RF), self.down.type_as(rows_RD), ends_E)


class SwiGLUExperts(nn.Module):
    """down(silu(gate x) * (up x)) (2002.05202): three matrices of two thirds of the width."""

    def __init__(self, config: model.Config, num_experts: int):
        super().__init__()
        width, _ = self.width(config.hidden_size)
        self.gate, self.up = (nn.Parameter(torch.empty(num_experts, width, config.n_embd)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(num_experts, config.n_embd, width))

    @staticmethod
    def width(hidden_size: int) -> tuple[int, float]:
        """Hidden width beside an MLP of hidden_size, and FLOPs over the MLP's."""
        width = 8 * round(hidden_size * 2 / 3 / 8)
        return width, 3 * width / (2 * hidden_size)

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        gate_RF, up_RF = (grouped_mm(rows_RD, weight.type_as(rows_RD), ends_E) for weight in (self.gate, self.up))
        return grouped_mm(F.silu(gate_RF) * up_RF, self.down.type_as(rows_RD), ends_E)


class KANExperts(nn.Module):
    """Two Kolmogorov-Arnold layers (2404.19756) of cubic B-splines on 5 intervals of [-2, 2], beside silu.

    Each input becomes 9 features of a grouped GEMM, so at equal FLOPs the hidden width is a ninth of an MLP's. Hidden
    activations are normed into the grid."""

    INTERVALS, REACH = 5, 2.0
    FEATURES = INTERVALS + 3 + 1

    def __init__(self, config: model.Config, num_experts: int):
        super().__init__()
        width, _ = self.width(config.hidden_size)
        self.up = nn.Parameter(torch.empty(num_experts, width, self.FEATURES * config.n_embd))
        self.down = nn.Parameter(torch.empty(num_experts, config.n_embd, self.FEATURES * width))

    @staticmethod
    def width(hidden_size: int) -> tuple[int, float]:
        width = 8 * round(hidden_size / KANExperts.FEATURES / 8)
        return width, KANExperts.FEATURES * width / hidden_size

    @staticmethod
    def features(x_RD: Tensor) -> Tensor:
        """(R, 9 D): silu(x), then eight B-splines, whose sum is 1 on the grid and 0 beyond its last knots."""
        step = 2 * KANExperts.REACH / KANExperts.INTERVALS
        centres = torch.arange(KANExperts.FEATURES - 1, device=x_RD.device) * step - KANExperts.REACH - step
        distance = ((x_RD[:, None].float() - centres[:, None]) / step).abs()  # (R, 8, D), in intervals
        near, far = 2 / 3 - distance.square() * (1 - distance / 2), (2 - distance).clamp(min=0) ** 3 / 6
        spline = torch.where(distance < 1, near, far)
        return torch.cat([F.silu(x_RD)[:, None], spline.type_as(x_RD)], dim=1).flatten(1)

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        hidden_RF = grouped_mm(self.features(rows_RD), self.up.type_as(rows_RD), ends_E)
        return grouped_mm(self.features(norm(hidden_RF)), self.down.type_as(rows_RD), ends_E)


# -----------------------------------------------------------------------------
# Kinds without matmuls


class FreeExperts(nn.Module):
    """n experts without matmuls (MoE++, 2410.07348), each token weighted by its gate for each of them.

    Inputs of tokens that did not choose them are set to zero before, not after: output and gradient are exact zeros."""

    has_matmuls = False

    def __init__(self, config: model.Config, num_experts: int):
        super().__init__()

    def forward(self, x_TD: Tensor, gate_Tn: Tensor, ctx) -> Tensor:
        gate_T1 = gate_Tn.sum(1, keepdim=True).type_as(x_TD)
        return gate_T1 * self.output(torch.where(gate_T1 > 0, x_TD, 0), ctx)

    def output(self, x_TD: Tensor, ctx) -> Tensor:
        raise NotImplementedError


class IdentityExperts(FreeExperts):
    """x itself, called copy in MoE++."""

    def output(self, x_TD: Tensor, ctx) -> Tensor:
        return x_TD


class ReLUSquaredExperts(FreeExperts):
    """relu(x)^2 without weights."""

    def output(self, x_TD: Tensor, ctx) -> Tensor:
        return ops.relu_squared(x_TD)


class NoiseExperts(FreeExperts):
    """x plus normal noise of variance 1/4 in training, x alone in evaluation. Hashes as for the router's noise."""

    def output(self, x_TD: Tensor, ctx) -> Tensor:
        if not self.training:
            return x_TD
        seed, step, layer, token_T = ctx.noise_key
        return x_TD + ops.hashed_normal(seed, step, layer + 2**16, token_T, x_TD.size(1)).type_as(x_TD) / 2


class ZeroExperts(FreeExperts):
    """Zero: a token that chooses it is computed less."""

    def forward(self, x_TD: Tensor, gate_Tn: Tensor, ctx) -> Tensor:
        return torch.zeros_like(x_TD)


class ExitExperts(ZeroExperts):
    """Zero; with `halt exit` the token leaves the loop after this iteration. Load balancing ignores it."""


class ConstantExperts(FreeExperts):
    """a x + b v with (a, b) = softmax(W x); each expert has its own learned vector v and matrix W."""

    def __init__(self, config: model.Config, num_experts: int):
        super().__init__(config, num_experts)
        self.mix = nn.Parameter(torch.empty(num_experts, 2, config.n_embd))
        self.vector = nn.Parameter(torch.empty(num_experts, config.n_embd))

    def forward(self, x_TD: Tensor, gate_Tn: Tensor, ctx) -> Tensor:
        x_TD = torch.where(gate_Tn.sum(1, keepdim=True) > 0, x_TD, 0)
        a_Tn, b_Tn = ops.softmax(linear_fp32(x_TD, self.mix.flatten(0, 1)).unflatten(1, (-1, 2))).unbind(-1)
        x_gate_T1 = (gate_Tn * a_Tn).sum(1, keepdim=True).type_as(x_TD)
        return x_gate_T1 * x_TD + ((gate_Tn * b_Tn) @ self.vector).type_as(x_TD)


WITH_MATMULS = {"swiglu": SwiGLUExperts, "kan": KANExperts, "relu": ReLUExperts}
WITHOUT_MATMULS = {"identity": IdentityExperts, "zero": ZeroExperts, "noise": NoiseExperts, "relu2": ReLUSquaredExperts,
                   "constant": ConstantExperts, "exit": ExitExperts}  # fmt: skip
TABLES["experts"] = ChainMap(WITHOUT_MATMULS, WITH_MATMULS, model.EXPERTS)  # a user's own kinds are in model.EXPERTS
PARAMETER_RULES |= {
    "swiglu.gate": ParameterRule("expert", init_uniform),
    "swiglu.up": ParameterRule("expert", init_uniform),
    "swiglu.down": ParameterRule("expert", constant(0.0)),
    "relu.up": ParameterRule("expert", init_uniform),
    "relu.down": ParameterRule("expert", constant(0.0)),
    "kan.up": ParameterRule("expert", init_uniform),
    "kan.down": ParameterRule("expert", constant(0.0)),
    "experts.gate": ParameterRule("expert", init_uniform),  # swiglu alone, in the core's MoE
    "constant.mix": ParameterRule("router", constant(0.0)),
    "constant.vector": ParameterRule("scalar", normal),
}
