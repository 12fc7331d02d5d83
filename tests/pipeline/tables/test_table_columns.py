"""The table of a sweep as a person reads it: its columns, its width, and where its rows come from."""

import math
from pathlib import Path

import pandas as pd
import pytest

from pipeline.results import rows
from pipeline.run.measured import environments
from pipeline.store.store import Artifact
from pipeline.tables import sheet, tables
from stages.errors import InputError
from tests.pipeline.tables.test_latex import check_latex
from tests.pipeline.tables.test_tables import DENSE, LAS

# A long name, a diverged perplexity, two tasks, and rows that only row and setting tell apart.
LONG = DENSE | {
    "model": "Llama-3.1-8B-Instruct-of-some-group-v2",
    "transform": "none",
    "acc_arc_challenge": 0.4567,
    "acc_arc_challenge_se": 0.0498,
    "acc_arc_challenge_n": 100,
    "evaluation": {"wikipedia": {"windows": 8, "length": 1024}},
}
CODED = LONG | {name: LAS[name] for name in LAS if LAS[name] != DENSE.get(name, "")}
CODED = {name: value for name, value in CODED.items() if name not in ("model", "ppl_c4")}
CODED |= {"model": LONG["model"], "ppl_wikipedia": 123456.7}


def gated(row: str, *overrides: str, **more) -> dict:
    named = {"coding": "gated", "row": row, "label": f"{row} T=6 n=2", "grains": 2}
    return CODED | named | {"run": {"overrides": list(overrides)}} | more


SLOWER = "coding.algorithm1.base_lr=1e-3"
SWEEP = [LONG, CODED, gated("gated2"), gated("gated2_offset"), gated("gated2_offset", SLOWER)]


def width(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_what_is_printed_has_every_promised_column_in_120_characters():
    made = tables.run_sheet(SWEEP)
    text = sheet.printed(made, 120)
    assert width(text) <= 120 and "No room" not in text
    rule = next(line for line in text.splitlines() if set(line) == {"-", " "})
    names = [column.name for column in made.columns]
    assert names == [
        *("model", "coding", "timesteps", "grains", "ppl_wikipedia", "ratio_wikipedia"),
        *("acc_piqa", "acc_arc_challenge", "spikes_per_value", "energy_J", "saving"),
    ]
    assert len(rule.split()) == len(names)
    for word in ("gated2_offset", "base_lr=1e-3", "1.2e5", ">9999 %", "46 ± 5", "0.816", "54.3 %"):
        assert word in text
    assert "wikipedia (8 windows of 1024 tokens)" in made.caption and "T = 6" in made.caption


def test_columns_that_have_no_room_are_named_and_the_names_of_rows_stay():
    accuracies = {f"acc_task_{i}": 0.5 for i in range(12)}
    made = tables.run_sheet([row | accuracies for row in SWEEP])
    text = sheet.printed(made, 120)
    (line,) = [line for line in text.splitlines() if line.startswith("No room for acc_task_11, ")]
    assert width(text) <= 120 and "the csv has all" in text and "saving" not in line
    assert "gated2_offset" in text and "energy" in text
    assert set(accuracies) <= set(made.frame)
    assert "No room" not in sheet.printed(made, 300)


def test_the_difference_to_the_dense_model_is_the_ratio_of_each_row():
    ratios = (None, 1.25, 0.9, 1.0004, math.inf, None)
    unknown = {"ratio_wikipedia_low": None, "ratio_wikipedia_high": None}
    given = [LONG, *(CODED | unknown | {"ratio_wikipedia": ratio} for ratio in ratios[1:])]
    made = tables.run_sheet(given)
    assert list(made.frame["ratio_wikipedia"].dropna()) == [1.25, 0.9, 1.0004, math.inf]
    cells = [row["vs dense"] for row in shown_sheet(made)]
    assert cells == ["–", "+25 %", "-10 %", "0.0 %", ">9999 %", "–"]
    bounds = {"ratio_wikipedia_low": 1.12, "ratio_wikipedia_high": 1.38}
    interval = tables.run_sheet([LONG, CODED | bounds | {"ratio_wikipedia": 1.25}])
    assert shown_sheet(interval)[1]["vs dense"] == "+25 % [+12, +38]"


def test_the_spread_over_replicates_is_shown_where_there_are_several():
    several = CODED | {"replicates": 3, "ppl_wikipedia_spread": 0.1234, "ppl_wikipedia": 25.0}
    made = tables.run_sheet([LONG | {"replicates": 3}, several])
    assert [row["spread"] for row in shown_sheet(made)] == ["–", "0.12"]
    assert "Means over 3 evaluations" in made.caption
    assert "spread: their standard deviation" in made.caption and "csv" not in made.caption
    without = tables.run_sheet([LONG | {"replicates": 3}, several], ["coding", "acc"])
    assert "the csv has their standard deviation" in without.caption
    one = {"replicates": 1, "ppl_wikipedia_spread": None}
    made = tables.run_sheet([LONG | one, CODED | one])
    assert "spread" not in shown_sheet(made)[0] and "evaluations" not in made.caption
    assert "ratio_wikipedia" not in tables.run_sheet([LONG, LONG]).frame


def test_spreads_are_the_first_to_have_no_room_and_a_group_widens_its_first_column_alone():
    more = {"ratio_wikipedia": 1.25, "ratio_wikipedia_low": 1.2, "ratio_wikipedia_high": 1.3}
    more |= {"ppl_wikipedia": 24.5, "ppl_wikipedia_se": 0.5, "ppl_wikipedia_spread": 0.1}
    more |= {name.replace("wikipedia", "mine"): value for name, value in more.items()}
    made = tables.run_sheet([LONG | more, CODED | more], ["coding", "ppl", "acc", "energy_J"])
    text = sheet.printed(made, 100)
    assert "No room for ppl_mine_spread, ppl_wikipedia_spread, acc_" in text and width(text) <= 100
    made = tables.run_sheet([LONG | more, CODED | more], ["coding", "ppl"])
    groups, _, rule = sheet.printed(made).splitlines()[:3]
    assert groups.split() == ["wikipedia", "mine"]
    widths = [len(each) for each in rule.split()]
    assert widths[3] == widths[6] == len("spread")


def test_one_window_and_one_question_are_singular():
    one = {"evaluation": {"wikipedia": {"windows": 1, "length": 48}}, "acc_piqa_n": 1}
    caption = tables.run_sheet([LONG | one, CODED | one], ["coding", "ppl", "acc_piqa"]).caption
    assert "wikipedia (1 window of 48 tokens)" in caption and "piqa (1 question)" in caption


def shown_sheet(made: sheet.Sheet) -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in sheet.markdown(made).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_columns_are_chosen_by_the_names_of_the_csv():
    names = ["coding", "row", "n", "acc", "conversion_s", "bits", "bound_db"]
    above = [row | {"bound_db": 21.04} for row in SWEEP[1:]]
    made = tables.run_sheet([SWEEP[0], *above], names)
    assert [column.head for column in made.columns] == [
        *("coding", "row", "n", "piqa [%]", "arc_challenge [%]", "conversion [s]", "bits"),
        "above Shannon [dB]",
    ]
    last = shown_sheet(made)[-1]
    told = (last["coding"], last["row"], last["n"])
    assert told == ("gated base_lr=1e-3", "gated2_offset", "2")
    assert last["conversion [s]"] == "12.3" and last["bits"] == "–"  # what no row has is undefined
    assert last["above Shannon [dB]"] == "21.0" and "Above Shannon: squared error" in made.caption
    assert "Conversion: capture to patching" in made.caption and "Perplexity" not in made.caption
    with pytest.raises(InputError, match=r"table.columns: got savings; did you mean saving "):
        tables.run_sheet(SWEEP, ["coding", "savings"])


def test_an_unknown_column_ends_a_run_before_it_begins(command, tmp_path):
    done = command(tmp_path, "coding=las", "table.columns=[coding,ppl_wikipdia]")
    assert done.code == 1 and not (tmp_path / "outputs/store").exists()
    assert "table.columns: got ppl_wikipdia; did you mean ppl_wikipedia" in done.err


def test_a_model_that_all_rows_share_stands_in_the_caption_of_latex_alone(tmp_path):
    for results, column in ((SWEEP, False), ([*SWEEP, CODED | {"model": "b"}], True)):
        md, _, tex = sheet.write(tables.run_sheet(results), tmp_path / "t", wide=column)
        text = tex.read_text(encoding="utf-8")
        assert ("\nmodel & coding" in text) == column and LONG["model"] in text
        assert ("\\begin{table*}" in text) == column
        assert "| model" in md.read_text(encoding="utf-8")
        check_latex(tex)
        head = text[text.index("\\toprule") : text.index("\\midrule")]
        assert "\\_" not in head.replace("arc\\_challenge", "")


HERE = {"torch": "2.13", "transformers": "5.24", "device": "a processor"}
THERE = HERE | {"torch": "2.11", "device": "a GPU"}


def test_rows_of_different_environments_are_named_under_the_table(tmp_path):
    def told(*environments: list[dict]) -> str:
        given = zip(SWEEP, environments, strict=False)
        made = tables.run_sheet([row | {"environments": own} for row, own in given])
        md, csv, tex = sheet.write(made, tmp_path / "t")
        assert list(pd.read_csv(csv)["environment"])[0].startswith("torch 2.13, transformers 5.24")
        note = made.note
        unwrapped = " ".join(sheet.printed(made, 120).split())
        assert note in unwrapped and note in md.read_text().splitlines()[-1]
        assert note in tex.read_text()
        return note

    assert told([HERE], [HERE]) == ""
    here, there = (
        "torch 2.13, transformers 5.24, a processor",
        "torch 2.11, transformers 5.24, a GPU",
    )
    assert told([HERE], [THERE]) == f"Computed in different environments: {here}; {there}."
    assert told([HERE], [HERE, THERE]).startswith(
        "Computed in different environments, 1 of the rows in several: "
    )
    assert "environment" not in rows.result_frame(SWEEP)  # results of before


def artifact(stage: str, torch: str, device: str) -> Artifact:
    versions = {"torch": torch, "transformers": "5.24.1"}
    built = {"versions": versions, "machine": {"device": device}}
    return Artifact(stage, "k", Path(), built, hit=True)


def test_an_environment_is_that_of_the_stages_that_run_a_model():
    found = environments(
        [
            artifact("distribution", "2.13.9", "the processor beside it"),
            artifact("capture", "2.13.0+cu128", "a GPU"),
            artifact("fitting", "2.14.0", "a processor"),
            artifact("evaluation", "2.13.1", "a GPU"),
            artifact("evaluation", "2.13.1", "another GPU"),
        ]
    )
    same = {"torch": "2.13", "transformers": "5.24"}
    assert found == [
        same | {"device": "a GPU"},
        same | {"device": "another GPU"},
        {"torch": "2.14", "transformers": "5.24"},
    ]
