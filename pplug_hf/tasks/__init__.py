"""Tasks: what is asked of a user, how an answer is judged, and the settings that suit it."""
