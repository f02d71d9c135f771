import json

import pytest

from engine.errors import InputError
from engine.llm import PromptLevels
from engine.prompts import parse_conversations, parse_levels, read_conversations, read_prompts


class TestLevels:
    def test_each_level_divides_over_the_one_above(self):
        levels = parse_levels(["You are a poet. ", "Write of |Sing of ", "rain|wind|the sea|dust"])
        assert levels == PromptLevels(
            [["You are a poet. "], ["Write of ", "Sing of "], ["rain", "wind", "the sea", "dust"]]
        )

    def test_an_entry_may_be_empty_where_the_whole_is_not(self):
        assert parse_levels(["", "a|b"]) == PromptLevels([[""], ["a", "b"]])
        assert parse_levels(["a", "|b"]) == PromptLevels([["a"], ["", "b"]])

    @pytest.mark.parametrize(
        ("levels", "message"),
        [
            ([""], "prompt 0 of 1 is empty; accepted: text"),
            (["a||b"], "prompt 1 of 3 is empty"),
            (["|a", "x||y|z"], "prompt 1 of 4 is empty"),
            (["a|b", "x|y|z"], "3 prompts do not divide evenly over the 2 of the level above; accepted: a multiple"),
            (["a|b|c", "x"], "1 prompts do not divide evenly over the 3"),
        ],
    )
    def test_mistakes(self, levels, message):
        with pytest.raises(InputError, match=message):
            parse_levels(levels)


class TestFile:
    @pytest.fixture
    def read(self, tmp_path):
        def write_and_read(name, content):
            path = tmp_path / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return read_prompts(path)

        return write_and_read

    @pytest.mark.parametrize("name", ["p.txt", "p", "p.md"])
    def test_text_is_one_prompt_a_line(self, read, name):
        content = " one \r\n\n  \ntwo\u2028still two\x0cand still\nthree"
        assert read(name, content) == [" one ", "two\u2028still two\x0cand still", "three"]

    def test_json_lines(self, read):
        lines = ['"one\\ntwo"', "", "[3, 4]", '{"prompt": "five", "id": 5}', '{"prompt": [6]}']
        assert read("p.jsonl", "\n".join(lines)) == ["one\ntwo", [3, 4], "five", [6]]

    def test_a_byte_order_mark_is_no_text(self, read):
        assert read("p.txt", b"\xef\xbb\xbfone") == ["one"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.txt", "", "p.txt holds no prompts; give a file with one prompt a line"),
            ("p.txt", " \n\n", "p.txt holds no prompts"),
            ("p.txt", b"\xff\xfe", "p.txt is not UTF-8 text"),
            ("p.jsonl", '"a"\n\n{"prompt": "b"', r"p.jsonl, line 3: not JSON \(.*\); accepted: .* one JSON string"),
            ("p.jsonl", "plain text", "p.jsonl, line 1: not JSON"),
            ("p.jsonl", '"a"\n{"text": "b"}', "p.jsonl, line 2: holds no prompt; accepted"),
            ("p.jsonl", '{"messages": []}', r"line 1: holds no prompt; accepted: .* \(or messages, with --chat\)"),
            ("p.jsonl", "3", "line 1: holds no prompt"),
            ("p.jsonl", "[1, 2.5]", "line 1: holds no prompt"),
            ("p.jsonl", "[true]", "line 1: holds no prompt"),
            ("p.jsonl", "null", "line 1: holds no prompt"),
            ("p.jsonl", '"a"\n""', "line 2: the prompt is empty; accepted: text, or one token id or more"),
            ("p.jsonl", "[]", "line 1: the prompt is empty"),
        ],
    )
    def test_mistakes(self, read, name, content, message):
        with pytest.raises(InputError, match=message):
            read(name, content)

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match="nowhere.txt does not exist; give a file"):
            read_prompts(tmp_path / "nowhere.txt")
        with pytest.raises(InputError, match="is a directory; give a file"):
            read_prompts(tmp_path)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


BRIEF = {"role": "system", "content": "Be brief."}


class TestConversations:
    @pytest.fixture
    def read(self, tmp_path):
        def write_and_read(name, content, system=None):
            (tmp_path / name).write_text(content)
            return read_conversations(tmp_path / name, system)

        return write_and_read

    def test_a_level_of_messages(self):
        assert parse_conversations(["one|two"]) == [[user("one")], [user("two")]]
        assert parse_conversations(["one"], "Be brief.") == [[BRIEF, user("one")]]

    @pytest.mark.parametrize(
        ("levels", "message"),
        [
            (["a", "b|c"], "--chat with 2 levels of --prompts: the chat template ends .*; accepted: one level"),
            (["a|"], "prompt 1 of 2 is empty"),
        ],
    )
    def test_mistakes_in_levels(self, levels, message):
        with pytest.raises(InputError, match=message):
            parse_conversations(levels)

    def test_lines(self, read):
        assert read("p.txt", "one\n\n two ") == [[user("one")], [user(" two ")]]
        assert read("p.txt", "one", "Be brief.") == [[BRIEF, user("one")]]

    def test_json_lines(self, read):
        turns = [user("one"), {"role": "assistant", "content": "1"}, user("two")]
        whole = json.dumps({"messages": turns, "id": 3})
        assert read("p.jsonl", f'"a\\nb"\n{{"prompt": "c"}}\n{whole}') == [[user("a\nb")], [user("c")], turns]
        assert read("p.jsonl", f'"a"\n{whole}', "Be brief.") == [[BRIEF, user("a")], [BRIEF, *turns]]
        assert read("p.jsonl", json.dumps({"messages": [BRIEF, user("x")]})) == [[BRIEF, user("x")]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "p.jsonl holds no prompts; give a file with one message a line"),
            ('"a"\n{bad', r"p.jsonl, line 2: not JSON \(.*\); accepted: one message a line"),
            ("[3, 4]", "line 1: holds no message; accepted: one message a line"),
            ('{"prompt": [3]}', "line 1: holds no message"),
            ('{"text": "b"}', "line 1: holds no message"),
            ('""', "line 1: the message is empty"),
            ('"a"\n{"messages": []}', "line 2: messages are empty"),
            ('{"messages": [{"role": "user"}]}', "line 1: message 0 has no content"),
        ],
    )
    def test_mistakes_in_a_file(self, read, content, message):
        with pytest.raises(InputError, match=message):
            read("p.jsonl", content)

    def test_two_system_messages(self, read):
        with pytest.raises(InputError, match="line 1: has a system message, and --system gives another; leave one of"):
            read("p.jsonl", json.dumps({"messages": [BRIEF, user("x")]}), "Be kind.")
