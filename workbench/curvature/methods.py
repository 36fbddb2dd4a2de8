"""Method cards of curvature."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "slq",
        "curvature",
        "Stochastic Lanczos quadrature",
        "Lin, Saad and Yang 2016; Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019",
        r"p(\lambda) \approx \frac{1}{k}\sum_{i=1}^k \sum_{j=1}^m (e_1^T u_{ij})^2\, N(\lambda; "
        r"\theta_{ij}, s^2)",
        "data, gradients",
        "30 steps resolve the largest eigenvalue to 1e-4",
        None,
        recipe=(("spectrum", {"reorthogonalise": "full"}),),
        subject="digits-softmax",
    ),
    Method(
        "hutchinson",
        "curvature",
        "Hutchinson's trace estimator",
        "Hutchinson 1990",
        r"\operatorname{tr} H \approx \frac{1}{k}\sum_i z_i^T H z_i",
        "data, gradients",
        "unbiased; error falls as 1/sqrt(k); the interval covers at its rate",
        None,
        recipe=(("trace", {"method": "hutchinson", "products": 48}),),
        subject="digits-softmax",
    ),
    Method(
        "hutch++",
        "curvature",
        "Hutch++",
        "Meyer, Musco, Musco and Woodruff 2021",
        r"\operatorname{tr}(Q^T H Q) + \frac{1}{k}\sum_i g_i^T (I - QQ^T) H (I - QQ^T) g_i",
        "data, gradients",
        "needs fewer products than Hutchinson where few eigenvalues carry the trace; "
        "the interval covers at its rate",
        None,
        recipe=(("trace", {"method": "hutch++", "products": 48}),),
        subject="digits-softmax",
    ),
    Method(
        "xtrace",
        "curvature",
        "XTrace",
        "Epperly, Tropp and Webber 2024",
        r"\frac{1}{m}\sum_i \left[\operatorname{tr}(Q_i^T H Q_i) + w_i^T (I - Q_iQ_i^T) H (I - Q_iQ_i^T) "
        r"w_i\right]",
        "data, gradients",
        "as Hutch++, each probe doing both jobs; the interval covers at its rate",
        None,
        recipe=(("trace", {"method": "xtrace", "products": 48}),),
        subject="digits-softmax",
    ),
    Method(
        "batch-size-theory",
        "curvature",
        "Learning rates as a function of batch size: a random matrix theory approach",
        "Granziol, Zohren and Roberts 2022",
        r"\lambda_i' = \lambda_i + \frac{P}{b}\frac{\sigma^2}{\lambda_i} \text{ if } \lambda_i > "
        r"\sqrt{P/b}\,\sigma, \text{ else } 2\sqrt{P/b}\,\sigma",
        "data, gradients",
        "the top eigenvalue of a batch falls to the full one as the formula says",
        115,
        recipe=(("batch-size-theory", {}),),
        subject="digits-softmax",
        departs="A rate counts as stable while the loss stays within half a nat of its start, which a "
        "loss that saturates bears far beyond 2 / lambda, and the paper's learner of rate and "
        "momentum from the running spectrum is left out.",
    ),
    Method(
        "flatness",
        "curvature",
        "Same pre-training loss, better downstream",
        "Liu, Xie, Li and Ma 2023",
        r"\operatorname{tr}(\nabla^2 L) \text{ anti-correlates with downstream accuracy at equal } L",
        "training",
        "among models of equal pre-training loss, the Hessian's trace anti-correlates with downstream "
        "accuracy",
        342,
        recipe=(("flatness", {}),),
        subject="hidden-markov",
        departs="Models count as of minimal loss within 2 % of the least that is possible, and what does not "
        "come so near in its steps is left out; width and training after convergence are not varied.",
    ),
    Method(
        "quadratic-prediction",
        "curvature",
        "Second-order prediction of what a change of weights costs",
        "LeCun, Denker and Solla 1990",
        r"\Delta L \approx g^T d + \frac{1}{2} d^T H d",
        "data, gradients",
        "orders the layers by what rounding or pruning them costs (rank correlation above 0.8)",
        None,
        recipe=(("quadratic-prediction", {}),),
    ),
]
