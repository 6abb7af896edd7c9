"""Tables that ranks share out: the rows of each, what is borrowed and given back, and steps against one process."""

import pytest
import torch
from test_cuda_step import EVEN, HIDDEN, gpu_step
from test_model import MOVED, SPECS
from test_step import LR, MIXED, batch_of, new_step, part_of
from thread_comm import in_ranks

from widedeep import model as model_module
from widedeep import ops, share
from widedeep import step as step_module
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.model import WideDeep
from widedeep.share import ALL_ROWS, Share, gather_arrays, is_table
from widedeep.step import StepConfig, make_step
from widedeep.steps.borrowed import Lender
from widedeep.steps.sharded import ShardedCudaStep, ShardedFusedStep

CUTS = [(0, 10, 31, 40), (0, 0, 25, 40), (0, 1, 2, 40), (0, 40, 40, 40)]  # unequal parts, some empty
STEPS = {"cpu": ShardedFusedStep, "gpu": ShardedCudaStep}  # the GPU's step runs on a CPU too, one op after the other


def sharded_step(kind, spec, comm, config=None, **settings):
    settings = {"hidden": HIDDEN, "dropout": 0.3, "seed": 11, "share": Share(comm.rank, comm.world)} | settings
    model = WideDeep(spec, **settings)
    return STEPS[kind](model, config or StepConfig(), torch.device("cpu"), comm)


def whole(step):
    """Weights and slots of all ranks, on the first."""
    step.settle()
    arrays = step.model.named_arrays() | step.state()
    return gather_arrays(step.comm, step.model.share, {name: a.clone() for name, a in arrays.items()})


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("piece", [1, 64, 1 << 22])
def test_a_model_in_shares_has_the_values_of_the_whole(world, piece, monkeypatch):
    """However many of them are drawn at a time."""
    monkeypatch.setattr(model_module, "PIECE", piece)
    spec = SPECS[MIXED]
    model = WideDeep(spec, hidden=[8], seed=5)
    parts = [WideDeep(spec, hidden=[8], seed=5, share=Share(rank, world)) for rank in range(world)]
    assert [sum(rows) for rows in zip(*(part.table_rows for part in parts))] == list(spec.cardinalities)
    for name, a in model.named_arrays().items():
        for rank, part in enumerate(parts):
            assert torch.equal(part.named_arrays()[name], a[rank::world] if is_table(name) else a), name
    with pytest.raises(RuntimeError, match=f"one of {world} shares"):
        parts[0](*batch_of(spec, 3)[:2])


@pytest.mark.parametrize("size", [1, 80, 1 << 20])
def test_gathering_puts_every_row_in_its_place(size, monkeypatch):
    monkeypatch.setattr(share, "GATHERED_BYTES", size)
    arrays = {f"deep.table.{rows}": torch.rand(rows, 3) for rows in (1, 2, 3, 10, 11)}
    arrays |= {"last_step.deep.table.a.table.b": torch.arange(7, dtype=torch.int32), "wide.bias": torch.rand(1)}

    def gather(comm):
        own, all_gather_rows = Share(comm.rank, comm.world), comm.all_gather_rows

        def watched(tensor, lengths=None):
            whole = all_gather_rows(tensor, lengths)
            assert whole.nbytes <= max(size, 3 * tensor[:1].nbytes, 3 * 8)  # a row of each and their counts always fit
            return whole

        comm.all_gather_rows = watched
        mine = {n: own.take(a) if is_table(n) else a for n, a in arrays.items()}
        assert all(a.untyped_storage().nbytes() == a.nbytes for n, a in mine.items())  # the whole table may go
        return gather_arrays(comm, own, mine)

    first, *others = in_ranks(3, gather)
    assert others == [{}, {}]
    assert first.keys() == arrays.keys()
    for name, a in arrays.items():
        assert torch.equal(first[name], a), name


@pytest.mark.parametrize("world", [2, 4])
def test_borrowed_rows_are_those_that_the_ids_name(world):
    spec = SPECS[MIXED]
    model = WideDeep(spec, hidden=[8], seed=5)
    batch = batch_of(spec, 50)
    batch.ids[:, 0] = 3  # one row that every rank takes for its whole batch
    flat, _ = model.wide_rows(batch.ids)
    grads = {name: torch.zeros_like(a) for name, a in model.named_arrays().items() if is_table(name)}

    def work(comm):
        own = Share(comm.rank, comm.world)
        part = WideDeep(spec, hidden=[8], seed=5, share=own)
        tables, wide, *_ = part.lookup_weights()
        lender = Lender(comm, spec, [t.data for t in tables], wide.data)
        rows = slice(0, 0) if comm.rank == 1 else slice(comm.rank * 10, comm.rank * 10 + 10)
        ids = batch.ids[rows]
        got = lender.borrow(ids)
        start = torch.tensor([sum(len(t) for t in got.tables[:f]) for f in range(len(got.tables))])
        column = torch.tensor([f for f, hot in enumerate(spec.hotness) for _ in range(hot)])
        assert torch.equal(got.ids < 0, ids < 0)
        for f, (first, hot) in enumerate(zip(spec.hot_start, spec.hotness)):
            named, wanted = got.ids[:, first : first + hot].long(), ids[:, first : first + hot].long()
            valid = named >= 0
            assert torch.equal(got.tables[f][named[valid]], model.tables[f].data[wanted[valid]])
        place = (got.ids + start[column])[got.ids >= 0].long()
        assert torch.equal(got.wide[place], model.wide.data[flat[rows][ids >= 0]])
        used = place.unique()
        assert torch.equal(flat[rows][ids >= 0].unique(), got.rows.sort().values)  # each once, and none for nothing
        assert torch.equal(got.wide[used], model.wide.data[got.rows])
        # A gradient that says for which row it is, and from whom.
        empty = [not (got.ids[:, column == f] >= 0).any() for f in range(len(got.tables))]
        values = [t[: 0 if none else None] * (1 + comm.rank) for t, none in zip(got.tables, empty)]
        back, wide_rows, wide_values = lender.give_back(got, values, got.wide[used] * (1 + comm.rank))
        mine = {}
        for f, (r, v) in enumerate(back):
            mine[f"deep.table.{spec.names[f]}"] = torch.zeros(part.table_rows[f], v.shape[1]).index_add_(0, r, v)
        mine |= part.wide_tables(torch.zeros(sum(part.table_rows)).index_add_(0, wide_rows, wide_values))
        return gather_arrays(comm, own, mine), got.rows

    results = in_ranks(world, work)
    count = torch.zeros(spec.total_rows)
    for rank, (_, rows) in enumerate(results):
        count.index_add_(0, rows, torch.full((len(rows),), 1.0 + rank))
    counts = dict(zip(spec.names, count.split(list(spec.cardinalities))))
    for name in grads:
        n, a = counts[name.partition(".table.")[2]], model.named_arrays()[name]
        torch.testing.assert_close(results[0][0][name], a * (n if a.dim() == 1 else n[:, None]))


def trained(comm, batches, kind, spec, **settings):
    """(gradients of the first batch, losses, logits, all arrays, step) of a rank's parts of the batches."""
    step = sharded_step(kind, spec, comm, **settings)
    cuts = [(*cut[: comm.world], cut[-1]) for cut in CUTS]
    mine = [part_of(b, cut[comm.rank], cut[comm.rank + 1]) for b, cut in zip(batches, cuts)]
    gradients = step.gradients(mine[0], step=3)
    losses = torch.stack([step.train(part, i, LR) for i, part in enumerate(mine)])
    return gradients, losses, step.predict(mine[0]), whole(step), step


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize(
    ("kind", "spec", "world", "precision"),
    [
        ("cpu", SPECS[MIXED], 3, "fp32"),
        ("cpu", EVEN, 2, "fp32"),
        ("cpu", SPECS["some wide only"], 3, "fp32"),
        ("cpu", EVEN, 2, "bf16"),
        ("gpu", EVEN, 3, "fp32"),
        ("gpu", MOVED, 2, "fp32"),
        ("gpu", SPECS["some wide only"], 2, "fp32"),
        ("gpu", EVEN, 3, "fp16"),
    ],
)
def test_shares_give_the_result_of_one_process(kind, spec, world, precision, parts):
    """Unequal parts, one of them empty in some steps; dropout on; tables with fewer rows than ranks."""
    rtol, atol = (1e-3, 2e-5) if precision == "fp32" else (2e-2, 2e-3)
    settings = {"parts": parts, "config": StepConfig(precision)}
    if precision == "fp32":
        one = new_step("reference", spec, hidden=HIDDEN, parts=parts)
    else:  # which rounds as each rank does
        one = new_step("fused", spec, hidden=HIDDEN, **settings) if kind == "cpu" else gpu_step(spec, **settings)
    batches = [batch_of(spec, 40, seed=i) for i in range(len(CUTS))]
    want_gradients = one.gradients(batches[0], step=3)
    want_losses = torch.stack([one.train(batch, i, LR) for i, batch in enumerate(batches)])
    want_logits = one.predict(batches[0])
    one.settle()
    want = one.model.named_arrays() | one.state()

    results = in_ranks(world, lambda comm: trained(comm, batches, kind, spec, **settings))
    gradients, losses, logits, arrays, steps = zip(*results)
    torch.testing.assert_close(sum(losses), want_losses, rtol=rtol / 100, atol=atol / 10)
    torch.testing.assert_close(torch.cat(logits), want_logits, rtol=rtol, atol=atol)
    for name, g in want_gradients.items():
        torch.testing.assert_close(sum(each[name] for each in gradients), g, rtol=rtol, atol=atol / 10, msg=name)
    assert arrays[0].keys() >= want.keys()
    for name, a in want.items():
        torch.testing.assert_close(arrays[0][name], a, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for step in steps:
        if step.model.has_deep:
            assert [len(t) for t in step.slots.table_rms] == list(step.model.table_rows)
        for name, a in step.model.named_arrays().items():  # what is not shared out has the same bits everywhere
            assert is_table(name) or torch.equal(a, steps[0].model.named_arrays()[name]), name


@pytest.mark.parametrize("looks", [True, False], ids=["the op", "the lender"])
@pytest.mark.parametrize("kind", STEPS)
def test_an_id_past_its_table_is_refused_and_changes_nothing(kind, looks, monkeypatch):
    """It would name a row of the next table. On a GPU the op does not look."""
    step = sharded_step(kind, EVEN, LocalComm("cpu"))
    segments = ops.embedding_segments
    if not looks:
        monkeypatch.setattr(ops, "embedding_segments", lambda ids, *rest: segments(ids.clamp(max=6), *rest))
    batch, before = batch_of(EVEN, 4), {n: a.clone() for n, a in step.model.named_arrays().items()}
    batch.ids[2, 1] = 7
    with pytest.raises(RuntimeError, match=r"feature 1 has id 7 in batch row 2, expected -1 \(padding\) or 0 to 6"):
        step.train(batch, 0, LR)
    for name, a in step.model.named_arrays().items():
        assert torch.equal(a, before[name]), name


@pytest.mark.parametrize("kind", STEPS)
def test_two_runs_have_the_same_bits(kind):
    batches = [batch_of(EVEN, 40, seed=i) for i in range(len(CUTS))]
    first, second = (in_ranks(3, lambda comm: trained(comm, batches, kind, EVEN))[0][3] for _ in range(2))
    for name, a in first.items():
        assert torch.equal(a, second[name]), name


def test_a_model_that_is_shared_out_is_refused_where_it_cannot_be_applied():
    model = WideDeep(EVEN, hidden=[8], seed=1, share=Share(1, 2))
    with pytest.raises(InputError, match=r"expected share \(0, 1\) of the tables, got \(1, 2\)"):
        make_step("fused", model)
    comm = LocalComm("cpu")
    comm.world = 2
    with pytest.raises(InputError, match=r"expected share \(0, 2\) of the tables, got \(1, 2\)"):
        make_step("fused", model, comm=comm)
    comm.rank = 1
    with pytest.raises(InputError, match="expected auto or fused where tables are shared out"):
        make_step("reference", model, comm=comm)
    assert type(make_step("auto", model, comm=comm)) is ShardedFusedStep


@pytest.mark.parametrize(
    ("world", "shared", "kind"), [(1, False, "Cuda"), (2, False, "RanksCuda"), (2, True, "ShardedCuda")]
)
def test_a_gpu_has_a_step_for_one_process_for_several_and_for_shares(world, shared, kind, monkeypatch):
    monkeypatch.setattr(step_module, "_has_cuda_step", lambda device: True)
    comm = LocalComm("meta")
    comm.world = world
    model = WideDeep(EVEN, hidden=[8], seed=1, share=Share(0, world if shared else 1))
    assert type(make_step("fused", model, StepConfig("fp16"), "meta", comm)).__name__ == f"{kind}Step"


def test_a_model_without_ids_has_nothing_to_share_out():
    spec = SPECS["no categorical"]
    assert WideDeep(spec, hidden=[8], seed=1, share=Share(1, 2)).share == ALL_ROWS
