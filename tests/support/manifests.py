"""Manifests of runs that no client submitted, as small as they can be. Knows the records' types, no store."""

from __future__ import annotations

from typing import Any

from palate_recipes.hyperparameters import Hyperparameters
from palate_recipes.specs.run import Deployment, ServeManifest, TrainManifest
from palate_recipes.specs.train import TrainSpec
from palate_recipes.specs.weights import BaseModel, WeightsSource

NOWHERE = WeightsSource(kind="folder", location="/nowhere")


def base_model(name: str = "m", *, hub_id: str | None = None) -> BaseModel:
    """Returns a model whose weights are nowhere."""
    return BaseModel(name=name, source=NOWHERE, hub_id=hub_id)


def train_spec(model: str = "m", **fields: Any) -> TrainSpec:
    """Returns a training of LoRA in float32; fields on top of that, `hyperparameters` as a dict."""
    values = Hyperparameters(**fields.pop("hyperparameters", {}))
    known = {"model": base_model(model), "method": "LoRA_LLM", "precision": "float32"}
    return TrainSpec(**{**known, **fields}, hyperparameters=values)


def train_manifest(name: str = "one", *, labels: dict[str, str] | None = None, **fields: Any) -> TrainManifest:
    """Returns the manifest of a job; see `train_spec`."""
    return TrainManifest(name=name, backend="process", body=train_spec(**fields), labels=labels or {})


def serve_manifest(name: str = "svc", *, model: str = "m", **fields: Any) -> ServeManifest:
    """Returns the manifest of a service that serves a base model; fields of its `Deployment` on top."""
    return ServeManifest(name=name, backend="process", body=Deployment(model=base_model(model), **fields))
