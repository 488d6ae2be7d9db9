"""How much of the loss of retention does the size of the change explain, and does a smaller or a
random change cost less? (Lee et al. 2026, arXiv 2511.07970, Sec. 4)

    python scripts/studies/taylor.py [seed=0,1,2] [OVERRIDE ...] [--output DIR]

Along the path theta_base .. theta_N of plain sequential unlearning: the retention loss L, the
diffusion loss of images that the untouched model makes of the retained concepts' prompts; its
gradient g and the largest eigenvalue ||H|| of its Hessian in absolute value (Lanczos on
Hessian-vector products); the change of L at a request beside g d + d H d / 2 and beside the bound
|dL| <= ||g|| ||d|| + ||H|| ||d||^2 / 2 (L expanded to second order at the start of d). Then the
whole change is scaled down, replaced by a random one of the same norm in every tensor, and undone
by half of its path, and each is measured as the run was: UA, RA-I, RA-C. Three runs of the
sequence, those of diagnostic.py, and the seconds that taylor.md names. With eval.every=last the
study itself measures the requests before the last.
"""

import hashlib
import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import bootstrap
from study import (
    Study,
    as_markdown,
    command,
    finished,
    panels,
    with_stopped,
)
from study_seeds import INTERVALS, ONE_SEED, take_seeds
from study_statistics import pearson
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cu_runner.concepts.entries import spread
from cu_runner.config.run_config import RunConfig
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import drift
from cu_runner.models.text import Text
from cu_runner.reporting.diagnosis import with_images
from cu_runner.reporting.intervals import over_images, over_seeds, widest
from cu_runner.request.anchors import AnchorImages
from cu_runner.runner.remeasure import Loaded, load, measure_change
from cu_runner.runtime.lazy import F, nn, torch
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.json_files import parse_json
from cu_runner.store.cache import CURVATURE, Cache
from cu_runner.store.files import to_json, to_safetensors
from cu_runner.store.run_record import RunRecord

IMAGES = 96  # of the retention loss, each with one timestep and one noise
SCALES = (0.75, 0.5, 0.25)
TOLERANCE = 0.01  # relative, of the largest eigenvalue
LANCZOS = 10  # vectors: the eigenvalue stands far off the others, and each costs a product
METRICS = ("UA", "RA_I", "RA_C")
Delta = dict[str, Tensor]  # theta - theta_base by parameter


def cells(seeds: list[int]) -> dict[str, list[str]]:
    return {f"seed {seed}": ["reg=none", f"seed={seed}"] for seed in seeds}


# ------------------------------------------------------------ the loss and its derivatives
@dataclass(frozen=True)
class RetentionLoss:
    """L(theta) = mean over R rows of ||e(x_t, c) - eps||^2 / (C H W), the rows fixed.

    C latent channels, H W latent size, n trained weights, flat in the order of params.
    """

    model: DiffusionModel
    params: dict[str, nn.Parameter]
    noisy: Tensor  # [R, C, H, W]
    noise: Tensor  # [R, C, H, W]
    timesteps: Tensor  # [R]
    text: Text  # of R prompts
    batch_size: int  # rows that go through the UNet together
    rows_sha256: str  # of the rows, their prompts and the untouched model

    def _batches(self) -> Iterator[Tensor]:
        """Yield the losses of the rows of one batch after another, with gradient."""
        # the other kernels of attention have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            for start in range(0, len(self.noisy), self.batch_size):
                rows = slice(start, start + self.batch_size)
                predicted = self.model.predict(
                    self.noisy[rows], self.timesteps[rows], self.text[rows]
                )
                error = F.mse_loss(predicted, self.noise[rows], reduction="none")
                yield error.flatten(1).mean(1)

    def values(self) -> Tensor:
        """Return the losses of the rows, [R]."""
        with torch.no_grad():
            return torch.cat(list(self._batches()))

    def gradient(self) -> Tensor:
        """Return dL / dtheta, [n]."""
        return self._derivative(None)

    def hessian_times(self, vector: Tensor) -> Tensor:
        """Return H v, [n], by the gradient of g . v (Pearlmutter 1994)."""
        return self._derivative(vector)

    def _derivative(self, vector: Tensor | None) -> Tensor:
        """Return g, or H v of a vector [n]."""
        weights = list(self.params.values())
        total = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
        for weight in weights:
            weight.requires_grad_(True)
        for losses in self._batches():
            loss = losses.sum() / len(self.noisy)
            found = torch.autograd.grad(loss, weights, create_graph=vector is not None)
            if vector is not None:
                along = flat(found) @ vector
                found = torch.autograd.grad(along, weights)
            total += flat(found)
        for weight in weights:
            weight.requires_grad_(False)
        return total

    def curvature(self, cache: Cache) -> float:
        """Return the eigenvalue of H that is largest in absolute value, with its sign.

        It takes minutes, so that one that was found before comes from the cache.
        """
        own = to_safetensors({name: weight.detach() for name, weight in self.params.items()})
        key = {
            "rows": self.rows_sha256,
            "weights": hashlib.sha256(own).hexdigest(),
            "loss": hashlib.sha256(inspect.getsource(RetentionLoss).encode()).hexdigest(),
            "lanczos": [LANCZOS, TOLERANCE],
            "device": self.noisy.device.type,
            "torch": torch.__version__,
        }
        if files := cache.fetch("curvature", key):
            return float(parse_json(files[CURVATURE].decode())["curvature"])
        found = self._largest_eigenvalue()
        cache.put("curvature", key, {CURVATURE: to_json({"curvature": found})})
        return found

    def _largest_eigenvalue(self) -> float:
        """Return it by Lanczos's iteration."""
        weights = list(self.params.values())
        device, number = weights[0].device, sum(weight.numel() for weight in weights)

        def times(vector: np.ndarray) -> np.ndarray:
            product = self.hessian_times(torch.from_numpy(vector.ravel()).float().to(device))
            return np.asarray(product.cpu().numpy())

        start = np.random.default_rng(0).standard_normal(number).astype(np.float32)
        hessian = LinearOperator((number, number), matvec=times, dtype=np.float32)
        largest = eigsh(
            hessian,
            k=1,
            which="LM",
            v0=start,
            tol=TOLERANCE,
            ncv=min(LANCZOS, number),
            return_eigenvectors=False,
        )
        return float(largest[0])


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return tensors one behind the other, [n]."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def retention_loss(plan: RunConfig, loaded: Loaded) -> RetentionLoss:
    """Make the rows: prompts of retained concepts, images of the untouched model, t and noise.

    They are the same for every seed of the run.
    """
    instruments, weights, _ = loaded
    model, spine = instruments.model, plan.spine
    sequence = instruments.sequence
    shown = [image.prompt for image in sequence.evaluation_images(sequence.retain)]
    prompts = spread(list(dict.fromkeys(shown)), IMAGES)
    cache = Cache(Path(spine.paths.outputs) / "cache", plan.code)
    made = AnchorImages(
        model,
        instruments.model_sha256,
        weights.params,
        weights.base,
        spine.anchors,
        cache,
        spine.eval.batch_size,
    )
    clean = made.latents(prompts, len(prompts)).to(model.device)
    generator = RandomSource(0, 0).generator("taylor")
    # spread over all timesteps, in an order that has nothing to do with the prompts
    places = torch.linspace(0, model.num_train_timesteps - 1, len(prompts)).long()
    timesteps = places[torch.randperm(len(prompts), generator=generator)].to(model.device)
    noise = torch.randn(clean.shape, generator=generator).to(model.device)
    noisy = model.add_noise(clean, noise, timesteps)
    rows = hashlib.sha256(repr([instruments.model_sha256, prompts]).encode())
    rows.update(to_safetensors({"noisy": noisy, "noise": noise, "timesteps": timesteps}))
    return RetentionLoss(
        model=model,
        params=weights.params,
        noisy=noisy,
        noise=noise,
        timesteps=timesteps,
        text=model.encode_prompts(prompts),
        batch_size=spine.train.batch_size,
        rows_sha256=rows.hexdigest(),
    )


# ------------------------------------------------------------ the path
@dataclass(frozen=True)
class Point:
    """A point of the path: losses of the rows [R], gradient [n], ||H|| with its sign."""

    losses: Tensor
    gradient: Tensor
    curvature: float

    @staticmethod
    def of(loss: RetentionLoss, cache: Cache) -> "Point":
        """Take them of the weights as they are."""
        return Point(loss.values(), loss.gradient(), loss.curvature(cache))


def expansion(point: Point, step: Tensor, hessian_step: Tensor) -> dict[str, float]:
    """Return what the expansion at a point says of a step d [n].

    first: g d. second: d H d / 2. bound: ||g|| ||d|| + ||H|| ||d||^2 / 2.

    Args:
        hessian_step: H d at the point.
    """
    size, steepness = step.double().norm().item(), point.gradient.double().norm().item()
    return {
        "step": size,
        "gradient": steepness,
        "curvature": point.curvature,
        "first": (point.gradient.double() @ step.double()).item(),
        "second": (step.double() @ hessian_step.double()).item() / 2,
        "bound": steepness * size + abs(point.curvature) * size**2 / 2,
    }


def measured(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return the change of the mean of the losses [R], with its interval over rows (bootstrap)."""
    changes = (after - before).double().cpu().numpy()
    found = {"dL": float(changes.mean()), "dL from": math.nan, "dL to": math.nan}
    if len(changes) > 1 and np.ptp(changes) > 0:
        interval = bootstrap((changes,), np.mean, rng=0).confidence_interval
        found |= {"dL from": float(interval.low), "dL to": float(interval.high)}
    return found


def along_the_path(loss: RetentionLoss, run: RunRecord, loaded: Loaded) -> pd.DataFrame:
    """Return two rows per request: its own step from theta_n-1, and the change from theta_base.

    Columns: those of expansion() and measured(), L before it, and what RA-I and RA-C lost, in
    points.
    """
    _, weights, cache = loaded
    rows: list[dict[str, object]] = []
    deltas = [torch.zeros_like(loss.gradient())]
    kept = [run.table[["RA_I", "RA_C"]].iloc[0]]
    weights.set()
    base = here = Point.of(loss, cache)
    for index in range(1, len(run.records)):
        delta = weights.read(run.weights(index))
        deltas.append(flat([delta[name] for name in loss.params]))
        starts = {"the request": (here, index - 1), "the whole path": (base, 0)}
        products = {}
        for first in {index - 1, 0}:
            weights.set(unflat(deltas[first], loss.params))
            products[first] = loss.hessian_times(deltas[-1] - deltas[first])
        weights.set(delta)
        kept.append(retention(run, index, delta, loaded, cache))
        last = index == len(run.records) - 1
        losses = loss.values()
        for name, (start, first) in starts.items():
            row = {"change": name, "request": index, "concept": run.table["concept"][index]}
            row |= {"L before": start.losses.mean().item(), **measured(start.losses, losses)}
            row |= expansion(start, deltas[-1] - deltas[first], products[first])
            lost = kept[first] - kept[index]
            rows.append(row | {"RA_I lost": lost["RA_I"], "RA_C lost": lost["RA_C"]})
        if not last:
            here = Point(losses, loss.gradient(), loss.curvature(cache))
    return pd.DataFrame(rows)


def retention(
    run: RunRecord, index: int, delta: Delta, loaded: Loaded, cache: Cache
) -> "pd.Series[float]":
    """Return RA_I and RA_C after a request, measured here where the run did not (eval.every)."""
    found = run.table[["RA_I", "RA_C"]].iloc[index]
    if not found.isna().all():
        return found
    metrics = measure_change(run, index, delta, loaded, cache)
    return pd.Series({name: metrics[name] for name in found.index}, dtype=float)


def unflat(vector: Tensor, params: dict[str, nn.Parameter]) -> Delta:
    """Return a vector [n] as tensors by name."""
    parts = vector.split([weight.numel() for weight in params.values()])
    return {
        name: part.view(weight.shape)
        for (name, weight), part in zip(params.items(), parts, strict=True)
    }


def explained(path: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and kind of change: how well the expansion tells dL over requests.

    holds: requests at which |dL| is at most the bound. dL / bound: the median of |dL| / bound.
    first order, second order: 1 - sum (dL - p)^2 / sum dL^2 of the predictions p = g d and
    g d + d H d / 2; 1 is all of it, 0 no better than no change, below 0 worse. r: of the bound with
    |dL| and with the loss of RA-I and RA-C.
    """
    rows = []
    for (label, change), group in path.groupby(["run", "change"], sort=False):
        size, total = group["dL"].abs(), (group["dL"] ** 2).sum()
        row = {"run": label, "change": change, "n": len(group)}
        row["holds"] = int((size <= group["bound"]).sum())
        row["dL / bound"] = (size / group["bound"]).median()
        for name, told in (
            ("first order", group["first"]),
            ("second order", group["first"] + group["second"]),
        ):
            row[name] = 1 - ((group["dL"] - told) ** 2).sum() / total if total else math.nan
        for name, values in (
            ("|dL|", size),
            ("RA-I lost", group["RA_I lost"]),
            ("RA-C lost", group["RA_C lost"]),
        ):
            found = pearson(group["bound"], values)
            row |= {
                f"r, {name}": found.value,
                f"{name} r from": found.low,
                f"{name} r to": found.high,
            }
        rows.append(row)
    return pd.DataFrame(rows)


# ------------------------------------------------------------ interventions
def scaled(change: Delta, factor: float) -> Delta:
    """Return factor * change."""
    return {name: factor * part for name, part in change.items()}


def random_like(change: Delta, seed: int) -> Delta:
    """Return a change in a random direction, with the norm of every tensor kept."""
    generator = RandomSource(seed, 0).generator("random change")
    directions = {
        name: torch.randn(part.shape, generator=generator).to(part.device)
        for name, part in change.items()
    }
    return {
        name: direction * (change[name].norm() / direction.norm())
        for name, direction in directions.items()
    }


def interventions(run: RunRecord, loaded: Loaded) -> dict[str, Delta]:
    """Return the changes of weights that are measured, by name; first the run's own.

    With two requests or more, half of the path is undone: the last half of its requests, which
    leaves theta_N/2, and the first half, which leaves theta_base + theta_N - theta_N/2.
    """
    weights, last = loaded[1], len(run.records) - 1
    whole = weights.read(run.weights(last))
    found = {"the run's own": whole}
    found |= {f"scaled to {factor:g}": scaled(whole, factor) for factor in SCALES}
    found["random, the same norms"] = random_like(whole, run.seed)
    if last > 1:
        half = weights.read(run.weights(last // 2))
        found["last half undone"] = half
        found["first half undone"] = {name: whole[name] - half[name] for name in whole}
    return found


def measure_interventions(
    loss: RetentionLoss, run: RunRecord, loaded: Loaded, cache: Cache
) -> pd.DataFrame:
    """Return one row per intervention: its norm, dL from the untouched model, and METRICS."""
    weights, last = loaded[1], len(run.records) - 1
    weights.set()
    base, rows = loss.values(), []
    for name, change in interventions(run, loaded).items():
        metrics = measure_change(run, last, change, loaded, cache)  # leaves the weights so
        row = {"weights": name, "drift": drift(change).l2, **measured(base, loss.values())}
        rows.append(row | {metric: metrics[metric] for metric in METRICS})
    return pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))


def over_runs(table: pd.DataFrame, images: dict[str, int]) -> pd.DataFrame:
    """Return means over seeds, and the widest interval of each metric over seeds and images.

    images: of one run, by metric.
    """
    rows = []
    for name, group in table.groupby("weights", sort=False):
        row: dict[str, object] = {"weights": name, "seeds": len(group)}
        row |= {column: group[column].mean() for column in ("drift", "dL")}
        for metric in METRICS:
            mean, half = over_seeds(group[metric].tolist())
            low, high = widest(mean, half, over_images(mean, images[metric]))
            row |= {metric: mean, f"{metric} from": low, f"{metric} to": high}
        rows.append(row)
    return pd.DataFrame(rows)


def images_behind(run: RunRecord) -> dict[str, int]:
    """Return how many images each metric of the last request rests on."""
    last = with_images(run).iloc[-1]
    return {metric: int(last[f"{metric}_images"]) for metric in METRICS}


# ------------------------------------------------------------ page
def draw(path: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """Draw |dL| and the bound over requests, ||g||, ||H||, and the interventions."""
    figure, axes = panels(2, 3)
    for axis, change in zip(axes[:2], ("the request", "the whole path"), strict=True):
        for number, (label, lines) in enumerate(path.groupby("run", sort=False)):
            lines = lines[lines["change"] == change]
            colour = f"C{number}"
            axis.plot(
                lines["request"], lines["dL"].abs(), "o-", markersize=3, color=colour, label=label
            )
            axis.plot(lines["request"], lines["bound"], "--", color=colour)
        axis.set(title=f"|dL| of {change}, bound dashed", xlabel="request", yscale="log")
    steps = path[path["change"] == "the request"]
    for axis, name, title in (
        (axes[2], "gradient", "norm of the gradient before it"),
        (axes[3], "curvature", "largest eigenvalue before it"),
    ):
        for label, lines in steps.groupby("run", sort=False):
            axis.plot(lines["request"], lines[name], "o-", markersize=3, label=label)
        axis.set(title=title, xlabel="request")
    axes[0].legend(fontsize=7)
    places = np.arange(len(changes))
    for shift, metric in zip((-0.25, 0.0, 0.25), METRICS, strict=True):
        ends = [
            changes[metric] - changes[f"{metric} from"],
            changes[f"{metric} to"] - changes[metric],
        ]
        axes[4].errorbar(
            changes[metric], places + shift, xerr=ends, fmt="o", markersize=3, label=metric
        )
    axes[4].set(title="interventions (%)", xlim=(-3, 103), yticks=places)
    axes[4].set_yticklabels(changes["weights"], fontsize=7)
    axes[4].invert_yaxis()
    axes[4].legend(fontsize=7)
    axes[5].set_visible(False)
    return figure


def main(study: Study) -> None:
    seeds, study = take_seeds(study)
    given = cells(seeds)
    runs = study.run(given, gaps=True)
    paths, changes, seconds = [], [], 0.0
    for label, run in finished(runs).items():
        started = time.monotonic()
        plan = study.plan(given[label])
        loaded = load(run, plan)
        cache = Cache(Path(plan.spine.paths.outputs) / "cache", plan.code)
        loss = retention_loss(plan, loaded)
        paths.append(along_the_path(loss, run, loaded).assign(run=label))
        changes.append(measure_interventions(loss, run, loaded, cache).assign(run=label))
        seconds += time.monotonic() - started
        print(f"{label:<40} path and interventions measured", flush=True)
    path, table = pd.concat(paths), pd.concat(changes)
    means = over_runs(table, images_behind(next(iter(finished(runs).values()))))
    shown = with_stopped(explained(path), runs)
    text = (
        "What the expansion tells of dL, over the requests of a run; the request: its step from "
        "theta_n-1; the whole path:\nthe change from theta_base, expanded there:\n\n"
        f"{as_markdown(shown, 3)}\n\n"
    )
    text += (
        "holds: requests with |dL| at most the bound; dL / bound: median of |dL| / bound; first, "
        "second order: share of sum dL^2\nthat g d, and g d + d H d / 2, tell (1: all, 0: no more "
        "than no change, below: worse); r: of the bound, 95% by Fisher's z, the\nrequests of a run "
        "as if independent. ||H|| is that at the start of d: beyond second order the bound need "
        "not hold.\n\n"
    )
    text += "Interventions on the change of all requests, dL from the untouched model:\n\n"
    text += f"{as_markdown(means, 3)}\n\n"
    text += (
        f"{INTERVALS if len(paths) > 1 else ONE_SEED} {len(loss.noisy)} images in L; "
        f"{seconds:.0f} s\nbeside the runs, without the curvatures and images that an earlier call "
        "left in the cache."
    )
    rows = pd.concat([path.assign(part="path"), table.assign(part="interventions")])
    study.write(with_stopped(rows, runs), draw(path, means), text)


if __name__ == "__main__":
    command(main, __doc__)
