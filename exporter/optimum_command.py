"""``optimum-cli export moe ...``: this tool as a command of optimum.

optimum imports every module of the namespace package ``optimum.commands.register`` when its command line starts; the
wheel installs this one there as ``moe_export.py``. It passes its arguments on unread, so it must stay light to import.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS", "MoeExportCommand"]


class MoeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum ships no types
    """Runs ``moe-export`` with the remaining arguments."""

    COMMAND = CommandInfo(name="moe", help="Compress a Mixture-of-Experts model to a memory budget: GGUF and ONNX.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Takes every argument, ``--help`` included, as it stands."""
        # No argument starts with a null character, so argparse takes none of ours for an option of its own.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Hands over to the command line of moe-export, which ends the process with its own exit code."""
        from exporter.cli import main

        main(self.args.arguments, prog_name="optimum-cli export moe")


REGISTER_COMMANDS = [(MoeExportCommand, ExportCommand)]
