#!/usr/bin/env bash
# lm-eval 0.4.13: `evaluate(samples={task: [5, 2]})` asks questions 2 and 5 in the order of the data set and logs the first of
# them as 5, the second as 2: `doc_id` of `log_samples` is taken from the list by place. An ascending list is logged as it is.
# An empty list does not ask nothing: it asks every question. Exit status 0 while that is so, 1 if it changes. Output seen
# with the versions below, for six questions that are called by their numbers:
#   samples=[5, 2]: (doc_id, question) [(5, 2), (2, 5)]
#   samples=[]: 6 questions
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install lm_eval==0.4.13 datasets==5.2.0
TQDM_DISABLE=1 "$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log"; exit 1; }
import json
import sys
from pathlib import Path
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager


class Yes(LM):
    def loglikelihood(self, requests, **options):
        return [(0.0, True) for _ in requests]

    loglikelihood_rolling = generate_until = loglikelihood


def asked(samples):
    task = TaskManager(include_defaults=False).load([str(file)])["tasks"]["numbers"]
    results = evaluate(Yes(), {"tasks": {"numbers": task}}, samples={"numbers": samples}, bootstrap_iters=0)
    return [(each["doc_id"], each["doc"]["n"]) for each in results["samples"]["numbers"]]


folder = Path(sys.argv[1])
rows = folder / "rows.jsonl"
rows.write_text("".join(json.dumps({"n": n, "label": 0}) + "\n" for n in range(6)))
file = folder / "numbers.yaml"
file.write_text(json.dumps({
    "task": "numbers", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder)},
    "doc_to_text": "{{n}}", "doc_to_choice": ["yes", "no"], "doc_to_target": "label", "num_fewshot": 0,
    "metric_list": [{"metric": "acc"}],
}))
turned, none = asked([5, 2]), asked([])
print(f"samples=[5, 2]: (doc_id, question) {turned}")
print(f"samples=[]: {len(none)} questions")
sys.exit(0 if turned == [(5, 2), (2, 5)] and len(none) == 6 else 1)
PY
