"""Distillation in closed form: the streamed fit is the dense one, and what it hands out says how good it is."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import given
from peft import PeftModel
from planted_families import config_of, random_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorasuite_fast import ApplyConfig, LoraSuiteError, PlanConfig, TransferPlan, migrate
from lorasuite_fast.adapters.adapter import read_adapter
from lorasuite_fast.adapters.factors import Factors
from lorasuite_fast.distillation import scores
from lorasuite_fast.distillation.distill import distill
from lorasuite_fast.distillation.regression import in_front_of_norm, reduced_rank_ridge
from lorasuite_fast.distillation.settings import Distilled, Settings
from lorasuite_fast.distillation.streams import updated
from lorasuite_fast.io.phases import PhaseClock
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.text.alignment import Alignment
from lorasuite_fast.text.calibration import load_examples
from lorasuite_fast.text.self_text import self_written

from planted import Planted, effect, plant, random_adapter, save_folder, tiny_model, tiny_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RIDGE, RANK, MAX_TOKENS = 1e-2, 4, 64


@dataclass
class Pair:
    root: Path
    planted: Planted | None = None
    model: Any = None

    def distil(self, settings: Settings, texts: list[str] | None = None) -> Distilled:
        old, new = Checkpoint(self.root / "old", "old"), Checkpoint(self.root / "new", "new")
        source = read_adapter(self.root / "adapter", old.family, old.shape, old.name)
        return distill(
            old,
            new,
            source,
            (old.tokenizer(), new.tokenizer()),
            load_examples(None, 72, 0) if texts is None else texts,
            replace(settings, max_tokens=MAX_TOKENS),
            PhaseClock(),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )


def make_planted(root: Path) -> Pair:
    model = tiny_model("llama", 0, d=32, layers=3, vocab=420)
    tokenizer = tiny_tokenizer(420)
    planted = plant(
        model,
        tokenizer,
        d_new=48,
        layers_new=4,
        heads_new=6,
        intermediate_new=80,
        added_tokens=30,
        seed=0,
        identity_at=[1],
    )
    save_folder(model, tokenizer, root / "old")
    planted.save(root / "new")
    random_adapter(root / "old", root / "adapter", targets=ATTENTION, rank=RANK, alpha=8, seed=0, size=0.3)
    return Pair(root, planted, model)


def make_unrelated(root: Path, family: str = "llama") -> Pair:
    """A Llama, and an unrelated model of a family."""
    if family == "llama":
        new = tiny_model("llama", 1, d=48, layers=4, vocab=480)
    else:
        kv_heads = 4 if family == "gpt_neox" else 2
        sizes = {"d": 48, "layers": 4, "heads": 4, "kv_heads": kv_heads, "head_dim": 12, "f": 48, "vocab": 480}
        new = random_model(config_of(family, **sizes), 1)
    save_folder(tiny_model("llama", 0, d=32, layers=3, vocab=420), tiny_tokenizer(420), root / "old")
    save_folder(new, tiny_tokenizer(480), root / "new")
    random_adapter(root / "old", root / "adapter", targets=ATTENTION, rank=RANK, alpha=8, seed=0, size=0.3)
    return Pair(root)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_unrelated(tmp_path_factory.mktemp("unrelated"))


def dense_reduced_rank(x: Tensor, t: Tensor, rank: int, ridge: float, root: Tensor) -> Tensor:
    """B A (d_out, d_in) from all positions at once: augmented least squares, then an SVD of the fitted values.

    `root` is L of the metric L^T L.
    """
    shrink = (ridge * x.square().sum() / x.shape[1]).sqrt()
    rows = torch.cat([x, shrink * torch.eye(x.shape[1], dtype=x.dtype)])
    wanted = torch.cat([t, torch.zeros(x.shape[1], t.shape[1], dtype=t.dtype)])
    W = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    V = torch.linalg.svd(x @ W.T @ root.T, full_matrices=False)[2][:rank].T
    return torch.linalg.solve(root, V @ V.T @ root @ W)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("with_metric", [False, True])
def test_the_regression_equals_a_dense_svd(with_metric: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=rng, dtype=torch.float64) @ torch.randn(24, 24, generator=rng).double()
    t = x @ torch.randn(24, 10, generator=rng).double() + torch.randn(300, 10, generator=rng).double()
    half = torch.randn(40, 10, generator=rng).double()
    metric = half.T @ half
    ridged = metric + 1e-3 * metric.diagonal().mean() * torch.eye(10)
    root = torch.linalg.cholesky(ridged).T if with_metric else torch.eye(10, dtype=torch.float64)
    found = reduced_rank_ridge(x.T @ x, t.T @ x, 3, RIDGE, metric if with_metric else None)
    assert found.b.shape == (10, 3)
    assert found.a.shape == (3, 24)
    assert relative(found.b @ found.a, dense_reduced_rank(x, t, 3, RIDGE, root)) < 1e-5


def uneven_gain(d: int) -> Tensor:
    """(d,) float64 from 0.001 to 1000, one of them negative and one 0, as norms behind projections have them."""
    gain = 10 ** torch.linspace(-3, 3, d, dtype=torch.float64)
    gain[1], gain[2] = -gain[1], 0
    return gain


def test_a_change_in_front_of_a_norm_is_the_penalised_least_squares_one() -> None:
    torch.manual_seed(0)
    d, n, penalty = 12, 5, 0.1
    root, gain, t = torch.randn(20, d).double(), uneven_gain(12), torch.randn(n, d).double()
    share = penalty * (root * gain).square().sum(0).mean()
    stacked = torch.cat([root * gain, share.sqrt() * torch.eye(d, dtype=torch.float64)])
    wanted = torch.cat([root @ t.T, torch.zeros(d, n, dtype=torch.float64)])
    P, _ = in_front_of_norm(root.T @ root, gain, penalty)
    torch.testing.assert_close(P @ t.T, torch.linalg.lstsq(stacked, wanted).solution)


def test_the_metric_in_front_of_a_norm_orders_changes_as_the_penalised_error_does() -> None:
    torch.manual_seed(0)
    d, penalty = 12, 0.1
    root, gain = torch.randn(20, d).double(), uneven_gain(12)
    t, u, v = torch.randn(3, d).double().unbind()
    share = penalty * (root * gain).square().sum(0).mean()

    def error(change: Tensor) -> Tensor:
        return (root @ (t - gain * change)).square().sum() + share * change.square().sum()

    P, N = in_front_of_norm(root.T @ root, gain, penalty)
    rest_u, rest_v = u - P @ t, v - P @ t
    torch.testing.assert_close(rest_u @ N @ rest_u - rest_v @ N @ rest_v, error(u) - error(v))


def test_an_update_in_front_of_a_norm_with_tiny_gains_leaves_the_projection_audible() -> None:
    """Divided by the gains, the target would be a thousand times what the projection says."""
    torch.manual_seed(0)
    d = 12
    x, gain = torch.randn(400, d).double(), uneven_gain(12)
    t = x @ torch.randn(d, d).double() * gain.abs().mean() / d
    M = torch.eye(d, dtype=torch.float64)
    P, N = in_front_of_norm(M, gain)
    fitted = reduced_rank_ridge(x.T @ x, P @ t.T @ x, d, 1e-6, N)
    u = x @ fitted.a.T.double() @ fitted.b.T.double()
    assert u.square().mean().sqrt() < 1
    assert (t - u * gain).square().sum() < t.square().sum()


@dataclass(frozen=True)
class Parts:
    """Where a family's new model keeps what its dense fit needs; modules named inside a layer."""

    backbone: str = "model"
    norm: str = "norm"
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    after: tuple[str, str] | None = None
    offset: float = 0.0
    centred: bool = False


PARTS = {
    "llama": Parts(),
    "gemma2": Parts(after=("post_attention_layernorm", "post_feedforward_layernorm"), offset=1.0),
    "gpt_neox": Parts("gpt_neox", "final_layer_norm", "attention.dense", "mlp.dense_4h_to_h", centred=True),
}


def held_out_r2(x: Tensor, y: Tensor, w: Tensor) -> float:
    """Of the weighted ridge map from x to y, on every 20th row, fitted on the others."""
    held = torch.zeros(len(w), dtype=torch.bool)
    held[19::20] = True
    gram = x[~held].T @ (w[~held, None] * x[~held])
    gram = gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    error = y[held] - x[held] @ torch.linalg.inv(gram) @ x[~held].T @ (w[~held, None] * y[~held])
    return float(1 - (w[held] @ error.square()).sum() / (w[held] @ y[held].square()).sum())


class Dense:
    """Everything the last layer's fit needs, from whole transformers models in float64, all positions in memory."""

    def __init__(self, root: Path) -> None:
        old, new = Checkpoint(root / "old", "old"), Checkpoint(root / "new", "new")
        texts = load_examples(None, 40, 0)
        random.Random(0).shuffle(texts)
        alignment = Alignment(old.tokenizer(), new.tokenizer())
        self.aligned = alignment.align_all(texts, MAX_TOKENS)
        self.tokens = alignment.ordinary
        self.old, self.new = (
            AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float64).eval() for name in ("old", "new")
        )
        self.adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(root / "old", dtype=torch.float64), root / "adapter"
        ).to(torch.float64)
        self.parts = PARTS[new.family.model_type]

    @torch.no_grad()
    def read(self, model: Any, side: str, modules: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """At the aligned positions of all texts: the state behind the last layer, what the head reads, and the inputs
        of the named modules and, under "from " and their name, their outputs."""
        parts = self.parts if side == "new" else PARTS["llama"]
        backbone = model.get_submodule("base_model.model.model" if side == "adapted" else parts.backbone)
        kept: dict[str, list[Tensor]] = {
            name: [] for name in ("state", "last", *modules, *(f"from {m}" for m in modules))
        }
        seen: dict[str, Tensor] = {}
        norm = backbone.get_submodule(parts.norm)
        handles = [norm.register_forward_pre_hook(lambda _, i: seen.update(state=i[0]))]
        for name in modules:
            module = backbone.get_submodule(name)
            handles.append(
                module.register_forward_hook(lambda _, i, o, name=name: seen.update({name: i[0], f"from {name}": o}))
            )
        for text in self.aligned:
            new = side == "new"
            ids, at = (text.ids_n, text.positions_n) if new else (text.ids_o, text.positions_o)
            seen["last"] = backbone(torch.tensor([ids])).last_hidden_state
            for name, rows in kept.items():
                rows.append(seen[name][0, at])
        for handle in handles:
            handle.remove()
        return {name: torch.cat(rows) for name, rows in kept.items()}

    @property
    def held(self) -> Tensor:
        return torch.cat([torch.full((len(a.ends),), n % 10 == 9) for n, a in enumerate(self.aligned)])

    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """The target at every position, the new model's state behind its last layer, and the metric."""
        held = self.held
        before, after = self.read(self.old, "old")["last"], self.read(self.adapted, "adapted")["last"]
        rows_o = self.old.lm_head.weight.detach()[self.tokens.old]
        backbone, parts = self.new.get_submodule(self.parts.backbone), self.parts
        gain = backbone.get_submodule(parts.norm).weight.detach() + parts.offset
        rows_n = (self.new.get_output_embeddings().weight.detach() * gain)[self.tokens.new]
        if parts.centred:
            rows_n = rows_n - rows_n.mean(1, keepdim=True)
        w = sum((x[~held] @ rows_o.T).softmax(-1).sum(0) for x in (before, after))
        w = w / w.sum()
        rows_o, rows_n = rows_o - w @ rows_o, rows_n - w @ rows_n
        self.output_r2 = held_out_r2(rows_n, rows_o, w)
        metric = rows_n.T @ (w[:, None] * rows_n)
        eye = torch.eye(len(metric), dtype=torch.float64)
        U = torch.linalg.inv(metric + 1e-2 * metric.diagonal().mean() * eye) @ rows_n.T @ (w[:, None] * rows_o)
        base = self.read(self.new, "new")["state"]
        eps = self.new.config.layer_norm_eps if parts.centred else self.new.config.rms_norm_eps
        spread = base.var(-1, correction=0, keepdim=True) if parts.centred else base.square().mean(-1, keepdim=True)
        return (spread + eps).sqrt() * ((after - before) @ U.T), base, metric

    def behind_norm(self, layer: str, norm: str, metric: Tensor) -> tuple[Tensor, Tensor]:
        """P and N of a projection that a norm follows: what to ask of it for a change behind the norm."""
        backbone = self.new.get_submodule(self.parts.backbone)
        gain = backbone.get_submodule(f"{layer}.{norm}").weight.detach() + self.parts.offset
        G = torch.diag(gain)
        N = G @ metric @ G
        N = N + 0.1 * N.diagonal().mean() * torch.eye(len(N), dtype=torch.float64)
        return torch.linalg.inv(N) @ G @ metric, N

    def updates(self) -> dict[str, Tensor]:
        """B A of the last new layer's output projections."""
        held, parts = self.held, self.parts
        target, base, output_metric = self.target()
        backbone = self.new.get_submodule(parts.backbone)
        layer = f"layers.{self.new.config.num_hidden_layers - 1}"
        found: dict[str, Tensor] = {}
        for n, (role, inside) in enumerate((("o", parts.o), ("down", parts.down))):
            name, metric = f"{layer}.{inside}", output_metric
            now = self.read(self.new, "new", (name,))
            x, left = now[name], target - (now["state"] - base)
            if parts.after:
                x = x / (now[f"from {name}"].square().mean(-1, keepdim=True) + self.new.config.rms_norm_eps).sqrt()
                P, metric = self.behind_norm(layer, parts.after[n], metric)
                left = left @ P.T
            root = torch.linalg.cholesky(metric + 1e-3 * metric.diagonal().mean() * torch.eye(len(metric))).T
            found[role] = dense_reduced_rank(x[~held], left[~held], RANK, RIDGE, root)
            with torch.no_grad():
                backbone.get_submodule(name).weight += found[role]
        return found


@pytest.mark.parametrize("family", PARTS)
def test_the_streamed_fit_equals_a_dense_float64_one(family: str, unrelated: Pair, tmp_path: Path) -> None:
    """Also through the norms behind the projections of Gemma 2, and those of GPT-NeoX, which centre."""
    pair = unrelated if family == "llama" else make_unrelated(tmp_path, family)
    # So few that every position counts for the tokens' weights; with more they are taken from a sample.
    found = pair.distil(Settings(layers=1, micro_batch=7), load_examples(None, 40, 0))
    assert found.positions - found.held_positions <= 4096
    dense = Dense(pair.root)
    wanted = dense.updates()
    assert found.output_r2 == pytest.approx(dense.output_r2, abs=1e-4)
    assert set(found.fitted) == {(3, "o"), (3, "down")}
    for role, update in wanted.items():
        factors = found.fitted[3, role]
        assert relative(factors.b @ factors.a, update) < 1e-4


def test_one_micro_batch_or_many_give_the_same(planted: Pair) -> None:
    one, many = (planted.distil(Settings(micro_batch=size)) for size in (128, 5))
    for key, factors in one.fitted.items():
        assert relative(many.fitted[key].b @ many.fitted[key].a, (factors.b @ factors.a).double()) < 1e-3
    assert one.gain == many.gain


def test_a_planted_last_layer_reaches_what_the_best_linear_map_reaches(planted: Pair, tmp_path: Path) -> None:
    # An update of the last layer's down projection is linear in its input, which a planted upgrade has too. Only what
    # the final norm makes of it is not: it takes away the part along the state.
    old = planted.root / "old"
    random_adapter(old, tmp_path / "adapter", targets=["down_proj"], rank=RANK, alpha=8, seed=0, layers=[2], size=0.1)
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(planted.root / name)
    texts = load_examples(None, 40, 0)
    found = Pair(tmp_path).distil(Settings(layers=1, roles=("down",), rank=2 * RANK, ridge=1e-4), texts)
    dense = Dense(tmp_path)
    x = dense.read(dense.new, "new", ("layers.3.mlp.down_proj",))["layers.3.mlp.down_proj"]
    target, held = dense.target()[0], dense.held
    linear = x[held] @ (torch.linalg.pinv(x[~held], rtol=1e-6) @ target[~held])
    best = 1 - float((target[held] - linear).square().sum() / target[held].square().sum())
    assert best > 0.75
    assert found.explained[3] > best - 0.02
    assert found.agreement["content_kl_share"][1] > 0.5
    assert found.gain == 1
    assert found.warning is None


def test_shuffled_targets_leave_only_a_constant_shift(planted: Pair) -> None:
    real, shuffled = (planted.distil(Settings(control=control)) for control in ("none", "shuffled"))
    assert shuffled.agreement["content_kl_share"][0] < 0.05
    assert real.agreement["content_kl_share"][1] > shuffled.agreement["content_kl_share"][2]
    assert real.warning is None


def test_flipped_targets_carry_nothing_and_say_so(planted: Pair) -> None:
    found = planted.distil(Settings(control="flipped"))
    assert found.gain == 0
    assert all(not factors.b.any() for factors in found.updates.values())
    assert found.warning is not None
    assert "changes nothing" in found.warning


def test_auto_takes_least_squares_on_a_planted_upgrade_and_is_exact(planted: Pair, tmp_path: Path) -> None:
    root = planted.root
    result = migrate(root / "old", root / "new", root / "adapter", tmp_path / "out", plan=PlanConfig(examples=48))
    assert result.plan.options["method"] == "lstsq"
    assert "a linear map carries" in result.plan.facts["method_reason"]
    assert result.warning is None
    assert planted.planted is not None
    ids_o, ids_n = planted.planted.random_ids(4, 24, 0)
    old = effect(planted.model, root / "adapter", ids_o)[..., planted.planted.shared_old].flatten()
    new = effect(planted.planted.model, tmp_path / "out", ids_n)[..., planted.planted.shared_new].flatten()
    assert float(torch.nn.functional.cosine_similarity(old, new, dim=0)) >= 0.9999


def test_auto_distils_between_models_that_share_only_their_embeddings(planted: Pair, tmp_path: Path) -> None:
    """The embeddings fit exactly, and nothing behind them does."""
    assert planted.planted is not None
    other = copy.deepcopy(planted.planted.model)
    with torch.no_grad():
        for layer in other.model.layers:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.copy_(weight[torch.randperm(len(weight))])
    save_folder(other, planted.planted.tokenizer, tmp_path / "other")
    folders = planted.root / "old", tmp_path / "other", planted.root / "adapter", tmp_path / "out"
    result = migrate(*folders, plan=PlanConfig(examples=16), apply=ApplyConfig(distill=Settings(max_tokens=32)))
    assert min(result.plan.facts["r2"], result.plan.facts["r2_back"]) > 0.999
    assert min(result.plan.facts["layer_r2"].values()) < 0.9
    assert result.plan.options["method"] == "distill"
    assert "the layers are not" in result.plan.facts["method_reason"]


def test_auto_distils_between_unrelated_models_and_warns(unrelated: Pair, tmp_path: Path) -> None:
    root = unrelated.root
    result = migrate(root / "old", root / "new", root / "adapter", tmp_path / "out", plan=PlanConfig(layers="last"))
    assert result.plan.options["method"] == "distill"
    assert "no linear map" in result.plan.facts["method_reason"]
    assert result.warning is not None
    assert result.as_dict()["warning"] == result.warning


def test_auto_measures_a_transfer_matrix_that_is_given(planted: Pair, tmp_path: Path) -> None:
    """The identity carries a model onto itself, and not onto another of its width."""
    save_folder(tiny_model("llama", 1, d=32, layers=3, vocab=420), tiny_tokenizer(420), tmp_path / "other")
    for name, method in (("old", "lstsq"), ("other", "distill")):
        new = (planted.root if name == "old" else tmp_path) / name
        plan = TransferPlan.build(
            planted.root / "old", new, config=PlanConfig(transfer="identity", layers="last", examples=16)
        )
        assert plan.options["method"] == method
        assert "the transfer matrix" in plan.facts["method_reason"]


@pytest.mark.parametrize("texts", [8, 12, 19, 72])
def test_few_texts_between_unrelated_models_are_warned_of_all_the_same(texts: int, unrelated: Pair) -> None:
    found = unrelated.distil(Settings(), load_examples(None, texts, 0))
    assert found.warning is not None
    for value, low, high in found.agreement.values():
        assert low < high or (found.gain, value) == (0.0, 0.0)


def test_the_gain_a_text_is_judged_with_is_chosen_by_the_others() -> None:
    found = {0.0: [2.0, 2.0, 2.0], 0.5: [0.0, 2.1, 2.1], 1.0: [9.0, 9.0, 9.0]}
    divergences = {gain: torch.tensor(values, dtype=torch.float64) for gain, values in found.items()}
    assert scores.best_gain(divergences) == 0.5
    equal = {gain: torch.tensor([1.0 + (gain > 1)]) for gain in (1.25, 1.0, 0.5)}
    assert scores.best_gain(equal) == 0.5
    # Without the first text, which alone gains by an update, the others want none.
    assert scores.gains_by_others(divergences).tolist() == [0.0, 0.5, 0.5]
    states = {gain: [torch.full((2, 3), gain), torch.full((1, 3), gain)] for gain in found}
    gains = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    assert scores.rows_by_gain(states, gains)[:, 0].tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("rank", [None, 2, 7])
def test_the_result_is_a_peft_adapter_of_the_rank_asked_for(rank: int | None, planted: Pair, tmp_path: Path) -> None:
    root = planted.root
    settings = Settings(rank=rank, max_tokens=MAX_TOKENS)
    migrate(
        root / "old",
        root / "new",
        root / "adapter",
        tmp_path / "out",
        plan=PlanConfig(method="distill"),
        apply=ApplyConfig(distill=settings),
    )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (rank or RANK)
    assert sorted(config["target_modules"]) == ["down_proj", "o_proj"]
    assert config["layers_to_transform"] == [2, 3]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "new"), tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {n.replace(".default.", ".") for n, _ in model.named_parameters() if "lora_" in n} == set(stored)
    assert all(tensor.shape[0 if "lora_A" in name else 1] == (rank or RANK) for name, tensor in stored.items())


def test_a_saved_plan_distils_with_other_text(planted: Pair, tmp_path: Path) -> None:
    root = planted.root
    TransferPlan.build(root / "old", root / "new", config=PlanConfig(method="distill")).save(tmp_path / "plan")
    text = tmp_path / "text.jsonl"
    lines = load_examples(None, 40, 3)
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    result = TransferPlan.load(tmp_path / "plan").apply(
        root / "adapter", tmp_path / "out", config=ApplyConfig(text=text)
    )
    assert result.distilled is not None
    assert result.distilled.texts == 40
    assert result.as_dict()["distillation"]["text"] == str(text)
    assert "| text | text.jsonl |" in (tmp_path / "out/README.md").read_text()


def test_every_update_has_the_rank_asked_for(planted: Pair) -> None:
    found = planted.distil(Settings(rank=2, layers=1), load_examples(None, 24, 0))
    assert {(len(f.b.T), len(f.a)) for f in found.updates.values()} == {(2, 2)}


def test_too_few_texts_are_refused_however_long_they_are(planted: Pair) -> None:
    with pytest.raises(LoraSuiteError, match=r"in 7 texts .* it needs 256 positions in 8 texts"):
        planted.distil(Settings(), texts=["the rain on the other side, not heard by the sea. " * 8] * 7)


def test_too_little_text_is_refused(planted: Pair) -> None:
    with pytest.raises(LoraSuiteError, match=r"needs 256 positions in 8 texts.*`calibration`"):
        planted.distil(Settings(), texts=["one", "two", "three"])


def test_a_rank_asked_for_leaves_auto_distillation_alone(planted: Pair, tmp_path: Path) -> None:
    root = planted.root
    result = migrate(
        *(root / "old", root / "new", root / "adapter", tmp_path / "out"),
        plan=PlanConfig(examples=72),
        apply=ApplyConfig(distill=Settings(rank=2)),
        refine=False,
    )
    assert result.plan.options["method"] == "distill"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_a_text_and_a_number_of_layers_are_refused_where_the_method_uses_neither(planted: Pair, tmp_path: Path) -> None:
    plan = TransferPlan.build(planted.root / "old", planted.root / "new", config=PlanConfig(method="lstsq", examples=8))
    for options, named in (({"text": tmp_path / "text.jsonl"}, "`text`"), ({"settings": Settings(layers=2)}, "layers")):
        with pytest.raises(LoraSuiteError, match=named):
            plan.apply(planted.root / "adapter", tmp_path / "out", **given(plan.apply, **options))
    assert not (tmp_path / "out").exists()


def test_updates_are_gone_with_their_context(planted: Pair) -> None:
    layer = tiny_model("llama", 0).model.layers[0]
    x = torch.randn(2, layer.self_attn.o_proj.in_features)
    plain = layer.self_attn.o_proj(x)
    b, a = torch.ones(plain.shape[-1], 1), torch.ones(1, x.shape[-1])
    with updated(layer, Checkpoint(planted.root / "old"), {"o": Factors(b, a)}):
        assert torch.allclose(layer.self_attn.o_proj(x), plain + x.sum(-1, keepdim=True), atol=1e-4)
    assert torch.equal(layer.self_attn.o_proj(x), plain)


def test_self_written_text_is_seeded_and_kept(planted: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = Checkpoint(planted.root / "old", "old")

    def write(seed: int) -> list[str]:
        return self_written(old, planted.root / "adapter", count=6, seed=seed, device=torch.device("cpu"))

    first = write(0)
    assert write(1) != first
    shutil.rmtree(tmp_path / "lorasuite-fast")
    # The text is a sample of the model's predictions, whatever its folder wants of a conversation.
    penalised = tmp_path / "old"
    shutil.copytree(planted.root / "old", penalised)
    config = json.loads((penalised / "generation_config.json").read_text())
    config |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    (penalised / "generation_config.json").write_text(json.dumps(config))
    old = Checkpoint(penalised, "old")
    assert write(0) == first
    monkeypatch.setattr("lorasuite_fast.adapters.aligned_states.LoadedModel", None)
    assert write(0) == first
