"""Training, step by step, and going on after a stop: the same numbers come out as without one."""

import hashlib
import io
import json
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from engine.bench.needles.prose import sentences
from engine.bench.needles.words import COLORS
from engine.errors import InputError
from engine.files import write_whole
from training.documents import IGNORED, DocumentMaker
from training.model import RetrievalModel, start
from training.positions import draw_positions
from training.recipe import Recipe
from training.vocabulary import build_tokenizer

STATE_FILE = "training.pt"
_SAVE_EVERY = 20  # steps: a minute at most
_PROSE_SEED = 0  # none of evaluation's, which are (1, seed)


@dataclass(frozen=True)
class StepReport:
    """What a step came to: the loss in nats a token, and the share of answers' tokens that the model gets right.

    In the loss every document counts alike, in the shares every token.
    """

    step: int  # counted from 1
    length: int
    loss: float
    accuracy: float
    color_accuracy: float | None  # of colours alone; None of a batch that asks for none


class Trainer:
    """The state of a run, which has taken ``seconds`` for ``step`` steps. ``texts`` are lists of sentences, one for
    each source of real text."""

    def __init__(self, recipe: Recipe, texts: Sequence[Sequence[str]]):
        self.recipe, self.step, self.seconds = recipe, 0, 0.0
        prose = list(islice(sentences(_PROSE_SEED), recipe.num_prose_sentences))
        self.tokenizer = build_tokenizer(recipe.model.vocab_size, [" ".join(text) for text in (prose, *texts)])
        self._texts_hash = hashlib.sha256(json.dumps([prose, *texts]).encode()).hexdigest()
        self._rng = np.random.default_rng(recipe.seed)
        self._documents = DocumentMaker(self.tokenizer, [prose, *texts], self._rng)
        self.model = RetrievalModel(recipe.model)
        pairs = color_pairs(self.tokenizer)
        start(self.model, pairs, recipe.seed)
        self._is_color = torch.zeros(recipe.model.vocab_size, dtype=torch.bool)
        self._is_color[[title for _, title in pairs]] = True
        self._optimizer, self._rates = _optimizer(self.model, recipe)

    @property
    def is_done(self) -> bool:
        return self.step == self.recipe.num_steps

    def train_step(self) -> StepReport:
        """One batch. Matrix products are in bfloat16, weights and sums in float32."""
        begun = time.perf_counter()
        recipe, phase = self.recipe, self.recipe.phase_at(self.step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * recipe.rate_at(self.step)
        tokens, labels = map(torch.from_numpy, self._documents.batch(phase.draw_shape(self._rng), phase.batch_size))
        positions = torch.from_numpy(draw_positions(phase.length, phase.max_positions, self._rng))
        asked = labels != IGNORED
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.logits(self.model(tokens, positions)[asked]).float()
        answers = labels[asked]
        # Every document counts alike: one that asks for a passkey alone has far fewer answers than the others.
        weights = (1 / asked.sum(1, keepdim=True)).expand_as(labels)[asked] / len(tokens)
        loss = (F.cross_entropy(logits, answers, reduction="none") * weights).sum()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_gradient_norm)
        self._optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - begun
        right, colors = (logits.argmax(-1) == answers).float(), self._is_color[answers]
        return StepReport(
            self.step,
            phase.length,
            loss.item(),
            right.mean().item(),
            right[colors].mean().item() if colors.any() else None,
        )

    def save(self, outdir: Path) -> None:
        """Writes all that ``resume`` needs, whole or not at all."""
        buffer = io.BytesIO()
        state = {
            "recipe": repr(asdict(self.recipe)),
            "texts": self._texts_hash,
            "step": self.step,
            "seconds": self.seconds,
            "begun_with": _made_by(),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": self._rng.bit_generator.state,
        }
        torch.save(state, buffer)
        outdir.mkdir(parents=True, exist_ok=True)
        write_whole(outdir / STATE_FILE, buffer.getvalue())

    def resume(self, outdir: Path) -> str | None:
        """Goes on where a run with ``outdir`` stopped; nothing happens when there was none. Returns what that run had
        other than this one and results depend on in their last bits, in words; None where all is the same.

        Raises InputError for the state of another recipe or of other texts, and for a file that is none.
        """
        path = outdir / STATE_FILE
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True)
            begun_with = state["begun_with"]
            same = (state["recipe"], state["texts"]) == (repr(asdict(self.recipe)), self._texts_hash)
        except (OSError, RuntimeError, LookupError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} cannot be read; delete it to begin again, or use another folder") from error
        if not same:
            raise InputError(
                f"{path} is of another recipe or of other texts; accepted: the ones it was begun with; give those, or "
                "use another folder"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.bit_generator.state = state["rng"]
        return None if begun_with == _made_by() else begun_with


def _made_by() -> str:
    """Whose sums have other last bits with each of them."""
    num_threads = torch.get_num_threads()
    return f"{num_threads} thread{'s' * (num_threads != 1)} and PyTorch {torch.__version__}"


def train(trainer: Trainer, outdir: Path, on_step: Callable[[StepReport], None]) -> None:
    """Runs to the end of the recipe; what is done is kept in ``outdir`` as it goes.

    Never when it is interrupted: half a step has drawn random numbers, and may have changed some of the weights.
    """
    while not trainer.is_done:
        on_step(trainer.train_step())
        if trainer.is_done or trainer.step % _SAVE_EVERY == 0:
            trainer.save(outdir)


def color_pairs(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """The token of each colour as needles have it, and as answers have it."""
    return [
        tuple(tokenizer.encode(text, add_special_tokens=False).ids[0] for text in (f" {color}", color.title()))
        for color in COLORS
    ]


def _optimizer(model: RetrievalModel, recipe: Recipe) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW, and the learning rate of each of its groups."""
    projections = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": projections, "weight_decay": recipe.weight_decay, "lr": recipe.learning_rate},
        {"params": others, "weight_decay": 0.0, "lr": recipe.learning_rate},
        {"params": [model.embedding], "weight_decay": 0.0, "lr": recipe.embedding_learning_rate},
    ]
    return torch.optim.AdamW(groups, betas=recipe.betas), [group["lr"] for group in groups]
