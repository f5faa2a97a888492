"""What a compiled engine was made from, as a hash: the sources in csrc/, and setup.py, which has the compiler's flags.

The library carries the hash (setup.py), and the package compares it with the sources that lie beside it, if any do
(native_abi.py): a library of other sources is no longer taken for theirs. Standard library only: setup.py runs this.
"""

import hashlib
from pathlib import Path

_SUFFIXES = {".cpp", ".h", ".inl"}


def source_hash(root: Path) -> str | None:
    """16 hexadecimal digits; None where root is no checkout with csrc/ and setup.py. Takes about a millisecond."""
    csrc, recipe = root / "csrc", root / "setup.py"
    if not csrc.is_dir() or not recipe.is_file():
        return None
    tests = csrc / "tests"  # not part of the library
    sources = (p for p in csrc.rglob("*") if p.suffix in _SUFFIXES and tests not in p.parents)
    made = hashlib.sha256()
    for path in [*sorted(sources), recipe]:
        content = path.read_bytes()
        made.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        made.update(content)
    return made.hexdigest()[:16]
