"""Bytes that parts of a stage put on the disk while they run, if no hidden states, keys or values fit in memory."""

from __future__ import annotations

from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.running.arithmetic import value_bytes
from exporter.estimating.estimate import SENSITIVITY_TOKENS
from exporter.estimating.needs import heldout_blocks, training_snapshot_bytes
from exporter.planning.compression import changes_experts, runs_text
from exporter.planning.plan import Plan
from exporter.planning.recovery import schedule_of
from validate.metrics.generation import NEW_TOKENS, PROMPT_TOKENS, PROMPTS

__all__ = ["compressing_bytes", "gathering_bytes", "state_bytes", "text_bytes", "training_step_bytes"]


def state_bytes(plan: Plan, bytes_of_blocks: int) -> int:
    """Hidden states of blocks, given the bytes of a value times their number."""
    return bytes_of_blocks * BLOCK_LENGTH * plan.teacher_spec.hidden_size


def gathering_bytes(plan: Plan) -> int:
    """Every layer's input while sensitivities are measured."""
    n_layers = plan.teacher_spec.n_layers
    return state_bytes(plan, 4 * SENSITIVITY_TOKENS // BLOCK_LENGTH * (n_layers + 2))


def compressing_bytes(plan: Plan) -> int:
    """Hidden states while experts are compressed, or the statistics of the new ones are summed up."""
    choice = plan.recipe.compress
    runs = runs_text(choice, plan.teacher_spec) or changes_experts(choice)
    return state_bytes(plan, 2 * plan.recipe.text.calibration_blocks * value_bytes(plan.recipe.arithmetic)) * runs


def text_bytes(plan: Plan) -> int:
    """Keys and values of all layers for the original's texts: two of each prompt, and one for people to read."""
    n_prompts = min(PROMPTS, heldout_blocks(plan))
    n_tokens = n_prompts * PROMPT_TOKENS + (2 * n_prompts + 1) * NEW_TOKENS
    return n_tokens * sum(layer.mixer.cached_values for layer in plan.teacher_spec.layers) * 4


def training_step_bytes(plan: Plan, stage: str) -> int:
    """Every layer's input in a step, and in stages that train to the end two snapshots of what is trained.

    The last step has none, so a rung of one step has no snapshot, and one of two steps a single one.
    """
    choice, spec = plan.recipe.recover, plan.student_spec
    trained = {"schedule": choice.trained, "recover": choice.rungs, "retune": choice.trained[len(choice.rungs) :]}[
        stage
    ]
    if not trained:
        return 0
    blocks = max(rung.blocks_per_step for rung in trained)
    inputs = (spec.n_layers + 1) * blocks * BLOCK_LENGTH * spec.hidden_size * 4
    n_steps = max(schedule_of(choice, rung, rung.blocks).n_steps for rung in trained)
    n_snapshots = 0 if stage == "schedule" else min(2, n_steps - 1)
    return inputs + n_snapshots * training_snapshot_bytes(plan, trained)
