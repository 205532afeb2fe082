"""Gates: formulas, the identity at the start, no gradient into what they read, and switched on in any ranker's head."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from interaction_support import pairs_batch, pairs_space
from ranking_support import rich_batch, rich_space, share_right, train
from shortlist.errors import ConfigError
from shortlist.layers.adaptive import APGConfig
from shortlist.layers.gates import GateConfig, GateUnit, SENet
from shortlist.layers.scoring import CandidateHead, GatedMLP, HeadConfig, SplitMLP, make_tower
from shortlist.models.base import Ranker
from shortlist.registry import find, systems

PAST, OFFERED = [[1, 2, 3, 4], [], [5, 5], [6]], [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]
ALL = GateConfig(senet=True, epnet=("context.hour",), ppnet=("user", "item"), lhuc="user")


@torch.no_grad()
def test_senet_by_hand_with_fields_of_different_width():
    gate = SENet((2, 1), GateConfig(senet=True, senet_squeeze="mean", senet_output="relu", senet_reduction=1))
    gate.squeeze_map.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    gate.excite_map.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, -1.0]]))
    x = torch.tensor([[1.0, 3.0, 4.0]])  # means 2 and 4: weights 6 and relu(-4)
    torch.testing.assert_close(gate.weights(x), torch.tensor([[6.0, 0.0]]))
    torch.testing.assert_close(gate(x), torch.tensor([[6.0, 18.0, 0.0]]))


@torch.no_grad()
def test_senet_sees_the_largest_number_of_a_field_too():
    gate = SENet((2, 2), GateConfig(senet=True, senet_reduction=1))
    nn.init.ones_(gate.excite_map.weight)
    same_mean = torch.tensor([[1.0, -1.0, 0.5, -0.5], [3.0, -3.0, 0.5, -0.5]])
    assert gate.weights(same_mean)[0, 0] != gate.weights(same_mean)[1, 0]


@torch.no_grad()
def test_a_gate_by_its_formula():
    gate = GateUnit(2, 3, 4, 5)
    nn.init.normal_(gate.last.weight)
    prior, x = torch.randn(6, 2), torch.randn(6, 3)
    hidden = (torch.cat([prior, x], 1) @ gate.first.weight.T + gate.first.bias).clamp(min=0)
    expected = 2 / (1 + torch.exp(-(hidden @ gate.last.weight.T + gate.last.bias)))
    torch.testing.assert_close(gate(prior, x), expected)


def test_no_gradient_reaches_what_a_gate_reads():
    gate, prior, x = GateUnit(2, 3, 4, 5), torch.randn(6, 2, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    nn.init.normal_(gate.last.weight)
    gate(prior, x).sum().backward()
    assert x.grad is None
    assert prior.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "gates",
    [
        GateConfig(senet=True),
        GateConfig(epnet=("context.hour",)),
        GateConfig(ppnet=("user", "item")),
        GateConfig(lhuc="user"),
        ALL,
    ],
    ids=["senet", "epnet", "ppnet", "lhuc", "all"],
)
@torch.no_grad()
def test_every_gate_starts_as_the_identity(gates):
    torch.manual_seed(0)
    space, config = rich_space(), HeadConfig(widths=(6, 5), dropout=0.0, norm="batch", gates=gates)
    gated = make_tower(space, [4, 4], [4, 2], config).eval()
    plain = make_tower(space, [4, 4], [4, 2], replace(config, gates=GateConfig())).eval()
    assert isinstance(gated, GatedMLP)
    assert isinstance(plain, SplitMLP)
    plain.mlp.load_state_dict(gated.mlp.state_dict())
    batch = rich_batch(PAST, OFFERED)
    rows = batch.candidate_rows
    request, candidate = torch.randn(4, 8), torch.randn(len(rows.values), 6)
    scores = [
        tower(tower.request_side(request, batch), candidate, rows.row_of_value, rows.values) for tower in (gated, plain)
    ]
    torch.testing.assert_close(scores[0], scores[1])


@torch.no_grad()
def test_gates_of_hidden_units_multiply_after_the_activation():
    torch.manual_seed(0)
    tower = make_tower(
        rich_space(), [4], [4], HeadConfig(widths=(6, 5), activation="relu", dropout=0.0, gates=ALL)
    ).eval()
    for gate in (tower.gates.ppnet, tower.gates.epnet, tower.gates.senet):
        for parameter in gate.parameters():
            nn.init.normal_(parameter)
    nn.init.normal_(tower.priors.groups["lhuc"].user_ids.rows.weight)
    batch = rich_batch(PAST, OFFERED)
    rows = batch.candidate_rows
    request, candidate = torch.randn(4, 4), torch.randn(len(rows.values), 4)
    made = tower(tower.request_side(request, batch), candidate, rows.row_of_value, rows.values)
    row, expected = rows.row_of_value, []
    for i, item in enumerate(rows.values.tolist()):
        item = item if item < 11 else 0  # 11 and 12 had no training events
        x = torch.cat([request[row[i]], candidate[i]])[None]
        user = int(batch.user[row[i]])
        groups = tower.priors.groups
        x = tower.gates.senet(x)
        hour = groups["epnet"].context_fields.maps[0].weight[batch.context["hour"][row[i]]][None]
        x = tower.gates.epnet.gate(hour, x) * x
        prior = torch.cat([groups["ppnet"].user_ids.rows.weight[user], groups["ppnet"].item_ids.rows.weight[item]])[
            None
        ]
        own = 2 * torch.sigmoid(groups["lhuc"].user_ids.rows.weight[user])
        h = x
        for number, at in enumerate((0, 2)):
            linear = tower.mlp.layers[at]
            h = torch.relu(linear(h)) * tower.gates.ppnet.gates[number](prior, x)
            h = h * (own[:6] if number == 0 else own[6:])
        expected.append(tower.mlp.layers[-1](h))
    torch.testing.assert_close(made, torch.cat(expected))


def with_gates(name: str, gates: GateConfig, apg: APGConfig | None = None) -> Ranker:
    """A tiny ranker with gates in its head, whatever its settings call it; None where it has no tower."""
    entry, apg = find(name), apg or APGConfig()
    settings = dict(entry.tiny)
    fields = entry.cls.Config.__dataclass_fields__
    if "apg" in fields:
        settings.update(gates=gates, apg=apg)
    elif "head" in fields and isinstance(settings.get("head", HeadConfig()), HeadConfig) and name != "fm":
        head = settings.get("head", HeadConfig(widths=(8,), dropout=0.0))
        settings["head"] = replace(head, widths=head.widths or (8,), gates=gates, apg=apg)
    else:
        return None
    torch.manual_seed(0)
    return entry.cls(entry.config(settings), rich_space(tasks=("target",)))


GATED = [e.name for e in systems(kind="ranker") if with_gates(e.name, ALL) is not None]


def test_most_rankers_have_a_head():
    assert {"dnn", "din", "dien", "bst", "sim", "deepfm", "dcnv2", "can", "fat"} <= set(GATED)


@pytest.mark.parametrize("name", ["dnn", "din", "bst", "deepfm", "dcnv2", "can", "fat"])
@pytest.mark.parametrize(
    "apg", [APGConfig(), APGConfig(mode="shared", rank=2, condition="mix", fields=("user", "item"))]
)
def test_any_ranker_takes_gates_and_generated_weights_and_trains_them(name, apg):
    model = with_gates(name, ALL, apg).eval()
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    with torch.no_grad():
        together = model.score(batch)["target"]
        alone = model.score(rich_batch(PAST[:1], OFFERED[:1]))["target"]
    torch.testing.assert_close(alone, together[:3], rtol=1e-4, atol=1e-5)
    model.train()
    sum(model.losses(batch).values()).backward()
    moved = [
        n
        for n, p in model.named_parameters()
        if ("gates" in n or "generator" in n) and p.grad is not None and p.grad.any()
    ]
    assert any("lhuc" in n or "last" in n for n in moved)
    if name in ("deepfm", "can"):
        assert any("excite" in n for n in moved)  # with a field or two, SENet's one hidden unit may be off
    assert any("generator" in n for n in moved) == (apg.mode != "off")


def test_lhuc_learns_what_one_context_wants_of_shared_units():
    """Which items a context wants is told by the gates alone: the tower is not given the context."""
    head = HeadConfig(
        widths=(16,),
        activation="relu",
        dropout=0.0,
        id_dropout=0.0,
        gates=GateConfig(lhuc="context.kind", id_dropout=0.0),
    )
    right = {}
    for gates in (head.gates, GateConfig()):
        torch.manual_seed(0)
        entry = find("deepfm")
        fields = entry.tiny["fields"]
        fields = replace(fields, names=("item", "context.noise"))
        model = entry.cls(entry.config({"fields": fields, "head": replace(head, gates=gates)}), pairs_space())
        train(model, pairs_batch, steps=150, lr=0.03)
        right[gates.lhuc] = share_right(model, pairs_batch(400, torch.Generator().manual_seed(9)))
    assert right["context.kind"] > 0.9
    assert right[""] < 0.65


def test_settings_out_of_range_are_refused_by_name():
    for wrong in ({"hidden": 0}, {"senet_squeeze": "sum"}, {"id_dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GateConfig(**wrong)
    with pytest.raises(ConfigError, match="hidden layers"):
        make_tower(rich_space(), [4], [4], HeadConfig(widths=(), gates=GateConfig(ppnet=("user",))))
    with pytest.raises(ConfigError, match=r"no field 'user.age'"):
        CandidateHead(rich_space(), 4, 4, HeadConfig(gates=GateConfig(epnet=("user.age",))))
