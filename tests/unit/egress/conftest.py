"""Properties here hold whatever the clock says: a busy host must not fail them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("egress", deadline=None)
settings.load_profile("egress")
