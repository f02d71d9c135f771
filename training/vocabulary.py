"""The retrieval model's tokenizer: whole words where it knows them, bytes where it does not.

Every name and colour is one token, and so is every group of up to three digits, so that what is to be retrieved is one
token or few. Text is divided into the fewest tokens: a unigram model whose tokens are all equally likely.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.bench.needles import needle, passkey, words

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
# Words keep the space before them, digits do not. What is left over, such as "###", stays together.
_PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GRAMMAR = "The A An the a an and . , dog named has have had was were is are that fur it he she they".split()
_MULTI_BYTE_SCORE, _BYTE_SCORE = -1.0, -1.5


def build_tokenizer(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """``vocab_size`` tokens: bytes, digits, the words of needles and prose, then the most frequent pieces of ``texts``.

    Raises ValueError when the first of these are more.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECES), "isolated"), byte_level])
    pieces = dict.fromkeys(piece for text in _required() for piece, _ in splitter.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict.fromkeys([BOS, EOS, *alphabet, *_digit_groups(), *pieces])
    if len(vocabulary) > vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}; accepted: {len(vocabulary)} or more")
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    for piece in _frequent_pieces(counts):
        if len(vocabulary) == vocab_size:
            break
        vocabulary.setdefault(piece)
    for number in range(vocab_size - len(vocabulary)):  # where texts have too few
        vocabulary[f"<unused{number}>"] = None
    scored = [(piece, _BYTE_SCORE if len(piece) == 1 else _MULTI_BYTE_SCORE) for piece in vocabulary]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """The files of the tokenizer in Hugging Face format."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _digit_groups() -> Iterator[str]:
    for length in (1, 2, 3):
        for number in range(10**length):
            yield f"{number:0{length}d}"


def _required() -> Iterator[str]:
    """Texts whose every piece is to be a token."""
    dog, key = needle.Needle("Ada", "amber"), passkey.Passkey("0")
    yield needle.DOCUMENT_START + needle.DOCUMENT_END
    yield dog.sentence + "\n" + dog.question + dog.answer + dog.question
    yield passkey.INSTRUCTION + key.sentence + passkey.QUESTION + "0.\n"
    yield " ".join(["", *words.NAMES, *words.COLORS, *_GRAMMAR])
    yield " ".join(color.title() for color in words.COLORS)
    for color in words.COLORS:
        yield color.title()
    for word in _GRAMMAR:
        yield word
    lists = (words.NOUNS, words.ADJECTIVES, words.TRANSITIVE_VERBS, words.INTRANSITIVE_VERBS, words.PREPOSITIONS)
    for some in (*lists, words.ADVERBS, words.CONJUNCTIONS, words.OPENINGS):
        yield " ".join(["", *some])


def _frequent_pieces(counts: Counter[str]) -> list[str]:
    """Whole pieces and parts of words, those first that save most bytes of text."""
    saved: Counter[str] = Counter()
    for piece, count in counts.items():
        if not re.fullmatch(r"[^\d]+", piece):
            continue
        saved[piece] += count * (len(piece) - 1)
        if count > 1:  # parts serve words that are no token; those of frequent words would be too many
            for start in range(len(piece)):
                for length in range(2, min(6, len(piece) - start) + 1):
                    if length < len(piece):
                        saved[piece[start : start + length]] += min(count, 20) * (length - 1)
    return sorted(saved, key=lambda piece: (-saved[piece], piece))
