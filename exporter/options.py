"""The options of the commands, made from the flags' definitions, and the help that shows them in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import click

from compressors.model.errors import InputError
from exporter.planning.flags import Flags

__all__ = [
    "EXPORT_FLAGS",
    "EXPORT_GROUPS",
    "FOLDER",
    "USUAL",
    "GroupedHelp",
    "flags",
    "help_all",
    "progress_flags",
    "progress_view",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)
"""The type of an option whose value is a path."""

_DEFINITIONS = {definition.name: definition for definition in fields(Flags)}
_TYPES = get_type_hints(Flags)

EXPORT_GROUPS: Mapping[str, Sequence[str]] = {
    "Model and budget": ("budget", "budget_kind", "context", "kv_type", "revision", "offline"),
    "Text": ("calibration", "text"),
    "Smaller": ("method", "remove", "materialize", "experts", "student", "keep_mtp"),
    "Quantized": ("quant", "quantizer", "imatrix", "prefer", "plan_time"),
    "Recovered": ("recover", "recover_time", "seed"),
    "Files": ("formats", "out", "save_student", "shard_size", "push", "recipe"),
    "Checks": ("require", "floors"),
    "This run": (
        *("dry_run", "memory", "threads", "device", "work_dir", "force", "json", "verbose", "quiet", "progress"),
        *("help", "help_all"),
    ),
}
"""The options of an export by heading, in the order of the help; what is in none stands at the end of the last."""

USUAL: Mapping[str, Sequence[str]] = {
    "Result": ("budget", "context", "method", "quant", "formats", "out"),
    "Text and time": ("calibration", "text", "recover_time"),
    "This run": ("dry_run", "recipe", "memory", "json", "verbose", "quiet", "progress", "help", "help_all"),
}
"""The options of an export that ``--help`` shows; ``--help-all`` shows the others too."""

_GROUPED = [name for names in EXPORT_GROUPS.values() for name in names if name in _DEFINITIONS]
EXPORT_FLAGS = (*_GROUPED, *(name for name in _DEFINITIONS if name != "model" and name not in _GROUPED))
"""The flags of an export."""

_ALL = "exporter.help_all"  # in click's meta: the help shows every option


class GroupedHelp(click.Command):
    """A command whose help shows its options under headings.

    Args:
        groups: the names of options by heading, in their order.
        usual: those that are shown unless all are asked for, in the same way.
    """

    def __init__(
        self,
        *arguments: Any,
        groups: Mapping[str, Sequence[str]],
        usual: Mapping[str, Sequence[str]],
        **others: Any,
    ) -> None:
        super().__init__(*arguments, **others)
        self._groups = groups
        self._usual = usual

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options that were asked for, each group under its heading."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        records = {_name(option): record for option in options if (record := option.get_help_record(ctx))}
        groups = self._all_groups(records) if _ALL in ctx.meta else self._usual
        for heading, names in groups.items():
            with formatter.section(heading):
                formatter.write_dl([records[name] for name in names if name in records])

    def _all_groups(self, names: Iterable[str]) -> Mapping[str, Sequence[str]]:
        """The groups, with options that are in none at the end of the last."""
        grouped = {name for group in self._groups.values() for name in group}
        *_, (last, group) = self._groups.items()
        return {**self._groups, last: [*group, *(name for name in names if name not in grouped)]}


def _name(option: click.Option) -> str:
    """The name of an option as it is typed; click calls its own help differently in each version."""
    return option.opts[0].lstrip("-").replace("-", "_")


def help_all(function: _Function) -> _Function:
    """The option that shows every option of a command."""

    def show(ctx: click.Context, _parameter: click.Parameter, is_given: bool) -> None:
        if is_given:
            ctx.meta[_ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    option = click.option(
        "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show every option."
    )
    return option(function)


def flags(*names: str, **helps: str) -> Callable[[_Function], _Function]:
    """The options of a command, as :class:`~exporter.planning.flags.Flags` defines them.

    Args:
        names: the flags that the command takes, in the order of its help.
        helps: by name, the help of a flag that differs in this command.
    """

    def add(function: _Function) -> _Function:
        for name in reversed(names):
            function = _option(name, helps.get(name))(function)
        return function

    return add


def _option(name: str, help: str | None) -> Callable[[_Function], _Function]:
    """A flag as an option, whose kind follows from the type of its values."""
    definition = _DEFINITIONS[name]
    kinds = {kind for kind in get_args(_TYPES[name]) or (_TYPES[name],) if kind is not NoneType}
    is_flag, multiple = kinds == {bool}, definition.default == ()
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        default=definition.default,
        show_default=definition.default is not None and not is_flag and not multiple,
        is_flag=is_flag,
        multiple=multiple,
        type=FOLDER if kinds == {Path} else int if kinds == {int} else None,
        metavar=definition.metadata["metavar"],
        help=help or definition.metadata["help"],
    )


def progress_flags(function: _Function) -> _Function:
    """The options of a long command that say how it shows where it is: they belong to no job."""
    for option in (
        click.option("--quiet", is_flag=True, help="Show no progress, only results and errors."),
        click.option(
            "--progress",
            type=click.Choice(["auto", "json"]),
            default="auto",
            show_default=True,
            help="json: events for programs, on stderr.",
        ),
    ):
        function = option(function)
    return function


def progress_view(quiet: bool, progress: str) -> Any:
    """Shows a run on the standard error as these options ask for; use it in a ``with`` statement.

    Raises:
        InputError: the options contradict each other.
    """
    from exporter.progress.views import view_on_stderr

    if quiet and progress == "json":
        raise InputError("--quiet: --progress json asks for progress; leave one of them out")
    return view_on_stderr(lambda line: click.echo(line, err=True), quiet=quiet, as_json=progress == "json")
