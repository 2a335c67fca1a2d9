"""``build``: a checkpoint becomes a bundle, step by step.

checkpoint ─▶ plan ─▶ weights ─▶ ranges (FP16) ─▶ graphs ─▶ prefix ─▶ text files ─▶ manifest
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import onnx_ir
import psutil
import torch

from .. import __version__
from ..graphs.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    FileFact,
    GraphFact,
    Manifest,
    sha256,
)
from ..graphs.config import ModelConfig
from ..graphs.contract import Part
from ..graphs.errors import CapacityError
from ..graphs.plan import StagePlan
from ..graphs.precision import NARROW, Widening
from ..graphs.targets import DTYPES, Target, resolve_target
from ..runtime.preprocessing import Preprocessing
from .checkpoint import Checkpoint, open_checkpoint
from .engines import resolve_contexts, resolve_parts, variants_of, write_variant
from .export import Graph, export, graphs_of
from .names import tensor_shapes
from .planfile import resolve_plan
from .prefix import describe_prefix, prefix_cache, write_prefix
from .ranges import decide, measure, pieces, read_ranges, write_ranges
from .recipes import GEOMETRIES
from .steps import Reporter, Silent, Workshop
from .stitch import TORCH_DTYPES
from .texts import TextFacts, prompt_encoder, text_facts, write_texts
from .weights import Placement, check_disk, convert, link_files, place

DEFAULT_PLAN = "visipruner"


def build(
    model: str,
    *,
    plan: str = DEFAULT_PLAN,
    target: str = "cpu",
    precision: str | None = None,
    out: str | Path = "engines",
    revision: str | None = None,
    offline: bool = False,
    dummy_weights: bool = False,
    contexts: Sequence[int] = (),
    build_memory: int | None = None,
    reporter: Reporter | None = None,
) -> Bundle:
    """Build the bundle of ``model`` in ``OUT/<model>/<plan>-<precision>-<target>/``.

    A build that is already there is left as it is; one that was interrupted goes on.

    Args:
        model: an alias, a hub id or a directory.
        plan: a preset, ``preset:key=value,...`` or a YAML file.
        target: a name of ``targets.TARGETS``.
        precision: one the target runs; its default otherwise.
        out: folder of all bundles.
        revision: of a hub model.
        offline: use only what was downloaded before.
        dummy_weights: random weights of a published geometry.
        contexts: rows of an unpruned prompt and answer that engines shall have room for; several
            give several sets of engines. For targets with engines only.
        build_memory: bytes that compiling one engine may take; stages are cut into parts that
            do. For targets with engines only.
        reporter: told of every step.

    Raises:
        VisistageError: whatever the user can mend, before anything is written under the final name.
    """
    reporter = reporter or Silent()
    wanted, precision = resolve_target(target, precision)
    if model in GEOMETRIES:  # known before gigabytes are fetched or made
        _check_memory(wanted, precision, _geometry_bytes(model, precision))
    reporter.start("open checkpoint", None)
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        offline=offline,
        dummy_weights=dummy_weights,
        progress=reporter.advance,
    )
    config = checkpoint.config
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    texts = text_facts(checkpoint)
    dtype = DTYPES[precision]
    contexts = resolve_contexts(wanted, config, contexts)
    parts = resolve_parts(wanted, config, staged, dtype, build_memory)
    graphs = graphs_of(config, staged, dtype, wanted.lowering, parts)  # as names of weights go
    placement = place(checkpoint, [name for graph in graphs for name in graph.weights], dtype)
    _check_memory(wanted, precision, placement.nbytes)

    folder = Path(out) / checkpoint.name / f"{staged.name}-{precision}-{wanted.name}"
    source = _source(checkpoint, staged, wanted, precision, contexts, parts)
    workshop = Workshop(folder, _key(source, checkpoint), reporter)
    if workshop.up_to_date() and not Bundle.open(folder).changed():
        return Bundle.open(folder)
    with workshop as work:
        check_disk(placement, work.folder)
        tell = work.reporter.advance

        def ranges() -> list[str]:
            encoder = prompt_encoder(checkpoint)
            preprocessing = Preprocessing.from_dict(texts.preprocessing)
            return write_ranges(measure(checkpoint, encoder, preprocessing, tell), work.folder)

        def weights() -> list[str]:
            converted = convert(checkpoint, placement, dtype, work.folder, tell)
            return [*link_files(placement, work.folder), *converted]

        def one_graph(graph: Graph) -> list[str]:
            file = f"{graph.name}.onnx"
            export(graph, config.text, work.folder / file, placement.spans, wanted)
            copies = variants_of(graph, wanted, staged, config.visual_tokens, contexts)
            for copy, slots in copies.values():
                write_variant(work.folder / file, work.folder / copy, slots)
            return [file, *(copy for copy, _ in copies.values())]

        def prefix() -> list[str]:
            cache = prefix_cache(checkpoint, texts.prefix_ids, tell)
            return write_prefix(cache, dtype, work.folder)

        work.step("weights", weights, total=placement.new_bytes or None)
        widening = NARROW
        if precision == "fp16":
            work.step("ranges", ranges, total=pieces(config))
            widening = decide(read_ranges(work.folder))
            graphs = graphs_of(config, staged, dtype, wanted.lowering, parts, widening)
        for graph in graphs:
            work.step(f"export {graph.name}", partial(one_graph, graph))
        if texts.prefix_ids:
            work.step("prefix", prefix, total=config.text.layers)
        work.step("text files", lambda: write_texts(checkpoint, work.folder))
        work.step(
            "manifest",
            lambda: _write_manifest(
                work,
                checkpoint,
                staged,
                wanted,
                precision,
                graphs,
                placement,
                texts,
                source,
                contexts,
                widening,
            ),
        )
        work.finish()
    return Bundle.open(folder)


def _write_manifest(
    work: Workshop,
    checkpoint: Checkpoint,
    plan: StagePlan,
    target: Target,
    precision: str,
    graphs: list[Graph],
    placement: Placement,
    texts: TextFacts,
    source: str,
    contexts: tuple[int, ...],
    widening: Widening,
) -> list[str]:
    """Hash every file and write the manifest that names them."""
    names = [name for fact in work.facts for name in fact.files]
    facts = {}
    for name in names:
        file = work.folder / name
        facts[name] = FileFact(file.stat().st_size, sha256(file))
    manifest = Manifest(
        model=checkpoint.name,
        config=checkpoint.config,
        plan=plan,
        target=target.name,
        precision=precision,
        lowering=target.lowering,
        graphs={graph.name: _fact(graph, target, plan, checkpoint, contexts) for graph in graphs},
        embedding=placement.embedding,
        prefix=describe_prefix(checkpoint.config.text, texts.prefix_ids, DTYPES[precision])
        if texts.prefix_ids
        else None,
        preprocessing=texts.preprocessing,
        generation=texts.generation,
        text_files=texts.files,
        files=facts,
        versions=versions(),
        weight_bytes=placement.nbytes,
        source=source,
        contexts=contexts,
        widening=widening,
    )
    (work.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return [MANIFEST]


def _fact(
    graph: Graph,
    target: Target,
    plan: StagePlan,
    checkpoint: Checkpoint,
    contexts: tuple[int, ...],
) -> GraphFact:
    copies = variants_of(graph, target, plan, checkpoint.config.visual_tokens, contexts)
    variants = {context: file for context, (file, _) in copies.items()}
    return GraphFact(f"{graph.name}.onnx", graph.spec, variants)


def versions() -> dict[str, str]:
    """What built a bundle."""
    return {
        "visistage": __version__,
        "torch": torch.__version__.split("+")[0],
        "onnx_ir": onnx_ir.__version__,
        "transformers": metadata.version("transformers"),
    }


def _source(
    checkpoint: Checkpoint,
    plan: StagePlan,
    target: Target,
    precision: str,
    contexts: tuple[int, ...],
    parts: Sequence[Part] | None,
) -> str:
    """Hash of what the bundle is made from, the same on every machine."""
    facts = [
        FORMAT,
        checkpoint.config.to_dict(),
        plan.to_dict(),
        target.name,
        target.lowering,
        precision,
        versions(),
        contexts,
        [part.layers for part in parts or ()],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _key(source: str, checkpoint: Checkpoint) -> str:
    """What tells one build from another here: the source, and whether any input file changed."""
    stamps = []
    for file in sorted(path for path in checkpoint.path.iterdir() if path.is_file()):
        status = file.stat()
        stamps.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([source, stamps]).encode()).hexdigest()


def _geometry_bytes(model: str, precision: str) -> int:
    """Bytes of a published geometry's weights in one precision."""
    config = ModelConfig.from_hf(GEOMETRIES[model].config)
    values = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    return values * TORCH_DTYPES[DTYPES[precision]].itemsize


def _check_memory(target: Target, precision: str, nbytes: int) -> None:
    """Refuse weights that the machine cannot hold, where it is the one that shall run them."""
    memory = psutil.virtual_memory().total
    if target.local and nbytes > memory:
        raise CapacityError(
            f"in {precision} the weights take {nbytes / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB of memory, so target '{target.name}' cannot run them here. "
            "Export FP16 graphs for a GPU instead (TARGET=cuda), or take a smaller model; "
            "PRECISION=int8, which would fit, comes with a later version"
        )
