"""Cold users and cold items end to end: a full page for a stranger, a history that comes with the request, an item known by its fields."""

import polars as pl
import pytest

from cli_support import succeeds
from shortlist.cascade.engine import Engine
from support import CLUSTERS, PER_CLUSTER, shop_frames

TOWERS = """
[surface]
k = 6
[trainer]
epochs = 25
batch_size = 64
lr = 0.01
patience = 25
[stages.retrieval]
systems = ["two-tower"]
[systems.two-tower]
dim = 16
widths = [16]
num_uniform = 8
id_dropout = 0.3
"""


def new_item(cluster):
    return f"new-{cluster}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Towers alone, trained on the planted shop; each cluster lists one more item that nobody has touched."""
    folder = tmp_path_factory.mktemp("cold")
    events, items, _ = shop_frames(80)
    listed = items.head(CLUSTERS * PER_CLUSTER)
    new = listed.gather_every(PER_CLUSTER).with_columns(item_id=pl.Series([new_item(c) for c in range(CLUSTERS)]))
    assert new["cluster"].to_list() == [f"c{c}" for c in range(CLUSTERS)]
    events.write_csv(folder / "events.csv")
    listed.vstack(new).sample(fraction=1.0, shuffle=True, seed=2).write_csv(folder / "items.csv")
    (folder / "towers.toml").write_text(TOWERS)
    out = folder / "run"
    tables = ("--items", folder / "items.csv")
    succeeds("train", folder / "events.csv", *tables, "--config", folder / "towers.toml", "--out", out, "--quiet")
    return out


def ids(page):
    return [item["item_id"] for item in page["items"]]


def members(cluster):
    """Ids of the cluster's known items."""
    return [f"i{1 + cluster * PER_CLUSTER + place}" for place in range(PER_CLUSTER)]


@pytest.mark.parametrize("cluster", range(CLUSTERS))
def test_an_item_without_events_is_retrieved_through_its_fields(run, cluster):
    """Two items of a cluster were bought: the whole catalogue is searched, and the page is the cluster, the new item included."""
    page = succeeds("recommend", run, "--history", ",".join(members(cluster)[:2]), "--json").json
    assert set(ids(page)) == {*members(cluster), new_item(cluster)}


def test_new_items_are_ordered_by_the_persons_cluster(run):
    new = [new_item(cluster) for cluster in range(CLUSTERS)]
    with Engine.load(run) as engine:
        for cluster in range(CLUSTERS):
            answer = engine.recommend(None, 4, history=members(cluster)[1:3], candidates=new)
            assert answer.items[0].item_id == new_item(cluster)


def test_a_stranger_gets_a_full_page_and_the_history_of_the_request_changes_it(run, shop):
    for folder in (run, shop):
        stranger = succeeds("recommend", folder, "--user", "nobody-knows-me", "--json").json
        nameless = succeeds("recommend", folder, "--json").json
        assert stranger["num_history"] == 0
        assert stranger["degraded"] is None
        assert ids(stranger) == ids(nameless)
        assert len(set(ids(stranger))) == len(ids(stranger)) == (6 if folder is run else 4)
        pages = [
            ids(succeeds("recommend", folder, "--user", "nobody-knows-me", "--history", ",".join(members(c)), "--json").json)
            for c in range(CLUSTERS)
        ]  # fmt: skip
        assert len({tuple(page) for page in [*pages, ids(stranger)]}) == CLUSTERS + 1
        own = [len(set(page) & {*members(c), new_item(c)}) for c, page in enumerate(pages)]
        assert min(own) >= 3  # most of the page is of the history's own cluster


def test_a_user_by_name_is_answered_from_the_log(run):
    events, _, _ = shop_frames(80)
    for user in ("u5", "u6", "u7"):
        page = succeeds("recommend", run, "--user", user, "--json").json
        past = events.filter(events["user_id"] == user)["item_id"].to_list()
        assert page["num_history"] == len(past)
        cluster = (int(past[0][1:]) - 1) // PER_CLUSTER
        assert len(set(ids(page)) & {*members(cluster), new_item(cluster)}) >= 5
