import numpy as np
import pytest

from shortlist.cascade.attribution import attribute_losses, lost_at
from support import last_baskets, planted_batch

FUNNEL = """
[surface]
k = 3
[stages.retrieval]
systems = ["tiny-closed-form", "tiny-trie"]
keep = 9
[stages.pre-ranking]
systems = ["tiny-two-phases"]
keep = 6
[stages.ranking]
systems = ["tiny-pairs"]
keep = 4
"""


@pytest.fixture
def answered(make_cascade):
    _, requests = last_baskets()
    return make_cascade(FUNNEL).run(planted_batch()), requests


def test_every_target_is_followed_to_where_it_fell(answered):
    page, requests = answered
    expected = []
    for request in range(len(requests)):
        sets = [set(t.rows.values[t.rows.offsets[request] : t.rows.offsets[request + 1]].tolist()) for t in page.traces]
        sets[-1] = set(page.rows[request].tolist())
        for target in requests.target[requests.target_offsets[request] : requests.target_offsets[request + 1]]:
            expected.append(next((n for n, there in enumerate(sets) if target not in there), 3))
    lost = lost_at(page, requests)
    assert lost.tolist() == expected
    assert len(set(expected)) == 4  # the case is one where every stage loses something and something is shown


def test_shares_add_up_over_batches(answered):
    page, requests = answered
    lost = lost_at(page, requests)
    names = [trace.name for trace in page.traces]
    shares = attribute_losses(names, [lost[:10], lost[10:]])
    assert list(shares) == ["retrieval", "pre-ranking", "ranking", "shown"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["ranking"] == pytest.approx(np.mean(lost == 2))
    assert attribute_losses(names, []) == dict.fromkeys([*names, "shown"], 0.0)
