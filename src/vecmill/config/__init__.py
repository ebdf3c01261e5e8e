"""Every setting, declared once with its unit and default, grouped by the room that receives it.

Knows the environment, `.env` and flags. Does not know what any setting does.
"""

from vecmill.config.groups import (
    AccessSettings,
    BatchSettings,
    CacheSettings,
    EngineSettings,
    GenerationSettings,
    HttpSettings,
    InferenceSettings,
    JobSettings,
    LogSettings,
    ModelSettings,
    SchedulerSettings,
    SettingsGroup,
    StateSettings,
)
from vecmill.config.settings import Settings, load_settings, misspelt

__all__ = [
    "AccessSettings",
    "BatchSettings",
    "CacheSettings",
    "EngineSettings",
    "GenerationSettings",
    "HttpSettings",
    "InferenceSettings",
    "JobSettings",
    "LogSettings",
    "ModelSettings",
    "SchedulerSettings",
    "Settings",
    "SettingsGroup",
    "StateSettings",
    "load_settings",
    "misspelt",
]
