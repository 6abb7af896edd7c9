"""The manifest of a shard set: the bytes that it describes, and what is refused although it is sealed or not."""

import json

import numpy as np
import pytest
import xxhash
from test_shards import make_rows, make_spec, write

from widedeep import shards
from widedeep.errors import InputError
from widedeep.shard_manifest import seal


@pytest.fixture
def place(tmp_path):
    spec = make_spec(hotness=[1, 2])
    return write(tmp_path / "set", spec, make_rows(spec, 150))


def change(place, edit, sealed=True):
    path = place / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(seal(manifest) if sealed else json.dumps(manifest))


def test_a_manifest_that_is_not_sealed_is_refused(place):
    change(place, lambda m: m.pop("xxh3_64"), sealed=False)
    with pytest.raises(
        InputError, match=r"manifest.json: damaged or edited: its xxh3-64 is [0-9a-f]{16}, it says None"
    ):
        shards.ShardSet.open(place)


def block(m, part=0, name="c1"):
    return m["parts"][part]["blocks"][name]


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: block(m).update(offset=m["parts"][0]["bytes"]),  # behind the file's end
        lambda m: block(m).update(offset=m["parts"][0]["bytes"] - 64),  # of which only its beginning is in the file
        lambda m: block(m).update(offset=1),
        lambda m: block(m).update(bytes=block(m)["bytes"] - 2),
        lambda m: block(m).update(xxh3_64=7),
        lambda m: m.update(rows=149),
        lambda m: m.update(rows=151),
        lambda m: m["parts"][1].update(rows=51),
        lambda m: m["parts"][0].update(rows=True),
        lambda m: m["parts"][0].update(file="../set/part-00000.shard"),
        lambda m: m["parts"][0]["blocks"].update(more=block(m)),
        lambda m: m["columns"].append(m["columns"][0]),
        lambda m: m["columns"][0].update(cardinality=2**31),
        lambda m: m["columns"][0].update(cardinality=-1),
        lambda m: m["columns"][1].update(hotness=0),
        lambda m: m["columns"][0].update(dtype="int8"),
        lambda m: m["columns"][0].update(kind="numeric"),
    ],
)
def test_a_sealed_manifest_may_still_be_wrong(place, edit):
    shards.ShardSet.open(place, verify=True)
    change(place, edit)
    with pytest.raises(InputError, match=r"manifest.json: its row counts, blocks and columns do not agree$"):
        shards.ShardSet.open(place)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("rows", [63, 64, 65, 128])
def test_columns_stand_one_after_the_other_padded_to_64_bytes(tmp_path, rows, threads):
    """The checksum of a column covers its padding, of which there is none where it ends at a multiple of 64."""
    spec = make_spec([200, 40_000])
    data = make_rows(spec, rows)
    opened = shards.ShardSet.open(write(tmp_path / "set", spec, data, rows_per_shard=rows, pieces=3, threads=threads))
    stored = {"c0": "<u1", "c1": "<u2", "price": "<f4", "clicked": "<u1", "display_id": "<i8"}
    whole, blocks = b"", {}
    for name, kind in stored.items():
        column = data[name].astype(kind).tobytes()  # -1 becomes the type's maximum
        column += bytes(-len(column) % 64)
        size = rows * np.dtype(kind).itemsize
        blocks[name] = {"offset": len(whole), "bytes": size, "xxh3_64": xxhash.xxh3_64_hexdigest(column)}
        whole += column
    assert (tmp_path / "set" / "part-00000.shard").read_bytes() == whole
    assert opened.manifest["parts"] == [
        {"file": "part-00000.shard", "rows": rows, "bytes": len(whole), "blocks": blocks}
    ]
