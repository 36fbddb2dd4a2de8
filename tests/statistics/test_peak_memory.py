"""What a run holds at most, beside the size of its model: resident memory of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Runs an instrument on a checkpoint, after it has run on a small one: libraries that are loaded late are no
#: part of it. What is printed: the peak above what was held before the checkpoint was opened, as a multiple
#: of the model's bytes.
SCRIPT = """
import gc, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import workbench
from workbench.progress import Progress
from workbench.storage.resident import trim

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what + ":"))

def run(folder, name, fields):
    on = workbench.subject(folder, data="random", max_length=8, max_examples=40)
    size = sum(p.numel() * p.element_size() for p in on.model.parameters())
    made = workbench.catalog()[name](calibration_examples=8, predict_examples=0, **fields)
    made.run(on, Progress(), cache=False)
    return size

small, large, name, fields = sys.argv[1:]
fields = json.loads(fields)
run(small, name, fields)
gc.collect()
trim()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
size = run(large, name, fields)
print(json.dumps((resident("VmHWM") - before) / size))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Llamas: one of no size, and one of 79 MB, all but 1 % in its blocks: `computed_once` keeps none."""
    import transformers

    root = tmp_path_factory.mktemp("models")
    for name, width, layers in (("small", 32, 2), ("large", 256, 30)):
        config = transformers.LlamaConfig(
            vocab_size=200,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(root / name)
    return root


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="Linux tells what is resident")
@pytest.mark.parametrize(
    ("name", "fields", "most"),
    [
        ("prune", {"method": "wanda"}, 1.9),
        pytest.param("quantize", {"rounding": "gptq", "test_examples": 0}, 1.7, marks=pytest.mark.long),
        pytest.param("prune", {"method": "sparsegpt"}, 1.9, marks=pytest.mark.long),
    ],
    ids=["wanda", "gptq", "sparsegpt"],
)
def test_a_run_holds_little_more_than_its_model(name, fields, most, folders, tmp_path):
    """Kind: a run copies the model for no reason, or keeps of all blocks what it needs of one.

    A block's dense weights are given back when its changed ones are there: what is held is one model, one
    block, a byte of mask a weight (`prune`) and the activations of one batch. A dense copy would be one more.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORKBENCH_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folders / "small"), str(folders / "large")]
    done = subprocess.run(
        [*command, name, json.dumps(fields)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < most
