"""The teacher's one pass over all texts. The results of a finished layer are on disk at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from compressors.calibration.layer_inputs import LayerInputs
from compressors.calibration.sizes import n_kept_blocks
from compressors.calibration.statistics import StatisticsCollector, save_statistics
from compressors.calibration.teacher import TeacherTargets, write_predictions, write_targets
from compressors.model.description.spec import ModelSpec
from compressors.model.files.array_file import ArrayFile
from compressors.model.parallel import is_first, reduce_sum, share, wait_for_all
from compressors.model.predictions.head_inputs import HeadInputs
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.mtp import advance_with_mtp
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.file_names import (
    HELDOUT_PREDICTIONS,
    LAYER_INPUTS,
    ROUTING,
    SELECTION_PREDICTIONS,
    STATISTICS,
    TARGETS,
    StageFile,
)
from exporter.stages.inputs import Blocks
from exporter.work.snapshot import Snapshot
from validate.runtimes.backend import scored_positions

__all__ = ["TeacherPass"]


class TeacherPass:
    """Runs this process's share of the token blocks through the teacher.

    Args:
        checkpoint: the teacher.
        blocks: token blocks of all three splits.
        place: gives the path for a result.
        dtype: dtype of the arithmetic on calibration text; the other texts are computed in float32, the reference.
        limit: memory that this process may use; its folder is this pass's alone.
        device: the device that layers compute on.
        layer_inputs: keep the inputs of layers, for error feedback.
        targets: keep the most probable next tokens of calibration text, for training.

    Raises:
        InputError: the checkpoint cannot be read, or holds or gives values that are not finite.
    """

    def __init__(
        self,
        checkpoint: Source,
        blocks: Blocks,
        place: Callable[[StageFile], Path],
        dtype: torch.dtype,
        limit: MemoryLimit,
        device: torch.device,
        *,
        layer_inputs: bool,
        targets: bool,
    ) -> None:
        self._keeps_layer_inputs = layer_inputs
        self._keeps_targets = targets
        self._spill = limit.spill
        self._blocks = blocks
        self._place = place
        self._model = StreamedModel(Student.teacher(checkpoint), limit=limit, check_finite=True, device=device)
        self._statistics = StatisticsCollector(checkpoint.spec, device)
        self._recorder = RoutingRecorder(checkpoint.spec)
        self._shares = {name: share(len(tokens_BT)) for name, tokens_BT in vars(blocks).items()}
        self._groups = [
            TokenGroup(blocks.calibration[self._shares["calibration"]], [self._statistics.observe], dtype),
            TokenGroup(blocks.selection[self._shares["selection"]]),
            TokenGroup(blocks.heldout[self._shares["heldout"]], [self._recorder.observe]),
        ]
        self._hidden: list[HiddenStates] = []

    def run_layers(self, snapshot: Snapshot) -> Iterator[int]:
        """Runs the layers that are not done yet; yields the numbers of layers that became done."""
        n_layers, n_blocks = self._model.spec.n_layers, len(self._model.spec.blocks)
        self._remove_spilled()  # of an attempt that was killed
        self._hidden = self._model.first_states(self._groups, named=True)
        n_done = self._resumed(snapshot)
        yield n_done
        routing = _RoutingFiles(self._place(ROUTING).parent, self._blocks.heldout, self._model.spec, resumed=n_done > 0)
        inputs = self._layer_inputs(resumed=n_done > 0)
        for layer in advance_with_mtp(self._model, self._groups, self._hidden, range(n_done, n_blocks)):
            statistics = self._statistics.take(layer)
            if is_first():
                save_statistics(statistics, self._place(STATISTICS), layer)
            if layer == n_layers:  # the one for MTP
                yield 1
                continue
            routing.write(layer, self._shares["heldout"], self._recorder.take(layer))
            if inputs is not None and layer + 1 < n_layers:
                inputs.keep(layer + 1, self._hidden[0], self._shares["calibration"])
            yield 1
            snapshot.keep(layer + 1, self._save_hidden)
        wait_for_all()
        if is_first():
            routing.collected().save(self._place(ROUTING))
            routing.remove()
            snapshot.remove()
        if inputs is not None:  # the head's, for which the snapshot has made room
            inputs.keep(n_layers, self._hidden[0], self._shares["calibration"])

    def write_predictions(self) -> torch.Tensor:
        """Writes targets and predictions from the hidden states after the last layer.

        Returns:
            The negative log-likelihood at every scored held-out position, of all processes: float32 [N].
        """
        blocks, vocab_size = self._blocks, self._model.spec.vocab_size
        targets, selection, heldout = map(self._place, (TARGETS, SELECTION_PREDICTIONS, HELDOUT_PREDICTIONS))
        scored = scored_positions(blocks.heldout.shape[1])
        n_scored = scored.stop - scored.start
        if is_first():
            if self._keeps_targets:
                TeacherTargets.create(targets, blocks.calibration.numel(), vocab_size)
            for path, tokens_BT in ((selection, blocks.selection), (heldout, blocks.heldout)):
                HeadInputs.create(path, len(tokens_BT) * n_scored, self._model.spec.hidden_size)
        wait_for_all()
        calibrated, selected, held = self._hidden
        if self._keeps_targets:
            kept = TeacherTargets(targets, writable=True)
            write_targets(self._model, calibrated, kept, self._shares["calibration"])
        self._write_split("selection", selected, selection, scored)
        likelihoods = self._write_split("heldout", held, heldout, scored)
        reduce_sum([likelihoods])
        self._remove_spilled()
        return likelihoods

    def _remove_spilled(self) -> None:
        """Removes the files of hidden states, which have names so that they can become snapshots."""
        if is_first():
            shutil.rmtree(self._spill, ignore_errors=True)
        wait_for_all()

    def _write_split(self, split: str, hidden: HiddenStates, path: Path, scored: slice) -> torch.Tensor:
        """Writes this process's share; the returned likelihoods are 0 for the others'."""
        tokens_BT, mine = vars(self._blocks)[split], self._shares[split]
        n_scored = scored.stop - scored.start
        likelihoods = torch.zeros(len(tokens_BT), n_scored)
        inputs = HeadInputs(path, writable=True)
        found = write_predictions(self._model, tokens_BT[mine], hidden, scored, inputs, mine)
        likelihoods[mine] = found.view(-1, n_scored)
        return likelihoods.flatten()

    def _layer_inputs(self, *, resumed: bool) -> LayerInputs | None:
        """Opens the files of the layers' inputs, the first layer's filled in; each process writes its own blocks."""
        if not self._keeps_layer_inputs:
            return None
        tokens_BT, spec = self._blocks.calibration, self._model.spec
        if is_first() and not resumed:
            n_blocks = n_kept_blocks(*tokens_BT.shape)
            size = (n_blocks, tokens_BT.shape[1], spec.hidden_size)
            LayerInputs.create(self._place(LAYER_INPUTS), spec.n_layers, size)
        wait_for_all()
        inputs = LayerInputs(self._place(LAYER_INPUTS))
        if not resumed:
            inputs.keep(0, self._hidden[0], self._shares["calibration"])
        return inputs

    def _resumed(self, snapshot: Snapshot) -> int:
        """Loads the hidden states of a snapshot, if there is one; returns the number of layers done by then."""
        found = snapshot.load()
        if found is None:
            return 0
        n_done, folder = found
        for states, path in zip(self._hidden, self._hidden_paths(folder), strict=True):
            states.load(path)
        return n_done

    def _save_hidden(self, folder: Path) -> None:
        for states, path in zip(self._hidden, self._hidden_paths(folder), strict=True):
            states.save(path)

    def _hidden_paths(self, folder: Path) -> list[Path]:
        return [folder / f"{name}-{mine[0] if mine else 'none'}.npy" for name, mine in self._shares.items()]


class _RoutingFiles:
    """The held-out text's routing until all layers are done: each process writes its own blocks."""

    def __init__(self, folder: Path, tokens_BT: torch.Tensor, spec: ModelSpec, *, resumed: bool) -> None:
        self._n_blocks, self._n_tokens = tokens_BT.shape
        self._n_layers = spec.n_layers
        self._paths = [folder / f"routing_{what}.npy" for what in ("experts", "weights", "margins")]
        if is_first() and not resumed:
            rows = self._n_layers * self._n_blocks, self._n_tokens
            kinds = (((*rows, spec.top_k), np.int32), ((*rows, spec.top_k), np.float32), (rows, np.float32))
            for path, (shape, dtype) in zip(self._paths, kinds, strict=True):
                ArrayFile.create(path, shape, dtype)
        wait_for_all()
        self._experts, self._weights, self._margins = (ArrayFile.open(path, writable=True) for path in self._paths)

    def write(self, layer: int, blocks: Sequence[int], routing: RoutingRecord) -> None:
        """Writes one layer's routing of these blocks."""
        for position, block in enumerate(blocks):
            of_block = routing.tokens(slice(position * self._n_tokens, (position + 1) * self._n_tokens))
            self._experts.write(layer * self._n_blocks + block, of_block.experts_LTK)
            self._weights.write(layer * self._n_blocks + block, of_block.weights_LTK)
            assert of_block.margins_LT is not None, "the recorder has them"
            self._margins.write(layer * self._n_blocks + block, of_block.margins_LT)

    def collected(self) -> RoutingRecord:
        """The routing of all layers and blocks."""
        experts, weights, margins = (
            file.read(0, len(file)).reshape(self._n_layers, self._n_blocks * self._n_tokens, -1)
            for file in (self._experts, self._weights, self._margins)
        )
        floats = (values.astype(np.float32, copy=False) for values in (weights, margins[..., 0]))
        return RoutingRecord(experts.astype(np.int32, copy=False), *floats)

    def remove(self) -> None:
        for path in self._paths:
            path.unlink()
