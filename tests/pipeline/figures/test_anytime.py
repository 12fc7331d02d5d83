"""Stepped execution and the anytime curve as a user asks for them."""

import json

import pandas as pd
import pytest

from pipeline.figures import anytime

ONE = ("experiment=null", "coding=gated", "coding.timesteps=4")


@pytest.fixture(scope="module")
def fast(command, tmp_path_factory):
    """A run with the anytime curve, in a store of its own."""
    done = command(tmp_path_factory.mktemp("stepped"), *ONE, "evaluation.anytime=true")
    assert done.code == 0, done.err
    return done


def test_after_all_steps_the_curve_is_at_the_perplexity(fast) -> None:
    (result,) = fast.results
    curve = result["anytime"]
    assert list(curve) == ["1", "2", "3", "4"]
    assert curve["4"] == result["ppl_wikipedia"]
    assert abs(curve["1"] - curve["4"]) > 0.01


def test_it_is_a_table_and_a_figure(fast) -> None:
    (result,) = fast.results
    (file,) = fast.cwd.glob("outputs/tables/*_anytime.csv")
    table = pd.read_csv(file)
    assert table["ppl"].tolist() == pytest.approx(list(result["anytime"].values()))
    assert table["steps"].tolist() == [1, 2, 3, 4]
    assert table["ppl_se"].tolist() == pytest.approx(list(result["anytime_se"].values()))
    assert table["ppl_se"].iloc[-1] == pytest.approx(result["ppl_wikipedia_se"])


def test_figures_of_single_runs_are_drawn(fast, command) -> None:
    done = command(fast.cwd, *ONE, "evaluation.anytime=true", "runtime.figures=true")
    assert done.code == 0, done.err
    assert {p.suffix for p in fast.cwd.glob("outputs/tables/*_anytime.p*")} == {".pdf", ".png"}


def test_what_diverged_is_in_the_note_and_not_in_the_legend() -> None:
    names = {"run": "las", "timesteps": 4, "transform": "none"}
    curve = enumerate((2e9, 300, 40, 30), 1)
    rows = [names | {"steps": step, "ppl": ppl, "ppl_se": ppl / 10} for step, ppl in curve]
    rows += [row | {"run": "lost", "ppl": 1e9} for row in rows]
    figure = anytime.perplexity_by_steps(pd.DataFrame(rows))
    (line,) = figure.axes[0].get_lines()
    assert line.get_xydata().tolist() == [[2, 300], [3, 40], [4, 30]]
    (bars,) = figure.axes[0].collections
    assert [each[:, 1].tolist() for each in bars.get_segments()] == [[270, 330], [36, 44], [27, 33]]
    assert figure.axes[0].get_ylabel() == "perplexity ± standard error"
    assert "± standard error over windows" in anytime.CAPTION
    unknown = pd.DataFrame(rows).assign(ppl_se=None)  # of one window
    assert anytime.perplexity_by_steps(unknown).axes[0].get_ylabel() == "perplexity"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["las, T=4"]
    label, *note = figure.axes[0].get_xlabel().split("\n")
    assert "las, T=4 at t = 1; lost, T=4 at t = 1, 2, 3, 4" in " ".join(note) and "T=4" not in label
    assert anytime.drawable(pd.DataFrame(rows)) and not anytime.drawable(pd.DataFrame(rows[4:]))


def test_thirty_runs_have_a_legend_that_fits_the_figure() -> None:
    rows = [
        {
            "run": f"r{i}",
            "timesteps": 2,
            "transform": "none",
            "steps": s,
            "ppl": 20.0 + i,
            "ppl_se": None,
        }
        for i in range(30)
        for s in (1, 2)
    ]
    figure = anytime.perplexity_by_steps(pd.DataFrame(rows))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0 and box.y1 <= figure.bbox.y1
    looks = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].get_lines()}
    assert len(looks) == 24  # of 30, as many as differ in colour or dashes


def test_a_stored_result_says_how_it_was_executed(fast, command) -> None:
    done = command(fast.cwd, *ONE, "runtime.execution=stepped")
    assert done.code == 0, done.err
    line = "evaluation ppl_wikipedia is that of runtime.execution=fast, not executed again"
    assert line in done.out + done.err
    done = command(fast.cwd, *ONE)
    assert "not executed again" not in done.out + done.err


def test_stepped_execution_has_the_keys_and_the_results_of_the_fast_one(
    fast, command, tmp_path
) -> None:
    done = command(tmp_path, *ONE, "runtime.execution=stepped")
    assert done.code == 0, done.err
    ((mine,), (other,)) = done.results, fast.results
    assert {k: v for k, v in other["keys"].items() if "anytime" not in k} == mine["keys"]
    assert mine["ppl_wikipedia"] == pytest.approx(other["ppl_wikipedia"], rel=1e-3)
    assert mine["acs_G"] == pytest.approx(other["acs_G"], rel=1e-3)
    assert json.dumps(mine["axes"]) == json.dumps(other["axes"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("runtime.execution=slow", "choose fast or stepped"),
        ("coding=lloyd_max", "has no steps in {-1, 0, 1}"),
    ],
)
def test_what_cannot_be_stepped_is_one_line(command, tmp_path, override: str, says: str) -> None:
    given = ["runtime.execution=stepped"] if "coding" in override else []
    done = command(tmp_path, "experiment=null", *given, override)
    assert done.code == 1 and says in done.err
