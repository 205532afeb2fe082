"""ELASTIC: against its equations written out, the future hidden from every position, sums that only grow, planted logs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from sequence_support import batch_of, learn, view_of
from shortlist.data.batches import next_event_batch
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.models.base import RequestShape
from shortlist.models.retrieval.elastic import CAP, Chunks, Elastic, ElasticConfig
from support import NUM_ITEMS, PER_CLUSTER, planted_view

NUM = 30
VIEW = view_of([[[item] for item in range(1, NUM + 1)]], NUM)


def make(view=VIEW, seed: int = 0, **settings) -> Elastic:
    torch.manual_seed(seed)
    chosen = {"dim": 8, "max_history": 40, "num_experts": 3, "chunk": 4, "num_heads": 2, "dropout": 0.0, **settings}
    model = Elastic(ElasticConfig(**chosen), view.space)
    model.prepare(view)
    return model.eval()


def histories(*lengths: int) -> list[list[int]]:
    return [[1 + (7 * row + 3 * place) % NUM for place in range(length)] for row, length in enumerate(lengths)]


def written_out(model: Elastic, items: list[int]) -> torch.Tensor:
    """What the last position asks for, by the formulas, event by event, expert by expert."""
    config = model.config
    dim, width, size = config.dim, config.dim // config.num_heads, config.chunk
    x = model.items(torch.tensor(items)) * dim**0.5 + model.positions.weight[: len(items)]
    for block in model.blocks:
        h = block.norm(x)
        key, value = block.gather(h).chunk(2, 1)
        rows = []
        for t in range(len(items)):
            start = t // size * size
            gathered = torch.zeros(config.num_experts, dim)
            for expert in range(config.num_experts):
                for head in range(config.num_heads):
                    part = slice(head * width, (head + 1) * width)
                    if start:
                        answer = key[:start, part] @ block.experts_kD[expert, part] / width**0.5
                        weight = (CAP * torch.tanh(answer / CAP)).softmax(0)
                        gathered[expert, part] = weight @ value[:start, part]
            token = block.experts_kD + block.experts_out(gathered)
            token = token + block.token_ffn(block.token_norm(token))
            seen = torch.cat([block.key_value(block.token_key_norm(token)), block.key_value(h[start : t + 1])])
            read = []
            for head in range(config.num_heads):
                part = slice(head * width, (head + 1) * width)
                weight = (seen[:, :dim][:, part] @ block.query(h[t])[part] / width**0.5).softmax(0)
                read.append(weight @ seen[:, dim:][:, part])
            rows.append(x[t] + block.out(torch.cat(read)))
        x = torch.stack(rows)
        x = x + block.ffn(block.ffn_norm(x))
    return layer_norm(x[-1], (dim,), model.norm.weight, model.norm.bias)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_a_user_vector_is_what_the_formulas_say(length):
    model, items = make(), histories(length)
    vector = model.encode_user(batch_of(VIEW, items))[0, :-1]
    torch.testing.assert_close(vector, written_out(model, items[0]), atol=1e-5, rtol=1e-4)


def test_no_position_sees_what_comes_after_it():
    model = make()
    rows = Jagged.from_rows(histories(19))
    for t in range(19):
        changed = rows.values.clone()
        changed[t + 1 :] = 1 + (changed[t + 1 :] + 5) % NUM
        before, _ = model._query(rows, model.items(rows.values))
        after, _ = model._query(rows.with_values(changed), model.items(changed))
        torch.testing.assert_close(before[: t + 1], after[: t + 1])
        if t < 18:
            assert not torch.allclose(before[t + 1], after[t + 1])


def test_a_distant_event_is_still_seen_through_the_experts():
    model, items = make(), histories(25)
    other = [[1 + items[0][0] % NUM, *items[0][1:]]]
    assert not torch.allclose(model.encode_user(batch_of(VIEW, items)), model.encode_user(batch_of(VIEW, other)))


def test_other_users_of_the_batch_do_not_matter_and_empty_histories_ask_for_popular_items():
    model, items = make(), histories(13, 0, 4, 1, 29)
    together = model.encode_user(batch_of(VIEW, items))
    assert torch.isfinite(together).all()
    assert together[1].tolist() == [0.0] * 8 + [1.0]
    for row, alone in enumerate(items):
        torch.testing.assert_close(together[row : row + 1], model.encode_user(batch_of(VIEW, [alone])))


def test_memories_give_the_same_vector_and_only_new_events_are_encoded():
    model = make(memory_slots=16, memory_reads=2)
    grown, memories = histories(35, 22, 9), [None, None, None]
    for cut in (3, 4, 5, 11, 12, 20, 35):
        batch = batch_of(VIEW, [row[:cut] for row in grown])
        found, memories = model.recall(batch, memories)
        torch.testing.assert_close(found, model.encode_user(batch), atol=1e-5, rtol=1e-5)
    assert [len(m["items"]) for m in memories] == [32, 20, 8]
    sizes = {sum(t.numel() for name, t in m.items() if name != "items") for m in memories}
    assert sizes == {2 * 3 * 8 + 2 * 3 * 2}  # whatever the history: layers x experts x (D values + H weights)
    encoded = []
    model.items.register_forward_hook(lambda _, given, __: encoded.append(len(given[0])))
    model.recall(batch, memories)
    assert encoded == [35 - 32 + 22 - 20 + 9 - 8]


def test_a_memory_of_another_past_is_passed_over():
    model = make()
    _, memories = model.recall(batch_of(VIEW, histories(12)), [None])
    for changed in ([[2, *histories(12)[0][1:], 7]], [histories(12)[0][1:]], histories(3), [[]]):
        batch = batch_of(VIEW, changed)
        torch.testing.assert_close(model.recall(batch, memories)[0], model.encode_user(batch), atol=1e-5, rtol=1e-5)


def test_the_interest_memory_changes_the_tokens_and_learns_only_what_it_read():
    model = make(memory_slots=64, memory_reads=2).train()
    batch = next_event_batch(VIEW.histories, VIEW.users, torch.tensor([1]).numpy(), max_history=40)
    model.losses(batch)["next"].backward()
    touched = model.blocks[0].memory.values.rows.weight.grad.coalesce().indices().shape[1]
    assert 0 < touched <= 8 * 3 * 2  # chunks x experts x reads


def test_it_learns_the_next_item_beyond_its_chunk():
    """What follows is said by the first event alone, which is far outside the last chunk."""
    rows = [[[kind], *[[item] for item in (5, 6, 7, 8)], [kind + 10]] for kind in (1, 2, 3, 4) for _ in range(32)]
    view = view_of(rows, 14)
    model = learn(make(view, chunk=2, dim=16, num_blocks=1), view, epochs=80)
    asked = batch_of(view, [[kind, 5, 6, 7, 8] for kind in (1, 2, 3, 4)])
    assert model.retrieve(asked, 1).rows[:, 0].tolist() == [11, 12, 13, 14]


def test_it_learns_a_planted_log():
    view = planted_view()
    model = learn(make(view, dim=16, max_history=20), view, epochs=30)
    batch = next_event_batch(view.histories, view.users, torch.arange(1, 61).numpy(), max_history=20)
    found = model.retrieve(batch, 3).rows
    last = batch.history.items.values[batch.history.items.offsets[1:] - 1]
    same = (found - 1) // PER_CLUSTER == ((last - 1) // PER_CLUSTER)[:, None]
    assert NUM_ITEMS // PER_CLUSTER > 1
    assert same.float().mean() > 0.8


def test_chunks_cut_each_user_from_the_first_event():
    chunks = Chunks.of(Jagged.from_rows([[1, 1, 1, 1, 1], [], [1, 1]]), 2)
    assert chunks.cell_GC.tolist() == [[0, 1], [2, 3], [4, 4], [5, 6]]
    assert chunks.user_G.tolist() == [0, 0, 0, 2]
    assert chunks.num_full_B.tolist() == [2, 0, 0]
    assert chunks.place_T.tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_cost_grows_linearly_and_not_at_all_with_a_memory():
    model = make(max_history=10_000)
    cost = [model.cost(RequestShape(num_history=n)).user_flops for n in (1_000, 8_000)]
    assert cost[1] / cost[0] == pytest.approx(8, rel=0.01)
    cached = [model.cost(RequestShape(num_history=n), cached=True).user_flops for n in (1_000, 8_000)]
    assert cached[0] == cached[1] < cost[0] / 50


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_heads": 3}, "num_heads must divide dim"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"memory_slots": -1}, "memory_slots must be at least 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ElasticConfig(**settings)
