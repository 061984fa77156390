"""The ledger of what we touch of xDiT, against the releases that we say we run on."""

import ast
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import releases
import torch

from hybridiff_xdit.seam.compat import missing
from hybridiff_xdit.xdit import compat

RELEASES = ["0.5.0", "0.6.0", "0.7.0"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    """As `releases.check` returns it."""
    base, shared = tmp_path_factory.mktemp("xfuser"), "diffusers torch transformers"
    return releases.check("xfuser", "hybridiff_xdit.xdit.compat", shared, RELEASES, base)


def test_ledger_with_the_installed_xfuser(checked):
    _, problems = checked["installed"]
    assert not problems


@pytest.mark.parametrize("release", RELEASES)
def test_ledger_with_each_release(checked, release):
    if os.environ.get(releases.OFFLINE):
        pytest.skip(f"{releases.OFFLINE} is set")
    file, problems = checked[release]
    assert f"/{release}/xfuser/" in file
    assert not problems


@pytest.fixture
def later_attention(monkeypatch):
    """xfuser with its attention laid out as after 0.7: specifications, in a registry that is swapped as a whole."""
    compat.import_xfuser()
    compat.restore_xfuser()
    registry = ModuleType("xfuser.core.attention.registry")

    class AttentionBackendType(Enum):
        SDPA, SDPA_MATH, SDPA_EFFICIENT, SDPA_FLASH = range(4)

    @dataclass(frozen=True)
    class Spec:
        type: AttentionBackendType
        impl: Any
        _resolved: Any = None

    @contextmanager
    def using(specs):
        saved = dict(registered)
        registered.update({spec.type: spec for spec in specs})
        yield
        registered.update(saved)

    registered = {kind: Spec(kind, "kernel:cuda", "resolved") for kind in AttentionBackendType}
    vars(registry).update(
        AttentionBackendType=AttentionBackendType, Spec=Spec, using=using, REGISTRY=MappingProxyType(registered)
    )
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    yield registry
    monkeypatch.undo()
    compat.import_xfuser()


def test_attention_as_it_is_laid_out_after_0_7(later_attention):
    assert compat.attention_types() is later_attention.AttentionBackendType
    _, later = compat.ATTENTION_LEDGERS
    assert not missing(later)
    compat._let_flash_attention_run()
    flash = later_attention.REGISTRY[later_attention.AttentionBackendType.SDPA_FLASH]
    assert flash._resolved is None
    tokens = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    output, lse = flash.impl(*tokens, SimpleNamespace(dropout_p=0.0, is_causal=False))
    torch.testing.assert_close(output, torch.nn.functional.scaled_dot_product_attention(*tokens))
    assert lse.shape == (1, 2, 5)
    compat.restore_xfuser()
    assert {spec.impl for spec in later_attention.REGISTRY.values()} == {"kernel:cuda"}
    del later_attention.using
    assert missing(later)


def test_every_import_from_xfuser_is_in_the_ledger():
    listed = {(seam.module, seam.name) for seam in (*compat.LEDGER, *compat.PLUGIN_LEDGER)}
    for path in (releases.ROOT / "hybridiff_xdit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("xfuser"):
                assert path.parent.name == "xdit", f"{path} imports xfuser"
                for alias in node.names:
                    assert (node.module, alias.name) in listed, f"{path.name}: {node.module}.{alias.name}"
