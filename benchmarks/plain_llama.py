"""A Llama as plain PyTorch usually writes it: what the peers of `training.py` train. Names of layers are for their plans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiveply.spec.architecture import ModelSpec


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.wq = nn.Linear(spec.hidden, spec.q_size, bias=False)
        self.wk = nn.Linear(spec.hidden, spec.kv_size, bias=False)
        self.wv = nn.Linear(spec.hidden, spec.kv_size, bias=False)
        self.wo = nn.Linear(spec.q_size, spec.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for layer in (self.wq, self.wk, self.wv)
        )
        q, k = (y * cos + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * sin for y in (q, k))
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.hidden, spec.ffn, bias=False)
        self.w2 = nn.Linear(spec.ffn, spec.hidden, bias=False)
        self.w3 = nn.Linear(spec.hidden, spec.ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(spec.hidden), nn.RMSNorm(spec.hidden)
        self.attention, self.feed_forward = Attention(spec), FeedForward(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """(rows, sequence) tokens to (rows, sequence, vocabulary) logits; a stage of a pipeline has some layers, and the ends or not."""

    def __init__(self, spec: ModelSpec, sequence: int, layers: range | None = None) -> None:
        super().__init__()
        layers = range(spec.layers) if layers is None else layers
        self.embed = nn.Embedding(spec.vocabulary, spec.hidden) if layers[0] == 0 else None
        self.layers = nn.ModuleDict({str(layer): Block(spec) for layer in layers})
        last = layers[-1] == spec.layers - 1
        self.norm = nn.RMSNorm(spec.hidden) if last else None
        self.output = nn.Linear(spec.hidden, spec.vocabulary, bias=False) if last else None
        assert spec.rope is not None
        powers = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim
        angles = torch.outer(torch.arange(sequence).float(), spec.rope.theta**-powers).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        return x if self.output is None or self.norm is None else self.output(self.norm(x))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
