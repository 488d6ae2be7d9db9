"""What cu-report shows of the probes of recovery, against numbers worked out by hand."""

import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from runs_by_hand import make_run
from scipy.stats import binomtest
from test_page import Page, cu_report, read_page, refused  # noqa: F401, cu_report is a fixture

from cu_runner.evaluators.recovered import columns_of, read_recovery, recovery_metrics
from cu_runner.reporting.page_curves import draw_line, lines_of
from cu_runner.reporting.page_plots import BAND, THIN
from cu_runner.reporting.recovery_data import read_seen
from cu_runner.store.files import to_csv
from cu_runner.store.layout import RECOVERY, RECOVERY_VALUES
from cu_runner.store.records import StepResult
from cu_runner.store.run_directory import RunStore
from cu_runner.store.run_record import read_run
from cu_runner.store.signature import signature

PROBES = ("relearning", "paraphrase", "residual", "composition", "noise")  # noise measures nowhere
DASH = "\N{EN DASH}"
HEAD = ["probe", "request", "strongest", "recovered", "images", "untouched", "retained"]
ERASED, UNTOUCHED = ("erased", "edited"), ("erased", "untouched")
RETAINED, RETAINED_UNTOUCHED = ("retained", "edited"), ("retained", "untouched")


def looked(
    probe: str, kind: tuple[str, str], variant: str, dose: float, hits: dict[str, int], of: int = 4
) -> list[dict[str, object]]:
    """Rows of recovery.csv: of so many images of each concept, how many show it."""
    group, weights = kind
    return [
        {
            "probe": probe,
            "group": group,
            "weights": weights,
            "variant": variant,
            "dose": dose,
            "image": image,
            "both": 0,
            "prompt": "words",
            "style": concept,
            "object": "tree",
            "seed": 188,
            "predicted_style": concept if image < count else "?",
            "score_style": 1.0,
            "predicted_object": "tree",
            "score_object": 1.0,
        }
        for concept, count in hits.items()
        for image in range(of)
    ]


def paraphrase(short: dict[str, int], long: dict[str, int]) -> list[dict[str, object]]:
    """Of a request: of four images, how many show each unlearned concept."""
    rows = []
    for variant, hits in (("short", short), ("long", long)):
        rows += looked("paraphrase", ERASED, variant, 0, hits)
        rows += looked("paraphrase", UNTOUCHED, variant, 0, dict.fromkeys(hits, 4))
    rows += looked("paraphrase", RETAINED, "short", 0, {"kept": 3, "near": 3})
    return rows + looked("paraphrase", RETAINED, "long", 0, {"kept": 3, "near": 4})


def relearning(more: int = 0) -> list[dict[str, object]]:
    """more: images of "old" that show it after 10 steps, beside one."""
    own = {0: (0, 0, 0), 10: (1 + more, 2, 0), 30: (4, 3, 4)}  # old, new, last
    rows = []
    for dose, hits in own.items():
        named = dict(zip(("old", "new", "last"), hits, strict=True))
        rows += looked("relearning", ERASED, "own", dose, named)
        rows += looked("relearning", UNTOUCHED, "own", dose, dict.fromkeys(named, 4))
        rows += looked("relearning", RETAINED, "own", dose, {"kept": 4, "near": 4 - dose // 10})
        few = dict.fromkeys(named, int(dose == 30))
        rows += looked("relearning", ERASED, "unrelated", dose, few)
    return rows


def numbers(values: dict[str, float], kind: tuple[str, str]) -> list[dict[str, object]]:
    """Rows of recovery_values.csv of a probe."""
    group, weights = kind
    start = {"probe": "residual", "group": group, "weights": weights, "variant": "", "dose": 0.0}
    return [start | {"concept": name, "value": value} for name, value in values.items()]


def with_probes(
    run: Path,
    images: dict[int, list[dict[str, object]]],
    values: dict[int, list[dict[str, object]]],
) -> Path:
    """A run with the steps of another one, at which probes have measured too.

    images, values: rows of recovery.csv and recovery_values.csv by step.
    """
    made = read_run(run)
    config = made.config | {"recovery": {name: {} for name in PROBES}}
    directory, parent = run.with_name(run.name[:-8] + signature(config)[:8]), None
    with RunStore(directory, config, signature) as store:
        for index, record in enumerate(made.records):
            files = {name: (made.step_dir(index) / name).read_bytes() for name in record.files}
            tables = []
            for name, rows in ((RECOVERY, images), (RECOVERY_VALUES, values)):
                if index in rows:
                    table = pd.DataFrame([{"step": index} | row for row in rows[index]])
                    files[name] = to_csv(table)
                tables.append(read_recovery(io.BytesIO(files[name])) if index in rows else None)
            ua = record.row.metrics["UA"]
            found = columns_of(PROBES, recovery_metrics(*tables, [("style", "object")], ua))
            row = replace(record.row, metrics=record.row.metrics | found)
            result = StepResult(
                index=index,
                files=files,
                row=row,
                targets=record.targets,
                model_sha256=record.model_sha256,
                evaluator_sha256=record.evaluator_sha256,
                training=record.training,
                versions=record.versions,
                device=record.device,
                git_commit=record.git_commit,
            )
            parent = store.save_step(result, parent)
    return directory


def make_probed(outputs: Path, seed: int = 0, more: int = 0) -> Path:
    """A run of three requests with probes; its metrics follow from its files."""
    images = {
        1: paraphrase({"old": 1}, {"old": 0}),
        2: paraphrase({"old": 0, "new": 1}, {"old": 2, "new": 1}),
        3: relearning(more)
        + paraphrase({"old": 0, "new": 1, "last": 0}, {"old": 1, "new": 3, "last": 4})
        + looked("composition", RETAINED, "", 0, {"near": 4, "kept": 2})
        + looked("composition", RETAINED_UNTOUCHED, "", 0, {"near": 4, "kept": 4}),
    }
    values = {
        1: numbers({"old": 60.0}, ERASED) + numbers({"old": 100.0}, UNTOUCHED),
        2: numbers({"old": 50.5, "new": -2.0}, ERASED)
        + numbers({"old": 100.0, "new": 103.0}, UNTOUCHED),
    }
    run = make_run(outputs, seed=seed, computed=True)
    return with_probes(run, images, values)


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    return make_probed(tmp_path_factory.mktemp("probed"))


@pytest.fixture
def page(cu_report, probed, tmp_path) -> Page:  # noqa: F811
    status, _, err = cu_report(probed, "--output", "here")
    assert (status, err) == (0, "")
    return read_page(tmp_path / "here/index.html")


def wilson(hits: int, images: int) -> str:
    """The 95% interval of a share of images, as the page writes it."""
    ends = binomtest(hits, images).proportion_ci(0.95, method="wilson")
    return f"({100 * ends.low:.1f} to {100 * ends.high:.1f})"


# ---------------------------------------------------------------------------------------- the page
def test_a_table_of_what_each_probe_recovers(page):
    assert page.tables["Recovered under each probe at its last measurement, %: conabl"] == [
        HEAD,
        [
            "relearning",
            "3",
            "own, dose 30",
            f"91.7 {wilson(11, 12)}",
            "11 of 12",
            "100.0",
            "62.5",  # kept 4 of 4, near 1 of 4
        ],
        ["paraphrase", "3", "long", f"66.7 {wilson(8, 12)}", "8 of 12", "100.0", "87.5"],
        ["residual", "2", DASH, "24.2", DASH, "101.5", DASH],  # no image, so no interval
        ["composition", "3", DASH, f"75.0 {wilson(6, 8)}", "6 of 8", "100.0", DASH],
    ]
    # by name old is recognised again, new with one of two, last always
    assert "After request 3: UA by name 16.7; under the strongest probe 8.3." in page.text


def test_heat_maps_have_concepts_in_order_and_blank_cells(page):
    old, new, last = (
        f"{name}, unlearned from request {since} on"
        for since, name in enumerate(("old", "new", "last"), start=1)
    )
    # the strongest variant of each request: short, then long twice
    assert page.tables["Recognised under paraphrase after each request, %: conabl"] == [
        ["request", "1", "2", "3"],
        [old, "25", "50", "25"],
        [new, "", "25", "75"],
        [last, "", "", "100"],
        ["untouched model, mean", "100", "100", "100"],
        ["retained concepts, mean", "75", "87.5", "87.5"],
    ]
    assert page.tables["Recognised under relearning after each request, %: conabl"][1:] == [
        [old, "", "", "100"],
        [new, "", "", "75"],
        [last, "", "", "100"],
        ["untouched model, mean", "", "", "100"],
        ["retained concepts, mean", "", "", "62.5"],
    ]
    assert page.tables["Numbers of residual after each request: conabl"] == [
        ["request", "1", "2", "3"],
        [old, "60", "50.5", ""],
        [new, "", "-2", ""],
        ["untouched model, mean", "100", "101.5", ""],
    ]
    assert page.tables["Recognised under composition after each request, %: conabl"][1:] == [
        ["kept", "", "", "50"],  # in the order of the sequence
        ["near", "", "", "100"],
        ["untouched model, mean", "", "", "100"],
    ]
    assert not [name for name in page.tables if "noise" in name]


def test_every_share_of_a_heat_map_has_its_interval(page):
    def share(hits: int) -> str:
        found = binomtest(hits, 4).proportion_ci(0.95, method="wilson")
        return f"{hits} of 4 ({100 * found.low:.1f} to {100 * found.high:.1f})"

    heat = "Recognised under paraphrase after each request, %: conabl"
    assert page.tables[f"{heat}, intervals"] == [
        ["request", "1", "2", "3"],
        ["old", share(1), share(2), share(1)],
        ["new", "", share(1), share(3)],
        ["last", "", "", share(4)],
    ]
    assert not [name for name in page.tables if "residual" in name and "intervals" in name]


def test_cells_of_unlearned_concepts_have_their_colour(page, tmp_path):
    html = (tmp_path / "here/index.html").read_text()
    start = html.index("<caption>Numbers of residual after each request")
    table = html[start : html.index("</table>", start)]
    cells = ("60", "50.5", "0", "100", "100")  # a colour stays within 0 and 100
    kinds = (' class="gone"',) * 3 + ("",) * 2
    places = [
        table.index(f'<td{kind} style="--v:{value}">')
        for kind, value in zip(kinds, cells, strict=True)
    ]
    assert places == sorted(places)
    start = html.index("<caption>Recognised under composition")
    assert "gone" not in html[start : html.index("</table>", start)]
    assert '<tr class="first"><th scope="row">untouched model, mean</th>' in table
    written = [f"recovered-1-{name}" for name in PROBES[:4]] + ["by-dose-1-relearning"]
    plots = [path.name for path in (tmp_path / "here/plots").iterdir()]
    for name in written:
        for suffix in ("png", "svg"):
            (found,) = (each for each in plots if each.startswith(name) and each.endswith(suffix))
    assert sum(each.startswith(("recovered", "by-dose")) for each in plots) == 10
    with Image.open(tmp_path / "here/plots" / found.replace("svg", "png")) as picture:
        assert picture.width > 500


def test_the_curve_has_its_numbers_behind_a_fold(page, tmp_path):
    """The interval of a dose is over the twelve images of the three concepts."""
    zero, one, three = (wilson(hits, 12) for hits in (0, 3, 11))
    assert page.tables["Recognised under relearning by dose after request 3, %: conabl"] == [
        ["dose", "0", "10", "30"],
        ["own: unlearned concepts", f"0.0 {zero}", f"25.0 {one}", f"91.7 {three}"],
        ["own: untouched model", "100.0", "100.0", "100.0"],
        ["own: retained concepts", "100.0", "87.5", "62.5"],
        ["unrelated: unlearned concepts", f"0.0 {zero}", f"0.0 {zero}", f"25.0 {one}"],
    ]
    assert [name for name in page.tables if "by dose" in name] == [
        "Recognised under relearning by dose after request 3, %: conabl"
    ]
    html = (tmp_path / "here/index.html").read_text()
    start = html.index('<section id="recovery">')
    section = html[start : html.index("</section>", start)]
    assert section.count('<figure class="plot">') == 1
    said = "Percent recognised under relearning against the dose, after request 3, a line per "
    said += "variant and control: conabl; the table below has the numbers"
    assert f'<svg role="img" aria-label="{said}" viewBox=' in section
    assert "<details><summary>Numbers</summary>" in section
    legend = section[section.index('<ul class="legend">') : section.index("</ul>")]
    assert legend.count("<li>") == 4
    assert legend.count('stroke-width="0.8"') == 2


def test_lines_are_means_and_only_the_unlearned_concepts_have_a_band(probed):
    lines = lines_of([read_seen(read_run(probed))["relearning"][3]])
    axes = Figure().subplots()
    for line in lines:
        draw_line(axes, line)
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn[0] == [[0, 0], [10, 25], [30, pytest.approx(91.6667, abs=1e-3)]]
    assert drawn[2] == [[0, 100], [10, 87.5], [30, 62.5]]
    assert [line.get_linewidth() == THIN for line in axes.lines] == [False, True, True, False]
    assert len({line.get_color() for line in axes.lines[:3]}) == 1
    own, unrelated = axes.collections
    assert own.get_alpha() == BAND
    ends = binomtest(11, 12).proportion_ci(0.95, method="wilson")
    assert own.get_paths()[0].get_extents().y1 == pytest.approx(100 * ends.high)
    ends = binomtest(3, 12).proportion_ci(0.95, method="wilson")
    assert unrelated.get_paths()[0].get_extents().y1 == pytest.approx(100 * ends.high)


def test_numbers_are_those_of_the_metrics(probed):
    run = read_run(probed)
    row = run.records[3].row.metrics
    for probe in ("relearning", "paraphrase", "composition"):
        for ending, value in read_seen(run)[probe][3].means.items():
            said = row[f"recovered_{probe}{ending}"]
            assert (value != value) if said is None else value == pytest.approx(said, abs=1e-3)
    assert row["UA_worst"] == 8.333


def test_seeds_are_one_table_and_single_ones_are_folded(cu_report, outlined, tmp_path):  # noqa: F811
    runs = [make_probed(tmp_path, seed=0), make_probed(tmp_path, seed=1, more=3)]
    assert cu_report(*runs, "--output", "here")[0] == 0
    tables = read_page(tmp_path / "here/index.html").tables
    caption = "Recovered under each probe at its last measurement, %: conabl"
    both = wilson(22, 24)  # of one number, the interval over seeds is narrower
    assert tables[caption][1][3:5] == [f"91.7 {both}", "22 of 24"]
    alone = tables[f"{caption}, single seeds"]
    assert alone[0] == [HEAD[0], "seed", *HEAD[1:]]
    assert [row[:2] for row in alone[1:3]] == [["relearning", "0"], ["relearning", "1"]]
    assert alone[2][4] == f"91.7 {wilson(11, 12)}"
    curve = tables["Recognised under relearning by dose after request 3, %: conabl"]
    # 25 and 50: their t-interval is wider than that of 9 of 24 images, and is cut
    assert curve[1][2] == "37.5 (0.0 to 100.0)"
    heat = "Recognised under paraphrase after each request, %: conabl"
    assert tables[heat] == tables[f"{heat}, seed 0"] == tables[f"{heat}, seed 1"]


# -------------------------------------------------------------------------------- without, damaged
def test_a_run_without_probes_is_shown_as_before(cu_report, probed, tmp_path):  # noqa: F811
    """Probes add their section and nothing else; without them there is no word of it."""
    pages = []
    for run in (make_run(tmp_path, computed=True), probed):
        assert cu_report(run, "--output", "here")[0] == 0
        html = (tmp_path / "here/index.html").read_text()
        pages.append(html[: html.index('<section id="configuration">')])
    plain, whole = pages
    assert "recover" not in plain.lower()
    link = '<li><a href="#recovery">Recovery</a></li>'
    start = whole.index('<section id="recovery">')
    end = whole.index('<section id="samples">')
    assert (whole[:start] + whole[end:]).replace(link, "") == plain


def test_only_runs_with_probes_stand_in_the_section(cu_report, outlined, probed, tmp_path):  # noqa: F811
    plain = make_run(tmp_path, "esd", computed=True)
    cu_report(plain, probed, "--output", "here")
    html = (tmp_path / "here/index.html").read_text()
    start = html.index('<section id="recovery">')
    section = html[start : html.index("</section>", start)]
    assert section.count("<h3>") == section.count("<h3>conabl</h3>") == 1


def test_probes_that_have_not_measured_yet_show_nothing(cu_report, outlined, tmp_path):  # noqa: F811
    run = with_probes(make_run(tmp_path, finished=1, computed=True), {}, {})
    assert cu_report(run, "--output", "here")[0] == 0
    page = read_page(tmp_path / "here/index.html")
    assert not [name for name in page.tables if name.startswith("Reco")]
    assert "#recovery" not in (tmp_path / "here/index.html").read_text()


def test_numbers_alone_have_no_strongest_probe(cu_report, outlined, tmp_path):  # noqa: F811
    values = {1: numbers({"old": 60.0}, ERASED)}
    run = with_probes(make_run(tmp_path, finished=1, computed=True), {}, values)
    assert cu_report(run, "--output", "here")[0] == 0
    page = read_page(tmp_path / "here/index.html")
    assert "under the strongest probe" not in page.text
    assert len(page.tables["Recovered under each probe at its last measurement, %: conabl"]) == 2


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", [RECOVERY, RECOVERY_VALUES])
def test_damaged_files_are_refused_in_a_line(
    cu_report,  # noqa: F811
    outlined,
    tmp_path,
    monkeypatch,
    name,
    by_hand,
):
    """Also where the proof of the metrics is passed over, which reads them first."""
    if by_hand:
        monkeypatch.setattr("cu_runner.reporting.page_groups.require_true", lambda run: None)
    run = make_probed(tmp_path)
    path = run / "steps/02" / name
    path.write_bytes(path.read_bytes().replace(b"edited", b"untouched"))
    refused(cu_report(run), 1, f"steps/02/{name}: is missing or damaged")
    assert not list(tmp_path.glob("outputs/reports/*/index.html"))
