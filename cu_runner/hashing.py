"""What a network is, as a hash."""

import hashlib

import torch
from torch import nn


def hash_weights(digest: "hashlib._Hash", network: nn.Module) -> None:
    """Feed every weight and buffer of a network to a hash, each with its name."""
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
