"""Joining the process group that torchrun describes: a GPU a process with NCCL, or the CPU with gloo."""

import os

import torch
import torch.distributed as dist


def join() -> torch.device:
    """Initialise the default group; return this rank's device, made the current one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device
