"""Campaigns and their money: what each may spend, what it has spent, and what clicks on ads that people still see may cost.

    put(Campaign(...))                                kept for good when it returns
    reserve("r1", [Showing(...)], ...)                the price of a click on each ad is set aside before anybody sees it
    click("r1", 1)                                    the price is charged, once, however often the click is told

For every campaign spent + reserved <= budget holds at all times, in all processes: each change is one transaction with that condition in
it, so neither threads nor servers that share the database nor kill -9 can overspend. What was set aside for an ad that nobody clicked
within its window is given back; a click that comes later is charged where there is still money, and free where there is none.

Tables beside the events, in the same SQLite file or PostgreSQL database. Money is whole micros: 1,000,000 are one unit of currency.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from shortlist.errors import ConfigError, DataError
from shortlist.store.ads import MICROS, Account, Campaign, Charge, Refused, Showing, check_id, to_micros
from shortlist.store.catalogue import digest
from shortlist.store.databases import LOCK_SPACE, Database

T = TypeVar("T")
DAY_MS = 86_400_000
KEEP_MS = DAY_MS
"""How long an ad that nobody clicked is remembered after its window, so that a late click can still be charged."""
_WIPE_MS = 60_000
"""Time between two clearings of what is old."""
OPEN, RELEASED, CHARGED, UNPAID = range(4)
"""States of an ad that was shown: its price is set aside; it was given back; it was charged; clicked when no money was left."""

_METADATA = MetaData()
CAMPAIGNS = Table(
    "ad_campaigns",
    _METADATA,
    Column("campaign", String, primary_key=True),
    Column("change", Integer, nullable=False),
    Column("budget", BigInteger, nullable=False),
    Column("bid", BigInteger, nullable=False),
    Column("reserve", BigInteger, nullable=False),
    Column("start_ms", BigInteger),
    Column("end_ms", BigInteger),
    Column("items", String, nullable=False),
    Column("pacing", String, nullable=False),
    Column("max_per_day", Integer),
    Column("deleted", Boolean, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),
    Column("expected", BigInteger, nullable=False),
)
SHOWN = Table(
    "ad_shown",
    _METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("request_id", String, nullable=False),
    Column("slot", Integer, nullable=False),
    Column("campaign", String, nullable=False),
    Column("registered", Boolean, nullable=False),
    Column("item_id", String, nullable=False),
    Column("price", BigInteger, nullable=False),
    Column("expected", BigInteger, nullable=False),
    Column("bid", BigInteger, nullable=False),
    Column("chance", Double, nullable=False),
    Column("propensity", Double, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("release_ms", BigInteger, nullable=False),
    Column("state", Integer, nullable=False),
    Column("charged", BigInteger, nullable=False),
    Column("clicked_ms", BigInteger),
    Column("viewer", LargeBinary),
    UniqueConstraint("request_id", "slot"),
    Index("ad_shown_by_state", "state", "release_ms"),
    Index("ad_shown_by_viewer", "viewer", "campaign", "at_ms"),
)
_ACCOUNT = (CAMPAIGNS.c.campaign, CAMPAIGNS.c.change, CAMPAIGNS.c.spent, CAMPAIGNS.c.reserved, CAMPAIGNS.c.expected)
_IN_TURN = text(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, 2)")


class _Stop(Exception):
    """Rolls a transaction back with what it found."""

    def __init__(self, refused: Refused) -> None:
        super().__init__()
        self.refused = refused


class CampaignStore:
    """Keeps campaigns, reservations and charges; safe to use from many threads and by several servers.

    Args:
        database: of the event store, which closes it.

    Raises DataError where the tables can not be made.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        database.prepare(CAMPAIGNS)
        self._writing = threading.Lock()
        self._known: dict[str, tuple[int, Campaign]] = {}
        """By name: the number of the change, and the campaign after it."""
        self._wiped_ms = 0

    # -- campaigns -----------------------------------------------------------------------------------------------

    def put(self, *campaigns: Campaign) -> list[Account]:
        """Keep new campaigns, or change them in place: what one has spent stays spent, also where it was deleted before.

        Raises:
            ConfigError: a budget is below what is spent and set aside already; nothing was changed.
            StoreUnavailable: the store can not be written.
        """
        rows = [_row(campaign) for campaign in campaigns]
        make = (postgresql if self._database.is_server else sqlite).insert(CAMPAIGNS)

        def work(connection: Connection) -> list[Account]:
            kept = []
            for row in rows:
                statement = make.values(**row, change=1, spent=0, reserved=0, expected=0).on_conflict_do_update(
                    index_elements=["campaign"],
                    set_={**row, "change": CAMPAIGNS.c.change + 1},
                    where=CAMPAIGNS.c.spent + CAMPAIGNS.c.reserved <= row["budget"],
                )
                done = connection.execute(statement.returning(CAMPAIGNS)).all()
                if not done:
                    now = connection.execute(select(CAMPAIGNS).where(CAMPAIGNS.c.campaign == row["campaign"])).one()
                    used = (now.spent + now.reserved) / MICROS
                    raise ConfigError(
                        f"the budget of {row['campaign']!r} can not be {row['budget'] / MICROS:g}: {used:g} is spent or set aside for "
                        "ads that people still see; set at least that, or delete the campaign"
                    )
                kept.append(_account_of(done[0]))
            return kept

        return self._write(work)

    def remove(self, campaign: str) -> bool:
        """End a campaign: it is shown no more, clicks on what people still see are charged. False where there is none."""
        check_id("campaign", campaign)
        gone = update(CAMPAIGNS).where(CAMPAIGNS.c.campaign == campaign, ~CAMPAIGNS.c.deleted)
        gone = gone.values(deleted=True, change=CAMPAIGNS.c.change + 1)
        return bool(self._write(lambda connection: connection.execute(gone).rowcount))

    def account(self, campaign: str) -> Account | None:
        """A campaign and its money; None where there is none, or it was deleted."""
        check_id("campaign", campaign)
        wanted = select(CAMPAIGNS).where(CAMPAIGNS.c.campaign == campaign, ~CAMPAIGNS.c.deleted)
        row = self._database.read(lambda connection: connection.execute(wanted).first())
        return None if row is None else _account_of(row)

    def accounts(self) -> list[Account]:
        """All campaigns that were not deleted, by name. Their definitions are read again only when they change."""
        wanted = select(*_ACCOUNT).where(~CAMPAIGNS.c.deleted).order_by(CAMPAIGNS.c.campaign)
        rows = self._database.read(lambda connection: connection.execute(wanted).all())
        known = self._known
        news = [row.campaign for row in rows if row.campaign not in known or known[row.campaign][0] != row.change]
        if news:
            fresh = dict(known)
            fresh.update(self._definitions(news))
            there = {row.campaign for row in rows}
            self._known = known = {name: told for name, told in fresh.items() if name in there}
        return [
            Account(campaign=known[row.campaign][1], spent=row.spent, reserved=row.reserved, expected=row.expected)
            for row in rows
            if row.campaign in known
        ]

    def ended(self, names: Sequence[str]) -> set[str]:
        """Which of these were deleted, and so may not be shown under any bid."""
        gone = [
            select(CAMPAIGNS.c.campaign).where(CAMPAIGNS.c.campaign.in_(names[at : at + 500]), CAMPAIGNS.c.deleted)
            for at in range(0, len(names), 500)
        ]
        return self._database.read(lambda connection: {name for wanted in gone for name in connection.scalars(wanted)})

    def _definitions(self, names: Sequence[str]) -> dict[str, tuple[int, Campaign]]:
        chunks = [
            select(CAMPAIGNS).where(CAMPAIGNS.c.campaign.in_(names[at : at + 500])) for at in range(0, len(names), 500)
        ]
        rows = self._database.read(lambda connection: [row for wanted in chunks for row in connection.execute(wanted)])
        return {row.campaign: (row.change, _campaign_of(row._mapping)) for row in rows}

    # -- ads and clicks ------------------------------------------------------------------------------------------

    def reserve(
        self,
        request_id: str,
        showings: Sequence[Showing],
        *,
        window_s: float,
        viewer: str | None = None,
        now: float | None = None,
    ) -> Refused | None:
        """Set aside what a click on each ad may cost. None when that is done for all of them, else who was refused; then for nobody.

        Args:
            request_id: of the answer.
            showings: one per slot.
            window_s: seconds after which the money is given back.
            viewer: user id, of which a digest is kept for a day where a campaign limits its ads per user.
            now: seconds since 1970 UTC; None = now.

        Raises StoreUnavailable where the store can not be written; nothing was set aside.
        """
        now_ms = _ms(now)
        mark = None if viewer is None else digest(viewer)

        def work(connection: Connection) -> None:
            self._give_back(connection, now_ms)
            broke = {s.campaign for s in showings if s.registered and not _set_aside(connection, s)}
            capped = {s.campaign for s in showings if mark is not None and _is_capped(connection, s, mark, now_ms)}
            if broke or capped:
                raise _Stop(Refused(frozenset(broke), frozenset(capped)))
            rows = [_shown(request_id, s, mark, now_ms, round(window_s * 1e3)) for s in showings]
            if rows:
                connection.execute(insert(SHOWN), rows)

        try:
            self._write(work)
        except _Stop as stop:
            return stop.refused
        return None

    def click(self, request_id: str, slot: int, *, now: float | None = None) -> Charge:
        """Charge a click. When this returns the charge is durable; telling it again charges nothing.

        Raises:
            DataError: no such ad is known. ConfigError: that is no id.
            StoreUnavailable: the store can not be written; tell it again.
        """
        check_id("request_id", request_id)
        now_ms = _ms(now)
        return self._write(lambda connection: _charge(connection, request_id, slot, now_ms))

    def give_back(self, *, now: float | None = None) -> bool:
        """Give back what was set aside for ads whose window is over: whether there was any. What `reserve` sets aside has it in already."""
        now_ms = _ms(now)
        due = select(SHOWN.c.id).where(SHOWN.c.state == OPEN, SHOWN.c.release_ms <= now_ms).limit(1)
        is_due = self._database.read(lambda connection: connection.scalar(due)) is not None
        if is_due or abs(now_ms - self._wiped_ms) > _WIPE_MS:
            self._write(lambda connection: self._give_back(connection, now_ms))
        return is_due

    def forget(self, user: str) -> None:
        """Wipe the marks by which ads per user were counted."""
        gone = update(SHOWN).where(SHOWN.c.viewer == digest(user)).values(viewer=None)
        self._write(lambda connection: connection.execute(gone))

    def _write(self, work: Callable[[Connection], T]) -> T:
        def in_turn(connection: Connection) -> T:
            if self._database.is_server:
                connection.execute(_IN_TURN)
            return work(connection)

        with self._writing:
            return self._database.write(in_turn)

    def _give_back(self, connection: Connection, now_ms: int) -> None:
        """Always the first statement of its transaction and always a write, so that no other writer comes between it and the rest."""
        due = (SHOWN.c.state == OPEN) & (SHOWN.c.release_ms <= now_ms)
        released = update(SHOWN).where(due).values(state=RELEASED)
        rows = connection.execute(released.returning(SHOWN.c.campaign, SHOWN.c.price, SHOWN.c.expected)).all()
        for campaign, price, expected in _summed(rows):
            back = {"reserved": CAMPAIGNS.c.reserved - price, "expected": CAMPAIGNS.c.expected - expected}
            connection.execute(update(CAMPAIGNS).where(CAMPAIGNS.c.campaign == campaign).values(**back))
        if abs(now_ms - self._wiped_ms) > _WIPE_MS:
            self._wiped_ms = now_ms
            old = (SHOWN.c.state == RELEASED) & (SHOWN.c.release_ms <= now_ms - KEEP_MS)
            connection.execute(delete(SHOWN).where(old))
            marked = SHOWN.c.viewer.is_not(None) & (SHOWN.c.at_ms <= now_ms - DAY_MS)
            connection.execute(update(SHOWN).where(marked).values(viewer=None))


def _set_aside(connection: Connection, showing: Showing) -> bool:
    """Whether the campaign had the money, which now is reserved."""
    c = CAMPAIGNS.c
    has_it = (c.campaign == showing.campaign) & ~c.deleted & (c.spent + c.reserved + showing.price <= c.budget)
    kept = {"reserved": c.reserved + showing.price, "expected": c.expected + showing.expected}
    return connection.execute(update(CAMPAIGNS).where(has_it).values(**kept)).rowcount == 1


def _is_capped(connection: Connection, showing: Showing, mark: bytes, now_ms: int) -> bool:
    """Whether the user has seen as many of the campaign's ads as one may in a day."""
    if showing.max_per_day is None:
        return False
    mine = (SHOWN.c.viewer == mark) & (SHOWN.c.campaign == showing.campaign) & (SHOWN.c.at_ms > now_ms - DAY_MS)
    seen = connection.scalar(select(func.count()).select_from(SHOWN).where(mine))
    return int(seen or 0) >= showing.max_per_day


def _charge(connection: Connection, request_id: str, slot: int, now_ms: int) -> Charge:
    c = CAMPAIGNS.c
    this = (SHOWN.c.request_id == request_id) & (SHOWN.c.slot == slot)
    settled = update(SHOWN).where(this, SHOWN.c.state == OPEN)
    settled = settled.values(state=CHARGED, charged=SHOWN.c.price, clicked_ms=now_ms)
    for open_row in connection.execute(settled.returning(SHOWN)).all():
        moved = {
            "reserved": c.reserved - open_row.price,
            "expected": c.expected - open_row.expected,
            "spent": c.spent + open_row.price,
        }
        if open_row.registered:
            connection.execute(update(CAMPAIGNS).where(c.campaign == open_row.campaign).values(**moved))
        return _told(open_row, open_row.price, repeated=False, late=False)
    row = connection.execute(select(SHOWN).where(this)).first()
    if row is None:
        raise DataError(
            f"no ad is known at slot {slot} of the request {request_id!r:.80}; one that nobody clicked is forgotten after a day"
        )
    if row.state != RELEASED:
        return _told(row, row.charged, repeated=True, late=row.clicked_ms > row.release_ms)
    has_it = (c.campaign == row.campaign) & (c.spent + c.reserved + row.price <= c.budget)
    paid = update(CAMPAIGNS).where(has_it).values(spent=c.spent + row.price)
    is_paid = not row.registered or connection.execute(paid).rowcount == 1
    charged = row.price if is_paid else 0
    late = update(SHOWN).where(this)
    connection.execute(late.values(state=CHARGED if is_paid else UNPAID, charged=charged, clicked_ms=now_ms))
    return _told(row, charged, repeated=False, late=True)


def _told(row: Any, charged: int, *, repeated: bool, late: bool) -> Charge:
    return Charge(
        request_id=row.request_id,
        slot=row.slot,
        campaign=row.campaign,
        item_id=row.item_id,
        price=row.price / MICROS,
        charged=charged / MICROS,
        repeated=repeated,
        late=late,
    )


def _summed(rows: Iterable[Any]) -> list[tuple[str, int, int]]:
    """Price and expected price by campaign."""
    sums: dict[str, tuple[int, int]] = {}
    for campaign, price, expected in rows:
        before = sums.get(campaign, (0, 0))
        sums[campaign] = (before[0] + price, before[1] + expected)
    return [(campaign, price, expected) for campaign, (price, expected) in sorted(sums.items())]


def _shown(request_id: str, showing: Showing, mark: bytes | None, now_ms: int, window_ms: int) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "slot": showing.slot,
        "campaign": showing.campaign,
        "registered": showing.registered,
        "item_id": showing.item,
        "price": showing.price,
        "expected": showing.expected,
        "bid": showing.bid,
        "chance": showing.chance,
        "propensity": showing.propensity,
        "at_ms": now_ms,
        "release_ms": now_ms + window_ms,
        "state": OPEN,
        "charged": 0,
        "viewer": mark if showing.max_per_day is not None else None,
    }


def _row(campaign: Campaign) -> dict[str, Any]:
    return {
        "campaign": campaign.campaign,
        "budget": to_micros(campaign.budget),
        "bid": to_micros(campaign.bid),
        "reserve": to_micros(campaign.reserve),
        "start_ms": None if campaign.start is None else round(campaign.start * 1e3),
        "end_ms": None if campaign.end is None else round(campaign.end * 1e3),
        "items": json.dumps(campaign.items, ensure_ascii=False),
        "pacing": campaign.pacing,
        "max_per_day": campaign.max_per_day,
        "deleted": False,
    }


def _account_of(row: Any) -> Account:
    return Account(campaign=_campaign_of(row._mapping), spent=row.spent, reserved=row.reserved, expected=row.expected)


def _campaign_of(row: Any) -> Campaign:
    return Campaign(
        campaign=row["campaign"],
        budget=row["budget"] / MICROS,
        bid=row["bid"] / MICROS,
        items=tuple(json.loads(row["items"])),
        reserve=row["reserve"] / MICROS,
        start=None if row["start_ms"] is None else row["start_ms"] / 1e3,
        end=None if row["end_ms"] is None else row["end_ms"] / 1e3,
        pacing=row["pacing"],
        max_per_day=row["max_per_day"],
    )


def _ms(now: float | None) -> int:
    return round((time.time() if now is None else now) * 1e3)
