"""A real Chromium for tests, Debian's; installed where it is missing and that is possible.

python tests/browser.py        installs it (as root, with apt-get)
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess

from services import CanNotBeHad

NAMES = ("chromium", "chromium-browser", "google-chrome")
_APT = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]


def chromium() -> str:
    """Path of the browser; CanNotBeHad says why there is none."""
    with open(f"/tmp/shortlist-browser-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may ask at once
        found = next((path for name in NAMES if (path := shutil.which(name))), None)
        if found is not None:
            return found
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise CanNotBeHad("a browser must be installed: apt-get install chromium")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            done = subprocess.run([*_APT, *arguments], env=quiet, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise CanNotBeHad(f"apt-get {' '.join(arguments)} failed: {' '.join(said)}")
    return chromium()


if __name__ == "__main__":
    print(chromium())
