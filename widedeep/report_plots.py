"""The plots of a report, as PNG bytes."""

import io
import logging
from collections.abc import Sequence
from typing import Any

from widedeep.errors import InputError

BLUE, ORANGE, GREEN, GREY, PALE = "#2563eb", "#d97706", "#059669", "#64748b", "#bfd0f7"
RANKINGS = (
    ("auc_val", "AUC", BLUE),
    ("streaming_map_val", "MAP@12", GREEN),
    ("map_all_val", "MAP@12, all clicks", ORANGE),
)
STYLE = {
    "font.size": 10,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#334155",
    "axes.titlecolor": "#0f172a",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # 0.7049, not 9.0 under "1e-5 + 7.04e-1"
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.dpi": 150,
}
SMOOTHED = 60  # points of training loss from which a running mean is drawn over them


def draw(
    training: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], calibration: dict[str, list] | None
) -> dict[str, bytes]:
    """Every plot that there are numbers for: `loss`, `ranking`, `learning_rate`, `calibration`.

    Args:
        training: records with `step`, `loss` and perhaps `schedule` (learning rate of the deep part).
        validation: one record an epoch with `step`, `loss_val`, `auc_val` and perhaps `epoch`,
            `streaming_map_val`, `map_all_val`.
        calibration: as `metrics.calibration` returns it.
    Raises:
        InputError: matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else a home that is read-only makes it talk
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the report needs the package matplotlib: pip install 'widedeep[report]'") from error
    from matplotlib.figure import Figure  # figures made without pyplot need no display and no backend

    def plot(width: float, paint, *values: Any) -> bytes:
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        paint(figure.subplots(), *values)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()

    plots = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # the stub wants literal names
        if training or validation:
            plots["loss"] = plot(6.4, _loss, training, validation)
        if any(record.get(name) is not None for record in validation for name, *_ in RANKINGS):
            plots["ranking"] = plot(6.4, _ranking, validation)
        if calibration and calibration["rows"]:
            plots["calibration"] = plot(6.4, _calibration, calibration)
        if rates := [record for record in training if record.get("schedule") is not None]:
            plots["learning_rate"] = plot(6.4, _learning_rate, rates)
    return plots


def _loss(axes, training: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> None:
    steps, loss = _column(training, "step"), _column(training, "loss")
    if len(loss) >= SMOOTHED:
        window = len(loss) // 30
        mean = _running_mean(loss, window)
        axes.plot(steps, loss, color=PALE, linewidth=0.8)
        middle = steps[window // 2 : window // 2 + len(mean)]
        axes.plot(middle, mean, color=BLUE, label=f"training, mean of {window} lines")
    elif loss:
        axes.plot(steps, loss, color=BLUE, marker="." if len(loss) < 30 else None, label="training batches")
    if validation:
        steps, values = _column(validation, "step"), _column(validation, "loss_val")
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="evaluation")
    axes.set(title="Log loss", xlabel="step", ylabel="mean over rows, nats")
    _thousands(axes)
    if limits := loss_limits(loss, _column(validation, "loss_val")):
        axes.set_ylim(limits)
    axes.legend()


def _ranking(axes, validation: Sequence[dict[str, Any]]) -> None:
    place = "epoch" if all(record.get("epoch") is not None for record in validation) else "step"
    for name, label, colour in RANKINGS:
        points = [(record[place], record[name]) for record in validation if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points), color=colour, marker="o", markersize=4, label=label)
            best = max(points, key=lambda point: point[1])
            axes.annotate(
                f"{best[1]:.4f}", best, xytext=(0, 8), textcoords="offset points", ha="center", color=colour, fontsize=9
            )
    axes.margins(x=0.08, y=0.2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Ranking, on the evaluation set", xlabel=place, ylabel="higher is better")
    axes.legend(loc="lower right")


def _calibration(axes, bins: dict[str, list]) -> None:
    predicted, observed, rows = bins["predicted"], bins["observed"], bins["rows"]
    margin = [1.96 * (p * (1 - p) / n) ** 0.5 for p, n in zip(observed, rows)]
    top = 1.08 * max(*predicted, *(o + m for o, m in zip(observed, margin)), 1e-6)
    axes.plot([0, top], [0, top], color=GREY, linewidth=1, linestyle="--", label="perfect")
    axes.errorbar(predicted, observed, margin, color=PALE, fmt="none", elinewidth=2.5)
    axes.plot(predicted, observed, color=BLUE, marker="o", markersize=4, linewidth=1.2, label="model, 95 % interval")
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="mean predicted click rate", ylabel="observed click rate")
    axes.set_title(f"Calibration, {len(rows)} bins of equally many rows")
    axes.legend(loc="upper left")


def _learning_rate(axes, training: Sequence[dict[str, Any]]) -> None:
    marker = "." if len(training) < 30 else None
    axes.plot(_column(training, "step"), _column(training, "schedule"), color=GREY, marker=marker)
    axes.set(title="Learning rate of the deep part", xlabel="step")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    _thousands(axes)


def _column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records]


def _running_mean(values: list[float], window: int) -> list[float]:
    return [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]


def _thousands(axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def loss_limits(training: Sequence[float], evaluation: Sequence[float]) -> tuple[float, float] | None:
    """Lowest and highest loss to show, None for all there is: the first steps of a fresh model would flatten the rest.

    Only they are cut off, one line in 50: an evaluation or a divergence, however high, is what the plot is for.
    """
    if len(training) + len(evaluation) < 20:
        return None
    kept = [*training[len(training) // 50 + 1 :], *evaluation]
    low, high = min(*training, *evaluation), max(kept)
    return (low - 0.08 * (high - low), high + 0.15 * (high - low)) if high > low else None
