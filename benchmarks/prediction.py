"""``make prediction``: predicted against measured divergence over random recipes. Writes ``prediction.{csv,png}``.

    python -m benchmarks.prediction [--recipes 40] [--threads 1]

A recipe gives every matrix of a model a type of its own, drawn at random around a size that is drawn too. Its
divergence from the original is predicted from sensitivities (one backward pass over 4,096 calibration tokens) and the
error of ggml's kernels on sampled rows; two more recipes, a large and a small one, are measured to calibrate the
prediction. All are measured in torch with the dequantized weights, over 15 chunks of held-out text. So
are llama-quantize's presets and, at the bytes of each, the best choice of types.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.splits import BLOCK_LENGTH, read_splits, tokenize
from compressors.calibration.statistics import Importance, StatisticsCollector, importance
from compressors.calibration.teacher import write_log_probs
from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.divergence import judge
from compressors.sensitivity import DivergenceModel, SecondOrder, TypeTable, allocate, ggml_quantizer
from compressors.sensitivity.gathering import gather_sensitivities
from exporter.hub import bundled_text, resolve_model
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.measured_types import gguf_type_table
from validate.runtimes.backend import scored_positions

_REPOSITORY = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_MODELS = ("fine", "coarse")
_CALIBRATION_BLOCKS, _SENSITIVITY_BLOCKS, _CHUNKS_PER_FILE = 40, 8, 3
_SCORED = scored_positions(BLOCK_LENGTH)
_BITS = (2.3, 6.5)  # per weight, of the recipes
_SPREAD = 1.5  # bits that a tensor's type may have more or less than its recipe
_CALIBRATING = {"calibrating, small": 2.7, "calibrating, large": 6.0}
_PRESETS = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_M", "IQ2_XXS")
_SEED = 17

# Okabe and Ito's colours, which are told apart with any colour vision
_COLOURS = {"fine": "#0072B2", "coarse": "#D55E00"}


@dataclass(frozen=True)
class Measured:
    """One recipe of one model."""

    model: str
    recipe: str
    n_bytes: int  # of the matrices
    bits: float  # per weight of a matrix
    second_order: float  # nats
    routed: float  # the part of it that routers see
    predicted: float  # nats, by the two calibrating recipes
    measured: float  # mean divergence from the original, nats


class _Quantized:
    """Dequantized tensors by type, made when they are first wanted and kept on disk."""

    def __init__(self, student: Student, importance: Importance, folder: Path) -> None:
        self._student = student
        self._importance = importance
        self._folder = folder

    def tensor(self, role: Role, layer: int | None, type_name: str) -> npt.NDArray[np.float32]:
        """[M, O, I] of a tensor, experts first; one matrix if they are none."""
        path = self._folder / f"{role.name}-{layer}-{type_name}.npy"
        if not path.exists():
            np.save(path, self._dequantized(role, layer, GGMLQuantizationType[type_name]))
        values: npt.NDArray[np.float32] = np.load(path, mmap_mode="c")
        return values

    def _dequantized(self, role: Role, layer: int | None, ggml_type: GGMLQuantizationType) -> npt.NDArray[np.float32]:
        student, quantize, weights = self._student, ggml_quantizer(ggml_type), self._importance.get((role, layer))
        if not role.is_expert or layer is None:
            return quantize(student.tensor(role, layer), weights, role.value)[None].numpy()
        return np.stack(
            [
                quantize(student.expert(role, layer, expert), None if weights is None else weights[expert], role.value)
                for expert in range(student.spec.layers[layer].n_experts)
            ]
        )


def _gguf_name(student: Student, role: Role, layer: int | None) -> str:
    return student.spec.written.tensor(role, layer).gguf.name.format(layer=layer)


class _Mixed:
    """A model whose matrices have these types; implements :class:`~compressors.model.sources.weights.Weights`."""

    dtype = torch.float32

    def __init__(self, student: Student, quantized: _Quantized, types: Mapping[str, str]) -> None:
        self._student = student
        self._quantized = quantized
        self._types = types

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        return self.dtype

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        type_name = self._types.get(_gguf_name(self._student, role, layer))
        if type_name is None:
            return self._student.tensor(role, layer).float()
        return torch.from_numpy(self._quantized.tensor(role, layer, type_name)[0])

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        return self.tensor(role, layer)[rows]

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        type_name = self._types[_gguf_name(self._student, role, layer)]
        out.copy_(torch.from_numpy(self._quantized.tensor(role, layer, type_name)[expert]))


class _Bench:
    """One model: its table of types, and how recipes are measured.

    Args:
        model: its name.
        folder: for what is kept meanwhile.
    """

    def __init__(self, model: str, folder: Path) -> None:
        source = open_source(resolve_model(None) if model == "fine" else _REPOSITORY / "tests" / "fixtures" / model)
        self._model = model
        self._folder = folder
        self._student = Student.teacher(source)
        calibration, _, heldout = tokenize(
            read_splits(bundled_text("calibration"), bundled_text("heldout")), source.tokenizer_folder
        )
        self._heldout_BT = heldout.leading(_CHUNKS_PER_FILE).tokens_BT
        weights = self._run_teacher(calibration.spread(_CALIBRATION_BLOCKS).tokens_BT)
        tokens_BT = calibration.spread(_SENSITIVITY_BLOCKS).tokens_BT
        sensitivities = gather_sensitivities(self._student, tokens_BT, folder / "sensitivities", seed=_SEED)
        self.table: TypeTable = gguf_type_table(self._student, sensitivities, weights)
        self._quantized = _Quantized(self._student, weights, folder)
        block_length, block_bytes = BLOCK_SIZES[GGMLQuantizationType.Q8_0]
        self._n_weights = {
            unit.name: unit.option("Q8_0").n_bytes * block_length // block_bytes for unit in self.table.units
        }

    def drawn(self, bits: float, generator: np.random.Generator) -> dict[str, str]:
        """A type for every tensor, at random among those near this size; the nearest if none is near."""
        types = {}
        for unit in self.table.units:
            distance = [abs(8 * option.n_bytes / self._n_weights[unit.name] - bits) for option in unit.options]
            near = [place for place, far in enumerate(distance) if far <= max(_SPREAD, min(distance))]
            types[unit.name] = unit.options[int(generator.choice(near))].choice
        return types

    def measured(self, recipe: str, types: Mapping[str, str], model: DivergenceModel) -> Measured:
        """Runs a recipe over the held-out text; ``model`` predicts what comes of it."""
        weights = _Mixed(self._student, self._quantized, types)
        student = Student(self._student.source, self._student.experts, weights=weights)
        known = LogProbReader(self._folder / "heldout")
        divergence = judge(student, self._heldout_BT, known, _SCORED).divergence
        n_bytes, order = self.table.n_bytes(types), self.table.order(types)
        bits = 8 * n_bytes / sum(self._n_weights.values())
        return Measured(
            self._model, recipe, n_bytes, bits, order.total, order.routed, model.divergence(order), divergence
        )

    def preset(self, name: str) -> dict[str, str]:
        """The types that a preset of llama-quantize gives."""
        units = {unit.name for unit in self.table.units}
        tensors = plan_tensors(self._student.spec, name)
        return {tensor.name: tensor.ggml_type.name for tensor in tensors if tensor.name in units}

    def allocated(self, preset: str, model: DivergenceModel) -> dict[str, str]:
        """The best choice of types in the bytes of a preset."""
        return allocate(self.table, self.table.n_bytes(self.preset(preset)), model).choices

    def _run_teacher(self, calibration_BT: torch.Tensor) -> Importance:
        """Leaves what the original says of the held-out text in the folder."""
        spec = self._student.spec
        teacher, collector = StreamedModel(self._student), StatisticsCollector(spec)
        groups = [TokenGroup(calibration_BT, [collector.observe]), TokenGroup(self._heldout_BT)]
        _, states = teacher.stream(groups)
        n_chunks = len(self._heldout_BT)
        n_scored = n_chunks * (_SCORED.stop - _SCORED.start)
        writer = LogProbWriter(self._folder / "heldout", n_scored, spec.vocab_size)
        write_log_probs(teacher, self._heldout_BT, states, _SCORED, writer, range(n_chunks))
        return importance([collector.take(layer) for layer in range(spec.n_layers)], ExpertMap.identity(spec), spec)


def _measure(model: str, n_recipes: int, folder: Path) -> list[Measured]:
    """Everything of one model: the calibrating recipes first."""
    bench, generator = _Bench(model, folder), np.random.default_rng(_SEED)
    first = [
        bench.measured(recipe, bench.drawn(bits, generator), DivergenceModel()) for recipe, bits in _CALIBRATING.items()
    ]
    orders = [SecondOrder(recipe.second_order, recipe.routed) for recipe in first]
    calibrated = DivergenceModel.fitted([(order, one.measured) for order, one in zip(orders, first, strict=True)])
    print(f"{model}: KL = {calibrated.smooth:.2f} Q + {calibrated.flips:.3f} sqrt(R)", flush=True)
    results = [replace(one, predicted=calibrated.divergence(order)) for order, one in zip(orders, first, strict=True)]
    recipes = {
        f"random {number}": bench.drawn(generator.uniform(*_BITS), generator) for number in range(1, n_recipes + 1)
    }
    for preset in _PRESETS:
        recipes |= {
            f"preset {preset}": bench.preset(preset),
            f"allocated as {preset}": bench.allocated(preset, calibrated),
        }
    for recipe, types in recipes.items():
        results.append(bench.measured(recipe, types, calibrated))
        last = results[-1]
        print(
            f"  {recipe}: {last.bits:.2f} bits, predicted {last.predicted:.5f}, measured {last.measured:.5f}",
            flush=True,
        )
    return results


def spread_of(results: Sequence[Measured], model: str) -> float:
    """The standard deviation of log(measured / predicted) over one model's random recipes."""
    ratios = [
        math.log(result.measured / result.predicted)
        for result in results
        if result.model == model and result.recipe.startswith("random")
    ]
    return float(np.std(ratios))


def write_csv(results: Sequence[Measured], path: Path) -> None:
    """One line for each recipe."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)], lineterminator="\n")
        writer.writeheader()
        for result in results:
            row = asdict(result)
            writer.writerow(
                {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def write_chart(results: Sequence[Measured], path: Path) -> None:
    """Measured against predicted divergence, a panel for each model."""
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    models = list(dict.fromkeys(result.model for result in results))
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.6 * len(models), 4.4), squeeze=False)
    marks = {
        "random": ("o", "random types"),
        "preset": ("s", "llama-quantize's presets"),
        "allocated": ("D", "allocated"),
        "calibrating": ("x", "calibrating"),
    }
    for panel, model in zip(panels[0], models, strict=True):
        for kind, (mark, label) in marks.items():
            shown = [result for result in results if result.model == model and result.recipe.startswith(kind)]
            colour = "black" if kind == "calibrating" else _COLOURS[model]
            fill = colour if kind == "allocated" else "none"
            x, y = ([getattr(result, name) for result in shown] for name in ("predicted", "measured"))
            panel.plot(x, y, mark, color=colour, mfc=fill, ms=5, label=label, linestyle="none")
        ends = [min(result.measured for result in results) / 1.3, max(result.measured for result in results) * 1.3]
        panel.plot(ends, ends, color="#7F7F7F", linewidth=1, zorder=0)
        panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        panel.set_xlabel("predicted divergence, nats", fontsize=9)
        panel.set_ylabel("measured divergence, nats", fontsize=9)
        panel.set_title(f"{model}: standard deviation of the logarithms {spread_of(results, model):.3f}", fontsize=9)
        panel.grid(color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Measures both models and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[Measured] = []
    for model in _MODELS:
        with tempfile.TemporaryDirectory() as folder:
            results += _measure(model, arguments.recipes, Path(folder))
        print(f"{model}: standard deviation of log(measured / predicted): {spread_of(results, model):.3f}", flush=True)
    write_csv(results, arguments.out / "prediction.csv")
    write_chart(results, arguments.out / "prediction.png")


if __name__ == "__main__":
    main()
