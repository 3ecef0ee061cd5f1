"""A transfer plan as a folder with a card, on disk and on the hub."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import LoraSuiteError
from ..io.hub_ids import HUB_ID, hub_id, shown
from ..io.output import check_output, write_folder
from ..models.loading import reason
from ..transfer.kinship import plan_kinship
from ..transfer.plan import TEXTS, lasting_options
from .escaping import markdown
from .model_card import CARD, number, section

if TYPE_CHECKING:
    from ..transfer.plan import Plan

PLAN = "transfer_plan.safetensors"


def save_folder(
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    names: tuple[str | None, str | None],
    overwrite: bool,
    repo_id: str | None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload transfer plan",
    create_pr: bool = False,
) -> str | None:
    """`TransferPlan.save_pretrained`; `repo_id` None does not upload."""
    target = check_output(folder, overwrite=overwrite, inputs=plan._inputs())
    named = _named(plan, names)
    if repo_id is not None:
        named = _publishable(named)
    plan._check_finite()
    write_folder(target, {PLAN: named._write, CARD: plan_card(named)}, overwrite=overwrite)
    if repo_id is None:
        return None
    from huggingface_hub import HfApi

    api = HfApi()
    created = api.create_repo(repo_id, token=token, private=private, exist_ok=True)
    commit = api.upload_folder(
        # The address of a repository named without its owner holds the owner.
        repo_id=created.repo_id,
        folder_path=str(target),
        allow_patterns=[PLAN, CARD],
        revision=revision,
        token=token,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return str(commit.commit_url)


def _named(plan: Plan, names: tuple[str | None, str | None]) -> Plan:
    records = []
    for record, name, argument in zip((plan.old, plan.new), names, ("old_model", "new_model"), strict=True):
        if name is not None and not HUB_ID.fullmatch(name):
            raise LoraSuiteError(f"{argument} {name!r} is not a hub id of the form owner/name")
        records.append(record if name is None else replace(record, name=name))
    return replace(plan, old=records[0], new=records[1])


def _publishable(plan: Plan) -> Plan:
    """The plan with nothing of this machine in it."""
    records = []
    for record, argument in ((plan.old, "old_model"), (plan.new, "new_model")):
        name = hub_id(record.name)
        if name is None:
            raise LoraSuiteError(
                f"the plan was built from the local folder {record.name}, which nobody else has; pass {argument}, its "
                "hub id"
            )
        records.append(replace(record, name=name))
    return replace(plan, old=records[0], new=records[1], options=lasting_options(plan.options))


def text_of(plan: Plan, *, from_file: bool) -> str:
    """The text a plan was built with, for a distillation. A file that only a plan names is not opened.

    Raises:
        LoraSuiteError: the plan came from a file, and its text was one of the builder's.
    """
    text = str(plan.options["calibration"])
    if from_file and text not in TEXTS:
        raise LoraSuiteError(
            f"the plan was built with the text {shown(text)}, which it names and does not hold; pass it as `text` "
            "(text=)"
        )
    return text


def find_plan(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The plan's file of a folder or a hub id, or that file itself; for `TransferPlan.from_pretrained`."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / PLAN).is_file():
            raise LoraSuiteError(f"PLAN {source}: the folder holds no {PLAN}; it is not one of save_pretrained")
        return path / PLAN
    text = os.fspath(source)
    if path.exists() or not HUB_ID.fullmatch(text) or text.startswith("."):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(text, PLAN, **hub))
    except LocalEntryNotFoundError:
        problem = "no such file or folder, not in the local hub cache, and the hub cannot be reached"
    except EntryNotFoundError:
        problem = f"no such file or folder, and the hub's {text} holds no {PLAN}"
    except HFValidationError:
        problem = "no such file or folder, and not a hub id of the form owner/name"
    except (HfHubHTTPError, OSError) as error:
        problem = f"no such file or folder, and the hub answers: {reason(error)}"
    raise LoraSuiteError(f"PLAN {source}: {problem}")


def plan_card(plan: Plan) -> bytes:
    """README.md of a plan: what the hub asks for, the fit, how to use it; no local path."""
    from huggingface_hub import ModelCardData

    models = [hub_id(record.name) for record in (plan.old, plan.new)]
    known = [model for model in models if model is not None]
    fields: dict[str, Any] = {"base_model": known} if known else {}
    data = ModelCardData(library_name="lorasuite-fast", tags=["lora", "lorasuite-fast", "transfer-plan"], **fields)
    facts, options = plan.facts, plan.options
    rows: dict[str, object] = {
        which: (
            f"{shown(record.name)} ({record.family}, {record.shape.L} layers, width {record.shape.d}), "
            f"fingerprint {record.fingerprint}"
        )
        for which, record in (("from", plan.old), ("to", plan.new))
    }
    text = options["calibration"]
    rows |= {
        "method": f"{plan.method}, {facts.get('method_reason', 'asked for')}",
        "relatives": plan_kinship(facts) or "–",
        "projections": ", ".join(options["roles"]),
        "text": text if text in TEXTS else shown(text),
        "R² of the transfer matrix on held-out tokens": (
            f"{number(facts['r2'], 4)} old to new, {number(facts['r2_back'], 4)} new to old"
        ),
        "shared tokens": f"{facts['shared_tokens']:,}",
        "layers with a partner": f"{len(plan.layers)} of {plan.new.shape.L}",
    }
    sentence = (
        "A linear map carries one model onto the other: an adapter should arrive whole."
        if plan.exact
        else "What an adapter does after it has to be measured: run lorasuite-fast verify."
    )
    return _CARD.format(
        metadata=data.to_yaml().strip(),
        old=markdown(shown(plan.old.name)),
        new=markdown(shown(plan.new.name)),
        section=section("The plan", sentence, rows).strip(),
        versions=f"lorasuite-fast {__version__}, torch {metadata.version('torch')}",
    ).encode("utf-8", "backslashreplace")


_CARD = """---
{metadata}
---

# Transfer plan: {old} to {new}

Carries LoRA adapters of {old} to {new}, with lorasuite-fast. It holds no weights of either model.

```python
from lorasuite_fast import Plan

plan = TransferPlan.from_pretrained("path/or/hub-id/of/this/plan")
plan.apply("my-adapter", "my-adapter-new")
```

{section}

## Versions

{versions}
"""
