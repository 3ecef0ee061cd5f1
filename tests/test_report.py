"""The report: one file without network or script, with every picture, escaped, and written only over its like."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasuite_fast import (
    FinetuneConfig,
    LoraSuiteError,
    PlanConfig,
    Runtime,
    TransferPlan,
    VerifyConfig,
    finetune,
    migrate,
    verify,
)
from lorasuite_fast.cli.app import app
from lorasuite_fast.models.checkpoint import Checkpoint
from lorasuite_fast.reporting import figures
from lorasuite_fast.reporting.html_report import report_html, write_report
from lorasuite_fast.reporting.spectra import migration_spectra
from lorasuite_fast.training.refinement import Evaluation, Refinement
from lorasuite_fast.training.teacher import TeacherFacts

from planted import random_adapter, save_folder, tiny_model, tiny_tokenizer

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """What a browser meets: tags, pictures with their titles, links; complains where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.pictures = 0
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "svg" and dict(attrs).get("role") == "img":
            self.pictures += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["svg", "title"]:
            self.titles.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One of each result on tiny models; the report of each beside it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("report")
    for name, seed, layers in (("old", 1, 2), ("new", 2, 3)):
        save_folder(tiny_model("llama", seed, layers=layers), tiny_tokenizer(320, seed=seed), root / name)
    random_adapter(root / "old", root / "a<b>&c", targets=["q_proj", "down_proj"], rank=2, alpha=4, seed=0)
    models = root / "old", root / "new"
    found: dict[str, Any] = {}
    found["lstsq"] = migrate(
        *models,
        root / "a<b>&c",
        root / "lstsq",
        plan=PlanConfig(method="lstsq", examples=8),
        runtime=Runtime(report=root / "lstsq.html"),
    )
    found["distill"] = migrate(
        *models,
        root / "a<b>&c",
        root / "distill",
        plan=PlanConfig(method="distill", examples=8),
        runtime=Runtime(report=root / "distill.html"),
    )
    found["plan"] = TransferPlan.build(
        *models, config=PlanConfig(method="paper", examples=8), runtime=Runtime(report=root / "plan.html")
    )
    adapters = (root / "old", root / "a<b>&c", root / "new", root / "lstsq")
    found["verify"] = verify(
        *adapters,
        config=VerifyConfig(examples=8, max_tokens=64, bootstrap=20),
        runtime=Runtime(report=root / "verify.html"),
    )
    found["base"] = verify(
        root / "old",
        None,
        root / "new",
        None,
        config=VerifyConfig(examples=8),
        runtime=Runtime(report=root / "base.html"),
    )
    data = [{"prompt": f"question {n}?", "completion": f" answer {n}"} for n in range(10)]
    found["finetune"] = finetune(
        root / "new",
        root / "lstsq",
        data,
        root / "tuned",
        config=FinetuneConfig(steps=2, batch=4, validation=0.2, save_every=1),
        runtime=Runtime(report=root / "finetune.html"),
    )
    found["refine"] = refinement()
    write_report(found["refine"], root / "refine.html")
    return SimpleNamespace(root=root, names=sorted(found), **found)


def refinement() -> Refinement:
    """As `refine` returns it; its own tests run it."""
    evaluations = [Evaluation(0, -0.25, None, None), Evaluation(5, 0.5, 1.5, 2.5), Evaluation(10, 0.25, 1.25, 2.25)]
    return Refinement(
        "old", "adapter", "new", None, "out", 10, 10, 5, False, "budget", "Refined: agreement 50.0 %.", -0.25, 0.5,
        evaluations, TeacherFacts(4, 100, 1000, 200, 210, 64, 32, 0.01, 1.0, 0.99, 0.5), "self", 1, 2000, 300,
        {"learning_rate": 0.01}, [], 1.0, {"old": "0123abc", "new": "4567def"},
    )  # fmt: skip


NAMES = ("lstsq", "distill", "plan", "verify", "base", "finetune", "refine")


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_well_formed_and_needs_nothing_from_elsewhere(made: Any, name: str) -> None:
    html = (made.root / f"{name}.html").read_text()
    page = Page(html)
    assert page.count("script") == page.count("link") == page.count("img") == 0
    outside = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?(https?:[^"')]*)""", html)
    assert outside == []


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_a_role_and_a_title(made: Any, name: str) -> None:
    html = (made.root / f"{name}.html").read_text()
    page = Page(html)
    assert page.pictures > 0
    assert len(page.titles) == page.pictures
    assert all(page.titles)
    shown = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in shown)


@pytest.mark.parametrize("name", NAMES)
def test_a_report_serves_dark_light_phone_and_print(made: Any, name: str) -> None:
    html = (made.root / f"{name}.html").read_text()
    assert "prefers-color-scheme:dark" in html
    assert "@media print" in html
    assert Page(html).count("meta", name="viewport", content="width=device-width, initial-scale=1") == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_section_is_linked_and_no_path_of_this_machine_is_shown(made: Any, name: str) -> None:
    html = (made.root / f"{name}.html").read_text()
    links = set(re.findall(r'href="#([^"]+)"', html))
    sections = set(re.findall(r'<section id="([^"]+)"', html))
    assert links == sections | {"report"}
    assert str(made.root) not in html


def test_names_are_escaped(made: Any) -> None:
    html = (made.root / "lstsq.html").read_text()
    assert "a&lt;b&gt;&amp;c" in html
    assert "a<b>" not in html


def test_the_heat_map_shows_every_pair_and_outlines_the_chosen_ones(made: Any) -> None:
    html = (made.root / "lstsq.html").read_text()
    plan = made.lstsq.plan
    cka = plan.tensors["cka"]
    for i in range(2):
        for j in range(3):
            assert f"old layer {i}, new layer {j}: {float(cka[i, j]):.3f}" in html
    assert html.count('class="chosen"') == len(plan.layers)


def test_the_strips_show_every_head_with_its_partner_and_cosine(made: Any) -> None:
    html = (made.root / "lstsq.html").read_text()
    plan = made.lstsq.plan
    for j in plan.layers:
        match = plan.tensors[f"layers.{j}.heads.match"].tolist()
        for b, a in enumerate(match):
            wanted = "no partner"
            if a >= 0:
                wanted = f"old head {a}: {float(plan.tensors[f'layers.{j}.heads.similarity'][a, b]):.3f}"
            assert re.search(rf"layer {j}, new head {b}[:,] {re.escape(wanted)}", html)


def test_spectra_are_the_singular_values_of_the_dense_updates(made: Any) -> None:
    found = migration_spectra(made.lstsq)
    for spectra, folder in zip(found, (made.root / "a<b>&c", made.root / "lstsq"), strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        for (layer, role), values in spectra.items():
            module = {"q": "self_attn.q_proj", "down": "mlp.down_proj"}[role]
            name = f"base_model.model.model.layers.{layer}.{module}"
            b, a = (tensors[f"{name}.lora_{w}.weight"].double().numpy() for w in "BA")
            dense = np.linalg.svd(2.0 * b @ a, compute_uv=False)[: len(values)]
            assert values == pytest.approx(dense.tolist(), rel=1e-9, abs=1e-12)


def test_reports_of_verify_refine_and_finetune_name_the_models_fingerprints(made: Any) -> None:
    found = {name: Checkpoint(made.root / name, name).fingerprint() for name in ("old", "new")}
    for name, expected in (
        ("verify", found),
        ("base", found),
        ("finetune", {"model": found["new"]}),
        ("refine", {"old": "0123abc", "new": "4567def"}),
    ):
        assert getattr(made, name).fingerprints == expected
        html = (made.root / f"{name}.html").read_text()
        assert all(fingerprint in html for fingerprint in expected.values())


def test_a_migrations_report_has_fit_fidelity_times_options_versions_and_fingerprints(made: Any) -> None:
    html = (made.root / "lstsq.html").read_text()
    plan = made.lstsq.plan
    assert f"{1 - plan.facts['r2']:.4f}" in html
    for record in (plan.old, plan.new):
        assert record.fingerprint in html
    for name in plan.options:
        assert f"<dt>{name.replace('_', ' ')}</dt>" in html
    for phase in made.lstsq.phases:
        assert f"{phase.seconds:.2f} s" in html
    assert f"torch {torch.__version__}" in html
    for layer in made.lstsq.layers:
        assert f"q {layer.update['q']:.3f}" in html


def test_a_plans_report_shows_how_well_the_map_fits_every_layers_states(made: Any) -> None:
    facts = made.plan.facts | {"layer_r2": {"0": 0.75, "2": -1.5}}
    html = report_html(replace(made.plan, facts=facts))
    for text in ("layer 0", "0.2500", "layer 2", "2.5000"):
        assert f">{text}</text>" in html


def test_only_a_plan_whose_layers_fit_too_promises_that_an_adapter_arrives_whole(made: Any) -> None:
    promise = "an adapter should arrive whole"
    for layer_r2, promised in ((1.0, True), (0.9, False)):
        facts = made.lstsq.plan.facts | {"r2": 1.0, "r2_back": 0.9999, "head_r2": 1.0, "layer_r2": {"0": layer_r2}}
        assert (promise in report_html(replace(made.lstsq.plan, facts=facts))) is promised


def test_a_distilled_report_has_agreement_and_the_share_reached_behind_each_layer(made: Any) -> None:
    html = (made.root / "distill.html").read_text()
    distilled = made.distill.distilled
    assert f"{distilled.agreement['kl_share'][0]:.3f}" in html
    for share in distilled.explained.values():
        assert f"{share:.3f}" in html
    if made.distill.warning:
        assert 'class="verdict bad"' in html


def test_a_verifications_report_has_verdict_controls_and_layers(made: Any) -> None:
    html = (made.root / "verify.html").read_text()
    assert made.verify.verdict in unescape(html)
    for word in ("shuffled", "sign flipped", "constant shift", "CKA of the change"):
        assert word in html
    assert made.base.verdict in unescape((made.root / "base.html").read_text())


def test_training_reports_have_their_summary_and_every_evaluation(made: Any) -> None:
    html = (made.root / "finetune.html").read_text()
    assert made.finetune.summary in unescape(html)
    for loss in made.finetune.losses:
        assert f"{loss:.4f}" in html
    html = (made.root / "refine.html").read_text()
    assert made.refine.summary in html
    assert "-0.250" in html


def test_a_report_is_replaced_by_the_next_and_nothing_else_is(made: Any, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report(made.plan, target)
    write_report(made.lstsq, target)
    assert "Fidelity by layer" in target.read_text()
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    with pytest.raises(LoraSuiteError, match="is no report of lorasuite-fast"):
        write_report(made.plan, tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.html", "report.html"]


def test_a_report_that_cannot_be_written_is_refused_before_the_work(made: Any, tmp_path: Path) -> None:
    arguments = ["migrate", made.root / "old", made.root / "new", made.root / "a<b>&c", tmp_path / "out"]
    for place, message in ((tmp_path / "no/report.html", "parent folder"), (tmp_path, "is a folder")):
        result = CliRunner().invoke(app, [*map(str, arguments), "--report", str(place)])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --report ")
        assert message in result.stderr
        assert not (tmp_path / "out").exists()


def test_the_command_line_writes_a_report(made: Any, tmp_path: Path) -> None:
    arguments = [made.root / "old", made.root / "new", tmp_path / "plan", "--examples", 8, "--roles", "q"]
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--report", str(tmp_path / "report.html")])
    assert result.exit_code == 0, result.output
    assert f"report: {tmp_path / 'report.html'}" in result.stdout
    assert "Transfer plan: old to new" in (tmp_path / "report.html").read_text()


def test_a_report_of_adapters_that_are_gone_says_so(made: Any) -> None:
    gone = replace(made.lstsq, adapter=str(made.root / "none"), out=str(made.root / "neither"))
    assert "not there any more" in report_html(gone)


def test_a_notebook_shows_plans_and_migrations_as_a_fragment(made: Any) -> None:
    for subject in (made.plan, made.lstsq):
        html = subject._repr_html_()
        assert "<html" not in html
        assert Page(html).pictures > 0


def test_styles_stay_inside_the_report_in_a_notebook(made: Any) -> None:
    style = re.search(r"<style>(.*?)</style>", made.plan._repr_html_(), re.DOTALL)
    assert style is not None
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@media[^{]*\{", "", style[1]))
    assert all(part.strip().startswith(".lsf") for rule in rules for part in rule.split(","))


def test_every_picture_is_also_a_matplotlib_figure(made: Any) -> None:
    from matplotlib.figure import Figure

    drawn = [
        figures.cka(made.plan),
        figures.heads(made.plan),
        figures.residual(made.plan),
        figures.spectra(made.lstsq),
        figures.fidelity(made.distill),
        figures.fidelity(made.verify),
        figures.phases(made.lstsq.phases),
        figures.training(made.finetune),
        figures.training(made.refine),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)
    image = figures.cka(made.plan).axes[0].images[0].get_array()
    assert np.array_equal(np.asarray(image), made.plan.tensors["cka"].numpy())


def test_a_figure_of_what_is_not_there_is_one_error(made: Any) -> None:
    with pytest.raises(LoraSuiteError, match="matches no heads"):
        figures.heads(made.distill.plan)


def test_without_matplotlib_figures_say_what_to_install_and_reports_work(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoraSuiteError, match="pip install matplotlib"):
        figures.cka(made.plan)
    assert report_html(made.plan)
