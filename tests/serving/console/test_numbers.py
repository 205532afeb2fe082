"""What the console makes of /metrics: quantiles against NumPy's, rates over restarts and over several processes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from shortlist.errors import DataError
from shortlist.serving.console.numbers import KEPT_S, WINDOW_S, History, parse, quantile

BOUNDS = (0.001, 0.01, 0.1, 1.0)


def buckets_of(values):
    """As a histogram with those bounds counts them."""
    return [(bound, float((np.asarray(values) <= bound).sum())) for bound in (*BOUNDS, math.inf)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=200), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_numpys(values, q):
    exact = np.quantile(values, q, method="inverted_cdf")  # the least value with q of all at or below it
    place = int(np.searchsorted(BOUNDS, exact))
    low = 0.0 if place == 0 else BOUNDS[place - 1]
    assert low <= quantile(buckets_of(values), q) <= BOUNDS[place] + 1e-12


def test_where_values_lie_evenly_in_a_bucket_it_is_numpys():
    values = np.linspace(0.01, 0.1, 1001)[1:]
    for q in (0.05, 0.5, 0.99):
        assert quantile(buckets_of(values), q) == pytest.approx(np.quantile(values, q), abs=1e-4)


def test_no_values_and_values_beyond_all_bounds():
    assert math.isnan(quantile([], 0.5))
    assert math.isnan(quantile(buckets_of([]), 0.5))
    assert quantile(buckets_of([5.0]), 0.5) == math.inf
    assert quantile(buckets_of([0.5, 0.5, 0.5, 5.0]), 0.5) < 1.0


class Counted:
    """Metrics named as the server names them, of one process."""

    def __init__(self, pid="7"):
        self.registry, self.pid = CollectorRegistry(), pid
        own = {"registry": self.registry}
        self.requests = Counter("shortlist_http_requests", "", ("route", "method", "status"), **own)
        self.seconds = Histogram("shortlist_http_seconds", "", ("route",), buckets=BOUNDS, **own)
        self.stage = Histogram("shortlist_stage_seconds", "", ("stage",), buckets=BOUNDS, **own)
        self.mflop = Counter("shortlist_stage_mflop", "", ("stage",), **own)
        self.degraded = Counter("shortlist_degraded", "", ("part",), **own)
        self.chains = Counter("shortlist_chains", "", ("chain", "reason"), **own)

    def page(self, seconds=0.005, *, route="/v1/recommend", status="200", degraded=False):
        self.requests.labels(route, "GET", status).inc()
        self.seconds.labels(route).observe(seconds)
        for name, ms, mflop in (("retrieval", 2.0, 3.0), ("ranking", 1.0, 8.0)):
            self.stage.labels(name).observe(ms / 1e3)
            self.mflop.labels(name).inc(mflop)
        self.chains.labels("a0", "price").inc()
        if degraded:
            self.degraded.labels("ranking").inc()

    def scrape(self, at):
        return parse(generate_latest(self.registry).decode() + f'shortlist_process_info{{pid="{self.pid}"}} 1.0\n', at)


def test_a_minute_is_counted_and_what_was_before_it_is_not():
    counted, history = Counted(), History()
    for _ in range(100):
        counted.page(0.5)
    history.add(counted.scrape(0.0))
    first = history.reading()
    assert math.isnan(first.all.per_s)
    assert first.pages == 0
    for n in range(30):
        counted.page(0.0005 if n else 0.05, status="422" if n < 3 else "200", degraded=n < 6)
    counted.page(9.0, route="/v1/admin/budget")  # no traffic
    history.add(counted.scrape(10.0))
    found = history.reading()
    assert found.all.per_s == pytest.approx(3.0)
    assert found.all.failed == pytest.approx(0.1)
    assert found.all.p50_ms <= 1.0
    assert 10 < found.all.p99_ms <= 100
    assert [route.route for route in found.routes] == ["/v1/recommend"]
    assert found.chains == {("a0", "price"): 31}
    assert found.degraded == pytest.approx(6 / 31)
    assert [(s.stage, round(s.ms, 6), s.mflop) for s in found.stages] == [
        ("retrieval", 2.0, 3.0),
        ("ranking", 1.0, 8.0),
    ]
    assert found.stages[1].degraded == pytest.approx(6 / 31)
    assert history.points[-1].per_s == pytest.approx(3.0)
    history.add(counted.scrape(10.0 + WINDOW_S))
    assert history.reading().all.per_s == 0


def test_a_restart_loses_nothing_and_never_counts_down():
    """The counters of one process set back, as a container with a fixed number has it."""
    before, after, history = Counted(), Counted(), History()
    for _ in range(50):
        before.page()
    history.add(before.scrape(0.0))
    for _ in range(4):
        before.page()
    history.add(before.scrape(2.0))
    for _ in range(6):
        after.page()
    history.add(after.scrape(4.0))
    assert history.reading().pages == 10
    assert history.reading().all.per_s == pytest.approx(2.5)


def test_processes_that_share_a_port_are_added_up():
    """Scrapes meet either at random; each rises by its own, whatever the other has counted in its life."""
    one, two, history = Counted("1"), Counted("2"), History()
    for _ in range(1000):
        two.page()
    for second in range(21):
        one.page()
        two.page()
        two.page()
        history.add((one if second % 2 else two).scrape(float(second)))
    assert history.reading().all.per_s == pytest.approx(3.0)
    assert history.reading().processes == 2


def test_what_is_kept_is_bounded():
    counted, history = Counted(), History()
    for second in range(int(2 * KEPT_S)):
        history.add(counted.scrape(float(second)))
        if second > 3:
            break
    for second in range(4, int(2 * KEPT_S), 20):
        history.add(counted.scrape(float(second)))
    assert len(history.scrapes) <= WINDOW_S
    assert history.points[-1].at - history.points[0].at <= KEPT_S


def test_other_text_is_refused():
    with pytest.raises(DataError, match="Prometheus"):
        parse("<html>no\n", 0.0)
    with pytest.raises(DataError, match="nothing was read"):
        History().reading()
