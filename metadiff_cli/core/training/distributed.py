"""Several processes that do the work of one, on torch.distributed: gloo between CPUs, NCCL between GPUs.

All of them run the same command. What is drawn at random is drawn for the whole batch in each, and each takes its part;
losses are means over the whole batch; one process, the main one, decides, draws and writes. Everything here does
nothing where a process is alone.
"""

import socket
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from metadiff_cli.core.training.world import World, alone, world
from metadiff_cli.errors import ConfigError, MetaDiffError, ProcessLost

JOIN = timedelta(minutes=10)  # for all processes to be there
STEP = timedelta(minutes=30)  # for a step of a training; after that a process counts as lost
WAIT = timedelta(hours=12)  # for what others do alone, as to decode a large data set
SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")  # in torch's messages

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class _Group:
    """What processes talk through; `control` is a gloo group for small things, whatever the device."""

    store: Any
    control: Any


_GROUP: ContextVar[_Group | None] = ContextVar("group", default=None)


def start(found: World) -> None:
    """Join the other processes, by the variables that torchrun sets. Raises MetaDiffError when they are not found."""
    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed", hint="start without torchrun")
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOIN))
        # either backend is used with the tensors that it is for; NCCL connects when the first one comes
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
        control = dist.new_group(backend="gloo", timeout=WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        raise MetaDiffError(
            f"process {found.rank} of {found.size} on {socket.gethostname()} did not find the others ({_line(error)})",
            hint="check that the machines reach one another, and GLOO_SOCKET_IFNAME where they have several networks",
        ) from error
    _GROUP.set(_Group(store, control))


def stop() -> None:
    """Leave the other processes, when all have come here; after an error a process just ends."""
    if _GROUP.get() is not None:
        barrier()
        dist.destroy_process_group()
        _GROUP.set(None)


def barrier() -> None:
    """Wait until all processes are here."""
    if world().size > 1:
        dist.barrier(group=_control())


def on_main(work: Callable[[], Made]) -> Made:
    """The result, or the MetaDiffError or OSError, of what the main process does alone while the others wait."""
    if world().size == 1:
        return work()
    told: list[Any] = [None, None]
    if world().main:
        try:
            with alone():
                told[0] = work()
        except (MetaDiffError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0, group=_control())
    if told[1] is not None:
        raise told[1]
    made: Made = told[0]
    return made


def main_first(work: Callable[[], Made]) -> Made:
    """`work` done by the main process and then by the others, which find on disk what it left there."""
    done: list[Made] = []
    on_main(lambda: done.append(work()))
    return done[0] if done else work()


def same(value: Item) -> Item:
    """The main process's value: computed on other hardware it may differ in its last bits. Tensors on the CPU only."""
    return on_main(lambda: value)


def check_same(value: str, what: str) -> None:
    """Raises MetaDiffError unless all processes have the same value."""
    if world().size == 1:
        return
    values = _gathered((value, socket.gethostname()))
    for rank, (other, host) in enumerate(values):
        if other != values[0][0]:
            raise MetaDiffError(
                f"{what} on {host} (process {rank}) are not those on {values[0][1]}",
                hint="give all machines the same files, best on a file system that they share",
            )


def mine(items: Sequence[Item]) -> Sequence[Item]:
    """Every size-th of the items, which are dealt out like cards."""
    return items[world().rank :: world().size]


def gather_in_order(own: Sequence[Made]) -> list[Made]:
    """The results of all processes for items that `mine` dealt out, in the order of the items. They are pickled."""
    if world().size == 1:
        return list(own)
    hands = _gathered(list(own))
    return [hand[i] for i in range(len(hands[0])) for hand in hands if i < len(hand)]


def part_of(count: int, what: str) -> slice:
    """Which of `count` neighbouring things are this process's. Raises ConfigError when some would have none."""
    rank, size = world().rank, world().size
    if count < size:
        raise ConfigError(f"{what} is {count}, which {size} processes cannot share", hint=f"start at most {count}")
    return slice(rank * count // size, (rank + 1) * count // size)


def weight_of(part: slice, count: int) -> float:
    """What the mean over a part of `count` things weighs in the mean over the processes: 1 where parts are equal."""
    length: int = part.stop - part.start
    return world().size * length / count


def mean_of(values: Tensor) -> Tensor:
    """The mean over the processes, in the place of `values`; on a GPU it is not waited for."""
    if world().size > 1:
        dist.all_reduce(values)
        values /= world().size
    return values


def largest_of(number: int) -> int:
    """The largest of the processes' numbers."""
    if world().size == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_control())
    return int(value)


class _Loss(nn.Module):
    """A loss as the module that DistributedDataParallel wants: it has the parameters, `forward` has the rest."""

    def __init__(self, loss: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.loss, self.parts = loss, nn.ModuleList(modules)

    def forward(self, *arguments: Any) -> Any:
        return self.loss(*arguments)


def synchronised(loss: Callable[..., Made], *modules: nn.Module) -> Callable[..., Made]:
    """`loss` as a function after whose `backward` the gradients of the modules are the means over the processes.

    To begin with, all get the main process's parameters, and before each call its buffers, such as the statistics of
    BatchNorm.
    """
    return nn.parallel.DistributedDataParallel(_Loss(loss, modules)) if world().size > 1 else loss


def mean_gradients(module: nn.Module) -> None:
    """Gradients become their means over the processes, for losses that take them in several passes."""
    if world().size > 1:
        found = [p.grad for p in module.parameters() if p.grad is not None]
        flat = mean_of(torch.cat([gradient.flatten() for gradient in found]))
        for gradient, mean in zip(found, torch.split(flat, [g.numel() for g in found]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def mean_buffers(module: nn.Module) -> None:
    """Buffers, such as the running statistics of BatchNorm, become their means over the processes."""
    for buffer in module.buffers() if world().size > 1 else ():
        if buffer.is_floating_point():
            mean_of(buffer)


def all_rows(rows: Tensor) -> list[Tensor]:
    """The rows (B, ...) of each process, as many in each, for a loss that every process takes of all of them.

    Gradients go to the process's own rows. Each has but one of the equal losses for them, and counts it for all.
    """
    rank, size = world().rank, world().size
    if size == 1:
        return [rows]
    found = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(found, rows.detach().contiguous())
    found[rank] = rows.view_as(rows)
    if rows.requires_grad:
        found[rank].register_hook(lambda gradient: gradient * size)  # type: ignore[no-untyped-call]
    return found


def speaks() -> bool:
    """Whether this process tells the person of the error that it met: the first that asks, or the main one."""
    group = _GROUP.get()
    if group is None:
        return world().main
    try:
        return int(group.store.add("metadiff/errors", 1)) == 1
    except RuntimeError:  # the store has gone with the process that kept it
        return world().rank <= 1


def lost(error: BaseException) -> bool:
    """Whether an error of torch says that another process cannot be reached any more."""
    if world().size == 1 or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS)


def process_lost(error: BaseException, *, resumable: bool) -> ProcessLost:
    """The error to raise instead of one that `lost` knows."""
    here = f"process {world().rank} of {world().size} on {socket.gethostname()}"
    return ProcessLost(f"another process of this run has ended ({here} noticed: {_line(error)})", resumable=resumable)


def _line(error: BaseException) -> str:
    """The first sentence, without the place in torch's source where it stands."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return text.split("] ", 1)[-1] if text.startswith("[") else text


def _gathered(value: Item) -> list[Item]:
    """The value of each process."""
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value, group=_control())
    return values


def _control() -> Any:
    group = _GROUP.get()
    assert group is not None
    return group.control
