"""MovieLens 100K, 1M and latest-small: from the files as GroupLens publishes them, or the same as Parquet.

All three give items(item_id, title, release_year, genres) and a label column `rating`. Terms of use: research, see the README of each set;
latest-small may be redistributed under its own conditions.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from shortlist.data.datasets._files import find, named, only, read_exactly
from shortlist.data.log import EventLog
from shortlist.data.tables import load_table

_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_NO_GENRES = "(no genres listed)"


def load_100k(root: Path | None) -> EventLog:
    """100,000 ratings of 943 users on 1,682 movies, real times; users(user_id, age, gender, occupation, zip_code)."""
    path = find(root, "ml-100k")
    roles = only(user="user_id", item="item_id", timestamp="timestamp", labels=("rating",))
    if path.suffix == ".parquet":
        events, items, users = (
            pl.read_parquet(path.with_name(f"{name}.parquet")) for name in ("inter", "item", "user")
        )
        items = items.select(
            "item_id",
            title="movie_title",
            release_year=pl.col("release_year").cast(pl.Int64, strict=False),
            genres=pl.col("class").str.split(" "),
        )
        return named(read_exactly(events, items, users, roles), "ml-100k")
    events = load_table(path).frame
    columns = ["item_id", "title", "released", "video_released", "url", *_GENRES_100K]
    flags = load_table(path.with_name("u.item"), separator="|", encoding="latin-1").frame.rename(_numbered(columns))
    listed = pl.concat_list(pl.when(pl.col(genre) == 1).then(pl.lit(genre)) for genre in _GENRES_100K).list.drop_nulls()
    items = _titled(flags.select("item_id", "title", genres=listed))
    users = load_table(path.with_name("u.user"), separator="|").frame
    users = users.rename(_numbered(["user_id", "age", "gender", "occupation", "zip_code"]))
    return named(read_exactly(events, items, users, roles), "ml-100k")


def load_1m(root: Path | None) -> EventLog:
    """1,000,209 ratings of 6,040 users on 3,706 movies; users(user_id, gender, age, occupation, zip_code).

    `ratings.dat` has a time for every rating. The Parquet form has the exact order of every user and no clock: its ratings and
    times are known for 610,206 events only, and a missing time means a low rating there. So no time is read from it, the order
    is (`time_unit` "order"), and `rating` and `rating_le3` are labels that are null where they are not known.
    """
    path = find(root, "ml-1m")
    if path.suffix == ".parquet":
        events = pl.read_parquet(path).sort("user_id", "pos", maintain_order=True)
        events = events.select("user_id", "pos", "rating", "rating_le3", item_id="movie_id")
        movies = pl.read_parquet(path.with_name("movies.parquet")).rename({"movie_id": "item_id"})
        items = _titled(_split_genres(movies))
        users = pl.read_parquet(path.with_name("users.parquet"))
        roles = only(user="user_id", item="item_id", timestamp="pos", labels=("rating", "rating_le3"))
        num_known = events.height - events["rating"].null_count()
        note = f"order of every user without clock times; ratings are known for {num_known:,} events, low and late ones are missing."
        return named(read_exactly(events, items, users, roles), "ml-1m", note)
    movies = load_table(path.with_name("movies.dat"), separator="::", encoding="latin-1").frame
    items = _titled(_split_genres(movies.rename(_numbered(["item_id", "title", "genres"]))))
    users = load_table(path.with_name("users.dat"), separator="::").frame
    users = users.rename(_numbered(["user_id", "gender", "age", "occupation", "zip_code"]))
    roles = only(user="user_id", item="item_id", timestamp="timestamp", labels=("rating",))
    return named(read_exactly(load_table(path, separator="::").frame, items, users, roles), "ml-1m")


def load_latest_small(root: Path | None) -> EventLog:
    """100,836 ratings (0.5 to 5) of 610 users on 9,724 of 9,742 movies, real times; no users table."""
    path = find(root, "ml-latest-small")
    movies = load_table(path.with_name(f"movies{path.suffix}")).frame
    items = _titled(_split_genres(movies.rename({"movieId": "item_id"})))
    roles = only(user="userId", item="movieId", timestamp="timestamp", labels=("rating",))
    return named(read_exactly(load_table(path).frame, items, None, roles), "ml-latest-small")


def _numbered(names: list[str]) -> dict[str, str]:
    return {f"column_{number}": name for number, name in enumerate(names, start=1)}


def _split_genres(movies: pl.DataFrame) -> pl.DataFrame:
    genres = pl.when(pl.col("genres") == _NO_GENRES).then(pl.lit("")).otherwise("genres").str.split("|")
    return movies.with_columns(genres=genres.list.filter(pl.element() != ""))


def _titled(movies: pl.DataFrame) -> pl.DataFrame:
    """Cut "(1995)" off the title into release_year; null where there is none."""
    title = pl.col("title").str.strip_chars()
    year = r"\s*\((\d{4})\)$"
    return movies.select(
        "item_id",
        title=title.str.replace(year, ""),
        release_year=title.str.extract(year).cast(pl.Int64),
        genres="genres",
    )
