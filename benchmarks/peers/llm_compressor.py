"""Checks that llm-compressor's REAP modifier keeps the experts that our sequential pruning keeps.

Both sides see the same token blocks, in float32, and choose layer by layer: a layer's saliencies are measured on
hidden states that went through the pruned layers before it. llm-compressor does not work with the project's
transformers, so it gets a virtual environment of its own. As a control the one-shot choice, whose saliencies are
measured on the unpruned model, is compared with the peer too: where it differs, the check tells the modes apart.
The peer gets a causal mask with its tokens; its result without one is shown beside it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.peers.environment import REPOSITORY, environment
from compressors.calibration.splits import read_splits, tokenize
from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.description.spec import MoeSize
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs
from compressors.shrink.prune import Prune, highest

__all__ = ["compare"]

_PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1")
_FINE, _COARSE = REPOSITORY / "exporter/demo/model", REPOSITORY / "tests/fixtures/coarse"
_CASES = (("fine", _FINE, 0.5), ("fine", _FINE, 0.25), ("coarse", _COARSE, 0.5))
_TEXT = REPOSITORY / "exporter/demo/text"
_BLOCKS = 16
_TIE = 1e-5
"""Experts whose scores are closer than this, relatively, may fall either way: float32 rounds on both sides."""


@dataclass(frozen=True)
class _Choice:
    """The choice of one side in one layer."""

    kept: tuple[int, ...]  # ascending
    scores_E: torch.Tensor  # float64
    counts_E: torch.Tensor  # float64: tokens that chose each expert

    @property
    def cut(self) -> tuple[int, int]:
        """The kept expert of lowest score, and the dropped one of highest."""
        scores = self.scores_E.tolist()
        dropped = set(range(len(scores))) - set(self.kept)
        return min(self.kept, key=scores.__getitem__), max(dropped, key=scores.__getitem__)

    @property
    def margin(self) -> float:
        """How far the two scores at the cut are apart, relatively."""
        lowest, highest_dropped = self.scores_E[list(self.cut)].tolist()
        return float((lowest - highest_dropped) / lowest)

    def score_difference(self, other: _Choice) -> float:
        """The largest relative difference of an expert's score."""
        return float(((other.scores_E - self.scores_E).abs() / self.scores_E.clamp_min(1e-30)).max())

    def n_others(self, other: _Choice) -> int:
        """Survivors of the other choice that are not this one's."""
        return len(set(other.kept) - set(self.kept))


@dataclass(frozen=True)
class _Layer:
    """Both sides' choices in one layer, and two controls."""

    peer: _Choice
    peer_own_mask: _Choice  # the peer left to build the attention mask
    ours: _Choice
    one_shot: _Choice

    @property
    def differing(self) -> tuple[int, ...]:
        """Experts that one side keeps and the other drops."""
        return tuple(sorted(set(self.peer.kept) ^ set(self.ours.kept)))

    @property
    def ties(self) -> tuple[int, ...]:
        """Kept experts that are hardly better than a dropped one, and dropped ones hardly worse than a kept one."""
        scores = self.ours.scores_E.tolist()
        lowest, highest_dropped = (scores[expert] for expert in self.ours.cut)
        return tuple(
            expert
            for expert, score in enumerate(scores)
            if (score - highest_dropped if expert in self.ours.kept else lowest - score) < _TIE * lowest
        )

    @property
    def agrees(self) -> bool:
        """Whether the survivors are the same, ties apart."""
        return set(self.differing) <= set(self.ties)

    @property
    def count_difference(self) -> int:
        """The largest difference of an expert's token count: near-ties in a router round either way."""
        return int((self.ours.counts_E - self.peer.counts_E).abs().max())


def compare() -> tuple[list[str], bool]:
    """Runs both sides on every case: the lines of the report, and whether the survivors are the same, ties apart."""
    python = environment("llmcompressor", _PACKAGES)
    sections: list[str] = []
    passed = True
    for name, source, sparsity in _CASES:
        tokens_BT = _tokens(source)
        versions, causal, own_mask = _peer(python, source, tokens_BT, sparsity)
        n_experts = len(causal[0].kept)
        ours = _sequential(source, tokens_BT, n_experts)
        control = _one_shot(source, tokens_BT, n_experts)
        layers = [_Layer(*sides) for sides in zip(causal, own_mask, ours, control, strict=True)]
        passed &= all(layer.agrees for layer in layers)
        sections += _section(f"{name}, {n_experts} of {len(ours[0].scores_E)} experts kept", layers)
        print(name, sparsity, "agrees" if all(layer.agrees for layer in layers) else "DIFFERENT")
    return [*_heading(versions, tokens_BT), *sections], passed


def _heading(versions: dict[str, str], tokens_BT: torch.Tensor) -> list[str]:
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    tokens = f"{tokens_BT.shape[0]} blocks of {tokens_BT.shape[1]} tokens"
    return [
        "## Survivors of REAP, chosen layer by layer",
        "",
        f"`REAPPruningModifier` of {packages};",
        f"ours with transformers {version('transformers')}. Float32 on a CPU, gates renormalised over the top-k,",
        f"{tokens} of the bundled calibration text, each a sequence of its own. On both sides a",
        "layer's saliencies are measured on hidden states that went through the pruned layers before it.",
        "",
        "- *margin*: how far the scores of the worst kept and the best dropped expert are apart, relatively",
        f"- *tied*: experts whose score is within {_TIE:g}, relatively, of the other side of that cut",
        "- *score*, *count*: the largest difference of any expert's score (relative) and token count",
        "- *one-shot*: a control; survivors that are not the peer's if all layers are measured on the unpruned model",
        "- *own mask*: survivors of the peer that change, and the largest change of a score, when its samples carry an",
        "  attention mask of ones, as tokenizers make it, in place of a causal mask. There should be none;",
        "  llmcompressor 0.14.0.1 then calibrates with no mask at all, every token seeing its whole block",
        "  (`benchmarks/peers/llm_compressor_survivors.py` says why)",
        "",
    ]


def _tokens(source: Path) -> torch.Tensor:
    splits = read_splits(_TEXT / "calibration", _TEXT / "heldout")
    calibration, _, _ = tokenize(splits, source)
    return calibration.spread(_BLOCKS).tokens_BT


def _peer(
    python: Path, source: Path, tokens_BT: torch.Tensor, sparsity: float
) -> tuple[dict[str, str], list[_Choice], list[_Choice]]:
    """The peer's versions, and its choices with a causal mask and with the mask that it builds."""
    script = REPOSITORY / "benchmarks/peers/llm_compressor_survivors.py"
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder) / "tokens.safetensors", Path(folder) / "choice.json"
        save_file({"tokens": tokens_BT}, tokens)
        subprocess.run([python, script, source, tokens, str(sparsity), out], check=True, cwd=folder)
        result = json.loads(out.read_text(encoding="utf-8"))
    causal, own_mask = (
        [
            _Choice(
                tuple(layer["kept"]),
                torch.tensor(layer["scores"], dtype=torch.float64),
                torch.tensor(layer["counts"], dtype=torch.float64),
            )
            for layer in result[name]
        ]
        for name in ("causal", "own_mask")
    )
    return result["versions"], causal, own_mask


def _sequential(source: Path, tokens_BT: torch.Tensor, n_experts: int) -> list[_Choice]:
    """Our choice for every layer, each measured behind the pruned layers before it."""
    checkpoint = Checkpoint(source)
    size = MoeSize(n_experts, checkpoint.spec.expert_width)
    choices: list[_Choice] = []
    targets = [LayerTarget(index, size, (_Recorded(n_experts, choices),)) for index in range(checkpoint.spec.n_layers)]
    compression = LayerwiseCompression(checkpoint, targets, (), tokens_BT, n_sample_blocks=1, sequential=True)
    kept = [layer.map.kept for layer in compression.run()]
    assert kept == [choice.kept for choice in choices]
    return choices


@dataclass(frozen=True)
class _Recorded:
    """Pruning by REAP; what it measured is noted."""

    n_experts: int
    choices: list[_Choice]
    needs: Needs = Needs.STATISTICS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        self.choices.append(_choice(evidence.statistics, self.n_experts))
        return Prune("reap", self.n_experts)(block, evidence)


def _choice(statistics: LayerStatistics, n_experts: int) -> _Choice:
    scores_E = statistics.reap_scores()
    return _Choice(highest(scores_E, n_experts), scores_E, statistics.count_E)


def _one_shot(source: Path, tokens_BT: torch.Tensor, n_experts: int) -> list[_Choice]:
    """The choice for every layer when all are measured on the unpruned model."""
    checkpoint = Checkpoint(source)
    collector = StatisticsCollector(checkpoint.spec)
    StreamedModel(Student.teacher(checkpoint)).stream([TokenGroup(tokens_BT, [collector.observe])])
    return [_choice(collector.take(index), n_experts) for index in range(checkpoint.spec.n_layers)]


def _section(title: str, layers: list[_Layer]) -> list[str]:
    return [
        f"### {title}",
        "",
        "| layer | survivors | margin ours / peer | tied | score | count | one-shot | own mask |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {index} | {_verdict(layer)} | {layer.ours.margin:.2e} / {layer.peer.margin:.2e} "
            f"| {_listed(layer.ties)} | {layer.peer.score_difference(layer.ours):.1e} | {layer.count_difference} "
            f"| {layer.peer.n_others(layer.one_shot)} "
            f"| {layer.peer.n_others(layer.peer_own_mask)} ({layer.peer.score_difference(layer.peer_own_mask):.1e}) |"
            for index, layer in enumerate(layers)
        ),
        "",
    ]


def _verdict(layer: _Layer) -> str:
    if not layer.differing:
        return f"same {len(layer.ours.kept)}"
    return f"{'tied' if layer.agrees else 'DIFFERENT'}: {_listed(layer.differing)}"


def _listed(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts)) or "none"
