"""The demo's tokenizer: byte-level BPE over the demo's own wording; any UTF-8 text has tokens."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..heldout import PROMPT
from ..questions import ANSWERS, KINDS, ask
from ..scenes import make_scene

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% else %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Train the tokenizer on a few thousand of the demo's questions; the same on every run.

    Other worlds use it as it is: their numbers and words are spelled in several tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(3000), trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def _corpus(scenes: int):
    rng = random.Random("tokenizer")
    for _ in range(scenes):
        scene = make_scene(rng)
        for kind in KINDS:
            if question := ask(scene, kind, rng):
                yield PROMPT.format(question=question.text).replace("<image>", "")
    for answer in ANSWERS * 40:
        yield f" {answer}"
