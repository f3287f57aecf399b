"""The processes of a run, which torchrun or ``accelerate launch`` started: sums over them, and agreement."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GROUP = 2**24  # elements that are reduced together: 64 MiB in float32
PATIENCE = timedelta(hours=12)  # for one process to validate while the others wait
APART = timedelta(minutes=1)  # by which processes leave one block at different times
ENDED = "Another process of this run has ended or does not answer. Continue from the last checkpoint with --resume."
EXCHANGE = re.compile("gloo|NCCL|Connection (closed|reset)|Broken pipe")  # in errors of torch's collectives
T = TypeVar("T")


class SharedError(UserError):
    """An error of one process that all of them raise, so that none waits for it; process 0 shows it."""


class ProcessEnded(UserError):
    """Another process has ended. What this one was doing is not at fault, so a text about that is left out."""

    def __init__(self, text: str = ENDED) -> None:
        super().__init__(ENDED)


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes. ``host`` is their group for messages between hosts (gloo),
    which also waits for a long validation; None is the default group. ``mesh`` is what networks are split over."""

    rank: int = 0
    size: int = 1
    host: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes."""
        self.sum_(tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor /= self.size

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes. They are reduced in groups of at most ``GROUP`` elements,
        which bounds the memory of the copies."""
        if self.size == 1:
            return
        for group in _groups(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with _reaching_others():
                dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        with _reaching_others():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.host)
        return bool(flags)

    def total(self, number: int) -> int:
        """The sum of a number over the processes."""
        numbers = torch.tensor(number)
        if self.size > 1:
            with _reaching_others():
                dist.all_reduce(numbers, group=self.host)
        return int(numbers)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _reaching_others():
            dist.all_gather_object(values, value, group=self.host)
        return values

    def gather_if_different(self, value: T) -> list[T]:
        """The values of all processes, by rank; this process's alone where all are alike, which is soon found out."""
        mark = zlib.crc32(repr(value).encode())
        marks = torch.tensor([mark, -mark])
        with _reaching_others():
            dist.all_reduce(marks, dist.ReduceOp.MAX, group=self.host)
        return [value] if marks[0] == -marks[1] else self.gather(value)

    def require_same(self, values: Mapping[str, object]) -> None:
        """Raises ``UserError`` in all processes if a named value of one differs from that of the first process."""
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, start=1):
            names = [name for name in (*first, *other) if first.get(name) != other.get(name)]
            if names:
                name, more = names[0], len(set(names)) - 1
                also = f", and in {more} other value{'s' * (more > 1)}" if more else ""
                raise SharedError(
                    f"Process {rank} of this run differs from process 0 in its {name}: {other.get(name)}, not "
                    f"{first.get(name)}{also}. Start all processes with the same settings, files and versions."
                )

    @contextmanager
    def together(self, *, exchanging: bool = False) -> Iterator[None]:
        """Raises an error of the block in all processes when all have left it, instead of leaving some waiting. In a
        block that is ``exchanging`` values itself others may wait for a process with an error: it waits only ``APART``
        for them to leave the block, and then ends alone, which ends them."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if exchanging and self.size > 1:
            try:
                dist.monitored_barrier(self.host, PATIENCE if error is None else APART)
            except RuntimeError:
                if error is not None:
                    raise error from None
        texts = self.gather(error and _described(error))
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if self.size == 1 and error is not None:
            raise error
        if failed:
            rank, text = failed[0]
            raise SharedError(text if rank == 0 else f"Process {rank}: {text}") from error

    def once(self, function: Callable[[], T]) -> T:
        """Runs a function in process 0 while the others wait; returns its result, or raises its error, in all."""
        result: list[T] = []
        with self.together():
            if self.rank == 0:
                result.append(function())
        return self.gather(result)[0][0]


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type with at most ``GROUP`` elements together; a larger one is alone."""
    group: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in group) + tensor.numel() > GROUP
        if group and (full or tensor.dtype != group[0].dtype):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _described(error: Exception) -> str:
    """The text of an error, with its kind if it is unexpected: that of a KeyError is a name alone."""
    return str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error} (unexpected)"


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Names the cause of a failed exchange: another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessEnded from error


@contextmanager
def naming_ended_processes(world: World) -> Iterator[None]:
    """The same for the exchanges of split networks, which torch starts, by the text of the error."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not EXCHANGE.search(str(error)):
            raise
        raise ProcessEnded from error


SINGLE_PROCESS = World()


def have_met() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def join_world(name: str = "auto") -> tuple[World, torch.device]:
    """Joins the processes that torchrun or ``accelerate launch`` started; returns rank and number, and the device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS, pick_device(name)
    from accelerate import PartialState  # slow to import
    from torch.distributed.device_mesh import init_device_mesh

    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available())
    host = dist.new_group(backend="gloo", timeout=PATIENCE)
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    return World(state.process_index, state.num_processes, host, mesh), state.device
