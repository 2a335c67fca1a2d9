"""Child process that compiles one engine: a crash of the compiler ends nothing else.

It is started by ``worker_process`` and reads its job, JSON, from stdin. It answers on stdout, one
JSON object a line: ``{"step": n}`` while it runs, in the end ``{"facts": {...}}`` or
``{"error": "..."}``. Messages of the compiler go to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from ...graphs.errors import EngineError, VisistageError
from ...graphs.files import write_file
from ...runtime.device.tensorrt import TensorRtVariant, find_trt_variant

UNUSED = "Unused Input"
"""Message about an input that the parser does not know: it builds, and computes wrong numbers."""

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read a job from stdin, compile it, answer on stdout."""
    _die_with_parent()
    answers = sys.stdout
    sys.stdout = sys.stderr  # anything printed from here on belongs in the log
    job = json.load(sys.stdin)
    try:
        trt_variant = find_trt_variant(job["backend"])
        if trt_variant is None:
            raise EngineError(f"{job['backend']} cannot be loaded")
        _answer(answers, {"facts": compile_engine(trt_variant, job, answers)})
    except VisistageError as error:
        _answer(answers, {"error": str(error)})


def compile_engine(
    trt_variant: TensorRtVariant, job: dict[str, Any], answers: TextIO
) -> dict[str, Any]:
    """Parse, check, compile and write one engine; return what ``EngineFact`` holds of it.

    ``job``: backend, source, output, inputs and outputs (name to dtype), profiles, capabilities,
    and timing_cache (a file, or None).

    Raises:
        EngineError: the parser or the compiler refuses the graph.
    """
    trt = trt_variant.module
    logger = _logger(trt_variant)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, job)
    facts = network_facts(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # RTX: else it may allocate in a run,
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # and no run can be captured
    if hasattr(trt.BuilderFlag, "TF32"):  # set by default: what is FP32 in a graph needs to be
        config.clear_flag(trt.BuilderFlag.TF32)
    for number, capability in enumerate(job["capabilities"]):
        config.num_compute_capabilities = len(job["capabilities"])
        config.set_compute_capability(trt_variant.capability(tuple(capability)), number)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (smallest, optimum, largest) in shapes.items():
            profile.set_shape(name, smallest, optimum, largest)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError("the compiler refuses the optimization profile")
    config.progress_monitor = monitor = _monitor(trt_variant, answers)
    cache = _load_timing_cache(config, job["timing_cache"])
    digest = build_engine(trt_variant, builder, network, config, Path(job["output"]))
    if digest is None:
        raise EngineError(logger.errors[0] if logger.errors else "the compiler returned no engine")
    dropped = [line for line in logger.warnings if UNUSED in line]
    if dropped:
        raise EngineError(f"an input was dropped, numbers would be wrong: {'; '.join(dropped)}")
    if cache is not None:
        _save_timing_cache(config, job["timing_cache"])
    return {**facts, "sha256": digest, "steps": monitor.steps}


def network_facts(trt: Any, network: Any) -> dict[str, Any]:
    """Count what was parsed: layers by type and precision, attention fused or not, caches."""
    kinds: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    fused = decomposed = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        kinds[kind] += 1
        if layer.num_outputs:
            precisions[layer.get_output(0).dtype.name] += 1
        if kind == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            decomposed += layer.attention.decomposable
            fused += not layer.attention.decomposable
    return {
        "layers": dict(sorted(kinds.items())),
        "precisions": dict(sorted(precisions.items())),
        "fused_attention": fused,
        "decomposable_attention": decomposed,
        "caches_in_place": kinds["KV_CACHE_UPDATE"],
    }


def _parse(trt: Any, network: Any, logger: Any, job: dict[str, Any]) -> None:
    """Read the graph and hold it against its contract."""
    parser = trt.OnnxParser(network, logger)
    source = job["source"]
    if not parser.parse(Path(source).read_bytes(), path=source):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"the parser refuses the graph: {said}")
    for side in ("inputs", "outputs"):
        count = getattr(network, f"num_{side}")
        get = network.get_input if side == "inputs" else network.get_output
        found = {get(i).name: str(trt.nptype(get(i).dtype).__name__) for i in range(count)}
        if found != job[side]:
            raise EngineError(f"the parser read other {side} than the contract's: {found}")


def build_engine(
    trt_variant: TensorRtVariant, builder, network, config, output: Path
) -> str | None:
    """Compile into ``output``, streaming where that is possible (it saves a copy of the weights).

    Returns the SHA-256 of what was written, or None where nothing was.
    """
    trt: Any = trt_variant.module
    digest = hashlib.sha256()
    with output.open("wb") as stream:
        if hasattr(builder, "build_serialized_network_to_stream"):

            class Writer(trt.IStreamWriter):  # type: ignore[name-defined]
                def write(self, data: bytes) -> int:
                    digest.update(data)
                    return stream.write(data)

            if not builder.build_serialized_network_to_stream(network, config, Writer()):
                return None
        else:
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                return None
            digest.update(plan)
            stream.write(plan)
    return digest.hexdigest()


def _logger(trt_variant: TensorRtVariant) -> Any:
    """Return a logger that writes to stderr and keeps warnings and errors."""
    trt: Any = trt_variant.module

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self):
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                return
            print(f"[{severity.name}] {message}", file=sys.stderr, flush=True)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif severity != trt.ILogger.INFO:
                self.errors.append(message)

    return Logger()


def _monitor(trt_variant: TensorRtVariant, answers: TextIO) -> Any:
    """Return a progress monitor that answers with the number of steps done."""
    trt: Any = trt_variant.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self):
            super().__init__()
            self.steps = 0

        def phase_start(self, phase, parent, steps) -> None:
            """Ignore the start of a phase: phases nest, and their number is unknown."""

        def step_complete(self, phase, step) -> bool:
            self.steps += 1
            _answer(answers, {"step": self.steps})
            return True

        def phase_finish(self, phase) -> None:
            """Ignore the end of a phase."""

    return Monitor()


def _load_timing_cache(config: Any, file: str | None) -> Any:
    if file is None:
        return None
    data = b""
    with contextlib.suppress(OSError):
        data = Path(file).read_bytes()
    cache = config.create_timing_cache(data)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")  # from another version or GPU
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, file: str) -> None:
    write_file(Path(file), bytes(config.get_timing_cache().serialize()))


def _answer(answers: TextIO, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)


def _die_with_parent() -> None:
    """Let the kernel kill this process with its parent: nothing else would stop it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
