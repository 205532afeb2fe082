"""Files of summaries: found by key, of one version, whole or refused, resumed after a kill; and behind memories."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from shortlist.errors import SnapshotError
from shortlist.store import summaries
from shortlist.store.memories import Memories
from shortlist.store.summaries import HEAD_BYTES, SummaryHead, SummaryStore, SummaryWriter, key_digests, read_head

HEAD = SummaryHead(version="v1", system="vista", num_tokens=3, width=4)
KEYS = [f"user-{i}" for i in range(50)]


def columns(start, stop, shift=0):
    place = np.arange(start, stop)
    code = (place[:, None, None] + shift + np.arange(12).reshape(3, 4)).astype(np.int8)
    scale = (place[:, None] + np.arange(3) / 10).astype(np.float32)
    return {"code": code, "scale": scale, "time": 1_000 + place, "num_events": place * 2}


def write(path, head=HEAD, keys=KEYS, chunk=20, shift=0):
    with SummaryWriter(path, head, keys) as writer:
        while writer.num_done < len(keys):
            stop = min(writer.num_done + chunk, len(keys))
            writer.append(columns(writer.num_done, stop, shift))
        return writer.finish()


def test_every_user_is_found_and_nobody_else(tmp_path):
    head = write(tmp_path / "s")
    assert (head.num_users, read_head(tmp_path / "s")) == (50, head)
    store = SummaryStore.open(tmp_path / "s", version="v1")
    assert len(store) == 50
    asked = ["nobody", *reversed(KEYS), ""]
    found = store.get(asked)
    assert found[0] is None
    assert found[-1] is None
    for place, memory in zip(range(49, -1, -1), found[1:-1]):
        expected = columns(place, place + 1)
        assert memory["code"].dtype == torch.int8
        for name, column in expected.items():
            assert memory[name].tolist() == column[0].tolist()


def test_bytes_per_user_are_what_the_file_takes(tmp_path):
    head = write(tmp_path / "s")
    assert head.bytes_per_user == 8 * 4 + 4 * 3 + 12 + 16
    assert (tmp_path / "s").stat().st_size == HEAD_BYTES + 50 * head.bytes_per_user


def test_keys_whose_digests_begin_alike_are_told_apart(tmp_path, monkeypatch):
    def alike(keys):
        digests = key_digests(keys).copy()
        digests[:, 0] = 7
        return digests

    monkeypatch.setattr(summaries, "key_digests", alike)
    write(tmp_path / "s")
    found = SummaryStore.open(tmp_path / "s", version="v1").get(["user-31", "nobody", "user-0"])
    assert found[0]["num_events"] == 62
    assert found[1] is None
    assert found[2]["num_events"] == 0


def test_digests_are_those_of_blake2b():
    (row,) = key_digests(["é"])
    assert row.tobytes() == hashlib.blake2b("é".encode(), digest_size=16).digest()


def test_no_user_at_all_is_a_file_too(tmp_path):
    write(tmp_path / "s", keys=[])
    assert SummaryStore.open(tmp_path / "s", version="v1").get(["a"]) == [None]


def test_another_version_is_refused(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(SnapshotError, match="snapshot v1, this is v2; run `shortlist refresh` again"):
        SummaryStore.open(tmp_path / "s", version="v2")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda raw: raw[:-1], "bytes where"),
        (lambda raw: raw[:HEAD_BYTES], "bytes where"),
        (lambda raw: raw[:5_000] + bytes([raw[5_000] ^ 1]) + raw[5_001:], "is damaged"),
        (lambda raw: b"not a file of summaries", "no file of summaries"),
        (lambda raw: b"{}".ljust(HEAD_BYTES, b"\0") + raw[HEAD_BYTES:], "no file of summaries"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, harm, said):
    path = tmp_path / "harmed"
    write(path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SnapshotError, match=said) as error:
        SummaryStore.open(path, version="v1")
    assert "harmed" in str(error.value)


def test_missing_and_unknown_formats_are_refused(tmp_path):
    with pytest.raises(SnapshotError, match="missing"):
        read_head(tmp_path / "nothing")
    write(tmp_path / "s", head=SummaryHead(version="v1", system="vista", num_tokens=3, width=4, format=9))
    with pytest.raises(SnapshotError, match="format 9"):
        read_head(tmp_path / "s")


def test_a_stopped_writer_is_gone_on_from(tmp_path):
    whole = write(tmp_path / "whole")
    with SummaryWriter(tmp_path / "s", HEAD, KEYS) as writer:
        writer.append(columns(0, 20))
    assert not (tmp_path / "s").exists()
    part = tmp_path / "s.part"
    part.write_bytes(part.read_bytes() + b"half a record")
    with SummaryWriter(tmp_path / "s", HEAD, KEYS) as writer:
        assert writer.num_done == 20
        writer.append(columns(20, 50))
        assert writer.finish() == whole
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not part.exists()


def test_what_was_begun_for_others_is_not_gone_on_from(tmp_path):
    def begun(head, keys, fresh=False):
        with SummaryWriter(tmp_path / "s", HEAD, KEYS) as writer:
            writer.append(columns(writer.num_done, 20)) if writer.num_done < 20 else None
        with SummaryWriter(tmp_path / "s", head, keys, fresh=fresh) as writer:
            return writer.num_done

    assert begun(HEAD, KEYS) == 20
    assert begun(HEAD, [*KEYS, "new"]) == 20
    assert begun(HEAD, [*KEYS[:13], "other", *KEYS[14:]]) == 13
    assert begun(HEAD, KEYS, fresh=True) == 0
    assert begun(SummaryHead(version="v2", system="vista", num_tokens=3, width=4), KEYS) == 0


def test_two_writers_do_not_write_over_one_another(tmp_path):
    with SummaryWriter(tmp_path / "s", HEAD, KEYS), pytest.raises(SnapshotError, match="another refresh"):
        SummaryWriter(tmp_path / "s", HEAD, KEYS)


def test_an_unfinished_file_is_not_put_in_place(tmp_path):
    with SummaryWriter(tmp_path / "s", HEAD, KEYS) as writer:
        writer.append(columns(0, 20))
        with pytest.raises(ValueError, match="20 of 50"):
            writer.finish()


KILLED = """
import sys, time, pathlib, numpy as np
sys.path.insert(0, sys.argv[2])
from test_summaries import *
with SummaryWriter(pathlib.Path(sys.argv[1]), HEAD, KEYS) as writer:
    while writer.num_done < 50:
        writer.append(columns(writer.num_done, writer.num_done + 1))
        print(writer.num_done, flush=True)
        time.sleep(0.01)
"""


def test_kill_9_loses_the_chunk_at_hand_and_nothing_else(tmp_path):
    write(tmp_path / "s", shift=9)
    before = (tmp_path / "s").read_bytes()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "s"), os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    seen = 0
    while seen < 5:
        seen = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "s").read_bytes() == before  # readers have the old one meanwhile
    with SummaryWriter(tmp_path / "s", HEAD, KEYS) as writer:
        assert 5 <= writer.num_done < 50
    write(tmp_path / "s")
    write(tmp_path / "whole")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_reader_takes_up_a_newer_file_of_its_version_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "LOOK_S", 0.0)
    write(tmp_path / "s")
    store = SummaryStore.open(tmp_path / "s", version="v1")
    assert not store.renewed()
    time.sleep(0.01)
    write(tmp_path / "s", shift=5)
    assert store.renewed()
    assert not store.renewed()
    assert int(store.get(["user-3"])[0]["code"][0, 0]) == 8
    write(tmp_path / "s", head=SummaryHead(version="v2", system="vista", num_tokens=3, width=4), shift=50)
    assert not store.renewed()
    assert int(store.get(["user-3"])[0]["code"][0, 0]) == 8
    (tmp_path / "s").unlink()
    assert not store.renewed()


def test_memories_read_through_on_a_miss_and_anew_after_a_renewal(tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "LOOK_S", 0.0)
    write(tmp_path / "s")
    memories = Memories(backings={"vista": SummaryStore.open(tmp_path / "s", version="v1")})
    own = {"code": torch.zeros(1)}
    memories.put("vista", ("user-1", "stranger"), [own, own])
    found = memories.get("vista", ("user-1", "user-2", "nobody", "stranger"))
    assert found[0] is own
    assert found[1]["num_events"] == 4
    assert found[2] is None
    assert found[3] is own
    assert memories.get("other", ("user-2",)) == [None]
    status = memories.status()
    assert (status.num_hits, status.num_misses, status.num_read) == (3, 2, 1)
    time.sleep(0.01)
    write(tmp_path / "s", shift=7)
    assert int(memories.get("vista", ("user-1",))[0]["code"][0, 0]) == 8
    assert memories.get("vista", ("stranger",)) == [None]
    assert memories.status().num_bytes == 0


def test_a_head_is_one_line_of_json(tmp_path):
    write(tmp_path / "s")
    told = json.loads((tmp_path / "s").read_bytes()[:HEAD_BYTES].rstrip(b"\0"))
    assert told["system"] == "vista"
    assert told["num_users"] == 50
