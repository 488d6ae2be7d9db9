"""Names of other concepts: what stands for "everything else" when one concept is unlearned."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from cu_runner.concepts.entries import comparable, read_file, read_shipped
from cu_runner.concepts.sequence import Concept
from cu_runner.request.language_model import ask, find_model
from cu_runner.request.scope import Scope
from cu_runner.request.token_limit import longer

MARKED = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NameSource:
    """Where names come from.

    source: "vocabulary" of the sequence, a "list" that ships with the package, a "file" of the
    user's with one name a line (or a whole prompt with the name in braces), or an "llm" that is
    asked for names related to the targets. name: which list, the path of the file, or the folder of
    the language model. number: how many names at most. retained: whether the retained concepts
    themselves may be among them (they are what RA-I measures).
    """

    source: Literal["vocabulary", "list", "file", "llm"] = "vocabulary"
    name: str | None = None
    number: PositiveInt = 200
    retained: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a source that cannot be read, before a diffusion model is loaded."""
        if self.source == "llm":
            find_model(self.name)
        elif self.source != "vocabulary":
            read_listed(self.source, self.name)


def read_listed(source: Literal["list", "file"], name: str | None) -> list[str]:
    """Read the entries of a shipped list or of a user's file. Raise ValueError."""
    return read_shipped(name) if source == "list" else read_file(name)


def normalized(name: str) -> str:
    """Return a name for comparison; of a prompt with one part in braces it is that part."""
    marked = MARKED.search(name)
    return comparable(marked[1] if marked else name)


def spellings(concepts: Iterable[Concept]) -> set[str]:
    """Return the labels and names of concepts for comparison."""
    return {
        normalized(name) for concept in concepts for name in (concept.name, concept.prompt_name)
    }


def mention(text: str, names: Iterable[str]) -> bool:
    """Tell whether a text holds one of the names as whole words, however they are spelt."""
    plain = " ".join(comparable(text).split())
    words = (" ".join(comparable(name).split()) for name in names)
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", plain) for word in words)


def earlier_targets(scope: Scope) -> list[str]:
    """Return what the weights had unlearned before this request, in order; as prompts name it."""
    return [concept.prompt_name for concept in earlier_concepts(scope)]


def earlier_concepts(scope: Scope) -> list[Concept]:
    """Return what the weights had unlearned before this request, in order."""
    targets = {concept.name for concept in scope.request.targets}
    return [concept for concept in scope.request.erased if concept.name not in targets]


def kept_names(scope: Scope, source: NameSource) -> list[str]:
    """Return all candidate names, in order, without the targets and the earlier ones.

    The retained concepts of both domains are left out too, unless the source lets them in.

    Raises:
        ValueError: the source cannot be read.
    """
    if source.source == "vocabulary":
        candidates = [scope.sequence.prompt_name(label) for label in scope.sequence.vocabulary]
    elif source.source == "llm":
        candidates = ask_for_names(scope, source.name, source.number)
    else:
        candidates = read_listed(source.source, source.name)
    banned = [*scope.request.targets, *scope.request.erased]
    if not source.retained:
        banned += [*scope.sequence.retain, *scope.sequence.cross_retain]
    shut = spellings(banned)
    return [name for name in candidates if normalized(name) not in shut]


def ask_for_names(scope: Scope, path: str | None, number: int) -> list[str]:
    """Ask a language model for names of the domain that are related to the targets.

    Those that are longer than the diffusion model reads are left out.
    """
    targets = [concept.prompt_name for concept in scope.request.targets]
    device = str(scope.model.device)
    names = ask(find_model(path), scope.sequence.domain, targets, number, device)
    cut = longer(scope.model, names)
    return [name for name in names if name not in cut]
