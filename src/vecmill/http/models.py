"""/models and /dashboard/models: which models there are, what each holds; having them loaded, unloaded, fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from vecmill.core.errors import ModelLoading, NotAllowed
from vecmill.core.types import ModelCard, Task, Viewer
from vecmill.http.errors import documented
from vecmill.http.route import JsonRoute, NewWork, ViewerOf
from vecmill.http.services import Services, ServicesOf
from vecmill.inference.catalogue import Catalogue, Pull
from vecmill.inference.residency import ModelState, Resident
from vecmill.inference.text_tokenizer import named_prompts

router = APIRouter(tags=["Models"], route_class=JsonRoute, responses=documented(503))

LONGEST_NAME = 300  # characters
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]


def models_snapshot(services: Services, viewer: Viewer) -> list[dict[str, Any]]:
    """Every model that is listed, those of the settings first, as `GET /dashboard/models` gives it.

    Empty while the server starts. Reads no file and asks no driver.
    """
    catalogue = services.catalogue()
    if catalogue is None:
        return []
    listed = [_model(services, resident, viewer) for resident in catalogue]
    return [*listed, *(_fetched(pull, viewer) for pull in catalogue.pulls)]


def _model(services: Services, resident: Resident, viewer: Viewer) -> dict[str, Any]:
    card, state = resident.card, resident.state
    shown = ModelState.UNLOADED if state is ModelState.UNLOADING else state
    warmed, budget = services.warmed().get(resident.key), services.inference.budgets.get(resident.key)
    return {
        "id": card.id,
        "aliases": list(card.aliases),
        "task": card.task.value,
        "state": shown.value,
        "progress": None if resident.percent is None else round(resident.percent),
        "message": _message(resident.message, state, viewer),
        "on_demand": resident.is_named,
        "dimensions": _dimensions(card),
        "dtype": card.dtype,
        "dtype_reason": card.dtype_reason,
        "device": card.device,
        "prompts": named_prompts(card),
        "default_prompt": card.default_prompt_name,
        "max_tokens": card.max_model_len,
        "revision": card.revision,
        "license": card.license,
        "memory_bytes": resident.memory_bytes if shown is ModelState.LOADED else None,
        "sleeping_bytes": resident.sleeping_bytes or None,
        "last_used": resident.used_at,
        "loaded_at": resident.loaded_at,
        "pinned": resident.is_pinned,
        "budget": budget and {"tokens": budget.max_batch_tokens, "rows": budget.max_batch_size},
        "fit": warmed
        and {
            "a_ms": round(1000 * warmed.calibration.fixed_seconds, 3),
            "b_us_per_token": round(1e6 * warmed.calibration.seconds_per_token, 2),
            "changed_at": warmed.changed_at,
        },
    }


def _dimensions(card: ModelCard) -> list[int] | dict[str, int]:
    sizes = card.supported_dimensions
    return {"min": sizes[0], "max": sizes[-1]} if isinstance(sizes, range) else list(sizes)


def _message(message: str, state: ModelState, viewer: Viewer) -> str:
    """What failed may name paths, which are for admins."""
    return message if viewer.everything or state is not ModelState.FAILED else "failed; the log says why"


def _fetched(pull: Pull, viewer: Viewer) -> dict[str, Any]:
    """A model that is not here yet: nothing but its name and how far it is are known."""
    unknown = (
        *("dimensions", "dtype", "dtype_reason", "device", "default_prompt", "max_tokens", "license", "memory_bytes"),
        *("sleeping_bytes", "last_used", "loaded_at", "budget", "fit"),
    )
    return {
        "id": pull.model,
        "aliases": [],
        "task": None,
        "state": pull.state.value,
        "progress": round(pull.percent) if pull.state is ModelState.PULLING else None,
        "message": _message(pull.message, pull.state, viewer),
        "on_demand": False,
        "prompts": {},
        "revision": pull.revision,
        "pinned": False,
        **dict.fromkeys(unknown),
    }


@router.get("/dashboard/models", summary="Models in memory and on disk")
async def list_models(services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Each with its state (`loaded`, `loading`, `sleeping`, `unloaded`, `failed`, `pulling`), its memory and type."""
    return {"models": models_snapshot(services, viewer)}


class ModelBody(BaseModel):
    """A model by a name that is listed, or by its hub id where it is whole in the hub's cache."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "sentence-transformers/all-MiniLM-L6-v2"}]})

    model: Name
    task: Task | None = Field(None, description="Where an embedding model and a reranker have the same name.")


class PullBody(BaseModel):
    """A model by its hub id."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "BAAI/bge-m3"}]})

    model: Name
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="A branch, tag, commit or `refs/pr/N`. Left out: the default branch."
    )


@dataclass(frozen=True, slots=True)
class _Admin:
    services: Services
    viewer: Viewer
    catalogue: Catalogue

    def shown(self, changed: Resident | Pull) -> dict[str, Any]:
        if isinstance(changed, Pull):
            listed = next((each for each in self.catalogue if each.card.id == changed.model), None)
            return _fetched(changed, self.viewer) if listed is None else _model(self.services, listed, self.viewer)
        return _model(self.services, changed, self.viewer)


async def _admin(services: ServicesOf, viewer: ViewerOf, new_work: NewWork) -> _Admin:
    if not viewer.everything:
        raise NotAllowed(
            "Loading, unloading and fetching models is for keys with the scope `admin`: send such a key, or that of "
            "ADMIN_API_KEY."
        )
    catalogue = services.catalogue()
    if catalogue is None:
        raise ModelLoading("503: the server is temporarily unavailable, it is starting; try again.")
    return _Admin(services, viewer, catalogue)


AdminOf = Annotated[_Admin, Depends(_admin)]


@router.post("/models/load", summary="Load a model", status_code=202, responses=documented(404, 409))
async def load_model(body: ModelBody, admin: AdminOf) -> dict[str, Any]:
    """Have a model loaded; from then on requests may name it. The answer comes before it is done."""
    return admin.shown(await admin.catalogue.load(body.model, body.task))


@router.post("/models/unload", summary="Unload a model", status_code=202, responses=documented(404, 409))
async def unload_model(body: ModelBody, admin: AdminOf) -> dict[str, Any]:
    """Have a model's memory given back, also that in which it sleeps. The next request that names it has it loaded
    again. 409 while it is in use."""
    return admin.shown(admin.catalogue.unload(body.model, body.task))


@router.post("/models/pull", summary="Fetch a model from the hub", status_code=202, responses=documented(409))
async def pull_model(body: PullBody, admin: AdminOf) -> dict[str, Any]:
    """Have a model fetched into the hub's cache, one at a time; POST /models/load then loads it."""
    return admin.shown(admin.catalogue.pull(body.model, body.revision))
