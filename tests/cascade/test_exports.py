"""Exports of a run: other tools must find in the files what the run itself answers."""

import json
import zipfile

import faiss
import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from cli_support import refused, succeeds, train_shop
from shortlist.cascade import export_pages as pages_module
from shortlist.cascade.engine import Engine
from shortlist.cascade.export_pages import export_pages
from shortlist.cascade.export_ranker import export_ranker
from shortlist.cascade.export_user import user_inputs
from shortlist.cascade.exports import export_vectors, read_users
from shortlist.cascade.run import load_run
from shortlist.data.batches import request_batch
from shortlist.errors import ConfigError, DataError, SnapshotError

CONFIG = """
[surface]
k = 4
[trainer]
epochs = 1
batch_size = 64
[stages.retrieval]
systems = ["popularity", "two-tower"]
keep = 12
[stages.ranking]
systems = ["dnn", "din"]
keep = 8
[systems.two-tower]
dim = 8
widths = [16]
num_uniform = 8
[systems.dnn]
dim = 8
widths = [16]
[systems.din]
dim = 8
widths = [16]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The planted shop with a run of two rankers."""
    place = tmp_path_factory.mktemp("exports")
    (place / "two.toml").write_text(CONFIG)
    return train_shop(place, "two")


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder)


def test_vectors_give_the_run_s_scores(run, tmp_path):
    users = pl.Series("user_id", ["u3", "nobody", "u1"])
    about = export_vectors(run, tmp_path / "vectors", users=users)
    items, people = (np.load(tmp_path / "vectors" / f"{n}.npy", allow_pickle=False) for n in ("items", "users"))
    ids = pl.read_parquet(tmp_path / "vectors" / "items.parquet")
    assert items.shape == (run.dataset.num_items, 8)
    assert ids["item_id"].to_list() == run.dataset.item_ids.decode(ids["row"].to_numpy())
    written = pl.read_parquet(tmp_path / "vectors" / "users.parquet")
    assert written["user_id"].to_list() == users.to_list()
    assert (written["num_history"] > 0).to_list() == [True, False, True]
    row_of = dict(zip(ids["item_id"], ids["row"]))
    found = {i: people[0] @ items[row_of[i] - 1] for i in row_of}
    best = faiss.read_index(str(tmp_path / "vectors" / "items.faiss")).search(people[:1], 5)[1][0]
    assert best.tolist() == [row_of[i] for i in sorted(found, key=found.__getitem__, reverse=True)[:5]]
    histories, requests = run.dataset.requests_for(
        ["u3"], at=run.dataset.plan.now["end"]
    )  # the run's own search, of the same moment
    batch = request_batch(histories, run.dataset.users, requests, max_history=100)
    assert run.cascade.systems["two-tower"].retrieve(batch, 5).rows[0].tolist() == best.tolist()
    assert about["check"]["max_difference"] < 1e-5
    assert json.loads((tmp_path / "vectors" / "export.json").read_text()) == about
    export_vectors(run, tmp_path / "vectors")  # an earlier export is replaced
    assert not (tmp_path / "vectors" / "users.npy").exists()


@pytest.mark.parametrize("name", ["dnn", "din"])
def test_rankers_score_alike_elsewhere(name, run, tmp_path):
    about = export_ranker(run, tmp_path / name, system=name)
    assert max(about["check"]["max_difference"].values()) < 1e-5
    assert set(about["check"]["max_difference"]) == {"ranker.pt2", "ranker.onnx"}
    assert about["inputs"][-2]["shape"] == ["B", "C"]
    assert about["inputs"][-1]["shape"] == ["B", "C", len(about["pair_fields"])]
    if name == "din":
        assert about["inputs"][0]["shape"] == ["B", "L", 8]  # events of the history are free
    example = load_file(tmp_path / name / "example.safetensors")
    session = onnxruntime.InferenceSession(str(tmp_path / name / "ranker.onnx"))
    program = torch.export.load(tmp_path / name / "ranker.pt2").module()
    one = [example[i["name"]][:1].clone() for i in about["inputs"]]
    with zipfile.ZipFile(tmp_path / name / "ranker.pt2") as archive:  # nothing pickled in it
        assert not any(b"torch._utils" in archive.read(part) for part in archive.namelist())
    few = 1 if name == "dnn" else 4
    one[-2:] = [tensor[:, :few].contiguous() for tensor in one[-2:]]  # one request
    scores = program(tuple(one[:-2]), *one[-2:])[0]
    torch.testing.assert_close(scores, example["scores.target"][:1, :few], atol=1e-5, rtol=1e-5)
    # The user's side and the candidates' side one after the other, from the past alone, are the run's own scores.
    user_side = about["user_side"]
    assert set(user_side["check"]["max_difference"]) == {"user.pt2", "user.onnx"}
    assert max(user_side["check"]["max_difference"].values()) < 1e-5
    assert [i["shape"] for i in user_side["inputs"][:2]] == [["B", "L"], ["B"]]
    asked = {i["name"]: example[f"user_side.{i['name']}"] for i in user_side["inputs"]}
    by_torch = torch.export.load(tmp_path / name / "user.pt2").module()(*asked.values())
    for_onnx = onnxruntime.InferenceSession(str(tmp_path / name / "user.onnx"))
    read = {i.name for i in for_onnx.get_inputs()}
    by_onnx = for_onnx.run(user_side["outputs"], {n: x.numpy() for n, x in asked.items() if n in read})
    state = dict(zip(user_side["outputs"], by_onnx))
    for part, other in zip(by_torch, by_onnx):
        torch.testing.assert_close(part, torch.from_numpy(other), atol=1e-5, rtol=1e-5)
    (scores,) = session.run(["target"], {**state, "item": example["item"].numpy(), "pair": example["pair"].numpy()})
    real = example["item"] > 0
    torch.testing.assert_close(torch.from_numpy(scores)[real], example["scores.target"][real], atol=1e-5, rtol=1e-5)
    ids = pl.read_parquet(tmp_path / name / "items.parquet")
    assert ids["item_id"].to_list() == run.dataset.item_ids.decode(ids["row"].to_numpy())
    # One candidate list is turned round: each score must follow its candidate.
    feed = {i["name"]: example[i["name"]].clone() for i in about["inputs"]}
    real = feed["item"] > 0
    feed["item"], feed["pair"] = feed["item"].flip(1).contiguous(), feed["pair"].flip(1).contiguous()
    (scores,) = session.run(["target"], {n: t.numpy() for n, t in feed.items()})
    torch.testing.assert_close(
        torch.from_numpy(scores).flip(1)[real], example["scores.target"][real], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["dnn", "din"])
def test_a_user_s_state_does_not_depend_on_padding_or_company(name, run, tmp_path):
    """One person alone, with others who have longer pasts, and with nothing known: the same state as the model gives."""
    export_ranker(run, tmp_path / "out", system=name, onnx=False)
    ranker = run.cascade.systems[name]
    about = json.loads((tmp_path / "out" / "export.json").read_text())["user_side"]
    program = torch.export.load(tmp_path / "out" / "user.pt2").module()
    assert not (tmp_path / "out" / "user.onnx").exists()
    histories, requests = run.dataset.requests_for(["u3", "nobody", "u1", "u7"], at=run.dataset.plan.now["end"])
    for chosen in ([0, 1, 2, 3], [1], [2, 0]):
        batch = request_batch(histories, run.dataset.users, requests.select(np.array(chosen)), max_history=40)
        given = user_inputs(ranker, batch)
        for longer in (0, 3):
            more = {n: pad(x, (0, longer)) if n.startswith("past_") and x.dim() == 2 else x for n, x in given.items()}
            found = program(*(more[i["name"]] for i in about["inputs"]))
            ours = ranker.user_state(batch)
            for part, theirs in zip((ours,) if isinstance(ours, torch.Tensor) else ours, found, strict=True):
                same = theirs[:, : part.shape[1]]
                torch.testing.assert_close(same.float(), part.float(), atol=1e-6, rtol=1e-5)
                assert not theirs[:, part.shape[1] :].any()


def test_a_user_side_that_can_not_be_followed_is_left_out(run, tmp_path):
    ranker = run.cascade.systems["dnn"]
    before = type(ranker).user_state

    def by_value(self, batch):
        return before(self, batch) * (2 if batch.history.items.values.sum() > 10**9 else 1)

    type(ranker).user_state = by_value
    try:
        about = export_ranker(run, tmp_path / "x", system="dnn", onnx=False)
    finally:
        type(ranker).user_state = before
    assert "can not be followed" in about["user_side"]["left_out"]
    assert sorted(p.name for p in (tmp_path / "x").glob("*.pt2")) == ["ranker.pt2"]
    assert "scores.target" in load_file(tmp_path / "x" / "example.safetensors")


def test_pages_are_the_engine_s(run, tmp_path):
    out = tmp_path / "pages.parquet"
    users = pl.Series("user_id", ["u5", "stranger", "u9"])
    about = export_pages(run, out, users=users, k=3)
    assert (about["num_users"], about["num_unknown_users"], about["num_rows"]) == (3, 1, 9)
    table = pl.read_parquet(out)
    assert table.columns == ["user_id", "rank", "item_id", "score"]
    with Engine.load(run.folder) as engine:
        for user in users:
            answer = engine.recommend(user, 3, at=run.dataset.plan.now["end"])
            mine = table.filter(pl.col("user_id") == user)
            assert mine["rank"].to_list() == [1, 2, 3]
            assert mine["item_id"].to_list() == [item.item_id for item in answer.items]


def test_stopped_pages_go_on(run, tmp_path, monkeypatch):
    out, made = tmp_path / "all.parquet", []
    whole = export_pages(run, tmp_path / "whole.parquet")
    assert whole["num_users"] == len(run.dataset.user_ids)
    real = pages_module._pages

    def stop_at_third(run, ids, k):
        made.append(ids[0])
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(run, ids, k)

    monkeypatch.setattr(pages_module, "_pages", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        export_pages(run, out, part_size=16)
    assert not out.exists()
    export_pages(run, out, part_size=16)
    assert made[3] == made[2]  # the first two parts were not made again
    assert pl.read_parquet(out).equals(pl.read_parquet(tmp_path / "whole.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.parquet", "whole.parquet"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "user_id,age\nu1,3\nu1,3\nu2,4\n", ["u1", "u2"]),
        ("one.csv", "who\n7\n8\n", [7, 8]),
        ("b.txt", "u1\n\n u2 \n", ["u1", "u2"]),
        ("c.csv", "a,b\n1,2\n", "no column user_id"),
        ("d.txt", "\n", "names no user"),
        ("e.parquet", "x", "not readable"),
    ],
)
def test_lists_of_users(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    if isinstance(said, list):
        assert read_users(tmp_path / name).to_list() == said
    else:
        with pytest.raises(DataError, match=said):
            read_users(tmp_path / name)


def test_refusals_change_nothing(run, folder, tmp_path):
    with pytest.raises(ConfigError, match="--system; this run has dnn, din"):
        export_ranker(run, tmp_path / "x")
    with pytest.raises(ConfigError, match="two-tower"):
        export_vectors(run, tmp_path / "x", system="dnn")
    with pytest.raises(SnapshotError, match="is not an export"):
        export_vectors(run, folder)
    assert load_run(folder).version == run.version
    assert list(tmp_path.iterdir()) == []
    assert "--users has no effect" in refused(
        "export", folder, "--what", "ranker", "--out", tmp_path / "x", "--users", "u.csv"
    )
    assert "is a folder" in refused("export", folder, "--what", "pages", "--out", tmp_path, "--quiet")


def test_a_ranker_that_can_not_be_followed(run, tmp_path):
    ranker = run.cascade.systems["dnn"]
    before = type(ranker).score_candidates

    def by_value(self, state, candidates):
        return before(self, state if candidates.rows.values.sum() > 3 else 2 * state, candidates)

    type(ranker).score_candidates = by_value
    try:
        with pytest.raises(ConfigError, match=r"dnn can not be exported: torch\.export can not follow it"):
            export_ranker(run, tmp_path / "x", system="dnn")
    finally:
        type(ranker).score_candidates = before
    assert list(tmp_path.iterdir()) == []


def test_command(folder, tmp_path):
    said = succeeds("export", folder, "--what", "vectors", "--out", tmp_path / "v")
    assert "two-tower: vectors of 22 items" in said.out
    said = succeeds("export", folder, "--what", "pages", "--out", tmp_path / "p.parquet", "--json")
    assert said.json["num_rows"] == pl.read_parquet(tmp_path / "p.parquet").height
    assert "users" in said.err
    (tmp_path / "few.txt").write_text("u1\n")
    assert "--no-onnx" in refused("export", folder, "--what", "pages", "--out", tmp_path / "q", "--no-onnx")
    said = succeeds("export", folder, "--what", "ranker", "--out", tmp_path / "r", "--system", "dnn", "--no-onnx")
    assert "user side: past_item int64 [B, L], past_length int64 [B]" in said.out
    assert "dnn: state float32 [B, 16]" in said.out
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "example.safetensors",
        "export.json",
        "items.parquet",
        "manifest.json",
        "ranker.pt2",
        "user.pt2",
    ]
