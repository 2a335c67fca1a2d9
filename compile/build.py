"""``make_bundle``, the command ``engines``: a checkpoint becomes a bundle, step by step.

checkpoint ─▶ plan ─▶ ranges (FP16) ─▶ weights ─▶ graphs ─▶ prefix ─▶ text files ─▶ manifest

What compiles a bundle's engines, the command ``build``, is ``compile/engines/engines.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..graphs.bundle import MANIFEST, Bundle, GraphFact, Manifest
from ..graphs.families.family import Size
from ..graphs.precision import NO_FALLBACK, Fp32Fallback
from ..graphs.progress import Progress
from ..graphs.targets import resolve_target
from .build_spec import (
    BuildSpec,
    check_geometry,
    check_memory,
    dummy_routing,
    resolve_build,
    versions,
)
from .checkpoint.checkpoint import open_checkpoint
from .disk import OUT, check_folder
from .export.export import Graph, export
from .export.prefix import describe_prefix, prefix_cache, write_prefix
from .export.static_shapes import variants_of, write_variant
from .export.texts import fits, write_texts
from .export.weights import Placement, bring_files, choose_ways, convert, own_files, place
from .quantize.fp16_ranges import decide, dense_pieces, measure_ranges, read_ranges, write_ranges
from .quantize.quantize import (
    calibrated_cache_scales,
    describe_scales,
    quantised_rows,
    scale_spans,
    write_scales,
)
from .steps import Staging


def make_bundle(
    model: str,
    *,
    plan: str | None = None,
    target: str = "cpu",
    precision: str | None = None,
    out: str | Path = "engines",
    revision: str | None = None,
    offline: bool = False,
    dummy_weights: bool = False,
    image_tokens: int | None = None,
    canvas: Size | None = None,
    contexts: Sequence[int] = (),
    build_memory: int | None = None,
    calibration: str | Path | None = None,
    weights: str = "auto",
    name: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Build the bundle of ``model`` in ``OUT/<model>/<plan>-<precision>-<target>/``.

    A build that is already there is left as it is; one that was interrupted goes on.

    Args:
        model: an alias, a hub id or a directory.
        plan: a preset, ``preset:key=value,...`` or a YAML file; None: the calibration's, or that of
            the model's family.
        target: a name of ``targets.TARGETS``.
        precision: one the target runs, or a recipe (``graphs.quantization``); its default
            otherwise.
        out: folder of all bundles.
        revision: of a hub model.
        offline: use only what was downloaded before.
        dummy_weights: random weights of a published geometry.
        image_tokens: the most of an image, by the image processor's own option: of a larger one it
            makes fewer.
        canvas: height and width that every image is brought to before its processor sees it, so
            that all have as many tokens, in the same places.
        contexts: rows of an unpruned prompt and answer that engines have space for; several
            give several sets of engines. For targets with engines only.
        build_memory: bytes that compiling one engine may take; stages are cut into parts that
            do. For targets with engines only.
        calibration: folder that ``calibrate`` wrote; None: for quantised precisions
            ``calibrations/<model>``, where that is.
        weights: how files of the checkpoint get into the bundle: ``auto``, ``copy`` or ``link``
            (``export.weights``).
        name: of the model here, instead of its folder's.
        progress: called for every step.

    Raises:
        VisistageError: what the user can correct; nothing is under the final name then.
    """
    progress = progress or Progress()
    wanted, precision = resolve_target(target, precision)
    check_geometry(model, wanted, precision)
    check_folder(Path(out), OUT)
    progress.start("open checkpoint", None)
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        offline=offline,
        dummy_weights=dummy_weights,
        routing=dummy_routing(model, plan) if dummy_weights else None,
        image_tokens=image_tokens,
        canvas=canvas,
        progress=progress.advance,
    )
    if name is not None:
        checkpoint = checkpoint.called(name)
    spec = resolve_build(
        checkpoint,
        plan=plan,
        target=wanted,
        precision=precision,
        contexts=contexts,
        build_memory=build_memory,
        calibration=calibration,
    )
    folder = Path(out) / checkpoint.name / spec.name
    staging = Staging(
        folder,
        _inputs(spec),
        progress,
        origin=checkpoint.identity,
        again=f"Give this one another: --name {checkpoint.name}-2",
    )
    if not staging.up_to_date():
        with staging:
            _write(spec, staging, weights)
            staging.finish()
    bundle = Bundle.open(folder)
    if weights == "copy":
        own_files(folder, bundle.manifest.files)
    return bundle


def _write(spec: BuildSpec, work: Staging, how: str) -> None:
    """Run every step of a build, in the folder that becomes the bundle."""
    checkpoint, config, texts, dtype = spec.checkpoint, spec.config, spec.texts, spec.dtype
    folder, advance = work.folder, work.progress.advance
    if spec.calibration is not None:
        spec.calibration.check_fits(fits(checkpoint, texts))  # reads every weight

    def ranges() -> list[str]:
        return write_ranges(measure_ranges(checkpoint, texts, advance), folder)

    fallback = NO_FALLBACK
    if spec.half:
        work.step("ranges", ranges, total=dense_pieces(config))
        fallback = decide(read_ranges(folder))
    graphs, quantised_tensors = spec.graphs(fallback), spec.quantised_tensors(fallback)
    names = [name for graph in graphs for name in graph.weights]
    placement = place(checkpoint, names, dtype, quantised_tensors)
    check_memory(spec.target, spec.precision, placement.nbytes)
    ways = choose_ways(placement, folder, how)
    spans, scales = dict(placement.spans), None
    if spec.calibration is not None and spec.quantization.quantises_cache:
        scales = calibrated_cache_scales(spec.calibration, half=spec.half)
        spans |= scale_spans(config.text, dtype)

    def weights() -> list[str]:
        converted = convert(checkpoint, placement, dtype, folder, advance, quantised_tensors)
        work.outcome = bring_files(placement, folder, ways)
        return [*(file.name for file in placement.linked), *converted]

    def one_graph(graph: Graph) -> list[str]:
        file = f"{graph.name}.onnx"
        export(graph, config.text, folder / file, spans, spec.target)
        copies = _variants(graph, spec)
        for copy, slots in copies.values():
            write_variant(folder / file, folder / copy, slots)
        return [file, *(copy for copy, _ in copies.values())]

    def prefix() -> list[str]:
        cache = prefix_cache(checkpoint, spec.plan, spec.prefix_ids, advance)
        if scales is not None:
            cache = quantised_rows(cache, scales)
        return write_prefix(cache, spec.cache_dtype, folder)

    ranged = {"ranges"}
    work.step("weights", weights, total=placement.new_bytes or None, uses=ranged)
    if scales is not None:
        work.step("cache scales", partial(write_scales, scales, dtype, folder))
    for graph in graphs:
        work.step(f"export {graph.name}", partial(one_graph, graph), uses=ranged)
    if spec.prefix_ids:
        work.step("prefix", prefix, total=config.text.layers)
    work.step("text files", lambda: write_texts(checkpoint, texts, folder))
    work.check_unchanged()
    written = partial(_write_manifest, work, spec, graphs, placement, fallback)
    work.step("manifest", written, uses=work.ran)


def _write_manifest(
    work: Staging,
    spec: BuildSpec,
    graphs: list[Graph],
    placement: Placement,
    fallback: Fp32Fallback,
) -> list[str]:
    """Write the manifest, which names every file and its hash."""
    texts, text = spec.texts, spec.config.text
    prefix = describe_prefix(text, spec.prefix_ids, spec.cache_dtype)
    scales = describe_scales(text, spec.dtype)
    manifest = Manifest(
        model=spec.checkpoint.name,
        config=spec.config,
        plan=spec.plan,
        target=spec.target.name,
        precision=spec.precision,
        dtype=spec.dtype,
        lowering=spec.target.lowering,
        graphs={graph.name: _fact(graph, spec) for graph in graphs},
        embedding=placement.embedding,
        prefix=prefix if spec.prefix_ids else None,
        preprocessing=texts.preprocessing,
        generation=texts.generation,
        text_files=texts.files,
        files=dict(work.files),
        versions=versions(),
        weight_bytes=placement.nbytes,
        source=spec.source,
        contexts=spec.contexts,
        fallback=fallback,
        quantization=spec.quantization,
        cache_scales=scales if spec.quantization.quantises_cache else None,
    )
    (work.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return [MANIFEST]


def _fact(graph: Graph, spec: BuildSpec) -> GraphFact:
    variants = {context: file for context, (file, _) in _variants(graph, spec).items()}
    return GraphFact(f"{graph.name}.onnx", graph.spec.inputs, graph.spec.outputs, variants=variants)


def _variants(graph: Graph, spec: BuildSpec) -> dict[int, tuple[str, int | None]]:
    tokens = spec.config.visual_tokens
    return variants_of(graph, spec.target, spec.plan, tokens, spec.contexts)


def _inputs(spec: BuildSpec) -> Any:
    """Return what a build depends on here: the source, and every file's size and time."""
    files = sorted(path for path in spec.checkpoint.path.iterdir() if path.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return [spec.source, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]
