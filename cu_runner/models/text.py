"""Prompts as the UNet reads them: encoded once per process, in fp32.

Shapes: B batch, L tokens, D text width, P pooled text width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import nn, torch
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """Encoded prompts, as the UNet reads them.

    hidden: [B, L, D], at every token position, as the text encoders put it out. Of a
    class-conditional model it is [B], the numbers of classes.
    pooled: [B, P], of SDXL, Stable Diffusion 3 and FLUX.
    mask: [B, L], 1 where the denoiser looks, of PixArt and Sana; None is everywhere.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | list[int]) -> Text:
        return self._each(lambda part: part[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        parts = (self.hidden, self.pooled, self.mask)
        hidden, pooled, mask = (None if part is None else change(part) for part in parts)
        assert hidden is not None
        return Text(hidden, pooled, mask)

    def to(self, device: torch.device | str) -> Text:
        """Return the same on another device."""
        return self._each(lambda part: part.to(device))

    def zeros(self) -> Text:
        """Return zeros of the same shapes, with the same mask."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Text(torch.zeros_like(self.hidden), pooled, self.mask)

    def positions(self) -> Tensor:
        """Return the hidden states at every position that the denoiser looks at, [N, D]."""
        return self.hidden.flatten(0, 1) if self.mask is None else self.hidden[self.mask.bool()]

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """Return the rows of all parts, in order."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        return Text(
            torch.cat([part.hidden for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(masks) if masks else None,
        )


class TextSource(ABC):
    """What makes of prompts what the UNet reads. networks: that it computes with, frozen.

    reads_words: whether a prompt is words in a row, and a Text what an encoder makes of them; else
    it is a name that stands for a number.
    """

    networks: tuple[nn.Module, ...] = ()
    reads_words = True
    parts: tuple[TextPart, ...] = ()  # of the hidden states, in the order of their positions
    tokenizers: tuple[PreTrainedTokenizerBase, ...] = ()

    @abstractmethod
    def __call__(self, prompts: list[str]) -> Text:
        """Return the text of B prompts."""

    @abstractmethod
    def encode_empty(self) -> Text:
        """Return the text of the empty prompt as it is made, also where guidance reads zeros."""

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


@dataclass(frozen=True)
class TextPart:
    """The positions of a text that one tokenizer makes: `length` of them, from `start` on.

    prefix: what is said before every prompt but the empty one. skipped: how many positions after
    the first are left out of a prompt with it. lower: prompts are read in small letters. causal: a
    position knows nothing of those behind it, as of CLIP and Gemma.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    start: int = 0
    prefix: str = ""
    skipped: int = 0
    lower: bool = False
    causal: bool = True

    def spoken(self, prompt: str) -> str:
        """Return what the tokenizer is given for a prompt."""
        plain = prompt.lower().strip() if self.lower else prompt
        return self.prefix + plain if plain else plain

    def tokens(self, words: str) -> list[int]:
        """Return the tokens of words, without those of a prompt's begin and end."""
        plain = words.lower() if self.lower else words
        return list(self.tokenizer(plain, add_special_tokens=False).input_ids)

    def forms(self, words: str) -> Iterator[list[int]]:
        """Yield the tokens of words alone, behind a space, and behind a bracket.

        Words in the midst of a prompt may have other tokens than alone.
        """
        yield self.tokens(words)
        yield self.tokens(f" {words}")
        bracket, behind = self.tokens("("), self.tokens(f"({words}")
        if behind[: len(bracket)] == bracket:
            yield behind[len(bracket) :]

    def row(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, its begin and end among them, however long it is."""
        ids = list(self.tokenizer(self.spoken(prompt)).input_ids)
        return ids[:1] + ids[1 + self.skipped :] if self.skipped and prompt else ids

    def read(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt that are read: of one that is cut, its end too."""
        row = self.row(prompt)
        if len(row) <= self.length:
            return row
        return [*row[: self.length - self.ends], *row[len(row) - self.ends :]]

    def placed(self, span: slice) -> slice:
        """Return positions of find() as those of the encoder, before any are left out."""
        shift = self.skipped if span.start else 0
        return slice(span.start + shift, span.stop + shift)

    @functools.cached_property
    def ends(self) -> bool:
        """Tell whether a token marks the end of a prompt (of Gemma none does)."""
        return self.tokenizer("a").input_ids[-1] != self.tokens("a")[-1]

    @functools.cached_property
    def begin(self) -> int:
        """Return the first position that may be a prompt's own token, behind a token of its begin.

        The last token of a prefix is there, or the first of the prompt, where the two are one.
        """
        return int(self.tokenizer("a").input_ids[0] != self.tokens("a")[0])

    def end(self, prompt: str) -> int:
        """Return the position of a prompt's end, which is the number of those before it."""
        return min(len(self.row(prompt)), self.length) - self.ends

    def of(self, text: Text) -> Text:
        """Return this part of a text."""
        own = slice(self.start, self.start + self.length)
        mask = None if text.mask is None else text.mask[:, own]
        return Text(text.hidden[:, own], text.pooled, mask)

    def find(self, text: str, inside: str, before: str = "") -> slice | None:
        """Return the positions of `text` in the prompt `inside`, from 0 on; None where it has none.

        They may lie beyond what is read. before: what stands in the prompt before it; the text may
        be there too.
        """
        whole, first = self.row(inside), self.begin
        for earlier in self.forms(before.rstrip()) if before else ():
            if whole[self.begin : self.begin + len(earlier)] == earlier:
                first = max(first, self.begin + len(earlier))
        for part in self.forms(text):
            for start in range(first, len(whole) - self.ends - len(part) + 1):
                if whole[start : start + len(part)] == part:
                    return slice(start, start + len(part))
        return None

    def span(self, text: str, inside: str, before: str = "", *, partly: bool = False) -> slice:
        """Return the positions of `text` in the prompt `inside`, all of which are read.

        Args:
            before: as of find().
            partly: of a text that is longer than any prompt, return those that are read.

        Raises:
            ValueError: it has none, or not all of them are read.
        """
        span = self.find(text, inside, before)
        if span is None:
            raise ValueError(f"{text!r} is not a run of whole tokens in the prompt {inside!r}")
        last = self.length - self.ends  # the last that is read is the end of the text
        if span.stop <= last:
            return span
        name, prompt = (
            words if len(words) <= 100 else f"{words[:60]} ... {words[-37:]}"
            for words in (text, inside)
        )
        if span.stop - span.start >= last:
            if partly and span.start < last:
                return slice(span.start, last)
            raise ValueError(
                f"{name!r} is a name of {span.stop - span.start} tokens, and the model reads "
                f"{last - self.begin} of a prompt; shorten it"
            )
        raise ValueError(
            f"{name!r} lies beyond the {self.length} tokens that the model reads of the prompt "
            f"{prompt!r}; shorten the prompt, or name it earlier"
        )
