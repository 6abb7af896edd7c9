"""The loops over batches put no question to the device: a GPU never waits for the host, nor the host for it; and what
they make lies on the device that they compute on.

On a CPU nothing waits; there the tests look for the operators that would, on a GPU: those whose result, or the size of
it, the host must know, and those that bring a number of the host to the device.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
from test_cuda_step import EVEN, HIDDEN, gpu_step
from test_step import LR, batch_of, part_of
from thread_comm import in_ranks
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from widedeep.data import Reader
from widedeep.dist import LocalComm
from widedeep.evaluate import evaluate
from widedeep.feature_spec import FeatureSpec
from widedeep.metrics import Evaluation
from widedeep.model import WideDeep
from widedeep.optim import FTRL, RMSprop
from widedeep.shards import ShardSet, ShardWriter
from widedeep.share import ALL_ROWS, Share
from widedeep.step import StepConfig
from widedeep.steps import cuda_ranks
from widedeep.steps.cuda import CudaStep
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.steps.exchange import Arriving
from widedeep.steps.fused import FusedStep
from widedeep.steps.reference import ReferenceStep
from widedeep.steps.sharded import ShardedCudaStep, ShardedFusedStep
from widedeep.train import LossWatch

WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc", "lift_fresh"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU could not queue."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or masks:
            raise AssertionError(f"{name} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.sort()[0].unique_consecutive(),
        lambda x: (x > 0).nonzero(),
        lambda x: torch.tensor(3.0),
        lambda x: torch.bincount(x.long().abs()),
    ],
)
def test_waits_are_seen(wait):
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        wait(torch.ones(4))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """500 rows of the step tests' features, in displays of five."""
    spec = FeatureSpec(EVEN.categorical, EVEN.numeric, label="y", group="display")
    g = torch.Generator().manual_seed(1)
    columns = {}
    for f in spec.categorical:
        ids = torch.randint(0, f.cardinality, (500, f.hotness), generator=g)
        columns[f.name] = (ids if f.hotness > 1 else ids[:, 0]).numpy()
    columns |= {f.name: torch.rand(500, generator=g).numpy() for f in spec.numeric}
    columns |= {"y": torch.randint(0, 2, (500,), generator=g).numpy(), "display": torch.arange(500).numpy() // 5}
    directory = tmp_path_factory.mktemp("data") / "train"
    with ShardWriter(directory, spec, group=True) as writer:
        writer.append(columns)
    return ShardSet.open(directory)


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training(shards, parts, precision):
    step = gpu_step(config=StepConfig(precision), parts=parts)
    reader, watch = Reader(shards, 96, mode="device", spec=EVEN), LossWatch(LocalComm("cpu"), precision)
    batches = reader.epoch(0, into=step.places)
    watch.add(step.train(next(batches), 0, 1e-3))  # the first batch chooses products and makes the buffers
    with NoWaiting():
        for i, batch in enumerate(batches, 1):
            watch.add(step.train(batch, i, 1e-3))
    assert watch.check(i + 1) > 0


@pytest.mark.parametrize("mode", ["device", "pinned", "stream"])
def test_evaluation(shards, mode):
    """The loop alone; metrics are read when it is over."""
    step = gpu_step(config=StepConfig("fp16"))
    reader = Reader(shards, 96, mode=mode, shuffle=False)
    step.predict(next(reader.epoch(0)))
    evaluation = Evaluation()
    with NoWaiting():
        for index, batch in enumerate(reader.epoch(0)):
            evaluation.update(step.predict(batch), batch.label, batch.group, index * 96)
    mode = SimpleNamespace(disable_map_calculation=False, num_auc_thresholds=200)
    run = SimpleNamespace(step=step, comm=LocalComm("cpu"), config=SimpleNamespace(mode=mode))
    whole = evaluate(run, reader).compute()
    assert evaluation.compute() == pytest.approx(whole, nan_ok=True)
    assert whole["rows"] == 500
    assert whole["groups"] == 100


class Order(NoWaiting):
    """Notes the operators of a step, in their order, among what else is put into `names`."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ranks_ask_early_and_wait_late(precision, monkeypatch):
    """For counts of rows, and in float16 for the overflow, and for nothing else: meanwhile they queue the backward
    pass, or the exchange.
    """
    told, batch = torch.Tensor.tolist, batch_of(EVEN, 40)
    orders = [Order() for _ in range(2)]
    of_thread = threading.local()

    class Noted(Arriving):
        def __init__(self, tensor):
            super().__init__(tensor)
            self.what = "overflow" if tensor.dim() == 0 else "counts"
            of_thread.names.append(f"{self.what} asked for")

        def tolist(self):
            of_thread.names.append(f"{self.what} told")
            return told(self._host)

    def work(comm):
        of_thread.names = orders[comm.rank].names
        step = gpu_step(config=StepConfig(precision), comm=comm)
        part = part_of(batch, 20 * comm.rank, 20 * comm.rank + 20)
        step.train(part, 0, LR)  # makes the buffers
        of_thread.names.clear()
        with orders[comm.rank]:
            step.train(part, 1, LR)

    monkeypatch.setattr(cuda_ranks, "Arriving", Noted)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    in_ranks(2, work)
    for names in (order.names for order in orders):
        at = {name: names.index(name) for name in names}
        last = {name: i for i, name in enumerate(names)}
        assert at["counts asked for"] < at["linear_relu_dropout_out"]
        assert at["counts told"] > last["linear_dgrad_out"]
        asked = ["counts asked for", "counts told", "counts told"]  # its own, and those of all for the exchange
        if precision == "fp16":
            asked[1:1] = ["overflow asked for"]
            asked.append("overflow told")
            assert last["div"] < at["overflow told"] < at["rmsprop_rows_"]  # gradients of rows without the loss scale
        assert [name for name in names if name.endswith(("asked for", "told"))] == asked


def test_what_arrives_is_what_was_there(device):
    counts = torch.arange(6, device=device).view(2, 3)
    arriving, flag = Arriving(counts), Arriving(counts[1, 0] * 1.0)
    counts.zero_()
    assert arriving.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert flag.tolist() == 3.0


class NoCopies(TorchDispatchMode):
    """Refuses what takes tensors of two devices, or makes one of another: a copy between host and device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)]
        if len({t.device for t in tensors}) > 1:
            raise AssertionError(f"{func} copies between host and device")
        return made


@pytest.mark.parametrize("sparse", [True, False])
def test_a_loop_of_ones_own(sparse, monkeypatch):
    """On torch's device without values, which nobody can wait for; the backward pass that makes sparse gradients, which
    waits for their sizes, is left out.
    """
    model = WideDeep(EVEN, hidden=[24], dropout=0.1, seed=1, sparse=sparse).to("meta")
    optimizers = [RMSprop(model.deep_parameters()), FTRL(model.wide_parameters())]
    ids = torch.zeros(16, EVEN.id_columns, dtype=torch.int32, device="meta")
    numeric, label = torch.zeros(16, len(EVEN.numeric), device="meta"), torch.zeros(16, device="meta")
    monkeypatch.setattr(torch, "tensor", None)  # a copy to the device, which a dispatch mode does not see there
    for _ in range(2):
        with NoCopies():
            loss = binary_cross_entropy_with_logits(model(ids, numeric), label)
            for optimizer in optimizers:
                optimizer.zero_grad()
            if sparse:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                for p in (*model.tables, model.wide):
                    rows, values = (
                        torch.zeros_like(ids[:1]).long(),
                        torch.zeros(ids.shape[1], *p.shape[1:], device="meta"),
                    )
                    p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=False)
            else:
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()


def put_through(make, model, config, comm, batch):
    """Everything that a step does, from its making on, while torch's default device is none: a tensor that is made
    there by mistake does not go with those of a CPU, as one that is made on the CPU would not go with those of a GPU.
    """
    with torch.device("meta"):
        step = make(model, config, torch.device("cpu"), comm)
        for i in range(3):
            step.train(batch, i, LR)
        step.gradients(batch)
        step.predict(batch)
        step.parts(batch)
        step.settle()
        step.load_state({name: a.clone() for name, a in step.state().items()})
        step.start_from_weights()


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [(ReferenceStep, "fp32"), (FusedStep, "fp32"), (FusedStep, "bf16"), (CudaStep, "fp32"), (CudaStep, "fp16")],
)
def test_what_a_step_makes_is_on_its_device(kind, precision, parts):
    model = WideDeep(EVEN, hidden=HIDDEN, dropout=0.3, seed=11, parts=parts)
    put_through(kind, model, StepConfig(precision), LocalComm("cpu"), batch_of(EVEN, 33))


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [(FusedStep, "fp32"), (ShardedFusedStep, "fp32"), (RanksCudaStep, "fp16"), (ShardedCudaStep, "fp16")],
)
def test_what_ranks_make_is_on_their_device(kind, precision, parts):
    batch = batch_of(EVEN, 33)

    def work(comm):
        share = Share(comm.rank, comm.world) if kind in (ShardedFusedStep, ShardedCudaStep) else ALL_ROWS
        model = WideDeep(EVEN, hidden=HIDDEN, dropout=0.3, seed=11, parts=parts, share=share)
        put_through(kind, model, StepConfig(precision), comm, part_of(batch, 11 * comm.rank, 11 * comm.rank + 11))

    in_ranks(3, work)
