"""Small settings of ``scripts/needles.py`` on the model that ships."""

from engine.bench.modes import ModelOptions
from engine.bench.needles.passkey_grid import PasskeyGrid
from engine.bench.needles.settings import SHIPPED_MODEL, Settings


def settings(outdir, attention=("hydragen",), grid=None, dtype="float32", **changes) -> Settings:
    """A short document and a few questions, once, in float32."""
    fields = {
        "save_name": None,
        "model": ModelOptions(str(SHIPPED_MODEL), dtype=dtype),
        "question_counts": (8,),
        "document_lengths": (1500,),
        "num_few_shot": 2,
        "num_iters": 1,
        "num_warmup": 0,
        "measure_first_token": True,
    }
    parsed = None if grid is None else PasskeyGrid.parse(grid)
    return Settings(outdir=outdir, attention=attention, grid=parsed, **fields | changes)
