"""The passkey grid with a loaded model: one length after another, all its prompts in one call.

Every rank does the same; rank 0 decides what is left to do, writes the files and prints.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine.arena import NoRoomError
from engine.bench.environment import describe_environment
from engine.bench.needles.asking import Asker, timed
from engine.bench.needles.passkey_grid import PasskeyGrid, Probe, make_probes
from engine.bench.needles.passkey_results import PASSKEY_FILES, PasskeyLength, PasskeyResult
from engine.bench.needles.recording import is_recorded, recorded_when_out_of_memory, write_with_answers
from engine.bench.needles.same_settings import check_same
from engine.bench.needles.settings import Settings
from engine.bench.result_files import Status
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.tokenizer import Tokenizer

# Generated beside a token for every digit: what stands before the number, or after it.
_MORE_TOKENS = 4


class PasskeySweep:
    """The prompts of a grid."""

    def __init__(
        self,
        settings: Settings,
        grid: PasskeyGrid,
        tokenizer: Tokenizer,
        config: ModelConfig,
        model_digest: str,
        group: TPGroup,
    ):
        self._model_digest = model_digest
        self._warm: set[str] = set()  # methods that have been run
        self._settings, self._grid, self._tokenizer, self._group = settings, grid, tokenizer, group
        self._environment = describe_environment(group.device, config.dtype, group.size, settings.execution)
        self.num_new_tokens = grid.num_digits + _MORE_TOKENS
        longest = self._encode(self._probes(grid.max_words)[:1])[0]
        if len(longest) + self.num_new_tokens > config.max_positions:
            raise InputError(
                f"a passkey prompt of {grid.max_words} words and its answer take "
                f"{len(longest) + self.num_new_tokens:,} tokens; accepted: up to "
                f"{config.max_positions:,}, the model's positions; use a smaller --passkey-grid"
            )

    def unfinished(self, method: str) -> list[int]:
        """The lengths, in words, that have no result of the method.

        Raises InputError when its folder holds results of other settings.
        """
        left = []
        for num_words in self._grid.lengths:
            key = PasskeyLength(self._settings.run_name(method), num_words)
            if not is_recorded(PASSKEY_FILES, self._settings.outdir, key):
                left.append(num_words)
                continue
            path = key.path(self._settings.outdir)
            blank = self._blank(method, num_words, 0)
            check_same(PASSKEY_FILES.read(path), blank, ("num_digits", "num_repeats", "num_depths"), str(path))
        return left

    def run(self, asker: Asker, num_words: int, on_tokens: Callable[[int, int], None]) -> PasskeyResult:
        """The result of one length; on rank 0 it and the answers are written. ``on_tokens`` is told of the prompts that
        end, as ``Engine.generate`` does."""
        outdir, group = self._settings.outdir, self._group
        probes = self._probes(num_words)
        prompts = self._encode(probes)
        blank = self._blank(asker.method, num_words, max(map(len, prompts)))
        what, remedy = f"{num_words} words", "use a smaller --passkey-grid or more ranks"
        try:
            with recorded_when_out_of_memory(PASSKEY_FILES, outdir, blank, group, what, remedy):
                if asker.method not in self._warm:  # what comes once, such as compiling kernels, is no part of a time
                    asker.complete(prompts[:1], self.num_new_tokens)
                    self._warm.add(asker.method)
                token_ids, ms = timed(group, lambda: asker.complete(prompts, self.num_new_tokens, on_tokens))
        except NoRoomError as error:  # on all ranks alike
            result = replace(blank, status=Status.DOES_NOT_FIT, message=str(error))
            group.on_rank_0(lambda: PASSKEY_FILES.write(outdir, result))
            return result
        finally:
            asker.release()
        texts = [self._tokenizer.decode(ids) for ids in token_ids]
        exact = [probe.passkey.exact_match(text) for probe, text in zip(probes, texts, strict=True)]
        partial = [probe.passkey.partial_match(text) for probe, text in zip(probes, texts, strict=True)]
        result = replace(
            blank, exact_by_depth=self._by_depth(exact), partial_by_depth=self._by_depth(partial), total_ms=ms
        )

        def write() -> None:
            answers = _answers(probes, texts, token_ids, exact, partial)
            write_with_answers(PASSKEY_FILES, outdir, result, result.length.answers_path(outdir), answers)

        group.on_rank_0(write)
        return result

    def _probes(self, num_words: int) -> list[Probe]:
        return list(make_probes(self._grid, num_words, self._settings.haystack, self._settings.seed))

    def _encode(self, probes: Sequence[Probe]) -> list[list[int]]:
        return [self._tokenizer.encode(probe.prompt) for probe in probes]

    def _by_depth(self, values: Sequence[float]) -> tuple[float, ...]:
        repeats = self._grid.num_repeats
        return tuple(sum(values[i : i + repeats]) for i in range(0, len(values), repeats))

    def _blank(self, method: str, num_words: int, num_tokens: int) -> PasskeyResult:
        """What is known of a result before it is measured."""
        settings, grid = self._settings, self._grid
        return PasskeyResult(
            length=PasskeyLength(settings.run_name(method), num_words),
            status=Status.OK,
            model_name=settings.model_name,
            model_digest=self._model_digest,
            attention=method,
            seed=settings.seed,
            environment=self._environment,
            haystack=settings.haystack.name,
            haystack_digest=settings.haystack.digest,
            num_digits=grid.num_digits,
            num_repeats=grid.num_repeats,
            depths=grid.depths,
            num_tokens=num_tokens,
        )


def _answers(
    probes: Sequence[Probe],
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    exact: Sequence[bool],
    partial: Sequence[float],
) -> list[dict[str, Any]]:
    return [
        {
            "num_words": probe.num_words,
            "depth": round(probe.depth, 6),
            "repeat": probe.repeat,
            "expected": probe.passkey.digits,
            "answer": text,
            "token_ids": list(ids),
            "exact_match": is_exact,
            "partial_match": round(part, 6),
            "prompt": probe.prompt,
        }
        for probe, text, ids, is_exact, part in zip(probes, texts, token_ids, exact, partial, strict=True)
    ]
