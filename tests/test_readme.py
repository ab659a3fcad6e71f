"""What the README shows is run, or held against what is run elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.process
@pytest.mark.parametrize("number", range(2))
def test_python_in_the_readme_runs(number: int, tmp_path: Path) -> None:
    code = blocks("python", README)[number]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    if "print" in code:
        assert re.fullmatch(r"test accuracy after 3 rounds: \d+\.\d%\n", done.stdout)
        assert len(list(tmp_path.glob("*/fedavg-wsa/final.safetensors"))) == 1


def test_python_in_the_readme_is_all_run() -> None:
    assert len(blocks("python", README)) == 2


def test_deployment_commands_are_those_that_the_deployment_test_follows() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = README.split("## Deploy")[1].split("\n## ")[0]
    commands = [line for block in blocks("sh", section) for line in block.splitlines()]
    documented = [line for block in blocks("sh", page) for line in block.splitlines()]
    assert len(commands) == 5
    assert [line for line in commands if line not in documented] == []
    assert blocks("toml", section) == blocks("toml", page)


def test_what_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
