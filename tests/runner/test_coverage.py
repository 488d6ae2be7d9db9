"""Images of one's own that lack an object at a request are refused before anything is trained."""

import pytest
from conftest import SMOKE

from cu_runner.cli import doctor
from cu_runner.config.compose import compose

HEAD = "prompt,concept,seed,object\n"
FULL = [
    f"a {cross} in {name},{name},7,{cross}"
    for name in ("torch light", "snow drift", "lava flow", "fog bank")
    for cross in ("tree", "star")
]


@pytest.fixture
def words(tmp_path):
    """Returns words(concepts whose star is left out) -> overrides that name such a file."""

    def make(*without: str) -> list[str]:
        lines = [line for line in FULL if not ("star" in line and line.split(",")[1] in without)]
        (tmp_path / "mine.csv").write_text(HEAD + "\n".join(lines) + "\n")
        return [*SMOKE, f"+sequence.prompts={tmp_path}/mine.csv"]

    return make


RETAINED = ("lava flow", "fog bank")


@pytest.mark.parametrize(
    ("without", "plan", "late"),
    [
        ((), "independent", None),
        (RETAINED, "independent", None),
        ((*RETAINED, "snow drift"), "independent", "snow drift"),  # request 2
        ((*RETAINED, "snow drift"), "sequential", None),  # request 1's images are still there
        ((*RETAINED, "torch light"), "sequential", "torch light"),
        ((*RETAINED, "torch light"), "simultaneous", "torch light"),
        ((*RETAINED, "torch light", "snow drift"), "sequential", "no request"),
    ],
)
def test_every_request_is_checked_before_the_first(words, tmp_path, without, plan, late):
    planned = compose([*words(*without), f"setting={plan}"])
    sequence = planned.sequence.build()
    if late is None:
        assert len(planned.requests(sequence)) == 2
        return
    with pytest.raises(ValueError, match=rf"^sequence.prompts={tmp_path}/mine.csv: after ") as said:
        planned.requests(sequence)
    assert f"after {late}, no image shows object 'star'" in str(said.value)


def test_merged_requests_are_measured_on_all_images_so_far(words):
    planned = compose([*words(*RETAINED, "snow drift"), "reg=merge"])
    assert planned.setting.plan == "independent"
    assert len(planned.requests(planned.sequence.build())) == 2


def test_run_dry_run_and_doctor_refuse_alike(in_process, call_command, words, tmp_path):
    chosen = [*words(*RETAINED, "snow drift"), "setting=independent"]
    said = {in_process(*chosen), in_process(*chosen, "dry_run=true")}
    said.add(call_command(doctor.main, "cu-doctor", *chosen))
    assert {status for status, _, _ in said} == {2}
    assert len({err.partition(": ")[2] for _, _, err in said}) == 1
    assert all(err.count("\n") == 1 for _, _, err in said)
    assert not list((tmp_path / "outputs/runs").rglob("steps"))
