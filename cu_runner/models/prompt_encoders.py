"""Text encoders with their tokenizers: what pipelines of diffusers make of prompts, in fp32.

Each distinct prompt is encoded once per process.

Shapes: B batch, L tokens, D text width, P pooled text width.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from abc import abstractmethod
from typing import TYPE_CHECKING

from cu_runner.models.encoder_hooks import embedding_layer, projecting_rows, replacing
from cu_runner.models.text import Text, TextPart, TextSource
from cu_runner.runtime.lazy import F, diffusers, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from cu_runner.models.components import Components

logger = logging.getLogger(__name__)

SHOWN = 200  # characters of a prompt that is cut


class PromptEncoder(TextSource):
    """The text encoders of a model, frozen, with the texts that they have made so far.

    A subclass says in _encode() what a pipeline of diffusers makes of their outputs, and in
    _text_parts() which tokenizer each position is of. chunk: prompts that are encoded together.
    """

    chunk = 256

    def __init__(self, parts: Components, device: torch.device) -> None:
        """Take the components of a model, whose text encoders are on the device."""
        self._parts, self._device = parts, device
        self.networks, self.tokenizers = parts.text_encoders, parts.tokenizers
        self.encoded: dict[str, Text] = {}  # of one prompt each, on the CPU
        self.parts = self._text_parts()

    @abstractmethod
    def _text_parts(self) -> tuple[TextPart, ...]:
        """Return the parts of the hidden states, in the order of their positions."""

    @abstractmethod
    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts; told: whether one that is cut is named."""

    @without_gradients
    def __call__(self, prompts: list[str]) -> Text:
        """Return the text of B prompts; each distinct one is encoded once, and kept on the CPU."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.encoded]
        for start in range(0, len(new), self.chunk):
            chunk = new[start : start + self.chunk]
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
        chunks = [prompts[i : i + self.chunk] for i in range(0, len(prompts), self.chunk)]
        return Text.cat([self._encode(chunk, told=False) for chunk in chunks])

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
                part = self._part_of(tokenizer)
                spans = [part.placed(part.span(word, prompt)) for prompt in prompts]
                if any(span.stop - span.start != len(own) for span in spans):
                    raise ValueError(f"{word!r} has not {len(own)} tokens in each prompt")
                layer = embedding_layer(encoder)
                # that of Gemma multiplies what it looks up
                scaled = own * getattr(layer, "embed_scale", 1.0)
                hooks.callback(layer.register_forward_hook(replacing(spans, scaled)).remove)
            return self._encode(prompts, told=False)

    def _part_of(self, tokenizer: PreTrainedTokenizerBase) -> TextPart:
        """Return the part that a tokenizer makes; one makes a pooled text alone, and no part."""
        own = (part for part in self.parts if part.tokenizer is tokenizer)
        return next(own, TextPart(tokenizer, int(tokenizer.model_max_length)))

    def embeddings(self) -> list[Tensor]:
        """Return the token embeddings of each text encoder, [vocabulary, width]."""
        return [embedding_layer(encoder).weight.detach() for encoder in self._parts.text_encoders]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the first positions."""
        return self.parts[0].tokenizer

    def cut(self, prompts: list[str]) -> set[str]:
        """Return the prompts that no encoder of hidden states reads to their end."""
        texts = dict.fromkeys(prompts)
        # a token has a byte at least
        most = max(part.length for part in self.parts)
        long = [text for text in texts if len(text.encode()) > most - 2]
        return {
            text for text in long if all(len(part.row(text)) > part.length for part in self.parts)
        }

    def alike(self, one: str, other: str) -> bool:
        """Tell whether two prompts have the same tokens, as far as they are read."""
        return all(part.read(one) == part.read(other) for part in self.parts)

    def _ids(
        self, part: TextPart, prompts: list[str], told: bool, *, longest: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of prompts and which of them are no padding, both [B, length].

        Args:
            told: name a prompt that is cut.
            longest: tokens of a row before anything is skipped; None: those that are read.
        """
        size = longest or part.length
        padded = part.tokenizer(
            [part.spoken(prompt) for prompt in prompts],
            padding="max_length",
            max_length=size,
            truncation=True,
            return_tensors="pt",
        )
        counts = {prompt: len(part.row(prompt)) for prompt in prompts} if told else {}
        if cut := [prompt for prompt, count in counts.items() if count > part.length]:
            logger.warning(
                "   prompt %r has %d tokens and is cut to the %d that the model reads%s",
                cut[0][:SHOWN],
                counts[cut[0]],
                part.length,
                f"; so are {len(cut) - 1} more" if cut[1:] else "",
            )
        return padded.input_ids.to(self._device), padded.attention_mask.to(self._device)


class ClipText(PromptEncoder):
    """Stable Diffusion 1 and 2, with one text encoder, and SDXL with two."""

    def _text_parts(self) -> tuple[TextPart, ...]:
        first = self._parts.tokenizers[0]
        return (TextPart(first, int(first.model_max_length)),)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts.

        Of one encoder the text is its last hidden states. Of SDXL it is the last but one of both,
        side by side, and the second's projection.
        """
        encoders = self._parts.text_encoders
        rows = []
        for number, tokenizer in enumerate(self._parts.tokenizers):
            part = TextPart(tokenizer, int(tokenizer.model_max_length))
            rows.append(self._ids(part, prompts, told and not number))
        if len(rows) == 1:
            # as the pipeline of Stable Diffusion does; SDXL's never does
            return Text(self._run(*rows[0])[0].float())
        with projecting_rows(encoders[1]):
            outputs = [
                encoder(ids, output_hidden_states=True)
                for encoder, (ids, _) in zip(encoders, rows, strict=True)
            ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Text(hidden.float(), outputs[1].text_embeds.float())

    def _run(self, ids: Tensor, mask: Tensor) -> BaseModelOutputWithPooling:
        """Run the one text encoder on tokens [B, L], which are masked if its configuration says."""
        encoder = self._parts.text_encoders[0]
        masked = getattr(encoder.config, "use_attention_mask", False)
        output: BaseModelOutputWithPooling = encoder(ids, attention_mask=mask if masked else None)
        return output


class SingleText(ClipText):
    """Blocks of Stable Diffusion 3 on one text encoder: its last hidden states, its pooled output.

    diffusers' pipeline cannot encode such a text, and takes it as prompt_embeds and
    pooled_prompt_embeds.
    """

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts."""
        output = self._run(*self._ids(self.parts[0], prompts, told))
        return Text(output.last_hidden_state.float(), output.pooler_output.float())


class JointText(PromptEncoder):
    """Stable Diffusion 3: two of CLIP side by side, then T5's positions; both projections pooled.

    Without T5 its positions are zeros, as in the pipeline.
    """

    T5_TOKENS = 256  # of the pipeline, where model.tokens says nothing else
    chunk = 32

    def _text_parts(self) -> tuple[TextPart, ...]:
        clip, *_ = self._parts.tokenizers
        parts = [TextPart(clip, int(clip.model_max_length))]
        if len(self._parts.tokenizers) == 3:
            length = self._parts.tokens or self.T5_TOKENS
            parts.append(
                TextPart(self._parts.tokenizers[2], length, start=parts[0].length, causal=False)
            )
        return tuple(parts)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts."""
        encoders, length = self._parts.text_encoders, self.parts[0].length
        outputs = []
        for number in range(2):
            part = TextPart(self._parts.tokenizers[number], length)
            ids, _ = self._ids(part, prompts, told and len(self.parts) == 1 and not number)
            with projecting_rows(encoders[number]):
                outputs.append(encoders[number](ids, output_hidden_states=True))
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output[0] for output in outputs], dim=-1)
        if len(self.parts) == 2:
            ids, _ = self._ids(self.parts[1], prompts, told)
            rest = encoders[2](ids)[0]
        else:
            width = int(self._parts.denoiser.config.joint_attention_dim)
            rest = clip.new_zeros(len(prompts), self._parts.tokens or self.T5_TOKENS, width)
        filled = F.pad(clip, (0, rest.shape[-1] - clip.shape[-1]))
        return Text(torch.cat([filled, rest], dim=1).float(), pooled.float())


class FluxText(PromptEncoder):
    """FLUX: T5's positions, and CLIP's pooled output."""

    T5_TOKENS = 512  # of the pipeline
    chunk = 16

    def _text_parts(self) -> tuple[TextPart, ...]:
        length = self._parts.tokens or self.T5_TOKENS
        return (TextPart(self._parts.tokenizers[1], length, causal=False),)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts."""
        clip, t5 = self._parts.text_encoders
        first = self._parts.tokenizers[0]
        ids, _ = self._ids(TextPart(first, int(first.model_max_length)), prompts, False)
        pooled = clip(ids, output_hidden_states=False).pooler_output
        ids, _ = self._ids(self.parts[0], prompts, told)
        return Text(t5(ids)[0].float(), pooled.float())


class MaskedText(PromptEncoder):
    """PixArt: T5's positions and which of them are no padding; prompts in small letters."""

    TOKENS = 300  # of both pipelines
    chunk = 32

    def _text_parts(self) -> tuple[TextPart, ...]:
        length = self._parts.tokens or self.TOKENS
        return (TextPart(self._parts.tokenizers[0], length, lower=True, causal=False),)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts."""
        ids, mask = self._ids(self.parts[0], prompts, told)
        hidden = self._parts.text_encoders[0](ids, attention_mask=mask)[0]
        return Text(hidden.float(), mask=mask)


class PlainT5Text(PromptEncoder):
    """AuraFlow: T5's positions, which are zeros where they are padding."""

    TOKENS = 256  # of the pipeline
    chunk = 32

    def _text_parts(self) -> tuple[TextPart, ...]:
        length = self._parts.tokens or self.TOKENS
        return (TextPart(self._parts.tokenizers[0], length, causal=False),)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts."""
        ids, mask = self._ids(self.parts[0], prompts, told)
        hidden = self._parts.text_encoders[0](ids, attention_mask=mask)[0]
        return Text((hidden * mask[..., None]).float())


class GemmaText(MaskedText):
    """Sana: Gemma's positions behind an instruction, of which the last token alone is kept."""

    def _text_parts(self) -> tuple[TextPart, ...]:
        tokenizer, length = self._parts.tokenizers[0], self._parts.tokens or self.TOKENS
        tokenizer.padding_side = "right"
        before = instruction()
        skipped = len(tokenizer(before).input_ids) - 2
        return (TextPart(tokenizer, length, prefix=before, skipped=skipped, lower=True),)

    def _encode(self, prompts: list[str], told: bool = True) -> Text:
        """Encode prompts; the empty one, which guidance reads, has no instruction."""
        part, encoder = self.parts[0], self._parts.text_encoders[0]
        rows: list[Text | None] = [None] * len(prompts)
        for empty in (True, False):
            places = [i for i, each in enumerate(prompts) if (not part.spoken(each)) == empty]
            if not places:
                continue
            longest = part.length if empty else part.length + part.skipped
            chosen = [prompts[i] for i in places]
            ids, mask = self._ids(part, chosen, told, longest=longest)
            hidden = encoder(ids, attention_mask=mask)[0]
            kept = [0, *range(longest - part.length + 1, longest)]
            text = Text(hidden[:, kept].float(), mask=mask[:, kept])
            for row, place in enumerate(places):
                rows[place] = text[row : row + 1]
        return Text.cat([row for row in rows if row is not None])


def instruction() -> str:
    """Return what Sana's pipeline says before a prompt   (Xie et al. 2024, Sec. 2.3)."""
    parameters = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    return "\n".join(parameters["complex_human_instruction"].default)
