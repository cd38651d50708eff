"""Texts from files in messages: always one short line."""

from __future__ import annotations

import pytest

from compressors.model.names import shown


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.3.up_proj.weight", "größe", "日本", "a b"])
def test_a_usual_name_stays_as_it_is(name: str) -> None:
    assert shown(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202eevil", r"\u202eevil"),
        ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"),
        ("\0", r"\x00"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(name: str, said: str) -> None:
    assert shown(name) == said


@pytest.mark.parametrize("name", ["a" * 5000, "\n" * 5000, ["x" * 5000], {"x": "y" * 500}])
def test_a_long_value_is_shortened(name: object) -> None:
    assert len(shown(name)) == 80
    assert "..." in shown(name)


def test_both_ends_of_a_long_name_are_kept() -> None:
    assert shown(f"model.{'x' * 5000}.weight").startswith("model.x")
    assert shown(f"model.{'x' * 5000}.weight").endswith("x.weight")


def test_other_values_are_shown_as_python_writes_them() -> None:
    assert (shown(None), shown([1, "a"]), shown(1.5)) == ("None", "[1, 'a']", "1.5")
