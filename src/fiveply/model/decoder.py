"""One decoder for all dense families, driven by ModelSpec: (tokens_T, positions_T, attention) -> hidden_TD.

Notable: tokens are packed (no batch dimension; rows are the attention seam's affair), and the forward names its boundaries
(`Boundary`): where a column-parallel product begins, where a row-parallel one ends, which rows a rank holds. Here each is
the identity; `parallel/` puts collectives there. No module knows a rank, and a module that holds a slice of the heads, of
the MLP or of the vocabulary computes with it unchanged, since shapes are read from the weights.

Shape suffixes: T tokens, D hidden, H query heads, K key-value heads, d head size, F MLP columns, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiveply.model import rotary
from fiveply.model.attention import Attention
from fiveply.model.dropout import KeyedDropout
from fiveply.model.elementwise import ACTIVATIONS, gated, rms_norm
from fiveply.model.products import Linears, Products
from fiveply.spec.architecture import ModelSpec


class Boundary:
    """The places at which a layer's tokens or columns may be split; the identity on one rank. `tokens`: those of a micro-batch,
    the same throughout a step."""

    tokens = 0

    def enter(self, x_TD: Tensor) -> Tensor:
        """Before a column-parallel product: all of the micro-batch's tokens."""
        return x_TD

    def leave(self, x_TD: Tensor) -> Tensor:
        """After a row-parallel product or the embedding: sums the partial results."""
        return x_TD

    def local(self, x_T: Tensor) -> Tensor:
        """The rows, of a per-token tensor, that this rank holds in the residual stream."""
        return x_T

    @property
    def rows(self) -> int:
        """How many those are."""
        return self.tokens


class Linear(nn.Module):
    """The weight (and bias) of a linear layer. `Products` multiplies; the bias is added where the sum over ranks is complete."""

    def __init__(self, columns: int, rows: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class Layer(nn.Module):
    """What attention and MLP share: the boundary at which they are split, and the products they compute with."""

    def __init__(self, boundary: Boundary, products: Linears) -> None:
        super().__init__()
        self.boundary, self.products = boundary, products

    def columns(self, x_TD: Tensor, *linears: Linear) -> list[Tensor]:
        """Column-parallel products of one input: each bias is split like the rows."""
        outputs = self.products.linears(x_TD, [linear.weight for linear in linears])
        return [linear.add_bias(y) for linear, y in zip(linears, outputs, strict=True)]

    def row(self, x_TI: Tensor, linear: Linear) -> Tensor:
        """A row-parallel product, summed over tensor ranks before its bias."""
        (y_TO,) = self.products.linears(x_TI, [linear.weight])
        return linear.add_bias(self.boundary.leave(y_TO))


class Norm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), or layer norm with bias, over the last dimension."""

    def __init__(self, size: int, spec: ModelSpec) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if spec.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows of a matrix by token; `first_row` says which token the first stored row belongs to (a slice of the vocabulary)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.rows, self.first_row = rows, 0

    def forward(self, tokens_T: Tensor) -> Tensor:
        stored = self.weight.shape[0]
        if stored == self.rows:
            return F.embedding(tokens_T, self.weight)
        index_T = tokens_T - self.first_row
        elsewhere_T = (index_T < 0) | (index_T >= stored)
        return F.embedding(index_T.masked_fill(elsewhere_T, 0), self.weight).masked_fill(elsewhere_T[:, None], 0)


class SelfAttention(Layer):
    def __init__(self, spec: ModelSpec, layer: int, boundary: Boundary, products: Linears) -> None:
        super().__init__(boundary, products)
        self.layer, self.head_dim = layer, spec.head_dim
        self.window = spec.window if layer in spec.window_layers else 0
        self.q_proj = Linear(spec.hidden, spec.q_size, spec.qkv_bias)
        self.k_proj = Linear(spec.hidden, spec.kv_size, spec.qkv_bias)
        self.v_proj = Linear(spec.hidden, spec.kv_size, spec.qkv_bias)
        self.o_proj = Linear(spec.q_size, spec.hidden, spec.out_bias)
        self.q_norm = Norm(spec.head_dim, spec) if spec.qk_norm else None
        self.k_norm = Norm(spec.head_dim, spec) if spec.qk_norm else None

    def forward(self, x_TD: Tensor, tables: tuple[Tensor, Tensor] | None, attention: Attention) -> Tensor:
        x_TD = self.boundary.enter(x_TD)
        projected = self.columns(x_TD, self.q_proj, self.k_proj, self.v_proj)
        q_THd, k_TKd, v_TKd = (y.view(x_TD.shape[0], -1, self.head_dim) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd, k_TKd = self.q_norm(q_THd), self.k_norm(k_TKd)
        if tables is not None:
            q_THd, k_TKd = rotary.rotate(q_THd, *tables), rotary.rotate(k_TKd, *tables)
        out_THd = attention(q_THd, k_TKd, v_TKd, layer=self.layer, window=self.window)
        return self.row(out_THd.flatten(1), self.o_proj)


class Mlp(Layer):
    def __init__(self, spec: ModelSpec, boundary: Boundary, products: Linears) -> None:
        super().__init__(boundary, products)
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_proj = Linear(spec.hidden, spec.ffn, spec.mlp_bias) if spec.gated_mlp else None
        self.up_proj = Linear(spec.hidden, spec.ffn, spec.mlp_bias)
        self.down_proj = Linear(spec.ffn, spec.hidden, spec.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = self.boundary.enter(x_TD)
        if self.gate_proj is None:
            (up_TF,) = self.columns(x_TD, self.up_proj)
            inner_TF = self.activation.forward(up_TF)
        else:
            gate_TF, up_TF = self.columns(x_TD, self.gate_proj, self.up_proj)
            inner_TF = gated(gate_TF, up_TF, self.activation)
        return self.row(inner_TF, self.down_proj)


class Block(nn.Module):
    """Norm, attention, norm, MLP, each pair added to the residual stream."""

    def __init__(self, spec: ModelSpec, layer: int, boundary: Boundary, products: Linears) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = Norm(spec.hidden, spec)
        self.self_attn = SelfAttention(spec, layer, boundary, products)
        self.post_attention_layernorm = Norm(spec.hidden, spec)
        self.mlp = Mlp(spec, boundary, products)

    def forward(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        attention: Attention,
        dropout: KeyedDropout | None = None,
    ) -> Tensor:
        update_TD = self.self_attn(self.input_layernorm(x_TD), tables, attention)
        x_TD = x_TD + (update_TD if dropout is None else dropout(update_TD, f"layers.{self.layer}.attention"))
        update_TD = self.mlp(self.post_attention_layernorm(x_TD))
        return x_TD + (update_TD if dropout is None else dropout(update_TD, f"layers.{self.layer}.mlp"))


class Trunk(nn.Module):
    """What Hugging Face calls `model`: everything but the head. Parts that a pipeline stage lacks are None or absent."""

    def __init__(self, spec: ModelSpec, boundary: Boundary, products: Linears) -> None:
        super().__init__()
        self.embed_tokens: Embedding | None = Embedding(spec.vocabulary, spec.hidden)
        self.embed_positions = Embedding(spec.positions, spec.hidden) if spec.rope is None else None
        self.layers = nn.ModuleDict(
            {str(layer): Block(spec, layer, boundary, products) for layer in range(spec.layers)}
        )
        self.norm: Norm | None = Norm(spec.hidden, spec)


class Decoder(nn.Module):
    """A whole decoder, or the part of it that one pipeline stage holds (`parallel/pipeline_stages.py` drops the rest)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.boundary, self.products = spec, Boundary(), Products()
        self.first = True
        """Whether the input is tokens (the first stage) or another stage's hidden states."""
        self.model = Trunk(spec, self.boundary, self.products)
        self.lm_head = None if spec.tied else Linear(spec.hidden, spec.vocabulary, False)

    def set_boundary(self, boundary: Boundary) -> None:
        for module in self.modules():
            if isinstance(module, Decoder | Layer):
                module.boundary = boundary

    def set_products(self, products: Linears, head: Products) -> None:
        """Those of the blocks, and those of the head."""
        self.products = head
        for module in self.modules():
            if isinstance(module, Layer):
                module.products = products

    def forward(
        self, input_T: Tensor, positions_T: Tensor, attention: Attention, dropout: KeyedDropout | None = None
    ) -> Tensor:
        """input_T: token ids (T,), or hidden states (T, D) on a later stage. Returns hidden states, normed on the last stage."""
        spec = self.spec
        hidden_TD = self.embed(input_T, positions_T, dropout) if self.first else input_T
        tables = None
        if spec.rope is not None and self.model.layers:
            cos, sin = rotary.tables(spec.rope, spec.head_dim, positions_T)
            tables = cos.to(hidden_TD.dtype), sin.to(hidden_TD.dtype)
        for block in self.model.layers.values():
            hidden_TD = block(hidden_TD, tables, attention, dropout)
        return hidden_TD if self.model.norm is None else self.model.norm(hidden_TD)

    def embed(self, tokens_T: Tensor, positions_T: Tensor, dropout: KeyedDropout | None) -> Tensor:
        assert self.model.embed_tokens is not None
        hidden_TD = self.boundary.leave(self.model.embed_tokens(tokens_T))
        if self.model.embed_positions is not None:
            hidden_TD = hidden_TD + self.model.embed_positions(self.boundary.local(positions_T))
        return hidden_TD if dropout is None else dropout(hidden_TD, "embedding")

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, D): its own, or the embedding's when tied."""
        if self.lm_head is not None:
            return self.lm_head.weight
        assert self.model.embed_tokens is not None
        return self.model.embed_tokens.weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) on one rank; training never forms them whole (see `model/loss.py`)."""
        return self.products.forward(hidden_TD, self.head_weight)
