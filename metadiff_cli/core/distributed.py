"""Several processes that train together, on torch.distributed: gloo between CPUs, NCCL between GPUs.

A `Group` says which process this is and talks to the others; it is passed to whatever works together. All processes run
the same command. Random numbers are drawn for the whole batch in each process, and each takes its slice; a loss is the
mean over the whole batch; rank 0 decides, draws and writes. In a group of one process every method does nothing.
"""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from metadiff_cli.errors import ConfigError, MetaDiffError, ProcessLost, Told, exit_code

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them
JOIN = timedelta(minutes=10)  # for all processes to be there
STEP = timedelta(minutes=30)  # for a step of a training; after that a process counts as lost
WAIT = timedelta(hours=12)  # for what rank 0 does while the others wait, such as decoding a large data set
SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")  # in torch's messages

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Group:
    """Process `rank` of `world_size`, which is `local_rank` of `local_world_size` on its machine.

    `control` is a gloo group for small things, whatever the device; `store` holds what the processes agree on.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    control: Any = field(default=None, compare=False, repr=False)
    store: Any = field(default=None, compare=False, repr=False)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def on_rank_zero(self, work: Callable[[], Made]) -> Made:
        """Run `work` on rank 0 while the others wait; every process gets its result, or its MetaDiffError or OSError.

        The result is pickled, so its tensors have to be on the CPU.
        """
        if self.world_size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except (MetaDiffError, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.control)
        if told[1] is not None:
            raise told[1]
        made: Made = told[0]
        return made

    def broadcast(self, value: Item) -> Item:
        """The value of rank 0: computed on other hardware it may differ in its last bits. Tensors on the CPU only."""
        return self.on_rank_zero(lambda: value)

    def rank_zero_first(self, work: Callable[[], Made]) -> Made:
        """Run `work` on rank 0 and then on the others, which find on disk what rank 0 left there."""
        done: list[Made] = []
        self.on_rank_zero(lambda: done.append(work()))
        return done[0] if done else work()

    def check_equal(self, value: str, what: str) -> None:
        """Raise MetaDiffError unless all processes have the same `value`; `what` names it in the message."""
        if self.world_size == 1:
            return
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, (value, socket.gethostname()), group=self.control)
        for rank, (other, host) in enumerate(values):
            if other != values[0][0]:
                raise MetaDiffError(
                    f"{what} on {host} (rank {rank}) differ from those on {values[0][1]} (rank 0)",
                    hint="give all machines the same files, best on a shared file system",
                )

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every world_size-th item, from this process's rank on."""
        return items[self.rank :: self.world_size]

    def slice_of(self, count: int, what: str) -> slice:
        """The slice of `count` things that this process takes. Raises ConfigError when a process would have none."""
        if count < self.world_size:
            raise ConfigError(
                f"{what} is {count}, which {self.world_size} processes cannot share",
                hint=f"start at most {count}",
            )
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def weight_of(self, part: slice, count: int) -> float:
        """Weight of the mean over a slice of `count` things in the mean over the processes: 1 for equal slices."""
        length: int = part.stop - part.start
        return self.world_size * length / count

    def mean_(self, values: Tensor) -> Tensor:
        """Replace `values` by their mean over the processes; on a GPU nobody waits for it."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def data_parallel(self, loss: Callable[..., Made], *modules: nn.Module) -> Callable[..., Made]:
        """`loss` as a function after whose `backward` the modules' gradients are the means over the processes.

        All processes begin with the parameters of rank 0, and take its buffers, such as the statistics of BatchNorm,
        before each call.
        """
        return nn.parallel.DistributedDataParallel(_Loss(loss, modules)) if self.world_size > 1 else loss

    def mean_gradients_(self, module: nn.Module) -> None:
        """Replace gradients by their means over the processes, for losses that take them in several passes."""
        if self.world_size > 1:
            found = [p.grad for p in module.parameters() if p.grad is not None]
            flat = self.mean_(torch.cat([gradient.flatten() for gradient in found]))
            for gradient, mean in zip(found, torch.split(flat, [g.numel() for g in found]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def mean_buffers_(self, module: nn.Module) -> None:
        """Replace buffers, such as the running statistics of BatchNorm, by their means over the processes."""
        for buffer in module.buffers() if self.world_size > 1 else ():
            if buffer.is_floating_point():
                self.mean_(buffer)

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """The rows (B, ...) of each process, as many in each, for a loss that every process takes over all of them.

        Gradients reach the process's own rows. Each process has one of the equal losses, and counts it for all.
        """
        if self.world_size == 1:
            return [rows]
        found = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(found, rows.detach().contiguous())
        found[self.rank] = rows.view_as(rows)
        if rows.requires_grad:
            size = self.world_size
            found[self.rank].register_hook(lambda gradient: gradient * size)  # type: ignore[no-untyped-call]
        return found

    def is_first_to_fail(self) -> bool:
        """Whether no other process has told of an error yet: an error that all meet is shown once."""
        if self.store is None:
            return self.rank == 0
        try:
            return int(self.store.add("metadiff/errors", 1)) == 1
        except RuntimeError:  # the store has gone with the process that kept it
            return self.rank <= 1


SINGLE = Group()


def announced(environ: Mapping[str, str]) -> Group:
    """The group that the variables of torchrun announce. Raises ConfigError for numbers that make no sense."""
    if not all(environ.get(name) for name in NEEDED):
        return SINGLE
    try:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        group = Group(rank, size, int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", size)))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers ({error})", hint="use torchrun") from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} does not fit WORLD_SIZE={size}", hint="use torchrun")
    return group


@contextmanager
def joined(environ: Mapping[str, str]) -> Iterator[Group]:
    """Join the processes that torchrun announced, and leave them together in the end.

    An error is told by the first process that meets it; in the others it becomes `Told`. An error of torch that says
    that another process has gone becomes ProcessLost. Raises MetaDiffError when the processes do not find each other.
    """
    group = announced(environ)
    if group.world_size == 1:
        yield SINGLE
        return
    try:
        group = _connect(group)
        yield group
        group.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        if not group.is_first_to_fail():
            raise Told(exit_code(error)) from error
        if is_lost(error):
            raise process_lost(group, error, resumable=False) from error
        raise


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch says that another process cannot be reached any more."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS)


def process_lost(group: Group, error: BaseException, *, resumable: bool) -> ProcessLost:
    """The error to raise in place of one that `is_lost` knows."""
    here = f"rank {group.rank} of {group.world_size} on {socket.gethostname()}"
    return ProcessLost(f"another process of this run has ended ({here} noticed: {_line(error)})", resumable=resumable)


def _connect(group: Group) -> Group:
    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed", hint="start without torchrun")
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOIN))
        # each backend serves the tensors of its device; NCCL connects when the first one comes
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
        control = dist.new_group(backend="gloo", timeout=WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        raise MetaDiffError(
            f"rank {group.rank} of {group.world_size} on {socket.gethostname()} did not find the other processes "
            f"({_line(error)})",
            hint="check that the machines reach each other, and set GLOO_SOCKET_IFNAME if they have several networks",
        ) from error
    return Group(rank, size, group.local_rank, group.local_world_size, control, store)


def _line(error: BaseException) -> str:
    """The first sentence of an error, without the place in torch's source."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return text.split("] ", 1)[-1] if text.startswith("[") else text


class _Loss(nn.Module):
    """A loss as the module that DistributedDataParallel wants: it has the parameters, `forward` has the rest."""

    def __init__(self, loss: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.loss, self.parts = loss, nn.ModuleList(modules)

    def forward(self, *arguments: Any) -> Any:
        return self.loss(*arguments)
