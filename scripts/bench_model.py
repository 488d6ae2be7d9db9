"""What a model does per second and in how much memory.

Images, training steps, and whether the fast path judges alike.

scripts/bench.py prints it. Fractions compare the denoiser's floating-point operations, forward and
backward, with those of a large matrix product in the same precision, timed on the same device.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import torch
from scipy.stats import binomtest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cu_runner.concepts.requests import plan_requests
from cu_runner.config.compose import compose
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.evaluate import evaluate
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel, dtype_of
from cu_runner.models.parameters import assign, select_parameters, snapshot
from cu_runner.models.sampling import generate, make_scheduler
from cu_runner.request.scope import Scope
from cu_runner.runner.training import erase
from cu_runner.runtime.devices import device_name, forget_peak_memory, peak_memory_mb
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.settings import Sampler, Speed

SIDES = {"cpu": 3072, "cuda": 8192}  # of the matrices whose product gives the peak rate
SINGLE = 4  # images that are made one after another, where a batch is compared with that


# ------------------------------------------------------------
# measuring
def wall_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Wall times of an action after one warm-up."""
    action()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product on random data, the fastest of 20.

    A peak is what nothing disturbed.
    """
    side = SIDES[device.type]
    left, right = (
        torch.randn(side, side, device=device, dtype=dtype_of(precision)) for _ in range(2)
    )
    return 2 * side**3 / min(wall_seconds(lambda: left @ right, device, 20))


class Peaks:
    """Peak memory of one phase after another: what is allocated on a GPU.

    On a CPU the process has a single peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()  # what an earlier phase left behind is not this one's
        forget_peak_memory(self._device)
        yield
        self._found[name] = peak_memory_mb(self._device)

    def __str__(self) -> str:
        if self._device.type == "cuda":
            return "peak memory: " + ", ".join(
                f"{name} {peak:.0f} MB" for name, peak in self._found.items()
            )
        return (
            "peak memory of the process, all of this together: "
            f"{peak_memory_mb(self._device):.0f} MB"
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model as a run has it, and the settings of that run."""

    plan: RunConfig
    model: DiffusionModel
    method: Method
    params: dict[str, nn.Parameter]
    base: dict[str, torch.Tensor]

    @property
    def training_precision(self) -> str:
        """With gradients, fp16 runs as fp32."""
        return "fp32" if self.model.precision == "fp16" else self.model.precision

    @property
    def prompts(self) -> list[str]:
        """One batch of evaluation prompts, or all there are."""
        sequence = self.plan.sequence.build()
        images = sequence.evaluation_images([*sequence.targets, *sequence.retain])
        return [image.prompt for image in images][: self.plan.spine.eval.batch_size]

    def prepare(self) -> None:
        """Do what a run does to a model before its first request; it is not undone."""
        self.model.lower_frozen(self.params)
        self.model.speed_up(self.plan.spine.speed)
        if self.plan.spine.train.gradient_checkpointing:
            self.model.checkpoint_gradients()

    def images_per_second(self, batch_size: int | None = None) -> float:
        """Of one batch of evaluation images, or of SINGLE images in smaller batches."""
        prompts = self.prompts if batch_size is None else self.prompts[:SINGLE]
        sample = lambda: list(  # noqa: E731
            generate(
                self.model,
                prompts,
                [0] * len(prompts),
                self.plan.spine.eval,
                batch_size=batch_size or len(prompts),
                label="",
            )
        )
        return len(prompts) / statistics.median(wall_seconds(sample, self.model.device, 3))

    def image_flops(self) -> int:
        """Floating-point operations of the denoiser for one image and one denoising step."""
        latents, text = (
            torch.randn(1, *self.model.latent_shape, device=self.model.device),
            self.model.encode_prompts(["a tree"]),
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model.output(latents, torch.tensor(500, device=self.model.device), text)
        return counter.get_total_flops()

    def train(self, steps: int) -> tuple[float, int]:
        """Seconds of the first request with so many steps, and the images that the untouched model
        would make for it, once.
        """
        sequence, made = self.plan.sequence.build(), {}

        def anchors(prompts: list[str], number: int, mirrored: bool = False) -> torch.Tensor:
            made[tuple(prompts)] = number
            return torch.randn(
                number, *self.model.latent_shape, generator=torch.Generator().manual_seed(number)
            )

        request, settings = (
            plan_requests(sequence, "sequential")[0],
            dataclasses.replace(self.plan.spine.train, steps=steps),
        )
        scope = Scope(
            self.model,
            sequence,
            request,
            self.params,
            self.base,
            self.base,
            RandomSource(0, 1),
            settings,
            anchors,
        )
        synchronize(self.model.device)
        started = time.perf_counter()
        erase(scope, self.method, {}, settings)
        synchronize(self.model.device)
        seconds = time.perf_counter() - started
        assign(self.params, self.base)
        return seconds, sum(made.values())

    def step_seconds(self, few: int = 3, many: int = 15) -> float:
        """Seconds per training step: what a request prepares before its first one cancels out."""
        self.train(few)
        short, long = (
            statistics.median(self.train(steps)[0] for _ in range(3)) for steps in (few, many)
        )
        return (long - short) / (many - few)

    def step_flops(self) -> int:
        """Floating-point operations of one training step, both ways.

        Activations that are computed again count again.
        """
        self.train(1)  # texts are encoded once per process
        found = []
        for steps in (1, 2):
            with FlopCounterMode(display=False) as counter:
                self.train(steps)
            found.append(counter.get_total_flops())
        return found[1] - found[0]


def load(overrides: list[str], device: str) -> Bench:
    """Load the model of a run, untouched."""
    plan = compose(overrides)
    method, model = plan.method.build(), plan.model.build(device=device)
    params = select_parameters(model.denoiser, method.params)
    return Bench(plan, model, method, params, snapshot(params))


# ------------------------------------------------------------ what is said
def bench_model(overrides: list[str], device: str) -> None:
    """Print how fast a run samples and trains, against the plain loop of diffusers.

    The plain loop has the untouched model.
    """
    target = torch.device(device)
    peaks = Peaks(target)
    with peaks.phase("loading"):
        bench = load(overrides, device)
    model, settings, speed = bench.model, bench.plan.spine.eval, bench.plan.spine.speed
    peak, flops, prompts = matmul_peak(target, model.precision), bench.image_flops(), bench.prompts
    path = bench.plan.model.arguments["path"]
    print(
        f"{path}, {device_name(target)}, {model.precision}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads"
    )
    print(
        (
            f"matrix product: {peak / 1e9:.0f} GFLOP/s; {model.architecture.word}: "
            f"{flops / 1e9:.3f} GFLOP per image and step"
        ),
        flush=True,
    )
    with peaks.phase("diffusers' own loop"):
        plain = plain_rate(model, prompts[:SINGLE], settings)
    print(f"diffusers' own loop, batch 1, fp32, untouched model: {plain:.2f} images/s", flush=True)
    bench.prepare()
    with peaks.phase("sampling"):
        rate = bench.images_per_second()
    passes = settings.steps * (2 if settings.guidance != 1 else 1)
    print(
        f"sampling with {levers_on(model, speed, sampling=True)}: batch {len(prompts)}, "
        f"{settings.steps} steps, "
        f"guidance {settings.guidance}: {rate:.2f} images/s, {rate * passes * flops / peak:.0%} "
        "of the matrix product's rate, "
        f"{rate / plain:.1f} times diffusers' loop",
        flush=True,
    )
    with peaks.phase("training"):
        seconds = bench.step_seconds(5, 25)
    work, low = bench.step_flops(), bench.training_precision
    if low != model.precision:
        peak = matmul_peak(target, low)
    train = bench.plan.spine.train
    again = ", activations computed twice" if train.gradient_checkpointing else ""
    print(
        f"training with {levers_on(model, speed, sampling=False)}: {bench.plan.method_name}, "
        f"batch {train.batch_size}, "
        f"{low} passes, fp32 weights{again}: {1 / seconds:.2f} steps/s, {work / 1e9:.2f} "
        "GFLOP per step, "
        f"{work / seconds / peak:.0%} of the matrix product's rate"
    )
    print(peaks, flush=True)


def levers_on(model: DiffusionModel, speed: Speed, *, sampling: bool) -> str:
    """Return the levers of speed.* that take effect."""
    remembers = sampling and model.architecture.remembers_text
    on = {
        "kv_cache": remembers and speed.kv_cache and not speed.compile,
        "channels_last": speed.channels_last and model.device.type == "cuda",
        "compile": speed.compile,
    }
    return ", ".join(name for name, works in on.items() if works) or "no lever"


def plain_rate(model: DiffusionModel, prompts: list[str], sampler: Sampler) -> float:
    """Images/s of diffusers' pipeline, one prompt after another in fp32, as the published scripts
    do it.
    """
    pipeline = model.components.pipeline(make_scheduler(model, sampler))
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": model.resolution, "width": model.resolution, "output_type": "pt"}
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline | diffusers.SanaPipeline):
        size["use_resolution_binning"] = False  # else the side is one that they know
    single = lambda: [  # noqa: E731
        pipeline(prompt, num_inference_steps=sampler.steps, guidance_scale=sampler.guidance, **size)
        for prompt in prompts
    ]
    return len(prompts) / statistics.median(wall_seconds(single, model.device, 3))


def bench_accuracy(overrides: list[str], device: str) -> None:
    """Whether the embedded model is judged alike in plain fp32 and on the fast path.

    The precision of the bench, bf16 for fp32.
    """
    chosen, hits = compose(overrides).resolved["model"]["precision"], {}
    fast = "bf16" if chosen == "fp32" else chosen
    for precision in ("fp32", fast):
        bench = load([*overrides, f"model.precision={precision}"], device)
        plan, sequence = bench.plan, bench.plan.sequence.build()
        bench.prepare()
        if precision != fast:
            bench.model.speed_up(Speed(False, False, False))
        concepts = [*sequence.targets, *sequence.retain]
        fast_levers = levers_on(bench.model, plan.spine.speed, sampling=True)
        found = evaluate(
            bench.model, plan.evaluator.build(device=device), sequence, concepts, 0, plan.spine.eval
        ).predictions
        hits[precision] = {
            domain: int((found[domain] == found[f"predicted_{domain}"]).sum())
            for domain in sequence.measured_domains
        }
    for domain, right in hits["fp32"].items():
        interval = binomtest(right, len(found)).proportion_ci(method="wilson")
        share = hits[fast][domain] / len(found)
        place = "inside" if interval.low <= share <= interval.high else "OUTSIDE"
        print(
            f"accuracy, {domain}, {len(found)} images: plain fp32 {right / len(found):.1%} (95% "
            f"interval {interval.low:.1%} to "
            f"{interval.high:.1%}); {fast} with {fast_levers} {share:.1%}, {place} it",
            flush=True,
        )
