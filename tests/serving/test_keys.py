"""API keys: kept as salted hashes, proved once, known quickly, gone when revoked."""

import hashlib
import json
import stat
import threading
import time

import pytest

from cli_support import refused, succeeds
from shortlist.errors import ConfigError
from shortlist.serving.keys import ROLES, Keyring, add_key, read_keys, revoke_key

CHEAP = 2**10


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_what_is_kept_is_scrypt_of_the_key_and_nothing_more(file):
    key, secret = add_key(file, "shop", "write", cost=CHEAP)
    kept = json.loads(file.read_text())["keys"]
    assert len(kept) == 1
    _, number, random = secret.split("_", 2)
    assert (kept[0]["id"], kept[0]["name"], kept[0]["role"]) == (number, "shop", "write")
    salt = bytes.fromhex(kept[0]["salt"])
    assert kept[0]["hash"] == hashlib.scrypt(random.encode(), salt=salt, n=CHEAP, r=8, p=1, dklen=32).hex()
    assert random not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]
    assert read_keys(file) == {number: key}


def test_two_keys_of_one_name_or_one_secret_do_not_meet(file):
    add_key(file, "shop", "read", cost=CHEAP)
    with pytest.raises(ConfigError, match="has a key named 'shop' already"):
        add_key(file, "shop", "read", cost=CHEAP)
    other, _ = add_key(file, "other", "read", cost=CHEAP)
    first, second = read_keys(file).values()
    assert second == other
    assert first.salt != second.salt
    assert len(first.salt) == len(second.salt) == 32


def test_keys_made_at_once_are_all_kept(file):
    threads = [threading.Thread(target=add_key, args=(file, f"k{n}", "read"), kwargs={"cost": CHEAP}) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read_keys(file).values()) == [f"k{n}" for n in range(8)]


def test_a_role_includes_those_before_it(file):
    for place, role in enumerate(ROLES):
        key, _ = add_key(file, role, role, cost=CHEAP)
        assert [key.may(needed) for needed in ROLES] == [n <= place for n in range(3)]


def test_a_key_is_proved_once_and_known_after(file, monkeypatch):
    key, secret = add_key(file, "shop", "read", cost=CHEAP)
    ring = Keyring(file)
    assert ring.known(secret) is None
    assert ring.prove(secret) == key
    slow = []
    monkeypatch.setattr("shortlist.serving.keys._hash", lambda *given: slow.append(given) or b"")
    assert ring.known(secret) == key
    assert not slow
    began = time.perf_counter()
    for _ in range(1_000):
        ring.known(secret)
    assert (time.perf_counter() - began) / 1_000 < 100e-6


@pytest.mark.parametrize("spoil", [
    lambda secret: "", lambda secret: secret[:-1], lambda secret: secret + "x",
    lambda secret: secret[:-1] + ("A" if secret[-1] != "A" else "B"),
    lambda secret: "sl_00000000_" + secret[12:], lambda secret: secret.upper(), lambda secret: secret + "\n", lambda secret: "ä" * 55,
])  # fmt: skip
def test_what_is_almost_a_key_is_none(file, spoil):
    _, secret = add_key(file, "shop", "read", cost=CHEAP)
    ring = Keyring(file)
    assert ring.prove(secret) is not None
    assert ring.known(spoil(secret)) is None
    assert ring.prove(spoil(secret)) is None
    assert ring.known(secret) is not None  # and the right one is still known


def test_an_unknown_id_costs_no_hash(file, monkeypatch):
    _, secret = add_key(file, "shop", "read", cost=CHEAP)
    monkeypatch.setattr("shortlist.serving.keys._hash", lambda *given: pytest.fail("hashed"))
    assert Keyring(file).prove("sl_ffffffff_" + secret[12:]) is None


def test_comparisons_take_constant_time(file, monkeypatch):
    """Both comparisons go through hmac.compare_digest, with whole digests."""
    compared = []
    honest = __import__("hmac").compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or honest(a, b))
    _, secret = add_key(file, "shop", "read", cost=CHEAP)
    ring = Keyring(file)
    ring.prove(secret)
    ring.known(secret)
    assert compared == [(32, 32), (32, 32)]


def test_changes_of_the_file_are_followed(file, clock):
    _, first = add_key(file, "first", "read", cost=CHEAP)
    ring = Keyring(file, clock)
    assert ring.prove(first)
    second_key, second = add_key(file, "second", "read", cost=CHEAP)
    assert ring.prove(second) is None  # not looked yet
    clock.now = 1.5
    assert ring.known(first)
    assert ring.prove(second) == second_key
    assert revoke_key(file, "first").name == "first"
    clock.now = 3.0
    assert ring.known(first) is None
    assert ring.prove(first) is None
    assert ring.known(second) == second_key


def test_a_file_that_breaks_while_it_is_used_changes_nothing(file, clock, caplog):
    key, secret = add_key(file, "shop", "read", cost=CHEAP)
    ring = Keyring(file, clock)
    ring.prove(secret)
    for number, spoil in enumerate((lambda: file.write_text("{"), file.unlink), start=1):
        spoil()
        clock.now = 2.0 * number
        assert ring.known(secret) == key
        assert "stay valid" in caplog.messages[-1]
    assert len(caplog.messages) == 2


DAMAGES = {
    "": "can not be used", "{": "can not be used", "[]": "can not be used", '{"format": 2, "keys": []}': "format 2",
    '{"format": 1}': "keys", '{"format": 1, "keys": [{}]}': "can not be used", '{"format": 1, "keys": []}': "holds no key",
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), DAMAGES.items(), ids=range(len(DAMAGES)))
def test_files_that_hold_no_keys_are_refused_by_name(file, text, said):
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        Keyring(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(("name", "value"), [
    ("role", "root"), ("name", "a b"), ("name", ""), ("id", "../../ab"), ("salt", "00"), ("hash", "zz" * 32), ("hash", None),
    ("cost", 2**30), ("cost", 1), ("cost", 1025), ("cost", "many"),
])  # fmt: skip
def test_entries_are_checked(file, name, value):
    """A cost of 2^30 would take all memory with the first request."""
    add_key(file, "shop", "read", cost=CHEAP)
    content = json.loads(file.read_text())
    content["keys"][0][name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"a key's {name}"):
        read_keys(file)


# -- command line ----------------------------------------------------------------------------------------------------


def test_add_list_revoke(file):
    made = succeeds("keys", "add", "shop", "--role", "write", "--file", file)
    secret = made.out.strip()
    assert "not shown again" in made.err
    assert Keyring(file).prove(secret).role == "write"
    listed = succeeds("keys", "list", "--file", file).out
    assert "shop" in listed
    assert "write" in listed
    entry = json.loads(file.read_text())["keys"][0]
    for hidden in (secret, secret[12:], entry["salt"], entry["hash"]):
        assert hidden not in listed
    assert succeeds("keys", "list", "--file", file, "--json").json[0]["name"] == "shop"
    assert "revoked shop" in succeeds("keys", "revoke", "shop", "--file", file).out
    assert succeeds("keys", "list", "--file", file).out == "no keys\n"
    assert succeeds("keys", "add", "other", "--file", file, "--json").json["role"] == "read"


def test_what_can_not_be_done_is_said(file, tmp_path):
    assert "make a key with `shortlist keys add" in refused("keys", "list", "--file", file)
    assert "say whose key" in refused("keys", "add", "--file", file)
    assert "letters, digits" in refused("keys", "add", "a/b", "--file", file)
    assert "is not a folder" in refused("keys", "add", "shop", "--file", tmp_path / "no" / "keys.json")
    assert not file.exists()
    succeeds("keys", "add", "shop", "--file", file)
    before = file.read_bytes()
    assert "no key named 'nobody'" in refused("keys", "revoke", "nobody", "--file", file)
    assert "already" in refused("keys", "add", "shop", "--file", file)
    assert file.read_bytes() == before
