"""Layers come one by one, in order, bit for bit what the file holds, and every way a file can fail is one error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasuite_fast.errors import LoraSuiteError
from lorasuite_fast.io.phases import memory
from lorasuite_fast.io.tensor_files import TensorFiles
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.loader import _prefetched, _Staged, stream_layers

from planted import save_folder, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
LAYERS = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tiny_model("qwen2", 0, layers=LAYERS), tiny_tokenizer(320), tmp_path / "model")


@pytest.fixture
def sharded(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    target = folder.parent / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="40KB")
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_layers_come_in_order_with_the_bits_of_the_file(
    which: str, mapped: bool, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    expected = stored(path)
    checkpoint = Checkpoint(path, mapped=mapped)
    seen: list[str] = []
    for index, layer in enumerate(stream_layers(checkpoint, CPU)):
        assert layer.index == index
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor, expected[name])
        seen += layer.tensors
    assert sorted(seen) == sorted(n for n in expected if n.startswith("model.layers."))


def test_a_subset_of_layers_and_projections_reads_nothing_else(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for layer in stream_layers(checkpoint, CPU, layers=[3, 1], roles=("q", "down")):
        assert {n.removeprefix(layer.prefix) for n in layer.tensors} == {
            "self_attn.q_proj.weight",
            "self_attn.q_proj.bias",
            "input_layernorm.weight",
            "mlp.down_proj.weight",
        }


def test_a_stored_dtype_is_handed_out_without_a_copy(folder: Path) -> None:
    layer = next(stream_layers(Checkpoint(folder), CPU))
    name = layer.prefix + "self_attn.q_proj.weight"
    assert layer.weight("q", torch.float32).data_ptr() == layer.tensors[name].data_ptr()
    assert layer.weight("q", torch.float64).dtype == torch.float64


def test_the_staging_buffers_hand_out_the_bits_of_the_file(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    expected = stored(sharded)
    plan = [(i, checkpoint.layer_tensors(i)) for i in range(LAYERS)]
    files = checkpoint.tensors
    largest = max(sum(-(-files.entry(n).size // 256) * 256 for n in names) for _, names in plan)
    kept = []
    for layer in _prefetched(checkpoint, CPU, _Staged(files, largest, CPU), plan):
        # Kept beyond their turn: the buffers behind them are used again by then.
        kept += list(layer.tensors.items())
    for name, tensor in kept:
        assert torch.equal(tensor, expected[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_layers_on_a_gpu_have_the_bits_of_the_file(sharded: Path) -> None:
    expected = stored(sharded)
    for layer in stream_layers(Checkpoint(sharded), torch.device("cuda")):
        for name, tensor in layer.tensors.items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), expected[name])


def test_the_next_layer_is_fetched_while_this_one_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = [threading.Event() for _ in range(LAYERS)]
    original = TensorFiles.fetch

    def fetch(self: TensorFiles, names: list[str]) -> None:
        original(self, names)
        fetched[int(names[0].split(".")[2])].set()

    monkeypatch.setattr(TensorFiles, "fetch", fetch)
    for layer in stream_layers(Checkpoint(folder), CPU):
        if layer.index + 1 < LAYERS:
            assert fetched[layer.index + 1].wait(5)
        if layer.index + 2 < LAYERS:
            assert not fetched[layer.index + 2].is_set()


def test_the_resident_set_does_not_grow_with_the_file(tmp_path: Path) -> None:
    big = {f"model.layers.{i}.w": torch.full((8 << 20,), float(i)) for i in range(12)}
    save_file(big, tmp_path / "big.safetensors")
    del big
    files = TensorFiles([tmp_path / "big.safetensors"])
    before = memory()[1]
    for i in range(12):
        name = f"model.layers.{i}.w"
        files.fetch([name])
        assert float(files.view(name).max()) == i
        assert memory()[1] - before < 80 << 20  # two tensors of 32 MiB each, and some
        files.release([name])
    assert memory()[1] - before < 16 << 20


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_rewritten_while_it_is_read_is_refused(folder: Path, mapped: bool) -> None:
    layers = stream_layers(Checkpoint(folder, mapped=mapped), CPU)
    next(layers)
    file = folder / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(LoraSuiteError, match=r"model\.safetensors: changed while it was being read"):
        list(layers)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_cut_off_while_it_is_read_is_refused(folder: Path, mapped: bool) -> None:
    checkpoint = Checkpoint(folder, mapped=mapped)
    checkpoint.tensors.view("model.norm.weight")
    file = folder / "model.safetensors"
    stat = file.stat()
    os.truncate(file, 1000)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(LoraSuiteError, match=r"model\.safetensors"):
        list(stream_layers(checkpoint, CPU))


def test_pages_the_file_no_longer_has_are_an_error_and_not_a_signal(folder: Path) -> None:
    """The check of the size is passed over on purpose, as if the file were cut off between it and the first touch."""
    code = f"""
import os
from lorasuite_fast.io import tensor_files
from lorasuite_fast.models.checkpoint import Checkpoint
files = Checkpoint({str(folder)!r}).tensors
name = max(files.entries, key=lambda n: files.entries[n].start)
files.file(files.entry(name)).map
os.truncate({str(folder / "model.safetensors")!r}, 1000)
calls = []
tensor_files._File.check_unchanged = lambda self: calls.append(1)
try:
    files.fetch([name])
except tensor_files.LoraSuiteError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be read" in done.stdout


def test_a_read_error_of_the_disk_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(LoraSuiteError, match=r"model\.safetensors: cannot be read \(Input/output error\)"):
        list(stream_layers(Checkpoint(folder, mapped=False), CPU))


def test_what_a_layer_holds_is_checked_for_nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoraSuiteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        [layer.weight("up", torch.float32) for layer in stream_layers(Checkpoint(folder), CPU)]


def test_the_command_line_turns_a_bus_error_into_one_line(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1 << 20)}, tmp_path / "w.safetensors")
    code = f"""
import os
from pathlib import Path
from lorasuite_fast.cli.running import running
from lorasuite_fast.io.tensor_files import TensorFiles
with running(True):
    view = TensorFiles([Path({str(tmp_path / "w.safetensors")!r})]).view("w")
    os.truncate({str(tmp_path / "w.safetensors")!r}, 4096)
    print(float(view.sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: a model file was cut off while it was being read")
    assert done.stdout == ""
