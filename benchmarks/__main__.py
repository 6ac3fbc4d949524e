"""`python -m benchmarks [NAME]`: runs one benchmark or all, prints a table, writes benchmarks/results.json.

A benchmark is a module of this package with `run() -> list[dict]`; each dict has `name`, `ours`, `unit`, `against`,
`theirs`, `ratio`, `goal` (None where none is set) and gets `met`, the commit and the machine.
"""

import importlib
import json
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.runtime.telemetry import configure_logging

FOLDER = Path(__file__).parent
_WIDTH_OF_A_LOG = 180  # columns; no name is cut where nobody's terminal ends


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.name.startswith("_"))


def machine() -> str:
    """What these numbers were taken on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{model}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """Short hash of the checkout, with a plus sign when it has changes; empty outside of one."""
    git = ["git", "-C", str(FOLDER)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _row(result: dict[str, Any]) -> list[str]:
    goal, met = result["goal"], result["met"]
    return [
        result["name"],
        f"{result['ours']:,.4g} {result['unit']}",
        f"{result['theirs']:,.4g}",
        result["against"],
        f"{result['ratio']:.3f}",
        "" if goal is None else f"{goal}",
        "" if met is None else ("yes" if met else "NO"),
    ]


def main(wanted: list[str]) -> int:
    """Run what is wanted (all when empty); 2 for an unknown name."""
    known = names()
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    configure_logging("benchmark", "warning", "json")  # a table is what is wanted, not a line for each call
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_LOG)
    results: list[dict[str, Any]] = []
    for name in wanted or known:
        console.print(f"running {name} ...", style="dim")
        for result in importlib.import_module(f"benchmarks.{name}").run():
            goal = result.get("goal")
            result["met"] = None if goal is None else bool(result["ratio"] >= goal)
            results.append(result)
    table = Table(title=f"commit {commit()} on {machine()}")
    for column in ("name", "ours", "theirs", "against", "ratio", "goal", "met"):
        table.add_column(column)
    for result in results:
        table.add_row(*_row(result))
    console.print(table)
    stamp = {"commit": commit(), "machine": machine()}
    (FOLDER / "results.json").write_text(json.dumps([{**result, **stamp} for result in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
