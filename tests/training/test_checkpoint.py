"""A checkpoint comes back to the bit, is never half-written, and is refused by file name when damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from shortlist.errors import SnapshotError
from shortlist.training import checkpoint as module
from shortlist.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import build_optimisers

FILES = [
    "best.safetensors",
    "manifest.json",
    "optimiser.safetensors",
    "random.safetensors",
    "state.json",
    "weights.safetensors",
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.out = nn.Linear(3, 5)
        self.again = self.out  # a tied module: its weights share memory
        self.register_buffer("graph", torch.tensor([[1, 2], [3, 4]]).T)  # not contiguous

    def forward(self, ids):
        return self.again(self.out(self.table(ids)) @ self.out.weight).square().sum()


def trained(optimiser: str = "adamw", table_optimiser: str = "adam"):
    torch.manual_seed(0)
    model = Model()
    config = TrainerConfig(optimiser=optimiser, table_optimiser=table_optimiser)
    optimisers = build_optimisers(model, config)
    step(model, optimisers)
    return model, config, optimisers


def step(model, optimisers) -> None:
    for _ in range(3):
        model.zero_grad()
        model(torch.randint(0, 5, (2,))).backward()
        for optimiser in optimisers:
            optimiser.step()


def checkpoint_of(model, optimisers) -> Checkpoint:
    return Checkpoint(
        settings={"system.dim": 3},
        place={"epoch": 2, "loss": 0.1 + 0.2},
        weights=model.state_dict(),
        optimisers=[optimiser.state_dict() for optimiser in optimisers],
        random=random_state(torch.device("cpu")),
        best={"x": torch.arange(3, dtype=torch.uint8), "none": torch.zeros(0, 4), "one": torch.tensor(math.pi)},
    )


@pytest.mark.parametrize("table_optimiser", ["adam", "adagrad"])
@pytest.mark.parametrize("optimiser", ["adamw", "adam", "adagrad", "sgd"])
def test_training_goes_on_to_the_same_bits(tmp_path, optimiser, table_optimiser):
    model, config, optimisers = trained(optimiser, table_optimiser)
    save_checkpoint(tmp_path, checkpoint_of(model, optimisers))
    step(model, optimisers)

    loaded = load_checkpoint(tmp_path)
    fresh = Model()
    fresh.load_state_dict(loaded.weights)
    fresh_optimisers = build_optimisers(fresh, config)
    for one, state in zip(fresh_optimisers, loaded.optimisers):
        one.load_state_dict(state)
    set_random_state(loaded.random)
    step(fresh, fresh_optimisers)
    for (name, ours), theirs in zip(model.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_everything_comes_back(tmp_path):
    model, _, optimisers = trained()
    saved = checkpoint_of(model, optimisers)
    path = save_checkpoint(tmp_path / "deep" / "run", saved)
    assert sorted(p.name for p in path.iterdir()) == FILES
    loaded = load_checkpoint(tmp_path / "deep" / "run")
    assert (loaded.settings, loaded.place) == (saved.settings, saved.place)
    for ours, theirs in [(saved.weights, loaded.weights), (saved.best, loaded.best), (saved.random, loaded.random)]:
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name
    groups = [state["param_groups"] for state in loaded.optimisers]
    assert groups == [optimiser.state_dict()["param_groups"] for optimiser in optimisers], "also tuples stay tuples"


def test_only_the_newest_is_kept_and_numbers_rise(tmp_path):
    model, _, optimisers = trained()
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "absent") is None
    for epoch in range(1, 4):
        saved = checkpoint_of(model, optimisers)
        saved.place["epoch"] = epoch
        if epoch == 3:
            saved.best = None
        save_checkpoint(tmp_path, saved)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000003"]
    assert load_checkpoint(tmp_path).place["epoch"] == 3
    assert load_checkpoint(tmp_path).best is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    model, _, optimisers = trained()
    file = save_checkpoint(tmp_path, checkpoint_of(model, optimisers)) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :])
    with pytest.raises(SnapshotError) as caught:
        load_checkpoint(tmp_path)
    # A flipped byte inside the manifest may damage the hash of any file.
    assert name in str(caught.value) or name == "manifest.json"
    assert "train again" in str(caught.value)


def test_another_format_is_refused_with_its_version(tmp_path):
    model, _, optimisers = trained()
    manifest = save_checkpoint(tmp_path, checkpoint_of(model, optimisers)) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": 99, "written_by": "7.0"}))
    with pytest.raises(SnapshotError, match=r"format 99 \(written by version 7.0\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("moment", ["_save_tensors", "_save_json", "_flush"])
def test_a_failed_write_leaves_the_last_one(tmp_path, monkeypatch, moment):
    """Whatever step of writing fails, the checkpoint before is whole, and the next save works."""
    model, _, optimisers = trained()
    save_checkpoint(tmp_path, checkpoint_of(model, optimisers))

    def full(path: Path, *_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, full)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, checkpoint_of(model, optimisers))
    assert load_checkpoint(tmp_path).place["epoch"] == 2
    save_checkpoint(tmp_path, checkpoint_of(model, optimisers))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000002"], "nothing is left over"


def test_no_file_is_pickled(tmp_path):
    """Pickle opens with 0x80, zip archives (torch.save) with PK."""
    model, _, optimisers = trained()
    for file in save_checkpoint(tmp_path, checkpoint_of(model, optimisers)).iterdir():
        assert file.suffix in {".json", ".safetensors"}
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
