"""Method cards of widths that differ from layer to layer."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "hawq-v2",
        "quantization",
        "HAWQ-V2: trace-weighted allocation",
        "Dong et al. 2020",
        r"\Omega = \sum_l \frac{\mathrm{Tr}(H_l)}{n_l}\|Q(W_l) - W_l\|^2",
        "Hessian-vector products",
        "at an average of 3 bits lower loss than uniform, random and reversed allocations",
        348,
        recipe=(("allocate", {"sensitivity": "trace", "group_size": 4096}),),
        departs="Weights alone; inputs have no widths of their own.",
    ),
    Method(
        "curvature-allocation",
        "quantization",
        "Integer program over exact second-order costs",
        "Yao et al. 2021 (HAWQ-V3), with d.Gd in place of the trace",
        r"\min_c \sum_l \tfrac12 \delta_l^\top G_l \delta_l",
        "gradients at targets the model draws",
        "at an average of 3 bits lower loss than uniform, random and reversed allocations",
        266,
        recipe=(("allocate", {"sensitivity": "gauss-newton", "group_size": 4096}),),
        departs="Widths come from an integer program, where the first HAWQ orders "
        "layers by top eigenvalue over size and fine-tunes them in stages; inputs have no "
        "widths of their own.",
    ),
    Method(
        "interactions",
        "quantization",
        "Inter-layer terms in the allocation",
        "after Schaefer et al. 2023; the terms are derived here",
        r"\sum_{ij} \tfrac12 \delta_i^\top G_{ij} \delta_j",
        "gradients at targets the model draws",
        "at an average of 3 bits lower loss than the additive integer program",
        307,
        recipe=(
            (
                "allocate",
                {"sensitivity": "gauss-newton", "sensitivity.interactions": True, "group_size": 4096},
            ),
        ),
        departs="Widths come from one program, where the source orders layers by sensitivity and "
        "bisects that order to a wanted accuracy.",
    ),
    Method(
        "log-variance",
        "quantization",
        "Widths by the logarithm of variance",
        "after Hasan 2024; Huang and Schultheiss 1963 (transform coding)",
        r"b_l = \bar b + \tfrac12 \log_2 (s_l \sigma_l^2 / G)",
        "Hessian-vector products",
        "at an average of 3 bits lower loss than uniform, random and reversed allocations",
        358,
        recipe=(("allocate", {"sensitivity": "variance", "group_size": 4096}),),
        departs="Widths are simulated: no latency is measured.",
    ),
    Method(
        "q-bert",
        "quantization",
        "Q-BERT: widths by the top eigenvalue",
        "Shen et al. 2020",
        r"\Omega_l = |\bar\lambda_l| + \sigma(\lambda_l)",
        "Hessian-vector products",
        "at an average of 3 bits lower loss than uniform, random and reversed allocations",
        24,
        recipe=(("allocate", {"sensitivity": "eigenvalue", "group_size": 4096}),),
        departs="Widths come from an integer program over Omega times the squared error, where the "
        "authors set them by hand in the order of Omega; no groups by heads, no embeddings, "
        "no rounded inputs and no training.",
    ),
    Method(
        "higgs-allocation",
        "quantization",
        "HIGGS: widths by the linearity theorem",
        "Malinovskii et al. 2024",
        r"\min_c \sum_l \alpha_l t_l^2, \quad t_l = \|Q_c(W_l) - W_l\| / \|W_l\|, "
        r"\quad \alpha_l = \sum_j t_j^2 D_j / \sum_j t_j^4",
        "forward passes with noise in one layer",
        "at an average of 3 bits lower loss than uniform, random and reversed allocations",
        recipe=(
            (
                "allocate",
                {"sensitivity": "linearity", "solver": "dynamic-program", "group_size": 4096},
            ),
        ),
    ),
]
