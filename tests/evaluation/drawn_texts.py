"""Reads the texts of a plot."""

from collections.abc import Callable
from unittest import mock


def texts_of(draw: Callable[[], None]) -> set[str]:
    """The texts of the figure that `draw` saves: titles, labels, ticks and legends."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figures, save = [], Figure.savefig

    def saved(figure, *args, **settings):
        figures.append(figure)
        save(figure, *args, **settings)

    with mock.patch.object(Figure, "savefig", saved):
        draw()
    return {text.get_text() for text in figures[-1].findobj(Text) if text.get_visible() and text.get_text()}
