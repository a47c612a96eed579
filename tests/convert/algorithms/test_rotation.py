from __future__ import annotations

from functools import reduce

import pytest
import torch

from convert.algorithms import rotation

#: Sizes with a Hadamard matrix by either construction: hidden and head sizes of models among them.
KNOWN = [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 76, 80, 96, 100 * 2, 128, 576, 896, 960, 1152]


@pytest.mark.parametrize("size", KNOWN)
def test_a_hadamard_matrix_is_one(size: int) -> None:
    factors = rotation.hadamard_factors(size)
    assert factors is not None
    matrix = reduce(torch.kron, factors)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 3, 6, 13, 52, 92, 172, 577])
def test_where_none_is_known_none_is_made(size: int) -> None:
    assert rotation.hadamard_factors(size) is None


@pytest.mark.parametrize(("size", "word"), [(64, "hadamard"), (36, "hadamard"), (52, "random"), (7, "random")])
def test_a_rotation_is_orthogonal_and_the_same_for_a_seed(size: int, word: str) -> None:
    made = rotation.make_rotation(size, seed=3)
    assert made.word == word
    torch.testing.assert_close(made.matrix @ made.matrix.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(made.matrix, rotation.make_rotation(size, seed=3).matrix)
    assert not torch.equal(made.matrix, rotation.make_rotation(size, seed=4).matrix)


@pytest.mark.parametrize("size", [1, 2, 12, 36, 52, 64, 96, 128, 576, 1152, 1536])
def test_turning_factor_by_factor_is_the_product_with_the_matrix(size: int) -> None:
    made = rotation.make_rotation(size, seed=2)
    assert made.size == size == len(made.matrix)
    assert all(len(factor) <= 128 for factor in made.factors)
    rows = torch.randn(5, 3 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([part @ made.matrix for part in rows.split(size, dim=1)], dim=1)
    torch.testing.assert_close(made.turn(rows), expected, rtol=0, atol=1e-13)
    assert made.turn(rows[:0]).shape == (0, 3 * size)


@pytest.mark.parametrize(("hidden", "heads", "kv_heads"), [(48, 4, 2), (52, 2, 2), (64, 4, 1)])
def test_a_rotated_llama_computes_what_it_did(hidden: int, heads: int, kv_heads: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=72, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=99, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # norms other than one, biases other than zero
        tokens = torch.randint(0, 99, (2, 17))
        before = model(tokens).logits
        first_input: list[torch.Tensor] = []
        hook = model.model.layers[1].register_forward_pre_hook(lambda _module, args: first_input.append(args[0]))
        model(tokens)
        r1 = rotation.make_rotation(hidden, seed=0).matrix
        r2 = rotation.make_rotation(hidden // heads, seed=1).matrix
        body = model.model
        body.embed_tokens.weight.copy_(rotation.rotate_rows_of_embedding(body.embed_tokens.weight, r1))
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = [
                (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ]
            for norm, linears in readers:
                for linear in linears:
                    linear.weight.copy_(rotation.rotate_input(rotation.fold_norm(norm.weight, linear.weight), r1))
                norm.weight.fill_(1)
            for linear in (attention.o_proj, mlp.down_proj):
                weight, bias = rotation.rotate_output(linear.weight, linear.bias, r1)
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
            v, v_bias, o = rotation.rotate_values(attention.v_proj.weight, attention.v_proj.bias, attention.o_proj.weight, r2)
            attention.v_proj.weight.copy_(v)
            attention.o_proj.weight.copy_(o)
            assert v_bias is not None
            attention.v_proj.bias.copy_(v_bias)
        model.lm_head.weight.copy_(rotation.rotate_input(rotation.fold_norm(body.norm.weight, model.lm_head.weight), r1))
        body.norm.weight.fill_(1)
        after = model(tokens).logits
        hook.remove()
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    turned = rotation.rotate_rows_of_embedding(first_input[0], r1)
    assert (first_input[1] - turned).norm() < 1e-5 * turned.norm()
    assert (first_input[1] - first_input[0]).norm() > 0.5 * turned.norm()


def test_folding_into_a_norm_that_adds_one() -> None:
    norm, weight, x = torch.randn(8), torch.randn(5, 8), torch.randn(3, 8)
    torch.testing.assert_close(x @ rotation.fold_norm(norm, weight, offset=1.0).T, (x * (1 + norm)) @ weight.T)
