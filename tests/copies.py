"""A descriptor for copy detection in miniature, and folders of references."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn


class MeanColour(nn.Module):
    """Describes an image by its mean colour: cosines can be worked out by hand."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


PLAIN = ["evaluator.mean=[0,0,0]", "evaluator.std=[1,1,1]", "evaluator.size=16"]


def make_descriptor(folder: Path) -> Path:
    """A TorchScript file of MeanColour."""
    file = folder / "colour.torchscript.pt"
    torch.jit.script(MeanColour()).save(file)
    return file


def make_references(folder: Path, colours: dict[str, list[str]]) -> Path:
    """A folder with a folder per concept, which holds a picture per colour, wider than high."""
    for concept, names in colours.items():
        (folder / concept).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (24, 20), name).save(folder / concept / f"{name.strip('#')}.png")
    return folder
