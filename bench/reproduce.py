"""The paper's main table, its learning-rate sweep and its ablations on pairs of small models, with whatever it took.

    python bench/reproduce.py                          every stage that is not there yet, then the report
    python bench/reproduce.py '*/arithmetic/0/*'       only stages that match
    python bench/reproduce.py --report                 the report from the stages measured so far
    python bench/reproduce.py --quick --work FOLDER    a much smaller pair, to check that everything runs
    python bench/reproduce.py --list                   the names of the stages

Models, and adapters and rows on the new domain, are those of the quality report (`bench/quality.py`), whose work folder
is shared; word problems, costs and ablations have a folder of their own. A stage is `PAIR/TASK/SEED/ROW`; an
interrupted run goes on where it stopped, and several processes may share the folders: each claims the stage it works
on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import demo_text
import pairs
import quality
import torch
from demo_pair import ALPHA, DEMO, RANK, Recipe, _samples, train_few
from pairs import PAIRS, Pair, Side, Texts, measured
from quality import Stage, started, with_needs
from reproduce_report import ABLATIONS, FURTHER, PARTS, SEEDS, TASKS, write
from transformers import LlamaConfig
from transformers.utils import logging
from word_problems import Difficulty, Record, exact_match, fixed_answers, problems

from lorasuite_fast import ApplyConfig, FinetuneConfig, PlanConfig, Runtime, finetune, migrate
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.families import ATTENTION

OWN = ("neox", "llama-deep")
PAPER = {"nothing": (3e-4, 3), "paper": (1e-3, 3)}
"""Rate and epochs of the paper: of LoRA on 100 samples, without its warm-up (100 steps, of which there are 21), and of
LFT."""
FEW, VALID, TEST = 100, 200, 500


@dataclass(frozen=True)
class WordProblems:
    """The second task: which problems there are, and how LoRA(full) is trained on them.

    Attributes:
        rate: of LoRA(full) on either model, chosen with one model and one seed.
    """

    difficulty: Difficulty
    train: int
    epochs: int
    rate: float
    valid: int = VALID
    test: int = TEST

    @functools.cached_property
    def splits(self) -> dict[str, list[Record]]:
        """Training, validation and test problems; no problem is in two of them. The first of the first are the few."""
        test = problems(self.test, 1, self.difficulty)
        valid = problems(self.valid, 2, self.difficulty, without=test)
        return {
            "train": problems(self.train, 3, self.difficulty, without=[*test, *valid]),
            "valid": valid,
            "test": test,
        }


WORDS = WordProblems(Difficulty(5), train=5000, epochs=2, rate=3e-3)


class Bench(quality.Bench):
    """Stages of two work folders: `shared` holds the quality report's, `root` all others."""

    def __init__(self, root: Path, shared: Path, words: WordProblems = WORDS, *, quick: bool = False) -> None:
        super().__init__(shared)
        self.root, self.words, self.quick = root, words, quick
        self.results = root / "results"
        if quick:
            self.lab.texts = QuickTexts(shared)

    def holder(self, name: str) -> Path:
        _, *task, row = name.split("/")
        own = task[:1] == ["arithmetic"] or row.startswith(("light-", "cost")) or "ablate-" in row
        return self.root if own else self.lab.root

    def path(self, name: str) -> Path:
        return self.holder(name) / "results" / f"{name}.json"

    def folder(self, name: str) -> Path:
        path = self.holder(name) / "adapters" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def case(self, pair: Pair, task: str, seed: int) -> Case:
        return (Arithmetic if task == "arithmetic" else Case)(self, pair, task, seed)


class Case(quality.Case):
    """One pair, task and seed: the quality report's rows, the paper's own setting, ablations and costs.

    The task is here bits per byte of the new domain.
    """

    bench: Bench

    def stage(self, row: str) -> Stage:
        models = (f"{self.pair.name}/old", f"{self.pair.name}/new")
        kind, _, word = row.partition("-")
        if kind == "light":
            start = () if word == "nothing" else (self.name(word),)
            return Stage(self.name(row), (*models, *start), partial(self.light, word))
        if kind == "ablate":
            return Stage(self.name(row), (self.name("adapter"), self.name("few-paper")), partial(self.ablate, word))
        if kind == "cost":
            needs = ["adapter", "full"]
            if word.endswith("-best"):
                needs.append("few-paper" if word.startswith("lft") else "few-nothing")
            return Stage(self.name(row), tuple(map(self.name, needs)), partial(self.cost, word))
        return super().stage(row)

    def light(self, start: str) -> dict[str, Any]:
        """Fine-tuning on the few samples with the paper's own rate and epochs."""
        rate, epochs = PAPER[start]
        run = self.setting(start, rate, epochs)
        return run | {"bits": self.score(self.setting_folder(start, rate, epochs))}

    def ablate(self, word: str) -> dict[str, Any]:
        """The paper's projection with one choice changed, before and after LFT at the best rate for its epochs."""
        start = f"ablate-{word}"
        out = self.bench.folder(self.name(start))
        settings = self.bench.get(self.name("few-paper"))["settings"]
        epochs = min(e for _, e, _ in settings)
        rate = min((valid, rate) for rate, e, valid in settings if e == epochs)[1]
        migration = self.carried(out, **ABLATIONS[word])
        self.setting(start, rate, epochs)
        return {
            "rate": rate,
            "epochs": epochs,
            "layers": {str(j): i for j, i in migration.plan.layers.items()},
            "before": self.score(out),
            "after": self.score(self.setting_folder(start, rate, epochs)),
        }

    def carried(self, out: Path, **options: Any) -> Any:
        """Eq. (3) of the paper."""
        return migrate(
            self.old,
            self.new,
            self.adapter,
            out,
            plan=PlanConfig(
                method="paper", seed=self.seed, **{name: value for name, value in options.items() if name != "fill"}
            ),
            apply=ApplyConfig(fill=options.get("fill", "none")),
            refine=False,
            overwrite=True,
        )

    def cost(self, part: str) -> dict[str, Any]:
        """Seconds and peak memory of one part, from the adapter to a finished one, in a process of its own."""
        options = ["--work", self.bench.root, "--shared", self.bench.lab.root, *["--quick"] * self.bench.quick]
        command = [sys.executable, __file__, "--cost", self.name(part), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name(part)}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def measured_part(self, part: str) -> dict[str, Any]:
        self.prepare()
        with tempfile.TemporaryDirectory(dir=self.bench.root) as name, measured() as cost:
            begin = time.process_time()
            self.part(part, Path(name))
            cost["cpu_seconds"] = round(time.process_time() - begin, 2)
        return cost

    def prepare(self) -> None:
        """Read what the benchmark holds in memory, which is no cost of a part."""
        self.lab.texts.few(self.pair, self.domain)

    def part(self, part: str, out: Path) -> None:
        """A part of PARTS: LoRA(full), Eq. (3), or LoRA(100) or LFT(100) in the paper's or the best setting."""
        if part == "full":
            self.train_full(out / "full")
            return
        start, source = "nothing", None
        if part.startswith(("carry", "lft")):
            start, source = "paper", out / "paper"
            self.carried(source)
        if part != "carry":
            rate, epochs = PAPER[start]
            if part.endswith("best"):
                best = self.bench.get(self.name(f"few-{start}"))["best"]
                rate, epochs = best["rate"], best["epochs"]
            self.tuned(source, rate, epochs, out / "tuned")

    def train_full(self, out: Path) -> None:
        recipe = replace(self.pair.full, rate=self.bench.get(self.name("full"))["rate"])
        self.lab.adapt(self.pair, self.domain, "new", recipe, out, only=())

    def tuned(self, source: Path | None, rate: float, epochs: int, out: Path) -> None:
        model, tokenizer = self.lab.load(self.pair, "new")
        torch.manual_seed(self.seed)
        model = started(model, self.pair, str(self.new), source)
        train_few(model, tokenizer, self.lab.texts.few(self.pair, self.domain), rate, epochs, self.seed)
        model.save_pretrained(out)


class Arithmetic(Case):
    """Exact match on word problems: adapters on every projection, trained by `finetune` throughout.

    New layers without a partner get an update that does nothing yet, as LoRA(100) has in every layer: both train the
    same modules. The figure the search minimises, `domain_valid`, is the share of wrong answers on the validation
    problems.
    """

    @property
    def splits(self) -> dict[str, list[Record]]:
        return self.bench.words.splits

    def stage(self, row: str) -> Stage:
        if row in ("old", "new"):
            return Stage(self.name(row), (f"{self.pair.name}/{row}",), partial(self.bare, row))
        if row == "full":
            return Stage(self.name(row), (f"{self.pair.name}/new",), self.full)
        return super().stage(row)

    def prepare(self) -> None:
        self.splits  # noqa: B018

    def match(self, side: str, folder: Path | None, split: str = "test") -> float:
        return round(exact_match(*self.lab.load(self.pair, side, folder), self.splits[split]), 4)

    def score(self, folder: Path) -> dict[str, float]:
        return {"exact_match": self.match("new", folder)}

    def bare(self, side: str) -> dict[str, Any]:
        return {"bits": {"exact_match": self.match(side, None)}}

    def adapt_old(self) -> dict[str, Any]:
        cost = self.trained(self.old, self.adapter, seed=100 + self.seed)
        return cost | {"bits": {"exact_match": self.match("old", self.adapter)}}

    def full(self) -> dict[str, Any]:
        folder = self.bench.folder(self.name("full"))
        cost = self.trained(self.new, folder, seed=200 + self.seed)
        return cost | {"bits": self.score(folder)}

    def train_full(self, out: Path) -> None:
        self.trained(self.new, out, seed=200 + self.seed)

    def trained(self, model: Path, out: Path, *, seed: int) -> dict[str, Any]:
        """An adapter from zero on all training problems."""
        words = self.bench.words
        with measured() as cost:
            begin = time.process_time()
            tuned = self.finetune(None, self.splits["train"], out, words.rate, words.epochs, seed, model)
            cost["cpu_seconds"] = round(time.process_time() - begin, 2)
        return {"rate": words.rate, "epochs": words.epochs, "tokens": tuned.trained_tokens, **cost}

    def carried(self, out: Path, **options: Any) -> Any:
        return super().carried(out, **{"fill": "zero", **options})

    def carry(self, row: str) -> dict[str, Any]:
        out = self.bench.folder(self.name(row))
        if row != "paper":
            raise ValueError(f"row {row!r}: only `paper` is measured on word problems")
        with measured() as cost:
            self.carried(out)
        return cost | {"bits": self.score(out)}

    def setting(self, start: str, rate: float, epochs: int) -> dict[str, Any]:
        folder = self.setting_folder(start, rate, epochs)
        name = self.name(folder.name)
        if self.bench.has(name):
            return self.bench.get(name)
        source = None if start == "nothing" else self.bench.folder(self.name(start))
        with measured() as cost:
            tuned = self.finetune(source, self.few_samples, folder, rate, epochs, self.seed)
        return self.bench.put(
            name,
            {
                "rate": rate,
                "epochs": epochs,
                "steps": tuned.steps,
                "tokens": tuned.trained_tokens,
                "diverged": tuned.diverged,
                "domain_valid": round(1 - self.match("new", folder, "valid"), 4),
                **cost,
            },
        )

    @property
    def few_samples(self) -> list[Record]:
        return self.splits["train"][: 16 if self.bench.quick else FEW]

    def tuned(self, source: Path | None, rate: float, epochs: int, out: Path) -> None:
        self.finetune(source, self.few_samples, out, rate, epochs, self.seed)

    def finetune(
        self,
        source: Path | None,
        samples: list[Record],
        out: Path,
        rate: float,
        epochs: int,
        seed: int,
        model: Path | None = None,
    ) -> Any:
        new: dict[str, Any] = {}
        if source is None:
            family = Checkpoint(model or self.new, "model").family
            new = {"rank": RANK, "alpha": ALPHA, "roles": family.roles}
        return finetune(
            model or self.new,
            source,
            samples,
            out,
            config=FinetuneConfig(
                learning_rate=rate, epochs=epochs, completion_only=True, save_every=10**6, seed=seed, **new
            ),
            runtime=Runtime(device="cpu"),
            overwrite=True,
        )


class QuickTexts(Texts):
    """The demo pair's shipped texts, for a run that checks the plumbing."""

    @functools.cached_property
    def demo(self) -> dict[str, Any]:
        def read(name: str) -> list[demo_text.Document]:
            return [part.split("\n") for part in (DEMO / f"{name}.txt").read_text().split("\n\n") if part.strip()]

        test = (DEMO / "domain_test.txt").read_text()
        return {
            "general": {"train": read("general_test"), "test": (DEMO / "general_test.txt").read_text()[:2000]},
            "domain": {"train": read("domain_train"), "valid": test[:1500], "test": test[-2000:]},
        }

    @functools.cached_property
    def code(self) -> dict[str, Any]:
        return {"train": [], **{name: self.demo["domain"][name] for name in ("valid", "test")}}

    def few(self, pair: Pair, domain: str) -> list[str]:
        samples = [sample for document in self.train(domain) for sample in _samples(document, pair.sample)]
        return random.Random(0).sample(samples, 16)


def quick_pair() -> Pair:
    def side(d: int, layers: int, heads: int, seed: int) -> Side:
        recipe = Recipe(rate=4e-3, steps=20, batch=4, seed=seed, warm_up=2, weight_decay=0.1)
        sizes = pairs._llama(400 + d, d, 2 * d, layers, heads, heads, 8)
        return Side(LlamaConfig, sizes, demo_text.byte_level_tokenizer, recipe)

    full = Recipe(rate=1e-2, steps=10, batch=4, seed=1, warm_up=1)
    return Pair(
        "quick", {"old": side(16, 3, 2, 1), "new": side(24, 2, 3, 2)}, ATTENTION_MODULES, full, full, (1e-2,),
        (1500, 2000, 2000), 160, 2000, {"steps": 2},
    )  # fmt: skip


ATTENTION_MODULES = tuple(f"{role}_proj" for role in ATTENTION)
QUICK_WORDS = WordProblems(Difficulty(3), train=64, epochs=1, rate=3e-3, valid=20, test=30)


def stages(bench: Bench) -> list[Stage]:
    """Every stage, the most telling first."""
    chosen = [quick_pair()] if bench.quick else [PAIRS[name] for name in OWN]
    found = {
        f"{pair.name}/{side}": Stage(f"{pair.name}/{side}", (), partial(bench.lab.pretrain, pair, side))
        for pair in chosen
        for side in ("new", "old")
    }

    def add(pair: Pair, task: str, seed: int, rows: Iterable[str]) -> None:
        case = bench.case(pair, task, seed)
        for row in rows:
            found.setdefault(case.name(row), case.stage(row))

    table = ("adapter", "full", "paper", "few-nothing", "few-paper", "light-paper", "light-nothing")
    if bench.quick:
        for task in TASKS:
            add(chosen[0], task, 0, (*(("old", "new") if task == "arithmetic" else ()), *table))
        add(chosen[0], "bible", 0, ("cost-lft",))
        add(chosen[0], "arithmetic", 0, ("ablate-base", "ablate-layers-first"))
        return list(found.values())
    for pair in chosen:
        add(pair, "arithmetic", 0, ("old", "new", *table))
    for task in reversed(TASKS):
        for pair in chosen:
            add(pair, task, 0, [f"cost-{part}" for part in PARTS if not part.endswith("-best")])
    for pair in chosen:
        add(pair, "bible", 0, table)
    for seed in SEEDS[1:]:
        for pair in chosen:
            add(pair, "arithmetic", seed, table)
    for task in reversed(TASKS):
        for pair in chosen:
            add(pair, task, 0, [f"ablate-{word}" for word in ABLATIONS])
            add(pair, task, 0, [f"cost-{part}" for part in PARTS])
    for seed in SEEDS:
        for pair in chosen:
            add(pair, "bible", seed, (*table, "text", *FURTHER))
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="names or patterns (default: all, then the report)")
    parser.add_argument("--work", type=Path, default=Path(".cache/reproduce"), help="work folder")
    parser.add_argument("--shared", type=Path, default=None, help="the quality report's (default: .cache/quality)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a much smaller pair; the report goes to the work folder")
    parser.add_argument("--report", action="store_true", help="only the report, from what is measured")
    parser.add_argument("--list", action="store_true", help="the names of the stages, and which are there")
    parser.add_argument("--cost", metavar="PART", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    root = arguments.work.absolute()
    shared = (arguments.shared or (root / "shared" if arguments.quick else Path(".cache/quality"))).absolute()
    # Text written by a model is kept here, not in the user's cache.
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
    bench = Bench(root, shared, QUICK_WORDS if arguments.quick else WORDS, quick=arguments.quick)
    root.mkdir(parents=True, exist_ok=True)
    if arguments.quick:
        quality.RATES, quality.EPOCHS = (1e-3,), (1, 2, 3)
    if arguments.cost:
        name, task, seed, part = arguments.cost.split("/")
        pair = quick_pair() if arguments.quick else PAIRS[name]
        print(json.dumps(bench.case(pair, task, int(seed)).measured_part(part)))
        return
    everything = stages(bench)
    patterns = arguments.stages or ["*"]
    wanted = with_needs(everything, {s.name for s in everything if any(fnmatchcase(s.name, p) for p in patterns)})
    if arguments.list:
        for stage in wanted:
            print("there  " if bench.has(stage.name) else "missing", stage.name)
        return
    if not arguments.report:
        bench.run(wanted)
    if arguments.report or not arguments.stages:
        measured_stages = {stage.name: bench.get(stage.name) for stage in everything if bench.has(stage.name)}
        measured_stages["fixed answers"] = {"exact_match": fixed_answers(bench.words.splits["test"])}
        write(measured_stages, [stage.name for stage in everything], root if arguments.quick else None)


if __name__ == "__main__":
    main()
