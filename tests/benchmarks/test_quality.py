"""The comparison of all methods: none is missing, shares are counted, and the tables say what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks.quality.measure import Measured
from benchmarks.quality.methods import ARMS, Teacher
from benchmarks.quality.table import beyond_frequency, by_divergence, read, write_csv, write_markdown
from compressors.calibration.statistics import StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.planning.recipe import CompressChoice, ExpertMethod


def test_every_method_that_a_recipe_can_name_is_compared() -> None:
    named = {*get_args(ExpertMethod), *get_args(CompressChoice.model_fields["edit"].annotation)}
    named -= {"none", "svd", "lightmoe"}  # the last one is nothing without training, and has a benchmark of its own
    compared = {name.lower() for name in ARMS}
    assert named | {"activation svd", "slimwidth", "layer drop", "block drop", "reap, sequential"} <= compared
    assert list(ARMS)[:2] == ["teacher", "frequency"]


@pytest.fixture(scope="module")
def teacher(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """The first two layers of the bundled model, and 1,024 tokens."""
    source = open_source(toy_checkpoint(tmp_path_factory.mktemp("quality")))
    tokens_BT = torch.randint(1, 4096, (2, 512), generator=torch.Generator().manual_seed(0))
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(tokens_BT, [collector.observe])])
    return Teacher(source, [collector.take(layer) for layer in range(2)], tokens_BT)


@pytest.mark.parametrize(
    ("method", "removed", "files"),
    [
        ("reap", 0.5, "GGUF, ONNX"),
        ("frequency, global", 0.5, "ONNX"),
        ("reap + SlimWidth", 1 - 24 * 85 / (32 * 128), "GGUF, ONNX, unquantized"),
        ("Layer Drop", 0.5, "ONNX"),
        ("Block Drop", 0.5, "GGUF, ONNX"),
        ("activation SVD", 1 - 42 * (256 + 128) / (256 * 128), "no: written multiplied out"),
    ],
)
def test_what_an_arm_removes(method: str, removed: float, files: str, teacher: Teacher) -> None:
    shrunk = ARMS[method].build(teacher, 0.5)
    assert shrunk.removed == pytest.approx(removed)
    assert shrunk.smaller == files


def test_aliases_share_their_groups_expert_and_keep_their_rows(teacher: Teacher) -> None:
    merged, aliases = (ARMS[name].build(teacher, 0.5).student for name in ("M-SMoE", "M-SMoE, router rows kept"))
    assert aliases.spec == teacher.spec
    for layer in range(2):
        assert torch.equal(aliases.tensor(Role.ROUTER, layer), teacher.source.tensor(Role.ROUTER, layer))
        for index, group in enumerate(merged.experts.layers[layer].groups):
            expected = merged.expert(Role.EXPERT_DOWN, layer, index)
            for member in group:
                assert torch.equal(aliases.expert(Role.EXPERT_DOWN, layer, member), expected)


_CHUNKS = 4


def _result(method: str, divergence: float, share: float = 0.5, model: str = "fine", noise: float = 0.01) -> Measured:
    """Chunks lie ``noise`` above and below their mean in turns."""
    chunks = tuple(divergence + noise * (-1) ** chunk for chunk in range(_CHUNKS))
    return Measured(
        model, method, "prune", share, share, "16 of 32 experts", "GGUF", 50.0, divergence, 1.26, 500_400_000, chunks
    )


_REFUSED = replace(
    _result("MoBE", 0.0), removed=None, perplexity=None, divergence=None, seconds=None, peak_bytes=None,
    setting="refused: too many", smaller_files="", chunk_divergences=(),
)  # fmt: skip
_RESULTS = [
    _result("teacher", 0.0, share=0.0),
    _result("frequency", 0.9),
    _result("frequency", 0.4, share=0.25),
    _REFUSED,
    _result("ean", 1.1),
    _result("reap", 0.7),
    _result("reap", 0.3, share=0.25),
    _result("man", 0.89, noise=-0.02),
]


def test_a_method_is_compared_with_frequency_pruning_chunk_by_chunk() -> None:
    verdicts = {}
    for result in by_divergence(_RESULTS, "fine", 0.5):
        difference = beyond_frequency(_RESULTS, result)
        verdicts[result.method] = difference and difference.verdict
    assert verdicts == {"reap": "better", "man": "level", "frequency": "level", "ean": "worse", "MoBE": None}
    man = beyond_frequency(_RESULTS, _RESULTS[-1])
    assert man is not None
    # differences are -0.04, 0.02, -0.04, 0.02
    assert (man.mean, man.two_errors) == (pytest.approx(-0.01), pytest.approx(2 * 0.03 * (4 / 3) ** 0.5 / 2))


def test_the_csv_file_holds_everything(tmp_path: Path) -> None:
    write_csv(_RESULTS, tmp_path / "quality.csv")
    assert read(tmp_path / "quality.csv") == [
        replace(result, chunk_divergences=pytest.approx(result.chunk_divergences)) for result in _RESULTS
    ]


def test_the_table_is_sorted_and_names_who_does_not_beat_frequency(tmp_path: Path) -> None:
    results = [*_RESULTS, *(replace(result, model="coarse") for result in _RESULTS)]
    write_markdown(results, tmp_path / "quality.md")
    text = (tmp_path / "quality.md").read_text()
    assert "Better by more than two standard errors: reap (0.700)." in text
    assert "Not to be told from it: man (0.890). Worse: ean (1.100)." in text
    fine, coarse = text.split("## fine")[1].split("## coarse")
    for part in (fine, coarse):
        methods = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| ") and "prune" in line]
        assert methods == ["| reap", "| man", "| **frequency**", "| ean", "| MoBE"]
    assert (
        "| reap | prune | 16 of 32 experts | GGUF | 50.0% | 50.00 | 0.7000 | -0.200 ± 0.000 better "
        "| 25.0% | 50.00 | 0.3000 | 1.3 | 500 |"
    ) in fine
    assert "| MoBE | prune | refused: too many | - | - | - | - | - | - | - | - | - | - |" in fine
    assert "| teacher | 16 of 32 experts | GGUF | 50.00 | 0.0000 | 1.3 | 500 |" in fine
