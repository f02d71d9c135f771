"""The error of one request, which is answered with it while the batch goes on."""

from typing import Any

from engine.errors import InputError
from engine.messages import one_line, shown


class RefusedError(InputError):
    """A request cannot be served. ``param`` is the field at fault, where it is one."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


def refused(name: str, given: object, accepted: str) -> RefusedError:
    """The error to raise for a field whose value cannot be used."""
    return RefusedError(f"{one_line(name)} is {shown(given)}; accepted: {accepted}", one_line(name))


def error_body(error: InputError) -> dict[str, Any]:
    """What OpenAI's API answers a request with that it refuses."""
    param = error.param if isinstance(error, RefusedError) else None
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": param, "code": None}}
