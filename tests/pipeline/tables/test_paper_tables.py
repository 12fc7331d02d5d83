"""Tables of a paper: every number stands where the runs have it, the best is bold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from pipeline.results import published
from pipeline.results.columns import bounded_perplexity, excess
from pipeline.run import models
from pipeline.tables import layouts, paper, sheet, tables
from stages.errors import InputError
from tests.pipeline.tables.papers import (
    AXES,
    TABLES,
    by_name,
    forbidden,
    layout,
    shown,
)
from tests.pipeline.tables.test_latex import check_latex, compile_latex

ENDS = {"low": -1, "high": 1}


def test_main_has_what_the_runs_measured(swept, monkeypatch):
    monkeypatch.setattr(models, "load", forbidden)
    done = swept.table("table=main", "experiment=codings", *AXES)
    assert done.code == 0, done.err
    frame, measured = swept.read("main"), by_name(swept.results)
    assert len(frame) == len(measured) == 10  # dense and ttfs are one row each
    for (_, row), text in zip(frame.iterrows(), shown(swept.read("main", "md")), strict=True):
        result = measured[row["row"], None if math.isnan(row["timesteps"]) else row["timesteps"]]
        mean = (result["ppl_wikipedia"] + result["ppl_wikitext2"]) / 2
        assert row["ppl_mean"] == pytest.approx(mean, rel=1e-12)
        assert row["ppl_wikitext2"] == result["ppl_wikitext2"]
        assert row["acc_mean"] == result["acc_piqa"] and row["acc_mean_se"] > 0
        assert row["ppl_mean_se"] == pytest.approx(
            math.hypot(result["ppl_wikipedia_se"], result["ppl_wikitext2_se"]) / 2
        )
        shown_mean = bounded_perplexity(mean, row["ppl_mean_se"])
        assert text["mean perplexity"].strip("*") == shown_mean and "±" in shown_mean
        assert text["accuracy [%]"].strip("*").startswith(f"{100 * result['acc_piqa']:.0f} ± ")
        if result["conversion_s"] is not None:
            assert float(text["conversion [s]"]) == pytest.approx(result["conversion_s"], abs=0.05)
    assert list(frame["timesteps"].fillna(0)) == sorted(frame["timesteps"].fillna(0))
    for told in ("mean over wikipedia (3 windows of 48 tokens), wikitext2", "piqa (6 questions)"):
        assert told in swept.read("main", "md").splitlines()[0]


def test_rows_on_different_texts_are_refused(swept, rows):
    settings = replace(rows[0].run.settings.evaluation, windows=2)
    other = replace(rows[0].run.chain, settings=replace(rows[0].run.settings, evaluation=settings))
    odd = replace(rows[0], run=replace(rows[0].run, chain=other))
    with pytest.raises(InputError, match=r"evaluation\.\* one value"):
        layout("main")([odd, *rows[1:]])


@pytest.mark.parametrize("name", ["main", "codings", "energy"])
def test_bold_is_the_best_of_its_t_and_never_the_dense_model(name, rows):
    """Against the numbers of the csv, section by section."""
    made = layout(name)(rows)
    bold = pd.DataFrame(made.bold(), columns=[column.name for column in made.columns])
    frame = made.frame.assign(phase=made.frame.get("phase", ""))
    competing = frame[frame["coding"] != "dense"]
    checked = 0
    for column in (c for c in made.columns if c.best):
        for _, part in competing.groupby(["phase", "timesteps"]):
            values = part[column.name]
            best = values.min() if column.best == "min" else values.max()
            marked = values[bold[column.name][part.index]]
            assert len(part) == 1 or column.ratio or best in set(marked), column.name
            if column.ratio and len(marked):
                sign = 1 if column.best == "min" else -1
                ends = sign * part[[f"{column.ratio}_low", f"{column.ratio}_high"]]
                mine, others = ends.loc[marked.index[0]], ends.drop(marked.index)
                assert len(marked) == 1 and mine.max() < others.min(axis=1).min()
            checked += len(marked)
    assert (checked >= 4 or name == "main") and not bold[made.frame["coding"] == "dense"].any(
        axis=None
    )
    assert not bold[made.frame["timesteps"] == 128].any(axis=None)  # alone it beats nobody


def test_ties_are_all_bold_what_is_not_told_apart_and_what_diverged_never_is(rows):
    changed = []
    for row in rows:
        ppl = {"las": math.inf, "multigrain2": 20.001, "gated2": 20.004, "gated3": 1e9}
        value = ppl.get(row.result["label"].split()[0], 30.0)
        values = {"saving": 0.1, "energy_J": 0.5}
        for name in ("wikipedia", "wikitext2"):
            values |= {f"ppl_{name}": value, f"ppl_{name}_se": 0.1, f"ratio_{name}": value / 19}
            width = 0.02 if row.result["timesteps"] == 4 else 1e-6
            values |= {f"ratio_{name}_{e}": value / 19 + s * width for e, s in ENDS.items()}
            values |= {f"ppl_{name}_spread": None}
        changed.append(replace(row, result=row.result | values))
    made = layout("main")(changed)
    names = zip(made.frame["row"], made.frame["timesteps"], strict=True)
    texts = dict(zip(names, cells(made), strict=True))
    assert texts["multigrain2", 4] == texts["gated2", 4] == "20.00 ± 0.07"  # not told apart
    assert texts["multigrain2", 5] == "**20.00 ± 0.07**" and texts["gated2", 5] == "20.00 ± 0.07"
    assert texts["las", 4] == ">1e4" and texts["ttfs", 128] == "30.00 ± 0.07"
    chosen = shown(sheet.markdown(tables.choice(made, ["ppl_wikipedia", "saving", "acc"])))
    theirs = dict(zip(texts, (row["wikipedia: ppl"] for row in chosen), strict=True))
    assert theirs["multigrain2", 5] == "**20.00 ± 0.10**" and theirs["gated2", 5][0] != "*"
    assert theirs["multigrain2", 4] == theirs["gated2", 4] == "20.00 ± 0.10"
    saving = [row["saving [%]"] for row in shown(sheet.markdown(layout("codings")(changed)))]
    assert saving.count("**10.0**") > 2  # what looks alike is alike
    assert ">1e4: diverged" in made.caption
    assert made.frame.set_index(["row", "timesteps"])["ppl_mean"]["gated3", 5] == 1e9
    spent = layout("energy")([replace(r, result=r.result | {"energy_J": 0.0}) for r in changed])
    alive = spent.frame["ppl_mean"] < 1e4
    bold = pd.DataFrame(spent.bold())
    assert bold[alive].any(axis=None) and not bold[~alive].any(axis=None)


def test_a_bound_that_does_not_spike_is_never_bold(rows):
    bound = {"ppl_wikipedia": 1.0, "ppl_wikitext2": 1.0, "nmse": 1e-9, "spikes_per_value": None}
    gated3 = [row.result["label"].startswith("gated3") for row in rows]
    pairs = zip(rows, gated3, strict=True)
    made = layout("codings")([replace(r, result=r.result | bound) if b else r for r, b in pairs])
    bold, bounds = pd.DataFrame(made.bold()), made.frame["row"] == "gated3"
    assert bounds.sum() == 2 and bold[~bounds].any(axis=None) and not bold[bounds].any(axis=None)


def cells(made: sheet.Sheet) -> list[str]:
    return [row["mean perplexity"] for row in shown(sheet.markdown(made))]


def test_energy_saves_against_the_dense_model_of_its_convention_and_phase(swept, rows):
    made = layout("energy")(rows)
    frame = made.frame
    groups = {column.name: column.group for column in made.columns if column.group}
    costs = ("macs_G", "acs_G", "energy_J", "saving")
    assert groups == {f"{cost}_{name}": name for name in ("paper", "causal") for cost in costs}
    best = dict(zip((c.name for c in made.columns), zip(*made.bold(), strict=True), strict=True))
    assert any(best["energy_J_paper"]) and any(best["saving_causal"])
    assert len(frame) == 2 * len(rows) and set(frame["phase"]) == {"prefill", "decode"}
    for _, part in frame.groupby("phase"):
        for name in ("paper", "causal"):
            joules = 4.6e-3 * part[f"macs_G_{name}"] + 0.9e-3 * part[f"acs_G_{name}"]
            assert part[f"energy_J_{name}"].to_numpy() == pytest.approx(joules.to_numpy(), rel=1e-9)
            dense = joules[part["coding"] == "dense"].iloc[0]
            saved = (1 - joules / dense).to_numpy()
            assert part[f"saving_{name}"].to_numpy() == pytest.approx(saved, abs=1e-9)
    measured = by_name(swept.results)["gated2", 5]
    row = frame[(frame["row"] == "gated2") & (frame["timesteps"] == 5)].set_index("phase")
    assert row["acs_G_paper"]["decode"] == measured["paper_decode"]["acs_G"]
    assert row["acs_G_causal"]["prefill"] == measured["acs_G"] != row["acs_G_paper"]["prefill"]


def test_grains_is_a_matrix_of_n_by_t(swept):
    axes = "rows=dense,multigrain2,gated2,gated3"
    done = swept.table("table=grains", "experiment=codings", *AXES[:2], axes)
    assert done.code == 0, done.err
    frame, measured = swept.read("grains"), by_name(swept.results)
    assert list(frame["method"]) == ["dense", "multigrain", "gated", "gated"]
    for name, row in zip(axes.partition("=")[2].split(","), frame.to_dict("records"), strict=True):
        for t in (4, 5):
            result = measured[name, None if name == "dense" else t]
            mean = (result["ppl_wikipedia"] + result["ppl_wikitext2"]) / 2
            assert row[f"ppl_T{t}"] == pytest.approx(mean)
    assert swept.read("grains", "tex").count("\\multicolumn{2}{c}{mean perplexity}") == 1
    best = frame.loc[frame.loc[1:, "ppl_T5"].idxmin()]
    assert bounded_perplexity(best["ppl_T5"], best["ppl_T5_se"]) in swept.read("grains", "md")


def test_two_jobs_for_one_cell_of_grains_are_refused(rows):
    twice = next(row for row in rows if row.result["label"] == "gated3 T=5 n=3")
    with pytest.raises(InputError, match="gated3 T=5 n=3 is not the only job"):
        layout("grains")([*rows, twice])


def test_per_site_has_every_site_once_and_the_mean_of_the_row(swept):
    axes = ("transform=none", "timesteps=5", "rows=gated3")
    done = swept.table("table=per_site", "experiment=codings", *axes)
    assert done.code == 0, done.err
    frame = swept.read("per_site")
    logs = frame["nmse"].map(math.log)
    measured = by_name(swept.results)["gated3", 5]
    assert math.exp(logs.mean()) == pytest.approx(measured["nmse"], rel=1e-6)
    assert frame["bound_db"].between(0, 100).all() and "above Shannon [dB]" in swept.read(
        "per_site", "md"
    )
    assert "calibration text; spikes and values:" in swept.read("per_site", "md")
    assert len(frame) == frame["site"].nunique() == 21
    assert frame["role"].drop_duplicates().tolist() == frame["role"].unique().tolist()
    assert (frame.groupby("role", sort=False).ngroup().diff().dropna() >= 0).all()
    down = frame[frame["role"] == "mlp.down"]
    assert down["values"].tolist() == [3 * 48 * 48] * 2  # windows x tokens x channels, two layers
    several = swept.table("table=per_site", "experiment=codings", *axes[:2], "rows=las,gated3")
    assert several.code == 1 and "shows one configuration, got 2" in several.err


def test_codings_shows_what_was_measured(swept):
    done = swept.table("table=codings", *AXES)
    assert done.code == 0, done.err
    (row,) = [
        r for r in shown(swept.read("codings", "md")) if r["method"] == "gated3" and r["T"] == "5"
    ]
    measured = by_name(swept.results)["gated3", 5]
    texts = {name: text.strip("*") for name, text in row.items()}
    ppl, error = measured["ppl_wikipedia"], measured["ppl_wikipedia_se"]
    assert texts["wikipedia: ppl"] == bounded_perplexity(ppl, error)
    ends = [measured[f"ratio_wikipedia{end}"] for end in ("", "_low", "_high")]
    assert texts["wikipedia: vs dense"] == excess(*ends)
    assert float(texts["nmse"]) == pytest.approx(measured["nmse"], rel=0.05)
    assert float(texts["saving [%]"]) == pytest.approx(100 * measured["saving"], abs=0.05)
    assert texts["bits"] == f"{5 + math.log2(3):.3g}" and texts["n"] == "3"


def test_published_rows_stand_below_and_never_compete(swept, rows, tmp_path, monkeypatch):
    theirs = [
        {
            "model": model,
            "method": "GIF",
            "T": t,
            "n": None,
            "time": seconds,
            "ppl": ppl,
            "acc": acc,
        }
        | {"source": f"the paper on {model}"}
        for model, t, seconds, ppl, acc in (
            ("big", 4, 60, 1.5, 99.0),
            ("big", 8, None, None, None),
            ("bigger", None, None, ">100", 67.25),
        )
    ]
    (tmp_path / "published.yaml").write_text(json.dumps({"rows": theirs}))
    monkeypatch.setattr(published, "FILE", tmp_path / "published.yaml")
    made = paper.lay_out(paper.loaded("table", "main", ["table.published=[bigger,big]"]), rows)
    texts = [list(row.values()) for row in shown(sheet.markdown(made))[-4:]]
    assert texts[0][0] == "tiny" and "published" not in texts[0][0]
    assert texts[1:] == [
        ["bigger, published [1]", "GIF", "–", "–", "–", ">100", "–", "67.25"],
        ["big, published [2]", "GIF", "–", "4", "60.0", "1.50", "–", "99.00"],
        ["big, published [2]", "GIF", "–", "8", "–", "–", "–", "–"],
    ]
    assert made.starts()[-3:] == [True, True, False]
    assert "[1] the paper on bigger; [2] the paper on big." in made.caption
    assert "diverged" not in made.caption.partition("Published")[0].replace("did not diverge", "")
    with pytest.raises(InputError, match="got huge; choose among big, bigger"):
        published.rows(["huge"])
    monkeypatch.undo()
    shipped = published.rows(["llama2-7b", "llama3-8b"])
    sheet.write(layouts.main(rows, {}, shipped), tmp_path / "all")
    check_latex(tmp_path / "all.tex")


@pytest.mark.parametrize("name", [name for name in TABLES if name != "energy_models"])
def test_every_table_is_sound_latex(name, swept, rows, tmp_path):
    chosen = rows
    if name in ("per_site", "grains"):
        chosen = [row for row in rows if row.result["label"] == "gated3 T=5 n=3"]
    made = layout(name)(chosen)
    check_latex(sheet.write(made, tmp_path / name)[2])
    assert max(map(len, sheet.printed(made, 120).splitlines())) <= 120
    assert "environment" in made.frame and made.note == ""  # all was computed here


def test_the_columns_of_a_table_are_chosen_and_its_csv_has_all(swept):
    arguments = ("table=main", "experiment=codings", *AXES[:2], "rows=dense,las")
    done = swept.table(*arguments, "table.columns=[method,T,ppl]", "table.wide=true")
    assert done.code == 0, done.err
    (heads, *_) = [[*row] for row in shown(swept.read("main", "md"))]
    assert heads[:2] == ["method", "T"] and {"wikipedia: ppl", "wikitext2: ppl"} < {*heads}
    assert "accuracy [%]" not in heads
    assert "acc_mean" in swept.read("main") and "\\begin{table*}" in swept.read("main", "tex")
    bad = swept.table(*arguments, "table.columns=[metod]")
    assert bad.code == 1 and "table.columns: got metod; did you mean method" in bad.err


def test_a_tex_engine_takes_the_tables(rows, tmp_path):
    paths = [sheet.write(layout(n)(rows), tmp_path / n)[2] for n in ("codings", "energy", "main")]
    compile_latex(paths)
