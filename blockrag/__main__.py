"""`python -m blockrag`: the `blockrag` command where scripts are not on the path."""

from __future__ import annotations

from blockrag.cli import main

if __name__ == "__main__":
    main()
