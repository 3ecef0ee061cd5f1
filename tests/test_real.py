"""SmolLM2-135M with an adapter trained on it, carried to a planted upgrade of itself; and two real vocabularies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasuite_fast import PlanConfig, migrate
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.vocabulary import SharedTokens, drop_untrained, shared_tokens, token_bytes
from lorasuite_fast.transfer.embeddings import Stream, fit_transfer

from planted import Planted, plant
from real_models import gemma_tokenizer, smollm2

pytestmark = pytest.mark.real

DOMAIN = Path(__file__).parents[1] / "lorasuite_fast/demo/domain_train.txt"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, BATCH, LENGTH = 10, 2, 128


@dataclass
class Trained:
    root: Path
    model: Any
    ids: torch.Tensor
    """(n, LENGTH) domain text; the last rows were not trained on."""


def keep_attention(adapter: Path, out: Path) -> None:
    """The same adapter without its MLP updates: training a second one would take minutes more."""
    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "self_attn" in k}, out / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": TARGETS[:4]}
    (out / "adapter_config.json").write_text(json.dumps(config))


def train_adapter(model: Any, ids: torch.Tensor, out: Path, targets: list[str]) -> None:
    """A small LoRA adapter by plain AdamW steps."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3)
    for step in range(STEPS):
        rows = ids[step * BATCH : (step + 1) * BATCH]
        loss = tuned(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(out)
    tuned.unload()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("real")
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = DOMAIN.read_text("utf-8")
    ids = torch.tensor(Checkpoint(folder).tokenizer()(text)["input_ids"])
    ids = ids[: (STEPS * BATCH + 4) * LENGTH].view(-1, LENGTH)
    train_adapter(model, ids, root / "all", TARGETS)
    keep_attention(root / "all", root / "attention")
    return Trained(root, model, ids)


@pytest.fixture(scope="module")
def planted(trained: Trained) -> Planted:
    """576 → 640 wide, 30 → 33 layers, 9 → 10 heads, 3 → 10 key/value heads, 1536 → 1792 neurons, another vocabulary."""
    upgrade = plant(
        trained.model,
        Checkpoint(smollm2()).tokenizer(),
        d_new=640,
        layers_new=33,
        heads_new=10,
        intermediate_new=1792,
        added_tokens=2000,
        seed=0,
    )
    upgrade.save(trained.root / "new")
    return upgrade


def logits(model: Any, ids: torch.Tensor, adapter: Path | None) -> torch.Tensor:
    with torch.inference_mode():
        if adapter is None:
            return model(ids).logits
        tuned = PeftModel.from_pretrained(model, adapter)
        result = tuned(ids).logits
        tuned.unload()
        return result


def cross_entropy(values: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> float:
    """Over the tokens both models know: the planted one has more to choose from."""
    place = torch.full((values.shape[-1],), -1)
    place[shared] = torch.arange(len(shared))
    return float(torch.nn.functional.cross_entropy(values[:, :-1, shared].flatten(0, 1), place[ids[:, 1:]].flatten()))


@pytest.mark.parametrize("adapter", ["attention", "all"])
def test_a_trained_adapter_arrives_whole(
    trained: Trained, planted: Planted, adapter: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trained.root
    held = trained.ids[-4:]
    keep = torch.isin(held, planted.shared_old).all(0)
    to_new = torch.full((int(max(planted.token_map)) + 1,), -1)
    to_new[torch.tensor(list(planted.token_map))] = torch.tensor(list(planted.token_map.values()))
    ids_o = held[:, keep]
    ids_n = to_new[ids_o]
    base_o = logits(trained.model, ids_o, None)
    old = logits(trained.model, ids_o, root / adapter)
    change_o = (old - base_o)[..., planted.shared_old].flatten().double()
    base_n = logits(planted.model, ids_n, None)
    entropy_o = [cross_entropy(values, ids_o, planted.shared_old) for values in (base_o, old)]
    lines = [f"{adapter}: cross entropy old {entropy_o[0]:.3f} -> {entropy_o[1]:.3f}"]
    # The published projection is reported beside least squares, on the smaller adapter.
    for method in ("lstsq", "paper") if adapter == "attention" else ("lstsq",):
        out = root / f"{adapter}-{method}"
        result = migrate(smollm2(), root / "new", root / adapter, out, plan=PlanConfig(method=method, examples=16))
        new = logits(planted.model, ids_n, out)
        change_n = (new - base_n)[..., planted.shared_new].flatten().double()
        cosine = float(torch.nn.functional.cosine_similarity(change_o, change_n, dim=0))
        ratio = float(change_n.norm() / change_o.norm())
        entropy_n = [cross_entropy(values, ids_n, planted.shared_new) for values in (base_n, new)]
        lines.append(
            f"  {method}: cosine {cosine:.6f}, size ratio {ratio:.4f}, "
            f"cross entropy new {entropy_n[0]:.3f} -> {entropy_n[1]:.3f}"
        )
        record_property(f"{method} cosine", cosine)
        if method == "lstsq":
            assert result.plan.layers == {j: i for i, j in enumerate(planted.layer_map)}
            assert (result.plan.tensors["W_h"] - planted.Q).abs().max() < 1e-5
            for i, j in enumerate(planted.layer_map):
                match = result.plan.tensors[f"layers.{j}.heads.match"]
                assert match[planted.head_map[i]].tolist() == list(range(len(planted.head_map[i])))
            assert cosine >= 0.9999
            assert ratio == pytest.approx(1, abs=1e-3)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_two_real_vocabularies_share_what_decodes_the_same() -> None:
    old, new = Checkpoint(smollm2()).tokenizer(), gemma_tokenizer()
    shared = shared_tokens(old, new)
    assert len(shared) >= 45_000
    special = {i for key, i in token_bytes(old).items() if not isinstance(key, bytes)}
    pairs = list(zip(shared.old.tolist(), shared.new.tolist(), strict=True))
    different = [(i, j) for i, j in pairs if i not in special and old.decode([i]) != new.decode([j])]
    assert different == []
    assert len(set(shared.new.tolist())) == len(shared)


def test_untrained_rows_of_a_real_embedding_are_ignored() -> None:
    model = Checkpoint(smollm2())
    table = model.tensors.view(model.embedding_name).clone()
    ids = torch.arange(table.shape[0])
    clean = drop_untrained(SharedTokens(ids, ids, identical=True), table, table)
    generator = torch.Generator().manual_seed(0)
    target = table @ torch.linalg.qr(torch.randn(640, 576, generator=generator))[0].T
    spoilt = table.clone()
    spoilt[1000:1400] = 0
    spoilt[2000:2300] = spoilt[2000].clone()
    found = fit_transfer(Stream(spoilt), Stream(target), SharedTokens(ids, ids, identical=True))
    expected = fit_transfer(Stream(table), Stream(target), SharedTokens(ids, ids, identical=True))
    assert found.dropped - clean.dropped == 400 + 299
    assert (found.W_h - expected.W_h).abs().max() < 1e-5
