"""Method cards of what trains with masks or trains a part, and of recovery on a pretrained BERT."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "recovery-minilm",
        "pruning",
        "Recovery of a pretrained BERT",
        "Kurtic et al. 2022; Mishra et al. 2021; Kurtic, Frantar and Alistarh 2023",
        "gradual oBERT, SparseGPT at 2:4, and ZipLM's structures, each with distillation",
        "fine-tuning",
        "80 % of the weights within 1 accuracy point of dense, 2:4 within 1, "
        "half of heads and neurons within 3 at a measured 1.4x",
        0,
        recipe=(
            (
                "prune",
                {
                    "method": "obert",
                    "sparsity": 0.8,
                    "sparsity_schedule": "cubic",
                    "sparsity_schedule.events": 4,
                    "recovery": "distil",
                    "recovery.steps": 640,
                    "recovery.learning_rate": 0.0002,
                },
            ),
        ),
        subject="minilm-docstrings",
        departs="The learning rate decays once, where oBERT rewinds it after every event, and no layers "
        "are dropped and nothing is rounded to INT8 afterwards.",
    ),
    Method(
        "movement",
        "pruning",
        "Movement pruning",
        "Sanh et al. 2020",
        "M = top v of S, S -= lr dL/d(W M) W, S trained for every weight, straight through the choice",
        "fine-tuning on the task it is pruned for",
        "80 % on a task the model is fine-tuned for: better than magnitude with the same training",
        None,
        recipe=(("train-sparse", {"method": "movement", "sparsity": 0.8, "steps": 300}),),
    ),
    Method(
        "block-movement",
        "pruning",
        "Block pruning for faster transformers",
        "Lagunas et al. 2021",
        "M = sigmoid(S) > tau, dL/dS = sum over a block of dL/dW' W, + lambda mean sigmoid(S)",
        "fine-tuning",
        "hybrid blocks beat magnitude blocks of the same density, "
        "and removing what is empty makes the model faster",
        195,
        recipe=(
            (
                "train-sparse",
                {
                    "method": "block-movement",
                    "pattern": "hybrid 8x8",
                    "objective": "task",
                    "masks.penalty": 20.0,
                    "masks.learning_rate": 0.1,
                },
            ),
        ),
        departs="The penalty is constant, without a warm-up, and the pruned model is not fine-tuned again "
        "with its blocks filled up.",
    ),
    Method(
        "ast",
        "pruning",
        "Adaptive sparse trainer",
        "Huang et al. 2024",
        "W' = W m(|W|), dW += lambda(t) (1 - m) W, task + KL, + (X P) S^T",
        "fine-tuning and a dense teacher",
        "2:4: adaptive masks beat a fixed mask retrained as long; distillation and block sums help; "
        "masks come to rest",
        240,
        recipe=(("train-sparse", {"method": "ast", "pattern": "2:4"}),),
        subject="bytelm",
        departs="The pull on pruned weights goes through Adam's first moment and ends at three quarters "
        "of the run, and the projection of the block sums is fixed; the authors' code keeps the "
        "pull out of the moment and up to the end, and trains the projection.",
    ),
    Method(
        "slope",
        "pruning",
        "Double-pruned pretraining with lazy adapters",
        "Mozaffari et al. 2024",
        "Y = X W_R^T + (X L) R, dX = dY W_RC; extra zeros 9.375 % at 2:4",
        "training",
        "2:4 from the start: pruning the backward pass twice costs less than the mask itself, "
        "and adapters in the last tenth win some back",
        204,
        recipe=(
            (
                "train-sparse",
                {
                    "method": "slope",
                    "pattern": "2:4",
                    "backward.lazy": 0.1,
                    "start": "random",
                    "learning_rate": 0.003,
                },
            ),
        ),
        subject="bytelm",
        departs="Adapters learn at a rate of their own that starts at the run's peak, as the run's is "
        "nearly zero by then, and take part in a tenth of a short run, where the paper gives them "
        "a hundredth.",
    ),
    Method(
        "dsl",
        "pruning",
        "Dynamic sparse learning",
        "Wang et al. 2024",
        "alpha/2 (1 + cos(pi t/T)) of the kept weights make room for as many others",
        "training",
        "90 % from the start: moving masks beat a mask that stays; regrowth by gradient beats random "
        "regrowth (layers here; the paper's are embedding tables)",
        158,
        recipe=(
            ("train-sparse", {"method": "dsl", "sparsity": 0.9, "start": "random", "learning_rate": 0.003}),
        ),
        subject="bytelm",
        departs="Matrices of a transformer stand for the embedding tables of a recommender.",
    ),
    Method(
        "spdf",
        "pruning",
        "Sparse pre-training and dense fine-tuning",
        "Thangarasa et al. 2023",
        "W * M, M random and fixed, while pre-training; M lifted for fine-tuning",
        "training",
        "75 %: lifting the mask beats keeping it, and the gap to dense shrinks in dense fine-tuning",
        196,
        recipe=(
            ("train-sparse", {"method": "spdf", "sparsity": 0.75, "start": "random", "learning_rate": 0.003}),
            ("train-sparse", {"method": "dense", "masks": "lifted"}),
        ),
        subject="bytelm",
    ),
    Method(
        "mediswift",
        "pruning",
        "Sparse pre-trained models of one field",
        "Thangarasa et al. 2024",
        "the same, on a field's own texts",
        "training",
        "75 %: less than half of the pre-training gap is left after dense fine-tuning, "
        "for less than half of the matrix work",
        318,
        recipe=(
            (
                "train-sparse",
                {"method": "mediswift", "sparsity": 0.75, "start": "random", "learning_rate": 0.003},
            ),
            ("train-sparse", {"method": "dense", "masks": "lifted"}),
        ),
        subject="bytelm",
        departs="The composition is that of spdf: no soft prompts, and no dense model of equal compute "
        "beside it.",
    ),
    Method(
        "app",
        "pruning",
        "Anytime progressive pruning",
        "Misra et al. 2022",
        "density 0.8^n before each megabatch, n from 1 to the target",
        "training",
        "90 % over five megabatches: pruning progressively makes fewer errors in all than pruning once at "
        "the start, by |g w|",
        341,
        recipe=(
            (
                "train-sparse",
                {"method": "app", "sparsity": 0.9, "stages": 5, "portion": "megabatches", "start": "random"},
            ),
        ),
    ),
    Method(
        "pst",
        "pruning",
        "Parameter-efficient sparsity",
        "Li et al. 2022",
        "M = top of |W + B A| + a1 A' B' + a2 (R + C)",
        "fine-tuning",
        "80 %: within 1 accuracy point of movement pruning and above magnitude, "
        "with fewer trained parameters",
        16,
        recipe=(
            (
                "train-sparse",
                {"method": "pst", "sparsity": 0.8, "masks.rank": 4, "terms.rank": 4, "learning_rate": 0.003},
            ),
        ),
        departs="The part |w| of the scores lets no gradient through.",
    ),
    Method(
        "dsee",
        "pruning",
        "Dually sparsity-embedded tuning",
        "Chen et al. 2021",
        "W = W0 * S1 + U V + S2",
        "fine-tuning",
        "half of the frozen weights away: within 1 accuracy point of adapters on all of them; "
        "the decomposition's support beats a random one",
        33,
        recipe=(("train-sparse", {"method": "dsee", "stages": 2, "learning_rate": 0.003}),),
        departs="Single weights are masked, no heads or neurons, and the decomposition is GoDec's in "
        "GreBsmo's place.",
    ),
    Method(
        "hft",
        "pruning",
        "Half fine-tuning",
        "Hui et al. 2024",
        "in every block half of each kind of matrix learns, the other half rests",
        "fine-tuning",
        "a second task: less of the first is forgotten than by full fine-tuning, "
        "at most 1 accuracy point behind on the second",
        189,
        recipe=(("train-sparse", {"method": "hft"}),),
    ),
    Method(
        "subtuning",
        "pruning",
        "SubTuning",
        "Kaplun et al. 2023",
        "greedy choice of the blocks whose training lowers the validation loss most",
        "fine-tuning",
        "100 labels of a second task: chosen blocks do no worse than full fine-tuning, "
        "the last block or the head alone",
        257,
        recipe=(("subtune", {"steps": 60}),),
    ),
]
