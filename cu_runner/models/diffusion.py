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

from pydantic import PositiveInt

from cu_runner.models.checkpoint_files import locate
from cu_runner.models.checkpoints import PredictionType, read_components
from cu_runner.models.components import Checkpoint
from cu_runner.models.hashing import hash_weights, to_bytes
from cu_runner.models.text import Text, token_span
from cu_runner.models.text_readers import TextReaders
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Precision, Sampler, Speed

if TYPE_CHECKING:
    import diffusers
    from torch import Tensor
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
        self.unet, self.scheduler = components.unet, components.scheduler
        self.prompts = components.text_source(device)
        self.space = components.image_space(slicing=vae_slicing)
        for part in self.networks:
            part.to(device).eval().requires_grad_(False)
        self.sampler, self.device = sampler, device
        self.resolution, self.vae_slicing = resolution, vae_slicing
        self.dtype, self.precision = dtype_of(precision), precision
        side = self.space.side(resolution)
        self.latent_shape: tuple[int, int, int] = (self.unet.config.in_channels, side, side)
        self.alphas_cumprod: Tensor = self.scheduler.alphas_cumprod.to(device)
        # the most images of a batch, once more of them did not fit into GPU memory
        self.batch_limit: int | None = None
        self._forward: Callable[..., Any] = self.unet
        self._caches_text, self._readers = False, TextReaders(self.unet)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Return every network, the UNet first."""
        return (self.unet, *self.space.networks, *self.prompts.networks)

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
        for part in (self.unet, *self.space.networks):
            part.to(memory_format=layout)
        # only keys and values change between requests, and in place: one compilation per shape and
        # process
        self._forward = torch.compile(self.unet, dynamic=False) if speed.compile else self.unet

    @contextlib.contextmanager
    def constant_text(self) -> Iterator[None]:
        """Compute keys and values of a text once where the UNet runs on it again and again.

        It runs without gradients here, on one text.
        """
        if not self._caches_text:
            yield
            return
        with self._readers.remembering():
            yield

    def begin_token_detached(self, detached: bool = True) -> AbstractContextManager[None]:
        """Let no gradient through keys and values of token 0, the begin of the text.

        The released code of concept ablation trains so (Kumari et al. 2023); outputs are the same.
        Passes inside are not compiled, also with speed.compile.

        Raises:
            ModelError: the model reads no text, which would have such a token.
        """
        if detached and not self.prompts.reads_words:
            raise ModelError(
                "method.begin_token=detached: the model reads the names of classes, without a "
                "begin token; use begin_token=trained"
            )
        return self._readers.begin_token_detached(detached)

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of steps of the noise schedule."""
        return len(self.alphas_cumprod)

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
        return int(self.tokenizer.model_max_length)

    def token_span(
        self, text: str, inside: str, before: str = "", *, partly: bool = False
    ) -> slice:
        """Return the token positions of `text` in the prompt `inside`, as text.token_span does."""
        return token_span(self.tokenizer, text, inside, before, partly=partly)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents x_0 to x_t, all [B, C, H, W], at timesteps [B]."""
        # x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps   (Ho et al. 2020, eq. 4)
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def unet_output(
        self, noisy: Tensor, timesteps: Tensor, text: Text, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Run the UNet.

        Args:
            noisy: [B, C, H, W]. timesteps: [B], or one for all.
            weights: values to use in place of some UNet parameters (a frozen teacher); the UNet
                itself is not changed.

        Returns:
            [B, C, H, W], fp32, as the scheduler's prediction type means it.
        """
        rows = distributed.share(len(noisy))
        if rows is not None:  # several processes: each runs its share
            timesteps = timesteps[rows] if timesteps.ndim else timesteps
            own = self._run_unet(noisy[rows], timesteps, text[rows], weights)
            return distributed.gather(own, len(noisy))
        return self._run_unet(noisy, timesteps, text, weights)

    def _run_unet(
        self, noisy: Tensor, timesteps: Tensor, text: Text, weights: dict[str, Tensor] | None
    ) -> Tensor:
        more = self.prompts.arguments(text, noisy, self.resolution)
        arguments = (noisy, timesteps)
        with self.autocast():
            if weights is None:
                # a compiled UNet does not see hooks that came after its compilation
                forward = self.unet if self._readers.detaches_begin else self._forward
                output = forward(*arguments, **more).sample
            else:
                output = torch.func.functional_call(self.unet, weights, arguments, more).sample
        return output.float()

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, text: Text, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Predict the noise e(x_t, t, c) [B, C, H, W]; arguments as of unet_output()."""
        output = self.unet_output(noisy, timesteps, text, weights)
        if self.scheduler.config.prediction_type == "epsilon":
            return output
        # v = sqrt(ab) eps - sqrt(1 - ab) x_0   =>   eps = sqrt(ab) v + sqrt(1 - ab) x_t
        # (Salimans & Ho 2022, App. D)
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * noisy

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
        kept = {id(weight) for name, weight in self.unet.named_parameters() if name in trained}
        for module in self.unet.modules():
            # what autocast would cast at every forward pass
            if isinstance(module, nn.Linear | nn.Conv2d):
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

        self.unet.enable_gradient_checkpointing(run)

    def fingerprint(self) -> str:
        """Return the sha256 over configurations, tokenizers and weights.

        Two models with one fingerprint make the same images.
        """
        parts = {"latent": self.latent_shape, **self.components.configuration()}
        digest = hashlib.sha256(to_bytes(parts))
        for part in self.networks:
            hash_weights(digest, part)
        return digest.hexdigest()


def load_model(
    path: str,
    resolution: PositiveInt,
    sampler: Sampler,
    precision: Precision = "fp32",
    *,
    revision: str | None = None,
    config: str | None = None,
    prediction_type: PredictionType | None = None,
    vae_slicing: bool = False,
    classes: str | list[str] | None = None,
    allow_pickle: tuple[str, ...] = (),
    device: str = "cpu",
) -> DiffusionModel:
    """Load Stable Diffusion 1 or 2, SDXL, a model that is built like them, or one with classes.

    Args:
        path: a diffusers directory, a single file in the original layout, or the id of a diffusers
            repository on the Hugging Face hub; `package:...` is inside the installed package.
        resolution: image side in pixels.
        sampler: default denoising steps and guidance.
        precision: of the forward passes. bf16 holds what is not trained in it too; fp16 is for
            passes without gradients, those with gradients are fp32.
        revision: branch, tag or commit of a hub repository.
        config: for a single file, a diffusers directory (or hub id) of the same kind: its
            configurations and tokenizers are read.
        prediction_type: what the UNet predicts, where the checkpoint's scheduler says it wrongly.
        vae_slicing: encode and decode images one by one: less memory.
        classes: of a UNet2DModel with num_class_embeds, their names in its order, a shipped list,
            or a text file with one a line. One class more in the UNet is the null class.
        allow_pickle: files that may be read although they are pickles; as weights only, whatever
            they hold.
        device: as torch names it.

    Raises:
        ModelError: missing checkpoint or component, weights that are incomplete or of a wrong
            shape, a precision that the device does not have.
    """
    target = torch.device(device)
    on_gpu = target.type == "cuda"
    if precision == "bf16" and on_gpu and torch.cuda.get_device_capability(target) < (8, 0):
        raise ModelError("model.precision=bf16: this GPU does not have it; use fp16 or fp32")
    components = read_components(
        locate(path, revision),
        config=config,
        prediction_type=prediction_type,
        classes=classes,
        allow_pickle=allow_pickle,
    )
    return DiffusionModel(
        components,
        resolution=resolution,
        sampler=sampler,
        precision=precision,
        device=target,
        vae_slicing=vae_slicing,
    )
