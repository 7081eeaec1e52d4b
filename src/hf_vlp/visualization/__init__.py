"""Pictures of what a model does: boxes on images, loss curves, a small HTML report."""

from .boxes import draw_boxes
from .curves import draw_loss_curves
from .report import Figure, Score, write_report

__all__ = ["Figure", "Score", "draw_boxes", "draw_loss_curves", "write_report"]
