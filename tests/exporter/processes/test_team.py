"""Two processes that torchrun started, on one machine or on two, give what one gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from compressors.calibration.statistics import LayerStatistics, StoredStatistics

Completed = subprocess.CompletedProcess[str]
Run = Callable[[Sequence[str]], Completed]
Command = Callable[..., Sequence[str]]

_STATISTICS_TOLERANCE = 1e-5


def _by_two(command: Sequence[str]) -> list[str]:
    """The same command line under torchrun, on any free port."""
    python, dash_m, exporter, *arguments = command
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    return [python, dash_m, *launcher, "--rdzv-endpoint", "localhost:0", dash_m, exporter, *arguments]


def _on_two_machines(command: Sequence[str]) -> Completed:
    """Runs the command line of docs/large-models.md on two machines, which here are one, and returns the first's end.

    Each has a torchrun of its own, that knows nothing of the other but the address at which they meet.
    """
    python, dash_m, exporter, *arguments = command
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    whole = [python, dash_m, *launcher, "--rdzv-id", "run", "--rdzv-endpoint", place, dash_m, exporter, *arguments]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    started = [
        subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    ends = [process.communicate() for process in started]
    said = ("".join(part) for part in zip(*ends, strict=True))
    return subprocess.CompletedProcess(whole, max(process.returncode for process in started), *said)


@pytest.fixture(scope="module")
def stopped_before_publishing(
    tmp_path_factory: pytest.TempPathFactory,
    toy_command: Command,
    run_command: Run,
    tiny_recipe: Path,
) -> tuple[Path, Path]:
    """The outputs of one process, and of two on machines that share a folder."""
    works = []
    for name in ("one", "two"):
        out = tmp_path_factory.mktemp(name) / "out"
        recipe = yaml.safe_load(tiny_recipe.read_text())
        recipe["text"] |= {"calibration_blocks": 3, "heldout_chunks_per_file": 3}  # uneven shares
        for rung in recipe["recover"]["rungs"]:
            rung |= {"blocks": 3, "blocks_per_step": 2}  # the last step has one block: nothing for the second
        recipe["onnx"] = None  # one file is enough: the stages after writing are not shared
        path = out.parent / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = toy_command(out, "--recipe", str(path))
        result = _on_two_machines(command) if name == "two" else run_command(command)
        assert result.returncode == 0, result.stdout + result.stderr
        works.append(out)
    return works[0], works[1]


def test_both_choose_the_same_experts_and_write_the_same_recipe(stopped_before_publishing: tuple[Path, Path]) -> None:
    one, two = (json.loads((out / "report.json").read_text()) for out in stopped_before_publishing)
    assert one["student"]["kept"] == two["student"]["kept"]
    first, second = (yaml.safe_load((out / "recipe.yaml").read_text()) for out in stopped_before_publishing)
    assert first == second
    for by_one, by_two in zip(one["recovery"], two["recovery"], strict=True):
        for key in ("selection_kld_before", "selection_kld_after", "selection_perplexity_after"):
            assert by_one[key] == pytest.approx(by_two[key], rel=1e-4)
    for row, other in zip(one["validation"], two["validation"], strict=True):
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=3e-3)  # a sum's last bit turns codes


def test_statistics_and_gradients_are_summed(tmp_path: Path, toy_model: Path) -> None:
    """The two processes' sums, before anything is decided, against one process's."""
    script = Path(__file__).parent / "team_member.py"
    for n_processes in (1, 2):
        launcher = ("torch.distributed.run", "--nproc-per-node", str(n_processes), "--rdzv-backend", "c10d")
        command = [sys.executable, "-m", *launcher, "--rdzv-endpoint", "localhost:0", str(script)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
        folder = tmp_path / str(n_processes)
        result = subprocess.run(
            [*command, str(toy_model), str(folder)], capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, result.stderr
    one, two = (StoredStatistics(tmp_path / name, 2) for name in ("1", "2"))
    for first, second in zip(one, two, strict=True):
        _assert_equal(first, second)
    gradients, shared_gradients = (load_file(tmp_path / name / "gradients.safetensors") for name in ("1", "2"))
    for layer, gradient in gradients.items():
        assert (gradient - shared_gradients[layer]).norm() <= 1e-4 * gradient.norm()


def _assert_equal(first: LayerStatistics, second: LayerStatistics) -> None:
    for name, value in first.tensors.items():
        difference = (value - second.tensors[name]).norm()
        assert difference <= _STATISTICS_TOLERANCE * value.norm(), name


def test_a_failure_of_one_ends_all_with_one_sentence(tmp_path: Path, toy_command: Command, start_command: Run) -> None:
    calibration = tmp_path / "empty.txt"
    calibration.write_text("")
    command = [*toy_command(tmp_path / "out")]
    command[command.index("--calibration") + 1] = str(calibration)
    result = start_command(_by_two(command))
    assert result.returncode != 0
    assert "empty.txt" in result.stderr
    assert not (tmp_path / "out").exists()
