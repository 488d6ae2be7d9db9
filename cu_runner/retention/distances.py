"""Distances of two sets of image features, by torchmetrics: FID and KID.

Shapes: N, M images, D feature width.
"""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS = 100  # random subsets that KID is averaged over, as published


class Given(nn.Module):
    """Features that are computed already, where torchmetrics asks for a network for them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features


def frechet_distance(reference: Tensor, features: Tensor) -> float:
    """Return the FID of features [N, D] and [M, D]."""
    # ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)   (Heusel et al. 2017, eq. 6)
    metric = FrechetInceptionDistance(Given(features.shape[1]))
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


def kernel_distance(reference: Tensor, features: Tensor, subset: int) -> float:
    """Return the KID of features [N, D] and [M, D] over random subsets, the same at every call.

    It is the squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), unbiased, so that
    equal distributions give numbers around zero, also below.
    """
    size = min(subset, len(reference), len(features))
    metric = KernelInceptionDistance(
        Given(features.shape[1]), subsets=KID_SUBSETS, subset_size=size
    )
    # cubes of large features need the precision
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return metric.compute()[0].item()
