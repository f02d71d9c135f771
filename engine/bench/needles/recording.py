"""How the results of needles and passkeys get to their files, with the answers beside them."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.bench.result_files import Result, ResultFiles, Status, print_warning
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.files import write_whole
from engine.memory import describe_out_of_memory, is_out_of_memory


def write_with_answers(
    files: ResultFiles, outdir: Path, result: Result, answers_path: Path, answers: Iterable[dict[str, Any]]
) -> None:
    """Writes the answers, one JSON object a line, then the result: that it is there says that both are."""
    lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    answers_path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(answers_path, ("\n".join(lines) + "\n").encode())
    files.write(outdir, result)


def is_recorded(files: ResultFiles, outdir: Path, key: Any) -> bool:
    """Whether there is a usable result, and, if it is ok, all of its answers. What is damaged is named on stderr."""
    if not files.is_finished(outdir, key):
        return False
    found = files.read(key.path(outdir))
    if found.status != Status.OK:
        return True
    path = key.answers_path(outdir)
    try:
        is_complete = path.read_bytes().count(b"\n") == found.num_answers
    except OSError:
        is_complete = False
    if not is_complete:
        print_warning(
            f"{path}: does not have the {found.num_answers} answers of {key.path(Path())}; it is measured again"
        )
    return is_complete


@contextmanager
def recorded_when_out_of_memory(
    files: ResultFiles, outdir: Path, blank: Result, group: TPGroup, what: str, remedy: str
) -> Iterator[None]:
    """Running out of memory inside is recorded for ``blank`` and raises InputError: the next run goes on after it.
    Other ranks may be waiting for this one, so there is no going on together."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = describe_out_of_memory(error)
        files.write(outdir, replace(blank, status=Status.OUT_OF_MEMORY, message=message))
        raise InputError(
            f"rank {group.rank} ran out of memory with {what}, which is recorded; run the same command again to go on "
            f"with the next one, or {remedy}"
        ) from error
