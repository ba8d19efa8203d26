"""What a running service should be, and what it is: two files between the runner and the server program, in the work folder.

The runner writes `fleet.json`, the desired state, whenever the record changes. The server program starts, loads, drains and stops
engines until the service equals it, and reports in `fleet-state.json` what it has reached. Neither file is sent over a network.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from palate_recipes.specs.codec import File, Int, Sha256, whole
from palate_recipes.specs.run import INSTANCES_LIMIT as INSTANCES_LIMIT
from palate_recipes.specs.run import Autoscaling
from palate_recipes.specs.serve import Parity, ServeSpec

FLEET_FILE = "fleet.json"
FLEET_STATE_FILE = "fleet-state.json"

ADAPTERS_LIMIT = 256

VersionName = Annotated[str, whole("v[1-9][0-9]{0,5}")]
AdapterName = Annotated[str, whole("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class FleetVersion(Struct, frozen=True, kw_only=True):
    """One version of the service's model.

    Attributes:
        name: `v1`, `v2` and so on, in the order of updates.
        spec: What its engines serve. Service name, host, port, work folder and time limits are those of the service.
        instances: Engines that answer for it; 0 stops them all.
        share: Share of the requests for the tuned model; the shares of all versions add up to 1.
        autoscaling: How the number of engines follows the requests, from `instances` upwards; None: it does not.
    """

    name: VersionName
    spec: ServeSpec
    instances: Annotated[int, Meta(ge=0, le=INSTANCES_LIMIT)] = 1
    share: Share = 1.0
    autoscaling: Autoscaling | None = None


class FleetAdapter(Struct, frozen=True, kw_only=True):
    """An adapter for the service's base model, served under a model name of its own.

    Attributes:
        name: The model name in requests.
        digest: SHA-256 of the adapter's digests.json. Two adapters with the same name and another digest are two adapters.
        path: Folder with the verified files.
    """

    name: AdapterName
    digest: Sha256
    path: str


class Fleet(File, frozen=True, kw_only=True):
    """The desired state.

    Attributes:
        generation: Greater in each new one.
        versions: The versions that should answer. A new one joins when it has answered and was compared with its trained
            model; one that is no longer named answers its open requests and ends.
        adapters: The adapters that should be served beside the versions.
    """

    generation: Int
    versions: Annotated[tuple[FleetVersion, ...], Meta(min_length=1)]
    adapters: Annotated[tuple[FleetAdapter, ...], Meta(max_length=ADAPTERS_LIMIT)] = ()


class VersionState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a version.

    Attributes:
        name: Its name.
        state: `starting`; `ready`: it answers requests; `draining`: it answers its open requests and then ends; `failed`: it
            could not start or differs from the trained model, and none of its engines runs.
        instances: Engines that answer.
        engine: The engine with its version.
        reason: Why it failed.
        parity: The comparison with the trained model; None if it was not asked for.
        seconds: Time from its start to its first answers.
        restarts: How many times one of its engines ended unexpectedly and was started again.
        last_crash: The cause of the last one.
        max_lora_rank: The highest rank of an adapter that its engines have room for; None if they load no adapters.
    """

    name: VersionName
    state: Literal["starting", "ready", "draining", "failed"]
    instances: int = 0
    engine: str = ""
    reason: str = ""
    parity: Parity | None = None
    seconds: float = 0.0
    restarts: int = 0
    last_crash: str = ""
    max_lora_rank: int | None = None


class AdapterState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of an adapter: `loading`, `ready` (each engine answers for it) or `failed` with a reason."""

    name: AdapterName
    digest: Sha256
    state: Literal["loading", "ready", "failed"]
    reason: str = ""


class FleetState(File, frozen=True, kw_only=True):
    """What the service is.

    Attributes:
        generation: Of the desired state that it has read last. It is reached when no version is `starting` or `draining` and
            no adapter is `loading`.
        versions: The versions that run or failed, those of the desired state and those that still drain.
        adapters: The adapters of the desired state.
    """

    generation: Int
    versions: tuple[VersionState, ...]
    adapters: tuple[AdapterState, ...] = ()
