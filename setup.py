"""Builds ``fastdpo._C`` (fastdpo/native_build.py); all else about the package is in pyproject.toml.

On macOS and Windows, and with ``FASTDPO_PURE=1`` in the environment, nothing is compiled and the wheel is one
for all platforms. Every wheel has the sources of the kernels, for ``fastdpo build``. Torch is not needed.
"""

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
MIN_SETUPTOOLS = (77,)  # licenses by their SPDX names


def load_native_build() -> Any:
    """The module alone: the package it is in imports torch."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "fastdpo" / "native_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native_build = load_native_build()


def old_setuptools() -> str | None:
    """What setuptools there is where it is none that reads this pyproject.toml."""
    try:
        import setuptools
    except ImportError:
        return "no setuptools"
    version = tuple(int(n) for n in re.findall(r"\d+", setuptools.__version__)[:1])
    return None if version >= MIN_SETUPTOOLS else f"setuptools {setuptools.__version__}"


def is_pure() -> bool:
    """Whether the wheel is one for all platforms."""
    return sys.platform != "linux" or os.environ.get("FASTDPO_PURE") == "1"


def main() -> None:
    if (found := old_setuptools()) is not None:
        wanted = f"got {found}, wanted setuptools >= {MIN_SETUPTOOLS[0]}"
        if "--inplace" not in sys.argv:
            sys.exit(f"fastdpo: {wanted}: pip install 'setuptools>={MIN_SETUPTOOLS[0]}'")
        native_build.say(f"{wanted}: building in place without it")
        name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        native_build.build_to(ROOT / "fastdpo" / name, ROOT / "csrc", BUILD)
        return
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
    from setuptools.command.build_py import build_py

    class NinjaBuildExt(build_ext):
        def build_extension(self, ext: Extension) -> None:
            native_build.build_to(Path(self.get_ext_fullpath(ext.name)), ROOT / "csrc", BUILD)

    class WithSources(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                shutil.copytree(ROOT / "csrc", Path(self.build_lib, "fastdpo", "csrc"), dirs_exist_ok=True)

    extensions = [] if is_pure() else [Extension("fastdpo._C", [], optional=True)]
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuildExt, "build_py": WithSources})


main()
