import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from shortlist.errors import SnapshotError
from shortlist.store.snapshot import MANIFEST, load_tensors, read_snapshot, save_tensors, write_snapshot


def fill(folder: Path, text: str = "one") -> None:
    (folder / "inner").mkdir()
    (folder / "a.txt").write_text(text)
    save_tensors(folder / "inner" / "weights.safetensors", {"w": torch.arange(4.0)})


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    write_snapshot(tmp_path / "run", fill)
    return tmp_path / "run"


def test_manifest_lists_every_file_with_its_real_digest(snapshot):
    manifest = read_snapshot(snapshot)
    assert set(manifest.files) == {"a.txt", "inner/weights.safetensors"}
    assert manifest.files["a.txt"].sha256 == hashlib.sha256(b"one").hexdigest()
    assert manifest.files["a.txt"].bytes == 3


def test_replacing_is_whole_and_leaves_nothing_beside(snapshot):
    before = read_snapshot(snapshot).version
    write_snapshot(snapshot, lambda folder: (folder / "b.txt").write_text("two"))
    assert set(read_snapshot(snapshot).files) == {"b.txt"}
    assert not (snapshot / "a.txt").exists()
    assert read_snapshot(snapshot).version != before
    assert [p.name for p in snapshot.parent.iterdir()] == ["run"]


def test_version_follows_content_alone(tmp_path):
    first = write_snapshot(tmp_path / "x", fill)
    second = write_snapshot(tmp_path / "y", fill)
    assert first.version == second.version


def test_a_failing_writer_changes_nothing(snapshot):
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_snapshot(snapshot, fail)
    assert set(read_snapshot(snapshot).files) == {"a.txt", "inner/weights.safetensors"}
    assert [p.name for p in snapshot.parent.iterdir()] == ["run"]


def test_a_crash_between_the_renames_is_mended_by_the_next_writer(snapshot):
    snapshot.rename(snapshot.with_name("run.previous"))

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_snapshot(snapshot, fail)
    assert read_snapshot(snapshot).files


@pytest.mark.parametrize("name", ["a.txt", "inner/weights.safetensors"])
def test_a_flipped_byte_is_refused_by_name(snapshot, name):
    path = snapshot / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=path.name):
        read_snapshot(snapshot)
    read_snapshot(snapshot, verify=False)  # the quick check looks at sizes alone


@pytest.mark.parametrize("verify", [True, False])
def test_a_removed_or_cut_file_is_refused_by_name(snapshot, verify):
    (snapshot / "a.txt").write_text("on")
    with pytest.raises(SnapshotError, match=r"a\.txt has 2 bytes where 3"):
        read_snapshot(snapshot, verify=verify)
    (snapshot / "a.txt").unlink()
    with pytest.raises(SnapshotError, match=r"a\.txt is missing"):
        read_snapshot(snapshot, verify=verify)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_manifest_is_refused_by_name(snapshot, share):
    path = snapshot / MANIFEST
    text = path.read_text().rstrip()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        read_snapshot(snapshot)


def test_an_edited_manifest_is_refused(snapshot):
    path = snapshot / MANIFEST
    content = json.loads(path.read_text())
    del content["files"]["a.txt"]
    path.write_text(json.dumps(content))
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        read_snapshot(snapshot)


@pytest.mark.parametrize(
    "name", ["../run/a.txt", "/etc/hostname", "..", "inner/../../x", "a\0b", "x" * 5_000, "\ud800"]
)
def test_a_manifest_that_leads_outside_is_refused(snapshot, name):
    """Its own digest agrees, so it is no accident."""
    path = snapshot / MANIFEST
    content = json.loads(path.read_text())
    content["files"][name] = content["files"].pop("a.txt")
    lines = "".join(f"{n} {record['sha256']}\n" for n, record in sorted(content["files"].items()))
    content["version"] = hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()[:12]
    path.write_text(json.dumps(content))
    with pytest.raises(SnapshotError) as error:
        read_snapshot(snapshot)
    assert str(snapshot) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"format": ' + "9" * 5_000 + "}", "[1, 2]", "NaN", '{"format": 1, "files": 7}', '"x"']
)
def test_whatever_stands_in_a_manifest_is_refused_by_name(snapshot, text):
    (snapshot / MANIFEST).write_text(text)
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        read_snapshot(snapshot)


@pytest.mark.parametrize("record", [{"bytes": "3", "sha256": "0"}, {"bytes": 3, "sha256": None}, {"bytes": 3}, 7])
def test_a_manifest_with_records_of_other_types_is_refused(snapshot, record):
    path = snapshot / MANIFEST
    content = json.loads(path.read_text())
    content["files"]["a.txt"] = record
    path.write_text(json.dumps(content))
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        read_snapshot(snapshot)


def test_an_unknown_format_names_the_version_that_wrote_it(snapshot):
    path = snapshot / MANIFEST
    content = json.loads(path.read_text()) | {"format": 99, "written_by": "9.9"}
    path.write_text(json.dumps(content))
    with pytest.raises(SnapshotError, match=r"format 99 .* version 9\.9"):
        read_snapshot(snapshot)


def test_other_peoples_folders_are_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(SnapshotError, match="not a snapshot"):
        write_snapshot(tmp_path / "thesis", fill)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    with pytest.raises(SnapshotError, match="no manifest"):
        read_snapshot(tmp_path / "thesis")
    with pytest.raises(SnapshotError, match="no manifest"):
        read_snapshot(tmp_path / "absent")


def test_tensors_survive_with_types_and_shared_memory(tmp_path):
    whole = torch.randn(3, 2)
    tensors = {"w": whole, "tied": whole, "view": whole.T, "mask": torch.tensor([True, False]), "one": torch.tensor(7)}
    save_tensors(tmp_path / "deep" / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "deep" / "t.safetensors")
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_damaged_tensors_are_refused_by_name(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(SnapshotError, match=r"t\.safetensors"):
        load_tensors(path)
    save_tensors(path, {"w": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SnapshotError, match=r"t\.safetensors"):
        load_tensors(path)


def test_a_copied_snapshot_is_a_snapshot(snapshot, tmp_path):
    shutil.copytree(snapshot, tmp_path / "elsewhere")
    assert read_snapshot(tmp_path / "elsewhere").version == read_snapshot(snapshot).version
