"""The command line of `python -m pipeline` and of the script `spiking-llm`."""

from __future__ import annotations

import atexit
import gc
import io
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from pipeline.commands import database, import_paper, models, papers, run, stores
from pipeline.commands.verbs import Verbs

FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


@click.group(
    cls=Verbs,
    default="run",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="[VERB] [KEY=VALUE]...",
    epilog="python -m pipeline VERB --help explains a verb.",
)
def cli() -> None:
    """Convert a pretrained language model into a spiking one, and measure what that costs.

    Without a verb it is `run`. Everything else is KEY=VALUE, a choice or a key of conf/: conf/README.md
    lists them, `--cfg job` prints them all.

    \b
    python -m pipeline
    python -m pipeline coding=gated timesteps=6
    """


for verb in (
    run.run,
    run.plan,
    papers.table,
    papers.report,
    stores.store,
    database.sync,
    database.relocate,
    import_paper.import_paper,
    models.generate,
    models.simulate,
    models.energy,
    models.sites,
):
    cli.add_command(verb)


def _end() -> None:
    """Leave the garbage of this process to the system: to look for it in all imports takes half a second.
    What a file that nobody has closed still holds is written."""
    for each in gc.get_objects():
        if type(each) in FILES:
            with suppress(Exception):  # it is closed, or its disk is full
                each.flush()
    gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status, 2 where it cannot be read, which is one line."""
    atexit.register(_end)
    try:
        return cli.main(arguments, standalone_mode=False) or 0
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return 130
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        hint = f" See {ctx.command_path} --help" if ctx else ""
        print(f"error: {' '.join(error.format_message().split())}{hint}", file=sys.stderr)
        return error.exit_code
