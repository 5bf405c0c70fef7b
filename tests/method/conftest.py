"""The first example of a jitted function pays for its compilation: no deadline per example."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
