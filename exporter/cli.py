"""The command line. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import gc
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from compressors.model.errors import InputError, MoeExportError
from compressors.model.quiet_libraries import leave_no_cache
from exporter.options import (
    EXPORT_FLAGS,
    EXPORT_GROUPS,
    FOLDER,
    USUAL,
    GroupedHelp,
    flags,
    help_all,
    progress_flags,
    progress_view,
)
from exporter.planning.flags import Flags
from exporter.processes.interruption import exit_code, ignore_further_requests, requests_wait, sigterm_raises

__all__ = ["main"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_WIDTH = 100  # columns of the help on a terminal that has as many
_GOES_ON = "exporter.goes_on"  # in click's meta: an interrupted command keeps its work


class _DefaultCommand(click.Group):
    """A group whose first word may be left out: ``moe-export MODEL`` means ``moe-export export MODEL``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the default command's name in front unless another command is named."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--version")
        return super().parse_args(ctx, args if named else ["export", *args])

    def invoke(self, ctx: click.Context) -> Any:
        """Turns errors made for people, and requests to stop, into one line and their exit code."""
        leave_no_cache()
        try:
            with sigterm_raises(), _storage_errors_for_people(ctx):
                return super().invoke(ctx)
        except MoeExportError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as request:
            ignore_further_requests()
            goes_on = "; the same command goes on where this run was" if ctx.meta.get(_GOES_ON) else ""
            click.echo(f"stopped{goes_on}", err=True)
            ctx.exit(exit_code(request))


@contextmanager
def _storage_errors_for_people(ctx: click.Context) -> Iterator[None]:
    """Turns a full disk, wherever it shows, into a message; click handles a closed standard output (EPIPE)."""
    try:
        os.getcwd()
    except OSError:
        raise InputError("the folder that this command was started in is gone; change to another one") from None
    try:
        yield
    except MoeExportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise
        from exporter.writing.files import storage_error

        said = storage_error(error, Path(tempfile.gettempdir()), goes_on=bool(ctx.meta.get(_GOES_ON)))
        if said is None:
            raise
        raise said from error


@contextmanager
def _garbage_stays() -> Iterator[None]:
    """Looks for no unused cycles of objects: those of a plan are many and stay, and each look goes through them all."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@click.group(cls=_DefaultCommand, context_settings={"max_content_width": _WIDTH})
@click.version_option(package_name="moe-export")
def main() -> None:
    """Compress a Mixture-of-Experts model to a memory budget, write GGUF and ONNX, and prove that they work."""


@main.command(
    cls=GroupedHelp,
    groups=EXPORT_GROUPS,
    usual=USUAL,
    epilog="Other commands: moe-export fits | inspect | pareto MODEL; validate FILE; compare OUT...",
)
@click.argument("model", required=False)
@flags(*EXPORT_FLAGS)
@click.option("--verbose", is_flag=True, help="End with all figures, their intervals and floors.")
@progress_flags
@help_all
def export(verbose: bool, quiet: bool, progress: str, **arguments: Any) -> None:
    """Compress MODEL (a folder, a hub id or a GGUF file; without it a small bundled model) to the memory BUDGET."""
    _refuse_unknown_family(arguments["model"])
    shown = progress_view(quiet, progress)
    _refuse_choices_beside_a_recipe(arguments)
    with requests_wait():
        job = Flags(**arguments).job()  # it imports what it checks with
    command = shlex.join([_program(), *sys.argv[1:]])
    if job.dry_run:
        _dry_run(job, command)
        return
    with requests_wait():
        from exporter.pipeline.running import follow
        from exporter.processes.team import team
        from exporter.run import run_job

    click.get_current_context().meta[_GOES_ON] = True
    with team() as members:
        if members is not None and not members.leads:
            follow(members)
            return
        with shown as view:
            result = run_job(job, command, view, members)
    if job.json:
        click.echo(json.dumps(result.report, indent=1))
    else:
        _print_result(result, verbose=verbose)
    _name_failures(result.failures)
    raise SystemExit(result.exit_code)


@main.command()
@click.argument("model", required=False)
@click.option("--out", type=FOLDER, required=True, help="Output folder: a table and a plot.")
@click.option("--sizes", help="Mixes, sizes or shares of 16 bits, such as Q4_K_M,7GB,12%.  [default: eleven]")
@flags(
    *("calibration", "text", "recover_time", "memory", "device", "offline", "revision", "threads"),
    text="Held-out text to measure on.",
    recover_time="Most time for recovery, for each size.",
)
@progress_flags
def pareto(model: str | None, out: Path, sizes: str | None, quiet: bool, progress: str, **flags: Any) -> None:
    """Measure how MODEL's divergence grows as its GGUF file gets smaller, beside llama.cpp's presets."""
    _refuse_unknown_family(model)
    shown = progress_view(quiet, progress)
    with requests_wait():
        from exporter.curve.command import DEFAULT_SIZES, run_pareto
        from exporter.curve.table import pareto_table

    click.get_current_context().meta[_GOES_ON] = True
    command = shlex.join([_program(), *sys.argv[1:]])
    with shown as view:
        rows = run_pareto(model, sizes or DEFAULT_SIZES, out, flags, command, view)
    _console().print(pareto_table(rows))
    click.echo(f"table and plot: {out}")


@main.command()
@click.argument("model")
@flags("offline", "revision")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, offline: bool, revision: str | None, as_json: bool) -> None:
    """Show layout, routing rule and sizes of MODEL; reads headers only."""
    _refuse_unknown_family(model)
    with requests_wait():
        from exporter import inspect as described
        from exporter.inspection import description_table

    with _garbage_stays():
        description = described(model, revision=revision, offline=offline)
    if as_json:
        click.echo(json.dumps(description, indent=1))
    else:
        _console().print(description_table(description))


@main.command()
@click.argument("model")
@click.option("--for", "names", metavar="NAME[,...]", help="Machines, such as 16gb-mac.  [default: all that are known]")
@click.option("--budget", "budgets", metavar="SIZE[,...]", help="Other sizes of memory, such as 20GB.")
@click.option("--vram", metavar="SIZE", help="Your graphics card's memory; with --ram, the file is shared by both.")
@click.option("--ram", metavar="SIZE", help="Your computer's memory that a model may take.")
@flags("context", "kv_type", "offline", "revision")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fits(model: str, offline: bool, revision: str | None, as_json: bool, **flags: Any) -> None:
    """Show what MODEL would give on each machine: its size, what is kept, how good, how fast; reads headers only."""
    _refuse_unknown_family(model)
    with requests_wait():
        from exporter.machines.command import machines_of, run_fits
        from exporter.machines.table import fits_data, fits_table

    machines = machines_of(*(flags.pop(name) for name in ("names", "budgets", "vram", "ram")))
    rows = run_fits(model, revision, offline=offline, machines=machines, **flags)
    if as_json:
        click.echo(json.dumps(fits_data(rows), indent=1))
    else:
        _console().print(fits_table(rows))


@main.command()
@click.argument("file_or_folder", type=FOLDER)
@click.option(
    "--against",
    metavar="MODEL",
    help="The original: a checkpoint's folder, a hub id, or another file.  [default: the one the report names]",
)
@flags("text", text="Held-out text.  [default: the bundled one]")
@click.option(
    "--reference-logits",
    type=FOLDER,
    help="In place of the original: the file of llama-perplexity --kl-divergence-base, with its text.",
)
@click.option("--save-reference-logits", type=FOLDER, help="Write such a file of the original.")
@flags("threads")
@click.option(
    "--gpu-layers",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Layers that llama.cpp puts on a GPU.",
)
@click.option("--providers", default="cpu", show_default=True, help="Where ONNX Runtime computes: cpu or cuda.")
@flags("require")
@click.option(
    "--tasks", type=FOLDER, help="Tasks of lm-evaluation-harness to run too: a YAML file or a folder (extra: tasks)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(file_or_folder: Path, as_json: bool, tasks: Path | None, **arguments: Any) -> None:
    """Measure files in their runtimes: ours (the folder OUT), or any GGUF or ONNX of the same model.

    Perplexity, divergence from the original, routing and weights are checked, and faults are named.
    """
    with requests_wait():
        from exporter.validation.revalidation import revalidate
        from exporter.validation.revalidation_table import revalidation_table
        from exporter.validation.task_runs import task_failures, task_results, tasks_table

    beside = {name: arguments[name] for name in ("against", "threads", "gpu_layers")}
    # first, so that a wrong task fails at once
    ran = None if tasks is None else task_results(file_or_folder, tasks, **beside)
    result = revalidate(file_or_folder, **arguments)
    if ran is not None:
        deaths = task_failures(ran)
        result |= {"tasks": ran, "failures": result["failures"] + deaths, "passed": result["passed"] and not deaths}
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _console().print(revalidation_table(result))
        if ran is not None:
            _console().print(tasks_table(ran))
    _name_failures(result["failures"])
    raise SystemExit(0 if result["passed"] else 4)


@main.command()
@click.argument("outputs", nargs=-1, required=True, type=FOLDER, metavar="OUT...")
@click.option(
    "--out", type=FOLDER, default="comparison.html", show_default=True, help="The page: a table and a Pareto plot."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(outputs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare the files of finished runs of one model: size, divergence, speed; writes a page with a Pareto plot."""
    with requests_wait():
        from dataclasses import asdict

        from exporter.publishing.compared import compare_runs
        from validate.report.comparison import comparison_table

    files = compare_runs(outputs, out)
    if as_json:
        click.echo(json.dumps([asdict(file) for file in files], indent=1))
    else:
        _console().print(comparison_table(files))
        click.echo(f"page: {out}")


def _name_failures(failures: Iterable[str]) -> None:
    """Prints the failures to stderr, which explains the exit code to whoever runs a script."""
    for failure in failures:
        click.echo(f"failed: {failure}", err=True)


def _refuse_unknown_family(model: str | None) -> None:
    """Refuses a local model of an unknown family at once, before the imports that take seconds."""
    with requests_wait():
        from compressors.model.sources.hugging_face.unknown_family import refuse_unknown_family

    if model is not None:
        refuse_unknown_family(Path(model).expanduser())


def _refuse_choices_beside_a_recipe(arguments: Mapping[str, Any]) -> None:
    context = click.get_current_context()
    in_recipe = (definition.name for definition in fields(Flags) if definition.metadata.get("in_recipe"))
    for name in in_recipe if arguments["recipe"] else ():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: the recipe holds this choice; change it there, or leave {flag} out")


def _program() -> str:
    """The program's name as it was typed."""
    name = Path(sys.argv[0]).name
    return "moe-export" if name == "__main__.py" else name


def _console() -> Any:
    """A console that shows brackets as they are: texts of models and files are not markup."""
    from rich.console import Console

    return Console(markup=False)


def _dry_run(job: Any, command: str) -> None:
    """Prints the plan of each budget, and writes its recipe beside the future output."""
    from exporter.hub_headers import headers_of_hub_model
    from exporter.planning.plan_making import make_plan

    with headers_of_hub_model(job.model, job.revision, offline=job.offline) as folder, _garbage_stays():
        parts = [job.for_budget(budget) for budget in job.budgets or (None,)]
        _print_plans(job, {_recipe_file(job, part): make_plan(part, command, folder) for part in parts})


def _print_plans(job: Any, plans: Mapping[Path, Any]) -> None:
    from exporter.planning.recipe import recipe_yaml
    from exporter.work.directory import make_folder
    from exporter.writing.files import write_atomically

    for path, plan in plans.items():
        make_folder(path.parent)
        write_atomically(path, recipe_yaml(plan.recipe))
    if job.json:
        first, *others = recipes = [plan.recipe.model_dump(mode="json") for plan in plans.values()]
        click.echo(json.dumps(recipes if others else first, indent=1, ensure_ascii=False))
        return
    for path, plan in plans.items():
        _print_plan(plan, path)


def _print_plan(plan: Any, recipe_file: Path) -> None:
    from exporter.estimating.machine import measure_speeds
    from exporter.planning.plan_table import plan_table
    from exporter.processes.free_memory import free_memory

    _console().print(plan_table(plan, measure_speeds(plan), free_memory()))
    click.echo(f"\nrecipe: {recipe_file} (edit it, then run with --recipe {recipe_file})")


def _recipe_file(job: Any, part: Any) -> Path:
    """``OUT.recipe.yaml``, or ``OUT-8GB.recipe.yaml`` where there are several budgets."""
    from exporter.estimating.sizes import size_label
    from exporter.file_names import RECIPE_SUFFIX

    out: Path = job.out
    name = out.name if len(job.budgets) < 2 else f"{out.name}-{size_label(part.budgets[0])}"
    return out.with_name(f"{name}{RECIPE_SUFFIX}")


def _print_result(result: Any, *, verbose: bool) -> None:
    from validate.report.run import run_instructions, where_the_rest_is
    from validate.report.short import short_summary
    from validate.report.terminal import summary

    parts = result.report.get("parts")
    if verbose and not parts:
        _console().print(summary(result.report))
        click.echo(run_instructions(result.report, result.out))
        return
    reports = parts or {"": result.report}
    _console().print(short_summary(reports))
    for name, report in reports.items() if verbose else ():
        _console().print("", f"{result.out / name}:", summary(report), sep="\n")
    click.echo(f"\n{where_the_rest_is(reports, result.out)}")
