"""Stop strings are found token by token where decoding everything after every token would find them."""

import random
import string

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine.errors import InputError
from engine.sampling import SamplingParams
from engine.stopping import StopChecker, TextStream, cut_at_stop
from engine.tokenizer import Tokenizer

TEXTS = [
    "Hello world, hello there.\n\nQuestion: how long? Answer: so long!",
    "日本語のテキスト、終わり。 mixed with English 日本 words",
    "emoji 🙂🙃 in a row 👩‍👩‍👧 and é, ü, ñ; a word with 한국어",
    "  spaces   and\ttabs \n\n\n lines",
]
BOS = "<s>"


def byte_level() -> Tokenizer:
    """Pieces of bytes, as in Llama 3 and Qwen."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[BOS], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend, {"bos_token": BOS})


def byte_fallback(decoder: str) -> Tokenizer:
    """Pieces of text that begin with a space, and single bytes for all else, as in Llama 2."""
    letters = sorted(set(string.ascii_letters + string.punctuation + "é▁日"))
    words = ["▁Hello", "▁world", "▁hello", "▁th", "ere", "▁Question", "▁so", "▁long", "▁▁", "An", "swer", "本語", "ll"]
    pieces = ["<unk>", BOS, "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    # Long pieces first; a byte only where there is no letter.
    vocab = [(piece, -20.0 if piece.startswith("<") else -10.0 / len(piece)) for piece in pieces]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<unk>", BOS, "</s>"])
    if decoder == "metaspace":
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")])
    else:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, {"bos_token": BOS})


TOKENIZERS = {
    "byte level": byte_level,
    "byte fallback": lambda: byte_fallback("strip"),
    "metaspace": lambda: byte_fallback("metaspace"),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def bytewise():
    return byte_level()


def one_byte(tokenizer: Tokenizer, byte: int) -> int:
    """Its token. Byte-level pieces stand for bytes by characters, from 256 on for those that do not print."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    character = chr(byte) if byte in prints else chr(256 + byte - sum(other < byte for other in prints))
    found = (tokenizer._backend.token_to_id(piece) for piece in (f"<0x{byte:02X}>", character))
    return next(number for number in found if number is not None)


def one_byte_each(tokenizer: Tokenizer, text: str) -> list[int]:
    return [one_byte(tokenizer, byte) for byte in text.encode()]


def told(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(t) for t in token_ids]


def whole(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids).rstrip("\ufffd")


def first_end(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...]) -> int | None:
    """After how many tokens the text holds a stop string, decoding all of it every time."""
    counts = range(1, len(token_ids) + 1)
    return next((n for n in counts if any(s in whole(tokenizer, token_ids[:n]) for s in stop)), None)


def found_end(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...]) -> int | None:
    checker = StopChecker(tokenizer, stop)
    return next((n for n in range(1, len(token_ids) + 1) if checker.ends(token_ids[:n])), None)


def random_text(rng: random.Random) -> str:
    text = "".join(rng.choice(TEXTS)[rng.randrange(20) :][: rng.randrange(1, 25)] for _ in range(4))
    return text + "".join(rng.choices("ab 日🙂é\n", k=30))


class TestTextStream:
    def test_texts_join_to_the_whole(self, tokenizer):
        rng = random.Random(0)
        for text in (*TEXTS, *(random_text(rng) for _ in range(60))):
            # As bytes too, which no encoder would give: characters spread over up to four tokens.
            for token_ids in (tokenizer.encode(text), one_byte_each(tokenizer, text)):
                assert "".join(told(tokenizer, token_ids)) == whole(tokenizer, token_ids)

    def test_what_has_no_text_changes_nothing(self, tokenizer):
        rng = random.Random(1)
        nothing = [tokenizer.bos_token_id, tokenizer.vocab_size, 10**6]
        for _ in range(60):
            token_ids = tokenizer.encode(random_text(rng))
            for _ in range(rng.randrange(30)):
                token_ids.insert(rng.randrange(len(token_ids) + 1), rng.choice(nothing))
            assert "".join(told(tokenizer, token_ids)) == whole(tokenizer, token_ids)

    def test_leading_spaces_are_those_of_the_whole(self):
        tokenizer = byte_fallback("strip")
        hello, space = (tokenizer._backend.token_to_id(piece) for piece in ("▁Hello", "▁"))
        assert told(tokenizer, [hello, hello]) == ["Hello", " Hello"]
        assert told(tokenizer, [space, space, hello]) == ["", " ", " Hello"]
        assert told(tokenizer, [hello, *[tokenizer.bos_token_id] * 40, hello]) == ["Hello", *[""] * 40, " Hello"]

    def test_a_character_is_held_back_until_it_is_whole(self, bytewise):
        token_ids = [*bytewise.encode("a"), *one_byte_each(bytewise, "🙂é"), *bytewise.encode("b")]
        assert told(bytewise, token_ids) == ["a", "", "", "", "🙂", "", "é", "b"]

    def test_bytes_that_are_no_text_hold_nothing_up(self, bytewise):
        """Any bytes in any order: the texts are still those of the whole, and little is ever held back."""
        rng = random.Random(2)
        single = [one_byte(bytewise, byte) for byte in range(256)]
        for length in (1, 5, 40, 300):
            for choices in (range(256), range(128, 192), range(224, 256), (0xE6, 0x97, 0xA5, 0xF0, 0x9F)):
                token_ids = [single[rng.choice(choices)] for _ in range(length)]
                token_ids += bytewise.encode("日 ok")
                pieces = told(bytewise, token_ids)
                assert "".join(pieces) == whole(bytewise, token_ids)
                after_all_but_the_end = "".join(pieces[:-20])
                assert len(bytewise.decode(token_ids[:-20])) - len(after_all_but_the_end) <= 13

    @pytest.mark.parametrize("repeated", [b"a", b"\x80", b"\xf0\x9f", "日".encode(), b""], ids=repr)
    def test_the_cost_of_a_token_does_not_grow(self, bytewise, repeated):
        """However long the sequence is, and whether or not it is text: few tokens are decoded for one."""
        decoded = []

        class Counting:
            def decode(self, token_ids):
                decoded[-1] += len(token_ids)
                return bytewise.decode(token_ids)

        pieces = [one_byte(bytewise, byte) for byte in repeated] or [bytewise.bos_token_id]
        stream = TextStream(Counting())
        for _ in range(1000 // len(pieces)):
            for piece in pieces:
                decoded.append(0)
                stream.push(piece)
        assert max(decoded) <= 64


class TestStopChecker:
    def test_it_ends_where_decoding_everything_would(self, tokenizer):
        rng = random.Random(3)
        ends = []
        for number in range(300):
            text = random_text(rng)
            token_ids = tokenizer.encode(text) if number % 3 else one_byte_each(tokenizer, text)
            starts = [rng.randrange(len(text)) for _ in range(rng.randrange(1, 4))]
            stop = tuple(text[start:][: rng.randrange(1, 12)] for start in starts)
            ends.append(first_end(tokenizer, token_ids, stop))
            assert found_end(tokenizer, token_ids, stop) == ends[-1], (text, stop)
        assert sum(end is not None for end in ends) > 250
        assert sum(end is not None and end > 20 for end in ends) > 50

    def test_and_so_among_tokens_of_any_kind(self, tokenizer):
        """No text that a model would write: runs of broken characters, special tokens and ids without a text."""
        rng = random.Random(4)
        num_found = 0
        for _ in range(200):
            token_ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(60)]
            for text in rng.choices(["日", "ab", "🙂", " x"], k=8):
                place = rng.randrange(len(token_ids))
                token_ids[place:place] = one_byte_each(tokenizer, text)
            stop = tuple(rng.sample(["日", "ab", "🙂", "b日", " x", "🙂日", "xa"], 2))
            end = first_end(tokenizer, token_ids, stop)
            num_found += end is not None
            assert found_end(tokenizer, token_ids, stop) == end, (token_ids, stop)
        assert num_found > 50

    def test_behind_broken_bytes_that_are_characters_without_the_first_of_them(self, tokenizer):
        """A tokenizer with byte fallback takes each byte of such a run for one character: more of them than what a
        window's start within the run leaves."""
        rng = random.Random(5)
        for _ in range(200):
            start = [rng.randrange(128, 256) for _ in range(rng.randrange(1, 5))]
            text = "".join(rng.choices("🙂日éD", k=rng.randrange(1, 9)))
            token_ids = [one_byte(tokenizer, byte) for byte in (*start, *text.encode())]
            token_ids += tokenizer.encode(" END and", add_special_tokens=False)
            end = first_end(tokenizer, token_ids, ("END",))
            assert end is not None and found_end(tokenizer, token_ids, ("END",)) == end, (start, text)

    def test_a_stop_string_inside_a_token(self, bytewise):
        assert found_end(bytewise, bytewise.encode("hello there"), ("ll",)) is not None

    def test_one_character_and_the_first_token(self, bytewise):
        assert found_end(bytewise, one_byte_each(bytewise, "ab"), ("a",)) == 1
        assert found_end(bytewise, one_byte_each(bytewise, "ab日c"), ("日",)) == 5

    def test_replacement_characters_that_may_still_become_text_are_no_match(self, bytewise):
        broken = one_byte_each(bytewise, "日")[:2]
        assert found_end(bytewise, broken, ("\ufffd",)) is None
        assert found_end(bytewise, [*broken, *bytewise.encode("a")], ("\ufffd",)) == 3


class TestCut:
    @pytest.mark.parametrize(
        ("text", "stop", "without", "included"),
        [
            ("one two three", ("two",), "one ", "one two"),
            ("one two three", ("four",), "one two three", "one two three"),
            ("abcabc", ("c", "b"), "a", "ab"),  # the one that ends first
            ("abcd", ("abc", "bc"), "", "abc"),  # of two that end there the longer one
            ("abcd", ("abcd", "b"), "a", "ab"),  # though the other begins first
            ("stop", ("stop",), "", "stop"),
            ("a\ufffd", ("\ufffd",), "a\ufffd", "a\ufffd"),
            ("text", (), "text", "text"),
        ],
    )
    def test_before_or_after(self, text, stop, without, included):
        assert cut_at_stop(text, stop, include=False) == without
        assert cut_at_stop(text, stop, include=True) == included


class TestParams:
    def test_one_text_or_several(self):
        assert SamplingParams(stop="\n\n").stop == ("\n\n",)
        assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
        assert SamplingParams().stop == ()

    @pytest.mark.parametrize("stop", ["", ["a", ""], [1], None, 5, ("a", None), b"a"])
    def test_what_is_no_text(self, stop):
        with pytest.raises(InputError) as error:
            SamplingParams(stop=stop)
        assert str(error.value).startswith(f"stop: got {stop!r}; accepted: a text or a list of texts")
        assert "\n" not in str(error.value)
