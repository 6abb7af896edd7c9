"""`widedeep evaluate`: metrics of a checkpoint on a mapping of a data set."""

from widedeep.config import Scoring


def add_arguments(parser) -> None:
    parser.add_config_file()
    parser.add_options(Scoring)
    parser.add_argument("--disable_map_calculation", type=bool, nargs="?", const=True, default=False, help="leave MAP@12 out")
    parser.add_argument("--num_auc_thresholds", type=int, default=200, help="thresholds of auc_val")
    parser.add_argument("--out", type=str | None, default=None, help="directory for evaluation.json")
    parser.add_argument("--json", type=bool, nargs="?", const=True, default=False, help="print one JSON object")
