"""The registry of attention methods. A new method is one file and one line here."""

from engine.attention.auto import Auto
from engine.attention.hydragen import Hydragen
from engine.attention.method import AttentionMethod, Runs
from engine.attention.noattention import NoAttention
from engine.attention.noshared import HydragenNoShared
from engine.attention.placement import Keeps, Placement
from engine.errors import InputError

METHODS: dict[str, AttentionMethod] = {m.name: m for m in (Hydragen(), HydragenNoShared(), NoAttention(), Auto())}


def get_method(name: str) -> AttentionMethod:
    if name not in METHODS:
        raise InputError(f"attention method {name!r} is not known; accepted: {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "AttentionMethod", "Auto", "Keeps", "Placement", "Runs", "get_method"]
