"""Which GPU "cuda" means."""

import torch


def exact_device(device: torch.device | str) -> torch.device:
    """`device` with its index: without one it would mean another GPU whenever another becomes the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
