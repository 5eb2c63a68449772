"""Golden values: what one process computes at each model, so that a change which all layouts share is noticed.

A test of equality compares two layouts of the same code; initial values, batches, dropout masks or an optimiser that
change for both pass it. Whoever changes one on purpose writes the new numbers here: they also part old checkpoints from
new code. Seven digits, since tables of rotary positions are float32 and processors round their cosines unlike.
"""

from __future__ import annotations

import pytest
import torch
from prover import MODELS, Case, one_process

# Losses of two steps; norm of the second step's gradient, before clipping; sum of all parameters' magnitudes after both.
GOLDEN = {
    "llama": (6.9182477694, 6.9241225678, 1.7064086989, 6904.02440141),
    "few-kv": (6.9187940258, 6.9210276580, 1.7326583151, 5552.24451199),
    "qwen3": (6.2266616969, 6.2397256519, 1.1140088569, 3464.80200876),
    "gpt2": (6.2243133827, 6.2194137327, 1.8952676238, 4988.96193115),
    "qwen2": (6.2689473679, 6.2451358849, 1.6970916094, 5973.68604936),
    "mistral": (5.5646861576, 5.5784377153, 1.0400189624, 3299.53524233),
}


@pytest.mark.parametrize("model", MODELS)
def test_one_process_computes_what_it_did(model: str) -> None:
    trace = one_process(Case(model, "dp=1"))
    norm = torch.cat([gradient.ravel() for gradient in trace.gradients[1].values()]).norm()
    magnitude = sum(values.abs().sum() for values in trace.parameters.values())
    assert (*trace.losses, float(norm), float(magnitude)) == pytest.approx(GOLDEN[model], rel=1e-7)
