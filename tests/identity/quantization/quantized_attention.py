"""Attention in few bits: binary with estimates beside its authors' code, information and maps by loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.quantized_training import joined, leaf
from tests.identity.repositories import loaded, source
from workbench.storage.identity import AUTHORS, FP64


@beside(
    "bipft",
    **source("Xingrun-Xing/BiPFT"),
    kind=AUTHORS,
    compared="signs of queries and steps of maps, with the gradients of numbers and scales",
    inputs="2 x 3 x 8 x 4 normal numbers, their softmax as maps, normal upstream gradients",
    tolerance=1e-6,
)
def bipft_signs(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.trained.binary_attention import scaled_signs, scaled_steps

    peer = loaded("Xingrun-Xing/BiPFT", "utils_quant", root="binary_pretraining")
    numbers = draw.normal(2, 3, 8, 4)
    theirs, ours = [], []
    for symmetric, values, size in ((True, numbers, 0.75), (False, numbers.softmax(-1), 0.5)):
        upstream = draw.normal(2, 3, 8, 4)
        first, second = leaf(values), leaf(values)
        alpha = peer.AlphaInit(torch.tensor(size))
        alpha.initialized = True
        found = peer.act_quant_fn(
            first, alpha, 1, quant_method="elastic", symmetric=symmetric, layerwise=True
        )
        found.backward(upstream)
        scale = leaf(torch.tensor(size))
        mine = (scaled_signs if symmetric else scaled_steps)(second, scale)
        mine.backward(upstream)
        theirs += [found, first.grad, alpha.grad]
        ours += [mine, second.grad, scale.grad]
    return joined(*theirs), joined(*ours)


@beside(
    "bipft",
    **source("Xingrun-Xing/BiPFT"),
    kind=AUTHORS,
    compared="what an attention of rank 1 puts out",
    inputs="2 x 7 normal inputs of 48 features, 12 heads, its own queries, keys and values",
    tolerance=1e-5,
)
def bipft(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs estimates with five linear maps to one number; `up` is the ones that spread it over a value."""
    import transformers.pytorch_utils
    import transformers.utils
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    from workbench.quantization.activations.attention import plain_attention
    from workbench.quantization.trained.binary_attention import BinaryAttention
    from workbench.subjects.changes import attach

    for place in (transformers.pytorch_utils, transformers.utils):
        for name in (
            "find_pruneable_heads_and_indices",
            "prune_linear_layer",
            "add_code_sample_docstrings",
            "add_start_docstrings",
            "add_start_docstrings_to_model_forward",
            "replace_return_docstrings",
        ):
            if not hasattr(place, name):
                setattr(place, name, lambda *args, **named: lambda made: made)
    peer = loaded("Xingrun-Xing/BiPFT", "bipft", root="binary_pretraining")
    config: Any = BertConfig(hidden_size=48, num_attention_heads=12, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    for name, value in {
        "input_bits": 1,
        "weight_bits": 1,
        "sym_quant_ffn_attn": False,
        "sym_quant_qkvo": True,
        "input_layerwise": True,
        "weight_layerwise": True,
        "input_quant_method": "elastic",
        "weight_quant_method": "bwn",
        "not_quantize_attention": False,
        "clip_init_val": 2.5,
        "learnable_scaling": True,
    }.items():
        setattr(config, name, value)
    theirs = peer.BertSelfAttention(config)
    for parameter in theirs.parameters():
        if parameter.ndim:
            parameter.data = draw.normal(*parameter.shape) * 0.3
    hidden = draw.normal(2, 7, 48)
    draw.shapes = [[2, 7, 48]]
    made: dict[str, Tensor] = {}
    for name in ("query", "key", "value"):
        getattr(theirs, name).register_forward_hook(
            lambda module, args, out, name=name: made.__setitem__(name, theirs.transpose_for_scores(out))
        )
    (context,) = theirs(hidden)
    clips = (theirs.clip_query, theirs.clip_key, theirs.clip_value, theirs.clip_attn)
    maps = (theirs.q_m, theirs.k_m, theirs.q_p, theirs.k_p, theirs.v_p)
    weights, offsets = (torch.stack([getattr(m, n).detach() for m in maps]) for n in ("weight", "bias"))
    scales = torch.stack([clip.detach() for clip in clips])
    ours = BinaryAttention(scales, weights, offsets, torch.ones(1, 48))
    module = BertSelfAttention(config).eval()
    attach(module.query, "weight", ours)
    ours.hidden = hidden
    found, _ = plain_attention(
        module, made["query"], made["key"], made["value"], None, scaling=4**-0.5, dropout=0.0
    )
    return context, found.flatten(-2)


@beside(
    "edgeqat",
    peer="Shen et al. 2024, EdgeQAT",
    kind=FP64,
    compared="information in queries and keys, the distance of maps to a teacher's, the tokens kept wide",
    inputs="2 x 4 heads of 9 tokens and 8 features, two key heads, padding in one example",
    tolerance=1e-6,
)
def edgeqat(draw: Draw) -> tuple[Tensor, Tensor]:
    """By loops over examples, heads and tokens; the product's terms are float32."""
    from workbench.quantization.activations.attention import AttentionCall
    from workbench.quantization.activations.token_importance import important_tokens, remember_importance
    from workbench.quantization.trained.objective import information, map_distance

    query, key = draw.normal(2, 4, 9, 8), draw.normal(2, 2, 9, 8)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 6:] = False
    maps, taught = ((draw.normal(2, 4, 9, 9)).softmax(-1) for _ in range(2))
    module = torch.nn.Identity()
    call = AttentionCall(module, query, key, key, maps, keep)
    goal = AttentionCall(module, query, key, key, taught, keep)
    remember_importance(query, key, keep)
    wide = important_tokens(2, 9, 0.5)
    assert wide is not None
    ours = joined(information([call]).reshape(1), map_distance([call], [goal]).reshape(1), wide.double())

    logs, distances, chosen = [], [], np.zeros((2, 9))
    q, k = query.double().numpy(), key.double().numpy()
    for example, tokens in enumerate((9, 6)):
        for heads in (q[example], k[example]):
            logs += [math.log(1 + np.var(row, ddof=1)) for head in heads for row in head[:tokens]]
        for head in range(4):
            first, second = (t[example, head, :tokens].double().numpy().ravel() for t in (maps, taught))
            distances.append(1 - first @ second / math.sqrt((first @ first) * (second @ second)))
        scores = [
            np.mean([q[example, h, t] @ k[example, h // 2, 0] for h in range(4)]) for t in range(tokens)
        ]
        narrow = sorted(range(tokens), key=lambda t: scores[t])[: tokens // 2]
        chosen[example, [t for t in range(tokens) if t not in narrow]] = 1
    theirs = np.array([-math.log(np.mean(logs)), np.mean(distances)])
    return joined(torch.from_numpy(theirs), torch.from_numpy(chosen)), ours
