"""Prompts as a person writes them: levels on a command line, or a file."""

import json
from collections.abc import Sequence
from pathlib import Path

from engine.errors import InputError
from engine.llm import Prompt, PromptLevels

_FORMATS = "one prompt a line (.txt), or one JSON string, list of token ids or {\"prompt\": ...} a line (.jsonl)"


def parse_levels(levels: Sequence[str], separator: str = "|") -> PromptLevels:
    """Each of ``levels`` holds a level's prompts, separated by ``|``; a level divides evenly over the one above.

    ``["You are a poet. ", "Write of |Sing of ", "rain|wind|the sea|dust"]`` makes four sequences.
    """
    return PromptLevels([level.split(separator) for level in levels])


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: text, one a line; or JSON lines when its name ends in ``.jsonl``.

    Raises InputError, naming the line, for anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a file with {_FORMATS}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give a file with {_FORMATS}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
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
    return value
