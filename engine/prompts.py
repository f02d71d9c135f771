"""Prompts as a person writes them: levels on a command line, or a file. Each may be a message of a conversation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.chat import Message, plain_messages
from engine.errors import InputError
from engine.llm import Prompt, PromptLevels
from engine.shared_levels import even_parents

SEPARATOR = "|"
_FORMATS = 'one prompt a line (.txt), or one JSON string, list of token ids or {"prompt": ...} a line (.jsonl)'
_CHAT_FORMATS = 'one message a line (.txt), or one JSON string, {"prompt": ...} or {"messages": [...]} a line (.jsonl)'


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


def parse_conversations(levels: Sequence[str], system: str | None = None) -> list[list[Message]]:
    """A conversation for each prompt of the one level: the prompt is its user's message, after ``system`` where given.

    Raises InputError for several levels, and for an empty prompt.
    """
    if len(levels) > 1:
        raise InputError(
            f"--chat with {len(levels)} levels of --prompts: the chat template ends a message where its text ends, so "
            "no level below can go on with it; accepted: one level; write each message out (what they share is found)"
        )
    return [_conversation(text, system) for text in parse_levels(levels).levels[0]]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: text, one a line; or JSON lines when its name ends in ``.jsonl``. Blank lines are skipped.

    Raises InputError, naming the line, for anything else.
    """
    lines = _read_lines(path, _FORMATS)
    if path.suffix != ".jsonl":
        return [line for line, _ in lines]
    return [_parse_prompt(line, where) for line, where in lines]


def read_conversations(path: Path, system: str | None = None) -> list[list[Message]]:
    """The conversations of a file as of ``read_prompts``: a line is a user's message, after ``system`` where given.

    A JSON line may also hold whole ``{"messages": [...]}``. Raises InputError, naming the line, for anything else, and
    for such messages that begin with a system message where ``system`` is given.
    """
    lines = _read_lines(path, _CHAT_FORMATS)
    if path.suffix != ".jsonl":
        return [_conversation(line, system) for line, _ in lines]
    return [_parse_conversation(line, where, system) for line, where in lines]


def _read_lines(path: Path, formats: str) -> list[tuple[str, str]]:
    """The lines that are not blank, each with where it stands, for messages."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor may have put a byte order mark first
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a file with {formats}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give a file with {formats}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give a file with {formats}") from None
    # Not splitlines(): text may hold a form feed or a Unicode line separator, which ends no line.
    numbered = [(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} holds no prompts; give a file with {formats}")
    return numbered


def _parse_prompt(line: str, where: str) -> Prompt:
    value = _parse_json(line, where, _FORMATS)
    is_ids = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not isinstance(value, str) and not is_ids:
        chat = " (or messages, with --chat)" if isinstance(value, dict) and "messages" in value else ""
        raise InputError(f"{where}: holds no prompt; accepted: {_FORMATS}{chat}")
    if not value:
        raise InputError(f"{where}: the prompt is empty; accepted: text, or one token id or more; fill or remove it")
    return value


def _parse_conversation(line: str, where: str, system: str | None) -> list[Message]:
    value = _parse_json(line, where, _CHAT_FORMATS)
    if isinstance(value, dict) and "messages" in value:
        try:
            messages = plain_messages(value["messages"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if system is not None and messages[0]["role"] == "system":
            raise InputError(f"{where}: has a system message, and --system gives another; leave one of them out")
        return [*_opening(system), *messages]
    if not isinstance(value, str):
        raise InputError(f"{where}: holds no message; accepted: {_CHAT_FORMATS}")
    if not value:
        raise InputError(f"{where}: the message is empty; accepted: text; fill or remove it")
    return _conversation(value, system)


def _parse_json(line: str, where: str, formats: str) -> Any:
    """The line's value, or that under its key ``prompt``."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); accepted: {formats}") from None
    return value["prompt"] if isinstance(value, dict) and "prompt" in value else value


def _conversation(text: str, system: str | None) -> list[Message]:
    return [*_opening(system), {"role": "user", "content": text}]


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]
