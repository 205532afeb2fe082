"""Feedback rules against closed forms: masses of samples on a grid of (p, h), the balance of the digest, and the traps of released code."""

import math

import numpy as np
import pytest
import torch

from shortlist.errors import ConfigError
from shortlist.registry import systems
from shortlist.training.config import FeedbackChoice
from shortlist.training.feedback.base import (
    DAY_S,
    LATE,
    NEGATIVE,
    POSITIVE,
    SETTLED_NEGATIVE,
    SETTLED_POSITIVE,
    Delayed,
    Seen,
    make_feedback,
)

RULES = [entry.name for entry in systems(kind="feedback-rule")]
GRID = [(p, h) for p in (0.02, 0.2, 0.6) for h in (0.0, 0.1, 0.5, 1.0)]
SETTINGS = {
    "vanilla:duplicates": {"duplicates": True},
    "defuse:current": {"posterior": "current"},
    "defuse:fnw": {"samples": "fnw", "posterior": "current"},
    "defuse:defer": {"samples": "defer"},
    "defuse:defer, current": {"samples": "defer", "posterior": "current"},
}
UNBIASED = ["label-oracle", "fnw", "fnc", "fsiw", "es-dfm", "defer", "defuse", "bi-defuse"]
UNBIASED += [name for name in SETTINGS if name.startswith("defuse")]


def rule_of(name):
    return make_feedback(FeedbackChoice(rule=name.partition(":")[0], settings=SETTINGS.get(name, {})))


def masses(stream, p, h):
    """Kinds and masses per click of a stream, by hand; float64."""
    dp = p * h
    first = [(POSITIVE, p - dp), (NEGATIVE, dp), (NEGATIVE, 1 - p)]
    return {
        "final": [(POSITIVE, p), (NEGATIVE, 1 - p)],
        "observed": first,
        "late": [*first, (LATE, dp)],
        "fake-negatives": [(NEGATIVE, 1.0), (LATE, p)],
        "settled": [*first, (LATE, dp), (SETTLED_POSITIVE, p - dp), (SETTLED_NEGATIVE, 1 - p)],
    }[stream]


def seen_of(kinds, p, h):
    """With the true chances of the auxiliary networks, all float64."""
    kind = torch.tensor(kinds)
    label = ((kind == POSITIVE) | (kind == LATE) | (kind == SETTLED_POSITIVE)).double()
    dp = p * h
    truth = {"f_dp": dp, "f_rn": (1 - p) / (1 - p + dp), "f1": 1 - h, "f0": (1 - p) / (1 - p + dp)}
    auxiliary = {name: torch.full((len(kinds),), value, dtype=torch.float64) for name, value in truth.items()}
    none = torch.zeros(len(kinds), dtype=torch.float64)
    return Seen(label=label, kind=kind, elapsed=none, delay=none, auxiliary=auxiliary)


def balance(rule, p, h):
    """The outputs at which the gradient of the mean loss over all samples of a click vanishes, by bisection of each; then the chance."""
    table = masses(rule.stream, p, h)
    seen, mass_n = seen_of([kind for kind, _ in table], p, h), torch.tensor([m for _, m in table], dtype=torch.float64)
    low, high = torch.full((1, len(rule.heads)), -40.0, dtype=torch.float64), torch.full((1, len(rule.heads)), 40.0)
    high = high.double()
    for _ in range(80):
        middle = ((low + high) / 2).requires_grad_()
        (rule.losses(middle.expand(len(table), -1), seen) * mass_n).sum().backward()
        rises = middle.grad > 0
        low, high = torch.where(rises, low, middle.detach()), torch.where(rises, middle.detach(), high)
    return float(rule.chance(low))


def test_all_rules_are_registered():
    assert sorted(RULES) == sorted(
        ["vanilla", "label-oracle", "fnw", "fnc", "fsiw", "dfm", "es-dfm", "defer", "defuse", "bi-defuse"]
    )


@pytest.mark.parametrize(("p", "h"), GRID)
@pytest.mark.parametrize("name", UNBIASED)
def test_ends_at_the_chance_of_a_conversion(name, p, h):
    if name == "fsiw" and h == 1:
        pytest.skip("without an immediate conversion it never sees a positive")
    assert balance(rule_of(name), p, h) == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize(("p", "h"), GRID)
def test_vanilla_ends_too_low(p, h):
    assert balance(rule_of("vanilla"), p, h) == pytest.approx(p * (1 - h), rel=1e-6, abs=1e-9)
    assert balance(rule_of("vanilla:duplicates"), p, h) == pytest.approx(p / (1 + p * h), rel=1e-6)


def test_the_digest_s_figures():
    assert balance(rule_of("vanilla"), 0.2, 0.5) == pytest.approx(0.100, abs=5e-4)
    assert balance(rule_of("vanilla:duplicates"), 0.2, 0.5) == pytest.approx(0.182, abs=5e-4)


# --- weights in closed form ---


@pytest.mark.parametrize(("p", "h"), GRID)
def test_totals_of_defuse_and_es_dfm(p, h):
    """Positives weigh p (1 + dp) and negatives (1 - p)(1 + dp) in all, whatever the network says."""
    dp = p * h
    table = masses("late", p, h)
    mass_n = torch.tensor([m for _, m in table], dtype=torch.float64)
    for name in ("defuse", "es-dfm"):
        up_n, down_n = rule_of(name).targets(torch.rand(4).double(), seen_of([kind for kind, _ in table], p, h))
        if name == "defuse":  # of the observed negatives, the share z is fake
            assert float((up_n * mass_n).sum()) == pytest.approx(p * (1 + dp))
        assert float((down_n * mass_n).sum()) == pytest.approx((1 - p) * (1 + dp))


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("vanilla", lambda f, p, dp: f - p + dp),
        ("fnw", lambda f, p, dp: (1 + f) * (1 - f) * (f - p)),
        ("fnc", lambda f, p, dp: f * (1 + p) - p),
        ("fsiw", lambda f, p, dp: f - p),
        ("es-dfm", lambda f, p, dp: (1 + dp) * (f - p)),
        ("defuse", lambda f, p, dp: (1 + dp) * (f - p)),
        ("defer", lambda f, p, dp: 2 * f * (1 - f) * (f - p) / ((f - dp / 2) * (1 - f + dp / 2))),
        ("defuse:fnw", lambda f, p, dp: (1 - f) * (f - p)),
        ("defuse:defer", lambda f, p, dp: 2 * (f - p)),
    ],
)
def test_expected_gradients_in_closed_form(name, closed):
    """Per click and with respect to the logit, at any chance f that the network tells."""
    rule = rule_of(name)
    for p, h in GRID:
        if h == 1 and name == "fsiw":
            continue
        table = masses(rule.stream, p, h)
        seen, mass_n = (
            seen_of([kind for kind, _ in table], p, h),
            torch.tensor([m for _, m in table], dtype=torch.float64),
        )
        for f in (0.61, 0.8, 0.97):
            logit = torch.full((1, 1), math.log(f / (1 - f)), dtype=torch.float64, requires_grad=True)
            (rule.losses(logit.expand(len(table), -1), seen) * mass_n).sum().backward()
            assert logit.grad.item() == pytest.approx(closed(f, p, p * h), rel=1e-6)


def test_weights_by_kind():
    p, h = 0.2, 0.5
    kinds = [POSITIVE, LATE, NEGATIVE]
    up, down = rule_of("defuse").targets(torch.full((3,), 0.9).double(), seen_of(kinds, p, h))
    z = 0.1 / 0.9
    np.testing.assert_allclose(up, [1.1, 1.0, z * 0.1])
    np.testing.assert_allclose(down, [0, 0, (1 - z) * 1.1])
    kinds += [SETTLED_POSITIVE, SETTLED_NEGATIVE]
    up, down = rule_of("defuse:defer").targets(torch.full((5,), 0.9).double(), seen_of(kinds, p, h))
    np.testing.assert_allclose(up, [1, 1, z, 1, 0])
    np.testing.assert_allclose(down, [0, 0, 1 - z, 0, 1])
    up, down = rule_of("defuse:fnw").targets(torch.full((2,), 0.3).double(), seen_of([LATE, NEGATIVE], p, h))
    np.testing.assert_allclose(up, [1, 0.3 * 0.3])
    np.testing.assert_allclose(down, [0, 0.7 * 1.3])
    kinds = kinds[:3]
    up, down = rule_of("es-dfm").targets(torch.zeros(3).double(), seen_of(kinds, p, h))
    np.testing.assert_allclose(up, [1.1, 1.1, 0])
    np.testing.assert_allclose(down, [0, 0, 1.1 * 0.8 / 0.9])
    up, down = rule_of("fnw").targets(torch.full((2,), 0.3).double(), seen_of([LATE, NEGATIVE], p, h))
    np.testing.assert_allclose(up, [1.3, 0])
    np.testing.assert_allclose(down, [0, 0.7 * 1.3])
    up, down = rule_of("defer").targets(torch.full((2,), p).double(), seen_of([LATE, SETTLED_NEGATIVE], p, h))
    np.testing.assert_allclose(up, [0.2 / 0.15, 0])
    np.testing.assert_allclose(down, [0, 0.8 / 0.85])
    up, down = rule_of("fsiw").targets(torch.zeros(2).double(), seen_of([POSITIVE, NEGATIVE], p, h))
    np.testing.assert_allclose(up, [2.0, 0])
    np.testing.assert_allclose(down, [0, 0.8 / 0.9])


def test_defer_stays_bounded_where_the_network_contradicts_the_auxiliary_one():
    seen = seen_of([LATE, NEGATIVE], 0.9, 1.0)  # f_dp = 0.9
    for chance in (0.0, 1e-30, 0.01, 1.0):
        up, down = rule_of("defer").targets(torch.full((2,), chance).double(), seen)
        assert 1 <= float(up[0]) <= 2 + 1e-9
        assert 0 <= float(down[1]) <= 1


@pytest.mark.parametrize("name", [n for n in [*UNBIASED, "vanilla"] if n != "bi-defuse"])
def test_weights_are_not_differentiated(name):
    """The gradient is f (up + down) - up, with up and down as constants: autograd must not see that they hold f."""
    rule = rule_of(name)
    table = masses(rule.stream, 0.3, 0.4)
    seen = seen_of([kind for kind, _ in table], 0.3, 0.4)
    logit = torch.linspace(-2, 2, len(table), dtype=torch.float64)[:, None].requires_grad_()
    rule.losses(logit, seen).sum().backward()
    f = torch.sigmoid(logit.detach()[:, 0])
    up, down = rule.targets(f, seen)
    np.testing.assert_allclose(logit.grad[:, 0], f * (up + down) - up, atol=1e-12)


def test_bi_defuse_by_hand():
    rule = rule_of("bi-defuse")
    seen = seen_of([POSITIVE, NEGATIVE, LATE], 0.2, 0.5)
    logit = torch.tensor([[0.3, -1.0], [-0.5, 0.2], [2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    losses = rule.losses(logit, seen)
    losses.mean().backward()
    s = torch.sigmoid(logit.detach())
    r = s[:, 1]
    within = torch.stack([-s[0, 0].log(), -(1 - s[1, 0]).log()])
    after = torch.stack(
        [-(r[i] ** 2) * r[i].log() - (1 - r[i]) * (1 + r[i]) * (1 - r[i]).log() for i in range(2)] + [-r[2].log()]
    )
    # The first output's mean is over the two first copies, the second's over all three.
    assert losses.mean().item() == pytest.approx((within.mean() + after.mean()).item())
    assert logit.grad[2, 0] == 0
    assert float(rule.chance(torch.tensor([[3.0, 3.0]]))) == 1.0
    assert float(rule.chance(torch.tensor([[-1.0, -2.0]]))) == pytest.approx(
        1 / (1 + math.e) + 1 / (1 + math.e**2), rel=1e-6
    )


def test_fnc_turns_odds_into_the_chance():
    rule = rule_of("fnc")
    for p in (0.01, 0.3, 0.9):
        b = p / (1 + p)
        assert float(rule.chance(torch.tensor([[math.log(b / (1 - b))]], dtype=torch.float64))) == pytest.approx(p)
    assert float(rule.chance(torch.tensor([[2.0]]))) == 1.0


# --- DFM ---


def test_dfm_has_no_weights():
    with pytest.raises(TypeError, match="DFM is no weighted cross-entropy"):
        rule_of("dfm").targets(torch.zeros(1), seen_of([POSITIVE], 0.2, 0.5))


def test_dfm_is_the_density_of_an_exponential_delay():
    """Chances of all that can be seen at an age add up to 1: the density over delays up to it, and not yet."""
    rule = rule_of("dfm")
    logit = torch.tensor([[0.4, 0.9]], dtype=torch.float64)
    age = 2.5 * DAY_S
    delay = torch.linspace(0, age, 20_001, dtype=torch.float64)
    n = len(delay)
    ones = torch.ones(n, dtype=torch.float64)
    came = Seen(label=ones, kind=torch.full((n,), POSITIVE), elapsed=ones * age, delay=delay)
    density = (-rule.losses(logit.expand(n, -1), came)).exp() / DAY_S
    not_yet = Seen(
        label=ones[:1] * 0, kind=torch.tensor([NEGATIVE]), elapsed=ones[:1] * age, delay=ones[:1] * torch.nan
    )
    rest = (-rule.losses(logit, not_yet)).exp()
    assert float(torch.trapezoid(density, delay) + rest) == pytest.approx(1, abs=1e-6)


def test_dfm_finds_chance_and_rate_of_clicks_of_all_ages():
    rng = np.random.default_rng(0)
    n, p, rate = 5_000, 0.3, 0.7
    age, delay = rng.uniform(0.1, 8, n), rng.exponential(1 / rate, n)
    came = (rng.random(n) < p) & (delay <= age)
    seen = Seen(
        label=torch.from_numpy(came).double(),
        kind=torch.from_numpy(np.where(came, POSITIVE, NEGATIVE)),
        elapsed=torch.from_numpy(age * DAY_S),
        delay=torch.from_numpy(np.where(came, delay * DAY_S, np.nan)),
    )
    logit = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logit], max_iter=15)

    def loss():
        optimiser.zero_grad()
        total = rule_of("dfm").losses(logit.expand(n, -1), seen).mean()
        total.backward()
        return total

    optimiser.step(loss)
    assert rule_of("dfm").chance(logit).item() == pytest.approx(p, abs=0.02)
    assert torch.nn.functional.softplus(logit[0, 1]).item() == pytest.approx(rate, abs=0.08)
    assert torch.isfinite(logit.grad).all()


# --- the released code's slips would be found ---


def test_per_kind_weights_matter():
    """DEFUSE's released loss weighs every observed positive 2 + dp: that ends at the digest's figures, and so would be found here."""
    rule = rule_of("defuse")
    targets = rule.targets

    def released(chance_n, seen):
        up, down = targets(chance_n, seen)
        return torch.where(seen.label > 0, 2 + seen.auxiliary["f_dp"], up), down

    rule.targets = released
    assert balance(rule, 0.2, 0.5) == pytest.approx(0.328, abs=1e-3)
    assert balance(rule, 0.05, 0.3) == pytest.approx(0.095, abs=1e-3)


def test_masses_of_the_samples_matter():
    """The released code weighs DEFER's samples as ES-DFM's; counted by hand, on-time clicks then weigh 2 (1 + dp) and others 1 + dp."""
    p, dp = 0.2, 0.1
    rule = rule_of("defuse:defer")
    rule.targets = rule_of("defuse").targets
    up, down = 2 * (p - dp) * (1 + dp) + dp + dp * dp, 2 * (1 - p) * (1 + dp)
    assert up / (up + down) == pytest.approx(0.158, abs=1e-3)
    assert balance(rule, p, dp / p) == pytest.approx(up / (up + down), rel=1e-6)


# --- first training, criteria, settings ---


@pytest.mark.parametrize("name", ["vanilla", "es-dfm", "fnc", "bi-defuse"])
def test_first_training_ends_at_the_labels_as_known(name):
    """Old clicks, once each: 12 percent converted early, 5 percent late."""
    rule = rule_of(name)
    mass_n = torch.tensor([0.12, 0.05, 0.83], dtype=torch.float64)
    seen = seen_of([POSITIVE, LATE, NEGATIVE], 0.2, 0.5)
    logit = torch.zeros(1, len(rule.heads), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logit], max_iter=100, tolerance_grad=1e-12)

    def loss():
        optimiser.zero_grad()
        total = (rule.first_losses(logit.expand(3, -1), seen) * mass_n).sum()
        total.backward()
        return total

    optimiser.step(loss)
    assert rule.chance(logit).item() == pytest.approx(0.17, abs=1e-4)


def test_a_criterion_asks_only_where_there_is_a_label():
    seen = seen_of([POSITIVE, LATE, NEGATIVE, NEGATIVE], 0.2, 0.5)
    seen.label[2] = torch.nan
    criterion = Delayed(rule=rule_of("vanilla"), tasks=("buy",), seen=seen)
    logit = torch.tensor([0.5, -0.2, 9.0, 1.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 3.0, 100.0, 2.0], dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        logit[[0, 1, 3]], torch.tensor([1.0, 1, 0]).double(), weight[[0, 1, 3]], reduction="sum"
    )
    scores = {"click": torch.zeros(4), "buy": logit}
    assert float(criterion(scores, weight)) == pytest.approx(float(loss) / 6)
    assert float(criterion({"buy": logit}, None)) == pytest.approx(float(criterion(scores, torch.ones(4).double())))


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ({"rule": "defus"}, "defuse"),
        ({"rule": "pcgrad"}, "not a feedback rule"),
        ({"rule": "defuse", "settings": {"posterior": "f_dp"}}, "posterior"),
        ({"rule": "defuse", "settings": {"z": 1}}, "posterior"),
        ({"rule": "defuse", "settings": {"samples": "fnc"}}, "'fnw' or 'defer'"),
        ({"rule": "defuse", "settings": {"samples": "fnw"}}, "no observation window"),
        ({"rule": "fsiw", "settings": {"least": 0.0}}, "least"),
        ({"rule": "fnw", "observation_hours": -1.0}, "observation_hours"),
        ({"rule": "fnw", "auxiliary_epochs": 0}, "auxiliary_epochs"),
    ],
)
def test_wrong_settings_are_refused(choice, word):
    with pytest.raises(ConfigError, match=word):
        make_feedback(FeedbackChoice(**choice))


def test_no_rule():
    assert make_feedback(FeedbackChoice()) is None
