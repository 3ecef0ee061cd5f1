"""How much of an adapter's effect each method carries, on three pairs of models, two domains and three seeds.

    python bench/quality.py                          every stage that is not there yet, then the report
    python bench/quality.py 'demo/*' 'neox/bible/0/*'  only stages that match
    python bench/quality.py --report                 the report from the stages measured so far
    python bench/quality.py --list                   the names of the stages
    python bench/quality.py --restore 'demo/bible/0/lstsq'  adds to what the committed report holds

A stage is one model, adapter or row, `PAIR/DOMAIN/SEED/ROW`; its figures are kept in the work folder. An interrupted
run goes on where it stopped, and several processes may share the folder: each claims the stage it works on. `--restore`
takes the figures of reports/quality.json for stages that are not in the work folder; models and adapters are not in it,
so what can be added are rows of the demo pair, whose models are shipped, and of pairs that are in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo_pair import ALPHA, DEMO, RANK, train_few, with_lora
from demo_text import examples
from pairs import DOMAINS, PAIRS, Lab, Pair, measured
from peft import LoraConfig, get_peft_model
from quality_report import DATA, SEEDS, write
from safetensors.torch import load_file
from transformers.utils import logging

from lorasuite_fast import ApplyConfig, PlanConfig, RefineConfig, migrate, refine, verify
from lorasuite_fast.distillation.settings import Settings
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.families import ATTENTION
from lorasuite_fast.text.calibration import load_examples
from lorasuite_fast.text.self_text import self_written

RATES, EPOCHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3, 6, 15)
TEXT_BYTES = 160_000
"""Of general, domain or self-written text that a closed-form row reads, and of the first two for a refinement."""
STEPS = 300
RETAIN = "-retain"
SHIPPED = 1000
"""More texts than the package has."""
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"roles": ATTENTION},
    "change": {"imitation": 0.0},
    "next": {"imitation": 0.0, "next_token_weight": 0.3},
    "long": {"steps": 2 * STEPS},
    "more": {"steps": 2 * STEPS},
    "kept": {"retain": "shipped"},
}
"""Words in the name of a refined row, and the options of `refine` they change; `more` also reads twice the text."""
MORE = 2
HEADLINE = (
    "paper",
    "distill-general",
    "distill-general-shuffled",
    "distill-self",
    "distill-self-shuffled",
    "refined",
    "refined-shuffled",
)
FURTHER = (
    "lstsq",
    "distill-domain",
    "distill-domain-shuffled",
    *(f"distill-last-{text}{control}" for text in ("general", "self", "domain") for control in ("", "-shuffled")),
    *(f"refined-{text}{control}" for text in ("general", "domain") for control in ("", "-shuffled")),
)


@dataclass(frozen=True)
class Stage:
    """Something to make: its figures lie in `results/NAME.json` once it is there."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[], dict[str, Any]]


class Bench:
    def __init__(self, root: Path) -> None:
        self.lab = Lab(root)
        self.results = root / "results"

    def path(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path(name).read_text())
        return found

    def put(self, name: str, figures: dict[str, Any]) -> dict[str, Any]:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(figures, indent=1))
        temporary.replace(path)
        return figures

    def folder(self, name: str) -> Path:
        """Where the adapter of a stage lies."""
        pair, domain, _, row = name.split("/")
        if pair == "demo" and domain == "bible" and row == "adapter":
            return DEMO / "adapter"
        path = self.lab.root / "adapters" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def claim(self, name: str) -> bool:
        """Whether this process may make a stage; a claim of a process that is gone does not count."""
        path = self.path(name).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            holder = int(path.read_text())
            os.kill(holder, 0)
            return False
        except FileNotFoundError:
            pass
        except (ValueError, ProcessLookupError):
            path.unlink(missing_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.claim")
        temporary.write_text(str(os.getpid()))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def run(self, stages: list[Stage]) -> None:
        """Make stages in their order once what they need is there, beside other processes that do the same."""
        while left := [stage for stage in stages if not self.has(stage.name)]:
            for stage in left:
                if all(self.has(need) for need in stage.needs) and self.claim(stage.name):
                    try:
                        if not self.has(stage.name):
                            self.make(stage)
                    finally:
                        self.path(stage.name).with_suffix(".lock").unlink(missing_ok=True)
                    break
            else:
                time.sleep(2)

    def make(self, stage: Stage) -> None:
        start, start_cpu = time.perf_counter(), time.process_time()
        figures = stage.make()
        total = {
            "stage_seconds": round(time.perf_counter() - start, 1),
            "stage_cpu_seconds": round(time.process_time() - start_cpu, 1),
            "threads": torch.get_num_threads(),
        }
        self.put(stage.name, figures | total)
        shown = {key: figures[key] for key in ("bits", "seconds", "best", "explained_share") if key in figures}
        print(f"{time.strftime('%H:%M:%S')} {stage.name}: {shown} {total['stage_seconds']} s", flush=True)


class Case:
    """One pair, one domain, one seed, and how each of its rows is made."""

    def __init__(self, bench: Bench, pair: Pair, domain: str, seed: int) -> None:
        self.bench, self.lab, self.pair, self.domain, self.seed = bench, bench.lab, pair, domain, seed
        self.prefix = f"{pair.name}/{domain}/{seed}"
        self.shipped = pair.name == "demo" and domain == "bible"
        self.old, self.new = self.lab.model(pair, "old"), self.lab.model(pair, "new")
        self.adapter = bench.folder(self.name("adapter"))

    def name(self, row: str) -> str:
        return f"{self.prefix}/{row}"

    def stage(self, row: str) -> Stage:
        models = (f"{self.pair.name}/old", f"{self.pair.name}/new")
        adapter = (*models, self.name("adapter"))
        first = f"{self.pair.name}/{self.domain}/0"
        if row.startswith("verify-"):
            return Stage(self.name(row), (*adapter, self.name(row[7:])), partial(self.verify, row[7:]))
        if row.startswith("tried-"):
            return Stage(self.name(row), (*models, self.name(f"few-{row[6:]}")), partial(self.tried, row[6:]))
        if row.startswith("few-"):
            start = row[4:].removesuffix(RETAIN)
            needs = (*models,) if start.startswith("nothing") else (*models, self.name(start))
            needs += (f"{first}/{row}",) if self.seed else ()
            return Stage(self.name(row), needs, partial(self.few, row[4:]))
        if row == "adapter":
            return Stage(self.name(row), models, self.adapt_old)
        if row == "full":
            return Stage(self.name(row), (*models, *((f"{first}/full",) if self.seed else ())), self.full)
        if row == "full-again":
            return Stage(self.name(row), models, self.full_again)
        if row in ("text", "text-more"):
            return Stage(self.name(row), adapter, partial(self.write, MORE if row == "text-more" else 1))
        text = (self.name("text-more" if "more" in row else "text"),) if "refined" in row or "self" in row else ()
        return Stage(self.name(row), adapter + text, partial(self.carry, row))

    def score(self, folder: Path) -> dict[str, float]:
        loaded = self.lab.load(self.pair, "new", folder)
        return self.lab.score(self.pair, self.domain, *loaded, only=("domain_test", "general_test"))

    def adapt_old(self) -> dict[str, Any]:
        """The adapter to carry. The demo pair's is shipped."""
        if self.shipped:
            recorded = json.loads((DEMO / "recorded.json").read_text())
            keys = ("seconds", "tokens", "threads")
            return {
                "bits": recorded["bits_per_byte"]["old + adapter"],
                **{k: recorded["adapter"][k] for k in keys},
                "recorded": True,
            }
        recipe = replace(self.pair.adapt, seed=self.pair.adapt.seed + self.seed)
        return self.lab.adapt(self.pair, self.domain, "old", recipe, self.adapter)

    def full(self) -> dict[str, Any]:
        """LoRA on the whole domain text; seed 0 chooses the rate on the validation text."""
        if self.shipped:
            recorded = json.loads((DEMO / "recorded.json").read_text())
            best = recorded["best"]["lora_full"]
            keys = ("rate", "seconds", "cpu_seconds", "tokens", "threads")
            return {
                "bits": recorded["bits_per_byte"]["new + lora_full"],
                **{k: best[k] for k in keys},
                "recorded": True,
            }
        rates = self.pair.full_rates
        if self.seed:
            rates = (self.bench.get(f"{self.pair.name}/{self.domain}/0/full")["rate"],)
        runs = []
        for rate in rates:
            recipe = replace(self.pair.full, rate=rate, seed=self.pair.full.seed + self.seed)
            out = self.bench.folder(self.name("full")).with_name(f"full-{rate:g}")
            runs.append(self.lab.adapt(self.pair, self.domain, "new", recipe, out) | {"rate": rate})
        best = min(runs, key=lambda run: run["bits"]["domain_valid"])
        tried = {f"{run['rate']:g}": run["bits"]["domain_valid"] for run in runs}
        return {**best, "tried": tried}

    def full_again(self) -> dict[str, Any]:
        """LoRA(full) of the demo pair trained anew, for its memory and what another seed gives."""
        recipe = replace(self.pair.full, seed=self.pair.full.seed + self.seed)
        return self.lab.adapt(self.pair, self.domain, "new", recipe, self.bench.folder(self.name("full-again")))

    def write(self, times: int = 1) -> dict[str, Any]:
        """Text the old model writes with its adapter: a number of times the pair's size."""
        with measured() as cost:
            texts = self_written(
                Checkpoint(self.old, "old"),
                self.adapter,
                size=times * self.pair.self_bytes,
                seed=self.seed,
                tokens=256,
                device=torch.device("cpu"),
            )
        return {"texts": texts, **cost}

    def text(self, kind: str, size: int | None = None) -> tuple[list[str], dict[str, Any]]:
        """Texts of a kind, `size` bytes at most, and what writing them cost."""
        if kind in ("self", "more"):
            name, times = ("text", 1) if kind == "self" else ("text-more", MORE)
            written = self.bench.get(self.name(name))
            if "texts" not in written:
                # The report's figures are without them.
                written = self.bench.put(self.name(name), self.write(times) | written)
            texts = written["texts"]
            cost = {key: written[key] for key in ("seconds", "cpu_seconds", "peak_memory") if key in written}
        else:
            documents = self.lab.texts.train("general" if kind == "general" else self.domain)
            texts = examples(documents, TEXT_BYTES, self.seed)
            cost = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory": 0}
        if size is not None:
            taken, held = [], 0
            for text in texts:
                taken.append(text)
                held += len(text.encode())
                if held >= size:
                    break
            texts = taken
        return texts, cost

    def carry(self, row: str) -> dict[str, Any]:
        """A row without labels: its adapter, its bits per byte and what it cost."""
        method, *words = row.split("-")
        control = "shuffled-labels" if "labels" in words else "shuffled" if "shuffled" in words else "none"
        kind = next((word for word in ("general", "self", "domain", "more") if word in words), "self")
        out = self.bench.folder(self.name(row))
        if method == "refined":
            variant = {k: v for word, options in VARIANTS.items() if word in words for k, v in options.items()}
            figures = self.refined(kind, control, variant, out)
        elif method == "distill":
            figures = self.distilled(kind, control, 1 if "last" in words else None, out)
        else:
            with measured() as cost:
                migrate(
                    self.old,
                    self.new,
                    self.adapter,
                    out,
                    plan=PlanConfig(method=method, seed=self.seed),
                    refine=False,
                    overwrite=True,
                )
            figures = cost
        return figures | {"bits": self.score(out)}

    def distilled(self, kind: str, control: str, layers: int | None, out: Path) -> dict[str, Any]:
        texts, writing = self.text(kind, TEXT_BYTES)
        path = out.with_name(f"{out.name}.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = Settings(
            layers=layers, control=control, seed=self.seed, max_tokens=256 if kind == "self" else Settings.max_tokens
        )
        with measured() as cost:
            result = migrate(
                self.old,
                self.new,
                self.adapter,
                out,
                plan=PlanConfig(method="distill", calibration=path, seed=self.seed),
                apply=ApplyConfig(distill=settings),
                refine=False,
                overwrite=True,
            )
        assert result.distilled is not None
        return {
            **cost,
            "writing": writing,
            "text_bytes": sum(len(text.encode()) for text in texts),
            **result.distilled.as_dict(),
        }

    def refined(self, kind: str, control: str, variant: dict[str, Any], out: Path) -> dict[str, Any]:
        texts, writing = self.text(kind)
        with measured() as cost:
            result = refine(
                self.old,
                self.adapter,
                self.new,
                None,
                out,
                config=RefineConfig(
                    text=texts,
                    control=control,
                    seed=self.seed,
                    **({"steps": STEPS, "patience": None, "eval_every": 50} | self.pair.refine | variant),
                ),
                overwrite=True,
            )
        return {
            **cost,
            "writing": writing,
            "text_bytes": result.teacher.bytes,
            "tokens": result.trained_tokens,
            "agreement": result.agreement,
            "chosen_step": result.chosen_step,
            "evaluations": [asdict(e) for e in result.evaluations],
            "teacher": result.teacher.as_dict(),
            "phases": {phase.name: phase.seconds for phase in result.phases},
            "parameters": result.trainable_parameters,
        }

    def few(self, start: str) -> dict[str, Any]:
        """Fine-tuning on 100 labelled samples; seed 0 chooses rate and epochs on the validation text.

        A start that ends in `-retain` also keeps the predictions on the general text shipped with the package.
        """
        if self.seed:
            best = self.bench.get(f"{self.pair.name}/{self.domain}/0/few-{start}")["best"]
            settings = [(best["rate"], best["epochs"])]
            runs = [self.setting(start, *settings[0])]
        else:
            runs = self.search(start)
        best = min(runs, key=lambda run: run["domain_valid"])
        folder = self.bench.folder(self.name(f"few-{start}"))
        source = self.setting_folder(start, best["rate"], best["epochs"])
        if folder.exists():
            folder.unlink()
        folder.symlink_to(source.name, target_is_directory=True)
        keys = ("seconds", "cpu_seconds", "peak_memory", "steps", "tokens")
        return {
            "best": {key: best[key] for key in ("rate", "epochs", "domain_valid")},
            **{key: best[key] for key in keys if key in best},
            "settings": [[run["rate"], run["epochs"], run["domain_valid"]] for run in runs],
            "search_seconds": round(sum(run["seconds"] for run in runs), 1),
            "bits": self.score(folder),
        }

    def search(self, start: str) -> list[dict[str, Any]]:
        """By halving: every rate at the fewest epochs, the two best at more, the better of these at the most.

        With WHOLE_GRID every rate at every number of epochs.
        """
        fewest, more, most = EPOCHS
        runs = {(rate, fewest): self.setting(start, rate, fewest) for rate in RATES}

        def rank(epochs: int) -> list[float]:
            tried = [rate for rate, e in runs if e == epochs]
            return sorted(tried, key=lambda rate: runs[rate, epochs]["domain_valid"])

        for rate in rank(fewest)[:2]:
            runs[rate, more] = self.setting(start, rate, more)
        best = rank(more)[0]
        runs[best, most] = self.setting(start, best, most)
        if self.name(f"few-{start}") in WHOLE_GRID:
            for rate in RATES:
                for epochs in EPOCHS:
                    runs[rate, epochs] = self.setting(start, rate, epochs)
        return list(runs.values())

    def tried(self, start: str) -> dict[str, Any]:
        """What every setting of a search reaches on the test texts: gain against forgetting."""
        found = []
        for rate, epochs, valid in self.bench.get(self.name(f"few-{start}"))["settings"]:
            bits = self.score(self.setting_folder(start, rate, epochs))
            found.append({"rate": rate, "epochs": epochs, "domain_valid": valid, **bits})
        return {"settings": found}

    def setting_folder(self, start: str, rate: float, epochs: int) -> Path:
        return self.bench.folder(self.name(f"few-{start}@{rate:g}x{epochs}"))

    def setting(self, start: str, rate: float, epochs: int) -> dict[str, Any]:
        """One setting of the fine-tuning, and its bits per byte on the validation text."""
        folder = self.setting_folder(start, rate, epochs)
        name = self.name(folder.name)
        if self.bench.has(name):
            return self.bench.get(name)
        model, tokenizer = self.lab.load(self.pair, "new")
        torch.manual_seed(self.seed)
        retain = load_examples(None, SHIPPED, 0) if start.endswith(RETAIN) else ()
        start = start.removesuffix(RETAIN)
        if start == "nothing-mlp":
            model = with_lora(model, str(self.new), (*self.pair.targets, *self.pair.mlp))
        else:
            source = None if start == "nothing" else self.bench.folder(self.name(start))
            model = started(model, self.pair, str(self.new), source)
        samples = self.lab.texts.few(self.pair, self.domain)
        with measured() as cost:
            steps = train_few(model, tokenizer, samples, rate, epochs, self.seed, retain)
        model.save_pretrained(folder)
        tokens = epochs * sum(len(ids) + 1 for ids in tokenizer(samples, add_special_tokens=False)["input_ids"])
        valid = self.lab.score(self.pair, self.domain, model, tokenizer, only=("domain_valid",))
        return self.bench.put(name, {"rate": rate, "epochs": epochs, "steps": steps, "tokens": tokens, **valid, **cost})

    def verify(self, row: str) -> dict[str, Any]:
        """What `verify` tells of a row from the validation text, read as unlabelled text."""
        path = self.lab.root / self.pair.name / f"{self.domain}-unlabelled.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.lab.texts.held_out(self.pair, self.domain)["domain_valid"])
        folder = self.bench.folder(self.name(row))
        if row == "full":
            folder = folder.with_name(f"full-{self.bench.get(self.name('full'))['rate']:g}")
        found = verify(self.old, self.adapter, self.new, folder, text=path, examples=16, bootstrap=100, seed=self.seed)
        assert found.effect is not None
        carried = found.effect.carried
        return {
            "explained_share": carried.explained_share.value,
            "kl_share": carried.kl_share.value,
            "gain_share": carried.gain_share.value,
            "cosine": carried.cosine.value,
            "content_cosine": found.effect.content_cosine.value,
            "size_ratio": found.effect.size_ratio.value,
            "kind": found.kind,
            "seconds": found.seconds,
            "positions": found.facts["positions"],
        }


WHOLE_GRID = tuple(f"demo/bible/0/few-{row}" for row in ("nothing-mlp", "refined", f"refined{RETAIN}"))
"""Rows whose fine-tuning is searched over the whole grid, those of the floors; the others by halving."""


def started(model: Any, pair: Pair, base: str, source: Path | None) -> Any:
    """The new model with a trainable adapter on the pair's modules and those of `source`, whose updates it starts at.

    Modules without an update there start as those of a new adapter do: A random, B zero.
    """
    if source is None:
        return with_lora(model, base, pair.targets)
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    own = config["target_modules"]
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors}
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (name in modules or any(name.endswith(f".{t}") for t in (*pair.targets, *own)))
    }
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(wanted), task_type="CAUSAL_LM")
    )
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        kind = "A" if ".lora_A." in key else "B"
        target = parameters[key.replace(".weight", ".default.weight")]
        with torch.no_grad():
            if kind == "A":
                target[: len(tensor)] = tensor
            else:
                target[:, : tensor.shape[1]] = tensor * (config["lora_alpha"] / config["r"] / (ALPHA / RANK))
    return model


def stages(bench: Bench) -> list[Stage]:
    """Every stage, the most telling first."""
    found: list[Stage] = []
    for pair in PAIRS.values():
        for side in ("new", "old"):
            make = partial(shipped_bits, bench.lab, pair, side) if pair.name == "demo" else None
            found.append(Stage(f"{pair.name}/{side}", (), make or partial(bench.lab.pretrain, pair, side)))

    def add(pair: str, domain: str, seed: int, rows: Iterable[str]) -> None:
        case = Case(bench, PAIRS[pair], domain, seed)
        # Of the demo pair's LoRA(full) the figures are recorded, the adapter is not kept.
        left_out = {stage.name for stage in found} | {f"demo/bible/{seed}/verify-full"}
        found.extend(case.stage(row) for row in rows if case.name(row) not in left_out)

    basis = ("adapter", "full", "text")
    few = ("few-nothing", "few-nothing-mlp", "few-refined", f"few-nothing-mlp{RETAIN}", f"few-refined{RETAIN}")
    few_others, few_once = ("few-paper", "few-distill-self"), ("few-lstsq", "few-distill-last-self")
    demo = ("demo", "bible")
    tiny = [(pair, domain) for domain in DOMAINS for pair in PAIRS if pair != "demo"]
    checked = [f"verify-{row}" for row in ("full", *HEADLINE, *few, *few_others)]
    add(*demo, 0, (*basis, *HEADLINE, *few))
    checked_first = [c for c in checked if c[7:] not in few_others]
    for case in tiny:
        add(*case, 0, (*basis, *HEADLINE, *few))
    for case in (demo, *tiny):
        add(*case, 0, checked_first)
    for seed in SEEDS[1:]:
        for case in tiny:
            if case[1] == "bible":
                add(*case, seed, (*basis, *HEADLINE, *few, *checked_first))
    for case in tiny:
        add(*case, 0, (*few_others, *FURTHER, *(f"verify-{row}" for row in FURTHER)))
    add(*demo, 0, few_others)
    for seed in SEEDS[1:]:
        add(*demo, seed, (*basis, "refined", *few))
        for case in tiny:
            add(*case, seed, (*basis, *HEADLINE, *few, *checked_first))
    for case in (demo, *tiny):
        add(*case, 0, [f"tried-{start}{words}" for start in ("nothing-mlp", "refined") for words in ("", RETAIN)])
    for case in (demo, *tiny):
        add(*case, 0, (*few_others, *checked))
        add(*case, 0, (*FURTHER, *few_once, *(f"verify-{row}" for row in (*FURTHER, *few_once))))
        words = ("kept", "attention", "change", "next", "long", "next-attention", "next-long")
        variants = [f"refined-{w}{c}" for w in words for c in ("", "-shuffled")]
        variants += [f"refined-next-{t}{c}" for t in ("general", "domain") for c in ("", "-shuffled")]
        variants += ["refined-next-shuffled-labels", "refined-next-attention-shuffled-labels"]
        starts = [f"few-refined-{w}" for w in words if w not in ("change", "kept")]
        add(*case, 0, (*variants, *starts, *(f"verify-{row}" for row in (*variants, *starts)), "tried-refined-next"))
    for seed in SEEDS[1:]:
        for case in (*tiny, demo):
            add(*case, seed, (*basis, *HEADLINE, *few, *few_others, *checked))
    for seed in SEEDS[1:]:
        for case in (demo, *tiny):
            rows = ("refined-change", "refined-change-shuffled", "refined-next", "refined-next-shuffled")
            add(*case, seed, (*rows, "few-refined-next", *(f"verify-{row}" for row in (*rows, "few-refined-next"))))
    for seed in SEEDS:
        add(*demo, seed, ("full-again", "text-more", "refined-more", "refined-more-shuffled"))
    add("demo", "code", 0, (*basis, *HEADLINE, *few, *few_others, *checked))
    return found


def with_needs(everything: list[Stage], names: set[str]) -> list[Stage]:
    """The named stages and whatever they need, in order."""
    known = {stage.name: stage for stage in everything}
    waiting = list(names)
    while waiting:
        for need in known[waiting.pop()].needs:
            if need not in names:
                names.add(need)
                waiting.append(need)
    return [stage for stage in known.values() if stage.name in names]


def shipped_bits(lab: Lab, pair: Pair, side: str) -> dict[str, Any]:
    return {"bits": {domain: lab.score(pair, domain, *lab.load(pair, side)) for domain in DOMAINS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="names or patterns (default: all, then the report)")
    parser.add_argument("--work", type=Path, default=Path(".cache/quality"), help="work folder")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--report", action="store_true", help="only the report, from what is measured")
    parser.add_argument("--list", action="store_true", help="the names of the stages, and which are there")
    parser.add_argument("--restore", action="store_true", help="take the figures of the committed report first")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    root = arguments.work.absolute()
    # Text written by a model is kept here, not in the user's cache.
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    bench = Bench(root)
    if arguments.restore:
        for name, figures in json.loads(DATA.read_text()).items():
            if not bench.has(name):
                bench.put(name, figures)
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
        write(bench.results)


if __name__ == "__main__":
    main()
