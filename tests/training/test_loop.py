"""The loop: equal to a bare PyTorch loop, exact accumulation, exact resume, masks that stay."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.conftest import tiny
from workbench.errors import BadInput
from workbench.subjects import Layer, Mask, Subject
from workbench.subjects.tasks import CausalLM, CustomLoss, ModuleTask
from workbench.training import Training, fit
from workbench.training.data_order import Draws, StreamBatchSampler, WholeBatches, take


def net(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))


def small(dropout: float = 0.0, count: int = 50) -> Subject:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 8, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    columns = {"inputs": inputs, "labels": labels}
    return Subject(
        "small",
        net(dropout),
        ModuleTask(),
        {"train": columns, "validation": {k: v[:20] for k, v in columns.items()}},
    )


def language(count: int = 24) -> Subject:
    """Windows of unequal length: accumulation must weigh tokens, not micro-batches."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(99, (count, 16), generator=generator)
    lengths = torch.randint(4, 17, (count,), generator=generator)
    mask = (torch.arange(16) < lengths[:, None]).long()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}
    return Subject("language", tiny("llama"), CausalLM(), {"train": columns, "validation": columns})


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_equals_a_bare_loop_bit_for_bit() -> None:
    on = small()
    bare = copy.deepcopy(on.model).train()
    run = fit(
        on,
        steps=12,
        batch_size=16,
        learning_rate=0.05,
        weight_decay=0.1,
        optimizer="sgd",
        schedule="linear",
        warmup=0,
        clip=None,
        seed=3,
    )
    matrices, vectors = [bare[0].weight, bare[3].weight], [bare[0].bias, bare[3].bias]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.05, momentum=0.9, fused=True
    )
    losses = []
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 12)
        chosen = take(50, 3, 16 * step, 16)
        loss = F.cross_entropy(
            bare(on.splits["train"]["inputs"][chosen]), on.splits["train"]["labels"][chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same(on.model, bare)
    assert run.history.loss.tolist() == losses
    assert run.history.examples.iloc[-1] == 12 * 16 and run.validation < losses[0]


def test_accumulation_is_exact_for_unequal_lengths() -> None:
    """k micro-batches give the gradient of one big batch (in double precision, to rounding)."""
    whole, parts = language(), language()
    gradients: dict[str, list[torch.Tensor]] = {"whole": [], "parts": []}
    for name, on, micro in (("whole", whole, 0), ("parts", parts, 3)):
        on.model.double()

        def keep(run, name=name) -> None:
            gradients[name] += [p.grad.clone() for p in run.model.parameters()]

        fit(on, steps=1, batch_size=16, micro_batch=micro, optimizer="sgd", clip=None, before_step=[keep])
    assert (
        max(float((a - b).abs().max()) for a, b in zip(gradients["whole"], gradients["parts"], strict=True))
        < 1e-12
    )


@pytest.mark.parametrize(
    "optimizer, schedule", [("adamw", "cosine"), ("sgd", "plateau"), ("adamw", "one-cycle")]
)
def test_resumes_bit_for_bit(tmp_path: Path, optimizer: str, schedule: str) -> None:
    """Stopped at step 7 with a checkpoint of step 6, gone on:
    weights, averages, dropout and history equal an uninterrupted run's.
    """
    arguments = dict(
        steps=15,
        batch_size=8,
        micro_batch=4,
        learning_rate=1e-2,
        optimizer=optimizer,
        schedule=schedule,
        ema=0.9,
        evaluate_every=5,
        checkpoint_every=3,
    )
    whole, broken, resumed = small(0.5), small(0.5), small(0.5)
    expected = fit(whole, checkpoint_folder=tmp_path / "whole", **arguments)

    def interrupt(run) -> None:
        run.stop = run.step == 7

    fit(broken, checkpoint_folder=tmp_path / "kept", callbacks=[interrupt], **arguments)
    assert not same(whole.model, broken.model)
    run = fit(resumed, checkpoint_folder=tmp_path / "kept", **arguments)
    assert same(whole.model, resumed.model)
    drop = ["seconds"]
    assert expected.history.drop(columns=drop).equals(
        run.history.drop(columns=drop)[expected.history.drop(columns=drop).columns]
    )


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(small(), steps=2, checkpoint_folder=tmp_path / "kept", checkpoint_every=1)
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="checkpoint"):
        fit(small(), steps=2, checkpoint_folder=tmp_path / "kept", checkpoint_every=1)
    with pytest.raises(BadInput, match="steps: the checkpoint"):
        fit(small(), steps=2, checkpoint_folder=tmp_path / "other", checkpoint_every=1)
        fit(small(), steps=3, checkpoint_folder=tmp_path / "other", checkpoint_every=1)


def test_masks_stay_and_the_weights_left_train() -> None:
    on = small()
    layer = Layer("0", on.model[0])
    mask = torch.rand(16, 8) > 0.5
    layer.attach(Mask(mask))
    before = layer.weight.detach().clone()
    fit(on, steps=20, learning_rate=1e-2)
    assert torch.equal(layer.weight != 0, mask)
    assert (layer.weight[mask] != before[mask]).all()


def test_divergence_is_a_result() -> None:
    """A quadratic at ten times its largest stable learning rate."""
    on = Subject(
        "quadratic",
        nn.Linear(1, 1, bias=False),
        CustomLoss(lambda output, batch: 0.5 * output.square().mean()),
        {"train": {"inputs": torch.ones(4, 1)}},
    )
    run = fit(
        on,
        steps=4000,
        batch_size=4,
        learning_rate=20.0,
        optimizer={"name": "sgd", "momentum": 0.0},
        schedule="constant",
        clip=None,
    )
    assert run.diverged and run.step < 4000 and run.validation == float("inf")


def test_averaged_weights_follow_their_recursion() -> None:
    on = small()
    seen = []
    start = copy.deepcopy(on.model.state_dict())
    fit(
        on,
        steps=5,
        learning_rate=1e-2,
        ema=0.75,
        callbacks=[lambda run: seen.append(copy.deepcopy(run.model.state_dict()))],
    )
    expected = seen[0]  # the first update copies (torch's AveragedModel)
    for state in seen[1:]:
        expected = {k: 0.75 * expected[k] + 0.25 * state[k] for k in state}
    assert start.keys() == expected.keys()
    for key, value in on.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision: str) -> None:
    on = small()
    run = fit(on, steps=60, learning_rate=1e-2, precision=precision)
    assert run.history.loss.iloc[-5:].mean() < 0.7 * run.history.loss.iloc[0]
    assert all(p.dtype == torch.float32 for p in on.model.parameters())


def test_the_callers_generator_is_left_alone() -> None:
    on = small(0.5)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(on, steps=2)
    assert torch.equal(torch.rand(1), expected)


def test_order_visits_everything_equally_often() -> None:
    stream = torch.cat([take(10, 0, 0, 7), take(10, 0, 7, 16), take(10, 0, 23, 7)])
    assert torch.equal(torch.bincount(stream, minlength=10), torch.full((10,), 3))
    assert not torch.equal(take(10, 0, 0, 10), take(10, 0, 10, 10)) and not torch.equal(
        take(10, 0, 0, 10), take(10, 1, 0, 10)
    )
    sampler = StreamBatchSampler(10, 4, epochs=1.5)
    assert [len(b) for b in sampler] == [4, 4, 4, 3]
    loader = torch.utils.data.DataLoader(list(range(10)), batch_sampler=StreamBatchSampler(10, 4))
    assert torch.equal(torch.cat(list(loader)), take(10, 0, 0, 10))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "steps"),
        ({"optimizer": "adamv"}, "did you mean adamw"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"schedule": {"name": "cosine", "phi": 1}}, "cosine has no such option .* of uba"),
        ({"split": "no"}, "split"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fit(small(), **({"steps": 2} | wrong))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tests.training.test_loop import language
from workbench.training import Training, fit
on = language()
run = fit(on, steps=3, batch_size=8, micro_batch=int(sys.argv[2]), optimizer="sgd", learning_rate=0.5)
import os
if os.environ.get("RANK", "0") == "0":
    from safetensors.torch import save_file
    save_file({k: v.clone() for k, v in on.model.state_dict().items()}, sys.argv[1])
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Through accelerate on two processes (gloo): the same weights as one process,
    whatever each process's token count.
    """
    from safetensors.torch import load_file

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    plain = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path / "one"), "0"], check=True, env=plain, cwd=root)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "two"), "2"],
        env=plain,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)


def dropping() -> Subject:
    """A model that draws dropout from a generator, so that parts of a run must hand it on."""
    on = small()
    return on.with_model(nn.Sequential(on.model[0], nn.Dropout(0.3), *list(on.model)[1:]))


@pytest.mark.parametrize("own", [True, False])
def test_parts_of_a_run_add_up_to_the_whole(own: bool) -> None:
    """advance(3) and advance(4) are advance(7), bit for bit, whatever the caller draws in between."""
    arguments = dict(steps=7, batch_size=25, learning_rate=1e-2, ema=0.5, seed=3, own_generator=own)
    whole, parts = dropping(), dropping()
    torch.manual_seed(1)
    run = Training.start(whole, **arguments)
    run.advance(7)
    run.finish()
    torch.manual_seed(1)
    again = Training.start(parts, **arguments)
    again.advance(3)
    assert again.step == 3 and len(again.rows) == 3 and not parts.model.training
    if own:
        torch.rand(5)
        parts.evaluate("validation")
    again.advance(4)
    again.advance(4)
    again.finish()
    assert again.step == 7 and same(whole.model, parts.model)
    columns = ["loss", "lr", "gradient_norm", "examples"]
    assert run.history[columns].equals(again.history[columns])


def test_a_part_of_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    arguments = dict(steps=6, batch_size=25, learning_rate=1e-2, checkpoint_every=1)
    whole, broken, resumed = dropping(), dropping(), dropping()
    fit(whole, **arguments)
    Training.start(broken, checkpoint_folder=tmp_path / "kept", **arguments).advance(2)
    run = Training.start(resumed, checkpoint_folder=tmp_path / "kept", **arguments)
    assert run.step == 2
    run.advance()
    assert run.step == 6 and same(whole.model, resumed.model)


def test_parameters_that_come_later_learn_at_their_own_rate() -> None:
    on = small()
    late = on.model[0].bias
    late.requires_grad_(False)
    run = Training.start(on, steps=6, schedule="linear", warmup=0.0, learning_rate=1e-2)
    run.advance(2)
    before = late.detach().clone()
    late.requires_grad_(True)
    run.learn([late, on.model[0].weight], rate=10.0)
    run.advance(2)
    assert not torch.equal(before, late.detach()) and len(run.optimizer.param_groups[-1]["params"]) == 1
    assert run.optimizer.param_groups[-1]["lr"] == pytest.approx(10 * run.lr)
    assert run.lr == pytest.approx(1e-2 * (1 - 4 / 6))


def test_orders_are_functions_of_the_position() -> None:
    generator = torch.Generator().manual_seed(2)
    passes = [torch.randperm(10, generator=generator) for _ in range(3)]
    expected = [p[i : i + 4] for p in passes for i in (0, 4)]
    for made in (WholeBatches(2), WholeBatches(2)):
        found = [made.take(10, 4 * i, 4) for i in range(6)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(made.take(10, 4, 4), expected[1])
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(10, (4,), generator=generator) for _ in range(4)]
    order = Draws(5)
    assert all(torch.equal(order.take(10, 4 * i, 4), d) for i, d in enumerate(drawn))
    assert torch.equal(order.take(10, 8, 4), drawn[2]) and torch.equal(Draws(5).take(10, 12, 4), drawn[3])


def test_settings_of_one_release_ago_and_unknown_ones() -> None:
    with pytest.warns(FutureWarning, match="learning_rate"):
        assert fit(small(), steps=1, lr=1e-2, warmup=0.0).rows[0]["lr"] == 1e-2
    with pytest.warns(FutureWarning, match="optimizer_options"):
        run = fit(small(), steps=1, optimizer_options={"betas": (0.5, 0.5)})
    assert run.optimizer.param_groups[0]["betas"] == (0.5, 0.5)
    with pytest.raises(BadInput, match="did you mean batch_size"):
        fit(small(), steps=1, batch_sise=3)
