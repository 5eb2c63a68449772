"""The lm-evaluation-harness against the server, unchanged: its sums of log-probabilities and its texts beside `transformers`'."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import add_tokenizer, greedy_by_transformers, save_random
from serve_process import serving

TASKS = Path(__file__).parents[2] / "recipes" / "lm_eval"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: docs/serving.md says how")
def test_scores_and_texts_are_those_of_transformers(tmp_path: Path) -> None:
    model = save_random("llama", tmp_path / "tiny", vocab_size=258, num_hidden_layers=3)
    tokenizer = add_tokenizer(tmp_path / "tiny")
    with serving(tmp_path / "tiny", "--layout", "pp=2") as server:
        asked = f"base_url={server.url}/v1/completions,model=tiny,tokenizer={tmp_path / 'tiny'},num_concurrent=4"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", asked]
        command += ["--tasks", "capitals,capitals_said", "--include_path", str(TASKS), "--limit", "6"]
        command += ["--log_samples", "--output_path", str(tmp_path / "out")]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=TASKS, env=os.environ | offline, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    scored = samples(tmp_path / "out", "capitals")
    assert len(scored) == 6
    for sample in scored:
        for argument, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, choice = (tokenizer.encode(argument[key]).tolist() for key in ("arg_0", "arg_1"))
            with torch.no_grad():
                logprobs = model(torch.tensor([context + choice])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
            wanted = logprobs.gather(1, torch.tensor(choice)[:, None]).sum()
            assert float(response[0][0]) == pytest.approx(float(wanted), abs=1e-4)
            assert str(response[0][1]) == str(logprobs.argmax(-1).tolist() == choice)
    said = samples(tmp_path / "out", "capitals_said")
    for sample in said:
        prompt = tokenizer.encode(sample["arguments"]["gen_args_0"]["arg_0"]).tolist()
        theirs = greedy_by_transformers(model, prompt, 12)
        theirs = theirs[: theirs.index(tokenizer.end)] if tokenizer.end in theirs else theirs
        assert sample["resps"][0][0] == re.split(r"[.\n]", tokenizer.decode(theirs))[0]


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = [one for one in folder.rglob("samples_*.jsonl") if one.name.startswith(f"samples_{task}_2")]
    return [json.loads(line) for line in file.read_text().splitlines()]
