"""Method cards of what removes heads, neurons, channels, layers and experts."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "minitron",
        "pruning",
        "Minitron: width pruning with distillation",
        "Muralidharan et al. 2024",
        "channel: L2 over examples of the mean |norm output| over tokens, added up over norms",
        "calibration inputs, distillation",
        "half the channels: distilled better than fine-tuned, "
        "far better than the same size from random weights; importance better than random",
        64,
        recipe=(
            (
                "prune",
                {
                    "method": "minitron",
                    "pattern": "channels",
                    "sparsity": 0.5,
                    "recovery": "distil",
                    "recovery.steps": 60,
                    "recovery.learning_rate": 0.002,
                },
            ),
        ),
        departs="No candidates are searched for, intermediate states are not distilled, and activations "
        "are aggregated in one way.",
    ),
    Method(
        "minitron-depth",
        "pruning",
        "Minitron: depth pruning by Block Influence",
        "Muralidharan et al. 2024; Men et al. 2024",
        "BI_l = 1 - E[cos(x^l, x^l+1)]",
        "calibration inputs",
        "one block of three removed: Block Influence better than random and no worse than magnitude",
        64,
        recipe=(("prune", {"method": "minitron", "pattern": "layers", "sparsity": 0.33}),),
        departs="No candidates are searched for: blocks go in the order of their influence.",
    ),
    Method(
        "adapt-pruner",
        "pruning",
        "Adapt-Pruner",
        "Wang et al. 2025",
        "s_b = s - A (I_b - mean I) / max |I - mean I|, I_b = 1 - cos(input, output); units by Taylor score",
        "calibration gradients, fine-tuning",
        "half of heads and neurons: adaptive shares better than equal ones; "
        "five steps with training between better than one before it",
        84,
        recipe=(
            (
                "prune",
                {
                    "method": "adapt-pruner",
                    "pattern": "heads+neurons",
                    "sparsity": 0.5,
                    "sparsity_schedule": "linear",
                    "sparsity_schedule.events": 5,
                    "recovery": "finetune",
                    "recovery.steps": 60,
                    "recovery.learning_rate": 0.001,
                },
            ),
        ),
        departs="Shares follow from the sparsity of each event alone, with amplitude 0.1, where the "
        "authors' code adds a step's share to those before, with 0.03 a step.",
    ),
    Method(
        "deeper-layers",
        "pruning",
        "The unreasonable ineffectiveness of the deeper layers",
        "Gromov et al. 2024",
        "drop the n blocks from l on with the smallest arccos(cos(x^l, x^l+n)) / pi",
        "calibration inputs, low-rank healing",
        "the run of smallest angular distance is no worse than random or deepest blocks, "
        "and healing closes most of the gap",
        354,
        recipe=(
            (
                "prune",
                {
                    "method": "deeper-layers",
                    "pattern": "layers",
                    "sparsity": 0.33,
                    "recovery": "low-rank",
                    "recovery.learning_rate": 0.002,
                    "recovery.steps": 40,
                },
            ),
        ),
    ),
    Method(
        "pat",
        "pruning",
        "PAT: pruning-aware tuning",
        "Liu et al. 2024",
        "y = s m (I + U V)(W x + b), m = sigmoid(T M) + c shared by all layers",
        "fine-tuning",
        "a quarter of the channels: better than pruning by activation and then as many steps of adapters "
        "with as many parameters",
        58,
        recipe=(
            (
                "prune",
                {
                    "method": "pat",
                    "pattern": "channels",
                    "sparsity": 0.25,
                    "recovery": "low-rank",
                    "recovery.learning_rate": 0.002,
                    "recovery.steps": 60,
                    "saliency.rank": 28,
                    "recovery.rank": 28,
                },
            ),
        ),
        departs="The mask restricts the norms as well, and in the last fifth the channels of the largest "
        "scores are kept exactly, where the authors freeze the soft mask.",
    ),
    Method(
        "heapr",
        "pruning",
        "HEAPr: atomic experts",
        "Li et al. 2025",
        "s_k = 1/2 E[h_k^2] w_k^T E[g g^T] w_k",
        "calibration gradients",
        "25 % and 50 % of the experts' neurons: better than magnitude, random and whole experts; "
        "the scores predict the loss",
        31,
        recipe=(("prune", {"method": "heapr", "pattern": "neurons", "sparsity": 0.25}),),
        subject="bytemoe",
        departs="Every expert of a layer loses equally many neurons, in steps of eight, as they are "
        "stacked in one tensor; the authors rank the neurons of all experts together.",
    ),
    Method(
        "premoe",
        "pruning",
        "PreMoe: experts for a task",
        "Pei et al. 2025",
        "TCESS_e = E[z_e 1(e in top K) 1(confidence >= r)]",
        "calibration inputs",
        "half of the experts: TCESS better than usage, random and other domains' patterns; "
        "queries find their pattern",
        86,
        recipe=(("prune", {"method": "premoe", "pattern": "experts", "sparsity": 0.5}),),
        subject="bytemoe",
        departs="The stored pattern nearest to a query is found by `ExpertPatterns` in Python alone, not "
        "by a run.",
    ),
    Method(
        "slimmoe",
        "pruning",
        "SlimMoE: slimmer experts in stages",
        "Li et al. 2025",
        "experts' neurons by Taylor score, pruned and distilled in stages",
        "calibration gradients, distillation",
        "half of the experts' width: two stages better than one, and both better than half of the experts, "
        "equal steps",
        96,
        recipe=(
            (
                "prune",
                {
                    "method": "slimmoe",
                    "pattern": "neurons",
                    "sparsity": 0.5,
                    "sparsity_schedule": "linear",
                    "sparsity_schedule.events": 2,
                    "recovery": "distil",
                    "recovery.steps": 24,
                    "recovery.learning_rate": 0.001,
                },
            ),
        ),
        subject="bytemoe",
        departs="Only neurons of experts are removed, no attention heads, and a stage trains before it "
        "prunes, so that the first distils the dense model from itself.",
    ),
    Method(
        "ziplm-minilm",
        "pruning",
        "ZipLM to measured speed-ups of a pretrained BERT",
        "Kurtic, Frantar and Alistarh 2023",
        "rho_S with a measured latency table",
        "calibration inputs",
        "1.5, 2 and 3 times faster on this CPU, within a tenth, "
        "and more accurate than magnitude and FLAP at the same target",
        94,
        recipe=(
            (
                "prune",
                {
                    "method": "ziplm",
                    "pattern": "heads+neurons",
                    "allocation": "latency",
                    "allocation.speedup": 2.0,
                },
            ),
        ),
        subject="minilm-docstrings",
        departs="Groups weigh alike, without SPDY's search for their coefficients, neurons go a 128th of "
        "a group at a time, and a speed-up is reached in one shot.",
    ),
]
