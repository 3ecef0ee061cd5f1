"""The configuration of a PEFT LoRA adapter: what of it is understood, what is refused, which modules it is for."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALLOCATION = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
"""What AdaLoRA alone has."""
_CLEARED: dict[str, Any] = {
    "auto_mapping": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "loftq_config": {},
}
"""What says how an adapter was made or is trained, not what it does; an adapter that is written says nothing of it."""
_PLAIN_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal")
"""Those that leave the base weights as they are."""
_UNSUPPORTED = {
    "lora_bias": "adapters with lora_bias",
    "modules_to_save": "adapters that save whole modules (modules_to_save)",
    "trainable_token_indices": "adapters with trainable tokens",
    "target_parameters": "adapters on bare parameters (target_parameters)",
    "layer_replication": "adapters with layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA adapters",
    "arrow_config": "routers over several adapters (Arrow)",
    "use_bdlora": "block-diagonal adapters (BD-LoRA)",
    "kasa_config": "KaSA adapters",
    "monteclora_config": "MonteCLoRA adapters",
    "megatron_config": "Megatron adapters, for which PEFT imports a module the file names,",
}
_READ = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    # PEFT corrects it by the module it meets.
    "fan_in_fan_out",
    # Without the key they belong to, which is refused, they mean nothing.
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
)
_KNOWN = {*_READ, *ALLOCATION, *_CLEARED, *_UNSUPPORTED, "runtime_config"}
_TASKS = (None, "CAUSAL_LM")
_FLAGS = ("use_dora", "use_rslora", "inference_mode", "fan_in_fan_out")
_MOST_PATTERNS, _MOST_CHARACTERS, _MOST_DEPTH = 4096, 1000, 20
_REPEATS = 64
_MOST_TRIES = 2 * _REPEATS**3
"""Of all patterns on one module. Trying them on the modules of the largest models then takes a second."""
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|\{[\d,]*\}|.", re.DOTALL)
_COUNTED, _REFERENCE = re.compile(r"\{[\d,]*\}"), re.compile(r"\\[1-9]")
_SPECIAL, _QUANTIFIERS = re.compile(r"[*+?{|\\(\[]"), ("*", "+", "?")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """PEFT's rule: a pattern stands for the modules whose path, or an ending of it, it matches."""
    return re.compile(rf"(.*\.)?({pattern})$")


def pattern_value(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if _compiled(pattern).match(module)), default)


class _Tries:
    """How often Python may try a part of a pattern on a module's path, which it does one way after the other.

    A quantifier has 64 ways, a choice between texts as many as begin with one another (one after the other, they are
    tried in turn), any other choice the sum of its branches' ways. Ways multiply along the pattern. What could multiply
    them by itself (a quantified group) or cannot be told from the text (look-around, references) counts as infinite.
    """

    def __init__(self, pattern: str) -> None:
        self.tokens = _TOKENS.findall(pattern)
        self.at = 0
        self.total = self._choice(0)[1]

    def _next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _choice(self, depth: int) -> tuple[float, float]:
        """Ways and tries of branches up to a closing bracket, which is left, or the end."""
        if depth > _MOST_DEPTH:
            return math.inf, math.inf
        ways, tries, texts = 0.0, 0.0, []
        while True:
            text, branch_ways, branch_tries = self._branch(depth)
            ways, tries = ways + branch_ways, tries + branch_tries
            texts.append(text)
            if self._next() != "|":
                break
            self.at += 1
        if len(texts) > 1:
            tries += len(texts)
            if all(text is not None for text in texts):
                known = [text for text in texts if text is not None]
                ways = max(sum(long.startswith(short) for short in known) for long in known)
        return ways, tries

    def _branch(self, depth: int) -> tuple[str | None, float, float]:
        """One branch: its text where it is nothing else, its ways and tries."""
        text: str | None = ""
        ways, tries = 1.0, 0.0
        while (token := self._next()) not in (None, "|", ")"):
            assert token is not None
            self.at += 1
            more = 1.0
            if token == "(?" or _REFERENCE.fullmatch(token):
                return None, math.inf, math.inf
            group = token in ("(", "(?:")
            if group:
                more, inner = self._choice(depth + 1)
                tries += ways * inner
                self.at += 1
            letter = token[1:] if token[0] == "\\" and not token[1:].isalnum() else token
            text = None if text is None or group or len(letter) != 1 or token in ".^$" else text + letter
            quantifier = self._next()
            if quantifier in _QUANTIFIERS or (quantifier is not None and _COUNTED.fullmatch(quantifier)):
                self.at += 1
                if self._next() in ("?", "+"):
                    self.at += 1
                text = None
                if group:
                    more = more + 1 if quantifier == "?" else math.inf
                else:
                    more = 2 if quantifier == "?" else _REPEATS
                tries += ways * more
            ways *= more
        return text, ways, tries


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _tries(pattern: str) -> float:
    if len(pattern) > _MOST_CHARACTERS:
        return math.inf
    return _Tries(pattern).total if _SPECIAL.search(pattern) else 0.0


def cleared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what only says how the adapter was made or is run."""
    kept = {key: value for key, value in config.items() if key != "runtime_config"}
    return kept | {key: value for key, value in _CLEARED.items() if key in config}


def check_patterns(patterns: dict[str, Any], key: str, where: Path) -> None:
    """Refuses what is no regex, and patterns that together could take long to try on every module."""
    total = 0.0
    for pattern in patterns:
        total += _tries(pattern)
        if total > _MOST_TRIES:
            raise LoraSuiteError(
                f"{where}: {key} has the pattern {pattern[:80]!r}, which may take very long to match; name the "
                "modules, or write it with fewer quantifiers and alternatives, and none behind a group"
            )
        try:
            _compiled(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise LoraSuiteError(f"{where}: {key} has the pattern {pattern!r}, which is no regex ({error})") from None


def check_number(value: Any, name: str, where: Path) -> float:
    """The number as a float. Raises LoraSuiteError for anything else, infinity and NaN included."""
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A whole number may be longer than a float can hold.
        with suppress(OverflowError):
            number = float(value)
    if number is None or not math.isfinite(number):
        raise LoraSuiteError(f"{where}: {name} must be a number, found {value!r}")
    return number


def _check_rank(value: Any, name: str, where: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LoraSuiteError(f"{where}: rank {name} is {value!r}; it must be a positive integer")
    return value


def check_imports(config: dict[str, Any], where: Path) -> None:
    """Raises LoraSuiteError for a configuration at whose word PEFT would import a module."""
    if config.get("megatron_config"):
        raise LoraSuiteError(f"{where}: {_UNSUPPORTED['megatron_config']} are not supported (megatron_config is set)")


def check_adapter_config(config: dict[str, Any], where: Path) -> None:
    """Refuses kinds of adapter that are not understood, unknown settings and values that are none.

    Raises:
        LoraSuiteError: naming the key.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise LoraSuiteError(f"{where}: peft_type is {kind!r}; only LORA and ADALORA adapters can be migrated")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise LoraSuiteError(f"{where}: {what} are not supported ({key} is set)")
    if config.get("bias", "none") != "none":
        raise LoraSuiteError(f"{where}: adapters that train biases are not supported (bias is {config['bias']!r})")
    _check_kind(config, where)
    for key in _FLAGS:
        if not isinstance(config.get(key), bool | None):
            raise LoraSuiteError(f"{where}: {key} must be true or false, found {config[key]!r}")
    _check_pattern_values(config, where)
    name = "init_r" if kind == "ADALORA" else "r"
    _check_rank(config.get(name), name, where)
    check_number(config.get(name), name, where)
    check_number(config.get("lora_alpha"), "lora_alpha", where)
    dropout = config.get("lora_dropout")
    if dropout is not None and not 0 <= check_number(dropout, "lora_dropout", where) <= 1:
        raise LoraSuiteError(f"{where}: lora_dropout is {config['lora_dropout']!r}; it must be a share from 0 to 1")
    _check_names(config, where)


def check_matching(config: dict[str, Any], where: Path) -> None:
    """Refuses patterns and names that are none, or that PEFT could try for minutes.

    Raises:
        LoraSuiteError: naming the key.
    """
    _check_pattern_values(config, where)
    _check_names(config, where)
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        names = [value] if isinstance(value, str) else value if key == "layers_pattern" else None
        check_patterns(dict.fromkeys(name for name in names or () if name.lower() != "all-linear"), key, where)


def _check_kind(config: dict[str, Any], where: Path) -> None:
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        raise LoraSuiteError(
            f"{where}: init_lora_weights {init!r} changes the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    if config.get("task_type") not in _TASKS:
        raise LoraSuiteError(
            f"{where}: task_type is {config['task_type']!r}; only adapters of causal language models (CAUSAL_LM) can "
            "be migrated"
        )
    unknown = sorted(key for key, value in config.items() if key not in _KNOWN and value and value != "none")
    if unknown:
        key = unknown[0]
        raise LoraSuiteError(
            f"{where}: {key} is {str(config[key])[:80]!r}, a setting not known here, and what it changes would be "
            "lost; take it out if it changes nothing"
        )


def _check_pattern_values(config: dict[str, Any], where: Path) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise LoraSuiteError(f"{where}: {key} must be an object, found {patterns!r}")
        if len(patterns) > _MOST_PATTERNS:
            raise LoraSuiteError(f"{where}: {key} has {len(patterns)} patterns, more than the {_MOST_PATTERNS} read")
        if (config.get("peft_type"), key) == ("ADALORA", "rank_pattern"):
            # Full names, each with a list of what is kept.
            continue
        check_patterns(patterns, key, where)
        for pattern, value in patterns.items():
            if key == "rank_pattern":
                _check_rank(value, f"of {pattern!r}", where)
            else:
                check_number(value, f"alpha of {pattern!r}", where)


def _check_names(config: dict[str, Any], where: Path) -> None:
    """What says which modules and layers an adapter is for."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        names = [value] if isinstance(value, str) else value
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise LoraSuiteError(f"{where}: {key} must be a pattern or a list of names, found {str(value)[:80]!r}")
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise LoraSuiteError(f"{where}: layers_to_transform must be whole numbers, found {str(layers)[:80]!r}")


def _named(names: str | list[str], module: str) -> bool | None:
    """Whether a pattern or a list of names stands for a module; None for a pattern too slow to try."""
    if isinstance(names, list):
        return any(module == name or module.endswith(f".{name}") for name in names)
    if _tries(names) > _MOST_TRIES:
        return None
    try:
        return re.fullmatch(names, module) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def is_target(config: dict[str, Any], module: str) -> bool | None:
    """Whether PEFT would put an adapter of this configuration on a module; None where that cannot be told cheaply.

    Args:
        module: full path in the model.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded:
        out = _named(excluded, module)
        if out is not False:
            return None if out is None else False
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return None
    found = _named(targets, module)
    layers = config.get("layers_to_transform")
    if not found or isinstance(targets, str) or module in targets or layers is None or layers == []:
        return found
    patterns = config.get("layers_pattern")
    if not patterns:
        place = _LAYER.match(module)
    else:
        # Names in practice, such as `layers`; a pattern is taken as one, as by PEFT.
        names = [patterns] if isinstance(patterns, str) else patterns
        if any(_tries(name) > _REPEATS for name in names):
            return None
        tried = (re.match(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", module) for name in names)
        place = next((match for match in tried if match), None)
    return place is not None and int(place["idx"]) in ([layers] if isinstance(layers, int) else layers)


def check_targets(config: dict[str, Any], modules: list[str], weights: Path) -> None:
    """Refuses an adapter with tensors that PEFT would not load, because its configuration does not name their modules.

    Args:
        modules: full paths of those the file has tensors for. weights: the file, for messages.

    Raises:
        LoraSuiteError: naming such a module and what the configuration names.
    """
    lost = [module for module in modules if is_target(config, module) is False]
    if not lost:
        return
    share = "none of its tensors" if len(lost) == len(modules) else f"not those of {len(lost)} of its modules"
    targets = config["target_modules"]
    shown = targets if isinstance(targets, str) else ", ".join(targets)
    raise LoraSuiteError(
        f"{weights}: holds tensors for {lost[0]}, which the configuration's target_modules ({shown[:200]}) and layers "
        f"do not name, so that PEFT would load {share}; correct the configuration, or save the adapter again"
    )
