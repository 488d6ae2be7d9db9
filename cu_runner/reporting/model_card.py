"""The model card of an export: what was unlearned, how well, how it is loaded, what it came from.

Its front matter is what the Hugging Face hub reads. It holds the run's command with its paths, and
no path of its own: of a base model on this machine the last part of its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from cu_runner.evaluators.recovered import RECOVERED
from cu_runner.reporting.base_model import (
    CARD,
    base_name,
    base_place,
    base_remark,
    hub_id,
    is_single_file,
    licence_of,
    licence_text,
    plain,
)
from cu_runner.reporting.estimates import image_counts, label_of, of_shares
from cu_runner.runner.export import CONFIGURATIONS, Exported
from cu_runner.runner.finished import trained_run
from cu_runner.runtime.lazy import huggingface_hub
from cu_runner.schema.secrets import redact
from cu_runner.schema.values import ConfigTree
from cu_runner.store.files import sha256_of
from cu_runner.store.records import COLUMNS, StepRecord
from cu_runner.store.run_record import RunRecord

MARK = "<!-- written by cu-export -->"  # by which an export is known as one
WORDS = {
    "diffusers": "a whole diffusers directory",
    "single-file": "all weights in one file of the original layout",
    "lora": "a LoRA on top of the base model",
    "delta": "the change of the base model's {denoiser}, theta - theta_base",
}
MEANINGS = {
    "UA": "images of the unlearned concepts that no longer show them",
    "RA_I": "images of retained concepts of the same domain that still show them",
    "RA_C": "images that still show the concept of the other domain",
    "RA_C_retained": "the same, of retained concepts alone",
    "UA_worst": "UA where it is lowest, by name or under a probe",
}
GATES = """\
def hook_gates(denoiser, path):
    weights = load_file(path)
    (directions,) = (w for name, w in weights.items() if name.endswith("gate_directions"))

    def gated(values):
        def hook(layer, inputs, output):
            heard = inputs[0] @ directions.to(inputs[0]).T
            return output + (heard * (heard > 0.5)) @ values.to(output).T

        return hook

    for name, values in weights.items():
        if name.endswith(".gate_values"):
            layer = denoiser.get_submodule(name.removesuffix(".gate_values"))
            layer.register_forward_hook(gated(values))


hook_gates(pipeline.{denoiser}, "{file}")"""
CHANGES = """\
weights = dict(pipeline.{denoiser}.named_parameters())
with torch.no_grad():
    for name, change in load_file("{file}").items():
        weights[name] += change.to(weights[name])"""


def is_export(directory: Path) -> bool:
    """Tell whether a directory is what cu-export wrote."""
    try:
        return MARK in (directory / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def model_card(run: RunRecord, index: int, exported: Exported, folder: Path) -> str:
    """Return the card of an export.

    Args:
        run: that was measured: an evaluation of the run that trained the weights, or that itself.
        folder: where the files of the export lie, without the card.

    Raises:
        StoreError: predictions of the step are damaged.
    """
    blocks = [
        f"---\n{front_matter(run, exported)}---\n{MARK}",
        f"# {base_name(run.config['model'])}, with concepts unlearned",
        summary(run, index, exported),
        f"## Load\n\n{loading(run.config['model'], exported)}",
        f"## Measured\n\n{measured(run, index)}",
        f"## Made by\n\n{made_by(run, index)}",
        f"## Files\n\n{files(folder)}",
        f"## Licence\n\n{licence_text(run.config['model'])}",
    ]
    return "\n\n".join(blocks) + "\n"


def front_matter(run: RunRecord, exported: Exported) -> str:
    """Return the card's YAML for the hub."""
    model = run.config["model"]
    known = hub_id(model)
    data = huggingface_hub.ModelCardData(
        license=licence_of(model),
        base_model=known,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["unlearning", "concept-erasure", "cu_runner", *(["lora"] * bool(exported.lora))],
    )
    text = data.to_yaml()
    return text if text.endswith("\n") else f"{text}\n"


def summary(run: RunRecord, index: int, exported: Exported) -> str:
    """Return what this is, in a paragraph, and the concepts by name."""
    names, word = run.unlearned(index), {"unet": "UNet"}.get(exported.denoiser, exported.denoiser)
    whole = "" if run.complete else ", of a run that is not finished"
    requests = f"after request {index} of {run.num_requests}{whole}"
    lora = exported.lora
    how = ""
    if lora:
        left = "what it leaves out is rounding" if lora.exact else "an approximation"
        how = (
            f" It has rank {lora.rank} and holds {percent_kept(lora.kept)} of the change ({left})."
        )
    gates = (
        " It is no change of weights but gates before keys and values, which open where a text "
        "names what was unlearned: the weights behind them know it as before."
    )
    form = WORDS[exported.form].format(denoiser=word)
    return (
        f"This is {form}, {requests}.{how}{gates * exported.gates}\n\n"
        f"Unlearned ({len(names)}), in their order: {', '.join(map(plain, names))}."
    )


def percent_kept(part: float) -> str:
    """Return a part in percent, never rounded up to all of it."""
    return "100%" if part >= 1 - 1e-9 else f"{math.floor(1e5 * part) / 1e3:g}%"


def loading(model: ConfigTree, exported: Exported) -> str:
    """Return the code that loads the export into a plain pipeline, from inside its directory."""
    said = "From inside this directory, without cu_runner"
    base = f"BASE = {base_place(model)!r}{base_remark(model)}"
    reader = "from_single_file" if is_single_file(model) else "from_pretrained"
    kind = "DiffusionPipeline" if reader == "from_pretrained" else exported.pipeline
    revision = f", revision={model['revision']!r}" if model.get("revision") else ""
    load = f"pipeline = {kind}.{reader}(BASE{revision})"
    match exported.form:
        case "diffusers":
            lines = [
                "from diffusers import DiffusionPipeline",
                "",
                'pipeline = DiffusionPipeline.from_pretrained(".")',
            ]
        case "single-file":
            kind = exported.pipeline
            lines = [
                f"from diffusers import {kind}",
                "",
                f'pipeline = {kind}.from_single_file("{exported.weights}", '
                f'config="{CONFIGURATIONS}", local_files_only=True)',
            ]
        case "lora":
            said += "; diffusers needs the package peft for it"
            lines = [f"from diffusers import {kind}", "", base, load]
            lines.append('pipeline.load_lora_weights(".", weight_name="' + exported.weights + '")')
        case _:
            code = (GATES if exported.gates else CHANGES).replace("{file}", exported.weights)
            code = code.replace("{denoiser}", exported.denoiser)
            lines = [*([] if exported.gates else ["import torch"])]
            lines += [f"from diffusers import {kind}", "from safetensors.torch import load_file"]
            lines += ["", base, load, code]
    code = "\n".join(lines)
    return f"{said}:\n\n```python\n{code}\n```"


def measured(run: RunRecord, index: int) -> str:
    """Return a table of the metrics with their intervals, and how the images were made."""
    if not run.records[index].evaluated:
        return (
            "**Nothing was measured after this request**: eval.every left it out. `cu-eval RUN` "
            "measures it; then `cu-export` of that evaluation tells its numbers."
        )
    rows = ["| | percent | 95% interval | images | untouched |", "|---|---|---|---|---|"]
    rows += share_rows(run, index)
    if others := [*number_rows(run, index)]:
        rows += ["", "| | value | untouched |", "|---|---|---|", *others]
    how, sequence = run.config["eval"], run.config["sequence"]
    scheduler = how.get("scheduler") or "the base model's own scheduler"
    parts = sequence["domains"].values() if "domains" in sequence else [sequence]
    count = max(len(part["seeds"]) for part in parts)
    where = run.config["model"].get("resolution")
    lines = [
        "\n".join(rows),
        f"Images of {where} pixels a side, {how['steps']} steps, guidance {how['guidance']:g}, "
        f"{scheduler}, {count} seed{'s' * (count > 1)} of noise. Intervals are Wilson's over "
        "images, of one run: another seed of training gives another model.",
    ]
    if not any(map(RECOVERED.fullmatch, run.records[index].row.metrics)):
        lines.append(
            "**Whether it can be had back was not measured.** Unlearned by name is not gone: other "
            "words, other samplers and a few steps of training bring concepts back "
            "(`cu-eval RUN recovery=thorough`, then `cu-export` of that evaluation)."
        )
    return "\n\n".join(lines)


def share_rows(run: RunRecord, index: int) -> Iterator[str]:
    """Yield a row of the table for each share of images."""
    counts, own = image_counts(run, index), run.records[index].row.metrics
    before = run.records[0].row.metrics
    recovered = [name for name in own if RECOVERED.fullmatch(name)]
    for name in [*COLUMNS, *recovered]:
        value, number = own.get(name), counts.get(name)
        if value is None or number is None:
            continue
        low, high = of_shares([float(value)], number).ends
        meaning = MEANINGS.get(name) or "images that show an unlearned concept again"
        if name.endswith(("_untouched", "_retained")) and name not in COLUMNS:
            meaning = "control of the probe"
        then = before.get(name)
        shown = "" if then is None else f"{then:.1f}"
        yield (
            f"| {label_of(name)}: {meaning} | {value:.1f} | {low:.1f} to {high:.1f} "
            f"| {number} | {shown} |"
        )


def number_rows(run: RunRecord, index: int) -> Iterator[str]:
    """Yield a row for each metric that is no share of images."""
    own, before = run.records[index].row.metrics, run.records[0].row.metrics
    counts = image_counts(run, index)
    for name, value in own.items():
        of_images = name in counts or name.startswith("UA_") or RECOVERED.fullmatch(name)
        if value is not None and not of_images:
            then = before.get(name)
            yield f"| {plain(name)} | {value:.5g} | {'' if then is None else format(then, '.5g')} |"


def made_by(run: RunRecord, index: int) -> str:
    """Return the commands, and the hashes by which each thing is known."""
    trained = trained_run(run)
    record = trained.records[index]
    commands = [
        each.command for each in (trained, *([run] if run.is_evaluation else [])) if each.command
    ]
    lines = []
    if commands:
        shown = redact("\n".join(commands))
        lines.append(f"```bash\n{shown}\n```")
    else:
        lines.append("The Python interface of cu_runner; no command was recorded.")
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    facts = {
        "base model (components and weights)": record.model_sha256,
        "evaluator": run.records[index].evaluator_sha256,
        "step (chain over every file from the base model on)": record.sha256,
        "weights of the step": record.files[trained.weights(index).name],
        "code that trained": record.code.sha256,
    }
    rows = [
        "| sha256 of | |",
        "|---|---|",
        *(f"| {name} | `{value}` |" for name, value in facts.items()),
    ]
    lines += ["\n".join(rows), f"On {plain(record.device)}; {plain(versions)}.{dirty(record)}"]
    return "\n\n".join(lines)


def dirty(record: StepRecord) -> str:
    """Return a sentence where the code had uncommitted changes."""
    return " The checkout had uncommitted changes." if record.code.dirty else ""


def files(folder: Path) -> str:
    """Return a table of every file and its sha256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [f"| `{path.relative_to(folder).as_posix()}` | `{sha256_of(path)}` |" for path in paths]
    return "\n".join(["| file | sha256 |", "|---|---|", *rows])
