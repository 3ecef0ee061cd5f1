"""A report of a plan or a result as one HTML file: pictures in SVG, no network, no script, no font of its own.

Pictures are drawn 360 units wide, the width of a phone, so that their text is as large there as on a desktop. Colours
are CSS variables; a value's strength is an opacity, so that the same picture is legible in dark and in light.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import TYPE_CHECKING

from .._version import __version__
from ..evaluation.verification import Verification
from ..io.artifacts import REPORT_MARK
from ..io.hub_ids import shown
from ..io.notebook import Rendered
from ..io.output import write_file
from ..io.report_path import check_report
from ..results import Migration
from ..training.finetuning import Finetuning
from ..training.refinement import Refinement
from ..transfer.plan import Plan
from .escaping import html_text as escape
from .html_migration import migration_parts, plan_parts, plan_summary
from .html_parts import (
    Part,
    anchor,
    options_part,
    sections,
)
from .html_results import finetuning_part, fingerprints, phases_part, refinement_part, verification_parts
from .html_style import PAGE_STYLE, STYLE

if TYPE_CHECKING:
    pass

Subject = Plan | Migration | Verification | Refinement | Finetuning


def report_html(subject: Subject) -> str:
    """The whole document."""
    title, parts = _parts(subject)
    links = "".join(f'<li><a href="#{anchor(p.title)}">{escape(p.title)}</a></li>' for p in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{REPORT_MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{PAGE_STYLE}</style></head>\n"
        f'<body><a class="skip" href="#report">Skip to the report</a>\n<div class="lsf"><h1>{escape(title)}</h1>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="report" tabindex="-1">{sections(parts)}</main>\n'
        f"<footer>{escape(_versions())}</footer></div></body></html>\n"
    )


def fragment(subject: Subject) -> str:
    """The report without its page, for a notebook's cell."""
    title, parts = _parts(subject)
    return f'<style>{STYLE}</style><div class="lsf"><h1>{escape(title)}</h1>{sections(parts)}</div>'


def _versions() -> str:
    names = ("torch", "transformers", "peft", "safetensors")
    return f"lorasuite-fast {__version__}, " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


def _parts(subject: Subject) -> tuple[str, list[Part]]:
    if isinstance(subject, Plan):
        title = f"Transfer plan: {shown(subject.old.name)} to {shown(subject.new.name)}"
        parts = [
            plan_summary(subject),
            *plan_parts(subject),
            phases_part(subject.phases),
            options_part(subject.options),
        ]
    elif isinstance(subject, Migration):
        plan = subject.plan
        title = f"{shown(subject.adapter)}: {shown(plan.old.name)} to {shown(plan.new.name)}"
        parts = migration_parts(subject)
    elif isinstance(subject, Verification):
        title = f"Verification: {shown(subject.old)} and {shown(subject.new)}"
        parts = [
            *verification_parts(subject),
            fingerprints(subject),
            phases_part(subject.phases, subject.seconds),
            options_part(subject.options),
        ]
    elif isinstance(subject, Refinement):
        title = f"Refinement: {shown(subject.old_adapter)} on {shown(subject.new)}"
        parts = [
            refinement_part(subject),
            fingerprints(subject),
            phases_part(subject.phases, subject.seconds),
            options_part(subject.options),
        ]
    else:
        title = f"Fine-tuning of {shown(subject.model)}"
        parts = [
            finetuning_part(subject),
            fingerprints(subject),
            phases_part(subject.phases, subject.seconds),
            options_part(subject.options),
        ]
    return title, [part for part in parts if part.body]


Rendered.renderer = staticmethod(fragment)


def write_report(subject: Subject, path: str | os.PathLike[str] | None) -> None:
    """Writes a report where one is asked for; replaces an earlier report, and nothing else.

    Raises:
        LoraSuiteError: it cannot be written there.
    """
    target = check_report(path)
    if target is None:
        return

    html = report_html(subject)
    write_file(target, lambda file: file.write_text(html, encoding="utf-8"), overwrite=True, kind="report")
