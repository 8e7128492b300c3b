"""Which process this is of those that one command runs in: the only one, unless torchrun or the like began several.

`core/parallel.py` lets them work together. This module loads nothing, so that the screen may ask it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from metadiff_cli.errors import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, on its machine `local_rank` of `local_size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that draws and writes."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """How such processes are begun; the part of a command line that stands before the command."""
        if self.size == 1:
            return "metadiff"
        machines = self.size // max(1, self.local_size)
        several = f" --nnodes {machines} ..." if machines > 1 else ""
        return f"torchrun{several} --nproc-per-node {self.local_size} -m metadiff_cli"


ALONE = World()
_WORLD: ContextVar[World] = ContextVar("world", default=ALONE)


def world() -> World:
    """This process among those that work together at present."""
    return _WORLD.get()


def enter(found: World) -> None:
    """From now on this process is one of several; ALONE ends that."""
    _WORLD.set(found)


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process works as if there were no others, which wait for it meanwhile."""
    before = _WORLD.set(ALONE)
    try:
        yield
    finally:
        _WORLD.reset(before)


def announced(environ: Mapping[str, str]) -> World:
    """What the variables of torchrun say. Raises ConfigError when they cannot be."""
    if not all(environ.get(name) for name in NEEDED):
        return ALONE
    try:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        found = World(rank, size, int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", size)))
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK are numbers ({error})", hint="start with torchrun"
        ) from None
    if not 0 <= found.rank < found.size:
        raise ConfigError(f"process RANK={rank} of WORLD_SIZE={size} cannot be", hint="start with torchrun")
    return found
