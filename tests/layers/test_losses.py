"""Losses against formulas written plainly in numpy, closed forms and limits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.losses import (
    bce_loss,
    binary_loss,
    bpr_loss,
    bpr_max_loss,
    full_softmax_loss,
    gbce_beta,
    gbce_loss,
    hide_hits,
    in_batch_softmax_loss,
    negative_scores,
    sampled_softmax_loss,
    softmax_ranking_loss,
    target_scores,
    top1_loss,
    top1_max_loss,
    unit,
    weighted_mean,
)

TARGETS = Jagged.from_rows([[2, 5], [1], [], [4, 4, 0]])  # three positions with targets, one of them unknown
WEIGHT = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.5, 9.0], dtype=torch.float64)


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    items = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    return query, items


def full_softmax_by_hand(query: Tensor, items: Tensor, allowed: list[int]) -> float:
    logits = query.detach().numpy() @ items.detach().numpy().T
    total, weights = 0.0, 0.0
    for target, row, weight in zip(TARGETS.values.tolist(), TARGETS.row_of_value.tolist(), WEIGHT.tolist()):
        if target == 0:
            continue
        normaliser = sum(math.exp(logits[row, item]) for item in allowed)
        total -= weight * math.log(math.exp(logits[row, target]) / normaliser)
        weights += weight
    return total / weights


@pytest.mark.parametrize("logits_at_once", [1, 14, 1 << 20])
def test_full_softmax_is_the_formula_whatever_the_chunks(vectors, logits_at_once):
    query, items = vectors
    loss = full_softmax_loss(query, items, TARGETS, WEIGHT, logits_at_once=logits_at_once)
    assert loss.item() == pytest.approx(full_softmax_by_hand(query, items, [1, 2, 3, 4, 5, 6]))
    allowed = torch.tensor([1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    loss = full_softmax_loss(query, items, TARGETS, WEIGHT, allowed_N=allowed, logits_at_once=logits_at_once)
    assert loss.item() == pytest.approx(full_softmax_by_hand(query, items, [1, 2, 4, 5]))


@pytest.mark.parametrize("logits_at_once", [7, 1 << 20])
def test_full_softmax_gradient_is_right(vectors, logits_at_once):
    query, items = vectors

    def loss(q: Tensor, w: Tensor) -> Tensor:
        return 2.5 * full_softmax_loss(q, w, TARGETS, WEIGHT, logits_at_once=logits_at_once)

    assert torch.autograd.gradcheck(loss, (query, items))
    loss(query, items).backward()
    assert not items.grad[0].any(), "row 0 must get no gradient"


def test_full_softmax_equals_cross_entropy_for_one_target_each(vectors):
    query, items = vectors
    targets = torch.tensor([3, 1, 6, 2])
    expected = torch.nn.functional.cross_entropy((query @ items.T)[:, 1:], targets - 1)
    loss = full_softmax_loss(query, items, Jagged.from_lengths(targets, torch.ones(4, dtype=torch.int64)))
    torch.testing.assert_close(loss, expected)


def test_sampled_softmax_with_all_items_is_the_full_one(vectors):
    query, items = vectors
    rows = torch.arange(1, 7)
    negative = hide_hits(negative_scores(query, items[rows]), rows, TARGETS)
    # A position with two targets: each is scored against itself and the items that are no targets.
    single = Jagged.from_rows([[2], [1], [6], [4]])
    positive = target_scores(query, items[single.values], single)
    alone = hide_hits(negative_scores(query, items[rows]), rows, single)
    torch.testing.assert_close(sampled_softmax_loss(positive, alone, single), full_softmax_loss(query, items, single))
    assert (negative[0] == torch.finfo(torch.float64).min).tolist() == [False, True, False, False, True, False]


def test_corrected_sampled_softmax_estimates_the_full_sum(vectors):
    """Many draws from a skewed law: with the correction the loss is the full one, without it far off."""
    query, items = vectors
    chance = torch.tensor([0, 0.5, 0.25, 0.1, 0.05, 0.05, 0.05], dtype=torch.float64)
    rows = torch.multinomial(chance, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    single = Jagged.from_rows([[2], [1], [6], [4]])
    positive = target_scores(query, items[single.values], single)
    negative = hide_hits(negative_scores(query, items[rows]), rows, single)
    full = full_softmax_loss(query, items, single).item()
    corrected = sampled_softmax_loss(positive, negative, single, None, (len(rows) * chance[rows]).log()).item()
    assert corrected == pytest.approx(full, rel=0.01)
    assert sampled_softmax_loss(positive, negative, single, None, math.log(len(rows) / 6)).item() != pytest.approx(
        full, rel=0.05
    )


def test_own_negatives_and_shared_negatives_agree(vectors):
    query, items = vectors
    rows = torch.tensor([1, 5, 3])
    own = rows.expand(4, 3)
    shared = hide_hits(negative_scores(query, items[rows]), rows, TARGETS)
    torch.testing.assert_close(hide_hits(negative_scores(query, items[own]), own, TARGETS), shared)


def bce_by_hand(positive: np.ndarray, negative: np.ndarray, beta: float) -> float:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    total, weights = 0.0, 0.0
    for t, (target, row) in enumerate(zip(TARGETS.values.tolist(), TARGETS.row_of_value.tolist())):
        if target:
            loss = np.log(sigmoid(positive[t]) ** beta) + np.log(1 - sigmoid(negative[row])).sum()
            total -= WEIGHT[t].item() * loss / (1 + len(negative[row]))
            weights += WEIGHT[t].item()
    return total / weights


def test_bce_and_gbce_are_the_formulas(vectors):
    query, items = vectors
    positive = target_scores(query, items[TARGETS.values], TARGETS)
    for rows in (torch.tensor([[3], [3], [3], [3]]), torch.tensor([[3, 6], [2, 6], [1, 3], [6, 6]])):
        negative = negative_scores(query, items[rows])
        numbers = positive.detach().numpy(), negative.detach().numpy()
        assert bce_loss(positive, negative, TARGETS, WEIGHT).item() == pytest.approx(bce_by_hand(*numbers, 1.0))
        assert gbce_loss(positive, negative, TARGETS, WEIGHT, beta=0.3).item() == pytest.approx(
            bce_by_hand(*numbers, 0.3)
        )


def test_gbce_power_at_its_limits():
    assert gbce_beta(256, 3417, 0.0) == 1.0
    assert gbce_beta(256, 3417, 1.0) == pytest.approx(256 / 3416)
    alpha, t = 256 / 3416, 0.75  # the formula as printed
    assert gbce_beta(256, 3417, t) == pytest.approx(alpha * (t * (1 - 1 / alpha) + 1 / alpha))
    for wrong in ((256, 3417, 1.5), (0, 10, 0.5), (4, 1, 0.5)):
        with pytest.raises(ConfigError):
            gbce_beta(*wrong)


def test_calibrated_gbce_learns_true_chances():
    """Alpha as the power undoes the overconfidence of sampled negatives: the optimum of the score is the true chance."""
    num_items, num_negatives, true_chance = 1001, 10, 0.02
    score = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    beta = gbce_beta(num_negatives, num_items, 1.0)
    optimiser = torch.optim.LBFGS([score], max_iter=200, line_search_fn="strong_wolfe")

    def expected_loss() -> Tensor:
        """One item: positive with its chance, drawn as a negative of the others' positives at the sampling rate."""
        optimiser.zero_grad()
        drawn = (1 - true_chance) * num_negatives / (num_items - 1)
        log_no, log_yes = -torch.nn.functional.softplus(score), torch.nn.functional.logsigmoid(score)
        loss = -(true_chance * beta * log_yes + drawn * log_no).sum()
        loss.backward()
        return loss

    optimiser.step(expected_loss)
    assert score.sigmoid().item() == pytest.approx(true_chance, rel=1e-3)


@pytest.mark.parametrize("beta", [1.0, 1e-4])
def test_gbce_is_finite_at_extreme_float32_scores(beta):
    positive = torch.tensor([-200.0, 200.0], requires_grad=True)
    negative = torch.tensor([[200.0, -200.0], [torch.finfo(torch.float32).min, 3.0]], requires_grad=True)
    loss = gbce_loss(positive, negative, Jagged.from_rows([[1], [2]]), beta=beta)
    loss.backward()
    assert loss.isfinite()
    assert positive.grad.isfinite().all()
    assert negative.grad.isfinite().all()
    assert negative.grad[1, 0] == 0, "a hidden negative must get no gradient"


def test_all_negatives_hidden_teaches_nothing():
    targets = Jagged.from_rows([[1], [1]])
    query = torch.ones(2, 2, requires_grad=True)
    loss = in_batch_softmax_loss(query, torch.ones(2, 2), targets.values, targets)
    loss.backward()
    assert loss.item() == 0
    assert not query.grad.any()


@pytest.mark.parametrize("correct_target", [True, False])
def test_in_batch_softmax_is_the_formula(vectors, correct_target):
    query, items = vectors
    targets = Jagged.from_rows([[2, 5], [2], [6], [4]])
    pool_rows = torch.cat([targets.values, torch.tensor([3, 5])])
    log_q = torch.log(torch.tensor([1, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64))[pool_rows]
    logits = (query @ items[pool_rows].T).detach().numpy()
    loss = in_batch_softmax_loss(query, items[pool_rows], pool_rows, targets, log_q, correct_target=correct_target)
    expected = []
    for t, (target, row) in enumerate(zip(targets.values.tolist(), targets.row_of_value.tolist())):
        mine = logits[row, t] - (log_q[t].item() if correct_target else 0.0)
        own = {v for v, r in zip(targets.values.tolist(), targets.row_of_value.tolist()) if r == row}
        rest = [logits[row, j] - log_q[j].item() for j, item in enumerate(pool_rows.tolist()) if item not in own]
        assert target in own
        expected.append(-math.log(math.exp(mine) / (math.exp(mine) + sum(map(math.exp, rest)))))
    assert loss.item() == pytest.approx(np.mean(expected))


def test_ranker_losses_are_the_formulas():
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 800.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    rows = Jagged.from_lengths(torch.arange(6), torch.tensor([3, 2, 0, 1]))
    s, y, w = (x.detach().numpy()[:5] for x in (scores, labels, weight))
    chance = 1 / (1 + np.exp(-s))
    log_loss = -(y * np.log(chance) + (1 - y) * np.log(1 - chance))
    binary = binary_loss(scores[:5], labels[:5], weight[:5])
    assert binary.item() == pytest.approx((w * log_loss).sum() / w.sum())
    assert binary_loss(scores[:5], labels[:5]).item() == pytest.approx(log_loss.mean())

    first = np.log(np.exp(s[:3]).sum()) - s[:3]  # the second request has no positive, the last one has nothing to rank
    listwise = softmax_ranking_loss(scores, labels, rows)
    assert listwise.item() == pytest.approx(((first[0] + first[2]) / 2 + 0.0) / 2)
    weighted = softmax_ranking_loss(scores, labels, rows, weight)
    assert weighted.item() == pytest.approx((2 * first[0] / 2 + 1 * first[2] / 2) / (1 + 0.5 + 0.5))
    assert torch.autograd.gradcheck(lambda x: softmax_ranking_loss(x, labels, rows, weight), (scores,))


def test_nothing_to_learn_from_is_zero_not_nan():
    query = torch.ones(2, 3, requires_grad=True)
    none = Jagged.from_rows([[], [0]])
    loss = full_softmax_loss(query, torch.ones(4, 3), none)
    loss.backward()
    assert loss.item() == 0
    assert not query.grad.any()
    assert weighted_mean(torch.zeros(0), None).item() == 0


def test_unit_keeps_zero_and_scales_the_rest():
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# --- the pairwise losses of GRU4Rec ---

PAIRWISE = {
    "bpr": bpr_loss,
    "top1": top1_loss,
    "top1_max": top1_max_loss,
    "bpr_max": lambda *args: bpr_max_loss(*args, penalty=1.5),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairwise_by_hand(name: str, positive: float, negatives: list[float]) -> float:
    """One target against the negatives that are shown, as the papers write it."""
    total = sum(math.exp(s) for s in negatives)
    hardness = [math.exp(s) / total for s in negatives]
    match name:
        case "bpr":
            return -sum(math.log(sigmoid(positive - s)) for s in negatives) / len(negatives)
        case "top1":
            return sum(sigmoid(s - positive) + sigmoid(s * s) for s in negatives) / len(negatives)
        case "top1_max":
            return sum(w * (sigmoid(s - positive) + sigmoid(s * s)) for w, s in zip(hardness, negatives))
        case _:
            win = sum(w * sigmoid(positive - s) for w, s in zip(hardness, negatives))
            return -math.log(win) + 1.5 * sum(w * s * s for w, s in zip(hardness, negatives))


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("hide", [False, True])
def test_pairwise_losses_are_the_formulas(vectors, name, hide):
    query, items = vectors
    rows = torch.tensor([1, 2, 3, 6])  # 1 and 2 are targets of positions 1 and 0
    negative = negative_scores(query, items[rows])
    if hide:
        negative = hide_hits(negative, rows, TARGETS)
    positive = target_scores(query, items[TARGETS.values], TARGETS)
    loss = PAIRWISE[name](positive, negative, TARGETS, WEIGHT)
    scores = (query @ items.T).detach().numpy()
    total, weights = 0.0, 0.0
    for target, row, weight in zip(TARGETS.values.tolist(), TARGETS.row_of_value.tolist(), WEIGHT.tolist()):
        own = TARGETS.values[TARGETS.row_of_value == row].tolist()
        shown = [scores[row, item] for item in rows.tolist() if not (hide and item in own)]
        if target:
            total += weight * pairwise_by_hand(name, scores[row, target], shown)
            weights += weight
    assert loss.item() == pytest.approx(total / weights)
    loss.backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_target_without_any_negative_costs_nothing(name):
    query, items = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    targets = Jagged.from_rows([[1], [2]])
    rows = torch.tensor([1, 0])
    negative = hide_hits(negative_scores(query, items[rows]), rows, targets)  # position 0 has none left, position 1 one
    positive = target_scores(query, items[targets.values], targets)
    loss = PAIRWISE[name](positive, negative, targets)
    alone = pairwise_by_hand(name, float(positive[1]), [float(negative[1, 0])])
    assert loss.item() == pytest.approx(alone, rel=1e-5)
    loss.backward()
    assert query.grad.isfinite().all()
    assert not query.grad[0].any()


@pytest.mark.parametrize("name", ["top1_max", "bpr_max"])
def test_max_losses_follow_the_hardest_negative_and_means_forget_it(name):
    """The gradient on the target's score with one hard negative among 2,000 easy ones: the reason for the max forms."""

    def pull(loss) -> float:
        positive = torch.zeros(1, requires_grad=True)
        negative = torch.full((1, 2001), -20.0)
        negative[0, 7] = 0.5
        loss(positive, negative, Jagged.from_rows([[1]])).backward()
        return -float(positive.grad)

    plain = top1_loss if name == "top1_max" else bpr_loss
    strong = {"top1_max": top1_max_loss, "bpr_max": bpr_max_loss}[name]
    assert pull(strong) > 0.1
    assert pull(plain) < 1e-3


def test_bpr_max_survives_scores_without_hope():
    positive = torch.tensor([-200.0], requires_grad=True)
    loss = bpr_max_loss(positive, torch.tensor([[200.0, 199.0]]), Jagged.from_rows([[1]]), penalty=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(400, abs=1)
    assert positive.grad.item() == pytest.approx(-1, abs=0.01)
