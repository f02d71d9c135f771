"""A shard directory whose manifest is damaged or forged, at times together with its config."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from checkpoints import save_random
from fuzz.documents import Document, as_files, by_weight, changed
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st

from engine.checkpoint import CONFIG_FILE
from engine.config import ModelConfig
from engine.rope_config import RopeConfig
from engine.shard_writer import write_shards
from engine.shards import MANIFEST_FILE, open_shards, verify

NUM_SPLITS = 2
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=4, rms_norm_eps=1e-5, max_position_embeddings=64, rope=RopeConfig(),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A split of a model of 12 tensors. A test may write any manifest and config into it."""
    parent = tmp_path_factory.mktemp("split")
    checkpoint = save_random(parent / "model", CONFIG, {"tokenizer.json": b"{}"})
    return write_shards(checkpoint, parent / "shards", NUM_SPLITS, model_name="owner/name").shards.folder


_RULES = ["row", "column", "vocab", "fused", "diagonal"]
_FILES = ["rank-00000-of-00001.safetensors", "rank-00002-of-00003.safetensors", "../config.json", "a/b", "x" * 300]
_COUNTS = [1, 3, 4, 2**20, 2**40]
_SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "head_dim"]


@st.composite
def _forged(draw, manifest: Document) -> Document:
    """A manifest with a change that its reader looks at late."""
    manifest = deepcopy(manifest)
    kind = draw(st.sampled_from("files size name tensors splits config both dtype extra".split()))
    if kind == "files":
        manifest["files"][draw(st.sampled_from(_FILES) | st.text())] = {"size": draw(st.integers()), "sha256": ""}
    elif kind == "size":
        name = draw(st.sampled_from(list(manifest["files"])))
        manifest["files"][name]["size"] = draw(st.integers())
    elif kind == "name":
        manifest["model_name"], manifest["fingerprint"] = draw(st.text()), draw(st.text())
    elif kind == "tensors":
        record = manifest["tensors"][draw(st.sampled_from(list(manifest["tensors"])))]
        record |= {"rule": draw(st.sampled_from(_RULES)), "shape": draw(st.lists(st.integers(), max_size=3))}
    elif kind == "splits":
        manifest["num_splits"] = draw(st.sampled_from(_COUNTS) | st.integers())
    elif kind == "dtype":
        manifest["dtype"] = manifest["config"]["torch_dtype"] = draw(st.sampled_from(["bfloat16", "float64", "F32"]))
    elif kind == "extra":
        manifest[draw(st.text())] = draw(st.sampled_from([1, [], {}]))
    else:
        manifest["config"][draw(st.sampled_from(_SIZES))] = draw(st.sampled_from(_COUNTS) | st.integers(1, 2**33))
    return manifest


def _cases(manifest: Document) -> st.SearchStrategy[tuple[bytes, bool]]:
    """``(manifest, whether the config beside it is made to agree)``."""
    documents = st.one_of(st.just(manifest), changed(st.just(manifest), values=[*_RULES, *_FILES, *_COUNTS]))
    damaged = as_files(documents)
    forged = _forged(manifest).map(lambda document: json.dumps(document).encode())
    return st.tuples(by_weight((2, damaged), (1, forged)), st.booleans())


@for_cases
def test_manifests(num_cases, folder):
    valid, valid_config = (json.loads((folder / name).read_text()) for name in (MANIFEST_FILE, CONFIG_FILE))
    problems: list[str] = []

    def read(case: tuple[bytes, bool]) -> None:
        data, agrees = case
        (folder / MANIFEST_FILE).write_bytes(data)
        (folder / CONFIG_FILE).write_text(json.dumps(config_in(data) if agrees else valid_config, indent=2) + "\n")
        shards = open_shards(folder)
        problems.extend(filter(None, map(shards.problem_of, shards.manifest.files)))
        for rank in range(NUM_SPLITS):
            shards.open_rank(rank).__exit__(None, None, None)
        verify(folder)

    def config_in(data: bytes) -> object:
        try:
            return json.loads(data)["config"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return valid_config

    outcomes = fuzz(num_cases, _cases(valid), read)
    assert outcomes.accepted_share > 0.05
    assert outcomes.share("is damaged .(it|Expecting|Extra|Unterm|Invalid|'utf|unexp)") < 0.4
    reached = [
        "has no field", "has format version", "no record of", "where a (str|int|dict|list) belongs", "dtype is",
        "config field", "is not a plain name", "differs from", "cannot split", "not cut by the rules", "bad files",
        "bytes, not",
    ]  # fmt: skip
    outcomes.assert_reached(reached)
    assert all(problem.isprintable() and len(problem) < 500 for problem in problems)
