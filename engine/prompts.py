"""Prompts as a person writes them: levels on a command line, or a file."""

import json
from collections.abc import Sequence
from pathlib import Path

from engine.errors import InputError
from engine.llm import Prompt, PromptLevels
from engine.shared_levels import even_parents

SEPARATOR = "|"
_FORMATS = 'one prompt a line (.txt), or one JSON string, list of token ids or {"prompt": ...} a line (.jsonl)'


def parse_levels(levels: Sequence[str]) -> PromptLevels:
    """Each of ``levels`` holds a level's prompts, separated by ``|``; a level divides evenly over the one above.

    ``["You are a poet. ", "Write of |Sing of ", "rain|wind|the sea|dust"]`` makes four sequences. Raises InputError
    for a level that does not divide, and for a sequence without any text.
    """
    split = [level.split(SEPARATOR) for level in levels]
    texts = split[0]
    for above, below in zip(split, split[1:]):
        texts = [texts[owner] + text for owner, text in zip(even_parents(len(above), len(below)), below, strict=True)]
    if "" in texts:
        raise InputError(
            f"prompt {texts.index('')} of {len(texts)} is empty; accepted: text in at least one of its levels; "
            f"fill it, or remove the {SEPARATOR} that makes it"
        )
    return PromptLevels(split)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: text, one a line; or JSON lines when its name ends in ``.jsonl``. Blank lines are skipped.

    Raises InputError, naming the line, for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor may have put a byte order mark first
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a file with {_FORMATS}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give a file with {_FORMATS}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give a file with {_FORMATS}") from None
    # Not splitlines(): text may hold a form feed or a Unicode line separator, which ends no line.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} holds no prompts; give a file with {_FORMATS}")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_parse_line(line, f"{path}, line {number}") for number, line in numbered]


def _parse_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); accepted: {_FORMATS}") from None
    if isinstance(value, dict) and "prompt" in value:
        value = value["prompt"]
    is_ids = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not isinstance(value, str) and not is_ids:
        raise InputError(f"{where}: holds no prompt; accepted: {_FORMATS}")
    if not value:
        raise InputError(f"{where}: the prompt is empty; accepted: text, or one token id or more; fill or remove it")
    return value
