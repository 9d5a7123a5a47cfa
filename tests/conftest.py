"""What every test shares: hypothesis without a clock, since a busy machine is no counterexample."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
