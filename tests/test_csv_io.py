"""Reading CSV in blocks: every value as the csv module reads it, and every fault with its line."""

import bz2
import csv
import gzip
import io
import lzma
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from preprocess import csv_io
from preprocess.csv_io import NULL_INT, NULL_TIME, Column
from widedeep.errors import InputError

COLUMNS = (
    Column("id"),
    Column("big", nullable=True, high=2**53),
    Column("score", "float", low=-10, high=10),
    Column("place", "string", nullable=True),
    Column("at", "time", nullable=True),
)
HEADER = "id,ignored,big,score,place,at\n"


def write(tmp_path, text: str | bytes, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_file(write_table):
    """The bytes of a small table as other programs write it."""
    file = io.BytesIO()
    write_table(pa.table({"id": [1]}), file)
    return file.getvalue()


def read(path, columns=COLUMNS, block_bytes=1 << 20):
    """The whole file: {name: list}; strings as text or None."""
    parts = [csv_io.read_block(block, columns) for block in csv_io.blocks(path, columns, block_bytes)]
    result = {}
    for column in columns:
        pieces = [part[column.name] for part in parts]
        if column.kind == "string":
            codes, values = csv_io.unify(pieces)
            assert codes.dtype == np.int32
            result[column.name] = [None if c < 0 else values[int(c)].as_py() for c in codes]
        else:
            assert all(p.dtype == column.dtype for p in pieces)
            result[column.name] = np.concatenate(pieces).tolist() if pieces else []
    return result


@pytest.fixture(scope="module")
def table():
    """500 rows as text fields, with nulls of both kinds, quoted fields and non-ASCII text."""
    rng = random.Random(7)
    rows = []
    for _ in range(500):
        place = rng.choice(["US>CA>803", "GB", "", "\\N", "São Paulo, BR", 'a "b"', "日本"])
        big = rng.choice(["", "\\N", str(rng.randrange(2**53))])
        at = rng.choice(["", "\\N", "2016-06-14 03:59:59", "0001-01-01 00:00:00", "9999-12-31 23:59:59"])
        rows.append([str(rng.randrange(2**31 - 1)), rng.choice(["x", ""]), big, f"{rng.uniform(-9, 9):.6f}", place, at])
    return rows


def as_text(rows, newline="\n"):
    lines = [HEADER.strip()]
    for row in rows:
        lines.append(",".join('"' + f.replace('"', '""') + '"' if "," in f or '"' in f else f for f in row))
    return newline.join(lines) + newline


def expected(rows):
    times = {"2016-06-14 03:59:59": 1465876799000, "0001-01-01 00:00:00": -62135596800000,
             "9999-12-31 23:59:59": 253402300799000}  # fmt: skip
    return {
        "id": [int(r[0]) for r in rows],
        "big": [NULL_INT if r[2] in ("", "\\N") else int(r[2]) for r in rows],
        "score": [float(r[3]) for r in rows],
        "place": [None if r[4] in ("", "\\N") else r[4] for r in rows],
        "at": [times.get(r[5], NULL_TIME) for r in rows],
    }


@pytest.mark.parametrize("block_bytes", [1, 37, 1000, 1 << 20])
def test_blocks_of_any_size_give_the_same_values(table, block_bytes, tmp_path):
    path = write(tmp_path, as_text(table))
    assert [r for r in csv.reader(path.open())][1] == table[0]
    assert read(path, block_bytes=block_bytes) == expected(table)


@pytest.mark.parametrize("form", ["crlf", "bom", "no last newline", "blank lines", "gz", "zst"])
def test_forms_of_a_file_give_the_same_values(table, form, tmp_path):
    text = as_text(table)
    data = {
        "crlf": as_text(table, "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "no last newline": text[:-1].encode(),
        "blank lines": text.replace("\n", "\n\n").encode(),
        "gz": gzip.compress(text.encode()),
        "zst": pa.compress(text.encode(), "zstd", asbytes=True),
    }[form]
    path = write(tmp_path, data, f"t.csv.{form}" if form in ("gz", "zst") else "t.csv")
    assert csv_io.find(tmp_path, "t") == path
    assert read(path, block_bytes=1000) == expected(table)


def test_columns_may_stand_in_any_order(tmp_path):
    path = write(tmp_path, "b,a\n1,2\n3,4\n")
    assert read(path, (Column("a"), Column("b"))) == {"a": [2, 4], "b": [1, 3]}


def test_a_header_alone_is_no_rows(tmp_path):
    assert read(write(tmp_path, HEADER)) == {c.name: [] for c in COLUMNS}


GOOD = "1,x,2,0.5,GB,2016-01-01 00:00:00"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,x,2,0.5,GB", "expected 6 fields, found 5"),
        (GOOD.replace(",", "\t"), r"expected 6 fields, found 1; its delimiter may be '\t'"),
        (GOOD + ",more", "expected 6 fields, found 7"),
        (GOOD.replace("1,x", "one,x", 1), "column id: expected an integer, found 'one'"),
        (GOOD.replace("1,x", "1.0,x", 1), "column id: expected an integer, found '1.0'"),
        (GOOD.replace("1,x", ",x", 1), "column id: expected an integer, found no value"),
        (GOOD.replace("1,x", "\\N,x", 1), "column id: expected an integer, found no value"),
        (GOOD.replace("1,x", "-1,x", 1), "column id: expected an integer from 0 to 2147483646, found '-1'"),
        (GOOD.replace("1,x", "2147483647,x", 1), "column id: expected an integer from 0 to 2147483646"),
        (GOOD.replace("1,x", "9" * 30 + ",x", 1), "column id: expected an integer from 0"),
        (GOOD.replace("x,2", "x, "), "column big: expected an integer, found ' '"),
        (GOOD.replace("0.5", "11"), "column score: expected a number from -10 to 10, found '11'"),
        (GOOD.replace("0.5", "nan"), "column score: expected a number from -10 to 10, found 'nan'"),
        (GOOD.replace("0.5", "half"), "column score: expected a number, found 'half'"),
        (
            GOOD.replace("2016-01-01 00:00:00", "yesterday"),
            "column at: expected YYYY-MM-DD HH:MM:SS, found 'yesterday'",
        ),
        (GOOD.replace("2016-01-01", "2016-13-01"), "column at: expected YYYY-MM-DD HH:MM:SS"),
        (GOOD.replace("GB", "G\udcff"), "expected UTF-8 text"),
    ],
)
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_row_is_named_by_file_and_line(row, message, block_bytes, compress, tmp_path):
    lines = [HEADER.strip(), *[GOOD] * 40, row, *[GOOD] * 3]
    data = "\n".join(lines).encode("utf-8", "surrogateescape")
    path = write(tmp_path, gzip.compress(data), "t.csv.gz") if compress else write(tmp_path, data)
    with pytest.raises(InputError) as error:
        read(path, block_bytes=block_bytes)
    assert str(error.value).startswith(f"{path}, line 42: ")
    assert message in str(error.value)


def test_numbers_with_blanks_are_not_blamed_for_another_line(tmp_path):
    blanks = " 1 ,x,\t2,0.5 ,GB,2016-01-01 00:00:00"
    path = write(tmp_path, HEADER + f"{blanks}\n")
    assert [read(path)[name] for name in ("id", "big", "score")] == [[1], [2], [0.5]]
    path = write(tmp_path, HEADER + f"{blanks}\n{GOOD.replace('1,x', 'one,x', 1)}\n")
    with pytest.raises(InputError, match="line 3: column id: expected an integer, found 'one'"):
        read(path)


@pytest.mark.parametrize("row", ['2,"GB', '"2,GB', '2,"GB\n3",US'])
def test_an_unclosed_quote_swallows_no_line(row, tmp_path):
    path = write(tmp_path, f"id,place\n1,GB\n{row}\n3,US\n4,US\n")
    with pytest.raises(
        InputError, match=r"t\.csv, line 3: expected 2 fields, found an open quote; a quoted field that spans lines"
    ):
        read(path, (Column("id"), Column("place", "string")))


@pytest.mark.parametrize("block_bytes", [9, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", "\r"])
@pytest.mark.parametrize("field", ['"', '"US', '"US""', 'US,"', '"a","b'])
def test_a_last_line_cut_off_in_a_quoted_field_is_named(field, end, block_bytes, tmp_path):
    path = write(tmp_path, f"id,place,free\n1,GB,x\n2,{field}{end}")
    with pytest.raises(InputError, match=r"t\.csv, line 3: expected 3 fields, found an open quote"):
        read(path, (Column("id"),), block_bytes)


@pytest.mark.parametrize(("field", "value"), [('6" pipe', '6" pipe'), ('"6"" pipe"', '6" pipe'), ('"6"x"', '6x"')])
@pytest.mark.parametrize("block_bytes", [9, 1 << 20])
def test_quotes_that_open_no_field_are_text(field, value, block_bytes, tmp_path):
    path = write(tmp_path, f"id,place\n1,{field}\n2,{field}\n")
    got = read(path, (Column("id"), Column("place", "string")), block_bytes)
    assert got == {"id": [1, 2], "place": [value] * 2}
    wrong = write(tmp_path, f"id,place\n1,{field}\nx,{field}\n", "wrong.csv")
    with pytest.raises(InputError, match="line 3: column id: expected an integer, found 'x'"):
        read(wrong, (Column("id"), Column("place", "string")), block_bytes)
    long = write(tmp_path, f'id,place\n1,"{"x" * 200_000}"\n')
    assert len(read(long, (Column("id"), Column("place", "string")))["place"][0]) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n", "the first line is empty, expected a header line with "),
        ("  \r\n" + HEADER, "the first line is empty"),
        (
            "id,ignored,big,score,place\n",
            "column at is missing; the header has 'id', 'ignored', 'big', 'score', 'place'$",
        ),
        (HEADER.replace("at", " at"), "column at is missing; the header has .* ' at'"),
        (HEADER.replace("ignored", "id"), "line 1: column id is there twice"),
        (b"\xff\xfe" + HEADER.encode(), "line 1: expected a header line in UTF-8"),
        (HEADER.encode().rstrip() + b"\r1,2\r", "line 1: expected lines that end in a line feed"),
        (
            GOOD,
            "column id is missing; .* '2016-01-01 .*'; it looks like a row: .* the columns in metadata.csv.columns$",
        ),
        (
            gzip.compress(HEADER.encode(), mtime=0),
            r"t\.csv: expected text, found gzip, for which its name ends in \.gz$",
        ),
        (pa.compress(HEADER.encode(), "zstd", asbytes=True), "found zstd, for which its name ends in .zst$"),
        (bz2.compress(HEADER.encode()), "found bzip2; compressed text is read from .gz and .zst$"),
        (lzma.compress(HEADER.encode()), "found xz; "),
        (as_file(pq.write_table), "found Parquet, for which its name ends in .parquet$"),
        (as_file(feather.write_feather), "found Arrow, "),
        (b"PK\3\4" + bytes(20), "found a zip archive; "),
    ],
)
def test_a_bad_header_is_named(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, text))


@pytest.mark.parametrize("name", ["PAR1", "ARROW1", "BZh", "BZh1"])
@pytest.mark.parametrize(("delimiter", "end"), [(",", ",click\n"), (",", "\n"), (",", "\r\n"), ("\t", "\tclick\n")])
def test_a_column_may_be_called_what_other_files_begin_with(name, delimiter, end, tmp_path):
    path = write(tmp_path, name + end)
    assert csv_io.read_header(path, csv_io.Format(delimiter))[0] == name


def test_a_missing_file_is_named(tmp_path):
    assert csv_io.find(tmp_path, "t") is None
    with pytest.raises(InputError, match=r"t\.csv: cannot be read"):
        read(tmp_path / "t.csv")


def test_a_truncated_gz_file_is_an_error(table, tmp_path):
    data = gzip.compress(as_text(table).encode())
    with pytest.raises(InputError, match=r"t\.csv\.gz"):
        read(write(tmp_path, data[: len(data) // 2], "t.csv.gz"))


def test_a_file_that_shrinks_while_it_is_read_is_named(table, tmp_path):
    path = write(tmp_path, as_text(table))
    blocks = list(csv_io.blocks(path, COLUMNS, 1000))
    path.write_text(as_text(table[:-1]))
    assert len(csv_io.read_block(blocks[0], COLUMNS)["id"])
    with pytest.raises(InputError, match=r"t\.csv: changed while it was read"):
        csv_io.read_block(blocks[-1], COLUMNS)


def test_line_of_counts_blank_lines(tmp_path):
    path = write(tmp_path, "a\n1\n\n2\n3\n")
    assert [csv_io.line_of(path, row) for row in range(3)] == [2, 4, 5]


PIECES = [
    ",",
    "\n",
    "\r",
    '"',
    "\\N",
    "\0",
    "\udcff",
    "-",
    "9" * 25,
    "nan",
    " ",
    "1e5",
    "\u0661",
    "2016-02-30 00:00:00",
]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n", "\r\r\n"])
def test_lines_are_counted_as_they_are_parsed(tmp_path, end):
    """A carriage return ends a line, alone or before a line feed."""
    path = write(tmp_path, (HEADER + GOOD + end + GOOD + "\n" + GOOD + ",9\n").encode())
    blank = end == "\r\r\n"
    for block_bytes in (40, 1 << 20):
        with pytest.raises(InputError, match=rf"line {4 + blank}: expected 6 fields, found 7"):
            read(path, block_bytes=block_bytes)
    assert csv_io.line_of(path, 2) == 4 + blank


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 150), st.sampled_from(PIECES), st.integers(0, 6)), max_size=4))
def test_any_damage_gives_values_or_a_line(edits, tmp_path):
    """Whatever is written over a good file: either it still reads, the same in any blocks, or the line is named."""
    text = HEADER + (GOOD + "\n") * 4
    for at, piece, removed in edits:
        text = text[:at] + piece + text[at + removed :]
    path = write(tmp_path, text.encode("utf-8", "surrogateescape"))
    outcomes = []
    for block_bytes in (40, 1 << 20):
        try:
            outcomes.append(read(path, block_bytes=block_bytes))
        except InputError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert isinstance(outcomes[0], dict) or re.search(r", line \d+: |the (file|first line) is empty", outcomes[0])


def test_arrays_that_begin_inside_their_buffers():
    values = [None if i % 3 == 1 else i for i in range(40)]
    for start in (0, 1, 7, 8, 9):
        got = csv_io._filled(pa.array(values, pa.int64()).slice(start, 20), np.int64, -5)
        assert got.tolist() == [-5 if v is None else v for v in values[start : start + 20]]
    whole = csv_io.unify(
        [pa.array(["x", None, "y", "x"]).dictionary_encode().slice(1), pa.array(["z"]).dictionary_encode()]
    )
    assert [None if code < 0 else whole.values[code].as_py() for code in whole.codes] == [None, "y", "x", "z"]


def test_a_line_end_cut_by_two_reads_is_one(tmp_path):
    """Lines before a block are counted in reads of 16 MiB."""
    first = b"id\r\n"
    data = first + b"1" * (2**24 - 1 - len(first)) + b"\r\n2\r\n3\r\n"
    assert data[2**24 - 1 : 2**24 + 1] == b"\r\n"
    path = write(tmp_path, data)
    assert csv_io._lines_before(csv_io.Block(path, ("id",), len(data) - 3, len(data))) == 3
    assert csv_io._lines_before(csv_io.Block(path, ("id",), 4, len(data))) == 1


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("block_bytes", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_each_row_of_a_file_without_a_header_is_read_once(mark, block_bytes, name, tmp_path):
    """The first line is a row, behind a byte order mark perhaps."""
    text = mark + "".join(f"{i};{i % 7}\n" for i in range(300)).encode()
    path = write(tmp_path, gzip.compress(text) if name.endswith(".gz") else text, name)
    columns, form = (Column("a"), Column("b")), csv_io.Format(";", ("a", "b"))
    blocks = list(csv_io.blocks(path, columns, block_bytes, form))
    assert sum(block.stop - block.start for block in blocks) == len(text) - len(mark)
    parts = [csv_io.read_block(block, columns) for block in blocks]
    assert np.concatenate([part["a"] for part in parts]).tolist() == list(range(300))
    assert np.concatenate([part["b"] for part in parts]).tolist() == [i % 7 for i in range(300)]
