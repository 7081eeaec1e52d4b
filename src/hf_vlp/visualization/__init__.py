"""Pictures of what a model does: boxes and heat maps on images, loss curves, SOHO's visual
dictionary, a small HTML report."""

from .boxes import draw_boxes
from .curves import draw_loss_curves
from .dictionary import (
    CollectedEntries,
    EntryMap,
    collect_entries,
    draw_entry_map,
    draw_entry_patches,
    draw_usage,
    living_entries,
)
from .gradcam import WordHeatmaps, draw_heatmap, draw_sheet, draw_word_heatmaps, stack, word_heatmaps
from .predictions import draw_located
from .report import Figure, Score, write_report

__all__ = [
    "CollectedEntries",
    "EntryMap",
    "Figure",
    "Score",
    "WordHeatmaps",
    "collect_entries",
    "draw_boxes",
    "draw_entry_map",
    "draw_entry_patches",
    "draw_heatmap",
    "draw_located",
    "draw_loss_curves",
    "draw_sheet",
    "draw_usage",
    "draw_word_heatmaps",
    "living_entries",
    "stack",
    "word_heatmaps",
    "write_report",
]
