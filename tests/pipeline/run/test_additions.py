"""A text or a task of the user's own needs no yaml: `corpus.mine.path=FILE`."""

from __future__ import annotations

from contextlib import chdir

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.results.folders import RunFolder
from pipeline.run.additions import opened
from pipeline.run.jobs import jobs
from pipeline.tracking.entries import job_entry
from stages.errors import InputError

MINE = ["corpus.mine.path=a.txt", "evaluation.corpora=[mine]"]


def test_keys_of_unknown_entries_are_added_and_all_others_left():
    others = ["corpus.wikitext2.path=b", "timesteps=6", "-m", "tasks.piqa.path=c", "corpus=default"]
    assert opened([*MINE, *others]) == ["++corpus.mine.path=a.txt", MINE[1], *others]
    assert opened(opened(MINE)) == opened(MINE) and opened(others) == others
    swept = ["calibration.corpus=wikipedia,mine", "+corpus.mine.calibration_path=a b=c.txt"]
    assert opened(swept) == [swept[0], "++corpus.mine.calibration_path=a b=c.txt"]
    task = ["tasks.mine.task=sciq", "evaluation.tasks=[piqa,mine]"]
    assert opened(task) == ["++tasks.mine.task=sciq", task[1]]
    OverridesParser.create().parse_overrides(opened([*MINE, *task]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpus.wikitex2.path=a"], "corpus.wikitex2 .*did you mean wikitext2?"),
        ([MINE[0]], r"corpus.mine .*calibration.corpus=mine or evaluation.corpora=\[mine\]"),
        ([MINE[0], "evaluation.corpora=[wikipedia]"], "corpus.mine is chosen by nothing"),
        ([MINE[0], "evaluation.tasks=[mine]"], "corpus.mine is chosen by nothing"),
        (["tasks.pica.path=a"], "did you mean piqa?"),
    ],
)
def test_an_entry_that_nothing_chooses_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        opened(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*MINE, "corpus.mine.pth=b"], "corpus.mine.pth: no such key; did you mean path?"),
        ([*MINE, "corpus.mine.rows=line"], "corpus.mine.rows='line'"),
        (["evaluation.corpora=[wikitex2]"], "got wikitex2; did you mean wikitext2?"),
        (["evaluation.tasks=[mine]", "tasks.mine.path=a"], "without tasks.mine.task"),
        (["evaluation.corpora=[mine]", "corpus.mine=a.txt"], "corpus.mine='a.txt'"),
    ],
)
def test_what_an_entry_lacks_or_does_not_have_is_named(overrides, message, settings, tmp_path):
    from pipeline.run.errors import one_line

    with pytest.raises(Exception) as error:
        settings(tmp_path, *opened(overrides))
    assert message in one_line(error.value) and "\n" not in one_line(error.value)


def test_a_run_on_a_text_and_a_task_of_ones_own_has_their_names(command, tiny_run, tmp_path):
    asked = [
        *("experiment=null", "coding=las"),
        *(
            f"corpus.mine.path={tiny_run.folder}/evaluation.jsonl",
            "evaluation.corpora=[mine,wikipedia]",
        ),
        *("tasks.own.task=piqa", f"tasks.own.path={tiny_run.folder}/piqa.jsonl"),
        *("evaluation.tasks=[own,piqa]", "evaluation.items=2"),
    ]
    done = command(tmp_path, *asked)
    assert done.code == 0, done.err
    (result,) = done.results
    assert result["ppl_mine"] == result["ppl_wikipedia"] and "ppl_mine" in done.out
    assert result["acc_own"] == result["acc_piqa"]
    with chdir(tmp_path):
        read = job_entry(RunFolder(done.runs / "0"), lambda job: ()).inputs
        texts = {(each.dataset.name, each.tags[0].value) for each in read}
    assert {("mine", "evaluation"), ("own", "evaluation")} <= texts
    planned = command(tmp_path, *asked, "runtime.plan=true")
    assert planned.code == 0 and " 0 artifacts to build" in planned.out, planned.out + planned.err


def test_a_sweep_may_choose_it_in_one_of_its_jobs(tiny_run):
    found = jobs(
        [
            *("experiment=none", *tiny_run.overrides, "calibration.corpus=wikipedia,mine"),
            f"corpus.mine.calibration_path={tiny_run.folder}/calibration.jsonl",
        ]
    )
    assert [job.settings.calibration.corpus for job in found] == ["wikipedia", "mine"]
    assert "++corpus.mine.calibration_path=" in found[1].command
