"""The fresh process of `workbench.storage.reopening`: open what was written and say what it computes.

python -m workbench.storage.reopened saved FOLDER SPLIT THREADS             the loss, as JSON
python -m workbench.storage.reopened checkpoint FOLDER TASK GIVEN FOUND THREADS
python -m workbench.storage.reopened onnx FILE TASK GIVEN FOUND THREADS     outputs of GIVEN, into FOUND
python -m workbench.storage.reopened gguf FILE TASK GIVEN FOUND THREADS     loss of GIVEN, as JSON
"""

from __future__ import annotations

import json
import os
import sys

from workbench.storage.together import PARENT, ends_with_its_parent

if __name__ == "__main__":  # before anything slow is imported: the parent may be gone by then
    ends_with_its_parent(int(os.environ.get(PARENT, os.getppid())))

import torch
from safetensors.torch import load_file, save_file

from workbench.storage.reopening import probe_loss


def answer(kind: str, place: str, *more: str) -> dict[str, float]:
    torch.set_num_threads(int(more[-1]))
    if kind == "saved":
        from workbench.subjects.loaders import subject

        return {"loss": probe_loss(subject(place), more[0])}
    task, given, found = more[:3]
    columns = load_file(given)
    if kind == "gguf":
        return {"loss": loss(place, task, columns)}
    save_file({"output": run(place, columns) if kind == "onnx" else opened(place, task, columns)}, found)
    return {}


def opened(folder: str, task: str, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs of an exported checkpoint."""
    from workbench.subjects.loaders import subject

    on = subject(folder, data="random", task=task)
    on.model.eval()
    with torch.no_grad():
        return on.task.output(on.model, columns).contiguous()


def loss(file: str, task: str, columns: dict[str, torch.Tensor]) -> float:
    """Loss of an exported model file on these columns."""
    from workbench.subjects.checkpoints import open_model
    from workbench.subjects.tasks import TASK

    model, _ = open_model(file, local=True)
    with torch.no_grad():
        return float(TASK.chosen(task).value().loss(model, columns))


def run(file: str, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs of an ONNX file, its quantized products in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {wanted.name: columns[wanted.name].numpy() for wanted in session.get_inputs()}
    return torch.from_numpy(session.run(None, given)[0]).contiguous()


if __name__ == "__main__":
    try:
        print(json.dumps(answer(*sys.argv[1:])))
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(1)
