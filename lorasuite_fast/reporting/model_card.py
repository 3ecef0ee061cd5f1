"""The README.md beside an adapter: what the hub asks for, and how the adapter came about, without local paths."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraSuiteError
from ..io.artifacts import PROVENANCE, STEPS_MARK
from ..io.hub_ids import HUB_ID, hub_id, shown
from ..io.json_files import read_bounded, read_json
from ..transfer.build_options import EXACT_R2
from ..transfer.kinship import plan_kinship
from .escaping import code_span, markdown, paragraph, python_literal
from .provenance import Step, provenance, read_steps, versions, without_machine

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..distillation.choice import Choice
    from ..distillation.settings import Distilled
    from ..transfer.plan import Plan
    from ..transfer.projection import LayerResult

CARD = "README.md"
_MOST_CARD = 1 << 20
_END = "<!-- lorasuite-fast: end -->"


def section(title: str, sentence: str, rows: Mapping[str, object], *, warning: bool = False) -> str:
    """One step on the adapter's way as Markdown: a heading, its outcome, and a table of figures, all of plain text."""
    start = "**Warning:** " if warning else ""
    lines = [f"## {markdown(title)}", "", start + paragraph(sentence), "", "| | |", "|---|---|"]
    lines += [f"| {markdown(label)} | {markdown(value)} |" for label, value in rows.items()]
    return "\n".join(lines) + "\n"


def card_files(new: str, step: Step, start: Path | None = None, *, wrapped: bool = False) -> dict[str, bytes]:
    """The card and the data it is rendered from, to stand beside an adapter.

    Args:
        new: the model's name, a hub id or a folder. step: what was done. start: adapter folder this one was trained
            from; the steps its data tell of come first. wrapped: whether the model is a multimodal class, which
            another class of transformers loads.
    """
    steps = [*read_steps(start), step]
    return {CARD: model_card(new, steps, wrapped=wrapped), PROVENANCE: provenance(steps)}


def model_card(new: str, steps: Sequence[Step], *, wrapped: bool = False) -> bytes:
    """The whole README.md of an adapter for the model `new`, a hub id or a folder."""
    from huggingface_hub import ModelCardData

    base = hub_id(new)
    fields: dict[str, Any] = {} if base is None else {"base_model": base, "base_model_relation": "adapter"}
    data = ModelCardData(
        library_name="peft", pipeline_tag="text-generation", tags=["lora", "peft", "lorasuite-fast"], **fields
    )
    name = shown(new)
    return _CARD.format(
        metadata=data.to_yaml().strip(),
        name=markdown(name),
        note="" if base else _NO_BASE.format(name=code_span(name)),
        model=python_literal(base or f"path/to/{name}"),
        loader=_WRAPPER if wrapped else "AutoModelForCausalLM",
        begin=STEPS_MARK,
        steps="\n".join(map(_rendered, steps)).strip(),
        end=_END,
        versions=", ".join(f"{package} {version}" for package, version in versions().items()),
    ).encode("utf-8", "backslashreplace")


def _card_text(folder: Path) -> str:
    """A folder's card; empty where there is none that can be read, or one longer than any card."""
    try:
        return read_bounded(folder / CARD, _MOST_CARD, "an adapter").decode("utf-8")
    except (LoraSuiteError, UnicodeDecodeError):
        return ""


def _rendered(step: Step) -> str:
    marks = {f"fingerprint, {part}": mark for part, mark in step.fingerprints.items()}
    text = section(_TITLES.get(step.step, step.step), step.outcome, {**step.figures, **marks}, warning=step.warning)
    if not step.layers:
        return text
    head, *rows = step.layers
    lines = ["", _row(head), "|" + "---|" * len(head), *map(_row, rows)]
    return text + "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown, cells))} |"


_TITLES = {
    "migration": "Migration",
    "refinement": "Refinement without labels",
    "fine-tuning": "Fine-tuning on labelled data",
}
_NO_BASE = """
The model is a local folder, {name}, so that `base_model` is missing above: name the model's hub id there before you
publish (`lorasuite_fast.push_to_hub(folder, repo_id, base_model=...)` does).
"""
_WRAPPER = "AutoModelForImageTextToText"
_CARD = """---
{metadata}
---

# LoRA adapter for {name}

Made with lorasuite-fast, in the steps below. Read their figures before you rely on it.
{note}
```python
from peft import PeftModel
from transformers import {loader}

model = {loader}.from_pretrained({model})
model = PeftModel.from_pretrained(model, "path/to/this/adapter")
```

{begin}
{steps}
{end}

## Versions

{versions}
"""


def migration_step(
    plan: Plan,
    source: Adapter,
    layers: Sequence[LayerResult],
    distilled: Distilled | None,
    choice: Choice | None = None,
) -> Step:
    """What a migration did: method and why, fit, agreement, and a table of layers."""
    facts, options = plan.facts, plan.options
    text = shown(options["calibration"] if distilled is None else distilled.text)
    rows = {
        "adapter": shown(source.where),
        "from": f"{shown(plan.old.name)} ({plan.old.family}, {plan.old.shape.L} layers, width {plan.old.shape.d})",
        "to": f"{shown(plan.new.name)} ({plan.new.family}, {plan.new.shape.L} layers, width {plan.new.shape.d})",
        "method": f"{plan.method}, {facts.get('method_reason', 'asked for')}",
        "text": text,
        "R² of the transfer matrix on held-out tokens": (
            f"{number(facts['r2'], 4)} old to new, {number(facts['r2_back'], 4)} new to old"
        ),
        "shared tokens": f"{facts['shared_tokens']:,}",
        "relatives": plan_kinship(facts) or "–",
    }
    if distilled is not None:
        share, content = distilled.agreement["kl_share"], distilled.agreement["content_kl_share"]
        rows |= {
            "agreement with the old adapter on held-out text (1: the same change, 0: none)": _interval(share),
            "of which depends on the text": _interval(content),
            "held-out positions": f"{distilled.held_positions:,} of {distilled.positions:,}",
            "gain": f"{distilled.gain:g}",
        }
    if choice is not None:
        rows["candidates, by what depends on the text in their agreement on held-out text"] = choice.table
    if choice is not None and distilled is None:
        judged = choice.agreement[choice.chosen]
        rows |= {
            "agreement with the old adapter on held-out text (1: the same change, 0: none)": _interval(
                judged["kl_share"]
            ),
            "of which depends on the text": _interval(judged["content_kl_share"]),
        }
    table = [["new layer", "old layer", "similarity", "heads", "explained", "relative size of the update"]]
    for layer in layers:
        sizes = ", ".join(f"{role} {size:.3f}" for role, size in layer.update.items()) or "–"
        old = "–" if layer.old_layer is None else str(layer.old_layer)
        figures = map(number, (layer.cka, layer.head_similarity, layer.explained))
        table.append([str(layer.new_layer), old, *figures, sizes])
    outcome, warning = _verdict(plan, distilled, choice)
    marks = {"old": plan.old.fingerprint, "new": plan.new.fingerprint}
    config = without_machine(options) | {"calibration": text}
    return Step("migration", outcome, config, marks, rows, table, warning)


def _verdict(plan: Plan, distilled: Distilled | None, choice: Choice | None) -> tuple[str, bool]:
    """The outcome, and whether it is a warning."""
    if distilled is None and choice is not None:
        if choice.warning:
            return f"{choice.warning}.", True
        share = choice.agreement[choice.chosen]["kl_share"][0]
        return f"Part of the adapter's effect arrived: {share:.0%} on held-out text.", False
    if distilled is not None:
        if distilled.warning:
            return f"{distilled.warning}.", True
        share = distilled.agreement["kl_share"][0]
        return f"Part of the adapter's effect arrived: {share:.0%} on held-out text.", False
    if plan.exact and plan.options["method"] == "copy":
        return "The new model's weights are the old one's: the adapter is what it was.", False
    if plan.exact:
        return "A linear map carries one model onto the other: the adapter should arrive whole.", False
    if plan.options["method"] == "copy":
        return "The adapter was copied. What it still does was not measured: run lorasuite-fast verify.", False
    fits = plan.linear_fits
    if not fits or min(fits) >= EXACT_R2:
        return "What arrived was not measured: run lorasuite-fast verify.", False
    return (
        f"What arrived was not measured. No linear map carries one model onto the other (R² below {EXACT_R2}): between "
        "such models a projection of the weights alone usually changes little or nothing for the better. Run "
        "lorasuite-fast verify."
    ), False


def number(value: float | None, digits: int = 3) -> str:
    """A figure of a card, – where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(figures: Sequence[float]) -> str:
    return f"{figures[0]:.3f}, 95 % interval {figures[1]:.3f} to {figures[2]:.3f}"


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> str:
    """Uploads an adapter folder through huggingface_hub, and returns the commit's address.

    Args:
        base_model: the model's hub id, where the adapter was made for a local folder: it replaces the folder's path in
            adapter_config.json and is added to the card, in the copy that is uploaded.
        private, revision, token, create_pr: as huggingface_hub has them.

    Raises:
        LoraSuiteError: not an adapter folder, or one that names a local folder as its base where base_model is None.
    """
    import json

    from huggingface_hub import HfApi

    from ..adapters.adapter import CONFIG, WEIGHTS

    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise LoraSuiteError(f"{folder}: is not an adapter folder; it lacks {CONFIG} or {WEIGHTS}")
    config = read_json(path / CONFIG)
    name = str(config.get("base_model_name_or_path") or "")
    base = base_model or hub_id(name)
    if base is None:
        raise LoraSuiteError(
            f"{path / CONFIG}: the base model is the local folder {name}, which nobody else has; pass base_model, its "
            "hub id"
        )
    if not HUB_ID.fullmatch(base):
        raise LoraSuiteError(f"base_model {base!r} is not a hub id of the form owner/name")
    config["base_model_name_or_path"] = base
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (Path(copy) / WEIGHTS).symlink_to((path / WEIGHTS).resolve())
        (Path(copy) / CARD).write_bytes(_published_card(path, base))
        if steps := read_steps(path):
            (Path(copy) / PROVENANCE).write_bytes(provenance(steps))
        api = HfApi()
        api.create_repo(repo_id, token=token, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=copy,
            allow_patterns=[CONFIG, WEIGHTS, CARD, PROVENANCE],
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def _published_card(folder: Path, base: str) -> bytes:
    """The folder's own card where a person wrote or named the base in it, else this module's for `base`."""
    text = _card_text(folder)
    if text and (STEPS_MARK not in text or re.search(r"^base_model:", text, re.MULTILINE)):
        return text.encode()
    return model_card(base, read_steps(folder), wrapped=_WRAPPER in text)
