"""Objectives: next token, and masked tokens (BERT), which looks both ways and so cannot continue a text."""

import torch
from torch import Tensor

import model
import ops
from cli import require
from zoo.config import CHECKS, TABLES, Config
from zoo.masks import MetaDecodeMask, TwoWayMask, fastest_meta_mask, visible, visible_both_ways


class NextToken:
    """Every token predicts its successor."""

    visible = staticmethod(visible)

    def make_inputs(self, gpt, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the model; a target below 0 is ignored."""
        return ids_BT, targets_BT

    def num_targets(self, config, T: int) -> int:
        """Divisor of a row's summed loss."""
        return T

    def mask(self, *inputs, meta: int, cached: bool):
        """Attention mask; inputs as those of model.DenseMask."""
        device_type, T = inputs[0].device.type, len(inputs[0])
        if meta:
            return (MetaDecodeMask if cached else fastest_meta_mask(device_type, T))(*inputs, meta)
        return (model.DecodeMask if cached else model.fastest_mask(device_type, T))(*inputs)

    def mean_keys(self, keys: float) -> float:
        """Mean number of visible keys, given that of keys up to the token's own."""
        return keys


class MaskedTokens(NextToken):
    """Predict hidden tokens (1810.04805): mask_share of each row, none of them an end-of-text token.

    Of ten hidden tokens eight become mask_token, one a random id, and one stays. They are drawn from seed, step and
    token number, in evaluation without the step. Routers and tables read the inputs after hiding."""

    visible = staticmethod(visible_both_ways)

    def make_inputs(self, gpt, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        config, (seed, step, first_token, _) = gpt.config, gpt.clock.unbind()
        token_T = first_token + torch.arange(ids_BT.numel(), device=ids_BT.device)
        no_step = 0 * step - 1
        counter_BT = ops.hashed_counter(seed, step if gpt.training else no_step, no_step, token_T).view(ids_BT.shape)
        draw = lambda lane: ops.mix_bits(counter_BT ^ lane) & 0xFFFFFF
        order_BT = draw(1).masked_fill(ids_BT == config.eot_token, 2**24)
        first_BN = order_BT.argsort(dim=1, stable=True)[:, : self.num_targets(config, ids_BT.size(1))]
        hidden_BT = torch.zeros_like(ids_BT, dtype=torch.bool).scatter(1, first_BN, True)
        hidden_BT &= (order_BT < 2**24) & (targets_BT >= 0)
        fate_BT, any_BT = draw(2) / 2**24, draw(3) % config.vocab_size
        replaced_BT = torch.where(fate_BT < 0.8, config.mask_token, torch.where(fate_BT < 0.9, any_BT, ids_BT))
        return torch.where(hidden_BT, replaced_BT, ids_BT), torch.where(hidden_BT, ids_BT, -1)

    def num_targets(self, config, T: int) -> int:
        return max(1, round(config.mask_share * T))

    def mask(self, *inputs, meta: int, cached: bool):
        return model.DecodeMask(*inputs) if cached else TwoWayMask(*inputs, meta)

    def mean_keys(self, keys: float) -> float:
        return 2 * keys - 1


TABLES["objective"] = OBJECTIVES = {"next": NextToken(), "masked": MaskedTokens()}


def check(config: Config):
    if config.objective == "masked":
        legal = f"next with vocab_size = {config.vocab_size}, a multiple of 64: no id is left for a hidden token"
        require(config, "objective", config.vocab_size < config.padded_vocab_size, legal)
        legal = "plain with objective masked: ssmax counts the keys before a token"
        require(config, "attn_softmax", config.attn_softmax == "plain", legal)


CHECKS.append(check)
