"""Head and cross-entropy in chunks against torch's, whole and with the vocabulary cut over threads that stand for ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fiveply.model import loss
from fiveply.model.loss import IGNORE, head_loss
from fiveply.spec.placement import part

T, D, V = 29, 7, 23


def inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hidden_TD, weight_VD = (torch.randn(T, D) * scale).to(dtype), torch.randn(V, D).to(dtype)
    targets_T = torch.randint(0, V, (T,))
    targets_T[::5] = IGNORE
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), targets_T


def reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients as torch computes them."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden_TD, weight_VD))
    value = F.cross_entropy(hidden @ weight.T, targets_T, reduction="sum", ignore_index=IGNORE)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 4, 10, T, 100])
def test_any_chunk_size_equals_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk * V)
    hidden_TD, weight_VD, targets_T = inputs()
    value = head_loss(hidden_TD, weight_VD, targets_T)
    value.backward()
    wanted = reference(hidden_TD, weight_VD, targets_T)
    for got, want in zip((value, hidden_TD.grad, weight_VD.grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_a_vocabulary_above_the_chunk_goes_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 5)
    hidden_TD, weight_VD, targets_T = inputs()
    torch.testing.assert_close(
        head_loss(hidden_TD, weight_VD, targets_T), reference(hidden_TD, weight_VD, targets_T)[0]
    )


def test_the_loss_own_gradient_scales_both() -> None:
    hidden_TD, weight_VD, targets_T = inputs()
    (head_loss(hidden_TD, weight_VD, targets_T) * -0.25).backward()
    _, hidden_grad, weight_grad = reference(hidden_TD, weight_VD, targets_T)
    torch.testing.assert_close(hidden_TD.grad, -0.25 * hidden_grad)
    torch.testing.assert_close(weight_VD.grad, -0.25 * weight_grad)


def test_gradients_are_the_slopes() -> None:
    """Central differences by hand: the graph is walked once only, which torch's gradcheck does not respect."""
    hidden_TD, weight_VD, targets_T = inputs()
    head_loss(hidden_TD, weight_VD, targets_T).backward()
    step = 1e-6
    for leaf in (hidden_TD, weight_VD):
        assert leaf.grad is not None
        with torch.no_grad():
            for index in range(0, leaf.numel(), 5):
                flat = leaf.view(-1)
                flat[index] += step
                above = head_loss(hidden_TD, weight_VD, targets_T)
                flat[index] -= 2 * step
                below = head_loss(hidden_TD, weight_VD, targets_T)
                flat[index] += step
                slope = ((above - below) / (2 * step)).item()
                assert leaf.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_only_what_is_asked_for_has_a_gradient(wanted: str) -> None:
    hidden_TD, weight_VD, targets_T = inputs()
    hidden_TD.requires_grad_(wanted == "hidden")
    weight_VD.requires_grad_(wanted == "weight")
    value = head_loss(hidden_TD, weight_VD, targets_T)
    expected, hidden_grad, weight_grad = reference(hidden_TD, weight_VD, targets_T)
    torch.testing.assert_close(value.detach(), expected)
    assert value.requires_grad == (wanted != "neither")
    if value.requires_grad:
        value.backward()
    for leaf, name, grad in ((hidden_TD, "hidden", hidden_grad), (weight_VD, "weight", weight_grad)):
        if name == wanted:
            torch.testing.assert_close(leaf.grad, grad)
        else:
            assert leaf.grad is None


def test_all_targets_ignored_is_zero_with_zero_gradients() -> None:
    hidden_TD, weight_VD, targets_T = inputs()
    value = head_loss(hidden_TD, weight_VD, torch.full_like(targets_T, IGNORE))
    value.backward()
    assert value.item() == 0
    for grad in (hidden_TD.grad, weight_VD.grad):
        assert grad is not None
        assert not grad.any()


def test_no_tokens_at_all() -> None:
    hidden_TD, weight_VD, targets_T = inputs()
    value = head_loss(hidden_TD[:0], weight_VD, targets_T[:0])
    value.backward()
    assert value.item() == 0
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


def test_large_logits_do_not_overflow() -> None:
    hidden_TD, weight_VD, targets_T = inputs(torch.float32, scale=300.0)
    value = head_loss(hidden_TD, weight_VD, targets_T)
    value.backward()
    assert value.isfinite()
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.isfinite().all()
    torch.testing.assert_close(value.detach(), reference(hidden_TD, weight_VD, targets_T)[0])


def test_bfloat16_sums_in_float32() -> None:
    hidden_TD, weight_VD, targets_T = inputs(torch.bfloat16)
    value = head_loss(hidden_TD, weight_VD, targets_T)
    value.backward()
    assert value.dtype == torch.float32
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.dtype == torch.bfloat16
    logits = (hidden_TD @ weight_VD.T).float()  # rounded to bfloat16, as the product itself is
    want = F.cross_entropy(logits, targets_T, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(value, want, rtol=1e-6, atol=0)


class ThreadReduction:
    """An all-reduce among threads: each waits at the barrier, reads what all put down, and waits again before the next."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.slots: list[Tensor | None] = [None] * ranks

    def __call__(self, rank: int, x: Tensor, largest: bool) -> None:
        self.slots[rank] = x.clone()
        self.barrier.wait()
        stacked = torch.stack([slot for slot in self.slots if slot is not None])
        self.barrier.wait()
        x.copy_(stacked.amax(0) if largest else stacked.sum(0))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_slices_of_the_vocabulary_equal_the_whole(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = part(V, ranks, 0)[1]
    assert V % ranks  # a smaller slice alone would make larger chunks than the others do
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 6 * largest)
    hidden_TD, weight_VD, targets_T = inputs()
    reduction = ThreadReduction(ranks)

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        first, rows = part(V, ranks, rank)
        hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden_TD, weight_VD[first : first + rows]))
        value = head_loss(
            hidden,
            weight,
            targets_T,
            first_row=first,
            largest_slice=largest,
            reduce_max=lambda x: reduction(rank, x, True),
            reduce_sum=lambda x: reduction(rank, x, False),
        )
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(run, range(ranks)))
    value, hidden_grad, weight_grad = reference(hidden_TD, weight_VD, targets_T)
    for got, _, _ in results:
        torch.testing.assert_close(got, value, rtol=1e-12, atol=0)
    # Each rank's hidden gradient is its slice's share: the boundary's backward adds them.
    torch.testing.assert_close(
        torch.stack([grad for _, grad, _ in results]).sum(0), hidden_grad, rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(torch.cat([grad for _, _, grad in results]), weight_grad, rtol=1e-11, atol=1e-13)
