"""A model taken through methods layer by layer: against slices made by hand, and against stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing
from compressors.model.description.spec import NO_MOE, MoeSize
from compressors.model.errors import InputError
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.decompose import ActivationSvd
from compressors.shrink.layerwise import CompressedLayer, LayerTarget, LayerwiseCompression
from compressors.shrink.merge import REAM, MSMoE
from compressors.shrink.moe_block import Evidence, Method, MoeBlock
from compressors.shrink.prune import Prune, highest
from compressors.shrink.slim.width import SlimWidth

_N_LAYERS = 3
_WIDTH = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Checkpoint:
    """Three layers of 32 experts, top-4, 128 wide."""
    return Checkpoint(toy_checkpoint(tmp_path_factory.mktemp("layerwise"), n_layers=_N_LAYERS))


@pytest.fixture(scope="module")
def tokens_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[9000 : 9000 + 12 * 128].reshape(12, 128))


@pytest.fixture(scope="module")
def statistics(source: Checkpoint, tokens_BT: torch.Tensor) -> list[LayerStatistics]:
    return _statistics(source, tokens_BT)


def _statistics(source: Checkpoint, tokens_BT: torch.Tensor) -> list[LayerStatistics]:
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(tokens_BT, [collector.observe])])
    return [collector.take(layer) for layer in range(_N_LAYERS)]


@pytest.fixture
def compress(
    source: Checkpoint, tokens_BT: torch.Tensor, statistics: list[LayerStatistics]
) -> Callable[..., list[CompressedLayer]]:
    def run(targets: Sequence[LayerTarget], tokens: torch.Tensor = tokens_BT, **choices: Any) -> list[CompressedLayer]:
        return list(LayerwiseCompression(source, targets, statistics, tokens, n_sample_blocks=4, **choices).run())

    return run


def _student(source: Checkpoint, layers: Sequence[CompressedLayer]) -> Student:
    overlay = {name: tensor for layer in layers for name, tensor in layer.overlay.items()}
    assert len(overlay) == sum(len(layer.overlay) for layer in layers), "no name is there twice"
    return Student(source, ExpertMap(32, tuple(layer.map for layer in layers))).with_overlay(overlay)


@torch.no_grad()
def _logits(student: Student, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    return torch.cat([part for _, part in model.logits_in_chunks(hidden, slice(0, tokens_BT.shape[1]))])


def _all_layers(n_experts: int, width: int, *methods: Method) -> list[LayerTarget]:
    return [LayerTarget(layer, MoeSize(n_experts, width), methods) for layer in range(_N_LAYERS)]


def test_pruning_keeps_the_highest_scores_of_each_layer_that_stays(
    source: Checkpoint,
    tokens_BT: torch.Tensor,
    statistics: list[LayerStatistics],
    compress: Callable[..., list[CompressedLayer]],
) -> None:
    """A block goes, and the layer behind it is judged by its own statistics."""
    targets = [
        LayerTarget(0, MoeSize(10, _WIDTH), (Prune("reap", 10),)),
        LayerTarget(2, MoeSize(5, _WIDTH), (Prune("frequency", 5),)),
    ]
    layers = compress(targets)
    expected = [highest(statistics[0].reap_scores(), 10), highest(statistics[2].count_E, 5)]
    assert [layer.map for layer in layers] == [
        LayerMap(source_layer, tuple((expert,) for expert in kept))
        for source_layer, kept in zip((0, 2), expected, strict=True)
    ]
    assert all(layer.overlay == {} for layer in layers), "pruning writes nothing"
    stock = _stock(source)
    for layer, kept in zip((0, 2), expected, strict=True):
        _keep(stock.model.layers[layer].mlp, kept)
    stock.model.layers = nn.ModuleList([stock.model.layers[0], stock.model.layers[2]])
    stock.config.num_hidden_layers = 2
    with torch.no_grad():
        by_hand = stock(tokens_BT[:2], use_cache=False).logits.flatten(0, 1)
    assert (_logits(_student(source, layers), tokens_BT[:2]) - by_hand).abs().max() < 1e-4


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("methods", [(), (Prune("reap", 32), SlimWidth(_WIDTH), REAM(32))])
def test_dropping_nothing_changes_no_bit(
    source: Checkpoint,
    tokens_BT: torch.Tensor,
    compress: Callable[..., list[CompressedLayer]],
    sequential: bool,
    methods: tuple[Method, ...],
) -> None:
    layers = compress(_all_layers(32, _WIDTH, *methods), sequential=sequential)
    student = _student(source, layers)
    assert student.experts == ExpertMap.identity(source.spec)
    assert student.overlay == {}
    assert torch.equal(_logits(student, tokens_BT[:2]), _logits(Student.teacher(source), tokens_BT[:2]))


def test_statistics_alone_need_no_expert(
    compress: Callable[..., list[CompressedLayer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers whose experts statistics choose are not read; of the others each expert's three matrices, once."""
    read: list[int] = []
    read_expert = Checkpoint.read_expert

    def counting(self: Checkpoint, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        read.append(layer)
        read_expert(self, role, layer, expert, out)

    def refused(*_arguments: object) -> torch.Tensor:
        raise AssertionError("experts are read into buffers")

    monkeypatch.setattr(Checkpoint, "read_expert", counting)
    monkeypatch.setattr(Checkpoint, "expert", refused)
    targets = [*_all_layers(7, _WIDTH, Prune("reap", 7))[:2], LayerTarget(2, NO_MOE)]
    layers = compress(targets)
    assert read == []
    assert [len(layer.map.groups) for layer in layers] == [7, 7, 0]
    targets[1] = LayerTarget(1, MoeSize(32, 64), (SlimWidth(64),))
    layers = compress([targets[1]])
    assert read == [1] * 32 * 3


def _stock(source: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()


@torch.no_grad()
def _keep(mlp: Any, kept: Sequence[int]) -> None:
    """Cuts transformers' MoE block down to these experts."""
    indices = list(kept)
    mlp.gate.weight = nn.Parameter(mlp.gate.weight[indices])
    mlp.experts.gate_up_proj = nn.Parameter(mlp.experts.gate_up_proj[indices])
    mlp.experts.down_proj = nn.Parameter(mlp.experts.down_proj[indices])
    mlp.gate.num_experts = mlp.experts.num_experts = len(indices)
    mlp.gate.top_k = min(mlp.gate.top_k, len(indices))


@torch.no_grad()
def _reap(mlp: Any, inputs_TD: torch.Tensor) -> list[float]:
    """Mean of gate times norm of the output, over the tokens that chose an expert; expert by expert."""
    logits_TE = inputs_TD @ mlp.gate.weight.T
    probabilities_TE = logits_TE.softmax(-1)
    scores = []
    for expert in range(mlp.experts.num_experts):
        products = []
        for token, probabilities in enumerate(probabilities_TE):
            best = probabilities.argsort(descending=True)[: mlp.gate.top_k].tolist()
            if expert in best:
                gate, up = (mlp.experts.gate_up_proj[expert] @ inputs_TD[token]).chunk(2)
                output = mlp.experts.down_proj[expert] @ (functional.silu(gate) * up)
                products.append(float(probabilities[expert] / probabilities[best].sum() * output.norm()))
        scores.append(sum(products) / len(products) if products else 0.0)
    return scores


def test_sequential_mode_sees_what_the_pruned_layers_in_front_make_of_the_text(
    source: Checkpoint, tokens_BT: torch.Tensor, compress: Callable[..., list[CompressedLayer]]
) -> None:
    """Brute force: prune a layer of stock transformers, run the whole model again, judge the next layer."""
    text_BT, n_kept = tokens_BT[:2, :96], 8
    stock, survivors = _stock(source), []
    for layer in stock.model.layers:
        inputs: list[torch.Tensor] = []
        handle = layer.mlp.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))  # noqa: B023
        with torch.no_grad():
            stock(text_BT, use_cache=False)
        handle.remove()
        scores = _reap(layer.mlp, inputs[0].flatten(0, 1))
        by_score = sorted(range(32), key=lambda expert: -scores[expert])
        survivors.append(tuple(sorted(by_score[:n_kept])))
        assert scores[by_score[n_kept - 1]] - scores[by_score[n_kept]] > 1e-5, "no matter of rounding"
        _keep(layer.mlp, survivors[-1])
    targets = _all_layers(n_kept, _WIDTH, Prune("reap", n_kept))
    layers = compress(targets, sequential=True, tokens=text_BT)
    assert [layer.map.kept for layer in layers] == survivors
    one_shot = [highest(layer.reap_scores(), n_kept) for layer in _statistics(source, text_BT)]
    assert one_shot[0] == survivors[0]
    assert one_shot[1:] != survivors[1:], "the two modes are not the same thing"


def test_sequential_mode_looks_through_dropped_blocks_and_sub_layers(
    source: Checkpoint, tokens_BT: torch.Tensor, compress: Callable[..., list[CompressedLayer]]
) -> None:
    """Layer 0 loses its experts, layer 1 is gone: layer 2 is judged by what is left in front of it."""
    text_BT = tokens_BT[:1, :96]
    targets = [LayerTarget(0, NO_MOE), LayerTarget(2, MoeSize(6, _WIDTH), (Prune("reap", 6),))]
    layers = compress(targets, sequential=True, tokens=text_BT)
    stock = _stock(source)
    inputs: list[torch.Tensor] = []
    stock.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: output * 0)
    stock.model.layers[2].mlp.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    mlp = stock.model.layers[2].mlp
    stock.model.layers = nn.ModuleList([stock.model.layers[0], stock.model.layers[2]])
    stock.config.num_hidden_layers = 2
    with torch.no_grad():
        stock(text_BT, use_cache=False)
    scores = _reap(mlp, inputs[0].flatten(0, 1))
    assert layers[0].map == LayerMap(0, ())
    assert layers[1].map.kept == tuple(sorted(sorted(range(32), key=lambda expert: -scores[expert])[:6]))


def _block(source: Checkpoint, layer: int) -> MoeBlock:
    def stacked(role: Role) -> torch.Tensor:
        return torch.stack([source.expert(role, layer, expert) for expert in range(32)])

    gate_up_EFD = torch.cat([stacked(Role.EXPERT_GATE), stacked(Role.EXPERT_UP)], dim=1)
    router_ED = source.tensor(Role.ROUTER, layer).float()
    return MoeBlock(router_ED, gate_up_EFD, stacked(Role.EXPERT_DOWN), 4, Routing())


@torch.no_grad()
def _moe_inputs(source: Checkpoint, layer: int, text_BT: torch.Tensor) -> torch.Tensor:
    stock, inputs = _stock(source), []
    stock.model.layers[layer].mlp.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    stock(text_BT, use_cache=False)
    return inputs[0].flatten(0, 1)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_chain_of_methods_gives_what_they_give_in_turn(
    source: Checkpoint,
    tokens_BT: torch.Tensor,
    statistics: list[LayerStatistics],
    compress: Callable[..., list[CompressedLayer]],
    sequential: bool,
) -> None:
    """The first layer's, for which both modes see the same inputs; in sequential mode all text gives the sums."""
    chain = (REAM(8), SlimWidth(64), ActivationSvd(16))
    layers = compress(_all_layers(8, 64, *chain), sequential=sequential)
    inputs_TD = _moe_inputs(source, 0, tokens_BT[:4])
    merged = chain[0](_block(source, 0), Evidence(statistics[0], inputs_TD))
    assert layers[0].map == LayerMap(0, merged.groups, 64)
    slim = chain[1](merged.block, Evidence(statistics[0], inputs_TD))
    edited = chain[2](slim.block, Evidence(statistics[0], inputs_TD))
    student = _student(source, layers)
    for expert in range(8):
        for role, values in (
            (Role.EXPERT_GATE, edited.block.gate(expert)),
            (Role.EXPERT_UP, edited.block.up(expert)),
            (Role.EXPERT_DOWN, edited.block.down(expert)),
        ):
            written = student.expert(role, 0, expert)
            assert written.dtype == source.dtype
            # stored in 8 bits of precision; what is behind a least-squares solution moves with the inputs' last bits
            assert (written.float() - values).norm() < 0.02 * values.norm()
    assert torch.isfinite(_logits(student, tokens_BT[:1])).all()


def test_what_comes_out_loads_as_a_student(
    source: Checkpoint, tokens_BT: torch.Tensor, compress: Callable[..., list[CompressedLayer]], tmp_path: Path
) -> None:
    """Block 1 is gone, so layer 2's overlay has the student's number 1; experts are numbered by the student too."""
    targets = [
        LayerTarget(0, MoeSize(6, 64), (Prune("reap", 6), SlimWidth(64))),
        LayerTarget(2, MoeSize(9, 32), (REAM(9), SlimWidth(32))),
    ]
    layers = compress(targets)
    student = _student(source, layers)
    (tmp_path / "map.json").write_text(json.dumps(student.experts.to_json()))
    for number, layer in enumerate(layers):
        save_file(layer.overlay, tmp_path / f"{number}.safetensors")
    loaded = Student.load(source, tmp_path / "map.json", [tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert loaded.experts == student.experts
    assert [layer.source for layer in loaded.experts.layers] == [0, 2]
    assert [(size.n_experts, size.expert_width) for size in loaded.spec.layers] == [(6, 64), (9, 32)]
    # gate and up of each: rows of the expert that it comes from
    for number, expert in enumerate(layers[0].map.kept):
        rows = {tuple(row) for row in source.expert(Role.EXPERT_GATE, 0, expert).tolist()}
        assert all(tuple(row) in rows for row in loaded.expert(Role.EXPERT_GATE, 0, number).tolist())
    assert {name for name in loaded.overlay if ".layers.1." in name} == {
        f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"
        for expert in range(9)
        for name in ("gate", "up", "down")
    }
    assert torch.equal(_logits(loaded, tokens_BT[:2]), _logits(student, tokens_BT[:2]))


def test_experts_that_did_not_change_are_not_written(
    source: Checkpoint, compress: Callable[..., list[CompressedLayer]]
) -> None:
    """REAM leaves most centroids alone; M-SMoE's routers are new, REAM's are not."""
    layers = compress(_all_layers(24, _WIDTH, REAM(24)))
    for index, layer in enumerate(layers):
        merged = {number for number, group in enumerate(layer.map.groups) if len(group) > 1}
        assert 0 < len(merged) < 8
        assert {name.split(".")[5] for name in layer.overlay} == {str(number) for number in merged}
        assert all(name.startswith(f"model.layers.{index}.mlp.experts.") for name in layer.overlay)


def test_what_one_method_changed_is_written_though_the_next_leaves_it_alone(
    source: Checkpoint, compress: Callable[..., list[CompressedLayer]]
) -> None:
    """Merged experts that survive pruning keep their members and their weights, under their new numbers."""
    merged = compress(_all_layers(24, _WIDTH, REAM(24)))
    pruned = compress(_all_layers(20, _WIDTH, REAM(24), Prune("frequency", 20)))
    for index, (before, after) in enumerate(zip(merged, pruned, strict=True)):
        survivors = [before.map.groups.index(group) for group in after.map.groups]
        assert len(survivors) == 20
        changed = {new for new, old in enumerate(survivors) if len(before.map.groups[old]) > 1}
        assert changed
        expert = f"model.layers.{index}.mlp.experts."
        assert {int(name.removeprefix(expert).split(".")[0]) for name in after.overlay} == changed
        for new in changed:
            old = f"{expert}{survivors[new]}.down_proj.weight"
            assert torch.equal(after.overlay[f"{expert}{new}.down_proj.weight"], before.overlay[old])


def test_a_float32_source_s_overlay_can_be_written(
    tmp_path: Path, toy_checkpoint: Callable[..., Path], tokens_BT: torch.Tensor, statistics: list[LayerStatistics]
) -> None:
    """Where nothing is converted, gate and up are views of one tensor."""
    folder = toy_checkpoint(tmp_path, n_layers=1)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors")
    targets = [LayerTarget(0, MoeSize(8, 64), (REAM(8), SlimWidth(64)))]
    compression = LayerwiseCompression(Checkpoint(folder), targets, statistics, tokens_BT[:2], n_sample_blocks=2)
    (layer,) = compression.run()
    save_file(layer.overlay, tmp_path / "overlay.safetensors")
    written = load_file(tmp_path / "overlay.safetensors")
    n_merged = sum(len(group) > 1 for group in layer.map.groups)  # the others have the numbers of their neurons
    assert len([name for name in written if name.endswith("_proj.weight")]) == n_merged * 3 > 0
    assert all(torch.equal(written[name], tensor) for name, tensor in layer.overlay.items())


def test_changed_routers_are_float32(compress: Callable[..., list[CompressedLayer]]) -> None:
    for index, layer in enumerate(compress(_all_layers(8, _WIDTH, MSMoE(8)))):
        router = layer.overlay[f"model.layers.{index}.mlp.gate.weight"]
        assert (router.dtype, tuple(router.shape)) == (torch.float32, (8, 256))


def test_memory_changes_no_bit(
    source: Checkpoint, compress: Callable[..., list[CompressedLayer]], tmp_path: Path
) -> None:
    targets = _all_layers(8, 64, REAM(8), SlimWidth(64))
    plenty = compress(targets, sequential=True)
    scarce = compress(targets, sequential=True, limit=MemoryLimit(1, tmp_path / "spill"))
    assert [layer.map for layer in plenty] == [layer.map for layer in scarce]
    for one, other in zip(plenty, scarce, strict=True):
        assert all(torch.equal(one.overlay[name], other.overlay[name]) for name in one.overlay)


def test_a_method_that_cannot_do_it_says_so(compress: Callable[..., list[CompressedLayer]]) -> None:
    with pytest.raises(InputError, match="REAM needs at least 2"):
        compress(_all_layers(1, _WIDTH, REAM(1)))


@pytest.mark.parametrize("sequential", [False, True])
def test_damaged_weights_are_named(
    tmp_path: Path,
    toy_checkpoint: Callable[..., Path],
    statistics: list[LayerStatistics],
    tokens_BT: torch.Tensor,
    sequential: bool,
) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=_N_LAYERS)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    compression = LayerwiseCompression(
        Checkpoint(folder),
        _all_layers(32, 64, SlimWidth(64)),
        statistics,
        tokens_BT[:1],
        n_sample_blocks=1,
        sequential=sequential,
    )
    with pytest.raises(InputError, match=name):
        list(compression.run())
