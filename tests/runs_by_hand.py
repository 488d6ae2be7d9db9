"""Run directories made by hand, in no time: steps with numbers that a test can work out."""

from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from cu_runner import __version__
from cu_runner.evaluators.grid import draw_grid
from cu_runner.evaluators.metrics import named_metrics
from cu_runner.models.parameters import drift
from cu_runner.runtime.code_identity import CodeIdentity
from cu_runner.store.files import to_safetensors
from cu_runner.store.records import Row, StepResult, TrainingRecord
from cu_runner.store.run_directory import RunStore
from cu_runner.store.signature import signature

KEY, VALUE = (
    f"up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{kind}.weight" for kind in "kv"
)


def wrong(concept: str, cross: str, index: int) -> bool:
    """Which images of a step are not recognised: "new" on the tree from its request on, "old"
    everywhere but after request 3.
    """
    return (concept == "new" and index >= 2 and cross == "tree") or (
        concept == "old" and index in (1, 2)
    )


def colour(concept: str, index: int) -> tuple[int, int, int]:
    """Of the sample images with the first cross concept."""
    return (sum(map(ord, concept)) % 200, 40 * index, 60)


def make_run(
    outputs: Path,
    method: str = "conabl",
    targets: tuple[str, ...] = ("old", "new", "last"),
    finished: int = 3,
    *,
    seed: int = 0,
    sequence: str = "hand",
    science: int = 0,
    code: CodeIdentity | None = None,
    merged: bool = False,
    computed: bool = False,
) -> Path:
    """A run directory with the steps 0 to `finished`: retained "kept" and "near", cross concepts
    "tree" and "cup", one seed of noise. merged: its weights were merged before they were measured,
    which doubled them. computed: its metrics follow from its predictions.
    """
    retain, crosses = ["kept", "near"], ["tree", "cup"]
    names = {
        "targets": list(targets),
        "retain": retain,
        "cross_retain": crosses,
        "domain": "style",
        "cross_domain": "object",
    }
    config = {
        "sequence": names | {"name": sequence, "seeds": [188]},
        "method": {"_target_": method},
        "reg": {},
        "setting": {"plan": "sequential"},
    }
    config |= {"seed": seed, "science": science}
    directory = (
        outputs / "runs" / sequence / f"{method}-none-sequential-s{seed}-{signature(config)[:8]}"
    )
    parent = None
    with RunStore(directory, config, signature, code=code) as store:
        for index in range(finished + 1):
            concepts = [*(targets[:index] if index else targets), *retain]
            rows = [
                {
                    "step": index,
                    "prompt": f"a {cross} in {concept} style",
                    "style": concept,
                    "object": cross,
                    "seed": 188,
                    "predicted_style": "?" if wrong(concept, cross, index) else concept,
                    "score_style": 1.0,
                    "predicted_object": cross,
                    "score_object": 1.0,
                }
                for concept in concepts
                for cross in crosses
            ]
            pictures = {
                (concept, cross): Image.new(
                    "RGB", (16, 16), colour(concept, index) if cross == "tree" else "white"
                )
                for concept in concepts
                for cross in crosses
            }
            delta = {
                KEY: torch.full((2, 2), 1.5 * index),
                VALUE: torch.full((2, 2), 2.0 * index),
            }  # norms 3n and 4n, together 5n
            measured = {name: 2 * tensor for name, tensor in delta.items()} if merged else delta
            files = {
                "predictions.csv": pd.DataFrame(rows).to_csv(index=False).encode(),
                "metrics.json": b"{}",
                "grid.png": draw_grid(pictures, list(targets[:index]), ""),
            }
            row = {
                "request": index,
                "concept": targets[index - 1] if index else "",
                "UA": min(90.0 + 2 * index, 100.0) if index else None,
                "RA_I": 100.0 - index - seed,
                "RA_C": 80.0 - index,
                "RA_C_retained": 70.0,
                "UA_current": None,
                "UA_previous": None,
                "drift_l2": drift(measured).l2,
                "train_steps": 60 if index else 0,
                "train_seconds": 10.5 if index else 0.0,
                "eval_seconds": 4.0,
                "peak_memory_mb": 1000 + 10 * index,
            }
            if computed:
                gone, shown = list(targets[:index]), pd.DataFrame(rows)
                row |= named_metrics(shown, gone, "style", list(targets), retain, crosses)
            if index:
                files["delta.safetensors"] = to_safetensors(delta)
            if index and merged:
                files["merged.safetensors"] = to_safetensors(measured)
            result = StepResult(
                index=index,
                files=files,
                row=Row.of(row),
                targets=[row["concept"]] if index else [],
                model_sha256="m" * 64,
                evaluator_sha256="e" * 64,
                training=TrainingRecord(steps=60 if index else 0),
                versions={"python": "3", "torch": "2", "cu_runner": __version__},
                device="cpu (abacus)" if index < 2 else "cpu (quipu)",
                git_commit="c" * 40,
            )
            parent = store.save_step(result, parent)
    return directory
