"""The search of `amq`: a surrogate of the loss, and NSGA-II on predicted loss and bits.

A design is a row of integers: for each decision the index of its format, the narrowest first.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# as in the authors' code (amq/search/optimizer.py)
POPULATION: Final = 200
GENERATIONS: Final = 20
CROSSOVER: Final = 0.9
MUTATION: Final = 0.1


@dataclass(frozen=True, eq=False)
class Space:
    """Of each decision and format, f64 [decisions, formats]: `bits`, and `noise`, how the error scales.

    A design's genes are between `low` and `high`, i64 [decisions].
    """

    bits: Floats
    noise: Floats  # 1 in the narrowest format
    low: Ints
    high: Ints

    def bits_of(self, designs: Ints) -> Floats:
        """Bits of each design, f64 [designs]."""
        return np.asarray(self._at(self.bits, designs).sum(1), dtype=np.float64)

    def features(self, designs: Ints) -> Floats:
        """What the surrogate sees, f64 [designs, decisions with a choice]."""
        return self._at(self.noise, designs)[:, self.low < self.high]

    def random(self, count: int, rng: np.random.Generator) -> Ints:
        """Designs of all mean widths: each draws the shares of the formats first, then its genes."""
        decisions, formats = self.bits.shape
        shares = np.log(rng.random((count, 1, formats)))
        keys = shares + rng.gumbel(size=(count, decisions, formats))
        index = np.arange(formats)
        allowed = (index >= self.low[:, None]) & (index <= self.high[:, None])
        return np.asarray(np.where(allowed, keys, -np.inf).argmax(2), dtype=np.int64)

    def first(self, count: int, rng: np.random.Generator) -> Ints:
        """The uniform designs, then random ones up to `count`."""
        formats = self.bits.shape[1]
        uniform = np.clip(np.arange(formats)[:, None], self.low, self.high)
        return np.concatenate([uniform, self.random(max(0, count - formats), rng)])

    def _at(self, table: Floats, designs: Ints) -> Floats:
        return np.asarray(table[np.arange(len(table)), designs], dtype=np.float64)


class Surrogate:
    """Predicts the loss: a cubic radial basis function with a linear tail through what was measured.

    s(x) = Σ λ_i ‖x − x_i‖³ + c·(1, x); points that don't determine the tail give the smallest of them all.
    """

    def __init__(self, space: Space, designs: Ints, losses: Floats) -> None:
        self.space = space
        self.points = space.features(designs)
        tail = _with_one(self.points)
        corner = np.zeros((tail.shape[1], tail.shape[1]))
        system = np.block([[_cubed_distances(self.points, self.points), tail], [tail.T, corner]])
        self.solution = np.linalg.lstsq(system, np.concatenate([losses, corner[0]]), rcond=None)[0]

    def __call__(self, designs: Ints) -> Floats:
        """Predicted losses, f64 [designs]."""
        features = self.space.features(designs)
        basis = np.concatenate([_cubed_distances(features, self.points), _with_one(features)], axis=1)
        return np.asarray(basis @ self.solution, dtype=np.float64)


def _with_one(features: Floats) -> Floats:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)


def _cubed_distances(a: Floats, b: Floats) -> Floats:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.maximum(squares, 0.0) ** 1.5, dtype=np.float64)


def propose(space: Space, designs: Ints, losses: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Up to `count` new designs on the predicted front, spread over bits, given those measured so far."""
    predict = Surrogate(space, designs, losses)
    start = designs[ranks(losses, space.bits_of(designs)) == 0]
    found = evolve(space, np.concatenate([start, space.random(POPULATION, rng)]), predict, rng)
    found = new_ones(found, designs)
    if len(found) == 0:
        return found
    rank = ranks(predict(found), space.bits_of(found))
    enough = np.sort(rank)[min(count, len(rank)) - 1]
    return spread(space, found[rank <= enough], start, count)


def new_ones(designs: Ints, known: Ints) -> Ints:
    """Those not known, each once, in order."""
    fresh = dict.fromkeys(tuple(row) for row in designs.tolist())
    for row in known.tolist():
        fresh.pop(tuple(row), None)
    return np.array(list(fresh), dtype=np.int64).reshape(-1, designs.shape[1])


def evolve(space: Space, population: Ints, predict: Surrogate, rng: np.random.Generator) -> Ints:
    """NSGA-II (Deb et al., 2002) on (predicted loss, bits): the last population."""
    population = select(space, population, predict)
    for _ in range(GENERATIONS):
        # the better of two has the smaller index
        mothers, fathers = population[rng.integers(len(population), size=(2, len(population), 2)).min(2)]
        mixed = (rng.random(mothers.shape) < 0.5) & (rng.random((len(mothers), 1)) < CROSSOVER)
        children = np.where(mixed, fathers, mothers)
        fresh = rng.integers(space.low, space.high + 1, size=children.shape)
        children = np.where(rng.random(children.shape) < MUTATION, fresh, children)
        population = select(space, np.concatenate([population, children]), predict)
    return population


def select(space: Space, designs: Ints, predict: Surrogate) -> Ints:
    """The best POPULATION distinct designs, in order: by front, then by loneliness."""
    designs = np.unique(designs, axis=0)
    losses, bits = predict(designs), space.bits_of(designs)
    rank = ranks(losses, bits)
    lonely = np.zeros(len(designs))
    for front in range(rank.max() + 1):
        members = np.flatnonzero(rank == front)
        lonely[members] = crowding(losses[members]) + crowding(bits[members])
    return designs[np.lexsort((-lonely, rank))[:POPULATION]]


def ranks(losses: Floats, bits: Floats) -> Ints:
    """0 for designs that no other beats in both, 1 for those that only these beat, and so on."""
    order = np.lexsort((losses, bits))
    found = np.full(len(losses), -1, dtype=np.int64)
    rank = 0
    while len(order):
        values = losses[order]
        best = np.minimum.accumulate(values)
        front = np.concatenate([[True], values[1:] < best[:-1]])
        found[order[front]] = rank
        order, rank = order[~front], rank + 1
    return found


def crowding(values: Floats) -> Floats:
    """The distance between each one's neighbours, in shares of the range; infinite at both ends."""
    order = np.argsort(values, kind="stable")
    found = np.full(len(values), np.inf)
    span = values[order[-1]] - values[order[0]]
    found[order[1:-1]] = (values[order[2:]] - values[order[:-2]]) / (span or 1.0)
    return found


def spread(space: Space, designs: Ints, measured: Ints, count: int) -> Ints:
    """`count` designs whose bits fill the gaps between those of the measured front: the widest gap first."""
    bits = space.bits_of(designs)
    distance = np.abs(bits[:, None] - space.bits_of(measured)[None]).min(1)
    chosen: list[int] = []
    for _ in range(min(count, len(designs))):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(bits - bits[chosen[-1]]))
    return designs[chosen]
