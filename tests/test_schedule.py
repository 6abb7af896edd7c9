"""The warm-up and quarter, eighth schedule of the deep part."""

import numpy as np
import pytest

from widedeep.errors import InputError
from widedeep.schedule import deep_lr


def rates(steps, steps_per_epoch, num_epochs, warmup_epochs, base=1.2e-4):
    args = {"base": base, "steps_per_epoch": steps_per_epoch, "num_epochs": num_epochs, "warmup_epochs": warmup_epochs}
    return [deep_lr(step, **args) for step in range(steps)]


@pytest.mark.parametrize("name", ["tiny", "outbrain_small"])
def test_equals_the_original(shared, name):
    import json

    z = np.load(shared / "golden" / f"{name}.npz")
    config = json.loads(z["config"].tobytes())
    got = rates(
        config["steps"],
        config["steps_per_epoch"],
        config["num_epochs"],
        config["deep_warmup_epochs"],
        config["deep_learning_rate"],
    )
    np.testing.assert_allclose(got, z["lr_deep"], rtol=1.2e-7, atol=0)


def test_published_run():
    """20 epochs of 455 steps, 6 of warm-up: the values that the original's documentation gives."""
    lr = rates(9100, 455, 20, 6)
    assert lr[0] == lr[1] == 1.2e-4 / 2730
    assert lr[2729] == pytest.approx(1.2e-4 * 2729 / 2730)
    assert lr[2730] == lr[5915] == 3e-5
    assert lr[5916] == lr[9099] == 1.5e-5


def test_without_warmup_starts_at_a_quarter():
    assert rates(12, 4, 3, 0) == [3e-5] * 7 + [1.5e-5] * 5


def test_warmup_through_the_whole_run_never_drops():
    lr = rates(12, 4, 3, 3)
    assert lr == pytest.approx([1.2e-4 * max(1, t) / 12 for t in range(12)])


def test_fractional_warmup():
    lr = rates(10, 5, 2, 0.5)  # W = 2.5, boundary = (0.5 + 0.75) 5 = 6.25
    assert lr == pytest.approx([1.2e-4 / 2.5, 1.2e-4 / 2.5, 1.2e-4 * 2 / 2.5, *[3e-5] * 4, *[1.5e-5] * 3])


@pytest.mark.parametrize("warmup", [-1, 3.5])
def test_rejects_warmup_outside_the_run(warmup):
    with pytest.raises(InputError, match="deep_warmup_epochs: expected a number from 0 to num_epochs"):
        deep_lr(0, base=1.0, steps_per_epoch=10, num_epochs=3, warmup_epochs=warmup)
