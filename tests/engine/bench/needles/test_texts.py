"""Prose, haystacks, needles and documents: what is asked about, before any model reads it."""

import json
import re
from itertools import islice

import numpy as np
import pytest
import torch
from checkpoints import save_tiny
from safetensors.torch import load_file, save_file

from engine.bench.needles import haystack as haystacks
from engine.bench.needles.document import NUM_DEPTHS, make_document, place
from engine.bench.needles.haystack import Haystack, generated_haystack, read_haystack, split_sentences
from engine.bench.needles.identity import model_digest
from engine.bench.needles.needle import Needle, colors_of, draw_needles, held_out_names, names_for_training
from engine.bench.needles.prose import sentences
from engine.bench.needles.words import COLORS, NAMES
from engine.errors import InputError
from engine.shard_writer import write_shards


class TestProse:
    def test_a_seed_gives_the_same_sentences_and_another_others(self):
        first, again, other = (list(islice(sentences(seed), 50)) for seed in (7, 7, 8))
        assert first == again
        assert len(set(first) & set(other)) < 3

    def test_evaluation_has_sentences_that_training_has_not(self):
        training = set(islice(sentences(0), 20_000))
        evaluation = list(islice(sentences((1, 0)), 2000))
        assert sum(sentence in training for sentence in evaluation) < 0.02 * len(evaluation)

    def test_sentences_are_sentences(self):
        for sentence in islice(sentences(3), 500):
            assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9, ]*[a-z]\.", sentence), sentence
            assert "  " not in sentence and " a a" not in sentence
            assert not re.search(r"\ba [aeiou]", sentence) or re.search(r"\ba (uni|use|eu|one)", sentence), sentence

    def test_it_has_what_needles_have(self):
        text = " ".join(islice(sentences(3), 2000))
        for word in ("dog", "amber", "Ada"):
            assert word in text
        assert re.search(r"\d", text)
        assert "has fur that is" not in text and "pass key" not in text


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
            ('"Oh!" he said. "Go on."  She went.', ['"Oh!" he said.', '"Go on."', "She went."]),
            ("“Ah!” He left.", ["“Ah!”", "He left."]),
            ("Mr. Pierre met St. Just. They spoke.", ["Mr. Pierre met St. Just.", "They spoke."]),
            ("It was I. J. R. Smith came.", ["It was I.", "J. R. Smith came."]),
            ("At 3.5 per cent. Then 4. Done (really.) Yes.", ["At 3.5 per cent.", "Then 4.", "Done (really.)", "Yes."]),
            ("Well... perhaps. Well... Perhaps.", ["Well... perhaps.", "Well...", "Perhaps."]),
            ("no end at all", ["no end at all"]),
            (" \n\t ", []),
        ],
    )
    def test_where_they_end(self, text, expected):
        assert split_sentences(text) == expected

    def test_nothing_is_lost(self):
        text = 'He said: "No! never." M. Ada (who?) left. 12 came...  "Why?" And so on'
        assert " ".join(split_sentences(text)) == " ".join(text.split())


class TestHaystack:
    def test_takes_whole_sentences(self):
        hay = Haystack("words", ["One.", "Two.", "Three."])
        assert hay.take(1) == ["One."]
        assert hay.take(5) == ["One."]
        assert hay.take(6) == ["One.", "Two."]
        with pytest.raises(InputError, match="words has 17 characters; 18 were asked for"):
            hay.take(18)

    def test_generated_holds_what_was_asked_for(self):
        hay = generated_haystack(5, 1000)
        assert len(" ".join(hay.take(1000))) in range(999, 1200)
        assert hay.sentences == generated_haystack(5, 1000).sentences != generated_haystack(6, 1000).sentences

    def test_of_a_file(self, tmp_path):
        path = tmp_path / "book.txt"
        path.write_text("\ufeffOne.\r\n\r\nTwo is\nlonger. Three. Four.")
        whole, half = read_haystack(path), read_haystack(path, 0.5)
        assert (whole.name, whole.sentences) == ("book.txt", ["One.", "Two is longer.", "Three.", "Four."])
        assert (half.name, half.sentences) == ("book.txt after 50% of its sentences", ["Three.", "Four."])
        assert read_haystack(path, 0.501).name == "book.txt after 50.1% of its sentences"
        assert whole.digest == read_haystack(path).digest != half.digest

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "No such file"),
            (b"\xff\xfe\x00", "not UTF-8"),
            (b" \n ", "has no text"),
            ("folder", "Is a directory"),
        ],
    )
    def test_unusable_files(self, tmp_path, content, message):
        path = tmp_path / "book.txt"
        if content == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as raised:
            read_haystack(path)
        assert str(path) in str(raised.value) and "accepted: a text file" in str(raised.value)

    def test_generated_text_is_made_as_far_as_it_is_needed(self, monkeypatch):
        monkeypatch.setattr(haystacks, "sentences", lambda seed: iter(["Four."] * 3))
        assert len(generated_haystack(0, 18).sentences) == 3


class TestNeedles:
    def test_the_wording(self):
        needle = Needle("Ada", "amber")
        assert needle.sentence == "The dog named Ada has fur that is amber."
        assert needle.question == "Question: What color is the fur of the dog named Ada?\nAnswer:"
        assert needle.answer == " ###Amber###\n\n"

    @pytest.mark.parametrize(
        ("text", "right"),
        [
            (" ###Amber###\n\n", True),
            ("### Amber ###", True),
            ("Amber", False),
            ("###amber###", False),
            ("###Ambers###", False),
            ("###Red### ###Amber###", False),
            ("###Amber", False),
            ("", False),
        ],
    )
    def test_what_is_an_answer(self, text, right):
        assert Needle("Ada", "amber").is_answered_by(text) is right

    def test_names_and_colors_differ(self):
        for words in (NAMES, COLORS):
            assert len(set(words)) == len(words)
        seen, unseen = names_for_training(), held_out_names()
        assert sorted(seen + unseen) == sorted(NAMES) and len(unseen) == 64

    def test_pairs_of_evaluation_are_none_of_training(self):
        for name in NAMES:
            training, evaluation = (set(colors_of(name, held_out)) for held_out in (False, True))
            assert training.isdisjoint(evaluation) and training | evaluation == set(COLORS)
            assert len(evaluation) in (7, 8)
        for held_out in (False, True):
            drawn = draw_needles(400, np.random.default_rng(1), NAMES, held_out)
            assert all(needle.color in colors_of(needle.name, held_out) for needle in drawn)
            assert len({needle.color for needle in drawn}) == len(COLORS), "every colour is drawn"

    def test_drawn_names_differ_and_colors_need_not(self):
        drawn = draw_needles(200, np.random.default_rng(0), NAMES, held_out=False)
        assert len({needle.name for needle in drawn}) == 200
        assert len({needle.color for needle in drawn}) < len(COLORS) + 1
        with pytest.raises(InputError, match="3 needles were asked for; accepted: up to 2, one for each name"):
            draw_needles(3, np.random.default_rng(0), ("Ada", "Amy"), held_out=True)


class TestDocument:
    HAY = Haystack("tens", ["Nine char."[:9]] * 200)  # ten characters each, with the space

    def document(self, num_needles=8, num_few_shot=3, seed=0, num_characters=1990):
        return make_document(self.HAY, num_characters, num_needles, num_few_shot, NAMES, seed)

    def test_every_needle_is_where_it_says(self):
        document = self.document()
        text = document.prompt.removeprefix("Start of document:\n").partition("\nEnd of document\n\n")[0]
        assert len(text) == document.num_characters
        for one in document.needles:
            at = text.index(one.needle.sentence)
            assert at / len(text) == one.position
            assert one.depth == int(10 * at / len(text))
            assert at == 0 or text[at - 2 : at] in (". ", "r "), "not at the end of a sentence"

    def test_needles_are_spread_evenly_and_asked_in_another_order(self):
        document = self.document(num_needles=41, num_few_shot=0)
        positions = [one.position for one in document.needles]
        assert positions != sorted(positions)
        gaps = np.diff(sorted(positions))
        assert gaps.max() < 2 * gaps.min()
        assert {one.depth for one in document.needles} == set(range(NUM_DEPTHS))

    def test_examples_are_not_asked_for(self):
        document = self.document()
        examples = document.prompt.partition("\nEnd of document\n\n")[2]
        assert examples.count("Question: ") == examples.count("Answer: ###") == 3
        for one in document.needles:
            assert one.needle.question not in examples
            assert document.prompt.count(one.needle.name) == 1

    def test_more_questions_ask_again(self):
        document = self.document()
        assert document.ask(5) == list(document.needles[:5])
        assert document.ask(20) == [*document.needles, *document.needles, *document.needles[:4]]

    def test_a_seed_is_a_document(self):
        assert self.document() == self.document() != self.document(seed=1)

    def test_placing(self):
        text, positions = place(["Aa.", "Bb.", "Cc."], ["1.", "2.", "3."], [0, 0.4, 1])
        assert text == "1. Aa. 2. Bb. Cc. 3."
        assert [round(position * len(text)) for position in positions] == [0, 7, 18]
        assert place(["Aa."], [], []) == ("Aa.", [])


class TestModelDigest:
    def test_tells_weights_and_tokenizers_apart_and_is_that_of_the_shards(self, tmp_path):
        models = [save_tiny(tmp_path / name) for name in ("one", "same", "other")]
        weights = load_file(models[2] / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, models[2] / "model.safetensors")
        one, same, other = map(model_digest, models)
        assert one == same != other
        write_shards(models[0], tmp_path / "shards", 2, model_name="tiny")
        assert model_digest(tmp_path / "shards") == one
        write_shards(models[0], tmp_path / "half", 2, model_name="tiny", dtype=torch.bfloat16)
        assert model_digest(tmp_path / "half") == one
        config = models[0] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
        assert model_digest(models[0]) != one
        tokenizer = models[1] / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
        assert model_digest(models[1]) != one

    def test_of_the_hub_it_is_the_commit(self, tmp_path):
        assert model_digest(tmp_path / "snapshots" / "0123456789abcdef") == "0123456789ab"
