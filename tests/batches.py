"""Batch files, and what came of them."""

import json
from pathlib import Path

from checkpoints import save_tiny

# A prompt for an answer at the end, as models expect it.
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def save_chat_model(folder: Path) -> Path:
    """The tiny model with its tokenizer of bytes, and a chat template."""
    save_tiny(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


def completion(custom_id: str, prompt: object, **body: object) -> dict:
    """A request of four new tokens, if ``body`` does not say otherwise."""
    return _request(custom_id, "/v1/completions", {"prompt": prompt, "max_tokens": 4} | body)


def chat(custom_id: str, content: str, **body: object) -> dict:
    """A request for an answer of four tokens, if ``body`` does not say otherwise."""
    messages = [{"role": "user", "content": content}]
    return _request(custom_id, "/v1/chat/completions", {"messages": messages, "max_tokens": 4} | body)


def write_batch(path: Path, *lines: dict | bytes) -> Path:
    """Requests, and lines that are none."""
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def results(path: Path) -> dict[int, dict]:
    """The results by the numbers of their requests' lines. Asserts that they are whole, and none is there twice."""
    text = path.read_text()
    assert text.endswith("\n") or not text
    found = {}
    for line in text.split("\n")[:-1]:
        record = json.loads(line)
        number = int(record["id"].removeprefix("batch_req_"))
        assert number not in found
        found[number] = record
    return found


def bodies(path: Path) -> dict[str, dict]:
    """The answers' bodies by ``custom_id``, errors included."""
    return {record["custom_id"]: record["response"]["body"] for record in results(path).values()}


def message(record: dict) -> str:
    """Of a request that was refused."""
    assert record["response"]["status_code"] == 400
    return record["response"]["body"]["error"]["message"]


def _request(custom_id: str, url: str, body: dict) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
