"""Names of a domain from a local language model: a causal LM of transformers, read from a
directory, never from the network.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from cu_runner.models.component_files import load_weights
from cu_runner.runtime.lazy import torch, transformers
from cu_runner.schema.errors import ModelError

TOKENS_PER_NAME = 12  # of an answer, its number and its line break among them


MARK = re.compile(
    r"(?:\(?\d+\s*[.):]|[-*\u2022\u2013])\s*"
)  # 1. 1) (1) 1: - * and the like, at the start of a line


def find_model(path: str | None) -> str:
    """Return the path if it is a directory. Raise ValueError otherwise."""
    if path is None or not Path(path).expanduser().is_dir():
        raise ValueError(
            f"{path}: no such directory; give the folder of a causal language model "
            "(save_pretrained)"
        )
    return path


@functools.lru_cache(maxsize=1)
def load_language_model(
    path: str, device: str
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Load model and tokenizer of a directory (save_pretrained, safetensors), once per process.

    Raises:
        ValueError: no such directory, no tokenizer, or not a causal language model.
    """
    directory = Path(find_model(path)).expanduser()
    try:
        model = load_weights(transformers.AutoModelForCausalLM, directory)
    except ModelError as error:
        raise ValueError(
            f"{error}; give the folder of a causal language model in safetensors"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # damaged files raise many types
        raise ValueError(
            f"{path}: its tokenizer cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def question(domain: str, targets: list[str], number: int) -> str:
    """Return what the model is asked."""
    listed = ", ".join(targets)
    return (
        f"List {number} different names of a {domain} that are related to {listed}, the closest "
        f"first, but are not {listed}. "
        "Answer with the names alone, one per line, numbered."
    )


def ask(path: str, domain: str, targets: list[str], number: int, device: str = "cpu") -> list[str]:
    """Return at most `number` names by greedy decoding; the same question gets the same answer.

    A model with a chat template gets the question as a message, any other as a text that ends where
    the list begins.

    Raises:
        ValueError: the directory cannot be used, or the answer holds no name.
    """
    model, tokenizer = load_language_model(path, device)
    text = question(domain, targets, number)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokens = tokenizer(f"{text}\n\n1.", return_tensors="pt")
    prompt = tokens["input_ids"].to(device)
    room = (
        getattr(
            model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length
        )
        - prompt.shape[1]
    )
    if room < 1:
        raise ValueError(
            f"{path}: the question of {prompt.shape[1]} tokens does not fit; give a model with a "
            "longer context"
        )
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=min(TOKENS_PER_NAME * number, room),
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
    )
    with torch.no_grad():
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
    start = "" if tokenizer.chat_template else "1."
    names = parse_answer(
        start + tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
    )[:number]
    if not names:
        raise ValueError(
            f"{path}: its answer holds no names; give a model that follows instructions, or names "
            "by list or file"
        )
    return names


def parse_answer(text: str) -> list[str]:
    """Return the names in an answer, in order and without repeats.

    Lines with numbers or bullets count, where there are any, else all lines. Commas separate names
    too. Thoughts before </think>, lines that introduce a list, explanations after a colon, a dash
    or in brackets, quotes and emphasis are dropped; so is what has more than six words or no
    letter.
    """
    lines = [line.strip() for line in text.rpartition("</think>")[2].splitlines()]
    marked = [line[mark.end() :] for line in lines if (mark := MARK.match(line))]
    entries = [
        entry
        for line in marked or lines
        if not line.endswith(":")
        for entry in re.split(r"[,;]", line)
    ]
    names: dict[str, str] = {}
    for entry in entries:
        name = re.sub(r"^(?:and|or)\s+", "", entry.strip())
        name = re.split(r"\s[-\u2013\u2014]\s|:|\(", name)[0]
        name = " ".join(name.split()).strip(" \"'`*_.\u201c\u201d\u2018\u2019")
        if re.search(r"[^\W\d_]", name) and len(name.split()) <= 6:
            names.setdefault(name.lower(), name)
    return list(names.values())
