"""GPUs as their makers' data sheets describe them: what a plan computes with.

Rates are dense (no sparsity), tensor cores with float32 sums; links are in one direction. Sources:
NVIDIA's *Ada GPU Architecture* and *RTX Blackwell GPU Architecture* papers (GeForce), the data
sheets *A100 Tensor Core GPU*, *H100 Tensor Core GPU* and *H200 Tensor Core GPU* (SXM), the
*Blackwell Architecture Technical Brief* and *DGX B200* (HGX B200), and for networks those of DGX
A100, H100, H200 and B200.
"""

from dataclasses import dataclass

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class GPU:
    """One card.

    memory: bytes; bandwidth: of it, bytes/s; link: bytes/s to others of its node (NVLink, else
    PCIe); node: cards of a node; network: bytes/s of a card to other nodes; host: to the CPU's
    memory (PCIe); bf16, fp8, tf32, fp32: FLOPs/s of products, fp8 None where it has none.
    """

    memory: int
    bandwidth: float
    link: float
    node: int
    network: float
    host: float
    bf16: float
    fp8: float | None
    tf32: float
    fp32: float


def _gpu(
    memory: int,
    bandwidth: float,
    link: float,
    network: float,
    host: float,
    bf16: float,
    fp8: float | None,
    tf32: float,
    fp32: float,
) -> GPU:
    """GB, GB/s and TFLOPs/s, of nodes of eight."""
    fp8 = None if fp8 is None else fp8 * TERA
    return GPU(
        *(memory * GB, bandwidth * GB, link * GB, 8, network * GB, host * GB),
        *(bf16 * TERA, fp8, tf32 * TERA, fp32 * TERA),
    )


# A GeForce's node is what its owner builds: eight of them and a network of 100 Gbit/s.
GPUS = {
    "RTX 4090": _gpu(24, 1008, 32, 1.5625, 32, 165.2, 330.3, 82.6, 82.6),
    "RTX 5090": _gpu(32, 1792, 64, 1.5625, 64, 209.5, 419, 104.8, 104.8),
    "A100": _gpu(80, 2039, 300, 25, 32, 312, None, 156, 19.5),
    "H100": _gpu(80, 3350, 450, 50, 64, 989.4, 1978.9, 494.7, 66.9),
    "H200": _gpu(141, 4800, 450, 50, 64, 989.4, 1978.9, 494.7, 66.9),
    "B200": _gpu(180, 8000, 900, 50, 64, 2250, 4500, 1100, 80),
}
