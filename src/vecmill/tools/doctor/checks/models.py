"""The configured models: here, or to be fetched, and whether that can be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

from huggingface_hub import constants, get_token
from rich.filesize import decimal

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models import hub
from vecmill.tools.doctor.configured import Configured, configured
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.installing import install
from vecmill.tools.doctor.report import Finding, Status, fail, ok, together, warn

HUB_SECONDS = 10.0


def check(context: Context) -> Finding:
    """Each model; the hub is asked only for what is not in its cache."""
    found = configured(context)
    if not found:
        return fail("no model is configured", "Set EMBED_MODEL.")
    parts = [_judge(context, model) for model in found]
    fetching = any(model.to_fetch for model in found)
    if fetching and find_spec("hf_xet") is None:
        parts.append(warn("hf_xet is not installed: downloads are slower", install("hf_xet")))
    details = {
        "cache": constants.HF_HUB_CACHE,
        "endpoint": constants.ENDPOINT,
        "offline": constants.HF_HUB_OFFLINE,
        "token": _token(context),
    }
    return together([*parts, ok("", **details)])


def _judge(context: Context, model: Configured) -> Finding:
    if model.problem is not None:
        setting = f"{model.task.value.upper()}_MODEL"
        return fail(model.problem, f"Set {setting} to a folder with a model's files, a hub id (owner/name), or auto.")
    if model.checkpoint is not None:
        size = decimal(model.checkpoint.weight_bytes)
        commit = f", revision {model.checkpoint.commit}" if model.checkpoint.commit else ""
        return ok(f"{model.named}: {size} in {model.checkpoint.folder}{commit}")
    plan = context.plan(model.name, HUB_SECONDS)
    return _unreachable(model, plan) if isinstance(plan, StartupError) else _to_fetch(model, plan)


def _unreachable(model: Configured, error: StartupError) -> Finding:
    said = f"{model.named} is not here: {error.message.removeprefix(f'{model.name}: ')}"
    pull = f"\nvecmill pull {model.name}" if model.automatic or constants.HF_HUB_OFFLINE else ""
    if constants.HF_HUB_OFFLINE:
        said = f"{model.named} is not here, and HF_HUB_OFFLINE=1 forbids fetching it: Unset HF_HUB_OFFLINE."
    finding = split(warn if model.automatic else fail, said)
    instead = ""
    if model.automatic:
        small = "the small bundled model is served" if model.task is Task.EMBED else "documents are ranked by cosine"
        instead = f"; until it is, {small}"
    return replace(finding, seen=finding.seen + instead, cure=f"{finding.cure or ''}{pull}".strip())


def _to_fetch(model: Configured, plan: hub.Plan) -> Finding:
    seen = f"{model.named}: not here yet, {decimal(plan.missing_size)} to fetch at the start; licence {plan.licence}"
    pull = f"vecmill pull {model.name}"
    if plan.non_commercial:
        return warn(f"{seen}, which forbids commercial use", f"{pull} (fetches it now)")
    return Finding(Status.OK, seen, f"{pull} (fetches it now)")


def _token(context: Context) -> str:
    """Where a token comes from; never the token."""
    if context.settings.model.hf_token is not None:
        return "HF_TOKEN"
    return "hf auth login" if get_token() else "none"


def split(judge: Callable[..., Finding], sentence: str) -> Finding:
    """A sentence of ours, `what is wrong: what helps`, as a finding."""
    seen, colon, cure = sentence.rpartition(": ")
    return judge(seen, cure[:1].upper() + cure[1:]) if colon else judge(sentence)
