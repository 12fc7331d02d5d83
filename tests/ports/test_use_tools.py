"""Tools around a spiking model: trainers, harnesses, device maps, compilers; each keeps its neurons."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, pipeline

import stages
from stages.codings.gated import Gated
from stages.compiler import compiled, use_compiler
from stages.errors import InputError
from stages.model.sites import find_sites
from stages.ports.counters import Counters
from stages.ports.patched import patched
from tests.model.families import made

GATED = Gated("gated", 4, 2)
KINDS = ["llama", "gemma3_text"]


@pytest.fixture
def dense(tiny):
    return lambda kind, **more: made(kind, **more) if kind == "gpt2" else tiny(kind, **more)


@pytest.fixture
def spiking(dense, convert):
    def make(kind, **more):
        model = dense(kind, **more)
        return stages.bind(model, convert(model, GATED))

    return make


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def spikes(model, conversion, ids):
    """Spikes of every site of a dense model with neurons."""
    counters = Counters(find_sites(model), "cpu")
    with patched(model, conversion, counters):
        logits(model, ids)
    return counters.frame(set(conversion.neurons.sites))["spikes"].tolist()


# Trainer


class Texts(Dataset):
    """Windows that are their own labels."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.fixture
def trainer(tmp_path, tokens):
    def make(model):
        options = {"per_device_eval_batch_size": 2, "per_device_train_batch_size": 2}
        settings = TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True, **options)
        ids = Texts(tokens(6, 11))
        return Trainer(model=model, args=settings, eval_dataset=ids, train_dataset=ids)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_evaluates_the_loss_of_the_spiking_model(spiking, tokens, trainer, kind):
    model, ids = spiking(kind), tokens(6, 11)
    scores = logits(model, ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    real = copy.deepcopy(model)
    stages.restore(real)
    found = trainer(model).evaluate()["eval_loss"]
    assert found == pytest.approx(-float(scores.mean()), rel=1e-5)
    assert found != pytest.approx(trainer(real).evaluate()["eval_loss"], rel=1e-4)
    with patched(real, stages.conversion(model)):
        assert trainer(real).evaluate()["eval_loss"] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_trains_no_spiking_model(spiking, tokens, trainer, kind):
    model, ids = spiking(kind), tokens(2, 11)
    before = logits(model, ids)
    with pytest.raises(InputError, match="no gradient passes a spiking model"):
        trainer(model).train()
    assert torch.equal(logits(model.eval(), ids), before)


# lm-eval


@pytest.mark.parametrize(("kind", "size"), [("llama", "auto"), ("gemma3_text", 4)])
def test_lm_eval_in_batches_scores_as_one_by_one(spiking, byte_tokenizer, kind, size):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("ab cd", " ef"), ("a much longer question than that", " x"), ("q", " why"), ("", "z")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    model = spiking(kind, vocab_size=258, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    plain = stages.restore(copy.deepcopy(model))

    def scores(each, batch):
        lm = HFLM(
            pretrained=each, tokenizer=byte_tokenizer, batch_size=batch, device="cpu", max_length=64
        )
        return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    want = scores(model, 1)
    assert scores(model, size) == pytest.approx(want, rel=1e-4)
    assert scores(plain, 1) != pytest.approx(want, rel=1e-4)


# accelerate


def placed(model, kind, where, folder):
    """The model with its second layer in files, and hooks that bring it."""
    head, layers = ("transformer", "h") if kind == "gpt2" else ("model", "layers")
    places = {name: "cpu" for name, _ in model.named_children()}
    del places[head]
    places |= {f"{head}.{name}": "cpu" for name, _ in model.get_submodule(head).named_children()}
    del places[f"{head}.{layers}"]
    places |= {f"{head}.{layers}.0": "cpu", f"{head}.{layers}.1": where}
    options = {"main_device": "cpu", "offload_dir": str(folder), "force_hooks": True}
    return places, dispatch_model(model, places, **options)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_device_map_before_or_after_changes_nothing(
    spiking, dense, tokens, kind, where, tmp_path
):
    model, ids = spiking(kind), tokens(2, 11)
    want, table, fitted = logits(model, ids), stages.table(model), stages.conversion(model)
    counted = spikes(dense(kind), fitted, ids)
    real = logits(dense(kind), ids)
    stages.save(model, tmp_path / "saved")
    _, after = placed(model, kind, where, tmp_path / "after")
    assert torch.equal(logits(after, ids), want)
    assert torch.equal(logits(copy.deepcopy(after), ids), want)
    assert stages.table(after).equals(table)
    assert torch.equal(logits(stages.restore(after), ids), real)
    places, before = placed(dense(kind), kind, where, tmp_path / "before")
    assert spikes(before, fitted, ids) == counted
    stages.bind(before, fitted)
    assert torch.equal(logits(before, ids), want)
    assert torch.equal(logits(stages.restore(before), ids), real)
    # A map of the dense model's modules serves the spiking one.
    read = {"device_map": places, "offload_folder": str(tmp_path / "read")}
    loaded = stages.load(tmp_path / "saved", **read, attn_implementation="eager")
    assert torch.equal(logits(loaded, ids), want)
    assert torch.equal(logits(stages.restore(loaded), ids), real)


@pytest.mark.parametrize("kind", KINDS)
def test_what_accelerate_prepares_is_the_spiking_model(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(2, 11)
    before = logits(model, ids)
    assert torch.equal(logits(Accelerator(cpu=True).prepare_model(model), ids), before)


# A pipeline of transformers


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_writes_what_generate_writes(spiking, byte_tokenizer, kind):
    model = spiking(kind, vocab_size=258, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    options = {"max_new_tokens": 5, "do_sample": False}
    given = byte_tokenizer("a spike", return_tensors="pt")
    want = byte_tokenizer.decode(model.generate(**given, **options)[0], skip_special_tokens=True)
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer)
    assert write("a spike", **options)[0]["generated_text"] == want


# torch.compile


@pytest.fixture
def graphs():
    """Counts the graphs that torch.compile has made since the test began."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()  # its limit of compilations is one of the process
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend", "kernels"),
    [("llama", "inductor", False), ("gpt2", "eager", False), ("llama", "eager", True)],
)
def test_a_compiled_model_is_the_spiking_one_until_it_is_restored(
    spiking, dense, tokens, graphs, kind, backend, kernels
):
    model = spiking(kind)
    use_compiler(kernels)
    if kernels and not compiled():
        pytest.skip("torch.compile does not work here")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    fast = torch.compile(model, backend=backend)
    for length in (11, 7, 9):
        ids = tokens(2, length, length)
        torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert graphs() > 1
    got, want = (logits(each, ids, attention_mask=mask)[mask.bool()] for each in (fast, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    real = logits(dense(kind), ids)
    assert not torch.allclose(logits(fast, ids), real, atol=1e-2)
    model.spiking_neurons.scale.mul_(2)  # is read anew
    torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert stages.table(fast).equals(stages.table(model))
    assert stages.restore(fast) is fast
    torch.testing.assert_close(logits(fast, ids), real, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layers_that_are_compiled_by_themselves_are_given_the_mask(spiking, tokens, graphs):
    """Which is made outside of them."""
    model, ids = spiking("llama"), [tokens(2, length, length) for length in (11, 7)]
    want = [logits(model, each) for each in ids]
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for each, expected in zip(ids, want, strict=True):
        torch.testing.assert_close(logits(model, each), expected, rtol=1e-4, atol=1e-4)
    assert graphs() > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compiled_dense_model_is_converted(spiking, dense, tokens, graphs, kind):
    model, fast, ids = spiking(kind), torch.compile(dense(kind), backend="eager"), tokens(2, 11)
    logits(fast, ids)
    before = graphs()
    assert stages.bind(fast, stages.conversion(model)) is fast
    assert torch.equal(logits(fast, ids), logits(model, ids)) and graphs() > before > 0
    text = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(ids, **text), model.generate(ids, **text))
