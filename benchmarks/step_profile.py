"""Where a step's time goes, as tables: device time by group and by kernel, and the time in which the device waits."""

from __future__ import annotations

from collections import defaultdict

from tests.support.kernel_groups import GROUPS, Work, busy_time, group_of

KERNELS = 24  # rows of the table of kernels
NAME_LENGTH = 90


def profile_tables(work: list[Work], seconds: float, rank: int) -> str:
    """Tables of a step that takes `seconds` without the profiler.

    The rows of the first one add up to the step: kernels that run at the same time count once in "at the same time",
    and "device waits" is the step without the time in which any kernel runs.
    """
    groups: dict[str, list[Work]] = {name: [] for name in GROUPS}
    for each in work:
        groups[group_of(each, rank)].append(each)
    rows = [(name, sum(each.busy for each in found), str(len(found))) for name, found in groups.items() if found]
    busy = busy_time(work)
    rows += [
        ("at the same time", busy - sum(spent for _, spent, _ in rows), "-"),
        ("device waits", seconds * 1e6 - busy, "-"),
        ("step", seconds * 1e6, str(len(work))),
    ]
    lines = ["| group | ms | of the step | kernels |", f"|{' --- |' * 4}"]
    lines += [f"| {name} | {spent / 1e3:.1f} | {spent / seconds / 1e6:.1%} | {count} |" for name, spent, count in rows]
    return "\n".join([*lines, "", *_kernel_lines(groups)])


def _kernel_lines(groups: dict[str, list[Work]]) -> list[str]:
    """A table of the kernels that take the most time."""
    spent: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for group, found in groups.items():
        for each in found:
            spent[each.name, each.operation, group].append(each.busy)
    lines = ["| kernel | launched by | group | ms | calls |", f"|{' --- |' * 5}"]
    for (name, operation, group), times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:KERNELS]:
        lines.append(f"| {_short(name)} | {_short(operation)} | {group} | {sum(times) / 1e3:.1f} | {len(times)} |")
    return lines


def _short(name: str) -> str:
    return name.replace("|", "/")[:NAME_LENGTH]
