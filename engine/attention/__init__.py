"""The registry of attention methods. A new method is one file and one line here."""

from dataclasses import fields, is_dataclass, replace

from engine.attention.auto import Auto
from engine.attention.hydragen import Hydragen
from engine.attention.method import AttentionMethod, Runs
from engine.attention.noattention import NoAttention
from engine.attention.noshared import HydragenNoShared
from engine.attention.placement import Keeps, Placement
from engine.attention.streaming import Streaming
from engine.errors import InputError
from engine.named_options import checked, read_integer, read_options, split_named

METHODS: dict[str, AttentionMethod] = {
    m.name: m for m in (Hydragen(), HydragenNoShared(), NoAttention(), Auto(), Streaming())
}


def get_method(text: str) -> AttentionMethod:
    """The method of a name, with its options, as in ``streaming:n_init=4:n_local=1020``. Raises InputError for what is
    not known, and for values that an option cannot have."""
    name, options = split_named(text)
    if name not in METHODS:
        raise InputError(f"attention method {name!r} is not known; accepted: {', '.join(METHODS)}")
    method, what = METHODS[name], f"attention {text!r}"
    accepted = [field.name for field in fields(method)] if is_dataclass(method) else []
    found = {key: read_integer(what, key, value) for key, value in read_options(what, options, accepted).items()}
    return checked(what, lambda: replace(method, **found)) if found else method


__all__ = ["METHODS", "AttentionMethod", "Auto", "Keeps", "Placement", "Runs", "Streaming", "get_method"]
