"""Every rule and every function of experts, in ONNX Runtime's operators and as nodes, against the numpy definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from compressors.model.description.feed_forward import Routed
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.roles import Role
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from exporter.writing.onnx.blocks.routed import add_routed
from exporter.writing.onnx.builder import GraphBuilder
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.layout import DATA_FILE, TensorLayout, plan_tensors
from exporter.writing.onnx.weights import LayerNodes, WeightNodes
from tests.exporter.writing.onnx.described import attention, described_layer, put_values, whole_numbers, with_layers

Floats = npt.NDArray[np.float32]

_RULES = {
    "softmax, normalised": Routing(),
    "softmax, normalised with a guard": Routing(epsilon=1e-20),
    "softmax, normalised and scaled": Routing(scale=2.5),
    "softmax, not normalised": Routing(normalizes=False),
    "softmax, not normalised but scaled": Routing(normalizes=False, scale=16.0),
    "softmax in groups by their best": Routing(
        normalizes=False, n_groups=4, n_chosen_groups=2, group_score=GroupScore.BEST, scale=16.0
    ),
    "softmax with a bias and a least sum": Routing(has_selection_bias=True, least_sum=0.3),
    "softmax with a bias": Routing(has_selection_bias=True, least_sum=1e-12),
    "sigmoid": Routing(Score.SIGMOID),
    "sigmoid with a bias": Routing(Score.SIGMOID, has_selection_bias=True),
    "sigmoid with a bias and a large epsilon": Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-2),
    "sigmoid, not normalised": Routing(Score.SIGMOID, normalizes=False, scale=1.8),
    "sigmoid in groups": Routing(
        Score.SIGMOID,
        has_selection_bias=True,
        n_groups=4,
        n_chosen_groups=2,
        group_score=GroupScore.BEST_TWO,
        epsilon=1e-20,
        scale=2.5,
    ),
    "sigmoid in groups of one expert": Routing(
        Score.SIGMOID, n_groups=16, n_chosen_groups=7, group_score=GroupScore.BEST_TWO
    ),
    "softmax over the chosen": Routing(Score.LOGITS),
    "softmax over the chosen, scaled": Routing(Score.LOGITS, scale=0.5),
    "softmax over the chosen, with a bias": Routing(Score.LOGITS, has_selection_bias=True),
}


@pytest.fixture(scope="module")
def base(olmoe_folder: Path) -> ModelSpec:
    return Checkpoint(olmoe_folder).spec


def _logits(shape: Sequence[int], generator: np.random.Generator) -> Floats:
    """Peaked as those of trained routers: few experts of a token stand out, by different amounts; none are equal."""
    logits = generator.standard_normal(shape) * generator.uniform(0.3, 3.0, (*shape[:-1], 1))
    logits += 3.0 * (generator.random(shape) < 0.1) - generator.uniform(0, 6, (*shape[:-1], 1))
    return logits.astype(np.float32)


@pytest.mark.parametrize("preset", ["F32", "Q4_0"])
@pytest.mark.parametrize("name", _RULES)
def test_the_operators_weigh_as_the_rule_says(base: ModelSpec, tmp_path: Path, name: str, preset: str) -> None:
    """Expert e adds its weight to entry e of the output, and nothing else."""
    rule, generator = _RULES[name], np.random.default_rng(0)
    for (batch, tokens), n_experts, top_k in (((1, 1), 16, 2), ((2, 7), 16, 4), ((1, 40), 32, 6), ((1, 5), 16, 1)):
        block = Routed(n_experts, top_k, 32, replace(rule, n_groups=min(rule.n_groups, n_experts)))
        spec = with_layers(base, described_layer(attention(), block, 2 * n_experts))
        bias = (generator.standard_normal(n_experts) / 8).astype(np.float32)
        model = _probe(spec, preset, tmp_path, bias)
        logits = _logits((batch, tokens, n_experts), generator)
        (found,) = _run(model, tmp_path, {"x": np.concatenate([logits, np.ones_like(logits)], axis=-1)})
        rows_TE = logits.reshape(-1, n_experts)
        chosen_TK = block.routing.choose(rows_TE, top_k, bias if rule.has_selection_bias else None)
        expected_TE = np.zeros_like(rows_TE)
        np.put_along_axis(expected_TE, chosen_TK, block.routing.weights(rows_TE, chosen_TK), axis=1)
        found_TE = found.reshape(-1, 2 * n_experts)[:, :n_experts] / Glu().apply(*[np.ones(1, np.float32)] * 2)
        np.testing.assert_allclose(found_TE, expected_TE, rtol=2e-5, atol=1e-6 * rule.scale)


def _probe(spec: ModelSpec, preset: str, folder: Path, bias: Floats) -> onnx.ModelProto:
    """The block alone. Its input is the logits, and then ones, the first of which is all that experts read."""
    (layer,) = spec.layers
    n_experts, hidden, width = layer.n_experts, layer.hidden_size, layer.expert_width
    layout = plan_tensors(spec, preset, inputs="float32")
    in_EFD, out_EDF = np.zeros((n_experts, width, hidden)), np.zeros((n_experts, hidden, width))
    in_EFD[:, 0, n_experts], out_EDF[np.arange(n_experts), np.arange(n_experts), 0] = 1, 1
    data = np.zeros(layout.data_bytes, dtype=np.uint8)
    router = layout.weight(Role.ROUTER, 0)
    put_values(data, router.codes, np.eye(n_experts, hidden, dtype=np.float32))
    if layout.has(Role.SELECTION_BIAS, 0):
        put_values(data, layout.weight(Role.SELECTION_BIAS, 0).codes, bias)
    for role, values in ((Role.EXPERT_GATE, in_EFD), (Role.EXPERT_DOWN, out_EDF)):
        weight = layout.weight(role, 0)
        put_values(data, weight.codes, whole_numbers(layout, (role, 0), dict.fromkeys(weight.roles, values)))
        if weight.scales is not None:
            put_values(data, weight.scales, np.ones(weight.scales.shape, np.float16))
    (folder / DATA_FILE).write_bytes(data.tobytes())
    return _block_alone(layout, hidden)


def _block_alone(layout: TensorLayout, hidden: int) -> onnx.ModelProto:
    graph, (layer,) = GraphBuilder(), layout.spec.layers
    x = graph.add_input("x", onnx.TensorProto.FLOAT, ["batch", "sequence", hidden])
    nodes = LayerNodes(graph, WeightNodes(graph, layout), layer, 0, layout.spec.context_length)
    assert layer.routed is not None
    graph.add_output(add_routed(nodes, layer.routed, x, x), onnx.TensorProto.FLOAT, ["batch", "sequence", hidden])
    return graph.model("block")


def _run(model: onnx.ModelProto, folder: Path, inputs: dict[str, Floats]) -> list[Floats]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Floats] = session.run(None, inputs)
    return found


@pytest.mark.parametrize(
    "glu",
    [
        Glu(activation, alpha, limit, offset, is_gated)
        for activation, alpha, limit, offset, is_gated in itertools.product(
            Activation, (1.0, 1.702), (None, 2.0), (0.0, 1.0), (True, False)
        )
        if is_gated or (limit is None and not offset)
    ],
    ids=str,
)
def test_nodes_compute_the_function(tmp_path: Path, glu: Glu) -> None:
    graph, shape = GraphBuilder(), (3, 5, 32)
    names = ["gate", "up"] if glu.is_gated else ["up"]
    inputs = {name: graph.add_input(name, onnx.TensorProto.FLOAT, shape) for name in names}
    graph.add_output(add_glu(graph, glu, inputs.get("gate"), inputs["up"], "f"), onnx.TensorProto.FLOAT, shape)
    generator = np.random.default_rng(0)
    values = {name: 3 * generator.standard_normal(shape).astype(np.float32) for name in names}
    (found,) = _run(graph.model("function"), tmp_path, values)
    np.testing.assert_allclose(found, glu.apply(values.get("gate"), values["up"]), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "glu",
    [
        *(Glu(), Glu(alpha=1.702, limit=2.0, offset=1.0), Glu(limit=1.0), Glu(offset=0.5)),
        *(Glu(Activation.GELU_TANH), Glu(Activation.GELU_TANH, limit=1.0, offset=0.5)),
    ],
    ids=str,
)
def test_the_experts_compute_the_function(base: ModelSpec, tmp_path: Path, glu: Glu) -> None:
    """All tokens go to the only expert; gate, up and down are small whole numbers. The last two need nodes."""
    block = Routed(1, 1, 32, Routing(), glu)
    spec = with_layers(base, described_layer(attention(), block, 64))
    spec = replace(spec, family=replace(spec.family, dense=None))
    layout, generator = plan_tensors(spec, "F32"), np.random.default_rng(0)
    shapes = {Role.EXPERT_GATE: (1, 32, 64), Role.EXPERT_UP: (1, 32, 64), Role.EXPERT_DOWN: (1, 64, 32)}
    matrices = {role: generator.integers(-2, 3, shape) for role, shape in shapes.items()}
    data = np.zeros(layout.data_bytes, dtype=np.uint8)
    for role in (Role.EXPERT_GATE, Role.EXPERT_DOWN):
        put_values(data, layout.weight(role, 0).codes, whole_numbers(layout, (role, 0), matrices))
    (tmp_path / DATA_FILE).write_bytes(data.tobytes())
    x = (generator.standard_normal((1, 9, 64)) / 4).astype(np.float32)
    (found,) = _run(_block_alone(layout, 64), tmp_path, {"x": x})
    gate, up, down = (matrices[role][0].astype(np.float32) for role in shapes)
    np.testing.assert_allclose(found, glu.apply(x @ gate.T, x @ up.T) @ down.T, rtol=1e-4, atol=1e-4)
