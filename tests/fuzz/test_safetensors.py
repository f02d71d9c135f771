"""Files of weights whose header is damaged or forged: of a checkpoint, and of a rank in a shard directory.

A file is 8 bytes of header length, the header, which is JSON, and the tensors' bytes.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import save_random
from fuzz.documents import Document, as_files, by_weight, changed
from fuzz.harness import for_cases, fuzz
from hypothesis import strategies as st

from engine.checkpoint import WEIGHTS_FILE, Checkpoint, check_weights
from engine.config import ModelConfig
from engine.rope_config import RopeConfig
from engine.shard_writer import write_shards
from engine.shards import FileRecord, ShardDir, rank_file

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=4, rms_norm_eps=1e-5, max_position_embeddings=64, rope=RopeConfig(),
    tie_word_embeddings=True,
)  # fmt: skip

_TWO, _FOUR, _EIGHT = "F16 BF16 I16 U16", "F32 I32 U32", "F64 I64 U64 C64"
_DTYPES = [*f"BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 {_TWO} {_FOUR} {_EIGHT} f32".split(), "F32\n"]
_ITEM_BYTES = {name: size for size, names in ((2, _TWO), (4, _FOUR), (8, _EIGHT)) for name in names.split()}
_SHAPES = [[], [0], [1], [8], [16, 8], [8, 16], [128], [2**62, 0], [2**40, 2**40], [2**64], [-1, -8], [1] * 100, [8.0]]
_OFFSETS = [[0, 0], [0, 512], [512, 0], [0, 2**63], [2**64, 2**64], [-8, 8], [0], [0, 1, 2], [0.0, 512.0]]
_NAMES = ["lm_head.weight", "a\nb", "x" * 3000, "", "__metadata__", "model.layers.0.self_attn.rotary_emb.inv_freq"]


def _parts(path: Path) -> tuple[Document, bytes]:
    """The header and the tensors' bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


@st.composite
def _forged(draw, header: Document) -> tuple[bytes, bytes]:
    """A header in itself consistent, of tensors that the model does not have so, and their bytes."""
    metadata = header["__metadata__"]
    tensors = {name: (info["dtype"], info["shape"]) for name, info in header.items() if name != "__metadata__"}
    name = draw(st.sampled_from(list(tensors)))
    dtype, shape = tensors[name]
    kind = draw(st.sampled_from("rename drop dtype shape more tied metadata".split()))
    if kind == "rename":
        tensors[draw(st.sampled_from(_NAMES) | st.text())] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    elif kind == "dtype":
        tensors[name] = (draw(st.sampled_from(_DTYPES)), shape)
    elif kind == "shape":
        tensors[name] = (dtype, draw(st.sampled_from(_SHAPES) | st.permutations(shape)))
    elif kind == "more":
        tensors[draw(st.sampled_from(_NAMES))] = (draw(st.sampled_from(_DTYPES)), draw(st.sampled_from(_SHAPES)))
    elif kind == "tied":  # the head, which is compared with the embeddings
        both = (draw(st.sampled_from(_DTYPES)), draw(st.sampled_from([[16, 8], *_SHAPES])))
        tensors |= dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], both)
    else:
        metadata = draw(st.sampled_from([{}, {"format": "tf"}, {"a\n": "b" * 9999}]))
    forged, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in tensors.items():
        # Sizes that no file has are left to fail.
        size = _ITEM_BYTES.get(dtype, 1) * int(math.prod(shape))
        start, end = end, end + (size if 0 <= size <= 10_000 else 0)
        forged[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return json.dumps(forged).encode(), bytes(end)


@st.composite
def _files(draw, header: Document, tensors: bytes) -> bytes:
    changes = changed(st.just(header), _NAMES, [*_DTYPES, *_SHAPES, *_OFFSETS])
    damaged = st.tuples(as_files(changes), st.just(tensors))
    text, tensors = draw(by_weight((2, damaged), (3, _forged(header))))
    text += b" " * draw(st.sampled_from([0, -len(text) % 8, 1, 1000]))
    lengths = st.sampled_from([0, 1, len(text) - 1, len(text) + 1, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
    length = draw(lengths) if draw(st.integers(0, 15)) == 0 else len(text)
    kind = draw(st.sampled_from(["whole"] * 20 + ["fitted"] * 4 + ["cut", "longer", "none", "cut anywhere"]))
    if kind == "fitted":  # as long as the header asks for, where that is not too much
        tensors = (tensors * 4)[: _asked_for(text, len(tensors))]
    elif kind == "cut":
        tensors = tensors[: draw(st.integers(0, len(tensors)))]
    elif kind == "longer":
        tensors += bytes(draw(st.integers(1, 64)))
    elif kind == "none":
        tensors = b""
    file = length.to_bytes(8, "little") + text + tensors
    return file[: draw(st.integers(0, len(file)))] if kind == "cut anywhere" else file


def _asked_for(text: bytes, otherwise: int) -> int:
    try:
        return int(max(info["data_offsets"][1] for name, info in json.loads(text).items() if name != "__metadata__"))
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RecursionError):
        return otherwise


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), CONFIG)


@for_cases
def test_checkpoints(num_cases, model, tmp_path):
    num_opened = num_read = 0

    def read(data: bytes) -> None:
        nonlocal num_opened, num_read
        (tmp_path / WEIGHTS_FILE).write_bytes(data)
        with Checkpoint(tmp_path) as checkpoint:
            num_opened += 1
            for name in checkpoint.names():
                shape, size = checkpoint.shape(name), checkpoint.num_bytes(name)
                tensor = checkpoint.read(name)
                assert (tuple(tensor.shape), tensor.nbytes) == (shape, size)
                tensor.sum()  # every byte that it says it has is there
                for dim in range(len(shape)):
                    assert checkpoint.read(name, dim, 0, shape[dim] // 2).shape[dim] == shape[dim] // 2
            num_read += 1
            check_weights(checkpoint, CONFIG)

    outcomes = fuzz(num_cases, _files(*_parts(model / WEIGHTS_FILE)), read)
    assert outcomes.accepted_share > 0.05
    assert num_opened > 0.15 * num_cases
    assert num_read > 0.1 * num_cases
    outcomes.assert_reached(["not safetensors", "is stored as", "missing", "wrong shape", "unexpected"])


@for_cases
def test_ranks(num_cases, model, tmp_path):
    shards = write_shards(model, tmp_path / "shards", 2, model_name="owner/name").shards
    name = rank_file(1, 2)
    path = shards.folder / name

    def read(data: bytes) -> None:
        path.write_bytes(data)
        # Of the size that is on record, so that the header is looked at.
        files = shards.manifest.files | {name: FileRecord(len(data), "")}
        of_size = ShardDir(shards.folder, replace(shards.manifest, files=files))
        problem = of_size.problem_of(name)
        assert problem is None or (problem.isprintable() and len(problem) < 800)
        with of_size.open_rank(1) as file:
            assert problem is None
            for tensor in file.names():
                file.read(tensor).sum()

    outcomes = fuzz(num_cases, _files(*_parts(path)), read)
    assert outcomes.accepted_share > 0.05
    assert outcomes.share("not safetensors") < 0.9
    outcomes.assert_reached(["none, not float32", "another dtype", r"float32 .*, not float32", ", not none"])
