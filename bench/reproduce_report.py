"""The reproduction's report and figures, from what `bench/reproduce.py` has measured."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import REPORTS
from quality_report import _rounded, spread

SEEDS = (0, 1, 2)
TASKS = ("bible", "arithmetic")
SCORES = {
    "bible": ("domain_test", "bits per byte", "bits per byte of the new domain (lower is better)"),
    "arithmetic": ("exact_match", "exact match", "word problems, exact match (higher is better)"),
}
"""Of a task: the figure's name, what it is called in a table, and in a heading."""
PARTS = ("full", "carry", "lora", "lora-best", "lft", "lft-best")
"""What is timed: LoRA(full), Eq. (3) alone, LoRA(100) and LFT(100) from Eq. (3) in the paper's and the best setting."""
ROWS = {
    "old": ("old", None),
    "adapter": ("old + LoRA(full)", None),
    "new": ("new", None),
    "paper": ("LoRASuite without LFT", "carry"),
    "light-nothing": ("LoRA(100), paper's setting", "lora"),
    "few-nothing": ("LoRA(100), best setting", "lora-best"),
    "light-paper": ("LoRASuite with LFT(100), paper's setting", "lft"),
    "few-paper": ("LoRASuite with LFT(100), best setting", "lft-best"),
    "full": ("LoRA(full)", "full"),
    "distill-self": ("ours: distilled, no labels", None),
    "few-distill-self": ("ours: distilled, then 100 samples, best setting", None),
    "refined": ("ours: refined, all projections, no labels", None),
    "few-nothing-mlp": ("to compare: LoRA(100), all projections, best setting", None),
    "few-refined": ("ours: refined, all projections, then 100 samples, best setting", None),
}
"""Row -> its name in the table, and the part whose cost is its own."""
FURTHER = ("distill-self", "few-distill-self", "refined", "few-nothing-mlp", "few-refined")
"""Rows the paper's table does not have, measured on the bible alone."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "layers-first": {"layers": "first"},
    "heads-identity": {"heads": "identity"},
    "layers-medium": {"layers": "medium"},
    "layers-last": {"layers": "last"},
    "similarity-mean-cca": {"similarity": "mean-cca"},
    "similarity-squared-cca": {"similarity": "squared-cca"},
    "similarity-pwcca": {"similarity": "pwcca"},
    "similarity-procrustes": {"similarity": "procrustes"},
    "fill-nearest": {"fill": "nearest"},
}
NAMES = {
    "base": "layers by CKA, heads by Hungarian assignment",
    "fill-nearest": "new layers without a partner: half the nearest's update",
}
LARGEST_NOTHING = 0.05
"""Of LoRA(full)'s gain: below it a row counts as no better than the new model."""
DATA = "reproduce.json"
OWN_STAGES = re.compile("/arithmetic/|/ablate-|/cost-|/light-|/few-paper|/few-distill-self")
"""Stages that the quality report does not have."""
DROPPED = ("texts", "evaluations", "phases", "gains", "explained", "teacher")
"""What the committed file of figures leaves out."""


@dataclass(frozen=True)
class Measured:
    """The measured stages by name, and what the report asks of them."""

    data: dict[str, Any]

    @property
    def cases(self) -> list[tuple[str, str]]:
        pairs = sorted({name.split("/")[0] for name in self.data})
        return [(pair, task) for pair in pairs for task in TASKS if self.shown(pair, task)]

    def shown(self, pair: str, task: str) -> bool:
        return any(name.startswith(f"{pair}/{task}/") for name in self.data)

    def get(self, pair: str, task: str, seed: int, row: str) -> dict[str, Any] | None:
        return self.data.get(f"{pair}/{task}/{seed}/{row}")

    def score(self, pair: str, task: str, seed: int, row: str) -> float | None:
        key = SCORES[task][0]
        if row in ("old", "new"):
            # The models are the same for every seed.
            if task == "arithmetic":
                found = self.get(pair, task, 0, row)
                return None if found is None else found["bits"][key]
            found = self.data.get(f"{pair}/{row}")
            return None if found is None else found["bits"][task][key]
        found = self.get(pair, task, seed, row)
        return None if found is None else found["bits"][key]

    def fixed(self, task: str) -> float | None:
        """What one fixed answer for each operation scores on the word problems."""
        found = self.data.get("fixed answers")
        return None if found is None or task != "arithmetic" else found["exact_match"]

    def scores(self, pair: str, task: str, row: str) -> list[float]:
        seeds = SEEDS[:1] if row in ("old", "new") else SEEDS
        return [v for seed in seeds if (v := self.score(pair, task, seed, row)) is not None]

    def share(self, pair: str, task: str, seed: int, row: str) -> float | None:
        """Of LoRA(full)'s gain over the new model, what a row reaches."""
        nothing, found, full = (self.score(pair, task, seed, r) for r in ("new", row, "full"))
        if nothing is None or found is None or full is None or full == nothing:
            return None
        return (found - nothing) / (full - nothing)

    def over_seeds(self, value: Callable[[int], float | None]) -> list[float]:
        return [v for seed in SEEDS if (v := value(seed)) is not None]

    def shares(self, pair: str, task: str, row: str) -> list[float]:
        return self.over_seeds(lambda seed: self.share(pair, task, seed, row))

    def leads(self, pair: str, task: str, row: str, over: str) -> list[float]:
        """Share of a row less that of another, seed by seed."""

        def lead(seed: int) -> float | None:
            both = self.share(pair, task, seed, row), self.share(pair, task, seed, over)
            return None if both[0] is None or both[1] is None else both[0] - both[1]

        return self.over_seeds(lead)

    def cost(self, pair: str, task: str, part: str | None) -> dict[str, Any] | None:
        return None if part is None else self.get(pair, task, 0, f"cost-{part}")


def percent(values: Sequence[float]) -> str:
    return spread(values, 100, 1, " %")


def setting_of(found: dict[str, Any] | None, row: str) -> str:
    if found is None or not row.startswith(("few", "light")):
        return "–"
    chosen = found.get("best", found)
    return f"{chosen['rate']:g}, {chosen['epochs']}"


def case_table(rows: Measured, pair: str, task: str) -> list[str]:
    _, unit, heading = SCORES[task]
    lines = [
        f"### {pair}: {heading}",
        "",
        f"| row | seeds | {unit} | share of LoRA(full)'s gain | rate, epochs | seconds | peak memory, MiB |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    if (fixed := rows.fixed(task)) is not None:
        lines.append(f"| one fixed answer for each operation | – | {fixed:.3f} | – | – | – | – |")
    for row, (name, part) in ROWS.items():
        scores = rows.scores(pair, task, row)
        if not scores:
            if row not in FURTHER or task == "bible":
                lines.append(f"| {name} | 0 | not measured yet | – | – | – | – |")
            continue
        cost = rows.cost(pair, task, part)
        seconds, memory = ("–", "–") if cost is None else cost_of(cost)
        shares = "–" if row in ("old", "adapter", "new", "full") else percent(rows.shares(pair, task, row))
        lines.append(
            f"| {name} | {len(scores)} | {spread(scores)} | {shares} | {setting_of(rows.get(pair, task, 0, row), row)} "
            f"| {seconds} | {memory} |"
        )
    return [*lines, ""]


def cost_of(cost: dict[str, Any]) -> tuple[str, str]:
    return f"{cost['cpu_seconds']:.1f}", f"{cost['peak_memory'] / 2**20:.0f}"


def claims(rows: Measured) -> list[str]:
    """Every claim, case by case: what was measured, and whether it holds."""
    judged = (
        ("without LFT ≈ new model (share of LoRA(full)'s gain within ±5 %)", _nothing),
        ("LFT(100) > LoRA(100), each in the paper's setting (lead in points of LoRA(full)'s gain)", _lead("light")),
        ("LFT(100) > LoRA(100), each in its best setting", _lead("few")),
        ("LFT(100) ≥ LoRA(full), paper's setting (share)", _as_full("light-paper")),
        ("LFT(100) ≥ LoRA(full), best setting (share)", _as_full("few-paper")),
        ("LFT(100) takes 78 % less time than LoRA(full) (change)", _time(0.22, "change")),
        ("LFT(100) needs less memory than LoRA(full)", _memory("full", "lft")),
        ("our target: adapter to fine-tuned result in ≤ 10 % of LoRA(full)'s time (ratio)", _time(0.10, "ratio")),
        (
            "our target: memory no higher than LoRA(100)'s (2 % allowed between two runs)",
            _memory("lora", "lft", equal=True),
        ),
    )
    cases = rows.cases
    lines = [
        "| claim | " + " | ".join(f"{pair}, {task}" for pair, task in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    for claim, judge in judged:
        lines.append(f"| {claim} | " + " | ".join(judge(rows, pair, task) for pair, task in cases) + " |")
    return [*lines, ""]


Judge = Callable[[Measured, str, str], str]
MISSING = "not measured yet"


def _verdict(holds: bool, figure: str) -> str:
    return f"**{'yes' if holds else 'no'}**, {figure}"


def _seeds(values: Sequence[float]) -> str:
    """How many there are, where some are missing."""
    return "" if len(values) >= len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"


def _nothing(rows: Measured, pair: str, task: str) -> str:
    shares = rows.shares(pair, task, "paper")
    if not shares:
        return MISSING
    return _verdict(abs(statistics.mean(shares)) <= LARGEST_NOTHING, percent(shares) + _seeds(shares))


STARTS = ("paper", "nothing")


def _lead(kind: str) -> Judge:
    """A lead counts where its mean is above a point and above the standard deviation over the seeds."""

    def judge(rows: Measured, pair: str, task: str) -> str:
        leads = rows.leads(pair, task, f"{kind}-paper", f"{kind}-nothing")
        if not leads:
            return MISSING
        fixed, means = rows.fixed(task), [statistics.mean(rows.scores(pair, task, f"{kind}-{s}")) for s in STARTS]
        if fixed is not None and max(means) <= fixed:
            return f"nothing to tell: neither does better than one fixed answer for each operation ({fixed:.3f})"
        noise = statistics.stdev(leads) if len(leads) > 1 else 0.0
        return _verdict(statistics.mean(leads) > max(0.01, noise), spread(leads, 100, 1) + _seeds(leads))

    return judge


def _as_full(row: str) -> Judge:
    def judge(rows: Measured, pair: str, task: str) -> str:
        shares = rows.shares(pair, task, row)
        return _verdict(statistics.mean(shares) >= 1, percent(shares) + _seeds(shares)) if shares else MISSING

    return judge


def _time(most: float, what: str) -> Judge:
    def judge(rows: Measured, pair: str, task: str) -> str:
        both = [rows.cost(pair, task, part) for part in ("lft", "full")]
        if both[0] is None or both[1] is None:
            return MISSING
        ratio = both[0]["cpu_seconds"] / both[1]["cpu_seconds"]
        shown = f"{100 * (ratio - 1):+.0f} %" if what == "change" else f"{100 * ratio:.1f} %"
        return _verdict(ratio <= most, shown)

    return judge


def _memory(than: str, part: str, *, equal: bool = False) -> Judge:
    """Of the whole process; `equal` allows the noise between two runs of the same work, 2 %."""

    def judge(rows: Measured, pair: str, task: str) -> str:
        both = [rows.cost(pair, task, p) for p in (part, than)]
        if both[0] is None or both[1] is None:
            return MISSING
        ours, theirs = both[0]["peak_memory"], both[1]["peak_memory"]
        holds = ours <= 1.02 * theirs if equal else ours < theirs
        return _verdict(holds, f"{ours / 2**20:.0f} of {theirs / 2**20:.0f} MiB")

    return judge


def ablation_table(rows: Measured) -> list[str]:
    cases = [(p, t) for p, t in rows.cases if any(rows.get(p, t, 0, f"ablate-{word}") for word in ABLATIONS)]
    if not cases:
        return ["Not measured yet.", ""]
    lines = [
        "| projection | " + " | ".join(f"{p}, {t}: layers | before LFT | after LFT" for p, t in cases) + " |",
        "|---|" + "---|---:|---:|" * len(cases),
    ]
    for word in ABLATIONS:
        line = f"| {NAMES.get(word, word.replace('-', ' ', 1))} |"
        for pair, task in cases:
            found, key = rows.get(pair, task, 0, f"ablate-{word}"), SCORES[task][0]
            if found is None:
                line += " – | – | – |"
                continue
            partners = ", ".join(f"{i}→{j}" for j, i in found["layers"].items())
            line += f" {partners} | {found['before'][key]:.3f} | {found['after'][key]:.3f} |"
        lines.append(line)
    rates = {f"{p}, {t}": rows.get(p, t, 0, "ablate-base") for p, t in cases}
    used = "; ".join(f"{name}: rate {f['rate']:g}, {f['epochs']} epochs" for name, f in rates.items() if f)
    return [*lines, "", f"LFT(100) of this table: {used}. Scores are those of the test sets, seed 0.", ""]


def sweep_table(rows: Measured) -> list[str]:
    """The validation figures of every setting tried with seed 0."""
    lines = []
    for pair, task in rows.cases:
        both = {start: rows.get(pair, task, 0, f"few-{start}") for start in ("nothing", "paper")}
        if not any(both.values()):
            continue
        tried = sorted({(e, r) for f in both.values() if f for r, e, _ in f["settings"]})
        lines += [
            f"{pair}, {task} ({'bits per byte' if task == 'bible' else 'exact match'} on validation data):",
            "",
            "| start | " + " | ".join(f"{r:g}, {e}" for e, r in tried) + " |",
            "|---|" + "---:|" * len(tried),
        ]
        for start, found in both.items():
            values = {(e, r): v for r, e, v in found["settings"]} if found else {}
            cells = [
                "–" if s not in values else f"{values[s] if task == 'bible' else 1 - values[s]:.3f}" for s in tried
            ]
            lines.append(f"| {'LoRA(100)' if start == 'nothing' else 'LFT(100)'} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines or ["Not measured yet.", ""]


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    return f"{cpu}, one thread, torch {torch.__version__}"


def _by_case(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        case, _, row = name.rpartition("/")
        found.setdefault(case, []).append(row)
    return found


def report(rows: Measured, expected: Sequence[str]) -> str:
    missing = [name for name in expected if name not in rows.data]
    lines = ["# The paper's main table on pairs of small models", "", *INTRODUCTION, ""]
    if missing:
        lines += [
            f"**Incomplete: {len(missing)} of {len(expected)} stages are not measured yet.** Their rows and cells are "
            "marked; the column `seeds` says how many seeds a mean is over. Missing:",
            "",
            *(f"- `{case}`: {', '.join(names)}" for case, names in _by_case(missing).items()),
            "",
        ]
    lines += ["## Which claims hold here", "", *claims(rows), *CLAIM_NOTES, ""]
    lines += ["## Scores and costs", "", "![shares of LoRA(full)'s gain](reproduce-rows.png)", ""]
    for pair, task in rows.cases:
        lines += case_table(rows, pair, task)
    lines += ["## Learning rates of LFT(100) and LoRA(100)", "", "![scores by learning rate](reproduce-rates.png)", ""]
    lines += [*sweep_table(rows), "## Ablations", "", *ablation_table(rows), *ABLATION_NOTES, ""]
    lines += ["## How it was measured", "", f"Machine: {machine()}. {hours(rows)}", "", *NOTES]
    return "\n".join(lines) + "\n"


INTRODUCTION = [
    "LoRASuite (arXiv 2505.13515) claims that an adapter projected to the successor model does almost nothing by",
    "itself, but after a light fine-tuning on 100 samples (LFT) is better than LoRA on these 100, and as good as LoRA",
    "trained anew on everything, at a fifth of its time and with less memory. Here the same table is measured on two",
    "pairs of models that were trained independently and on two tasks, over three seeds, with the projection and the",
    "settings of the paper and with every learning rate and number of epochs that did better. `llama-deep`:",
    "Llama-like, 6 → 4 layers, widths 80 → 96, intermediate 208 → 256, 4 → 6 heads of another size, MHA → GQA,",
    "another vocabulary and kind of tokenizer. `neox`: GPT-NeoX-like, 3 → 4 layers, widths 64 → 96, 4 → 6 heads,",
    "another vocabulary.",
]
CLAIM_NOTES = [
    "Shares and leads are of LoRA(full)'s gain over the bare new model, mean ± standard deviation over the seeds",
    "measured. A lead holds where its mean is above one point and above its standard deviation over the seeds. Time",
    "and memory are of the paper's setting of LFT, the projection (with the forward passes for CKA) included. In the",
    "paper's setting the two starts differ in rate too (1e-3 and 3e-4); the learning rates below have both at each.",
]
ABLATION_NOTES = [
    "The paper's further choice, the identity in place of the embeddings' transfer matrix, needs two models of the",
    "same width; no pair here has them.",
]
NOTES = [
    "Pairs, adapters and rows on the new domain are those of the quality report (`bench/quality.py`, which describes",
    "them): rank 8, alpha 16, on the attention projections. The word problems are templates with names and things,",
    "one addition or subtraction of numbers up to 5, 5,000 to train on, 200 for validation and 500 for the test; no",
    "problem of one set is in another (a text is one problem: the sums themselves recur, there are few of them). The",
    "models never saw arithmetic in pre-training. The loss counts the answer only, adapters (rank 8, alpha 16) sit on",
    "every projection, LoRA(full) reads its 5,000 problems twice in batches of 16. Answers are generated greedily and",
    "count where they are the number and nothing else. A model that has only learnt which operation is asked for, and",
    "gives each the answer it has most often, scores what the row of fixed answers says: up to there it is no",
    "arithmetic.",
    "",
    "How hard the problems may be was tried on the new models before, in single runs with rank 16 on every",
    "projection: numbers up to 9 (`llama-deep`, rate 1e-2, batches of 32, three readings of 6,000) ended at 25 %;",
    "additions up to 5 (3e-3, batches of 16, two readings) at 100 %; additions and subtractions up to 5 (`neox`, the",
    "same) at 99.8 %; bare, both answered none. So numbers up to 5 and 3e-3 were taken, with the rank of the other",
    "task, which these runs did not try.",
    "",
    "LFT and LoRA(100): batches of 16, AdamW, linear schedule, no warm-up. The paper's setting is 1e-3 and 3 epochs",
    "for LFT, 3e-4 and 3 epochs for LoRA(100) (its 100 steps of warm-up are left out: there are 21 steps). The best",
    "setting is chosen on validation data with seed 0 among {3e-4, 1e-3, 3e-3, 1e-2, 3e-2} and {3, 6, 15} epochs by",
    "halving (every rate at 3 epochs, the two best at 6, the better of these at 15), the same search for every start,",
    "and reused by the other seeds. New layers without a partner get an update that is zero at first, so that LFT and",
    "LoRA(100) train the same modules; alone, Eq. (3) leaves these layers as they are.",
    "",
    "Seconds are those of the process's CPU time on one thread, since other work ran on the machine beside it; peak",
    "memory is what the process allocated, Python, torch and the benchmark's texts included. Each is taken in a",
    "process of its own, from the loading of the model to the saved adapter: LoRA(full) trains, LoRASuite projects",
    "and then fine-tunes. Imports are not counted. The search for a setting is not part of any row's cost.",
]


def figures(rows: Measured, folder: Path) -> None:
    """Shares by row, and validation scores by learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = rows.cases
    order = [row for row in reversed(ROWS) if row not in ("old", "adapter", "new")]
    figure, axes = plt.subplots(
        1, len(cases), figsize=(3.4 * len(cases) + 3, 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (pair, task) in zip(axes.flat, cases, strict=True):
        for y, row in enumerate(order):
            shares = [100 * v for v in rows.shares(pair, task, row)]
            if not shares:
                continue
            error = statistics.stdev(shares) if len(shares) > 1 else None
            color = "#2b6ca3" if "paper" in row else "#b8860b" if "nothing" in row else "#4d7a4d"
            axis.barh(y, statistics.mean(shares), xerr=error, color=color, height=0.7, error_kw={"capsize": 2})
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(100, color="gray", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(order)), [ROWS[row][0] for row in order], fontsize=8)
        axis.set_title(f"{pair}, {task}", fontsize=10)
        axis.set_xlabel("% of LoRA(full)'s gain")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "reproduce-rows.png", dpi=110)
    plt.close(figure)

    cases = [case for case in cases if rows.get(*case, 0, "few-nothing") or rows.get(*case, 0, "few-paper")]
    figure, axes = plt.subplots(
        1, len(cases) or 1, figsize=(3.6 * (len(cases) or 1), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (pair, task) in zip(axes.flat, cases, strict=False):
        for start, name, color in (("nothing", "LoRA(100)", "#b8860b"), ("paper", "LFT(100)", "#2b6ca3")):
            found = rows.get(pair, task, 0, f"few-{start}")
            settings = found["settings"] if found else []
            for epochs, marker in zip(sorted({e for _, e, _ in settings}), "osD", strict=False):
                tried = sorted((r, v if task == "bible" else 1 - v) for r, e, v in settings if e == epochs)
                line = "-" if len(tried) > 2 else ":"
                axis.plot(*zip(*tried, strict=True), line, marker=marker, color=color, label=f"{name}, {epochs} epochs")
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel(f"{SCORES[task][1]}, validation")
        axis.set_title(f"{pair}, {task}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(folder / "reproduce-rates.png", dpi=110)
    plt.close(figure)


def hours(rows: Measured) -> str:
    """What the stages of this report took, without those that the quality report counts."""
    own = [
        f["stage_cpu_seconds"] for name, f in rows.data.items() if OWN_STAGES.search(name) and "stage_cpu_seconds" in f
    ]
    return f"The word problems, ablations, costs and settings of the paper took {sum(own) / 3600:.1f} CPU hours."


def write(measured: dict[str, Any], expected: Sequence[str], folder: Path | None = None) -> None:
    """The report from the stages measured, or, where there are none, from the committed file."""
    out = folder or REPORTS
    out.mkdir(exist_ok=True)
    if measured:
        kept = {
            name: {key: _rounded(value) for key, value in found.items() if key not in DROPPED}
            for name, found in measured.items()
        }
        (out / DATA).write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
    rows = Measured(json.loads((out / DATA).read_text()))
    figures(rows, out)
    text = report(rows, expected)
    (out / "reproduce.md").write_text(text)
    print(text)
