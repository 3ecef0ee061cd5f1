"""Kinds of adapters beside plain LoRA, merged ones, and what new layers without a partner get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from planted_families import TARGETS, config_of, plant_family, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, TransferPlan, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.adapters.factors import Factors
from lorasuite_fast.cli.app import app
from lorasuite_fast.distillation.streams import updated
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.models.hidden_states import LayerStream, padded
from lorasuite_fast.transfer.magnitude import stored_factors

from planted import Planted, effect, plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Planted]:
    root = tmp_path_factory.mktemp("upgrade")
    model = tiny_model("llama", 0, d=32, layers=3, vocab=420)
    tokenizer = tiny_tokenizer(420)
    planted_ = plant(
        model, tokenizer, d_new=48, layers_new=5, heads_new=6, intermediate_new=80, added_tokens=30, seed=0,
        identity_at=[1, 2],
    )  # fmt: skip
    save_folder(model, tokenizer, root / "old")
    planted_.save(root / "new")
    return root, model, planted_


def with_random_magnitudes(adapter: Path, seed: int) -> None:
    """Multiplies DoRA's magnitudes, which start as the norms of the weights, by 0.6 to 1.4."""
    rng = torch.Generator().manual_seed(seed)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "magnitude" in name:
            tensors[name] = tensor * (0.6 + 0.8 * torch.rand(tensor.shape, generator=rng))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def compare(model: Any, planted_: Planted, adapter: Path, out: Path) -> tuple[float, float]:
    """Cosine and size ratio of the change of the shared tokens' logits, new against old."""
    ids_o, ids_n = planted_.random_ids(4, 24, 0)
    old = effect(model, adapter, ids_o, torch.float32)[..., planted_.shared_old].flatten()
    new = effect(planted_.model, out, ids_n, torch.float32)[..., planted_.shared_new].flatten()
    return float(torch.nn.functional.cosine_similarity(old, new, dim=0)), float(new.norm() / old.norm())


def config(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("fill", ["none", "zero"])
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_arrives_whole_where_outputs_correspond(rslora: bool, fill: str, tmp_path: Path) -> None:
    root, model, tokenizer = tmp_path, tiny_model("llama", 0, d=32, layers=3, vocab=420), tiny_tokenizer(420)
    planted_ = plant(
        model, tokenizer, d_new=48, layers_new=5, heads_new=6, intermediate_new=48, added_tokens=30, seed=0
    )  # fmt: skip
    save_folder(model, tokenizer, root / "old")
    planted_.save(root / "new")
    adapter = random_adapter(
        root / "old", tmp_path / "adapter", targets=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], rank=3,
        alpha=6, seed=1, use_dora=True, rslora=rslora,
    )  # fmt: skip
    with_random_magnitudes(adapter, 2)
    migrate(
        root / "old",
        root / "new",
        adapter,
        tmp_path / "out",
        plan=PlanConfig(examples=48),
        apply=ApplyConfig(fill=fill),
    )
    assert config(tmp_path / "out")["use_dora"]
    cosine, ratio = compare(model, planted_, adapter, tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_dora_arrives_whole_on_fused_weights_and_behind_a_choice_of_channels(family: str, tmp_path: Path) -> None:
    """Of Gemma's planted upgrade every output is one of the old ones, those of o and down included."""
    model = random_model(config_of(family, d=32, layers=2, heads=4, kv_heads=2, head_dim=8, f=48, vocab=420), 0)
    tokenizer = tiny_tokenizer(420)
    shape = {"d_new": 48, "heads_new": 6} if family == "phi3" else {"d_new": 32, "heads_new": 8, "head_dim_new": 8}
    planted_ = plant_family(model, tokenizer, seed=0, layers_new=3, f_new=64, **shape)
    save_folder(model, tokenizer, tmp_path / "old")
    planted_.save(tmp_path / "new")
    attention, mlp = TARGETS[family]
    targets = [*attention, *mlp] if family == "gemma2" else [attention[0], mlp[0]]
    adapter = random_adapter(
        tmp_path / "old", tmp_path / "adapter", targets=targets, rank=3, alpha=6, seed=1, use_dora=True
    )
    with_random_magnitudes(adapter, 2)
    migrate(tmp_path / "old", tmp_path / "new", adapter, tmp_path / "out", plan=PlanConfig(examples=48))
    cosine, ratio = compare(model, planted_, adapter, tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)


def test_dora_on_a_weight_with_rows_of_zeros_is_refused(upgrade: tuple[Path, Any, Planted], tmp_path: Path) -> None:
    """The planted upgrade has more neurons than the old model needs; PEFT would give NaN there."""
    root = upgrade[0]
    adapter = random_adapter(
        root / "old", tmp_path / "adapter", targets=["up_proj"], rank=3, alpha=6, seed=1, use_dora=True
    )
    with pytest.raises(LoraSuiteError, match="rows of zeros"):
        migrate(root / "old", root / "new", adapter, tmp_path / "out", plan=PlanConfig(examples=48))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lstsq", "paper"])
def test_mixed_outputs_get_the_weighted_mean_of_the_old_factors(
    method: str, upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    root = upgrade[0]
    adapter = random_adapter(
        root / "old", tmp_path / "adapter", targets=["o_proj"], rank=3, alpha=6, seed=1, use_dora=True
    )
    with_random_magnitudes(adapter, 2)
    result = migrate(root / "old", root / "new", adapter, tmp_path / "out", plan=PlanConfig(examples=48, method=method))
    old, new, before, after = (
        {name: t.double() for name, t in load_file(file).items()}
        for file in (
            root / "old/model.safetensors", root / "new/model.safetensors", adapter / "adapter_model.safetensors",
            tmp_path / "out/adapter_model.safetensors",
        )
    )  # fmt: skip
    W_h = result.plan.tensors["W_h"].double()

    def adapted(weights: dict[str, Tensor], lora: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
        module = f"model.layers.{layer}.self_attn.o_proj"
        key = f"base_model.model.{module}.lora_"
        dense = weights[f"{module}.weight"] + 2 * lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
        return dense.norm(dim=1), lora[f"{key}magnitude_vector"]

    for j, i in result.plan.layers.items():
        norms, magnitude = adapted(old, before, i)
        factor = magnitude / norms
        norms_n, found = adapted(new, after, j)
        for n in range(0, 48, 7):
            share = W_h[:, n] ** 2 / (W_h[:, n] ** 2).sum()
            assert float(found[n] / norms_n[n]) == pytest.approx(float((share * factor).sum()), rel=1e-4)


def test_dora_on_the_mlp_is_refused_by_the_published_projection(
    upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    root = upgrade[0]
    adapter = random_adapter(
        root / "old", tmp_path / "adapter", targets=["up_proj"], rank=3, alpha=6, seed=1, use_dora=True
    )
    with pytest.raises(LoraSuiteError, match="matches no neurons"):
        migrate(root / "old", root / "new", adapter, tmp_path / "out", plan=PlanConfig(examples=8, method="paper"))


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_streamed_pass_with_dora_equals_peft(family: str, tmp_path: Path) -> None:
    if family == "llama":
        model, targets = tiny_model("llama", 0), [*ATTENTION, *MLP]
    else:
        model = random_model(config_of("phi", d=32, layers=2, heads=4, kv_heads=4, head_dim=8, f=48, vocab=320), 0)
        targets = [*TARGETS["phi"][0], *TARGETS["phi"][1]]
    save_folder(model, tiny_tokenizer(320), tmp_path / "old")
    adapter = random_adapter(
        tmp_path / "old", tmp_path / "adapter", targets=targets, rank=2, alpha=6, seed=0, use_dora=True
    )
    with_random_magnitudes(adapter, 1)
    checkpoint = Checkpoint(tmp_path / "old")
    source = read_adapter(adapter, checkpoint.family, checkpoint.shape, "old")
    rows = torch.arange(3, 27).view(2, 12)
    ids = padded(checkpoint, rows.tolist())
    stream = LayerStream(checkpoint, *ids, device=torch.device("cpu"), dtype=torch.float32)
    for layer in stream:
        here = {role: u for (i, role), u in source.updates.items() if i == layer.index}
        factors = {role: Factors(u.factors.b * u.scale, u.factors.a) for role, u in here.items()}
        scales = {role: stored_factors(checkpoint, layer.index, role, u) for role, u in here.items()}
        with updated(layer.module, checkpoint, factors, scales):
            list(layer.run(stream.hidden))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "old"), adapter).eval()
    found = {}
    last = loaded.base_model.model.model.layers[-1]
    last.register_forward_hook(lambda _, __, out: found.update(states=out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        loaded(rows)
    torch.testing.assert_close(stream.hidden[0], found["states"], rtol=1e-4, atol=1e-4)


def adalora(root: Path, out: Path, *, alpha: int, pruned: bool) -> Path:
    """A random AdaLoRA adapter, saved by PEFT itself."""
    settings = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=5, target_r=3, lora_alpha=alpha, target_modules=[*ATTENTION, *MLP], total_step=10,
        tinit=1, tfinal=1,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "old"), settings)
    rng = torch.Generator().manual_seed(0)
    masks = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * (0.3 if "lora_E" in name else 0.5)
        if "lora_E" in name:
            masks[name.removeprefix("base_model.model.")] = (torch.rand(5, generator=rng) < 0.6).tolist()
    if pruned:
        masks[next(iter(masks))] = [False] * 5
        model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(("alpha", "pruned"), [(8, False), (8, True), (-1, True)])
def test_adalora_becomes_a_plain_lora_of_the_same_effect(
    alpha: int, pruned: bool, upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    root, model, planted_ = upgrade
    adapter = adalora(root, tmp_path / "adapter", alpha=alpha, pruned=pruned)
    migrate(root / "old", root / "new", adapter, tmp_path / "out", plan=PlanConfig(examples=48))
    assert config(tmp_path / "out")["peft_type"] == "LORA"
    assert config(tmp_path / "out")["lora_alpha"] > 0
    cosine, ratio = compare(model, planted_, adapter, tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)
    if pruned:
        ranks = {
            len(t) for name, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "lora_A" in name
        }
        assert len(ranks) > 1


def merged(model_folder: Path, adapters: list[Path], out: Path, kind: str) -> Path:
    """Two adapters merged by PEFT and saved as one."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], adapter_name="b")
    density = {"density": 0.5} if kind == "ties" else {}
    model.add_weighted_adapter(["a", "b"], [0.7, 0.6], "both", combination_type=kind, **density)
    model.save_pretrained(out, selected_adapters=["both"])
    return out / "both"


@pytest.mark.parametrize("kind", ["linear", "cat", "ties"])
def test_merged_adapters_arrive_whole_and_merging_after_is_merging_before(
    kind: str, upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    """The projection is linear, so that only TIES, which votes entry by entry, depends on the order."""
    root, model, planted_ = upgrade
    adapters = [
        random_adapter(root / "old", tmp_path / name, targets=ATTENTION, rank=3, alpha=6, seed=n, size=0.1)
        for n, name in enumerate("ab")
    ]
    before = merged(root / "old", adapters, tmp_path / "before", kind)
    plan = TransferPlan.build(root / "old", root / "new", config=PlanConfig(examples=48, roles=("q", "k", "v", "o")))
    plan.apply(before, tmp_path / "out")
    cosine, ratio = compare(model, planted_, before, tmp_path / "out")
    assert cosine >= 0.9999
    assert ratio == pytest.approx(1, abs=1e-3)
    for adapter in adapters:
        plan.apply(adapter, tmp_path / f"new-{adapter.name}")
    after = merged(root / "new", [tmp_path / "new-a", tmp_path / "new-b"], tmp_path / "after", kind)
    ids = planted_.random_ids(2, 12, 1)[1]
    changes = [effect(planted_.model, folder, ids, torch.float32).flatten() for folder in (tmp_path / "out", after)]
    agreement = float(torch.nn.functional.cosine_similarity(*changes, dim=0))
    assert agreement > (0.9999 if kind == "cat" else 0.3)


@pytest.fixture(scope="module")
def plan(upgrade: tuple[Path, Any, Planted]) -> TransferPlan:
    return TransferPlan.build(upgrade[0] / "old", upgrade[0] / "new", config=PlanConfig(examples=48))


def by_layer(folder: Path) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, rest = name.partition("layers.")[2].partition(".")
        found.setdefault(int(layer), {})[rest] = tensor
    return found


def test_layers_without_a_partner_are_filled_as_asked(
    plan: TransferPlan, upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    root, model, planted_ = upgrade
    adapter = random_adapter(root / "old", tmp_path / "adapter", targets=ATTENTION, rank=3, alpha=6, seed=1)
    found = {}
    for fill in ("none", "zero", "nearest"):
        plan.apply(adapter, tmp_path / fill, config=ApplyConfig(fill=fill, fill_share=0.25))
        found[fill] = by_layer(tmp_path / fill)
    assert sorted(found["none"]) == [0, 3, 4]
    assert config(tmp_path / "none")["layers_to_transform"] == [0, 3, 4]
    for fill in ("zero", "nearest"):
        assert sorted(found[fill]) == [0, 1, 2, 3, 4]
        assert config(tmp_path / fill)["layers_to_transform"] is None
        for j in (0, 3, 4):
            assert all(torch.equal(found[fill][j][name], t) for name, t in found["none"][j].items())
    for j, nearest in ((1, 0), (2, 3)):
        for name, tensor in found["zero"][j].items():
            assert bool(tensor.any()) == ("lora_A" in name)
        for name, tensor in found["nearest"][j].items():
            assert torch.equal(tensor, found["none"][nearest][name] * (0.25 if "lora_B" in name else 1))
    assert compare(model, planted_, adapter, tmp_path / "zero")[0] >= 0.9999
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "new"), tmp_path / "zero",
                                       is_trainable=True)  # fmt: skip
    loaded(torch.tensor([[5, 9, 30]])).logits.square().sum().backward()
    # The planted layer's o is zero, so that only what is added there can learn at first.
    grads = [p.grad for n, p in loaded.named_parameters() if "layers.1.self_attn.o_proj.lora_B" in n]
    assert bool(grads[0].any())


def test_the_command_line_passes_the_share_on(
    plan: TransferPlan, upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    adapter = random_adapter(upgrade[0] / "old", tmp_path / "a", targets=["q_proj"], rank=2, alpha=2, seed=1)
    plan.save(tmp_path / "plan")
    plan.apply(adapter, tmp_path / "python", config=ApplyConfig(fill="nearest", fill_share=0.25))
    asked = ["--fill", "nearest", "--fill-share", "0.25"]
    for arguments in ([str(tmp_path / "one")], ["--out", str(tmp_path / "many")]):
        done = CliRunner().invoke(app, ["apply", str(tmp_path / "plan"), str(adapter), *arguments, *asked])
        assert done.exit_code == 0, done.output
    expected = by_layer(tmp_path / "python")
    for folder in (tmp_path / "one", tmp_path / "many/a"):
        found = by_layer(folder)
        assert all(torch.equal(found[j][name], t) for j in expected for name, t in expected[j].items())


def test_an_unknown_fill_is_refused(plan: TransferPlan, upgrade: tuple[Path, Any, Planted], tmp_path: Path) -> None:
    adapter = random_adapter(upgrade[0] / "old", tmp_path / "a", targets=["q_proj"], rank=1, alpha=1, seed=1)
    with pytest.raises(LoraSuiteError, match="fill 'copy' is not one of none, zero, nearest"):
        plan.apply(adapter, tmp_path / "out", config=ApplyConfig(fill="copy"))
    assert not (tmp_path / "out").exists()


def test_adapters_that_hold_more_than_updates_are_refused(
    plan: TransferPlan, upgrade: tuple[Path, Any, Planted], tmp_path: Path
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "bias": {"bias": "lora_only"},
        "lora_bias": {"lora_bias": True},
    }
    for name, settings in kinds.items():
        adapter = random_adapter(
            upgrade[0] / "old", tmp_path / name, targets=["q_proj"], rank=1, alpha=1, seed=1, **settings
        )
        with pytest.raises(LoraSuiteError, match=name):
            plan.apply(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
