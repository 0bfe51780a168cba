"""Which ranks work together."""

from typing import Any, NamedTuple

from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# a process group, a mesh with one dimension, or None for all ranks.
Group = dist.ProcessGroup | DeviceMesh | None


class Ranks(NamedTuple):
    """A process group, this process's rank in it, and how many ranks it has."""

    group: dist.ProcessGroup
    rank: int
    size: int


def ranks_of(group: Group) -> Ranks:
    """The ranks of a group.

    Raises TypeError for anything else and ValueError for a mesh of several dimensions, for a group that this process is
    not in, and without torch.distributed.init_process_group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: expected torch.distributed.init_process_group to have been called")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: expected a mesh of one dimension, got one of {list(group.shape)}")
        group = group.get_group()
    elif group is None:
        group = dist.group.WORLD
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that this process is in, got one that it is not in")
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a group that this process is in, got one that it is not in")
    return Ranks(group, rank, dist.get_world_size(group))


def check_local(**tensors: Any) -> None:
    """That none is a DTensor: what is split here is said by the group, and each rank passes its own part."""
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            raise TypeError(f"{name}: expected a plain tensor, this rank's part, got a DTensor; pass its to_local()")
