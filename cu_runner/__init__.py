"""cu_runner: continual unlearning for text-to-image models, measured after every request.

    model = cu_runner.load_model("shapecanvas")
    edited = cu_runner.unlearn(model, ["blaze"], sequence="shapecanvas_style")
    images = edited.generate(["a house image in blaze style"])

What stands in __all__ is the public interface for Python; each name is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cu_runner.api.measure import Evaluation, evaluate
    from cu_runner.api.model import Edit, Model, load_model
    from cu_runner.api.own_sequence import nearest_anchor, own_sequence
    from cu_runner.api.runs import RunRecord, read_run
    from cu_runner.api.unlearn import unlearn
    from cu_runner.api.unlearning import Step
    from cu_runner.concepts.requests import Request, plan_requests
    from cu_runner.concepts.sequence import Concept, Sequence
    from cu_runner.concepts.sequence_file import make_sequence
    from cu_runner.evaluators.base import Evaluator, Prediction
    from cu_runner.evaluators.metrics import metrics
    from cu_runner.methods.base import Method
    from cu_runner.models.diffusion import DiffusionModel
    from cu_runner.regularizers.base import Regularizer
    from cu_runner.request.scope import Scope
    from cu_runner.retention.base import Retention
    from cu_runner.runner.training import erase
    from cu_runner.schema.settings import EvalSettings, Sampler, TrainSettings
    from cu_runner.store.run_record import find_runs

__version__ = "0.2.0"
__all__ = [
    "Concept",
    "DiffusionModel",
    "Edit",
    "EvalSettings",
    "Evaluation",
    "Evaluator",
    "Method",
    "Model",
    "Prediction",
    "Regularizer",
    "Request",
    "Retention",
    "RunRecord",
    "Sampler",
    "Scope",
    "Sequence",
    "Step",
    "TrainSettings",
    "__version__",
    "erase",
    "evaluate",
    "find_runs",
    "load_model",
    "make_sequence",
    "metrics",
    "nearest_anchor",
    "own_sequence",
    "plan_requests",
    "read_run",
    "unlearn",
]
_MODULES = {
    "api.measure": ("Evaluation", "evaluate"),
    "api.model": ("Edit", "Model", "load_model"),
    "api.own_sequence": ("nearest_anchor", "own_sequence"),
    "api.runs": ("RunRecord", "read_run"),
    "api.unlearn": ("unlearn",),
    "api.unlearning": ("Step",),
    "concepts.requests": ("Request", "plan_requests"),
    "concepts.sequence": ("Concept", "Sequence"),
    "concepts.sequence_file": ("make_sequence",),
    "evaluators.base": ("Evaluator", "Prediction"),
    "evaluators.metrics": ("metrics",),
    "methods.base": ("Method",),
    "models.diffusion": ("DiffusionModel",),
    "regularizers.base": ("Regularizer",),
    "request.scope": ("Scope",),
    "retention.base": ("Retention",),
    "runner.training": ("erase",),
    "schema.settings": ("EvalSettings", "Sampler", "TrainSettings"),
    "store.run_record": ("find_runs",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cu_runner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cu_runner.{_HOMES[name]}"), name)
