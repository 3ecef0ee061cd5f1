"""How similar two models' layers are: CKA, and the measures it is compared with.

X (m, d_x) and Y (m, d_y) are two layers' centred activations on the same m examples, `X = U diag(σ) V^T` by components
of decreasing variance σ². The measures do not change when a layer is rotated or scaled as a whole, so they follow from
the Gram matrices `X X^T = U diag(σ²) U^T`; no more is kept of a layer. With ρ the singular values of `U_x^T U_y`, the
canonical correlations, and k the smaller number of components of the two:

- mean-cca: `Σ ρ / k` (Raghu et al. 2017, "SVCCA").
- squared-cca: `Σ ρ² / k`, R²_CCA (Kornblith et al. 2019, "Similarity of neural network representations revisited").
- pwcca: `Σ α ρ / Σ α`, α_i = Σ_j |<h_i, x_j>| for the canonical variables h_i of the old layer (Morcos et al. 2018,
  "Insights on representational similarity in neural networks with canonical correlation"). The paper's x_j are the
  neurons. That sum of absolute values depends on the basis and does not follow from a Gram matrix: here they are the
  layer's principal components, as after the SVD that SVCCA begins with (0.03 to 0.05 lower on the demo pair).
- procrustes: `‖X^T Y‖_* / (‖X‖_F ‖Y‖_F)`, which is `1 - ‖X - Y Q‖_F² / 2` at the best orthogonal Q for layers of norm 1
  (Ding et al. 2021, "Grounding representation similarity with statistical testing"; Williams et al. 2021, "Generalized
  shape metrics on neural representations").

Centred activations of m examples span m - 1 dimensions at most, and two subspaces whose dimensions add up to more must
meet: correlations are 1 there whatever the data. So CCA keeps all r components of a layer only where r <= (m - 1) / 2,
as with m > 2 d. Elsewhere it keeps the fewest that explain 99 % of the variance, as SVCCA does, and (m - 1) / 2 at
most. Where nothing is cut off, mean-cca and squared-cca do not change under any invertible map of a layer.

Only CKA is near 0 for unrelated layers. Of those with k components each, R²_CCA is about k / (m - 1), and procrustes
comes close to 1 where d is far above m (0.92 for noise at m 64, d 200). Compare values of one plan with one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorasuite_kernels import Gram, StreamingCKA, cka, full_gram, gram

from ..config import MEASURES as MEASURES
from ..errors import LoraSuiteError
from .embeddings import RCOND

EXPLAINED = 0.99
"""Share of a layer's variance that the components kept for CCA explain, where not all can be kept."""
_ROUNDING = 1e-12
"""Components of less variance, as a share of the largest, are what float32 activations round away."""
_LEAST_EXAMPLES = 4


class Components(NamedTuple):
    """Principal components of one layer: orthonormal directions (m, k) and sizes (k,), descending; float64."""

    directions: Tensor
    sizes: Tensor


def layer_similarity(measure: str, old: Tensor, new: Tensor) -> Tensor:
    """Similarity of all pairs of layers over one minibatch.

    Args:
        measure: one of MEASURES.
        old: (L_o, m, d_o), new: (L_n, m, d_n); m >= 4 examples, row e of both belonging to the same example.

    Returns:
        (L_o, L_n) float32, from 0 (unbiased cka: about 0) to 1; 0 where a layer is the same for all examples.

    Raises:
        LoraSuiteError: for an unknown measure.
        ValueError: on shapes that do not fit, too few examples, NaN or infinity.
    """
    _check_measure(measure)
    if measure == "cka":
        return cka(old, new)
    stream = StreamingSimilarity(measure, len(old), len(new))
    stream.update_grams(layer_gram(measure, old), layer_gram(measure, new))
    return stream.compute()


def layer_gram(measure: str, layers: Tensor) -> Gram:
    """What `measure` needs of layers (L, m, d): their packed Gram matrices.

    CKA's are made where the layers are, in their dtype. The others are decomposed: they are made in float64, on the
    CPU, and of activations centred once more than `gram` does, so that no offset disturbs their small components.
    """
    if measure == "cka":
        return gram(layers)
    wide = layers.cpu().double()
    return gram(wide - wide.mean(dim=1, keepdim=True))


def streaming(measure: str, L_o: int, L_n: int) -> StreamingCKA | StreamingSimilarity:
    """The accumulator of a measure, for minibatch after minibatch of `layer_gram`."""
    _check_measure(measure)
    return StreamingCKA(L_o, L_n) if measure == "cka" else StreamingSimilarity(measure, L_o, L_n)


@dataclass
class StreamingSimilarity:
    """A measure other than CKA over many minibatches: the mean of the minibatches' tables.

    Unlike CKA's terms, correlations of a minibatch are not sums over examples: they are averaged as they are.

    >>> stream = StreamingSimilarity("procrustes", n_x=12, n_y=24)
    >>> stream.update_grams(layer_gram("procrustes", x), layer_gram("procrustes", y))  # once per minibatch
    >>> stream.compute()  # (12, 24)
    """

    measure: str
    n_x: int
    n_y: int

    def __post_init__(self) -> None:
        self.minibatches = 0
        self._sum = torch.zeros(self.n_x, self.n_y, dtype=torch.float64)

    def update_grams(self, gx: Gram, gy: Gram) -> None:
        """Adds one minibatch: Gram matrices of n_x and n_y layers over the same m >= 4 examples, from `layer_gram`."""
        (L_x, m), (L_y, m_y) = gx.rows.shape, gy.rows.shape
        if (L_x, L_y) != (self.n_x, self.n_y):
            raise ValueError(f"expected {self.n_x} and {self.n_y} layers; got {L_x} and {L_y}")
        if m != m_y:
            raise ValueError(f"both sides must hold the same examples; got m = {m} and {m_y}")
        if m < _LEAST_EXAMPLES:
            raise ValueError(f"similarity needs at least {_LEAST_EXAMPLES} examples; got m = {m}")
        x, y = ([self._compared(components(grams, i)) for i in range(len(grams.rows))] for grams in (gx, gy))
        right = torch.cat([layer.directions for layer in y], dim=1)
        widths = [len(layer.sizes) for layer in y]
        for i, layer in enumerate(x):
            # One product with all layers of the other model, of which each has its own number of components.
            crosses = (layer.directions.T @ right).split(widths, dim=1)
            self._sum[i] += torch.stack([self._of_pair(cross, layer.sizes) for cross in crosses])
        self.minibatches += 1

    def compute(self) -> Tensor:
        """(n_x, n_y) float32. Raises RuntimeError before the first update."""
        if not self.minibatches:
            raise RuntimeError("StreamingSimilarity.compute() before any update_grams()")
        return (self._sum / self.minibatches).float()

    def _compared(self, layer: Components) -> Components:
        """What the products are taken of: all components, scaled, for procrustes; those CCA keeps for the others."""
        if self.measure == "procrustes":
            return Components(layer.directions * (layer.sizes / layer.sizes.norm()), layer.sizes)
        return kept_for_cca(layer)

    def _of_pair(self, cross: Tensor, sizes: Tensor) -> Tensor:
        """() from `cross`, the (k_x, k_y) products of what `_compared` gives, and x's sizes (k_x,)."""
        k = min(cross.shape)
        if k == 0:
            return cross.new_zeros(())
        if self.measure == "procrustes":
            nuclear: Tensor = torch.linalg.svdvals(cross).sum()
            return nuclear
        if self.measure == "mean-cca":
            mean: Tensor = torch.linalg.svdvals(cross).sum() / k
            return mean
        if self.measure == "squared-cca":
            return cross.square().sum() / k
        # h_i = U w_i, so that its products with the components σ_j u_j are σ_j w_ji.
        w, rho, _ = torch.linalg.svd(cross, full_matrices=False)
        weights = sizes @ w.abs()
        weighted: Tensor = weights @ rho / weights.sum()
        return weighted


def components(grams: Gram, layer: int) -> Components:
    """Principal components of one layer, those of rounding errors left out; none if it is the same for all examples.

    Raises:
        ValueError: for Gram matrices of activations with NaN or infinity.
    """
    one = Gram(*(tensor[layer : layer + 1] for tensor in grams))
    if not torch.isfinite(one.rows).all():
        raise ValueError(f"the activations of layer {layer} hold NaN or infinity")
    variance, directions = torch.linalg.eigh(full_gram(one)[0])
    # Rounding can leave a layer without spread with negative variances, never with positive ones.
    variance, directions = variance.flip(0).clamp_min(0), directions.flip(1)
    rank = int((variance > _ROUNDING * variance[0]).sum())
    return Components(directions[:, :rank], variance[:rank].sqrt())


def kept_for_cca(layer: Components) -> Components:
    """All components where two such layers need not share any; else the fewest that explain 99 %, at most half."""
    half = (layer.directions.shape[0] - 1) // 2
    k = len(layer.sizes)
    if k > half:
        explained = layer.sizes.square().cumsum(0)
        k = min(half, 1 + int((explained < EXPLAINED * explained[-1]).sum()))
    return Components(layer.directions[:, :k].contiguous(), layer.sizes[:k])


def _check_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise LoraSuiteError(f"similarity {measure!r} is not one of {', '.join(MEASURES)}")


def whiten(m: Tensor, heads: int) -> Tensor:
    """(M M^T)^{-1} M for every head's block of rows M, in float64 inside; directions below RCOND are left out."""
    rows = m.view(heads, -1, m.shape[1]).double()
    grams = rows @ rows.mT
    if m.is_cuda and (solved := _whitened(grams, rows)) is not None:
        return solved.flatten(0, 1).to(m.dtype)
    inverse: Tensor = torch.linalg.pinv(grams, rtol=RCOND**2, hermitian=True)
    return (inverse @ rows).flatten(0, 1).to(m.dtype)


def _whitened(grams: Tensor, rows: Tensor) -> Tensor | None:
    """grams^{-1} rows by Cholesky; None where a direction of some head counts as zero, or nearly does.

    The bound is on the condition number in the 1-norm, which is at least that in the 2-norm: where it is kept, no
    direction lies below RCOND and the pseudo-inverse is the inverse. Eigenvectors of many small matrices take a GPU
    hundreds of times longer.
    """
    factors, info = torch.linalg.cholesky_ex(grams)
    if bool(info.any()):
        return None
    inverse = torch.cholesky_inverse(factors)
    condition = torch.linalg.matrix_norm(grams, 1) * torch.linalg.matrix_norm(inverse, 1)
    if not bool((condition < RCOND**-2).all()):
        return None
    return torch.cholesky_solve(rows, factors)
