"""Commands that a person waits for start at once: they import neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_COMMANDS = """
import sys
from exporter.cli import main

for arguments in (["--help"], ["inspect", sys.argv[1]], [sys.argv[1], "--budget", "1GB", "--dry-run", "--out", "out"]):
    try:
        main(arguments, standalone_mode=False)
    except SystemExit as ended:
        assert not ended.code, ended.code
    slow = [name for name in ("torch", "transformers") if name in sys.modules]
    assert not slow, (arguments, slow)
"""


def test_help_inspection_and_dry_runs_import_no_torch(coarse_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _COMMANDS, str(coarse_folder.resolve())]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out.recipe.yaml").is_file()
