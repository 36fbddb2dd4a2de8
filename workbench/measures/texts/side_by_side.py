"""The `side-by-side` instrument: two language models go on with the same texts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.measures.changed_model import BesideChanged, changed_parameter
from workbench.measures.language import pair_of
from workbench.measures.reference import on_its_data
from workbench.measures.texts.continued import (
    continued,
    ends_of,
    last_logits,
    parting,
    repetition,
    until_end,
)
from workbench.measures.texts.side_by_side_result import SideBySideResult
from workbench.measures.texts.spelled import Words
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.tasks import CausalLM

WAYS = {"greedy": ("greedy",), "sampled": ("sampled",), "both": ("greedy", "sampled")}
AT_ONCE = 8  # texts
FIRST = 5  # words of both models kept of the place where they part


class SideBySide(BesideChanged):
    """Do two language models write the same? Both go on with the same texts, greedily and with the same
    random numbers; the first differing token, the divergence there, and how much each repeats itself.
    """

    summary_line: ClassVar[str] = "two language models go on with the same texts; where they part"

    changed: str = changed_parameter()
    test_examples: int = parameter(20, "texts", ge=1, le=1000, unit="examples", group="Data")
    split: str = parameter("test", "split the texts come from", group="Data")
    prompt_tokens: int = parameter(32, "of each text that both models read", ge=1, unit="tokens")
    new_tokens: int = parameter(64, "that both models write", ge=1, le=4096, unit="tokens")
    choose: Literal["greedy", "sampled", "both"] = parameter(
        "both", "the next word: the most probable one, one drawn with the seed, or both ways"
    )
    chat: bool = parameter(True, "put the text into the tokenizer's chat template where it has one")

    @classmethod
    def result_class(cls) -> type[Result]:
        return SideBySideResult

    def check_task(self, on: Subject) -> None:
        check_writes(on)

    def _run(self, on: Subject, progress: Progress) -> Result:
        return self.between(on, self.changed_model(on), progress)

    def between(self, dense: Subject, changed: Subject, progress: Progress | None = None) -> Result:
        """The result for a changed model that is at hand; not cached."""
        check_writes(dense)
        progress = progress or Progress()
        changed = on_its_data(dense, changed)
        dense.model.eval()
        changed.model.eval()
        prompts = self.prompts(dense)
        words = Words(dense.tokenizer)
        rows, tokens, tops = list[dict[str, Any]](), list[pd.DataFrame](), list[pd.DataFrame]()
        work = [(way, texts) for texts in together(prompts) for way in WAYS[self.choose]]
        for way, texts in progress.track(work, "texts continued", len(work)):
            read = torch.stack([prompts[text] for text in texts]).to(dense.device)
            draws = torch.cat([self.draws(text) for text in texts]) if way == "sampled" else None
            wrote = [
                until_end(continued(m.model, read, self.new_tokens, draws).cpu(), ends_of(dense.model))
                for m in (dense, changed)
            ]
            for text, one, two in zip(texts, *wrote, strict=True):
                row, top = self.compared(dense, changed, prompts[text], one, two, words)
                about = {"text": text, "way": way}
                rows.append(about | row)
                spelled = {"dense": map(words, one.tolist()), "changed": map(words, two.tolist())}
                tokens.append(pd.DataFrame(spelled).assign(step=range(self.new_tokens), **about))
                if top is not None:
                    tops.append(top.assign(**about))
        rows.sort(key=lambda row: row["text"])
        return self.gathered(dense, changed, rows, tokens, tops)

    def compared(
        self, dense: Subject, changed: Subject, prompt: Tensor, one: Tensor, two: Tensor, words: Words
    ) -> tuple[dict[str, Any], pd.DataFrame | None]:
        """A row of the table for what both wrote, and their first words where they part."""
        place = parting(one, two)
        row: dict[str, Any] = {
            "prompt": "".join(map(words, prompt.tolist())),
            "parts_at": float("nan") if place is None else float(place),
            "kl": float("nan"),
            "dense_repetition": repetition(one[one >= 0].tolist()),
            "changed_repetition": repetition(two[two >= 0].tolist()),
        }
        if place is None:
            return row, None
        context = torch.cat([prompt, one[:place]]).to(dense.device)
        row["kl"], top = self.apart(dense, changed, context, words)
        return row, top

    def prompts(self, on: Subject) -> dict[int, Tensor]:
        """Row of the split -> what is read of it."""
        columns = on.split(self.split)
        found = {}
        for row in range(min(on.size(self.split), self.test_examples)):
            ids = columns["input_ids"][row]
            if "attention_mask" in columns:
                ids = ids[columns["attention_mask"][row] != 0]
            found[row] = self.in_template(on.tokenizer, ids[: self.prompt_tokens])
        return found

    def in_template(self, tokenizer: Any, ids: Tensor) -> Tensor:
        if not self.chat or not getattr(tokenizer, "chat_template", None):
            return ids
        said = [{"role": "user", "content": tokenizer.decode(ids.tolist(), skip_special_tokens=True)}]
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    def draws(self, text: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + text) % 2**63)
        return torch.rand(1, self.new_tokens, generator=generator, dtype=torch.double)

    def apart(
        self, dense: Subject, changed: Subject, context: Tensor, words: Words
    ) -> tuple[float, pd.DataFrame]:
        """The divergence after a context, and both models' first words."""
        logits = [last_logits(subject.model, context)[None].double() for subject in (dense, changed)]
        held: dict[str, Any] = {"rank": range(1, FIRST + 1)}
        for name, values in zip(("dense", "changed"), logits, strict=True):
            best, index = values.softmax(-1)[0].topk(FIRST)
            held |= {name: [words(int(i)) for i in index], f"{name}_p": best.cpu().numpy()}
        target = torch.zeros(1, dtype=torch.long, device=logits[0].device)
        return float(pair_of(logits[0], logits[1], target)["divergence"]), pd.DataFrame(held)

    def gathered(
        self, dense: Subject, changed: Subject, rows: list[Any], tokens: list[Any], tops: list[Any]
    ) -> Result:
        columns = ["text", "way", "prompt", "parts_at", "kl", "dense_repetition", "changed_repetition"]
        table = pd.DataFrame(rows, columns=columns)
        facts: dict[str, Any] = {
            "reference": dense.name,
            "changed": changed.name,
            "texts": len(set(table["text"])),
        }
        for way, mine in table.groupby("way"):
            apart = mine["parts_at"].fillna(self.new_tokens)
            facts |= {
                f"{way}_same": float(mine["parts_at"].isna().mean()),
                f"{way}_median_parting": float(np.median(apart)),
                f"{way}_repetition": float(mine["changed_repetition"].mean()),
                f"{way}_dense_repetition": float(mine["dense_repetition"].mean()),
            }
        tables = {"tokens": joined(tokens, ["dense", "changed", "text", "way", "step"])}
        tables["top"] = joined(tops, ["rank", "dense", "dense_p", "changed", "changed_p", "text", "way"])
        return self.result(table, facts, tables=tables)


def together(prompts: dict[int, Tensor]) -> list[list[int]]:
    """Texts of one length, at most eight, that are continued at once."""
    lengths: dict[int, list[int]] = {}
    for text, prompt in prompts.items():
        lengths.setdefault(len(prompt), []).append(text)
    return [texts[k : k + AT_ONCE] for texts in lengths.values() for k in range(0, len(texts), AT_ONCE)]


def joined(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def check_writes(on: Subject) -> None:
    """`BadInput` for a task that writes no text from left to right."""
    if not isinstance(on.task, CausalLM):
        raise BadInput(f"subject: the task {on.task.name} continues no text; side-by-side needs causal-lm")
