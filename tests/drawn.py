"""What a plot was drawn as."""

import pytest


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are drawn from now on, to be looked into."""
    from matplotlib.figure import Figure

    from engine.bench import png

    drawn = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(png, "Figure", Kept)
    return drawn
