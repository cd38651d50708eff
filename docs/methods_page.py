"""Makes docs/methods.md: the table of methods from the registry, and a formula for each.

python -m docs.methods_page > docs/methods.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from compressors.shrink.needs import Needs
from compressors.shrink.registry import METHODS, RegisteredMethod

__all__ = ["FORMULAS", "methods_page"]

_HEAD = """\
# Every method and its formula

This page is made from the code: `python -m docs.methods_page > docs/methods.md`. [compression.md](compression.md) says
how methods are combined in a recipe, and [quality.md](../benchmarks/results/quality.md) how they compare.

T are the calibration tokens, T_e those that chose expert e; g_e is the expert's gate, f_e its output, y the block's
output, p_e the router's probability of e; W stands for a matrix of an expert.

| `--method` or `edit` | changes | looks at | GGUF | source |
|---|---|---|---|---|
"""

_LOOKS_AT: Mapping[Needs, str] = {
    Needs.STATISTICS: "sums of one pass",
    Needs.WEIGHTS: "sums and weights",
    Needs.INPUTS: "sums, weights and inputs",
}

FORMULAS: Mapping[str, tuple[str, str, str]] = {
    "frequency": ("", "score = |T_e|", "The number of tokens that chose the expert."),
    "gate-frequency": ("", "score = sum over T_e of g_e(x)", "The same, each token weighed by its gate."),
    "ean": ("arXiv 2504.05586", "score = sum over T_e of ||f_e(x)||", "Expert activation norm."),
    "reap": (
        "arXiv 2510.13999",
        "score = (1 / |T_e|) * sum over T_e of g_e(x) * ||f_e(x)||",
        "The mean size of what the expert adds to the output, over the tokens that it serves: an expert that is chosen "
        "seldom, but matters then, is kept. The default.",
    ),
    "man": ("arXiv 2606.15716", "score = (1 / |T_e|) * sum over T_e of ||f_e(x)||", "The same without gates."),
    "msan": ("arXiv 2606.15716", "score = (1 / |T_e|) * sum over T_e of ||f_e(x)||^2", "The same of squares."),
    "expert-drop": (
        "arXiv 2406.02500",
        "score = (1 / |T|) * sum over T of p_e(x)",
        "The mean probability over all tokens, those that chose other experts included.",
    ),
    "removal-error": (
        "as in NVIDIA Model-Optimizer",
        "score = sum over T_e of ||y - y_without_e||^2 / sum over T of ||y||^2",
        "The block is computed again without the expert; its tokens go to their next choice, and gates are those of a "
        "router that never knew it.",
    ),
    "m-smoe": (
        "arXiv 2310.01334",
        "similarity(i, d) = (cos(router logits of i, router logits of d) + 1) / 2\n"
        "W = sum over the group of |T_i| * P_i W_i / sum of |T_i|",
        "The most used experts are dominant; each other one joins the most similar of them. The permutation P_i of its "
        "neurons comes from weight matching. The router's row is the same mean.",
    ),
    "hc-smoe": (
        "arXiv 2410.08589",
        "feature(i) = mean of f_i(x) over all sample tokens\nW = sum over the cluster of |T_i| * W_i / sum of |T_i|",
        "Hierarchical clustering of the features by Euclidean distance, with average linkage. Neurons are not aligned.",
    ),
    "ream": (
        "arXiv 2604.04356",
        "similarity(i, c) = ((cos of router logits + mean cos of outputs) / 2 + 1) / 2\n"
        "W = sum over the group of reap_i * P_i W_i / sum of reap_i",
        "The experts of highest REAP score are centroids, and from the highest on each takes the most similar ones, up "
        "to 16 in a group. It keeps the centroid's row of the router. Layers are merged one after another, each on the "
        "inputs that the merged ones before it give.",
    ),
    "slim": (
        "neurons: arXiv 2306.11695; compensation: arXiv 1707.06168",
        "importance(j) = ||down[:, j]|| * sqrt(sum over T_e of h_j(x)^2)\n"
        "down' = down_M + down_R S_RM (S_MM + r I)^-1,   S = sum over T_e of h h^T",
        "h are the neurons' activations, M those that stay and R the others. The down projection of those that stay "
        "makes up for the others by least squares; r pulls it towards the plain slice where tokens are few.",
    ),
    "block-drop": (
        "arXiv 2406.02500",
        "score = mean over T of cos(state that enters the layer, state that leaves it)",
        "The layers of highest score go whole. `consecutive_blocks` drops the run of neighbours of highest score.",
    ),
    "layer-drop": (
        "arXiv 2406.02500",
        "score = mean over T of cos(x, x + MoE(norm(x)))",
        "The MoE blocks of highest score go; attention stays.",
    ),
    "svd": (
        "arXiv 2403.07378",
        "L L^T = sum over T_e of x x^T;   U = first r left singular vectors of W L;   W' = U U^T W",
        "The matrix of rank r whose outputs differ least. The result is written out dense: it saves nothing by itself.",
    ),
    "d2-moe": (
        "arXiv 2502.17298",
        "W_i' = B + cut(W_i - B, r),   B = sum of |T_i| * W_i / sum of |T_i|",
        "A base that the layer's experts share, and a difference of rank r for each, cut as `svd` cuts.",
    ),
    "mobe": (
        "arXiv 2508.05257",
        "W_i' = A_i silu(sum over k of alpha_ik B_k),   alpha_i = softmax of learned numbers",
        "Gate and up projections of all experts from bases that the layer shares, fitted by Adam.",
    ),
    "lightmoe": (
        "arXiv 2603.12645; its formulas are ours",
        "share_e = sum over T_e of g_e(x) * ||f_e(x)|| / sum over all experts e' of the same\n"
        "part_e = share_e * (1 - mean cos(h, h + MoE(norm(h))))\n"
        "W_i' = B + cut(P_i W_i - B, r),   B = sum over the group of share_i * P_i W_i / sum of share_i",
        "Experts of the smallest parts in all layers are replaced: a base that a group shares, and a difference of "
        "rank r for each. P_i puts neurons in the order of the member of the largest share. [More](lightmoe.md).",
    ),
}
"""By the method's name: where it is published, its formula, and the formula in words."""

_REST = """
## Teaching it again

The divergence that training makes smaller (`kd`) is that of the next token, with all tokens outside of the original's
64 most probable ones in one bucket:

```
loss = mean over positions of sum over t in top 64 and the bucket of p(t) * log(p(t) / q(t))
```

p is the original, q the student. It is a lower bound of the whole divergence; every figure of a report is the whole.
Router KD (arXiv 2603.02217) is this loss with routers as the only weights that change. [recovery.md](recovery.md) has
the other losses and rungs.

## The effect of a tensor's type

```
divergence = a * Q + b * sqrt(R)
Q = 1/2 * sum over rows i and columns j of  G_i * M_j * error_ij^2
```

G_i is the sum of squared gradients of the log-probability of a token that the model draws itself, with respect to the
output of row i; M_j is the mean square of input j; R is the part of Q that routers see.
[quantization.md](quantization.md) explains it, with the knapsack that chooses the types.

## Codes that make up for each other

Column by column, the error of a code is passed on to the columns that are still to come (GPTQ, arXiv 2210.17323):

```
e_j = (w_j - code(w_j)) / U_jj;   w_k = w_k - e_j U_jk  for k > j
U = upper Cholesky factor of (sum of x x^T + prior)^-1
```
"""


def methods_page() -> str:
    """The page."""
    rows = [_row(method) for method in METHODS.values()]
    return _HEAD + "".join(rows) + "".join(_sections()) + _REST


def _row(method: RegisteredMethod) -> str:
    source = FORMULAS[method.name][0] or "common use"
    in_gguf = "yes" if method.in_gguf else "no"
    return f"| `{method.name}` | {method.changes.value} | {_LOOKS_AT[method.needs]} | {in_gguf} | {source} |\n"


def _sections() -> Iterator[str]:
    for name in METHODS:
        _, formula, words = FORMULAS[name]
        yield f"\n## {name}\n\n```\n{formula}\n```\n\n{words}\n"


if __name__ == "__main__":
    sys.stdout.write(methods_page())
