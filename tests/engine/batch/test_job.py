"""A batch with a model: what it answers, and that this depends on nothing but the request."""

import json
from datetime import datetime

import pytest
from batches import bodies, chat, completion, message, results, save_chat_model, write_batch
from ranks import run_ranks

from engine import LLM, SamplingParams
from engine.batch.job import BatchJob
from engine.batch.request import Defaults
from engine.batch.tally import Tally
from engine.batch.window import WindowSize
from engine.distributed import TPGroup
from engine.errors import InputError

SHARED = "A long beginning that they share, and then "
IDS = {"return_token_ids": True}  # most random bytes are no text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, device="cpu")


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
def answer(llm, paths):
    """Runs the lines, if there are any, or those of the call before."""

    def run(*lines, llm=llm, group=None, on_progress=lambda tally: None, **options) -> Tally:
        if lines:
            write_batch(paths[0], *lines)
        with BatchJob(*paths, group or TPGroup(), **options) as job:
            job.run(llm, "tiny", on_progress)
            return job.tally

    return run


def texts(body: dict) -> list[str]:
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]]


class TestAnswers:
    def test_are_those_of_the_engine(self, answer, llm, paths):
        fields = dict(n=2, seed=5, temperature=0.7, top_p=0.9, stop=["q"])
        tally = answer(completion("a", "Once upon", model="mine", **fields), completion("b", [70, 80], temperature=0))
        params = SamplingParams(n=2, seed=5, temperature=0.7, top_p=0.9, stop=("q",), max_tokens=4)
        (first,) = llm.generate(["Once upon"], params)
        (second,) = llm.generate([[70, 80]], SamplingParams(temperature=0, max_tokens=4))
        found = results(paths[1])
        assert found[1]["response"]["status_code"] == 200 and found[1]["error"] is None
        assert found[1]["response"]["body"] == {
            "id": "cmpl-" + found[1]["response"]["request_id"],
            "object": "text_completion",
            "created": 0,
            "model": "mine",
            "choices": [
                {"index": i, "text": sample.text, "logprobs": None, "finish_reason": sample.finish_reason}
                for i, sample in enumerate(first.outputs)
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18},
        }
        assert found[2]["response"]["body"]["model"] == "tiny"
        assert texts(found[2]["response"]["body"]) == [second.outputs[0].text]
        assert (tally.num_requests, tally.num_finished, tally.num_failed, tally.num_resumed) == (2, 2, 0, 0)
        assert (tally.prompt_tokens, tally.new_tokens) == (12, 12) and tally.seconds > 0

    def test_of_conversations(self, answer, llm, paths):
        answer(chat("a", "Who?", n=2, seed=5, logprobs=True, top_logprobs=2))
        params = SamplingParams(n=2, seed=5, max_tokens=4, logprobs=2)
        (output,) = llm.chat([{"role": "user", "content": "Who?"}], params)
        body = bodies(paths[1])["a"]
        assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-req_")
        assert texts(body) == [sample.text for sample in output.outputs]
        first = body["choices"][0]
        assert first["message"]["role"] == "assistant" and first["message"]["refusal"] is None
        entries = first["logprobs"]["content"]
        assert [entry["logprob"] for entry in entries] == pytest.approx(output.outputs[0].logprobs, rel=1e-6)
        assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 4
        assert body["usage"] == {"prompt_tokens": 21, "completion_tokens": 8, "total_tokens": 29}

    def test_of_several_prompts(self, answer, paths):
        answer(
            completion("several", ["one", "two", "one"], n=2, seed=7),
            completion("alone", "one", n=2, seed=7),
            completion("ids", [[80, 81], [82]], seed=7),
        )
        found = bodies(paths[1])
        assert [choice["index"] for choice in found["several"]["choices"]] == [0, 1, 2, 3, 4, 5]
        one, _, again = (texts(found["several"])[i : i + 2] for i in (0, 2, 4))
        assert one == texts(found["alone"])
        assert again != one  # other draws, though it is the same prompt under the same seed
        assert len(found["ids"]["choices"]) == 2
        assert found["several"]["usage"] == {"prompt_tokens": 12, "completion_tokens": 24, "total_tokens": 36}

    def test_echo(self, answer, llm, paths):
        fields = dict(seed=3)
        ids = llm.encode("Once")
        answer(
            completion("a", ["Once", "Twice"], echo=True, **fields), completion("b", ["Once", "Twice"], **fields),
            completion("c", ids, echo=True, **fields),
        )  # fmt: skip
        found = bodies(paths[1])
        assert texts(found["a"]) == [before + after for before, after in zip(["Once", "Twice"], texts(found["b"]))]
        assert texts(found["c"]) == texts(found["a"])[:1]

    @pytest.mark.parametrize("max_tokens", [3, 0])
    def test_a_prompts_logprobs(self, answer, llm, paths, max_tokens):
        answer(completion("a", ["Once", "Twice"], echo=True, logprobs=2, seed=3, n=2, max_tokens=max_tokens))
        params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=2, seed=3, n=2)
        (output,) = llm.generate(["Once"], params)
        sample = output.outputs[1]
        body = bodies(paths[1])["a"]
        made = body["choices"][1]["logprobs"]
        assert body["choices"][1]["text"] == "Once" + (sample.text if max_tokens else "")
        assert body["usage"]["completion_tokens"] == 4 * max_tokens
        assert made["tokens"][:5] == ["<s>", "O", "n", "c", "e"]
        assert made["text_offset"][:6] == [0, 0, 1, 2, 3, 4][: 5 + max_tokens]
        expected = [*output.prompt_logprobs, *sample.logprobs[:max_tokens]]
        assert made["token_logprobs"][0] is expected[0] is None
        assert made["token_logprobs"][1:] == pytest.approx(expected[1:], rel=1e-5)
        likeliest = made["top_logprobs"]
        assert likeliest[0] is None and max(likeliest[1].values()) >= made["token_logprobs"][1] == likeliest[1]["O"]
        assert {len(made[name]) for name in made} == {5 + max_tokens}

    def test_token_ids_where_they_are_asked_for(self, answer, llm, paths):
        answer(completion("a", "one", seed=3, return_token_ids=True), chat("b", "one", return_token_ids=True))
        (output,) = llm.generate(["one"], SamplingParams(seed=3, max_tokens=4))
        found = bodies(paths[1])
        assert found["a"]["choices"][0]["token_ids"] == list(output.outputs[0].token_ids)
        assert len(found["b"]["choices"][0]["token_ids"]) == 4

    def test_logprobs(self, answer, llm, paths):
        answer(completion("a", "one", seed=3, logprobs=2))
        (output,) = llm.generate(["one"], SamplingParams(seed=3, max_tokens=4, logprobs=2))
        made = bodies(paths[1])["a"]["choices"][0]["logprobs"]
        assert made["token_logprobs"] == pytest.approx(output.outputs[0].logprobs, rel=1e-6)
        assert [len(step) for step in made["top_logprobs"]] == [len(step) for step in output.outputs[0].top_logprobs]
        assert len(made["tokens"]) == len(made["text_offset"]) == 4

    def test_chat_is_as_long_as_the_positions_allow(self, answer, llm, paths):
        room = llm.config.max_positions - 1
        length = room - len(llm.encode_chat([{"role": "user", "content": ""}], datetime.now()))
        long = chat("long", "x" * length, max_tokens=None, ignore_eos=True)
        answer(long, chat("short", "x", max_tokens=None, ignore_eos=True), defaults=Defaults(max_tokens=3))
        found = bodies(paths[1])
        assert found["long"]["usage"]["completion_tokens"] == 1
        assert found["short"]["usage"]["completion_tokens"] == 3

    def test_a_model_without_a_tokenizer(self, answer, paths):
        random = LLM("tiny", load_format="dummy", device="cpu")
        answer(
            completion("ids", [5, 6]), completion("text", "one"), chat("chat", "one"),
            completion("stop", [5], stop="x"), completion("logprobs", [5], logprobs=0),
            completion("echo", [5], echo=True), llm=random,
        )  # fmt: skip
        found = bodies(paths[1])
        (choice,) = found["ids"]["choices"]
        assert choice["text"] is None and len(choice["token_ids"]) == 4
        for name in ("text", "stop", "logprobs", "echo"):
            assert "have no tokenizer" in found[name]["error"]["message"]
        assert found["stop"]["error"]["param"] == "stop"
        assert "have no chat template" in found["chat"]["error"]["message"]


class TestRefusals:
    def test_are_told_and_the_others_go_on(self, answer, llm, paths):
        vocab_size, positions = llm.config.vocab_size, llm.config.max_positions
        tally = answer(
            completion("good", "one"),
            b"{",
            completion("good", "two"),
            completion("field", "one", temperature="hot"),
            completion("ids", [5, vocab_size]),
            completion("long", "x" * positions),
            completion("stops", "one", stop_token_ids=[vocab_size]),
            completion("one of two", ["one", "x" * positions]),
            b'{"custom_id": "body"}',
            chat("fine", "one"),
        )
        found = results(paths[1])
        assert sorted(found) == list(range(1, 11))
        assert {number for number, record in found.items() if record["response"]["status_code"] == 200} == {1, 10}
        assert found[2]["custom_id"] is None and message(found[2]).startswith("line 2 is not JSON")
        assert message(found[3]) == "line 3: custom_id is that of line 1, too; give it another"
        assert message(found[4]) == "temperature is 'hot'; accepted: a number"
        assert f"holds token id {vocab_size}; accepted: 0 to {vocab_size - 1}" in message(found[5])
        assert f"has {positions + 1} tokens and is to get 4 more" in message(found[6])
        assert "stop_token_ids holds token id" in message(found[7])
        assert "and is to get 4 more" in message(found[8])
        assert message(found[9]) == "method is None; accepted: POST"
        assert found[4]["response"]["body"]["error"] == {
            "message": message(found[4]), "type": "invalid_request_error", "param": "temperature", "code": None
        }  # fmt: skip
        assert (tally.num_requests, tally.num_finished, tally.num_failed) == (10, 10, 8)

    def test_that_only_the_run_can_tell(self, answer, model, paths):
        small = LLM(model, device="cpu", cache_tokens=64)
        tally = answer(completion("a", "one"), completion("b", ["x" * 100, "y" * 100]), chat("c", "one"), llm=small)
        found = bodies(paths[1])
        assert texts(found["a"]) and texts(found["c"]) and "b" not in found
        assert (tally.num_finished, tally.num_failed, tally.num_unserved) == (2, 0, 1)
        assert tally.first_unserved.startswith("line 2: the prompt needs room for ")
        tally = answer(completion("a", "one"), completion("b", ["x" * 100, "y" * 100]), chat("c", "one"))
        assert len(texts(bodies(paths[1])["b"])) == 2 and (tally.num_resumed, tally.num_unserved) == (2, 0)


class TestIndependence:
    requests = [
        *(completion(f"{i}", f"{SHARED}{i}", temperature=1.5, **IDS) for i in range(6)),
        chat("chat", SHARED, temperature=1.5, **IDS),
        completion("n", SHARED, n=3, **IDS),
        completion("twice", f"{SHARED}0", seed=1, **IDS),
        completion("twice again", f"{SHARED}0", seed=1, **IDS),
        b"bad",
    ]

    @pytest.fixture
    def expected(self, answer, paths):
        answer(*self.requests)
        return {custom_id: body["choices"] for custom_id, body in bodies(paths[1]).items() if custom_id is not None}

    def check(self, paths, expected) -> None:
        found = {custom_id: body["choices"] for custom_id, body in bodies(paths[1]).items() if custom_id is not None}
        assert found == expected

    def test_of_windows(self, answer, paths, expected):
        for size in (1, 2, 5):
            answer(overwrite=True, window=WindowSize(num_requests=size))
            self.check(paths, expected)

    def test_of_the_other_lines(self, answer, paths, expected):
        answer(b"", *reversed(self.requests), completion("more", SHARED), overwrite=True)
        found = bodies(paths[1])
        assert {custom_id: found[custom_id]["choices"] for custom_id in expected} == expected

    def test_of_the_seed_where_there_is_one(self, answer, paths, expected):
        answer(overwrite=True, defaults=Defaults(seed=1))
        found = bodies(paths[1])
        same = {custom_id for custom_id in expected if found[custom_id]["choices"] == expected[custom_id]}
        assert same == {"twice", "twice again"}
        assert found["twice"]["choices"] == found["twice again"]["choices"]

    def test_of_the_number_of_ranks(self, answer, paths, model, expected):
        def work(group):
            return answer(llm=LLM(model, group=group), group=group, window=WindowSize(4), overwrite=True)

        tallies = run_ranks(2, work)
        self.check(paths, expected)
        assert [tally.num_finished for tally in tallies] == [11, 11]

    def test_of_being_stopped(self, answer, paths, expected):
        whole = paths[1].read_bytes()
        lines = whole.splitlines(keepends=True)
        for kept in (0, 1, 7, 10, 11):
            paths[1].write_bytes(b"".join(lines[:kept]) + (lines[kept][:50] if kept < 11 else b""))
            tally = answer()
            assert tally.num_resumed == kept and tally.num_finished == 11
            assert tally.num_failed == 1
            assert sorted(paths[1].read_bytes().splitlines()) == sorted(whole.splitlines())


class TestFiles:
    def test_results_of_another_file(self, answer, paths):
        answer(completion("a", "one"), completion("b", "two"))
        before = paths[1].read_bytes()
        for lines in (
            [completion("a", "one"), completion("c", "two")],
            [completion("a", "one"), completion("b", "three")],
            [completion("a", "one")],
            [completion("b", "two"), completion("a", "one")],
        ):
            with pytest.raises(InputError, match="out.jsonl answers .*in.jsonl.*--overwrite to drop them"):
                answer(*lines)
            assert paths[1].read_bytes() == before

    def test_more_requests_may_come(self, answer, paths):
        answer(completion("a", "one"))
        assert answer(completion("a", "one"), completion("b", "two")).num_resumed == 1
        assert len(results(paths[1])) == 2

    def test_a_result_that_is_there_twice(self, answer, paths):
        answer(completion("a", "one"))
        paths[1].write_bytes(paths[1].read_bytes() * 2)
        with pytest.raises(InputError, match="out.jsonl holds line 1's result twice; remove one of the two"):
            answer()

    def test_no_requests(self, answer, paths):
        with pytest.raises(InputError, match="in.jsonl holds no requests; accepted: a file with one request a line"):
            answer(b"", b" ")
        assert not paths[1].exists()

    def test_one_file_for_both(self, paths):
        write_batch(paths[0], completion("a", "one"))
        paths[1].symlink_to(paths[0])
        before = paths[0].read_bytes()
        for output in paths:
            with pytest.raises(InputError, match="is the file of requests, too; accepted: another file"):
                BatchJob(paths[0], output, TPGroup(), overwrite=True)
        assert paths[0].read_bytes() == before

    def test_mistakes_are_known_to_all_ranks(self, paths):
        def work(group):
            with pytest.raises(InputError, match="in.jsonl does not exist"):
                BatchJob(*paths, group)
            return True

        assert run_ranks(2, work) == [True, True]


class TestWriting:
    def test_results_are_there_as_soon_as_they_are_known(self, answer, paths):
        """One request ends with each step; whatever a step ended is in the file before the next."""
        lengths = [1, 2, 3, 5, 5]
        seen = []

        def look(tally: Tally) -> None:
            assert len(results(paths[1])) == tally.num_finished
            seen.append(tally.num_finished)

        lines = [completion(f"{n}", f"{SHARED}{n}", max_tokens=m, ignore_eos=True) for n, m in enumerate(lengths)]
        answer(b"bad", *lines, on_progress=look)
        assert [seen.index(count) for count in sorted(set(seen))] == [0, 1, 2, 3, 5]

    def test_a_failure_ends_all_ranks(self, answer, model, paths, monkeypatch):
        write_batch(paths[0], *(completion(f"{i}", "one", max_tokens=i + 1, ignore_eos=True) for i in range(8)))
        groups = []

        def no_room(tally: Tally) -> None:
            if tally.num_finished == 3:
                monkeypatch.setattr("os.write", lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left")))

        def work(group):
            groups.append(group)
            with pytest.raises(InputError, match="out.jsonl: No space left; the results in it are whole"):
                answer(llm=LLM(model, group=group), group=group, on_progress=no_room)
            return True

        assert run_ranks(2, work) == [True, True]
        assert len(results(paths[1])) == 3
        monkeypatch.undo()
        assert answer().num_resumed == 3

    def test_is_what_json_says(self, answer, paths):
        answer(completion("é\u2028\n", "one"))
        (line,) = paths[1].read_bytes().splitlines()
        assert json.loads(line)["custom_id"] == "é\u2028\n"
