"""W ~ Q + L R: a whitened truncated SVD beside the codes, the two fitted in turns.

Minimises ||(W - Q - L R) M||_F with M M^T = H + lambda I (CALDERA, Saha et al. 2024, sect. 3; QERA, Zhang
et al. 2024). The low-rank part of W comes first and the rest is quantised; then each round takes the best
L R for what quantisation left and quantises again. Errors over rounds are not monotone, so every pair
(Q, L R) is a candidate, judged as it will be stored, and the best is kept.

Shapes: O outputs (rows), I inputs (columns), R rank, K options stacked, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitalloc.option import PASS_THROUGH, Option
from bitalloc.quant import CompressedMatrix, Factor, Grid, Order, quantizer
from bitalloc.quant.grid import SMALLEST

__all__ = ["Decomposition", "Factor", "decompose", "leading", "stacks"]

FULL = 512  # largest min(O, I) at which the SVD is exact
OVERSAMPLING, ROUNDS = 1.5, 3


@dataclass(frozen=True)
class Decomposition:
    """A matrix as stored, and its error E = W - What."""

    matrix: CompressedMatrix
    error: float  # tr(E H E^T), undamped
    square: float  # ||E||_F^2
    energy: float  # ||What||_F^2
    objective: float  # tr(E (H + lambda I) E^T), what the fit minimises


@dataclass(frozen=True)
class _LowRank:
    """L R as stored; `R_RI` in the order of the columns of the matrix."""

    L_OR: Tensor
    R_RI: Tensor
    L_scale_R: Tensor | None
    R_scale_R: Tensor | None

    def transposed(self, order: Order) -> tuple[Tensor, Tensor]:
        """(R^T, L^T) as float32, inputs in the order of processing."""
        L_OR, R_RI = self.L_OR.float(), self.R_RI.float()
        if self.L_scale_R is not None:
            L_OR, R_RI = L_OR * self.L_scale_R.float(), R_RI * self.R_scale_R.float()[:, None]
        return R_RI[:, order.permutation_I].T, L_OR.T


def stacks(options: Sequence[Option]) -> list[list[Option]]:
    """Options that can pass through one column loop together, in order of first appearance."""

    found: dict[tuple, list[Option]] = {}
    for option in options:
        found.setdefault((option.quantizer, option.group_size, option.symmetric), []).append(option)
    return list(found.values())


def decompose(
    W_OI: Tensor,
    factor: Factor,
    options: Sequence[Option],
    *,
    act_order: bool,
    iterations: int,
    half: torch.dtype = torch.float16,
) -> list[Decomposition]:
    """Compress W_OI (float32) under every option; results in the order of `options`.

    An option's result is the same, to the last bit, whatever other options it is computed with.
    `iterations` rounds follow the low-rank-first start; `half` is the type of the pass-through.
    """
    found: dict[Option, Decomposition] = {}
    for stack in stacks(options):
        if stack[0].quantizer == PASS_THROUGH:
            found[stack[0]] = _pass_through(W_OI, factor, stack[0], half)
        else:
            found |= zip(stack, _alternate(W_OI, factor, stack, act_order, iterations), strict=True)
    return [found[option] for option in options]


def _pass_through(W_OI: Tensor, factor: Factor, option: Option, half: torch.dtype) -> Decomposition:
    stored_OI = W_OI.to(half)
    D_OI = W_OI - stored_OI.float()
    error, square = factor.energy(D_OI), _square(D_OI)
    matrix = CompressedMatrix(option, *W_OI.shape, weight_OI=stored_OI.cpu())
    return Decomposition(matrix, error, square, _square(stored_OI.float()), error + factor.lam * square)


def _alternate(
    W_OI: Tensor, factor: Factor, stack: list[Option], act_order: bool, iterations: int
) -> list[Decomposition]:
    order = factor.order(stack[0].group_size, act_order)
    quantise = quantizer(stack[0].quantizer)
    W_IO = W_OI.T[order.permutation_I]
    parts = _start(W_IO, order, stack)
    best: dict[Option, Decomposition] = {}

    def offer(option: Option, grid: Grid, k: int, *, E_IO: Tensor, D_IO: Tensor) -> None:
        objective = _square(E_IO)
        if option not in best or objective < best[option].objective:
            square, energy = _square(D_IO), _square(W_IO - D_IO)
            matrix = _stored(option, grid, k, parts[option], order=order)
            best[option] = Decomposition(matrix, max(objective - factor.lam * square, 0.0), square, energy, objective)

    def quantised(live: list[Option]) -> Grid:
        X_IKO = W_IO.new_empty(len(W_IO), len(live), W_IO.shape[1])
        for k, option in enumerate(live):
            X_IKO[:, k] = _minus(W_IO, parts[option], order)
        bits_K = torch.tensor([option.bits for option in live], device=W_IO.device)
        grid = quantise(X_IKO, bits_K, order, symmetric=live[0].symmetric)
        for k, option in enumerate(live):
            offer(option, grid, k, E_IO=grid.E_IKO[:, k], D_IO=grid.D_IKO[:, k])
        return grid

    live = stack
    grid = quantised(live)
    for _ in range(iterations):
        ranked = [option for option in live if option.rank]
        if not ranked:
            break
        for option in ranked:
            k = live.index(option)
            R_IR, L_RO = parts[option].transposed(order)
            # E is (W - Q - L R) M already: adding L R M gives (W - Q) M without another product
            rest_IO = grid.D_IKO[:, k] + R_IR @ L_RO
            whitened_IO = grid.E_IKO[:, k] + order.M_II.T @ R_IR @ L_RO
            parts[option] = part = _factors(*leading(whitened_IO, option.rank), order, option)
            R_IR, L_RO = part.transposed(order)
            E_IO = whitened_IO - order.M_II.T @ R_IR @ L_RO
            offer(option, grid, k, E_IO=E_IO, D_IO=rest_IO - R_IR @ L_RO)
        live = ranked
        grid = quantised(live)
    return [best[option] for option in stack]


def _start(W_IO: Tensor, order: Order, stack: list[Option]) -> dict[Option, _LowRank | None]:
    """The low-rank part of W itself at every rank that occurs; the factorisation is shared."""
    parts: dict[tuple[int, int], _LowRank] = {}
    if any(option.rank for option in stack):
        whitened_IO = order.M_II.T @ W_IO
        basis = _Basis(whitened_IO)
        for option in stack:
            if option.rank and (option.rank, option.factor_bits) not in parts:
                parts[option.rank, option.factor_bits] = _factors(*basis.leading(option.rank), order, option)
    return {option: parts.get((option.rank, option.factor_bits)) for option in stack}


def _minus(W_IO: Tensor, part: _LowRank | None, order: Order) -> Tensor:
    return W_IO if part is None else torch.addmm(W_IO, *part.transposed(order), alpha=-1)


def _factors(A_IR: Tensor, B_RO: Tensor, order: Order, option: Option) -> _LowRank:
    """The stored factors of L R = (A B)^T M^-1, balanced, each rank with scales of its own."""
    L_OR, R_RI = B_RO.T, order.stored(order.unwhiten(A_IR.T).T).T
    missing = option.rank - L_OR.shape[1]  # a rank above min(O, I) has nothing left to hold
    L_OR, R_RI = torch.nn.functional.pad(L_OR, (0, missing)), torch.nn.functional.pad(R_RI, (0, 0, 0, missing))
    size_L, size_R = L_OR.abs().amax(0).clamp(min=SMALLEST), R_RI.abs().amax(1).clamp(min=SMALLEST)
    ratio_R = (size_R / size_L).sqrt()
    L_OR, R_RI = L_OR * ratio_R, R_RI / ratio_R[:, None]
    if option.factor_bits == 16:
        return _LowRank(L_OR.half(), R_RI.half(), None, None)
    scale_L, scale_R = ((t / 127).clamp(min=SMALLEST).half() for t in (L_OR.abs().amax(0), R_RI.abs().amax(1)))
    L_OR = (L_OR / scale_L.float()).round().clamp(-127, 127).to(torch.int8)
    R_RI = (R_RI / scale_R.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return _LowRank(L_OR, R_RI, scale_L, scale_R)


class _Basis:
    """Leading singular directions of Y_IO at any rank; small matrices are decomposed once, exactly."""

    def __init__(self, Y_IO: Tensor) -> None:
        self.Y_IO = Y_IO
        self.vectors: Tensor | None = None

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        width = min(self.Y_IO.shape)
        rank = min(rank, width)
        sketch = int(OVERSAMPLING * rank) + 1
        if width > FULL and sketch <= width // 2:
            return _subspace(self.Y_IO, rank, sketch)
        wide = self.Y_IO.shape[0] <= self.Y_IO.shape[1]
        if self.vectors is None:
            # the Gram matrix squares the condition number, which float64 has digits for
            Y = self.Y_IO.double()
            self.vectors = torch.linalg.eigh(Y @ Y.T if wide else Y.T @ Y).eigenvectors.flip(1).float()
        V = self.vectors[:, :rank].contiguous()
        return (V, V.T @ self.Y_IO) if wide else (self.Y_IO @ V, V.T)


def leading(Y_IO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A_IR, B_RO with A B the best rank-R approximation of Y_IO (Eckart-Young), strongest rank first.

    Exact up to min(O, I) = 512; above, a seeded randomised subspace iteration (Halko et al. 2011, alg. 4.4)
    with sketch 1.5 R and 3 rounds, whose error is within 1 % of the optimum on the spectra of weights.
    """
    return _Basis(Y_IO).leading(rank)


def _subspace(Y_IO: Tensor, rank: int, sketch: int) -> tuple[Tensor, Tensor]:
    draw = torch.randn(Y_IO.shape[1], sketch, generator=torch.Generator().manual_seed(0))
    Q_IS = _orthonormal(Y_IO @ draw.to(Y_IO))
    for _ in range(ROUNDS):
        Q_IS = _orthonormal(Y_IO @ _orthonormal(Y_IO.T @ Q_IS))
    B_SO = Q_IS.T @ Y_IO
    B = B_SO.double()
    V = torch.linalg.eigh(B @ B.T).eigenvectors.flip(1)[:, :rank].float()
    return Q_IS @ V, V.T @ B_SO


def _orthonormal(Y: Tensor) -> Tensor:
    """CholeskyQR twice (Yamamoto et al. 2015), several times faster than Householder QR on tall matrices."""
    for _ in range(2):
        D = Y.double()
        G = D.T @ D
        # keeps a rank-deficient sketch factorisable; far below what float32 resolves
        G.diagonal().add_(1e-13 * G.diagonal().sum() + torch.finfo(torch.float64).tiny)
        Y = torch.linalg.solve_triangular(torch.linalg.cholesky(G, upper=True), D, upper=True, left=False).float()
    return Y


def _stored(option: Option, grid: Grid, k: int, part: _LowRank | None, *, order: Order) -> CompressedMatrix:
    codes_IO = grid.codes_IKO[:, k]
    matrix = CompressedMatrix(
        option,
        rows=codes_IO.shape[1],
        columns=codes_IO.shape[0],
        codes_OI=order.stored(codes_IO).T.contiguous().cpu(),
        scale_OG=order.stored_groups(grid.scale_GKO[:, k]).T.contiguous().cpu(),
        zero_OG=None if grid.zero_GKO is None else order.stored_groups(grid.zero_GKO[:, k]).T.contiguous().cpu(),
    )
    if part is None:
        return matrix
    factors = {name: tensor.cpu().contiguous() for name, tensor in vars(part).items() if tensor is not None}
    return replace(matrix, **factors)


def _square(X: Tensor) -> float:
    return float(X.square().sum(dtype=torch.float64))
