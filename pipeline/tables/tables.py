"""Turn the results of a sweep into its tables: on the terminal, and as Markdown, csv and LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from pipeline.results.columns import Column, excess, percent, perplexity, scientific, small
from pipeline.results.folders import RunFolder
from pipeline.results.rows import (
    BESIDE,
    RATIO,
    TEXT,
    UNDER,
    column_names,
    distinct,
    energy_frame,
    measures,
    result_frame,
    short_setting,
    sweep_results,
)
from pipeline.run.errors import choose
from pipeline.tables import captions, sheet
from stages.errors import InputError

LEFT = (*TEXT, "run", "phase", "role")  # columns of words
ALIASES = {"T": "timesteps", "n": "grains"}  # heads that are names of columns to choose as well
# What is printed of a run's table, and stands in its Markdown and LaTeX; ppl and acc are all of them.
PRINTED = (
    *("model", "coding", "transform", "timesteps", "steps", "grains", "ppl", "acc"),
    *("spikes_per_value", "energy_J", "saving"),
)
ENERGY_CAPTION = (
    "Energy by convention (paper: full attention square, one spiking operand a product; causal: "
    "unmasked positions, both operands, gates and decode scaling) and phase (prefill of a window; "
    "one decoded token at its end); saving against the dense model in the same convention."
)
OPERATIONS = "stages.profiles.operations.Operations"  # profiles without memory
REPEATED = 9  # how dispensable a column is that repeats another
GROUPED = ("nmse_", "share_", "relative_")  # columns that have the first word in common
COLUMNS = {
    column.name: column
    for column in (
        Column("timesteps", "T"),
        Column("steps", "steps", spare=1),
        Column("grains", "n"),
        Column("nmse", "nmse", lambda value: scientific(value, 1)),
        Column("bound_db", "above Shannon [dB]", "{:.1f}".format),
        Column("spikes_per_value", "spikes / value", "{:.3f}".format),
        Column("macs_G", "MACs [G]", lambda value: small(value, 4)),
        Column("acs_G", "ACs [G]", lambda value: small(value, 4)),
        Column("energy_J", "energy [J]", lambda value: small(value, 3)),
        Column("saving", "saving", lambda value: f"{100 * value:.1f} %"),
        Column("fitting_s", "fitting [s]", "{:.1f}".format),
        Column("conversion_s", "conversion [s]", "{:.1f}".format),
        Column("bits", "bits", "{:.3g}".format),
        Column("ppl", "ppl", perplexity, beside=("ppl_se",)),
        Column("slope", "slope", "{:g}".format),
        Column("rho", "rho", "{:.4f}".format),
        Column("C", "C", lambda value: scientific(value, 2)),
        Column("C_relative", "C / first loss", "{:.4f}".format),
        Column("last_relative", "last / first loss", "{:.4f}".format),
        Column("R2", "R2", "{:.3f}".format),
    )
}


def write(frame: pd.DataFrame, stem: Path, caption: str) -> list[Path]:
    """Write all of `frame` as stem.md, stem.csv and stem.tex; the same frame gives the same bytes."""
    shown = [str(name) for name in frame if not str(name).endswith(BESIDE)]
    columns = [column(name, frame) for name in shown]
    return sheet.write(sheet.Sheet(frame, columns, caption), stem)


def sweep_table(folder: RunFolder, name: str, tables_dir: Path) -> pd.DataFrame:
    """Print the table of a run's folder and write it as `name`, and its energy as `name`_energy.

    Rows are in the order of the jobs, repeated ones left out. Raises InputError where no job has left
    a result.
    """
    results = distinct(sweep_results(folder.path).values())
    write(energy_frame(results), tables_dir / f"{name}_energy", ENERGY_CAPTION)
    config: Any = OmegaConf.to_container(folder.finished[0].config)
    made = run_sheet(results, config["table"]["columns"], config["energy"])
    sheet.write(made, tables_dir / name, config["table"]["wide"])
    print(sheet.printed(made))
    print(f"energy, both conventions, also of a decoded token: {tables_dir / name}_energy.md")
    return made.frame


def run_sheet(
    results: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None = None,
    energy: Mapping[str, Any] | None = None,
) -> sheet.Sheet:
    """The rows of a sweep in the columns of those `names`; `energy` is what its configuration says."""
    frame = result_frame(results)
    profiles = [*((energy or {}).get("profile") or {}).values()]
    memory = [f"saving_{each['name']}" for each in profiles if each["_target_"] != OPERATIONS]
    usual = (*PRINTED, *[name for name in memory[:1] if name in frame])
    made = choice(sheet.Sheet(frame, [], ""), names or usual, column_names([], []))
    if not names:
        plain = (frame.get("transform", pd.Series("none")) == "none").all()
        empty = {"transform"} if plain else set()
        empty |= {"steps"} - set(frame)  # results of before
        shown = [c for c in made.columns if c.name not in empty]
        if "steps" in frame and frame["steps"].dropna().eq(frame["timesteps"]).all():
            # where they say what T says they are the first to go for want of room
            shown = [replace(c, spare=REPEATED) if c.name == "steps" else c for c in shown]
        made = replace(made, columns=shown)
    main = str(profiles[0]["name"]) if profiles else ""
    return replace(made, caption=captions.sweep(results, made, main))


def choice(
    made: sheet.Sheet, names: Sequence[str] | None, empty: Sequence[str] = ()
) -> sheet.Sheet:
    """The sheet with the columns of these names, each as the sheet has it where it does.

    Raises InputError for a name that is no column of its csv, nor one of those that may be `empty`.
    """
    if not names:
        return made
    frame, known_columns = made.frame, {column.name: column for column in made.columns}
    known = [str(name) for name in frame if not str(name).endswith(BESIDE)]
    check(names, [*known, *empty])
    meant = [name for each in names for name in _meant(each, frame)]
    columns = [known_columns.get(name) or column(name, frame, names) for name in meant]
    return replace(made, columns=columns)


def check_columns(
    names: Sequence[str] | None,
    corpora: Sequence[str],
    tasks: Sequence[str],
    hardware: Sequence[str],
) -> None:
    """Raises InputError where a run that is evaluated on these texts and tasks, with the energy under
    these hardware profiles, has no such column."""
    check(names or (), column_names(corpora, tasks, hardware))


def check(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises InputError for the first of the chosen columns that is not known."""
    known = list(dict.fromkeys([*ALIASES, "ppl", "acc", *known]))
    for name in names:
        if name not in known:
            raise InputError(f"table.columns: got {name}; {choose(name, known)}")


def _meant(name: str, frame: pd.DataFrame) -> list[str]:
    """The columns that a name stands for: `ppl` all perplexities, each with its ratio to the dense
    model's and its spread over replicates where there are any."""
    corpora, tasks = measures(frame)
    if name == "ppl":
        every = [each for n in corpora for each in (f"ppl_{n}", RATIO + n, f"ppl_{n}_spread")]
        return [each for each in every if each in frame and frame[each].notna().any()]
    if name == "acc":
        return [f"acc_{task}" for task in tasks]
    return [ALIASES.get(name, name)]


def column(name: str, frame: pd.DataFrame, names: Sequence[str] = TEXT) -> Column:
    """How the column of a frame reads among others of these `names`."""
    corpora, tasks = measures(frame)
    if name == "coding":
        beside = tuple(n for n in ("row", "setting") if n in frame and n not in names)
        return Column(name, name, partial(_told_apart, beside), beside=beside, words=True)
    for place, corpus in enumerate(corpora):
        if name in (f"ppl_{corpus}", RATIO + corpus, f"ppl_{corpus}_spread"):
            group = corpus if len(corpora) > 1 and RATIO + corpus in frame else ""
            return _of_corpus(name, corpus, group, 3 if place else 0)
    if name.removeprefix("acc_") in tasks:
        head = f"{name.removeprefix('acc_')} [%]"
        beside = (f"{name}_se",)
        return Column(name, head, percent, "max", RATIO + name[4:], beside=beside, spare=4)
    if name.startswith(UNDER):
        return _under(name)
    if name.startswith(GROUPED):
        group, _, rest = name.partition("_")
        show = "{:.3f}".format if group == "share" else COLUMNS["nmse"].show
        return Column(name, rest.replace("_", " to "), show, group=group)
    return COLUMNS.get(name, Column(name, name.replace("_", " "), words=name in LEFT))


def _under(name: str) -> Column:
    """The column of an energy, a saving or a break-even under a hardware profile."""
    kind, profile = next((k, name.removeprefix(k)) for k in UNDER if name.startswith(k))
    if kind == "energy_J_":
        return replace(COLUMNS["energy_J"], name=name, head=f"energy {profile} [J]", spare=3)
    if kind == "saving_":
        return replace(COLUMNS["saving"], name=name, head=f"saving {profile}", spare=3)
    return Column(name, f"break-even {profile}", lambda rate: f"{rate:.2f}", spare=3)


def _of_corpus(name: str, corpus: str, group: str, spare: int) -> Column:
    """The column of a perplexity, of its ratio to the dense model's or of its spread over replicates."""
    if name == f"ppl_{corpus}":
        head = "ppl" if group else f"ppl {corpus}"
        beside = (f"{name}_se",)
        return Column(name, head, perplexity, "min", RATIO + corpus, group, beside, spare=spare)
    if name == RATIO + corpus:
        bounds = (f"{name}_low", f"{name}_high")
        return Column(name, "vs dense", excess, group=group, beside=bounds, spare=2)
    return Column(name, "spread", lambda value: small(value, 2), group=group, spare=5)


def _told_apart(beside: Sequence[str], coding: str, *values: Any) -> str:
    """A coding with the name of the row and the setting that tell its rows apart."""
    texts = {name: str(v) for name, v in zip(beside, values, strict=True) if not pd.isna(v)}
    row = texts.get("row", coding)
    name = row if row.startswith(coding) else f"{coding} {row}"
    return " ".join(filter(None, [name, short_setting(texts.get("setting", ""))]))
