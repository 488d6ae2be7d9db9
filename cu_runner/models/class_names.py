"""Prompts of a class-conditional model: the names of its classes, and nothing else.

Shapes: B batch.
"""

from __future__ import annotations

from cu_runner.concepts.entries import comparable
from cu_runner.models.text import Text, TextSource
from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import ModelError

SHOWN = 10  # classes that a line names


class ClassNames(TextSource):
    """Numbers of classes, in the place of texts.

    The empty prompt is the null class, by which classifier-free guidance is trained (Ho & Salimans
    2022), where the model has one: it is the last.
    """

    reads_words = False

    def __init__(self, names: tuple[str, ...], null: bool, device: torch.device) -> None:
        """Take the names in the order of the model's classes.

        Args:
            null: whether the model has one class more, the null class.
        """
        self._numbers = {comparable(name): number for number, name in enumerate(names)}
        self._names, self._null, self._device = names, null, device

    def __call__(self, prompts: list[str]) -> Text:
        """Return the numbers [B] of the classes that the prompts name. Raises ModelError."""
        numbers = [self.number_of(prompt) for prompt in prompts]
        return Text(torch.tensor(numbers, dtype=torch.long, device=self._device))

    def number_of(self, prompt: str) -> int:
        """Return the number of the class that a prompt names; "" is the null class.

        Raises:
            ModelError: there is no such class.
        """
        if prompt == "":
            if self._null:
                return len(self._names)
            raise ModelError(
                "the model has no null class, and guidance and what else reads the empty prompt "
                f"need one: the UNet has {len(self._names)} classes (num_class_embeds), all of "
                "them named by model.classes; use model.sampler.guidance=1, and a method that "
                "compares classes"
            )
        number = self._numbers.get(comparable(prompt))
        if number is None:
            more = f", ... ({len(self._names)} in all)" if self._names[SHOWN:] else ""
            raise ModelError(
                f"the model has no class {prompt!r}; a prompt is the name of one of its classes: "
                f"{', '.join(self._names[:SHOWN])}{more}"
            )
        return number

    def encode_empty(self) -> Text:
        """Return the null class."""
        return self([""])

    def cut(self, prompts: list[str]) -> set[str]:
        """Return nothing: a name is read whole. Raises ModelError for what names no class."""
        for prompt in prompts:
            self.number_of(prompt)
        return set()

    def alike(self, one: str, other: str) -> bool:
        """Tell whether two prompts name one class."""
        return self.number_of(one) == self.number_of(other)
