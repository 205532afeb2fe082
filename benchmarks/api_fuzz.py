"""Property-based requests against every route of the API: no answer is a 5xx, none takes too long, and every refusal is a sentence.

    python benchmarks/api_fuzz.py [--cases 5000] [--seed 0] [--quick] [--out benchmarks/results/api_fuzz.json]

Schemathesis makes requests from the server's own OpenAPI description, half of them as described and half not. The server is a process of
its own over the built-in shop log, with an event store, a request log, API keys and admin routes; requests go to it over loopback.
The same `fuzz` runs inside the tests, on an application without a port. A finding is printed as a line that asks it again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from shortlist.evaluation.benchmarks import record
from shortlist.serving.keys import add_key

if TYPE_CHECKING:
    from _server import Served

RESULT = Path(__file__).parent / "results" / "api_fuzz.json"
SENDS = ("method", "url", "params", "headers", "json", "data")
ROUNDS = 50
"""At most: a route without parameters gives one case a round."""
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@dataclass
class Findings:
    """What came of the requests."""

    limit_s: float
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route and status."""
    times_ms: list[float] = field(default_factory=list)
    unsent: int = 0
    """Cases that no client can send, such as a header with a line end."""
    problems: list[str] = field(default_factory=list)
    """Each with a line that asks it again."""

    @property
    def num_cases(self) -> int:
        """Requests answered."""
        return len(self.times_ms)

    def statuses(self) -> dict[str, int]:
        """Answers by status."""
        totals: Counter[str] = Counter()
        for (_, status), count in self.counts.items():
            totals[str(status)] += count
        return dict(sorted(totals.items()))

    def ask(self, client: httpx.Client, case: schemathesis.Case) -> None:
        """Send one request and look at the answer."""
        wanted = case.as_transport_kwargs(base_url=str(client.base_url).rstrip("/"))
        wanted = {name: value for name, value in wanted.items() if name in SENDS and value is not None}
        if isinstance(wanted.get("data"), bytes | str):
            wanted["content"] = wanted.pop("data")
        began = time.perf_counter()
        try:
            response = client.request(**wanted)
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeEncodeError, ValueError, TypeError):
            self.unsent += 1
            return
        except httpx.HTTPError as error:
            self.problems.append(f"{type(error).__name__}: {_again(case)}")
            return
        took_s = time.perf_counter() - began
        self.times_ms.append(took_s * 1e3)
        self.counts[case.operation.label, response.status_code] += 1
        fault = self._fault(response, took_s)
        if fault:
            self.problems.append(f"{fault}: {_again(case)}")

    def _fault(self, response: httpx.Response, took_s: float) -> str | None:
        """What is wrong with an answer; None when nothing is."""
        if response.status_code >= 500:
            return f"{response.status_code} {response.text[:200]}"
        if took_s > self.limit_s:
            return f"{took_s:.1f} s"
        if response.status_code >= 400:
            try:
                said = response.json()
            except ValueError:
                said = None
            if not isinstance(said, dict) or list(said) != ["error"] or not isinstance(said["error"], str):
                return f"{response.status_code} without a sentence: {response.text[:200]!r}"
        return None


def fuzz(
    client: httpx.Client, description: dict[str, Any], num_cases: int, *, seed: int = 0, limit_s: float = 5.0
) -> Findings:
    """Ask at least `num_cases` requests, spread over all routes.

    Args:
        client: where they go, with the headers that all should have.
        description: OpenAPI, as /openapi.json gives it.
        seed: the same one makes the same requests.
        limit_s: seconds after which an answer counts as a hang.
    """
    findings = Findings(limit_s)
    description = {
        name: part for name, part in description.items() if name != "security"
    }  # the client's own key counts
    operations = [made.ok() for made in schemathesis.openapi.from_dict(description).get_all_operations()]
    vary = [operation for operation in operations if operation.body or any(operation.iter_parameters())]
    each = -(-num_cases // (len(MODES) * len(vary)))
    for number in range(ROUNDS):
        for operation in operations:
            for mode in MODES:
                _round(client, operation, mode, each, seed * ROUNDS + number, findings)
        if findings.num_cases >= num_cases:
            break
    return findings


def _round(
    client: httpx.Client, operation: Any, mode: GenerationMode, num_cases: int, seed: int, findings: Findings
) -> None:
    try:
        cases: st.SearchStrategy[Any] = operation.as_strategy(generation_mode=mode)
    except schemathesis.errors.SchemathesisError:
        return

    @seeded(seed)
    @settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=cases)
    def ask(case: schemathesis.Case) -> None:
        findings.ask(client, case)

    with suppress(Unsatisfiable):  # nothing about a route without parameters can be wrong
        ask()


def _again(case: schemathesis.Case) -> str:
    return re.sub(r"(?i)(bearer |x-api-key: )\S+?(?=')", r"\1KEY", case.as_curl_command())[:500]


@contextmanager
def server_of_the_shop(folder: Path) -> Iterator[tuple[Served, str]]:
    """A server process over the built-in log, and an admin's key."""
    sys.path.insert(0, str(Path(__file__).parent))
    from _server import served
    from serving_latency import make_run

    run, keys = make_run(folder / "run"), folder / "keys.json"
    _, key = add_key(keys, "fuzz", "admin")
    with served(run, "--keys", keys, "--time-limit-ms", 2000, "--admin") as made:
        yield made, key


def main() -> None:
    """Ask, print, write; exit code 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="200 cases, nothing written unless --out is given")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    num_cases = 200 if given.quick else given.cases
    with (
        tempfile.TemporaryDirectory() as temporary,
        server_of_the_shop(Path(temporary)) as (made, key),
        httpx.Client(base_url=made.address, headers={"x-api-key": key}, timeout=10.0) as client,
    ):
        description = client.get("/openapi.json").json()
        began = time.perf_counter()
        found = fuzz(client, description, num_cases, seed=given.seed)
        seconds = time.perf_counter() - began
        live = client.get("/v1/health/live").status_code
    routes = sorted({route for route, _ in found.counts})
    figures = {
        "settings": {"cases": num_cases, "seed": given.seed, "limit_s": found.limit_s, "schemathesis": schemathesis.SCHEMATHESIS_VERSION},
        "num_cases": found.num_cases,
        "num_unsent": found.unsent,
        "routes": {route: {str(s): n for (r, s), n in sorted(found.counts.items()) if r == route} for route in routes},
        "statuses": found.statuses(),
        "num_problems": len(found.problems),
        "problems": found.problems[:50],
        "p50_ms": round(float(np.percentile(found.times_ms, 50)), 2),
        "max_ms": round(max(found.times_ms), 1),
        "seconds": round(seconds, 1),
        "alive_after": live == 200 and made.process.returncode == 0,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    record(RESULT, figures, quick=given.quick, out=given.out)
    sys.exit(1 if found.problems or not figures["alive_after"] else 0)


if __name__ == "__main__":
    main()
