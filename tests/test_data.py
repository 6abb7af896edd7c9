"""Reader: the same rows in every mode and for every world size, none lost or repeated, and no thread left behind."""

import copy
import gc
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from widedeep import affinity, data, shards
from widedeep.data import Reader
from widedeep.devices import exact_device
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.readers import rows as loading
from widedeep.shuffle import EpochOrder

MODES = ["device", "pinned", "stream"]


def make_spec():
    features = [("user", 1000, 1), ("ad", 200, 1), ("topics", 70_000, 3)]
    return SimpleNamespace(
        categorical=[SimpleNamespace(name=n, cardinality=c, hotness=h) for n, c, h in features],
        numeric=[SimpleNamespace(name="age"), SimpleNamespace(name="price")],
        label="clicked",
        group="display",
    )


def make_rows(rows):
    """`display` is the row number, so that every batch can be looked up."""
    rng = np.random.default_rng(rows)
    return {
        "user": rng.integers(-1, 1000, rows),
        "ad": rng.integers(-1, 200, rows),
        "topics": rng.integers(-1, 70_000, (rows, 3)),
        "age": rng.standard_normal(rows).astype(np.float32),
        "price": rng.standard_normal(rows).astype(np.float32),
        "clicked": rng.integers(0, 2, rows),
        "display": np.arange(rows),
    }


@pytest.fixture(scope="module")
def shard_sets(tmp_path_factory):
    made = {}

    def get(rows):
        if rows not in made:
            path = tmp_path_factory.mktemp("shards") / str(rows)
            with shards.ShardWriter(path, make_spec(), rows_per_shard=700, group=True) as writer:
                writer.append(make_rows(rows))
            made[rows] = shards.ShardSet.open(path)
        return made[rows]

    return get


def assert_same(got, want):
    for field in ("ids", "numeric", "label", "group"):
        a, b = getattr(got, field), getattr(want, field)
        assert a.dtype == b.dtype, field
        assert torch.equal(a.cpu(), b.cpu()), field
    assert got[4:] == want[4:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 64, 2000])
def test_every_row_comes_once_with_its_own_values(shard_sets, mode, rows, device):
    reader = Reader(shard_sets(rows), 64, mode=mode, device=device, seed=3, window_rows=900)
    batches = list(reader.epoch(5))
    assert len(batches) == reader.steps_per_epoch == -(-rows // 64)
    assert [b.global_rows for b in batches] == [min(64, rows - s * 64) for s in range(len(batches))]
    assert all(b.first_row == 0 and len(b.label) == b.global_rows for b in batches)
    order = torch.cat([b.group for b in batches]).cpu().numpy()
    np.testing.assert_array_equal(order, EpochOrder(rows, 3, 5, window_rows=900).rows_at(0, rows))
    source = make_rows(rows)
    ids = np.column_stack([source["user"], source["ad"], source["topics"]])[order]
    np.testing.assert_array_equal(torch.cat([b.ids for b in batches]).cpu().numpy(), ids)
    numeric = np.column_stack([source["age"], source["price"]])[order]
    np.testing.assert_array_equal(torch.cat([b.numeric for b in batches]).cpu().numpy(), numeric)
    np.testing.assert_array_equal(torch.cat([b.label for b in batches]).cpu().numpy(), source["clicked"][order])
    assert (batches[0].ids.dtype, batches[0].numeric.dtype, batches[0].label.dtype) == (
        torch.int32,
        torch.float32,
        torch.float32,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_written_where_the_caller_wants_them_are_the_same(shard_sets, mode, shuffle, device):
    reader = Reader(shard_sets(1003), 100, mode=mode, device=device, seed=3, shuffle=shuffle, window_rows=300)
    ids = torch.full((100, 5), -7, dtype=torch.int32, device=device)
    numeric, label = torch.full((100, 2), -7.0, device=device), torch.full((100,), -7.0, device=device)

    def places(rows):
        return ids[:rows], numeric[:rows], label[:rows]

    for got, want in zip(reader.epoch(1, 2, into=places), reader.epoch(1, 2), strict=True):
        assert_same(got, want)
        assert (got.ids.data_ptr() == ids.data_ptr()) == (mode == "device")
        assert (got.label.data_ptr() == label.data_ptr()) == (mode == "device")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_together_give_the_global_batches(shard_sets, mode, world, shuffle):
    rows, batch = 1003, 100  # the last batch has 3 rows: fewer than ranks
    options = {"seed": 1, "shuffle": shuffle, "window_rows": 300}
    whole = list(Reader(shard_sets(rows), batch, mode="device", **options).epoch(2))
    ranks = [
        list(Reader(shard_sets(rows), batch, mode=mode, rank=r, world=world, **options).epoch(2)) for r in range(world)
    ]
    for want, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert {p.global_rows for p in parts} == {want.global_rows}
        firsts = np.cumsum([0] + [len(p.label) for p in parts])
        assert [p.first_row for p in parts] == firsts[:-1].tolist()
        assert max(len(p.label) for p in parts) - min(len(p.label) for p in parts) <= 1
        for field in ("ids", "numeric", "label", "group"):
            assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(want, field))


@pytest.mark.parametrize("mode", MODES)
def test_start_step_resumes_inside_an_epoch(shard_sets, mode):
    reader = Reader(shard_sets(2000), 128, mode=mode, seed=9)
    whole = list(reader.epoch(1))
    for start in (0, 3, len(whole) - 1, len(whole)):
        rest = list(reader.epoch(1, start_step=start))
        assert len(rest) == len(whole) - start
        for got, want in zip(rest, whole[start:]):
            assert_same(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_without_shuffle_rows_come_in_file_order(shard_sets, mode, device):
    reader = Reader(shard_sets(1003), 100, mode=mode, device=device, shuffle=False)
    for epoch in (0, 1):
        assert torch.cat([b.group for b in reader.epoch(epoch)]).tolist() == list(range(1003))


@pytest.mark.parametrize("chunk", [1, 150, 10**6])
def test_stream_gives_the_same_for_any_chunk(shard_sets, monkeypatch, chunk):
    monkeypatch.setattr(data, "READ_ROWS", chunk)
    streamed = list(Reader(shard_sets(1003), 100, mode="stream", seed=4).epoch(0))
    for got, want in zip(streamed, Reader(shard_sets(1003), 100, mode="device", seed=4).epoch(0), strict=True):
        assert_same(got, want)


def test_an_empty_set_has_no_batches(shard_sets):
    for mode in MODES:
        reader = Reader(shard_sets(0), 10, mode=mode)
        assert reader.steps_per_epoch == 0
        assert list(reader.epoch(0)) == []


def test_a_spec_chooses_columns_and_their_order(shard_sets):
    spec = make_spec()
    spec.categorical = [spec.categorical[2], spec.categorical[0]]
    spec.numeric = []
    batch = next(Reader(shard_sets(64), 64, shuffle=False, spec=spec).epoch(0))
    source = make_rows(64)
    np.testing.assert_array_equal(batch.ids.numpy(), np.column_stack([source["topics"], source["user"]]))
    assert batch.numeric.shape == (64, 0)
    spec.categorical[1].cardinality = 999
    with pytest.raises(InputError, match="'user' has cardinality 1000"):
        Reader(shard_sets(64), 64, spec=spec)


def test_a_set_without_a_group_column(tmp_path):
    spec = make_spec()
    rows = make_rows(10)
    del rows["display"]
    with shards.ShardWriter(tmp_path / "set", spec, numeric="float16") as writer:
        writer.append(rows)
    for mode in MODES:
        batch = next(Reader(shards.ShardSet.open(tmp_path / "set"), 4, mode=mode, shuffle=False).epoch(0))
        assert batch.group is None
        np.testing.assert_array_equal(
            batch.numeric[:, 0].numpy(), rows["age"][:4].astype(np.float16).astype(np.float32)
        )


@pytest.mark.parametrize("mode", ["pinned", "stream"])
def test_dropped_iterators_leave_no_thread(shard_sets, mode, device):
    before = threading.active_count()
    reader = Reader(shard_sets(2000), 10, mode=mode, device=device)
    for taken in (0, 1, 50):
        batches = reader.epoch(0)
        for _ in range(taken):
            next(batches)
        del batches
        gc.collect()
        assert threading.active_count() == before
    for _ in reader.epoch(0):
        pass
    assert threading.active_count() == before


def test_several_threads_read_the_same_stream(shard_sets, monkeypatch):
    monkeypatch.setattr(data, "READ_ROWS", 150)
    monkeypatch.setattr(data, "_read_threads", lambda device: 3)
    streamed = list(Reader(shard_sets(2000), 100, mode="stream", seed=4, window_rows=300).epoch(0))
    wanted = Reader(shard_sets(2000), 100, mode="device", seed=4, window_rows=300).epoch(0)
    for got, want in zip(streamed, wanted, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("mode", ["pinned", "stream"])
def test_batches_for_a_gpu_are_put_together_in_page_locked_memory(shard_sets, monkeypatch, mode):
    """From which it copies them by itself, while the loop goes on."""
    empty, pinned, sent = torch.empty, set(), []

    def watched(*shape, pin_memory=False, **settings):
        made = empty(*shape, **settings)
        if pin_memory:
            pinned.add(made.untyped_storage().data_ptr())
        return made

    monkeypatch.setattr(torch, "empty", watched)
    monkeypatch.setattr(data, "transfer", lambda batches, device: sent.append(device.type) or batches)
    taken = list(Reader(shard_sets(2000), 300, mode=mode, device="cuda:1", seed=4).epoch(0))
    assert (len(taken), sent) == (7, ["cuda"])
    assert all(t.untyped_storage().data_ptr() in pinned for batch in taken for t in batch[:4])
    pinned.clear()
    list(Reader(shard_sets(2000), 300, mode=mode, device="cpu", seed=4).epoch(0))
    assert not pinned


def test_a_gpu_without_an_index_is_the_one_that_was_current_then(shard_sets, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    made = Reader(shard_sets(64), 8, mode="pinned", device="cuda"), LocalComm(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert [each.device for each in made] == [torch.device("cuda", 2)] * 2
    assert [str(exact_device(name)) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:5", "cuda:1", "cpu"]


def test_auto_takes_the_first_mode_that_fits(shard_sets, monkeypatch):
    assert Reader(shard_sets(64), 8).mode == "device"
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert Reader(shard_sets(64), 8).mode == "stream"


@pytest.mark.parametrize(
    ("device", "size", "world", "want"),
    [  # of 800 bytes in host memory, which the processes share, and 400 on each GPU, half is for the model
        ("cpu", 400, 1, "device"),
        ("cpu", 401, 1, "stream"),
        ("cpu", 100, 4, "device"),
        ("cpu", 101, 4, "stream"),
        ("cuda", 200, 1, "device"),
        ("cuda", 201, 1, "pinned"),
        ("cuda", 401, 1, "stream"),
        ("cuda", 200, 4, "device"),
        ("cuda", 201, 4, "stream"),
    ],
)
def test_half_of_the_memory_is_left_to_the_model(monkeypatch, device, size, world, want):
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 1000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    assert data._fitting_mode(size, torch.device(device)) == want


@pytest.mark.parametrize(
    ("device", "cores", "parents", "world", "want"),
    [  # the last two are one of four processes: the first of them free, the second pinned to its share
        ("cpu", 16, 16, 1, 1),
        ("cuda", 1, 1, 1, 1),
        ("cuda", 6, 6, 1, 5),
        ("cuda", 64, 64, 1, 8),
        ("cuda", 16, 16, 4, 3),
        ("cuda", 4, 16, 4, 3),
    ],
)
def test_threads_that_read_leave_a_core_to_the_loop(monkeypatch, device, cores, parents, world, want):
    monkeypatch.setattr(affinity, "allowed", lambda process=None: set(range(parents if process else cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    assert data._read_threads(torch.device(device)) == want


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("piece", [1, 150, 2000, 2001])
def test_a_load_puts_all_rows_in_their_places(shard_sets, monkeypatch, piece, device):
    """However many are read at a time; for a GPU they are put together in host memory first."""
    monkeypatch.setattr(loading, "READ_ROWS", piece)
    empty = loading.Layout._empty
    monkeypatch.setattr(loading.Layout, "_empty", lambda self, rows, pinned=False, device="cpu": empty(self, rows))
    waited = []  # what used that memory before is queued on the caller's stream, which a thread's does not wait for
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(device.type))
    )
    got = loading.Layout(shard_sets(2000), make_spec()).load(torch.device(device))
    assert waited == ["cuda"] * (device == "cuda")
    source = make_rows(2000)
    want = [np.column_stack([source[name] for name in names]) for names in (["user", "ad", "topics"], ["age", "price"])]
    for matrix, wanted in zip(got, [*want, source["clicked"], source["display"]], strict=True):
        np.testing.assert_array_equal(matrix.numpy(), wanted)


@pytest.mark.parametrize("columns", [["user", "ad", "topics"], ["topics"], ["ad"]])
def test_the_size_that_must_fit_is_that_of_the_rows(shard_sets, columns):
    spec = make_spec()
    spec.categorical = [f for f in spec.categorical if f.name in columns]
    layout = loading.Layout(shard_sets(64), spec)
    assert layout.row_bytes * 64 == sum(t.nbytes for t in layout.load(torch.device("cpu")))


class Elsewhere(torch.Tensor):
    is_cpu = False


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_device_without_our_kernels_gathers_the_same_rows(shard_sets, monkeypatch, shuffle):
    monkeypatch.setattr(loading, "has_cuda_kernels", False)
    reader = Reader(shard_sets(1003), 100, mode="device", seed=3, window_rows=300)
    here = reader.resident
    there = here._replace(label=here.label.as_subclass(Elsewhere))
    order = EpochOrder(1003, 3, 1, window_rows=300) if shuffle else None
    outs = [here.empty(100), here.empty(100)]
    for rows, out in zip((here, there), outs):
        rows.gather(order, 57, out)
    for a, b in zip(*outs):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("cores", "want"), [(2, 2), (64, 8)])
def test_a_load_has_as_many_threads_as_the_process_has_cores(shard_sets, monkeypatch, cores, want):
    """At the time of the load: by then a process is pinned."""
    asked = []
    monkeypatch.setattr(loading, "ThreadPoolExecutor", lambda n: asked.append(n) or ThreadPoolExecutor(n))
    monkeypatch.setattr(affinity, "allowed", lambda: set(range(cores)))
    assert len(Reader(shard_sets(64), 8, mode="device").resident.label) == 64
    assert asked == [want]


@pytest.mark.parametrize(
    "options",
    [{"global_batch": 0}, {"window_rows": 0}, {"rank": 2, "world": 2}, {"rank": -1}, {"mode": "disk"}],
)
def test_arguments_out_of_range_are_input_errors(shard_sets, options):
    with pytest.raises(InputError):
        Reader(shard_sets(64), **({"global_batch": 8} | options))


def test_a_shard_set_without_a_label_column_is_refused_by_that_name(shard_sets):
    unlabelled = copy.copy(shard_sets(1))
    unlabelled.columns = {name: c for name, c in unlabelled.columns.items() if c.kind != "label"}
    expected = f"{unlabelled.directory}: expected a label column, found user, ad, topics, age, price, display"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        Reader(unlabelled, 1)
