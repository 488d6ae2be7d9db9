"""What the UNet read in the step before, so that no image is made twice.

An image is made from its noise, the weights, and keys and values of its prompt and of the empty
one. Where a request changes gates alone, the weights are the same, and most texts open none of
those that changed: their keys and values are the same to the last bit, and so are their images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.evaluators.metrics import measured_by, read_predictions, shown_in
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.text_readers import TextReaders
from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.runtime.devices import device_name
from cu_runner.runtime.lazy import pd, without_gradients
from cu_runner.store.layout import PREDICTIONS
from cu_runner.store.records import StepRecord


@dataclass(frozen=True)
class Before:
    """A step. folder: with its grid. predictions: one row per image. read: readings of them."""

    folder: Path
    predictions: pd.DataFrame
    read: dict[str, str]

    @staticmethod
    def of(
        model: DiffusionModel, folder: Path, record: StepRecord, code: CodeIdentity
    ) -> Before | None:
        """Take note of a step whose weights are in place; None if another device or code made it.

        Args:
            code: that makes the next step.
        """
        if record.code.sha256 != code.sha256 or record.device != device_name(model.device):
            return None
        predictions = read_predictions(folder / PREDICTIONS)
        return Before(folder, predictions, readings(model, list(predictions["prompt"])))

    def changed(
        self, model: DiffusionModel, sequence: Sequence, concepts: list[Concept]
    ) -> list[Concept]:
        """Return the concepts that were not measured there, or one of whose prompts is read
        otherwise now.
        """
        prompts = {
            concept.name: [image.prompt for image in sequence.evaluation_images([concept])]
            for concept in concepts
        }
        now = readings(model, [prompt for own in prompts.values() for prompt in own])
        if now[""] != self.read[""]:
            return concepts
        measured = set(shown_in(self.predictions, measured_by(sequence))[0])
        return [
            concept
            for concept in concepts
            if concept.name not in measured
            or any(now[prompt] != self.read.get(prompt) for prompt in prompts[concept.name])
        ]


@without_gradients
def readings(model: DiffusionModel, prompts: list[str]) -> dict[str, str]:
    """Return, by prompt, a digest of all keys and values of its text; of the empty prompt too."""
    readers = TextReaders(model.denoiser)
    with model.autocast():
        return {
            prompt: readers.digests(model.encode_prompts([prompt]).hidden)[0]
            for prompt in dict.fromkeys(["", *prompts])
        }
