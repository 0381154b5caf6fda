"""The look of every picture: one style for matplotlib, and the colours of Okabe and Ito.

People who see few colours can tell these apart (Okabe & Ito 2008, https://jfly.uni-koeln.de/color). Free of
matplotlib: the modules that draw bring it, so that nobody else waits for it.
"""

from __future__ import annotations

from typing import Any

ORANGE, SKY_BLUE, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILLION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"

# Text, and what stands behind it: axes and notes, lines of the grid.
INK, GREY, FAINT = "#1b2733", "#6b7785", "#e4e8ec"

# For `matplotlib.rc_context`: it holds where a figure is drawn and where it is saved.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "figure.facecolor": "white",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
