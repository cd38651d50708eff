"""Names in ONNX graphs that the writer gives, and that readers and checks look up.

The caches' names are those that onnxruntime-genai and optimum expect, in anybody's graphs. The others are in ours only.
"""

from __future__ import annotations

__all__ = [
    "BY_EXPERT",
    "CACHED",
    "CHOSEN_LOGITS",
    "CHOSEN_WEIGHTS",
    "CODES",
    "DATA_FILE",
    "EMBEDDING_FACTOR",
    "EXPERTS_INPUT",
    "EXPERTS_SUM",
    "HEAD_FACTOR",
    "IN_FLOAT32",
    "JOINED",
    "LOGITS",
    "LOGIT_CAP",
    "MATRIX",
    "MODEL_FILE",
    "NORM_SCALES",
    "NOT_CHOSEN",
    "NUM_LOGITS_TO_KEEP",
    "OWN_EXPERTS",
    "RELU_ALPHA",
    "RESIDUAL_FACTOR",
    "ROTARY_COSINE",
    "ROTARY_SINE",
    "ROUTER_FACTOR",
    "ROUTING",
    "SCALES",
    "STATES",
    "WEIGHTS_OF_ALL",
    "cache_input",
    "cache_output",
    "cached_layer",
    "continued_cache",
    "expert_matrix",
    "is_cache_input",
    "is_state",
    "rotary_table",
]

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
CODES, SCALES = ".codes", ".scales"  # appended to a quantized weight's name
MATRIX = ".matrix"  # appended to the name of codes in the shape of a linear layer's operator
_PAST, _PRESENT = "past_key_values", "present"
_MOST_DIGITS = 4  # of a layer's number
CACHED = ("key", "value")
"""The two caches of a layer that attends."""
STATES = ("conv_state", "recurrent_state")
"""The caches of a recurrent layer: the convolution's last inputs, and the state, which some mixers lack."""

NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
"""The input, with a default, that says of how many positions there are logits: each text's last ones, 0 for all."""

EMBEDDING_FACTOR, RESIDUAL_FACTOR, HEAD_FACTOR = "embedding.factor", "residual.factor", "head.factor"
"""The constants by which the model multiplies; of several values, the later ones have a number behind the name."""
LOGIT_CAP, ROUTER_FACTOR = "logits.cap", "router.factor"
"""The constants of the limit of logits, and of what a router's own norm is multiplied by."""
ROTARY_COSINE, ROTARY_SINE = "rotary.cosine", "rotary.sine"
"""The tables of all positions."""

EXPERTS_INPUT = "experts.input"
"""The end of the name of the values that experts read in a space of their own; a matrix makes them of the router's."""

CHOSEN_LOGITS, CHOSEN_WEIGHTS = "chosen.logits", "chosen.weights"
"""The largest logits of each token, and its experts' weights in that order, where nodes compute the experts."""
BY_EXPERT = ".by_expert"
"""Ends the names of products of all experts, under each other."""
WEIGHTS_OF_ALL, OWN_EXPERTS, EXPERTS_SUM = "weights.of_all", "experts.own", "experts.sum"
"""The weights of all experts, 0 for those that a token did not choose; the output of the experts with matrices of their
own, and the sum with those that stand on bases: in layers that have such experts."""
RELU_ALPHA = 1e6
"""The factor inside of a sigmoid that makes it 0 below zero and 1 above, so that x sigmoid(alpha x) is ReLU."""
ROUTING = "routing"
"""Begins, behind the layer, the names of values that route where the MoE operators cannot."""
NOT_CHOSEN = -1e4
"""The logit that such nodes give experts that a token did not choose: below all others, so that its weight is 0."""
IN_FLOAT32 = ".float32"
"""Appended to the name of scales, for their values in the type of the activations."""
NORM_SCALES = ".scales_of_norm"
"""Appended to the name of a norm's values, for the scales that are one more."""
JOINED = ".joined"
"""Ends the names of values that are put side by side on the last axis."""
LOGITS = ".logits"
"""Ends the names of products of queries and cached keys, in a step of latent attention."""


def cache_input(layer: int | str, kind: str) -> str:
    """The name of a cache as it comes in; ``%d`` as the layer gives the pattern of all."""
    return f"{_PAST}.{layer}.{kind}"


def cache_output(layer: int | str, kind: str) -> str:
    """The name of a cache as the layer leaves it; ``%d`` as the layer gives the pattern of all."""
    return f"{_PRESENT}.{layer}.{kind}"


def is_cache_input(name: str) -> bool:
    """True if an input of a graph is a cache."""
    return name.startswith(f"{_PAST}.")


def is_state(name: str) -> bool:
    """True if a cache is a state, which has one size for all texts."""
    return name.endswith(tuple(f".{kind}" for kind in STATES))


def cached_layer(name: str) -> int:
    """The layer of a cache input; -1 if its name tells none, or one that no model has."""
    number = name.removeprefix(f"{_PAST}.").partition(".")[0]
    return int(number) if number.isdecimal() and len(number) <= _MOST_DIGITS else -1


def rotary_table(name: str, number: int) -> str:
    """The name of a table of cosines or sines; ``number`` counts a model's rotary embeddings from 0."""
    return name if number == 0 else f"{name}.{number + 1}"


def expert_matrix(name: str, expert: int) -> str:
    """The name of an expert's part of a tensor that holds those of all, as a tensor of its own."""
    return f"{name}.expert{expert}"


def continued_cache(name: str) -> str:
    """The output that continues a cache input."""
    return name.replace(_PAST, _PRESENT)
