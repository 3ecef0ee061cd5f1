"""The configurations: one for each step of a migration, and one for the machine it runs on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import LoraSuiteError
from .choices import (
    Auto,
    Device,
    DistillControl,
    Dtype,
    Fill,
    HeadMapping,
    LayerMapping,
    Measure,
    Method,
    RefineControl,
    Transfer,
)
from .fields import MACHINE, METHOD, OUTPUT, TEXT, TRAINING, check, setting
from .machine import Machine, parse_memory, pick_device, pick_dtype

Record = Mapping[str, Any] | str
Data = str | os.PathLike[str] | Sequence[Record]
"""Labelled data: a file, a folder or a hub id, or the records themselves."""
RETAIN_WEIGHT = 0.3
_AUTO_STEPS = "auto or a number of steps"


@dataclass(frozen=True)
class Runtime:
    """The machine a run uses and what it tells on its way.

    Attributes:
        device: auto takes the GPU where there is one.
        dtype: Of weights and products. auto is float32 for a plan and a verification, bfloat16 for a training on a GPU
            that has it, and the plan's own dtype where a plan is applied.
        memory: What may be resident on the device, such as "6GB": on a CPU the whole process with its mapped weights,
            on a GPU what is allocated there. Sizes of batches and chunks follow from it.
        mapped: Read the checkpoints through a memory map; off for machines on which mapped pages count twice.
        trust_remote_code: Let transformers run code from the model folders.
        report: HTML file to write; an earlier report there is replaced.
        progress: Called with the phase, what is done of it, and all of it.
        say: Called with a sentence at the start and before each training.
    """

    device: Device = setting("auto", MACHINE, "DEVICE", "auto, cpu or cuda [auto]")
    dtype: Dtype = setting("auto", MACHINE, "DTYPE", "float32, bfloat16 or float64 [auto: float32]")
    memory: str | int | None = setting(None, MACHINE, "SIZE", "What may be resident on the device, e.g. 6GB")
    mapped: bool = setting(
        True, MACHINE, None, "Map the checkpoints, or read them (unified memory)", "--mmap/--no-mmap"
    )
    trust_remote_code: bool = setting(
        False, MACHINE, None, "Let transformers run code from the folders", "--trust-remote-code"
    )
    report: str | os.PathLike[str] | None = setting(None, OUTPUT, "FILE", "Write a report, one HTML file", "--report")
    progress: Callable[[str, int, int], None] | None = field(default=None, compare=False)
    say: Callable[[str], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check(self)
        if self.memory is not None:
            parse_memory(self.memory)

    @property
    def budget(self) -> int | None:
        """Bytes that `memory` names."""
        return None if self.memory is None else parse_memory(self.memory)

    def training_machine(self) -> Machine:
        """The machine of a training, where an automatic dtype is bfloat16 on a GPU that has it.

        Raises:
            LoraSuiteError: There is no such device or dtype.
        """
        import torch

        device = pick_device(self.device)
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if self.dtype == "auto" and half else pick_dtype(self.dtype)
        return Machine(device, dtype, half, self.trust_remote_code, self.memory)


@dataclass(frozen=True)
class PlanConfig:
    """How two models are compared.

    Attributes:
        calibration: .jsonl or .txt of unlabelled text for CKA and distillation; None takes the text shipped with the
            package. "self" has the old model with its adapter write the text to distil from, as the plan is applied.
        examples: Calibration examples that both models read, split into the same pieces, 128 tokens of each.
        layers: cka (the most similar ones), first, medium or last.
        similarity: Of layers (`similarity.layer_similarity`).
        heads: hungarian or identity.
        transfer: embedding (fitted on the shared tokens) or identity.
        method: copy (the adapter as it is, between layers of the same shapes), lstsq (exact wherever the new model
            computes the old function), distill (fits the adapter's effect on text, as the plan is applied), paper (Eq.
            3 of LoRASuite) or auto: copy where the weights differ by at most 1 %, lstsq where it is exact (R² of at
            least 0.999, of both transfer matrices on held-out tokens and of W_h on the layers' states), elsewhere
            whichever of them agrees best with the old adapter on held-out text, as the plan is applied.
        roles: Projections to plan for, of q, k, v, o, gate, up and down; the MLP costs several times the rest. None
            takes all of them, and in a migration those of the adapter.
        seed: Of the calibration examples.
        ridge: Regularises the transfer matrix, as a share of the normal equations' mean diagonal.
    """

    calibration: str | os.PathLike[str] | None = setting(
        None, TEXT, "FILE", "Unlabelled .jsonl or .txt; self: by the old model [shipped]"
    )
    examples: int = setting(64, TEXT, "N", "Calibration examples to read, 128 tokens of each [64]", least=4)
    layers: LayerMapping = setting(
        "cka", METHOD, "MAP", "Which layer continues which: cka, first, medium, last [cka]", title="layer mapping"
    )
    similarity: Measure = setting("cka", METHOD, "KIND", "cka [default], mean-cca, squared-cca, pwcca, procrustes")
    heads: HeadMapping = setting(
        "hungarian", METHOD, "MATCH", "How heads are matched: hungarian, identity [hungarian]", title="head mapping"
    )
    transfer: Transfer = setting(
        "embedding", METHOD, "KIND", "Transfer matrix: embedding (fitted), identity [embedding]"
    )
    method: Method = setting("auto", METHOD, "METHOD", "auto (measures), copy, lstsq, distill, paper [auto]")
    roles: Sequence[str] | None = setting(
        None, METHOD, "ROLES", "Projections: all, attention, mlp, or names like q,v [all]"
    )
    seed: int = setting(0, TEXT, "N", "Which examples are taken where there are more [0]")
    ridge: float = setting(0.0, METHOD, "X", "Of the transfer matrix, share of the mean diagonal [0]", least=0.0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DistillConfig:
    """How an adapter is distilled.

    Attributes:
        rank: Of the result; None takes the adapter's largest.
        layers: How many of the last new layers are fitted; None takes half of them, and 1 is the cheap variant.
        roles: Projections that are fitted, in this order.
        ridge: Of each regression, as a share of its Gram matrix's mean diagonal.
        max_tokens: Of each text, for each model, special tokens not counted.
        micro_batch: Rows computed at once; a memory budget may make it smaller.
        seed: Of the text and the bootstrap; None takes the plan's.
        control: "none", or a control that has no business working: target positions "shuffled", targets "flipped" in
            sign, U followed by a random rotation ("rotated").
    """

    rank: int | None = setting(None, METHOD, "N", "Of the result, with distill [the adapter's]", least=1)
    layers: int | None = setting(None, METHOD, "N", "Last new layers that distill fits [half of them]", least=1)
    roles: tuple[str, ...] = setting(("o", "down"), METHOD, "ROLES", "Projections that distill fits [o,down]")
    ridge: float = setting(1e-2, METHOD, "X", "Of each regression, share of the mean diagonal [0.01]", least=0.0)
    max_tokens: int = setting(128, TEXT, "N", "Tokens each model reads of a text [128]", least=2)
    micro_batch: int = setting(16, MACHINE, "N", "Rows computed at once [16]", least=1)
    seed: int | None = setting(None, TEXT, "N", "Of the text and the bootstrap [the plan's]")
    control: DistillControl = setting("none", METHOD, "KIND", "none, shuffled, flipped, rotated [none]")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ApplyConfig:
    """How a plan carries an adapter.

    Attributes:
        fill: What new layers without a partner get (`fill_layers`): none, zero or nearest.
        fill_share: Of the nearest layer's update, with fill nearest.
        text: For distillation, in the place of the plan's calibration text: .jsonl, .txt or "self".
        distill: How distillation goes; other methods refuse a rank and a number of layers.
    """

    fill: Fill = setting("none", METHOD, "KIND", "New layers without a partner: none, zero, nearest [none]")
    fill_share: float = setting(0.5, METHOD, "X", "Of the neighbour's update, with --fill nearest [0.5]")
    text: str | os.PathLike[str] | None = setting(
        None, TEXT, "FILE", "For distill: .jsonl, .txt or self [the plan's text]"
    )
    distill: DistillConfig = DistillConfig()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RefineConfig:
    """A training without labels.

    Attributes:
        text: None or "self" has the old model write with its adapter; else a .jsonl (field `text`) or .txt file, or
            texts.
        text_bytes: How much the old model writes.
        steps: Optimizer steps, or "auto": as many as the text is worth (`step_budget`), and in a migration none where
            the adapter arrives whole.
        learning_rate: At the first step, falling linearly to 0; AdamW without warm-up or weight decay. None tries
            rates from 2e-4 to 1e-2 for 15 steps each and takes that of the best agreement; with fewer than 50
            steps it takes 1e-2 from a new adapter and 5e-3 from a given one.
        rank: Of a new adapter, 8 by default; with an adapter to start from, it is put among further rows.
        alpha: Of a new adapter; None takes twice the rank.
        roles: Projections of a new adapter, all by default; with an adapter to start from, it is put among further
            modules, so that training starts from the same function.
        imitation: Share of the adapted old model's own prediction in the targets. 0 carries the change alone, 1 copies
            the old model.
        kl_weight: Of the divergence from the targets, a mean over positions.
        next_token_weight: Of a next-token loss beside it.
        retain: Unlabelled text on which the model's predictions are to stay what they are without an adapter: a .jsonl
            (field `text`) or .txt file, or "shipped" for the general text that comes with the package. A step reads
            about as many tokens of it and takes two to three times as long. The old adapter has its effect on such
            text too, and less of it arrives.
        retain_weight: Of that divergence beside the losses.
        batch_bytes: Of text a step reads.
        max_tokens: Of each text, for each model.
        top_k: Most probable tokens kept of each target, the rest as one; None keeps all shared tokens, "auto" so many
            that 2 % of the divergence is lost at most, but not all where their targets would exceed 8 GiB.
        eval_every: Steps between evaluations, each a checkpoint.
        patience: Evaluations without a better one after which to stop; None never stops.
        seed: Of the text, its order and a new adapter; None takes the plan's in a migration, and 0 elsewhere.
        gradient_checkpointing: Recompute activations: less memory, more time. A memory budget turns it on where needed.
        cache: Folder that keeps the targets for further runs; by default they go when the output is complete.
        control: "shuffled" trains on targets whose change belongs to another position, the text as it is, so that its
            next tokens still teach. "shuffled-labels" also puts those in random order: what is left is a constant.
    """

    text: str | os.PathLike[str] | Sequence[str] | None = setting(
        None, TEXT, "FILE", "Unlabelled text to refine on [self: the old model writes it]"
    )
    text_bytes: int = setting(600_000, TEXT, "N", "Bytes of text the old model writes [600,000]", least=1000)
    steps: int | Auto = setting(
        "auto", TRAINING, "N", "Steps; auto: as many as the text is worth [auto]", least=1, expects=_AUTO_STEPS
    )
    learning_rate: float | None = setting(None, TRAINING, "X", "Falls to 0 [the best of a few steps each]", above=0)
    rank: int | None = setting(None, METHOD, "N", "Of a new adapter [8]; widens ADAPTER", least=1)
    alpha: float | None = setting(None, METHOD, "X", "Of a new adapter [twice the rank]", above=0)
    roles: Sequence[str] | None = setting(None, METHOD, "ROLES", "Projections to train [those of ADAPTER, or all]")
    imitation: float = setting(0.5, TRAINING, "X", "0: carry the change; 1: copy OLD [0.5]", least=0.0, most=1.0)
    kl_weight: float = setting(1.0, TRAINING, "X", "Of the divergence from the teacher [1]", least=0.0)
    next_token_weight: float = setting(0.0, TRAINING, "X", "Of a next-token loss besides [0]", least=0.0)
    retain: str | os.PathLike[str] | None = setting(
        None, TRAINING, "FILE", "Text predicted as before; shipped: general"
    )
    retain_weight: float = setting(RETAIN_WEIGHT, TRAINING, "X", "Of what --retain adds to the loss [0.3]", above=0)
    batch_bytes: int = setting(2000, TRAINING, "N", "Text a step reads [2,000]", least=1)
    max_tokens: int = setting(256, TEXT, "N", "Tokens each model reads of a text [256]", least=2)
    top_k: int | Auto | None = setting(
        "auto", TRAINING, "N", "Tokens kept of a target; all; auto loses 2 % [auto]", least=1, absent="all",
        expects="auto, all or a number",
    )  # fmt: skip
    eval_every: int = setting(25, TRAINING, "N", "Steps between evaluations [25]", least=1)
    patience: int | None = setting(
        6, TRAINING, "N", "Evaluations without gain to stop at; 0: never [6]", least=1, absent="0"
    )
    seed: int | None = setting(None, TRAINING, "N", "Of the text, its order and a new adapter [0]")
    gradient_checkpointing: bool = setting(
        False, MACHINE, None, "Recompute activations: less memory, more time", "--gradient-checkpointing"
    )
    cache: str | os.PathLike[str] | None = setting(
        None, MACHINE, "DIR", "Folder that keeps the targets for further runs"
    )
    control: RefineControl = setting("none", TRAINING, "KIND", "none, shuffled, shuffled-labels [none]")

    def __post_init__(self) -> None:
        check(self)
        if not (self.kl_weight or self.next_token_weight):
            raise LoraSuiteError(
                f"kl_weight is {self.kl_weight}, next_token_weight {self.next_token_weight}; one must be above 0"
            )


@dataclass(frozen=True)
class FinetuneConfig:
    """A training on labelled samples.

    Attributes:
        data: What a migration fine-tunes on; `finetune` takes it as an argument of its own. A .json, .jsonl or .txt
            file, a folder saved by `datasets` or the hub id of a data set (both need that package), or a sequence of
            records: see `samples.read_records` and `samples.SampleMaker`.
        epochs: How often each sample is read.
        steps: Optimizer steps, in the place of epochs.
        batch: Samples a step reads.
        micro_batch: Samples computed at once, all by default; changes memory and speed, but of the result only the
            rounding and the draws of dropout.
        learning_rate: At the first step, falling linearly to 0.
        max_tokens: Of a row, special tokens included; the rest is cut off.
        template: "alpaca", "chat", or a text with {instruction} and {input}: how records become prompts.
        completion_only: Count only what answers the prompt in the loss.
        validation: Samples that are not trained on: a share of the data between 0 and 1, or data of its own. The
            adapter written is then the one of all checkpoints and the start that has the lowest loss on them.
        rank: Of a new adapter; None takes 32.
        alpha: Of a new adapter; None takes its rank.
        dropout: Of a new adapter; None takes 0.
        roles: Of a new adapter; None takes q, k, v and o.
        save_every: Steps between checkpoints; None takes an epoch, 50 at most.
        retain: Unlabelled text on which the model's predictions are to stay what they are without an adapter: a .jsonl
            (field `text`) or .txt file, or "shipped" for the general text that comes with the package. A step reads
            about as many tokens of it as of samples, and takes two to three times as long.
        retain_weight: Of that divergence beside the loss.
        seed: Of the order, dropout and a new adapter; None takes the plan's in a migration, and 0 elsewhere.
        gradient_checkpointing: Recompute activations: less memory, more time.
    """

    data: Data | None = setting(None, TRAINING, "DATA", "Then train on labelled data, as `finetune` does")
    epochs: int = setting(3, TRAINING, "N", "How often each sample is read [3]", least=1)
    steps: int | None = setting(None, TRAINING, "N", "Optimizer steps, in place of epochs", least=1)
    batch: int = setting(16, TRAINING, "N", "Samples a step reads [16]", least=1)
    micro_batch: int | None = setting(None, MACHINE, "N", "Samples computed at once [all of a step]", least=1)
    learning_rate: float = setting(1e-3, TRAINING, "X", "At the first step; falls linearly to 0 [1e-3]", above=0)
    max_tokens: int = setting(256, TEXT, "N", "Of a sample; the rest is cut off [256]", least=2)
    template: str = setting("alpaca", TEXT, "FORM", "alpaca, chat, or a file with {instruction} and {input} [alpaca]")
    completion_only: bool = setting(
        False, TRAINING, None, "Count only what answers the prompt in the loss", "--completion-only"
    )
    validation: float | Data | None = setting(
        None, TEXT, "DATA", "To choose the checkpoint on: a share such as 0.1, or data"
    )
    rank: int | None = setting(None, METHOD, "N", "Of an adapter from zero [32]", least=1)
    alpha: float | None = setting(None, METHOD, "X", "Of an adapter from zero [its rank]", above=0)
    dropout: float | None = setting(None, METHOD, "X", "Of an adapter from zero [0]", least=0, below=1)
    roles: Sequence[str] | None = setting(None, METHOD, "ROLES", "Of an adapter from zero, like q,v [q,k,v,o]")
    save_every: int | None = setting(None, MACHINE, "N", "Steps between checkpoints [an epoch, 50 at most]", least=1)
    retain: str | os.PathLike[str] | None = setting(
        None, TRAINING, "FILE", "Text predicted as before; shipped: general"
    )
    retain_weight: float = setting(RETAIN_WEIGHT, TRAINING, "X", "Of what --retain adds to the loss [0.3]", above=0)
    seed: int | None = setting(None, TRAINING, "N", "Of the order, dropout and an adapter from zero [0]")
    gradient_checkpointing: bool = setting(
        False, MACHINE, None, "Recompute activations: less memory, more time", "--gradient-checkpointing"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class VerifyConfig:
    """What a verification reads.

    Attributes:
        text: Unlabelled .jsonl (field `text`) or .txt; None takes the general text shipped with the package. An
            adapter's effect shows best on text of its domain.
        labelled: .jsonl with fields `text`, or `prompt` and `completion`; adds bits per byte.
        examples: Of either file, a seeded sample where there are more.
        max_tokens: Of each example, for each model.
        seed: Of the examples, the shuffles and the bootstrap.
        bootstrap: Resamples of the texts for the intervals.
    """

    text: str | os.PathLike[str] | None = setting(
        None, TEXT, "FILE", "Unlabelled, best of the domain: .jsonl, .txt [shipped]"
    )
    labelled: str | os.PathLike[str] | None = setting(
        None, TEXT, "FILE", "Adds bits per byte: .jsonl, `text` or `prompt`, `completion`"
    )
    examples: int = setting(64, TEXT, "N", "Examples to read of either file [64]", least=4)
    max_tokens: int = setting(256, TEXT, "N", "Tokens each model reads of an example [256]", least=2)
    seed: int = setting(0, TEXT, "N", "Of the examples, the shuffles and the bootstrap [0]")
    bootstrap: int = setting(1000, TEXT, "N", "Resamples of the texts for the intervals [1,000]", least=1)

    def __post_init__(self) -> None:
        check(self)
