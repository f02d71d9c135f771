"""transformers with sparse prefill, against this engine, and against transformers' own attention."""

import pytest
import torch
from generating import generate, mixed_heads, prompts
from models import assert_close, hf_model, our_engine

from engine import hf_attention, register_sparse_attention
from engine.errors import InputError
from engine.prefill import parse_prefill

SPARSE = "a_shape:n_init=3:n_local=10:dense_below=32"


def registered(prefill, family="llama", **changes):
    model = hf_model(family, **changes)
    model.set_attn_implementation(register_sparse_attention(prefill))
    return model


@pytest.mark.parametrize("prefill", [SPARSE, "mixed", "block_sparse:num_blocks=2:dense_below=0", "vertical_slash"])
def test_generates_what_this_engine_does(prefill, tmp_path):
    prefill = mixed_heads(tmp_path) if prefill == "mixed" else prefill
    model, (prompt,) = registered(prefill), prompts(200)
    (expected,) = generate(our_engine(hf_model(), prefill=prefill), [prompt], num_tokens=5)
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert tuple(found.sequences[0, 200:].tolist()) == tuple(expected.token_ids)
    assert_close(torch.stack(list(expected.logits)), torch.cat(found.logits))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side):
    """Each member as it is alone."""
    model, given = registered(SPARSE), prompts(150, 90, 20)
    ids, mask = torch.zeros(3, 150, dtype=torch.int64), torch.zeros(3, 150, dtype=torch.int64)
    for row, prompt in enumerate(given):
        place = slice(150 - len(prompt), 150) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, prompt in enumerate(given):
            assert_close(logits[row][mask[row] == 1], model(torch.tensor([prompt])).logits[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunks_and_caches(cache):
    """A prompt in two parts, of which the second has fewer queries than keys, then a token."""
    from transformers import DynamicCache, StaticCache

    model, (prompt,) = registered(SPARSE), prompts(141)
    ids = torch.tensor([prompt])
    past = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=200)
    with torch.no_grad():
        expected = model(ids).logits[0]
        parts = []
        for first, last in ((0, 70), (70, 140), (140, 141)):
            place = torch.arange(first, last)
            out = model(ids[:, first:last], past_key_values=past, position_ids=place[None], use_cache=True)
            parts.append(out.logits[0])
    assert_close(torch.cat(parts[:2]), expected[:140])
    assert parts[2].isfinite().all()


def test_short_prompts_are_dense_and_models_stay_as_they_are():
    model, (prompt,) = registered(SPARSE), prompts(31)
    with torch.no_grad():
        found = model(torch.tensor([prompt])).logits
        model.set_attn_implementation("eager")
        assert_close(found, model(torch.tensor([prompt])).logits)


def test_dense_is_transformers_own():
    model, (prompt,) = registered("dense"), prompts(100)
    with torch.no_grad():
        assert_close(model(torch.tensor([prompt])).logits, hf_model()(torch.tensor([prompt])).logits)


def test_a_default_is_stated_once(capsys):
    model = registered("minference:dense_below=32")
    with torch.no_grad():
        for _ in range(2):
            model(torch.tensor(prompts(40)))
    printed = capsys.readouterr().err
    assert printed.count("notice: no published configuration for ") == 1


def test_spans_of_padding():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert hf_attention._spans(mask, 4, 4) == [(1, 3), (0, 4), (0, 0), (3, 4)]


class TestRefused:
    def test_gradients(self):
        model = registered(SPARSE)
        with pytest.raises(ValueError, match="tributary_a_shape has no gradients; accepted: inference"):
            model(torch.tensor(prompts(5)))

    def test_dropout(self):
        model = registered(SPARSE, attention_dropout=0.5).train()
        with torch.no_grad(), pytest.raises(ValueError, match="no dropout, and 0.5 was asked for"):
            model(torch.tensor(prompts(5)))

    def test_windows(self):
        model = registered(SPARSE, "mistral, window")
        with torch.no_grad(), pytest.raises(ValueError, match="asks for a mask other than causal: a sliding window"):
            model(torch.tensor(prompts(50)))
        # Asked without its mask, as a model that makes none for itself would.
        attention = model.model.layers[0].self_attn
        q, kv = torch.zeros(1, 4, 50, 16), torch.zeros(1, 2, 50, 16)
        with torch.no_grad(), pytest.raises(ValueError, match="no sliding_window, which MistralAttention asks for"):
            hf_attention._Attention(parse_prefill(SPARSE))(attention, q, kv, kv, None, sliding_window=8)

    def test_packed_documents(self):
        model, positions = registered(SPARSE), torch.cat([torch.arange(30), torch.arange(20)])[None]
        with torch.no_grad(), pytest.raises(ValueError, match="packed documents .* use another attn_implementation"):
            model(torch.tensor(prompts(50)), position_ids=positions, use_cache=False)
        attention = model.model.layers[0].self_attn
        q, kv = torch.zeros(1, 4, 50, 16), torch.zeros(1, 2, 50, 16)
        with torch.no_grad(), pytest.raises(ValueError, match="no cu_seq_lens_q, which LlamaAttention asks for"):
            hf_attention._Attention(parse_prefill(SPARSE))(attention, q, kv, kv, None, cu_seq_lens_q=positions[0])

    def test_models_that_compute_attention_themselves(self):
        from transformers import AutoModelForCausalLM, BloomConfig

        config = BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2)
        name = register_sparse_attention(SPARSE)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        with torch.no_grad(), pytest.raises(ValueError, match="BloomModel computes its attention by itself"):
            model(torch.tensor([[1, 2, 3]]))

    def test_a_mask_without_the_keys_in_the_cache(self):
        model, ids = registered(SPARSE), torch.tensor(prompts(60))
        with torch.no_grad():
            past = model(ids[:, :40], use_cache=True).past_key_values
            with pytest.raises(ValueError, match="the attention mask has 20 keys; accepted: all 60 up to the last"):
                model(ids[:, 40:], past_key_values=past, attention_mask=torch.ones(1, 20))

    def test_values_of_another_size(self):
        attention = registered(SPARSE).model.layers[0].self_attn
        q, k, v = torch.zeros(1, 4, 50, 16), torch.zeros(1, 2, 50, 16), torch.zeros(1, 2, 50, 8)
        with torch.no_grad(), pytest.raises(ValueError, match="LlamaAttention has 16 for queries and 8 for values"):
            hf_attention._Attention(parse_prefill(SPARSE))(attention, q, k, v, None)

    def test_masks_with_holes_and_of_other_shapes(self):
        model, mask = registered(SPARSE), torch.ones(1, 50, dtype=torch.int64)
        mask[0, 20] = 0
        with torch.no_grad(), pytest.raises(ValueError, match="the attention mask has holes"):
            model(torch.tensor(prompts(50)), attention_mask=mask)
        with torch.no_grad(), pytest.raises(ValueError, match=r"shape \(1, 1, 50, 50\); accepted: \(batch, keys\)"):
            model(torch.tensor(prompts(50)), attention_mask=torch.ones(1, 1, 50, 50, dtype=torch.bool))

    def test_unknown_methods(self):
        with pytest.raises(InputError, match="prefill 'flash' is not known"):
            register_sparse_attention("flash")
