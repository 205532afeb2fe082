"""Roles guessed for the columns of well-known logs, and refused where columns do not decide."""

import polars as pl
import pytest

from shortlist.data.roles import Roles, describe_roles, flag, guess_roles
from shortlist.errors import DataError

EPOCH = 1_600_000_000


def guess(given: Roles | None = None, **columns: object) -> Roles:
    sample = pl.DataFrame({name: [value, value] for name, value in columns.items()})
    return guess_roles(sample.schema, sample, given)


KNOWN_LOGS = {
    "movielens": (
        {"userId": 1, "movieId": 2, "rating": 4.0, "timestamp": EPOCH},
        Roles(user="userId", item="movieId", timestamp="timestamp", labels=("rating",)),
    ),
    "retailrocket": (
        {"timestamp": EPOCH * 1000, "visitorid": 1, "event": "view", "itemid": 3, "transactionid": 5.0},
        Roles(user="visitorid", item="itemid", timestamp="timestamp", action="event", basket="transactionid"),
    ),
    "complete journey": (
        {"household_id": 1, "store_id": 2, "basket_id": 3, "product_id": 4, "quantity": 1, "sales_value": 2.5, "week": 1,
         "transaction_timestamp": "2017-01-01 11:53:26"},
        Roles(user="household_id", item="product_id", timestamp="transaction_timestamp", basket="basket_id", value="sales_value"),
    ),
    "online retail": (
        {"InvoiceNo": "536365", "StockCode": "85123A", "Description": "T-LIGHT HOLDER", "Quantity": 6,
         "InvoiceDate": "12/13/2010 8:26", "UnitPrice": 2.55, "CustomerID": 17850, "Country": "UK"},
        Roles(user="CustomerID", item="StockCode", timestamp="InvoiceDate", basket="InvoiceNo", value="UnitPrice*Quantity"),
    ),
    "cosmetics shop": (
        {"event_time": "2019-10-01 00:00:00 UTC", "event_type": "cart", "product_id": 1, "category_id": 2, "brand": "x",
         "price": 1.5, "user_id": 9, "user_session": "a-b"},
        Roles(user="user_id", item="product_id", timestamp="event_time", action="event_type", value="price"),
    ),
    "amazon reviews": (
        {"reviewerID": "A1", "asin": "B0", "overall": 5.0, "reviewText": "good", "unixReviewTime": EPOCH, "reviewTime": "09 13, 2009"},
        Roles(user="reviewerID", item="asin", timestamp="unixReviewTime", labels=("overall",)),
    ),
    "sessions only": (
        {"session_id": 1, "ts": EPOCH, "item": "a"},
        Roles(user="session_id", item="item", timestamp="ts"),
    ),
    "session beside user": (
        {"session_id": 1, "uid": 5, "track_id": "a", "played_at": "2020-01-01T00:00:00Z"},
        Roles(user="uid", item="track_id", timestamp="played_at"),
    ),
    "ads": (
        {"user": 1, "ad_id": 2, "time": EPOCH, "request_id": 7, "position": 1, "click": 0, "bid": 0.5, "propensity": 0.1},
        Roles(user="user", item="ad_id", timestamp="time", request="request_id", position="position", bid="bid",
              propensity="propensity", labels=("click",)),
    ),
    "search": (
        {"user_id": 1, "product": "a", "date": "2020-01-31", "search_term": "red shoes", "clicked": True},
        Roles(user="user_id", item="product", timestamp="date", query="search_term", labels=("clicked",)),
    ),
    "no times": ({"customer": "ann", "sku": "x1"}, Roles(user="customer", item="sku")),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_LOGS)
def test_known_logs(name: str) -> None:
    columns, expected = KNOWN_LOGS[name]
    assert guess(**columns) == expected


def test_column_order_does_not_matter() -> None:
    columns, expected = KNOWN_LOGS["cosmetics shop"]
    assert guess(**dict(reversed(columns.items()))) == expected


def test_given_fields_win_and_free_the_rest() -> None:
    roles = guess(Roles(user="uid", labels=("stars",)), user_id=1, uid=2, item_id=3, stars=4, rating=5)
    assert roles == Roles(user="uid", item="item_id", labels=("stars",))


def test_empty_text_switches_a_guess_off() -> None:
    assert guess(Roles(basket="", labels=("",)), user_id=1, item_id=3, order_id=4, rating=1) == Roles(
        user="user_id", item="item_id"
    )


def test_user_and_item_cannot_be_switched_off() -> None:
    assert guess(Roles(user="", item=""), user_id=1, item_id=3) == Roles(user="user_id", item="item_id")


def test_a_product_may_be_written_with_spaces() -> None:
    assert guess(Roles(value="price * n"), user_id=1, item_id=3, price=2.0, n=3).value == "price*n"


def test_values_decide_whether_a_column_is_a_time() -> None:
    assert guess(user_id=1, item_id=2, date="blue").timestamp is None
    assert guess(user_id=1, item_id=2, time=12.5).timestamp is None
    assert guess(user_id=1, item_id=2, date="03/04/2021").timestamp == "date"
    assert guess(user_id=1, item_id=2, timestamp="garbled").timestamp == "timestamp"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"artist_id": 1, "album_id": 2, "user_id": 3},
            r"artist_id and album_id could each be the item.*`--item artist_id`",
        ),
        ({"item_id": 1, "colour": "red"}, r"no column looks like the user.*item_id, colour.*`--user COLUMN`"),
        ({"user_id": 1, "colour": "red"}, r"no column looks like the item.*`--item COLUMN`"),
        (
            {"user_id": 1, "item_id": 2, "date": "2020-01-01", "day": "2020-01-01"},
            r"date and day could each be the timestamp",
        ),
    ],
)
def test_unclear_columns_are_refused(columns: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        guess(**columns)


def test_a_named_column_must_exist() -> None:
    with pytest.raises(DataError, match=r"no column 'customer' for user; the log has user_id, item_id.*`--user`"):
        guess(Roles(user="customer"), user_id=1, item_id=2)
    with pytest.raises(DataError, match=r"'pieces' for value"):
        guess(Roles(value="price*pieces"), user_id=1, item_id=2, price=2.0)


def test_words_say_what_was_guessed_and_how_to_correct_it() -> None:
    given = Roles(item="sku")
    words = describe_roles(guess(given, customer="a", sku="b", rating=3.0), given)
    assert words[0] == "user = customer (guessed; `--user COLUMN` corrects it)"
    assert words[1] == "item = sku (given)"
    assert words[2] == "label = rating (guessed; `--label COLUMN` corrects it)"
    assert "no column for timestamp" in words[3]
    assert flag("labels") == "--label"
