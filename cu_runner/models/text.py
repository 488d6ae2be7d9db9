"""Prompts as the UNet reads them: encoded once per process, in fp32.

Shapes: B batch, L tokens, D text width, P pooled text width.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cu_runner.models.components import Components

logger = logging.getLogger(__name__)

SHOWN = 200  # characters of a prompt that is cut
CHUNK = 256  # prompts that are encoded together


@dataclass(frozen=True)
class Text:
    """Encoded prompts, as the UNet reads them.

    hidden: [B, L, D], at every token position; keys and values of cross-attention are linear in it.
    Of a class-conditional model it is [B], the numbers of classes.
    pooled: [B, P], of SDXL.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | list[int]) -> Text:
        return Text(self.hidden[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device: torch.device | str) -> Text:
        """Return the same on another device."""
        return Text(self.hidden.to(device), None if self.pooled is None else self.pooled.to(device))

    def zeros(self) -> Text:
        """Return zeros of the same shapes."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Text(torch.zeros_like(self.hidden), pooled)

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """Return the rows of all parts, in order."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Text(
            torch.cat([part.hidden for part in parts]), torch.cat(pooled) if pooled else None
        )


class TextSource(ABC):
    """What makes of prompts what the UNet reads. networks: that it computes with, frozen.

    reads_words: whether a prompt is words in a row, and a Text what an encoder makes of them; else
    it is a name that stands for a number.
    """

    networks: tuple[nn.Module, ...] = ()
    reads_words = True

    @abstractmethod
    def __call__(self, prompts: list[str]) -> Text:
        """Return the text of B prompts."""

    @abstractmethod
    def encode_empty(self) -> Text:
        """Return the text of the empty prompt as it is made, also where guidance reads zeros."""

    @abstractmethod
    def arguments(self, text: Text, noisy: Tensor, resolution: int) -> dict[str, object]:
        """Return the arguments by which the UNet is given a text, beside latents and timesteps.

        Args:
            noisy: the latents [B, C, H, W]. resolution: of their images, in pixels.
        """

    @abstractmethod
    def cut(self, prompts: list[str]) -> set[str]:
        """Return the prompts that are not read to their end."""

    @abstractmethod
    def alike(self, one: str, other: str) -> bool:
        """Tell whether two prompts are the same to the model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the first tokenizer. Raises ModelError where prompts are no words."""
        raise ModelError(
            "the model reads the names of classes and has no tokens, which this part of the run "
            "looks at; use one that needs none"
        )

    def encode_once(self, prompts: list[str]) -> Text:
        """Return the text of prompts that are not worth keeping: a search tries thousands."""
        return self(prompts)

    def encode_replaced(self, prompts: list[str], word: str, vectors: list[Tensor]) -> Text:
        """Return the text of prompts in which a word has other embeddings; gradients flow to them.

        Args:
            prompts: each holds `word`, a run of as many tokens as there are vectors.
            vectors: of each text encoder, [tokens, width of its embeddings].

        Raises:
            ValueError: the word is not in a prompt, or has another number of tokens.
        """
        raise ModelError("the model reads the names of classes, and has no embeddings of words")

    def embeddings(self) -> list[Tensor]:
        """Return the token embeddings of each text encoder, [vocabulary, width]."""
        raise ModelError("the model reads the names of classes, and has no embeddings of words")


class PromptEncoder(TextSource):
    """The text encoders of a model, frozen, with the texts that they have made so far."""

    def __init__(self, parts: Components, device: torch.device) -> None:
        """Take the components of a model, whose text encoders are on the device."""
        self._parts, self._device = parts, device
        self.networks = parts.text_encoders
        self.encoded: dict[str, Text] = {}  # of one prompt each, on the CPU

    @without_gradients
    def __call__(self, prompts: list[str]) -> Text:
        """Return the text of B prompts; each distinct one is encoded once, and kept on the CPU."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.encoded]
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            text = self._encode(chunk).to("cpu")
            for row, prompt in enumerate(chunk):
                # a copy: a view would keep the whole chunk
                encoded = Text.cat([text[row : row + 1]])
                is_zero = prompt == "" and self._parts.zero_empty_prompt
                self.encoded[prompt] = encoded.zeros() if is_zero else encoded
        return Text.cat([self.encoded[prompt] for prompt in prompts]).to(self._device)

    @without_gradients
    def encode_empty(self) -> Text:
        """Return the text of the empty prompt as the encoders make it, also where guidance reads
        zeros.
        """
        return self._encode([""])

    @without_gradients
    def encode_once(self, prompts: list[str]) -> Text:
        """Return the text of prompts that are not worth keeping: a search tries thousands."""
        parts = [
            self._encode(prompts[i : i + CHUNK], told=False) for i in range(0, len(prompts), CHUNK)
        ]
        return Text.cat(parts)

    def encode_replaced(self, prompts: list[str], word: str, vectors: list[Tensor]) -> Text:
        """Return the text of prompts in which a word has other embeddings; gradients flow to them.

        Args:
            prompts: each holds `word`, a run of as many tokens as there are vectors.
            vectors: of each text encoder, [tokens, width of its embeddings].

        Raises:
            ValueError: the word is not in a prompt, or has another number of tokens.
        """
        with contextlib.ExitStack() as hooks:
            encoders = zip(self._parts.tokenizers, self._parts.text_encoders, vectors, strict=True)
            for tokenizer, encoder, own in encoders:
                spans = [token_span(tokenizer, word, prompt) for prompt in prompts]
                if any(span.stop - span.start != len(own) for span in spans):
                    raise ValueError(f"{word!r} has not {len(own)} tokens in each prompt")
                embeddings = encoder.get_input_embeddings()
                hooks.callback(embeddings.register_forward_hook(replacing(spans, own)).remove)
            return self._encode(prompts, told=False)

    def embeddings(self) -> list[Tensor]:
        """Return the token embeddings of each text encoder, [vocabulary, width]."""
        return [
            encoder.get_input_embeddings().weight.detach() for encoder in self._parts.text_encoders
        ]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the first tokenizer."""
        return self._parts.tokenizers[0]

    def arguments(self, text: Text, noisy: Tensor, resolution: int) -> dict[str, object]:
        """Return hidden states; of SDXL the pooled text and the sizes too."""
        found: dict[str, object] = {"encoder_hidden_states": text.hidden}
        if text.pooled is not None:
            # original size, crop corner, target size: an image that was never resized or cropped
            # (Podell et al. 2023, Sec. 2.2)
            size = [resolution, resolution, 0, 0, resolution, resolution]
            found["added_cond_kwargs"] = {
                "text_embeds": text.pooled,
                "time_ids": noisy.new_tensor([size] * len(text)),
            }
        return found

    def cut(self, prompts: list[str]) -> set[str]:
        """Return the prompts of which not every token is read."""
        most = int(self.tokenizer.model_max_length)
        # a token has a byte at least
        long = [text for text in dict.fromkeys(prompts) if len(text.encode()) > most - 2]
        rows = self.tokenizer(long).input_ids if long else []
        return {text for text, row in zip(long, rows, strict=True) if len(row) > most}

    def alike(self, one: str, other: str) -> bool:
        """Tell whether two prompts have the same tokens, as far as they are read."""
        first, second = self.tokenizer([one, other], truncation=True).input_ids
        return bool(first == second)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts; told: whether one that is cut is named.

        Of one encoder the text is its last hidden states. Of SDXL it is the last but one of both,
        side by side, and the second's projection.
        """
        ids: list[Tensor] = []
        masks: list[Tensor] = []
        for tokenizer in self._parts.tokenizers:
            padded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
            tokens = padded.input_ids
            limit = tokens.shape[1]
            counts = {prompt: len(tokenizer(prompt).input_ids) for prompt in prompts}
            cut = [prompt for prompt, count in counts.items() if count > limit]
            if cut and not ids and told:
                logger.warning(
                    "   prompt %r has %d tokens and is cut to the %d that the model reads%s",
                    cut[0][:SHOWN],
                    counts[cut[0]],
                    limit,
                    f"; so are {len(cut) - 1} more" if cut[1:] else "",
                )
            ids.append(tokens.to(self._device))
            masks.append(padded.attention_mask.to(self._device))
        encoders = self._parts.text_encoders
        if len(ids) == 1:
            # as the pipeline of Stable Diffusion does; SDXL's never does
            masked = getattr(encoders[0].config, "use_attention_mask", False)
            mask = masks[0] if masked else None
            return Text(encoders[0](ids[0], attention_mask=mask)[0].float())
        outputs = [
            encoder(rows, output_hidden_states=True)
            for encoder, rows in zip(encoders, ids, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Text(hidden.float(), outputs[1].text_embeds.float())


def replacing(spans: list[slice], vectors: Tensor) -> Callable[..., Tensor]:
    """Return a hook that puts vectors [tokens, width] into the places of each prompt."""

    def hook(module: object, inputs: object, output: Tensor) -> Tensor:
        rows = []
        for row, span in zip(output, spans, strict=True):
            rows.append(torch.cat([row[: span.start], vectors.to(row), row[span.stop :]]))
        return torch.stack(rows)

    return hook


def find_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, inside: str, before: str = ""
) -> slice | None:
    """Return the token positions of `text` in the prompt `inside`, None where it has none.

    They may lie beyond what is read. Begin-of-text has 0. before: what stands in the prompt before
    it; the text may be there too.
    """
    whole = tokenizer(inside).input_ids
    part, earlier = (tokenizer(words).input_ids[1:-1] for words in (text, before))
    first = 1 + len(earlier) if whole[1 : 1 + len(earlier)] == earlier else 1
    for start in range(first, len(whole) - len(part)):
        if whole[start : start + len(part)] == part:
            return slice(start, start + len(part))
    return None


def token_span(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    inside: str,
    before: str = "",
    *,
    partly: bool = False,
) -> slice:
    """Return the token positions of `text` in the prompt `inside`, all of which are read.

    Args:
        before: as of find_tokens.
        partly: of a text that is longer than any prompt, return those that are read.

    Raises:
        ValueError: it has none, or not all of them are read.
    """
    span = find_tokens(tokenizer, text, inside, before)
    if span is None:
        raise ValueError(f"{text!r} is not a run of whole tokens in the prompt {inside!r}")
    last = tokenizer.model_max_length - 1  # the last that is read is the end of the text
    if span.stop > last:
        name, prompt = (
            words if len(words) <= 100 else f"{words[:60]} ... {words[-37:]}"
            for words in (text, inside)
        )
        if span.stop - span.start >= last:
            if partly and span.start < last:
                return slice(span.start, last)
            raise ValueError(
                f"{name!r} is a name of {span.stop - span.start} tokens, and the model reads "
                f"{last - 1} of a prompt; shorten it"
            )
        raise ValueError(
            f"{name!r} lies beyond the {last + 1} tokens that the model reads of the prompt "
            f"{prompt!r}; shorten the prompt, or name it earlier"
        )
    return span
