"""Learning-rate schedules, what decays and what does not, and plain gradient steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fiveply.corpus.batches import Batches, TokenFile
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.run import Data, Optimizer, RunSpec, Train
from fiveply.train.job import Job
from fiveply.train.optimizer import learning_rate
from fiveply.world.device import find
from fiveply.world.launch import launch
from fiveply.world.mesh import Mesh

CONFIGS = Path(__file__).parents[1] / "configs"
FLOAT64 = Dtypes(torch.float64, torch.float64, torch.float64)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(find()), "threads_for", lambda self, ranks: 1)


def rates(steps: int, **keys: object) -> list[float]:
    return [learning_rate(Optimizer(lr=2.0, **keys), step, steps) for step in range(steps)]  # type: ignore[arg-type]


def test_warm_up_rises_by_equal_steps_to_the_peak() -> None:
    assert rates(10, warmup=4, schedule="constant") == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]
    assert rates(3, warmup=0, schedule="constant") == [2.0, 2.0, 2.0]


def test_cosine_starts_at_the_peak_is_half_way_in_the_middle_and_never_falls_below_its_floor() -> None:
    spec = Optimizer(lr=2.0, warmup=10, schedule="cosine", final_share=0.1)
    assert learning_rate(spec, 10, 110) == pytest.approx(2.0)
    assert learning_rate(spec, 60, 110) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(spec, 110, 110) == pytest.approx(0.2)
    assert learning_rate(spec, 500, 110) == pytest.approx(0.2)
    falling = rates(110, warmup=10, schedule="cosine")[10:]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))


def test_wsd_is_flat_and_falls_over_its_share_alone() -> None:
    spec = Optimizer(lr=2.0, warmup=0, schedule="wsd", decay_share=0.2, final_share=0.5)
    assert {learning_rate(spec, step, 100) for step in range(80)} == {2.0}
    assert learning_rate(spec, 90, 100) == pytest.approx(2.0 * (0.5 + 0.5 * 0.5))
    assert learning_rate(spec, 100, 100) == pytest.approx(1.0)
    assert learning_rate(spec, 300, 100) == pytest.approx(1.0)
    assert set(rates(20, warmup=0, schedule="wsd", decay_share=0.0)) == {2.0}


def test_warm_up_longer_than_the_run_is_no_error() -> None:
    assert rates(3, warmup=30, schedule="cosine") == pytest.approx([2 / 30, 4 / 30, 6 / 30])


def job(family: str, **optimizer: object) -> Job:
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    spec = ModelSpec.from_config(config, where=family)
    layout = resolve(Layout.parse("dp=1", "layout"), spec, sequence=16, global_batch=4)
    run = RunSpec(
        name="x",
        data=Data(sequence=16),
        train=Train(steps=4, global_batch=4),
        optimizer=Optimizer(**optimizer),  # type: ignore[arg-type]
    )
    return Job(run, spec, Mesh(layout, spec), FLOAT64)


def groups(name: str, **optimizer: object) -> tuple[set[str], set[str]]:
    """Names of the parameters that decay, and of those that do not."""

    def on_rank() -> tuple[set[str], set[str]]:
        made = job(name, **optimizer).optimizer
        names = {id(value): s.placed.name for s, value in zip(made.segments, made._values, strict=True)}
        decayed: set[str] = set()
        plain: set[str] = set()
        for group in made.torch.param_groups:
            assert group["weight_decay"] in (0.0, 0.1)
            (decayed if group["weight_decay"] else plain).update(names[id(value)] for value in group["params"])
        return decayed, plain

    return launch(on_rank, 1, backend="gloo")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_norms_biases_and_embeddings_do_not_decay(name: str) -> None:
    decayed, plain = groups(name)
    assert not decayed & plain
    assert decayed
    assert all("norm" not in key and not key.endswith("bias") and "embed" not in key for key in decayed)
    assert all("norm" in key or key.endswith("bias") or "embed" in key or "position" in key for key in plain)
    assert any("norm" in key for key in plain)
    assert any("embed" in key for key in plain)


def test_everything_decays_when_asked() -> None:
    decayed, plain = groups("llama", decay_all=True)
    assert not plain
    assert any("norm" in key for key in decayed)
    assert any("embed" in key for key in decayed)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_sgd_steps_along_the_mean_gradient_clipped_by_its_global_norm(clip: float) -> None:
    def on_rank() -> None:
        made = job("llama", name="sgd", lr=0.5, warmup=0, schedule="constant", weight_decay=0.0, clip=clip)
        file = TokenFile("numbers", np.arange(400) % 89, np.array([0, 400]))
        batches = Batches([file], sequence=16, global_batch=4, seed=0)
        before = [segment.value.detach().clone() for segment in made.optimizer.segments]
        sums = made.gradients(batches, 0)
        assert sums.tokens == 4 * 16
        means = [segment.grad.clone() / sums.tokens for segment in made.optimizer.segments]
        norm = torch.cat([mean.flatten() for mean in means]).norm().item()
        assert sums.norm == pytest.approx(norm, rel=1e-12)
        made.update(sums, 0)
        shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        assert (shrink < 1) == bool(clip)
        for old, mean, segment in zip(before, means, made.optimizer.segments, strict=True):
            torch.testing.assert_close(segment.value.detach(), old - 0.5 * shrink * mean, rtol=1e-12, atol=1e-15)
        assert made.optimizer.torch.param_groups[0]["lr"] == 0.5
        assert [name for name, _, _ in made.optimizer.state()] == ["master"] * len(made.optimizer.segments)

    launch(on_rank, 1, backend="gloo")
