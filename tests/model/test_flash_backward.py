"""Attention with the blocked backward: against float64, with grouped heads, masks and lengths that blocks don't divide."""

import pytest
import torch
import torch.nn.functional as F

from fiveply.model import flash_backward
from fiveply.model.attention import RowsAttention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [5, 128, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_float64(heads: int, kv_heads: int, length: int, masked: bool) -> None:
    torch.manual_seed(0)
    rows, size = 2, 16
    q, k, v = (
        torch.randn(rows, length, h, size).bfloat16().transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn(rows, heads, length, size).bfloat16()
    mask = None
    if masked:
        documents = torch.randint(0, 3, (rows, length)).sort(-1).values
        mask = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(length, length).tril().bool()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    expected.backward(grad.double())
    found = flash_backward.attention(q, k, v, mask)
    found.backward(grad)
    for name, one, other in [("output", found.detach(), expected.detach())] + [
        (name, x.grad, y.grad) for name, x, y in zip("qkv", (q, k, v), exact, strict=True)
    ]:
        assert float((one.double() - other).abs().max() / other.abs().max()) < 0.02, name


def test_rows_attention_takes_it_where_told() -> None:
    q, k, v = (torch.randn(12, 2, 8).bfloat16().requires_grad_() for _ in range(3))
    out = RowsAttention(3, blocked_backward=True)(q, k, v, layer=0, window=0)
    names = {type(out.grad_fn).__name__}
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "_AttentionBackward" in names
