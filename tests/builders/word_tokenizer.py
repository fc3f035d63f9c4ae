"""A tiny tokenizer for the calibration tests."""

from __future__ import annotations

from pathlib import Path

WORDS = ["<unk>", "<bos>", "<eos>", "<u>", "<a>", *[f"w{number}" for number in range(3000)]]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.name is defined %}{{ raise_exception('name') }}{% endif %}"
    "{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }} {% endfor %}<eos>"
)


def save_tokenizer(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """Saves a tokenizer of one token a word that puts <bos> first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory
