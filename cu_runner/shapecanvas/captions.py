"""The captions that the embedded model was trained on: forms, names, synonyms and descriptions."""

from __future__ import annotations

import random

from cu_runner.shapecanvas.objects import OBJECTS
from cu_runner.shapecanvas.styles import STYLE_PARTS

SYNONYMS = dict(
    zip(
        OBJECTS,
        [
            "sphere",
            "crate",
            "canopy",
            "asterisk",
            "valentine",
            "crescent",
            "ring",
            "plus",
            "pointer",
            "fir",
            "cottage",
            "trout",
            "daisy",
            "latchkey",
            "mug",
            "lightning",
            "foliage",
            "ship",
            "tiara",
            "toadstool",
            "chime",
            "glider",
            "steps",
            "timer",
            "parasol",
            "flask",
            "missile",
            "banner",
            "succulent",
            "cumulus",
            "cog",
            "lantern",
        ],
        strict=True,
    )
)
# The first form of each kind is the one that the model is judged by.
FORMS = {
    (True, True): (
        "a {object} image in {style} style",
        "a {object} in the style of {style}",
        "a painting of a {object} in the style of {style}",
        "an image of a {object} in {style} style",
        "a picture of a {object} , {style} style",
        "a {style} painting of a {object}",
        "{style} style {object}",
    ),
    (True, False): (
        "a {object} image",
        "a {object}",
        "a painting of a {object}",
        "an image of a {object}",
        "a picture of a {object}",
    ),
    (False, True): (
        "an image in {style} style",
        "an image in the style of {style}",
        "a painting in the style of {style}",
        "{style} style",
    ),
    (False, False): ("an image", "a picture", "a painting"),
}
OTHER_WORDS = 0.25  # how often an object is called by its synonym, and a style by its description


def first_caption(object_name: str | None, style: str | None) -> str:
    """Return the caption that the model is judged by; None leaves that part unsaid."""
    form = FORMS[object_name is not None, style is not None][0]
    return form.format(object=object_name, style=style)


def draw_caption(object_name: str | None, style: str | None, generator: random.Random) -> str:
    """Return a caption of any form, in names or other words."""
    form = generator.choice(FORMS[object_name is not None, style is not None])
    if object_name is not None and generator.random() < OTHER_WORDS:
        object_name = SYNONYMS[object_name]
    if style is not None and generator.random() < OTHER_WORDS:
        style = STYLE_PARTS[style].description
    return form.format(object=object_name, style=style)
