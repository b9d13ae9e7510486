"""Weights and importances that a codec may meet, drawn from a seed."""

import numpy as np

N_ROWS, N_COLUMNS = 4, 512
DISTRIBUTIONS = ("gaussian", "student_t", "laplace", "outliers", "constant", "sparse")
IMPORTANCES = ("lognormal", "one_hot", "gamma", "none")


def draw(seed: int) -> tuple[str, np.ndarray, np.ndarray | None]:
    """What was drawn, weights float32 [N_ROWS, N_COLUMNS], and importance float32 [N_COLUMNS] or None."""
    rng = np.random.default_rng(seed)
    distribution, importance = rng.choice(DISTRIBUTIONS), rng.choice(IMPORTANCES)
    scale = 10 ** rng.uniform(-3, 1)
    rows = (scale * _weights(rng, distribution)).astype(np.float32)
    return f"seed {seed}: {distribution}, {importance}, scale {scale:.2g}", rows, _importance(rng, importance)


def typical(seed: int, n_rows: int = 16, n_columns: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a trained matrix, heavier in the tails than a gaussian, and a log-normal importance."""
    rng = np.random.default_rng(seed)
    rows = (0.02 * rng.standard_t(5, (n_rows, n_columns))).astype(np.float32)
    return rows, rng.lognormal(0, 1, n_columns).astype(np.float32)


def weighted_nmse(rows: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    """Importance-weighted squared error over the weighted sum of squares, in float64; 0 for rows that weigh nothing."""
    weights = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    exact = rows.astype(np.float64)
    norm = (weights * exact**2).sum()
    return float((weights * (exact - decoded) ** 2).sum() / norm) if norm > 0 else 0.0


def _weights(rng: np.random.Generator, distribution: str) -> np.ndarray:
    shape = (N_ROWS, N_COLUMNS)
    if distribution == "gaussian":
        return rng.standard_normal(shape)
    if distribution == "student_t":
        return rng.standard_t(rng.integers(3, 8), shape)
    if distribution == "laplace":
        return rng.laplace(size=shape)
    if distribution == "outliers":
        rows = rng.standard_normal(shape)
        rows[:, rng.integers(N_COLUMNS)] *= 50
        return rows
    if distribution == "constant":
        return np.broadcast_to(rng.standard_normal((N_ROWS, 1)), shape)
    return rng.standard_normal(shape) * (rng.random(shape) < rng.uniform(0.02, 0.5))


def _importance(rng: np.random.Generator, importance: str) -> np.ndarray | None:
    if importance == "none":
        return None
    if importance == "one_hot":
        weights = np.zeros(N_COLUMNS)
        weights[rng.integers(N_COLUMNS)] = rng.lognormal()
    elif importance == "lognormal":
        weights = rng.lognormal(0, rng.uniform(0.5, 2), N_COLUMNS)
    else:
        weights = rng.gamma(1, 1, N_COLUMNS) + 0.05
    return weights.astype(np.float32)
