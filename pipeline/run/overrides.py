"""A command line before Hydra reads it: the experiment that it is of, or the one conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override, OverrideType

from pipeline.run import axes, shipped
from pipeline.run.additions import CHOSEN_BY as NAMED
from pipeline.run.additions import opened
from pipeline.run.errors import choose
from pipeline.run.grammar import parsed
from pipeline.run.shipped import CONF
from stages.errors import InputError

FLAGS = ("-m", "--multirun")
CONVERSION = ("coding", "row", "model", "transform")  # an override of these asks for one conversion
SEVERAL = ("profile",)  # groups of which a configuration chooses several files
NAMED_KEY = re.compile(rf"^\+\+(?=(?:{'|'.join(NAMED)})\.)")
GONE = {
    "variant": "the rows of an experiment are chosen by rows={}",
    "label": "the name of a conversion is row={}",
}


def settled(arguments: Sequence[str], default: str | None = None, conf: Path = CONF) -> list[str]:
    """The arguments with the experiment they are of where it is not that of conf/config.yaml.

    Without experiment=NAME, an override of the coding, the model or the transform asks for one
    conversion, or for a sweep over exactly the values that it lists: experiment=none. Where none does,
    `default` is the experiment; rows=A,B are rows of it, and a `default` has any model and transform.
    Raises InputError for what the rows would lose or be misnamed by, and Hydra's
    OverrideParseException for what cannot be read.
    """
    typed = {str(o.key_or_group) for o in parsed(arguments)}
    arguments = spelled(arguments, conf)
    given = {str(o.key_or_group): o for o in parsed(arguments)}
    _check(given, conf)
    added = []
    if "experiment" not in given:
        asking = CONVERSION if default is None else CONVERSION[:2]
        if "rows" in typed:
            added = [f"experiment={default or shipped.default('experiment', conf)}"]
        elif any(key.partition(".")[0] in asking for key in given):
            added = ["experiment=none"]
        elif default is not None:
            added = [f"experiment={default}"]
    chosen = str(given["experiment"].value()) if "experiment" in given else _value(added)
    name = chosen or shipped.default("experiment", conf)
    _check_groups(given, name, conf)
    if name == "none" and "row" in given:
        _check_name(given, default or shipped.default("experiment", conf), conf)
    swept = any(o.is_sweep_override() for o in given.values())
    if name == "none" and swept and "hydra.mode" not in given and not {*FLAGS} & {*arguments}:
        added.append("hydra.mode=MULTIRUN")
    return _spread([*arguments, *added], given, name, conf)


def launched(arguments: Sequence[str]) -> list[str]:
    """Settled arguments for Hydra's command line, those of a sweep with the flag `--multirun`.

    Hydra looks up the mode in the configuration, and takes a sweep for one job where that cannot be
    composed, whose error is then that of the commas.
    """
    given = parsed(arguments)
    one = any(o.key_or_group == "hydra.mode" and o.value() == "RUN" for o in given)
    flagged = any(argument.startswith("-") for argument in arguments)
    swept = any(o.is_sweep_override() for o in given) and not (one or flagged)
    return [*arguments, *(["--multirun"] if swept else [])]


def spelled(arguments: Sequence[str], conf: Path = CONF) -> list[str]:
    """The arguments as Hydra reads them, which has no null for a group and adds a key by `++`.

    Raises InputError for an option of earlier versions, with the one that replaces it.
    """
    for argument in arguments:
        key, _, value = argument.lstrip("~+").partition("=")
        if key in GONE:
            raise InputError(f"{argument}: no such option; {GONE[key].format(value or 'NAME')}")
    plain = [re.sub(r"^experiment=null$", "experiment=none", each) for each in arguments]
    return opened([re.sub(r"^rows=", "row=", each) for each in plain], conf)


def shown(overrides: Sequence[str]) -> list[str]:
    """The overrides of a job for a person to read: what is spelled for Hydra as it is typed."""
    return [NAMED_KEY.sub("", each) for each in overrides if each != "experiment=none"]


def _check(given: Mapping[str, Override], conf: Path) -> None:
    """Raises InputError for what Hydra would take and fail of, or run as something else."""
    if (place := given.get("hydra.output_subdir")) is not None:
        raise InputError(
            f"{place.input_line}: a job's configuration is read from .hydra in its folder; choose the "
            "folder by hydra.run.dir=FOLDER or hydra.sweep.dir=FOLDER"
        )
    for group in SEVERAL:
        shipped.keyed(group, conf)
    for key, override in given.items():
        plain = not (override.is_delete() or override.is_sweep_override())
        if (plain or key in SEVERAL) and (conf / key).is_dir():
            _check_choice(key, override, conf)
        if key in ("row", "rows", "experiment") and override.is_delete():
            raise InputError(f"{override.input_line}: leave it out instead")
        if override.is_delete() and (conf / key).is_dir():
            known = ", ".join(shipped.names(key, conf))
            raise InputError(
                f"{override.input_line}: nothing runs without one; give {key}=NAME, out of {known}"
            )
        if override.is_delete() and "." in key and key.partition(".")[0] not in (*NAMED, "hydra"):
            raise InputError(
                f"{override.input_line}: a key that is taken out has its default, which no file says; "
                f"give {key}=VALUE"
            )
    experiment = given.get("experiment")
    if experiment is not None and experiment.is_sweep_override():
        raise InputError(f"{experiment.input_line}: give one experiment a command")


def _check_choice(group: str, override: Override, conf: Path) -> None:
    """Raises InputError unless a group is given a name or, where it has several at once, names."""
    value = None if override.is_sweep_override() or override.is_delete() else override.value()
    names = shipped.names(group, conf)
    known = ", ".join(names)
    if group not in SEVERAL:
        if not isinstance(value, str):
            raise InputError(f"{override.input_line}: give one name, out of {known}")
    elif not (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
        raise InputError(f"{override.input_line}: give a list, {group}=[NAME,NAME], out of {known}")
    elif unknown := [each for each in value if each not in names]:
        raise InputError(f"{override.input_line}: no such {group}; {choose(unknown[0], names)}")


def _check_groups(given: Mapping[str, Override], experiment: str, conf: Path) -> None:
    """Raises InputError where a chosen file's keys are lost to those that the experiment sets."""
    of = shipped.experiment(experiment, conf)
    for key in (key for key in given if (conf / key).is_dir() and key != "coding"):
        if lost := [name for name in (*of.keys, *of.params) if name.startswith(f"{key}.")]:
            raise InputError(
                f"{given[key].input_line}: experiment={experiment} sets {', '.join(lost)} itself; give "
                "those keys instead"
            )


def _check_name(given: Mapping[str, Override], experiment: str, conf: Path) -> None:
    """Raises InputError where a conversion would be called as a row or a coding that it is not."""
    row = given["row"]
    swept = row.is_sweep_override()
    names = row.sweep_string_iterator() if swept else [row.get_value_element_as_str()]
    asked = {str(o.input_line) for o in given.values()}
    if "coding" not in given:
        asked.add(f"coding={shipped.default('coding', conf)}")
    rows = {each: {"coding": each} for each in shipped.names("coding", conf)}
    rows |= {name: dict(each) for name, each in shipped.experiment(experiment, conf).rows.items()}
    for name in (each.strip("'\"") for each in names):
        meant = axes.overrides(rows.get(name, {}))
        if not asked.issuperset(meant):
            raise InputError(
                f"{row.input_line}: {name} is the name of another conversion: give its options, "
                f"{' '.join(meant)}, or this one another name"
            )


def _spread(
    arguments: list[str], given: Mapping[str, Override], experiment: str, conf: Path
) -> list[str]:
    """The arguments as a sweep with several codings or rows takes them.

    Hydra composes what it is given beside the axes before there is a job, with whatever coding is the
    default: a field of the coding is an axis of one value. A row that is run by itself, without a
    sweep, is given as its overrides.
    """
    of = shipped.experiment(experiment, conf)
    coding = of.coding or shipped.default("coding", conf)
    alone = "hydra.mode=RUN" in arguments
    lines = [str(o.input_line) for o in given.values() if not o.key_or_group.startswith("hydra")]
    sweep = axes.swept(lines, {} if alone else of.params, of.rows, coding, conf)
    if alone and "row" in given:
        if len(sweep.jobs) > 1:
            raise InputError(
                f"{given['row'].input_line} hydra.mode=RUN: a run by itself has one row"
            )
        return [*arguments, *(each for each in sweep.jobs[0].row if each not in arguments)]
    several = of.rows or ("coding" in given and given["coding"].is_sweep_override())
    if alone or not several:
        return arguments
    fixed = {
        str(o.input_line): f"{key}=choice({o.get_value_element_as_str()})"
        for key, o in given.items()
        if key.startswith("coding.") and o.type is OverrideType.CHANGE and not o.is_sweep_override()
    }
    return [fixed.get(argument, argument) for argument in arguments]


def _value(added: Sequence[str]) -> str | None:
    return added[0].partition("=")[2] if added else None
