"""The files of a checkpoint: where it lies, what of it is fetched, which files hold weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cu_runner.runtime.lazy import huggingface_hub
from cu_runner.runtime.paths import PACKAGE
from cu_runner.schema.errors import ModelError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Shards of some precision come with the precision before their number, or after it.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)"
    r"(\.fp16)?(?:-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
)
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")  # SDXL has them
TRANSFORMER = "transformer"  # in the place of a UNet
DENOISERS = ("unet", TRANSFORMER)
THIRD = ("text_encoder_3", "tokenizer_3")  # Stable Diffusion 3 has them


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a component's weights.

    variant: "fp16" or None. kind: "safetensors" or "bin", a pickle.
    """

    paths: list[Path]
    variant: str | None
    kind: str


def locate(
    path: str, revision: str | None = None, *, download: bool = True, denoiser: bool = True
) -> Path:
    """Find where a checkpoint lies.

    Args:
        path: a local file or directory; `package:...` is inside the installed cu_runner; what else
            has the form ORGANISATION/NAME is a repository of the Hugging Face hub.
        revision: branch, tag or commit of the repository; None is its main branch.
        download: fetch from the hub what is not in its local cache.
        denoiser: fetch the weights of the UNet or the transformer too.

    Raises:
        ModelError: it is not there, or a revision is asked of what is on this machine.
    """
    inside = path.removeprefix("package:")
    found = PACKAGE / inside if inside != path else Path(path).expanduser()
    if found.exists() and revision is not None:
        raise ModelError(
            f"model.revision={revision}: {path} is on this machine; only a repository of the hub "
            "has revisions, use null"
        )
    if found.exists():
        return found
    if HUB_ID.fullmatch(path):
        return fetch(path, revision, download, denoiser)
    raise ModelError(f"{path}: no such file or directory; give a local diffusers directory or file")


def fetch(repository: str, revision: str | None, download: bool, denoiser: bool = True) -> Path:
    """Return the local copy of a repository.

    It holds configurations and safetensors, fp16 ones where there are no others.

    Raises:
        ModelError: the hub did not give it.
    """
    place = {"revision": revision, "local_files_only": not download}
    for variant in ("", ".fp16"):
        try:
            root = Path(
                huggingface_hub.snapshot_download(
                    repository, allow_patterns=wanted_files(variant, denoiser), **place
                )
            )
        # no network, no such repository or revision, no permission: the library has a type for each
        except Exception as error:
            raise ModelError(
                f"{repository}: no such directory here, and the Hugging Face hub did not give it "
                f"({type(error).__name__}); give model.path a local diffusers directory or file"
            ) from error
        parts = [config.parent for config in root.glob("*/config.json")]
        known = {*COMPONENTS, *SECOND, *THIRD, TRANSFORMER} - set(() if denoiser else DENOISERS)
        if all(find_weights(part) for part in parts if part.name in known):
            break
    return root


def wanted_files(variant: str, denoiser: bool = True) -> list[str]:
    """List patterns of the files of a hub repository that make up a model.

    Args:
        variant: "" or ".fp16".
        denoiser: the weights of the UNet or the transformer too.
    """
    stems = [f"model{variant}", f"model{variant}-0*", f"model-0*-of-?????{variant}"]
    weights = [f"*{stem}.safetensors" for stem in stems] + [
        f"*model.safetensors.index{variant}.json"
    ]
    configurations = ["model_index.json", "scheduler/*", "tokenizer*/*", "*/config.json"]
    return configurations + [
        f"{part}/{name}"
        for part in (*(DENOISERS if denoiser else ()), "vae", "text_encoder*")
        for name in weights
    ]


def find_weights(directory: Path) -> WeightFiles | None:
    """Find the weights of a component; None if there are none.

    safetensors come before pickles, full precision before fp16.
    """
    found: dict[tuple[str, str | None], list[Path]] = {}
    for path in sorted(directory.glob("*")):
        if match := WEIGHTS.fullmatch(path.name):
            found.setdefault((match[3], "fp16" if match[1] or match[2] else None), []).append(path)
    for kind in ("safetensors", "bin"):
        for variant in (None, "fp16"):
            if (kind, variant) in found:
                return WeightFiles(found[kind, variant], variant, kind)
    return None
