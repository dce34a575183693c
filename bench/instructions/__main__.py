"""See bench.instructions."""

from __future__ import annotations

import sys

from bench import instructions


def main() -> int:
    """Print the counts; 1 when one has grown by over a tenth."""
    found = instructions.counts()
    if "--write" in sys.argv[1:]:
        instructions.write(found)
    before = instructions.baseline()
    print(f"{instructions.compiler()}, instructions per entry, {instructions.PEERS:,} entries")
    for name, now in found.items():
        was = (before or {}).get(name)
        change = f"{now / was - 1:+.1%}" if was else "new"
        print(f"  {name:24} {now:8.1f}  {change}")
    if before is None:
        print(
            "there is no baseline for this compiler: python -m bench.instructions --write makes one"
        )
        return 0
    worse = instructions.grown(found, before)
    for line in worse:
        print(f"grown: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
