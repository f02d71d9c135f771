"""Sparse prefill in the engine: against transformers under the same mask, and against itself cut otherwise."""

import pytest
import torch
from generating import generate, mixed_heads, prompts
from models import assert_close, hf_model, our_engine
from ranks import run_ranks
from tensor_memory import TensorMemory

from engine import tree_room
from engine.activations import tree_activation_bytes
from engine.engine import Levels
from engine.errors import InputError
from kernels.sparse import SparseRows, lower
from kernels.sparse.patterns import AShape
from kernels.sparse.reference import expanded_mask

A_SHAPE = "a_shape:n_init=3:n_local=10:dense_below=0"
EVERYTHING = (
    "a_shape:n_init=0:n_local=999:dense_below=0",
    "tri_shape:n_init=0:n_local=1:n_last=999:dense_below=0",
    "vertical_slash:num_vertical=999:num_slash=1:dense_below=0",
    "vertical_slash:num_vertical=0:num_slash=999:dense_below=0",
    "block_sparse:num_blocks=99:dense_below=0",
    "minference:dense_below=0",
)


def assert_same_logits(found, expected):
    assert_close(torch.stack(list(found.logits)), torch.stack(list(expected.logits)))


def tokens(results):
    return [tuple(result.token_ids) for result in results]


@pytest.mark.parametrize("family", ["llama", "llama, multi-head, tied", "qwen3", "glm", "phi3"])
def test_logits_are_those_of_transformers_under_the_mask(family):
    hf = hf_model(family)
    (prompt,) = prompts(200)
    (found,) = generate(our_engine(hf, prefill=A_SHAPE), [prompt], num_tokens=1)
    rows = SparseRows.contiguous([200], [0], [200])
    q, k = torch.zeros(200, 1, 4), torch.zeros(200, 1, 4)
    mask = expanded_mask(lower([AShape(3, 10)], q, k, rows, 1.0), rows, 0)[None]
    assert mask.float().mean() < 0.4
    with torch.no_grad():
        expected = hf(torch.tensor([prompt]), attention_mask=torch.where(mask, 0.0, float("-inf"))).logits[0, -1]
    assert_close(found.logits[0], expected)


@pytest.mark.parametrize("attention", ["hydragen", "hydragen_noshared", "auto"])
@pytest.mark.parametrize("prefill", EVERYTHING)
def test_budgets_for_everything_are_dense(prefill, attention):
    hf = hf_model()
    shared, a, b, c = prompts(90, 70, 1, 40)
    given = [shared + a, shared + a + b, shared + c, c]
    dense, sparse = (our_engine(hf, prefill=name) for name in (None, prefill))
    expected = generate(dense, given, attention=attention)
    with sparse.sparse_prefill.measured() as density:
        found = generate(sparse, given, attention=attention)
    assert tokens(found) == tokens(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_logits(ours, theirs)
    assert density.by_layer == [[1.0] * 4] * 2


def test_sharing_changes_nothing_where_the_mask_goes_by_positions():
    """A prompt whose beginning is shared reads it in pieces, of which none begins with a tile."""
    hf = hf_model()
    shared, middle, a, b = prompts(90, 37, 70, 64)
    given = [shared + middle + a, shared + middle + b, shared + a]
    engine = our_engine(hf, prefill=A_SHAPE)
    expected = [generate(engine, [prompt])[0] for prompt in given]
    for options in ({"attention": "hydragen"}, {"attention": "hydragen_noshared"}, {"disable_hierarchy": True}):
        found = generate(engine, given, **options)
        assert tokens(found) == tokens(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_logits(ours, theirs)


def test_kept_levels_are_read_sparsely_too():
    hf = hf_model()
    document, question = prompts(150, 20)
    engine = our_engine(hf, prefill=A_SHAPE)
    (expected,) = generate(engine, [document + question])
    engine.append_shared([document])
    (found,) = generate(engine, [question], shared_cache_op="preserve")
    assert_same_logits(found, expected)
    (dense,) = generate(our_engine(hf), [document + question])
    assert not torch.allclose(dense.logits[0], expected.logits[0], atol=1e-2)


def test_runs_that_are_too_short_are_dense():
    hf = hf_model()
    long, short = prompts(150, 60)
    shared = prompts(40, seed=1)[0]
    levels = Levels([[shared], [long, short]])
    engine = our_engine(hf, prefill="a_shape:n_init=0:n_local=1:dense_below=100")
    with engine.sparse_prefill.measured() as density:
        first, second = generate(engine, levels)
    (dense,) = generate(our_engine(hf), [shared + short])
    assert_same_logits(second, dense)
    (alone,) = generate(engine, Levels([[shared], [long]]))
    assert_same_logits(first, alone)
    assert 0.3 < density.by_layer[0][0] < 0.9
    # Nothing that is long enough: all of attention, in the same segments as ever.
    (found,), (expected,) = (
        generate(our_engine(hf, prefill=name), [short]) for name in ("a_shape:n_local=1:dense_below=100", None)
    )
    assert all(map(torch.equal, found.logits, expected.logits))


@pytest.mark.parametrize(
    "prefill", ["mixed", "a_shape:n_init=3:n_local=20:dense_below=0", "block_sparse:num_blocks=2:dense_below=0"]
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_generate_what_one_does(size, prefill, tmp_path):
    """Each takes its own heads' patterns: 4 ranks share 2 KV heads."""
    prefill = mixed_heads(tmp_path) if prefill == "mixed" else prefill
    hf = hf_model()
    shared, a, b, c = prompts(130, 70, 40, 20)
    given = [shared + a, shared + b, shared + c, c]

    def work(group):
        engine = our_engine(hf, group, prefill=prefill)
        with engine.sparse_prefill.measured() as density:
            return generate(engine, given), density.by_layer

    ((expected, density),) = run_ranks(1, work)
    assert any(value < 0.9 for layer in density for value in layer), density
    results = run_ranks(size, work)
    for found, _ in results:
        assert tokens(found) == tokens(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_logits(ours, theirs)
    for layer in range(2):
        joined = sum((by_layer[layer] for _, by_layer in results), [])
        assert joined == pytest.approx(density[layer])


def test_attention_disabled_has_nothing_to_be_sparse(capsys):
    hf = hf_model()
    given = prompts(100)
    sparse = our_engine(hf, prefill=A_SHAPE)
    for _ in range(2):
        found = generate(sparse, given, attention="noattention")
    assert tokens(found) == tokens(generate(our_engine(hf), given, attention="noattention"))
    notice = "notice: attention noattention looks at no keys: a sparse prefill changes nothing\n"
    assert capsys.readouterr().err == notice


def test_backends(monkeypatch):
    hf = hf_model()
    given = prompts(150)
    expected, *others = (
        generate(our_engine(hf, prefill=A_SHAPE, attention_backend=name), given) for name in ("reference", "aten", None)
    )
    for found in others:
        assert tokens(found) == tokens(expected)


def test_a_window_is_refused():
    with pytest.raises(InputError, match="has a sliding window of 7 tokens; accepted for such a model: dense"):
        our_engine(hf_model("mistral, window"), prefill=A_SHAPE)


def test_masks_have_room(monkeypatch):
    """Few tokens behind a long prefix, whose mask takes more than their states."""
    predicted = []

    def watched(*arguments):
        predicted.append(tree_activation_bytes(*arguments))
        return predicted[-1]

    monkeypatch.setattr(tree_room, "tree_activation_bytes", watched)

    def peak(prefill):
        """Bytes that the second of two levels took, and was predicted to take."""
        ours = our_engine(hf_model("llama", max_position_embeddings=8192), prefill=prefill)
        ours.setup_caches(8192)
        for prompt in ([3, 5, 8, 13] * 1900, [7] * 70):
            predicted.clear()
            with TensorMemory() as memory:
                ours.append_shared([prompt])
        return memory.peak, max(predicted)

    sparse = "vertical_slash:num_vertical=50:num_slash=200:dense_below="
    (dense, of_dense), (masked, of_masked), short = peak("dense"), peak(f"{sparse}70"), peak(f"{sparse}71")
    # The rotary table, which both make, is in neither prediction.
    assert of_dense < masked - dense <= of_masked < 2 * masked
    assert short == (dense, of_dense)
