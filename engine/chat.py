"""Conversations as text: the chat template that came with a model, rendered in a sandbox.

A template is a jinja2 program from the model's folder. It sees the messages, a few functions and the special tokens,
and nothing of this process.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.tokenizer import TOKENIZER_CONFIG_FILE, read_tokenizer_config

# {"role": ..., "content": ...}: content is text or a list of {"type": "text", "text": ...}
Message = Mapping[str, Any]

# More than any model's context holds. A template that goes on for ever stops here.
MAX_CHARACTERS = 2**24

_TEMPLATE_FILE = "chat_template.jinja"
_ACCEPTED = 'a list of {"role": "user", "content": "text"}'


class ChatTemplate:
    """A compiled template.

    Args:
        source: in jinja2's language, with the extensions of ``_environment``.
        special_tokens: by the names that templates use, such as ``bos_token``.
        origin: the file that it came from, for messages.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: Path | str) -> None:
        from jinja2 import TemplateSyntaxError  # here, as few programs chat

        self._special_tokens = dict(special_tokens)
        self._origin = origin
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            line = f"line {error.lineno} of the chat template"
            raise InputError(f"{origin}: {line} does not parse: {_one_line(error)}; fetch it again") from error
        except Exception as error:  # what Python's own compiler raises for a template that no one can have meant
            raise InputError(f"{origin}: the chat template does not compile: {_one_line(error)}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate":
        """A model's: ``chat_template.jinja``, else that in ``tokenizer_config.json``. Raises InputError without one."""
        config = read_tokenizer_config(folder)
        path = folder / _TEMPLATE_FILE
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path} is not UTF-8 text; fetch it again") from None
        else:
            path = folder / TOKENIZER_CONFIG_FILE
            source = _default_template(config.get("chat_template"), path)
        return cls(source, _special_tokens(config), path)

    def render_all(
        self, conversations: Sequence[Message] | Sequence[Sequence[Message]], now: datetime, **options: bool
    ) -> list[str]:
        """The texts of one conversation, or of each of a list of them, as ``render`` makes it; errors say of which."""
        if isinstance(conversations, str | Mapping) or not isinstance(conversations, Sequence):
            raise InputError(f"conversations are a {type(conversations).__name__}; accepted: {_ACCEPTED}, or several")
        if not conversations or isinstance(conversations[0], Mapping):
            return [self.render(conversations, now, **options)]
        texts = []
        for number, conversation in enumerate(conversations):
            try:
                texts.append(self.render(conversation, now, **options))
            except InputError as error:
                raise InputError(f"conversation {number}: {error}") from error
        return texts

    def render(self, conversation: Sequence[Message], now: datetime, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included: encode it without adding any.

        ``now`` is the time for templates that state the date. With ``add_generation_prompt`` the text ends where the
        assistant's answer begins. Raises InputError for what are no messages, or none that the template takes.
        """
        variables = self._special_tokens | {
            "messages": plain_messages(conversation),
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise _TooLarge
        except _Refused as error:
            raise InputError(f"{self._origin}: the chat template refuses the messages: {_one_line(error)}") from error
        except _TooLarge:
            raise InputError(
                f"{self._origin}: the chat template makes more than {MAX_CHARACTERS:,} characters of the messages; "
                "accepted: at most that many; shorten the messages, or use another template"
            ) from None
        except Exception as error:  # the template is a program: it can raise whatever a program can
            raise InputError(
                f"{self._origin}: the chat template fails: {_one_line(error)}; accepted: messages of the form that it "
                "expects; change them, or use another template"
            ) from error
        return "".join(pieces)


def plain_messages(conversation: object) -> list[dict[str, Any]]:
    """A copy of the messages, each content as one text. Raises InputError for anything else than messages."""
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
        raise InputError(f"messages are a {type(conversation).__name__}; accepted: {_ACCEPTED}")
    if not conversation:
        raise InputError(f"messages are empty; accepted: {_ACCEPTED}; give one or more")
    return [_plain_message(message, f"message {number}") for number, message in enumerate(conversation)]


def _plain_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is a {type(message).__name__}; accepted: {_ACCEPTED}")
    for name in ("role", "content"):
        if name not in message:
            raise InputError(f"{where} has no {name}; accepted: {_ACCEPTED}")
    if not isinstance(message["role"], str):
        raise InputError(f"{where}: role is {message['role']!r:.60}; accepted: text, such as user; correct it")
    try:
        # A template may look into whatever a message holds: it gets plain values, and none that is used elsewhere.
        rest = json.loads(json.dumps({name: value for name, value in message.items() if name != "content"}))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} holds what is not JSON ({_one_line(error)}); accepted: {_ACCEPTED}") from None
    return rest | {"content": _text_of(message["content"], where)}


def _text_of(content: object, where: str) -> str:
    """Parts are joined as they are: most templates take a text only, and those that take parts join them so."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InputError(f"{where}: content is {content!r:.60}; accepted: text, or a list of text parts; correct it")
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise InputError(
                f'{where}: content holds {part!r:.60}; accepted: {{"type": "text", "text": "..."}}; leave others out'
            )
    return "".join(part["text"] for part in content)


def _default_template(value: object, path: Path) -> str:
    """The template in a tokenizer's config: the only one, or of several the one named default."""
    if isinstance(value, list):
        named = {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, dict)}
        if "default" not in named:
            raise InputError(
                f"{path} has chat templates named {', '.join(named) or 'nothing'}; accepted: one named "
                f"default; put the one to use into {_TEMPLATE_FILE} beside it"
            )
        value = named["default"]
    if value is None:
        raise InputError(
            f"{path.parent} has no chat template, neither {_TEMPLATE_FILE} nor chat_template in {path.name}; use a "
            "model that was trained to chat, add its template, or give whole prompts in place of messages"
        )
    if not isinstance(value, str):
        raise InputError(f"{path}: chat_template is a {type(value).__name__}; accepted: text; fetch it again")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every field such as ``bos_token``, whose value is the token's text or an object that holds it."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


class _Refused(Exception):
    """What a template raises on purpose; the message is its own."""


class _TooLarge(Exception):
    """A template made more than ``MAX_CHARACTERS``."""


@cache
def _environment() -> Any:
    """What published templates are written for: jinja2 with loop controls, and the functions and the tag below."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}``: marks the assistant's words for training, and changes nothing of the text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        """Does not multiply text, lists or powers beyond all bounds, which would not end or take all memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            if operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
                raise _TooLarge
            sizes = [len(x) if isinstance(x, str | list | tuple) else None for x in (left, right)]
            if operator == "*" and sizes.count(None) == 1:
                size, times = (sizes[0], right) if sizes[1] is None else (sizes[1], left)
                if size * times > MAX_CHARACTERS:
                    raise _TooLarge
            return super().call_binop(context, operator, left, right)

    def check_name(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name}: such names have a meaning to Python")

    class PlainNamespace(Namespace):
        """Holds no names that Python or jinja2 look up on any object, which could lead out of the sandbox."""

        def __init__(self, *args, **kwargs):
            attributes = dict(*args, **kwargs)
            for name in attributes:
                check_name(name)
            super().__init__(attributes)

        def __setitem__(self, name, value):
            check_name(name)
            super().__setitem__(name, value)

    def raise_exception(message: object) -> None:
        raise _Refused(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """Unlike jinja2's own, for a page of HTML, it escapes nothing."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    del environment.globals["lipsum"]  # as much text as is asked for, which no conversation needs
    environment.globals |= {"raise_exception": raise_exception, "namespace": PlainNamespace}
    return environment


def _one_line(error: Exception) -> str:
    """Its message, or its kind where it has none; a template's may be of any length and form."""
    return " ".join(str(error).split())[:300] or type(error).__name__
