"""What every ranker that searches a long past must keep to, whatever its search: SIM, ETA, SDIM, TWIN, MIMN."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import rich_batch, rich_space, share_right, space_of, train
from search_support import long_batch, long_space
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import RequestShape
from shortlist.models.ranking.eta import ETA, ETAConfig
from shortlist.models.ranking.mimn import MIMN, MIMNConfig
from shortlist.models.ranking.sdim import SDIM, SDIMConfig
from shortlist.models.ranking.sim import SIM, SIMConfig
from shortlist.models.ranking.twin import TWIN, TWINConfig

HEAD = HeadConfig(widths=(16,), dropout=0.0)
COMMON = {"dim": 8, "short_history": 2, "max_history": 6, "id_dropout": 0.0, "head": HEAD}
MODELS = {
    "sim-hard": (SIM, SIMConfig(**COMMON, num_found=3)),
    "sim-soft": (SIM, SIMConfig(**COMMON, num_found=3, search="soft", search_dim=4)),
    "eta": (ETA, ETAConfig(**COMMON, num_found=3, num_bits=16)),
    "sdim": (SDIM, SDIMConfig(**COMMON, num_bits=12)),
    "twin": (TWIN, TWINConfig(**COMMON, num_found=3, cross_dim=4)),
    "mimn": (MIMN, MIMNConfig(**COMMON, num_slots=3, num_induced=1)),
}
PAST = [[1, 2, 3, 4, 3, 2, 1, 6], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def made(kind, space=None, **changes):
    cls, config = MODELS[kind]
    torch.manual_seed(0)
    model = cls(replace(config, **changes), space or rich_space())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def test_bounds_of_memory_change_nothing(kind):
    whole, parts = (made(kind, pairs_at_once=n).score(rich_batch(PAST, OFFERED))["target"] for n in (1_000_000, 1))
    torch.testing.assert_close(parts, whole)


@torch.no_grad()
def test_events_before_the_window_are_not_read(kind):
    model = made(kind)
    cut = [row[-6:] for row in PAST]
    shift = rich_batch(cut, OFFERED)
    batch = rich_batch(PAST, OFFERED)
    late = replace(shift, time=batch.time, history=batch.history.last(6))  # times as they are
    torch.testing.assert_close(model.score(late), model.score(batch))
    other = rich_batch([[9, 9, *PAST[0][2:]], *PAST[1:]], OFFERED)
    torch.testing.assert_close(model.score(other), model.score(batch))


@torch.no_grad()
def test_events_of_the_window_are_read(kind):
    """The second of six in the window is neither cut off nor among the newest two; item 4 shares item 1's category."""
    model = made(kind, **({"num_found": 6} if hasattr(MODELS[kind][1], "num_found") else {}))
    changed = [[*PAST[0][:3], 6, *PAST[0][4:]], *PAST[1:]]
    before, after = (model.score(rich_batch(past, OFFERED))["target"] for past in (PAST, changed))
    assert not torch.allclose(before[:1], after[:1])
    torch.testing.assert_close(before[3:], after[3:])


@torch.no_grad()
def test_a_score_depends_on_nothing_else_in_the_batch(kind):
    model = made(kind)
    together = model.score(rich_batch(PAST, OFFERED))["target"]
    swapped = model.score(rich_batch(PAST, [[9, 7, 1], [4], [2, 3], [3, 12]]))["target"]
    torch.testing.assert_close(swapped[[2, 1, 0]], together[:3])
    longer = model.score(rich_batch([PAST[0], [7] * 9], OFFERED[:2]))["target"]
    torch.testing.assert_close(longer[:3], together[:3])


@torch.no_grad()
def test_nobody_s_past_is_zero_not_nan(kind):
    model = made(kind)
    assert torch.isfinite(model.score(rich_batch([[], []], OFFERED[:2]))["target"]).all()
    assert model.score(rich_batch(PAST[:2], [[], []]))["target"].shape == (0,)
    new = model.score(rich_batch([[1]], [[11, 12]]))["target"]
    assert new[0] != new[1]  # no id rows of their own: their fields differ


def test_training_bears_empty_pasts_and_reaches_every_parameter(kind):
    model = made(kind, rich_space(actions=("view", "buy"))).train()
    sum(model.losses(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0])).values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    sum(model.losses(batch).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_scores_with_kept_item_vectors_are_those_without(kind):
    model, batch = made(kind), rich_batch(PAST, OFFERED)
    kept = model.score(batch)["target"]
    with torch.enable_grad():
        torch.testing.assert_close(model.score(batch)["target"], kept)


@torch.no_grad()
def test_thousands_of_events(kind):
    model = made(kind, space_of(50), max_history=5_000, num_heads=2)
    draw = torch.Generator().manual_seed(0)
    past = torch.randint(1, 51, (3_000 if kind != "mimn" else 300,), generator=draw).tolist()
    batch = rich_batch([past, past[:7]], [list(range(1, 40)), [1, 2]])
    batch = replace(batch, candidates=replace(batch.candidates, pair={}))
    assert torch.isfinite(model.score(batch)["target"]).all()


@pytest.mark.parametrize(
    "kind", [kind for kind in MODELS if kind != "mimn"]
)  # whose test of learning is in its own file
def test_finds_what_was_liked_long_ago(kind):
    """The planted rule stands in events beyond the newest ten; a search sees them, the newest five alone do not."""
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    settings = {"dim": 16, "max_history": 40, "short_history": 5, "head": HeadConfig(widths=(32,), dropout=0.0)}
    settings |= {"num_bits": 48} if kind == "sdim" else {"num_found": 8}
    model = cls(replace(config, **settings), long_space())
    train(model, long_batch, steps=150, lr=0.02)
    assert share_right(model, long_batch(200, torch.Generator().manual_seed(99))) > 0.9


def test_the_newest_events_do_not_tell_what_was_liked_long_ago():
    torch.manual_seed(0)
    model = ETA(ETAConfig(**COMMON | {"max_history": 5, "dim": 16}), long_space())
    train(model, long_batch, steps=60, lr=0.02)
    assert share_right(model, long_batch(200, torch.Generator().manual_seed(99))) < 0.65


def test_same_seed_same_model(kind):
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        cls, config = MODELS[kind]
        curves.append(train(cls(replace(config, id_dropout=0.2), long_space()), long_batch, steps=3))
    assert curves[0] == curves[1]


@torch.no_grad()
def test_cost_agrees_with_the_flop_counter(kind):
    changes = {"max_history": 30, "short_history": 4, "dim": 16}
    model = made(kind, **changes).requires_grad_(False)  # the counter can not follow views of parameters
    shape = RequestShape(num_history=20, num_candidates=40)
    rows = [1 if kind == "sim-hard" else 1 + i % 12 for i in range(40)]
    batch = rich_batch([[1 + i % 12 for i in range(20)]], [rows])
    model.score(batch)  # item vectors are kept from here on
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    cost, cached = model.cost(shape), model.cost(shape, cached=True)
    if kind != "sdim":  # its sums are index_add and look-ups, which the counter does not see
        assert cost.user_flops == pytest.approx(user.get_total_flops(), rel=0.3)
        assert 40 * cost.item_flops == pytest.approx(item.get_total_flops(), rel=0.3)
    assert cost.item_flops > item.get_total_flops() / 40 * 0.7
    assert cached.user_flops == 0
    assert 0 < cached.bytes <= cost.bytes


def test_settings_out_of_range_are_refused_by_name(kind):
    _, config = MODELS[kind]
    for name, value in (("dim", 0), ("num_heads", 3), ("max_history", 0), ("id_dropout", 1.0), ("pairs_at_once", 0)):
        with pytest.raises(ConfigError, match=name):
            replace(config, **{name: value})
    with pytest.raises(ConfigError, match=f"{kind.split('-')[0]}: head.dropout"):
        replace(config, head=HeadConfig(dropout=1.5))
