"""GPTQ of llm-compressor on given layers or a given model, in that library's own environment: what
`bench_gptq` starts there. Imports nothing of the workbench.

    python gptq_peer.py versions
    python gptq_peer.py layers IN.safetensors OUT.safetensors REPEATS
    python gptq_peer.py model FOLDER TOKENS.safetensors OUT.safetensors

The last line that it prints is JSON: versions, and CPU seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
GROUP = 64


def scheme(actorder: str | None) -> dict[str, object]:
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": GROUP,
        "actorder": actorder,
    }


def seconds(function: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return statistics.median(found)


def layers(given: str, put: str, repeats: int) -> dict[str, object]:
    """Each layer alone, by the function that the library rounds with; its grid is the given one."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    tensors, found, spent = load_file(given), {}, {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        weight, gram, scale, zero = (
            tensors[f"{name}/{part}"] for part in ("weight", "gram", "scale", "zero")
        )
        for order in (None, "static"):
            arguments = QuantizationArgs(**scheme(order))

            def solve(
                arguments: QuantizationArgs = arguments, given: tuple[torch.Tensor, ...] = ()
            ) -> object:
                one, hessian, steps, points = given
                return quantize_weight(
                    one.clone()[None], hessian.clone()[None], steps[None], points[None], None, arguments
                )

            inputs = (weight, gram, scale, zero)
            key = f"{name}/{order or 'in order'}"
            with torch.no_grad():
                found[key] = solve(given=inputs)[0][0].contiguous()  # type: ignore[index]
                spent[key] = seconds(lambda inputs=inputs, solve=solve: solve(given=inputs), repeats)
    save_file(found, put)
    return {"seconds": spent}


def model(folder: str, tokens: str, put: str) -> dict[str, object]:
    """A whole model, block by block, by the library's own entry."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(tokens)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": scheme(None)}},
        ignore=["lm_head"],
        actorder=None,
    )
    began = time.process_time()
    oneshot(
        model=made,
        dataset=data,
        recipe=recipe,
        processor=AutoTokenizer.from_pretrained(folder),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        pipeline="sequential",
        batch_size=16,
    )
    spent = time.process_time() - began
    values = {
        name: module.weight.detach().contiguous()
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    save_file(values, put)
    return {"seconds": spent}


if __name__ == "__main__":
    torch.set_num_threads(1)
    report: dict[str, object] = {"versions": {name: version(name) for name in PACKAGES}}
    if sys.argv[1] == "layers":
        report |= layers(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1] == "model":
        report |= model(sys.argv[2], sys.argv[3], sys.argv[4])
    print(json.dumps(report))
