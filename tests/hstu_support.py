"""Small HSTU rankers in every form, and requests with random pasts, for their tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from ranking_support import rich_batch, rich_space
from shortlist.data.batches import Batch, History, NextTargets
from shortlist.data.jagged import Jagged
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.layers.scoring import HeadConfig
from shortlist.models.ranking.hstu_ranker import PRODUCTION, HSTURanker, HSTURankerConfig

BLOCK = HSTUBlockConfig(num_blocks=2, num_heads=2, block_dropout=0.0)
HEAD = HeadConfig(widths=(16,), dropout=0.0, id_dropout=0.0, activation="relu")
TINY = HSTURankerConfig(dim=8, max_history=6, layers=BLOCK, head=HEAD, dropout=0.0, id_dropout=0.0, micro_batch=2)
INTERLEAVED = replace(TINY, tokens="interleaved", positive_actions=("like",))
SMALL_PRODUCTION = replace(
    HSTURankerConfig(**PRODUCTION),
    dim=8,
    max_history=6,
    micro_batch=2,
    layers=replace(PRODUCTION["layers"], num_blocks=2, num_heads=2, qk_dim=3, v_dim=5),
)
FORMS = {
    "merged": TINY,
    "interleaved": INTERLEAVED,
    "prefix": replace(TINY, prefix=True, value_buckets=4),
    "interleaved prefix": replace(INTERLEAVED, prefix=True),
    "production layer": replace(TINY, layers=replace(BLOCK, variant="production", qk_dim=3, v_dim=5)),
    "production": SMALL_PRODUCTION,
}
ACTIONS = ("view", "like", "buy")
PAST = [[1, 2, 3, 4], [], [5, 5], [6], [7, 8, 9, 10, 1, 2, 3, 4]]
OFFERED = [[1, 7, 9, 11, 12], [2, 11], [], [3, 12, 8, 4], [1, 2, 3, 4, 5, 6, 7]]


def made(config: HSTURankerConfig = TINY, space=None, seed: int = 0) -> HSTURanker:
    """A model whose biases and layers all have a say."""
    torch.manual_seed(seed)
    model = HSTURanker(config, space or rich_space(actions=ACTIONS))
    for name, parameter in model.stack.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.4)
    if model.tokens.unknown is not None:
        torch.nn.init.normal_(model.tokens.unknown)
    torch.nn.init.normal_(model.items.ids.rows.weight, std=0.3)
    torch.nn.init.normal_(model.tokens.actions.out.weight, std=0.5)
    return model.eval()


def acting(batch: Batch, seed: int = 0) -> Batch:
    """The same with random actions, worths and gaps from seconds to weeks."""
    history, draw = batch.history, torch.Generator().manual_seed(seed)
    total = len(history.items.values)
    gap = (torch.rand(total, generator=draw) * 14).exp().long()
    time = gap.cumsum(0)
    last = torch.cat([time, time.new_zeros(1)])[history.items.offsets[1:] - 1]
    history = replace(
        history,
        action=torch.randint(1, 4, (total,), generator=draw),
        value=torch.randint(0, 9, (total,), generator=draw).float(),
        time=time,
    )
    return replace(batch, history=history, time=torch.where(history.items.lengths > 0, last + 5_000, 7_000))


def rich(past=PAST, offered=OFFERED) -> Batch:
    return acting(rich_batch(past, offered))


def events(batch: Batch, rows: list[tuple[int, slice]], later: int = 0) -> Batch:
    """Requests that are parts of the histories of others, asked `later` seconds after the next event, or as the batch says."""
    history, parts, times = batch.history, [], []
    for row, cut in rows:
        start, stop = history.items.offsets[row : row + 2].tolist()
        index = torch.arange(start, stop)[cut]
        after = int(index[-1]) + 1 if len(index) else start
        times.append(int(history.time[after]) if after < stop and not later else int(batch.time[row]) + later)
        parts.append(index)
    where, lengths = torch.cat(parts), torch.tensor([len(part) for part in parts])
    columns = {name: getattr(history, name)[where] for name in ("time", "action", "value", "group")}
    chosen = torch.tensor([row for row, _ in rows])
    return replace(
        batch,
        user=batch.user[chosen],
        time=torch.tensor(times),
        history=History(items=Jagged.from_lengths(history.items.values[where], lengths), **columns),
        user_fields={name: column[chosen] for name, column in batch.user_fields.items()},
        context={name: column[chosen] for name, column in batch.context.items()},
        candidates=None,
        labels={},
    )


def score_of(model: HSTURanker, batch: Batch, offered: list[list[int]]) -> torch.Tensor:
    return model.score(with_candidates(batch, offered))["target"]


def with_candidates(batch: Batch, offered: list[list[int]]) -> Batch:
    rows = torch.tensor([row for rows in offered for row in rows], dtype=torch.int64)
    pair = {"seen": rows / 12, "since": torch.cos(rows.float())}
    return batch.with_candidates(Jagged.from_rows(offered), pair)


def next_batch(batch: Batch) -> Batch:
    """Supervised at every event that ends a group, by the item after it (the first one of the row after the last)."""
    rows = batch.history.items
    target = torch.roll(rows.values, -1)
    position = torch.arange(len(rows.values))
    return replace(
        batch,
        context={},
        targets=NextTargets(
            position=position,
            items=Jagged.from_lengths(target, torch.ones_like(position)),
            weight=torch.ones(len(position)),
        ),
    )
