"""Method cards of growth."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "hypercloning",
        "arithmetic",
        "HyperCloning",
        "Samragh et al. 2024",
        r"W \to \tfrac1k \begin{pmatrix} W & W \\ W & W \end{pmatrix}",
        "a small model; training afterwards",
        "a loss in fewer steps than from random weights, with noise in fewer than without",
        287,
        recipe=(("grow", {"method": "hypercloning", "method.noise": 20.0}),),
        departs="Tied embeddings become a head of their own, divided by the copies; the size of heads stays.",
    ),
    Method(
        "fpi",
        "arithmetic",
        "bert2BERT: function-preserving initialization",
        "Chen et al. 2022",
        r"W_{ij} \to W_{g(i) h(j)} / C_{h(j)}",
        "a small model; training afterwards",
        "the large model starts where the small one stopped",
        11,
        recipe=(("grow", {"method": "fpi"}),),
        departs="Units are copied evenly and in order, by whole multiples, where the paper draws them: norms "
        "are exact only so. Training sub-structures first is left out.",
    ),
    Method(
        "aki",
        "arithmetic",
        "bert2BERT: advanced knowledge initialization",
        "Chen et al. 2022",
        r"[W^l; W^{l+1}] \text{ with columns as in FPI}",
        "a small model; training afterwards",
        "after some hundred steps at or above FPI",
        11,
        recipe=(("grow", {"method": "aki"}),),
        departs="Units are copied in order, by whole multiples, where the paper draws them; training "
        "sub-structures first is left out.",
    ),
    Method(
        "stack",
        "arithmetic",
        "Stacking (G_stack)",
        "Du et al. 2024",
        r"\theta_{1..L}, \theta_{1..L}, \ldots",
        "a small model; training afterwards",
        "a loss in fewer FLOPs than from random weights, those of the small model counted",
        153,
        recipe=(("grow", {"method": "stack", "times": 4}),),
        departs="Training before and after is `train`'s; when the small model has had enough is told "
        "by the published guideline alone (--flops).",
    ),
    Method(
        "v-cycle",
        "arithmetic",
        "Multi-level V-cycle",
        "Zou et al. 2024",
        r"(1 - \alpha) w + \alpha\, T W_s F,\ F T = 1",
        "a training split",
        "a loss in fewer FLOPs than the large model alone",
        350,
        recipe=(("v-cycle", {}),),
        departs="One level; the large model's own steps before and after are `train`'s. Embeddings are "
        "scaled only where they are the head too.",
    ),
]
