"""The bundle that ships with the package, a small demonstration model: docs/builtin-model.md."""

from pathlib import Path

BUILTIN = Path(__file__).parent / "bundle"
