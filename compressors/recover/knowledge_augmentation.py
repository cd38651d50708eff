"""Knowledge Augmentation (KA): the teacher answers with all experts but one, which may differ each time.

"Every Expert Matters" (arXiv 2502.12947): a token uses these N - 1 of N experts,

    E = { N - 1 experts sampled from the gate's probabilities   with probability lambda
        { the top N - 1                                          with probability 1 - lambda

drawn for each token and layer; their gates are the softmax over the kept logits. For each text y that the student
writes there are M updates, each on D_KL(q_student || p_KA) with a fresh E.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from compressors.model.running.expert_choice import ExpertChoice
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.recover.on_policy import OnPolicyDistillation
from compressors.recover.schedule import Schedule

__all__ = ["AUGMENTATION", "AllButOne", "KnowledgeAugmentation"]

AUGMENTATION = 0.05
"""The paper's lambda."""

_EXPERTS = 1  # keys of random numbers begin with their purpose


class KnowledgeAugmentation(OnPolicyDistillation):
    """KA as an objective.

    Args:
        student: the model that is trained; the teacher is its source.
        schedule: the training's schedule; the paper's has :data:`~compressors.recover.schedule.UPDATES_PER_BATCH`.
        batches_per_round: the number of batches of texts that are written together; one as published.
        augmentation: lambda, the probability of a sampled choice.
        limit: memory that this process may use.
        dtype: the dtype of the arithmetic.
        device: the device on which layers compute.

    Raises:
        UnsupportedError: the student's final norm or head is not the teacher's.
    """

    def __init__(
        self,
        student: Student,
        schedule: Schedule,
        *,
        batches_per_round: int = 1,
        augmentation: float = AUGMENTATION,
        limit: MemoryLimit | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        teacher = StreamedModel(Student.teacher(student.source), limit=limit, device=device)
        super().__init__(student, teacher, schedule, batches_per_round=batches_per_round, dtype=dtype)
        self._augmentation = augmentation

    def _prepare(self, model: StreamedModel) -> None:
        """Does nothing: the teacher stays as it is."""

    def _choice(self, texts: Sequence[tuple[int, int]], n_tokens: int) -> ExpertChoice:
        keys = [(_EXPERTS, self._schedule.seed, *text) for text in texts]
        return AllButOne(self._teacher.spec.n_experts, n_tokens, keys, self._augmentation)


class AllButOne:
    """All experts but one: the least probable, or sometimes the one that sampling leaves over.

    Sampling N - 1 without replacement in proportion to the gates is taking the N - 1 largest of the logits plus Gumbel
    noise (Kool, van Hoof and Welling, arXiv 1903.06059), so it leaves out the smallest; of equals the
    first.

    Args:
        n_experts: N.
        n_tokens: the number of tokens of each text.
        keys: the key of each text of a pass, in order; with the layer, only they decide the noise.
        augmentation: the probability, for each token and layer, that the noise is added.
    """

    def __init__(self, n_experts: int, n_tokens: int, keys: Sequence[tuple[int, ...]], augmentation: float) -> None:
        self.n_chosen = n_experts - 1
        self._n_tokens = n_tokens
        self._keys = keys
        self._augmentation = augmentation

    def __call__(self, layer: int, tokens: slice, logits_TE: torch.Tensor) -> torch.Tensor:
        """All but one, in order; the tokens are those of whole texts."""
        texts = self._keys[tokens.start // self._n_tokens : tokens.stop // self._n_tokens]
        noise_TE = np.concatenate([self._noise((*key, layer)) for key in texts])
        left_out_T1 = (logits_TE + torch.from_numpy(noise_TE).to(logits_TE)).argmin(-1, keepdim=True)
        others_K = torch.arange(self.n_chosen, device=logits_TE.device)
        return others_K + (others_K >= left_out_T1)

    def _noise(self, key: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """Gumbel noise for the tokens of one text that are augmented, zero for the others: [tokens, E]."""
        generator = np.random.default_rng(key)
        augmented_T = generator.random(self._n_tokens) < self._augmentation
        noise_TE = np.zeros((self._n_tokens, self.n_chosen + 1))
        noise_TE[augmented_T] = generator.gumbel(size=(int(augmented_T.sum()), self.n_chosen + 1))
        return noise_TE
