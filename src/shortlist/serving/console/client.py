"""The server's API as the console asks it: typed answers, and one sentence where there is none.

async with Api(Target(server="http://127.0.0.1:8000", key="...")) as api:
    state = await api.budget()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import TypeAdapter, ValidationError

from shortlist.errors import ConfigError, ShortlistError
from shortlist.extras import library

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
"""Made when first asked for, since making one takes its time."""
QUICK_S, LONG_S = 5.0, 120.0
"""Seconds that an answer may take: of what is asked again and again, and of a snapshot that is loaded."""


class ApiError(ShortlistError):
    """No answer that can be used; the text says why in one sentence."""

    def __init__(self, sentence: str, status: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        """Of the refusal; None where nobody answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Which server the console talks to."""

    server: str
    """Where pages are asked for, such as http://127.0.0.1:8000."""
    admin: str | None = None
    """Where /metrics and /v1/admin are, if they have a port of their own; None = the same."""
    key: str | None = None
    """API key; None = the server asks for none."""

    def __post_init__(self) -> None:
        for name in ("server", "admin"):
            given = getattr(self, name)
            if given is None:
                continue
            parts = urlsplit(given)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
                raise ConfigError(f"--{name} must be an address such as http://127.0.0.1:8000, got {given!r}")

    def base(self, path: str) -> str:
        """The address that a path belongs to."""
        inner = path == "/metrics" or path.startswith("/v1/admin")
        return (self.admin if inner and self.admin else self.server).rstrip("/")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a chain costs a request."""

    name: str
    ms: float
    mflop: float
    worth: float | None = None
    """What a page by it brought in calibration."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A budget per request; None = no limit on that resource."""

    ms: float | None = None
    mflop: float | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetState:
    """What requests may cost now."""

    snapshot_version: str
    is_calibrated: bool
    why: str = ""
    """Why there is no budget, where there is none."""
    budget: Limits = Limits()
    calibrated: Limits = Limits()
    follows_traffic: bool = False
    prices: Mapping[str, float] = field(default_factory=dict)
    cap_ms: float | None = None
    chains: Sequence[Cost] = ()


@dataclass(frozen=True, kw_only=True)
class Worth:
    """A worth with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """An allocator at one budget."""

    arm: str
    ms: float
    mflop: float
    worth: Worth


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Quality against cost, as `shortlist budget` found it."""

    resource: str
    chains: Sequence[Cost]
    points: Sequence[CurvePoint]
    num_requests: int
    default: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `shortlist budget` wrote."""

    sentence: str
    window: str
    frontier: Frontier


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What `shortlist calibrate` found of the chains."""

    worth: str
    default: str
    chains: Sequence[Cost]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is known of quality against cost."""

    calibration: Calibrated | None = None
    report: Report | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One place of a page."""

    item_id: str | int
    title: str | None
    score: float | None
    scores: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class StageDone:
    """What one stage did for a request."""

    stage: str
    systems: Sequence[str]
    num_received: int
    num_kept: int
    spent_ms: float
    spent_mflop: float
    degraded: str | None = None


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """Which chain, and why."""

    reason: str
    value: float | None = None
    mflop: float | None = None
    ms: float | None = None
    price_mflop: float | None = None
    price_ms: float | None = None
    cap_ms: float | None = None
    propensity: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A page and how it came about."""

    request_id: str
    user: str | int | None
    items: Sequence[Shown]
    chain: str
    stages: Sequence[StageDone]
    snapshot_version: str
    degraded: str | None
    num_history: int
    spent_ms: float
    allotted: Allotment
    removed: Mapping[str, int] = field(default_factory=dict)
    arranged: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class FoundBy:
    """A system of the search that had the item on its list."""

    system: str
    place: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A stage that let the item through."""

    stage: str
    place: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Past:
    """A past event that is like the item, or moved its score."""

    item_id: str | int
    title: str | None = None
    by: float = 0.0
    """Score with it minus score without it."""


@dataclass(frozen=True, kw_only=True)
class OwnPast:
    """What the person did with the item before."""

    times: int


@dataclass(frozen=True, kw_only=True)
class WhyItem:
    """Why an item is on a page."""

    item_id: str | int
    title: str | None
    pinned: bool = False
    found: Sequence[FoundBy] = ()
    stages: Sequence[Kept] = ()
    own: OwnPast | None = None
    near: Sequence[Past] = ()
    events: Sequence[Past] = ()


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why a page was as it was."""

    request_id: str
    items: Sequence[WhyItem]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment of the server."""

    name: str
    surface: str
    traffic: float
    """Share of the units that take part."""
    primary: str
    """The metric that decides."""
    shares: Mapping[str, float]
    """Of those, by variant."""
    pages: Mapping[str, int]
    """By variant, since this process of the server started."""
    running: bool
    stopped: str | None = None
    """Why it ended."""
    interleave: bool = False


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """All of them."""

    experiments: Sequence[Experiment]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run was trained on."""

    users: int
    items: int
    events: int
    actions: Sequence[str]
    items_with_title: int | None = None


@dataclass(frozen=True, kw_only=True)
class Health:
    """What the served run was made of."""

    snapshot_version: str
    data: Sizes
    windows: Mapping[str, int]
    split: str
    events_kept: int | None
    metrics: Mapping[str, Any] | None
    problems: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Version:
    """A published snapshot."""

    version: str
    published_at: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """What a place holds and what the server made of it."""

    current: str
    serving: str
    versions: Sequence[Version]
    """Oldest first."""
    num_swaps: int = 0
    num_failed: int = 0
    problem: str | None = None


class Api:
    """Asks the server; belongs to one event loop.

    Raises ConfigError where httpx is missing. Every method raises ApiError where there is no answer.
    """

    def __init__(self, target: Target, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        module = library("httpx", extra="console", user="the console")
        self.target = target
        self._failures: tuple[type[Exception], type[Exception]] = (module.HTTPError, module.InvalidURL)
        self._timed_out: type[Exception] = module.TimeoutException
        headers = {} if target.key is None else {"authorization": f"Bearer {target.key}"}
        # What the environment says of proxies is for the wide world; and an API key must not go through one.
        self._client: httpx.AsyncClient = module.AsyncClient(headers=headers, transport=transport, trust_env=False)

    async def metrics(self) -> str:
        """/metrics as text."""
        return (await self._ask("GET", "/metrics")).text

    async def budget(self) -> BudgetState:
        """What requests may cost now."""
        return await self._get(BudgetState, "/v1/admin/budget")

    async def set_budget(self, limits: Limits) -> BudgetState:
        """Let requests cost something else from now on."""
        answer = await self._ask("PUT", "/v1/admin/budget", {"ms": limits.ms, "mflop": limits.mflop})
        return self._read(BudgetState, answer)

    async def curve(self) -> Curve:
        """Quality against cost."""
        return await self._get(Curve, "/v1/admin/budget/curve")

    async def page(self, user: str | None, k: int | None, query: str | None) -> Answered:
        """A page for somebody, or of what somebody typed."""
        body = {"user": user, "k": k, "query": query}
        path = "/v1/recommend" if query is None else "/v1/search"
        answer = await self._ask("POST", path, {name: value for name, value in body.items() if value is not None})
        return self._read(Answered, answer)

    async def explain(self, request_id: str) -> Why:
        """Why a page was as it was."""
        return await self._get(Why, f"/v1/explain/{quote(request_id, safe='')}")

    async def health(self) -> Health:
        """What the served run was made of."""
        return await self._get(Health, "/v1/admin/health")

    async def snapshots(self) -> Snapshots:
        """What the place holds."""
        return await self._get(Snapshots, "/v1/admin/snapshots")

    async def publish(self, version: str) -> Snapshots:
        """Serve a version of the place."""
        answer = await self._ask("POST", "/v1/admin/publish", {"version": version}, LONG_S)
        return self._read(Snapshots, answer)

    async def rollback(self) -> Snapshots:
        """Go back to the version that was published before the current one."""
        return self._read(Snapshots, await self._ask("POST", "/v1/admin/rollback", {}, LONG_S))

    async def experiments(self) -> Sequence[Experiment]:
        """Experiments of the server, and how far they are."""
        return (await self._get(Experiments, "/v1/experiments")).experiments

    async def stop_experiment(self, name: str) -> Sequence[Experiment]:
        """End an experiment for good."""
        reason = {"reason": "by hand, in the console"}
        answer = await self._ask("POST", f"/v1/experiments/{quote(name, safe='')}/stop", reason)
        return self._read(Experiments, answer).experiments

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _get(self, kind: type[T], path: str) -> T:
        return self._read(kind, await self._ask("GET", path))

    async def _ask(self, method: str, path: str, body: Any = None, timeout_s: float = QUICK_S) -> httpx.Response:
        base = self.target.base(path)
        try:
            answer = await self._client.request(method, base + path, json=body, timeout=timeout_s)
        except self._timed_out as error:
            raise ApiError(f"the server at {base} did not answer {path} within {timeout_s:g} s") from error
        except self._failures as error:
            raise ApiError(f"the server at {base} does not answer; start it, or give another --server") from error
        if answer.is_success:
            return answer
        raise ApiError(_sentence(answer, path, base), answer.status_code)

    def _read(self, kind: type[T], answer: httpx.Response) -> T:
        path = answer.request.url.path
        try:
            return _adapter(kind).validate_json(answer.content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "it is not JSON"
            raise ApiError(
                f"the server's answer to {path} can not be read ({where}); is it of the console's version?"
            ) from error


def read_report(content: bytes) -> Report:
    """RUN-report/budget.json as `shortlist budget` wrote it; ConfigError where it is something else."""
    try:
        return _adapter(Report).validate_json(content)
    except ValidationError as error:
        raise ConfigError(
            f"this is no budget.json of `shortlist budget` ({error.errors()[0]['msg']}); write it again"
        ) from error


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _sentence(answer: httpx.Response, path: str, base: str) -> str:
    """The server's own sentence, or what its status means."""
    if answer.status_code in (401, 403):
        wanted = "another key" if answer.status_code == 403 else "a key"
        return f"the server at {base} wants {wanted} for {path}; start the console with --key, or SHORTLIST_KEY set"
    if answer.status_code == 404 and path.startswith("/v1/admin"):
        return f"the server at {base} has no {path}; start it with --admin, or give the console --admin URL"
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server at {base} answered {path} with status {answer.status_code}"
