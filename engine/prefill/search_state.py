"""What a search has found so far: a folder with the settings, and a file for each prompt and layer, whole or not there.

Scores do not depend on the budget, nor on the number of ranks: a search may go on, or choose again, with others.
"""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.files import write_whole
from engine.json_fields import load_json
from engine.messages import shown
from engine.prefill.search import HeadScore, LayerScores, Place

_SETTINGS_FILE = "settings.json"


class SearchState:
    """For one process, in a folder that is there. Raises InputError, naming what differs, where that holds scores of
    other ``settings``, which are plain data."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self._folder = folder
        path = folder / _SETTINGS_FILE
        settings = json.loads(json.dumps(settings))  # as they are read again: lists for tuples
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=1).encode())
            return
        try:
            kept = load_json(path)
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); remove {folder} to begin anew") from error
        kept = kept if isinstance(kept, dict) else {}
        differing = [name for name in settings.keys() | kept.keys() if settings.get(name) != kept.get(name)]
        if differing:
            name = min(differing)
            raise InputError(
                f"{folder} is of a search with another {', '.join(sorted(differing))} ({name} {shown(kept.get(name))}, "
                f"now {shown(settings.get(name))}); accepted: the same; remove the folder, or use another OUTPUT"
            )

    def read(self, num_prompts: int, num_layers: int, num_heads: int, num_candidates: int) -> dict[Place, LayerScores]:
        """All that was found. A file that is damaged counts as not there."""
        places = [(prompt, layer) for prompt in range(num_prompts) for layer in range(num_layers)]
        found = {place: self._read(self._path(place), num_heads, num_candidates) for place in places}
        return {place: scores for place, scores in found.items() if scores is not None}

    def write(self, place: Place, scores: LayerScores) -> None:
        rows = [[astuple(score) for score in of_candidate] for of_candidate in scores]
        write_whole(self._path(place), json.dumps(rows).encode())

    def _path(self, place: Place) -> Path:
        prompt, layer = place
        return self._folder / f"prompt{prompt}_layer{layer}.json"

    def _read(self, path: Path, num_heads: int, num_candidates: int) -> LayerScores | None:
        try:
            rows = load_json(path)
            scores = tuple(tuple(HeadScore(*map(float, score)) for score in of_candidate) for of_candidate in rows)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        is_whole = len(scores) == num_candidates and all(len(of_candidate) == num_heads for of_candidate in scores)
        return scores if is_whole else None
