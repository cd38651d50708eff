"""Predicts the memory of a model in ONNX Runtime on the CPU, above the process itself: an upper bound by line.

Session options were tried on a 2 GB model and none helped: without prepacking decoding is 50 times slower, the arena,
``use_device_allocator_for_initializers`` and ``use_external_initializer_file_buffers_directly`` leave the peak where
it is. Large tensors are mapped from the data file in any case, and given back when they have been packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, NoMixer, ShortConvolution
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.sources.onnx_weights import Form, factors_of_layer, joins_bases, written_shape
from exporter.capabilities.onnx import needs_nodes
from exporter.writing.onnx.encodings import Encoding, Unit, adapter_encoding
from exporter.writing.onnx.layout import TensorLayout, WeightPlan, plan_tensors
from validate.runtimes.cost import CHUNK_TOKENS

__all__ = ["predict_runtime_bytes", "unit_runtime_bytes"]

_FLOAT_BYTES = 4
_EXPERT_AXES = 3  # the number of axes of a layer's experts
_SMALLEST_BITS = 2
_SESSION_BYTES = 24 << 20  # graph, thread pool, allocator slack: measured 13 to 20 MB whatever the model
_LIVE_HIDDEN_STATES = 8  # [tokens, D] at a time: residual, normed, branch and their inputs
_LIVE_VECTORS = 4  # of a head in latent attention: its query beside the small vector, turned; its sum, and parts
_LIVE_CACHES = 5  # of latent attention: both halves, joined, those before a prompt, and an operator's keys and values
_LIVE_CHANNELS = 3  # of a recurrent mixer: its convolution's inputs, those beside what was kept, and the outputs
_LIVE_PARTS = 6  # of a short convolution: its gates and values as projected, and by themselves
# With sinks the operator keeps attention's weights of all columns, those outside of a window too; without sinks it goes
# over the cache in blocks (measured: 278 MB against 14 MB for 32 heads, 512 tokens and 4096 columns). The allocator
# often takes their room twice, because it has put something else into the first one in between.
_KEPT_WEIGHTS = 2
_LIVE_PROJECTIONS = 3  # query, key and value as projected, normed per head, rotated


def predict_runtime_bytes(
    spec: ModelSpec,
    preset: str,
    context: int,
    *,
    threads: int,
    encodings: Mapping[str, str] | None = None,
    inputs: ProductInputs = "int8",
) -> dict[str, int]:
    """Predicts bytes of ``weights``, ``kv_cache`` and ``compute`` with a full cache of ``context`` tokens.

    The cache, to which the states of recurrent layers belong, is float32, allocated once and written in place, as
    validation and onnxruntime-genai do it; a client that takes the present cache as a new tensor at every step
    (optimum) holds it twice.

    Args:
        spec: the model as it is written; its rotary caches cover ``spec.context_length`` tokens.
        preset: a name from :data:`exporter.writing.onnx.encodings.PRESETS`.
        context: tokens in the cache, at most ``spec.context_length``.
        threads: threads inside an operator; each holds one widened expert.
        encodings: encodings of units that differ from the preset, as in
            :func:`~exporter.writing.onnx.layout.plan_tensors`.
        inputs: those of the products of 4 bits.

    Raises:
        InputError: there is no such preset, unit or encoding, or the model's context is shorter.
        UnsupportedError: the operators cannot represent the model.
    """
    if not 0 < context <= spec.context_length:
        raise InputError(f"a context of {context} tokens is asked for; the model has 1 to {spec.context_length}")
    layout = plan_tensors(spec, preset, encodings, inputs)
    mixers = [layer.mixer for layer in spec.layers]
    cache = sum(mixer.cached_values * context + mixer.state_values for mixer in mixers) * _FLOAT_BYTES
    return {"weights": _weight_bytes(layout), "kv_cache": cache, "compute": _compute_bytes(layout, context, threads)}


def _weight_bytes(layout: TensorLayout) -> int:
    """Bytes of the data file, of the runtime's further arrays for each weight, and of a tied head's packed copy."""
    beside = sum(_bytes_beside(weight) for weight in layout.weights)
    return layout.data_bytes + beside + (_packed_head_bytes(layout) if layout.spec.tied_embeddings else 0)


def unit_runtime_bytes(spec: ModelSpec, unit: Unit, encoding: Encoding) -> int:
    """Bytes of a unit's weights at run time: what its encoding adds to ``weights``, but for alignment in the file.

    Args:
        spec: the model.
        unit: a unit of its file.
        encoding: the encoding that the unit would have, with the inputs of its products.
    """
    n_bytes = 0
    for role, shape in unit.weights.items():
        is_gathered, is_of_operator = role is Role.TOKEN_EMBEDDING, len(shape) == _EXPERT_AXES
        scale_bytes = encoding.scale_bytes(shape)
        n_bytes += encoding.n_bytes(shape)
        n_bytes += _copies_of_scales(encoding, is_gathered=is_gathered, is_of_operator=is_of_operator) * scale_bytes
        if is_gathered and spec.tied_embeddings:
            n_bytes += _packed_bytes(encoding.n_bytes(shape) - scale_bytes, scale_bytes)
    for factor in unit.factors:
        is_adapter = factor.form.is_adapter
        stored = adapter_encoding(encoding) if is_adapter else encoding
        n_copies = _copies_of_scales(stored, is_gathered=is_adapter, is_of_operator=False)
        n_bytes += stored.n_bytes(factor.shape) + n_copies * stored.scale_bytes(factor.shape)
    return n_bytes


def _bytes_beside(weight: WeightPlan) -> int:
    if weight.scales is None:
        return 0
    is_gathered = Role.TOKEN_EMBEDDING in weight.roles or weight.form.is_adapter
    is_of_operator = len(weight.shape) == _EXPERT_AXES and weight.form is Form.WHOLE
    n_copies = _copies_of_scales(weight.encoding, is_gathered=is_gathered, is_of_operator=is_of_operator)
    return n_copies * weight.scales.n_bytes


def _copies_of_scales(encoding: Encoding, *, is_gathered: bool, is_of_operator: bool) -> int:
    """The arrays of the scales' size that the runtime keeps beside the file's.

    The scales are widened to float32: their size beside what the file has. Products with int8 inputs keep as much again
    for each block's sum, and also pack the scales, except for experts of 2 bits: measured with weights of up to 600 MB.
    """
    if not encoding.has_int8_inputs or is_gathered:
        return 1
    packs_scales = not is_of_operator or encoding.bits > _SMALLEST_BITS
    return 5 if packs_scales else 3


def _packed_head_bytes(layout: TensorLayout) -> int:
    head = layout.weight(Role.HEAD)
    return _packed_bytes(head.codes.n_bytes, 0 if head.scales is None else head.scales.n_bytes)


def _packed_bytes(code_bytes: int, scale_bytes: int) -> int:
    """Bytes of a tied head packed for its product: with float32 scales and, for int8 inputs, each block's sum."""
    return code_bytes + 2 * 2 * scale_bytes


def _compute_bytes(layout: TensorLayout, context: int, threads: int) -> int:
    """Bytes of the buffers while a chunk runs or, if more, of the largest tensor, which loading holds in two forms."""
    spec = layout.spec
    tokens = min(CHUNK_TOKENS, context)
    values = spec.vocab_size  # logits of the last position
    values += tokens * context  # attention bias
    values += tokens * spec.hidden_size * _LIVE_HIDDEN_STATES
    values += max(_mixer_values(layer, tokens, context) for layer in spec.layers)
    values += tokens * _feed_forward_values(spec)
    values += max(_values_on_bases(layer, index, tokens) for index, layer in enumerate(spec.written.layers))
    expert = max(_widened_values(layer) for layer in spec.written.layers)
    if expert:
        values += threads * (expert + tokens * spec.expert_size)  # widened expert, partial sums
    # The embedding is not packed; where it is the head too, the packed copy counts among the weights.
    largest = max(weight.codes.n_bytes for weight in layout.weights if Role.TOKEN_EMBEDDING not in weight.roles)
    return _SESSION_BYTES + max(values * _FLOAT_BYTES, largest)


def _widened_values(layer: LayerSpec) -> int:
    """Values of an expert, with the rows that its weight holds twice."""
    return sum(prod(written_shape(tensor, layer)[1:]) for tensor in layer.expert_tensors if tensor.is_quantizable)


def _mixer_values(layer: LayerSpec, tokens: int, context: int) -> int:
    """Values in a mixer at a time, while tokens run with a full cache."""
    mixer = layer.mixer
    if isinstance(mixer, Latent):
        of_head = 2 * mixer.key_dim + _LIVE_VECTORS * mixer.cached_values + 2 * mixer.value_dim
        return tokens * mixer.n_heads * of_head + _LIVE_CACHES * context * mixer.cached_values
    if isinstance(mixer, NoMixer):
        return 0
    if isinstance(mixer, Mamba2):
        repeated_keys = mixer.n_heads * mixer.key_dim
        return tokens * (_LIVE_CHANNELS * mixer.channels + mixer.sizes["M"] + 3 * mixer.width + repeated_keys)
    if isinstance(mixer, GatedDelta):
        repeated_keys = mixer.n_value_heads * mixer.key_dim
        return tokens * (_LIVE_CHANNELS * mixer.channels + 2 * mixer.width + repeated_keys)
    if isinstance(mixer, ShortConvolution):
        return tokens * _LIVE_PARTS * mixer.channels
    assert isinstance(mixer, GroupedQuery)
    gates = 2 * mixer.width if mixer.query_has_gates else 0
    projections = tokens * ((mixer.n_heads + 2 * mixer.n_kv_heads) * mixer.head_dim * _LIVE_PROJECTIONS + gates)
    return projections + (tokens * context * mixer.n_heads * _KEPT_WEIGHTS if Role.SINKS in layer.roles else 0)


def _feed_forward_values(spec: ModelSpec) -> int:
    """Values of a token in all its experts together: gate, up, product; input and output."""
    experts = [layer.routed for layer in spec.written.layers if layer.routed is not None]
    sorted_rows = spec.expert_width + spec.expert_size if any(map(needs_nodes, experts)) else 0  # of nodes
    routed = spec.top_k * (_neurons_values(spec.expert_width, spec.expert_size) + sorted_rows)
    beside = [_neurons_values(width, spec.hidden_size) for width in map(_width_beside_experts, spec.layers) if width]
    return routed + max(beside, default=0)


def _neurons_values(width: int, hidden_size: int) -> int:
    return 3 * width + 2 * hidden_size


def _values_on_bases(layer: LayerSpec, index: int, tokens: int) -> int:
    """Values beside those of the operator, in a layer whose experts stand on bases, while tokens run.

    Joined bases have products and sums of neurons for every token, together and apart. Otherwise each use of a base has
    its input, the base's products and the sums of neurons, by groups and together, and the base's output; what the
    operator would have for an expert that stands on a base is counted already. One expert's
    tokens have inputs, products, neurons and outputs, and sums are copied when it adds to them. Its adapters are
    widened, or, for one token, those of all chosen experts.
    """
    bases, routed = layer.bases, layer.routed
    if bases is None or routed is None:
        return 0
    rows, size, width = routed.input_rows, layer.hidden_size, routed.width
    adapters = sum(prod(factor.shape[1:]) for factor in factors_of_layer(layer, index) if factor.form.is_adapter)
    of_use, of_operator = 3 * size + 2 * rows + 4 * width, _neurons_values(width, size)
    n_groups = bases.n_bases + 1
    beside = max(min(n_groups, chosen) * of_use - chosen * of_operator for chosen in range(routed.top_k + 1))
    if joins_bases(layer):
        beside = bases.n_bases * 2 * (rows + width)
    return tokens * beside + tokens * (4 * size + 4 * rows + 4 * width) + routed.top_k * adapters


def _width_beside_experts(layer: LayerSpec) -> int:
    """Neurons of a dense feed-forward, or of a shared expert; 0: there is none."""
    if layer.routed is not None:
        return 0 if layer.routed.shared is None else layer.routed.shared.width
    return 0 if layer.feed_forward is None else layer.feed_forward.width
