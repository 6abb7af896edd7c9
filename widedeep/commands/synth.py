"""`widedeep synth`: synthetic raw CSVs in the Outbrain layout, clicked by a planted model."""


def add_arguments(parser) -> None:
    parser.add_argument(
        "--displays", type=int, required=True, help="displays with known clicks (Outbrain has 16874593)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    parser.add_argument("--out", type=str, required=True, help="new directory for the CSVs and manifest.json")
    parser.add_argument("--workers", type=int | None, default=None, help="threads (one a core)")
    parser.add_argument(
        "--truth",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="also write planted.parquet: the probability of each click",
    )
    parser.add_argument(
        "--clicks_test",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="also write clicks_test.csv, whose clicks are not told",
    )


def run(args) -> int:
    from preprocess import synthetic
    from widedeep.terminal import Bars

    with Bars() as bars:
        manifest = synthetic.run(
            args.displays,
            args.seed,
            args.out,
            workers=args.workers,
            truth=args.truth,
            clicks_test=args.clicks_test,
            progress=bars.update,
        )
    best, rows = manifest["best"], manifest["files"]["clicks_train.csv"]["rows"]
    print(f"{args.out}: {args.displays} displays, {rows} rows")
    print(f"best reachable MAP@12 {best['map12']:.4f} (random order {best['random_map12']:.4f}), AUC {best['auc']:.4f}")
    return 0
