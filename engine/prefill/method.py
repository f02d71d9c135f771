"""The registry of prefill methods, and how one is named: ``NAME``, or ``NAME:option=value:option=value``.

A new uniform pattern is one class in ``kernels/sparse/patterns.py`` and one line here.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from engine.config import ModelConfig
from engine.errors import InputError
from engine.named_options import checked, read_integer, read_options, split_named
from engine.prefill.head_config import (
    DEFAULT_PATTERN,
    HeadPatterns,
    find_head_config,
    get_support_models,
    is_published,
    read_head_config,
)
from kernels.sparse.patterns import AShape, BlockSparse, Pattern, TriShape

DENSE, MINFERENCE = "dense", "minference"
# One pattern for all heads, with its usual numbers.
_UNIFORM: dict[str, Pattern] = {
    "a_shape": AShape(n_init=128, n_local=4096),
    "tri_shape": TriShape(n_init=128, n_local=4096, n_last=128),
    "vertical_slash": DEFAULT_PATTERN,
    "block_sparse": BlockSparse(num_blocks=100),
}
PREFILL_METHODS = (DENSE, *_UNIFORM, MINFERENCE)
# New tokens of a sequence or node from which on its attention is sparse: below, making a mask costs more than it saves.
# Measured on 2 cores with llama-125m (docs/sparse-prefill.md): with a fifth of attention every pattern is faster than
# dense at 2,048 tokens, and none by more than its spread at 1,024.
DENSE_BELOW = 2048


@dataclass(frozen=True)
class PrefillMethod:
    """What was named, before a model is known. ``text`` names it again."""

    text: str
    name: str
    pattern: Pattern | None = None  # of all heads; None where a file has one for each, and of ``dense``
    config: str | None = None  # that file, or the Hub id of the model that it is for
    dense_below: int = DENSE_BELOW

    @property
    def is_dense(self) -> bool:
        return self.name == DENSE

    def heads(self, model_name: str, config: ModelConfig) -> HeadPatterns:
        """A pattern for each head of a model. Raises InputError for a file that does not fit it."""
        if config.sliding_window is not None:
            raise InputError(
                f"prefill {self.text} was asked for, but {model_name} has a sliding window of {config.sliding_window} "
                "tokens; accepted for such a model: dense"
            )
        pattern = self.pattern
        if self.name == MINFERENCE:
            path = self._file(model_name)
            if path is not None:
                return read_head_config(path, config.num_layers, config.num_heads)
            pattern = DEFAULT_PATTERN
        return ((pattern,) * config.num_heads,) * config.num_layers

    def note(self, model_name: str) -> str | None:
        """What a person should know of the choice that was made for a model; None where there was none."""
        if self.name != MINFERENCE or self.config is not None or is_published(model_name):
            return None
        model_name = model_name or "this model"
        if (found := self._file(model_name)) is not None:
            return f"{model_name} is read by the published configuration of a model of its name, {found.name}"
        return (
            f"no published configuration for {model_name}: each head keeps {DEFAULT_PATTERN.num_vertical} verticals "
            f"and {DEFAULT_PATTERN.num_slash} slashes; tools/search_sparse_heads.py finds one"
        )

    def _file(self, model_name: str) -> Path | None:
        if self.config is None:
            return find_head_config(model_name)
        path = Path(self.config).expanduser()
        if path.is_file():
            return path
        if (found := find_head_config(self.config)) is None:
            raise InputError(
                f"prefill config {self.config!r} is no file and no known model; accepted: a JSON file, or one of "
                f"{', '.join(get_support_models())}"
            )
        return found


def method_order(text: str) -> tuple[object, ...]:
    """A key to sort methods by: as the registry has them, then those it has not."""
    name = text.partition(":")[0]
    return (PREFILL_METHODS.index(name) if name in PREFILL_METHODS else len(PREFILL_METHODS), text)


def check_prefill(text: str | None, model_name: str, config: ModelConfig) -> None:
    """Raises InputError for what names no method, or one that does not fit the model: before weights are loaded."""
    method = parse_prefill(text)
    if not method.is_dense:
        method.heads(model_name, config)


def parse_prefill(text: str | None) -> PrefillMethod:
    """What a text names; None is the dense method.

    Raises InputError for a method or an option that there is not, and for a value that it cannot have.
    """
    if text is not None and not isinstance(text, str):
        raise InputError(f"prefill is {text!r}; accepted: the name of a method, of {', '.join(PREFILL_METHODS)}")
    text = DENSE if text is None else text.strip()
    name, options = split_named(text)
    if name not in PREFILL_METHODS:
        raise InputError(
            f"prefill {text!r} is not known; accepted: {', '.join(PREFILL_METHODS)}, with options as in "
            "a_shape:n_init=128:n_local=4096"
        )
    what, pattern = f"prefill {text!r}", _UNIFORM.get(name)
    accepted = [] if name == DENSE else ["config"] if pattern is None else [field.name for field in fields(pattern)]
    found = read_options(what, options, [*accepted, "dense_below"] if accepted else [])
    config = found.pop("config", None)
    numbers = {key: read_integer(what, key, value) for key, value in found.items()}
    dense_below = numbers.pop("dense_below", DENSE_BELOW)
    if numbers:
        pattern = checked(what, lambda: replace(pattern, **numbers))
    return PrefillMethod(text, name, pattern, config, dense_below)
