"""Tables: order of columns, what a reader sees, and files that are the same every time."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pipeline.results import rows
from pipeline.results.folders import RunFolder
from pipeline.tables import tables
from stages.errors import InputError
from tests.pipeline.tables.test_latex import check_latex, compile_latex

DENSE = {
    "model": "smol_lm&2",
    "coding": "dense",
    "grains": None,
    "timesteps": None,
    "ppl_wikipedia": 20.1264,
    "acc_piqa": 0.4567,
    "acc_piqa_se": 0.0498,
    "acc_piqa_n": 100,
    "nmse": None,
    "spikes_per_value": None,
    "macs_G": 3842.385,
    "acs_G": 0.0,
    "energy_J": 17.675,
    "saving": 0.0,
    "conversion_s": None,
    "seconds": {"evaluation": 3.0},
    "axes": {"coding": "dense"},
}
LAS = DENSE | {
    "coding": "las",
    "grains": 1,
    "timesteps": 6,
    "ppl_wikipedia": 4.51e7,
    "ppl_wikipedia_se": None,
    "ratio_wikipedia": 4.51e7 / 20.1264,
    "ratio_wikipedia_low": 1e6,
    "ratio_wikipedia_high": 3e6,
    "ratio_piqa": 1.01,
    "changed_piqa": 0.04,
    "replicates": 3,
    "ppl_c4": float("inf"),
    "nmse": 3.14e-4,
    "spikes_per_value": 0.8161,
    "acs_G": 1234.56,
    "energy_J": 8.1,
    "saving": 0.5432,
    "conversion_s": 12.34,
}


@pytest.fixture
def frame() -> pd.DataFrame:
    return rows.result_frame([DENSE, LAS])


def shown(path: Path) -> list[dict[str, str]]:
    """Read a Markdown table back as one dict a row."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_columns_are_in_the_promised_order(frame):
    assert list(frame.columns) == [
        "model",
        "coding",
        "grains",
        "timesteps",
        "ppl_wikipedia",
        "ratio_wikipedia",
        "ppl_c4",
        "acc_piqa",
        "nmse",
        "spikes_per_value",
        "macs_G",
        "acs_G",
        "energy_J",
        "saving",
        "fitting_s",
        "conversion_s",
        "replicates",
        "ppl_wikipedia_se",
        "ratio_wikipedia_low",
        "ratio_wikipedia_high",
        "acc_piqa_se",
        "acc_piqa_n",
        "ratio_piqa",
        "changed_piqa",
    ]


def test_what_rows_may_leave_out_has_its_place_where_one_has_it(tmp_path):
    told = {"transform": "rotate", "bits": 7.585, "trained": True, "convention": "bit_plane"}
    told |= {"bound_db": 12.345}
    frame = rows.result_frame([DENSE, LAS | told])
    assert list(frame.columns)[:7] == [
        *("model", "coding", "transform", "grains", "timesteps", "bits", "trained")
    ]
    place = list(frame).index("nmse")
    assert list(frame)[place + 1 : place + 4] == ["bound_db", "convention", "spikes_per_value"]
    assert "row" not in frame
    cells = shown(tables.write(frame, tmp_path / "t", "")[0])[1]
    assert (cells["bits"], cells["trained"], cells["convention"]) == ("7.58", "yes", "bit_plane")
    assert cells["above Shannon [dB]"] == "12.3"


def test_the_name_of_a_row_is_shown_where_rows_are_else_alike():
    gated = [LAS | {"coding": "gated", "row": name} for name in ("gated2", "offset")]
    frame = rows.result_frame([DENSE, *gated])
    assert list(frame["row"]) == ["dense", "gated2", "offset"]
    three = gated[1] | {"grains": 3}
    assert "row" not in rows.result_frame([DENSE, gated[0], three])
    turned = gated[1] | {"transform": "rotate", "row": "gated2"}
    assert "row" not in rows.result_frame([gated[0], turned])
    assert rows.row_name(turned) == "gated2"


def test_fitting_takes_its_statistics_along():
    frame = rows.result_frame([DENSE, LAS | {"fitting_s": 3.5}])
    assert pd.isna(frame["fitting_s"][0]) and frame["fitting_s"][1] == 3.5


def test_a_coding_of_fixed_steps_is_shown_once():
    keys = {"fitting": "a", "energy": "b"}
    ttfs = LAS | {"coding": "ttfs", "row": "ttfs", "keys": keys}
    turned = ttfs | {"transform": "rotate", "keys": keys | {"energy": "c"}}
    other = ttfs | {"row": "ttfs_wide"}
    given = [ttfs, dict(ttfs), turned, other, LAS, LAS]
    assert rows.distinct(given) == [ttfs, turned, other, LAS, LAS]  # what has no keys all stays


def test_markdown_shows_each_column_in_its_own_way(frame, tmp_path):
    dense, las = shown(tables.write(frame, tmp_path / "t", "Caption.")[0])
    assert dense["wikipedia: ppl"] == "20.126" and dense["wikipedia: vs dense"] == "–"
    assert las["wikipedia: vs dense"] == ">9999 %" and las["replicates"] == "3"
    assert dense["piqa [%]"] == "46 ± 5"
    assert dense["MACs [G]"] == "3842"
    assert dense["energy [J]"] == "17.7"
    assert {dense[name] for name in ("n", "T", "nmse", "ppl c4")} == {"–"}
    assert (las["wikipedia: ppl"], las["ppl c4"]) == ("4.5e7", "inf")
    assert (las["n"], las["T"]) == ("1", "6")
    assert (las["nmse"], las["spikes / value"]) == ("3.1e-4", "0.816")
    assert las["energy [J]"] == "8.10"
    assert (las["ACs [G]"], las["saving"], las["conversion [s]"]) == ("1235", "54.3 %", "12.3")
    assert not any("_" in name for name in dense)  # heads are for people, the csv's names are not


def test_number_of_items_is_told_beside_every_table(capsys):
    for results, told in (([DENSE, LAS], "100"), ([DENSE, LAS | {"acc_piqa_n": 50}], "50/100")):
        assert f"piqa ({told} questions)" in tables.run_sheet(results).caption


def test_small_standard_errors_get_another_decimal(tmp_path):
    frame = rows.result_frame([DENSE | {"acc_piqa": 0.45678, "acc_piqa_se": 0.0041}])
    assert shown(tables.write(frame, tmp_path / "t", "")[0])[0]["piqa [%]"] == "45.7 ± 0.4"


def test_csv_keeps_the_numbers(frame, tmp_path):
    read = pd.read_csv(tables.write(frame, tmp_path / "t", "Caption.")[1])
    assert list(read.columns) == list(frame.columns)
    assert read["nmse"][1] == LAS["nmse"] and read["saving"][1] == LAS["saving"]
    assert read["ppl_c4"][1] == float("inf") and pd.isna(read["ppl_c4"][0])
    assert read["acc_piqa_se"][0] == 0.0498 and read["acc_piqa_n"][0] == 100
    assert "1,6," in (tmp_path / "t.csv").read_text().splitlines()[2]


def test_same_results_give_the_same_bytes(tmp_path):
    texts = [
        [path.read_bytes() for path in tables.write(made, tmp_path / folder / "t", "Caption.")]
        for folder, made in (
            ("a", rows.result_frame([DENSE, LAS])),
            ("b", rows.result_frame(json.loads(json.dumps([DENSE, LAS])))),
        )
    ]
    assert texts[0] == texts[1]
    assert not any(b"\r" in text for text in texts[0])


def test_latex_is_sound(frame, tmp_path):
    frame.loc[0, "coding"] = r"a_b & 50% #1 $x^{2}$ ~ \c"
    tex = tables.write(frame, tmp_path / "quick_start", "100 % of a_b & c.")[2]
    text = tex.read_text(encoding="utf-8")
    assert r"smol\_lm\&2" in text and r"100 \% of a\_b \& c." in text
    assert r"$4.5\times10^{7}$" in text and r"$\infty$" in text and r"$0.46$" not in text
    assert r"46 $\pm$ 5" in text
    check_latex(tex)


def test_a_tex_engine_takes_the_table(frame, tmp_path):
    frame.loc[0, "coding"] = r"a_b & 50% #1 $x^{2}$ ~ \c"
    compile_latex([tables.write(frame, tmp_path / "quick_start", "100 % of a_b & c.")[2]])


def test_sweep_rows_follow_the_job_numbers(tmp_path, capsys):
    for number in (10, 2, 0):
        folder = tmp_path / "sweep" / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/config.yaml").write_text(
            "{table: {columns: null, wide: false}, energy: {}}"
        )
        costs = {name: LAS[name] for name in rows.COSTS}
        energies = dict.fromkeys(("paper", "decode", "paper_decode"), costs)
        result = LAS | energies | {"coding": f"job{number}", "label": "las T=6"}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (tmp_path / "sweep" / "1").mkdir()  # a job that failed
    frame = tables.sweep_table(RunFolder(tmp_path / "sweep"), "quickstart", tmp_path / "tables")
    assert list(frame["coding"]) == ["job0", "job2", "job10"]
    printed = capsys.readouterr().out
    assert printed.index("job0") < printed.index("job2") < printed.index("job10")
    written = {path.name for path in (tmp_path / "tables").iterdir()}
    names = ("quickstart", "quickstart_energy")
    assert written == {f"{name}.{kind}" for name in names for kind in ("md", "csv", "tex")}


def test_a_sweep_without_results_says_so(tmp_path):
    with pytest.raises(InputError, match=r"no job below .* result\.json"):
        tables.sweep_table(RunFolder(tmp_path), "quickstart", tmp_path / "tables")


def test_energy_stands_in_both_conventions_and_phases() -> None:
    costs = {"macs_G": 1.0, "acs_G": 2.0, "energy_J": 3.0, "saving": 0.5}
    places = {"paper": 10, "decode": 100, "paper_decode": 1000}
    nested = {p: {k: v * f for k, v in costs.items()} for p, f in places.items()}
    frame = rows.energy_frame([{"label": "las T=6 n=1", **costs, **nested}])
    found = frame.set_index(["convention", "phase"])["energy_J"].to_dict()
    assert found == {
        ("paper", "prefill"): 30.0,
        ("causal", "prefill"): 3.0,
        ("paper", "decode"): 3000.0,
        ("causal", "decode"): 300.0,
    }
