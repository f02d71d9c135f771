"""A line of the file of results: how it is written, and what is read of it when a batch goes on."""

import json
import re
from dataclasses import dataclass
from typing import Any

from engine.batch.request import Origin

# Every line begins with it, and no other file's lines are likely to.
BEGINNING = b'{"id": "batch_req_'
_ID = re.compile(r"batch_req_([1-9][0-9]{0,15})")
_REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")

ANSWERED = 200
REFUSED = 400


@dataclass(frozen=True)
class Result:
    """What a line says of its request."""

    origin: Origin
    failed: bool


def result_line(origin: Origin, status_code: int, body: dict[str, Any]) -> bytes:
    """In the shape of OpenAI's batch API; ``id`` holds the number of the request's line."""
    response = {"status_code": status_code, "request_id": origin.request_id, "body": body}
    record = {"id": f"batch_req_{origin.line}", "custom_id": origin.custom_id, "response": response, "error": None}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_result(line: bytes) -> Result:
    """Raises ValueError for what ``result_line`` has not written."""
    try:
        record = json.loads(line)
        response, custom_id = record["response"], record["custom_id"]
        number, request_id = int(_ID.fullmatch(record["id"])[1]), _REQUEST_ID.fullmatch(response["request_id"])[0]
        if custom_id is not None:
            custom_id.encode()
        failed = {ANSWERED: False, REFUSED: True}[response["status_code"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a result") from error
    return Result(Origin(number, request_id, custom_id), failed)
