"""Shared fixtures: one compute thread, a private cache, small random checkpoints of five architectures."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when a kernel is decorated, so it has to be set before anything imports one;
# compilation is tested in subprocesses.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the suite was started in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent


#: Tests that took over some seconds, by measurement; tests of many minutes are marked in their files.
LONG = Path(__file__).parent / "long.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that are left out otherwise as well")
    parser.addoption("--only-long", action="store_true", help="run these only")
    parser.addoption(
        "--resume",
        metavar="FILE",
        help="leave out the tests that FILE says have passed on this very code, and add those that pass",
    )


def code() -> str:
    """Hash of everything a test can depend on here."""
    found = hashlib.sha256()
    for folder in ("workbench", "widgets", "tests", "notebooks", "docs"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in {".py", ".json", ".ipynb", ".md", ".css", ".js"} and file.is_file():
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


class Resumed:
    """Keeps which tests have passed, in the process that hears of all of them."""

    def __init__(self, file: Path) -> None:
        self.file, self.code = file, code()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.passed = {line.partition(" ")[2] for line in lines if line.startswith(f"{self.code} ")}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        leave_out(config, items, [item for item in items if item.nodeid in self.passed])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(f"{self.code} {report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--resume"):
        config.pluginmanager.register(Resumed(Path(file)))


def leave_out(config: pytest.Config, items: list[pytest.Item], those: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=those)
    left = {id(item) for item in those}
    items[:] = [item for item in items if id(item) not in left]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    measured = {line.split(" ", 1)[1] for line in LONG.read_text(encoding="utf-8").splitlines()}
    for item in items:
        if item.nodeid in measured:
            item.add_marker(pytest.mark.long)
    long = [item for item in items if item.get_closest_marker("long")]
    if config.getoption("--only-long"):
        chosen = {id(item) for item in long}
        leave_out(config, items, [item for item in items if id(item) not in chosen])
    elif not config.getoption("--long") and os.environ.get("WORKBENCH_TEST_LONG") != "1":
        for item in long:
            item.add_marker(pytest.mark.skip(reason="long: give --long, or set WORKBENCH_TEST_LONG=1"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published run tables that lies beside the checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(
            "no ../shared/data beside the checkout: published run tables are not shipped with the project"
        )
    return folder


def new_cache(folder: Path) -> Path:
    """A cache folder without results, with the trained digits-vit in it:
    to train it again in each takes fifteen seconds.
    """
    import workbench
    from workbench.storage import cache_folder

    workbench.subject("digits-vit")
    for kept in (cache_folder() / "subjects").glob("digits-vit-*"):
        shutil.copytree(kept, folder / "subjects" / kept.name)
    return folder


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    folder = new_cache(tmp_path / "cache")
    monkeypatch.setenv("WORKBENCH_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.manual_seed(0)


def tiny(architecture: str) -> torch.nn.Module:
    """A small random model of a stock transformers class, default attention, unedited."""
    import transformers as t

    torch.manual_seed(0)
    if architecture == "bert":
        return t.BertForSequenceClassification(
            t.BertConfig(
                vocab_size=99,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=64,
                num_labels=3,
            )
        )
    if architecture == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
            )
        )
    if architecture == "llama":
        return t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        )
    if architecture == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=99,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )
    if architecture == "vit":
        return t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=16,
                patch_size=8,
                num_labels=3,
            )
        )
    if architecture == "mixtral":
        return t.MixtralForCausalLM(
            t.MixtralConfig(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=64,
            )
        )
    raise KeyError(architecture)


ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """architecture -> folder written by save_pretrained."""
    root = tmp_path_factory.mktemp("checkpoints")
    for architecture in ARCHITECTURES:
        tiny(architecture).save_pretrained(root / architecture)
    return {a: root / a for a in ARCHITECTURES}
