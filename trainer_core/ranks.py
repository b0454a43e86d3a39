"""Distributed training: the ranks of the processes that train one LoRA together, and their collective operations.

`torchrun` or `accelerate launch` starts the processes, on one machine or several, and sets their environment
variables. Without these, SINGLE_PROCESS is used, whose operations need no communication.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, LostRankError
from .events import Stop

T = TypeVar("T")
# Only matters for a process that hangs: one that ends closes its connections, which the others notice at once. Must
# exceed the longest validation, because all other processes wait for rank 0 to finish it.
TIMEOUT = timedelta(hours=2)
_STOPS = (Stop.NO, Stop.PAUSE, Stop.KEEP)  # if processes disagree, the last one in this order wins


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is number `rank` of `size`. Rank 0 leads: only it writes the run folder and validates.

    `on_machine` is the number of processes on this machine, which share its memory.
    """

    rank: int = 0
    size: int = 1
    on_machine: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of `items`: every `size`-th, from its own rank on."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Wait until all processes have called this.

        Raises:
            LostRankError: another process has ended or hangs.
        """
        self.agree(Stop.NO)

    def agree(self, wish: Stop) -> Stop:
        """The same answer in every process: the strongest of all processes' wishes (KEEP over PAUSE over NO).

        Raises:
            LostRankError: another process has ended or hangs.
        """
        if self.size == 1:
            return wish
        if torch.cuda.is_initialized():
            # Finish this process's GPU work first: after this call every process is then ready for a GPU collective.
            torch.cuda.synchronize()
        wishes = torch.tensor(_STOPS.index(wish))
        _exchange(self, lambda: dist.all_reduce(wishes, dist.ReduceOp.MAX))
        return _STOPS[int(wishes)]

    def all_gather_ints(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """The `numbers` of every process, in rank order: signed 64-bit, equally many in each process.

        Raises:
            LostRankError: another process has ended or hangs.
        """
        if self.size == 1:
            return [tuple(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        of_all = [torch.zeros_like(own) for _ in range(self.size)]
        _exchange(self, lambda: dist.all_gather(of_all, own))
        return [tuple(each.tolist()) for each in of_all]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, bit-identical in each of them.

        Raises:
            LostRankError: another process has ended or hangs.
        """
        if self.size == 1:
            return values
        through_host = values.is_cuda and not dist.is_nccl_available()
        total = values.cpu() if through_host else values.clone()
        _exchange(self, lambda: dist.all_reduce(total))
        return total.to(values.device)


SINGLE_PROCESS = Ranks()


@contextmanager
def joined_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group while the context lasts. Each process takes the GPU with its local rank.

    `device` is the setting of that name.

    Raises:
        ConfigError: several processes would use one GPU.
        LostRankError: the other processes can't be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    cuda = torch.cuda.is_available()
    gpu = _own_gpu(device, size)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
    _exchange(ranks, lambda: dist.init_process_group(backend, timeout=TIMEOUT))
    yield ranks
    dist.destroy_process_group()  # not after an error, when the other processes may have ended


def _exchange(ranks: Ranks, call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:  # base class of torch.distributed's errors in every backend
        raise LostRankError(
            f"Another of the {ranks.size} processes has ended or no longer answers ({_first_line(error)}); this is "
            f"process {ranks.rank}. Start all processes again to resume from the last checkpoint."
        ) from error


def _own_gpu(device: str, size: int) -> int | None:
    """Index of this process's GPU; None if the processes compute on the CPU."""
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"device is {device!r}, but {size} processes can't share one device. Set device to auto or cuda, which "
            "give each process its own GPU, or to cpu."
        )
    if device == "cpu" or not torch.cuda.is_available():
        return None
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ConfigError(
            f"LOCAL_RANK is {place}, but this machine has {count} GPUs, one per process. Start at most {count} "
            "processes on it, or set device to cpu."
        )
    return place


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
