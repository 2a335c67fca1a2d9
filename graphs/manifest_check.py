"""Checks of a manifest against itself: its config, plan and target say what the rest must be.

Types are checked when it is read. Here every contract is derived again, every tensor placed in its
file and every name found in ``files``, so that what is loaded later cannot contradict it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from .bundle_contract import graph_specs
from .caches import SLOT_STEP
from .contract import ANY_CONTEXT
from .dtypes import DTYPES
from .errors import BundleError
from .fields import Words, check_word, reject
from .inside import is_plain
from .parts import StagePart, stage_parts
from .quantization import base_of
from .targets import TARGETS

if TYPE_CHECKING:
    from .bundle import GraphFact, Manifest, TensorRef

TABLES = ("float32", "float16", "bfloat16")
"""Types that an embedding may be stored in."""

MOST_SHIFT = 32
_SHA256_CHARS = 64


def check_manifest(manifest: Manifest, where: str, remedy: str) -> None:
    """Make sure that every field is what the others demand; ``where`` names the file in errors.

    Raises:
        BundleError: naming the first field that is not.
    """
    _Check(manifest, where, remedy).run()


class _Check:
    def __init__(self, manifest: Manifest, where: str, remedy: str):
        self.manifest, self.where, self.remedy = manifest, where, remedy

    def run(self) -> None:
        manifest = self.manifest
        self._files()
        self._word("target", manifest.target, TARGETS)
        self.target = TARGETS[manifest.target]
        self._word("precision", base_of(manifest.precision), self.target.precisions)
        self._equal("dtype", manifest.dtype, self.target.dtype(manifest.precision))
        self._equal("lowering", manifest.lowering, self.target.lowering)
        self._equal("plan.layers", manifest.plan.layers, manifest.config.text.layers)
        tokens = manifest.config.visual_tokens
        self._equal("plan.visual_tokens", manifest.plan.visual_tokens, tokens)
        self._least("weight_bytes", manifest.weight_bytes, 0)
        self._fallback()
        self._contexts()
        self._graphs()
        self._tensors()

    def _files(self) -> None:
        for name, fact in self.manifest.files.items():
            if not is_plain(name):
                self._reject("files", name, "plain names: no file lies outside the bundle")
            self._least(f"files.{name}.nbytes", fact.nbytes, 0)
            if len(fact.sha256) != _SHA256_CHARS or not set(fact.sha256) <= set("0123456789abcdef"):
                self._reject(f"files.{name}.sha256", fact.sha256, "64 hexadecimal digits")
        for at, name in used_files(self.manifest):
            if not is_plain(name):
                self._reject(at, name, "a plain name: no file lies outside the bundle")
        if "tokenizer" not in self.manifest.text_files:
            self._reject("text_files.tokenizer", Words("nothing"), "the tokenizer's file")

    def _fallback(self) -> None:
        fallback, layers = self.manifest.fallback, self.manifest.config.text.layers
        for kind in ("attention_shift", "mlp_shift"):
            for layer, shift in getattr(fallback, kind).items():
                if not (0 <= layer < layers and 0 <= shift <= MOST_SHIFT):
                    expected = f"exponents up to {MOST_SHIFT} of layers below {layers}"
                    self._reject(f"widening.{kind}.{layer}", shift, expected)

    def _contexts(self) -> None:
        contexts, config = self.manifest.contexts, self.manifest.config
        least, most = config.visual_tokens + SLOT_STEP, config.text.max_positions
        fits = all(least <= context <= most for context in contexts)
        if not fits or bool(contexts) != self.target.engines or sorted({*contexts}) != [*contexts]:
            expected = f"lengths from {least} to {most}, ascending" if self.target.engines else "[]"
            self._reject("contexts", list(contexts), expected)

    def _graphs(self) -> None:
        manifest = self.manifest
        cache = manifest.quantization.cache
        specs = graph_specs(
            manifest.config,
            manifest.plan,
            manifest.dtype,
            self._parts(),
            self.target.returns_new_rows(cache),
            manifest.fallback,
            cache,
            steps=bool(manifest.quantization.decode),
        )
        self._equal("graphs", list(manifest.graphs), list(specs))
        files = [file for fact in manifest.graphs.values() for file in _onnx_files(fact)]
        wrong = [file for file in files if not file.endswith(".onnx") or files.count(file) > 1]
        if wrong:
            self._reject("graphs", wrong[0], "a file NAME.onnx for each graph alone")
        for name, spec in specs.items():
            fact = manifest.graphs[name]
            for side in ("inputs", "outputs"):
                found, wanted = getattr(fact, side), getattr(spec, side)
                self._equal(f"graphs.{name}.{side}", *_first_difference(found, wanted))
            sizes = manifest.contexts if spec.follows_context else (ANY_CONTEXT,)
            sizes = sizes if self.target.static_slots else ()
            self._equal(f"graphs.{name}.variants", tuple(fact.variants), sizes)

    def _parts(self) -> list[StagePart]:
        """Return the layers of each stage's graphs: as many as it takes caches of."""
        parts = []
        for index, stage in enumerate(self.manifest.plan.stages):
            counts: list[int] = []
            left = len(stage.attention_layers)
            for name in self.manifest.parts_of(index):
                inputs = self.manifest.graphs[name].inputs
                counts.append(sum(tensor.name.startswith("key.") for tensor in inputs))
                left -= counts[-1]
                if not counts[-1] or left < 0:
                    found = Words(f"{counts[-1]} caches")
                    self._reject(f"graphs.{name}.inputs", found, "its layers'")
            if left:
                found = Words(f"graphs without {left} of its caches")
                self._reject(f"graphs: stage {index}", found, "graphs of all its layers")
            parts += stage_parts(self.manifest.plan, index, counts)
        return parts

    def _tensors(self) -> None:
        manifest, text = self.manifest, self.manifest.config.text
        self._placed("embedding", manifest.embedding, (text.vocab, text.hidden), *TABLES)
        if manifest.prefix is not None:
            ids = manifest.prefix.ids
            if not ids or not all(0 <= id_ < text.vocab for id_ in ids):
                self._reject("prefix.ids", list(ids), f"token ids below {text.vocab}")
            shape = (text.layers, text.kv_heads, len(ids), text.head_dim)
            for name in ("keys", "values"):
                ref = getattr(manifest.prefix, name)
                self._placed(f"prefix.{name}", ref, shape, manifest.cache_dtype)
        scales = manifest.cache_scales
        if (scales is not None) != manifest.quantization.quantises_cache:
            self._reject("cache_scales", scales, "scales of an INT8 cache, and of no other")
        if scales is not None:
            of_heads = (2, text.layers, text.kv_heads)
            self._placed("cache_scales", scales, of_heads, manifest.dtype)

    def _placed(self, at: str, ref: TensorRef, shape: tuple[int, ...], *dtypes: str) -> None:
        """Check the type and shape of a stored tensor, and that it lies within its file."""
        self._word(f"{at}.dtype", ref.dtype, dtypes)
        self._equal(f"{at}.shape", ref.shape, shape)
        self._least(f"{at}.offset", ref.offset, 0)
        end = ref.offset + math.prod(shape) * int(DTYPES[ref.dtype].nbytes)
        fact = self.manifest.files.get(ref.file)
        if fact is not None and end > fact.nbytes:
            self._reject(f"{at}.offset", ref.offset, f"room for it in {ref.file}")

    def _word(self, at: str, found: Any, known: Any) -> None:
        check_word(f"{self.where}: {at}", found, tuple(known), BundleError, self.remedy)

    def _equal(self, at: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            self._reject(at, found, str(wanted))

    def _least(self, at: str, found: int, least: int) -> None:
        if found < least:
            self._reject(at, found, f"{least} or more")

    def _reject(self, at: str, found: Any, expected: str) -> NoReturn:
        reject(f"{self.where}: {at}", found, expected, BundleError, self.remedy)


def used_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the field and the name of every file that a manifest uses."""
    for name, fact in manifest.graphs.items():
        for file in _onnx_files(fact):
            yield f"graphs.{name}", file
    for role, file in manifest.text_files.items():
        yield f"text_files.{role}", file
    yield "embedding.file", manifest.embedding.file
    if manifest.prefix is not None:
        yield "prefix.keys.file", manifest.prefix.keys.file
        yield "prefix.values.file", manifest.prefix.values.file
    if manifest.cache_scales is not None:
        yield "cache_scales.file", manifest.cache_scales.file


def _onnx_files(fact: GraphFact) -> tuple[str, ...]:
    return (fact.file, *fact.variants.values())


def _first_difference(found: tuple, wanted: tuple) -> tuple[Any, Any]:
    """Return the first two tensors that differ, else how many there are of each."""
    pairs = zip(found, wanted, strict=False)
    counts = Words(f"{len(found)} tensors"), Words(f"{len(wanted)} tensors")
    return next((pair for pair in pairs if pair[0] != pair[1]), counts)
