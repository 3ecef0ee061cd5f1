"""Similarity of attention heads, for pruning a model and for merging two.

    python examples/head_matching.py

Two heads are compared by their interaction matrices Q^T K and V^T O^T, which are what a head computes however its own
coordinates are turned. Within one layer that finds heads that do the same work; between two models it finds which head
of one is which head of the other, without which an average of their weights averages strangers.
"""

from __future__ import annotations

import copy

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorasuite_kernels import head_similarity

HEADS, SIZE, WIDTH = 8, 16, 64


def small_model() -> LlamaForCausalLM:
    """Two layers of eight heads, random weights of a trained model's sizes."""
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        head_dim=SIZE,
        initializer_range=WIDTH**-0.5,
    )
    return LlamaForCausalLM(config).eval()


def attention(model: LlamaForCausalLM, layer: int) -> list[Tensor]:
    """q, k, v (H·h, d) and o (d, H·h)."""
    block = model.model.layers[layer].self_attn
    return [block.get_submodule(f"{role}_proj").weight.detach() for role in "qkvo"]


def similarity(first: LlamaForCausalLM, second: LlamaForCausalLM, layer: int) -> Tensor:
    """(H, H): cosine of every head of the one model's layer with every head of the other's."""
    heads = (HEADS, HEADS)
    return head_similarity(*attention(first, layer), *attention(second, layer), heads=heads, kv_heads=heads)


def most_alike(model: LlamaForCausalLM, layer: int) -> tuple[int, int]:
    """The two heads of a layer that resemble each other most."""
    alike = similarity(model, model, layer).triu(1)
    a, b = divmod(int(alike.argmax()), HEADS)
    return a, b


@torch.no_grad()
def fold(model: LlamaForCausalLM, layer: int, keep: int, drop: int) -> LlamaForCausalLM:
    """A copy in which head `drop` is silent and head `keep` speaks for both, by their scale along its own V^T O^T."""
    folded = copy.deepcopy(model)
    _, _, v, o = attention(folded, layer)
    kept, gone = slice(keep * SIZE, (keep + 1) * SIZE), slice(drop * SIZE, (drop + 1) * SIZE)
    mine, other = o[:, kept] @ v[kept], o[:, gone] @ v[gone]
    o[:, kept] *= 1 + (mine * other).sum() / mine.square().sum()
    o[:, gone] = 0
    return folded


@torch.no_grad()
def reorder_heads(model: LlamaForCausalLM, layer: int, order: Tensor) -> None:
    """Puts head order[n] in place n; the model computes what it did."""
    rows = (order[:, None] * SIZE + torch.arange(SIZE)).flatten()
    q, k, v, o = attention(model, layer)
    for weight in (q, k, v):
        weight.copy_(weight[rows].clone())
    o.copy_(o[:, rows].clone())


@torch.no_grad()
def average(first: LlamaForCausalLM, second: LlamaForCausalLM) -> LlamaForCausalLM:
    merged = copy.deepcopy(first)
    for weight, other in zip(merged.parameters(), second.parameters(), strict=True):
        weight.lerp_(other, 0.5)
    return merged


def merge(first: LlamaForCausalLM, second: LlamaForCausalLM) -> LlamaForCausalLM:
    """The average of two models once the second's heads stand in the first's order."""
    aligned = copy.deepcopy(second)
    for layer in range(first.config.num_hidden_layers):
        _, partner = linear_sum_assignment(similarity(first, aligned, layer).numpy(), maximize=True)
        reorder_heads(aligned, layer, torch.from_numpy(partner))
    return average(first, aligned)


@torch.no_grad()
def change(model: LlamaForCausalLM, other: LlamaForCausalLM) -> float:
    """Mean KL in nats between the two models' predictions on random tokens."""
    ids = torch.arange(96).reshape(4, 24) * 37 % model.config.vocab_size
    one, two = (m(ids).logits.log_softmax(-1) for m in (model, other))
    return float((one.exp() * (one - two)).sum(-1).mean())


@torch.no_grad()
def with_a_double(model: LlamaForCausalLM, layer: int, head: int, place: int) -> None:
    """Makes the head in `place` do what `head` does, a little off, and half as strong."""
    q, k, v, o = attention(model, layer)
    source, target = slice(head * SIZE, (head + 1) * SIZE), slice(place * SIZE, (place + 1) * SIZE)
    # In coordinates of its own, so that no row of the two is alike.
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
    for weight in (q, k, v):
        weight[target] = turn @ weight[source] + 0.01 * torch.randn(SIZE, WIDTH)
    # A rotary embedding sees the coordinates of queries and keys: those of the double have to be the original's.
    q[target], k[target] = turn.T @ q[target], turn.T @ k[target]
    o[:, target] = 0.5 * o[:, source] @ turn.T


@torch.no_grad()
def cousin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model trained a little further, so to speak, and with its heads in another order."""
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight += 0.02 * weight.std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    for layer in range(model.config.num_hidden_layers):
        reorder_heads(other, layer, torch.randperm(HEADS))
    return other


def main() -> None:
    torch.manual_seed(0)
    model = small_model()
    with_a_double(model, layer=1, head=2, place=6)
    keep, drop = most_alike(model, 1)
    print(
        f"pruning: heads {keep} and {drop} of layer 1 are alike, cosine {similarity(model, model, 1)[keep, drop]:.3f}"
    )
    alone, strange = fold(model, 1, keep, drop), fold(model, 1, 0, drop)
    print(f"  folded into {keep}: KL {change(model, alone):.5f}; into head 0 instead: {change(model, strange):.5f}")

    model = small_model()
    other = cousin(model)
    merged, blind = merge(model, other), average(model, other)
    print(f"merging: KL from the first model, heads matched: {change(model, merged):.5f}")
    print(f"  heads as they stand: {change(model, blind):.5f}")


if __name__ == "__main__":
    main()
