"""Layers that predict one more token: read, run, pruned and written, and run again in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.calibration.statistics import StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.mtp import advance_with_mtp, run_mtp
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink.layerwise import LayerwiseCompression
from exporter.inspection import describe
from exporter.planning.recipe import CompressChoice, SourceChoice
from exporter.stages.student.layer_targets import layer_targets
from exporter.writing.gguf.memory import predict_runtime_bytes
from exporter.writing.gguf.type_table import plan_gguf_units
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from tests.families.checkpoints import add_mtp, write_inside_of_more, write_model
from tests.families.rows import ROWS
from tests.llama_mtp import mtp_buffers, mtp_logits
from validate.files.file_facts import gguf_facts
from validate.files.weight_comparison import compare_weights
from validate.runtimes.backend import ChunkOutput
from validate.runtimes.llama_cpp import LlamaCppBackend

_WITH_MTP = ("glm4_moe", "glm4_moe_lite", "qwen3_5_moe_text", "qwen3_next")
_KEPT = (0, 2, 3, 5, 6, 7)


@pytest.fixture(scope="module", params=_WITH_MTP)
def checkpoint(request: pytest.FixtureRequest, fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with such a layer; that of Qwen3.5 is a part of a larger model, with fused experts."""
    path = tmp_path_factory.mktemp("mtp") / str(request.param)
    write_model(request.param, ROWS[request.param], path, fine_folder)
    add_mtp(path)
    if request.param == "qwen3_5_moe_text":
        write_inside_of_more(path, path.with_name("qwen3_5_moe"))
        return path.with_name("qwen3_5_moe")
    return path


@pytest.fixture(scope="module")
def tokens(blocks_BT: torch.Tensor) -> torch.Tensor:
    """A sequence of 24."""
    return blocks_BT[:1, :24]


def _pruned(source: Checkpoint) -> Student:
    """Six of eight experts, the layer for MTP with others than the decoder layers."""
    kept = [_KEPT if layer.routed is not None else () for layer in source.spec.layers]
    behind = [] if source.spec.mtp is None else [(1, 2, 3, 4, 5, 7)]
    return Student(source, ExpertMap.keeping(8, [*kept, *behind], n_layers=source.spec.n_layers))


def _logits(student: Student, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The layer's logits, [T - 1, V], by torch."""
    model, spec = StreamedModel(student, check_finite=True), student.spec
    assert spec.mtp is not None
    (states,) = model.stream([TokenGroup(tokens_BT)])
    out = HiddenStates((1, tokens_BT.shape[1] - 1, spec.hidden_size), torch.float32)
    for _, weights in model.weights([spec.n_layers]):
        run_mtp(model, weights, tokens_BT, states, out)
    scales = spec.mtp.tensor(Role.MTP_OUTPUT_NORM).scales(student.tensor(Role.MTP_OUTPUT_NORM, spec.n_layers))
    hidden = out.read(slice(0, 1))[0]
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + spec.rms_norm_eps) * scales
    own_head = Role.MTP_HEAD in spec.mtp.roles
    head = student.tensor(Role.MTP_HEAD, spec.n_layers) if own_head else student.tensor(Role.HEAD)
    return normed @ head.float().T


@torch.no_grad()
@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
def test_llama_cpp_drafts_as_torch_does(
    checkpoint: Path, tokens: torch.Tensor, tmp_path: Path, *, is_pruned: bool
) -> None:
    """The file's other logits are those of a file without the layer."""
    with_it, without = Checkpoint(checkpoint, keeps_mtp=True), Checkpoint(checkpoint)
    student, plain = (_pruned(source) if is_pruned else Student.teacher(source) for source in (with_it, without))
    path, other = tmp_path / "with.gguf", tmp_path / "without.gguf"
    write_gguf(student, "F32", path, name="x", threads=1)
    write_gguf(plain, "F32", other, name="x", threads=1)
    assert path.stat().st_size == predict_file_size(student.spec, with_it, "F32", "x")
    expected = _logits(student, tokens)
    found = torch.from_numpy(mtp_logits(path, tokens[0].tolist()))
    assert (found - expected).abs().max() < 1e-3 * expected.std()
    for with_layer, alone in zip(_outputs(path, tokens), _outputs(other, tokens), strict=True):
        assert np.array_equal(with_layer.logits_SV, alone.logits_SV)


def _outputs(path: Path, tokens_BT: torch.Tensor) -> Iterator[ChunkOutput]:
    return LlamaCppBackend(path, n_ctx=64, kv_type="f32", threads=1).run(tokens_BT.numpy())


def test_a_file_holds_what_the_checkpoint_does(checkpoint: Path, tmp_path: Path) -> None:
    student = _pruned(Checkpoint(checkpoint, keeps_mtp=True))
    write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
    file = GgufFile(tmp_path / "x.gguf")
    architecture, index = student.family.gguf.architecture, student.spec.n_layers
    assert file.metadata[f"{architecture}.block_count"] == index + 1
    assert file.metadata[f"{architecture}.nextn_predict_layers"] == 1
    assert file.tensors[f"blk.{index}.ffn_down_exps.weight"].shape[0] == len(_KEPT)
    facts = gguf_facts(tmp_path / "x.gguf")
    assert (facts.n_layers, facts.n_mtp) == (index, 1)
    weights = GgufWeights(tmp_path / "x.gguf", student.spec)
    comparison = compare_weights(student, student.as_written(weights), weights.stored_type)
    assert comparison.damage == () and set(comparison.errors.values()) == {0.0}
    assert Role.MTP_PROJECTION in {unit.role for unit in comparison.errors}


def test_its_matrices_have_the_types_of_the_last_layer_like_it(checkpoint: Path) -> None:
    """A search weighs no error of theirs, and yet counts their bytes."""
    spec = Checkpoint(checkpoint, keeps_mtp=True).spec
    last, index = spec.n_layers - 1, spec.n_layers
    units = {name: unit for unit in plan_gguf_units(spec) for name in unit.tensors}
    down = units[f"blk.{last}.ffn_down_exps.weight"]
    assert down.tensors == (f"blk.{last}.ffn_down_exps.weight", f"blk.{index}.ffn_down_exps.weight")
    assert down.matrices == ((Role.EXPERT_DOWN, last),)
    alone = {name: unit for unit in plan_gguf_units(replace(spec, mtp=None)) for name in unit.tensors}
    whole = {candidate.choice: candidate.n_bytes for candidate in down.candidates}
    half = alone[f"blk.{last}.ffn_down_exps.weight"].candidates
    assert whole == {candidate.choice: 2 * candidate.n_bytes for candidate in half}
    assert f"blk.{index}.nextn.eh_proj.weight" not in units
    assert {unit.name for unit in units.values()} == {unit.name for unit in alone.values()}


def test_its_memory_is_counted(checkpoint: Path, tmp_path: Path) -> None:
    """llama.cpp drafts in a context of its own, with a cache of one layer; it may keep copies of recurrent states."""
    source = Checkpoint(checkpoint, keeps_mtp=True)
    write_gguf(Student.teacher(source), "Q8_0", tmp_path / "x.gguf", name="x", threads=1)
    of_model, of_layer = mtp_buffers(tmp_path / "x.gguf", 512)
    found = predict_runtime_bytes(source.spec, 1000, 512, "f16")
    without = predict_runtime_bytes(replace(source.spec, mtp=None), 1000, 512, "f16")
    cached = sum(each[purpose] for each in (of_model, of_layer) for purpose in ("kv_cache", "recurrent_state"))
    assert abs(found["kv_cache"] - cached) < 0.03 * 2**20  # the log has two digits of MiB
    assert found["compute"] - without["compute"] > of_layer["compute"] + of_layer["output"]


def test_hidden_states_that_go_to_the_layer_are_counted(checkpoint: Path) -> None:
    """The numbers are llama.cpp's "CPU compute buffer size" of the layer's context, with 4,096 tokens, in MB."""
    spec = Checkpoint(checkpoint, keeps_mtp=True).spec
    assert spec.mtp is not None
    for hidden_size, context, measured in ((512, 4096, 14.69), (1024, 512, 19.41)):
        layers = tuple(replace(layer, hidden_size=hidden_size) for layer in spec.layers)
        mtp = replace(spec.mtp, hidden_size=hidden_size)
        wider = replace(spec, hidden_size=hidden_size, layers=layers, mtp=mtp)
        with_it, without = (
            predict_runtime_bytes(each, 0, context, "f16")["compute"] for each in (wider, replace(wider, mtp=None))
        )
        of_model = 4 * hidden_size * (2048 + 512)  # of a batch, and in its graph
        assert measured <= (with_it - without - of_model) / 1e6 <= 1.2 * measured


def test_inspect_says_that_it_can_be_kept(checkpoint: Path) -> None:
    (part, *_) = describe(checkpoint)["parts_read_past"]
    assert part.startswith("layers for predicting several tokens at once (MTP) (")
    assert part.endswith("kept in GGUF files with `--keep-mtp`, for llama.cpp's drafts")


def test_a_recipe_says_it_only_if_it_is_kept() -> None:
    kept = SourceChoice(model="x", keep_mtp=True)
    assert kept.model_dump() == {"model": "x", "identity": None, "keep_mtp": True}
    assert SourceChoice.model_validate(kept.model_dump()) == kept
    assert SourceChoice(model="x").model_dump() == {"model": "x", "identity": None}


def test_a_map_keeps_its_experts(checkpoint: Path) -> None:
    source = Checkpoint(checkpoint, keeps_mtp=True)
    experts = _pruned(source).experts
    again = ExpertMap.from_json(experts.to_json())
    again.check_against(source.spec)
    assert again == experts and again.mtp is not None and again.mtp.kept == (1, 2, 3, 4, 5, 7)
    with pytest.raises(ValueError, match="MTP"):
        again.check_against(Checkpoint(checkpoint).spec)


def test_methods_choose_its_experts_by_its_own_states(checkpoint: Path, tokens: torch.Tensor) -> None:
    """With states, statistics and sequentially, it is the last layer; merged experts are written into the overlay."""
    source = Checkpoint(checkpoint, keeps_mtp=True)
    model = StreamedModel(Student.teacher(source))
    collector, n_blocks = StatisticsCollector(source.spec), len(source.spec.blocks)
    groups = [TokenGroup(tokens, [collector.observe])]
    statistics = [
        collector.take(index) for index in advance_with_mtp(model, groups, model.first_states(groups), range(n_blocks))
    ]
    for method, sequential in (("reap", False), ("ream", True)):
        choice = CompressChoice(method=method, experts=6, sequential=sequential)
        targets = layer_targets(choice, source.spec, statistics, lambda: model, tokens)
        layers = list(
            LayerwiseCompression(source, targets, statistics, tokens, n_sample_blocks=1, sequential=sequential).run()
        )
        *_, last = layers
        assert last.map.source == source.spec.n_layers and len(last.map.groups) == 6
        if method == "reap":
            scores = statistics[-1].reap_scores()
            dropped = [expert for expert in range(8) if expert not in last.map.kept]
            assert scores[list(last.map.kept)].min() >= scores[dropped].max() and not last.overlay
        else:
            assert any("mtp" in name or f".layers.{source.spec.n_layers}." in name for name in last.overlay)


def test_a_saved_student_has_it_and_is_read_again(checkpoint: Path, tmp_path: Path) -> None:
    student = _pruned(Checkpoint(checkpoint, keeps_mtp=True))
    write_checkpoint(student, tmp_path / "student")
    again = Student.teacher(Checkpoint(tmp_path / "student", keeps_mtp=True))
    index = student.spec.n_layers
    assert again.spec.mtp is not None and again.spec.mtp.n_experts == len(_KEPT)
    for tensor in again.spec.mtp.shared_tensors:
        assert torch.equal(again.tensor(tensor.role, index), student.tensor(tensor.role, index)), tensor.role
    for tensor in again.spec.mtp.expert_tensors:
        for expert in range(len(_KEPT)):
            assert torch.equal(again.expert(tensor.role, index, expert), student.expert(tensor.role, index, expert))


def test_the_layer_has_statistics_of_its_own(checkpoint: Path, tokens: torch.Tensor) -> None:
    model = StreamedModel(Student.teacher(Checkpoint(checkpoint, keeps_mtp=True)))
    collector, index = StatisticsCollector(model.spec), model.spec.n_layers
    groups = [TokenGroup(tokens, [collector.observe]), TokenGroup(tokens)]
    hidden = model.first_states(groups)
    *_, last = advance_with_mtp(model, groups, hidden, range(index + 1))
    assert last == index
    statistics = collector.take(index)
    n_tokens = tokens.shape[1] - 1
    assert statistics.n_tokens == n_tokens
    assert statistics.count_E.sum() == n_tokens * model.spec.top_k
    assert statistics.input_squares[Role.MTP_PROJECTION].shape == (2 * model.spec.hidden_size,)
    assert (statistics.reap_scores() > 0).any()


def test_tables_that_are_copies_are_the_model_s(fine_folder: Path, tmp_path: Path) -> None:
    write_model("glm4_moe", ROWS["glm4_moe"], tmp_path / "x", fine_folder)
    add_mtp(tmp_path / "x", has_own_tables=False)
    mtp = Checkpoint(tmp_path / "x", keeps_mtp=True).spec.mtp
    assert mtp is not None and not {Role.MTP_EMBEDDING, Role.MTP_HEAD} & {*mtp.roles}


def test_what_llama_cpp_cannot_run_is_refused(fine_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_model("qwen3_next", ROWS["qwen3_next"], path, fine_folder)
    with pytest.raises(UnsupportedError, match=r"no tensor mtp\.layers\.0.* leave --keep-mtp out"):
        open_source(path, keeps_mtp=True)
    add_mtp(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mtp.layers.1.input_layernorm.weight": torch.ones(64)}, file)
    with pytest.raises(UnsupportedError, match=r"mtp\.layers\.1\..* it takes one"):
        open_source(path, keeps_mtp=True)
    assert open_source(path).spec.mtp is None
    save_file({name: tensor for name, tensor in tensors.items() if name != "mtp.fc.weight"}, file)
    with pytest.raises(InputError, match=r"tensor mtp\.fc\.weight is in none"):
        open_source(path, keeps_mtp=True)


@pytest.mark.parametrize(
    ("family", "why"), [("deepseek_v3", "converter"), ("exaone_moe", "never runs"), ("olmoe", "have no layer for MTP")]
)
def test_families_without_it_say_why(fine_folder: Path, tmp_path: Path, family: str, why: str) -> None:
    row = ROWS.get(family)
    if row is not None:
        write_model(family, row, tmp_path / "x", fine_folder)
    path = Path("tests/fixtures/olmoe").resolve() if row is None else tmp_path / "x"
    with pytest.raises(UnsupportedError, match=rf"{why}.*leave --keep-mtp out"):
        open_source(path, keeps_mtp=True)
