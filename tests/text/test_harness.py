import copy
import gzip
import json
import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from stages.errors import InputError
from stages.text import tasks
from stages.text.answers import answers
from stages.text.harness import TaskSpec, zero_shot

ROWS = [
    {
        "goal": f"To do {number}",
        "sol1": "go " * (number % 3 + 1) + "on",
        "sol2": f"stop at {number**2}",
        "label": number % 2,
    }
    for number in range(12)
]


def piqa(metric="acc_norm", **fields):
    plain = {"name": "piqa", "task": "piqa", "split": "validation", "path": None, "package": None}
    return TaskSpec(metric=metric, **{**plain, **fields})


def write(path, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffix:
        case ".jsonl":
            path.write_text(lines)
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        case ".arrow":
            Dataset.from_list(rows).save_to_disk(path.parent / "saved")
            (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    return path


def same(one, other):
    return one.metrics == other.metrics and one.questions.equals(other.questions)


@torch.no_grad()
def log_likelihood(model, tokenizer, context, answer):
    start, ids = len(tokenizer(context).input_ids), tokenizer(context + answer).input_ids
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids)))


def by_hand(model, tokenizer, rows, per_character):
    """The answer to every row that has the larger likelihood (per character)."""
    chosen = []
    for row in rows:
        answers = [row["sol1"], row["sol2"]]
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, " " + text) for text in answers]
        if per_character:
            scores = [score / len(text) for score, text in zip(scores, answers, strict=True)]
        chosen.append(int(scores[1] > scores[0]))
    return chosen


@pytest.mark.parametrize("limit", [5, 12])
def test_accuracy_is_that_of_the_first_items_by_hand(tmp_path, tiny_llama, byte_tokenizer, limit):
    file = write(tmp_path / "piqa.jsonl")
    tasks = [(piqa("acc_norm"), file), (piqa("acc", name="plain"), file)]
    found = zero_shot(tiny_llama, byte_tokenizer, tasks, limit, 4)
    for name, per_character in (("piqa", True), ("plain", False)):
        chosen = by_hand(tiny_llama, byte_tokenizer, ROWS[:limit], per_character)
        right = [int(c == row["label"]) for c, row in zip(chosen, ROWS[:limit], strict=True)]
        value, metrics = sum(right) / limit, found[name].metrics
        assert metrics["value"] == pytest.approx(value)
        assert metrics["se"] == pytest.approx(math.sqrt(value * (1 - value) / (limit - 1)))
        assert metrics["n"] == limit
        asked = {"question": [*range(limit)], "correct": right, "chosen": chosen}
        assert found[name].questions.to_dict("list") == asked
        found[name].save(tmp_path)
        assert [list(each) for each in answers(tmp_path)] == [right, chosen]
    assert list(found["piqa"].questions["chosen"]) != list(found["plain"].questions["chosen"])
    assert (metrics["metric"], metrics["split"], metrics["version"]) == ("acc", "validation", 1.0)


def test_a_task_without_choices_keeps_whether_each_answer_is_right(
    tmp_path, tiny_llama, byte_tokenizer
):
    text, best = "a bag or", []
    ids = byte_tokenizer(text).input_ids
    with torch.no_grad():
        best = chr(int(tiny_llama(torch.tensor([ids])).logits[0, -1, :128].argmax()))
    rows = [{"text": f"{text} {word}"} for word in ("box", "bag", best)]
    spec = TaskSpec("lambada", "lambada_openai", "acc", "validation", None, None)
    file = write(tmp_path / "l.jsonl", rows)
    found = zero_shot(tiny_llama, byte_tokenizer, [(spec, file)], 3, 2)["lambada"]
    assert found.questions["chosen"].equals(found.questions["correct"])
    assert found.metrics["value"] == found.questions["correct"].mean()


def test_a_bfloat16_model_is_scored_in_float32(tmp_path, tiny_llama, byte_tokenizer, monkeypatch):
    model, rows = tiny_llama.to(torch.bfloat16), ROWS[:4]
    scored = []
    plain = HFLM.loglikelihood

    def noted(lm, requests, **options):
        found = plain(lm, requests, **options)
        scored.extend(value for value, _ in found)
        return found

    monkeypatch.setattr(HFLM, "loglikelihood", noted)
    zero_shot(model, byte_tokenizer, [(piqa(), write(tmp_path / "piqa.jsonl"))], 4, 1)
    expected = [
        log_likelihood(
            model, byte_tokenizer, f"Question: {row['goal']}\nAnswer:", " " + row[answer]
        )
        for row in rows
        for answer in ("sol1", "sol2")
    ]
    assert scored == pytest.approx(expected, abs=1e-3)  # summed in bfloat16: 0.24 off


def test_the_hand_computation_tells_models_apart(tiny_llama, byte_tokenizer):
    values = set()
    for seed in range(4):
        torch.manual_seed(seed)
        torch.nn.init.normal_(tiny_llama.lm_head.weight)
        values.add(tuple(by_hand(tiny_llama, byte_tokenizer, ROWS, per_character=True)))
    assert len(values) > 1


@pytest.mark.parametrize("suffix", ["jsonl.gz", "parquet", "arrow"])
def test_every_format_gives_the_same_row(tmp_path, tiny_llama, byte_tokenizer, suffix):
    rows = [
        zero_shot(tiny_llama, byte_tokenizer, [(piqa(), write(tmp_path / name))], 6, 4)["piqa"]
        for name in ("a.jsonl", f"b.{suffix}")
    ]
    assert same(*rows)


def test_functions_of_the_task_are_those_of_lm_eval(tmp_path, tiny_llama, byte_tokenizer):
    rows = [
        {
            "sentence": "A bag or a box: the _ is red.",
            "option1": "bag",
            "option2": "box",
            "answer": a,
        }
        for a in "12"
    ]
    spec = TaskSpec("wg", "winogrande", "acc", "validation", None, None)
    found = zero_shot(tiny_llama, byte_tokenizer, [(spec, write(tmp_path / "w.jsonl", rows))], 2, 2)
    assert found["wg"].metrics["value"] == 0.5  # the same sentence with either answer called right


def test_one_item_has_no_standard_error_and_few_items_are_counted(
    tmp_path, tiny_llama, byte_tokenizer
):
    file = write(tmp_path / "piqa.jsonl")
    one, all_of_them = (
        zero_shot(tiny_llama, byte_tokenizer, [(piqa(), file)], limit, 4)["piqa"].metrics
        for limit in (1, 99)
    )
    assert one["se"] is None and all_of_them["n"] == len(ROWS)
    assert zero_shot(tiny_llama, byte_tokenizer, [], 1, 1) == {}


def test_an_untied_head_stays_untied(tmp_path, tiny_llama, byte_tokenizer):
    torch.manual_seed(1)
    tiny_llama.lm_head.weight = torch.nn.Parameter(torch.randn_like(tiny_llama.lm_head.weight))
    head = tiny_llama.lm_head.weight
    zero_shot(tiny_llama, byte_tokenizer, [(piqa(), write(tmp_path / "piqa.jsonl"))], 2, 2)
    assert tiny_llama.lm_head.weight is head
    HFLM(pretrained=tiny_llama, tokenizer=byte_tokenizer)  # what is guarded against
    assert tiny_llama.lm_head.weight is not head


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "absent.jsonl"),
        ("piqa.csv", "goal", "suffixes"),
        ("piqa.jsonl", "", "is empty"),
        ("piqa.jsonl", '{"goal": \n', "tasks.piqa.path=FILE"),
        ("piqa.jsonl", '{"a": 1}\n', "goal.*tasks.piqa.path=FILE"),
        ("piqa.parquet", "no", "tasks.piqa.path=FILE"),
    ],
)
def test_unusable_questions_are_one_line(
    tmp_path, tiny_llama, byte_tokenizer, name, content, message
):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        zero_shot(tiny_llama, byte_tokenizer, [(piqa(), tmp_path / name)], 2, 2)
    assert "\n" not in str(error.value)


def test_unknown_names_are_one_line(tmp_path, tiny_llama, byte_tokenizer, monkeypatch):
    # among all that lm-eval has, which it takes 10 s to parse: tests/pipeline/run/test_checks.py
    (named,) = tasks._named()["piqa"]
    few = TaskManager(include_path=named.parent, include_defaults=False).task_index
    monkeypatch.setattr(tasks, "_index", lambda: few)
    file = write(tmp_path / "piqa.jsonl")
    with pytest.raises(InputError, match="no task 'no-such-task'"):
        zero_shot(tiny_llama, byte_tokenizer, [(piqa(task="no-such-task"), file)], 2, 2)
    with pytest.raises(InputError, match="got 'f1', needs one of acc, acc_norm"):
        piqa("f1")
    with pytest.raises(InputError, match="got 0"):
        zero_shot(tiny_llama, byte_tokenizer, [(piqa(), file)], 0, 2)


def test_a_question_with_a_word_that_the_embedding_lacks_is_refused(
    tmp_path, tiny_llama, byte_tokenizer
):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["zz"])
    plain = zero_shot(tiny_llama, byte_tokenizer, [(piqa(), write(tmp_path / "a.jsonl"))], 4, 4)
    asked = [(piqa(), write(tmp_path / "b.jsonl"))]  # it does not occur in the questions
    assert same(zero_shot(tiny_llama, tokenizer, asked, 4, 4)["piqa"], plain["piqa"])
    rows = [*ROWS[:3], ROWS[3] | {"sol2": "zz"}]
    with pytest.raises(InputError, match=r"a question has the token 258 \('zz'\), and .* 258 rows"):
        zero_shot(tiny_llama, tokenizer, [(piqa(), write(tmp_path / "c.jsonl", rows))], 4, 4)


def test_a_question_longer_than_the_model_has_positions_is_refused(
    tmp_path, tiny_llama, byte_tokenizer
):
    text = "Question: to\nAnswer: "
    for size, fits in ((512 + 1, True), (512 + 2, False)):  # the last token is not read
        rows = [{"goal": "to", "sol1": "a" * (size - len(text)), "sol2": "b", "label": 1}]
        asked = [(piqa(), write(tmp_path / f"{size}.jsonl", rows))]
        if fits:
            assert zero_shot(tiny_llama, byte_tokenizer, asked, 1, 1)["piqa"].metrics["n"] == 1
        else:
            with pytest.raises(InputError, match="a question has 514 tokens, and the model 512"):
                zero_shot(tiny_llama, byte_tokenizer, asked, 1, 1)


@pytest.mark.slow
def test_every_task_is_found_where_lm_eval_finds_it_among_all():
    """What lm-eval itself knows a name by, after it has parsed all of its files."""
    everything, named = TaskManager().task_index, tasks._named()
    assert len(named) > 10_000 and {"piqa", "arc_easy", "lambada_openai"} <= set(named)
    for name, files in named.items():
        if len(files) == 1:
            assert everything[name].yaml_path == files[0]
    for name in ("piqa", "arc_challenge", "mmlu", "mmlu_stem", "ai2_arc", "nothing"):
        known = everything.get(name)
        entry = tasks._entry(name)
        assert (entry is None) == (known is None)
        assert known is None or (entry.kind, entry.yaml_path) == (known.kind, known.yaml_path)
