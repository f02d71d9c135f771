def test_a_token_reads_as_in_the_middle_of_a_text(texts):
    expected = ["<s>", " the", " cat", "s", "token_id:4", "token_id:5", " th", "the", " the"]
    assert [texts.of(i) for i in range(9)] == expected
    assert [texts.of(i) for i in (1, 1)] == [" the", " the"]


def test_a_prompts_text(texts):
    assert texts.whole([0, 1, 2, 3]) == "the cats"
    assert texts.whole("as it is") == "as it is"


def test_where_tokens_begin(texts):
    assert texts.offsets([1, 2, 3], "the cats") == [0, 3, 7]
    assert texts.offsets([1, 4, 5, 2], "theé cat") == [0, 3, 3, 4]
    assert texts.offsets([1, 2, 3], "the") == [0, 3, 3]  # a stop string has cut the rest off
    assert texts.offsets([0, 1], "the") == [0, 0]
