"""Every flag is defined once: command line and job follow from its definition."""

from __future__ import annotations

from dataclasses import fields

import click

from exporter.cli import main
from exporter.planning.flags import Flags, PlainFlags
from exporter.planning.job import Job
from exporter.planning.recipe import Recipe

_HOW_IT_IS_SHOWN = {"verbose", "quiet", "progress", "help_all"}  # options of the command line alone


def test_the_command_line_has_every_flag_with_its_default() -> None:
    options = {parameter.name: parameter for parameter in main.commands["export"].params}
    assert set(options) - _HOW_IT_IS_SHOWN == {flag.name for flag in fields(Flags)}
    for flag in fields(Flags):
        option = options[flag.name]
        if isinstance(option, click.Option):  # MODEL is an argument
            assert (option.default, option.help) == (flag.default, flag.metadata["help"]), flag.name


def test_a_flag_of_several_commands_is_the_same_in_all() -> None:
    of_export = {option.name: option for option in main.commands["export"].params}
    for command in ("pareto", "inspect", "validate"):
        for option in main.commands[command].params:
            if option.name in ("memory", "device", "offline", "revision", "threads"):
                other = of_export[option.name]
                assert isinstance(option, click.Option) and isinstance(other, click.Option)
                assert (option.opts, option.help, option.type.name) == (other.opts, other.help, other.type.name)


def test_a_job_repeats_no_flag_that_it_holds_as_it_is_given() -> None:
    assert set(Job.__annotations__) & set(PlainFlags.__annotations__) == set()
    plain = {flag.name for flag in fields(PlainFlags)}
    job, flags = Flags(budget="1GB", device="cpu").job(), Flags(budget="1GB", device="cpu")
    assert {name: getattr(job, name) for name in plain} == {name: getattr(flags, name) for name in plain}


def test_a_flag_that_names_a_part_of_the_recipe_is_a_choice_of_it() -> None:
    in_recipe = {flag.name for flag in fields(Flags) if flag.metadata.get("in_recipe")}
    assert {"budget", "threads", "seed", "save_student", "quant"} <= in_recipe
    named = {flag.name for flag in fields(Flags)} & (set(Recipe.model_fields) - {"text"})
    assert named <= in_recipe
