"""Which column plays which part: guessed from names, types and a sample of values, shown in words, corrected by flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from shortlist.data.times import looks_like_time
from shortlist.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Source column of each role; None where the log has none. An empty string, given explicitly, means "none, do not guess"."""

    user: str | None = None
    """Who acted."""
    item: str | None = None
    """What was acted on."""
    timestamp: str | None = None
    """When."""
    action: str | None = None
    """What kind of event: view, click, buy ..."""
    request: str | None = None
    """Which page view or request the event belongs to."""
    basket: str | None = None
    """What was bought or done together; a (user, basket) is one group."""
    position: str | None = None
    """Place on the page at which the item was shown."""
    value: str | None = None
    """What the event was worth: a column, or a product of two, written "price*quantity"."""
    bid: str | None = None
    """What the advertiser offered."""
    query: str | None = None
    """What the user typed."""
    propensity: str | None = None
    """Probability with which the logging policy showed the item."""
    labels: tuple[str, ...] = ()
    """Columns that say how the event turned out: rating, click, purchase ..."""

    def columns(self) -> set[str]:
        """Every source column that has a role other than label; both factors of a value product count."""
        names = {name for field in SINGLE_ROLES if (name := getattr(self, field))}
        if self.value is not None and "*" in self.value:
            names.discard(self.value)
        return names


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SINGLE_ROLES = tuple(field.name for field in dataclasses.fields(Roles) if field.name != "labels")

_USER_STEMS = _words(
    "customer client visitor member household account reviewer buyer shopper person profile player subscriber consumer "
    "guest cust fullvisitor anonymoususer student reader viewer listener panelist"
)
_DEVICE_STEMS = ("cookie", "device", "browser")
_ITEM_STEMS = _words(
    "product movie article sku asin track song video news book business ad creative listing offer game app anime recipe poi "
    "venue hotel course job show photo post pin goods content document doc stock isbn film restaurant gmap"
)
_LATE_ITEM_STEMS = _words("parentasin artist album ean upc gtin program playlist brand")
_ID_FORMS = ("id", "", "no", "number", "key", "code", "ids", "num", "idx", "index")

# Per role: tiers of normalised names, best first. Two columns in the best tier are a draw.
_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "timestamp": (
        ("timestamp", "ts", "eventtime", "eventtimestamp"),
        ("time", "datetime", "unixtime", "unixtimestamp", "unixreviewtime", "timems", "timestampms", "epoch", "clicktime"),
        ("createdat", "occurredat", "createtime", "transactiontimestamp", "interactiontime", "purchasetime", "watchedat",
         "playedat", "viewtime", "created", "timemillis", "servertime", "eventtimems"),
        ("date", "day", "eventdate", "invoicedate", "purchasedate", "transactiondate", "orderdate", "tdat", "reviewtime",
         "clickdate", "saledate", "visitdate", "reviewdate", "createddate"),
    ),
    "action": (
        ("action", "eventtype", "behaviortype", "behaviourtype", "actiontype", "interactiontype", "eventname"),
        ("event", "behavior", "behaviour", "interaction", "activity", "activitytype", "feedbacktype"),
        ("type",),
    ),
    "request": (("requestid", "impressionid", "searchid", "pageviewid", "slateid", "listid", "auctionid", "servedid"), ("request",)),
    "basket": (
        ("basketid", "basket"),
        ("orderid", "invoiceno", "invoice", "invoiceid", "transactionid", "cartid", "receiptid", "ordernumber", "invoicenumber"),
        ("transaction", "order", "cart", "receipt", "checkoutid"),
    ),
    "position": (("position", "displayposition", "itemposition", "adposition"), ("rank", "slot", "itemrank")),
    "bid": (("bid", "bidprice", "bidamount", "biddingprice", "cpcbid", "maxbid"),),
    "query": (("query", "searchquery", "querytext", "searchterm", "searchterms", "keywords", "searchtext"), ("keyword", "q", "search")),
    "propensity": (("propensity", "propensityscore", "pscore", "actionprob", "loggingprobability"),),
}  # fmt: skip
_AMOUNTS = _words("value revenue salesvalue amount totalprice totalamount saleamount sales gmv turnover total")
_PRICES = ("price", "unitprice", "itemprice")
_QUANTITIES = ("quantity", "qty", "count", "units")
_LABELS = _words(
    "label rating ratings stars overall click clicks clicked isclick isclicked purchase purchased ispurchase conversion converted "
    "isconversion like liked islike isliked follow share comment favorite installed attributed isattributed longview watchratio watchtime "
    "dwelltime playtime playingtime relevance grade target"
)


def guess_roles(columns: Mapping[str, pl.DataType], sample: pl.DataFrame, given: Roles | None = None) -> Roles:
    """Give each role the column whose name and values fit best; fields of `given` that are set are kept as they are.

    `sample` holds some rows of the same columns. Raises DataError when no column fits user or item, when two fit user, item or
    timestamp equally well, or when a column named in `given` does not exist.
    """
    given = given or Roles()
    if given.value and given.value not in columns:
        given = dataclasses.replace(given, value="*".join(factor.strip() for factor in given.value.split("*")))
    _check_exist(given, columns)
    taken = given.columns() | set(given.labels)
    found: dict[str, str | None] = {}
    for role in ("user", "item", "timestamp", "basket", "request", "query", "bid", "propensity", "position", "action"):
        chosen = getattr(given, role)
        if chosen is None or (not chosen and role in ("user", "item")):  # these two cannot be switched off
            chosen = best_column(role, columns, sample, taken)
        found[role] = chosen or None
        taken |= {chosen} if chosen else set()
    found["value"] = (given.value or None) if given.value is not None else _guess_value(columns, taken)
    taken |= set(found["value"].split("*")) if found["value"] else set()
    labels = tuple(name for name in given.labels if name)
    if not given.labels:
        labels = tuple(name for name, dtype in columns.items() if name not in taken and _is_label(name, dtype))
    return Roles(**found, labels=labels)


def flag(role: str) -> str:
    """The command-line flag that names the column of a role."""
    return "--label" if role == "labels" else f"--{role}"


def describe_roles(roles: Roles, given: Roles | None = None) -> list[str]:
    """One line per role: which column, whether it was guessed or given, and the flag that corrects it."""
    given = given or Roles()
    lines = []
    for role in (*SINGLE_ROLES, "labels"):
        value = getattr(roles, role)
        name = ", ".join(value) if isinstance(value, tuple) else value
        if not name:
            continue
        how = "given" if getattr(given, role) else f"guessed; `{flag(role)} COLUMN` corrects it"
        lines.append(f"{role.removesuffix('s')} = {name} ({how})")
    absent = [role for role in SINGLE_ROLES if getattr(roles, role) is None]
    if absent:
        lines.append(
            f"no column for {', '.join(absent)} (name one with `--ROLE COLUMN`, for instance `{flag(absent[0])} COLUMN`)"
        )
    return lines


def normalised(name: str) -> str:
    """Letters and digits of a column name in lower case: "Unix-Review Time" and "unixReviewTime" are the same."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _check_exist(given: Roles, columns: Mapping[str, pl.DataType]) -> None:
    for role in SINGLE_ROLES:
        name = getattr(given, role)
        factors = name.split("*") if name and role == "value" and name not in columns else [name]
        for factor in factors:
            if factor and factor not in columns:
                raise DataError(
                    f"no column {factor!r} for {role}; the log has {_listed(columns)}: correct `{flag(role)}`."
                )
    for name in given.labels:
        if name and name not in columns:
            raise DataError(
                f"no column {name!r} for a label; the log has {_listed(columns)}: correct `{flag('labels')}`."
            )


def _listed(columns: Mapping[str, pl.DataType]) -> str:
    names = list(columns)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def best_column(role: str, columns: Mapping[str, pl.DataType], sample: pl.DataFrame, taken: set[str]) -> str | None:
    """The column that fits one role best, among those not taken; None where none fits a role that may be absent.

    Raises DataError when none fits user or item, or when two fit user, item or timestamp equally well.
    """
    scored: dict[tuple[int, int], list[str]] = {}
    for name, dtype in columns.items():
        score = _score(role, normalised(name), dtype)
        if score is not None and name not in taken and _fits(role, sample, name, dtype):
            scored.setdefault(score, []).append(name)
    required = role in ("user", "item")
    if not scored:
        if required:
            raise DataError(
                f"no column looks like the {role}; the log has {_listed(columns)}: name it with `{flag(role)} COLUMN`."
            )
        return None
    best = scored[min(scored)]
    if len(best) > 1 and (required or role == "timestamp"):
        raise DataError(f"columns {' and '.join(best)} could each be the {role}: choose with `{flag(role)} {best[0]}`.")
    return best[0]


def _score(role: str, name: str, dtype: pl.DataType) -> tuple[int, int] | None:
    """(tier, form), smaller is better; None when the name does not fit the role."""
    if role == "user":
        return _id_score(name, ("user",), ("u", *_USER_STEMS), _DEVICE_STEMS, ("session",))
    if role == "item":
        return _id_score(name, ("item",), ("i", *_ITEM_STEMS), _LATE_ITEM_STEMS, ())
    for tier, names in enumerate(_NAMES[role]):
        if name in names:
            return tier, 0
    if role == "timestamp" and (dtype.is_temporal() or name.endswith(("timestamp", "datetime"))):
        return len(_NAMES[role]), 0
    return None


def _id_score(name: str, *tiers: tuple[str, ...]) -> tuple[int, int] | None:
    for tier, stems in enumerate(tiers):
        for stem in stems:
            form = name.removeprefix(stem)
            # single letters stand for a role only with "id" behind them: "uid", "iid"
            if name.startswith(stem) and form in _ID_FORMS and (len(stem) > 1 or form == "id"):
                return 2 * tier, _ID_FORMS.index(form)
    if any(name.endswith(f"{stem}id") for stem in (*tiers[0], *tiers[1]) if len(stem) > 2):
        return 3, 0  # "anon_user_id", "clicked_item_id": behind the plain names, before device and session
    return None


def _fits(role: str, sample: pl.DataFrame, name: str, dtype: pl.DataType) -> bool:
    """Whether type and sampled values can play the role."""
    textual = dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum)
    numeric = dtype.is_numeric()
    match role:
        case "user" | "item" | "basket" | "request":
            return textual or dtype.is_integer() or (dtype.is_float() and _is_whole(sample[name]))
        case "timestamp":
            # a column called timestamp is one, even if damaged: reading then says so, instead of going on without times
            named = normalised(name) in _NAMES["timestamp"][0] and (dtype.is_integer() or textual)
            return named or looks_like_time(sample[name])
        case "action":
            return (textual or dtype.is_integer()) and sample[name].n_unique() <= 50
        case "query":
            return textual or dtype.is_integer()
        case _:
            return numeric


def _is_whole(column: pl.Series) -> bool:
    column = column.drop_nulls()
    return len(column) > 0 and bool((column.is_finite() & (column == column.round())).all())


def _guess_value(columns: Mapping[str, pl.DataType], taken: set[str]) -> str | None:
    numeric = {normalised(name): name for name, dtype in columns.items() if dtype.is_numeric() and name not in taken}
    amount = next((numeric[name] for name in _AMOUNTS if name in numeric), None)
    price = next((numeric[name] for name in _PRICES if name in numeric), None)
    quantity = next((numeric[name] for name in _QUANTITIES if name in numeric), None)
    if amount or not price:
        return amount
    return f"{price}*{quantity}" if quantity else price


def _is_label(name: str, dtype: pl.DataType) -> bool:
    return normalised(name) in _LABELS and (dtype.is_numeric() or dtype == pl.Boolean)
