"""What every table must do: vectors, row-wise updates, storage, settings by TOML, and counts from a log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ranking_support import rich_space, space_of
from shortlist.cascade.config import RunConfig
from shortlist.data.batches import Batch
from shortlist.data.histories import Histories, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Numeric, Sequence
from shortlist.embeddings.amtl import AMTLConfig
from shortlist.embeddings.base import TableChoice, finish_tables, make_table, prepare_tables, table_class, table_sizes
from shortlist.embeddings.bh import BHConfig
from shortlist.embeddings.frequency_filtered import FrequencyFilteredConfig
from shortlist.embeddings.frequency_steps import FrequencyStepsConfig
from shortlist.embeddings.hashed import HashedConfig
from shortlist.embeddings.multi_hash import MultiHashConfig
from shortlist.embeddings.quotient_remainder import QuotientRemainderConfig
from shortlist.errors import ConfigError, DataError
from shortlist.layers.fields import FieldEmbeddings, ItemEncoder
from shortlist.layers.scoring import RequestEncoder
from shortlist.models.base import load_weights
from shortlist.registry import find, systems
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import build_optimisers
from shortlist.training.trainer import fit
from support import planted_batch, planted_view

NUM_ROWS, DIM = 60, 4
ENTRIES = systems(kind="table")
COUNTS = torch.tensor([0, *np.random.default_rng(0).zipf(1.5, NUM_ROWS - 1).clip(max=50).tolist()])


@pytest.fixture(params=ENTRIES, ids=lambda entry: entry.name)
def entry(request):
    return request.param


def made(entry, *, counts: Tensor | None = COUNTS, seed: int = 0, **changes):
    torch.manual_seed(seed)
    table = make_table(NUM_ROWS, DIM, replace(entry.config(entry.tiny), **changes))
    if counts is not None:
        table.prepare(counts)
    return table


@pytest.mark.parametrize("finished", [False, True])
def test_all_vectors_are_those_of_single_ids(entry, finished):
    table = made(entry)
    if finished:
        table.finish()
    ids = torch.randint(0, NUM_ROWS, (3, 5))
    assert table(ids).shape == (3, 5, DIM)
    assert table(ids).dtype == torch.float32
    assert table(ids[:0]).shape == (0, 5, DIM)
    torch.testing.assert_close(table.weight()[ids], table(ids), rtol=0, atol=0)
    assert table.weight().shape == (NUM_ROWS, DIM)
    table.weight().square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in table.parameters())


def test_the_unknown_id_shares_nothing(entry):
    """A step on all other ids leaves its vector where it was, unless the table says that rare ids are the unknown one."""
    table = made(entry)
    before = table(torch.tensor(0)).detach().clone()
    table(torch.arange(1, NUM_ROWS)).sum().backward()
    with torch.no_grad():
        for p in table.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    moved = not torch.equal(table(torch.tensor(0)), before)
    assert moved == (entry.name == "frequency-filtered")


@pytest.mark.parametrize("finished", [False, True])
def test_a_step_neither_reads_nor_writes_rows_of_other_ids(entry, finished):
    """Rows that the batch does not name are poisoned, with their state: the others move as if nothing were, these stay to the bit."""
    touched_ids = torch.tensor([[3, 7], [7, 31]])
    config = TrainerConfig(lr=0.05, clip_norm=None)

    def trained(poison: bool):
        table = made(entry, sparse=True).train()
        if finished:
            table.finish()
        optimisers = build_optimisers(table, config)

        def step(ids: Tensor) -> None:
            table.zero_grad()
            (table(ids) * torch.arange(1.0, DIM + 1)).square().sum().backward()
            for optimiser in optimisers:
                optimiser.step()

        step(torch.arange(NUM_ROWS))
        table.zero_grad()
        table(touched_ids).sum().backward()
        rows_of = {}
        for name, p in table.named_parameters():
            if p.grad is not None and p.grad.is_sparse:
                rows_of[name] = torch.zeros(len(p), dtype=torch.bool)
                rows_of[name][p.grad.coalesce().indices()[0]] = True
        parameters = dict(table.named_parameters())
        tensors = {}
        for name in rows_of:
            state = next(o.state[parameters[name]] for o in optimisers if parameters[name] in o.state)
            tensors[name] = [parameters[name].data, *(value for value in state.values() if isinstance(value, Tensor))]
        if poison:
            for name, touched in rows_of.items():
                for tensor in tensors[name]:
                    tensor[~touched] = math.nan
        before = {name: [tensor.clone() for tensor in values] for name, values in tensors.items()}
        for _ in range(2):
            step(touched_ids)
        return rows_of, before, tensors, table(touched_ids).detach()

    rows_of, before, after, vectors = trained(poison=True)
    _, _, clean, clean_vectors = trained(poison=False)
    assert rows_of
    assert torch.equal(vectors, clean_vectors)
    for name, touched in rows_of.items():
        assert not touched.all()
        for old, new, other in zip(before[name], after[name], clean[name]):
            assert torch.equal(new[~touched].view(torch.int32), old[~touched].view(torch.int32))
            assert torch.equal(new[touched], other[touched])
            assert not torch.equal(new[touched], old[touched])


@pytest.mark.parametrize("stage", ["made", "prepared", "finished"])
def test_weights_load_into_a_fresh_table_whatever_their_shapes(entry, stage):
    table = made(entry, counts=None if stage == "made" else COUNTS, seed=1)
    if stage == "finished":
        table.finish()
    state = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    fresh = made(entry, counts=None, seed=2)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.weight(), table.weight())
    assert (fresh.num_floats, fresh.bytes()) == (table.num_floats, table.bytes())


@pytest.mark.parametrize("finished", [False, True])
def test_counts_are_taken_once(entry, finished):
    """What was made of the first counts stays, so that training can go on with a later log."""
    table = made(entry)
    if finished:
        table.finish()
    before = table.weight().detach().clone()
    table.prepare(COUNTS.flip(0))
    assert torch.equal(table.weight(), before)


def test_counts_of_another_size_are_refused():
    with pytest.raises(DataError, match=r"table of 60 ids needs as many counts.*\(59,\)"):
        made(find("amtl"), counts=COUNTS[1:])


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        (TableChoice(), 20_001),
        (HashedConfig(compression=10), 2_001),
        (MultiHashConfig(compression=10), 2_002),
        # 1989 + ceil(20,000 / 1989) = 2000, and one of each for the unknown id; below 2 sqrt(n), 142 + 141.
        (QuotientRemainderConfig(compression=10), 2_002),
        (QuotientRemainderConfig(compression=100), 142 + 141 + 2),
        # 15 bits: 11 + 4 need 2048 + 10 rows, above 2000, so 10 + 5: the high block ends at 19,999 >> 10 = 19.
        (BHConfig(compression=10), 1024 + 20 + 2),
    ],
)
def test_sizes_by_hand(choice, rows):
    """20,000 ids of width 8 and the unknown one: rows of 8 floats of 4 bytes; BH also keeps where its two blocks start."""
    table = make_table(20_001, 8, choice)
    assert table.num_floats == 8 * rows
    assert table.bytes() == 32 * rows + (16 if choice.name == "bh" else 0)


def test_sizes_are_listed_by_place():
    model = torch.nn.ModuleDict({"a": make_table(10, 2), "b": torch.nn.Linear(2, 2)})
    assert [tuple(size) for size in table_sizes(model)] == [("a", "FullTable", 10, 2, 20, 80)]


# --- settings ---


def run_toml(table: str) -> str:
    return (
        '[stages.retrieval]\nsystems = ["popularity"]\nkeep = 50\n[stages.ranking]\nsystems = ["dnn"]\n'
        f"[systems.dnn.table]\n{table}"
    )


def test_a_run_file_picks_the_table_and_its_settings():
    config = RunConfig.from_toml(run_toml('name = "bh"\ncompression = 100.0\nstrategy = "skip"\nmin_field_size = 1000'))
    table = config.systems["dnn"].settings.table
    assert table == BHConfig(compression=100.0, strategy="skip", min_field_size=1000)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert config.override("dnn.table.compression=50").systems["dnn"].settings.table.compression == 50
    plain = RunConfig.from_toml(run_toml("init_std = 0.1"))
    assert plain.override("dnn.table.name=amtl").systems["dnn"].settings.table == AMTLConfig(init_std=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "bh"\ncompresion = 10.0', r"\[systems.dnn.table\] has no setting 'compresion': did you mean 'compres"),
        ("compression = 10.0", r"\[systems.dnn.table\] has no setting 'compression'"),
        ('name = "bh"\ncompression = 0.5', "compression must be at least 1"),
        ('name = "bh"\nstrategy = "hop"', "systems.dnn.table.strategy is 'hop'"),
        ('name = "hash"', r"\[systems.dnn.table\] no system named 'hash'"),
        ('name = "dnn"', "'dnn' is a ranker, not an embedding table"),
        ("name = 3", r"\[systems.dnn.table\] no system named '3'"),
    ],
)
def test_a_wrong_table_is_refused_by_place_and_name(text, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_toml(run_toml(text))


def test_settings_of_another_table_are_refused():
    with pytest.raises(ConfigError, match="TableChoice are not the settings of the table 'bh': use BHConfig"):
        make_table(10, 2, TableChoice(name="bh"))
    with pytest.raises(ConfigError, match="min_field_size must be at least 1"):
        TableChoice(min_field_size=0)


def test_every_table_names_itself(entry):
    assert entry.config().name == entry.name
    assert table_class(entry.name) is entry.cls


# --- tables inside models ---


def test_fields_of_enough_values_take_the_table():
    """With the same weights, a full table for fields gives what plain embeddings give."""
    fields = (Categorical(name="small", size=3), Categorical(name="large", size=40), Sequence(name="words", size=40))
    columns = {
        "small": torch.tensor([1, 0, 3]),
        "large": torch.tensor([40, 7, 0]),
        "words": Jagged.from_rows([[1, 40], [], [5]]),
    }
    plain = FieldEmbeddings(fields, DIM)
    ours = FieldEmbeddings(fields, DIM, table=TableChoice(min_field_size=40))
    assert [type(m).__name__ for m in ours.maps] == ["Embedding", "FullTable", "FullTable"]
    ours.load_state_dict({name: plain.state_dict()[name.replace(".rows", "")] for name in ours.state_dict()})
    torch.testing.assert_close(ours(columns), plain(columns))
    hashed = FieldEmbeddings(fields, DIM, table=HashedConfig(min_field_size=1, compression=4))
    assert hashed(columns).shape == (3, 3, DIM)
    assert [m.num_rows for m in hashed.maps] == [4, 41, 41]
    assert type(FieldEmbeddings(fields, DIM, table=BHConfig()).maps[0]).__name__ == "Embedding"


def counted_view() -> View:
    """Items 1, 2, 2, 5, 5, 5, 11 by users 1 (4 events) and 3 (3 events) of the rich space; item 11 is not known."""
    space = replace(rich_space(), num_users=3)
    item = np.array([1, 2, 2, 5, 5, 5, 11])
    none = np.zeros(7, dtype=np.int64)
    histories = Histories(
        offsets=np.array([0, 0, 4, 4, 7]),
        item=item,
        time=none,
        group=none,
        action=none + 1,
        value=none.astype(np.float32),
    )
    users = FieldTable(4, (Categorical(name="country", size=2),), {"country": torch.tensor([0, 2, 1, 2])})
    return View(histories=histories, space=space, users=users, now=0)


def test_tables_learn_the_counts_of_their_own_ids():
    view = counted_view()
    choice = FrequencyFilteredConfig(min_count=3, min_field_size=1)
    items = ItemEncoder(view.space, DIM, table=choice)
    request = RequestEncoder(view.space, DIM, use_user_ids=True, table=choice)
    model = torch.nn.ModuleList([items, request])
    prepare_tables(model, view)
    kept = {
        place: table.row_of_id_N.tolist() for place, table in model.named_modules() if hasattr(table, "row_of_id_N")
    }
    assert kept["0.ids"] == [0] * 5 + [1] + [0] * 7  # item 5 three times
    # Categories 1 + (item - 1) % 3: item 1 and item 2 x 2, item 5 x 3, item 11 are of kinds 1, 2, 2, 2.
    assert kept["0.fields.maps.0"] == [0, 0, 1, 0]
    # Words: each item has one of 1..3, as its category, and word 4.
    assert kept["0.fields.maps.2"] == [0, 0, 1, 0, 2]
    assert kept["1.user_ids"] == [0, 1, 0, 2]
    assert kept["1.user_fields.maps.0"] == [0, 0, 1]  # both users are of country 2
    assert kept["1.context_fields.maps.0"] == []  # a view does not hold contexts
    assert items(torch.tensor([5, 1, 11, 0])).shape == (4, DIM)


class OneBatch:
    """A source of the same batch, three times an epoch."""

    def steps_per_epoch(self) -> int:
        return 3

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter([planted_batch(candidates=6)] * (3 - start))


@pytest.mark.parametrize(
    "choice",
    [AMTLConfig(), FrequencyFilteredConfig(min_count=60), FrequencyStepsConfig(), BHConfig(compression=2)],
    ids=lambda choice: choice.name,
)
def test_a_trained_model_is_stored_small_and_restored(choice, tmp_path):
    """The trainer tells counts, trains, lets tables finish; the weights load into a fresh model; a finished run goes on from its file."""
    view = planted_view()
    config = replace(find("dnn").config(find("dnn").tiny), table=choice, dim=8)
    torch.manual_seed(0)
    model = find("dnn").cls(config, view.space)
    full = model.items.ids.num_floats
    fit(model, view, lambda phase: OneBatch(), config=TrainerConfig(epochs=1), folder=tmp_path, progress=False)
    if choice.name == "amtl":
        assert model.items.ids.packed.is_filled
    else:
        assert model.items.ids.num_floats < view.space.items.num_rows * 8
    fresh = find("dnn").cls(config, view.space).eval()
    assert fresh.items.ids.num_floats == full
    load_weights(fresh, {key: value.clone() for key, value in model.state_dict().items()})
    batch = planted_batch(candidates=6)
    assert torch.equal(fresh.score(batch)["target"], model.score(batch)["target"])
    again = find("dnn").cls(config, view.space)
    fit(again, view, lambda phase: OneBatch(), config=TrainerConfig(epochs=1), folder=tmp_path, progress=False)
    assert torch.equal(again.score(batch)["target"], model.score(batch)["target"])


def test_a_finished_table_is_trained_further():
    table = made(find("amtl"))
    table.finish()
    finish_tables(table)
    lengths = table.lengths()
    optimisers = build_optimisers(table, TrainerConfig(lr=0.1))
    before = table.weight().detach().clone()
    table(torch.arange(NUM_ROWS)).sum().backward()
    for optimiser in optimisers:
        optimiser.step()
    assert torch.equal(table.lengths(), lengths)
    stored = torch.arange(DIM) < lengths[:, None]
    assert ((table.weight() != before) == stored).all()


def test_numeric_fields_have_no_table():
    view_space = space_of(3, item_fields=(Numeric(name="price"),), item_columns={"price": torch.zeros(4)})
    encoder = ItemEncoder(view_space, DIM, table=BHConfig(min_field_size=1))
    assert [size.place for size in table_sizes(encoder)] == ["ids"]
