"""Perplexity against the model's own loss, its counters, and zero-shot accuracy by hand."""

import hashlib
import json
import math
import re
import struct

import pytest
import torch

from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.errors import InputError
from stages.evaluation import (
    Evaluation,
    Perplexity,
    accuracy,
    negative_log_likelihood,
    perplexity,
    window_nll,
)
from stages.model.sites import find_sites
from stages.ports.patched import patched
from stages.text.harness import TaskSpec

COARSE, FINE = Las("coarse", 2, "half_step"), Gated("fine", 12, 2)


@torch.no_grad()
def by_loss(model, ids):
    """exp of the mean of the loss that the model itself computes on every window."""
    losses = [model(row[None], labels=row[None]).loss.item() for row in ids]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("coding", [None, COARSE, FINE], ids=["dense", "coarse", "fine"])
def test_perplexity_is_that_of_the_models_own_loss(model, tokens, convert, coding, batch):
    ids = tokens(5, 14)
    conversion = None if coding is None else convert(model, coding)
    with patched(model, conversion):
        expected = by_loss(model, ids)
    found = perplexity(model, ids, conversion, batch, "text").metrics
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["nll"] == pytest.approx(math.log(expected), rel=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_window_has_the_likelihood_that_the_model_gives_it(model, tokens, convert, batch):
    ids, conversion = tokens(5, 14), convert(model, COARSE)
    with patched(model, conversion), torch.no_grad():
        losses = [13 * model(row[None], labels=row[None]).loss.item() for row in ids]
    found = perplexity(model, ids, conversion, batch, "text")
    assert list(found.windows["nll"]) == pytest.approx(losses, rel=1e-4)
    assert found.windows["nll"].dtype == "float64" and len({*losses}) == 5
    assert list(found.windows["window"]) == [0, 1, 2, 3, 4]
    assert set(found.windows["tokens"]) == {13}
    assert found.metrics["nll"] == pytest.approx(found.windows["nll"].sum() / 65)


def test_a_coarse_code_costs_more_than_a_fine_one(model, tokens, convert):
    with torch.no_grad():  # text that the model itself finds likely
        ids = model.generate(tokens(4, 2), max_length=14, do_sample=False, pad_token_id=49)
    dense, fine, coarse = (
        perplexity(model, ids, c and convert(model, c), 4, "text").metrics["perplexity"]
        for c in (None, FINE, COARSE)
    )
    assert fine == pytest.approx(dense, rel=0.05)
    assert coarse > 1.5 * dense


def test_the_number_is_logged_with_what_it_was_measured_on(model, tokens):
    ids = tokens(3, 8)
    found = perplexity(model, ids, None, 2, "text").metrics
    packed = struct.pack("<24q", *ids.flatten().tolist())
    assert found["ids_sha256"] == hashlib.sha256(packed).hexdigest()
    assert {key: found[key] for key in ("corpus", "windows", "length", "tokens")} == {
        "corpus": "text",
        "windows": 3,
        "length": 8,
        "tokens": 24,
    }


def test_the_likelihood_of_long_windows_is_that_in_one_piece():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 700, 11), torch.randint(0, 11, (2, 700))
    logs = logits.double().log_softmax(-1)
    expected = -sum(logs[b, s - 1, ids[b, s]].item() for b in range(2) for s in range(1, 700))
    assert negative_log_likelihood(logits, ids).sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("coding", [None, COARSE], ids=["dense", "coarse"])
@pytest.mark.parametrize("factor", [1e38, math.nan, 1e5], ids=["inf", "nan", "huge"])
def test_a_diverged_model_has_infinite_perplexity(model, tokens, convert, factor, coding):
    conversion = None if coding is None else convert(model, coding)
    with torch.no_grad():
        model.lm_head.weight *= factor
    result = perplexity(model, tokens(2, 8), conversion, 1, "text")
    found = result.metrics
    assert found["perplexity"] == math.inf and len(result.windows) == 2
    assert math.isfinite(found["nll"]) == (factor == 1e5)


def test_counters_do_not_depend_on_the_batch(model, tokens, convert):
    conversion, ids = convert(model, FINE), tokens(6, 9)
    one, three = (perplexity(model, ids, conversion, n, "text").counters for n in (1, 3))
    assert one[["site", "role", "layer", "values", "macs"]].equals(
        three[["site", "role", "layer", "values", "macs"]]
    )
    for column in ("spikes", "acs"):
        assert one[column].to_numpy() == pytest.approx(three[column].to_numpy(), rel=1e-3)
        assert (one.loc[one["macs"] > 0, column] > 0).all()


def test_counters_cover_every_site_and_only_coded_ones_spike(model, tokens, convert):
    ids = tokens(2, 9)
    some = convert(model, FINE, ("attn.in", "head.in"))
    bound = convert(model, LloydMax("lloyd_max", 3))
    for conversion, spiking in ((None, 0), (some, 3), (bound, 0)):
        frame = perplexity(model, ids, conversion, 2, "text").counters
        assert list(frame["site"]) == [site.name for site in find_sites(model)]
        assert frame["spikes"].notna().sum() == frame["acs"].notna().sum() == spiking
        head = frame.iloc[-1]
        assert (head["values"], head["macs"]) == (2 * 9 * 24, 2 * 9 * 24 * 50)


def test_a_result_is_read_back_as_it_was(model, tokens, convert, tmp_path):
    found = perplexity(model, tokens(2, 8), convert(model, COARSE), 2, "text")
    found.save(tmp_path)
    again = Perplexity.load(tmp_path)
    assert again.metrics == found.metrics and again.counters.equals(found.counters)
    assert again.windows.equals(found.windows) and list(window_nll(tmp_path)) == [
        nll / 7 for nll in found.windows["nll"]
    ]


TWO = Multigrain("two", 4, 2, "half_step", False)


@pytest.mark.parametrize("coding", [None, FINE, COARSE, TWO])
def test_the_perplexity_is_the_same_where_nothing_is_counted(
    coding, model, tokens, convert, tmp_path
):
    conversion, ids = None if coding is None else convert(model, coding), tokens(2, 9)
    counted = perplexity(model, ids, conversion, 1, "text")
    silent = perplexity(model, ids, conversion, 1, "text", counted=False)
    assert silent.metrics == counted.metrics and silent.windows.equals(counted.windows)
    assert len(counted.counters) and silent.counters.empty
    silent.save(tmp_path)
    assert Perplexity.load(tmp_path).counters.empty


@pytest.mark.parametrize("change", [{"corpora": []}, {"windows": 0}, {"length": 1}, {"items": 0}])
def test_nothing_to_evaluate_is_refused(change):
    plain = {"corpora": ["text"], "windows": 1, "length": 2, "tasks": [], "items": 1}
    plain["anytime"] = False
    Evaluation(**plain)
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=re.escape(f"{name}={value}")):
        Evaluation(**plain | change)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"replicates": 0}, "evaluation.replicates=0: give 1 or more"),
        ({"tasks": ["text"]}, "text is in evaluation.corpora and in evaluation.tasks"),
        ({"corpora": ["text_se"]}, "evaluation.corpora: text_se ends with one of _se,"),
        ({"tasks": ["odd_n"]}, "evaluation.tasks: odd_n ends with"),
    ],
)
def test_what_columns_could_not_show_is_refused(change, line):
    plain = {"corpora": ["text"], "windows": 1, "length": 2, "tasks": ["asked"], "items": 1}
    plain["anytime"] = False
    Evaluation(**plain, replicates=2)
    with pytest.raises(InputError, match=re.escape(line)) as error:
        Evaluation(**plain | change)
    assert "\n" not in str(error.value)


ROWS = [
    {"goal": f"Do {n}", "sol1": "go " * (n % 3 + 1) + "on", "sol2": f"stop {n**2}"}
    for n in range(16)
]
PIQA = TaskSpec("piqa", "piqa", "acc", "validation", None, None)


@torch.no_grad()
def choices(model, tokenizer):
    """Which answer the model finds likelier, for every question."""
    found = []
    for row in ROWS:
        context = f"Question: {row['goal']}\nAnswer:"
        start, scores = len(tokenizer(context).input_ids), []
        for answer in (row["sol1"], row["sol2"]):
            ids = tokenizer(f"{context} {answer}").input_ids
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids))))
        found.append(int(scores[1] > scores[0]))
    return found


def questions(folder, labels):
    file = folder / "piqa.jsonl"
    rows = [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(PIQA, file)]


def test_zero_shot_accuracy_is_that_of_the_patched_model(
    tmp_path, tiny_llama, byte_tokenizer, convert
):
    right = choices(tiny_llama, byte_tokenizer)  # the dense model answers every question so
    tasks = questions(tmp_path, right)
    found = {}
    for name, coding in (("dense", None), ("coarse", COARSE), ("fine", FINE)):
        conversion = None if coding is None else convert(tiny_llama, coding)
        with patched(tiny_llama, conversion):
            answers = choices(tiny_llama, byte_tokenizer)
        asked = (tasks, len(ROWS), 4)
        score = accuracy(tiny_llama, byte_tokenizer, conversion, *asked)["piqa"].metrics
        same = sum(a == b for a, b in zip(answers, right, strict=True))
        assert score["value"] == pytest.approx(same / len(ROWS)) and score["n"] == len(ROWS)
        found[name] = score["value"]
    assert len(set(right)) == 2
    assert found["dense"] == found["fine"] == 1 > found["coarse"]


def test_zero_shot_leaves_the_model_as_it_was(tmp_path, tiny_llama, byte_tokenizer, convert):
    model, ids, tasks = tiny_llama, torch.arange(20)[None], questions(tmp_path, [0, 1] * 8)
    conversion = convert(model, COARSE)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)  # untied
    head, marks = model.lm_head.weight, [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        before = model(ids).logits
        accuracy(model, byte_tokenizer, conversion, tasks, 2, batch=2)
        assert torch.equal(model(ids).logits, before)
    assert model.lm_head.weight is head and "tie_weights" not in vars(model)
    assert [set(vars(module)) for module in model.modules()] == marks
    assert model.config._attn_implementation == "eager"
