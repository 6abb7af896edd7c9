"""The learning rate of the deep part; the wide part's is constant."""

from widedeep.errors import InputError


def deep_lr(step: int, *, base: float, steps_per_epoch: int, num_epochs: float, warmup_epochs: float) -> float:
    """Learning rate of RMSprop in step `step` (0 for the first batch).

    With W = warmup_epochs * steps_per_epoch, E = warmup_epochs + (num_epochs - warmup_epochs) / 2 and t = max(1, step):
    base * t / W below W, base / 4 from W up to and including E * steps_per_epoch, base / 8 after that. Warm-up thus
    ends in a drop to a quarter, as in the original's `main.py`, on which its published accuracy rests.

    Raises:
        InputError: warm-up is negative or longer than the run.
    """
    if not 0 <= warmup_epochs <= num_epochs:
        raise InputError(
            f"deep_warmup_epochs: expected a number from 0 to num_epochs ({num_epochs:g}), got {warmup_epochs:g}"
        )
    t = max(1, step)
    warmup = warmup_epochs * steps_per_epoch
    if t < warmup:
        return base * t / warmup
    boundary = (warmup_epochs + (num_epochs - warmup_epochs) / 2) * steps_per_epoch
    return base / 4 if t <= boundary else base / 8
