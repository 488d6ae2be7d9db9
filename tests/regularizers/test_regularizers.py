"""Closed forms of L1, L2 and gradient projection; which names the projection protects."""

import dataclasses
import logging

import pytest
import torch
from doubles import Pull
from torch import nn

from cu_runner.concepts.entries import read_shipped
from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.methods.conabl import ConAbl
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import assign, subtract
from cu_runner.regularizers.gradproj import GradProj, kept_columns, orthogonal_projector
from cu_runner.regularizers.l1 import L1
from cu_runner.regularizers.l2 import L2
from cu_runner.request.name_sources import NameSource
from cu_runner.request.text_subspace import concept_vectors, principal_columns, prompt_vectors
from cu_runner.runner.training import erase
from cu_runner.schema.settings import Sampler

METHOD = ConAbl(num_anchors=4)


# ---------------------------------------------------------------------------------------- L1 and L2
def penalised(regularizer, make_scope):
    """The penalty and its gradients at theta = (1, 2, -3), start (1, 1, 1), base (0, 0, 0), in two
    tensors.
    """
    params = {
        "a": nn.Parameter(torch.tensor([1.0, 2.0])),
        "b": nn.Parameter(torch.tensor([[-3.0]])),
    }
    start = {"a": torch.ones(2), "b": torch.ones(1, 1)}
    base = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}
    regularizer.begin_request(
        dataclasses.replace(make_scope(), params=params, start=start, base=base), METHOD
    )
    penalty = regularizer.penalty(params)
    penalty.backward()
    return penalty.item(), [*params["a"].grad.tolist(), *params["b"].grad.flatten().tolist()]


@pytest.mark.parametrize(
    ("regularizer", "value", "gradient"),
    [
        (L2(3.0), 3 * (0 + 1 + 16) / 3, [0.0, 2.0, -8.0]),  # 2 w d / n
        (L2(3.0, "base"), 3 * (1 + 4 + 9) / 3, [2.0, 4.0, -6.0]),
        (L1(3.0), 3 * (0 + 1 + 4) / 3, [0.0, 1.0, -1.0]),  # w sign(d) / n
        (L1(3.0, "base"), 3 * (1 + 2 + 3) / 3, [1.0, 1.0, -1.0]),
        (L2(0.0), 0.0, [0.0, 0.0, 0.0]),
    ],
)
def test_penalty_closed_form(make_scope, regularizer, value, gradient):
    found, gradients = penalised(regularizer, make_scope)
    assert found == pytest.approx(value, rel=1e-6)
    assert gradients == pytest.approx(gradient, rel=1e-6)


def test_penalty_is_zero_at_the_start_of_a_request(make_scope):
    scope = make_scope()
    for regularizer in (L1(5.0), L2(5.0), L2(5.0, "base")):
        assert regularizer.begin_request(scope, METHOD) == {}
        assert regularizer.penalty(scope.params).item() == 0.0


# ---------------------------------------------------------------------------------------- projector
def random_columns(width: int, count: int, seed: int = 0):
    return torch.randn(width, count, generator=torch.Generator().manual_seed(seed))


def test_projector_removes_the_columns_and_nothing_else():
    C = random_columns(64, 20)
    P = orthogonal_projector(C)
    assert P.shape == (64, 64)
    assert P.dtype == torch.float32
    assert ((P @ C).norm(dim=0) / C.norm(dim=0)).max() < 1e-4
    assert (P @ P - P).abs().max() < 1e-4
    assert (P - P.T).abs().max() < 1e-6
    assert P.trace().item() == pytest.approx(44, abs=1e-3)
    Q, _ = torch.linalg.qr(C)
    outside = random_columns(64, 5, seed=1)
    outside -= Q @ (Q.T @ outside)
    torch.testing.assert_close(P @ outside, outside, atol=1e-5, rtol=0)


def test_projector_of_one_column_closed_form():
    """P C = C r / (C^T C + r) with r = max(1e-4, 1e-6 tr / K)."""
    for scale, ridge in ((1.0, 1e-4), (100.0, 1e-2), (0.01, 1e-4)):
        C = torch.zeros(4, 1, dtype=torch.float64)
        C[1] = scale
        P = orthogonal_projector(C)
        expected = torch.eye(4, dtype=torch.float64)
        expected[1, 1] = ridge / (scale**2 + ridge)
        torch.testing.assert_close(P, expected, atol=1e-12, rtol=1e-9)


def test_projector_without_columns_is_the_identity():
    assert torch.equal(orthogonal_projector(torch.empty(5, 0)), torch.eye(5))


@pytest.mark.parametrize("count", [3, 6, 40])
def test_the_projector_is_that_of_the_paper_whichever_side_is_longer(count):
    C = torch.randn(6, count, generator=torch.Generator().manual_seed(count)).double()
    ridge = max(1e-4, 1e-6 * (C.T @ C).trace().item() / count)
    inverse = torch.linalg.inv(C.T @ C + ridge * torch.eye(count, dtype=torch.float64))
    by_hand = torch.eye(6, dtype=torch.float64) - C @ inverse @ C.T
    torch.testing.assert_close(orthogonal_projector(C), by_hand, atol=1e-9, rtol=0)


def test_projector_of_columns_that_depend_on_each_other():
    C = random_columns(32, 6)
    whole = torch.cat([C, C[:, :3] + 1e-7 * C[:, 3:], C @ torch.ones(6, 1)], dim=1)
    P = orthogonal_projector(whole)
    assert torch.isfinite(P).all()
    assert ((P @ whole).norm(dim=0) / whole.norm(dim=0)).max() < 1e-3
    torch.testing.assert_close(P, orthogonal_projector(C), atol=1e-3, rtol=0)


def test_projector_of_columns_of_very_different_size():
    C = random_columns(32, 6) * torch.tensor([1e4, 1e2, 1.0, 1.0, 1e2, 1e4])
    P = orthogonal_projector(C)
    assert torch.isfinite(P).all()
    assert torch.linalg.eigvalsh(P.double()).min() > -1e-6
    assert torch.linalg.eigvalsh(P.double()).max() < 1 + 1e-6


def test_columns_are_kept_exactly():
    """Cosines to the first column: 1, 0.95 +- 0.001, 0; kept in order, compared with kept columns
    only.
    """
    angles = torch.tensor([0.0, 0.949, 0.951], dtype=torch.float64)
    columns = [torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)]
    columns += [
        torch.tensor([c, (1 - c * c) ** 0.5, 0.0], dtype=torch.float64) for c in angles[1:].tolist()
    ]
    columns += [torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64), 5 * columns[0]]
    C = torch.stack(columns, dim=1)
    assert kept_columns(C, 0.95) == [0, 1, 3]  # 0.951 is dropped, and so is the scaled copy
    assert kept_columns(C, 0.9) == [0, 3]
    chain = torch.stack(
        [torch.tensor([torch.cos(t), torch.sin(t)]) for t in torch.tensor([0.0, 0.25, 0.5])], dim=1
    )
    assert kept_columns(chain, 0.95) == [0, 2]  # the third is near the second, which was dropped
    assert kept_columns(torch.empty(3, 0), 0.95) == []


# ----------------------------------------------------------------------------------------- GradProj
def names_of(regularizer, scope) -> list[str]:
    return regularizer.begin_request(scope, METHOD)["auxiliary"]


def test_the_target_is_never_among_the_names_and_earlier_targets_are(make_scope):
    first, second = (names_of(GradProj(threshold=1.0), make_scope(request)) for request in (1, 2))
    retained = {"lava flow", "fog bank"}
    assert "torch light" not in first
    assert "snow drift" in first
    assert second[0] == "torch light"
    assert "snow drift" not in second
    assert not retained & {*first, *second}
    assert len(first) == 24 - 1 - 2
    assert len(second) == 24 - 1 - 2


def test_retained_names_are_in_when_asked_for(make_scope):
    names = names_of(GradProj(auxiliary=NameSource(retained=True), threshold=1.0), make_scope())
    assert {"lava flow", "fog bank"} <= set(names)
    assert len(names) == 23


def test_the_nearest_names_are_chosen_first(make_scope, model):
    names = names_of(GradProj(auxiliary=NameSource(number=5), threshold=1.0), make_scope())
    assert len(names) == 5
    everything = [
        name
        for name in make_scope().sequence.vocabulary
        if name not in ("torch light", "lava flow", "fog bank")
    ]
    vectors = concept_vectors(model, ["torch light", *everything], "{concept}")
    cosine = torch.nn.functional.cosine_similarity(vectors[:, :1], vectors[:, 1:], dim=0)
    assert set(names) == {everything[i] for i in cosine.topk(5).indices.tolist()}
    assert cosine.topk(5).values.tolist() == sorted(cosine.tolist(), reverse=True)[:5]


def test_concept_vectors_are_the_mean_over_the_names_own_tokens(model):
    context = "a tree image in {concept} style"
    hidden = model.encode_prompts([context.format(concept="torch light")]).hidden[0]
    tokens = model.tokenizer(context.format(concept="torch light")).input_ids
    own = model.tokenizer("torch light").input_ids[1:-1]
    start = next(i for i in range(len(tokens)) if tokens[i : i + len(own)] == own)
    (vector,) = concept_vectors(model, ["torch light"], context).T
    torch.testing.assert_close(vector, hidden[start : start + len(own)].mean(0))


def test_similar_names_are_dropped_and_the_record_says_which_were_used(make_scope):
    scope = make_scope()
    everything, few = GradProj(threshold=1.0), GradProj(threshold=0.2)
    record = few.begin_request(scope, METHOD)
    assert 0 < len(record["auxiliary"]) < len(names_of(everything, scope))
    vectors = concept_vectors(scope.model, record["auxiliary"], "{concept}")
    cosine = nn.functional.normalize(vectors, dim=0).T @ nn.functional.normalize(vectors, dim=0)
    assert (cosine - torch.eye(len(cosine))).max() <= 0.2 + 1e-5
    assert 0 < record["target_outside_subspace"] <= 1


def test_prompt_vectors_hold_every_position_and_one_column_for_end_and_padding(model):
    hidden = model.encode_prompts(["an image in torch light style"]).hidden[0]
    columns = prompt_vectors(model, ["torch light"], "an image in {concept} style")
    assert columns.shape == (512, 8)  # begin, an, image, in, torch, light, style, end with padding
    torch.testing.assert_close(columns[:, :7], hidden[:7].T)
    torch.testing.assert_close(columns[:, 7], hidden[7:].mean(0))


def test_principal_columns_hold_the_energy_with_the_fewest_directions():
    C = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squared norms 9, 4, 1 of 14
    assert [principal_columns(C, energy).shape[1] for energy in (0.6, 0.65, 0.92, 0.93, 0.99)] == [
        1,
        2,
        2,
        3,
        3,
    ]
    torch.testing.assert_close(principal_columns(C, 0.9).abs(), torch.eye(4)[:, :2])


def test_all_tokens_protect_the_prompts_that_share_words_with_the_target(make_scope, settings):
    """With every position in the subspace a step leaves the begin token and the words of other
    prompts alone.
    """
    scope = make_scope()
    # begin, a, ball, in, the, style, of
    shared = scope.model.encode_prompts(["a ball in the style of blaze"]).hidden[0, :7].T
    moved = {}
    for tokens, contexts in (("own", ("{concept}",)), ("all", None)):
        assign(scope.params, scope.base)
        regularizer = GradProj(
            "update",
            NameSource(number=30),
            tokens=tokens,
            contexts=contexts,
            energy=0.999 if tokens == "all" else 1.0,
        )
        erase(scope, Pull(), {"gradproj": regularizer}, settings(steps=3, lr=1e-2))
        changes = subtract(scope.params, scope.base).values()
        moved[tokens] = max(
            ((change @ shared).norm() / (change.norm() * shared.norm())).item()
            for change in changes
        )
    assert moved["all"] < 0.01
    assert moved["own"] > 5 * moved["all"]


def test_names_from_a_shipped_list_and_from_a_file(make_scope, tmp_path):
    listed = names_of(
        GradProj(auxiliary=NameSource("list", "shapecanvas_objects"), threshold=1.0), make_scope()
    )
    retained = {"tree", "star"}  # of the other domain
    assert sorted(listed) == sorted({*read_shipped("shapecanvas_objects")} - retained)
    path = tmp_path / "names.txt"
    path.write_text("# mine\nball\n\n  box \nball\nstar\ntorch light\nfog bank\n")
    filed = names_of(GradProj(auxiliary=NameSource("file", str(path)), threshold=1.0), make_scope())
    assert sorted(filed) == ["ball", "box"]


def test_sources_that_hold_no_names_are_refused(make_scope, tmp_path):
    def refused(source: str, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GradProj(auxiliary=NameSource(source, name)).begin_request(make_scope(), METHOD)

    empty, only = tmp_path / "empty.txt", tmp_path / "only.txt"
    empty.write_text("# nothing\n")
    only.write_text("torch light\nfog bank\n")
    refused("file", str(empty), r"empty.txt: holds no names")
    refused("file", str(tmp_path / "gone"), r"gone: no such file")
    refused("list", "nope", r"nope: no such list; allowed: .*painting_styles")
    refused("file", str(only), r"^reg.gradproj.auxiliary: no name is left")


def test_when_the_vocabulary_is_used_up_the_earlier_targets_are_the_names(make_scope, tmp_path):
    path = tmp_path / "used.txt"
    path.write_text("torch light\nsnow drift\n")
    assert names_of(GradProj(auxiliary=NameSource("file", str(path))), make_scope(request=2)) == [
        "torch light"
    ]


def test_spellings_of_the_target_and_of_retained_names_are_banned_too(make_scope, tmp_path):
    path = tmp_path / "spelled.txt"
    path.write_text("Torch_Light\nFOG_bank\ntide pool\n")
    named = GradProj(auxiliary=NameSource("file", str(path)))
    assert names_of(named, make_scope()) == ["tide pool"]


def test_a_subspace_that_holds_the_target_is_warned_of(make_scope, caplog):
    with caplog.at_level(logging.WARNING):
        GradProj(
            tokens="all", contexts=None, auxiliary=NameSource("list", "shapecanvas_styles")
        ).begin_request(make_scope(), METHOD)
    assert "leaves nothing of torch light to unlearn" in caplog.text


def test_weights_that_are_not_projected_are_warned_of_once(make_scope, caplog):
    with caplog.at_level(logging.WARNING):
        for request in (1, 2):
            GradProj().begin_request(make_scope(request, group="xattn"), METHOD)
    assert caplog.text.count("other trained weights move freely") == 1


def test_a_group_without_keys_and_values_is_refused(make_scope):
    scope = make_scope()
    outside = {"conv_in.weight": scope.model.denoiser.conv_in.weight}
    with pytest.raises(
        ValueError,
        match=(
            r"^reg.gradproj projects weights that are linear in the text encoder's output, and "
            r"method.params trains none .*text_linear"
        ),
    ):
        GradProj().begin_request(dataclasses.replace(scope, params=outside), METHOD)


@pytest.mark.parametrize("group", ["kv_xattn", "xattn"])
def test_gradients_of_keys_and_values_are_projected(make_scope, group):
    scope = make_scope(group=group)
    regularizer = GradProj("gradient", NameSource(number=20))
    names = names_of(regularizer, scope)
    C = concept_vectors(scope.model, names, "{concept}")
    gradients = {}
    for name, parameter in scope.params.items():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        gradients[name] = parameter.grad.clone()
    regularizer.on_gradients(scope.params)
    P = orthogonal_projector(C)
    for name, parameter in scope.params.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            torch.testing.assert_close(parameter.grad, gradients[name] @ P)
            assert ((parameter.grad @ C).norm() / (gradients[name] @ C).norm()) < 1e-3
        else:
            assert torch.equal(parameter.grad, gradients[name])
    before = {name: parameter.detach().clone() for name, parameter in scope.params.items()}
    regularizer.on_step(scope.params, {})
    assert all(torch.equal(before[name], parameter) for name, parameter in scope.params.items())
    assert regularizer.acts_on == ("gradient",)


def text_change(scope, names: list[str]) -> float:
    """Largest change of W t over all keys and values and the text vectors t of some names, against
    the change of W times |t|.
    """
    C = concept_vectors(scope.model, names, "{concept}")
    steps = {
        name: parameter.detach() - scope.start[name] for name, parameter in scope.params.items()
    }
    return max(
        ((d @ C).norm(dim=0) / (d.norm() * C.norm(dim=0))).max().item() for d in steps.values()
    )


def test_a_projected_update_leaves_the_auxiliary_concepts_alone_and_a_projected_gradient_does_not(
    make_scope, settings
):
    scope, changes = make_scope(), {}
    for apply in ("update", "gradient"):
        assign(scope.params, scope.base)
        regularizer = GradProj(apply, NameSource(number=20))
        erase(
            scope, Pull(), {"gradproj": regularizer}, settings(steps=3, lr=1e-2, weight_decay=0.1)
        )
        changes[apply] = text_change(scope, names_of(regularizer, scope))
        assert regularizer.acts_on == (("step",) if apply == "update" else ("gradient",))
        assert min(change.norm() for change in subtract(scope.params, scope.base).values()) > 0.01
    assert changes["update"] < 1e-6
    assert changes["gradient"] > 1e-3


# ------------------------------------------------------------------------- released names, tokens
@torch.no_grad()
def encoded(model, prompt: str) -> tuple[list[int], torch.Tensor]:
    """The tokens of one prompt, cut and padded, and its text-encoder output [L, D]."""
    ids = model.tokenizer(prompt, padding="max_length", truncation=True).input_ids
    return ids, model.text_encoders[0](torch.tensor([ids]))[0][0]


def last_by_hand(model, prompt: str) -> torch.Tensor:
    """The output at the token before the first end of text."""
    ids, hidden = encoded(model, prompt)
    return hidden[ids.index(model.tokenizer.eos_token_id) - 1]


def own_by_hand(model, before: str, part: str, after: str = "") -> torch.Tensor:
    """The mean over the tokens of `part` in before + part + after, found by counting."""
    _, hidden = encoded(model, before + part + after)
    start, end = (len(model.tokenizer(text).input_ids) - 1 for text in (before, before + part))
    return hidden[start:end].mean(0)


def projector_by_hand(columns: list[torch.Tensor], threshold: float = 0.95) -> torch.Tensor:
    """I - C (C^T C + r I)^-1 C^T of the columns that are near no kept one before them."""
    kept: list[torch.Tensor] = []
    for column in (column.double() for column in columns):
        if all(column @ k <= threshold * column.norm() * k.norm() for k in kept):
            kept.append(column)
    C = torch.stack(kept, dim=1)
    gram = C.T @ C
    ridge = max(1e-4, 1e-6 * gram.trace().item() / len(kept))
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(kept)).double())
    return (torch.eye(len(C)).double() - C @ inverse @ C.T).float()


@pytest.fixture(scope="module")
def of_77_tokens(pipelines):
    return load_model(str(pipelines["sd15"]), 64, Sampler(2, 2.5))


def test_last_tokens_stand_before_the_end_of_each_prompt(model):
    names = ["a quiet harbor with boats", "star", "a {tree} on a hill"]
    found = concept_vectors(model, names, "see {concept}, now", "last")
    prompts = ["see a quiet harbor with boats, now", "see star, now", "a tree on a hill"]
    expected = torch.stack([last_by_hand(model, prompt) for prompt in prompts], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_is_cut_has_its_last_token_at_75(of_77_tokens):
    model = of_77_tokens
    prompt = "a harbor with boats " * 20
    ids, hidden = encoded(model, prompt)
    assert len(model.tokenizer(prompt).input_ids) > len(ids) == 77
    assert ids[76] == model.tokenizer.eos_token_id
    assert model.tokenizer.eos_token_id not in ids[:76]
    whole = " ".join(["boat"] * 75)  # 77 tokens: not cut
    found = concept_vectors(model, [prompt, whole, "a boat"], "{concept}", "last")
    expected = [hidden[75], encoded(model, whole)[1][75], last_by_hand(model, "a boat")]
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)
    assert (found[:, 0] - hidden[74]).norm() > 0.1 * hidden[74].norm()


@pytest.mark.parametrize("large", [False, True])
def test_a_name_in_braces_is_read_at_its_own_tokens_in_its_own_prompt(model, of_77_tokens, large):
    model = of_77_tokens if large else model
    names = ["An image of a {tabby cat}", "{fog} in style", "stained glass", "the {dot} of"]
    found = concept_vectors(model, names, "a {concept}!")
    expected = [
        own_by_hand(model, "An image of a ", "tabby cat"),
        own_by_hand(model, "", "fog", " in style"),
        own_by_hand(model, "a ", "stained glass", "!"),
        own_by_hand(model, "the ", "dot", " of"),
    ]
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)


def objects_scope(make_scope, plan: str, index: int):
    """Request `index` of three: bears (in prompts "bear"), sea birds, dogs; horses are retained."""
    sequence = make_sequence(
        name="objects",
        domain="object",
        cross_domain="style",
        targets=["Bears", "Sea_Birds", "Dogs"],
        retain=["Horses"],
        cross_retain=["Rust"],
        vocabulary=["Bears", "Sea_Birds", "Dogs", "Horses", "Cows", "Sheep"],
        prompt="A {object} image in {style} style",
        target_prompt="{concept}",
        anchor_prompt="x",
        captions=["c"],
        seeds=[1],
        prompt_names={"Bears": "bear", "Horses": "horse", "Cows": "cow"},
    )
    scope = dataclasses.replace(make_scope(), sequence=sequence)
    return dataclasses.replace(scope, request=plan_requests(sequence, plan)[index - 1])


@pytest.mark.parametrize(
    ("plan", "index", "earlier", "first", "others"),
    [
        ("sequential", 1, True, [], ["Sea Birds", "Dogs", "cow", "Sheep"]),
        ("sequential", 2, True, ["bear"], ["Dogs", "cow", "Sheep"]),
        ("sequential", 2, False, [], ["Dogs", "cow", "Sheep"]),
        ("sequential", 3, True, ["bear", "Sea Birds"], ["cow", "Sheep"]),
        ("sequential", 3, False, [], ["cow", "Sheep"]),
        ("independent", 1, True, [], ["Sea Birds", "Dogs", "cow", "Sheep"]),
        ("independent", 3, True, ["bear", "Sea Birds"], ["cow", "Sheep"]),
        # does not know what other requests unlearn: they are names as any others
        ("independent", 3, False, [], ["bear", "Sea Birds", "cow", "Sheep"]),
        ("simultaneous", 2, True, [], ["Dogs", "cow", "Sheep"]),
    ],
)
def test_earlier_targets_join_when_asked_for(make_scope, plan, index, earlier, first, others):
    scope = objects_scope(make_scope, plan, index)
    names = names_of(GradProj(threshold=1.0, earlier=earlier), scope)
    assert names[: len(first)] == first
    assert sorted(names[len(first) :]) == sorted(others)


@pytest.mark.parametrize("plan", ["sequential", "independent", "simultaneous"])
def test_targets_and_retained_concepts_never_join_by_label_or_prompt_name(
    make_scope, tmp_path, plan
):
    banned = ["bear", "Bears", "BEAR", "horse", "Horses"]
    prompts = [f"An image of a {{{name}}}" for name in banned] + ["{BEARS} here"]
    path = tmp_path / "names.txt"
    path.write_text("\n".join([*banned, *prompts, "cow", "An image of a {bearing}", "{sea horse}"]))
    names = names_of(
        GradProj(auxiliary=NameSource("file", str(path)), threshold=1.0),
        objects_scope(make_scope, plan, 1),
    )
    assert sorted(names) == ["An image of a {bearing}", "cow", "{sea horse}"]


@pytest.mark.parametrize("tokens", ["own", "last"])
def test_the_projected_gradient_from_columns_by_hand(make_scope, tmp_path, tokens):
    scope = objects_scope(make_scope, "sequential", 2)
    model, contexts = scope.model, ("An image of a {concept}", "a {concept}")
    path = tmp_path / "names.txt"
    path.write_text("An old {tree} image\nfish\nstar\nAn image of a {fish}\n")
    regularizer = GradProj(
        auxiliary=NameSource("file", str(path)), tokens=tokens, contexts=contexts
    )
    listed = {"An old {tree} image": ("An old ", "tree", " image"), "fish": None, "star": None}
    listed["An image of a {fish}"] = ("An image of a ", "fish", "")

    def column(name: str, context: str) -> torch.Tensor:
        parts = listed.get(name) or (context.removesuffix("{concept}"), name, "")
        if tokens == "last":
            return last_by_hand(model, "".join(parts))
        return own_by_hand(model, *parts)

    goal = own_by_hand(model, "An image of a ", "Sea Birds")
    nearness = {
        name: nn.functional.cosine_similarity(column(name, contexts[0]), goal, dim=0).item()
        for name in listed
    }
    names = ["bear", *sorted(listed, key=lambda name: -nearness[name])]
    columns = [column(name, context) for context in contexts for name in names]
    P = projector_by_hand(columns)
    record = regularizer.begin_request(scope, METHOD)
    assert record["rank"] == round(512 - P.trace().item()) < len(columns)  # of width 512
    outside = ((P @ goal).norm() / goal.norm()).item()
    assert record["target_outside_subspace"] == pytest.approx(outside, rel=1e-4)
    draw = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(w.shape, generator=draw) for name, w in scope.params.items()}
    for name, parameter in scope.params.items():
        parameter.grad = gradients[name].clone()
    regularizer.on_gradients(scope.params)
    for name, parameter in scope.params.items():
        torch.testing.assert_close(parameter.grad, gradients[name] @ P, rtol=1e-5, atol=1e-5)


def test_a_name_is_read_where_it_is_marked_not_where_its_word_stands_before(model):
    """With the word twice, the part in braces counts, and the place of {concept}."""
    for names, context, prompt in (
        (["key of a {key}"], "{concept}", "key of a key"),
        (["key"], "key of a {concept}", "key of a key"),
    ):
        hidden = model.encode_prompts([prompt]).hidden[0]
        second = len(model.tokenizer(prompt).input_ids) - 2
        assert torch.equal(concept_vectors(model, names, context)[:, 0], hidden[second])
    for name in ("a {cow} with a {bear}", "a {cow", "a cow}", "{}"):
        with pytest.raises(ValueError, match="has one part in braces: the name itself"):
            concept_vectors(model, [name], "{concept}")


def test_no_spelling_of_an_earlier_target_joins_a_merging_request_twice(make_scope, tmp_path):
    scope = make_scope()
    first, second = scope.sequence.targets
    bear = dataclasses.replace(first, name="Bears", spelling="torch light")
    request = dataclasses.replace(scope.request, index=2, plan="independent", listed=(bear, second))
    (tmp_path / "names.txt").write_text(
        "Bears\nbears\nan image of a {Torch  Light}\ntorch_light\nfog mist\n", encoding="utf-8"
    )
    source = NameSource("file", str(tmp_path / "names.txt"))
    record = GradProj(auxiliary=source).begin_request(
        dataclasses.replace(scope, request=request), ConAbl()
    )
    assert record["auxiliary"] == ["torch light", "fog mist"]
