"""Import SimpleTuner's optimizer, its schedule of the learning rate, and its limit on gradients."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import OptimizerConfig, OptimizerName
from ..settings import did_you_mean
from .section import Section, put


class _Theirs(NamedTuple):
    """Our optimizer, and the values that SimpleTuner's optimizer has. Its adam_* options don't change them."""

    ours: OptimizerName
    beta1: float
    beta2: float
    weight_decay: float
    epsilon: float = 1e-8


_ADAMW_BF16 = _Theirs("adamw", 0.9, 0.999, 0.01, 1e-6)
_8BIT = _Theirs("adamw-8bit", 0.9, 0.999, 0.01, 1e-6)
_LION = _Theirs("lion", 0.9, 0.99, 0.0)
# SimpleTuner's optimizers that have an equal or a near one here, by name. Underscores count as hyphens.
_OPTIMIZERS: dict[str, _Theirs] = {
    **dict.fromkeys(("adamw-bf16", "bnb-adamw", "bnb-adamw-paged"), _ADAMW_BF16),
    **dict.fromkeys(("ao-adamw4bit", "ao-adamwfp8", "ao-adamfp8"), _ADAMW_BF16),
    **dict.fromkeys(("bnb-adamw8bit", "bnb-adamw8bit-paged", "ao-adamw8bit", "adamw8bit"), _8BIT),
    "bnb-adam8bit": _8BIT._replace(weight_decay=0.0, epsilon=1e-8),
    "torch-adamw": _Theirs("adamw", 0.9, 0.999, 0.01),
    **dict.fromkeys(("torch-adam", "bnb-adam"), _Theirs("adamw", 0.9, 0.999, 0.0)),
    **dict.fromkeys(("optimi-adamw", "optimi-adam"), _Theirs("adamw", 0.9, 0.99, 0.0, 1e-6)),
    "optimi-stableadamw": _Theirs("adamw", 0.9, 0.99, 0.01, 1e-6),
    **dict.fromkeys(("sdnq-adamw", "sdnq-adamw+no-quant"), _Theirs("adamw", 0.9, 0.95, 0.01)),
    "adamw-schedulefree": _Theirs("adamw-schedulefree", 0.9, 0.999, 0.01),
    **dict.fromkeys(
        ("adamw-schedulefree+aggressive", "adamw-schedulefree+no-kahan"),
        _Theirs("adamw-schedulefree", 0.9, 0.999, 0.001, 1e-6),
    ),
    **dict.fromkeys(("optimi-lion", "bnb-lion", "bnb-lion8bit", "bnb-lion-paged", "bnb-lion8bit-paged"), _LION),
    "sdnq-lion": _LION._replace(weight_decay=0.01),
    "prodigy": _Theirs("prodigy", 0.9, 0.99, 0.0),
    **dict.fromkeys(("torch-adafactor", "adafactor"), _Theirs("adafactor", 0.9, 0.999, 0.0)),
    "sdnq-adafactor": _Theirs("adafactor", 0.9, 0.999, 0.01),
}
_OTHERS = _Theirs("adamw", 0.9, 0.999, 0.01)  # this trainer's defaults
_DEFAULT_OPTIMIZER, _DEFAULT_SCHEDULE = "adamw_bf16", "constant_with_warmup"
_DEFAULT_END, _DEFAULT_POWER, _DEFAULT_CLIP = 4e-7, 0.8, 2.0
_DEFAULT_WAVE_STEPS = 1000


def read_optimizer(section: Section, values: dict[str, Any]) -> None:
    """Read the optimizer, its constants and the schedule into `values`, with what SimpleTuner takes if keys lack.

    Raises:
        ConfigError: a value has the wrong type.
    """
    name = section.text("optimizer") or _DEFAULT_OPTIMIZER
    plain = name.lower().replace("_", "-")
    theirs = _OPTIMIZERS.get(plain, _OTHERS)
    _name_to_report(section, name, plain, theirs)
    found: dict[str, Any] = {"optimizer": theirs.ours}
    configured = _optimizer_config(section, theirs.ours)
    found |= _constants(section, name, theirs, configured)
    found |= _learning_rate(section, name, theirs, configured)
    found |= _schedule(section, theirs.ours)
    found |= _clipping(section, plain)
    defaults = OptimizerConfig()
    for key, value in found.items():
        if key in ("optimizer", "learning_rate") or value != getattr(defaults, key):
            put(values, f"optimizer.{key}", value)


def _name_to_report(section: Section, name: str, plain: str, theirs: _Theirs) -> None:
    if plain not in _OPTIMIZERS and plain in typing.get_args(OptimizerName):
        section.note("optimizer", f"{name} is no optimizer of SimpleTuner; adamw with this trainer's defaults is used.")
    elif plain not in _OPTIMIZERS:
        section.note(
            "optimizer",
            f"{name} is not supported; adamw with this trainer's defaults is used.{did_you_mean(plain, _OPTIMIZERS)}",
        )
    elif plain == "prodigy":
        section.note(
            "optimizer", "SimpleTuner's prodigy also averages the weights (ProdigyPlusScheduleFree). This one does not."
        )
    elif plain != theirs.ours:
        values = f"betas {theirs.beta1:g} and {theirs.beta2:g}, weight decay {theirs.weight_decay:g}"
        if theirs.ours not in ("lion", "adafactor"):
            values += f", epsilon {theirs.epsilon:g}"
        given = "" if "optimizer" in section else "not given. "
        section.note("optimizer", f"{given}{name} becomes {theirs.ours}, with SimpleTuner's values for it: {values}.")


def _optimizer_config(section: Section, ours: OptimizerName) -> dict[str, float]:
    """The numbers of optimizer_config, which is written as `eps=1e-6,weight_decay=0.1`."""
    known = {"lr", "weight_decay", "eps", *(("d_coef",) if ours == "prodigy" else ())}
    numbers: dict[str, float] = {}
    left_out: list[str] = []
    for each in (section.text("optimizer_config") or "").split(","):
        name, _, value = (part.strip() for part in each.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if name in known and number - number == 0:
            numbers[name] = number
        elif each.strip():
            left_out.append(each.strip())
    if left_out:
        section.note(
            "optimizer_config", f"left out: {', '.join(left_out)[:200]}. Only {', '.join(sorted(known))} are converted."
        )
    return numbers


def _constants(section: Section, name: str, theirs: _Theirs, configured: Mapping[str, float]) -> dict[str, float]:
    """Betas, weight decay and epsilon. SimpleTuner reads its adam_* options only with DeepSpeed."""
    beta1, beta2, decay, epsilon = theirs.beta1, theirs.beta2, theirs.weight_decay, theirs.epsilon
    if section.take("deepspeed_config"):
        section.note("deepspeed_config", "left out; the adam_* options that it needs are taken.")
        usual = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01, "adam_epsilon": 1e-8}
        given = {key: section.number(key) for key in usual}
        beta1, beta2, decay, epsilon = (usual[key] if value is None else value for key, value in given.items())
    else:
        decay, epsilon = configured.get("weight_decay", decay), configured.get("eps", epsilon)
        for key, used in (
            ("adam_beta1", beta1),
            ("adam_beta2", beta2),
            ("adam_weight_decay", decay),
            ("adam_epsilon", epsilon),
        ):
            given = section.number(key)
            if given is not None and given != used:
                section.note(
                    key,
                    f"left out. SimpleTuner uses it only with DeepSpeed; its {name} has {used:g}. To use yours, change "
                    f"optimizer.{key.replace('adam_weight', 'weight')}.",
                )
    first, second = section.number("optimizer_beta1"), section.number("optimizer_beta2")
    if first is not None and second is not None:
        beta1, beta2 = first, second
    elif first is not None or second is not None:
        section.note(
            "optimizer_beta1" if first is not None else "optimizer_beta2",
            "left out. SimpleTuner uses optimizer_beta1 and optimizer_beta2 only together.",
        )
    if theirs.ours == "adafactor":
        return {"weight_decay": decay}
    if theirs.ours == "lion":
        return {"adam_beta1": beta1, "lion_beta2": beta2, "weight_decay": decay}
    return {"adam_beta1": beta1, "adam_beta2": beta2, "weight_decay": decay, "adam_epsilon": epsilon}


def _learning_rate(section: Section, name: str, theirs: _Theirs, configured: Mapping[str, float]) -> dict[str, float]:
    rate = section.number("learning_rate")
    if theirs.ours == "prodigy":
        factors = {"learning_rate": configured.get("lr", 1.0)}
        section.note(
            "learning_rate",
            f"is {factors['learning_rate']:g}, a factor on the rate that prodigy finds, because SimpleTuner's prodigy "
            "ignores learning_rate.",
        )
        return factors | ({"prodigy_d_coef": configured["d_coef"]} if "d_coef" in configured else {})
    rate = configured.get("lr", rate)
    if theirs is _OTHERS:
        section.note(
            "learning_rate", f"was chosen for {name}; AdamW usually needs 1e-4 for ranks up to 16 and 5e-5 above."
        )
        rate = rate if rate is not None and 0 < rate < 0.01 else None
    return {} if rate is None else {"learning_rate": rate}


def _schedule(section: Section, ours: OptimizerName) -> dict[str, Any]:
    """The schedule with the same rates, and a line where SimpleTuner's name means something else here."""
    name = (section.text("lr_scheduler") or _DEFAULT_SCHEDULE).strip().lower()
    name = "cosine" if name == "cosine_with_warmup" else name
    warmup = max(0, section.whole("lr_warmup_steps") or 0)
    end, power = section.number("lr_end"), section.number("lr_power")
    end, power = _DEFAULT_END if end is None else end, _DEFAULT_POWER if power is None else power
    if ours == "adamw-schedulefree":
        if name not in ("constant", "constant_with_warmup"):
            section.note(
                "lr_scheduler", "becomes constant_with_warmup; SimpleTuner ignores it with schedule-free optimizers."
            )
        name = "constant_with_warmup"
    if name in ("cosine", "sine"):
        return _wave(section, name, warmup, end)
    if name == "cosine_with_restarts":
        section.note(
            "lr_scheduler",
            "becomes constant, because SimpleTuner's cosine_with_restarts stays at learning_rate (it warns that it "
            "misbehaves). For restarts, set optimizer.lr_scheduler to cosine_with_restarts, and "
            "optimizer.lr_num_cycles.",
        )
        name, warmup = "constant", 0
    elif name == "constant" and warmup:
        section.note("lr_scheduler", "constant with lr_warmup_steps is constant_with_warmup, as in SimpleTuner.")
        name = "constant_with_warmup"
    if warmup:
        section.note(
            "lr_warmup_steps",
            f"step s of the warm-up, counted from 0, has (s + 1) / {warmup + 1} of the rate. SimpleTuner's has "
            f"s / {warmup}, so its first step does nothing. From step {warmup} on the rates are equal.",
        )
    found: dict[str, Any] = {"lr_scheduler": name, "lr_warmup_steps": warmup}
    return found | ({"lr_end": end, "lr_power": power} if name == "polynomial" else {})


def _wave(section: Section, name: str, steps: int, end: float) -> dict[str, Any]:
    if not steps:
        steps = _DEFAULT_WAVE_STEPS
        section.note("lr_warmup_steps", f"is the length of the wave's fall. Not given, so {steps}.")
    section.note(
        "lr_scheduler",
        f"{name} becomes {name}_wave. As in SimpleTuner, the rate swings between learning_rate and lr_end ({end:g}), "
        f"with {steps} steps from one to the other. For one fall over the whole run, set optimizer.lr_scheduler to "
        "cosine.",
    )
    return {"lr_scheduler": f"{name}_wave", "lr_warmup_steps": 0, "lr_wave_steps": steps, "lr_end": end}


def _clipping(section: Section, plain: str) -> dict[str, float]:
    norm, method = section.number("max_grad_norm"), section.text("grad_clip_method")
    if plain == "prodigy":
        section.note("max_grad_norm", "becomes 0, because SimpleTuner does not limit gradients with prodigy.")
        return {"max_grad_norm": 0.0}
    if plain == "optimi-stableadamw":
        section.note(
            "max_grad_norm",
            "left out. In SimpleTuner, optimi-stableadamw limits its updates itself. Here the norm of the gradient is "
            "limited to 1.",
        )
        return {}
    if norm is not None and (method == "norm" or norm <= 0):
        return {"max_grad_norm": max(0.0, norm)}
    given = "" if norm is not None else "not given. "
    section.note(
        "max_grad_norm",
        f"{given or 'left out. '}SimpleTuner clips each element of the gradient at "
        f"{_DEFAULT_CLIP if norm is None else norm:g} (grad_clip_method value). This trainer limits the norm of the "
        "whole gradient instead, to 1 unless you set optimizer.max_grad_norm.",
    )
    return {}
