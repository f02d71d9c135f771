import pytest
import torch

from engine.dummy import dummy_tensor

NAME = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_holds_the_same_numbers(dtype):
    for shape in [(64, 96), (5, 8192), (3,), (7, 1)]:
        expected = dummy_tensor(NAME, shape, torch.float32)
        actual = dummy_tensor(NAME, shape, dtype)
        assert actual.dtype == dtype and actual.shape == shape
        assert torch.equal(actual.float(), expected)


def test_numbers_depend_on_name_and_seed_only():
    tensor = dummy_tensor(NAME, (64, 96), torch.float32, seed=1)
    assert torch.equal(tensor, dummy_tensor(NAME, (64, 96), torch.float32, seed=1))
    assert not torch.equal(tensor, dummy_tensor(NAME, (64, 96), torch.float32, seed=2))
    assert not torch.equal(tensor, dummy_tensor(NAME.replace("3", "4"), (64, 96), torch.float32, seed=1))


def test_the_numbers_never_change():
    """Written checkpoints and dummy loads of different versions of this project must agree."""
    first = dummy_tensor(NAME, (2, 4), torch.float32, seed=0) * 512
    assert first.flatten().tolist() == [182, -142, 46, -166, -254, 134, -374, -54]


@pytest.mark.parametrize("num_in", [64, 768, 8192])
def test_a_matrix_keeps_the_size_of_activations(num_in):
    weight = dummy_tensor(NAME, (512, num_in), torch.float32)
    out = torch.randn(64, num_in, generator=torch.Generator().manual_seed(0)) @ weight.T
    assert 0.6 < out.std() < 1.5
    assert abs(weight.mean()) < 0.02 * weight.std() * 3


def test_norms_are_ones_and_biases_small():
    assert torch.equal(dummy_tensor("model.norm.weight", (8,), torch.float16), torch.ones(8, dtype=torch.float16))
    assert torch.equal(dummy_tensor("model.layers.0.self_attn.q_norm.weight", (8,), torch.float32), torch.ones(8))
    bias = dummy_tensor("model.layers.0.self_attn.q_proj.bias", (4096,), torch.float32)
    assert 0.01 < bias.std() < 0.04
