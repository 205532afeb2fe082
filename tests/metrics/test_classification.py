"""Classification metrics against scikit-learn, closed forms and cases computed by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist import metrics
from shortlist.errors import ConfigError, DataError


def random_case(seed, num_rows=300, num_users=12):
    """Labels that follow coarse (often tied) probabilities, weights (some 0), and users."""
    rng = np.random.default_rng(seed)
    probabilities = np.round(rng.random(num_rows), 1)
    labels = (rng.random(num_rows) < probabilities).astype(int)
    labels[:2] = [0, 1]
    return (
        labels,
        probabilities,
        rng.integers(0, 4, num_rows) + (np.arange(num_rows) < 2),
        rng.integers(0, num_users, num_rows),
    )


def test_auc_by_hand():
    assert metrics.auc(np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1])) == 0.5
    assert metrics.auc(np.array([1, 0, 0]), np.array([0.5, 0.5, 0.1])) == 0.75  # one tie counts half
    assert metrics.auc(np.array([0, 1]), np.array([-np.inf, np.inf])) == 1.0
    # weighted: (2 x 1 wins) / (2 x (1 + 3))
    assert metrics.auc(np.array([1, 0, 0]), np.array([0.5, 0.1, 0.9]), np.array([2, 1, 3])) == 0.25


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_equal_scikit_learn(weighted):
    from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

    for seed in range(5):
        labels, probabilities, weights, _ = random_case(seed)
        weights = weights if weighted else None
        ours = (labels, probabilities, weights)
        assert metrics.auc(*ours) == pytest.approx(roc_auc_score(labels, probabilities, sample_weight=weights))
        assert metrics.pr_auc(*ours) == pytest.approx(
            average_precision_score(labels, probabilities, sample_weight=weights)
        )
        assert metrics.logloss(*ours) == pytest.approx(log_loss(labels, probabilities, sample_weight=weights))


def test_gauc_by_hand():
    users = np.array(["a", "a", "a", "b", "b", "c"])
    labels, scores = np.array([1, 0, 0, 0, 1, 1]), np.array([0.5, 0.4, 0.9, 0.1, 0.2, 0.3])
    per_user = metrics.auc_per_user(labels, scores, users)
    assert per_user.users_U.tolist() == ["a", "b"]
    np.testing.assert_array_equal(per_user.auc_U, [0.5, 1.0])
    np.testing.assert_array_equal(per_user.impressions_U, [3, 2])
    assert per_user.num_skipped == 1  # c has only a positive
    assert metrics.gauc(labels, scores, users) == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)


def test_gauc_equals_a_loop_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    labels, scores, _, users = random_case(3, num_rows=200, num_users=40)
    gained = seen = 0.0
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            gained += mine.sum() * roc_auc_score(labels[mine], scores[mine])
            seen += mine.sum()
    assert seen < len(labels)  # the case does hold users with one class
    assert metrics.gauc(labels, scores, users) == pytest.approx(gained / seen)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_invariants(seed):
    labels, scores, weights, users = random_case(seed, num_rows=60)
    order = np.random.default_rng(seed).permutation(60)
    shuffled = (labels[order], scores[order], weights[order])
    for metric in (metrics.auc, metrics.pr_auc):
        assert 0 <= metric(labels, scores) <= 1
        assert metric(labels, np.exp(scores)) == pytest.approx(metric(labels, scores))  # only the order counts
        assert metric(*shuffled) == pytest.approx(metric(labels, scores, weights))
    assert metrics.auc(labels, -scores) == pytest.approx(1 - metrics.auc(labels, scores))
    assert metrics.gauc(labels, scores, np.full(60, 7)) == pytest.approx(metrics.auc(labels, scores))
    assert metrics.gauc(labels, scores + 10 * users, users) == pytest.approx(metrics.gauc(labels, scores, users))
    for spacing in ("width", "mass"):
        error = metrics.expected_calibration_error(labels, scores, weights, spacing=spacing)
        assert 0 <= error <= 1
        assert metrics.expected_calibration_error(*shuffled, spacing=spacing) == pytest.approx(error)


def test_a_weight_is_a_repetition():
    labels, probabilities, weights, _ = random_case(8)
    repeated = (np.repeat(labels, weights), np.repeat(probabilities, weights))
    for metric in (metrics.normalised_entropy, metrics.calibration, metrics.expected_calibration_error, metrics.auc):
        assert metric(labels, probabilities, weights) == pytest.approx(metric(*repeated))
    by_mass = metrics.expected_calibration_error(labels, probabilities, weights, spacing="mass", bins=4)
    assert by_mass == pytest.approx(metrics.expected_calibration_error(*repeated, spacing="mass", bins=4))


def test_loss_entropy_and_calibration_by_hand():
    labels, probabilities = np.array([1, 0, 0, 0]), np.array([0.5, 0.5, 0.25, 0.25])
    loss = -(2 * math.log(0.5) + 2 * math.log(0.75)) / 4
    base = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert metrics.logloss(labels, probabilities) == pytest.approx(loss)
    assert metrics.normalised_entropy(labels, probabilities) == pytest.approx(loss / base)
    assert metrics.normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1.0)
    assert metrics.calibration(labels, probabilities) == pytest.approx(1.5 / 1)
    assert metrics.logloss(np.array([0, 0]), np.array([0.5, 0.5])) == pytest.approx(math.log(2))  # one class will do
    assert metrics.logloss(np.array([0]), np.array([1.0])) == pytest.approx(-math.log(np.finfo(float).eps))


def test_expected_calibration_error_by_hand():
    labels, probabilities = np.array([0, 1, 1, 0]), np.array([0.05, 0.15, 0.95, 1.0])
    # ten bins: gaps 0.05, 0.85, and |1.95 - 1| for the two rows of the last
    assert metrics.expected_calibration_error(labels, probabilities) == pytest.approx((0.05 + 0.85 + 0.95) / 4)
    # two bins of two rows: |0.20 - 1| and |1.95 - 1|
    by_mass = metrics.expected_calibration_error(labels, probabilities, bins=2, spacing="mass")
    assert by_mass == pytest.approx((0.8 + 0.95) / 4)
    one_bin = metrics.expected_calibration_error(labels, probabilities, bins=1)
    assert one_bin == pytest.approx(abs(probabilities.mean() - labels.mean()))


def test_equal_predictions_share_the_bin_of_their_middle():
    # 0.2 spans the shares 0.4..1.0, middle 0.7: the second of two bins. Gaps |0.2 - 1| and |0.6 - 0|.
    labels, probabilities = np.array([0, 1, 0, 0, 0]), np.array([0.1, 0.1, 0.2, 0.2, 0.2])
    by_mass = metrics.expected_calibration_error(labels, probabilities, bins=2, spacing="mass")
    assert by_mass == pytest.approx((0.8 + 0.6) / 5)


def test_calibrated_predictions_have_a_small_error_and_skewed_ones_a_known_one():
    rng = np.random.default_rng(0)
    truth = rng.random(100_000) * 0.04  # click rates: all in the first of ten equal widths
    labels = (rng.random(100_000) < truth).astype(int)
    assert metrics.expected_calibration_error(labels, truth, spacing="mass") < 0.004
    assert metrics.calibration(labels, truth) == pytest.approx(1.0, abs=0.1)
    # Promising the mean rate everywhere is right on average and by width; promising the reverse order shows by mass only.
    reverse = 0.04 - truth
    assert metrics.expected_calibration_error(labels, reverse) < 0.002
    assert metrics.expected_calibration_error(labels, reverse, spacing="mass") == pytest.approx(0.02, abs=0.002)


def test_rela_impr():
    assert metrics.rela_impr(0.75, 0.625) == pytest.approx(100.0)
    assert metrics.rela_impr(0.8871, 0.8624) == pytest.approx(6.82, abs=0.01)  # DIN's table: .8871 over .8624
    with pytest.raises(DataError, match=r"above 0\.5"):
        metrics.rela_impr(0.7, 0.5)


def test_tensors_of_any_precision_are_accepted():
    labels, scores = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0.75, 0.5, 0.25, 0.125], requires_grad=True)
    assert metrics.auc(labels, scores) == metrics.auc(labels, scores.bfloat16()) == 0.75
    assert metrics.gauc(labels, scores, torch.tensor([1, 1, 1, 1])) == 0.75
    assert isinstance(metrics.logloss(labels, scores), float)


@pytest.mark.parametrize("metric", [metrics.auc, metrics.pr_auc, metrics.normalised_entropy])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_refused(metric, label):
    with pytest.raises(DataError, match=f"needs both labels 0 and 1, but all 3 rows are {label}"):
        metric(np.full(3, label), np.array([0.1, 0.2, 0.3]))
    with pytest.raises(DataError, match="needs both labels"):  # the other class has no weight
        metric(np.array([label, label, 1 - label]), np.array([0.1, 0.2, 0.3]), np.array([1.0, 1.0, 0.0]))


def test_bad_rows_are_refused():
    labels, scores = np.array([0, 1]), np.array([0.1, 0.2])
    for arguments, message in [
        ((np.array([1, 2]), scores), "labels must be 0 or 1, got 2"),
        ((labels, np.array([0.1, np.nan])), "1 NaN in 2"),
        ((labels, scores[:1]), "1 entries, but 2"),
        ((labels, scores, np.array([-1.0, 2.0])), "weights must be at least 0"),
        ((np.zeros(0), np.zeros(0)), "empty"),
        ((labels, np.array([["a"], ["b"]])), "one-dimensional numbers"),
    ]:
        with pytest.raises(DataError, match=message):
            metrics.auc(*arguments)
    with pytest.raises(DataError, match="apply the sigmoid"):
        metrics.logloss(labels, np.array([-2.0, 3.0]))
    with pytest.raises(DataError, match="calibration needs a positive"):
        metrics.calibration(np.zeros(2), scores)
    with pytest.raises(DataError, match="none of 2 users has both"):
        metrics.gauc(labels, scores, np.array([1, 2]))
    with pytest.raises(DataError, match="one user per row"):
        metrics.gauc(labels, scores, np.array([1]))
    with pytest.raises(ConfigError, match="spacing"):
        metrics.expected_calibration_error(labels, scores, spacing="quantile")
