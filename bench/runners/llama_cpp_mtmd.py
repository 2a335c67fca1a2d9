"""llama.cpp through llama-cpp-python and its multimodal library; in an environment of its own.

What llama.cpp's server does with an image is done here on the library's functions: chunks of text
and images are evaluated in turn, and those that the cache already starts with are kept.
"""

from serving import Stopwatch, serve  # isort: skip  (first: it notes when this process began)

import ctypes
import hashlib

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

BATCH = 2048
"""Rows evaluated at once: more than an image and a question."""

ROWS = 4096


class LlamaCpp:
    """A language model and its vision encoder; ``stored``: weights stay in the file's layout."""

    def __init__(self, model, threads, stored=False):
        if stored:  # the binding has no argument for it
            defaults = llama_cpp.llama_model_default_params()
            defaults.use_extra_bufts = False
            llama_cpp.llama_cpp.llama_model_default_params = lambda: defaults
        self.llama = llama_cpp.Llama(
            f"{model}/language.gguf",
            n_ctx=ROWS,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu = False
        settings.n_threads = threads
        settings.print_timings = False
        self.vision = mtmd.mtmd_init_from_file(
            f"{model}/vision.gguf".encode(), self.llama.model, settings
        )
        if self.vision is None:
            raise RuntimeError("llama.cpp cannot load vision.gguf")
        self.held = []  # (what a chunk is, rows up to its end) of what the cache starts with
        self.about = {"llama-cpp-python": llama_cpp.__version__}

    def ask(self, image, question, text, new):
        """Evaluate what the cache does not start with, then take the likeliest token each time."""
        del question
        watch = Stopwatch()
        chunks = self._chunks(image, text)
        try:
            rows = self._prefill(chunks, hashlib.sha256(image.tobytes()).hexdigest())
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
        self._answer(new, watch)
        return watch.heard(rows)

    def _chunks(self, image, text):
        marked = text.replace("<image>", mtmd.mtmd_default_marker().decode()).encode()
        pixels = np.ascontiguousarray(image)
        height, width, _ = pixels.shape
        buffer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, buffer)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        given = mtmd.mtmd_input_text(marked, len(marked), True, True)
        chunks = mtmd.mtmd_input_chunks_init()
        failed = mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(given), bitmaps, 1)
        mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError(f"mtmd_tokenize failed with {failed}")
        return chunks

    def _prefill(self, chunks, image):
        """Evaluate the prompt; return its rows."""
        memory = llama_cpp.llama_get_memory(self.llama.ctx)
        wanted = [self._chunk(chunks, at, image) for at in range(_size(chunks))]
        same = 0
        while same < min(len(self.held), len(wanted) - 1) and self.held[same][0] == wanted[same][1]:
            same += 1
        rows = self.held[same - 1][1] if same else 0
        llama_cpp.llama_memory_seq_rm(memory, 0, rows, -1)
        self.held = self.held[:same]
        for at, (chunk, name) in enumerate(wanted[same:], start=same):
            end = llama_cpp.llama_pos(rows)  # text is counted on from here
            failed = mtmd.mtmd_helper_eval_chunk_single(
                self.vision,
                self.llama.ctx,
                chunk,
                llama_cpp.llama_pos(rows),
                llama_cpp.llama_seq_id(0),
                BATCH,
                at == len(wanted) - 1,
                ctypes.byref(end),
            )
            if failed:
                raise RuntimeError(f"llama.cpp could not evaluate a chunk: {failed}")
            rows = end.value
            self.held.append((name, rows))
        return rows

    def _chunk(self, chunks, at, image):
        """Return a chunk and its content: token ids, or the hash of the image."""
        chunk = mtmd.mtmd_input_chunks_get(chunks, at)
        count = ctypes.c_size_t(0)
        ids = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return chunk, tuple(ids[: count.value]) if ids else image

    def _answer(self, new, watch):
        vocabulary = self.llama.n_vocab()
        while True:
            logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())
            watch.hear(token)
            if len(watch.tokens) == new:
                return
            one = (llama_cpp.llama_token * 1)(token)
            failed = llama_cpp.llama_decode(self.llama.ctx, llama_cpp.llama_batch_get_one(one, 1))
            if failed:
                raise RuntimeError(f"llama_decode failed with {failed}")


def _size(chunks):
    return mtmd.mtmd_input_chunks_size(chunks)


if __name__ == "__main__":
    serve(LlamaCpp)
