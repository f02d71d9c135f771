"""The model that ships answers from the document, alike with and without sharing, and without attention by chance."""

import re
from pathlib import Path

import pytest
import torch
from asking import settings
from models import assert_close
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.bench.needles.needle_report import build_needle_rows
from engine.bench.needles.needle_results import NEEDLE_FILES
from engine.bench.needles.passkey_results import PASSKEY_FILES
from engine.bench.needles.run import run_needles
from engine.bench.needles.settings import SHIPPED_MODEL
from engine.bench.needles.words import COLORS
from engine.cli import make_console
from engine.distributed import TPGroup
from engine.llm import LLM
from engine.sampling import SamplingParams

METHODS = ("hydragen", "hydragen_noshared", "noattention")
GRID = "600words_2x3x2_7digits"
CHANCE = 0.06  # of 128 answers, of 76 colours: 1 in 3,000 times 8 are right by chance
ANSWER = re.compile(r"###(\w+)###")
SIZES = {"question_counts": (128,), "document_lengths": (12_000,), "num_few_shot": 5, "grid": GRID}


@pytest.fixture(scope="module")
def outdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("needles")
    run_needles(settings(path, METHODS, **SIZES), TPGroup(), make_console(quiet=True))
    return path


def test_needles(outdir):
    rows = {row.result.attention: row for row in build_needle_rows(NEEDLE_FILES.read_all([outdir]))}
    assert set(rows) == set(METHODS)
    result = rows["hydragen"].result
    assert result.num_document_tokens > 4096 and sum(result.asked_by_depth) == 128
    assert result.accuracy.interval[0] >= 0.95
    assert rows["hydragen"].same_answers == 128
    assert rows["noattention"].result.accuracy.share <= CHANCE


def test_without_the_needles_it_guesses():
    """Answers of the right form come from the examples; of the colours, each is one of 76."""
    document = settings(Path(), **SIZES).document(12_000)
    prompt = document.prompt
    for one in document.needles:
        prompt = prompt.replace(one.needle.sentence, "")
    assert prompt.count("has fur that is") == SIZES["num_few_shot"]  # those of the examples
    asked = document.ask(128)
    llm = LLM(SHIPPED_MODEL, device="cpu", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    texts = [found.outputs[0].text for found in llm.generate([prompt + one.needle.question for one in asked], params)]
    assert sum(one.needle.is_answered_by(text) for one, text in zip(asked, texts, strict=True)) <= CHANCE * len(asked)
    colors = {color.title() for color in COLORS}
    assert sum(match is not None and match[1] in colors for match in map(ANSWER.search, texts)) > 100


def test_passkeys(outdir):
    found = {(r.attention, r.length.num_words): r for r in PASSKEY_FILES.read_all([outdir])}
    assert set(found) == {(method, words) for method in METHODS for words in (512, 600)}
    for (method, _), result in found.items():
        assert result.exact.share == (0 if method == "noattention" else 1)


def test_two_ranks_answer_as_one(outdir, tmp_path):
    asked = settings(tmp_path, METHODS[:2], **SIZES)
    run_ranks(2, lambda group: run_needles(asked, group, make_console(quiet=True)))
    for method in METHODS[:2]:
        for name in ("12000c_128qs", "passkey_w512", "passkey_w600"):
            one, two = (folder / method / f"{name}.answers.jsonl" for folder in (outdir, tmp_path))
            assert one.read_text() == two.read_text()
    (result, _) = NEEDLE_FILES.read_all([tmp_path])
    assert result.environment["world_size"] == len(result.peak_bytes) == 2


def test_bfloat16_answers_too(tmp_path):
    run_needles(settings(tmp_path, dtype="bfloat16", **SIZES), TPGroup(), make_console(quiet=True))
    (needles,) = NEEDLE_FILES.read_all([tmp_path])
    assert needles.accuracy.share >= 0.95
    assert all(result.exact.share >= 0.75 for result in PASSKEY_FILES.read_all([tmp_path]))


def test_its_size():
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.iterdir()) <= 12e6


def test_logits_are_those_of_transformers():
    """Of a document's every token, and of the answer's as it is generated."""
    document = settings(Path(), **SIZES).document(12_000)
    prompt = document.prompt + document.needles[0].needle.question
    llm = LLM(SHIPPED_MODEL, device="cpu", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=10, prompt_logprobs=0, ignore_eos=True)
    (found,) = llm.generate([prompt], params, return_logits=True)
    ids = AutoTokenizer.from_pretrained(SHIPPED_MODEL)(prompt)["input_ids"]
    assert list(found.prompt_token_ids) == ids
    answer = found.outputs[0]
    assert document.needles[0].needle.is_answered_by(answer.text)
    reference = AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([[*ids, *answer.token_ids]])).logits[0]
    assert_close(answer.logits, logits[len(ids) - 1 : -1])
    logprobs = logits.log_softmax(-1)[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert_close(torch.tensor(found.prompt_logprobs[1:]), logprobs)
