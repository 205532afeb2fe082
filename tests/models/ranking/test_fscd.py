"""FSCD and COLD: which fields are read before and after the choice, what is carried over, what it saves, and that dear copies go."""

from dataclasses import replace

import pytest
import torch

from ranking_support import batch_of, rich_batch, rich_space, space_of
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.scoring import TowerConfig
from shortlist.layers.selected_fields import (
    MatchFields,
    PreRankingConfig,
    SelectableFields,
    State,
    match_sizes,
    measure_field_costs,
    sample_request,
)
from shortlist.layers.selection import ChoiceConfig, CostConfig, GatesConfig
from shortlist.models.base import RequestShape, load_weights
from shortlist.models.ranking.cold import COLD, COLDConfig
from shortlist.models.ranking.fscd import FSCD, FSCDConfig
from shortlist.training.config import TrainerConfig
from shortlist.training.trainer import fit
from support import planted_batch, planted_view

FIELDS = FieldsConfig(dim=4, max_history=5)
HEAD = TowerConfig(widths=(8,), activation="relu", dropout=0.0, id_dropout=0.0, pair_bins=2, use_user_ids=True)
PAST, OFFERED = [[1, 2, 2, 7], [], [3, 11, 12]], [[2, 5, 11], [1], [12, 3]]
KEPT = ("user.country", "context.rain", "history.category", "item.words", "match.category", "pair.since")
ALL = (
    "user", "user.country", "context.hour", "context.rain", "history", "history.category", "history.price", "history.words",
    "item", "item.category", "item.price", "item.words", "match", "match.category", "match.words", "pair.seen", "pair.since",
)  # fmt: skip


def fscd(**settings: object) -> FSCD:
    torch.manual_seed(0)
    return FSCD(FSCDConfig(**{"fields": FIELDS, "head": HEAD, **settings}), rich_space()).eval()


def narrowed(model, names=KEPT):
    model.body.narrow(torch.tensor([name in names for name in model.body.choice.names]))
    return model


# --- fields ---


def test_all_fields_are_offered_in_the_order_of_their_vectors():
    model = fscd()
    assert model.body.choice.names == model.body.fields.names == ALL
    assert model.body.tower.mlp.in_width == 4 * len(ALL)
    named = fscd(fields=replace(FIELDS, names=("match.words", "item", "pair.seen")))
    assert named.body.fields.names == ("item", "match.words", "pair.seen")
    with pytest.raises(ConfigError, match="did you mean match"):
        fscd(fields=replace(FIELDS, names=("mach",)))


def test_shares_of_the_past_by_brute_force():
    space = rich_space()
    columns, words = space.items.columns, space.items.columns["words"]
    batch = rich_batch(PAST, OFFERED)
    match = MatchFields(space, list(match_sizes(space)), max_history=3)
    found = match(State(torch.zeros(3, 0), *match.past(batch.history, 3)), batch.candidate_rows)
    expected = {name: [] for name in match.names}
    for past, offered in zip(PAST, OFFERED, strict=True):
        past = past[-3:]
        for row in offered:
            own = words.values[words.offsets[row] : words.offsets[row + 1]].tolist()
            theirs = [words.values[words.offsets[p] : words.offsets[p + 1]].tolist() for p in past]
            counts = {
                "match": past.count(row),
                "match.category": sum(int(columns["category"][p]) == int(columns["category"][row]) for p in past),
                "match.words": sum(w in of_event for w in own for of_event in theirs) / len(own),
            }
            for name, count in counts.items():
                expected[name].append(2 * count / max(len(past), 1) - 1)
    for name in match.names:
        torch.testing.assert_close(found[name], torch.tensor(expected[name]))


def test_unknown_values_match_nothing():
    kinds = torch.tensor([0, 0, 0, 1])
    space = space_of(3, item_fields=(Categorical(name="kind", size=1),), item_columns={"kind": kinds})
    batch = batch_of([[1, 2]], [[1, 3]])
    match = MatchFields(space, ["match.kind"], max_history=5)
    found = match(State(torch.zeros(1, 0), *match.past(batch.history, 1)), batch.candidate_rows)
    assert found["match.kind"].tolist() == [-1.0, -1.0]


@torch.no_grad()
def test_kept_fields_have_the_vectors_they_had_and_the_others_are_not_gathered():
    batch = rich_batch(PAST, OFFERED)
    fields = fscd().body.fields
    before = dict(zip(fields.request_names, fields.vectors(batch)[0].unbind(1), strict=True))
    before |= dict(zip(fields.candidate_names, fields.vectors(batch)[1].unbind(1), strict=True))
    fields.keep(KEPT)
    assert fields.names == KEPT
    assert fields.matrix.item_ids is None
    assert fields.matrix.user_ids is None
    # Columns that nothing reads any more are gone: from the catalogue's buffers, and from the batch by hand.
    assert not any("price" in name for name, _ in fields.named_buffers())
    poorer = replace(batch, context={"rain": batch.context["rain"]})
    poorer = replace(poorer, candidates=replace(batch.candidates, pair={"since": batch.candidates.pair["since"]}))
    request, candidate = fields.vectors(poorer)
    after = dict(zip(fields.request_names, request.unbind(1), strict=True))
    after |= dict(zip(fields.candidate_names, candidate.unbind(1), strict=True))
    for name in KEPT:
        assert torch.equal(after[name], before[name]), name


def test_a_side_without_kept_fields_is_fine():
    batch = rich_batch(PAST, OFFERED)
    for names in (("item",), ("user.country", "pair.seen"), ("match",)):
        with torch.no_grad():
            assert narrowed(fscd(), names).score(batch)["target"].shape == (6,)


# --- from the first phase to the second ---


@torch.no_grad()
def test_the_second_phase_begins_with_the_weights_of_the_first():
    """Its logits are those of the whole tower with the vectors of all other fields 0."""
    batch = rich_batch(PAST, OFFERED)
    model = fscd()
    body, row_t = model.body, batch.candidate_rows.row_of_value
    request, candidate = body.fields.vectors(batch)
    whole = torch.cat([request[row_t], candidate], dim=1)
    is_kept = torch.tensor([name in KEPT for name in body.fields.names])
    expected = body.tower.mlp((whole * is_kept[:, None]).flatten(1))[:, 0]
    first = body.tower.mlp.layers[0].weight.clone()
    narrowed(model)
    assert torch.equal(body.tower.mlp.layers[0].weight, first.view(8, len(ALL), 4)[:, is_kept].flatten(1))
    torch.testing.assert_close(model.score(batch)["target"], expected)
    assert body.gates is None


@torch.no_grad()
def test_before_the_choice_scores_are_those_of_mean_gates():
    batch = rich_batch(PAST, OFFERED)
    model = fscd(gates=GatesConfig(start=40.0))
    open_gates = model.score(batch)["target"]
    torch.testing.assert_close(open_gates, narrowed(model, ALL).score(batch)["target"])


def test_phases_choose_then_tune_and_the_gates_are_paid_for_only_in_the_first():
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1])
    model = fscd(choice=ChoiceConfig(epochs=2, keep=4)).train()
    select, tune = model.phases()
    assert (select.name, select.epochs, tune.name) == ("select", 2, "tune")
    assert set(select.losses(batch)) == {"target", "field costs"}
    with torch.no_grad():
        model.body.gates.raw_M.copy_(torch.arange(17.0).flip(0) / 10)
    tune.before(planted_view())
    # The four most wanted are of the request; one of the candidate stays all the same.
    assert model.body.fields.names == ("user", "user.country", "context.hour", "item")
    assert model.body.choice.importance_M.argsort(descending=True).tolist() == list(range(17))
    assert set(tune.losses(batch)) == {"target"}
    assert [phase.name for phase in model.phases()] == ["tune"]
    assert [phase.name for phase in fscd(choice=ChoiceConfig(epochs=0)).phases()] == ["tune"]


@pytest.mark.parametrize("system", [FSCD, COLD])
def test_narrowed_weights_load_into_a_new_model_and_say_what_they_are_of(system):
    config = system.Config(fields=FIELDS, head=HEAD)
    model, fresh = system(config, rich_space()), system(config, rich_space()).eval()
    model.body.choice.importance_M = torch.linspace(0, 1, 17)
    narrowed(model.eval())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(fresh, tensors)
    batch = rich_batch(PAST, OFFERED)
    with torch.no_grad():
        assert torch.equal(fresh.score(batch)["target"], model.score(batch)["target"])
    assert fresh.body.choice.report() == model.body.choice.report()
    assert fresh.body.fields.names == KEPT
    unchosen = system(config, rich_space()).eval()
    load_weights(unchosen, system(config, rich_space()).state_dict())
    assert unchosen.body.gates is not None
    renamed = rich_space()
    renamed = replace(
        renamed, context_fields=(replace(renamed.context_fields[0], name="weekday"), renamed.context_fields[1])
    )
    with pytest.raises(ValueError, match="saved for other fields"):
        load_weights(system(config, renamed), tensors)


# --- what it saves ---


def test_cost_by_hand():
    """Tower of 8 hidden units; a curve of a pair or match field has 3 numbers; rain and price are linear maps of one number."""
    shape = RequestShape(num_history=9, num_candidates=100)
    model = fscd()
    before = model.cost(shape)
    assert before.item_flops == 2 * (68 * 8 + 8) + 2 * 5 * 3 * 4 + 2 * 4  # all tower, five curves, item.price
    after = narrowed(model).cost(shape)
    assert after.item_flops == 2 * (12 * 8 + 8) + 2 * 2 * 3 * 4
    assert after.user_flops == 2 * 12 * 8 + 2 * 4 + 5 * 4  # its half of the layer, rain, a sum over five events
    dense = 24 * 8 + 8 + 8 + 1 + 2 * 4 + 2 * 3 * 4  # layers with biases, rain, curves
    rows = 100 + 2 + 5  # item.words; country and rain; history.category
    assert after.bytes == 4 * dense + 4 * 4 * rows + 8 * 105
    assert after.bytes < 0.5 * before.bytes
    assert model.cost(shape, cached=True).user_flops == 0


def test_fields_are_measured_on_the_serving_path():
    """A mean over 5,000 events takes longer than a look-up of one user; every field is timed, and nothing of the model changes."""
    view = planted_view()
    config = PreRankingConfig(fields=FieldsConfig(dim=8, max_history=5_000), head=replace(HEAD, use_user_ids=True))
    fields = SelectableFields(view.space, config).train()
    events = ("item", "time", "action", "value", "group")
    long = {name: getattr(view.histories, name).repeat(20) for name in events}
    histories = replace(view.histories, offsets=20 * view.histories.offsets, **long)
    request = sample_request(replace(view, histories=histories), view.space, 5_000)
    assert len(request.history.items.values) == 5_000
    assert len(request.candidates.rows.values) == 1_000
    names, number = fields.names, sum(p.numel() for p in fields.parameters())
    micros = dict(zip(names, measure_field_costs(fields, request, times=5).tolist(), strict=True))
    assert fields.names == names
    assert sum(p.numel() for p in fields.parameters()) == number
    assert fields.training
    assert min(micros.values()) > 0
    assert micros["history.words"] > 2 * micros["user"]


def test_measured_costs_are_taken_before_training_and_a_budget_for_nothing_is_refused():
    view = planted_view()
    model = FSCD(FSCDConfig(fields=FIELDS, head=HEAD, costs=CostConfig(measured=True)), view.space)
    declared = model.body.choice.cost_M.clone()
    model.prepare(view)
    assert not torch.equal(model.body.choice.cost_M, declared)
    torch.testing.assert_close(model.body.choice.cost_M.mean(), torch.tensor(1.0))
    with pytest.raises(ConfigError, match="raise the budget"):
        FSCD(FSCDConfig(fields=FIELDS, head=HEAD, choice=ChoiceConfig(budget=0.001)), view.space).prepare(view)


# --- what it learns ---

SIGNALS, VALUES = 3, 6
CHEAP, DEAR, NOISE = ([f"{kind}{i}" for i in range(SIGNALS)] for kind in ("cheap", "dear", "noise"))


def planted_rows(size: int, draw: torch.Generator):
    """Signals, each in a cheap and in a dear field, and fields that say nothing; one candidate per row."""
    signal = torch.randint(1, VALUES + 1, (size, SIGNALS), generator=draw)
    noise = torch.randint(1, VALUES + 1, (size, SIGNALS), generator=draw)
    logit = 1.2 * ((signal % 2) * 2 - 1).float() @ torch.tensor([1.0, 0.8, 0.6])
    label = (torch.rand(size, generator=draw) < logit.sigmoid()).float()
    context = {
        **dict(zip(CHEAP, signal.unbind(1), strict=True)),
        **dict(zip(DEAR, signal.unbind(1), strict=True)),
        **dict(zip(NOISE, noise.unbind(1), strict=True)),
    }
    batch = batch_of([[]] * size, [[1]] * size, context=context, labels={"target": label})
    return replace(batch, user=torch.zeros(size, dtype=torch.int64))


def trained(system, **settings):
    space = space_of(1, context_fields=tuple(Categorical(name=n, size=VALUES) for n in (*CHEAP, *DEAR, *NOISE)))
    space = replace(space, items=FieldTable(2), num_users=0)
    names = tuple(f"context.{name}" for name in (*CHEAP, *DEAR, *NOISE))
    torch.manual_seed(0)
    costs = CostConfig(declared={f"context.{name}": 6.0 for name in DEAR}, width=0.0)
    head = TowerConfig(widths=(16,), activation="relu", dropout=0.0, loss="bce")
    config = system.Config(
        fields=FieldsConfig(dim=4, names=names), head=head, costs=costs, choice=ChoiceConfig(keep=SIGNALS), **settings
    )
    model, draw = system(config, space).train(), torch.Generator().manual_seed(0)
    batches = [planted_rows(512, draw) for _ in range(20)]
    for phase in model.phases():
        if phase.before:
            phase.before(planted_view())
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
        for step in range(240):
            loss = torch.stack(list(phase.losses(batches[step % len(batches)]).values())).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def test_of_equal_copies_the_cheap_ones_stay_and_noise_goes():
    model = trained(FSCD, gates=GatesConfig(weight=1e-2))
    assert model.body.fields.names == tuple(f"context.{name}" for name in CHEAP)
    counts = model.body.choice.histogram()
    assert sum(counts) == 3 * SIGNALS
    assert sum(counts[:3]) >= SIGNALS  # gates have decided
    batch = planted_rows(4_000, torch.Generator().manual_seed(9))
    with torch.no_grad():
        chance = model.score(batch)["target"].sigmoid()
    context = torch.stack([batch.context[name] for name in CHEAP], 1)
    true = (1.2 * ((context % 2) * 2 - 1).float() @ torch.tensor([1.0, 0.8, 0.6])).sigmoid()
    assert float((chance - true).abs().mean()) < 0.03


def test_cold_s_scores_leave_noise_out_too():
    model = trained(COLD)
    assert not any("noise" in name for name in model.body.fields.names)


def test_cold_squashes_what_enters_the_tower():
    torch.manual_seed(0)
    config = COLDConfig(fields=FIELDS, head=HEAD, choice=ChoiceConfig(epochs=0))
    plain, squashing = (COLD(replace(config, linear_log=flag), rich_space()).eval() for flag in (False, True))
    with torch.no_grad():
        for parameter in plain.body.fields.parameters():
            parameter.mul_(0.1)
    squashing.load_state_dict(plain.state_dict())
    batch = rich_batch(PAST, OFFERED)
    with torch.no_grad():
        torch.testing.assert_close(plain.score(batch)["target"], squashing.score(batch)["target"])  # all within 1
        for model in (plain, squashing):
            model.body.fields.matrix.item_ids.rows.weight.mul_(1e6)
        assert squashing.score(batch)["target"].abs().max() < 0.01 * plain.score(batch)["target"].abs().max()
        whole = Jagged.from_rows([[1, 2], [3], [4, 5]])
        assert torch.isfinite(
            squashing.score(batch.with_candidates(whole, {n: torch.zeros(5) for n in ("seen", "since")}))["target"]
        ).all()


def test_a_training_stopped_while_tuning_goes_on_with_the_chosen_fields(tmp_path):
    """The checkpoint is of the narrowed network; what comes out equals a training that was not stopped."""
    view, config = planted_view(), TrainerConfig(epochs=3, batch_size=60, lr=0.01, patience=None, seed=0)
    settings = FSCDConfig(fields=FIELDS, head=HEAD, choice=ChoiceConfig(epochs=2, budget=0.3))

    class Same:
        """One batch, the same at every step."""

        def steps_per_epoch(self):
            return 1

        def batches(self, epoch, first=0):
            yield planted_batch(candidates=6)

    def run(folder, validate):
        torch.manual_seed(0)
        model = FSCD(settings, view.space)
        fit(model, view, lambda phase: Same(), config=config, validate=validate, folder=folder, progress=False)
        return model

    calls = []

    def score(model):
        return float(model.body.tower.mlp.layers[0].weight.abs().sum())

    def stop_at_the_second(model):
        calls.append(len(model.body.fields.names))
        if len(calls) == 2:
            raise RuntimeError("the machine went down")
        return score(model)

    with pytest.raises(RuntimeError, match="went down"):
        run(tmp_path / "stopped", stop_at_the_second)
    resumed, whole = (run(folder, score) for folder in (tmp_path / "stopped", tmp_path / "whole"))
    assert calls[0] < len(whole.body.choice.names)
    assert resumed.body.fields.names == whole.body.fields.names
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
