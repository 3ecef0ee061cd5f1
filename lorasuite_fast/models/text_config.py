"""The settings of the text model in a config.json, which of a multimodal model's are only a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from .family_table import WRAPPERS

_OTHER_PARTS = ("vision_config", "text_config", "audio_config")


def text_settings(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config as it is, or the text model's part of a wrapper's, with the defaults of transformers' class.

    Wrappers leave out of their files what is a default of the text's class, sizes among them.

    Raises:
        LoraSuiteError: a text_config that is no object, or that transformers does not understand.
    """
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None:
        return config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .loading import loading
    from .pretrained import check_config

    # Files from before there was a text_config have its keys among the others.
    flat = {key: value for key, value in config.items() if key not in (*_OTHER_PARTS, "model_type")}
    stated = config.get("text_config", flat)
    if not isinstance(stated, dict):
        raise LoraSuiteError(f"{folder / 'config.json'}: text_config must be an object, found {stated!r}")
    check_config(stated, folder / "config.json", trust_remote_code=False)
    text_type = stated.get("model_type") or wrapper.text_type
    kept = {key: value for key, value in stated.items() if key not in ("model_type", "transformers_version")}
    with loading(f"{folder}: transformers cannot read this text_config"):
        full: dict[str, Any] = CONFIG_MAPPING[text_type](**kept).to_dict()
    tied = config.get("tie_word_embeddings", wrapper.tied)
    return full | kept | {"model_type": text_type, "tie_word_embeddings": tied}


_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "mxfp4",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
}


def quantisation(config: dict[str, Any]) -> str | None:
    """How a config.json says its weights are quantised, as "GPTQ, 4 bit"; None where it does not."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return None
    method = str(stated.get("quant_method", "bitsandbytes"))
    bits = stated.get("bits")
    if not isinstance(bits, int):
        bits = next((bits for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)) if stated.get(key)), None)
    name = _METHODS.get(method, method)
    return f"{name}, {bits} bit" if bits else name
