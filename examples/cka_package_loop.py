"""The inner loop of a CKA package, replaced by the kernels.

    python examples/cka_package_loop.py       (with pytorch-cka installed, its class is used as well)

Such packages keep the features of every layer of both models, form a Gram matrix of each in float32, take HSIC pair by
pair and add it up over the batches. `LoopCKA` stands for them. `kernel_methods` overrides the two steps of pytorch-cka
1.1.3 that do this; everything else of the package (layers, hooks, data loader, plots) stays as it is. What changes is
that all pairs come from one pass over the triangles, and that features are centred first: without that, a few channels
with a large common offset, as language models have them, cost all digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from checkpoint_cka import stacked
from torch import Tensor

from lorasuite_kernels import StreamingCKA, gram

Features = Mapping[str, Tensor]


class LoopCKA:
    """CKA of all pairs of layers over batches of features (m, ...) by layer, as a package computes it."""

    def __init__(self, layers_x: int, layers_y: int) -> None:
        self.cross = torch.zeros(layers_x, layers_y)
        self.own_x, self.own_y = torch.zeros(layers_x), torch.zeros(layers_y)

    def accumulate(self, x: Features, y: Features) -> None:
        grams_x, grams_y = self.grams(x), self.grams(y)
        self.own_x += torch.stack([self.hsic(k, k) for k in grams_x])
        self.own_y += torch.stack([self.hsic(l, l) for l in grams_y])
        for i, k in enumerate(grams_x):
            for j, l in enumerate(grams_y):
                self.cross[i, j] += self.hsic(k, l)

    @staticmethod
    def grams(features: Features) -> list[Tensor]:
        found = [states.flatten(1) @ states.flatten(1).T for states in features.values()]
        return [k.fill_diagonal_(0) for k in found]

    @staticmethod
    def hsic(k: Tensor, l: Tensor) -> Tensor:
        m = len(k)
        trace, rows = (k * l).sum(), k.sum(0) @ l.sum(0)
        return (trace + k.sum() * l.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows) / (m * (m - 3))

    def matrix(self) -> Tensor:
        return self.cross / torch.outer(self.own_x.sqrt(), self.own_y.sqrt())


class KernelCKA(LoopCKA):
    """The same with both steps replaced."""

    def __init__(self, layers_x: int, layers_y: int) -> None:
        self.stream = StreamingCKA(layers_x, layers_y)

    def accumulate(self, x: Features, y: Features) -> None:
        self.stream.update_grams(*(stacked(gram(s.flatten(1)[None]) for s in side.values()) for side in (x, y)))

    def matrix(self) -> Tensor:
        return self.stream.compute()


def kernel_methods(package_class: type) -> type:
    """pytorch-cka's class `CKA` with the kernels in the place of its loop, for two different models."""

    class WithKernels(package_class):  # type: ignore[misc]
        def _compare(self, *arguments: Any, **options: Any) -> Tensor:
            self._loop = KernelCKA(len(self.model1_layer_to_module), len(self.model2_layer_to_module))
            return super()._compare(*arguments, **options)

        def _accumulate_hsic(self, *sums: Tensor) -> None:
            self._loop.accumulate(
                {name: self._model1_layer_to_feature[name] for name in self.model1_layer_to_module},
                {name: self._model2_layer_to_feature[name] for name in self.model2_layer_to_module},
            )

        def _compute_cka_matrix(self, *sums: Tensor) -> Tensor:
            return self._loop.matrix()

    return WithKernels


def example_batches(offset: float) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Three batches of 40 examples: 5 and 4 layers that see some of the same features, two channels with an offset."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps_x, maps_y = [normal(12, 48) for _ in range(5)], [normal(12, 64) for _ in range(4)]
    batches = []
    for _ in range(3):
        shared = normal(40, 12)
        x = {f"x{i}": shared @ w + 2 * normal(40, 48) for i, w in enumerate(maps_x)}
        y = {f"y{j}": shared @ w + 2 * normal(40, 64) for j, w in enumerate(maps_y)}
        for states in (*x.values(), *y.values()):
            states[:, :2] += offset
        batches.append((x, y))
    return batches


def run(loop: LoopCKA, batches: Sequence[tuple[Features, Features]]) -> Tensor:
    for x, y in batches:
        loop.accumulate(x, y)
    return loop.matrix()


def exact(batches: Sequence[tuple[Features, Features]]) -> Tensor:
    """The same loop on centred features in float64."""
    wide = [
        tuple({name: s.double() - s.double().mean(0) for name, s in side.items()} for side in batch)
        for batch in batches
    ]
    loop = LoopCKA(5, 4)
    loop.cross, loop.own_x, loop.own_y = loop.cross.double(), loop.own_x.double(), loop.own_y.double()
    return run(loop, wide)


def main() -> None:
    print("largest error of CKA over all pairs of layers, against float64:")
    for offset in (0.0, 30.0, 1000.0):
        batches = example_batches(offset)
        errors = [(run(kind(5, 4), batches) - exact(batches)).abs().max() for kind in (LoopCKA, KernelCKA)]
        print(f"  offset {offset:6.0f}: loop {errors[0]:.0e}, kernels {errors[1]:.0e}")
    try:
        from cka import CKA
    except ImportError:
        return
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)) for _ in range(2)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 20)), batch_size=16)
    found = []
    for kind in (CKA, kernel_methods(CKA)):
        with kind(*models, layers=["0", "2"], device="cpu") as compared:
            found.append(compared._compare(loader, progress=False))
    print(f"pytorch-cka: largest difference {(found[0] - found[1]).abs().max():.0e}")


if __name__ == "__main__":
    main()
