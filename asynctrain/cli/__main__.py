"""``python -m asynctrain.cli`` is ``asynctrain``."""

from __future__ import annotations

import sys

from asynctrain.cli import main

sys.exit(main())
