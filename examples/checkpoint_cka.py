"""How far training has moved each layer: CKA between two checkpoints of one run, through forward hooks.

    python examples/checkpoint_cka.py

Works with any torch module: a convolutional network and a transformer are trained here for a few steps. Each layer's
Gram matrix is made while the forward pass is still running, so that no layer's activations outlive it, and layers of
any width can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lorasuite_kernels import Gram, StreamingCKA, gram

Pool = Callable[[Tensor], Tensor]


def spatial_mean(maps: Tensor) -> Tensor:
    """(m, channels, height, width) -> (m, channels); what is flat already stays as it is."""
    return maps.flatten(2).mean(2) if maps.ndim > 2 else maps


def token_mean(states: Tensor) -> Tensor:
    """(m, tokens, d) -> (m, d)."""
    return states.mean(1) if states.ndim > 2 else states


def stacked(grams: Iterable[Gram]) -> Gram:
    """Gram matrices of several layers as one stack; their widths no longer matter."""
    return Gram(*(torch.cat(parts) for parts in zip(*grams, strict=True)))


@torch.no_grad()
def layer_grams(model: nn.Module, layers: Sequence[str], batch: object, pool: Pool) -> Gram:
    """The Gram matrices of named modules' outputs over one batch, one vector (pool) for each of its m >= 4 examples."""
    grams: dict[str, Gram] = {}

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            states = output[0] if isinstance(output, tuple) else output
            grams[name] = gram(pool(states)[None])

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return stacked(grams[name] for name in layers)


def compare(
    first: nn.Module, second: nn.Module, layers: Sequence[str], batches: Iterable[object], pool: Pool
) -> Tensor:
    """(layers, layers): CKA of every layer of one model with every layer of the other, over all the batches."""
    stream = StreamingCKA(len(layers), len(layers))
    for batch in batches:
        stream.update_grams(layer_grams(first, layers, batch, pool), layer_grams(second, layers, batch, pool))
    return stream.compute()


def vision() -> tuple[nn.Module, list[str], list[Tensor], list[Tensor], Pool]:
    """A small CNN, its layers, and images of four classes: stripes in four directions, in noise."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 4)),
    )
    labels = [torch.randint(4, (32,)) for _ in range(8)]
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    angles = torch.arange(4) * torch.pi / 4
    stripes = torch.stack([torch.sin(a.cos() * rows + a.sin() * columns) for a in angles])
    images = [(stripes[label] + 0.5 * torch.randn(32, 16, 16))[:, None] for label in labels]
    return model, ["0", "3", "6", "9"], images, labels, spatial_mean


class Transformer(nn.Module):
    """Token ids (m, tokens) -> logits of four classes (m, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 48)
        blocks = (nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True) for _ in range(3))
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(48, 4)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        for layer in self.layers:
            states = layer(states)
        return self.head(states.mean(1))


def language() -> tuple[nn.Module, list[str], list[Tensor], list[Tensor], Pool]:
    """A small transformer, its layers, and sequences of four classes, each with favourite tokens."""
    labels = [torch.randint(4, (32,)) for _ in range(8)]
    texts = [torch.where(torch.rand(32, 20) < 0.3, label[:, None] * 5, torch.randint(50, (32, 20))) for label in labels]
    return Transformer(), ["embedding", "layers.0", "layers.1", "layers.2", "head"], texts, labels, token_mean


def train(model: nn.Module, batches: list[Tensor], labels: list[Tensor], epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch, label in zip(batches * epochs, labels * epochs, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), label).backward()
        optimizer.step()


def main() -> None:
    for name, made in (("vision", vision), ("transformer", language)):
        torch.manual_seed(0)
        model, layers, batches, labels, pool = made()
        start = copy.deepcopy(model)
        train(model, batches, labels, epochs=6)
        similarity = compare(start, model, layers, batches, pool)
        print(f"{name}: CKA of each layer with itself before training")
        for layer, value in zip(layers, similarity.diagonal(), strict=True):
            print(f"  {layer:<10} {value:.3f}")


if __name__ == "__main__":
    main()
