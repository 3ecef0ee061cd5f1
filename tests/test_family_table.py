"""The table of families in the documentation is the one these rows and tests give."""

from __future__ import annotations

import os
from pathlib import Path

from planted_families import MIXTURES, NAMES

from lorasuite_fast.models.family_table import FAMILIES, TEXT_LAYOUTS, WRAPPERS

PAGE = Path(__file__).parents[1] / "docs/reference/families.md"
PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Planted by `planted`; all others by `planted_families`."""
REFINED = ("llama",)
"""Families that `refine` is tested on."""
_HEAD = """# Families

What each family of models was tested for, by its `model_type` in config.json. This page is made by
`tests/test_family_table.py` from the table in `lorasuite_fast.models.families`.

- read: transformers builds the class, and every norm, projection and fused row is where the table says.
- project: an upgrade is planted, a new model in another shape that computes the old one's function; the change of the
  logits under the migrated adapter, both computed by PEFT, has a cosine of at least 0.9999 with the old change. The
  published projection equals a dense one in float64.
- distill: a streamed forward pass with an adapter gives PEFT's log-probabilities.
- refine: trained in a test. It trains through PEFT, so that the others (not tried) need nothing of their own.
- wrapper: multimodal classes with this text model inside that a planted upgrade was carried in; any of the wrappers
  below may hold any of the families.
- experts: what becomes of the experts of a mixture. "left alone": adapters on the attention are carried, experts are
  neither read nor compared, and a streamed forward pass runs them as transformers does (distill: hidden states equal
  those of the whole model).

| model_type | read | project | distill | refine | wrapper | experts |
|---|---|---|---|---|---|---|
"""
_TAIL = """
## Multimodal classes

The text model is read and carried; towers for images are neither loaded by `migrate` nor refused. The keys of the
adapter that is written are those of the class below, and adapters with the prefix of any of these classes, or of the
text's own, are read. An adapter that changes a tower is refused by the name of the module.

| model_type | text model, as transformers names the module |
|---|---|
"""
_REFUSED = """
## Refused by name

- Variants of a family: StableLM with parallel residuals or norms of q and k; Falcon with the new decoder architecture,
  without multi-query attention or with attention and MLP in turn; GPT-BigCode without multi-query attention; OPT with
  norms behind the layers; GPT-2 with cross-attention; MPT with another expansion ratio than 4; Bloom with residuals
  behind the norms.
- Adapters on experts or their routers, and whole layers that are no attention: a `model_type` that is not in the table
  is refused, and so is a module of the experts.
- Checkpoints whose attention or MLP is quantised (GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors), by the kind that
  config.json states: pass the 16-bit model. Experts in mxfp4 are read.
- `lstsq` between a family that reads its residual stream through norms and one that reads it as it is (OLMo 2 and 3,
  EXAONE 4): `distill` fits the effect instead, and `auto` chooses it.
"""


def page(tried: dict[str, str]) -> str:
    """The page's text; `tried` has wrapper -> the text model it was tested with."""
    rows = []
    for family in FAMILIES:
        held = ", ".join(w for w, text in tried.items() if text == family) or "–"
        distilled = "yes" if family in NAMES or family in PLAIN or family in MIXTURES else "no"
        rows.append(
            f"| `{family}` | yes | yes | {distilled} | {'yes' if family in REFINED else 'not tried'} | {held} | "
            f"{'left alone' if family in MIXTURES else '–'} |"
        )
    wrappers = [f"| `{name}` | `{wrapper.text}` |" for name, wrapper in WRAPPERS.items()]
    layouts = [f"`{text}` is read as `{layout}`" for text, layout in TEXT_LAYOUTS.items()]
    return (
        _HEAD + "\n".join(rows) + "\n" + _TAIL + "\n".join(wrappers) + f"\n\nInside: {'; '.join(layouts)}.\n" + _REFUSED
    )


def test_the_page_of_families_is_that_of_the_table() -> None:
    """Set WRITE_FAMILIES=1 to write the page anew."""
    from test_wrappers import TEXTS

    assert set(FAMILIES) == {*NAMES, *MIXTURES, *PLAIN}
    text = page(TEXTS)
    if os.environ.get("WRITE_FAMILIES"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text
