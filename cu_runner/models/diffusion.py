"""A text-to-image diffusion model as the unlearning code sees it.

It encodes prompts, predicts noise, encodes and decodes images. The embedded ShapeCanvas model,
Stable Diffusion and SDXL differ in their files only; models with classes in their components.

Shapes: B batch, C latent channels, H W latent size, S image side.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from cu_runner.models.architectures import Given, architecture_of
from cu_runner.models.components import Checkpoint
from cu_runner.models.hashing import hash_weights, to_bytes
from cu_runner.models.process import process_of
from cu_runner.models.quantised import is_quantised
from cu_runner.models.text import Text
from cu_runner.models.text_readers import TextReaders
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Precision, Sampler, Speed

if TYPE_CHECKING:
    import diffusers
    from torch import Generator, Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # names in torch


def dtype_of(precision: str) -> torch.dtype:
    """Return the type of torch for a precision: fp32, bf16 or fp16."""
    return cast("torch.dtype", getattr(torch, DTYPES[precision]))


class DiffusionModel:
    """A diffusion model with frozen text encoder and autoencoder, where it has them.

    The UNet's master weights stay fp32; `precision` is that of the forward passes (torch.autocast).
    """

    def __init__(
        self,
        components: Checkpoint,
        *,
        resolution: int,
        sampler: Sampler,
        precision: Precision,
        device: torch.device,
        vae_slicing: bool = False,
    ) -> None:
        self.components = components
        self.denoiser, self.scheduler = components.denoiser, components.scheduler
        self.architecture = architecture_of(self.denoiser)
        self.prompts = components.text_source(device)
        self.space = components.image_space(slicing=vae_slicing)
        for part in self.networks:
            part.to(device).eval().requires_grad_(False)
        self.sampler, self.device = sampler, device
        self.resolution, self.vae_slicing = resolution, vae_slicing
        self.dtype, self.precision = dtype_of(precision), precision
        side = self.space.side(resolution)
        channels = self.architecture.channels(self.denoiser.config)
        self.latent_shape: tuple[int, int, int] = (channels, side, side)
        self.process = process_of(self.scheduler, device)
        # the most images of a batch, once more of them did not fit into GPU memory
        self.batch_limit: int | None = None
        self._forward: Callable[..., Any] = self.denoiser
        self._caches_text, self._readers = False, TextReaders(self.denoiser)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Return every network, the UNet first."""
        return (self.denoiser, *self.space.networks, *self.prompts.networks)

    @property
    def vae(self) -> diffusers.AutoencoderKL:
        """Return the autoencoder. Raises ModelError where the model has none."""
        return self.space.vae

    @property
    def text_encoders(self) -> tuple[PreTrainedModel, ...]:
        """Return the text encoders: one, SDXL's two, none of a class-conditional model."""
        return cast("tuple[PreTrainedModel, ...]", self.prompts.networks)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the first tokenizer. Raises ModelError where the model reads no words."""
        return self.prompts.tokenizer

    def speed_up(self, speed: Speed) -> None:
        """Choose what gives the same results faster, up to rounding.

        On a CPU without compilation they are the same bits.
        """
        self._caches_text = speed.kv_cache and not speed.compile
        last = speed.channels_last and self.device.type == "cuda"
        layout = torch.channels_last if last else torch.contiguous_format
        for part in (self.denoiser, *self.space.networks):
            part.to(memory_format=layout)
        # only keys and values change between requests, and in place: one compilation per shape and
        # process
        self._forward = (
            torch.compile(self.denoiser, dynamic=False) if speed.compile else self.denoiser
        )

    @contextlib.contextmanager
    def constant_text(self) -> Iterator[None]:
        """Compute keys and values of a text once where the UNet runs on it again and again.

        It runs without gradients here, on one text.
        """
        if not (self._caches_text and self.architecture.remembers_text):
            yield
            return
        with self._readers.remembering():
            yield

    def begin_token_detached(self, detached: bool = True) -> AbstractContextManager[None]:
        """Let no gradient through keys and values of token 0, the begin of the text.

        The released code of concept ablation trains so (Kumari et al. 2023); outputs are the same.
        Passes inside are not compiled, also with speed.compile.

        Raises:
            ModelError: the model has no cross-attention to such a token.
        """
        if detached and not self.architecture.remembers_text:
            raise ModelError(
                f"method.begin_token=detached: {type(self.denoiser).__name__} makes no keys and "
                "values of a begin token alone; use begin_token=trained"
            )
        return self._readers.begin_token_detached(detached)

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of steps of the noise schedule."""
        return self.process.num_train_timesteps

    def autocast(self) -> torch.autocast:
        """Set the precision of forward passes.

        Training in fp16 would need loss scaling: with gradients on, fp16 runs as fp32.
        """
        enabled = self.precision == "bf16"
        enabled |= self.precision == "fp16" and not torch.is_grad_enabled()
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def encode_prompts(self, prompts: list[str]) -> Text:
        """Return the text of B prompts; each distinct one is encoded once per process, in fp32."""
        return self.prompts(prompts)

    def encode_empty(self) -> Text:
        """Return the text of the empty prompt as the encoders make it, where guidance reads zeros
        too (SDXL).
        """
        return self.prompts.encode_empty()

    @property
    def num_tokens(self) -> int:
        """Return how many tokens of a prompt are read, its begin and its end among them."""
        return sum(part.length for part in self.prompts.parts)

    def token_span(
        self, text: str, inside: str, before: str = "", *, partly: bool = False
    ) -> slice:
        """Return the positions of `text` in the prompt `inside`, in the first part of its text.

        As TextPart.span() does.
        """
        return self.prompts.parts[0].span(text, inside, before, partly=partly)

    def reads_linearly(self, name: str) -> bool:
        """Tell whether a weight of this name is linear in what the text encoder puts out.

        Keys and values of cross-attention are, in a UNet; in a transformer the layer by which the
        text enters.
        """
        return self.architecture.roles.linear.search(name) is not None

    @property
    def guides_itself(self) -> bool:
        """Tell whether guidance is an input of the denoiser, and no second pass (FLUX.1-dev)."""
        return self.architecture.guides_itself(self.denoiser.config)

    def draw_timesteps(self, generator: Generator, count: int) -> Tensor:
        """Draw timesteps [count], on the CPU, as models of this process are trained on them."""
        return self.process.draw(generator, count)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents x_0 to x_t, all [B, C, H, W], at timesteps [B]."""
        return self.process.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return what predict() should say of x_t, all [B, C, H, W]: the noise, or the velocity."""
        return self.process.target(clean, noise)

    def output(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Text,
        weights: dict[str, Tensor] | None = None,
        *,
        guidance: float = 1.0,
    ) -> Tensor:
        """Run the denoiser.

        Args:
            noisy: [B, C, H, W]. timesteps: [B], or one for all.
            weights: values to use in place of some of its parameters (a frozen teacher); the
                denoiser itself is not changed.
            guidance: of a denoiser that guides itself; training leaves it at 1.

        Returns:
            [B, C, H, W], fp32, as the scheduler's prediction type means it.
        """
        rows = distributed.share(len(noisy))
        if rows is not None:  # several processes: each runs its share
            timesteps = timesteps[rows] if timesteps.ndim else timesteps
            own = self._run(noisy[rows], timesteps, text[rows], weights, guidance)
            return distributed.gather(own, len(noisy))
        return self._run(noisy, timesteps, text, weights, guidance)

    def _run(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Text,
        weights: dict[str, Tensor] | None,
        guidance: float,
    ) -> Tensor:
        given = Given(self.denoiser.config, noisy, timesteps, text, self.resolution, guidance)
        arguments, more = self.architecture.arguments(given)
        with self.autocast():
            if weights is None:
                # a compiled UNet does not see hooks that came after its compilation
                forward = self.denoiser if self._readers.detaches_begin else self._forward
                output = forward(*arguments, **more).sample
            else:
                output = torch.func.functional_call(self.denoiser, weights, arguments, more).sample
        return self.architecture.latents(output, noisy).float()

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Text, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Predict what target() is of images that are known, [B, C, H, W].

        That is the noise e(x_t, t, c) of Stable Diffusion 1, 2, XL and PixArt, and the velocity
        v(x_t, t, c) of rectified flow. Arguments as of output().
        """
        output = self.output(noisy, timesteps, text, weights)
        return self.process.prediction(output, noisy, timesteps)

    @without_gradients
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] in 0..1 to scaled latents [B, C, H, W]."""
        return self.space.encode(images.to(self.device))

    @without_gradients
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, H, W] to images [B, 3, S, S] in 0..1.

        What is not finite is NaN.
        """
        overflows = self.precision == "fp16" and self.space.overflows_in_fp16
        with contextlib.nullcontext() if overflows else self.autocast():
            images = self.space.decode(latents)
        return images.clamp(0, 1).masked_fill(images.isinf(), torch.nan)

    def lower_frozen(self, trained: Container[str]) -> None:
        """Hold the UNet's matrices that are not trained in bf16, with precision=bf16.

        That is half their memory and bitwise the same outputs. Other precisions also run in fp32,
        and nothing is done. Call it after fingerprint(), which is over the weights as loaded.

        Args:
            trained: names of UNet parameters that stay fp32.
        """
        if self.precision != "bf16":
            return
        # not by name alone: gates share a weight, which has a name in every layer
        kept = {id(weight) for name, weight in self.denoiser.named_parameters() if name in trained}
        for module in self.denoiser.modules():
            # what autocast would cast at every forward pass
            if isinstance(module, nn.Linear | nn.Conv2d) and not is_quantised(module.weight):
                for parameter in module.parameters(recurse=False):
                    if id(parameter) not in kept:
                        parameter.data = parameter.data.to(self.dtype)

    def checkpoint_gradients(self) -> None:
        """Keep no activations inside the UNet's blocks: less memory, more time.

        They are computed again on the way back.
        """
        from torch.utils.checkpoint import checkpoint

        def run(module: nn.Module, *arguments: object) -> object:
            # the weights and the detaching as they are now: on the way back, those of a
            # functional_call and of begin_token_detached are no longer in place
            weights: dict[str, Tensor] = dict(module.named_parameters())
            detached = self._readers.detaches_begin

            def call(*inputs: object) -> object:
                with self.begin_token_detached(detached):
                    return torch.func.functional_call(module, weights, inputs)

            return checkpoint(call, *arguments, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(run)

    def fingerprint(self) -> str:
        """Return the sha256 over configurations, tokenizers and weights.

        Two models with one fingerprint make the same images.
        """
        parts = {"latent": self.latent_shape, **self.components.configuration()}
        digest = hashlib.sha256(to_bytes(parts))
        for part in self.networks:
            hash_weights(digest, part)
        return digest.hexdigest()
