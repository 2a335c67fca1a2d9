"""A question or a conversation as token ids, with a gap for every image.

    messages ──template──▶ "USER: <image> Why? ASSISTANT:" ──tokenizer, once──▶ ids
                                                                             │ cut at image ids
                                                (1, 3148, 29901) · IMAGE · (3750, 29973, ...)

The ids are those of ``LlavaProcessor.apply_chat_template(..., tokenize=True)``, each run of
repeated image ids taken as one gap. How many rows an image takes does not matter here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...graphs.errors import ModelError, PromptError
from ...graphs.families.family import ImageLayout
from ...graphs.fields import show
from .messages import Message, blocks_of, checked_messages, is_image, texts_of
from .template import ChatTemplate, find_template, read_tokenizer_json

MAX_CHARS = 200_000  # of all texts of one prompt together
MAX_IMAGES = 256
# Role in the manifest -> usual file name. All are optional but the first.
TEXT_FILES = {
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens_map": "special_tokens_map.json",
    "processor_config": "processor_config.json",
    "chat_template": "chat_template.jinja",
    "chat_template_json": "chat_template.json",
}
_IMAGE_TOKENS = ("image_token", "context_image_token")
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_PROBE = "Qx7 probe"


@dataclass(frozen=True)
class Segment:
    """A stretch of token ids, or the place of an image's rows (then ``ids`` is empty)."""

    ids: tuple[int, ...]
    is_image: bool = False


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    Attributes:
        segments: texts and images in their order; no text is empty, no two texts adjoin.
        text: the template's output.
    """

    segments: tuple[Segment, ...]
    text: str

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(segment.is_image for segment in self.segments)

    @property
    def text_tokens(self) -> int:
        """Number of ids, images not counted."""
        return sum(len(segment.ids) for segment in self.segments)


class PromptEncoder:
    """Turns questions and conversations into a ``Prompt``, by the checkpoint's own files.

    Args:
        tokenizer: its truncation and padding are switched off.
        template: jinja source of the chat template.
        special_tokens: ``bos_token``, ``eos_token``, ... by name, as the template may use them.
        image_token: stands for an image in the template's output.
        layout: of an image where none is at hand.
        max_chars: longest prompt, in characters of all its texts.
        vocab: rows of the model's embedding; None: ids are not compared with it.

    Attributes:
        tokenizer: as given.
        image_token_id: None when the tokenizer has no such token (a model without images).

    Raises:
        PromptError: a template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special_tokens: Mapping[str, str] | None = None,
        image_token: str = "<image>",
        layout: ImageLayout | None = None,
        *,
        max_chars: int = MAX_CHARS,
        vocab: int | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special_tokens = dict(special_tokens or {})
        self.tokenizer = tokenizer
        self.image_token, self._layout = image_token, layout
        self.image_token_id: int | None = tokenizer.token_to_id(image_token)
        self._bos = special_tokens.get("bos_token")
        self._unknown = special_tokens.get("unk_token")
        self._max_chars, self._vocab = max_chars, vocab
        # A template may repeat what it is given a few times, and write some lines of its own.
        self._template = ChatTemplate(template, special_tokens, max_chars=4 * max_chars + 100_000)
        self._control = self._control_tokens()
        self._takes_text = self._shows(_PROBE, images=0)
        blocks = [{"type": "text", "text": _PROBE}]
        images = 0 if self.image_token_id is None else 1
        self._takes_blocks = self._shows([{"type": "image"}] * images + blocks, images)
        if not (self._takes_text or self._takes_blocks):
            raise PromptError(
                "the chat template does not show what the user says, given as text or as "
                "[{'type': 'text', 'text': ...}]. Correct chat_template.jinja."
            )

    @classmethod
    def from_files(
        cls,
        folder: str | PathLike[str],
        names: Mapping[str, str] | None = None,
        vocab: int | None = None,
        layout: ImageLayout | None = None,
        image_token_id: int | None = None,
    ) -> "PromptEncoder":
        """Read a checkpoint's or a bundle's tokenizer files.

        Args:
            folder: their place.
            names: role -> file name, roles as in ``TEXT_FILES`` (others are ignored); None takes
                the usual names, where they exist.
            vocab: see the class.
            layout: likewise.
            image_token_id: of the model, where no file names the token.

        Raises:
            ModelError: ``tokenizer.json`` missing or damaged, or another file damaged.
            PromptError: no chat template, or one that cannot be used.
        """
        folder = Path(folder)
        if names is None:
            names = {role: name for role, name in TEXT_FILES.items() if (folder / name).exists()}
        paths = {role: folder / name for role, name in names.items() if role in TEXT_FILES}
        tokenizer = _read_tokenizer(paths.get("tokenizer", folder / TEXT_FILES["tokenizer"]))
        config, specials, processor = (
            read_tokenizer_json(paths[role]) if role in paths else {}
            for role in ("tokenizer_config", "special_tokens_map", "processor_config")
        )
        named = {}
        for name in _NAMED_TOKENS:
            token = _content(config.get(f"{name}_token")) or _content(specials.get(f"{name}_token"))
            if token:
                named[f"{name}_token"] = token
        extra = config.get("extra_special_tokens")
        holders = (config, extra if isinstance(extra, Mapping) else {}, processor)
        tokens = (_content(holder.get(key)) for key in _IMAGE_TOKENS for holder in holders)
        known = None if image_token_id is None else tokenizer.id_to_token(image_token_id)
        image_token = next(filter(None, (*tokens, known)), "<image>")
        template = find_template(paths, config, processor)
        return cls(tokenizer, template, named, image_token, layout, vocab=vocab)

    def encode(
        self,
        prompt: str | Sequence[Message],
        images: int | None = None,
        layouts: Sequence[ImageLayout] = (),
    ) -> Prompt:
        """Render with the chat template, ready for an answer, and tokenise once.

        No text, whatever its role, may contain a control token: the image token, a special token
        (``</s>``), or an added token that the template itself writes (``<|im_start|>``); it would
        end a turn or stand for an image. Hugging Face encodes them as such by default.

        Args:
            prompt: a question, or messages ``{"role": ..., "content": ...}`` with roles system,
                user and assistant, the last one user. Content is text, or a list of
                ``{"type": "text", "text": ...}`` and ``{"type": "image"}`` (other keys of an image
                block are not read).
            images: number of images. They precede a question; in messages it must equal
                the number of image blocks (None does not check).
            layouts: of the images, which may stand between markers; by default that of the class.

        Raises:
            PromptError: empty, too long or malformed; control tokens in a text; image blocks that
                do not match ``images`` or that the template does not show.
        """
        if images is not None and (
            isinstance(images, bool) or not isinstance(images, int) or not 0 <= images <= MAX_IMAGES
        ):
            raise PromptError(f"images is {images!r}; expected a number from 0 to {MAX_IMAGES}.")
        if isinstance(prompt, str):
            blocks: list[dict[str, str]] = [{"type": "image"}] * (images or 0)
            prompt = [{"role": "user", "content": [*blocks, {"type": "text", "text": prompt}]}]
        messages = checked_messages(prompt)
        self._check_texts(messages)
        expected = sum(is_image(block) for message in messages for block in blocks_of(message))
        if expected > MAX_IMAGES or (images is not None and images != expected):
            raise PromptError(
                f"the messages have {expected} image blocks and {images} images were given; "
                f"expected as many, up to {MAX_IMAGES}. Add or remove {{'type': 'image'}} blocks."
            )
        if expected and self.image_token_id is None:
            raise PromptError(
                f"the tokenizer has no image token {self.image_token!r}: this model takes no "
                "images. Ask without one."
            )
        text = self._render(messages)
        question = texts_of(messages[-1])[-1].strip()
        if question not in text:
            raise PromptError(
                "the chat template dropped or changed the question. Correct chat_template.jinja."
            )
        placed = text.count(self.image_token) if expected else 0
        if placed != expected:
            raise PromptError(
                f"the chat template places {placed} of {expected} images. Put image "
                "blocks in user messages only, or correct chat_template.jinja."
            )
        return Prompt(self._split(self._ids(self._with_markers(text, layouts))), text)

    def _with_markers(self, text: str, layouts: Sequence[ImageLayout]) -> str:
        """Return the template's output with the image token once for every run of rows."""
        before, *behind = text.split(self.image_token)
        if not behind:
            return text
        known = iter(layouts)
        for part in behind:
            layout = next(known, self._layout)
            runs = (1,) if layout is None else layout.runs
            before += "".join(run if isinstance(run, str) else self.image_token for run in runs)
            before += part
        return before

    def image_segments(self, layout: ImageLayout) -> tuple[Segment, ...]:
        """Return the segments up to the image of a question with one, whatever is asked.

        A template that puts the question first has others for every question; they do no harm.

        Raises:
            PromptError: the model takes no images.
        """
        segments = self.encode("-", 1, [layout]).segments
        return segments[: 1 + max(at for at, part in enumerate(segments) if part.is_image)]

    def prefix_ids(self) -> tuple[int, ...]:
        """Return the ids before the image of a question with one, the same for every question.

        Compare them with the actual prompt before use: a template may write the date.

        Raises:
            PromptError: the model takes no images.
        """
        # Beginnings of many kinds: where a template puts the text first, nothing of it is constant.
        heads = [
            self.encode(text, images=1).segments[0].ids for text in ("a", "Zu", "7", "猫", "-")
        ]
        return _shared(heads)

    def frame_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and behind a question without an image, the same for all."""
        whole = [
            tuple(id_ for part in self.encode(text, images=0).segments for id_ in part.ids)
            for text in ("a", "Zu", "7", "猫", "-")
        ]
        before, behind = (_shared([ids[::step] for ids in whole]) for step in (1, -1))
        return before, behind[::-1]

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text as it is, without a template.

        Raises:
            PromptError: a control token in it.
        """
        self._check_control(text)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _control_tokens(self) -> dict[int, str]:
        literals = self._template.literals
        control = {
            token_id: token.content
            for token_id, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special or (token.content in literals and not token.content.isspace())
        }
        if self.image_token_id is not None:  # it may be an ordinary token that we alone write
            control[self.image_token_id] = self.image_token
        return control

    def _shows(self, content: Any, images: int) -> bool:
        """Return whether the template renders a user's content of this form as it should."""
        try:
            text = self._template.render([{"role": "user", "content": content}])
        except PromptError:
            return False
        # A template that expects text prints a list as Python writes it.
        printed = "'type'" in text or '"type"' in text
        return _PROBE in text and not printed and text.count(self.image_token) == images

    def _check_texts(self, messages: Sequence[Message]) -> None:
        last = messages[-1]
        if last["role"] != "user":
            raise PromptError(
                f"the last message has the role {last['role']!r}; expected 'user', who is answered."
            )
        if not "".join(texts_of(last)).strip():
            raise PromptError("the prompt is empty. Ask a question.")
        texts = [texts_of(message) for message in messages]
        length = sum(len(text) for group in texts for text in group)
        if length + len(messages) > self._max_chars:
            raise PromptError(
                f"the prompt has {length} characters in {len(messages)} messages; the limit is "
                f"{self._max_chars}. Shorten it."
            )
        for group in texts:
            # Together: a token might be spread over two blocks.
            self._check_control("".join(group))

    def _check_control(self, text: str) -> None:
        found = [token for token in self._control.values() if token in text]
        if not found:
            try:
                ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            except (TypeError, ValueError) as error:  # lone surrogates are no text
                raise PromptError(f"the prompt is not valid Unicode: {error}.") from error
            # Some tokens match after normalisation only. Unknown characters are no offence.
            found = [self._control[i] for i in ids if i in self._control]
            found = [token for token in found if token != self._unknown]
        if found:
            what = "the image token" if found[0] == self.image_token else "the control token"
            raise PromptError(
                f"the prompt contains {what} {found[0]!r} as text, which would be taken as a "
                "command. Remove it, or write it differently; images are passed beside the prompt."
            )

    def _render(self, messages: Sequence[Message]) -> str:
        shaped = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str) and not self._takes_text:
                content = [{"type": "text", "text": content}]
            elif not isinstance(content, str) and not self._takes_blocks:
                # The convention of LLaVA checkpoints whose template knows text only.
                content = "".join(
                    f"{self.image_token}\n" if is_image(block) else block["text"]
                    for block in content
                )
            shaped.append({"role": message["role"], "content": content})
        return self._template.render(shaped)

    def _ids(self, text: str) -> list[int]:
        # As Hugging Face processors do: the tokenizer adds a BOS unless the template wrote one.
        add = self._bos is None or not text.startswith(self._bos)
        with _no_panic():
            ids = self.tokenizer.encode(text, add_special_tokens=add).ids
        beyond = [] if self._vocab is None else [i for i in ids if i >= self._vocab]
        if self._vocab is not None and beyond:
            raise PromptError(
                f"the prompt has the token {show(self.tokenizer.id_to_token(beyond[0]))} with id "
                f"{beyond[0]}, the model's token ids end at {self._vocab - 1}. Write it "
                "differently; the tokenizer and the weights belong to different checkpoints."
            )
        return ids

    def beyond(self, vocab: int) -> list[tuple[int, str]]:
        """Return ids and texts of the tokens that an embedding of ``vocab`` rows lacks."""
        return sorted((i, token) for token, i in self.tokenizer.get_vocab().items() if i >= vocab)

    def _split(self, ids: Iterable[int]) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        run: list[int] = []
        for token_id in ids:
            if token_id != self.image_token_id:
                run.append(token_id)
                continue
            if run:
                segments.append(Segment(tuple(run)))
            segments.append(Segment((), is_image=True))
            run = []
        if run:
            segments.append(Segment(tuple(run)))
        return tuple(segments)


def _shared(many: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the ids that all of ``many`` begin with."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*many, strict=False))
    return tuple(column[0] for column in same)


# --- files ---------------------------------------------------------------------------------


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist. Only fast tokenizers are supported: load the original with "
            "transformers' AutoTokenizer and save_pretrained() it here."
        )
    try:
        with _no_panic():
            tokenizer = Tokenizer.from_file(str(path))
            unknown = _unknown_specials(tokenizer)
            if unknown:
                raise ValueError(f"its post-processor adds {show(unknown[0])}, which it lacks")
            return tokenizer
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is not a tokenizer ({error}). Fetch it again.") from error


def _unknown_specials(tokenizer: Tokenizer) -> list[str]:
    """Return special tokens that a post-processor adds and lacks: the library panics at them."""
    processor = tokenizer.post_processor
    state = {} if processor is None else json.loads(processor.__getstate__())
    return [
        piece["SpecialToken"]["id"]
        for holder in [state, *state.get("processors", ())]
        if holder.get("type") == "TemplateProcessing"
        for piece in [*holder["single"], *holder["pair"]]
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in holder["special_tokens"]
    ]


@contextmanager
def _no_panic() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no ``Exception``, into an error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"tokenizer.json cannot work: {error}. Fetch it again.") from None


def _content(token: Any) -> str | None:
    """Return a token as configs write it: text, or {"content": text, ...}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None
