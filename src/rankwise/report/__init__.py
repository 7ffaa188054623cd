"""What a run shows: the table, the verdict, the heat map of ranks, the model card."""

from rankwise.report.card import write_card
from rankwise.report.heatmap import save_heatmap
from rankwise.report.table import print_table, verdict

__all__ = ["print_table", "save_heatmap", "verdict", "write_card"]
