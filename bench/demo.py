"""The main job on real trained models: an adapter carried between the two demo models, and what it then does.

    python bench/demo.py            (or: make demo)

First between two models trained independently of each other, then to a planted upgrade: the old demo model rewritten
to another width, depth, head count and vocabulary while it computes the same function.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from demo_pair import bits_per_byte
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lorasuite_fast import PlanConfig, migrate

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "lorasuite_fast/demo"
sys.path.insert(0, str(ROOT / "tests"))

from planted import Planted, plant  # noqa: E402


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def score(model: Any, folder: Path, texts: dict[str, str], adapter: Path | None = None) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    result = {name: bits_per_byte(model, tokenizer, text) for name, text in texts.items()}
    if adapter is not None:
        model.unload()
    return result


def show(console: Console, title: str, rows: list[tuple[str, dict[str, float] | None]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("domain text", justify="right")
    table.add_column("general text", justify="right")
    for name, figures in rows:
        if figures is None:
            table.add_section()
            table.add_row(f"[dim]{name}[/dim]", "", "")
        else:
            table.add_row(name, f"{figures['domain_test']:.4f}", f"{figures['general_test']:.4f}")
    console.print(table)


def logit_change(planted: Planted, model: Any, adapter: Path, out: Path) -> tuple[float, float]:
    """Cosine and size ratio of the adapter's change of the shared tokens' logits, planted model against old."""
    ids_o, ids_n = planted.random_ids(4, 64, 0)
    changes = []
    for base, ids, folder, shared in (
        (model, ids_o, adapter, planted.shared_old),
        (planted.model, ids_n, out, planted.shared_new),
    ):
        with torch.inference_mode():
            before = base(ids).logits[..., shared]
            tuned = PeftModel.from_pretrained(base, folder)
            changes.append((tuned(ids).logits[..., shared] - before).flatten().double())
            tuned.unload()
    old, new = changes
    return float(torch.nn.functional.cosine_similarity(old, new, dim=0)), float(new.norm() / old.norm())


def recorded_rows(recorded: dict[str, Any]) -> list[tuple[str, dict[str, float] | None]]:
    return [
        ("recorded, by `make demo-pair`:", None),
        ("new + LoRA trained on 100 samples", recorded["bits_per_byte"]["new + lora_100"]),
        ("new + LoRA trained on the full set", recorded["bits_per_byte"]["new + lora_full"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    console = Console()
    work = arguments.out
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    texts = {name: (DEMO / f"{name}.txt").read_text("utf-8") for name in ("domain_test", "general_test")}
    old, new, adapter = DEMO / "old", DEMO / "new", DEMO / "adapter"

    console.print("[bold]1. Two models trained independently[/bold]")
    start = time.perf_counter()
    result = migrate(old, new, adapter, work / "migrated", plan=PlanConfig(calibration="self"), refine=False)
    seconds = time.perf_counter() - start
    migrate(old, new, adapter, work / "migrated-paper", plan=PlanConfig(method="paper"), refine=False)
    migrate(old, new, adapter, work / "migrated-lstsq", plan=PlanConfig(method="lstsq"), refine=False)
    old_model, new_model = load(old), load(new)
    o, n = result.plan.old.shape, result.plan.new.shape
    console.print(
        f"old: {o.L} layers, d {o.d}, {o.attention}, {o.V:,} tokens\n"
        f"new: {n.L} layers, d {n.d}, {n.attention}, {n.V:,} tokens\n"
        f"{result.plan.facts['shared_tokens']:,} tokens shared; R² of the transfer matrix on held-out tokens "
        f"{result.plan.facts['r2']:.2f}\nmigrated in {seconds:.1f} s",
        highlight=False,
    )
    show(
        console,
        "bits per byte (lower is better)",
        [
            ("old", score(old_model, old, texts)),
            ("old + adapter", score(old_model, old, texts, adapter)),
            ("new", score(new_model, new, texts)),
            ("new + migrated adapter (auto: distill)", score(new_model, new, texts, work / "migrated")),
            ("new + migrated adapter (lstsq)", score(new_model, new, texts, work / "migrated-lstsq")),
            ("new + migrated adapter (paper, Eq. 3)", score(new_model, new, texts, work / "migrated-paper")),
            *recorded_rows(json.loads((DEMO / "recorded.json").read_text())),
        ],
    )
    console.print(
        "No linear map leads from one of these models to the other, and no projection of the weights alone carries the "
        "effect: the rows of lstsq and paper stay near new's. auto distils it instead, on text the old model writes "
        "with its adapter; no other data is used.\n"
    )

    console.print("[bold]2. A planted upgrade of the old model[/bold]")
    planted = plant(
        old_model,
        AutoTokenizer.from_pretrained(old),
        d_new=192,
        layers_new=6,
        heads_new=6,
        intermediate_new=448,
        # The same tokens under other ids: with more or fewer of them bits per byte would not be comparable.
        added_tokens=0,
        dropped=0.0,
        seed=0,
    )
    planted.save(work / "planted")
    start = time.perf_counter()
    result = migrate(old, work / "planted", adapter, work / "migrated-planted", refine=False)
    seconds = time.perf_counter() - start
    n = result.plan.new.shape
    console.print(
        f"new: {n.L} layers, d {n.d}, {n.attention}, the same tokens under other ids; the same function\n"
        f"migrated in {seconds:.1f} s",
        highlight=False,
    )
    show(
        console,
        "bits per byte (lower is better)",
        [
            ("old", score(old_model, old, texts)),
            ("old + adapter", score(old_model, old, texts, adapter)),
            ("planted", score(planted.model, work / "planted", texts)),
            (
                "planted + migrated adapter (lstsq)",
                score(planted.model, work / "planted", texts, work / "migrated-planted"),
            ),
        ],
    )
    cosine, ratio = logit_change(planted, old_model, adapter, work / "migrated-planted")
    console.print(f"the adapter's change of the logits, planted : old: cosine {cosine:.7f}, size {ratio:.5f}")
    console.print(f"written: migrated, migrated-lstsq, migrated-paper, migrated-planted in {work}/", highlight=False)


if __name__ == "__main__":
    main()
