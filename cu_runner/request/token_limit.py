"""Whether what prompts name is among the tokens that the model reads of them.

A prompt that is longer is cut: the concept may be gone then, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Iterable

from cu_runner.concepts.sequence import Sequence
from cu_runner.models.diffusion import DiffusionModel


def check_prompts(model: DiffusionModel, sequence: Sequence) -> None:
    """Check every training prompt of a target and its anchor, and every evaluation prompt.

    Raises:
        ValueError: the name of a concept or an anchor is cut off, or a target's prompt and its
            anchor's are the same to the model.
    """
    if sequence.parts:
        for own in sequence.by_domain:
            check_prompts(model, own)
        return
    named: list[tuple[str, str]] = []
    for target in sequence.targets:
        for prompts, wanted in sequence.training_prompts(target):
            named += [(target.prompt_name, prompt) for prompt in prompts]
            named += [(target.anchor, wanted)] if target.anchor else []
    spelled = {concept.name: concept.prompt_name for concept in sequence.cross_retain}
    spelled |= {each.name: each.prompt_name for each in (*sequence.targets, *sequence.retain)}
    for image in sequence.evaluation_images([*sequence.targets, *sequence.retain]):
        for name in filter(None, (image.concept, image.cross)):
            named += [(name, image.prompt), (spelled.get(name, name), image.prompt)]
    check_read(model, named)
    for target in sequence.targets:
        pairs = sequence.training_pairs(target)
        cut = longer(model, [text for pair in pairs for text in pair])
        # what is not cut is alike for all captions or for none
        for pair in [pairs[0], *(pair for pair in pairs if cut.intersection(pair))]:
            if model.prompts.alike(*pair):
                raise ValueError(
                    f"the model reads the prompt of {target.name} and that of its anchor alike, so "
                    f"that nothing can be unlearned: {pair[0]!r} and {pair[1]!r}; name another "
                    "anchor, or shorten the prompts"
                )


def check_read(model: DiffusionModel, named: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError for a name that is not wholly among the tokens that are read of its prompt.

    Args:
        named: (name, prompt). A name that the prompt does not hold is left alone.
    """
    distinct = list(dict.fromkeys(named))
    cut = longer(model, [prompt for _, prompt in distinct])
    for name, prompt in distinct:
        if prompt in cut:
            # the part that reads most
            part = max(model.prompts.parts, key=lambda each: each.length)
            if part.find(name, prompt) is not None:
                part.span(name, prompt)


def longer(model: DiffusionModel, prompts: list[str]) -> set[str]:
    """Return the prompts of which the model does not read every token."""
    return model.prompts.cut(prompts)
