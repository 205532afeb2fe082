"""Tables from files: well formed ones equal Python's csv module, damaged lines are named."""

import csv
import gzip
import io
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist.data.tables import load_table
from shortlist.errors import DataError

cell = st.text(alphabet="ab ,;\"\n'7é", min_size=1, max_size=6).filter(lambda text: text.strip() and "\r" not in text)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=8), separator=st.sampled_from(",;\t|"))
def test_agrees_with_the_csv_module(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], separator: str
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("x", "y", "z"), *rows])
    path = write(tmp_path_factory.mktemp("csv") / "t.csv", buffer.getvalue())
    table = load_table(path, separator=separator)
    assert table.bad.height == 0
    assert [tuple(str(value) for value in row) for row in table.frame.rows()] == rows


def test_ragged_and_blank_lines_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'a,b,c\n1,2,3\n\n1,2\n4,"x,y",6\n1,2,3,4\n7,"long\nstory",9\n10,11,12\r\n')
    table = load_table(path)
    assert table.frame.rows() == [(1, "2", 3), (4, "x,y", 6), (7, "long\nstory", 9), (10, "11", 12)]
    assert table.lines.to_list() == [2, 5, 7, 9]
    assert table.bad.rows() == [(4, "wrong number of fields", "1,2"), (6, "wrong number of fields", "1,2,3,4")]


def test_a_quote_that_never_closes_costs_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'a,b\n"1","2"\n"3,4\n5,6\n7,8\n')
    table = load_table(path)
    assert table.frame.rows() == [(1, 2), (5, 6), (7, 8)]
    assert table.bad.rows() == [(3, "quote not closed", '"3,4')]


def test_inches_are_no_quotes(tmp_path: Path) -> None:
    table = load_table(write(tmp_path / "t.csv", 'id,title\n1,pipe 5"\n2,pipe 6"\n3,rod\n'))
    assert table.frame["title"].to_list() == ['pipe 5"', 'pipe 6"', "rod"]
    assert table.bad.height == 0


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "\x01", " ", "::"])
def test_separator_is_found(tmp_path: Path, separator: str) -> None:
    lines = [separator.join(row) for row in (("user", "item", "note"), ("u1", "5", "x.y"), ("u2", "6", "z"))]
    table = load_table(write(tmp_path / "t.txt", "\n".join(lines)))
    assert table.frame.rows() == [("u1", 5, "x.y"), ("u2", 6, "z")]


def test_compressed_file_and_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffuser,item\n1,2\n3\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    table = load_table(tmp_path / "t.csv.gz")
    assert table.frame.columns == ["user", "item"]
    assert table.bad["line"].to_list() == [3]


def test_other_encodings_keep_ids_apart(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("item,title\n1,café\n2,thé\n".encode("latin-1"))
    table = load_table(tmp_path / "t.csv")
    assert table.frame["title"].to_list() == ["café", "thé"]
    assert "not UTF-8" in table.notes[0]


def test_types_never_change_an_id(tmp_path: Path) -> None:
    rows = "a,b,c,d,e,f,g\n007,12,1.5,true,18446744073709551615,NA,-\n8,-3,2,False,1,4,5\n"
    frame = load_table(write(tmp_path / "t.csv", rows)).frame
    assert frame.row(0) == ("007", 12, 1.5, True, "18446744073709551615", None, None)
    assert frame.row(1) == ("8", -3, 2.0, False, "1", 4, 5)


def test_decimal_commas(tmp_path: Path) -> None:
    path = tmp_path / "preise.csv"
    path.write_text("id;preis;menge;liste;nummer\n1;3,50;1,500;1,2,3;7\n2;-12;2,000;4;8\n3;0,99;3;5,6;9\n4;;4;7;10\n")
    table = load_table(path)
    assert table.frame["preis"].to_list() == [3.5, -12.0, 0.99, None]
    assert table.frame["menge"].to_list() == ["1,500", "2,000", "3", "4"]  # thousands or decimals: not for us to say
    assert table.frame["liste"].to_list() == ["1,2,3", "4", "5,6", "7"]
    assert table.frame["nummer"].to_list() == [7, 8, 9, 10]
    assert table.notes == ("commas in preis were read as decimal points.",)


def test_headerless_movielens_layout_is_named(tmp_path: Path) -> None:
    table = load_table(write(tmp_path / "u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n"))
    assert table.frame.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert table.lines.to_list() == [1, 2]
    other = load_table(write(tmp_path / "x.csv", "1,2\n3,4\n"))
    assert other.frame.columns == ["column_1", "column_2"]
    assert "no header" in other.notes[0]


def test_row_index_is_left_out(tmp_path: Path) -> None:
    table = load_table(write(tmp_path / "t.csv", ",user,item\n0,1,2\n1,3,4\n"))
    assert table.frame.columns == ["user", "item"]


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"user": i, "item": f"i{i}"}) for i in range(5)]
    lines[2:2] = ["", '{"user": 1, "item":', "[1, 2]"]
    table = load_table(write(tmp_path / "t.jsonl", "\n".join(lines)))
    assert table.frame["user"].to_list() == [0, 1, 2, 3, 4]
    assert table.lines.to_list() == [1, 2, 6, 7, 8]
    assert table.bad.select("line", "reason").rows() == [(4, "not a JSON object"), (5, "not a JSON object")]
    array = load_table(write(tmp_path / "t.json", '[{"user": 1}, {"user": 2}]'))
    assert array.frame.rows() == [(1,), (2,)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "no such file"),
        ("empty.csv", b" \n", "empty"),
        ("t.csv", b"PK\0\1", "not a text table"),
        ("t.parquet", b"not parquet", "not readable"),
        ("t.csv.gz", b"not gzip", "not readable"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load_table(tmp_path / name)


def test_other_objects_are_refused() -> None:
    with pytest.raises(DataError, match=r"builtins\.dict"):
        load_table({"user": [1]})


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    for part in range(2):
        pl.DataFrame({"user": [part], "item": [5]}).write_parquet(tmp_path / f"part-{part}.parquet")
    assert load_table(tmp_path).frame["user"].to_list() == [0, 1]
