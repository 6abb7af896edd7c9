"""A ShardWriter with threads: the same bytes, the same refusals, the same care for the earlier set."""

import pytest
from test_shards import make_rows, make_spec, write

from widedeep import shards
from widedeep.errors import InputError, RunError


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [0, 99, 100, 1234])
def test_threads_write_the_same_bytes(threads, rows, tmp_path):
    spec = make_spec((300, 70_000), (1, 3))
    data = make_rows(spec, rows)
    one = write(tmp_path / "one", spec, data, pieces=7)
    other = write(tmp_path / "other", spec, data, pieces=7, threads=threads)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("expected", "message"), [(249, "more than the 249 rows"), (251, "250 rows, expected 251"), (0, "the 0 rows")]
)
def test_another_number_of_rows_than_expected_is_refused(threads, expected, message, tmp_path):
    spec = make_spec()
    with pytest.raises(InputError, match=message):
        write(tmp_path / "set", spec, make_rows(spec, 250), pieces=3, threads=threads, rows=expected)
    assert list(tmp_path.iterdir()) == []


def test_threads_need_the_number_of_rows(tmp_path):
    with pytest.raises(ValueError, match="number of rows"):
        shards.ShardWriter(tmp_path / "set", make_spec(), threads=1)


def test_what_fails_in_a_thread_fails_the_writer(tmp_path, monkeypatch):
    spec = make_spec()
    write(tmp_path / "set", spec, make_rows(spec, 250))
    kept = {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()}

    def fail_in_the_third(part, columns, append=shards.Part.append):
        if part.path.name == "part-00002.shard":
            raise RunError("the disk is full")
        append(part, columns)

    monkeypatch.setattr(shards.Part, "append", fail_in_the_third)
    with pytest.raises(RunError, match="disk is full"):
        write(tmp_path / "set", spec, make_rows(spec, 1000, seed=1), pieces=10, threads=2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()} == kept
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
