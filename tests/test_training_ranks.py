"""Two processes train as one does, and end with one error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasuite_fast import FinetuneConfig, LoraSuiteError, RefineConfig, Runtime, finetune, refine
from lorasuite_fast.training.loop import refuse_sharding

from planted import plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

WORDS = ("the", "sea", "and", "rest", "heard", "in", "on", "her", "not", "one", "tree", "seen", "was", "a")
BOTH = """
import json, sys
import torch
from lorasuite_fast import FinetuneConfig, RefineConfig, Runtime, finetune, refine
from lorasuite_fast.io.ranks import Ranks

torch.set_num_threads(1)
arguments = json.loads(sys.argv[1])
runtime = Runtime(dtype="float64", device="cpu")
refined = refine(*arguments["refine"][0], config=RefineConfig(**arguments["refine"][1]), runtime=runtime)
tuned = finetune(*arguments["finetune"][0], config=FinetuneConfig(**arguments["finetune"][1]), runtime=runtime)
ranks = Ranks.join()
if ranks.first:
    found = {"evaluations": [[e.agreement, e.kl, e.next_token, e.retained_kl] for e in refined.evaluations],
             "losses": tuned.losses, "validation": [e.loss for e in tuned.evaluations], "kept": tuned.retained_kl,
             "start": tuned.start_loss}
    print(json.dumps(found))
ranks.leave()
"""


def texts(count: int) -> list[str]:
    picks = torch.randint(len(WORDS), (count, 30), generator=torch.Generator().manual_seed(0))
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    old, tokenizer = tiny_model("llama", 1), tiny_tokenizer(320, seed=1)
    save_folder(old, tokenizer, root / "old")
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "v_proj"], rank=4, alpha=8, seed=0, size=0.6)
    plant(old, tokenizer, d_new=48, layers_new=3, heads_new=6, intermediate_new=64, added_tokens=20, seed=3).save(
        root / "new"
    )
    (root / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)[40:]))
    return root


def calls(root: Path, out: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Batches of an odd number of rows; the last of an epoch has one, which leaves nothing to the second process."""
    shared: dict[str, Any] = {"max_tokens": 48, "retain": str(root / "general.jsonl")}
    records = [{"prompt": text[:20], "completion": text[20:50]} for text in texts(14)]
    where = str(out)
    out.mkdir()
    return {
        "refine": (
            [str(root / "old"), str(root / "adapter"), str(root / "new"), None, f"{where}/refined"],
            shared | {"text": texts(40), "steps": 4, "eval_every": 2, "batch_bytes": 350, "next_token_weight": 0.5},
        ),
        "finetune": (
            [str(root / "old"), str(root / "adapter"), records, f"{where}/tuned"],
            shared | {"batch": 5, "micro_batch": 2, "steps": 4, "validation": 0.2, "save_every": 2},
        ),
    }


def launched(*command: object) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, check=False)


def test_two_processes_train_as_one(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "both.py"
    script.write_text(BOTH)
    done = launched(script, json.dumps(calls(root, tmp_path / "two")))
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    one = calls(root, tmp_path / "one")
    runtime = Runtime(dtype="float64", device="cpu")
    refined = refine(*one["refine"][0], config=RefineConfig(**one["refine"][1]), runtime=runtime)
    tuned = finetune(*one["finetune"][0], config=FinetuneConfig(**one["finetune"][1]), runtime=runtime)
    # Targets and their divergence are float32.
    for e, other in zip(refined.evaluations, two["evaluations"], strict=True):
        figures = (e.agreement, e.kl, e.next_token, e.retained_kl)
        assert [value is None for value in other] == [value is None for value in figures]
        for value, alone in zip(other, figures, strict=True):
            assert value is None or value == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert refined.evaluations[-1].agreement > refined.start_agreement
    assert two["losses"] == pytest.approx(tuned.losses, rel=1e-9)
    assert two["validation"] == pytest.approx([e.loss for e in tuned.evaluations], rel=1e-9)
    assert two["kept"] == pytest.approx(tuned.retained_kl, rel=1e-6)
    assert two["start"] == pytest.approx(tuned.start_loss, rel=1e-12)
    for name, bound in (("refined", 1e-3), ("tuned", 1e-8)):
        a, b = (load_file(tmp_path / n / name / "adapter_model.safetensors") for n in ("one", "two"))
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, rtol=0, atol=bound)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["refined", "tuned"]


def test_where_the_first_process_fails_the_others_say_no_more_than_that(root: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.finetune").mkdir()
    (tmp_path / ".out.finetune/training").mkdir()
    (tmp_path / ".out.finetune/training/run.json").write_text("nothing")
    (tmp_path / "data.json").write_text(json.dumps([{"prompt": "the sea", "completion": "and rest"}]))
    done = launched("-m", "lorasuite_fast", "finetune", root / "old", root / "adapter", tmp_path / "data.json",
                    tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert sum("damaged work" in line for line in errors) == 1, done.stderr
    assert all("damaged work" in line or "another process of this run ended" in line for line in errors)
    assert "Error: " not in done.stderr.partition("torch.distributed.elastic")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_shards_the_model_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuse_sharding()
    monkeypatch.setitem(os.environ, f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(LoraSuiteError, match=f"{name}: training divides batches"):
        refuse_sharding()
