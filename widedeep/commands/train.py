"""`widedeep train`: the original's flags; `--evaluate` and `--benchmark` change what is done with them."""

from widedeep.config import GROUPS, TrainConfig


def add_arguments(parser) -> None:
    parser.add_config_file()
    for name, kind in GROUPS.items():
        parser.add_options(kind, name)


def run(args) -> int:
    values = {name: value for name, value in vars(args).items() if name != "config"}
    config = TrainConfig.from_flat(values)
    from widedeep.run import launch

    if config.mode.benchmark:
        from widedeep.benchmark import benchmark as action
    elif config.mode.evaluate:
        from widedeep.evaluate import evaluate_run as action
    else:
        from widedeep.train import train as action
    launch(config, action)
    return 0
