"""Prompt templates: text with {names} in braces, filled by replacing them, never as a format."""

from __future__ import annotations

import re
from collections.abc import Iterable

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def fill(template: str, **values: str) -> str:
    """Put values in the places of their names; what has no value stays as it is."""
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)


def fill_caption(template: str, caption: str) -> str:
    """Put a caption into the place of {caption}, as the released code joins them.

    One that stands behind other words begins with a small letter (unless its first word has more
    capitals), one that other words follow loses its full stops.
    """
    before, found, after = template.partition("{caption}")
    if not found:
        return template
    if before and not caption[1:2].isupper():
        caption = caption[:1].lower() + caption[1:]
    if after:
        caption = caption.replace(".", "")
    return before + caption + after


def replace_word(caption: str, word: str, other: str) -> str | None:
    """Put another word in every place of a whole word, whatever its case; None where it is not."""
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    replaced, count = re.subn(pattern, lambda _: other, caption, flags=re.IGNORECASE)
    return replaced if count else None


def caption_in(template: str, text: str) -> str | None:
    """Return what stands in the place of {caption} in a text that is like a template.

    None where it is not like it, or the template has no {caption}. Case and full stops make no
    difference, as fill_caption() changes both.
    """
    before, found, after = template.partition("{caption}")
    pattern = rf"{re.escape(before)}(.+?){re.escape(after)}[.\s]*"
    match = re.fullmatch(pattern, text.strip(), flags=re.IGNORECASE) if found else None
    return match[1].strip() if match else None


def check_template(template: str, key: str, needed: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError unless a template holds what it needs, and besides only what is known."""
    found, needed = PLACEHOLDER.findall(template), list(needed)
    allowed = list(dict.fromkeys([*needed, *known]))
    if "{" in (rest := PLACEHOLDER.sub("", template)) or "}" in rest:
        raise ValueError(f"{key}: {template!r} has a brace without its other half")
    if strange := [name for name in found if name not in allowed]:
        raise ValueError(
            f"{key}: {template!r} has the unknown placeholder {{{strange[0]}}}; allowed: "
            + ", ".join(f"{{{name}}}" for name in allowed)
        )
    if missing := [name for name in needed if name not in found]:
        listed = ", ".join(f"{{{name}}}" for name in missing)
        raise ValueError(f"{key}: {template!r} lacks the placeholder {listed}")
