"""From tidy frames to the papers' figures, each drawn on Axes that the caller gives.

In: effects (`trace.COLUMNS`) or their averages (`trace.average_effects`), the content of selection.json,
summaries of scores, tidy scores by setting. Out: the same Axes (`plot_...`), or a Figure where there are several
panels (`..._figure`). Effects are never clipped. Intervals are those of the frames: of effects, 95% percentile
bootstraps over facts; of scores, as `Scores.summary` says.
"""

from mechedit.figures.method_styles import METHOD_COLORS, line_styles
from mechedit.figures.run_folder import refresh_figures, run_figures
from mechedit.figures.score_bars import plot_scores
from mechedit.figures.score_curves import number_axis, plot_scores_against, scores_figure
from mechedit.figures.score_rows import plot_score_rows, score_rows_figure
from mechedit.figures.selection import plot_selection
from mechedit.figures.severed_bars import plot_severed
from mechedit.figures.style import (
    BLUE,
    COLUMN_WIDTH,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PAGE_WIDTH,
    PURPLE,
    SKY,
    VERMILION,
    PaperFigure,
    draw,
    layer_axis,
    legend_above,
    paper_style,
    save_figure,
    share_legend,
)
from mechedit.figures.sweep import plot_sweep, plot_window_contribution, sweep_figure
from mechedit.figures.trace_comparisons import comparison_figure, comparison_lines
from mechedit.figures.trace_curves import lines_figure, plot_lines
from mechedit.figures.trace_figures import trace_figures
from mechedit.figures.trace_heatmaps import fact_figure, plot_fact, plot_role_grid, roles_figure, shared_norm
from mechedit.figures.tuning import plot_tuned_setting, plot_tuned_windows, tuning_figures
from mechedit.trace import clearest_fact

__all__ = [
    "BLUE",
    "COLUMN_WIDTH",
    "GRAY",
    "GREEN",
    "INK",
    "METHOD_COLORS",
    "ORANGE",
    "PAGE_WIDTH",
    "PURPLE",
    "SKY",
    "VERMILION",
    "PaperFigure",
    "clearest_fact",
    "comparison_figure",
    "comparison_lines",
    "draw",
    "fact_figure",
    "layer_axis",
    "legend_above",
    "line_styles",
    "lines_figure",
    "number_axis",
    "paper_style",
    "plot_fact",
    "plot_lines",
    "plot_role_grid",
    "plot_score_rows",
    "plot_scores",
    "plot_scores_against",
    "plot_selection",
    "plot_severed",
    "plot_sweep",
    "plot_tuned_setting",
    "plot_tuned_windows",
    "plot_window_contribution",
    "refresh_figures",
    "roles_figure",
    "run_figures",
    "save_figure",
    "score_rows_figure",
    "scores_figure",
    "share_legend",
    "shared_norm",
    "sweep_figure",
    "trace_figures",
    "tuning_figures",
]
