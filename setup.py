"""The compiled unit; everything else about the package stands in pyproject.toml."""

import os
from glob import glob

from setuptools import Extension, setup

#: Symbols and no optimisation, which is quick to compile; "strict": warnings are errors.
DEBUG = os.environ.get("FLANNEL_DP_DEBUG", "")

core = Extension(
    "flannel_dp._core",
    sources=["flannel_dp/_core.pyx", *sorted(glob("csrc/*.c"))],
    depends=["flannel_dp/_core.pxd", *glob("csrc/*.h"), *sorted(glob("csrc/cython/*.pxi"))],
    include_dirs=["csrc"],
    define_macros=[
        ("Py_LIMITED_API", "0x030B0000"),
        ("CYTHON_LIMITED_API", "1"),
        ("_GNU_SOURCE", "1"),
    ],
    extra_compile_args=["-std=c11", "-Wall", "-Wextra"]
    + (["-O0", "-g"] if DEBUG else ["-O3"])
    + (["-Werror"] if DEBUG == "strict" else []),
    py_limited_api=True,
)

setup(ext_modules=[core], options={"bdist_wheel": {"py_limited_api": "cp311"}})
