"""FLAP as its authors' code does it, on a Llama too: their rule written out once more in plain torch."""

from __future__ import annotations

import pytest
import torch

import workbench
from tests.conftest import tiny
from workbench.pruning import Prune

FIELDS = {"method": "flap", "pattern": "heads+neurons", "predict_examples": 0, "calibration_examples": 16}


@pytest.fixture()
def llama(tmp_path):
    model = tiny("llama").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "llama")
    return workbench.subject(tmp_path / "llama", data="random")


def inputs_of(subject, modules):
    """Every token that reaches these modules."""
    rows = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].detach().flatten(0, -2))
        )
        for name, module in modules.items()
    ]
    for batch in subject.batches("calibration", 4, 16):
        subject.task.output(subject.model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found).double() for name, found in rows.items()}


def published(subject, sparsity):
    """Kept units by module: `prune_flap` with structure AL-AM, the cost of a head and a neuron by their
    weights."""
    model = subject.model
    size = model.config.head_dim
    # a key-value head goes with all its query heads
    width = size * model.config.num_attention_heads // model.config.num_key_value_heads
    blocks = dict(model.named_modules())
    outputs = {n: m for n, m in blocks.items() if n.endswith(("self_attn.o_proj", "mlp.down_proj"))}
    rows = inputs_of(subject, outputs)
    metric, cost = {}, {}
    for name, module in outputs.items():
        score = rows[name].var(0, unbiased=False) * module.weight.double().square().sum(0)
        heads = name.endswith("o_proj")
        score = score**2 if heads else score
        score = (score - score.mean()) / score.std()
        metric[name] = score.reshape(-1, width).mean(1) if heads else score
        hidden = model.config.hidden_size
        cost[name] = (2 * size + 2 * width) * hidden if heads else 3 * hidden
    flat = torch.cat(list(metric.values()))
    costs = torch.cat([torch.full_like(metric[n], float(cost[n])) for n in metric])
    order = flat.argsort(descending=True)
    kept = costs[order].cumsum(0)
    threshold = flat[order][(kept - costs.sum() * (1 - sparsity)).abs().argmin()]
    return {name.rsplit(".", 1)[0]: values >= threshold for name, values in metric.items()}


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_heads_and_neurons_of_a_llama_are_the_ones_the_authors_rule_keeps(llama, sparsity):
    expected = published(llama, sparsity)
    result = Prune(**FIELDS, sparsity=sparsity).run(llama, cache=False)
    kept = {row.group: row.kept for row in result.tables["units"].itertuples()}
    # the last unit of a group stays here
    assert kept == {name: max(int(mask.sum()), 1) for name, mask in expected.items()}


def test_a_llama_gets_the_biases_that_take_what_is_lost_and_opens_again(llama, tmp_path):
    result = Prune(**FIELDS, sparsity=0.3).run(llama, cache=False)
    config = result.subject.model.config
    assert config.attention_bias and config.mlp_bias
    assert any(bool((b != 0).any()) for n, b in result.subject.model.named_parameters() if n.endswith("bias"))
    result.subject.save(tmp_path / "small")
    again = workbench.subject(tmp_path / "small")
    assert again.evaluate("test")["loss"] == pytest.approx(result.facts["loss"], abs=1e-5)


def test_with_bias_the_mean_output_of_a_consumer_stays(llama):
    """W (1 - m) E[x] in the bias: exact where the channels that go are constant."""
    model = llama.model
    with torch.no_grad():  # neuron 0 of the first block is constant: gate -> silu(0) = 0
        model.model.layers[0].mlp.gate_proj.weight[0] = 0
    before = llama.evaluate("test")["loss"]
    result = Prune(
        method="flap",
        pattern="neurons",
        sparsity=1 / (2 * model.config.intermediate_size),
        predict_examples=0,
        calibration_examples=16,
    ).run(llama, cache=False)
    assert result.facts["loss"] == pytest.approx(before, abs=1e-6)
