"""Loss curves from the log history that a Trainer keeps."""

from pathlib import Path

LossPoints = dict[str, list[tuple[int, float]]]


def loss_points(log_history: list[dict]) -> LossPoints:
    """Collect (step, value) of `loss` and of every `loss_*` term from `trainer.state.log_history`."""
    points: LossPoints = {}
    for entry in log_history:
        for name, value in entry.items():
            if name == "loss" or name.startswith("loss_"):
                points.setdefault(name, []).append((entry["step"], value))
    return points


def draw_loss_curves(log_history: list[dict], path: str | Path) -> None:
    """Write a PNG with one panel per loss term, step on the x axis, each with its own y axis.

    Raises ValueError when the history holds no loss, ImportError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing loss curves needs matplotlib: pip install 'hf-vlp[viz]'") from error

    points = loss_points(log_history)
    if not points:
        raise ValueError(
            "log_history holds no loss: train first, with logging_steps below the number of steps"
        )
    columns = min(len(points), 3)
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * rows), dpi=120, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # inches between one panel's ticks and the next title
    for axis, (name, values) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, points.items(), strict=False
    ):
        axis.plot(*zip(*values, strict=True), color="#1e88e5", linewidth=1.5)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[len(points) :]:
        axis.remove()
    figure.supxlabel("step", fontsize=9)
    figure.savefig(path)
