"""A batch file in windows: so many requests that run together, and no more than memory is meant for."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.batch.endpoint import Body
from engine.batch.input_file import InputFile, Line
from engine.batch.ledger import Ledger
from engine.batch.refusal import RefusedError
from engine.batch.request import BatchRequest, Defaults, Origin, parse_line, read_body

# Bytes that a request takes until it is answered, roughly: of its line (as text, as JSON, as token ids), and of a token
# of a sample as Python's objects, those of its log-probabilities included.
_PER_BYTE = 4
_BYTES_PER_TOKEN = 3  # of a line, for log-probabilities of a prompt
_PER_SAMPLE = 4096
_PER_TOKEN = 64
_PER_LOGPROB = 128


@dataclass(frozen=True)
class WindowSize:
    """Whichever is reached first. The first request of a window is in it however large it is."""

    num_requests: int = 16384
    num_bytes: int = 1 << 30


@dataclass(frozen=True)
class Window:
    """Neighbouring requests of a file that have no results yet."""

    requests: list[BatchRequest]
    refused: list[tuple[Origin, RefusedError]]


def windows(
    file: InputFile, ledger: Ledger, defaults: Defaults, size: WindowSize, max_positions: int
) -> Iterator[Window]:
    """All requests of ``file`` that ``ledger`` has not as answered. ``max_positions`` are the model's."""
    window, num_bytes = Window([], []), 0
    for line in file.lines():
        if ledger.claim_again(line.number):
            continue
        request = _request(line, ledger, defaults)
        needed = _PER_BYTE * len(line.data or b"")
        if isinstance(request, BatchRequest):
            needed += _bytes_of_answer(request.body, len(line.data), max_positions)
        count = len(window.requests) + len(window.refused)
        if count == size.num_requests or (count and num_bytes + needed > size.num_bytes):
            yield window
            window, num_bytes = Window([], []), 0
        num_bytes += needed
        (window.requests if isinstance(request, BatchRequest) else window.refused).append(request)
    if window.requests or window.refused:
        yield window


def _request(line: Line, ledger: Ledger, defaults: Defaults) -> BatchRequest | tuple[Origin, RefusedError]:
    custom_id = None
    try:
        parsed = parse_line(line)
        custom_id = parsed.custom_id()
        if (first := ledger.claim(custom_id, line.number)) != line.number:
            raise RefusedError(f"line {line.number}: custom_id is that of line {first}, too; give it another")
        parsed.check()
        return BatchRequest(Origin(line.number, line.request_id, custom_id), read_body(parsed.value, defaults))
    except RefusedError as error:
        return Origin(line.number, line.request_id, custom_id), error


def _bytes_of_answer(body: Body, line_bytes: int, max_positions: int) -> int:
    """That it takes at most."""
    params = body.params
    per_token = _PER_TOKEN + _bytes_of_logprobs(params.logprobs)
    samples = body.num_prompts * params.n * (_PER_SAMPLE + min(params.max_tokens, max_positions) * per_token)
    return samples + line_bytes // _BYTES_PER_TOKEN * _bytes_of_logprobs(params.prompt_logprobs)


def _bytes_of_logprobs(count: int | None) -> int:
    """Of one token and its ``count`` likeliest ones."""
    return 0 if count is None else _PER_LOGPROB * (2 + count)
