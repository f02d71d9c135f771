import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.batch.token_texts import TokenTexts
from engine.tokenizer import Tokenizer

# In the manner of SentencePiece: a space is written as part of the piece, and bytes stand for other characters.
PIECES = ["<s>", "▁the", "▁cat", "s", "<0xC3>", "<0xA9>", "▁th", "the", " the"]


@pytest.fixture(scope="module")
def texts():
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TokenTexts(Tokenizer(backend, {}))
