"""What can be refused at once is refused at once, in one line; what nobody has foreseen ends in one line too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flat_options import given

from lorasuite_fast import ApplyConfig, LoraSuiteError, TransferPlan, migrate
from lorasuite_fast.cli import commands as cli
from lorasuite_fast.distillation.settings import Settings

FOLDERS = ("old-model", "new-model", "adapter")
PROBE = """
import contextlib, io, json, sys
from lorasuite_fast.cli import commands as cli
found = []
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(arguments)
            code = 0
        except SystemExit as end:
            code = end.code
    found.append((code, said.getvalue(), sorted({"torch", "transformers"} & set(sys.modules))))
print(json.dumps(found))
"""
MIGRATE = ("migrate", "old-model", "new-model", "adapter", "out")
REFINE = ("refine", "old-model", "adapter", "new-model", "none", "out")
FINETUNE = ("finetune", "new-model", "adapter", "data.jsonl", "out")
# Arguments -> what the one line must hold
CASES: dict[tuple[str, ...], str] = {
    ("migrate", "old-modle", *MIGRATE[2:]): "OLD model old-modle: no such folder; did you mean old-model?",
    ("migrate", "old-model", "./new-mdoel", "adapter", "out"): "./new-mdoel: no such folder; did you mean new-model?",
    ("migrate", "old-model", "new-model", "adaptr", "out"): "ADAPTER adaptr: no such folder; did you mean adapter?",
    ("migrate", "old-model", "data.jsonl", "adapter", "out"): "expected a folder or a hub id, found a file",
    ("plan", "/nowhere/old", "new-model", "p"): "OLD model /nowhere/old: no such folder",
    ("plan", "old-model", "new-model", "p", "--calibration", "dta.jsonl"): "no such file; did you mean data.jsonl?",
    ("apply", "old.pln", "adapter", "out"): "PLAN old.pln: no such file; did you mean old.plan?",
    ("inspect", "old.pln"): "PLAN old.pln: no such file; did you mean old.plan?",
    ("apply", "old.plan", "adpter", "out"): "ADAPTER adpter: no such folder; did you mean adapter?",
    ("verify", "old-model", "nwe-model"): "NEW model nwe-model: no such folder; did you mean new-model?",
    ("verify", "old-model", "adaptre", "new-model", "adapter"): "OLD_ADAPTER adaptre: no such folder",
    ("refine", "old-model", "adpater", *REFINE[3:]): "OLD_ADAPTER adpater: no such folder; did you mean adapter?",
    ("finetune", "new-mdel", *FINETUNE[2:]): "MODEL new-mdel: no such folder; did you mean new-model?",
    ("finetune", "new-model", "adapter", "data.json", "out"): "DATA data.json: no such file; did you mean data.jsonl?",
    (*MIGRATE, "--method", "lstsq", "--rank", "4"): "--rank is for distillation",
    (*MIGRATE, "--method", "paper", "--distill-layers", "2"): "--distill-layers is for distillation",
    (*MIGRATE, "--method", "distill", "--heads", "identity"): "--heads is for the methods lstsq and paper",
    (*MIGRATE, "--transfer", "identity", "--ridge", "1e-3"): "--ridge is for a fitted transfer matrix",
    (*MIGRATE, "--fill-share", "0.3"): "--fill-share is for --fill nearest",
    (*MIGRATE, "--finetune-rate", "1e-3"): "--finetune-rate is for the training that --finetune asks for",
    (*MIGRATE, "--finetune-epochs", "3"): "--finetune-epochs is for the training that --finetune asks for",
    (*MIGRATE, "--completion-only"): "--completion-only is for the training that --finetune asks for",
    (*MIGRATE, "--refine", "0", "--refine-text", "data.jsonl"): "--refine-text is for the training that --refine asks",
    (*REFINE, "--text", "data.jsonl", "--text-bytes", "5000"): "--text-bytes is for text the old model writes",
    (*REFINE, "--retain-weight", "0.5"): "--retain-weight is for --retain",
    (*FINETUNE, "--retain-weight", "0.5"): "--retain-weight is for --retain",
    (*FINETUNE, "--steps", "5", "--epochs", "3"): "--epochs is for trainings without --steps",
    (*FINETUNE, "--rank", "8"): "--rank is for a new adapter",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    for name in ("data.jsonl", "old.plan"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_slips_are_told_before_anything_heavy_is_imported(place: Path) -> None:
    given = json.dumps([list(arguments) for arguments in CASES])
    done = subprocess.run([sys.executable, "-c", PROBE, given], capture_output=True, text=True, check=True)
    for (arguments, words), (code, said, heavy) in zip(CASES.items(), json.loads(done.stdout), strict=True):
        assert (code, heavy) == (2, []), (arguments, said)
        assert said.startswith("error: "), arguments
        assert said.count("\n") == 1, arguments
        assert words in said, (arguments, said)
    assert sorted(path.name for path in place.iterdir()) == sorted((*FOLDERS, "data.jsonl", "old.plan"))


def test_a_name_that_may_be_a_hub_id_is_left_to_the_hub(place: Path) -> None:
    from lorasuite_fast.cli.given_paths import check_folder

    for name in ("Qwen/Qwen2.5-3B", "gpt2", "old-model"):
        check_folder("OLD model", name)


def test_a_model_of_the_cache_is_not_taken_for_a_slip(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasuite_fast.cli.given_paths import check_folder

    (place / "cache/models--old-modle").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    check_folder("OLD model", "old-modle")
    with pytest.raises(LoraSuiteError, match="did you mean"):
        check_folder("OLD model", "new-modle")


@pytest.mark.parametrize("command", [MIGRATE, ("plan", "old-model", "new-model", "p"), ("verify", "old-model", "x")])
def test_one_model_twice_is_said(
    command: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "x").symlink_to("old-model")
    given = ["x" if argument == "new-model" else argument for argument in command]
    with pytest.raises(SystemExit):
        cli.main(given)
    assert "note: OLD and NEW are the same model, old-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lstsq", "settings": Settings(rank=4)}, "method lstsq keeps the adapter's rank"),
        ({"method": "paper", "settings": Settings(layers=1)}, "method paper fits no layers"),
        ({"memory": "6"}, r"is 6 bytes, less than any model needs; did you mean 6GB\?"),
        ({"method": "best"}, "method 'best' is not one of"),
        ({"layers": "all"}, "layer mapping 'all' is not one of"),
        ({"fill": "copy"}, "fill 'copy' is not one of"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"finetune_options": {"epochs": 1}}, "finetune_options are for the training"),
        ({"refine": 0, "refine_text": "text.txt"}, "refine_text is for the training"),
    ],
)
def test_python_checks_options_before_it_opens_a_model(options: dict[str, Any], words: str, place: Path) -> None:
    with pytest.raises(LoraSuiteError, match=words):
        migrate("old-model", "new-model", "adapter", "out", **given(migrate, **options))


def test_apply_checks_options_before_it_opens_an_adapter_or_a_model() -> None:
    plan = TransferPlan(None, None, {"method": "lstsq", "device": "cpu"}, {}, {}, {})  # type: ignore[arg-type]
    for call in (lambda: plan.apply("no", "out", old="no", config=ApplyConfig(distill=Settings(rank=2))),
                 lambda: plan.apply_all(["no"], "out", old="no", config=ApplyConfig(text="a.txt"))):  # fmt: skip
        with pytest.raises(LoraSuiteError, match="method lstsq"):
            call()


class Odd(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("error", [ValueError("odd\n\x1b[31m shape"), AssertionError(), KeyError("x"), Odd(),
                                   RecursionError("deep"), RuntimeError("linalg.eigh: failed"),
                                   UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")])  # fmt: skip
@pytest.mark.parametrize("debug", [False, True])
def test_any_exception_is_one_line_and_exit_code_70(
    error: Exception, debug: bool, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lorasuite_fast.pipeline.migrate.migrate", fail)
    with pytest.raises(SystemExit) as end:
        cli.main([*MIGRATE, *(["--debug"] if debug else [])])
    assert end.value.code == 70
    said = capfd.readouterr().err
    assert ("Traceback (most recent call last)" in said) == debug
    last = said.splitlines()[-1]
    assert last.startswith(f"error: unexpected {type(error).__name__}")
    assert last.isprintable()
    assert debug or said.count("\n") == 1


def test_the_other_exit_codes_stay(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, code in (
        (LoraSuiteError("no"), 2),
        (OSError(5, "Input/output error", "file"), 2),
        (MemoryError(), 2),
        (RuntimeError("CUDA out of memory"), 2),
        (KeyboardInterrupt(), 130),
    ):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("lorasuite_fast.pipeline.migrate.migrate", fail)
        with pytest.raises(SystemExit) as end:
            cli.main(list(MIGRATE))
        assert end.value.code == code
        assert "Traceback" not in capfd.readouterr().err
