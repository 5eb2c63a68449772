"""What stands beside fiveply in `serving.py`: each answers prompts of token ids greedily, in a process of its own.

A contender is made with a model's Hugging Face directory, a type and a folder of its own to convert into; `answer(prompts,
counts)` gives so many tokens for each prompt, whatever they are. Prompts of one call are together, at most TOGETHER at a time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

TOGETHER = 16
LONGEST = 512  # tokens of a prompt and its answer

Prompts = Sequence[Sequence[int]]
Answer = Callable[[Prompts, Sequence[int]], list[list[int]]]


def in_batches(prompts: Prompts, counts: Sequence[int], answer: Answer) -> list[list[int]]:
    """For who takes a batch as a whole: each until its longest answer ends, the rest of the others is for nothing."""
    told: list[list[int]] = []
    for first in range(0, len(prompts), TOGETHER):
        some = slice(first, first + TOGETHER)
        told += [
            tokens[:count] for tokens, count in zip(answer(prompts[some], counts[some]), counts[some], strict=True)
        ]
    return told


def _pretrained(model: Path, dtype: str) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    made = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    made.config.eos_token_id = None  # answers have the length that is asked for
    made.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return made


def transformers(model: Path, dtype: str, scratch: Path) -> Answer:
    """`generate`, prompts padded on the left."""
    import torch

    made = _pretrained(model, dtype)

    def batch(prompts: Prompts, counts: Sequence[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = made.generate(ids, attention_mask=mask, max_new_tokens=max(counts))
        return out[:, longest:].tolist()

    return lambda prompts, counts: in_batches(prompts, counts, batch)


def transformers_continuous(model: Path, dtype: str, scratch: Path) -> Answer:
    """Its continuous batching, kept running between calls."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    made = _pretrained(model, dtype)
    generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=LONGEST)
    made.generation_config = generation
    page = 32
    config = ContinuousBatchingConfig(
        page_size=page, num_blocks=(TOGETHER + 1) * LONGEST // page, max_batch_tokens=TOGETHER * 128,
        max_requests_per_batch=TOGETHER, allow_block_sharing=False,
    )  # fmt: skip
    manager = made.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
    manager.start()

    def answer(prompts: Prompts, counts: Sequence[int]) -> list[list[int]]:
        names = [
            manager.add_request(list(prompt), max_new_tokens=count)
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        told: dict[Any, list[int]] = {}
        while len(told) < len(names):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError(f"continuous batching ended: {manager.background_thread_status.fatal_error}")
            elif result.is_finished():
                told[result.request_id] = list(result.generated_tokens)
        return [told[name] for name in names]

    return answer


def ctranslate2(model: Path, dtype: str, scratch: Path) -> Answer:
    import ctranslate2 as library
    from ctranslate2.converters.transformers import LlamaLoader

    if dtype not in library.get_supported_compute_types("cpu"):
        raise NotImplementedError(f"has no {dtype} on this processor")
    made = _pretrained(model, "float32")
    spec, vocabulary, eps = LlamaLoader().get_model_spec(made), made.config.vocab_size, made.config.rms_norm_eps
    spec.register_vocabulary([f"t{token}" for token in range(vocabulary)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "t0"
    spec.config.layer_norm_epsilon = eps
    spec.validate()
    spec.optimize(quantization=dtype)
    spec.save(str(scratch))
    del made, spec
    generator = library.Generator(str(scratch), device="cpu", compute_type=dtype, intra_threads=_cores())

    def batch(prompts: Prompts, counts: Sequence[int]) -> list[list[int]]:
        longest = max(counts)
        results = generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts], max_batch_size=TOGETHER, beam_size=1,
            sampling_topk=1, min_length=longest, max_length=longest, include_prompt_in_result=False,
        )  # fmt: skip
        return [list(result.sequences_ids[0]) for result in results]

    return lambda prompts, counts: in_batches(prompts, counts, batch)


def _gguf_kind(dtype: str) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    return {"float32": kinds.F32, "bfloat16": kinds.BF16, "int8": kinds.Q8_0}[dtype]


def write_gguf(model: Path, dtype: str, file: Path) -> None:
    """A Llama of a Hugging Face directory for llama.cpp, without a vocabulary: it is asked in token ids."""
    import gguf
    from safetensors.torch import load_file

    from fiveply.spec.architecture import ModelSpec

    spec = ModelSpec.from_config(json.loads((model / "config.json").read_text()))
    assert spec.rope is not None
    kind = _gguf_kind(dtype)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(spec.positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.layers)
    for path in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            value, heads = (
                tensor.float().numpy(),
                {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.split(".")[-2]),
            )
            if heads:  # rotary pairs lie side by side there
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            theirs = names.get_name(name, try_suffixes=(".weight",))
            own = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(theirs, gguf.quants.quantize(np.ascontiguousarray(value), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model: Path, dtype: str, scratch: Path) -> Answer:
    """llama.cpp's library as its server uses it: free places are taken by the next prompts, in one batch with the others."""
    import ctypes

    import llama_cpp as library

    write_gguf(model, dtype, scratch / "model.gguf")
    library.llama_backend_init()
    quiet = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(quiet, ctypes.c_void_p(0))
    loaded = library.llama_model_load_from_file(
        str(scratch / "model.gguf").encode(), library.llama_model_default_params()
    )
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = TOGETHER * LONGEST, TOGETHER
    settings.n_batch = TOGETHER * LONGEST
    settings.n_threads = settings.n_threads_batch = _cores()
    settings.type_k = settings.type_v = _gguf_kind("float32" if dtype == "int8" else dtype).value
    context = library.llama_init_from_model(loaded, settings)
    memory = library.llama_get_memory(context)
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
    batch = library.llama_batch_init(TOGETHER * LONGEST, 0, 1)

    def answer(prompts: Prompts, counts: Sequence[int]) -> list[list[int]]:
        library.llama_memory_clear(memory, False)
        told: list[list[int]] = [[] for _ in prompts]
        coming, places = list(range(len(prompts)))[::-1], [-1] * TOGETHER
        while coming or any(place >= 0 for place in places):
            batch.n_tokens, rows = 0, {}
            for place, index in enumerate(places):
                if index < 0 and coming:
                    index = places[place] = coming.pop()
                    library.llama_memory_seq_rm(memory, place, -1, -1)
                if index >= 0:
                    tokens = told[index][-1:] or prompts[index]
                    first = len(prompts[index]) + len(told[index]) - 1 if told[index] else 0
                    for offset, token in enumerate(tokens):
                        at = batch.n_tokens
                        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, first + offset, 1
                        batch.seq_id[at][0], batch.logits[at] = place, offset == len(tokens) - 1
                        batch.n_tokens += 1
                    rows[place] = batch.n_tokens - 1
            if library.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            for place, row in rows.items():
                index = places[place]
                logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, row), (vocabulary,))
                told[index].append(int(logits.argmax()))
                if len(told[index]) == counts[index]:
                    places[place] = -1
        return told

    return answer


def fiveply(model: Path, dtype: str, layout: str, cases: TextIO, say: Callable[[dict[str, Any]], None]) -> None:
    """fiveply's driver and ranks as `fiveply serve` starts them, without HTTP; no cache of prompts."""
    import asyncio
    import time

    from fiveply import service
    from fiveply.serve.driver import Driver, Settings
    from fiveply.serve.messages import Sampling

    async def work(driver: Driver) -> None:
        await driver.ready.wait()

        async def one(prompt: list[int], count: int) -> list[int]:
            generation = driver.submit(prompt, count, Sampling())
            return [token async for piece in generation.pieces() for token in piece.tokens]

        say({"ready": True})
        while line := await asyncio.to_thread(cases.readline):
            case = json.loads(line)
            begun = time.perf_counter()
            answers = await asyncio.gather(*map(one, case["prompts"], case["counts"]))
            say({"seconds": time.perf_counter() - begun, "tokens": answers})

    types = ("auto", "int8") if dtype == "int8" else (dtype, "none")
    served = service.Served.load(model, layout, types[0], cache_tokens=TOGETHER * LONGEST, quantize=types[1])
    service.run(served, Settings(most_running=TOGETHER, reuse=False), work, apart=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


PEERS: dict[str, Callable[[Path, str, Path], Answer]] = {
    "transformers": transformers,
    "transformers continuous": transformers_continuous,
    "llama.cpp": llama_cpp,
    "CTranslate2": ctranslate2,
}
INT8 = {"llama.cpp": "Q8_0", "CTranslate2": "int8"}
"""Who has weights in 8 bits, and what it calls them."""


def attend(name: str, model: Path, dtype: str, scratch: Path) -> None:
    """This process is a contender: a case a line comes in, seconds and tokens go out."""
    import time

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    if name not in PEERS:
        layout, _, cores = name.partition(" on ")
        if cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
        fiveply(model, dtype, layout, sys.stdin, say)
        return
    try:
        answer = PEERS[name](model, dtype, scratch)
    except ImportError as error:
        say({"missing": f"not installed ({error.name})"})
        return
    except NotImplementedError as error:
        say({"missing": str(error)})
        return
    say({"ready": True})
    for line in sys.stdin:
        case = json.loads(line)
        begun = time.perf_counter()
        tokens = answer(case["prompts"], case["counts"])
        say({"seconds": time.perf_counter() - begun, "tokens": tokens})


if __name__ == "__main__":
    attend(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
