"""What a run imports and composes, so that the forks of the process that imports this begin warm.

A name of diffusers or transformers imports its module when it is first asked for.
"""

import gc
import importlib
import pkgutil

gc.disable()  # what is imported stays
LIBRARIES = {
    "torch": [],
    "torchvision.transforms.v2": [],
    "torch.utils.data": [],
    "diffusers": [
        "AutoencoderKL",
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
    ],
    "transformers": [
        "AutoImageProcessor",
        "AutoModelForImageClassification",
        "AutoTokenizer",
        "CLIPTextModel",
        "CLIPTokenizer",
        "PreTrainedModel",
        "PreTrainedTokenizerBase",
        "ResNetForImageClassification",
    ],
    "timm": ["create_model"],
    "open_clip": ["create_model_and_transforms"],
    "accelerate": [],
    "hydra": [],
    "submitit": [],
    "pandas": [],
    "scipy.stats": [],
    "matplotlib.pyplot": [],
    "pydantic": [],
    "jinja2": [],
    "wandb": [],
}
for library, parts in LIBRARIES.items():
    module = importlib.import_module(library)
    for part in parts:
        getattr(module, part)
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra_memory import remember  # noqa: E402

import cu_runner  # noqa: E402, after the libraries
from cu_runner.config.compose import compose  # noqa: E402

for found in pkgutil.walk_packages(cu_runner.__path__, "cu_runner."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
remember()
compose(["sequence=smoke"])
GlobalHydra.instance().clear()
HydraConfig.instance().cfg = None
gc.collect()
gc.enable()
gc.freeze()  # the forks need not look at the libraries for garbage
