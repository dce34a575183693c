"""``python -m flannel_dp`` is ``flannel-dp``."""

from __future__ import annotations

import sys

from flannel_dp.cli import main

if __name__ == "__main__":
    sys.exit(main())
