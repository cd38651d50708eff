"""Runs a student with one decoder layer's weights resident at a time, forward and backward.

transformers' own modules do the arithmetic. They are built on the meta device, which holds no weights; a layer gets its
weights from the student, works on all token blocks, and lets them go. Activations and all weights but the experts'
are float32; experts stay in storage dtype and are widened one at a time (:mod:`compressors.model.experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressors.model.errors import InputError
from compressors.model.experts import GROUPED_EXPERTS, register_grouped_experts
from compressors.model.families import Role
from compressors.model.shape import MoeShape
from compressors.model.student import Student

__all__ = ["LayerObserver", "StreamedModel", "TokenGroup", "TrainableTensors", "transformers_config"]

TrainableTensors = Mapping[tuple[Role, int], torch.Tensor]
LayerObserver = Callable[[int, nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TokenGroup:
    """Token blocks that are streamed together, and who watches the layers while they run."""

    tokens_BT: torch.Tensor  # int64; every row is a sequence of its own
    observers: Sequence[LayerObserver] = ()  # each is called with (layer index, layer) and returns a context


_ROWS_AT_ONCE = 4  # token blocks in one call: their activations stay in the processor's cache
_POSITIONS_AT_ONCE = 1024  # logits are made in chunks of this many positions: with 150k tokens 0.6 GB


def transformers_config(folder: Path, shape: MoeShape) -> Any:
    """transformers' configuration of the checkpoint in ``folder``, with the student's expert count and top-k."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    setattr(config, shape.family.config_keys.n_experts, shape.n_experts)
    config.num_experts_per_tok = shape.top_k
    return config


class StreamedModel:
    """A student that runs layer by layer.

    Args:
        student: where the weights come from.
        trainable: float32 tensors that stand in for the student's (routers during recovery); gradients reach them.
        keep_layers: keep every layer's weights in memory after the first visit, when the model fits.
        check_finite: refuse NaN and infinite weights when a layer is read.

    Raises:
        InputError: with ``check_finite``, a tensor holds a value that is not finite.
    """

    def __init__(
        self,
        student: Student,
        *,
        trainable: TrainableTensors | None = None,
        keep_layers: bool = False,
        check_finite: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.student = student
        self.shape = student.shape
        self.trainable = dict(trainable or {})
        self._kept: dict[int, dict[str, torch.Tensor]] | None = {} if keep_layers else None
        self._check_finite = check_finite
        register_grouped_experts()
        config = transformers_config(student.source.folder, student.shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", experts_implementation=GROUPED_EXPERTS
            )
        self._layers: nn.ModuleList = model.model.layers.eval()
        self._rotary: nn.Module = type(model.model.rotary_emb)(config=config)
        self._final_norm: nn.Module = model.model.norm.eval()
        self._final_norm.load_state_dict({"weight": self._read(Role.FINAL_NORM)}, assign=True)
        self._embedding = self._read(Role.TOKEN_EMBEDDING, widen=False)
        self._head = self._embedding if self.shape.tied_embeddings else self._read(Role.HEAD, widen=False)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter the first layer: float32 [B, T, D]."""
        return functional.embedding(tokens_BT, self._embedding).float()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights; they are let go on leaving."""
        module = self._layers[index]
        module.load_state_dict(self._layer_weights(index), assign=True, strict=True)
        module.requires_grad_(False)
        for role, layer in self.trainable:
            if layer == index:
                owner, name = self._module_name(role).rsplit(".", 1)
                setattr(module.get_submodule(owner), name, self.trainable[role, layer])
        try:
            yield module
        finally:
            module.to_empty(device="meta")

    def run_layer(self, layer: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The layer's output for these hidden states, causal within each row: [B, T, D]."""
        positions = torch.arange(hidden_BTD.shape[1])[None]
        rotary = self._rotary(hidden_BTD, positions)
        output: torch.Tensor = layer(hidden_BTD, attention_mask=None, position_embeddings=rotary)
        return output

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Final norm and head: float32 [N, V]. Call it on a chunk of positions, not on all."""
        logits: torch.Tensor = functional.linear(self._final_norm(hidden_ND), self._head.float())
        return logits

    @torch.no_grad()
    def stream(self, groups: Sequence[TokenGroup], progress: Callable[[int], None] | None = None) -> list[torch.Tensor]:
        """Takes all token blocks of all groups through all layers; each layer is read once.

        Args:
            groups: token blocks, each group with the observers that watch it.
            progress: called with 1 for each finished layer.

        Returns:
            For each group the hidden states after the last layer, before the final norm: float32 [B, T, D].

        Raises:
            InputError: a layer's output is not finite; the message names the layer.
        """
        hidden = [self.embed(group.tokens_BT) for group in groups]
        for index in range(self.shape.n_layers):
            with self.layer(index) as layer:
                for group, states in zip(groups, hidden, strict=True):
                    self._run_group(index, layer, group.observers, states)
            if progress is not None:
                progress(1)
        return hidden

    def _run_group(
        self, index: int, layer: nn.Module, observers: Sequence[LayerObserver], hidden_BTD: torch.Tensor
    ) -> None:
        """Replaces the hidden states by the layer's output, in place."""
        with ExitStack() as stack:
            for observe in observers:
                stack.enter_context(observe(index, layer))
            for rows in hidden_BTD.split(_ROWS_AT_ONCE):
                rows.copy_(self.run_layer(layer, rows))
        if not torch.isfinite(hidden_BTD).all():
            raise InputError(f"{self.student.source.folder}: layer {index} produces values that are not finite")

    def logits_in_chunks(self, hidden_ND: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of many positions as (positions, float32 [n, V]), a bounded number at a time."""
        for start in range(0, len(hidden_ND), _POSITIONS_AT_ONCE):
            positions = slice(start, min(start + _POSITIONS_AT_ONCE, len(hidden_ND)))
            yield positions, self.logits(hidden_ND[positions])

    def gradients(
        self,
        tokens_BT: torch.Tensor,
        loss: Callable[[slice, torch.Tensor], torch.Tensor],
    ) -> tuple[float, dict[tuple[Role, int], torch.Tensor]]:
        """Loss of these blocks and its gradient with respect to every trainable tensor, layer by layer.

        The forward pass stores each layer's input; the backward pass runs the layers again in reverse and pulls the
        gradient through each (a vector-Jacobian product), so memory does not grow with the number of layers but for
        the stored inputs.

        Args:
            tokens_BT: int64 token ids.
            loss: given (positions of the flattened blocks, logits [n, V]), the summed loss of these positions.

        Returns:
            The loss summed over all positions, and gradients by (role, layer).
        """
        inputs: list[torch.Tensor] = []
        hidden = self.embed(tokens_BT)
        for index in range(self.shape.n_layers):
            inputs.append(hidden)
            with torch.no_grad(), self.layer(index) as layer:
                hidden = self._run_rows(layer, hidden)
        total, gradient = self._head_gradient(hidden, loss)
        gradients: dict[tuple[Role, int], torch.Tensor] = {}
        for index in reversed(range(self.shape.n_layers)):
            with self.layer(index) as layer:
                gradient = self._pull_back(index, layer, inputs.pop(), gradient, gradients)
        return total, gradients

    def _run_rows(self, layer: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.run_layer(layer, rows) for rows in hidden_BTD.split(_ROWS_AT_ONCE)])

    def _head_gradient(
        self, hidden_BTD: torch.Tensor, loss: Callable[[slice, torch.Tensor], torch.Tensor]
    ) -> tuple[float, torch.Tensor]:
        flat = hidden_BTD.flatten(0, 1)
        gradient = torch.empty_like(flat)
        total = 0.0
        for start in range(0, len(flat), _POSITIONS_AT_ONCE):
            positions = slice(start, min(start + _POSITIONS_AT_ONCE, len(flat)))
            part = flat[positions].detach().requires_grad_()
            value = loss(positions, self.logits(part))
            (gradient[positions],) = torch.autograd.grad(value, part)
            total += value.item()
        return total, gradient.view_as(hidden_BTD)

    def _pull_back(
        self,
        index: int,
        layer: nn.Module,
        inputs_BTD: torch.Tensor,
        gradient_BTD: torch.Tensor,
        gradients: dict[tuple[Role, int], torch.Tensor],
    ) -> torch.Tensor:
        """Adds this layer's parameter gradients to ``gradients``; returns the gradient of the layer's input."""
        keys = [key for key in self.trainable if key[1] == index]
        parameters = [self.trainable[key] for key in keys]
        pulled = []
        for rows, output_gradient in zip(
            inputs_BTD.split(_ROWS_AT_ONCE), gradient_BTD.split(_ROWS_AT_ONCE), strict=True
        ):
            rows = rows.detach().requires_grad_()
            output = self.run_layer(layer, rows)
            input_gradient, *found = torch.autograd.grad(output, [rows, *parameters], output_gradient)
            pulled.append(input_gradient)
            for key, value in zip(keys, found, strict=True):
                gradients[key] = gradients[key] + value if key in gradients else value
        return torch.cat(pulled)

    def _layer_weights(self, index: int) -> dict[str, torch.Tensor]:
        if self._kept is None:
            return self._read_layer(index)
        if index not in self._kept:
            self._kept[index] = self._read_layer(index)
        return self._kept[index]

    def _read_layer(self, index: int) -> dict[str, torch.Tensor]:
        weights = {self._module_name(role): self._read(role, index) for role in self.student.family.layer_roles}
        shape, dtype = self.shape, self.student.source.dtype
        gate_up_EFD = torch.empty(shape.n_experts, 2 * shape.expert_width, shape.hidden_size, dtype=dtype)
        down_EDF = torch.empty(shape.n_experts, shape.hidden_size, shape.expert_width, dtype=dtype)
        for expert in range(shape.n_experts):
            gate_up_EFD[expert, : shape.expert_width] = self._read_expert(Role.EXPERT_GATE, index, expert)
            gate_up_EFD[expert, shape.expert_width :] = self._read_expert(Role.EXPERT_UP, index, expert)
            down_EDF[expert] = self._read_expert(Role.EXPERT_DOWN, index, expert)
        experts = self.student.family.experts_module
        return {**weights, f"{experts}.gate_up_proj": gate_up_EFD, f"{experts}.down_proj": down_EDF}

    def _read_expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        tensor = self.student.expert(role, layer, expert)
        self._refuse_not_finite(tensor, role, layer, expert)
        return tensor

    def _read(self, role: Role, layer: int | None = None, *, widen: bool = True) -> torch.Tensor:
        tensor = self.student.tensor(role, layer)
        self._refuse_not_finite(tensor, role, layer)
        return tensor.float() if widen else tensor

    def _refuse_not_finite(
        self, tensor: torch.Tensor, role: Role, layer: int | None, expert: int | None = None
    ) -> None:
        if self._check_finite and not torch.isfinite(tensor).all():
            name = self.student.name(role, layer, expert)
            raise InputError(f"{self.student.source.folder}: tensor {name} holds NaN or infinite values")

    def _module_name(self, role: Role) -> str:
        """Where the role's tensor lives inside transformers' decoder layer."""
        family = self.student.family
        if role is Role.ROUTER:
            return f"{family.router_module}.weight"
        return family.names[role].removeprefix("model.layers.{layer}.")
