"""Build the simulated CUDA runtime for the CUDA build of torch in this environment.

`python tests/simulated_gpu/build.py FOLDER` writes libcudart.so.N and libcuda.so.1 into FOLDER. What the sources here
do not define but torch's libraries ask for becomes a function that refuses, with its name. Needs g++ and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(folder: Path) -> Path:
    """Return the library to preload; LD_LIBRARY_PATH must contain its folder."""
    site = Path(find_spec("torch").origin).parent.parent  # type: ignore[union-attr, arg-type]
    runtime = next(site.glob("nvidia/*/lib/libcudart.so.*")).name
    # Triton brings the headers that NVIDIA keeps in another package (crt/).
    headers = [*site.glob("nvidia/*/include"), site / "triton/backends/nvidia/include"]
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-pthread", "-w"]
    compiled = [folder / "cudart.o", folder / "nccl.o"]
    for target in compiled:
        source = HERE / target.with_suffix(".cpp").name
        run("g++", *flags, *(f"-isystem{path}" for path in headers), "-c", source, "-o", target)
    wanted = set[str]()
    for library in (site / "torch/lib").glob("*.so"):
        symbols = run("nm", "-D", "--undefined-only", library)
        wanted |= {
            *re.findall(r" U (\w+)@libcudart", symbols),
            *re.findall(r" U ((?:cu[A-Z]|nccl)\w+)$", symbols, re.M),
        }
    wanted |= {*re.findall(r"\b(cu[A-Z]\w+)\(", (site / "triton/backends/nvidia/driver.c").read_text("utf-8"))}
    refused = wanted - {*re.findall(r" T (\w+)$", run("nm", "--defined-only", *compiled), re.M)}
    stubs = folder / "refused.cpp"
    lines = [f'int {name}() {{ return sim_refuse("{name}"); }}' for name in sorted(refused)]
    stubs.write_text('extern "C" {\nint sim_refuse(const char *);\n' + "\n".join(lines) + "\n}\n", "utf-8")
    version, preload = folder / "version.map", folder / runtime
    version.write_text(f"{runtime} {{ global: *; }};\n", "utf-8")
    link = [f"-Wl,-soname,{runtime}", f"-Wl,--version-script={version}", "-static-libstdc++"]
    run("g++", *flags, "-shared", *compiled, stubs, *link, "-o", preload)
    driver = ["-Wl,-soname,libcuda.so.1", "-Wl,--no-as-needed", preload]  # its symbols are found in what it needs
    run("gcc", "-shared", *driver, "-o", folder / "libcuda.so.1")
    return preload


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
