"""Kind (fault 46): what a run has made is gone when it has ended."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

import workbench
from workbench.curvature import Spectrum, TopEigenvalues, Trace
from workbench.progress import Progress
from workbench.storage.resident import let_go, library


def tensors():
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


@pytest.mark.parametrize(
    "instrument",
    [Spectrum(probes=1, steps=3, examples=32), Trace(examples=32), TopEigenvalues(examples=32, count=1)],
)
def test_a_run_keeps_no_tensor(instrument):
    """Each uncached run kept the graph that it weighs: 115 tensors."""
    on = workbench.subject("digits-vit")
    counts = []
    for _ in range(3):
        instrument.run(on, Progress(), cache=False)
        counts.append(tensors())
    assert counts[2] <= counts[1]


@pytest.mark.skipif(library() is None, reason="the system does not say what is resident")
def test_weights_that_kept_graphs_need_no_more_are_not_held(tmp_path):
    """The blocks before the chosen one are read once, for the graphs: their pages are given back."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    on = workbench.subject(tmp_path, data="random", max_length=16)
    before = on.model.model.layers[0].mlp.up_proj.weight
    assert before.double().sum() != 0 and let_go([before]) > 0.9 * before.nbytes  # read, and given back
    Spectrum(probes=2, steps=3, examples=16, layers="model.layers.2.*").run(on, Progress(), cache=False)
    assert let_go([before]) < 0.3 * before.nbytes  # whoever reads a page gets those around it
