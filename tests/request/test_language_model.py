"""Names from a language model: answers as models write them, a tiny real GPT-2, bad directories."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cu_runner.regularizers.gradproj import GradProj
from cu_runner.request.language_model import ask, load_language_model, parse_answer, question
from cu_runner.request.name_sources import NameSource, kept_names


# ------------------------------------------------------------------------------------------ answers
@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("1. Monet\n2. Van Gogh\n3. Pop Art", ["Monet", "Van Gogh", "Pop Art"]),
        ("1) Monet\n 2) Van Gogh\n(3) Pop Art", ["Monet", "Van Gogh", "Pop Art"]),
        ("- Monet\n* Van Gogh\n\u2022 Pop Art", ["Monet", "Van Gogh", "Pop Art"]),
        ("Monet, Van Gogh, and Pop Art.", ["Monet", "Van Gogh", "Pop Art"]),
        ("1. Monet, Van Gogh; Pop Art", ["Monet", "Van Gogh", "Pop Art"]),
        ("Monet\nVan  Gogh\n\nPop Art\n", ["Monet", "Van Gogh", "Pop Art"]),
        (
            (
                "Sure, here are some names:\n\n1. **Monet**\n2. *Van Gogh*\n\nI hope this "
                "helps, ask for more!"
            ),
            ["Monet", "Van Gogh"],
        ),
        (
            '1. "Monet" - painter of light\n2. \u201cVan Gogh\u201d: swirls\n3. Pop Art (1950s)',
            ["Monet", "Van Gogh", "Pop Art"],
        ),
        ("1. Monet\n2. monet\n3. MONET\n4. Van Gogh", ["Monet", "Van Gogh"]),
        ("<think>1. Dada, perhaps</think>\n1. Monet", ["Monet"]),
        (
            (
                "1. art d\u00e9co\n2. \u65e5\u672c\u753b\n3. Arts/Crafts\n4. Children's "
                "drawing\n5. Post-Impressionism"
            ),
            [
                "art d\u00e9co",
                "\u65e5\u672c\u753b",
                "Arts/Crafts",
                "Children's drawing",
                "Post-Impressionism",
            ],
        ),
        (
            "1. 3\n2. !!\n3. \n4. a very long sentence that is not a name at all\n5. Monet",
            ["Monet"],
        ),
        ("", []),
        ("1.\n2.\n3.", []),
    ],
)
def test_parse_answer(answer, names):
    assert parse_answer(answer) == names


def test_the_question_names_domain_targets_and_number():
    text = question("style", ["torch light", "plum"], 12)
    assert text.startswith(
        "List 12 different names of a style that are related to torch light, plum,"
    )


# --------------------------------------------------------------------------------------- tiny GPT-2
@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """Returns make(answer, chat) -> directory of a one-layer GPT-2 that was trained to continue the
    question with the answer.
    """

    def make(answer: str, chat: bool = False) -> str:
        directory = tmp_path_factory.mktemp("gpt2")
        asked = question("style", ["torch light"], 4)
        texts = [f"{asked}\n\n1.{answer}<|end|>", f"{asked}\nassistant:1.{answer}<|end|>"][chat:][
            :1
        ]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=["<|end|>"],
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
        if chat:
            fast.chat_template = (
                "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '\n' "
                "}}assistant:"
            )
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(fast),
            n_positions=192,
            n_embd=32,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = GPT2LMHeadModel(config)
        optimizer, tokens = (
            torch.optim.Adam(model.parameters(), lr=1e-2),
            fast(texts, return_tensors="pt").input_ids,
        )
        for _ in range(80):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        model.save_pretrained(directory)
        fast.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="module")
def good(answering):
    return answering(' cinder\n2. torch light\n3. fog bank\n4. Ice "pillar"\n5. magma')


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_is_asked_and_answers_the_same_every_time(answering, chat):
    path = answering(" cinder\n2. magma\n3. art d\u00e9co", chat)
    first = ask(path, "style", ["torch light"], 4)
    assert first == ["cinder", "magma", "art d\u00e9co"]
    torch.manual_seed(99)
    load_language_model.cache_clear()
    assert ask(path, "style", ["torch light"], 4) == first


def test_targets_and_retained_names_in_the_answer_are_banned(good, make_scope):
    scope = make_scope()
    assert ask(good, "style", ["torch light"], 4) == [
        "cinder",
        "torch light",
        "fog bank",
        'Ice "pillar',
    ]
    assert kept_names(scope, NameSource("llm", good, number=4)) == ["cinder", 'Ice "pillar']
    assert kept_names(scope, NameSource("llm", good, number=4, retained=True)) == [
        "cinder",
        "fog bank",
        'Ice "pillar',
    ]
    record = GradProj(auxiliary=NameSource("llm", good, number=4), threshold=1.0).begin_request(
        scope, None
    )
    assert sorted(record["auxiliary"]) == ['Ice "pillar', "cinder"]


def test_the_model_is_loaded_once(good):
    load_language_model.cache_clear()
    for _ in range(3):
        ask(good, "style", ["torch light"], 2)
    assert load_language_model.cache_info().misses == 1
    assert load_language_model.cache_info().hits == 2


# -------------------------------------------------------------------------------------- bad folders
def refused(path: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_language_model(path, "cpu")
    assert "\n" not in str(caught.value)


def test_directories_that_cannot_be_used_are_refused(good, tmp_path):
    refused(None, r"None: no such directory; give the folder")
    refused(str(tmp_path / "gone"), r".*gone: no such directory")
    refused("gpt2", r"gpt2: no such directory")
    refused(str(tmp_path), r".*cannot be loaded as AutoModelForCausalLM")
    other = tmp_path / "t5"
    config = T5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(other)
    refused(str(other), r".*t5: cannot be loaded as AutoModelForCausalLM")
    pickled = tmp_path / "pickled"
    model, tokenizer = load_language_model(good, "cpu")
    pickled.mkdir()
    model.config.save_pretrained(pickled)
    tokenizer.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    refused(str(pickled), r".*pickled: cannot be loaded as AutoModelForCausalLM")


def test_an_answer_without_names_and_a_short_context_are_refused(answering):
    path = answering(" 7\n2. 8\n3. 9")
    with pytest.raises(
        ValueError, match=r"its answer holds no names; give a model that follows instructions"
    ):
        ask(path, "style", ["torch light"], 4)
    with pytest.raises(
        ValueError,
        match=r"the question of \d+ tokens does not fit; give a model with a longer context",
    ):
        ask(path, "style", ["torch light"] * 60, 4)
