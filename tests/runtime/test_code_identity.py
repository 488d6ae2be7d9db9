"""Which files count for a number: those of the package, and what a user's module imports."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cu_runner.runtime import code_identity
from cu_runner.runtime.code_identity import (
    PRESENTING,
    TRAINING,
    CodeIdentity,
    code_files,
    identify,
    spell_changes,
    user_files,
)
from cu_runner.runtime.paths import PACKAGE

FILES = {
    "my_parts/__init__.py": "",
    "my_parts/halving.py": "import torch\n\ndef late():\n    from .helper import half\n",
    "my_parts/helper.py": "from my_numbers import HALF\nimport json, numpy.linalg\n",
    "my_parts/deep/__init__.py": "",
    "my_parts/deep/spare.py": "from ... import beyond\nfrom ..helper import half\n",
    "my_numbers.py": "from my_space import inner\nimport cu_runner.methods.base\nimport gone\n",
    "my_space/inner.py": "import my_numbers\n",
    "my_other.py": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path with the user's modules."""
    for name, text in FILES.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_a_users_module_counts_with_all_that_it_imports(folder):
    alone = {"my_parts", "my_parts.halving", "my_parts.helper", "my_numbers", "my_space.inner"}
    assert set(user_files(("my_parts.halving",))) == alone
    whole = {"my_parts.deep", "my_parts.deep.spare"}
    assert set(user_files(("my_parts",))) == alone | whole
    assert set(user_files(("my_other", "gone", "json", "torch", "cu_runner"))) == {"my_other"}


@pytest.mark.parametrize("file", ["my_parts/helper.py", "my_space/inner.py", "my_parts/halving.py"])
def test_an_edit_anywhere_in_it_is_another_code(folder, file):
    before = identify.__wrapped__(("my_parts.halving",))
    assert identify.__wrapped__(("my_parts.halving",)) == before
    (folder / file).write_text(FILES[file] + "# edited\n", encoding="utf-8")
    after = identify.__wrapped__(("my_parts.halving",))
    name = file.removesuffix(".py").replace("/", ".")
    assert after.changes(before) == [name]
    assert after.sha256 != before.sha256
    assert after.images_sha256 == before.images_sha256  # no image of the untouched model needs it
    shown = [identify.__wrapped__(("my_parts",), ("my_parts",)).images_sha256]
    (folder / file).write_text(FILES[file], encoding="utf-8")
    shown.append(identify.__wrapped__(("my_parts",), ("my_parts",)).images_sha256)
    assert shown[0] != shown[1]


def test_an_installed_package_counts_where_it_is_allowed_itself(tmp_path, monkeypatch):
    place = tmp_path / "site-packages"
    (place / "their_plugin").mkdir(parents=True)
    (place / "their_plugin/__init__.py").write_text("import their_library\n", encoding="utf-8")
    (place / "their_library.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    assert set(user_files(("their_plugin",))) == {"their_plugin"}


def test_every_file_of_the_package_counts_but_for_those_left_out():
    every = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    counted = set(code_files(PRESENTING))
    for name in (*PRESENTING, *TRAINING):
        assert (PACKAGE / name).exists(), name
    left_out = every - counted
    assert {name.partition("/")[0] for name in left_out} >= {"cli", "reporting", "sweeps"}
    for name in ("methods/_forgetting.py", "runner/training.py", "models/sampling.py"):
        assert name in counted
    lists = {name for name in counted if name.endswith(".txt")}
    assert lists == {f"concepts/lists/{path.name}" for path in PACKAGE.glob("concepts/lists/*.txt")}
    assert len(lists) >= 10


def test_an_edited_package(tmp_path, monkeypatch):
    """Methods do not touch the untouched model's images; what is new counts, what presents not."""
    ignored = shutil.ignore_patterns("weights", "__pycache__")
    package = Path(shutil.copytree(PACKAGE, tmp_path / "cu_runner", ignore=ignored))
    monkeypatch.setattr(code_identity, "PACKAGE", package)
    identities = [identify.__wrapped__()]
    for name in ("methods/base.py", "models/sampling.py", "models/new.py", "cli/run.py"):
        with (package / name).open("a", encoding="utf-8") as file:
            file.write("# edited\n")
        identities.append(identify.__wrapped__())
    changes = [after.changes(before) for before, after in itertools.pairwise(identities)]
    assert changes == [["methods/base.py"], ["models/sampling.py"], ["models/new.py"], []]
    images = [identity.images_sha256 for identity in identities]
    assert images[0] == images[1] != images[2] != images[3] == images[4]
    assert len({identity.sha256 for identity in identities}) == 4
    assert identities[0].dirty is None  # no checkout
    assert "/" + tmp_path.name not in json.dumps(asdict(identities[0]))


def test_another_version_of_a_library_is_another_code(monkeypatch):
    before = identify.__wrapped__()
    version = code_identity.importlib.metadata.version
    monkeypatch.setattr(
        code_identity.importlib.metadata,
        "version",
        lambda name: "0.0" if name == "diffusers" else version(name),
    )
    after = identify.__wrapped__()
    assert after.changes(before) == ["diffusers"]
    assert (after.sha256, after.images_sha256) != (before.sha256, before.images_sha256)
    assert after.sha256 != before.sha256
    assert after.images_sha256 != before.images_sha256


def test_a_line_names_three_files_at_most():
    assert spell_changes(["a"]) == "a"
    assert spell_changes(["a", "b", "c"]) == "a, b, c"
    assert spell_changes(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_records_agree_where_both_name_a_file():
    ours, mine = (
        CodeIdentity("", "", files, {"torch": "2"}, None)
        for files in ({"x": "1"}, {"x": "1", "m": "2"})
    )
    assert ours.agrees_with(mine)
    assert not ours.agrees_with(replace(mine, libraries={"torch": "3"}))
    assert not ours.agrees_with(replace(ours, files={"x": "0"}))
