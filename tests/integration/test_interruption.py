"""Training that is killed, or stopped by Ctrl-C, goes on where it was and ends with the same bits; the run that is served stays whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from cli_support import LIGHT, succeeds, write_shop

SLOW = LIGHT.replace("epochs = 2", "epochs = 14\npatience = 14\ncheckpoint_seconds = 0")
"""Long enough to be caught in the middle."""


@pytest.fixture(scope="module")
def shop_folder(tmp_path_factory):
    folder = write_shop(tmp_path_factory.mktemp("interrupted"))
    (folder / "slow.toml").write_text(SLOW)
    return folder


def training(folder, out):
    tables = ("--items", folder / "items.csv", "--users", folder / "users.csv")
    return [
        str(a)
        for a in (
            "train",
            folder / "events.csv",
            *tables,
            "--config",
            folder / "slow.toml",
            "--out",
            out,
            "--no-report",
        )
    ]


@pytest.fixture(scope="module")
def uninterrupted(shop_folder):
    """What the same command gives when nothing happens to it."""
    out = shop_folder / "uninterrupted"
    succeeds(*training(shop_folder, out), "--quiet")
    return out


def stop_in_the_middle(arguments, out, how):
    """Start the command and send the signal once the ranker, the last system with weights, is some epochs into its training."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "shortlist.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip
    state = out.with_name(f"{out.name}.training")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        curves = list(state.glob("dnn-*/curve.jsonl"))
        if curves and len(curves[0].read_text().splitlines()) >= 2:
            process.send_signal(how)
            break
        time.sleep(0.005)
    said = process.communicate(timeout=60)
    return process.returncode, *said


def digests(run):
    """Of every file whose content training decides: all but those that tell the time."""
    files = json.loads((run / "manifest.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if name != "metrics.json"}


def measured(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["validation"].pop("cost")
    for system in metrics["systems"]:
        del system["seconds"]
    return metrics


def test_killed_and_resumed(shop_folder, uninterrupted, shop, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(shop, out)  # an older run, which is being served
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, stdout, _ = stop_in_the_middle(training(shop_folder, out), out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert stdout == ""
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert succeeds("recommend", out, "--user", "u3", "--json").json["items"]  # the old one answers
    resumed = succeeds(*training(shop_folder, out))
    # It went on: the retriever was not trained again, and the ranker not from its beginning.
    assert "TwoTower train epoch 1 " not in resumed.err
    assert "DNN train epoch 1 " not in resumed.err
    assert "DNN train epoch 14" in resumed.err
    assert digests(out) == digests(uninterrupted)
    assert measured(out) == measured(uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    old, new = (succeeds("evaluate", run, "--json").json["metrics"] for run in (uninterrupted, out))
    assert old == new


def test_control_c_says_how_to_go_on(shop_folder, uninterrupted, tmp_path):
    out = tmp_path / "run"
    code, stdout, stderr = stop_in_the_middle(training(shop_folder, out), out, signal.SIGINT)
    assert code == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == "shortlist: interrupted; run the same command again to go on"
    assert "Traceback" not in stderr
    assert not out.exists()
    shutil.copytree(tmp_path / "run.training", tmp_path / "other.training")
    succeeds(*training(shop_folder, out), "--quiet")
    assert digests(out) == digests(uninterrupted)
    # With another setting the ranker does not go on from what was left, and a retriever that it does not concern does.
    other = succeeds(*training(shop_folder, tmp_path / "other"), "--set", "dnn.dim=4")
    assert "DNN train epoch 1 " in other.err
    assert "TwoTower train epoch 1 " not in other.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]
