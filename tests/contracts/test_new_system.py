"""A newcomer's whole work is one file and one claim: registry, docs table, contract tests, `prove` and cascade TOML see it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SYSTEM = '''
"""Items in a fixed random order, the same for everybody."""
from dataclasses import dataclass
import torch
from shortlist.models.base import Cost, ItemScorer
from shortlist.registry import system

@dataclass(frozen=True, kw_only=True)
class ShuffledConfig:
    seed: int = 0
    """Seed of the order."""

@system("newcomer", stage="retrieval", paper="baseline", cold_users=True)
class Shuffled(ItemScorer):
    """Items in a fixed random order."""

    Config = ShuffledConfig

    def prepare(self, view):
        generator = torch.Generator().manual_seed(self.config.seed)
        self.buffer("order_N", torch.rand(self.space.num_items + 1, generator=generator))

    def score_all(self, batch):
        return self.order_N.repeat(batch.size, 1)

    def cost(self, shape, cached=False):
        return Cost(item_flops=1.0, bytes=4.0 * shape.num_items)
'''

CLAIM = """
from shortlist.evaluation.evidence import Claim, hold_if
from shortlist.registry import find

CLAIM = Claim(name="newcomer_is_found", systems=("newcomer",), claim="It is found.", data="none", protocol="none", bar="found = 1")

def run(lab):
    for seed in lab.seeds:
        lab.measure("registry", seed, lambda: {"found": float(find("newcomer").kind == "retriever")})

def judge(arms):
    return hold_if(arms["registry"].metrics["found"].mean == 1, "it is in the registry")
"""

RUN = """
[stages.retrieval]
systems = ["newcomer"]
keep = 20

[systems.newcomer]
seed = 3
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    (folder / "systems").mkdir()
    (folder / "evidence").mkdir()
    (folder / "systems" / "newcomer.py").write_text(SYSTEM)
    (folder / "evidence" / "newcomer_is_found.py").write_text(CLAIM)
    (folder / "run.toml").write_text(RUN)
    return folder


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "SHORTLIST_SYSTEMS": str(folder / "systems")}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_registry_and_docs_table_list_it_with_its_proof(clone):
    run(clone, "-m", "shortlist.cli", "prove", "newcomer_is_found")
    table = json.loads(run(clone, "-m", "shortlist.cli", "systems", "--json"))
    (row,) = [row for row in table if row["name"] == "newcomer"]
    assert row["summary"] == "Items in a fixed random order."
    assert row["proof"] == ["newcomer_is_found holds"]
    assert "| newcomer | retriever |" in run(clone, "-m", "shortlist.cli", "systems", "--markdown")


def test_prove_runs_its_claim(clone):
    result = json.loads(run(clone, "-m", "shortlist.cli", "prove", "newcomer_is_found", "--quick", "--json"))
    assert result["verdict"] == "holds"
    assert result["quick"] is True


def test_contract_tests_take_it_up(clone):
    tests = Path(__file__).with_name("test_retrievers.py")
    arguments = ("-k", "newcomer", "-p", "no:cacheprovider", "-p", "no:xdist")
    output = run(
        clone,
        "-m",
        "pytest",
        str(tests),
        "--rootdir",
        str(tests.parents[2]),
        "-c",
        str(tests.parents[2] / "pyproject.toml"),
        *arguments,
    )
    assert "10 passed" in output


def test_a_cascade_s_toml_takes_it(clone):
    load = "RunConfig.from_toml(Path('run.toml'))"
    printed = run(
        clone,
        "-c",
        f"from pathlib import Path; from shortlist.cascade.config import RunConfig; print({load}.to_toml())",
    )
    assert "newcomer" in printed
    assert "seed = 3" in printed
