"""A ladder of relatives of the demo's old model: what each way of carrying the demo adapter is worth on every rung.

    python bench/kinship.py                      every rung, then bench/reports/kinship.md
    python bench/kinship.py steps-20 pruned-150  only these; the report has every rung that was measured
    python bench/kinship.py --refine             with a refinement of what auto wrote, 100 steps on 150 KB

A rung whose figures are in the work folder already is not made again. Figures are bits per byte of the demo's two test
texts, the agreement of every candidate on held-out text (what `auto` chooses by), and the rank correlation of both.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from demo_pair import LENGTH, Recipe, bits_per_byte, packed, train
from demo_text import general_documents
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lorasuite_fast import LoraSuiteError, Migration, PlanConfig, RefineConfig, TransferPlan, migrate
from lorasuite_fast.distillation.choice import FIGURE, REST, WHOLE
from lorasuite_fast.models.families import ROLES
from lorasuite_fast.models.family_table import FAMILIES
from lorasuite_fast.transfer.copying import applicable

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "lorasuite_fast/demo"
REPORT = ROOT / "bench/reports/kinship.md"
sys.path.insert(0, str(ROOT / "tests"))

from planted import plant  # noqa: E402

METHODS = ("copy", "lstsq", "paper", "distill")
TEXTS = ("domain_test", "general_test")


@dataclass(frozen=True)
class Rung:
    """One relative of the old model.

    Attributes:
        shape: "same", "grown" (a planted upgrade: another width, depth, head count, the same tokens under other ids),
            "pruned" (without its third layer) or "extended" (64 more tokens). steps, rate, seed: of the training on
            general text that follows.
    """

    title: str
    shape: str
    steps: int
    rate: float
    seed: int = 7


RUNGS = {
    "same": Rung("the old model itself", "same", 0, 0.0),
    "steps-20": Rung("20 steps at 3e-5", "same", 20, 3e-5),
    "steps-30": Rung("30 steps at 3e-4", "same", 30, 3e-4),
    "steps-150": Rung("150 steps at 1e-3", "same", 150, 1e-3),
    "steps-600": Rung("600 steps at 2e-3", "same", 600, 2e-3),
    "grown-150": Rung("grown, then 150 steps at 1e-3", "grown", 150, 1e-3),
    "pruned-150": Rung("a layer pruned, then 150 steps at 1e-3", "pruned", 150, 1e-3),
    "extended-150": Rung("64 tokens more, then 150 steps at 1e-3", "extended", 150, 1e-3),
    "steps-300": Rung("300 steps at 2e-3", "same", 300, 2e-3),
    "grown-600": Rung("grown, then 600 steps at 2e-3", "grown", 600, 2e-3),
    "pruned-400": Rung("a layer pruned, then 400 steps at 2e-3", "pruned", 400, 2e-3),
    "steps-600-8": Rung("600 steps at 2e-3, another seed", "same", 600, 2e-3, 8),
    "steps-600-9": Rung("600 steps at 2e-3, a third seed", "same", 600, 2e-3, 9),
    "pruned-150-8": Rung("a layer pruned, then 150 steps at 1e-3, another seed", "pruned", 150, 1e-3, 8),
    "grown-150-8": Rung("grown, then 150 steps at 1e-3, another seed", "grown", 150, 1e-3, 8),
}
SEEN = ("same", "steps-20", "steps-30", "steps-150", "steps-600", "grown-150", "pruned-150")
"""The rungs that were there when the figure that chooses, and its margins, were set."""


def make(rung: Rung, folder: Path) -> None:
    """Writes the rung's model, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO / "old", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "old")
    if rung.shape == "grown":
        shape = {"d_new": 192, "layers_new": 6, "heads_new": 6, "intermediate_new": 448}
        planted = plant(model, tokenizer, **shape, added_tokens=0, dropped=0.0, seed=0)
        model, tokenizer = planted.model, planted.tokenizer
    elif rung.shape == "pruned":
        del model.model.layers[2]
        model.config.num_hidden_layers -= 1
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:-1]
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
    elif rung.shape == "extended":
        tokenizer.add_tokens([f"<|extra_{n}|>" for n in range(64)])
        torch.manual_seed(rung.seed)
        model.resize_token_embeddings(len(tokenizer))
    if rung.steps:
        recipe = Recipe(rate=rung.rate, steps=rung.steps, batch=4, seed=rung.seed, warm_up=min(20, rung.steps // 5))
        train(model, packed(documents(), tokenizer, recipe), recipe)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def documents() -> list[list[str]]:
    """The text of every rung: prose of Python's standard library, which every machine has."""
    return general_documents(packages=())


def score(folder: Path, adapter: Path | None = None) -> dict[str, float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return {name: bits_per_byte(model, tokenizer, (DEMO / f"{name}.txt").read_text("utf-8")) for name in TEXTS}


def timed(call: Callable[[], Migration]) -> tuple[Migration, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def measure(name: str, work: Path, *, refined: bool) -> dict[str, Any]:
    """Makes a rung and measures every row."""
    rung, new, adapter = RUNGS[name], work / name / "model", DEMO / "adapter"
    if not (new / "config.json").exists():
        temporary = work / name / "making"
        shutil.rmtree(temporary, ignore_errors=True)
        make(rung, temporary)
        temporary.rename(new)
    rows: dict[str, Any] = {"bare": score(new)}
    for method in METHODS:
        out = work / name / method
        try:
            migrated, seconds = timed(
                lambda method=method, out=out: migrate(
                    DEMO / "old", new, adapter, out, plan=PlanConfig(method=method), overwrite=True
                )
            )
        except LoraSuiteError as error:
            rows[method] = {"refused": str(error)}
            continue
        rows[method] = score(new, out) | {"seconds": seconds}
        if method == "distill":
            plan = migrated.plan
    auto, seconds = timed(
        lambda: migrate(DEMO / "old", new, adapter, work / name / "auto", refine=False, overwrite=True)
    )
    rows["auto"] = score(new, work / name / "auto") | {"seconds": seconds, "method": auto.plan.options["method"]}
    choice = auto.choice or judged(plan, adapter, work / name / "judged").choice
    assert choice is not None
    rows["auto"]["method"] = choice.chosen if auto.choice else auto.plan.options["method"]
    for candidate in filter(lambda name: name.endswith(REST), choice.agreement):
        out, forced = work / name / "rest", replace(choice, chosen=candidate)
        with patch("lorasuite_fast.pipeline.plan.choose", lambda *_, forced=forced: forced):
            _, seconds = timed(lambda out=out: judged(plan, adapter, out))
        rows["rest"] = score(new, out) | {"seconds": seconds, "on": candidate.removesuffix(REST)}
    if refined:
        options = RefineConfig(steps=100, text_bytes=150_000, seed=0)
        _, seconds = timed(
            lambda: migrate(DEMO / "old", new, adapter, work / name / "refined", refine=options, overwrite=True)
        )
        rows["refined"] = score(new, work / name / "refined") | {"seconds": seconds}
    return {
        "rows": rows,
        "kinship": plan.facts["kinship"],
        "r2": [plan.facts["r2"], plan.facts["r2_back"]],
        "agreement": {candidate: {k: v[0] for k, v in f.items()} for candidate, f in choice.agreement.items()},
        "would_choose": choice.chosen,
        "measured": auto.choice is not None,
    }


def judged(plan: TransferPlan, adapter: Path, out: Path) -> Migration:
    """Every candidate measured, also where `auto` needs no measurement."""
    families = FAMILIES[plan.old.family], FAMILIES[plan.new.family]
    candidates = list(applicable(families, (plan.old.shape, plan.new.shape), plan.options["roles"]))
    return replace(plan, options=plan.options | {"candidates": candidates}).apply(adapter, out, overwrite=True)


def ranks(values: list[float]) -> list[float]:
    """Ranks from 0, the mean of them where values are equal."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's."""
    a, b = (torch.tensor(ranks(values), dtype=torch.float64) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def gain(rows: dict[str, Any], row: str, adapter_gain: float) -> float:
    """Of the bits per byte the adapter gains on its own base, the share it gains here."""
    return float((rows["bare"]["domain_test"] - rows[row]["domain_test"]) / adapter_gain)


def report(found: dict[str, dict[str, Any]], own: dict[str, dict[str, float]]) -> str:
    before, after = own["old"]["domain_test"], own["old + adapter"]["domain_test"]
    lines = [
        "# Relatives: a ladder of kinship",
        "",
        f"`python bench/kinship.py`, {torch.get_num_threads()} thread(s) of a CPU that other programs used as well, "
        f"torch {torch.__version__}. Every new model is the demo's old one, trained on with prose of "
        f"Python's standard library (windows of {LENGTH} tokens, 4 a step, AdamW). The demo's adapter takes its base "
        f"from {before:.3f} to {after:.3f} bits per byte of its domain. `auto` reads the shipped text, no labels.",
        "",
        *_bits_table(found),
        "",
        *_agreement_table(found, before - after),
        "",
        "Seconds on the wall, with the building of the plan. Other programs shared the machine, so that rows "
        "differ by what those did: orders of magnitude only.",
        "",
        "| new model | copied | lstsq | paper | distill | with a rest, all judged | auto | refined |",
        "|" + "---|" * 8,
    ]
    for name, figures in found.items():
        rows = figures["rows"]
        cells = [
            f"{rows[row]['seconds']:.1f}" if "seconds" in rows.get(row, {}) else "–"
            for row in (*METHODS, "rest", "auto", "refined")
        ]
        lines.append(f"| {RUNGS[name].title} | {' | '.join(cells)} |")
    missing = [rung.title for name, rung in RUNGS.items() if name not in found]
    lines += ["", "Not run here: " + ("; ".join(missing) + "; " if missing else "") + NOT_RUN, ""]
    return "\n".join(lines)


def _bits_table(found: dict[str, dict[str, Any]]) -> list[str]:
    columns = "bare | copied | lstsq | paper | distill | best of them with a rest | **auto** | auto, refined"
    lines = [f"| new model | weights apart | R² | {columns} | auto chose | best |", "|" + "---|" * 13]
    for name, figures in found.items():
        rows = figures["rows"]
        cells = [_cell(rows.get(row, {})) for row in ("bare", *METHODS, "rest")]
        best = min(
            (row for row in rows if row not in ("bare", "auto", "refined") and "refused" not in rows[row]),
            key=lambda row: rows[row]["domain_test"],
        )
        distances = [v for k, v in figures["kinship"].get("distances", {}).items() if k in ROLES]
        apart = f"{max(distances):.1%}" if distances else "–"
        r2 = min(value for value in figures["r2"] if value is not None)
        chosen = rows["auto"]["method"] + ("" if figures["measured"] else ", unmeasured")
        auto = [f"**{_cell(rows['auto'])}**", _cell(rows.get("refined", {}))]
        row = [RUNGS[name].title, apart, f"{r2:.4f}", *cells, *auto, chosen, best]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "General text, bits per byte:", "", f"| new model | {columns} |", "|" + "---|" * 9]
    for name, figures in found.items():
        rows = ("bare", *METHODS, "rest", "auto", "refined")
        cells = [_cell(figures["rows"].get(row, {}), "general_test") for row in rows]
        lines.append(f"| {RUNGS[name].title} | {' | '.join(cells)} |")
    if any("refined" in figures["rows"] for figures in found.values()):
        lines += [
            "",
            "Refined: without labels, 100 steps on 150 KB that the old model wrote, at the rate the trials found.",
        ]
    return lines


def _agreement_table(found: dict[str, dict[str, Any]], adapter_gain: float) -> list[str]:
    lines = [
        "Two figures of every candidate, on held-out text without labels, and the share of the adapter's gain on the "
        "test text. `imitated` chooses: of the log-likelihood that the old adapter adds to what the adapted old model "
        "predicts, the share that the candidate adds, less what a constant shift adds. The other is the share of the "
        "divergence taken away, from the new model changed as the old one was.",
        "",
        "| new model | candidate | imitated | divergence | share of the gain |",
        "|---|---|---|---|---|",
    ]
    points: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    behind: dict[bool, list[float]] = {True: [], False: []}
    for name, figures in found.items():
        rows = {candidate: "rest" if candidate.endswith(REST) else candidate for candidate in figures["agreement"]}
        shares = {candidate: gain(figures["rows"], row, adapter_gain) for candidate, row in rows.items()}
        behind[name in SEEN].append(max(shares.values()) - gain(figures["rows"], "auto", adapter_gain))
        for row, agreement in figures["agreement"].items():
            points[name in SEEN].append((agreement[FIGURE], agreement[WHOLE], shares[row]))
            cells = f"{agreement[FIGURE]:.3f} | {agreement[WHOLE]:.3f} | {shares[row]:.1%}"
            lines.append(f"| {RUNGS[name].title} | {row} | {cells} |")
    lines += [
        "",
        "Rank correlation of each figure with the gain over the candidates of all rungs, and how far `auto` stays "
        "behind the best candidate, in the share of the adapter's gain:",
        "",
        "| rungs | candidates | imitated | divergence | auto behind, at most |",
        "|---|---|---|---|---|",
    ]
    for seen, title in ((True, "on which the figure was found"), (False, "made afterwards")):
        if points[seen]:
            chosen, other, true = (list(column) for column in zip(*points[seen], strict=True))
            correlations = f"{rank_correlation(chosen, true):.3f} | {rank_correlation(other, true):.3f}"
            lines.append(f"| {title} | {len(points[seen])} | {correlations} | {max(behind[seen]):.1%} |")
    return lines


NOT_RUN = (
    "tuning on instructions, LoRA trained on labels on every rung, refinement from each start, the shuffled control of "
    "each refinement, and the same ladder from SmolLM2-135M."
)


def _cell(row: dict[str, Any], text: str = "domain_test") -> str:
    value = row.get(text, math.nan)
    return "–" if math.isnan(value) else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What carries an adapter between relatives.")
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"some of: {', '.join(RUNGS)} (default: all)")
    parser.add_argument("--work", type=Path, default=Path(".cache/kinship"), help="work folder")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--refine", action="store_true", help="also refine what auto writes, without labels")
    arguments = parser.parse_args()
    unknown = set(arguments.rungs) - set(RUNGS)
    if unknown:
        parser.error(f"unknown rungs: {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.rungs or RUNGS:
        path = arguments.work / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            figures = measure(name, arguments.work, refined=arguments.refine)
            path.write_text(json.dumps(figures, indent=1))
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    found = {name: json.loads(path.read_text()) for name in RUNGS if (path := arguments.work / f"{name}.json").exists()}
    own = {"old": score(DEMO / "old"), "old + adapter": score(DEMO / "old", DEMO / "adapter")}
    REPORT.write_text(report(found, own), "utf-8")
    print(f"written: {REPORT}")


if __name__ == "__main__":
    main()
