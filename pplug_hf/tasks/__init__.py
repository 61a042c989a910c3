"""Tasks: what is asked of a user, how an answer is judged, and the settings that suit it."""

from . import lamp_metrics as lamp_metrics  # registers its metrics
