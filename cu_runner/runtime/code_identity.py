"""Which code a number was made by.

That is the files of this package and of the user that can touch it, and the libraries under them.
A file of the package counts unless it is left out here, so that a new one counts from its first
day.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cu_runner.runtime.paths import PACKAGE

# Packages and modules that only present numbers, or check and start runs.
PRESENTING = (
    "api",
    "cli",
    "reporting",
    "sweeps",
    "trackers",
    "models/low_rank.py",
    "models/pipeline.py",
    "runner/export.py",
    "runner/finished.py",
    "runner/forecast.py",
    "runner/hub.py",
    "runner/preflight.py",
    "runtime/paths.py",
    "runtime/progress.py",
    "runtime/quiet.py",
    "runtime/user_code.py",
    "schema/secrets.py",
    "store/archive.py",
    "store/leftovers.py",
    "store/proof.py",
    "store/verify.py",
    "store/whole_directory.py",
    "config/permissions.py",
)
# Packages and modules on which no image of the untouched model depends.
TRAINING = (
    "methods",
    "regularizers",
    "runner/training.py",
    "runner/early_stop.py",
    "runner/recheck.py",
    "runner/saved_state.py",
    "store/checkpoint.py",
)
LIBRARIES = ("torch", "diffusers", "transformers")
INSTALLED = {"site-packages", "dist-packages"}  # folders of what is not the user's own
NAMED = 3  # changed files that a line names


@dataclass(frozen=True)
class CodeIdentity:
    """The code that decides the numbers of a run, as step.json records it.

    sha256: over files and libraries. images_sha256: over those that images of the untouched model
    and what is seen in them depend on. files: sha256 by path in the package ("methods/conabl.py"),
    or by module of the user's ("my_methods.helper"). libraries: their versions. dirty: whether the
    checkout has uncommitted changes of the package; None for an installed one.
    """

    sha256: str
    images_sha256: str
    files: dict[str, str]
    libraries: dict[str, str]
    dirty: bool | None

    @property
    def parts(self) -> dict[str, str]:
        """Return the files and the libraries by name."""
        return self.files | self.libraries

    def changes(self, earlier: CodeIdentity) -> list[str]:
        """Name the files and libraries that differ from earlier ones, were added, or are gone."""
        now, then = self.parts, earlier.parts
        return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))

    def agrees_with(self, other: CodeIdentity) -> bool:
        """Tell whether every file and library that both name is the same.

        One's own method is in one of them only.
        """
        own, others = self.parts, other.parts
        return all(own[name] == others[name] for name in own.keys() & others.keys())


def spell_changes(names: list[str]) -> str:
    """Write changed files in a line: at most three by name."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@functools.cache
def identify(modules: tuple[str, ...] = (), shown: tuple[str, ...] = ()) -> CodeIdentity:
    """Read the code that this process runs, once.

    Args:
        modules: of the user's, that a run is made of.
        shown: those of them that images of the untouched model and what is seen in them depend on.
    """
    ours = code_files(PRESENTING)
    files = ours | user_files(modules)
    images = {name: ours[name] for name in code_files(PRESENTING + TRAINING)} | user_files(shown)
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return CodeIdentity(
        digest([files, libraries]), digest([images, libraries]), files, libraries, is_dirty()
    )


def digest(value: object) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_files(left_out: tuple[str, ...]) -> dict[str, str]:
    """Return the sha256 of the package's Python files and shipped lists, by path in it.

    Args:
        left_out: packages and modules that do not count, as paths in the package.
    """
    found = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("concepts/lists/*.*")]):
        place = path.relative_to(PACKAGE).as_posix()
        if not any(f"{place}/".startswith(f"{name}/") for name in left_out):
            found[place] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def is_dirty() -> bool | None:
    """Tell whether the checkout has uncommitted changes of the package.

    None for an installed package, or without git.
    """
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "status", "--porcelain", "--", PACKAGE.name]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return bool(found.stdout.strip()) if found.returncode == 0 else None


@dataclass(frozen=True)
class Module:
    """Where a module of the user's lies.

    file: None of a package without __init__.py. folders: of a package, with its modules.
    """

    file: Path | None
    folders: list[Path]


def user_files(modules: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of the user's modules and of every file that they import, by module.

    A package counts whole. Imports are followed at any depth of a file and through any number of
    files of the user's, but not into the standard library, what is installed, or this package; what
    is imported by a computed name is not seen.
    """
    own = {module.partition(".")[0] for module in modules}
    waiting = [name for module in modules for name in [module, *names_below(module, own)]]
    files: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        module = find_module(name, own)
        if module is None:
            continue
        waiting += [name.rpartition(".")[0]] * ("." in name)  # with a.b, a is imported too
        if module.file is not None:
            content = module.file.read_bytes()
            files[name] = hashlib.sha256(content).hexdigest()
            waiting += imported_names(name, bool(module.folders), content)
    return files


def names_below(name: str, own: set[str]) -> Iterator[str]:
    """Yield the modules in a package and in the packages below it."""
    module = find_module(name, own)
    for folder in module.folders if module else ():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def find_module(name: str, own: set[str]) -> Module | None:
    """Find a module of the user's without importing it; None for any other, or where there is none.

    Args:
        own: top-level packages that are the user's wherever they lie.
    """
    top, *rest = name.split(".")
    if top in sys.stdlib_module_names or top in ("cu_runner", *LIBRARIES):
        return None
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module such as __main__, which has no spec
        return None
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    places = [file] if file is not None else folders
    if top not in own and any(INSTALLED.intersection(place.parts) for place in places):
        return None
    found: Module | None = Module(file, folders)
    for part in rest:
        found = None if found is None else module_in(found.folders, part)
    return found


def module_in(folders: list[Path], name: str) -> Module | None:
    """Find a module in the folders of its package."""
    for folder in folders:
        if (folder / name / "__init__.py").is_file():
            return Module(folder / name / "__init__.py", [folder / name])
        if (folder / f"{name}.py").is_file():
            return Module(folder / f"{name}.py", [])
    without_file = [folder / name for folder in folders if (folder / name).is_dir()]
    return Module(None, without_file) if without_file else None


def imported_names(name: str, is_package: bool, content: bytes) -> set[str]:
    """Return every dotted name that a module's source imports, anywhere in it.

    Of `from a import b` these are both a and a.b.
    """
    try:
        tree = ast.parse(content)
    except SyntaxError:  # importing it says so
        return set()
    package = name if is_package else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # beyond the top: it cannot be imported
                continue
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found
