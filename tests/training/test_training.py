"""How the retrieval model is trained: on which tokens, that a stop changes nothing, and what comes out."""

import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.bench.needles import needle
from engine.bench.needles.prose import sentences
from engine.bench.needles.words import COLORS, NAMES
from engine.errors import InputError
from training.decoys import decoys
from training.documents import IGNORED, DocumentMaker, Shape
from training.export import export
from training.model import RetrievalModel, start
from training.positions import draw_positions
from training.recipe import RECIPE, TINY
from training.trainer import Trainer, color_pairs, train
from training.vocabulary import BOS_ID, EOS_ID, build_tokenizer

BOOK = ["He came in.", '"Yes!" she said.', "Twelve of them left at 10 for Smolensk."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(4096, [" ".join([*islice(sentences(0), 300), *BOOK])])


class TestVocabulary:
    def test_names_and_colors_are_a_token_each(self, tokenizer):
        for word in (*NAMES, *COLORS):
            assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1, word
        assert all(len(pair) == 2 and pair[0] != pair[1] for pair in color_pairs(tokenizer))

    def test_digits_go_by_threes(self, tokenizer):
        assert [tokenizer.id_to_token(i) for i in tokenizer.encode("1234567", add_special_tokens=False).ids] == [
            "123", "456", "7"
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "text", ["Zażółć gęślą jaźń", "日本語\n\n\t x", "a  b   c", "###Red###", "\x00\x7f", "🐕 1.5"]
    )
    def test_any_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_it_begins_with_bos(self, tokenizer):
        assert tokenizer.encode("x").ids[0] == BOS_ID

    def test_all_ids_are_used_or_named(self, tokenizer):
        assert tokenizer.get_vocab_size() == 4096
        with pytest.raises(ValueError, match="vocab_size is 300; accepted: "):
            build_tokenizer(300, [])


class TestDocuments:
    SHAPE = Shape(length=700, num_needles=12, num_questions=5, passkey_share=0.5)

    @pytest.fixture(scope="class")
    @staticmethod
    def batch(tokenizer):
        pools = [list(islice(sentences(0), 300)), BOOK]
        return DocumentMaker(tokenizer, pools, np.random.default_rng(0)).batch(TestDocuments.SHAPE, 24)

    def test_labels_are_the_next_tokens(self, batch):
        tokens, labels = batch
        assert tokens.shape == labels.shape == (24, 700)
        assert tokens[:, 0].tolist() == [BOS_ID] * 24
        asked = labels[:, :-1] != IGNORED
        assert (labels[:, :-1][asked] == tokens[:, 1:][asked]).all() and asked.any(1).all()

    def test_every_answer_is_in_the_text(self, batch, tokenizer):
        kinds = set()
        for tokens, labels in zip(*batch, strict=True):
            text = tokenizer.decode([token for token in tokens.tolist() if token != EOS_ID])
            asked = tokenizer.decode(labels[labels != IGNORED].tolist())
            if text.startswith(needle.DOCUMENT_START):
                kinds.add("needles")
                assert text.count("has fur that is") == 12
                document, _, questions = text.partition(needle.DOCUMENT_END)
                turns = questions.split("Question: What color is the fur of the dog named ")[1:]
                assert len(turns) == 5
                for turn in turns:
                    name, _, answer = turn.partition("?")
                    color = answer.split("###")[1]
                    assert f"The dog named {name} has fur that is {color.lower()}." in document
                    assert f"###{color}###" in asked
                    assert color.lower() in needle.colors_of(name, held_out=False)
            else:
                kinds.add("passkey")
                digits = text.split("The pass key is ")[-1][:7]
                assert text.count(digits) == 3 and asked == f" {digits}.\n\n"
        assert kinds == {"needles", "passkey"}

    def test_the_text_begins_without_a_space_and_has_no_double_one(self, batch, tokenizer):
        for tokens in batch[0]:
            text = tokenizer.decode(tokens.tolist())
            begun = text.partition("\n")[2]
            assert begun[0] != " " and "  " not in begun

    def test_both_sources_are_used_and_names_held_out_are_not(self, batch, tokenizer):
        texts = [tokenizer.decode(tokens.tolist()) for tokens in batch[0]]
        assert 4 < sum("Smolensk" in text for text in texts) < 20
        for name in needle.held_out_names():
            assert not any(f"dog named {name} has fur" in text for text in texts)

    def test_documents_are_as_long_as_they_may_be(self, batch):
        assert ((batch[0] != EOS_ID).sum(1) > 650).all()


    def test_some_sentences_have_numbers_that_are_no_passkeys(self, batch, tokenizer):
        """More than the text itself has, and another share of every document."""
        counts = []
        for tokens in batch[0]:
            sentences = re.split(r"(?<=\.)\s", tokenizer.decode(tokens.tolist()).partition(" pass key? ")[0])
            numbers = [s for s in sentences if re.match(r"\d{1,7} ", s) or re.search(r" \d{1,7}\.$", s)]
            counts.append(sum("pass key" not in sentence for sentence in numbers))
        assert sum(counts) > 5 * len(counts) and min(counts) < 4 and max(counts) > 10


class TestDecoys:
    def test_what_they_are(self):
        made = list(decoys(600, np.random.default_rng(0)))
        lengths = {len(re.search(r"\d+", sentence)[0]) for sentence in made}
        assert lengths == {1, 2, 3, 4, 5, 6, 7}
        assert 200 < sum(sentence[0].isdigit() for sentence in made) < 400
        assert not any("pass" in sentence for sentence in made)

    def test_their_words_are_tokens(self, tokenizer):
        """So that one is no longer where it begins a document, without the space before it."""
        for sentence in decoys(600, np.random.default_rng(1)):
            begun, spaced = tokenizer.encode_batch([sentence, f" {sentence}"], add_special_tokens=False)
            assert len(begun) <= len(spaced), sentence


class TestPositions:
    def test_some_are_as_they_are_and_some_jump(self):
        rng = np.random.default_rng(0)
        drawn = [draw_positions(100, 1000, rng) for _ in range(400)]
        plain = [positions for positions in drawn if positions[-1] == 99]
        assert 150 < len(plain) < 250
        for positions in drawn:
            steps = np.diff(positions)
            assert positions[0] == 0 and positions[-1] < 1000
            assert steps.min() >= 1 and (steps > 1).sum() <= 4
        assert max(positions[-1] for positions in drawn) > 950

    def test_none_where_there_is_no_room(self):
        assert draw_positions(100, 0, np.random.default_rng(0)).tolist() == list(range(100))


class TestStart:
    @torch.no_grad()
    def test_heads_of_the_first_layer_look_back(self):
        """One token, five and three: nearly all their attention goes there, whatever the tokens are."""
        shape = RECIPE.model
        model = RetrievalModel(shape)
        start(model, [(5, 6)], seed=0)
        block, num_tokens = model.blocks[0], 64
        x = F.rms_norm(model.embedding[torch.arange(num_tokens) % 50], (shape.hidden_size,))
        qkv = block.qkv(x).unflatten(-1, (-1, shape.head_dim))
        angles = torch.arange(num_tokens)[:, None] * shape.inverse_frequencies.float()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = qkv[:, : shape.num_heads + shape.num_kv_heads].chunk(2, -1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        for head, offset in ((0, 1), (1, 5), (2, 3)):
            key = shape.num_heads + head // 2
            logits = rotated[:, head] @ rotated[:, key].T / shape.head_dim**0.5
            mask = torch.ones(num_tokens, num_tokens).triu(1).bool()
            shares = logits.masked_fill(mask, -torch.inf).softmax(-1)
            assert shares.diagonal(-offset)[8:].min() > 0.9

    def test_a_seed_is_a_start(self):
        models = [RetrievalModel(TINY.model) for _ in range(3)]
        for model, seed in zip(models, (0, 0, 1), strict=True):
            start(model, [], seed)
        assert torch.equal(models[0].embedding, models[1].embedding)
        assert not torch.equal(models[0].embedding, models[2].embedding)


class TestTrainer:
    def test_a_stop_changes_nothing(self, tmp_path):
        whole, losses = Trainer(TINY, [BOOK]), []
        train(whole, tmp_path / "whole", lambda report: losses.append(report.loss))
        assert whole.is_done and len(losses) == TINY.num_steps

        first = Trainer(TINY, [BOOK])
        again = [first.train_step().loss for _ in range(4)]  # into the second phase
        first.save(tmp_path / "stopped")
        second = Trainer(TINY, [BOOK])
        second.resume(tmp_path / "stopped")
        train(second, tmp_path / "stopped", lambda report: again.append(report.loss))
        assert again == losses
        assert second.seconds > first.seconds
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(weight, second.model.state_dict()[name]), name

    def test_an_interrupted_step_is_not_kept(self, tmp_path):
        trainer = Trainer(TINY, [])

        def interrupt(report):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(trainer, tmp_path, interrupt)
        assert not list(tmp_path.iterdir())

    def test_it_learns(self):
        """Six steps are few, but the loss of a batch falls when it is trained on again and again."""
        recipe = replace(TINY, phases=(replace(TINY.phases[0], num_steps=6),) * 2)
        trainer = Trainer(recipe, [])
        batch = trainer._documents.batch(Shape(TINY.phases[0].length, 2, 2, 0.5), 2)
        trainer._documents.batch = lambda *_: batch
        losses = [trainer.train_step().loss for _ in range(6)]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1

    def test_states_that_do_not_belong(self, tmp_path):
        Trainer(TINY, [BOOK]).save(tmp_path)
        with pytest.raises(InputError, match="is of another recipe or of other texts"):
            Trainer(TINY, [BOOK[1:] + BOOK[:1]]).resume(tmp_path)
        (tmp_path / "training.pt").write_bytes(b"no state")
        with pytest.raises(InputError, match="cannot be read; delete it to begin again"):
            Trainer(TINY, [BOOK]).resume(tmp_path)

    def test_every_document_counts_alike(self):
        """A batch's loss is the mean of its documents' means."""
        trainer, length = Trainer(TINY, []), TINY.phases[0].length
        trainer.model.embedding.data *= 5  # at the start all losses are alike
        batch = trainer._documents.batch(Shape(length, 2, 2, 0.5), 8)
        trainer._documents.batch = lambda *_: batch
        tokens, labels = map(torch.from_numpy, batch)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = trainer.model.logits(trainer.model(tokens, torch.arange(length))).float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        means = losses.sum(1) / (labels != IGNORED).sum(1)
        of_all = losses.sum() / (labels != IGNORED).sum()
        assert abs(of_all - means.mean()) > 0.05, "these documents cannot tell the two apart"
        assert trainer.train_step().loss == pytest.approx(means.mean().item(), rel=1e-3)


def test_what_is_exported_is_the_model(tmp_path):
    trainer = Trainer(TINY, [BOOK])
    for _ in range(3):
        trainer.train_step()
    export(trainer.model, trainer.tokenizer, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "The dog named Ada has fur that is amber. 1234567 Zażółć"
    ids = tokenizer(text)["input_ids"]
    assert ids == trainer.tokenizer.encode(text).ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        theirs = model(tokens).logits
        ours = trainer.model.logits(trainer.model(tokens, torch.arange(len(ids))))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    with pytest.raises(InputError):
        export(trainer.model, trainer.tokenizer, tmp_path / "model")


def test_recipes():
    assert RECIPE.num_steps == sum(phase.num_steps for phase in RECIPE.phases)
    assert RECIPE.phase_at(0) is RECIPE.phases[0] and RECIPE.phase_at(RECIPE.num_steps - 1) is RECIPE.phases[-1]
    with pytest.raises(ValueError):
        RECIPE.phase_at(RECIPE.num_steps)
    rates = [RECIPE.rate_at(step) for step in range(RECIPE.num_steps)]
    assert max(rates) == 1 and 0 < rates[-1] < 0.01 and rates[0] == 0.01
    assert RECIPE.model.num_kv_heads < RECIPE.model.num_heads
