"""The comparison can fail: faults of the kind that other frameworks had are planted, and each must be found and named.

A fault is planted here in the parent by monkeypatching, after one process's trace was taken, and the ranks fork with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prover import Case, one_process, prove

from fiveply.corpus.batches import Batches
from fiveply.equality import SEQUENCE, verification_batches
from fiveply.model import decoder, dropout
from fiveply.parallel import initialize, parallelize, tensor_parallel
from fiveply.parallel.data_parallel import GradientReducer, Unit
from fiveply.spec import placement
from fiveply.train.job import Job
from fiveply.train.optimizer import SegmentOptimizer
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Transport

Plant = Callable[[pytest.MonkeyPatch], None]
Found = Callable[[Case, Plant], dict[str, Any]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, transport: Transport) -> Found:
    """The comparison under the fault; without it the case passes."""

    def compared(case: Case, plant: Plant) -> dict[str, Any]:
        one_process(case)
        with monkeypatch.context() as patch:
            plant(patch)
            result = prove([case], transport)[0]
        assert not result["pass"], f"{case}: the fault went unnoticed"
        return result

    return compared


def skip_sum_over(axis: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = GradientReducer._sum_shared

        def faulty(self: GradientReducer, over: Axis | None, belongs: Any) -> None:
            if over is None or over is not getattr(self.mesh, axis):
                sound(self, over, belongs)

        patch.setattr(GradientReducer, "_sum_shared", faulty)

    return plant


@pytest.mark.parametrize("layout", ["pp=2", "pp=3,schedule=zb", "pp=2,schedule=interleaved"])
def test_gradients_of_tied_copies_not_added(layout: str, found: Found) -> None:
    result = found(Case("few-kv", layout), skip_sum_over("tied"))
    assert result["worst"]["gradients"] == "model.embed_tokens.weight"
    assert result["max_difference"]["gradients"] > 1e-3


@pytest.mark.parametrize("layout", ["tp=2", "dp=2,zero=3,tp=2"])
def test_partial_gradients_of_norms_not_added_under_sequence_parallelism(layout: str, found: Found) -> None:
    result = found(Case("few-kv", layout), skip_sum_over("tp"))
    assert "norm" in result["worst"]["gradients"]


def test_partial_gradients_of_query_and_key_norms_not_added(found: Found) -> None:
    result = found(Case("qwen3", "tp=2,sp=0"), skip_sum_over("tp"))
    assert result["worst"]["gradients"].endswith(("q_norm.weight", "k_norm.weight"))


def test_gradients_of_key_value_heads_held_twice_not_added(found: Found) -> None:
    result = found(Case("few-kv", "tp=4"), skip_sum_over("kv"))
    assert result["worst"]["gradients"].endswith(("k_proj.weight", "v_proj.weight"))


@pytest.mark.parametrize("layout", ["dp=2", "dp=2,zero=1", "dp=2,zero=2,micro_batch=2", "dp=2,zero=3"])
def test_gradients_averaged_over_replicas_instead_of_added(layout: str, found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = GradientReducer.finish

        def reduced(self: GradientReducer) -> None:
            sound(self)
            for unit in self.units:
                unit.grad /= self.mesh.layout.dp

        patch.setattr(GradientReducer, "finish", reduced)

    result = found(Case("llama", layout), plant)
    assert result["max_difference"]["gradients"] == pytest.approx(0.5, rel=1e-2)
    # Clipping divides the fault out again, so losses and parameters hardly tell: gradients must be compared.
    assert max(result["max_difference"][kind] for kind in ("loss", "parameters")) < 1e-6


def test_scaled_by_shard_groups_under_hybrid_sharding(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = Axis.all_reduce

        def faulty(self: Axis, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            work = sound(self, x, *args, **kwargs)
            if self.name == "replica":
                if work is not None:
                    work.wait()
                x /= self.size
            return work

        patch.setattr(Axis, "all_reduce", faulty)

    result = found(Case("llama", "dp=4,zero=3,dp_shard=2"), plant)
    assert result["max_difference"]["gradients"] == pytest.approx(0.5, rel=1e-2)


def test_divided_by_all_tokens_instead_of_targets(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Batches, "target_tokens", lambda self, start, count: count * self.sequence)

    result = found(Case("llama", "dp=2"), plant)
    assert 0.01 < result["max_difference"]["loss"] < 0.1
    assert 0.01 < result["max_difference"]["gradients"] < 0.1


@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "dp=1,micro_batch=3"])
def test_mean_of_means_of_micro_batches(layout: str, found: Found) -> None:
    """A micro-batch's loss divided by its own number of targets, then the mean over them: right for equal numbers alone."""
    case = Case("llama", layout)
    targets_of_step = verification_batches(case.spec, case.run).target_tokens(0, case.rows)

    def plant(patch: pytest.MonkeyPatch) -> None:
        head = tensor_parallel.head_loss

        def mean(hidden_TD: Any, weight: Any, targets_T: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            share = len(targets_T) / (case.rows * SEQUENCE)
            own = head(hidden_TD, weight, targets_T, **kwargs) / (targets_T >= 0).sum()
            return own * share * targets_of_step  # which the job divides by

        patch.setattr(tensor_parallel, "head_loss", mean)

    assert found(case, plant)["max_difference"]["gradients"] > 1e-4


def test_never_divided_by_tokens(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = Job.gradients

        def faulty(self: Job, *args: Any, **kwargs: Any) -> Any:
            sums = sound(self, *args, **kwargs)
            object.__setattr__(sums, "tokens", 1)
            return sums

        patch.setattr(Job, "gradients", faulty)

    assert found(Case("llama", "dp=2"), plant)["max_difference"]["gradients"] > 100


@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "pp=2"])
def test_dropout_keyed_by_rank(layout: str, found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = dropout.KeyedDropout.__init__

        def faulty(self: Any, rate: float, seed: int, step: int, tokens_T: Any) -> None:
            sound(self, rate, seed + dist.get_rank(), step, tokens_T)

        patch.setattr(dropout.KeyedDropout, "__init__", faulty)

    result = found(Case("gpt2", layout), plant)
    assert result["max_difference"]["loss"] > 1e-6
    assert result["worst"]["loss"].startswith("step")
    assert result["max_difference"]["initial_parameters"] == 0


def test_the_same_dropout_in_every_step_of_a_run_is_another_run(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = dropout.KeyedDropout.__init__

        def faulty(self: Any, rate: float, seed: int, step: int, tokens_T: Any) -> None:
            sound(self, rate, seed, 0, tokens_T)

        patch.setattr(dropout.KeyedDropout, "__init__", faulty)

    assert found(Case("gpt2", "dp=2"), plant)["worst"]["loss"] == "step 2"


@pytest.mark.parametrize("layout", ["tp=3", "pp=2", "dp=2,zero=3"])
def test_initial_values_keyed_by_rank(layout: str, found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = initialize.initial_value

        def faulty(placed: Any, spec: Any, seed: int, dtype: Any) -> torch.Tensor:
            return sound(placed, spec, seed + dist.get_rank(), dtype)

        patch.setattr(parallelize, "initial_value", faulty)

    result = found(Case("llama", layout), plant)
    assert result["max_difference"]["initial_parameters"] > 1
    assert result["worst"]["initial_parameters"].endswith("weight")


def test_initial_values_that_differ_in_the_last_bit(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = initialize.initial_value

        def faulty(placed: Any, *args: Any) -> torch.Tensor:
            value = sound(placed, *args)
            if placed.name == "model.layers.3.mlp.down_proj.weight":
                value[5, 1] *= 1 + 2**-52
            return value

        patch.setattr(parallelize, "initial_value", faulty)

    result = found(Case("llama", "dp=2"), plant)
    assert result["worst"]["initial_parameters"] == "model.layers.3.mlp.down_proj.weight"
    assert max(result["max_difference"].values()) < 1e-9


@pytest.mark.parametrize("layout", ["pp=2", "pp=4,schedule=zb"])
def test_a_stage_that_loses_its_last_layer(layout: str, found: Found) -> None:
    """30 layers on 4 stages silently trained 28."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = placement.stage_units

        def faulty(spec: Any, stages: Any, stage: int) -> list[str]:
            units = sound(spec, stages, stage)
            return [unit for unit in units if stage != 0 or unit != f"layers.{stages[0] - 1}"]

        patch.setattr(placement, "stage_units", faulty)
        patch.setattr(parallelize, "stage_units", faulty)

    case = Case("llama", layout)
    lost = case.resolved().stages[0] - 1
    result = found(case, plant)
    for kind in ("initial_parameters", "gradients", "parameters"):
        assert result["max_difference"][kind] == float("inf")
        assert result["worst"][kind].startswith(f"model.layers.{lost}.")


def test_a_layer_that_is_skipped_though_it_is_held(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = parallelize.stage_of_decoder

        def faulty(spec: Any, units: Any, *, first: bool) -> Any:
            made = sound(spec, units, first=first)
            made.model.layers["1"].forward = lambda x, *_: x
            return made

        patch.setattr(parallelize, "stage_of_decoder", faulty)

    result = found(Case("llama", "dp=2"), plant)
    assert result["worst"]["gradients"].startswith("model.layers.")
    assert result["max_difference"]["gradients"] >= 1


def test_a_rank_that_counts_its_norm_twice_clips_differently(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        def everything(self: SegmentOptimizer) -> torch.Tensor:
            return torch.stack([s.grad.square().sum() for s in self.segments]).sum().double()

        patch.setattr(SegmentOptimizer, "square_norm", everything)

    result = found(Case("few-kv", "tp=4"), plant)
    assert result["max_difference"]["parameters"] > 1e-9


@pytest.mark.parametrize("layout", ["dp=2,zero=1", "dp=2,zero=2"])
def test_parameters_not_gathered_after_the_step(layout: str, found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Unit, "updated", lambda self: None)

    result = found(Case("llama", layout), plant)
    assert result["worst"]["loss"] == "step 2"


def test_a_vocabulary_cut_off_by_one(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = tensor_parallel.VocabularyHead.__init__

        def faulty(self: Any, made: decoder.Decoder, axis: Axis | None) -> None:
            sound(self, made, axis)
            self.first_row = axis.index * (made.spec.vocabulary // axis.size) if axis else 0

        patch.setattr(tensor_parallel.VocabularyHead, "__init__", faulty)

    result = found(Case("few-kv", "tp=2"), plant)
    assert result["max_difference"]["loss"] > 1e-6


def test_micro_batches_sent_in_another_order(found: Found) -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = Job._micro_batches

        def faulty(self: Job, *args: Any) -> Any:
            batches = sound(self, *args)
            return batches if self.mesh.at.pp == 0 else [batches[1], batches[0], *batches[2:]]

        patch.setattr(Job, "_micro_batches", faulty)

    assert found(Case("llama", "pp=2"), plant)["max_difference"]["loss"] > 1e-6


def test_sound_ranks_pass_where_faults_were_planted(transport: Transport) -> None:
    cases = [Case("few-kv", "tp=4"), Case("few-kv", "dp=2,zero=3,tp=2"), Case("llama", "dp=4,zero=3,dp_shard=2")]
    assert all(result["pass"] for result in prove(cases, transport))
