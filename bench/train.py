"""Training steps beside the peers': `python -m bench.train --device cpu --batch 4096`. Method: bench/README.md."""

import sys

from bench.harness import main
from bench.job import Contender
from widedeep.data import Batch


def action(contender: Contender, batch: Batch, step: int) -> None:
    contender.train(batch, step)


if __name__ == "__main__":
    sys.exit(main("training", action))
