"""`widedeep benchmark`: `widedeep train --benchmark` under a name of its own."""

from widedeep.commands import train
from widedeep.commands.train import add_arguments as add_arguments


def run(args) -> int:
    args.benchmark = True
    return train.run(args)
