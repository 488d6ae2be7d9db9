"""Lists, prompts and names as people, editors and spreadsheets write them: read as they look, or
refused by file and line.
"""

import re
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from conftest import SMOKE, compose, read_conf

from cu_runner.concepts.entries import comparable, read_entries
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.compose import parse
from cu_runner.evaluators.evaluate import check_labels
from cu_runner.evaluators.labels import read_labels
from cu_runner.methods.conabl import ConAbl
from cu_runner.recovery.paraphrase import Paraphrase
from cu_runner.request.name_sources import NameSource, kept_names
from cu_runner.retention.general import read_images

COMPOSED = "\u00e9t\u00e9"
DECOMPOSED = normalize("NFD", COMPOSED)
EMOJI = "\U0001f468\u200d\U0001f680"  # two, and a joiner


def sequence_with(**changes):
    return make_sequence(**read_conf("sequence/smoke.yaml") | changes)


# ----------------------------------------------------------------------------------- lists of names
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("\ufeffa\nb\n".encode(), ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\rb\r", ["a", "b"]),
        ("a\u00a0b\n c\u3000\n".encode(), ["a b", "c"]),
        ("a\u200bb\nc\u2060\nd\u00ade\n".encode(), ["ab", "c", "de"]),
        (f"{DECOMPOSED}\n".encode(), [COMPOSED]),
        (f"{DECOMPOSED}\n{COMPOSED}\n".encode(), [COMPOSED]),
        (b"\n# a list\na\n\nb\na\n", ["a", "b"]),
        (b'a, b\nc=d\n"e"\nf\'s\n', ["a, b", "c=d", '"e"', "f's"]),
        (f"{EMOJI}\n".encode(), [EMOJI]),
        (b"on\nno\n1e-5\n010\n", ["on", "no", "1e-5", "010"]),
    ],
)
def test_a_list_is_read_as_it_looks(tmp_path, content, wanted):
    (tmp_path / "names.txt").write_bytes(content)
    assert read_entries("key", str(tmp_path / "names.txt")) == wanted
    assert NameSource("file", str(tmp_path / "names.txt")).name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb".encode("utf-16"), "line 1 is no text in UTF-8; save the file in that encoding"),
        ("a\nb".encode("utf-16-le"), "line 1 holds the character NUL; save the file as text"),
        ("a\nb\nZo\u00eb\n".encode("latin-1"), "line 3 is no text in UTF-8"),
        ("a\r\nb\r\nZo\u00eb\r\n".encode("cp1252"), "line 3 is no text in UTF-8"),
        ("a\rb\rZo\u00eb\r".encode("latin-1"), "line 3 is no text in UTF-8"),
        (b"a\nb\0c\n", "line 2 holds the character NUL"),
        (b"a\n1\tb\n", r"line 2 holds the control character '\t'; take it out"),
        (b"\n# nothing\n", "holds no names; give at least one, one a line"),
        (b"", "holds no names"),
    ],
)
def test_a_list_is_refused_by_its_line(tmp_path, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^key={path}: {re.escape(message)}[^\n]*$"):
        read_entries("key", str(path))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a\nb\na\n", "a stands for two outputs, 0 and 2; labels must differ"),
        (f"{DECOMPOSED}\nb\n{COMPOSED}\n", f"{COMPOSED} stands for two outputs, 0 and 2"),
        ("a\n", "1 labels; two are the least"),
        (["a", "\u200b", "b"], "output 1 has no label; give every output one"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, message):
    if isinstance(labels, str):
        (tmp_path / "labels.txt").write_text(labels, encoding="utf-8")
        labels = str(tmp_path / "labels.txt")
    with pytest.raises(ValueError, match=f"^key: {message}"):
        read_labels("key", labels)


# ---------------------------------------------------------------------------------------- CSV files
NEEDED = ("prompt", "seed")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("\ufeffprompt,seed\r\na,1\r\n".encode(), [("a", "1")]),
        (b"prompt,seed\ra,1\rb,2\r", [("a", "1"), ("b", "2")]),
        (b"case_number,prompt,evaluation_seed\n0,a,7\n1,b,8\n", [("a", "7"), ("b", "8")]),
        (b"seed,prompt\n1,a\n", [("a", "1")]),
        ("\u00a0prompt\u00a0, seed\n a\u00a0b ,\u00a07\n".encode(), [("a b", "7")]),
        (b"prompt,seed,,\na,1,,\nb,2,,\n", [("a", "1"), ("b", "2")]),
        (b"prompt,seed\na,1,\nb,2,,\n", [("a", "1"), ("b", "2")]),
        (b'prompt,seed\n"a, b\r\nc",1\n"d ""e""",2\n', [("a, b c", "1"), ('d "e"', "2")]),
        (b"prompt,seed\n\na,1\n\n", [("a", "1")]),
        (b"prompt,seed\na,007\na,8\n", [("a", "7"), ("a", "8")]),
        (f"prompt,seed\n{DECOMPOSED} {EMOJI},1\n".encode(), [(f"{COMPOSED} {EMOJI}", "1")]),
        (b"prompt,seed\n'a'=b,1\nno,2\n1e-5,3\n010,4\n", None),
    ],
)
def test_prompts_are_read_as_they_look(tmp_path, content, wanted):
    (tmp_path / "mine.csv").write_bytes(content)
    rows = read_prompts("key", str(tmp_path / "mine.csv"), NEEDED, distinct=NEEDED)
    wanted = wanted or [("'a'=b", "1"), ("no", "2"), ("1e-5", "3"), ("010", "4")]
    assert [(row["prompt"], row["seed"]) for row in rows] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,seed\na,1\n".encode("utf-16"), "line 1 is no text in UTF-8"),
        ("prompt,seed\na,1\n".encode("utf-16-be"), "line 1 holds the character NUL"),
        ("prompt,seed\nZo\u00eb,1\n".encode("latin-1"), "line 2 is no text in UTF-8"),
        (b"prompt,seed\na,1\nb\0,2\n", "line 3 holds the character NUL"),
        (b"prompt,seed\na,1\nb\x07,2\n", r"line 3 holds the control character '\x07'"),
        (b"prompt,seed,prompt\na,1,b\n", "has two columns prompt; remove or rename one"),
        (b"prompt,seed,seed\na,1,2\n", "has two columns seed"),
        (b"prompt,seed,evaluation_seed\na,1,2\n", "has the columns seed and evaluation_seed"),
        (b"prompt,Seed\na,1\n", "the column Seed is not read; call it seed, or remove it"),
        (b"prompt;seed\na;1\n", "the column prompt;seed is not read"),
        (b"prompt,seed,\na,1,\nb,2,x\n", "line 3 has a field in a column without a name"),
        (b"prompt,seed\na,b,1\n", "line 2 has another number of fields than the header"),
        (b"prompt,seed\n\na\n", "line 3 has another number of fields"),
        (b'prompt,seed\n"a\nb",1\nc,x\n', "line 4: seed 'x' is no whole number from 0 on"),
        (b"prompt,seed\na,1.0\n", "line 2: seed '1.0' is no whole number"),
        pytest.param(
            b"prompt,seed\na," + b"9" * 5000 + b"\n", "line 2: seed '9999", id="of 5000 digits"
        ),
        (b"prompt,seed\na,1\n,\n", "line 3 has no prompt"),
        (b'prompt,seed\na,1\n"b,2\n', "line 3 cannot be read as CSV (unexpected end of data)"),
        (b"prompt,seed\na,1\nb,1\na,01\n", "line 4: 'a' is there twice with all that makes an"),
        (b"seed\n1\n", "has no column prompt; needed: prompt, seed"),
        (b"", "has no column prompt"),
        (b"prompt,seed\n", "holds no row below its header"),
    ],
)
def test_prompts_are_refused_by_their_line(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^key={path}: {re.escape(message)}[^\n]*$"):
        read_prompts("key", str(path), NEEDED, distinct=NEEDED)


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "mine.csv").write_text("prompt,seed,guidance,id,\na,1,7.5,0,\n")
    with caplog.at_level("INFO", "cu_runner.concepts"):
        read_prompts("key", str(tmp_path / "mine.csv"), ("prompt",), more=("id",))
    assert caplog.messages == [f"{tmp_path}/mine.csv: not read of it: guidance"]


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ("prompt,evaluation_seed\na,1\nb,1\na,1\n", [0], r"mine.csv: line 4: 'a' is there twice"),
        ("prompt\na\nb\na\n", [0], r"mine.csv: line 4: 'a' is there twice"),
        (["a", "b", "a"], [0], "^retention.prompts lists a more than once"),
        (["a", "b"], [3, 3], "^retention.seeds lists 3 more than once"),
    ],
)
def test_general_prompts_make_no_image_twice(tmp_path, prompts, seeds, message):
    if isinstance(prompts, str):
        (tmp_path / "mine.csv").write_text(prompts)
        prompts = str(tmp_path / "mine.csv")
    with pytest.raises(ValueError, match=message):
        read_images(prompts, seeds, 9)


def test_general_prompts_have_the_seeds_of_their_file(tmp_path):
    (tmp_path / "mine.csv").write_text("case_number,prompt,evaluation_seed\n0,a,7\n1,a,8\n")
    assert read_images(str(tmp_path / "mine.csv"), [0], 9) == [("a", 7), ("a", 8)]


# -------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "spelling",
    [
        "Torch Light",
        "torch_light",
        "torch-light",
        "torch\u2011light",
        "torch \u2013 light",
        "torch\u00a0 light",
        "tor\u200bch li\u00adght",
        "torch\ufe0f light",
        "{torch light}",
        "a picture in {Torch-Light}",
    ],
)
def test_no_spelling_of_a_target_is_a_protected_name(make_scope, tmp_path, spelling):
    (tmp_path / "names.txt").write_text(f"{spelling}\nother\n", encoding="utf-8")
    assert kept_names(make_scope(), NameSource("file", str(tmp_path / "names.txt"))) == ["other"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (COMPOSED, DECOMPOSED, True),
        (COMPOSED.upper(), DECOMPOSED, True),
        ("Georgia O\u2019Keeffe", "georgia o'keeffe", True),
        ("Stra\u00dfe", "STRASSE", True),
        (EMOJI, EMOJI.replace("\u200d", ""), True),
        ("torch light", "torchlight", False),
        (COMPOSED, "ete", False),
        ("a, b", "a b", False),
        ("a=b", "ab", False),
    ],
)
def test_what_is_another_spelling_of_a_name(one, other, same):
    assert (comparable(one) == comparable(other)) == same


@pytest.mark.parametrize("spelling", ["Torch light", "torch_light", "torch-light"])
@pytest.mark.parametrize(
    ("key", "message"),
    [("retain", "is both in targets .* and in retain"), ("targets", "two spellings of one name")],
)
def test_a_target_is_named_once(key, message, spelling):
    own = read_conf("sequence/smoke.yaml")[key]
    with pytest.raises(ValueError, match=f"{spelling}.*{message}"):
        sequence_with(**{key: [*own, spelling]})


def test_accents_are_the_same_in_both_forms(evaluator, monkeypatch, tmp_path):
    """Of a sequence, its anchors, a judge and a file of prompts."""
    names = read_conf("sequence/smoke.yaml")["retain"]
    rows = [f"x,{name},1" for name in ("snow drift", *names, COMPOSED)]
    (tmp_path / "mine.csv").write_text("prompt,concept,seed\n" + "\n".join(rows), encoding="utf-8")
    found = sequence_with(
        targets=["snow drift", DECOMPOSED],
        anchors={DECOMPOSED: "art", "snow drift": DECOMPOSED},
        prompt_names={DECOMPOSED: f"the {DECOMPOSED}"},
        prompts=str(tmp_path / "mine.csv"),
    )
    target = found.targets[1]
    assert (target.name, target.anchor) == (COMPOSED, "art")
    assert (target.prompt_name, found.targets[0].anchor) == (f"the {COMPOSED}", COMPOSED)
    assert len(found.evaluation_images([target])) == 1
    labels = evaluator.labels()
    known = {"style": [*labels["style"], COMPOSED], "object": labels["object"]}
    monkeypatch.setattr(evaluator, "labels", lambda: known)
    check_labels(found, evaluator)
    known["style"][-1] = "\u00c9t\u00e9"
    with pytest.raises(ValueError, match=f"no style '{COMPOSED}' \\(it knows \u00c9t\u00e9\\)$"):
        check_labels(found, evaluator)


def test_a_file_may_spell_concepts_otherwise(tmp_path):
    spelled = {"torch light": "Torch-Light", "fog bank": "fog_bank"}
    smoke = read_conf("sequence/smoke.yaml")
    names = [*smoke["targets"], *smoke["retain"]]
    rows = [f"a picture,{spelled.get(name, name)},1,Tree" for name in names]
    path = tmp_path / "mine.csv"
    path.write_text("prompt,concept,evaluation_seed,object\n" + "\n".join(rows))
    images = sequence_with(prompts=str(path)).listed_images
    assert [(image.concept, image.cross, image.seed) for image in images] == [
        (name, "tree", 1) for name in names
    ]


def test_lists_of_words_for_concepts_may_spell_them_otherwise(tmp_path, caplog):
    found, path = sequence_with(), tmp_path / "mine.csv"
    path.write_text("concept,words\nTorch-Light,a fiery one\ntorch_light,a hot one\nx,y\n")
    method = ConAbl(also_called=str(path))
    method.check(found)
    assert method.words_for(found.targets[0]) == ["a fiery one", "a hot one"]
    assert [record.getMessage() for record in caplog.records] == [
        "method.also_called: has no other words for snow drift"
    ]
    names = ["Torch_Light", "torch light", "SNOW DRIFT", "lava-flow", "Fog Bank"]
    rows = [f"{name},short,{{object}} {number}" for number, name in enumerate(names)]
    path.write_text("\n".join(["concept,level,prompt", *rows]))
    probe = Paraphrase(str(path), images=2)
    probe.check(found)
    lab = SimpleNamespace(sequence=found)
    assert [image.prompt for image in probe.images(lab, [found.targets[0]])] == ["tree 0", "star 1"]
    path.write_text("concept,level,prompt\nTORCH LIGHT,short,a torch-light \u00adthing\n")
    with pytest.raises(ValueError, match="names TORCH LIGHT; a paraphrase does without"):
        Paraphrase(str(path))


def test_a_list_without_words_for_any_target_is_refused_before_anything_is_loaded(
    in_process, tmp_path
):
    (tmp_path / "mine.csv").write_text("concept,words\ntorch lihgt,a fiery one\n")
    words = [*SMOKE, f"method.also_called={tmp_path}/mine.csv"]
    for more in ([], ["dry_run=true"]):
        status, out, err = in_process(*words, *more)
        assert (status, err.count("\n")) == (2, 1)
        assert out == "" or out.startswith("run: ")  # said before anything is loaded
        assert "has no other words for any target (torch light, snow drift)" in err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["1e-5", "true", "null"])
def test_what_yaml_reads_as_no_name_must_be_quoted(name):
    with pytest.raises(ValueError, match=r"^sequence.retain=\S+: .* string; put it in quotes$"):
        parse(compose("sequence=smoke", f"sequence.retain=[{name}]"))
    plan = parse(compose("sequence=smoke", f"sequence.retain=['{name}',on,no,010]"))
    assert plan.sequence.arguments["retain"] == [name, "on", "no", "010"]
