"""Spiking models in folders: what comes back is what was saved, to the bit, and says when it is not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import stages
from stages.capture import Capture
from stages.checkpoint.folder import save
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.one_spike import OneSpike
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.codings.ttfs import Ttfs
from stages.distribution import Distribution
from stages.errors import InputError
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.loading import load, load_offloaded
from stages.model.offload import Offload
from stages.model.sites import find_sites
from stages.patching import Patching
from stages.ports.attachment import attachment
from stages.ports.patched import patched
from stages.transforms.prefix import attach_prefix
from stages.transforms.transform import PrefixSearch, Rotate, RotatePrefix, Untouched
from tests.codings.test_mixed import mixed
from tests.conftest import FAMILIES

GATED = Gated("gated", 4, 2)
CODINGS = [
    GATED,
    Gated("gated", 4, 2, offset=True, grain_steps=(0, 1)),
    Las("las", 6, "half_step"),
    Multigrain("multigrain", 6, 2, "half_step", False),
    OneSpike("one_spike", 8, None),
    SignedDigit("signed_digit", 5, 2),
    Gated("digits", 5, 2, offset=True, radix=4),
    Ttfs("ttfs", 64, None, False),
    Timed("timed_free", 8, levels="free"),
    mixed(Timed("timed", 6), GATED),
    Gif("gif", 3, 16, 0.0, "unary", None),
]
Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]


@pytest.fixture
def saved(
    tmp_path: Path, tiny: Callable[..., PreTrainedModel], convert: Converts
) -> Callable[..., tuple[PreTrainedModel, Conversion, Path]]:
    """Saves a tiny model with a coding; the dense model, its conversion and the folder."""

    def make(coding: Any = GATED, kind: str = "llama", **more: Any) -> Any:
        model = tiny(kind, **more)
        conversion = convert(model, coding)
        save(model, conversion, Untouched(), (), tmp_path / "spiking")
        return model, conversion, tmp_path / "spiking"

    return make


def logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **options).logits
    return found


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
def test_a_saved_model_has_the_same_logits_to_the_bit(saved, tokens: Draws, coding: Any) -> None:
    model, conversion, folder = saved(coding)
    ids = tokens(2, 11)
    dense = logits(model, ids)
    with patched(model, conversion):
        expected = logits(model, ids)
    assert not torch.equal(expected, dense)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval(), ids), expected)
    assert torch.equal(logits(stages.load(folder), ids), expected)
    assert torch.equal(logits(model, ids), dense)  # what was saved is dense again


@pytest.mark.parametrize("kind", [*FAMILIES])
def test_every_architecture_comes_back(saved, tokens: Draws, kind: str) -> None:
    model, conversion, folder = saved(kind=kind)
    ids = tokens(2, 11)
    model.config._experts_implementation = "eager"
    with patched(model, conversion):
        expected = logits(model, ids)
    assert torch.equal(logits(stages.load(folder), ids), expected)


def test_a_rotated_model_comes_back_rotated_and_with_its_prefix(
    tmp_path: Path, tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts
) -> None:
    ids = tokens(2, 11)
    for prefix in ((), (5, 48)):
        model, transform = tiny(tie_word_embeddings=True), Rotate("rotate", 3)
        transform.apply(model, ())
        if prefix:
            attach_prefix(model, prefix)
        conversion = convert(model, GATED)
        folder = tmp_path / f"rotated{len(prefix)}"
        save(model, conversion, transform, prefix, folder)
        with patched(model, conversion):
            expected = logits(model, ids)
        assert torch.equal(logits(stages.load(folder), ids), expected)


def test_tied_embeddings_stay_tied(saved) -> None:
    _, _, folder = saved(tie_word_embeddings=True)
    model = stages.load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_folder_is_safetensors_with_the_neurons_and_a_config_with_the_coding(saved) -> None:
    _, conversion, folder = saved()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "spiking"
    assert config["coding"]["class"] == "coding/gated@1"
    assert (config["coding"]["timesteps"], config["coding"]["grains"]) == (4, 2)
    assert config["sites"] == list(conversion.neurons.sites)


def test_a_second_round_trip_changes_nothing(saved, tokens: Draws, tmp_path: Path) -> None:
    _, _, folder = saved()
    first = stages.load(folder)
    first.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    ids = tokens(2, 11)
    assert torch.equal(logits(stages.load(tmp_path / "again"), ids), logits(first, ids))


@pytest.mark.parametrize("how", ["dtype", "to"])
def test_neurons_stay_float32_in_a_model_of_another_type(saved, tokens: Draws, how: str) -> None:
    model, conversion, folder = saved()
    kind = torch.bfloat16
    given = {"dtype": kind} if how == "dtype" else {}
    found = stages.load(folder, **given).to(kind)
    assert found.dtype == kind
    for name, value in found.spiking_neurons.named_buffers():
        assert value.dtype == torch.float32
        assert torch.equal(value, conversion.neurons.fit.params[name])
    dense = model.to(kind)
    dense.model.rotary_emb = found.model.rotary_emb  # a cast takes the frequencies along
    with patched(dense, conversion):
        expected = logits(dense, tokens(2, 11))
    assert torch.equal(logits(found, tokens(2, 11)), expected)


@pytest.mark.parametrize("how", ["dtype", "to"])
def test_a_prefix_takes_the_type_of_its_model(
    tmp_path: Path, tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts, how: str
) -> None:
    model, transform = tiny(), RotatePrefix("rotate_prefix", 3, PrefixSearch(64))
    transform.apply(model, (5, 48))
    save(model, convert(model, GATED), transform, (5, 48), tmp_path / "spiking")
    kind, ids = torch.bfloat16, tokens(2, 11)
    given = {"dtype": kind} if how == "dtype" else {}
    found = stages.load(tmp_path / "spiking", **given).to(kind)
    assert {value.dtype for value in found.spiking_neurons.buffers()} == {torch.float32}
    spiking = logits(found, ids)
    text = found.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert spiking.dtype == kind and text.shape == (2, 14)
    bound = attachment(found)
    assert bound is not None
    bound.close()
    dense, expected = logits(found, ids), logits(model, ids)
    assert float((dense - expected).norm()) < 0.03 * float(expected.norm())
    with patched(found, bound.conversion):
        assert torch.equal(logits(found, ids), spiking)


def test_accelerate_places_it(saved, tokens: Draws) -> None:
    _, _, folder = saved()
    placed = stages.load(folder, device_map="auto")
    assert torch.equal(logits(placed, tokens(2, 11)), logits(stages.load(folder), tokens(2, 11)))


@pytest.fixture
def spiking_llama(
    tiny_llama: LlamaForCausalLM,
    byte_tokenizer: transformers.PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    """A saved model of bytes, with its tokenizer."""
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    sketches = Capture().run(tiny_llama, ids, find_sites(tiny_llama), 4)
    densities = Distribution(atoms=64).run(sketches)
    conversion = Conversion(GATED, Fitting("atoms", 1, 0).run(densities, GATED))
    save(tiny_llama, conversion, Untouched(), (), tmp_path / "spiking")
    byte_tokenizer.save_pretrained(tmp_path / "spiking")
    return tmp_path / "spiking"


def test_text_generation_and_padded_batches(spiking_llama: Path) -> None:
    generate = transformers.pipeline("text-generation", model=str(spiking_llama))
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    prompts = ["a spike", "of the longest neuron"]
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    generate.tokenizer.padding_side = "left"
    batched = generate(prompts, batch_size=2, **options)
    assert [row[0]["generated_text"] for row in batched] == alone
    assert attachment(generate.model) is not None


def test_lm_eval_reads_a_folder(spiking_llama: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    request = Instance("loglikelihood", {}, ("once", " upon"), 0)
    given = stages.load(spiking_llama)
    with_dense = stages.load(spiking_llama)
    attached = attachment(with_dense)
    assert attached is not None
    attached.close()
    tokenizer = str(spiking_llama)
    found, same, dense = (
        HFLM(pretrained=m, tokenizer=tokenizer, batch_size=1, device="cpu").loglikelihood([request])
        for m in (str(spiking_llama), given, with_dense)
    )
    assert found == same and found != dense


@pytest.mark.slow
def test_without_the_plug_in_a_dense_model_does_not_pass(saved) -> None:
    _, _, folder = saved()
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
plain = AutoModelForCausalLM.from_pretrained({str(folder)!r})
import stages
from stages.errors import InputError
found = stages.load({str(folder)!r})
ids = torch.arange(9)[None]
assert not torch.equal(plain(ids).logits, found(ids).logits)
again = AutoModelForCausalLM.from_pretrained({str(folder)!r})
assert torch.equal(again(ids).logits, found(ids).logits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import stages, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_conversion_does_not_start_from_an_exported_model(
    spiking_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path | str) -> None:
        options: Any = {"dtype": "float32", "device": "cpu", "revision": None}
        with pytest.raises(InputError, match="is a spiking model already: stages.load reads it"):
            load(str(source), **options, device_map=None)
        with pytest.raises(InputError, match="is a spiking model already"):
            load_offloaded(str(source), **options, offload=Offload("memory"))

    refused(spiking_llama)
    file = spiking_llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), separators=(",", ":")))
    refused(spiking_llama)
    cached = tmp_path / "hub" / "models--org--spiking"  # as if downloaded before
    shutil.copytree(spiking_llama, cached / "snapshots" / (commit := 10 * "0123"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("org/spiking")


def test_a_dense_model_may_speak_of_spikes(
    spiking_llama: Path, tiny_llama: LlamaForCausalLM
) -> None:
    tiny_llama.config.note = '"quant_method": "spiking"'
    tiny_llama.save_pretrained(spiking_llama)
    load(str(spiking_llama), dtype="float32", device="cpu", revision=None, device_map=None)


def test_doubled_thresholds_are_another_model(saved, tokens: Draws) -> None:
    _, _, folder = saved()
    found = stages.load(folder)
    before = logits(found, tokens(2, 11))
    found.spiking_neurons.scale.mul_(2)
    assert not torch.equal(logits(found, tokens(2, 11)), before)


def test_a_spiking_model_is_converted_once_its_neurons_are_off(
    saved, tokens: Draws, convert: Converts, tmp_path: Path
) -> None:
    model, conversion, folder = saved()
    found, ids = stages.load(folder, attn_implementation="eager"), tokens(4, 11)
    spiking = logits(found, ids)
    for use in (
        lambda: convert(found, GATED),
        lambda: patched(found, conversion).__enter__(),
        lambda: patched(found, None).__enter__(),
        lambda: Patching(1).run(found, ids, conversion, 2),
        lambda: PrefixSearch(64).run(found, SimpleNamespace(bos_token_id=48), ids, 2),
        lambda: save(found, conversion, Untouched(), (), tmp_path / "twice"),
    ):
        with pytest.raises(InputError, match=r"stages\.restore\(model\)"):
            use()
    assert torch.equal(logits(found, ids), spiking)  # a refusal changes nothing
    bound = attachment(found)
    assert bound is not None
    bound.close()
    bound.close()
    assert attachment(found) is None
    assert torch.equal(logits(found, ids), logits(model, ids))
    with patched(found, bound.conversion):
        assert torch.equal(logits(found, ids), spiking)
    again = convert(found, GATED).neurons
    assert torch.equal(again.fit.params["scale"], conversion.neurons.fit.params["scale"])
    found.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config")
    assert torch.allclose(logits(plain.eval(), ids), logits(model, ids), atol=1e-4)


def test_a_source_tree_that_is_not_installed_saves_too(
    saved, tokens: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "spiking-llm-pipeline":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("stages.checkpoint.format.version", version)
    _, _, folder = saved()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["versions"] == {"torch": "1", "transformers": "1"}
    stages.load(folder)
