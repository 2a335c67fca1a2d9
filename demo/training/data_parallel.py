"""Two or more single-threaded processes that train one model together.

On a busy machine this is faster than threads inside one process: processes synchronise once a step,
threads once a matrix.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_parallel(task, size: int, *args) -> None:
    """Run `task(rank, *args)` in `size` processes that can `average`."""
    if size == 1:
        task(0, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{os.path.join(folder, 'meeting')}"
        mp.spawn(_member, (task, size, meeting, args), nprocs=size)


def _member(rank: int, task, size: int, meeting: str, args) -> None:
    torch.set_num_threads(1)
    wait = timedelta(minutes=30)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=wait)
    task(rank, *args)
    dist.destroy_process_group()


def average(weights: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; one that is missing counts as 0."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    if not dist.is_initialized():
        return
    flat = torch.cat([w.grad.flatten() for w in weights])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.grad.copy_(part.view_as(weight))


def broadcast(model: torch.nn.Module) -> None:
    """Give every process the weights of the first."""
    if dist.is_initialized():
        for weight in model.state_dict().values():
            dist.broadcast(weight, 0)


def rank_slice() -> slice:
    """Return the slice of a list that is this process's share of the work."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def all_reduce(tensors: list[torch.Tensor]) -> None:
    """Replace every tensor by its sum over the processes."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
