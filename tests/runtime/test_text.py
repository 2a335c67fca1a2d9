import functools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from visistage.graphs.errors import PromptError
from visistage.runtime.text.detokenize import TextStream

WORDS = ["the", "cat", "sat", "stop", "no", "##s", "##ing", "is", ".", ",", "n't", "é", "猫"]


@functools.cache
def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "c"), ("ð", "Ł"), ("Ã", "©"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def sentencepiece(decoder) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁▁", "▁▁▁", "▁the", "the", "▁c", "a", "t", "e", "h", "é", ".", "\ufffd", "s"]
    merges = [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the")]
    pieces += ["th"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def llama() -> Tokenizer:
    """The decoder that LLaVA-1.5 ships."""
    tokenizer = sentencepiece(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    tokenizer = sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


@functools.cache
def word_piece() -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return tokenizer


@functools.cache
def end_of_word() -> Tokenizer:
    vocab = {p: i for i, p in enumerate(["a", "b", "a</w>", "b</w>", ".</w>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


@functools.cache
def no_decoder() -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))


ALL = [byte_level, llama, metaspace, word_piece, end_of_word, no_decoder]


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    return [stream.push(i) for i in ids] + [stream.finish()], stream


@pytest.mark.parametrize("make", ALL)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_pieces_of_any_ids_join_to_the_decoded_whole(make, data):
    tokenizer = make()
    # Two ids beyond the vocabulary stand for the padding rows of an embedding table.
    size = tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 1), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    got, _ = pieces(tokenizer, ids)
    assert "".join(got) == whole


@pytest.mark.parametrize("make", [byte_level, llama, metaspace])
@given(text=st.text(max_size=25))
@example(text="  two leading spaces")
@example(text="👩‍👩‍👧 family, e\u0301 combining, \ufffd itself")
@example(text="the \n\n the")
@settings(max_examples=120, deadline=None)
def test_encoded_unicode_comes_back(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    got, _ = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, llama])
def test_no_piece_is_ever_taken_back_and_characters_stay_whole(make):
    tokenizer = make()
    ids = tokenizer.encode("the 🙂 the 猫 é the", add_special_tokens=False).ids
    got, _ = pieces(tokenizer, ids)
    assert "\ufffd" not in "".join(got)
    assert any("🙂" in piece for piece in got)
    # Streaming, not one lump at the end.
    assert sum(bool(piece) for piece in got) >= 6
    assert got[-1] == ""


def test_leading_space_is_dropped_once_only():
    tokenizer = llama()
    ids = [tokenizer.token_to_id(piece) for piece in ("▁the", "▁the", "▁", "▁the")]
    assert pieces(tokenizer, ids)[0] == ["the", " the", " ", " the", ""]


def test_special_tokens_are_silent_but_ordinary_added_ones_are_not():
    tokenizer = byte_level()
    ids = tokenizer.encode("the<|end|>the<tool>").ids
    assert "".join(pieces(tokenizer, ids)[0]) == "thethe<tool>"


def test_an_unfinished_character_appears_at_the_end_as_decode_shows_it():
    tokenizer = byte_level()
    ids = tokenizer.encode("a🙂").ids[:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    with pytest.raises(RuntimeError, match="finish"):
        stream.push(0)


@pytest.mark.parametrize("make", [byte_level, llama])
def test_work_per_token_does_not_grow_with_the_answer(make):
    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.longest = tokenizer, 0

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def decode(self, ids, **options):
            self.longest = max(self.longest, len(ids))
            return self.tokenizer.decode(ids, **options)

    tokenizer = Counting(make())
    ids = tokenizer.encode("the cat 🙂 " * 200, add_special_tokens=False).ids
    pieces(tokenizer, ids)
    assert 1 < tokenizer.longest < 24


# --- stop strings --------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: walk character by character; the first stop string completed wins."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text("the ca🙂\n", max_size=30),
    stops=st.lists(st.text("the ca🙂\n", min_size=1, max_size=5), min_size=1, max_size=4),
)
@example(text="the cat", stops=["e c", "the cat"])
@example(text="tthe", stops=["the"])
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_the_definition_says(text, stops):
    tokenizer = byte_level()
    got, stream = pieces(tokenizer, tokenizer.encode(text).ids, stops)
    expected, stop = cut(text, stops)
    assert ("".join(got), stream.stop) == (expected, stop)
    assert stream.stopped == (stop is not None)


def test_a_stop_string_across_tokens_never_shows_and_a_false_start_is_released():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, "###")
    assert [stream.push(i) for i in tokenizer.encode("a#b##").ids] == ["a", "", "#b", "", ""]
    assert not stream.stopped
    assert stream.push(tokenizer.encode("#").ids[0]) == ""
    assert stream.stopped
    assert stream.push(tokenizer.encode("z").ids[0]) == ""
    assert stream.finish() == ""


def test_finish_releases_the_beginning_of_a_stop_string():
    tokenizer = byte_level()
    got, stream = pieces(tokenizer, tokenizer.encode("a##").ids, ["###"])
    assert got == ["a", "", "", "##"]
    assert not stream.stopped


def test_a_stop_string_completed_only_by_finish_counts():
    tokenizer = llama()
    # Byte tokens at the very end are held until finish.
    ids = tokenizer.encode("a é🙂", add_special_tokens=False).ids
    got, stream = pieces(tokenizer, ids, ["🙂"])
    assert ("".join(got), stream.stopped) == ("a é", True)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ("", "stop string ''"),
        (["a", ""], "stop string ''"),
        ([3], "stop string 3"),
        (["x" * 1025], "stop string 'xxx"),
        (["x"] * 17, "17 stop strings"),
    ],
)
def test_unusable_stop_strings_are_refused(stops, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        TextStream(byte_level(), stops)
