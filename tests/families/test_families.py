"""Every family against stock transformers, from the configuration to the files, on random weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from compressors.model.config.config_check import check_against_transformers
from compressors.model.description.roles import Role
from compressors.model.description.tensors import Kind
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.gradients import streamed_gradients
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.routers import RoutedCall, watching
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.gguf_settings import gguf_setting_symptoms
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.drafted_texts import write_texts
from compressors.recover.sampling import continue_texts
from exporter.inspection import describe
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from tests.families.conftest import logits_of
from tests.families.rows import Row
from tests.float8_checkpoints import SCHEMES, Scheme, all_tensors, blocks, write_float8
from validate.files.weight_comparison import compare_weights
from validate.metrics.generation import greedy
from validate.routing.agreement import routing_agreement
from validate.routing.router_alone import RouterInputRecorder, router_alone
from validate.routing.router_inputs import RouterInputs
from validate.runtimes.backend import scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend

_KEPT = (0, 2, 3, 5, 6, 7)


def _pruned(source: Checkpoint) -> Student:
    """Six of eight experts, where a layer has some."""
    kept = [_KEPT if layer.routed is not None else () for layer in source.spec.layers]
    return Student(source, ExpertMap.keeping(source.spec.n_experts, kept))


def test_the_configuration_is_what_transformers_makes_of_it(folder: Path) -> None:
    source = Checkpoint(folder)
    check_against_transformers(source.config, source.config_path, source.spec)


def test_it_can_be_inspected(folder: Path) -> None:
    description = describe(folder)
    mixers = [layer.mixer for layer in Checkpoint(folder).spec.layers]
    kinds = description["layer_kinds"]
    assert {kind["heads"] for kind in kinds} == {mixer.description for mixer in mixers}
    assert sorted(index for kind in kinds for index in kind["layers"]) == list(range(len(mixers)))


@torch.no_grad()
def test_routing_is_what_the_experts_are_called_with(folder: Path, stock: nn.Module, blocks_BT: torch.Tensor) -> None:
    spec = Checkpoint(folder).spec
    calls: list[tuple[int, RoutedCall]] = []
    with ExitStack() as stack:
        for index, layer in enumerate(spec.layers):
            if layer.routed is not None:
                module = stock.model.layers[index]
                see = lambda call, index=index: calls.append((index, call))  # noqa: E731
                stack.enter_context(watching(module, layer.routed, see))
        stock(blocks_BT)
    assert calls
    for index, call in calls:
        routed = spec.layers[index].routed
        assert routed is not None
        logits_TE, chosen_TK = call.logits_TE.numpy(), call.chosen_TK.numpy()
        bias_E = None if call.bias_E is None else call.bias_E.numpy()
        found = routed.routing.choose(logits_TE, routed.top_k, bias_E)
        np.testing.assert_array_equal(np.sort(found), np.sort(chosen_TK))
        scale_E = None if call.scale_E is None else call.scale_E.numpy()
        weights_TK = routed.routing.weights(logits_TE, chosen_TK, scale_E)
        np.testing.assert_allclose(weights_TK, call.weights_TK.numpy(), atol=1e-6)


@torch.no_grad()
def test_every_streamed_layer_equals_the_whole_model_s(folder: Path, stock: nn.Module, blocks_BT: torch.Tensor) -> None:
    expected: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: expected.append(output)) for layer in stock.model.layers
    ]
    logits = stock(blocks_BT).logits.flatten(0, 1)
    for hook in hooks:
        hook.remove()
    model = StreamedModel(Student.teacher(Checkpoint(folder)), check_finite=True)
    groups = [TokenGroup(blocks_BT)]
    (states,) = model.first_states(groups)
    for index in model.advance(groups, [states], range(model.spec.n_layers)):
        found = states.read(slice(0, len(states)))
        assert (found - expected[index]).abs().max() < 2e-5 * expected[index].abs().max()
    assert (logits_of(model, blocks_BT) - logits).abs().max() < 1e-4 * logits.abs().max()


def test_gradients_equal_autograd_s(folder: Path, stock: nn.Module, blocks_BT: torch.Tensor) -> None:
    """Tests every tensor outside of experts, biases and sinks included; no gradient reaches a choice."""
    student = Student.teacher(Checkpoint(folder))
    trained = {
        (tensor.role, index): nn.Parameter(student.tensor(tensor.role, index).float())
        for index, layer in enumerate(student.spec.layers)
        for tensor in layer.shared_tensors
        if tensor.kind is not Kind.SELECTION
    }
    targets = blocks_BT.flatten().roll(-1)

    def loss(positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, targets[positions], reduction="sum")

    _, gradients = streamed_gradients(StreamedModel(student, trainable=trained), blocks_BT, loss)
    by_name = dict([*stock.model.named_parameters(), *stock.model.named_buffers()])
    own = {
        (role, index): by_name[f"layers.{index}.{student.spec.tensor(role, index).in_layer}"] for role, index in trained
    }
    for tensor in own.values():
        tensor.requires_grad_()  # some are buffers
        tensor.grad = None
    loss(slice(None), stock(blocks_BT).logits.flatten(0, 1)).backward()
    for (role, index), found in gradients.items():
        assert isinstance(role, Role) and index is not None
        wanted, others = own[role, index].grad, (own[role, 0].grad if role is Role.LAYER_SCALE else None)
        assert wanted is not None
        size = (wanted if others is None else others).norm()  # a norm takes away what the last layer's scale does
        assert (found - wanted).norm() <= 1e-4 * size, student.name(role, index)


@torch.no_grad()
@pytest.mark.parametrize("n_prompt", [2, 9])
def test_texts_are_continued_as_if_all_were_read_again(
    folder: Path, stock: nn.Module, blocks_BT: torch.Tensor, n_prompt: int
) -> None:
    """There are more texts than a layer takes at once, and keys and values, or states, are kept."""
    seen: list[torch.Tensor] = []

    def choose(logits_bV: torch.Tensor, _texts: slice, _place: int) -> torch.Tensor:
        seen.append(logits_bV)
        return logits_bV.argmax(-1)

    prompts_BP = blocks_BT[:, :36].reshape(-1, n_prompt)
    texts = continue_texts(StreamedModel(Student.teacher(Checkpoint(folder))), prompts_BP, 6, choose)
    wanted_BNV = stock(texts, use_cache=False).logits[:, n_prompt - 1 : -1]
    found_BNV = torch.stack(seen, dim=1)
    assert (found_BNV - wanted_BNV).abs().max() < 1e-4 * wanted_BNV.abs().max()
    assert (texts[0, n_prompt:] != texts[1, n_prompt:]).any()

    def draft(numbers: Sequence[int], known: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """Two right tokens, then a wrong one."""
        found = [texts[at, len(tokens) :][:n].tolist() for at, tokens, n in zip(numbers, known, most, strict=True)]
        return [[*tokens[:2], *([0] * (len(tokens) - 2))] for tokens in found]

    drafted, effort = write_texts(
        StreamedModel(Student.teacher(Checkpoint(folder))), prompts_BP, 6, lambda logits, *_: logits.argmax(-1), draft
    )
    assert torch.equal(drafted, texts)
    assert effort.passes == 2  # three tokens in each


@torch.no_grad()
def test_a_pruned_student_loads_in_stock_transformers(folder: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    student = _pruned(Checkpoint(folder))
    write_checkpoint(student, tmp_path / "student")
    again = Checkpoint(tmp_path / "student")
    assert again.spec == student.spec
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    expected = loaded(blocks_BT).logits.flatten(0, 1)
    assert (logits_of(StreamedModel(student), blocks_BT) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_a_dense_student_is_a_model_of_the_dense_counterpart(
    folder: Path, row: Row, blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    """It has one expert in each layer."""
    source = Checkpoint(folder)
    if source.family.dense is None:
        pytest.skip("no architecture matches")
    student = Student(source, ExpertMap.keeping(source.spec.n_experts, [(5,)] * source.spec.n_layers))
    found = logits_of(StreamedModel(student), blocks_BT)
    write_checkpoint(student, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert type(loaded).__name__ == source.family.dense.family.architecture
    expected = loaded(blocks_BT).logits.flatten(0, 1)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
    _in_llama_cpp(tmp_path / "x.gguf", student, blocks_BT, found, row.logit_error)


@torch.no_grad()
@pytest.mark.parametrize("pruned", [False, True])
def test_llama_cpp_computes_and_routes_like_torch(
    folder: Path, row: Row, blocks_BT: torch.Tensor, tmp_path: Path, pruned: bool
) -> None:
    source = Checkpoint(folder)
    student = _pruned(source) if pruned else Student.teacher(source)
    write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
    weights = GgufWeights(tmp_path / "x.gguf", student.spec)
    assert compare_weights(student, student.as_written(weights), weights.stored_type).damage == ()
    recorder, model = RoutingRecorder(student.spec), StreamedModel(student)
    inputs = RouterInputRecorder(tmp_path / "inputs", student.spec, np.arange(len(blocks_BT)), blocks_BT.shape[1])
    (hidden,) = model.stream([TokenGroup(blocks_BT, [recorder.observe, inputs.observe])])
    routing = recorder.routing()
    inputs.finish(routing)
    everywhere = slice(0, blocks_BT.shape[1])
    expected = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, everywhere)])
    routings = _in_llama_cpp(tmp_path / "x.gguf", student, blocks_BT, expected, row.logit_error)
    found = RoutingRecord.concatenate(routings)
    assert routing_agreement(routing, found).mean("overlap") > 0.99
    fed = RouterInputs(tmp_path / "inputs")
    backend = LlamaCppBackend(tmp_path / "x.gguf", n_ctx=64, kv_type="f32", threads=1)
    alone = router_alone(fed, backend.route(blocks_BT.numpy(), fed))
    assert alone.agreement.mean("overlap") == 1.0 and alone.margin_error < 1e-5
    prompts = [blocks_BT[text, :12].tolist() for text in (0, 0, 1)]  # equal ones are run once
    apart = [backend.generate(prompt, 6, greedy) for prompt in prompts]
    assert backend.generate_together(prompts, 6, [greedy] * len(prompts)) == apart


@pytest.mark.parametrize("mix", ["F32", "Q8_0"])
def test_a_file_s_weights_are_found_undamaged(folder: Path, tmp_path: Path, mix: str) -> None:
    student = _pruned(Checkpoint(folder))
    write_gguf(student, mix, tmp_path / "x.gguf", name="x", threads=1)
    weights = GgufWeights(tmp_path / "x.gguf", student.spec)
    comparison = compare_weights(student, student.as_written(weights), weights.stored_type)
    assert comparison.damage == ()
    compared = {(unit.role, unit.layer) for unit in comparison.errors}
    assert compared == {(tensor.role, layer) for tensor, layer in student.spec.written.places}


def _in_llama_cpp(
    path: Path, student: Student, blocks_BT: torch.Tensor, expected: torch.Tensor, logit_error: float
) -> list[RoutingRecord]:
    """Compares logits, and the file's settings with the model's; returns the routing of each block."""
    assert gguf_setting_symptoms(GgufFile(path).metadata, student.spec) == []
    backend = LlamaCppBackend(path, n_ctx=64, kv_type="f32", threads=1)
    outputs = [(output.logits_SV.copy(), output.routing) for output in backend.run(blocks_BT.numpy())]
    wanted_BSV = expected.view(*blocks_BT.shape, -1)[:, scored_positions(blocks_BT.shape[1])]
    found_BSV = torch.from_numpy(np.stack([logits for logits, _ in outputs]))
    assert (found_BSV - wanted_BSV).abs().max() < logit_error * wanted_BSV.std()
    return [routing for _, routing in outputs if routing is not None]


@pytest.mark.parametrize("scheme", [blocks((48, 40)), SCHEMES["compressed-tensors, rows"]], ids=["blocks", "rows"])
def test_a_float8_checkpoint_is_the_dequantized_one(folder: Path, tmp_path: Path, scheme: Scheme) -> None:
    """In every projection, also of sizes that are no multiples of the block."""
    write_float8(folder, tmp_path / "fp8", tmp_path / "plain", scheme)
    found, wanted = Checkpoint(tmp_path / "fp8"), Checkpoint(tmp_path / "plain")
    assert (found.spec, found.n_bytes, found.dtype) == (wanted.spec, wanted.n_bytes, wanted.dtype)
    assert found.stored_as is not None
    tensors = all_tensors(found)
    assert all(torch.equal(tensors[place], tensor) for place, tensor in all_tensors(wanted).items())


def test_transformers_dequantizes_to_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    if any(tensor.fused is not None and tensor.fused.is_only_form for tensor, _ in Checkpoint(folder).spec.places):
        pytest.skip("transformers reads no experts in float8 that the hub has in one tensor")
    write_float8(folder, tmp_path / "fp8", tmp_path / "plain", blocks((8, 8)))  # transformers reads no uneven ones
    settings = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=settings, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).state_dict()
    assert theirs.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in theirs.state_dict().items())
