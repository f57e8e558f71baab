"""W ~ Q + L R: a whitened truncated SVD beside the codes, the two fitted in turns.

Minimises ||(W - Q - L R) M||_F with M M^T = H + lambda I (CALDERA, Saha et al. 2024, sect. 3; QERA, Zhang
et al. 2024). There are two starts: the low-rank part of W first and the rest quantised, better on the trained
models at hand, or the codes of W first, better where a few inputs are outliers. Each round quantises what the
low-rank part leaves and takes the best L R for what the codes leave; a round that ends in the codes gains
next to nothing (docs/LOG.md has all three measured). Errors over rounds are not monotone, so every pair
(Q, L R) is a candidate, judged as it will be stored, and the best is kept.

Shapes: O outputs (rows), I inputs (columns), R rank or, in X_IR, rows of all stacked items, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitalloc.option import PASS_THROUGH, Option
from bitalloc.quant import CompressedMatrix, Factor, Grid, Order, Stack, quantizer
from bitalloc.quant.gptq import SPAN
from bitalloc.quant.grid import SMALLEST

__all__ = ["Decomposition", "Factor", "Item", "Target", "compress", "decompose", "leading", "stacks", "working_bytes"]

FULL = 512  # largest min(O, I) at which the SVD is exact
OVERSAMPLING, ROUNDS = 1.5, 3
EXTRA = 8  # columns of the sketch beside a guess
BLOCK = 256  # rows that are judged at a time


@dataclass(frozen=True)
class Decomposition:
    """A matrix as stored, and its error E = W - What."""

    matrix: CompressedMatrix | None  # None when only the errors were asked for
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


class Target:
    """One matrix W_OI (float32) and what all its options share: its order, its whitened self, its basis.

    `half` is the type of the pass-through. One group size is held at a time, so options come by group size.
    """

    def __init__(self, W_OI: Tensor, factor: Factor, *, act_order: bool, half: torch.dtype = torch.float16) -> None:
        self.W_OI, self.factor, self.act_order, self.half = W_OI, factor, act_order, half
        self.energy = _square(W_OI)
        self._arranged: tuple[int, _Arranged] | None = None

    def arranged(self, group_size: int) -> _Arranged:
        if self._arranged is None or self._arranged[0] != group_size:
            self._arranged = None
            self._arranged = (group_size, _Arranged(self, self.factor.order(group_size, self.act_order)))
        return self._arranged[1]

    def output(self, option: Option) -> float:
        """tr(W H W^T), the mean squared output for each token; in the last digits it depends on the order."""
        if option.quantizer == PASS_THROUGH:
            return self.factor.energy(self.W_OI)
        return max(_square(self.arranged(option.group_size).Y_IO) - self.factor.lam * self.energy, 0.0)


Item = tuple[Target, Option]


class _Arranged:
    """A target in one order of processing."""

    def __init__(self, target: Target, order: Order) -> None:
        self.order = order
        self.W_IO = target.W_OI.T[order.permutation_I]
        self.Y_IO = order.whiten(self.W_IO)
        self._basis = _Basis(self.Y_IO)
        self._parts: dict[tuple[int, int], _LowRank] = {}

    def start(self, option: Option) -> _LowRank | None:
        """The low-rank part of W itself; the factorisation is shared by all ranks."""
        key = (option.rank, option.factor_bits)
        if option.rank and key not in self._parts:
            self._parts[key] = _factors(*self._basis.leading(option.rank), self.order, option)
        return self._parts.get(key)


def stacks(items: Sequence[Item]) -> list[list[Item]]:
    """Items of one site that can pass through one column loop together, in order of first appearance."""
    found: dict[tuple, list[Item]] = {}
    for target, option in items:
        found.setdefault((option.quantizer, option.group_size, option.symmetric), []).append((target, option))
    return list(found.values())


def working_bytes(stack: Sequence[tuple[Hashable, int, int, Option]], *, iterations: int) -> int:
    """Bytes that `compress` holds at most beside the factor, for (target, rows, columns, option) of one stack.

    Each row of the column loop has a residual, a whitened residual and codes, which are copied out at the end;
    each target has three forms; and one item at a time is refitted and judged.
    """
    sizes = {target: rows * columns for target, rows, columns, _ in stack}
    total = sum(rows * columns for _, rows, columns, _ in stack)
    if stack[0][3].quantizer == PASS_THROUGH:
        return 2 * total + 12 * max(sizes.values())
    own = {(target, option.bits) for target, _, _, option in stack if not option.rank}
    plain = {(target, option.bits) for target, _, _, option in stack if option.rank and iterations} - own
    looped = total + sum(sizes[target] for target, _ in plain)
    ranked = [((rows, columns), option.rank) for _, rows, columns, option in stack if option.rank]
    fits = max((_fitting_bytes(*one) for one in ranked), default=0)
    factors = sum(10 * _rung(rank, shape) * sum(shape) for shape, rank in ranked)
    spans = 4 * SPAN * sum(rows for _, rows, _, _ in stack)
    return 10 * looped + 12 * sum(sizes.values()) + fits + factors + spans


def _fitting_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes for a refit: (W - Q) M, and what decomposes it, mostly in float64."""
    size, rung = math.prod(shape), _rung(rank, shape)
    return 14 * size + 40 * rung**2 if _exact(shape, rung) else 6 * size + 48 * rung * sum(shape)


def decompose(
    W_OI: Tensor,
    factor: Factor,
    options: Sequence[Option],
    *,
    act_order: bool,
    iterations: int,
    half: torch.dtype = torch.float16,
) -> list[Decomposition]:
    """Compress W_OI (float32) under every option; results in the order of `options`. See `compress`."""
    target = Target(W_OI, factor, act_order=act_order, half=half)
    found: dict[Option, Decomposition] = {}
    for stack in stacks([(target, option) for option in options]):
        results = compress(stack, iterations=iterations)
        found |= {option: result for (_, option), result in zip(stack, results, strict=True)}
    return [found[option] for option in options]


def compress(stack: Sequence[Item], *, iterations: int, matrices: bool = True) -> list[Decomposition]:
    """Compress one of `stacks`, in one column loop a round; results in its order.

    An item's result is the same, to the last bit, whatever it is stacked with. After the low-rank start,
    `iterations` rounds quantise the rest and refit the low-rank part; with 0 the start is kept.
    """
    if stack[0][1].quantizer == PASS_THROUGH:
        return [_pass_through(target, option) for target, option in stack]
    wanted = len(stack)
    stack = list(stack)
    # the other start needs the codes of W itself: those of rank 0, which most stacks hold anyway
    plain = {(id(target), option.bits): k for k, (target, option) in enumerate(stack) if not option.rank}
    for target, option in stack[:wanted] if iterations else []:
        if (id(target), option.bits) not in plain:
            plain[id(target), option.bits] = len(stack)
            stack.append((target, replace(option, rank=0)))
    places = [target.arranged(option.group_size) for target, option in stack]
    parts = [place.start(option) for place, (_, option) in zip(places, stack, strict=True)]
    best: list[Decomposition | None] = [None] * wanted
    live = list(range(len(stack)))
    for round_ in range(max(1, iterations)):
        rows, grid = _quantise([stack[k] for k in live], [places[k] for k in live], [parts[k] for k in live])
        at = dict(zip(live, rows, strict=True))
        bases = {k: _Basis(grid.E_IR[:, at[k]], rounds=1) for k in plain.values()} if not round_ else {}
        for k in live:
            if k >= wanted:
                continue
            (target, option), place, E_IO = stack[k], places[k], grid.E_IR[:, at[k]]
            found = _Pair(parts[k], at[k], (), grid.error(at[k]))
            if option.rank and iterations:
                refit = _refit(place.order, option, found, E_IO)
                if not round_:
                    zero = plain[id(target), option.bits]
                    other = _fit(bases[zero], option, at[zero], grid)
                    refit = other.refined(option.rank) if other.objective < refit.objective else refit
                found = min(found, _rounded(place.order, option, refit), key=lambda pair: pair.objective)
                parts[k] = found.lowrank
            if (kept := best[k]) is None or found.objective < kept.objective:
                square, energy = _squares(place.W_IO, grid.D_IR[:, found.rows], found.moved)
                best[k] = Decomposition(
                    _stored(option, grid, found, place.order) if matrices else None,
                    error=max(found.objective - target.factor.lam * square, 0.0),
                    square=square,
                    energy=energy,
                    objective=found.objective,
                )
        live = [k for k in live if stack[k][1].rank]
        if not live:
            break
    return [result for result in best if result is not None]


@dataclass(frozen=True)
class _Pair:
    """A low-rank part (or none) beside the codes in `rows` of a grid."""

    lowrank: _LowRank | None
    rows: slice
    moved: tuple[tuple[Tensor, Tensor], ...]  # factors R, L whose product is to be taken from the D of the grid
    objective: float


def _pass_through(target: Target, option: Option) -> Decomposition:
    stored_OI = target.W_OI.to(target.half)
    D_OI = target.W_OI - stored_OI.float()
    error, square = target.factor.energy(D_OI), _square(D_OI)
    matrix = CompressedMatrix(option, *stored_OI.shape, weight_OI=stored_OI.cpu())
    return Decomposition(matrix, error, square, _square(stored_OI.float()), error + target.factor.lam * square)


def _quantise(
    stack: Sequence[Item], places: Sequence[_Arranged], parts: Sequence[_LowRank | None]
) -> tuple[tuple[slice, ...], Grid]:
    """One column loop over W - L R of all items: the rows of each, and the grid of all."""
    order, first = places[0].order, stack[0][1]
    rows, bits = [len(target.W_OI) for target, _ in stack], [option.bits for _, option in stack]
    device = stack[0][0].W_OI.device
    together = Stack.of(rows, bits, symmetric=first.symmetric, device=device)
    X_IR = torch.empty(len(order.weight_I), sum(rows), device=device)
    shared: dict[int, slice] = {}  # items that differ only in bits have one target
    for k, (place, lowrank) in enumerate(zip(places, parts, strict=True)):
        same = shared.setdefault(id(lowrank or place), together.rows[k])
        if same != together.rows[k]:
            X_IR[:, together.rows[k]] = X_IR[:, same]
        elif lowrank is None:
            X_IR[:, same] = place.W_IO
        else:
            torch.addmm(place.W_IO, *lowrank.transposed(order), alpha=-1, out=X_IR[:, same])
    return together.rows, quantizer(first.quantizer)(X_IR, together, order)


@dataclass(frozen=True)
class _Fit:
    """The best low-rank part A B of the whitened residual Y of some codes, before it is rounded."""

    A_IR: Tensor
    B_RO: Tensor
    rows: slice  # of the codes
    Y_IO: Tensor  # (W - Q) M
    moved: tuple[tuple[Tensor, Tensor], ...]  # W - Q is the D of the grid less these products
    objective: float

    def refined(self, rank: int) -> _Fit:
        """After a rough decomposition, one that is worth storing."""
        A_IR, B_RO = leading(self.Y_IO, rank, guess=self.B_RO)
        return replace(self, A_IR=A_IR, B_RO=B_RO)


def _fit(basis: _Basis, option: Option, rows: slice, grid: Grid) -> _Fit:
    """For the codes of W itself, by a basis that may be rough: on most matrices the other start wins by far."""
    A_IR, B_RO = basis.leading(option.rank)
    return _Fit(A_IR, B_RO, rows, basis.Y_IO, (), grid.error(rows) - _energy(A_IR, B_RO))


def _refit(order: Order, option: Option, pair: _Pair, E_IO: Tensor) -> _Fit:
    """For the codes of a pair, whose whitened residual is E."""
    assert pair.lowrank is not None
    R_IR, L_RO = pair.lowrank.transposed(order)
    # adding L R M gives (W - Q) M without another product with M
    Y_IO = torch.addmm(E_IO, order.whiten(R_IR), L_RO)
    A_IR, B_RO = leading(Y_IO, option.rank, guess=L_RO)
    return _Fit(A_IR, B_RO, pair.rows, Y_IO, ((-R_IR, L_RO),), _square(Y_IO) - _energy(A_IR, B_RO))


def _rounded(order: Order, option: Option, fit: _Fit) -> _Pair:
    """The fit as it is stored."""
    lowrank = _factors(fit.A_IR, fit.B_RO, order, option)
    R_IR, L_RO = lowrank.transposed(order)
    objective = sum(_square(E) for _, E in _less(fit.Y_IO, ((order.whiten(R_IR), L_RO),)))
    return _Pair(lowrank, fit.rows, (*fit.moved, (R_IR, L_RO)), objective)


def _energy(A_IR: Tensor, B_RO: Tensor) -> float:
    """||A B||_F^2."""
    return float(((A_IR.T @ A_IR) * (B_RO @ B_RO.T)).sum(dtype=torch.float64))


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
    """Leading singular directions of Y_IO at any rank: one exact or a few randomised decompositions serve all."""

    def __init__(self, Y_IO: Tensor, *, rounds: int = ROUNDS) -> None:
        self.Y_IO, self.rounds = Y_IO, rounds
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        rank, rung = min(rank, *self.Y_IO.shape), _rung(rank, self.Y_IO.shape)
        if rung not in self._found:
            self._found[rung] = leading(self.Y_IO, rung, rounds=self.rounds)
        A_IR, B_RO = self._found[rung]
        return A_IR[:, :rank].contiguous(), B_RO[:rank]


def _rung(rank: int, shape: Sequence[int]) -> int:
    """The rank to decompose at: few widths, so that ranks share one, and which depends on the rank alone."""
    rung = next((step for step in (16, 64, 256) if rank <= step), 1 << (rank - 1).bit_length())
    return min(shape) if _exact(shape, rung) else rung


def leading(Y_IO: Tensor, rank: int, *, guess: Tensor | None = None, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """A_IR, B_RO with A B the best rank-R approximation of Y_IO (Eckart-Young), strongest rank first.

    Exact up to min(O, I) = 512; above, a seeded randomised subspace iteration (Halko et al. 2011, alg. 4.4)
    with sketch 1.5 R and 3 rounds, whose error is within about 1 % of the optimum on weights and residuals. From
    rows `guess` [R, O] that nearly span what is sought, sketch R + 8 and one round are enough.
    """
    rank = min(rank, *Y_IO.shape)
    if not _exact(Y_IO.shape, rank):
        return _subspace(Y_IO, rank, rounds) if guess is None else _subspace(Y_IO, rank, 1, guess)
    wide = Y_IO.shape[0] <= Y_IO.shape[1]
    # the Gram matrix squares the condition number, which float64 has digits for
    Y = Y_IO.double()
    V = torch.linalg.eigh(Y @ Y.T if wide else Y.T @ Y).eigenvectors.flip(1)[:, :rank].float()
    return (V, V.T @ Y_IO) if wide else (Y_IO @ V, V.T)


def _exact(shape: Sequence[int], rank: int) -> bool:
    width = min(shape)
    return width <= FULL or _sketch(rank) > width // 2


def _sketch(rank: int) -> int:
    return int(OVERSAMPLING * rank) + 1


def _subspace(Y_IO: Tensor, rank: int, rounds: int, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sketch = _sketch(rank) if guess is None else rank + EXTRA
    draw = torch.randn(Y_IO.shape[1], sketch, generator=torch.Generator().manual_seed(0)).to(Y_IO)
    if guess is not None:
        # scaled like the draws; ranks that hold nothing keep theirs
        size = guess.square().sum(1).sqrt()
        known = torch.nonzero(size > 0).flatten()
        draw[:, known] = (guess[known] / size[known, None]).T * Y_IO.shape[1] ** 0.5
    Q_IS = _orthonormal(Y_IO @ draw, passes=1)
    for k in range(rounds):
        Q_IS = _orthonormal(Y_IO @ _orthonormal(Y_IO.T @ Q_IS, passes=1), passes=2 if k == rounds - 1 else 1)
    B_SO = Q_IS.T @ Y_IO
    B = B_SO.double()
    V = torch.linalg.eigh(B @ B.T).eigenvectors.flip(1)[:, :rank].float()
    return Q_IS @ V, V.T @ B_SO


def _orthonormal(Y: Tensor, passes: int) -> Tensor:
    """CholeskyQR (Yamamoto et al. 2015: twice makes it orthonormal), faster than Householder QR on tall matrices."""
    for _ in range(passes):
        D = Y.double()
        G = D.T @ D
        # keeps a rank-deficient sketch factorisable; far below what float32 resolves
        G.diagonal().add_(1e-13 * G.diagonal().sum() + torch.finfo(torch.float64).tiny)
        Y = torch.linalg.solve_triangular(torch.linalg.cholesky(G, upper=True), D, upper=True, left=False).float()
    return Y


def _stored(option: Option, grid: Grid, pair: _Pair, order: Order) -> CompressedMatrix:
    rows, lowrank = pair.rows, pair.lowrank
    codes_IO = grid.codes_IR[:, rows]
    zero_OG = None if option.symmetric else order.stored_groups(grid.zero_GR[:, rows]).T.contiguous().cpu()
    matrix = CompressedMatrix(
        option,
        rows=codes_IO.shape[1],
        columns=codes_IO.shape[0],
        codes_OI=order.stored(codes_IO).T.contiguous().cpu(),
        scale_OG=order.stored_groups(grid.scale_GR[:, rows]).T.contiguous().cpu(),
        zero_OG=zero_OG,
    )
    if lowrank is None:
        return matrix
    factors = {name: tensor.cpu().contiguous() for name, tensor in vars(lowrank).items() if tensor is not None}
    return replace(matrix, **factors)


def _square(X: Tensor) -> float:
    """||X||_F^2: rows in float32, in one pass and without a copy, their sum in float64."""
    return float(torch.linalg.vector_norm(X, dim=1).double().square().sum())


def _less(X_IO: Tensor, products: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
    """X less the products of the factors, a block of rows at a time: the whole would be another matrix."""
    for a in range(0, len(X_IO), BLOCK):
        at = slice(a, min(a + BLOCK, len(X_IO)))
        X = X_IO[at]
        for A_IR, B_RO in products:
            X = torch.addmm(X, A_IR[at], B_RO, alpha=-1)
        yield at, X


def _squares(W_IO: Tensor, D_IO: Tensor, products: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """||D'||_F^2 and ||W - D'||_F^2 with D' = D less the products."""
    sums = [(_square(D), _square(W_IO[at] - D)) for at, D in _less(D_IO, products)]
    return sum(square for square, _ in sums), sum(energy for _, energy in sums)
