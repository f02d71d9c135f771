import pytest

from engine.errors import InputError
from engine.llm import PromptLevels
from engine.prompts import parse_levels, read_prompts


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
