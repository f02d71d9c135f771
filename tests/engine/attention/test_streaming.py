"""StreamingLLM against its definition: a cache that evicts, token by token."""

import pytest
import torch
from generating import generate, prompts
from models import assert_close, hf_model, our_engine
from ranks import run_ranks
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.attention import get_method
from engine.errors import InputError

STREAMING = "streaming:n_init=3:n_local=10"


@torch.no_grad()
def evicting(hf, tokens, n_init, n_local):
    """Logits after every token. Keys are kept as they were before they are rotated, and rotated by where they are in
    the cache; when it is full, the key after the sinks goes."""
    model, config = hf.model, hf.config
    caches = [([], []) for _ in model.layers]
    head_dim = model.layers[0].self_attn.head_dim
    logits = []
    for token in tokens:
        x = model.embed_tokens(torch.tensor([[token]]))
        for layer, (keys, values) in zip(model.layers, caches, strict=True):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                projection(h).view(1, 1, -1, head_dim).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys.append(k)
            values.append(v)
            if len(keys) > n_init + n_local:
                del keys[n_init], values[n_init]
            length = len(keys)
            cos, sin = model.rotary_emb(x, torch.arange(length)[None])
            k_rotated = apply_rotary_pos_emb(torch.cat(keys, 2), torch.cat(keys, 2), cos, sin)[1]
            q_rotated = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])[0]
            group = config.num_attention_heads // config.num_key_value_heads
            scores = q_rotated @ k_rotated.repeat_interleave(group, 1).mT * head_dim**-0.5
            out = scores.softmax(-1) @ torch.cat(values, 2).repeat_interleave(group, 1)
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits.append(hf.lm_head(model.norm(x))[0, 0])
    return logits


@pytest.mark.parametrize(("n_init", "n_local"), [(3, 10), (1, 1), (0, 7), (5, 30)])
def test_logits_are_those_of_a_cache_that_evicts(n_init, n_local):
    hf = hf_model()
    engine, (prompt,) = our_engine(hf), prompts(45)
    (found,) = generate(engine, [prompt], attention=f"streaming:n_init={n_init}:n_local={n_local}")
    expected = evicting(hf, [*prompt, *found.token_ids[:-1]], n_init, n_local)[len(prompt) - 1 :]
    assert_close(torch.stack(list(found.logits)), torch.stack(expected))


@pytest.mark.parametrize("family", ["llama, rope yarn", "llama, rope llama3", "llama, biases, head_dim"])
def test_any_rope(family):
    hf = hf_model(family)
    (prompt,) = prompts(50)
    (found,) = generate(our_engine(hf), [prompt], attention=STREAMING)
    expected = evicting(hf, [*prompt, *found.token_ids[:-1]], 3, 10)[len(prompt) - 1 :]
    assert_close(torch.stack(list(found.logits)), torch.stack(expected))


@pytest.mark.parametrize("first", [1, 2, 3, 8, 20])
def test_sharing_changes_nothing(first):
    """Nodes that end among the sinks, with them, and behind them."""
    hf = hf_model()
    shared, middle, a, b = prompts(first, 25, 30, 4)
    given = [shared + middle + a, shared + middle + b, shared + b]
    engine = our_engine(hf)
    alone = [generate(engine, [prompt], attention=STREAMING)[0] for prompt in given]
    for found, expected in zip(generate(engine, given, attention=STREAMING), alone, strict=True):
        assert found.token_ids == expected.token_ids
        assert_close(torch.stack(list(found.logits)), torch.stack(list(expected.logits)))


def test_ranks_generate_what_one_does():
    hf = hf_model()
    given = prompts(45, 30, 3)
    expected = generate(our_engine(hf), given, attention=STREAMING)
    for results in run_ranks(4, lambda group: generate(our_engine(hf, group), given, attention=STREAMING)):
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]


def test_a_window_over_everything_is_exact():
    hf = hf_model()
    given = prompts(45, 30)
    engine = our_engine(hf)
    for found, expected in zip(generate(engine, given, attention="streaming"), generate(engine, given), strict=True):
        assert found.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("streaming:n_local=0", "attention 'streaming:n_local=0': n_local is 0; accepted: 1 or more"),
        ("streaming:n_init=x", "n_init is 'x'; accepted: an integer"),
        ("streaming:size=3", "has the option 'size=3'; accepted, each once: n_init=..., n_local=..."),
        ("hydragen:n_init=3", "has the option 'n_init=3'; accepted, each once: none"),
    ],
)
def test_mistakes(name, message):
    with pytest.raises(InputError, match=message):
        get_method(name)


def test_models_with_a_window_are_refused():
    with pytest.raises(InputError, match="'streaming' is for models without a window; this one's is 7 tokens"):
        generate(our_engine(hf_model("mistral, window")), prompts(5), attention="streaming")


def test_sparse_prefill_is_refused():
    """It would read prompts another way."""
    with pytest.raises(InputError, match="'streaming' reads prompts by itself; accepted with it: prefill dense"):
        generate(our_engine(hf_model(), prefill="a_shape"), prompts(5), attention="streaming")
