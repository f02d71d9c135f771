"""How prefill methods are named, and the files that have a pattern for each head."""

import json
from dataclasses import replace

import pytest

from engine.errors import InputError
from engine.prefill import PREFILL_METHODS, get_support_models, parse_prefill
from engine.prefill.head_config import DEFAULT_PATTERN, find_head_config, read_head_config, write_head_config
from engine.presets import find_preset
from kernels.sparse import AShape, BlockSparse, Dense, TriShape, VerticalSlash

TINY = find_preset("tiny")  # 2 layers of 4 heads
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


class TestNames:
    @pytest.mark.parametrize("name", PREFILL_METHODS)
    def test_every_method_has_defaults(self, name):
        method = parse_prefill(name)
        assert method.is_dense == (name == "dense")
        if not method.is_dense:
            layers = method.heads("tiny", TINY)
            assert [len(layer) for layer in layers] == [4, 4] and len(set(layers)) == 1

    def test_none_is_dense(self):
        assert parse_prefill(None).is_dense

    @pytest.mark.parametrize(
        ("text", "pattern", "dense_below"),
        [
            ("a_shape:n_init=4:n_local=64", AShape(4, 64), 2048),
            (" tri_shape:n_last=7:dense_below=0", TriShape(128, 4096, 7), 0),
            ("vertical_slash:num_vertical=30:num_slash=800", VerticalSlash(30, 800), 2048),
            ("block_sparse:num_blocks=8:dense_below=99", BlockSparse(8), 99),
        ],
    )
    def test_options(self, text, pattern, dense_below):
        method = parse_prefill(text)
        assert (method.pattern, method.dense_below, method.text) == (pattern, dense_below, text.strip())

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("sparse", ["prefill 'sparse' is not known; accepted: dense, a_shape, "]),
            ("", ["prefill '' is not known"]),
            ("dense:n_init=1", ["prefill 'dense:n_init=1' has the option 'n_init=1'; accepted, each once: none"]),
            ("a_shape:", ["has the option ''; accepted, each once: n_init=..., n_local=..., dense_below=..."]),
            ("a_shape:n_init", ["the option 'n_init'"]),
            ("a_shape:num_blocks=3", ["the option 'num_blocks=3'"]),
            ("a_shape:n_init=3:n_init=4", ["the option 'n_init=4'"]),
            ("a_shape:n_init=-3", ["n_init is '-3'; accepted: an integer"]),
            ("a_shape:n_local=0", ["n_local is 0; accepted: an integer from 1 up"]),
            ("vertical_slash:num_slash=1e3", ["num_slash is '1e3'"]),
            ("vertical_slash:config=x", ["accepted, each once: num_vertical=..., num_slash=..., dense_below"]),
        ],
    )
    def test_mistakes(self, text, parts):
        with pytest.raises(InputError) as error:
            parse_prefill(text)
        assert all(part in str(error.value) for part in parts), str(error.value)

    def test_a_model_with_a_window_is_refused(self):
        with pytest.raises(InputError, match="prefill a_shape was asked for, but m has a sliding window of 99 tokens"):
            parse_prefill("a_shape").heads("m", replace(TINY, architecture="MistralForCausalLM", sliding_window=99))


class TestConfigurations:
    @pytest.mark.parametrize("model", get_support_models())
    def test_the_published_ones_load(self, model):
        layers = parse_prefill(f"minference:config={model}").heads("x", replace(TINY, num_layers=32, num_heads=32))
        assert [len(layer) for layer in layers] == [32] * 32
        kinds = {type(pattern) for layer in layers for pattern in layer}
        assert kinds == ({VerticalSlash} if "lama" in model else {VerticalSlash, AShape})

    def test_by_the_models_own_name(self):
        config = find_preset(LLAMA)
        own, named = (parse_prefill(text) for text in ("minference", f"minference:config={LLAMA.upper()}"))
        assert (
            own.heads(LLAMA, config) == own.heads("/models/Llama-3.1-8B-Instruct", config) == named.heads("x", config)
        )
        assert own.heads(LLAMA, config)[0][0] == VerticalSlash(1000, 6096)
        assert own.note(LLAMA) is None and named.note("x") is None

    def test_an_unknown_model_gets_a_stated_default(self):
        method = parse_prefill("minference")
        assert set(sum(method.heads("tiny", TINY), ())) == {DEFAULT_PATTERN}
        assert method.note("someone/Llama-3.1-8B-Instruct").startswith("someone/Llama-3.1-8B-Instruct is read by the ")
        assert method.note("tiny").startswith("no published configuration for tiny: each head keeps 1000 verticals")

    def test_every_type(self, tmp_path):
        path = tmp_path / "heads.json"
        layer = {
            "0": ["vertical_and_slash", 30, 800, 0.9],
            "1": ["stream_llm", 100, 800, 1],
            "2": ["block_sparse", 8, 1, 0.5],
            "3": ["dense", 0, 0, 1.0],
        }
        other = layer | {"2": ["block_sparse", 8, 0, 0.5]}
        path.write_text(json.dumps([layer, other]))
        first, second = parse_prefill(f"minference:config={path}").heads("x", TINY)
        assert first == (VerticalSlash(30, 800), AShape(100, 800), BlockSparse(100), Dense())
        assert second[2] == BlockSparse(8)

    def test_what_is_written_is_read(self, tmp_path):
        path, layers = (
            tmp_path / "heads.json",
            [[(VerticalSlash(3, 4), 0.5), (Dense(), 1.0)], [(AShape(1, 2), 0.25), (BlockSparse(7), 0)]],
        )
        path.write_bytes(write_head_config(layers, {"model": "x", "prompts": 3}))
        assert json.loads(path.read_text())["model"] == "x"
        assert read_head_config(path, 2, 2) == tuple(tuple(p for p, _ in layer) for layer in layers)
        with pytest.raises(ValueError, match="no type for TriShape"):
            write_head_config([[(TriShape(1, 1, 1), 0)]], {})

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read"),
            ('"x"', "has 'x'; accepted: a list of 2 layers"),
            ([{}], "has 1 layers; accepted: a list of 2 layers, as the model has"),
            ([[], []], "layer 0 is .*; accepted: an object"),
            ([{"0": ["dense", 0, 0]}, {}], "layer 0 has no pattern for head 1, 2, 3; accepted: one for each of the"),
            ([{str(i): ["dense", 0, 0] for i in range(5)}] * 2, "layer 0 has a head '4'; accepted: 0 to 3"),
            ([{str(i): ["dense", 0] for i in range(4)}] * 2, "head 0 is .*; accepted: .type, number, number, score"),
            (
                [{str(i): ["flash", 0, 0] for i in range(4)}] * 2,
                "head 0 has the type 'flash'; accepted: vertical_and_s",
            ),
            ([{str(i): ["stream_llm", 0, 0] for i in range(4)}] * 2, "head 0: AShape: n_local is 0"),
            ([{str(i): ["stream_llm", True, 1] for i in range(4)}] * 2, "head 0 is"),
        ],
    )
    def test_files_that_do_not_fit(self, tmp_path, content, message):
        path = tmp_path / "heads.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError, match=message):
            parse_prefill(f"minference:config={path}").heads("x", TINY)

    def test_no_such_configuration(self):
        with pytest.raises(
            InputError, match="'nowhere' is no file and no known model; accepted: a JSON file, or one of"
        ):
            parse_prefill("minference:config=nowhere").heads("x", TINY)

    def test_all_that_are_listed_are_there(self):
        assert all(find_head_config(model).is_file() for model in get_support_models())
        assert find_head_config("tiny") is None
