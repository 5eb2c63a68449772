"""Hugging Face directories against `transformers`: every family read by slices, written, and refused where wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiveply.checkpoint import huggingface
from fiveply.checkpoint.huggingface import HuggingFaceSource, disk_names, disk_region, write
from fiveply.checkpoint.slices import slices_of
from fiveply.checkpoint.store import Checkpoint, save
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError, RunError
from fiveply.spec.placement import Placed, declare

SMALL: dict[str, Any] = {
    "vocab_size": 103, "hidden_size": 18, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied-biased": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=4, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=103, n_embd=12, n_layer=2, n_head=3, n_positions=16, n_inner=20),
}


def random_model(config: transformers.PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # norms and biases too: equal ones would hide a swap
    return model


def expected(name: str, state: dict[str, Tensor]) -> Tensor:
    """A decoder parameter out of transformers' state, written down anew for GPT-2."""
    if name in state:
        return state[name]
    rename = {
        "model.embed_tokens": "wte", "model.embed_positions": "wpe", "model.norm": "ln_f", "model.layers": "h",
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    for letter, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if projection in name:
            layer, kind = name.split(".")[2], name.split(".")[-1]
            fused = state[f"transformer.h.{layer}.attn.c_attn.{kind}"]
            return fused.chunk(3, dim=-1)[letter].t() if kind == "weight" else fused.chunk(3)[letter]
    disk_name = name
    for ours, theirs in rename.items():
        disk_name = disk_name.replace(ours, theirs)
    tensor = state[f"transformer.{disk_name}"]
    return tensor.t() if "c_" in disk_name and name.endswith("weight") else tensor


def assert_equal_by_slices(source: Any, state: dict[str, Tensor]) -> None:
    for parameter in declare(source.spec):
        wanted = expected(parameter.name, state)
        assert wanted.shape == parameter.shape
        start, size = tuple(n // 3 for n in wanted.shape), tuple(n - n // 3 - n // 4 for n in wanted.shape)
        where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        block = source.read(parameter.name, start, size)
        assert torch.equal(block, wanted[where]), parameter.name
        assert block.is_contiguous()
        assert torch.equal(source.read(parameter.name, (0,) * wanted.ndim, tuple(wanted.shape)), wanted)


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    model = random_model(CONFIGS[request.param])
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model.state_dict()


def whole(source: HuggingFaceSource) -> list[tuple[str, Tensor]]:
    """All tensors by disk name, put together from the decoder's parameters."""
    tensors = {name: torch.empty(shape) for name, shape in disk_names(source.spec).items()}
    for parameter in declare(source.spec):
        region = disk_region(source.spec, parameter.name, (0,) * len(parameter.shape), parameter.shape)
        block = source.read(parameter.name, (0,) * len(parameter.shape), parameter.shape)
        where = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
        tensors[region.name][where] = block.t() if region.transposed else block
    return list(tensors.items())


def assert_transformers_loads(folder: Path, state: dict[str, Tensor]) -> None:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_every_family_reads_by_slices_and_writes_what_transformers_loads(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, state = saved
    source = HuggingFaceSource(folder)
    source.check(source.spec)
    assert_equal_by_slices(source, state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if source.spec.tied:
        del shapes["lm_head.weight"]
    assert disk_names(source.spec) == shapes
    write(tmp_path / "out", source.spec, whole(source), {"tokenizer.json": b"{}"})
    assert_transformers_loads(tmp_path / "out", state)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_checkpoint_exports_to_what_transformers_loads(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, state = saved
    source = HuggingFaceSource(folder)
    slices = []
    for parameter in declare(source.spec):
        start, shape = (0,) * len(parameter.shape), parameter.shape
        flat = source.read(parameter.name, start, shape).flatten()
        placed = Placed(parameter, start, shape)
        slices += slices_of(placed, 0, flat, spec=source.spec)
        slices += slices_of(placed, 0, -flat, "optimizer.exp_avg.", source.spec)
    extra = {"config.json": (folder / "config.json").read_bytes(), "tokenizer.json": b"{}"}
    checkpoint = Checkpoint.open(save(tmp_path / "checkpoints", 3, slices, {}, extra))
    assert_equal_by_slices(checkpoint, state)
    huggingface.export(checkpoint, tmp_path / "out")
    assert_transformers_loads(tmp_path / "out", state)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shards_are_written_and_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    source = HuggingFaceSource(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert_equal_by_slices(source, model.state_dict())
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 5000)
    write(tmp_path / "ours", source.spec, whole(source))
    names = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert_transformers_loads(tmp_path / "ours", model.state_dict())
    assert_equal_by_slices(HuggingFaceSource(tmp_path / "ours"), model.state_dict())
    (tmp_path / "ours" / names[1]).unlink()
    with pytest.raises(InputError, match=rf"{names[1]}: no such file; fetch the missing shard"):
        HuggingFaceSource(tmp_path / "ours")


def test_gpt2_without_its_prefix_and_with_its_masks(tmp_path: Path) -> None:
    model = random_model(CONFIGS["gpt2"])
    model.save_pretrained(tmp_path)
    state = {name.removeprefix("transformer."): t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    state["h.0.attn.bias"], state["h.0.attn.masked_bias"] = torch.ones(1, 1, 16, 16), torch.tensor(-1e4)
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    assert_equal_by_slices(HuggingFaceSource(tmp_path), model.state_dict())


def test_a_tied_head_may_stand_on_disk(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama-tied-biased"])
    model.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    assert_equal_by_slices(HuggingFaceSource(tmp_path), model.state_dict())


def test_disk_region_on_odd_slices() -> None:
    gpt2 = ModelSpec.from_config(CONFIGS["gpt2"].to_dict())
    layer = "model.layers.1"
    attention, mlp = "transformer.h.1.attn", "transformer.h.1.mlp"
    cases: list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[object, ...]]] = [
        (f"{layer}.self_attn.q_proj.weight", (5, 3), (3, 7), (f"{attention}.c_attn.weight", (3, 5), (7, 3), True)),
        (f"{layer}.self_attn.k_proj.weight", (5, 3), (3, 7), (f"{attention}.c_attn.weight", (3, 17), (7, 3), True)),
        (f"{layer}.self_attn.v_proj.weight", (11, 0), (1, 12), (f"{attention}.c_attn.weight", (0, 35), (12, 1), True)),
        (f"{layer}.self_attn.v_proj.bias", (4,), (5,), (f"{attention}.c_attn.bias", (28,), (5,), False)),
        (f"{layer}.self_attn.o_proj.weight", (0, 4), (12, 4), (f"{attention}.c_proj.weight", (4, 0), (4, 12), True)),
        (f"{layer}.mlp.up_proj.weight", (7, 0), (13, 12), (f"{mlp}.c_fc.weight", (0, 7), (12, 13), True)),
        (f"{layer}.mlp.down_proj.bias", (0,), (12,), (f"{mlp}.c_proj.bias", (0,), (12,), False)),
        (f"{layer}.input_layernorm.weight", (1,), (2,), ("transformer.h.1.ln_1.weight", (1,), (2,), False)),
        ("model.embed_tokens.weight", (51, 0), (52, 12), ("transformer.wte.weight", (51, 0), (52, 12), False)),
        ("model.embed_positions.weight", (0, 0), (16, 12), ("transformer.wpe.weight", (0, 0), (16, 12), False)),
        ("model.norm.bias", (3,), (4,), ("transformer.ln_f.bias", (3,), (4,), False)),
        ("lm_head.weight", (2, 0), (3, 12), ("lm_head.weight", (2, 0), (3, 12), False)),
    ]
    for name, start, size, wanted in cases:
        assert tuple(disk_region(gpt2, name, start, size)) == wanted
    llama = ModelSpec.from_config(CONFIGS["llama"].to_dict())
    name = f"{layer}.self_attn.k_proj.weight"
    assert tuple(disk_region(llama, name, (5, 3), (3, 7))) == (name, (5, 3), (3, 7), False)


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_wrong_with_a_directory_is_named(tmp_path: Path) -> None:
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole_file, whole_config = file.read_bytes(), config.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            HuggingFaceSource(tmp_path)
        file.write_bytes(whole_file)
        config.write_bytes(whole_config)

    rewrite(tmp_path, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    refused(r"model.layers.1.mlp.up_proj.weight: this tensor is missing")
    rewrite(tmp_path, lambda state: state.update({"model.norm.weight": torch.ones(19)}))
    refused(r"model.norm.weight: shape \[19\], the model has \[18\]; give the config.json and the weights of one model")
    rewrite(tmp_path, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(18)}))
    refused(r"model.safetensors: model.layers.0.self_attn.q_proj.bias: the config's model has no such tensor")
    config.write_bytes(whole_config.replace(b'"vocab_size": 103', b'"vocab_size": 104'))
    refused(r"model.embed_tokens.weight: shape \[103, 18\], the model has \[104, 18\]")
    config.write_bytes(whole_config[:-3] + b',"quantization_config": {"bits": 4}}')
    refused(r"config.json: quantization_config: quantised weights")
    file.write_bytes(whole_file[:-100])
    refused(r"model.safetensors: not a whole safetensors file")
    file.write_bytes(b"")
    refused(r"model.safetensors: not a whole safetensors file")
    config.unlink()
    refused(r"no such preset, config.json or directory")
    file.unlink()
    with pytest.raises(InputError, match=r"holds no model.safetensors; give a directory with weights"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pickled \(.bin\), which is never loaded.*save it once as safetensors"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"model.safetensors.index.json: weight_map: not an index"):
        HuggingFaceSource(tmp_path)


def test_weights_of_another_model_and_incomplete_writes_are_refused(tmp_path: Path) -> None:
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path / "hf")
    source = HuggingFaceSource(tmp_path / "hf")
    with pytest.raises(InputError, match=r"shape \[103, 18\], the model has \[104, 18\]; these are weights of another"):
        source.check(ModelSpec.from_config(CONFIGS["llama"].to_dict() | {"vocab_size": 104}))
    with pytest.raises(InputError, match=r"model.embed_tokens.weight: .* lies outside the stored shape"):
        source.read("model.embed_tokens.weight", (100, 0), (4, 18))
    with pytest.raises(InputError, match=r"this tensor is missing"):
        write(tmp_path / "out", source.spec, whole(source)[:-1])
    with pytest.raises(InputError, match=r"hf: exists already"):
        write(tmp_path / "hf", source.spec, whole(source))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: .*Not a directory"):
        write(tmp_path / "file" / "out", source.spec, whole(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]
