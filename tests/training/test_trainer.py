"""The bench's optimizers and schedules in the Hugging Face Trainer, as they are."""

from __future__ import annotations

import pytest
import torch

from tests.training.test_loop import language
from workbench.training.optimizer.optimizers import make_optimizer
from workbench.training.schedule.schedules import make_schedule, sampled


class Rows(torch.utils.data.Dataset):
    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


@pytest.mark.parametrize(("name", "options"), [("muon", {}), ("galore", {"rank": 4}), ("mkor", {"every": 2})])
def test_a_trainer_steps_with_them(name: str, options: dict, tmp_path) -> None:
    """The rate of every logged step is the schedule's, and the loss falls."""
    transformers = pytest.importorskip("transformers")
    on, steps, lr = language(), 12, 0.1 if name == "mkor" else 0.02
    optimizer = make_optimizer({"name": name, **options}, lr, 0.01)(on.model)
    schedule = make_schedule("rex", warmup=0.25)(optimizer, steps)
    settings = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        on.model, settings, train_dataset=Rows(on.split("train")), optimizers=(optimizer, schedule)
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert [row["learning_rate"] for row in logged] == pytest.approx(
        list(sampled("rex", steps, warmup=0.25, learning_rate=lr))
    )
    assert logged[-1]["loss"] < logged[0]["loss"]
