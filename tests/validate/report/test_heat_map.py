"""The load maps: every cell has the level of its load, and the page stays small."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from validate.report.heat_map import HeatMap, load_maps


def _report(before: list[list[float]], after: list[Any], layers: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {
        "source": {"n_experts": len(before[0])},
        "student": {"expert_map": {"teacher_experts": len(before[0]), "layers": layers}},
        "load": {"teacher": {"tokens": before}, name: {"tokens": after}},
    }


def _cells(heat_map: HeatMap) -> list[list[str]]:
    """[layer][expert], read back from the paths."""
    cells = [["" for _ in range(heat_map.n_experts)] for _ in range(heat_map.n_layers)]
    for kind, path in heat_map.paths:
        pieces = re.findall(r"M(\d+) (\d+)\.5h(\d+)", path)
        assert "".join(f"M{x} {y}.5h{n}" for x, y, n in pieces) == path
        for first, layer, length in pieces:
            for expert in range(int(first), int(first) + int(length)):
                assert cells[int(layer)][expert] == "", "no cell is drawn twice"
                cells[int(layer)][expert] = kind
    return cells


def test_cells_have_the_level_of_their_load() -> None:
    before, after = load_maps(
        _report([[0.01, 0.1, 0.3, 1.59]], [[0.5, 0.5]], [{"source": 0, "groups": [[3], [1]]}], "gguf")
    )
    assert _cells(before) == [["dead", "load1", "load2", "load4"]]
    assert _cells(after) == [["dropped", "load3", "dropped", "load3"]]
    assert after.title == "After: the GGUF"


def test_merged_experts_dropped_layers_and_layers_without_experts() -> None:
    layers = [{"source": 0, "groups": [[1, 2], [0]]}, {"source": 2, "groups": []}]
    _, after = load_maps(_report([[0.5, 0.25, 0.25]] * 3, [[0.95, 0.05], None], layers, "onnx"))
    assert _cells(after) == [["load1", "load3", "load3"], ["dropped"] * 3, ["dropped"] * 3]


def test_a_layer_that_never_had_experts_is_empty() -> None:
    layers = [{"source": 0, "groups": []}, {"source": 1, "groups": [[1]]}]
    report = _report([[1.0, 1.0]] * 2, [None, [1.0]], layers, "onnx")
    report["load"]["teacher"]["tokens"][0] = None
    before, after = load_maps(report)
    assert _cells(before) == [["", ""], ["load3", "load3"]]
    assert _cells(after) == [["", ""], ["dropped", "load3"]]


@pytest.mark.parametrize("key", ["load", "expert_map"])
def test_reports_without_loads_have_no_map(key: str) -> None:
    report = _report([[1.0, 1.0]], [[1.0, 1.0]], [{"source": 0, "groups": [[0], [1]]}], "student")
    assert len(load_maps(report)) == 2
    (report if key == "load" else report["student"]).pop(key)
    assert load_maps(report) == []


def test_a_dense_student_has_none() -> None:
    report = _report([[1.0, 1.0]], [], [], "gguf")
    report["load"].pop("gguf")
    assert load_maps(report) == []


def test_a_large_model_s_maps_are_small() -> None:
    """48 layers of 128 experts, neighbours as different as loads can be."""
    generator = np.random.default_rng(0)
    before = generator.lognormal(sigma=1.5, size=(48, 128))
    kept = [sorted(generator.permutation(128)[:96].tolist()) for _ in range(48)]
    layers = [{"source": layer, "groups": [[expert] for expert in experts]} for layer, experts in enumerate(kept)]
    after = generator.lognormal(sigma=1.5, size=(48, 96))
    maps = load_maps(_report(before.tolist(), after.tolist(), layers, "gguf"))
    assert sum(len(path) for heat_map in maps for _, path in heat_map.paths) < 150_000
    cells = _cells(maps[1])
    assert [[e for e, kind in enumerate(row) if kind != "dropped"] for row in cells] == kept
