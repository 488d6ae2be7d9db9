"""Does gradient projection keep the other domain when its auxiliary names come from there? (Lee et
al. 2026, arXiv 2511.07970)

    python scripts/studies/crossdomain.py [seed=0,1,2] [own=LIST] [other=LIST] [OVERRIDE ...]
        [--output DIR]

On objects the paper's projection keeps less of the styles than its merging. ConAbl on objects,
with projection off names of objects (own), of styles (other), and of both. As many names of either
domain, at random from the sequence's vocabulary and from the list of the other domain that goes
with it; both is their union. No target, no retained concept and no concept by which RA-C is
measured is among them. Each name has a prompt of its own, so that no caption brings in the other
domain: the bare name, or PROMPTS where the tuned projection reads every token. Whether the
number of prompts counts or that both domains stand in each: pairs has every name of the own domain
with two of the other, as many prompts as both and of the same words, and more pairs with twelve;
pairs as trained are pairs in the words of the training prompts. Everything else is as tuned; what
is tuned reads those words, and targets among the names. Beside them plain unlearning and merging.
own, other: a shipped list or a text file in place of these names. 27 runs, crossdomain.md has the
seconds of each. The last request is needed alone, for all but the picture: eval.every=last.
"""

import json
from pathlib import Path

from auxiliary import draw_names, subspaces
from study import (
    ALL_RUNS,
    STABLE_DIFFUSION,
    Study,
    as_markdown,
    command,
    finished,
    last_rows,
    over_requests,
    with_stopped,
)
from study_seeds import (
    counted,
    curves,
    differences,
    draw_bands,
    last_with_intervals,
    remark,
    remark_of_differences,
    take_seeds,
    with_seeds,
    without_seed,
)

from cu_runner.concepts.entries import read_entries, shipped_lists
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.request.name_sources import normalized, spellings

SEQUENCE = "sequence=shapecanvas_object"
# All objects of UnlearnCanvas are targets or retained: none of its vocabulary is left.
ON_STABLE_DIFFUSION = (
    "own=common_objects other=painting_styles "
    f"{STABLE_DIFFUSION.replace('unlearncanvas_style', 'unlearncanvas_object')}"
)
# Where all tokens are read the words around a name count too.
PROMPTS = {"object": "a {} image", "style": "an image in {} style"}
PROMPT_OF_PAIR = "a {object} image in {style} style"
PARTNERS = {"pairs": 2, "more pairs": 12}  # names of the other domain beside each of the own
AS_TRAINED = "pairs as trained"  # the same pairs, in the words of sequence.target_prompt
PROJECTION = "projection, "
DIFFERENCES = {
    f"{one} - {two}": tuple(
        name if name == "merge" else f"{PROJECTION}{name}" for name in (one, two)
    )
    for one, two in (
        ("other", "own"),
        ("both", "own"),
        ("both", "merge"),
        ("pairs", "both"),
        ("more pairs", "pairs"),
        (AS_TRAINED, "pairs"),
        (AS_TRAINED, "as tuned"),
    )
}


# ------------------------------------------------------------ names
def default_sequence(study: Study) -> list[str]:
    return [] if study.gives("sequence", "experiment") else [SEQUENCE]


def take_names(study: Study) -> tuple[list[str], list[str], Study]:
    """Return all names of the sequence's domain and of the other, and the study without own, other.

    Raises:
        ValueError: no list of the other domain goes with the sequence's, or one cannot be read.
    """
    words = {}
    for key in ("own", "other"):
        values, study = study.take(key, [])
        words[key] = values[0] if len(values) == 1 else values
    plan = study.plan(default_sequence(study))
    sequence = plan.sequence.build()
    listed = plan.resolved["sequence"]["vocabulary"]
    if not words["other"]:
        words["other"] = str(listed).replace(sequence.domain, sequence.cross_domain)
        if words["other"] not in shipped_lists() or words["other"] == listed:
            raise ValueError(
                f"other: no list of {sequence.cross_domain} names goes with the vocabulary of "
                f"{sequence.name}; give other=LIST or other=FILE.txt"
            )
    own = (
        read_entries("own", words["own"])
        if words["own"]
        else [sequence.prompt_name(label) for label in sequence.vocabulary]
    )
    labels = read_entries("other", words["other"])
    other = [Concept(label, sequence.cross_domain).prompt_name for label in labels]
    return own, other, study


def choose_names(sequence: Sequence, own: list[str], other: list[str]) -> dict[str, list[str]]:
    """Return the names by source: equally many of own and other, and both.

    None of them is a target, retained, by which RA-C is measured, or in both domains.

    Raises:
        ValueError: a domain has none left.
    """
    shut = spellings((*sequence.targets, *sequence.retain, *sequence.cross_retain))
    shut |= {normalized(name) for name in own} & {normalized(name) for name in other}
    free = {
        "own": draw_names(own, [*shut], len(own)),
        "other": draw_names(other, [*shut], len(other)),
    }
    for source, names in free.items():
        if not names:
            raise ValueError(
                f"{source}: no name is left beside the targets and what is measured; give "
                f"{source}=LIST or {source}=FILE.txt"
            )
    number = min(map(len, free.values()))
    chosen = {source: names[:number] for source, names in free.items()}
    return chosen | {"both": [*chosen["own"], *chosen["other"]]}


def as_prompts(study: Study, sequence: Sequence, chosen: dict[str, list[str]]) -> dict[str, str]:
    """Return the text of each source's file, a prompt per line; PARTNERS are sources too."""
    plan = study.plan([*default_sequence(study), "reg=gradproj"])
    every_token = plan.resolved["reg"]["gradproj"]["tokens"] == "all"
    domains = {"own": sequence.domain, "other": sequence.cross_domain}
    lines = {}
    for source, domain in domains.items():
        form = PROMPTS.get(domain, "{}") if every_token else "{}"
        lines[source] = [form.format(name) for name in chosen[source]]
    lines["both"] = [*lines["own"], *lines["other"]]
    paired = every_token and {*domains.values()} == {*PROMPTS}
    for source, partners in PARTNERS.items():
        pairs = pair_up(chosen["own"], chosen["other"], partners)
        lines[source] = [
            PROMPT_OF_PAIR.format_map(dict(zip(domains.values(), pair, strict=True)))
            if paired
            else " ".join(pair)
            for pair in pairs
        ]
    form = str(plan.resolved["sequence"]["target_prompt"])
    if every_token and "{concept}" in form and "{caption}" in form:
        pairs = pair_up(chosen["own"], chosen["other"], PARTNERS["pairs"])
        lines[AS_TRAINED] = [form.format(concept=own, caption=other) for own, other in pairs]
    return {source: "\n".join(prompts) + "\n" for source, prompts in lines.items()}


def pair_up(own: list[str], other: list[str], partners: int) -> list[tuple[str, str]]:
    """Return each own name with this many of equally many others, each of which is used alike."""
    number = len(other)
    return [
        (name, other[(place + step) % number])
        for place, name in enumerate(own)
        for step in range(min(partners, number))
    ]


# ------------------------------------------------------------ runs
def cells(study: Study, seeds: list[int], files: dict[str, Path]) -> dict[str, list[str]]:
    """Labels are "plain", "merge" and "projection, SOURCE" with ", seed N".

    files: of prompts, by source.
    """
    shared, setting = default_sequence(study), "reg.gradproj.auxiliary"
    number = max(len(file.read_text(encoding="utf-8").splitlines()) for file in files.values())
    found = {
        "plain": ["reg=none"],
        "merge": ["reg=merge"],
        f"{PROJECTION}as tuned": ["reg=gradproj"],
    }
    for source, file in files.items():
        found[f"{PROJECTION}{source}"] = [
            "reg=gradproj",
            f"{setting}.source=file",
            f"{setting}.name={json.dumps(str(file))}",
            f"{setting}.number={number}",  # at most: all of them
            "reg.gradproj.contexts=['{concept}']",
        ]
    return with_seeds({label: [*cell, *shared] for label, cell in found.items()}, seeds)


def main(study: Study) -> None:
    seeds, study = take_seeds(study)
    own, other, study = take_names(study)
    sequence = study.plan(default_sequence(study)).sequence.build()
    chosen = choose_names(sequence, own, other)
    study.output.mkdir(parents=True, exist_ok=True)
    files = {}
    for source, text in as_prompts(study, sequence, chosen).items():
        files[source] = study.output / f"crossdomain_{source.replace(' ', '_')}.txt"
        files[source].write_text(text, encoding="utf-8")
        print(f"wrote {files[source]}")
    runs = study.run(cells(study, seeds, files), gaps=True)
    done = finished(runs)
    tables = counted(done)
    found = curves(tables)
    projected = {label: run for label, run in done.items() if label.startswith(PROJECTION)}
    held = subspaces(projected)
    held["run"] = held["run"].map(without_seed)
    held = held.groupby("run", sort=False).mean().reset_index()
    last = last_with_intervals(found).merge(held, on="run", how="left")
    text = (
        f"{len(chosen['own'])} names of each domain, own: {sequence.domain}, other: "
        f"{sequence.cross_domain}. After the last request, means over seeds. "
        f"{remark([*tables])}\n\n{as_markdown(last, digits=2)}\n\n"
    )
    text += (
        "Means over the requests: names (earlier targets included, duplicates not), rank "
        "(directions of the subspace),\ntarget_outside (fraction of the target's vector that it "
        "leaves free). A pair counts as a name.\n\n"
    )
    between = as_markdown(differences(tables, DIFFERENCES))
    text += f"Differences after the last request, in points:\n\n{between}\n\n"
    text += f"{remark_of_differences([*tables])}\n\n"
    whole = {label: run.table for label, run in done.items()}
    rows = with_stopped(last_rows(whole), runs)
    text += f"{ALL_RUNS}{as_markdown(rows)}"
    rows = with_stopped(over_requests(tables), runs)
    study.write(rows, draw_bands(found), text, ON_STABLE_DIFFUSION)


if __name__ == "__main__":
    command(main, __doc__)
