"""The predicted memory against that of a process that runs llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.feed_forward import Dense, Routed, Shared
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GroupedQuery, Mamba2, ShortConvolution
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import LayerSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.memory import _graph_bytes, predict_runtime_bytes
from exporter.writing.gguf.writer import write_gguf
from tests.altered import altered

_REPOSITORY = Path(__file__).parents[4]
_SMALL = 8 << 20  # bytes by which the prediction may exceed a model of a few MB: buffers that are not touched whole
_MEASURE = (
    "import dataclasses, json, pathlib, sys; from validate.runtimes.llama_cpp import measure;"
    "cost = measure(pathlib.Path(sys.argv[1]), context=int(sys.argv[2]), kv_type=sys.argv[3],"
    " threads=int(sys.argv[4]), prompt_tokens=list(range(100, 1100, 7)));"
    "print(json.dumps(dataclasses.asdict(cost)))"
)


@pytest.fixture(scope="module")
def file(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "x.gguf"
    write_gguf(Student.teacher(open_source(family_folder)), "Q4_0", path, name="x", threads=2)
    return path


_TYPES_OF_CACHE = {"fine": ("f16", "f32", "q8_0", "q4_0")}  # which layers have it does not depend on its type


def test_prediction_is_an_upper_bound_and_close(file: Path, family_folder: Path) -> None:
    """A long context for each type of the cache, and a short one with a second thread."""
    types = _TYPES_OF_CACHE.get(family_folder.name, ("f16",))
    for context, kv_type, threads in [(512, "f16", 2), *((2048, kv_type, 1) for kv_type in types)]:
        command = [sys.executable, "-c", _MEASURE, str(file), str(context), kv_type, str(threads)]
        cost = json.loads(subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True).stdout)
        taken = cost["peak_rss_bytes"] - cost["base_rss_bytes"]
        predicted = sum(predict_runtime_bytes(read_spec(family_folder), file.stat().st_size, context, kv_type).values())
        assert taken <= predicted <= max(1.25 * taken, taken + _SMALL), (context, kv_type)


def test_every_expert_and_every_layer_counts(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    lines = predict_runtime_bytes(spec, 1000, 300, "f16")
    assert lines["weights"] == 1000
    assert lines["kv_cache"] == 6 * 512 * 2 * 4 * 32 * 2  # 300 tokens are rounded up to 512
    assert predict_runtime_bytes(spec, 1000, 300, "q8_0")["kv_cache"] == lines["kv_cache"] // 2 * 34 // 32


def test_windows_of_some_layers_make_their_caches_shorter(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    windowed = altered(spec, window=128).layers[0]
    of_token = 2 * 4 * 32 * 2

    def cache(layers: tuple[LayerSpec, ...], context: int) -> int:
        return predict_runtime_bytes(replace(spec, layers=layers), 1000, context, "f16")["kv_cache"]

    both = (windowed, spec.layers[1])
    assert cache(both, 4096) == (768 + 4096) * of_token  # a window of 128 and a batch of 512, rounded up to 256
    assert cache(both, 512) == 2 * 512 * of_token
    assert cache((windowed, windowed), 4096) == 2 * 4096 * of_token


def test_states_are_counted_once_whatever_the_context(fine_folder: Path) -> None:
    @dataclass(frozen=True)
    class Recurrent(GroupedQuery):
        """Attention beside a state."""

        @property
        def state_values(self) -> int:
            return 1000

    spec = read_spec(fine_folder)
    mixer = Recurrent(**{field.name: getattr(spec.layers[0].mixer, field.name) for field in fields(GroupedQuery)})
    recurrent = replace(spec, layers=(replace(spec.layers[0], mixer=mixer), *spec.layers[1:]))
    for context in (512, 4096):
        lines, usual = (predict_runtime_bytes(model, 1000, context, "q8_0") for model in (recurrent, spec))
        assert lines["kv_cache"] == usual["kv_cache"] + 4 * 1000


def test_a_short_convolution_keeps_its_last_inputs_instead_of_a_cache(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    mixer = ShortConvolution(channels=spec.hidden_size, kernel=3)
    layers = (replace(spec.layers[0], mixer=mixer), *spec.layers[1:])
    lines, others = (
        predict_runtime_bytes(replace(spec, layers=each), 1000, 512, "f16") for each in (layers, layers[1:])
    )
    assert lines["kv_cache"] == others["kv_cache"] + 4 * 2 * spec.hidden_size


@pytest.mark.parametrize(
    ("sizes", "measured"),
    [
        ((512, 16, 1, 128), 16.07),  # hidden size, heads of 64, groups and values of a key; MiB
        ((512, 16, 8, 128), 24.61),
        ((1024, 32, 1, 64), 29.87),
        ((1024, 32, 2, 256), 34.64),
    ],
)
def test_mamba_2_takes_as_much_as_llama_cpp_says(
    fine_folder: Path, sizes: tuple[int, int, int, int], measured: float
) -> None:
    """The numbers are its "CPU compute buffer size" for batches of 512 tokens, with 4,096 tokens in the vocabulary."""
    hidden_size, n_heads, n_groups, key_dim = sizes
    spec = altered(read_spec(fine_folder), vocab_size=4096)
    mixer = Mamba2(n_heads, n_groups, head_dim=64, key_dim=key_dim, kernel=4)
    layers = tuple(replace(layer, mixer=mixer, hidden_size=hidden_size) for layer in spec.layers)
    found = _graph_bytes(replace(spec, hidden_size=hidden_size, layers=layers), 512, "f16") / 2**20
    assert measured <= found <= 1.1 * measured


@pytest.mark.parametrize(
    ("sizes", "measured"),
    [
        ((512, 128, 256, 32, 12), 13.64),  # hidden size, values that experts read, their width, number and top-k; MB
        ((256, 128, 512, 64, 22), 31.47),
        ((256, None, 512, 64, 22), 37.24),
    ],
)
def test_experts_without_a_gate_take_as_much_as_llama_cpp_says(
    fine_folder: Path, sizes: tuple[int, int | None, int, int, int], measured: float
) -> None:
    """The numbers are its "CPU compute buffer size" for Nemotron-H with 4,096 tokens, and batches of 512."""
    hidden_size, latent_size, width, n_experts, top_k = sizes
    spec = altered(read_spec(fine_folder), vocab_size=4096)
    glu = Glu(Activation.RELU_SQUARED, is_gated=False)
    experts = Routed(n_experts, top_k, width, Routing(Score.SIGMOID), glu, latent_size=latent_size)
    layers = tuple(replace(layer, feed_forward=experts, hidden_size=hidden_size) for layer in spec.layers)
    found = _graph_bytes(replace(spec, hidden_size=hidden_size, layers=layers), 512, "f16") / 1e6
    assert measured <= found <= 1.1 * measured


def test_dense_layers_and_shared_experts_count_with_their_width(fine_folder: Path) -> None:
    spec = altered(read_spec(fine_folder), vocab_size=64)
    routed = spec.layers[1]
    assert routed.routed is not None
    usual = predict_runtime_bytes(spec, 1000, 512, "f16")["compute"]
    for wide in (Dense(8192), replace(routed.routed, shared=Shared(8192))):
        wider = replace(spec, layers=(replace(spec.layers[0], feed_forward=wide), *spec.layers[1:]))
        assert predict_runtime_bytes(wider, 1000, 512, "f16")["compute"] > usual + 512 * 4 * 2 * 8192


def test_unknown_cache_types_are_refused(fine_folder: Path) -> None:
    with pytest.raises(InputError, match="--kv-type q3: no such type; choose one of f16, f32, q8_0, q4_0"):
        predict_runtime_bytes(read_spec(fine_folder), 1, 512, "q3")


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_heads_that_are_no_whole_blocks_of_a_quantized_cache_are_refused(fine_folder: Path, kv_type: str) -> None:
    spec = altered(read_spec(fine_folder), head_dim=48)
    with pytest.raises(UnsupportedError, match=f"--kv-type {kv_type}: .* blocks of 32, .* heads are 48 wide"):
        predict_runtime_bytes(spec, 1, 512, kv_type)
