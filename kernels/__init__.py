"""Muon and its kernels, one family per file. Installed by itself, the package is called `muon_kernels`.

    from muon_kernels import Muon, param_groups

A regular package, so that a package `kernels` elsewhere cannot hide it.
"""

from .groups import MuonWithAdamW, ParamGroups, param_groups
from .newton_schulz import orthogonalize
from .optimizer import Muon
from .symmetric import gram, symmetric_matmul

__all__ = ["Muon", "MuonWithAdamW", "ParamGroups", "gram", "orthogonalize", "param_groups", "symmetric_matmul"]
