"""Interactive figures of a page to explore, in Vega-Altair: what readers filter and choose acts on all.

The parameters are what the controls of the page set: lists of `codings`, `timesteps`, `transforms` and
`models` that are shown, and one `profile`, `phase`, `corpus`, `role` and `measure`. `picked` holds the
rows that a click has chosen; without any, all are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from pipeline.figures.comparisons import LOOKS
from pipeline.figures.explored import Records
from pipeline.figures.hardware import COLOURS, PHASES
from pipeline.figures.style import ROLES
from stages.profiles.base import PARTS

# Okabe and Ito's colours, then Tol's light ones: 15 rows' names that a reader can tell apart
PALETTE = (
    *(colour for colour, _ in LOOKS),
    *("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00"),
    "#888888",
)
DENSE = "#000000"
SHOWN = (
    "indexof(codings, datum.coding) >= 0 && indexof(transforms, datum.transform) >= 0 && "
    "indexof(models, datum.model) >= 0 && (datum.T == null || indexof(timesteps, datum.T) >= 0)"
)
LISTS = {"codings": "coding", "timesteps": "T", "transforms": "transform", "models": "model"}
WHOLE = "all"  # roles
PPL, EXCESS = "perplexity", "excess over dense [%]"  # measures
FAINT = 0.18
TICKS = 16  # of an axis of layers
CLICKED = ("points_energy", "points_steps", "bars")  # in which a click chooses
TOOLTIP = {
    "row": "row",
    "model": "model",
    "coding": "coding",
    "transform": "transform",
    "T_shown": "T",
    "n": "n",
    "steps_shown": "steps",
    "spikes": "spikes / value",
    "ppl_shown": "perplexity",
    "versus": "vs dense",
    "energy_shown": "energy",
    "saving": "saving",
    "command": "command",
}
CALCULATED = {
    "heights": f"datum.ppl[corpus][measure == '{PPL}' ? 'perplexity' : 'excess']",
    "height": "datum.heights.drawn",
    "low": "datum.heights.low",
    "high": "datum.heights.high",
    "ppl_shown": "datum.ppl[corpus].shown",
    "versus": "datum.ppl[corpus].versus",
    "diverged": "datum.ppl[corpus].diverged",
    "priced": "datum.energy[phase][profile]",
    "J": "datum.priced ? datum.priced.J : null",
    "energy_shown": "datum.priced ? datum.priced.shown : '–'",
    "saving": "datum.priced ? datum.priced.saving : '–'",
    "T_shown": "datum.T == null ? '–' : '' + datum.T",
    "steps_shown": "datum.steps == null ? '–' : '' + datum.steps",
    "kind": "datum.dense ? 'dense' : datum.diverged ? 'diverged' : 'measured'",
}
SHAPES = {"measured": "circle", "dense": "diamond", "diverged": "triangle-up"}


@dataclass(frozen=True)
class Marks:
    """The colour of a row's name, and the parameter that holds the rows that a click has chosen."""

    colour: alt.Color
    picked: alt.Parameter

    @property
    def opacity(self) -> Any:
        return alt.when(self.picked).then(alt.value(1)).otherwise(alt.value(FAINT))


JOULES = "datum.value && datum.value < 1e-3 ? format(datum.value, '~e') : format(datum.value, '~g')"
LOG = alt.Scale(type="log", nice=False, padding=14)


def _labels(digits: str, number: str) -> str:
    """Labels of a logarithmic axis at these digits of every decade, and at all ticks between digits."""
    power = "pow(10, floor(log(datum.value) / LN10 + 1e-9))"
    digit = f"round(1e6 * datum.value / {power}) / 1e6"
    return f"{digit} % 1 > 0 || indexof([{digits}], {digit}) >= 0 ? {number} : ''"


POWERS = _labels("1, 2, 5", "format(datum.value, '~g')")
HEIGHT = alt.Y("height:Q", title=None, scale=LOG, axis=alt.Axis(labelExpr=POWERS))
NUMBER = alt.value("#3d4650")  # of T beside a point, which its colour would be too light for


def choices(data: Mapping[str, Records]) -> dict[str, list[Any]]:
    """What the controls offer: the values of every list, and of profile, phase, corpus and role."""
    rows = data["rows"]
    lists = {
        name: [v for v in dict.fromkeys(row[field] for row in rows) if v is not None]
        for name, field in LISTS.items()
    }
    lists["timesteps"].sort()
    compared = any("drawn" in each["excess"] for row in rows for each in row["ppl"].values())
    roles = {each["role"] for each in data["layers"]}
    return lists | {
        "profile": list(dict.fromkeys(p for r in rows for e in r["energy"].values() for p in e)),
        "phase": list(PHASES.values()),
        "corpus": list(rows[0]["ppl"]),
        "measure": [PPL, EXCESS] if compared else [PPL],
        "role": [WHOLE, *(role for role in ROLES if role in roles)],
    }


def spec(data: Mapping[str, Records]) -> dict[str, Any]:
    """The Vega-Lite specification with its data sets, which needs nothing else to be drawn."""
    # a name of its own: Altair's would count what this process has drawn
    picked = alt.selection_point(name="picked", fields=["row"], toggle="true", clear="dblclick")
    marks = Marks(_colour(data["rows"]), picked)
    figures: list[Any] = [_fronts(data["rows"], marks)]
    if data["layers"]:
        figures.append(_layers(data["layers"], marks))
    if data["parts"]:
        figures.append(_parts(data["parts"], marks))
    chart = alt.vconcat(*figures, spacing=34).resolve_scale(color="independent")
    offered = choices(data)
    settings = [alt.param(name=n, value=v if n in LISTS else v[0]) for n, v in offered.items()]
    made: dict[str, Any] = chart.add_params(*settings).configure(**_looks()).to_dict()
    made.pop("$schema")  # an address, which the page would not open
    (chosen,) = (each for each in made["params"] if each["name"] == picked.name)
    chosen["views"] = [name for name in _names(made) if name.startswith(CLICKED)]
    return made | {"datasets": {name: list(each) for name, each in data.items()}}


def _names(chart: Mapping[str, Any]) -> Iterator[str]:
    """The names of a specification's views, behind which Altair has put a number."""
    if "name" in chart:
        yield chart["name"]
    for each in (chart.get(key, ()) for key in ("vconcat", "hconcat", "layer")):
        for below in each:
            yield from _names(below)


def _looks() -> dict[str, Any]:
    font = 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif'
    text = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "font": font,
        "axis": text | {"gridColor": "#e8ebee", "labelFlush": False},
        "legend": text | {"symbolType": "circle", "labelLimit": 260},
        "title": {"fontSize": 13, "anchor": "start", "fontWeight": "bold", "offset": 8},
        "view": {"stroke": "#d6dbe0"},
    }


def _colour(rows: Records) -> alt.Color:
    """A colour for every row's name, that of the dense model black; the same whatever is filtered."""
    dense = {row["method"] for row in rows if row["dense"]}
    names = list(dict.fromkeys(row["method"] for row in rows))
    coded = [name for name in names if name not in dense]
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(coded)}
    colours |= dict.fromkeys(dense, DENSE)
    scale = alt.Scale(domain=names, range=[colours[name] for name in names])
    legend = alt.Legend(title=None, orient="top", columns=9)
    return alt.Color("method:N", scale=scale, legend=legend)


def _rows(*fields: str) -> alt.Chart:
    """The rows that the filters leave and that have these fields, under the chosen text and profile."""
    chart = alt.Chart(alt.NamedData("rows")).transform_filter(SHOWN)
    chart = chart.transform_filter("datum.ppl[corpus].known").transform_calculate(**CALCULATED)
    return chart.transform_filter(" && ".join(f"isValid(datum.{name})" for name in fields))


def _fronts(rows: Records, marks: Marks) -> alt.HConcatChart:
    """Perplexity against energy, with T beside the points, and against steps."""
    joules = alt.X("J:Q", title="energy [J]", scale=LOG)
    joules = joules.axis(labelExpr=_labels("1, 2, 3, 5, 7", f"({JOULES})"))
    energy = _perplexity("J", joules, "energy", marks)
    text = _rows("height", "J").transform_filter("datum.T != null")
    text = text.mark_text(dx=8, dy=-7, fontSize=10).encode(x=joules, y=HEIGHT, text="T_shown:N")
    text = text.encode(color=NUMBER, opacity=marks.opacity)
    every = sorted({row["steps"] for row in rows} - {None})
    ticks = alt.Axis(format="d", values=every[:: -(-len(every) // TICKS) or 1])
    count = alt.X("steps:Q", title="steps", axis=ticks).scale(zero=False, padding=14)
    steps = _perplexity("steps", count, "steps", marks)
    left = alt.expr("measure + ', ' + corpus + ', against energy: ' + profile + ', ' + phase")
    right = alt.TitleParams(alt.expr("measure + ' against steps'"))
    return alt.hconcat(
        alt.layer(energy, text).properties(width=540, height=330, title=alt.TitleParams(left)),
        steps.properties(width=320, height=330, title=right),
        spacing=30,
    ).resolve_scale(y="shared")


def _perplexity(field: str, x: alt.X, name: str, marks: Marks) -> Any:
    """Points against `field` with their intervals, the front of every model, its dense perplexity."""
    rows, y = _rows("height", field), HEIGHT
    front = (
        rows.transform_filter("!datum.diverged")
        .transform_window(
            best="min(height)", sort=[{"field": field}], frame=[None, 0], groupby=["model"]
        )
        .transform_filter("datum.height <= datum.best")
        .mark_line(interpolate="step-after", color="#b4bcc4", strokeWidth=3)
        .encode(x=x, y=y, detail="model:N")
    )
    level, price = (
        _rows(known).transform_filter("datum.dense").mark_rule(strokeDash=[2, 3], color=DENSE)
        for known in ("height", field)
    )
    bars = rows.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6)
    bars = bars.encode(x=x, y="low:Q", y2="high:Q", color=marks.colour, opacity=marks.opacity)
    scale = alt.Scale(domain=[*SHAPES], range=[*SHAPES.values()])
    points = (
        rows.mark_point(filled=True, size=85, stroke="white", strokeWidth=0.6, cursor="pointer")
        .encode(x=x, y=y, color=marks.colour, opacity=marks.opacity)
        .encode(shape=alt.Shape("kind:N", scale=scale, legend=None))
        .encode(tooltip=[alt.Tooltip(f"{n}:N", title=shown) for n, shown in TOOLTIP.items()])
        .properties(name=f"points_{name}")
        .add_params(_zoom(name))
    )
    points = points.add_params(marks.picked) if name == "energy" else points
    return alt.layer(front, level.encode(y=y), price.encode(x=x), bars, points)


def _zoom(name: str) -> alt.Parameter:
    """Zoom and move a figure, with Shift: a wheel alone is for the page."""
    keys = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
    wheel = "wheel![event.shiftKey]"
    return alt.selection_interval(name=f"zoom_{name}", bind="scales", zoom=wheel, translate=keys)


def _layers(data: Records, marks: Marks) -> alt.HConcatChart:
    """Errors and spikes by layer of the chosen rows, of one role or of all."""
    last = max(each["layer"] for each in data)
    ticks = alt.Axis(format="d", values=[*range(0, last + 1, -(-last // TICKS) or 1)])
    x = alt.X("layer:Q", title="layer (the head last)", axis=ticks)
    x = x.scale(nice=False, padding=14)
    powers = alt.Axis(format="~e", tickCount=5)
    error = alt.Y("NMSE:Q", axis=powers).scale(type="log", nice=False, padding=8)
    errors = _by_layer("NMSE", "NMSE, held-out activations", ".2e", x, error, marks)
    spikes = _by_layer("rate", "spikes a value", ".3f", x, alt.Y("rate:Q"), marks)
    return alt.hconcat(errors, spikes, spacing=30)


def _by_layer(field: str, title: str, digits: str, x: alt.X, y: alt.Y, marks: Marks) -> Any:
    """Lines of the number `field` against the layer."""
    names = ["method", "coding", "transform", "model", "T", "command"]
    chosen = (
        alt.Chart(alt.NamedData("layers"))
        .transform_filter(f"role == '{WHOLE}' || datum.role == role")
        .transform_filter(marks.picked)
        .transform_lookup("row", alt.LookupData(alt.NamedData("rows"), "row", names))
        .transform_filter(SHOWN)
        .transform_aggregate(
            error="mean(error)",
            spikes="sum(spikes)",
            values="sum(values)",
            groupby=["row", "method", "T", "layer", "command"],
        )
        .transform_calculate(
            NMSE="isValid(datum.error) ? exp(datum.error) : null",
            rate="datum.values > 0 ? datum.spikes / datum.values : null",
        )
        .transform_filter(f"isValid(datum.{field})")
        .encode(x=x, y=y.title(title), color=marks.colour.legend(None), detail="row:N")
    )
    number = alt.Tooltip(f"{field}:Q", title=title, format=digits)
    points = chosen.mark_point(filled=True, size=28).properties(name=f"points_{field}")
    points = points.encode(tooltip=["row:N", "layer:Q", number, "command:N"])
    heading = alt.TitleParams(alt.expr(f"'{title} by layer, role: ' + role"))
    ends = chosen.transform_joinaggregate(last="max(layer)", groupby=["row"])
    ends = ends.transform_filter("datum.layer == datum.last && datum.T != null")
    steps = ends.mark_text(dx=7, align="left", fontSize=10).encode(text="T:N")
    steps = steps.properties(name=f"ends_{field}")
    made = alt.layer(chosen.mark_line(strokeWidth=1.6), points, steps)
    return made.properties(width=440, height=230, title=heading)


def _parts(data: Records, marks: Marks) -> alt.Chart:
    """Joules of every row by part under the chosen profile."""
    names = ["coding", "transform", "model", "T", "place", "command", "energy"]
    rows = alt.LookupData(alt.NamedData("rows"), "row", names)
    colours = dict(zip(PARTS, COLOURS, strict=True))
    present = [part for part in PARTS if part in {each["part"] for each in data}]
    scale = alt.Scale(domain=present, range=[colours[part] for part in present])
    joules = alt.X("sum(J):Q", title="energy [J]", axis=alt.Axis(labelExpr=JOULES))
    return (
        alt.Chart(alt.NamedData("parts"), name="bars")
        .transform_filter("datum.profile == profile && datum.phase == phase")
        .transform_lookup("row", rows)
        .transform_filter(f"{SHOWN} && isValid(datum.energy[phase][profile])")
        .transform_calculate(order=f"indexof({present}, datum.part)")
        .mark_bar(cursor="pointer")
        .encode(
            x=joules,
            y=alt.Y(
                "row:N", title=None, sort=alt.SortField("place"), axis=alt.Axis(labelLimit=200)
            ),
            color=alt.Color("part:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
            order="order:Q",
            opacity=marks.opacity,
            tooltip=[
                alt.Tooltip("row:N"),
                alt.Tooltip("part:N"),
                alt.Tooltip("sum(J):Q", title="energy [J]", format=".3~g"),
                alt.Tooltip("command:N"),
            ],
        )
        .properties(
            width=740,
            height=alt.Step(17),
            title=alt.TitleParams(alt.expr("'Energy by part: ' + profile + ', ' + phase")),
        )
    )


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, as `vegaEmbed`, of the version that Altair writes."""
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    made: str = vl_convert.javascript_bundle(None, vl_version=version)  # type: ignore[arg-type]
    return made
