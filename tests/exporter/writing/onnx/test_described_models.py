"""Whole graphs of models that no family reads yet: runtime, reader, checks and sizes agree with the description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from compressors.model.description.feed_forward import Dense, Routed, Shared
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GatedDelta, Latent, Mamba2, Mixer, OutputGate, QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.description.spec import ModelSpec, Place
from compressors.model.errors import UnsupportedError
from compressors.model.files.onnx_names import MODEL_FILE
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.layout import plan_tensors
from exporter.writing.onnx.memory import predict_runtime_bytes
from exporter.writing.onnx.writer import predict_size
from tests.exporter.writing.onnx.described import (
    Reference,
    attention,
    described_layer,
    gated_delta,
    latent_attention,
    random_folder,
    with_layers,
)
from validate.files.graph_settings import graph_setting_symptoms
from validate.routing.router_inputs import RouterInputs
from validate.runtimes.onnx import OnnxRuntimeBackend

Tokens = npt.NDArray[np.int64]

_HIDDEN, _EXPERTS, _WIDTH = 64, 16, 32
_ATTENTION_BIASES = (Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS)
_EXPERT_BIASES = (Role.EXPERT_GATE_UP_BIAS, Role.EXPERT_DOWN_BIAS)
_SIGMOID = Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-20, scale=2.5)
_SWIGLU = Glu()
_CLAMPED = Glu(alpha=1.702, limit=2.0, offset=1.0)


def _routed(routing: Routing, glu: Glu = _SWIGLU, shared: Shared | None = None, top_k: int = 4) -> Routed:
    return Routed(_EXPERTS, top_k, _WIDTH, routing, glu, shared)


def _qwen2_moe(spec: ModelSpec) -> ModelSpec:
    """A shared expert with a gate, biases, unnormalised weights."""
    block = _routed(Routing(normalizes=False), shared=Shared(96, is_gated=True))
    return with_layers(spec, *[described_layer(attention(), block, _HIDDEN, _ATTENTION_BIASES)] * 2)


def _deepseek(spec: ModelSpec) -> ModelSpec:
    """Sigmoid scores with a bias and groups, a plain shared expert, and a dense layer before them."""
    block = _routed(
        replace(_SIGMOID, n_groups=4, n_chosen_groups=2, group_score=GroupScore.BEST_TWO), shared=Shared(_WIDTH)
    )
    norms = attention(qk_norm=QkNorm.PER_HEAD)
    return with_layers(spec, described_layer(norms, Dense(96), _HIDDEN), *[described_layer(norms, block, _HIDDEN)] * 2)


def _gpt_oss(spec: ModelSpec) -> ModelSpec:
    """Sinks, biases everywhere, a clamped function, and windows in every second layer."""
    block = _routed(Routing(Score.LOGITS), _CLAMPED)
    vectors = (*_ATTENTION_BIASES, Role.ATTENTION_OUTPUT_BIAS, Role.SINKS, Role.ROUTER_BIAS, *_EXPERT_BIASES)
    mixers = (attention(window=8), attention())
    return with_layers(spec, *(described_layer(mixer, block, _HIDDEN, vectors) for mixer in mixers))


def _interleaved(spec: ModelSpec) -> ModelSpec:
    """Neighbouring values are turned together, of a half of each head."""
    rope = replace(attention().rope, width=16, interleaved=True)
    block = _routed(Routing())
    return with_layers(spec, *[described_layer(attention(rope=rope), block, _HIDDEN)] * 2)


def _biased_experts(spec: ModelSpec) -> ModelSpec:
    """Weights that are not normalised, and biases of the experts."""
    block = _routed(Routing(normalizes=False))
    return with_layers(spec, *[described_layer(attention(), block, _HIDDEN, _EXPERT_BIASES)] * 2)


def _latent(spec: ModelSpec) -> ModelSpec:
    """Latent attention: queries made from a small vector, or from the hidden state; one layer has no experts."""
    block = _routed(
        replace(_SIGMOID, n_groups=4, n_chosen_groups=2, group_score=GroupScore.BEST_TWO), shared=Shared(_WIDTH)
    )
    of_state = latent_attention(query_rank=None, scale=0.2)
    return with_layers(
        spec,
        described_layer(latent_attention(), Dense(96), _HIDDEN),
        described_layer(of_state, block, _HIDDEN),
        described_layer(latent_attention(), block, _HIDDEN),
    )


def _recurrent(spec: ModelSpec) -> ModelSpec:
    """Gated delta rules of two spellings and several sizes, gated attention, norms of 1 + w."""
    rope = replace(attention().rope, width=16)
    gated = attention(rope=rope, qk_norm=QkNorm.PER_HEAD, output_gate=OutputGate.QUERY)
    block = _routed(Routing(), shared=Shared(32, is_gated=True))
    return with_layers(
        spec,
        described_layer(gated, block, _HIDDEN),
        described_layer(gated_delta(), block, _HIDDEN),
        described_layer(gated_delta(), None, _HIDDEN, is_grouped=True),
        described_layer(gated_delta(n_key_heads=3, n_value_heads=3, value_dim=16, kernel=2), block, _HIDDEN),
    )


def _mamba(spec: ModelSpec) -> ModelSpec:
    """Mamba-2 whose heads are one group, two, or a group each; attention that turns nothing."""
    block = _routed(Routing(), shared=Shared(32))
    mixers = (
        attention(rope=None),
        Mamba2(n_heads=4, n_groups=2, head_dim=16, key_dim=32, kernel=4),
        Mamba2(n_heads=6, n_groups=1, head_dim=16, key_dim=16, kernel=3),
        Mamba2(n_heads=2, n_groups=2, head_dim=32, key_dim=16, kernel=2),
    )
    return with_layers(spec, *(described_layer(mixer, block, _HIDDEN) for mixer in mixers))


def _mixed(spec: ModelSpec) -> ModelSpec:
    """Heads, rotary width, rules and functions that differ from layer to layer; one layer has no feed-forward."""
    rope = replace(attention().rope, width=16)
    wide = attention(rope=rope, n_kv_heads=4, qk_norm=QkNorm.WHOLE, scale=0.3)
    blocks = (
        _routed(Routing(Score.SIGMOID, normalizes=False, scale=0.5), top_k=3),
        Dense(48, replace(_CLAMPED, activation=Activation.GELU_TANH)),
        None,
        _routed(Routing(has_selection_bias=True, least_sum=0.5), _CLAMPED, Shared(32)),
        _routed(Routing(normalizes=False, scale=3.0, n_groups=2, group_score=GroupScore.BEST), top_k=2),
    )
    mixers = (wide, attention(rope=rope), wide, attention(rope=rope, qk_norm=QkNorm.PER_HEAD), wide)
    return with_layers(
        spec, *(described_layer(mixer, block, _HIDDEN) for mixer, block in zip(mixers, blocks, strict=True))
    )


def _with_factors(spec: ModelSpec) -> ModelSpec:
    """Factors of embeddings, logits, products of queries and keys, and of what layers add."""
    blocks = (_routed(Routing(Score.LOGITS)), _routed(_SIGMOID), Dense(48), _routed(Routing(), shared=Shared(32)))
    layers = [
        replace(described_layer(attention(scale=0.3), block, _HIDDEN), residual_scale=scale)
        for block, scale in zip(blocks, (0.22, 0.22, 0.5, 0.7), strict=True)
    ]
    return replace(with_layers(spec, *layers), embedding_scale=12.0, logit_divisor=6.0)


_MODELS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "like qwen2_moe": _qwen2_moe,
    "like deepseek_v3": _deepseek,
    "like gpt_oss": _gpt_oss,
    "interleaved": _interleaved,
    "biased experts": _biased_experts,
    "latent attention": _latent,
    "recurrent": _recurrent,
    "Mamba-2": _mamba,
    "mixed layers": _mixed,
    "with factors": _with_factors,
}


@pytest.fixture(scope="module")
def base(olmoe_folder: Path) -> ModelSpec:
    return Checkpoint(olmoe_folder).spec


@pytest.fixture(scope="module", params=sorted(_MODELS))
def spec(request: pytest.FixtureRequest, base: ModelSpec) -> ModelSpec:
    """Some model."""
    return _MODELS[request.param](base)


@pytest.fixture(scope="module", params=["F32", "4-bit experts"])
def folder(request: pytest.FixtureRequest, spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its graph with random weights."""
    return random_folder(spec, tmp_path_factory.mktemp("onnx"), "F32", _encodings(spec, request.param))


def _encodings(spec: ModelSpec, kind: str) -> dict[str, str]:
    """The matrices' products stay exact at 4 bits."""
    units = [unit.name for unit in onnx_units(spec) if unit.layer is not None and "4@16" in unit.encodings]
    return dict.fromkeys(units, "4@16") if kind != "F32" else {}


def _weights(spec: ModelSpec, folder: Path) -> dict[Place, npt.NDArray[np.float32]]:
    """All tensors as the file's reader gives them."""
    weights, found = OnnxWeights(folder, spec), {}
    for tensor, layer in spec.written.places:
        if not tensor.is_per_expert:
            found[tensor.role, layer] = weights.tensor(tensor.role, layer).numpy()
            continue
        assert layer is not None
        out = torch.empty(spec.layers[layer].n_experts, *spec.dimensions(tensor.role, layer))
        for expert, rows in enumerate(out):
            weights.read_expert(tensor.role, layer, expert, rows)
        found[tensor.role, layer] = out.numpy()
    return found


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return np.random.default_rng(1).integers(0, 96, 48)


def test_the_runtime_computes_what_is_described(spec: ModelSpec, folder: Path, tokens: Tokens) -> None:
    """Logits, experts, and weights as they are applied."""
    expected_TV, expected = Reference(spec, _weights(spec, folder)).logits(tokens)
    (output,) = OnnxRuntimeBackend(folder, threads=1).run(tokens[None])
    np.testing.assert_allclose(output.logits_SV, expected_TV[24:47], atol=2e-4 * np.abs(expected_TV).max())
    routing = output.routing
    assert routing is not None and routing.margins_LT is not None
    for index, layer in enumerate(spec.layers):
        if layer.routed is None:
            assert (routing.experts_LTK[index] == -1).all() and np.isinf(routing.margins_LT[index]).all()
            continue
        chosen_TK, weights_TK = expected[index]
        found_TK = routing.experts_LTK[index, :, : layer.top_k]
        np.testing.assert_array_equal(np.sort(found_TK), np.sort(chosen_TK))
        of_expert = np.zeros((len(tokens), _EXPERTS), np.float32)
        np.put_along_axis(of_expert, chosen_TK, weights_TK, axis=1)
        found_weights = routing.weights_LTK[index, :, : layer.top_k]
        np.testing.assert_allclose(found_weights, np.take_along_axis(of_expert, found_TK, axis=1), rtol=2e-3)
        assert (np.diff(found_weights) <= 0).all()


def test_steps_through_the_cache_go_on_where_the_prompt_ended(spec: ModelSpec, folder: Path, tokens: Tokens) -> None:
    """Past the window too, where there is one."""
    reference = Reference(spec, _weights(spec, folder))
    seen: list[npt.NDArray[np.float32]] = []
    forced = iter(tokens[40:46].tolist())

    def choose(logits_V: npt.NDArray[np.float32]) -> int:
        seen.append(logits_V.copy())
        return next(forced)

    OnnxRuntimeBackend(folder, threads=1).generate(tokens[:40].tolist(), 6, choose)
    expected_TV, _ = reference.logits(tokens[:45])
    np.testing.assert_allclose(np.stack(seen), expected_TV[39:45], atol=2e-4 * np.abs(expected_TV).max())


class _Given(RouterInputs):
    """The same states for every layer."""

    def __init__(self, states_TD: npt.NDArray[np.float32]) -> None:
        self._states_TD = states_TD

    def states(self, layer: int, first: int, last: int) -> npt.NDArray[np.float32]:
        return self._states_TD[first:last]


def test_routers_can_be_run_alone(spec: ModelSpec, folder: Path) -> None:
    weights = _weights(spec, folder)
    states_TD = np.random.default_rng(2).standard_normal((20, _HIDDEN)).astype(np.float32)
    backend = OnnxRuntimeBackend(folder, threads=1)
    routing = backend.route(np.zeros((1, 20), np.int64), _Given(states_TD))
    for index, layer in enumerate(spec.layers):
        if layer.routed is not None:
            chosen_TK, weights_TK = Reference(spec, weights).route(layer.routed, states_TD, index)
            np.testing.assert_array_equal(np.sort(routing.experts_LTK[index, :, : layer.top_k]), np.sort(chosen_TK))
            np.testing.assert_allclose(routing.weights_LTK[index].sum(1), weights_TK.sum(1), rtol=1e-4)


def test_nothing_is_wrong_with_the_graph(spec: ModelSpec, folder: Path) -> None:
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    assert graph_setting_symptoms(folder / MODEL_FILE, spec) == []


def test_every_changed_number_is_noticed(spec: ModelSpec, folder: Path, tmp_path: Path) -> None:
    """Whole numbers and floats in attributes of attention, experts and routing, and the constants of both."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    n_changed = 0
    for values in _changeable(model):
        right, values[0] = values[0], values[0] + 3
        (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
        (tmp_path / "model.onnx.data").unlink(missing_ok=True)
        (tmp_path / "model.onnx.data").symlink_to(folder / "model.onnx.data")
        assert graph_setting_symptoms(tmp_path / MODEL_FILE, spec) != [], values
        values[0] = right
        n_changed += 1
    assert n_changed > 8


class _Number:
    """A number in a message, as the only item of a list."""

    def __init__(self, message: onnx.AttributeProto, field: str) -> None:
        self._message, self._field = message, field

    def __getitem__(self, _index: int) -> float:
        return float(getattr(self._message, self._field))

    def __setitem__(self, _index: int, value: float) -> None:
        setattr(self._message, self._field, value if self._field == "f" else int(value))


def _changeable(model: onnx.ModelProto) -> list[_Number]:
    operators = ("GroupQueryAttention", "MoE", "QMoE", "TopK", "GatherElements", "ScatterElements", "LogSoftmax")
    operators += ("RMSNormalization", "Split", "Concat", "RotaryEmbedding", "FusedMatMul", "LinearAttention")
    operators += ("CausalConvWithState", "GatedRMSNorm", "GatherND", "ReduceMax")
    fields = {onnx.AttributeProto.INT: "i", onnx.AttributeProto.FLOAT: "f"}
    return [
        _Number(attribute, fields[attribute.type])
        for node in _nodes(model.graph)
        if node.op_type in operators
        for attribute in node.attribute
        if attribute.type in fields and attribute.name != "accuracy_level"  # it changes the precision alone
    ]


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those inside of others too."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for branch in inner for node in _nodes(branch))]


def test_vectors_that_no_node_takes_are_named(base: ModelSpec, tmp_path: Path) -> None:
    spec = _gpt_oss(base)
    random_folder(spec, tmp_path, "F32", _encodings(spec, "4-bit experts"))
    whole = onnx.load(tmp_path / MODEL_FILE, load_external_data=False)
    places = {"GroupQueryAttention": (11,), "QMoE": (4, 7)}
    said = []
    for kind, place in ((kind, place) for kind, places_of_kind in places.items() for place in places_of_kind):
        graph = onnx.ModelProto.FromString(whole.SerializeToString())
        node = next(node for node in graph.graph.node if node.op_type == kind)
        node.input[place] = ""
        (tmp_path / MODEL_FILE).write_bytes(graph.SerializeToString())
        (sentence,) = graph_setting_symptoms(tmp_path / MODEL_FILE, spec)
        said.append(sentence.partition(",")[0])
    assert said == [
        "GroupQueryAttention: the model has attention sinks",
        "QMoE: the model has experts' gate and up biases",
        "QMoE: the model has experts' down biases",
    ]


def test_wrong_constants_are_named(base: ModelSpec, tmp_path: Path) -> None:
    of_heads = ("split.query.heads", "split.attended.heads", "split.key_value_a.parts", "shape.past")
    of_heads += ("split.attended.step.heads.halves", "shape.heads_apart", "axis.2", "axis.0")
    of_routing = (("routing.scale", _deepseek), ("best_2", _deepseek), ("glu.limit", _gpt_oss))
    of_states = ("split.delta.convolved.parts", "split.delta.projected.grouped.parts", "convolution.last_3")
    of_states += ("split.delta.strength_and_decay.grouped.parts", "shape.by_key_head", "shape.side_by_side")
    of_states += ("delta.unit_scales", "delta.key_of_value_head", "shape.gated_heads", "norm.one")
    of_mamba = ("mamba.group_of_head", "mamba.unit_scales", "shape.by_group", "shape.by_head", "axis.last")
    of_mamba += ("split.mamba.projected.parts", "split.mamba.convolved.parts")
    of_mixers = (
        *((name, _mamba) for name in of_mamba),
        *((name, _latent) for name in of_heads),
        *((name, _recurrent) for name in of_states),
    )
    for name, model in (*of_routing, *of_mixers):
        spec = model(base)
        random_folder(spec, tmp_path, "F32")
        graph = onnx.load(tmp_path / MODEL_FILE, load_external_data=False)
        if name == "glu.limit":
            (node, *_) = (node for node in graph.graph.node if node.op_type == "MoE")
            (attribute,) = (attribute for attribute in node.attribute if attribute.name == "swiglu_limit")
            attribute.f, name = 7.0, "swiglu_limit"
        else:
            (tensor,) = (tensor for tensor in graph.graph.initializer if tensor.name == name)
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values + 1, dtype=values.dtype), name))
        (tmp_path / MODEL_FILE).write_bytes(graph.SerializeToString())
        (found,) = graph_setting_symptoms(tmp_path / MODEL_FILE, spec)
        assert name in found


def test_factors_that_are_wrong_or_missing_are_named(base: ModelSpec, tmp_path: Path) -> None:
    spec = _with_factors(base)
    random_folder(spec, tmp_path, "F32")
    (wrong,) = graph_setting_symptoms(tmp_path / MODEL_FILE, replace(spec, embedding_scale=11.0))
    assert wrong == "constant embedding.factor: 12.0 in the graph, the model needs 11.0"
    alike = tuple(replace(layer, residual_scale=1.0) for layer in spec.layers)
    random_folder(replace(spec, layers=alike, logit_divisor=1.0), tmp_path, "F32")
    said = [f"constant {name}: absent in the graph" for name in ("head.factor", "residual.factor")]
    found = graph_setting_symptoms(tmp_path / MODEL_FILE, spec)
    assert [sentence.partition(",")[0] for sentence in found] == said


def _cached_values(mixer: Mixer, n_tokens: int) -> int:
    if isinstance(mixer, Latent):
        return n_tokens * (mixer.rank + mixer.rotary_dim)
    if isinstance(mixer, GatedDelta):
        channels = 2 * mixer.n_key_heads * mixer.key_dim + mixer.n_value_heads * mixer.value_dim
        return mixer.n_value_heads * mixer.key_dim * mixer.value_dim + (mixer.kernel - 1) * channels
    if isinstance(mixer, Mamba2):
        width, of_keys = mixer.n_heads * mixer.head_dim, mixer.n_groups * mixer.key_dim
        return width * mixer.key_dim + (mixer.kernel - 1) * (width + 2 * of_keys)
    return n_tokens * 2 * mixer.n_kv_heads * mixer.head_dim


def test_size_and_memory_are_predicted(spec: ModelSpec, folder: Path) -> None:
    is_float = OnnxWeights(folder, spec).block_length(Role.ATTENTION_OUTPUT, 0) is None
    encodings = _encodings(spec, "F32" if is_float else "4-bit experts")
    assert predict_size(spec, "F32", encodings) == sum(file.stat().st_size for file in folder.iterdir())
    lines = predict_runtime_bytes(spec, "F32", 128, threads=1, encodings=encodings)
    assert lines["kv_cache"] == 4 * sum(_cached_values(layer.mixer, 128) for layer in spec.layers)


def test_units_hold_every_matrix_under_a_name_of_its_own(base: ModelSpec) -> None:
    spec = _deepseek(base)
    names = [unit.name for unit in onnx_units(spec)]
    assert len(set(names)) == len(names)
    of_dense = {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"}
    of_routed = {"layers.2.experts", "layers.2.shared_expert.down_proj", "layers.2.q_proj"}
    assert of_dense | of_routed <= set(names) and "layers.0.experts" not in names
    layout = plan_tensors(spec, "F32", dict.fromkeys(names, "Q8_0"))
    floats = {role for weight in layout.weights if weight.scales is None for role in weight.roles}
    assert floats == {
        *(Role.ATTENTION_NORM, Role.QUERY_NORM, Role.KEY_NORM, Role.MOE_NORM, Role.FINAL_NORM),
        *(Role.ROUTER, Role.SELECTION_BIAS),
    }


_GEGLU = Glu(Activation.GELU_TANH)


@pytest.mark.parametrize(
    ("glu", "routing", "vectors", "named"),
    [
        (Glu(Activation.GELU_TANH, is_gated=False), Routing(), (), "without a gate.*gelu_pytorch_tanh"),
        (_GEGLU, _SIGMOID, (), "one rule for experts that no operator computes; this model's is sigmoid"),
        (_GEGLU, Routing(), _EXPERT_BIASES, "biases of such experts"),
    ],
)
def test_experts_that_neither_operators_nor_nodes_compute_are_refused(
    base: ModelSpec, glu: Glu, routing: Routing, vectors: tuple[Role, ...], named: str
) -> None:
    spec = with_layers(base, described_layer(attention(), _routed(routing, glu), _HIDDEN, vectors))
    with pytest.raises(UnsupportedError, match=rf"{named}.*cannot be written as ONNX"):
        plan_tensors(spec, "F32")
