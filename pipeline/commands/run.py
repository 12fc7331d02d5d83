"""`run`, the verb of a command line without one, and `plan`."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import click

from pipeline.commands import verbs

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
SWEPT = click.Option(
    ["-m", "--multirun"], is_flag=True, help="Sweep over the values that commas separate."
)
# Hydra's flags, which it is given as they are; its help is --hydra-help.
FLAGS = (
    SWEPT,
    click.Option(["-r", "--run"], is_flag=True, help="Run one job."),
    click.Option(
        ["-c", "--cfg"], type=click.Choice(["job", "hydra", "all"]), help="Print the configuration."
    ),
    click.Option(["--resolve"], is_flag=True, help="With --cfg: interpolations as values."),
    click.Option(["-p", "--package"], metavar="KEY", help="With --cfg: that part of it."),
    click.Option(
        ["-i", "--info"],
        is_flag=False,
        flag_value="all",
        type=click.Choice(INFO),
        help="Print where the configuration comes from.",
    ),
    click.Option(
        ["-cp", "--config-path"],
        type=click.Path(exists=True, file_okay=False, resolve_path=True),
        metavar="FOLDER",
        help="Another conf.",
    ),
    click.Option(["-cn", "--config-name"], metavar="NAME", help="Another conf/config.yaml."),
    click.Option(["-cd", "--config-dir"], metavar="FOLDER", help="A folder beside conf."),
    click.Option(["--experimental-rerun"], metavar="FILE", help="Rerun a pickled configuration."),
    click.Option(
        ["-sc", "--shell-completion"], is_flag=True, help="Complete overrides in a shell."
    ),
    click.Option(["--version"], is_flag=True, help="Print the version of Hydra."),
    click.Option(["--hydra-help"], is_flag=True, help="Print the help of Hydra."),
)
PLANNED = re.compile(r"(?i)runtime\.plan=(true|yes|on|1)")


@click.command(params=[*FLAGS], epilog="conf/README.md lists every option.")
@verbs.overrides
@click.pass_context
def run(ctx: click.Context, overrides: tuple[str, ...], **flags: Any) -> int:
    """Run an experiment, a conversion or a sweep; print its table.

    Without KEY=VALUE it is the experiment of conf/config.yaml. An override of the coding asks for one
    conversion, or for a sweep over the values that it lists. The word `run` may be left out.

    \b
    python -m pipeline experiment=frontier
    python -m pipeline coding=gated timesteps=6 coding.grains=2
    python -m pipeline coding=gated timesteps=4,5,6 hydra/launcher=joblib
    python -m pipeline --cfg job coding=gated
    """
    known = ctx.parent.command.commands if ctx.parent else {}  # type: ignore[attr-defined]
    if late := [word for word in overrides if word in known]:
        ctx.fail(f"{late[0]} is a verb: it comes first, python -m pipeline {late[0]} ...")
    typed = [word for flag in FLAGS for word in _typed(flag, flags[str(flag.name)])]
    planned = [override for override in overrides if PLANNED.fullmatch(override)]
    if planned and typed in ([], [SWEPT.opts[-1]]):
        return _show_plan([override for override in overrides if override not in planned])
    from pipeline.commands import launch

    return launch.main([*typed, *overrides])


@click.command(params=[SWEPT])
@verbs.overrides
def plan(overrides: tuple[str, ...], multirun: bool) -> int:
    """List the jobs of a run, what each would build and how long.

    Takes the overrides of `run`, runs nothing and loads no model. A sweep is listed whole, with -m or
    without. `run` with runtime.plan=true is the same.

    Of one job, a table of its stages follows: seconds, memory, bytes and what bounds them, from the
    dimensions of the model and the rates of a machine, which plan.measure=true measures here and
    plan.flops=, plan.memory=, plan.disk= and plan.network= give. Where a model is on the hub, which need
    not answer, its file in conf/model has the dimensions.

    \b
    python -m pipeline plan experiment=codings
    python -m pipeline plan model=llama2-70b runtime.workers=8 runtime.engine=slurm
    """
    return _show_plan(overrides)


def _show_plan(overrides: Sequence[str]) -> int:
    gc.disable()  # all that is imported and composed stays, and looking for garbage takes a tenth
    try:
        from pipeline.commands.plan import show
        from pipeline.run.errors import exit_status

        logging.basicConfig(
            level=logging.INFO, format="%(message)s"
        )  # which jobs an option reaches
        return exit_status(lambda: show(overrides))
    finally:
        gc.enable()


def _typed(flag: click.Option, value: Any) -> Iterator[str]:
    """A flag as it stands on a command line; nothing where it is not given."""
    if value:
        yield flag.opts[-1]
        yield from () if value is True else (value,)
