"""Build the embedded model from nothing: render, train every part, pack, and measure base accuracy.

    python scripts/build_shapecanvas.py                    # resumes; hours on two CPU cores
    python scripts/build_shapecanvas.py --device cuda      # the same recipe on a GPU
    python scripts/build_shapecanvas.py --only open_clip   # the image-text model alone
    python scripts/build_shapecanvas.py --only measure       # base accuracy, in other words too
    python scripts/build_shapecanvas.py --only measure_clip  # how well open_clip names images
    python scripts/build_shapecanvas.py --only flow measure_flow  # the transformer, in --out/flow

Other sizes of the UNet, or half of the training pairs, in the same world (for the study `sizes`):
the stage `other_unet` takes the text encoder and the autoencoder of the package. Its result is
O/pipeline; each needs a --work and an --out of its own:

    python scripts/build_shapecanvas.py --only other_unet --channels 32 48 96 --work W --out O
    python scripts/build_shapecanvas.py --only other_unet --half-of-pairs --work W --out O

Stages: vae | text -> style, object, open_clip (beside the VAE) -> unet -> pack -> measure. Each
saves a checkpoint every minute under --work and is skipped once it is finished. Results go to
--out: an ordinary `StableDiffusionPipeline` directory, the two classifier directories, the
open_clip directory and base_accuracy.json. Classifiers and open_clip see rendered images only.

The stage `flow` is no part of the whole build. It needs --out/pipeline, whose text encoder and
autoencoder the transformer is trained with and later shares (model.shared).

Shapes: B batch, L tokens, D text width, N cached latents.
"""

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from shapecanvas_parts import (
    NUM_TOKENS,
    TEXT_WIDTH,
    clip_config,
    make_classifier,
    make_flow_scheduler,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_unet,
    make_vae,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, ResNetForImageClassification

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.evaluators.classifier import Classifier
from cu_runner.evaluators.evaluate import evaluate
from cu_runner.evaluators.open_clip import OpenClip
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.process import RectifiedFlow
from cu_runner.models.sampling import generate
from cu_runner.schema.settings import EvalSettings, Sampler
from cu_runner.shapecanvas.captions import FORMS, SYNONYMS, draw_caption, first_caption
from cu_runner.shapecanvas.objects import OBJECTS
from cu_runner.shapecanvas.render import IMAGE_SIZE, render
from cu_runner.shapecanvas.styles import STYLE_PARTS, STYLES

LATENTS_CHUNK = 240  # images rendered and encoded at once
LATENTS_PER_PAIR = 12  # renders of each (object, style) pair whose latents the UNet trains on
CAPTIONS_PER_PAIR = 7  # the first is the one that the model is judged by, the others are drawn
PADDING_HIDDEN = 0.5  # how often the UNet sees no state behind a caption's last word
STEPS = {"vae": 1500, "text": 1500, "style": 3000, "object": 3000, "unet": 10000, "open_clip": 1500}
BATCH = {"vae": 32, "text": 96, "style": 64, "object": 64, "unet": 64, "open_clip": 96}
PEAK_RATE = {
    "vae": 2e-3,
    "text": 5e-4,
    "style": 2e-3,
    "object": 2e-3,
    "unet": 8e-4,
    "open_clip": 2e-3,
}
# Of the transformer. Without convolutions it needs more images than the UNet's 640,000, so that the
# batch is larger; the steps are as many as fitted into three minutes on a GPU. The step size is the
# UNet's; 150 batches of 32 at 5e-4 and at 1.5e-3 fell alike.
STEPS["flow"], BATCH["flow"], PEAK_RATE["flow"] = 16500, 256, 8e-4
# How often it sees pure noise, at which sampling begins. Logit-normal levels hardly ever come near
# it, and below it the mean colour of a small latent shows: the palette would be read there.
PURE_NOISE = 0.05
FLOW_SAMPLER = Sampler(20, 2.5)  # of the transformer; one step of Euler is one of its own
SAMPLERS_TRIED = ((10, 2.5), (20, 1.5), (20, 2.5), (20, 4.0), (40, 2.5))  # steps and guidance
TEXT_SCALE = 20.0  # inverse temperature of the contrastive loss
WORDS_WEIGHT = 0.3  # of the loss that has a caption's end name the caption's words
SEED = {name: 1000 + index for index, name in enumerate(STEPS)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What other UNets than the shipped one differ in; everything else of the world they share.

    channels: of the three levels. half_of_pairs: train on every other (object, style) pair alone.
    """

    channels: tuple[int, ...] = (48, 64, 128)
    half_of_pairs: bool = False


CONF = Path(__file__).parent.parent / "conf"
SHIPPED = Path(__file__).parent.parent / "cu_runner/shapecanvas/weights"


# ------------------------------------------------------------ training
def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return rendered images [B, 3, S, S] in 0..1 of random pairs, with their object and style
    indices
    [B].
    """
    objects = torch.randint(len(OBJECTS), (count,), generator=generator)
    styles = torch.randint(len(STYLES), (count,), generator=generator)
    images = render([OBJECTS[i] for i in objects], [STYLES[i] for i in styles], generator)
    return images, objects, styles


def train(
    stage: str,
    modules: nn.ModuleDict,
    loss_of: Callable[[torch.Generator], Tensor],
    work: Path,
    average: nn.Module | None = None,
) -> None:
    """Run the optimiser of one stage to its end, resuming from `work/<stage>.pt`.

    `average` is an EMA of modules[stage].
    """
    path, total = work / f"{stage}.pt", STEPS[stage]
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=PEAK_RATE[stage], weight_decay=1e-2, fused=True
    )
    warmup = total // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        ),
    )
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        start = state["step"]
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if average is not None:
            average.load_state_dict(state["average"])
    progress = tqdm(
        range(start, total), initial=start, total=total, desc=stage, mininterval=5, ncols=88
    )
    saved, smooth = time.monotonic(), None
    for step in progress:
        loss = loss_of(torch.Generator().manual_seed(SEED[stage] * 1_000_003 + step))
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if average is not None:
            decay = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(modules[stage].parameters()), 1 - decay
                )
        if step % 20 == 0:
            smooth = loss.item() if smooth is None else 0.9 * smooth + 0.1 * loss.item()
            progress.set_postfix(loss=f"{smooth:.4f}")
        if time.monotonic() - saved > 60 or step + 1 == total:
            state = {
                "step": step + 1,
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            state |= {
                "schedule": schedule.state_dict(),
                "average": average.state_dict() if average is not None else {},
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            saved = time.monotonic()


def train_vae(work: Path, device: str) -> AutoencoderKL:
    vae = make_vae().to(device)

    def loss_of(generator: torch.Generator) -> Tensor:
        images = draw(BATCH["vae"], generator)[0].to(device) * 2 - 1
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(
            posterior.mean
            + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(device)
        ).sample
        error = restored - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + 0.5 * edges + 1e-4 * posterior.kl().mean() / (3 * IMAGE_SIZE)

    train("vae", nn.ModuleDict({"vae": vae}), loss_of, work)
    return vae.eval()


def captioned(
    count: int, generator: torch.Generator, unsaid: float
) -> tuple[Tensor, list[str], Tensor]:
    """Images [B, 3, S, S], a caption of each, and which captions describe which images [B captions,
    B images], 1 or 0.

    unsaid: how often the object is left out of a caption, and how often the style.
    """
    images, objects, styles = draw(count, generator)
    silent = torch.rand(2, count, generator=generator) < unsaid
    forms = random.Random(generator.initial_seed())
    captions = [
        draw_caption(
            None if silent[0, i] else OBJECTS[o], None if silent[1, i] else STYLES[s], forms
        )
        for i, (o, s) in enumerate(zip(objects, styles, strict=True))
    ]
    match = (silent[0, :, None] | (objects[:, None] == objects)) & (
        silent[1, :, None] | (styles[:, None] == styles)
    )
    return images, captions, match.float()


def contrast(logits: Tensor, match: Tensor) -> Tensor:
    """Cross-entropy both ways, every image that a caption describes a positive.

    Logits and match [B captions, B images].
    """
    rows = F.cross_entropy(logits, match / match.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, match.T / match.T.sum(1, keepdim=True))
    return (rows + columns) / 2


def train_text(work: Path, device: str) -> CLIPTextModel:
    """Contrastive training against a small image network; the text encoder is frozen afterwards.

    A second loss has the state at a caption's end name the caption's words. The looks of this world
    have few dimensions; without it the end keeps those alone, and names become the same text.
    """
    tokenizer = make_tokenizer()
    text = make_text_encoder(tokenizer).to(device)
    image = make_classifier(tuple(str(i) for i in range(TEXT_WIDTH))).to(
        device
    )  # its outputs are the image embedding
    project = nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False).to(device)
    words = nn.Linear(TEXT_WIDTH, len(tokenizer)).to(device)
    modules = nn.ModuleDict({"text": text, "image": image, "project": project, "words": words})
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]

    def loss_of(generator: torch.Generator) -> Tensor:
        images, captions, match = captioned(BATCH["text"], generator, 0.12)
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        end = text(tokens).pooler_output
        text_embedding = F.normalize(project(end), dim=-1)
        image_embedding = F.normalize(image(images.to(device) * 2 - 1).logits, dim=-1)
        said = torch.zeros(len(tokens), len(tokenizer), device=device).scatter_(1, tokens, 1.0)
        said[:, special] = 0.0
        return contrast(
            TEXT_SCALE * text_embedding @ image_embedding.T, match.to(device)
        ) + WORDS_WEIGHT * F.cross_entropy(words(end), said / said.sum(1, keepdim=True))

    train("text", modules, loss_of, work)
    return text.eval()


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur each image by a random amount and add a little noise.

    An autoencoder's output is softer than a render.
    """
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=images.shape[-1], mode="bilinear")
    amount = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = (
        0.04
        * torch.rand(len(images), 1, 1, 1, generator=generator)
        * torch.randn(images.shape, generator=generator)
    )
    return torch.lerp(images, blurred, amount) + noise


def train_classifier(domain: str, work: Path, device: str) -> ResNetForImageClassification:
    model = make_classifier(STYLES if domain == "style" else OBJECTS).to(device)

    def loss_of(generator: torch.Generator) -> Tensor:
        images, objects, styles = draw(BATCH[domain], generator)
        images = soften(images, generator)
        labels = (styles if domain == "style" else objects).to(device)
        return F.cross_entropy(
            model(images.to(device) * 2 - 1).logits, labels, label_smoothing=0.05
        )

    train(domain, nn.ModuleDict({"model": model}), loss_of, work)
    return model.eval()


def train_clip(work: Path, device: str) -> open_clip.CLIP:
    """Train the image-text model that judges without labels and gives the CLIP score.

    Contrastive (Radford et al. 2021).
    """
    tokenizer = make_tokenizer()
    model = open_clip.CLIP(**clip_config(tokenizer)["model_cfg"]).to(device)

    def loss_of(generator: torch.Generator) -> Tensor:
        images, captions, match = captioned(BATCH["open_clip"], generator, 0.3)
        images = soften(images, generator).to(device) * 2 - 1
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        text, image = (
            model.encode_text(tokens, normalize=True),
            model.encode_image(images, normalize=True),
        )
        return contrast(model.logit_scale.exp().clamp(max=100) * text @ image.T, match.to(device))

    train("open_clip", nn.ModuleDict({"model": model}), loss_of, work)
    return model.eval()


def render_chunk(start: int) -> Tensor:
    """Return the images [LATENTS_CHUNK, 3, S, S] of the pairs from `start` on, on one thread."""
    torch.set_num_threads(1)
    pairs = [(o, s) for o in OBJECTS for s in STYLES for _ in range(LATENTS_PER_PAIR)]
    chunk = pairs[start : start + LATENTS_CHUNK]
    generator = torch.Generator().manual_seed(77_000_000 + start)
    return render([o for o, _ in chunk], [s for _, s in chunk], generator)


@torch.inference_mode()
def cache_latents(vae: AutoencoderKL, work: Path, device: str) -> Tensor:
    """Latent means [objects, styles, LATENTS_PER_PAIR, 4, 16, 16] of rendered images, rendered and
    encoded once.
    """
    path = work / "latents.pt"
    if not path.exists():
        total = len(OBJECTS) * len(STYLES) * LATENTS_PER_PAIR
        starts = range(0, total, LATENTS_CHUNK)
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            rendered = tqdm(
                pool.imap(render_chunk, starts), total=len(starts), desc="latents", ncols=88
            )
            batches = [
                vae.encode(images.to(device) * 2 - 1).latent_dist.mean.cpu() for images in rendered
            ]
        latents = torch.cat(batches).view(
            len(OBJECTS), len(STYLES), LATENTS_PER_PAIR, *batches[0].shape[1:]
        )
        torch.save(latents, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path, weights_only=True)


@torch.inference_mode()
def encode_captions(
    text: CLIPTextModel, tokenizer: CLIPTokenizer, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the UNet and the transformer read in training.

    Half-precision states [objects + 1, styles + 1, CAPTIONS_PER_PAIR, L, D], index 0 where the
    object or the style is unsaid; the position of the end token of each [.., .., ..]; the states
    of the empty prompt [L, D].
    """
    forms = random.Random(5)
    captions = [
        first_caption(o, s) if form == 0 else draw_caption(o, s, forms)
        for o in (None, *OBJECTS)
        for s in (None, *STYLES)
        for form in range(CAPTIONS_PER_PAIR)
    ]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    states = torch.empty(*tokens.shape, TEXT_WIDTH, dtype=torch.float16)
    for start in tqdm(range(0, len(tokens), 256), desc="captions", ncols=88):
        chunk = tokens[start : start + 256].to(device)
        states[start : start + 256] = text(chunk).last_hidden_state.half().cpu()
    shape = (len(OBJECTS) + 1, len(STYLES) + 1, CAPTIONS_PER_PAIR)
    ends = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)
    blank = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(device)
    return (
        states.view(*shape, NUM_TOKENS, TEXT_WIDTH),
        ends.view(shape),
        text(blank).last_hidden_state[0],
    )


def every_other(objects: Tensor, styles: Tensor) -> Tensor:
    """Return the styles [B], the next one in place of those whose pair with the object is left out.

    Kept are the pairs whose two indices are both even or both odd.
    """
    return torch.where((objects + styles) % 2 == 0, styles, (styles + 1) % len(STYLES))


@dataclasses.dataclass(frozen=True)
class Cached:
    """Latents and texts that denoisers are trained on, on the device.

    latents: as cache_latents(), scaled. states, ends, empty: as encode_captions().
    """

    latents: Tensor
    states: Tensor
    ends: Tensor
    empty: Tensor

    def draw(
        self, count: int, generator: torch.Generator, half_of_pairs: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return clean latents [B, C, 16, 16], hidden states [B, L, D] and pooled text [B, D].

        generator: on the CPU, or on the device, where nothing then waits for a copy.
        """
        device, drawn = self.latents.device, {"generator": generator, "device": generator.device}
        objects = torch.randint(len(OBJECTS), (count,), **drawn)
        styles = torch.randint(len(STYLES), (count,), **drawn)
        if half_of_pairs:
            styles = every_other(objects, styles)
        copies = torch.randint(LATENTS_PER_PAIR, (count,), **drawn)
        clean = self.latents[objects.to(device), styles.to(device), copies.to(device)]
        said = torch.rand(4, count, **drawn)
        form = torch.randint(1, CAPTIONS_PER_PAIR, (count,), **drawn)
        row = (
            torch.where(said[0] < 0.1, 0, objects + 1).to(device),
            torch.where(said[1] < 0.1, 0, styles + 1).to(device),
            torch.where(said[2] < 0.4, 0, form).to(device),
        )
        context, end = self.states[row].float(), self.ends[row]
        hidden = (said[3] < PADDING_HIDDEN).to(device)[:, None]
        hidden = hidden & (torch.arange(NUM_TOKENS, device=device) >= end[:, None])
        # the empty prompt as a whole, for classifier-free guidance
        hidden |= (torch.rand(count, **drawn) < 0.1).to(device)[:, None]
        # the pooled text is the state at the end of a prompt, hidden with it; the empty prompt's
        # end follows its begin
        rows = torch.arange(count, device=device)
        pooled = torch.where(hidden[rows, end][:, None], self.empty[1], context[rows, end])
        return clean, torch.where(hidden[..., None], self.empty, context), pooled


def cache(vae: AutoencoderKL, text: CLIPTextModel, work: Path, device: str) -> Cached:
    """Render, encode and cache what denoisers are trained on: 0.7 GB of states."""
    latents = cache_latents(vae, work, device)
    states, ends, empty = encode_captions(text, make_tokenizer(), device)
    scaled = (latents / latents.std()).to(device)
    return Cached(scaled, states.to(device), ends.to(device), empty)


class VelocityOf(nn.Module):
    """A UNet as a function of tensors alone, which is what a CUDA graph can hold."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        return self.unet(noisy, steps, context, return_dict=False)[0]


def train_unet(
    vae: AutoencoderKL, text: CLIPTextModel, work: Path, device: str, recipe: Recipe
) -> UNet2DConditionModel:
    cached, scheduler = cache(vae, text, work, device), make_scheduler()
    unet = make_unet(recipe.channels).to(device)
    average = make_unet(recipe.channels).to(device)
    average.load_state_dict(unet.state_dict())
    count = BATCH["unet"]
    signals = scheduler.alphas_cumprod.sqrt().to(device)
    predict = VelocityOf(unet)
    if (
        torch.device(device).type == "cuda"
    ):  # a small UNet: launching its kernels is what takes time
        example = (
            torch.randn(count, *cached.latents.shape[3:], device=device),
            torch.ones(count, dtype=torch.long, device=device),
            torch.randn(count, NUM_TOKENS, TEXT_WIDTH, device=device),
        )
        predict = torch.cuda.make_graphed_callables(predict, example)

    def loss_of(generator: torch.Generator) -> Tensor:
        clean, context, _ = cached.draw(count, generator, recipe.half_of_pairs)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        steps = torch.randint(1000, (count,), generator=generator).to(device)
        signal = signals[steps].view(-1, 1, 1, 1)
        sigma = (1 - signal**2).sqrt()
        predicted = predict(signal * clean + sigma * noise, steps, context)
        return F.mse_loss(predicted, signal * noise - sigma * clean)  # v, Salimans & Ho 2022

    train("unet", nn.ModuleDict({"unet": unet}), loss_of, work, average)
    return average.eval()


class FlowOf(nn.Module):
    """A transformer as a function of tensors alone, in bf16 on a GPU.

    Nothing of the autocast is kept from one pass to the next: a CUDA graph would replay it.
    """

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        kind = noisy.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            output = self.transformer(
                noisy,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=timesteps,
                return_dict=False,
            )
        return output[0].float()


def train_flow(cached: Cached, work: Path, device: str) -> SD3Transformer2DModel:
    """Train the transformer on a rectified flow; returns the average of its weights."""
    transformer, average = make_transformer().to(device), make_transformer().to(device)
    average.load_state_dict(transformer.state_dict())
    count = BATCH["flow"]
    process = RectifiedFlow(make_flow_scheduler().config.num_train_timesteps)
    predict = FlowOf(transformer)
    if torch.device(device).type == "cuda":
        transformer.compile()  # most of its time is moving what lies between layers
        example = (
            torch.randn(count, *cached.latents.shape[3:], device=device),
            torch.full((count,), 500.0, device=device),
            torch.randn(count, NUM_TOKENS, TEXT_WIDTH, device=device),
            torch.randn(count, TEXT_WIDTH, device=device),
        )
        predict = torch.cuda.make_graphed_callables(predict, example)

    def loss_of(generator: torch.Generator) -> Tensor:
        draws = torch.Generator(device).manual_seed(generator.initial_seed())
        clean, context, pooled = cached.draw(count, draws)
        noise = torch.randn(clean.shape, generator=draws, device=device)
        pure = torch.rand(count, generator=draws, device=device) < PURE_NOISE
        steps = process.draw(draws, count)
        steps = torch.where(pure, float(process.num_train_timesteps), steps)
        predicted = predict(process.add_noise(clean, noise, steps), steps, context, pooled)
        return F.mse_loss(predicted, process.target(clean, noise))

    train("flow", nn.ModuleDict({"flow": transformer}), loss_of, work, average)
    return average.eval()


# ------------------------------------------------------------ result
def pack(work: Path, out: Path, device: str, recipe: Recipe) -> None:
    """Write the pipeline and the classifiers as half-precision safetensors."""
    pack_unet(train_vae(work, device), train_text(work, device), work, out, device, recipe)
    for domain in ("style", "object"):
        train_classifier(domain, work, device).half().save_pretrained(
            out / f"{domain}_classifier", safe_serialization=True
        )
    pack_clip(work, out, device)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 2**20:.2f} MB")


def pack_unet(
    vae: AutoencoderKL, text: CLIPTextModel, work: Path, out: Path, device: str, recipe: Recipe
) -> None:
    """Train the UNet with these, and write out/pipeline in half precision."""
    vae.register_to_config(scaling_factor=float(1 / cache_latents(vae, work, device).std()))
    unet = train_unet(vae, text, work, device, recipe)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=make_tokenizer(),
        unet=unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out / "pipeline", safe_serialization=True)
    config = (
        out / "pipeline" / "text_encoder" / "config.json"
    )  # transformers would keep half precision, diffusers loads the rest as float
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n"
    )


def load_shared(pipeline: Path, device: str) -> tuple[AutoencoderKL, CLIPTextModel]:
    """Return the autoencoder and the text encoder of a pipeline, in single precision."""
    vae = AutoencoderKL.from_pretrained(pipeline / "vae").to(device).eval()
    return vae, CLIPTextModel.from_pretrained(pipeline / "text_encoder").to(device).eval()


def pack_flow(work: Path, out: Path, device: str) -> None:
    """Train the transformer with the shipped text encoder and autoencoder, and write it to
    out/flow with its scheduler.
    """
    vae, text = load_shared(out / "pipeline", device)
    parts = {
        "transformer": train_flow(cache(vae, text, work, device), work, device).half(),
        "scheduler": make_flow_scheduler(),
    }
    shared = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipeline = StableDiffusion3Pipeline(**parts, vae=None, **dict.fromkeys(shared))
    pipeline.save_config(out / "flow")
    for name, part in parts.items():
        part.save_pretrained(out / "flow" / name)
    size = sum(file.stat().st_size for file in (out / "flow").rglob("*") if file.is_file())
    print(f"{out / 'flow'}: {size / 1e6:.2f} MB")


def pack_clip(work: Path, out: Path, device: str) -> None:
    """Write the open_clip directory: configuration, tokenizer, half-precision safetensors."""
    tokenizer, folder = make_tokenizer(), out / "open_clip"
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps(clip_config(tokenizer), indent=2) + "\n"
    )
    weights = {
        name: tensor.half().cpu().contiguous()
        for name, tensor in train_clip(work, device).state_dict().items()
    }
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")


def share_outside(states: Tensor, span: Tensor) -> Tensor:
    """Return how much of each state's squared norm [N] lies outside the span of others [M, D].

    Directions below a thousandth of the largest singular value do not count for the span.
    """
    values, directions = torch.linalg.svd(span, full_matrices=False)[1:]
    inside = states @ directions[values > 1e-3 * values[0]].T
    return 1 - inside.square().sum(1) / states.square().sum(1)


def entropy_rank(states: Tensor) -> float:
    """Return exp of the entropy of the squared singular values of [N, D], its mean taken out."""
    share = torch.linalg.svdvals(states - states.mean(0)).square()
    share = share[share > 0] / share.sum()
    return float((-(share * share.log()).sum()).exp())


@torch.inference_mode()
def measure_text(out: Path) -> dict[str, object]:
    """Measure how far apart the text encoder keeps the names of styles.

    For a name's own tokens, the end token and the padding (states averaged over tokens and over
    the benchmark's objects, in double precision): the entropy rank over all styles, and the share
    of a retained name's state outside the span of the first 12 and of 100 targets.
    """
    tokenizer = CLIPTokenizer.from_pretrained(out / "pipeline" / "tokenizer")
    text = CLIPTextModel.from_pretrained(out / "pipeline" / "text_encoder")
    sequence = yaml.safe_load((CONF / "sequence" / "shapecanvas_style100.yaml").read_text())
    objects = yaml.safe_load((CONF / "sequence" / "shapecanvas_style.yaml").read_text())
    places: dict[str, list[Tensor]] = {"own_tokens": [], "end": [], "padding": []}
    for style in STYLES:
        captions = [first_caption(name, style) for name in objects["cross_retain"]]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        states = text(tokens).last_hidden_state.double()
        end = int((tokens[0] == tokenizer.eos_token_id).int().argmax())
        own = slice(end - 1 - len(style.split()), end - 1)  # the word "style" follows the name
        for place, positions in zip(
            places, (own, slice(end, end + 1), slice(end + 1, None)), strict=True
        ):
            places[place].append(states[:, positions].mean((0, 1)))
    rows = {style: index for index, style in enumerate(STYLES)}
    targets = [rows[name] for name in sequence["targets"]]
    retained = [rows[name] for name in sequence["retain"]]
    result: dict[str, object] = {}
    for place, listed in places.items():
        states = torch.stack(listed)
        shares = {
            count: 100 * share_outside(states[retained], states[targets[:count]])
            for count in (12, 100)
        }
        result[place] = {
            "entropy_rank": round(entropy_rank(states), 1),
            **{
                f"percent_outside_{count}": [
                    round(float(f(share)), 1) for f in (torch.min, torch.median, torch.max)
                ]
                for count, share in shares.items()
            },
        }
        print(f"text, {place}: {result[place]}")
    return result


def load_result(
    out: Path, device: str, flow: bool = False
) -> tuple[DiffusionModel, Classifier, Sampler]:
    """Return the model and the judges that were built, and the sampler of conf/model.

    flow: the transformer, with FLOW_SAMPLER.
    """
    read = {
        group: yaml.safe_load((CONF / group / "shapecanvas.yaml").read_text())
        for group in ("model", "evaluator")
    }
    for part in read.values():
        del part["_target_"]
    sampler = Sampler(**read["model"].pop("sampler"))
    places = {"path": str(out / "pipeline")}
    if flow:
        sampler = FLOW_SAMPLER
        places = {"path": str(out / "flow"), "shared": str(out / "pipeline")}
    model = load_model(**read["model"] | places, sampler=sampler, device=device)
    judges = {domain: str(out / f"{domain}_classifier") for domain in ("style", "object")}
    return model, Classifier(**read["evaluator"] | {"paths": judges}, device=device), sampler


def read_sequence(name: str) -> Sequence:
    """Return a sequence of conf/sequence."""
    read = yaml.safe_load((CONF / "sequence" / f"{name}.yaml").read_text())
    del read["_target_"]
    return make_sequence(**read)


def measure(out: Path, device: str) -> None:
    """Measure base accuracy of generated images at the default sampler, by name and in other words.

    It is printed, and saved as base_accuracy.json.
    """
    model, evaluator, sampler = load_result(out, device)
    result = measure_names(model, evaluator, sampler)
    result |= measure_words(model, evaluator, sampler)
    result["text"] = measure_text(out)
    (out / "base_accuracy.json").write_text(json.dumps(result, indent=2) + "\n")


def measure_flow(out: Path, device: str) -> None:
    """Measure the same of the transformer, and the benchmark's images at other samplers.

    It is saved as flow/base_accuracy.json.
    """
    model, evaluator, sampler = load_result(out, device, flow=True)
    result = measure_names(model, evaluator, sampler)
    result |= measure_words(model, evaluator, sampler)
    others = {}
    for steps, guidance in SAMPLERS_TRIED:
        label = f"{steps} steps, guidance {guidance:g}"
        print(f"{label}:")
        found = measure_names(model, evaluator, Sampler(steps, guidance), ("benchmark",))
        others[label] = found["benchmark"]
    result["other_samplers"] = others
    (out / "flow/base_accuracy.json").write_text(json.dumps(result, indent=2) + "\n")


def measure_names(
    model: DiffusionModel,
    evaluator: Classifier,
    sampler: Sampler,
    names: tuple[str, ...] = ("benchmark", "all_styles"),
) -> dict[str, object]:
    """Measure how often the judges see the style and the object that a prompt names."""
    sequence = read_sequence("shapecanvas_style")
    grids = {
        "benchmark": (list(sequence.targets + sequence.retain), OBJECTS, (1, 2)),
        "all_styles": ([Concept(style, "style") for style in STYLES], OBJECTS[:8], (1,)),
    }
    result: dict[str, object] = {"sampler": {"steps": sampler.steps, "guidance": sampler.guidance}}
    for name in names:
        concepts, objects, seeds = grids[name]
        cross = tuple(Concept(entry, "object") for entry in objects)
        grid = dataclasses.replace(sequence, cross_retain=cross, seeds=seeds)
        settings = EvalSettings(sampler.steps, sampler.guidance, sampler.scheduler, batch_size=96)
        rows = evaluate(model, evaluator, grid, concepts, 0, settings).predictions
        right = {
            domain: 100 * (rows[domain] == rows[f"predicted_{domain}"]).mean().item()
            for domain in ("style", "object")
        }
        result[name] = accuracy_line(f"base accuracy, {name}", len(rows), right)
    return result


def accuracy_line(label: str, images: int, percent: dict[str, float]) -> dict[str, float]:
    """Print accuracy by domain, and return what base_accuracy.json holds of it."""
    shares = ", ".join(f"{domain} {value:.1f}%" for domain, value in percent.items())
    print(f"{label}: {images} images, {shares}")
    return {
        "images": images,
        **{f"{domain}_percent": round(value, 2) for domain, value in percent.items()},
    }


def measure_words(
    model: DiffusionModel, evaluator: Classifier, sampler: Sampler
) -> dict[str, object]:
    """Measure whether the model understands other words: captions of other forms, synonyms of the
    objects, descriptions of the styles; 288 random pairs each.
    """
    result: dict[str, object] = {}
    for kind in ("other_forms", "synonyms", "descriptions"):
        draws = random.Random(8)
        pairs = [(draws.choice(OBJECTS), draws.choice(STYLES)) for _ in range(288)]
        captions = []
        for name, style in pairs:
            forms = FORMS[True, True]
            form = draws.choice(forms[1:]) if kind == "other_forms" else forms[0]
            said = SYNONYMS[name] if kind == "synonyms" else name
            look = STYLE_PARTS[style].description if kind == "descriptions" else style
            captions.append(form.format(object=said, style=look))
        images = torch.cat(
            list(generate(model, captions, [3] * 288, sampler, batch_size=96, label=kind))
        )
        found = evaluator.predict(images)
        right = {
            "style": sum(a == b for a, (_, b) in zip(found["style"].labels, pairs, strict=True)),
            "object": sum(a == b for a, (b, _) in zip(found["object"].labels, pairs, strict=True)),
        }
        percent = {domain: 100 * number / len(pairs) for domain, number in right.items()}
        result[kind] = accuracy_line(f"base accuracy, {kind}", len(pairs), percent)
    return result


def measure_clip(out: Path, device: str) -> None:
    """Zero-shot accuracy of the image-text model on 1000 rendered images, and on the base model's
    grid of the benchmark.
    """
    read = yaml.safe_load((CONF / "evaluator/shapecanvas_clip.yaml").read_text())
    del read["_target_"]
    judge = OpenClip(**read | {"model": str(out / "open_clip")}, device=device)
    generator, right = torch.Generator().manual_seed(987654321), {"style": 0, "object": 0}
    for _ in range(10):
        images, objects, styles = draw(100, generator)
        found = judge.predict(images.to(device))
        for domain, names, labels in (("style", STYLES, styles), ("object", OBJECTS, objects)):
            said = found[domain].labels
            right[domain] += sum(a == names[b] for a, b in zip(said, labels.tolist(), strict=True))
    percent = {domain: number / 10 for domain, number in right.items()}
    accuracy_line("zero-shot, rendered", 1000, percent)
    model, _, sampler = load_result(out, device)
    sequence = read_sequence("shapecanvas_style")
    settings = EvalSettings(sampler.steps, sampler.guidance, sampler.scheduler, batch_size=96)
    grid = evaluate(
        model, judge, sequence, [*sequence.targets, *sequence.retain], 0, settings
    ).predictions
    percent = {
        domain: 100 * (grid[domain] == grid[f"predicted_{domain}"]).mean()
        for domain in ("style", "object")
    }
    accuracy_line("zero-shot, generated", len(grid), percent)


def beside(stages: list[str], arguments: argparse.Namespace) -> subprocess.Popen:
    """Train further stages in a second process while this one goes on."""
    places = [
        "--work",
        str(arguments.work),
        "--out",
        str(arguments.out),
        "--device",
        arguments.device,
    ]
    command = [sys.executable, __file__, *places, "--only", *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else os.environ
    return subprocess.Popen(
        command, env=environment, stderr=(arguments.work / "beside.log").open("a")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/shapecanvas"), help="checkpoints of the build"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=SHIPPED,
        help="where the result goes",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of the UNet stage"
    )
    parser.add_argument(
        "--channels",
        nargs=3,
        type=int,
        default=Recipe.channels,
        help="of the UNet's levels, multiples of 16 (default: %(default)s)",
    )
    parser.add_argument(
        "--half-of-pairs", action="store_true", help="train the UNet on every other pair alone"
    )
    parser.add_argument("--only", nargs="*", default=[], help="train these stages and stop")
    arguments = parser.parse_args()
    if "other_unet" in arguments.only:
        for option in ("work", "out"):
            if getattr(arguments, option).resolve() == parser.get_default(option).resolve():
                parser.error(
                    f"other_unet needs a --{option} of its own: this is the shipped UNet's"
                )
    arguments.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(tuple(arguments.channels), arguments.half_of_pairs)
    torch.manual_seed(20)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as the shipped UNet was trained
    stages = {
        "vae": train_vae,
        "text": train_text,
        "style": lambda work, device: train_classifier("style", work, device),
        "object": lambda work, device: train_classifier("object", work, device),
        "open_clip": lambda work, device: pack_clip(work, arguments.out, device),
        "flow": lambda work, device: pack_flow(work, arguments.out, device),
        "other_unet": lambda work, device: pack_unet(
            *load_shared(SHIPPED / "pipeline", device), work, arguments.out, device, recipe
        ),
        "measure": lambda work, device: measure(arguments.out, device),
        "measure_flow": lambda work, device: measure_flow(arguments.out, device),
        "measure_text": lambda work, device: measure_text(arguments.out),
        "measure_clip": lambda work, device: measure_clip(arguments.out, device),
        "unet": lambda work, device: train_unet(
            train_vae(work, device), train_text(work, device), work, device, recipe
        ),
    }
    if arguments.only:
        denoiser = {"unet", "other_unet", "flow"} & set(arguments.only)
        torch.set_num_threads(arguments.threads if denoiser else 1)
        for stage in arguments.only:
            stages[stage](arguments.work, arguments.device)
        return
    helper = beside(["text", "style", "object", "open_clip"], arguments)
    torch.set_num_threads(1)
    vae = train_vae(arguments.work, arguments.device)
    if helper.wait() != 0:
        sys.exit(f"the text encoder or a classifier failed; see {arguments.work / 'beside.log'}")
    torch.set_num_threads(arguments.threads)
    text = train_text(arguments.work, arguments.device)
    train_unet(vae, text, arguments.work, arguments.device, recipe)
    pack(arguments.work, arguments.out, arguments.device, recipe)
    measure(arguments.out, arguments.device)
    measure_clip(arguments.out, arguments.device)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main()
