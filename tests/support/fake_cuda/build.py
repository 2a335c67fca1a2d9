"""Libraries of CUDA that work in the host's memory, for an installed ONNX Runtime with CUDA.

``runtime.c`` and ``driver.c`` are the runtime and the driver; what else ONNX Runtime's provider
asks of libraries is read from it, and becomes functions that note their names and succeed.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
HEADER = "nvidia/cu13/include/driver_types.h"
MAJOR = 13

ANSWERS = {  # what must not only succeed
    "cublasGetMathMode": "int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, 0; }",
    "cublasLtMatmulAlgoGetHeuristic": (
        "int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, "
        "void *g, int n, void *found, int *count) { memset(found, 0, 96); return *count = 1, 0; }"
    ),
}


def lacking(site: Path) -> str | None:
    """Name what ``site``, a folder of packages, lacks to build these libraries; None: nothing."""
    absent = [name for name in (PROVIDER, HEADER) if not (site / name).exists()]
    return f"{', '.join(absent)} not in {site}" if absent else None


def build(folder: Path, site: Path) -> None:
    """Write libcuda, libcudart, libcublas, libcublasLt and libcurand to ``folder``."""
    wanted = undefined(site / PROVIDER)
    header = (site / HEADER).read_text()
    found = re.search(r"struct __device_builtin__ cudaDeviceProp\n\{.*?\n\};", header, re.S)
    properties = re.sub("__device_builtin__", "", found[0])
    properties = properties.replace("cudaUUID_t", "struct { char bytes[16]; }")
    (folder / "properties.h").write_text(properties)
    written = (HERE / "runtime.c").read_text()
    own = set(re.findall(r"\b(\w+)\(", written))
    runtime = written + stubs(wanted[f"libcudart.so.{MAJOR}"] - own, declared=True)
    compiled(folder, f"libcudart.so.{MAJOR}", runtime, ["-lpthread"])
    for name in ("cublas", "cublasLt"):
        library = f"lib{name}.so.{MAJOR}"
        compiled(folder, library, stubs(wanted[library]), [f"-l:libcudart.so.{MAJOR}"])
    compiled(
        folder, "libcurand.so.10", "int curandStandIn(void) { return 0; }", [], versioned=False
    )
    driver = (HERE / "driver.c").read_text()
    asked = {name for name in wanted[""] if name.startswith("cu")}
    driver += stubs(asked - set(re.findall(r"\b(\w+)\(", driver)), declared=True)
    links = [f"-l:libcudart.so.{MAJOR}", "-ldl"]
    compiled(folder, "libcuda.so.1", driver, links, versioned=False)


def undefined(library: Path) -> dict[str, set[str]]:
    """Names that a library wants of others, by theirs."""
    names = defaultdict(set)
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    )
    for line in listed.stdout.splitlines():
        name, _, other = line.split()[-1].partition("@")
        names[other].add(name)
    return names


START = """#include <stdint.h>
#include <string.h>
void fake_note(const char *, ...);
static void *handle(void) { static uintptr_t last = 0x900000; return (void *)(last += 16); }
"""


def stubs(names: set[str], *, declared: bool = False) -> str:
    """Functions that note their names and succeed; some make something, and hand out a handle."""
    source = "" if declared else START
    for name in sorted(names):
        if name in ANSWERS:
            source += ANSWERS[name] + "\n"
        elif name.endswith(("GetStatusName", "GetStatusString")):
            source += f'const char *{name}(int status) {{ return "stand-in"; }}\n'
        elif "Create" in name or name.endswith(("LoadData", "GetKernel", "Instantiate")):
            source += f"int {name}(void **made) {{ return *made = handle(), 0; }}\n"
        else:
            source += f'int {name}() {{ fake_note("library {name}"); return 0; }}\n'
    return source


def compiled(
    folder: Path, library: str, source: str, links: list[str], *, versioned: bool = True
) -> None:
    """Compile one library under its name; ``versioned``: as ONNX Runtime was linked to it."""
    file = folder / f"{library}.c"
    file.write_text(source)
    command = ["cc", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-I", str(folder)]
    if versioned:
        script = folder / f"{library}.map"
        script.write_text(f"{library} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    command += [str(file), "-o", str(folder / library), "-L", str(folder), *links]
    subprocess.run(command, check=True, capture_output=True, text=True)
