"""The transfer matrices W_h and S between two residual streams, from the embedding rows both models share.

`W_h = pinv(E_o) E_n` carries old hidden states to the new width, x_n ≈ x_o W_h; `S = pinv(E_n) E_o` carries new ones
back. (LoRASuite, arXiv 2505.13515, section 3.2, for W_h.) The normal equations are streamed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lorasuite_kernels import SharedGram, shared_gram

from ..errors import LoraSuiteError
from ..io.number_range import check_range, in_range
from ..models.checkpoint import Checkpoint
from ..models.vocabulary import SharedTokens, drop_untrained

RCOND = 1e-5
"""Singular values of an embedding table below this share of the largest count as zero."""
MIN_RANK = 0.75
"""W_h is refused where the shared rows span less than this share of the old width."""
FLOAT32_CONDITION = 300
"""Largest condition number of the Gram matrices for which products are taken in float32, at half the time.

The rounding of the chunk sums then keeps W_h within 1e-5 of the float64 result.
"""
CHUNK_ROWS = 4096
"""Embedding rows multiplied at a time, where nothing else is asked for."""
_SAMPLE = 8192
_HELD_OUT = 20
_R2_ROWS = 1024
_POWER_STEPS = 30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stream:
    """An embedding table (V, d), and what becomes of its rows on their way into the residual stream.

    Attributes:
        factor: they are multiplied by it. norm: they pass a LayerNorm with this gain (d,), shift (d,) and epsilon.
    """

    table: Tensor
    factor: float = 1.0
    norm: tuple[Tensor, Tensor, float] | None = None

    @classmethod
    def of(cls, model: Checkpoint) -> Stream:
        """Raises LoraSuiteError if the embedding or its norm holds NaN or infinity."""
        table = model.tensors.view(model.embedding_name)
        model.check_finite(table, model.embedding_name)
        factor = model.embedding_factor
        if model.family.embedding_norm is None:
            return cls(table, factor)
        names = [f"{model.prefix}{model.family.embedding_norm}.{kind}" for kind in ("weight", "bias")]
        gain, shift = (model.tensors.view(name).double() for name in names)
        for name, tensor in zip(names, (gain, shift), strict=True):
            model.check_finite(tensor, name)
        return cls(table, factor, (gain, shift, model.epsilon))

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def rows(self, index: Tensor, device: torch.device | None = None) -> Tensor:
        """(n, d) rows, normed but not multiplied by the factor; on a device where one is named."""
        rows = self.table[index]
        if device is not None:
            rows = rows.to(device)
        if self.norm is None:
            return rows
        gain, shift, epsilon = self.norm[0].to(rows.device), self.norm[1].to(rows.device), self.norm[2]
        return functional.layer_norm(rows.double(), (self.width,), gain, shift, epsilon)


@dataclass(frozen=True)
class Transfer:
    """W_h (d_o, d_n) and S (d_n, d_o), float32, and how they came about.

    `rms_ratio` is the root mean square of the new model's shared rows over that of the old one's, `factor` what the new
    model multiplies its embeddings by over what the old one does; both matrices contain it.

    R² is measured on every 20th shared token, with maps fitted on the others: 1 - |error|² / |deviation from mean|².
    It is None for the identity, which fits nothing.
    """

    W_h: Tensor
    S: Tensor
    kind: str
    same_vocabulary: bool
    shared: int
    dropped: int
    rank: int
    r2: float | None
    r2_back: float | None
    rms_ratio: float
    factor: float = 1.0


def _smallest_ratio(gram: Tensor, factor: Tensor) -> float:
    """λ_min / λ_max of a positive definite matrix, by power and inverse iteration on its Cholesky factor."""
    generator = torch.Generator(device=gram.device).manual_seed(0)
    high = torch.randn(gram.shape[0], 1, dtype=gram.dtype, device=gram.device, generator=generator)
    low = high.clone()
    for _ in range(_POWER_STEPS):
        high = gram @ (high / high.norm())
        low = torch.cholesky_solve(low / low.norm(), factor)
    return float(1 / (low.norm() * high.norm()))


def solve_normal(gram: Tensor, cross: Tensor, ridge: float = 0.0) -> tuple[Tensor, int]:
    """Least-squares solution of `gram X = cross` and the numerical rank of `gram`, in float64.

    Cholesky where the matrix is well conditioned, otherwise the eigen-decomposition truncated at RCOND (on singular
    values of the table, so RCOND² here), which gives the solution of least norm.

    Args:
        gram: (d, d), symmetric positive semi-definite. cross: (d, k). ridge: added to the diagonal, as a share of its
            mean.
    """
    d = gram.shape[0]
    if ridge:
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(d, dtype=gram.dtype, device=gram.device)
    factor = _well_conditioned(gram, RCOND**2)
    if factor is not None:
        return torch.cholesky_solve(cross, factor), d
    values, vectors = torch.linalg.eigh(gram)
    keep = values > RCOND**2 * values[-1].clamp_min(0)
    values, vectors = values[keep], vectors[:, keep]
    return vectors @ ((vectors.T @ cross) / values[:, None]), int(keep.sum())


def elsewhere(device: torch.device | None) -> bool:
    """Whether rows are multiplied on a device other than the CPU, where the tables are."""
    return device is not None and device.type != "cpu"


def stream_equations(
    old: Stream,
    new: Stream,
    idx_o: Tensor,
    idx_n: Tensor,
    *,
    chunk: int = CHUNK_ROWS,
    device: torch.device | None = None,
) -> SharedGram:
    """`normal_equations` of two streams' rows, their factors left out; normed rows are made a chunk at a time.

    On a device other than the CPU a chunk of rows at a time is moved there and multiplied in float64, which a GPU does
    faster than a CPU does in float32; the sums stay there.
    """
    moved = elsewhere(device)
    if not moved and old.norm is None and new.norm is None:
        return normal_equations(old.table, new.table, idx_o, idx_n, chunk=chunk)
    total: SharedGram | None = None
    for part_o, part_n in zip(idx_o.split(chunk), idx_n.split(chunk), strict=True):
        x, y = old.rows(part_o, device), new.rows(part_n, device)
        if moved:
            x, y = x.double(), y.double()
        every = torch.arange(len(part_o), device=x.device)
        found = shared_gram(x, y, every, every, both=True, chunk=chunk)
        total = found if total is None else _add(total, found)
    assert total is not None
    return total


def normal_equations(
    e_o: Tensor, e_n: Tensor, idx_o: Tensor, idx_n: Tensor, *, both: bool = True, chunk: int = CHUNK_ROWS
) -> SharedGram:
    """`shared_gram`, its products in float32 where that costs no accuracy (see FLOAT32_CONDITION), else in float64.

    A sample of the rows, spread over the vocabulary, decides.
    """
    spread = max(1, len(idx_o) // _SAMPLE)
    sample = torch.zeros(len(idx_o), dtype=torch.bool)
    sample[::spread] = True
    if spread > 1 and torch.float64 not in (e_o.dtype, e_n.dtype):
        first = shared_gram(e_o, e_n, idx_o[sample], idx_n[sample], both=both, products=torch.float32, chunk=chunk)
        grams = [first.oo] if first.nn is None else [first.oo, first.nn]
        if all(_well_conditioned(gram, 1 / FLOAT32_CONDITION) is not None for gram in grams):
            rest = shared_gram(e_o, e_n, idx_o[~sample], idx_n[~sample], both=both, products=torch.float32, chunk=chunk)
            return _add(first, rest)
    return shared_gram(e_o, e_n, idx_o, idx_n, both=both, chunk=chunk)


def _well_conditioned(gram: Tensor, least: float) -> Tensor | None:
    """The Cholesky factor, if λ_min / λ_max is above `least`."""
    factor, info = torch.linalg.cholesky_ex(gram)
    return factor if not int(info) and _smallest_ratio(gram, factor) > least else None


def _r2(x: Stream, x_rows: Tensor, y: Stream, y_rows: Tensor, w: Tensor) -> float | None:
    """1 - |y - x w|² / |y - mean|² over paired rows, a chunk of rows at a time, where w is."""
    if not len(x_rows):
        return None
    mean = torch.stack([y.rows(part, w.device).double().sum(0) for part in y_rows.split(_R2_ROWS)]).sum(0) / len(y_rows)
    error = spread = 0.0
    for part_x, part_y in zip(x_rows.split(_R2_ROWS), y_rows.split(_R2_ROWS), strict=True):
        target = y.rows(part_y, w.device).double()
        error += float((target - x.rows(part_x, w.device).double() @ w).square().sum())
        spread += float((target - mean).square().sum())
    return 1 - error / spread if spread > 0 else None


def _add(total: SharedGram, other: SharedGram) -> SharedGram:
    """Adds in place: these matrices are the largest things a plan holds."""
    total.oo.add_(other.oo)
    total.on.add_(other.on)
    if total.nn is not None and other.nn is not None:
        total.nn.add_(other.nn)
    return total


def fit_bytes(d_o: int, d_n: int, chunk: int) -> int:
    """What `fit_transfer` holds on a device other than the CPU: float64 sums, one solution, and a chunk of rows."""
    sums = 8 * (d_o * d_o + d_o * d_n + d_n * d_n)
    widest = max(d_o, d_n)
    return 2 * sums + 8 * (5 * widest * widest + 2 * d_o * d_n) + 4 * 8 * chunk * (d_o + d_n)


def fit_transfer(
    old: Stream,
    new: Stream,
    shared: SharedTokens,
    *,
    ridge: float = 0.0,
    chunk: int = CHUNK_ROWS,
    device: torch.device | None = None,
) -> Transfer:
    """Fits W_h and S on the rows of the shared tokens in two residual streams.

    Args:
        old, new: tables (V_o, d_o) and (V_n, d_n), any floating dtype, may be memory-mapped.
        ridge: added to the normal equations, as a share of their mean diagonal; asks for an answer where the shared
            tokens alone do not determine one.
        chunk: rows multiplied at a time. device: where they are multiplied and the equations solved; the CPU if None.

    Raises:
        LoraSuiteError: fewer trained shared tokens than d_o, or rows spanning less than MIN_RANK of d_o, without ridge.
    """
    shared = drop_untrained(shared, old.table, new.table)
    d_o = old.width
    if len(shared) < d_o and not ridge:
        raise LoraSuiteError(
            f"the two vocabularies share {len(shared)} trained tokens, fewer than the old width {d_o}, which does not "
            "determine the transfer matrix; pass a ridge (`ridge=1e-3`) to accept an approximation"
        )
    if len(shared) < 2:
        raise LoraSuiteError("the two vocabularies share no trained tokens; nothing can be carried between them")
    held = torch.zeros(len(shared), dtype=torch.bool)
    held[_HELD_OUT - 1 :: _HELD_OUT] = True
    train = stream_equations(old, new, shared.old[~held], shared.new[~held], chunk=chunk, device=device)
    held_o, held_n = shared.old[held], shared.new[held]
    assert train.nn is not None
    r2 = _r2(old, held_o, new, held_n, solve_normal(train.oo, train.on, ridge)[0])
    r2_back = _r2(new, held_n, old, held_o, solve_normal(train.nn, train.on.T, ridge)[0])
    total = (
        _add(train, stream_equations(old, new, held_o, held_n, chunk=chunk, device=device)) if len(held_o) else train
    )
    assert total.nn is not None
    solution, rank = solve_normal(total.oo, total.on, ridge)
    factor = new.factor / old.factor
    W_h = (solution * factor).float().cpu().contiguous()
    del solution
    if rank < MIN_RANK * d_o:
        raise LoraSuiteError(
            f"the embeddings of the {len(shared)} shared tokens span {rank} of {d_o} old dimensions, less than "
            f"{MIN_RANK:.0%}; pass a ridge (`ridge=1e-3`) to accept an approximation"
        )
    S = (solve_normal(total.nn, total.on.T, ridge)[0] / factor).float().cpu().contiguous()
    sizes = [float(gram.diagonal().mean()) for gram in (total.oo, total.nn)]
    found = Transfer(
        W_h,
        S,
        "embedding",
        shared.identical,
        len(shared),
        shared.dropped,
        rank,
        r2,
        r2_back,
        factor * (sizes[1] / sizes[0]) ** 0.5 if min(sizes) > 0 else 1.0,
        factor,
    )
    check_range("the embeddings of one of the models", W_h, S, r2, r2_back, found.rms_ratio)
    return found


def build_transfer(
    old: Checkpoint,
    new: Checkpoint,
    tokens: SharedTokens,
    kind: str,
    *,
    ridge: float = 0.0,
    chunk: int = CHUNK_ROWS,
    device: torch.device | None = None,
) -> Transfer:
    """W_h and S for a pair of checkpoints: `embedding` fits them, `identity` takes both as I where d_o = d_n."""
    d_o, d_n = old.shape.d, new.shape.d
    if kind == "identity":
        if d_o != d_n:
            raise LoraSuiteError(f"`transfer=identity` needs equal widths; old has {d_o}, new has {d_n}")
        eye = torch.eye(d_o)
        return Transfer(eye, eye.clone(), "identity", tokens.identical, len(tokens), 0, d_o, None, None, 1.0)
    try:
        with in_range(f"the embeddings of {old.folder} and {new.folder}"):
            return fit_transfer(Stream.of(old), Stream.of(new), tokens, ridge=ridge, chunk=chunk, device=device)
    finally:
        for model in (old, new):
            model.tensors.release([model.embedding_name])


def pinv_times(w: Tensor, x: Tensor) -> Tensor:
    """pinv(W) X for W (p, q) and X (p, r), through the smaller Gram matrix in float64; no pseudo-inverse is formed."""
    p, q = w.shape
    every = torch.arange(max(p, q), device=w.device)
    if q <= p:
        gram = shared_gram(w, x, every, every)
        return solve_normal(gram.oo, gram.on)[0].to(x.dtype)
    gram = shared_gram(w.T, w.T[:, :0], every, every)
    return (w.T.double() @ solve_normal(gram.oo, x.double())[0]).to(x.dtype)
