"""The table of energy under hardware profiles, and its figures, from results made by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from pipeline.figures import hardware as figures
from pipeline.tables import sheet
from pipeline.tables.hardware import energy_models
from stages.errors import InputError
from stages.profiles.base import PARTS
from tests.pipeline.tables.test_latex import check_latex

WORKLOADS = [["prefill", 512], ["decode", 4096]]
SPIKES = {"dense": None, "integer8": None, "gated": 2.0, "timed": 0.8}
ENERGY = {"dense": 10.0, "integer8": 4.0, "gated": 5.0, "timed": 2.0}


def costs(name: str, scale: float) -> dict[str, Any]:
    energy = {"45nm": ENERGY[name] * scale, "streamed": 10 * scale}
    even = None if SPIKES[name] is None else {"45nm": 4.0, "streamed": 0.0}
    found: dict[str, Any] = {"energy_J": energy["45nm"], "saving": 1 - ENERGY[name] / 10}
    for profile, joules in energy.items():
        found[f"energy_J_{profile}"] = joules
        found[f"saving_{profile}"] = 1 - joules / (10 * scale)
        found[f"breakeven_{profile}"] = even and even[profile]
    return found


def result(name: str, tokens: int) -> dict[str, Any]:
    ratio = {"ratio_wikipedia": 1.01, "ratio_wikipedia_low": 1.0, "ratio_wikipedia_high": 1.02}
    return {
        "model": "small",
        "row": name,
        "coding": name,
        "timesteps": None if name == "dense" else 6,
        "grains": 1,
        "spikes_per_value": SPIKES[name],
        **costs(name, tokens),
        **(dict.fromkeys(ratio) if name == "dense" else ratio),
        "ppl_wikipedia": 20.0,
        "decode": costs(name, 1.0),
        "models": {"large": {"causal": {"prefill": costs(name, 1e3), "decode": costs(name, 1e2)}}},
        "evaluation": {"wikipedia": {"windows": 2, "length": 8, "all": False}},
        "replicates": 1,
    }


def row(name: str, tokens: int) -> Any:
    evaluation = SimpleNamespace(corpora=["wikipedia"], length=8, windows=2)
    settings = SimpleNamespace(energy=SimpleNamespace(tokens=tokens), evaluation=evaluation)
    return SimpleNamespace(result=result(name, tokens), run=SimpleNamespace(settings=settings))


def table(against: str = "integer8", workloads: Any = WORKLOADS) -> sheet.Sheet:
    rows = [row(name, tokens) for tokens in (512, 4096) for name in SPIKES]
    return energy_models(rows, {"dense": "ANN"}, workloads, against, ["45nm", "streamed"])


def test_every_model_and_workload_has_every_row_once() -> None:
    frame = table().frame
    assert len(frame) == 2 * 2 * 4
    places = list(dict.fromkeys(zip(frame["model"], frame["workload"], strict=True)))
    assert places == [
        *(("small", "prefill 512"), ("small", "decode 4096")),
        *(("large", "prefill 512"), ("large", "decode 4096")),
    ]
    assert list(frame["method"][:4]) == ["ANN", "integer8", "gated", "timed"]


def test_energies_are_over_those_of_the_row_of_the_same_workload() -> None:
    frame = table().frame.set_index(["model", "workload", "row"])
    for place in (("small", "prefill 512"), ("large", "decode 4096")):
        assert frame.loc[(*place, "gated"), "over_45nm"] == pytest.approx(5 / 4)
        assert frame.loc[(*place, "timed"), "over_45nm"] == pytest.approx(2 / 4)
        assert frame.loc[(*place, "integer8"), "over_45nm"] == 1
        assert frame.loc[(*place, "gated"), "saving_45nm"] == pytest.approx(0.5)
    assert frame.loc[("small", "prefill 512", "gated"), "energy_J_45nm"] == 5 * 512
    assert frame.loc[("large", "decode 4096", "gated"), "energy_J_45nm"] == 5e2


def test_what_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="no row is called integer4"):
        table("integer4")
    with pytest.raises(InputError, match="no row has a workload of prefill 7"):
        table(workloads=[["prefill", 7]])


def test_it_reads_as_a_table(tmp_path: Path) -> None:
    made = table()
    check_latex(sheet.write(made, tmp_path / "energy_models")[2])
    assert "environment" in made.frame and made.note == ""
    text = sheet.printed(made)
    assert "50.0" in text and "1.25" in text and "over integer8" in text
    assert max(map(len, text.splitlines())) <= 120


def test_points_lines_and_levels_of_the_figure_of_savings() -> None:
    results = [result(name, 512) for name in SPIKES]
    frame = figures.saving_frame(results)
    assert figures.drawable(frame) and not figures.drawable(frame[frame["profile"] == "45nm"])
    drawn = figures.saving_by_rate(frame)
    panel, other = drawn.axes
    assert [panel.get_title(), other.get_title()] == [
        "45nm: 4.00",
        "streamed: 0.00",
    ]
    points = sorted(
        {tuple(line.get_xydata()[0]) for line in panel.lines if len(line.get_xydata()) == 1}
    )
    assert points == [pytest.approx((0.8, 0.8)), pytest.approx((2.0, 0.5))]
    levels = sorted({line.get_ydata()[0] for line in panel.lines if [*line.get_xdata()] == [0, 1]})
    assert levels == pytest.approx([0, 0.6])  # nothing saved, and the integers
    assert {line.get_xdata()[0] for line in panel.lines if list(line.get_ydata()) == [0, 1]} == {
        4.0
    }
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names == ["gated", "timed", "break-even of prefills", "integers, prefill"]


def test_bars_of_parts_are_of_what_the_dense_model_costs() -> None:
    def parts(scale: float) -> pd.DataFrame:
        rows = [
            {
                "convention": convention,
                "phase": phase,
                "profile": profile,
                "part": part,
                "J": joules,
            }
            for convention in ("paper", "causal")
            for phase in ("prefill", "decode")
            for profile, shares in (
                ("45nm", {"compute": 1}),
                ("streamed", {"compute": 1, "weights": 3}),
            )
            for part, joules in shares.items()
        ]
        frame = pd.DataFrame(rows).assign(model=None)
        other = frame.assign(model="large", J=1e9)
        frame["J"] *= scale
        return pd.concat([frame, other], ignore_index=True)

    def saving(name: str, scale: float) -> dict[str, Any]:
        saved = {f"saving_{profile}": 1 - scale for profile in ("45nm", "streamed")}
        made = result(name, 512)
        return made | saved | {"decode": made["decode"] | saved}

    jobs: Any = {
        Job(parts(scale)): saving(name, scale) for name, scale in (("dense", 1.0), ("gated", 2.0))
    }
    frame = figures.part_frame(jobs)
    longer = {
        Job(parts(8 * scale)): saving(n, scale) for n, scale in (("dense", 1.0), ("timed", 2.0))
    }
    other = {job: made | {"model": "large"} for job, made in longer.items()}
    both = (
        figures.part_frame({**jobs, **other}).groupby(["series", "profile", "phase"])["share"].sum()
    )
    assert both["dense, small", "45nm", "decode"] == both["dense, large", "45nm", "decode"] == 1
    assert both["gated, small", "45nm", "decode"] == both["timed, large", "45nm", "decode"] == 2
    shares = frame.groupby(["series", "profile", "phase"])["share"].sum()
    assert shares["dense", "streamed", "decode"] == 1 and shares["gated", "45nm", "prefill"] == 2
    drawn = figures.joules_by_part(frame)
    assert drawn is not None
    assert [axes.get_title() for axes in drawn.axes] == ["streamed, prefill", "streamed, decode"]
    names = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    assert names == ["dense", "gated"] and drawn.axes[0].yaxis_inverted()
    widths = [bar.get_width() for bar in drawn.axes[0].patches]
    assert widths == [0.25, 0.5, 0.75, 1.5]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(PARTS[:2])
    assert figures.joules_by_part(frame[frame["series"] == "dense"]) is None


class Job:
    """What a figure asks of the folder of a job."""

    def __init__(self, parts: pd.DataFrame) -> None:
        self.parts = parts
