"""Rotary tables against `transformers`' bit for bit, and the properties that make them rotary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fiveply.model.rotary import inverse_frequencies, rotate, tables
from fiveply.spec.architecture import ModelSpec, Rope

number = st.floats(1, 64).map(lambda x: round(x, 3))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """`transformers` has opinions on drawn factors."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """`rope_parameters` of a config.json."""
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    values: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e4, 5e5, 1234.5, 1e6]))}
    if kind == "default":
        return values
    values["factor"] = draw(number)
    if kind != "linear":
        values["original_max_position_embeddings"] = draw(st.integers(64, 10000))
    if kind == "llama3":
        low = draw(st.floats(1, 4))
        values |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 8))}
    if kind == "yarn":
        optional = {
            "attention_factor": st.floats(0.5, 2),
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.5, 4),
            "mscale": st.floats(0.1, 2),
            "mscale_all_dim": st.floats(0.1, 2),
            "truncate": st.booleans(),
        }
        values |= draw(st.fixed_dictionaries({}, optional=optional))
    return values


def config_of(rope: dict[str, Any], head_dim: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim, num_hidden_layers=1,
        intermediate_size=8, vocab_size=8, max_position_embeddings=20000, rope_parameters=rope,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(rope=ropes(), head_dim=st.integers(2, 70).map(lambda half: 2 * half))
def test_frequencies_equal_transformers_bit_for_bit(rope: dict[str, Any], head_dim: int) -> None:
    config = config_of(dict(rope), head_dim)
    if rope["rope_type"] == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        wanted, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        wanted, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
    spec = ModelSpec.from_config(config.to_dict())
    assert spec.rope is not None
    got, our_factor = inverse_frequencies(spec.rope, head_dim)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)
    assert our_factor == pytest.approx(factor, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(positions=st.lists(st.integers(0, 19999), min_size=1, max_size=9), theta=st.sampled_from([1e4, 5e5]))
def test_rotation_is_multiplication_by_a_complex_number(positions: list[int], theta: float) -> None:
    rope, head_dim = Rope(theta=theta), 8
    x = torch.randn(len(positions), 3, head_dim, dtype=torch.float64)
    cos, sin = tables(rope, head_dim, torch.tensor(positions))
    assert cos.shape == sin.shape == (len(positions), 1, head_dim // 2)
    out = rotate(x, cos.double(), sin.double())
    pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :]) * torch.complex(cos.double(), sin.double())
    torch.testing.assert_close(out, torch.cat((pairs.real, pairs.imag), -1))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_the_gradient_of_a_rotation() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(Rope(), 8, torch.arange(3))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos.double(), sin.double()), x)


def test_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        (qc, qs), (kc, ks) = (tables(Rope(), 64, torch.tensor([at])) for at in (i, j))
        return (rotate(q, qc.double(), qs.double()) * rotate(k, kc.double(), ks.double())).sum().item()

    assert product(0, 0) == pytest.approx((q * k).sum().item(), rel=1e-12)
    for shift in (1, 17, 500):
        assert product(30 + shift, 13 + shift) == pytest.approx(product(30, 13), abs=2e-3)
    assert product(30, 13) != pytest.approx(product(31, 13), abs=2e-3)


def test_scaling_stretches_positions() -> None:
    """Linear: position p under factor f is position p / f. YaRN and Llama 3 keep the fastest pair and stretch the slowest."""
    plain, _ = inverse_frequencies(Rope(), 64)
    linear, _ = inverse_frequencies(Rope(kind="linear", factor=4.0), 64)
    torch.testing.assert_close(linear * 4, plain)
    for rope in (
        Rope(kind="yarn", factor=4.0, original_positions=2048),
        Rope(kind="llama3", factor=4.0, original_positions=2048),
    ):
        scaled, _ = inverse_frequencies(rope, 64)
        torch.testing.assert_close(scaled[0], plain[0])
        torch.testing.assert_close(scaled[-1] * 4, plain[-1])
        assert (scaled <= plain * (1 + 1e-6)).all()
        assert (scaled >= plain / 4 * (1 - 1e-6)).all()
