"""One HTML page of a run, from the files of its results directory; what is missing there is named on the page."""

from pathlib import Path

from widedeep import report_html, report_plots
from widedeep.outputs import write_bytes, write_text
from widedeep.report_files import read

PLOTS = "plots"


def run(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run; the path of the page.

    The page holds its plots. In `run_dir` they are also files, in `plots` beside it.

    Args:
        run_dir: the results directory of a training.
        out: the page (default: `report.html` in `run_dir`).
    Raises:
        InputError: no run is there, a file of it is damaged, matplotlib is not installed, or `out` cannot be written.
    """
    files = read(Path(run_dir))
    plots = report_plots.draw(files.training, files.validation, files.evaluation.get("calibration"))
    for name, png in plots.items() if out is None else ():
        write_bytes(Path(run_dir) / PLOTS / f"{name}.png", png)
    out = Path(out or Path(run_dir) / "report.html")
    write_text(out, report_html.page(files, plots))
    return out
