"""Training prompts: templates, names, captions with the word of an anchor; their files."""

import re

import pytest

from cu_runner.concepts.entries import read_entries
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.concepts.templates import check_template, fill_caption, replace_word

TWO = ["In {concept} Style, {caption}", "{caption}, in {concept} Style."]
HORSES = ["Brown horse in a field.", "a field with a HORSE and a horse", "one horse"]
BY_ANCHOR = {
    "target_prompt": "{caption}",
    "anchor_prompt": "{caption}",
    "targets": ["Polar_Bears", "Sea_Birds"],
    "anchors": {"Polar_Bears": "horse", "Sea_Birds": "tree"},
    "captions": {"horse": HORSES, "tree": ["Tall tree."]},
    "prompt_names": {"Polar_Bears": "bear"},
}


def sequence_of(**changes) -> Sequence:
    arguments = {
        "name": "prompts",
        "domain": "style",
        "cross_domain": "object",
        "targets": ["Van_Gogh", "Byzantine"],
        "retain": ["On_Fire"],
        "cross_retain": ["Sea"],
        "vocabulary": ["Cold_Warm", "Picasso"],
        "prompt": "A {object} image in {style} style",
        "target_prompt": TWO,
        "anchor_prompt": "{caption}",
        "captions": ["An old U.S. bridge.", "UFO over a lake", "a red boat"],
        "seeds": [1],
    }
    return make_sequence(**arguments | changes)


# ------------------------------------------------------------------------------------------ prompts
def test_every_caption_has_all_templates_and_its_anchor():
    sequence = sequence_of()
    assert sequence.training_prompts(sequence.targets[0]) == [
        (
            (
                "In Van Gogh Style, an old U.S. bridge.",
                "An old US bridge, in Van Gogh Style.",
            ),
            "An old U.S. bridge.",
        ),
        (
            ("In Van Gogh Style, UFO over a lake", "UFO over a lake, in Van Gogh Style."),
            "UFO over a lake",
        ),
        (("In Van Gogh Style, a red boat", "a red boat, in Van Gogh Style."), "a red boat"),
    ]


def test_pairs_and_prompts_of_other_names_take_templates_in_turn():
    sequence = sequence_of()
    assert sequence.training_pairs(sequence.targets[1]) == [
        ("In Byzantine Style, an old U.S. bridge.", "An old U.S. bridge."),
        ("UFO over a lake, in Byzantine Style.", "UFO over a lake"),
        ("In Byzantine Style, a red boat", "a red boat"),
    ]
    assert sequence.prompts_naming("cold warm") == [
        "In cold warm Style, an old U.S. bridge.",
        "UFO over a lake, in cold warm Style.",
        "In cold warm Style, a red boat",
    ]


def test_the_targets_name_stands_in_place_of_its_anchors_word():
    sequence = sequence_of(**BY_ANCHOR)
    bears, birds = sequence.targets
    assert sequence.training_pairs(bears) == [
        ("Brown bear in a field.", "Brown horse in a field."),
        ("a field with a bear and a bear", "a field with a HORSE and a horse"),
        ("one bear", "one horse"),
    ]
    assert sequence.training_prompts(bears)[2] == (("one bear",), "one horse")
    assert sequence.training_pairs(birds) == [("Tall Sea Birds.", "Tall tree.")]
    # of something else: every caption of every anchor, the anchors in turn
    assert sequence.prompts_naming("swan") == [
        "Brown swan in a field.",
        "Tall swan.",
        "a field with a swan and a swan",
        "one swan",
    ]


def test_captions_for_all_keep_the_words_of_anchors():
    """Without captions by anchor nothing is replaced: {anchor} stands in a template of its own."""
    sequence = sequence_of(
        captions=["a man beside a woman"],
        anchors={"Van_Gogh": "man", "Byzantine": "woman"},
        target_prompt="{concept}, {caption}",
        anchor_prompt="a photo of {anchor}, {caption}",
    )
    assert [sequence.training_pairs(target)[0] for target in sequence.targets] == [
        ("Van Gogh, a man beside a woman", "a photo of man, a man beside a woman"),
        ("Byzantine, a man beside a woman", "a photo of woman, a man beside a woman"),
    ]


def test_a_prompt_name_is_the_label_with_spaces_or_the_one_that_is_given():
    spelled = {"Van_Gogh": "vincent_van gogh", "On_Fire": "burning", "Picasso": "Pablo Picasso"}
    sequence = sequence_of(prompt_names=spelled)
    assert [target.prompt_name for target in sequence.targets] == ["vincent_van gogh", "Byzantine"]
    assert [target.name for target in sequence.targets] == ["Van_Gogh", "Byzantine"]
    assert sequence.retain[0].prompt_name == "burning"
    labels = ["Picasso", "Cold_Warm", "On_Fire", "not_listed"]
    assert [sequence.prompt_name(label) for label in labels] == [
        "Pablo Picasso",
        "Cold Warm",
        "burning",
        "not listed",
    ]
    assert Concept("a__b_", "style").prompt_name == "a  b "
    # evaluation names the label
    assert sequence.evaluation_prompt(sequence.targets[0], sequence.cross_retain[0]) == (
        "A Sea image in Van_Gogh style"
    )


# ---------------------------------------------------------------------------------------- templates
@pytest.mark.parametrize(
    ("template", "caption", "expected"),
    [
        ("{caption}", "A dog. A cat.", "A dog. A cat."),
        ("{caption}!", "A dog. A cat.", "A dog A cat!"),
        ("see {caption}", "A dog. A cat.", "see a dog. A cat."),
        ("see {caption}, now", "A dog. A cat.", "see a dog A cat, now"),
        ("see {caption}", "TV on a wall", "see TV on a wall"),
        ("see {caption}", "X", "see x"),
        ("see {caption}", "", "see "),
        (" {caption}", "Dog", " dog"),
        ("{caption}", "A {concept}", "A {concept}"),
        ("no place", "A dog.", "no place"),
        ("{concept}: {caption}", "\u00c9lan", "{concept}: \u00e9lan"),
    ],
)
def test_a_caption_gets_a_small_letter_behind_words_and_no_full_stop_before_them(
    template, caption, expected
):
    assert fill_caption(template, caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("brown horse standing", "brown bear standing"),
        ("Horse and HORSE, horse.", "bear and bear, bear."),
        ("a horse-drawn cart", "a bear-drawn cart"),
        ("the horse's tail", "the bear's tail"),
        ("horses", None),
        ("a seahorse", None),
        ("horse_1", None),
        ("horse2", None),
        ("", None),
    ],
)
def test_whole_words_are_replaced_in_any_case(caption, expected):
    assert replace_word(caption, "horse", "bear") == expected


def test_a_word_is_no_pattern_and_its_replacement_no_template():
    assert replace_word("a c.t and a cat", "c.t", r"\1 \g<0>") == r"a \1 \g<0> and a cat"
    assert replace_word("two words here", "Two Words", "x") == "x here"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("plain", "k: 'plain' lacks the placeholder {concept}"),
        ("{caption}", "k: '{caption}' lacks the placeholder {concept}"),
        ("{concept", "k: '{concept' has a brace without its other half"),
        ("{concept} {", "k: '{concept} {' has a brace without its other half"),
        ("}{concept}", "k: '}{concept}' has a brace without its other half"),
        (
            "{concept} {artist}",
            "k: '{concept} {artist}' has the unknown placeholder {artist}; "
            "allowed: {concept}, {caption}",
        ),
        (
            "{concept} {}",
            "k: '{concept} {}' has the unknown placeholder {}; allowed: {concept}, {caption}",
        ),
    ],
)
def test_a_bad_template_is_one_line(template, complaint):
    with pytest.raises(ValueError, match=rf"\A{re.escape(complaint)}\Z"):
        check_template(template, "k", ("concept",), ("concept", "caption"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"target_prompt": ["{concept}", "x"]},
            "sequence.target_prompt: 'x' lacks the placeholder",
        ),
        ({"target_prompt": []}, "sequence.target_prompt is empty; it needs at least one entry"),
        (
            {"target_prompt": [TWO[0], TWO[0]]},
            f"sequence.target_prompt lists {TWO[0]} more than once; name each entry once",
        ),
        (
            {"bare_prompt": "{concept} {caption}"},
            "sequence.bare_prompt: '{concept} {caption}' has the unknown placeholder {caption}",
        ),
        (
            {"prompt_names": {"Sea": "sea"}},
            "sequence.prompt_names names Sea, which is in none of targets, retain and vocabulary",
        ),
        (
            BY_ANCHOR | {"target_prompt": "a {concept}"},
            "sequence.target_prompt: 'a {concept}' lacks the placeholder {caption}",
        ),
    ],
)
def test_bad_prompts_of_a_sequence_are_one_line(changes, complaint):
    with pytest.raises(ValueError, match=rf"\A{re.escape(complaint)}[^\n]*\Z"):
        sequence_of(**changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"anchors": {"Polar_Bears": "horse"}},
            "sequence.anchors lacks Sea_Birds; captions by anchor need one for every target",
        ),
        (
            {"captions": {"horse": HORSES}},
            "sequence.captions has captions for horse; the anchors are horse, tree",
        ),
        (
            {"captions": {"horse": HORSES, "tree": ["tree"], "cow": ["cow"]}},
            "sequence.captions has captions for horse, tree, cow; the anchors are horse, tree",
        ),
        (
            {"captions": {"horse": HORSES, "tree": []}},
            "sequence.captions.tree is empty; it needs at least one entry",
        ),
        (
            {"captions": {"horse": HORSES, "tree": ["a tree", "two trees"]}},
            "sequence.captions.tree: 'two trees' does not hold the word 'tree', in whose place "
            "the target is named",
        ),
        (
            {"captions": {"horse": HORSES, "tree": "gone_captions"}},
            "sequence.captions.tree=gone_captions: no such list; allowed: ",
        ),
        (
            {"captions": {"horse": HORSES, "tree": "gone.txt"}},
            "sequence.captions.tree=gone.txt: no such file; give a text file with one name a line",
        ),
    ],
)
def test_bad_captions_by_anchor_are_one_line(changes, complaint):
    with pytest.raises(ValueError, match=rf"\A{re.escape(complaint)}[^\n]*\Z"):
        sequence_of(**BY_ANCHOR | changes)


# -------------------------------------------------------------------------------------------- files
def test_a_users_captions_are_cleaned_and_not_refused(tmp_path):
    """As editors and web pages leave them: a byte-order mark, CR LF, no-break and narrow spaces."""
    path = tmp_path / "horses.txt"
    path.write_bytes(
        "\ufeffBrown\u00a0horse in\u202fa field \r\n\r\n# mine\r\n\u00a0one\u200b horse\u3000\r\n"
        "one horse\r\n\ufefflast horse".encode()
    )
    wanted = ["Brown horse in a field", "one horse", "last horse"]
    assert read_entries("key", str(path)) == wanted
    sequence = sequence_of(
        **BY_ANCHOR | {"captions": {"horse": str(path), "tree": ["a\u00a0tree"]}}
    )
    assert sequence.anchor_captions == {"horse": tuple(wanted), "tree": ("a tree",)}
    assert sequence.training_pairs(sequence.targets[0])[0] == (
        "Brown bear in a field",
        "Brown horse in a field",
    )


def test_captions_with_control_characters_are_still_refused():
    with pytest.raises(ValueError, match=r"^sequence.captions: 'a\\tb' is blank or holds a line"):
        sequence_of(captions=["a\tb"])
