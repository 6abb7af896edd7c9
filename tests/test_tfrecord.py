"""Records that this file writes itself, byte by byte as the formats say, to shards; damage is named."""

import errno
import os
import struct
from itertools import chain

import numpy as np
import pytest
from commands import main

from preprocess.tfrecord import TFRecordConfig, records, run
from preprocess.tfrecord.crc32c import crc32c, masked
from preprocess.tfrecord.pipeline import NAMES
from widedeep import shard_part
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet


def plain_crc(data):
    """Bit by bit, as the polynomial says."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def varint(value):
    value &= 2**64 - 1
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values, packed=True):
    if values.dtype.kind == "f":
        pieces, number, wire = [struct.pack("<f", v) for v in values], 2, 5
    else:
        pieces, number, wire = [varint(int(v)) for v in values], 3, 0
    body = message(1, b"".join(pieces)) if packed else b"".join(varint(1 << 3 | wire) + p for p in pieces)
    return message(number, body)


def example(columns, packed=True):
    entries = (message(1, name.encode()) + message(2, feature(v, packed)) for name, v in columns.items())
    return message(1, b"".join(message(1, entry) for entry in entries))


def frame(data):
    head = struct.pack("<Q", len(data))
    mask = [((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF for c in map(plain_crc, (head, data))]
    return head + struct.pack("<I", mask[0]) + data + struct.pack("<I", mask[1])


def columns(rows, seed=0):
    rng = np.random.default_rng((seed, rows))
    spec = FeatureSpec.outbrain()
    values = {f.name: rng.integers(0, f.cardinality, rows) for f in spec.categorical}
    values |= {name: rng.random(rows).astype(np.float32) for name in spec.numeric_names}
    return values | {"clicked": rng.integers(0, 2, rows), "display_id": rng.integers(0, 2**40, rows)}


def record(values, packed=True, **more):
    return frame(example({NAMES[name]: v for name, v in values.items()} | more, packed))


def write_directory(directory):
    """Two train files of three records of 64 rows, and one test file of two."""
    parts = {"train": [columns(64, i) for i in range(3)], "eval": [columns(32, 8), columns(32, 9)]}
    for name in parts:
        (directory / name).mkdir(parents=True)
    extra = {"pop_ad_id_log_int": np.arange(3)}
    (directory / "train" / "part-r-00000").write_bytes(b"".join(record(v, **extra) for v in parts["train"][:2]))
    (directory / "train" / "part-r-00001").write_bytes(record(parts["train"][2], packed=False))
    (directory / "train" / "_SUCCESS").write_bytes(b"")
    (directory / "eval" / "part-r-00000").write_bytes(b"".join(record(v) for v in parts["eval"]))
    return {name: {k: np.concatenate([p[k] for p in part]) for k in part[0]} for name, part in parts.items()}


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 255, 256, 257, 511, 512, 513, 1025, 5000])
def test_crc32c(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    assert crc32c(data) == plain_crc(data)
    assert crc32c(bytes(size)) == plain_crc(bytes(size))


def test_crc32c_of_the_published_vectors():
    """RFC 3720, B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_records_become_shards_of_the_outbrain_spec(tmp_path, capsys):
    want = write_directory(tmp_path / "records")
    words = ["preprocess", "tfrecord", "--data_path", str(tmp_path / "records"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "192 rows of 3 records" in said
    assert "left out: pop_ad_id_log_int" in said
    spec = FeatureSpec.load(tmp_path / "out")
    assert spec.to_dict()["feature_spec"] == FeatureSpec.outbrain().to_dict()["feature_spec"]
    for mapping, folder in (("train", "train"), ("test", "eval")):
        shards = ShardSet.open(tmp_path / "out" / mapping, verify=True)
        shards.check(spec)
        got = shards.read(0, shards.rows)
        for name, values in want[folder].items():
            np.testing.assert_array_equal(got[name], values)


def test_integers_of_every_length(tmp_path):
    values = np.array([0, 1, 127, 128, -1, -(2**63), 2**63 - 1, *(1 << np.arange(63))])
    (tmp_path / "a").write_bytes(frame(example({"x": values})) + frame(example({"x": values[:0]})))
    got = [features["x"] for _, features in chain.from_iterable(map(records.read, records.spans(tmp_path / "a", 1)))]
    np.testing.assert_array_equal(got[0], values)
    assert len(got[1]) == 0


def broken(values, **change):
    return record({k: v for k, v in (values | change).items() if v is not None})


GOOD = columns(8)
BAD = [
    (lambda: record(GOOD)[:-1], r"record 2 \(byte \d+\): the file ends inside"),
    (lambda: record(GOOD)[:7], "record 2 .*the file ends inside"),
    (lambda: record(GOOD)[:-9] + b"\0" + record(GOOD)[-8:], "record 2 .*damaged: the checksum of its data"),
    (lambda: b"\1" + record(GOOD)[1:], "record 2 .*checksum of its length"),
    (lambda: b"a,b,c\n1,2,3\n4,5,6\n", "checksum of its length"),
    (lambda: frame(b"\x0a\xff"), "expected a tf.train.Example: "),
    (lambda: frame(example({})), "expected the feature doc_event_id, found "),
    (lambda: broken(GOOD, ad_id=None), "expected the feature ad_id, found doc_event_id"),
    (lambda: broken(GOOD, ad_id=GOOD["ad_id"][:7]), "features ad_id and label: expected one length, found 7 and 8"),
    (lambda: broken(GOOD, ad_id=GOOD["ad_id_ctr"]), "feature ad_id: expected integers"),
    (lambda: broken(GOOD, platform=np.full(8, 4)), "column 'platform', row 8: 4 .the cardinality is 4"),
    (lambda: broken(GOOD, clicked=np.full(8, 2)), "column 'clicked', row 8: 2 .a label is 0 or 1"),
    (lambda: broken(GOOD, ad_id_ctr=np.full(8, np.nan, np.float32)), "column 'ad_id_ctr', row 8: nan"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, make, words):
    for name in ("train", "eval"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "part-r-00000").write_bytes(record(GOOD))
    (tmp_path / "in" / "train" / "part-r-00000").write_bytes(record(GOOD) + make())
    with pytest.raises(InputError, match=words) as caught:
        run(TFRecordConfig(tmp_path / "in", tmp_path / "out"))
    assert "part-r-00000, record" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_place_that_cannot_be_written_is_the_one_that_was_asked_for(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("train", "eval"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "part-r-00000").write_bytes(record(GOOD))
    monkeypatch.setattr(shard_part, "open", full, raising=False)
    with pytest.raises(RunError, match=f"cannot write {tmp_path / 'out' / 'train'}: "):
        run(TFRecordConfig(tmp_path / "in", tmp_path / "out"))


def test_directories_that_lack_records(tmp_path):
    with pytest.raises(InputError, match=r"train: expected TFRecord files part-\*, found none"):
        run(TFRecordConfig(tmp_path, tmp_path / "out"))


def test_checksum_as_it_is_stored():
    assert struct.pack("<I", masked(b"abc")) == frame(b"abc")[-4:]
