"""Subspace similarity between adapters and between their experts: of A (row spaces) and of B (column spaces)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braidlora.analysis import subspaces
from braidlora.analysis.factors import AdapterFile, LayerName
from braidlora.analysis.subspaces import Subspace, column_space
from braidlora.errors import CheckpointError, ConfigError

Matrix = list[list[float | None]]
_SHOWN = 3  # layer names that a message lists


def compare(adapters: Sequence[AdapterFile], *, with_angles: bool = True) -> dict[str, Any]:
    """Compare every A with every A and every B with every B, layer by layer.

    Args:
        adapters: of one base model; two or more, or one with several experts.
        with_angles: also give the principal angles of every pair.

    Returns:
        the `similarity` section of `analysis.json`, see docs/reference/analysis.md.

    Raises:
        ConfigError: there is nothing to compare.
        CheckpointError: the adapters have no layer in common, or their layers are of different shapes.
    """
    names = common_layers(adapters)
    section: dict[str, Any] = {"left_out": _left_out(adapters, names)}
    elements = {factor: _elements(adapters, factor) for factor in ("A", "B")}
    if all(len(labels) < 2 for labels in elements.values()):
        raise ConfigError(
            f"{adapters[0].folder}: one adapter with one A and one B has nothing to compare; give two or more "
            "adapters, a multi-LoRA adapter, or a run directory (to measure its drift)."
        )
    layers: dict[str, list[dict[str, Any]]] = {"A": [], "B": []}
    for name in names:
        spaces: dict[str, list[Subspace]] = {"A": [], "B": []}
        for adapter in adapters:
            factors = adapter.read(name.name)
            spaces["A"] += [column_space(A.T, factors.rank) for A in factors.A]
            spaces["B"] += [column_space(B, factors.rank) for B in factors.B]
        for factor, found in spaces.items():
            layers[factor].append({**describe(name), **_matrices(found, with_angles)})
    for factor, labels in elements.items():
        section[factor] = _summary(labels, layers[factor]) if len(labels) > 1 else None
    return section


def common_layers(adapters: Sequence[AdapterFile]) -> list[LayerName]:
    """The layers that all adapters have, with equal shapes.

    Raises:
        CheckpointError: there are none, or shapes differ; the message names the first such layer.
    """
    first = adapters[0]
    elsewhere = [set(other.layers) for other in adapters[1:]]
    names = [name for name in first.layers if all(name in layers for layers in elsewhere)]
    if not names:
        listed = "; ".join(
            f"{adapter.folder} has {', '.join(name.name for name in adapter.layers[:_SHOWN])}, …"
            for adapter in adapters
        )
        raise CheckpointError(
            f"these adapters have no layer in common: {listed}. Only adapters of one base model can be compared."
        )
    for name in names:
        for other in adapters[1:]:
            (k, d), (other_k, other_d) = first.widths(name.name), other.widths(name.name)
            if (k, d) != (other_k, other_d):
                raise CheckpointError(
                    f"{name.name} maps {k} to {d} features in {first.folder}, and {other_k} to {other_d} in "
                    f"{other.folder}: these adapters belong to different base models."
                )
    return names


def describe(name: LayerName) -> dict[str, Any]:
    """A layer's entry in the JSON."""
    return {"name": name.name, "layer": name.layer, "module": name.module}


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Elementwise mean of the known values; None if there are none."""
    size = range(len(matrices[0]))
    return [[_mean([matrix[i][j] for matrix in matrices]) for j in size] for i in size]


def off_diagonal(matrix: Matrix) -> float | None:
    """The mean over all pairs."""
    size = len(matrix)
    return _mean([matrix[i][j] for i in range(size) for j in range(i)])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _elements(adapters: Sequence[AdapterFile], factor: str) -> list[str]:
    """A label for every matrix that is compared: the adapter's, with #1 … #N if it has several."""
    labels = []
    for adapter in adapters:
        shared = factor in adapter.scheme.shared
        labels += [adapter.label] if shared else [f"{adapter.label} #{i + 1}" for i in range(adapter.experts)]
    return labels


def _left_out(adapters: Sequence[AdapterFile], names: Sequence[LayerName]) -> dict[str, list[str]]:
    """Layers that only some adapters have, by adapter."""
    left = {
        adapter.label: [name.name for name in adapter.layers if name not in names] for adapter in adapters
    }
    return {label: layers for label, layers in left.items() if layers}


def _matrices(spaces: Sequence[Subspace], with_angles: bool) -> dict[str, Any]:
    size = len(spaces)
    similarity: Matrix = [[None] * size for _ in spaces]
    chance: Matrix = [[None] * size for _ in spaces]
    angles = []
    for i, X in enumerate(spaces):
        for j, Y in enumerate(spaces[: i + 1]):
            if X.basis is None or Y.basis is None:
                continue
            similarity[i][j] = similarity[j][i] = 1.0 if i == j else subspaces.similarity(X, Y)
            chance[i][j] = chance[j][i] = subspaces.chance(X, Y)
            if with_angles and i != j:
                angles.append({"pair": [j, i], "degrees": subspaces.angles(X, Y)})
    entry: dict[str, Any] = {"similarity": similarity, "chance": chance}
    if with_angles:
        entry["angles"] = angles
    if reasons := {str(i): X.reason for i, X in enumerate(spaces) if X.reason}:
        entry["reasons"] = reasons
    return entry


def _summary(elements: list[str], layers: list[dict[str, Any]]) -> dict[str, Any]:
    def over(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        mean = mean_matrix([layer["similarity"] for layer in chosen])
        chance = mean_matrix([layer["chance"] for layer in chosen])
        return {
            "mean": mean, "chance": chance,
            "pairs": {"similarity": off_diagonal(mean), "chance": off_diagonal(chance)},
        }  # fmt: skip

    modules = list(dict.fromkeys(layer["module"] for layer in layers))
    return {
        "elements": elements,
        **over(layers),
        "modules": {
            module: over([layer for layer in layers if layer["module"] == module]) for module in modules
        },
        "layers": layers,
    }
