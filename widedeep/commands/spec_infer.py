"""`widedeep spec infer`: proposes a feature spec from the data, for a person to look over."""

from widedeep.errors import InputError


def add_arguments(parser) -> None:
    parser.add_argument("inputs", type=str, nargs="+", help="CSV, Parquet or Arrow files, or directories of such")
    parser.add_argument("--label", type=str | None, default=None, help="column of two values; guessed by its name")
    parser.add_argument("--group", type=str | None, default=None, help="column of what is ranked together")
    parser.add_argument("--delimiter", type=str | None, default=None, help="of CSV files; \\t is a tab")
    columns = "names for CSV files without a header, in order; name[50] stands for name_0 to name_49"
    parser.add_argument("--columns", type=str, nargs="+", default=[], help=columns)
    parser.add_argument("--max_rows", type=int, default=1 << 20, help="rows to look at")
    parser.add_argument("--out", type=str | None, default=None, help="new YAML file; else the spec is printed")


def run(args) -> int:
    import sys
    from pathlib import Path

    import yaml

    from preprocess import inputs, tabular
    from widedeep.outputs import write_text

    if args.out is not None:
        if Path(args.out).exists():
            raise InputError(f"{args.out}: exists already, and may have been edited; expected the name of a new file")
        inputs.check_outside(args.out, args.inputs)

    options = {name: getattr(args, name) for name in ("group", "max_rows", "delimiter", "columns")}
    if args.delimiter is not None:
        options["delimiter"] = args.delimiter.replace("\\t", "\t")  # as a shell passes it on
    spec, notes = tabular.infer_spec(args.inputs, args.label, **options)
    # YAML has escapes of its own for what a stdout of another encoding cannot hold.
    plain = args.out is not None or (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = yaml.safe_dump(spec, sort_keys=False, allow_unicode=plain, width=120)
    for sentence in notes:
        print(sentence, file=sys.stderr)
    if args.out is None:
        print(text, end="")
        return 0
    write_text(Path(args.out), text)
    sizes = {channel: len(names) for channel, names in spec["channel_spec"].items()}
    print(
        f"{args.out}: {sizes['onehot_categorical']} one-hot, {sizes['multihot_categorical']} multi-hot and "
        f"{sizes['numerical']} numeric features, label {spec['channel_spec']['label'][0]}"
    )
    return 0
