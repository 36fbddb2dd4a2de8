from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import workbench
from tests.conftest import ARCHITECTURES
from workbench.statistics import InputCapture, example_gradients, second_moments
from workbench.statistics.inputs import add_upper, mirror
from workbench.subjects import Mask, all_layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_layer_sees_its_inputs_once(architecture, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    layers = subject.layers()
    found = second_moments(subject, layers, examples=8, batch_size=4)
    hooked: dict[str, torch.Tensor] = {}

    def hook(name):
        def see(module, args):
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            hooked[name] = hooked.get(name, 0) + rows.T @ rows

        return see

    handles = [
        layer.module.register_forward_pre_hook(hook(layer.name)) for layer in layers if len(layer.shape) == 2
    ]
    with torch.no_grad():
        for batch in subject.batches("calibration", 4, 8):
            subject.task.output(subject.model, batch)
    for handle in handles:
        handle.remove()
    for layer in layers:
        moments = found[layer.name]
        assert moments.gram is not None and moments.tokens.sum() > 0
        assert torch.allclose(moments.gram.diagonal(dim1=-2, dim2=-1), moments.square, rtol=1e-4, atol=1e-4)
        if layer.name in hooked:
            assert torch.allclose(moments.gram[0], hooked[layer.name], rtol=1e-4, atol=1e-4)
        else:  # every token goes to two experts
            tokens = subject.splits["calibration"]["input_ids"][:8].numel()
            assert moments.tokens.sum() == 2 * tokens


@pytest.mark.parametrize("count, dtype", [(1, torch.float32), (2, torch.float32), (1, torch.float64)])
def test_half_a_product_and_its_mirror_are_the_whole(count, dtype, request):
    """By BLAS (float32, one thread) and by blocks of columns (anything else), added to what is there,
    exactly symmetric.
    """
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(count)
    for width in (5, 256, 600):
        rows, more = torch.randn(40, width, dtype=dtype), torch.randn(7, width, dtype=dtype)
        gram = torch.zeros(width, width, dtype=dtype)
        for part in (rows, more, rows[:0], more.T.contiguous().T):
            add_upper(gram, part)
        mirror(gram)
        assert torch.equal(gram, gram.T) and torch.allclose(
            gram, rows.T @ rows + 2 * more.T @ more, atol=1e-4
        )


def test_a_pass_ends_with_the_last_layer_unless_it_may_be_met_again():
    """The head is not reached once a whole pass has shown each layer once;
    a layer that is called twice is followed to the end.
    """
    data = {"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))}

    class Twice(nn.Module):
        def __init__(self, repeat):
            super().__init__()
            self.first, self.head, self.repeat, self.heads = nn.Linear(4, 4), nn.Linear(4, 3), repeat, 0

        def forward(self, x):
            for _ in range(self.repeat):
                x = torch.tanh(self.first(x))
            self.heads += 1
            return self.head(x)

    for repeat in (1, 2):
        net = Twice(repeat)
        subject = workbench.subject(net, data=data)
        net.heads = 0
        found = second_moments(subject, subject.layers("first"), "train", examples=20, batch_size=5)["first"]
        assert net.heads == (1 if repeat == 1 else 4) and found.tokens == 20 * repeat
        rows = [torch.cat([b["inputs"] for b in subject.batches("train", 5, 20)])]
        for _ in range(1, repeat):
            rows.append(torch.tanh(net.first(rows[-1])).detach())
        assert torch.allclose(found.gram[0], sum(x.T @ x for x in rows), atol=1e-4) and torch.allclose(
            found.total[0], sum(x.sum(0) for x in rows), atol=1e-4
        )


def test_padding_does_not_count(checkpoints):
    subject = workbench.subject(checkpoints["bert"], data="random", max_length=12)
    layers = subject.layers()
    for split in subject.splits.values():
        split["attention_mask"][:, 7:] = 0
        split["attention_mask"][0] = 1  # keeps the width: nothing is trimmed
    found = second_moments(subject, layers, examples=4, batch_size=4)
    assert found[layers[0].name].tokens == 12 + 3 * 7


def test_layers_that_read_one_tensor_are_handed_one_tensor(checkpoints):
    """Query, key and value of a padded batch: the padding is taken out once,
    so that their second moment is computed once.
    """
    subject = workbench.subject(checkpoints["bert"], data="random", max_length=12)
    layers = subject.layers("*.0.attention.self.*")
    batch = next(subject.batches("calibration", 4))
    rows = []
    with torch.no_grad(), InputCapture(layers, lambda layer, expert, x: rows.append(x)) as capture:
        capture.keep = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        capture.keep[:, 9:] = False
        subject.task.output(subject.model, batch)
    assert len(rows) == 3 and rows[0] is rows[1] is rows[2] and rows[0].shape == (36, layers[0].shape[1])


def test_what_is_written_into_a_tensor_is_seen_by_the_next_layer():
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    model = nn.ModuleList([first, second])
    rows, x = [], torch.ones(2, 5, 4)
    with (
        torch.no_grad(),
        InputCapture(all_layers(model), lambda layer, expert, x: rows.append(x.clone())) as capture,
    ):
        capture.keep = torch.ones(2, 5, dtype=torch.bool)
        first(x)
        x += 1
        second(x)
    assert (rows[0] == 1).all() and (rows[1] == 2).all()


def test_a_masked_layer_is_still_recognised():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    subject = workbench.subject(net, data={"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))})
    subject.layers()[0].attach(Mask(torch.rand(8, 4) < 0.5))
    seen = []
    with InputCapture(
        subject.layers(), lambda layer, expert, rows: seen.append((layer.name, tuple(rows.shape)))
    ):
        subject.task.output(subject.model, next(subject.batches("test", 5)))
    assert seen == [("0", (5, 4)), ("1", (5, 8))]


def test_per_example_gradients_average_to_the_batch_gradient():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    subject = workbench.subject(net, data={"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))})
    layers = subject.layers()
    each = list(example_gradients(subject, layers, "train", examples=10))
    batch = next(subject.batches("train", 10))
    want = torch.autograd.grad(subject.loss(batch), [layer.original for layer in layers])
    for index, grad in enumerate(want):
        assert torch.allclose(torch.stack([g[index] for g in each]).mean(0), grad, atol=1e-6)
