"""Made-up results of needles and passkeys."""

import json
from pathlib import Path

from engine.bench.needles.needle_results import NEEDLE_FILES, NeedlesResult, Questions
from engine.bench.needles.passkey_results import PASSKEY_FILES, PasskeyLength, PasskeyResult
from engine.bench.result_files import Status

_ENVIRONMENT = {"device": "cpu", "device_name": "a CPU", "dtype": "float32", "world_size": 2}


def needles_result(attention="hydragen", num_questions=20, num_right=19, tokens=1000, name=None, **changes):
    """Of questions spread evenly over the depths; those that are wrong are about the beginning."""
    asked = [num_questions // 10 + (depth < num_questions % 10) for depth in range(10)]
    right, wrong = list(asked), num_questions - num_right
    for depth in range(10):
        missed = min(right[depth], wrong)
        right[depth] -= missed
        wrong -= missed
    fields = {
        "questions": Questions(name or attention, tokens * 3, num_questions),
        "status": Status.OK,
        "model_name": "models/small",
        "model_digest": "0123456789ab",
        "attention": attention,
        "seed": 0,
        "environment": _ENVIRONMENT | changes.pop("env", {}),
        "haystack": "generated prose (seed 0)",
        "haystack_digest": "",
        "names": "seen",
        "num_document_tokens": tokens,
        "num_needles": 20,
        "num_few_shot": 5,
        "num_new_tokens": 10,
        "num_at_once": num_questions,
        "right_by_depth": tuple(right),
        "asked_by_depth": tuple(asked),
        "prefill_ms": (200.0,),
        "answer_ms": (40.0, 40.0, 40.0),
        "first_token_ms": (10.0, 10.0, 10.0),
        "run": "a",
    }
    return NeedlesResult(**fields | changes)


def passkey_result(num_words=512, exact=(2, 2, 1), name="hydragen", **changes):
    """Three depths, two keys at each; half of a key that is not exact is right."""
    fields = {
        "length": PasskeyLength(name, num_words),
        "status": Status.OK,
        "model_name": "models/small",
        "model_digest": "0123456789ab",
        "attention": name,
        "seed": 0,
        "environment": _ENVIRONMENT | changes.pop("env", {}),
        "haystack": "generated prose (seed 0)",
        "haystack_digest": "",
        "num_digits": 7,
        "num_repeats": 2,
        "depths": (0.0, 0.5, 1.0),
        "num_tokens": num_words + 100,
        "exact_by_depth": tuple(exact),
        "partial_by_depth": tuple(1 + count / 2 for count in exact),
        "total_ms": 1500.0,
    }
    return PasskeyResult(**fields | changes)


def write_needles(outdir: Path, result: NeedlesResult, token_ids=None) -> None:
    """With an answer for each question: ``token_ids``, or all alike."""
    NEEDLE_FILES.write(outdir, result)
    ids = token_ids or [[1, 2]] * result.questions.num_questions
    lines = [json.dumps({"token_ids": one}) for one in ids]
    result.questions.answers_path(outdir).write_text("\n".join(lines) + "\n")


def write_passkeys(outdir: Path, *results: PasskeyResult) -> None:
    for result in results:
        PASSKEY_FILES.write(outdir, result)
