"""Descriptions of transformers' MoE families: routing, the experts' function, and the places of the modules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from compressors.model.description.feed_forward import Routed
from compressors.model.description.glu import SWIGLU, Activation, Glu
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.families.shared.parts import routed_in_mlp

__all__ = ["CASES", "OTHERS", "MoeCase", "layers_with_experts"]


@dataclass(frozen=True)
class MoeCase:
    """A family, as its file describes its routing, and settings of its tiny model.

    ``modules`` are those of :class:`Routed` that are not where most families have them.
    """

    model_type: str
    routing: Routing
    settings: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    glu: Glu = SWIGLU
    n_layers: int = 2  # with experts
    is_interleaved: bool = False  # the rows of gate and up

    def routed(self) -> Routed:
        """The description of the feed-forward."""
        modules = {"router_module": "mlp.gate", **self.modules}
        return routed_in_mlp(n_experts=8, top_k=3, width=16, routing=self.routing, glu=self.glu, **modules)


_RAW = Routing(normalizes=False)
_OF_CHOSEN = Routing(Score.LOGITS)
_SIGMOID = Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-20)
_IN_GATE = {"selection_bias": "mlp.gate.e_score_correction_bias"}
_GROUPED = {"n_group": 4, "topk_group": 2}
_GROUPED_RULE = replace(_SIGMOID, n_groups=4, n_chosen_groups=2, group_score=GroupScore.BEST_TWO)
_GRANITE = {"router_module": "block_sparse_moe.router", "experts_module": "block_sparse_moe.experts"}
_LFM2 = {"router_module": "feed_forward.gate", "experts_module": "feed_forward.experts"}
_JAMBA = {"router_module": "feed_forward.router", "experts_module": "feed_forward.experts"}
_NEMOTRON = {
    "router_module": "mixer.gate",
    "experts_module": "mixer.experts",
    "selection_bias": "mixer.gate.e_score_correction_bias",
}
_AFMOE = {"router_module": "mlp.router.gate", "selection_bias": "mlp.expert_bias"}
_GEMMA4 = {
    "router_module": "router.proj",
    "experts_module": "experts",
    "expert_scale": "router.per_expert_scale",
}
_CLAMPED = Glu(alpha=1.702, limit=0.5, offset=1.0)
_SCALED = {"routed_scaling_factor": 2.5}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
_WHOLE = {"full_attention": _ROPE, "sliding_attention": _ROPE}


def _scaled(routing: Routing, scale: float = 2.5) -> Routing:
    return replace(routing, scale=scale)


CASES = (
    MoeCase("qwen2_moe", _RAW, {"norm_topk_prob": False}),
    MoeCase("qwen2_moe", Routing(), {"norm_topk_prob": True}),
    MoeCase("qwen3_moe", Routing(), {"norm_topk_prob": True}),
    MoeCase("qwen3_next", Routing(), {"norm_topk_prob": True}),
    MoeCase("qwen3_next", _RAW, {"norm_topk_prob": False}),
    MoeCase("qwen3_5_moe_text", Routing()),
    MoeCase("olmoe", _RAW),
    MoeCase("olmoe", Routing(), {"norm_topk_prob": True}),
    MoeCase("flex_olmo", _RAW),
    MoeCase("mellum", Routing(), {"norm_topk_prob": True}),
    MoeCase("mixtral", Routing()),
    MoeCase("minimax", Routing()),
    MoeCase(
        "gpt_oss", _OF_CHOSEN, {"swiglu_limit": 0.5}, {"router_module": "mlp.router"}, _CLAMPED, is_interleaved=True
    ),
    MoeCase("granitemoe", _OF_CHOSEN, modules=_GRANITE),
    MoeCase("granitemoeshared", _OF_CHOSEN, modules=_GRANITE),
    MoeCase("granitemoehybrid", _OF_CHOSEN, {"layer_types": ["mamba", "attention"]}, _GRANITE),
    MoeCase("granitemoe_swa", _OF_CHOSEN, modules=_GRANITE),
    MoeCase("glm4_moe", _scaled(_SIGMOID), _SCALED, _IN_GATE),
    MoeCase("glm4_moe", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    MoeCase("glm4_moe", Routing(Score.SIGMOID, True, normalizes=False), {"norm_topk_prob": False}, _IN_GATE),
    MoeCase("glm4_moe_lite", _scaled(_SIGMOID), _SCALED, _IN_GATE, n_layers=1),
    MoeCase("glm_moe_dsa", _scaled(_SIGMOID), _SCALED, _IN_GATE),
    MoeCase("deepseek_v2", _RAW, {"topk_method": "greedy", "norm_topk_prob": True}),
    MoeCase(
        "deepseek_v2",
        Routing(n_groups=4, n_chosen_groups=2, group_score=GroupScore.BEST, normalizes=False, scale=2.5),
        _SCALED | _GROUPED | {"topk_method": "group_limited_greedy"},
    ),
    MoeCase("deepseek_v3", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    MoeCase("deepseek_v3", _scaled(_SIGMOID), _SCALED | {"n_group": 1, "topk_group": 1}, _IN_GATE),
    MoeCase("deepseek_v32", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    MoeCase("dots1", _scaled(_GROUPED_RULE), _SCALED | _GROUPED | {"norm_topk_prob": True}, _IN_GATE),
    MoeCase("exaone_moe", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    MoeCase("solar_open", _scaled(_SIGMOID), _SCALED, _IN_GATE),
    MoeCase(
        "nemotron_h", _scaled(_SIGMOID), _SCALED, _NEMOTRON, Glu(Activation.RELU_SQUARED, is_gated=False), n_layers=1
    ),
    MoeCase(
        "lfm2_moe",
        Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-6, scale=2.5),
        _SCALED | {"layer_types": ["conv", "full_attention"], "use_expert_bias": True},
        _LFM2 | {"selection_bias": "feed_forward.expert_bias"},
    ),
    MoeCase(
        "lfm2_moe",
        Routing(Score.SIGMOID, normalizes=False),
        {"layer_types": ["conv", "full_attention"], "use_expert_bias": False, "norm_topk_prob": False},
        _LFM2,
    ),
    MoeCase("minimax_m2", Routing(Score.SIGMOID, True), modules={"selection_bias": "mlp.e_score_correction_bias"}),
    MoeCase("afmoe", _scaled(_SIGMOID), {"route_scale": 2.5}, _AFMOE),
    MoeCase(
        "ernie4_5_moe",
        Routing(has_selection_bias=True, least_sum=0.6),
        {"moe_norm_min": 0.6, "moe_layer_start_index": 0},
        {"selection_bias": "mlp.gate.moe_statics.e_score_correction_bias"},
    ),
    MoeCase("hunyuan_v1_moe", Routing(), modules={"router_module": "mlp.gate.wg"}),
    MoeCase("jamba", _RAW, modules=_JAMBA, n_layers=1),
    MoeCase(
        "gemma4_text", Routing(has_expert_scale=True), {"enable_moe_block": True}, _GEMMA4, Glu(Activation.GELU_TANH)
    ),
    MoeCase(
        "hy_v3",
        _scaled(_SIGMOID),
        {"router_scaling_factor": 2.5},
        {"selection_bias": "mlp.e_score_correction_bias"},
        n_layers=1,
    ),
    MoeCase(
        "hy_v4",
        _scaled(_SIGMOID),
        _SCALED | {"n_group": 1, "topk_group": 1, "swiglu_limit": 0.5},
        _IN_GATE,
        Glu(limit=0.5),
        n_layers=1,
    ),
    MoeCase("kimi_linear", _scaled(_SIGMOID), _SCALED | {"num_experts_per_token": 3}, _IN_GATE, n_layers=1),
    MoeCase("bailing_hybrid", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    MoeCase("axk1", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE, n_layers=1),
    MoeCase("axk2", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE, n_layers=1),
    MoeCase("dots3_note_text", _scaled(_SIGMOID), _SCALED | {"n_group": 1, "topk_group": 1}, _IN_GATE, n_layers=1),
    MoeCase(
        "mimo_v2_flash",
        _scaled(_GROUPED_RULE),
        _SCALED | _GROUPED | {"num_attention_heads": 8, "rope_parameters": _WHOLE},
        _IN_GATE,
        n_layers=1,
    ),
    MoeCase("minimax_m3_vl_text", Routing(Score.SIGMOID, True), {"swiglu_limit": 0.5}, _IN_GATE, _CLAMPED),
    MoeCase(
        "mistral_large4_text",
        _scaled(replace(_GROUPED_RULE, score=Score.SOFTMAX, has_selection_bias=False)),
        _SCALED | _GROUPED,
    ),
    MoeCase("cohere2_moe", Routing(Score.SIGMOID), {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    MoeCase("cohere2_moe", _OF_CHOSEN, {"expert_selection_fn": "softmax"}),
    MoeCase("flint", Routing(Score.SIGMOID), {"mlp_only_layers": []}),
    MoeCase("beam", _GROUPED_RULE, _GROUPED | {"mlp_layer_types": ["sparse", "sparse"]}, _IN_GATE),
    MoeCase("qwen3_vl_moe_text", Routing()),
    MoeCase("qwen4_exp_text", Routing(), {"norm_topk_prob": True}),
    MoeCase("aria_text", _OF_CHOSEN, modules={"router_module": "mlp.router"}),
    MoeCase(
        "openai_privacy_filter",
        _scaled(_OF_CHOSEN, 1 / 3),
        {"swiglu_limit": 0.5},
        {"router_module": "mlp.router"},
        _CLAMPED,
    ),
)

OTHERS = {
    "phimoe": "sparsemixer: each weight is a softmax over the experts close to the largest, of those not chosen before",
    "kolibri1": "the selection bias is added to logits, while a sigmoid of these without it gives the weights",
    "laguna": "a soft cap on logits",
    "muse_spark": "a factor of logits",
    "deepseek_v4": "scores are the square root of a softplus; some layers choose by token number",
    "inkling": "shared experts are routed with the others, and share their normalisation",
    "inkling2": "scores are the square root of a softplus",
    "zaya": "the router is a network, with a state of its own; one expert is a skip",
    "dbrx": "weights are divided by a norm, not by their sum",
    "longcat_flash": "some of the experts that are chosen do nothing",
    "llama4": "all experts are called with inputs that were multiplied by their weights",
    "jetmoe": "attention has experts, too, and experts are called otherwise",
    "nllb_moe": "experts have a capacity",
    "switch_transformers": "experts have a capacity",
    "deepseek_ocr2": "deepseek_v2's router in a model of images",
    "unlimited_ocr": "deepseek_v2's router in a model of images",
    "diffusion_gemma": "gemma4's router in a model of images",
    "ernie4_5_vl_moe": "ernie4_5_moe's router in a model of images, once for text and once for images",
    "glm4v_moe": "glm4_moe's router in a model of images",
    "glm5_next": "glm4_moe's router in a model of images",
    "mistral4": "mistral_large4's router in a model of images",
    "qwen3_omni_moe": "qwen3_moe's router in a model of speech",
    "step3p7": "minimax_m3_vl's router in a model of images",
}
"""Families whose rule is another, or whose router is tested with another family, by transformers' package."""


def layers_with_experts(model: nn.Module, routed: Routed) -> list[nn.Module]:
    """The decoder layers of a model that have experts."""
    end = f".{routed.experts_module}"
    names = [name.removesuffix(end) for name, _ in model.named_modules() if name.endswith(end)]
    return [model.get_submodule(name) for name in names]
