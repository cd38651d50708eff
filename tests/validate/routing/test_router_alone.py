"""Routers on equal inputs, in both runtimes: a router's own damage shows there, and no other damage does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from compressors.model.description.roles import Role
from compressors.model.errors import InputError, MoeExportError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.metrics.evaluation import evaluate
from validate.routing.agreement import routing_agreement
from validate.routing.router_alone import RouterInputRecorder, router_alone
from validate.routing.router_inputs import RouterInputs, spread_chunks
from validate.runtimes import llama_cpp_routing
from validate.runtimes.backend import RuntimeBackend
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

Tokens = npt.NDArray[np.int64]

_KEPT = np.array([0, 2])
_RUNTIMES = ("gguf", "onnx")


@dataclass(frozen=True)
class _Recorded:
    student: Student
    tokens_BT: Tokens  # of all chunks
    inputs: RouterInputs  # of the first and the last
    folder: Path

    def open(self, runtime: str, student: Student, name: str, preset: str = "Q4_0") -> RuntimeBackend:
        """The student in a file, in its runtime."""
        path = self.folder / f"{name}.{runtime}"
        if runtime == "gguf":
            write_gguf(student, preset, path, name="x", threads=1)
            return LlamaCppBackend(path, n_ctx=128, threads=1)
        write_onnx(student, preset, path, threads=1)
        return OnnxRuntimeBackend(path, threads=1)


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path], heldout_tokens: Tokens
) -> _Recorded:
    """Half of the experts of two layers; three chunks of 128 tokens, two of them kept."""
    folder = tmp_path_factory.mktemp("router_alone")
    source = open_source(toy_checkpoint(folder, n_layers=2))
    student = Student(source, ExpertMap.keeping(32, [range(0, 32, 2), range(16)]))
    tokens_BT = heldout_tokens[9000 : 9000 + 3 * 128].reshape(3, 128)
    recorder = RouterInputRecorder(folder / "inputs", student.spec, _KEPT, 128)
    routing = evaluate(TorchBackend(student, observers=[recorder.observe]), tokens_BT, {}).routing
    assert routing is not None
    recorder.finish(routing)
    return _Recorded(student, tokens_BT, RouterInputs(folder / "inputs"), folder)


@pytest.fixture(scope="module", params=_RUNTIMES)
def quantized(request: pytest.FixtureRequest, recorded: _Recorded) -> RuntimeBackend:
    return recorded.open(request.param, recorded.student, "quantized")


def test_recorded_states_are_what_the_routers_saw(recorded: _Recorded) -> None:
    routing = recorded.inputs.routing()
    assert recorded.inputs.chunks().tolist() == _KEPT.tolist()
    assert routing.experts_LTK.shape == (2, 2 * 128, 4)
    for layer in range(2):
        states_TD = recorded.inputs.states(layer, 0, 2 * 128)
        logits_TE = states_TD @ recorded.student.tensor(Role.ROUTER, layer).float().numpy().T
        order_TE = np.argsort(-logits_TE, axis=1)
        np.testing.assert_array_equal(order_TE[:, :4], routing.experts_LTK[layer])
        sorted_TE = np.take_along_axis(logits_TE, order_TE, axis=1)
        assert routing.margins_LT is not None
        np.testing.assert_allclose(routing.margins_LT[layer], sorted_TE[:, 3] - sorted_TE[:, 4], atol=1e-5)
        np.testing.assert_array_equal(recorded.inputs.states(layer, 100, 160), states_TD[100:160])


def test_rounded_experts_do_not_show_in_routers_alone(recorded: _Recorded, quantized: RuntimeBackend) -> None:
    chosen = quantized.route(recorded.tokens_BT[_KEPT], recorded.inputs)
    alone = router_alone(recorded.inputs, chosen)
    assert alone.n_chunks == 2
    assert [layer.exact for layer in alone.agreement.layers if layer] == [1.0, 1.0]
    assert alone.margin_error < 1e-5
    np.testing.assert_allclose(chosen.weights_LTK, recorded.inputs.routing().weights_LTK, atol=1e-5)
    free = evaluate(quantized, recorded.tokens_BT[_KEPT], {}).routing
    assert free is not None
    assert routing_agreement(recorded.inputs.routing(), free).mean("exact") < 0.97
    figures = alone.figures()
    assert figures["overlap"] == 1.0 and figures["chunks"] == 2 and figures["ties"]["differing"] == 0.0


def test_a_run_after_feeding_sees_its_own_states(recorded: _Recorded, quantized: RuntimeBackend) -> None:
    before = evaluate(quantized, recorded.tokens_BT[:1], {})
    quantized.route(recorded.tokens_BT[_KEPT], recorded.inputs)
    after = evaluate(quantized, recorded.tokens_BT[:1], {})
    np.testing.assert_array_equal(before.negative_log_likelihood_N, after.negative_log_likelihood_N)
    assert before.routing is not None and after.routing is not None
    np.testing.assert_array_equal(before.routing.experts_LTK, after.routing.experts_LTK)


@pytest.mark.parametrize("runtime", _RUNTIMES)
def test_only_the_permuted_router_is_blamed(recorded: _Recorded, runtime: str) -> None:
    """In a free run all layers behind the damage suffer; here it is the damaged one alone."""
    router = recorded.student.tensor(Role.ROUTER, 0).float()
    damaged = recorded.student.with_overlay({recorded.student.name(Role.ROUTER, 0): router.roll(1, dims=0)})
    backend = recorded.open(runtime, damaged, "permuted", "F32")
    first, second = _exact_by_layer(recorded, backend)
    assert first < 0.05
    assert second == 1.0
    assert _free_exact(recorded, backend)[1] < 0.9


@pytest.mark.parametrize("runtime", _RUNTIMES)
def test_damage_elsewhere_is_not_blamed_on_routers(recorded: _Recorded, runtime: str) -> None:
    """A value projection that is too large: every router gets wrong states in a free run, and none is at fault."""
    name = recorded.student.name(Role.VALUE, 0)
    damaged = recorded.student.with_overlay({name: recorded.student.tensor(Role.VALUE, 0).float() * 1.5})
    backend = recorded.open(runtime, damaged, "attention", "F32")
    assert _exact_by_layer(recorded, backend) == [1.0, 1.0]
    assert max(_free_exact(recorded, backend)) < 0.9


def _exact_by_layer(recorded: _Recorded, backend: RuntimeBackend) -> list[float]:
    chosen = backend.route(recorded.tokens_BT[_KEPT], recorded.inputs)
    return [layer.exact for layer in router_alone(recorded.inputs, chosen).agreement.layers if layer]


def _free_exact(recorded: _Recorded, backend: RuntimeBackend) -> list[float]:
    free = evaluate(backend, recorded.tokens_BT[_KEPT], {}).routing
    assert free is not None
    return [layer.exact for layer in routing_agreement(recorded.inputs.routing(), free).layers if layer]


class _OtherWidth(RouterInputs):
    def states(self, layer: int, first: int, last: int) -> npt.NDArray[np.float32]:
        """Half as wide."""
        return np.ascontiguousarray(super().states(layer, first, last)[:, :128])


def test_states_of_another_model_are_refused(recorded: _Recorded, quantized: RuntimeBackend) -> None:
    tokens_BT = recorded.tokens_BT[_KEPT]
    with pytest.raises(MoeExportError, match=r"128|not those of this model|dimension mismatch"):
        quantized.route(tokens_BT, _OtherWidth(recorded.inputs.folder))
    with pytest.raises(InputError, match="cannot be read"):
        quantized.route(tokens_BT, RouterInputs(recorded.folder))
    quantized.route(tokens_BT, recorded.inputs)


@pytest.mark.parametrize(("n_chunks", "expected"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 3, 4]), (40, [0, 13, 26, 39])])
def test_kept_chunks_are_spread_over_the_text(n_chunks: int, expected: Sequence[int]) -> None:
    assert spread_chunks(n_chunks).tolist() == expected


def test_no_piece_of_the_graph_holds_the_pattern_of_fused_kernels(
    recorded: _Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU backends fuse sorting with what selects the weights if one piece has both: the callback must cut between."""
    pieces: list[list[str]] = [[]]
    visit = llama_cpp_routing.RoutingCollector._visit

    def watching(self: llama_cpp_routing.RoutingCollector, address: int, ask: bool, user_data: int) -> bool:
        answer = visit(self, address, ask, user_data)
        if ask:
            pieces[-1].append(llama_cpp_routing._TensorHead.from_address(address).name.decode())
            if answer:
                pieces.append([])
        return answer

    monkeypatch.setattr(llama_cpp_routing.RoutingCollector, "_visit", watching)
    backend = recorded.open("gguf", recorded.student, "watched")
    list(backend.run(recorded.tokens_BT[:1]))
    for layer in range(2):
        sorts = [piece for piece in pieces if f"ffn_moe_argsort-{layer}" in piece]
        assert sorts, "every router sorts"
        assert all(piece[-1] == f"ffn_moe_topk-{layer}" for piece in sorts)
        assert not any(f"ffn_moe_weights-{layer}" in piece for piece in sorts)
