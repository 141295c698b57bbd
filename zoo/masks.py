"""Masks with meta-tokens in front of each row, masks that look both ways, and masks of packed queries.

Positions count meta-tokens; the first `meta` positions of a row are visible to every later one. Without meta-tokens the
masks of model.py are used. Shape suffixes as in model.py, Q packed queries of a row."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from model import BlockedMask, DecodeMask, DenseMask, FlexMask


def visible(q_position: Tensor, kv_position: Tensor, q_doc: Tensor, kv_doc: Tensor, window, meta: int = 0) -> Tensor:
    """The rule of model.visible; every earlier meta-token is visible too."""
    is_meta = (q_position >= kv_position) & (kv_position < meta)
    return model.visible(q_position, kv_position, q_doc, kv_doc, window) | is_meta


def visible_both_ways(q_position: Tensor, kv_position: Tensor, q_doc: Tensor, kv_doc: Tensor, window,
                      meta: int = 0) -> Tensor:  # fmt: skip
    """The rule of objective masked: later tokens are visible too."""
    return ((q_position - kv_position).abs() < window) & (q_doc == kv_doc) | (kv_position < meta)


class MaskInputs(NamedTuple):
    """Positions and documents of the new tokens and of all keys, for masks that are built during a loop."""

    position_T: Tensor
    position_S: Tensor
    doc_BT: Tensor
    doc_BS: Tensor
    windows: dict[str, Tensor]  # letter of `window` -> tokens
    meta: int
    visible: callable  # the objective's rule


def document_starts(q_doc_BT: Tensor, kv_doc_BS: Tensor) -> Tensor:
    """Index (B, T) among the keys of the first token of each query's document; documents only count up."""
    return torch.searchsorted(kv_doc_BS.contiguous(), q_doc_BT.contiguous())


def visible_keys(q_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window, meta: int) -> Tensor:
    """Number of keys visible to each query (B, T): the sum of visible() over keys."""
    own_BT = q_position - torch.maximum(document_starts(q_doc_BT, kv_doc_BS), q_position - window + 1) + 1
    return torch.where(q_position < meta, q_position + 1, own_BT + meta)


class MetaDenseMask(DenseMask):
    """SDPA with a full mask, by a rule of this file."""

    rule = staticmethod(visible)

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor,
                 meta: int):  # fmt: skip
        q_doc, kv_doc = q_doc_BT[:, None, :, None], kv_doc_BS[:, None, None, :]
        self.mask = self.rule(q_position[:, None], kv_position, q_doc, kv_doc, window, meta)


class MetaDecodeMask(DecodeMask):
    """model.DecodeMask, whose blocks see the meta-tokens too."""

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor,
                 meta: int):  # fmt: skip
        super().__init__(q_position, kv_position, q_doc_BT, kv_doc_BS, window)
        for i, (q, kv, _) in enumerate(self.blocks):
            kv = slice(0, kv.stop) if kv.start <= meta else torch.cat([kv_position[:meta], kv_position[kv]])
            places = q_position[q], kv_position[kv], q_doc_BT[:, q], kv_doc_BS[:, kv]
            self.blocks[i] = q, kv, MetaDenseMask(*places, window, meta)


class TwoWayMask(MetaDenseMask):
    rule = staticmethod(visible_both_ways)


class MetaBlockedMask(BlockedMask):
    """Blocks of queries against the keys within reach, and the meta-tokens."""

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor,
                 meta: int):  # fmt: skip
        T, reach = q_position.numel(), int(window)
        first_B1T1, key_S = model.first_visible(kv_position, kv_doc_BS, window)[:, None, :, None], kv_position.int()
        later = torch.ones(self.BLOCK, self.BLOCK, dtype=torch.bool, device=key_S.device).triu(1)
        self.blocks = []
        for start in range(0, T, self.BLOCK):
            q = slice(start, min(start + self.BLOCK, T))
            kv = slice(max(0, start - reach + 1) // 16 * 16, q.stop)
            kv = slice(0, q.stop) if kv.start < meta else torch.cat([key_S[:meta], key_S[kv]])
            hidden_B1QK = (key_S[kv] < first_B1T1[:, :, q]) & (key_S[kv] >= meta)
            hidden_B1QK[..., start - q.stop :] |= later[: q.stop - start, : q.stop - start]
            self.blocks.append((q, kv, hidden_B1QK))


class MetaFlexMask(FlexMask):
    """FlexAttention over blocks of documents, and the blocks of the meta-tokens."""

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor,
                 meta: int):  # fmt: skip
        first_BT = model.first_visible(kv_position, kv_doc_BS, window)
        some_Bnn, full_Bnn = self.blocks(q_doc_BT, window)
        block = torch.arange(some_Bnn.size(1), device=some_Bnn.device)
        some_Bnn |= (block[:, None] >= block) & (block * self.BLOCK < meta)
        mask_mod = lambda b, h, q, kv: (kv <= q) & ((kv >= first_BT[b, q]) | (kv < meta))
        self.use_blocks(some_Bnn, full_Bnn, mask_mod)


def fastest_meta_mask(device_type: str, T: int) -> type:
    """The mask class for whole sequences of T tokens, meta-tokens included, on this device."""
    classes = {BlockedMask: MetaBlockedMask, FlexMask: MetaFlexMask, DenseMask: MetaDenseMask}
    return classes[model.fastest_mask(device_type, T)]


class PackedMask:
    """SDPA for some queries of each row, in blocks of 256 packed queries.

    A query's own key is visible, else padding queries would have no key."""

    BLOCK = 256

    def __init__(self, inputs: MaskInputs, letter: str, index_BQ: Tensor, hidden_BS: Tensor | None):
        blocks = index_BQ.split(self.BLOCK, dim=1)
        self.masks = [self.block(inputs, letter, block_BQ, hidden_BS) for block_BQ in blocks]

    def block(self, inputs: MaskInputs, letter: str, index_BQ: Tensor, hidden_BS: Tensor | None) -> Tensor:
        q_position = inputs.position_T[index_BQ][:, None, :, None]
        q_doc, kv_doc = inputs.doc_BT.gather(1, index_BQ)[:, None, :, None], inputs.doc_BS[:, None, None, :]
        mask = inputs.visible(q_position, inputs.position_S, q_doc, kv_doc, inputs.windows[letter], inputs.meta)
        if hidden_BS is not None:
            mask &= ~hidden_BS[:, None, None, :]
        return mask | (q_position == inputs.position_S)

    def visible_keys(self) -> Tensor:
        """Number of keys visible to each query (B, Q)."""
        return torch.cat([mask[:, 0].sum(-1) for mask in self.masks], dim=1)

    def attend(self, q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        blocks = zip(q_BHQC.split(self.BLOCK, dim=2), self.masks)
        attention = F.scaled_dot_product_attention
        return torch.cat([attention(q, k_BHTC, v_BHTC, attn_mask=mask, scale=scale) for q, mask in blocks], dim=2)
