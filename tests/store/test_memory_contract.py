"""One contract for memories that outlast the process, run on the memory-mapped file and on a real Redis; then what only one of them has."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

import shortlist.extras
from shortlist.errors import ConfigError, DataError
from shortlist.store import mapped_memories, redis_memories
from shortlist.store.mapped_memories import HEAD_BYTES, MappedMemories
from shortlist.store.memories import Memories
from shortlist.store.redis_memories import RedisMemories
from shortlist.store.shelf import ShelfConfig, open_shelf, packed, unpacked

MIB = 1 << 20


class Place:
    """Opens shelves on one place, again as after a restart."""

    def __init__(self, where: str, restart):
        self.where, self.restart, self.opened = where, restart, []

    def open(self, max_mib=1):
        self.opened.append(open_shelf(self.where, ShelfConfig(max_mib=max_mib)))
        return self.opened[-1]

    def again(self, **settings):
        """After everything that held it was closed and started anew."""
        self.close()
        self.restart()
        return self.open(**settings)

    def close(self):
        for shelf in self.opened:
            shelf.close()
        self.opened.clear()

    def content(self) -> bytes:
        """All bytes that are kept anywhere."""
        if not self.where.startswith("redis"):
            with open(self.where, "rb") as file:
                return file.read()
        import redis

        client = redis.Redis.from_url(self.where)
        return b"".join(key + (client.dump(key) or b"") for key in client.scan_iter("*"))


@pytest.fixture(params=["file", "redis"])
def place(request, tmp_path):
    if request.param == "file":
        made = Place(str(tmp_path / "memories.bin"), lambda: None)
    else:
        server = request.getfixturevalue("redis_server")
        server.empty()

        def restart():
            server.kill()
            server.start()

        made = Place(server.url(), restart)
    yield made
    made.close()


@pytest.fixture
def shelf(place):
    return place.open()


def memory(value: int, num: int = 8):
    return {"a": torch.full((num,), float(value)), "n": torch.tensor(value)}


def values(found):
    """The number in each memory; a memory whose parts do not agree fails."""
    for each in found:
        assert each is None or (each["a"] == float(each["n"])).all()
    return [None if each is None else int(each["n"]) for each in found]


def test_tensors_come_back_as_they_were(shelf):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    sent = {
        "f32": whole,
        "part": whole[:, 1],
        "turned": whole.transpose(0, 2),
        "b16": torch.randn(5).bfloat16(),
        "i8": torch.tensor([[-128, 127]], dtype=torch.int8),
        "i64": torch.tensor(2**62),
        "bool": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    shelf.put("v1", "hstu", ["u"], [sent])
    found = shelf.get("v1", "hstu", ["u"])[0]
    assert found.keys() == sent.keys()
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_every_snapshot_system_and_user_has_its_own(shelf):
    names = [
        ("v1", "a", "u"),
        ("v2", "a", "u"),
        ("v1", "b", "u"),
        ("v1", "a", "u2"),
        ("v1", "a", "用户🙂 \0:*"),
        ("v", "1a", "u"),
    ]
    for number, (snapshot, system, user) in enumerate(names):
        shelf.put(snapshot, system, [user], [memory(number)])
    for number, (snapshot, system, user) in enumerate(names):
        assert values(shelf.get(snapshot, system, [user, "nobody"])) == [number, None]
    assert shelf.status().num_entries >= 4
    shelf.put("v1", "a", ["u", "u2"], [None, memory(17)])
    assert values(shelf.get("v1", "a", ["u2", "u", "u2"])) == [17, None, 17]
    assert values(shelf.get("v2", "a", ["u"])) == [1]


def test_memories_survive_a_restart(place, shelf):
    users = [f"u{n}" for n in range(40)]
    shelf.put("v1", "a", users, [memory(n, 10 + n) for n in range(40)])
    shelf.put("v1", "a", users[:20], [memory(100 + n, 60) for n in range(20)])  # grown: none fits its old place
    shelf.put("v1", "a", users[30:], [memory(200 + n, 2) for n in range(10)])  # shrunk
    expected = [*range(100, 120), *range(20, 30), *range(200, 210)]
    assert values(shelf.get("v1", "a", users)) == expected
    before = shelf.status()
    shelf = place.again()
    assert values(shelf.get("v1", "a", users)) == expected
    assert shelf.status().num_entries == before.num_entries == 40
    shelf.put("v1", "a", ["new"], [memory(7)])
    assert values(shelf.get("v1", "a", ["new", *users])) == [7, *expected]


def test_the_bound_is_never_passed_and_the_oldest_make_room(place):
    shelf = place.open()
    for n in range(400):
        shelf.put("v1", "a", [f"u{n}"], [memory(n, 2_000)])  # 8 kB
        assert shelf.status().num_bytes <= shelf.status().max_bytes <= MIB
    found = values(shelf.get("v1", "a", [f"u{n}" for n in range(400)]))
    kept = [n for n, value in enumerate(found) if value is not None]
    assert kept == list(range(kept[0], 400))  # the newest, without a gap
    assert 100 < len(kept) < 131
    assert [found[n] for n in kept] == kept
    status = shelf.status()
    assert status.num_entries == len(kept)
    assert status.num_evicted == 400 - len(kept)
    assert len(place.content()) < 1.1 * MIB


def test_what_is_too_large_is_not_kept_and_drives_nobody_out(place, shelf):
    shelf.put("v1", "a", ["u", "v"], [memory(1), memory(2)])
    shelf.put("v1", "a", ["u"], [memory(3, MIB // 4)])
    assert values(shelf.get("v1", "a", ["u", "v"])) == [None, 2]  # and the old one is no longer right


def test_whatever_comes_back_is_what_was_put_last(place):
    """Random writes, against a dictionary: a memory may be gone to make room, never be another one."""
    shelf, rng, last = place.open(), random.Random(5), {}
    for step in range(600):
        number = step + 1
        name = (rng.choice(["v1", "v2"]), rng.choice("ab"), f"u{rng.randrange(60)}")
        action = rng.random()
        if action < 0.8:
            shelf.put(name[0], name[1], [name[2]], [memory(number, rng.choice([1, 50, 3_000, 9_000]))])
            last[name] = number
            assert values(shelf.get(name[0], name[1], [name[2]])) == [number]
        elif action < 0.9:
            shelf.put(name[0], name[1], [name[2]], [None])
            last.pop(name, None)
        else:
            assert shelf.forget(name[2])
            last = {kept: value for kept, value in last.items() if kept[2] != name[2]}
        if step % 150 == 149:
            for (snapshot, system, user), value in last.items():
                assert values(shelf.get(snapshot, system, [user])) in ([value], [None])
            for user in range(60):
                for snapshot in ("v1", "v2"):
                    for system in "ab":
                        if (snapshot, system, f"u{user}") not in last:
                            assert values(shelf.get(snapshot, system, [f"u{user}"])) == [None]


def test_a_forgotten_user_is_gone_to_the_last_byte(place, shelf):
    secret = torch.tensor(list(b"what the user did in secret"), dtype=torch.uint8)
    for snapshot in ("v1", "v2"):
        for size in (1, 3, 2, 300):
            shelf.put(snapshot, "a", ["somebody"], [{"x": secret.repeat(size)}])
        shelf.put(snapshot, "a", ["other"], [memory(1)])
    for n in range(20):
        shelf.put("v1", "b", ["somebody"], [{"x": secret}])
        shelf.put("v1", "b", [f"u{n}"], [memory(n)])
    assert b"user did in" in place.content() or place.where.startswith("redis")  # Redis compresses its dumps
    assert shelf.forget("somebody")
    content = place.content()
    assert b"user did in" not in content
    assert b"somebody" not in content
    assert values(shelf.get("v2", "a", ["somebody", "other"])) == [None, 1]
    assert shelf.get("v1", "b", ["somebody"]) == [None]
    assert shelf.status().num_entries == 22
    assert shelf.forget("nobody")


def test_threads_meet_no_half_memory(place, shelf):
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for n in range(60):
            user = f"u{rng.randrange(6)}"
            shelf.put("v1", "a", [user], [memory(seed * 1_000 + n, rng.choice([10, 2_000, 9_000]))])
            try:
                values(shelf.get("v1", "a", [f"u{n}" for n in range(6)]))
            except AssertionError:
                wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < shelf.status().num_bytes <= MIB


def test_bytes_that_are_no_memory_are_none():
    good = packed(memory(1))
    assert values([unpacked(good)]) == [1]
    for bad in (b"", b"\x80\x04\x95cos\nsystem", good[:-1], good[:4], b"\xff" * 64, good + b"x"):
        assert unpacked(bad) is None


def test_memories_in_front_of_a_shelf(place):
    """A second process that begins with nothing goes on from what the first one kept."""
    first = Memories(shelf=place.open(), snapshot="v1")
    first.put("hstu", ("u", "v"), [memory(1), memory(2)])
    assert values(first.get("hstu", ("u", "v", "w"))) == [1, 2, None]
    shelf = place.again()
    second = Memories(shelf=shelf, snapshot="v1")
    assert values(second.get("hstu", ("u", "v", "w"))) == [1, 2, None]
    status = second.status()
    assert (status.num_hits, status.num_misses, status.num_shelved) == (2, 1, 2)
    assert status.shelf.num_entries == 2
    second.put("hstu", ("u", "v"), [memory(3), None])
    assert values(second.get("hstu", ("u", "v"))) == [3, None]
    assert second.status().num_entries == (0 if shelf.is_shared else 1)
    assert second.problem is None
    assert values(Memories(shelf=shelf, snapshot="v2").get("hstu", ("u",))) == [None]  # of other weights
    assert second.forget("u")
    assert values(second.get("hstu", ("u",))) == [None]
    assert shelf.status().num_entries == 0


class Backed:
    """A backing whose file can be replaced."""

    def __init__(self):
        self.number, self.fresh = 1, False

    def get(self, keys):
        return [memory(self.number) for _ in keys]

    def generation(self):
        return str(self.number)

    def renewed(self):
        was, self.fresh = self.fresh, False
        return was

    def forget(self, key):
        return False


def test_what_was_made_of_an_older_summary_does_not_hide_a_newer_one(place):
    backing, shelf = Backed(), place.open()
    memories = Memories(backings={"vista": backing}, shelf=shelf, snapshot="v1")
    assert values(memories.get("vista", ("u",))) == [1]
    memories.put("vista", ("u",), [memory(11)])
    assert values(memories.get("vista", ("u",))) == [11]
    backing.number, backing.fresh = 2, True
    assert values(memories.get("vista", ("u",))) == [2]
    memories.put("vista", ("u",), [memory(22)])
    after_restart = Memories(backings={"vista": backing}, shelf=shelf, snapshot="v1")
    assert values(after_restart.get("vista", ("u",))) == [22]


def test_a_part_of_a_large_tensor_does_not_keep_all_of_it():
    memories = Memories(max_bytes=10_000)
    large = torch.zeros(1_000, 1_000)
    memories.put("a", ("u",), [{"x": large[3]}])
    kept = memories.get("a", ("u",))[0]["x"]
    assert kept.untyped_storage().nbytes() == 4_000
    own = memory(1)
    memories.put("a", ("u",), [own])
    assert memories.get("a", ("u",))[0] is own


# -- the file alone ----------------------------------------------------------------------------------------------

WRITER = """
import sys
import torch
from shortlist.store.mapped_memories import MappedMemories
shelf = MappedMemories(sys.argv[1], 4 << 20)
number = 0
while True:
    number += 1
    size = 1 + 7919 * number % 40_000
    shelf.put("v1", "a", ["u%d" % (number % 50)], [{"a": torch.full((size,), float(number)), "n": torch.tensor(number)}])
    print(number, flush=True)
"""


@pytest.mark.parametrize("count", [1, 60, 300])
def test_kill_9_leaves_only_whole_memories(tmp_path, count):
    path = tmp_path / "memories.bin"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    lines = [writer.stdout.readline() for _ in range(count)]
    writer.kill()
    lines += writer.stdout.readlines()
    writer.wait()
    acknowledged = [int(line) for line in lines if line.endswith("\n")]
    shelf = MappedMemories(path, 4 << 20)
    last = {f"u{number % 50}": number for number in acknowledged}
    in_the_middle = acknowledged[-1] + 1  # may have been written over an older one, or just have been done
    for user, number in last.items():
        allowed = [[None], [number]] if number < acknowledged[-1] - 20 else [[number]]
        if user == f"u{in_the_middle % 50}":
            allowed = [[None], [number], [in_the_middle]]
        assert values(shelf.get("v1", "a", [user])) in allowed
    shelf.put("v1", "a", ["after"], [memory(5)])
    assert values(shelf.get("v1", "a", ["after"])) == [5]
    shelf.close()


def test_damage_is_found_and_passed_over(tmp_path):
    path, rng = tmp_path / "memories.bin", random.Random(0)
    users = [f"u{n}" for n in range(100)]
    for trial in range(8):
        path.unlink(missing_ok=True)
        shelf = MappedMemories(path, MIB)
        shelf.put("v1", "a", users, [memory(n, 200) for n in range(100)])
        shelf.close()
        with path.open("r+b") as file:
            for _ in range(40):
                file.seek(HEAD_BYTES + rng.randrange(110_000))
                file.write(rng.randbytes(1 + 8 * (trial % 3)))
        shelf = MappedMemories(path, MIB)
        found = values(shelf.get("v1", "a", users))
        assert all(value in (None, n) for n, value in enumerate(found))
        assert 20 < sum(value is not None for value in found) < 100
        shelf.put("v1", "a", users, [memory(n + 1, 210) for n in range(100)])
        assert values(shelf.get("v1", "a", users)) == [n + 1 for n in range(100)]
        shelf.close()


def test_content_that_looks_like_a_record_is_none(tmp_path):
    """A user's memory can hold any bytes, also those of another user's record."""
    path = tmp_path / "memories.bin"
    shelf = MappedMemories(path, MIB)
    shelf.put("v1", "a", ["victim"], [memory(1)])
    with path.open("rb") as file:
        file.seek(HEAD_BYTES)
        record = file.read(1_024)
    shelf.put("v1", "a", ["victim"], [None])
    for shift in range(0, 64, 8):  # one of them stands where a record could begin
        shelf.put("v1", "a", [f"u{shift}"], [{"x": torch.tensor(list(bytes(shift) + record * 4), dtype=torch.uint8)}])
    shelf.close()
    shelf = MappedMemories(path, MIB)
    assert shelf.get("v1", "a", ["victim"]) == [None]
    assert shelf.status().num_entries == 8
    shelf.close()


def test_files_that_can_not_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("do not lose this")
    with pytest.raises(DataError, match=r"notes\.txt can not be used for memories: it is something else"):
        MappedMemories(tmp_path / "notes.txt", MIB)
    assert (tmp_path / "notes.txt").read_text() == "do not lose this"
    with pytest.raises(DataError, match="is not a folder"):
        MappedMemories(tmp_path / "nowhere" / "m", MIB)
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        MappedMemories(tmp_path / "m", 1_000)
    with pytest.raises(DataError, match=r"m can not be used for memories: .* bytes are wanted"):
        MappedMemories(tmp_path / "m", 1 << 55)
    shelf = MappedMemories(tmp_path / "m", MIB)
    with pytest.raises(ConfigError, match="memories of another process; choose another file, or share them"):
        MappedMemories(tmp_path / "m", MIB)
    shelf.put("v1", "a", ["u"], [memory(1)])
    shelf.close()
    assert shelf.get("v1", "a", ["u"]) == [None]  # a request that ends late
    shelf.put("v1", "a", ["u"], [memory(2)])
    larger = MappedMemories(tmp_path / "m", 2 * MIB)
    assert larger.get("v1", "a", ["u"]) == [None]
    assert (tmp_path / "m").stat().st_size == larger.status().max_bytes <= 2 * MIB
    assert (tmp_path / "m").stat().st_mode & 0o077 == 0
    larger.close()


# -- Redis alone -------------------------------------------------------------------------------------------------


def test_redis_gone_is_no_error_and_is_taken_up_again(redis_server, monkeypatch):
    redis_server.empty()
    shelf = RedisMemories(redis_server.url(), MIB, ttl_s=60)
    memories = Memories(shelf=shelf, snapshot="v1")
    memories.put("a", ("u",), [memory(1)])
    redis_server.kill()
    try:
        began = time.perf_counter()
        for _ in range(50):
            assert memories.get("a", ("u", "v")) == [None, None]
            memories.put("a", ("u",), [memory(2)])
        assert time.perf_counter() - began < 1.0
        assert memories.problem.startswith(f"redis://127.0.0.1:{redis_server.port} can not be used: ")
        assert not memories.forget("u")
        assert memories.status().shelf.problem is not None
    finally:
        redis_server.start()
    time.sleep(redis_memories.REST_S)
    assert values(memories.get("a", ("u",))) == [1]
    assert memories.problem is None
    redis_server.kill()
    redis_server.start()
    assert values(memories.get("a", ("u",))) == [1]  # a restart in between is not noticed
    shelf.close()


def test_a_hanging_redis_holds_up_one_request_at_a_time(redis_server):
    redis_server.empty()
    shelf = RedisMemories(redis_server.url(), MIB, ttl_s=60)
    shelf.put("v1", "a", ["u"], [memory(1)])
    redis_server.pause(True)
    try:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            assert shelf.get("v1", "a", ["u"]) == [None]
            times.append(time.perf_counter() - began)
        assert max(times) < 4 * redis_memories.ANSWER_S
        assert sorted(times)[15] < 0.005
    finally:
        redis_server.pause(False)
    time.sleep(redis_memories.REST_S)
    assert values(shelf.get("v1", "a", ["u"])) == [1]
    shelf.close()


def test_servers_share_memories_and_one_bound(redis_server):
    redis_server.empty()
    first, second = (RedisMemories(redis_server.url(), MIB, ttl_s=60) for _ in range(2))
    first.put("v1", "a", ["u"], [memory(1)])
    assert values(second.get("v1", "a", ["u"])) == [1]
    second.put("v1", "a", ["u"], [memory(2)])
    assert values(first.get("v1", "a", ["u"])) == [2]

    def fill(shelf, name):
        for n in range(150):
            shelf.put("v1", "a", [f"{name}{n}"], [memory(n, 2_000)])

    threads = [threading.Thread(target=fill, args=pair) for pair in ((first, "x"), (second, "y"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status = first.status()
    assert status.num_bytes <= MIB
    kept = sum(one is not None for name in "xy" for one in second.get("v1", "a", [f"{name}{n}" for n in range(150)]))
    assert kept == status.num_entries
    size = len(packed(memory(1, 2_000))) + redis_memories.ENTRY_BYTES
    assert status.num_bytes == kept * size  # the account is exact
    assert first.status().num_evicted + second.status().num_evicted == 301 - kept
    first.close()
    second.close()


def test_what_nobody_renews_expires_and_what_redis_drops_is_accounted_for(redis_server):
    redis_server.empty()
    shelf = RedisMemories(redis_server.url(), MIB, ttl_s=0.4)
    shelf.put("v1", "a", ["u", "v"], [memory(1), memory(2)])
    time.sleep(0.25)
    shelf.put("v1", "a", ["v"], [memory(3)])
    time.sleep(0.25)
    assert values(shelf.get("v1", "a", ["u", "v"])) == [None, 3]
    shelf.put("v1", "a", ["w"], [memory(4)])
    assert shelf.status().num_entries == 2
    for key in shelf._redis.scan_iter("*memory:*"):
        shelf._redis.delete(key)
    shelf.put("v1", "a", ["w"], [memory(5)])
    assert values(shelf.get("v1", "a", ["v", "w"])) == [None, 5]
    time.sleep(1.0)
    assert shelf.status().num_bytes == 0  # with nobody there, nothing is left behind
    assert not list(shelf._redis.scan_iter("*"))
    shelf.close()


def test_places_that_are_none(monkeypatch):
    for url in ("redis://me:secret@host:port/0", "redis://me:secret@host/0?socket_timeout=x"):
        with pytest.raises(ConfigError, match="URL of Redis can not be read") as refused:
            open_shelf(url, ShelfConfig(max_mib=1))
        assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="not on 'memcached'"):
        open_shelf("memcached://host", ShelfConfig(max_mib=1))
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        RedisMemories("redis://host", 1_000, ttl_s=1)
    for bad in ({"max_mib": 0}, {"ttl_hours": 0.0}):
        with pytest.raises(ConfigError, match="max_mib of at least 1 and ttl_hours above 0"):
            ShelfConfig(**bad)
    away = open_shelf("redis://me:secret@127.0.0.1:1/0", ShelfConfig(max_mib=1))
    assert away.get("v1", "a", ["u"]) == [None]
    assert "secret" not in away.problem

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(shortlist.extras, "import_module", missing)
    with pytest.raises(ConfigError, match=r"keeping memories in Redis needs .*pip install 'shortlist\[redis\]'"):
        open_shelf("redis://host", ShelfConfig(max_mib=1))
    assert mapped_memories.MIN_BYTES == MIB
