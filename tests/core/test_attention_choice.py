"""Which kernels compute attention: those of packages are imported late, tested, timed, and kept with the run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import attention_packages as packages
from tests.support.random_base import relative_error
from trainer_core.qwen_image import attention_choice, attention_packages
from trainer_core.qwen_image.attention import attend
from trainer_core.qwen_image.attention_choice import kept_choices
from trainer_core.qwen_image.attention_kernels import CPU, Kernel, no_pass
from trainer_core.run import _attention_kept
from trainer_core.runs.folder import RunFolder

FLASH_2 = packages.flash_attention_2()
ALL = {module: functions() for module, functions in packages.MODULES.values()}


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A CPU that counts as a card: seconds of each pass by name, 1 if it is not there, and torch's kernels on it."""
    seconds: dict[str, float] = {}
    last: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*tensors: Tensor) -> Any:
            last.append(name)
            return call(*tensors)

        return call if call is no_pass else noting

    def timed(_: torch.device, call: Callable[[], object]) -> float:
        call()
        return seconds.get(last[-1], 1.0)

    @functools.cache  # the same kernels each time, as in a process
    def noting(kernel: Kernel) -> Kernel:
        passes = {each: noted(f"{kernel.name} {each}", getattr(kernel, each)) for each in ("forward", "backward")}
        return replace(kernel, **passes)

    def installed(*, in_8_bits: bool) -> tuple[Kernel, ...]:
        return tuple(map(noting, real(in_8_bits=in_8_bits)))

    real = attention_choice.installed_kernels
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(attention_choice, "seconds_on_device", timed)
    monkeypatch.setattr(attention_choice, "CUDA", (noting(replace(CPU, name="flash")),))
    monkeypatch.setattr(attention_choice, "installed_kernels", installed)
    forget()
    yield seconds
    forget()


def forget() -> None:
    """Start as a new process would."""
    attention_packages.installed_kernels.cache_clear()
    attention_choice._tested.cache_clear()
    attention_choice._of_process.clear()
    attention_choice._in_use[0].kernels.clear()
    attention_choice._in_use[0].names.clear()


def chosen(*, tokens: int = 40, in_8_bits: bool = False) -> str:
    """The name of the kernel for so many queries and keys."""
    query = torch.randn(1, tokens, 2, 16, dtype=torch.bfloat16)
    kernel = attention_choice._on_card(query, query, in_8_bits=in_8_bits)
    assert kernel is not None
    return kernel.name


def test_packages_are_imported_only_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    forget()
    monkeypatch.setattr(attention_packages, "import_module", imported.append)
    x = torch.randn(1, 8, 2, 16)
    attend(x, x, x)
    assert imported == []
    attention_packages.installed_kernels(in_8_bits=False)
    assert imported == ["flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"]
    attention_packages.installed_kernels(in_8_bits=True)
    assert imported[3:] == ["sageattention"]
    forget()


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3", "flash-attn 4"])
def test_the_fastest_kernels_are_taken(
    name: str, times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    packages.install(monkeypatch, ALL)
    times.update({f"{name} forward": 0.5, f"{name} backward": 0.96})
    assert chosen() == f"{name}/flash", "a backward pass that is hardly faster is not taken"
    assert f"queries and 64 keys uses {name} forward and flash backward" in caplog.text
    times[f"{name} backward"] = 0.9
    assert chosen() == f"{name}/flash" and chosen(tokens=64) == f"{name}/flash", "it is chosen once for a size"
    assert chosen(tokens=65) == f"{name}/{name}"


def test_older_versions_of_flash_attention_3_have_the_same_meaning(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.install(monkeypatch, {"flash_attn_interface": packages.flash_attention_3_of_2025()})
    times.update({"flash-attn 3 forward": 0.5, "flash-attn 3 backward": 0.5})
    assert chosen() == "flash-attn 3/flash-attn 3"


def test_8_bit_kernels_are_taken_only_where_they_are_allowed(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.install(monkeypatch, ALL)
    times["sageattention forward"] = 0.1
    assert chosen() == "flash/flash" and "sageattention" not in packages.USED
    assert chosen(in_8_bits=True) == "sageattention/flash", "its backward pass is another kernel's"
    assert chosen() == "flash/flash"


def test_results_are_those_of_attention(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernels compute it, also with fewer queries than keys."""
    packages.install(monkeypatch, ALL)
    tensors = [torch.randn(1, tokens, 2, 16, requires_grad=True) for tokens in (24, 40, 40)]
    wanted = attend(*tensors)
    gradient = torch.randn_like(wanted)
    right = torch.autograd.grad(wanted, tensors, gradient)
    monkeypatch.setattr("trainer_core.qwen_image.attention.kernel_for", attention_choice._on_card)
    for name in packages.MODULES:
        forget()
        times.clear()
        times.update({f"{name} forward": 0.5, f"{name} backward": 0.5})
        packages.USED.clear()
        found = attend(*tensors, in_8_bits=True)
        bound = 0.02 if name == "sageattention" else 1e-5
        assert relative_error(found.detach(), wanted.detach()) < bound
        for each, other in zip(torch.autograd.grad(found, tensors, gradient), right, strict=True):
            assert relative_error(each, other) < bound
        assert packages.USED[-1] == name, "it computed the last pass that it has"


def wrong_scale() -> dict[str, Any]:
    """As if the default of the scale had changed."""
    forward = FLASH_2["_flash_attn_forward"]

    def changed(query: Tensor, *others: Tensor, **settings: Any) -> Any:
        return forward(1.1 * query, *others, **settings)

    return {**FLASH_2, "_flash_attn_forward": changed}


def other_length(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """As if the log-sum-exp had another meaning."""
    forward = FLASH_2["_flash_attn_forward"]

    def changed(*tensors: Tensor, **settings: Any) -> Any:
        out, length, *others = forward(*tensors, **settings)
        return out, change(length), *others

    return {**FLASH_2, "_flash_attn_forward": changed}


def changed_inputs() -> dict[str, Any]:
    """As version 1 of SageAttention does with keys."""
    forward = FLASH_2["_flash_attn_forward"]

    def changed(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
        found = forward(query, key, value, **settings)
        key -= key.mean(1, keepdim=True)
        return found

    return {**FLASH_2, "_flash_attn_forward": changed}


WRONG = {
    "another scale": (wrong_scale, "results are wrong"),
    "log2": (lambda: other_length(lambda length: length / 0.6931), "results are wrong"),
    "padded": (lambda: other_length(lambda length: torch.nn.functional.pad(length, (0, 8))), "results are wrong"),
    "nan": (lambda: other_length(lambda length: length * torch.nan), "results are wrong"),
    "fewer results": (lambda: {**FLASH_2, "_flash_attn_forward": lambda q, *_, **__: q}, "it fails (ValueError"),
    "changed inputs": (changed_inputs, "it changes its inputs"),
    "no function": (lambda: {"_flash_attn_backward": FLASH_2["_flash_attn_backward"]}, "it fails (AttributeError"),
    "other arguments": (lambda: {**FLASH_2, "_flash_attn_forward": lambda q, k, v: (q, q)}, "it fails (TypeError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_pass_is_not_taken(
    case: str, times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    functions, words = WRONG[case]
    packages.install(monkeypatch, {"flash_attn.flash_attn_interface": functions()})
    times.update({"flash-attn 2 forward": 0.1, "flash-attn 2 backward": 0.1})
    assert chosen() == "flash/flash-attn 2" and chosen(tokens=65) == "flash/flash-attn 2"
    assert "The forward pass of flash-attn 2 is not used" in caplog.text and caplog.text.count(words) == 1


def test_a_backward_pass_that_writes_nothing_is_not_taken(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    functions = {**FLASH_2, "_flash_attn_backward": lambda *_, **__: None}
    packages.install(monkeypatch, {"flash_attn.flash_attn_interface": functions})
    times.update({"flash-attn 2 forward": 0.1, "flash-attn 2 backward": 0.1})
    assert chosen() == "flash-attn 2/flash"
    assert "The backward pass of flash-attn 2 is not used" in caplog.text


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: _ZN3c10"), OSError("bad ELF"), RuntimeError("no GPU")]
)
def test_a_broken_package_is_left_out(
    error: Exception, times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise error

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(attention_packages, "import_module", fail)
    assert chosen(in_8_bits=True) == chosen(tokens=65) == "flash/flash"
    for name in packages.MODULES:
        assert caplog.text.count(f"{name} can't be used for attention ({type(error).__name__}: {error})") == 1


def test_missing_packages_are_not_mentioned_but_missing_parts_are(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    packages.install(monkeypatch, {"flash_attn.cute.interface": {}})
    assert chosen(in_8_bits=True) == "flash/flash"
    assert "can't be used" not in caplog.text and "pass of flash-attn 4 is not used" in caplog.text

    def without_cutlass(name: str) -> None:
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    attention_packages.installed_kernels.cache_clear()
    monkeypatch.setattr(attention_packages, "import_module", without_cutlass)
    attention_packages.installed_kernels(in_8_bits=False)
    assert "flash-attn 4 can't be used for attention (ModuleNotFoundError: No module named 'cutlass')" in caplog.text


def test_sage_attention_without_log_sum_exp_is_left_out(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    packages.install(monkeypatch, {"sageattention": packages.sage_attention_1()})
    assert chosen(in_8_bits=True) == "flash/flash"
    assert "sageattention can't be used for attention (NotImplementedError: version 2 is needed" in caplog.text


def test_a_kernel_that_fails_at_the_runs_size_is_not_taken(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def small_only(q: Tensor, *others: Tensor, **settings: Any) -> Any:
        if q.shape[1] > 200:
            raise RuntimeError("too long")
        return FLASH_2["_flash_attn_forward"](q, *others, **settings)

    caplog.set_level(logging.INFO)
    functions = {**FLASH_2, "_flash_attn_forward": small_only}
    packages.install(monkeypatch, {"flash_attn.flash_attn_interface": functions})
    times["flash-attn 2 forward"] = 0.1
    assert chosen() == "flash-attn 2/flash" and chosen(tokens=300) == "flash/flash"
    assert "flash-attn 2 is not used for attention (RuntimeError: too long)" in caplog.text


def test_a_run_keeps_its_choice(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    packages.install(monkeypatch, ALL)
    run = RunFolder(tmp_path)
    run.write_state(key={}, state="started")
    times.update({"flash-attn 2 forward": 0.5, "flash-attn 3 backward": 0.5})
    with _attention_kept(run):
        assert chosen() == "flash-attn 2/flash-attn 3" and chosen(in_8_bits=True) == "flash-attn 2/flash-attn 3"
    first = {"64x64": "flash-attn 2/flash-attn 3", "64x64 8bit": "flash-attn 2/flash-attn 3"}
    assert RunFolder(tmp_path).state()["attention_kernels"] == first
    forget()
    times.update({"flash-attn 4 forward": 0.4, "flash-attn 4 backward": 0.4})
    with _attention_kept(RunFolder(tmp_path)):
        assert chosen() == "flash-attn 2/flash-attn 3"
        assert chosen(tokens=65) == "flash-attn 4/flash-attn 4", "a size that is new"
    assert chosen() == "flash-attn 4/flash-attn 4", "outside of the run"
    assert RunFolder(tmp_path).state()["attention_kernels"] == {**first, "128x128": "flash-attn 4/flash-attn 4"}
    assert "do not run here" not in caplog.text

    forget()
    packages.install(monkeypatch, {module: ALL[module] for module in ("flash_attn.cute.interface",)})
    with _attention_kept(RunFolder(tmp_path)):
        assert chosen() == "flash-attn 4/flash-attn 4"
    assert "This run's attention kernels flash-attn 2/flash-attn 3 do not run here" in caplog.text
    assert RunFolder(tmp_path).state()["attention_kernels"]["64x64"] == "flash-attn 4/flash-attn 4"


@pytest.mark.parametrize("names", [None, [], {"64x64": 3}, {"64x64": "flash"}, {"64x64": "a/b/c"}])
def test_a_choice_that_means_nothing_is_made_again(names: object, times: dict[str, float]) -> None:
    kept: list[dict[str, str]] = []
    with kept_choices(names, kept.append):
        assert chosen() == "flash/flash"
    assert kept[-1]["64x64"] == "flash/flash"


def test_memory_that_runs_out_decides_nothing(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.device, call: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    kept: list[dict[str, str]] = []
    packages.install(monkeypatch, ALL)
    times["flash-attn 2 forward"] = 0.5
    with kept_choices({}, kept.append):
        with monkeypatch.context() as patched:
            patched.setattr(attention_choice, "seconds_on_device", full)
            assert chosen() == "flash/flash" and kept == []
        assert chosen() == "flash-attn 2/flash"
