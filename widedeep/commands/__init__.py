"""One module for each command: `add_arguments(parser)` declares its flags, `run(args) -> int` does the work."""
