"""Several processes that train one LoRA together: who each is, and what they tell each other.

`torchrun` and `accelerate launch` start them, on one machine or several, and name each in environment variables. A
process by itself is SINGLE_PROCESS, and every exchange of it is over at once.
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
# A process that ends is noticed at once, because its connections close. This is for one that hangs; it has to be longer
# than a validation, for which the others wait.
TIMEOUT = timedelta(hours=2)
_STOPS = (Stop.NO, Stop.PAUSE, Stop.KEEP)  # where wishes differ, the last of them holds


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is number `rank` of `size`. Number 0 leads: it alone writes the run folder and validates.

    `on_machine` of them share this machine's memory.
    """

    rank: int = 0
    size: int = 1
    on_machine: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of work that all could do."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Until all are here.

        Raises:
            LostRankError: one is gone.
        """
        self.agree(Stop.NO)

    def agree(self, wish: Stop) -> Stop:
        """One answer for all to what may be wished of one.

        Raises:
            LostRankError: one is gone.
        """
        if self.size == 1:
            return wish
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # so that the others, too, have computed when an exchange between devices begins
        wishes = torch.tensor(_STOPS.index(wish))
        self._exchange(lambda: dist.all_reduce(wishes, dist.ReduceOp.MAX))
        return _STOPS[int(wishes)]

    def all_gather_ints(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """What each process says, in their order; all say equally many numbers (64 bits, signed).

        Raises:
            LostRankError: one is gone.
        """
        if self.size == 1:
            return [tuple(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        of_all = [torch.zeros_like(own) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(of_all, own))
        return [tuple(each.tolist()) for each in of_all]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, equal to the last bit in each of them.

        Raises:
            LostRankError: one is gone.
        """
        if self.size == 1:
            return values
        through_host = values.is_cuda and not dist.is_nccl_available()
        total = values.cpu() if through_host else values.clone()
        self._exchange(lambda: dist.all_reduce(total))
        return total.to(values.device)

    def _exchange(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:  # torch.distributed's errors, of every backend
            raise LostRankError(
                f"Another of the {self.size} processes has ended or no longer answers ({_first_line(error)}). This is "
                f"process {self.rank}. The run is kept; start all of them again to go on from its last checkpoint."
            ) from error


SINGLE_PROCESS = Ranks()


@contextmanager
def joined_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that were started together; each takes the GPU of its place on its machine. `device` is the
    setting.

    Raises:
        ConfigError: several would compute on one GPU.
        LostRankError: the others can't be reached.
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
    ranks._exchange(lambda: dist.init_process_group(backend, timeout=TIMEOUT))
    yield ranks
    dist.destroy_process_group()  # not after an error: the others may be gone


def _own_gpu(device: str, size: int) -> int | None:
    """Number of the GPU of this one of `size` processes; None where they compute elsewhere."""
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"device is {device!r} with {size} processes, which would all compute there; allowed is auto or cuda, "
            "where each takes a GPU of its own, or cpu. Set device to auto."
        )
    if device == "cpu" or not torch.cuda.is_available():
        return None
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ConfigError(
            f"LOCAL_RANK is {place}, and GPUs on this machine are {count}; allowed is less than that, as each process "
            "takes one. Start as many processes as there are GPUs, or set device to cpu."
        )
    return place


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
