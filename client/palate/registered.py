"""A model of the catalog, to be served as it is or trained. Knows the catalog and services; training is the recipe's."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from palate.backend import PlacementRequest
from palate.refused import refuse
from palate.session import Session, get_default_session
from palate.stand_in import LABEL as STAND_IN_LABEL
from palate.stand_in import stand_in_for
from palate.weights import find_weights
from palate_recipes.catalog import find_model, models

if TYPE_CHECKING:
    from palate.model import ModelTrainingRecipe
    from palate.predictor import Predictor


class RegisteredModel:
    """A model of the catalog.

    Args:
        model_name: A name, alias or hub id.
        model_version: Revision of the weights on the hub.
        model_provider: Publisher, or `pai`, which stands for any.
        session: Default: the default session.

    Raises:
        UnknownModelError: Names the nearest models.
    """

    def __init__(
        self,
        model_name: str,
        model_version: str | None = None,
        model_provider: str | None = None,
        session: Session | None = None,
    ) -> None:
        self.row = find_model(model_name, provider=model_provider)
        self.model_name = self.row.name
        self.model_version = model_version
        self.model_provider = self.row.provider
        self._session = session

    @classmethod
    def list(cls, task: str | None = None, session: Session | None = None) -> builtins.list[RegisteredModel]:
        """Returns the catalog's models.

        Args:
            task: Only those fit for it: `chat` or `text-generation`.
            session: Default: the default session.
        """
        return [cls(row.name, session=session) for row in models(task)]

    def training_recipe(
        self, method: str | None = None, hyperparameters: Mapping[str, Any] | None = None
    ) -> ModelTrainingRecipe:
        """Returns a recipe that trains this model."""
        from palate.model import ModelTrainingRecipe  # which names this class, as PAI's module does

        return ModelTrainingRecipe(
            model_name=self.model_name,
            model_version=self.model_version,
            method=method,
            hyperparameters=hyperparameters,
            session=self._session,
        )

    def deploy(
        self,
        service_name: str,
        instance_type: str | None = None,
        instance_count: int | None = 1,
        resource_config: object = None,
        resource_id: str | None = None,
        options: Mapping[str, Any] | None = None,
        wait: bool = True,
        inference_spec: object = None,
        *,
        show_logs: bool = False,
    ) -> Predictor:
        """Serves the model as it is, untuned; parameters as in `ModelTrainingRecipe.deploy`."""
        from palate.deployment import ServedModel, start_service

        refuse(resource_id=resource_id, inference_spec=inference_spec)
        session = self._session or get_default_session()
        name, uri, version, labels = self.model_name, None, self.model_version, {}
        if other := stand_in_for(name):
            name, uri, version, labels = other.name, other.uri, None, {STAND_IN_LABEL: other.for_name}
        source, row = find_weights(session, model_name=None if uri else name, model_uri=uri, model_version=version)
        return start_service(
            session,
            service_name=service_name,
            served=ServedModel(
                model={"name": name, "source": source.to_json(), "hub_id": row.hub_id if row else None}, labels=labels
            ),
            options=options,
            where=PlacementRequest(
                kind="services",
                instance_type=instance_type,
                instance_count=instance_count,
                resource_config=resource_config,
            ),
            wait=wait,
            show_logs=show_logs,
        )

    def __repr__(self) -> str:
        return f"RegisteredModel(model_name={self.model_name!r}, model_provider={self.model_provider!r})"
