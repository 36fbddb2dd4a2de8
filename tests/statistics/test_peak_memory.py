"""What a run holds at most, beside the size of its model: resident memory of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Opens a checkpoint and runs instruments on it, after a run on a small one has loaded what is loaded late.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import workbench
from workbench.progress import Progress

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what + ":"))

def run(folder, name, fields):
    on = workbench.subject(folder, data="random", max_length=16)
    size = sum(p.numel() * p.element_size() for p in on.model.parameters())
    made = workbench.catalog()[name](calibration_examples=16, predict_examples=0, **fields)
    made.run(on, Progress(), cache=False)
    return size

small, large, name, fields = sys.argv[1:]
fields = json.loads(fields)
run(small, name, fields)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
size = run(large, name, fields)
print(json.dumps((resident("VmHWM") - before) / size))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Llamas: one of no size, one of 108 MB, nearly all of it in its eight blocks."""
    import transformers

    root = tmp_path_factory.mktemp("models")
    for name, width, layers in (("small", 32, 2), ("large", 512, 8)):
        config = transformers.LlamaConfig(
            vocab_size=200,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(root / name)
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "fields", "most"),
    [
        ("prune", {"method": "wanda"}, 1.6),
        pytest.param("prune", {"method": "sparsegpt"}, 2.4, marks=pytest.mark.long),
        pytest.param("quantize", {"rounding": "gptq", "test_examples": 0}, 2.2, marks=pytest.mark.long),
    ],
    ids=["wanda", "sparsegpt", "gptq"],
)
def test_a_run_holds_little_more_than_its_model(name, fields, most, folders, tmp_path):
    """Kind: a run copies the model for no reason, or keeps of all blocks what it needs of one.

    Wanda: the weights and a byte of mask each. SparseGPT and GPTQ: every weight of a block once more.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORKBENCH_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folders / "small"), str(folders / "large")]
    done = subprocess.run(
        [*command, name, json.dumps(fields)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < most
