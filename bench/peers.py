"""Other people's batched orthogonalisation, called as its authors mean it to be, for the comparison in newton_schulz.

    for name, run in installed(schedule, device).items(): run(X)
    for name, build in MUONS.items(): optimizer = build(parameters, lr=0.02)

None of them is a dependency; each is timed where it is installed. Orthogonalisations get our coefficients and steps and
divide by the Frobenius norm themselves, which their times include; whole Muon steps (MUONS) are as their packages have
them. A package that is there but cannot start is reported, not hidden.
"""

import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Schedule = list[tuple[float, float, float]]


def gram_newton_schulz(schedule: Schedule, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Dao AI Lab's fp16 Gram form, restart before iteration 2 as published; CuTe kernels from sm_90 on."""
    from gram_newton_schulz import GramNewtonSchulz

    kernels = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    # Not their "reduce-overhead": graphs inside a captured graph fail, and here everything is timed both ways.
    compile_kwargs = {"fullgraph": True} if device.type == "cuda" else None
    return GramNewtonSchulz(
        ns_use_kernels=kernels,
        ns_coefficients=[list(row) for row in schedule],
        gram_newton_schulz_reset_iterations=[2],
        compile_kwargs=compile_kwargs,
    )


def emerging_optimizers(schedule: Schedule, device: torch.device) -> Callable[[Tensor], Tensor]:
    """NVIDIA's one-matrix function with its triangular kernel, looped over the batch, bf16 by its "medium" switch."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    def run(X: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            options = {"coefficient_type": "custom", "custom_coefficient_sets": schedule, "use_syrk": X.is_cuda}
            return torch.stack([newton_schulz(x, steps=len(schedule), **options) for x in X.float()])
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def heavyball_muon(params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """heavyball's Muon, which compiles its own functions."""
    import heavyball

    return heavyball.Muon(params, lr=lr)


def pytorch_optimizer_muon(params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """pytorch_optimizer's Muon, which iterates in bf16."""
    import pytorch_optimizer

    return pytorch_optimizer.Muon([{"params": list(params), "use_muon": True}], lr=lr)


def torch_muon(params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """torch.optim.Muon, a loop that iterates in bf16."""
    return torch.optim.Muon(params, lr=lr, weight_decay=0.0)


MUONS = {"torch.optim.Muon": torch_muon, "heavyball": heavyball_muon, "pytorch_optimizer": pytorch_optimizer_muon}
PEERS = {"gram-newton-schulz": gram_newton_schulz, "emerging-optimizers": emerging_optimizers}


def installed(schedule: Schedule, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is installed and starts; prints a line for what is installed and does not."""
    found = {}
    for name, build in PEERS.items():
        if not _is_installed(name):
            continue
        try:
            found[name] = build(schedule, device)
        except Exception as error:  # another project's import may fail in any way; the comparison continues without it
            print(f"{name}: installed but not usable here ({type(error).__name__}: {error})")
    return found


def muons_installed() -> list[str]:
    """Those of MUONS that are installed."""
    return [name for name in MUONS if _is_installed(name)]


def report_absent() -> None:
    """One line for each that is not installed."""
    for name in (*PEERS, *MUONS):
        if not _is_installed(name):
            print(f"{name}: absent")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0].replace("-", "_")) is not None
