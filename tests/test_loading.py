"""What transformers and PEFT say of a folder they cannot read arrives as one line, and nothing else does."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasuite_fast.models.loading import loading, reason

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("loading")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "adapter", targets=["q_proj", "o_proj"], rank=2, alpha=4, seed=0)
    return root


def edited(source: Path, target: Path, file: str, **changes: object) -> Path:
    shutil.copytree(source, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def refusal(*arguments: str | Path) -> str:
    """The one line a command ends with."""
    done = subprocess.run(
        [sys.executable, "-m", "lorasuite_fast", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    # A slow machine prints how far a phase is.
    lines = [line for line in done.stderr.splitlines() if not re.fullmatch(r"[a-z ]+: [\d,]+ of [\d,]+, .*", line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_tokenizer_with_code_of_its_own_says_what_to_pass(root: Path, tmp_path: Path) -> None:
    auto = {"AutoTokenizer": ["code.Mine", None]}
    new = edited(root / "new", tmp_path / "new", "tokenizer_config.json", auto_map=auto, tokenizer_class="Mine")
    (new / "code.py").write_text("raise RuntimeError('ran')\n")
    assert refusal("verify", root / "old", new) == (
        f"error: {new}: its tokenizer cannot be loaded (it has code of its own, which is not run); read that code, and "
        "pass --trust-remote-code if you trust it"
    )


@pytest.mark.parametrize("command", ["verify", "migrate"])
def test_a_config_that_sets_what_cannot_be_set_is_one_line(command: str, root: Path, tmp_path: Path) -> None:
    new = edited(root / "new", tmp_path / "new", "config.json", sub_configs={"a": {}})
    more = [root / "adapter", tmp_path / "out", "--method", "lstsq"] if command == "migrate" else []
    line = refusal(command, root / "old", new, *more)
    assert str(new) in line
    assert "sub_configs" in line
    assert not (tmp_path / "out").exists()


def test_prompt_tuning_is_refused_before_anything_is_printed_of_it(root: Path, tmp_path: Path) -> None:
    prompt = edited(root / "adapter", tmp_path / "prompt", "adapter_config.json", peft_type="PROMPT_TUNING")
    line = refusal("verify", root / "old", prompt, root / "new", root / "adapter")
    assert line == f"error: {prompt}: prompt tuning changes the text, not the model; it cannot be verified"


def test_reasons_are_whole_and_bounded() -> None:
    assert reason(ValueError("a sentence that goes\n  on in a second line")) == (
        "a sentence that goes on in a second line"
    )
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 10_000))) == 401


def test_the_level_of_the_log_is_as_before() -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    with loading("x"):
        assert logger.level == logging.CRITICAL
    assert logger.level == before
