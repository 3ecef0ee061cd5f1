"""What the new model should predict: its own predictions, changed as the adapter changed the old model's.

At every aligned position, over the s tokens both vocabularies share, the adapter changes the old model's
log-probabilities by d. The target is `(1 - m) softmax(logits_n + d) + m p`, logits_n those of the bare new model, p
what the old model predicts with its adapter, m the share of imitation. To learn it by KL is, up to a constant, to learn
both parts by KL, with the weights 1 - m and m. The second is what a next-token loss on text drawn from p comes to in
the mean over all such texts, without the noise of drawing them. Three passes run
one after the other, old, old with adapter, new, and never two models at once: of the old one its last hidden states at
the aligned positions go to disk, and in the end only the targets are left there: the k most probable tokens of each in
float16, and the mass of all others.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from ..adapters.aligned_states import Head, LoadedModel, load_tokenizer, read_sizes
from ..errors import LoraSuiteError, WriteError
from ..io.phases import PhaseClock, release_memory
from ..io.work import Work
from ..text.alignment import AlignedText, Alignment

CHUNK = 64
"""Texts whose states and targets are one file."""
_ELEMENTS = 2**24
"""Log-probabilities formed at once."""
_KEPT = (64, 128, 256, 512, 1024)
"""Numbers of tokens from which `auto` chooses."""
_LOST = 0.02
"""Share of the divergence that `auto` lets the truncation lose."""
_MOST_AUTO = 8 << 30
"""Bytes of targets beyond which `auto` keeps no more than the largest of _KEPT, whatever the truncation loses."""
_LESS = "lower top_k or pass less text, choose another folder (cache)"
_LEAST_TEXTS = 8
_LEAST_POSITIONS = 64


@dataclass(frozen=True)
class Target:
    """Targets of n positions.

    Attributes:
        log_probs: (n, k) float32. index: (n, k) int64, which of the shared tokens they belong to; None where k is s and
            they are in the order of the shared tokens.
        log_rest: (n,) float32, of the mass of all other shared tokens; -inf where there are none.
    """

    log_probs: Tensor
    index: Tensor | None
    log_rest: Tensor


def target(logits: Tensor, before: Tensor, after: Tensor, k: int | None = None, imitation: float = 0.0) -> Target:
    """The k most probable tokens of `softmax(logits + log_softmax(after) - log_softmax(before))`, mixed with `after`.

    Args:
        logits: (n, s), the bare new model's. before, after: (n, s), the old model's, without and with its adapter.
        k: tokens to keep of each; None, or s and more, keeps all.
        imitation: share of softmax(after) in the mixture, 0 to 1.
    """
    imitated = functional.log_softmax(after, -1)
    log_probs = functional.log_softmax(logits + imitated - functional.log_softmax(before, -1), dim=-1)
    if imitation > 0:
        # The logarithm of a share of 0 is -inf, and adds nothing.
        shares = torch.tensor([1 - imitation, imitation], device=logits.device).log()
        log_probs = torch.logaddexp(log_probs + shares[0], imitated + shares[1])
    if k is None or k >= log_probs.shape[1]:
        return Target(log_probs, None, torch.full(log_probs.shape[:1], -math.inf, device=log_probs.device))
    kept, index = log_probs.topk(k, dim=-1)
    return Target(kept, index, log_probs.scatter(1, index, -math.inf).logsumexp(-1))


def divergence(wanted: Target, logits: Tensor) -> Tensor:
    """KL(target ‖ softmax(logits)) of each position in nats, the tokens not kept counted as one; (n,).

    Merging tokens can only lower it: it equals the full divergence where all tokens are kept.

    Args:
        logits: (n, s) float32, over the shared tokens.
    """
    found = functional.log_softmax(logits, dim=-1)
    p = wanted.log_probs.exp()
    if wanted.index is None:
        # What is impossible in the target adds nothing, whatever is found there.
        return torch.where(p > 0, p * (wanted.log_probs - found), 0).sum(-1)
    kept = torch.where(p > 0, p * (wanted.log_probs - found.gather(1, wanted.index)), 0).sum(-1)
    rest = found.scatter(1, wanted.index, -math.inf).logsumexp(-1)
    return kept + wanted.log_rest.exp() * (wanted.log_rest - rest)


@dataclass(frozen=True)
class TeacherFacts:
    """What the teacher pass saw.

    Attributes:
        texts, positions: aligned ones. shared: s. k: tokens kept of each target.
        imitation: share of the adapted old model's own prediction in the targets.
        rest: mean mass of the tokens not kept. kl: mean KL(target ‖ bare new model) in nats, over all shared tokens;
            kl_kept: the same from the kept tokens and the merged rest, so that `1 - kl_kept / kl` is what keeping k
            tokens loses of it.
    """

    texts: int
    positions: int
    bytes: int
    tokens_old: int
    tokens_new: int
    shared: int
    k: int
    rest: float
    kl: float
    kl_kept: float
    imitation: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"truncation": 1 - self.kl_kept / self.kl if self.kl > 0 else 0.0}


class Targets:
    """The targets of all texts, on disk, read text by text through the memory map."""

    def __init__(self, folder: Path, aligned: list[AlignedText], tokens: Tensor, facts: TeacherFacts) -> None:
        self.aligned, self.tokens, self.facts = aligned, tokens, facts
        self._files = [
            safe_open(folder / f"target-{c:05d}.safetensors", framework="pt") for c in range(-(-len(aligned) // CHUNK))
        ]
        self._starts = [0]
        for n, text in enumerate(aligned):
            begins = (n + 1) % CHUNK == 0
            self._starts.append(0 if begins else self._starts[-1] + len(text.ends))

    def __len__(self) -> int:
        return len(self.aligned)

    def __getitem__(self, n: int) -> Target:
        file, start = self._files[n // CHUNK], self._starts[n]
        rows = slice(start, start + len(self.aligned[n].ends))
        index = file.get_slice("index")[rows].long() if "index" in file.keys() else None  # noqa: SIM118
        return Target(file.get_slice("log_probs")[rows].float(), index, file.get_slice("log_rest")[rows])


def _chunks(aligned: list[AlignedText]) -> Iterator[tuple[int, list[AlignedText]]]:
    for c, start in enumerate(range(0, len(aligned), CHUNK)):
        yield c, aligned[start : start + CHUNK]


def write_targets(
    work: Work,
    old: str | os.PathLike[str],
    old_adapter: str | os.PathLike[str],
    new: str | os.PathLike[str],
    texts: list[str],
    clock: PhaseClock,
    *,
    top_k: int | str | None,
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    imitation: float = 0.0,
    shuffled: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Targets:
    """Runs the three passes over the texts and leaves the targets in `work`; goes on from what is there.

    Args:
        top_k: tokens kept of each target; None keeps all, "auto" so many that, on the first texts, the divergence loses
            no more than _LOST, and all only where they take no more than _MOST_AUTO. max_tokens: of each text, for each
            model. imitation: see `target`.
        shuffled: a control: what the old model says at a position, without its adapter and with it, is what it says at
            another one, of any text.

    Raises:
        LoraSuiteError: models, adapter or text that cannot be used, too few common positions, or too little free space.
    """
    with clock.phase("align", len(texts)) as report:
        V_o, V_n = (
            read_sizes(source, what, trust_remote_code=trust_remote_code).V
            for source, what in ((old, "OLD"), (new, "NEW"))
        )
        alignment = Alignment(
            load_tokenizer(old, "OLD", trust_remote_code=trust_remote_code),
            load_tokenizer(new, "NEW", trust_remote_code=trust_remote_code),
        )
        aligned = alignment.align_all(texts, max_tokens)
        report(len(texts))
    shared = alignment.ordinary
    inside = (shared.old < V_o) & (shared.new < V_n)
    tokens_o, tokens_n = shared.old[inside], shared.new[inside]
    positions = sum(len(a.ends) for a in aligned)
    if len(aligned) < _LEAST_TEXTS or positions < _LEAST_POSITIONS or len(tokens_n) < 2:
        raise LoraSuiteError(
            f"{old} and {new} share {len(tokens_n)} tokens, and end tokens at the same byte at {positions} places of "
            f"{len(aligned)} texts; refining needs at least {_LEAST_TEXTS} texts with {_LEAST_POSITIONS} such places"
        )
    work.start()
    found = work.load("facts")
    if found is None:
        if not (work.folder / "old-before-00000.safetensors").exists():
            least = _KEPT[0] if isinstance(top_k, str) else top_k or len(tokens_n)
            size = positions * _bytes_each(min(least, len(tokens_n)), len(tokens_n))
            _check_room(work, size, "the targets", _LESS, LoraSuiteError)
        _old_passes(work, old, old_adapter, aligned, tokens_o, clock, device, dtype, trust_remote_code)
        release_memory()
        k, sums = _new_pass(
            work,
            new,
            aligned,
            tokens_n,
            clock,
            device,
            dtype,
            top_k,
            imitation,
            seed if shuffled else None,
            trust_remote_code,
        )
        facts = TeacherFacts(
            texts=len(aligned),
            positions=positions,
            bytes=sum(int(a.ends[-1]) for a in aligned),
            tokens_old=sum(len(a.ids_o) for a in aligned),
            tokens_new=sum(len(a.ids_n) for a in aligned),
            shared=len(tokens_n),
            k=k,
            rest=sums[0] / positions,
            kl=sums[1] / positions,
            kl_kept=sums[2] / positions,
            imitation=imitation,
        )
        work.save("facts", {"tokens": tokens_n}, **asdict(facts))
        for part in work.folder.glob("old-*.safetensors"):
            part.unlink()
    else:
        facts = TeacherFacts(**found[1])
    return Targets(work.folder, aligned, tokens_n, facts)


def _old_passes(
    work: Work,
    old: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    aligned: list[AlignedText],
    tokens: Tensor,
    clock: PhaseClock,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> None:
    """Last hidden states at the aligned positions, in files "old-<pass>-<chunk>", and the heads that read them."""
    chunks = -(-len(aligned) // CHUNK)
    if work.load(f"target-{chunks - 1:05d}") is not None:
        return
    model: LoadedModel | None = None
    for n, name in enumerate(("before", "after")):
        with clock.phase("old states" if n == 0 else "old states, adapted", len(aligned)) as report:
            if model is None:
                model = LoadedModel(old, "OLD", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            if n == 1:
                model.attach(adapter)
            headed = work.load(f"old-{name}-head") is not None
            for c, part in _chunks(aligned):
                if work.load(f"old-{name}-{c:05d}") is None or not headed:
                    states = model.states(
                        [a.ids_o for a in part], [a.positions_o for a in part], tokens, layers=[], sample=tokens[:0]
                    )
                    if c == n == 0:
                        row = states.last.shape[1] * states.last.element_size()
                        rows = len(tokens) + sum(len(a.ends) for a in aligned)
                        _check_room(work, 2 * rows * row, "the old model's states", "pass less text", LoraSuiteError)
                    work.save(f"old-{name}-{c:05d}", {"last": states.last})
                    if not headed:
                        _save_head(work, name, states.head)
                        headed = True
                report(min(len(aligned), (c + 1) * CHUNK))


def _save_head(work: Work, name: str, head: Head) -> None:
    bias = {} if head.bias is None else {"bias": head.bias}
    work.save(f"old-{name}-head", {"weight": head.weight} | bias, scale=head.scale, cap=head.cap)


def _saved_head(work: Work, name: str, device: torch.device) -> Head:
    found = work.load(f"old-{name}-head")
    if found is None:
        raise LoraSuiteError(f"{work.folder}: holds damaged work; delete the folder to start over")
    tensors, note = found
    bias = tensors["bias"].to(device).float() if "bias" in tensors else None
    return Head(tensors["weight"].to(device).float(), bias, note["scale"], note["cap"])


def _new_pass(
    work: Work,
    new: str | os.PathLike[str],
    aligned: list[AlignedText],
    tokens: Tensor,
    clock: PhaseClock,
    device: torch.device,
    dtype: torch.dtype,
    top_k: int | str | None,
    imitation: float,
    shuffle: int | None,
    trust_remote_code: bool,
) -> tuple[int, list[float]]:
    """Writes the targets; returns k and the sums over positions of the rest's mass, the divergence and the kept one."""
    totals = [0.0, 0.0, 0.0]
    positions = sum(len(a.ends) for a in aligned)
    k = len(tokens) if top_k is None or isinstance(top_k, str) else min(top_k, len(tokens))
    with clock.phase("targets", len(aligned)) as report:
        model = LoadedModel(new, "NEW", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        heads: list[Head] = []
        for c, part in _chunks(aligned):
            done = work.load(f"target-{c:05d}")
            if done is None:
                heads = heads or [_saved_head(work, name, device) for name in ("before", "after")]
                last = []
                for name in ("before", "after"):
                    found = work.load(f"old-{name}-{c:05d}")
                    if found is None:
                        raise LoraSuiteError(f"{work.folder}: holds damaged work; delete the folder to start over")
                    last.append(found[0]["last"])
                states = model.states(
                    [a.ids_n for a in part], [a.positions_n for a in part], tokens, layers=[], sample=tokens[:0]
                )
                generator = None if shuffle is None else torch.Generator().manual_seed(shuffle + c)
                # The change is a small difference of logits: they are formed in float32 whatever the models run in.
                bias = None if states.head.bias is None else states.head.bias.float()
                head = replace(states.head, weight=states.head.weight.float(), bias=bias)
                n = len(states.last)
                order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
                sides = [(states.last, head), *((x[order], h) for x, h in zip(last, heads, strict=True))]
                if c == 0:
                    if top_k == "auto":
                        k = _bounded(_enough(sides, imitation, device), positions, len(tokens))
                    _check_room(work, positions * _bytes_each(k, len(tokens)), "the targets", _LESS)
                tensors, sums = _chunk_targets(sides, k, imitation, device)
                work.save(f"target-{c:05d}", tensors, sums=sums, k=k)
            else:
                sums, k = done[1]["sums"], done[1]["k"]
            totals = [a + b for a, b in zip(totals, sums, strict=True)]
            report(min(len(aligned), (c + 1) * CHUNK))
    return k, totals


def _small(shared: int) -> torch.dtype:
    """The smallest integer that numbers the shared tokens."""
    return torch.int16 if shared <= torch.iinfo(torch.int16).max else torch.int32


def _bytes_each(k: int, shared: int) -> int:
    """Bytes of one position's target: float16 of each token kept, its number where not all are, and the rest's mass."""
    return k * (2 + (_small(shared).itemsize if k < shared else 0)) + 4


def _bounded(k: int, positions: int, shared: int) -> int:
    """What `auto` keeps in place of k, if all targets together would be too large."""
    return k if k < shared or positions * _bytes_each(k, shared) <= _MOST_AUTO else min(k, _KEPT[-1])


def _check_room(work: Work, needed: int, what: str, action: str, error: type[LoraSuiteError] = WriteError) -> None:
    """Raises `error` if the disk has too little room; of a WriteError, what is finished is kept."""
    free = shutil.disk_usage(work.folder).free
    if needed > free:
        raise error(f"{work.folder}: {what} take {needed:,} bytes, and {free:,} are free; {action}, or free some")


_Sides = list[tuple[Tensor, Head]]
"""Last hidden states (n, d) and head: of the bare new model, the bare old one, and the old one with its adapter."""


def _logits(sides: _Sides, device: torch.device) -> Iterator[list[Tensor]]:
    """Over the shared tokens, (positions, s) each, a part of the positions at a time."""
    n, s = len(sides[0][0]), len(sides[0][1].weight)
    for at in torch.arange(n).split(max(1, _ELEMENTS // s)):
        yield [head.logits(last[at].to(device)) for last, head in sides]


def _enough(sides: _Sides, imitation: float, device: torch.device) -> int:
    """The least of _KEPT that loses little of the divergence; all tokens where that is no less to keep."""
    s = len(sides[0][1].weight)
    choices = [k for k in _KEPT if 2 * k <= s]
    lost = torch.zeros(len(choices), dtype=torch.float64)
    total = 0.0
    for new, before, after in _logits(sides, device):
        full = divergence(target(new, before, after, imitation=imitation), new).double()
        total += float(full.sum())
        for i, k in enumerate(choices):
            lost[i] += (full - divergence(target(new, before, after, k, imitation), new).double()).sum().cpu()
    return next((k for k, value in zip(choices, lost.tolist(), strict=True) if value <= _LOST * total), s)


def _chunk_targets(
    sides: _Sides, k: int, imitation: float, device: torch.device
) -> tuple[dict[str, Tensor], list[float]]:
    parts: list[Target] = []
    sums = torch.zeros(3, dtype=torch.float64)
    for new, before, after in _logits(sides, device):
        kept = target(new, before, after, k, imitation)
        full = divergence(target(new, before, after, imitation=imitation), new)
        for i, value in enumerate((kept.log_rest.exp(), full, divergence(kept, new))):
            sums[i] += value.double().sum().cpu()
        parts.append(kept)
    tensors = {
        "log_probs": torch.cat([p.log_probs.half().cpu() for p in parts]),
        "log_rest": torch.cat([p.log_rest.cpu() for p in parts]),
    }
    small = _small(len(sides[0][1].weight))
    if parts[0].index is not None:
        tensors["index"] = torch.cat([p.index.to(small).cpu() for p in parts if p.index is not None])
    return tensors, sums.tolist()
