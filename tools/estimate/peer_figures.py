"""Figures that others published, to stand beside estimates; marked as theirs, never used as ours.

Of those whose model's sizes are known, it is computed what they reached of the device's peaks: the
range of efficiencies that an estimate for a device nobody measured takes.

Sources: TinyChat, github.com/mit-han-lab/llm-awq, tinychat/README.md; TensorRT-Edge-LLM 0.10.0,
performance benchmarks (batch 1, JetPack 7.2, TensorRT 10.16), nvidia.github.io/TensorRT-Edge-LLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...graphs.plan.call_cost import WEIGHT_BYTES
from ...graphs.plan.cost import LLAVA_7B, Geometry
from .devices import DEVICES

TINYCHAT = "TinyChat"
EDGE_LLM = "TensorRT-Edge-LLM 0.10.0"

LLAMA_3_8B = Geometry(
    layers=32, hidden=4096, intermediate=14336, vocab=128256, kv_width=1024, query_width=4096
)


@dataclass(frozen=True)
class Figure:
    """One published measurement.

    tokens: of the prefill, 0 for a decode figure; ms: of that prefill, or of one token.
    geometry: the decoder's sizes where they are known; weights: key of ``WEIGHT_BYTES``.
    """

    stack: str
    device: str
    model: str
    precision: str
    tokens: int
    ms: float
    weights: str = "fp16"
    geometry: Geometry | None = None

    @property
    def efficiency(self) -> float | None:
        """Share of the device's peak that it reached: of FP16 products in a prefill, of the
        bandwidth (weights alone counted) in a decode step.
        """
        if self.geometry is None:
            return None
        device, head = DEVICES[self.device], self.geometry.hidden * self.geometry.vocab
        seconds = self.ms / 1e3
        if not self.tokens:
            nbytes = self.geometry.matmul_weights * WEIGHT_BYTES[self.weights]
            return nbytes / seconds / device.bandwidth
        peak = device.flops["fp16"]
        assert peak is not None
        flops = 2 * ((self.geometry.matmul_weights - head) * self.tokens + head)
        return flops / seconds / peak


def _edge(device: str, model: str, tokens: int, ms: float, per_second: float) -> list[Figure]:
    both = [Figure(EDGE_LLM, device, model, "INT4 AWQ", tokens, ms)]
    return [*both, Figure(EDGE_LLM, device, model, "INT4 AWQ", 0, 1e3 / per_second)]


FIGURES = (
    Figure(TINYCHAT, "orin-agx-64", "Vicuna-7B", "FP16", 0, 84.8, geometry=LLAVA_7B),
    Figure(TINYCHAT, "orin-agx-64", "Vicuna-7B", "INT4", 0, 26.3, "w4", LLAVA_7B),
    Figure(TINYCHAT, "orin-agx-64", "VILA-7B, one image", "FP16", 0, 86.9, geometry=LLAVA_7B),
    Figure(TINYCHAT, "orin-agx-64", "VILA-7B, one image", "INT4", 0, 28.1, "w4", LLAVA_7B),
    Figure(
        "Hugging Face, by TinyChat",
        *("orin-agx-64", "Llama-3-8B", "FP16", 512, 399, "fp16", LLAMA_3_8B),
    ),
    Figure(TINYCHAT, "orin-agx-64", "Llama-3-8B", "INT4", 512, 315, "w4", LLAMA_3_8B),
    Figure(
        "Hugging Face, by TinyChat",
        *("orin-agx-64", "Llama-3-8B", "FP16", 1024, 566, "fp16", LLAMA_3_8B),
    ),
    Figure(TINYCHAT, "orin-agx-64", "Llama-3-8B", "INT4", 1024, 623, "w4", LLAMA_3_8B),
    *_edge("orin-agx-64", "Qwen3-VL-8B", 292, 178.3, 32.1),
    *_edge("orin-agx-64", "Qwen3-VL-4B", 292, 105.7, 54.7),
    *_edge("orin-nx-16", "Qwen3-VL-8B", 292, 400.5, 18.4),
    *_edge("orin-nx-16", "Qwen3-VL-4B", 292, 217.2, 31.7),
    *_edge("orin-nano-8", "Qwen3-VL-2B", 292, 167.2, 36.1),
    *_edge("thor", "Qwen3-VL-8B", 292, 115.1, 48.5),
    *_edge("thor", "Qwen3-VL-4B", 292, 64.5, 82.8),
)


def efficiency_range(prefill: bool) -> tuple[float, float]:
    """Least and most that published figures reached of a device's peak."""
    seen = [f.efficiency for f in FIGURES if bool(f.tokens) == prefill]
    known = [one for one in seen if one is not None]
    return min(known), max(known)


def figures_of(device: str) -> list[Figure]:
    """Those of one device."""
    return [figure for figure in FIGURES if figure.device == device]
