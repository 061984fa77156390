"""Classes of diffusers, of which an older release lacks some. `conftest` skips a test that makes such a one.

The newest release that is supported has them all: a name that it does not have is an error.
"""

from importlib import import_module

import diffusers
from packaging.version import Version

#: Modules of the classes that diffusers itself does not export.
BENEATH = {
    "LTX2TextConnectors": "diffusers.pipelines.ltx2.connectors",
    "WanCoreDenoiseStep": "diffusers.modular_pipelines.wan.modular_blocks_wan",
    "ZImageCoreDenoiseStep": "diffusers.modular_pipelines.z_image.modular_blocks_z_image",
}


class Lacking(Exception):
    """The installed diffusers has no such class."""


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return getattr(import_module(BENEATH.get(name, "diffusers")), name)
    except (AttributeError, ModuleNotFoundError):
        if Version(diffusers.__version__) >= Version("0.42"):
            raise
        return type(name, (), {"__init__": _lack})


def _lack(self: object, *args: object, **kwargs: object) -> None:
    raise Lacking(f"diffusers {diffusers.__version__} has no {type(self).__name__}")
