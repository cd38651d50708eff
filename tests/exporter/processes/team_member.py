"""The program of each process of test_team.py: statistics of a pass, and the gradients of a step of Router KD."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from compressors.calibration.statistics import StatisticsCollector, save_statistics
from compressors.calibration.teacher import TeacherTargets, write_targets
from compressors.model.parallel import is_first, share
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training


def _main(model: Path, folder: Path) -> None:
    distributed.init_process_group("gloo")
    source = open_source(model)
    tokens_BT = torch.randint(0, 4096, (5, 64), generator=torch.Generator().manual_seed(1))
    mine = share(len(tokens_BT))
    teacher = StreamedModel(Student.teacher(source))
    collector = StatisticsCollector(source.spec)
    (hidden,) = teacher.stream([TokenGroup(tokens_BT[mine], [collector.observe])])
    statistics = [collector.take(layer) for layer in range(source.spec.n_layers)]
    if is_first():
        for layer, found in enumerate(statistics):
            save_statistics(found, folder, layer)
        TeacherTargets.create(folder / "targets", tokens_BT.numel(), source.spec.vocab_size)
    distributed.barrier()
    targets = TeacherTargets(folder / "targets", writable=True)
    write_targets(teacher, hidden, targets, mine)
    distributed.barrier()
    student = Student(source, ExpertMap.keeping(32, (tuple(range(16)),) * source.spec.n_layers))
    training = Training(student, tokens_BT, Distillation(targets, student), Schedule(5, 1e-3, blocks_per_step=5))
    training.step()
    if is_first():
        moments = [training.state()[f"{layer}.router.exp_avg"] for layer in range(source.spec.n_layers)]
        save_file({str(layer): moment for layer, moment in enumerate(moments)}, folder / "gradients.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
