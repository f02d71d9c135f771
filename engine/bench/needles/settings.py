"""What a run of ``scripts/needles.py`` is to do, and the texts that follow from it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from engine.attention import get_method
from engine.bench.environment import Execution
from engine.bench.modes import ModelOptions
from engine.bench.needles.document import MAX_NEEDLES, Document, make_document
from engine.bench.needles.haystack import Haystack, generated_haystack, read_haystack
from engine.bench.needles.needle import held_out_names, names_for_training
from engine.bench.needles.passkey_grid import PasskeyGrid
from engine.errors import InputError

_ROOT = Path(__file__).resolve().parents[3]
# The retrieval model that ships with the project; training/ is how it came about.
SHIPPED_MODEL = _ROOT / "assets" / "retrieval-1m"
NAMES = ("seen", "unseen")
# Generated for each question: the answer, and room for tokenizers that need more tokens for it than the shipped one.
NUM_NEW_TOKENS = 10
_CHARACTERS_A_WORD = 8  # of a haystack, at most on average
_CHARACTERS_A_TOKEN = 16  # likewise
# Of text around each needle, which is half as long: a document is to consist of text.
_CHARACTERS_A_NEEDLE = 75
_MAX_NAME_BYTES = 200


def portable_name(model: str) -> str:
    """A model's name; of the shipped one a path that is the same on every machine."""
    return str(SHIPPED_MODEL.relative_to(_ROOT)) if Path(model) == SHIPPED_MODEL else model


@dataclass(frozen=True)
class Settings:
    """Questions are asked by each method of ``attention``, turn by turn; a grid too, one after another.

    ``haystack_start`` is the fraction of the file's sentences that documents leave out, before they begin.
    """

    outdir: Path
    save_name: str | None
    model: ModelOptions
    attention: tuple[str, ...]
    question_counts: tuple[int, ...]
    document_lengths: tuple[int, ...]  # in characters
    num_few_shot: int
    num_iters: int
    num_warmup: int
    measure_first_token: bool
    grid: PasskeyGrid | None
    haystack_file: Path | None = None
    haystack_start: float = 0.0
    names: str = "seen"
    seed: int = 0
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self):
        for name in self.attention:
            get_method(name)
        if len(set(self.attention)) < len(self.attention):
            raise InputError(f"attention {','.join(self.attention)} names a method twice; accepted: each once")
        if self.names not in NAMES:
            raise InputError(f"names {self.names!r} are not known; accepted: {', '.join(NAMES)}")
        if self.haystack_start and self.haystack_file is None:
            raise InputError(
                f"--haystack-start {self.haystack_start:g} was given without --haystack-file; accepted: both, or "
                "neither; leave it out, or name the file"
            )
        if self.save_name is not None and (
            Path(self.save_name).name != self.save_name
            or self.save_name.startswith(".")
            or not self.save_name
            or len(self.save_name.encode()) > _MAX_NAME_BYTES
        ):
            raise InputError(
                f"save name {self.save_name!r} cannot be a folder in the save directory; accepted: a plain name of up "
                f"to {_MAX_NAME_BYTES} bytes; use another"
            )

    @property
    def model_name(self) -> str:
        return portable_name(self.model.name)

    def run_name(self, method: str) -> str:
        """The folder of a method's results."""
        if self.save_name is None:
            return method
        return self.save_name if len(self.attention) == 1 else f"{self.save_name}_{method}"

    @cached_property
    def haystack(self) -> Haystack:
        """Raises InputError when its file cannot be used."""
        if self.haystack_file is not None:
            return read_haystack(self.haystack_file, self.haystack_start)
        words = 0 if self.grid is None else self.grid.max_words
        return generated_haystack(self.seed, max(*self.document_lengths, words * _CHARACTERS_A_WORD))

    def check_lengths(self, max_positions: int) -> None:
        """Raises InputError for texts that cannot be so few tokens, before they are generated."""
        longest = max(self.document_lengths)
        if longest > max_positions * _CHARACTERS_A_TOKEN:
            raise InputError(
                f"documents of {longest:,} characters were asked for; accepted: what fits {max_positions:,} tokens, "
                "the model's positions; use a shorter --base-prompt-string-length"
            )
        if self.grid is not None and self.grid.max_words > max_positions:
            raise InputError(
                f"passkeys in {self.grid.max_words:,} words were asked for; accepted: what fits {max_positions:,} "
                "tokens, the model's positions; use a smaller --passkey-grid"
            )

    def document(self, num_characters: int) -> Document:
        """Which needles it has depends on its length alone, not on how many questions are asked.

        Raises InputError when there are not enough names for the examples, or the haystack is too short.
        """
        names = names_for_training() if self.names == "seen" else held_out_names()
        most = max(1, num_characters // _CHARACTERS_A_NEEDLE)
        num_needles = min(most, MAX_NEEDLES, len(names) - self.num_few_shot)
        if num_needles < 1:
            raise InputError(
                f"{self.num_few_shot} examples were asked for; accepted: up to {len(names) - 1}, as there are "
                f"{len(names)} names; use fewer"
            )
        return make_document(self.haystack, num_characters, num_needles, self.num_few_shot, names, self.seed)
