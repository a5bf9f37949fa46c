"""What the README and the records say is there, is there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from trexport.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path for path in ROOT.glob("**/*.md") if not {".venv", ".envs"} & set(path.parts))
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`trexport {command} " in README


def test_modules_and_names_in_the_readme_exist() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        lines = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
        exec("\n".join(lines), {})
        compile(block, "README", "exec")


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_records_are_strict_json_and_name_their_hardware_and_command(record: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    fields = json.loads(record.read_text(encoding="utf-8"), parse_constant=refuse)
    assert fields["command"].startswith("python -m benchmarks")
    environment = fields["environment"]
    assert environment["versions"]["torch"]
    assert environment["gpu"] if environment["device"] == "cuda" else environment["cpu"]


def test_no_path_of_a_machine_in_what_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [path.relative_to(ROOT).as_posix() for path in RECORDS]
    pattern = re.compile(rb"[\"'\s](/home/|/root/|/tmp/|/Users/|/work/)\w")
    found = [
        name
        for name in names
        if name.endswith((".json", ".md", ".toml", ".yaml", ".py")) and not name.startswith("tests/")
        if pattern.search((ROOT / name).read_bytes())
    ]
    assert found == []
