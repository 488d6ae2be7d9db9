"""cu-report: its page and plots against numbers worked out by hand, from small run directories and
from a real one.
"""

import base64
import io
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch
import wandb
from commands import USED
from conftest import SMOKE
from PIL import Image
from runs_by_hand import KEY, VALUE, colour, make_run

from cu_runner import __version__
from cu_runner.cli import report
from cu_runner.config.compose import compose
from cu_runner.reporting.page_data import (
    costs,
    drift_by_layer,
    network_position,
    provenance,
    sample_images,
    short_layer,
    spread,
)
from cu_runner.reporting.page_groups import Group, in_words, label_groups, read_all
from cu_runner.reporting.page_plots import COLOURS, line_style
from cu_runner.reporting.page_tables import parts_of
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.errors import StoreError
from cu_runner.store.files import to_safetensors
from cu_runner.store.run_record import RunRecord, read_run

VOID = {"meta", "img", "br", "link", "input", "hr"}
ODD = '<b>"x"& \N{GREEK SMALL LETTER PI} $a_1$'  # a concept that must stay text


pytestmark = pytest.mark.usefixtures("numbers_by_hand")


@pytest.fixture
def cu_report(call_command):
    """Returns run(*arguments) -> (exit status, stdout, stderr) of cu-report in tmp_path."""
    return lambda *arguments: call_command(report.main, "cu-report", *arguments)


class Page(HTMLParser):
    """A page read strictly: every element that is opened is closed, in order. tables: cell texts of
    each table; text: all text.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.text, self.tags, self.classes, self._open, self._in_cell = "", [], [], [], False
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "div" and dict(attributes).get("class") == "scroll":
            self._name = dict(attributes)["aria-label"]
        if tag == "table":
            self._rows = self.tables[self._name] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag != "table")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self._rows[-1][-1] += data


def read_page(path: Path) -> Page:
    """The page, after a check that it is well-formed and needs nothing from anywhere."""
    html = path.read_text(encoding="utf-8")
    for foreign in ("http://", "https://", "<script", "<link", "@import", "url(http"):
        assert foreign not in html
    page = Page(html)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert (
                    attributes[name].startswith("data:image/")
                    or attributes[name][1:] in identifiers
                ), (tag, attributes)
        assert "onload" not in attributes
    return page


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Path:
    """A folder with two runs: a finished one, and one that has two of three requests."""
    folder = tmp_path_factory.mktemp("hand")
    make_run(folder)
    make_run(folder, "esd", finished=2)
    return folder


def only(folder: Path, method: str) -> Group:
    return next(
        group
        for group in read_all(sorted(folder.glob("runs/*/*")))[0]
        if group.first.method == method
    )


# -------------------------------------------------------------------------------------- the numbers
def test_labels_tell_runs_apart(tmp_path):
    def labels(*runs: RunRecord) -> list[str]:
        return label_groups([[run] for run in runs])

    def made(method: str, **options: object) -> RunRecord:
        return read_run(make_run(tmp_path, method, finished=1, **options))

    conabl, esd = made("conabl"), made("esd")
    assert labels(conabl, esd) == ["conabl", "esd"]
    later = made("esd", seed=1)
    assert labels(conabl, esd, later) == ["conabl, seed 0", "esd, seed 0", "esd, seed 1"]
    assert label_groups([[conabl], [esd, later]]) == ["conabl, seed 0", "esd, seeds 0, 1"]
    other = made("esd", science=1)
    assert labels(esd, other) == [f"esd [{run.directory.name[-8:-4]}]" for run in (esd, other)]
    assert labels(esd, made("esd", sequence="other")) == ["esd, hand", "esd, other"]
    copy = RunRecord(tmp_path / "copy" / esd.directory.name, esd.config, esd.records)
    assert [label[-4:] for label in labels(esd, copy)] == [" [1]", " [2]"]
    assert [in_words(seeds) for seeds in ([7], [0, 2], [0, 1, 2], [1, 2, 4])] == [
        "7",
        "0, 2",
        "0 to 2",
        "1, 2, 4",
    ]


def test_accuracy_and_what_is_unlearned_by_then(by_hand):
    shown = only(by_hand, "conabl")
    assert list(shown.accuracy.index) == ["old", "new", "last", "kept", "near"]
    assert shown.accuracy.fillna(-1).loc["old"].tolist() == [100, 0, 0, 100]  # a rebound
    assert shown.accuracy.fillna(-1).loc["new"].tolist() == [100, -1, 50, 50]
    assert shown.unlearned.loc["old"].tolist() == [False, True, True, True]
    assert shown.unlearned.loc["new"].tolist() == [False, False, True, True]
    assert not shown.unlearned.loc["kept"].any()


def test_drift_by_layer_adds_up(by_hand, tmp_path):
    found = drift_by_layer(only(by_hand, "conabl").first)
    assert found == {
        KEY.removesuffix(".weight"): 9.0,
        VALUE.removesuffix(".weight"): 12.0,
    }  # 3n and 4n after request 3
    assert drift_by_layer(read_run(make_run(tmp_path, finished=0))) == {}


def test_layers_stand_in_network_order():
    layers = [
        "conv_in",
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.2.attentions.0.transformer_blocks.2.attn2.to_k",
        "down_blocks.2.attentions.0.transformer_blocks.10.attn2.to_k",
        "down_blocks.10.resnets.0.conv1",
        "mid_block.resnets.0.conv1",
        "mid_block.attentions.0.proj_in",
        "mid_block.resnets.1.conv1",
        "up_blocks.0.resnets.0.conv1",
        "conv_norm_out",
        "conv_out",
    ]
    assert sorted(reversed(layers), key=network_position) == layers
    assert short_layer("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k") == "up 1.0.0"
    assert short_layer("conv_in") == "conv"


def test_cost_counts_requests_and_names_devices(by_hand):
    cost = costs(read_all(sorted(by_hand.glob("runs/*/*")))[0])
    assert cost["train_seconds"].tolist() == [31.5, 21.0]  # 3 and 2 requests of 10.5 s
    assert cost["eval_seconds"].tolist() == [12.0, 8.0]  # without the untouched model's
    assert cost["train_steps"].tolist() == [180, 120]
    assert cost["peak_memory_mb"].tolist() == [1030, 1020]
    assert cost["cached"].tolist() == [0, 0]
    facts = provenance(only(by_hand, "conabl").first)
    assert facts["device"] == "cpu (abacus) (requests 0 to 1), cpu (quipu) (requests 2 to 3)"
    assert facts["git commit"] == "c" * 40
    assert facts["versions"] == f"python 3, torch 2, cu_runner {__version__}"


def test_samples_are_of_several_concepts_of_the_other_domain_over_time(by_hand):
    group = only(by_hand, "conabl")
    concepts = list(group.accuracy.index)
    tree, cup = sample_images(group.first, concepts)
    assert [(each.cross_concept, each.seed) for each in (tree, cup)] == [
        ("tree", 188),
        ("cup", 188),
    ]
    part = Image.open(io.BytesIO(tree.jpeg(range(1, 3))))
    assert part.size == (16 * 4, 16 * 2)
    assert part.getpixel((40, 8)) == pytest.approx(colour("new", 2), abs=9)
    assert tree.montage.size == (16 * 4, 16 * 5)
    for y, concept in enumerate(concepts):
        for index in range(4):
            measured = pd.notna(group.accuracy.at[concept, index])
            expected = colour(concept, index) if measured else (255, 255, 255)
            place = (16 * index + 8, 16 * y + 8)
            assert tree.montage.getpixel(place) == expected
            assert cup.montage.getpixel(place) == (255, 255, 255)
    assert spread(9, 8) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert spread(8, 8) == list(range(8))


def test_line_styles_differ_and_are_visible():
    assert len({line_style(number) for number in range(168)}) == 168
    assert len({(line_style(number).colour, line_style(number).marker) for number in range(6)}) == 6

    def luminance(code: str) -> float:
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for side in (0, 1):
        colours = {name: pair[side] for name, pair in COLOURS.items()}
        assert all(
            contrast(code, colours["paper"]) >= 3
            for name, code in colours.items()
            if name.startswith("series")
        )
        assert contrast(colours["ink"], colours["paper"]) >= 7
        assert contrast(colours["quiet"], colours["paper"]) >= 4.5
        assert all(
            contrast(colours["number"], colours[name]) >= 4.5 for name in ("known", "gone", "paper")
        )


# ----------------------------------------------------------------------------------------- the page
def test_the_page_of_two_runs(cu_report, by_hand, tmp_path):
    status, out, err = cu_report(by_hand)
    assert (status, err) == (0, "")
    path = tmp_path / "outputs" / "reports" / by_hand.name / "index.html"
    assert out.splitlines()[-1] == f"report: {path.relative_to(tmp_path)}"
    page = read_page(path)

    partial = "esd (2 of 3 requests)"
    summary = page.tables["After the last finished request"]
    head = ["run", "seeds", "requests", "UA", "RA-I", "RA-C", "RA-C retained", "drift"]
    assert summary[0] == head
    assert summary[1] == ["conabl", "0", "3", "96.0", "97.0", "77.0", "70.0", "15.00"]
    unfinished = ["esd", "0", "2 of 3 ended", "94.0\N{DAGGER}", "98.0", "78.0", "70.0", "10.00"]
    assert summary[2] == unfinished
    heads = [attributes["data-head"] for _, attributes in page.tags if "data-head" in attributes]
    assert heads[:14] == head[1:] * 2  # of the cards that a narrow screen shows in its place
    tradeoff = page.tables["UA and RA-C after the last finished request"]
    assert tradeoff == [
        ["run", "UA", "RA-C"],
        ["conabl", "96.0", "77.0"],
        [partial, "94.0", "78.0"],
    ]
    assert "less was forgotten" in page.text
    dash = "\N{EN DASH}"
    assert page.tables["UA after request"][1:] == [
        ["conabl", dash, "92.0", "94.0", "96.0"],
        [partial, dash, "92.0", "94.0", dash],
    ]
    assert page.tables["RA-I after request"][1] == ["conabl", "100.0", "99.0", "98.0", "97.0"]
    assert page.tables["RA-C after request"][2] == [partial, "80.0", "79.0", "78.0", dash]
    assert page.tables["drift after request"][1] == ["conabl", "0.000", "5.000", "10.00", "15.00"]

    heat = page.tables["Accuracy of every concept after each request: conabl"]
    assert heat[0] == ["request", "0", "1", "2", "3"]
    old, new = (
        f"{name}, unlearned from request {since} on" for name, since in (("old", 1), ("new", 2))
    )
    assert heat[1:3] == [[old, "100", "0", "0", "100"], [new, "100", "", "50", "50"]]
    assert heat[4][0] == "kept"
    assert (
        "<caption>Accuracy of every concept after each request: conabl</caption>"
        in path.read_text()
    )
    assert len(page.tables["Accuracy of every concept after each request: esd"][0]) == 4
    cells = [
        attributes
        for tag, attributes in page.tags
        if tag == "td" and attributes.get("style", "").startswith("--v:")
    ]
    gone = [attributes["style"] for attributes in cells if attributes.get("class") == "gone"]
    assert gone[:6] == [
        "--v:0",
        "--v:0",
        "--v:100",
        "--v:50",
        "--v:50",
        "--v:100",
    ]  # old 1-3, new 2-3, last 3 of conabl

    keys = page.tables["L2 norm of the drift of each layer: keys"]
    assert keys == [["layer", "conabl", partial], [KEY.removesuffix(".weight"), "9.000", "6.000"]]
    assert page.tables["L2 norm of the drift of each layer: values"][1][1:] == ["12.00", "8.000"]
    assert page.tables["Cost of all finished requests"][1][:7] == [
        "conabl",
        "0",
        "3",
        "32",
        "12",
        "180",
        "1,030",
    ]
    assert page.tables["Cost of all finished requests"][2][2] == "2 of 3"
    directory = only(by_hand, "conabl").first.directory
    assert (directory / "config.yaml").read_text() in page.text
    assert f"{directory}signature{read_run(directory).records[0].signature}" in page.text

    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4  # two concepts of the other domain of two runs
    assert Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2]))).size == (64, 80)
    plots = {path.name for path in (path.parent / "plots").iterdir()}
    names = [
        "metrics",
        "tradeoff",
        "layers",
        "cost",
        *(
            f"accuracy-{i}-{run.name}"
            for i, run in enumerate(sorted(by_hand.glob("runs/hand/*")), start=1)
        ),
    ]
    assert plots == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert Image.open(path.parent / "plots" / "metrics.png").width > 1500
    assert (path.parent / "plots" / "metrics.svg").read_text().rstrip().endswith("</svg>")


def test_every_plot_has_words_and_a_table(cu_report, by_hand):
    cu_report(by_hand, "--output", "here")
    html = Path("here/index.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="plot">.*?</figure>', html, flags=re.DOTALL)
    assert len(figures) == 4 + 2 + 2
    for figure in figures:
        assert re.match(
            (
                r'<figure class="plot"><svg role="img" aria-label="[^"]+; the table below has '
                r'the numbers"'
            ),
            figure,
        )
        assert "<table>" in figure
        assert not re.search(r"(?:stroke|fill): #", figure)  # every colour follows light and dark


def test_text_from_files_stays_text(cu_report, tmp_path):
    run = make_run(tmp_path, '<i>m"&', (ODD, "new"), finished=2)
    assert cu_report(run)[0] == 0
    page = read_page(next(tmp_path.glob("outputs/reports/*/index.html")))
    assert [tag for tag, _ in page.tags if tag == "b" and "style" not in _] == []
    assert page.tables['Accuracy of every concept after each request: <i>m"&'][1][0].startswith(ODD)
    assert page.tables["UA after request"][1][0] == '<i>m"&'
    assert list(tmp_path.glob("outputs/reports/*/plots/accuracy-*.svg"))


def test_the_page_of_a_real_run(cu_report, outlined, finished_run):
    directory = finished_run[1]
    status, out, err = cu_report(directory)
    assert (status, err) == (0, "")
    page = read_page(Path(out.splitlines()[-1].removeprefix("report: ")))
    assert f"outputs/reports/{directory.name}/index.html" in out
    table = pd.read_csv(directory / "metrics.csv")
    for name, title in (("UA", "UA"), ("RA_I", "RA-I"), ("RA_C", "RA-C")):
        shown = page.tables[f"{title} after request"][1][1:]
        assert shown == [
            "\N{EN DASH}" if pd.isna(value) else f"{value:.1f}" for value in table[name]
        ]
    layers = [
        row
        for kind in ("keys", "values")
        for row in page.tables[f"L2 norm of the drift of each layer: {kind}"][1:]
    ]
    assert len(layers) == 22
    assert sum(float(row[1]) ** 2 for row in layers) ** 0.5 == pytest.approx(
        table["drift_l2"].iloc[-1], rel=1e-3
    )
    heat = page.tables["Accuracy of every concept after each request: conabl"]
    retained = [float(row[-1]) for row in heat[3:]]
    assert sum(retained) / len(retained) == pytest.approx(table["RA_I"].iloc[-1], abs=0.1)


def test_the_page_has_the_command_that_makes_a_run_again(
    cu_report, outlined, finished_run, tmp_path
):
    """And composing it gives the run's own signature."""
    directory = finished_run[1]
    cu_report(directory, "--output", "here")
    (line,) = re.findall(
        r'<pre class="command">(.*?)</pre>', (tmp_path / "here/index.html").read_text()
    )
    program, *overrides = shlex.split(unescape(line))
    assert program == "cu-run"
    assert overrides == [
        each for each in SMOKE if each not in ("wandb.mode=disabled", "num_threads=1")
    ]
    assert compose(overrides).signature == read_run(directory).records[0].signature


def test_a_run_of_the_python_interface_has_no_command(cu_report, outlined, tmp_path):
    assert cu_report(make_run(tmp_path, finished=1), "--output", "here")[0] == 0
    html = (tmp_path / "here/index.html").read_text()
    assert '<pre class="command">' not in html
    assert "No command is recorded: the run was made by the Python interface." in html
    assert "<details open><summary>config.yaml</summary>" in html


def test_runs_of_one_name_say_what_differs(cu_report, outlined, tmp_path):
    one, other = (make_run(tmp_path, science=number, finished=1) for number in (3, 4))
    make_run(tmp_path, "esd", finished=1)
    cu_report(tmp_path / "runs", "--output", "here")
    found = read_page(tmp_path / "here/index.html").tables["What keeps the runs of conabl apart"]
    assert [row[0] for row in found] == ["what", "science"]
    assert sorted(zip(found[0][1:], found[1][1:], strict=True)) == sorted(
        (f"conabl [{run.name[-8:-4]}] (1 of 3 requests)", science)
        for run, science in ((one, "3"), (other, "4"))
    )


def test_runs_of_other_code_are_named(cu_report, outlined, tmp_path):
    """One's own method in one of them only is no difference; each run shows its digest."""
    ours = identify()
    own = replace(ours, sha256="1" * 64, files=ours.files | {"mine": "1"}, dirty=True)
    other = replace(ours, sha256="2" * 64, files=ours.files | {"methods/base.py": "2"})
    make_run(tmp_path, "conabl", finished=1, code=ours)
    make_run(tmp_path, "mine", finished=1, code=own)
    said = "Made by other code than the first of the runs, or by several (see Configuration): "
    cu_report(tmp_path / "runs", "--output", "here")
    assert said not in read_page(tmp_path / "here/index.html").text
    make_run(tmp_path, "esd", finished=1, code=other)
    cu_report(tmp_path / "runs", "--output", "here")
    text = read_page(tmp_path / "here/index.html").text
    assert f"{said}esd." in text
    for fact in (ours.sha256, f"{own.sha256} (with uncommitted changes)", other.sha256):
        assert f"code sha256{fact}" in text


def test_many_runs_stand_in_several_tables(cu_report, outlined, tmp_path):
    """Six side by side, so that a printed page holds them; a hundred requests in parts too."""
    for number in range(8):
        make_run(
            tmp_path, science=number, targets=tuple(f"concept {n}" for n in range(20)), finished=20
        )
    cu_report(tmp_path / "runs", "--output", "here", "--details", "1")
    html = (tmp_path / "here/index.html").read_text()
    assert html.count("<caption>What keeps the runs of conabl apart</caption>") == 2
    assert html.count("<caption>L2 norm of the drift of each layer: keys</caption>") == 2
    heads = re.findall(
        r"<caption>UA after request</caption><thead>(.*?)</thead>", html, flags=re.DOTALL
    )
    assert [re.findall(r">(\d+)</th>", head) for head in heads] == [
        [*map(str, range(11))],
        [*map(str, range(11, 21))],
    ]


def test_many_requests_come_in_parts_that_fit_a_printed_page(cu_report, tmp_path):
    targets = tuple(f"concept {number}" for number in range(40))
    cu_report(make_run(tmp_path, targets=targets, finished=40), "--output", "here")
    html = (tmp_path / "here/index.html").read_text()
    heads = re.findall(r'<table class="heat">.*?<thead>(.*?)</thead>', html, flags=re.DOTALL)
    assert [re.findall(r">(\d+)</th>", head) for head in heads] == [
        [*map(str, range(21))],
        [*map(str, range(21, 41))],
    ]
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(data))).size
        for data in re.findall(r"jpeg;base64,([^\"]+)", html)
    ]
    # 42 concepts in three parts, 8 of 41 requests, with two concepts of the other domain
    assert sizes == [(8 * 16, 14 * 16)] * 6
    assert html.count("--print:64px") == 6
    shown = re.findall(r'<b style="grid-area:1/[0-9]">(\d+)</b>', html)[:8]
    assert shown == ["0", "6", "11", "17", "23", "29", "34", "40"]
    assert parts_of(13, 26) == [range(13)]


def test_details_are_for_the_first_runs(cu_report, outlined, by_hand, tmp_path):
    status, out, _ = cu_report(by_hand, "--details", 1, "--output", "some/where")
    note = (
        "Accuracy matrix, samples and configuration are given for the first 1 of 2 runs "
        "(--details)."
    )
    assert status == 0
    ended = "esd (2 of 3 requests): ended: no log ("
    assert out.splitlines()[0].startswith(ended)
    assert out.splitlines()[1:] == [note, "report: some/where/index.html"]
    page = read_page(tmp_path / "some/where/index.html")
    assert note in page.text
    assert [name for name in page.tables if name.startswith("Accuracy")] == [
        "Accuracy of every concept after each request: conabl"
    ]
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert len(page.tables["UA after request"]) == 3


def test_a_run_that_has_just_begun(cu_report, tmp_path):
    """Only the untouched model is measured; another run has not got so far and is left out, with a
    word.
    """
    first = make_run(tmp_path, finished=0)
    second = make_run(tmp_path, "esd", finished=0)
    (second / "steps" / "00" / "step.json").unlink()
    status, out, err = cu_report(first, second)
    assert (status, err) == (0, "")
    left_out = f"Left out, since no step is finished: {second.name} (ended: no log)."
    assert out.splitlines()[1] == left_out
    assert re.search(r"report: outputs/reports/2-runs-[0-9a-f]{8}/index.html", out)
    page = read_page(Path(out.splitlines()[-1].removeprefix("report: ")))
    assert page.tables["RA-I after request"] == [
        ["run", "0"],
        ["conabl (0 of 3 requests)", "100.0"],
    ]


def test_the_same_runs_make_the_same_page(cu_report, by_hand):
    for folder in ("one", "two"):
        cu_report(*sorted(by_hand.glob("runs/hand/*")), "--output", folder)
    for path in sorted(Path("one").rglob("*.*")):
        assert path.read_bytes() == (Path("two") / path.relative_to("one")).read_bytes(), path


# ---------------------------------------------------------------------------------------- bad input
def refused(result: tuple[int, str, str], status: int, pattern: str) -> None:
    assert result[0] == status
    assert result[1] == ""
    assert re.fullmatch(rf"cu-report: [^\n]*{pattern}[^\n]*\n", result[2]), result[2]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "required: PATH"),
        (["nowhere"], "nowhere: no such directory; give run directories"),
        (["."], "holds no run; give run directories"),
        ([".", "--details", "0"], "'0' is not a whole number from 1 on"),
        ([".", "--details", "few"], "'few' is not a whole number from 1 on"),
        ([".", "--outputs", "x"], "unrecognized arguments|holds no run"),
    ],
)
def test_wrong_arguments(cu_report, arguments, pattern):
    refused(cu_report(*arguments), 2, f"(?:{pattern})")


def test_a_broken_job_of_a_sweep(cu_report, tmp_path):
    (tmp_path / "job.json").write_text("{")
    refused(cu_report("."), 2, "job.json: cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("steps/01/step.json", b"{}", "steps/01/step.json: cannot be read"),
        (
            "steps/00/predictions.csv",
            b"step,prompt\n",
            "steps/00/predictions.csv: is missing or damaged",
        ),
        ("steps/02/grid.png", b"\x89PNG", "steps/02/grid.png: is missing or damaged"),
        ("steps/02/delta.safetensors", b"12345678", "steps/02/delta.safetensors: cannot be read"),
        (
            "steps/02/delta.safetensors",
            to_safetensors({KEY: torch.ones(2, 2)}),
            "does not have the drift that step.json names",
        ),
        ("config.yaml", b"seed: 1\n", "holds no readable config.yaml"),
        (
            "config.yaml",
            b"{seed: 0, reg: {}, setting: {plan: sequential}, sequence: {targets: [a, b, c]}}",
            "sequence has no name, domain",
        ),
    ],
)
def test_a_damaged_run(cu_report, outlined, tmp_path, name, content, pattern):
    run = make_run(tmp_path, finished=2)
    (run / name).write_bytes(content)
    refused(cu_report(run), 1, pattern)
    assert not list(tmp_path.glob("outputs/reports/*/index.html"))


def test_a_run_without_a_finished_step(cu_report, tmp_path):
    run = make_run(tmp_path, finished=0)
    (run / "steps" / "00" / "step.json").unlink()
    refused(cu_report(run), 1, "no step is finished")


def test_an_output_that_cannot_be_written(cu_report, by_hand, tmp_path):
    (tmp_path / "taken").write_text("")
    refused(cu_report(by_hand, "--output", "taken"), 1, "taken")


def test_weights_are_checked_against_the_record(tmp_path):
    run = make_run(tmp_path, finished=1)
    (run / "steps/01/delta.safetensors").unlink()
    with pytest.raises(StoreError, match=r"delta\.safetensors: cannot be read"):
        drift_by_layer(read_run(run))


# ----------------------------------------------------------------------------------------- the cost
def test_help_does_not_load_torch():
    code = "import sys; from cu_runner.cli.report import main; sys.argv = ['', '--help']\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "--details N" in done.stdout


@pytest.mark.slow
def test_a_hundred_runs(tmp_path):
    """12 requests each: within a minute, and less than 200 MB beside what torch and the libraries
    need.
    """
    targets = tuple(f"concept {number}" for number in range(12))
    for number in range(100):
        method = "conabl" if number % 2 else "esd"
        make_run(tmp_path, method, targets, finished=12, science=number, computed=True)
    code = "import sys, time\nfrom cu_runner.cli import report\n"
    code += f"import cu_runner.reporting.page\n{USED}\n"
    code += "before, started = used(), time.monotonic()\nreport.main()\n"
    code += "print(time.monotonic() - started, before, used(), file=sys.stderr)"
    command = [sys.executable, "-c", code, "runs"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    seconds, before, after = map(float, done.stderr.split())
    assert seconds < 60
    assert after - before < 200, (before, after)
    assert "first 12 of 100 runs" in done.stdout
    assert (
        len(read_page(tmp_path / "outputs/reports/runs/index.html").tables["UA after request"])
        == 101
    )


def test_runs_can_be_sent_to_wandb(cu_report, outlined, run_copy, tmp_path):
    status, out, err = cu_report(run_copy, "--wandb", "offline")
    assert (status, err) == (0, "")
    assert f"sent to W&B (offline): {run_copy.name}" in out
    (written,) = (tmp_path / "outputs/wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # W&B's service writes the file a moment later
    while run_copy.name.encode() not in written.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cu_report(run_copy, "--wandb", "elsewhere")[0] == 2


def test_a_run_that_wandb_does_not_take_is_not_sent(cu_report, outlined, run_copy, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured.\nUse wandb login")

    monkeypatch.setattr(wandb, "init", refuse)
    status, out, err = cu_report(run_copy, "--wandb", "online")
    assert status == 1
    assert [line.partition(":")[0] for line in out.splitlines()] == ["report"]
    said = (
        f"cu-report: {run_copy.name}: not sent to W&B (online): No API key configured. Use "
        "wandb login;"
    )
    assert err.startswith(said)
    assert err.count("\n") == 1
