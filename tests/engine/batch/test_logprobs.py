import math

from engine.batch.logprobs import ScoredText, chat_logprobs, completion_logprobs
from engine.llm import CompletionOutput


class TestCompletion:
    def test_one_text(self, texts):
        top = ({1: -0.5, 7: -2.0}, {6: -0.25, 2: -math.inf})
        assert completion_logprobs([ScoredText("the cat", [1, 2], [-0.5, -1.0], top)], texts) == {
            "tokens": [" the", " cat"],
            "token_logprobs": [-0.5, -1.0],
            "top_logprobs": [{" the": -0.5, "the": -2.0}, {" th": -0.25, " cat": -9999.0}],
            "text_offset": [0, 3],
        }

    def test_after_a_prompt(self, texts):
        parts = [ScoredText("the", [0, 1], [None, -1.0], [None, {1: -1.0}]), ScoredText("s", [3], [-2.0], [{3: -2.0}])]
        assert completion_logprobs(parts, texts) == {
            "tokens": ["<s>", " the", "s"],
            "token_logprobs": [None, -1.0, -2.0],
            "top_logprobs": [None, {" the": -1.0}, {"s": -2.0}],
            "text_offset": [0, 0, 3],
        }

    def test_of_the_tokens_alone(self, texts):
        made = completion_logprobs([ScoredText("the", [1], [-4.158883094787598], None)], texts)
        assert made["top_logprobs"] is None
        assert made["token_logprobs"] == [-4.158883]  # the digits that float32 has

    def test_tokens_that_read_alike(self, texts):
        """The likeliest has the place."""
        made = completion_logprobs([ScoredText("the", [1], [-0.5], ({8: -0.25, 1: -0.5},))], texts)
        assert made["top_logprobs"] == [{" the": -0.25}]


def test_chat(texts):
    top = ({2: -0.25, 3: -0.3, 4: -0.5},)  # two were asked for, and the third is the chosen one
    output = CompletionOutput(0, "", (4,), (-0.5,), top, "length")
    assert chat_logprobs(output, 2, texts) == {
        "content": [
            {
                "token": "token_id:4",
                "logprob": -0.5,
                "bytes": None,
                "top_logprobs": [
                    {"token": " cat", "logprob": -0.25, "bytes": [32, 99, 97, 116]},
                    {"token": "s", "logprob": -0.3, "bytes": [115]},
                ],
            }
        ],
        "refusal": None,
    }
    (entry,) = chat_logprobs(CompletionOutput(0, "s", (3,), (-1.5,), None, "length"), 0, texts)["content"]
    assert entry == {"token": "s", "logprob": -1.5, "bytes": [115], "top_logprobs": []}
