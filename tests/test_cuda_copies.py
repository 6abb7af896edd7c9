"""The GPU step's copies of the weights follow them, whoever writes: a checkpoint, an optimizer, another step."""

import pytest
import torch
from test_cuda_step import EVEN, gpu_step
from test_model import MOVED_64
from test_step import batch_of

from widedeep.dist import LocalComm
from widedeep.optim import FTRL, RMSprop
from widedeep.step import StepConfig, make_step
from widedeep.steps.cuda import CudaStep


def by_hand(model, batch):
    for a in model.named_arrays().values():
        a.mul_(-1.5)


def by_our_optimizers(model, batch):
    deep = [*model.tables, *model.layers.parameters(), *model.out.parameters()]
    optimizers = RMSprop(deep, lr=0.05), FTRL([model.wide, model.wide_numeric, model.wide_bias])
    for _ in range(3):
        model.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(batch.ids, batch.numeric), batch.label).backward()
        for optimizer in optimizers:
            optimizer.step()


def by_another_step(model, batch):
    device = batch.ids.device
    other = CudaStep(model, StepConfig(), device, LocalComm(device))
    for i in range(3):
        other.train(batch, i, 0.05)


def by_the_reference(model, batch):
    other = make_step("reference", model, device=batch.ids.device)
    for i in range(3):
        other.train(batch, i, 0.05)


# In fp32 a GPU pads the copies, and of MOVED_64 has one anywhere: its columns have an order of their own.
@pytest.mark.parametrize(("spec", "precision"), [(EVEN, "bf16"), (MOVED_64, "fp32"), (MOVED_64, "bf16")])
@pytest.mark.parametrize("written", [by_hand, by_our_optimizers, by_another_step, by_the_reference])
def test_weights_written_by_others_are_seen(written, spec, precision, device):
    step = gpu_step(spec, StepConfig(precision), device=device)
    batch = batch_of(spec, 96, device=device)
    step.train(batch, 0, 0.05)
    for _ in range(3):
        step.predict(batch)
    written(step.model, batch)
    fresh = gpu_step(spec, StepConfig(precision), device=device)
    fresh.model.load_state_dict(step.model.state_dict())
    fresh.load_state(step.state())
    before = step.train(batch, 0, 0.0)
    assert torch.equal(before, fresh.train(batch, 0, 0.0))
    assert torch.equal(step.predict(batch), fresh.predict(batch))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_copied_anew_once_when_others_have_written_them(precision, device, monkeypatch):
    """A pass over all of them in each step would be lost time: an update writes the copies too."""
    step, copied = gpu_step(MOVED_64, StepConfig(precision), device=device), []
    refresh = step.weights.refresh
    monkeypatch.setattr(step.weights, "refresh", lambda: copied.append(len(copied)) or refresh())
    batch = batch_of(MOVED_64, 20, device=device)
    step.train(batch, 0, 0.05)
    for i in range(1, 4):
        copied.clear()
        step.train(batch, i, 0.05)
        step.predict(batch)
        step.gradients(batch)
        assert copied == []
        by_hand(step.model, batch)
        for _ in range(3):
            step.predict(batch)
        assert copied == [0]
