"""The implementations of a training step, one file each; `widedeep.step.make_step` chooses."""
