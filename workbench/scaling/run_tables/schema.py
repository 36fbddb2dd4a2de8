"""The columns that a run table may have: what each means, its unit, its range, and its other names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.scaling.formulas.laws import KNOWN_COLUMNS

Array = np.ndarray


@dataclass(frozen=True)
class Column:
    """One column of the schema: meaning, unit, accepted range, and other names it is known by
    (lower case).
    """

    meaning: str
    unit: str = ""
    low: float = 0.0
    high: float = np.inf
    strict: bool = True
    other_names: tuple[str, ...] = ()

    def bad(self, values: Array) -> Array:
        """Which values lie outside the range."""
        return (
            ~np.isfinite(values)
            | (values <= self.low if self.strict else values < self.low)
            | (values > self.high)
        )

    @property
    def accepted(self) -> str:
        upper = "" if np.isinf(self.high) else f" and at most {self.high:g}"
        return (
            "a number"
            if np.isinf(self.low)
            else f"a number {'above' if self.strict else 'of at least'} {self.low:g}"
        ) + upper


SCHEMA: dict[str, Column] = {
    "params": Column(
        "parameters of the model",
        "parameters",
        other_names=(
            "n",
            "n_params",
            "num_params",
            "parameters",
            "model_size",
            "model size",
            "params_total",
            "total_params",
            "num_parameters",
        ),
    ),
    "non_embedding_params": Column(
        "parameters without embeddings",
        "parameters",
        other_names=("params_no_embed", "n_non_embedding", "non_embedding", "non-embedding params"),
    ),
    "active_params": Column(
        "parameters used per token (mixture of experts)", "parameters", other_names=("na", "activated_params")
    ),
    "average_params": Column("active parameters averaged over training (sparse pre-training)", "parameters"),
    "tokens": Column(
        "training tokens",
        "tokens",
        other_names=(
            "d",
            "n_tokens",
            "num_tokens",
            "training_tokens",
            "train_tokens",
            "training tokens",
            "total_tokens",
        ),
    ),
    "unique_tokens": Column("distinct training tokens", "tokens", other_names=("u", "unique tokens")),
    "flops": Column(
        "training compute",
        "FLOPs",
        other_names=(
            "c",
            "compute",
            "training flop",
            "training_flops",
            "train_flops",
            "model_flops",
            "total_flops",
            "budget",
        ),
    ),
    "loss": Column(
        "final validation loss",
        "nats per token",
        other_names=(
            "val_loss",
            "valid_loss",
            "validation_loss",
            "eval_loss",
            "eval/loss",
            "val/loss",
            "validation loss",
            "final_loss",
            "test_loss",
            "loss_validation",
        ),
    ),
    "learning_rate": Column(
        "peak learning rate", "", other_names=("lr", "learning rate", "peak_lr", "max_lr")
    ),
    "batch_tokens": Column(
        "batch size", "tokens", other_names=("batch_size_tokens", "tokens_per_batch", "global_batch_tokens")
    ),
    "batch_size": Column(
        "batch size in the run's own unit",
        "examples",
        other_names=("bs", "batch", "batch size", "global_bs", "global_batch"),
    ),
    "steps": Column("optimizer steps", "steps", other_names=("n_steps", "num_steps", "train_steps")),
    "step": Column(
        "optimizer step of a logged value", "steps", low=-1.0, other_names=("_step", "global_step")
    ),
    "bits": Column("weight precision", "bits", high=64.0, other_names=("weight_bits", "w_bits")),
    "activation_bits": Column("activation precision", "bits", high=64.0, other_names=("a_bits",)),
    "kv_bits": Column("key-value cache precision", "bits", high=64.0),
    "post_bits": Column("post-training precision", "bits", high=64.0),
    "exponent_bits": Column("exponent bits", "bits", strict=False, high=11.0),
    "mantissa_bits": Column("mantissa bits", "bits", strict=False, high=52.0),
    "block_size": Column("elements sharing one scale", "elements"),
    "sparsity": Column("share of zero weights", "", strict=False, high=1.0),
    "qat_fraction": Column("share of tokens in quantization-aware training", "", strict=False, high=1.0),
    "quantized_share": Column(
        "share of the parameters in low precision",
        "",
        strict=False,
        high=1.0,
        other_names=("quantization_ratio", "q_r"),
    ),
    "experts": Column(
        "experts per routed layer", "experts", other_names=("num_experts", "n_experts", "nume")
    ),
    "members": Column("ensemble members", "models"),
    "epochs": Column("passes over the data", "epochs"),
    "multiplier": Column("tokens per parameter over 20", ""),
    "width": Column("hidden width", "", other_names=("d_model", "hidden_size", "n_embd")),
    "depth": Column("layers", "", other_names=("n_layers", "num_layers", "n_layer", "num_blocks")),
    "seed": Column("random seed", "", low=-np.inf, strict=False),
    "distance": Column(
        "distance of the weights from their start", "", strict=False, other_names=("weight_distance",)
    ),
    "streams": Column("parallel streams of one model", "streams", other_names=("parallel_size",)),
    "vocab_params": Column("parameters of the vocabulary's embeddings", "parameters"),
    "non_vocab_params": Column(
        "parameters beside the vocabulary's", "parameters", other_names=("non_vocab_parameters",)
    ),
    "granularity": Column("size of a feed-forward layer over that of an expert", ""),
    "dense_tokens": Column("tokens of the dense stage before upcycling", "tokens", other_names=("d1",)),
    "sparse_tokens": Column("tokens of the stage after upcycling", "tokens", other_names=("d2",)),
    "expert_ratio": Column("total over active parameters, or experts over those a token meets", ""),
    "task_loss": Column("loss of the right answers of a task", "nats", strict=False),
    "accuracy": Column("share of a task's items that are right", "", strict=False, high=1.0),
    "task_error": Column("share of a task's items that are wrong", "", strict=False, high=1.0),
    "normalised_loss": Column(
        "loss less that of a unigram model",
        "nats per token",
        low=-np.inf,
        strict=False,
        other_names=("unigram_normalized_loss",),
    ),
    "loss_increase": Column(
        "loss increase from quantization",
        "nats per token",
        low=-np.inf,
        strict=False,
        other_names=("delta_loss", "delta"),
    ),
}
assert set(KNOWN_COLUMNS) <= set(SCHEMA)
