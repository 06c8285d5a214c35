"""Every block of python in the READMEs, run as it stands in a process and a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

BEFORE = "import tests.torchvision_operators\n"  # which these libraries import
# what a reader has before the three lines for a library
HAS = {
    "bonus_ops.integrations.transformers": """
import torch, transformers
from transformers import Trainer
from bonus_ops import ExampleTracker
config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 intermediate_size=8, num_labels=4, max_position_embeddings=8)
model = transformers.BertForSequenceClassification(config)
data = [{"input_ids": torch.randint(20, (8,)), "labels": i % 4, "index": i} for i in range(16)]
args = transformers.TrainingArguments("out", num_train_epochs=2, use_cpu=True, report_to=[],
                                      remove_unused_columns=False)
""",
    "bonus_ops.integrations.lightning": """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from bonus_ops import ExampleTracker, bonus_cross_entropy_with_scores
data = [(i, torch.randn(6), i % 4) for i in range(16)]
loader = DataLoader(data, batch_size=8)

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(6, 4)

    def training_step(self, batch, batch_idx):
        index, input, target = batch
        loss, scores = bonus_cross_entropy_with_scores(self.body(input), target)
        return {"loss": loss, "scores": scores, "index": index}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

model = Model()
""",
    "bonus_ops.integrations.timm": """
import torch
from bonus_ops import LogBonus
model, input, target = torch.nn.Linear(6, 4), torch.randn(8, 6), torch.randint(4, (8,))
""",
}
TRACKED = "\nassert tracking.tracker.count.tolist() == [2] * 16\n"  # both libraries, all examples in both epochs
NEEDS = {  # what a block with these words needs
    "sklearn": "sklearn",
    ".plot(": "matplotlib",
    "triton.jit": "triton",
    "integrations.timm": "timm",
    "integrations.lightning": "lightning",
    "integrations.transformers": "transformers",
}

ONE_BY_ONE = """
import os, runpy, sys, traceback
import torch._dynamo  # the slow imports, once: each block is a fork

for block in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os.chdir(str(block))
        said = os.open("said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        code = 1
        try:
            runpy.run_path("block.py", run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class Block(NamedTuple):
    where: str
    code: str

    @property
    def missing(self) -> list[str]:
        return [name for sign, name in NEEDS.items() if sign in self.code and not importlib.util.find_spec(name)]


def blocks() -> list[Block]:
    found = []
    for path in sorted([ROOT / "README.md", *ROOT.glob("*/README.md")]):
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)):
            had = "".join(BEFORE + has for module, has in HAS.items() if module in code)
            after = TRACKED if "tracking" in code else ""
            found.append(Block(f"{path.relative_to(ROOT)} {i + 1}", had + code + after))
    return found


BLOCKS = blocks()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Run every block; return the exit status of each, and what it said."""
    folder, run = tmp_path_factory.mktemp("readmes"), [block for block in BLOCKS if not block.missing]
    for number, block in enumerate(run):
        (folder / str(number)).mkdir()
        (folder / str(number) / "block.py").write_text(block.code)  # a file, as Triton needs
    (folder / "all.py").write_text(ONE_BY_ONE)
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "all.py", str(len(run))], cwd=folder, env=variables, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = [(folder / str(number) / "said").read_text() for number in range(len(run))]
    return {block.where: each for block, each in zip(run, zip(done.stdout.split(), said, strict=True), strict=True)}


def test_the_readmes_have_code_to_run():
    assert any(block.where.startswith("README") for block in BLOCKS)
    assert all(sum(module in block.code for block in BLOCKS) == 1 for module in HAS)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])
def test_the_code_in_a_readme_runs_as_it_stands(block, outcomes):
    if block.missing:
        pytest.skip(f"{', '.join(block.missing)} is not installed")
    status, said = outcomes[block.where]
    assert status == "0", said


def links() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), link)
        for path in sorted([ROOT / "README.md", *ROOT.glob("*/README.md")])
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text())
        if not link.startswith("http")
    ]


@pytest.mark.parametrize(("where", "link"), links())
def test_a_link_in_a_readme_leads_somewhere(where, link):
    path, _, heading = link.partition("#")
    file = (ROOT / where).parent / path
    assert file.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
