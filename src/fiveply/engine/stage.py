"""A rank's stage of the decoder over a step's packed tokens: compiled where there is code for it, or as the decoder computes.

Notable: Llama-like blocks on a CPU are one call for a whole stage (`blocks.hpp`), sums of tensor ranks included where they share
memory: torch's operations between the products take longer than they compute at a few rows. Any other decoder, type or device
goes through the decoder itself, with the same numbers but for rounding.

It knows no requests, and of other ranks the sum alone.

Shape suffixes: T packed tokens, D hidden, h half a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fiveply.engine import kernels
from fiveply.engine.paged_attention import PagedAttention, padded
from fiveply.engine.products import PANEL, FusedProducts
from fiveply.model import rotary
from fiveply.model.decoder import Block, Decoder
from fiveply.world.collectives import Axis


class Stage:
    """`__call__` is the decoder's forward; `attention` has begun the step."""

    def __init__(self, decoder: Decoder, attention: PagedAttention, tensor: Axis | None) -> None:
        """`tensor`: the ranks that share the blocks, if there are others."""
        self.decoder, self.attention, self.tensor = decoder, attention, tensor
        products, weight = decoder.products, next(decoder.parameters())
        assert isinstance(products, FusedProducts)
        self._parts: Any = kernels.function("parts", weight.dtype, weight.device, products.weights)
        blocks = [block for block in decoder.model.layers.values() if isinstance(block, Block)]
        if self._parts is None or not blocks or not _is_llama_like(decoder, products):
            self._parts = None
            return
        spec, ffn = decoder.spec, blocks[0].mlp.down_proj.weight.shape[1]
        own = attention.heads, attention.kv_heads, spec.head_dim
        self._model = kernels.Model(spec.hidden, *own, padded(spec.head_dim), ffn, spec.norm_eps)
        self._kept: list[Tensor] = []
        self._blocks = (kernels.Block * len(blocks))(*(self._block(block, products) for block in blocks))
        self._numbers = spec.hidden + max(2 * (attention.heads + attention.kv_heads) * spec.head_dim, 3 * ffn)
        self._scratch = torch.empty(0)
        self._sum = None if tensor is None else tensor.compiled_sum(weight.dtype)
        assert spec.rope is not None
        self._frequencies = rotary.inverse_frequencies(spec.rope, spec.head_dim)

    @property
    def compiled(self) -> bool:
        return self._parts is not None

    def __call__(self, input_T: Tensor, positions_T: Tensor) -> Tensor:
        """Hidden states (T, D), normed on the last stage."""
        decoder, tokens = self.decoder, len(positions_T)
        if not self.compiled:
            return decoder(input_T, positions_T, self.attention)
        x_TD = decoder.embed(input_T, positions_T, None) if decoder.first else input_T
        if self._scratch.numel() < tokens * self._numbers + PANEL:
            self._scratch = torch.empty(tokens * self._numbers + PANEL)
        out_TD = torch.empty_like(x_TD)
        inverse_h, factor = self._frequencies
        angles_Th = positions_T[:, None].float() * inverse_h
        cos_Th, sin_Th = angles_Th.cos().mul_(factor), angles_Th.sin().mul_(factor)
        parts, part = 2 * len(self._blocks), 0
        while part < parts:
            end = parts if self.tensor is None or self._sum is not None else part + 1
            part = self._parts(
                self._model, self._blocks, part, end, self.attention.step, cos_Th.data_ptr(), sin_Th.data_ptr(),
                x_TD.data_ptr(), out_TD.data_ptr(), self._scratch.data_ptr(), self._sum,
            )  # fmt: skip
            if self.tensor is None:
                continue
            if self._sum is None:
                self.tensor.all_reduce(out_TD)
            else:
                self.tensor.complete(self._sum, out_TD)
        x_TD += out_TD
        return x_TD if decoder.model.norm is None else decoder.model.norm(x_TD)

    def _block(self, block: Block, products: FusedProducts) -> kernels.Block:
        attention, mlp = block.self_attn, block.mlp
        assert mlp.gate_proj is not None
        biases: list[Tensor] = [
            one.bias for one in (attention.q_proj, attention.k_proj, attention.v_proj) if one.bias is not None
        ]
        if biases:
            self._kept.append(torch.cat(biases))
        pair = (attention.q_norm, attention.k_norm)
        return kernels.Block(
            block.input_layernorm.weight.data_ptr(), products.packed(attention.q_proj.weight),
            self._kept[-1].data_ptr() if biases else None, *(None if norm is None else norm.weight.data_ptr() for norm in pair),
            products.packed(attention.o_proj.weight), block.post_attention_layernorm.weight.data_ptr(),
            products.packed(mlp.gate_proj.weight), products.packed(mlp.down_proj.weight),
            self.attention.keys_NKdB[block.layer].data_ptr(), self.attention.values_NKBP[block.layer].data_ptr(),
            attention.window,
        )  # fmt: skip


def _is_llama_like(decoder: Decoder, products: FusedProducts) -> bool:
    """Whether `blocks.hpp` computes these blocks, with matrices that are packed."""
    spec, block = decoder.spec, next(iter(decoder.model.layers.values()))
    assert isinstance(block, Block)
    attention, mlp = block.self_attn, block.mlp
    inputs = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj]
    return (
        spec.norm == "rms" and spec.rope is not None and spec.activation == "silu" and mlp.gate_proj is not None
        and not spec.out_bias and not spec.mlp_bias
        and all(products.packed(linear.weight) for linear in inputs if linear is not None)
    )  # fmt: skip
