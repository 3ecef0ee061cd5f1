"""One model on one text: its states at chosen positions and its log-probabilities over chosen tokens.

The model is loaded whole, through transformers, and read first as it is and then with an adapter put on by PEFT, so
that "without the adapter" never depends on an adapter being switched off again.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from ..config import finite_hint
from ..errors import LoraSuiteError
from ..io.json_files import read_json
from ..models import pretrained
from ..models.checkpoint import resolve_folder
from ..models.family_table import WRAPPERS
from ..models.loading import loading
from ..models.pretrained import load_bare_model, load_config
from ..models.token_ends import TokenEnds
from .adapter_config import check_imports

_MICRO_BATCH = 8
_LOGITS = 2**25
"""Elements of the logits formed at once when a labelled text is scored."""
_PROBED = 16
"""Tokens on which the reading of the head is compared with the model's own logits."""

Report = Callable[[int], None]


@dataclass(frozen=True)
class Head:
    """What turns a last hidden state into logits of the chosen tokens: `scale · (x weight^T + bias)`, capped.

    Attributes:
        weight: (s, d). bias: (s,) or None. cap: logits become `cap · tanh(logits / cap)`; None leaves them.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    @property
    def size(self) -> int:
        """s, the number of chosen tokens."""
        return self.weight.shape[0]

    def log_probs(self, last: Tensor) -> Tensor:
        """(n, d) -> (n, s) float32: log-probabilities renormalised over the chosen tokens."""
        return functional.log_softmax(self.logits(last), dim=-1)

    def logits(self, last: Tensor) -> Tensor:
        """(n, d) -> (n, s) float32."""
        x = functional.linear(last.to(self.weight), self.weight, self.bias).float() * self.scale
        return x if self.cap is None else self.cap * torch.tanh(x / self.cap)


@dataclass(frozen=True)
class States:
    """What a model holds at the chosen positions.

    Attributes:
        last: (positions, d), what the head reads, in the dtype of the forward pass, on the CPU.
        layers: (chosen layers, sampled positions, d) float32: the residual stream behind each of them.
    """

    last: Tensor
    layers: Tensor
    head: Head


class LoadedModel:
    """A causal language model of transformers, bare, and with an adapter once `attach` has put one on.

    Args:
        source: folder or hub id. what: OLD or NEW, for messages.

    Raises:
        LoraSuiteError: for what transformers cannot load, or weights that are missing from the folder.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        what: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = resolve_folder(source, what=f"{what} model")
        self.name, self.what, self.device = os.fspath(source), what, device
        model = load_bare_model(self.folder, dtype, trust_remote_code=trust_remote_code)
        self.model: Any = model.to(device).eval()
        self.peft: Any = None
        self.adapter: str | None = None

    @property
    def backbone(self) -> Any:
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def _text(self) -> Any:
        """The transformer that reads text: the backbone, or the part of a wrapper's."""
        wrapper = WRAPPERS.get(self.model.config.model_type)
        return self.backbone if wrapper is None else self.model.get_submodule(wrapper.text)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        count = self.model.config.get_text_config().num_hidden_layers
        for module in self._text.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
        raise LoraSuiteError(f"{self.folder}: no list of {count} decoder layers in {type(self.model).__name__}")

    def attach(self, adapter: str | os.PathLike[str], *, trainable: bool = False) -> None:
        """Puts a PEFT adapter on the model, frozen unless it is to be `trainable`.

        Raises:
            LoraSuiteError: for a folder PEFT cannot read, weights the model has no place for, places the folder has no
                weights for, pickled weights and prompt tuning.
        """
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict

        folder = resolve_folder(adapter, what=f"{self.what}_ADAPTER")
        check_imports(read_json(folder / "adapter_config.json"), folder / "adapter_config.json")
        weights = folder / "adapter_model.safetensors"
        if not weights.exists():
            raise LoraSuiteError(f"{folder}: adapter_model.safetensors is missing; pickled adapters are never opened")
        doubt = f"is it an adapter of {self.name}?"
        with loading(f"{folder}: PEFT cannot put this adapter on {self.name}; {doubt}"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if PeftConfig.from_pretrained(folder).is_prompt_learning:
                    raise LoraSuiteError(
                        f"{folder}: prompt tuning changes the text, not the model; it cannot be verified"
                    )
                self.peft = PeftModel.from_pretrained(self.model, folder, is_trainable=trainable).eval()
            with safe_open(weights, framework="pt") as file:
                stored = set(file.keys())
            placed = set(get_peft_model_state_dict(self.peft, save_embedding_layers=False))
        if any("missing adapter keys" in str(warning.message) for warning in caught):
            raise LoraSuiteError(f"{folder}: lacks weights for modules its configuration names; {doubt}")
        lost = sorted(name for name in stored - placed if "lora_" in name)
        if lost:
            raise LoraSuiteError(f"{folder}: {self.name} has no place for {lost[0]} (of {len(lost)}); {doubt}")
        self.peft.to(self.device)
        self.adapter = os.fspath(adapter)

    def update_sizes(self) -> dict[int, float]:
        """Layer -> Frobenius norm of the adapter's updates there over that of the weights they change.

        Layers without an update are missing. Taken from what PEFT calls the delta weight, so without the magnitudes of
        DoRA; kinds of adapter that have none are left out.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        sizes = {}
        for i, layer in enumerate(self.layers):
            update = weight = 0.0
            for module in layer.modules():
                if not isinstance(module, BaseTunerLayer) or not hasattr(module, "get_delta_weight"):
                    continue
                with torch.inference_mode():
                    delta = sum(module.get_delta_weight(name).float() for name in module.active_adapters)
                    update = math.hypot(update, _norm(torch.as_tensor(delta)))
                    weight = math.hypot(weight, _norm(module.get_base_layer().weight))
            if weight:
                sizes[i] = update / weight
        return sizes

    @property
    def unembedding(self) -> tuple[Tensor, Tensor]:
        """The head's weight (V, d), a view, and the gain (d,) of the norm in front of it.

        The gain is read off the norm itself, from an input that both RMSNorm and LayerNorm leave as it is.
        """
        norms = [m for m in self._siblings_of_layers() if "norm" in type(m).__name__.lower()]
        weight = self.model.get_output_embeddings().weight.detach()
        if not norms:
            return weight, torch.ones(weight.shape[1])
        signs = torch.ones(weight.shape[1], device=self.device, dtype=weight.dtype)
        signs[1::2] = -1
        with torch.inference_mode():
            gain = (norms[-1](signs[None]) - norms[-1](-signs[None]))[0] / 2 * signs
        return weight, gain.float().cpu()

    def _siblings_of_layers(self) -> list[nn.Module]:
        first = self.layers[0]
        for parent in self._text.modules():
            children = list(parent.children())
            if any(isinstance(c, nn.ModuleList) and len(c) and c[0] is first for c in children):
                return children
        return []

    def states(
        self,
        rows: list[list[int]],
        positions: list[Tensor],
        tokens: Tensor,
        *,
        layers: list[int],
        sample: Tensor,
        report: Report | None = None,
    ) -> States:
        """Reads every row and keeps what is asked for.

        Args:
            rows: token ids of each text. positions: the positions of each row to keep; (n,) int64 each.
            tokens: (s,) int64, the tokens to compare.
            layers: whose residual stream to keep, at the positions that `sample` names: indices, ascending, into all
                kept positions, row after row.
            report: called with the number of rows read.

        Raises:
            LoraSuiteError: token ids beyond the embedding, NaN or infinity, a head that cannot be read off.
        """
        self.check_ids(rows)
        starts = [0]
        for p in positions:
            starts.append(starts[-1] + len(p))
        picked: dict[int, list[Tensor]] = {i: [] for i in layers}
        last = []
        device = self.device
        for start in range(0, len(rows), _MICRO_BATCH):
            part = range(start, min(start + _MICRO_BATCH, len(rows)))
            ids, mask = _padded([rows[n] for n in part])
            row = torch.cat([torch.full((len(positions[n]),), n - start) for n in part])
            column = torch.cat([positions[n] for n in part])
            inside = sample[(sample >= starts[start]) & (sample < starts[part[-1] + 1])] - starts[start]
            where = row[inside].to(device), column[inside].to(device)
            with torch.inference_mode(), _recording(self.layers, where, picked):
                output = self.backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            kept = output.last_hidden_state[row.to(device), column.to(device)]
            if not torch.isfinite(kept).all():
                raise LoraSuiteError(
                    f"{self._described()} gives NaN or infinity in {kept.dtype}; {finite_hint(kept.dtype)}"
                )
            last.append(kept.cpu())
            if report:
                report(part[-1] + 1)
        stacked = torch.stack([torch.cat(picked[i]) for i in layers]) if layers else torch.empty(0)
        return States(torch.cat(last), stacked, self._head(rows[0][:_PROBED], tokens))

    def _described(self) -> str:
        return f"{self.name} with {self.adapter}" if self.adapter else self.name

    def check_ids(self, rows: list[list[int]]) -> None:
        """Raises LoraSuiteError for token ids beyond the embedding, and for rows longer than learned positions."""
        longest, positions = max(map(len, rows)), self._learned_positions()
        if positions is not None and longest > positions:
            raise LoraSuiteError(
                f"{self.folder}: has learned positions for {positions} tokens, and a text was to be read in pieces of "
                f"{longest}; read fewer tokens of each (`max_tokens`)"
            )
        highest, held = max(map(max, rows)), self.model.get_input_embeddings().weight.shape[0]
        if highest >= held:
            raise LoraSuiteError(
                f"{self.folder}: its tokenizer gives token {highest}, beyond the embedding's {held} rows; the "
                "tokenizer belongs to another model"
            )

    def _learned_positions(self) -> int | None:
        """How many positions the model has a table of, None where it computes them."""
        held = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        tokens = self.model.get_input_embeddings()
        tables = [m.num_embeddings for m in self._text.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        # OPT's has two rows more.
        return held if held is not None and any(held <= size <= held + 2 for size in tables) else None

    @torch.inference_mode()
    def _head(self, row: list[int], tokens: Tensor) -> Head:
        module, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        tokens = tokens.to(self.device)
        if type(module) is nn.Linear:
            weight, bias = module.weight[tokens], None if module.bias is None else module.bias[tokens]
        else:
            weight, bias = _linear_part(module, tokens, self.model.dtype, self.device)
        cap = getattr(config, "final_logit_softcapping", None)
        scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
        head = Head(weight, bias, scale, cap)
        ids = torch.tensor([row], device=self.device)
        found = head.logits(self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
        logits = self.model(input_ids=ids, use_cache=False).logits[0][:, tokens].float()
        # A few roundings of the dtype the model computes in.
        tolerance = 8 * torch.finfo(self.model.dtype).eps ** 0.75 * logits.abs().max()
        if (found - logits).abs().max() > tolerance:
            raise LoraSuiteError(
                f"{self.folder}: the logits of {type(self.model).__name__} are not what its head makes of the last "
                "hidden state; this kind of model cannot be verified"
            )
        return head

    def nats(
        self, examples: list[tuple[str, str]], ends: TokenEnds, window: int, report: Report | None = None
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each completion in nats, and the bytes it was counted over; (examples,) float64.

        A prompt and its completion are tokenised as one text; a token that reaches from the one into the other counts
        to the completion. What is longer than a window loses the front of its prompt, and then continues in further
        windows, whose first token is the last of the window before. The first token of a text has to be left out,
        and its bytes with it, where the tokenizer puts nothing in front.

        Args:
            examples: (prompt, completion); an empty prompt scores all of the text. window: tokens read at once.
        """
        nats = torch.zeros(len(examples), dtype=torch.float64)
        counted = torch.zeros(len(examples), dtype=torch.float64)
        windows: list[tuple[int, list[int], int]] = []
        for n, (prompt, completion) in enumerate(examples):
            ids, at = ends(prompt + completion)
            size = len(prompt.encode())
            first = sum(end <= size for end in at)
            counted[n] = len(completion.encode())
            if not ids:
                continue
            if first == 0 and not ends.prefix:
                counted[n] -= at[0] - size
                first = 1
            start = max(0, min(first - 1, len(ids) - window))
            while first < len(ids):
                stop = min(start + window, len(ids))
                windows.append((n, ends.prefix + ids[start:stop], len(ends.prefix) + first - start))
                first, start = stop, stop - 1
        if windows:
            self.check_ids([row for _, row, _ in windows])
        vocabulary = self.model.get_output_embeddings().weight.shape[0] if windows else 1
        longest = max((len(row) for _, row, _ in windows), default=1)
        batch = max(1, min(_MICRO_BATCH, _LOGITS // (longest * vocabulary)))
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            ids_, mask = _padded([row for _, row, _ in part])
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids_.to(self.device), attention_mask=mask.to(self.device), use_cache=False
                ).logits
                for k, (n, row, first) in enumerate(part):
                    labels = torch.tensor(row[first:], device=self.device)
                    chosen = logits[k, first - 1 : len(row) - 1].float()
                    nats[n] += float(functional.cross_entropy(chosen, labels, reduction="sum"))
            if report:
                report(part[-1][0] + 1)
        if not torch.isfinite(nats).all():
            raise LoraSuiteError(f"{self._described()} gives NaN or infinity on the labelled text")
        return nats, counted


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in float64: in float32 the squares of values past 1e19 are infinite."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    return ids, mask


@contextmanager
def _recording(layers: list[nn.Module], where: tuple[Tensor, Tensor], into: dict[int, list[Tensor]]) -> Iterator[None]:
    """Appends each chosen layer's output at the given (rows, positions) as it passes."""

    def hook(i: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            into[i].append(hidden[where].float().cpu())

        return record

    handles = [layers[i].register_forward_hook(hook(i)) for i in into]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear_part(
    module: Any, tokens: Tensor, dtype: torch.dtype, device: torch.device, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Weight (s, d) and bias (s,) of any linear map, such as an adapted head, from its values at the unit vectors."""
    d = module.weight.shape[1]
    bias = module(torch.zeros(1, d, dtype=dtype, device=device))[0, tokens]
    rows = []
    for start in range(0, d, chunk):
        unit = torch.zeros(min(chunk, d - start), d, dtype=dtype, device=device)
        unit[:, start : start + chunk].fill_diagonal_(1)
        rows.append(module(unit)[:, tokens] - bias)
    return torch.cat(rows).T.contiguous(), bias


@dataclass(frozen=True)
class Sizes:
    """Layers, width and embedding rows, as a config has them."""

    L: int
    d: int
    V: int


def read_sizes(source: str | os.PathLike[str], what: str, *, trust_remote_code: bool = False) -> Sizes:
    """From the config alone. Raises LoraSuiteError for a folder or config that cannot be used."""
    folder = resolve_folder(source, what=f"{what} model")
    config = load_config(folder, trust_remote_code=trust_remote_code)
    with loading(f"{folder}: transformers cannot read this config"):
        text = config.get_text_config()
        return Sizes(text.num_hidden_layers, text.hidden_size, text.vocab_size)


def load_tokenizer(source: str | os.PathLike[str], what: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id. Raises LoraSuiteError if there is none."""
    folder = resolve_folder(source, what=f"{what} model")
    return pretrained.load_tokenizer(folder, trust_remote_code=trust_remote_code)
