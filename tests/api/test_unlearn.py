"""unlearn() in Python: the runs of cu-run to the last bit, in one call or in several."""

import dataclasses
import functools
import json

import pytest
import torch
from doubles import Pull
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from safetensors.torch import load_file

import cu_runner
from cu_runner.api import own_sequence
from cu_runner.evaluators.metrics import read_predictions
from cu_runner.regularizers.l2 import L2
from cu_runner.reporting.intervals import over_images
from cu_runner.request import nearest_anchor
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError, ModelError, StoreError
from cu_runner.schema.settings import Sampler

SMALL = {"train.steps": 3, "train.batch_size": 2, "method.num_anchors": 4}
FEW = {"train.steps": 2, "train.batch_size": 2, "method.num_anchors": 2}


@pytest.fixture(scope="module")
def untouched():
    return cu_runner.load_model("shapecanvas", device="cpu", settings={"sampler.steps": 2})


def unlearn(model, concepts=None, **chosen):
    chosen = {"sequence": "smoke", "settings": FEW, "progress": False} | chosen
    return cu_runner.unlearn(model, concepts, **chosen)


def same(one, two) -> bool:
    return one.delta.keys() == two.delta.keys() and all(
        torch.equal(one.delta[name], two.delta[name]) for name in one.delta
    )


def test_it_is_the_run_of_cu_run_to_the_last_bit(untouched, finished_run):
    directory = finished_run[1]
    before = untouched.diffusion.fingerprint()
    edited = unlearn(untouched, settings=SMALL)
    stored = load_file(directory / "steps/02/delta.safetensors")
    assert stored.keys() == edited.delta.keys()
    assert all(torch.equal(stored[name], edited.delta[name]) for name in stored)
    assert edited.unlearned == ("torch light", "snow drift")
    assert untouched.diffusion.fingerprint() == before
    assert edited.untouched is untouched
    weights = dict(edited.diffusion.denoiser.named_parameters())
    base = dict(untouched.diffusion.denoiser.named_parameters())
    for name, change in stored.items():
        assert torch.equal(weights[name], base[name] + change)
    found = cu_runner.evaluate(edited, "smoke", progress=False)
    table = read_predictions(directory / "steps/02/predictions.csv")
    assert list(found.predictions["predicted_style"]) == list(table["predicted_style"])
    assert list(found.predictions["score_style"]) == list(table["score_style"])
    assert found.unlearned == edited.unlearned
    low, high = found.intervals["UA"]
    assert low <= found.metrics["UA"] <= high
    assert str(found).startswith(f"UA {found.metrics['UA']:.1f} (")
    assert found.grid.size[0] > 0


@pytest.mark.parametrize("reg", ["gradproj", "gate", "merge"])
def test_one_call_or_two_is_the_same(untouched, reg):
    both = unlearn(untouched, regularizers=reg)
    first = unlearn(untouched, "torch light", regularizers=reg)
    second = unlearn(first, ["snow drift"], regularizers=reg)
    assert same(both, second)
    assert not same(both, unlearn(untouched, regularizers=reg, seed=1))
    assert second.unlearned == both.unlearned == ("torch light", "snow drift")
    assert second.drift == both.drift != first.drift


def test_a_mixed_sequence(untouched):
    """Each request faces its target's domain, in one call as in two; both domains are measured."""
    both = unlearn(untouched, ["blaze", "ball"], sequence="shapecanvas_mixed")
    first = unlearn(untouched, "blaze", sequence="shapecanvas_mixed")
    assert same(both, unlearn(first, "ball", sequence="shapecanvas_mixed"))
    assert [edit.concept.domain for edit in both.edits] == ["style", "object"]
    found = cu_runner.evaluate(
        first, "shapecanvas_mixed", settings={"eval.steps": 2}, progress=False
    )
    shown = found.predictions
    styles = shown[shown["measures"] == "style"]
    low, high = over_images(found.metrics["RA_I"], int((styles["style"] != "blaze").sum()))
    assert found.intervals["RA_I"] == (low, high)  # over styles alone: no object is unlearned yet
    assert low <= found.metrics["RA_I"] <= high


def test_gates_go_on_in_another_sequence(untouched):
    """A model with two gates takes two more; those of before stay as they are."""
    first = unlearn(untouched, regularizers="gate")
    few = {"captions": ["ball"], "vocabulary": ["key", "tree"]}
    second = unlearn(first, "sunset style", sequence=None, regularizers="gate", **few)
    name = next(name for name in second.delta if name.endswith("gate_directions"))
    assert len(first.delta[name]) == 2
    assert len(second.delta[name]) == 3
    assert torch.equal(second.delta[name][:2], first.delta[name])
    assert second.delta[name][2].any()
    with pytest.raises(ModelError, match="gates"):
        second.pipeline()
    after = unlearn(second, "plum style", sequence=None, **few)  # keys and values beside the gates
    assert after.delta[name].equal(second.delta[name])
    assert len(after.delta) > len(second.delta)
    assert after.diffusion.denoiser.get_parameter(name).equal(second.delta[name])


def test_together(untouched):
    edited = unlearn(untouched, setting="simultaneous", settings=FEW | {"setting.stop_at": None})
    assert edited.unlearned == ("torch light", "snow drift")
    assert {edit.steps for edit in edited.edits} == {2}
    with pytest.raises(ConfigError, match="reg merge"):
        unlearn(untouched, setting="independent")


def test_stop_at_is_measured_by_the_judge(untouched):
    own = FEW | {"train.steps": 4, "setting.stop_at": 0.1, "setting.interval": 2}
    edited = unlearn(untouched, setting="simultaneous", settings=own | {"train.lr": 1.0})
    assert edited.edits[0].steps < 4
    steps = []
    told = {"sequence": None, "settings": own, "on_step": steps.append}
    with pytest.raises(ConfigError, match="no judge"):
        unlearn(untouched, "a style", **told)
    assert steps == []  # refused before training


def test_objects_in_place_of_names(untouched):
    """A method and a regularizer of one's own, and a Sequence, do as the names that they stand
    for.
    """
    sequence = cu_runner.make_sequence(**conf("sequence/smoke.yaml"))
    named = unlearn(untouched, "torch light", regularizers=["l2"], settings=FEW | L2_AT)
    own = unlearn(untouched, "torch light", regularizers=[L2(weight=7.0)], sequence=sequence)
    assert same(named, own)
    assert own.edits[0].regularizers == ("l2",)
    pulled = unlearn(untouched, "torch light", method=Pull(), settings={"train.steps": 2})
    assert pulled.edits[0].method == "Pull"
    assert pulled.drift.l2 > 0


L2_AT = {"reg.l2.weight": 7.0}


def conf(name: str) -> dict:
    from conftest import read_conf

    return read_conf(name)


def test_a_callback_sees_every_step_and_may_end_the_call(untouched):
    told = []
    edited = unlearn(untouched, "snow drift", on_step=told.append)
    assert [(each.request, each.concept, each.step, each.steps) for each in told] == [
        (1, "snow drift", 1, 2),
        (1, "snow drift", 2, 2),
    ]
    assert told[-1].loss == told[-1].logs["loss"] == edited.edits[0].logs[-1]["loss"]

    def end(step):
        raise KeyboardInterrupt

    before = untouched.diffusion.fingerprint()
    with pytest.raises(KeyboardInterrupt):
        unlearn(untouched, "snow drift", on_step=end)
    assert untouched.diffusion.fingerprint() == before


def test_nothing_is_written_and_hydra_is_left_alone(untouched, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.1"):
        mine, version = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
        unlearn(untouched, "snow drift")
        assert GlobalHydra.instance().hydra is mine
        assert VersionBase.instance().getbase() is version
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_own_concepts(untouched, capsys, monkeypatch):
    """A style is its prompt without it; an object has an anchor, chosen and said."""
    fewer = functools.partial(own_sequence.nearest_by_prediction, draws=2)
    monkeypatch.setattr(own_sequence, "nearest_by_prediction", fewer)
    monkeypatch.setattr(nearest_anchor, "DRAWN", Sampler(steps=2, guidance=1.0))
    style = unlearn(untouched, "sunset style", sequence=None, captions=["ball", "box"])
    assert style.unlearned == ("sunset style",)
    assert style.edits[0].anchor is None
    given = unlearn(untouched, "ball", sequence=None, anchors={"ball": "gear"})
    assert given.edits[0].anchor == "gear"
    assert capsys.readouterr().err == ""
    chosen = unlearn(untouched, "ball", sequence=None, vocabulary=["key", "tree"], progress=True)
    assert chosen.edits[0].anchor in ("key", "tree")
    assert f"anchor of ball: {chosen.edits[0].anchor} (distance" in capsys.readouterr().err


def test_the_prompts_of_own_concepts(untouched):
    style = cu_runner.own_sequence(untouched, ["sunset style"], captions=["ball"])
    assert style.training_pairs(style.targets[0]) == [("a ball, in sunset style", "a ball")]
    short = cu_runner.own_sequence(untouched, ["sunset"], kind="style", captions=["ball"])
    assert short.training_pairs(short.targets[0]) == [("a ball, in sunset style", "a ball")]
    own = cu_runner.own_sequence(
        untouched,
        ["ball", "box"],
        anchors={"ball": "a gear", "box": "lamp"},
        prompts=["a {concept} here", "{concept} there"],
        vocabulary=["box", "key", "tree"],
        retain=("tree",),
    )
    assert own.training_pairs(own.targets[0]) == [
        ("a ball here", "a a gear here"),
        ("ball there", "a gear there"),
    ]
    assert own.training_pairs(own.targets[1])[0] == ("a box here", "a lamp here")
    assert own.vocabulary == ("key",)
    assert [concept.name for concept in own.retain] == ["tree"]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"method": "conabel"}, "method='conabel': no such name; did you mean conabl?"),
        ({"regularizers": ["l3"]}, "reg='l3': no such name"),
        ({"sequence": "smok"}, "sequence='smok': no such name; did you mean smoke?"),
        ({"concepts": ["blaze"]}, "'blaze' is no target of sequence smoke"),
        ({"concepts": ["snow drift", "snow drift"]}, "names one twice"),
        ({"settings": {"train.step": 3}}, "unknown setting train.step"),
        ({"settings": {"train.steps": "many"}}, "train.steps"),
        ({"settings": {"model.precision": "bf16"}}, "model.precision changes nothing here"),
        ({"settings": {"+retention.clip": 1}}, "retention.clip changes nothing here"),
        ({"method": Pull(), "settings": {"method.teacher": "base"}}, "the method is an object"),
        ({"regularizers": ["l2", L2(weight=1.0)]}, "two are called l2"),
        (
            {
                "method": "imported",
                "settings": {"method.checkpoint": "x", "method.sha256": "0" * 64},
            },
            "trains nothing",
        ),
        ({"sequence": "shapecanvas_mixed", "setting": "simultaneous"}, "several domains"),
        ({"sequence": None, "concepts": "ball", "vocabulary": []}, "name an anchor"),
        ({"sequence": None, "concepts": "ball", "anchors": {"ball": "photo"}}, "is a word of"),
        ({"sequence": None, "concepts": "a style", "settings": {"sequence.seeds": [1]}}, "own"),
        ({"settings": {"train.steps": object()}}, "is no text, number, list or mapping"),
        ({"setting": "at once"}, "setting='at once': no such name"),
        ({"sequence": None}, "names no concept"),
        ({"sequence": None, "concepts": []}, "is empty"),
        ({"sequence": None, "concepts": ["a style", "ball"]}, "of several kinds"),
        ({"sequence": None, "concepts": "ball", "kind": "thing"}, "kind='thing': allowed"),
        ({"sequence": None, "concepts": "ball", "anchors": {"box": "gear"}}, "names 'box'"),
        ({"sequence": None, "concepts": "ball", "prompts": ["a ball"]}, "lacks the placeholder"),
        ({"method": "uce", "regularizers": "l2", "settings": {}}, "reg=l2 acts on the loss"),
    ],
)
def test_bad_input_is_one_line(untouched, chosen, said):
    with pytest.raises(ValueError, match=r"\S") as raised:
        unlearn(untouched, **chosen)
    text = str(raised.value)
    assert said in text
    assert "\n" not in text


def test_what_is_unlearned_is_not_unlearned_again(untouched):
    edited = unlearn(untouched, "snow drift")
    with pytest.raises(ConfigError, match="'snow drift' is unlearned already"):
        unlearn(edited, "snow drift")
    with pytest.raises(ConfigError, match="begin with load_model"):
        unlearn(edited, "torch light", regularizers="merge")
    sequence = dataclasses.replace(
        cu_runner.make_sequence(**conf("sequence/smoke.yaml")), cross_retain=()
    )
    with pytest.raises(ConfigError, match="nothing says what was kept"):
        cu_runner.evaluate(edited, sequence)
    with pytest.raises(ConfigError, match="none of which is"):
        cu_runner.evaluate(edited, "shapecanvas_object")


def test_a_run_is_read_back(untouched, finished_run):
    run = cu_runner.read_run(finished_run[1])
    edited = run.model(step=1, device="cpu")
    assert edited.unlearned == ("torch light",)
    again = unlearn(untouched, "torch light", settings=SMALL)
    assert same(edited, again)
    both = unlearn(edited, settings=SMALL)  # goes on from a run
    last = run.model()
    assert same(both, last)
    assert run.model(0).unlearned == ()
    with pytest.raises(ValueError, match="finished steps 0 to 2"):
        run.model(3)
    prompt = "a tree image in torch light style"
    one, two = (each.generate(prompt, steps=2, progress=False)[0] for each in (both, last))
    assert one.tobytes() == two.tobytes()


def test_a_run_with_another_base_is_refused(run_copy, pipeline_copy):
    config = pipeline_copy / "vae/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"scaling_factor": 2 * values["scaling_factor"]}))
    with pytest.raises(StoreError, match="another model"):
        cu_runner.read_run(run_copy).model(1, path=str(pipeline_copy))


class Watching(Pull):
    """Keeps the scope that it is given."""

    def begin_request(self, scope):
        self.scope = scope


def test_what_was_trained_before_stays_beside_other_weights(untouched):
    """Values first, then keys: both changes count, and the base is the untouched model's."""
    first = unlearn(untouched, "snow drift", settings=FEW | {"method.params": "v_xattn"})
    watching = Watching()
    watching.params = "k_xattn"
    second = unlearn(first, "torch light", method=watching, settings={"train.steps": 1})
    assert second.delta.keys() > first.delta.keys()
    weights = dict(second.diffusion.denoiser.named_parameters())
    base = dict(untouched.diffusion.denoiser.named_parameters())
    for name, change in second.delta.items():
        assert torch.equal(weights[name], base[name] + change)
    for name in first.delta:
        assert torch.equal(second.delta[name], first.delta[name])
        assert torch.equal(watching.scope.base[name], base[name])


def test_bf16_loses_nothing_of_what_was_trained_before():
    model = cu_runner.load_model("shapecanvas", device="cpu", precision="bf16")
    few = FEW | {"anchors.steps": 2}
    first = unlearn(model, "snow drift", settings=few | {"method.params": "v_xattn"})
    second = unlearn(first, "torch light", settings=few | {"method.params": "k_xattn"})
    weights = dict(second.diffusion.denoiser.named_parameters())
    base = dict(model.diffusion.denoiser.named_parameters())
    for name, change in second.delta.items():
        assert torch.equal(weights[name], (base[name] + change).to(weights[name].dtype))
    plain = second.pipeline()  # for others, in fp32
    assert {each.dtype for each in plain.unet.parameters()} == {torch.float32}
    for name, change in second.delta.items():
        assert torch.equal(plain.unet.get_parameter(name), base[name] + change)


def test_gates_for_other_words_are_not_mixed_up(untouched, tmp_path):
    first = unlearn(untouched, "snow drift", regularizers="gate")
    assert first.gates == (("torch light", "torch light"), ("snow drift", "snow drift"))
    words = tmp_path / "words.csv"
    words.write_text("concept,words\ntorch light,lamp\nsnow drift,ice\n")
    called = FEW | {"method.also_called": str(words)}
    with pytest.raises(ConfigError, match="same method"):
        unlearn(first, "torch light", regularizers="gate", settings=called)
    names = conf("sequence/smoke.yaml") | {"prompt_names": {"torch light": "torchlight"}}
    with pytest.raises(ConfigError, match="another spelling"):
        unlearn(
            first,
            "torch light",
            regularizers="gate",
            sequence=cu_runner.make_sequence(**names),
        )


def test_other_prompts_are_not_trained_on_again(untouched):
    """Closed forms and simultaneous training need the prompts of every earlier concept."""
    first = unlearn(untouched, "sunset style", sequence=None, captions=["ball"])
    for chosen in ({"method": "uce", "settings": {}}, {"setting": "simultaneous"}):
        with pytest.raises(ConfigError, match="was unlearned in other prompts"):
            unlearn(first, "snow drift", **chosen)


def test_names_in_any_form(untouched):
    """A text is one name, also of what is retained; a generator is read once; blanks do not
    count.
    """
    one = unlearn(untouched, (name for name in [" snow drift"]))
    assert one.unlearned == ("snow drift",)
    own = cu_runner.own_sequence(
        untouched, "a cat", kind="style", captions="a house", vocabulary="dog", retain="moss"
    )
    assert [concept.name for concept in own.targets] == ["a cat"]
    assert [concept.name for concept in own.retain] == ["moss"]
    assert (own.captions, own.vocabulary) == (("a house",), ("dog",))
    assert len(repr(one)) < 500
