"""Verbs that name the nearest to one that is not known, and the arguments that several take."""

from __future__ import annotations

from typing import Any

import click
from click.exceptions import NoSuchCommand

overrides = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")


class Verbs(click.Group):
    """Verbs in their order; `default` is the verb of a command line that begins with none."""

    def __init__(self, *arguments: Any, default: str | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.default, self.no_args_is_help = default, False

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        lines = [(name, verb.get_short_help_str(width)) for name, verb in self.commands.items()]
        with formatter.section("Verbs"):
            formatter.write_dl(lines)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.default and _names_no_verb(args, ctx.help_option_names):
            args = [self.default, *args]
        elif not args:
            ctx.fail(f"Give one of {', '.join(self.commands)}.")
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as error:
            ctx.fail(f"{error.format_message()} Choose among {', '.join(self.commands)}.")


def _names_no_verb(arguments: list[str], help_flags: list[str]) -> bool:
    """Whether a command line is empty, or its first word a flag of Hydra or an override."""
    if not arguments or arguments[0] in help_flags:
        return not arguments
    return "=" in arguments[0] or arguments[0].startswith(("-", "~"))
