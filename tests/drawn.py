"""What a plot was drawn as."""

import pytest


def keep_figures(monkeypatch: pytest.MonkeyPatch, module) -> list:
    """The figures that ``module`` draws from now on, to be looked into."""
    from matplotlib.figure import Figure

    drawn = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(module, "Figure", Kept)
    return drawn
