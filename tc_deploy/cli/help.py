"""What ``--help`` shows: the options that most runs need, then the others, on one screen.

In: options as click declares them, the rarer ones marked ``advanced``. Out: click's own help in two groups, which says
a range only where it tells something. Never: changes what an option takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tc_deploy.bounds import MAX_SIZE

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
COMMON, ADVANCED = "Options", "Advanced options"


class Option(click.Option):
    """An option that knows its group."""

    def __init__(self, *arguments: Any, advanced: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.advanced = advanced

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """As click's, less a range that is there to refuse nonsense: whatever can be counted, or fp32 holds."""
        extra = super().get_help_extra(ctx)
        largest = getattr(self.type, "max", None)
        if largest is not None and largest >= MAX_SIZE:
            extra.pop("range", None)
        return extra

    def make_metavar(self, ctx: click.Context) -> str:
        """As click's, without the word that the range behind the text says."""
        return super().make_metavar(ctx).replace("INTEGER RANGE", "INTEGER")


def option(*names: str, advanced: bool = False, **settings: Any) -> Callable[[Decorated], Decorated]:
    """``click.option`` with a group."""
    return click.option(*names, cls=Option, advanced=advanced, **settings)


class GroupedCommand(click.Command):
    """A command whose help has its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups; ``--help`` is a common option."""
        for title in (COMMON, ADVANCED):
            rows = [
                record
                for parameter in self.get_params(ctx)
                if isinstance(parameter, click.Option)
                and (title == ADVANCED) == getattr(parameter, "advanced", False)
                and (record := parameter.get_help_record(ctx)) is not None
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
