"""What the shipped retrieval model was trained on, step by step."""

from dataclasses import dataclass, replace

import numpy as np

from training.documents import Shape
from training.model import MAX_POSITIONS, ModelShape


@dataclass(frozen=True)
class Phase:
    """Steps on documents of one length. Each step draws how many needles its documents have, up to the most."""

    num_steps: int
    length: int  # tokens of a document, with the questions
    batch_size: int  # documents a step
    max_needles: int
    max_questions: int
    passkey_share: float = 0.25
    max_positions: int = 0  # what positions may be stretched to (``draw_positions``); to none of 0

    def draw_shape(self, rng: np.random.Generator) -> Shape:
        num_needles = int(rng.integers(min(8, self.max_needles), self.max_needles + 1))
        return Shape(self.length, num_needles, min(num_needles, self.max_questions), self.passkey_share)


@dataclass(frozen=True)
class Recipe:
    """Everything that the result follows from, beside the texts."""

    model: ModelShape = ModelShape()
    seed: int = 0
    num_prose_sentences: int = 20_000  # of the generator, in the training stream
    learning_rate: float = 2e-3  # of projections, norms and biases
    # Lower: Adam moves the embeddings of rare words as far as those of frequent ones.
    embedding_learning_rate: float = 3e-4
    weight_decay: float = 0.01  # of projections
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0
    num_warmup_steps: int = 100
    # Short documents until retrieval appears, all at once, after 200 to 350 steps; then longer ones.
    phases: tuple[Phase, ...] = (
        Phase(600, 320, 24, max_needles=8, max_questions=8),
        Phase(400, 1024, 12, max_needles=32, max_questions=24),
        Phase(300, 2048, 6, max_needles=80, max_questions=48, max_positions=MAX_POSITIONS),
        Phase(500, 4096, 4, max_needles=192, max_questions=64, passkey_share=0.4, max_positions=MAX_POSITIONS),
        Phase(400, 8192, 2, max_needles=270, max_questions=96, passkey_share=0.4, max_positions=MAX_POSITIONS),
    )

    @property
    def num_steps(self) -> int:
        return sum(phase.num_steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """That of a step, counted from 0."""
        for phase in self.phases:
            if step < phase.num_steps:
                return phase
            step -= phase.num_steps
        raise ValueError(f"step {step} is past the last phase")

    def rate_at(self, step: int) -> float:
        """The learning rates' factor: up over the warm-up, constant, and down over the last two phases."""
        num_decay = sum(phase.num_steps for phase in self.phases[-2:])
        left = (self.num_steps - step) / num_decay
        return min(1.0, (step + 1) / self.num_warmup_steps, left)


RECIPE = Recipe()
# Of seconds, for tests: the same code on a model and on documents too small to learn much.
TINY = replace(
    RECIPE,
    model=ModelShape(hidden_size=32, intermediate_size=48, head_dim=16),
    num_prose_sentences=200,
    num_warmup_steps=2,
    phases=(
        Phase(3, 160, 2, max_needles=2, max_questions=2),
        Phase(3, 192, 2, max_needles=3, max_questions=2, max_positions=400),
    ),
)
