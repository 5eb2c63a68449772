"""Checkpoints: any ranks save, any region is read, whatever is incomplete or damaged is invisible or named."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fiveply.checkpoint import huggingface, store
from fiveply.checkpoint.slices import Slice, read_flat, slices_of
from fiveply.checkpoint.store import Checkpoint, DamagedCheckpointError, all_complete, latest, prune, save
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError, RunError
from fiveply.spec.layout import Layout
from fiveply.spec.placement import Parameter, Placed, declare, part, place
from fiveply.world.launch import launch

GPT2 = {"model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 2, "vocab_size": 31, "n_positions": 16}
LLAMA = {
    "model_type": "llama", "hidden_size": 18, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 103,
    "intermediate_size": 25, "num_hidden_layers": 3, "tie_word_embeddings": True,
}  # fmt: skip
MOMENT = "optimizer.exp_avg."


def value(name: str, shape: tuple[int, ...], prefix: str = "") -> Tensor:
    generator = torch.Generator().manual_seed(hash_of(prefix + name))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def hash_of(text: str) -> int:
    return sum((index + 1) * byte for index, byte in enumerate(text.encode()))


def one_tensor(name: str = "a", rows: int = 6) -> list[Slice]:
    return [Slice(name, (rows, 4), (0, 0), value(name, (rows, 4)))]


def rank_slices(spec: ModelSpec, layout: Layout, rank: int) -> list[Slice]:
    """What a rank hands in: parameters from the first data-parallel rank, a moment in flat shards over all (zero=1)."""
    at = layout.coordinates(rank)
    slices: list[Slice] = []
    for placed in place(spec, layout, at.tp, at.pp):
        if not placed.counted:
            continue
        where = tuple(slice(a, a + n) for a, n in zip(placed.start, placed.size, strict=True))
        flat = value(placed.name, placed.parameter.shape)[where].flatten()
        if at.dp == 0:
            slices += slices_of(placed, 0, flat, spec=spec)
        lo, count = part(flat.numel(), layout.dp, at.dp)
        moment = value(placed.name, placed.parameter.shape, MOMENT)[where].flatten()[lo : lo + count]
        slices += slices_of(placed, lo, moment, MOMENT, spec)
    return slices


def save_whole(folder: Path, config: dict[str, object] = LLAMA, step: int = 1) -> Path:
    spec = ModelSpec.from_config(config)
    slices = rank_slices(spec, Layout(stages=(spec.layers,)), 0)
    return save(folder, step, slices, {}, {"config.json": msgspec.json.encode(config)})


LAYOUTS = ["dp=1", "dp=2,tp=2,zero=1", "tp=3,pp=2,stages=2+1", "dp=3,pp=1,zero=1"]


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("text", LAYOUTS)
def test_saved_under_any_layout_every_region_reads_back(tmp_path: Path, text: str, config: dict[str, object]) -> None:
    spec, layout = ModelSpec.from_config(config), Layout.parse(text)
    if layout.pp > 1 and spec.layers == 2:
        layout = Layout.parse(text.replace("stages=2+1", "stages=1+1"))
    elif layout.pp == 1:
        layout = msgspec.structs.replace(layout, stages=(spec.layers,))
    state = {"layout": str(layout), "cursor": 2**40, "random": [1, 2**63], "best_loss": 1.25}
    extra = {"config.json": msgspec.json.encode(config), "tokenizer.json": b"{}"}

    def rank_saves() -> str:
        return str(save(tmp_path, 100, rank_slices(spec, layout, dist.get_rank()), state, extra))

    path = Path(launch(rank_saves, layout.world, backend="gloo"))
    assert path == tmp_path / "step-00000100"
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    checkpoint.check(spec)
    assert checkpoint.step == 100
    assert checkpoint.state == state
    assert {n: s for n, s in checkpoint.stored.items() if not n.startswith(MOMENT)} == huggingface.disk_names(spec)
    for parameter in declare(spec):
        shape = parameter.shape
        start, size = tuple(n // 3 for n in shape), tuple(n - n // 3 - n // 5 for n in shape)
        where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        for prefix in ("", MOMENT):
            wanted = value(parameter.name, shape, prefix)
            assert torch.equal(checkpoint.read(parameter.name, (0,) * len(shape), shape, prefix=prefix), wanted)
            block = checkpoint.read(parameter.name, start, size, prefix=prefix)
            assert torch.equal(block, wanted[where])
            assert block.is_contiguous()
    name, shape = declare(spec)[0].name, declare(spec)[0].shape
    placed = Placed(declare(spec)[0], (0, 0), shape)
    flat = read_flat(lambda at, n: checkpoint.read(name, at, n, prefix=MOMENT), placed, 5, 61)
    assert torch.equal(flat, value(name, shape, MOMENT).flatten()[5:61])
    assert checkpoint.read(name, (0, 0), shape, torch.float64).dtype == torch.float64


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_region_over_any_cut(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    whole = torch.arange(rows * columns, dtype=torch.bfloat16).view(rows, columns)
    cuts = sorted({0, rows * columns, *data.draw(st.lists(st.integers(0, rows * columns), max_size=4))})
    placed = Placed(Parameter("w", (rows, columns), "u"), (0, 0), (rows, columns))
    slices = [piece for lo, hi in pairwise(cuts) for piece in slices_of(placed, lo, whole.flatten()[lo:hi])]
    checkpoint = Checkpoint.open(save(tmp_path_factory.mktemp("cut"), 1, slices, {}))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in (rows, columns))
    size = tuple(data.draw(st.integers(0, n - a)) for n, a in zip((rows, columns), start, strict=True))
    block = checkpoint.read_stored("w", start, size)
    assert torch.equal(block, whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])
    assert block.dtype == torch.bfloat16


def test_scalars_empty_tensors_and_one_rank_without_a_group(tmp_path: Path) -> None:
    scalar, empty = torch.tensor(3, dtype=torch.int64), torch.empty(0, 5)
    path = save(
        tmp_path, 7, [Slice("n", (), (), scalar), Slice("e", (0, 5), (0, 0), empty), *one_tensor()], {"x": None}
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.path == path
    assert checkpoint.read_stored("n", (), ()).item() == 3
    assert checkpoint.read_stored("e", (0, 0), (0, 5)).shape == (0, 5)
    assert checkpoint.stored.keys() == {"n", "e", "a"}
    # Whole tensors keep their names, so that any safetensors reader finds them.
    assert torch.equal(load_file(path / "rank-00000.safetensors")["a"], value("a", (6, 4)))
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(set(modes.values())) == 1, modes
    with pytest.raises(InputError, match=r"holds no config.json"):
        _ = checkpoint.spec


def refusal(folder: Path, slices: list[Slice], match: str) -> None:
    with pytest.raises(RunError, match=match):
        save(folder, 1, slices, {})
    assert list(folder.iterdir()) == []


def test_what_does_not_cover_a_tensor_exactly_is_refused(tmp_path: Path) -> None:
    def block(start: tuple[int, int], rows: int, columns: int = 4, dtype: torch.dtype = torch.float32) -> Slice:
        return Slice("a", (6, 4), start, torch.zeros(rows, columns, dtype=dtype))

    refusal(tmp_path, [block((0, 0), 4)], "a: 16 of 24 elements were handed in; a slice is missing")
    refusal(tmp_path, [block((0, 0), 4), block((3, 0), 3)], "overlap")
    refusal(tmp_path, [block((0, 0), 6, 2), block((0, 1), 6, 3)], "overlap")
    refusal(tmp_path, [block((0, 0), 3), block((0, 0), 3)], "stands twice")
    refusal(tmp_path, [block((0, 0), 3), block((4, 0), 3)], "reaches beyond")
    refusal(tmp_path, [block((0, 0), 3), block((3, 0), 3, dtype=torch.float64)], "disagree on dtype")


def test_a_missing_slice_of_another_rank_and_a_defect_fail_on_every_rank(tmp_path: Path) -> None:
    def outcome(action: str) -> str:
        rank = dist.get_rank()

        def slices() -> Iterator[Slice]:
            if rank == 2 and action == "defect":
                raise ZeroDivisionError("a defect")
            lo, count = part(6, 3, rank)
            if rank != 1 or action != "missing":
                yield Slice("a", (6, 4), (lo, 0), torch.zeros(count, 4))

        try:
            save(tmp_path, 3, slices(), {})
        except Exception as error:
            texts: list[str | None] = [None] * 3
            dist.all_gather_object(texts, f"{type(error).__name__}: {error}")
            return "\n".join(map(str, texts))
        return "saved"

    text = launch(outcome, 3, "missing", backend="gloo", timeout_seconds=60)
    line = "RunError: checkpoint not written: a: 16 of 24 elements were handed in; a slice is missing"
    assert text.splitlines() == [line] * 3
    first, second, third = launch(outcome, 3, "defect", backend="gloo", timeout_seconds=60).splitlines()
    assert first == second
    assert "rank 2: " in first
    assert "a defect" in first
    assert third == "ZeroDivisionError: a defect"
    assert list(tmp_path.iterdir()) == []
    assert launch(outcome, 3, "none", backend="gloo", timeout_seconds=60) == "saved"


def test_a_full_disk_on_one_rank_is_one_line_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, tensors: dict[str, Tensor]) -> None:
        if dist.get_rank() == 1:
            file.write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        huggingface.write_tensors(file, tensors)

    def rank_saves() -> list[str | None]:
        lo, count = part(6, 2, dist.get_rank())
        texts: list[str | None] = [None] * 2
        try:
            save(tmp_path, 3, [Slice("a", (6, 4), (lo, 0), torch.zeros(count, 4))], {})
        except RunError as error:
            dist.all_gather_object(texts, str(error))
        return texts

    monkeypatch.setattr(store, "write_tensors", full)
    texts = launch(rank_saves, 2, backend="gloo")
    file = tmp_path / "step-00000003.partial" / "rank-00001.safetensors"
    assert texts == [f"checkpoint not written: rank 1: {file}: No space left on device"] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("victim", ["tokenizer.json", "index.json"])
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    before = Path.mkdir

    def mkdir(self: Path, *args: object, **kwargs: bool) -> None:
        before(self, parents=True)
        (self / victim).symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(RunError, match=rf"checkpoint not written: .*{victim}: No space left on device$"):
        save(tmp_path, 1, one_tensor(), {}, {"tokenizer.json": b"{}"})
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_safetensors_is_worded_plainly(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=r"rank 0: .*rank-00000.safetensors: File too large$"):
            save(tmp_path, 1, one_tensor(rows=100), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.*: Not a directory"):
        save(tmp_path / "file", 1, one_tensor(), {})


def test_partial_and_foreign_directories_are_invisible(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    for step in (5, 100, 20):
        save(tmp_path, step, one_tensor(), {})
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "step-00000200.partial")
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-best").mkdir()
    assert [path.name for path in all_complete(tmp_path)] == [f"step-{step:08d}" for step in (100, 20, 5)]
    assert latest(tmp_path) == tmp_path / "step-00000100"
    for path in ("step-00000200.partial", "step-00000300", "nowhere"):
        with pytest.raises(InputError, match="no complete checkpoint"):
            Checkpoint.open(tmp_path / path)


def test_prune_keeps_the_newest_and_the_protected_and_clears_leftovers(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, one_tensor(), {}) for step in (1, 2, 3, 4, 5)]
    (tmp_path / "step-00000006.partial").mkdir()
    assert prune(tmp_path, keep=2, protect=[paths[1]]) == [paths[2], paths[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(paths[i].name for i in (1, 3, 4))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, one_tensor("a"), {})
    path = save(tmp_path, 1, one_tensor("b"), {})
    assert Checkpoint.open(path).stored.keys() == {"b"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_damage_is_named(tmp_path: Path) -> None:
    file = save(tmp_path, 1, one_tensor(), {}, {"tokenizer.json": b"{}"}) / "rank-00000.safetensors"
    flip(file, -3)
    checkpoint = Checkpoint.open(tmp_path)  # sizes are right
    with pytest.raises(RunError, match=r"rank-00000.safetensors: damaged \(its checksum differs\)"):
        checkpoint.verify()
    checkpoint.verify(rank=1, world=2)  # tokenizer.json
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"rank-00000.safetensors: \d+ bytes, \d+ were written"):
        Checkpoint.open(tmp_path)
    with pytest.raises(RunError, match=r"rank-00000.safetensors: damaged"):
        checkpoint.read_stored("a", (0, 0), (6, 4))
    file.unlink()
    with pytest.raises(RunError, match=r"rank-00000.safetensors: missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_damaged_index_is_named(tmp_path: Path, cut: int) -> None:
    index = save(tmp_path, 1, one_tensor(), {"loss": 1.5}) / "index.json"
    whole = index.read_bytes()
    index.write_bytes(whole[:cut])
    with pytest.raises(DamagedCheckpointError, match=r"index.json: damaged"):
        Checkpoint.open(tmp_path)
    index.write_bytes(whole.replace(b"1.5", b"1.7"))
    with pytest.raises(DamagedCheckpointError, match=r"index.json: damaged \(its checksum differs\)"):
        Checkpoint.open(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, one_tensor(), {})
    monkeypatch.setattr(store, "VERSION", 0)
    with pytest.raises(InputError, match=r"format is fiveply-checkpoint version 1.*up to version 0"):
        Checkpoint.open(tmp_path)


def test_the_newest_intact_one_is_found_by_all_ranks_together(tmp_path: Path) -> None:
    paths = [save_whole(tmp_path, step=step) for step in (1, 2, 3)]
    flip(paths[2] / "config.json", 5)
    flip(paths[1] / "index.json", 30)

    def find() -> list[object]:
        checkpoint, problems = store.open_newest_intact(tmp_path)
        assert checkpoint is not None
        outcomes: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (checkpoint.step, problems))
        return outcomes

    outcomes = launch(find, 3, backend="gloo")
    assert outcomes == [outcomes[0]] * 3
    step, problems = outcomes[0]
    assert step == 1
    assert [str(paths[2] / "config.json") in problems[0], str(paths[1] / "index.json") in problems[1]] == [True, True]
    assert store.open_newest_intact(tmp_path / "nowhere") == (None, [])


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_whole(tmp_path))
    other = ModelSpec.from_config(LLAMA | {"intermediate_size": 26})
    with pytest.raises(
        InputError, match=r"model.layers.0.mlp.gate_proj.weight: shape \[25, 18\], the model has \[26, 18\]"
    ):
        checkpoint.check(other)
    with pytest.raises(InputError, match=r"lm_head.weight: this tensor is missing"):
        checkpoint.check(ModelSpec.from_config(LLAMA | {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match=r"lies outside the stored shape"):
        checkpoint.read("model.norm.weight", (0,), (19,))
    with pytest.raises(InputError, match=r"model.norm.bias: no such tensor"):
        checkpoint.read("model.norm.bias", (0,), (1,))
