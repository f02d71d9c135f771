"""Passkeys and their grid, before any model reads them."""

import numpy as np
import pytest

from engine.bench.needles.haystack import Haystack
from engine.bench.needles.passkey import INSTRUCTION, QUESTION, Passkey, draw_passkey
from engine.bench.needles.passkey_grid import PasskeyGrid, make_probes
from engine.errors import InputError

HAY = Haystack("threes", [f"Word word w{number:03d}." for number in range(1000)])


class TestPasskey:
    def test_the_wording(self):
        assert Passkey("0123456").sentence == "The pass key is 0123456. Remember it. 0123456 is the pass key."

    @pytest.mark.parametrize(
        ("text", "exact", "partial"),
        [
            ("1234567.", True, 7),
            ("It is 1234567, I think", True, 7),
            ("12345678", False, 7),
            ("01234567", False, 7),
            ("12345678 or 1234567", True, 7),
            ("1234 567", False, 4),
            ("3456", False, 4),
            ("7654321", False, 1),
            ("none", False, 0),
            ("", False, 0),
        ],
    )
    def test_matches(self, text, exact, partial):
        key = Passkey("1234567")
        assert key.exact_match(text) is exact
        assert key.partial_match(text) == partial / 7

    def test_drawn_digits(self):
        keys = [draw_passkey(7, np.random.default_rng(seed)).digits for seed in range(50)]
        assert {len(key) for key in keys} == {7} and len(set(keys)) == 50
        assert any(key.startswith("0") for key in keys)


class TestGrid:
    def test_the_name_of_the_benchmarks_own(self):
        grid = PasskeyGrid.parse("20480words_10x10x3_7digits")
        assert grid == PasskeyGrid(512, 20480, 10, 10, 3, 7)
        assert grid.lengths[0] == 512 and grid.lengths[-1] == 20480 and len(grid.lengths) == 10
        assert np.ptp(np.diff(grid.lengths)) <= 1
        assert grid.depths == pytest.approx([i / 9 for i in range(10)])
        assert grid.num_probes == 300

    @pytest.mark.parametrize(
        ("text", "lengths", "depths"),
        [
            ("100words_1x1x1_1digits", (100,), (0.5,)),
            ("256words_2x2x1_7digits", None, None),
            (" 100:200words_2x3x1_7digits ", (100, 200), (0, 0.5, 1)),
            ("512words_1x2x1_7digits", (512,), (0, 1)),
        ],
    )
    def test_sizes(self, text, lengths, depths):
        if lengths is None:
            with pytest.raises(InputError, match="no 2 different lengths from 256 to 256 words"):
                PasskeyGrid.parse(text)
            return
        grid = PasskeyGrid.parse(text)
        assert (grid.lengths, grid.depths) == (lengths, depths)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "is not understood; accepted: WORDSwords_"),
            ("20480", "is not understood"),
            ("20480words_10x10_7digits", "is not understood"),
            ("20480words_10x10x3_7digits ok", "is not understood"),
            ("-5words_1x1x1_7digits", "is not understood"),
            ("0words_1x1x1_7digits", "has a 0 in it"),
            ("0:9words_1x1x1_7digits", "has a 0 in it"),
            ("99words_1x0x1_7digits", "has a 0 in it"),
            ("99words_1x1x1_0digits", "has a 0 in it"),
            ("200:100words_2x1x1_7digits", "begins with 200 words and ends with 100; swap them"),
            ("9999words_99x99x99_7digits", "has 970,299 prompts; accepted: 100,000 at most"),
            ("99999999999999words_1x1x1_7digits", "is not understood"),
        ],
    )
    def test_mistakes(self, text, problem):
        with pytest.raises(InputError, match="passkey grid") as raised:
            PasskeyGrid.parse(text)
        assert problem in str(raised.value)


class TestProbes:
    GRID = PasskeyGrid.parse("300words_1x5x2_7digits")

    def probes(self, grid=GRID, num_words=300, seed=0):
        return list(make_probes(grid, num_words, HAY, seed))

    def test_the_key_is_in_the_text_once_at_its_depth(self):
        probes = self.probes()
        assert [(probe.depth, probe.repeat) for probe in probes] == [(i / 4, j) for i in range(5) for j in range(2)]
        for probe in probes:
            assert probe.prompt.startswith(INSTRUCTION) and probe.prompt.endswith(QUESTION)
            text = probe.prompt.removeprefix(INSTRUCTION).removesuffix(QUESTION)
            before, found, after = text.partition(probe.passkey.sentence)
            assert found and len((before + after).split()) == 300
            assert len(before) / len(before + after) == pytest.approx(probe.depth, abs=0.005)
            assert before == "" or before.endswith(". ")

    def test_keys_differ_and_are_the_same_in_another_grid(self):
        probes = self.probes()
        assert len({probe.passkey for probe in probes}) == 10
        other = self.probes(PasskeyGrid.parse("100:500words_3x3x1_7digits"))
        assert [probe.passkey for probe in other] == [probe.passkey for probe in probes if probe.repeat == 0][::2]
        assert {p.passkey for p in self.probes(seed=1)}.isdisjoint(p.passkey for p in probes)
        assert {p.passkey for p in self.probes(num_words=297)}.isdisjoint(p.passkey for p in probes)

    def test_whole_sentences(self):
        assert self.probes(num_words=301)[0].prompt.count("ord w") == 200  # 100 sentences of "Word word w"
        with pytest.raises(InputError, match="threes has 3,000 words; 3,001 were asked for"):
            self.probes(num_words=3001)
