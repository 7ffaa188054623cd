"""What a run shows: tables, the verdict, the heat map of ranks, curves over ranks, the card."""

from rankwise.report.card import write_card
from rankwise.report.curves import draw_curves, save_curves
from rankwise.report.heatmap import save_heatmap
from rankwise.report.table import choice, print_curve, print_cuts, print_table, verdict

__all__ = [
    "choice",
    "draw_curves",
    "print_curve",
    "print_cuts",
    "print_table",
    "save_curves",
    "save_heatmap",
    "verdict",
    "write_card",
]
