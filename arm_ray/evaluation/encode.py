"""Prompts to token ids, with or without a chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.tasks import Prompt

Chat = Literal["auto", "on", "off"]


def encode_prompt(tokenizer: Any, prompt: Prompt, chat: Chat, where: object) -> list[int]:
    """Token ids of a prompt, `[length]`.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: What is asked.
        chat: `on`, `off`, or `auto` for on where the tokenizer has a template.
        where: The task, for errors.

    Raises:
        EvaluationError: A chat template is asked for and there is none, or it fails.
    """
    text, has_specials = render_prompt(tokenizer, prompt, chat, where)
    ids: list[int] = tokenizer(text, add_special_tokens=not has_specials, verbose=False)[
        "input_ids"
    ]
    return ids


def render_prompt(tokenizer: Any, prompt: Prompt, chat: Chat, where: object) -> tuple[str, bool]:
    """The prompt as text, and whether its special tokens are in it already."""
    if not uses_chat(tokenizer, chat, where):
        head = f"{prompt.system}\n" if prompt.system else ""
        return head + _plain(prompt) + prompt.prefix, False
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for question, answer in prompt.examples:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    messages.append({"role": "user", "content": prompt.user.strip()})
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates raise what they like
        raise EvaluationError(
            "the chat template does not accept the prompt",
            where=where,
            got=f"{type(error).__name__}: {error}",
            hint="set chat_template: off for the task, or an empty `system` for a template that "
            "knows no system message",
        ) from None
    return text + prompt.prefix, True


def prompt_stops(tokenizer: Any, prompt: Prompt, chat: Chat, where: object) -> tuple[str, ...]:
    """Texts that end a completion of this prompt, beside those of the task.

    Only a prompt without a chat template has some: a chat model ends its turn.
    """
    return () if uses_chat(tokenizer, chat, where) else prompt.stop


def _plain(prompt: Prompt) -> str:
    """Examples and question as text."""
    if prompt.labelled:
        # The layout, with its empty lines, of the Qwen2.5-Math toolkit's prompts for base models.
        shots = (f"Question: {question}\nAnswer: {answer}" for question, answer in prompt.examples)
        return "\n\n\n".join([*shots, f"Question: {prompt.user}\nAnswer:"])
    # A template that ends in a space or a new line is gone on from directly.
    shots = (
        f"{question}{answer}\n\n" if question[-1:].isspace() else f"{question}\n{answer}\n\n"
        for question, answer in prompt.examples
    )
    return "".join(shots) + prompt.user


def uses_chat(tokenizer: Any, chat: Chat, where: object) -> bool:
    """Whether a prompt goes through the chat template.

    Raises:
        EvaluationError: It is asked for, and the tokenizer has none.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat == "on" and not has_template:
        raise EvaluationError(
            "the task asks for a chat template, and the model's tokenizer has none",
            where=where,
            got=f"no chat_template in {getattr(tokenizer, 'name_or_path', 'the tokenizer')}",
            expected="a tokenizer with a chat template",
            hint="name another tokenizer, or set chat_template: off for the task",
        )
    return has_template and chat != "off"


def encode_sample(tokenizer: Any, row: Mapping[str, Any], where: object) -> tuple[list[int], int]:
    """Token ids of a held-out sample, and the first position whose token counts.

    Of `prompt` and `completion` only the completion counts, and of `messages` the last one, if it
    is the assistant's; of `text` everything but its first token.
    """
    if row.get("messages"):
        messages = list(row["messages"])
        uses_chat(tokenizer, "on", where)
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        head = (
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            if len(messages) > 1 and messages[-1].get("role") == "assistant"
            else ""
        )
        ids = tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"]
        if not head or not full.startswith(head):
            return ids, 1
        return ids, len(tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"])
    if row.get("text"):
        return tokenizer(str(row["text"]), verbose=False)["input_ids"], 1
    prompt, completion = str(row.get("prompt", "")), str(row["completion"])
    head_ids = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    end = tokenizer.eos_token
    if end and not completion.endswith(end):
        completion += end
    tail = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    return head_ids + tail, max(1, len(head_ids))


def prompt_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 of token ids, the first 16 hex digits."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()[:16]


def completion_seed(seed: int, problem: str, repeat: int) -> int:
    """The seed of one completion: the same for every model, another for every problem and repeat.

    63 bits of SHA-256, so that it depends on nothing but these three.
    """
    digest = hashlib.sha256(f"{seed}/{problem}/{repeat}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
