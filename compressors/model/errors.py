"""Errors that are written for the person at the keyboard.

    MoeExportError          anything this tool says on purpose
    ├── InputError          a file, flag, text or number is wrong                    exit code 2
    ├── UnsupportedError    the model or a choice cannot be represented              exit code 2
    └── BudgetError         no recipe fits the budget                                exit code 3

A message names the file, tensor, flag or number at fault and says what to do. It is one line that can be printed,
whatever the text is that it quotes. Any other exception is a bug of ours and exits with code 1.
"""

from __future__ import annotations

from compressors.model.names import one_line

__all__ = ["BudgetError", "InputError", "MoeExportError", "UnsupportedError"]


class MoeExportError(Exception):
    """Base of every error that this tool raises on purpose; ``exit_code`` is the process's exit code."""

    exit_code = 1


class InputError(MoeExportError):
    """A file, flag, text or number that was given is wrong."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UnsupportedError(InputError):
    """The input is well formed, but this tool or a target format cannot represent it."""


class BudgetError(MoeExportError):
    """No recipe fits the budget."""

    exit_code = 3
