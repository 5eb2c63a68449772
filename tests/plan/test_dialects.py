"""Layouts in other systems' words: what is written is read back, what a system has not is refused, and their own parsers agree."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fiveply.plan import dialects
from fiveply.plan.dialects import megatron
from fiveply.plan.dialects.facts import facts_of, pattern, stage_layout
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import CHOICES, Layout, divisors
from fiveply.spec.legality import resolve
from fiveply.spec.placement import declare

MODELS = ["llama-3.1-8b", "llama-3.1-405b", "qwen3-8b", "mixtral-8x7b", "qwen3-235b-a22b", "gpt-oss-120b", "gpt3-175b",
          "deepseek-v3", "1b"]  # fmt: skip
SPECS = {name: ModelSpec.load(name) for name in MODELS}
BATCH: dict[str, Any] = {"sequence": 2048, "global_batch": 64, "precision": "bf16"}


def resolved(text: str, model: str = "llama-3.1-8b", *, sequence: int = 2048, global_batch: int = 64) -> Layout:
    layout = Layout.parse(text)
    return resolve(layout, SPECS[model], sequence=sequence, global_batch=global_batch, runtime=False)


def emitted(system: str, text: str, model: str = "llama-3.1-8b", *, global_batch: int = 64) -> str:
    layout = resolved(text, model, global_batch=global_batch)
    return dialects.emit(system, facts_of(layout, SPECS[model], **BATCH | {"global_batch": global_batch}))[0]


def in_force(layout: Layout) -> dict[str, Any]:
    """What a resolved layout says, however it says it."""
    names = ("dp", "tp", "pp", "cp", "ep", "zero", "schedule", "micro_batch", "recompute", "offload", "stages", "chunks",
             "shard_ranks", "sequence_parallel", "expert_tensor")  # fmt: skip
    return {name: getattr(layout, name) for name in names} | {"cp_kind": layout.cp_kind if layout.cp > 1 else ""}


@st.composite
def jobs(draw: st.DrawFn, system: str) -> tuple[str, Layout, int, int]:
    """A model, a legal resolved layout of it, mostly one that the system has, sequence and batch."""
    model = draw(st.sampled_from(MODELS))
    spec, has = SPECS[model], dialects.choices(system)
    options: dict[str, list[Any]] = {
        "dp": [1, 2, 4, 6, 8], "tp": [1, 2, 4], "pp": [1, 2, 3, 4], "cp": [1, 1, 2], "zero": [0, 0, 1, 1, 2, 3],
        "schedule": [*CHOICES["schedule"]], "recompute": [*CHOICES["recompute"]], "offload": [*CHOICES["offload"]],
        "cp_kind": [*CHOICES["cp_kind"]], "sp": [-1, 0],
    }  # fmt: skip
    if spec.experts:
        options |= {"ep": [1, 2, 4, 8], "etp": [0, 1, 2]}
    values = {
        key: draw(st.sampled_from([one for one in some if one in has.get(key, some)])) for key, some in options.items()
    }
    if values["zero"] > 1 and system == "megatron":
        values["pp"] = 1
    if values["zero"] and draw(st.booleans()):
        values["dp_shard"] = draw(st.sampled_from(divisors(values["dp"])))
    if values["schedule"] == "interleaved":
        values["vp"] = draw(st.sampled_from([2, 3, 4]))
    if draw(st.booleans()):
        count = values["pp"] * Layout(schedule=values["schedule"], vp=values.get("vp", 0)).chunks
        cuts = sorted(draw(st.sets(st.integers(1, spec.layers - 1), min_size=count - 1, max_size=count - 1)))
        values["stages"] = tuple(b - a for a, b in zip([0, *cuts], [*cuts, spec.layers], strict=True))
    batch = values["dp"] * draw(st.sampled_from([4, 8, 12]))
    sequence = draw(st.sampled_from([1024, 2048]))
    try:
        layout = resolve(Layout(**values), spec, sequence=sequence, global_batch=batch, runtime=False)
    except InputError:
        assume(False)
        raise
    return model, layout, sequence, batch


@settings(max_examples=150, deadline=None)
@given(jobs("megatron"), st.sampled_from(["bf16", "fp16", "fp8", "fp32"]), st.sampled_from(["", "tp,cp,pp,dp"]))
def test_megatron_arguments_mean_the_layout_they_were_written_from(
    job: tuple[str, Layout, int, int], precision: str, order: str
) -> None:
    model, layout, sequence, batch = job
    spec = SPECS[model]
    try:
        facts = facts_of(layout, spec, sequence=sequence, global_batch=batch, precision=precision, order=order,
                         devices_per_node=math.gcd(layout.world, 8))  # fmt: skip
        text, _ = dialects.emit("megatron", facts)
    except InputError as error:
        text, refused = "", error
    else:
        refused = None
    if refused:
        assert "Megatron-LM" in refused.problem
        assert refused.fix
        return
    given = megatron.read(text)
    assert in_force(given.layout) == in_force(layout)
    assert (given.sequence, given.global_batch, given.precision, given.notes) == (sequence, batch, precision, ())
    assert given.order == (order or "tp,cp,dp,pp")
    assert [(p.name, p.shape) for p in declare(given.spec)] == [(p.name, p.shape) for p in declare(spec)]
    for name in (
        "positions",
        "window",
        "window_layers",
        "experts",
        "latent",
        "predicted",
        "tied",
        "dropout",
        "norm_eps",
    ):
        assert getattr(given.spec, name) == getattr(spec, name), name


@pytest.mark.parametrize("system", ["torchtitan", "deepspeed", "accelerate", "vllm"])
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_degrees_multiply_to_the_world(system: str, data: st.DataObject) -> None:
    model, layout, sequence, batch = data.draw(jobs(system))
    try:
        facts = facts_of(layout, SPECS[model], sequence=sequence, global_batch=batch, precision="bf16")
        text, _ = dialects.emit(system, facts)
    except InputError as error:
        text, refused = "", error
    else:
        refused = None
    if refused:
        assert dialects.load(system).title in refused.problem
        return
    if system == "deepspeed":
        config = json.loads(text)
        steps, rows = config["gradient_accumulation_steps"], config["train_micro_batch_size_per_gpu"]
        replicas = (
            layout.world
            // config.get("sequence_parallel_size", 1)
            // config.get("tensor_parallel", {}).get("autotp_size", 1)
        )
        assert steps * rows * replicas == config["train_batch_size"] == batch
    elif system == "accelerate":
        config = json.loads(text)
        degrees = [value for value in config.get("parallelism_config", {}).values() if isinstance(value, int)]
        assert config["num_processes"] == layout.world
        assert config["distributed_type"] == "MULTI_GPU" or math.prod(degrees) == layout.world
    elif system == "torchtitan":
        given = flags(text)
        assert math.prod(int(v) for k, v in given.items() if k.endswith("degree") and "expert" not in k) == layout.world
        assert int(given["--training.local_batch_size"]) * layout.dp <= batch
    else:
        assert math.prod(int(v) for k, v in flags(text).items() if k.endswith("parallel-size")) == layout.world
        assert (f"VLLM_PP_LAYER_PARTITION={','.join(map(str, layout.stages))}" in text) == (len(set(layout.stages)) > 1)


def flags(text: str) -> dict[str, str]:
    words = shlex.split(text.replace("\\\n", " "))
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {key: "" if value.startswith("--") else value for key, value in pairs if key.startswith("--")}


@pytest.mark.parametrize("system", dialects.names())
def test_tables_speak_of_facts_that_are(system: str) -> None:
    dialect = dialects.load(system)
    facts = facts_of(resolved("dp=2"), SPECS["llama-3.1-8b"], **BATCH)
    for flag in dialect.flag:
        assert set(flag.when) <= {*facts}, flag
        assert not flag.fact or flag.fact in (dialect.absent if flag.read_only else facts), flag
        assert system != "megatron" or not flag.fact or flag.fact in dialect.absent, flag
    for row in (*dialect.refuse, *dialect.comment):
        assert set(row.when) <= {*facts}, row
    assert set(dialect.among) <= {*Layout.__struct_fields__}
    assert dialect.checked


REFUSED: list[tuple[str, str, str, str]] = [  # system, layout, model, the message
    ("megatron", "pp=4,schedule=zb", "llama-3.1-8b",
     "--emit: schedule: Megatron-LM does not have schedule=zb: its schedules are 1F1B and interleaved 1F1B; plan with --fix "
     "schedule=1f1b"),
    ("megatron", "dp=2,pp=2,zero=3", "llama-3.1-8b",
     "--emit: Megatron-LM does not have zero=3 with pp=2: its fully sharded data parallelism (--use-megatron-fsdp) is not offered "
     "with a pipeline here; plan with --max zero=1, or --fix pp=1"),
    ("megatron", "pp=8,schedule=interleaved,micro_batch=16", "llama-3.1-8b",
     "--emit: Megatron-LM does not have schedule=interleaved: its interleaved schedule needs at least pp micro-batches; lower "
     "micro_batch, or set schedule=1f1b"),
    ("torchtitan", "dp=2,zero=1", "llama-3.1-8b",
     "--emit: zero: torchtitan does not have zero=1: it replicates (DDP) or shards parameters with gradients and optimiser state "
     "(fully_shard); plan with --fix zero=0"),
    ("torchtitan", "dp=8,ep=8", "mixtral-8x7b",
     "--emit: torchtitan: its expert ranks are taken from those that shard; make shards x cp x tp a multiple of ep"),
    ("torchtitan", "pp=4,stages=8+16+4+4", "llama-3.1-8b",
     "--emit: torchtitan: it divides layers evenly but for fewer on the first and the last stage (elsewhere stages list their "
     "modules); give --fix stages= so, or lower pp"),
    ("deepspeed", "pp=2", "llama-3.1-8b",
     "--emit: pp: DeepSpeed does not have pp=2: a pipeline is written in the model's code (PipelineModule), not in its "
     "configuration; plan with --fix pp=1"),
    ("deepspeed", "tp=2", "llama-3.1-8b",
     "--emit: DeepSpeed does not have sp=true: its tensor parallelism keeps whole sequences between the products; plan with "
     "--fix sp=0"),
    ("accelerate", "tp=2,sp=0", "llama-3.1-8b",
     "--emit: Accelerate does not have zero=0 with tp=2: it composes tensor parallelism with fully_shard alone; plan with "
     "--fix zero=3"),
    ("vllm", "dp=4,ep=2,tp=2,etp=1", "mixtral-8x7b",
     "--emit: vLLM: it divides experts over all tensor and data ranks of a stage, or not at all; set etp=1 and ep to dp x tp, or "
     "leave ep out"),
    ("vllm", "dp=4,zero=3", "llama-3.1-8b",
     "--emit: vLLM does not have zero=3: each of its replicas holds all parameters; plan with --max zero=2"),
]  # fmt: skip


@pytest.mark.parametrize(("system", "text", "model", "message"), REFUSED)
def test_what_a_system_has_not_is_refused_with_the_reason(system: str, text: str, model: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        emitted(system, text, model)
    assert str(caught.value) == message


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"no dialect of 'jax'; choose one of accelerate, deepspeed, megatron, torchtitan, vllm"
    ):
        dialects.load("jax")


def test_vllm_by_hand() -> None:
    layout = resolved("dp=2,tp=4,ep=8,etp=1,zero=1,recompute=full", "mixtral-8x7b")
    facts = facts_of(layout, SPECS["mixtral-8x7b"], **BATCH, model="mistralai/Mixtral-8x7B-v0.1")
    text, comments = dialects.emit("vllm", facts)
    assert comments[0].startswith("A layout of training served: zero, recompute")
    assert text.split() == [
        "vllm", "serve", "mistralai/Mixtral-8x7B-v0.1", "\\", "--tensor-parallel-size", "4", "\\", "--data-parallel-size", "2", "\\",
        "--enable-expert-parallel", "\\", "--max-model-len", "2048", "\\", "--dtype", "bfloat16",
    ]  # fmt: skip


GIVEN = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--vocab-size 50257 --micro-batch-size 4 --global-batch-size 64"
)


def test_megatrons_defaults() -> None:
    given = megatron.read(f"{GIVEN} --lr 1e-4 --fp16 --recompute-activations --swiglu", 8)
    spec = given.spec
    assert (spec.ffn, spec.kv_heads, spec.head_dim, spec.norm, spec.rope, spec.tied) == (
        2688,
        16,
        64,
        "layer",
        None,
        True,
    )
    assert (spec.qkv_bias, spec.out_bias, spec.mlp_bias, spec.dropout) == (True, True, True, 0.1)
    assert (given.layout.dp, given.layout.zero, given.layout.recompute, given.precision) == (8, 0, "selective", "fp16")
    assert given.notes == ("counted as with --overlap-grad-reduce", "not considered: --lr")
    ring = megatron.read(f"{GIVEN} --context-parallel-size 2 --recompute-granularity full --recompute-method block", 2)
    assert ring.notes == (
        "--recompute-method block recomputes some layers of a stage; all are counted here",
        "context parallelism by a ring (p2p) is counted as by gathering",
    )
    assert megatron.read(f"{GIVEN} --context-parallel-size 2 --cp-comm-type a2a", 2).layout.cp_kind == "ulysses"
    assert megatron.read(GIVEN, 8).spec.ffn == 4096
    whole = megatron.read(GIVEN.replace("--global-batch-size 64", ""), 8)
    assert whole.global_batch == 4 * 8
    named = GIVEN.replace("--vocab-size 50257", "--tokenizer-type GPT2BPETokenizer")
    assert megatron.read(named, 8).spec.vocabulary == 50257
    assert megatron.read(f"{GIVEN} --num-experts 8 --moe-layer-freq 2", 8).spec.experts == msgspec.structs.replace(
        SPECS["mixtral-8x7b"].experts, ffn=4096, layers=tuple(range(0, 24, 2)), bias=True
    )


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ("--pipeline-model-parallel-size 4", [6, 6, 6, 6]),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3", [3, 7, 7, 7]),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 5 --decoder-last-pipeline-num-layers 3", [5, 8, 8, 3]),
        ("--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split", [12, 12]),
        ("--pipeline-model-parallel-size 13 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
         [1, *[2] * 11, 1]),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4", [4] * 6),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --decoder-first-pipeline-num-layers 8",
         [4, 8, 4, 8]),
        ("--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et*3|(tt|)*3,t*15L", [3, 2, 2, 2]),
    ],
)  # fmt: skip
def test_megatrons_ways_to_divide_layers(flags: str, stages: list[int]) -> None:
    if "layout" in flags:
        with pytest.raises(InputError, match="on 5 stages, the model 24 on 4 ranks"):
            megatron.read(f"{GIVEN} {flags}", 4)
        flags, stages = flags.replace("(tt|)*3,", "t*2|t*2|"), [3, 2, 2, 17]
        flags = flags.replace("t*15L", "t*17L")
    ranks = int(flags.split()[1])
    assert list(megatron.read(f"{GIVEN} {flags}", ranks).layout.stages) == stages


WRONG: list[tuple[str, str, int]] = [  # arguments after GIVEN, the message after --explain-megatron, devices
    ("--tensor-model-parallel-size 3", "--tensor-model-parallel-size: tp x pp x cp = 3 x 1 x 1 = 3 does not divide 8 ranks; change a "
     "degree or the number of ranks", 8),
    ("--tensor-model-parallel-size two", "--tensor-model-parallel-size: 'two' is not a whole number; give a whole number", 8),
    ("--norm-epsilon tiny", "--norm-epsilon: 'tiny' is not a number; give a number", 8),
    ("--hidden-size", "--hidden-size: has no value; give one, or leave the flag out", 8),
    ("--hidden-size $HIDDEN", "'$HIDDEN' is a variable of the shell; give the values that it stands for", 8),
    ("--hidden-size 'a", "not a command line (No closing quotation); quote it as a shell would", 8),
    ("--num-layers 0", "--num-layers: is missing; give a whole number from 1", 8),
    ("--pipeline-model-parallel-size 5", "--pipeline-model-parallel-size: 24 layers do not divide over 5 pipeline ranks; give "
     "--pipeline-model-parallel-layout", 5),
    ("--micro-batch-size 3", "micro_batch: micro_batch=3 does not divide the 8 rows of a replica; one of [1, 2, 4, 8] does", 8),
    ("--num-experts 4 --moe-layer-freq [0]*3", "--moe-layer-freq: '[0]*3' does not choose among 24 layers; give a number, or a list "
     "of 24 zeros and ones such as ([0]*1+[1]*23)", 8),
    ("--num-experts 4 --moe-layer-freq __import__('os')", "--moe-layer-freq: '__import__(os)' does not choose among 24 layers; give a "
     "number, or a list of 24 zeros and ones such as ([0]*1+[1]*23)", 8),
    ("", "--nproc-per-node: the number of ranks is not known; give --cluster NAME:COUNT, or torchrun's --nnodes and "
     "--nproc-per-node", 0),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message", "devices"), WRONG)
def test_wrong_arguments_get_one_line(more: str, message: str, devices: int) -> None:
    with pytest.raises(InputError) as caught:
        megatron.read(f"{GIVEN} {more}", devices)
    assert str(caught.value) == f"--explain-megatron: {message}"


def test_vocabulary_must_be_told() -> None:
    with pytest.raises(InputError, match=r"'run\.sh' is neither a file nor arguments"):
        megatron.read("run.sh", 8)
    with pytest.raises(InputError, match="--vocab-size: is missing"):
        megatron.read(GIVEN.replace("--vocab-size 50257", ""), 8)


def test_changes() -> None:
    spec = SPECS["llama-3.1-8b"]
    job: dict[str, Any] = {"sequence": 2048, "global_batch": 64, "precision": "bf16"}
    before, after = (
        facts_of(resolved(text), spec, **job) for text in ("dp=4,tp=2,zero=1", "dp=2,tp=4,sp=0,recompute=full")
    )
    assert dialects.changes(dialects.load("megatron"), before, after) == [
        "--tensor-model-parallel-size 2 -> 4", "--micro-batch-size 16 -> 32", "add --recompute-granularity full",
        "add --recompute-method uniform", "add --recompute-num-layers 1", "drop --sequence-parallel",
        "drop --use-distributed-optimizer", "drop --overlap-param-gather",
    ]  # fmt: skip


@given(st.lists(st.integers(0, 1), min_size=1, max_size=70))
def test_patterns_evaluate_to_themselves(bits: list[int]) -> None:
    assert eval(pattern(bits)) == bits


# Their own parsers, where they are installed


@pytest.mark.filterwarnings("ignore")
def test_megatron_core_reads_the_stages() -> None:
    found = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    layout = found.PipelineParallelLayerLayout(stage_layout([3, 0, 1, 2, 12, 4], 1), 3)
    layout.validate_layer_layout(22, 1)
    kinds = [[[kind.name for kind in chunk].count("decoder") for chunk in rank] for rank in layout.layout]
    assert kinds == [[3, 2], [0, 12], [1, 4]]


@pytest.mark.filterwarnings("ignore")
def test_accelerate_takes_the_file(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = tmp_path / "accelerate.json"
    file.write_text(emitted("accelerate", "dp=8,tp=2,zero=3,dp_shard=4,sp=0,recompute=full"))
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))
    assert (args.use_fsdp, args.fsdp_version, args.fsdp_activation_checkpointing) == (True, 2, True)
    assert (args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size) == (2, 4)
    assert (args.parallelism_config_tp_size, args.num_processes, args.mixed_precision) == (2, 16, "bf16")


@pytest.mark.filterwarnings("ignore")
def test_torchtitan_takes_the_flags() -> None:
    package = importlib.util.find_spec("torchtitan")
    if package is None or package.origin is None:
        pytest.skip("torchtitan is not installed")
    import tyro

    # The file alone: the package around it wants what runs on GPUs only.
    file = importlib.util.spec_from_file_location("titan", Path(package.origin).with_name("config") / "configs.py")
    assert file is not None
    assert file.loader is not None
    titan = sys.modules["titan"] = importlib.util.module_from_spec(file)
    file.loader.exec_module(titan)
    text = emitted("torchtitan", "dp=8,tp=2,pp=4,zero=3,dp_shard=4,sp=0,schedule=interleaved,vp=4", global_batch=256)
    parts = {"parallelism": titan.ParallelismConfig, "training": titan.TrainingConfig}
    job = make_dataclass("Job", [(name, kind, field(default_factory=kind)) for name, kind in parts.items()])
    words = shlex.split(text.replace("\\\n", " "))
    given: Any = tyro.cli(job, args=words[words.index("CONFIG") + 1 :])
    found = given.parallelism
    assert (found.data_parallel_replicate_degree, found.data_parallel_shard_degree, found.tensor_parallel_degree) == (
        2,
        4,
        2,
    )
    assert (found.pipeline_parallel_schedule, found.enable_sequence_parallel) == ("Interleaved1F1B", False)
    assert found.fsdp_reshard_after_forward == "always"
    assert (given.training.local_batch_size, given.training.global_batch_size, given.training.seq_len) == (
        32,
        256,
        2048,
    )


@pytest.mark.filterwarnings("ignore")
def test_deepspeed_takes_the_file() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(emitted("deepspeed", "dp=8,zero=3,offload=optimizer"))
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert (int(zero.stage), zero.overlap_comm, zero.offload_optimizer.device) == (3, True, "cpu")
