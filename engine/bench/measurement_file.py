"""The one YAML file that a measurement leaves in its directory: written once, whole, and never over another."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from engine.errors import InputError
from engine.files import check_outdir, write_whole


def check_new(path: Path) -> None:
    """Raises InputError when ``path`` is there already, or could not be written: after minutes of measuring it would be
    too late."""
    if path.exists():
        raise InputError(f"{path} exists; accepted: an OUTDIR without one, for it is not overwritten; use another")
    check_outdir(path.parent)


def write_measurement(path: Path, described: Mapping[str, object]) -> None:
    """Writes plain data to ``path``, whose directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(described), sort_keys=False, allow_unicode=True, default_flow_style=None, width=116)
    write_whole(path, text.encode())


def round_off(value: float) -> float:
    """To 6 digits, more than any time has."""
    return float(f"{value:.6g}")


def round_all(values: Sequence[float]) -> list[float]:
    return [round_off(value) for value in values]
